"""scripts.base_loss and the domains of scripts.base_train, as their users run them."""
import json
import random
import re
import types

import pytest

from nanochat import report
from nanochat.checkpoint import complete_steps
from nanochat.common import UserError
from nanochat.start import comparison_to_resume
from stage_runs import TINY, last_json, meta_of, rows_of

MEASURE = ("scripts.base_loss", "--model_tag=d1", "--documents=3")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder with a file for each of two domains: one like the training text, one of noise."""
    folder = tmp_path_factory.mktemp("held_out")
    texts = ["The old fox finds the river number 7.", "The quick cat sees the house number 9."]
    noise = random.Random(1)
    others = ["".join(noise.choices("QXZJKWVU#%", k=80)) for _ in range(3)]
    for name, documents in (("c4_validation", texts), ("noise", others)):
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_every_domain_gets_a_line_and_the_shares_go_to_what_is_above_step_0(
        stages, trained, text, held_out):
    out, _ = stages.fork(
        *MEASURE, f"--data={text}", f"--domains=val,{held_out}", "--reference=d1")
    record = last_json(out)
    rows = record["domains"]
    assert list(rows) == ["val", "c4", "noise"] and record["base"] == "c4"
    assert record["val_bpb"] == rows["val"]["bits_per_byte"] and record["documents"] == 1
    assert [row["documents"] for row in rows.values()] == [1, 2, 3]
    assert rows["noise"]["bytes"] == 240 and rows["noise"]["tokens"] == 240
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["bits_per_byte"] / rows["c4"]["bits_per_byte"])
        assert row["reference"]["ratio"] == row["ratio"], "the reference is the model itself"
        assert row["step_0"]["bits_per_byte"] > row["bits_per_byte"]
    assert record["shares"] is None and "no mix is recommended" in out
    assert re.findall(r"^ +(\w+) +[123] +[\d,]+ +\d\.\d{4}", out, re.M) == ["val", "c4", "noise"]

    without = stages.fork_record(*MEASURE, f"--domains={held_out}")
    assert without["val_bpb"] is None and "reference" not in without["domains"]["noise"]
    assert without["shares"] == {"c4": 0.0, "noise": 1.0}, "noise stays as hard as it was"

    shown = report.domain_blocks(types.SimpleNamespace(stages={"base_loss": without}))
    kinds = [block[0] for block in shown]
    assert kinds == ["heading", "table", "text"]


def test_one_text_is_measured_as_before(stages, trained, text):
    out, _ = stages.fork(*MEASURE, f"--data={text}")
    record = last_json(out)
    assert list(record["domains"]) == ["val"] and "step_0" not in record["domains"]["val"]
    assert record["val_bpb"] > 0 and "bits per byte" in out and "ratio:" not in out


def test_check_passes_for_a_trained_model_with_counts_and_without(stages, trained, text):
    record = stages.fork_record(*MEASURE, f"--data={text}", "--check")
    assert all(finding["passed"] for finding in record["check"].values())
    assert len(record["check"]) == 14 and record["val_bpb"] > 0


def test_check_ends_with_status_1_for_a_model_that_looks_ahead(stages, trained, text):
    out, _ = stages.fork(
        *MEASURE, f"--data={text}", "--check", faults={"attention": "peek"}, status=1)
    record = last_json(out)
    assert "cannot be trusted: causality" in out and "val_bpb" not in record
    assert not record["check"]["causality without"]["passed"]


@pytest.mark.parametrize("words, needle", [
    (("--domains=c5",), "c5 is no domain"),
    (("--split=test",), "split is train or val"),
    (("--domains=x=/nowhere",), "does not exist"),
    (("--hf-path=/nowhere", "--data={text}"), "no folder with a config.json"),
])
def test_bad_input_is_one_line(stages, trained, text, words, needle):
    words = [word.format(text=text) for word in words]
    assert needle in stages.refusal(*MEASURE, *words)


def test_a_reference_that_is_not_there_is_refused_before_the_model_is_loaded(stages, trained, text):
    out, err = stages.fork(*MEASURE, f"--data={text}", "--reference=d99", status=2)
    assert "d99" in err and "base d1" not in out


# ------------------------------------------------------------------------------------------------
# the best step of a run

def test_the_best_step_is_the_one_that_a_domain_says_and_a_resumed_run_keeps_it(
        stages, text, held_out):
    """Noise that no step predicts better than the first: its figure only rises."""
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=12",
               "--eval_every=2", "--save_every=2", "--keep=1", f"--domains={held_out}")
    stages.fork(*command, "--best_by=noise", "--model_tag=noise",
                faults={"9": "interrupt"}, status=130)
    folder = stages.folder("base", "noise")
    first = meta_of(folder, 2)
    figures = {row["step"]: row["bpb_noise"] for row in rows_of(folder, "bpb_noise")}
    best = min(figures, key=figures.get)
    assert best == 2, figures
    assert first["val_bpb"] == first["domain_bpbs"]["noise"] == figures[2]
    assert first["best_by"] == "noise" and first["domain_bpbs"].keys() == {"val", "c4", "noise"}

    # a resumed run compares as it did, whatever is left out of its command, and keeps the best
    short = command[:-1]
    record = stages.fork_record(*short, "--model_tag=noise", "--resume")
    assert complete_steps(folder)[0] == 2 and record["best_step"] == 2
    assert record["best_by"] == "noise" and record["settings"]["best_by"] == "noise"
    assert meta_of(folder, 12)["best_by"] == "noise"
    again = stages.fork_record(
        *MEASURE[:1], "--model_tag=noise", f"--domains={held_out}", "--documents=30")
    assert again["checkpoint"].endswith("noise")
    assert again["domains"]["noise"]["bits_per_byte"] == pytest.approx(figures[2], abs=1e-3)

    # by its own text, the last step of the same run is the best
    by_val = stages.fork_record(*command, "--model_tag=val")
    assert by_val["best_step"] == 12 and by_val["domain_bpbs"].keys() == {"val", "c4", "noise"}


def test_a_resumed_run_is_not_compared_by_something_else():
    meta = {"settings": {"domains": "c4", "best_by": "mean"}}
    nothing = {"domains": None, "best_by": None}
    assert comparison_to_resume(nothing, meta) == ("c4", "mean")
    assert comparison_to_resume(nothing, {}) == (None, None)
    assert comparison_to_resume({**nothing, "best_by": "val"}, {}) == (None, None)
    for other in ({"best_by": "c4"}, {"domains": "c4,gsm8k"}):
        with pytest.raises(UserError, match="leave --"):
            comparison_to_resume({**nothing, **other}, meta)
