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

A .json file holds a list of these. The columns of a .csv file are the keys; a column may hold a
list of messages as text. nanochat/conversation.py says what becomes of roles, tool calls, greetings
and consecutive messages of one role.
"""
import ast
import csv
import io
import json
from collections import Counter
from pathlib import Path

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
from nanochat.textfiles import DELIMITERS, find_encoding, open_text, read_header, text_suffix
from tasks.common import Task, conversation

DETAILS = ("input", "context")      # what an instruction or a question is about
SYSTEM = ("system", "system_prompt")

MAX_DEPTH = 3       # of a list of messages inside of other keys
MAX_CELL = 10**8    # characters in a cell of a .csv file
WANTED = ('a conversation is a list of messages, [{"role": "user", "content": "Hello"}, '
          '{"role": "assistant", "content": "Hello, Ada."}], alone or under the key "messages"')


# ------------------------------------------------------------------------------------------------
# one record: what another program takes for a conversation

def _is_list_of(value, kind):
    """Whether a value is a list whose first item is of a kind."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _is_messages(value):
    return _is_list_of(value, dict) and is_message(value[0])


def _parsed(value):
    """A list of messages that is written as text, by json or by repr(); else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError):
            continue
        if _is_messages(parsed):
            return parsed
    return value


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
    """A text or a number as text without white space around it; None for any other value."""
    if isinstance(value, str):
        return value.strip()
    is_number = type(value) in (int, float) and value == value  # pandas writes NaN for nothing
    return str(value) if is_number else None


def _pair(record):
    """(messages, name of the form) of a record with a question and an answer, or None."""
    asked = [key for key in QUESTIONS if record.get(key) is not None]
    answered = [key for key in ANSWERS if record.get(key) is not None]
    if not asked or not answered:
        return None
    form = f"{asked[0]}/{answered[0]}"
    question, answer = record[asked[0]], record[answered[0]]
    if _is_messages(question) and _is_messages(answer):
        return question + answer, form

    question, answer = _as_text(question), _as_text(answer)
    if question is None or answer is None:
        return None
    for key in DETAILS:
        detail = _as_text(record.get(key)) if key != asked[0] else None
        question += f"\n\n{detail}" if detail else ""
    return conversation(question, answer)["messages"], form


def _recognise(record):
    """(messages, name of the form) of a record, or None."""
    messages = record
    if isinstance(record, dict):
        named = [record[key] for key in MESSAGES if _is_messages(record.get(key))]
        messages = named[0] if named else None
        pair = None if named else _pair(record)
        if pair:
            return pair
        messages = messages or _find_messages(record)
    if not _is_messages(messages):
        return None
    keys = [key for key in messages[0] if key in ROLE_KEYS + CONTENT_KEYS]
    return messages, "/".join(keys)


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

def _read_text(path):
    """The text of a file, decompressed; UserError where its encoding cannot be told."""
    encoding = find_encoding(path)
    if encoding != "utf-8":
        print0(f"{path}: read as {encoding}")
    with open_text(path, encoding) as stream:
        return stream.read().removeprefix("\ufeff")


def _from_json(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:   # a number of too many digits; brackets
        raise UserError(f"{path}, line {first_line} cannot be read: {error}") from error


def _records_in(place, value):
    """Yield (place, record) of a value: itself, or what is in a list of records.

    The list may be under a key: {"version": 2, "data": [{"prompt": ...}, ...]}.
    """
    records = value
    if isinstance(value, dict) and _recognise(_lower_keys(value)) is None:
        lists = [inner for inner in value.values() if _is_list_of(inner, (dict, list))]
        records = lists[0] if len(lists) == 1 else None
    if not _is_list_of(records, object) or _is_messages(records):
        yield place or "entry 1", value
        return
    begin = f"{place}, " if place else ""
    for number, record in enumerate(records, start=1):
        yield f"{begin}entry {number}", record


def _read_json(path):
    """One JSON value per line, or one in the whole file."""
    text = _read_text(path)
    # not splitlines(): it also breaks at U+2028 inside a string
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        for _, line in lines[:1]:
            json.loads(line)
    except (ValueError, RecursionError):
        # the first line is no value: the file is one, over many lines
        yield from _records_in("", _from_json(text, path, 1))
        return
    for number, line in lines:
        yield from _records_in(f"line {number}", _from_json(line, path, number))


def _read_csv(path):
    """Rows under a line of column names, divided by commas, semicolons or tabs."""
    stream = io.StringIO(_read_text(path), newline="")
    passed, head = read_header(stream)
    delimiter = max(DELIMITERS, key=head.count)
    csv.field_size_limit(MAX_CELL)
    names = next(csv.reader([head], delimiter=delimiter), [])
    reader = csv.DictReader(stream, names, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            yield f"line {reader.line_num + passed}", record
    except csv.Error as error:
        line = reader.reader.line_num + passed  # reader's own is that of the row before
        raise UserError(f"{path}, line {line} is not csv: {error}") from error


def _read_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is damaged, or no parquet: {error}") from error
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


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
                self._add(place, record, forms, changes)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read conversations from {path}: {reason}") from error
        if not self.conversations:
            raise UserError(f"{path} holds no conversations: {WANTED}")

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
