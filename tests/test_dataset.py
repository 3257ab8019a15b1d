"""Where text comes from: the user's files, the sources here, shards from a (loopback) server."""
import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, sources
from nanochat.common import UserError
from nanochat.dataset import (
    SHARD_CHARS,
    iter_documents,
    iter_row_groups,
    open_dataset,
    parquet_paths,
    read_row_group,
    split_document,
    split_validation,
    write_shards,
)
from nanochat.sources import Seen, build_local, collect_local, download_fineweb, python_files


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
    (lambda d: text_file(d / "a.txt", b"caf\xe9 au lait"), "not UTF-8 .byte 3"),
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
    "a\n",
    "one line only",
    "two\nlines",
    "\n".join(map(str, range(50))),
])
def test_even_a_tiny_file_is_split(tmp_path, text):
    path = tmp_path / "my.txt"
    path.write_text(text, encoding="utf-8")
    train, val = list(iter_documents("train", path)), list(iter_documents("val", path))
    assert "".join(train + val) == text and train and val


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


def test_split_validation_takes_whole_documents_where_it_can():
    documents = [f"{i:02d}" for i in range(40)]
    assert split_validation(documents) == (documents[:38], documents[38:])
    train, val = split_validation(["short"] * 30 + ["long" * 1000])
    assert train == ["short"] * 30 and val == ["long" * 1000]


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
    train, validation, table = collect_local()
    assert (train, validation, table) == collect_local()
    documents = train + validation
    assert train and validation and all(len(text) <= 6000 for text in documents)
    heads = [{text.split("\n")[0] for text in part} for part in (train, validation)]
    assert not heads[0] & heads[1], "a file belongs to one side"
    assert "# table.py" not in heads[0] | heads[1] and "# latin.py" not in heads[0] | heads[1]
    assert len({"# m0.py", "# copy.py"} & (heads[0] | heads[1])) == 1
    assert table["stdlib"]["documents"] == len(documents)


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
        patch.setattr(dataset, "_write_parquet", full)
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
    monkeypatch.setattr(sources, "BACKOFF_SECONDS", 0.001)
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
    assert digest(collect_local()) == "e312f272cf7d0253"
    index = build_local()
    assert index["key"] == "7dbb6bfe194a51bc" and digest(sorted(index)) == "e004404a10cf5ce3"
    assert digest([*iter_documents("train")]) == "e3ae23c8cbb61aac"
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
