"""Read the documents of one text file: .txt, .md, .jsonl, .json, .csv, compressed or not.

    documents = read_text_file(Path("corpus.jsonl.gz"))

docs/data.md shows every form. Text is UTF-8. A file of another encoding is refused with the line,
and with the encoding that it seems to have: a wrong guess would be trained on without a word.
Parquet files are read by nanochat/dataset.py, in place.
"""
import bz2
import csv
import gzip
import io
import json
import lzma
import zlib

import pyarrow as pa

from nanochat.common import UserError

DOCUMENT_CHARS = 6_000      # longer files are split into documents of at most this
MAX_CSV_FIELD = 2**31 - 1   # the csv module's own limit is 131,072 characters
HEAD_BYTES = 4096           # enough to tell UTF-16 from UTF-8
GUESS_BYTES = 1000          # on either side of a damaged byte
LFS_POINTER = b"version https://git-lfs.github.com/"
WANTED_LINE = 'an object of the form {"text": "..."} in valid Unicode'
WANTED_LIST = '[{"text": "..."}, ...] or ["...", ...]'

# How to convert what is not read
CONVERSIONS = {
    ".pdf": "pdftotext FILE.pdf",
    ".docx": "pandoc FILE.docx -o FILE.md",
    ".odt": "pandoc FILE.odt -o FILE.md",
    ".epub": "pandoc FILE.epub -o FILE.md",
    ".html": "pandoc FILE.html -o FILE.md",
    ".zip": "unzip FILE.zip",
    ".tar": "tar xf FILE.tar",
    ".tgz": "tar xf FILE.tgz",
    ".7z": "7z x FILE.7z",
    ".arrow": "datasets.load_from_disk(FOLDER).to_parquet('FILE.parquet')",
    ".parquet": "gunzip FILE.parquet.gz",  # only a compressed one comes here
}


class NoText(UserError):
    """A .json or .csv file that is well formed, or might be, but holds no documents.

    Given alone it is an error. In a folder it is skipped, for such a file is often a setting.
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


def _has_text_form(record):
    """Whether it is {"text": ...} or a bare "..."."""
    return isinstance(record, str) or (isinstance(record, dict) and "text" in record)


def _text_of(record, place):
    """The text of {"text": "..."} or of a bare "...", None for a null.

    place: the file and the line or item, for the UserError that anything else raises.
    """
    text = record["text"] if isinstance(record, dict) and "text" in record else record
    if text is None:
        return None
    try:
        text.encode("utf-8")  # an escaped lone surrogate is a str that no tokenizer can take
    except (AttributeError, ValueError) as error:
        raise UserError(f"{place}: not {WANTED_LINE}") from error
    return text


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
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


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


def _wide_encoding(head):
    """UTF-16 or UTF-32 as iconv spells it, where a file begins like that, or None.

    Without a mark, every other byte of such a text is zero as long as it is Latin.
    """
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    pairs = len(head) // 2
    for name, zeros, others in (
        ("utf-16le", head[1::2], head[::2]),
        ("utf-16be", head[::2], head[1::2]),
    ):
        is_wide = zeros.count(0) > 0.6 * pairs and others.count(0) < 0.1 * pairs
        if is_wide:
            return name
    return None


def _advice(data):
    """What to do about bytes that are not UTF-8, by what their neighbours look like."""
    characters = data.decode("utf-8", errors="replace")
    wrong = characters.count("\ufffd")
    right = sum(character > "\x7f" for character in characters) - wrong
    if right > wrong:
        return "the text around it is UTF-8: correct or remove this line"

    high = [byte for byte in data if byte > 0x7f]
    letters = sum(map(str.isalpha, data.decode("ascii", errors="ignore")))
    if len(high) <= letters:
        guess = "cp1252" if min(high) < 0xa0 else "latin1"
    elif sum(byte >= 0xc0 for byte in high) > 0.85 * len(high):
        guess = "cp1251"
    elif sum(byte in (0x82, 0x83) for byte in high) > 0.2 * len(high):
        guess = "shift_jis"
    else:
        guess = "gb18030"
    return f"it looks like {guess}: convert it, as in iconv -f {guess} -t utf-8"


def _decode(data, path, line=1, offset=0):
    """Bytes as str; UserError with the line and the byte where they are not UTF-8.

    line, offset: where in the file the data begins.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
        neighbours = data[max(0, start - GUESS_BYTES):start + GUESS_BYTES]
        line += data.count(b"\n", 0, start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {offset + start}); {_advice(neighbours)}"
        ) from error


# ----------------------------------------------------------------------------------------------
# forms: each reader takes a stream of bytes and the path, and returns a list of str and None

def _read_whole(stream, path):
    """The text of a whole file, with "\\n" at the end of every line.

    Windows puts a mark before the text. Where such files were joined, marks begin later lines.
    """
    text = _decode(stream.read(), path).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n")


def _read_plain(stream, path):
    """One text, cut into documents."""
    return split_document(_read_whole(stream, path))


def _read_lines(stream, path):
    """One JSON object on each line.

    The bytes are divided, not the text: str.splitlines() also breaks at U+2028 inside a string.
    """
    texts = []
    offset = 0
    for number, line in enumerate(stream, start=1):
        place = f"{path}, line {number}"
        for part in line.split(b"\r"):
            record = _decode(part, path, number, offset).lstrip("\ufeff").strip()
            if record:
                texts.append(_text_of(_parse_line(record, place), place))
        offset += len(line)
    return texts


def _parse_line(record, place):
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not {WANTED_LINE}") from error


def _read_json(stream, path):
    """One list of texts or of objects, or {"text": ...} with one text or a list of them.

    Many a .json file is a .jsonl file in truth.
    """
    text = _read_whole(stream, path).lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise NoText(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise NoText(f"{path}: not {WANTED_LIST}") from error

    is_lines = text[end:].strip() != ""
    if is_lines and _has_text_form(value):
        return _read_lines(io.BytesIO(text.encode("utf-8")), path)

    # {"text": ...} becomes a list
    items = value["text"] if isinstance(value, dict) and "text" in value else value
    items = [items] if isinstance(items, str) else items
    is_list = isinstance(items, list) and items and _has_text_form(items[0])
    if is_lines or not is_list:
        raise NoText(f"{path} holds no list of texts: the form is {WANTED_LIST}")
    return [_text_of(item, f"{path}, item {i}") for i, item in enumerate(items)]


def _read_table(stream, path):
    """The column "text", or the only column, of a table whose first line names the columns.

    Columns are divided by a comma, semicolon or tab: by the one that shows the column "text".
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    data = _decode(stream.read(), path).removeprefix("\ufeff")
    header = data.split("\n", 1)[0]
    delimiter = next((mark for mark in ",;\t" if "text" in _columns(header, mark)), ",")
    names = _columns(header, delimiter)
    if names.count("text") > 1:
        raise UserError(f"{path} has {names.count('text')} columns 'text': keep one")
    if len(names) > 1 and "text" not in names:
        raise NoText(
            f"{path} has no column 'text', only {names}: rename the one that holds the text"
        )

    column = names.index("text") if "text" in names else 0
    rows = csv.reader(io.StringIO(data, newline=""), delimiter=delimiter)
    texts = []
    try:
        next(rows, None)  # the names
        for row in filter(None, rows):
            if len(row) > len(names):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} columns, the first line has "
                    f'{len(names)}: put a text that holds {delimiter!r} between "quotes"'
                )
            texts.append(row[column] if column < len(row) else None)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error
    return texts


def _columns(header, delimiter):
    """The names of the columns, in lower case."""
    names = next(csv.reader([header.strip("\r\n")], delimiter=delimiter), [])
    return [name.strip().lower() for name in names]


READERS = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}


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


def read_text_file(path):
    """The documents of one file whose text_suffix is in READERS: a list of str, None for nulls.

    UserError with the file, and the line where there is one, for a file that cannot be read.
    """
    check_not_a_pointer(path)
    try:
        with _open(path) as stream:
            head = stream.read(HEAD_BYTES)
        wide = _wide_encoding(head)
        if wide:
            raise UserError(
                f"{path} is not UTF-8 but {wide.upper()}: "
                f"convert it, as in iconv -f {wide} -t utf-8"
            )
        with _open(path) as stream:
            return READERS[text_suffix(path)](stream, path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(_damage(path, error)) from error
    except OSError as error:
        if error.errno is not None:  # of the file system, which names the file
            raise
        raise UserError(_damage(path, error)) from error


def _damage(path, error):
    return f"{path} is damaged ({error}): copy or download it again"
