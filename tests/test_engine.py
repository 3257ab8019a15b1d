"""Generation: cached equals recomputed, alone equals among others, chunks equal whole prompts, the
tool runs inside, and nothing that looks like a control token is shown."""
import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, NonFiniteError, sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.samples import sample_texts
from nanochat.sequence_text import TextOfSequence
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.variants.deepseek import DeepSeekGPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.ngrams import NGramGPT
from nanochat.variants.portable import PortableGPT
from models import make_model as make_any_model


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20]
    return Tokenizer.train_from_iterator(texts, 290)


def make_model(tokenizer, kv_heads=4, T=48):
    torch.manual_seed(1)
    config = GPTConfig(
        depth=2,
        width=64,
        heads=4,
        kv_heads=kv_heads,
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=T,
    )
    model = GPT(config)
    model.init_weights()
    for p in model.parameters():  # zero-initialised projections would make every model the same
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture
def engine(tokenizer):
    return Engine(make_model(tokenizer), tokenizer)


# ------------------------------------------------------------------------------------------------
# prefill and decode

def recomputed(model, prompt, count):
    """Greedy decoding without a KV cache, the reference implementation."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_greedy_decoding_equals_recomputing(tokenizer, kv_heads):
    model = make_model(tokenizer, kv_heads)
    engine = Engine(model, tokenizer)
    with torch.no_grad():
        for prompt in ([5], [5, 9, 70], list(range(20, 40))):
            (fast,) = engine.generate_batch([prompt], max_new_tokens=12, temperature=0)
            assert fast == recomputed(model, prompt, len(fast))


PROMPTS = [[5], [5, 9, 70, 33, 12], list(range(20, 40)), [7, 7]]
SAMPLING = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20, "seed": 3}


def test_a_request_alone_and_in_a_ragged_batch_give_the_same_tokens(engine):
    """docs/traps.md: shared-rng"""
    together = engine.generate_batch(PROMPTS, **SAMPLING)
    for prompt, ids in zip(PROMPTS, together):
        assert engine.generate_batch([prompt], **SAMPLING) == [ids]


def test_each_sample_of_a_prompt_has_the_tokens_of_its_own_seed(engine):
    prompt, options = [5, 9, 70], {"max_new_tokens": 12, "temperature": 1.0}
    samples = engine.generate_batch([prompt] * 4, seeds=[1, 2, 1, -1], **options)
    assert samples[0] == samples[2] != samples[1]
    assert samples[3] != samples[0]
    assert [samples[1]] == engine.generate_batch([prompt], seed=2, **options)


@pytest.mark.parametrize("model_class", [GPT, LookupGPT, NGramGPT, DeepSeekGPT])
def test_a_prompt_that_sequences_share_is_read_once(tokenizer, model_class, monkeypatch):
    options = {"vocab_size": tokenizer.get_vocab_size()}
    model = make_any_model(model_class, **options).eval()
    engine, read = Engine(model, tokenizer), []
    prefill = model.prefill

    def counted(idx, *others):
        read.append(len(idx))
        return prefill(idx, *others)

    monkeypatch.setattr(model, "prefill", counted)
    prompts = [[5, 9, 70], [7, 7], [5, 9, 70], [7, 7, 8, 9], [5, 9, 70]]
    together = engine.generate_batch(
        prompts, seeds=[1, 2, 3, 4, 5], max_new_tokens=12, temperature=1.0, top_k=0)
    assert read == [3]
    for prompt, seed, ids in zip(prompts, [1, 2, 3, 4, 5], together):
        assert ids == alone(
            engine, prompt, seed=seed, max_new_tokens=12, temperature=1.0, top_k=0)


def run(engine, *sequences):
    """Take steps until the sequences are finished."""
    while any(sequence.status != "finished" for sequence in sequences):
        assert engine.step()


def alone(engine, prompt, **options):
    """The tokens of a prompt in an engine of its own, the reference implementation."""
    (ids,) = Engine(engine.model, engine.tokenizer).generate_batch([prompt], **options)
    return ids


def test_a_sequence_admitted_while_others_run_takes_a_free_slot_and_gets_the_same_tokens(engine):
    short = engine.new_sequence([5], max_new_tokens=2, temperature=0)
    long = engine.new_sequence(list(range(20, 40)), max_new_tokens=20, temperature=0)
    late = engine.new_sequence([5, 9, 70], max_new_tokens=9, seed=4)
    engine.admit(short)
    engine.admit(long)
    while short.status != "finished":
        engine.step()
    freed, cache = engine.kv_cache.lengths.index(0), engine.kv_cache

    engine.admit(late)
    engine.step()
    assert (late.status, late.slot, late.tokens) == ("running", freed, late.tokens[:1])
    assert engine.kv_cache is cache and long.status == "running"
    run(engine, long, late)
    assert short.tokens == alone(engine, [5], max_new_tokens=2, temperature=0)
    assert late.tokens == alone(engine, [5, 9, 70], max_new_tokens=9, seed=4)
    assert long.tokens == alone(engine, long.prompt, max_new_tokens=20, temperature=0)
    assert engine.kv_cache is None and engine.running == {}


def test_a_sequence_waits_for_the_next_cache_where_no_slot_is_free_or_none_is_long_enough(engine):
    brief = engine.new_sequence([9], max_new_tokens=1, temperature=0)
    first = engine.new_sequence([5], max_new_tokens=5, temperature=0)
    engine.admit(brief)
    engine.admit(first)
    engine.step()
    assert brief.status == "finished" and len(engine.running) < engine.kv_cache.slots

    too_long = engine.new_sequence([7, 7], max_new_tokens=30, temperature=0)
    behind = engine.new_sequence([9], max_new_tokens=2, temperature=0)
    engine.admit(too_long)
    engine.admit(behind)
    while first.status != "finished":
        engine.step()
        assert (too_long.status, behind.status) == ("waiting", "waiting")  # in order of admission
    engine.step()
    assert "waiting" not in (too_long.status, behind.status)
    run(engine, too_long, behind)
    for sequence in (brief, first, too_long, behind):
        options = {"max_new_tokens": sequence.max_new_tokens, "temperature": 0}
        assert sequence.tokens == alone(engine, sequence.prompt, **options)


def test_a_sequence_waits_while_every_slot_is_taken(engine):
    first = engine.new_sequence([5, 5], max_new_tokens=5, temperature=0)
    engine.admit(first)
    engine.step()
    second = engine.new_sequence([9], max_new_tokens=2, temperature=0)
    engine.admit(second)
    engine.step()
    assert (first.status, second.status) == ("running", "waiting")
    run(engine, first, second)
    assert second.tokens == alone(engine, [9], max_new_tokens=2, temperature=0)


@pytest.mark.parametrize("turns", [(0, 1), (0, 0, 1), (0, 1, 1, 1)])
def test_two_interleaved_streams_are_both_right(engine, turns):
    """Whichever stream takes the steps: read in turns, or one faster than the other."""
    asked = [("the cat", {"seed": 5, "max_new_tokens": 12}), ([7, 7, 9], {"temperature": 0})]
    wanted = [engine.generate(prompt, **options) for prompt, options in asked]
    streams = [engine.stream(prompt, **options) for prompt, options in asked]
    readers, texts = [iter(stream) for stream in streams], ["", ""]
    for _ in range(100):
        for who in turns:
            texts[who] += next(readers[who], "")
    assert texts == wanted
    assert None not in [stream.finish_reason for stream in streams]
    assert not engine.running and not engine.waiting


def test_streams_admitted_together_share_the_steps(engine):
    sequences = [engine.new_sequence(prompt, **SAMPLING) for prompt in PROMPTS]
    for sequence in sequences:
        engine.admit(sequence)
    assert engine.step() == sequences
    assert [len(sequence.tokens) for sequence in sequences] == [1] * 4
    run(engine, *sequences)
    assert [sequence.tokens for sequence in sequences] == engine.generate_batch(PROMPTS, **SAMPLING)


def test_whoever_leaves_early_frees_the_slot(engine):
    """docs/traps.md: server-slots-and-leaks"""
    for _ in engine.stream("the cat", max_new_tokens=20):
        assert len(engine.running) == 1
        break
    assert not engine.running and engine.kv_cache is None
    waiting = engine.new_sequence([5])
    engine.admit(waiting)
    engine.retire(waiting)
    engine.retire(waiting)
    assert not engine.waiting and engine.step() == [] and waiting.finish_reason is None


def test_a_step_that_fails_can_be_repeated(engine, monkeypatch):
    """No memory or Ctrl+C in the middle of a step costs nobody a token.

    The step fails before it has sampled, after that, or when some sequences have their token.
    """
    sequences = [engine.new_sequence(prompt, **SAMPLING) for prompt in PROMPTS]
    for sequence in sequences:
        engine.admit(sequence)
    calls = []

    def at_times(function):
        def fails(*arguments):
            calls.append(1)
            if len(calls) % 3 == 2:
                raise KeyboardInterrupt
            return function(*arguments)
        return fails

    monkeypatch.setattr("nanochat.engine.sample", at_times(sample))
    monkeypatch.setattr(engine, "_next_tokens", at_times(engine._next_tokens))
    monkeypatch.setattr(KVCache, "advance", at_times(KVCache.advance))
    for _ in range(200):
        with contextlib.suppress(KeyboardInterrupt):
            engine.step()
    monkeypatch.undo()
    assert [sequence.tokens for sequence in sequences] == engine.generate_batch(PROMPTS, **SAMPLING)


@pytest.mark.parametrize("compiling", [True, False])
def test_a_step_that_fails_beside_a_compilation_is_taken_again(engine, monkeypatch, compiling):
    """torch's tracer patches the modules of all threads: "module is not installed as a submodule".
    """
    expected = engine.generate_batch([[5, 6, 7]], temperature=0, max_new_tokens=4)
    compilation = SimpleNamespace(is_compiling=compiling, is_ready=lambda count: False)
    monkeypatch.setattr(engine, "compiled_decode", compilation)
    errors = [NameError("module is not installed as a submodule")] * 2
    features = engine.model.features

    def traced(*arguments):
        if errors:
            raise errors.pop()
        return features(*arguments)

    monkeypatch.setattr(engine.model, "features", traced)
    if compiling:
        assert engine.generate_batch([[5, 6, 7]], temperature=0, max_new_tokens=4) == expected
    else:
        with pytest.raises(NameError):
            engine.generate_batch([[5, 6, 7]])


def test_the_forward_pass_never_asks_the_device_for_a_number(tokenizer, monkeypatch):
    """int(tensor) waits for the device; in attention that would be once per layer and token."""
    model = make_model(tokenizer)
    kv_cache = model.new_kv_cache(3, 16)

    def synchronises(*_):
        pytest.fail("the forward pass synchronises with the device")

    with torch.inference_mode(), monkeypatch.context() as patch:
        for name in ("__int__", "__index__", "__bool__", "item", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, synchronises)
        model.prefill(torch.tensor([[5, 6], [7, 0]]), kv_cache, [0, 2], [2, 1])
        kv_cache.advance([0, 2], [2, 1])
        model.decode(torch.tensor([[8], [0], [9]]), kv_cache)
    assert kv_cache.lengths == [2, 0, 1]


# ------------------------------------------------------------------------------------------------
# bounds

def test_generation_ends_with_the_context(engine):
    """docs/traps.md: kv-cache-bounds"""
    prompt = [9] * 40
    stream = engine.stream(prompt, max_new_tokens=100)
    assert stream.finish_reason is None
    list(stream)
    assert stream.finish_reason in ("length", "stop")
    assert 40 + stream.completion_tokens <= engine.max_seq_len


def test_prompts_of_one_token_of_none_and_of_too_many(engine):
    """docs/traps.md: kv-cache-bounds"""
    assert isinstance(engine.generate([5], max_new_tokens=3), str)
    for bad in ("", [], [5] * 48):
        with pytest.raises(UserError):
            engine.generate(bad)


def test_stream_pieces_join_to_what_generate_returns(engine):
    pieces = list(engine.stream("the cat", max_new_tokens=20, seed=5))
    assert "".join(pieces) == engine.generate("the cat", max_new_tokens=20, seed=5)


# ------------------------------------------------------------------------------------------------
# a cache that is kept: chunked prefill and prefix reuse

CLASSES = [GPT, LookupGPT, NGramGPT, PortableGPT, DeepSeekGPT]


@pytest.fixture(params=CLASSES, ids=lambda model_class: model_class.__name__)
def any_model(request, tokenizer):
    return make_any_model(request.param, vocab_size=tokenizer.get_vocab_size()).eval()


def read_tokens(engine, monkeypatch):
    """A list that gets, at each prefill of the engine, how many tokens of each prompt it reads."""
    prefill, read = engine._prefill, []

    def counted(sequences, counts):
        read.append(list(counts))
        return prefill(sequences, counts)

    monkeypatch.setattr(engine, "_prefill", counted)
    return read


def admit(engine, prompt, **options):
    sequence = engine.new_sequence(prompt, **options)
    engine.admit(sequence)
    return sequence


def finish(engine, *sequences):
    """Take steps until the sequences are finished; within a prompt a step gives nobody a token."""
    for _ in range(500):
        if all(sequence.status == "finished" for sequence in sequences):
            return
        engine.step()
    pytest.fail("the sequences do not end")


LONG = [(7 * i) % 89 for i in range(25)]


def test_prompts_in_chunks_get_the_tokens_that_whole_prompts_get(
        tokenizer, any_model, monkeypatch):
    """Lookups and counts look back across the borders of chunks."""
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", 4)
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 6)
    engine = Engine(any_model, tokenizer, max_slots=3)
    read = read_tokens(engine, monkeypatch)
    prompts = [LONG, [5, 9, 70], LONG[3:], [7, 7], LONG[9:20]]
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "ignore_stop_tokens": True}
    sequences = [admit(engine, prompt, seed=i, **options) for i, prompt in enumerate(prompts)]
    finish(engine, *sequences)
    assert max(map(sum, read)) <= 6 and sum(map(sum, read)) == sum(map(len, prompts))
    for i, sequence in enumerate(sequences):
        assert sequence.tokens == alone(engine, prompts[i], seed=i, **options)


def test_a_prompt_that_begins_like_another_is_read_from_there_on(tokenizer, any_model, monkeypatch):
    """From a slot whose sequence has ended, and from one that is running."""
    engine = Engine(any_model, tokenizer, max_slots=3)
    read = read_tokens(engine, monkeypatch)
    options = {"max_new_tokens": 4, "temperature": 0, "ignore_stop_tokens": True}
    first = admit(engine, LONG[:20], **options)
    finish(engine, first)
    slot = engine.kv_cache.kept.copy().popitem()[0]

    # the conversation continues in its slot, with what the model wrote
    second = admit(engine, first.prompt + first.tokens + [8], max_new_tokens=5, temperature=0)
    engine.step()
    assert (second.cached_tokens, second.slot, read[-1]) == (23, slot, [2])

    # two others begin like it, one of them after a while
    third = admit(engine, LONG[:20] + [3, 4], **options)
    engine.step()
    engine.step()
    fourth = admit(engine, LONG[:18] + [6], seed=3, max_new_tokens=4)
    finish(engine, second, third, fourth)
    assert (third.cached_tokens, fourth.cached_tokens) == (20, 18)
    for sequence, own in [
        (second, {"max_new_tokens": 5, "temperature": 0}),
        (third, options),
        (fourth, {"max_new_tokens": 4, "seed": 3}),
    ]:
        assert sequence.tokens == alone(engine, sequence.prompt, **own)


@pytest.fixture
def server_engine(tokenizer):
    return Engine(make_model(tokenizer), tokenizer, max_slots=2)


def test_the_same_prompt_again_computes_its_last_token_alone(server_engine, monkeypatch):
    read = read_tokens(server_engine, monkeypatch)
    options = {"max_new_tokens": 3, "temperature": 0}
    first = server_engine.generate_batch([LONG], **options)
    assert server_engine.generate_batch([LONG], **options) == first
    assert read == [[25], [1]]


def test_prefixes_are_shared_within_a_tenant_and_not_where_they_are_short(server_engine):
    def cached(prompt, **options):
        (sequence,) = server_engine.run(
            [server_engine.new_sequence(prompt, max_new_tokens=1, **options)])
        return sequence.cached_tokens

    assert cached(LONG, tenant="a") == 0
    assert cached(LONG, tenant="b") == 0
    assert cached(LONG, tenant="b") == 24
    assert cached(LONG, tenant="b", prompt_logprobs=True) == 0, "all of its logits are needed"
    assert cached(LONG[:15] + [1], tenant="b") == 0
    assert cached(LONG[:16] + [1], tenant="b") == 16


def test_a_prompt_waits_for_one_that_is_being_read_and_begins_alike(server_engine, monkeypatch):
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 10)
    read = read_tokens(server_engine, monkeypatch)
    sequences = [admit(server_engine, LONG, seed=i, max_new_tokens=3) for i in range(2)]
    server_engine.step()
    assert [sequence.status for sequence in sequences] == ["running", "waiting"]
    finish(server_engine, *sequences)
    assert read == [[10], [10], [5, 5]], "what is left of the first is as short as a prefix may be"
    for i, sequence in enumerate(sequences):
        assert sequence.tokens == alone(server_engine, LONG, seed=i, max_new_tokens=3)


def test_the_slot_that_was_left_first_is_taken_first(server_engine):
    def run_one(prompt):
        sequence = admit(server_engine, prompt, max_new_tokens=2, temperature=0)
        server_engine.step()
        slot = sequence.slot
        finish(server_engine, sequence)
        return slot, sequence.cached_tokens

    other, third = LONG[::-1], [3] * 20
    assert [run_one(prompt) for prompt in (LONG, other)] == [(0, 0), (1, 0)]
    assert run_one(LONG) == (0, 24)
    assert run_one(third) == (1, 0), "LONG was used later than the other"
    assert run_one(LONG) == (0, 24) and run_one(other) == (1, 0)


def test_a_long_prompt_delays_a_running_stream_by_one_chunk_at_a_time(server_engine, monkeypatch):
    """docs/traps.md: prefill-blocks-decode"""
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", 5)
    read = read_tokens(server_engine, monkeypatch)
    talker = admit(server_engine, [5, 6], max_new_tokens=30, ignore_stop_tokens=True)
    server_engine.step()
    long = admit(server_engine, LONG, max_new_tokens=2)
    got = []
    while not long.tokens:
        before = len(talker.tokens)
        server_engine.step()
        got.append(len(talker.tokens) - before)
    assert got == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0] and read[1:] == [[5]] * 5


def test_short_prompts_do_not_wait_for_long_ones_nor_long_ones_for_ever(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", 4)
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 4)
    engine = Engine(make_model(tokenizer), tokenizer, max_slots=2)
    long = admit(engine, [1] * 40, max_new_tokens=2)
    steps = 0
    while not long.tokens:
        short = admit(engine, [5, 6, 7], max_new_tokens=1)
        for waited in range(1, 4):
            engine.step()
            if short.tokens:
                break
        assert short.tokens, "at most two prefills and a decode"
        steps += waited
    assert steps <= 24


def test_a_sequence_may_leave_in_the_middle_of_its_prefill(server_engine, monkeypatch):
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 18)
    leaving = admit(server_engine, LONG)
    assert server_engine.step() == [] and leaving.status == "running"
    server_engine.retire(leaving)
    assert server_engine.running == {} and leaving.finish_reason is None
    again = admit(server_engine, LONG, max_new_tokens=3)
    finish(server_engine, again)
    assert again.cached_tokens == 18
    assert again.tokens == alone(server_engine, LONG, max_new_tokens=3)


def test_more_sequences_than_slots_all_get_the_tokens_that_they_get_alone(server_engine):
    sequences = [admit(server_engine, prompt, **SAMPLING) for prompt in PROMPTS * 2]
    for _ in range(3):
        server_engine.step()
    assert len(server_engine.running) == 2 and len(server_engine.waiting) == 6
    finish(server_engine, *sequences)
    assert [sequence.tokens for sequence in sequences] == [
        alone(server_engine, prompt, **SAMPLING) for prompt in PROMPTS * 2]
    assert server_engine.kv_cache.slots == 2 and server_engine.step() == []


@pytest.mark.parametrize("seed", [0, 1])
def test_whoever_comes_and_leaves_all_others_get_the_tokens_that_they_get_alone(
        tokenizer, any_model, monkeypatch, seed):
    """Random prompts with common beginnings, random arrivals and departures, three slots."""
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", 6)
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 9)
    monkeypatch.setattr("nanochat.engine.MIN_PREFIX", 4)
    rng = random.Random(seed)
    engine = Engine(any_model, tokenizer, max_slots=3)
    beginnings = [LONG[:20], LONG[:9] + [3] * 6, [8] * 12]
    sequences = []
    for number in range(16):
        prompt = rng.choice(beginnings)[:rng.randrange(1, 20)] + rng.choices(range(90), k=2)
        options = {"seed": number, "max_new_tokens": rng.randrange(1, 7), "top_k": 0}
        sequences.append((admit(engine, prompt, **options), options))
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.3:
            engine.retire(rng.choice(sequences)[0])
    finish(engine, *(sequence for sequence, _ in sequences))
    whole = [one for one in sequences if one[0].finish_reason]
    assert len(whole) > 8 and any(sequence.cached_tokens for sequence, _ in whole)
    for sequence, options in whole:
        assert sequence.tokens == alone(engine, sequence.prompt, **options)


def test_a_server_reads_the_texts_of_all_its_sequences_after_each_step(server_engine):
    """As docs/engine.md shows it: the server takes the steps, whoever ends is retired."""
    tokenizer = server_engine.tokenizer
    asked = [("the cat", {"seed": 5}), ([7, 7, 9], {"temperature": 0}), ([5] * 20, {})]
    options = {"max_new_tokens": 12}
    wanted = [server_engine.generate(prompt, **options, **own) for prompt, own in asked]
    sequences = [admit(server_engine, prompt, **options, **own) for prompt, own in asked]
    texts, shown = [TextOfSequence(tokenizer, one) for one in sequences], ["", "", ""]
    for _ in range(100):
        server_engine.step()
        for place, text in enumerate(texts):
            shown[place] += text.read()
    assert shown == wanted and None not in [text.finish_reason for text in texts]


def test_a_stop_string_ends_a_stream_and_frees_its_slot(engine):
    told = engine.generate("the cat", max_new_tokens=20, seed=5)
    stop = told[6:8]
    stream = engine.stream("the cat", stop=[stop], max_new_tokens=20, seed=5)
    assert "".join(stream) == told[:told.index(stop)] and stream.finish_reason == "stop"
    assert engine.running == {} and engine.kv_cache is None


def test_sequences_in_slots_that_are_far_apart_get_the_tokens_that_they_get_alone(tokenizer):
    engine = Engine(make_model(tokenizer), tokenizer, max_slots=8)
    prompts = [[i, i + 1, 70] for i in range(8)]
    sequences = [admit(engine, prompt, **SAMPLING) for prompt in prompts]
    engine.step()
    for sequence in sequences[1:7]:
        engine.retire(sequence)
    finish(engine, *sequences)
    for place in (0, 7):    # those between are not decoded
        assert sequences[place].tokens == alone(engine, prompts[place], **SAMPLING)


# ------------------------------------------------------------------------------------------------
# logprobs

@pytest.mark.parametrize("chunk, max_slots", [(100, 2), (4, 2), (100, None), (4, None)])
def test_logprobs_of_prompt_and_answer_are_those_of_one_forward_pass(
        tokenizer, any_model, monkeypatch, chunk, max_slots):
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", chunk)
    engine = Engine(any_model, tokenizer, max_slots=max_slots)
    sequence = engine.new_sequence(
        LONG, max_new_tokens=5, logprobs=2, prompt_logprobs=True, ignore_stop_tokens=True)
    other, third = (engine.new_sequence([5, i], max_new_tokens=3) for i in (6, 7))
    engine.run([other, sequence, third])
    with torch.no_grad():
        logits = any_model(torch.tensor([LONG + sequence.tokens]))[0]
    wanted = logits.log_softmax(-1)
    scored = sequence.prompt_logprobs + sequence.logprobs
    assert scored[0] is None and len(scored) == len(LONG) + 5
    for place, one in enumerate(scored[1:]):
        token = (LONG + sequence.tokens)[place + 1]
        assert one.token == token
        assert one.logprob == pytest.approx(float(wanted[place, token]), abs=1e-3)
        best = wanted[place].topk(2)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert other.logprobs == [] and other.prompt_logprobs is None
    assert third.tokens == alone(engine, third.prompt, max_new_tokens=3)


def test_an_answer_may_continue_behind_the_tokens_that_end_one(tokenizer):
    end = tokenizer.encode_special("<|assistant_end|>")
    engine = scripted(tokenizer, [5, end, 6, end, 7])
    (stopped,) = engine.generate_batch([[9]], temperature=0, max_new_tokens=5)
    assert stopped == [5, end]
    engine = scripted(tokenizer, [5, end, 6, end, 7])
    options = {"temperature": 0, "max_new_tokens": 5, "ignore_stop_tokens": True}
    assert engine.generate_batch([[9]], **options) == [[5, end, 6, end, 7]]


def test_a_bias_decides_what_is_said_and_one_of_an_unknown_token_is_refused(engine):
    (tokens,) = engine.generate_batch([[5]], logit_bias={33: 100}, max_new_tokens=4)
    assert tokens == [33] * 4
    with pytest.raises(UserError, match="logit_bias names token 290"):
        engine.generate("abc", logit_bias={290: 1})


# ------------------------------------------------------------------------------------------------
# errors

NAN = float("nan")


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.9}])
@pytest.mark.parametrize("when", [1, 3])
def test_logits_that_are_not_finite_end_their_own_sequence_alone(
        tokenizer, monkeypatch, options, when):
    """docs/traps.md: non-finite-logits. In the prefill, and in a decode step."""
    engine = Engine(make_model(tokenizer), tokenizer, max_slots=3)
    options = {"max_new_tokens": 8, "ignore_stop_tokens": True, **options}
    sequences = [admit(engine, prompt, **options) for prompt in ([5, 6], [7, 8], [9, 10])]
    spoilt, real, calls = sequences[1], sample, []

    def fails_at_times(logits, asking):
        calls.append(1)
        if len(calls) == when:
            logits = logits.clone()
            logits[asking.index(spoilt), 3] = NAN
        return real(logits, asking)

    monkeypatch.setattr("nanochat.engine.sample", fails_at_times)
    ended = [sequence for _ in range(when) for sequence in engine.step() if sequence.error]
    assert ended == [spoilt] and len(engine.running) == 2
    assert isinstance(spoilt.error, NonFiniteError) and spoilt.finish_reason == "error"
    assert len(spoilt.tokens) == when - 1 and spoilt.status == "finished"
    finish(engine, *sequences)
    monkeypatch.undo()
    for sequence in (sequences[0], sequences[2]):
        assert sequence.tokens == alone(engine, sequence.prompt, **options)


def test_an_error_of_another_caller_s_sequence_is_not_raised(server_engine, monkeypatch):
    spoilt, real = admit(server_engine, [5, 6]), sample

    def fails(logits, asking):
        tokens = real(logits, asking)
        return [None if one is spoilt else token for one, token in zip(asking, tokens)]

    monkeypatch.setattr("nanochat.engine.sample", fails)
    (tokens,) = server_engine.generate_batch([[7, 8]], max_new_tokens=4)
    assert spoilt.finish_reason == "error" and tokens
    assert list(server_engine.stream([7, 8], max_new_tokens=4))


def test_an_engine_without_a_slot_is_refused(tokenizer):
    with pytest.raises(UserError, match="max_slots=0"):
        Engine(make_model(tokenizer), tokenizer, max_slots=0)


def test_a_slot_that_held_nan_serves_the_next_sequence(server_engine):
    spoilt = admit(server_engine, LONG, **SAMPLING)
    server_engine.step()
    for layer in server_engine.kv_cache.layers:
        layer.k[spoilt.slot].fill_(NAN)
        layer.v[spoilt.slot].fill_(NAN)
    server_engine.step()
    assert isinstance(spoilt.error, NonFiniteError)
    assert server_engine.running == {} and server_engine.kv_cache.kept == {}
    (tokens,) = server_engine.generate_batch([LONG], **SAMPLING)
    assert tokens == alone(server_engine, LONG, **SAMPLING)
    assert all(layer.v.isfinite().all() for layer in server_engine.kv_cache.layers)


def test_whoever_leaves_in_the_middle_of_a_prefill_leaves_no_nan_behind(tokenizer, monkeypatch):
    """A table may hold NaN for some tokens alone, and no logits were looked at yet."""
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS_ALONE", 18)
    engine = Engine(make_model(tokenizer), tokenizer, max_slots=2)
    engine.model.embed.weight.data[70] = NAN
    leaving = admit(engine, [*LONG[:4], 70, *LONG])
    assert engine.step() == []
    engine.retire(leaving)
    options = {"max_new_tokens": 6, "temperature": 0, "ignore_stop_tokens": True}
    sequences = [admit(engine, prompt, **options) for prompt in ([9] * 20, [8, 8])]
    finish(engine, *sequences)
    assert [sequence.finish_reason for sequence in sequences] == ["length", "length"]


@pytest.fixture
def diverged(tokenizer):
    """A model whose weights are NaN."""
    model = make_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(NAN)
    return model


def test_a_model_that_has_diverged_says_so_and_leaves_no_slot_behind(tokenizer, diverged):
    engine = Engine(diverged, tokenizer)
    for temperature in (0, 0.6):
        with pytest.raises(UserError, match="diverged"):
            engine.generate("abc", temperature=temperature)
        with pytest.raises(UserError, match="diverged"):
            engine.generate_batch([[5], [6, 7]], temperature=temperature)
    assert engine.running == {} and engine.waiting == [] and engine.kv_cache is None


def test_the_samples_of_a_diverged_run_do_not_end_it(tokenizer, diverged, capsys):
    shown = sample_texts(diverged, tokenizer, ["abc", "d"], max_new_tokens=4)
    assert all("not finite" in one["text"] for one in shown)
    assert capsys.readouterr().out.count("not finite") == 2


def test_samples_are_those_of_each_prompt_and_come_in_the_same_steps(
        engine, tokenizer, monkeypatch):
    model = engine.model
    prompts = ["abc", "the cat", "x " * model.config.max_seq_len]
    wanted = [engine.generate(one, max_new_tokens=5, temperature=0) for one in prompts[:2]]
    steps = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
    shown = sample_texts(model, tokenizer, prompts, max_new_tokens=5)
    assert [one["text"] for one in shown[:2]] == wanted and "shorten it" in shown[2]["text"]
    assert len(steps) <= 5


# ------------------------------------------------------------------------------------------------
# the tool, and what is shown

class Scripted:
    """Stands for a model: says a fixed list of tokens, whatever it reads."""

    def __init__(self, tokenizer, script):
        self.config = GPTConfig(max_seq_len=64)
        self.embed = torch.nn.Embedding(1, 1)
        self.vocab_size = tokenizer.get_vocab_size()
        self.script = iter(script)

    def new_kv_cache(self, slots, length):
        return KVCache([LayerCache(slots, length, 1, 1, "cpu", torch.float32)], slots, "cpu")

    def prefill(self, idx, kv_cache, slots, lengths):
        return self.next_logits()

    def decode(self, idx, kv_cache):
        return self.next_logits()

    def next_logits(self):
        logits = torch.zeros(1, self.vocab_size)
        logits[0, next(self.script, 0)] = 9.0
        return logits


def scripted_run(tokenizer, expression):
    special, text = tokenizer.encode_special, tokenizer.encode
    call = [special("<|python_start|>"), *text(expression), special("<|python_end|>")]
    reply = [special("<|output_start|>"), *text("84"), special("<|output_end|>")]
    # what it wants to say during the reply does not count
    end = special("<|assistant_end|>")
    script = call + [0] * len(reply) + text("It is 84.") + [end]
    messages = [{"role": "user", "content": "12*7"}]
    prompt = tokenizer.render_for_completion({"messages": messages})
    return Engine(Scripted(tokenizer, script), tokenizer), prompt, call + reply


def run_scripted(tokenizer, expression):
    """The sequences of a scripted run, one."""
    engine, prompt, _ = scripted_run(tokenizer, expression)
    return engine.run([engine.new_sequence(prompt, max_new_tokens=40, temperature=0)])


def test_the_tool_runs_inside_and_its_reply_is_forced(tokenizer):
    """docs/traps.md: forced-tokens"""
    engine, prompt, start = scripted_run(tokenizer, "12*7")
    (ids,) = engine.generate_batch([prompt], max_new_tokens=40, temperature=0)
    assert ids[:len(start)] == start
    (again,) = run_scripted(tokenizer, "12*7")
    reply = tokenizer.encode_special("<|output_start|>"), tokenizer.encode_special("<|output_end|>")
    first, last = (again.tokens.index(token) for token in reply)
    forced = [place for place, sampled in enumerate(again.sampled) if not sampled]
    assert forced == list(range(first, last + 1)), "the rest is the model's own"
    parts = tokenizer.parse_completion(ids)
    assert [part["text"] for part in parts] == ["12*7", "84", "It is 84."]


def test_control_tokens_are_not_printed_but_tool_calls_are_readable(tokenizer):
    """docs/traps.md: control-tokens"""
    engine, prompt, _ = scripted_run(tokenizer, "12*7")
    text = engine.generate(prompt, max_new_tokens=40, temperature=0)
    assert text == "`12*7` → 84\nIt is 84."


def scripted(tokenizer, script):
    return Engine(Scripted(tokenizer, script), tokenizer)


@pytest.mark.parametrize("max_slots", [None, 2])
@pytest.mark.parametrize("limit", [40, 12])
def test_a_long_reply_is_fed_in_one_step_and_changes_no_token(
        tokenizer, monkeypatch, max_slots, limit):
    monkeypatch.setattr("nanochat.engine.use_tool", lambda call: "the cat sat on the mat. " * 4)
    monkeypatch.setattr("nanochat.engine.CHUNK_TOKENS", 25)
    call, end = (tokenizer.encode_special(f"<|python_{name}|>") for name in ("start", "end"))
    model = make_model(tokenizer, T=96)
    (told,) = Engine(model, tokenizer).generate_batch([[5]], max_new_tokens=1, temperature=0)

    def answer(short_reply):
        """Tokens of a sequence that begins with a call, of another one, and the most of a step."""
        monkeypatch.setattr("nanochat.engine.SHORT_REPLY", short_reply)
        engine = Engine(model, tokenizer, max_slots=max_slots)
        sequence, other = (
            engine.new_sequence([5], max_new_tokens=limit, seed=i, ignore_stop_tokens=True)
            for i in range(2))
        sequence.forced = [*told, call, 7, end]
        engine.admit(sequence)
        engine.admit(other)
        lengths = [0]
        while sequence.status != "finished" or other.status != "finished":
            engine.step()
            lengths.append(len(sequence.tokens))
        most = max(b - a for a, b in zip(lengths, lengths[1:]))
        return sequence.tokens, sequence.sampled, other.tokens, most

    *fed_one_by_one, most = answer(1000)
    assert most == 1 and False in fed_one_by_one[1][4:]
    *fed_at_once, most = answer(16)
    assert fed_at_once == fed_one_by_one and len(fed_at_once[0]) == limit
    assert most == min(25, limit - 4)


def test_no_control_token_is_printed_wherever_it_comes(tokenizer):
    """docs/traps.md: control-tokens"""
    names = [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", "<|assistant_end|>")]
    script = []
    for name in names:
        script += [tokenizer.encode_special(name), *tokenizer.encode("at")]
    engine = scripted(tokenizer, script)
    text = engine.generate([5], max_new_tokens=len(script), temperature=0)
    assert text.count("at") == len(names)
    assert "<|" not in text and "|>" not in text


def test_a_model_that_never_stops_is_stopped_at_the_context(tokenizer):
    """docs/traps.md: kv-cache-bounds"""
    prompt, script = [9] * 40, [5] * 99
    stream = scripted(tokenizer, script).stream(prompt, max_new_tokens=100, temperature=0)
    assert "".join(stream) == tokenizer.decode([5] * 24)
    counts = stream.prompt_tokens, stream.completion_tokens
    assert (stream.finish_reason, *counts) == ("length", 40, 24)
    stream = scripted(tokenizer, script).stream(prompt, max_new_tokens=7, temperature=0)
    assert len("".join(stream)) == 7 and stream.finish_reason == "length"
