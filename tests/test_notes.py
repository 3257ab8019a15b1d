"""How many questions about 300 notes the look-up answers (tests/data/README.md)."""
import json
from pathlib import Path

import pytest

from nanochat.dataset import open_dataset
from nanochat.passages import passages_of
from nanochat.retrieval import NOTHING, SURE, Passages

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        dataset = open_dataset(DATA / "notes")
        documents = [*dataset.named_documents("train"), *dataset.named_documents("val")]
    assert len({name for name, _ in documents}) == 300
    return Passages(passages_of(documents))


def questions_of(name):
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def is_right(question, answer):
    """Whether one of the quotes has the words that answer a question; another note may, too."""
    if question["expected"] is None or answer.confidence == NOTHING:
        return False
    texts = [quote.text for quote in answer.quotes]
    return any(expected in text for expected in question["expected"] for text in texts)


@pytest.mark.parametrize("name", ["questions.jsonl", "questions_tuned_on.jsonl"])
def test_the_look_up_answers_six_in_ten_and_is_hardly_ever_wrong_without_a_doubt(notes, name):
    questions = questions_of(name)
    answers = [notes.answer(question["question"]) for question in questions]
    right = [is_right(*pair) for pair in zip(questions, answers)]
    undoubted = [answer.confidence == SURE for answer in answers]
    wrong = sum(sure and not ok for sure, ok in zip(undoubted, right))
    answerable = sum(question["expected"] is not None for question in questions)
    assert sum(right) >= 0.6 * answerable, f"{sum(right)} of {answerable}"
    assert wrong <= 0.05 * len(questions), f"{wrong} of {len(questions)}"


def test_the_questions_can_be_answered_and_do_not_stand_in_the_notes():
    for question in questions_of("questions.jsonl"):
        if question["expected"] is None:
            continue
        text = (DATA / "notes" / question["source"]).read_text(encoding="utf-8")
        assert all(expected in text for expected in question["expected"])
        assert question["question"] not in text
