"""Make the text to train on: from the sources on this machine, or from FineWeb-Edu.

    python -m nanochat.dataset                      # the standard library, numpy and torch
    python -m nanochat.dataset --source=installed   # the same, from all installed packages
    python -m nanochat.dataset -n 240               # 240 training shards of FineWeb-Edu

Both write parquet shards and their index.json to `$NANOCHAT_BASE_DIR/base_data`, which
nanochat/dataset.py reads. HF_ENDPOINT names a mirror to download from, HF_TOKEN is sent with every
download. The user's own text needs no command: every stage that reads text takes `--data=PATH`.
"""
import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.common import UserError, atomic_write, fraction, get_base_dir, print0, sha256
from nanochat.configurator import configure
from nanochat.dataset import parquet_paths
from nanochat.download import download, hub_endpoint, hub_token
from nanochat.metrics import finish_stage
from nanochat.shards import read_index, write_shards
from nanochat.textfiles import DOCUMENT_CHARS, split_document

source: str = None  # local, installed or fineweb; None: fineweb where -n is given, else local
shards: int = None  # -n, training shards of FineWeb-Edu, 100 MB each, 1 to 1822; fineweb alone: 240
workers = 4         # downloads at a time


# ----------------------------------------------------------------------------------------------
# Text that every machine has
#
# A machine that has our dependencies has 60 MB of well-edited text: the sources of the standard
# library, of numpy and of torch, a third of it English (docstrings and comments). It makes a model
# that knows a little about Python, which is a better companion than one that has seen a thousandth
# of the web.

LOCAL_PACKAGES = ("stdlib", "numpy", "torch")
INSTALLED_PACKAGES = ("stdlib", "installed")
VALIDATION_SHARE = 0.04     # of the files; about 500 documents
SKIPPED_FOLDERS = frozenset((
    "test",
    "tests",
    "idle_test",
    "testing",
    "_vendor",
    "site-packages",
    "dist-packages",
    "__pycache__",
))
LANGUAGE_REFERENCE = "pydoc_data/topics.py"  # one dictionary of pages


def python_files(packages=LOCAL_PACKAGES):
    """[(origin, name, path)] of the Python sources of the standard library and of packages, sorted.

    packages: "stdlib", names of installed packages, or "installed" for all of those. No package is
    imported. Tests are skipped.

    >>> python_files()[0][:2]
    ('stdlib', '__future__.py')
    """
    found = []
    for package in packages:
        for root, prefix in _source_roots(package):
            relative = [path.relative_to(root) for path in root.rglob("*.py")]
            found += sorted(
                (package, prefix + part.as_posix(), root / part)
                for part in relative
                if SKIPPED_FOLDERS.isdisjoint(part.parts)
            )
    return found


def _source_roots(package):
    """[(folder, prefix of the names of its files)] of a package; see python_files."""
    if package == "stdlib":
        return [(Path(sysconfig.get_path("stdlib")), "")]
    if package == "installed":
        folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        return [(Path(folder), "") for folder in sorted(folders)]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    return [(Path(spec.submodule_search_locations[0]), package + "/")]


def _documents_of(name, path):
    """The documents of one Python source, each headed by its name; [] for one that is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    if name == LANGUAGE_REFERENCE:
        pages = ast.literal_eval(text[text.index("{"):])
        return [
            f"# {title}\n{piece.strip()}\n"
            for title, page in pages.items()
            for piece in split_document(page)
        ]
    heading = f"# {name}\n"
    pieces = split_document(text, DOCUMENT_CHARS - len(heading) - 1)
    return [heading + piece.strip("\n") + "\n" for piece in pieces]


def _is_prose_or_code(text):
    """False for tables of numbers and escapes (character sets, tuned constants) and tiny texts.

    A table has over 8 % digits, or under 55 % letters and white space.
    """
    if len(text) <= 100:
        return False
    digits = sum(text.count(digit) for digit in "0123456789")
    if digits >= 0.08 * len(text):
        return False
    words = sum(map(str.isalpha, text)) + text.count(" ") + text.count("\n")
    return words > 0.55 * len(text)


class Seen:
    """Finds near-duplicates: documents with over half of their text in lines of earlier documents.

    Lines of fewer than 20 characters are common to many documents and do not count.
    """

    def __init__(self):
        self.lines = set()  # CRC-32 of every line so far

    def repeats(self, text):
        """Whether `text` is a near-duplicate. Where it is none, its lines are remembered."""
        stripped = [line.strip() for line in text.split("\n")]
        lines = [(zlib.crc32(line.encode()), len(line)) for line in stripped if len(line) >= 20]
        total_chars = sum(size for _, size in lines)
        repeated_chars = sum(size for key, size in lines if key in self.lines)
        if 2 * repeated_chars > total_chars:
            return True
        self.lines.update(key for key, _ in lines)
        return False


def collect_local(packages=LOCAL_PACKAGES):
    """(training documents, validation documents, table) of installed sources; the same every time.

    table: {origin: {"documents", "mb", "dropped"}}, what each package gave.

    A file belongs to validation by the hash of its name, so that no file is in both splits. Files
    are read in the order of that hash, validation first: what repeats validation is dropped from
    training. Documents are ordered by a hash as well, so that any beginning of the training text is
    a fair sample of it: a run on a small machine sees little more.
    """
    files = sorted(python_files(packages), key=lambda file: fraction(file[1]))
    seen = Seen()
    train = []
    validation = []
    table = {}
    for number, (origin, name, path) in enumerate(files):
        if number % 1000 == 0:
            print0(f"reading sources: {number} of {len(files)} files")
        split = validation if fraction(name) < VALIDATION_SHARE else train
        row = table.setdefault(origin, {"documents": 0, "mb": 0.0, "dropped": 0})

        for i, text in enumerate(_documents_of(name, path)):
            if not _is_prose_or_code(text) or seen.repeats(text):
                row["dropped"] += 1
                continue
            row["documents"] += 1
            row["mb"] += len(text) / 1e6
            split.append((fraction(f"{name}:{i}"), text))

    for row in table.values():
        row["mb"] = round(row["mb"], 2)
    return [text for _, text in sorted(train)], [text for _, text in sorted(validation)], table


def build_local(name="local"):
    """Build the shards of `local` or `installed` text; returns their index, a dict.

    Nothing is done where the shards of the same sources are there and undamaged.
    """
    folder = get_base_dir() / "base_data"
    folder.mkdir(exist_ok=True)
    packages = LOCAL_PACKAGES if name == "local" else INSTALLED_PACKAGES
    sizes = [(file, path.stat().st_size) for _, file, path in python_files(packages)]
    key = hashlib.sha256(json.dumps([3, sizes]).encode()).hexdigest()[:16]
    built = _built_before(folder, key)
    if built:
        print0(f"{folder} is up to date")
        return built

    train, validation, table = collect_local(packages)
    print0(
        f"writing {len(train)} documents to train on, {len(validation)} for validation to {folder}"
    )
    write_shards(
        folder,
        name,
        train,
        validation,
        source=name,
        key=key,
        origins=table,
        documents=[len(train), len(validation)],
    )
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def _built_before(folder, key):
    """The index of a whole, undamaged build with this key in `folder`, or None."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["key"] != key:
            return None
        for file, digest in index["sha256"].items():
            if sha256(folder / file) != digest:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing is there, or it is not whole
    return index


# ----------------------------------------------------------------------------------------------
# FineWeb-Edu

REPOSITORY = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822           # always fetched: it is validation
DEFAULT_SHARDS = 240


def download_fineweb(shards, workers=4):
    """Fetch the first `shards` training shards and the validation shard.

    Fewer of them that are there already stay the text that is read until all have come: a tokenizer
    may learn from them meanwhile. Returns {name: reason} of the shards that are still missing, {}
    where all are there.
    """
    if not 1 <= shards <= LAST_SHARD:
        raise UserError(f"-n takes 1 to {LAST_SHARD} shards, not {shards}")
    if workers < 1:
        raise UserError(f"--workers takes 1 or more, not {workers}")

    folder = get_base_dir() / "base_data"
    folder.mkdir(exist_ok=True)
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), LAST_SHARD)]
    readable = _is_beginning(folder, names)
    pinned = {"source": "fineweb", "files": names[:-1], "validation": names[-1]}
    index = json.dumps(pinned, indent=1)
    todo = [name for name in names if not (folder / name).exists()]
    if not todo:
        atomic_write(folder / "index.json", index)
        return {}

    hub_token()  # a bad one is refused before the first download
    endpoint = hub_endpoint()
    stop = threading.Event()

    def fetch(name):
        url = f"{endpoint}/datasets/{REPOSITORY}/resolve/main/{name}"
        reason = download(url, folder / name, stop)
        if reason is None and not readable:
            # From the first shard on, this download is what the folder holds. A download that
            # brings nothing leaves the text that was there.
            atomic_write(folder / "index.json", index)
        outcome = "done" if reason is None else f"failed: {reason}"
        done = sum((folder / other).exists() for other in todo)
        print0(f"{name} {outcome}, {done} of {len(todo)}")
        return reason

    with ThreadPoolExecutor(workers) as pool:
        try:
            reasons = list(pool.map(fetch, todo))
        except BaseException:  # Ctrl+C, a full disk: the other threads end at their next block
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    missing = {name: reason for name, reason in zip(todo, reasons) if reason is not None}
    if not missing:
        atomic_write(folder / "index.json", index)
    return missing


def _is_beginning(folder, names):
    """Whether what `folder` holds, whole, are the first shards of `names` and its validation."""
    pinned = read_index(folder / "index.json")
    if not pinned or pinned["validation"] != names[-1]:
        return False
    files = pinned["files"]
    return files == names[:len(files)] and all((folder / name).exists() for name in files)


# ----------------------------------------------------------------------------------------------
# the command

def main():
    settings = configure(globals(), aliases={"n": "shards"})
    start = time.time()
    kind = source
    if not kind:
        kind = "local" if shards is None else "fineweb"

    if kind == "fineweb":
        fields = {}
        missing = download_fineweb(DEFAULT_SHARDS if shards is None else shards, workers)
        if missing:
            names = ", ".join(sorted(missing))
            print(
                f"error: {len(missing)} shards are missing, "
                f"the same command again fetches only those: {names}",
                file=sys.stderr,
            )
            raise SystemExit(1)
    elif kind in ("local", "installed"):
        if shards is not None:
            raise UserError(f"-n is for --source=fineweb: {kind} text is always taken whole")
        index = build_local(kind)
        fields = {"origins": index["origins"], "documents": index["documents"]}
    else:
        raise UserError(f"--source is local, installed or fineweb, not {kind!r}")

    seconds = time.time() - start
    finish_stage("dataset", seconds, settings, source=kind, files=len(parquet_paths()), **fields)


if __name__ == "__main__":
    main()
