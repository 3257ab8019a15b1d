"""Training speed of one device, beside a training step that no one here wrote.

    python -m scripts.train_benchmark
    python -m scripts.train_benchmark --model=lookup --depth=6 --repeats=3

The other one is transformers' NanoChatForCausalLM, the same model, compiled whole, with torch's
fused AdamW. Where it is installed (dev extra) both run in turn, each in a process of its own, with
the same shape, dtype, threads and malloc settings. (Ours does more in its step: it has Muon, and
with --model=lookup also tables.) Tokens are random; a loader would add a few per mille.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import torch

from nanochat.attention import choose_kernel
from nanochat.common import UserError, compute_init, print0
from nanochat.configurator import configure
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.loss import CHUNK_LOGITS, CHUNK_LOGITS_DEFAULT, MIN_CHUNK_TOKENS
from nanochat.metrics import finish_stage
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.memory import build_on_meta
from nanochat.variants import MODEL_CLASSES, TRAINABLE

# settings
model = "gpt"            # ours: gpt, lookup, portable, ... (nanochat/variants)
depth = 4                # layers; width is 64 x depth
vocab_size = 32768
max_seq_len = 512        # context in tokens
device_batch_size = 32   # sequences a step
steps = 12               # of each process; the first three, which compile, do not count
repeats = 3              # processes of each side
device_type = ""         # cuda, mps or cpu; empty: the best one here
dtype = ""               # float32 or bfloat16; empty: what the hardware is good at
compile = True           # compile both
side = ""                # ours or theirs: measure this one alone, in this process
settings = configure(globals())

WARM_STEPS = 3


def our_step(config, device, compute_dtype):
    """A function ids (B, T + 1) -> loss that takes one training step of ours."""
    network = MODEL_CLASSES[model](config).to(device)
    network.init_weights()
    network.compute_dtype = compute_dtype
    choose_kernel(device, compute_dtype)
    prepare(network.train(), compile)
    layout = Layout(network, network.setup_optimizers())

    def step(ids):
        inputs, targets = ids[:, :-1], ids[:, 1:]
        loss, _ = accumulate_gradients(
            network, [(inputs, targets)], 1 / targets.numel(), device_batch_size, layout)
        loss, grad_norm = layout.reduce(loss)
        layout.apply(0.0, grad_norm)
        layout.zero_grad()
        return torch.tensor(loss)

    return step


def their_step(config, device, compute_dtype):
    """The same of transformers' class."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    theirs = NanoChatConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=max_seq_len,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    network = NanoChatForCausalLM(theirs).to(device, compute_dtype).train()
    compiled = torch.compile(network, disable=not compile)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step(ids):
        inputs = ids[:, :-1]
        loss = compiled(input_ids=inputs, labels=inputs, use_cache=False).loss  # it shifts them
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def make_config():
    return MODEL_CLASSES[model].config_class.from_depth(depth, vocab_size, max_seq_len)


def measure(make_step):
    """Median tokens per second of the steps after the first ones."""
    compute = compute_init(device_type, dtype)
    step = make_step(make_config(), compute.device, compute.dtype)
    shape = device_batch_size, max_seq_len + 1
    seconds = []
    for number in range(1, steps + 1):
        ids = torch.randint(3, vocab_size, shape, device=compute.device)
        begin = time.perf_counter()
        step(ids).item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
        print(f"  {side} step {number}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return device_batch_size * max_seq_len / statistics.median(seconds[WARM_STEPS:])


def measure_own_shapes(config, device, compute_dtype):
    """FLOP/s of the model's own matmuls, one after another: what a step that did nothing else
    would reach."""
    C, V = config.width, config.vocab_size
    tokens = min(4096, device_batch_size * max_seq_len)
    chunk_logits = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_DEFAULT)
    shapes = {
        # (tokens, k, n): how often
        (tokens, C, C): 4 * depth,
        (tokens, C, 4 * C): depth,
        (tokens, 4 * C, C): depth,
        (max(MIN_CHUNK_TOKENS, chunk_logits // V), C, V): 1,
    }
    multiplications, seconds = 0, 0.0
    for (m, k, n), times in shapes.items():
        flops = measure_matmul_flops(device, compute_dtype, 0.5, (m, k, n))
        multiplications += times * k * n
        seconds += times * k * n / flops
    return multiplications / seconds


def run_side(name):
    """Tokens per second of one side, measured in a process of its own."""
    chosen = {**settings, "side": name}
    arguments = [f"--{key}={value}" for key, value in chosen.items() if value != ""]
    command = [sys.executable, "-m", "scripts.train_benchmark", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} failed")
    return json.loads(done.stdout.splitlines()[-1])


# ---- one side, in this process
known_side = side in ("", "ours", "theirs")
if steps <= WARM_STEPS or repeats < 1 or not known_side:
    raise UserError(
        f"steps={steps}, repeats={repeats}, side={side}: at least 4 steps and one repeat are "
        "needed, and a side is ours or theirs")
if model not in TRAINABLE:
    raise UserError(f"model={model} does not exist: choose from {', '.join(TRAINABLE)}")
started = time.perf_counter()
raise_malloc_thresholds()
if side:
    print(json.dumps(measure({"ours": our_step, "theirs": their_step}[side])))
    raise SystemExit

# ---- both sides, in turn, so that a slow minute hits both
sides = ["ours", "theirs"]
installed = importlib.util.find_spec("transformers")
if not (installed and importlib.util.find_spec("transformers.models.nanochat")):
    print0("without transformers' NanoChatForCausalLM, which is not installed "
           "(pip install 'transformers>=5'): ours alone")
    sides.remove("theirs")
compute = compute_init(device_type, dtype)
config = make_config()
own_rate = measure_own_shapes(config, compute.device, compute.dtype)
dtype_name = str(compute.dtype).removeprefix("torch.")
print0(f"{model}, depth {depth}, width {config.width}, vocabulary {vocab_size}, context "
       f"{max_seq_len}, {device_batch_size} sequences, {dtype_name}: its matmuls run at "
       f"{own_rate / 1e9:,.0f} GFLOP/s")
speeds = {name: [] for name in sides}
for _ in range(repeats):
    for name in sides:
        speeds[name].append(run_side(name))
        print0(f"  {name:<8}{speeds[name][-1]:10,.0f} tokens/s")

# ---- the ratio
speed = {name: statistics.median(values) for name, values in speeds.items()}
network = build_on_meta(MODEL_CLASSES[model], config)
flops = speed["ours"] * network.flops_per_token(max_seq_len)
flops_of_weights = speed["ours"] * 6 * network.matmul_parameters()
share = flops_of_weights / own_rate
print0(f"ours: {flops_of_weights / 1e9:,.0f} GFLOP/s by weights, {flops / 1e9:,.0f} with "
       f"attention, {100 * share:.0f} % of its own matmuls' rate")
ratio = None
if "theirs" in speed:
    ratio = speed["ours"] / speed["theirs"]
    print0(f"{ratio:.2f} x transformers' class")
finish_stage(
    "train_benchmark",
    time.perf_counter() - started,
    settings,
    tokens_per_second=speed,
    all_tokens_per_second=speeds,
    ratio=ratio,
    flops_per_second=flops,
    flops_per_second_of_weights=flops_of_weights,
    matmul_flops_per_second=own_rate,
    share_of_matmul_rate=share,
)
