"""The probes of scripts/doctor.py: each looks at one thing, and may hang or crash alone.

    python -m nanochat.doctor matmul,bandwidth cuda bfloat16

runs probes one after another in this process and writes a line for each, JSON behind MARK. The
judgments are those of nanochat/probes.py.
"""
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, get_base_dir
from nanochat.configurator import declared_values
from nanochat.hardware import (
    CGROUPS,
    allowed_cores,
    available_cpus,
    cgroup_quota,
    compile_problem,
    cpu_name,
    device_kind,
    find_unseen_gpu,
    instruction_set,
    known_device,
    limit_spinning,
    measure_matmul_flops,
    memory_limit,
    peak_flops,
    synchronize,
    text_of,
    torch_build,
)
from nanochat.probes import (
    GPU_QUERY,
    PROCESS_QUERY,
    ROCM_QUERY,
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
    gigabytes,
    note,
    ok,
    parse_meminfo,
    parse_nvidia_processes,
    parse_nvidia_smi,
    parse_rocm_smi,
    parse_rocminfo,
    problem,
)

MARK = "@doctor "    # before each line that is meant for the doctor
NEEDED = ("torch", "numpy", "pyarrow", "tiktoken", "requests", "rustbpe")
SERVING = ("fastapi", "uvicorn")
# package -> the module that is imported. FA3 has its own module, and no package of that name.
OPTIONAL = {
    "flash-attn-3": "flash_attn_interface",
    "transformer-engine": "transformer_engine.pytorch",
    "torchao": "torchao",
    "transformers": "transformers",
    "triton": "triton",
}
BASE_TRAIN = Path(__file__).resolve().parent.parent / "scripts" / "base_train.py"
OLDEST_PYTHON = (3, 10)
IMPORT_SECONDS = 12
DISK_BYTES = 64_000_000
DOWNLOAD_SECONDS = 3.0
EXCHANGE_SECONDS = 20   # twice, where peer-to-peer copies hang


# --------------------------------------------------------------------------------------------------
# probes: each returns (a list of Checks, a dict of numbers)

@functools.cache
def tool_output(command, limit=10):
    """What a vendor's tool prints; None where it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def probe_machine():
    before = text_of(Path("/proc/stat"))
    time.sleep(0.5)
    after = text_of(Path("/proc/stat"))
    quota = cgroup_quota(text_of(Path("/proc/self/cgroup")), CGROUPS)
    checks = [ok("CPU", f"{cpu_name()}, {instruction_set()}")]
    busy = busy_shares(before, after) if before and after else None
    checks += check_cpus(os.cpu_count(), len(allowed_cores()), quota, busy)
    open_files = 0
    if hasattr(os, "sysconf"):
        import resource
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(gpu_agents())
    checks += check_limits(open_files, shared, gpus)
    return checks, {"cpus": available_cpus(), "quota": quota, "open_files": open_files}


def gpu_agents():
    """The AMD GPUs that rocminfo lists."""
    return parse_rocminfo(tool_output(("rocminfo",)) or "")


def gpu_states():
    """(GpuStates, GpuProcesses) by the tool of whichever vendor is here."""
    listing = tool_output(GPU_QUERY)
    if listing is not None:
        return parse_nvidia_smi(listing), parse_nvidia_processes(tool_output(PROCESS_QUERY) or "")
    listing = tool_output(ROCM_QUERY)
    if listing is not None and "{" in listing:
        return parse_rocm_smi(listing)
    return [], []


def probe_memory():
    meminfo = parse_meminfo(text_of(Path("/proc/meminfo")))
    if not meminfo and hasattr(os, "sysconf"):
        meminfo = {"MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    limit = memory_limit()
    states, processes = gpu_states()
    checks = check_memory(meminfo, limit) + check_gpu_memory(states, processes)
    return checks, {
        "memory": meminfo.get("MemTotal"),
        "available": meminfo.get("MemAvailable"),
        "limit": limit,
        "gpus": [state._asdict() for state in states],
    }


def installed_version(package, module):
    """The version of a package, "installed" for a module without one, None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(module.split(".")[0])
        return "installed" if spec else None


def import_failures(modules, limit):
    """({name: last line of what its import raised}, names whose import took too long).

    modules: {name: module}. Each is imported in a process of its own, for a package that was built
    for another torch may crash.
    """
    processes = {}
    for name, module in modules.items():
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", f"import {module}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    failures, slow = {}, []
    deadline = time.monotonic() + limit
    for name, process in processes.items():
        try:
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            slow.append(name)
            continue
        if process.returncode:
            lines = errors.strip().split("\n")
            failures[name] = lines[-1][:160] or f"exit status {process.returncode}"
    return failures, slow


def probe_packages():
    modules = {**{name: name for name in (*NEEDED, *SERVING)}, **OPTIONAL}
    versions = {name: installed_version(name, module) for name, module in modules.items()}
    # whether torch imports, its own probe shows
    here = {name: modules[name] for name in modules if versions[name] and name != "torch"}
    failures, slow = import_failures(here, IMPORT_SECONDS)
    checks = check_packages(versions, failures, NEEDED, SERVING)
    if slow:
        checks.append(note(
            "packages", f"{', '.join(slow)}: not imported within {IMPORT_SECONDS} seconds",
            "a slow disk or a busy machine; run it again"))
    python = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        checks.insert(0, problem(
            "Python", python, "install Python 3.10 or newer", stops=True))
    else:
        checks.insert(0, ok("Python", python))
    return checks, {"versions": versions, "failures": failures}


def probe_disk():
    try:
        folder = get_base_dir()
        rate = write_rate(folder)
        free = shutil.disk_usage(folder).free
    except (UserError, OSError) as error:
        return [problem(
            "disk", f"no checkpoint can be written: {error}",
            "set NANOCHAT_BASE_DIR to a folder with room that you can write", stops=True)], {}
    return [check_disk(folder, free, rate, None)], {"free": free, "bytes_per_second": rate}


def write_rate(folder):
    """Bytes/s of writing a file to a folder, fsync included."""
    block = os.urandom(1_000_000)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor.") as file:
        begin = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
            if time.perf_counter() - begin > 5:
                break
        file.flush()
        os.fsync(file.fileno())
        return file.tell() / (time.perf_counter() - begin)


def probe_network():
    import requests
    from nanochat.download import authorize, hub_endpoint, hub_token
    from nanochat.sources import REPOSITORY
    try:
        hub = hub_endpoint()
        hub_token()
    except UserError as error:
        return [problem("network", str(error), "mend the variable, or unset it")], {
            "reachable": False}
    url = f"{hub}/datasets/{REPOSITORY}/resolve/main/shard_00000.parquet"
    size, begin = 0, time.perf_counter()
    try:
        with requests.get(url, auth=authorize, stream=True, timeout=5) as reply:
            reply.raise_for_status()
            for block in reply.iter_content(1 << 18):
                size += len(block)
                if time.perf_counter() - begin > DOWNLOAD_SECONDS:
                    break
    except requests.RequestException as error:
        return [note(
            "network", f"{hub} cannot be reached ({type(error).__name__})",
            "train on this machine's text (python -m nanochat.dataset) or your own (--data=PATH); "
            "HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy")], {"reachable": False}
    rate = size / (time.perf_counter() - begin)
    detail = f"{rate / 1e6:.1f} MB/s from {hub}"
    return [ok("network", detail)], {"reachable": True, "bytes_per_second": rate}


def asked_for():
    """(device type, dtype) that the doctor was given, "" where it was given none."""
    return [*sys.argv[2:4], "", ""][:2]


@functools.cache
def compute():
    """The Compute that training would use here; the CPU's where the GPU cannot be used."""
    from nanochat.common import compute_init
    device_type, dtype = asked_for()
    try:
        return compute_init(device_type, dtype)
    except UserError:
        return compute_init("cpu", dtype)


def probe_torch():
    import torch
    build = torch_build()
    sees_gpu = torch.cuda.is_available()
    checks = [ok("torch", f"{torch.__version__}, built for {build}")]
    states, _ = gpu_states()
    is_nvidia = tool_output(GPU_QUERY) is not None
    if states and is_nvidia and build.startswith("CUDA"):
        checks.append(check_nvidia_driver(states[0].driver, build, sees_gpu))
    if build.startswith("ROCm") or tool_output(("rocminfo",)) is not None:
        checks += check_agents(gpu_agents(), os.environ)
    unseen = find_unseen_gpu()
    if unseen:
        what, _, remedy = unseen.partition("; ")
        checks.append(problem("device", what, remedy, stops=True))
    checks += device_checks()
    if asked_for()[0] == "cpu":
        checks = [check._replace(stops=False) for check in checks]  # of GPUs that are not used
    checks += check_variables(os.environ, build, available_cpus())
    numbers = {
        "torch": torch.__version__,
        "build": build,
        "device": compute().device.type,
        "dtype": str(compute().dtype).removeprefix("torch."),
        "devices": max(1, torch.cuda.device_count()),
        "drivers": sorted({state.driver for state in states}),
    }
    return checks, numbers


def device_checks():
    """What torch would compute on."""
    import torch
    where = compute()
    kind = str(where.dtype).removeprefix("torch.")
    asked = asked_for()[0]
    if asked and asked != where.device.type:
        return [problem(
            "device", f"--device_type={asked} is not available here",
            f"leave it out: {where.device.type} is here", stops=True)]
    if where.device.type != "cuda":
        return [ok("device", f"{where.device.type}, {kind}")]
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = properties.name
        architecture = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip:
            architecture = properties.gcnArchName.split(":")[0]
        size = gigabytes(properties.total_memory)
        checks.append(ok("device", f"{index}: {name}, {size}, {kind}"))
        checks.append(check_architecture(name, architecture, torch.cuda.get_arch_list()))
    return checks


def probe_matmul():
    import torch
    where = compute()
    rates = {}
    checks = []
    if where.device.type != "cuda":
        for kind in {torch.float32, where.dtype}:
            name = str(kind).removeprefix("torch.")
            rates[name] = measure_matmul_flops(where.device, kind)
            checks.append(ok("matmul", f"{rates[name] / 1e9:,.0f} GFLOP/s in {name}"))
        return checks, {"flops_per_second": rates}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(index)
        with torch.cuda.device(index):  # for which synchronize() waits
            rate = measure_matmul_flops(device, where.dtype)
        kind = str(where.dtype).removeprefix("torch.")
        rates[f"{kind} {index}"] = rate
        peak = peak_flops(name, kind)
        unit = f"GFLOP/s in {kind} on device {index}"
        checks.append(check_rate("matmul", rate, peak, unit, least_share(name)))
    return checks, {"flops_per_second": rates}


def least_share(device_name):
    """Of its peak, what products reach on a GPU where nothing is wrong: half, or less where less
    has been seen (44 % on an MI350X)."""
    from nanochat.forecast import OTHER_RATE, RATES
    usual = RATES.get(device_kind(device_name), OTHER_RATE).matmul
    return min(0.5, 0.8 * usual)


def probe_bandwidth():
    import torch
    where = compute()
    size = 2**30 if where.device.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=where.device)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(10):
        synchronize(where.device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(where.device)
        fastest = min(fastest, time.perf_counter() - begin)
    rate = 2 * size / fastest  # read and written
    peak = None
    if where.device.type == "cuda":
        name = torch.cuda.get_device_name()
        known = known_device(name)
        peak = known and known.bandwidth
    check = check_rate("bandwidth", rate, peak, "GB/s of memory, read and written", 0.6)
    return [check], {"bytes_per_second": rate}


def probe_compiler():
    where = compute()
    reason = compile_problem(where.device)
    if reason:
        return [problem(
            "compiler", f"torch.compile does not work: {reason}",
            "install a C++ compiler (Debian, Ubuntu: apt-get install g++), or name one in CXX; "
            "uncompiled blocks train 20 to 40 % slower on a CPU")], {"works": False}
    return [ok("compiler", "torch.compile works")], {"works": True}


def probe_selftests():
    from nanochat.selftest import is_fatal, run_selftests
    where = compute()
    checks = []
    for finding in run_selftests(where.device, where.dtype):
        if finding.ok:
            checks.append(ok(finding.name, finding.detail))
        else:
            checks.append(problem(
                finding.name, finding.detail, finding.remedy, stops=is_fatal(finding)))
    return checks, {check.name: check.status for check in checks}


def probe_exchange():
    import torch
    from nanochat.selftest import peer_to_peer_probe
    on_gpu = compute().device.type == "cuda"
    ranks = torch.cuda.device_count() if on_gpu else 2
    if ranks == 1:
        return [ok("exchange", "one device: nothing to exchange")], {}
    finding = peer_to_peer_probe(ranks, "nccl" if on_gpu else "gloo", EXCHANGE_SECONDS)
    return [check_exchange(finding.ok, finding.detail, finding.remedy, on_gpu)], {"ranks": ranks}


# --------------------------------------------------------------------------------------------------
# the plan

def probe_plan():
    """What base_train would choose here with no setting at all."""
    import torch
    from nanochat.plan import USUAL_VOCAB, choose_budget, make_plan, speed_of, this_machine
    from nanochat.variants import MODEL_CLASSES, default_model
    where = compute()
    kind = where.device.type
    ranks = max(1, torch.cuda.device_count()) if kind == "cuda" else 1
    flops = measure_matmul_flops(where.device, where.dtype)
    machine = this_machine(where, flops)._replace(ranks=ranks)
    name = default_model(kind)
    vocab_size = USUAL_VOCAB[kind]
    model_class = MODEL_CLASSES[name]
    settings = declared_values(BASE_TRAIN)
    budget = choose_budget(settings, kind)
    speed = speed_of(model_class, vocab_size, where)
    plan = make_plan(settings, budget, machine, model_class, vocab_size, speed)
    free = shutil.disk_usage(get_base_dir()).free
    checks = []
    if plan.disk > free:
        checks = [problem(
            "disk",
            f"a run keeps {gigabytes(plan.disk)} of checkpoints, {gigabytes(free)} are free",
            "set NANOCHAT_BASE_DIR to a folder with more room, or lower --keep")]
    return checks, {
        "lines": plan.describe(name, ranks),
        "ranks": ranks,
        "model": name,
        "depth": plan.shape.depth,
        "max_seq_len": plan.shape.max_seq_len,
        "device_batch_size": plan.batch.micro_batch_size,
        "total_batch_size": plan.batch.total_batch_size,
        "hours": plan.hours,
        "memory": plan.memory.total,
    }


class Probe(NamedTuple):
    """A probe's parts ("machine", "memory", "cuda"), its limit in seconds, and what it does."""
    parts: tuple
    seconds: float
    run: object
    about: str


PROBES = {
    "machine": Probe(("machine",), 12, probe_machine, "CPUs and limits"),
    "memory": Probe(("machine", "memory"), 25, probe_memory, "memory"),
    "packages": Probe(("machine",), 15, probe_packages, "packages"),
    "disk": Probe(("machine",), 12, probe_disk, "disk"),
    "network": Probe(("machine",), 12, probe_network, "network"),
    "torch": Probe(("machine", "memory", "cuda"), 30, probe_torch, "torch and its devices"),
    "matmul": Probe(("cuda", "memory"), 15, probe_matmul, "speed of matrix products"),
    "bandwidth": Probe(("memory", "cuda"), 10, probe_bandwidth, "memory bandwidth"),
    "exchange": Probe(("cuda",), 45, probe_exchange, "exchange between devices"),
    "plan": Probe(("machine", "memory", "cuda"), 20, probe_plan, "the plan of a run"),
    "compiler": Probe(("cuda",), 30, probe_compiler, "compiler"),
    "selftests": Probe(("cuda",), 40, probe_selftests, "kernels that run, compared"),
}


def run(names):
    """Run probes by name and write a line for each.

    What one raises ends the process: the doctor reports it and starts another for the rest.
    """
    for name in names:
        begin = time.perf_counter()
        checks, numbers = PROBES[name].run()
        answer = {
            "probe": name,
            "checks": [check._asdict() for check in checks],
            "numbers": numbers,
            "seconds": time.perf_counter() - begin,
        }
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    # the words: probes, device type, dtype
    limit_spinning(sleep_at_once=False)
    run(sys.argv[1].split(","))
