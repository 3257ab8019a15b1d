"""Generation: cached equals recomputed, alone equals in a batch, the tool runs inside, and nothing control-like is shown."""
import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20], 290)


def make_model(tokenizer, kv_heads=None, T=48):
    torch.manual_seed(1)
    config = GPTConfig(depth=2, width=64, heads=4, kv_heads=kv_heads or 4, vocab_size=tokenizer.get_vocab_size(), max_seq_len=T)
    model = GPT(config)
    model.init_weights()
    for p in model.parameters():  # zero-initialised projections would make every model the same
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(make_model(tokenizer), tokenizer)


def recomputed(model, prompt, count):
    """Greedy decoding without a cache, the slow twin."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_greedy_decoding_equals_recomputing(tokenizer, kv_heads):
    model = make_model(tokenizer, kv_heads)
    with torch.no_grad():
        for prompt in ([5], [5, 9, 70], list(range(20, 40))):
            (fast,) = Engine(model, tokenizer).generate_batch([prompt], max_new_tokens=12, temperature=0)
            assert fast == recomputed(model, prompt, len(fast))


def test_trap_33_a_request_alone_and_in_a_ragged_batch_agree(engine):
    prompts = [[5], [5, 9, 70, 33, 12], list(range(20, 40)), [7, 7]]
    together = engine.generate_batch(prompts, max_new_tokens=16, temperature=1.0, top_k=20, seed=3)
    for prompt, ids in zip(prompts, together):
        assert engine.generate_batch([prompt], max_new_tokens=16, temperature=1.0, top_k=20, seed=3) == [ids]


def test_trap_34_generation_ends_with_the_context(engine):
    prompt = [9] * 40
    stream = engine.stream(prompt, max_new_tokens=100)
    assert stream.finish_reason is None
    list(stream)
    assert stream.finish_reason in ("length", "stop") and 40 + stream.completion_tokens <= engine.max_seq_len


def test_trap_34_prompts_of_one_token_of_none_and_of_too_many(engine):
    assert isinstance(engine.generate([5], max_new_tokens=3), str)
    for bad in ("", [], [5] * 48):
        with pytest.raises(UserError):
            engine.generate(bad)


def test_stream_pieces_join_to_what_generate_returns(engine):
    assert "".join(engine.stream("the cat", max_new_tokens=20, seed=5)) == engine.generate("the cat", max_new_tokens=20, seed=5)


def test_sampling_at_temperature_zero_is_greedy_and_top_k_bounds_it():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, 0, 50, generator) == 1
    assert {sample(logits, 1.0, 2, generator) for _ in range(100)} == {1, 3}
    assert sample(logits, 1.0, 0, generator) in range(4)


class Scripted:
    """Stands for a model: says a fixed list of tokens, whatever it reads."""

    def __init__(self, tokenizer, script):
        self.config = GPTConfig(max_seq_len=64)
        self.embed = torch.nn.Embedding(1, 1)
        self.V, self.script, self.fed = tokenizer.get_vocab_size(), script, []

    def new_cache(self, B, T):
        return type("Cache", (), {"lengths": torch.zeros(B, dtype=torch.long)})()

    def features(self, idx, cache):
        self.fed += idx[0].tolist()
        return torch.zeros(*idx.shape, 1), torch.zeros(*idx.shape, 1)

    def logits(self, x, tokens):
        said = len(self.fed) - self.prompt_length
        logits = torch.zeros(1, self.V)
        logits[0, self.script[said] if said < len(self.script) else 0] = 9.0
        return logits


def scripted_run(tokenizer, expression):
    special, text = tokenizer.encode_special, tokenizer.encode
    call = [special("<|python_start|>"), *text(expression), special("<|python_end|>")]
    reply = [special("<|output_start|>"), *text("84"), special("<|output_end|>")]
    # what it wants to say during the reply does not count
    script = call + [0] * len(reply) + text("It is 84.") + [special("<|assistant_end|>")]
    model = Scripted(tokenizer, script)
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "12*7"}]})
    model.prompt_length = len(prompt)
    return Engine(model, tokenizer), prompt, call + reply


def test_the_tool_runs_inside_and_its_reply_is_forced(tokenizer):
    engine, prompt, start = scripted_run(tokenizer, "12*7")
    (ids,) = engine.generate_batch([prompt], max_new_tokens=40, temperature=0)
    assert ids[:len(start)] == start
    assert [part["text"] for part in tokenizer.parse_completion(ids)] == ["12*7", "84", "It is 84."]


def test_trap_37_control_tokens_are_not_printed_but_tool_calls_are_readable(tokenizer):
    engine, prompt, _ = scripted_run(tokenizer, "12*7")
    assert engine.generate(prompt, max_new_tokens=40, temperature=0) == "`12*7` → 84\nIt is 84."


def scripted(tokenizer, script, prompt_length):
    model = Scripted(tokenizer, script)
    model.prompt_length = prompt_length
    return Engine(model, tokenizer)


def test_trap_37_no_control_token_is_printed_wherever_it_comes(tokenizer):
    names = [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", "<|assistant_end|>")]
    script = [i for name in names for i in (tokenizer.encode_special(name), *tokenizer.encode("at"))]
    text = scripted(tokenizer, script, 1).generate([5], max_new_tokens=len(script), temperature=0)
    assert text.count("at") == len(names)
    assert "<|" not in text and "|>" not in text


def test_trap_34_a_model_that_never_stops_is_stopped_at_the_context(tokenizer):
    engine = scripted(tokenizer, [5] * 99, 40)
    stream = engine.stream([9] * 40, max_new_tokens=100, temperature=0)
    assert "".join(stream) == tokenizer.decode([5] * 24)
    assert (stream.finish_reason, stream.prompt_tokens, stream.completion_tokens) == ("length", 40, 24)
    stream = scripted(tokenizer, [5] * 99, 40).stream([9] * 40, max_new_tokens=7, temperature=0)
    assert len("".join(stream)) == 7 and stream.finish_reason == "length"


def test_sampling_takes_any_temperature_above_zero_and_refuses_those_below(engine):
    logits, generator = torch.randn(50) * 5, torch.Generator().manual_seed(1)
    assert sample(logits, 1e-40, 50, generator) == int(logits.argmax())
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="must not be negative"):
            engine.generate("abc", **wrong)
