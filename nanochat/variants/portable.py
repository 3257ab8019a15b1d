"""A model shaped like Qwen3, so that runtimes that others wrote can serve it.

SwiGLU in place of ReLU squared (arXiv 2002.05202), no softcap, norms with gains if wanted, QK norm
before the rotation if wanted, a tied head if wanted. With gains this is transformers'
Qwen3ForCausalLM, and without QK norm its LlamaForCausalLM; tests compare logits and gradients.
Shapes as in gpt.py.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import AdamW
from nanochat.gpt import (
    ADAMW,
    GPT,
    MLP,
    OPTIMIZERS,
    Attention,
    Block,
    Embedding,
    GPTConfig,
    Linear,
    Recipe,
    rotate,
    take,
)


@dataclass
class PortableConfig(GPTConfig):
    """mlp_width: of the hidden layer. tied: the head is the embedding. gains: of the norms.

    head_dim: a head's dimensions. qk_norm: whether queries and keys are normalised.
    """
    softcap: float = 0.0
    rotary_base: float = 1000000.0
    mlp_width: int = 0          # 0: 8/3 of the width, so that SwiGLU's three matrices weigh as two
    tied: bool = False
    gains: bool = True
    norm_eps: float = 1e-6
    head_dim: int = 0           # 0: of the width, the share of a head
    qk_norm: bool = True

    def __post_init__(self):
        if not self.head_dim:
            self.head_dim = self.width // self.heads
        if not self.mlp_width:
            self.mlp_width = 64 * math.ceil(8 * self.width / 3 / 64)


class Norm(nn.Module):
    """RMSNorm over the last dimension, with gains where the config has them."""
    roles = {"gain": "scalar"}

    def __init__(self, width, config):
        super().__init__()
        self.eps = config.norm_eps
        self.gain = nn.Parameter(torch.empty(width)) if config.gains else None

    def forward(self, x):
        gain = None if self.gain is None else self.gain.to(x.dtype)
        return F.rms_norm(x, (x.size(-1),), gain, self.eps)


class TiedEmbedding(Embedding):
    """An embedding that is the head, too, and learns as slowly as a head must."""
    roles = {"weight": "tied"}


class PortableAttention(Attention):
    """Attention whose queries and keys are normalised, with gains, before the rotation.

    Those of a Llama are not.
    """

    def __init__(self, config):
        super().__init__(config)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = Norm(config.head_dim, config)
            self.k_norm = Norm(config.head_dim, config)

    def project(self, x, at=None):
        q, k, v = super().project(x, at)
        return self.q_norm(q), self.k_norm(k), v

    def place(self, q_or_k, cos, sin):
        return rotate(q_or_k, cos, -sin)  # nanochat rotates the other way round than Qwen3


class SwiGLU(MLP):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        nn.Module.__init__(self)
        self.gate = Linear(config.width, config.mlp_width)
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PortableBlock(Block):
    """A block with norms of its own."""
    attention_class = PortableAttention
    mlp_class = SwiGLU

    def __init__(self, config):
        super().__init__(config)
        self.attention_norm = Norm(config.width, config)
        self.mlp_norm = Norm(config.width, config)

    def forward(self, x, cos, sin, layer_cache=None, window=None, at=None):
        y = self.attention(self.attention_norm(x), cos, sin, layer_cache, window, at)
        x = take(x, at) + y
        return x + self.mlp(self.mlp_norm(x))


class PortableGPT(GPT):
    """GPT in the shape of Qwen3."""
    config_class = PortableConfig
    block_class = PortableBlock
    # with an embedding's multiple of 10 a tied one costs a nat (dev/LOG.md)
    optimizers = {**OPTIMIZERS, "tied": Recipe(AdamW, 0.4, True, False, ADAMW)}

    def __init__(self, config):
        super().__init__(config)
        self.norm = Norm(config.width, config)
        if config.tied:
            self.embed = TiedEmbedding(self.vocab_size_padded, config.width)
            self.head = None

    @torch.no_grad()
    def init_weights(self):
        """As GPT's table, gate as up, and 1 for the gains.

        The embedding is not normalised, so it is small: std .02.
        """
        nn.init.normal_(self.embed.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.001)
        self.init_blocks()
        bound = math.sqrt(3 / self.config.width)
        for block in self.blocks:
            nn.init.uniform_(block.mlp.gate.weight, -bound, bound)
        for module in self.modules():
            if isinstance(module, Norm) and module.gain is not None:
                nn.init.ones_(module.gain)
        self.build_rotary()

    def head_weight(self):
        table = self.embed if self.head is None else self.head
        return table.weight[:self.config.vocab_size]

    def enter(self, idx, recent):
        return self.embed(idx).to(self.compute_dtype)

    def leave(self, x):
        return self.norm(x)
