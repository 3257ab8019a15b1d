"""Stages that are stopped, killed, resumed and extended, and batches that go wrong (faults.py)."""
import os
import signal
import subprocess

import pytest
import torch

from nanochat.checkpoint_manager import complete_steps
from stage_runs import (
    ROOT,
    TINY,
    TINY_CHAT,
    all_finite,
    damage,
    last_json,
    losses_of,
    meta_of,
    rows_of,
    same_values,
    same_weights,
    weights_of,
)

NAN_FROM_5 = {str(number): "nan" for number in range(5, 999)}
NAN_FROM_8 = {str(number): "nan" for number in range(8, 999)}


@pytest.fixture
def base(stages, text):
    """(tag, settings) -> (words of a tiny base_train, the folder of its checkpoints)."""
    def named(tag, *settings):
        words = ("scripts.base_train", f"--data={text}", *TINY, f"--model_tag={tag}", *settings)
        return words, stages.folder("base", tag)
    return named


@pytest.fixture(params=["base", "mid", "chatsft"])
def stage(request, stages, base):
    """name -> (words that train a tiny model in eight steps, the folder of its checkpoints).

    For each of the three stages; the chat stages all start from the same base model.
    """
    def named(name):
        tag = f"{request.param}-{name}"
        settings = ("--num_iterations=8", "--save_every=2")
        if request.param == "base":
            return base(tag, *settings, "--eval_every=0")
        _copy_base_model(stages, base, tag)
        words = {
            "mid": ("scripts.mid_train", *TINY_CHAT),
            "chatsft": ("scripts.chat_sft", *TINY_CHAT, "--source=base"),
        }[request.param]
        return (*words, *settings, f"--model_tag={tag}"), stages.folder(request.param, tag)
    return named


def _copy_base_model(stages, base, tag):
    """Give a tag the base model from which all chat stages start; the first call trains it."""
    command, folder = base("start", "--num_iterations=1", "--eval_every=0")
    if not folder.exists():
        stages.fork(*command)
    stages.folder("base", tag).symlink_to(folder.name)


# ------------------------------------------------------------------------------------------------
# batches that go wrong

def test_a_batch_of_nan_is_skipped_and_the_run_is_the_one_that_never_had_it(stages, stage):
    # docs/traps.md: nan-guards
    command, folder = stage("nan")
    assert stages.fork_record(*command, faults={"3": "nan"})["steps"] == 8
    skipped = rows_of(folder, "skipped")
    assert len(skipped) == 1 and skipped[0]["step"] == 2 and "nan" in skipped[0]["skipped"]
    command, missing = stage("missing")
    assert stages.fork_record(*command, faults={"3": "missing"})["steps"] == 8
    assert same_weights(weights_of(folder, 8), weights_of(missing, 8))


@pytest.mark.parametrize("parallel", ["zero2", "fsdp"])
def test_nan_on_one_of_two_ranks_is_skipped_by_both(stages, base, parallel):
    # docs/traps.md: nan-guards
    command, folder = base(
        f"ranks-{parallel}", "--num_iterations=40", "--eval_every=0", f"--parallel={parallel}")
    row = stages.fork_record(*command, ranks=2, faults={"3": "nan", "30": "spike"})
    assert row["steps"] == 40
    skipped = [(row["step"], row["verdict"]) for row in rows_of(folder, "skipped")]
    assert skipped == [(2, "skip"), (28, "skip")]
    assert all_finite(weights_of(folder, 40))


def test_a_rank_that_hangs_ends_the_run_and_says_where_it_was(stages, base):
    command, _ = base("hung", "--num_iterations=99", "--eval_every=0", "--hang_minutes=0.05")
    _, err = stages.fork(*command, status=1, faults={"6": "hang"})
    assert "Timeout" in err and "faults.py" in err and "in faulty" in err


@pytest.mark.parametrize("ranks, parallel", [(1, "replicated"), (2, "fsdp")])
def test_diverged_weights_roll_back_to_the_last_good_step_at_half_the_learning_rate(
        stages, base, ranks, parallel):
    command, folder = base(
        f"diverged-{parallel}", "--num_iterations=10", "--eval_every=0", "--save_every=3",
        f"--parallel={parallel}")
    out, _ = stages.fork(*command, faults={"6": "diverge"}, ranks=ranks)
    assert "back to step 4" in out, "the one before LR decay is newer than that of step 3"
    verdicts = [row["verdict"] for row in rows_of(folder, "skipped")]
    assert verdicts == ["skip"] * 4 + ["roll back"]
    meta = meta_of(folder, 10)
    assert meta["finished"] and meta["rate_scale"] == 0.5
    assert all_finite(weights_of(folder, 10))


def test_weights_that_have_diverged_when_somebody_stops_the_run_are_not_saved(stages, base):
    command, folder = base(
        "doubted", "--num_iterations=14", "--eval_every=0", "--save_every=4", "--resume")
    out, _ = stages.fork(*command, status=130, faults={"10": "diverge", "12": "interrupt"})
    assert "not saved, for the last batches were bad" in out
    assert complete_steps(folder)[-1] == 8
    assert stages.fork_record(*command)["steps"] == 14
    assert all_finite(weights_of(folder, 14))


# ------------------------------------------------------------------------------------------------
# runs that do not recover

def test_two_ranks_that_do_not_recover_are_rescued_as_two(stages, base):
    command, folder = base(
        "diverged-ranks", "--num_iterations=8", "--eval_every=0", "--save_every=3")
    stages.fork(*command, ranks=2, status=1, faults=NAN_FROM_5)
    assert complete_steps(folder)[-1] == 4
    row = stages.fork_record("scripts.checkpoints", folder, "--rescue")
    assert row["steps"] == 8 and meta_of(folder, 8)["world_size"] == 2


def test_a_run_that_does_not_recover_stops_and_the_emergency_run_resumes(stages, base, text):
    command, folder = base(
        "unrecovered", "--num_iterations=10", "--eval_every=0", "--save_every=3")
    out, err = stages.fork(*command, status=1, faults=NAN_FROM_8)
    assert "does not recover" in out and f"emergency_training.sh {folder}" in out, out + err
    assert complete_steps(folder)[-1] == 6

    result = subprocess.run(
        ["bash", "emergency_training.sh", str(folder)],
        cwd=ROOT,
        env={**os.environ, **stages.environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "learning_rate=0.01 (was 0.02)" in result.stdout
    assert "grad_clip=1.0 (was 0.0)" in result.stdout
    row = last_json(result.stdout)
    assert row["steps"] == 10 and row["checkpoint"] == str(folder)
    assert row["settings"]["data"] == str(text)


def test_the_emergency_run_passes_over_a_damaged_step(stages, base):
    command, folder = base(
        "damaged", "--num_iterations=9", "--eval_every=0", "--save_every=2")
    stages.fork(*command, status=130, faults={"7": "interrupt"})
    newest = folder / f"model_{complete_steps(folder)[-1]:06d}.pt"
    damage(newest)
    safe = (
        "--grad_clip=1.0",
        "--save_minutes=2.0",
        "--learning_rate=0.01",
        "--resume_from_checkpoint=6",
    )
    out, _ = stages.fork(*command, *safe, status=130, faults={"1": "interrupt"})
    hint = "the same command with --resume in place of --resume_from_checkpoint resumes"
    assert hint in out and complete_steps(folder)[-1] == 7
    damage(newest)
    out, _ = stages.fork("nanochat.checkpoint_manager", folder, "--rescue")  # the older name
    assert "resuming from step 6" in out and "learning_rate=0.01 (was 0.02)" in out


# ------------------------------------------------------------------------------------------------
# stopped, killed, resumed

def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_a_quiet_one(stages, stage):
    # docs/traps.md: resume-forgets
    command, quiet = stage("quiet")
    stages.fork_record(*command)
    command, folder = stage("killed")
    for batch in (6, 4, 2):  # counted from each start
        stages.fork(
            *command, "--resume", status=-signal.SIGKILL, faults={str(batch): "kill"})
        assert complete_steps(folder)
    stages.fork_record(*command, "--resume")
    assert same_weights(weights_of(folder, 8), weights_of(quiet, 8))

    # optimizers, random numbers, the next batch, the guard
    states = []
    for run in (folder, quiet):
        states.append(torch.load(run / "optim_000008_rank0.pt", weights_only=True))
    assert same_values(*states)
    assert states[0].keys() == {"optimizers", "loader", "rng", "guard"}

    # no row is lost and none comes twice; a resumed run does not show samples at once
    assert list(losses_of(folder)) == list(range(1, 9))
    assert len(rows_of(folder, "loss")) == 8
    steps = [row["step"] for row in rows_of(folder, "samples")]
    assert steps == [row["step"] for row in rows_of(quiet, "samples")]
    assert steps == ([8] if "base_train" in command[0] else [2, 4, 6, 8])


def test_what_was_trained_is_saved_before_the_last_validation_which_may_fail(stages, base):
    # docs/traps.md: save-before-evaluation
    command, folder = base("full", "--num_iterations=8", "--eval_every=0", "--save_every=3")
    stages.fork(*command, status=1, faults={"end": "memory"})
    assert complete_steps(folder)[-1] == 8
    whole = weights_of(folder, 8)
    out, _ = stages.fork(*command, "--resume")
    assert last_json(out)["steps"] == 8
    assert "step     8" not in out, "nothing is trained again"
    assert same_weights(weights_of(folder, 8), whole)


def test_a_scheduler_stops_a_run_as_ctrl_c_does_and_twice_at_once(stages, base):
    command, folder = base("scheduled", "--num_iterations=12", "--eval_every=0")
    out, err = stages.fork(*command, status=143, faults={"3": "terminate"})
    assert complete_steps(folder) == [3] and "--resume resumes it" in out
    assert "Traceback" not in err and "leaked" not in err
    out, err = stages.fork(*command, "--resume", status=143, faults={"2": "terminate twice"})
    assert complete_steps(folder) == [3]
    assert "stopped at once" in out and "Traceback" not in err
    out, err = stages.fork(*command, "--resume", status=129, faults={"2": "hangup"})
    assert complete_steps(folder) == [3, 5]
    assert "saved step 5" in out and "Traceback" not in err
    assert stages.fork_record(*command, "--resume")["steps"] == 12


def test_ctrl_c_saves_and_the_same_command_ends_where_an_undisturbed_run_ends(stages, base):
    # docs/traps.md: resume-forgets
    settings = ("--num_iterations=20", "--eval_every=0", "--resume")
    command, quiet = base("whole", *settings)
    whole = stages.fork_record(*command)
    command, folder = base("stopped", *settings)
    out, err = stages.fork(*command, status=130, faults={"7": "interrupt"})
    assert "Traceback" not in err and "--resume" in out and complete_steps(folder) == [7]

    # neither another text nor a budget that is over makes a finished model of it
    refusal = stages.refusal(*command, f"--data={folder}")
    assert "leave --data out" in refusal
    refusal = stages.refusal(*command, "--num_iterations=5")
    assert "num_iterations=5 is over at step 7" in refusal and complete_steps(folder) == [7]
    again = stages.fork_record(*command)
    assert again["steps"] == 20 and abs(again["val_bpb"] - whole["val_bpb"]) < 1e-3
    losses = losses_of(folder)
    assert list(losses) == list(range(1, 21)), "no step is lost, none comes twice"
    assert losses == pytest.approx(losses_of(quiet), abs=1e-3)


def test_a_resumed_run_may_change_its_dtype(stages, base):
    command, folder = base("wide", "--num_iterations=6", "--eval_every=0")
    stages.fork(*command, status=130, faults={"2": "interrupt"})
    stages.fork_record(*command, "--resume", "--dtype=bfloat16")
    assert meta_of(folder, 6)["dtype"] == "bfloat16"


def test_resume_from_a_named_checkpoint(stages, base):
    command, folder = base(
        "named", "--num_iterations=9", "--eval_every=0", "--save_every=2", "--keep=9")
    stages.fork_record(*command)
    whole = weights_of(folder, 9)
    for name, tag in (("2", "named-2"), (folder / "model_000006.pt", "named-3")):
        row = stages.fork_record(*command, f"--resume_from_checkpoint={name}")
        beside = stages.folder("base", tag)
        assert row["checkpoint"] == str(beside), "the finished model stays as it is"
        assert same_weights(weights_of(beside, 9), whole)
        assert list(losses_of(beside)) == list(range(1, 10))
    assert same_weights(weights_of(folder, 9), whole)
    assert "choose from" in stages.refusal(*command, "--resume_from_checkpoint=77")
    assert "is no checkpoint" in stages.refusal(*command, "--resume_from_checkpoint=/none")


def test_a_chat_stage_resumes_from_a_named_checkpoint_whichever_base_model_is_newest(stages, base):
    command, base_folder = base("origin", "--num_iterations=2", "--eval_every=0")
    stages.fork_record(*command)
    rest = (*TINY_CHAT, "--num_iterations=6", "--save_every=2")
    mid = ("scripts.mid_train", "--model_tag=origin", *rest)
    stages.fork_record(*mid)
    folder = stages.folder("mid", "origin")
    whole = weights_of(folder, 6)
    stages.fork_record(*mid, "--resume_from_checkpoint=2")
    assert same_weights(weights_of(stages.folder("mid", "origin-2"), 6), whole)

    # all that a resumed run needs is in its checkpoint
    deeper, _ = base("newer", "--depth=2", "--num_iterations=1", "--eval_every=0")
    stages.fork_record(*deeper)
    path = folder / "meta_000004.json"
    stages.fork_record("scripts.mid_train", *rest, f"--resume_from_checkpoint={path}")
    assert same_weights(weights_of(stages.folder("mid", "origin-3"), 6), whole)
    assert same_weights(weights_of(folder, 6), whole)

    # a checkpoint of another stage
    refusal = stages.refusal(*command, f"--resume_from_checkpoint={path}")
    assert "is of mid_train, not of base_train" in refusal
    of_base = f"--resume_from_checkpoint={base_folder}/meta_000002.json"
    assert "is of base_train, not of mid_train" in stages.refusal(*mid, of_base)
    out, _ = stages.fork("scripts.mid_train", "--model_tag=newer", *rest, "--resume")
    assert "nothing to resume" in out


# ------------------------------------------------------------------------------------------------
# the best step, and a longer run

def test_the_best_step_by_validation_is_saved_and_stays(stages, base):
    command, folder = base("best", "--num_iterations=12", "--eval_every=2", "--keep=1")
    stages.fork_record(*command)
    rows = []
    for row in rows_of(folder, "val_bpb"):
        if row["step"] < 12:
            rows.append((row["val_bpb"], row["step"]))
    assert [step for _, step in rows] == [2, 4, 6, 8, 10]
    metas = [meta_of(folder, step) for step in complete_steps(folder)]
    assert all(meta["val_bpb"] for meta in metas if meta["step"] != 5)
    validated = [(meta["val_bpb"], meta["step"]) for meta in metas if meta["val_bpb"]]
    assert min(validated) <= min(rows)
    assert "keep=0" in stages.refusal(*command, "--keep=0")


def test_extend_resumes_from_before_the_decay_without_a_jump_of_the_learning_rate(stages, base):
    command, folder = base("longer", "--eval_every=0")
    assert "can be extended" in stages.refusal(*command, "--extend=2")
    row = stages.fork_record(*command, "--num_iterations=10", "--learning_rate=0.005")
    assert row["steps"] == 10
    refusal = stages.refusal(*command, "--num_iterations=10", "--extend=2")
    assert "takes no other budget" in refusal
    refusal = stages.refusal(*command, "--extend=2", "--resume_from_checkpoint=10")
    assert "after the LR decay began" in refusal

    # an extended run that is stopped resumes, and is not extended once more
    whole = weights_of(folder, 10)
    out, _ = stages.fork(*command, "--extend=2.0", status=130, faults={"4": "interrupt"})
    assert "--resume --model_tag=longer-2 in place of --extend" in out
    assert "has finished at step 10" in stages.refusal(*command, "--resume")
    longer, folder_of_longer = base("longer-2", "--eval_every=0")
    stages.fork(*longer, "--resume", status=130, faults={"2": "interrupt"})
    row = stages.fork_record(*command, "--extend=2.0")
    assert row["steps"] == 20 and row["checkpoint"] == str(folder_of_longer)
    assert same_weights(weights_of(folder, 10), whole), "the shorter run stays as it was"
    assert len(losses_of(folder)) == 10

    # its own learning rate, which the command need not repeat
    rates = [row["lr"] for row in rows_of(folder_of_longer, "loss")]
    assert len(rates) == 20 and rates[1:8] == [0.005] * 7
    assert all(a >= b for a, b in zip(rates[1:], rates[2:]))
