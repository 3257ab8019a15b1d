"""Tasks whose items come from the hub, the mixtures made of them, and the stages that read these.

The data sets here are small ones in a cache that is filled by hand; with NANOCHAT_TEST_DATA, real
ones are read as well.
"""
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.multiprocessing as mp

from conftest import ROOT
from hub_fakes import Hub
from nanochat import hub
from nanochat.common import UserError, compute_cleanup, compute_init, warn_once
from nanochat.execution import use_tool
from nanochat.hub import HubError, cache_folder
from nanochat.plan import make_chat_plan
from nanochat.tokenizer import Tokenizer
from stage_runs import TINY_CHAT, last_json, meta_of, rank_variables
from tasks import chat_data, smoltalk
from tasks.arc import ARC, ROWS
from tasks.chat_data import (
    Origin,
    built_in_tasks,
    check_context,
    choose_origin,
    finetuning_tasks,
    midtraining_tasks,
    tasks_of_run,
)
from tasks.common import TaskMixture, answer_text, at_equal_distances, canonical_number
from tasks.gsm8k import CALL, GSM8K, result_of, solution_parts
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.named import FROM_HUB
from tasks.smoltalk import SmolTalk

REAL = os.environ.get("NANOCHAT_TEST_DATA")
HUB = Origin("hub", True)

SOLUTION = (
    "She bakes 4*3=<<4*3=12>>12 rolls and sells half, 12/2 = <<12/2=6.00>>6.\n"
    "That is $<<6*1000=6,000>>6,000.\n#### 6,000")


def talk(question, answer, system=None):
    turns = [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
    return [{"content": system, "role": "system"}] * bool(system) + turns


def sum_row(i):
    return {"question": f"What is {i} + {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n"
            f"#### {2 * i}"}


def choice_row(i):
    choices = [f"item {i}", "another", f"a third {i}", "none"]
    return {"question": f"Which is {i}?", "subject": "x", "choices": choices, "answer": i % 4}


def science_row(i):
    labels = (list("ABCD"), list("1234"), list("ABC"), list("ABCDE"))[i % 4]
    texts = [f"text {label} of {i}" for label in labels]
    return {"id": str(i), "question": f"Why {i}?", "choices": {"text": texts, "label": labels},
            "answerKey": labels[i % 3]}


def function_row(i):
    return {"prompt": f"def f{i}(x):\n", "canonical_solution": "    return x\n",
            "test": "def check(f): assert f(1) == 1\n", "entry_point": f"f{i}"}


SETS = {
    ("HuggingFaceTB/smol-smoltalk", "default", "train"):
        lambda i: {"messages": talk(f"Hello {i}", f"Hello, number {i}.", "Be short." * (i % 2))},
    ("openai/gsm8k", "main", "train"): sum_row,
    ("openai/gsm8k", "main", "test"): sum_row,
    ("cais/mmlu", "all", "dev"): choice_row,
    ("cais/mmlu", "all", "test"): choice_row,
    ("allenai/ai2_arc", "ARC-Easy", "train"): science_row,
    ("allenai/ai2_arc", "ARC-Easy", "test"): science_row,
    ("allenai/ai2_arc", "ARC-Challenge", "train"): science_row,
    ("allenai/ai2_arc", "ARC-Challenge", "test"): science_row,
    ("openai/openai_humaneval", "openai_humaneval", "test"): function_row,
}


def put(split, rows):
    """Write rows where the cache has a split, (name, configuration, split), as a user may."""
    folder = cache_folder(*split)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet", row_group_size=7)


def fill_cache(base, count=40):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for split, row in SETS.items():
            put(split, [row(i) for i in range(count)])


@pytest.fixture
def cache(base_dir, monkeypatch):
    """A cache with 40 rows of each split, and no network. Words to spell are made up."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = "\n".join(f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    (base_dir / "words.txt").write_text(words, encoding="utf-8")
    (base_dir / "pydoc.jsonl").write_text(
        "".join(f'{{"name": "m.f{i}", "sentence": "Return {i} of it."}}\n' for i in range(90)),
        encoding="utf-8")
    fill_cache(base_dir)
    return base_dir


def answer(conversation):
    return conversation["messages"][-1]["content"]


# ----------------------------------------------------------------------------------------------
# single tasks

def test_calculator_calls_become_calls_of_the_tool_with_its_own_replies():
    parts = solution_parts(SOLUTION)
    assert [part["type"] for part in parts] == [
        "text", "python", "python_output", "text", "python", "python_output",
        "text", "python", "python_output", "text"]
    calls = [part["text"] for part in parts if part["type"] != "text"]
    assert calls == ["4*3", "12", "12/2", "6", "6*1000", "6000"]
    assert "".join(part["text"] for part in parts if part["type"] == "text") == (
        "She bakes 4*3=12 rolls and sells half, 12/2 = 6.\nThat is $6,000.\n#### 6,000")
    odd = "a <<x=3>> <<=>> b << c"
    assert [part["text"] for part in solution_parts(odd)] == ["a ", "x", "3", " ", " b << c"]


@pytest.mark.parametrize("given, is_right", [
    ("#### 6000", True),
    ("#### 6,000", True),
    ("#### 6000.0", True),
    ("It is\n####6,000.00.", True),
    ("#### $6000", True),
    ("#### 5\nNo: #### 6000", True),
    ("#### 600", False),
    ("#### -6000", False),
    ("#### 6000.5", False),
    ("6000", False),
    ("####", False),
    ("", False),
])
def test_results_are_compared_as_numbers(cache, given, is_right):
    # docs/traps.md: numbers-as-strings
    put(("openai/gsm8k", "main", "test"), [{"question": "How much?", "answer": SOLUTION}])
    task = GSM8K("test")
    assert task.evaluate(task[0], [{"type": "text", "text": given}]) is is_right
    assert task.evaluate(task[0], answer(task[0]))
    assert not task.evaluate(task[0], [])
    assert task[0]["answer_tokens"] == 512, "which a solution may take"


def test_a_canonical_number_is_the_same_for_the_same_number():
    same = ("1000", "1,000", "1000.0", "1,000.00", "01000")
    assert {canonical_number(text) for text in same} == {"1000"}
    assert canonical_number("\N{MINUS SIGN}2.50") == canonical_number("-2.5") == "-2.5"
    assert result_of("#### 10.0") == result_of("#### 10") == "10"
    assert result_of("#### \N{MINUS SIGN}3") == result_of("#### -3") == "-3"


def test_questions_with_choices_show_letters_whatever_their_labels_are(cache):
    task = ARC("ARC-Easy", "test")
    counts = Counter()
    for i in range(len(task)):
        conversation = task[i]
        texts = science_row(i)["choices"]["text"]
        letters = conversation["letters"]
        counts["".join(letters)] += 1
        lines = conversation["messages"][0]["content"].split("\n")
        assert lines == [f"Why {i}?", *(f"- {t}={letter}" for t, letter in zip(texts, letters))]
        assert answer(conversation) == "ABC"[i % 3]
        assert task.evaluate(conversation, answer(conversation))
        assert not task.evaluate(conversation, "E" if i % 3 else "B")
    assert counts == {"ABCD": 20, "ABC": 10, "ABCDE": 10}
    assert task.chance == pytest.approx((20 / 4 + 10 / 3 + 10 / 5) / 40)
    mmlu = MMLU("test")
    assert [answer(mmlu[i]) for i in range(4)] == list("ABCD") and mmlu.chance == 0.25
    assert mmlu.evaluate(mmlu[1], [{"type": "text", "text": " B"}])


def test_conversations_that_are_none_are_passed_over(cache, monkeypatch):
    good = [talk("Hi", "Hello."), talk("Why?", "So."), talk("A", "B", "Be kind.")]
    bad = [talk("", "Hello."), [], [{"content": "x", "role": "stranger"}], talk("Hi", "")]
    unanswered = [*talk("Why?", "So."), {"content": "And?", "role": "user"}]
    rows = [bad[0], good[0], *bad[1:], good[1], unanswered, good[2], bad[0]]
    put(("HuggingFaceTB/smol-smoltalk", "default", "train"), [{"messages": row} for row in rows])
    task = SmolTalk("train")
    expected = [0, 0, 1, 1, 1, 1, 1, 2, 0]
    assert len(task) == len(expected)
    shown = [task[i]["messages"] for i in range(len(task))]
    assert shown == [[
        {"role": message["role"], "content": message["content"]} for message in good[number]
    ] for number in expected]
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    assert all(sum(tokenizer.render_conversation(task[i])[1]) for i in range(len(task)))
    monkeypatch.setattr(smoltalk, "TRIED", 3)
    with pytest.raises(UserError, match="no conversation in rows 2 to 4"):
        task[2]


def test_a_slice_takes_every_step_th_row(cache):
    task = GSM8K("train", start=3, stop=30, step=9)
    questions = [task[i]["messages"][0]["content"] for i in range(len(task))]
    assert questions == [f"What is {i} + {i}?" for i in (3, 12, 21)]
    assert len(GSM8K("train", stop=8)) == 8 and len(GSM8K("train", stop=8).rows) == 14
    assert len(GSM8K("train", stop=99)) == len(GSM8K("train")) == 40
    assert len(GSM8K("train", stop=-30)) == 10 and len(GSM8K("train", stop=0)) == 0


def test_another_number_of_rows_than_the_documented_one_is_said(cache, capsys):
    warn_once.cache_clear()
    GSM8K("train")
    SmolTalk("train")
    said = capsys.readouterr().err
    assert "has 40 rows where 7,473 are documented" in said
    assert "has 40 rows where 460,000 are documented" in said


@pytest.mark.parametrize("split, make, column, change, words", [
    (("allenai/ai2_arc", "ARC-Easy", "test"), lambda: ARC("ARC-Easy", "test"), "answerKey",
     "F", "'F' is none of the labels ['1', '2', '3', '4']"),
    (("allenai/ai2_arc", "ARC-Easy", "test"), lambda: ARC("ARC-Easy", "test"), "choices",
     {"text": ["a", "b"], "label": ["1", "2", "3"]}, "2 choices have 3 labels"),
    (("cais/mmlu", "all", "test"), lambda: MMLU("test"), "answer",
     -1, "-1 is none of 4 choices, counted from 0"),
    (("cais/mmlu", "all", "test"), lambda: MMLU("test"), "answer",
     4, "4 is none of 4 choices, counted from 0"),
    (("openai/gsm8k", "main", "test"), lambda: GSM8K("test"), "answer",
     "It is <<3+3=6>>6.", 'no "#### " with a number ends the solution'),
])
def test_a_row_whose_answer_is_none_is_named(cache, split, make, column, change, words):
    row = SETS[split]
    put(split, [{**row(i), column: change} if i == 9 else row(i) for i in range(20)])
    task = make()
    assert task.evaluate(task[8], answer(task[8])) and task[10]
    with pytest.raises(UserError) as error:
        task[9]
    path = cache_folder(*split) / "0000.parquet"
    assert str(error.value) == (
        f"{path}, row 10, column {column!r}: {words}: correct or replace this file")


def test_a_null_or_another_type_in_a_data_set_is_found_before_training(cache):
    for split, make, column, value in (
        (("allenai/ai2_arc", "ARC-Challenge", "train"), lambda: ARC("ARC-Challenge", "train"),
         "answerKey", None),
        (("allenai/ai2_arc", "ARC-Challenge", "train"), lambda: ARC("ARC-Challenge", "train"),
         "question", None),
        (("cais/mmlu", "all", "dev"), lambda: MMLU("dev"), "choices", ["a", None]),
        (("cais/mmlu", "all", "dev"), lambda: MMLU("dev"), "answer", None),
        (("openai/gsm8k", "main", "train"), lambda: GSM8K("train"), "question", None),
        (("openai/gsm8k", "main", "train"), lambda: GSM8K("train"), "answer", None),
    ):
        row = SETS[split]
        put(split, [{**row(i), column: value} if i == 5 else row(i) for i in range(9)])
        with pytest.raises(UserError, match=f"row 6, column '{column}': it holds a null"):
            make()
        put(split, [{**row(i), column: 1.5} for i in range(9)])
        with pytest.raises(UserError, match=f"column '{column}' has the type double, not"):
            make()


def test_a_context_too_short_for_a_data_set_is_one_line_before_training(cache, capsys):
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    long = "long " * 40
    tasks = finetuning_tasks()
    check_context(tokenizer, tasks, 256)
    assert capsys.readouterr().out == "", "all fit"
    put(("openai/gsm8k", "main", "train"), [
        {**sum_row(i), "question": long} if i % 4 == 0 else sum_row(i) for i in range(400)])
    check_context(tokenizer, finetuning_tasks(), 205)
    assert capsys.readouterr().out == (
        "openai/gsm8k: the context of 205 tokens cuts 100 of 100 conversations, 0 of which keep "
        "no answer\n")
    with pytest.raises(UserError) as error:
        check_context(tokenizer, finetuning_tasks(), 8)
    assert str(error.value) == (
        "the context of 8 tokens is too short for allenai/ai2_arc: none of 40 conversations keeps "
        "an answer when it is cut to it. Train a base model with a larger --max_seq_len, or give "
        "--chat_data=local")
    check_context(tokenizer, [task for task in tasks if not hasattr(task, "rows")], 2)


@pytest.mark.parametrize("make, words", [
    (lambda: GSM8K("dev"), "split is train or test, not 'dev'"),
    (lambda: ARC("ARC-Hard", "test"), "subset is ARC-Easy or ARC-Challenge, not 'ARC-Hard'"),
    (lambda: MMLU("auxiliary_train"), "HF_HUB_OFFLINE forbids to fetch it: run python -m"),
])
def test_what_is_not_there_is_one_line(cache, make, words):
    with pytest.raises(UserError, match=words):
        make()


# ----------------------------------------------------------------------------------------------
# mixtures

def test_a_run_takes_what_the_setting_says_else_what_its_device_is_good_for():
    assert choose_origin("", "cuda") == Origin("hub", False)
    assert choose_origin("", "cpu") == choose_origin("", "mps") == Origin("local", False)
    assert choose_origin("hub", "cpu") == Origin("hub", True)
    assert choose_origin("local", "cuda") == Origin("local", True)
    assert choose_origin("", "cuda", "local") == Origin("local", True), "as it began"
    assert choose_origin("hub", "cpu", "hub") == Origin("hub", True)
    with pytest.raises(UserError, match="chat_data=web is not supported: choose hub or local"):
        choose_origin("web", "cuda")
    with pytest.raises(UserError, match="has the conversations of chat_data=hub, not of local"):
        choose_origin("local", "cuda", "hub")


def test_the_documented_mixtures_are_complete_and_the_same_every_time(cache, capsys):
    # docs/traps.md: mixture-sums
    middle, fine = midtraining_tasks(), finetuning_tasks()
    assert [(type(task).__name__, len(task)) for task in middle] == [
        ("SmolTalk", 40), ("MMLU", 40), ("GSM8K", 40), ("SimpleSpelling", 200_000),
        ("SpellingBee", 80_000), ("Arithmetic", 26_000)]
    assert middle[1].split == "dev" and "take the place of its auxiliary_train" in (
        capsys.readouterr().out)
    assert [(type(task).__name__, len(task)) for task in fine] == [
        ("ARC", 40), ("ARC", 40), ("GSM8K", 40), ("SmolTalk", 40), ("SimpleSpelling", 300),
        ("SpellingBee", 300), ("Arithmetic", 300)]
    assert fine[3].stop == 10_000
    mixture, again = TaskMixture(fine), TaskMixture(finetuning_tasks())
    rows = [repr(mixture[i]) for i in range(len(mixture))]
    assert rows == [repr(again[i]) for i in range(len(again))]
    assert Counter(rows) == Counter(repr(task[i]) for task in fine for i in range(len(task)))


def test_where_the_hub_is_out_of_reach_the_local_mixture_takes_its_place(cache, capsys):
    name, tasks = built_in_tasks("chat_sft", HUB, None, "lookup")
    assert name == "hub" and len(tasks) == 7, "Python's library belongs to the local mixture"
    assert "conversations of the hub: ARC 40, ARC 40, GSM8K 40, SmolTalk 40" in (
        capsys.readouterr().out)
    local = built_in_tasks("mid_train", Origin("local", False), None, "lookup")
    assert local[0] == "local"
    assert [type(task).__name__ for task in local[1]] == [
        "SimpleSpelling", "SpellingBee", "Arithmetic", "PyDoc", "PyDoc", "PyDoc",
        "Scope", "FollowUp", "TwoSteps"]

    shutil.rmtree(cache / "hub" / "HuggingFaceTB")
    capsys.readouterr()
    name, tasks = built_in_tasks("mid_train", Origin("hub", False), None, "lookup")
    out = capsys.readouterr().out
    assert name == "local" and len(tasks) == 9 and out.count("\n") == 1
    assert "the hub's are not to be had: HuggingFaceTB/smol-smoltalk (default, train)" in out
    with pytest.raises(UserError, match="smol-smoltalk"):
        built_in_tasks("mid_train", HUB, None, "lookup")


def test_a_resumed_run_must_find_the_rows_that_it_began_with(cache):
    # docs/traps.md: resume-forgets
    def tasks_of(start, device_type="cuda"):
        return tasks_of_run("mid_train", "", device_type, start, None, "lookup")

    begun = SimpleNamespace(state=None, meta={})
    first = tasks_of(begun)
    assert begun.meta == {"chat_data": "hub", "chat_rows": 306_120}
    resumed = SimpleNamespace(state={"loader": ()}, meta=dict(begun.meta))
    assert len(tasks_of(resumed, "cpu")) == len(first), "as it began, whatever the device"

    put(("cais/mmlu", "all", "auxiliary_train"), [choice_row(i) for i in range(50)])
    with pytest.raises(UserError, match="began with 306,120 conversations, of which 306,130"):
        tasks_of(resumed)
    earlier = SimpleNamespace(state={"loader": ()}, meta={})
    assert type(tasks_of(earlier)[-1]).__name__ == "TwoSteps", "a run of an earlier version"
    assert earlier.meta["chat_data"] == "local"


def _decide_on_ranks(rank, variables, base, failing, results):
    os.environ.update(variables[rank])
    os.environ.update({"NANOCHAT_BASE_DIR": f"{base}{rank}", "HF_HUB_OFFLINE": "1"})
    os.environ["LOCAL_RANK"] = "0"      # every rank is the first one of a machine of its own
    hub.POLL_SECONDS = 0.05
    compute_init("cpu")
    if rank == failing:
        shutil.rmtree(f"{base}{rank}/hub/openai")
    name, tasks = built_in_tasks("chat_sft", Origin("hub", False), None, "lookup")
    results[rank] = name, len(tasks)
    if rank == 1:
        put(("openai/gsm8k", "main", "train"), [sum_row(i) for i in range(3)])
    if failing is None:
        try:
            built_in_tasks("chat_sft", HUB, None, "lookup")
        except UserError as error:
            results[rank] += (str(error),)
    compute_cleanup()


@pytest.mark.parametrize("failing", [None, 1])
def test_all_ranks_have_the_hubs_conversations_or_none_has(cache, failing):
    for rank in (0, 1):
        shutil.copytree(cache, f"{cache}{rank}")
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_decide_on_ranks, (rank_variables(2), str(cache), failing, results), nprocs=2)
        results = dict(results)
    if failing is None:
        assert results[0][:2] == results[1][:2] == ("hub", 7)
        assert "the machines have different data sets" in results[0][2] == results[1][2]
    else:
        assert results[0] == results[1] == ("local", 9)


def test_a_rank_that_cannot_fetch_says_it_of_the_machine(monkeypatch):
    def none(**_):
        raise HubError("no connection")
    monkeypatch.setitem(chat_data.HUB_TASKS, "chat_sft", lambda fetch=True: none())
    with pytest.raises(HubError, match="no connection"):
        built_in_tasks("chat_sft", HUB, None, "lookup")


# ----------------------------------------------------------------------------------------------
# whole stages

def test_the_stages_train_on_the_hubs_conversations_resume_and_are_asked(stages, trained):
    fill_cache(stages.base)
    stages.environment["HF_HUB_OFFLINE"] = "1"
    command = (*TINY_CHAT, "--num_iterations=3", "--model_tag=d1")
    local = stages.fork_record("scripts.mid_train", *command)
    assert meta_of(stages.folder("mid", "d1"), 3)["chat_data"] == "local"
    assert local["settings"]["chat_data"] == ""

    hub_command = (*command, "--chat_data=hub")
    out, _ = stages.fork("scripts.chat_sft", *hub_command, status=130, faults={"2": "interrupt"})
    assert "conversations of the hub: ARC 40, ARC 40, GSM8K 40, SmolTalk 40" in out
    refusal = stages.refusal("scripts.chat_sft", *command, "--resume", "--chat_data=local")
    assert "has the conversations of chat_data=hub, not of local" in refusal
    out, _ = stages.fork("scripts.chat_sft", *command, "--resume")
    assert "conversations of the hub" in out and last_json(out)["steps"] == 3
    saved = stages.folder("chatsft", "d1")
    assert f"resuming chat_sft of {saved} at step 2\n" in out
    assert meta_of(stages.folder("chatsft", "d1"), 3)["chat_data"] == "hub"

    # the chat is asked what it practised
    few = ("--items=3", "--max_new_tokens=4")
    score = stages.fork_record("scripts.chat_eval", *few)
    of_a_text = {"own_text", "own_text_practised"}
    assert score["items"].keys() == {
        "arithmetic", "spelling", "counting", "identity", *of_a_text, *FROM_HUB}
    assert score["items"]["MMLU"] == 3 and 0.2 < score["chance"]["ARC-Easy"] < 0.34
    score = stages.fork_record("scripts.chat_eval", "-a", "ARC-Easy|GSM8K", *few, ranks=2)
    assert score["items"] == {"ARC-Easy": 3, "GSM8K": 3}
    shutil.rmtree(stages.base / "hub" / "cais")
    out, _ = stages.fork("scripts.chat_eval", *few)
    left_out = "MMLU, GSM8K, HumanEval, which are not to be had: cais/mmlu (all, test) is not whole"
    assert left_out in out
    assert "ARC-Easy" not in last_json(out)["accuracy"]
    assert "cais/mmlu" in stages.refusal("scripts.chat_eval", "-a", "MMLU", *few)
    assert "choose from arithmetic" in stages.refusal("scripts.chat_eval", "-a", "museum")
    refusal = stages.refusal("scripts.mid_train", *command, "--chat_data=web")
    assert "chat_data=web is not supported" in refusal


def test_midtraining_fetches_its_data_sets_from_the_hub_as_they_come(stages, trained, monkeypatch):
    """From a hub that drops, waits and is busy, at the smallest size, to the end."""
    data = stages.base / "data"
    fill_cache(data)
    server = Hub()
    for path in sorted((data / "hub").rglob("*.parquet")):
        owner, name, *rest = path.relative_to(data / "hub").parts
        server.files.setdefault(f"{owner}/{name}", {})["/".join(rest)] = path.read_bytes()
    server.trouble = {"main/train/0000.parquet": ["cut", 503], "all/dev/0000.parquet": [429]}
    monkeypatch.setitem(stages.environment, "HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(stages.environment, "HF_ENDPOINT", server.url)
    shutil.rmtree(stages.base / "hub", ignore_errors=True)
    command = (*TINY_CHAT, "--num_iterations=2", "--model_tag=d1", "--chat_data=hub")
    out, _ = stages.fork("scripts.mid_train", *command)
    server.close()
    assert "take the place of its auxiliary_train: cais/mmlu has no split auxiliary_train" in out
    assert "conversations of the hub: SmolTalk 40, MMLU 40, GSM8K 40, SimpleSpelling" in out
    record = last_json(out)
    assert record["steps"] == 2 and record["settings"]["chat_data"] == "hub"
    for split in SETS:
        if split[2] in ("train", "dev") and split[0] != "allenai/ai2_arc":
            path = stages.base.joinpath("hub", *split, "0000.parquet")
            assert path.read_bytes() == data.joinpath("hub", *split, "0000.parquet").read_bytes()


def test_the_command_fetches_all_that_training_and_chat_eval_read(cache, run_module):
    done = run_module("tasks.chat_data", base=cache)
    rows = last_json(done.stdout)["rows"]
    assert len(rows) == len(SETS) and set(rows.values()) == {40}, done.stderr
    assert {tuple(key.split()) for key in rows} == SETS.keys()


def test_a_task_is_one_short_file():
    for name in ("smoltalk", "gsm8k", "mmlu", "arc"):
        lines = (ROOT / "tasks" / f"{name}.py").read_text(encoding="utf-8").split("\n")
        assert len(lines) <= 75, name


# ----------------------------------------------------------------------------------------------
# real data

@pytest.fixture
def real_cache(base_dir, monkeypatch):
    """A cache that is filled with real data in the layout of the hub, and no network."""
    if not REAL:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    shutil.copytree(Path(REAL) / "hf", base_dir / "hub")
    conversations = cache_folder("local/chat-sft-mix", "default", "train")
    shutil.copytree(conversations, cache_folder(SmolTalk.name, "default", "train"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return base_dir


def test_real_questions_have_the_documented_numbers_and_are_judged_right(real_cache, capsys):
    tasks = [
        *(ARC(subset, split) for subset in ROWS for split in ROWS[subset]),
        *(MMLU(split) for split in ("dev", "validation", "test")),
        *(GSM8K(split) for split in ("train", "test")),
    ]
    assert "documented" not in capsys.readouterr().err
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    choices = Counter()
    for task in tasks:
        for i in range(len(task)):
            conversation = task[i]
            gold = answer(conversation)
            assert task.evaluate(conversation, gold)
            wrong = [letter for letter in conversation.get("letters", ()) if letter != gold]
            if not wrong:
                result = result_of(gold[-1]["text"])
                wrong = [f"#### {result}1", f"#### 1{result}", f"#### {result}.5", result]
            for text in wrong:
                assert not task.evaluate(conversation, [{"type": "text", "text": text}])
            choices[len(conversation.get("letters", ""))] += 1
            assert came_back(tokenizer, conversation)
    # all 32,437 rows
    assert choices == {0: 8792, 3: 22, 4: 23_608, 5: 15}


def came_back(tokenizer, conversation):
    """Whether the tokens of the last question and its answer say what the conversation says."""
    ids, _ = tokenizer.render_conversation(conversation)
    begin = len(ids) - ids[::-1].index(tokenizer.encode_special("<|user_start|>"))
    end = len(ids) - 1 - ids[::-1].index(tokenizer.encode_special("<|user_end|>"))
    question = tokenizer.decode(ids[begin:end])
    if question != conversation["messages"][-2]["content"]:
        return False
    parts = tokenizer.parse_completion(ids[end + 2:])
    gold = answer(conversation)
    return parts == ([{"type": "text", "text": gold}] if isinstance(gold, str) else gold)


def test_real_calculator_calls_all_evaluate_to_what_the_solutions_say(real_cache):
    calls = 0
    others = []
    for split in ("train", "test"):
        for i in range(len(task := GSM8K(split))):
            solution = task.rows[i]["answer"]
            replies = [part["text"] for part in answer(task[i]) if part["type"] == "python_output"]
            said = CALL.findall(solution)
            assert replies == [use_tool(call) for call, _ in said]
            calls += len(said)
            for (call, wanted), reply in zip(said, replies):
                is_number = wanted.replace(",", "").replace(".", "").lstrip("-").isdecimal()
                if not is_number or float(wanted.replace(",", "")) != float(reply):
                    others.append((call, wanted, reply))
            assert "<<" not in answer_text(answer(task[i]))
    assert calls == 27_998 and others == [("3/4", "3/4", "0.75")]


def test_real_conversations_all_teach_something(real_cache):
    task = SmolTalk("train")
    assert len(task) == 20_178
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    roles = Counter()
    for i in range(0, len(task), 3):
        conversation = task[i]
        assert sum(tokenizer.render_conversation(conversation)[1]) > 1
        assert came_back(tokenizer, conversation)
        roles.update(message["role"] for message in conversation["messages"])
    assert roles["user"] == roles["assistant"] > 20_000 and roles["system"] > 50


def test_a_part_of_mmlu_has_questions_of_all_subjects(real_cache):
    places = at_equal_distances(len(MMLU("test")), 256)
    [path] = hub.fetch_split(MMLU.name, MMLU.config, "test")
    subjects = pq.read_table(path, columns=["subject"])["subject"].to_pylist()
    assert len(places) == 256 and len(set(subjects)) == 57
    assert len({subjects[i] for i in places}) >= 56


# ----------------------------------------------------------------------------------------------
# the page

def test_the_page_has_every_data_set_and_its_documented_rows():
    page = (ROOT / "docs" / "chat-data.md").read_text(encoding="utf-8")
    for task in (SmolTalk, MMLU, GSM8K, ARC):
        assert f"`{task.name}`" in page
    wanted = [
        *(MMLU.documented[split] for split in ("auxiliary_train", "dev", "test")),
        *GSM8K.documented.values(),
        *(rows[split] for rows in ROWS.values() for split in ("train", "test")),
        SmolTalk.documented["train"],
        len(Identity("train")),
    ]
    assert [rows for rows in wanted if f" {rows:,}" not in page] == []
    for setting in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE=1", "python -m tasks.chat_data"):
        assert setting in page


def test_the_decisions_that_the_page_shows_are_those_of_eight_ranks():
    page = (ROOT / "docs" / "chat-data.md").read_text(encoding="utf-8")
    names = "device_batch_size", "total_batch_size", "minutes", "num_iterations"
    meta = {"total_batch_size": 524_288}
    plan = make_chat_plan(dict.fromkeys(names), "cuda", 2048, 8, meta, lambda: 4_010_000)
    assert "\n".join(plan.describe(2048, 8)) in page
