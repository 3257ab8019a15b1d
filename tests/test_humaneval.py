"""HumanEval: which program an answer gives, and that the tests decide about it in the sandbox.

docs/traps.md: sandbox-by-name. With NANOCHAT_TEST_DATA the 164 real problems are judged, too.
"""
import os
import shutil
import textwrap
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError, warn_once
from nanochat.confinement import missing_layers
from nanochat.hub import cache_folder
from nanochat.sandbox import check, run_many
from tasks import humaneval
from tasks.common import Task
from tasks.humaneval import HumanEval, program_of

REAL = os.environ.get("NANOCHAT_TEST_DATA")
MISSING = missing_layers()
confined = pytest.mark.skipif(bool(MISSING), reason=f"this system lacks layers: {MISSING}")
with_real_data = pytest.mark.skipif(not REAL, reason="NANOCHAT_TEST_DATA is not set")
FULL_NAME = ("openai/openai_humaneval", "openai_humaneval", "test")

PROMPT = '''import math
from typing import List


def half(x: float) -> float:
    return x / 2


def spread(numbers: List[float]) -> float:
    """ Half of the distance between the largest and the smallest number, rounded up.
    >>> spread([1.0, 4.0])
    2
    """
'''
SOLUTION = "    difference = max(numbers) - min(numbers)\n    return math.ceil(half(difference))\n"
TESTS = '''

METADATA = {}


def check(candidate):
    assert candidate([1.0, 4.0]) == 2
    assert candidate([-3.0, 3.0, 0.0]) == spread([5.0, -1.0]) == 3
    assert half(candidate([7.0])) == 0
'''
ROW = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "canonical_solution": SOLUTION,
    "test": TESTS,
    "entry_point": "spread",
}


def put(rows):
    """Write rows where the cache has the problems."""
    folder = cache_folder(*FULL_NAME)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet")


@pytest.fixture
def offline(base_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    warn_once.cache_clear()


@pytest.fixture
def task(offline):
    put([ROW])
    return HumanEval()


@pytest.fixture(scope="module")
def real_rows():
    path = Path(REAL) / "hf" / "/".join(FULL_NAME) / "0000.parquet"
    return pq.read_table(path).to_pylist()


# ------------------------------------------------------------------------------------------------
# from an answer to a program

WHOLE = PROMPT + SOLUTION
BODY = textwrap.dedent(SOLUTION)
RIGHT = {
    "the body": SOLUTION,
    "the body without its first blanks": SOLUTION.lstrip(),
    "the body at the left margin": BODY,
    "the body in a block": f"```python\n{SOLUTION}```",
    "the body at the left margin in a block": f"Sure:\n```\n{BODY}```\nDone.",
    "all of it": WHOLE,
    "all of it in a block": f"```python\n{WHOLE}```",
    "a block with words around it": f"Here it is.\n\n```python\n{WHOLE}```\n\nIt **works**.",
    "a block that does not end": f"```python\n{WHOLE}",
    "an indented block": f"1. So:\n   ```python\n{WHOLE}   ```",
    "the function without the imports": "def spread(numbers):\n" + SOLUTION,
    "words before and behind the function": f"Yes:\ndef spread(numbers):\n{SOLUTION}\nThat is it!",
    "a second block": f"```\npip install x\n```\nthen\n```python\n{WHOLE}```",
    "a helper of its own": "```python\ndef width(n): return max(n) - min(n)\n\n"
                           "def spread(numbers):\n    return math.ceil(width(numbers) / 2)\n```",
    "another function behind the body": SOLUTION + "\n\ndef other(x):\n    '''Not finished",
    "a test behind the body": SOLUTION + "\nassert spread([1, 4]) == 2\n",
    "a main part": WHOLE + "\nif __name__ == '__main__':\n    raise SystemExit(input())\n",
}
WRONG = {
    "nothing": "",
    "blanks": " \n\n ",
    "words": "I cannot do that.",
    "the prompt alone": PROMPT,
    "a body that is only a text": '    """Nothing."""',
    "pass": "    pass",
    "no value": "    return None",
    "another value": "    return 1",
    "an exit": "    import os\n    os._exit(0)",
    "an exit at the left margin": "import os\nos._exit(0)\n",
    "a syntax error": "    return (((",
    "another name": "```python\ndef spread2(numbers):\n    return 2\n```",
    "an assertion without end": "    while True: pass",
    "a null byte": "    return 2\0",
    "deep nesting": "    return " + "-" * 20000 + "1",
    "too long": "    x = 1\n" * 6000 + SOLUTION,
}


@confined
@pytest.mark.parametrize("form", RIGHT)
def test_an_answer_in_this_form_passes(task, form):
    assert task.evaluate(task[0], [{"type": "text", "text": RIGHT[form]}]) is True


@confined
def test_a_wrong_answer_fails(task, monkeypatch):
    monkeypatch.setattr(humaneval, "CPU_SECONDS", 1)
    judged = task.evaluate_many([(task[0], answer) for answer in WRONG.values()])
    assert [form for form, passed in zip(WRONG, judged) if passed] == []


@pytest.mark.parametrize("form", ["nothing", "words", "the prompt alone", "a syntax error",
                                  "a body that is only a text", "too long"])
def test_where_there_is_no_program_none_is_run(form):
    assert program_of(PROMPT, "spread", WRONG[form]) is None


def test_the_program_begins_with_the_prompt():
    program = program_of(PROMPT, "spread", SOLUTION)
    assert program == (PROMPT + SOLUTION).rstrip()


# ------------------------------------------------------------------------------------------------
# the task


@confined
def test_the_answers_of_a_batch_come_back_in_their_order(task):
    answers = [SOLUTION, "no", "    return 0", f"```python\n{WHOLE}```", ""]
    judged = task.evaluate_many([(task[0], answer) for answer in answers])
    assert judged == [True, False, False, True, False]
    assert task.evaluate_many([]) == []


def test_a_conversation_is_the_prompt_and_its_solution(task):
    conversation = task[0]
    question, answer = conversation["messages"]
    assert question == {"role": "user", "content": PROMPT}
    assert answer == {"role": "assistant", "content": f"```python\n{WHOLE}```"}
    assert conversation["answer_tokens"] == 512


@confined
def test_the_solution_of_a_conversation_passes(task):
    assert task.evaluate(task[0], task[0]["messages"][-1]["content"])


def test_another_number_of_problems_is_said(offline, capsys):
    put([ROW] * 3)
    assert len(HumanEval()) == 3
    assert "has 3 rows where 164 are documented" in capsys.readouterr().err


def test_a_missing_column_is_one_line(offline):
    put([{"prompt": PROMPT, "test": TESTS}])
    with pytest.raises(UserError, match="canonical_solution"):
        HumanEval()


def test_there_is_one_split(offline):
    with pytest.raises(UserError, match="split is test, not 'train'"):
        HumanEval("train")


def test_a_missing_layer_is_refused_whatever_the_answers_are(task, monkeypatch):
    from nanochat import sandbox
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"seccomp": "seccomp: not there"})
    with pytest.raises(UserError, match="--allow_missing=seccomp"):
        task.evaluate(task[0], "no program")
    task.allow_missing = ("seccomp",)
    assert task.evaluate(task[0], "no program") is False


def test_any_task_judges_a_batch():
    class Letters(Task):
        """Answers that are the last message."""

        def evaluate(self, conversation, parts):
            return conversation["messages"][-1]["content"] == parts

    pairs = [({"messages": [{"content": "a"}]}, letter) for letter in "ab"]
    assert Letters().evaluate_many(pairs) == [True, False]


# ------------------------------------------------------------------------------------------------
# the real problems


def judge(rows, body_of, workers=None):
    """Whether the prompt with the body of each row passes its tests."""
    jobs = [
        partial(check, row["prompt"] + body_of(row), row["test"], row["entry_point"], row["prompt"])
        for row in rows
    ]
    verdicts = run_many(jobs, workers)
    return {row["task_id"]: verdict for row, verdict in zip(rows, verdicts)}


@confined
@with_real_data
def test_the_164_reference_solutions_pass(real_rows):
    verdicts = judge(real_rows, lambda row: row["canonical_solution"])
    assert len(verdicts) == 164
    assert {name: v.reason for name, v in verdicts.items() if not v.passed} == {}


@confined
@with_real_data
def test_no_real_problem_is_solved_by_none_or_by_an_exit(real_rows):
    verdicts = judge(real_rows, lambda row: "    return None\n")
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    verdicts = judge(real_rows[::10], lambda row: "    import os; os._exit(0)\n")
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []


@confined
@with_real_data
@pytest.mark.parametrize("workers", [1, 8, 32])
def test_the_number_of_workers_changes_no_verdict(real_rows, workers):
    rows = real_rows[::10]
    verdicts = judge(rows, lambda row: row["canonical_solution"], workers)
    assert all(verdict.passed for verdict in verdicts.values())


@confined
@with_real_data
def test_real_answers_in_every_form_give_the_program(real_rows, offline):
    folder = cache_folder(*FULL_NAME)
    shutil.copytree(Path(REAL) / "hf" / "/".join(FULL_NAME), folder)
    task = HumanEval()
    forms = [
        lambda row: row["canonical_solution"],
        lambda row: row["canonical_solution"].strip(),
        lambda row: textwrap.dedent(row["canonical_solution"]),
        lambda row: f"Yes:\n```python\n{row['canonical_solution']}```\n",
        lambda row: f"Yes:\n{row['prompt']}{row['canonical_solution']}\nThat's all, folks.",
    ]
    lost = [
        (i, row["task_id"])
        for i, form in enumerate(forms)
        for row in real_rows
        if program_of(row["prompt"], row["entry_point"], form(row)) is None
    ]
    assert lost == []
    assert all(task.evaluate_many([(c, c["messages"][-1]["content"]) for c in list(task)[::10]]))
