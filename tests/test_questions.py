"""The user's own questions: how a file of them is read, and when an answer is right."""
import json
import re

import pytest

from conftest import ROOT
from nanochat.common import UserError
from nanochat.conversation import LOOKUP_CALL
from nanochat.retrieval import DOUBTFUL, NOTHING, SURE, Answer, Quote, reply_to
from tasks.questions import Questions, answer_words, is_same, token_f1


@pytest.fixture
def read(tmp_path):
    """read(content, name) -> the Questions of a file; a list is a line of JSON for each item."""
    def read(content, name="qa.jsonl"):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return Questions(path)
    return read


def verdicts(task, text):
    parts = [{"type": "text", "text": text}]
    return [task.evaluate(task[i], parts) for i in range(len(task))]


# ------------------------------------------------------------------------------------------------
# comparing answers

@pytest.mark.parametrize("given, accepted", [
    ("paris", "Paris."),
    ("  The  Paris\n", "Paris"),
    ("don\N{RIGHT SINGLE QUOTATION MARK}t", "Don't!"),
    ("The answer is 84.", "84"),
    ("1,000", "1000.0"),
    ("It is -3", "\N{MINUS SIGN}3"),
    ("In 12 boxes there are 7.50", "7.5"),
    ("state of the art", "state-of-the-art"),
    ("Ｐａｒｉｓ", "paris"),
    ("北京。", "北京"),
    ("?!", "?!"),
])
def test_answers_that_say_the_same(given, accepted):
    assert is_same(given, accepted)


@pytest.mark.parametrize("given, accepted", [
    ("It is Paris", "Paris"),
    ("", "Paris"),
    ("", "84"),
    ("84 or 85", "84"),
    ("-84", "84"),
    ("12", "1.2"),
    ("840", "84"),
    ("C", "C++"),
    ("北海", "北京"),
    ("!", "?"),
    ("हिन्दी", "हिन्दू"),
])
def test_answers_that_do_not(given, accepted):
    assert not is_same(given, accepted)


def test_f1_is_that_of_squad():
    assert token_f1("The capital is Paris", "Paris") == pytest.approx(2 * 1 * (1 / 3) / (4 / 3))
    assert token_f1("Paris", "paris") == 1.0
    assert token_f1("London", "Paris") == token_f1("", "Paris") == 0.0
    assert token_f1("a cat cat", "cat dog") == pytest.approx(0.5), "a word counts once"
    assert token_f1("北京市", "北京") == pytest.approx(0.8)


def test_words_are_tokens_numbers_and_single_characters_of_chinese():
    assert answer_words("The 1,000.50 x5y") == ["1000.5", "x", "5", "y"]
    assert answer_words("in 北京 2024-01-02") == ["in", "北", "京", "2024", "1", "2"]
    assert answer_words("an") == ["an"]


# ------------------------------------------------------------------------------------------------
# answers that were looked up

def looked_up(quotes, confidence=SURE):
    """The parts of an answer that quotes [(text, source), ...]."""
    reply = reply_to(Answer([Quote(*quote) for quote in quotes], confidence, 1.0))
    output = {"type": "python_output", "text": reply}
    return [{"type": "text", "text": ""}, {"type": "python", "text": LOOKUP_CALL}, output]


@pytest.mark.parametrize("answer, is_right", [
    ("in May", True), ("may", True), ("1000", True), ("2 kg", True), ("Ann|Bob", True),
    ("June", False), ("10", False), ("garden.md", False), ("Vegetables", False), ("sure", False),
    ("kg 2", False), ("Ma", False),
])
def test_an_answer_that_was_looked_up_is_right_where_the_quotation_has_it(read, answer, is_right):
    task = read([{"question": "When?", "answer": answer}])
    quotes = [
        ("Sow 1,000 beans in May.", "garden.md, Vegetables"),
        ("2 kg went to Bob.", "a.md"),
    ]
    for confidence in (SURE, DOUBTFUL):
        parts = looked_up(quotes, confidence)
        assert task.evaluate(task[0], parts) is is_right
        assert (task.similarity(task[0], parts) == 1) is is_right


def test_what_is_near_an_accepted_answer_is_compared_with_the_quotation_alone(read):
    task = read([{"question": "When?", "answer": "in early June"}])
    parts = looked_up([("Sow in June.", "garden.md")])
    assert task.similarity(task[0], parts) == pytest.approx(2 * 2 / (3 + 3))
    nothing = looked_up([], NOTHING)
    assert task.similarity(task[0], nothing) == 0 and not task.evaluate(task[0], nothing)


def test_the_output_of_a_calculation_is_no_quotation(read):
    task = read([{"question": "6*7?", "answer": 42}])
    call = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]
    assert not task.evaluate(task[0], call)
    assert task.evaluate(task[0], [*call, {"type": "text", "text": "It is 42."}])


# ------------------------------------------------------------------------------------------------
# files

PAIR = {"question": "Capital?", "answer": "Paris"}


@pytest.mark.parametrize("record", [
    PAIR,
    {"prompt": "Capital?", "completion": "Paris"},
    {"messages": [{"role": "user", "content": "Capital?"},
                  {"role": "assistant", "content": "Paris"}]},
    {"question": "Capital?", "answers": ["Lutetia", "Paris"]},
    {"question": "Capital?", "answer": ["Lutetia", "Paris"]},
    {"question": "Capital?", "answers": {"text": ["Paris"], "answer_start": [7]}},
    {"question": "Capital?", "answer": "Lutetia | Paris"},
])
def test_the_forms_of_a_question_and_its_accepted_answers(read, record):
    task = read([record])
    assert task[0]["messages"][-2]["content"].startswith("Capital?")
    assert verdicts(task, "paris!") == [True] and verdicts(task, "Rome") == [False]
    assert task.chance == 0


def test_the_last_question_is_asked_after_the_turns_before_it(read):
    turns = ["Hi", "Hello", "Capital?", "Paris"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    task = read([messages])
    assert [message["content"] for message in task[0]["messages"]] == turns
    assert verdicts(task, "Paris") == [True] and verdicts(task, "Hello") == [False]


def test_a_right_answer_is_wholly_similar_and_a_wrong_one_as_its_words_are(read):
    task = read([{"question": "3+4?", "answer": 7}, {"question": "Who?", "answer": "Ada Byron"}])
    assert task.similarity(task[0], "The answer is 7.") == 1.0
    assert task.similarity(task[0], "The answer is 8.") == 0.0
    assert task.similarity(task[1], "Byron") == pytest.approx(2 / 3)


def test_a_whole_answer_with_a_bar_is_accepted_too(read):
    assert verdicts(read([{"question": "Or?", "answer": "a|b"}]), "a|b") == [True]


CHOICE = "question,A,B,C,D,answer\nWhich is a fruit?,stone,pear,iron,sand,B\n"


@pytest.mark.parametrize("content, name", [
    (CHOICE, "qa.csv"),
    (CHOICE.replace(",B\n", ",pear\n"), "qa.csv"),
    (CHOICE.replace(",B\n", ",(b)\n"), "qa.csv"),
    ([{"question": "Which is a fruit?", "choices": ["stone", "pear", "iron", "sand"],
       "answer": 1}], "qa.jsonl"),
    ([{"question": "Which is a fruit?", "choices": {"text": ["stone", "pear", "iron", "sand"]},
       "answerKey": "B"}], "qa.jsonl"),
])
def test_questions_with_choices_are_recognised(read, content, name):
    task = read(content, name)
    assert task[0]["choices"] == ["stone", "pear", "iron", "sand"] and task[0]["gold"] == 1
    assert task[0]["messages"][0]["content"] == "Which is a fruit?"
    assert task.chance == 0.25
    assert verdicts(task, "pear") == [True] and verdicts(task, "iron") == [False]
    assert task.similarity(task[0], "pear") == 1.0 and task.similarity(task[0], "iron") == 0.0


LONG = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite"]


@pytest.mark.parametrize("fields, gold", [
    (dict(zip("ABCDEFGHIJ", LONG)) | {"answer": "J"}, 9),
    ({"choices": LONG, "answer": "k"}, 10),
    ({"choices": {"text": LONG[:3], "label": ["1", "2", "3"]}, "answerKey": "2"}, 1),
    ({"choices": {"text": LONG[:3], "label": ["1", "2", "3"]}, "answerKey": 3}, 2),
    ({"choices": ["2", "3", "1"], "answer": "1"}, 2),
    ({"choices": ["2", "3", "1"], "answer": 1}, 1),
    ({"choices": ["ox", "ab"], "answer": "ab"}, 1),
    ({"A": 7, "B": 8, "answer": 8}, 1),
    ({"choices": ["x", "y"], "answer": "since y is right", "label": 1}, 1),
    ({"choices": ["x", "y"], "output": "y", "completion": ""}, 1),
])
def test_which_choice_is_right(read, fields, gold):
    task = read([{"question": "Which?", **fields}])
    assert task[0]["gold"] == gold
    assert verdicts(task, task[0]["choices"][gold]) == [True]
    count = sum(key in "ABCDEFGHIJ" for key in fields) or len(task[0]["choices"])
    assert len(task[0]["choices"]) == count and task.chance == 1 / count


def test_a_table_may_have_the_choices_as_a_list_of_json(read):
    table = 'question,choices,answer\nWhich?,"[""x"", ""y"", ""z""]",C\n'
    task = read(table, "qa.csv")
    assert task[0]["choices"] == ["x", "y", "z"] and task[0]["gold"] == 2


def test_a_file_may_mix_questions_with_and_without_choices(read):
    mixed = {"question": "Which?", "A": "x", "B": "y", "answer": "A"}
    task = read([PAIR, mixed])
    assert task.chance == 0.25 and ["choices" in task[i] for i in (0, 1)] == [False, True]


@pytest.mark.parametrize("record, words", [
    ({"question": "Which?", "A": "x", "B": "y", "answer": "E"}, "line 2: which of the 2 choices"),
    ({"question": "Which?", "choices": ["x", "y"]}, "which of the 2 choices"),
    ({"question": "Which?", "choices": ["x", "y"], "answer": 2}, "which of the 2 choices"),
    ({"question": "Which?", "choices": ["x", "y"], "answer": "xy"}, "which of the 2 choices"),
    ({"question": "Which?", "choices": ["xy", "z"], "answer": "ab"}, "which of the 2 choices"),
    ({"question": "Which?", "choices": ["x", ""], "answer": 0}, "line 2: choice 2 of 2 is empty"),
    ({"question": "Which?", "A": "x", "B": "", "C": "y", "answer": "A"}, "choice 2 of 3 is empty"),
    ({"question": "Which?"}, "line 2: no conversation"),
    ([{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": [
        {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]}],
     "line 2: the answer has no words"),
])
def test_a_question_without_a_right_answer_is_one_line(read, record, words):
    with pytest.raises(UserError, match=words) as error:
        read([PAIR, record])
    assert "\n" not in str(error.value)


def test_the_examples_of_the_page_are_read(read):
    page = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
    section = page.partition("## Your own questions")[2]
    pairs, table = re.findall(r"^```\w+\n(.*?)^```", section, re.M | re.S)
    task = read(pairs)
    assert [task[i].get("gold") for i in range(len(task))] == [None, None, 1]
    assert verdicts(task, "goethe") == [True, True, False]
    assert verdicts(read(table, "table.csv"), "pear") == [True]
