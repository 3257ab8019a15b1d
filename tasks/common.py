"""What a task is: a numbered list of conversations, with a way to judge an answer.

Tasks combine to mixtures and sequences. A conversation is

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

The content of an assistant message is text, or a list of parts
{"type": "text" | "python" | "python_output", "text": ...}.
"""
import random
import re
from collections import Counter

from nanochat.common import UserError, fraction, warn_once
from nanochat.conversation import LOOKUP_CALL, check_conversation
from nanochat.hub import load_rows

TEST_SHARE = 0.1
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MAX_DIGITS = 100    # a longer number is no answer
LETTERS = "ABCDEFGHIJ"


def split_of(item):
    """"test" or "train", decided by what the item is and by nothing else.

    So no item is ever in both splits. (Different seeds do not make two splits: the same item can be
    drawn with both, and random.seed(1) equals random.seed(-1).)
    """
    return "test" if fraction("split " + item) < TEST_SHARE else "train"


def check_split(split):
    """`split` itself, which must be "train" or "test"; UserError otherwise."""
    if split not in ("train", "test"):
        raise UserError(f"split is train or test, not {split!r}")
    return split


def conversation(question, answer, **fields):
    """A conversation of one question and one answer.

    fields: what the task adds to it. nanochat/answers.py reads `choices` (sentences to rank, with
    `neutral`, the question they are compared with) or `letters` (answers to pick from, with `stem`,
    the beginning of the question that comes before what is to choose from).
    """
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **fields}


def check_item(item, place):
    """UserError where an item is not a conversation that ends with an answer.

    place: what the error names.
    """
    problem = _problem_of(item)
    if problem:
        raise UserError(f"{place} is no conversation to ask ({problem}): return "
                        "conversation(question, answer) of tasks.common")


def _problem_of(item):
    """What is wrong with an item that must be a conversation with an answer, or ""."""
    try:
        messages = check_conversation(item)
    except UserError as error:
        return str(error)
    if messages[-1]["role"] != "assistant":
        return "the last message is not the assistant's"
    for key in ("letters", "choices"):
        if key in item and not _is_to_pick_from(item[key]):
            return f"its {key} are not a list of at least two texts"
    if "choices" in item and not isinstance(item.get("neutral"), str):
        return "with choices it needs `neutral`, the question that they are compared with"
    return ""


def _is_to_pick_from(texts):
    is_list = isinstance(texts, (list, tuple)) and len(texts) > 1
    return is_list and all(isinstance(text, str) and text for text in texts)


def answer_text(parts):
    """The text that the user reads as the answer: tool calls and their outputs are dropped, but for
    what was looked up.

    parts: a list of parts, or plain text, which is returned as it is.
    """
    if isinstance(parts, str):
        return parts
    texts = []
    for before, part in zip([None, *parts], parts):
        is_quote = before is not None and before["text"] == LOOKUP_CALL
        if part["type"] == "text" or is_quote:
            texts.append(part["text"])
    return "".join(texts)


def last_number(text):
    """The last number of a text as an int, or None where there is none or it is not whole.

    `1,000`, `1000` and `1000.0` are the same number.
    """
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    whole, _, decimals = found[-1].replace(",", "").partition(".")
    if len(whole) >= MAX_DIGITS or decimals.strip("0"):
        return None
    return int(whole)


def canonical_number(text):
    """A number without what does not change it: "1,000.50" becomes "1000.5"."""
    text = text.replace(",", "").replace("\N{MINUS SIGN}", "-")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return re.sub(r"^(-?)0+(?=\d)", r"\1", text)


def f1(expected, given):
    """2PR / (P + R) of the words that two lists have in common, from 0 to 1, as in SQuAD (Rajpurkar
    et al. 2016, arXiv 1606.05250).

    >>> f1(["in", "May"], ["sow", "in", "May", "May"])
    0.6666666666666666
    """
    shared = sum((Counter(expected) & Counter(given)).values())
    return 2 * shared / max(1, len(expected) + len(given))


class Task:
    """Conversations `start` to `stop` of a data set, every `step`-th of them.

    Subclasses give num_examples(), get_example(i) and evaluate().

    chance: the share of right answers that guessing gives.
    """

    chance = 0.0

    def __init__(self, start=0, stop=None, step=1):
        self.start = start
        self.stop = stop
        self.step = step

    def num_examples(self):
        """Size of the whole data set, regardless of `start`, `stop` and `step`."""
        raise NotImplementedError

    def get_example(self, i):
        """Conversation i of the whole data set; the same at every call."""
        raise NotImplementedError

    def evaluate(self, conversation, parts):
        """Whether `parts` answers the conversation's last question rightly.

        parts: what tokenizer.parse_completion returns for the model's answer.
        """
        raise NotImplementedError

    def evaluate_many(self, pairs):
        """[evaluate(conversation, parts)] for a list of such pairs, as bools.

        A task whose judgement takes long judges several answers at the same time.
        """
        return [self.evaluate(conversation, parts) for conversation, parts in pairs]

    def reward(self, conversation, parts):
        """What reinforcement learning gives for an answer, a float; by default 1.0 for a right one.

        parts: as of evaluate().
        """
        return float(self.evaluate(conversation, parts))

    def _indices(self):
        """The range of indices into the whole data set, clamped to what exists."""
        return range(self.num_examples())[self.start:self.stop:self.step]

    def __len__(self):
        return len(self._indices())

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return self.get_example(self._indices()[i])


class HubTask(Task):
    """The rows of one split of a data set of the hub, each of which makes a conversation.

    Subclasses give get_example(i), which reads self.rows[i], a dict, and
    name, config, columns: of the data set, as load_rows() takes them
    documented: {split: rows}, and tolerance, the share by which they may differ

    fetch: False reads the cache alone. UserError and HubError as load_rows() raises them.
    """

    tolerance = 0.0

    def __init__(self, split, fetch=True, **slice_):
        super().__init__(**slice_)
        if split not in self.documented:
            raise UserError(f"split is {' or '.join(self.documented)}, not {split!r}")
        self.split = split
        most = self.stop if (self.stop or 0) > 0 else None
        self.rows = load_rows(self.name, self.config, split, self.columns, fetch, most)
        self._compare_rows(self.documented[split])

    def _compare_rows(self, documented):
        """Warn where a split is not of the size that it is known to have."""
        if abs(self.rows.total - documented) > self.tolerance * documented:
            warn_once(
                f"{self.name} {self.config} {self.split} has {self.rows.total:,} rows where "
                f"{documented:,} are documented: figures do not compare with those of others")

    def num_examples(self):
        return len(self.rows)


class TaskSequence(Task):
    """The examples of several tasks, one task after the other."""

    def __init__(self, tasks, **slice_):
        super().__init__(**slice_)
        self.tasks = list(tasks)
        self.order = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]

    def num_examples(self):
        return len(self.order)

    def get_example(self, i):
        t, example = self.order[i]
        return self.tasks[t][example]


class TaskMixture(TaskSequence):
    """Every example of every task exactly once, in an order shuffled with a fixed seed.

    A task that is listed twice has double weight.
    """

    def __init__(self, tasks, **slice_):
        super().__init__(tasks, **slice_)
        random.Random(42).shuffle(self.order)


def render_mc(question, letters, choices):
    """A multiple-choice question as text.

    The letter comes after its choice: a small model binds what it has just read.

    >>> print(render_mc("What does abs do?", "AB", ["Adds.", "Takes away the sign."]))
    What does abs do?
    - Adds.=A
    - Takes away the sign.=B
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices)]
    return "\n".join([question, *lines])


def choice_conversation(question, choices, gold):
    """A conversation of a question with choices, whose answer is a letter.

    gold: the index of the right choice.
    """
    letters = list(LETTERS[:len(choices)])
    return conversation(
        render_mc(question, letters, choices),
        letters[gold],
        letters=letters,
        stem=question,
    )


def stem_of(conversation):
    """The question of a multiple-choice conversation without its choices, or None.

    None: there is nothing to choose from, or it is not known where the question ends.
    """
    if "choices" in conversation:
        return conversation["messages"][-2]["content"]
    return conversation.get("stem")


def with_stem(conversation, stem):
    """A multiple-choice conversation with the question `stem` in the place of its own.

    What is to choose from, and the right choice, stay.
    """
    *before, asked, answer = conversation["messages"]
    content = stem + asked["content"].removeprefix(stem_of(conversation))
    return {**conversation, "messages": [*before, {**asked, "content": content}, answer]}


def at_equal_distances(count, most):
    """The indices of at most `most` of `count` items, a list; None: of all of them.

    Data sets are sorted: MMLU has its 57 subjects one after the other.

    >>> at_equal_distances(10, 4)
    [0, 2, 5, 7]
    """
    most = count if most is None else min(most, count)
    return [i * count // most for i in range(most)]


def chosen_letter(conversation, parts):
    """Whether an answer is the letter of the right choice."""
    return answer_text(parts).strip() == conversation["messages"][-1]["content"]
