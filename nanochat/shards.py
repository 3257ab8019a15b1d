"""Parquet files with one document per row: read and check any, write those that are ours.

    for group in iter_row_groups(paths):
        for text in read_row_group(*group):
            ...

A file has a column `text`. The shards that nanochat writes from the user's files have a column
`source` as well, the name of the file that a document is from. `index.json` beside shards pins
their names: those to train on, and the last one, which is validation.
"""
import json
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_file, atomic_write, sha256
from nanochat.conversation import is_like_a_conversation
from nanochat.encoding import NoText, check_not_a_pointer
from nanochat.textfiles import CONVERSATION, text_key

SHARD_CHARS = 12_000_000    # a shard that we write is closed once it exceeds this
ROWS_PER_GROUP = 64         # small, so that every shard has several row groups
GROUP_CHARS = 4_000_000     # fewer rows of long documents make a row group
SOURCE = "source"           # the column of converted text that names the user's file

COPY_AGAIN = "copy or download it again"


# ----------------------------------------------------------------------------------------------
# reading

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


def read_named_row_group(root, is_ours, path, index, start=0, stop=None):
    """The [(name, text)] of one row group; a missing text (null) becomes "".

    root: the folder that names are relative to.
    is_ours: whether nanochat has written the file. Then a column `source` has the names; else
    documents are named by their place, "part-0.parquet, row 17", counted from 0.
    start, stop: the rows of the group to return, as in a slice.
    UserError as from read_row_group.
    """
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
    file = name_of(path, root)
    return [f"{file}, row {row}" for row in range(first, first + count)]


def name_of(file, root):
    """A file's path relative to a folder, with U+FFFD where the system's name is not UTF-8."""
    name = file.relative_to(root).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


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
# checking

class Part(NamedTuple):
    """One parquet file of a split: what is known of it before training reads it."""

    path: Path
    rows: list      # of each row group
    missing: int    # rows whose text is null; where every row was read, also those of empty ones
    has_text: bool  # whether any row has a text that is not white space

    def groups(self):
        """The arguments of read_row_group, (path, row group index), for all of the file."""
        return [(self.path, index) for index in range(len(self.rows))]


def check_parquet(path, remedy, every_row=False):
    """The Part of a parquet file with one column `text` of strings.

    remedy: what to do about a damaged file.
    every_row: read the whole file, so that damage is found before training and not during it.
    UserError where the file is damaged or has no such column, NoText where it holds conversations.
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
        return Part(path, rows, missing, has_text)


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


# ----------------------------------------------------------------------------------------------
# index.json

def is_json_file(path):
    """Whether a file that exists is whole JSON in UTF-8, whatever it says."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def read_index(path):
    """The content of an index.json that nanochat has written, a dict, or None.

    It has "files", the names of the shards to train on, and "validation", the name of one more.
    It may have "unseen", the name of a shard of whole sources that are in no other, and "holdout":
    "source" where validation is of such sources itself.
    Other programs have files of this name. Ours lists parquet files beside it.
    """
    try:
        pinned = json.loads(path.read_text(encoding="utf-8"))
        names = shard_names(pinned)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_ours = bool(pinned["files"]) and all(map(_is_shard_name, names))
    return pinned if is_ours else None


def shard_names(pinned):
    """The names of all shards of an index: those to train on, that of validation, that of unseen.
    """
    unseen = [pinned["unseen"]] if "unseen" in pinned else []
    return [*pinned["files"], pinned["validation"], *unseen]


def _is_shard_name(name):
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.parquet", name) is not None


# ----------------------------------------------------------------------------------------------
# writing lists of documents, with hashes

def write_shards(folder, prefix, train, validation, unseen=(), **fields):
    """Write documents as parquet shards with their index.json.

    train, validation: lists of str; the validation documents become the last shard.
    unseen: those of whole sources that are in neither; where there are some, they are one shard
    more.
    fields: further entries of the index.

    The index is written first, without hashes, and completed last: the shards of an interrupted
    build are reported as missing and never taken for whole.
    """
    shards = [*_divide_into_shards(train), validation]
    files = [f"{prefix}_{i:05d}.parquet" for i in range(len(shards))]
    index = {**fields, "files": files[:-1], "validation": files[-1]}
    if unseen:
        index["unseen"] = f"{prefix}_unseen.parquet"
        shards.append(unseen)
        files.append(index["unseen"])

    # shards of an earlier build must not be taken for this one's
    for file in files:
        (folder / file).unlink(missing_ok=True)
    atomic_write(folder / "index.json", json.dumps(index, indent=1))

    for file, documents in zip(files, shards):
        _write_parquet(folder / file, documents)

    index["sha256"] = {file: sha256(folder / file) for file in files}
    atomic_write(folder / "index.json", json.dumps(index, indent=1))


def _divide_into_shards(documents):
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
# writing named documents as they come

class WrittenGroup(NamedTuple):
    """A row group that was written."""

    path: Path
    index: int  # in its file
    rows: int
    chars: int


def divide_into_groups(documents):
    """Divide an iterator of (name, text) into lists, one per row group.

    A list is closed at ROWS_PER_GROUP documents, or once it exceeds GROUP_CHARS.
    """
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


def write_groups(path, groups, max_chars=None):
    """Write row groups, lists of (name, text), to one parquet file, whole or not at all.

    groups: an iterator, of which nothing more is taken once the file exceeds `max_chars`.
    Returns the WrittenGroup of each group.
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
            written.append(WrittenGroup(path, len(written), len(texts), group_chars))
            chars += group_chars
            if max_chars is not None and chars > max_chars:
                break
    return written


def write_named_documents(folder, documents):
    """Write an iterator of (name, text) as shard_00000.parquet and so on, without an index.

    Nothing but one row group is held in memory. A shard is closed once it exceeds SHARD_CHARS.
    Returns the WrittenGroup of all row groups, in order.
    """
    groups = divide_into_groups(documents)
    written = []
    for number, first in enumerate(groups):
        path = folder / f"shard_{number:05d}.parquet"
        written += write_groups(path, chain([first], groups), SHARD_CHARS)
    return written
