"""Sampling: from the logits of n sequences to the next token of each, for all of them at once.

    tokens = sample(logits, sequences)      # n ids; None where a model's logits are not finite

Every sequence has SamplingOptions of its own, and they are applied in vLLM's order:

1. logit_bias is added to the logits
2. repetition_penalty, frequency_penalty, presence_penalty
3. temperature; below MIN_TEMPERATURE the largest logit is taken, and nothing else matters
4. min_p    drops the tokens below that share of the likeliest one's probability
            (Nguyen et al. 2024, arXiv 2407.01082)
5. top_k    keeps this many of the likeliest tokens
6. top_p    keeps the fewest of the likeliest tokens that together have this share of what is left
            (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751)

What is left is sampled by the inverse of its distribution function: one number in [0, 1) of the
sequence's own decides, so that a sequence gets the same tokens alone and among others. The tokens
stand in the order of their ids; with top_k or in a nucleus of at most NUCLEUS tokens, the likeliest
first.

Sequences with the same top_k are one computation. No vocabulary is sorted: the k largest of V
logits are found among the k blocks whose maxima are the largest, which is many times faster on a
CPU. A nucleus is looked for among the NUCLEUS likeliest tokens first.

Shapes: n sequences, V vocabulary, k candidates.
"""
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat.common import UserError

MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy, as in vLLM
MAX_TEMPERATURE = 2     # as in OpenAI's API
BLOCK = 32              # logits of which the maximum is taken before the largest are looked for
NUCLEUS = 64            # tokens among which a nucleus is looked for first
DIGIT_BITS = 10
DIGITS = 1 << DIGIT_BITS
MAX_LOGPROBS = 20       # alternatives that may be asked for, as in OpenAI's API
MAX_BIAS = 100


class NonFiniteError(UserError):
    """The model gave logits that are NaN or infinite: there is no next token."""

    status = 500    # of the server's answer: the request is not at fault

    def __init__(self):
        super().__init__(
            "the model's logits are not finite (NaN or infinite): its weights have diverged, or "
            "overflow in this dtype; take an earlier step, or --dtype=float32"
        )


def check_finite(scores):
    """NonFiniteError where one of several scores, of which the best is wanted, is not finite."""
    if not scores.isfinite().all():
        raise NonFiniteError


# ------------------------------------------------------------------------------------------------
# options

# (the smallest value, the largest) of each option that has both
RANGES = {
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of a sequence are sampled. UserError for values out of range.

    temperature           what logits are divided by, 0 to 2; 0: the likeliest token
    top_k                 how many of the likeliest tokens may come; 0: all
    top_p                 the share of the probability that they have, above 0; 1: all
    min_p                 the least share of the likeliest token's probability, 0 to 1
    presence_penalty      subtracted from the logits of all tokens generated before, -2 to 2
    frequency_penalty     the same, times how often each was generated
    repetition_penalty    above 0: divides positive logits and multiplies negative ones of all
                          tokens of the prompt and the answer (Keskar et al. 2019, arXiv 1909.05858)
    logit_bias            {token id: what is added to its logit, -100 to 100}
    logprobs              None, or how many alternatives are wanted with each token's logprob
    """
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict = field(default_factory=dict)
    logprobs: int = None

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, 1)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value}: it must be from {low} to {high}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: it must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty={self.repetition_penalty}: it must be above 0")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs={self.logprobs}: it must be from 0 to {MAX_LOGPROBS}")
        for token, bias in self.logit_bias.items():
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise UserError(
                    f"logit_bias of token {token} is {bias}: "
                    f"it must be from {-MAX_BIAS} to {MAX_BIAS}")

    def check_vocabulary(self, vocab_size):
        """UserError for a bias of a token that is not in a vocabulary of this size."""
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"logit_bias names token {token}: the ids are from 0 to {vocab_size - 1}")

    @property
    def is_greedy(self):
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalty(self):
        added = self.presence_penalty or self.frequency_penalty
        return bool(added) or self.repetition_penalty != 1


def check_sampling(temperature, top_k, max_new_tokens):
    """UserError for a value with which nothing can be sampled. It names the one that is wrong."""
    rules = (
        ("temperature", temperature, 0, "; 0 takes the likeliest token"),
        ("top_k", top_k, 0, "; 0 allows all tokens"),
        ("max_tokens", max_new_tokens, 1, ""),
    )
    for name, value, lowest, meaning in rules:
        if not value >= lowest:     # written so that NaN does not pass
            raise UserError(f"{name}={value} must be at least {lowest}{meaning}")
    if temperature > MAX_TEMPERATURE:
        raise UserError(f"temperature={temperature} must be at most {MAX_TEMPERATURE}")


# ------------------------------------------------------------------------------------------------
# sampling

def sample(logits, sequences):
    """The next token of each of n sequences, a list of ids, from their logits (n, V).

    sequences: whatever has .sampling (SamplingOptions), .uniform (a number in [0, 1)), .prompt and
    .tokens. None stands for the token of a sequence whose largest logit is no finite number; -inf
    for some tokens is fine.
    """
    logits = biased(logits.float(), sequences)
    is_finite = logits.amax(-1).isfinite()  # a NaN is the largest of all

    # 1. the sequences that take the same path, which is one computation for all of them
    paths = {}
    for place, sequence in enumerate(sequences):
        paths.setdefault(path_of(sequence.sampling, logits.size(1)), []).append(place)

    # 2. their tokens
    choices = [None] * len(sequences)
    for path, places in paths.items():
        some = logits if len(paths) == 1 else logits[places]
        found = PATHS[path.name](some, [sequences[place] for place in places], path.top_k)
        found = torch.where(is_finite if len(paths) == 1 else is_finite[places], found, -1)
        for place, choice in zip(places, found.tolist()):
            choices[place] = None if choice < 0 else choice
    return choices


class Path(NamedTuple):
    """How a token is found: the name of a function in PATHS, and a top_k below V, or 0."""
    name: str
    top_k: int


def path_of(options, V):
    """The Path of a sequence with these options."""
    if options.is_greedy:
        return Path("greedy", 0)
    if 0 < options.top_k < V:
        return Path("top_k", options.top_k)
    return Path("top_p" if options.top_p < 1 else "all", 0)


def likeliest(logits, sequences, _):
    """The ids of the largest logits, (n,). logits (n, V). Of equal ones the first."""
    n, V = logits.shape
    if V % BLOCK:
        return logits.argmax(-1)
    blocks = logits.reshape(n, V // BLOCK, BLOCK)
    block = blocks.amax(-1).argmax(-1)  # n
    within = blocks[torch.arange(n, device=logits.device), block].argmax(-1)
    return block * BLOCK + within


def draw_from_all(logits, sequences, _):
    """A token for each sequence that has neither top_k nor top_p, (n,). logits (n, V)."""
    numbers = numbers_of(sequences, logits.device)
    probs = torch.softmax(scaled(logits, numbers), -1)
    return invert(without_unlikely(probs, sequences, numbers), numbers)


def draw_from_top_k(logits, sequences, top_k):
    """A token for each sequence, among the top_k likeliest or a nucleus of those, (n,)."""
    numbers = numbers_of(sequences, logits.device)
    values, ids = largest(logits, top_k)
    probs = torch.softmax(scaled(values, numbers), -1)
    probs = without_unlikely(probs, sequences, numbers)
    probs = nucleus(probs, probs.sum(-1, keepdim=True), numbers)[0]
    return ids.gather(1, invert(probs, numbers)[:, None])[:, 0]


def draw_from_nucleus(logits, sequences, _):
    """A token for each sequence that has top_p and no top_k, (n,). logits (n, V)."""
    # 1. the probabilities of the whole vocabulary, and what the nucleus must reach
    numbers = numbers_of(sequences, logits.device)
    probs = torch.softmax(logits / numbers[0], -1)
    probs = without_unlikely(probs, sequences, numbers)
    total = probs.sum(-1, keepdim=True)

    # 2. the nucleus, where the likeliest tokens contain it
    likely, ids = largest(probs, min(NUCLEUS, probs.size(1)))
    kept, is_whole = nucleus(likely, total, numbers)
    choices = ids.gather(1, invert(kept, numbers)[:, None])[:, 0]

    # 3. the others
    rest = (~is_whole).nonzero()[:, 0]
    if len(rest):
        numbers = numbers[:, rest]
        kept = large_nucleus(probs[rest], numbers[2] * total[rest])
        choices[rest] = invert(kept, numbers)
    return choices


def large_nucleus(probs, enough):
    """probs (n, V) with 0 outside of the nucleus: the likeliest that sum to `enough` (n, 1), and
    others as likely as the last of them.

    Positive floats are in the order of their bits, read as integers, and 1.0 has 30 of them. So the
    smallest probability of the nucleus is found digit by digit (radix selection): at each digit,
    the probabilities that begin like it are summed by the value of theirs. Sorting 32,768 floats
    takes ten times as long.
    """
    bits = probs.view(torch.int32)
    border = torch.zeros_like(enough, dtype=torch.int32)    # n, 1
    for shift in (20, 10, 0):
        begins_alike = bits >> (shift + DIGIT_BITS) == border >> (shift + DIGIT_BITS)
        digits = bits >> shift & (DIGITS - 1)
        digit, above = digit_at(digits, probs * begins_alike, enough)
        border = border + (digit << shift)
        enough = enough - above
    return probs * (bits >= border)


def digit_at(digits, weights, enough):
    """Where the weights (n, V) of the largest digits (n, V) reach `enough` (n, 1).

    Returns (that digit as int32, the weight of all larger ones), (n, 1) both.
    """
    n = len(digits)
    first = torch.arange(0, n * DIGITS, DIGITS, device=digits.device)[:, None]
    flat = (digits + first).flatten()
    sums = torch.bincount(flat, weights.flatten(), n * DIGITS).view(n, DIGITS)
    from_above = sums.flip(-1).cumsum(-1)
    place = torch.searchsorted(from_above, enough.to(sums.dtype)).clamp(max=DIGITS - 1)
    above = from_above.gather(1, place) - sums.flip(-1).gather(1, place)
    return (DIGITS - 1 - place).int(), above


PATHS = {
    "greedy": likeliest,
    "all": draw_from_all,
    "top_k": draw_from_top_k,
    "top_p": draw_from_nucleus,
}


def numbers_of(sequences, device):
    """(4, n, 1) float32: temperature, uniform number, top_p and min_p of each sequence."""
    numbers = []
    for sequence in sequences:
        options = sequence.sampling
        numbers.append((options.temperature, sequence.uniform, options.top_p, options.min_p))
    return torch.tensor(numbers, device=device).T[:, :, None]


def scaled(logits, numbers):
    """logits (n, k) divided by the temperatures, 0 for the largest, so that none overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / numbers[0]


def without_unlikely(probs, sequences, numbers):
    """probs (n, k) with 0 for those below min_p times the largest one."""
    if not any(sequence.sampling.min_p for sequence in sequences):
        return probs
    return probs * (probs >= numbers[3] * probs.amax(-1, keepdim=True))


def nucleus(probs, total, numbers):
    """(probs (n, k) with 0 outside of the nucleus, whether it is among these k at all (n,)).

    probs: the k largest of a vocabulary, the largest first, and total (n, 1) the sum of all. The
    nucleus ends with the token that makes it reach top_p; with top_p 1 it is everything.
    """
    top_p = numbers[2]
    cumulated = probs.cumsum(-1)
    missing = cumulated < top_p * total
    before = torch.nn.functional.pad(missing[:, :-1], (1, 0), value=True)
    inside = before | (top_p >= 1)
    return probs * inside, ~missing[:, -1]


def invert(probs, numbers):
    """The place in probs (n, k) at which their sum exceeds uniform * total, (n,).

    A uniform number has 24 bits, so that float32 holds it exactly and the product stays below the
    total. Where probs are NaN, any place.
    """
    cumulated = probs.cumsum(-1)
    places = torch.searchsorted(cumulated, numbers[1] * cumulated[:, -1:], right=True)[:, 0]
    return places.clamp(max=probs.size(1) - 1)


def largest(values, k):
    """(the k largest of values (n, V), the largest first, and their places), (n, k) both.

    They are among the k blocks with the largest maxima.
    """
    n, V = values.shape
    if V % BLOCK or k * BLOCK > V // 2:
        return values.topk(k)
    blocks = values.reshape(n, V // BLOCK, BLOCK)
    best = blocks.amax(-1).topk(k).indices                                    # n, k
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK))     # n, k, BLOCK
    found, at = candidates.flatten(1).topk(k)
    return found, best.gather(1, at // BLOCK) * BLOCK + at % BLOCK


# ------------------------------------------------------------------------------------------------
# biases and penalties

def biased(logits, sequences):
    """logits (n, V) with the biases and penalties of the sequences that have some."""
    places = []
    for place, sequence in enumerate(sequences):
        if sequence.sampling.logit_bias or sequence.sampling.has_penalty:
            places.append(place)
    if not places:
        return logits
    logits = logits.clone()
    for place in places:
        add_bias(logits[place], sequences[place].sampling.logit_bias)
        penalise(logits[place], sequences[place])
    return logits


def add_bias(logits, logit_bias):
    """Add {token id: bias} to logits (V,), in place."""
    if logit_bias:
        ids = torch.tensor(list(logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(logit_bias.values()), device=logits.device).float()


def penalise(logits, sequence):
    """Apply the three penalties of a sequence to its logits (V,), in place."""
    options = sequence.sampling
    if options.repetition_penalty != 1:
        seen = torch.tensor(list({*sequence.prompt, *sequence.tokens}), device=logits.device)
        before, penalty = logits[seen], options.repetition_penalty
        logits[seen] = torch.where(before > 0, before / penalty, before * penalty)
    if sequence.tokens and (options.frequency_penalty or options.presence_penalty):
        generated = torch.tensor(sequence.tokens, device=logits.device)
        ids, counts = generated.unique(return_counts=True)
        logits[ids] -= options.frequency_penalty * counts + options.presence_penalty


# ------------------------------------------------------------------------------------------------
# logprobs

class TokenLogprob(NamedTuple):
    """The log-probability of a token by the model, before biases, penalties and temperature."""
    token: int
    logprob: float      # in nats
    top: list           # [(token id, logprob)] of the likeliest tokens, the likeliest first


def logprobs_of(logits, tokens, top):
    """A TokenLogprob for each of n tokens, from logits (n, V). top: how many alternatives."""
    if not tokens:
        return []
    scores = logits.float().log_softmax(-1)
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    own = scores.gather(1, ids)[:, 0].tolist()
    values, others = largest(scores, top)
    rows = zip(tokens, own, others.tolist(), values.tolist())
    return [TokenLogprob(token, logprob, list(zip(*best))) for token, logprob, *best in rows]


def wanted_logprobs(logits, sequences, tokens):
    """A TokenLogprob for each of n sequences that wants them and has a token; None for the others.
    """
    found = [None] * len(sequences)
    places = []
    for place, sequence in enumerate(sequences):
        if sequence.sampling.logprobs is not None and tokens[place] is not None:
            places.append(place)
    if not places:
        return found
    most = max(sequences[place].sampling.logprobs for place in places)
    scored = logprobs_of(logits[places], [tokens[place] for place in places], most)
    for place, one in zip(places, scored):
        found[place] = one._replace(top=one.top[:sequences[place].sampling.logprobs])
    return found
