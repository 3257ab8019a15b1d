"""Sums, differences and products of numbers of one to three digits, bare and in words.

The model solves them by calling the Python tool:

    What is 12 times 7?  ->  <python>12*7</python> <output>84</output> The answer is 84.

What there is to learn is not arithmetic but to find the two numbers and the operation, and to leave
the computation to the tool. A sum of two steps is one call: `123*45+7`.
"""
import random

from nanochat.execution import use_tool
from tasks.common import Task, answer_text, check_split, conversation, last_number, split_of

# a, b: the numbers; o: the sign of the operation; n: what is counted
BARE = (
    "{a}{o}{b}",
    "{a} {o} {b}",
    "{a} {o} {b} =",
    "{a}{o}{b}=",
    "{a} {o} {b} = ?",
    "{a} {o} {b}?",
    "What is {a} {o} {b}?",
    "What is {a}{o}{b}?",
    "What's {a} {o} {b}?",
    "Calculate {a} {o} {b}.",
    "Compute {a}{o}{b}.",
    "How much is {a} {o} {b}?",
    "Can you work out {a} {o} {b}?",
)
IN_WORDS = {
    "+": (
        "What is {a} plus {b}?",
        "{a} plus {b}",
        "How much is {a} plus {b}?",
        "Add {a} and {b}.",
        "Add {a} to {b}.",
        "What is the sum of {a} and {b}?",
        "What do you get when you add {a} and {b}?",
        "Calculate {a} plus {b}.",
    ),
    "-": (
        "What is {a} minus {b}?",
        "{a} minus {b}",
        "How much is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "What is {a} less {b}?",
        "What is left when you take {b} from {a}?",
        "Calculate {a} minus {b}.",
    ),
    "*": (
        "What is {a} times {b}?",
        "{a} times {b}",
        "How much is {a} times {b}?",
        "Multiply {a} by {b}.",
        "What is {a} multiplied by {b}?",
        "What is the product of {a} and {b}?",
        "Multiply {a} and {b}.",
        "Calculate {a} times {b}.",
    ),
}
STORIES = {
    "+": (
        "I have {a} {n} and get {b} more. How many {n} do I have?",
        "There are {a} {n} here and {b} {n} there. How many in all?",
        "Ann has {a} {n} and Ben has {b}. How many {n} do they have together?",
    ),
    "-": (
        "I had {a} {n} and gave away {b}. How many {n} are left?",
        "There were {a} {n} and {b} are gone. How many remain?",
        "Of {a} {n}, {b} were sold. How many {n} are left?",
    ),
    "*": (
        "There are {a} boxes with {b} {n} each. How many {n} are there?",
        "I buy {a} bags of {b} {n}. How many {n} is that?",
        "Each of {a} people has {b} {n}. How many {n} in all?",
    ),
}
# c: the third number; o, p: the signs; x, y: the operations in words
TWO_BARE = (
    "{a} {o} {b} {p} {c}",
    "{a}{o}{b}{p}{c}",
    "{a} {o} {b} {p} {c} =",
    "What is {a} {o} {b} {p} {c}?",
    "What is {a}{o}{b}{p}{c}?",
    "Calculate {a} {o} {b} {p} {c}.",
    "How much is {a} {o} {b} {p} {c}?",
)
TWO_IN_WORDS = (
    "What is {a} {x} {b} {y} {c}?",
    "{a} {x} {b} {y} {c}",
    "How much is {a} {x} {b} {y} {c}?",
    "Calculate {a} {x} {b} {y} {c}.",
)
# the second step is done with the result of the first
TWO_STORIES = {
    "*+": (
        "I have {a} boxes of {b} {n} and {c} more. How many {n} do I have?",
        "Multiply {a} by {b} and add {c}.",
    ),
    "*-": (
        "I buy {a} bags of {b} {n} and give away {c}. How many {n} are left?",
        "Multiply {a} by {b} and subtract {c}.",
    ),
    "++": (
        "I have {a} {n}, get {b} and then {c} more. How many {n} do I have?",
        "Add {a}, {b} and {c}.",
    ),
    "+-": (
        "I have {a} {n}, get {b} more and lose {c}. How many {n} are left?",
        "Add {a} and {b}, then subtract {c}.",
    ),
    "--": (
        "Of {a} {n}, {b} are sold and {c} are lost. How many {n} are left?",
        "Take {b} and then {c} away from {a}.",
    ),
}
STEPS = ("*+", "*-", "++", "+-", "--", "+*", "-*", "-+")    # pairs of operations that are drawn
SPOKEN = {"+": "plus", "-": "minus", "*": "times"}
THINGS = (
    "apples",
    "books",
    "coins",
    "pens",
    "stamps",
    "cards",
    "eggs",
    "stones",
    "cups",
    "shells",
    "letters",
    "tickets",
)
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# how a user writes the operation; half of the products have an asterisk
SIGNS = {"+": "+", "-": "-", "*": "**x×"}
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

BARE_SHARE = 0.45           # of the questions
BARE_OR_WORDS_SHARE = 0.85  # the rest are stories
STORY_OF_TWO_SHARE = 0.75   # up to here a problem of two steps is a story, where it has one
SLOPPY_SHARE = 0.25         # questions typed without a capital and a full stop


def sum_parts(expression, result):
    """The parts of an answer by the tool: the call, its output and a sentence."""
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": f"The answer is {result}."},
    ]


class Arithmetic(Task):
    """`size` problems. The split of a problem is decided by the problem itself.

    So `12*7` is in one split only, whatever the words around it.
    """

    def __init__(self, split, size=1000, **slice_):
        super().__init__(**slice_)
        self.split = check_split(split)
        self.size = size

    def num_examples(self):
        return self.size

    def get_example(self, i):
        rng = random.Random(f"arithmetic {self.split} {i}")
        a, op, b = self._draw_problem(rng)
        question = _draw_question(rng, a, op, b)
        return conversation(question, sum_parts(f"{a}{op}{b}", str(RESULT[op](a, b))))

    def _draw_problem(self, rng):
        """(a, operation, b) of this task's split; the numbers of digits are uniform."""
        while True:
            op = rng.choice("+-*")
            a = rng.randrange(10 ** rng.randint(1, 3))
            b = rng.randrange(10 ** rng.randint(1, 3))
            if split_of(f"{a}{op}{b}") == self.split:
                return a, op, b

    def evaluate(self, conversation, parts):
        """Right when the last number of the answer is the result."""
        _, output, _ = conversation["messages"][-1]["content"]
        return last_number(answer_text(parts)) == int(output["text"])


def _draw_question(rng, a, op, b):
    """The problem as a user would put it. (The order of the draws decides every item: keep it.)"""
    kind = rng.random()
    thing = rng.choice(THINGS)
    has_story = op != "-" or a >= b  # stories have no negative results
    text_a = str(a)
    text_b = str(b)
    if kind < BARE_SHARE:
        template = rng.choice(BARE)
    elif kind < BARE_OR_WORDS_SHARE or not has_story:
        template = rng.choice(IN_WORDS[op])
        if max(a, b) <= 20 and rng.random() < 0.5:
            text_a = NUMBER_WORDS[a]
            text_b = NUMBER_WORDS[b]
    else:
        template = rng.choice(STORIES[op])

    question = template.format(a=text_a, b=text_b, o=rng.choice(SIGNS[op]), n=thing)
    return _typed(rng, question)


def _typed(rng, question):
    """A question with a capital, or as somebody in a hurry types it."""
    question = question[0].upper() + question[1:]
    if rng.random() < SLOPPY_SHARE:
        question = question[0].lower() + question[1:].rstrip("?.")
    return question


class TwoSteps(Arithmetic):
    """`size` problems of two operations, `12*7+3`, each of which is one call of the tool.

    Without parentheses products come first, as in Python. The whole problem decides its split.
    """

    def get_example(self, i):
        rng = random.Random(f"two steps {self.split} {i}")
        numbers, steps = self._draw_steps(rng)
        a, b, c = numbers
        expression = f"{a}{steps[0]}{b}{steps[1]}{c}"
        question = _draw_question_of_two(rng, numbers, steps)
        return conversation(question, sum_parts(expression, use_tool(expression)))

    def _draw_steps(self, rng):
        """((a, b, c), pair of operations) of this task's split."""
        while True:
            steps = rng.choice(STEPS)
            a, b, c = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(3))
            if split_of(f"{a}{steps[0]}{b}{steps[1]}{c}") == self.split:
                return (a, b, c), steps


def _draw_question_of_two(rng, numbers, steps):
    """A problem of two steps as a user would put it."""
    a, b, c = numbers
    kind = rng.random()
    # stories have no negative results
    after_one = use_tool(f"{a}{steps[0]}{b}")
    after_two = use_tool(f"{a}{steps[0]}{b}{steps[1]}{c}")
    is_negative = "-" in after_one + after_two
    has_story = steps in TWO_STORIES and b > 0 and not is_negative
    if kind < BARE_SHARE:
        template = rng.choice(TWO_BARE)
    elif has_story and kind < STORY_OF_TWO_SHARE:
        template = rng.choice(TWO_STORIES[steps])
    else:
        template = rng.choice(TWO_IN_WORDS)
    first, second = steps
    question = template.format(
        a=a, b=b, c=c, n=rng.choice(THINGS),
        o=rng.choice(SIGNS[first]), p=rng.choice(SIGNS[second]),
        x=SPOKEN[first], y=SPOKEN[second])
    return _typed(rng, question)
