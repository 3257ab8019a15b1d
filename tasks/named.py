"""The tasks by name, for chat_eval and chat_rl.

    make_task("GSM8K", "train")
    make_task("arithmetic", "test", size=256)
    make_task("qa.jsonl")                   # a file of questions (tasks/questions.py)
    make_task("mine.py")                    # a task of your own (tasks/task_file.py)

Upper and lower case, hyphens and underscores make no difference in a name.
"""
import difflib
import os
import re
from typing import NamedTuple

from nanochat.common import UserError, expand_home
from nanochat.hub import on_first_rank
from nanochat.sandbox import layers_here
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic, TwoSteps
from tasks.chat_data import mmlu_for_training
from tasks.follow_up import FollowUp
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity, identity_of
from tasks.mmlu import MMLU
from tasks.own_text import OwnText
from tasks.pydoc import PyDoc
from tasks.questions import Questions
from tasks.scope import Scope, WrittenScope
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.task_file import load_task


class About(NamedTuple):
    """What the tasks about a chat itself are made of."""
    meta: dict = {}             # of its checkpoint
    passages: object = None     # the user's text, as load_passages() returns it
    custom: str = None          # the file of the task `custom`
    allow_missing: tuple = ()   # layers of the sandbox that may be missing, of HumanEval


class Request(NamedTuple):
    """What a task is asked for."""
    split: str      # train or test
    size: int       # how many items, of a task that makes its items up
    about: About
    fetch: bool     # whether a data set of the hub may be fetched


# ------------------------------------------------------------------------------------------------
# the table

def _identity(request):
    meta, passages = request.about[:2]
    name, own = identity_of(meta)
    return Identity(request.split, name, own, passages is not None, stop=request.size)


def _own_text(request):
    meta, passages = request.about[:2]
    if passages is None:
        raise UserError(
            "own_text: this chat was not trained on a text of yours, ask for other tasks")
    form = meta.get("settings", {}).get("own_text", "lookup")
    return OwnText(request.split, passages.passages, request.size, form)


def _pydoc(form):
    return lambda request: PyDoc(request.split, form, stop=request.size)


def _written_scope(request):
    if request.split == "train":
        raise UserError(
            "scope_written: its 200 questions are there to be asked, and train nothing: practise "
            "scope in its place")
    return WrittenScope()


def _arc(subset):
    return lambda request: ARC(subset, request.split, fetch=request.fetch)


def _mmlu(request):
    if request.split == "train":
        return mmlu_for_training(request.fetch)
    return MMLU(request.split, request.fetch)


def _human_eval(request):
    return HumanEval(request.split, request.fetch, request.about.allow_missing)


def _custom(request):
    if request.about.custom is None:
        raise UserError("the task custom asks the questions of a file: add --custom=qa.jsonl to "
                        "chat_eval, or name the file itself, --tasks=qa.jsonl")
    return Questions(request.about.custom)


MADE = {
    "arithmetic": lambda request: Arithmetic(request.split, request.size),
    "spelling": lambda request: SimpleSpelling(request.split, request.size),
    "counting": lambda request: SpellingBee(request.split, request.size),
    "pydoc": _pydoc("choice"),
    "pydoc_letter": _pydoc("letter"),
    "pydoc_module": _pydoc("module"),
    "pydoc_what": _pydoc("what"),
    "two_steps": lambda request: TwoSteps(request.split, request.size),
    "follow_up": lambda request: FollowUp(request.split, request.size),
    "scope": lambda request: Scope(request.split, request.size),
    "scope_written": _written_scope,
    "identity": _identity,
    "own_text": _own_text,
    "own_text_practised": lambda request: _own_text(request._replace(split="train")),
}
FROM_HUB = {
    "ARC-Easy": _arc("ARC-Easy"),
    "ARC-Challenge": _arc("ARC-Challenge"),
    "MMLU": _mmlu,
    "GSM8K": lambda request: GSM8K(request.split, request.fetch),
    "HumanEval": _human_eval,
}
TASKS = {**MADE, **FROM_HUB, "custom": _custom}
# what is asked of a chat alone that practised the local mixture, and no text of the user's
OF_LOCAL_MIXTURE = (
    "pydoc",
    "pydoc_letter",
    "pydoc_module",
    "pydoc_what",
    "two_steps",
    "follow_up",
    "scope",
    "scope_written",
)
ALIASES = {"spellingbee": "counting", "simplespelling": "spelling"}


# ------------------------------------------------------------------------------------------------
# names

def _plain(name):
    return re.sub("[-_ ]", "", name).lower()


def split_names(text):
    """The names in a list with commas or bars between them; a file may have these in its name."""
    is_file = os.path.isfile(expand_home(text, "write the whole path"))
    return [text] if is_file else [name.strip() for name in re.split("[,|]", text)]


def is_file(name):
    """Whether a name is the path of a file, there or not, and not that of a task."""
    is_a_path = "." in name or os.sep in name
    return is_a_path or os.path.exists(name)


def is_of_user(name):
    """Whether a task's items are a file of the user's, of which all are asked."""
    return name == "custom" or name not in TASKS


def task_name(name):
    """The name as the table has it; that of a file is left as it is.

    UserError, with the nearest names, for one that is in no table.

    >>> task_name("arc_easy"), task_name("SpellingBee"), task_name("qa.jsonl")
    ('ARC-Easy', 'counting', 'qa.jsonl')
    """
    known = {**{_plain(known): known for known in TASKS}, **ALIASES}
    found = known.get(_plain(name))
    if found:
        return found
    if is_file(name):
        return name
    near = difflib.get_close_matches(_plain(name), known, n=2)
    meant = " or ".join(dict.fromkeys(known[key] for key in near))
    hint = f"did you mean {meant}? Else " if meant else ""
    raise UserError(
        f"task {name} does not exist: {hint}choose from {', '.join(TASKS)}, or name a file of "
        "questions (jsonl, json, csv, parquet) or a Python file with a task")


def make_task(name, split="test", size=1000, about=About(), fetch=False):
    """The task of a name or a file.

    split: train or test; a file of questions has the same items in both.
    size: of a task that makes its items up; data sets and files come whole.
    fetch: False reads data sets of the hub from the cache alone.
    UserError for an unknown name, and where the items cannot be had.
    """
    name = task_name(name)
    if name in TASKS:
        return TASKS[name](Request(split, size, about, fetch))
    if name.endswith(".py"):
        return load_task(name, split, size)
    return Questions(name)


def fetch_tasks(names, split="test"):
    """Fetch what named tasks need of the hub; every rank calls it. The error where that fails.

    Afterwards make_task() finds it in the cache.
    """
    from_hub = [name for name in names if name in FROM_HUB]
    if not from_hub:
        return None
    return on_first_rank(lambda: [make_task(name, split, fetch=True) for name in from_hub])


def sandbox_error(names, allow_missing=()):
    """Why the answers to named tasks cannot be judged here; None where they can.

    Every rank calls it. HumanEval runs programs, which a system has to confine. allow_missing: as
    of layers_here().
    """
    if "HumanEval" not in names:
        return None
    return on_first_rank(lambda: layers_here(allow_missing))
