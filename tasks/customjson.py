"""The user's own conversations: a .jsonl, .json, .csv, .tsv or .parquet file.

The form that is wanted is one conversation per line, a list of messages:

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, Ada."}]

The common forms of other programs are converted, and one line says how many there were of each:

    {"messages": [{"role": "user", "content": "Hello"}, ...]}       the list under a key,
    {"body": {"messages": [...]}, "id": 7}                          or deeper
    {"conversations": [{"from": "human", "value": "Hello"}, ...]}   ShareGPT
    {"instruction": "Add.", "input": "1, 2", "output": "3"}         Alpaca
    {"prompt": "Hello", "completion": "Hello, Ada."}                pairs, as in QUESTIONS
    {"question": "1+2?", "answer": 3, "system": "Be brief."}        and ANSWERS
    {"query": "And 3+4?", "response": "7", "history": [["1+2?", "3"]]}     with earlier turns
    {"question": "Which is even?", "A": "3", "B": "4", "answer": "B"}      with choices

A .json file holds a list of these. The columns of a .csv file are the keys; a column may hold a
list of messages as text. nanochat/conversation.py says what becomes of roles, tool calls, greetings
and consecutive messages of one role.
"""
import ast
import csv
import io
import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from nanochat.common import UserError, expand_home, print0
from nanochat.conversation import (
    ANSWERS,
    CONTENT_KEYS,
    MESSAGES,
    QUESTIONS,
    ROLE_KEYS,
    is_message,
    normalise_messages,
)
from nanochat.encoding import check_not_a_pointer, find_encoding, open_text, text_suffix
from nanochat.tables import find_delimiter, hold_conversations, read_header, too_many_columns
from tasks.common import Task, conversation

DETAILS = ("input", "context")      # what an instruction or a question is about
SYSTEM = ("system", "system_prompt")
CHOICES = ("choices", "options")    # a list of what to choose from,
LETTERS = "abcdefghij"              # or the key of each choice
LABELS = ("label", "correct", "target", "answerkey", "gold")  # which choice is right
WITH_CHOICES = " with choices"      # in the name of a form
HUMANS = ("user", "human")          # keys of the pairs that are turns of one conversation

MAX_DEPTH = 3       # of a list of messages inside of other keys
MAX_CELL = 10**8    # characters in a cell of a .csv file
PARQUET_ROWS = 1000  # that are converted from Arrow at a time
SPACE = re.compile(r"\s*")
NO_ANSWER = "questions without an answer left out"
WANTED = ('a conversation is a list of messages, [{"role": "user", "content": "Hello"}, '
          '{"role": "assistant", "content": "Hello, Ada."}], alone or under the key "messages"')


# ------------------------------------------------------------------------------------------------
# one record: what another program takes for a conversation

def _is_list_of(value, kind):
    """Whether a value is a list whose first item is of a kind."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _is_messages(value):
    return _is_list_of(value, dict) and is_message(value[0])


def _parsed_list(value):
    """A list that is written as text, by json or by repr(); else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError):
            continue
    return value


def _parsed(value):
    """A list of messages that is written as text; else the value itself."""
    parsed = _parsed_list(value)
    return parsed if _is_messages(parsed) else value


def _lower_keys(record):
    return {str(key).strip().lower(): _parsed(value) for key, value in record.items()}


def _find_messages(value, depth=MAX_DEPTH):
    """The list of messages in a value, however deep; None where there is none, or several."""
    value = _parsed(value)
    if _is_messages(value):
        return value
    if not isinstance(value, dict) or depth == 0:
        return None
    found = [_find_messages(inner, depth - 1) for inner in value.values()]
    found = [messages for messages in found if messages]
    return found[0] if len(found) == 1 else None


def _as_text(value):
    """A text, a number or a truth as text without white space around it; None for other values."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    is_number = type(value) in (int, float) and value == value  # pandas writes NaN for nothing
    return str(value) if is_number else None


class Choices(NamedTuple):
    """What a question gives to choose from.

    labels: what a list calls its choices, as in ARC ("1", "2" or "A", "B"), or []. is_list: whether
    they are in a list, where an integer counts them from 0, as in MMLU.
    """

    texts: list
    labels: list
    is_list: bool


def choices_of(record):
    """The Choices of a record with keys in small letters; None where it has none.

    They are in a list, in ARC's {"text": [...], "label": [...]}, or each under its letter.
    """
    for key in CHOICES:
        listed = _parsed_list(record.get(key))
        labels = []
        if isinstance(listed, dict):
            labels = [_as_text(label) for label in listed.get("label") or []]
            listed = listed.get("text")
        if _is_list_of(listed, object):
            return Choices([_as_text(choice) or "" for choice in listed], labels, True)

    texts = [_as_text(record.get(letter)) or "" for letter in LETTERS]
    while texts and not texts[-1]:      # a question may have fewer choices than its table
        texts.pop()
    is_question = record.keys() >= {"a", "b"} and len(texts) > 1
    return Choices(texts, [], False) if is_question else None


def check_choices(choices):
    """UserError where one of the Choices is empty, or where there are more than letters."""
    if "" in choices.texts:
        number = choices.texts.index("") + 1
        raise UserError(f"choice {number} of {len(choices.texts)} is empty or no text: "
                        "write it, or leave it out")
    if len(choices.texts) > len(ascii_uppercase):
        raise UserError(f"{len(choices.texts)} choices are more than {len(ascii_uppercase)}, as "
                        "many as there are letters: leave some out")


def place_of(answer, choices):
    """The index of the choice that an answer means, or None.

    An answer is a choice's label, its number from 0, its text, or its letter: B, b or (B).

    >>> [place_of(answer, Choices(["stone", "pear"], [], True)) for answer in ("pear", "b", 1, "?")]
    [1, 1, 1, None]
    """
    text = _as_text(answer) or ""
    number = int(text) if text.isdecimal() and len(text) < 3 else -1
    letter = text.strip("().").upper()
    if text in choices.labels:
        place = choices.labels.index(text)
    elif choices.is_list and type(answer) is int:
        place = number
    elif text in choices.texts:
        place = choices.texts.index(text)
    else:
        place = ascii_uppercase.index(letter) if is_letter(letter) else number
    return place if 0 <= place < len(choices.texts) else None


def is_letter(text):
    """Whether a text is one letter that names a choice."""
    return len(text) == 1 and text in ascii_uppercase


def answer_keys(record):
    """Those of the keys of an answer under which a record with choices has anything."""
    return _keys_with_value(record, ANSWERS + LABELS, but=LETTERS)


def _with_choices(record, choices):
    """A record whose choices stand in its question: "Which is even?\\n\\nA. 3\\nB. 4".

    Where the answer is a number of a list, or a label that the file gives, it becomes the letter.
    """
    asked = _keys_with_value(record, QUESTIONS, but=LETTERS)
    answered = answer_keys(record)
    if not asked or not answered or _as_text(record[asked[0]]) is None:
        return {}
    lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices.texts)]
    question = "\n".join([f"{_as_text(record[asked[0]])}\n", *lines])

    answer = record[answered[0]]
    is_number = choices.is_list and type(answer) is int
    if is_number or _as_text(answer) in choices.labels:
        place = place_of(answer, choices)
        answer = None if place is None else ascii_uppercase[place]
    fields = {key: record[key] for key in (*DETAILS, "history") if key in record}
    name = answered[0] if answered[0] in ANSWERS else "answer"
    return {**fields, asked[0]: question, name: answer}


def _keys_with_value(record, keys, but=()):
    """Those of the keys under which a record has anything, first those of no empty text."""
    found = [key for key in keys if record.get(key) is not None and key not in but]
    return sorted(found, key=lambda key: record[key] == "")


def _pair(record):
    """(messages, name of the form) of a record with a question and an answer, or None."""
    choices = choices_of(record)
    if choices:
        record = _with_choices(record, choices)
    asked = _keys_with_value(record, QUESTIONS)
    answered = _keys_with_value(record, ANSWERS)
    earlier = _earlier_turns(record.get("history"))
    if not asked or not answered or earlier is None:
        return None
    form = f"{asked[0]}/{answered[0]}" + (WITH_CHOICES if choices else "")
    question, answer = record[asked[0]], record[answered[0]]
    if _is_messages(question) and _is_messages(answer):
        return earlier + question + answer, form

    question, answer = _as_text(question), _as_text(answer)
    if question is None or answer is None:
        return None
    for key in DETAILS:
        detail = _as_text(record.get(key)) if key != asked[0] else None
        question += f"\n\n{detail}" if detail else ""
    return earlier + conversation(question, answer)["messages"], form


def _earlier_turns(history):
    """The messages of a field `history`: pairs of texts, or messages. None for another form."""
    history = _parsed_list(history)
    if history is None or history == "" or history == []:
        return []
    if _is_messages(history):
        return history
    if not _is_list_of(history, (list, tuple)):
        return None
    messages = []
    for pair in history:
        texts = list(map(_as_text, pair)) if isinstance(pair, (list, tuple)) else []
        if len(texts) != 2 or not all(texts):
            return None
        messages += conversation(*texts)["messages"]
    return messages


def _talk_of_pairs(record):
    """(messages, name of the form) of [{"human": ..., "assistant": ...}, ...], or None.

    Such pairs are the turns of one conversation, where the key says so: it is `conversation`, or
    the pairs are of a person and the assistant. Under other keys each pair is a conversation.
    """
    for key in MESSAGES:
        turns = _parsed_list(record.get(key))
        if not _is_list_of(turns, dict):
            continue
        pairs = [_pair(_lower_keys(turn)) if isinstance(turn, dict) else None for turn in turns]
        if not all(pairs):
            continue
        form = pairs[0][1]
        if key == "conversation" or form.startswith(HUMANS):
            messages = [message for messages, _ in pairs for message in messages]
            return messages, f"{key} of {form}"
    return None


def _recognise(record):
    """(messages, name of the form) of a record, or None."""
    messages = record
    if isinstance(record, dict):
        named = [record[key] for key in MESSAGES if _is_messages(record.get(key))]
        messages = named[0] if named else None
        pair = None if named else _talk_of_pairs(record) or _pair(record)
        if pair:
            return pair
        messages = messages or _find_messages(record)
    if not _is_messages(messages):
        return None
    keys = [key for key in messages[0] if key in ROLE_KEYS + CONTENT_KEYS]
    return messages, "/".join(keys)


def _is_nothing(value):
    """Whether a value is null, pandas' NaN or a text of white space."""
    return value is None or value != value or _as_text(value) == ""


def lacks_an_answer(record):
    """Whether a record is a question whose answers are all null or empty, as in Alpaca's file."""
    fields = _lower_keys(record) if isinstance(record, dict) else {}
    answers = [fields[key] for key in (*ANSWERS, *LABELS, "answers") if key in fields]
    if not answers or not all(map(_is_nothing, answers)):
        return False
    is_question = not fields.keys().isdisjoint(QUESTIONS)
    return is_question and fields.keys().isdisjoint(MESSAGES) and not _find_messages(fields)


def read_record(record):
    """(messages, name of the form) of a record. UserError where it has no conversation.

    >>> messages, form = read_record({"instruction": "Add.", "input": "1, 2", "output": "3"})
    >>> form, messages[0]["content"]
    ('instruction/output', 'Add.\\n\\n1, 2')
    """
    fields = _lower_keys(record) if isinstance(record, dict) else {}
    recognised = _recognise(fields or record)
    if recognised is None:
        keys = f" (its keys: {', '.join(fields)})" if fields else ""
        if "text" in fields:
            keys += ", text to pretrain on goes to --data of scripts.base_train"
        raise UserError(f"no conversation was recognised{keys}: {WANTED}")

    messages, form = recognised
    if form.endswith(WITH_CHOICES):
        check_choices(choices_of(fields))
    system = [text for text in map(_as_text, map(fields.get, SYSTEM)) if text]
    return [{"role": "system", "content": text} for text in system] + messages, form


def to_train_on(messages, changes):
    """Well-formed messages that end with the assistant's. UserError where it never answers."""
    messages = normalise_messages(messages, changes)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
        changes["last messages without an answer left out"] += 1
    if not messages:
        raise UserError("roles must alternate user, assistant and end with assistant")
    return messages


# ------------------------------------------------------------------------------------------------
# files: each reader yields (place, record)

def read_text(path):
    """The text of a file, decompressed; UserError where its encoding cannot be told."""
    encoding = find_encoding(path)
    if encoding != "utf-8":
        print0(f"{path}: read as {encoding}")
    with open_text(path, encoding) as stream:
        return stream.read().removeprefix("\ufeff")


def _from_json(text, path, first_line):
    """The JSON values that a text holds one after the other, as [(line, value)]."""
    values = []
    line = first_line
    place = SPACE.match(text).end()
    line += text.count("\n", 0, place)
    try:
        while place < len(text):
            value, end = json.JSONDecoder().raw_decode(text, place)
            values.append((line, value))
            end = SPACE.match(text, end).end()
            line += text.count("\n", place, end)
            place = end
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:   # a number of too many digits; brackets
        raise UserError(f"{path}, line {first_line} cannot be read: {error}") from error
    return values


def _records_in(place, value):
    """Yield (place, record) of a value: itself, or what is in a list of records.

    The list may be under a key: {"version": 2, "data": [{"prompt": ...}, ...]}.
    """
    records = value
    if isinstance(value, dict) and _recognise(_lower_keys(value)) is None:
        others = {key: inner for key, inner in value.items() if str(key).lower() != "history"}
        lists = [inner for inner in others.values() if _is_list_of(inner, (dict, list))]
        records = lists[0] if len(lists) == 1 else None
    if not _is_list_of(records, object) or _is_messages(records):
        yield place or "entry 1", value
        return
    begin = f"{place}, " if place else ""
    for number, record in enumerate(records, start=1):
        yield f"{begin}entry {number}", record


def _read_json(path):
    for place, value in json_values(path):
        yield from _records_in(place, value)


def json_values(path):
    """Yield (place, value) of a file with one JSON value per line, or values over several lines.

    Most often that is one in the whole file; its place is then "".
    """
    # where files were joined, a mark of Windows begins later lines
    text = read_text(path).replace("\n\ufeff", "\n")
    # not splitlines(): it also breaks at U+2028 inside a string
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        for _, line in lines[:1]:
            json.loads(line)
    except (ValueError, RecursionError):
        # the first line is no value
        values = _from_json(text, path, 1)
        for line, value in values:
            yield f"line {line}" if len(values) > 1 else "", value
        return
    for number, line in lines:
        for _, value in _from_json(line, path, number):
            yield f"line {number}", value


def _read_csv(path):
    """Rows under a line of column names, divided by one of tables.DELIMITERS."""
    stream = io.StringIO(read_text(path), newline="")
    header = read_header(stream, path)
    delimiter, names = find_delimiter(header, hold_conversations)
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(stream, names, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            line = reader.line_num + header.lines
            extra = record.pop(None, [])
            if any(map(str.strip, extra)):
                count = len(names) + len(extra)
                raise UserError(too_many_columns(path, line, count, len(names), delimiter))
            yield f"line {line}", record
    except csv.Error as error:
        line = reader.reader.line_num + header.lines  # reader's own is that of the row before
        raise UserError(f"{path}, line {line} is not csv: {error}") from error


def _read_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    check_not_a_pointer(path)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            doubled = [name for name in names if names.count(name) > 1]
            if doubled:
                count = names.count(doubled[0])
                raise UserError(f"{path} has {count} columns {doubled[0]!r}: keep one")
            rows = chain.from_iterable(map(_rows_of, file.iter_batches(PARQUET_ROWS)))
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", _record_of(row, f"{path}, row {number}")
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or no parquet: {reason}") from error


def _rows_of(batch):
    """Yield the rows of a batch of parquet as batches of one row."""
    for row in range(batch.num_rows):
        yield batch.slice(row, 1)


def _record_of(row, place):
    """The record of a batch of one row. UserError where a text in it is not UTF-8."""
    try:
        return _decoded(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 ({error.reason}): correct or remove this row"
        ) from error


def _decoded(value):
    """A value of parquet in which bytes are text. UnicodeDecodeError where they are not UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return list(map(_decoded, value))
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    return value


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}


class CustomJSON(Task):
    """The conversations of the file at `path`.

    UserError, with the line's number, where one is not as it should be.
    """

    def __init__(self, path, **slice_):
        super().__init__(**slice_)
        self.conversations = []
        self.path = Path(expand_home(path, "write the whole path"))
        forms, changes = Counter(), Counter()
        read = READERS.get(text_suffix(self.path), _read_json)
        try:
            for place, record in read(self.path):
                if lacks_an_answer(record):
                    changes[NO_ANSWER] += 1
                else:
                    self._add(place, record, forms, changes)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read conversations from {path}: {reason}") from error
        if not self.conversations:
            without = f" ({changes[NO_ANSWER]:,} {NO_ANSWER})" if changes[NO_ANSWER] else ""
            raise UserError(f"{path} holds no conversations{without}: {WANTED}")

        said = [f"{count:,} {what}" for what, count in [*forms.items(), *changes.items()] if count]
        print0(f"{path}: {len(self.conversations):,} conversations ({', '.join(said)})")

    def _add(self, place, record, forms, changes):
        try:
            messages, form = read_record(record)
            messages = to_train_on(messages, changes)
        except UserError as error:
            raise UserError(f"{self.path}, {place}: {error}") from error
        forms[form] += 1
        self.conversations.append({"messages": messages})

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, i):
        return self.conversations[i]
