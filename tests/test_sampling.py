"""Sampling: the fast path against a slow one of one sequence, probabilities, options, logprobs."""
import math
import random
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import UserError
from nanochat.sampling import (
    NUCLEUS,
    NonFiniteError,
    SamplingOptions,
    check_finite,
    large_nucleus,
    largest,
    logprobs_of,
    sample,
    wanted_logprobs,
)


def asking(uniform=0.5, prompt=(1, 2), tokens=(), **options):
    """What sample() needs of a sequence."""
    return SimpleNamespace(
        sampling=SamplingOptions(**options),
        uniform=uniform,
        prompt=list(prompt),
        tokens=list(tokens),
    )


def sample_one(logits, uniform=0.5, **options):
    """One token from logits (V,)."""
    (token,) = sample(logits[None], [asking(uniform, **options)])
    return token


UNIFORMS = [i / 1000 for i in range(1000)]


# ------------------------------------------------------------------------------------------------
# the reference implementation: one sequence, Python's numbers

def adjusted(logits, sequence):
    """Logits with bias and penalties, a list."""
    options, adjusted = sequence.sampling, list(logits)
    for token, bias in options.logit_bias.items():
        adjusted[token] += bias
    for token in {*sequence.prompt, *sequence.tokens}:
        penalty = options.repetition_penalty
        adjusted[token] *= 1 / penalty if adjusted[token] > 0 else penalty
    for token in set(sequence.tokens):
        adjusted[token] -= options.frequency_penalty * sequence.tokens.count(token)
        adjusted[token] -= options.presence_penalty
    return adjusted


def distribution(logits, sequence):
    """[(token, probability)] in the order in which they are sampled."""
    options, scores = sequence.sampling, adjusted(logits, sequence)
    if options.temperature < 1e-5:
        return [(scores.index(max(scores)), 1.0)]
    best = max(scores)
    weights = [math.exp((score - best) / options.temperature) for score in scores]
    kept = [(token, w) for token, w in enumerate(weights) if w >= options.min_p]
    top_k = options.top_k if options.top_k < len(scores) else 0
    if top_k or options.top_p < 1:
        kept.sort(key=lambda pair: -pair[1])
    kept = kept[:top_k or len(kept)]
    total, mass, inside = sum(w for _, w in kept), 0.0, []
    for token, weight in kept:
        if mass < options.top_p * total or options.top_p == 1:
            inside.append((token, weight))
        mass += weight
    if len(inside) > NUCLEUS and not top_k:
        inside.sort()
    total = sum(w for _, w in inside)
    return [(token, w / total) for token, w in inside]


def reference(logits, sequence):
    """(the token, how near the decision was: the distance of the number from the next border)."""
    cumulated, nearest, found = 0.0, 1.0, None
    for token, share in distribution(logits, sequence):
        cumulated += share
        nearest = min(nearest, abs(cumulated - sequence.uniform))
        if found is None and cumulated > sequence.uniform:
            found = token
    return found, nearest


def random_options(rng, V):
    """Options of which about half are given."""
    choices = {
        "temperature": [0, 1e-9, 0.3, 1.0, 1.7],
        "top_k": [0, 1, 5, 40, 10**6],
        "top_p": [0.05, 0.5, 0.95, 1.0],
        "min_p": [0.0, 0.02, 0.3, 1.0],
        "presence_penalty": [-1.0, 0.7],
        "frequency_penalty": [-0.5, 0.4],
        "repetition_penalty": [0.8, 1.3],
        "logit_bias": [{rng.randrange(V): 3.0, rng.randrange(V): -100}],
    }
    given = [name for name in choices if rng.random() < 0.5]
    return {name: rng.choice(choices[name]) for name in given}


@pytest.mark.parametrize("V, spread", [(40, 1.0), (8192, 3.0), (1024, 0.3), (1025, 1.0)])
def test_sequences_with_options_of_their_own_get_the_tokens_of_the_reference_implementation(
        V, spread):
    """1024: some are found by blocks, and flat logits have nuclei beyond the likeliest."""
    rng = random.Random(V + spread)
    torch.manual_seed(V)
    for _ in range(2 + 2000 // V):
        logits = torch.randn(16, V) * spread
        sequences = []
        for _ in range(16):
            tokens = [rng.randrange(V) for _ in range(rng.randrange(20))]
            options = random_options(rng, V)
            sequences.append(asking(rng.random(), range(rng.randrange(30)), tokens, **options))
        for row, sequence, token in zip(logits, sequences, sample(logits, sequences)):
            wanted, nearest = reference(row.tolist(), sequence)
            assert token == wanted or nearest < 1e-5, sequence


def test_sequences_sampled_together_get_what_each_gets_alone():
    """docs/traps.md: shared-rng"""
    torch.manual_seed(0)
    rng = random.Random(0)
    logits = torch.randn(40, 4096)
    sequences = [asking(rng.random(), **random_options(rng, 4096)) for _ in range(40)]
    each = [sample(row[None], [sequence])[0] for row, sequence in zip(logits, sequences)]
    assert sample(logits, sequences) == each


def test_a_nucleus_that_a_rounding_error_would_lose_has_a_token():
    torch.manual_seed(0)
    for seed in range(50):
        logits = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        token = sample_one(logits, 1 - 2.0**-24, top_k=0, top_p=0.9999999)
        assert 0 <= token < 4096


# ------------------------------------------------------------------------------------------------
# probabilities

def test_sampling_at_temperature_zero_is_greedy_and_top_k_bounds_it():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    assert sample_one(logits, temperature=0) == 1
    assert {sample_one(logits, uniform, top_k=2) for uniform in UNIFORMS} == {1, 3}
    assert {sample_one(logits, uniform, top_k=0) for uniform in UNIFORMS} == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 3), (1.5, 50)])
def test_evenly_spaced_uniform_numbers_give_every_token_its_probability(temperature, top_k):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1, 1.1, -torch.inf])
    count = len(UNIFORMS)
    options = {"temperature": temperature, "top_k": top_k}
    sequences = [asking(uniform, **options) for uniform in UNIFORMS]
    tokens = sample(logits.expand(count, -1), sequences)
    shares = torch.bincount(torch.tensor(tokens), minlength=6) / count
    kept = logits.clone()
    if top_k and top_k < len(logits):
        kept[logits < logits.sort().values[-top_k]] = -torch.inf
    wanted = torch.softmax(kept / temperature, -1)
    assert (shares - wanted).abs().max() < 0.002


@pytest.mark.parametrize("options", [{}, {"top_k": 280}, {"top_p": 0.99}, {"min_p": 0.001}])
def test_the_largest_uniform_number_never_gives_a_token_that_cannot_come(options):
    largest_number = 1 - 2.0**-24
    for seed in range(100):
        logits = torch.randn(320, generator=torch.Generator().manual_seed(seed)) * 3
        logits[-50:] = -torch.inf
        assert sample_one(logits, largest_number, **{"top_k": 0, **options}) < 270
    assert sample_one(torch.tensor([-torch.inf, 0.0]), 0.0, top_k=0) == 1


def test_equal_logits_give_the_first_of_them():
    logits = torch.zeros(96)
    logits[[40, 41, 77]] = 2.0
    assert sample_one(logits, temperature=0) == 40
    assert sample_one(logits[:95], temperature=0) == 40


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.95, 0.999999])
def test_a_large_nucleus_found_digit_by_digit_is_that_found_by_sorting(top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3000, generator=generator) * torch.arange(8)[:, None]
    probs = torch.softmax(logits, -1)       # the first row has equal ones only
    kept = large_nucleus(probs, torch.full((8, 1), top_p))
    for row, own in zip(probs.double(), kept):
        values = row.sort(descending=True).values
        mass = values.cumsum(-1)
        last = values[int((mass < top_p - 1e-7).sum())], values[int((mass < top_p + 1e-7).sum())]
        assert last[1] <= own[own > 0].min() <= last[0]
        assert torch.equal(own > 0, row >= own[own > 0].min())


@pytest.mark.parametrize("V", [64, 640, 4096, 4097])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_the_largest_are_found_by_blocks_as_by_sorting(V, k):
    values = torch.randn(3, V, generator=torch.Generator().manual_seed(V))
    found, places = largest(values, k)
    assert torch.equal(found, values.sort(-1, descending=True).values[:, :k])
    assert torch.equal(values.gather(1, places), found)


# ------------------------------------------------------------------------------------------------
# what is refused

def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(50) * 5
    for temperature in (1e-50, 1e-40, 9e-6):
        assert sample_one(logits, 0.999, temperature=temperature) == int(logits.argmax())


@pytest.mark.parametrize("wrong, hint", [
    ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
    ({"temperature": math.nan}, "temperature=nan must be at least 0"),
    ({"top_k": -1}, "top_k=-1 must be at least 0"),
    ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_p": math.nan}, "top_p=nan"),
    ({"min_p": -0.1}, "from 0 to 1"),
    ({"presence_penalty": 2.1}, "from -2 to 2"),
    ({"frequency_penalty": -3}, "from -2 to 2"),
    ({"repetition_penalty": 0}, "above 0"),
    ({"repetition_penalty": math.inf}, "above 0"),
    ({"logprobs": 21}, "from 0 to 20"),
    ({"logprobs": -1}, "from 0 to 20"),
    ({"logit_bias": {5: 101}}, "token 5 is 101"),
    ({"logit_bias": {5: math.nan}}, "from -100 to 100"),
])
def test_an_option_out_of_range_is_refused_with_its_value_and_its_range(wrong, hint):
    with pytest.raises(UserError, match=hint):
        SamplingOptions(**wrong)


def test_a_bias_of_a_token_that_does_not_exist_is_refused():
    SamplingOptions(logit_bias={0: 1, 96: 1}).check_vocabulary(97)
    for token in (-1, 97):
        with pytest.raises(UserError, match="from 0 to 96"):
            SamplingOptions(logit_bias={token: 1}).check_vocabulary(97)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("logits", [
    [0.0, NAN, 1.0, 2.0], [NAN] * 4, [0.0, 1.0, 2.0, INF], [-INF] * 4, [NAN, INF, -INF, 0.0],
])
@pytest.mark.parametrize("options", [
    {"temperature": 0},
    {},
    {"top_k": 2},
    {"top_k": 0},
    {"top_k": 0, "top_p": 0.9},
    {"min_p": 0.1, "repetition_penalty": 2.0},
])
def test_a_sequence_whose_logits_are_not_finite_gets_no_token_and_the_others_get_theirs(
        logits, options):
    """docs/traps.md: non-finite-logits"""
    rows = torch.tensor([[0.0, 9.0, 1.0, 2.0], logits, [9.0, 0.0, 1.0, 2.0]])
    for dtype in (torch.float32, torch.bfloat16):
        tokens = sample(rows.to(dtype), [asking(prompt=[3], **options)] * 3)
        assert tokens == [1, None, 0]


def test_scores_that_are_not_finite_have_no_best():
    check_finite(torch.tensor([[-3.0, 1e9]]))
    for wrong in (NAN, INF, -INF):
        with pytest.raises(NonFiniteError):
            check_finite(torch.tensor([[0.0, wrong], [1.0, 2.0]]))


def test_a_token_that_is_ruled_out_is_no_error():
    logits = torch.tensor([-INF, 1.0, -INF])
    for options in ({"temperature": 0}, {}, {"top_k": 2}, {"top_k": 0}, {"top_p": 0.5}):
        assert sample_one(logits, **options) == 1


# ------------------------------------------------------------------------------------------------
# logprobs

def test_logprobs_are_those_of_the_model_whatever_the_sampling_options():
    logits = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.1, "logit_bias": {7: 100}, "presence_penalty": 2.0}
    sequences = [asking(logprobs=3, **options), asking(**options)]
    tokens = sample(logits, sequences)
    scored, other = wanted_logprobs(logits, sequences, tokens)
    wanted = logits[0].log_softmax(-1)
    assert tokens == [7, 7] and other is None
    assert scored.token == 7 and scored.logprob == pytest.approx(float(wanted[7]))
    values, ids = wanted.topk(3)
    assert [token for token, _ in scored.top] == ids.tolist()
    assert [value for _, value in scored.top] == pytest.approx(values.tolist())


def test_logprobs_without_alternatives_are_of_the_token_alone():
    logits = torch.randn(2, 64)
    scored = wanted_logprobs(logits, [asking(logprobs=0), asking(logprobs=2)], [5, 6])
    assert [(one.token, len(one.top)) for one in scored] == [(5, 0), (6, 2)]
    assert wanted_logprobs(logits, [asking(logprobs=0)] * 2, [None, 6])[0] is None
    assert logprobs_of(logits[:0], [], 5) == []
