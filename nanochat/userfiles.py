"""Which of the user's files are read, and what for: training, validation, or neither.

    path = existing_path("notes/")
    files, others = find_user_files(path)
    chosen = choose_files(path, files)   # chosen.train, chosen.val, ...

Only names, sizes and the beginnings of files are looked at. docs/data.md says what counts as a
split and what as a text about a data set.
"""
import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, expand_home, get_base_dir, print0
from nanochat.encoding import COMPRESSED, NOTES, text_suffix
from nanochat.shards import name_of
from nanochat.textfiles import READERS, conversion_of, holds_text, text_key

VALIDATION_SHARE = 0.05     # of the rows or characters, where no file is for validation
MIN_ROWS_IN_PLACE = 20      # fewer rows of one file are converted, for one may have to be cut
MUCH_PARQUET = 100_000_000  # bytes; what a person writes beside more than this is about it
SUFFIXES = (*READERS, ".parquet")
PRINTED_LINES = 20          # about the files of a folder
MAX_NAME_CHARS = 40         # of plain_name()

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
    r"notice|citation|changelog|contributing|authors|sources|credits|provenance|manifest|"
    r"file[-_ ]?list|checksums?|(md5|sha1|sha256|sha512)(sums?)?",
    re.IGNORECASE,
)


# ----------------------------------------------------------------------------------------------
# a data path and the files behind it

def existing_path(data):
    """The absolute path of a file or folder that a user has named; "~" is expanded.

    UserError where there is none, or something that is neither.
    """
    if not str(data).strip():
        raise UserError("the data path is empty: name a file or a folder")
    path = Path(expand_home(data, "write the whole path")).absolute()
    if ".." in path.parts:
        path = path.resolve()  # the same folder has one name, from wherever it is named
    if not path.exists():
        raise UserError(
            f"data path {data} does not exist: "
            f"name a file or a folder of {', '.join(SUFFIXES)}"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{data} is neither a file nor a folder: save the text to a file first")
    return path


def root_of(path):
    """The folder that the names of the documents behind a data path are relative to."""
    return path.parent if path.is_file() else path


def plain_name(path):
    """The name of a data path in ASCII letters, digits and hyphens, without a file's suffixes.

    >>> plain_name(Path("Meine Bücher"))
    'Meine-Bucher'
    """
    name = path.name
    while path.is_file() and Path(name).suffix.lower() in (*SUFFIXES, *COMPRESSED):
        name = Path(name).stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9]+", "-", plain)[:MAX_NAME_CHARS].strip("-")
    return safe or "data"


def _is_readable(path):
    return path.suffix.lower() == ".parquet" or text_suffix(path) in READERS


def find_user_files(path):
    """(files that we can read, files that we cannot) at a file or below a folder.

    Hidden files, and files in hidden folders, do not count.
    UserError where there are none that we can read.
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


def key_of_files(path, files, has_splits=False):
    """16 hexadecimal digits that change when one of the files behind a data path changes.

    They are a hash of paths, sizes and modification times; contents are not read.
    has_splits: whether some of the files are for validation.
    """
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = 2 if has_splits else 1
    return hashlib.sha256(json.dumps([version, str(path), stats]).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------
# what they are for

class ChosenFiles(NamedTuple):
    """The user's files, divided by what they are for."""

    train: list
    val: list       # empty where validation must be taken from the training files
    val_name: str   # "validation" or "test", the split that val is
    test: list      # neither trained on nor validated on
    about: list     # README and the like beside a data set

    @property
    def files(self):
        """All that are read."""
        return self.train + self.val


def choose_files(path, files):
    """Divide the user's files at or below `path` by what they are for; returns ChosenFiles.

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
        return ChosenFiles(train or files, [], "", [], about)
    train = [file for file, split in zip(files, told) if split in ("train", None)]
    if val:
        return ChosenFiles(train, val, "validation", test, about)
    return ChosenFiles(train, test, "test", [], about)


def _splits(path, files):
    """The split of each of the user's files, None where nothing tells it."""
    names = [file.relative_to(root_of(path)) for file in files]
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
    if parquet_bytes > MUCH_PARQUET:
        return True
    if suffix == ".json":
        return parquet_bytes > 0 and not _has_text(file)
    return ABOUT.fullmatch(file.name.split(".")[0]) is not None


# ----------------------------------------------------------------------------------------------
# what is said about them

def say_unreadable(path, others):
    """Print which files at a data path cannot be read, and how one of them can be converted."""
    if not others:
        return
    first = next(filter(conversion_of, others), others[0])
    example = conversion_of(first)
    advice = f": convert those, as in {example}" if example else ""
    print0(
        f"{path}: skipped {len(others)} files that are none of {', '.join(SUFFIXES)}, "
        f"{name_of(first, path)} first{advice}"
    )


def say_left_aside(path, chosen):
    """Print which files beside those of a data set are not read."""
    for files, what in ((chosen.test, "of the split test"), (chosen.about, "about the data")):
        if files:
            first = name_of(files[0], path)
            print0(f"{path}: left aside {len(files)} files {what}, {first} first")


def raise_errors(path, skipped, errors, count):
    """Print which of `count` files at a data path are skipped, and raise one UserError for others.

    skipped: NoText of files without documents. Where no other is left, these are errors as well.
    errors: UserErrors of files that cannot be read. Several are printed, then raised as one.
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
