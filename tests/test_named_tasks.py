"""Tasks by name, tasks in a file of the user's, and what every task offers."""
import pytest

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.common import Task, at_equal_distances, conversation, stem_of, with_stem
from tasks.common import choice_conversation
from tasks.named import TASKS, About, make_task, split_names, task_name
from tasks.spellingbee import SpellingBee

MINE = '''"""Capitals."""
from tasks.common import Task, answer_text, conversation

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}


class Capitals(Task):
    def num_examples(self):
        return len(CAPITALS)

    def get_example(self, i):
        country = list(CAPITALS)[i]
        return conversation(f"What is the capital of {country}?", CAPITALS[country])

    def evaluate(self, conversation, parts):
        return conversation["messages"][-1]["content"] in answer_text(parts)

    def reward(self, conversation, parts):
        return self.evaluate(conversation, parts) - 0.01 * len(answer_text(parts))
'''


@pytest.fixture
def write(tmp_path):
    """write(text) -> the path of a Python file."""
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


# ------------------------------------------------------------------------------------------------
# names

@pytest.mark.parametrize("given, name", [
    ("arithmetic", "arithmetic"), ("ARC-Easy", "ARC-Easy"), ("arc_easy", "ARC-Easy"),
    ("mmlu", "MMLU"), ("gsm8k", "GSM8K"), ("SpellingBee", "counting"),
    ("SimpleSpelling", "spelling"), ("PyDoc-Letter", "pydoc_letter"), ("my/qa.csv", "my/qa.csv"),
])
def test_a_name_is_found_whatever_its_case_and_hyphens(given, name):
    assert task_name(given) == name


@pytest.mark.parametrize("given, near", [
    ("GSM8", "GSM8K"), ("arithmetik", "arithmetic"), ("ARC", "ARC-Easy"),
    ("spellingbees", "counting"),
])
def test_an_unknown_name_is_answered_with_the_nearest(given, near):
    with pytest.raises(UserError) as error:
        task_name(given)
    meant = str(error.value).split("? Else")[0]
    assert near in meant and "\n" not in str(error.value)


def test_a_name_that_is_like_none_gets_the_list():
    with pytest.raises(UserError, match="does not exist: choose from arithmetic"):
        task_name("juggling")
    assert split_names("ARC-Easy|GSM8K, identity") == ["ARC-Easy", "GSM8K", "identity"]


def test_every_name_makes_a_task_or_says_what_is_missing(base_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (base_dir / "words.txt").write_text("\n".join(f"word{c}" for c in "abcdefghijklmnopqrs"))
    (base_dir / "pydoc.jsonl").write_text(
        "".join(f'{{"name": "m.f{i}", "sentence": "Return {i} of it."}}\n' for i in range(90)))
    made = {}
    for name in TASKS:
        for split in ("train", "test"):
            try:
                made[name, split] = make_task(name, split, 8)
            except UserError as error:
                assert "\n" not in str(error)
    local = ("arithmetic", "spelling", "counting", "pydoc", "pydoc_letter", "identity")
    assert {(name, split) for name in local for split in ("train", "test")} <= made.keys()
    assert isinstance(made["counting", "train"], SpellingBee)
    for name in local:
        assert 0 < len(made[name, "test"]) <= 8
    with pytest.raises(UserError, match="not trained on a text of yours"):
        make_task("own_text")
    with pytest.raises(UserError, match="add --custom=qa.jsonl"):
        make_task("custom")


def test_a_file_of_questions_is_a_task_by_its_path_and_as_custom(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text("question,answer\nWhat is 1+1?,2\n", encoding="utf-8")
    by_path, custom = make_task(str(path)), make_task("custom", about=About(custom=str(path)))
    assert by_path[0] == custom[0] and len(custom) == 1
    path.write_text("question,solution_of_it\nWhat is 1+1?,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="question, solution_of_it"):
        make_task(str(path))


# ------------------------------------------------------------------------------------------------
# a task in a file

def test_a_task_file_is_a_task_with_its_own_reward(write):
    task = make_task(write(MINE))
    right = [{"type": "text", "text": "Paris"}]
    assert len(task) == 3 and task[0]["messages"][-1]["content"] == "Paris"
    assert task.evaluate(task[0], right) and not task.evaluate(task[1], right)
    assert task.evaluate_many([(task[i], right) for i in range(3)]) == [True, False, False]
    assert task.reward(task[0], right) == pytest.approx(0.95)


def test_a_task_file_may_have_data_classes_with_annotations_as_text(write):
    more = MINE.replace('"""Capitals."""', "from __future__ import annotations").replace(
        "class Capitals", '''import dataclasses


@dataclasses.dataclass
class City:
    name: str


class Capitals''')
    assert len(make_task(write(more))) == 3


def test_a_task_file_is_told_split_and_size_where_it_wants_them(write):
    more = MINE.replace("    def num_examples", '''    def __init__(self, split, size=2):
        super().__init__()
        self.split, self.size = split, size

    def num_examples''').replace("len(CAPITALS)", "self.size")
    task = make_task(write(more), "train", 1)
    assert task.task.split == "train" and len(task) == 1


@pytest.mark.parametrize("old, new, said", [
    ("import Task,", "import Tusk,", "line 2: ImportError"),
    ("country = list", "country = lost", "line 12: NameError: name 'lost'"),
    ("def get_example(self, i):", "def get_example(self, i:", "line 11: SyntaxError"),
    ("return len(CAPITALS)", "return len(None)", "line 9: TypeError"),
    ("return conversation(f", "return (f", "example 0 of Capitals is no conversation"),
    ("return conversation(f", "return conversation(i, f", "TypeError"),
    ("CAPITALS[country])", "i)", "message 2 needs a content: a string"),
    ("CAPITALS[country])", "'', letters=['A'])", "its letters are not a list of at least two"),
    ("CAPITALS[country])", "'', choices=['a', ''])", "its choices are not a list of at least two"),
    ("CAPITALS[country])", "'', choices=['a', 'b'])", "with choices it needs `neutral`"),
    ("class Capitals(Task)", "class Capitals", "must have one subclass of tasks.common.Task"),
    ("(Task):", "(Task):\n    chance = 1", "chance=1 of Capitals must be at least 0 and below 1"),
    ("(Task):", "(Task):\n    chance = 'low'", "ValueError"),
])
def test_what_is_wrong_in_a_task_file_is_one_line_with_its_place(write, old, new, said):
    path = write(MINE.replace(old, new))
    with pytest.raises(UserError) as error:
        make_task(path)[0]
    assert said in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_a_task_file_that_judges_fewer_answers_than_it_got_is_refused(write):
    few = MINE + '''
    def evaluate_many(self, pairs):
        return [True]
'''
    task = make_task(write(few))
    assert task.evaluate_many([(task[0], "Paris")]) == [True]
    with pytest.raises(UserError, match="judged 1 of 2 answers"):
        task.evaluate_many([(task[0], "Paris"), (task[1], "Rome")])


def test_what_goes_wrong_in_judging_names_the_line_of_the_task_file(write):
    task = make_task(write(MINE.replace('["messages"][-1]', '["massages"][-1]')))
    for judge in (task.evaluate, task.reward):
        with pytest.raises(UserError, match="line 16: KeyError"):
            judge(task[0], "Paris")
    with pytest.raises(UserError, match="cannot read"):
        make_task("/nowhere/mine.py")


# ------------------------------------------------------------------------------------------------
# what every task offers

class Sums(Task):
    """Right is the sum."""

    def num_examples(self):
        return 5

    def get_example(self, i):
        return conversation(f"{i}+{i}?", str(2 * i))

    def evaluate(self, conversation, parts):
        return parts == conversation["messages"][-1]["content"]


def test_a_task_judges_many_and_rewards_by_what_is_right():
    task = Sums()
    assert task.evaluate_many([(task[i], "4") for i in range(5)]) == [i == 2 for i in range(5)]
    assert [task.reward(task[i], "4") for i in (1, 2)] == [0.0, 1.0]


@pytest.mark.parametrize("count, most", [(14042, 8), (15, 8), (8, 8), (3, 8), (0, 8), (7, None)])
def test_items_at_equal_distances_are_distinct_and_reach_over_the_whole_set(count, most):
    places = at_equal_distances(count, most)
    assert len(places) == min(count, most or count) and len(set(places)) == len(places)
    gaps = {b - a for a, b in zip(places, [*places[1:], count])}
    assert not places or places[0] == 0 and max(gaps) - min(gaps) <= 1


def test_another_question_takes_the_place_of_the_stem_and_the_choices_stay():
    item = choice_conversation("Which is red?\n- not this=A", ["sky", "blood"], 1)
    assert stem_of(item) == "Which is red?\n- not this=A"
    control = with_stem(item, "Who sings?")
    assert control["messages"][0]["content"] == "Who sings?\n- sky=A\n- blood=B"
    assert control["messages"][1] == item["messages"][1] and control["letters"] == ["A", "B"]
    assert item["messages"][0]["content"].startswith("Which is red?"), "the item itself is kept"

    ranked = conversation("What does f do?", "It adds.", choices=["It adds."], neutral="?")
    assert with_stem(ranked, "What does g do?")["messages"][0]["content"] == "What does g do?"
    assert stem_of(conversation("1+1?", "2")) is None


def test_a_hub_task_refuses_a_split_that_it_does_not_have(base_dir):
    with pytest.raises(UserError, match="split is train or validation or test"):
        ARC("ARC-Easy", "dev")


def test_the_questions_written_by_hand_cannot_be_practised():
    with pytest.raises(UserError, match="train nothing: practise scope in its place"):
        make_task("scope_written", "train")
