"""The compiled decode step against model.decode()."""
import threading

import pytest
import torch
from models import CONTEXT, make_model, steps_of

from nanochat.common import UserError
from nanochat.decoding import CompiledDecode, use_fast_linear
from nanochat.engine import Engine, serving_engine
from nanochat.fast_linear import FastLinear, can_multiply_fast
from nanochat.gpt import GPT
from nanochat.variants.deepseek import DeepSeekGPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.mla import MLAGPT
from nanochat.variants.ngrams import NGramGPT
from nanochat.variants.portable import PortableGPT

pytestmark = pytest.mark.skipif(
    not can_multiply_fast(torch.device("cpu")), reason="this torch has no oneDNN")
SLOTS = 3
PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3, 3, 3, 3]]


def filled_cache(model):
    """A cache with a prompt in each slot."""
    kv_cache = model.new_kv_cache(SLOTS, CONTEXT)
    for slot, prompt in enumerate(PROMPTS):
        model.prefill(torch.tensor([prompt]), kv_cache, [slot], [len(prompt)])
        kv_cache.advance([slot], [len(prompt)])
    return kv_cache


def compare(model, turns, tolerance, int8=False):
    """Assert that compiled steps give the logits of model.decode(), with the same weights."""
    with torch.inference_mode():
        use_fast_linear(model, int8)
        kv_cache = filled_cache(model)
        wanted = steps_of(
            lambda tokens, slots: model.decode(torch.tensor(tokens)[:, None], kv_cache, slots),
            kv_cache,
            turns,
        )
        kv_cache = filled_cache(model)
        compiled = CompiledDecode(model, kv_cache)
        found = steps_of(compiled, kv_cache, turns)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    return compiled


def test_one_sequence_then_another_then_all_of_them_in_any_order():
    model = make_model(GPT, depth=1, kv_heads=2).eval()
    turns = [[0], [2], [0], [2, 0, 1], [1], [0, 1, 2], *[[1]] * 6]
    compiled = compare(model, turns, 1e-4)
    assert compiled.batches == [1, 3]


@pytest.mark.parametrize("model_class", [LookupGPT, NGramGPT, PortableGPT])
def test_a_variant_is_compiled_with_what_it_overrides(model_class):
    compare(make_model(model_class, depth=1).eval(), [[1], [1], [0], [2]], 1e-4)


@pytest.mark.parametrize("model_class", [MLAGPT, DeepSeekGPT])
def test_latents_and_experts_are_compiled(model_class):
    more = {"dense_layers": 0} if model_class is DeepSeekGPT else {}
    compare(make_model(model_class, depth=1, **more).eval(), [[1], [0], [2, 0]], 1e-4)


def test_int8_weights_give_the_logits_of_the_rounded_weights():
    compare(make_model(GPT, depth=1).eval(), [[0], [0]], 1e-3, int8=True)


def test_bfloat16_differs_by_its_rounding_alone():
    model = make_model(GPT, depth=1).eval().cast_for_inference(torch.bfloat16)
    compare(model, [[0], [0]], 0.1)


def test_a_number_of_sequences_between_two_that_are_compiled_is_padded():
    model = make_model(GPT, depth=1).eval()
    with torch.inference_mode():
        kv_cache = filled_cache(model)
        before = [layer.k.clone() for layer in kv_cache.layers]
        compiled = CompiledDecode(model, kv_cache)
        found = compiled([11, 12], [2, 0])
        wanted = model.decode(torch.tensor([[11], [12]]), kv_cache, [2, 0])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for layer, old in zip(kv_cache.layers, before):
        assert layer.k[1].equal(old[1])     # the slot that nobody decodes


def test_while_another_thread_compiles_the_engine_decodes_as_ever(monkeypatch):
    """docs/traps.md: compiling-elsewhere"""
    model = use_fast_linear(make_model(GPT, depth=1).eval())
    with torch.inference_mode():
        kv_cache = filled_cache(model)
        wanted = model.decode(torch.tensor([[11]]), kv_cache, [0])
        # what torch sets for the whole process, and what only compiled code is to call
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr("nanochat.attention.attend_by_sums", None)
        monkeypatch.setattr(FastLinear, "multiply_one", None)
        assert model.decode(torch.tensor([[11]]), kv_cache, [0]).equal(wanted)


class Tokenizer:
    """What the engine asks of one that never writes a special token."""

    def encode_special(self, name):
        return -1

    def get_vocab_size(self):
        return 97


def test_the_engine_gives_the_same_tokens_before_and_after_it_is_compiled():
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "seed": 3}
    plain = Engine(make_model(GPT, depth=1).eval(), Tokenizer(), max_slots=SLOTS)
    wanted = plain.generate_batch(PROMPTS, **options)
    engine = serving_engine(make_model(GPT, depth=1).eval(), Tokenizer(), max_slots=SLOTS)
    early = engine.generate_batch(PROMPTS, **options)
    [thread] = [one for one in threading.enumerate() if one.name == "compile"]
    thread.join()
    assert engine.compiled_decode.ready == {1, 3}
    assert engine.generate_batch(PROMPTS, **options) == early == wanted


def test_where_nothing_can_be_compiled_one_line_says_so_and_the_engine_answers(capsys):
    model = make_model(GPT, depth=1).eval()
    compiled = CompiledDecode(model, model.new_kv_cache(1, CONTEXT))

    def fail(*inputs):
        raise OSError("no room\nand a long trace")

    compiled.compiled = dict.fromkeys(compiled.batches, fail)
    compiled.warm_up_behind().join()
    assert not compiled.is_ready(1)
    assert "stays uncompiled, which is slower (no room)" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["int4", "float8"])
def test_other_weights_are_refused(weights):
    with pytest.raises(UserError, match=f"weights={weights}"):
        serving_engine(make_model(GPT, depth=1), Tokenizer(), weights=weights)
