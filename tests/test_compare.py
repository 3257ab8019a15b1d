"""Runs compared, and the card of a run: from logs and records made here."""
import json
import math

import pytest

from conftest import last_json
from nanochat import card, compare
from nanochat.common import UserError
from nanochat.loss_eval import protocol_id

MACHINE = {"cpu": "A Test CPU", "cores": 2, "isa": "AVX2", "gpus": []}


def make_run(base, tag, bits, seconds_per_step=1.0, flops=1e6, documents=300, **fields):
    """A base model's folder with a log of ten steps for each validation in `bits`, and its
    record."""
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True)
    rows = []
    for i, value in enumerate(bits):
        for step in range(10 * i + 1, 10 * i + 11):
            row = {
                "step": step,
                "tokens": 100 * step,
                "seconds": step * seconds_per_step,
                "loss": 3.0,
                "lr": 0.01,
                "flops_per_token": flops,
            }
            rows.append(row)
        last = {key: rows[-1][key] for key in ("step", "tokens", "seconds")}
        rows.append({**last, "val_bpb": value, "documents": documents})
    rows.append({**last, "val_bpb": 0.5, "documents": 10 * documents})  # of more text
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    record = {
        "stage": "base_train",
        "seconds": 99.0,
        "machine": MACHINE,
        "checkpoint": str(folder),
        **fields,
    }
    with open(base / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return folder


# bits per byte fall as 1 / cost: 4, 2, 1 after 10, 20, 40 steps; each variant's multiplier follows
LAW = [4.0, 2.0, 4 / 3, 1.0]


def compared(*names):
    return compare.compare_sides(compare.read_sides(names))


def test_a_variant_at_the_baselines_own_law_has_a_multiplier_of_one(base_dir):
    make_run(base_dir, "a", LAW)
    make_run(base_dir, "b", [4.0, 1.6])     # after 20 steps, where the law has 2: 25 steps of a
    _, row = compared("a", "b")
    assert row["multiplier_seconds"]["mean"] == pytest.approx(25 / 20, abs=1e-3)
    assert row["multiplier_flops"]["mean"] == pytest.approx(25 / 20, abs=1e-3)
    assert compared("a", "a")[1]["multiplier_flops"]["mean"] == pytest.approx(1)


def test_seconds_and_flops_are_two_multipliers(base_dir):
    make_run(base_dir, "a", LAW)
    make_run(base_dir, "b", [4.0, 2.0], seconds_per_step=2.0, flops=5e5)
    _, row = compared("a", "b")
    assert row["multiplier_seconds"]["mean"] == pytest.approx(0.5)
    assert row["multiplier_flops"]["mean"] == pytest.approx(2)
    assert row["seconds"] == [40] and row["flops"] == [2000 * 5e5]


@pytest.mark.parametrize("bits", [[0.9], [5.0]])
def test_where_the_baseline_never_was_the_multiplier_is_unknown(base_dir, bits):
    make_run(base_dir, "a", LAW)
    make_run(base_dir, "b", bits)
    _, row = compared("a", "b")
    assert row["multiplier_seconds"] == row["multiplier_flops"] == {
        "mean": None, "lowest": None, "highest": None, "each": [None]}
    assert compare.multiplier_words(row["multiplier_flops"]) == "?"


def test_the_cost_is_read_off_between_validations_in_log_log():
    points = [compare.Point(cost, None, bits) for cost, bits in ((10, 4.0), (1000, 1.0), (2000, 1))]
    assert compare.cost_to_reach(points, "seconds", 2.0) == pytest.approx(100)
    assert compare.cost_to_reach(points, "seconds", 4.0) == 10
    assert compare.cost_to_reach(points, "seconds", 1.0) == 1000, "the first time it was there"
    assert compare.cost_to_reach(points, "flops", 2.0) is None


def test_pairs_have_a_geometric_mean_and_a_range(base_dir):
    make_run(base_dir, "a1", LAW)
    make_run(base_dir, "a2", LAW)
    make_run(base_dir, "b1", [4.0, 1.0])                    # twice as cheap
    make_run(base_dir, "b2", [4.0, 1.0], flops=4e6)         # twice as dear in FLOPs
    first, second = compared("a1,a2", "b1,b2")
    assert second["multiplier_flops"] == {
        "mean": pytest.approx(1), "lowest": 0.5, "highest": 2, "each": [2, 0.5]}
    assert second["multiplier_seconds"]["each"] == [2, 2]
    assert "multiplier_flops" not in first
    found = second["multiplier_flops"]
    assert compare.multiplier_words(found) == "1.00 (0.50 to 2.00)"
    make_run(base_dir, "b3", [0.9])
    assert compared("a1,a2", "b1,b3")[1]["multiplier_flops"]["mean"] is None, "not of the easy ones"


def test_flops_count_the_length_of_each_stage_of_a_curriculum():
    log = [
        {"step": 1, "tokens": 100, "loss": 3, "flops_per_token": 2.0},
        {"step": 2, "tokens": 200, "loss": 3, "flops_per_token": 5.0},
        {"step": 2, "val_bpb": 1.0},
    ]
    assert [flops for _, flops in compare.with_flops(log)] == [200, 700, 700]
    del log[0]["flops_per_token"]   # of an earlier version
    assert [flops for _, flops in compare.with_flops(log)] == [None] * 3


def test_seconds_of_different_machines_do_not_compare_but_flops_do(base_dir):
    make_run(base_dir, "a", LAW)
    make_run(base_dir, "b", [4.0, 1.0], machine={**MACHINE, "cpu": "Another CPU"})
    sides = compare.read_sides(["a", "b"])
    rows = compare.compare_sides(sides)
    assert rows[1]["multiplier_seconds"]["mean"] is None
    assert rows[1]["multiplier_flops"]["mean"] == pytest.approx(2)
    texts = [block[1] for block in compare.comparison_blocks(sides, rows, False)]
    assert any("different machines" in text for text in texts)


@pytest.mark.parametrize("names, needle", [
    ([], "two runs or more"),
    (["a"], "two runs or more"),
    (["a", "nowhere"], "no run 'nowhere'"),
    (["a,a", "a"], "2, 1 runs"),
    (["a", "other"], "300 documents and 'other' on 30"),
    (["a", "text"], "different text"),
    (["a", "unvalidated"], "no validation"),
    (["a", "diffusion"], "a bound on them"),
])
def test_what_cannot_be_compared_is_refused(base_dir, names, needle):
    make_run(base_dir, "a", LAW, protocol="bpb1-300-aaaaaaaa")
    make_run(base_dir, "other", LAW, documents=30)
    make_run(base_dir, "text", LAW, protocol="bpb1-300-bbbbbbbb")
    log = make_run(base_dir, "diffusion", LAW) / "log.jsonl"
    text = log.read_text(encoding="utf-8").replace("val_bpb", "val_bpb_bound")
    log.write_text(text, encoding="utf-8")
    folder = make_run(base_dir, "unvalidated", [1.0])
    (folder / "log.jsonl").write_text('{"step": 1, "tokens": 9, "seconds": 1, "loss": 3}\n')
    with pytest.raises(UserError, match=needle):
        compare.read_sides(names)


def test_the_command_writes_pages_and_one_json_line(base_dir, run_module):
    make_run(base_dir, "a", LAW)
    folder = make_run(base_dir, "b", [4.0, 1.0])
    done = run_module("nanochat.report", "--compare", "a", str(folder), base=base_dir)
    assert done.returncode == 0, done.stderr
    row = last_json(done.stdout)
    assert row["stage"] == "compare" and row["sides"][1]["multiplier_flops"]["mean"] == 2
    assert "| 2.00 | 2.00 |" in done.stdout
    assert (base_dir / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = (base_dir / "compare.html").read_text(encoding="utf-8")
    assert "data:image/png" in page and "http" not in page
    from nanochat.records import last_run, read_jsonl
    assert "compare" not in last_run(read_jsonl(base_dir / "metrics.jsonl"))


@pytest.mark.parametrize("words, needle", [
    (["a"], "'a' is no setting"),
    (["--compare", "--card"], "two commands"),
    (["--serve", "--card"], "two commands"),
    (["--serve", "a", "b"], "--serve follows one run, these are 2"),
    (["--serve", "--host=0.0.0.0"], "host=0.0.0.0 lets others"),
    (["--card"], "recorded no protocol"),
])
def test_the_command_refuses_in_one_line(base_dir, monkeypatch, words, needle):
    from nanochat import report
    make_run(base_dir, "a", LAW, val_bpb=1.0, train_seconds=60.0)
    monkeypatch.setattr("sys.argv", ["report", *words])
    for name in ("compare", "card", "serve"):
        monkeypatch.setattr(report, name, False)
    with pytest.raises(UserError, match=needle):
        report.main()


# --------------------------------------------------------------------------------------------------
# the card

RECORD = {
    "machine": MACHINE,
    "device": "cpu",
    "dtype": "float32",
    "val_bpb": 1.05153,
    "train_seconds": 507.3,
    "protocol": "bpb1-300-1a2b3c4d",
    "commit": "0123456789",
}


def test_a_card_is_of_the_run_and_not_of_this_machine_or_commit(base_dir, capsys):
    make_run(base_dir, "a", LAW, **RECORD)
    card.run({})
    out = capsys.readouterr().out
    line = "| 8.46 | 2 cores of A Test CPU (AVX2), float32 | **1.0515** | bpb1-300-1a2b3c4d | " \
        " |  | 0123456789 |"
    assert line in out and line in (base_dir / "card.md").read_text(encoding="utf-8")
    row = last_json(out)
    assert (row["stage"], row["commit"], row["minutes"]) == ("card", "0123456789", 8.46)
    assert row["machine_class"] == "2 cores of A Test CPU (AVX2), float32"


def test_a_card_shows_both_texts_with_counts_and_without(base_dir, capsys):
    unseen = {"val_bpb": 1.2968, "val_bpb_without_counts": 1.6378, "protocol": "bpb1-source-200-c"}
    make_run(base_dir, "a", LAW, **RECORD, val_bpb_without_counts=1.51, unseen=unseen)
    card.run({})
    out = capsys.readouterr().out
    assert "| **1.0515** (1.5100 without counts) | bpb1-300-1a2b3c4d | " in out
    assert "| **1.2968** (1.6378 without counts) | bpb1-source-200-c | 0123456789 |" in out
    row = last_json(out)
    assert (row["unseen_bpb"], row["unseen_protocol"]) == (1.2968, "bpb1-source-200-c")
    header, _, line = (base_dir / "card.md").read_text(encoding="utf-8").strip().split("\n")
    assert header.count("|") == line.count("|")


def test_a_card_of_gpus_counts_those_that_trained():
    gpus = {"machine": {**MACHINE, "gpus": ["NVIDIA H100"] * 8}, "device": "cuda", "ranks": 2}
    assert card.machine_class({**RECORD, **gpus}) == "2 x NVIDIA H100, float32"


def test_a_protocol_names_the_text_and_where_documents_end():
    assert protocol_id(["Hello.", "World."]) == "bpb1-2-743cefd7"
    others = (["Hello.W", "orld."], ["World.", "Hello."], ["Hello."], ["Hello.", "World!"])
    found = {protocol_id(documents) for documents in others}
    assert len(found) == 4 and "bpb1-2-743cefd7" not in found
    assert protocol_id(["Hello.", "World."], "source") == "bpb1-source-2-743cefd7"


def test_no_base_model_means_no_card(base_dir):
    with pytest.raises(UserError, match="no finished run of base_train"):
        card.run({})


def test_the_law_of_these_tests_is_a_line_in_log_log():
    logs = [math.log(bits * 10 * (i + 1)) for i, bits in enumerate(LAW)]
    assert logs == pytest.approx([math.log(40)] * 4)
