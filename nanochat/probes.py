"""What a machine says of itself, read and judged: vendors' tools, the kernel's files, variables.

Everything here is a pure function of text or numbers, so that tests reach a machine of any vendor
from any other. scripts/doctor.py gathers the texts, each with a time limit, and prints what the
functions say. A judgment is a Check, or a list of them.
"""
import json
import re
from typing import NamedTuple

from nanochat.environment import INTEGRATED, VISIBLE_DEVICES

MIB = 2**20


class Check(NamedTuple):
    """One finding of the doctor.

    status: "ok", "note" (worth knowing) or "problem" (costs speed, memory or the run).
    remedy: what to do about it. export: {name: value} of variables that are the remedy.
    stops: whether training cannot start before it is mended.
    """
    status: str
    name: str
    detail: str
    remedy: str = ""
    export: dict = {}
    stops: bool = False


def ok(name, detail):
    return Check("ok", name, detail)


def note(name, detail, remedy="", export={}):
    return Check("note", name, detail, remedy, export)


def problem(name, detail, remedy, export={}, stops=False):
    return Check("problem", name, detail, remedy, export, stops)


def gigabytes(size):
    """A number of bytes in words; a size of None is one that nobody told.

    >>> gigabytes(25_753_026_560)
    '25.8 GB'
    """
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def version_of(text):
    """The numbers of a version: "580.65.06" -> (580, 65, 6). () where there is none."""
    return tuple(int(number) for number in re.findall(r"\d+", text or ""))


# --------------------------------------------------------------------------------------------------
# NVIDIA: nvidia-smi

# nvidia-smi --query-gpu=... --format=csv,noheader,nounits: a line for each GPU, memory in MiB.
# A field that a device does not have is "[N/A]" or "[Not Supported]". Source: `nvidia-smi
# --help-query-gpu`.
GPU_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "utilization.gpu")
GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=" + ",".join(GPU_FIELDS),
    "--format=csv,noheader,nounits",
)
PROCESS_QUERY = (
    "nvidia-smi",
    "--query-compute-apps=pid,process_name,used_memory",
    "--format=csv,noheader,nounits",
)

# The oldest driver for each major version of CUDA. Source: NVIDIA's CUDA Compatibility guide, the
# table of minor version compatibility.
OLDEST_DRIVERS = {11: (450,), 12: (525,), 13: (580,)}


class GpuState(NamedTuple):
    """A GPU as its vendor's tool sees it. Sizes in bytes, busy in percent; None: not told."""
    name: str
    driver: str
    memory: int
    used: int
    busy: int


class GpuProcess(NamedTuple):
    """A process that holds memory of a GPU. memory: bytes, None where it is not told."""
    pid: int
    name: str
    memory: int


def _number(text, unit=1):
    """A whole number in a field of a tool, times its unit; None for "[N/A]" and the like."""
    text = text.strip()
    return int(text) * unit if text.isdecimal() else None


def parse_nvidia_smi(text):
    """The GpuStates in the answer to GPU_QUERY.

    >>> parse_nvidia_smi("0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0")[0].memory
    85520809984
    """
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(GPU_FIELDS) or not fields[0].isdecimal():
            continue  # a warning of the tool
        _, name, driver, memory, used, busy = fields
        found.append(
            GpuState(name, driver, _number(memory, MIB), _number(used, MIB), _number(busy)))
    return found


def parse_nvidia_processes(text):
    """The GpuProcesses in the answer to PROCESS_QUERY. In a container the list is often empty."""
    found = []
    for line in text.splitlines():
        pid, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        if pid.strip().isdecimal():
            found.append(GpuProcess(int(pid), name.strip(), _number(memory, MIB)))
    return found


def check_nvidia_driver(driver, build, sees_gpu):
    """Whether an NVIDIA driver is new enough for torch's build, "CUDA 12.8"; a Check.

    sees_gpu: whether torch can use a GPU all the same, as with NVIDIA's compatibility packages.
    """
    cuda = version_of(build)
    oldest = OLDEST_DRIVERS.get(cuda[0]) if cuda else None
    detail = f"driver {driver}, torch built for {build}"
    if sees_gpu or oldest is None or version_of(driver) >= oldest:
        return ok("driver", detail)
    wanted = ".".join(map(str, oldest))
    return problem(
        "driver",
        f"{detail}, which needs a driver from {wanted} on",
        f"update the driver to {wanted} or newer, or install a torch built for an older CUDA "
        "(UV_TORCH_BACKEND=cu126, then source scripts/setup.sh)",
        stops=True)


def check_architecture(name, architecture, built_for):
    """Whether torch has kernels for a GPU; a Check.

    architecture: "sm_90" or "gfx1100". built_for: what torch.cuda.get_arch_list() gives. Within a
    major version of CUDA's, kernels run on later minor ones; PTX ("compute_90") runs on all later
    ones. Source: CUDA C++ Programming Guide, compute capability.
    """
    fits = architecture in built_for
    if architecture.startswith("sm_"):
        own = _capability(architecture)
        for target in built_for:
            other = _capability(target)
            is_ptx = target.startswith("compute_")
            same_major = other[0] == own[0] or is_ptx
            fits = fits or (same_major and other <= own)
    if fits or not built_for:
        return ok("kernels", f"{name} is {architecture}, for which torch has kernels")
    return problem(
        "kernels",
        f"{name} is {architecture}, and torch has kernels for {', '.join(built_for)} alone",
        "install a torch whose build covers the GPU (uninstall torch, source scripts/setup.sh)",
        stops=True)


def _capability(target):
    """(major, minor) of "sm_90", "sm_100a" or "compute_120"."""
    digits = re.search(r"\d+", target).group()
    return int(digits[:-1]), int(digits[-1])


def check_gpu_memory(states, processes):
    """Who holds memory of the GPUs already; a list of Checks."""
    checks = []
    holders = [
        f"{process.name} (pid {process.pid}, {gigabytes(process.memory)})"
        for process in processes]
    for index, state in enumerate(states):
        detail = f"GPU {index}, {state.name}: {gigabytes(state.memory)}"
        if state.memory is None or state.used is None:
            checks.append(ok("device memory", detail + ", shared with the CPU or not told"))
            continue
        detail += f", {gigabytes(state.used)} used"
        if state.busy:
            detail += f", {state.busy} % busy"
        if state.used < 0.1 * state.memory:
            checks.append(ok("device memory", detail))
            continue
        checks.append(problem(
            "device memory",
            f"{detail}, held by {', '.join(holders) or 'processes that are not listed here'}",
            "end what else uses the GPU (a desktop, a notebook, a server), or plan for what is "
            "free"))
    return checks


# --------------------------------------------------------------------------------------------------
# AMD: rocm-smi and rocminfo

ROCM_QUERY = (
    "rocm-smi",
    "--showproductname",
    "--showdriverversion",
    "--showmeminfo",
    "vram",
    "--showuse",
    "--showpids",
    "--json",
)


def parse_rocm_smi(text):
    """(GpuStates, GpuProcesses) in the answer to ROCM_QUERY, whose keys differ by version.

    A process is an entry of "system": "PID4711": "python, 1, 21474836480, 0, 0": its name, GPUs,
    bytes of VRAM. Lines before the JSON are warnings. ValueError where there is no JSON.
    """
    answer = json.loads(text[text.index("{"):])
    system = answer.pop("system", {})
    lower = {key.lower(): value for key, value in system.items()}
    driver = lower.get("driver version", "")

    states = []
    cards = sorted(answer.items(), key=lambda item: version_of(item[0]))
    for _, card in cards:
        fields = {key.lower(): str(value) for key, value in card.items()}
        states.append(GpuState(
            name=fields.get("card series") or fields.get("card model") or "AMD GPU",
            driver=driver,
            memory=_number(fields.get("vram total memory (b)", "")),
            used=_number(fields.get("vram total used memory (b)", "")),
            busy=_number(fields.get("gpu use (%)", "")),
        ))

    processes = []
    for key, value in system.items():
        fields = [field.strip() for field in str(value).split(",")]
        if re.fullmatch(r"PID\d+", key) and len(fields) >= 3:
            processes.append(GpuProcess(int(key[3:]), fields[0], _number(fields[2])))
    return states, processes


class Agent(NamedTuple):
    """A GPU as rocminfo lists it, in the order in which HIP counts them."""
    target: str          # gfx1100
    name: str            # its marketing name
    compute_units: int
    integrated: bool     # a part of the CPU


def parse_rocminfo(text):
    """The Agents in rocminfo's output that are GPUs.

    A part of the CPU says "Memory Properties: APU", in older versions its target tells.
    """
    agents = []
    for section in re.split(r"^Agent \d+\s*$", text, flags=re.MULTILINE)[1:]:
        # two blanks before a field of the agent itself; those of its memory pools have more
        pairs = re.findall(r"^  (\w[\w ]*?):[ \t]+(.*?)[ \t]*$", section, re.MULTILINE)
        fields = dict(reversed(pairs))  # of a field that is there twice, the first
        if fields.get("Device Type") != "GPU":
            continue
        name = fields.get("Marketing Name", "")
        is_apu = "APU" in fields.get("Memory Properties", "")
        agents.append(Agent(
            target=fields.get("Name", ""),
            name=name,
            compute_units=_number(fields.get("Compute Unit", "")) or 0,
            integrated=is_apu or fields.get("Name") in INTEGRATED,
        ))
    return agents


def check_agents(agents, environment):
    """Which AMD GPUs torch will count; a list of Checks. None of them stops training: where torch
    sees no GPU, hardware.unseen_gpu() decides, and without one the CPU trains.

    A graphics unit that is a part of the CPU, beside cards, would become one more rank with little
    memory (docs/traps.md: nccl-channels). Alone it is what there is to train on.
    """
    if not agents:
        return [problem(
            "ROCm",
            "rocminfo lists no GPU",
            "load the amdgpu driver, and join the groups render and video "
            "(sudo usermod -aG render,video $USER, then log in again)")]
    cards = [index for index, agent in enumerate(agents) if not agent.integrated]
    titles = ", ".join(f"{agent.name or 'GPU'} ({agent.target})" for agent in agents)
    if not cards or len(cards) == len(agents):
        return [ok("ROCm", titles)]
    chosen = [f"{name}={environment[name]}" for name in VISIBLE_DEVICES if name in environment]
    if chosen:
        return [ok("ROCm", f"{titles}; {', '.join(chosen)} chooses among them")]
    visible = ",".join(map(str, cards))
    return [problem(
        "integrated GPU",
        f"{titles}: {len(agents) - len(cards)} of them is a part of the CPU",
        f"hide it: export HIP_VISIBLE_DEVICES={visible}",
        export={"HIP_VISIBLE_DEVICES": visible})]


# --------------------------------------------------------------------------------------------------
# the kernel's files

def parse_meminfo(text):
    """{"MemTotal": bytes, ...} of /proc/meminfo, whose numbers are in kB of 1024."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    return {name: int(number) * 1024 for name, number in found}


def busy_shares(before, after):
    """(share of the CPUs' time that was used, share stolen by the hypervisor) between two texts of
    /proc/stat; None where no time has passed, as in sandboxes that do not count it.

    The first line: "cpu  user nice system idle iowait irq softirq steal ...", in ticks.
    """
    def ticks(text):
        return [int(number) for number in text.split("\n")[0].split()[1:9]]

    passed = [b - a for a, b in zip(ticks(before), ticks(after))]
    if len(passed) < 8 or sum(passed) <= 0:
        return None
    idle = passed[3] + passed[4]
    return 1 - idle / sum(passed), passed[7] / sum(passed)


def check_cpus(cores, allowed, quota, busy):
    """The CPUs that this process gets; a list of Checks.

    cores: of the machine. allowed: by the affinity mask. quota: of the cgroup, or None.
    busy: what busy_shares() gave, or None.
    """
    detail = f"{cores} of the machine, {allowed} allowed by the affinity mask"
    if quota:
        detail += f", {quota} by the cgroup's quota"
    usable = min(allowed, quota or allowed)
    checks = [ok("CPUs", f"{usable} to use ({detail})")]
    if usable < cores:
        checks = [note("CPUs", f"{usable} to use ({detail})", "threads are limited to that number")]
    if busy is None:
        return checks
    used, stolen = busy
    if stolen > 0.05:
        checks.append(problem(
            "CPUs", f"the hypervisor gives {100 * stolen:.0f} % of their time to other machines",
            "expect lower and varying speeds here, or ask for cores of your own"))
    if used > 0.25:
        checks.append(note(
            "CPUs", f"{100 * used:.0f} % of their time is used by other processes",
            "end them, or expect training on the CPU to be slower by more than that share"))
    return checks


def check_memory(meminfo, limit):
    """The machine's memory; a list of Checks. limit: of the cgroup in bytes, or None."""
    total = meminfo.get("MemTotal")
    available = meminfo.get("MemAvailable")
    if total is None:
        return [note("memory", "this system does not tell it")]
    detail = f"{gigabytes(total)}, {gigabytes(available)} available"
    if limit and limit < total:
        detail += f"; the cgroup allows {gigabytes(limit)}"
    least = min(size for size in (total, available, limit) if size)
    if least < 2e9:
        return [problem(
            "memory", detail,
            "training the smallest model takes about 2 GB: end other programs, or raise the limit")]
    return [ok("memory", detail)]


def check_limits(open_files, shared_memory, gpus):
    """Limits that a run would hit later; a list of Checks.

    open_files: of `ulimit -n`. shared_memory: free bytes of /dev/shm, None where there is none.
    NCCL's ranks exchange data there where they cannot reach each other's memory, and docker gives a
    container 64 MB. Source: NCCL's documentation, troubleshooting, shared memory.
    """
    checks = [ok("open files", f"{open_files:,}")]
    if 0 < open_files < 1024:
        checks = [note("open files", f"{open_files:,} at most", "ulimit -n 65536")]
    if shared_memory is None:
        return checks
    detail = f"{gigabytes(shared_memory)} free in /dev/shm"
    if gpus > 1 and shared_memory < 1e9:
        return checks + [problem(
            "shared memory", f"{detail}, too little for {gpus} GPUs",
            "start the container with --shm-size=16g (or --ipc=host)")]
    return checks + [ok("shared memory", detail)]


def check_disk(folder, free, rate, needed):
    """Room and speed of the folder for checkpoints; a Check.

    free: bytes. rate: bytes/s written with fsync. needed: bytes of a run's checkpoints, or None.
    """
    detail = f"{folder}: {gigabytes(free)} free, {rate / 1e6:,.0f} MB/s written with fsync"
    remedy = "set NANOCHAT_BASE_DIR to a folder with more room"
    if free < 1e9:
        return problem("disk", detail, remedy, stops=free < 1e8)
    if needed and needed > free:
        return problem(
            "disk", f"{detail}; the planned run keeps {gigabytes(needed)}",
            remedy + ", or lower --keep")
    if rate < 50e6:
        return note(
            "disk", detail, "a faster disk shortens saving, which training waits for only at its "
            "end")
    return ok("disk", detail)


# --------------------------------------------------------------------------------------------------
# variables

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
RELEVANT = re.compile(
    r"(?:CUDA|HIP|ROCR|HSA|NCCL|RCCL|TORCH|TORCHINDUCTOR|PYTORCH|OMP|GOMP|KMP|MKL|GLOO|NANOCHAT|HF"
    r"|AMD|MIOPEN|HIPBLASLT|TRITON)_(?!SPINCOUNT)\w+"  # GOMP_SPINCOUNT is set by scripts/
    r"|(?:https?|all|no)_proxy|TORCHDYNAMO_DISABLE|PYTHONDONTWRITEBYTECODE|CXX|TMPDIR",
    re.IGNORECASE)


def relevant_variables(environment):
    """{name: value} of the variables that change how training runs, sorted.

    Of a token only that it is set; of a proxy's address no user and password.
    """
    found = {}
    for name in sorted(environment):
        if not RELEVANT.fullmatch(name):
            continue
        value = environment[name]
        if SECRET.search(name):
            value = "(set)"
        found[name] = re.sub(r"//[^/@]*@", "//", value)
    return found


def check_variables(environment, build, cpus):
    """Variables that are known to do harm; a list of Checks.

    build: torch's, "ROCm 6.4". cpus: that this process may use.
    """
    found = relevant_variables(environment)
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    checks = [ok("variables", listed or "none set that matters")]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        expandable = "expandable_segments:True" in found.get(name, "")
        if expandable and build.startswith("ROCm"):
            checks.append(problem(
                "variables", f"{name} asks for expandable segments, which hang or fail on ROCm",
                f"unset {name}"))
    if "NCCL_MIN_NCHANNELS" in found:
        checks.append(note(
            "variables", "NCCL_MIN_NCHANNELS is advice for serving on MI300X",
            "unset NCCL_MIN_NCHANNELS for training"))
    for name, value in (("CUDA_LAUNCH_BLOCKING", "1"), ("AMD_SERIALIZE_KERNEL", "3")):
        if found.get(name) == value:
            checks.append(problem(
                "variables", f"{name}={value} makes the host wait for each kernel",
                f"unset {name}"))
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if found.get(name, "0") not in ("", "0"):
            checks.append(problem(
                "variables", f"{name} turns torch.compile off", f"unset {name}"))
    if "HSA_OVERRIDE_GFX_VERSION" in found:
        checks.append(note(
            "variables", "HSA_OVERRIDE_GFX_VERSION makes ROCm take the GPU for another one",
            "unset it where torch has kernels for the GPU itself"))
    threads = _number(found.get("OMP_NUM_THREADS", ""))
    if threads and threads != cpus:
        checks.append(note(
            "variables", f"OMP_NUM_THREADS={threads}, while {cpus} CPUs may be used",
            "unset OMP_NUM_THREADS: each rank then takes its share of the CPUs"))
    return checks


# --------------------------------------------------------------------------------------------------
# packages and measurements

def check_packages(versions, failures, needed, serving=()):
    """The installed packages; a list of Checks.

    versions: {package: version, or None where it is not installed}. failures: {package: the last
    line of what its import raised}. needed: those that training cannot do without. serving: those
    that the chat in the browser needs besides.
    """
    here = {package: version for package, version in versions.items() if version}
    listed = ", ".join(f"{package} {version}" for package, version in here.items())
    checks = [ok("packages", listed or "none")]
    missing = [package for package in needed if package not in here]
    if missing:
        checks.append(problem(
            "packages", f"{', '.join(missing)} not installed", "source scripts/setup.sh",
            stops=True))
    missing = [package for package in serving if package not in here]
    if missing:
        checks.append(note(
            "packages", f"{', '.join(missing)} not installed: training runs, scripts.chat_web does "
            "not", "source scripts/setup.sh"))
    others = [package for package in versions if package not in (*needed, *serving)]
    absent = [package for package in others if package not in here]
    if absent:
        checks.append(ok("packages", f"not installed, and not needed: {', '.join(absent)}"))
    for package, reason in failures.items():
        checks.append(problem(
            "packages", f"{package} {here.get(package, '')} does not import: {reason}",
            "reinstall it for this torch, or uninstall it", stops=package in needed))
    return checks


def check_rate(name, rate, peak, unit, least):
    """A measured rate beside its peak; a Check.

    rate, peak: in units of 1e9 a second (FLOP or bytes), peak None where the table has none.
    least: the share of the peak below which something is wrong.
    """
    detail = f"{rate / 1e9:,.0f} {unit}"
    if not peak:
        return ok(name, f"{detail} (this device's peak is not in the table)")
    share = rate / peak
    detail += f", {100 * share:.0f} % of {peak / 1e9:,.0f}"
    if share >= least:
        return ok(name, detail)
    return problem(
        name, f"{detail}, where {100 * least:.0f} % and more are usual",
        "look for another process on the device, a low power limit or heat (nvidia-smi -q -d "
        "PERFORMANCE, rocm-smi)")


def check_exchange(works, detail, remedy, on_gpu):
    """What selftest.peer_to_peer_probe() found; a Check.

    A remedy "export NAME=value" is to be exported. Without a GPU, a run is one process.
    """
    if works:
        return ok("exchange", detail)
    if not on_gpu:
        return note(
            "exchange", f"two processes of this machine: {detail}",
            "nothing to do for one process; GLOO_SOCKET_IFNAME=lo where the host's name does not "
            "resolve")
    export = {}
    if remedy.startswith("export "):
        name, _, value = remedy.removeprefix("export ").partition("=")
        export = {name: value}
        remedy += (" (or repair peer-to-peer copies: iommu=pt on the kernel's command line, ACS "
                   "off in the firmware)")
    return problem("exchange", detail, remedy, export)


def exports_of(checks):
    """{name: value} of the variables that the remedies name."""
    exports = {}
    for check in checks:
        exports.update(check.export)
    return exports
