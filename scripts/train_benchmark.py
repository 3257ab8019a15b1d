"""
Training speed of one device, beside a training step that no one here wrote.

    python -m scripts.train_benchmark
    python -m scripts.train_benchmark --depth=6 --repeats=3

The other one is transformers' NanoChatForCausalLM, compiled whole, with torch's fused AdamW: where it is installed (dev extra) both run
in turn, each in a process of its own, with the same shape, dtype, threads and malloc settings. (Ours does more in its
step: it has lookups that the documented model lacks, and Muon.) Random tokens; a loader would add a few per mille.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import torch

from nanochat.common import UserError, compute_init, print0
from nanochat.metrics import finish_stage
from nanochat.configurator import configure
from nanochat.gpt import GPT, GPTConfig, SoftcapCrossEntropy
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.parallel import Layout, accumulate_gradients, prepare

# settings
depth = 4                # layers; width is 64 x depth
vocab_size = 32768
max_seq_len = 512        # context in tokens
device_batch_size = 32   # sequences a step
steps = 12               # of each process; the first three, which compile, do not count
repeats = 3              # processes of each side
device_type = ""         # cuda, mps or cpu; empty: cuda where there is one, else cpu
dtype = ""               # float32 or bfloat16; empty: what the hardware is good at
compile = True           # compile both
side = ""                # ours or theirs: measure this one alone, in this process
settings = configure(globals())


def our_step(config, device, compute_dtype):
    model = GPT(config).to(device)
    model.init_weights()
    model.compute_dtype = compute_dtype
    prepare(model, compile)
    optimizers = model.train().setup_optimizers()
    layout = Layout(optimizers)

    def step(ids):
        loss, _ = accumulate_gradients(model, [(ids[:, :-1], ids[:, 1:])], 1 / ids[:, 1:].numel(), device_batch_size, layout)
        for optimizer in optimizers:
            optimizer.step()
        layout.gather()
        layout.zero_grad()
        return loss
    return step


def their_step(config, device, compute_dtype):
    from transformers import NanoChatConfig, NanoChatForCausalLM
    model = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=4 * config.width, num_hidden_layers=depth,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, max_position_embeddings=max_seq_len,
        bos_token_id=0, eos_token_id=1, pad_token_id=2)).to(device, compute_dtype).train()
    compiled, optimizer = torch.compile(model, disable=not compile), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(ids):
        inputs = ids[:, :-1]
        loss = compiled(input_ids=inputs, labels=inputs, use_cache=False).loss  # it shifts the labels itself
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step


def measure(make_step):
    """Median tokens per second of the steady steps."""
    compute = compute_init(device_type, dtype)
    config = GPTConfig.from_depth(depth, vocab_size, max_seq_len)
    step, seconds = make_step(config, compute.device, compute.dtype), []
    for i in range(steps):
        ids = torch.randint(3, vocab_size, (device_batch_size, max_seq_len + 1), device=compute.device)
        begin = time.perf_counter()
        step(ids).item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
        print(f"  {side} step {i + 1}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return device_batch_size * max_seq_len / statistics.median(seconds[3:])


def measure_own_shapes(config, device, compute_dtype):
    """FLOP/s of the model's own matmuls, one after another: what a step that did nothing else would reach."""
    C, rows = config.width, min(4096, device_batch_size * max_seq_len)
    shapes = [(C, C)] * 4 * depth + [(C, 4 * C), (4 * C, C)] * depth + [(C, config.vocab_size)]
    rates = {(k, n): measure_matmul_flops(device, compute_dtype, 0.5, (rows if n <= 4 * C else max(128, SoftcapCrossEntropy.CHUNK // n), k, n)) for k, n in set(shapes)}
    return sum(k * n for k, n in shapes) / sum(k * n / rates[k, n] for k, n in shapes)


if steps < 4 or repeats < 1 or side not in ("", "ours", "theirs"):
    raise UserError(f"steps={steps}, repeats={repeats}, side={side}: at least 4 steps and one repeat are needed, and a side is ours or theirs")
started = time.perf_counter()
raise_malloc_thresholds()
if side:
    print(json.dumps(measure({"ours": our_step, "theirs": their_step}[side])))
    raise SystemExit

sides = ["ours", "theirs"]
if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("transformers.models.nanochat")):
    print0("without transformers' NanoChatForCausalLM, which is not installed (pip install 'transformers>=5'): ours alone")
    sides.remove("theirs")
compute = compute_init(device_type, dtype)
config = GPTConfig.from_depth(depth, vocab_size, max_seq_len)
own_rate = measure_own_shapes(config, compute.device, compute.dtype)
print0(f"depth {depth}, width {config.width}, vocabulary {vocab_size}, context {max_seq_len}, {device_batch_size} sequences, "
       f"{str(compute.dtype)[6:]}: its matmuls run at {own_rate / 1e9:,.0f} GFLOP/s")
speeds = {name: [] for name in sides}
for i in range(repeats):  # in turn, so that a slow minute hits both
    for name in sides:
        arguments = [f"--{key}={value}" for key, value in {**settings, "side": name}.items() if value != ""]
        run = subprocess.run([sys.executable, "-m", "scripts.train_benchmark", *arguments], stdout=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"measuring {name} failed")
        speeds[name].append(json.loads(run.stdout.splitlines()[-1]))
        print0(f"  {name:<8}{speeds[name][-1]:10,.0f} tokens/s")
speed = {name: statistics.median(values) for name, values in speeds.items()}
with torch.device("meta"):
    model = GPT(config)
with_attention, of_weights = model.flops_per_token(max_seq_len), 6 * model.matmul_parameters()
share = speed["ours"] * of_weights / own_rate
print0(f"ours: {speed['ours'] * of_weights / 1e9:,.0f} GFLOP/s by weights, {speed['ours'] * with_attention / 1e9:,.0f} with attention, "
       f"{100 * share:.0f} % of its own matmuls' rate")
ratio = speed["ours"] / speed["theirs"] if "theirs" in speed else None
if ratio:
    print0(f"{ratio:.2f} x transformers' class")
finish_stage("train_benchmark", time.perf_counter() - started, settings, tokens_per_second=speed, all_tokens_per_second=speeds, ratio=ratio,
             flops_per_second=speed["ours"] * with_attention, flops_per_second_of_weights=speed["ours"] * of_weights,
             matmul_flops_per_second=own_rate, share_of_matmul_rate=share)
