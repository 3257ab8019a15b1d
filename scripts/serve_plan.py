"""
What to expect of a large model on given hardware, before anyone waits for it to load: memory,
cache, tokens a second.

    python -m scripts.serve_plan --model=qwen3-32b --device=dgx-spark
    python -m scripts.serve_plan --model=qwen3-32b --device=dgx-spark --dtype=fp8 --kv_gib=66.25
    python -m scripts.serve_plan --model=deepseek-r1 --device=mi350x --concurrency=1,32,256

Everything is computed, by the formulas of nanochat/roofline.py, from data sheets and the models'
published shapes. --kv_gib takes an engine's own figure for the cache. The tables are Markdown; the
last line is JSON.
"""
import json
from collections import namedtuple

from nanochat.common import UserError
from nanochat.configurator import configure, require
from nanochat.hardware import DEVICES
from nanochat.roofline import (
    CACHE_BYTES,
    MODELS,
    cache_bytes,
    cache_room,
    decode_rate,
    look_up,
    numbers,
    read_bytes,
    weight_bytes,
)

model = "qwen3-32b"         # qwen3-32b or deepseek-r1 (the table in nanochat/roofline.py)
device = "dgx-spark"        # dgx-spark, mi350x, h200, ... (the table in nanochat/hardware.py)
devices: int = None         # number of them, tensor parallel. None: what the deployment here has
dtype = ""                  # of the weights: bf16, fp8 or int4. Empty: all published ones
kv_dtype = "bf16"           # of the cache: bf16 or fp8
utilization: float = None   # part of the memory to use. None: 0.7 where the CPU shares it, else 0.9
kv_gib: float = None        # GiB of cache on each device. None: all that the weights leave
max_model_len: int = None   # longest context. None: 32,000 (qwen3-32b) and 32,768, as deployed here
context = 1024              # tokens that each request holds while its tokens/s are computed
concurrency = "1,2,4,8,16,32"   # requests at a time

GIB = 2**30

# What the settings come to. shape: a row of MODELS. peaks: a row of DEVICES. count: of devices.
# share: the part of a device's memory that may be used. longest: the longest context in tokens.
# batches: numbers of requests at a time.
Deployment = namedtuple("Deployment", "shape peaks count share longest batches")


def deployment():
    """The settings as a Deployment; UserError where they contradict a table or each other."""
    shape = look_up(MODELS, model, "model")
    peaks = look_up(DEVICES, device, "device")
    look_up(CACHE_BYTES, kv_dtype, "kv_dtype")
    if dtype:
        look_up(dict.fromkeys(shape.dtypes), dtype, "dtype")
    batches = numbers(concurrency, "concurrency")

    share = utilization
    if share is None:
        share = 0.7 if peaks.unified else 0.9
    if share > 1:
        raise UserError(f"utilization={share} is a part of the memory, at most 1")

    longest = max_model_len or shape.max_model_len
    if context > longest:
        raise UserError(f"context={context} is longer than max_model_len={longest}: "
                        "lower the one or raise the other")
    return Deployment(shape, peaks, devices or shape.devices, share, longest, batches)


def cache_size(where, kind):
    """Bytes of cache on each device beside weights of the dtype `kind`; 0 or less: none fits."""
    shape, peaks, count, share, *_ = where
    if kv_gib is None:
        return cache_room(shape, peaks, kind, count, share)
    wanted = kv_gib * GIB
    fits = wanted <= cache_room(shape, peaks, kind, count, utilization=1)
    return wanted if fits else 0


def plan(where, kind):
    """The figures of a Deployment with weights of the dtype `kind`, as a dict.

    tokens_per_second and bound_by have an entry for each number of requests that the cache can
    hold. Sizes are in bytes.
    """
    shape, peaks, count, _, longest, batches = where
    room = cache_size(where, kind)
    tokens = max(0, int(room // cache_bytes(shape, kv_dtype, count)))

    rates, bounds = {}, {}
    for requests in batches:
        if requests * context <= tokens:
            rates[requests], bounds[requests] = decode_rate(
                shape, peaks, kind, requests, context, count, kv_dtype)
    return {
        "weight_bytes": weight_bytes(shape, kind),
        "read_bytes": read_bytes(shape, kind, 1),
        "cache_bytes": max(0, room),
        "cache_tokens": tokens,
        "contexts": tokens / longest,
        "tokens_per_second": rates,
        "bound_by": bounds,
    }


# --------------------------------------------------------------------------------------------------
# the report

def table(head, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def on_each_device(where):
    return " on each device" if where.count > 1 else ""


def memory_table(where, plans):
    """A line for each dtype: what weights and cache take."""
    head = [
        "weights",
        "GB",
        "GB read for one token",
        f"GiB for the cache{on_each_device(where)}",
        "tokens",
        f"contexts of {where.longest:,}",
    ]
    rows = []
    for kind, figures in plans.items():
        rows.append([
            kind,
            f"{figures['weight_bytes'] / 1e9:.1f}",
            f"{figures['read_bytes'] / 1e9:.1f}",
            f"{figures['cache_bytes'] / GIB:.1f}",
            f"{figures['cache_tokens']:,}",
            f"{figures['contexts']:.2f}",
        ])
    return table(head, rows)


def rate_cell(figures, requests):
    """Tokens/s, with a star where the multiplications are the bound."""
    if requests not in figures["bound_by"]:
        return "no room"
    star = " *" if figures["bound_by"][requests] == "FLOP/s" else ""
    return f"{figures['tokens_per_second'][requests]:,.1f}{star}"


def rate_table(where, plans):
    """A line for each number of requests, a column for each dtype."""
    rows = []
    for requests in where.batches:
        cells = [rate_cell(figures, requests) for figures in plans.values()]
        rows.append([str(requests), *cells])
    return table(["requests", *plans], rows)


def known_flops(peaks):
    """The published FLOP/s of a device, as a list of texts."""
    kinds = {"bf16": peaks.bf16, "fp8": peaks.fp8}
    return [f"{flops / 1e12:,.0f} TFLOP/s in {kind}" for kind, flops in kinds.items() if flops]


def bound_text(where, plans):
    """One sentence: which of the two bounds the tokens/s."""
    if any("FLOP/s" in figures["bound_by"].values() for figures in plans.values()):
        return "Memory bandwidth is the bound, and multiplications where there is a *."
    if known_flops(where.peaks):
        return "Memory bandwidth is the bound everywhere."
    return "Memory bandwidth is the bound; that of multiplications is not known."


def cache_text(where):
    """One sentence: where the size of the cache comes from."""
    if kv_gib is not None:
        return f"The cache has the {kv_gib} GiB that were given."
    return (f"{100 * where.share:.0f} % of the memory are for weights and cache, and the cache has "
            "what the weights leave: activations and graphs come off it.")


def report(where, plans):
    """Yield the paragraphs of the report: the two tables, and what they rest on."""
    shape, peaks, count, *_ = where
    each = on_each_device(where)
    flops = ", ".join(known_flops(peaks)) or "FLOP/s not published"
    yield (f"{shape.title} on {count} x {device}: "
           f"{peaks.memory / 1e9:,.0f} GB, {peaks.bandwidth / 1e9:,.0f} GB/s, {flops}{each}. "
           "All figures are computed, none is measured.")
    yield memory_table(where, plans)

    token = cache_bytes(shape, kv_dtype, count) / 1024
    yield f"A token takes {token:,.1f} KiB of cache{each}. {cache_text(where)}"

    even = ", if all experts are chosen equally often" if shape.routed else ""
    yield (f"Tokens/s of all requests together, at most{even}, each holding {context:,} tokens. "
           f"{bound_text(where, plans)}")
    yield rate_table(where, plans)


def main(settings):
    # 1) what was asked for
    require(settings, 1, "devices", "context", "max_model_len")
    require(settings, 0, "utilization", "kv_gib")
    where = deployment()
    kinds = [dtype] if dtype else where.shape.dtypes

    # 2) the figures
    plans = {kind: plan(where, kind) for kind in kinds}
    if not any(figures["cache_tokens"] for figures in plans.values()):
        remedy = "raise --devices or --utilization"
        if kv_gib is not None:
            remedy = f"--kv_gib={kv_gib} must be above 0 and fit beside the weights"
        raise UserError(f"{where.shape.title} in {' or '.join(kinds)} leaves no cache on "
                        f"{where.count} x {device}: {remedy}")

    # 3) for people, then for machines
    print("\n\n".join(report(where, plans)) + "\n")
    print(json.dumps({
        "settings": settings,
        "devices": where.count,
        "utilization": where.share,
        "max_model_len": where.longest,
        "cache_bytes_per_token": cache_bytes(where.shape, kv_dtype, where.count),
        "plans": plans,
    }))


if __name__ == "__main__":
    main(configure(globals()))
