"""The text to train on: where it comes from, and how the stages read it.

    python -m nanochat.dataset                       # text that is on this machine already: the standard library, numpy, torch
    python -m nanochat.dataset --source=installed    # the same, from all installed packages
    python -m nanochat.dataset -n 240                # 240 training shards of FineWeb-Edu (HF_ENDPOINT names a mirror)

Whatever the source, the stages see one thing: a list of parquet files with a column `text`, one document a row, of which
the last file is validation and never trains anything. For shards that this module makes, the list is pinned in
`index.json` beside them, so that a file that went missing is an error and not another choice of validation. The user's
own text (`--data=notes/`, `--data=my.txt`) is brought into the same form once, under `$NANOCHAT_BASE_DIR/user_data`.
"""
import ast
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import (
    UserError, atomic_file, atomic_write, fraction, get_base_dir, print0, sha256,
)
from nanochat.metrics import finish_stage
from nanochat.configurator import configure

source: str = None  # local, installed or fineweb; None: fineweb where -n is given, else local
shards: int = None  # -n, number of FineWeb-Edu training shards, 1 to 1822; each is about 100 MB
workers = 4         # downloads at a time

DOCUMENT_CHARS = 6_000      # longer files are split into documents of at most this
SHARD_CHARS = 12_000_000    # a shard we write
ROWS_PER_GROUP = 64         # small, so that every shard has several row groups
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


# ---------------------------------------------------------------------------------------------------------------------
# reading

def parquet_paths(data=None):
    """The parquet files to train on, a list of at least two paths; the last is validation.

    data: None for `$NANOCHAT_BASE_DIR/base_data`; a folder of parquet, read in place; or a file or folder of .txt, .md,
    .jsonl and .parquet, converted on first use. UserError where there is nothing to read, or a pinned file is missing.
    """
    if data is None:
        folder = get_base_dir() / "base_data"
        if not any(folder.glob("*.parquet")) and not (folder / "index.json").exists():
            raise UserError(f"no text in {folder}: run python -m nanochat.dataset first, or give --data=PATH")
        return _folder_paths(folder)
    if not str(data).strip():
        raise UserError("the data path is empty: name a file or a folder")
    path = Path(data).expanduser().absolute()
    if not path.exists():
        raise UserError(f"data path {data} does not exist: name a file or a folder of .txt, .md, .jsonl or .parquet")
    if (path / "index.json").exists():
        return _folder_paths(path)
    files, skipped = _user_files(path)
    if len(files) > 1 and all(file.suffix.lower() == ".parquet" and file.parent == path for file in files):
        return _folder_paths(path)
    return _folder_paths(_convert(path, files, skipped))


def _folder_paths(folder):
    """The files of `folder` as pinned in its index.json, or else sorted by name; checked."""
    index = folder / "index.json"
    if index.exists():
        try:
            pinned = json.loads(index.read_text(encoding="utf-8"))
            names = [*pinned["files"], pinned["validation"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged: delete it and run the same python -m nanochat.dataset again") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise UserError(f"{len(missing)} of {len(names)} files are missing in {folder}, {missing[0]} first: "
                            "run the same python -m nanochat.dataset again, it fetches only those")
    else:
        names = sorted(path.name for path in folder.glob("*.parquet"))
    if len(names) < 2:
        raise UserError(f"{folder} needs two parquet files at least, one to train on and one for validation")
    paths = [folder / name for name in names]
    if not sum(_rows(path) for path in paths[:-1]) or not _rows(paths[-1]):
        raise UserError(f"{folder} has no documents to train on, or none in {names[-1]}, its validation file")
    return paths


def _rows(path):
    """Number of rows of a parquet file that has a text column of strings; UserError where it is no such file."""
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole parquet file: delete it and make it again") from error
    with parquet:
        schema = parquet.schema_arrow
        if "text" not in schema.names or not pa.types.is_string(schema.field("text").type) \
                and not pa.types.is_large_string(schema.field("text").type):
            raise UserError(f"{path} has no column 'text' of strings, only {schema.names}: rename the one that holds the text")
        return parquet.metadata.num_rows


def iter_row_groups(paths):
    """Every (path, row group index) of the files, in order, once; each file starts again at its group 0."""
    for path in paths:
        with pq.ParquetFile(path) as parquet:
            count = parquet.num_row_groups
        for index in range(count):
            yield path, index


def read_row_group(path, index):
    """The documents of one row group, a list of str."""
    with pq.ParquetFile(path) as parquet:
        return [text or "" for text in parquet.read_row_group(index, columns=["text"])["text"].to_pylist()]


def iter_documents(split, data=None, rank=0, world_size=1):
    """Once through the documents of "train" (all files but the last) or "val" (the last), in order.

    Shared out by rows: rank r of n gets the rows r, r + n, ... of the split. By row groups, a split with fewer groups
    than ranks would leave a rank with nothing to read, and the others waiting for it.
    """
    if split not in ("train", "val"):
        raise UserError(f"split is train or val, not {split!r}")
    paths = parquet_paths(data)
    row = 0
    for path, index in iter_row_groups(paths[:-1] if split == "train" else paths[-1:]):
        for text in read_row_group(path, index):
            if row % world_size == rank and text:
                yield text
            row += 1


# ---------------------------------------------------------------------------------------------------------------------
# writing

def split_document(text, limit=DOCUMENT_CHARS):
    """`text` cut into pieces of at most `limit` characters that join to it again, at the best break in each last two thirds.

    Best are two blank lines (between top-level definitions), then one, then a line end, then anywhere.
    >>> split_document("one\\ntwo\\n\\nthree", 10)
    ['one\\ntwo\\n\\n', 'three']
    """
    pieces = []
    while len(text) > limit:
        cuts = (text.rfind(mark, limit // 3, limit) + len(mark) for mark in ("\n\n\n", "\n\n", "\n"))
        cut = next((cut for cut in cuts if limit // 3 < cut), limit)
        pieces.append(text[:cut])
        text = text[cut:]
    return pieces + [text]


def _write_parquet(path, documents):
    with atomic_file(path) as file:
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), file, row_group_size=ROWS_PER_GROUP,
                       compression="zstd")


def _write_shards(folder, prefix, train, validation, **fields):
    """Write documents as shards with their index. The index comes first: shards of a build that broke off are not whole."""
    groups, chars = [[]], 0
    for text in train:
        if chars > SHARD_CHARS:
            groups, chars = groups + [[]], 0
        groups[-1].append(text)
        chars += len(text)
    names = [f"{prefix}_{i:05d}.parquet" for i in range(len(groups) + 1)]
    index = {**fields, "files": names[:-1], "validation": names[-1]}
    for name in names:
        (folder / name).unlink(missing_ok=True)
    atomic_write(folder / "index.json", json.dumps(index, indent=1))
    for name, documents in zip(names, groups + [validation]):
        _write_parquet(folder / name, documents)
    index["sha256"] = {name: sha256(folder / name) for name in names}
    atomic_write(folder / "index.json", json.dumps(index, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# the user's own text

def _user_files(path):
    """(files we can read, number of files we cannot) at a file or below a folder; hidden ones do not count."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert or rename it")
        return [path], 0
    every = [file for file in sorted(path.rglob("*"))
             if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in every if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} files")
    return files, len(every) - len(files)


def _read_user_file(path):
    """The documents of one file of the user's, a list of str."""
    if path.suffix.lower() == ".parquet":
        _rows(path)
        return [text for _, index in iter_row_groups([path]) for text in read_row_group(path, index)]
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before the text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it, as in iconv -f latin1 -t utf-8") from error
    if path.suffix.lower() != ".jsonl":
        return split_document(text)
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): it also breaks at U+2028 inside a string
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
            documents[-1].encode("utf-8")  # an escaped lone surrogate is a str that no tokenizer can take
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{path}, line {number}: not an object of the form {{"text": "..."}} in valid Unicode') from error
    return documents


def split_validation(documents, share=0.05):
    """(training documents, validation documents): the last `share` of the characters, neither part empty.

    Whole documents where there are enough of them; of fewer than 20, the one at the border is cut at a line end.
    """
    left = int((1 - share) * sum(map(len, documents)))  # characters to train on, still to be placed
    for i, text in enumerate(documents):
        if left < len(text):
            break
        left -= len(text)
    if i and (len(documents) >= 20 or not left):
        return documents[:i], documents[i:]
    cut = text.find("\n", left) + 1
    cut = cut if 0 < cut < len(text) else max(1, left)
    return documents[:i] + [text[:cut]], [text[cut:]] + documents[i + 1:]


def _convert(path, files, skipped):
    """Convert the user's files to shards and return their folder; done once for the same paths, sizes and times.

    All of the text is held in memory. Files of a folder are taken in the order of a hash of their names, so that the last
    5 % are not simply the last in the alphabet.
    """
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folder = get_base_dir() / "user_data" / hashlib.sha256(json.dumps([1, str(path), stats]).encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    if skipped:
        print0(f"{path}: skipped {skipped} files that are none of {', '.join(SUFFIXES)}")
    files.sort(key=lambda file: fraction(str(file.relative_to(path))))
    documents = [text for file in files for text in _read_user_file(file) if text.strip()]
    if sum(map(len, documents)) < 2:
        raise UserError(f"{path} is empty: there is no text in it to train on")
    train, validation = split_validation(documents)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
    try:
        _write_shards(draft, "shard", train, validation, source=str(path))
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another rank was faster, with the same result
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print0(f"{path}: {len(train)} documents to train on, {len(validation)} for validation, in {folder}")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# text that every machine has
#
# A machine that has our dependencies has 60 MB of well-edited text: the sources of the standard library, of numpy and of
# torch, a third of it English (docstrings and comments). It makes a model that knows a little about Python, which is
# a better companion than one that has seen a thousandth of the web.

VALIDATION_SHARE = 0.04     # of the files; about 500 documents
SKIPPED_FOLDERS = frozenset(("test", "tests", "idle_test", "testing", "_vendor", "site-packages", "dist-packages", "__pycache__"))


def python_files(packages=("stdlib", "numpy", "torch")):
    """[(origin, name, path)] of the Python sources of the standard library and of packages, tests left out, sorted.

    packages: "stdlib", names of installed packages, or "installed" for all of those. No package is imported.
    >>> python_files()[0][:2]
    ('stdlib', '__future__.py')
    """
    roots = []
    for package in packages:
        if package == "stdlib":
            roots.append((package, Path(sysconfig.get_path("stdlib")), ""))
        elif package == "installed":
            roots += [(package, Path(folder), "") for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
        elif spec := importlib.util.find_spec(package):
            roots.append((package, Path(spec.submodule_search_locations[0]), package + "/"))
    found = []
    for origin, root, prefix in roots:
        relative = (path.relative_to(root) for path in root.rglob("*.py"))
        found += sorted((origin, prefix + part.as_posix(), root / part) for part in relative
                        if not SKIPPED_FOLDERS & set(part.parts))
    return found


def _documents_of(name, path):
    """The documents of one Python source, each headed by its name; [] for one that is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    if name == "pydoc_data/topics.py":  # Python's language reference, as one dictionary of pages
        pages = ast.literal_eval(text[text.index("{"):]).items()
        return [f"# {title}\n{piece.strip()}\n" for title, page in pages for piece in split_document(page)]
    pieces = split_document(text, DOCUMENT_CHARS - len(name) - 4)
    return [f"# {name}\n{piece.strip(chr(10))}\n" for piece in pieces]


def _is_prose_or_code(text):
    """False for tables of numbers and escapes (character sets, tuned constants): over 8 % digits or under 55 % letters and
    spaces; and for files with hardly a line in them."""
    digits = sum(map(text.count, "0123456789"))
    words = sum(map(str.isalpha, text)) + text.count(" ") + text.count("\n")
    return len(text) > 100 and digits < 0.08 * len(text) and words > 0.55 * len(text)


class Seen:
    """Finds near-duplicates: a document is one when over half of its text lies in lines seen before."""

    def __init__(self):
        self.lines = set()

    def repeats(self, text):
        rows = [(zlib.crc32(line.encode()), len(line)) for line in map(str.strip, text.split("\n")) if len(line) >= 20]
        old = sum(size for key, size in rows if key in self.lines)
        if 2 * old > sum(size for _, size in rows):
            return True
        self.lines.update(key for key, _ in rows)
        return False


def collect_local(packages=("stdlib", "numpy", "torch")):
    """(training, validation) documents of installed sources, the same on every call, and a table of what each origin gave.

    A file belongs to validation by the hash of its name, so that no file is in both. Validation is looked through first,
    and what repeats it is dropped from training. Documents are ordered by a hash, so that any beginning of the training
    text is a fair sample of it: a run on a small machine sees little more.
    """
    files = sorted(python_files(packages), key=lambda file: fraction(file[1]))
    seen, train, validation, table = Seen(), [], [], {}
    for number, (origin, name, path) in enumerate(files):
        if number % 1000 == 0:
            print0(f"reading sources: {number} of {len(files)} files")
        held_out = fraction(name) < VALIDATION_SHARE
        row = table.setdefault(origin, {"documents": 0, "mb": 0.0, "dropped": 0})
        for i, text in enumerate(_documents_of(name, path)):
            if not _is_prose_or_code(text) or seen.repeats(text):
                row["dropped"] += 1
                continue
            row["documents"] += 1
            row["mb"] += len(text) / 1e6
            (validation if held_out else train).append((fraction(f"{name}:{i}"), text))
    for row in table.values():
        row["mb"] = round(row["mb"], 2)
    return [text for _, text in sorted(train)], [text for _, text in sorted(validation)], table


def build_local(name="local"):
    """Build the shards of `local` or `installed` text, unless those of the same versions are there. Returns index fields."""
    folder = get_base_dir() / "base_data"
    folder.mkdir(exist_ok=True)
    packages = ("stdlib", "numpy", "torch") if name == "local" else ("stdlib", "installed")
    files = python_files(packages)
    key = hashlib.sha256(json.dumps([3, [(n, path.stat().st_size) for _, n, path in files]]).encode()).hexdigest()[:16]
    index = folder / "index.json"
    try:
        old = json.loads(index.read_text(encoding="utf-8"))
        if old["key"] == key and all(sha256(folder / file) == digest for file, digest in old["sha256"].items()):
            print0(f"{folder} is up to date")
            return old
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # nothing there, or nothing whole
    train, validation, table = collect_local(packages)
    print0(f"writing {len(train)} documents to train on, {len(validation)} for validation to {folder}")
    _write_shards(folder, name, train, validation, source=name, key=key, origins=table,
                  documents=[len(train), len(validation)])
    return json.loads(index.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb-Edu

REPOSITORY = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822           # always fetched: it is validation
BACKOFF_SECONDS = 1.0       # before the second attempt, then doubled
ATTEMPTS = 5


def _fetch(url, part, stop):
    """One attempt to bring `url` to the file `part`, continuing what is there; OSError (requests' are) where it failed."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
        if reply.status_code == 416:  # nothing after what we have, which was not accepted: start again
            part.unlink()
        reply.raise_for_status()
        resumed = reply.status_code == 206
        length = reply.headers.get("Content-Range", "").rpartition("/")[2] if resumed else reply.headers.get("Content-Length")
        with open(part, "ab" if resumed else "wb") as file:
            for block in reply.iter_content(1 << 16):
                file.write(block)
                if stop.is_set():
                    raise requests.RequestException("interrupted")
        tags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in (*reply.history, reply)]
    if length and part.stat().st_size < int(length):
        raise requests.RequestException(f"{part.stat().st_size} bytes of {length} came")  # the next attempt continues
    wanted = next((tag for tag in tags if len(tag) == 64), None)  # the hub's tag of a large file is its sha256
    try:
        if length and part.stat().st_size != int(length) or wanted and sha256(part) != wanted:
            raise requests.RequestException("length or hash is wrong")
        pq.read_metadata(part)
    except (requests.RequestException, pa.ArrowInvalid) as error:
        part.unlink()  # not worth continuing
        raise requests.RequestException(f"the file is damaged: {error}") from error


def download(url, path, stop):
    """Fetch `url` to `path` with retries: None, or a line that says why not. `stop`: a threading.Event that ends it early."""
    import requests
    part = path.with_name(path.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            _fetch(url, part, stop)
            os.replace(part, path)
            return None
        except requests.RequestException as error:
            reason = str(error)
            status = getattr(error.response, "status_code", None)
        if stop.is_set() or status in (401, 403, 404):  # another attempt would get the same
            break
        stop.wait(BACKOFF_SECONDS * 2**attempt)
    return reason


def download_fineweb(shards, workers=4):
    """Fetch the first `shards` training shards and the validation shard; returns {name: why} of those still missing."""
    if not 1 <= shards <= LAST_SHARD:
        raise UserError(f"-n takes 1 to {LAST_SHARD} shards, not {shards}")
    if workers < 1:
        raise UserError(f"--workers takes 1 or more, not {workers}")
    folder = get_base_dir() / "base_data"
    folder.mkdir(exist_ok=True)
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), LAST_SHARD)]
    index = json.dumps({"source": "fineweb", "files": names[:-1], "validation": names[-1]}, indent=1)
    todo = [name for name in names if not (folder / name).exists()]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    failed, stop = {}, threading.Event()

    def fetch(name):
        why = download(f"{endpoint}/datasets/{REPOSITORY}/resolve/main/{name}", folder / name, stop)
        if why:
            failed[name] = why
        else:
            atomic_write(folder / "index.json", index)  # from the first shard on this is what the folder holds
        left = sum(not (folder / n).exists() for n in todo)
        print0(f"{name} {'failed: ' + why if why else 'done'}, {len(todo) - left} of {len(todo)}")

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(fetch, todo))
        except BaseException:  # Ctrl+C, a full disk: the other threads end at their next block
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if not todo:
        atomic_write(folder / "index.json", index)
    return failed


def main():
    settings = configure(globals(), aliases={"n": "shards"})
    start = time.time()
    kind = source or ("fineweb" if shards is not None else "local")
    if kind in ("local", "installed"):
        if shards is not None:
            raise UserError(f"-n is for --source=fineweb: {kind} text is always taken whole")
        index = build_local(kind)
        fields = {"origins": index["origins"], "documents": index["documents"]}
    elif kind == "fineweb":
        missing = download_fineweb(240 if shards is None else shards, workers)
        if missing:
            print(f"error: {len(missing)} shards are missing, the same command again fetches only those: "
                  + ", ".join(sorted(missing)), file=sys.stderr)
            raise SystemExit(1)
        fields = {}
    else:
        raise UserError(f"--source is local, installed or fineweb, not {kind!r}")
    finish_stage("dataset", time.time() - start, settings, source=kind, files=len(parquet_paths()), **fields)


if __name__ == "__main__":
    main()
