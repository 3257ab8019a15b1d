"""The GPT with multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434).

Keys and values of all heads are made from one small vector of each token, its latent. The KV cache
holds the latent and one rotated key that all heads share, and no keys and values:

    c, k_rope = kv_down(x)              c = RMSNorm(c); k_rope is rotated to its position
    k_nope, v = k_up(c), v_up(c)        for each head, not rotated
    score     = q_nope k_nope + q_rope k_rope, times (nope_dim + rope_dim)^-1/2

Rotating k_nope would stand between k_up and the query; therefore the position is in dimensions of
its own. Since nothing stands between, k_up may be multiplied with the query instead (absorbed):

    q_nope (k_up c) = (q_nope k_up) c   and   sum p (v_up c) = v_up (sum p c)

Then a query attends to the latents as they are cached, at more arithmetic for each pair of tokens
and none to make keys and values again. So a single query is decoded; many queries at once, in
training and prefill, attend to expanded keys and values. There is no QK norm, which would stand
between as well: clip gradients (docs/numerical_stability.md).

Shapes as in gpt.py; r is kv_rank, S the number of cached tokens.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import attend_up_to, attention_up_to, causal_attention
from nanochat.common import UserError
from nanochat.gpt import GPT, Block, Flops, GPTConfig, Linear, rotate, take
from nanochat.kv_cache import LayerCache

NORM_EPS = 1e-6


@dataclass
class MLAConfig(GPTConfig):
    """The ranks of the latents and the dimensions of a head; 0: what follows from the width.

    A quarter of the width is DeepSeek's rank of 512 at a width of 2,048. Queries and keys are as
    wide as values, as fused kernels want it, and half of them is rotated.
    """
    q_rank: int = 0     # of the queries' latent; 0: they have none, as in DeepSeek-V2-Lite
    kv_rank: int = 0
    nope_dim: int = 0   # of queries and keys, not rotated
    rope_dim: int = 0   # and rotated
    v_dim: int = 0

    def __post_init__(self):
        half = self.head_dim // 2
        self.kv_rank = self.kv_rank or self.width // 4
        self.nope_dim = self.nope_dim or half
        self.rope_dim = self.rope_dim or half
        self.v_dim = self.v_dim or 2 * half
        if self.v_dim > self.qk_dim or self.rope_dim % 2:
            raise UserError(
                f"v_dim={self.v_dim} may be at most nope_dim + rope_dim = {self.qk_dim}, and "
                f"rope_dim={self.rope_dim} must be even")

    @classmethod
    def from_depth(cls, depth, vocab_size, max_seq_len, kv_heads=None, **more):
        """As of GPTConfig. UserError for kv_heads: all heads share one latent."""
        if kv_heads:
            raise UserError(
                f"kv_heads={kv_heads} is for attention that caches keys and values, this model "
                "caches latents: leave it out")
        return super().from_depth(depth, vocab_size, max_seq_len, **more)

    @property
    def qk_dim(self):
        return self.nope_dim + self.rope_dim

    @property
    def rotary_dim(self):
        return self.rope_dim


class Stack(nn.Module):
    """A matrix (n_out, n_in) for each head or each expert, (count, n_out, n_in)."""
    roles = {"weight": "matrix"}  # Muon sees each of them by itself

    def __init__(self, count, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, n_out, n_in))

    def for_inputs(self, x):
        """The matrices in the dtype of the activations."""
        return self.weight.to(x.dtype)


class LatentNorm(nn.Module):
    """RMSNorm over the last dimension, with gains."""
    roles = {"gain": "scalar"}

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.gain.to(x.dtype), NORM_EPS)


class LatentCache(LayerCache):
    """Of each token the latent and the rotated key: .k (S, 1, L, r + rope_dim), and no .v."""

    def __init__(self, slots, length, numbers, device, dtype):
        super().__init__(slots, length, 1, numbers, device, dtype)
        self.v = self.k.new_empty(slots, 1, length, 0)


class LatentAttention(nn.Module):
    """Causal self-attention over latents."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, heads, r = config.width, config.heads, config.kv_rank
        # queries, from a latent of their own or from x
        if config.q_rank:
            self.q_down = Linear(width, config.q_rank)
            self.q_norm = LatentNorm(config.q_rank)
        self.q = Linear(config.q_rank or width, heads * config.qk_dim)
        # what is cached of a token
        self.kv_down = Linear(width, r + config.rope_dim)
        self.kv_norm = LatentNorm(r)
        # keys and values of each head from the latent
        self.k_up = Stack(heads, config.nope_dim, r)
        self.v_up = Stack(heads, config.v_dim, r)
        self.out = Linear(heads * config.v_dim, width)

    def queries(self, x, cos, sin):
        """x (B, T, C) -> (B, T, H, nope_dim + rope_dim), rotated."""
        if self.config.q_rank:
            x = self.q_norm(self.q_down(x))
        config = self.config
        q = self.q(x).unflatten(-1, (config.heads, -1))
        nope, rope = q.split((config.nope_dim, config.rope_dim), dim=-1)
        return torch.cat((nope, rotate(rope, cos, sin)), dim=-1)

    def latents(self, x, cos, sin):
        """x (B, T, C) -> what is cached, (B, T, r + rope_dim): the latent and the rotated key."""
        c, rope = self.kv_down(x).split((self.config.kv_rank, self.config.rope_dim), dim=-1)
        rope = rotate(rope[:, :, None], cos, sin)[:, :, 0]
        return torch.cat((self.kv_norm(c), rope), dim=-1)

    def expand(self, latents):
        """latents (B, S, r + rope_dim) -> keys (B, S, H, qk_dim) and values (B, S, H, v_dim)."""
        heads = self.config.heads
        c, rope = latents.split((self.config.kv_rank, self.config.rope_dim), dim=-1)
        nope, v = (
            F.linear(c, up.for_inputs(c).flatten(0, 1)).unflatten(-1, (heads, -1))  # B, S, H, D
            for up in (self.k_up, self.v_up)
        )
        rope = rope[:, :, None].expand(-1, -1, heads, -1)  # the same for all heads
        return torch.cat((nope, rope), dim=-1), v

    def forward(self, x, cos, sin, layer_cache=None, window=None, at=None):
        """As Attention.forward() of gpt.py."""
        # 1. queries of each head, and a latent of each token, at their positions
        q = self.queries(take(x, at), take(cos, at), take(sin, at))
        latents = self.latents(x, cos, sin)
        # 2. attend to what is at or before each position
        if layer_cache is not None:
            y = self.attend_cached(q, latents, layer_cache, window, at)
        elif at is not None:
            y = attention_up_to(q, *self.expand(latents), at)
        else:
            y = self.attend_whole(q, latents)
        # 3. back to the residual stream
        return self.out(y.flatten(2))

    def attend_whole(self, q, latents):
        """Each of T queries attends to the latents (B, T, r + rope_dim) up to its own."""
        k, v = self.expand(latents)
        narrower = self.config.qk_dim - self.config.v_dim
        if narrower:  # fused kernels want values as wide as keys
            v = F.pad(v, (0, narrower))
        return causal_attention(q, k, v)[..., :self.config.v_dim]

    def attend_cached(self, q, latents, layer_cache, window, at):
        """As cached_attention() of attention.py, of new latents (B, T, r + rope_dim)."""
        # 1. write the new latents at their positions
        cache = layer_cache.k[:, 0]  # slots, length, r + rope_dim
        cache[window.index, window.positions] = latents.to(cache.dtype)
        # 2. into empty slots: nothing but the new tokens to attend to, and no mask to make
        is_whole = at is None and window.end == latents.size(1)
        is_prompt = is_whole and q.size(1) > 1
        if is_prompt and q.device.type == "cpu":
            return self.attend_whole(q, latents)
        # 3. else read what the slots hold, up to the longest of them
        cached = cache[window.slots, :window.end].to(q.dtype)
        positions = window.positions if at is None else window.positions.gather(1, at)
        if q.size(1) == 1:
            return self.attend_absorbed(q[:, 0], cached, positions)[:, None]
        k, v = self.expand(cached)
        y = attend_up_to(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), positions)
        return y.transpose(1, 2)

    def attend_absorbed(self, q, cached, positions):
        """One query of each sequence, (B, H, qk_dim), positions (B, 1) -> (B, H, v_dim).

        cached (B, S, r + rope_dim): as each head's keys, and but for the rotated part its values.
        """
        config = self.config
        # 1. k_up goes to the query
        nope, rope = q.split((config.nope_dim, config.rope_dim), dim=-1)
        absorbed = torch.einsum("bhd,hdr->bhr", nope, self.k_up.for_inputs(q))
        query = torch.cat((absorbed, rope), dim=-1) * config.qk_dim ** -0.5
        # 2. attend to what is at or before each position
        # (scores in the dtype of the activations, as a fused kernel rounds its inputs; softmax in
        # float32, as it does)
        scores = (query @ cached.mT).float()  # B, H, S
        keys = torch.arange(cached.size(1), device=q.device)
        scores = scores.masked_fill(keys > positions[:, :, None], -torch.inf)
        y = scores.softmax(-1).to(q.dtype) @ cached[..., :config.kv_rank]
        # 3. v_up comes after the sum
        return torch.einsum("bhr,hdr->bhd", y, self.v_up.for_inputs(q))

    def new_layer_cache(self, slots, length, device, dtype):
        numbers = self.config.kv_rank + self.config.rope_dim
        return LatentCache(slots, length, numbers, device, dtype)


class MLABlock(Block):
    """A block with latent attention."""
    attention_class = LatentAttention


class MLAGPT(GPT):
    """GPT with latent attention."""
    config_class = MLAConfig
    block_class = MLABlock

    def init_blocks(self):
        """out and down zero, gains 1, all other matrices uniform with std 1 / sqrt(inputs)."""
        for block in self.blocks:
            # all of them, those of a variant's MLP as well
            for module in block.modules():
                if isinstance(module, (Linear, Stack)):
                    bound = math.sqrt(3 / module.weight.size(-1))
                    nn.init.uniform_(module.weight, -bound, bound)
                elif isinstance(module, LatentNorm):
                    nn.init.ones_(module.gain)
            # every block starts as the identity
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def stacked_weights(self):
        return [module.weight for module in self.modules() if isinstance(module, Stack)]

    def cast_for_inference(self, dtype):
        # as Linear's: once, so that no forward pass casts them
        for weight in self.stacked_weights():
            weight.data = weight.data.to(dtype)
        return super().cast_for_inference(dtype)

    def matmul_parameters(self):
        return super().matmul_parameters() + sum(w.numel() for w in self.stacked_weights())

    def flops(self, T):
        """As of GPT; a pair of tokens takes qk_dim + v_dim multiplications in each head."""
        config = self.config
        weights = 6 * self.matmul_parameters()
        of_a_pair = config.heads * (config.qk_dim + config.v_dim)
        attention = 3 * config.depth * of_a_pair * T
        return Flops(weights, weights + attention, weights + 2 * attention)
