"""Data sets of the hub: parquet files in the cache, fetched once, verified, read by row.

    rows = load_rows("openai/gsm8k", "main", "test", ["question", "answer"])
    rows[0]["question"]

    python -m nanochat.hub openai/gsm8k                 # all splits, into the cache
    python -m nanochat.hub cais/mmlu all dev test       # two splits of the configuration `all`

The hub converts every public data set to parquet, on the branch refs/convert/parquet, as
CONFIG/SPLIT/NNNN.parquet. A split is kept in `$NANOCHAT_BASE_DIR/hub/NAME/CONFIG/SPLIT`. Its
index.json is written before the first file and lists all with sizes and hashes: a part of a split
is never taken for the whole, and the hashes are compared whenever the split is read. Parquet files
that somebody has put there, without an index, are read as they are. What is in the cache is read
without a network; HF_HUB_OFFLINE=1 forbids one.

The interface is that of huggingface.co/docs/hub/api and docs/dataset-viewer/parquet. HF_ENDPOINT
and HF_TOKEN are those of nanochat/download.py.
"""
import bisect
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import (
    UserError,
    all_reduce_max,
    atomic_write,
    get_base_dir,
    get_dist_info,
    print0,
    sha256,
    where_offered,
)
from nanochat.configurator import configure
from nanochat.download import (
    TIMEOUT,
    Damaged,
    authorize,
    bring,
    hub_endpoint,
    reason_of,
    status_of,
    with_retries,
)
from nanochat.metrics import finish_stage

BRANCH = "refs%2Fconvert%2Fparquet"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FILE = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)/(\w[\w.-]*\.parquet)")  # configuration, split, name
PROGRESS_SECONDS = 2
SLOW_BYTES = 300e6      # what takes more than two seconds to hash and to read, on a slow machine
POLL_SECONDS = 1.0      # between two looks of the ranks that wait for the one that fetches


class HubError(OSError):
    """A data set cannot be had now: one line, and exit status 1."""


class HubFile(NamedTuple):
    """One parquet file of a split as the hub lists it."""
    name: str       # 0000.parquet
    size: int
    sha256: str     # None where the hub does not say; in an index then that of what came


# ----------------------------------------------------------------------------------------------
# what the hub has

def list_files(name):
    """{(configuration, split): [HubFile]} of a data set, from the hub.

    UserError where there is none of this name, or none that may be read; HubError where the hub
    cannot be reached.
    """
    import requests

    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a data set: it is written OWNER/NAME")
    if is_offline():
        raise UserError(
            f"HF_HUB_OFFLINE forbids to ask the hub what {name} has: name a configuration and a "
            "split that the cache has, or unset it")
    endpoint = hub_endpoint()
    url = f"{endpoint}/api/datasets/{name}/tree/{BRANCH}?recursive=true"
    files = {}
    try:
        while url:
            entries, url = with_retries(functools.partial(_page, url, endpoint), threading.Event())
            for entry in entries:
                _add_file(files, entry)
    except requests.RequestException as error:
        if status_of(error) == 404:
            raise UserError(f"the hub has no parquet files of {name}: check the name") from error
        raise _failure(name, error) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{name} cannot be fetched: {endpoint} does not list files as the hub "
                       "does: check HF_ENDPOINT, or unset it") from error
    return files


def _failure(name, error, what=""):
    """A request's error as one that says what to do: UserError where the user lacks access.

    what: the file of the data set that was asked for, with a blank before it.
    """
    reason = reason_of(error)
    if status_of(error) in (401, 403):
        return UserError(
            f"the hub gives no access to {name}, or has none: {reason}: check the name and the "
            "token, and accept the terms on the data set's page where it has any")
    return HubError(
        f"{name}{what} cannot be fetched: {reason}; the same command again continues, HF_ENDPOINT "
        f"names a mirror, and parquet files copied to {get_base_dir() / 'hub' / name}"
        "/CONFIGURATION/SPLIT are read without a network")


def _page(url, endpoint):
    """(entries, address of the next page or None) of a listing.

    The next page is asked for at the same endpoint, whatever host the reply names: a mirror passes
    the hub's own addresses on, and the token is for the endpoint alone.
    """
    import requests

    with requests.get(url, auth=authorize, timeout=TIMEOUT) as reply:
        reply.raise_for_status()
        following = reply.links.get("next", {}).get("url")
        if following and not following.startswith(endpoint + "/"):
            parts = urlsplit(following)
            path = parts.path.removeprefix(urlsplit(endpoint).path)
            following = f"{endpoint}{path}?{parts.query}"
        return reply.json(), following


def _add_file(files, entry):
    """Add an entry of a listing to {(configuration, split): [HubFile]}, if it is a parquet file."""
    found = FILE.fullmatch(entry["path"])
    if entry["type"] != "file" or not found:
        return
    config, split, name = found.groups()
    digest = (entry.get("lfs") or {}).get("oid")
    files.setdefault((config, split), []).append(HubFile(name, entry["size"], digest))


def is_offline():
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


# ----------------------------------------------------------------------------------------------
# the cache

def cache_folder(name, config, split):
    """Where a split is kept, a Path."""
    return get_base_dir() / "hub" / name / config / split


def cached_files(folder):
    """The paths of a split that is whole in its folder, or None."""
    index = _read_index(folder)
    if index is None:
        return sorted(folder.glob("*.parquet")) or None
    size = sum(file.size for file in index)
    if size > SLOW_BYTES:
        print0(f"reading {size / 1e6:,.0f} MB of {folder}")
    if all(_is_whole(folder, file) for file in index):
        return [folder / file.name for file in index]
    return None


def _read_index(folder):
    """The [HubFile] of an index.json, or None where there is none."""
    try:
        rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))["files"]
        return [HubFile(*row) for row in rows]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return [HubFile("index.json is damaged", 0, None)]  # no such file: the split is not whole


def _is_whole(folder, file):
    """Whether a file is there, with its size, and with its hash where one is known."""
    path = folder / file.name
    if not path.exists() or path.stat().st_size != file.size:
        return False
    return file.sha256 is None or file.sha256 == sha256(path)


def fetch_split(name, config, split, fetch=True, again=False):
    """The paths of a split's files, from the cache or else from the hub.

    fetch: False forbids the network. again: ask the hub, whatever the index of the cache says.
    UserError where the split is not in the cache and the network is forbidden, and as list_files().
    """
    folder = cache_folder(name, config, split)
    paths = None if again else cached_files(folder)
    if paths:
        return paths
    if is_offline() or not fetch:
        reason = "nothing is fetched now"
        if is_offline():
            reason = "HF_HUB_OFFLINE forbids to fetch it"
        raise UserError(
            f"{name} ({config}, {split}) is not whole in {folder}, and {reason}: run python -m "
            f"nanochat.hub {name} {config} {split} (or python -m tasks.chat_data, for all) where "
            "there is a network, and copy the folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        paths = None if again else cached_files(folder)  # another process may have fetched it
        return paths or _fetch(name, config, split, folder)


@contextlib.contextmanager
def locked(folder):
    """A context in which no other process fetches into a folder."""
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        with where_offered("flock", "no other process may fetch the same files now"):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(name, config, split, folder):
    """Bring what is missing or damaged of a split into its folder; returns the paths of all."""
    import requests

    listed = list_files(name)
    files = sorted(listed.get((config, split), []))
    if not files:
        choices = ", ".join(sorted(" ".join(pair) for pair in listed)) or "none"
        raise UserError(f"{name} has no split {split} of {config}: choose from {choices}")
    # what cannot be compared with the hub's is fetched again
    missing = [file for file in files if file.sha256 is None or not _is_whole(folder, file)]
    _check_space(folder, sum(file.size for file in missing))
    _write_index(folder, files)

    stop = threading.Event()
    for number, file in enumerate(missing, start=1):
        label = f"{name} {config} {split}, file {number} of {len(missing)}"
        path = f"{config}/{split}/{file.name}"
        url = f"{hub_endpoint()}/datasets/{name}/resolve/{BRANCH}/{path}"
        try:
            bring(url, folder / file.name, stop, file.sha256, _Progress(label, file.size))
            if (folder / file.name).stat().st_size != file.size:
                (folder / file.name).unlink()
                raise Damaged(f"it has not the {file.size:,} bytes that the hub lists")
        except (requests.RequestException, Damaged) as error:
            raise _failure(name, error, f" {path}") from error

    _write_index(folder, [
        file._replace(sha256=file.sha256 or sha256(folder / file.name)) for file in files])
    total = sum(file.size for file in files)
    print0(f"{name} {config} {split}: {total / 1e6:,.1f} MB in {len(files)} files, in {folder}")
    return [folder / file.name for file in files]


def _write_index(folder, files):
    """Say in a folder which [HubFile] a split consists of."""
    atomic_write(folder / "index.json", json.dumps({"files": files}, indent=1))


def _check_space(folder, needed):
    """UserError where a disk has not as many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: make room, or "
            "set NANOCHAT_BASE_DIR to a larger disk")


class _Progress:
    """Says every few seconds how much of a file has come."""

    def __init__(self, label, size):
        self.label = label
        self.size = size
        self.said_at = time.perf_counter()

    def __call__(self, have, length):
        if time.perf_counter() - self.said_at > PROGRESS_SECONDS:
            self.said_at = time.perf_counter()
            print0(f"{self.label}: {have / 1e6:,.1f} of {self.size / 1e6:,.1f} MB")


# ----------------------------------------------------------------------------------------------
# rows

def load_rows(name, config, split, columns=None, fetch=True, most=None):
    """The Rows of a split of a data set. UserErrors as of fetch_split() and Rows.

    columns, most: as in Rows. fetch: as in fetch_split().
    """
    paths = fetch_split(name, config, split, fetch)
    try:
        return Rows(paths, columns, most)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
    if _read_index(paths[0].parent) is None:
        raise UserError(f"{paths[0].parent} is damaged ({reason}): copy its files again")

    # ours, so that it can be fetched again, once
    print0(f"{name} {config} {split} is damaged ({reason})")
    paths = fetch_split(name, config, split, fetch, again=True)
    try:
        return Rows(paths, columns, most)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} {config} {split} is damaged as the hub has it, too ({reason})") from error


class Rows:
    """The rows of parquet files as a sequence of dicts.

    They stay in memory as Arrow has them, which is much smaller than objects of Python.

    columns: those that a row has, as names, or as {name: shape}, of which no value may be null:
    str, int, [shape] of a list, or {field: shape}; None: all. most: rows that are needed, from the
    first on: the row groups that hold them are read; None: all. total: rows of the files.

    UserError, with the file, the row from 1 and the column, where one is not as it should be.
    """

    def __init__(self, paths, columns=None, most=None):
        self.total = sum(pq.read_metadata(path).num_rows for path in paths)
        most = self.total if most is None else most
        self.batches = []
        self.paths = paths
        self.first_rows = [0]   # of each file that was read, and of what would follow
        for path in paths:
            table = _read_table(path, columns, most - self.first_rows[-1])
            self.first_rows.append(self.first_rows[-1] + table.num_rows)
            self.batches += table.to_batches()
        self.ends = list(itertools.accumulate(batch.num_rows for batch in self.batches))
        if self.first_rows[-1] == 0:
            raise UserError(
                f"{paths[0].parent} is an empty split, without any row: remove this folder, and "
                "fetch or copy it again")

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect.bisect_right(self.ends, i)
        batch = self.batches[number]
        [row] = batch.slice(i - self.ends[number] + batch.num_rows, 1).to_pylist()
        return row

    def error(self, i, column, problem):
        """A UserError that says what is wrong with row i."""
        number = bisect.bisect_right(self.first_rows, i) - 1
        return _cell_error(self.paths[number], i - self.first_rows[number], column, problem)


def _read_table(path, columns, most):
    """The row groups of a parquet file that hold its first `most` rows, an Arrow table.

    UserError where the file lacks a column.
    """
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for column in columns or ():
            if column not in names:
                raise UserError(f"{path} has no column {column!r}, only {names}")
        shapes = columns if isinstance(columns, dict) else {}
        for column, shape in shapes.items():
            kind = file.schema_arrow.field(column).type
            if not _has_shape(kind, shape):
                raise UserError(f"{path}, column {column!r} has the type {kind}, not "
                                f"{_shape_text(shape)}: correct or replace this file")
        groups = []
        for index in range(file.num_row_groups):
            if most <= 0:
                break
            groups.append(index)
            most -= file.metadata.row_group(index).num_rows
        table = file.read_row_groups(groups, columns=columns and list(columns))
    for column in shapes:
        if any(map(_null_count, table[column].chunks)):
            values = table[column].to_pylist()
            row = next(i for i, value in enumerate(values) if _has_null(value))
            raise _cell_error(path, row, column, "it holds a null")
    return table


def _cell_error(path, row, column, problem):
    """A UserError of one cell. row: counted from 0, and said from 1 on."""
    return UserError(
        f"{path}, row {row + 1}, column {column!r}: {problem}: correct or replace this file")


def _has_shape(kind, shape):
    """Whether an Arrow type is of a shape, as in Rows."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if isinstance(shape, list):
        return is_list and _has_shape(kind.value_type, shape[0])
    if isinstance(shape, dict):
        fields = {}
        if pa.types.is_struct(kind):
            fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if not shape.keys() <= fields.keys():
            return False
        return all(_has_shape(fields[name], inner) for name, inner in shape.items())
    if shape is int:
        return pa.types.is_integer(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _shape_text(shape):
    """A shape of Rows in words, such as "list of text"."""
    if isinstance(shape, list):
        return f"list of {_shape_text(shape[0])}"
    if isinstance(shape, dict):
        return " and ".join(f"{name}: {_shape_text(inner)}" for name, inner in shape.items())
    return {str: "text", int: "integer"}[shape]


def _null_count(array):
    """How many nulls an Arrow array holds, at any depth."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return array.null_count + _null_count(array.flatten())
    if pa.types.is_struct(array.type):
        return array.null_count + sum(map(_null_count, array.flatten()))
    return array.null_count


def _has_null(value):
    """Whether a value of Python is None, or holds one."""
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    if isinstance(value, list):
        return any(map(_has_null, value))
    return value is None


# ----------------------------------------------------------------------------------------------
# several ranks

def on_first_rank(work):
    """Call work() on the first rank of every machine while the others wait.

    Returns None, or the UserError or OSError of a rank that failed; every rank gets one then. The
    others wait in many short collectives: a single one would time out before a large download ends.
    """
    is_dist, _, local_rank, _ = get_dist_info()
    if not is_dist:
        return _error_of(work)
    outcomes = []   # an error or None, once work() has ended
    thread = threading.Thread(target=lambda: outcomes.append(_error_of(work)), daemon=True)
    if local_rank == 0:
        thread.start()
    else:
        outcomes.append(None)
    running, failed = 1.0, 0.0
    while running:
        if local_rank == 0:
            thread.join(POLL_SECONDS)
        running = float(thread.is_alive())
        failed = float(not running and outcomes != [None])
        running, failed = all_reduce_max(running, failed)
    if not failed:
        return None
    errors = [error for error in outcomes if error]
    return errors[0] if errors else HubError(
        "the first rank of another machine failed: the same command on that machine alone says why")


def _error_of(work):
    """The UserError or OSError that work() raises, or None."""
    try:
        work()
    except (UserError, OSError) as error:
        return error
    return None


# ----------------------------------------------------------------------------------------------
# the command

def main():
    words = []
    settings = configure(globals(), texts=words)
    start = time.time()
    if not words:
        raise UserError(
            "name a data set: python -m nanochat.hub OWNER/NAME [CONFIGURATION [SPLIT ...]]")
    name, config, splits = words[0], words[1] if len(words) > 1 else None, words[2:]
    if not config or not splits:
        config, splits = _choose_splits(list_files(name), name, config)
    rows = {}
    for split in splits:
        rows[split] = len(load_rows(name, config, split))
    finish_stage("hub", time.time() - start, settings, name=name, config=config, rows=rows)


def _choose_splits(listed, name, config):
    """(configuration, splits) that a command without them means."""
    configs = sorted({listed_config for listed_config, _ in listed})
    if config is None and len(configs) == 1:
        config = configs[0]
    if config not in configs:
        raise UserError(f"{name}: name one of its configurations: {', '.join(configs) or 'none'}")
    return config, sorted(split for listed_config, split in listed if listed_config == config)


if __name__ == "__main__":
    main()
