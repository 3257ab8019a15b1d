"""Texts of several domains: which are read, what a document of each is, and what is written.

The hub is the one of hub_fakes.py, the models are small, and every text is made here."""
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import make_model
from nanochat import loss_check, loss_eval
from nanochat.common import UserError
from nanochat.gpt import GPT, Attention, Block
from nanochat.hub import HubError
from nanochat.loss_check import check_loss
from nanochat.loss_eval import (
    base_domain,
    domain_rows,
    figure_to_compare,
    recommended_shares,
    score_documents,
    surprise_ratios,
)
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.variants import CAUSAL, MODEL_CLASSES
from nanochat.variants.ngrams import NGramGPT
from tasks import domains
from tasks.domains import canonical_domains, check_best_by, load_domains, parse_domains

LONG = "One two three. " * 700  # longer than a text to train on may be, and than any context
DOCUMENTS = [LONG[:300], "caf\u00e9 \U0001f600 " * 9, "ten"]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# ------------------------------------------------------------------------------------------------
# files

GSM8K_ROW = {"question": "1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}
HUMANEVAL_ROW = {"prompt": "def one():\n", "canonical_solution": "    return 1\n", "test": "x"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize("record, text", [
    ({"text": "A page.", "meta": [{"a": 1}]}, "A page."),
    ("A page.", "A page."),
    (GSM8K_ROW, "1+2?\n1+2=<<1+2=3>>3\n#### 3"),
    (HUMANEVAL_ROW, "def one():\n    return 1\n"),
    ({"content": "import os\n", "repo": "x"}, "import os\n"),
    ({"messages": TALK}, "User: Hi\n\nAssistant: Hello."),
])
def test_a_record_of_each_form_is_one_document(tmp_path, record, text):
    lines = write_lines(tmp_path / "a.jsonl", [record, {"text": None}, record])
    [found] = load_domains(f"mine={lines}", most=9)
    assert found == ("mine", [text, text])
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([record, record]), encoding="utf-8")
    assert load_domains(f"mine={listed}", most=1)[0].documents == [text]
    if isinstance(record, dict):
        columns = {key: [value] for key, value in record.items()}
        table = write_parquet(tmp_path / "a.parquet", **columns)
        assert load_domains(f"mine={table}", most=9)[0].documents == [text]


def test_a_table_and_a_note_are_read_and_a_long_text_stays_whole(tmp_path):
    (tmp_path / "a.csv").write_text('question;answer\n"1;2?";3\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text(LONG, encoding="utf-8")
    write_lines(tmp_path / "c.jsonl", [{"text": LONG}])
    table, note, lines = load_domains(str(tmp_path), most=9)
    assert table == ("a", ["1;2?\n3"]) and note == ("b", [LONG]) and lines == ("c", [LONG])
    [together] = load_domains(f"all={tmp_path}", most=2)
    assert together.documents == ["1;2?\n3", LONG]


@pytest.mark.parametrize("text, needle", [
    ("c5", "c5 is no domain"),
    ("x=/nowhere", "/nowhere does not exist"),
    ("gsm8k,gsm8k", "two domains are called gsm8k"),
    ("mean={good}", "'mean' is no name"),
    (" , ", "names none"),
    ("x={empty}", "the domain x .* has no text"),
    ("x={other}", r"other.jsonl, line 2: no text was found \(its keys: title\)"),
    ("x={damaged}", "damaged.parquet is damaged"),
    ("x={broken}", "line 2 is not JSON"),
    ("x={surrogate}", "lone surrogate"),
    ("x={binary}", "binary.txt"),
    ("val", "the domain val .* has no text"),
])
def test_a_domain_that_cannot_be_read_is_one_line(tmp_path, text, needle):
    files = {
        "good": write_lines(tmp_path / "good.jsonl", [{"text": "a"}]),
        "empty": write_lines(tmp_path / "empty.jsonl", []),
        "other": write_lines(tmp_path / "other.jsonl", [{"text": "a"}, {"title": "b"}]),
        "surrogate": write_lines(tmp_path / "surrogate.jsonl", [{"text": "\ud800"}]),
        "damaged": tmp_path / "damaged.parquet",
        "broken": tmp_path / "broken.jsonl",
        "binary": tmp_path / "binary.txt",
    }
    files["damaged"].write_bytes(b"PAR1 and no more")
    files["broken"].write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    files["binary"].write_bytes(bytes(range(256)) * 9)
    with pytest.raises(UserError, match=needle) as error:
        load_domains(text.format(**files), most=9)
    assert "\n" not in str(error.value)


def test_paths_are_made_absolute_for_a_run_that_is_resumed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "code_validation.jsonl", [{"text": "a"}])
    path = tmp_path / "code_validation.jsonl"
    assert canonical_domains("val, c4,code_validation.jsonl") == f"c4,code={path}"
    assert canonical_domains(f"c4,code={path}") == f"c4,code={path}"
    assert canonical_domains(None) is None and canonical_domains("val") is None


@pytest.mark.parametrize("words", ["val={folder}/val.jsonl", "{folder}"])
def test_a_text_of_another_place_is_not_taken_for_that_of_the_run(tmp_path, words):
    write_lines(tmp_path / "val.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="another name, as in val2="):
        parse_domains(words.format(folder=tmp_path))


def test_steps_are_compared_by_what_a_run_measures():
    for best_by, text in ((None, None), ("val", None), ("mean", "c4"), ("c4", "c4,gsm8k")):
        check_best_by(best_by, text)
    for best_by, text in (("c4", None), ("gsm8k", "c4")):
        with pytest.raises(UserError, match=f"best_by={best_by} is no domain of this run"):
            check_best_by(best_by, text)


# ------------------------------------------------------------------------------------------------
# the hub

def fill_cache(base_dir):
    """Put small data sets into the cache of the hub."""
    hub = base_dir / "hub"
    write_parquet(hub / "openai/gsm8k/main/test/0000.parquet",
                  question=["1+2?", "2+3?"], answer=["#### 3", "#### 5"])
    write_parquet(hub / "openai/openai_humaneval/openai_humaneval/test/0000.parquet",
                  **{key: [value] for key, value in HUMANEVAL_ROW.items()}, entry_point=["one"])
    write_parquet(hub / "allenai/c4/en/partial-validation/0000.parquet",
                  text=["A page.", "Another.", "A third."])
    lines = ["", " = Cats = \n", "", " They are animals . \n", " = = Food = = \n", " Fish . \n",
             " = Dogs = \n", " They bark . \n"]
    write_parquet(hub / "Salesforce/wikitext/wikitext-103-raw-v1/validation/0000.parquet",
                  text=lines)
    write_parquet(hub / "google-research-datasets/mbpp/full/test/0000.parquet",
                  text=["Write one."], code=["def one():\n    return 1"])
    write_parquet(hub / "HuggingFaceTB/smol-smoltalk/default/test/0000.parquet",
                  messages=[TALK])


WANTED = {
    "c4": ["A page.", "Another."],
    "encyclopedia": [" = Cats = \n They are animals . \n = = Food = = \n Fish . \n",
                     " = Dogs = \n They bark . \n"],
    "gsm8k": ["1+2?\n#### 3", "2+3?\n#### 5"],
    "humaneval": ["def one():\n    return 1\n"],
    "code": ["Write one.\ndef one():\n    return 1"],
    "chat": ["User: Hi\n\nAssistant: Hello."],
}


def test_every_named_domain_is_read_from_the_cache_without_a_network(base_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fill_cache(base_dir)
    assert WANTED.keys() == domains.SOURCES.keys()
    found = load_domains(",".join(["val", *WANTED]), most=2, own=["own text"])
    assert dict(found) == {"val": ["own text"], **WANTED}


def test_without_cache_and_network_one_line_says_what_to_fetch(base_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nanochat.hub allenai/c4 en validation") as error:
        load_domains("c4", most=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("listed, wanted", [
    (["validation", "partial-validation"], "validation"),
    (["partial-validation"], "partial-validation"),
    ([], "validation"),
])
def test_of_c4_the_split_that_the_hub_has_is_taken(base_dir, monkeypatch, listed, wanted):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(domains, "list_files", lambda name: {("en", split): [] for split in listed})
    assert domains.split_of_source(domains.SOURCES["c4"]) == wanted


def test_a_hub_that_fails_is_an_error_of_the_network(base_dir, monkeypatch):
    def fail(name):
        raise HubError("no connection")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(domains, "list_files", fail)
    with pytest.raises(HubError):
        load_domains("c4", most=2)


# ------------------------------------------------------------------------------------------------
# the three files

def test_the_validation_files_are_written_and_read_again(base_dir, tmp_path, run_module):
    fill_cache(base_dir)
    folder = tmp_path / "validation"
    done = run_module("tasks.domains", f"--folder={folder}", "--documents=2", base=base_dir,
                      HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    names = ["c4_validation.parquet", "gsm8k_validation.parquet", "humaneval_validation.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert {name: row["documents"] for name, row in record["written"].items()} == {
        "c4": 2, "gsm8k": 2, "humaneval": 1}
    assert dict(load_domains(str(folder), most=9)) == {
        name: WANTED[name] for name in ("c4", "gsm8k", "humaneval")}

    whole = domains.Domain("c4", ["page"] * 2000)
    assert domains.write_domain(folder, whole).name == "c4_validation_2k.parquet"
    assert [item.name for item in parse_domains(str(folder / "c4_validation_2k.parquet"))] == ["c4"]
    refused = run_module("tasks.domains", "--domains=val", f"--folder={folder}", base=base_dir)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# scores of whole documents

@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token, and there are no others."""
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator([LONG + " caf\u00e9 seven eight nine ten"], 290)


def test_a_uniform_model_of_bytes_has_ratio_1_in_every_domain(byte_tokenizer):
    model = make_model(vocab_size=byte_tokenizer.get_vocab_size())
    torch.nn.init.zeros_(model.head.weight)
    texts = {"gsm8k": DOCUMENTS[:1], "c4": DOCUMENTS[1:], "code": [LONG[:600]]}
    scores = {}
    for name, documents in texts.items():
        scores[name] = score_documents(model, byte_tokenizer, documents, "cpu")
    rows = domain_rows(scores, {"step_0": scores})
    vocab_size = 256 + len(SPECIAL_TOKENS)
    for row in rows.values():
        assert row["bits_per_byte"] == pytest.approx(math.log2(vocab_size), rel=1e-5)
        assert row["perplexity"] == pytest.approx(vocab_size, rel=1e-5)
        assert row["ratio"] == pytest.approx(1, rel=1e-5)
        assert row["step_0"]["ratio"] == pytest.approx(1, rel=1e-5)
        assert row["bytes"] == row["tokens"]


def test_all_bytes_of_a_document_that_is_longer_than_the_context_count_once(tokenizer):
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    T = model.config.max_seq_len
    text = LONG[:1500] + "\u00e9\U0001f600"
    nats, tokens = 0.0, 0
    ids = tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):
            window = ids[start:start + T + 1]
            log_probs = torch.log_softmax(model(torch.tensor([window[:-1]]))[0], -1)
            for position, target in enumerate(window[1:]):
                nats -= log_probs[position, target].item()
                tokens += 1
    shares = []
    score = score_documents(model, tokenizer, [text, "ten"], "cpu", progress=shares.append)
    alone = score_documents(model, tokenizer, ["ten"], "cpu")
    assert score.bytes == 1506 + 3 and score.tokens - alone.tokens == tokens > 2 * T
    assert score.nats - alone.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / 1509)
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert shares and shares == sorted(shares) and shares[-1] == 1


def test_ratios_are_of_c4_and_shares_of_what_is_above_the_reference():
    bits = {"gsm8k": 1.5, "c4": 1.0, "code": 3.0}
    ratios = surprise_ratios(bits)
    assert ratios == {"gsm8k": 1.5, "c4": 1.0, "code": 3.0}
    assert base_domain({"web": 1, "code": 2}) == "web"
    shares = recommended_shares(ratios, {"gsm8k": 1.0, "c4": 1.0, "code": 1.5})
    assert shares == {"gsm8k": 0.25, "c4": 0.0, "code": 0.75}
    assert recommended_shares(ratios, {"gsm8k": 2.0, "c4": 1.0, "code": 3.0}) is None


def test_steps_are_compared_by_one_domain_or_by_the_mean():
    bits = {"val": 1.0, "c4": 2.0, "code": 6.0}
    assert figure_to_compare(bits, "mean") == 3.0 and figure_to_compare(bits, "code") == 6.0


# ------------------------------------------------------------------------------------------------
# --check

def check(model, tokenizer):
    """The names of the findings that a model fails by."""
    findings = check_loss(model.eval(), tokenizer, DOCUMENTS, "cpu")
    assert all(finding.line() for finding in findings)
    return [finding.name for finding in findings if not finding.passed]


@pytest.mark.parametrize(
    "model_class", [MODEL_CLASSES[name] for name in CAUSAL], ids=CAUSAL)
def test_the_loss_of_every_class_passes(tokenizer, model_class):
    model = make_model(model_class, vocab_size=tokenizer.get_vocab_size())
    assert check(model, tokenizer) == []
    assert check(model.for_chat(), tokenizer) == [], "without counts, where it has any"
    assert len(check_loss(model, tokenizer, DOCUMENTS, "cpu")) == 7


class PeekingAttention(Attention):
    """Attention that adds a little of the next position."""

    def forward(self, x, *arguments, **more):
        y = super().forward(x, *arguments, **more)
        return y + 0.05 * y.roll(-1, dims=1)


class PeekingBlock(Block):
    attention_class = PeekingAttention


class PeekingGPT(GPT):
    block_class = PeekingBlock


class GenerousGPT(NGramGPT):
    """The counts get their weight, and the network all of its own as well."""

    def mixture(self, x, recent, targets):
        log_gate, counted = super().mixture(x, recent, targets)
        return torch.zeros_like(log_gate), counted


class UnlikeItsSamplesGPT(GPT):
    """What is scored is a distribution, but not that of its logits."""

    def logits(self, x, recent):
        return 1.1 * super().logits(x, recent)


class BrokenGPT(GPT):
    def leave(self, x):
        return x * torch.nan


@pytest.mark.parametrize("model_class, failed", [
    (PeekingGPT, ["causality"]),
    (GenerousGPT, ["probabilities", "sampling"]),
    (UnlikeItsSamplesGPT, ["sampling"]),
    (BrokenGPT, ["probabilities", "sampling", "causality"]),
])
def test_a_loss_that_cannot_be_trusted_is_found(tokenizer, model_class, failed):
    vocab_size = tokenizer.get_vocab_size()
    counts = issubclass(model_class, NGramGPT)
    model = make_model(NGramGPT if counts else model_class, vocab_size=vocab_size)
    model.__class__ = model_class   # make_model() counts n-grams for the one class that it knows
    assert check(model, tokenizer) == failed


def through_text(self):
    # docs/traps.md: token-byte-lengths
    return [len(token.decode("utf-8", "replace").encode()) for token in self._bytes]


def without_the_last(documents, tokenizer, T):
    pieces = loss_eval_cut(documents, tokenizer, T)
    return [piece[:-1] if len(piece) == T + 1 else piece for piece in pieces]


loss_eval_cut = loss_eval.cut_into_sequences


@pytest.mark.parametrize("place, name, wrong, failed", [
    (loss_eval, "raw_bytes", lambda documents: sum(map(len, documents)), "bytes"),
    (loss_eval, "raw_bytes",
     lambda documents: sum(len(text.strip().encode()) for text in documents), "bytes"),
    (Tokenizer, "token_bytes", through_text, "token bytes"),
    (loss_check, "cut_into_sequences", without_the_last, "whole text"),
    (loss_eval, "cut_into_sequences", without_the_last, "tokens"),
])
def test_bytes_that_are_counted_wrong_are_found(
        tokenizer, monkeypatch, place, name, wrong, failed):
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    assert check(model, tokenizer) == []
    monkeypatch.setattr(place, name, wrong)
    assert failed in check(model, tokenizer)
