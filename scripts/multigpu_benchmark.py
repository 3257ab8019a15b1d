"""Training speed of one model on several GPUs: tokens/s, efficiency, and exposed communication.

    python -m scripts.multigpu_benchmark --model 7b --gpus 8 --batch-size 8
    python -m scripts.multigpu_benchmark --model 7b --scaling-test      # 1, 2, 4 and 8
    python -m scripts.multigpu_benchmark --model 7b --parallel=replicated --optimizer=adamw
    python3 /workspace/scripts/multigpu_benchmark.py --model 7b         # not installed

It starts its ranks by itself, one for each GPU; without a GPU they are processes on the CPU's
cores, which communicate by gloo. The model, the optimizers and the layout (nanochat/parallel.py)
are those of training; the tokens are random.

After the steps of training, as many are taken with all collectives left out. The difference is
the communication that no computation hides, waiting for the slowest rank included.
docs/benchmarks.md explains each column and has the documented table.
"""
import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: find nanochat, and set what torch reads when it is imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    importlib.import_module("scripts")

import torch
import torch.distributed as dist

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
    efficiency,
    fitting_micro_batch,
    memory_of_a_rank,
    peak_of,
    percent,
    problem_of,
    rank_counts,
    share_of,
    summarize,
    tera,
    throughput,
    without_communication,
)
from nanochat.common import (
    UserError,
    all_reduce_max,
    choose_device_type,
    compute_cleanup,
    compute_init,
    get_dist_info,
    print0,
)
from nanochat.configurator import check_choices, configure, require
from nanochat.hardware import (
    available_cpus,
    peak_memory,
    raise_malloc_thresholds,
    reset_peak_memory,
)
from nanochat.metrics import finish_stage
from nanochat.parallel import KINDS
from nanochat.probes import gigabytes

# settings
model = ""                # small to 13b. Empty: 7b, without a GPU small
config = ""               # measure the shape in this config file, in place of a model
gpus: int = None          # ranks, one for each GPU. None: all there are; on a CPU its cores
scaling_test = False      # measure 1, 2, 4 and 8 ranks, up to gpus, and the efficiency
batch_size: int = None    # sequences of a step and rank. None: as documented for the size
seq_len: int = None       # tokens of a sequence. None: as documented for the size
iterations: int = None    # steps that count. None: 20 on a GPU, 5 elsewhere
warmup: int = None        # steps before them. None: 3 on a GPU, 2 elsewhere
parallel = "zero2"        # the layout: replicated, zero2 or fsdp (nanochat/parallel.py)
optimizer = "muon"        # muon: Muon and AdamW, as in training; adamw: AdamW for all parameters
compile = True            # compile the blocks
checkpoint_activations = False  # keep no activations, compute them again: less memory, slower
device_type = ""          # cuda or cpu; empty: cuda where there is one, else cpu
dtype = ""                # float32 or bfloat16; empty: what the hardware is good at
is_rank = False           # set for the processes that the benchmark itself starts
settings = configure(globals())

RESULT = '{"ranks": '  # how the line begins with which a rank reports


# --------------------------------------------------------------------------------------------------
# one rank

def take_steps(training, count, label, context):
    """Take that many steps, each inside of context().

    Returns (the seconds of each on the slowest rank, the last Step, what context() yielded).
    """
    progress, seconds = Progress(), []
    for number in range(1, count + 1):
        dist.barrier()
        with context() as yielded:
            step = training.step()
        seconds += all_reduce_max(step.seconds)
        if get_dist_info()[1] == 0:
            progress.say(f"{label}: step {number} of {count}, {seconds[-1]:.2f} s")
    return seconds, step, yielded


def measure_steps(training, label):
    """(seconds of the counted steps with, those without communication, a Skipped, the loss).

    Those without come last, for in them the ranks do not exchange what they need to train.
    """
    seconds, step, _ = take_steps(training, warmup + iterations, label, contextlib.nullcontext)
    check_loss(step.loss)
    local_seconds, _, skipped = take_steps(
        training, 1 + iterations, f"{label}, without communication", without_communication)
    return seconds[warmup:], local_seconds[1:], skipped, step.loss


def run_rank(case):
    """What this rank has measured: a dict, the same on all ranks but for its own memory."""
    ranks = compute.world_size
    reset_peak_memory(compute.device)
    free = memory_of_a_rank(compute)
    setup = Setup(optimizer, parallel, compile, checkpoint_activations)
    micro_batch_size, needed = fitting_micro_batch(case, free, setup, compute)
    if micro_batch_size == 0:
        return {"skipped": does_not_fit(case, needed, free)}
    training = Training(case, compute, micro_batch_size, setup)
    seconds, local_seconds, skipped, loss = measure_steps(
        training, f"{case.name} on {ranks} ranks")

    times, local_times = summarize(seconds), summarize(local_seconds)
    exposed = max(0.0, 1 - local_times.median / times.median)
    if ranks == 1:
        exposed = 0.0  # there is none, and the rest is noise
    tokens = case.batch_size * case.config.max_seq_len * ranks
    rates = throughput(training.network, tokens, times.median)
    name, dtype_name = device_name(compute.device), str(compute.dtype).removeprefix("torch.")
    peak = peak_of(name, dtype_name)
    memory = peak_memory(compute.device)
    return {
        "device": name,
        "dtype": dtype_name,
        "parameters": training.network.matmul_parameters(),
        "micro_batch_size": training.micro_batch_size,
        **rates._asdict(),
        "spread": times.spread,
        "step_seconds": times.all,
        "step_seconds_without_communication": local_times.all,
        "exposed_communication": exposed,
        "collectives": skipped.collectives,
        "communicated_bytes": skipped.bytes,
        "peak_flops": peak,
        "share_of_peak": share_of(rates.flops_of_weights / ranks, peak),
        "memory_bytes": int(all_reduce_max(memory)[0]) if memory else None,
        "planned_bytes": needed.total,
        "loss": loss,
    }


def report_rank(case):
    """Measure, and report the result as one line. Memory that runs out is a result."""
    rank = get_dist_info()[1]
    result, out_of_memory = attempt(run_rank, case)
    if out_of_memory:
        problem = f"rank {rank} ran out of memory: take a smaller --batch-size"
        print(json.dumps({"ranks": compute.world_size, "failed": problem}), flush=True)
        raise SystemExit(1)
    if rank == 0:
        print(json.dumps({"ranks": compute.world_size, **result}), flush=True)
    compute_cleanup()


# --------------------------------------------------------------------------------------------------
# all ranks

def run_ranks(ranks):
    """Start that many ranks and return what they report, a dict with their number."""
    options = {**settings, "is_rank": True}
    words = [f"--{key}={value}" for key, value in options.items() if value not in ("", None)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", str(Path(__file__).resolve()), "--", *words]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith(RESULT):
                    found.append(json.loads(line))
                else:
                    print(f"  {line}", end="", file=sys.stderr, flush=True)
        finally:
            process.terminate()  # it ends its ranks; nothing where all have ended
    if found:
        return found[0]
    problem = f"{ranks} ranks ended without a result, their own error stands above"
    return {"ranks": ranks, "failed": problem}


def describe(row):
    """A line of the Markdown table."""
    if problem_of(row):
        return f"| {case.name} x {row['ranks']} | {problem_of(row)} | | | | | | | |"
    cells = [
        f"{case.name} x {row['ranks']}",
        f"{row['tokens_per_second']:,.0f}",
        percent(row["spread"]),
        percent(row["efficiency"]),
        tera(row["flops_of_weights"]),
        tera(row["flops_with_attention"]),
        percent(row["share_of_peak"]),
        percent(row["exposed_communication"]),
        gigabytes(row["memory_bytes"]),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| Config | Tokens/sec | spread | efficiency | Total TFLOPS (6N) | with attention | of peak | \
exposed communication | Memory/GPU |
|---|---|---|---|---|---|---|---|---|"""

# ---- what to measure, and on what
require(settings, 1, "gpus", "batch_size", "seq_len", "iterations")
require(settings, 0, "warmup")
check_choices(settings, optimizer=OPTIMIZERS, parallel=KINDS, dtype=("", "float32", "bfloat16"))
started = time.perf_counter()
raise_malloc_thresholds()
device_type = choose_device_type(device_type)
if device_type == "mps":
    raise UserError("device_type=mps is a single device: measure it with transformer_benchmark, "
                    "or several ranks with --device_type=cpu")
on_gpu = device_type == "cuda"
warmup = default_warmup(device_type) if warmup is None else warmup
iterations = iterations or default_iterations(device_type)
if model and config:
    raise UserError(f"model={model} and config={config}: leave one of them out")
if config:
    case = case_of_file(config, batch_size, seq_len)
else:
    usual = "7b" if on_gpu else "small"
    [name] = chosen_sizes(model.lower() or usual, False, False)
    case = case_of_size(name, batch_size, seq_len)
if is_rank:
    compute = compute_init(device_type, dtype)
    report_rank(case)
    raise SystemExit

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended, too
available = torch.cuda.device_count() if on_gpu else available_cpus()
counts = rank_counts(gpus, scaling_test, available, "GPUs" if on_gpu else "cores")
print0(f"{case.name}: {case.config.depth} layers, width {case.config.width}, {case.batch_size} x "
       f"{case.config.max_seq_len} tokens a rank, {parallel}, optimizer {optimizer}; "
       f"{warmup} + {iterations} steps, torch {torch.__version__}")

# ---- one number of ranks after another
rows, of_one = [], None
for count in counts:
    row = run_ranks(count)
    if problem_of(row) and len(counts) == 1:
        break  # the error below says it
    if not problem_of(row):
        if count == 1:
            of_one = row["tokens_per_second"]
        row["efficiency"] = efficiency(row["tokens_per_second"], count, of_one)
    if not rows:
        print0(HEAD)
    print0(describe(row))
    rows.append(row)

measured = [row for row in rows if not problem_of(row)]
if not measured:
    if "skipped" in row:
        raise UserError(row["skipped"])
    raise SystemExit(f"error: {row['failed']}")
first = measured[0]
peak = f"{tera(first['peak_flops'])} TFLOPS" if first["peak_flops"] else "unknown"
print0(f"on {first['device']}, {first['dtype']}; peak of one in {first['dtype']}: {peak}")
finish_stage(
    "multigpu_benchmark",
    time.perf_counter() - started,
    settings,
    model=case.name,
    device=first["device"],
    dtype=first["dtype"],
    warmup=warmup,
    iterations=iterations,
    rows=rows,
)
