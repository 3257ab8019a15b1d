"""Text, ids and conversations: what goes in comes out, and nothing that a user types becomes a
control token."""
import base64
import json
import random
import re
import subprocess
import sys

import pytest
import rustbpe
from conftest import ROOT, last_json
from stage_runs import Stages
from test_rustbpe import random_text, stdlib_text

from nanochat.common import UserError
from nanochat.tokenizer import (
    HF_FILE,
    META_FILE,
    RANKS_FILE,
    SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    get_tokenizer,
    read_transition,
    tokenizer_folder,
)

VOCAB_SIZE = 1000


@pytest.fixture(scope="module")
def tokenizer():
    texts = stdlib_text(200_000) + ["日本語 日本語 🚀🚀 né né 20 21 22"] * 50
    return Tokenizer.train_from_iterator(texts, VOCAB_SIZE)


def assistant(*parts):
    question = {"role": "user", "content": "2+2?"}
    return {"messages": [question, {"role": "assistant", "content": list(parts)}]}


def part(kind, text):
    return {"type": kind, "text": text}


def shown(tokenizer, ids):
    """The ids as text with control tokens spelled out."""
    names = {tokenizer.encode_special(name): name for name in SPECIAL_TOKENS}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in ids)


# ---------------------------------------------------------------- vocabulary and files

def test_vocabulary_counts_everything(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    ids = [tokenizer.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert tokenizer.get_bos_token_id() == tokenizer.encode_special("<|bos|>") == ids[0]
    with pytest.raises(KeyError):
        tokenizer.encode_special("the")


def test_token_bytes_are_never_measured_on_str(tokenizer):
    """docs/traps.md: token-byte-lengths"""
    lengths = tokenizer.token_bytes()
    assert lengths == [len(tokenizer.id_to_bytes(i)) for i in range(VOCAB_SIZE)]
    assert sorted(lengths)[: len(SPECIAL_TOKENS)] == [0] * len(SPECIAL_TOKENS)
    assert lengths[:256] == [1] * 256  # 128 of them decode to U+FFFD, which is three bytes long
    for text in ("naïve 日本語 🚀", "half of 🚀".encode("utf-8")[:-2].decode("utf-8", errors="replace")):
        assert sum(lengths[i] for i in tokenizer.encode(text)) == len(text.encode("utf-8"))


def test_the_split_pattern_is_one_and_travels_with_the_tokenizer(tokenizer, tmp_path):
    """docs/traps.md: split-pattern-mismatch"""
    tokenizer.save(tmp_path)
    pattern = rustbpe.Tokenizer().get_pattern()
    assert tokenizer.pattern == Tokenizer.load(tmp_path).pattern == pattern
    assert r"\p{N}{1,2}|" in pattern
    assert [tokenizer.decode([i]) for i in tokenizer.encode("202122")] == ["20", "21", "22"]


def test_the_artifact_is_text(tokenizer, tmp_path):
    """docs/traps.md: pickled-tokenizer"""
    tokenizer.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([META_FILE, RANKS_FILE, HF_FILE])
    lines = (tmp_path / RANKS_FILE).read_text(encoding="ascii").splitlines()
    tokens = [tokenizer.id_to_bytes(i) for i in range(len(lines))]
    assert [base64.b64decode(line.split()[0]) for line in lines] == tokens
    meta = json.loads((tmp_path / META_FILE).read_text(encoding="ascii"))
    assert meta["special_tokens"] == list(SPECIAL_TOKENS)


def test_files_are_utf8_whatever_the_locale(tokenizer, tmp_path):
    """docs/traps.md: encoding-and-splitlines"""
    tokenizer.save(tmp_path)
    code = (
        "import sys, warnings\n"
        "from pathlib import Path\n"
        "from nanochat.tokenizer import Tokenizer\n"
        "warnings.simplefilter('error', EncodingWarning)\n"
        "tokenizer = Tokenizer.load(Path(sys.argv[1]))\n"
        "tokenizer.save(Path(sys.argv[2]))\n"
        "print(tokenizer.fingerprint)"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    run = subprocess.run(
        [*command, tmp_path, tmp_path / "again"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.stdout.strip() == tokenizer.fingerprint, run.stderr


def test_saved_and_loaded_is_the_same(tokenizer, base_dir):
    tokenizer.save(base_dir / "tokenizer")
    loaded = get_tokenizer()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.token_bytes() == tokenizer.token_bytes()
    text = "def f(x):\n    return x  # 日本語 12345"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_fingerprints_differ(tokenizer):
    other = Tokenizer.train_from_iterator(stdlib_text(200_000), VOCAB_SIZE)
    assert other.fingerprint != tokenizer.fingerprint and len(other.fingerprint) == 16
    ranks = [tokenizer.id_to_bytes(i) for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS))]
    assert Tokenizer(ranks, tokenizer.pattern).fingerprint == tokenizer.fingerprint
    assert Tokenizer(ranks, r"[\s\S]").fingerprint != tokenizer.fingerprint


@pytest.fixture(scope="module")
def superbpe():
    return Tokenizer.train_from_iterator(stdlib_text(300_000), 2000, transition=0.4)


@pytest.mark.parametrize("kind", ["tokenizer", "superbpe"])
def test_hugging_face_reads_our_file_and_finds_the_same_ids(request, tmp_path, kind):
    hf = pytest.importorskip("tokenizers")
    tokenizer, rng = request.getfixturevalue(kind), random.Random(11)
    tokenizer.save(tmp_path)
    other = hf.Tokenizer.from_file(str(tmp_path / HF_FILE))
    assert other.get_vocab_size() == tokenizer.get_vocab_size()
    assert all(other.token_to_id(name) == tokenizer.encode_special(name) for name in SPECIAL_TOKENS)
    texts = stdlib_text(200_000) + ["日本語 🚀 né 12345"] + [random_text(rng, 200) for _ in range(30)]
    for text, ids in zip(texts, tokenizer.encode(texts)):
        assert other.encode(text).ids == ids and other.decode(ids) == text


def test_superbpe_needs_fewer_tokens_and_gives_all_text_back(superbpe):
    plain = Tokenizer.train_from_iterator(stdlib_text(300_000), 2000)
    texts = stdlib_text(300_000)
    encoded = superbpe.encode(texts)
    assert [superbpe.decode(ids) for ids in encoded] == texts
    assert sum(map(len, encoded)) < 0.95 * sum(map(len, plain.encode(texts)))


def test_a_mixed_corpus_trains_and_comes_back():
    texts = [
        "Der Turm ist hoch. Die Straße auch.",
        "塔は高い。",
        "башня высокая",
        "برج بلند است",
        "def f(x): return x",
        "👍🏽🇨🇦",
    ] * 20
    for transition in (None, 0.5):
        tokenizer = Tokenizer.train_from_iterator(texts, 330, transition=transition)
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


def damage(name, change):
    def damaging(directory):
        path = directory / name
        path.write_bytes(change(path.read_bytes()))
    return damaging


@pytest.mark.parametrize("damaging", [
    lambda directory: (directory / META_FILE).unlink(),
    lambda directory: (directory / RANKS_FILE).unlink(),
    damage(RANKS_FILE, lambda data: data[:-20]),
    damage(RANKS_FILE, lambda data: data.replace(b" 300\n", b" 301\n")),
    damage(META_FILE, lambda data: data[:-20]),
    damage(META_FILE, lambda data: b"[]"),
    damage(META_FILE, lambda data: b"\xff" + data),
    damage(META_FILE, lambda data: data.replace(b"<|mask|>", b"<|other|>")),
])
def test_missing_or_damaged_tokenizer_is_one_line(tokenizer, tmp_path, damaging):
    tokenizer.save(tmp_path)
    damaging(tmp_path)
    with pytest.raises(UserError, match="tok_train") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("texts, vocab_size, remedy", [
    (["too little text"], 4096, "--vocab_size="),
    (["text"], 200, "268"),
    (["text \ud83d"], 300, "surrogate"),
])
def test_training_on_bad_input(texts, vocab_size, remedy):
    with pytest.raises(UserError, match=remedy):
        Tokenizer.train_from_iterator(texts, vocab_size)


# ---------------------------------------------------------------- text

def test_round_trip_of_random_unicode_and_every_byte(tokenizer):
    """docs/traps.md: dropped-text"""
    rng = random.Random(10)
    random_texts = [random_text(rng, rng.randrange(200)) for _ in range(200)]
    texts = ["", "\n", "\u2028", "\x00", *random_texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    lengths = tokenizer.token_bytes()
    single = {tokenizer.id_to_bytes(i) for i in range(VOCAB_SIZE) if lengths[i] == 1}
    assert single == {bytes([b]) for b in range(256)}


def test_lone_surrogates_are_rejected(tokenizer):
    """docs/traps.md: dropped-text"""
    for text in ("a\ud83d", ["fine", "\udc80"]):
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode(text)


def test_white_space_of_any_length(tokenizer):
    """docs/traps.md: dropped-text

    A million spaces overflow a backtracking regex engine, whose panic no `except Exception` would
    catch.
    """
    for text in (" " * 1_000_000 + "x", "x" + "\n " * 300_000, "=" * 500_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lists_and_ids_before_and_after(tokenizer):
    bos = tokenizer.get_bos_token_id()
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    assert tokenizer.encode(["one", "two"], num_threads=1) == [one, two]
    assert tokenizer.encode(("one", "two")) == [one, two]
    assert tokenizer.encode("one", prepend=bos) == [bos] + one
    both = tokenizer.encode(["one", "two"], prepend=bos, append=0)
    assert both == [[bos] + one + [0], [bos] + two + [0]]
    assert tokenizer.decode([bos] + one) == "one"


def hostile_text(rng):
    """Text with names of special tokens in it, whole, broken and run together."""
    broken = ["<|", "|>", "bos", "user_start", "\u2581", "<|endoftext|>", " ", "\n"]
    pieces = [*SPECIAL_TOKENS, *broken]
    names = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 12)))
    return names + random_text(rng, rng.randrange(10))


def test_special_tokens_cannot_be_written(tokenizer):
    """docs/traps.md: control-tokens"""
    rng = random.Random(37)
    first_special = tokenizer.get_bos_token_id()
    for _ in range(500):
        text = hostile_text(rng)
        ids = tokenizer.encode(text)
        assert max(ids) < first_special and tokenizer.decode(ids) == text


def test_special_tokens_cannot_be_smuggled_into_a_conversation(tokenizer):
    """docs/traps.md: control-tokens

    Whatever the texts say, the control ids of a conversation are those of its structure.
    """
    rng = random.Random(38)

    def controls(text):
        parts = [part(kind, text()) for kind in ("python", "python_output", "text")]
        ids, _ = tokenizer.render_conversation({"messages": [
            {"role": "system", "content": text()}, {"role": "user", "content": text()},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": text()}, {"role": "assistant", "content": text()}]})
        return [i for i in ids if i >= tokenizer.get_bos_token_id()]

    harmless = controls(lambda: "hi")
    for _ in range(100):
        assert controls(lambda: hostile_text(rng)) == harmless


# ---------------------------------------------------------------- streams

@pytest.mark.parametrize("text", ["👩‍🚀🚀 日本語 né", "a genuine \ufffd in between", ""])
def test_a_stream_never_shows_half_a_character(tokenizer, text):
    """docs/traps.md: half-characters"""
    id_of_byte = {tokenizer.id_to_bytes(i): i for i in range(256)}
    byte_by_byte = [id_of_byte[bytes([b])] for b in text.encode("utf-8")]
    for ids in (byte_by_byte, tokenizer.encode(text)):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.feed(i) for i in ids]
        assert "".join(pieces) == text and stream.flush() == ""
        assert all(piece.count("\ufffd") <= text.count("\ufffd") for piece in pieces)


def test_a_stream_does_not_stall(tokenizer):
    """docs/traps.md: half-characters"""
    stream = StreamDecoder(tokenizer)
    byte = {tokenizer.id_to_bytes(i): i for i in range(256)}
    assert stream.feed(byte[b"\xff"]) == "\ufffd"       # never part of a character: shown at once
    assert [stream.feed(byte[b]) for b in (b"\xf0", b"\x9f", b"a")] == ["", "", "\ufffda"]
    assert stream.feed(byte[b"\xe6"]) == "" and stream.flush() == "\ufffd"
    assert stream.feed(tokenizer.get_bos_token_id()) == "" and stream.feed(byte[b"b"]) == "b"


# ---------------------------------------------------------------- conversations

def test_render_conversation(tokenizer):
    conversation = assistant(
        part("python", "2+2"),
        part("python_output", "4"),
        part("text", "It is 4."),
    )
    conversation["messages"].insert(0, {"role": "system", "content": "Be brief."})
    ids, mask = tokenizer.render_conversation(conversation)
    expected = [
        (0, "<|bos|><|system_start|>Be brief.<|system_end|>"),
        (0, "<|user_start|>2+2?<|user_end|><|assistant_start|>"),
        (1, "<|python_start|>2+2<|python_end|>"),
        (0, "<|output_start|>4<|output_end|>"),
        (1, "It is 4.<|assistant_end|>"),
    ]
    assert shown(tokenizer, ids) == "".join(text for _, text in expected)
    trained = [i for i, m in zip(ids, mask) if m]
    assert shown(tokenizer, trained) == "".join(text for m, text in expected if m)
    assert len(ids) == len(mask) and set(mask) == {0, 1}


def test_render_conversation_is_cut(tokenizer):
    whole = tokenizer.render_conversation(assistant(part("text", "four " * 50)))
    cut = tokenizer.render_conversation(assistant(part("text", "four " * 50)), max_tokens=20)
    assert cut == (whole[0][:20], whole[1][:20])


def test_render_for_completion_ends_where_the_assistant_begins(tokenizer):
    conversation = assistant(part("text", "4"))
    ids = tokenizer.render_for_completion(conversation)
    assert shown(tokenizer, ids) == "<|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>"
    assert tokenizer.render_for_completion({"messages": conversation["messages"][:1]}) == ids
    assert len(conversation["messages"]) == 2  # the caller's list is untouched


def test_parse_completion_is_the_inverse(tokenizer):
    rng = random.Random(12)
    for _ in range(100):
        kinds = [k for k in ("text", "python", "python_output", "text") if rng.random() < 0.7]
        parts = [part(kind, hostile_text(rng)) for kind in kinds]
        if kinds[-2:] == ["text", "text"]:
            parts = parts[:-1]  # two texts in a row are one
        start = len(tokenizer.render_for_completion(assistant(*parts)))
        ids, _ = tokenizer.render_conversation(assistant(*parts))
        assert tokenizer.parse_completion(ids[start:]) == parts
        assert tokenizer.parse_completion(ids[start:] + tokenizer.encode("after the end")) == parts


def test_parse_completion_of_what_a_model_may_write(tokenizer):
    special, text = tokenizer.encode_special, tokenizer.encode
    ids = [special("<|bos|>"), *text("a"), special("<|python_start|>"), *text("1+")]
    ids += [special("<|output_start|>"), *text("2")]
    assert tokenizer.parse_completion(ids) == [
        part("text", "a"),
        part("python", "1+"),
        part("python_output", "2"),
    ]
    empty_call = [special("<|python_start|>"), special("<|python_end|>")]
    assert tokenizer.parse_completion(empty_call) == []


@pytest.mark.parametrize("conversation", [
    [], {}, {"messages": []}, {"messages": "hi"}, {"messages": ["hi"]},
    {"messages": [{"role": "assistant", "content": "hi"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [part("python", "1")]}]},
    {"messages": [{"role": "user", "content": ["hi"]}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
])
def test_malformed_conversations(tokenizer, conversation):
    with pytest.raises(UserError):
        tokenizer.render_conversation(conversation)


def test_nothing_to_complete(tokenizer):
    with pytest.raises(UserError, match="no user message"):
        tokenizer.render_for_completion({"messages": [{"role": "system", "content": "be brief"}]})


# ---------------------------------------------------------------- the stages

def test_tok_train_and_tok_eval(run_module, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(stdlib_text(300_000)), encoding="utf-8")
    base, text = tmp_path / "base", tmp_path / "text.txt"
    data = f"--data={text}"
    train = run_module("scripts.tok_train", data, base=base)
    assert train.returncode == 0, train.stderr
    record = last_json(train.stdout)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    assert record["stage"] == "tok_train"
    assert record["vocab_size"] == get_tokenizer(text).get_vocab_size()
    assert 512 <= record["vocab_size"] <= 300_000 / 96  # little text, small vocabulary

    evaluation = run_module("scripts.tok_eval", data, base=base)
    assert evaluation.returncode == 0, evaluation.stderr
    assert last_json(evaluation.stdout)["bytes_per_token"] == record["bytes_per_token"]

    before = get_tokenizer(text).fingerprint
    bad = run_module("scripts.tok_train", data, "--vocab_size=500000", base=base)
    assert bad.returncode == 2 and "--vocab_size=" in bad.stderr
    assert len(bad.stderr.strip().split("\n")) == 1
    assert get_tokenizer(text).fingerprint == before


def test_each_text_has_a_tokenizer_of_its_own(base_dir, tmp_path, capsys):
    def make(*path, text):
        tokenizer = Tokenizer.train_from_iterator([text * 99], 280)
        tokenizer.save(base_dir.joinpath(*path))
        return tokenizer.fingerprint

    notes, letters = tmp_path / "notes.txt", tmp_path / "letters.txt"
    for path in (notes, letters):
        path.write_text("some text", encoding="utf-8")
    missing = str(pytest.raises(UserError, get_tokenizer, notes).value)
    remedy = f"run `python -m scripts.tok_train --data={notes}` first"
    assert missing == f"no tokenizer for {notes}: {remedy}"

    # the text's own, whatever else is there
    usual = make("tokenizer", text="the cat sat on the mat ")
    own = make("tokenizers", tokenizer_folder(notes).name, text="a dog ran to the tree ")
    assert get_tokenizer(notes).fingerprint == own and get_tokenizer().fingerprint == usual
    assert capsys.readouterr().out == ""

    # nanochat's, where the text has none
    assert get_tokenizer(letters).fingerprint == usual
    assert capsys.readouterr().out.count("no tokenizer was trained on") == 1

    # that of the text as it was
    notes.write_text("some more text", encoding="utf-8")
    assert get_tokenizer(notes).fingerprint == own
    assert capsys.readouterr().out.count("has changed since its tokenizer was trained") == 1


@pytest.mark.parametrize("wrong", ["t90k", "1.5", "0", "nan"])
def test_a_transition_is_a_share_or_a_name(wrong):
    assert read_transition("t80k") == read_transition("0.4") == 0.4
    with pytest.raises(UserError, match="share of the vocabulary"):
        read_transition(wrong)


def test_superbpe_from_the_command_line(server, tmp_path):
    stages = Stages(tmp_path, server)
    (tmp_path / "text.txt").write_text("\n".join(stdlib_text(300_000)), encoding="utf-8")
    data = f"--data={tmp_path / 'text.txt'}"
    assert "--superbpe=1" in stages.refusal("scripts.tok_train", data, "--transition=t80k")
    options = "--superbpe=1", "--transition=t80k", "--vocab_size=1000"
    stages.fork("scripts.tok_train", data, *options)
    record = stages.fork_record("scripts.tok_eval", data)
    assert record["superwords"] > 0.05
    assert record["beside"]["val"]["ours"] > 1.02 * record["beside"]["val"]["plain BPE"]

    # side by side: one that is read, two that are trained for the purpose
    [own] = (tmp_path / "tokenizers").iterdir()
    names = ["plain", str(own), "t180k"]
    row = stages.fork_record("scripts.tok_eval", data, "--compare", *names)
    compared = row["compared"]
    assert list(compared) == names and {each["vocab_size"] for each in compared.values()} == {1000}
    saved = [compared[name]["tokens_saved"] for name in names]
    assert saved[0] == 0 and min(saved[1:]) > 0.02 and max(saved) < 0.5
    shares = [compared[name]["superwords"] for name in names]
    assert shares[0] == 0 < shares[2] < shares[1] == record["superwords"]
    # bytes per token is bytes over tokens, whatever the tokenizer
    ratios = [row["beside"]["val"][name] for name in names]
    assert [1 - ratios[0] / ratio for ratio in ratios] == pytest.approx(saved)
    # one that needs more tokens than the first
    out, _ = stages.fork("scripts.tok_eval", data, "--compare", str(own), "plain")
    assert re.search(r"^plain: .* take [1-9][\d.]* % more tokens than with ", out, re.M), out

    # nothing is trained before all names and the size are known to be right
    out, err = stages.fork("scripts.tok_eval", data, "--compare", "plain", "t80x", status=2)
    assert "t80x is no folder of a tokenizer" in err and "training" not in out
    small = "--compare", "plain", "--vocab_size=10"
    assert stages.refusal("scripts.tok_eval", data, *small).startswith("error: vocab_size is 10,")

    # read as the tokenizer of this text, from the file that others read
    theirs = own.rename(tmp_path / "theirs")
    options = f"--tokenizer={theirs / 'tokenizer.json'}", data
    assert stages.fork_record("scripts.tok_train", *options)["bytes_per_token"] == ratios[1]


def test_tok_benchmark_compares_the_same_merges_and_ids(run_module, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(stdlib_text(600_000)), encoding="utf-8")
    options = f"--data={tmp_path / 'text.txt'}", "--vocab_size=600", "--repeats=1"
    run = run_module("scripts.tok_benchmark", *options, base=tmp_path / "base")
    if run.returncode == 2 and "wheel could not be installed" in run.stderr:
        pytest.skip("the published wheel cannot be had")
    assert run.returncode == 0, run.stderr
    record = last_json(run.stdout)
    assert record["merges_identical"] and record["ids_identical"]
    ratios = "train_ratio", "encode_ratio", "encode_two_threads_gain"
    assert all(record[ratio] > 0 for ratio in ratios)


def test_validation_text_never_trains_the_tokenizer(run_module, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    for name, word in (("a", "training"), ("b", "validation")):
        pq.write_table(pa.table({"text": [f"{word} {word}"] * 20}), tmp_path / f"{name}.parquet")
    options = f"--data={tmp_path}", "--vocab_size=275"
    run = run_module("scripts.tok_train", *options, base=tmp_path / "base")
    assert run.returncode == 0, run.stderr
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer = get_tokenizer(tmp_path)
    assert len(tokenizer.encode(" training")) == 1 < len(tokenizer.encode(" validation"))
