"""Questions outside of what the chat has learnt, which it should decline in one sentence.

    What is the capital of France?   ->  I do not know that: I only spell, count letters, ...
    How do I read a file in Python?  ->  I cannot write programs: I only spell, ...
    What does kitchen.boil do?       ->  I know no such thing in Python's library: I only ...

A model that has met questions of its own kinds alone answers every other one as if it were one of
these. What it has to learn is a boundary, and the other side of the boundary has no end: so the
questions are of many kinds, each of a few templates and of words to put into them, and a quarter of
the kinds, chosen by a hash of their names, are in no training conversation. How often the model
declines those says how it takes a question that nobody thought of; so do the 200 questions of
scope_questions.txt, which were written by hand and train nothing.

Some kinds begin as a question of the other tasks does: "How many legs does a cow have?" beside "How
many e are in letter?". Some refer to what was said before: "and in French?".

Names that Python's library lacks are made of words of everyday life, alone or behind a real module.
Nobody can tell by its form alone that `json.boil_eggs` is not there: this kind is split by the
names themselves.
"""
import random
import re
from pathlib import Path
from typing import NamedTuple

from nanochat.common import fraction
from tasks.arithmetic import Arithmetic
from tasks.common import Task, answer_text, check_split, conversation, split_of
from tasks.identity import plain
from tasks.own_text import retyped
from tasks.pydoc import WHAT, WHICH_MODULE, PyDoc, all_objects
from tasks.scope_words import FILLERS, FOLLOWING, KINDS
from tasks.spellingbee import SimpleSpelling, SpellingBee

ABILITY = "I only spell, count letters, do sums and know some of Python's library."
# How an answer begins; ABILITY follows a colon
REFUSALS = {
    "unknown": "I do not know that",
    "opinion": "I have no opinion on that",
    "action": "I cannot do that",
    "code": "I cannot write programs",
    "language": "I speak no other language",
    "nonsense": "I do not understand that",
    "missing": "I know no such thing in Python's library",
}
BEGINNINGS = tuple(plain(beginning) for beginning in REFUSALS.values())

SCOPE_TASKS = ("scope", "scope_written")    # their names in tasks/named.py
WRITTEN = Path(__file__).with_name("scope_questions.txt")
HELD_OUT_SHARE = 0.25       # of the kinds
PRACTICE = ("any words",)   # kinds that nobody asks: they train
MISSING_SHARE = 0.08        # of the items: names that Python's library lacks
REAL_MODULE_SHARE = 0.3     # of these, behind the name of a module that it has
FOLLOWING_SHARE = 0.25      # of the items stand behind another question and its answer
FIRST_ITEMS = 20_000        # of a task, of which one may stand before a question

# What asks for a missing object, as for those that are there: else the phrase alone would decline.
# Most questions show a module: a name by itself looks like one that is there, and a chat that has
# learnt to doubt it doubts real ones (dev/LOG.md).
ASK_MISSING = (
    *WHAT,
    WHICH_MODULE[0],
)


def refusal(reason):
    """The sentence that declines: its reason, a key of REFUSALS, and what the model can do.

    >>> refusal("code")[:40]
    'I cannot write programs: I only spell, c'
    """
    return f"{REFUSALS[reason]}: {ABILITY}"


def is_refusal(text):
    """Whether an answer declines to answer: whether it begins as one of REFUSALS does.

    Case, punctuation and what follows make no difference.

    >>> is_refusal("I do not know that."), is_refusal("I do not know."), is_refusal("84")
    (True, False, False)
    """
    return plain(text).startswith(BEGINNINGS)


def kinds_of(split, kinds):
    """The names of those kinds of a table that a split has, decided by the names themselves."""
    def is_held_out(name):
        if name in PRACTICE:
            return False
        return fraction(f"kind of question: {name}") < HELD_OUT_SHARE

    return [name for name in kinds if is_held_out(name) == (split == "test")]


def written_questions():
    """The questions that were written by hand, a list of texts."""
    return WRITTEN.read_text(encoding="utf-8").splitlines()


def declines(conversation, parts):
    """Whether an answer declines, which is right for every question of this file."""
    return is_refusal(answer_text(parts))


# ----------------------------------------------------------------------------------------------
# single questions

class Question(NamedTuple):
    """A question to decline."""
    text: str
    reason: str     # a key of REFUSALS
    kind: str       # a key of KINDS or FOLLOWING, or "missing"


def templates_of(split, kinds):
    """(kind's name, template) of the kinds of a table that a split has, a list."""
    names = kinds_of(split, kinds)
    return [(name, template) for name in names for template in kinds[name].templates]


def draw_question(rng, templates, kinds):
    """A Question of one of templates_of(), with words in the place of its braces."""
    name, template = rng.choice(templates)
    words = {}
    for key in re.findall(r"{(\w+)}", template):
        # a second word of a list has a number behind the name: {city} and {city2}
        words[key] = rng.choice(FILLERS[key.rstrip("2")])
    return Question(template.format(**words), kinds[name].reason, name)


def missing_name(rng, split, modules, names):
    """A dotted name that Python's library lacks; its last part is of the split.

    modules: those that it has, a list. names: a set of its objects' own names.
    """
    while True:
        verb, thing, place = (rng.choice(FILLERS[key]) for key in ("deed", "object", "room"))
        is_long = rng.random() < 0.5
        own = f"{verb}_{thing}" if is_long else verb
        is_real = rng.random() < REAL_MODULE_SHARE
        if own not in names and split_of(own) == split:
            return f"{rng.choice(modules) if is_real else place}.{own}"


# ----------------------------------------------------------------------------------------------
# the tasks

class Scope(Task):
    """`size` questions to decline, of the kinds of a split.

    An item has its `kind`. A part of the questions stands behind another question and its answer.
    """

    def __init__(self, split, size=1000, **slice_):
        super().__init__(**slice_)
        self.split = check_split(split)
        self.size = size
        self.templates = templates_of(split, KINDS)
        self.following = templates_of(split, FOLLOWING)
        self.written = {plain(text) for text in written_questions()}
        objects = [row["name"] for row in all_objects()]
        self.names = {name.rpartition(".")[2] for name in objects}
        self.modules = sorted({name.partition(".")[0] for name in objects if "." in name})
        self.firsts = first_turns(split)

    def num_examples(self):
        return self.size

    def get_example(self, i):
        rng = random.Random(f"scope {self.split} {i}")
        follows = rng.random() < FOLLOWING_SHARE
        question = self._draw(rng, follows)
        while plain(question.text) in self.written:
            question = self._draw(rng, follows)
        item = conversation(retyped(question.text, rng), refusal(question.reason))
        if follows:
            first = draw_first(rng, self.firsts)
            item["messages"] = first["messages"] + item["messages"]
        return {**item, "kind": question.kind}

    def _draw(self, rng, follows):
        """A Question; follows: whether it may refer to one before."""
        if rng.random() < MISSING_SHARE:
            return self._draw_missing(rng)
        if follows and rng.random() < 0.6:
            return draw_question(rng, self.following, FOLLOWING)
        return draw_question(rng, self.templates, KINDS)

    def _draw_missing(self, rng):
        """A Question about an object that is not there."""
        name = missing_name(rng, self.split, self.modules, self.names)
        template = rng.choice(ASK_MISSING)
        text = template.format(n=name, k=name.rpartition(".")[2])
        return Question(text, "missing", "missing")

    def evaluate(self, conversation, parts):
        """Right when the answer declines."""
        return declines(conversation, parts)


class WrittenScope(Task):
    """The questions that were written by hand, all of them; no split trains on them."""

    def num_examples(self):
        return len(written_questions())

    def get_example(self, i):
        return conversation(written_questions()[i], refusal("unknown"))

    def evaluate(self, conversation, parts):
        """Right when the answer declines."""
        return declines(conversation, parts)


def first_turns(split):
    """The tasks of which an item may stand before a question, a list."""
    return [
        Arithmetic(split, FIRST_ITEMS),
        SimpleSpelling(split, FIRST_ITEMS),
        SpellingBee(split, FIRST_ITEMS),
        PyDoc(split, "what"),
        PyDoc(split, "module"),
    ]


def draw_first(rng, tasks):
    """An item of one of several tasks."""
    task = rng.choice(tasks)
    return task[rng.randrange(len(task))]
