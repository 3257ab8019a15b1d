"""What a run does with little text: it says so, ends in time, and keeps its best step."""
import random

import pytest

from nanochat.checkpoint_manager import better_step, complete_steps
from stage_runs import TINY, TINY_CHAT, last_json, meta_of, rows_of


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A file of random words, of which nothing can be learnt but by heart."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghi", k=rng.randint(2, 7))) for _ in range(3000)]
    lines = [" ".join(words[i:i + 12]) for i in range(0, len(words), 12)]
    path = tmp_path_factory.mktemp("noise") / "noise.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def overfitted(stages, noise):
    """(standard output, folder) of a run whose steps are far too many for its text."""
    out, _ = stages.fork(
        "scripts.base_train", f"--data={noise}", "--model_tag=noise", *TINY,
        "--num_iterations=1000")
    return out, stages.folder("base", "noise")


def test_a_run_that_learns_its_text_by_heart_ends_and_its_best_step_is_the_model(overfitted):
    out, folder = overfitted
    record = last_json(out)
    assert "ending here: " in out and record["steps"] < 1000
    assert record["best_step"] < record["steps"]
    assert record["best_step"] in complete_steps(folder)
    of_validations = [row["val_bpb"] for row in rows_of(folder, "val_bpb")][:-2]
    best = min(of_validations)
    assert meta_of(folder, record["best_step"])["val_bpb"] == best
    last = meta_of(folder, record["steps"])
    assert last["finished"] and last["val_bpb"] > best
    assert last["bpbs"] == of_validations, "a resumed run knows what came before"


def test_the_record_counts_bytes_of_text_and_epochs_apart(overfitted, noise):
    record = last_json(overfitted[0])
    assert 0.9 * noise.stat().st_size < record["text_bytes"] <= noise.stat().st_size
    assert record["epochs"] == pytest.approx(record["tokens"] / tokens_said(overfitted[0]))


def test_the_curve_of_a_run_has_its_end_its_flops_and_a_protocol(overfitted):
    out, folder = overfitted
    record = last_json(out)
    [*_, last_of_few, of_all] = rows_of(folder, "val_bpb")
    assert last_of_few["step"] == of_all["step"] == record["steps"]
    assert last_of_few["documents"] <= of_all["documents"]
    assert record["protocol"].startswith(f"bpb1-{of_all['documents']}-")
    per_token = [row["flops_per_token"] for row in rows_of(folder, "loss")]
    assert record["flops_per_second"] / record["tokens_per_second"] == pytest.approx(per_token[-1])


def tokens_said(out):
    """The tokens of the text, of the plan's line."""
    line = next(line for line in out.split("\n") if line.startswith("8) text: "))
    return int(line.split(" tokens")[0].split(" ")[-1].replace(",", ""))


def test_the_chat_stages_start_from_the_best_step(stages, overfitted):
    best = last_json(overfitted[0])["best_step"]
    out, _ = stages.fork(
        "scripts.mid_train", "--model_tag=noise", *TINY_CHAT, "--num_iterations=1")
    assert f"starting from step {best} of noise, the best by validation" in out
    folder = stages.folder("mid", "noise")
    assert meta_of(folder, 1)["origin"][1] == best


@pytest.mark.parametrize("bpbs, last, expected", [
    ({}, 2.0, None),
    ({10: None, 20: None}, 2.0, None),             # never validated
    ({10: 2.5, 20: 2.1, 30: 2.3}, 2.2, 20),
    ({10: 2.5, 20: 2.1, 30: None}, 2.1, None),     # no worse than the best
    ({10: float("nan"), 20: 2.1}, 2.2, 20),
])
def test_the_best_step_is_one_that_was_validated_and_is_better_than_the_last(bpbs, last, expected):
    metas = [{"step": step, "val_bpb": bpb} for step, bpb in bpbs.items()]
    assert better_step(metas, last) == expected


def test_the_best_step_of_an_earlier_run_in_the_folder_does_not_count():
    metas = [{"step": step, "val_bpb": bpb} for step, bpb in ((50, 1.0), (20, 2.0), (40, 2.5))]
    assert better_step(metas, 2.5) == 20


def test_little_text_is_said_before_the_first_step(overfitted):
    out = overfitted[0]
    assert "warning: " in out[:out.index("step     1 ")]
