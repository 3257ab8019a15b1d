"""Where text comes from: the user's files, the sources here, shards from a (loopback) server."""
import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT, last_json
from nanochat import convert, dataset, download, shards, sources, userfiles
from nanochat.common import UserError
from nanochat.dataset import (
    data_tag,
    iter_documents,
    iter_row_groups,
    open_dataset,
    parquet_paths,
    read_row_group,
    split_document,
    write_shards,
)
from nanochat.encoding import COMPRESSED
from nanochat.shards import SHARD_CHARS
from nanochat.sources import Seen, build_local, collect_local, download_fineweb, python_files
from nanochat.textfiles import READERS
from stage_runs import TINY
from tasks.customjson import CustomJSON


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def write_parquet(path, texts, column="text", row_group_size=2):
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)
    return path


def shard_folder(folder, *shards):
    folder.mkdir(exist_ok=True)
    for i, texts in enumerate(shards):
        write_parquet(folder / f"part_{i}.parquet", texts)
    return folder


# ----------------------------------------------------------------------------------------------
# reading

def both_splits(data):
    return [*iter_documents("train", data), *iter_documents("val", data)]


def test_a_folder_of_parquet_is_read_in_place(tmp_path, base):
    folder = shard_folder(tmp_path / "mine", ["a", "b", "c"], ["d"], ["v", "w"])
    assert [path.parent for path in parquet_paths(folder)] == [folder] * 3
    assert list(iter_documents("train", folder)) == ["a", "b", "c", "d"]
    assert list(iter_documents("val", folder)) == ["v", "w"]
    assert not (base / "user_data").exists()


def test_a_dataset_is_checked_once_and_passed_on(tmp_path, monkeypatch):
    folder = shard_folder(tmp_path / "mine", ["a", "b", "c"], ["d"], ["v", "w", "x"])
    opened = []
    real = pq.ParquetFile

    def counted(path):
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    found = open_dataset(folder)
    assert opened == ["part_0.parquet", "part_1.parquet", "part_2.parquet"], "each file once"
    assert open_dataset(found) is found and len(opened) == 3
    assert found.train_groups == [*iter_row_groups(found.paths[:-1])] == found.groups("train")
    assert found.val_groups == [*iter_row_groups(found.paths[-1:])] == found.groups("val")
    assert len(found.train_groups) == 3 and len(found.val_groups) == 2
    for split in ("train", "val"):
        assert [*found.documents(split)] == [*iter_documents(split, found)]
        assert [*found.documents(split, 1, 2)] == [*iter_documents(split, folder, 1, 2)]
    assert [*found.documents("train")] == list("abcd") and [*found.documents("val")] == list("vwx")
    with pytest.raises(UserError, match="train or val"):
        found.groups("test")


def test_every_pass_reads_every_file_from_its_first_row_group(tmp_path):
    # docs/traps.md: loader-second-epoch
    folder = shard_folder(tmp_path / "mine", ["a", "b", "c"], ["d", "e", "f"], ["v"])
    paths = parquet_paths(folder)
    assert [(path.name, i) for path, i in iter_row_groups(paths[:-1])] == [
        ("part_0.parquet", 0), ("part_0.parquet", 1), ("part_1.parquet", 0), ("part_1.parquet", 1)]
    for _ in range(3):
        groups = iter_row_groups(paths[:-1])
        assert [text for group in groups for text in read_row_group(*group)] == list("abcdef")


def test_a_missing_file_is_an_error_and_never_another_validation(base):
    # docs/traps.md: validation-shard-becomes-training
    folder = base / "base_data"
    folder.mkdir()
    write_shards(folder, "shard", ["x" * SHARD_CHARS + "y", "z", "t"], ["v"])
    paths = parquet_paths()
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(3)]
    paths[-1].unlink()
    with pytest.raises(UserError, match="1 of 3 files are missing.*shard_00002"):
        parquet_paths()


def test_files_beside_the_pinned_ones_are_not_read(base):
    # docs/traps.md: validation-shard-becomes-training
    folder = base / "base_data"
    folder.mkdir()
    write_shards(folder, "shard", ["t"], ["v"])
    write_parquet(folder / "zzz.parquet", ["stray"])
    assert list(iter_documents("val")) == ["v"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_rows_are_shared_out_so_that_one_row_group_feeds_every_rank(tmp_path, world_size):
    # docs/traps.md: too-few-rows
    texts = [str(i) for i in range(11)]
    folder = tmp_path / "mine"
    folder.mkdir()
    write_parquet(folder / "a.parquet", texts[:1], row_group_size=100)
    write_parquet(folder / "b.parquet", texts, row_group_size=100)
    shares = [list(iter_documents("val", folder, rank, world_size)) for rank in range(world_size)]
    assert all(shares) and sorted(sum(shares, []), key=int) == texts


def text_file(path, content):
    """Write `content`, str or bytes, to `path`, which is returned."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("make, words", [
    (lambda d: d / "nothing", "does not exist"),
    (lambda d: d, "holds no"),
    (lambda d: text_file(d / "a.pdf", "x"), "is none of"),
    (lambda d: text_file(d / "a.txt", " \n").parent, "is empty"),
    (lambda d: text_file(d / "a.txt", "a\n").parent, "is empty"),
    (lambda d: text_file(d / "a.jsonl", b'{"text": "caf\xe9"}'), "not UTF-8 .byte 13"),
    (lambda d: text_file(d / "a.jsonl", '{"text": "a"}\n{"txt": "b"}'), "line 2"),
    (lambda d: text_file(d / "a.jsonl", '{"text": "\\ud800"}'), "line 1"),
    (lambda d: text_file(d / "a.parquet", "PAR1 cut short"), "not a whole parquet"),
    (lambda d: write_parquet(d / "a.parquet", ["x"], "body"), "no column 'text'"),
    (lambda d: write_parquet(d / "a.parquet", [1, 2]), "of strings"),
    (lambda d: shard_folder(d / "m", pa.array([], pa.string()), ["v"]), "no documents"),
])
def test_bad_data(tmp_path, make, words):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match=words):
        parquet_paths(make(folder))
    assert not list((tmp_path / "base").rglob("*.parquet")), "nothing half-written may stay"


def test_no_data_yet_and_bad_split(tmp_path):
    with pytest.raises(UserError, match="run python -m nanochat.dataset"):
        parquet_paths()
    with pytest.raises(UserError, match="train or val"):
        next(iter_documents("test", shard_folder(tmp_path / "m", ["a"], ["b"])))


# ----------------------------------------------------------------------------------------------
# the user's text

def test_a_text_file_gives_its_last_twentieth_for_validation(tmp_path):
    path = tmp_path / "my.txt"
    text = "".join(f"line {i} with some words in it, caf\u00e9\n" for i in range(20_000))
    path.write_text(text, encoding="utf-8")
    train, val = list(iter_documents("train", path)), list(iter_documents("val", path))
    assert "".join(train + val) == text
    assert max(map(len, train)) <= 6000 and 0.04 < len("".join(val)) / len(text) < 0.06


@pytest.mark.parametrize("text", [
    "ab",
    "ab\n",
    "ab\n \n\n",
    "one line only",
    "two\nlines",
    "\n".join(map(str, range(50))),
])
def test_even_a_tiny_file_is_split(tmp_path, text):
    path = tmp_path / "my.txt"
    path.write_text(text, encoding="utf-8")
    train, val = list(iter_documents("train", path)), list(iter_documents("val", path))
    assert "".join(train + val) == text
    assert "".join(train).strip() and "".join(val).strip()


def test_a_folder_is_converted_once_and_again_when_a_file_changes(tmp_path, capsys):
    notes = tmp_path / "notes"
    (notes / "sub").mkdir(parents=True)
    (notes / ".hidden").mkdir()
    for i in range(30):
        (notes / "sub" / f"{i}.md").write_text(f"note {i}", encoding="utf-8")
    (notes / "more.jsonl").write_text('{"text": "from jsonl"}\n', encoding="utf-8")
    write_parquet(notes / "table.parquet", ["from parquet"])
    (notes / "photo.jpg").write_bytes(b"\xff")
    (notes / ".hidden" / "a.txt").write_text("secret", encoding="utf-8")
    paths = parquet_paths(notes)
    assert "skipped 1 files" in capsys.readouterr().out
    everything = [f"note {i}" for i in range(30)] + ["from jsonl", "from parquet"]
    assert sorted(both_splits(notes)) == sorted(everything)
    assert parquet_paths(notes) == paths and capsys.readouterr().out == ""
    (notes / "sub" / "0.md").write_text("another note", encoding="utf-8")
    assert parquet_paths(notes) != paths and "another note" in both_splits(notes)


def test_a_single_parquet_file_gives_training_and_validation(tmp_path):
    folder = shard_folder(tmp_path / "one", [f"document {i}" for i in range(100)])
    for data in (folder, folder / "part_0.parquet"):
        assert len(list(iter_documents("train", data))) == 95
        assert len(list(iter_documents("val", data))) == 5


def test_jsonl_is_split_at_newlines_only(tmp_path):
    # docs/traps.md: encoding-and-splitlines
    path = tmp_path / "my.jsonl"
    texts = ["a\u2028b", "c\u0085d", "caf\u00e9"] * 10
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert both_splits(path) == texts


def test_split_document_joins_to_the_text_again():
    text = "x = 1\n\n\ndef f():\n    pass\n\n    return\n" * 40 + "y" * 500
    for limit in (7, 50, 333, 10_000):
        pieces = split_document(text, limit)
        assert "".join(pieces) == text and max(map(len, pieces)) <= limit
    assert split_document("one\ntwo\n\nthree", 10) == ["one\ntwo\n\n", "three"]


def divided(documents, share=0.05):
    """The reference implementation: (training documents, validation documents) of a list."""
    train_chars = int((1 - share) * sum(map(len, documents)))
    for border, text in enumerate(documents):
        if train_chars < len(text):
            break
        train_chars -= len(text)

    keep_whole = len(documents) >= 20 or train_chars == 0
    if border > 0 and keep_whole:
        return documents[:border], documents[border:]
    cut = text.find("\n", train_chars) + 1
    if cut == 0 or not text[cut:].strip():
        cut = max(1, min(train_chars, len(text.rstrip()) - 1))
    return [*documents[:border], text[:cut]], [text[cut:], *documents[border + 1:]]


def jsonl_file(path, texts):
    return text_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("seed", range(60))
def test_the_last_twentieth_of_the_characters_is_validation(tmp_path, monkeypatch, seed):
    """Wherever the border falls: in a document, a row group, a shard, or between two of them."""
    rng = random.Random(seed)
    monkeypatch.setattr(shards, "SHARD_CHARS", rng.choice([1, 50, 400, 12_000_000]))
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", rng.choice([1, 2, 7, 64]))
    most = rng.choice([1, 5, 60, 400])
    texts = [
        "".join(rng.choices("abc\n", (5, 5, 5, 1), k=rng.randint(1, most))) + "."
        for _ in range(rng.choice([1, 2, 3, 19, 20, 21, 40, 90]))
    ]
    path = jsonl_file(tmp_path / "a.jsonl", texts)
    train, validation = divided(texts)
    assert list(iter_documents("train", path)) == train
    assert list(iter_documents("val", path)) == validation
    folder = parquet_paths(path)[0].parent
    found = [shard.name for shard in sorted(folder.iterdir())]
    assert found == ["index.json", *(shard.name for shard in parquet_paths(path))]
    assert {name for name, _ in open_dataset(path).named_documents("val")} == {"a.jsonl"}


def test_whole_documents_are_divided_where_there_are_many(tmp_path):
    documents = [f"{i:02d}" for i in range(40)]
    path = jsonl_file(tmp_path / "a.jsonl", documents)
    assert list(iter_documents("val", path)) == documents[38:]
    documents = ["short"] * 30 + ["long" * 1000]
    path = jsonl_file(tmp_path / "b.jsonl", documents)
    assert list(iter_documents("train", path)) == documents[:30]


def large_file(folder, form, size):
    """A file of about `size` bytes, in documents of 4 kB, and the number of its documents."""
    text = "one two three four five six seven eight\n" * 100
    count = size // len(text)
    folder.mkdir()
    path = folder / f"a{form}"
    item = json.dumps({"text": text})
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write({
                ".txt": text,
                ".csv": f'{number},"{text}"\n' if number else "id,text\n",
                ".json": f"[{item}" if number == 0 else f",\n{item}",
                ".jsonl": item + "\n",
            }[form])
        file.write("]" if form == ".json" else "")
    return path


@pytest.mark.parametrize("form", [".txt", ".csv", ".json", ".jsonl"])
def test_a_file_is_converted_without_being_held_in_memory(tmp_path, form):
    # docs/traps.md: whole-file-in-memory
    size = 20_000_000
    path = large_file(tmp_path / "large", form, size)
    open_dataset(large_file(tmp_path / "small", form, 100_000))  # what is imported late
    tracemalloc.start()
    try:
        dataset_ = open_dataset(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 3
    chars = sum(len(text) for split in ("train", "val") for text in dataset_.documents(split))
    assert 0.95 * size < chars <= size


def test_a_full_disk_leaves_nothing_behind(tmp_path, base, monkeypatch):
    path = jsonl_file(tmp_path / "a.jsonl", words(1000))

    class Full(pq.ParquetWriter):
        written = 0

        def write_table(self, table, *arguments, **options):
            Full.written += 1
            if Full.written == 3:
                raise OSError(28, "No space left on device")
            super().write_table(table, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pq, "ParquetWriter", Full)
        open_dataset(path)
    assert list((base / "user_data").iterdir()) == []
    assert len(both_splits(path)) == 1000


def test_a_conversion_that_has_white_space_for_validation_names_the_remedy(tmp_path):
    path = text_file(tmp_path / "my.txt", "one\ntwo\n")
    folder = parquet_paths(path)[0].parent
    write_parquet(folder / "shard_00001.parquet", ["\n"])  # as an earlier version wrote it
    with pytest.raises(UserError, match=f"or none in its validation.*: delete {folder} and run"):
        open_dataset(path)


def test_what_a_killed_conversion_has_left_is_removed_after_days(tmp_path, base):
    old, recent = base / "user_data" / "draft-old", base / "user_data" / "draft-recent"
    for draft in (old, recent):
        draft.mkdir(parents=True)
        text_file(draft / "shard_00000.parquet", "half")
    os.utime(old, (0, 0))
    open_dataset(jsonl_file(tmp_path / "a.jsonl", words(9)))
    assert not old.exists() and recent.exists()


def test_of_several_processes_one_converts_and_the_others_take_what_it_has_made(
        tmp_path, base, monkeypatch):
    path = jsonl_file(tmp_path / "a.jsonl", words(9))
    conversions, waiting = [], threading.Event()
    convert_it, lock = convert._convert, convert.fcntl.flock

    def counted(*arguments):
        conversions.append(arguments)
        waiting.wait(60)  # until the other has met the lock
        convert_it(*arguments)

    def noted(file, flags):
        if not flags & convert.fcntl.LOCK_NB:
            waiting.set()
        lock(file, flags)

    monkeypatch.setattr(convert, "_convert", counted)
    monkeypatch.setattr(convert.fcntl, "flock", noted)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(parquet_paths(path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(conversions) == 1 and waiting.is_set()
    assert len(found) == 2 and found[0] == found[1]


def test_a_long_conversion_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "REPORT_SECONDS", 0)
    open_dataset(jsonl_file(tmp_path / "a.jsonl", words(9)))
    said = capsys.readouterr().out
    assert f"reading {tmp_path / 'a.jsonl'}, 1 of 1: " in said and "characters so far" in said


# ----------------------------------------------------------------------------------------------
# names of documents and of data

def names_of(data):
    dataset = open_dataset(data)
    return {split: [*dataset.named_documents(split)] for split in ("train", "val")}


def test_converted_documents_are_named_by_the_users_files(tmp_path):
    notes = tmp_path / "notes"
    (notes / "trips").mkdir(parents=True)
    content = {"a b.md": "of the first\n" * 1000, "trips/caf\u00e9.txt": "of the second\n" * 30}
    for name, text in content.items():
        text_file(notes / name, text)
    text_file(notes / "c.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    write_parquet(notes / "d.parquet", ["row 0", None, "row 2", "row 3"])
    named = names_of(notes)
    for split, pairs in named.items():
        assert [text for _, text in pairs] == [*iter_documents(split, notes)]
    pairs = named["train"] + named["val"]
    assert len(pairs) >= 8
    joined = {name: "".join(text for of, text in pairs if of == name) for name, _ in pairs}
    rows = {f"d.parquet, row {row}": f"row {row}" for row in (0, 2, 3)}
    assert joined == {**content, "c.jsonl": "onetwo", **rows}


def test_a_document_that_is_cut_for_validation_has_its_name_in_both_splits(tmp_path):
    named = names_of(text_file(tmp_path / "my.txt", "one\ntwo\nthree\n"))
    assert [name for name, _ in named["train"]] == ["my.txt"] == [name for name, _ in named["val"]]


def test_documents_that_are_read_in_place_are_named_by_file_and_row(tmp_path, base):
    folder = shard_folder(tmp_path / "mine", ["a", "", "c"], ["v", "w", "x"])
    expected = {
        "train": [("part_0.parquet, row 0", "a"), ("part_0.parquet, row 2", "c")],
        "val": [(f"part_1.parquet, row {row}", text) for row, text in enumerate("vwx")],
    }
    assert names_of(folder) == expected
    single = write_parquet(tmp_path / "one.parquet", words(40), row_group_size=7)
    pairs = sum(names_of(single).values(), [])
    assert pairs == [(f"one.parquet, row {row}", text) for row, text in enumerate(words(40))]
    columns = [(name, pa.array(words(40, name))) for name in ("text", "source")]
    other = table_file(tmp_path / "other.parquet", *columns)
    assert names_of(other)["train"][7] == ("other.parquet, row 7", "text 7"), "not ours"
    (base / "base_data").mkdir()
    write_shards(base / "base_data", "local", ["t"], ["v"])
    assert names_of(None)["train"] == [("local_00000.parquet, row 0", "t")]


def test_a_conversion_of_an_earlier_version_is_read_without_its_sources(tmp_path):
    path = text_file(tmp_path / "my.txt", "one\ntwo\nthree\n")
    for shard in parquet_paths(path):
        pq.write_table(pq.read_table(shard, columns=["text"]), shard)
    named = names_of(path)
    assert named["train"][0][0] == "shard_00000.parquet, row 0"
    assert named["val"][0][0] == "shard_00001.parquet, row 0"


def test_the_tag_of_data_changes_with_its_files(tmp_path, base):
    notes = tmp_path / "my notes"
    notes.mkdir()
    text_file(notes / "a.txt", "one\ntwo\n")
    tag = data_tag(notes)
    assert re.fullmatch("my-notes-[0-9a-f]{8}", tag) and data_tag(str(notes) + "/") == tag
    assert parquet_paths(notes)[0].parent.name.startswith(tag[-8:]), "as the conversion is named"
    assert data_tag(notes) == tag
    text_file(notes / "b.txt", "three\n")
    assert data_tag(notes) != tag


@pytest.mark.parametrize("name, begin", [
    ("corpus.jsonl.gz", "corpus-"),
    ("A.PARQUET", "A-"),
    ("caf\u00e9.v2.txt", "cafe-v2-"),
    ("\u7b14\u8bb0.md", "data-"),
    ("---.txt", "data-"),
    ("x" * 200 + ".txt", "x" * 40 + "-"),
])
def test_the_tag_of_a_file_is_a_safe_name(tmp_path, name, begin):
    tag = data_tag(text_file(tmp_path / name, "x"))
    assert tag.startswith(begin) and re.fullmatch("[0-9a-f]{8}", tag.removeprefix(begin))


def test_text_of_our_own_has_no_tag(tmp_path, base):
    (base / "base_data").mkdir()
    write_shards(base / "base_data", "local", ["t"], ["v"])
    assert data_tag(None) is None and data_tag(base / "base_data") is None
    copy = tmp_path / "copy"
    copy.mkdir()
    write_shards(copy, "local", ["t"], ["v"])
    assert re.fullmatch("copy-[0-9a-f]{8}", data_tag(copy))
    with pytest.raises(UserError, match="does not exist"):
        data_tag(tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------
# text that is on the machine

@pytest.fixture
def made_sources(tmp_path, monkeypatch):
    """A stand-in for the installed sources: 60 files, one of them a copy, one a table."""
    folder = tmp_path / "sources"
    folder.mkdir()
    body = '''def function_{i}_{k}(first, second):
    """What function {k} of file {i} does with its arguments, at some length."""
    return first * value_{i}_{k} + second


'''
    for i in range(60):
        functions = [
            body.format(i="abc"[i % 3] * (i + 1), k="xyz"[k % 3] * (k + 1))
            for k in range(40)
        ]
        text_file(folder / f"m{i}.py", "".join(functions))
    text_file(folder / "copy.py", (folder / "m0.py").read_bytes())
    text_file(folder / "table.py", "t = [" + "0x41, 0x42, " * 500 + "]")
    text_file(folder / "latin.py", b"# caf\xe9 caf\xe9\n" * 50)
    files = [("stdlib", path.name, path) for path in sorted(folder.glob("*.py"))]
    monkeypatch.setattr(sources, "python_files", lambda packages: files)
    monkeypatch.setattr(sources, "VALIDATION_SHARE", 0.2)
    return files


def test_local_text_is_deterministic_and_without_copies_or_tables(made_sources):
    found = collect_local()
    assert found == collect_local()
    splits = found.train, found.validation, found.unseen
    documents = sum(splits, [])
    assert all(splits) and all(len(text) <= 6000 for text in documents)
    heads = [{text.split("\n")[0] for text in split} for split in splits]
    every = set().union(*heads)
    assert len(every) == sum(map(len, heads)), "a file belongs to one split"
    assert "# table.py" not in every and "# latin.py" not in every
    assert len({"# m0.py", "# copy.py"} & every) == 1
    assert found.table["stdlib"]["documents"] == len(documents)


def test_local_shards_are_built_once(made_sources, base):
    build_local()
    paths = parquet_paths()
    stamps = [path.stat().st_mtime_ns for path in paths]
    build_local()
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    paths[-1].unlink()
    build_local()
    assert list(iter_documents("train")) + list(iter_documents("val"))
    assert pq.ParquetFile(parquet_paths()[0]).num_row_groups > 1


def test_a_build_that_broke_off_is_not_taken_for_whole(made_sources, monkeypatch):
    def full(path, documents):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shards, "_write_parquet", full)
        build_local()
    with pytest.raises(UserError, match="missing"):
        parquet_paths()
    build_local()
    assert parquet_paths()


def test_near_duplicates_are_found_by_their_lines():
    lines = [f"this is line number {i} of a text" for i in range(10)]
    seen = Seen()
    assert not seen.repeats("\n".join(lines))
    indented = ["    " + line for line in lines[:8]]
    assert seen.repeats("\n".join([*indented, "and something quite new here"]))
    others = [f"another text has its own line {i}" for i in range(8)]
    assert not seen.repeats("\n".join(lines[:2] + others))


def test_sources_on_this_machine_without_tests():
    names = [name for _, name, _ in python_files(("stdlib", "numpy"))]
    assert {"textwrap.py", "json/decoder.py", "numpy/__init__.py"} <= set(names)
    first_of_numpy = names.index("numpy/__config__.py")
    assert names == sorted(names[:first_of_numpy]) + names[first_of_numpy:]
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)


# ----------------------------------------------------------------------------------------------
# shards from a server

def shard_bytes(seed):
    file = io.BytesIO()
    texts = [f"{seed} {i} {i * 7919 % 1009}" for i in range(40_000)]
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


class Hub:
    """A server with shards 0, 1 and 1822.

    `script` maps a shard's name to what goes wrong in its next requests.
    """

    def __init__(self):
        self.files = {f"shard_{i:05d}.parquet": shard_bytes(i) for i in (0, 1, 1822)}
        self.script, self.requests, self.tags = {}, [], {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                prefix, _, name = self.path.rpartition("/")
                assert prefix == f"/datasets/{sources.REPOSITORY}/resolve/main"
                hub.requests.append((name, self.headers.get("Range")))
                trouble = (hub.script.get(name) or [None]).pop(0)
                if name not in hub.files or isinstance(trouble, int):
                    self.send_error(trouble or 404)
                    return
                body = hub.files[name]
                wanted = self.headers.get("Range") if trouble != "no range" else None
                start = int(wanted[6:-1]) if wanted else 0
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                if trouble == "garbage":
                    body = body[:-6] + b"</html"
                self.send_header("Content-Length", str(len(body) - start))
                if name in hub.tags:
                    self.send_header("X-Linked-Etag", f'"{hub.tags[name]}"')
                self.end_headers()
                end = start + len(body) // 2 if trouble == "cut" else len(body)
                self.wfile.write(body[start:end])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def run_command(*arguments):
    """The documented command, as a user runs it."""
    words = [sys.executable, "-m", "nanochat.dataset", *arguments]
    return subprocess.run(words, capture_output=True, text=True)


def test_fineweb_fetches_the_shards_and_always_the_validation_shard(hub, base):
    assert download_fineweb(2) == {}
    assert [path.name for path in parquet_paths()] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_01822.parquet",
    ]
    assert all(path.read_bytes() == hub.files[path.name] for path in parquet_paths())
    before = len(hub.requests)
    assert download_fineweb(2) == {}
    assert len(hub.requests) == before, "what is there is not fetched again"


def test_the_first_shards_stay_readable_while_more_are_fetched(hub, base, monkeypatch):
    """A tokenizer learns from them meanwhile."""
    hub.files["shard_00002.parquet"] = hub.files["shard_00001.parquet"]
    assert download_fineweb(1) == {}
    seen = []
    replace = os.replace

    def looking(source, target):
        seen.append(len(parquet_paths()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", looking)
    hub.script = {"shard_00001.parquet": [404]}
    assert list(download_fineweb(3)) == ["shard_00001.parquet"]
    assert len(parquet_paths()) == 2, "also where some of the others could not be fetched"
    assert download_fineweb(3) == {} and len(parquet_paths()) == 4
    assert seen and set(seen) == {2}


def test_errors_are_retried_and_cut_bodies_continued(hub, base):
    # docs/traps.md: half-downloaded
    hub.script = {
        "shard_00000.parquet": [503, "cut", "cut"],
        "shard_01822.parquet": ["cut", "no range"],
    }
    assert download_fineweb(1) == {}
    ranges = [given for name, given in hub.requests if name == "shard_00000.parquet"]
    assert any(ranges), "a cut body is continued"
    assert all(path.read_bytes() == hub.files[path.name] for path in parquet_paths())
    assert not list(base.rglob("*.part"))


def test_a_second_run_continues_the_first(hub, base):
    # docs/traps.md: half-downloaded
    hub.script = {"shard_00000.parquet": ["cut"] + [500] * 10}
    failed = download_fineweb(1)
    assert list(failed) == ["shard_00000.parquet"]
    with pytest.raises(UserError, match="1 of 2 files are missing"):
        parquet_paths()
    assert (base / "base_data" / "shard_00000.parquet.part").stat().st_size > 0
    hub.script, hub.requests = {}, []
    assert download_fineweb(1) == {}
    assert len(hub.requests) == 1 and hub.requests[0][1] not in (None, "bytes=0-")


def test_damaged_files_are_never_taken(hub, base):
    # docs/traps.md: half-downloaded
    hub.script = {"shard_00000.parquet": ["garbage"]}
    hub.tags = {"shard_01822.parquet": "0" * 64}
    failed = download_fineweb(1)
    assert list(failed) == ["shard_01822.parquet"] and "hash" in failed["shard_01822.parquet"]
    folder = base / "base_data"
    assert (folder / "shard_00000.parquet").read_bytes() == hub.files["shard_00000.parquet"]
    assert not (folder / "shard_01822.parquet").exists()


def test_the_command_exits_with_1_and_lists_what_is_missing(hub, base):
    # docs/traps.md: half-downloaded
    run = run_command("-n", "4", "--workers=2")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "2 shards are missing" in run.stderr
    assert "shard_00002.parquet, shard_00003.parquet" in run.stderr
    assert len(run.stderr.strip().split("\n")) == 1
    names = [name for name, _ in hub.requests]
    assert names.count("shard_00002.parquet") == 1, "an absent shard is not asked for again"


@pytest.mark.parametrize("arguments, words", [
    (["-n", "0"], "1 to 1822"),
    (["-n", "1823"], "1 to 1822"),
    (["--source=web"], "local, installed or fineweb"),
    (["--source=fineweb", "--workers=0"], "1 or more"),
])
def test_bad_settings_exit_with_2_and_one_line(arguments, words, base):
    run = run_command(*arguments)
    assert run.returncode == 2 and words in run.stderr
    assert len(run.stderr.strip().split("\n")) == 1
    assert not list(base.rglob("*.json"))


def test_a_damaged_or_shortened_build_is_made_again(made_sources, base):
    folder = base / "base_data"
    index = build_local()
    (folder / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="index.json is damaged"):
        parquet_paths()
    assert build_local()["sha256"] == index["sha256"]
    shard = folder / index["files"][0]
    shard.write_bytes(shard.read_bytes()[:-5])
    assert build_local()["sha256"] == index["sha256"]
    assert len(parquet_paths()) == len(index["files"]) + 1


def test_a_download_that_brings_nothing_leaves_the_text_that_was_there(made_sources, base, hub):
    build_local()
    before = parquet_paths()
    hub.files.clear()
    assert len(download_fineweb(1)) == 2
    assert parquet_paths() == before


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(tmp_path, base):
    lines = '\ufeff{"text": "one two three"}\n{"text": "four"}\n'
    path = text_file(tmp_path / "my.JSONL", lines)
    assert [*iter_documents("train", path)][0].startswith("one")


def digest(value):
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()[:16]


def test_local_documents_are_pinned(made_sources):
    """The same sources give the same text on every day; yesterday's build is still up to date."""
    assert digest(collect_local()) == "a1f2ff75edaa4270"
    index = build_local()
    assert index["key"] == "55a9685290e1840a" and digest(sorted(index)) == "854ff18ecc8bc3e5"
    assert digest([*iter_documents("train")]) == "89f391e3f8ede810"
    assert digest([*iter_documents("unseen")]) == "d0b490e5be95f463"
    assert digest([*iter_documents("val", rank=1, world_size=2)]) == "b996c3dac115a42d"


def test_documents_of_the_users_files_are_pinned(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    words = "caf\u00e9 " * 7
    for i in range(9):
        paragraphs = [
            f"Note {i}, paragraph {j}: {words[:5 * (j % 7)]}\n" + "\n" * (j % 3)
            for j in range(300 * i)
        ]
        text_file(notes / f"note{i}.md", "".join(paragraphs) or "short")
    (notes / "some.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    write_parquet(notes / "table.parquet", ["from", None, "parquet", ""])
    for data, expected in ((notes, "11329a9bb2b98ba7"), (notes / "note2.md", "ae6a05c4fb946f36")):
        splits = [list(iter_documents(split, data)) for split in ("train", "val")]
        assert digest(splits) == expected


# ----------------------------------------------------------------------------------------------
# what people feed it: parquet

def table_file(path, *columns, **options):
    """A parquet file of (name, array) columns, which may have the same name."""
    names, arrays = zip(*columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(list(arrays), names=list(names)), path, **options)
    return path


def split_folder(folder, **files):
    """A folder of parquet files: the name of each is its keyword, "__" becoming a slash."""
    for name, texts in files.items():
        table_file(folder / f"{name.replace('__', '/')}.parquet", ("text", pa.array(texts)))
    return folder


def words(count, word="document"):
    return [f"{word} {i}" for i in range(count)]


WORDS = pa.array(words(40))
STRING_COLUMNS = {
    "large": WORDS.cast(pa.large_string()),
    "view": WORDS.cast(pa.string_view()),
    "dictionary": WORDS.dictionary_encode(),
    "large dictionary": WORDS.cast(pa.large_string()).dictionary_encode(),
    "binary": WORDS.cast(pa.binary()),
    "large binary": WORDS.cast(pa.large_binary()),
    "dictionary of binary": WORDS.cast(pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", STRING_COLUMNS)
def test_a_column_of_any_kind_of_strings_is_text(tmp_path, kind):
    path = table_file(tmp_path / "a.parquet", ("text", STRING_COLUMNS[kind]), row_group_size=15)
    assert both_splits(path) == words(40)


@pytest.mark.parametrize("array, kind", [
    (pa.array([["a"], ["b"]]), "list<.*string>"),
    (pa.nulls(2), "null"),
    (pa.array([{"a": "b"}]), "struct"),
    (pa.array([1.5]), "double"),
])
def test_a_column_that_is_no_text_is_named_with_its_type(tmp_path, array, kind):
    path = table_file(tmp_path / "a.parquet", ("text", array))
    with pytest.raises(UserError, match=f"a.parquet.*its type is {kind}"):
        open_dataset(path)


def test_two_columns_of_the_same_name(tmp_path):
    path = table_file(tmp_path / "a.parquet", ("text", WORDS), ("text", WORDS))
    with pytest.raises(UserError, match="a.parquet has 2 columns named 'text'"):
        open_dataset(path)
    others = table_file(tmp_path / "b.parquet", ("x", WORDS), ("text", WORDS), ("x", WORDS))
    assert both_splits(others) == words(40)


def undecodable(texts):
    """A string column whose row 7 is the bytes ff fe."""
    data = [text.encode() for text in texts]
    data[7] = b"\xff\xfe"
    buffers = pa.array(data).buffers()
    return pa.Array.from_buffers(pa.string(), len(data), buffers)


@pytest.mark.parametrize("array", [
    undecodable(words(40)),
    undecodable(words(40)).cast(pa.binary(), safe=False),
    undecodable(words(40)).cast(pa.binary()).dictionary_encode(),
], ids=["string", "binary", "dictionary"])
def test_a_row_that_is_not_utf8_is_named_before_training(tmp_path, array):
    path = table_file(tmp_path / "a.parquet", ("text", array), row_group_size=5)
    with pytest.raises(UserError, match="a.parquet, row group 1, row 2 .*not UTF-8"):
        open_dataset(path)


def damage(path, group):
    """Overwrite a part of a row group's data; the file's footer stays whole."""
    with pq.ParquetFile(path) as parquet:
        chunk = parquet.metadata.row_group(group).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 40:start + 140] = b"\xff" * 100
    path.write_bytes(data)


@pytest.mark.parametrize("checked_bytes", [dataset.CHECKED_BYTES, 0], ids=["at once", "later"])
def test_a_damaged_page_is_named_by_file_and_row_group(tmp_path, monkeypatch, checked_bytes):
    monkeypatch.setattr(dataset, "CHECKED_BYTES", checked_bytes)
    texts = pa.array([f"{i * 7919 % 1009} words " * 20 for i in range(200)])
    path = tmp_path / "a.parquet"
    table_file(path, ("text", texts), row_group_size=50, compression="zstd")
    damage(path, 2)
    with pytest.raises(UserError, match="a.parquet, row group 2, is damaged.*copy or download"):
        found = open_dataset(path)
        assert checked_bytes == 0, "a small file is read through before training"
        list(found.documents("train"))


@pytest.mark.parametrize("content, message", [
    (b"", "not a whole parquet file: copy or download it again"),
    (b"<html>not found</html>", "not a whole parquet file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
])
def test_what_we_did_not_write_is_never_to_be_deleted(tmp_path, content, message):
    path = text_file(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(path)
    assert "delete" not in str(error.value)


def test_a_damaged_footer_is_one_line(tmp_path):
    path = table_file(tmp_path / "a.parquet", ("text", WORDS))
    whole = path.read_bytes()
    for start in range(len(whole) - 300, len(whole) - 8, 20):
        path.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8:])
        try:
            open_dataset(path)
        except UserError as error:
            assert str(path) in str(error)


def test_converted_text_that_is_damaged_is_made_again(tmp_path, base):
    path = text_file(tmp_path / "a.txt", "some\ntext\n")
    folder = parquet_paths(path)[0].parent
    for damaged in ("shard_00001.parquet", "index.json"):
        (folder / damaged).write_bytes(b"")
        with pytest.raises(UserError, match=f"delete {folder} and run this command again"):
            open_dataset(path)


def test_the_users_own_parquet_files_in_base_data(base):
    folder = split_folder(base / "base_data", one=words(100))
    text_file(folder / "index.json", '{"shards": []}')
    text_file(folder / "notes.txt", "not asked for")
    assert len(list(iter_documents("val"))) == 5


def test_names_in_upper_case(tmp_path):
    folder = split_folder(tmp_path / "mine", A=words(5), B=words(3, "last"))
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".PARQUET"))
    assert list(iter_documents("val", folder)) == words(3, "last")
    text_file(tmp_path / "MY.TXT", "some\ntext\n")
    assert "".join(both_splits(tmp_path / "MY.TXT")) == "some\ntext\n"


@pytest.mark.parametrize("sizes", [(40,), (7, 33), (20, 0, 20), (39, 1)])
def test_the_last_rows_of_a_single_file_are_validation(tmp_path, base, sizes):
    path = tmp_path / "a.parquet"
    texts = words(40)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for size in sizes:
            group, texts = texts[:size], texts[size:]
            writer.write_table(pa.table({"text": pa.array(group, pa.string())}), max(1, size))
    assert list(iter_documents("train", path)) == words(40)[:38]
    assert list(iter_documents("val", path)) == words(40)[38:]
    assert not (base / "user_data").exists(), "it is read in place"
    shares = [list(iter_documents("train", path, rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(words(40)[:38])


def test_files_without_a_row_are_passed_over(tmp_path):
    none = pa.array([], pa.string())
    folder = split_folder(tmp_path / "a", p0=words(4), p1=none, p2=words(2, "last"), p3=none)
    assert list(iter_documents("train", folder)) == words(4)
    assert list(iter_documents("val", folder)) == words(2, "last")
    alone = split_folder(tmp_path / "b", p0=words(100), p1=none)
    assert len(list(iter_documents("val", alone))) == 5


@pytest.mark.parametrize("texts", [[""] * 5, [None] * 5, ["", None], [" \n"] * 5])
def test_validation_without_a_text_is_refused_before_training(tmp_path, texts):
    empty = pa.array(texts, pa.string())
    for name, folder in {
        "last": split_folder(tmp_path / "last", p0=words(30), p1=empty),
        "test": split_folder(tmp_path / "test", train=words(30), test=empty),
        "rows": split_folder(tmp_path / "rows", p0=words(95) + texts[:1] * 5),
    }.items():
        words_ = f"{name}.*no documents to train on, or none in.*: add text"
        with pytest.raises(UserError, match=words_):
            open_dataset(folder)


def test_missing_texts_are_counted_and_are_no_documents(tmp_path, capsys):
    folder = split_folder(tmp_path / "a", p0=["a", None, "b", ""], p1=["v", None])
    assert both_splits(folder) == ["a", "b", "v"]
    said = capsys.readouterr().out
    assert "3 texts are null or empty and skipped" in said and " 3 documents" in said


# ----------------------------------------------------------------------------------------------
# what people feed it: folders

def test_the_splits_of_a_hub_clone_are_recognised_and_said(tmp_path, base, capsys):
    clone = split_folder(
        tmp_path / "clone",
        **{
            "data__train-00000-of-00002": words(30),
            "data__train-00001-of-00002": words(30, "more"),
            "data__test-00000-of-00001": words(7, "test"),
        },
    )
    text_file(clone / "README.md", "# About\n")
    text_file(clone / "dataset_card.md", "# What it holds\n")
    text_file(clone / "dataset_infos.json", "{}")
    assert list(iter_documents("train", clone)) == words(30) + words(30, "more")
    said = capsys.readouterr().out
    assert "3 parquet files, 67 documents" in said and "bytes" in said
    assert "the split test" in said and "left aside 3 files about the data" in said
    assert list(iter_documents("val", clone)) == words(7, "test")
    assert not (base / "user_data").exists(), "it is read in place"


def test_notes_beside_much_parquet_are_about_it(tmp_path, base, monkeypatch, capsys):
    folder = split_folder(tmp_path / "mine", p0=words(9), p1=words(2, "last"))
    text_file(folder / "how_it_was_made.md", "With care.\n")
    assert "With care." in "".join(both_splits(folder))
    monkeypatch.setattr(userfiles, "MUCH_PARQUET", 100)
    assert both_splits(folder) == words(9) + words(2, "last")
    assert "how_it_was_made.md first" in capsys.readouterr().out


@pytest.mark.parametrize("names, validation", [
    (("train", "validation", "test"), "validation"),
    (("train-00000-of-00001", "dev-00000-of-00001", "test-00000-of-00001"), "dev"),
    (("default__train__0000", "default__valid__0000", "default__test__0000"), "valid"),
    (("en__train", "en__eval", "en__test"), "eval"),
    (("TRAIN_1", "z_train_2", "a_val"), "val"),
    (("train", "unsupervised", "test"), "test"),
    (("train", "holdout"), "holdout"),
    (("trainSet", "testSet"), "testSet"),
    (("a_train", "heldout", "valid_set"), "valid_set"),
    (("train", "held-out"), "held-out"),
    (("devset", "trainset"), "devset"),
    # no name says train: what tells no split trains
    (("dev", "part-0", "part-1"), "dev"),
    (("part-0", "test", "z"), "test"),
    (("a", "testset", "val"), "val"),
])
def test_names_tell_the_splits(tmp_path, capsys, names, validation):
    folder = split_folder(tmp_path / "mine", **{name: words(3, name) for name in names})
    train = {text.split()[0] for text in iter_documents("train", folder)}
    val = {text.split()[0] for text in iter_documents("val", folder)}
    assert val == {name for name in names if validation in name}
    tests = {name for name in names if "test" in name or "held" in name}
    assert not train & val and not train & tests
    said = capsys.readouterr().out
    assert ("left aside 1 files of the split test" in said) == bool(tests - val)
    assert re.search(f"validation is the files of the split .*{validation}.*.parquet first", said)


@pytest.mark.parametrize("names", [
    ("a", "b", "testimony"),    # a word that begins like a split
    ("part-0", "part-1"),
    ("test-0", "test-1"),       # nothing else to train on
    ("train-0", "train-1"),
])
def test_other_names_leave_the_last_file_for_validation(tmp_path, names):
    folder = split_folder(tmp_path / "mine", **{name: words(3, name) for name in names})
    assert list(iter_documents("val", folder)) == words(3, names[-1])
    assert len(list(iter_documents("train", folder))) == 3 * (len(names) - 1)


@pytest.mark.parametrize("names", [("others", "train"), ("a", "train", "train_more", "z")])
def test_the_only_file_called_train_is_not_validation(tmp_path, names):
    # docs/traps.md: split-by-a-word
    folder = split_folder(tmp_path / "mine", **{name: words(3, name) for name in names})
    validation = [name for name in names if "train" not in name][-1]
    assert list(iter_documents("val", folder)) == words(3, validation)
    assert len(list(iter_documents("train", folder))) == 3 * (len(names) - 1)


NOTE = "A line of a note that somebody has written.\n" * 30


@pytest.mark.parametrize("names", [
    ("train to Paris.md", "garden.md", *(f"dev/{i}.md" for i in range(10))),
    ("Train.md", "Test.md", "Eval.md", "a.md"),
    ("Train.md", "Test.md"),
    ("train.txt", "test drive.txt"),
    ("Training/plan.md", "garden.md", "test.md"),
    ("trips/train/a.md", "trips/test/b.md"),
    ("dev/a.rst", "other/b.org", "test.markdown"),
])
def test_a_word_in_the_name_of_a_note_tells_no_split(tmp_path, names):
    # docs/traps.md: split-by-a-word
    for name in names:
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        text_file(tmp_path / "notes" / name, NOTE * 20)
    pairs = names_of(tmp_path / "notes")
    assert {name for name, _ in sum(pairs.values(), [])} == set(names), "nothing is left aside"
    assert sum(len(text) for _, text in pairs["val"]) < 0.2 * len(NOTE * 20) * len(names)
    assert len({name for name, _ in pairs["val"]}) == 1


@pytest.mark.parametrize("names, validation", [
    (("train/pos/a.txt", "train/neg/b.txt", "test/pos/a.txt", "words.txt"), "test/"),
    (("train.txt", "valid.txt", "test.txt"), "valid"),
    (("wiki.train.txt", "wiki.test.txt.gz"), "wiki.test"),
    (("Train/a.md", "Validation/a.md", "Test/b.md"), "Validation"),
])
def test_texts_in_the_layout_of_a_data_set_have_its_splits(tmp_path, names, validation):
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        text_file(tmp_path / "mine" / name, NOTE)
    found = {name for name, _ in names_of(tmp_path / "mine")["val"]}
    assert found == {name for name in names if name.startswith(validation)}


def test_a_table_of_tests_among_notes_is_no_split(tmp_path):
    for name in ("a.md", "b.md"):
        text_file(tmp_path / name, NOTE)
    text_file(tmp_path / "test.csv", "date,grade\n1,2\n")
    text_file(tmp_path / "dev.json", '{"port": 80}')
    assert {name for name, _ in sum(names_of(tmp_path).values(), [])} == {"a.md", "b.md"}
    text_file(tmp_path / "test.csv", "grade\n12345\n")
    pairs = names_of(tmp_path)
    assert "test.csv" in {name for name, _ in sum(pairs.values(), [])}
    assert sum(len(text) for _, text in pairs["val"]) > len("12345")


def test_the_splits_of_text_files_are_recognised_too(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        text_file(folder / f"{name}.jsonl", f'{{"text": "{name} one"}}\n{{"text": "{name}"}}\n')
    text_file(folder / "README.md", "# About\n")
    assert list(iter_documents("train", folder)) == ["train one", "train"]
    assert list(iter_documents("val", folder)) == ["valid one", "valid"]
    said = capsys.readouterr().out
    assert "split validation" in said and "test.jsonl first" in said and "README.md first" in said


def test_a_readme_among_notes_is_a_note(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    text_file(folder / "README.md", "what this is\n")
    text_file(folder / "other.md", "another note\n")
    assert "what this is" in "".join(both_splits(folder))


OWN = ("Authors I like.md", "Notice board.md", "README.md", "diary.md", "Citations.txt")


@pytest.mark.parametrize("records, about", [
    ({"expenses.csv": "date,amount\n1,2\n"}, set()),
    ({"talk.jsonl": '{"messages": []}\n'}, set()),
    ({"some.jsonl": '{"text": "some text"}\n'}, {"README.md"}),
    ({"some.csv": "id;Text\n1;some text\n"}, {"README.md"}),
])
def test_notes_are_about_the_data_only_where_there_are_data_and_by_their_whole_names(
        tmp_path, records, about):
    for name in OWN:
        text_file(tmp_path / name, NOTE)
    for name, content in records.items():
        text_file(tmp_path / name, content)
    found = {name for name, _ in sum(names_of(tmp_path).values(), [])}
    assert found - records.keys() == {*OWN} - about


def test_a_list_of_sources_beside_parquet_is_never_trained_on(tmp_path, base, capsys):
    folder = split_folder(tmp_path / "mine", a=words(30), b=words(30))
    listed = "".join(f"0\t{row}\ta book\n" for row in range(9))
    (folder / "sources.txt.gz").write_bytes(gzip.compress(listed.encode()))
    text_file(folder / "SHA256SUMS.txt", "acdd  a.parquet\n")
    assert sorted(both_splits(folder)) == sorted(words(30) + words(30))
    assert "left aside 2 files about the data" in capsys.readouterr().out


def test_a_list_of_texts_beside_parquet_is_read_unless_there_is_much(
        tmp_path, monkeypatch, capsys):
    folder = split_folder(tmp_path / "mine", a=words(30))
    text_file(folder / "texts.json", json.dumps(["one more text"]))
    text_file(folder / "dataset_infos.json", '{"default": {}}')
    assert sorted(both_splits(folder)) == sorted([*words(30), "one more text"])
    monkeypatch.setattr(userfiles, "MUCH_PARQUET", 100)
    assert both_splits(folder) == words(30)
    assert "left aside 2 files about the data" in capsys.readouterr().out


def test_what_cannot_be_read_beside_parquet_is_said(tmp_path, capsys):
    folder = split_folder(tmp_path / "mine", a=words(30), b=words(2))
    for name in ("a.bin", "p2.parquet.gz", "p3.arrow"):
        text_file(folder / name, "x")
    assert len(both_splits(folder)) == 32
    said = capsys.readouterr().out
    assert "skipped 3 files" in said and "p2.parquet.gz first" in said
    assert "gunzip FILE.parquet.gz" in said


@pytest.mark.parametrize("content", [
    '{"version": 2, "shards": [{"raw_data": {"basename": "shard.00000.mds"}}]}',
    '{"files": ["../../secret.parquet"], "validation": "p0.parquet"}',
    '{"files": "p0.parquet", "validation": "p1.parquet"}',
    "[1, 2]",
    "no JSON at all",
])
def test_an_index_of_another_program_is_ignored(tmp_path, content):
    folder = split_folder(tmp_path / "mine", p0=words(3), p1=words(2, "last"))
    text_file(folder / "index.json", content)
    assert list(iter_documents("val", folder)) == words(2, "last")


def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    notes, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    (notes / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    text_file(notes / "sub" / "a.txt", "in the folder\n")
    text_file(elsewhere / "b.txt", "elsewhere\n")
    (notes / "another").symlink_to(elsewhere)
    (notes / "again").symlink_to(elsewhere)
    (notes / "a_copy").symlink_to(notes / "sub")
    (notes / "sub" / "circle").symlink_to(notes)
    (elsewhere / "back").symlink_to(notes)
    (notes / "link.txt").symlink_to(elsewhere / "b.txt")
    (notes / "nowhere.txt").symlink_to(tmp_path / "missing")
    found = "".join(both_splits(notes))
    assert sorted(found.split("\n")) == ["", "elsewhere", "in the folder"]


def test_what_runs_write_is_not_text_of_the_folder_around_it(tmp_path, base):
    text_file(base / "metrics.jsonl", '{"stage": "tok_train"}\n')
    text_file(tmp_path / "a.txt", "some\ntext\n")
    assert "".join(both_splits(tmp_path)) == "some\ntext\n"
    assert "".join(both_splits(tmp_path)) == "some\ntext\n", "with the converted text there"


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_dataset(tmp_path / "pipe.txt")


# ----------------------------------------------------------------------------------------------
# what people feed it: files of text

LINES = "".join(json.dumps({"text": text}) + "\n" for text in words(40))


def compressed(data, suffix):
    """Bytes as another program would compress them."""
    if suffix == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".GZ"])
def test_compressed_text_is_read(tmp_path, suffix):
    data = compressed(LINES.encode(), suffix.lower())
    assert both_splits(text_file(tmp_path / f"a.jsonl{suffix}", data)) == words(40)
    # what it begins with counts, not the name; and two files after each other are one
    again = text_file(tmp_path / "again.jsonl", data + data)
    assert both_splits(again) == words(40) * 2
    cut = text_file(tmp_path / f"cut.txt{suffix}", data[:-12])
    with pytest.raises(UserError, match="cut.txt.* is damaged .*copy or download it again"):
        open_dataset(cut)


def test_a_name_that_says_compressed_of_a_file_that_is_not(tmp_path):
    assert both_splits(text_file(tmp_path / "a.jsonl.gz", LINES)) == words(40)


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps([{"text": text} for text in words(40)], indent=1)),
    ("a.json", json.dumps(words(40))),
    ("a.json", json.dumps({"text": words(40), "id": list(range(40))})),
    ("a.json", LINES),
    ("a.json", "\ufeff" + json.dumps(words(40))),
    ("a.json", "".join(json.dumps([text]) + "\n" for text in words(40))),
    ("a.jsonl", json.dumps([{"text": text} for text in words(40)])),
    ("a.jsonl", json.dumps([{"text": text} for text in words(40)], indent=1)),
    ("a.jsonl", "\n".join(json.dumps({"text": text}, indent=1) for text in words(40))),
    ("a.csv", "sep=;\nid;text\n" + "".join(f"1;{text}\n" for text in words(40))),
    ("a.csv", "\n\nid|text\n" + "".join(f"1|{text}\n" for text in words(40))),
    ("a.csv", "text\r" + "\r".join(words(40))),
    ("a.ndjson", LINES),
    ("a.JsonLines", LINES),
    ("a.jsonl", LINES.replace('"text"', '"Text"')),
    ("a.json", json.dumps([{"TEXT": text} for text in words(40)])),
    ("a.json", json.dumps({"Text": words(40)})),
    ("a.jsonl", LINES.replace('"text"', '"Text": 1, "text"')),
    ("a.csv", '"id\nof a row";"text"\n' + "".join(f"1;{text}\n" for text in words(40))),
    ("a.csv", ",,\n;;\nid,text,\n" + "".join(f"1,{text},,\n" for text in words(40))),
    ("a.csv", 'id,"text"\r' + "\r".join(f'1,"{text}"' for text in words(40))),
    ("a.jsonl", LINES.replace("\n", "\r\n")),
    ("a.jsonl", LINES.replace("\n", "\n\ufeff", 20)),
    ("a.csv", "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(words(40)))),
    ("a.csv", "\ufeffText;id\r\n" + "".join(f"{text};1\r\n" for text in words(40))),
    ("a.csv", "content\n" + "\n".join(words(40))),
    ("a.tsv", "text\tid\n" + "".join(f"{text}\t1\n" for text in words(40))),
])
def test_other_forms_of_a_list_of_documents(tmp_path, name, content):
    assert both_splits(text_file(tmp_path / name, content)) == words(40)


@pytest.mark.parametrize("suffix", [".markdown", ".rst", ".org"])
def test_other_markup_is_plain_text(tmp_path, suffix):
    assert "".join(both_splits(text_file(tmp_path / f"a{suffix}", NOTE))) == NOTE


def test_a_column_of_parquet_may_be_called_text_in_upper_case(tmp_path):
    path = table_file(tmp_path / "a.parquet", ("id", pa.array(range(40))), ("Text", WORDS))
    assert both_splits(path) == WORDS.to_pylist()
    both = table_file(tmp_path / "b.parquet", ("Text", pa.array(["x"] * 40)), ("text", WORDS))
    assert both_splits(both) == WORDS.to_pylist()
    several = table_file(tmp_path / "c.parquet", ("Text", WORDS), ("TEXT", WORDS))
    with pytest.raises(UserError, match="no column 'text'"):
        open_dataset(several)


def test_a_long_and_quoted_text_in_a_table(tmp_path):
    text = 'He said "no",\nand left. ' * 20_000
    quoted = text.replace('"', '""')
    path = text_file(tmp_path / "a.csv", f'id,text\n1,short\n2,"{quoted}"\n')
    assert "".join(both_splits(path)) == "short" + text


@pytest.mark.parametrize("name, content, message", [
    # docs/traps.md: shifted-columns
    ("a.csv", "id,text\n1,Hello, Ada.\n", "line 2: 3 columns, the first line has 2.*between"),
    ("a.csv", "id;body\n1;x\n", "no column 'text', only .*id.*body"),
    ("a.csv", "Frage|a|kurz, b\n1|x|y\n", "no column 'text', only .'frage', 'a', 'kurz, b'"),
    ("a.csv", '\n"open\n' + "x\n" * 300, "line 2: a quote among the columns' names is not closed"),
    ("a.csv", 'id;"text', "line 1: a quote among the columns' names is not closed"),
    ("a.csv", "id,body\n1,x\n", "no column 'text', only .*id.*body"),
    ("a.csv", "text,text\nx,y\n", "2 columns 'text'"),
    ("a.csv", "id,text\n1,x\n2,one, two\n", "line 3: 3 columns"),
    ("a.csv", "sep=,\n\nid,text\n1,x\n2,one, two\n", "line 5: 3 columns"),
    ("a.json", '["a"] x', "line 1: not JSON .Extra data"),
    ("a.jsonl", '[\n"a",\n"b"', "line 3: not JSON"),
    ("a.jsonl", LINES + "\0" * 50 + "\n", "line 41: not an object"),
    ("a.csv", 'id,text\n1,x\n2,"open\n3,y\n', "a.csv, line 4: unexpected end of data"),
    ("a.csv", 'text\n"He said "no"."\n', "a.csv, line 2: .*expected after .*in quotes as"),
    ("a.json", '{"a": 1}', "holds no list of texts: the form is"),
    ("a.json", "[]", "holds no list of texts"),
    ("a.json", '["a", 5]', "item 1"),
    ("a.json", '["a", %s]' % ("9" * 5000), "a number has too many digits|item 1"),
    ("a.jsonl", '{"text": %s}' % ("9" * 5000), "line 1: not an object"),
    ("a.jsonl", '{"content": "a", "id": 1}\n', "line 1: .*keys: content, id.*: rename the one"),
    ("a.jsonl", '{"text": ["a", "b"]}\n', "line 1: .*its text is a list, join it"),
    ("a.jsonl", '{"text": [{"role": "user", "content": "a"}]}\n', "--custom of"),
    ("a.jsonl", "<!DOCTYPE html>\n<html>", "is a web page, not the file itself: download"),
    ("a.csv", "\n <html><body>", "is a web page"),
    ("a.json", '[\n"a"\n"b"]', "line 3: not JSON"),
    ("a.json", "[" * 100_000, "a.json"),
    ("a.jsonl", LINES + '{"text": 5}\n', "line 41"),
    ("a.jsonl", LINES + "[" * 100_000, "line 41"),
    ("a.jsonl", LINES.encode() + b'{"text": "caf\xe9"}\n', "line 41: not UTF-8 .*latin1"),
    ("a.jsonl", b"one\ntwo\nit\x92s\n", "line 3: not UTF-8 .byte 10.*cp1252"),
    ("a.txt", "caf\u00e9 \u00e0 la \u00e9".encode() + b"\xff", "correct or remove this line"),
    ("a.txt", "\u041f\u0440\u0438\u0432\u0435\u0442".encode("cp1251"), "cp1251"),
    ("a.txt", "\u3053\u3093\u306b\u3061\u306f".encode("shift_jis"), "shift_jis"),
    ("a.txt", "one two".encode("utf-16") + b"x", "not UTF-16 throughout .*copy or download"),
    ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "no text but a PDF.*pdftotext"),
    ("a.txt", b"PK\x03\x04 and so on", "no text but a zip.*docx"),
    ("a.md", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "no text but binary data"),
    ("a.jsonl", b"\0" * 1000, "no text but binary data"),
    ("a.csv", b"PAR1 and so on", "name that ends with .parquet"),
    ("a.txt", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a.pdf", "%PDF", "pdftotext"),
    ("a.parquet.gz", "x", "gunzip FILE.parquet.gz"),
    ("a.parquet.zst", "x", "unzstd FILE.parquet.zst"),
    ("a.doc", "x", "libreoffice --convert-to txt FILE.doc"),
    ("a.rtf", "x", "pandoc FILE.rtf"),
    ("a.htm", "x", "pandoc FILE.htm -o"),
    ("a.xlsx", "x", "libreoffice --convert-to csv"),
    ("a.txt.lz4", "x", "lz4 -d"),
])
def test_what_cannot_be_read_is_one_line_with_the_place(tmp_path, name, content, message):
    path = text_file(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_null_texts_are_skipped_and_counted(tmp_path, capsys):
    content = LINES + '{"text": null}\n' * 3 + '{"text": "  "}\n'
    assert both_splits(text_file(tmp_path / "a.jsonl", content)) == words(40)
    said = capsys.readouterr().out
    assert "skipped 4 texts that are null or empty" in said
    assert f"1 files of {len(content):,} bytes" in said


def test_settings_among_notes_are_skipped_and_said(tmp_path, capsys):
    text_file(tmp_path / "package.json", '{"name": "x"}')
    text_file(tmp_path / "tsconfig.json", "{ // a comment\n}")
    text_file(tmp_path / "numbers.csv", "a,b\n1,2\n")
    text_file(tmp_path / "note.md", "some\ntext\n")
    assert "".join(both_splits(tmp_path)) == "some\ntext\n"
    said = capsys.readouterr().out
    assert all(name in said for name in ("package.json", "tsconfig.json", "numbers.csv"))


def test_the_mark_before_each_of_several_joined_files_is_no_text(tmp_path):
    path = text_file(tmp_path / "a.txt", "\ufeffone\n\ufefftwo\nthree\n")
    assert "".join(both_splits(path)) == "one\ntwo\nthree\n"


# ----------------------------------------------------------------------------------------------
# what people feed it: encodings

SENTENCES = {
    "French": "L’été dernier, où étais-tu\u00a0? «\u00a0À la forêt, "
              "près du chêne, avec ma sœur\u00a0», dit-elle. C’était français.",
    "German": "Die Bäume stehen grün, die Äpfel sind süß, „und morgen hört es auf“.",
    "Spanish": "¿Dónde está el niño? ¡Aquí, detrás del árbol! Son 20º y llovió.",
    "Portuguese": "A coração não sabe, você também não. As lições são às dez.",
    "Italian": "Perché no? La città è lì, più in là c’è il mare, però è freddo.",
    "Dutch": "Het café van de tweeëntwintig coördinaten, zei hij, is één ruïne.",
    "Danish": "Blåbær og rødgrød med fløde på en ø ved søen.",
    "Swedish": "En älg gick över ån och åt upp våra äpplen på Öland.",
    "English": "It’s “two” – or three — of them… at 25\u00a0°C for £5, © 2001.",
}


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv"])
def test_western_european_text_of_an_older_encoding_is_read_and_said(
        tmp_path, capsys, language, name):
    lines = [f"{i} {SENTENCES[language]}" for i in range(30)]
    header = "id;text\n" if name == "a.csv" else ""
    body = "".join(f'{i};"{line}"\n' if header else line + "\n" for i, line in enumerate(lines))
    path = text_file(tmp_path / name, (header + body).encode("cp1252"))
    found = "".join(both_splits(path))
    assert found == "".join(lines) if header else found == body
    assert f"1 files read as cp1252 (first: {name})" in capsys.readouterr().out


OTHERS = {
    "cp1250": [
        "Zażółć gęślą jaźń, powiedział mężczyzna",  # Polish
        "Příliš žluťoučký kůň úpěl ďábelské ódy",  # Czech
        "Árvíztűrő tükörfúrógép, a bőröndől a kendő",  # Hungarian
        "Strojnici že čekaj školu, čovjek i đak i ćela",  # Croatian
    ],
    "iso8859-2": ["Zażółć gęślą jaźń, powiedział mężczyzna"],
    "cp1254": ["Pijamalı hasta yağız şoföre çabucak güvendi, İstanbul ve ışık"],
    "cp1251": ["Съешь ещё этих булок", "he said за, not против, and so on and on and on"],
    "koi8-r": ["Съешь ещё этих булок"],
    "cp1253": ["Ξεσκεπάζω την ψυχοφθόρα"],
    "mac-roman": [SENTENCES[name] for name in ("French", "German", "Spanish", "Danish")],
    "cp850": [
        "Die Bäume stehen grün, und morgen hört es auf",
        "L’été dernier".replace("’", "'") + ", où étais-tu, à la forêt ?",
    ],
    "iso8859-15": ["ma sœur et mon cœur, pour 5 €"],
    "shift_jis": ["こんにちは、世界 and so on and on and on and on and on"],
    "iso8859-5": ["he said да, not нет, and so on and on and on"],
    "iso8859-7": ["he said και, not όχι, and so on and on and on"],
    "gb18030": ["你好，世界 and so on and on and on and on and on and on and on"],
}


@pytest.mark.parametrize("encoding, sentence", [
    (encoding, sentence) for encoding, sentences in OTHERS.items() for sentence in sentences])
def test_text_that_would_be_read_wrongly_is_refused(tmp_path, encoding, sentence):
    # docs/traps.md: guessed-encoding
    path = text_file(tmp_path / "a.txt", (sentence + "\n").encode(encoding) * 20)
    with pytest.raises(UserError, match="a.txt, line 1: not UTF-8 .*iconv -f"):
        open_dataset(path)


RUSSIAN = "Однажды весною, в час небывало жаркого заката, в Москве появились два гражданина. "
JAPANESE = "私は毎日学校へ行きます。今日は天気がとてもいいです。"
GUESSED = {
    "cp1251": RUSSIAN,
    "koi8-r": RUSSIAN,
    "cp866": RUSSIAN,
    "iso8859-5": RUSSIAN,
    "cp1253": "η πόλη είναι μεγάλη, όμως δεν ξέρω τι να κάνω σήμερα. ",
    "shift_jis": JAPANESE,
    "euc-jp": JAPANESE,
    "gb18030": "我们在这里学习中文，今天的天气很好，他说要来看你。这是一个大问题。",
    "euc-kr": "나는 매일 학교에 갑니다. 오늘은 날씨가 아주 좋습니다. ",
}
UNKNOWN = {
    **{name: " ".join(OTHERS[name]) for name in ("cp1250", "cp1254", "mac-roman", "cp850")},
    "big5": "我們在這裡學習中文，今天的天氣很好，他說要來看你。",
    "cp1255": "שלום עולם, זה טקסט בעברית שנכתב היום ",
}


@pytest.mark.parametrize("encoding", [*GUESSED, *UNKNOWN])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_encoding_is_named_only_where_the_text_is_clearly_in_it(tmp_path, encoding, start):
    # docs/traps.md: guessed-encoding
    sentence = GUESSED.get(encoding) or UNKNOWN[encoding]
    data = (sentence * 20).encode(encoding)[start:]
    name = encoding if encoding in GUESSED else "ENCODING"
    with pytest.raises(UserError, match=f"not UTF-8 .*iconv -f {name} -t utf-8"):
        open_dataset(text_file(tmp_path / "a.txt", data))


@pytest.mark.parametrize("encoding", [
    "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [
    "one two\nthree\n" * 40,
    "Съешь ещё\n" * 40,
    "你好，世界。\n" * 40,
    "café \U0001f600\n" * 3000,
])
def test_utf16_and_utf32_are_read_with_and_without_a_mark(tmp_path, capsys, encoding, text):
    path = text_file(tmp_path / "a.txt", text.encode(encoding))
    assert "".join(both_splits(path)) == text
    assert f"1 files read as {encoding} (first: a.txt)" in capsys.readouterr().out
    documents = text.split("\n")[:-1][:30]
    lines = "".join(json.dumps({"text": line}) + "\r\n" for line in documents)
    assert both_splits(text_file(tmp_path / "b.jsonl", lines.encode(encoding))) == documents
    data = json.dumps(documents).encode(encoding)
    packed = text_file(tmp_path / "c.json.gz", gzip.compress(data))
    assert both_splits(packed) == documents


def test_a_long_search_for_the_encoding_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.encoding.REPORT_SECONDS", 0)
    monkeypatch.setattr("nanochat.encoding.BLOCK_BYTES", 1000)
    open_dataset(text_file(tmp_path / "a.txt", NOTE * 10))
    said = capsys.readouterr().out
    assert f"checking the encoding of {tmp_path / 'a.txt'}: 5,000 bytes so far" in said


def test_a_wrong_byte_is_found_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.encoding.BLOCK_BYTES", 10)
    for before in ("", "a\n", "\u00e9" * 7, "\u4e16\u754c\n" * 9, "x" * 29):
        start = before.encode()
        path = text_file(tmp_path / "a.jsonl", start + b"\xff" + b"more\n")
        line, offset = before.count("\n") + 1, len(start)
        with pytest.raises(UserError, match=rf"line {line}: not UTF-8 \(byte {offset}\)"):
            open_dataset(path)
        whole = text_file(tmp_path / "b.txt", start + b"more\n\xc3\xa9")
        assert "".join(both_splits(whole)) == before + "more\n\u00e9"


# ----------------------------------------------------------------------------------------------
# what people feed it: folders of which not all can be read

def test_files_that_are_no_text_are_skipped_and_named(tmp_path, capsys):
    text_file(tmp_path / "a.txt", "some\ntext\n")
    text_file(tmp_path / "letter.txt", b"PK\x03\x04word/document.xml")
    text_file(tmp_path / "photo.md", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\2" * 9)
    assert "".join(both_splits(tmp_path)) == "some\ntext\n"
    said = capsys.readouterr().out
    assert re.search("skipped .*letter.txt is no text but a zip", said)
    assert re.search("skipped .*photo.md is no text but binary", said)


def test_all_bad_files_of_a_folder_are_named_at_once(tmp_path, base, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    text_file(notes / "good.txt", "some\ntext\n")
    text_file(notes / "russian.txt", "Однажды весною\n".encode("cp1251"))
    text_file(notes / "lines.jsonl", '{"text": "a"}\n{"txt": "b"}\n')
    text_file(notes / "pointer.md", "version https://git-lfs.github.com/spec/v1\n")
    text_file(notes / "cut.txt.gz", gzip.compress(b"x" * 1000)[:-12])
    text_file(notes / "list.json", '["a", "b" "c"]')
    text_file(notes / "table.csv", "id,text\n1,one, two\n")
    with pytest.raises(UserError, match="6 of 7 files cannot be read, as said above"):
        open_dataset(notes)
    said = capsys.readouterr().out
    for words_ in (
        "russian.txt, line 1: .*iconv -f cp1251",
        "lines.jsonl, line 2: not an object",
        "pointer.md is a pointer .*git lfs pull",
        "cut.txt.gz is damaged .*copy or download",
        "list.json, line 1: not JSON",
        "table.csv, line 2: 3 columns",
    ):
        assert re.search(f"error: .*{words_}", said), words_
    assert list((base / "user_data").iterdir()) == []


def test_no_more_than_twenty_bad_files_are_named(tmp_path, capsys):
    for i in range(25):
        text_file(tmp_path / f"{i}.jsonl", "no JSON\n")
    with pytest.raises(UserError, match="25 of 25 files"):
        open_dataset(tmp_path)
    said = capsys.readouterr().out
    assert said.count("error: ") == 20 and "and 5 more" in said


def test_all_bad_parquet_files_of_a_folder_are_named_at_once(tmp_path, capsys):
    folder = split_folder(tmp_path / "mine", a=words(3), b=words(3), c=words(3))
    text_file(folder / "b.parquet", "cut")
    table_file(folder / "c.parquet", ("body", WORDS))
    with pytest.raises(UserError, match="2 of 3 files cannot be read"):
        open_dataset(folder)
    said = capsys.readouterr().out
    assert "b.parquet is not a whole" in said and "c.parquet has no column 'text'" in said


TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, Ada."}]
CONVERSATIONS = {
    "a.jsonl": json.dumps({"messages": TALK}) + "\n",
    "b.jsonl": json.dumps(TALK) + "\n",
    "c.json": json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 3),
    "d.csv": "Prompt,Completion\na,b\n",
    "e.jsonl": json.dumps({"body": {"messages": TALK}, "id": 1}) + "\n",
    "f.json": json.dumps([TALK, TALK]),
    "h.json": json.dumps({"version": 1, "data": [{"question": "a", "answer": "b"}]}),
    "i.jsonl": json.dumps([{"prompt": "a", "completion": "b"}], indent=1),
    "g.jsonl": json.dumps({"conversations": [{"from": "human", "value": "a"}]}) + "\n",
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_given_as_text_are_said_to_belong_elsewhere(tmp_path, capsys, name):
    path = text_file(tmp_path / name, CONVERSATIONS[name])
    with pytest.raises(UserError, match=f"{name}.*a conversation, not text.*--custom.*CUSTOM="):
        open_dataset(path)
    text_file(tmp_path / "note.txt", "some\ntext\n")
    assert "".join(both_splits(tmp_path)) == "some\ntext\n"
    said = capsys.readouterr().out
    assert re.search(f"skipped .*{name}.*--custom of scripts.chat_sft", said)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"text": "some", "conversation": 7}\n{"conversation": 8, "text": "text"}\n'),
    ("b.json", '[{"text": "some", "conversation": 7}, {"conversation": 8, "text": "text"}]'),
    ("c.jsonl", '[{"text": "some", "conversation": 7}, {"conversation": 8, "text": "text"}]'),
    ("d.jsonl", '\ufeff[\n  {\n    "text": "some"\n  },\n  {\n    "text": "text"\n  }\n]\n'),
    ("e.jsonl", '\ufeff{\n  "text": "some"\n}\n{\n  "text": "text"\n}\n'),
    ("f.jsonl", '\ufeff{"text": "some"}\n{"text": "text"}\n'),
])
def test_records_with_a_text_are_read_whatever_other_keys_and_mark_they_have(
        tmp_path, name, content):
    path = text_file(tmp_path / name, content)
    assert "".join(both_splits(path)) == "sometext"


def test_a_conversation_among_texts_is_refused_with_its_line(tmp_path):
    path = text_file(tmp_path / "a.jsonl", LINES + CONVERSATIONS["a.jsonl"])
    with pytest.raises(UserError, match="line 41: a conversation, not text"):
        open_dataset(path)


def test_conversations_in_parquet_belong_elsewhere_too(tmp_path, capsys):
    path = table_file(tmp_path / "mine" / "a.parquet", ("messages", pa.array([TALK] * 30)))
    with pytest.raises(UserError, match="a.parquet holds a conversation.*--custom"):
        open_dataset(path)
    split_folder(path.parent, b=words(30))
    assert len(both_splits(path.parent)) == 30
    assert "skipped " in capsys.readouterr().out


def test_a_name_that_is_not_utf8_is_read_and_shown(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"other.txt"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"some\ntext\n")
    pairs = sum(names_of(folder).values(), [])
    assert {name for name, _ in pairs} == {"caf\ufffd.txt", "other.txt"}
    assert data_tag(folder).startswith("notes-")


@pytest.mark.parametrize("data", ["~/notes.txt", "~nobody_of_that_name/notes.txt"])
def test_a_home_that_nobody_knows_is_one_line(tmp_path, monkeypatch, data):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and passwd
    for read in (open_dataset, CustomJSON):
        with pytest.raises(UserError, match="home folder is not known.*write the whole path"):
            read(data)


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_file(Path("~draft.txt"), "some\ntext\n")
    assert "".join(both_splits("~draft.txt")) == "some\ntext\n"


# ----------------------------------------------------------------------------------------------
# what is found during training

TRAIN_UNCHECKED = """
import runpy, sys
from nanochat import dataset
dataset.CHECKED_BYTES = 0  # as if the files were large
sys.argv[0] = "scripts.base_train"
runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)
"""


def test_a_row_that_is_not_utf8_ends_training_with_one_line_that_names_it(tmp_path, stages):
    texts = [f"The cat number {i} sees the dog. " * 40 for i in range(40)]
    path = table_file(tmp_path / "a.parquet", ("text", undecodable(texts)), row_group_size=5)
    _, err = stages.run(
        f"--data={path}", *TINY, "--num_iterations=200", "--model=gpt", "--eval_every=0",
        launcher=("-c", TRAIN_UNCHECKED), status=2)
    assert "Traceback" not in err
    lines = [line for line in err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1 and re.search("a.parquet, row group 1, row 2 .*not UTF-8", lines[0])


# ----------------------------------------------------------------------------------------------
# the vocabulary

def train_tokenizer(run_module, base, data, *options):
    run = run_module("scripts.tok_train", f"--data={data}", *options, base=base)
    assert run.returncode == 0, run.stderr
    return last_json(run.stdout), run.stdout


def test_a_few_long_documents_give_a_vocabulary_of_their_size(tmp_path, base, run_module):
    paths = [path for _, _, path in python_files(("stdlib",))[:60]]
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    text = text.encode("ascii", "ignore").decode()
    lines = [json.dumps({"text": text[i:i + 50_000]}) + "\n" for i in (0, 50_000, 100_000)]
    books = text_file(tmp_path / "a.jsonl", "".join(lines))
    record, _ = train_tokenizer(run_module, base, books)
    assert record["vocab_size"] == sum(map(len, iter_documents("train", books))) // 96 > 1000
    record, _ = train_tokenizer(run_module, base, books, "--doc_cap=10000")
    assert record["vocab_size"] == 512, "a cap that the user gives stands"


def test_a_text_that_repeats_itself_gives_the_vocabulary_that_it_yields(tmp_path, base, run_module):
    path = text_file(tmp_path / "a.txt", "the same line again\n" * 30_000)
    record, said = train_tokenizer(run_module, base, path)
    assert 268 <= record["vocab_size"] < 512
    assert f"it yields {record['vocab_size']} tokens" in said


# ----------------------------------------------------------------------------------------------
# docs/data.md

DATA_PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\*\*`([^`]+)`\*\*(.*?)^```(\w+)\n(.*?)^```", DATA_PAGE, re.M | re.S)


def test_the_page_names_the_stages_of_the_speedrun_that_get_the_text():
    [row] = [row for row in DATA_PAGE.split("\n") if "| `DATA=` |" in row]
    handed, _, found = row.rpartition("|")[0].partition(";")
    script = (ROOT / "speedrun.sh").read_text(encoding="utf-8")
    stages = set(re.findall(r"stage (\w+) [^\n]*--data=\$DATA", script))
    assert set(re.findall(r"`(\w+)`", handed)) == stages and stages
    assert "chat stages find it through the base model" in found


def make_example(name, language, body):
    """Make one example of docs/data.md in the current folder."""
    if language == "python":
        exec(compile(body, name, "exec"), {})
    else:
        text_file(Path(name), body)


@pytest.mark.parametrize("name, prose, language, body", EXAMPLES, ids=[row[0] for row in EXAMPLES])
def test_the_examples_of_docs_data_are_read(tmp_path, monkeypatch, name, prose, language, body):
    monkeypatch.chdir(tmp_path)
    make_example(name, language, body)
    assert Path(name).exists()
    command = re.search(rf"python -m (\S+) --(\w+)={name}", " ".join(prose.split()))
    module, setting = command.groups()
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert re.search(rf"^{setting}: str = None", source, re.M), f"{module} has that setting"
    if setting == "custom":
        assert len(CustomJSON(name)) == 2
        return
    splits = [list(iter_documents(split, name)) for split in ("train", "val")]
    assert all(splits) and not set(splits[0]) & set(splits[1])


def test_docs_data_names_every_stage_that_reads_a_path():
    stages = re.findall(r"^\| `python -m scripts\.(\w+)` \| `--(?:data|custom)`", DATA_PAGE, re.M)
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("scripts/*.py")}
    reading = re.compile(r"^(?:data|custom): str", re.M)
    assert sorted(stages) == sorted(name for name, text in scripts.items() if reading.search(text))


def test_docs_data_shows_every_suffix():
    suffixes = (*READERS, *COMPRESSED, ".parquet")
    assert not [suffix for suffix in suffixes if f"{suffix}`" not in DATA_PAGE]
    assert {name for name, *_ in EXAMPLES} >= {"my.txt", "corpus.jsonl", "clone/", "mine.jsonl"}


def test_a_stage_reads_an_example_of_docs_data(tmp_path, monkeypatch, base, run_module):
    monkeypatch.chdir(tmp_path)
    for name, _, language, body in EXAMPLES:
        if name == "clone/":
            make_example(name, language, body)
    record, said = train_tokenizer(run_module, base, tmp_path / "clone")
    assert record["vocab_size"] > 268 and "35 documents" in said
