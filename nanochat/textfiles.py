"""Read the documents of one text file: .txt, .md, .jsonl, .json, .csv, compressed or not.

    path = Path("corpus.jsonl.gz")
    for text in read_text_file(path, find_encoding(path)):
        ...

docs/data.md shows every form. A file is read twice, a block at a time: first for its encoding, by
nanochat/encoding.py, then for its documents. What is held in memory is a document, never the file.
Parquet files are the subject of nanochat/shards.py.
"""
import csv
import io
import itertools
import json

from nanochat.common import UserError
from nanochat.conversation import is_like_a_conversation, is_message
from nanochat.encoding import (
    DECOMPRESSORS,
    HEAD_BYTES,
    NOTES,
    NoText,
    open_bytes,
    open_text,
    text_suffix,
    wide_encoding,
)
from nanochat.tables import find_delimiter, hold_conversations, read_header, too_many_columns

DOCUMENT_CHARS = 6_000      # longer files are split into documents of at most this
MAX_CSV_FIELD = 2**31 - 1   # the csv module's own limit is 131,072 characters
MAX_VALUE_CHARS = 200_000_000  # of one value in a .json file
BLOCK_CHARS = 1 << 16       # read at a time to divide into documents
MAX_NAMES = 10              # of the keys that an error lists
WANTED_LINE = 'an object of the form {"text": "..."} in valid Unicode'
WANTED_LIST = '[{"text": "..."}, ...] or ["...", ...]'
CONVERSATION = (
    "a conversation, not text: conversations go to --custom of scripts.chat_sft, "
    "or CUSTOM= of speedrun.sh"
)

# How to convert what is not read
CONVERSIONS = {
    ".pdf": "pdftotext FILE.pdf",
    ".doc": "libreoffice --convert-to txt FILE.doc",
    ".docx": "pandoc FILE.docx -o FILE.md",
    ".rtf": "pandoc FILE.rtf -o FILE.md",
    ".odt": "pandoc FILE.odt -o FILE.md",
    ".epub": "pandoc FILE.epub -o FILE.md",
    ".html": "pandoc FILE.html -o FILE.md",
    ".htm": "pandoc FILE.htm -o FILE.md",
    ".xls": "libreoffice --convert-to csv FILE.xls",
    ".xlsx": "libreoffice --convert-to csv FILE.xlsx",
    ".ods": "libreoffice --convert-to csv FILE.ods",
    ".lz4": "lz4 -d FILE.lz4",
    ".zip": "unzip FILE.zip",
    ".tar": "tar xf FILE.tar",
    ".tgz": "tar xf FILE.tgz",
    ".7z": "7z x FILE.7z",
    ".arrow": "datasets.load_from_disk(FOLDER).to_parquet('FILE.parquet')",
}


# ----------------------------------------------------------------------------------------------
# documents

def split_document(text, limit=DOCUMENT_CHARS):
    """Cut `text` into pieces of at most `limit` characters; joined, the pieces are the text again.

    Each cut is the best break in the last two thirds of a piece: two blank lines (between top-level
    definitions), else one blank line, else a line's end, else anywhere.

    >>> split_document("one\\ntwo\\n\\nthree", 10)
    ['one\\ntwo\\n\\n', 'three']
    """
    pieces = []
    while len(text) > limit:
        cut = _best_cut(text, limit)
        pieces.append(text[:cut])
        text = text[cut:]
    pieces.append(text)
    return pieces


def _best_cut(text, limit):
    """Where to cut a text that is longer than `limit`, at most `limit` characters in."""
    earliest = limit // 3
    for mark in ("\n\n\n", "\n\n", "\n"):
        cut = text.rfind(mark, earliest, limit) + len(mark)
        if cut > earliest:
            return cut
    return limit


def text_key(names):
    """The name of the column or key that holds the text: "text", or the only other one like "Text".

    None where there is none, or several of which none is "text".
    """
    if "text" in names:
        return "text"
    found = [name for name in names if isinstance(name, str) and name.strip().lower() == "text"]
    return found[0] if len(found) == 1 else None


def _has_text_form(record):
    """Whether it is {"text": ...} or a bare "..."."""
    is_object = isinstance(record, dict) and text_key(record) is not None
    return is_object or isinstance(record, str)


def _is_conversation(record):
    """Whether a record, or the first one of a list, is a conversation and not {"text": ...}."""
    is_list = isinstance(record, list) and bool(record) and not is_message(record[0])
    first = record[0] if is_list else record
    return is_like_a_conversation(first) and not _has_text_form(first)


def _text_of(record, place):
    """The text of {"text": "..."} or of a bare "...", None for a null.

    place: the file and the line or item, for the UserError that anything else raises.
    """
    text = record
    if isinstance(record, dict) and text_key(record) is not None:
        text = record[text_key(record)]
    if text is None:
        return None
    try:
        text.encode("utf-8")  # an escaped lone surrogate is a str that no tokenizer can take
    except (AttributeError, ValueError) as error:
        raise UserError(f"{place}: {_what_else(record, text)}") from error
    return text


def _what_else(record, text):
    """What a record is that holds no text, and the remedy."""
    if is_like_a_conversation(record):
        return CONVERSATION
    if not isinstance(record, dict):
        return f"not {WANTED_LINE}"
    if text is record:
        names = ", ".join(map(str, [*record][:MAX_NAMES])) or "none"
        return f"not {WANTED_LINE} (its keys: {names}): rename the one that holds the text"
    if isinstance(text, list):
        return f"not {WANTED_LINE}: its text is a list, join it or write a line for each"
    return f"not {WANTED_LINE}"


# ----------------------------------------------------------------------------------------------
# forms: each reader takes a stream of text and the path, and yields str and None

def _read_plain(stream, path):
    """One text, cut into documents as split_document() does.

    Windows puts a mark before the text. Where such files were joined, marks begin later lines.
    """
    text = stream.read(BLOCK_CHARS).removeprefix("\ufeff")
    while block := stream.read(BLOCK_CHARS):
        text = (text + block).replace("\n\ufeff", "\n")
        *pieces, text = split_document(text)
        yield from pieces
    yield from split_document(text.replace("\n\ufeff", "\n"))


def _read_lines(stream, path):
    """One JSON object on each line; stream: any iterable of lines.

    A line ends at a line feed. str.splitlines() also breaks at U+2028, inside a string.
    Some .jsonl files are one list, or have their objects over several lines.
    """
    is_first = True
    begin = stream.readline().lstrip("\ufeff")
    is_list = begin.startswith("[") and not _is_conversation(_parsed_or_none(begin))
    if is_list or begin.strip() == "{":
        yield from _read_json(stream, path, begin)
        return
    for number, line in enumerate(itertools.chain([begin], stream), start=1):
        line = line.lstrip("\ufeff").strip()
        if not line:
            continue
        place = f"{path}, line {number}"
        record = _parse_line(line, place)
        if is_first and _is_conversation(record):
            raise NoText(f"{place}: {CONVERSATION}")
        is_first = False
        yield _text_of(record, place)


def _parsed_or_none(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parse_line(line, place):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not {WANTED_LINE}") from error


class _Values:
    """JSON values one after the other, from a stream of text of which a part is held in memory."""

    def __init__(self, stream, path, begin):
        self.stream = stream
        self.path = path
        self.text = (begin + stream.read(BLOCK_CHARS)).removeprefix("\ufeff")
        self.place = 0          # in self.text
        self.lines = 0          # that ended before self.text
        self.is_whole = False   # whether nothing follows self.text in the stream
        self.failure = NoText   # what to raise; UserError once documents were found

    def _read_more(self):
        """Drop what was passed, and read as much again as is left."""
        self.lines += self.text.count("\n", 0, self.place)
        self.text = self.text[self.place:]
        self.place = 0
        if len(self.text) > MAX_VALUE_CHARS:
            raise self.failure(
                f"{self.path}, line {self.lines + 1}: one value of over {MAX_VALUE_CHARS:,} "
                'characters: write it as .jsonl, {"text": "..."} on each line'
            )
        block = self.stream.read(max(BLOCK_CHARS, len(self.text)))
        self.text += block
        self.is_whole = not block

    def next_char(self):
        """The next character that is no white space, "" at the end. It is not taken."""
        while True:
            character = self.text[self.place:self.place + 1]
            if character.isspace():
                self.place += 1
            elif character or self.is_whole:
                return character
            else:
                self._read_more()

    def take_char(self):
        """The next character that is no white space, "" at the end."""
        character = self.next_char()
        self.place += len(character)
        return character

    def take(self):
        """The next value. json.JSONDecodeError where there is none."""
        self.next_char()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.is_whole or not self._may_be_cut(error):
                    raise
            else:
                # a number that ends where the text does may have more digits
                if end < len(self.text) or self.is_whole:
                    self.place = end
                    return value
            self._read_more()

    def _may_be_cut(self, error):
        """Whether the value may lack nothing but what follows in the stream."""
        return error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16

    def error(self, message):
        """A json.JSONDecodeError at the present place."""
        return json.JSONDecodeError(message, self.text, self.place)


def _read_json(stream, path, begin=""):
    """One list of texts or of objects, or {"text": ...} with one text or a list of them.

    begin: what was read of the stream before. Many a .json file is a .jsonl file in truth.
    """
    values = _Values(stream, path, begin)
    try:
        for number, record in enumerate(_records_of(values)):
            if values.failure is NoText:
                _check_first(record, path)
                values.failure = UserError
            yield _text_of(record, f"{path}, item {number}")
    except json.JSONDecodeError as error:
        line = values.lines + error.lineno
        raise values.failure(f"{path}, line {line}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise values.failure(f"{path}: not {WANTED_LIST}") from error
    except UserError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise values.failure(f"{path}: a number has too many digits: quote it") from error
    if values.failure is NoText:
        raise NoText(f"{path} holds no list of texts: the form is {WANTED_LIST}")


def _records_of(values):
    """Yield the items of lists, the items under the key "text", or the values of a .jsonl file."""
    if values.next_char() == "[":
        while values.next_char() == "[":
            yield from _items_of(values)
        if values.next_char():
            raise values.error("Extra data")
        return

    first = values.take()
    is_alone = values.next_char() == ""
    columns = first.get(text_key(first)) if isinstance(first, dict) else None
    if is_alone and isinstance(columns, list):
        yield from columns
        return
    yield first
    while values.next_char():
        yield values.take()


def _items_of(values):
    """Yield the items of the list that comes next."""
    values.take_char()
    mark = ","
    if values.next_char() == "]":
        mark = values.take_char()
    while mark == ",":
        yield values.take()
        mark = values.take_char()
    if mark != "]":
        raise values.error("Expecting ',' delimiter")


def _check_first(record, path):
    """NoText where the first record of a file shows that it holds something else than texts."""
    if _has_text_form(record):
        return
    if is_like_a_conversation(record):
        raise NoText(f"{path} holds {CONVERSATION}")
    raise NoText(f"{path} holds no list of texts: the form is {WANTED_LIST}")


def _read_table(stream, path):
    """The column "text", or the only column, of a table whose first line names the columns.

    Columns are divided by the one of DELIMITERS that shows the column "text".
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    header = read_header(stream, path)
    delimiter, names = find_delimiter(header, _has_text_column, hold_conversations)
    column = _text_column(names, path)
    rows = csv.reader(stream, delimiter=delimiter, strict=True)  # no quote may stay open
    try:
        for row in filter(None, rows):
            if any(map(str.strip, row[len(names):])):
                line = rows.line_num + header.lines
                raise UserError(too_many_columns(path, line, len(row), len(names), delimiter))
            yield row[column] if column < len(row) else None
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num + header.lines}: {error}: write \" in quotes as \"\""
        ) from error


def _has_text_column(names):
    return "text" in names


def _text_column(names, path):
    """The index of the column that holds the text. NoText, or UserError, where none is it."""
    names = [name.lower() for name in names]
    if names.count("text") > 1:
        raise UserError(f"{path} has {names.count('text')} columns 'text': keep one")
    if "text" in names:
        return names.index("text")
    if hold_conversations(names):
        raise NoText(f"{path} holds {CONVERSATION}")
    if len(names) > 1:
        raise NoText(
            f"{path} has no column 'text', only {names}: rename the one that holds the text"
        )
    return 0


READERS = {
    **dict.fromkeys(NOTES, _read_plain),
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".jsonlines": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}


# ----------------------------------------------------------------------------------------------
# files

def conversion_of(path):
    """The command that makes something that can be read of a file that cannot, or None.

    >>> conversion_of(Path("book.PDF"))
    'pdftotext FILE.pdf'
    """
    last = path.suffix.lower()
    if text_suffix(path) == ".parquet" and last in DECOMPRESSORS:
        return f"{DECOMPRESSORS[last]} FILE.parquet{last}"
    return CONVERSIONS.get(text_suffix(path))


def holds_text(path):
    """Whether a file that is read by its records begins like one that holds text.

    One that cannot be read might: whoever reads it says why not.
    """
    try:
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
        encoding = wide_encoding(head) or "utf-8"
        with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding, "replace") as text:
            next(READERS[text_suffix(path)](text, path), None)
    except NoText:
        return False
    except (UserError, OSError):
        return True
    return True


def read_text_file(path, encoding):
    """Yield the documents of one file whose text_suffix is in READERS: str, and None for nulls.

    encoding: what find_encoding() says.
    UserError with the file, and the line where there is one, for a file that cannot be read.
    """
    with open_text(path, encoding) as stream:
        yield from READERS[text_suffix(path)](stream, path)
