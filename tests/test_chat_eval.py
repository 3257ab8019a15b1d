"""chat_eval as a whole: equal answers at any batch size and on any number of ranks, what its record
has, the files of a user, and what it says of bad input."""
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import ROOT, last_json
from models import make_model
from nanochat.answers import Answerer
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer
from stage_runs import TINY_CHAT
from tasks import named
from tasks.arithmetic import Arithmetic
from tasks.asking import Asked, How, ask_all, control_of, score
from tasks.common import at_equal_distances, choice_conversation, conversation
from test_hub_tasks import fill_cache

REAL = os.environ.get("NANOCHAT_TEST_DATA")
EVAL = ("scripts.chat_eval", "--max_new_tokens=8")
QUESTIONS = [
    {"question": f"Where does the {animal} sleep?", "answer": f"In bed {i}."}
    for i, animal in enumerate(("cat", "old dog", "very quick brown fox", "horse", "bird"))
]
CHOICES = [
    {"question": f"Which is {i}?", "choices": ["the cat", f"number {i}", "a river"], "answer": 1}
    for i in range(4)
]


@pytest.fixture(scope="module")
def chat(stages, trained):
    """Runs of stages in a base directory with a chat model, and a file of questions."""
    stages.fork("scripts.chat_sft", "--source=base", *TINY_CHAT, "--num_iterations=30")
    fill_cache(stages.base)
    stages.environment["HF_HUB_OFFLINE"] = "1"
    lines = [json.dumps(row) + "\n" for row in QUESTIONS + CHOICES]
    (stages.base / "qa.jsonl").write_text("".join(lines), encoding="utf-8")
    return stages


def score_of(chat, *words, **options):
    """(numbers, lines about wrong answers) of a run of chat_eval."""
    out, _ = chat.fork(*EVAL, *words, **options)
    keys = ("accuracy", "control", "f1", "interval", "majority", "chance", "centred", "chatcore",
            "items", "pass_at_k", "not_fitting")
    record = last_json(out)
    return {key: record[key] for key in keys}, re.findall(r"^  (?:asked|given) .*", out, re.M)


# ------------------------------------------------------------------------------------------------
# equal answers

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_equal_at_any_batch_size_and_on_any_number_of_ranks(chat, dtype):
    words = ("-a", "spelling,pydoc,pydoc_letter,arc-easy", f"--custom={chat.base / 'qa.jsonl'}",
             "--items=7", f"--dtype={dtype}")
    alone = score_of(chat, *words, "--batch_size=1")
    numbers, lines = alone
    assert len(lines) >= 2 * len(QUESTIONS), "every answer to the file's questions is shown"
    assert numbers["items"] == {
        "spelling": 7, "pydoc": 7, "pydoc_letter": 7, "ARC-Easy": 7, "custom": 7}
    for batch_size in (3, 8, 64):
        assert score_of(chat, *words, f"--batch_size={batch_size}") == alone
    for ranks in (2, 3):
        assert score_of(chat, *words, "--batch_size=3", ranks=ranks) == alone


def test_samples_are_equal_at_any_batch_size_and_on_two_ranks(chat):
    words = ("-a", "spelling,counting", "--items=5", "--num-samples=3", "--temperature=0.9")
    alone = score_of(chat, *words, "--batch_size=1")
    assert score_of(chat, *words, "--batch_size=64") == alone
    assert score_of(chat, *words, "--batch_size=4", ranks=2) == alone
    shares = alone[0]["pass_at_k"]
    assert shares.keys() == {"spelling", "counting"}
    for of_task in shares.values():
        assert list(of_task) == ["1", "2", "3"]
        assert 0 <= of_task["1"] <= of_task["2"] <= of_task["3"] <= 1
    assert alone[0]["accuracy"]["counting"] == pytest.approx(shares["counting"]["1"])


def test_a_picked_answer_counts_once_in_pass_at_k_whatever_comes_first():
    picked = Asked(0, [True], None, 0.0, True, "A")
    written = Asked(1, [True, False, False, False], None, 0.0, True, "84")
    items = [choice_conversation("Which?", ["a", "b"], 0), conversation("7*12?", "84")]
    for order in (0, 1), (1, 0):
        asked = [(picked, written)[place] for place in order]
        found = score(Arithmetic("test", 2), [items[place] for place in order], asked)
        assert found.pass_at_k == {1: 0.625, 2: 0.75, 4: 1.0}
        assert found.accuracy == found.pass_at_k[1]


# ------------------------------------------------------------------------------------------------
# the record

def test_the_record_has_every_number_and_the_controls_of_what_has_choices(chat):
    out, _ = chat.fork(*EVAL, "-a", "MMLU|GSM8K|pydoc", "-x", "6", "--batch_size=2")
    record = last_json(out)
    assert record["items"] == {"MMLU": 6, "GSM8K": 6, "pydoc": 6}
    assert record["control"].keys() == {"MMLU", "pydoc"}
    for name in record["items"]:
        low, high = record["interval"][name]
        assert 0 <= low <= record["accuracy"][name] <= high <= 1
        centred = (record["accuracy"][name] - record["chance"][name]) / (
            1 - record["chance"][name])
        assert record["centred"][name] == pytest.approx(centred)
    assert record["chance"] == {"MMLU": 0.25, "GSM8K": 0.0, "pydoc": 0.25}
    # 0, 6, 13, 20, 26, 33 of the 40 made-up questions, whose right letter is that of i mod 4
    assert record["majority"]["MMLU"] == pytest.approx(2 / 6)
    assert record["chatcore"] == pytest.approx(sum(record["centred"].values()) / 3)
    assert record["batch_difference"] < 1, "near ties are as far apart as is assumed"
    assert re.search(r"^MMLU +\d+ of 6 right, .*chance 25 %, majority 33 %, control", out, re.M)
    assert "ChatCORE" in out

    without = chat.fork_record(*EVAL, "-a", "MMLU", "--items=6", "--control=0")
    assert without["control"] == {}
    assert without["accuracy"]["MMLU"] == record["accuracy"]["MMLU"]


def test_the_record_says_what_was_declined(chat):
    out, _ = chat.fork(*EVAL, "-a", "scope,scope_written,follow_up,pydoc_letter", "--items=4")
    record = last_json(out)
    declined = record["declined"]
    assert (declined["should_count"], declined["should_not_count"]) == (8, 4)
    assert record["declined_by_task"].keys() == {"scope", "scope_written", "follow_up"}
    for name in ("scope", "scope_written"):
        assert record["declined_by_task"][name] == record["accuracy"][name]
    assert re.search(r"^declined +\d+\.\d % of 8 questions that it should, ", out, re.M)
    out, _ = chat.fork(*EVAL, "-a", "spelling", "--items=2")
    assert last_json(out)["declined"]["should"] is None and "questions that it should" not in out


def test_a_name_is_asked_once_and_in_any_spelling(chat):
    record = chat.fork_record(*EVAL, "-a", "SpellingBee,counting,mmlu", "--max-problems=2")
    assert record["items"] == {"counting": 2, "MMLU": 2}


def test_a_task_of_a_users_file_is_asked_and_its_wrong_answers_are_shown(chat, tmp_path):
    page = (ROOT / "docs" / "add-a-task.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(\"\"\".*?)```", page, re.S)
    assert code.count("\n") < 60
    mine = tmp_path / "units.py"
    mine.write_text(code, encoding="utf-8")
    out, _ = chat.fork(*EVAL, "-a", mine)
    record = last_json(out)
    assert 0 < record["items"][str(mine)] and "  expected  " in out
    mine.write_text(code.replace("def evaluate", "def judge"), encoding="utf-8")
    assert "NotImplementedError" in chat.refusal(*EVAL, "-a", mine)


@pytest.mark.skipif(not REAL, reason="NANOCHAT_TEST_DATA is not set")
def test_the_documented_tasks_are_asked_and_judged_on_real_data(base_dir, monkeypatch):
    shutil.copytree(Path(REAL) / "hf", base_dir / "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = Tokenizer.train_from_iterator(["def add(a, b): which of the two is it? " * 30], 280)
    model = make_model(vocab_size=tokenizer.get_vocab_size()).eval()
    model.config.max_seq_len = 4096
    model.build_rotary()
    how = How(Answerer(model, tokenizer, max_new_tokens=8), batch_size=4)
    for name in ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"):
        task = named.make_task(name)
        numbers = at_equal_distances(len(task), 4)
        items = [{**task[number], "answer_tokens": 8} for number in numbers]
        result = score(task, items, ask_all(how, name, task, numbers, items))
        assert result.count == 4 and 0 <= result.accuracy <= 1
        assert (result.control is None) == (name in ("GSM8K", "HumanEval"))

        # the data set's own answers are judged right
        pairs = [(one, one["messages"][-1]["content"]) for one in items]
        assert task.evaluate_many(pairs) == [True] * 4


def test_layers_of_the_sandbox_that_do_not_exist_are_named(chat):
    _, err = chat.fork(*EVAL, "-a", "HumanEval", "--items=2", "--allow_missing=x", status=2)
    assert "error: x is no layer of the sandbox" in err


def test_where_nothing_confines_programs_only_humaneval_is_refused(monkeypatch):
    def cannot_confine(allow_missing):
        raise UserError(f"this system cannot confine a program, allowed {allow_missing}")
    monkeypatch.setattr(named, "layers_here", cannot_confine)
    assert named.sandbox_error(["GSM8K", "MMLU"]) is None
    assert "allowed ('a',)" in str(named.sandbox_error(["GSM8K", "HumanEval"], ("a",)))


# ------------------------------------------------------------------------------------------------
# controls

def test_a_control_has_the_question_of_another_item_and_its_own_choices():
    items = [choice_conversation(f"Which is {i}?", [f"a{i}", f"b{i}"], i % 2) for i in range(5)]
    for place in range(5):
        control = control_of(items, place)
        asked, answer = (message["content"] for message in control["messages"])
        assert asked == f"Which is {(place + 2) % 5}?\n- a{place}=A\n- b{place}=B"
        assert answer == items[place]["messages"][1]["content"]


def test_no_control_repeats_the_question_or_is_made_of_nothing():
    same = [choice_conversation("Which?", [f"a{i}", "b"], 0) for i in range(4)]
    assert control_of(same, 0) is None
    assert control_of([*same, choice_conversation("Who?", ["c", "d"], 0)], 0) is not None
    assert control_of([conversation("1+1?", "2")] * 3, 0) is None
    mixed = [same[0], conversation("1+1?", "2"), choice_conversation("Who?", ["c", "d"], 0)]
    assert control_of(mixed, 0)["messages"][0]["content"].startswith("Who?")


# ------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("words, needle", [
    (("-a", "GSM8"), "did you mean GSM8K"),
    (("-a", "custom"), "add --custom=qa.jsonl"),
    (("--custom=/nowhere/qa.csv",), "cannot read"),
    (("-a", "/nowhere/mine.py"), "cannot read"),
    (("-a", "GSM8K", "--num_samples=4"), "add --temperature"),
    (("-a", "GSM8K", "--num_samples=0"), "num_samples=0"),
    (("-a", "GSM8K", "--temperature=-1"), "temperature=-1"),
    (("-a", "GSM8K", "--dtype=float16"), "float16"),
    (("-a", "{long}"), "evaluate a model with a longer one"),
    (("-a", "{empty}"), "empty.csv"),
    (("-a", "{columns}"), "topic, wording"),
])
def test_bad_input_is_one_line_with_the_remedy(chat, tmp_path, words, needle):
    files = {
        "long": ("long.jsonl", json.dumps({"question": "why? " * 200, "answer": "so"})),
        "empty": ("empty.csv", "question,answer\n"),
        "columns": ("columns.csv", "topic,wording\n1,2\n"),
    }
    paths = {}
    for key, (name, text) in files.items():
        paths[key] = tmp_path / name
        paths[key].write_text(text, encoding="utf-8")
    words = [word.format(**paths) for word in words]
    _, err = chat.fork(*EVAL, *words, status=2)
    assert needle in err and err.count("error: ") == 1 and err.count("\n") == 1


def test_questions_that_do_not_fit_are_counted_and_the_others_asked(chat, tmp_path):
    rows = [{"question": "why? " * 200, "answer": "so"}, *QUESTIONS]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, _ = chat.fork(*EVAL, "-a", path)
    assert "1 of 6 questions do not fit the context of 128 tokens" in out
    record = last_json(out)
    assert record["not_fitting"] == {str(path): 1} and record["items"] == {str(path): 6}


def test_a_data_set_without_its_columns_is_named(chat):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = chat.base / "hub" / "openai" / "gsm8k" / "main" / "test"
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)
    [path] = folder.glob("*.parquet")
    pq.write_table(pa.table({"question": ["1+1?"], "reply": ["2"]}), path)
    err = chat.refusal(*EVAL, "-a", "GSM8K")
    assert "openai/gsm8k" in err and "answer" in err
    shutil.rmtree(folder)
    shutil.move(kept, folder)
