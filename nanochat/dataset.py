"""Read the text to train on: parquet files or the user's own files, as documents of two splits.

    dataset = open_dataset("notes/")            # resolves the path and checks every file, once
    for text in dataset.documents("train"):
        ...

Whatever the text's origin, the stages see one thing: row groups of parquet files with a column
`text`, one document per row, for training and for validation. docs/data.md shows what is read.

- The files that nanochat makes are pinned in `index.json` beside them, so that a file that went
  missing is an error and not another choice of validation. The last file is validation.
- The user's parquet files are read in place: the split that a file's name tells, else the last
  file, else the last rows are validation.
- The user's other files (`--data=notes/`, `--data=my.txt`) are converted to pinned parquet files
  on first use, in `$NANOCHAT_BASE_DIR/user_data`.

The command that makes text is in nanochat/sources.py:

    python -m nanochat.dataset                  # text that is on this machine already
    python -m nanochat.dataset -n 240           # 240 training shards of FineWeb-Edu
"""
import hashlib
import json
import os
import re
import runpy
import shutil
import tempfile
import time
import unicodedata
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import (
    UserError,
    atomic_file,
    atomic_write,
    expand_home,
    fraction,
    get_base_dir,
    print0,
    sha256,
)
from nanochat.conversation import is_like_a_conversation
from nanochat.textfiles import (
    COMPRESSED,
    CONVERSATION,
    DOCUMENT_CHARS,  # noqa: F401  (where they were before)
    NOTES,
    READERS,
    NoText,
    check_not_a_pointer,
    conversion_of,
    find_encoding,
    holds_text,
    read_text_file,
    split_document,  # noqa: F401
    text_key,
    text_suffix,
)

SHARD_CHARS = 12_000_000    # a shard that we write is closed once it exceeds this
ROWS_PER_GROUP = 64         # small, so that every shard has several row groups
GROUP_CHARS = 4_000_000     # fewer rows of long documents make a row group
VALIDATION_SHARE = 0.05     # of the rows or characters, where no file is for validation
MIN_ROWS_IN_PLACE = 20      # fewer rows of one file are converted, for one may have to be cut
CHECKED_BYTES = 100_000_000  # up to this size, the user's parquet files are checked row by row
SUFFIXES = (*READERS, ".parquet")
SOURCE = "source"           # the column of converted text that names the user's file
MAX_TAG_CHARS = 40          # of the name before its hash
REPORT_SECONDS = 2.0        # between two lines that say how far the reading is
PRINTED_LINES = 20          # about the files of a folder
OLD_SECONDS = 2 * 24 * 3600  # after which nobody writes to a draft any more

MAKE_AGAIN = "run the same python -m nanochat.dataset again"
COPY_AGAIN = "copy or download it again"
ADD_TEXT = "add text, or remove the empty files"

# Words of a file's name, or of its folder's, that tell the split it belongs to
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
    "holdout": "test",
    "heldout": "test",
}
RECORD_SUFFIXES = (  # a data set's, not a writer's
    ".jsonl", ".ndjson", ".jsonlines", ".csv", ".tsv", ".parquet",
)

# Whole names, without suffixes, of texts about a data set, which stand beside its files
ABOUT = re.compile(
    r"readme|data(set)?[-_ ]?card|licen[cs]e|copying|"
    r"notice|citation|changelog|contributing|authors",
    re.IGNORECASE,
)


# ----------------------------------------------------------------------------------------------
# reading

class Dataset(NamedTuple):
    """The text behind one data path, resolved and checked.

    paths: the parquet files; those of validation come last.
    train_groups, val_groups: the arguments of read_row_group, (path, row group index), in the order
    in which they are read. A row group is the unit that is read from a parquet file at a time.
    Where one file holds both splits, the group at the border has its first and last row as well.
    root: the folder that the names of documents are relative to.
    is_ours: whether nanochat has written the files, so that a column `source` is one of names.
    """

    paths: list
    train_groups: list
    val_groups: list
    root: Path
    is_ours: bool

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
        for group in self.groups(split):
            for text in read_row_group(*group):
                if text and row % world_size == rank:
                    yield text
                row += 1

    def named_documents(self, split):
        """One pass over the documents of a split, in order: yields (name, text), text not empty.

        The name is that of the user's file, relative to the data path. Of a file that was cut into
        several documents, all have the same name. A document of a parquet file, of the user's or
        of a shard, is named by its place: "part-0.parquet, row 17", counted from 0.
        """
        for group in self.groups(split):
            for name, text in _read_named(self.root, self.is_ours, *group):
                if text:
                    yield name, text


def open_dataset(data=None):
    """Resolve a data path, check every file behind it, and return a Dataset.

    data: None for `$NANOCHAT_BASE_DIR/base_data`; a file or folder of the user's; or a Dataset,
    which is returned as it is, so that one run checks its files once and passes the Dataset on.
    UserError where there is nothing to read, a file is damaged, or a pinned file is missing.
    """
    if isinstance(data, Dataset):
        return data
    if data is None:
        return _open_base_data()

    # 1) a folder that nanochat has made
    path = _existing(data)
    pinned = _pinned(path / "index.json")
    if pinned:
        return _open_pinned(path, pinned, MAKE_AGAIN)

    # 2) the user's files
    files, others = _user_files(path)
    return _open_user_files(path, files, others)


def data_tag(data):
    """A name for what is trained on a data path: "notes-1a2b3c4d". None for nanochat's own text.

    It ends with a hash of the paths, sizes and modification times of all files behind `data`, by
    which conversions are named as well: when one of them changes, so does the tag. The tag is made
    of ASCII letters, digits and hyphens, and is no longer than a name of a folder may be.
    UserError for what open_dataset() refuses without reading it.
    """
    if data is None:
        return None
    path = _existing(data)
    if os.path.realpath(path) == os.path.realpath(get_base_dir() / "base_data"):
        return None

    # the key
    pinned = _pinned(path / "index.json")
    if pinned:
        files = [path / name for name in (*pinned["files"], pinned["validation"])]
        key = _key(path, [file for file in files if file.exists()])
    else:
        chosen = _choose(path, _user_files(path)[0])
        key = _key(path, chosen.files, bool(chosen.val))

    # the name, without the suffixes of a file
    name = path.name
    while path.is_file() and Path(name).suffix.lower() in (*SUFFIXES, *COMPRESSED):
        name = Path(name).stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9]+", "-", plain)[:MAX_TAG_CHARS].strip("-")
    return f"{safe or 'data'}-{key[:8]}"


def _open_base_data():
    """The Dataset of `$NANOCHAT_BASE_DIR/base_data`."""
    folder = get_base_dir() / "base_data"
    index = folder / "index.json"
    pinned = _pinned(index)
    if pinned:
        return _open_pinned(folder, pinned, MAKE_AGAIN)
    if index.exists() and not _is_json(index):
        raise UserError(f"{index} is damaged: {MAKE_AGAIN}, which writes it")

    # parquet files that the user has put there
    files = [path for path in sorted(folder.glob("*")) if path.suffix.lower() == ".parquet"]
    if not files:
        raise UserError(
            f"no text in {folder}: run python -m nanochat.dataset first, or give --data=PATH"
        )
    return _open_user_files(folder, files, [])


def _open_user_files(path, files, others):
    """The Dataset of the user's files at `path`; others: those that cannot be read."""
    # 1) which are for training and which for validation
    chosen = _choose(path, files)

    # 2) parquet files, where they are
    if all(file.suffix.lower() == ".parquet" for file in chosen.files):
        dataset = _open_in_place(path, chosen, others)
        if dataset:
            return dataset

    # 3) files that must be converted
    folder = _convert(path, chosen, others)
    remedy = f"delete {folder} and run this command again"
    pinned = _pinned(folder / "index.json")
    if not pinned:
        raise UserError(f"{folder}, which holds the converted text, is damaged: {remedy}")
    return _open_pinned(folder, pinned, remedy)


def iter_documents(split, data=None, rank=0, world_size=1):
    """One pass over the documents of "train" or "val": open_dataset(data).documents(split, ...)."""
    yield from open_dataset(data).documents(split, rank, world_size)


def parquet_paths(data=None):
    """The parquet files of a data path; those of validation come last."""
    return open_dataset(data).paths


def iter_row_groups(paths):
    """Yield every (path, row group index) of the files in order; each file starts at group 0."""
    for path in paths:
        with pq.ParquetFile(path) as parquet:
            count = parquet.num_row_groups
        for index in range(count):
            yield path, index


def read_row_group(path, index, start=0, stop=None):
    """The documents of one row group, a list of str; a missing text (null) becomes "".

    start, stop: the rows of the group to return, as in a slice.
    UserError with the file, the row group and the row for what cannot be read.
    """
    with pq.ParquetFile(path) as parquet:
        return _texts_of(parquet, path, index)[start:stop]


def _read_named(root, is_ours, path, index, start=0, stop=None):
    """The [(name, text)] of a row group; see Dataset.named_documents."""
    with pq.ParquetFile(path) as parquet:
        texts = _texts_of(parquet, path, index)
        if is_ours and SOURCE in parquet.schema_arrow.names:
            names = parquet.read_row_group(index, columns=[SOURCE])[SOURCE].to_pylist()
        else:
            earlier = [parquet.metadata.row_group(i).num_rows for i in range(index)]
            names = _names_of_rows(path, root, sum(earlier), len(texts))
    return list(zip(names, texts))[start:stop]


def _names_of_rows(path, root, first, count):
    """The names of `count` rows of a parquet file, from row `first` on."""
    file = _name_of(path, root)
    return [f"{file}, row {row}" for row in range(first, first + count)]


def _texts_of(parquet, path, index):
    """The documents of row group `index` of an open parquet file; see read_row_group."""
    name = text_key(parquet.schema_arrow.names)
    try:
        column = parquet.read_row_group(index, columns=[name])[name]
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}, row group {index}, is damaged ({reason}): {COPY_AGAIN}"
        ) from error
    try:
        values = column.to_pylist()
        if "binary" in str(column.type):
            values = [value and value.decode("utf-8") for value in values]
    except UnicodeDecodeError as error:
        row = _first_undecodable(column)
        raise UserError(
            f"{path}, row group {index}, row {row} (both counted from 0): "
            f"not UTF-8 ({error.reason}): correct or remove this row"
        ) from error
    return [text or "" for text in values]


def _first_undecodable(column):
    """The first row of a column whose bytes are not UTF-8."""
    for row, scalar in enumerate(column):
        try:
            value = scalar.as_py()
            if isinstance(value, bytes):
                value.decode("utf-8")
        except UnicodeDecodeError:
            return row
    raise AssertionError("every row can be decoded")


# ----------------------------------------------------------------------------------------------
# parquet files of a split

class _Part(NamedTuple):
    """What is known of a parquet file before it is read."""

    path: Path
    rows: list      # of each row group
    missing: int    # rows whose text is null; where every row was read, also those of empty ones
    has_text: bool  # whether any row has a text that is not white space

    def groups(self):
        return [(self.path, index) for index in range(len(self.rows))]


def _check_parquet(path, remedy, every_row=False):
    """The _Part of a parquet file with one column `text` of strings.

    remedy: what to do about a damaged file.
    every_row: read the whole file, so that damage is found before training and not during it.
    UserError where the file is damaged or has no such column.
    """
    check_not_a_pointer(path)
    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the file system, which names the file
            raise
        raise UserError(f"{path} is not a whole parquet file: {remedy}") from error

    with parquet:
        _check_column(path, parquet.schema_arrow)
        groups = range(parquet.num_row_groups)
        paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        place = paths.index(text_key(parquet.schema_arrow.names))
        chunks = [parquet.metadata.row_group(index).column(place) for index in groups]
        rows = [parquet.metadata.row_group(index).num_rows for index in groups]
        missing = sum(chunk.statistics.null_count or 0 for chunk in chunks if chunk.statistics)
        if every_row:
            lengths = [_count_texts(_texts_of(parquet, path, index)) for index in groups]
            missing = sum(rows) - sum(count for count, _ in lengths)
            has_text = any(has_text for _, has_text in lengths)
        else:
            has_text = any(
                _is_large(chunk) or _count_texts(_texts_of(parquet, path, index))[1]
                for index, chunk in enumerate(chunks)
            )
        return _Part(path, rows, missing, has_text)


def _count_texts(texts):
    """(how many of the texts are not empty, whether any is more than white space)."""
    return sum(map(bool, texts)), any(map(str.strip, texts))


def _check_column(path, schema):
    """UserError where a schema has not exactly one column `text` with a type that we can read.

    NoText where its columns are those of conversations.
    """
    name = text_key(schema.names)
    count = schema.names.count(name)
    if count == 0 and is_like_a_conversation(dict.fromkeys(schema.names)):
        raise NoText(f"{path} holds {CONVERSATION}")
    if count == 0:
        raise UserError(
            f"{path} has no column 'text' of strings, only {schema.names}: "
            "rename the one that holds the text"
        )
    if count > 1:
        raise UserError(f"{path} has {count} columns named 'text': keep one of them")

    kind = schema.types[schema.names.index(name)]
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_text_type(value_kind):
        raise UserError(
            f"{path} has no column 'text' of strings: its type is {kind}, convert it to string"
        )


def _is_text_type(kind):
    """Whether values of an Arrow type are str, or bytes that may be UTF-8."""
    strings = {"string", "large_string", "string_view"}
    return str(kind) in strings | {"binary", "large_binary", "binary_view"}


def _is_large(chunk):
    """Whether a column of a row group is too large for empty texts alone (4 bytes each)."""
    return chunk.total_uncompressed_size > 8 * chunk.num_values + 4096


def _open_pinned(folder, pinned, remedy):
    """The Dataset of a folder that nanochat has made; pinned: its index, see _pinned."""
    names = [*pinned["files"], pinned["validation"]]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        is_ours = remedy != MAKE_AGAIN
        advice = remedy if is_ours else f"{remedy}, it fetches only those"
        raise UserError(
            f"{len(missing)} of {len(names)} files are missing in {folder}, {missing[0]} first: "
            + advice
        )
    damaged = f"delete it and {remedy}" if remedy == MAKE_AGAIN else remedy
    parts = [_check_parquet(folder / name, damaged) for name in names]
    return _dataset_of(folder, parts[:-1], parts[-1:], remedy, is_ours=True)


def _open_in_place(path, chosen, others):
    """The Dataset of the user's parquet files, or None for a text so small that a row must be cut.

    Files without a row are passed over. others: files that cannot be read.
    """
    size = sum(file.stat().st_size for file in chosen.files)
    parts = _check_files(path, chosen.files, every_row=size <= CHECKED_BYTES)
    every = list(parts.values())
    with_rows = {file: part for file, part in parts.items() if sum(part.rows)}
    train = [with_rows[file] for file in chosen.train if file in with_rows]
    val = [with_rows[file] for file in chosen.val if file in with_rows]

    if val:
        dataset = _dataset_of(path, train, val, ADD_TEXT)
        origin = f"the files of the split {chosen.val_name}, {val[0].path.name} first"
    elif len(train) > 1:
        dataset = _dataset_of(path, train[:-1], train[-1:], ADD_TEXT)
        origin = f"the last file, {train[-1].path.name}"
    elif train and sum(train[0].rows) >= MIN_ROWS_IN_PLACE:
        dataset = _last_rows(path, train[0])
        origin = f"the last {VALIDATION_SHARE:.0%} of the rows"
    else:
        return None

    missing = sum(part.missing for part in every)
    documents = sum(sum(part.rows) for part in every) - missing
    print0(
        f"{path}: {len(every)} parquet files, {documents:,} documents, {size:,} bytes, "
        f"read in place; validation is {origin}"
    )
    if missing:
        print0(f"{path}: {missing:,} texts are null or empty and skipped")
    _say_others(path, others)
    _say_left_aside(path, chosen)
    return dataset


def _check_files(path, files, every_row):
    """{file: _Part} of the user's parquet files; UserError for all that cannot be read, at once."""
    parts = {}
    skipped = []
    errors = []
    for file in files:
        try:
            parts[file] = _check_parquet(file, COPY_AGAIN, every_row)
        except NoText as error:
            skipped.append(error)
        except UserError as error:
            errors.append(error)
    _raise_all(path, skipped, errors, len(files))
    return parts


def _dataset_of(folder, train, val, remedy, is_ours=False):
    """The Dataset of two lists of _Part; UserError where one of them has no text."""
    if not any(part.has_text for part in train) or not any(part.has_text for part in val):
        names = ", ".join(part.path.name for part in val) or "none"
        raise UserError(
            f"{folder} has no documents to train on, or none in its validation files ({names}): "
            + remedy
        )
    return Dataset(
        [part.path for part in train + val],
        [group for part in train for group in part.groups()],
        [group for part in val for group in part.groups()],
        folder,
        is_ours,
    )


def _last_rows(path, part):
    """The Dataset of one file, whose last rows are validation."""
    total = sum(part.rows)
    border = total - max(1, round(VALIDATION_SHARE * total))
    train, val = [], []
    first = 0  # of the group's rows
    for index, count in enumerate(part.rows):
        group = (part.path, index)
        cut = min(max(border - first, 0), count)  # so many rows of the group train
        if cut == count:
            train.append(group)
        elif cut == 0:
            val.append(group)
        else:
            train.append((*group, 0, cut))
            val.append((*group, cut, count))
        first += count

    for groups in (train, val):
        if not any(text.strip() for group in groups for text in read_row_group(*group)):
            raise UserError(
                f"{part.path} has no documents to train on, or none in its last "
                f"{total - border} rows, which are validation: add text, or remove empty rows"
            )
    return Dataset([part.path], train, val, _root(path), False)


# ----------------------------------------------------------------------------------------------
# index.json

def _is_json(path):
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _pinned(index):
    """The content of an index.json that nanochat has written, a dict, or None.

    Other programs have files of this name. Ours lists parquet files beside it.
    """
    try:
        pinned = json.loads(index.read_text(encoding="utf-8"))
        names = [*pinned["files"], pinned["validation"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_ours = len(names) > 1 and all(map(_is_shard_name, names))
    return pinned if is_ours else None


def _is_shard_name(name):
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.parquet", name) is not None


# ----------------------------------------------------------------------------------------------
# writing shards

def write_shards(folder, prefix, train, validation, **fields):
    """Write documents as parquet shards with their index.json.

    train, validation: lists of str; the validation documents become the last shard.
    fields: further entries of the index.

    The index is written first, without hashes, and completed last: the shards of an interrupted
    build are reported as missing and never taken for whole.
    """
    shards = [*_divide(train), validation]
    files = [f"{prefix}_{i:05d}.parquet" for i in range(len(shards))]
    index = {**fields, "files": files[:-1], "validation": files[-1]}

    # shards of an earlier build must not be taken for this one's
    for file in files:
        (folder / file).unlink(missing_ok=True)
    atomic_write(folder / "index.json", json.dumps(index, indent=1))

    for file, documents in zip(files, shards):
        _write_parquet(folder / file, documents)

    index["sha256"] = {file: sha256(folder / file) for file in files}
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

class _Chosen(NamedTuple):
    """The user's files, divided by what they are for."""

    train: list
    val: list       # empty where validation must be taken from the training files
    val_name: str   # "validation" or "test", the split that val is
    test: list      # neither trained on nor validated on
    about: list     # README and the like beside a data set

    @property
    def files(self):
        return self.train + self.val


def _existing(data):
    """The absolute path of a file or folder that a user has named."""
    if not str(data).strip():
        raise UserError("the data path is empty: name a file or a folder")
    path = Path(expand_home(data, "write the whole path")).absolute()
    if not path.exists():
        raise UserError(
            f"data path {data} does not exist: "
            f"name a file or a folder of {', '.join(SUFFIXES)}"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{data} is neither a file nor a folder: save the text to a file first")
    return path


def _root(path):
    """The folder that the names of the documents behind a data path are relative to."""
    return path.parent if path.is_file() else path


def _name_of(file, root):
    """A file's path relative to a folder, with U+FFFD where the system's name is not UTF-8."""
    name = file.relative_to(root).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_readable(path):
    return path.suffix.lower() == ".parquet" or text_suffix(path) in READERS


def _user_files(path):
    """(files that we can read, files that we cannot) at a file or below a folder.

    Hidden files, and files in hidden folders, do not count.
    """
    if path.is_file():
        if not _is_readable(path):
            example = conversion_of(path)
            advice = f"convert it, as in {example}" if example else "convert or rename it"
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: {advice}")
        return [path], []

    every = _visible_files(path)
    files = [file for file in every if _is_readable(file)]
    others = [file for file in every if not _is_readable(file)]
    if not files:
        known = list(filter(None, map(conversion_of, others)))
        rename = f": rename those of text, such as {others[0].name}, to .txt" if others else ""
        advice = f": convert them, as in {known[0]}" if known else rename
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} files{advice}")
    return files, others


def _visible_files(top):
    """The files below a folder, sorted, without the hidden ones and those of the base directory.

    Links are followed. Every folder and file counts once, however many links lead to it, so that
    links in a circle end; where a folder has a place of its own below `top`, that place counts.
    """
    base = os.path.realpath(get_base_dir())
    seen = {base} - {os.path.realpath(top)}
    found = {}
    waiting = [os.fspath(top)]
    while waiting:
        for folder, names, files in os.walk(waiting.pop(0), onerror=_say_skipped):
            real = os.path.realpath(folder)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if not name.startswith("."))
            inner = [os.path.join(folder, name) for name in names]
            waiting += filter(os.path.islink, inner)
            for name in sorted(files):
                file = Path(folder, name)
                if file.is_file() and not name.startswith("."):
                    found.setdefault(os.path.realpath(file), file)
    return sorted(found.values())


def _say_skipped(error):
    print0(f"skipped {error.filename}: {error.strerror}")


def _split_of(name):
    """The split that the relative path of a file of records tells, or None.

    >>> _split_of(Path("data/testSet-00000-of-00001.parquet"))
    'test'
    """
    for part in reversed(name.parts):
        part = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", part).lower()  # camelCase
        part = re.sub(r"(held|hold)[-_ ]out", r"\1out", part)
        for word in re.split(r"[\W\d_]+", part):
            split = SPLIT_WORDS.get(word.removesuffix("set"))
            if split:
                return split
    return None


def _splits_of_notes(names):
    """{relative path: split} of files that a person writes, where their layout is a data set's.

    A word in a note's name says nothing: "train to Paris.md". Splits are there where folders are
    called `train` and another split, or where every file is, as in wiki.train.txt.
    """
    inner = [name for name in names if len(name.parts) > 1]
    folders = {name: SPLIT_WORDS.get(name.parts[0].lower()) for name in inner}
    splits = set(folders.values())
    if "train" in splits and splits & {"val", "test"}:
        return folders

    stems = [name.name.lower().split(".txt")[0] for name in names]
    stems = {name: SPLIT_WORDS.get(stem.split(".")[-1]) for name, stem in zip(names, stems)}
    splits = set(stems.values())
    has_two = "train" in splits and len(splits) > 1
    is_text = all(text_suffix(name) == ".txt" for name in names)
    return stems if has_two and is_text and None not in splits else {}


def _splits(path, files):
    """The split of each of the user's files, None where nothing tells it."""
    names = [file.relative_to(_root(path)) for file in files]
    notes = [name for name in names if text_suffix(name) in NOTES]
    splits_of_notes = _splits_of_notes(notes)
    told = []
    for file, name in zip(files, names):
        if text_suffix(name) in NOTES:
            told.append(splits_of_notes.get(name))
        else:
            split = _split_of(name)
            told.append(split if split in (None, "train") or _has_text(file) else None)

    # a file `test.csv` among notes, and none that says `train`, is no data set
    return [None] * len(files) if notes and "train" not in told else told


def _choose(path, files):
    """Divide the user's files; returns _Chosen.

    Names tell splits where one of them tells another split than `train`, and not all do. A test
    split is never trained on; it is used for validation where there is no validation split.
    """
    # 1) what is about a data set is no part of it
    about = _files_about(files)
    files = [file for file in files if file not in about]

    # 2) splits
    named = {"train": [], "val": [], "test": [], None: []}
    told = _splits(path, files)
    for file, split in zip(files, told):
        named[split].append(file)
    train = named["train"] + named[None]  # of several files, the last is validation
    val, test = named["val"], named["test"]
    if not train or not (val or test):
        return _Chosen(train or files, [], "", [], about)
    train = [file for file, split in zip(files, told) if split in ("train", None)]
    if val:
        return _Chosen(train, val, "validation", test, about)
    return _Chosen(train, test, "test", [], about)


def _has_text(file):
    """Whether a file of records begins like one that holds text."""
    if text_suffix(file) != ".parquet":
        return holds_text(file)
    try:
        return text_key(pq.read_schema(file).names) is not None
    except (pa.ArrowException, OSError):
        return True  # it is said later what is wrong with it


def _files_about(files):
    """Those of the files that describe the data set which the others are."""
    parquet = [file.stat().st_size for file in files if text_suffix(file) == ".parquet"]
    about = [file for file in files if _may_be_about(file, sum(parquet))]
    records = (file for file in files if text_suffix(file) in RECORD_SUFFIXES)
    return about if about and any(map(_has_text, records)) else []


def _may_be_about(file, parquet_bytes):
    """Whether a file describes the data set that it stands beside, if it does so.

    Beside much parquet every file that a person writes does, and every list: the alternative is to
    convert all of it.
    """
    suffix = text_suffix(file)
    if suffix not in (".json", *NOTES):
        return False
    if parquet_bytes > CHECKED_BYTES:
        return True
    if suffix == ".json":
        return parquet_bytes > 0 and not _has_text(file)
    return ABOUT.fullmatch(file.name.split(".")[0]) is not None


def _say_others(path, others):
    """Print which files at a data path cannot be read, and how one of them can be converted."""
    if not others:
        return
    first = next(filter(conversion_of, others), others[0])
    example = conversion_of(first)
    advice = f": convert those, as in {example}" if example else ""
    print0(
        f"{path}: skipped {len(others)} files that are none of {', '.join(SUFFIXES)}, "
        f"{_name_of(first, path)} first{advice}"
    )


def _say_left_aside(path, chosen):
    """Print which files beside those of a data set are not read."""
    for files, what in ((chosen.test, "of the split test"), (chosen.about, "about the data")):
        if files:
            first = _name_of(files[0], path)
            print0(f"{path}: left aside {len(files)} files {what}, {first} first")


# ----------------------------------------------------------------------------------------------
# converting the user's own text
#
# Documents are written as they are read, so that text of any size fits the memory. Which of them
# are the last 5 % is known when all are written: those are then moved to a file of their own.

class _Findings:
    """What reading the user's files has brought to light, to be said when all are read."""

    def __init__(self):
        self.encodings = {}     # the files of each encoding that is not UTF-8
        self.dropped = 0        # texts that are null or empty
        self.skipped = []       # NoText of files without documents
        self.errors = []        # UserErrors of files that cannot be read
        self.chars = 0
        self.next_report = time.monotonic() + REPORT_SECONDS

    def report_progress(self, file, number, count):
        """Say how far the reading is, every few seconds."""
        if time.monotonic() >= self.next_report:
            self.next_report = time.monotonic() + REPORT_SECONDS
            print0(f"reading {file}, {number} of {count}: {self.chars:,} characters so far")


def _read_user_file(file, root, findings):
    """Yield the (name, text) of one of the user's files; a text may be None."""
    if file.suffix.lower() == ".parquet":
        for group in _check_parquet(file, COPY_AGAIN).groups():
            yield from _read_named(root, False, *group)
        return

    encoding = find_encoding(file)
    if encoding != "utf-8":
        findings.encodings.setdefault(encoding, []).append(file)
    name = _name_of(file, root)
    for text in read_text_file(file, encoding):
        yield name, text


def _read_user_files(path, files, findings):
    """Yield the (name, text) of all documents in the user's files, none of them empty.

    The files of a folder are ordered by a hash of their names, so that the last 5 % are not simply
    the last in the alphabet. One that cannot be read is noted, and the others are read all the
    same: whoever mends a folder wants to know all that is wrong with it.
    """
    root = _root(path)
    ordered = sorted(files, key=lambda file: fraction(_name_of(file, root)))
    for number, file in enumerate(ordered, start=1):
        try:
            for name, text in _read_user_file(file, root, findings):
                findings.report_progress(file, number, len(files))
                if not text or not text.strip():
                    findings.dropped += 1
                    continue
                findings.chars += len(text.strip())
                yield name, text
        except NoText as error:
            findings.skipped.append(error)
        except UserError as error:
            findings.errors.append(error)
        except OSError as error:
            reason = error.strerror or error
            findings.errors.append(UserError(f"{file}: {reason}: make it readable, or remove it"))


def _say_findings(path, findings, count):
    """Print what was found in `count` files; UserError where any of them cannot be read."""
    root = _root(path)
    for encoding, files in findings.encodings.items():
        first = _name_of(files[0], root)
        print0(f"{path}: {len(files)} files read as {encoding} (first: {first})")

    _raise_all(path, findings.skipped, findings.errors, count)
    if findings.dropped:
        print0(f"{path}: skipped {findings.dropped:,} texts that are null or empty")


def _raise_all(path, skipped, errors, count):
    """Say which of `count` files at a data path are skipped, and raise the UserErrors of others.

    skipped: NoText of files without documents. Where no other is left, these are errors as well.
    """
    if len(skipped) == count:
        errors = errors + skipped
    elif skipped:
        _print_some([f"skipped {error}" for error in skipped])
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    _print_some([f"error: {error}" for error in errors])
    raise UserError(
        f"{path}: {len(errors)} of {count} files cannot be read, as said above: "
        "mend them, or move them elsewhere"
    )


def _print_some(lines):
    """Print at most PRINTED_LINES of the lines, and how many there are beside them."""
    for line in lines[:PRINTED_LINES]:
        print0(line)
    if len(lines) > PRINTED_LINES:
        print0(f"and {len(lines) - PRINTED_LINES:,} more")


class _Written(NamedTuple):
    """A row group that was written."""

    path: Path
    index: int
    rows: int
    chars: int


def _row_groups(documents):
    """Divide an iterator of (name, text) into lists, one per row group."""
    group = []
    chars = 0
    for name, text in documents:
        group.append((name, text))
        chars += len(text)
        if len(group) == ROWS_PER_GROUP or chars > GROUP_CHARS:
            yield group
            group = []
            chars = 0
    if group:
        yield group


def _write_groups(path, groups, max_chars=None):
    """Write row groups, lists of (name, text), to one parquet file, whole or not at all.

    groups: an iterator, of which nothing more is taken once the file exceeds `max_chars`.
    Returns the _Written of each group.
    """
    schema = pa.schema({"text": pa.string(), SOURCE: pa.string()})
    written = []
    chars = 0
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in groups:
            names, texts = zip(*group)
            table = pa.table([pa.array(texts), pa.array(names)], schema=schema)
            writer.write_table(table, row_group_size=len(texts))
            group_chars = sum(map(len, texts))
            written.append(_Written(path, len(written), len(texts), group_chars))
            chars += group_chars
            if max_chars is not None and chars > max_chars:
                break
    return written


def _write_documents(folder, documents):
    """Write an iterator of (name, text) as shards; returns the _Written of all row groups."""
    groups = _row_groups(documents)
    written = []
    for number, first in enumerate(groups):
        path = folder / f"shard_{number:05d}.parquet"
        written += _write_groups(path, chain([first], groups), SHARD_CHARS)
    return written


def _divide_group(documents, chars, is_first, has_many):
    """Divide a list of (name, text) after about `chars` characters; returns two lists.

    The document at the border belongs to the second list. It is cut, at a line's end if possible,
    where it is the first of all (is_first), or one of so few that whole ones would not do (not
    has_many).
    """
    for border, (name, text) in enumerate(documents):
        if chars < len(text):
            break
        chars -= len(text)
    keep_whole = has_many or chars == 0
    if keep_whole and not is_first:
        return documents[:border], documents[border:]

    cut = text.find("\n", chars) + 1
    if cut == 0 or not text[cut:].strip():
        cut = max(1, min(chars, len(text.rstrip()) - 1))  # neither part is white space alone
    first = [*documents[:border], (name, text[:cut])]
    return first, [(name, text[cut:]), *documents[border + 1:]]


def _take_validation(folder, written):
    """Move the last VALIDATION_SHARE of the characters of all shards to one shard more.

    written: the _Written of all row groups, in order. Neither part becomes empty. Whole documents
    are moved where there are enough of them; of fewer than MIN_ROWS_IN_PLACE, the one at the border
    is cut. Returns (documents to train on, documents for validation).
    """
    # 1) the row group at the border, and how many of its characters belong to training
    total = sum(group.chars for group in written)
    chars = int((1 - VALIDATION_SHARE) * total)
    for place, border in enumerate(written):
        if chars < border.chars:
            break
        chars -= border.chars

    # 2) its documents
    def read(groups):
        return (_read_named(folder, True, group.path, group.index) for group in groups)

    documents = next(read([border]))
    has_many = sum(group.rows for group in written) >= MIN_ROWS_IN_PLACE
    is_first = place == 0 and chars < len(documents[0][1])
    head, tail = _divide_group(documents, chars, is_first, has_many)

    # 3) the new shards, and what they replace
    before = [group for group in written[:place] if group.path == border.path]
    train_groups = chain(read(before), [head] if head else [])
    val_groups = chain([tail], read(written[place + 1:]))
    validation = _write_groups(folder / "validation", val_groups)
    shortened = _write_groups(folder / "shortened", train_groups)
    for path in {group.path for group in written[place:]}:
        path.unlink()

    # 4) their names
    shards = sorted(folder.glob("shard_*"))
    if shortened:
        shards.append((folder / "shortened").rename(border.path))
    else:
        (folder / "shortened").unlink()
    (folder / "validation").rename(folder / f"shard_{len(shards):05d}.parquet")
    val_rows = sum(group.rows for group in validation)
    return len(head) + sum(group.rows for group in written[:place]), val_rows


def _key(path, files, has_splits=False):
    """16 hexadecimal digits that change when one of the files behind a data path changes."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = 2 if has_splits else 1
    return hashlib.sha256(json.dumps([version, str(path), stats]).encode()).hexdigest()[:16]


def _convert(path, chosen, others):
    """Convert the user's files to shards and return their folder.

    This is done once for the same paths, sizes and modification times.
    """
    files = chosen.files
    folder = get_base_dir() / "user_data" / _key(path, files, bool(chosen.val))
    if folder.exists():
        return folder
    _say_others(path, others)
    _say_left_aside(path, chosen)

    # write to a draft, which becomes the folder when it is whole
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_drafts(folder.parent)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
    try:
        train_rows, val_rows = _write_draft(draft, path, chosen)
        _rename_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

    first = _name_of(chosen.val[0], path) if chosen.val else ""
    origin = f" (split {chosen.val_name}, {first} first)" if chosen.val else ""
    size = sum(file.stat().st_size for file in files)
    print0(
        f"{path}: {len(files)} files of {size:,} bytes, {train_rows:,} documents to train on, "
        f"{val_rows:,} for validation{origin}, in {folder}"
    )
    return folder


def _remove_old_drafts(folder):
    """Remove what conversions that were killed have left, days ago."""
    for draft in folder.glob("draft-*"):
        if time.time() - draft.stat().st_mtime > OLD_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _rename_folder(draft, folder):
    """Rename a folder, unless another rank was faster, with the same result."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _write_draft(draft, path, chosen):
    """Write the shards of the user's files, and their index.json, to the folder `draft`.

    Returns (documents to train on, documents for validation).
    """
    # 1) all documents, in the order in which they are read
    findings = _Findings()
    written = _write_documents(draft, _read_user_files(path, chosen.train, findings))
    validation = []
    if chosen.val:
        val_documents = _read_user_files(path, chosen.val, findings)
        shards = len({group.path for group in written})
        val_path = draft / f"shard_{shards:05d}.parquet"
        validation = _write_groups(val_path, _row_groups(val_documents))
    _say_findings(path, findings, len(chosen.files))

    # 2) validation
    rows = sum(group.rows for group in written), sum(group.rows for group in validation)
    if chosen.val and 0 in rows:
        raise UserError(
            f"{path} has no documents to train on, or none in its split {chosen.val_name}: "
            + ADD_TEXT
        )
    if findings.chars < 2:
        raise UserError(f"{path} is empty: there are no documents in it to train on")
    if not chosen.val:
        rows = _take_validation(draft, written)

    # 3) the index
    shards = [shard.name for shard in sorted(draft.glob("shard_*"))]
    index = {"source": str(path), "files": shards[:-1], "validation": shards[-1]}
    atomic_write(draft / "index.json", json.dumps(index, indent=1))
    return rows


if __name__ == "__main__":
    # `python -m nanochat.dataset` is the documented command. It hands over to the file that makes
    # text, which imports this one: an import in the other direction would be a circle.
    runpy.run_module("nanochat.sources", run_name="__main__", alter_sys=True)
