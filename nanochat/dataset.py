"""Read the text to train on: parquet files or the user's own files, as documents of two splits.

    dataset = open_dataset("notes/")            # resolves the path and checks every file, once
    for text in dataset.documents("train"):
        ...

Whatever the text's origin, the stages see one thing: a list of parquet files with a column `text`,
one document per row. The last file is the validation split and never trains anything. For the
files that nanochat makes, the list is pinned in `index.json` beside them, so that a file that went
missing is an error and not another choice of validation. The user's own text (`--data=notes/`,
`--data=my.txt`) is converted to the same form on first use, in `$NANOCHAT_BASE_DIR/user_data`.

The command that makes text is in nanochat/sources.py:

    python -m nanochat.dataset                  # text that is on this machine already
    python -m nanochat.dataset -n 240           # 240 training shards of FineWeb-Edu
"""
import hashlib
import json
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import (
    UserError,
    atomic_file,
    atomic_write,
    fraction,
    get_base_dir,
    print0,
    sha256,
)

DOCUMENT_CHARS = 6_000      # longer files are split into documents of at most this
SHARD_CHARS = 12_000_000    # a shard that we write is closed once it exceeds this
ROWS_PER_GROUP = 64         # small, so that every shard has several row groups
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


# ----------------------------------------------------------------------------------------------
# reading

class Dataset(NamedTuple):
    """The text behind one data path, resolved and checked.

    paths: the parquet files; the last one is the validation split.
    train_groups, val_groups: (path, row group index) pairs in the order in which they are read.
    A row group is the unit that is read from a parquet file at a time.
    """

    paths: list
    train_groups: list
    val_groups: list

    def groups(self, split):
        """The row groups of "train" or "val", a list; UserError for any other split."""
        if split == "train":
            return self.train_groups
        if split == "val":
            return self.val_groups
        raise UserError(f"split is train or val, not {split!r}")

    def documents(self, split, rank=0, world_size=1):
        """One pass over the documents of a split, in order: yields str, none of them empty.

        The documents are divided by rows: rank r of n gets the rows r, r + n, ... of the split. If
        they were divided by row groups, a split with fewer groups than ranks would leave a rank
        with nothing to read, and the other ranks waiting for it.
        """
        row = 0
        for path, index in self.groups(split):
            for text in read_row_group(path, index):
                if text and row % world_size == rank:
                    yield text
                row += 1


def open_dataset(data=None):
    """Resolve a data path, check every file behind it, and return a Dataset.

    data: None for `$NANOCHAT_BASE_DIR/base_data`; a folder of parquet files, read in place; a file
    or folder of .txt, .md, .jsonl and .parquet, converted on first use; or a Dataset, which is
    returned as it is, so that one run checks its files once and passes the Dataset on.
    UserError where there is nothing to read, a file is damaged, or a pinned file is missing.
    """
    if isinstance(data, Dataset):
        return data

    # 1) the folder of parquet files, and their names in order
    folder = _resolve(data)
    names = _shard_names(folder)
    if len(names) < 2:
        raise UserError(
            f"{folder} needs two parquet files at least, one to train on and one for validation"
        )

    # 2) every file is opened once: is it whole, and does it have text?
    paths = [folder / name for name in names]
    checked = [_check_parquet(path) for path in paths]
    documents = [rows for rows, _ in checked]
    if not sum(documents[:-1]) or not documents[-1]:
        raise UserError(
            f"{folder} has no documents to train on, or none in {names[-1]}, its validation file"
        )

    # 3) the row groups of all files, of which the last file's are validation
    groups = [
        (path, index)
        for path, (_, row_groups) in zip(paths, checked)
        for index in range(row_groups)
    ]
    _, val_count = checked[-1]
    return Dataset(paths, train_groups=groups[:-val_count], val_groups=groups[-val_count:])


def iter_documents(split, data=None, rank=0, world_size=1):
    """One pass over the documents of "train" or "val": open_dataset(data).documents(split, ...)."""
    yield from open_dataset(data).documents(split, rank, world_size)


def parquet_paths(data=None):
    """The parquet files of a data path, at least two of them; the last is validation."""
    return open_dataset(data).paths


def iter_row_groups(paths):
    """Yield every (path, row group index) of the files in order; each file starts at group 0."""
    for path in paths:
        with pq.ParquetFile(path) as parquet:
            count = parquet.num_row_groups
        for index in range(count):
            yield path, index


def read_row_group(path, index):
    """The documents of one row group, a list of str; a missing text (null) becomes ""."""
    with pq.ParquetFile(path) as parquet:
        column = parquet.read_row_group(index, columns=["text"])["text"]
    return [text or "" for text in column.to_pylist()]


def _resolve(data):
    """The folder of parquet files for a data path (see open_dataset); converts the user's files."""
    if data is None:
        folder = get_base_dir() / "base_data"
        is_there = any(folder.glob("*.parquet")) or (folder / "index.json").exists()
        if not is_there:
            raise UserError(
                f"no text in {folder}: run python -m nanochat.dataset first, or give --data=PATH"
            )
        return folder

    if not str(data).strip():
        raise UserError("the data path is empty: name a file or a folder")
    path = Path(data).expanduser().absolute()
    if not path.exists():
        raise UserError(
            f"data path {data} does not exist: "
            "name a file or a folder of .txt, .md, .jsonl or .parquet"
        )
    if (path / "index.json").exists():
        return path

    # A folder of several parquet files and nothing else is read in place. A single parquet file
    # has no second file for validation, so it is converted like text.
    files, skipped = _user_files(path)
    shards = [
        file for file in files
        if file.suffix.lower() == ".parquet" and file.parent == path
    ]
    if len(files) > 1 and len(shards) == len(files):
        return path
    return _convert(path, files, skipped)


def _shard_names(folder):
    """The names of a folder's parquet files: as pinned in its index.json, or else sorted."""
    index = folder / "index.json"
    if not index.exists():
        return sorted(path.name for path in folder.glob("*.parquet"))

    try:
        pinned = json.loads(index.read_text(encoding="utf-8"))
        names = [*pinned["files"], pinned["validation"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} is damaged: delete it and run the same python -m nanochat.dataset again"
        ) from error

    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} files are missing in {folder}, {missing[0]} first: "
            "run the same python -m nanochat.dataset again, it fetches only those"
        )
    return names


def _check_parquet(path):
    """(number of rows, number of row groups) of a parquet file with a text column of strings.

    UserError where the file is damaged or has no such column.
    """
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not a whole parquet file: delete it and make it again"
        ) from error

    with parquet:
        schema = parquet.schema_arrow
        kind = schema.field("text").type if "text" in schema.names else pa.null()
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not is_text:
            raise UserError(
                f"{path} has no column 'text' of strings, only {schema.names}: "
                "rename the one that holds the text"
            )
        return parquet.metadata.num_rows, parquet.num_row_groups


# ----------------------------------------------------------------------------------------------
# writing shards

def split_document(text, limit=DOCUMENT_CHARS):
    """Cut `text` into pieces of at most `limit` characters; joined, the pieces are the text again.

    Each cut is the best break in the last two thirds of a piece: two blank lines (between top-level
    definitions), else one blank line, else a line's end, else anywhere.

    >>> split_document("one\\ntwo\\n\\nthree", 10)
    ['one\\ntwo\\n\\n', 'three']
    """
    pieces = []
    while len(text) > limit:
        cut = _best_cut(text, limit)
        pieces.append(text[:cut])
        text = text[cut:]
    pieces.append(text)
    return pieces


def _best_cut(text, limit):
    """Where to cut a text that is longer than `limit`, at most `limit` characters in."""
    earliest = limit // 3
    for mark in ("\n\n\n", "\n\n", "\n"):
        cut = text.rfind(mark, earliest, limit) + len(mark)
        if cut > earliest:
            return cut
    return limit


def write_shards(folder, prefix, train, validation, **fields):
    """Write documents as parquet shards with their index.json.

    train, validation: lists of str; the validation documents become the last shard.
    fields: further entries of the index.

    The index is written first, without hashes, and completed last: the shards of an interrupted
    build are reported as missing and never taken for whole.
    """
    shards = [*_divide(train), validation]
    names = [f"{prefix}_{i:05d}.parquet" for i in range(len(shards))]
    index = {**fields, "files": names[:-1], "validation": names[-1]}

    # shards of an earlier build must not be taken for this one's
    for name in names:
        (folder / name).unlink(missing_ok=True)
    atomic_write(folder / "index.json", json.dumps(index, indent=1))

    for name, documents in zip(names, shards):
        _write_parquet(folder / name, documents)

    index["sha256"] = {name: sha256(folder / name) for name in names}
    atomic_write(folder / "index.json", json.dumps(index, indent=1))


def _divide(documents):
    """Lists of documents, one per shard; a shard is closed once it exceeds SHARD_CHARS."""
    shards = [[]]
    chars = 0
    for text in documents:
        if chars > SHARD_CHARS:
            shards.append([])
            chars = 0
        shards[-1].append(text)
        chars += len(text)
    return shards


def _write_parquet(path, documents):
    """Write documents as one parquet file, whole or not at all."""
    table = pa.table({"text": pa.array(documents, pa.string())})
    with atomic_file(path) as file:
        pq.write_table(table, file, row_group_size=ROWS_PER_GROUP, compression="zstd")


# ----------------------------------------------------------------------------------------------
# the user's own text

def _user_files(path):
    """(files that we can read, number of files that we cannot) at a file or below a folder.

    Hidden files, and files in hidden folders, do not count.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert or rename it")
        return [path], 0

    def is_visible_file(file):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        return file.is_file() and not hidden

    every = [file for file in sorted(path.rglob("*")) if is_visible_file(file)]
    files = [file for file in every if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} files")
    return files, len(every) - len(files)


def _read_user_file(path):
    """The documents of one of the user's files, a list of str."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _check_parquet(path)
        return [text for group in iter_row_groups([path]) for text in read_row_group(*group)]

    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before the text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): "
            "convert it, as in iconv -f latin1 -t utf-8"
        ) from error
    if suffix != ".jsonl":
        return split_document(text)

    # not splitlines(): it also breaks at U+2028 inside a string
    lines = enumerate(text.split("\n"), start=1)
    return [_read_json_line(path, number, line) for number, line in lines if line.strip()]


def _read_json_line(path, number, line):
    """The text of one line {"text": "..."} of a .jsonl file; UserError for any other line."""
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")  # an escaped lone surrogate is a str that no tokenizer can take
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{path}, line {number}: not an object of the form {{"text": "..."}} in valid Unicode'
        ) from error
    return text


def split_validation(documents, share=0.05):
    """(training documents, validation documents): validation is the last `share` of the characters.

    Neither part is empty. Whole documents are divided where there are enough of them; of fewer than
    20 documents, the one at the border is cut at a line's end.
    """
    # the document at the border, and how many of its characters belong to training
    train_chars = int((1 - share) * sum(map(len, documents)))
    for border, text in enumerate(documents):
        if train_chars < len(text):
            break
        train_chars -= len(text)

    keep_whole = len(documents) >= 20 or train_chars == 0
    if border > 0 and keep_whole:
        return documents[:border], documents[border:]

    cut = text.find("\n", train_chars) + 1
    if not 0 < cut < len(text):
        cut = max(1, train_chars)
    train = [*documents[:border], text[:cut]]
    validation = [text[cut:], *documents[border + 1:]]
    return train, validation


def _convert(path, files, skipped):
    """Convert the user's files to shards and return their folder.

    This is done once for the same paths, sizes and modification times. All of the text is held in
    memory. The files of a folder are ordered by a hash of their names, so that the last 5 % are not
    simply the last in the alphabet.
    """
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([1, str(path), stats]).encode()).hexdigest()[:16]
    folder = get_base_dir() / "user_data" / key
    if folder.exists():
        return folder

    # read
    if skipped:
        print0(f"{path}: skipped {skipped} files that are none of {', '.join(SUFFIXES)}")
    shuffled = sorted(files, key=lambda file: fraction(str(file.relative_to(path))))
    documents = [text for file in shuffled for text in _read_user_file(file) if text.strip()]
    if sum(map(len, documents)) < 2:
        raise UserError(f"{path} is empty: there is no text in it to train on")
    train, validation = split_validation(documents)

    # write to a draft, which becomes the folder when it is whole
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
    try:
        write_shards(draft, "shard", train, validation, source=str(path))
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another rank was faster, with the same result
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)

    print0(
        f"{path}: {len(train)} documents to train on, {len(validation)} for validation, in {folder}"
    )
    return folder


if __name__ == "__main__":
    # `python -m nanochat.dataset` is the documented command. It hands over to the file that makes
    # text, which imports this one: an import in the other direction would be a circle.
    runpy.run_module("nanochat.sources", run_name="__main__", alter_sys=True)
