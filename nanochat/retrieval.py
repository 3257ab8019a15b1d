"""Look up a question in the user's own text, and quote what answers it.

    passages = Passages(passages_of([("garden.md", text), ...]))
    answer = passages.answer("When do I sow beans?")
    answer.quotes       # (Quote("Beans: sow in May.", "garden.md, Vegetables > Beans"),)
    answer.confidence   # SURE, DOUBTFUL or NOTHING

In two steps. BM25 (Robertson & Zaragoza 2009) finds the passages whose words are those of the
question; heading and file name are words of a passage. Then every window of neighbouring sentences
in the best passages is compared with the question: its *coverage* is the share of the question's
words, weighed by their rarity, that the window or its heading contains. Coverage decides what is
quoted, and how sure the answer is. In doubt the two nearest passages are quoted, more briefly.

A word also finds its other forms, compounds and misspellings (words.py), at a lower weight. They
are looked up in the vocabulary of the text when a question comes, so that the index holds whole
words only: it is counted when the text is loaded.
"""
import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from nanochat.conversation import NO_ROOM, NOTHING_FOUND
from nanochat.passages import file_of
from nanochat.words import COMPOUND_CHARS, STOP_WORDS, is_typo, language_of, likeness, words_of

QUOTE_CHARS = 450       # a quote is at most this long, but whole units of the text where it can be
QUOTE_STEPS = (450, 375, 300, 220, 150, 80, 1)  # what is tried where the room is less; 1: a unit
MIN_QUOTE_CHARS = 20    # where there is no room for more than this, nothing is quoted
CANDIDATES = 12         # passages whose windows are compared
K1, B = 1.2, 0.6        # of BM25: how fast repetition saturates, how much length counts
TYPO_CHARS = 6          # shorter words are taken as they are typed
TYPO_WEIGHT = 0.7       # of a word that is found misspelled
UNKNOWN_WEIGHT = 0.5    # of a word that the text lacks, in place of its rarity

# What the rank of a window adds to its coverage: the passage's score by BM25, the coverage of its
# heading, that of its best unit, and a definition of what is asked for
BM25_WEIGHT = 0.1
TITLE_WEIGHT = 0.3
UNIT_WEIGHT = 0.5
DEFINITION_WEIGHT = 0.1

# Calibrated on questions about 300 notes: dev/LOG.md, 2026-11-26
SURE, DOUBTFUL, NOTHING = "sure", "doubtful", "nothing"
SURE_COVERAGE = 0.8
DOUBTFUL_COVERAGE = 0.25
NOT_SURE = "I am not sure. The nearest I found:"
DOUBTFUL_QUOTES = 2         # in doubt so many passages are quoted,
DOUBTFUL_SHARE = 2 / 3      # each with this share of the characters that a quote may have


class Term(NamedTuple):
    """A word of a question: its variants in the text {word: weight}, its rarity, and how often each
    passage has it, (passages,)."""

    word: str
    variants: dict
    idf: float
    tf: np.ndarray


class Window(NamedTuple):
    """Neighbouring units, and how well they answer. evidence: how many words of the question were
    found, one in a heading or a definition counting twice."""

    quote: str
    coverage: float
    evidence: int
    rank: float


class Quote(NamedTuple):
    """Words of the text, and where they stand: "garden.md, Beans"."""

    text: str
    source: str


class Answer(NamedTuple):
    """What was found: one Quote, in doubt DOUBTFUL_QUOTES of them, and SURE, DOUBTFUL or NOTHING.

    coverage: the share of the question that was found in the first, 0 to 1.
    """

    quotes: tuple
    confidence: str
    coverage: float


class Passages:
    """The index of a list of Passage (passages.py).

    vocabulary          {word: number}
    posting_places, posting_counts    the passages that a word is in, and how often, word by word
    first_posting       where those of each word begin
    lengths             words of each passage
    document_count      from how many files they are
    subjects            words that alone are a heading, such as "work" of "# Work", or a file's name
    """

    def __init__(self, passages):
        self.passages = passages

        # 1) number the words; a heading's count twice
        number_of = defaultdict(lambda: len(number_of))
        ids, places = [], []
        for place, passage in enumerate(passages):
            words = words_of(" ".join(passage.units)) + 2 * words_of(title_of(passage))
            ids += [number_of[word] for word in words]
            places += [place] * len(words)

        self.vocabulary = dict(number_of)

        # 2) postings: of each word, the passages it is in and how often
        ids, places = np.array(ids, np.int64), np.array(places, np.int64)
        self.lengths = np.bincount(places, minlength=len(passages))
        pairs, counts = np.unique(ids * len(passages) + places, return_counts=True)
        self.posting_places = pairs % max(1, len(passages))
        self.posting_counts = counts
        bounds = np.arange(len(self.vocabulary) + 1) * len(passages)
        self.first_posting = np.searchsorted(pairs, bounds)
        self.document_count = len({file_of(passage.source) for passage in passages})
        self.subjects = {
            words[0] for passage in passages for words in subjects_of(passage) if len(words) == 1
        }
        self.words_by_start = defaultdict(list)
        for word in self.vocabulary:
            self.words_by_start[word[:3]].append(word)

    def variants(self, word):
        """{word of the vocabulary: weight} of the words that count as `word`, itself with 1."""
        candidates = set(self.words_by_start.get(word[:3], ()))
        if len(word) >= COMPOUND_CHARS:
            candidates.update(known for known in self.vocabulary if word in known)
        found = {known: likeness(word, known) for known in candidates}
        found = {known: weight for known, weight in found.items() if weight}
        if not found and len(word) >= TYPO_CHARS:
            found = {known: TYPO_WEIGHT for known in self.vocabulary if is_typo(word, known)}
        return found

    def postings(self, word):
        """(passages, counts) of a word of the vocabulary."""
        index = self.vocabulary[word]
        part = slice(self.first_posting[index], self.first_posting[index + 1])
        return self.posting_places[part], self.posting_counts[part]

    def terms(self, question):
        """The words of a question that may say what it is about, a list of Term."""
        words = words_of(question)
        ignored = STOP_WORDS[language_of(words)[0]] - self.subjects
        chosen = [word for word in words if word not in ignored] or names_in(question)
        return [self._term(word) for word in dict.fromkeys(chosen)]

    def _term(self, word):
        tf = np.zeros(len(self.passages))
        variants = self.variants(word)
        for known, weight in variants.items():
            places, counts = self.postings(known)
            tf[places] += weight * counts
        df = np.count_nonzero(tf)
        idf = math.log(1 + (len(tf) - df + 0.5) / (df + 0.5))
        if not df:
            idf *= UNKNOWN_WEIGHT
        return Term(word, variants, idf, tf)

    def answer(self, question, quote_chars=QUOTE_CHARS):
        """The Answer to a question, its quote of at most quote_chars or of one unit."""
        terms = self.terms(question)
        ranked = self._rank(terms)
        if not ranked:
            return Answer((), NOTHING, 0.0)

        best = self._best_windows(terms, ranked, quote_chars)[:1]
        confidence = confidence_of(best[0][0])
        coverage = best[0][0].coverage
        if confidence == DOUBTFUL:
            chars = int(DOUBTFUL_SHARE * quote_chars)
            best = self._best_windows(terms, ranked, chars)[:DOUBTFUL_QUOTES]
        quotes = [Quote(window.quote, source_of(passage)) for window, passage in best]
        return Answer(tuple(quotes), confidence, coverage)

    def _best_windows(self, terms, ranked, quote_chars):
        """The best window of each of some passages, [(Window, Passage)], best first.

        ranked: of _rank().
        """
        found = []
        for place, share in ranked:
            passage = self.passages[place]
            window = max(windows(passage, terms, quote_chars), key=lambda window: window.rank)
            found.append((window.rank + BM25_WEIGHT * share, window, passage))
        found.sort(key=lambda entry: -entry[0])
        return [(window, passage) for _, window, passage in found]

    def _rank(self, terms):
        """The best passages by BM25, best first: (index, score as a share of the best one's)."""
        if not terms or not self.passages:
            return []
        norm = K1 * (1 - B + B * self.lengths / max(1, self.lengths.mean()))
        scores = np.zeros(len(self.passages))
        for term in terms:
            scores += term.idf * term.tf * (K1 + 1) / (term.tf + norm)
        best = np.argsort(-scores, kind="stable")[:CANDIDATES]
        return [(place, scores[place] / scores[best[0]]) for place in best if scores[place] > 0]


# ------------------------------------------------------------------------------------------------
# windows of a passage

def source_of(passage):
    """File and headings, as a quote shows them."""
    return ", ".join(filter(None, [passage.source, passage.heading]))


def title_of(passage):
    """File name, without its suffix, and headings as text."""
    return re.sub(r"\.\w{1,7}$", "", passage.source) + " " + passage.heading


def subjects_of(passage):
    """The words of a file's name, and of each heading: a list of lists."""
    name = re.sub(r"\.\w{1,7}$", "", passage.source.split("/")[-1])
    return [words_of(text) for text in (name, *passage.heading.split(" > "))]


def names_in(question):
    """The words of a question that a capital marks as names: not the first, where all have one.

    >>> names_in("who is Will?")
    ['will']
    """
    _, *others = question.split() or [""]
    return words_of(" ".join(word for word in others if len(word) > 1 and word[0].isupper()))


def windows(passage, terms, quote_chars):
    """A Window for each unit of a passage: the units from there on, as many as a quote may hold."""
    idf = np.array([term.idf for term in terms])
    shares = idf / idf.sum()    # of each term in the question
    in_title = matches(terms, words_of(title_of(passage)))
    in_units = np.array([matches(terms, words_of(unit)) for unit in passage.units])  # units, terms

    found = []
    for first in range(len(passage.units)):
        stop = window_end(passage.units, first, quote_chars)
        in_window = in_units[first:stop].max(0)
        coverage = float(shares @ np.maximum(in_window, in_title))

        quote = "\n".join(passage.units[first:stop])
        defines = is_definition(passage.units[first], terms)
        rank = coverage + TITLE_WEIGHT * (shares @ in_title)
        rank += UNIT_WEIGHT * (in_units[first:stop] @ shares).max()
        rank += DEFINITION_WEIGHT * defines
        evidence = np.count_nonzero(in_window) + np.count_nonzero(in_title) + defines
        found.append(Window(quote, coverage, evidence, rank))
    return found


def window_end(units, first, quote_chars):
    """Where the window that begins with unit `first` ends: its quote has at most quote_chars."""
    stop = first + 1
    size = len(units[first])
    while stop < len(units) and size + 1 + len(units[stop]) <= quote_chars:
        size += 1 + len(units[stop])
        stop += 1
    return stop


def matches(terms, words):
    """How well each term is found among some words: the weight of its best variant, (terms,)."""
    words = set(words)
    found = []
    for term in terms:
        weights = [weight for known, weight in term.variants.items() if known in words]
        found.append(max(weights, default=0.0))
    return np.array(found)


def is_definition(unit, terms):
    """Whether a unit has the form "Term: ..." for one of the terms."""
    name, colon, _ = unit.partition(":")
    return bool(colon) and any(words_of(name) == [term.word] for term in terms)


def confidence_of(window):
    """SURE, DOUBTFUL or NOTHING. One common word of a question, found somewhere, is not enough to
    be sure."""
    if window.coverage >= SURE_COVERAGE and window.evidence > 1:
        return SURE
    return DOUBTFUL if window.coverage >= DOUBTFUL_COVERAGE else NOTHING


# ------------------------------------------------------------------------------------------------
# what the user reads

def answer_to(passages, questions, quote_chars=QUOTE_CHARS):
    """The Answer to the last of a user's messages.

    One with a single word of its own may be about the same thing as the message before it ("And how
    tall is it?"). Then both together are looked up, and answered where nearly all of that is found
    in one place, or where the last one alone finds nothing.
    """
    last = questions[-1] if questions else ""
    answer = passages.answer(last, quote_chars)
    if len(questions) < 2 or len(passages.terms(last)) > 1:
        return answer
    joined = passages.answer(questions[-2] + " " + last, quote_chars)
    better = answer.confidence == NOTHING or joined.coverage >= SURE_COVERAGE
    return joined if better else answer


def reply_to(answer):
    """An Answer as the user reads it: quotes and their sources, or that nothing was found.

    >>> print(reply_to(Answer((Quote("Sow in May.", "garden.md, Beans"),), DOUBTFUL, 0.5)))
    I am not sure. The nearest I found:
    Sow in May.
    (source: garden.md, Beans)
    """
    if answer.confidence == NOTHING:
        return NOTHING_FOUND
    lines = [f"{text}\n(source: {source})" for text, source in answer.quotes]
    if answer.confidence == DOUBTFUL:
        lines.insert(0, NOT_SURE)
    return "\n".join(lines)


def reply_within(passages, questions, fits):
    """What the user reads in answer to the last message, with as long a quote as fits(text) allows.

    A shorter quote is of the sentences that fit best, and in the end the beginning of one. Where
    there is no room for that, NO_ROOM says where it stands; None where not even that fits.
    """
    # whole sentences, fewer and fewer
    for quote_chars in QUOTE_STEPS:
        answer = answer_to(passages, questions, quote_chars)
        if fits(reply_to(answer)):
            return reply_to(answer)

    # one quote, shorter and shorter
    quote = answer.quotes[0] if answer.quotes else Quote("", "")
    while len(quote.text) > MIN_QUOTE_CHARS:
        reply = reply_to(answer._replace(quotes=(quote,)))
        if fits(reply):
            return reply
        quote = quote._replace(text=quote.text[:int(0.9 * len(quote.text)) - 1] + "…")
    if answer.confidence == NOTHING:
        return None

    # where it stands
    for place in (quote.source, "your text"):
        if fits(f"{NO_ROOM}{place}."):
            return f"{NO_ROOM}{place}."
    return None
