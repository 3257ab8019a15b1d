"""One table of peaks, and what this machine is. An unknown device is visibly unknown, never guessed."""
import functools
import os
import platform
import re
import time
from collections import namedtuple
from pathlib import Path

Device = namedtuple("Device", "title memory bandwidth bf16 fp8 unified", defaults=(False,))  # bytes, bytes/s, FLOP/s dense; None: not published

# The vendors' data sheets, without sparsity; a GB is taken as 10^9 bytes everywhere (where HBM means 2^30, there is 7 % more).
# title: a part of the name by which torch knows the device. unified: the CPU shares the memory.
DEVICES = {
    "h100-pcie": Device("H100 PCIe", 80e9, 2.0e12, 756e12, 1513e12),       # NVIDIA H100 Tensor Core GPU data sheet
    "h100":      Device("H100", 80e9, 3.35e12, 989e12, 1979e12),           # the same, column SXM
    "h200":      Device("H200", 141e9, 4.8e12, 989e12, 1979e12),           # NVIDIA H200 data sheet
    "a100":      Device("A100", 80e9, 2.0e12, 312e12, None),               # NVIDIA A100 80GB data sheet; it has no FP8
    "mi350x":    Device("MI350X", 288e9, 8.0e12, 2307e12, 4614e12),        # AMD Instinct MI350X data sheet
    "mi300x":    Device("MI300X", 192e9, 5.3e12, 1307e12, 2615e12),        # AMD Instinct MI300X data sheet
    "7900-xtx":  Device("7900 XTX", 24e9, 0.96e12, 122.8e12, None),        # AMD Radeon RX 7900 XTX specifications; it has no FP8
    "rtx-4090":  Device("RTX 4090", 24e9, 1.01e12, 165e12, 330e12),        # NVIDIA Ada architecture paper, sums in float32
    "dgx-spark": Device("GB10", 128e9, 0.273e12, None, None, unified=True),  # NVIDIA DGX Spark data sheet: 1 PFLOP/s of sparse FP4, no more
}


def peak_flops(device_name):
    """Dense bf16 peak of a GPU in FLOP/s, or None where the table does not know it."""
    return next((device.bf16 for device in DEVICES.values() if device.title in device_name), None)


@functools.cache
def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def cpu_name():
    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return found.group(1) if found else platform.processor() or platform.machine()


def instruction_set():
    """The matrix instructions that matter here: amx, avx512_bf16, avx512, avx2 or other."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)", _cpuinfo(), re.M)
    flags = set(found.group(1).split()) if found else set()
    for name, flag in (("amx", "amx_bf16"), ("avx512_bf16", "avx512_bf16"), ("avx512", "avx512f"), ("avx2", "avx2")):
        if flag in flags:
            return name
    return "other"


def memory_gb():
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1) if hasattr(os, "sysconf") else None


def preferred_dtype(device_type):
    """bfloat16 where the hardware multiplies it, else float32. The CPU's flags decide, so that two runs always agree."""
    if device_type == "cuda":
        import torch
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device_type == "cpu" and instruction_set() in ("amx", "avx512_bf16") else "float32"


def measure_matmul_flops(device, dtype, seconds=0.5, shape=None):
    """FLOP/s of a matmul, shape (m, k, n) for (m, k) @ (k, n): best of several short runs. None: a shape like training's."""
    import torch
    m, k, n = shape or ((8192, 8192, 8192) if device.type == "cuda" else (4096, 512, 2048))
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}[device.type]
    best, deadline = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < deadline:
        sync()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        sync()
        best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def bind_workers():
    """Keep each of OpenMP's worker threads on a core of its own; the main thread, whose cores its children inherit, stays free.

    Left alone, a scheduler was seen to keep both threads of a two-core machine on one core for minutes, each spinning
    while it waited for the other: 15 times slower. Linux only; call before the first parallel computation.
    """
    import torch
    tasks = Path("/proc/self/task")
    if not tasks.exists() or not hasattr(os, "sched_setaffinity") or "OMP_PROC_BIND" in os.environ:
        return
    before = set(os.listdir(tasks))
    torch.ones(1 << 20).add_(1)  # starts the workers
    workers = sorted(int(task) for task in set(os.listdir(tasks)) - before)
    for worker, core in zip(workers, sorted(os.sched_getaffinity(0))[1:]):
        os.sched_setaffinity(worker, {core})


def is_out_of_memory(error):
    """Whether an exception says that a device's memory, or the machine's own, is used up. (CUDA alone has a class for it.)"""
    import torch
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in said or "can't allocate memory" in said


def raise_malloc_thresholds():
    """Keep freed memory instead of returning it to the kernel, so that big CPU tensors are not page-faulted in afresh.

    glibc maps every large block anew and unmaps it when freed; filling fresh pages is several times slower than reusing
    them. mallopt(3): M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, M_TOP_PAD -2. Call before the first large tensor.
    """
    import ctypes
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library (macOS, musl, Windows): nothing to raise
    for parameter, value in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**28)):
        mallopt(parameter, value)
