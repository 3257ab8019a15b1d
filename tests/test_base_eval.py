"""scripts.base_eval as its user runs it: the table, the number, and the one line of bad input."""
import csv
import json

import pytest

from core_cases import write_bundle
from nanochat import report
from stage_runs import last_json

COLUMNS = ["task", "rows", "accuracy", "low", "high", "baseline", "centred", "control"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


def table_of(stages, name):
    path = stages.base / "base_eval" / name
    return list(csv.DictReader(path.read_text(encoding="utf-8").split("\n")))


def measure(stages, bundle, *words, **options):
    return stages.fork("scripts.base_eval", f"--bundle={bundle}", "--model_tag=d1", *words,
                       **options)


@pytest.fixture(scope="module")
def measured(stages, trained, bundle):
    """(output, record) of a complete run."""
    out, _ = measure(stages, bundle)
    return out, last_json(out)


def test_every_task_gets_a_line_and_their_mean_is_the_number(stages, measured):
    out, record = measured
    assert record["stage"] == "base_eval" and not record["limited"]
    tasks = record["tasks"]
    assert list(tasks) == ["choices", "schemas", "continuations"]
    for task in tasks.values():
        assert task["rows"] == 8
        centred = (task["accuracy"] - task["baseline"]) / (1 - task["baseline"])
        assert task["centred"] == pytest.approx(centred)
        assert task["interval"][0] <= task["accuracy"] <= task["interval"][1]
    mean = sum(task["centred"] for task in tasks.values()) / 3
    assert record["core"] == pytest.approx(mean)
    assert [name for name in tasks if tasks[name]["control"] is not None] == ["choices"]
    assert "measuring base d1, step 10" in out and f"CORE: {mean:.4f}, of base d1" in out

    rows = table_of(stages, "base_d1_step10.csv")
    assert list(rows[0]) == COLUMNS
    assert [row["task"] for row in rows] == [*tasks, "CORE"]
    assert float(rows[0]["accuracy"]) == pytest.approx(tasks["choices"]["accuracy"], abs=1e-6)
    lines = (stages.base / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert record in [json.loads(line) for line in lines if line]


def test_a_run_of_some_rows_leaves_the_table_of_a_complete_run_alone(stages, measured, bundle):
    before = table_of(stages, "base_d1_step10.csv")
    out, _ = measure(stages, bundle, "--max-per-task=3", "--tasks=choices,schemas", "--control=0")
    record = last_json(out)
    assert record["limited"] and record["core"] is None
    assert {task["rows"] for task in record["tasks"].values()} == {3}
    assert record["tasks"]["choices"]["control"] is None
    assert "which is not CORE" in out
    assert table_of(stages, "base_d1_step10.csv") == before
    assert len(table_of(stages, "base_d1_step10-limited.csv")) == 3


def test_two_ranks_share_the_rows_and_find_the_same(stages, measured, bundle):
    out, _ = measure(stages, bundle, "--dtype=float32", ranks=2)
    both, alone = last_json(out)["tasks"], measured[1]["tasks"]
    for name, task in both.items():
        assert task["accuracy"] == pytest.approx(alone[name]["accuracy"]), name
        assert task["control"] == pytest.approx(alone[name]["control"]), name


def test_without_a_bundle_one_line_says_so_and_optional_ends_well(stages, trained, monkeypatch):
    monkeypatch.setitem(stages.environment, "HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in stages.refusal("scripts.base_eval")
    out, _ = stages.fork("scripts.base_eval", "--optional=1")
    assert out.split("\n")[0].startswith("CORE is left aside: no CORE bundle in ")
    assert "--bundle" in last_json(out)["skipped"]


def test_the_report_has_a_table_of_it(measured):
    _, record = measured
    run = report.Run({"base_eval": record}, {}, 1.0, {})
    heading, table, text = report.core_blocks(run)
    assert heading == ("heading", "CORE")
    tasks = record["tasks"]
    assert {row[0] for row in table[2]} == set(tasks)
    centred = [float(row[4]) for row in table[2]]
    assert centred == sorted(centred, reverse=True)
    assert f"CORE of {record['model']}: {record['core']:.4f}" in text[1]
    other = {**record, "settings": {"hf_path": "models/gpt2"}}
    said = list(report.core_blocks(report.Run({"base_eval": other}, {}, 1.0, {})))[2][1]
    assert "CORE of models/gpt2" in said
    limited = report.Run({"base_eval": {**record, "limited": True}}, {}, 1.0, {})
    assert "is not CORE" in list(report.core_blocks(limited))[2][1]
    skipped = report.Run({"base_eval": {"skipped": "no network"}}, {}, 1.0, {})
    assert list(report.core_blocks(skipped)) == []


@pytest.mark.parametrize("words, said", [
    (["--max-per-task=0"], "max_per_task=0"),
    (["--tasks=hellaswag"], "task hellaswag is not in"),
    (["--hf-path=nowhere"], "no folder with a config.json"),
    (["--model_tag=none"], "none"),
])
def test_bad_input_is_one_line(stages, trained, bundle, words, said):
    assert said in stages.refusal("scripts.base_eval", f"--bundle={bundle}", *words)
