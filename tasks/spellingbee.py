"""Spelling words and counting letters in them: what a model that reads tokens, not letters, has to learn by heart.

    Spell dedent.                  ->  d e d e n t
    How many e are in dedent?      ->  d e1 d e2 n t. <python>"dedent".count("e")</python> <output>2</output> The answer is 2.

Letters are separated by blanks because " d" is one token in any vocabulary learnt from text, and always the same one.
Words are those of 4 to 10 lower-case letters in the sources that every machine has (nanochat/dataset.py). Training also
spells made-up words, the head of one word with the tail of another: they bring tokens together in more ways than real
words do, which is what an unseen word asks for. A word's split is a hash of its letters, so no test word is ever made up.
"""
import random
import re
from collections import Counter

from nanochat.common import atomic_write, get_base_dir, print0
from nanochat.sources import python_files
from tasks.common import Task, answer_text, check_split, conversation, fraction, last_number, split_of

MADE_UP_SHARE = 0.4
SPELL = ("Spell {w}.", "Spell {w}", "Spell the word {w}.", "spell {w}", "How do you spell {w}?", "How is {w} spelled?",
         "Can you spell {w}?", "Please spell the word {w}.", "What are the letters of {w}?", "Spell out {w}.")
COUNT = ("How many {c} are in {w}?", "How many {c} are there in {w}?", "How many times does {c} occur in {w}?",
         "Count the letter {c} in {w}.", "How often is the letter {c} in {w}?", "how many {c} in {w}")


def all_words():
    """The words, sorted; read from $NANOCHAT_BASE_DIR/words.txt, which the first call writes (a few seconds).

    A word counts if two files at least have it, which leaves most misspellings and random names out.
    """
    path = get_base_dir() / "words.txt"
    if not path.exists():
        print0("gathering words from the sources on this machine")
        counts = Counter()
        for _, _, file in python_files():
            text = file.read_text(encoding="utf-8", errors="replace")
            counts.update(set(re.findall(r"(?<![A-Za-z])[a-z]{4,10}(?![A-Za-z])", text)))
        words = sorted(word for word, files in counts.items() if files > 1 and len(set(word)) > 1)
        atomic_write(path, "\n".join(words) + "\n")
    return path.read_text(encoding="utf-8").split()


class SimpleSpelling(Task):
    """`size` words to spell, in the order of a hash. Training words come again, in other phrases, when `size` exceeds them."""

    def __init__(self, split, size=1000, **slice_):
        super().__init__(**slice_)
        self.split, self.size = check_split(split), size
        self.words = sorted((word for word in all_words() if split_of(word) == split), key=fraction)

    def num_examples(self):
        return self.size if self.split == "train" else min(self.size, len(self.words))

    def _draw(self, i):
        """(random generator, word) of example i."""
        rng = random.Random(f"{type(self).__name__} {self.split} {i}")
        word = self.words[i % len(self.words)]
        if self.split == "train" and rng.random() < MADE_UP_SHARE:
            tail = rng.choice(self.words)
            made_up = (word[:rng.randint(2, len(word) - 1)] + tail[rng.randint(1, len(tail) - 2):])[:10]
            if len(made_up) >= 4 and split_of(made_up) == "train":
                word = made_up
        return rng, word

    def get_example(self, i):
        rng, word = self._draw(i)
        return conversation(rng.choice(SPELL).format(w=word), " ".join(word), word=word)

    def evaluate(self, conversation, parts):
        return answer_text(parts).split() == list(conversation["word"])


class SpellingBee(SimpleSpelling):
    """`size` questions how often a letter is in a word: counted by hand, letter by letter, then checked with the tool."""

    def get_example(self, i):
        rng, word = self._draw(i)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        seen, spelled = 0, []
        for c in word:
            seen += c == letter
            spelled.append(f"{c}{seen}" if c == letter else c)
        question = rng.choice(COUNT).format(c=letter, w=word)
        parts = [{"type": "text", "text": " ".join(spelled) + ". "}, {"type": "python", "text": f'"{word}".count("{letter}")'},
                 {"type": "python_output", "text": str(seen)}, {"type": "text", "text": f"The answer is {seen}."}]
        return conversation(question, parts, word=word)

    def evaluate(self, conversation, parts):
        return last_number(answer_text(parts)) == int(conversation["messages"][-1]["content"][2]["text"])
