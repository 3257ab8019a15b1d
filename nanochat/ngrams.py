"""What followed each run of one to four tokens in a text: exact counts, which predict without any training.

Five minutes on two cores train on a tenth of a small text. Counting reads all of it in seconds, and counts predict what comes
next as well as the network does by then, and other things well. The model mixes both (GPT.mixture) and learns which to believe at
each token: Jelinek and Mercer's interpolation (1980) with a network for the weights, as Infini-gram (arXiv 2401.17377) has
exact counts beside a large one.

All counts are in one sorted array of keys: order (2 bits), hash of the context (43 bits), next token (18 bits).
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ORDERS = 4              # contexts of one to four tokens
LEAST = 1, 1, 2, 2      # what was counted less often is forgotten, for each order
HASH_BITS, NEXT_BITS = 43, 18
MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, and its bits look random: 2^64 over the golden ratio (Knuth)


def context_keys(*tokens):
    """The key, without the next token, of each context: ORDERS int64 tensors. tokens: the newest, the one before, ... of one shape."""
    digest = torch.zeros_like(tokens[0])
    for order, token in enumerate(tokens):
        digest = (digest ^ (token + 1)) * MIX  # wraps around
        digest = digest ^ (digest >> 29)
        yield ((order << HASH_BITS) + (digest & ((1 << HASH_BITS) - 1))) << NEXT_BITS


def count(ids):
    """(keys, int64 (N,), sorted; counts, int32 (N,)) of the n-grams of the tokens ids, int64 (T,)."""

    def count_order(keys, least):
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        times = np.diff(first, append=len(keys))
        return keys[first[times >= least]], times[times >= least]

    newest = [F.pad(ids, (back, 0))[:len(ids) - 1] for back in range(ORDERS)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # sorting is nearly all of the time, and lets other threads run
        parts = pool.map(count_order, ((contexts | ids[1:]).numpy() for contexts in context_keys(*newest)), LEAST)
        keys, counts = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    return keys, counts.to(torch.int32)


class NGrams(nn.Module):
    """Counts as buffers, so that they are saved with the weights. N: how many n-grams are kept."""

    def __init__(self, N):
        super().__init__()
        self.register_buffer("keys", torch.empty(N, dtype=torch.long))
        self.register_buffer("cumulative", torch.empty(N + 1, dtype=torch.int32))  # counts before each key

    @torch.no_grad()
    def fill(self, keys, counts):
        self.keys.copy_(keys)
        self.cumulative.copy_(torch.cat((counts.new_zeros(1), counts)).cumsum(0))

    def spans(self, tokens):
        """tokens (N, ORDERS), the newest first -> (contexts, begin, end, totals), (N, ORDERS) each: the key of what the newest 1, 2, ...
        of them are as a context, where its n-grams stand, and how often it was counted.
        """
        contexts = torch.stack(list(context_keys(*tokens.unbind(-1))), -1)
        begin = torch.searchsorted(self.keys, contexts)
        end, known = begin.clone(), self.keys[begin.clamp(max=len(self.keys) - 1)] >> NEXT_BITS == contexts >> NEXT_BITS
        end[known] = torch.searchsorted(self.keys, contexts[known] + (1 << NEXT_BITS))
        return contexts, begin, end, self.cumulative[end] - self.cumulative[begin]

    def look_up(self, tokens, targets, left_out=False):
        """tokens (N, ORDERS), targets (N,) -> (totals, kinds, hits), (N, ORDERS) each: how often each context was counted, with how
        many different next tokens, and how often with the target.

        left_out: as if this occurrence of the target had not been counted, for a text that was (Ney, Essen and Kneser, 1995);
        otherwise the gate would learn to trust a context that was seen here and nowhere else.
        """
        contexts, begin, end, totals = self.spans(tokens)
        kinds = end - begin
        known, hits = kinds > 0, torch.zeros_like(totals)
        wanted = (contexts | targets[:, None])[known]
        at = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        hits[known] = torch.where(self.keys[at] == wanted, self.cumulative[at + 1] - self.cumulative[at], 0)
        if left_out:
            least = hits.new_tensor(LEAST)
            forgotten = hits == least  # one less, and it would not have been kept
            gone = torch.where(forgotten, least, hits.clamp(max=1))
            totals, kinds, hits = totals - gone, kinds - forgotten.long(), hits - gone
        return totals, kinds, hits

    def next_tokens(self, begin, end, totals, weights, V):
        """The probabilities of the next token, (N, V): the shares of counts of each context's span times its weight, (N, ORDERS) all."""
        kinds, orders = (end - begin).flatten(), weights.size(-1)
        row = torch.repeat_interleave(torch.arange(len(kinds), device=kinds.device), kinds)
        at = torch.arange(len(row), device=row.device) - (kinds.cumsum(0) - kinds)[row] + begin.flatten()[row]
        share = (self.cumulative[at + 1] - self.cumulative[at]) / totals.flatten()[row] * weights.flatten()[row]
        place = (row // orders) * V + (self.keys[at] & ((1 << NEXT_BITS) - 1))
        return share.new_zeros(len(weights) * V).index_add_(0, place, share).view(-1, V)
