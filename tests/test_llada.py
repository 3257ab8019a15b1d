"""LLaDA: its objective, its bound, and the engine that fills in blocks of masks."""
import itertools
import json
import math
import random

import numpy as np
import pytest
import requests
import torch
from chat_fakes import MODEL, serve

from models import CONTEXT, VOCAB_SIZE, make_model, noise
from nanochat.answers import Answerer, Noise
from nanochat.common import UserError
from nanochat.dataloader import IGNORED, one_answer, sft_data_generator
from nanochat.diffusion_engine import (
    Block,
    Denoising,
    DiffusionEngine,
    denoising_of,
    engine_of,
    propose,
    serving_engine_of,
)
from nanochat.engine import Engine
from nanochat.gpt import GPT, require_causal
from nanochat.loss_eval import evaluate_bpb, set_draws
from nanochat.sampling import SamplingOptions
from nanochat.tokenizer import Tokenizer
from nanochat.variants.likelihood_bound import draw_hidden
from nanochat.variants.llada import MIN_SHARE, LLaDAConfig, LLaDAGPT

BOS, MASK = VOCAB_SIZE - 12, VOCAB_SIZE - 1


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20]
    return Tokenizer.train_from_iterator(texts, 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(LLaDAGPT, vocab_size=tokenizer.get_vocab_size()).eval()


@pytest.fixture
def engine(model, tokenizer):
    return DiffusionEngine(model, tokenizer, denoising=Denoising(block_length=6))


def words(*shape):
    """Random ids of ordinary tokens."""
    return torch.randint(BOS, shape)


# -------------------------------------------------------------------------------- the model

def test_the_config_finds_bos_and_mask_where_the_tokenizer_puts_them(tokenizer):
    config = LLaDAConfig.from_depth(1, tokenizer.get_vocab_size(), 32)
    assert config.bos_token == tokenizer.get_bos_token_id()
    assert config.mask_token == tokenizer.encode_special("<|mask|>")


def test_a_token_sees_both_sides_of_its_own_document_and_nothing_else():
    model = make_model(LLaDAGPT).eval()
    idx = words(1, 12)
    idx[0, [0, 5]] = BOS
    with torch.no_grad():
        before = model(idx)[0]
        changed = idx.clone()
        changed[0, 9] = (idx[0, 9] + 1) % BOS
        after = model(changed)[0]
    moved = (before != after).any(-1).tolist()
    assert moved == [False] * 5 + [True] * 7


def test_mask_has_no_probability_and_the_others_sum_to_one():
    model = make_model(LLaDAGPT).eval()
    logits = model(words(2, 8))
    assert logits.shape == (2, 8, VOCAB_SIZE - 1)
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, 8))
    idx, targets = words(2, 8), words(2, 8)
    wanted = -logits_of(model, idx).log_softmax(-1).gather(-1, targets[..., None]).sum()
    torch.testing.assert_close(model(idx, targets), wanted)
    targets[0] = MASK   # is no target, and has no loss
    half = model(idx, targets)
    torch.testing.assert_close(half, model(idx[1:], targets[1:]), atol=1e-3, rtol=1e-4)


def logits_of(model, idx):
    with torch.no_grad():
        return model(idx)


def test_all_pairs_of_positions_are_counted_as_flops():
    plain = GPT(GPT.config_class.from_depth(2, VOCAB_SIZE, CONTEXT)).flops(64)
    ours = LLaDAGPT(LLaDAConfig.from_depth(2, VOCAB_SIZE, CONTEXT)).flops(64)
    assert ours == (plain.weights, plain.square, plain.square)


# -------------------------------------------------------------------------------- training

def test_every_token_is_hidden_with_the_probability_by_which_its_loss_is_divided():
    model = make_model(LLaDAGPT)
    ids = words(400, 32)
    ids[:, 16] = BOS
    batch = model.noised([(ids, ids, "state")], step=1, rank=0)[0]
    noisy, targets, weights = batch
    hidden = noisy == MASK
    assert torch.equal(noisy[~hidden], ids[~hidden]) and torch.equal(targets[hidden], ids[hidden])
    assert (targets[~hidden] == IGNORED).all() and (weights[~hidden] == 0).all()
    assert not hidden[:, 0].any() and not hidden[:, 16].any()    # given, and <|bos|>
    # one p for each document, so that there are two in a row
    for part in (slice(1, 16), slice(17, 32)):
        for row, ones in zip(weights[:, part], hidden[:, part]):
            assert len(row[ones].unique()) <= 1
    both = hidden[:, 1:16].any(1) & hidden[:, 17:].any(1)
    assert (weights[both, 1:16].amax(1) != weights[both, 17:].amax(1)).float().mean() > 0.9
    # E[hidden / p] is 1 for every token that may be hidden
    assert weights[:, 1:16].mean().item() == pytest.approx(1, abs=0.1)
    assert weights.max() <= 1 / MIN_SHARE


def test_the_noise_follows_from_step_and_rank_alone():
    model = make_model(LLaDAGPT)
    batches = [(noise(2, 16), noise(2, 16), None)]
    first, again = (model.noised(batches, 3, 0)[0][0] for _ in range(2))
    assert torch.equal(first, again)
    others = [model.noised(batches, *which)[0][0] for which in ((4, 0), (3, 1))]
    assert not any(torch.equal(first, other) for other in others)
    assert make_model().noised(batches, 3, 0) is batches    # other models train on what is there


def test_one_batch_of_text_in_a_hundred_has_shorter_documents():
    model = make_model(LLaDAGPT)
    ids = words(1, 16)
    noised = model.noised([(ids, ids)] * 3000, step=5, rank=0, is_text=True)
    shorter = [noisy for noisy, *_ in noised if (noisy == BOS).any()]
    assert 10 <= len(shorter) <= 60
    lengths = {int((row[0] == BOS).nonzero()[:2].diff(dim=0).sum()) for row in shorter}
    assert len(lengths) > 4
    chat = model.noised([(ids, ids)] * 1000, step=5, rank=0)
    assert not any((noisy == BOS).any() for noisy, *_ in chat)


def test_the_loss_is_the_weighted_sum_of_what_is_hidden():
    model = make_model(LLaDAGPT)
    ids = words(4, 16)
    noisy, targets, weights = model.noised([(ids, ids)], step=2, rank=0)[0]
    each = model(noisy).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    wanted = -(each * weights).sum()
    torch.testing.assert_close(model(noisy, targets, weights), wanted)


# -------------------------------------------------------------------------------- conversations

CONVERSATION = {"messages": [
    {"role": "user", "content": "12*7"},
    {"role": "assistant", "content": [
        {"type": "python", "text": "12*7"},
        {"type": "python_output", "text": "84"},
        {"type": "text", "text": "84"},
    ]},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
]}


def test_one_answer_is_hidden_with_the_tools_reply_and_the_padding_behind_its_end(tokenizer):
    ids, _ = tokenizer.render_conversation(CONVERSATION)
    special = tokenizer.encode_special
    end = special("<|assistant_end|>")
    starts = [place for place, token in enumerate(ids) if token == special("<|assistant_start|>")]
    seen = set()
    for seed in range(200):
        found, mask = one_answer(tokenizer, ids, 5, random.Random(seed))
        start = mask.index(1)
        assert start - 1 in starts and mask == [0] * start + [1] * (len(found) - start)
        whole = ids.index(end, start) + 1
        assert found[:whole] == ids[:min(whole, len(found))]
        assert set(found[whole:]) <= {end} and len(found) <= whole + 5
        seen.add((start, len(found) - whole))
    lengths = {start: {more for at, more in seen if at == start} for start, _ in seen}
    assert len(lengths) == 2 and all({0, 5, -1} <= found for found in lengths.values())


def test_the_loader_gives_answers_to_hide_and_resumes_with_the_same(tokenizer):
    def batches(state=None):
        return sft_data_generator(
            tokenizer, [CONVERSATION] * 3, 2, 64, state=state, end_padding=4)

    first = list(itertools.islice(batches(), 4))
    resumed = next(batches(first[2][2]))
    assert all(torch.equal(a, b) for a, b in zip(resumed[:2], first[3][:2]))
    # behind a tool's call its reply is a target, too
    reply = tokenizer.encode_special("<|output_start|>")
    assert any((targets == reply).any() for _, targets, _ in first)
    causal = itertools.islice(sft_data_generator(tokenizer, [CONVERSATION] * 3, 2, 64), 4)
    assert not any((targets == reply).any() for _, targets, _ in causal)


# -------------------------------------------------------------------------------- the bound

def test_any_order_likelihood_fixed_number_and_one_over_t_are_the_same():
    """Three forms of the bound, enumerated on a tiny model in float64, to 1e-9."""
    L = 4
    model = make_model(LLaDAGPT, depth=1).double().eval()
    ids = words(1, L + 1)
    ids[0, 0] = BOS
    places = range(1, L + 1)

    @torch.no_grad()
    def nats(hidden):
        """{place: -log p of its token} with these places hidden, in float64."""
        noisy = ids.clone()
        noisy[0, list(hidden)] = MASK
        model.compute_dtype = torch.float64
        x, _ = model.features(noisy)
        z = 15 * torch.tanh(x @ model.head_weight().T / 15)
        scores = -z.log_softmax(-1).gather(-1, ids[..., None])[0, :, 0]
        return {place: scores[place].item() for place in hidden}

    subsets = [set(some) for l in range(1, L + 1) for some in itertools.combinations(places, l)]
    table = {frozenset(hidden): nats(hidden) for hidden in subsets}

    # 1. the mean over all orders of the likelihood from first to last
    orders = list(itertools.permutations(places))
    any_order = sum(
        table[frozenset(order[n:])][order[n]] for order in orders for n in range(L)) / len(orders)
    # 2. the mean over l of (L / l) times the mean over all subsets of l
    fixed = 0.0
    for l in range(1, L + 1):
        of_l = [sum(table[hidden].values()) for hidden in table if len(hidden) == l]
        fixed += L / l * sum(of_l) / len(of_l) / L
    # 3. the integral of (1 / t) E[sum], a polynomial in t, for which Gauss's rule is exact
    nodes, weights = np.polynomial.legendre.leggauss(8)
    integral = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        for hidden, values in table.items():
            chance = node ** len(hidden) * (1 - node) ** (L - len(hidden))
            integral += weight * chance / node * sum(values.values())
    assert abs(any_order - fixed) < 1e-9 and abs(any_order - integral) < 1e-9

    # 4. and what is computed comes to that
    model.float().compute_dtype = torch.float32
    model.draws = 4000
    found = -model.log_probs(ids[:, :-1], ids[:, 1:]).sum().item()
    assert found == pytest.approx(any_order, rel=0.01)


def test_the_numbers_of_hidden_tokens_are_uniform_and_the_places_differ():
    ids, is_target = words(12), torch.arange(12) >= 2
    hidden = draw_hidden(ids, is_target, 40)
    counts = hidden.sum(1).bincount(minlength=11).tolist()
    assert counts == [0] + [4] * 10 and not hidden[:, :2].any()
    assert (hidden.sum(0)[2:] > 5).all() and len({tuple(row) for row in hidden.tolist()}) > 25


def test_the_bound_is_the_same_in_any_batch_and_behind_any_question():
    model = make_model(LLaDAGPT).eval()
    idx, targets = words(3, 20), words(3, 20)
    idx[:, 1:] = targets[:, :-1]
    targets[1, 9:] = -1     # padding
    idx[1, 10:] = 0
    targets[2, :5] = -1     # a question
    together = model.log_probs(idx, targets)
    for row, length in zip(range(3), (20, 9, 20)):
        alone = model.log_probs(idx[row:row + 1, :length], targets[row:row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)
    assert (together[targets < 0] == 0).all()
    assert torch.equal(together, model.log_probs(idx, targets))
    # the same places are hidden behind another question
    other = idx.clone()
    other[2, :4] = (idx[2, :4] + 1) % BOS
    again = model.log_probs(other, targets)
    assert torch.equal((again != 0)[2], (together != 0)[2])
    assert not torch.equal(again[2], together[2])


def test_of_a_single_token_the_bound_is_its_log_probability():
    model = make_model(LLaDAGPT).eval()
    idx = words(1, 5)
    targets = torch.full((1, 5), -1)
    targets[0, 4] = 7
    [logits] = model.next_token_logits([idx[0].tolist()])
    found = model.log_probs(idx, targets).sum()
    torch.testing.assert_close(found, logits.log_softmax(-1)[7], atol=1e-5, rtol=1e-5)
    prompts = [[5], words(20).tolist(), words(60).tolist()]
    together = model.next_token_logits(prompts)
    for prompt, row in zip(prompts, together):
        torch.testing.assert_close(row, model.next_token_logits([prompt])[0])


def test_bits_per_byte_fit_the_context_and_do_not_depend_on_batches(model, tokenizer):
    documents = ["the cat sat on the mat", "12*7 is 84, " * 9, "a"]
    found = [evaluate_bpb(model, tokenizer, documents, "cpu", size) for size in (1, 16)]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and math.isfinite(found[0])


def test_draws_are_set_for_a_diffusion_model_alone():
    model = make_model(LLaDAGPT)
    set_draws(model, None, few=8)
    assert model.draws == 8
    set_draws(model, 30, few=8)
    assert model.draws == 30
    set_draws(make_model(), None, few=8)
    with pytest.raises(UserError, match="draws"):
        set_draws(make_model(), 30, few=8)


# -------------------------------------------------------------------------------- blocks

def test_equal_numbers_are_committed_the_most_confident_first():
    block = Block(7, 99, Denoising(7, steps=3), seed=0)
    tokens = torch.arange(7)
    confidence = torch.tensor([.1, .7, .2, .6, .3, .5, .4], dtype=torch.float64)
    left = []
    while block.is_masked.any():
        block.commit(tokens[block.masks], confidence[block.masks])
        left.append(block.is_masked.nonzero()[:, 0].tolist())
    assert left == [[0, 2, 4, 6], [0, 2], []]
    assert block.ids.tolist() == tokens.tolist()


def test_what_is_committed_stays_unless_it_is_edited():
    block = Block(3, 99, Denoising(3, edit_below=0.3), seed=0)
    sure = torch.tensor([.9, .2, .8], dtype=torch.float64)
    for number in range(3):
        block.commit(torch.full((3,), number)[block.masks], sure[block.masks])
    # position 0 first, then 2, then 1, which was unsure and is masked again
    assert block.ids.tolist() == [0, 99, 1]
    block.commit(torch.tensor([7]), sure[1:2])  # once: it is not asked a third time
    assert block.ids.tolist() == [0, 7, 1] and not block.is_masked.any()


def test_proposals_are_samples_of_the_softmax_in_float64():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    generator = torch.Generator().manual_seed(1)
    tokens, confidence = propose(logits, SamplingOptions(temperature=0.7, top_k=3), generator)
    shares = tokens.bincount(minlength=4) / len(tokens)
    wanted = (torch.tensor([0.0, 1.0, 2.0, -torch.inf]) / 0.7).softmax(-1)
    torch.testing.assert_close(shares, wanted, atol=0.01, rtol=0)
    assert confidence.dtype == torch.float64
    own = logits[0].double().softmax(-1)
    torch.testing.assert_close(confidence, own[tokens])
    nucleus = SamplingOptions(temperature=1.0, top_k=0, top_p=0.6)
    assert propose(logits, nucleus, generator)[0].unique().tolist() == [2]
    nucleus = SamplingOptions(temperature=1.0, top_k=0, top_p=0.7)
    assert propose(logits, nucleus, generator)[0].unique().tolist() == [1, 2]
    greedy, _ = propose(logits[:2], SamplingOptions(temperature=0), generator)
    assert greedy.tolist() == [2, 2]


# -------------------------------------------------------------------------------- the engine

PROMPTS = [[5], [5, 9, 70, 33, 12], list(range(40, 60)), [7, 7]]
SAMPLED = {"max_new_tokens": 11, "temperature": 1.0, "ignore_stop_tokens": True}


def test_a_request_alone_and_among_others_gives_the_same_tokens(engine):
    """docs/traps.md: shared-rng"""
    seeds = [1, 2, 3, 4]
    together = engine.generate_batch(PROMPTS, seeds=seeds, **SAMPLED)
    assert all(len(ids) == 11 for ids in together)
    for prompt, seed, ids in zip(PROMPTS, seeds, together):
        assert engine.generate_batch([prompt], seed=seed, **SAMPLED) == [ids]
    assert engine.generate_batch(PROMPTS[:1], seed=9, **SAMPLED) != together[:1]
    assert engine.blocks == {} and engine.running == {}


def reference(model, prompt, count, block_length):
    """Greedy semi-autoregressive sampling of one sequence, as the paper has it."""
    ids = list(prompt)
    while count:
        length = min(block_length, count)
        count -= length
        ids += [model.config.mask_token] * length
        for _ in range(length):
            probs = model(torch.tensor([ids]))[0].softmax(-1)
            best = probs.amax(-1).tolist()
            masked = [place for place, token in enumerate(ids) if token == model.config.mask_token]
            surest = max(masked, key=lambda place: best[place])
            ids[surest] = int(probs[surest].argmax())
    return ids[len(prompt):]


def test_blocks_are_filled_in_as_by_the_definition(engine, model):
    with torch.no_grad():
        for prompt in PROMPTS:
            found = engine.generate_batch(
                [prompt], max_new_tokens=11, temperature=0, ignore_stop_tokens=True)
            assert found == [reference(model, prompt, 11, 6)]


def test_a_pass_changes_masks_of_its_block_alone(engine, monkeypatch):
    """Nothing of the prompt or of a block before it ever changes, and no mask is handed out."""
    seen = []
    features = engine.model.features

    def recorded(idx, **more):
        seen.append(idx[0].tolist())
        return features(idx, **more)

    monkeypatch.setattr(engine.model, "features", recorded)
    [tokens] = engine.generate_batch([PROMPTS[1]], seed=3, **SAMPLED)
    mask = engine.model.config.mask_token
    assert mask not in tokens and len(seen) == 11
    whole = PROMPTS[1] + tokens
    for number, ids in enumerate(seen):
        assert all(a == b or a == mask for a, b in zip(ids, whole))
        assert ids[:5] == PROMPTS[1]
        assert len(ids) == (11 if number < 6 else 16)
        assert ids.count(mask) == (6 - number if number < 6 else 11 - number)


def test_sequences_are_admitted_while_others_run_and_text_comes_by_blocks(engine, tokenizer):
    engine.max_slots = 2
    wanted = [engine.generate_batch([prompt], seed=1, **SAMPLED)[0] for prompt in PROMPTS]
    sequences = [engine.new_sequence(prompt, seed=1, **SAMPLED) for prompt in PROMPTS]
    for sequence in sequences[:3]:
        engine.admit(sequence)
    engine.step()
    assert [sequence.status for sequence in sequences] == ["running"] * 2 + ["waiting", "new"]
    engine.admit(sequences[3])
    engine.retire(sequences[0])     # its caller has left
    lengths = set()
    while any(sequence.status != "finished" for sequence in sequences):
        moved = engine.step()
        assert len(engine.running) <= 2
        lengths |= {len(sequence.tokens) for sequence in moved}
    assert lengths == {6, 11}
    assert [sequence.tokens for sequence in sequences[1:]] == wanted[1:]
    stream = engine.stream(PROMPTS[1], seed=1, **SAMPLED)
    assert "".join(stream) == tokenizer.decode(wanted[1]) and stream.finish_reason == "length"


def test_fewer_steps_commit_several_tokens_in_each(engine, monkeypatch):
    engine.denoising = Denoising(block_length=6, steps=2)
    passes = []
    propose_ = engine._propose
    monkeypatch.setattr(engine, "_propose", lambda s: passes.append(1) or propose_(s))
    [tokens] = engine.generate_batch([PROMPTS[0]], seed=1, **SAMPLED)
    assert len(tokens) == 11 and len(passes) == 4
    engine.denoising = Denoising(block_length=6, edit_below=1.0)    # everything is edited once
    passes.clear()
    [edited] = engine.generate_batch([PROMPTS[0]], seed=1, **SAMPLED)
    assert len(edited) == 11 and len(passes) == 11 + 2


class Scripted(LLaDAGPT):
    """Prefers a script's tokens at the positions behind a prompt, the later ones more surely."""

    def __init__(self, tokenizer, prompt_length, script):
        config = LLaDAConfig.from_depth(1, tokenizer.get_vocab_size(), 64)
        super().__init__(config)
        self.init_weights()
        self.start, self.script = prompt_length, script

    def features(self, idx, at=None, **more):
        self.seen = idx[0].tolist()
        x = torch.zeros(*at.shape, 1)
        x[..., 0] = at - self.start
        return x, None

    def logits(self, x, recent):
        z = torch.zeros(*x.shape[:-1], self.config.mask_token)
        for place in range(x.size(1)):
            number = min(int(x[0, place, 0]), len(self.script) - 1)
            z[0, place, self.script[number]] = 5 + number
        return z


def test_the_tool_answers_within_a_block_and_the_rest_is_written_again(tokenizer):
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("12*7"), special("<|python_end|>")]
    reply = [special("<|output_start|>"), *tokenizer.encode("84"), special("<|output_end|>")]
    end = special("<|assistant_end|>")
    behind = len(call) + len(reply)
    script = [*call, *[66] * len(reply), 65, end, end]
    scripted = Scripted(tokenizer, 3, script)
    engine = DiffusionEngine(scripted, tokenizer, denoising=Denoising(block_length=16))
    stream = engine.stream([5, 6, 7], max_new_tokens=40, temperature=0)
    assert "".join(stream) == "`12*7` → 84\n" + tokenizer.decode([65])
    assert stream.finish_reason == "stop"
    assert scripted.seen[3:3 + behind] == call + reply


def test_an_answer_is_over_as_soon_as_all_before_its_end_is_decided(tokenizer):
    end = tokenizer.encode_special("<|assistant_end|>")
    scripted = Scripted(tokenizer, 1, [66, end])    # the end is the surer one, up to the block's
    engine = DiffusionEngine(scripted, tokenizer, denoising=Denoising(block_length=8))
    sequence = engine.new_sequence([5], max_new_tokens=30, temperature=0)
    assert engine.run([sequence])[0].tokens == [66, end] and sequence.finish_reason == "stop"


def test_what_a_diffusion_model_cannot_do_is_refused_in_one_line(engine, model, tokenizer):
    bad = [
        {"logprobs": 0},
        {"prompt_logprobs": True},
        {"logit_bias": {5: 1.0}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_p": 0.1},
    ]
    for options in bad:
        with pytest.raises(UserError, match="not supported: a diffusion model"):
            engine.new_sequence([5], **options)
    with pytest.raises(UserError, match="KV cache"):
        model.new_kv_cache(1, 8)
    with pytest.raises(UserError, match="reinforcement learning needs"):
        require_causal(model, "reinforcement learning")
    with pytest.raises(UserError, match="weights=int8"):
        serving_engine_of(model, tokenizer, None, 2, weights="int8")
    for wrong in ({"block_length": 0}, {"steps": 0}, {"edit_below": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            denoising_of(model, **wrong)
    with pytest.raises(UserError, match="steps: only a diffusion model"):
        denoising_of(make_model(), steps=4)
    require_causal(make_model(), "anything")


def test_every_model_gets_its_engine(model, tokenizer):
    assert isinstance(engine_of(model, tokenizer), DiffusionEngine)
    assert type(engine_of(make_model(), tokenizer)) is Engine
    serving = serving_engine_of(model, tokenizer, None, 3)
    assert (type(serving), serving.max_slots) == (DiffusionEngine, 3)


def test_a_sequence_that_is_not_finite_ends_alone(model, tokenizer, monkeypatch):
    engine = DiffusionEngine(model, tokenizer, denoising=Denoising(block_length=6))
    logits = model.logits

    def spoilt(x, recent):
        z = logits(x, recent)
        if len(z) == 2:
            z[1, 0] = math.nan
        return z

    monkeypatch.setattr(model, "logits", spoilt)
    good, bad = (engine.new_sequence(prompt, seed=1, **SAMPLED) for prompt in PROMPTS[:2])
    engine.admit(good)
    engine.admit(bad)
    while engine.running or engine.waiting:
        engine.step()
    assert bad.finish_reason == "error" and len(good.tokens) == 11


def test_answers_do_not_depend_on_who_else_is_asked(model, tokenizer):
    answerer = Answerer(model, tokenizer, max_new_tokens=8)
    questions = ["the cat", "12*7", "dog"]
    asked = [{"messages": [{"role": "user", "content": text},
                           {"role": "assistant", "content": ""}]} for text in questions]
    noises = [Noise(1.0, 20, seed) for seed in (1, 2, 3)]
    together = answerer.answer(asked, noises)
    alone = [answerer.answer([one], [noise])[0] for one, noise in zip(asked, noises)]
    assert together == alone
    letters = [{**one, "letters": ["a", "t"]} for one in asked]
    choices = [{**one, "choices": ["the cat", "mat, 12*7 is"], "neutral": "?"} for one in asked]
    for picked in (letters, choices):
        found = answerer.answer(picked)
        assert found == [answerer.answer([one])[0] for one in picked]


QUESTIONS = ["the cat", "12*7", "dog", "the dog ran on the mat", "cat, 12*7 is", "sat"]


def asked(texts):
    """A conversation for each text, whose answer is to be written."""
    return [{"messages": [{"role": "user", "content": text},
                          {"role": "assistant", "content": ""}]} for text in texts]


def tokens_of(answerer, conversations, batch_size, noises):
    """The ids of each conversation's answer, answered in batches of this size."""
    engine, found = answerer.engine, []
    for start in range(0, len(conversations), batch_size):
        some = slice(start, start + batch_size)
        sequences = [
            engine.sequence_of(answerer.prompt_of(conversation), 8, noise)
            for conversation, noise in zip(conversations[some], noises[some])
        ]
        found += [sequence.tokens for sequence in engine.run(sequences)]
    return found


@pytest.mark.parametrize("top_k", [None, 0, 5])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(model, tokenizer, top_k):
    """top_k: of samples; None: the likeliest tokens, which the definition gives as well."""
    answerer = Answerer(model, tokenizer)
    conversations = asked(QUESTIONS)
    noises = [None] * len(QUESTIONS)
    if top_k is not None:
        noises = [Noise(1.0, top_k, seed) for seed in range(len(QUESTIONS))]
    alone = tokens_of(answerer, conversations, 1, noises)
    for batch_size in (2, 4, 6):
        assert tokens_of(answerer, conversations, batch_size, noises) == alone
    if top_k is None:
        with torch.no_grad():
            for conversation, tokens in zip(conversations, alone):
                wanted = reference(model, answerer.prompt_of(conversation), 8, 8)
                assert tokens == wanted[:len(tokens)]


def test_a_batch_of_answers_takes_the_passes_of_one(model, tokenizer, monkeypatch):
    answerer = Answerer(model, tokenizer, max_new_tokens=8)
    rows = []
    features = model.features

    def counted(idx, **more):
        rows.append(len(idx))
        return features(idx, **more)

    monkeypatch.setattr(model, "features", counted)
    answerer.answer(asked(QUESTIONS))
    batches = [count for count in rows if count > 1]
    assert batches[0] == len(QUESTIONS) and len(batches) <= 8
    assert len(rows) - len(batches) <= answerer.near_ties + 8


def test_sequences_of_about_one_length_share_a_forward_pass(engine, monkeypatch):
    monkeypatch.setattr("nanochat.diffusion_engine.PASS_TOKENS", {"cpu": 40})
    wanted = [engine.generate_batch([prompt], seed=1, **SAMPLED)[0] for prompt in PROMPTS]
    shapes = []
    features = engine.model.features

    def recorded(idx, **more):
        shapes.append(tuple(idx.shape))
        return features(idx, **more)

    monkeypatch.setattr(engine.model, "features", recorded)
    assert engine.generate_batch(PROMPTS, seed=1, **SAMPLED) == wanted
    # the prompts have 1, 2, 5 and 20 tokens, and a block has 6
    assert shapes[:2] == [(3, 11), (1, 26)]


class Shaky(LLaDAGPT):
    """A model whose logits differ with the size of the batch, by less than a near tie."""

    def logits(self, x, recent):
        z = super().logits(x, recent)
        if len(z) == 1:
            return z
        sign = torch.where(torch.arange(z.size(-1)) % 2 == len(z) % 2, 1.0, -1.0)
        return z + 1e-5 * sign * (1 + torch.arange(z.size(1))[:, None] % 2)


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_pass_with_a_near_tie_is_made_again_by_itself(tokenizer, monkeypatch, top_k):
    shaky = make_model(Shaky, vocab_size=tokenizer.get_vocab_size()).eval()
    with torch.no_grad():
        shaky.head.weight *= 0.003
    conversations = asked(QUESTIONS * 2)
    noises = [None] * len(conversations)
    if top_k is not None:
        noises = [Noise(0.02, top_k, seed) for seed in range(len(conversations))]
    answerer = Answerer(shaky, tokenizer)
    alone = tokens_of(answerer, conversations, 1, noises)
    for batch_size in (2, 3, 12):
        assert tokens_of(answerer, conversations, batch_size, noises) == alone
    assert answerer.near_ties > 0 and 0.1 < answerer.excess < 1

    # without the second pass they differ: the test above could fail
    careless = Answerer(shaky, tokenizer)
    monkeypatch.setattr(careless.engine, "_is_clear", lambda *_: True)
    found = [tokens_of(careless, conversations, size, noises) for size in (1, 2, 3)]
    assert found[0] != found[1] or found[1] != found[2]
    assert careless.near_ties == 0


# -------------------------------------------------------------------------------- the server

HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def address(model, tokenizer):
    engine = DiffusionEngine(model, tokenizer, max_slots=2, denoising=Denoising(block_length=6))
    with serve(engine) as address:
        yield address


def ask(address, **fields):
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 3, **fields}
    return requests.post(address + "/v1/chat/completions", json=body, timeout=60, stream=True)


def events(answer):
    """The JSON of each event of a stream, up to [DONE]."""
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_server_streams_an_answer_a_block_at_a_time(address):
    whole = ask(address).json()["choices"][0]
    deltas = [event["choices"][0]["delta"] for event in events(ask(address, stream=True))]
    pieces = [delta["content"] for delta in deltas if delta.get("content")]
    assert "".join(pieces) == whole["message"]["content"] and whole["finish_reason"] == "length"
    assert 1 <= len(pieces) <= 2, "12 tokens are two blocks of 6"


def test_clients_of_a_diffusion_model_get_answers_of_their_own(address):
    """More answers than slots: each is the one that its seed gives alone."""
    several = ask(address, n=3, temperature=1).json()["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in several}) > 1
    again = ask(address, n=3, temperature=1).json()["choices"]
    assert [one["message"] for one in again] == [one["message"] for one in several]


@pytest.mark.parametrize("fields", [
    {"logprobs": True},
    {"presence_penalty": 1},
    {"logit_bias": {"5": 3}},
], ids=lambda fields: next(iter(fields)))
def test_the_server_refuses_what_needs_a_next_token(address, fields):
    answer = ask(address, **fields)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "not supported" in message and "has no next one" in message
    assert ask(address).status_code == 200, "and goes on"


# -------------------------------------------------------------------------------- the stages

def test_a_diffusion_model_goes_through_the_stages_and_resumes_to_the_bit(stages, text):
    from stage_runs import TINY, TINY_CHAT, same_weights, weights_of
    train = ("scripts.base_train", f"--data={text}", *TINY, "--model=llada", "--save_every=2")
    whole = stages.fork_record(*train, "--num_iterations=4", "--model_tag=m1")
    assert "val_bpb" not in whole and 0 < whole["val_bpb_bound"] < 12
    folder = stages.folder("base", "m1")
    wanted = weights_of(folder, 4)

    # what is resumed at step 2 hides the same tokens
    stages.fork_record(
        *train, "--num_iterations=4", "--model_tag=m1", "--resume_from_checkpoint=2")
    resumed = sorted(folder.parent.glob("m1-*"))
    assert len(resumed) == 1, "a finished run is not overwritten"
    again = weights_of(resumed[0], 4)
    assert same_weights(wanted, again)
    assert whole["config"]["mask_token"] == whole["config"]["vocab_size"] - 1

    measured = [
        stages.fork_record("scripts.base_loss", f"--data={text}", "--model_tag=m1",
                           "--documents=3", "--draws=2", ranks=ranks)["val_bpb_bound"]
        for ranks in (1, 2)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)

    # the chat stages, and the one that refuses
    stages.fork("scripts.chat_sft", "--source=base", "--model_tag=m1", *TINY_CHAT,
                "--num_iterations=2", f"--data={text}", ranks=2)
    error = stages.refusal("scripts.chat_rl", "--model_tag=m1", "--num_iterations=1")
    assert "reinforcement learning needs" in error
    assert "--ngram_tokens" in stages.refusal(*train, "--num_iterations=1", "--ngram_tokens=99")
    out, _ = stages.fork("scripts.chat_cli", "--model_tag=m1", "-p", "cat", "--max_tokens=5",
                         "--steps=2", "--block_length=4")
    assert out
