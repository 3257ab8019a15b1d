"""Prompts that fit what a model has read: for the samples of a run, and for the page.

The default text is the Python code of this machine. It has fixed prompts, so that runs can be
compared. The prompts of the user's own text are the beginnings of some of its validation
documents, in whatever language and script these are.
"""
import itertools
import unicodedata

TEXTS = ("def factorial(n):", "Return True if ", "import ", "The function ", "Once upon a time")
QUESTIONS = (
    "Who are you?",
    "What is 12 times 7?",
    "Spell window.",
    "How many e are in letter?",
    "What does textwrap.dedent do?",
)
SUGGESTIONS = (
    "What is 48 * 73?",
    "How many r are in strawberry?",
    "What does textwrap.dedent do?",
    "Who are you?",
)

MAX_PROMPTS = 5
SEARCHED_DOCUMENTS = 50
MAX_COLUMNS = 24        # of a prompt, as a terminal shows it
MIN_LETTERS = 12        # of a line that is long enough to be begun


def columns(text):
    """How many columns of a terminal the text takes: 2 for a Chinese character, 0 for an accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(_is_mark(character) for character in text)
    return len(text) + wide - marks


def _is_mark(character):
    """Whether a character belongs to the one before it: an accent, a vowel sign, a joiner."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def beginning(document):
    """The first words of a document, "" where it has none.

    They are at most half of the first line with MIN_LETTERS, else of the longest line, so that
    there is something to continue. A word that is too long, as any Chinese sentence is, is cut.

    >>> beginning("# Tomatoes\\n\\nThey need more water than the peppers do.\\n")
    'They need more water'
    >>> beginning("春天来了，花园里的花都开了。")
    '春天来了，花园'
    """
    lines = [line.strip() for line in document.split("\n")]
    long_enough = [line for line in lines if sum(map(str.isalpha, line)) >= MIN_LETTERS]
    line = long_enough[0] if long_enough else max(lines, key=len)
    limit = min(MAX_COLUMNS, columns(line) / 2)

    # whole words, as many as fit
    words = line.split()
    begun = ""
    for word in words:
        longer = f"{begun} {word}".strip()
        if columns(longer) > limit:
            break
        begun = longer
    return begun or _cut(line, limit)


def _cut(word, limit):
    """The first characters of a word, of `limit` columns; a mark stays with its character."""
    end = 0
    while end < len(word) and (columns(word[:end + 1]) <= limit or _is_mark(word[end])):
        end += 1
    return word[:end]


def text_prompts(documents, data):
    """A few texts to be continued by a base model.

    documents: of validation, an iterable. data: the data path of the run; None: the default text.
    """
    if data is None:
        return list(TEXTS)
    found = [beginning(text) for text in itertools.islice(documents, SEARCHED_DOCUMENTS)]
    found = [text for text in dict.fromkeys(found) if text]
    return found[:MAX_PROMPTS] or list(TEXTS)


def suggestions_of(meta):
    """What the page offers to send to the model of a meta file."""
    if meta["stage"] == "base_train":
        return meta.get("prompts", TEXTS)
    return meta.get("questions", SUGGESTIONS)
