"""Whole sources that training does not read: the choice, the splits, and what stages make of them.
"""
import gzip
import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from nanochat import sources
from nanochat.common import UserError, fraction
from nanochat.convert import convert_by_source
from nanochat.dataset import data_tag, iter_documents, open_dataset
from nanochat.holdout import choose_held_out
from nanochat.loss_eval import protocol_id
from nanochat.shards import read_index, write_shards
from nanochat.sources import build_local, collect_local, package_of
from nanochat.start import check_holdout, known_holdout, read_unseen
from stage_runs import TINY, last_json, meta_of

REAL = os.environ.get("NANOCHAT_TEST_DATA")


# ----------------------------------------------------------------------------------------------
# the choice

@pytest.mark.parametrize("seed", range(20))
def test_some_sources_are_held_out_never_all_and_about_as_much_as_wanted(seed):
    rng = random.Random(seed)
    names = [f"book {number}" for number in range(rng.choice((2, 3, 10, 200)))]
    sizes = {name: int(1 + 1000 * rng.paretovariate(1)) for name in names}
    wanted = 0.05 * sum(sizes.values())
    held_out = choose_held_out(sizes, wanted)
    assert 0 < len(held_out) < len(sizes)
    taken = sum(sizes[name] for name in held_out)
    assert taken <= 1.5 * wanted or held_out == {min(sizes, key=sizes.get)}
    rng.shuffle(names)
    assert choose_held_out({name: sizes[name] for name in names}, wanted) == held_out


def test_of_many_equal_sources_the_share_is_held_out_by_the_hash_of_their_names():
    sizes = dict.fromkeys([f"book {number}" for number in range(200)], 7)
    held_out = choose_held_out(sizes, 0.05 * 1400)
    assert held_out == set(sorted(sizes, key=fraction)[:10])


@pytest.mark.parametrize("sizes", [{}, {"one": 5}])
def test_fewer_than_two_sources_are_refused(sizes):
    with pytest.raises(UserError, match=f"the text has {len(sizes)}: leave it out, or add files"):
        choose_held_out(sizes, 1)


# ----------------------------------------------------------------------------------------------
# the user's text

@pytest.fixture
def books(base_dir, tmp_path):
    """40 files of which each has words of its own, one of them in a folder."""
    return make_books(tmp_path / "books", range(40))


def make_books(folder, numbers):
    (folder / "old").mkdir(parents=True)
    for number in numbers:
        name = f"old/book{number}.txt" if number == 7 else f"book{number}.txt"
        text = f"Of word{number} we read in book {number}, and of no other.\n\n" * 300
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def books_in(dataset, split):
    """The names of the books that a split has documents of, and those that its words tell."""
    names, words = set(), set()
    for name, text in dataset.named_documents(split):
        names.add(name)
        words.add(text.split("book ")[1].split(",")[0])
    return names, words


def test_no_document_of_a_held_out_file_is_in_training(books, capsys):
    dataset = open_dataset(convert_by_source(books))
    train, val = books_in(dataset, "train"), books_in(dataset, "val")
    assert not train[0] & val[0] and not train[1] & val[1]
    assert len(val[1]) in (2, 3) and len(train[1] | val[1]) == 40, "two of forty are 5 %"
    assert dataset.holdout == "source" and not list(dataset.documents("unseen"))
    assert f"held out {len(val[1])} of 40 sources, " in capsys.readouterr().out
    index = read_index(dataset.root / "index.json")
    assert set(index["held_out"]) == val[0] and index["source"] == str(books)


def test_the_choice_is_that_of_any_machine_and_made_once(books, tmp_path):
    folder = convert_by_source(books)
    stamp = (folder / "index.json").stat().st_mtime_ns
    assert convert_by_source(books) == folder
    assert (folder / "index.json").stat().st_mtime_ns == stamp
    others = make_books(tmp_path / "copy" / "books", reversed(range(40)))
    other = convert_by_source(others)
    assert other != folder, "another text, though it says the same"
    for split in ("train", "val"):
        assert list(iter_documents(split, other)) == list(iter_documents(split, folder))
    assert data_tag(folder).startswith("books-") and data_tag(folder) != data_tag(books)


def test_a_split_by_documents_has_another_protocol_even_of_the_same_documents(books):
    by_source = open_dataset(convert_by_source(books))
    by_documents = open_dataset(books)
    assert by_documents.holdout == "documents"
    texts = list(by_source.documents("val"))
    names = {protocol_id(texts, dataset.holdout) for dataset in (by_source, by_documents)}
    assert len(names) == 2


def make_shards(folder, rows_of_shards, change=lambda lines: lines):
    """Parquet files of (source, text), and the list of their sources, changed by a function."""
    folder.mkdir()
    lines = []
    for shard, rows in enumerate(rows_of_shards):
        table = pa.table({"text": [text for _, text in rows]})
        pq.write_table(table, folder / f"shard_{shard:05d}.parquet", row_group_size=16)
        lines += [f"{shard}\t{row}\t{source}\n" for row, (source, _) in enumerate(rows)]
    with gzip.open(folder / "sources.txt.gz", "wt", encoding="utf-8") as file:
        file.writelines(change(lines))
    return folder


def mixed_rows():
    """The rows of two shards with 400 documents of 40 novels between them, in no order."""
    rows = [(f"novel {i % 40}", f"page {i} of novel {i % 40}, " * 9) for i in range(400)]
    random.Random(1).shuffle(rows)
    return rows[:250], rows[250:]


def test_a_list_beside_parquet_says_which_source_a_row_is_from(base_dir, tmp_path):
    rows = mixed_rows()
    dataset = open_dataset(convert_by_source(make_shards(tmp_path / "novels", rows)))
    train, val = (dict(dataset.named_documents(split)) for split in ("train", "val"))
    assert not train.keys() & val.keys() and len(train) + len(val) == 40 and 1 <= len(val) <= 3
    for split in ("train", "val"):
        for name, text in dataset.named_documents(split):
            assert f" of {name}," in text
    every = sorted([*dataset.documents("train"), *dataset.documents("val")])
    assert every == sorted(text for shard in rows for _, text in shard)


def test_without_a_list_every_parquet_file_is_a_source(base_dir, tmp_path):
    folder = make_shards(tmp_path / "novels", [*mixed_rows(), [("a", "alone " * 20)]])
    (folder / "sources.txt.gz").unlink()
    dataset = open_dataset(convert_by_source(folder))
    assert list(dataset.documents("val")) == ["alone " * 20], "the smallest of three"


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:-1], "shard_00001.parquet, row 149 is in no line of the sources"),
    (lambda lines: [lines[0], "novel\n"], "line 2: not the number of a shard, a row and a source"),
    (lambda lines: ["7" + lines[0]], "line 1: not the number of a shard"),
])
def test_a_list_that_leaves_rows_out_or_has_another_form_is_refused(
        base_dir, tmp_path, change, words):
    folder = make_shards(tmp_path / "novels", mixed_rows(), change)
    with pytest.raises(UserError, match=words):
        convert_by_source(folder)
    assert not list((base_dir / "user_data").glob("*")), "nothing half-written may stay"


def test_two_files_of_one_number_are_refused(base_dir, tmp_path):
    folder = make_shards(tmp_path / "novels", mixed_rows())
    shutil.copy(folder / "shard_00000.parquet", folder / "extra_00000.parquet")
    with pytest.raises(UserError, match="are both shard 0"):
        convert_by_source(folder)


def test_what_nanochat_has_made_is_not_divided_again(base_dir, tmp_path):
    folder = convert_by_source(make_shards(tmp_path / "novels", mixed_rows()))
    with pytest.raises(UserError, match="was made by nanochat, and has a split for validation"):
        convert_by_source(folder)


def one_file(folder):
    (folder / "my.txt").write_text("Only this.\n\n" * 99, encoding="utf-8")


def own_split(folder):
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_text(f"A line for {name}.\n" * 99, encoding="utf-8")


def nothing(folder):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(" \n", encoding="utf-8")


@pytest.mark.parametrize("make, words", [
    (one_file, "the text has 1: leave it out, or add files"),
    (own_split, "has a split for validation, valid.txt first: leave --holdout out"),
    (nothing, "is empty"),
])
def test_what_cannot_be_held_out_is_refused(base_dir, tmp_path, make, words):
    folder = tmp_path / "text"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=words):
        convert_by_source(folder)
    assert not list((base_dir / "user_data").glob("*"))


@pytest.mark.parametrize("words, needle", [
    (["--source=fineweb", "--holdout=source"], "leave --holdout out"),
    (["--source=local", "--holdout=documents"], "--holdout is source, or left out"),
    (["--source=/nowhere", "--holdout=source"], "does not exist"),
    (["--source={books}"], "needs --holdout=source here"),
    (["--source={books}", "--holdout=source", "-n", "3"], "-n is for --source=fineweb"),
])
def test_the_command_refuses_in_one_line(run_module, books, base_dir, words, needle):
    words = [word.format(books=books) for word in words]
    run = run_module("nanochat.dataset", *words, base=base_dir)
    assert run.returncode == 2 and needle in run.stderr
    assert len(run.stderr.strip().split("\n")) == 1


def test_the_command_says_what_the_stages_are_to_read(run_module, books, base_dir):
    run = run_module("nanochat.dataset", f"--source={books}", "--holdout=source", base=base_dir)
    record = last_json(run.stdout)
    assert record["holdout"] == "source" and len(record["held_out"]) in (2, 3)
    assert f"give the stages --data={record['folder']}" in run.stdout
    assert len(list(iter_documents("val", record["folder"]))) > 2


@pytest.mark.skipif(not REAL, reason="NANOCHAT_TEST_DATA is not set")
def test_no_novel_of_the_real_text_is_in_both_splits(base_dir):
    data = Path(REAL) / "text" / "base_data"
    source_of = {}
    texts = [pq.read_table(path)["text"].to_pylist() for path in sorted(data.glob("*.parquet"))]
    with gzip.open(data / "sources.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            shard, row, source = line.rstrip("\n").split("\t")
            source_of.setdefault(texts[int(shard)][int(row)], set()).add(source)

    dataset = open_dataset(convert_by_source(data))
    held_out = set(read_index(dataset.root / "index.json")["held_out"])
    assert any(name.startswith("eltec") for name in held_out)
    val = [source_of[text] for text in dataset.documents("val")]
    train = [source_of[text] for text in dataset.documents("train")]
    assert len(val) + len(train) == sum(map(len, texts))
    assert all(found & held_out for found in val)
    assert not any(found <= held_out for found in train)
    assert 0.03 < len(val) / len(train) < 0.1


# ----------------------------------------------------------------------------------------------
# the local text

@pytest.fixture
def packages(base_dir, tmp_path, monkeypatch):
    """A stand-in for the installed sources: 50 modules, 5 packages of 6, and one large package."""
    names = [f"module{number}.py" for number in range(50)]
    names += [f"package{number % 5}/part{number}.py" for number in range(30)]
    names += [f"large/part{number}.py" for number in range(150)]
    files = []
    for name in names:
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{word_of(name)} = {word_of(name)}.{word_of(line)}()" for line in range(40)]
        path.write_text("\n".join(lines), encoding="utf-8")
        files.append(("stdlib", name, path))
    monkeypatch.setattr(sources, "python_files", lambda packages: files)
    return files


def word_of(value):
    """Letters alone, others for every value: text with many digits counts as a table."""
    return "".join(random.Random(value).choices("abcdefghijklm", k=12))


def packages_in(documents):
    return {package_of(text.split("\n")[0].removeprefix("# ")) for text in documents}


def test_a_held_out_package_is_in_one_split_alone(packages):
    found = collect_local()
    read, unseen = packages_in(found.train + found.validation), packages_in(found.unseen)
    assert unseen == set(found.held_out) and unseen and not unseen & read
    assert "large" in read, "it is most of the text"
    bytes_of = {name: sum(map(len, getattr(found, name))) for name in ("train", "unseen")}
    assert 0.01 < bytes_of["unseen"] / bytes_of["train"] < 0.05


def test_validation_stays_as_it_is_without_held_out_packages(packages, monkeypatch):
    found = collect_local()
    monkeypatch.setattr(sources, "held_out_packages", lambda files, by_source: set())
    without = collect_local()
    assert without.validation == found.validation and found.validation
    assert sorted(without.train) == sorted(found.train + found.unseen)


def test_by_source_validation_is_of_whole_packages_and_nothing_else(packages):
    found = collect_local(by_source=True)
    assert packages_in(found.validation) == set(found.held_out)
    assert not packages_in(found.train) & set(found.held_out) and not found.unseen
    assert len(packages_in(found.train)) + len(found.held_out) == 56


@pytest.mark.parametrize("by_source", [False, True])
def test_the_order_of_files_changes_nothing(packages, by_source):
    found = collect_local(by_source=by_source)
    packages.reverse()
    again = collect_local(by_source=by_source)
    assert again == found


def test_the_split_is_recorded_and_another_is_built_when_it_is_asked_for(packages, base_dir):
    index = build_local()
    assert open_dataset().holdout == index["holdout"] == "documents"
    unseen, protocol = read_unseen(open_dataset())
    assert packages_in(unseen) == set(index["held_out"])
    assert protocol == protocol_id(unseen, "source")
    (base_dir / "base_data" / index["unseen"]).unlink()
    with pytest.raises(UserError, match="1 of 3 files are missing"):
        open_dataset()

    index = build_local(by_source=True)
    assert open_dataset().holdout == index["holdout"] == "source"
    assert read_unseen(open_dataset()) == ([], None)
    assert packages_in(iter_documents("val")) == set(index["held_out"])
    assert build_local()["holdout"] == "documents"


# ----------------------------------------------------------------------------------------------
# the stages

TRAIN = ("scripts.base_train", *TINY, "--num_iterations=8", "--ngram_tokens=100000")


def write_text(base, holdout):
    """Sentences as nanochat's own text, split by documents, with unseen ones, or by source."""
    folder = base / "base_data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    read = [f"The small fox finds the river number {i}. " * 20 for i in range(60)]
    others = [f"Quick horses leave this house by door {i}! " * 20 for i in range(12)]
    if holdout == "source":
        write_shards(folder, "local", read, others, holdout=holdout, held_out=["others"])
    else:
        write_shards(
            folder, "local", read[:-9], read[-9:], others, holdout=holdout, held_out=["others"])
    return others


@pytest.fixture(scope="module")
def by_documents(stages):
    """(texts of the source that was held out, the record of a run that did not read them)."""
    others = write_text(stages.base, "documents")
    return others, stages.fork_record(*TRAIN, "--model_tag=docs")


def test_pretraining_ends_with_the_bits_per_byte_of_unseen_sources(by_documents):
    # docs/traps.md: source-that-was-read
    others, record = by_documents
    unseen = record["unseen"]
    assert unseen["protocol"] == protocol_id(others, "source") and unseen["documents"] == 12
    assert record["protocol"].startswith("bpb1-9-") and record["holdout"] == "documents"
    assert unseen["val_bpb"] > record["val_bpb"] > 0, "it has read sentences like the others"
    assert all(part["val_bpb_without_counts"] > part["val_bpb"] for part in (record, unseen))


def test_the_page_shows_what_is_recorded(stages, by_documents):
    _, record = by_documents
    page = (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8")
    index = read_index(stages.base / "base_data" / "index.json")
    for kind, written in (("unseen", record["unseen"]), ("index", index)):
        [example] = re.findall(rf"^```{kind}\n(.*?)\n```", page, re.M)
        assert set(json.loads(example)) <= set(written), kind


def test_base_loss_measures_the_same_and_refuses_a_model_that_may_have_read_it(
        stages, by_documents, text, trained):
    _, record = by_documents
    found = stages.fork_record("scripts.base_loss", "--model_tag=docs", "--split=unseen")
    assert found["val_bpb"] == pytest.approx(record["unseen"]["val_bpb"], rel=1e-3)
    assert found["val_bpb_without_counts"] == pytest.approx(
        record["unseen"]["val_bpb_without_counts"], rel=1e-3)
    assert found["protocol"] == record["unseen"]["protocol"] and found["split"] == "unseen"
    found = stages.fork_record("scripts.base_loss", "--model_tag=docs")
    assert found["protocol"] == record["protocol"]

    command = ("scripts.base_loss", "--model_tag=d1", "--split=unseen")
    assert "not trained without these sources" in stages.refusal(*command)
    assert "has no split unseen" in stages.refusal(*command, f"--data={text}")


def test_a_model_of_an_earlier_version_was_validated_by_documents():
    dataset = SimpleNamespace(holdout="source")
    meta = {"stage": "base_train", "settings": {"data": None}}
    with pytest.raises(UserError, match="validation by documents, which is now by source"):
        check_holdout(dataset, None, meta)
    check_holdout(dataset, None, {**meta, "stage": "chat_sft"})     # which does not say
    check_holdout(dataset, None, {**meta, "holdout": "source"})


def test_the_other_split_of_a_text_of_yours_is_recognised_by_its_source(books):
    folder = convert_by_source(books)
    by_source, by_documents = open_dataset(folder), open_dataset(books)
    for trained, then, dataset, data in (
        (folder, "source", by_documents, books),
        (books, "documents", by_source, folder),
    ):
        meta = {"stage": "base_train", "holdout": then, "settings": {"data": str(trained)}}
        with pytest.raises(UserError, match=re.escape(f"give --data={trained}, or train another")):
            check_holdout(dataset, data, meta)
        other = {**meta, "settings": {"data": str(books / "old")}}
        check_holdout(dataset, data, other)


def test_only_what_is_known_to_be_unread_has_the_protocol_of_unread_sources():
    dataset = SimpleNamespace(holdout="source")
    meta = {"settings": {"data": "books-by-source"}, "holdout": "source"}
    assert known_holdout(dataset, "books-by-source", meta) == "source"
    assert known_holdout(dataset, "books", meta) == "documents"
    assert known_holdout(dataset, "books-by-source", {"settings": {}}) == "documents"
    assert known_holdout(dataset, None, None) == "documents", "a model of others"


def test_another_split_is_neither_resumed_on_nor_measured_on(stages, by_documents):
    write_text(stages.base, "documents")
    stages.fork(*TRAIN, "--model_tag=cut", faults={"4": "interrupt"}, status=130)
    folder = stages.folder("base", "cut")
    assert meta_of(folder, 4)["holdout"] == "documents" and meta_of(folder, 4)["unseen"]
    resume = (*TRAIN, "--model_tag=cut", "--resume")

    write_text(stages.base, "source")
    needle = "validation by documents, which is now by source: run python -m nanochat.dataset"
    assert needle in stages.refusal(*resume)
    assert needle in stages.refusal("scripts.base_loss", "--model_tag=docs")
    record = stages.fork_record(*TRAIN, "--model_tag=by_source")
    assert record["protocol"].startswith("bpb1-source-12-") and record["holdout"] == "source"
    assert record["unseen"] is None

    write_text(stages.base, "documents")
    assert "now by documents: run python -m nanochat.dataset with --holdout=source" in (
        stages.refusal("scripts.base_loss", "--model_tag=by_source"))
    record = stages.fork_record(*resume)
    assert record["steps"] == 8 and record["unseen"]["documents"] == 12


def test_sources_that_a_run_may_have_read_before_are_not_called_unseen(stages, by_documents):
    write_text(stages.base, "documents")
    stages.fork(*TRAIN, "--model_tag=moved", faults={"4": "interrupt"}, status=130)
    index = stages.base / "base_data" / "index.json"
    pinned = json.loads(index.read_text(encoding="utf-8"))
    pinned["unseen"] = pinned["files"][0]
    index.write_text(json.dumps(pinned), encoding="utf-8")
    record = stages.fork_record(*TRAIN, "--model_tag=moved", "--resume")
    assert record["unseen"] is None and record["val_bpb"] > 0
    write_text(stages.base, "documents")
