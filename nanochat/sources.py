"""Make the text to train on: from the sources on this machine, or from FineWeb-Edu.

    python -m nanochat.dataset                      # the standard library, numpy and torch
    python -m nanochat.dataset --source=installed   # the same, from all installed packages
    python -m nanochat.dataset -n 240               # 240 training shards of FineWeb-Edu
    python -m nanochat.dataset --source=local --holdout=source   # whole packages are validation
    python -m nanochat.dataset --source=books/ --holdout=source  # of your own text, whole files

The first four write parquet shards and their index.json to `$NANOCHAT_BASE_DIR/base_data`, which
nanochat/dataset.py reads. HF_ENDPOINT names a mirror to download from, HF_TOKEN is sent with every
download. The user's own text needs no command: every stage that reads text takes `--data=PATH`.
Where whole files of it are to be validation, the last command writes another folder and prints the
`--data=` that the stages then take.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, atomic_write, fraction, get_base_dir, print0, sha256
from nanochat.configurator import configure
from nanochat.convert import convert_by_source
from nanochat.dataset import parquet_paths
from nanochat.download import download, hub_endpoint, hub_token
from nanochat.holdout import choose_held_out
from nanochat.metrics import finish_stage
from nanochat.shards import read_index, write_shards
from nanochat.textfiles import DOCUMENT_CHARS, split_document
from nanochat.userfiles import existing_path

source: str = None  # local, installed or fineweb; None: fineweb where -n is given, else local
holdout: str = None # source: validation is of whole packages; of a path in --source, whole files
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
UNSEEN_SHARE = 0.025        # of the bytes, in whole packages that are in neither split
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


def package_of(name):
    """The package that a source file belongs to: of "email/header.py" it is "email"."""
    return name.split("/")[0].removesuffix(".py")


def held_out_packages(files, by_source):
    """The names of the packages that are held out whole, a set; files: [(name, path)].

    by_source: for validation, about VALIDATION_SHARE of the bytes. Else they are a split of their
    own, of UNSEEN_SHARE, and validation is of other files: then only packages are chosen of which
    no file is in validation, so that it stays the same. It may be that there are too few.
    """
    sizes = Counter()
    for name, path in files:
        sizes[package_of(name)] += path.stat().st_size
    if by_source:
        return choose_held_out(sizes, VALIDATION_SHARE * sizes.total())

    wanted = UNSEEN_SHARE * sizes.total()
    for name, _ in files:
        if fraction(name) < VALIDATION_SHARE:
            sizes.pop(package_of(name), None)
    return choose_held_out(sizes, wanted) if len(sizes) > 1 else set()


class LocalText(NamedTuple):
    """Documents of installed sources, lists of str.

    unseen: of packages of which nothing is in the other two.
    held_out: the names of the packages of which nothing is in training, sorted.
    table: {origin: {"documents", "mb", "dropped"}}, what each origin gave.
    """

    train: list
    validation: list
    unseen: list
    held_out: list
    table: dict


def collect_local(packages=LOCAL_PACKAGES, by_source=False):
    """The LocalText of installed sources; the same every time.

    A file belongs to validation by the hash of its name, so that no file is in both splits. Some
    packages are held out whole besides. by_source: these alone are validation.

    Files are read in the order of that hash, those that do not train first: what repeats them is
    dropped from training. Documents are ordered by a hash as well, so that any beginning of the
    training text is a fair sample of it: a run on a small machine sees little more.
    """
    files = sorted(python_files(packages), key=lambda file: fraction(file[1]))
    held_out = held_out_packages([file[1:] for file in files], by_source)
    splits = {"validation": [], "unseen": [], "train": []}

    def split_of(name):
        if package_of(name) in held_out:
            return "validation" if by_source else "unseen"
        is_validation = not by_source and fraction(name) < VALIDATION_SHARE
        return "validation" if is_validation else "train"

    order = list(splits)
    files.sort(key=lambda file: order.index(split_of(file[1])))
    seen = Seen()
    table = {}
    for number, (origin, name, path) in enumerate(files):
        if number % 1000 == 0:
            print0(f"reading sources: {number} of {len(files)} files")
        split = splits[split_of(name)]
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
    texts = {split: [text for _, text in sorted(found)] for split, found in splits.items()}
    return LocalText(**texts, held_out=sorted(held_out), table=table)


def build_local(name="local", by_source=False):
    """Build the shards of `local` or `installed` text; returns their index, a dict.

    by_source: validation is of whole packages, see collect_local().
    Nothing is done where the shards of the same sources are there and undamaged.
    """
    folder = get_base_dir() / "base_data"
    folder.mkdir(exist_ok=True)
    packages = LOCAL_PACKAGES if name == "local" else INSTALLED_PACKAGES
    sizes = [(file, path.stat().st_size) for _, file, path in python_files(packages)]
    key = hashlib.sha256(json.dumps([4, by_source, sizes]).encode()).hexdigest()[:16]
    built = _built_before(folder, key)
    if built:
        print0(f"{folder} is up to date")
        return built

    found = collect_local(packages, by_source)
    counts = [len(found.train), len(found.validation), len(found.unseen)]
    print0(
        f"writing {counts[0]} documents to train on, {counts[1]} for validation, {counts[2]} of "
        f"packages that are in neither to {folder}; packages held out: {', '.join(found.held_out)}"
    )
    write_shards(
        folder,
        name,
        found.train,
        found.validation,
        found.unseen,
        source=name,
        key=key,
        origins=found.table,
        documents=counts,
        holdout="source" if by_source else "documents",
        held_out=found.held_out,
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

    if holdout not in (None, "source"):
        raise UserError(f"--holdout is source, or left out, not {holdout!r}")
    by_source = holdout == "source"
    files = None  # of base_data
    if kind == "fineweb":
        fields = {}
        if by_source:
            raise UserError("no file says which source a document of FineWeb-Edu is from: "
                            "leave --holdout out")
        missing = download_fineweb(DEFAULT_SHARDS if shards is None else shards, workers)
        if missing:
            names = ", ".join(sorted(missing))
            print(
                f"error: {len(missing)} shards are missing, "
                f"the same command again fetches only those: {names}",
                file=sys.stderr,
            )
            raise SystemExit(1)
    elif shards is not None:
        raise UserError(f"-n is for --source=fineweb: {kind} text is always taken whole")
    elif kind in ("local", "installed"):
        index = build_local(kind, by_source)
        fields = {
            name: index[name] for name in ("origins", "documents", "holdout", "held_out")
        }
    elif by_source:
        files = convert_by_source(existing_path(kind))
        index = read_index(files / "index.json")
        if index is None:
            raise UserError(f"{files} is damaged: delete it, and give this command again")
        fields = {"folder": str(files), "holdout": "source", "held_out": index["held_out"]}
        print0(f"give the stages --data={files}")
    else:
        raise UserError(f"--source is local, installed or fineweb, not {kind!r}: your own text "
                        "needs --holdout=source here, or no command but --data of the stages")

    seconds = time.time() - start
    count = len(parquet_paths(files))
    finish_stage("dataset", seconds, settings, source=kind, files=count, **fields)


if __name__ == "__main__":
    main()
