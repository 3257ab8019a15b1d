"""Open text files, compressed or not, and find out which encoding they are in.

    with open_text(path, find_encoding(path)) as stream:
        ...

A file is read a block at a time; to find its encoding, all of it is.

Text is UTF-8, UTF-16 or UTF-32, which can be told with certainty. Older encodings cannot: the byte
that is a letter in one is another letter in the next, and a wrong guess would be trained on. So
plain text is read as cp1252, the one of Western Europe, only where it makes the letters of one of
its languages. All else is refused with the line, and with the encoding that it seems to have.
"""
import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import time
import zlib
from collections import Counter
from typing import NamedTuple

import pyarrow as pa

from nanochat.common import UserError, print0

HEAD_BYTES = 4096           # enough to tell UTF-16 from UTF-8, and text from what is none
BLOCK_BYTES = 1 << 20       # read at a time to find the encoding
GUESS_BYTES = 1000          # on either side of a damaged byte
REPORT_SECONDS = 2.0        # between two lines that say how far the reading of a file is
LFS_POINTER = b"version https://git-lfs.github.com/"

NOTES = (".txt", ".md", ".markdown", ".rst", ".org")  # what a person writes
PLAIN = (*NOTES, ".csv", ".tsv")  # may be in an encoding that is older than Unicode

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


class NoText(UserError):
    """A file that is well formed, or might be, but holds no documents.

    Given alone it is an error. In a folder it is skipped, for a .json or .csv file is often a
    setting or holds conversations, and a .txt file is sometimes no text.
    """


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


def check_not_a_pointer(path):
    """UserError where git has left the name of a large file in its place."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull there"
            )


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


def _open(path):
    """The file's bytes as a stream, decompressed."""
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, opener in OPENERS.items():
        if head.startswith(magic):
            return opener(path)
    return open(path, "rb")


@contextlib.contextmanager
def open_bytes(path):
    """A context with the bytes of a file, decompressed: a stream.

    Damage to a compressed file becomes a UserError, wherever in the context it is met.
    """
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
    with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding) as text:
        yield text


# ----------------------------------------------------------------------------------------------
# Unicode

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
    with open_bytes(path) as stream:
        head = stream.read(HEAD_BYTES)
    encoding = wide_encoding(head)
    if not encoding:
        _check_text(path, head)
        encoding = "utf-8"
    with open_bytes(path) as stream:
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


def wide_encoding(head):
    """UTF-16 or UTF-32, where a file begins like that, or None; head: its first HEAD_BYTES.

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


# ----------------------------------------------------------------------------------------------
# older encodings

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
    with open_bytes(path) as stream:
        while counts.is_decodable and (block := stream.read(BLOCK_BYTES)):
            counts.add(block)
    return counts.is_cp1252()
