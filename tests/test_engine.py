"""Generation: cached equals recomputed, alone equals among others, the tool runs inside, and
nothing that looks like a control token is shown."""
import contextlib

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, sample, sample_texts
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.ngrams import NGramGPT
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
    samples = engine.generate_batch([prompt] * 3, seeds=[1, 2, 1], **options)
    assert samples[0] == samples[2] != samples[1]
    assert [samples[1]] == engine.generate_batch([prompt], seed=2, **options)


@pytest.mark.parametrize("model_class", [GPT, LookupGPT, NGramGPT])
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
# errors

NAN = float("nan")


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
    (shown,) = sample_texts(diverged, tokenizer, ["abc"], max_new_tokens=4)
    assert "not finite" in shown["text"] and "not finite" in capsys.readouterr().out


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
