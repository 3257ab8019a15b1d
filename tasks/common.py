"""What a task is: a numbered list of conversations, with a way to judge an answer. Tasks combine to mixtures and sequences.

A conversation is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; the content of an
assistant message is text, or a list of parts {"type": "text" | "python" | "python_output", "text": ...}.
"""
import random
import re

from nanochat.common import UserError, fraction

TEST_SHARE = 0.1


def split_of(item):
    """"test" or "train", decided by what the item is and by nothing else, so that no item is ever in both.

    (A split made by different seeds is none: the same item can be drawn in both, and random.seed(1) equals random.seed(-1).)
    """
    return "test" if fraction("split " + item) < TEST_SHARE else "train"


def check_split(split):
    if split not in ("train", "test"):
        raise UserError(f"split is train or test, not {split!r}")
    return split


def conversation(question, answer, **fields):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def answer_text(parts):
    """The text that the user reads, of parts or of plain text: tool calls and their outputs left out."""
    return parts if isinstance(parts, str) else "".join(part["text"] for part in parts if part["type"] == "text")


def last_number(text):
    """The last whole number of a text as an int, or None. `1,000`, `1000` and `1000.0` are one number."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("\N{MINUS SIGN}", "-"))
    whole, _, rest = found[-1].replace(",", "").partition(".") if found else ("", "", "")
    return int(whole) if found and len(whole) < 100 and not rest.strip("0") else None


class Task:
    """Conversations `start` to `stop` of a data set. Subclasses give num_examples(), get_example(i) and evaluate().

    chance: the share of right answers that guessing gives.
    """

    chance = 0.0

    def __init__(self, start=0, stop=None):
        self.start, self.stop = start, stop

    def num_examples(self):
        """Size of the whole data set, `start` and `stop` left aside."""
        raise NotImplementedError

    def get_example(self, i):
        """Conversation i of the whole data set; the same at every call."""
        raise NotImplementedError

    def evaluate(self, conversation, parts):
        """True if `parts` (what tokenizer.parse_completion returns) answers the conversation's last question rightly."""
        raise NotImplementedError

    def __len__(self):
        return len(range(self.num_examples())[self.start:self.stop])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return self.get_example(range(self.num_examples())[self.start:self.stop][i])


class TaskSequence(Task):
    """The examples of several tasks, one task after the other."""

    def __init__(self, tasks, **slice_):
        super().__init__(**slice_)
        self.tasks = list(tasks)
        self.order = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]

    def num_examples(self):
        return len(self.order)

    def get_example(self, i):
        task, row = self.order[i]
        return self.tasks[task][row]


class TaskMixture(TaskSequence):
    """Every example of every task exactly once, in an order shuffled with a fixed seed. List a task twice to weigh it double."""

    def __init__(self, tasks, **slice_):
        super().__init__(tasks, **slice_)
        random.Random(42).shuffle(self.order)


def render_mc(question, letters, choices):
    """A multiple-choice question as text. The letter comes after its choice: a small model binds what it has just read.

    >>> print(render_mc("What does abs do?", "AB", ["Adds.", "Takes away the sign."]))
    What does abs do?
    - Adds.=A
    - Takes away the sign.=B
    """
    return "\n".join([question, *(f"- {choice}={letter}" for letter, choice in zip(letters, choices))])
