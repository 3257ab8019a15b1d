"""
What training a model takes on given hardware, before anything is allocated: memory by kind, the
largest batch, communication, tokens/s, hours, disk and cost, for each layout; and which to take.

    python -m scripts.plan                                     # this machine, what base_train does
    python -m scripts.plan --depth=32 --gpus=6 --memory_gb=24
    python -m scripts.plan --depth=20 --gpus=8 --device=h100 --price_per_gpu_hour=3
    python -m scripts.plan --forecasts                         # the tables of docs/planning.md

base_train uses the same functions (nanochat/memory.py, forecast.py, plan.py). Memory has been held
to the allocator of a CPU; speed is an estimate (docs/planning.md). The last line is JSON.
"""
import re
import shlex
import time
from pathlib import Path

import torch

from nanochat.common import UserError, compute_init
from nanochat.configurator import configure, declared_values, require
from nanochat.forecast import PRICES, RATES, assumed_machine, expected_step
from nanochat.fp8 import check_recipe
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import DEVICES, device_kind, measure_matmul_flops
from nanochat.memory import (
    KEPT,
    MEMORY_SHARE,
    PARALLEL,
    build_on_meta,
    communication,
    memory,
)
from nanochat.metrics import finish_stage
from nanochat.plan import (
    MOST_EPOCHS,
    SHAPE_SETTINGS,
    USUAL_VOCAB,
    arrange,
    arrangements,
    checkpoint_bytes,
    choose_budget,
    choose_shape,
    config_for,
    depends_on_speed,
    given_fields,
    options_of,
    speed_of,
    this_machine,
)
from nanochat.roofline import look_up
from nanochat.variants import MODEL_CLASSES, TRAINABLE, default_model

depth: int = None            # layers; None: what base_train would take
gpus = "auto"                # number of GPUs; auto: those here
memory_gb = "auto"           # GB of one device; auto: as it has here, or as --device has
device: str = None           # h100, rtx-4090, 7900-xtx, ... (the table in nanochat/hardware.py)
model: str = None            # gpt, lookup, mla, ...; None: what base_train would take
vocab_size: int = None       # None: 65536 on GPUs, 4096 on a CPU
width: int = None            # of the residual stream; None: 64 x depth
heads: int = None            # query heads; None: of 128 dimensions, or 64 in small models
kv_heads: int = None         # key/value heads; None: as many as query heads
mlp_width: int = None        # of portable's hidden layer (SwiGLU); None: 8/3 of the width
tied: bool = None            # portable's head is its embedding; None: no
rotary_base: float = None    # RoPE's theta; None: 10000, portable 1000000
max_seq_len: int = None      # context in tokens; None: what base_train would take
total_batch_size: int = None   # tokens per optimizer step; None: from depth
device_batch_size: int = None  # sequences per device and pass; None: the largest divisor that fits
parallel = "auto"            # replicated, zero2 or fsdp; auto: all three, and one is recommended
checkpoint_activations: bool = None  # recompute blocks in the backward pass; None: if it must be
reduce_dtype = "float32"     # of gradients between ranks: float32 or bfloat16
compile = True               # compiled blocks
fp8: str = None              # passed on to base_train: the plan is that of bfloat16
curriculum: str = None       # as of base_train: batches that its lengths divide
minutes: float = None        # budget: wall clock
num_iterations: int = None   # budget: optimizer steps
target_flops: float = None   # budget: training FLOPs
target_param_data_ratio: float = None   # budget: tokens per matmul parameter; None: 20
keep = 3                     # newest checkpoints that stay, besides the best and that before decay
link_gb_per_second: float = None        # between GPUs, of a collective; None: by the device
matmul_tflops: float = None             # of a device in bf16; None: by its data sheet
price_per_gpu_hour: float = None        # dollars; None: 3 for an H100, else no cost is given
forecasts = False            # print the tables of docs/planning.md instead

TEXT_BYTES_PER_TOKEN = 1.92  # FineWeb-Edu, compressed: 4.8 characters, .1 GB a shard of 250 M
# A review of an earlier version, by hand, for a vocabulary of 32,768: model, GPUs, depth,
# sequences, and GB at the peak. It had 12 numbers a layer for each token and channel, KEPT has 18.
REVIEW = (
    ("gpt", 1, 20, 4, 14.6), ("lookup", 1, 20, 2, 19.8), ("lookup", 6, 20, 6, 21.5),
    ("lookup", 6, 20, 7, 22.8), ("lookup", 6, 26, 1, 27), ("lookup", 1, 20, 32, 63),
    ("lookup", 8, 20, 32, 50), ("lookup", 1, 32, 4, 74), ("lookup", 1, 32, 8, 73),
    ("lookup", 8, 32, 8, 58), ("lookup", 8, 32, 16, 84),
)
REVIEW_NUMBERS = 12
GPUS_OF_A_MACHINE = 8
MACHINES = (("1 x 24 GB", "rtx-4090", 1), ("6 x 24 GB", "7900-xtx", 6), ("1 x 80 GB", "h100", 1),
            ("8 x 80 GB", "h100", 8))  # of docs/planning.md


# --------------------------------------------------------------------------------------------------
# the machine

def whole_number(text, name):
    """The number in a setting that may also be "auto", at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text} is neither auto nor a number of at least 1")
    return int(text)


def given_bytes():
    """--memory_gb in bytes, or None for auto."""
    if memory_gb == "auto":
        return None
    try:
        size = float(memory_gb)
    except ValueError:
        size = 0
    if not 0 < size < 1e6:
        raise UserError(f"memory_gb={memory_gb} is neither auto nor a number of GB above 0")
    return size * 1e9


def device_of(size):
    """The device that stands for any of so many bytes: of RATES, the first that is nearest."""
    return min(RATES, key=lambda kind: abs(DEVICES[kind].memory - size))


def find_machine():
    """(the Machine that is asked for, where its numbers come from, its Compute if it is here)."""
    size = given_bytes()
    link = link_gb_per_second and 1e9 * link_gb_per_second
    if not (device or size) and (gpus == "auto" or torch.cuda.is_available()):
        return machine_here(link)
    count = 1 if gpus == "auto" else whole_number(gpus, "gpus")
    if not (device or size):
        raise UserError(
            f"gpus={count}, and no GPU is here: say which with --device, or its --memory_gb")
    flops = matmul_tflops and 1e12 * matmul_tflops
    if device:
        kind = named_device(device)
        source = "--matmul_tflops" if flops else "its data sheet"
        about = f"{kind}: as --device says, by {source}"
        return assumed_machine(kind, count, size, link, flops), about, None
    kind = device_of(size)
    about = (f"{kind} is assumed: of the devices whose speed has a source, the first whose "
             f"memory is nearest to {size / 1e9:g} GB; --device names another")
    return assumed_machine(kind, count, size, link, flops), about, None


def named_device(name):
    """The name in DEVICES of a device, also as torch or a shop calls it: "RTX 4090", "H100"."""
    def letters(text):
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for kind in DEVICES:
        if letters(kind) == letters(name):
            return kind
    return device_kind(name) or look_up(DEVICES, name, "device")


def machine_here(link):
    """find_machine() of the machine here, as base_train sees it: on all GPUs, or one CPU."""
    compute = compute_init()
    flops = measure_matmul_flops(compute.device, compute.dtype)
    dtype_name = str(compute.dtype).removeprefix("torch.")
    machine = this_machine(compute, flops)._replace(link=link)
    about = f"what is here, measured in {dtype_name}"
    if machine.device_type == "cuda":
        count = torch.cuda.device_count() if gpus == "auto" else whole_number(gpus, "gpus")
        machine = machine._replace(ranks=count)
        about = f"{torch.cuda.get_device_name(0)}: {about}"
    return machine, about, compute


def at_speed(machine, network, tokens_per_second):
    """The Machine that trains a model as fast as it was measured to."""
    flops_per_token = network.flops_per_token(network.config.max_seq_len)
    flops = tokens_per_second * flops_per_token / machine.ranks / machine.step_share
    return machine._replace(matmul_flops=flops)


# --------------------------------------------------------------------------------------------------
# the figures

def hours_and_steps(budget, network, way):
    """(hours, steps) of a run with an Arrangement."""
    batch = way.batch.total_batch_size
    if budget.kind == "minutes":
        hours = budget.amount / 60
        return hours, hours * 3600 * way.tokens_per_second / batch
    if budget.kind == "num_iterations":
        steps = budget.amount
    elif budget.kind == "target_flops":
        steps = budget.amount / network.flops_per_token(network.config.max_seq_len) / batch
    else:
        steps = budget.amount * network.matmul_parameters() / batch
    steps = max(1, round(steps))
    return steps * batch / way.tokens_per_second / 3600, steps


def figures(settings, budget, machine, network, way):
    """What an Arrangement comes to, as a dict; bytes, seconds, hours, dollars."""
    options = options_of(settings)
    sent = communication(
        network, machine.ranks, way.parallel,
        grad_accum_steps=way.batch.grad_accum_steps,
        dtype_bytes=machine.dtype_bytes,
        wire_bytes=options["wire_bytes"])
    step = expected_step(
        machine, network, way.batch, way.parallel, way.checkpoint_activations,
        options["wire_bytes"])
    hours, steps = hours_and_steps(budget, network, way)
    price = price_per_gpu_hour or PRICES.get(machine.kind)
    tokens = steps * way.batch.total_batch_size
    return {
        "parallel": way.parallel,
        "checkpoint_activations": way.checkpoint_activations,
        "micro_batch_size": way.batch.micro_batch_size,
        "micro_batch_limit": way.limit,
        "grad_accum_steps": way.batch.grad_accum_steps,
        "total_batch_size": way.batch.total_batch_size,
        "memory": way.memory._asdict(),
        "memory_total": way.memory.total,
        "peak": way.memory.peak,
        "sent": sent.total,
        "seconds_per_step": step.seconds,
        "communication_seconds": step.communicating,
        "tokens_per_second": step.tokens_per_second,
        "steps": steps,
        "hours": hours,
        "checkpoints": (settings["keep"] + 2) * checkpoint_bytes(network),
        "text": tokens * TEXT_BYTES_PER_TOKEN,
        "cost": price and price * machine.ranks * hours,
    }


def table(head, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def layout_name(row):
    return row["parallel"] + (", recomputing" if row["checkpoint_activations"] else "")


def dollars(cost):
    return f"${cost:,.0f}" if cost else "-"


def hours_text(hours):
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def gb(size):
    return f"{size / 1e9:.2f}" if size else "-"


def speed_table(rows, missing):
    """A line for each layout: batch, communication, speed, hours, cost."""
    head = ["layout", "memory GB", "sequences x passes", "largest", "sent GB a step",
            "s of that in a step", "tokens/s", "hours", "cost"]
    lines = []
    for row in rows:
        lines.append([
            layout_name(row),
            gb(row["memory_total"]),
            f"{row['micro_batch_size']} x {row['grad_accum_steps']}",
            str(row["micro_batch_limit"]),
            gb(row["sent"]),
            f"{row['communication_seconds']:.3f} of {row['seconds_per_step']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            hours_text(row["hours"]),
            dollars(row["cost"]),
        ])
    for kind, size in missing.items():
        lines.append([kind, f"{gb(size)}: no", *["-"] * 7])
    return table(head, lines)


def memory_table(rows):
    """A line for each layout: bytes by kind."""
    kinds = list(rows[0]["memory"])
    lines = []
    for row in rows:
        sizes = [gb(row["memory"][kind]) for kind in kinds]
        lines.append([layout_name(row), *sizes, gb(row["memory_total"]), row["peak"]])
    return table(["GB of one device", *kinds, "at most", "at the"], lines)


# Settings that are none of the plan's decisions: in the command only where they are given
PASSED_ON = (
    *SHAPE_SETTINGS, "fp8", "curriculum", "reduce_dtype", "compile", "keep", "minutes",
    "num_iterations", "target_flops", "target_param_data_ratio")


def command_of(settings, machine, chosen, network, name):
    """The command that trains so."""
    start = "python -m scripts.base_train"
    if machine.ranks > 1:
        start = f"torchrun --standalone --nproc_per_node={machine.ranks} -m scripts.base_train --"
    words = [
        start, f"--model={name}", f"--depth={network.config.depth}",
        f"--max_seq_len={network.config.max_seq_len}",
        f"--total_batch_size={chosen['total_batch_size']}",
        f"--device_batch_size={chosen['micro_batch_size']}", f"--parallel={chosen['parallel']}"]
    if chosen["checkpoint_activations"]:
        words.append("--checkpoint_activations")
    declared = declared_values(Path(__file__))
    for key in PASSED_ON:
        if settings[key] != declared[key]:
            words.append(shlex.quote(f"--{key}={settings[key]}"))
    return " ".join(words)


def reason_of(settings, chosen, machine):
    """One line: why this layout."""
    if settings["parallel"] != "auto":
        reason = "as --parallel says"
    elif machine.ranks == 1:
        reason = "one device has nothing to share"
    elif chosen["parallel"] == "fsdp":
        reason = "nothing else fits, although it moves the model in every pass"
    else:
        reason = "it fits, and it sends the model once in a step"
    if chosen["checkpoint_activations"] and settings["checkpoint_activations"] is None:
        reason += "; recomputing, for otherwise it does not fit or only with a slower batch"
    most = chosen["micro_batch_limit"]
    if chosen["micro_batch_size"] > most:
        given = chosen["micro_batch_size"]
        reason += (f"; its {given} sequences at a time are as given, above the {most} that leave "
                   f"{100 - 100 * MEMORY_SHARE:.0f} % of the memory free")
    return f"Recommended: {layout_name(chosen)}: {reason}."


# --------------------------------------------------------------------------------------------------
# one size on one machine

def network_of(settings, name, shape, vocabulary):
    model_class = MODEL_CLASSES[name]
    config = config_for(model_class, shape, vocabulary, given_fields(settings, model_class))
    return build_on_meta(model_class, config)


def rows_of(settings, budget, machine, network, wanted):
    """([figures of each layout that fits], {layout that does not: its bytes with 1 sequence})."""
    kinds = ["replicated"] if machine.ranks == 1 else list(PARALLEL)
    if settings["parallel"] != "auto":
        kinds = [settings["parallel"]]
    rows, missing = [], {}
    for kind in kinds:
        asked = {**settings, "parallel": kind}
        found = arrangements(
            asked, machine, network, wanted,
            settings["total_batch_size"], settings["device_batch_size"])
        if found:
            rows.append(figures(settings, budget, machine, network, found[0]))
        else:
            missing[kind] = memory(
                network, 1, machine.dtype_bytes, machine.ranks, machine.device_type,
                parallel=kind, checkpoint_activations=True, **options_of(settings)).total
    return rows, missing


def plan_one(settings):
    """Print the plan; returns its figures."""
    # 1) the machine
    machine, about, compute = find_machine()
    matmul_flops = machine.matmul_flops
    on_gpu = machine.device_type == "cuda"
    name = settings["model"] or default_model(machine.device_type)
    look_up(dict.fromkeys(TRAINABLE), name, "model")
    model_class = MODEL_CLASSES[name]
    vocabulary = settings["vocab_size"] or USUAL_VOCAB[machine.device_type]
    budget = choose_budget({**settings, "extend": None}, machine.device_type)

    # 2) the size and the layouts; without CUDA the speed of a step is measured
    given = given_fields(settings, model_class)
    speed = compute and speed_of(model_class, vocabulary, compute, given)
    shape = choose_shape(settings, budget, machine, model_class, vocabulary, speed)
    network = network_of(settings, name, shape, vocabulary)
    measured = depends_on_speed(settings, machine)
    if measured:
        machine = at_speed(machine, network, speed(shape.depth, shape.max_seq_len))
    best = arrange(
        settings, machine, network, shape.total_batch_size,
        settings["total_batch_size"], settings["device_batch_size"])
    chosen = figures(settings, budget, machine, network, best)
    rows, missing = rows_of(settings, budget, machine, network, shape.total_batch_size)

    # 3) for people
    parameters = sum(p.numel() for p in network.parameters())
    size = f"{machine.memory / 1e9:.1f} GB" if machine.memory else "memory unknown"
    print(f"{machine.ranks} x {machine.kind or machine.device_type}, {size} each, "
          f"{matmul_flops / 1e12:.3g} TFLOP/s in matmuls. {about}")
    print(f"{name}, depth {shape.depth} ({shape.reason}), {parameters / 1e6:,.0f} M parameters, "
          f"context {shape.max_seq_len}, vocabulary {vocabulary:,}, "
          f"{budget.kind}={budget.amount:g}\n")
    print(speed_table(rows, missing) + "\n")
    print(memory_table(rows) + "\n")
    link = f", {machine.bandwidth / 1e9:g} GB/s between GPUs" if machine.ranks > 1 else ""
    if measured:
        print("Speed is measured here, in a few small steps without compiling.")
    else:
        print(f"Speed, hours and cost are an estimate, never measured by us: a step reaches "
              f"{100 * machine.step_share:.0f} % of the matmul rate{link}, none of it hidden.")
    print(f"Disk: {chosen['checkpoints'] / 1e9:.1f} GB of checkpoints, "
          f"{chosen['text'] / 1e9:.1f} GB of text, each read a single time. "
          f"With less, base_train reads it {MOST_EPOCHS} times and ends before.")
    print(reason_of(settings, chosen, machine))
    if on_gpu and machine.ranks > GPUS_OF_A_MACHINE:
        print(f"More than {GPUS_OF_A_MACHINE} GPUs are several machines (docs/multi-node.md): say "
              "with --link_gb_per_second what a GPU can send between them.")
    command = command_of(settings, machine, chosen, network, name)
    print(f"\n    {command}\n")
    return {
        "device": machine.kind or machine.device_type,
        "gpus": machine.ranks if on_gpu else 0,
        "memory_bytes": machine.memory,
        "model": name,
        "depth": shape.depth,
        "parameters": parameters,
        "recommended": chosen,
        "layouts": rows,
        "too_large": missing,
        "command": command,
    }


# --------------------------------------------------------------------------------------------------
# docs/planning.md

def forecast_rows(settings, name):
    """Lines of the table of one model: machines and depths."""
    for title, kind, count in MACHINES:
        machine = assumed_machine(kind, count)
        for layers in (12, 20, 26, 32):
            sized = {**settings, "depth": layers, "vocab_size": 32768}
            budget = choose_budget({**sized, "extend": None}, "cuda")
            shape = choose_shape(sized, budget, machine, MODEL_CLASSES[name], 32768, None)
            network = network_of(sized, name, shape, 32768)
            first = [title, str(layers)]
            ways = arrangements(sized, machine, network, shape.total_batch_size)
            if not ways:
                smallest = "fsdp" if count > 1 else "replicated"
                needed = memory(
                    network, 1, 2, count, parallel=smallest, checkpoint_activations=True)
                yield [*first, "does not fit", *["-"] * 6, gb(needed.total), "-", "-"]
                continue
            row = figures(sized, budget, machine, network, ways[0])
            held = row["memory"]
            yield [
                *first,
                layout_name(row),
                f"{row['micro_batch_size']} x {row['grad_accum_steps']}",
                gb(held["parameters"] + held["tables"]),
                gb(held["gradients"]),
                gb(held["optimizer"]),
                gb(held["activations"]),
                gb(max(held["logits"], held["backward"])),
                gb(row["memory_total"]),
                f"{row['tokens_per_second'] / 1000:,.0f}k",
                hours_text(row["hours"]),
            ]


def depth_rows(settings):
    """Lines of what base_train takes without --depth: depth and hours for two vocabularies."""
    for title, kind, count in (*MACHINES, ("1 x 7900 XTX", "7900-xtx", 1)):
        machine = assumed_machine(kind, count)
        budget = choose_budget({**settings, "extend": None}, "cuda")
        cells = [title]
        for vocabulary in (32768, 65536):
            shape = choose_shape(settings, budget, machine, GPT, vocabulary, None)
            network = network_of(settings, "gpt", shape, vocabulary)
            way = arrange(settings, machine, network, shape.total_batch_size)
            hours, _ = hours_and_steps(budget, network, way)
            cells += [str(shape.depth), hours_text(hours)]
        yield cells


def review_rows():
    """Lines of the comparison with REVIEW: GB at equal numbers of sequences."""
    for name, count, layers, sequences, reviewed in REVIEW:
        config = MODEL_CLASSES[name].config_class.from_depth(layers, 32768, 2048)
        network = build_on_meta(MODEL_CLASSES[name], config)
        kind = "zero2" if count > 1 else "replicated"
        ours = memory(network, sequences, 2, count, parallel=kind)
        number = 2 * sequences * 2048 * config.width * layers  # bytes of one for all layers
        fewer = (KEPT["GPT"].compiled.width - REVIEW_NUMBERS) * number
        as_theirs = ours._replace(activations=ours.activations - fewer).total
        yield [
            f"{name}, depth {layers}, {count} GPUs, {sequences} sequences",
            f"{reviewed:g}",
            f"{ours.total / 1e9:.1f}",
            f"{as_theirs / 1e9:.1f}",
            f"{100 * (as_theirs / 1e9 / reviewed - 1):+.0f} %",
        ]


def documented_rows():
    """Held by one of six GPUs: 1.879 B parameters, in GiB, as documented and as ours."""
    network = build_on_meta(GPT, GPTConfig.from_depth(32, 65536, 2048))
    documented = {"replicated": "28.0", "zero2": "14.8", "fsdp": "3.7 + 0.9"}
    for kind, size in documented.items():
        ours = memory(network, 1, 2, 6, parallel=kind, checkpoint_activations=True)
        for_a_while = ""
        if kind == "fsdp":
            block = sum(p.numel() for p in network.blocks[0].parameters())
            for_a_while = f" + {(ours.gathered + 8 * block) / 2**30:.1f}"
        yield [kind, size, f"{ours.held / 2**30:.1f}{for_a_while}"]


def print_forecasts(settings):
    """The tables of docs/planning.md."""
    head = ["GPUs", "depth at 32,768", "hours", "depth at 65,536", "hours"]
    print(table(head, list(depth_rows(settings))) + "\n")
    head = ["GPUs", "depth", "layout", "sequences x passes", "parameters", "gradients", "optimizer",
            "activations", "loss", "GB in all", "tokens/s", "hours"]
    for name in ("gpt", "lookup"):
        print(f"`--model={name}`\n")
        print(table(head, list(forecast_rows(settings, name))) + "\n")
    head = ["", "review, GB", "here, GB", "here, with 12 numbers a layer", "difference"]
    print(table(head, list(review_rows())) + "\n")
    print(table(["layout", "documented, GiB", "here, GiB"], list(documented_rows())) + "\n")


if __name__ == "__main__":
    started = time.perf_counter()
    settings = configure(globals())
    require(settings, 1, "depth", "vocab_size", "max_seq_len", "total_batch_size",
            "device_batch_size", "keep")
    require(settings, 1e-3, "link_gb_per_second", "price_per_gpu_hour")
    check_recipe(fp8)
    if forecasts:
        print_forecasts(settings)
        fields = {}
    else:
        fields = plan_one(settings)
    finish_stage("plan", time.perf_counter() - started, settings, **fields)
