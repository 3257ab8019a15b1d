"""The only file that knows which attention kernel runs.

Training runs torch's fused scaled-dot-product attention (SDPA), causal, without a dense mask.
Prefill and decode read and write a KV cache (kv_cache.py). Every slot of the cache stands at a
length of its own, so the mask is made from positions. Nothing here synchronises with the device:
all that the host has to know is in the CacheWindow.

SDPA has several kernels on a GPU, some of them many times faster than others, and it falls back to
the slowest without a word. So choose_kernel() puts them in an order for the device, runs a small
case of the best one against the maths kernel, and drops one that errs. The order is set once for
the process: the compiled blocks take it as it is, with no context manager in their graphs. On a CPU
and on MPS torch has one fused path, and nothing is chosen.

Shapes: B sequences, T tokens, H query heads, G key/value heads with G dividing H (grouped-query
attention, arXiv 2305.13245), D head dimension, S = window.end cached tokens.
"""
import contextlib
import functools
import importlib.util
import re
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import config as compiler_config
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.fast_linear import materialize

BLOCK_QUERIES = 64  # whose scores of all heads stay in a CPU's cache


class InUse:
    """What use_kernels() has set for this process; on a CPU and on MPS it stays as it is."""
    grouped = False   # whether causal_attention hands grouped heads to the kernel as they are
    context = None    # of sdpa_kernel, entered
    tag_before = ""   # what the keys of compiled code began with


IN_USE = InUse()


def causal_attention(q, k, v):
    """q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D). Token t attends to those up to t."""
    half_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if half_on_cpu and not torch.is_grad_enabled():
        return attend_in_blocks(q, k, v)
    return attend(q, k, v, IN_USE.grouped)


def attend_in_blocks(q, k, v):
    """causal_attention by plain matmuls, BLOCK_QUERIES queries of all heads at a time.

    For bfloat16 on a CPU without AMX, where torch's fused kernel multiplies no faster than in
    float32: 1.7 to 2 times as fast on a Zen 4 for 256 and 512 tokens (torch 2.15). Without a
    gradient, for which the fused kernel keeps less.
    """
    B, T, H, D = q.shape
    q = (q * D ** -0.5).transpose(1, 2).flatten(0, 1)  # B * H, T, D
    k = repeat_heads(k.transpose(1, 2), H).flatten(0, 1).transpose(1, 2).contiguous()
    v = repeat_heads(v.transpose(1, 2), H).flatten(0, 1)
    later = q.new_full((BLOCK_QUERIES, BLOCK_QUERIES), -torch.inf).triu(1)
    y = torch.empty_like(q)
    for start in range(0, T, BLOCK_QUERIES):
        end = min(T, start + BLOCK_QUERIES)
        scores = q[:, start:end] @ k[:, :, :end]  # B * H, block, end
        scores[:, :, start:] += later[:end - start, :end - start]
        y[:, start:end] = scores.softmax(-1) @ v[:, :end]
    return y.view(B, H, T, D).transpose(1, 2)


def attend(q, k, v, grouped):
    """causal_attention; grouped: whether the kernel takes fewer key/value heads as they are."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B, H or G, T, D
    grouped = grouped and k.size(1) < q.size(1)
    if not grouped:
        k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def windowed_attention(q, k, v, window=None):
    """causal_attention in which a token attends to `window` tokens up to itself; None: to all.

    For training. In blocks of `window` queries, each attends to its own and the block before: a
    dense mask would compute all T x T scores. q (B, T, H, D), k and v (B, T, G, D).
    """
    T, H = q.size(1), q.size(2)
    if window is None or window >= T:
        return causal_attention(q, k, v)
    blocks = -(-T // window)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, blocks * window - T)) for x in (q, k, v))

    # 1. the first block has none before it
    first = causal_attention(q[:, :window], k[:, :window], v[:, :window])

    # 2. the other blocks as sequences of their own, (B * (blocks - 1), H or G, tokens, D)
    queries = q[:, window:].unflatten(1, (blocks - 1, window)).flatten(0, 1).transpose(1, 2)
    keys, values = (
        x.unfold(1, 2 * window, window).flatten(0, 1).transpose(-1, -2) for x in (k, v))
    keys, values = repeat_heads(keys, H), repeat_heads(values, H)
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)
    visible = (key <= query) & (key > query - window)  # window, 2 * window
    others = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    others = others.transpose(1, 2).unflatten(0, (-1, blocks - 1)).flatten(1, 2)
    return torch.cat((first, others), 1)[:, :T]


def attention_up_to(q, k, v, at):
    """q (B, n, H, D) of the positions `at` (B, n), k and v (B, T, G, D) -> (B, n, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attend_up_to(q, k, v, at).transpose(1, 2)


def masked_attention(q, k, v, visible):
    """q (B, n, H, D), k and v (B, T, G, D) -> (B, n, H, D).

    visible (B, 1, n, T) bool: which keys each query attends to, in either direction.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def attend_up_to(q, k, v, positions):
    """q (B, H, n, D), k and v (B, G, S, D), positions (B, n): each query attends to the keys up to
    its position. Returns (B, H, n, D)."""
    k, v = repeat_heads(k, q.size(1)).to(q.dtype), repeat_heads(v, q.size(1)).to(q.dtype)
    keys = torch.arange(k.size(2), device=q.device)
    visible = keys <= positions[:, None, :, None]  # B, 1, n, S
    with without_cudnn(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def cached_attention(q, k, v, layer_cache, window, at=None):
    """Attention of new tokens to themselves and to the KV cache of their slots.

    q (B, T, H, D), k and v (B, T, G, D): T new tokens in each of B slots. layer_cache: this layer's
    LayerCache, into which k and v are written. window: the CacheWindow that says where. Returns
    (B, T, H, D) in the dtype of q, whatever the dtype of the cache.
    at (B, n): which of the new tokens the queries are of, q (B, n, H, D); None: all of them.
    """
    # 1. write the new keys and values at their positions
    layer_cache.k[window.index, :, window.positions] = k.to(layer_cache.k.dtype)
    layer_cache.v[window.index, :, window.positions] = v.to(layer_cache.v.dtype)

    # Into empty slots: nothing but the new tokens to attend to, and no mask to make. (On a GPU the
    # mask costs little, and the lengths of prefills stay away from cuDNN.)
    is_whole = at is None and window.end == k.size(1)
    if is_whole and q.device.type == "cpu" and layer_cache.k.dtype == q.dtype:
        return causal_attention(q, k, v)

    # 2. read what the slots hold, up to the longest of them
    q = q.transpose(1, 2)  # B, H, T, D
    k = layer_cache.k[window.slots, :, :window.end]  # B, G, S, D
    v = layer_cache.v[window.slots, :, :window.end]

    # 3. attend, each token to the positions up to its own
    positions = window.positions if at is None else window.positions.gather(1, at)
    if q.size(2) == 1 and torch.compiler.is_dynamo_compiling():
        return attend_by_sums(q, k, v, positions).transpose(1, 2)
    return attend_up_to(q, k, v, positions).transpose(1, 2)


def attend_by_sums(q, k, v, positions):
    """attend_up_to for one query of each sequence, (B, H, 1, D), as sums that the compiler fuses.

    SDPA with a single query is slow on a CPU, and a call that nothing can be fused with
    (fast_linear.py). positions (B, 1).
    """
    B, H, _, D = q.shape
    G = k.size(1)

    # 1. scores (B, G, H / G, S): key/value head g serves H / G query heads
    q = materialize(q.float() * D ** -0.5).view(B, G, H // G, 1, D)
    scores = (q * k[:, :, None].float()).sum(-1)
    keys = torch.arange(k.size(2), device=q.device)
    visible = keys <= positions[:, None, None]      # B, 1, 1, S
    scores = scores.masked_fill(~visible, -torch.inf)

    # 2. the values, weighted
    probs = materialize(scores.softmax(-1))
    y = (probs[..., None] * v[:, :, None].float()).sum(3)
    return y.view(B, H, 1, D).to(v.dtype)


@contextlib.contextmanager
def without_cudnn(device):
    """A context without cuDNN's kernel on a GPU.

    cuDNN builds a plan for every shape that it has not seen (pytorch, native/cudnn/MHA.cpp). In
    decoding each token has another S.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def repeat_heads(x, heads):
    """(B, G, T, D) -> (B, heads, T, D): each key/value head serves heads / G query heads."""
    if x.size(1) == heads:
        return x
    return x.repeat_interleave(heads // x.size(1), dim=1)


# ------------------------------------------------------------------------------------------------
# which kernel

class Kernel(NamedTuple):
    """A kernel of SDPA."""
    backend: SDPBackend
    node: str        # begins the name of its node in autograd's graph, by which it is recognised
    activated: str   # the implementation that replaces torch's own flash kernel, or ""


KERNELS = {
    "cudnn": Kernel(SDPBackend.CUDNN_ATTENTION, "ScaledDotProductCudnnAttention", ""),
    "fa3": Kernel(SDPBackend.FLASH_ATTENTION, "ScaledDotProductFlashAttention", "FA3"),
    "flash": Kernel(SDPBackend.FLASH_ATTENTION, "ScaledDotProductFlashAttention", ""),
    "efficient": Kernel(
        SDPBackend.EFFICIENT_ATTENTION, "ScaledDotProductEfficientAttention", ""),
    "math": Kernel(SDPBackend.MATH, "", ""),
}
# The first version of cuDNN whose attention is faster than FlashAttention-2 on Hopper and Blackwell
# (pytorch, sdp_utils.cpp; transformers PR 48163: 1.7 to 2.3 times on an H100, slower on an A100)
CUDNN_VERSION = 91501
# What a kernel raises that cannot run: torch's own a RuntimeError; one that was built for another
# torch does not import, lacks a function, or wants other arguments
KERNEL_ERRORS = (
    RuntimeError,
    ValueError,
    ImportError,
    OSError,
    AttributeError,
    TypeError,
)
# How far a kernel may be from the maths kernel in float32, relative to the norm: several times the
# rounding of the dtype (a GPU multiplies float32 as TF32).
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
IS_NO_REASON = r"not used because|runtime disabled|^\s*$"  # among torch's warnings
MATHS_IS_SLOW = "many times slower than a fused kernel, and memory for T x T scores"


class Gpu(NamedTuple):
    """What the order of kernels follows from."""
    hip: bool           # whether torch is a ROCm build: never told by the capability
    capability: tuple   # of CUDA, (9, 0) for an H100; on ROCm the gfx number
    cudnn: int          # version, 91501 for 9.15.1; 0 where there is none
    has_fa3: bool       # whether FlashAttention-3 can be imported and torch can activate it


def kernel_order(gpu, dtype=torch.bfloat16):
    """Names of KERNELS for a Gpu and a dtype, the best first; "math" always works and is the last.

    >>> kernel_order(Gpu(False, (8, 9), 92600, False))[0]
    'flash'
    """
    too_old = not gpu.hip and gpu.capability < (8, 0)
    if dtype == torch.float32 or too_old:
        return ["efficient", "math"]  # the others are of half precision, and of Ampere and later
    if gpu.hip:
        return ["flash", "efficient", "math"]  # AOTriton's or CK's; cuDNN is NVIDIA's
    order = ["flash", "efficient", "cudnn", "math"]
    if gpu.capability in ((9, 0), (10, 0)) and gpu.cudnn >= CUDNN_VERSION:
        order = ["cudnn", "flash", "efficient", "math"]
    if gpu.capability == (9, 0) and gpu.has_fa3:
        order.insert(0, "fa3")
    return order


def this_gpu(device):
    """The Gpu of a CUDA or ROCm device."""
    return Gpu(
        hip=torch.version.hip is not None,
        capability=torch.cuda.get_device_capability(device),
        cudnn=torch.backends.cudnn.version() or 0,
        has_fa3=can_activate("FA3") and is_installed("flash_attn_interface"),
    )


def is_installed(module):
    """Whether a module can be found; whether it can be imported, the probe finds out."""
    return importlib.util.find_spec(module) is not None


def can_activate(implementation):
    """Whether this torch can let it replace its flash kernel. Torch 2.10 knows "FA4" alone."""
    known = getattr(torch_attention, "list_flash_attention_impls", list)
    return implementation in known()


class Choice(NamedTuple):
    """The kernel that runs, and those that were dropped before it."""
    name: str
    dropped: dict    # {name: why}

    def describe(self):
        """One line, which gives the reasons where better kernels were dropped."""
        slow = f" ({MATHS_IS_SLOW})" if self.name == "math" and self.dropped else ""
        dropped = "".join(f"; not {name}: {why}" for name, why in self.dropped.items())
        return f"{self.name}{slow}{dropped}"


def choose_kernel(device, dtype):
    """Make causal_attention run the best kernel that is right on this device, for good.

    Returns the Choice. On a CPU and on MPS that is torch's own, and nothing is set.
    """
    if device.type != "cuda":
        return Choice(running_kernel(device, dtype), {})
    order = kernel_order(this_gpu(device), dtype)
    choice = first_that_works(order, functools.partial(kernel_problem, device, dtype))
    grouped = not kernel_problem(device, dtype, choice.name, grouped=True)
    use_kernels([name for name in order if name not in choice.dropped], grouped)
    return choice


def first_that_works(order, problem_of):
    """The Choice among names, the best first. problem_of(name): why it is not to be used, or ""."""
    dropped = {}
    for name in order[:-1]:
        problem = problem_of(name)
        if not problem:
            return Choice(name, dropped)
        dropped[name] = problem
    return Choice(order[-1], dropped)


def use_kernels(names, grouped=False):
    """Set the order of SDPA's kernels for the process, the best first; others are not used.

    A later kernel takes over where an earlier one cannot (a prefill has a mask).

    Torch keeps compiled code on disk under a key that does not tell the order (seen in 2.15): a run
    would take the kernel of the run that compiled first. So the order becomes a part of the key.
    """
    use_torchs_own()
    activate(KERNELS[names[0]].activated)
    backends = list(dict.fromkeys(KERNELS[name].backend for name in names))
    IN_USE.context = sdpa_kernel(backends, set_priority=True)
    IN_USE.context.__enter__()
    IN_USE.grouped = grouped
    IN_USE.tag_before = compiler_config.cache_key_tag
    compiler_config.cache_key_tag = f"{IN_USE.tag_before} attention={','.join(names)}"


def use_torchs_own():
    """Undo use_kernels()."""
    if IN_USE.context is not None:
        IN_USE.context.__exit__(None, None, None)
        IN_USE.context = None
        compiler_config.cache_key_tag = IN_USE.tag_before
    IN_USE.grouped = False
    activate("")


def activate(implementation):
    """Let another implementation, such as "FA3", replace torch's flash kernel; "" restores it."""
    if implementation:
        torch_attention.activate_flash_attention_impl(implementation)
    elif activated():
        torch_attention.restore_flash_attention_impl()


def activated():
    """The implementation that replaces torch's flash kernel, or None. Older torches have none."""
    current = getattr(torch_attention, "current_flash_attention_impl", None)
    return current and current()


# ------------------------------------------------------------------------------------------------
# the probe: one small causal case

class Case(NamedTuple):
    """Inputs of the probe, and the gradient of its result."""
    q: torch.Tensor   # (B, T, H, D), and so are the others but for their heads
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor


def small_case(device, dtype, heads=4, kv_heads=2, T=256, D=128):
    """A Case of seeded noise, the same on every device: grouped heads, as the model calls it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, T, heads, D), (2, T, kv_heads, D), (2, T, kv_heads, D), (2, T, heads, D)]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    return Case(*(x.to(device=device, dtype=dtype) for x in noise))


def run_case(case, grouped):
    """Attention of a Case, forward and backward; grouped as in attend().

    Returns ((y, dq, dk, dv) in float32, the name of the kernel that ran).
    """
    inputs = [x.detach().clone().requires_grad_() for x in case[:3]]
    y = attend(*inputs, grouped)
    gradients = torch.autograd.grad(y, inputs, case.dy)
    return [x.detach().float() for x in (y, *gradients)], kernel_of(y)


def kernel_of(y):
    """The name of the kernel that computed y, from its nodes in autograd's graph: "math" where no
    fused one is among them. Of a CPU and of MPS, torch's name of the node."""
    nodes = [y.grad_fn]
    for _ in range(8):  # transpose and the unpadding stand between
        names = [node.name() for node in nodes if node is not None]
        for name in names:
            if name.startswith("ScaledDotProduct"):
                return fused_name(name)
        nodes = [parent for node in nodes if node for parent, _ in node.next_functions]
    return "math"


def fused_name(node):
    """The name in KERNELS of a node, or the node's own name without its end.

    >>> fused_name("ScaledDotProductCudnnAttentionBackward0")
    'cudnn'
    >>> fused_name("ScaledDotProductFlashAttentionForCpuBackward0")
    'FlashAttentionForCpu'
    """
    name = node.partition("Backward")[0]
    for kernel_name, kernel in KERNELS.items():
        if name == kernel.node and not kernel.activated:
            return kernel_name
    return name.removeprefix("ScaledDotProduct")


def running_kernel(device, dtype):
    """The name of the kernel that causal_attention really runs as things are set."""
    _, name = run_case(small_case(device, dtype), IN_USE.grouped)
    return activated().lower() if name == "flash" and activated() else name


def kernel_problem(device, dtype, name, grouped=False):
    """Why a kernel is not to be used: it cannot run this, fails, or differs from the maths kernel.

    "" where it is right. The maths kernel computes in float32. grouped as in attend().
    """
    kernel = KERNELS[name]
    case = small_case(device, dtype)
    exact = Case(*(x.float() for x in case))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            activate(kernel.activated)
            with sdpa_kernel([kernel.backend]):
                found, ran = run_case(case, grouped)
        except KERNEL_ERRORS as error:
            return reason_not_to_run(str(error), [str(warning.message) for warning in said])
    if KERNELS.get(ran, kernel).backend != kernel.backend:
        return f"torch ran {ran} in its place"
    with sdpa_kernel([SDPBackend.MATH]):
        wanted, _ = run_case(exact, False)
    return difference(found, wanted, TOLERANCES[dtype])


def difference(found, wanted, tolerance):
    """How the result and the gradients differ beyond a tolerance of their norms, or ""."""
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, wanted):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= tolerance:  # true of a NaN as well
            return f"{name} is off by {error:.2g} of its norm, at most {tolerance:g}"
    return ""


def reason_not_to_run(error, said):
    """One line of at most 120 characters: the reason that torch's warnings give, else the error.

    said: the warnings. Torch goes through all kernels in them, those that are switched off as well.
    """
    reasons = [warning.partition(" (Triggered")[0] for warning in said]
    telling = [reason for reason in reasons if not re.search(IS_NO_REASON, reason)]
    words = " ".join((telling or [error])[0].split())
    return words[:120] or "no reason given"
