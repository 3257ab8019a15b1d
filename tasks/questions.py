"""The user's own questions, in any file that --custom reads, with answers to compare with.

    {"question": "What is the capital of France?", "answer": "Paris"}
    {"question": "Who wrote Faust?", "answers": ["Goethe", "Johann Wolfgang von Goethe"]}
    {"question": "Who wrote Faust?", "answer": "Goethe|Johann Wolfgang von Goethe"}
    {"question": "Which is a fruit?", "A": "stone", "B": "pear", "answer": "B"}
    {"question": "Which is a fruit?", "choices": ["stone", "pear"], "answer": 1}

The last question of a conversation is asked, after the turns before it. An answer is right where it
is an accepted one word for word, apart from case, punctuation, white space and articles; where the
accepted answer is a number, the last number given must be that number. Beside that stands the F1 of
the words that an answer shares with the accepted one, as in SQuAD (Rajpurkar et al. 2016,
arXiv 1606.05250).

A chat that looks things up answers with sentences of the user's text. Such an answer is right where
an accepted one, word for word or as a number, is somewhere in what is quoted.
"""
import re
import unicodedata

from nanochat.common import UserError
from nanochat.conversation import LOOKUP_CALL, NOTHING_FOUND
from nanochat.retrieval import NOT_SURE
from nanochat.words import UNSPACED
from tasks.common import answer_text, canonical_number, f1
from tasks.customjson import (
    ANSWERS,
    CHOICES,
    LABELS,
    LETTERS,
    CustomJSON,
    answer_keys,
    check_choices,
    choices_of,
    place_of,
)

ACCEPTED = ("answers", *ANSWERS)    # keys that may hold several accepted answers

# A number is one token, and so is each character of a script without spaces.
NUMBER = r"(?:(?<!\w)[-\u2212])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
TOKEN = re.compile(rf"{NUMBER}|{UNSPACED}|\S+?(?=\s|$|{UNSPACED}|{NUMBER})")
SOURCE = re.compile(r"\(source: .*\)")     # a line below a quotation
ARTICLES = ("a", "an", "the")


# ------------------------------------------------------------------------------------------------
# comparing answers

def _is_mark(character):
    return unicodedata.category(character)[0] == "P"


def answer_words(text):
    """The words of an answer, for comparing: a list.

    >>> answer_words("The answer is 1,000.0 apples!")
    ['answer', 'is', '1000', 'apples']
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = []
    for token in TOKEN.findall(text):
        if re.fullmatch(NUMBER, token):
            words.append(canonical_number(token))
            continue
        token = token.replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
        spaced = "".join(" " if _is_mark(c) else c for c in token)
        words += [word for word in spaced.split() if word not in ARTICLES]
    return words or text.split()    # an answer of marks or articles alone is compared as it is


def is_number(word):
    return re.fullmatch(NUMBER, word) is not None


def is_same(given, accepted):
    """Whether two answers say the same.

    Where the accepted one is a number, the last number of the given one counts, as "The answer is
    84." is right where 84 is accepted.
    """
    given, accepted = answer_words(given), answer_words(accepted)
    if len(accepted) == 1 and is_number(accepted[0]):
        given = [word for word in given if is_number(word)][-1:]
    return given == accepted


def is_within(accepted, quoted):
    """Whether an accepted answer's words stand in a quotation, one after the other.

    >>> is_within("3 cups", "Soak 500 g of beans in 3 cups of water."), is_within("50", "500 g")
    (True, False)
    """
    accepted, quoted = answer_words(accepted), answer_words(quoted)
    starts = range(len(quoted) - len(accepted) + 1)
    return any(quoted[start:start + len(accepted)] == accepted for start in starts)


def quoted_text(parts):
    """What a looked-up answer quotes, without its sources and what is said of doubt. None for an
    answer that was not looked up.

    parts: what tokenizer.parse_completion returns, or text.
    """
    if isinstance(parts, str):
        return None
    replies = [
        part["text"] for call, part in zip(parts, parts[1:])
        if call["text"] == LOOKUP_CALL and part["type"] == "python_output"
    ]
    lines = [line for reply in replies for line in reply.split("\n")]
    said = (NOT_SURE, NOTHING_FOUND)
    quoted = [line for line in lines if line not in said and not SOURCE.fullmatch(line)]
    return "\n".join(quoted) if replies else None


def token_f1(given, accepted):
    """The F1 of the words of two answers, from 0 to 1."""
    return f1(answer_words(accepted), answer_words(given))


# ------------------------------------------------------------------------------------------------
# reading

def _gold_of(fields, choices):
    """The index of the right choice; None where no key names one."""
    places = [place_of(fields[key], choices) for key in answer_keys(fields)]
    return next((place for place in places if place is not None), None)


def _accepted_of(fields):
    """(key, accepted answers) of a record whose answer is a list of texts, or (None, [])."""
    for key in ACCEPTED:
        value = fields.get(key)
        if isinstance(value, dict):     # SQuAD's {"text": [...], "answer_start": [...]}
            value = value.get("text")
        is_list = isinstance(value, list) and bool(value)
        if is_list and all(isinstance(item, (str, int, float)) for item in value):
            return key, [str(item) for item in value]
    return None, []


class Questions(CustomJSON):
    """The questions of the file at `path`. UserError, with the line, where one has no answer.

    chance: of guessing among the choices, over all questions.
    """

    def _add(self, place, record, forms, changes):
        fields = {}
        if isinstance(record, dict):
            fields = {str(key).strip().lower(): value for key, value in record.items()}
        choices = choices_of(fields)
        key, accepted = _accepted_of(fields)
        if choices:
            record, gold = self._one_choice(place, fields, choices)
        elif accepted:
            record = {**fields, key: None, "answer": accepted[0]}

        super()._add(place, record, forms, changes)
        item = self.conversations[-1]
        if choices:
            item.update(choices=choices.texts, gold=gold, neutral="Which one?")
            return
        answer = answer_text(item["messages"][-1]["content"]).strip()
        if not answer:
            raise UserError(f"{self.path}, {place}: the answer has no words to compare with")
        item["accepted"] = accepted or _alternatives(answer)

    def _one_choice(self, place, fields, choices):
        """(record, index) of a question with choices: the right choice is its answer."""
        try:
            check_choices(choices)
        except UserError as error:
            raise UserError(f"{self.path}, {place}: {error}") from error
        gold = _gold_of(fields, choices)
        if gold is None:
            raise UserError(
                f"{self.path}, {place}: which of the {len(choices.texts)} choices is right? Write "
                "its letter, its text or its number from 0 under \"answer\"")
        dropped = (*LETTERS, *CHOICES, *ANSWERS, *LABELS)
        record = {key: value for key, value in fields.items() if key not in dropped}
        return {**record, "answer": choices.texts[gold]}, gold

    @property
    def chance(self):
        with_choices = [item for item in self.conversations if "choices" in item]
        return sum(1 / len(item["choices"]) for item in with_choices) / len(self.conversations)

    def evaluate(self, conversation, parts):
        """Right when the answer is an accepted one, or quotes one, or is the right choice."""
        given = answer_text(parts)
        if "choices" in conversation:
            return given == conversation["choices"][conversation["gold"]]
        quoted = quoted_text(parts)
        if quoted is not None:
            return any(is_within(accepted, quoted) for accepted in conversation["accepted"])
        return any(is_same(given, accepted) for accepted in conversation["accepted"])

    def similarity(self, conversation, parts):
        """The F1 of the answer and the accepted one that is most like it, from 0 to 1.

        A right answer has 1, also where only the number in it counts, or a part of a quotation.
        """
        is_right = self.evaluate(conversation, parts)
        if is_right or "choices" in conversation:
            return float(is_right)
        quoted = quoted_text(parts)
        given = answer_text(parts) if quoted is None else quoted
        return max(token_f1(given, accepted) for accepted in conversation["accepted"])


def _alternatives(answer):
    """The answer itself, and what is divided by | in it."""
    pieces = [piece.strip() for piece in answer.split("|")]
    return [answer] + [piece for piece in pieces if piece and piece != answer]
