"""What this machine is: the CPUs a process may use, and a GPU that torch cannot see."""
import functools
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from conftest import ROOT
from nanochat import hardware
from nanochat.common import UserError, choose_device_type, compute_init, warn_once
from nanochat.hardware import (
    allowed_cores,
    available_cpus,
    bind_workers,
    cgroup_quota,
    compile_problem,
    cpu_quota,
    known_device,
    memory_limit,
    mps_problem,
    peak_flops,
    preferred_dtype,
    reason_of,
    threads_are_chosen,
    unseen_gpu,
)


@pytest.mark.parametrize("text, cpus", [
    ("max 100000\n", None),
    ("200000 100000\n", 2),
    ("250000 100000\n", 2),
    ("10000 100000\n", 1),
    ("", None),
    ("1 0", None),
])
def test_a_cgroups_quota_is_a_number_of_cpus(text, cpus):
    assert cpu_quota(text) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_cpus_are_those_that_the_scheduler_gives(monkeypatch):
    assert 1 <= available_cpus() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert available_cpus() == 1


# What /proc/self/cgroup says, the files below /sys/fs/cgroup, and the CPUs
CGROUPS = [
    ("0::/\n", {"cpu.max": "300000 100000"}, 3),                     # a container's own, version 2
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),   # its parent's
    ("0::/a/b\n", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "800000 100000"}, 1),
    ("0::/of/the/host\n", {"cpu.max": "400000 100000"}, 4),          # not mounted in the container
    (
        "3:memory:/x\n2:cpu,cpuacct:/x\n0::/\n",                     # version 1
        {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
        2,
    ),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("1:cpuset:/\n", {"cpu.max": "100000 100000"}, None),
    ("", {}, None),
]


@pytest.mark.parametrize("membership, files, cpus", CGROUPS)
def test_the_smallest_quota_of_all_enclosing_cgroups_counts(tmp_path, membership, files, cpus):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    assert cgroup_quota(membership, tmp_path) == cpus


@pytest.mark.parametrize("files, limit", [
    ({}, None),
    ({"memory.max": "max\n"}, None),
    ({"memory.max": "4294967296\n"}, 2**32),
    ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ({"memory.max": "2147483648\n", "memory/memory.limit_in_bytes": "4294967296\n"}, 2**31),
])
def test_a_container_has_no_more_memory_than_its_limit(tmp_path, monkeypatch, files, limit):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert memory_limit(tmp_path) == limit
    monkeypatch.setattr(hardware, "memory_limit", lambda: limit)
    monkeypatch.setattr(hardware, "memory_gb", lambda: 3.0)
    assert hardware.host_memory() == min(limit or 3 * 2**30, 3 * 2**30)
    monkeypatch.setattr(hardware, "memory_gb", lambda: None)
    assert hardware.host_memory() == limit


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_sandbox_that_refuses_affinity_masks_stops_nothing(monkeypatch):
    import torch  # noqa: F401 - before folders are listed by a shim
    monkeypatch.setattr(os, "sched_getaffinity", refused, raising=False)
    assert allowed_cores() == list(range(os.cpu_count()))
    assert 1 <= available_cpus() <= os.cpu_count()

    lists = iter([["7"], ["7", "8", "9"], []])  # of this process's threads, before and after
    monkeypatch.setattr(os, "listdir", lambda path: next(lists))
    monkeypatch.setattr(hardware, "allowed_cores", lambda: [0, 1, 2])
    monkeypatch.setattr(os, "sched_setaffinity", refused, raising=False)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    bind_workers()


@pytest.mark.parametrize("given, is_dist, launched_with, chosen", [
    (None, False, "", False),
    ("3", False, "", True),
    ("1", False, "", True),
    (None, True, "", False),
    ("3", True, "PATH=/bin", True),                       # torchrun sets nothing but 1
    ("1", True, "PATH=/bin", False),                      # torchrun's own
    ("1", True, "PATH=/bin\0OMP_NUM_THREADS=1", True),
    ("1", True, "OMP_NUM_THREADS=12", False),
    ("4,2", True, "", True),
])
def test_the_users_number_of_threads_is_told_from_torchruns(
    monkeypatch, given, is_dist, launched_with, chosen
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(hardware, "text_of", lambda path: launched_with)
    assert threads_are_chosen(is_dist) is chosen


@pytest.mark.parametrize("script, given, policy, turns", [
    ("scripts.chat_cli", {}, "passive", None),
    ("scripts.chat_web", {}, None, "1000"),
    ("scripts.base_train", {}, None, "1000"),
    ("scripts.chat_cli", {"OMP_WAIT_POLICY": "active"}, "active", None),
    ("scripts.base_train", {"OMP_WAIT_POLICY": "active"}, "active", None),
    ("scripts.chat_cli", {"GOMP_SPINCOUNT": "7"}, None, "7"),
    ("scripts.base_train", {"KMP_BLOCKTIME": "200"}, None, None),
])
def test_threads_spin_briefly_and_those_of_a_chat_not_at_all_unless_the_user_says_otherwise(
        script, given, policy, turns):
    code = (
        "import os, sys, scripts\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'),"
        " 'torch' in sys.modules)"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code, script]
    environment = {**inherited, **given}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(policy), str(turns), "False"], done.stderr


COMPILER_MESSAGES = [
    ("CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\ng++: fatal error: no cc1",
     "g++: fatal error: no cc1"),
    ("InvalidCxxCompiler: No working C++ compiler found in torch.cpp.cxx: (None, 'g++')\n\nSet X",
     "InvalidCxxCompiler: No working C++ compiler found in torch.cpp.cxx: (None, 'g++')"),
    ("\n", "no reason given"),
    ("x" * 999, "x" * 160),
]


@pytest.mark.parametrize("message, reason", COMPILER_MESSAGES)
def test_a_compilers_message_becomes_one_line(message, reason):
    assert reason_of(message) == reason


@pytest.mark.parametrize("error", [
    RuntimeError("g++: not found"),
    PermissionError(13, "Permission denied"),
    KeyError("getpwuid(): uid not found: 1234"),
    ImportError("libgomp.so.1: cannot open shared object file"),
])
def test_whatever_keeps_torch_from_compiling_is_a_reason(monkeypatch, error):
    import torch

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    assert compile_problem(torch.device("cpu"))


def test_a_kernel_that_a_killed_compiler_left_cut_is_compiled_again(tmp_path):
    """torch would try to load it at every start, and training would run uncompiled for good."""
    whole = Path(sysconfig.get_path("platlib")) / "torch" / "lib" / "libtorch_global_deps.so"
    if not whole.exists():
        pytest.skip("torch has no such library here")
    content = whole.read_bytes()
    old = time.time() - 10 * hardware.CUT_AFTER_SECONDS
    files = {"whole": content, "cut": content[:4096], "header": content[:40], "empty": b"",
             "new": b"", "other": b"\xcf\xfa\xed\xfe" + bytes(90)}
    for name, bytes_of_file in files.items():
        path = tmp_path / "2n" / f"{name}.main.so"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes_of_file)
        if name != "new":
            os.utime(path, (old, old))
    hardware.remove_cut_kernels(tmp_path)
    left = {path.name.split(".")[0] for path in tmp_path.glob("*/*")}
    assert left == {"whole", "new", "other"}


def test_the_cache_of_kernels_is_torchs_own(monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    assert str(hardware.kernel_cache()) == cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert str(hardware.kernel_cache()) == "/elsewhere"


@pytest.mark.parametrize("error", [KeyError("uid not found: 12345"), OSError("no username set")])
def test_a_user_without_a_name_can_compile_all_the_same(monkeypatch, error):
    """A container may run as a number that no file lists; Python 3.13 raises another error."""
    def nameless():
        raise error

    monkeypatch.setattr(hardware.getpass, "getuser", nameless)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert hardware.kernel_cache().name == f"torchinductor_uid_{os.getuid()}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert hardware.kernel_cache() == Path("/elsewhere")


# The files of drivers, whether torch sees a GPU, its build, the environment, and what the line says
NVIDIA, AMD = "/dev/nvidia0", "/dev/kfd"


@pytest.mark.parametrize("files, build, environment, said", [
    ([NVIDIA], "CPU", {}, "torch's CUDA build"),
    ([AMD], "CPU", {}, "torch's ROCm build"),
    ([AMD], "CUDA 12.8", {"CUDA_VISIBLE_DEVICES": ""}, "torch's ROCm build"),
    ([NVIDIA], "CUDA 12.8", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' may hide it"),
    ([AMD], "ROCm 6.4", {"ROCR_VISIBLE_DEVICES": "9"}, "ROCR_VISIBLE_DEVICES='9' may hide it"),
    ([NVIDIA], "CUDA 12.8", {}, "`nvidia-smi` must list"),
    ([AMD], "ROCm 6.4", {}, "`rocminfo` must list"),
])
def test_a_gpu_that_torch_cannot_see_is_named_with_the_remedy(files, build, environment, said):
    line = unseen_gpu(files, False, "2.10.0", build, environment)
    assert said in line and files[0] in line and f"torch 2.10.0 (build: {build})" in line
    assert "--device_type=cpu" in line and "\n" not in line


def test_nothing_is_said_where_torch_sees_a_gpu_or_there_is_none():
    assert unseen_gpu([NVIDIA], True, "2.10.0", "CUDA 12.8", {}) is None
    assert unseen_gpu([], False, "2.10.0", "CPU", {}) is None


def test_a_run_is_refused_unless_its_device_was_named(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))
    monkeypatch.setattr(hardware, "find_unseen_gpu", lambda: "this machine has a GPU")
    with pytest.raises(UserError, match="this machine has a GPU"):
        choose_device_type("")
    assert choose_device_type("cpu") == "cpu"
    with pytest.raises(UserError, match="device_type=cuda is not available here"):
        choose_device_type("cuda")
    monkeypatch.setattr(hardware, "find_unseen_gpu", lambda: None)
    assert choose_device_type("") == "cpu"


# -------------------------------------------------------------------------------- peaks

@pytest.mark.parametrize("name, title", [
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H100 NVL", "H100 NVL"),
    ("NVIDIA H200", "H200"),
    ("NVIDIA GH200 480GB", "GH200"),
    ("NVIDIA A100-SXM4-80GB", "A100"),
    ("AMD Instinct MI355X", "MI355X"),
    ("AMD Instinct MI300X", "MI300X"),
    ("AMD Radeon RX 7900 XTX", "7900 XTX"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA GB10", "GB10"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA A1000", None),
    ("AMD Radeon RX 7900 XT", None),
    ("Apple M3", None),
])
def test_a_device_has_its_own_peak_or_none(name, title):
    """docs/traps.md: wrong-throughput"""
    device = known_device(name)
    assert (device and device.title) == title
    assert peak_flops(name) == (device and device.bf16)
    assert peak_flops(name, "float32") is None, "the table has bfloat16 only"


# -------------------------------------------------------------------------------- MPS

@pytest.fixture
def a_mac(monkeypatch):
    """A machine with an MPS device, and a function that says what the device makes of gradients,
    or of another test of hardware.py."""
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: True))
    mps_problem.cache_clear()
    warn_once.cache_clear()

    def computes(by, test="tiny_gradients"):
        right = getattr(hardware, test)

        def results(device):
            found = right(torch.device("cpu"))
            return by(found) if device.type == "mps" else found
        monkeypatch.setattr(hardware, test, results)

    computes(lambda found: found)
    computes(lambda found: found, "tiny_decoding")
    yield computes
    mps_problem.cache_clear()
    warn_once.cache_clear()


def test_mps_is_chosen_where_its_gradients_are_right(a_mac, capsys):
    a_mac(lambda found: [x * 1.0001 for x in found])
    assert choose_device_type("") == "mps" and choose_device_type("cpu") == "cpu"
    assert capsys.readouterr().err == ""


def fail(message):
    raise RuntimeError(message)


@pytest.mark.parametrize("by, said", [
    (lambda found: fail("Placeholder storage has not been allocated"), "Placeholder storage"),
    (lambda found: [x * 1.1 for x in found], "off by 0.1"),
    (lambda found: [found[0], found[1] * float("nan")], "off by nan"),
    (lambda found: [found[0], -found[1]], "off by 2"),
])
def test_a_mac_whose_mps_device_errs_trains_on_its_cpu_and_says_why(a_mac, capsys, by, said):
    a_mac(by)
    assert choose_device_type("") == "cpu"
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert choose_device_type("mps") == "mps", "whoever names it gets it"


@pytest.mark.parametrize("by, said", [
    (lambda found: [-found[0], found[1]], "a step of decoding is off by 2"),
    (lambda found: [found[0], found[1] % 1024], "a step of decoding is off by"),
    (lambda found: fail("The operator 'aten::x' is not implemented"), "aten::x"),
])
def test_a_mac_whose_mps_device_decodes_wrongly_chats_on_its_cpu(a_mac, capsys, by, said):
    a_mac(by, "tiny_decoding")
    assert choose_device_type("") == "cpu"
    assert said in capsys.readouterr().err


def test_the_tiny_decoding_attends_as_a_loop_does():
    import torch
    y, rows = hardware.tiny_decoding(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((2, 2, 3, 16), generator=generator)
    new = torch.randn((2, 20, 2, 16), generator=generator)
    for t, end in enumerate((18, 19, 20)):
        scores = torch.einsum("bhd,bshd->bhs", q[:, :, t], new[:, :end]) / 4
        wanted = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), new[:, :end])
        torch.testing.assert_close(y[:, :, t], wanted)
    assert rows.tolist() == [n * 4099 * 1000003 % 131072 for n in range(20)]


def test_mps_has_no_ranks_and_computes_in_float32(a_mac, monkeypatch):
    a_mac(lambda found: found)
    assert preferred_dtype("mps") == "float32"
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one MPS device for 2 ranks"):
        compute_init("mps")


def test_no_float64_tensor_is_made_on_the_device():
    """MPS has none. NumPy's own and those of the CPU are free."""
    allowed = {
        "nanochat/common.py": 1,        # these two on collective_device()
        "nanochat/loss_eval.py": 1,
        "nanochat/answers.py": 2,       # of a list of numbers; and as in diffusion_engine.py
        "nanochat/loss_check.py": 1,    # as well
        "nanochat/diffusion_engine.py": 3,      # of logits that MPS hands to the CPU
    }
    found = {}
    for path in sorted((ROOT / "nanochat").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        count = len(re.findall(r"torch\.(?:float64|double)|(?<!cpu\(\))\.double\(\)", text))
        if count:
            found[path.relative_to(ROOT).as_posix()] = count
    assert found == allowed


def test_memory_and_caches_are_those_of_the_device(monkeypatch):
    import torch
    emptied = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 24)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    devices = [torch.device(name) for name in ("cuda", "mps", "cpu")]
    assert [hardware.device_memory(device) for device in devices] == [80, 24, None]
    for device in devices:
        hardware.empty_cache(device)
    assert emptied == ["cuda", "mps"]
