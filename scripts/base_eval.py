"""CORE of a base model: 22 tasks of multiple choice, schemas and continuations, few-shot.

    python -m scripts.base_eval                                # the newest base model, all tasks
    python -m scripts.base_eval --max-per-task=100             # the first 100 rows of each task
    python -m scripts.base_eval --tasks=copa,hellaswag --bundle=eval_bundle
    python -m scripts.base_eval --hf-path=models/gpt2          # a local Hugging Face model
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Ends with the CORE number: the mean over the tasks of (accuracy - guessing) / (1 - guessing). Beside
each multiple-choice accuracy stands its control: the same choices after the query of another row,
which they do not answer. What survives there is the position or the plausibility of the choices.
docs/core.md says what the number can be compared with.
"""
import os
import sys
import time

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import (
    UserError,
    atomic_write,
    collective_device,
    compute_cleanup,
    compute_init,
    get_base_dir,
    print0,
)
from nanochat.configurator import configure, require
from nanochat.core_bundle import fetch_bundle, find_bundle, read_bundle
from nanochat.core_eval import (
    BLOCK,
    NearTies,
    as_encoder,
    half_precision_copy,
    in_order,
    judge_fast,
    make_examples,
)
from nanochat.folders import chosen_line
from nanochat.gpt import require_causal
from nanochat.hardware import preferred_dtype, raise_malloc_thresholds
from nanochat.hf_model import load_hf_model
from nanochat.hub import on_first_rank
from nanochat.metrics import finish_stage, wilson_interval

# settings
source = "base"          # stage of the model: base, mid, sft or rl
model_tag: str = None    # checkpoint folder; None: the newest
step: int = None         # step; None: of a base model the best by validation, else the last
hf_path: str = None      # folder of a local Hugging Face model to measure in place of ours
bundle: str = None       # folder with core.yaml; None: base directory/eval_bundle, or fetched
tasks: str = None        # comma-separated labels of core.yaml; None: all of them
max_per_task = -1        # rows of each task, the first of its fixed order; -1: all of them
control = True           # also measure multiple choice without the question
optional = False         # where there is no bundle and none to be had, end with status 0
dtype = ""               # of the first pass: float32 or bfloat16; empty: what the hardware offers
device_type = ""         # cuda, mps or cpu; empty: the best one here
settings = configure(globals())
require(settings, -1, "max_per_task")
if max_per_task == 0:
    raise UserError("max_per_task=0 measures nothing: give -1 for all rows, or at least 1")
names = [name.strip() for name in tasks.split(",")] if tasks else None
is_limited = bool(names) or max_per_task > 0

PROGRESS_SECONDS = 5

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype)
device, rank, world_size = compute.device, compute.rank, compute.world_size

# ---- the tasks
problem = None if bundle else on_first_rank(fetch_bundle)
if problem and not optional:
    raise problem
if problem:
    print0(f"CORE is left aside: {problem}")
    finish_stage("base_eval", time.perf_counter() - started, settings, skipped=str(problem))
    compute_cleanup()
    sys.exit(0)
folder = find_bundle(bundle)
core_tasks = read_bundle(folder, names)

# ---- the model, and a copy of it for the first pass where that is faster
fast = None
if hf_path:
    model, tokenizer = load_hf_model(hf_path, device)
    checkpoint, slug = hf_path, os.path.basename(os.path.abspath(hf_path))
    measured = f"{hf_path}, a Hugging Face model"
else:
    model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
    checkpoint, slug = meta["dir"], f"{source}_{meta['tag']}_step{meta['step']}"
    measured = chosen_line(source, meta)
    if optional and not model.causal:
        print0("CORE is left aside: it compares likelihoods from left to right")
        finish_stage("base_eval", time.perf_counter() - started, settings, skipped="not causal")
        compute_cleanup()
        sys.exit(0)
    require_causal(model, "CORE")
    model.compute_dtype = torch.float32
    if compute.dtype == torch.bfloat16:
        fast = half_precision_copy(model)
computed_in = "bfloat16, near ties again in float32" if fast else "float32"
print0(f"measuring {measured}; {computed_in}; {len(core_tasks)} tasks of {folder}")
encode = as_encoder(tokenizer)
context = model.config.max_seq_len


# ---- every task, its rows shared out over the ranks
class Progress:
    """Says every few seconds how far a task has come, on a terminal and in a pipe alike."""

    def __init__(self, label, count):
        self.label, self.count = label, count
        self.said_at = time.perf_counter()

    def say(self, done):
        if time.perf_counter() - self.said_at > PROGRESS_SECONDS:
            self.said_at = time.perf_counter()
            print0(f"  {self.label}: {100 * done / self.count:.0f} % of {self.count} rows")


def over_ranks(*numbers):
    """The sum of each number over all ranks."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    if world_size > 1:
        totals = totals.to(collective_device())
        torch.distributed.all_reduce(totals)
    return totals.tolist()


def measure(task, rows, count, with_control):
    """(accuracy, share of the rows that were computed in float32 as well) of the first rows."""
    mine = list(range(rank, count, world_size))
    label = f"{task.label}, control" if with_control else task.label
    progress = Progress(label, len(mine))
    compared_before = near_ties.compared
    credit = 0.0
    for start in range(0, len(mine), BLOCK):
        block = mine[start:start + BLOCK]
        examples = make_examples(task, rows, block, encode, context, with_control)
        verdicts = judge_fast(
            model,
            fast,
            examples,
            near_ties,
            device,
            lambda share: progress.say(start + share * len(block)),
        )
        credit += sum(verdict.credit for verdict in verdicts)
    credit, repeated = over_ranks(credit, near_ties.compared - compared_before)
    return credit / count, repeated / count


def percent(share):
    """0.256 -> '25.6', None -> '' for a table."""
    return "" if share is None else f"{100 * share:.1f}"


print0(f"{'task':33s}{'rows':>6s}{'right %':>9s}{'interval':>15s}{'guess':>7s}{'centred':>9s}"
       f"{'control %':>11s}{'again':>7s}{'s':>7s}")
near_ties = NearTies()
lines = ["task,rows,accuracy,low,high,baseline,centred,control"]
results = {}
for task in core_tasks:
    # 1. accuracy, and the control's
    began = time.perf_counter()
    rows = in_order(task.rows)
    count = min(max_per_task, len(rows)) if max_per_task > 0 else len(rows)
    accuracy, repeated = measure(task, rows, count, False)
    of_control = None
    if control and task.kind == "multiple_choice":
        of_control, _ = measure(task, rows, count, True)

    # 2. what guessing would not have got
    centred = (accuracy - task.baseline) / (1 - task.baseline)
    low, high = wilson_interval(accuracy, count)
    results[task.label] = {
        "accuracy": accuracy,
        "centred": centred,
        "control": of_control,
        "baseline": task.baseline,
        "rows": count,
        "interval": [low, high],
    }

    # 3. a line for people, and one for a table
    seconds = time.perf_counter() - began
    interval = f"{percent(low)} to {percent(high)}"
    print0(f"{task.label:33s}{count:6d}{percent(accuracy):>9s}{interval:>15s}"
           f"{percent(task.baseline):>7s}{centred:9.4f}{percent(of_control):>11s}"
           f"{100 * repeated:6.0f}%{seconds:7.1f}")
    shown = "" if of_control is None else f"{of_control:.6f}"
    lines.append(f"{task.label},{count},{accuracy:.6f},{low:.6f},{high:.6f},"
                 f"{task.baseline},{centred:.6f},{shown}")

# ---- the number
core = sum(result["centred"] for result in results.values()) / len(results)
kind = "the mean of these tasks and rows, which is not CORE" if is_limited else "CORE"
print0(f"{kind}: {core:.4f}, of {measured}")
if rank == 0:
    # a run of some of the rows leaves the table of a complete one alone
    name = f"{slug}-limited.csv" if is_limited else f"{slug}.csv"
    path = get_base_dir() / "base_eval" / name
    path.parent.mkdir(exist_ok=True)
    lines.append(f"CORE,,,,,,{core:.6f},")
    atomic_write(path, "\n".join(lines) + "\n")
    print0(f"the table is in {path}")
finish_stage(
    "base_eval",
    time.perf_counter() - started,
    settings,
    core=None if is_limited else core,
    mean_centred=core,
    limited=is_limited,
    tasks=results,
    model=slug,
    bundle=str(folder),
    checkpoint=str(checkpoint),
)
compute_cleanup()
