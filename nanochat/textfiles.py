"""Read the documents of one text file: .txt, .md, .jsonl, .json, .csv, compressed or not.

    path = Path("corpus.jsonl.gz")
    for text in read_text_file(path, find_encoding(path)):
        ...

docs/data.md shows every form. A file is read twice, a block at a time: first for its encoding, then
for its documents. What is held in memory is a document, never the file.

Text is UTF-8, UTF-16 or UTF-32, which can be told with certainty. Older encodings cannot: the byte
that is a letter in one is another letter in the next, and a wrong guess would be trained on. So
plain text is read as cp1252, the one of Western Europe, only where it makes the letters of one of
its languages. All else is refused with the line, and with the encoding that it seems to have.
Parquet files are the subject of nanochat/shards.py.
"""
import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import time
import zlib
from collections import Counter
from typing import NamedTuple

import pyarrow as pa

from nanochat.common import UserError, print0
from nanochat.conversation import is_like_a_conversation

DOCUMENT_CHARS = 6_000      # longer files are split into documents of at most this
MAX_CSV_FIELD = 2**31 - 1   # the csv module's own limit is 131,072 characters
MAX_VALUE_CHARS = 200_000_000  # of one value in a .json file
HEAD_BYTES = 4096           # enough to tell UTF-16 from UTF-8, and text from what is none
BLOCK_BYTES = 1 << 20       # read at a time to find the encoding
BLOCK_CHARS = 1 << 16       # read at a time to divide into documents
GUESS_BYTES = 1000          # on either side of a damaged byte
LFS_POINTER = b"version https://git-lfs.github.com/"
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
# Parquet is compressed inside: what was compressed again is not read in place
DECOMPRESSORS = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}

# What is no text though its name says so, by what it begins with
BINARY = {
    b"%PDF": "a PDF: convert it, as in pdftotext FILE.pdf",
    b"PK\x03\x04": "a zip, as .docx, .xlsx and .epub are: unpack it, or save it as csv or text",
    b"PAR1": "parquet: give it a name that ends with .parquet",
    b"\xd0\xcf\x11\xe0": "of an old Word or Excel: save it as csv or text",
    b"{\\rtf": "RTF: convert it, as in pandoc FILE.rtf -o FILE.md",
    b"SQLite format 3\x00": "an SQLite database: save the text of its tables as csv",
}
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # bytes of which text has hardly any
WEB_PAGE = (b"<!doctype html", b"<html")
MAX_CONTROL = 0.05          # the share of these; compressed data has 11 %, UTF-16 often more
DELIMITERS = ",;\t|"        # of the columns of a table
MAX_NAMES = 10              # of the keys that an error lists
MAX_HEADER_LINES = 100      # of the names of its columns, in quotes
REPORT_SECONDS = 2.0        # between two lines that say how far the reading of a file is


class NoText(UserError):
    """A file that is well formed, or might be, but holds no documents.

    Given alone it is an error. In a folder it is skipped, for a .json or .csv file is often a
    setting or holds conversations, and a .txt file is sometimes no text.
    """


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
# bytes

def _open_zstd(path):
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


# What a compressed file begins with, whatever its name, and what opens it
OPENERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
COMPRESSED = tuple(DECOMPRESSORS)


def check_not_a_pointer(path):
    """UserError where git has left the name of a large file in its place."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull there"
            )


def _open(path):
    """The file's bytes as a stream, decompressed."""
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, opener in OPENERS.items():
        if head.startswith(magic):
            return opener(path)
    return open(path, "rb")


@contextlib.contextmanager
def _open_bytes(path):
    """_open() as a context, in which damage to a compressed file becomes a UserError."""
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(_damage(path, error)) from error
    except OSError as error:
        if error.errno is not None:  # of the file system, which names the file
            raise
        raise UserError(_damage(path, error)) from error


def _damage(path, error):
    return f"{path} is damaged ({error}): copy or download it again"


@contextlib.contextmanager
def open_text(path, encoding):
    """A context with the text of a file, decompressed: a stream, "\\n" at the end of every line.

    encoding: what find_encoding() says.
    """
    with _open_bytes(path) as stream, io.TextIOWrapper(stream, encoding) as text:
        yield text


# ----------------------------------------------------------------------------------------------
# encodings

class _Wrong(NamedTuple):
    """The first byte of a file that its encoding does not have."""

    offset: int       # bytes before it
    line: int         # that it stands in, from 1
    neighbours: bytes


def find_encoding(path):
    """The encoding of a text file as Python names it: utf-8, utf-16, utf-32-le, cp1252, ...

    The whole file is read, so that whoever reads it in that encoding meets no byte that is wrong.
    NoText where it is no text. UserError with the line where the encoding cannot be told.
    """
    check_not_a_pointer(path)
    with _open_bytes(path) as stream:
        head = stream.read(HEAD_BYTES)
    encoding = _wide_encoding(head)
    if not encoding:
        _check_text(path, head)
        encoding = "utf-8"
    with _open_bytes(path) as stream:
        wrong = _first_wrong(stream, encoding, path)
    if wrong is None:
        return encoding

    # it is not, or not all of it
    if encoding != "utf-8":
        raise UserError(
            f"{path} is not {encoding.upper()} throughout (byte {wrong.offset}): "
            "copy or download it again"
        )
    is_plain = text_suffix(path) in PLAIN
    if is_plain and not _is_mostly_utf8(wrong.neighbours) and _is_cp1252(path):
        return "cp1252"
    raise UserError(
        f"{path}, line {wrong.line}: not UTF-8 (byte {wrong.offset}); {_advice(wrong.neighbours)}"
    )


def _check_text(path, head):
    """NoText where the first bytes of a file are those of no text."""
    for magic, kind in BINARY.items():
        if head.startswith(magic):
            raise NoText(f"{path} is no text but {kind}")
    if len(CONTROL.findall(head)) > MAX_CONTROL * len(head):
        raise NoText(f"{path} is no text but binary data: export the text that it holds")
    if text_suffix(path) not in NOTES and head.lstrip().lower().startswith(WEB_PAGE):
        raise UserError(f"{path} is a web page, not the file itself: download that")


def _wide_encoding(head):
    """UTF-16 or UTF-32, where a file begins like that, or None.

    Without a mark, zeros tell it: every other byte of Latin text is zero, and in other scripts
    those of line ends and spaces are. Of the two orders of bytes, one gives ASCII for them, the
    other characters that nobody has assigned.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" not in head or _is_utf8_text(head):
        return None
    encodings = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
    ascii_chars, encoding = max((_ascii_chars(head, name), name) for name in encodings)
    return encoding if ascii_chars > 0 else None


def _is_utf8_text(head):
    """Whether the first bytes of a file are UTF-8 with hardly a control character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(CONTROL.findall(head)) <= 2 * MAX_CONTROL * len(head)


def _ascii_chars(head, encoding):
    """How many characters of a head are ASCII in an encoding; 0 where it makes no text of it."""
    decoder = codecs.getincrementaldecoder(encoding)()  # which may end within a character
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return 0
    odd = sum(not (char.isprintable() or char.isspace()) for char in text)
    return sum(map(str.isascii, text)) if odd <= 0.01 * len(text) else 0


def _first_wrong(stream, encoding, path):
    """The _Wrong of a stream of bytes, or None where all of it is in the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    next_report = time.monotonic() + REPORT_SECONDS
    offset = 0
    line = 1
    while True:
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + REPORT_SECONDS
            print0(f"checking the encoding of {path}: {offset:,} bytes so far")
        block = stream.read(BLOCK_BYTES)
        data = decoder.getstate()[0] + block  # with what is left of the block before
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start = len(data) - len(error.object) + error.start
            neighbours = data[max(0, start - GUESS_BYTES):start + GUESS_BYTES]
            line += data.count(b"\n", 0, start)
            return _Wrong(offset + start, line, neighbours)
        if not block:
            return None
        used = len(data) - len(decoder.getstate()[0])
        line += data.count(b"\n", 0, used)
        offset += used


def _is_mostly_utf8(data):
    """Whether bytes of which one is not UTF-8 have more characters beyond ASCII that are."""
    characters = data.decode("utf-8", errors="replace")
    wrong = characters.count("\ufffd")
    right = sum(character > "\x7f" for character in characters) - wrong
    return right > wrong


def _advice(data):
    """What to do about bytes that are not UTF-8, by what their neighbours look like."""
    if _is_mostly_utf8(data):
        return "the text around it is UTF-8: correct or remove this line"
    guess = _guess(data)
    if guess is None:
        return "its encoding is unknown: convert it, as in iconv -f ENCODING -t utf-8"
    return f"it looks like {guess}: convert it, as in iconv -f {guess} -t utf-8"


LETTER = r"[^\W\d_]"

# What text of an encoding holds in words without ASCII letters, and the least share of it in all
# that is not ASCII: frequent letters (small ones, as case is swapped between KOI8-R and others),
# Japanese syllables, frequent characters
RUSSIAN = "[оеаинтсрв]"
KANA = "[ぁ-ゖァ-ヺ]"
TRIALS = {
    "cp1251": (RUSSIAN, 0.45),
    "koi8-r": (RUSSIAN, 0.45),
    "cp866": (RUSSIAN, 0.45),
    "iso8859-5": (RUSSIAN, 0.45),
    "cp1253": ("[αοιετσςνηυ]", 0.45),
    "shift_jis": (KANA, 0.3),
    "euc-jp": (KANA, 0.3),
    "gb18030": ("[的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子]", 0.12),
    "euc-kr": ("[가-힣]", 0.85),
}
CLEARLY = 1.25  # by how much the best must be better than the second


def _guess(data):
    """The encoding that bytes clearly are in, or None."""
    is_western = _CharacterCounts()
    is_western.add(data)
    if is_western.is_cp1252():
        high = [byte for byte in data if byte > 0x7f]
        return "cp1252" if min(high) < 0xa0 else "latin1"

    scores = sorted((_score(data, name), name) for name in TRIALS)
    (second, _), (best, name) = scores[-2:]
    return name if best >= max(1, CLEARLY * second) else None


def _score(data, encoding):
    """How well bytes can be read in one of TRIALS; from 1 on they look like it.

    They may begin, and end, within a character.
    """
    best = 0.0
    for start in range(4):
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(data[start:])
            best = max(best, _share(text, *TRIALS[encoding]))
        except UnicodeDecodeError:
            continue
    return best


def _share(text, pattern, least):
    """The share of a pattern in the characters of a text beyond ASCII, as a multiple of `least`."""
    words = re.findall(f"{LETTER}+", text)
    foreign = "".join(word for word in words if not re.search("[A-Za-z]", word))
    high = sum(character > "\x7f" for character in text)
    return len(re.findall(pattern, foreign)) / max(1, high) / least


# Letters beyond ASCII of the languages that are read as cp1252. Icelandic and Estonian are missing:
# Turkish and Hungarian, in their own encodings, would look like them.
ALPHABETS = (
    "àâæçèéêëîïôœùûüÿ",     # French
    "äöüßàèé",              # German
    "áéíóúüñ",              # Spanish
    "àáâãçéêíóôõúü",        # Portuguese
    "àèéìíîòóùú",           # Italian
    "àáâäçèéêëíïñóôöûü",    # Dutch, and English with its foreign words
    "åæøàâäéèêóòôöü",       # Danish, Norwegian
    "åäöàáèéü",             # Swedish, Finnish
    "àçèéíïñòóúü",          # Catalan
)
ODD_PLACES = re.compile(
    # in a word stands no sign, and after a word no sign that opens something
    f"(?<={LETTER})[¡-¬®-³µ¶¸-¿×÷‚ƒ„†-‹•˜›](?={LETTER})"
    f"|(?<={LETTER})[¡£¤¥¦¨¬¯±µ¶¸¼¾¿×÷‚ƒ„†ˆ‹˜]"
    # a small letter is not followed by a capital one, and no amount is a letter's beginning
    f"|(?<=[a-zß-ÿ])[À-ÞŠŒŽŸ]"
    f"|[£¥¹³¼¾¦¬¯±](?={LETTER})"
    # no word consists of them alone: that is a word of another script
    f"|[À-ÿ]{{3,}}|(?<!{LETTER})[À-ÿ]{{2,}}(?!{LETTER})"
)


class _CharacterCounts:
    """Counts of what tells cp1252 from other encodings, in blocks of bytes."""

    def __init__(self):
        self.high = Counter()
        self.odd_places = 0
        self.ascii_letters = 0
        self.is_decodable = True  # five bytes have no meaning in it

    def add(self, block):
        try:
            text = block.decode("cp1252")
        except UnicodeDecodeError:
            self.is_decodable = False
            return
        self.high.update(character.lower() for character in text if character > "\x7f")
        self.odd_places += len(ODD_PLACES.findall(text))
        self.ascii_letters += sum(map(str.isalpha, block.decode("ascii", errors="ignore")))

    def is_cp1252(self):
        """Whether it is Western European text in cp1252 (or in Latin-1, which is part of it)."""
        signs = "ªºµ"  # which Unicode counts among the letters
        letters = {char: n for char, n in self.high.items() if char.isalpha() and char not in signs}
        known = max(sum(letters.get(letter, 0) for letter in each) for each in ALPHABETS)
        is_one_language = known >= 0.98 * sum(letters.values())
        is_latin = self.is_decodable and self.high.total() <= self.ascii_letters
        return is_latin and is_one_language and self.odd_places <= 0.01 * self.high.total()


def _is_cp1252(path):
    """Whether the file is Western European text in cp1252."""
    counts = _CharacterCounts()
    with _open_bytes(path) as stream:
        while counts.is_decodable and (block := stream.read(BLOCK_BYTES)):
            counts.add(block)
    return counts.is_cp1252()


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
    begin = stream.readline()
    is_list = begin.startswith("[") and not is_like_a_conversation(_parsed_or_none(begin))
    if is_list or begin.strip() == "{":
        yield from _read_json(stream, path, begin)
        return
    for number, line in enumerate(itertools.chain([begin], stream), start=1):
        line = line.lstrip("\ufeff").strip()
        if not line:
            continue
        place = f"{path}, line {number}"
        record = _parse_line(line, place)
        if is_first and is_like_a_conversation(record):
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
    delimiter, names = find_delimiter(header, _has_text_column, _is_recognised)
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


def _has_text_column(names):
    return "text" in names


def _is_recognised(names):
    """Whether columns of these names hold conversations."""
    return is_like_a_conversation(dict.fromkeys(names, ""))


def _text_column(names, path):
    """The index of the column that holds the text. NoText, or UserError, where none is it."""
    names = [name.lower() for name in names]
    if names.count("text") > 1:
        raise UserError(f"{path} has {names.count('text')} columns 'text': keep one")
    if "text" in names:
        return names.index("text")
    if _is_recognised(names):
        raise NoText(f"{path} holds {CONVERSATION}")
    if len(names) > 1:
        raise NoText(
            f"{path} has no column 'text', only {names}: rename the one that holds the text"
        )
    return 0


READERS = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".markdown": _read_plain,
    ".rst": _read_plain,
    ".org": _read_plain,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".jsonlines": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
NOTES = tuple(suffix for suffix, reader in READERS.items() if reader is _read_plain)
PLAIN = (*NOTES, ".csv", ".tsv")  # may be in an encoding that is older than Unicode


# ----------------------------------------------------------------------------------------------
# files

def text_suffix(path):
    """The suffix that says how a file is read, without the one of its compression.

    >>> text_suffix(Path("notes/Corpus.JSONL.gz"))
    '.jsonl'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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
        with _open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
        encoding = _wide_encoding(head) or "utf-8"
        with _open_bytes(path) as stream, io.TextIOWrapper(stream, encoding, "replace") as text:
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
