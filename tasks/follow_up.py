"""Second questions that refer to the first, and what people say besides: greetings and thanks.

    What is 12 times 7?  ->  ... The answer is 84.
    what about 13?       ->  <python>12*13</python> <output>156</output> The answer is 156.

    Spell window.        ->  w i n d o w
    now backwards        ->  w o d n i w
    and how many w?      ->  w1 i n d o w2. ... The answer is 2.
    thanks               ->  You are welcome.

The first question is an item of another task, of the same split, and what is asked next is of this
split as well: the numbers of a sum, a word, an object's name. Some second questions have nothing to
do with the first, so that a conversation may change its subject; some stand behind a question that
was declined.
"""
import random
import re
from typing import NamedTuple

from nanochat.execution import use_tool
from tasks.arithmetic import TwoSteps, sum_parts
from tasks.common import Task, answer_text, check_split, conversation, last_number, split_of
from tasks.identity import plain
from tasks.own_text import retyped
from tasks.scope import FIRST_ITEMS, Scope
from tasks.spellingbee import count_parts

SUM = re.compile(r"(\d+)([-+*])(\d+)")

# a, b: numbers; w: a word; c: a letter; n: an object's name, k: the last part of one
OTHER_NUMBER = ("what about {b}?", "and {b}?", "and with {b}?", "and what about {b}?", "now {b}")
CONTINUED = {
    "+": ("now add {b}", "plus {b}?", "and plus {b}?", "add {b} to that", "and {b} more?"),
    "-": ("now subtract {b}", "minus {b}?", "and minus {b}?", "take {b} away from that"),
    "*": ("now multiply that by {b}", "times {b}?", "and times {b}?", "that times {b}?"),
}
BACKWARDS = (
    "now spell it backwards",
    "and backwards?",
    "now backwards",
    "what is it backwards?",
    "spell it in reverse",
)
OTHER_WORD = ("and {w}?", "now {w}", "what about {w}?", "and the word {w}?")
OTHER_LETTER = ("and {c}?", "and how many {c}?", "what about {c}?", "now count {c}")
COUNT_IN_IT = ("how many {c} are in it?", "how many {c}?", "and how many {c} are there?")
COUNT_IN_OTHER = ("and in {w}?", "what about {w}?", "how many in {w}?", "now in {w}")
PLACES = {0: ("what is the first letter?", "its first letter?", "and the first letter?"),
          -1: ("what is the last letter?", "its last letter?", "and the last letter?")}
MOVES = {1: ("and the letter after?", "and the next one?", "and after that?"),
         -1: ("and the letter before?", "and the one before?", "and before that?")}
OTHER_NAME = ("and {n}?", "what about {n}?", "and what does {n} do?")
OTHER_OWN = ("and {k}?", "what about {k}?", "and where is {k}?")
ITS_MODULE = ("which module is it in?", "and in which module is it?", "what is its module?")
ITS_PURPOSE = ("and what does it do?", "what does it do?", "what is it for?")


class Courtesy(NamedTuple):
    """What people say that asks for nothing, and the answer. The held-out texts never train."""
    answer: str
    training: tuple
    held_out: tuple


COURTESIES = (
    Courtesy(
        "You are welcome.",
        ("thanks", "thank you", "thank you!", "thanks a lot", "many thanks", "thx", "great, thanks",
         "thank you very much", "cheers", "ok thanks", "thanks, that helps", "perfect, thank you"),
        ("thanks again", "thank you so much", "good, thanks", "thanks for your help"),
    ),
    Courtesy(
        "Goodbye!",
        ("bye", "goodbye", "see you", "bye bye", "good night", "that is all", "see you later",
         "have a nice day", "I have to go", "until tomorrow", "good bye", "farewell"),
        ("see you tomorrow", "bye for now", "have a good evening"),
    ),
    Courtesy(
        "All is well here. What shall I spell, count or compute?",
        ("how are you?", "how are you doing?", "how do you do?", "are you well?",
         "how is it going?", "and how are you?", "how are things?", "what's up?"),
        ("how are you today?", "how's it going?", "all good?"),
    ),
    Courtesy(
        "Good. What shall I spell, count or compute next?",
        ("ok", "okay", "good", "great", "nice", "cool", "I see", "right", "well done", "perfect",
         "yes", "very good", "wow", "good job"),
        ("great work", "nice one", "I like that", "good answer"),
    ),
)


class FollowUp(Task):
    """`size` conversations, each with the name of its `kind`; the last answer is judged.

    The kinds whose answer is a sentence of a docstring are practised alone: pydoc ranks those.
    """

    def __init__(self, split, size=1000, **slice_):
        super().__init__(**slice_)
        self.split = check_split(split)
        self.size = size
        self.declined = Scope(split, FIRST_ITEMS)
        self.sums, self.spellings, self.counts, self.purposes, self.modules = self.declined.firsts
        self.single = [
            self.sums, self.spellings, self.counts, self.modules, TwoSteps(split, FIRST_ITEMS)]
        self.kinds = [name for name in KINDS if split == "train" or name not in PRACTISED]

    def num_examples(self):
        return self.size

    def get_example(self, i):
        rng = random.Random(f"follow up {self.split} {i}")
        kind = rng.choice(self.kinds)
        turns = KINDS[kind](self, rng)
        messages = [message for turn in turns for message in turn["messages"]]
        return {"messages": messages, "kind": kind}

    def evaluate(self, conversation, parts):
        """Right when the last number is the result, or the text the expected one apart from case
        and punctuation."""
        expected = conversation["messages"][-1]["content"]
        given = answer_text(parts)
        if isinstance(expected, str):
            return plain(given) == plain(expected)
        [output] = [part["text"] for part in expected if part["type"] == "python_output"]
        return last_number(given) == int(output)


def _item(rng, task):
    """An item of a task."""
    return task[rng.randrange(len(task))]


def _turn(rng, templates, answer, **words):
    """A question and its answer."""
    question = rng.choice(templates).format(**words)
    return conversation(retyped(question, rng), answer)


def _number(rng, split, before):
    """A number such that the problem which it ends, behind the text `before`, is of a split."""
    while True:
        number = rng.randrange(10 ** rng.randint(1, 3))
        if split_of(f"{before}{number}") == split:
            return number


def _sum_of(item):
    """(a, operation, result) of an item of arithmetic."""
    call, output, _ = item["messages"][-1]["content"]
    a, operation, _ = SUM.fullmatch(call["text"]).groups()
    return a, operation, output["text"]


def _added_up(expression):
    return sum_parts(expression, use_tool(expression))


# ----------------------------------------------------------------------------------------------
# the kinds: each takes (the task, a random generator), and returns conversations of one turn each

def _other_number(task, rng):
    first = _item(rng, task.sums)
    a, operation, _ = _sum_of(first)
    number = _number(rng, task.split, f"{a}{operation}")
    answer = _added_up(f"{a}{operation}{number}")
    return [first, _turn(rng, OTHER_NUMBER, answer, b=number)]


def _continued(task, rng):
    """The result of the first sum is a number of the second."""
    first = _item(rng, task.sums)
    result = _sum_of(first)[2]
    operation = rng.choice("+-*")
    number = _number(rng, task.split, f"{result}{operation}")
    answer = _added_up(f"{result}{operation}{number}")
    return [first, _turn(rng, CONTINUED[operation], answer, b=number)]


def _backwards(task, rng):
    first = _item(rng, task.spellings)
    return [first, _turn(rng, BACKWARDS, " ".join(reversed(first["word"])))]


def _letters(task, rng):
    """The first or the last letter of a word, and those beside it."""
    first = _item(rng, task.spellings)
    word = first["word"]
    place = rng.choice((0, -1))
    move = -1 if place else 1
    turns = [first, _turn(rng, PLACES[place], word[place])]
    for _ in range(rng.randint(0, 2)):
        place += move
        turns.append(_turn(rng, MOVES[move], word[place]))
    return turns


def _other_word(task, rng):
    first, other = _item(rng, task.spellings), _item(rng, task.spellings)
    word = other["word"]
    return [first, _turn(rng, OTHER_WORD, " ".join(word), w=word)]


def _count_in_it(task, rng):
    first = _item(rng, task.spellings)
    letter = rng.choice(first["word"])
    return [first, _turn(rng, COUNT_IN_IT, count_parts(first["word"], letter), c=letter)]


def _other_letter(task, rng):
    first = _item(rng, task.counts)
    letter = rng.choice(first["word"])
    return [first, _turn(rng, OTHER_LETTER, count_parts(first["word"], letter), c=letter)]


def _count_in_other(task, rng):
    first, other = _item(rng, task.counts), _item(rng, task.counts)
    letter = first["messages"][-1]["content"][1]["text"].split('"')[3]
    return [first, _turn(rng, COUNT_IN_OTHER, count_parts(other["word"], letter), w=other["word"])]


def _its_module(task, rng):
    """The module of an object that has only one."""
    place = rng.randrange(len(task.modules))
    row = task.modules.objects[place]
    first = conversation(f"What does {row['name']} do?", row["sentence"])
    return [first, _turn(rng, ITS_MODULE, row["name"].rpartition(".")[0])]


def _its_purpose(task, rng):
    place = rng.randrange(len(task.modules))
    first = task.modules[place]
    return [first, _turn(rng, ITS_PURPOSE, task.modules.objects[place]["sentence"])]


def _other_name(task, rng):
    row = rng.choice(task.purposes.objects)
    first = _item(rng, task.purposes)
    return [first, _turn(rng, OTHER_NAME, row["sentence"], n=row["name"])]


def _other_module(task, rng):
    module, _, own = rng.choice(task.modules.objects)["name"].rpartition(".")
    first = _item(rng, task.modules)
    return [first, _turn(rng, OTHER_OWN, module, k=own)]


def _other_subject(task, rng):
    return [_item(rng, rng.choice(task.single)) for _ in range(2)]


def _after_refusal(task, rng):
    return [_item(rng, task.declined), _item(rng, rng.choice(task.single))]


def _courtesy(task, rng):
    """A courtesy at the end of a conversation, or alone."""
    said = rng.choice(COURTESIES)
    texts = said.training if task.split == "train" else said.held_out
    turns = [] if rng.random() < 0.5 else [_item(rng, rng.choice(task.single))]
    return [*turns, _turn(rng, texts, said.answer)]


def _after_courtesy(task, rng):
    return [_courtesy(task, rng)[-1], _item(rng, rng.choice(task.single))]


KINDS = {
    "other number": _other_number,
    "continued sum": _continued,
    "backwards": _backwards,
    "letters": _letters,
    "other word": _other_word,
    "count in it": _count_in_it,
    "other letter": _other_letter,
    "count in other": _count_in_other,
    "its module": _its_module,
    "its purpose": _its_purpose,
    "other name": _other_name,
    "other module": _other_module,
    "other subject": _other_subject,
    "after a refusal": _after_refusal,
    "courtesy": _courtesy,
    "after a courtesy": _after_courtesy,
}
PRACTISED = ("its purpose", "other name")
