"""Schedules as pure functions of progress (0 at the first step, 1 at the end), and the plan that a time budget buys.

Progress is the share of the budget that is used, whatever the budget counts: minutes or steps. A run on a budget of
time therefore always finishes its warm-down, however slow the machine turned out to be.
"""
import math


def lr_multiplier(progress, warmup=0.02, warmdown=0.6, final=0.02):
    """Linear warm-up, flat, linear warm-down over the last `warmdown` of the run to `final` of the peak."""
    if progress < warmup:
        return max(0.1, progress / warmup)
    if progress < 1 - warmdown:
        return 1.0
    return final + (1 - final) * max(0.0, 1 - progress) / warmdown


def muon_momentum(step, start=0.85, end=0.95, steps=300):
    """Muon's momentum rises while the first gradients are still wild."""
    return start + (end - start) * min(1.0, step / steps)


def default_minutes(device_type):
    """Wall-clock budget where none is said: 5 minutes on a CPU, none on a GPU (there the horizon follows from depth)."""
    return 5.0 if device_type == "cpu" else None


# What a CPU's time buys: rows of (least FLOPs of the whole run, depth, context, batch in tokens). FLOPs = measured
# matmul rate x seconds. Found by the experiments in dev/LOG.md.
CPU_PLANS = [
    (0,       2, 256, 2048),
    (10e12,   2, 256, 4096),
    (60e12,   3, 256, 4096),
    (200e12,  4, 256, 4096),
    (3000e12, 6, 512, 8192),  # an estimate: no machine of ours was that fast
]


def gpu_plan(depth, vocab_size):
    """(batch in tokens, weight decay) of a GPU run of that depth and its documented horizon, 20 tokens a weight.

    The batch grows with the tokens of the run to the power .383 (Power Lines, arXiv 2505.13738) from the documented 524,288 at depth
    20, in powers of two; the decay falls with the depth squared from .2 at depth 12, as nanochat has it.
    """
    weights = [12 * d * (64 * d) ** 2 + 64 * d * v for d, v in ((depth, vocab_size), (20, 32768))]
    return 2 ** round(19 + 0.383 * math.log2(weights[0] / weights[1])), 0.2 * (12 / depth) ** 2


def cpu_plan(flops):
    """(depth, max_seq_len, total_batch_size) for a CPU run of so many FLOPs."""
    return next(row[1:] for row in reversed(CPU_PLANS) if flops >= row[0])
