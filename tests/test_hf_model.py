"""A model of ours, exported for transformers, gets the verdicts that it gets here."""
import shutil

import pytest

from core_cases import rows_of, small_tokenizer
from models import make_model
from nanochat.common import UserError
from nanochat.core_bundle import CoreTask
from nanochat.core_eval import as_encoder, in_order, judge, make_examples
from nanochat.hf_export import export_hf
from nanochat.hf_model import load_hf_model
from nanochat.loss_check import check_loss
from nanochat.loss_eval import score_documents
from nanochat.sampling import SamplingOptions

CONTEXT = 64


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, our tokenizer, the folder of the export)"""
    transformers = pytest.importorskip("transformers", reason="the outside opinion")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChat")
    tokenizer = small_tokenizer()
    model = make_model(vocab_size=tokenizer.get_vocab_size()).eval()
    model.config.max_seq_len = CONTEXT
    model.build_rotary()
    folder = tmp_path_factory.mktemp("exported")
    export_hf(model, tokenizer, folder, "float32", False, SamplingOptions(), "a card")
    return model, tokenizer, folder


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_verdicts_equal_those_of_transformers(exported, kind):
    model, tokenizer, folder = exported
    theirs, their_tokenizer = load_hf_model(str(folder), "cpu")
    assert theirs.config.max_seq_len == CONTEXT
    task = CoreTask(kind, kind, 2, " ", 0.0, rows_of(kind))
    rows = in_order(task.rows)
    found = []
    for one, tokens in ((model, tokenizer), (theirs, their_tokenizer)):
        examples = make_examples(task, rows, range(8), as_encoder(tokens), CONTEXT)
        found.append((examples, judge(one, examples, "cpu")))
    for ours, others in zip(*(examples for examples, _ in found)):
        for ids, their_ids in zip(ours.sequences, others.sequences):
            assert ids.tolist() == their_ids.tolist()
    for ours, others in zip(*(verdicts for _, verdicts in found)):
        assert ours.credit == others.credit
        assert ours.margin == pytest.approx(others.margin, abs=1e-4)


def test_bits_per_byte_equal_those_of_transformers_and_its_loss_passes(exported):
    model, tokenizer, folder = exported
    theirs, their_tokenizer = load_hf_model(str(folder), "cpu")
    documents = ["Ann has a red hat. " * 20, "caf\u00e9 \U0001f600", "ten"]
    ours = score_documents(model, tokenizer, documents, "cpu")
    others = score_documents(theirs, their_tokenizer, documents, "cpu")
    assert others[1:3] == ours[1:3], "as many bytes and tokens"
    assert others.bits_per_byte == pytest.approx(ours.bits_per_byte, rel=1e-4)
    findings = check_loss(theirs, their_tokenizer, documents, "cpu")
    assert [finding.name for finding in findings if not finding.passed] == []
    assert len(findings) == 6

    # before it was trained, and with a tokenizer that changes the text
    fresh = score_documents(theirs.step_zero(), their_tokenizer, documents, "cpu")
    assert fresh.bits_per_byte != pytest.approx(others.bits_per_byte, rel=1e-3)
    whole = their_tokenizer.decode
    their_tokenizer.decode = lambda ids: whole(ids).lower()
    findings = check_loss(theirs, their_tokenizer, documents, "cpu")
    assert [finding.name for finding in findings if not finding.passed] == ["whole text"]


@pytest.mark.parametrize("what", ["cut", "without a weight"])
def test_weights_that_are_not_whole_are_refused_in_one_line(exported, tmp_path, what):
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "model"
    shutil.copytree(exported[2], folder)
    path = folder / "model.safetensors"
    if what == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        weights = load_file(path)
        del weights["lm_head.weight"]
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_hf_model(str(folder), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, words", [
    ("nowhere", "no folder with a config.json"),
    ("empty", "no folder with a config.json"),
    ("damaged", "cannot be loaded"),
])
def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, name, words):
    pytest.importorskip("transformers", reason="it reads the folder")
    if name != "nowhere":
        (tmp_path / name).mkdir()
    if name == "damaged":
        (tmp_path / name / "config.json").write_text('{"model_type": "none"}', encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        load_hf_model(str(tmp_path / name), "cpu")
    assert "\n" not in str(error.value)
