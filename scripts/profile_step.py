"""Where the time of a training step goes, by kind of operation.

    python -m scripts.profile_step                          # depth 12 on a GPU, 4 on a CPU
    python -m scripts.profile_step --depth=20 --device_batch_size=32
    python -m scripts.profile_step --model=lookup --trace=step.json     # for a viewer of traces
    torchrun --standalone --nproc_per_node=8 -m scripts.profile_step

A few steps of the real model, layout and optimizers on random tokens, under torch.profiler. On a
GPU the times are those of its kernels, and "idle" is when none runs. On a CPU they are those of
torch's operations, and "idle" is what lies between them: Python.

    matmul          matrix products of the blocks
    attention       the attention kernel
    loss            head and cross-entropy, forward and backward, its products included
    optimizer       clipping and updates, their products included
    communication   collectives, also while something else runs
    copy            copies, casts that are no part of another kernel
    elementwise     everything else: norms, activations, fused kernels, embeddings

A step under the profiler is slower than one without; tokens/s are from steps before it. The last
line is JSON.
"""
import bisect
import re
import statistics
import time
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat.benchmark import (
    Case,
    Setup,
    Training,
    does_not_fit,
    fitting_micro_batch,
    memory_of_a_rank,
)
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.configurator import configure, require
from nanochat.fp8 import choose_fp8
from nanochat.hardware import (
    peak_memory,
    raise_malloc_thresholds,
    reset_peak_memory,
)
from nanochat.metrics import finish_stage
from nanochat.variants import MODEL_CLASSES, TRAINABLE

# settings
model = "gpt"                # gpt, lookup, portable, ... (nanochat/variants)
depth: int = None            # layers; width is 64 x depth. None: 12 on a GPU, else 4
vocab_size: int = None       # None: 65536 on a GPU, else 4096
max_seq_len: int = None      # context in tokens. None: 2048 on a GPU, else 256
device_batch_size: int = None  # sequences of a step and device. None: 16 on a GPU, else 8
steps = 3                    # under the profiler
warm_steps = 5               # before them; the first two, which compile, count for no speed
parallel = "auto"            # replicated, zero2 or fsdp; auto: zero2 on several ranks
compile = True               # compile the blocks
fp8: str = None              # FP8 products of the blocks: hybrid, e4m3 or mxfp8 (docs/fp8.md)
fp8_scaling: str = None      # its scales: tensorwise or rowwise; None: tensorwise
fp8_backend: str = None      # torch, or te for TransformerEngine; None: torch
fp8_emulate: bool = None     # compute FP8's rounding without its products: no speed to publish
device_type = ""             # cuda, mps or cpu; empty: what training would choose
dtype = ""                   # float32 or bfloat16; empty: what the hardware is good at
top = 12                     # operations that are listed, those that take longest
trace = ""                   # file to which the whole trace is written

COMPILING_STEPS = 2
DEFAULTS = {  # depth, vocab_size, max_seq_len, device_batch_size
    "cuda": (12, 65_536, 2048, 16),
    "cpu": (4, 4_096, 256, 8),
}
LABEL = "nanochat "  # begins the names of the ranges that are marked below

# The first pattern that a name contains says its kind. Names of kernels: cuBLAS (nvjet since
# Hopper, gemm, cutlass, xmma), hipBLASLt (Cijk), FlashAttention, cuDNN (sdpa), NCCL and RCCL
# (nccl); on a CPU torch's and oneDNN's operations.
KINDS = {
    "communication": r"nccl|rccl|gloo|c10d|all_?reduce|reduce_?scatter|all_?gather|all_?to_?all",
    "attention": r"flash|fmha|sdpa|scaled_dot_product|attention",
    "matmul": r"gemm|nvjet|cutlass|xmma|Cijk_|cublas|aten::(?:add)?mm\b|aten::b?mm\b|addmm|baddbmm"
              r"|mkldnn|onednn|aten::linear|aten::matmul|splitK",
    "copy": r"memcpy|memset|aten::copy_|aten::_?to\b|_to_copy|aten::clone|direct_copy|CatArray"
            r"|aten::contiguous",
}
PATTERNS = {kind: re.compile(words, re.IGNORECASE) for kind, words in KINDS.items()}
ALL_KINDS = ("matmul", "attention", "loss", "optimizer", "communication", "copy", "elementwise")


class Piece(NamedTuple):
    """An operation or kernel, or a marked range: begin and end, its own time, all in microseconds.

    own: without the operations within it.
    """
    name: str
    begin: float
    end: float
    own: float


def kind_of(name, label=""):
    """The kind of an operation or kernel. label: of the marked range that it is in, or "".

    Communication stays what it is in the optimizer as well.
    """
    if PATTERNS["communication"].search(name):
        return "communication"
    if label:
        return label
    for kind, pattern in PATTERNS.items():
        if pattern.search(name):
            return kind
    return "elementwise"


def covered(pieces):
    """Microseconds in which at least one piece runs."""
    total, until = 0.0, float("-inf")
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        total += max(0.0, piece.end - max(piece.begin, until))
        until = max(until, piece.end)
    return total


class Labels:
    """Marked ranges. Those of one label may overlap, as on several streams of a GPU."""

    def __init__(self, ranges):
        self.ranges = []
        for piece in sorted(ranges, key=lambda piece: piece.begin):
            last = self.ranges[-1] if self.ranges else None
            if last and last.name == piece.name and piece.begin <= last.end:
                self.ranges[-1] = last._replace(end=max(last.end, piece.end))
            else:
                self.ranges.append(piece)
        self.begins = [piece.begin for piece in self.ranges]

    def at(self, moment):
        """The label of the range that a moment is in, "" for none."""
        index = bisect.bisect_right(self.begins, moment) - 1
        if index < 0 or moment > self.ranges[index].end:
            return ""
        return self.ranges[index].name.removeprefix(LABEL)


def account(pieces):
    """({kind: microseconds}, {(kind, name): [microseconds, calls]}) of operations or kernels.

    pieces: with the marked ranges among them, whose names begin with LABEL.
    """
    labels = Labels([piece for piece in pieces if piece.name.startswith(LABEL)])
    kinds = dict.fromkeys(ALL_KINDS, 0.0)
    names = {}
    for piece in pieces:
        if piece.name.startswith(LABEL):
            continue
        kind = kind_of(piece.name, labels.at(piece.begin))
        kinds[kind] += piece.own
        entry = names.setdefault((kind, piece.name), [0.0, 0])
        entry[0] += piece.own
        entry[1] += 1
    return kinds, names


# --------------------------------------------------------------------------------------------------
# measuring

def mark(owner, method, label):
    """Let a method of an object show in the trace as a range of this label."""
    function = getattr(owner, method)

    def marked(*arguments, **keywords):
        with record_function(LABEL + label):
            return function(*arguments, **keywords)

    setattr(owner, method, marked)


def pieces_of(profiler, on_gpu):
    """The Pieces of a trace: kernels on a GPU, torch's operations on a CPU.

    The ranges of "loss" and "optimizer" are marked where the host is; the profiler repeats them
    where their kernels run.
    """
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    pieces = []
    for event in profiler.events():
        is_label = event.name.startswith(LABEL)
        is_range = getattr(event, "is_user_annotation", False)
        if event.device_type != wanted or (is_range and not is_label):
            continue
        span = event.time_range
        own = span.end - span.start if on_gpu else event.self_cpu_time_total
        # what a marked range spends outside of operations is Python
        pieces.append(Piece(event.name, span.start, span.end, 0.0 if is_label else own))
    return pieces


def make_case(device_kind):
    """The Case of the settings; None takes what DEFAULTS has for the device."""
    usual = DEFAULTS.get(device_kind, DEFAULTS["cpu"])
    given = depth, vocab_size, max_seq_len, device_batch_size
    layers, vocabulary, context, sequences = (
        theirs if ours is None else ours for ours, theirs in zip(given, usual))
    config = MODEL_CLASSES[model].config_class.from_depth(layers, vocabulary, context)
    return Case(f"depth {layers}", model, config, sequences)


def listing(kinds, wall, on_gpu, idle):
    """Lines of the table: milliseconds and share of a step for each kind."""
    where = "of the device" if on_gpu else "of the CPU"
    lines = [f"{'kind':<16}{'ms a step':>10}{'share':>8}   time {where}"]
    for kind, time_of_kind in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:<16}{time_of_kind / 1e3:10.2f}{100 * time_of_kind / wall:7.1f} %")
    lines.append(f"{'idle':<16}{idle / 1e3:10.2f}{100 * idle / wall:7.1f} %")
    lines.append(f"{'step':<16}{wall / 1e3:10.2f}")
    return lines


def main(settings):
    require(settings, 1, "depth", "vocab_size", "max_seq_len", "device_batch_size", "steps")
    require(settings, COMPILING_STEPS + 1, "warm_steps")
    if model not in TRAINABLE:
        raise UserError(f"model={model} does not exist: choose from {', '.join(TRAINABLE)}")
    started = time.perf_counter()
    raise_malloc_thresholds()
    compute = compute_init(device_type, dtype)
    on_gpu = compute.device.type == "cuda"

    # 1) the model, and steps without the profiler
    case = make_case(compute.device.type)
    config = case.config
    tokens = case.batch_size * config.max_seq_len
    dtype_name = str(compute.dtype).removeprefix("torch.")
    print0(f"{model}, {case.name}, width {config.width}, vocabulary {config.vocab_size:,}, "
           f"{case.batch_size} sequences of {config.max_seq_len} tokens on each of "
           f"{compute.world_size} x {compute.device.type}, {dtype_name}")
    kind = parallel
    if parallel == "auto":
        kind = "zero2" if compute.world_size > 1 else "replicated"
    recipe = choose_fp8(settings, None, compute)
    setup = Setup(parallel=kind, compile=compile, fp8=recipe)
    free = memory_of_a_rank(compute)
    micro_batch_size, needed = fitting_micro_batch(case, free, setup, compute)
    if micro_batch_size == 0:
        raise UserError(does_not_fit(case, needed, free, "--max_seq_len"))
    if micro_batch_size < case.batch_size:
        print0(f"  {micro_batch_size} sequences fit at a time")
    training = Training(case, compute, micro_batch_size, setup)
    reset_peak_memory(compute.device)
    durations = []
    for number in range(1, warm_steps + 1):
        durations.append(training.step().seconds)
        print0(f"  step {number}: {1e3 * durations[-1]:,.1f} ms")
    most = peak_memory(compute.device)
    plain = statistics.median(durations[COMPILING_STEPS:])

    # 2) the same under the profiler
    mark(training.network, "loss", "loss")
    mark(training.layout, "apply", "optimizer")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    print0(f"  {steps} steps under the profiler")
    profiled = []
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            profiled.append(training.step().seconds)
    if trace and compute.rank == 0:
        profiler.export_chrome_trace(trace)

    # 3) the account, in microseconds a step
    print0("  reading the trace")
    pieces = pieces_of(profiler, on_gpu)
    kinds, names = account(pieces)
    kinds = {kind: total / steps for kind, total in kinds.items()}
    wall = 1e6 * sum(profiled) / steps
    busy = sum(kinds.values())
    if on_gpu:
        busy = covered([piece for piece in pieces if piece.own]) / steps
    idle = max(0.0, wall - busy)
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:top]
    print0("\n" + "\n".join(listing(kinds, wall, on_gpu, idle)) + "\n")
    for (kind, name), (total, calls) in longest:
        print0(f"{total / steps / 1e3:10.2f} ms {calls / steps:7.0f} x  {kind:<14} {name[:60]}")
    rate = tokens * compute.world_size / plain
    print0(f"\nwithout the profiler {1e3 * plain:,.1f} ms a step, {rate:,.0f} tokens/s")
    finish_stage(
        "profile_step",
        time.perf_counter() - started,
        settings,
        depth=config.depth,
        dtype=dtype_name,
        ranks=compute.world_size,
        tokens_per_step=tokens * compute.world_size,
        tokens_per_second=rate,
        step_ms=1e3 * plain,
        profiled_step_ms=wall / 1e3,
        kinds_ms={kind: total / 1e3 for kind, total in kinds.items()},
        idle_ms=idle / 1e3,
        idle_share=idle / wall,
        peak_memory=most,
        longest=[[name, kind, total / steps / 1e3] for (kind, name), (total, _) in longest],
    )
    compute_cleanup()


if __name__ == "__main__":
    main(configure(globals()))
