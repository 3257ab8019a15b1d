"""Spelling words and counting letters in them.

A model that reads tokens, not letters, has to learn the letters of each token by heart.

    Spell dedent.                ->  d e d e n t
    How many e are in dedent?    ->  d e1 d e2 n t. <python>"dedent".count("e")</python>
                                     <output>2</output> The answer is 2.

Letters are separated by blanks because " d" is one token in any vocabulary learnt from text, and
always the same one. Words are those of 4 to 10 lower-case letters in the sources that every machine
has (nanochat/sources.py). Training also spells made-up words, the head of one word with the tail of
another: they bring tokens together in more ways than real words do, which is what an unseen word
asks for. A word's split is decided by a hash of its letters, so no test word is ever made up.
"""
import random
import re
import string
from collections import Counter

from nanochat.common import atomic_write, fraction, get_base_dir, print0
from nanochat.sources import python_files
from tasks.common import Task, answer_text, check_split, conversation, last_number, split_of

WORD = re.compile(r"(?<![A-Za-z])[a-z]{4,10}(?![A-Za-z])")
MIN_CHARS = 4
MAX_CHARS = 10
MADE_UP_SHARE = 0.4     # of the training words
PRESENT_SHARE = 0.9     # of the letters asked about are drawn from the word, the rest from all

# w: the word; c: the letter
SPELL = (
    "Spell {w}.",
    "Spell {w}",
    "Spell the word {w}.",
    "spell {w}",
    "How do you spell {w}?",
    "How is {w} spelled?",
    "Can you spell {w}?",
    "Please spell the word {w}.",
    "What are the letters of {w}?",
    "Spell out {w}.",
)
COUNT = (
    "How many {c} are in {w}?",
    "How many {c} are there in {w}?",
    "How many times does {c} occur in {w}?",
    "Count the letter {c} in {w}.",
    "How often is the letter {c} in {w}?",
    "how many {c} in {w}",
)


def all_words():
    """The words, sorted; read from $NANOCHAT_BASE_DIR/words.txt, which the first call writes.

    A word counts if at least two files have it, which drops most misspellings and random names.
    Gathering takes a few seconds.
    """
    path = get_base_dir() / "words.txt"
    if not path.exists():
        print0("gathering words from the sources on this machine")
        atomic_write(path, "\n".join(_gather_words()) + "\n")
    return path.read_text(encoding="utf-8").split()


def _gather_words():
    """The words of the sources on this machine, sorted."""
    files_with = Counter()
    for _, _, path in python_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        files_with.update(set(WORD.findall(text)))
    return sorted(word for word, files in files_with.items() if files > 1 and len(set(word)) > 1)


def count_parts(word, letter):
    """The parts of an answer that counts a letter in a word, by hand and by the tool.

    The first one of dedent and e is the text "d e1 d e2 n t. ".
    """
    count = 0
    spelled = []
    for character in word:
        if character == letter:
            count += 1
            spelled.append(f"{character}{count}")
        else:
            spelled.append(character)
    return [
        {"type": "text", "text": " ".join(spelled) + ". "},
        {"type": "python", "text": f'"{word}".count("{letter}")'},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"The answer is {count}."},
    ]


class SimpleSpelling(Task):
    """`size` words to spell, in the order of a hash.

    Where `size` exceeds the number of training words, they come again in other phrases.
    """

    def __init__(self, split, size=1000, **slice_):
        super().__init__(**slice_)
        self.split = check_split(split)
        self.size = size
        self.words = sorted((word for word in all_words() if split_of(word) == split), key=fraction)

    def num_examples(self):
        if self.split == "train":
            return self.size
        return min(self.size, len(self.words))

    def _draw(self, i):
        """(random generator, word) of example i. (The order of the draws decides every item.)"""
        rng = random.Random(f"{type(self).__name__} {self.split} {i}")
        word = self.words[i % len(self.words)]
        if self.split == "train" and rng.random() < MADE_UP_SHARE:
            other = rng.choice(self.words)
            head = word[:rng.randint(2, len(word) - 1)]
            tail = other[rng.randint(1, len(other) - 2):]
            made_up = (head + tail)[:MAX_CHARS]
            if len(made_up) >= MIN_CHARS and split_of(made_up) == "train":
                word = made_up
        return rng, word

    def get_example(self, i):
        rng, word = self._draw(i)
        question = rng.choice(SPELL).format(w=word)
        return conversation(question, " ".join(word), word=word)

    def evaluate(self, conversation, parts):
        """Right when the answer is the letters of the word, separated by blanks."""
        return answer_text(parts).split() == list(conversation["word"])


class SpellingBee(SimpleSpelling):
    """`size` questions how often a letter is in a word.

    The answer counts by hand, letter by letter, and then checks the number with the tool.
    """

    def get_example(self, i):
        rng, word = self._draw(i)
        is_present = rng.random() < PRESENT_SHARE
        letter = rng.choice(word if is_present else string.ascii_lowercase)
        question = rng.choice(COUNT).format(c=letter, w=word)
        return conversation(question, count_parts(word, letter), word=word)

    def evaluate(self, conversation, parts):
        """Right when the last number of the answer is the count."""
        _, _, output, _ = conversation["messages"][-1]["content"]
        return last_number(answer_text(parts)) == int(output["text"])
