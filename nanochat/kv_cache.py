"""The KV cache: keys and values of the tokens that each sequence has behind it, so that decoding
computes one token per step and not the whole text again.

The cache is static: S slots of L tokens each, allocated at once. A sequence holds one slot. Every
slot stands at a length of its own, so that sequences may start and end at any step. A forward pass
is for some of the slots. Of all of them, idle ones are computed along with the others: they do not
advance, and what is written into them is overwritten before any query attends to it.

Lengths are kept on the host, as a list of ints. A forward pass takes a CacheWindow, made once for
all layers, so that no layer waits for the device to learn how long the longest slot is.

Shapes: S slots, L cache length, n slots of one forward pass, T new tokens of each, G key/value
heads, D head dimension.
"""
from typing import NamedTuple

import torch


class LayerCache:
    """Keys and values of one layer: .k and .v, (S, G, L, D) each, zero at first.

    The tokens of a head are neighbours, so that decoding reads each head without gaps.
    """

    def __init__(self, slots, length, kv_heads, head_dim, device, dtype):
        shape = (slots, kv_heads, length, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self):
        """How many tokens a slot can hold."""
        return self.k.size(2)

    @property
    def nbytes(self):
        return self.k.nbytes + self.v.nbytes

    def copy(self, slot, others, length):
        """Give other slots (a list of ints) the first `length` tokens of one."""
        for cached in (self.k, self.v):
            cached[others, :, :length] = cached[slot, :, :length]

    def is_finite(self, slot):
        """Whether nothing in a slot is NaN or infinite."""
        return all(bool(cached[slot].isfinite().all()) for cached in (self.k, self.v))

    def clear(self, slot):
        """Overwrite what is in a slot with zeros."""
        for cached in (self.k, self.v):
            cached[slot] = 0


class CacheWindow(NamedTuple):
    """Where one forward pass reads and writes: n slots with T new tokens each."""
    slots: slice | torch.Tensor  # the slots to read: a slice where they are neighbours, else (n,)
    positions: torch.Tensor      # (n, T) int64, where the new tokens belong in their slots
    end: int                     # the largest position + 1: how many cached tokens to attend to
    index: torch.Tensor          # (n, 1) int64, the slots, to be paired with positions in a write


class KVCache:
    """What decoding remembers: a LayerCache per layer, and how many tokens each slot holds.

    lengths    how many tokens each slot holds, a list of ints
    kept       {slot: (ids, tenant)} of the slots whose sequence has ended and left its tokens, for
               another prompt that begins like them; the least recent first

    A forward pass is three calls. The model makes the first two, its caller the third:

        window = kv_cache.window([0, 2], T=5)              # 5 new tokens for slots 0 and 2
        cached_attention(q, k, v, layer_cache, window)     # in every layer
        kv_cache.advance([0, 2], [5, 3])                   # of slot 2's tokens two were padding

    Only the caller knows which slots are idle and which tokens are padding. A forward pass alone
    changes no length: when repeated, it writes to the same positions again.
    """

    def __init__(self, layers, slots, device):
        """layers: list of LayerCache, or of a class with the same properties and methods."""
        self.layers = layers
        self.slots = slots
        self.device = device
        self.lengths = [0] * slots
        self.kept = {}

    @property
    def length(self):
        """How many tokens a slot can hold."""
        return self.layers[0].length

    @property
    def nbytes(self):
        return sum(layer.nbytes for layer in self.layers)

    def window(self, slots, T):
        """The CacheWindow of T new tokens in each of `slots` (list of ints; None: all of them)."""
        chosen = list(range(self.slots)) if slots is None else slots
        lengths = [self.lengths[slot] for slot in chosen]
        end = max(lengths) + T

        # One copy from host to device serves all layers of this forward pass.
        on_device = torch.tensor([chosen, lengths], device=self.device)  # 2, n
        index = on_device[0, :, None]                                    # n, 1
        positions = on_device[1, :, None] + torch.arange(T, device=self.device)  # n, T

        # A slice of neighbours is a view of the cache, an index of slots would copy them.
        first, last = chosen[0], chosen[-1]
        neighbours = chosen == list(range(first, last + 1))
        readable = slice(first, last + 1) if neighbours else index[:, 0]
        return CacheWindow(readable, positions, end, index)

    def advance(self, slots, counts):
        """After a forward pass: slots[i] holds counts[i] more tokens. Both are lists of ints."""
        for slot, count in zip(slots, counts):
            self.lengths[slot] += count

    def copy(self, slot, others, length):
        """Give other slots the first `length` tokens of one, which all of them have in common.

        others: a list of ints. The caller advances them.
        """
        for layer in self.layers:
            layer.copy(slot, others, length)

    def reset(self, slot):
        """Empty a slot for another sequence, which will overwrite what is in it."""
        self.take(slot, 0)

    def is_finite(self, slot):
        """Whether nothing in a slot is NaN or infinite."""
        return all(layer.is_finite(slot) for layer in self.layers)

    def clear(self, slot):
        """Empty a slot that holds NaN, which a mask would not hide."""
        self.reset(slot)
        for layer in self.layers:
            layer.clear(slot)

    def keep(self, slot, ids, tenant):
        """Leave the tokens of a slot whose sequence, of these ids, has ended."""
        self.kept[slot] = ids[:self.lengths[slot]], tenant

    def take(self, slot, length):
        """Give a slot to a sequence that continues the first `length` tokens in it."""
        self.kept.pop(slot, None)
        self.lengths[slot] = length

    def least_recent(self, slots):
        """Of some slots that nobody uses an empty one, else the one that was left first."""
        empty = [slot for slot in slots if slot not in self.kept]
        return min(empty) if empty else min(slots, key=list(self.kept).index)
