"""Tasks: what they contain, that training and test share nothing, and how answers are judged."""
import ast
import hashlib
import json
import operator
from collections import Counter

import pytest

from nanochat.common import UserError
from nanochat.sources import python_files
from tasks import pydoc
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture, TaskSequence, last_number, render_mc, split_of
from tasks.customjson import CustomJSON
from tasks.identity import NAME, TOPICS, Identity
from tasks.pydoc import PyDoc, first_sentence, shorten
from tasks.spellingbee import SimpleSpelling, SpellingBee, all_words


@pytest.fixture(scope="module", autouse=True)
def small_library(tmp_path_factory):
    """The words and objects of a few modules of the standard library instead of all sources."""
    names = (
        "textwrap.py",
        "heapq.py",
        "shutil.py",
        "glob.py",
        "statistics.py",
        "calendar.py",
        "argparse.py",
        "json/__init__.py",
        "json/decoder.py",
    )
    files = [file for file in python_files(("stdlib",)) if file[1] in names]
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
    return [
        Arithmetic(split, 200),
        SimpleSpelling(split, 200),
        SpellingBee(split, 200),
        Identity(split),
        PyDoc(split),
        PyDoc(split, form="what"),
        PyDoc(split, form="module"),
        PyDoc(split, form="letter"),
    ]


class Numbers(Task):
    def __init__(self, first, count, **slice_):
        super().__init__(**slice_)
        self.first, self.count = first, count

    def num_examples(self):
        return self.count

    def get_example(self, i):
        return self.first + i


# ----------------------------------------------------------------------------------------------
# what every task keeps to

@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_deterministic_well_formed_and_judged_right(split):
    for task, again in zip(every_task(split), every_task(split)):
        assert len(task) > 0
        for i in range(min(len(task), 60)):
            conversation = task[i]
            assert conversation == again[i]
            roles = [message["role"] for message in conversation["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert question(conversation).strip()
            assert all(part["text"] for part in answer(conversation))
            assert task.evaluate(conversation, answer(conversation))
            assert not task.evaluate(conversation, [{"type": "text", "text": "wrong"}])
            assert not task.evaluate(conversation, [])


def test_no_test_question_is_a_training_question():
    # docs/traps.md: seed-sign
    """What an item is decides its split. Seeds would not do: random.seed(1) is random.seed(-1)."""
    def questions(task):
        return {question(task[i]).lower().rstrip("?.! ") for i in range(len(task))}

    for train, test in zip(every_task("train"), every_task("test")):
        assert not questions(train) & questions(test), type(test)


def test_problems_words_sentences_and_phrasings_are_disjoint():
    # docs/traps.md: seed-sign
    def items(*tasks):
        return [task[i] for task in tasks for i in range(len(task))]

    problems, words, shown = {}, {}, {}
    for split in ("train", "test"):
        problems[split] = {answer(item)[0]["text"] for item in items(Arithmetic(split, 2000))}
        spelled = items(SimpleSpelling(split, 3000), SpellingBee(split, 3000))
        words[split] = {item["word"] for item in spelled}
        lines = [line for item in items(PyDoc(split)) for line in question(item).split("\n")[1:]]
        shown[split] = {line.rpartition("=")[0] for line in lines}
    assert not problems["train"] & problems["test"]
    assert not words["train"] & words["test"]
    for word in words["train"] | words["test"]:
        assert 4 <= len(word) <= 10 and word.isascii() and word.islower()
    assert not shown["train"] & shown["test"]
    for topic in TOPICS:
        assert not set(topic.training) & set(topic.held_out)


def test_split_of_gives_a_tenth_to_the_test():
    assert 800 < sum(split_of(str(i)) == "test" for i in range(10_000)) < 1200


def test_unknown_split_or_form():
    for make in (Arithmetic, SimpleSpelling, Identity, PyDoc):
        with pytest.raises(UserError, match="train or test"):
            make("validation")
    with pytest.raises(UserError, match="form is"):
        PyDoc("train", form="essay")


# ----------------------------------------------------------------------------------------------
# combining tasks

def test_mixture_is_complete_and_deterministic():
    # docs/traps.md: mixture-sums
    parts = [Numbers(0, 100), Numbers(1000, 7), Numbers(2000, 1)]
    mixture, again = TaskMixture(parts), TaskMixture(parts)
    rows = [mixture[i] for i in range(len(mixture))]
    assert sorted(rows) == [*range(100), *range(1000, 1007), 2000]
    assert rows == [again[i] for i in range(len(again))]
    assert rows != sorted(rows)


def test_slices_clamp_to_what_exists():
    # docs/traps.md: mixture-sums
    assert len(Numbers(0, 5, stop=100)) == 5
    assert len(Numbers(0, 5, start=3, stop=100)) == 2
    assert Numbers(0, 5, start=3)[0] == 3
    with pytest.raises(IndexError):
        Numbers(0, 5, start=3)[2]
    assert [row for row in TaskSequence([Numbers(0, 2), Numbers(10, 2)], start=1)] == [1, 10, 11]


def test_numbers_are_compared_as_numbers():
    # docs/traps.md: numbers-as-strings
    assert last_number("It is 1,000.") == last_number("1000") == last_number("1000.0") == 1000
    assert last_number("12 - 15 is -3.") == last_number("\N{MINUS SIGN}3") == -3
    assert last_number("2.5") is None and last_number("none") is None
    task = Arithmetic("test", 1)
    result = int(answer(task[0])[1]["text"])
    assert task.evaluate(task[0], [{"type": "text", "text": f"So it is {result:,}.0"}])
    assert not task.evaluate(task[0], [{"type": "text", "text": str(result + 1)}])
    assert not task.evaluate(task[0], answer(task[0])[:2]), "a tool's output alone is no answer"


def test_render_mc():
    assert render_mc("Which?", "AB", ["one", "two"]) == "Which?\n- one=A\n- two=B"


# ----------------------------------------------------------------------------------------------
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
        assert python["text"] == f'"{word}".count("{letter}")'
        assert word.count(letter) == int(output["text"])
        assert [c for c in text["text"] if c.isalpha()] == list(word)
    written_whole = [{"type": "text", "text": spelling[0]["word"]}]
    assert not spelling.evaluate(spelling[0], written_whole), "written whole is not spelled"
    count = int(answer(bee[0])[2]["text"])
    assert bee.evaluate(bee[0], f"It has {count}.")
    assert not bee.evaluate(bee[0], f"It has {count + 1}.")


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
        for c in examples:
            assert len(set(c["choices"])) == 4
            assert c["choices"][c["gold"]] == answer(c)[0]["text"]
        counts = Counter(c["gold"] for c in examples)
        assert max(counts.values()) - min(counts.values()) <= 1
        sentences[split] = {text for c in examples for text in c["choices"]}
        choices, gold = examples[0]["choices"], examples[0]["gold"]
        assert task.evaluate(examples[0], [{"type": "text", "text": choices[gold]}])
        assert not task.evaluate(examples[0], [{"type": "text", "text": choices[gold - 1]}])
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
    (
        "Return the :class:`~a.Thing` of\n    two things.  More text.",
        "Return the a.Thing of two things.",
    ),
    ("f(x) -- Tell what x is made of.", "Tell what x is made of."),
    ("Too short.", ""),
    ("Return self and nothing else at all.", ""),
    ("", ""),
    (">>> 1 + 1 + 1 + 1 + 1 + 1\n3", ""),
])
def test_first_sentence(doc, sentence):
    assert first_sentence(doc) == sentence


def test_shorten_cuts_at_a_word():
    assert shorten("Return a copy of the list.", 12) == "Return a"
    assert len(shorten("word " * 40)) <= pydoc.CHOICE_CHARS


def test_custom_conversations_keep_line_separators_inside_strings(tmp_path):
    # docs/traps.md: encoding-and-splitlines
    messages = [
        {"role": "user", "content": "caf\u00e9\u2028?"},
        {"role": "assistant", "content": "yes\u2028no"},
    ]
    path = tmp_path / "mine.jsonl"
    bare = json.dumps(messages, ensure_ascii=False)
    under_key = json.dumps({"messages": messages})
    path.write_text(f"{bare}\n\n{under_key}\n", encoding="utf-8")
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
    assert last_number("9" * 400) is None
    assert last_number("7 is 1,000.0") == 1000
    assert last_number("-3.50") is None
    assert last_number("\u22124") == -4 and last_number("none") is None


# ----------------------------------------------------------------------------------------------
# The items of today are those of yesterday: figures of different days are of the same questions.

SYLLABLES = "ba ce do fi gu ha je ko li mu na pe ro si tu".split()


@pytest.fixture
def made_library(tmp_path, monkeypatch):
    """Words and objects made here, in place of those that depend on the version of Python."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = sorted(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)[::9]
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    lines = []
    for i in range(150):
        method = ".method" if i % 3 == 0 else ""
        first, second, third = words[i], words[-i - 1], words[2 * i]
        row = {
            "name": f"module_{i % 7}.function_{i}{method}",
            "homes": 1 + i % 5 // 4,
            "sentence": f"Return the {first} of the {second} that was given, and {third}.",
        }
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "pydoc.jsonl").write_text("".join(lines), encoding="utf-8")


def digest(task):
    """Hash of the first items of a task, as they would be written to a file."""
    items = [{**task[i]} for i in range(min(len(task), 300))]
    for item in items:
        item.pop("stem", None)  # repeats the beginning of the question
    return hashlib.sha256(json.dumps(items).encode("utf-8")).hexdigest()[:16]


@pytest.mark.parametrize("make, train, test", [
    (lambda split: Arithmetic(split, 400), "bcdc9e66d32e235a", "4b2d30de8e4754ef"),
    (lambda split: Identity(split), "22bd02afc188641a", "b02cbb6e794f9cc5"),
    (lambda split: SimpleSpelling(split, 500), "d0acbbb29edf12ff", "dd0a85a5b8b5c288"),
    (lambda split: SpellingBee(split, 500, start=5), "89ff529ad57a6c6a", "a7dd14aff91cb593"),
    (lambda split: PyDoc(split, "what"), "40078f674a9e41f3", "f40f1110142bb5f2"),
    (lambda split: PyDoc(split, "module"), "1b6aeec114b92373", "91266cf6d35800d7"),
    (lambda split: PyDoc(split, "choice", size=300), "9e6785e5ae9cbaa7", "301ecdf33630feca"),
    (lambda split: PyDoc(split, "letter", size=300), "b8b8dabffad8f062", "08a52766082cb626"),
    (
        lambda split: TaskMixture(
            [Identity(split), SimpleSpelling(split, 50), Arithmetic(split, 50)]
        ),
        "e15152a0e723b126",
        "0d4334ec4b1c9ab4",
    ),
    (
        lambda split: TaskSequence([Identity(split, stop=5), Arithmetic(split, 50)], start=3),
        "23d249502593d685",
        "a6bc756c5f0c77b9",
    ),
])
def test_items_are_pinned(made_library, make, train, test):
    assert (digest(make("train")), digest(make("test"))) == (train, test)


def test_gathered_words_and_objects_are_pinned(tmp_path, monkeypatch):
    """What is read from source files, with two files made here in place of the libraries."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    source = '''"""Module."""


def {a}_things(first, second):
    """{a}_things(first, second) -> list

    Return the :func:`~x.{a}` of *first* and ``second``, in that order.  More about {b}.
    """


def both():
    """Give both the {a} and the {b} things back."""


def _hidden():
    """Return what nobody should ever ask about, whatever {a} is."""


class Thing{b}:
    """Hold a number of {b} things until somebody asks for them."""

    def take(self):
        """Take one {a} thing away and give the {b} thing back."""

    def shared(self):
        """Return a thing that is the same in every file."""

    def deprecated(self):
        """Deprecated since a long time, use the {b} thing."""
'''
    files = []
    for i, (a, b) in enumerate((("alpha", "beta"), ("gamma", "delta"), ("beta", "alpha"))):
        path = tmp_path / f"m{i}.py"
        path.write_text(source.format(a=a, b=b), encoding="utf-8")
        files.append(("stdlib", "package/__init__.py" if i == 2 else f"m{i}.py", path))
    broken = tmp_path / "broken.py"
    broken.write_text("def (:\n", encoding="utf-8")
    files += [
        ("stdlib", "broken.py", broken),
        ("stdlib", "_private.py", files[0][2]),
        ("stdlib", "turtledemo/x.py", files[0][2]),
    ]
    monkeypatch.setattr("tasks.spellingbee.python_files", lambda *_: files)
    monkeypatch.setattr("tasks.pydoc.python_files", lambda *_: files)
    monkeypatch.setattr("tasks.pydoc.PACKAGES", ())
    monkeypatch.setattr("tasks.pydoc.MODULES_IN_C", ())
    gathered = json.dumps([all_words(), pydoc.all_objects()])
    assert hashlib.sha256(gathered.encode("utf-8")).hexdigest()[:16] == "55b6d0d9d00dc189"
