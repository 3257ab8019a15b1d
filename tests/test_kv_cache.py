"""Slots of different lengths in one KV cache against causal attention over each sequence alone."""
import pytest
import torch

from nanochat.attention import cached_attention, causal_attention
from nanochat.kv_cache import KVCache, LayerCache

H, D = 4, 8


def make_cache(slots, length, kv_heads, dtype=torch.float32):
    layers = [LayerCache(slots, length, kv_heads, D, "cpu", dtype)]
    return KVCache(layers, slots, "cpu")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("slots", [[0, 1], [0, 2], [2, 0], None])
def test_prefill_and_decode_in_slots_equal_causal_attention_over_each_sequence(kv_heads, slots):
    torch.manual_seed(0)
    kv_cache = make_cache(3, 16, kv_heads)
    chosen = [0, 1, 2] if slots is None else slots
    lengths = [7, 4, 5][:len(chosen)]
    q, k, v = (torch.randn(len(chosen), 12, heads, D) for heads in (H, kv_heads, kv_heads))
    found = [[] for _ in chosen]

    def forward(starts, T):
        """T tokens of each sequence from its start on; those beyond its length are padding."""
        at = torch.tensor(starts)[:, None] + torch.arange(T)
        each = torch.arange(len(chosen))[:, None]
        window = kv_cache.window(slots, T)
        assert window.end == max(starts) + T
        return cached_attention(q[each, at], k[each, at], v[each, at], kv_cache.layers[0], window)

    y = forward([0] * len(chosen), max(lengths))
    kv_cache.advance(chosen, lengths)
    for i, length in enumerate(lengths):
        found[i].append(y[i, :length])
    for step in range(3):
        starts = [length + step for length in lengths]
        y = forward(starts, 1)
        kv_cache.advance(chosen, [1] * len(chosen))
        for i in range(len(chosen)):
            found[i].append(y[i])

    for i, length in enumerate(lengths):
        alone = [x[i:i + 1, :length + 3] for x in (q, k, v)]
        torch.testing.assert_close(torch.cat(found[i])[None], causal_attention(*alone))
    assert [kv_cache.lengths[slot] for slot in chosen] == [length + 3 for length in lengths]


def test_what_is_left_in_a_slot_is_never_seen_by_its_next_sequence():
    torch.manual_seed(0)
    kv_cache = make_cache(2, 8, 2)
    for p in (kv_cache.layers[0].k, kv_cache.layers[0].v):
        p.fill_(1e4)
    kv_cache.advance([0, 1], [8, 3])
    kv_cache.reset(0)
    assert kv_cache.lengths == [0, 3] and kv_cache.length == 8
    q, k, v = (torch.randn(1, 4, heads, D) for heads in (H, 2, 2))
    y = cached_attention(q, k, v, kv_cache.layers[0], kv_cache.window([0], 4))
    torch.testing.assert_close(y, causal_attention(q, k, v))


def test_an_idle_slot_is_computed_but_does_not_advance():
    kv_cache = make_cache(3, 8, 1)
    kv_cache.advance([0, 2], [5, 2])
    window = kv_cache.window(None, 1)
    assert window.positions.tolist() == [[5], [0], [2]] and window.end == 6
    kv_cache.advance([0, 2], [1, 1])
    assert kv_cache.window([1], 1).positions.tolist() == [[0]]


def test_a_cache_of_half_the_size_answers_in_the_dtype_of_the_query():
    q, k, v = (torch.randn(1, 4, 2, D) for _ in range(3))
    kv_cache = make_cache(1, 4, 2, torch.bfloat16)
    y = cached_attention(q, k, v, kv_cache.layers[0], kv_cache.window(None, 4))
    assert y.dtype == torch.float32 and kv_cache.nbytes == 2 * 4 * 2 * D * 2
    torch.testing.assert_close(y, causal_attention(q, k, v), atol=0.05, rtol=0.05)


def test_kept_slots_are_taken_empty_ones_first_then_the_one_that_was_left_first():
    kv_cache = make_cache(3, 8, 1)
    kv_cache.advance([0, 2], [5, 2])
    kv_cache.keep(2, [7, 8, 9], "a")
    kv_cache.keep(0, [1, 2, 3, 4, 5], "")
    assert kv_cache.kept == {2: ([7, 8], "a"), 0: ([1, 2, 3, 4, 5], "")}
    assert [kv_cache.least_recent(slots) for slots in ([0, 1, 2], [0, 2], [0])] == [1, 2, 0]
    kv_cache.take(2, 1)
    assert kv_cache.kept.keys() == {0} and kv_cache.lengths == [5, 0, 1]


def test_a_slot_that_is_cleared_holds_zeros_and_the_others_what_they_held():
    kv_cache = make_cache(2, 4, 1)
    for cached in (kv_cache.layers[0].k, kv_cache.layers[0].v):
        cached.fill_(float("nan"))
    kv_cache.advance([0, 1], [3, 3])
    kv_cache.clear(1)
    assert kv_cache.lengths == [3, 0] and not kv_cache.layers[0].k[1].any()
    assert kv_cache.layers[0].v[0].isnan().all() and not kv_cache.layers[0].v[1].any()
