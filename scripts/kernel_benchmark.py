"""The two kernels that a GPU has a choice of: attention, and the cross-entropy of the vocabulary.

    python -m scripts.kernel_benchmark
    python -m scripts.kernel_benchmark --depth=20 --device_batch_size=32

Attention: forward and backward of one layer by each kernel that can run here, with the TFLOP/s of
causal attention (half of the square), and which of them training takes. Cross-entropy: forward
and backward of the loss, its arithmetic compiled and not, beside its two matrix products alone.
The last line is JSON.
"""
import time

import torch
from torch.nn.attention import sdpa_kernel

from nanochat.attention import KERNELS, activate, attend, choose_kernel, kernel_problem
from nanochat.benchmark import attempt, measure_calls
from nanochat.common import compute_init
from nanochat.configurator import configure, require
from nanochat.loss import softcap_cross_entropy
from nanochat.metrics import finish_stage

# settings
depth: int = None            # whose heads and width: 64 x depth, heads of 128. None: 20, 4 on a CPU
max_seq_len: int = None      # context in tokens. None: 2048 on a GPU, else 256
device_batch_size: int = None  # sequences. None: 16 on a GPU, else 4
vocab_size: int = None       # None: 65536 on a GPU, else 4096
seconds = 1.0                # for each measurement
compile = True               # measure the compiled loss as well
device_type = ""             # cuda, mps or cpu; empty: what training would choose
dtype = ""                   # float32 or bfloat16; empty: what the hardware is good at

DEFAULTS = {  # depth, max_seq_len, device_batch_size, vocab_size
    "cuda": (20, 2048, 16, 65_536),
    "cpu": (4, 256, 4, 4_096),
}
HEAD_DIM = 128
SOFTCAP = 15.0


def time_attention(kernel, inputs, dy, device):
    """Seconds of a forward and backward pass by one kernel."""
    def call():
        y = attend(*inputs, False)
        torch.autograd.grad(y, inputs, dy)

    activate(kernel.activated)
    with sdpa_kernel([kernel.backend]):
        return measure_calls(call, device, seconds).median


def measure_attention(compute, shape):
    """{kernel: milliseconds, or why it does not run here}; prints a line for each.

    shape: (B, T, H, D).
    """
    device = compute.device
    inputs = [
        torch.randn(shape, device=device, dtype=compute.dtype).requires_grad_() for _ in range(3)]
    dy = torch.randn(shape, device=device, dtype=compute.dtype)
    B, T, H, D = shape
    # forward: 2 products of 2 B H T^2 D; backward: 5; of causal attention half of each
    flops = 7 * 2 * B * H * T * T * D / 2
    found = {}
    for name, kernel in KERNELS.items():
        reason = kernel_problem(device, compute.dtype, name)
        if reason:
            found[name] = reason
            print(f"  attention {name:<10} not here: {reason}", flush=True)
            continue
        taken, out_of_memory = attempt(time_attention, kernel, inputs, dy, device)
        if out_of_memory:
            found[name] = "out of memory"
            print(f"  attention {name:<10} out of memory", flush=True)
            continue
        found[name] = 1e3 * taken
        print(f"  attention {name:<10} {1e3 * taken:9.3f} ms {flops / taken / 1e12:8.2f} TFLOP/s",
              flush=True)
    activate("")
    return found


def measure_loss(compute, tokens, width, vocabulary):
    """{"eager", "compiled", "products": milliseconds} of the loss; prints a line for each."""
    device, kind = compute.device, compute.dtype
    x = torch.randn(tokens, width, device=device, dtype=kind).requires_grad_()
    head = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    weights = torch.ones(tokens, device=device)

    def loss(compiled):
        total = softcap_cross_entropy(x, head, targets, weights, SOFTCAP, compiled)
        torch.autograd.grad(total, (x, head))

    part = x.detach()[:max(1, min(tokens, 2**26 // vocabulary))]
    w = head.detach().to(kind)
    dz = torch.randn(len(part), vocabulary, device=device, dtype=kind)

    def products():
        part @ w.T, dz @ w, dz.T @ part

    measured = {"eager": measure_calls(lambda: loss(False), device, seconds).median}
    if compile:
        measured["compiled"] = measure_calls(lambda: loss(True), device, seconds).median
    one_chunk = measure_calls(products, device, seconds).median
    measured["products"] = one_chunk * tokens / len(part)
    for name, taken in measured.items():
        print(f"  cross-entropy {name:<9} {1e3 * taken:9.2f} ms for {tokens:,} tokens", flush=True)
    return {name: 1e3 * taken for name, taken in measured.items()}


def main(settings):
    require(settings, 1, "depth", "max_seq_len", "device_batch_size", "vocab_size")
    started = time.perf_counter()
    compute = compute_init(device_type, dtype)
    usual = DEFAULTS.get(compute.device.type, DEFAULTS["cpu"])
    given = depth, max_seq_len, device_batch_size, vocab_size
    layers, context, sequences, vocabulary = (
        theirs if ours is None else ours for ours, theirs in zip(given, usual))
    width = 64 * layers
    heads = max(1, width // HEAD_DIM)
    dtype_name = str(compute.dtype).removeprefix("torch.")
    print(f"{compute.device.type}, {dtype_name}: {sequences} sequences of {context} tokens, "
          f"{heads} heads of {HEAD_DIM}, width {width}, vocabulary {vocabulary:,}", flush=True)

    attention = measure_attention(compute, (sequences, context, heads, HEAD_DIM))
    choice = choose_kernel(compute.device, compute.dtype)
    print(f"training takes: {choice.describe()}")
    loss = measure_loss(compute, sequences * context, width, vocabulary)
    finish_stage(
        "kernel_benchmark",
        time.perf_counter() - started,
        settings,
        dtype=dtype_name,
        attention_ms=attention,
        kernel=choice.name,
        dropped=choice.dropped,
        loss_ms=loss,
        tokens=sequences * context,
    )


if __name__ == "__main__":
    main(configure(globals()))
