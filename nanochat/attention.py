"""The only file that knows which attention kernel runs.

Training runs torch's fused scaled-dot-product attention, causal, without a dense mask. Decoding reads a static cache:
every row of the batch stands at its own position, so the mask is built from positions, and rows may join at any length.
"""
import torch
import torch.nn.functional as F


def causal_attention(q, k, v):
    """q (B, T, H, D), k and v (B, T, G, D) with G dividing H (grouped-query attention) -> (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B, H, T, D
    k, v = _spread(k, q.size(1)), _spread(v, q.size(1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def cached_attention(q, k, v, layer_cache, positions):
    """Write k and v (B, T, G, D) into the cache at `positions` (B, T), attend from q to all that is at or before each."""
    rows = torch.arange(q.size(0), device=q.device)[:, None]
    layer_cache.k[rows, positions] = k.to(layer_cache.k.dtype)
    layer_cache.v[rows, positions] = v.to(layer_cache.v.dtype)
    end = int(positions.max()) + 1
    k, v = layer_cache.k[:, :end].transpose(1, 2), layer_cache.v[:, :end].transpose(1, 2)  # B, G, S, D
    visible = torch.arange(end, device=q.device) <= positions[:, None, :, None]  # B, 1, T, S
    q = q.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, _spread(k, q.size(1)).to(q.dtype), _spread(v, q.size(1)).to(q.dtype), attn_mask=visible)
    return y.transpose(1, 2)


def _spread(x, heads):
    """(B, G, T, D) -> (B, heads, T, D): each group serves heads / G query heads."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


class LayerCache:
    """Keys and values of one layer, (B, S, G, D) each."""

    def __init__(self, batch, length, groups, head_dim, device, dtype):
        self.k = torch.zeros(batch, length, groups, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    @property
    def nbytes(self):
        return self.k.nbytes + self.v.nbytes
