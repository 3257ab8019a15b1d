"""Training speed of GPT-style transformers from 30 M to 10 B parameters, on one device.

    python -m scripts.transformer_benchmark                     # small, medium, large and xl
    python -m scripts.transformer_benchmark --full              # the same
    python -m scripts.transformer_benchmark --large-models      # 1.5b, 3b, 7b and 13b
    python -m scripts.transformer_benchmark --model 7b --batch-size 8 --seq-len 1024
    python -m scripts.transformer_benchmark --config=config/cpu_small.py    # a shape of your own
    python3 /workspace/scripts/transformer_benchmark.py         # from any folder, not installed

A step is forward, backward and update of the real model (nanochat/gpt.py) by its real optimizers,
Muon and AdamW, on random tokens. To compare with the documented figures, whose optimizer was
most likely AdamW alone: --optimizer=adamw. A size that does not fit the free memory is skipped with
the planner's numbers. docs/benchmarks.md explains each column and has the documented table.
"""
import importlib
import sys
import time
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a file: find nanochat, and set what torch reads when it is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    importlib.import_module("scripts")

import torch

from nanochat.benchmark import (
    OPTIMIZERS,
    Progress,
    Setup,
    Training,
    attempt,
    case_of_file,
    case_of_size,
    check_loss,
    chosen_sizes,
    default_iterations,
    default_warmup,
    device_name,
    does_not_fit,
    fitting_micro_batch,
    free_memory,
    peak_of,
    percent,
    problem_of,
    share_of,
    summarize,
    tera,
    throughput,
)
from nanochat.common import UserError, compute_init, print0
from nanochat.configurator import check_choices, configure, require
from nanochat.fp8 import choose_fp8
from nanochat.hardware import (
    measure_matmul_flops,
    peak_memory,
    raise_malloc_thresholds,
    reset_peak_memory,
)
from nanochat.metrics import finish_stage
from nanochat.probes import gigabytes

# settings
model = ""                # small, medium, large, xl, 1.5b, 3b, 7b or 13b; empty: see full
full = False              # all sizes below 1.5b, which is also what no setting at all means
large_models = False      # 1.5b and larger; with full: all sizes
config = ""               # measure the shape in this config file, in place of the sizes
batch_size: int = None    # sequences of a step. None: as documented for the size
seq_len: int = None       # tokens of a sequence. None: as documented for the size
iterations: int = None    # steps that count. None: 20 on a GPU, 5 elsewhere
warmup: int = None        # steps before them. None: 3 on a GPU, 2 elsewhere
optimizer = "muon"        # muon: Muon and AdamW, as in training; adamw: AdamW for all parameters
compile = True            # compile the blocks
checkpoint_activations = False  # keep no activations, compute them again: less memory, slower
device_type = ""          # cuda, mps or cpu; empty: cuda where there is one, else cpu
dtype = ""                # float32 or bfloat16; empty: what the hardware is good at
fp8: str = None           # FP8 products of the blocks: hybrid, e4m3 or mxfp8 (docs/fp8.md)
fp8_scaling: str = None   # its scales: tensorwise or rowwise; None: tensorwise
fp8_backend: str = None   # torch, or te for TransformerEngine; None: torch
fp8_emulate: bool = None  # compute FP8's rounding without its products: no speed to publish
settings = configure(globals())


def choose_cases():
    """The Cases to measure."""
    if not config:
        names = chosen_sizes(model.lower(), full, large_models)
        return [case_of_size(name, batch_size, seq_len) for name in names]
    if model or full or large_models:
        raise UserError(f"config={config} is a shape of its own: leave model, full and "
                        "large_models out")
    return [case_of_file(config, batch_size, seq_len)]


def measure(case, micro_batch_size):
    """(Training, its counted Steps) of a Case that fits."""
    training = Training(case, compute, micro_batch_size, setup)
    progress = Progress()
    steps = []
    for number in range(1, warmup + iterations + 1):
        steps.append(training.step())
        check_loss(steps[-1].loss)
        progress.say(f"{case.name}: step {number} of {warmup + iterations}, "
                     f"{steps[-1].seconds:.2f} s, loss {steps[-1].loss:.2f}")
    return training, steps[warmup:]


def run_case(case):
    """The row of a Case: a dict, with "skipped" or "failed" and the reason where it has no speed.

    Memory that runs out all the same ends this size alone.
    """
    row = {"model": case.name, "class": case.model_class, "config": asdict(case.config),
           "batch_size": case.batch_size}
    reset_peak_memory(compute.device)
    free = free_memory(compute.device)
    micro_batch_size, needed = fitting_micro_batch(case, free, setup, compute)
    if micro_batch_size == 0:
        return {**row, "skipped": does_not_fit(case, needed, free)}
    result, out_of_memory = attempt(measure, case, micro_batch_size)
    if out_of_memory:
        return {**row, "failed": f"{case.name} ran out of memory, although only "
                f"{needed.total / 1e9:.1f} GB were planned: take a smaller --batch-size"}

    training, steps = result
    times = summarize([step.seconds for step in steps])
    tokens = case.batch_size * case.config.max_seq_len
    rates = throughput(training.network, tokens, times.median)
    return {
        **row,
        "parameters": training.network.matmul_parameters(),
        "parameters_untied": sum(p.numel() for p in training.network.parameters()),
        "micro_batch_size": training.micro_batch_size,
        **rates._asdict(),
        "spread": times.spread,
        "step_seconds": times.all,
        "update_share": summarize([step.update / step.seconds for step in steps]).median,
        "share_of_peak": share_of(rates.flops_of_weights, peak),
        "share_of_matmul_rate": rates.flops_of_weights / matmul_rate,
        "memory_bytes": peak_memory(compute.device),
        "planned_bytes": needed.total,
        "loss": steps[-1].loss,
    }


def describe(row):
    """A line of the Markdown table."""
    if problem_of(row):
        return f"| {row['model']} | {problem_of(row)} | | | | | | | | | |"
    batch = f"{row['batch_size']} x {row['config']['max_seq_len']}"
    if row["micro_batch_size"] < row["batch_size"]:
        batch += f" in passes of {row['micro_batch_size']}"
    cells = [
        row["model"],
        f"{row['parameters'] / 1e6:,.0f} M",
        f"{row['parameters_untied'] / 1e6:,.0f} M",
        batch,
        f"{row['tokens_per_second']:,.0f}",
        percent(row["spread"]),
        tera(row["flops_of_weights"]),
        tera(row["flops_with_attention"]),
        percent(row["share_of_peak"]),
        percent(row["update_share"]),
        gigabytes(row["memory_bytes"]),
    ]
    return f"| {' | '.join(cells)} |"


LARGE_UPDATE = 0.3  # share of a step above which a line says why
HEAD = """\
| Model | Params | with its own head | Batch x length | Tokens/sec | spread | TFLOPS (6N) | \
with attention | of peak | in the update | Memory |
|---|---|---|---|---|---|---|---|---|---|---|"""

# ---- what to measure, and on what
require(settings, 1, "batch_size", "seq_len", "iterations")
require(settings, 0, "warmup")
check_choices(settings, optimizer=OPTIMIZERS)
cases = choose_cases()
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype)
fp8_recipe = choose_fp8(settings, None, compute)
setup = Setup(optimizer, "replicated", compile, checkpoint_activations, fp8_recipe)
warmup = default_warmup(compute.device.type) if warmup is None else warmup
iterations = iterations or default_iterations(compute.device.type)
name, dtype_name = device_name(compute.device), str(compute.dtype).removeprefix("torch.")
peak = peak_of(name, dtype_name)
matmul_rate = measure_matmul_flops(compute.device, compute.dtype)
known = f"{tera(peak)} TFLOPS" if peak else "unknown"
print0(f"{name}, torch {torch.__version__}, {dtype_name}, optimizer {optimizer}: peak in "
       f"{dtype_name} {known}, one matrix product reaches {tera(matmul_rate)} TFLOPS; "
       f"{warmup} + {iterations} steps of each size")

# ---- one size after another, each line as soon as it is known
rows = []
for case in cases:
    row = run_case(case)
    if not rows and problem_of(row) and len(cases) == 1:
        break  # the error below says it
    if not rows:
        print0(HEAD)
    print0(describe(row))
    rows.append(row)
    torch.compiler.reset()  # the next size has other shapes, and the graphs hold memory

if all(problem_of(row) for row in rows):
    if "skipped" in row:
        raise UserError(row["skipped"])
    raise SystemExit(f"error: {row['failed']}")
dominated = [row["model"] for row in rows if row.get("update_share", 0) > LARGE_UPDATE]
if dominated and optimizer == "muon":
    print0(f"{', '.join(dominated)}: over {100 * LARGE_UPDATE:.0f} % of a step is Muon's update, "
           "because so few tokens share it; training has far more tokens a step, and the "
           "documented figures hardly had Muon: compare with --optimizer=adamw")
finish_stage(
    "transformer_benchmark",
    time.perf_counter() - started,
    settings,
    device=name,
    dtype=dtype_name,
    peak_flops=peak,
    matmul_flops_per_second=matmul_rate,
    warmup=warmup,
    iterations=iterations,
    rows=rows,
)
