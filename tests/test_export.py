"""Exports of trained models: the same model in other programs, or none at all."""
import json
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from conftest import last_json
from core_cases import small_tokenizer
from models import make_model
from nanochat import export_check
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.export_check import TEXTS, TRICKY_TEXTS, check_hf
from nanochat.gpt import GPT
from nanochat.gguf_check import check_gguf
from nanochat.gguf_export import export_gguf, pre_tokenizer, require_portable, round_to_gguf
from nanochat.hf_export import (
    QWEN3,
    REASONS,
    export_hf,
    hf_class_of,
    portable_config,
    round_weights,
    tokenizer_json,
)
from nanochat.hf_model import load_hf_model
from nanochat.sampling import SamplingOptions
from nanochat.tokenizer import ESCAPE, Tokenizer, one_digit_pattern
from nanochat.tokenizer_json import read_tokenizer_json
from nanochat.variants import MODEL_CLASSES
from nanochat.variants.portable import PortableGPT
from stage_runs import TINY

transformers = pytest.importorskip("transformers", reason="the program that loads an export")
pytest.importorskip("safetensors", reason="the format of an export")
if not hasattr(transformers, "NanoChatForCausalLM"):
    pytest.skip("this transformers has no NanoChat", allow_module_level=True)

SAMPLING = SamplingOptions(temperature=0.6, top_k=50, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def portable(tokenizer, tmp_path_factory):
    """(a portable model with weights that all matter, the folder of its export)"""
    model = make_model(PortableGPT, vocab_size=tokenizer.get_vocab_size(), gains=False).eval()
    model.config.max_seq_len = 256
    model.build_rotary()
    folder = tmp_path_factory.mktemp("portable")
    export_hf(model, tokenizer, folder, "float32", True, SAMPLING, "a card")
    return model, folder


def findings_of(model, tokenizer, folder):
    return {finding.name: finding for finding in check_hf(model, tokenizer, folder)}


# ------------------------------------------------------------------------------------------------
# trained, exported, loaded

@pytest.fixture(scope="module")
def small(stages, text):
    """The record of a portable model whose tokens hold one digit at most, as llama.cpp's."""
    stages.fork_record("scripts.tok_train", f"--data={text}", "--vocab_size=340", "--digits=1")
    words = ("--model=portable", "--num_iterations=10", "--model_tag=small")
    return stages.fork_record("scripts.base_train", f"--data={text}", *TINY, *words)


@pytest.fixture
def export(stages, monkeypatch, capsys):
    """A function that runs scripts.export of the model `small` in this process, which has imported
    transformers already, and returns its record."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(stages.base))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("nanochat.common._set_up_threads", lambda is_dist: None)

    def run(*words):
        words = ("scripts.export", "--source=base", "--model_tag=small", *words)
        monkeypatch.setattr(sys, "argv", list(words))
        try:
            runpy.run_module("scripts.export", run_name="__main__", alter_sys=False)
        except SystemExit as end:
            assert end.code == 1, "a difference"
        return last_json(capsys.readouterr().out)

    return run


@pytest.fixture
def continued(stages, small, monkeypatch):
    """What our engine continues "The small cat" with, greedily: 12 tokens."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(stages.base))
    model, tokenizer, _ = load_model("base", "cpu", model_tag="small")
    text = Engine(model, tokenizer).generate("The small cat", max_new_tokens=12, temperature=0)
    assert text.strip()
    return text


def test_a_trained_model_leaves_with_its_numbers_and_continues_texts_alike(
        export, small, tmp_path, continued):
    out = tmp_path / "exported"
    record = export(f"--out={out}")
    assert record["architecture"] == "Qwen3ForCausalLM" and record["failed"] == []
    assert record["checked"].keys() == {"logits", "ids", "conversations", "greedy text"}
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"

    pipeline = transformers.pipeline("text-generation", str(out), device="cpu")
    [theirs] = pipeline(
        "The small cat", max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
    assert theirs["generated_text"] == "The small cat" + continued

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| base_train | 10 |" in card and f"{small['val_bpb']:.4f}" in card
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["repetition_penalty"] == 1.1

    # a folder that is there is left alone, and so is what it holds
    with pytest.raises(UserError, match="exists"):
        export(f"--out={out}")
    assert (out / "model.safetensors").is_file()


def test_a_trained_model_leaves_for_ollama_and_llama_cpp_continues_texts_alike(
        export, small, tmp_path, continued):
    pytest.importorskip("gguf", reason="the format of llama.cpp's models")
    out = tmp_path / "exported"
    record = export("--to=ollama", f"--out={out}")
    assert record["failed"] == [] and "tensors" in record["checked"]
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile", "README.md"}
    modelfile = (out / "Modelfile").read_text(encoding="utf-8")
    assert "PARAMETER repeat_penalty 1.1\n" in modelfile and 'stop "<|bos|>"' in modelfile

    llama_cpp = pytest.importorskip("llama_cpp", reason="the program that loads an export")
    llama = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=128, n_threads=1, verbose=False)
    theirs = llama("The small cat", max_tokens=12, temperature=0.0, repeat_penalty=1.0)
    assert theirs["choices"][0]["text"] == continued


def test_an_export_that_differs_is_deleted_and_ends_with_status_1(
        export, small, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.hf_export.QWEN3", QWEN3._replace(config_of=another_rotation))
    record = export(f"--out={tmp_path / 'exported'}")
    assert record["folder"] is None and "logits" in record["failed"]
    assert list(tmp_path.iterdir()) == []


def another_rotation(config):
    return portable_config(replace(config, rotary_base=500.0))


@pytest.mark.parametrize("name", REASONS)
def test_every_other_variant_is_refused_with_a_reason(name):
    assert REASONS.keys() | {"gpt", "portable"} == MODEL_CLASSES.keys()
    with pytest.raises(UserError, match=f"a {name} model cannot leave .*--model=portable"):
        hf_class_of(make_model(MODEL_CLASSES[name]))


# ------------------------------------------------------------------------------------------------
# the check

def test_a_whole_export_passes_every_comparison(portable, tokenizer, monkeypatch):
    monkeypatch.setattr(export_check, "GREEDY_TOKENS", 8)
    model, folder = portable
    findings = findings_of(model, tokenizer, folder)
    assert [finding.line() for finding in findings.values() if not finding.passed] == []
    assert "20 prompts" in findings["greedy text"].detail


def logits_findings(model, tokenizer, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    export_hf(model, tokenizer, folder, "bfloat16", False, SAMPLING, "a card")
    return check_hf(model, tokenizer, folder)


@pytest.mark.parametrize("model_class, more", [
    (GPT, {}),
    (PortableGPT, {"tied": True}),
    (PortableGPT, {"qk_norm": False, "head_dim": 24}),
], ids=["gpt", "qwen3", "llama"])
def test_weights_in_bfloat16_are_compared_with_the_rounded_model(
        tokenizer, tmp_path, model_class, more):
    model = make_model(model_class, vocab_size=tokenizer.get_vocab_size(), **more).eval()
    exact = next(logits_findings(model, tokenizer, tmp_path, "exact"))
    assert not exact.passed, "rounding to bfloat16 changes the logits by more than is allowed"
    round_weights(model, "bfloat16")
    assert next(logits_findings(model, tokenizer, tmp_path, "rounded")).passed


def changed_rotation(folder):
    edit(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=500.0))


def dropped_layer(folder):
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=1))


def dropped_merge(folder):
    def change(content):
        content["model"]["ignore_merges"] = False
        del content["model"]["merges"][0]
    edit(folder / "tokenizer.json", change)


def no_escape(folder):
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(f"<{ESCAPE}|", "<|"), encoding="utf-8")


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("damage, differing", [
    (changed_rotation, {"logits", "greedy text"}),
    (dropped_layer, {"logits", "greedy text"}),
    (dropped_merge, {"ids"}),
    (no_escape, {"conversations"}),
])
def test_what_differs_is_found_although_it_loads(
        portable, tokenizer, tmp_path, monkeypatch, damage, differing):
    """docs/traps.md: another-model-loads"""
    monkeypatch.setattr(export_check, "GREEDY_TOKENS", 4)
    model, folder = portable
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    findings = findings_of(model, tokenizer, copy)
    assert {name for name, finding in findings.items() if not finding.passed} == differing


def test_texts_part_without_a_finding_only_where_two_tokens_are_level(portable, tokenizer):
    model, _ = portable
    prompt = export_check.greedy_prompts(model, tokenizer)[0]
    [best] = model.next_token_logits([prompt]).argmax(-1).tolist()
    worst = int(model.next_token_logits([prompt]).argmin())
    assert not export_check._parts_at_a_tie(model, prompt, [best], [worst], 1e-3)
    assert not export_check._parts_at_a_tie(model, prompt, [best, best], [best], 1e-3)
    level = make_model(PortableGPT, vocab_size=tokenizer.get_vocab_size()).eval()
    with torch.no_grad():
        level.head.weight[worst] = level.head.weight[best]
    assert export_check._parts_at_a_tie(level, prompt[:8], [best], [worst], 1e-3)


# ------------------------------------------------------------------------------------------------
# the tokenizer and its template

def test_no_text_becomes_a_control_token_and_none_is_changed(portable, tokenizer):
    _, hf_tokenizer = load_hf_model(str(portable[1]), "cpu")
    fast = hf_tokenizer.tokenizer
    for typed in ("<|bos|>", f"<{ESCAPE}|bos|>", f"{ESCAPE * 3}<|", f"<{ESCAPE * 2}|x"):
        messages = [{"role": "user", "content": typed}]
        ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.render_for_completion({"messages": messages})
        assert tokenizer.decode(ids) == typed


@pytest.mark.parametrize("messages, words", [
    ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "comes first"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "take turns"),
    ([{"role": "assistant", "content": "a"}], "take turns"),
    ([{"role": "tool", "content": "a"}], "replies"),
    ([{"role": "judge", "content": "a"}], "a role is"),
    ([{"role": "user", "content": [{"type": "image"}]}], "parts of type text"),
])
def test_the_template_refuses_what_the_model_has_never_read(portable, messages, words):
    from jinja2.exceptions import TemplateError
    _, hf_tokenizer = load_hf_model(str(portable[1]), "cpu")
    with pytest.raises(TemplateError, match=words):
        hf_tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_exported_tokenizer_is_read_back_as_ours(portable, tokenizer):
    again = read_tokenizer_json(portable[1] / "tokenizer.json")
    texts = [*TEXTS, *TRICKY_TEXTS]
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.get_vocab_size() == tokenizer.get_vocab_size()
    assert again.get_bos_token_id() == tokenizer.get_bos_token_id()


def test_a_vocabulary_of_single_digits_is_read_back_as_it_was(tmp_path):
    tokenizer = digit_tokenizer()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(tokenizer)), encoding="utf-8")
    assert read_tokenizer_json(path).fingerprint == tokenizer.fingerprint


# ------------------------------------------------------------------------------------------------
# llama.cpp

def digit_tokenizer():
    """A vocabulary of 285 whose tokens hold one digit at most."""
    return Tokenizer.train_from_iterator(NUMBERS, 285, pattern=one_digit_pattern())


NUMBERS = ["12 cats, 1234 dogs, 12 and 12", "Ann has 2026 hats", "the map, the map"] * 9


@pytest.mark.parametrize("more, dtype", [
    ({"gains": False}, "float32"),
    ({"qk_norm": False, "head_dim": 32, "tied": True}, "q8_0"),
], ids=["qwen3", "llama"])
def test_llama_cpp_reads_the_same_model(tmp_path, monkeypatch, more, dtype):
    pytest.importorskip("gguf", reason="the format of llama.cpp's models")
    monkeypatch.setattr(export_check, "GREEDY_TOKENS", 6)
    tokenizer = digit_tokenizer()
    model = make_model(
        PortableGPT, kv_heads=2, vocab_size=tokenizer.get_vocab_size(), **more).eval()
    model.config.max_seq_len = 128
    model.build_rotary()
    round_to_gguf(model, dtype)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, dtype, True, "a name")
    findings = list(check_gguf(model, tokenizer, path, dtype))
    assert [finding.line() for finding in findings if not finding.passed] == []

    # other weights, which load as well, are found
    with torch.no_grad():
        model.blocks[1].attention.k.weight.mul_(-1)
    [tensors, *others] = check_gguf(model, tokenizer, path, dtype)
    assert not tensors.passed and "attn_k" in tensors.detail
    assert [finding.name for finding in others if not finding.passed] in (
        [], ["logits"], ["logits", "greedy text"])
    if "llama_cpp" not in sys.modules:
        pytest.skip("llama-cpp-python is not installed: the tensors alone were compared")
    assert others and not others[0].passed


def test_tokens_of_two_digits_stay_away_from_llama_cpp_unless_that_is_accepted():
    """docs/traps.md: another-model-loads"""
    pairs, single = Tokenizer.train_from_iterator(NUMBERS, 285), digit_tokenizer()
    assert len(pairs.encode("1234")) < 4 and len(single.encode("1234")) == 4
    assert pre_tokenizer(single) == "bailingmoe"
    with pytest.raises(UserError, match="--digits=1"):
        pre_tokenizer(pairs)
    assert pre_tokenizer(pairs, split_digits=True) == "bailingmoe"
    with pytest.raises(UserError, match="does not know"):
        pre_tokenizer(Tokenizer.train_from_iterator(NUMBERS, 285, pattern=r"\w+|\W+"))


def test_a_plain_gpt_has_no_place_in_llama_cpp():
    with pytest.raises(UserError, match="--model=portable"):
        require_portable(make_model(GPT))


@pytest.mark.parametrize("word, reason", [
    ("--dtype=f16", "65,504"),
    ("--dtype=q4_0", "choose from float32, bfloat16, q8_0"),
    ("--to=onnx", "choose hf or gguf or ollama"),
    ("--temperature=-1", "temperature=-1.0 must be at least 0"),
    ("--temperature=3", "temperature=3.0 must be at most 2"),
    ("--top_k=-5", "top_k=-5 must be at least 0"),
    ("--repetition_penalty=0", "repetition_penalty=0.0: it must be above 0"),
])
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(export, word, reason):
    with pytest.raises(UserError, match=reason) as error:
        export("--to=gguf", word, "--model_tag=no-such-model")
    assert "\n" not in str(error.value)
