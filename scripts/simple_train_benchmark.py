"""What a device can do at best: matrix products, copying, and a simple MLP in training.

    python -m scripts.simple_train_benchmark
    python -m scripts.simple_train_benchmark --dtypes=fp16 --sizes=8192,16384
    python3 /workspace/scripts/simple_train_benchmark.py        # from any folder, not installed

    matrix products   (n, n) @ (n, n) by torch.matmul, in FP8 by torch._scaled_mm
    copying           bytes read and written
    MLP training      the MLP of nanochat/gpt.py in a stack, forward, backward and update by AdamW

What the device does not have, and what would take too long, is skipped with the reason.
docs/benchmarks.md explains each number and has the documented ones.
"""
import importlib
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: find nanochat, and set what torch reads when it is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    importlib.import_module("scripts")

import torch
import torch.nn as nn

from nanochat.adamw import AdamW
from nanochat.benchmark import (
    OPTIMIZERS,
    Progress,
    attempt,
    check_loss,
    default_iterations,
    default_warmup,
    device_name,
    measure_calls,
    peak_bandwidth,
    peak_of,
    percent,
    share_of,
    summarize,
    tera,
)
from nanochat.common import UserError, compute_init, print0
from nanochat.configurator import check_choices, configure, require
from nanochat.fp8 import to_fp8
from nanochat.gpt import MLP, GPTConfig, norm
from nanochat.hardware import (
    fp8_format_here,
    peak_memory,
    raise_malloc_thresholds,
    reset_peak_memory,
    synchronize,
)
from nanochat.metrics import finish_stage
from nanochat.muon import Muon
from nanochat.parallel import can_compile, compile_blocks
from nanochat.probes import gigabytes

# settings
dtypes = "fp32,tf32,fp16,bf16,fp8"  # of the matrix products
sizes = ""                # their n, as 4096,8192. Empty: 1024 to 16384, or 256 to 2048 on a CPU
seconds = 0.5             # to measure each product for
copy_megabytes: int = None  # size of the copied tensor. None: 1024 on a GPU, 256 elsewhere
mlp_layers = 4            # of the MLP; 0: do not train one
mlp_width: int = None     # None: 4096 on a GPU, 512 elsewhere. Each layer has 8 x width^2 weights
batch_size: int = None    # rows of its input. None: 8192 on a GPU, 1024 elsewhere
iterations: int = None    # training steps that count. None: 20 on a GPU, 5 elsewhere
warmup: int = None        # steps before them. None: 3 on a GPU, 2 elsewhere
optimizer = "adamw"       # of the MLP: adamw or muon
compile = True            # compile its layers
device_type = ""          # cuda, mps or cpu; empty: cuda where there is one, else cpu
dtype = ""                # of the MLP: float32 or bfloat16; empty: what the hardware is good at
settings = configure(globals())

TORCH_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # rounded to 10 bits of mantissa on the way into the product
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": None,            # the format is the device's
}
USUAL_SIZES = {"cuda": [1024, 2048, 4096, 8192, 16384], "cpu": [256, 512, 1024, 2048]}
MAX_CALL_SECONDS = 5.0  # a product that would take longer is skipped


# --------------------------------------------------------------------------------------------------
# matrix products

def why_not(name):
    """Why this device has no products of a dtype, "" where it has."""
    if name == "tf32" and (device.type != "cuda" or torch.version.hip):
        return "TF32 is NVIDIA's"
    if name == "fp8":
        return fp8_format_here(device)[1]
    return ""


def product(name, n):
    """A function that multiplies two random (n, n) matrices of a dtype."""
    a, b = torch.randn(2, n, n, device=device).unbind()
    if name == "fp8":
        format = getattr(torch, fp8_format_here(device)[0])
        a = to_fp8(a, format)
        b = to_fp8(b, format).T.contiguous().T  # the second one is stored by columns
        one = torch.ones((), device=device)     # the scale of each
        return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
    a, b = a.to(TORCH_DTYPES[name]), b.to(TORCH_DTYPES[name])
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


def time_product(name, n):
    return measure_calls(product(name, n), device, seconds)


def measure_product(name, n):
    """The row of one product."""
    row = {"what": "matmul", "dtype": name, "size": n}
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        times, out_of_memory = attempt(time_product, name, n)
    except RuntimeError as error:  # a build of torch may lack a product that the device has
        return {**row, "skipped": str(error).split("\n")[0][:100]}
    if out_of_memory:
        return {**row, "skipped": "out of memory"}
    flops = 2 * n**3 / times.median
    peak = peak_of(title, name)
    return {
        **row,
        "seconds": times.median,
        "spread": times.spread,
        "flops_per_second": flops,
        "peak_flops": peak,
        "share_of_peak": share_of(flops, peak),
    }


def measure_products(name):
    """Print and return the rows of a dtype, from the smallest size on."""
    if why_not(name):
        print0(f"| {name} | | skipped: {why_not(name)} | | |")
        return [{"what": "matmul", "dtype": name, "skipped": why_not(name)}]
    rows = []
    for n in matmul_sizes:
        row = too_slow(name, n, rows) or measure_product(name, n)
        rows.append(row)
        print0(describe(row))
        if "skipped" in row:
            break  # a larger one would be, too
    return rows


def too_slow(name, n, rows):
    """A row that skips a product which takes too long by the one before it in `rows`, else None."""
    if not rows:
        return None
    forecast = rows[-1]["seconds"] * (n / rows[-1]["size"])**3
    if forecast <= MAX_CALL_SECONDS:
        return None
    reason = f"would take {forecast:.0f} s a call"
    return {"what": "matmul", "dtype": name, "size": n, "skipped": reason}


def describe(row):
    """A line of the Markdown table."""
    if "skipped" in row:
        return f"| {row['dtype']} | {row['size']} | skipped: {row['skipped']} | | |"
    return (f"| {row['dtype']} | {row['size']} | {tera(row['flops_per_second'])} | "
            f"{percent(row['spread'])} | {percent(row['share_of_peak'])} |")


# --------------------------------------------------------------------------------------------------
# copying

def measure_copy():
    """The row of copying one tensor to another: each byte is read and written."""
    size = copy_megabytes * 10**6
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure_calls(lambda: target.copy_(source), device, seconds)
    rate = 2 * size / times.median
    share = share_of(rate, peak_bandwidth(title))
    print0(f"copying {copy_megabytes} MB: {rate / 1e9:,.1f} GB/s read and written, spread "
           f"{percent(times.spread)}, of peak {percent(share)}")
    return {
        "what": "copy",
        "bytes": size,
        "seconds": times.median,
        "spread": times.spread,
        "bytes_per_second": rate,
        "share_of_peak": share,
    }


# --------------------------------------------------------------------------------------------------
# a simple MLP

class Stack(nn.Module):
    """The model's MLP, layer after layer, each of the normalised stream and added to it."""

    def __init__(self):
        super().__init__()
        config = GPTConfig(depth=mlp_layers, width=mlp_width)
        self.blocks = nn.ModuleList(MLP(config) for _ in range(mlp_layers))

    def forward(self, x):
        """x (N, C) -> (N, C)."""
        for block in self.blocks:
            x = x + block(norm(x))
        return x


def measure_mlp():
    """The row of training the stack: 6 FLOPs for each weight and row of the input."""
    reset_peak_memory(device)
    with torch.device(device):
        network = Stack()
        x, target = torch.randn(2, batch_size, mlp_width, dtype=compute.dtype).unbind()
    if compile and can_compile(device):
        compile_blocks(network.blocks)
    parameters = list(network.parameters())
    update = Muon(parameters) if optimizer == "muon" else AdamW(parameters)

    progress, times = Progress(), []
    for number in range(1, warmup + iterations + 1):
        synchronize(device)
        begin = time.perf_counter()
        loss = (network(x).float() - target).square().mean()
        loss.backward()
        update.step()
        update.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - begin)
        progress.say(f"step {number} of {warmup + iterations}: {times[-1]:.2f} s")
    check_loss(loss.item())

    steps = summarize(times[warmup:])
    weights = sum(p.numel() for p in parameters)
    flops = 6 * weights * batch_size / steps.median
    peak = peak_of(title, dtype_name)
    memory = peak_memory(device)
    print0(f"MLP of {mlp_layers} layers, width {mlp_width}, {weights / 1e6:.1f} M weights, "
           f"{batch_size} rows, {dtype_name}, {optimizer}: "
           f"{batch_size / steps.median:,.0f} rows/s, {tera(flops)} TFLOPS, spread "
           f"{percent(steps.spread)}, of peak {percent(share_of(flops, peak))}, memory "
           f"{gigabytes(memory)}")
    return {
        "what": "mlp",
        "dtype": dtype_name,
        "parameters": weights,
        "batch_size": batch_size,
        "rows_per_second": batch_size / steps.median,
        "flops_per_second": flops,
        "spread": steps.spread,
        "step_seconds": steps.all,
        "peak_flops": peak,
        "share_of_peak": share_of(flops, peak),
        "memory_bytes": memory,
        "loss": loss.item(),
    }


# --------------------------------------------------------------------------------------------------

# ---- what to measure, and on what
require(settings, 1, "copy_megabytes", "mlp_width", "batch_size", "iterations")
require(settings, 0, "seconds", "mlp_layers", "warmup")
names = [name.strip() for name in dtypes.split(",") if name.strip()]
unknown = [name for name in names if name not in TORCH_DTYPES]
if unknown:
    raise UserError(f"dtypes={dtypes}: {unknown[0]} does not exist, choose from "
                    f"{', '.join(TORCH_DTYPES)}")
check_choices(settings, optimizer=OPTIMIZERS)
try:
    matmul_sizes = sorted(int(word) for word in sizes.split(",") if word.strip())
except ValueError:
    matmul_sizes = [0]
if any(n < 1 or n % 16 for n in matmul_sizes):
    raise UserError(f"sizes={sizes}: multiples of 16, apart by commas, such as 4096,8192")
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype)
device = compute.device
on_gpu = device.type == "cuda"
matmul_sizes = matmul_sizes or USUAL_SIZES.get(device.type, USUAL_SIZES["cpu"])
copy_megabytes = copy_megabytes or (1024 if on_gpu else 256)
mlp_width = mlp_width or (4096 if on_gpu else 512)
batch_size = batch_size or (8192 if on_gpu else 1024)
warmup = default_warmup(device.type) if warmup is None else warmup
iterations = iterations or default_iterations(device.type)
title, dtype_name = device_name(device), str(compute.dtype).removeprefix("torch.")
print0(f"{title}, torch {torch.__version__}, {torch.get_num_threads()} threads of the CPU")

# ---- matrix products
print0("| dtype | n | TFLOPS | spread | of peak |\n|---|---|---|---|---|")
rows = [row for name in names for row in measure_products(name)]
best = {}
for row in rows:
    if "flops_per_second" in row:
        fastest = best.get(row["dtype"], row)
        best[row["dtype"]] = max(row, fastest, key=lambda row: row["flops_per_second"])
for name, row in best.items():
    print0(f"best in {name}: {tera(row['flops_per_second'])} TFLOPS at n = {row['size']}, of peak "
           f"{percent(row['share_of_peak'])}")

# ---- copying, and the MLP in the precision that training has
if on_gpu:
    torch.set_float32_matmul_precision("high")  # as compute_init() has set it
parts = {"copy": measure_copy}
if mlp_layers:
    parts["mlp"] = measure_mlp
for what, measure in parts.items():
    row, out_of_memory = attempt(measure)
    if out_of_memory:
        print0(f"{what}: out of memory: take a smaller --copy-megabytes, --mlp-width or "
               "--batch-size")
        row = {"what": what, "skipped": "out of memory"}
    rows.append(row)
finish_stage(
    "simple_train_benchmark",
    time.perf_counter() - started,
    settings,
    device=title,
    matmul_flops_per_second={name: row["flops_per_second"] for name, row in best.items()},
    rows=rows,
)
