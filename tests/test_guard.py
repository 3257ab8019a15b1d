"""The guard's verdicts, and what the stages make of them: a batch counts whole or not at all."""

import math

import pytest

from nanochat import guard
from nanochat.guard import Guard, failure_message


def verdicts(watch, rows):
    return [watch.verdict(loss, norm)[0] for loss, norm in rows]


@pytest.mark.parametrize(
    "bad", [(math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0), (2.0, math.inf)]
)
def test_what_is_not_finite_is_skipped_and_does_not_poison_what_comes_after(bad):
    # docs/traps.md: nan-guards
    watch = Guard()
    assert verdicts(watch, [bad, (2.0, 1.0), bad, *[(2.0, 1.0)] * 40, bad, (2.0, 1.0)]) == [
        "skip",
        "ok",
        "skip",
        *["ok"] * 40,
        "skip",
        "ok",
    ]
    assert all(map(math.isfinite, [*watch.losses, *watch.norms]))


@pytest.mark.parametrize("spike", [(2.0, 10.0), (20.0, 1.0)])
def test_a_tenfold_spike_is_skipped_once_there_is_something_to_compare_with(spike):
    watch = Guard()
    assert verdicts(watch, [spike, *[(2.0, 1.0)] * guard.WARM_UP, spike, (2.0, 5.0)]) == [
        "ok",
        *["ok"] * guard.WARM_UP,
        "skip",
        "ok",
    ]


def test_skips_in_a_row_roll_back_and_roll_backs_stop():
    watch, bad, good = Guard(), (math.nan, 1.0), (2.0, 1.0)
    one = ["skip"] * (guard.SKIPS - 1)
    assert verdicts(watch, [bad] * (guard.SKIPS - 1) + [good]) == [*one, "ok"], (
        "a good batch ends the row"
    )
    assert verdicts(watch, [bad] * guard.SKIPS * (guard.ROLL_BACKS + 1)) == [
        *one,
        "roll back",
    ] * guard.ROLL_BACKS + [*one, "stop"]


def test_the_reason_says_what_was_seen():
    watch = Guard()
    verdicts(watch, [(2.0, 1.0)] * guard.WARM_UP)
    assert watch.verdict(math.nan, 1.0)[1] == "loss is nan"
    assert watch.verdict(2.0, 12.5)[1] == "gradient norm is 12.5, recent median 1"


def test_a_run_that_does_not_recover_names_its_remedy():
    nothing_saved = failure_message("loss is nan", "runs/d4", None)
    assert "loss is nan" in nothing_saved and "--learning_rate" in nothing_saved
    saved = failure_message("loss is nan", "runs/d4", 30)
    assert "Step 30 is in runs/d4: bash emergency_training.sh runs/d4 resumes" in saved


def test_a_guard_judges_as_the_one_whose_state_it_loads():
    watch, resumed = Guard(), Guard()
    verdicts(watch, [*[(2.0, 1.0)] * guard.WARM_UP, (math.nan, 1.0)])
    resumed.load_state_dict(watch.state_dict())
    steps = [(2.0, 12.5), *[(math.nan, 1.0)] * guard.SKIPS, (2.0, 1.0)]
    assert verdicts(resumed, steps) == verdicts(watch, steps)
    assert resumed.state_dict() == watch.state_dict()
