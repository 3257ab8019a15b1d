"""The files of CORE: which tasks there are, their rows, and what guessing would score.

CORE is the mean over 22 tasks of DataComp-LM (arXiv 2406.11794, section 3.5). A folder holds them:

    core.yaml            the tasks: label, file of rows, shots, kind, delimiter
    eval_meta_data.csv   the accuracy of guessing for each task, in percent
    eval_data/           the rows, one JSON object a line

The reader of core.yaml knows the flat shape of that file, not all of YAML, and says which line it
does not know. What a row of each kind must hold stands in FIELDS.
"""
import csv
import json
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, expand_home, get_base_dir, print0
from nanochat.download import download, zip_problem
from nanochat.hub import is_offline, locked

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
REMEDY = (f"unpack {BUNDLE_URL} into $NANOCHAT_BASE_DIR, "
          "or name the folder that holds core.yaml with --bundle")
PROGRESS_SECONDS = 5

# What a row of each kind of task holds
FIELDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
# The list of a row whose item `gold` is right
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


class CoreTask(NamedTuple):
    """One task of CORE."""
    label: str
    kind: str          # a key of FIELDS
    shots: int         # solved examples before each question
    delimiter: str     # between a context and its continuation
    baseline: float    # the accuracy of guessing, from 0 to 1
    rows: list         # of dicts, in the order of the file


# --------------------------------------------------------------------------------------------------
# where the folder is

def find_bundle(named=None):
    """The folder with core.yaml, a Path: the one that is named, else base directory/eval_bundle.

    UserError where there is none; fetch_bundle() brings the public one.
    """
    folder = get_base_dir() / "eval_bundle"
    if named:
        folder = Path(expand_home(named, "write the whole path"))
    if not (folder / "core.yaml").is_file():
        raise UserError(f"no CORE bundle in {folder} (core.yaml is missing): {REMEDY}")
    return folder


def fetch_bundle():
    """Bring the public bundle into the base directory, unless it is there.

    UserError where it is not to be had.
    """
    base = get_base_dir()
    if _has_bundle(base):
        return
    # machines that share the folder: one fetches it, the others find it
    with locked(base):
        if not _has_bundle(base):
            _fetch_into(base)


def _has_bundle(base):
    return (base / "eval_bundle" / "core.yaml").is_file()


def _fetch_into(base):
    """Bring the public bundle into a folder (a Path); as fetch_bundle()."""
    archive = base / "eval_bundle.zip"
    reason = "HF_HUB_OFFLINE is set" if is_offline() else None
    if reason is None:
        print0(f"fetching the CORE bundle from {BUNDLE_URL}")
        reason = download(
            BUNDLE_URL,
            archive,
            threading.Event(),
            progress=_say_progress(),
            check=zip_problem,
            auth=None,
        )
    if reason:
        raise UserError(f"no CORE bundle in {base}/eval_bundle, and the download failed "
                        f"({reason}): {REMEDY}")
    unpack(archive, base)
    archive.unlink()


def _say_progress():
    """A function that download() calls after every block; it prints a line every few seconds."""
    said_at = time.perf_counter()

    def say(have, length):
        nonlocal said_at
        if time.perf_counter() - said_at > PROGRESS_SECONDS:
            said_at = time.perf_counter()
            whole = f" of {length / 1e6:.0f}" if length else ""
            print0(f"CORE bundle: {have / 1e6:.0f}{whole} MB")
    return say


def unpack(archive, base):
    """Unpack eval_bundle/ of a zip file into `base`, whole or not at all. Both are Paths."""
    draft = base / "eval_bundle.unpacking"
    shutil.rmtree(draft, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        wanted = [name for name in file.namelist() if name.startswith("eval_bundle/")]
        file.extractall(draft, wanted)  # it removes ".." and absolute paths itself
    if not (draft / "eval_bundle" / "core.yaml").is_file():
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(f"{archive} holds no eval_bundle/core.yaml: {REMEDY}")
    shutil.rmtree(base / "eval_bundle", ignore_errors=True)
    (draft / "eval_bundle").rename(base / "eval_bundle")
    shutil.rmtree(draft)


# --------------------------------------------------------------------------------------------------
# core.yaml

def _value(text, place):
    """The value of a line of core.yaml: a string, a number, a list of numbers, true or false."""
    text = text.strip()
    quoted = re.match(r'("(?:[^"\\]|\\.)*"|\'[^\']*\')\s*(?:#.*)?$', text)
    if quoted and text.startswith("'"):
        return quoted[1][1:-1]
    if not quoted:
        text = re.sub(r"(^|\s)#.*", "", text).strip()  # a comment
    plain = quoted[1] if quoted else text
    try:
        return json.loads(plain)
    except json.JSONDecodeError:
        pass
    if not plain or plain[0] in "[{\"'&*|>":
        raise UserError(f"{place}: the value {text!r} is not understood: {REMEDY}")
    return plain


def read_task_list(path):
    """The tasks in core.yaml, a list of dicts of what stands there.

        icl_tasks:
        - label: copa
          num_fewshot: [0]

    becomes [{"label": "copa", "num_fewshot": [0]}]. UserError with the line that has another shape.
    """
    tasks, begun = [], False
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        if not begun:
            begun = words == "icl_tasks:"
            if not begun:
                raise UserError(f"{place}: expected icl_tasks: first: {REMEDY}")
            continue
        # a dash begins a task, alone or before its first key
        if words.startswith("-"):
            tasks.append({})
            words = words[1:].strip()
            if not words:
                continue
        found = re.match(r"(\w+):(?:\s+(.*))?$", words)
        if not found or not tasks:
            raise UserError(f"{place}: expected `key: value` of a task, not {words!r}: {REMEDY}")
        tasks[-1][found[1]] = _value(found[2] or '""', place)
    if not tasks:
        raise UserError(f"{path} lists no tasks: {REMEDY}")
    return tasks


def _read_text(path):
    """A text file of the bundle. UserError where it is missing or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the CORE bundle lacks {path}: {REMEDY}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: {REMEDY}") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {REMEDY}") from None


def read_baselines(path):
    """{label: the accuracy of guessing, from 0 to 1} of eval_meta_data.csv.

    Two are the share of the commonest answer and not one over the choices: commonsense_qa, boolq.
    """
    baselines = {}
    for number, row in enumerate(csv.DictReader(_read_text(path).split("\n")), start=2):
        try:
            percent = float(row["Random baseline"])
            baselines[row["Eval Task"]] = percent / 100
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}, line {number}: the columns `Eval Task` and `Random baseline` "
                f"(a number) are missing: {REMEDY}") from None
        if not 0 <= percent < 100:
            raise UserError(f"{path}, line {number}: Random baseline {percent} must be at least 0 "
                            f"and below 100: {REMEDY}")
    return baselines


# --------------------------------------------------------------------------------------------------
# tasks

def _problem_of_row(row, kind):
    """What is wrong with a row of a task of this kind, or ""."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for name, wanted in FIELDS[kind].items():
        if not isinstance(row.get(name), wanted):
            return f"`{name}` must be of type {wanted.__name__}"
    if kind not in OPTIONS:
        return ""
    options = row[OPTIONS[kind]]
    if not all(isinstance(option, str) for option in options):
        return f"`{OPTIONS[kind]}` must hold strings"
    if len(options) < 2 or not 0 <= row["gold"] < len(options):
        return f"gold={row['gold']} must name one of at least 2, there are {len(options)}"
    return ""


def read_rows(path, kind):
    """The rows of a task, a list of dicts. UserError for a file or row that is not as it must be.
    """
    rows = []
    # not splitlines(), for which U+2028 inside of a row ends a line
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON: {REMEDY}") from None
        problem = _problem_of_row(row, kind)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}: {REMEDY}")
        rows.append(row)
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} rows, at least 2 are needed: {REMEDY}")
    return rows


def _read_task(folder, entry, baselines):
    """The CoreTask of an entry of core.yaml."""
    place = f"{folder / 'core.yaml'}, task {entry.get('label', '(without a label)')}"
    for name in ("label", "dataset_uri", "num_fewshot", "icl_task_type"):
        if name not in entry:
            raise UserError(f"{place}: {name} is missing: {REMEDY}")
    delimiter = entry.get("continuation_delimiter", " ")
    texts = {name: entry[name] for name in ("label", "dataset_uri", "icl_task_type")}
    for name, value in {**texts, "continuation_delimiter": delimiter}.items():
        if not isinstance(value, str):
            raise UserError(f"{place}: {name}={value} must be a text: {REMEDY}")
    kind, shots = entry["icl_task_type"], entry["num_fewshot"]
    if isinstance(shots, list):
        shots = shots[0] if shots else None
    if not isinstance(shots, int) or shots < 0:
        raise UserError(f"{place}: num_fewshot={entry['num_fewshot']} must be a number: {REMEDY}")
    if kind not in FIELDS:
        choices = ", ".join(FIELDS)
        raise UserError(f"{place}: icl_task_type={kind} is not one of {choices}: {REMEDY}")
    if entry["label"] not in baselines:
        raise UserError(f"{place} has no baseline in eval_meta_data.csv: {REMEDY}")
    rows = read_rows(folder / "eval_data" / entry["dataset_uri"], kind)
    return CoreTask(entry["label"], kind, shots, delimiter, baselines[entry["label"]], rows)


def read_bundle(folder, names=None):
    """The CoreTasks of a folder (a Path), in the order of core.yaml. names: labels; None: all.

    UserError for a name that is not there, and for files that are missing or wrong.
    """
    entries = read_task_list(folder / "core.yaml")
    baselines = read_baselines(folder / "eval_meta_data.csv")
    labels = [entry.get("label") for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{folder / 'core.yaml'} has the task {label} twice: {REMEDY}")
    for name in names or []:
        if name not in labels:
            known = ", ".join(map(str, labels))
            raise UserError(f"task {name} is not in {folder / 'core.yaml'}: choose from {known}")
    chosen = [entry for entry in entries if not names or entry.get("label") in names]
    return [_read_task(folder, entry, baselines) for entry in chosen]
