"""Convert the user's files to shards, once, in `$NANOCHAT_BASE_DIR/user_data`.

Documents are written as they are read, so that text of any size fits the memory. Where no file is
for validation, the last 5 % of the characters are. Which those are is known when all are written:
they are then moved to a file of their own. For --holdout=source whole sources are validation, which
are chosen when all are written as well.
"""
import contextlib
import fcntl
import json
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

from nanochat.common import (
    UserError,
    atomic_write,
    fraction,
    get_base_dir,
    get_dist_info,
    print0,
    where_offered,
)
from nanochat.encoding import NoText, find_encoding
from nanochat.holdout import (
    choose_held_out,
    find_source_lists,
    read_source_list,
    source_of_row,
)
from nanochat.shards import (
    COPY_AGAIN,
    check_parquet,
    divide_into_groups,
    name_of,
    read_index,
    read_named_row_group,
    write_named_documents,
    write_groups,
)
from nanochat.textfiles import read_text_file
from nanochat.userfiles import (
    ADD_TEXT,
    MIN_ROWS_IN_PLACE,
    VALIDATION_SHARE,
    choose_files,
    find_user_files,
    key_of_files,
    plain_name,
    raise_errors,
    root_of,
    say_left_aside,
    say_unreadable,
)

REPORT_SECONDS = 2.0        # between two lines that say how far the reading is
HEAD_START_SECONDS = 0.5    # of the first rank of a machine before the others
OLD_SECONDS = 2 * 24 * 3600  # after which nobody writes to a draft any more


# ----------------------------------------------------------------------------------------------
# the folder of shards

def convert_user_files(path, chosen, others):
    """Convert the user's files to shards, with their index.json, and return their folder.

    This is done once for the same paths, sizes and modification times.
    path, chosen, others: the data path, its ChosenFiles, and files there that cannot be read.
    UserError where any of the chosen files cannot be read, or a split would have no documents.
    """
    key = key_of_files(path, chosen.files, bool(chosen.val))
    return _convert_once(key, path, chosen, others, _write_draft)


def convert_by_source(path):
    """Convert the user's files at `path`, with whole sources for validation; returns the folder.

    A source is a file, or what a list beside parquet files says (nanochat/holdout.py). The index
    has their names under "held_out". UserError as from convert_user_files, where there are too few
    sources, and where the files have a split of their own.
    """
    if read_index(Path(path) / "index.json"):
        raise UserError(
            f"{path} was made by nanochat, and has a split for validation: give --source the text "
            "that it was made from"
        )
    files, others = find_user_files(path)
    chosen = choose_files(path, files)
    if chosen.val:
        raise UserError(
            f"{path} has a split for validation, {name_of(chosen.val[0], root_of(path))} first: "
            "leave --holdout out, or name the files that train alone"
        )
    lists = find_source_lists(chosen.about)
    about = [file for file in chosen.about if file not in lists]
    key = key_of_files(path, chosen.train + lists)
    name = f"{plain_name(path)}-{key[:8]}-by-source"
    write = partial(_write_draft_by_source, lists=lists)
    return _convert_once(name, path, chosen._replace(about=about), others, write)


def _convert_once(name, path, chosen, others, write):
    """Convert to the folder of this name, unless it is there, and return it.

    write: a function that writes shards and index, as _write_draft.
    """
    folder = get_base_dir() / "user_data" / name
    if folder.exists():
        return folder
    say_unreadable(path, others)
    say_left_aside(path, chosen)

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_drafts(folder.parent)
    with _one_at_a_time(folder, path):
        if not folder.exists():
            _convert(folder, path, chosen, write)
    return folder


@contextlib.contextmanager
def _one_at_a_time(folder, path):
    """A lock for the conversion to `folder`: of several ranks, one converts, and the others wait.

    The first rank of a machine is the first to try, for rank 0 says how far the reading is. Where
    the file system has no locks, all convert, and the fastest is taken.
    """
    if get_dist_info()[2] > 0:
        time.sleep(HEAD_START_SECONDS)
    lock = folder.parent / f"{folder.name}.lock"
    with open(lock, "w", encoding="utf-8") as file:
        with where_offered("flock", "each rank converts the text"):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print0(f"waiting for another process to read {path}")
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # whoever waits for this file finds the folder; if there is none, two may convert
            lock.unlink(missing_ok=True)


def _convert(folder, path, chosen, write):
    """Write to a draft, which becomes `folder` when it is whole."""
    files = chosen.files
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
    try:
        train_rows, val_rows = write(draft, path, chosen)
        _rename_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

    first = name_of(chosen.val[0], path) if chosen.val else ""
    origin = f" (split {chosen.val_name}, {first} first)" if chosen.val else ""
    size = sum(file.stat().st_size for file in files)
    print0(
        f"{path}: {len(files)} files of {size:,} bytes, {train_rows:,} documents to train on, "
        f"{val_rows:,} for validation{origin}, in {folder}"
    )


def _remove_old_drafts(folder):
    """Remove what conversions that were killed have left, days ago."""
    for draft in folder.glob("draft-*"):
        if time.time() - draft.stat().st_mtime > OLD_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _rename_folder(draft, folder):
    """Rename a folder, unless another process was faster, with the same result."""
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
    written = write_named_documents(draft, _read_user_files(path, chosen.train, findings))
    validation = []
    if chosen.val:
        val_documents = _read_user_files(path, chosen.val, findings)
        shards = len({group.path for group in written})
        val_path = draft / f"shard_{shards:05d}.parquet"
        validation = write_groups(val_path, divide_into_groups(val_documents))
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
    _write_index(draft, source=str(path))
    return rows


def _write_index(draft, **fields):
    """Write the index.json of shards, of which the last is validation."""
    shards = [shard.name for shard in sorted(draft.glob("shard_*"))]
    index = {**fields, "files": shards[:-1], "validation": shards[-1]}
    atomic_write(draft / "index.json", json.dumps(index, indent=1))


def _write_draft_by_source(draft, path, chosen, lists):
    """As _write_draft, with whole sources for validation. Every document has its source's name.

    lists: the files that say which source each row of the parquet files is from.
    """
    root = root_of(path)
    listed = {}
    for file in lists:
        print0(f"{path}: the sources of rows are those of {name_of(file, root)}")
        listed.update(read_source_list(file, chosen.train, root))

    # 1) all documents, and the size of each source
    findings = _Findings()
    sizes = Counter()
    everything = draft / "everything"
    everything.mkdir()

    def read_all():
        for source, text in _read_user_files(path, chosen.train, findings, listed):
            sizes[source] += len(text)
            yield source, text

    written = write_named_documents(everything, read_all())
    _say_findings(path, findings, len(chosen.train))
    if not written:
        raise UserError(f"{path} is empty: there are no documents in it to train on")

    # 2) which sources are validation
    held_out = choose_held_out(sizes, VALIDATION_SHARE * sizes.total())
    share = sum(sizes[name] for name in held_out) / sizes.total()
    print0(f"{path}: held out {len(held_out)} of {len(sizes)} sources, {share:.1%} of the text")

    # 3) the shards of both splits
    def read(is_held_out):
        for group in written:
            for source, text in read_named_row_group(draft, True, group.path, group.index):
                if (source in held_out) == is_held_out:
                    yield source, text

    train = write_named_documents(draft, read(False))
    shards = len({group.path for group in train})
    val_path = draft / f"shard_{shards:05d}.parquet"
    validation = write_groups(val_path, divide_into_groups(read(True)))
    shutil.rmtree(everything)
    _write_index(draft, source=str(path), holdout="source", held_out=sorted(held_out))
    return sum(group.rows for group in train), sum(group.rows for group in validation)


# ----------------------------------------------------------------------------------------------
# reading the user's files

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
        for group in check_parquet(file, COPY_AGAIN).groups():
            yield from read_named_row_group(root, False, *group)
        return

    encoding = find_encoding(file)
    if encoding != "utf-8":
        findings.encodings.setdefault(encoding, []).append(file)
    name = name_of(file, root)
    for text in read_text_file(file, encoding):
        yield name, text


def _read_user_files(path, files, findings, listed=None):
    """Yield the (name, text) of all documents in the user's files, none of them empty.

    listed: the sources of rows (holdout.source_of_row), to name documents by their sources.

    The files of a folder are ordered by a hash of their names, so that the last 5 % are not simply
    the last in the alphabet. One that cannot be read is noted, and the others are read all the
    same: whoever mends a folder wants to know all that is wrong with it.
    """
    root = root_of(path)
    ordered = sorted(files, key=lambda file: fraction(name_of(file, root)))
    for number, file in enumerate(ordered, start=1):
        try:
            for row, (name, text) in enumerate(_read_user_file(file, root, findings)):
                if listed is not None:
                    name = source_of_row(listed, file, row, root)
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
    root = root_of(path)
    for encoding, files in findings.encodings.items():
        first = name_of(files[0], root)
        print0(f"{path}: {len(files)} files read as {encoding} (first: {first})")

    raise_errors(path, findings.skipped, findings.errors, count)
    if findings.dropped:
        print0(f"{path}: skipped {findings.dropped:,} texts that are null or empty")


# ----------------------------------------------------------------------------------------------
# validation

def _take_validation(folder, written):
    """Move the last VALIDATION_SHARE of the characters of all shards to one shard more.

    written: the WrittenGroup of all row groups, in order. Neither part becomes empty. Whole
    documents are moved where there are enough of them; of fewer than MIN_ROWS_IN_PLACE, the one at
    the border is cut. Returns (documents to train on, documents for validation).
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
        return (read_named_row_group(folder, True, group.path, group.index) for group in groups)

    documents = next(read([border]))
    has_many = sum(group.rows for group in written) >= MIN_ROWS_IN_PLACE
    is_first = place == 0 and chars < len(documents[0][1])
    head, tail = _divide_group(documents, chars, is_first, has_many)

    # 3) the new shards, and what they replace
    before = [group for group in written[:place] if group.path == border.path]
    train_groups = chain(read(before), [head] if head else [])
    val_groups = chain([tail], read(written[place + 1:]))
    validation = write_groups(folder / "validation", val_groups)
    shortened = write_groups(folder / "shortened", train_groups)
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
