"""What followed each run of tokens before: in the training text, and in the very text that is being continued.

Five minutes on two cores train on a tenth of a small text. Counting reads all of it in seconds, and counts predict what comes
next as well as the network does by then, and other things well. The model mixes both (GPT.mixture) and learns which to believe at
each token: Jelinek and Mercer's interpolation (1980) with a network for the weights, as Infini-gram (arXiv 2401.17377) has
exact counts beside a large one. What the text itself said after the same one or two tokens, or anywhere, knows its names and
its words (a cache, Kuhn and De Mori, 1990); a network takes long to learn to look there by itself (n-gram heads, arXiv 2401.12973).

All counts of the training text are in one sorted array of keys: order (2 bits), hash of the context (43 bits), next token (18 bits).
"""
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ORDERS = 4              # contexts of one to four tokens, counted in the training text
LEAST = 1, 1, 2, 2      # what was counted less often is forgotten, for each order
REPEATS = 3             # contexts of none, one and two tokens, counted in the text that is being continued ...
REACH = 512             # ... so many tokens back
PARTS = ORDERS + REPEATS
HASH_BITS, NEXT_BITS = 43, 18   # so no vocabulary above 2^18
MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, and its bits look random: 2^64 over the golden ratio (Knuth)


def context_keys(*tokens):
    """The key, without the next token, of each context, as int64 tensors. tokens: the newest, the one before, ... of one shape."""
    digest = 0
    for order, token in enumerate(tokens):
        digest = (digest ^ (token + 1)) * MIX  # wraps around
        digest = digest ^ (digest >> 29)
        yield ((order << HASH_BITS) + (digest & ((1 << HASH_BITS) - 1))) << NEXT_BITS


def count(ids):
    """(keys, int64 (N,), sorted; counts, int32 (N,)) of the n-grams of the tokens ids, int64 (T,), each below 2^18."""
    room = threading.Semaphore(torch.get_num_threads())  # keys that nobody sorts yet would only take memory

    def count_order(keys, least):
        keys.sort()
        first = np.concatenate(([0], 1 + np.flatnonzero(keys[1:] != keys[:-1])))[:len(keys)]
        times = np.diff(first, append=len(keys))
        return keys[first[times >= least]], times[times >= least].astype(np.int32)

    newest, futures = (F.pad(ids, (back, 0))[:len(ids) - 1] for back in range(ORDERS)), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # sorting is nearly all of the time, and lets other threads run
        for contexts, least in zip(context_keys(*newest), LEAST):
            room.acquire()
            futures.append(pool.submit(count_order, (contexts | ids[1:]).numpy(), least))
            futures[-1].add_done_callback(lambda _: room.release())  # also where sorting fails for want of memory
    return tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*(future.result() for future in futures)))


def repeats(tokens):
    """tokens (N, S), the newest last, -1 before the first -> (N, REPEATS, S - 1), bool: whether the last 0, 1 and 2 tokens up to each
    but the newest are those up to the newest.
    """
    S = tokens.size(1)
    matches = [tokens[:, :-1] >= 0]
    for order in range(1, REPEATS):
        matches.append(matches[-1] & F.pad(tokens[:, :S - order] == tokens[:, S - order, None], (order - 1, 0)))
    return torch.stack(matches, 1)


class Found(NamedTuple):
    """What is known of the contexts at each of N tokens."""
    contexts: torch.Tensor   # (N, ORDERS), the keys of those in the training text
    begin: torch.Tensor      # (N, ORDERS), where the n-grams of each stand
    kinds: torch.Tensor      # (N, ORDERS), and how many they are
    matches: torch.Tensor    # (N, REPEATS, S - 1), up to which of the tokens before the newest each of the others stood, too
    totals: torch.Tensor     # (N, PARTS), how often each was counted


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

    def find(self, tokens):
        """tokens (N, S), the newest last, -1 before the first -> Found."""
        contexts = torch.stack(list(context_keys(*tokens[:, -ORDERS:].clamp(min=0).long().unbind(-1)[::-1])), -1)
        begin = torch.searchsorted(self.keys, contexts)
        end, known = begin.clone(), self.keys[begin.clamp(max=len(self.keys) - 1)] >> NEXT_BITS == contexts >> NEXT_BITS
        end[known] = torch.searchsorted(self.keys, contexts[known] + (1 << NEXT_BITS))
        matches = repeats(tokens)
        return Found(contexts, begin, end - begin, matches, torch.cat((self.cumulative[end] - self.cumulative[begin], matches.sum(-1, dtype=torch.int32)), -1))

    def look_up(self, tokens, targets, left_out=False):
        """tokens as in find, targets (N,) -> (totals (N, PARTS), kinds (N, ORDERS), hits (N, PARTS)): how often each context was counted,
        with how many different next tokens, and how often with the target.

        left_out: as if this occurrence of the target had not been counted, for a text that was (Ney, Essen and Kneser, 1995);
        otherwise the gate would learn to trust a context that was seen here and nowhere else.
        """
        contexts, _, kinds, matches, totals = self.find(tokens)
        known, hits = kinds > 0, torch.zeros_like(totals)
        wanted = (contexts | targets[:, None])[known]
        at = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        hits[:, :ORDERS][known] = torch.where(self.keys[at] == wanted, self.cumulative[at + 1] - self.cumulative[at], 0)
        hits[:, ORDERS:] = (matches & (tokens[:, None, 1:] == targets[:, None, None])).sum(-1, dtype=torch.int32)
        if left_out:
            counted, least = hits[:, :ORDERS], hits.new_tensor(LEAST)
            forgotten = counted == least  # one less, and it would not have been kept
            gone = torch.where(forgotten, least, counted.clamp(max=1))
            totals[:, :ORDERS] -= gone
            hits[:, :ORDERS] -= gone
            kinds = kinds - forgotten.long()
        return totals, kinds, hits

    def next_tokens(self, tokens, found, weights, V):
        """The probabilities of the next token, (N, V): the shares of counts in each context times its weight (N, PARTS)."""
        N, share = len(tokens), weights / found.totals.clamp(min=1)  # of one count
        kinds = found.kinds.flatten()
        row = torch.repeat_interleave(torch.arange(len(kinds), device=kinds.device), kinds)
        at = torch.arange(len(row), device=row.device) - (kinds.cumsum(0) - kinds)[row] + found.begin.flatten()[row]
        place = (row // ORDERS) * V + (self.keys[at] & ((1 << NEXT_BITS) - 1))
        counted = (self.cumulative[at + 1] - self.cumulative[at]) * share[:, :ORDERS].flatten()[row]
        probabilities = share.new_zeros(N * V).index_add_(0, place, counted).view(N, V)
        repeated = torch.einsum("np,nps->ns", share[:, ORDERS:], found.matches.to(share.dtype))
        return probabilities.scatter_add_(1, tokens[:, 1:].clamp(min=0).long(), repeated)
