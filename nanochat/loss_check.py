"""Can a loss be trusted? Three properties without which bits per byte mean nothing.

    for finding in check_loss(model, tokenizer, documents, device):
        print(finding.line())

1. The probabilities that are scored sum to 1 over the vocabulary, and are those that the engine
   samples from. (Counts that were mixed in without a weight taken from the network would not.)
2. Causality: another token at position t changes no score before t. (Attention that looks ahead
   scores well, and generates nothing of use.)
3. The bytes that are counted are those of the text. The targets spell the text, each token is a
   target once, and special tokens have no bytes.

Shapes as in gpt.py.
"""
import time
from typing import NamedTuple

import torch

from nanochat.loss_eval import cut_into_sequences, score_documents
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_SUM_ERROR = 1e-4        # of probabilities; float32 sums of 65,536 of them come within 1e-5
MAX_SCORE_ERROR = 1e-3      # nats, between two ways to compute one score in float32
MAX_LEAK = 1e-5             # nats; one way to compute it, so that a causal model has 0 on a CPU.
                            # Attention that looks ahead leaks little before it has learnt to
CHANGED_TOKENS = 8          # positions at which another token is tried
SUM_POSITIONS = 16          # positions whose probabilities are summed
SUM_SECONDS = 10.0          # after which no further one is begun
SUM_TARGETS = 512           # targets that are scored together

# What bytes are counted wrong by: letters of two bytes and of three, an emoji of four, which tokens
# cut, accents that may be composed, control tokens typed by a user, and white space at both ends.
PROBE = (
    b" caf\xc3\xa9, cafe\xcc\x81, \xe6\x98\xa5\xe5\xa4\xa9, \xf0\x9f\x98\x80\xf0\x9f\x8e\x89 "
    b"<|bos|><|user_start|> \x00\ttabs\r\nand\xe2\x80\xa8lines\n\n "
)


class Finding(NamedTuple):
    """One property of a loss. value: by how much it is missed; limit: how much may be."""
    name: str
    value: float
    limit: float
    what: str

    @property
    def passed(self):
        return self.value <= self.limit  # written so that NaN does not pass

    def line(self):
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:14s} {verdict}  {self.what}: {self.value:.2g}, at most {self.limit:g}"


@torch.no_grad()
def check_loss(model, tokenizer, documents, device):
    """The Findings of a model with its tokenizer; documents: a few texts (list of str).

    The model is to compute in float32: the limits are for it.
    """
    was_training = model.training
    model.eval()
    longest = cut_into_sequences(documents, tokenizer, model.config.max_seq_len)[-1]
    ids = torch.tensor(longest, device=device)
    findings = [
        *check_probabilities(model, ids),
        check_causality(model, ids),
        *check_bytes(model, tokenizer, documents, device),
    ]
    model.train(was_training)
    return findings


# ------------------------------------------------------------------------------------------------
# 1. probabilities

def check_probabilities(model, ids):
    """Findings on the probabilities behind the tokens ids, (T + 1,)."""
    x, recent = model.features(ids[None, :-1])
    T = x.size(1)
    deadline = time.perf_counter() + SUM_SECONDS
    errors = []
    for position in spread(T, SUM_POSITIONS):
        errors.append(abs(sum_of_probabilities(model, x, recent, position) - 1))
        if time.perf_counter() > deadline:
            break
    summed = Finding(
        "probabilities", largest(errors), MAX_SUM_ERROR, "|sum - 1| over the vocabulary, at "
        f"{len(errors)} of {T} positions")

    scored = model.target_log_probs(x, recent, ids[None, 1:])
    sampled = model.logits(x, recent).log_softmax(-1).gather(-1, ids[None, 1:, None])[..., 0]
    difference = (scored - sampled).abs().max().item()
    return summed, Finding(
        "sampling", difference, MAX_SCORE_ERROR, "nats between what is scored and what is sampled "
        "from")


def sum_of_probabilities(model, x, recent, position):
    """The sum over all targets of exp(target_log_probs) at one position of x (1, T, C)."""
    x = x[:, position:position + 1]
    if recent is not None:
        recent = recent[:, position:position + 1]
    total = 0.0
    for targets in torch.arange(model.config.vocab_size, device=x.device).split(SUM_TARGETS):
        n = len(targets)
        tokens = None if recent is None else recent.expand(-1, n, -1)
        log_probs = model.target_log_probs(x.expand(-1, n, -1), tokens, targets[None])
        total += log_probs.cpu().double().exp().sum().item()
    return total


def largest(numbers):
    """The largest number of a list, NaN where one is (which max() may pass over)."""
    return torch.tensor(numbers, dtype=torch.float64).max().item()


def spread(length, count):
    """At most `count` positions below `length` at equal distances, with the first and the last.

    >>> spread(9, 3)
    [0, 4, 8]
    """
    count = min(count, length)
    steps = max(1, count - 1)
    return [i * (length - 1) // steps for i in range(count)]


# ------------------------------------------------------------------------------------------------
# 2. causality

def check_causality(model, ids):
    """The Finding on what another token changes before it. ids (T + 1,)."""
    T = len(ids) - 1
    changed = spread(T, CHANGED_TOKENS)
    inputs = ids[:-1].repeat(1 + len(changed), 1)  # the first sequence stays as it is
    for sequence, t in enumerate(changed, start=1):
        inputs[sequence, t] = (ids[t] + 1) % model.config.vocab_size
    scores = model.log_probs(inputs, ids[1:].expand(len(inputs), -1).contiguous())
    differences = [0.0]
    for sequence, t in enumerate(changed, start=1):
        before = (scores[sequence, :t] - scores[0, :t]).abs()
        differences += before.tolist()
    return Finding(
        "causality", largest(differences), MAX_LEAK, "nats by which another token changes "
        f"a score before it, {len(changed)} tokens of {T}")


# ------------------------------------------------------------------------------------------------
# 3. bytes

def check_bytes(model, tokenizer, documents, device):
    """Findings on how bytes are counted and what the targets spell."""
    T = model.config.max_seq_len
    probe = PROBE.decode("utf-8")
    every = [probe, *documents]
    score = score_documents(model, tokenizer, every, device)
    wanted = sum(len(text.encode("utf-8")) for text in documents) + len(PROBE)
    yield Finding("bytes", abs(score.bytes - wanted), 0, f"bytes counted wrong, of {wanted:,}")

    lost, tokens = 0, 0
    for text in every:
        targets = targets_of(text, tokenizer, T)
        lost += tokenizer.decode(targets) != text
        tokens += len(targets)
    yield Finding(
        "whole text", lost, 0, f"documents that their targets do not spell, of {len(every)}")
    yield Finding(
        "tokens", abs(score.tokens - tokens), 0, f"tokens counted wrong, of {tokens:,}")

    if isinstance(tokenizer, Tokenizer):
        lengths = tokenizer.token_bytes()
        spelled = sum(lengths[token] for token in targets_of(probe, tokenizer, T))
        special = sum(lengths[tokenizer.encode_special(name)] for name in SPECIAL_TOKENS)
        yield Finding(
            "token bytes", abs(spelled - len(PROBE)) + special, 0, "bytes of tokens that differ "
            "from the text's, or are of special tokens")


def targets_of(text, tokenizer, T):
    """The ids that are targets of a document, in the order of the text."""
    # cut_into_sequences() sorts by length, and Python's sort is stable: only the last piece of a
    # document is shorter than the others, and comes first
    first, *full = cut_into_sequences([text], tokenizer, T)
    pieces = [*full, first] if len(first) < T + 1 else [first, *full]
    return [token for piece in pieces for token in piece[1:]]
