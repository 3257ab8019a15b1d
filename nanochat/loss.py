"""Cross-entropy of a large vocabulary, in chunks, with a weight for each token.

The logits of a whole batch are the largest tensor of a small model. Here a chunk of them is made,
gives its share of the loss and of both gradients at once, and is gone (the idea of Cut
Cross-Entropy, arXiv 2411.09009, and of Liger Kernel, arXiv 2410.10989). So the gradients are
computed in the forward pass; the backward pass only multiplies them.

What is done with the logits of one chunk is a pure function (`chunk_softcap`, and
`chunk_mixture` in variants/ngrams.py), compiled on a GPU together with the casts around it, so that
logits and gradient need to be in memory as bfloat16 only. tests/test_loss.py holds each to a
reference implementation in plain autograd.

Shapes: N tokens, n tokens of a chunk, C width, V vocabulary.
"""
import functools

import torch
import torch.nn.functional as F

# Logits in a chunk. On a CPU 4 MB, which stay in its cache; a GPU of CUDA or ROCm wants large
# matmuls and few additions to the head's gradient: 2048 tokens of a vocabulary of 65,536. MPS
# shares its memory with the system and computes eagerly, with three tensors of a chunk in float32:
# 200 MB.
CHUNK_LOGITS = {"cpu": 1 << 20, "mps": 1 << 24}
CHUNK_LOGITS_DEFAULT = 1 << 27
# Each chunk adds to the whole of the head's gradient, so that tiny ones would cost more than
# they save.
MIN_CHUNK_TOKENS = 128
LARGEST_SAFE_CAP = 60   # the sum of a vocabulary of exp(60) is a finite float32
# Columns of the logits are padded to a multiple of this: cuBLAS and hipBLASLt have fast products
# for rows of whole 16 bytes alone, which GPT-2's 50,257 columns are not.
COLUMN_MULTIPLE = {"cuda": 8}


def softcap(logits, cap):
    """cap * tanh(logits / cap): no logit leaves (-cap, cap) (Gemma 2, arXiv 2408.00118).

    A cap of 0 or None changes nothing.
    """
    if not cap:
        return logits
    return cap * torch.tanh(logits / cap)


def chunks(N, V, device):
    """Slices of N tokens, each of about CHUNK_LOGITS logits."""
    logits = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_DEFAULT)
    size = max(MIN_CHUNK_TOKENS, logits // V)
    return [slice(start, start + size) for start in range(0, N, size)]


def cross_entropy_and_gradient(z, targets, cap):
    """The arithmetic that every chunk shares. z: raw logits (n, V) float32, overwritten.

    With the capped logits z' = cap tanh(z / cap) and p = softmax(z'):
        d cross-entropy / dz = (p - onehot) * (1 - (z' / cap)^2)
    Returns (the cross-entropies (n,), that gradient (n, V)).
    """
    if cap:
        t = z.div_(cap).tanh_()
        z = t * cap
    label = targets[:, None]
    if torch.compiler.is_compiling() and cap and cap <= LARGEST_SAFE_CAP:
        # capped logits overflow no sum: without their maximum, one pass less over the chunk
        log_sum = z.exp().sum(-1, keepdim=True).log()
    else:
        log_sum = z.logsumexp(-1, keepdim=True)
    losses = (log_sum - z.gather(1, label))[:, 0]
    gradient = z.sub_(log_sum).exp_()
    if torch.compiler.is_compiling():
        # the same to the bit; a scatter would be a kernel of its own between two others, with the
        # gradient in memory as float32
        gradient = gradient - (torch.arange(z.size(1), device=z.device) == label).float()
    else:
        gradient.scatter_add_(1, label, torch.full_like(log_sum, -1.0))
    if cap:
        gradient.mul_(t.square_().neg_().add_(1))
    return losses, gradient


def chunk_softcap(cap, z, targets, weights):
    """The pure function of the plain loss: z (n, V) raw float32 logits, overwritten.

    targets (n,), weights (n,) -> (the weighted cross-entropies (n,), their gradient by z (n, V),
    and () because no other input wants a gradient).
    """
    losses, gradient = cross_entropy_and_gradient(z, targets, cap)
    return losses * weights, gradient.mul_(weights[:, None]), ()


def in_float32(chunk_loss, cap, z, *inputs):
    """chunk_loss of logits z (n, V) in any dtype, overwritten if that is float32.

    The arithmetic is in float32; the gradient by z has the dtype of z.
    """
    losses, dz, others = chunk_loss(cap, z.float(), *inputs)
    return losses, dz.to(z.dtype), others


@functools.cache
def compiled(chunk_loss):
    """in_float32 of a chunk's function for a GPU: one kernel in place of ten passes.

    Of chunk_softcap inductor 2.15 makes one Triton kernel without a float32 buffer for the chunk.
    """
    return torch.compile(functools.partial(in_float32, chunk_loss), dynamic=True)


class ChunkedLoss(torch.autograd.Function):
    """The sum of a loss of logits = x @ head.T that are never all there at once.

    chunk_loss(cap, z (n, V), *inputs (n,) each) -> (losses (n,), gradient by z (n, V), gradients
    by the last few of the inputs, (n,) each).
    """

    @staticmethod
    def forward(ctx, x, head, chunk_loss, cap, compile_chunk, *inputs):
        """x (N, C), head (V, C), inputs (N,) each -> the sum of all losses, 0-D float32."""
        N, V = x.size(0), head.size(0)
        padding = -V % COLUMN_MULTIPLE.get(x.device.type, 1)
        w = head.to(x.dtype)
        if padding:
            w = F.pad(w, (0, 0, 0, padding))
        losses = torch.empty(N, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        dw = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
        others = []
        function = functools.partial(in_float32, chunk_loss)
        if compile_chunk:
            function = compiled(chunk_loss)
        for part in chunks(N, V, x.device):
            # 1. logits, losses and their gradient by the logits
            z = (x[part] @ w.T)[:, :V]
            losses[part], dz, more = function(cap, z, *(values[part] for values in inputs))
            others.append(more)
            # 2. the gradients by the features and by the head
            if padding:
                dz = F.pad(dz, (0, padding))
            dx[part] = dz @ w
            if x.device.type == "cpu" and x.dtype == torch.float32:
                dw.addmm_(dz.T, x[part])
            else:
                dw.add_(dz.T @ x[part])
        ctx.save_for_backward(dx, dw[:V], *(torch.cat(pieces) for pieces in zip(*others)))
        ctx.inputs = len(inputs)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        dx, dw, *others = ctx.saved_tensors
        without = [None] * (ctx.inputs - len(others))
        others = [d * grad for d in others]
        return dx * grad.to(dx.dtype), dw * grad, None, None, None, *without, *others


def softcap_cross_entropy(x, head, targets, weights, cap, compile_chunk=False):
    """The weighted sum of cross-entropies of softcapped logits, in nats, 0-D.

    x (N, C), head (V, C), targets (N,) in [0, V), weights (N,). compile_chunk: compile the
    arithmetic of a chunk, for a GPU.
    """
    return ChunkedLoss.apply(x, head, chunk_softcap, cap, compile_chunk, targets, weights)


@torch.no_grad()
def token_log_probs(x, head, targets, cap):
    """The log-probability of each target, (N,) float32 in nats, without gradient."""
    w = head.to(x.dtype)
    found = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for part in chunks(len(x), len(head), x.device):
        z = (x[part] @ w.T).float()
        if cap:
            z = z.div_(cap).tanh_().mul_(cap)  # in place: writing to new memory takes longer
        label = targets[part, None]
        found[part] = (z.gather(1, label) - z.logsumexp(-1, keepdim=True))[:, 0]
    return found
