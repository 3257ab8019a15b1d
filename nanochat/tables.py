"""The first line of a .csv or .tsv file: the names of its columns, and what divides them.

    header = read_header(stream, path)
    delimiter, names = find_delimiter(header, lambda names: "text" in names)
    rows = csv.reader(stream, delimiter=delimiter)
"""
import csv
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.conversation import is_like_a_conversation

DELIMITERS = ",;\t|"        # of the columns of a table
MAX_HEADER_LINES = 100      # of the names of its columns, in quotes


class Header(NamedTuple):
    """The names of a table's columns, before they are divided."""

    text: str       # on one line
    lines: int      # that were read, with those before it
    delimiter: str  # that the file names, or ""


def read_header(stream, path):
    """The Header of a table: the first line with column names, which may hold lines in quotes.

    Excel writes "sep=;" before them in some countries, and lines of nothing but delimiters.
    UserError where a quote stays open.
    """
    lines = 1
    delimiter = ""
    text = stream.readline().removeprefix("\ufeff")
    while text.startswith("sep=") or (text and not text.strip(DELIMITERS + "\n ")):
        if text.startswith("sep="):
            delimiter = text[4:5].strip("\n")
        lines += 1
        text = stream.readline()

    first = lines
    while _is_open(text):
        more = stream.readline()
        if not more or lines - first == MAX_HEADER_LINES:
            raise UserError(f"{path}, line {first}: a quote among the columns' names is not closed")
        lines += 1
        text += more
    text = text.rstrip("\n").replace("\n", " ").replace("\0", " ")
    return Header(text, lines, delimiter)


def _is_open(header):
    """Whether a quote is open at the end of the names of columns, whatever divides them."""
    for delimiter in DELIMITERS:
        try:
            next(csv.reader([header], delimiter=delimiter, strict=True), None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                return True
    return False


def find_delimiter(header, *are_wanted):
    """(delimiter, names of the columns) of a Header.

    are_wanted: functions of the names in lower case, the most important first. The delimiter is the
    one that the file names, else one that shows columns that are wanted, else the one that makes
    most columns.
    """
    candidates = [header.delimiter] if header.delimiter else DELIMITERS
    names = {mark: _columns(header.text, mark) for mark in candidates}
    for is_wanted in are_wanted:
        for mark, found in names.items():
            if is_wanted([name.lower() for name in found]):
                return mark, found
    best = max(names, key=lambda mark: len(names[mark]))
    return best, names[best]


def hold_conversations(names):
    """Whether columns of these names hold conversations, as find_delimiter() asks."""
    return is_like_a_conversation(dict.fromkeys(names, ""))


def too_many_columns(path, line, count, expected, delimiter):
    """The message about a row in which the delimiter stands in a text, as it seems."""
    return (
        f"{path}, line {line}: {count} columns, the first line has {expected}: "
        f'put a text that holds {delimiter!r} between "quotes"'
    )


def _columns(header, delimiter):
    """The names of the columns, with single spaces between their words."""
    names = next(csv.reader([header], delimiter=delimiter), [])
    return [" ".join(name.split()) for name in names]
