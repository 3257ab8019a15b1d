"""The only file that knows which attention kernel runs.

Training runs torch's fused scaled-dot-product attention, causal, without a dense mask. Prefill and
decode read and write a KV cache (kv_cache.py). Every slot of the cache stands at a length of its
own, so the mask is made from positions. Nothing here synchronises with the device: all that the
host has to know is in the CacheWindow.

Shapes: B sequences, T tokens, H query heads, G key/value heads with G dividing H (grouped-query
attention, arXiv 2305.13245), D head dimension, S = window.end cached tokens.
"""
import torch
import torch.nn.functional as F


def causal_attention(q, k, v):
    """q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D). Token t attends to those up to t."""
    q = q.transpose(1, 2)  # B, H, T, D
    k = repeat_heads(k.transpose(1, 2), q.size(1))
    v = repeat_heads(v.transpose(1, 2), q.size(1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2)


def cached_attention(q, k, v, layer_cache, window):
    """Attention of new tokens to themselves and to the KV cache of their slots.

    q (B, T, H, D), k and v (B, T, G, D): T new tokens in each of B slots. layer_cache: this layer's
    LayerCache, into which k and v are written. window: the CacheWindow that says where. Returns
    (B, T, H, D) in the dtype of q, whatever the dtype of the cache.
    """
    # 1. write the new keys and values at their positions
    layer_cache.k[window.index, window.positions] = k.to(layer_cache.k.dtype)
    layer_cache.v[window.index, window.positions] = v.to(layer_cache.v.dtype)

    # 2. read what the slots hold, up to the longest of them
    q = q.transpose(1, 2)  # B, H, T, D
    k = layer_cache.k[window.slots, :window.end].transpose(1, 2)  # B, G, S, D
    v = layer_cache.v[window.slots, :window.end].transpose(1, 2)
    k = repeat_heads(k, q.size(1)).to(q.dtype)
    v = repeat_heads(v, q.size(1)).to(q.dtype)

    # 3. attend, each token to the positions up to its own
    cached = torch.arange(window.end, device=q.device)
    visible = cached <= window.positions[:, None, :, None]  # B, 1, T, S
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return y.transpose(1, 2)


def repeat_heads(x, heads):
    """(B, G, T, D) -> (B, heads, T, D): each key/value head serves heads / G query heads."""
    if x.size(1) == heads:
        return x
    return x.repeat_interleave(heads // x.size(1), dim=1)
