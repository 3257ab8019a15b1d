"""
What to expect of a large model on given hardware, before anyone waits for it to load: memory, cache, tokens a second.

    python -m scripts.serve_plan --model=qwen3-32b --device=dgx-spark
    python -m scripts.serve_plan --model=qwen3-32b --device=dgx-spark --dtype=fp8 --kv_gib=66.25   # an engine's own figure
    python -m scripts.serve_plan --model=deepseek-r1 --device=mi350x --concurrency=1,32,256

Everything here is computed, by the formulas of nanochat/roofline.py, from data sheets and the models' published shapes. The
tables are Markdown; the last line is JSON.
"""
import json

from nanochat.common import UserError
from nanochat.configurator import configure, require
from nanochat.hardware import DEVICES
from nanochat.roofline import CACHE_BYTES, MODELS, cache_bytes, cache_room, decode_rate, look_up, numbers, read_bytes, weight_bytes

model = "qwen3-32b"         # qwen3-32b or deepseek-r1 (the table in nanochat/roofline.py)
device = "dgx-spark"        # dgx-spark, mi350x, h200, ... (the table in nanochat/hardware.py)
devices: int = None         # so many of it, which share out each layer (tensor parallel). None: what the deployment here has
dtype = ""                  # of the weights: bf16, fp8 or int4. Empty: all in which the model is published
kv_dtype = "bf16"           # of the cache: bf16 or fp8
utilization: float = None   # part of the memory for weights and cache. None: 0.7 where the CPU shares it, else 0.9
kv_gib: float = None        # GiB of cache on each device, as an engine's log tells. None: all that the weights leave
max_model_len: int = None   # longest context. None: 32,000 (qwen3-32b) and 32,768, as the deployments here in fp8
context = 1024              # tokens that each request holds while its rate is computed
concurrency = "1,2,4,8,16,32"   # requests at a time


def plan(shape, peaks, count, kind, share, longest, batches):
    """The figures of the model with weights in one dtype, as a dict. Rates only for as many requests as the cache holds."""
    room = cache_room(shape, peaks, kind, count, share)
    if kv_gib is not None:
        room = kv_gib * 2**30 if kv_gib * 2**30 <= cache_room(shape, peaks, kind, count, 1) else 0
    tokens = max(0, int(room // cache_bytes(shape, kv_dtype, count)))
    rates = {n: decode_rate(shape, peaks, kind, n, context, count, kv_dtype) for n in batches if n * context <= tokens}
    return {"weight_bytes": weight_bytes(shape, kind), "read_bytes": read_bytes(shape, kind, 1), "cache_bytes": max(0, room),
            "cache_tokens": tokens, "contexts": tokens / longest, "tokens_per_second": {n: rate for n, (rate, _) in rates.items()},
            "bound_by": {n: bound for n, (_, bound) in rates.items()}}


def table(*rows):
    """A Markdown table, the first row its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def memory_table(plans, longest, each):
    head = ["weights", "GB", "GB read for one token", f"GiB for the cache{each}", "tokens", f"contexts of {longest:,}"]
    return table(head, *[[kind, f"{row['weight_bytes'] / 1e9:.1f}", f"{row['read_bytes'] / 1e9:.1f}", f"{row['cache_bytes'] / 2**30:.1f}",
                          f"{row['cache_tokens']:,}", f"{row['contexts']:.2f}"] for kind, row in plans.items()])


def rate_table(plans, batches):
    def cell(row, n):
        if n not in row["bound_by"]:
            return "no room"
        return f"{row['tokens_per_second'][n]:,.1f}" + " *" * (row["bound_by"][n] == "FLOP/s")
    return table(["requests", *plans], *[[str(n), *[cell(row, n) for row in plans.values()]] for n in batches])


def report(shape, peaks, count, share, longest, plans, batches):
    """The two tables, and what they rest on."""
    each = " on each device" if count > 1 else ""
    known = [f"{flops / 1e12:,.0f} TFLOP/s in {kind}" for kind, flops in (("bf16", peaks.bf16), ("fp8", peaks.fp8)) if flops]
    room = (f"{100 * share:.0f} % of the memory are for weights and cache, and the cache has what the weights leave: "
            "activations and graphs come off it" if kv_gib is None else f"The cache has the {kv_gib} GiB that were given")
    if any("FLOP/s" in row["bound_by"].values() for row in plans.values()):
        bound = "Memory bandwidth is the bound, and multiplications where there is a *."
    else:
        bound = "Memory bandwidth is the bound" + (" everywhere." if known else "; that of multiplications is not known.")
    yield (f"{shape.title} on {count} x {device}: {peaks.memory / 1e9:,.0f} GB, {peaks.bandwidth / 1e9:,.0f} GB/s, "
           f"{', '.join(known) or 'FLOP/s not published'}{each}. All figures are computed, none is measured.")
    yield memory_table(plans, longest, each)
    yield f"A token takes {cache_bytes(shape, kv_dtype, count) / 1024:,.1f} KiB of cache{each}. {room}."
    even = ", if all experts are chosen equally often" if shape.routed else ""
    yield f"Tokens/s of all requests together, at most{even}, each holding {context:,} tokens. {bound}"
    yield rate_table(plans, batches)


def main(settings):
    require(settings, 1, "devices", "context", "max_model_len")
    require(settings, 0, "utilization", "kv_gib")
    shape, peaks = look_up(MODELS, model, "model"), look_up(DEVICES, device, "device")
    look_up(CACHE_BYTES, kv_dtype, "kv_dtype")
    kinds = [look_up({kind: kind for kind in shape.dtypes}, dtype, "dtype")] if dtype else shape.dtypes
    share = utilization if utilization is not None else 0.7 if peaks.unified else 0.9
    count, longest, batches = devices or shape.devices, max_model_len or shape.max_model_len, numbers(concurrency, "concurrency")
    if share > 1:
        raise UserError(f"utilization={share} is a part of the memory, at most 1")
    if context > longest:
        raise UserError(f"context={context} is longer than max_model_len={longest}: lower the one or raise the other")
    plans = {kind: plan(shape, peaks, count, kind, share, longest, batches) for kind in kinds}
    if not any(row["cache_tokens"] for row in plans.values()):
        raise UserError(f"{shape.title} in {' or '.join(kinds)} leaves no cache on {count} x {device}: "
                        + ("raise --devices or --utilization" if kv_gib is None else f"--kv_gib={kv_gib} must be above 0 and fit beside the weights"))
    print("\n\n".join(report(shape, peaks, count, share, longest, plans, batches)) + "\n")
    print(json.dumps({"settings": settings, "devices": count, "utilization": share, "max_model_len": longest,
                      "cache_bytes_per_token": cache_bytes(shape, kv_dtype, count), "plans": plans}))


if __name__ == "__main__":
    main(configure(globals()))
