"""One table of peaks, and what this machine is. An unknown device is visibly unknown, never
guessed."""
import contextlib
import functools
import gc
import getpass
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections import namedtuple
from pathlib import Path

# memory in bytes; bandwidth in bytes/s; bf16 and fp8 in dense FLOP/s, None: not published.
# title: a pattern for the words of torch's device name that identify it. unified: the CPU shares
# the memory.
Device = namedtuple(
    "Device",
    "title memory bandwidth bf16 fp8 unified",
    defaults=(False,),
)

# From the vendors' data sheets, without sparsity. A GB is taken as 10^9 bytes everywhere (where a
# vendor means 2^30 for HBM, there is 7 % more).
DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet; column SXM for "h100"
    "h100-pcie": Device("H100 PCIe", 80e9, 2.0e12, 756e12, 1513e12),
    "h100-nvl":  Device("H100 NVL", 94e9, 3.9e12, 835e12, 1670e12),
    "h100":      Device("H100", 80e9, 3.35e12, 989e12, 1979e12),
    # NVIDIA GH200 data sheet, with HBM3
    "gh200":     Device("GH200", 96e9, 4.0e12, 989e12, 1979e12),
    # NVIDIA H200 data sheet
    "h200":      Device("H200", 141e9, 4.8e12, 989e12, 1979e12),
    # NVIDIA A100 80GB data sheet; it has no FP8
    "a100-40gb": Device("A100-(?:SXM4|PCIE)-40GB", 40e9, 1.555e12, 312e12, None),
    "a100":      Device("A100", 80e9, 2.0e12, 312e12, None),
    # NVIDIA DGX B200 data sheet, an eighth of it, half of what is given with sparsity
    "b200":      Device("B200", 180e9, 8.0e12, 2250e12, 4500e12),
    # NVIDIA L40S and L4 data sheets
    "l40s":      Device("L40S", 48e9, 0.864e12, 362e12, 733e12),
    "l4":        Device("L4", 24e9, 0.3e12, 121e12, 242e12),
    # AMD Instinct MI355X, MI350X and MI300X data sheets
    "mi355x":    Device("MI355X", 288e9, 8.0e12, 2516e12, 5033e12),
    "mi350x":    Device("MI350X", 288e9, 8.0e12, 2307e12, 4614e12),
    "mi300x":    Device("MI300X", 192e9, 5.3e12, 1307e12, 2615e12),
    "mi300a":    Device("MI300A", 128e9, 5.3e12, 980e12, 1961e12, unified=True),
    # AMD Radeon RX 7900 XTX specifications; it has no FP8
    "7900-xtx":  Device("7900 XTX", 24e9, 0.96e12, 122.8e12, None),
    # NVIDIA Ada architecture paper, sums in float32
    "rtx-4090":  Device("RTX 4090", 24e9, 1.01e12, 165e12, 330e12),
    # NVIDIA Ampere GA102 and Blackwell architecture papers, likewise
    "rtx-3090":  Device("RTX 3090", 24e9, 0.936e12, 71e12, None),
    "rtx-5090":  Device("RTX 5090", 32e9, 1.79e12, 209e12, 419e12),
    # NVIDIA DGX Spark data sheet: 1 PFLOP/s of sparse FP4 and nothing else is published
    "dgx-spark": Device("GB10", 128e9, 0.273e12, None, None, unified=True),
}


# What follows the title of a device that is another one: an RTX 4090 D, an RTX 4090 Laptop GPU
OTHER_DEVICE = r"(?! (?:D\b|Ti\b|Super\b|SUPER\b|Laptop|Max-Q))"
SLICE = re.compile(r"\bMIG\b")  # in the name of a part of a GPU: H100 80GB HBM3 MIG 1g.10gb


def known_device(device_name):
    """The Device of DEVICES that torch calls so, or None where the table does not know it.

    device_name: torch's, such as "NVIDIA H100 80GB HBM3". "NVIDIA GH200 480GB" is no H200.
    """
    return DEVICES.get(device_kind(device_name))


def device_kind(device_name):
    """The name in DEVICES of the GPU that torch calls so, or None where the table has none."""
    if SLICE.search(device_name):
        return None
    for kind, device in DEVICES.items():
        if re.search(rf"\b{device.title}\b{OTHER_DEVICE}", device_name):
            return kind
    return None


def peak_flops(device_name, dtype_name="bfloat16"):
    """Dense peak of a GPU in FLOP/s, or None where it is not known.

    dtype_name: of what is multiplied; data sheets give nothing for float32 as torch multiplies it.
    """
    device = known_device(device_name)
    if device is None or dtype_name != "bfloat16":
        return None
    return device.bf16


# --------------------------------------------------------------------------------------------------
# the CPU

# In order of preference: the name that we use -> the flag in /proc/cpuinfo
MATRIX_INSTRUCTIONS = {
    "amx": "amx_bf16",
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
}


def text_of(path):
    """What a file of the kernel says, "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.cache
def _cpuinfo():
    return text_of(Path("/proc/cpuinfo"))


def cpu_name():
    """The CPU's model name as the kernel gives it, else what Python's platform module knows."""
    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    if found:
        return found.group(1)
    return platform.processor() or platform.machine()


def instruction_set():
    """The matrix instructions that matter here: amx, avx512_bf16, avx512, avx2 or other."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)", _cpuinfo(), re.M)
    flags = set(found.group(1).split()) if found else set()
    for name, flag in MATRIX_INSTRUCTIONS.items():
        if flag in flags:
            return name
    return "other"


def memory_gb():
    """The machine's memory in GiB, None where the system does not tell."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others no such name
        return None
    return round(memory / 2**30, 1)


CGROUPS = Path("/sys/fs/cgroup")
MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of cgroups of version 2 and 1


def memory_limit(root=CGROUPS):
    """The fewest bytes that a container's limits allow, None for none.

    root: where the cgroups are mounted. Without a limit the files say "max", or a number above
    2^60. Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst.
    """
    texts = [text_of(root / name).strip() for name in MEMORY_LIMITS]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if limit < 2**60), default=None)


def host_memory():
    """Bytes of the machine's memory that its processes may use, None where that is not known."""
    sizes = [(memory_gb() or 0) * 2**30, memory_limit()]
    return min((int(size) for size in sizes if size), default=None)


def cpu_quota(text):
    """CPUs that a cgroup's cpu.max allows, rounded down but at least 1; None without a limit.

    text: "QUOTA PERIOD" in microseconds, such as "250000 100000" (2.5 CPUs, so 2) or "max 100000".
    Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst.
    """
    quota, _, period = text.strip().partition(" ")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return max(1, int(quota) // int(period))


def cgroup_quota(membership, root):
    """The fewest CPUs that a cgroup of this process, or a parent of one, allows; None: no limit.

    membership: of /proc/self/cgroup, such as "0::/user.slice/job.scope" (version 2) or
    "4:cpu,cpuacct:/docker/1f2e" (version 1). root: where the groups are mounted, /sys/fs/cgroup. In
    a container the path often is that of the host, and root is the container's own group.
    """
    quotas = []
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):
            if not controllers:
                quotas.append(cpu_quota(text_of(root / parent / "cpu.max")))
            elif "cpu" in controllers.split(","):
                folder = root / controllers / parent
                quota, period = (
                    text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
                quotas.append(cpu_quota(f"{quota} {period}"))
    return min((quota for quota in quotas if quota), default=None)


def available_cpus():
    """Number of CPUs that the scheduler gives this process: at most the machine's cores.

    A container or a batch system often allows fewer, by an affinity mask or by a cgroup's quota.
    A thread for each core of the machine would then wait for its turn most of the time.
    """
    allowed = len(allowed_cores())
    quota = cgroup_quota(text_of(Path("/proc/self/cgroup")), CGROUPS)
    return min(allowed, quota or allowed)


def allowed_cores():
    """The numbers of the cores on which this process may run, sorted."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux, or a sandbox that refuses the call
        return list(range(os.cpu_count() or 1))


def threads_are_chosen(is_dist):
    """Whether the user has set OMP_NUM_THREADS. is_dist: whether torchrun started this process.

    torchrun sets it to 1 for its ranks if it is not set; the environment with which torchrun itself
    was started, where the system shows it, says whose the 1 is.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not is_dist or given != "1":
        return given != ""
    environment = text_of(Path(f"/proc/{os.getppid()}/environ"))
    return "OMP_NUM_THREADS=1" in environment.split("\0")


def limit_spinning(sleep_at_once):
    """Let OpenMP's threads spin only briefly, or not at all, while they wait for each other.

    By default they spin for milliseconds. Where another process holds the core that one of them
    needs, the others burn the time in which it could run: of 350 tokens/s in decoding 20 to 30
    were left (two cores, beside two other processes). Threads that sleep at once are best for that,
    and cost training 11 to 13 % where it is alone. A thousand turns cost it nothing measurable, and
    gain a half beside a process that keeps one of two cores busy (dev/LOG.md).

    What the user has set stands. It takes effect only before torch is imported.
    """
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if any(name in os.environ for name in names):
        return
    if sleep_at_once:
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def bind_workers():
    """Keep each of OpenMP's worker threads on its own core.

    The main thread stays free, because its children inherit its cores. Without this, a scheduler
    was seen to keep both threads of a two-core machine on one core for minutes, each spinning while
    it waited for the other: 15 times slower. Linux only; call before the first parallel
    computation. A sandbox that refuses leaves the threads to the scheduler.
    """
    import torch
    tasks = Path("/proc/self/task")
    if not tasks.exists() or not hasattr(os, "sched_setaffinity"):
        return
    if "OMP_PROC_BIND" in os.environ:
        return  # the user has decided

    before = set(os.listdir(tasks))
    torch.ones(1 << 20).add_(1)  # starts the workers
    workers = sorted(int(task) for task in set(os.listdir(tasks)) - before)

    # The first core is the main thread's.
    for worker, core in zip(workers, allowed_cores()[1:]):
        try:
            os.sched_setaffinity(worker, {core})
        except OSError:
            return


def raise_malloc_thresholds():
    """Keep freed memory instead of returning it to the kernel, so that large CPU tensors reuse it.

    glibc maps every large block separately and unmaps it when freed; filling fresh pages is several
    times slower than reusing old ones. Call before the first large tensor. Source: mallopt(3).
    """
    import ctypes
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library (macOS, musl, Windows): nothing to raise
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**28)


# --------------------------------------------------------------------------------------------------
# the device and torch

# The file that a vendor's kernel driver makes -> torch's build that can use the device, the
# variables that hide devices from it, and the command that shows whether the driver works.
GpuFile = namedtuple("GpuFile", "build hidden_by tool")
GPU_FILES = {
    "/dev/nvidia0": GpuFile(
        build="CUDA",
        hidden_by=("CUDA_VISIBLE_DEVICES",),
        tool="nvidia-smi",
    ),
    "/dev/kfd": GpuFile(
        build="ROCm",
        hidden_by=("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        tool="rocminfo",
    ),
}


def torch_build():
    """What torch was built for: "CUDA 12.8", "ROCm 6.4" or "CPU"."""
    import torch
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return "CPU"


def unseen_gpu(device_files, torch_sees_gpu, version, build, environment):
    """Why torch cannot use the GPU that this machine has, and the remedy, as one line; else None.

    device_files: those of GPU_FILES that exist. version, build: torch's, as "2.10.0" and "CPU".
    environment: os.environ. None where torch sees a GPU or the machine has none.
    """
    if torch_sees_gpu or not device_files:
        return None
    file = device_files[0]
    gpu = GPU_FILES[file]
    hiding = [f"{name}='{environment[name]}'" for name in gpu.hidden_by if name in environment]
    if not build.startswith(gpu.build):
        remedy = ("uninstall torch (with pip or uv pip) and run `source scripts/setup.sh`, which "
                  f"installs torch's {gpu.build} build")
    elif hiding:
        remedy = f"{hiding[0]} may hide it: unset the variable"
    else:
        remedy = (f"its driver may be missing here or too old for this build: `{gpu.tool}` must "
                  "list the GPU")
    return (f"this machine has a GPU ({file}), but torch {version} (build: {build}) sees none; "
            f"{remedy}. --device_type=cpu trains on the CPU all the same")


def find_unseen_gpu():
    """unseen_gpu() of this machine."""
    import torch
    return unseen_gpu(
        device_files=[file for file in GPU_FILES if Path(file).exists()],
        torch_sees_gpu=torch.cuda.is_available(),
        version=torch.__version__,
        build=torch_build(),
        environment=os.environ,
    )


# The vendors' 8-bit formats with 4 bits of exponent. MI300 alone has the one without a negative
# zero; read as the other, its bits are other numbers.
FP8_ON_ROCM = {
    "gfx942": "float8_e4m3fnuz",  # MI300
    "gfx950": "float8_e4m3fn",    # MI350
    "gfx1200": "float8_e4m3fn",   # RDNA4
    "gfx1201": "float8_e4m3fn",
}
FP8_SINCE = (8, 9)    # compute capability: Ada; Hopper is (9, 0)
MXFP8_SINCE = (10, 0)  # Blackwell


def fp8_format(device_type, hip, architecture, capability):
    """(name of torch's dtype for FP8 matrix products or None, why there is none).

    hip: torch.version.hip. architecture: of ROCm, "gfx942:sramecc+:xnack-". capability: of CUDA,
    (9, 0). On ROCm the capability is a number of the architecture and says nothing.
    """
    if device_type != "cuda":
        return None, f"{device_type} has no FP8 matrix products (torch only has a slow reference)"
    if hip:
        name = architecture.split(":")[0]
        found = FP8_ON_ROCM.get(name)
        return found, "" if found else f"{name} has no FP8"
    if tuple(capability) < FP8_SINCE:
        return None, f"compute capability {capability[0]}.{capability[1]} has no FP8, 8.9 has it"
    return "float8_e4m3fn", ""


def fp8_format_here(device):
    """fp8_format() of a device."""
    return fp8_format(*generation_of(device))


def mxfp8_problem(device_type, hip, architecture, capability):
    """Why a device has no products of blocks of 32 values with a scale each, "" where it has.

    The arguments are those of fp8_format(). NVIDIA's since Blackwell read the scales in the order
    in which nanochat/fp8.py stores them; MI350 wants another, which nobody here could try.
    """
    if hip:
        return f"mxfp8 needs an NVIDIA GPU since Blackwell, this is {architecture.split(':')[0]}"
    if device_type != "cuda" or tuple(capability) < MXFP8_SINCE:
        return (f"mxfp8 needs an NVIDIA GPU since Blackwell (compute capability 10.0), this is "
                f"{capability[0]}.{capability[1]}")
    return ""


def mxfp8_problem_here(device):
    """mxfp8_problem() of a device."""
    return mxfp8_problem(*generation_of(device))


def generation_of(device):
    """(device type, torch.version.hip, ROCm architecture, compute capability) of a device."""
    import torch
    if device.type != "cuda":
        return device.type, None, "", (0, 0)
    properties = torch.cuda.get_device_properties(device)
    return (
        device.type,
        torch.version.hip,
        getattr(properties, "gcnArchName", ""),
        (properties.major, properties.minor),
    )


def preferred_dtype(device_type):
    """bfloat16 where the hardware multiplies it, else float32.

    On a CPU its flags decide and not a measurement, so that two runs always choose alike. On MPS
    float32: of Apple's GPUs the first generation only emulates bfloat16, and nobody has measured.
    """
    if device_type == "cuda":
        import torch
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu":
        native = instruction_set() in ("amx", "avx512_bf16")
    else:
        native = False
    return "bfloat16" if native else "float32"


@functools.cache
def mps_problem():
    """Why this machine's MPS device is not to be used, as one line; "" where it is right.

    The forward and backward pass of a tiny model, of the operations that a GPT is made of, and a
    step of decoding give on MPS what they give on the CPU. selftest.py has more to say when a
    training begins.
    """
    import torch
    if not torch.backends.mps.is_available():
        return "there is none"
    tests = {"the gradient of a small model": tiny_gradients, "a step of decoding": tiny_decoding}
    for name, test in tests.items():
        try:
            found = test(torch.device("mps"))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return reason_of(str(error))
        problem = difference_problem(name, found, test(torch.device("cpu")))
        if problem:
            return problem
    return ""


def difference_problem(name, found, wanted, tolerance=1e-2):
    """How far tensors are from those that are right, as one line, or "" where they are near."""
    for ours, theirs in zip(found, wanted):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= tolerance:  # true of a NaN as well
            return f"{name} is off by {error:.2g} of its norm"
    return ""


def tiny_gradients(device):
    """The gradients of a tiny model's embedding and matrix, on the CPU.

    Embedding, norm, product, causal attention and cross-entropy, in float32.
    """
    import torch
    import torch.nn.functional as F
    generator = torch.Generator().manual_seed(0)
    table, matrix = (torch.randn(shape, generator=generator) for shape in ((64, 32), (32, 32)))
    table, matrix = table.to(device).requires_grad_(), matrix.to(device).requires_grad_()
    idx = torch.arange(96).view(2, 48).mul_(7).remainder_(64).to(device)

    x = F.rms_norm(F.embedding(idx[:, :-1], table), (32,))
    heads = F.linear(x, matrix).view(2, 47, 2, 16).transpose(1, 2)
    y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    logits = y.transpose(1, 2).reshape(2 * 47, 32) @ table.T
    F.cross_entropy(logits, idx[:, 1:].flatten()).backward()
    return [table.grad.cpu(), matrix.grad.cpu()]


def tiny_decoding(device):
    """What decoding needs besides, on the CPU: [attention to a KV cache, rows of a hashed table].

    Without gradients MPS has another attention kernel, and some versions of it were wrong for
    inputs that are not contiguous, as a cache's are. Hashes exceed what 32 bits hold.
    """
    import torch
    import torch.nn.functional as F
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((2, 2, 3, 16), generator=generator).to(device)    # B, H, T, D
    new = torch.randn((2, 20, 2, 16), generator=generator).to(device)  # B, S, H, D
    positions = torch.arange(20, device=device)
    with torch.no_grad():
        cache = torch.zeros(3, 32, 2, 16, device=device)
        cache[torch.tensor([[0], [2]], device=device), positions] = new
        held = cache[::2, :20].transpose(1, 2)
        visible = positions <= positions[17:, None]
        y = F.scaled_dot_product_attention(q, held, held, attn_mask=visible)
        rows = positions * 4099 * 1000003 % 131072
    return [y.cpu(), rows.cpu().float()]


# What torch.compile raises where a machine cannot compile: most are a RuntimeError, the others are
# of the imports and of the compiler's process and files
COMPILE_ERRORS = (
    RuntimeError,
    OSError,
    ImportError,
    LookupError,
    subprocess.SubprocessError,
)


CUT_AFTER_SECONDS = 120  # since its last change; before, a compiler may be at work on it


def kernel_cache():
    """The folder in which torch keeps compiled kernels of the CPU (torch._inductor's cache_dir)."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named:
        return Path(named)
    try:
        name = getpass.getuser()
    except (LookupError, ImportError, OSError):  # a number without a name, as in containers
        name = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    user = re.sub(r'[\\/:*?"<>|]', "_", name)
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def remove_cut_kernels(folder):
    """Delete the kernels in a cache that a compiler left unfinished because it was killed.

    torch would take each for finished, fail to load it, and never compile it again.
    """
    for path in folder.glob("*/*.so"):
        with contextlib.suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > CUT_AFTER_SECONDS
            if is_old and is_cut(path):
                path.unlink()


def is_cut(path):
    """Whether a shared library lacks its end: the table of sections, which an ELF file ends with.

    Source: the System V ABI, ELF header of 64-bit files: e_shoff, e_shentsize and e_shnum.
    """
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    if header[:5] != b"\x7fELF\x02":
        return False  # macOS has another format
    offset, size, count = (
        int.from_bytes(header[begin:end], "little") for begin, end in ((40, 48), (58, 60), (60, 62))
    )
    return path.stat().st_size < offset + size * count


def compile_problem(device):
    """Why torch.compile does not work on `device`, as one line; None where it does.

    It compiles and runs an addition. So whatever the first training step would stumble over minutes
    from now is found at once: no C++ compiler or one that fails, a cache in a folder with a blank
    in its path, without room or without the right to run files. The time is not lost, for nearly
    all of it goes into what the blocks need as well (torch's compiler is imported, the C++ one
    examined), and the addition comes from the cache the next time.
    """
    import torch
    # Another compiler must not be excused by what an earlier one has left in the cache: then
    # another number is added.
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    stamp = os.stat(compiler).st_mtime_ns if compiler else 0
    number = zlib.crc32(f"{compiler} {stamp} {os.environ.get('PATH')}".encode()) / 2**32

    def add(x):
        return x + number

    try:
        remove_cut_kernels(kernel_cache())
        torch.compile(add, dynamic=False)(torch.zeros(64, device=device))
    except COMPILE_ERRORS as error:
        return reason_of(str(error))
    return None


def reason_of(message):
    """The line of a compiler's message that says what is wrong, at most 160 characters of it."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    words = r"error: |No such file|not found|too short"
    telling = [line for line in lines if re.search(words, line)]
    return (telling or lines or ["no reason given"])[0][:160]


def synchronize(device):
    """Wait until the device has done all that it was given. A CPU has done it already."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_memory(device):
    """Bytes that a process may use of a device's memory, None for a CPU.

    Of MPS, which shares the system's memory, what Metal recommends at most.
    """
    import torch
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return None


def reset_peak_memory(device):
    """From here on peak_memory() counts again."""
    import torch
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or a sandbox that refuses
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # man 5 proc


def peak_memory(device):
    """Most bytes that were in use: of tensors on a GPU, of the whole process on a CPU. None where
    the system does not tell."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = text_of(Path("/proc/self/status"))
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def empty_cache(device):
    """Give back the memory that torch holds for later tensors, where the device has a cache."""
    import torch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


# (m, k, n) of (m, k) @ (k, n), a product like those of training; what is not listed takes the CPU's
MATMUL_SHAPES = {
    "cuda": (8192, 8192, 8192),
    "mps": (4096, 2048, 4096),
    "cpu": (4096, 512, 2048),
}


def measure_matmul_flops(device, dtype, seconds=0.5, shape=None):
    """FLOP/s of one matrix product: the best of as many runs as fit into `seconds`.

    device: a torch.device. shape: (m, k, n) for (m, k) @ (k, n); None: MATMUL_SHAPES.
    """
    import torch
    m, k, n = shape or MATMUL_SHAPES.get(device.type, MATMUL_SHAPES["cpu"])
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)

    best = 0.0
    deadline = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        flops = 2 * m * k * n / (time.perf_counter() - start)
        best = max(best, flops)
    return best


def is_out_of_memory(error):
    """Whether an exception says that a device's or the machine's own memory is used up.

    Only CUDA has an exception class for it; the allocator of a CPU raises a RuntimeError.
    """
    import torch
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return "out of memory" in message or "can't allocate memory" in message
