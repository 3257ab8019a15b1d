"""Counts of n-grams, mixed into the prediction of the lookup model.

Five minutes on two cores train on a tenth of a small text. Counting reads all of it in seconds,
and counts predict what comes next as well as the network does by then, and other things well. The
model mixes both and learns which to trust at each token: the interpolation of Jelinek and Mercer
(1980) with a network for the mixture weights, as Infini-gram (arXiv 2401.17377) has exact counts
beside a large model.

Two kinds of counts are mixture components:
    of the training text     what followed the last 1 to 4 tokens, NGRAM_ORDERS components
    of the context itself    what followed the last 0, 1 and 2 tokens earlier in the text that is
                             continued, CONTEXT_ORDERS components: a cache of its names and words
                             (Kuhn and De Mori, 1990; n-gram heads, arXiv 2401.12973)

All counts of the training text are in one sorted array of int64 keys:
    order (2 bits), hash of the context (43 bits), next token (18 bits)
so that the n-grams of one context are neighbours, found by two binary searches.

Shapes: N tokens, S = lookback tokens up to each, V vocabulary; others as in gpt.py.
"""
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import print0
from nanochat.loss import ChunkedLoss, cross_entropy_and_gradient
from nanochat.variants.lookup import LookupConfig, LookupGPT

NGRAM_ORDERS = 4           # contexts of one to four tokens, counted in the training text
MIN_COUNTS = 1, 1, 2, 2    # what was counted less often is dropped, for each order
CONTEXT_ORDERS = 3         # contexts of none, one and two tokens, counted in the context itself
CONTEXT_LOOKBACK = 512     # and this many tokens back
COMPONENTS = NGRAM_ORDERS + CONTEXT_ORDERS  # of the mixture, besides the network
HASH_BITS = 43
TOKEN_BITS = 18            # so that no vocabulary may exceed 2^18
MAX_VOCAB_SIZE = 1 << TOKEN_BITS
# Odd, and its bits look random: 2^64 over the golden ratio (Knuth's multiplicative hashing).
HASH_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


# ------------------------------------------------------------------------------------------------
# counting

def context_keys(newest_first):
    """The key of each context without its next token: a list of int64 tensors, by order.

    newest_first: the newest token, the one before it, ...: int64 tensors of one shape.
    """
    keys = []
    digest = 0
    for order, token in enumerate(newest_first):
        digest = (digest ^ (token + 1)) * HASH_MULTIPLIER  # wraps around
        digest = digest ^ (digest >> 29)
        context_hash = digest & ((1 << HASH_BITS) - 1)
        keys.append(((order << HASH_BITS) + context_hash) << TOKEN_BITS)
    return keys


def count_sorted(keys, min_count):
    """(the distinct keys counted at least min_count times, sorted; their counts, int32).

    keys: an int64 array, sorted in place.
    """
    keys.sort()
    changes = 1 + np.flatnonzero(keys[1:] != keys[:-1])
    first = np.concatenate(([0], changes))[:len(keys)]
    counts = np.diff(first, append=len(keys))
    enough = counts >= min_count
    return keys[first[enough]], counts[enough].astype(np.int32)


def count_ngrams(ids):
    """The n-grams of the tokens ids, int64 (T,), each below 2^18.

    Returns (keys int64 (n,), sorted; counts int32 (n,)).
    """
    threads = torch.get_num_threads()
    waiting = threading.Semaphore(threads)  # keys that nobody sorts yet would only take memory
    newest_first = [F.pad(ids, (back, 0))[:len(ids) - 1] for back in range(NGRAM_ORDERS)]
    orders = []
    # Sorting takes nearly all of the time and lets other threads run.
    with ThreadPoolExecutor(threads) as pool:
        for order, min_count in enumerate(MIN_COUNTS):
            waiting.acquire()
            contexts = context_keys(newest_first[:order + 1])[-1]
            keys = (contexts | ids[1:]).numpy()
            sorting = pool.submit(count_sorted, keys, min_count)
            sorting.add_done_callback(lambda _: waiting.release())  # also where sorting fails
            orders.append(sorting)
    keys, counts = zip(*(sorting.result() for sorting in orders))
    return torch.from_numpy(np.concatenate(keys)), torch.from_numpy(np.concatenate(counts))


class Counted(NamedTuple):
    """What was counted: keys and counts as count_ngrams() returns them, and of how much text."""
    keys: torch.Tensor
    counts: torch.Tensor
    tokens: int        # counted from the beginning of the text; 0: all of it


def count_texts(texts, tokenizer, max_tokens, seconds):
    """Counted n-grams of the first max_tokens tokens of an iterator of texts, or None without any.

    Reading stops after `seconds`, for counting takes three times as long as reading.
    """
    deadline = time.perf_counter() + seconds
    bos = tokenizer.get_bos_token_id()
    pieces, tokens = [], 0
    while tokens < max_tokens and time.perf_counter() < deadline:
        some = list(itertools.islice(texts, 1000))
        if not some:
            break
        pieces.append(tokenizer.encode_to_numpy(some, prepend=bos)[0])
        tokens += len(pieces[-1])
    if not pieces:
        return None
    print0(f"counting the n-grams of {min(tokens, max_tokens):,} tokens")
    ids = np.concatenate(pieces, dtype=np.int64)[:max_tokens]
    keys, counts = count_ngrams(torch.from_numpy(ids))
    everything = tokens <= max_tokens and next(texts, None) is None
    return Counted(keys, counts, 0 if everything else len(ids))


# ------------------------------------------------------------------------------------------------
# looking up

def context_matches(recent):
    """Where the newest tokens occurred before: recent (N, S), the newest last, -1 before the first.

    Returns (N, CONTEXT_ORDERS, S - 1) bool: whether the last 0, 1 and 2 tokens up to each token
    but the newest equal those up to the newest.
    """
    S = recent.size(1)
    matches = [recent[:, :-1] >= 0]
    for order in range(1, CONTEXT_ORDERS):
        same = recent[:, :S - order] == recent[:, S - order, None]
        matches.append(matches[-1] & F.pad(same, (order - 1, 0)))
    return torch.stack(matches, 1)


class Contexts(NamedTuple):
    """What is known of the contexts of N tokens, before the next token is known."""
    keys: torch.Tensor           # (N, NGRAM_ORDERS), of the contexts in the training text
    begin: torch.Tensor          # (N, NGRAM_ORDERS), where the n-grams of each begin
    continuations: torch.Tensor  # (N, NGRAM_ORDERS), how many distinct next tokens follow each
    matches: torch.Tensor        # (N, CONTEXT_ORDERS, S - 1), see context_matches()
    counts: torch.Tensor         # (N, COMPONENTS), how often each context was counted


class Targets(NamedTuple):
    """What is known of N targets."""
    context_counts: torch.Tensor  # (N, COMPONENTS), how often each context was counted
    continuations: torch.Tensor   # (N, NGRAM_ORDERS), with how many distinct next tokens
    target_counts: torch.Tensor   # (N, COMPONENTS), how often the target followed


class NGrams(nn.Module):
    """Counts as buffers, so that they are saved with the weights. size: how many are kept."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("keys", torch.empty(size, dtype=torch.long))
        # the sum of all counts before each key
        self.register_buffer("cumulative", torch.empty(size + 1, dtype=torch.int32))

    @torch.no_grad()
    def fill(self, keys, counts):
        """Take what count_ngrams() returned."""
        self.keys.copy_(keys)
        self.cumulative.copy_(torch.cat((counts.new_zeros(1), counts)).cumsum(0))

    def find_contexts(self, recent):
        """recent (N, S), the newest last, -1 before the first -> Contexts."""
        # 1. the training text: the first n-gram of each context, and the first behind the last
        newest = recent[:, -NGRAM_ORDERS:].clamp(min=0).long()
        newest_first = newest.unbind(-1)[::-1]
        keys = torch.stack(context_keys(newest_first), -1)
        begin = torch.searchsorted(self.keys, keys)
        found = self.keys[begin.clamp(max=len(self.keys) - 1)]
        known = found >> TOKEN_BITS == keys >> TOKEN_BITS
        end = begin.clone()
        end[known] = torch.searchsorted(self.keys, keys[known] + (1 << TOKEN_BITS))
        ngram_counts = self.cumulative[end] - self.cumulative[begin]
        # 2. the context itself
        matches = context_matches(recent)
        match_counts = matches.sum(-1, dtype=torch.int32)
        counts = torch.cat((ngram_counts, match_counts), -1)
        return Contexts(keys, begin, end - begin, matches, counts)

    def look_up(self, recent, targets, leave_one_out=False):
        """recent as in find_contexts, targets (N,) -> Targets.

        leave_one_out: as if this occurrence of the target had not been counted, for text that was
        (Ney, Essen and Kneser, 1995); otherwise the gate would learn to trust a context that was
        seen here and nowhere else.
        """
        contexts = self.find_contexts(recent)
        # 1. the training text
        known = contexts.continuations > 0
        wanted = (contexts.keys | targets[:, None])[known]
        at = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        times = self.cumulative[at + 1] - self.cumulative[at]
        target_counts = torch.zeros_like(contexts.counts)
        target_counts[:, :NGRAM_ORDERS][known] = torch.where(self.keys[at] == wanted, times, 0)
        # 2. the context itself
        followed = recent[:, None, 1:] == targets[:, None, None]
        in_context = (contexts.matches & followed).sum(-1, dtype=torch.int32)
        target_counts[:, NGRAM_ORDERS:] = in_context
        found = Targets(contexts.counts, contexts.continuations, target_counts)
        return without_this_one(found) if leave_one_out else found

    def next_token_probs(self, recent, contexts, weights, V):
        """The probabilities of the next token by counts alone, (N, V), times the mixture weights.

        weights (N, COMPONENTS): of each component, so that all of it sums to their sum.
        """
        N = len(recent)
        weight_of_one_count = weights / contexts.counts.clamp(min=1)
        # 1. the training text: every n-gram of every context, one after another
        continuations = contexts.continuations.flatten()
        device = recent.device
        numbers = torch.arange(len(continuations), device=device)
        context = torch.repeat_interleave(numbers, continuations)  # that each n-gram belongs to
        offset = continuations.cumsum(0) - continuations
        nth_of_context = torch.arange(len(context), device=device) - offset[context]
        begin = contexts.begin.flatten()
        at = begin[context] + nth_of_context
        token = self.keys[at] & ((1 << TOKEN_BITS) - 1)
        place = (context // NGRAM_ORDERS) * V + token
        times = self.cumulative[at + 1] - self.cumulative[at]
        weight_of_context = weight_of_one_count[:, :NGRAM_ORDERS].flatten()
        probs = times * weight_of_context[context]
        mixed = weights.new_zeros(N * V)
        mixed = mixed.index_add_(0, place, probs).view(N, V)
        # 2. the context itself
        in_context = weight_of_one_count[:, NGRAM_ORDERS:]
        matches = contexts.matches.to(weights.dtype)
        probs = torch.einsum("nc,ncs->ns", in_context, matches)
        next_tokens = recent[:, 1:].clamp(min=0).long()
        return mixed.scatter_add_(1, next_tokens, probs)


def without_this_one(found):
    """The Targets without one occurrence of each target in the training text (leave-one-out)."""
    counted = found.target_counts[:, :NGRAM_ORDERS]
    min_counts = counted.new_tensor(MIN_COUNTS)
    # with one less, an n-gram that was counted min_count times would have been dropped
    dropped = counted == min_counts
    less = torch.where(dropped, min_counts, counted.clamp(max=1))
    found.context_counts[:, :NGRAM_ORDERS] -= less
    found.target_counts[:, :NGRAM_ORDERS] -= less
    return found._replace(continuations=found.continuations - dropped.long())


# ------------------------------------------------------------------------------------------------
# the loss of the mixture

def chunk_mixture(cap, z, targets, weights, log_gate, counted):
    """The pure function of the mixture's loss: z (n, V) raw float32 logits, overwritten.

    log_gate (n,): the log of the network's mixture weight; counted (n,): the weighted probability
    that the counts give the target. The mixture gives m = gate * p[target] + counted, and the
    loss is -log m. The gradient is of that and of the network's own cross-entropy, one to one:
    alone, the mixture's would let the network rest on what the counts know (3.5 bits per byte by
    itself, and a worse mixture). So d loss / dz is the cross-entropy's times
    1 + gate * p[target] / m.

    Returns (weighted losses (n,), gradient by z (n, V), gradients by log_gate and counted).
    """
    own, gradient = cross_entropy_and_gradient(z, targets, cap)
    log_network = log_gate - own
    losses = -torch.log(log_network.exp() + counted)
    share = (log_network + losses).exp()  # of the network in the mixture
    gradient.mul_((weights * (1 + share))[:, None])
    by_gate = -share * weights
    by_counted = -losses.exp() * weights
    return losses * weights, gradient, (by_gate, by_counted)


class Gate(nn.Linear):
    """From features and counts to the mixture weights, in the dtype of its input."""
    roles = {"weight": "scalar", "bias": "scalar"}

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@dataclass
class NGramConfig(LookupConfig):
    """ngrams: how many n-grams of the training text are kept."""
    ngrams: int = 0


class NGramGPT(LookupGPT):
    """LookupGPT whose prediction is a mixture of the network and of counts.

    leave_one_out is to be set while training reads the very text that was counted.
    """
    config_class = NGramConfig
    compiles_logits = False  # how many n-grams a context has differs from token to token

    def __init__(self, config):
        super().__init__(config)
        self.ngrams = NGrams(config.ngrams)
        self.gate = Gate(config.width + COMPONENTS + NGRAM_ORDERS, 1 + COMPONENTS)
        self.leave_one_out = False
        self.lookback = max(NGRAM_ORDERS, min(config.max_seq_len, CONTEXT_LOOKBACK))

    @torch.no_grad()
    def init_weights(self):
        """As in LookupGPT; gate zero: the network and all counts weigh the same."""
        super().init_weights()
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def gate_weights(self, x, context_counts, continuations):
        """The logs of the mixture weights, (N, 1 + COMPONENTS), the network's first.

        x (N, C), context_counts (N, COMPONENTS), continuations (N, NGRAM_ORDERS). A context that
        was never counted has no weight.
        """
        counts = context_counts.log1p() / 8
        continuations = continuations.log1p() / 8
        weights = self.gate(torch.cat((x.float(), counts, continuations), -1))
        never = F.pad(context_counts == 0, (1, 0))
        return weights.masked_fill(never, -torch.inf).log_softmax(-1)

    def mixture(self, x, recent, targets):
        """The log of the network's mixture weight and what the counts give each target, (N,) both.

        x (N, C), recent (N, lookback), targets (N,).
        """
        leave_one_out = self.leave_one_out and self.training
        found = self.ngrams.look_up(recent, targets, leave_one_out)
        weights = self.gate_weights(x, found.context_counts, found.continuations)
        of_components = weights[:, 1:].exp()
        counted = of_components * found.target_counts / found.context_counts.clamp(min=1)
        return weights[:, 0], counted.sum(-1)

    def logits(self, x, recent):
        """The log of the mixed probabilities, float32 (..., V)."""
        flat = x.reshape(-1, x.size(-1))
        tokens = recent.reshape(-1, self.lookback)
        contexts = self.ngrams.find_contexts(tokens)
        weights = self.gate_weights(flat, contexts.counts, contexts.continuations).exp()
        probs = super().logits(flat, tokens).softmax(-1)
        network = weights[:, :1] * probs
        counted = self.ngrams.next_token_probs(
            tokens, contexts, weights[:, 1:], self.config.vocab_size)
        return (network + counted).log().view(*x.shape[:-1], -1)

    def loss(self, x, recent, targets, weights):
        x, recent, targets = x.flatten(0, 1), recent.flatten(0, 1), targets.flatten()
        log_gate, counted = self.mixture(x, recent, targets)
        return ChunkedLoss.apply(
            x,
            self.head_weight(),
            chunk_mixture,
            self.config.softcap,
            self.compile_loss,
            targets,
            weights.flatten(),
            log_gate,
            counted,
        )

    def target_log_probs(self, x, recent, targets):
        own = super().target_log_probs(x, recent, targets)
        return self.mixed_log_probs(own, x, recent, targets)

    def mixed_log_probs(self, own, x, recent, targets):
        """own (B, T): the network's log-probabilities of the targets -> those of the mixture."""
        x, recent = x.flatten(0, 1), recent.flatten(0, 1)
        log_gate, counted = self.mixture(x, recent, targets.flatten())
        network = (log_gate + own.flatten()).exp()
        mixed = network + counted
        return mixed.log().view(targets.shape)

    @torch.no_grad()
    def log_probs_of_both(self, idx, targets):
        x, recent = self.features(idx)
        some = targets.clamp(min=0)
        own = super().target_log_probs(x, recent, some)
        both = self.mixed_log_probs(own, x, recent, some), own
        return tuple(torch.where(targets >= 0, found, 0.0) for found in both)

    def for_chat(self):
        """The network alone as a LookupGPT: the counts know the text that was read, not how to
        answer."""
        config = asdict(self.config)
        del config["ngrams"]
        with torch.device("meta"):
            model = LookupGPT(LookupConfig(**config))
        weights = self.state_dict()
        kept = {name: weights[name] for name in model.state_dict()}
        model.load_state_dict(kept, assign=True)
        model.compute_dtype, model.compile_loss = self.compute_dtype, self.compile_loss
        model.build_rotary()
        model.choose_gradients()
        return model.train(self.training)
