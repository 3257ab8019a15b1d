"""The structure of a person's text: sections under headings, and in them the units of a quote.

    for section in sections("# Garden\\n\\n- Beans: sown in May\\n- Peas"):
        section.heading     # "Garden"
        section.units       # ["Beans: sown in May", "Peas"]

A unit is what is never cut when the text is quoted: a sentence, a list item, a row of a table, a
line of a dialogue. Headings are those of Markdown, lines in bold face or in capitals, and lines of
the form "Chapter 3". Nothing here depends on a language; sentences also end with the full stops of
scripts without spaces.
"""
import itertools
import re
from typing import NamedTuple

from nanochat.words import is_unspaced

MAX_CHARS = 50_000_000  # of text that is cut into passages
PASSAGE_CHARS = 500     # a passage is closed once it is longer
UNIT_CHARS = 300        # a longer unit is cut, so that a quote can hold it
HEADING = re.compile(r"(#{1,6})\s+(\S.*)")
UNDERLINE = re.compile(r"(=|-){3,}\s*")
BOLD_LINE = re.compile(r"(?:\*\*|__)([^*_]{1,80}?):?(?:\*\*|__):?")
# "Chapter 3", "Part II: The House", "Chapter One", but not "Part I liked" or "Part of the garden"
NUMBERED = re.compile(
    r"(?:chapter|kapitel|chapitre|cap[ií]tulo|part|teil)\s+"
    r"(?:(?:\d{1,4}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
    r"|(?-i:[IVXLCDM]{2,}\b|[IVX](?!\s*\w)))(?:\.|.{0,60}(?<!\.))"
    r"|第.{1,5}[章回].{0,30}",
    re.IGNORECASE,
)
# A bullet is markup; a number is not ("3. Mai: ..."), and before one a dash may be a minus.
ITEM = re.compile(r"\s*(?:[*+•]\s+|-\s+(?![\s\d])|(?=(?:-\s+)?\d{1,3}[.)]\s)|(?=-\s+\d))"
                  r"(?:\[([ xX])\]\s*)?")
TABLE_RULE = re.compile(r"[\s:|-]+")
FENCE = re.compile(r"\s*(```|~~~)[^`]*")
FRONT_MATTER = re.compile(r"---\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]*)[^)]*\)")
STRUCK = re.compile(r"~~(?=\S)(.+?)(?<=\S)~~")
EMPHASIS = re.compile(r"(?<!\w)(\*\*|__|\*|_|`{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")

# Where a sentence ends: behind a mark that is followed by a blank and no small letter, or behind a
# full stop of a script without spaces. No sentence ends behind a number ("am 3. Mai"), one letter
# ("J. S. Bach") or one of the usual abbreviations.
SENTENCE_END = re.compile(
    r"(?<=[!?…])\s+|(?<=[.!?…][\"'”’»)\]])\s+"
    r"|(?:(?<=[^\W\d]{2}\.)|(?<=[^\w\s]\.))\s+(?=[^a-zà-öø-ÿ])"
    r"|(?<=[。！？])(?![」』”）])"
)
ABBREVIATION = re.compile(
    r"(?:^|\W)(?:Dr|Mr|Mrs|Ms|St|No|Nr|Tel|ca|bzw|etc|vs|approx|Prof|Fr|Hr|Str|Mme|Sra|Sr|inkl)\.$",
    re.IGNORECASE,
)
LONG_LINE = 55      # characters; a paragraph is wrapped where every line but its last is longer
HEADING_CHARS = 200     # a longer line is no heading
CAPITALS = 60       # a line in capitals is a heading up to this length
MARKUP_CHARS = 5_000


class Passage(NamedTuple):
    """A few units of a text: its file, the path of headings above it, and the units, in order."""

    source: str
    heading: str
    units: tuple


class Section(NamedTuple):
    """What stands under one heading: its path ("Garden > Beans", "" before the first), and the
    units."""

    heading: str
    units: list


def passages_of(documents, max_chars=MAX_CHARS):
    """Cut documents, pairs (name, text), into a list of Passage; the text beyond max_chars is
    left out. Documents of one name that follow each other are one text, which had been cut."""
    passages = []
    for name, pieces in itertools.groupby(documents, key=lambda document: document[0]):
        text = "".join(piece for _, piece in pieces)
        if max_chars <= 0:
            break
        for section in sections(text[:max_chars]):
            passages += _cut_section(name, section)
        max_chars -= len(text)
    return passages


def file_of(source):
    """The file of a source, without the row of a table that it may name.

    >>> file_of("part-0.parquet, row 17")
    'part-0.parquet'
    """
    return re.sub(r", row \d+$", "", source)


def _cut_section(name, section):
    """The passages of a section; a heading without text is a unit of its own."""
    passages, units, size = [], [], 0
    for unit in section.units:
        if units and size + len(unit) > PASSAGE_CHARS:
            passages.append(Passage(name, section.heading, tuple(units)))
            units, size = [], 0
        units.append(unit)
        size += len(unit)
    units = units or [section.heading.split(" > ")[-1]]
    return [*passages, Passage(name, section.heading, tuple(units))]


def sections(text):
    """The sections of a text that have a heading or a unit, in order: a list of Section."""
    found = [Section("", [])]
    path = {}   # level -> heading
    matter = FRONT_MATTER.match(text)
    if matter:
        _add_front_matter(matter[1], found[0])
        text = text[matter.end():]

    paragraph = []
    lines = text.split("\n")
    fence = None    # of the code that the line is in
    for line in lines:
        # code is kept line by line, as it is
        match = FENCE.fullmatch(line)
        if match and fence in (None, match[1]):
            _close(paragraph, found[-1])
            fence = None if fence else match[1]
            continue
        if fence:
            _add_words(found[-1], line)
            continue

        # a heading begins a section
        level, heading = _heading_of(line, paragraph)
        if level:
            _close(paragraph, found[-1])
            path = {known: name for known, name in path.items() if known < level}
            path[level] = heading
            names = [path[known] for known in sorted(path)]
            found.append(Section(" > ".join(names), []))
            continue
        _read_line(line, paragraph, found[-1])
    _close(paragraph, found[-1])
    return [section for section in found if section.units or section.heading]


def plain(text):
    """A line of Markdown as a person reads it: without emphasis and what is struck out; links as
    text (address).

    A very long one is data and no prose: searching its marks in pairs could take minutes.
    """
    if len(text) <= MARKUP_CHARS:
        text = LINK.sub(_link_text, text)
        text = STRUCK.sub("", text)
        text = EMPHASIS.sub(r"\2", text)
    return " ".join(text.split())


def _link_text(match):
    """A link's text, with its address where that is one of the web."""
    text, address = match[1], match[2]
    return f"{text} ({address})" if "://" in address and text != address else text


def _add_front_matter(matter, section):
    """The entries of the front matter, a line each."""
    for line in matter.split("\n"):
        _add(section, line)


def _add(section, text):
    """Append what a person reads of a line of Markdown."""
    _add_words(section, plain(text))


def _add_words(section, text):
    """Append a unit that is not empty; one that is too long for a quote is cut."""
    text = " ".join(text.split())
    while len(text) > UNIT_CHARS:
        cut = max(text.rfind(mark, UNIT_CHARS // 3, UNIT_CHARS) for mark in ("; ", ", ", "，", "、"))
        if cut < 0:
            cut = text.rfind(" ", UNIT_CHARS // 3, UNIT_CHARS)
        cut = cut + 1 if cut > 0 else UNIT_CHARS
        section.units.append(text[:cut])
        text = text[cut:].strip()
    if text:
        section.units.append(text)


def _heading_of(line, paragraph):
    """(level, heading) of a line that is a heading, (0, "") of another.

    A line that underlines the paragraph before it takes that line, the heading, out of it.
    """
    bare = line.strip()
    if not bare or len(bare) > HEADING_CHARS:
        return 0, ""
    match = HEADING.fullmatch(line.rstrip())
    if match:
        return len(match[1]), plain(match[2].rstrip("# "))
    if len(paragraph) == 1 and UNDERLINE.fullmatch(bare):
        return (1 if bare[0] == "=" else 2), plain(paragraph.pop())
    if paragraph:
        return 0, ""
    match = BOLD_LINE.fullmatch(bare)
    if match:
        return 5, plain(match[1])
    if NUMBERED.fullmatch(bare) or _is_in_capitals(bare):
        return 1, bare.rstrip(":")
    return 0, ""


def _is_in_capitals(line):
    """Whether a line reads as a title in capitals."""
    letters = [character for character in line if character.isalpha()]
    if len(letters) < 5 or len(line) > CAPITALS:
        return False
    return line[0].isalnum() and line.isupper() and line[-1] not in ".,;!?"


def _read_line(line, paragraph, section):
    """Take in a line that is no heading: what it begins, continues, or ends."""
    item = ITEM.match(line)
    is_row = line.strip().startswith("|") and line.count("|") > 1
    if not line.strip():
        _close(paragraph, section)
    elif item:
        _close(paragraph, section)
        done = {"x": "[x] ", "X": "[x] ", " ": "[ ] "}.get(item[1], "")
        paragraph[:] = [_Item(done + line[item.end():])]
    elif is_row:
        _close(paragraph, section)
        if not TABLE_RULE.fullmatch(line.strip()):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            _add(section, " | ".join(cells))
    else:
        paragraph.append(line.lstrip("> ").rstrip())


class _Item(str):
    """The first line of a list item, which the lines after it continue."""


def _close(paragraph, section):
    """The lines of a paragraph or list item become units; the paragraph is emptied."""
    lines = [line for line in paragraph if line.strip()]
    paragraph.clear()
    if not lines:
        return
    if isinstance(lines[0], _Item):
        _add(section, " ".join(map(str, lines)))
        return
    is_wrapped = all(len(line) > LONG_LINE for line in lines[:-1])
    texts = [_join(lines)] if is_wrapped else lines
    for text in texts:
        for sentence in sentences(text):
            _add(section, sentence)


def _join(lines):
    """Wrapped lines as one; between two characters of a script without spaces nothing is put."""
    text = lines[0]
    for line in lines[1:]:
        gap = "" if is_unspaced(text[-1:]) and is_unspaced(line[:1]) else " "
        text += gap + line
    return text


def sentences(text):
    """The sentences of a paragraph, a list of str.

    >>> sentences("Dr. Ames came on 3. May. She left! Why?")
    ['Dr. Ames came on 3. May.', 'She left!', 'Why?']
    """
    found = []
    for piece in SENTENCE_END.split(text):
        if not piece:
            continue
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return found
