"""Tasks: what they contain, that training and test share nothing, and how answers are judged."""
import ast
import json
import operator
from collections import Counter

import pytest

from nanochat import dataset
from nanochat.common import UserError
from tasks import pydoc
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture, TaskSequence, last_number, render_mc, split_of
from tasks.customjson import CustomJSON
from tasks.identity import NAME, TOPICS, Identity
from tasks.pydoc import PyDoc, first_sentence, shorten
from tasks.spellingbee import SimpleSpelling, SpellingBee, all_words


@pytest.fixture(scope="module", autouse=True)
def small_library(tmp_path_factory):
    """The words and objects of a few modules of the standard library instead of all sources on this machine."""
    names = ("textwrap.py", "heapq.py", "shutil.py", "glob.py", "statistics.py", "calendar.py", "argparse.py", "json/__init__.py",
             "json/decoder.py")
    files = [file for file in dataset.python_files(("stdlib",)) if file[1] in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        patch.setattr("tasks.spellingbee.python_files", lambda *_: files)
        patch.setattr("tasks.pydoc.python_files", lambda *_: files)
        patch.setattr("tasks.pydoc.PACKAGES", ("numpy.linalg",))
        yield


def question(conversation):
    return conversation["messages"][0]["content"]


def answer(conversation):
    content = conversation["messages"][1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def every_task(split):
    return [Arithmetic(split, 200), SimpleSpelling(split, 200), SpellingBee(split, 200), Identity(split), PyDoc(split),
            PyDoc(split, form="what"), PyDoc(split, form="module"), PyDoc(split, form="letter")]


class Numbers(Task):
    def __init__(self, first, count, **slice_):
        super().__init__(**slice_)
        self.first, self.count = first, count

    def num_examples(self):
        return self.count

    def get_example(self, i):
        return self.first + i


# ---------------------------------------------------------------------------------------------------------------------
# what every task keeps to

@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_deterministic_well_formed_and_judged_right(split):
    for task, again in zip(every_task(split), every_task(split)):
        assert len(task) > 0
        for i in range(min(len(task), 60)):
            conversation = task[i]
            assert conversation == again[i]
            assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"] * (len(conversation["messages"]) // 2)
            assert question(conversation).strip() and all(part["text"] for part in answer(conversation))
            assert task.evaluate(conversation, answer(conversation))
            assert not task.evaluate(conversation, [{"type": "text", "text": "wrong"}])
            assert not task.evaluate(conversation, [])


def test_trap_04_no_test_question_is_a_training_question():
    """Splits are decided by what an item is: seeds would not do, random.seed(1) is random.seed(-1)."""
    for train, test in zip(every_task("train"), every_task("test")):
        seen = {question(train[i]).lower().rstrip("?.! ") for i in range(len(train))}
        assert not seen & {question(test[i]).lower().rstrip("?.! ") for i in range(len(test))}, type(test)


def test_trap_04_problems_words_sentences_and_phrasings_are_disjoint():
    problems = {split: {answer(task[i])[0]["text"] for i in range(len(task))}
                for split in ("train", "test") for task in [Arithmetic(split, 2000)]}
    assert not problems["train"] & problems["test"]
    words = {split: {task[i]["word"] for task in (SimpleSpelling(split, 3000), SpellingBee(split, 3000)) for i in range(len(task))}
             for split in ("train", "test")}
    assert not words["train"] & words["test"]
    assert all(4 <= len(word) <= 10 and word.isascii() and word.islower() for words in words.values() for word in words)
    shown = {split: {line.rpartition("=")[0] for i in range(len(task)) for line in question(task[i]).split("\n")[1:]}
             for split in ("train", "test") for task in [PyDoc(split)]}
    assert not shown["train"] & shown["test"]
    for _, training, held_out in TOPICS:
        assert not set(training) & set(held_out)


def test_split_of_gives_a_tenth_to_the_test():
    assert 800 < sum(split_of(str(i)) == "test" for i in range(10_000)) < 1200


def test_unknown_split_or_form():
    for make in (Arithmetic, SimpleSpelling, Identity, PyDoc):
        with pytest.raises(UserError, match="train or test"):
            make("validation")
    with pytest.raises(UserError, match="form is"):
        PyDoc("train", form="essay")


# ---------------------------------------------------------------------------------------------------------------------
# combining tasks

def test_trap_41_mixture_is_complete_and_deterministic():
    parts = [Numbers(0, 100), Numbers(1000, 7), Numbers(2000, 1)]
    mixture, again = TaskMixture(parts), TaskMixture(parts)
    rows = [mixture[i] for i in range(len(mixture))]
    assert sorted(rows) == [*range(100), *range(1000, 1007), 2000]
    assert rows == [again[i] for i in range(len(again))]
    assert rows != sorted(rows)


def test_trap_41_slices_clamp_to_what_exists():
    assert len(Numbers(0, 5, stop=100)) == 5
    assert len(Numbers(0, 5, start=3, stop=100)) == 2
    assert Numbers(0, 5, start=3)[0] == 3
    with pytest.raises(IndexError):
        Numbers(0, 5, start=3)[2]
    assert [row for row in TaskSequence([Numbers(0, 2), Numbers(10, 2)], start=1)] == [1, 10, 11]


def test_trap_42_numbers_are_compared_as_numbers():
    assert last_number("It is 1,000.") == last_number("1000") == last_number("1000.0") == 1000
    assert last_number("12 - 15 is -3.") == last_number("\N{MINUS SIGN}3") == -3
    assert last_number("2.5") is None and last_number("none") is None
    task = Arithmetic("test", 1)
    result = int(answer(task[0])[1]["text"])
    assert task.evaluate(task[0], [{"type": "text", "text": f"So it is {result:,}.0"}])
    assert not task.evaluate(task[0], [{"type": "text", "text": str(result + 1)}])
    assert not task.evaluate(task[0], answer(task[0])[:2]), "a tool's output alone is no answer to the user"


def test_render_mc():
    assert render_mc("Which?", "AB", ["one", "two"]) == "Which?\n- one=A\n- two=B"


# ---------------------------------------------------------------------------------------------------------------------
# single tasks

def test_arithmetic_python_parts_are_right():
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    kinds, negative = Counter(), 0
    for i in range(len(task := Arithmetic("train", 600))):
        python, output, text = answer(task[i])
        tree = ast.parse(python["text"], mode="eval").body
        a, b = tree.left.value, tree.right.value
        assert 0 <= a <= 999 and 0 <= b <= 999 and signs[type(tree.op)](a, b) == int(output["text"])
        assert [python["type"], output["type"], text["type"]] == ["python", "python_output", "text"]
        assert text["text"].count(output["text"]) == 1
        negative += output["text"].startswith("-")
        kinds[type(tree.op)] += 1
    assert min(kinds.values()) > 150 and negative > 20


def test_spelling_parts_are_right():
    spelling, bee = SimpleSpelling("train", 300), SpellingBee("train", 300)
    for i in range(300):
        assert answer(spelling[i])[0]["text"].replace(" ", "") == spelling[i]["word"]
        text, python, output, _ = answer(bee[i])
        word, letter = python["text"].split('"')[1], python["text"].split('"')[3]
        assert python["text"] == f'"{word}".count("{letter}")' and word.count(letter) == int(output["text"])
        assert [c for c in text["text"] if c.isalpha()] == list(word)
    assert not spelling.evaluate(spelling[0], [{"type": "text", "text": spelling[0]["word"]}]), "written whole is not spelled"


def test_made_up_words_are_training_words():
    real, task = set(all_words()), SimpleSpelling("train", 500)
    made_up = [task[i]["word"] for i in range(500) if task[i]["word"] not in real]
    assert 50 < len(made_up) < 400 and all(split_of(word) == "train" for word in made_up)


def test_identity_names_the_model_and_has_enough_held_out_phrasings():
    task = Identity("test")
    assert len(task) >= 200 and all(NAME in answer(task[i])[0]["text"] for i in range(len(task)))
    assert task.evaluate(task[0], [{"type": "text", "text": "My name is NanoChat."}])


def test_multiple_choice_letters_are_balanced_and_choices_distinct():
    for split in ("train", "test"):
        task = PyDoc(split, "letter", size=200)
        counts = Counter(answer(task[i])[0]["text"] for i in range(len(task)))
        assert set(counts) == set("ABCD") and max(counts.values()) - min(counts.values()) <= 1
        assert task.chance == 0.25
        for i in range(len(task)):
            conversation = task[i]
            choices = [line.rpartition("=")[0] for line in question(conversation).split("\n")[1:]]
            assert len(set(choices)) == 4 and conversation["letters"] == list("ABCD")
            assert len(question(conversation)) < 450


def test_choices_are_sentences_of_the_same_split_and_the_right_one_stands_anywhere():
    sentences = {}
    for split in ("train", "test"):
        task = PyDoc(split, "choice", size=400)
        examples = [task[i] for i in range(len(task))]
        assert all(len(set(c["choices"])) == 4 and c["choices"][c["gold"]] == answer(c)[0]["text"] for c in examples)
        counts = Counter(c["gold"] for c in examples)
        assert max(counts.values()) - min(counts.values()) <= 1
        sentences[split] = {text for c in examples for text in c["choices"]}
        assert task.evaluate(examples[0], [{"type": "text", "text": examples[0]["choices"][examples[0]["gold"]]}])
        assert not task.evaluate(examples[0], [{"type": "text", "text": examples[0]["choices"][examples[0]["gold"] - 1]}])
    assert not sentences["train"] & sentences["test"]


def test_multiple_choice_asks_again_with_other_choices():
    task = PyDoc("train", "letter", size=2 * len(PyDoc("train")))
    first, again = question(task[0]), question(task[len(task) // 2])
    assert first.split("\n")[0] == again.split("\n")[0] and first != again


def test_pydoc_finds_what_is_there():
    rows = {row["name"]: row["sentence"] for row in pydoc.all_objects()}
    assert rows["textwrap.dedent"].startswith("Remove any common leading whitespace")
    assert rows["math.hypot"] and rows["str.upper"] and rows["numpy.linalg.det"]
    assert len(set(rows.values())) == len(rows)
    assert not any("._" in name for name in rows)


@pytest.mark.parametrize("doc, sentence", [
    ("Return the :class:`~a.Thing` of\n    two things.  More text.", "Return the a.Thing of two things."),
    ("f(x) -- Tell what x is made of.", "Tell what x is made of."),
    ("Too short.", ""), ("Return self and nothing else at all.", ""), ("", ""), (">>> 1 + 1 + 1 + 1 + 1 + 1\n3", ""),
])
def test_first_sentence(doc, sentence):
    assert first_sentence(doc) == sentence


def test_shorten_cuts_at_a_word():
    assert shorten("Return a copy of the list.", 12) == "Return a"
    assert len(shorten("word " * 40)) <= pydoc.CHOICE_CHARS


def test_trap_05_custom_conversations_keep_line_separators_inside_strings(tmp_path):
    messages = [{"role": "user", "content": "caf\u00e9\u2028?"}, {"role": "assistant", "content": "yes\u2028no"}]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(messages, ensure_ascii=False) + "\n\n" + json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    task = CustomJSON(path)
    assert len(task) == 2 and task[0] == task[1] == {"messages": messages}


@pytest.mark.parametrize("line, words", [
    ("not json", "line 1 is not JSON"),
    ('[{"role": "assistant", "content": "hi"}]', "alternate"),
    ('[{"role": "user", "content": "hi"}]', "end with assistant"),
    ('[{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]', "not empty"),
    ('{"text": "hi"}', "list of"), ("", "no conversations"),
])
def test_custom_conversations_that_are_wrong(tmp_path, line, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        CustomJSON(path)
    with pytest.raises(UserError, match="cannot read"):
        CustomJSON(tmp_path / "nothing.jsonl")


def test_last_number_takes_whatever_a_model_writes():
    assert last_number("9" * 400) is None and last_number("7 is 1,000.0") == 1000 and last_number("-3.50") is None
    assert last_number("\u22124") == -4 and last_number("none") is None
