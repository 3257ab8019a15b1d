"""Read the text to train on: parquet files or the user's own files, as documents of two splits.

A third split, "unseen", is there where whole sources were held out of both (nanochat/sources.py).

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

Parquet files are the subject of nanochat/shards.py, the choice among the user's files that of
nanochat/userfiles.py, and their conversion that of nanochat/convert.py. The command that makes text
is in nanochat/sources.py:

    python -m nanochat.dataset                  # text that is on this machine already
    python -m nanochat.dataset -n 240           # 240 training shards of FineWeb-Edu
"""
import os
import runpy
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, get_base_dir, print0
from nanochat.convert import convert_user_files
from nanochat.encoding import NoText
from nanochat.shards import (
    COPY_AGAIN,
    check_parquet,
    is_json_file,
    iter_row_groups,  # noqa: F401  (where it was before)
    read_index,
    read_named_row_group,
    read_row_group,
    shard_names,
    write_shards,  # noqa: F401  (where it was before)
)
from nanochat.textfiles import (
    DOCUMENT_CHARS,  # noqa: F401  (where it was before)
    split_document,  # noqa: F401  (where it was before)
)
from nanochat.userfiles import (
    ADD_TEXT,
    MIN_ROWS_IN_PLACE,
    VALIDATION_SHARE,
    choose_files,
    existing_path,
    find_user_files,
    key_of_files,
    plain_name,
    raise_errors,
    root_of,
    say_left_aside,
    say_unreadable,
)

CHECKED_BYTES = 100_000_000  # up to this size, the user's parquet files are checked row by row

MAKE_AGAIN = "run the same python -m nanochat.dataset again"


# ----------------------------------------------------------------------------------------------
# what the stages see

class Dataset(NamedTuple):
    """The text behind one data path, resolved and checked.

    paths: the parquet files; those of validation come last.
    train_groups, val_groups: the arguments of read_row_group, (path, row group index), in the order
    in which they are read. A row group is the unit that is read from a parquet file at a time.
    Where one file holds both splits, the group at the border has its first and last row as well.
    root: the folder that the names of documents are relative to.
    is_ours: whether nanochat has written the files, so that a column `source` is one of names.
    unseen_groups: of whole sources of which no document is in the other splits; most texts have
    none of these.
    holdout: what validation was divided by, "documents", or "source" where it is of whole sources.
    """

    paths: list
    train_groups: list
    val_groups: list
    root: Path
    is_ours: bool
    unseen_groups: tuple = ()
    holdout: str = "documents"

    def groups(self, split):
        """The row groups of "train", "val" or "unseen"; UserError for any other split."""
        if split == "train":
            return self.train_groups
        if split == "val":
            return self.val_groups
        if split == "unseen":
            return self.unseen_groups
        raise UserError(f"split is train or val, or unseen, not {split!r}")

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
            for name, text in read_named_row_group(self.root, self.is_ours, *group):
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
    path = existing_path(data)
    pinned = read_index(path / "index.json")
    if pinned:
        return _open_pinned(path, pinned, MAKE_AGAIN)

    # 2) the user's files
    files, others = find_user_files(path)
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
    path = existing_path(data)
    if os.path.realpath(path) == os.path.realpath(get_base_dir() / "base_data"):
        return None

    # the key
    pinned = read_index(path / "index.json")
    if pinned:
        files = [path / name for name in (*pinned["files"], pinned["validation"])]
        key = key_of_files(path, [file for file in files if file.exists()])
    else:
        chosen = choose_files(path, find_user_files(path)[0])
        key = key_of_files(path, chosen.files, bool(chosen.val))

    return f"{plain_name(path)}-{key[:8]}"


def iter_documents(split, data=None, rank=0, world_size=1):
    """One pass over the documents of "train" or "val": open_dataset(data).documents(split, ...)."""
    yield from open_dataset(data).documents(split, rank, world_size)


def parquet_paths(data=None):
    """The parquet files of a data path; those of validation come last."""
    return open_dataset(data).paths


# ----------------------------------------------------------------------------------------------
# the three origins

def _open_base_data():
    """The Dataset of `$NANOCHAT_BASE_DIR/base_data`."""
    folder = get_base_dir() / "base_data"
    index = folder / "index.json"
    pinned = read_index(index)
    if pinned:
        return _open_pinned(folder, pinned, MAKE_AGAIN)
    if index.exists() and not is_json_file(index):
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
    chosen = choose_files(path, files)

    # 2) parquet files, where they are
    if all(file.suffix.lower() == ".parquet" for file in chosen.files):
        dataset = _open_in_place(path, chosen, others)
        if dataset:
            return dataset

    # 3) files that must be converted
    folder = convert_user_files(path, chosen, others)
    remedy = f"delete {folder} and run this command again"
    pinned = read_index(folder / "index.json")
    if not pinned:
        raise UserError(f"{folder}, which holds the converted text, is damaged: {remedy}")
    return _open_pinned(folder, pinned, remedy)


def _open_pinned(folder, pinned, remedy):
    """The Dataset of a folder that nanochat has made; pinned: its index, of read_index()."""
    names = shard_names(pinned)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        is_ours = remedy != MAKE_AGAIN
        advice = remedy if is_ours else f"{remedy}, it fetches only those"
        raise UserError(
            f"{len(missing)} of {len(names)} files are missing in {folder}, {missing[0]} first: "
            + advice
        )
    damaged = f"delete it and {remedy}" if remedy == MAKE_AGAIN else remedy
    parts = [check_parquet(folder / name, damaged) for name in names]
    count = len(pinned["files"])
    dataset = _dataset_of(folder, parts[:count], [parts[count]], remedy, is_ours=True)
    unseen = [group for part in parts[count + 1:] for group in part.groups()]
    return dataset._replace(
        unseen_groups=unseen, holdout=pinned.get("holdout", "documents"))


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
    say_unreadable(path, others)
    say_left_aside(path, chosen)
    return dataset


def _check_files(path, files, every_row):
    """{file: Part} of the user's parquet files; UserError for all that cannot be read, at once."""
    parts = {}
    skipped = []
    errors = []
    for file in files:
        try:
            parts[file] = check_parquet(file, COPY_AGAIN, every_row)
        except NoText as error:
            skipped.append(error)
        except UserError as error:
            errors.append(error)
    raise_errors(path, skipped, errors, len(files))
    return parts


def _dataset_of(folder, train, val, remedy, is_ours=False):
    """The Dataset of two lists of Part; UserError where one of them has no text."""
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
    return Dataset([part.path], train, val, root_of(path), False)


if __name__ == "__main__":
    # `python -m nanochat.dataset` is the documented command. It hands over to the file that makes
    # text, which imports this one: an import in the other direction would be a circle.
    runpy.run_module("nanochat.sources", run_name="__main__", alter_sys=True)
