"""The GPT with latent attention and a mixture of experts (DeepSeek-V3, arXiv 2412.19437).

In place of one wide MLP most layers have many narrow ones, the experts, of which each token uses a
few. So the model holds more weights than a token is multiplied with: more parameters for the same
arithmetic, and for more memory.

    s = sigmoid(router(x))                  a score for each expert, in float32
    chosen = the top_k of s + bias          the bias chooses, and does nothing else
    y = routed_scale * sum of s_e / (sum of the chosen s) * expert_e(x), and shared(x)

The shared expert serves every token, and the first layers have an MLP that is as wide as what a
token uses of the experts.

Balance (arXiv 2408.15664): an expert with more than its share of the tokens has its bias lowered by
a small step, one with fewer has it raised; no auxiliary loss pulls at the weights. The excess is
the bias's gradient here, and Adam without its averages, which is a step of the gradient's sign, its
optimizer. So the loads of all micro-batches and ranks are summed, skipped with a step that is
skipped, saved and resumed as gradients and optimizers are, by any layout.

No token is dropped: those of one expert are put side by side, and one call multiplies all groups.
Shapes as in gpt.py; E experts, k = top_k, I = expert_width, N = B * T.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import AdamW
from nanochat.gpt import OPTIMIZERS, Recipe
from nanochat.variants.mla import MLABlock, MLAConfig, MLAGPT, Stack
from nanochat.variants.portable import SwiGLU

# The bias's gradient is its expert's excess of the tokens, as a share of all: at most this large,
# so that it counts for nothing in the norm of the gradient.
BALANCE_SCALE = 1e-4


@dataclass
class DeepSeekConfig(MLAConfig):
    """The sizes of the experts; 0: so that a token uses as many weights as in GPT's MLP."""
    mlp_width: int = 0       # of the dense layers; 8/3 of the width
    expert_width: int = 0
    experts: int = 16
    top_k: int = 3
    shared_experts: int = 1
    dense_layers: int = 1
    routed_scale: float = 2.5

    def __post_init__(self):
        super().__post_init__()
        used = self.top_k + self.shared_experts
        self.mlp_width = self.mlp_width or 64 * math.ceil(8 * self.width / 3 / 64)
        # grouped products want rows of a multiple of 16 bytes
        self.expert_width = self.expert_width or 8 * math.ceil(self.mlp_width / used / 8)


class Balance(torch.autograd.Function):
    """x as it is; in the backward pass `excess` becomes the gradient of the bias."""

    @staticmethod
    def forward(ctx, x, bias, excess):
        ctx.save_for_backward(excess)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, ctx.saved_tensors[0], None


class Permute(torch.autograd.Function):
    """x (N, C) -> (N * k, C), each row k times, in an order of which `inverse` is the inverse.

    The gradient is gathered and added, in one order always: torch's own would be scattered.
    """

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, dy):
        dx = dy[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.k)).sum(1)
        return dx, None, None, None


def grouped_linear(x, weights, counts):
    """x (M, n), the rows of one expert side by side, counts (E,) of them, weights (E, m, n).

    Returns (M, m): each row multiplied with its expert's matrix.
    """
    has_kernel = x.device.type == "cpu" or (x.device.type, x.dtype) == ("cuda", torch.bfloat16)
    if not has_kernel:
        return linear_of_each(x, weights, counts)
    ends = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weights.mT, offs=ends)


# torch.compiler.disable would import the compiler, which takes a second at each start.
@torch._disable_dynamo
def linear_of_each(x, weights, counts):
    """grouped_linear() as one product for each expert, for which the host waits for the counts."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights)])


class Router(nn.Module):
    """Which experts a token uses. Its weights stay in float32: they decide."""
    roles = {"weight": "matrix", "bias": "balance"}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        self.bias = nn.Parameter(torch.empty(config.experts))

    def forward(self, x):
        """x (N, C) -> the chosen experts (N, k) and what their results are multiplied with."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.bias.float()).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, self.config.routed_scale * weights / weights.sum(-1, keepdim=True)


class MixtureOfExperts(nn.Module):
    """The experts of a layer, in place of an MLP."""

    def __init__(self, config):
        super().__init__()
        E, I, C = config.experts, config.expert_width, config.width
        self.experts, self.k = E, config.top_k
        self.router = Router(config)
        self.gate, self.up = Stack(E, I, C), Stack(E, I, C)
        self.down = Stack(E, C, I)
        self.shared = None
        if config.shared_experts:
            self.shared = SwiGLU(replace(config, mlp_width=config.shared_experts * I))

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        flat = x.flatten(0, 1)
        # 1. which rows go to which expert, and how many
        chosen, weights = self.router(flat)
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        counts = (chosen.view(-1, 1) == torch.arange(self.experts, device=x.device)).sum(0)
        # 2. the experts, rows side by side
        rows = Permute.apply(flat, order, inverse, self.k)
        gate = F.silu(grouped_linear(rows, self.gate.for_inputs(x), counts))
        hidden = gate * grouped_linear(rows, self.up.for_inputs(x), counts)
        y = grouped_linear(hidden, self.down.for_inputs(x), counts)
        # 3. back in place, and weighted
        y = Permute.apply(y, inverse, order, 1).unflatten(0, (-1, self.k))
        y = (y * weights[..., None].to(x.dtype)).sum(1)
        # 4. the bias learns from the counts
        excess = counts / chosen.numel() - 1 / self.experts
        y = Balance.apply(y, self.router.bias, BALANCE_SCALE * excess).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class DeepSeekBlock(MLABlock):
    """A block with a dense MLP, as the first layers have it."""
    mlp_class = SwiGLU


class DeepSeekGPT(MLAGPT):
    """GPT with latent attention and, behind the first layers, experts."""
    config_class = DeepSeekConfig
    block_class = DeepSeekBlock
    # A step of the bias is .01, ten times DeepSeek's: runs are short here, and Muon moves the
    # router so fast that .001 fell behind (dev/LOG.md).
    optimizers = {
        **OPTIMIZERS,
        "balance": Recipe(AdamW, 0.5, False, False, {"betas": (0.0, 0.0)}),
    }

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks[config.dense_layers:]:
            block.mlp = MixtureOfExperts(config)

    def mixtures(self):
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MixtureOfExperts)]

    def init_blocks(self):
        """As of MLAGPT; the router like any matrix, its bias zero."""
        super().init_blocks()
        bound = math.sqrt(3 / self.config.width)
        for mixture in self.mixtures():
            nn.init.uniform_(mixture.router.weight, -bound, bound)
            nn.init.zeros_(mixture.router.bias)
            if mixture.shared is not None:
                nn.init.zeros_(mixture.shared.down.weight)

    def matmul_parameters(self):
        """Of the experts only those count that a token uses."""
        total = super().matmul_parameters()
        for mixture in self.mixtures():
            of_an_expert = 3 * self.config.expert_width * self.config.width
            unused = (self.config.experts - self.config.top_k) * of_an_expert
            total += mixture.router.weight.numel() - unused
        return total
