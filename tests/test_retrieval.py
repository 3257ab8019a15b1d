"""Looking up: what a passage is, that the right one is found, and that doubt is said."""
import pytest

from nanochat.conversation import NO_ROOM, NOTHING_FOUND, restore_tool_calls
from nanochat.passages import passages_of, sections, sentences
from nanochat.retrieval import (
    DOUBTFUL,
    NOTHING,
    QUOTE_CHARS,
    SURE,
    Passages,
    answer_to,
    reply_to,
    reply_within,
)
from nanochat.words import is_typo, language_of, likeness, words_of

GARDEN = """---
title: The garden
---
# Garden

## Beans

Sow the runner beans in the middle of May. They need canes of two metres.

## Tomatoes

- Black Krim: 4.2 kg in 2025
- Gardener's Delight: 12 kg
  and still picking in October

| sort | sown |
|---|---|
| Basil | 3 April |
| Leek | 1 March |
"""
HOUSE = """Boiler: Halden Compact 30, fitted on 9 Dec 2024 by Dilys Penrose (555-0187).
Top-up pressure is 1.5 bar when cold.

Q: Where is the stopcock?
A: Under the stairs, behind the red bucket.
"""
GERMAN = """# Großmutter

Rezept für Kartoffelsalat: zwei Kilo Kartoffeln der Sorte Linda, am 3. Mai gekauft.
Der Geburtstag ist am 12. August.
"""
CHINESE = """# 茶园

春天采茶的时间是四月五日。王先生的电话是五五五零一。

# 厨房

冰箱里有三瓶牛奶。
"""
DOCUMENTS = [
    ("garden.md", GARDEN),
    ("house/boiler.md", HOUSE),
    ("familie.md", GERMAN),
    ("家.md", CHINESE),
    *[(f"day {i}.md", f"Day {i}: went to the harbour with number {i} and came back.")
      for i in range(20)],
]


@pytest.fixture(scope="module")
def passages():
    return Passages(passages_of(DOCUMENTS))


# ------------------------------------------------------------------------------------------------
# passages

def test_headings_lists_and_tables_become_sections_of_whole_units():
    found = {section.heading: section.units for section in sections(GARDEN)}
    assert found[""] == ["title: The garden"]
    assert found["Garden > Beans"] == [
        "Sow the runner beans in the middle of May.",
        "They need canes of two metres.",
    ]
    assert found["Garden > Tomatoes"] == [
        "Black Krim: 4.2 kg in 2025",
        "Gardener's Delight: 12 kg and still picking in October",
        "sort | sown",
        "Basil | 3 April",
        "Leek | 1 March",
    ]


@pytest.mark.parametrize("text, heading", [
    ("Garden\n======\nPeas.", "Garden"),
    ("**Garden**\n\nPeas.", "Garden"),
    ("CHAPTER ONE\n\nPeas.", "CHAPTER ONE"),
    ("第三章 花园\n\nPeas.", "第三章 花园"),
    ("## Garden ##\nPeas.", "Garden"),
])
def test_a_heading_is_known_in_each_of_its_forms(text, heading):
    assert [(s.heading, s.units) for s in sections(text)] == [(heading, ["Peas."])]


@pytest.mark.parametrize("line", [
    "Part of the garden floods in May.",
    "Part I liked best: the end",
    "Chapter 3 of the book is the best one.",
    "```make all``` builds it",
    "3. Mai: Geburtstag",
    "- 5 degrees",
    "2) -5 degrees",
])
def test_a_line_that_only_looks_like_markup_is_kept_with_all_of_its_words(line):
    after = sections(line + "\n\nPeas.")
    assert [section.heading for section in after] == [""]
    assert after[0].units == [line.replace("```", ""), "Peas."]


@pytest.mark.parametrize("line, heading", [
    ("Chapter 3", "Chapter 3"), ("Part II The House", "Part II The House"),
    ("Part I: The House", "Part I: The House"), ("Chapter One", "Chapter One"),
    ("Kapitel 12.", "Kapitel 12."),
])
def test_a_numbered_line_is_a_heading(line, heading):
    assert [section.heading for section in sections(line + "\n\nPeas.")] == [heading]


def test_what_is_struck_out_is_not_quoted_and_code_keeps_its_marks():
    text = "- Peas ~~in May~~ in June\n- ~~Beans~~\n\n```\na_b_c = *d* ~~~ 2\n~~~\n```\nEnd."
    (section,) = sections(text)
    assert section.units == ["Peas in June", "a_b_c = *d* ~~~ 2", "~~~", "End."]


def test_code_is_kept_line_by_line_and_a_comment_in_it_is_no_heading():
    (section,) = sections("```\n# make it\nmake all\n```\n")
    assert section.heading == "" and section.units == ["# make it", "make all"]


def test_sentences_end_at_marks_and_not_at_abbreviations_or_dates():
    assert sentences("Dr. Ames kam am 3. Mai. Er ging! Warum?") == [
        "Dr. Ames kam am 3. Mai.", "Er ging!", "Warum?"]
    assert sentences("今天下雨。明天呢？后天晴。") == ["今天下雨。", "明天呢？", "后天晴。"]
    assert sentences('He said "Stop." Then it cost 3.50 e.g. here.') == [
        'He said "Stop."', "Then it cost 3.50 e.g. here."]


def test_no_unit_is_too_long_for_a_quote_and_no_word_is_lost():
    text = "word, " * 400
    (section,) = sections(text)
    assert max(map(len, section.units)) <= QUOTE_CHARS
    assert " ".join(section.units).split() == text.split()


@pytest.mark.parametrize("line", [
    "# " + " " * 50_000 + "x",
    "|" + "-" * 50_000 + "x|",
    "*" * 50_000 + "x",
    "[" * 50_000,
    "a" * 200_000,
    "x" + "\n" * 50_000,
])
def test_long_lines_without_meaning_are_cut_in_time(line):
    # a pattern that tries every pair of marks would take hours here
    assert passages_of([("a.txt", line)])


def test_text_beyond_the_limit_is_left_out():
    documents = [("a.md", "x" * 50), ("b.md", "y" * 50), ("c.md", "z" * 50)]
    joined = "".join(unit for p in passages_of(documents, 60) for unit in p.units)
    assert joined == "x" * 50 + "y" * 10


def test_a_note_that_was_cut_keeps_its_heading():
    pieces = [("a.md", "# Garden\n\n"), ("a.md", "Peas grow."), ("b.md", "Beans grow.")]
    assert [(p.source, p.heading, p.units) for p in passages_of(pieces)] == [
        ("a.md", "Garden", ("Peas grow.",)), ("b.md", "", ("Beans grow.",))]


# ------------------------------------------------------------------------------------------------
# words

def test_words_are_folded_and_scripts_without_spaces_become_pairs():
    assert words_of("Käse, 3.5 kg!") == ["kase", "3", "5", "kg"]
    assert words_of("我喜欢茶 tea") == ["我喜", "喜欢", "欢茶", "tea"]
    assert words_of("ガラス") == ["ガラ", "ラス"]


def test_forms_compounds_and_typos_are_told_from_other_words():
    assert likeness("clock", "clocks") == likeness("painted", "painting") == 0.9
    assert likeness("salat", "kartoffelsalat") == 0.6
    assert likeness("collet", "college") == likeness("collet", "collect") == 0
    assert likeness("boat", "coat") == 0
    assert is_typo("presure", "pressure") and is_typo("prssure", "pressure")
    assert is_typo("pressrue", "pressure") and not is_typo("pressure", "measure")


def test_the_language_is_that_of_the_stop_words():
    assert language_of(words_of("Wann ist der Geburtstag?"))[0] == "German"
    assert language_of(words_of("When is the birthday?"))[0] == "English"
    assert language_of(words_of("Quand est-ce que les haricots ?"))[0] == "French"


# ------------------------------------------------------------------------------------------------
# answers

@pytest.mark.parametrize("question, quoted, source", [
    ("when do i sow runner beans", "middle of May", "garden.md, Garden > Beans"),
    ("How much did Black Krim give?", "4.2 kg", "garden.md, Garden > Tomatoes"),
    ("boiler presure when cold?", "1.5 bar", "house/boiler.md"),
    ("Where's the stopcock?", "behind the red bucket", "house/boiler.md"),
    ("wann hat Großmutter Geburtstag", "12. August", "familie.md, Großmutter"),
    ("Welche Sorte nehmen wir für den Salat", "Linda", "familie.md, Großmutter"),
    ("什么时候采茶?", "四月五日", "家.md, 茶园"),
    ("冰箱里有几瓶牛奶", "三瓶牛奶", "家.md, 厨房"),
])
def test_a_question_is_answered_with_a_quote_and_its_source(passages, question, quoted, source):
    answer = passages.answer(question)
    assert quoted in answer.quotes[0].text and answer.quotes[0].source == source
    assert answer.confidence != NOTHING and len(answer.quotes[0].text) <= QUOTE_CHARS
    assert f"(source: {source})" in reply_to(answer)


@pytest.mark.parametrize("question", [
    "Who is the president of Brazil?",
    "what is a quaternion",
    "",
    "what is it?",
    "???",
])
def test_what_the_text_does_not_say_is_not_quoted(passages, question):
    answer = passages.answer(question)
    assert answer.confidence == NOTHING and reply_to(answer) == NOTHING_FOUND


def test_half_of_a_question_found_is_said_to_be_doubtful(passages):
    sure = passages.answer("runner beans canes")
    doubtful = passages.answer("runner beans boiler zeppelin")
    assert (sure.confidence, doubtful.confidence) == (SURE, DOUBTFUL)
    assert reply_to(doubtful).startswith("I am not sure.")
    places = [quote.source for quote in doubtful.quotes]
    assert len(set(places)) == 2 and reply_to(doubtful).count("(source: ") == 2
    assert not reply_to(sure).startswith("I am not sure.")


def test_a_stop_word_that_is_a_heading_a_file_or_a_name_is_looked_up():
    passages = Passages(passages_of([
        ("a.md", "# Work\n\nThe desk is on floor two."),
        ("find.md", "Three mushrooms."),
        ("b.md", "# People\n\nMy neighbour is Will Barnes.\nHe will come."),
        *[(f"{i}.md", f"Nothing is here on day {i}.") for i in range(9)],
    ]))
    for question, quoted in [
        ("Tell me about work.", "desk"), ("what about find?", "mushrooms"),
        ("who is Will?", "neighbour"),
    ]:
        assert quoted in passages.answer(question).quotes[0].text
    assert passages.answer("what is it?").confidence == NOTHING


def test_one_common_word_is_not_enough_to_be_sure(passages):
    assert passages.answer("tell me about canes").confidence == DOUBTFUL
    assert passages.answer("tell me about beans").confidence == SURE    # a heading


def test_a_follow_up_is_joined_to_the_question_before(passages):
    before = "Tell me about the runner beans"
    for follow_up in ("and how tall is it?", "when do I sow it?"):
        answer = answer_to(passages, [before, follow_up])
        assert answer.quotes[0].source == "garden.md, Garden > Beans"

    # a question that stands by itself does not hear of the one before
    for question in ("where is the stopcock", "pressure of the boiler when cold"):
        assert answer_to(passages, [before, question]).quotes[0].source == "house/boiler.md"


def test_a_quote_is_cut_to_the_room_and_its_source_stays_whole(passages):
    question = ["when do I sow runner beans"]
    source = "(source: garden.md, Garden > Beans)"

    def reply(room):
        return reply_within(passages, question, lambda text: len(text) <= room)

    assert reply(200).count("\n") == 2                     # both sentences
    assert reply(80) == "Sow the runner beans in the middle of May.\n" + source
    assert len(reply(65)) <= 65 and reply(65).endswith("…\n" + source)
    assert reply(50) == "No room here to quote garden.md, Garden > Beans."
    assert reply(45) == "No room here to quote your text." and reply(10) is None
    nothing = reply_within(passages, ["quaternion?"], lambda text: len(text) <= 45)
    assert nothing == NOTHING_FOUND


def test_a_reply_that_comes_back_as_history_is_a_look_up_again(passages):
    reply = reply_to(passages.answer("when do i sow runner beans"))
    for text in (reply + "\n", reply, NOTHING_FOUND, NO_ROOM + "garden.md."):
        parts = restore_tool_calls({"role": "assistant", "content": text})["content"]
        assert [part["type"] for part in parts] == ["python", "python_output"]
        assert parts == [
            {"type": "python", "text": "lookup()"},
            {"type": "python_output", "text": text.rstrip("\n")},
        ]


def test_text_without_a_single_word_can_be_asked():
    empty = Passages(passages_of([("a.md", "... !!!")]))
    assert empty.answer("anything?").confidence == NOTHING
    assert Passages([]).answer("anything?").confidence == NOTHING
