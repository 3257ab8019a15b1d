"""Exports of trained models: the same model in other programs, or none at all."""
import json
import shutil

import pytest
import torch

from core_cases import small_tokenizer
from models import make_model
from nanochat import export_check
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.export_check import TEXTS, TRICKY_TEXTS, check_hf
from nanochat.gpt import GPT
from nanochat.hf_export import REASONS, Sampling, export_hf, hf_class_of, round_weights
from nanochat.hf_model import load_hf_model
from nanochat.tokenizer import ESCAPE
from nanochat.tokenizer_json import read_tokenizer_json
from nanochat.variants import MODEL_CLASSES
from nanochat.variants.portable import PortableGPT
from stage_runs import TINY

transformers = pytest.importorskip("transformers", reason="the program that loads an export")
pytest.importorskip("safetensors", reason="the format of an export")
if not hasattr(transformers, "NanoChatForCausalLM"):
    pytest.skip("this transformers has no NanoChat", allow_module_level=True)

SAMPLING = Sampling(0.6, 50, 1.1)


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

def test_a_trained_model_leaves_with_its_numbers_and_continues_texts_alike(
        stages, text, tmp_path, monkeypatch):
    words = ("--model=portable", "--num_iterations=10", "--model_tag=small")
    trained = stages.fork_record("scripts.base_train", f"--data={text}", *TINY, *words)
    out = tmp_path / "exported"
    command = ("scripts.export", "--source=base", "--model_tag=small", f"--out={out}")
    record = stages.fork_record(*command)
    assert record["architecture"] == "Qwen3ForCausalLM" and record["failed"] == []
    assert record["checked"].keys() == {"logits", "ids", "conversations", "greedy text"}
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"

    # a pipeline of transformers continues a text as our engine does
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(stages.base))
    model, tokenizer, _ = load_model("base", "cpu", model_tag="small")
    ours = Engine(model, tokenizer).generate("The small cat", max_new_tokens=12, temperature=0)
    pipeline = transformers.pipeline("text-generation", str(out), device="cpu")
    [theirs] = pipeline(
        "The small cat", max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
    assert ours.strip() and theirs["generated_text"] == "The small cat" + ours

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| base_train | 10 |" in card and f"{trained['val_bpb']:.4f}" in card
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["repetition_penalty"] == 1.1

    # a folder that is there is left alone, and so is what it holds
    assert "exists" in stages.refusal(*command)
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("name", REASONS)
def test_every_other_variant_is_refused_with_a_reason(name):
    assert REASONS.keys() | {"gpt", "portable"} == MODEL_CLASSES.keys()
    with pytest.raises(UserError, match=f"a {name} model cannot leave .*--model=portable"):
        hf_class_of(make_model(MODEL_CLASSES[name]))


# ------------------------------------------------------------------------------------------------
# the check

def test_a_whole_export_passes_every_comparison(portable, tokenizer):
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
    assert not export_check._parts_at_a_tie(model, prompt, [best], [worst])
    assert not export_check._parts_at_a_tie(model, prompt, [best, best], [best])
    level = make_model(PortableGPT, vocab_size=tokenizer.get_vocab_size()).eval()
    with torch.no_grad():
        level.head.weight[worst] = level.head.weight[best]
    assert export_check._parts_at_a_tie(level, prompt[:8], [best], [worst])


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
