"""The doctor: what tools of each vendor say, judged; probes that hang or crash; the whole command.

No GPU is needed: the tools' answers are texts in the vendors' formats, and fakes on PATH print
them.
"""
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, last_json
from nanochat import doctor as probing
from nanochat.probes import (
    GPU_FIELDS,
    Agent,
    GpuProcess,
    GpuState,
    busy_shares,
    check_agents,
    check_architecture,
    check_cpus,
    check_disk,
    check_exchange,
    check_gpu_memory,
    check_limits,
    check_memory,
    check_nvidia_driver,
    check_packages,
    check_rate,
    check_variables,
    exports_of,
    parse_meminfo,
    parse_nvidia_processes,
    parse_nvidia_smi,
    parse_rocm_smi,
    parse_rocminfo,
    relevant_variables,
)
from scripts import doctor

NVIDIA_SMI = """\
0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 60123, 97
"""
NVIDIA_SPARK = "0, NVIDIA GB10, 580.95.05, [N/A], [N/A], 0\n"
NVIDIA_PROCESSES = """\
4711, /usr/bin/python3, with a comma, 60102
4712, [Not Found], [N/A]
"""
ROCM_SMI = """\
WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status

{"card0": {"GPU use (%)": "0", "VRAM Total Memory (B)": "25753026560", \
"VRAM Total Used Memory (B)": "27267072", "Card Series": "Radeon RX 7900 XTX", \
"Card Model": "0x744c", "GFX Version": "gfx1100"}, \
"card1": {"GPU use (%)": "88", "VRAM Total Memory (B)": "25753026560", \
"VRAM Total Used Memory (B)": "21474836480", "Card series": "Radeon RX 7900 XTX"}, \
"system": {"Driver version": "6.10.5", "PID4711": "python, 1, 21474836480, 0, 0"}}
"""
ROCMINFO = """\
ROCk module is loaded
==========
HSA Agents
==========
*******
Agent 1
*******
  Name:                    AMD Ryzen 9 7950X 16-Core Processor
  Uuid:                    CPU-XX
  Marketing Name:          AMD Ryzen 9 7950X 16-Core Processor
  Device Type:             CPU
  Compute Unit:            32
  Pool Info:
    Pool 1
      Segment:                 GLOBAL; FLAGS: FINE GRAINED
*******
Agent 2
*******
  Name:                    gfx1100
  Uuid:                    GPU-1234
  Marketing Name:          Radeon RX 7900 XTX
  Device Type:             GPU
  Memory Properties:
  Compute Unit:            96
  ISA Info:
    ISA 1
      Name:                    amdgcn-amd-amdhsa--gfx1100
*******
Agent 3
*******
  Name:                    gfx1036
  Uuid:                    GPU-XX
  Marketing Name:          AMD Radeon Graphics
  Device Type:             GPU
  Memory Properties:       APU
  Compute Unit:            2
*** Done ***
"""


def statuses(checks):
    return [check.status for check in checks]


# --------------------------------------------------------------------------------------------------
# NVIDIA

def test_nvidia_smi_is_read_and_a_field_that_a_device_lacks_is_none():
    first, second = parse_nvidia_smi("a warning\n" + NVIDIA_SMI)
    assert first == GpuState("NVIDIA H100 80GB HBM3", "550.54.15", 81559 * 2**20, 4 * 2**20, 0)
    assert second.busy == 97
    [spark] = parse_nvidia_smi(NVIDIA_SPARK)
    assert spark.memory is None and spark.used is None
    assert parse_nvidia_smi("NVIDIA-SMI has failed because ...\n") == []


def test_processes_on_a_gpu_are_read():
    assert parse_nvidia_processes(NVIDIA_PROCESSES) == [
        GpuProcess(4711, "/usr/bin/python3, with a comma", 60102 * 2**20),
        GpuProcess(4712, "[Not Found]", None),
    ]


@pytest.mark.parametrize("driver, build, sees_gpu, status", [
    ("550.54.15", "CUDA 12.8", True, "ok"),
    ("550.54.15", "CUDA 13.0", False, "problem"),
    ("550.54.15", "CUDA 13.0", True, "ok"),            # with a compatibility package
    ("580.65.06", "CUDA 13.0", False, "ok"),
    ("470.57.02", "CUDA 12.8", False, "problem"),
    ("470.57.02", "CUDA 99.1", False, "ok"),           # a version that the table does not know
])
def test_a_driver_older_than_torchs_cuda_is_a_problem(driver, build, sees_gpu, status):
    check = check_nvidia_driver(driver, build, sees_gpu)
    assert check.status == status and driver in check.detail and build in check.detail
    assert check.stops == (status == "problem")


@pytest.mark.parametrize("architecture, built_for, status", [
    ("sm_90", ["sm_80", "sm_90"], "ok"),
    ("sm_89", ["sm_80", "sm_86"], "ok"),               # of the same major version
    ("sm_61", ["sm_75", "sm_80"], "problem"),
    ("sm_120", ["sm_80", "sm_90"], "problem"),
    ("sm_120", ["sm_80", "compute_90"], "ok"),         # PTX is compiled for it
    ("sm_100", ["sm_100a", "sm_120"], "ok"),
    ("gfx1100", ["gfx942", "gfx1100"], "ok"),
    ("gfx1036", ["gfx942", "gfx1100"], "problem"),
])
def test_a_gpu_for_which_torch_has_no_kernels_is_a_problem(architecture, built_for, status):
    assert check_architecture("A GPU", architecture, built_for).status == status


def test_who_holds_the_memory_of_a_gpu_is_named():
    states, processes = parse_nvidia_smi(NVIDIA_SMI), parse_nvidia_processes(NVIDIA_PROCESSES)
    free, used = check_gpu_memory(states, processes)
    assert (free.status, used.status) == ("ok", "problem")
    assert "pid 4711" in used.detail and "97 % busy" in used.detail
    assert statuses(check_gpu_memory(parse_nvidia_smi(NVIDIA_SPARK), [])) == ["ok"]


# --------------------------------------------------------------------------------------------------
# AMD

def test_rocm_smi_is_read_whatever_its_keys_are_called():
    states, processes = parse_rocm_smi(ROCM_SMI)
    assert [state.name for state in states] == ["Radeon RX 7900 XTX"] * 2
    assert states[0].memory == 25753026560 and states[1].busy == 88
    assert states[0].driver == "6.10.5"
    assert processes == [GpuProcess(4711, "python", 21474836480)]


def test_rocminfo_tells_cards_from_the_graphics_unit_of_a_cpu():
    assert parse_rocminfo(ROCMINFO) == [
        Agent("gfx1100", "Radeon RX 7900 XTX", 96, False),
        Agent("gfx1036", "AMD Radeon Graphics", 2, True),
    ]
    older = ROCMINFO.replace("Memory Properties:       APU", "Chip ID:                 5710")
    assert [agent.integrated for agent in parse_rocminfo(older)] == [False, True]


# docs/traps.md: nccl-channels
def test_an_integrated_gpu_beside_cards_is_to_be_hidden():
    agents = parse_rocminfo(ROCMINFO)
    [check] = check_agents(agents, {})
    assert check.status == "problem"
    assert exports_of([check]) == {"HIP_VISIBLE_DEVICES": "0"}
    assert statuses(check_agents(agents, {"ROCR_VISIBLE_DEVICES": "0"})) == ["ok"]
    assert statuses(check_agents(agents[1:], {})) == ["ok"]    # alone it is what there is
    [nothing] = check_agents([], {})
    assert nothing.status == "problem" and "render" in nothing.remedy
    assert not nothing.stops, "the CPU trains"


# --------------------------------------------------------------------------------------------------
# the kernel

def test_memory_is_the_least_of_what_is_there_and_what_is_allowed():
    meminfo = parse_meminfo("MemTotal:       24105168 kB\nMemAvailable:   20000000 kB\nHuge: 0\n")
    assert meminfo["MemTotal"] == 24105168 * 1024
    assert statuses(check_memory(meminfo, None)) == ["ok"]
    assert statuses(check_memory(meminfo, 10**9)) == ["problem"]
    assert statuses(check_memory({}, None)) == ["note"]


def test_time_that_others_use_and_that_the_hypervisor_steals_is_told():
    before = "cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 ...\n"
    after = "cpu  140 0 110 1040 0 0 0 10 0 0\ncpu0 ...\n"
    assert busy_shares(before, before) is None
    used, stolen = busy_shares(before, after)
    assert (used, stolen) == (0.6, 0.1)
    checks = check_cpus(8, 8, 2, (used, stolen))
    assert statuses(checks) == ["note", "problem", "note"]
    assert checks[0].detail.startswith("2 to use")
    assert statuses(check_cpus(2, 2, None, None)) == ["ok"]


def test_limits_count_where_they_will_be_hit():
    assert statuses(check_limits(1_048_576, 64 * 2**20, 1)) == ["ok", "ok"]
    files, shared = check_limits(256, 64 * 2**20, 8)
    assert (files.status, shared.status) == ("note", "problem")
    assert "--shm-size" in shared.remedy


def test_a_disk_is_judged_by_room_and_speed():
    assert check_disk("/b", 50e9, 500e6, 2e9).status == "ok"
    assert check_disk("/b", 50e9, 5e6, None).status == "note"
    assert check_disk("/b", 50e9, 500e6, 60e9).status == "problem"
    assert check_disk("/b", 5e7, 500e6, None).stops


# --------------------------------------------------------------------------------------------------
# variables, packages, rates

def test_of_a_token_only_that_it_is_set_is_shown_and_no_password_of_a_proxy():
    shown = relevant_variables({
        "HF_TOKEN": "hf_abc",
        "https_proxy": "http://me:word@proxy:3128",
        "NCCL_P2P_DISABLE": "1",
        "EDITOR": "vi",
    })
    assert shown == {
        "HF_TOKEN": "(set)",
        "https_proxy": "http://proxy:3128",
        "NCCL_P2P_DISABLE": "1",
    }


# docs/traps.md: expandable-segments, nccl-channels
@pytest.mark.parametrize("name, value, build, status", [
    ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "ROCm 6.4", "problem"),
    ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "CUDA 12.8", "ok"),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "ROCm 6.4", "problem"),
    ("NCCL_MIN_NCHANNELS", "112", "ROCm 6.4", "note"),
    ("CUDA_LAUNCH_BLOCKING", "1", "CUDA 12.8", "problem"),
    ("TORCHDYNAMO_DISABLE", "1", "CPU", "problem"),
    ("TORCHDYNAMO_DISABLE", "0", "CPU", "ok"),
    ("HSA_OVERRIDE_GFX_VERSION", "11.0.0", "ROCm 6.4", "note"),
    ("OMP_NUM_THREADS", "1", "CPU", "note"),
    ("OMP_NUM_THREADS", "4", "CPU", "ok"),
])
def test_variables_that_do_harm_are_found(name, value, build, status):
    first, *others = check_variables({name: value, "HOME": "/root"}, build, 4)
    assert first.status == "ok" and f"{name}={value}" in first.detail
    assert statuses(others) == ([] if status == "ok" else [status])
    if others:
        assert name in others[0].detail + others[0].remedy


def test_a_needed_package_that_is_missing_or_broken_stops_training():
    versions = {"torch": "2.10.0", "rustbpe": None, "torchao": "0.14", "triton": None}
    failures = {"torchao": "ImportError: undefined symbol"}
    found = check_packages(versions, failures, needed=("torch", "rustbpe"))
    assert statuses(found) == ["ok", "problem", "ok", "problem"]
    assert [check.stops for check in found] == [False, True, False, False]
    broken = check_packages(versions, {"torch": "OSError: libcudart"}, needed=("torch",))
    assert broken[-1].stops


def test_a_machine_without_the_packages_of_the_server_can_train():
    versions = {"torch": "2.11.0", "fastapi": None, "uvicorn": "0.30"}
    found = check_packages(versions, {}, needed=("torch",), serving=("fastapi", "uvicorn"))
    assert statuses(found) == ["ok", "note"]
    assert "fastapi not installed" in found[1].detail
    assert not found[1].stops


def test_a_package_that_crashes_at_import_is_told_by_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "built_for_another.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / "crashing.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modules = {"a": "built_for_another", "b": "json", "c": "crashing"}
    failures, slow = probing.import_failures(modules, 20)
    assert failures == {"a": "ImportError: undefined symbol", "c": "exit status 3"} and not slow


def test_a_rate_far_below_its_peak_is_a_problem():
    assert check_rate("matmul", 790e12, 989e12, "GFLOP/s", 0.5).status == "ok"
    assert check_rate("matmul", 300e12, 989e12, "GFLOP/s", 0.5).status == "problem"
    assert check_rate("matmul", 300e12, None, "GFLOP/s", 0.5).status == "ok"


def test_products_of_an_mi350x_are_as_fast_as_they_have_been_seen():
    assert probing.least_share("NVIDIA H100 80GB HBM3") == 0.5
    assert 0.3 < probing.least_share("AMD Instinct MI350X") < 0.44


# docs/traps.md: nccl-channels
def test_where_peer_to_peer_copies_hang_their_variable_is_exported():
    remedy = "export NCCL_P2P_DISABLE=1"
    hangs = check_exchange(False, "hangs (ended after 20 s)", remedy, on_gpu=True)
    assert hangs.status == "problem" and exports_of([hangs]) == {"NCCL_P2P_DISABLE": "1"}
    fails = check_exchange(False, "fails", "see what NCCL_DEBUG=INFO says", on_gpu=True)
    assert exports_of([fails]) == {}
    assert check_exchange(False, "fails", "", on_gpu=False).status == "note"
    assert check_exchange(True, "350 GB/s", "", on_gpu=True).status == "ok"


# --------------------------------------------------------------------------------------------------
# the tools on PATH

def fake_tool(folder, name, text, processes="", status=0):
    """A program that prints `text`, or `processes` where it is asked for those."""
    for kind, answer in (("gpus", text), ("processes", processes)):
        (folder / f"{name}.{kind}").write_text(answer, encoding="utf-8")
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        'kind=gpus; case "$1" in *compute-apps*) kind=processes ;; esac\n'
        f'/bin/cat "$0.$kind"; exit {status}\n',
        encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    probing.tool_output.cache_clear()
    yield tmp_path
    probing.tool_output.cache_clear()


def test_the_query_names_a_field_for_each_that_is_read():
    assert len(NVIDIA_SMI.split("\n")[0].split(",")) == len(GPU_FIELDS)


def test_gpus_are_asked_of_the_vendors_tool_that_is_there(tools):
    assert probing.gpu_states() == ([], [])
    fake_tool(tools, "rocm-smi", ROCM_SMI)
    probing.tool_output.cache_clear()
    assert [state.name for state in probing.gpu_states()[0]] == ["Radeon RX 7900 XTX"] * 2
    fake_tool(tools, "nvidia-smi", NVIDIA_SMI, NVIDIA_PROCESSES)
    probing.tool_output.cache_clear()
    states, processes = probing.gpu_states()
    assert len(states) == 2 and processes[0].pid == 4711
    checks, numbers = probing.probe_memory()
    assert numbers["gpus"][1]["busy"] == 97
    assert "problem" in statuses(checks)


def test_a_tool_that_fails_or_hangs_says_nothing(tools):
    fake_tool(tools, "nvidia-smi", "NVIDIA-SMI has failed", status=9)
    assert probing.gpu_states() == ([], [])
    hanging = tools / "rocminfo"
    hanging.write_text("#!/bin/sh\nexec /bin/sleep 60\n", encoding="utf-8")
    hanging.chmod(0o755)
    assert probing.tool_output(("rocminfo",), limit=0.2) is None


@pytest.fixture
def asked(monkeypatch):
    """Examine torch as the doctor was asked to: for a device type."""
    def examine(device_type):
        monkeypatch.setattr(sys, "argv", ["doctor", "torch", device_type, ""])
        probing.compute.cache_clear()
        return probing.probe_torch()[0]

    yield examine
    probing.compute.cache_clear()


def stopping(checks):
    return [check.name for check in checks if check.stops]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_a_device_that_was_asked_for_and_is_not_there_stops_training(asked, tools):
    [check] = [check for check in asked("cuda") if check.stops]
    assert check.detail == "--device_type=cuda is not available here"
    assert stopping(asked("cpu")) == stopping(asked("")) == []


def test_a_gpu_that_torch_does_not_see_stops_nothing_on_the_cpu(asked, tools, monkeypatch):
    monkeypatch.setattr(probing, "find_unseen_gpu", lambda: "this machine has a GPU; its driver")
    assert stopping(asked("")) == ["device"] and stopping(asked("cpu")) == []


def test_an_amd_driver_is_not_held_against_cudas_table(asked, tools, monkeypatch):
    fake_tool(tools, "rocm-smi", ROCM_SMI)
    monkeypatch.setattr(probing, "torch_build", lambda: "CUDA 12.8")
    assert "driver" not in [check.name for check in asked("cpu")]
    fake_tool(tools, "nvidia-smi", NVIDIA_SMI)
    probing.tool_output.cache_clear()
    assert "driver" in [check.name for check in asked("cpu")]


# --------------------------------------------------------------------------------------------------
# probes in other processes

FAKE_WORKER = f"""
import json, os, signal, sys, time

for name in sys.argv[1].split(","):
    if name == "network":
        time.sleep(60)
    if name == "disk":
        print("Traceback", "OSError: Read-only file system", sep="\\n", file=sys.stderr)
        sys.exit(1)
    if name == "torch":
        os.kill(os.getpid(), signal.SIGSEGV)
    check = dict(status="ok", name=name, detail=str(os.getpid()))
    print("a library's greeting", flush=True)
    print({doctor.MARK!r} + json.dumps(dict(checks=[check], numbers=dict(n=1))), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER, encoding="utf-8")
    return [sys.executable, str(path)]


def test_a_probe_that_hangs_or_crashes_is_reported_and_the_others_still_answer(worker, monkeypatch):
    quick = doctor.PROBES["network"]._replace(seconds=1.5)
    monkeypatch.setitem(doctor.PROBES, "network", quick)
    names = ["machine", "network", "memory", "disk", "torch", "matmul"]
    found = {
        name: checks[0] for name, checks, _ in doctor.examine(names, 60, worker) if checks}
    assert list(found) == names[:-1]
    assert found["machine"].detail != found["memory"].detail  # another process
    assert found["network"].detail == "no answer within 2 seconds" and not found["network"].stops
    assert found["disk"].detail == "ended with exit status 1: OSError: Read-only file system"
    assert found["torch"].detail.startswith("ended with signal 11") and found["torch"].stops
    assert "matmul" not in found  # which needs torch


def test_more_seconds_are_more_for_each_probe(worker, monkeypatch):
    limits = []
    monkeypatch.setattr(
        doctor.Worker, "answer",
        lambda self, name, limit, cut: limits.append((limit, cut)) or ([], {}, True))
    for seconds in (60, 120):
        list(doctor.examine(["machine"], seconds - doctor.ENDING, worker))
    assert limits == [(12, False), (24, False)]


def test_what_there_is_no_time_for_is_named(worker):
    names = ["machine", "network", "memory"]
    begin = time.monotonic()
    found = {name: checks[0] for name, checks, _ in doctor.examine(names, 2, worker)}
    assert time.monotonic() - begin < 30  # and not the 60 seconds for which the probe sleeps
    assert found["network"].detail.startswith("not finished in the")
    assert found["memory"].detail == "not examined: 2 seconds were over"
    assert {found[name].status for name in ("network", "memory")} == {"note"}


def test_no_process_of_a_probe_is_left(tmp_path):
    code = "import os, subprocess, sys, time\n" + f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
check = dict(status="ok", name="x", detail=f"{{os.getpid()}} {{child.pid}}")
print({doctor.MARK!r} + __import__("json").dumps(dict(checks=[check], numbers={{}})), flush=True)
time.sleep(60)
"""
    examination = doctor.examine(["machine"], 60, [sys.executable, "-c", code])
    _, [check], _ = next(examination)
    examination.close()
    for pid in check.detail.split():
        assert ends(int(pid)), f"{pid} is still running"


def ends(pid):
    """Whether a process has ended, or does within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state.split()[0] == "Z":  # killed, and nobody has asked for its status
            return True
        time.sleep(0.05)
    return False


def test_options_choose_the_parts():
    def chosen(**options):
        return doctor.chosen_probes({"all": False, "memory": False, "cuda": False, **options})

    assert chosen() == chosen(all=True) == chosen(all=True, memory=True)
    assert chosen() == list(doctor.PROBES)
    assert {"memory", "plan"} <= set(chosen(memory=True)) and "disk" not in chosen(memory=True)
    assert {"exchange", "selftests"} <= set(chosen(cuda=True))
    assert "memory" not in chosen(cuda=True) and "memory" in chosen(cuda=True, memory=True)


def test_the_plan_is_that_of_base_trains_own_settings():
    from nanochat.configurator import declared_values
    values = declared_values(probing.BASE_TRAIN)
    assert values["depth"] is None and values["keep"] == 3 and values["compile"] is True
    assert values["learning_rate"] == 0.02 and "settings" not in values


def test_a_table_wraps_and_puts_the_remedy_below():
    check = doctor.problem("disk", "word " * 40, "set NANOCHAT_BASE_DIR to a folder with room")
    lines = doctor.table([check])
    assert lines[0].startswith("problem  disk") and lines[-1].strip().startswith("-> set NANOCHAT")
    assert max(map(len, lines)) <= doctor.WIDTH


def test_several_gpus_train_under_torchrun():
    plan = {"ranks": 6, "model": "gpt", "lines": ["1) budget"]}
    where = {"device": "cuda", "dtype": "bfloat16"}
    own = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    lines = doctor.settings_to_use(where, plan, {"NCCL_P2P_DISABLE": "1"}, own)
    assert lines[0] == "export NCCL_P2P_DISABLE=1" and "PYTORCH_ALLOC_CONF" in lines[1]
    assert lines[2] == "torchrun --standalone --nproc_per_node=6 -m scripts.base_train"
    assert doctor.settings_to_use({}, {}, {}, {}) == ["python -m scripts.base_train"]


# --------------------------------------------------------------------------------------------------
# here

@pytest.mark.parametrize("word", ["--device_type=gpu", "--dtype=float16"])
def test_a_device_that_does_not_exist_is_one_line(run_module, base_dir, word):
    done = run_module("scripts.doctor", word, base=base_dir)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert f"{word.removeprefix('--')} does not exist: choose" in line


def test_the_memory_part_examines_this_machine_and_ends_with_json(run_module, base_dir):
    done = run_module("scripts.doctor", "--memory", "--device_type=cpu", base=base_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    record = last_json(done.stdout)
    assert record["stage"] == "doctor" and record["can_train"]
    assert record["numbers"]["memory"]["memory"] > 1e8
    assert record["numbers"]["plan"]["depth"] >= 2
    assert "settings to use" in done.stdout
    logged = (base_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(logged)["checks"] == record["checks"]


def test_a_torch_that_does_not_import_is_the_finding(tmp_path, run_module, base_dir):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so: not found')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run_module("scripts.doctor", "--cuda", base=base_dir, PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    record = last_json(done.stdout)
    [check] = record["checks"]
    assert check["name"] == "torch" and check["stops"] and not record["can_train"]
    assert check["detail"].endswith("ImportError: libcudart.so: not found")
    assert "training cannot run" in done.stdout


def test_the_disk_is_measured_where_checkpoints_go(base_dir):
    [check], numbers = probing.probe_disk()
    assert str(base_dir) in check.detail and numbers["bytes_per_second"] > 0
    assert os.listdir(base_dir) == []


def test_a_folder_that_cannot_be_written_stops_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    [check], _ = probing.probe_disk()
    assert check.stops and "NANOCHAT_BASE_DIR" in check.remedy


def test_without_a_network_the_remedy_is_other_text(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    [check], numbers = probing.probe_network()
    assert check.status == "note" and numbers == {"reachable": False}
    assert "--data=PATH" in check.remedy and "127.0.0.1:9" in check.detail


def test_a_password_in_the_mirrors_address_is_a_problem_that_does_not_show_it(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror.example")
    [check], numbers = probing.probe_network()
    assert check.status == "problem" and numbers == {"reachable": False}
    assert "secret" not in check.detail and "HF_TOKEN" in check.detail
