"""A run's protocol, without a process: a Run with a fake compute, start and layout."""
import gc
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import complete_steps
from nanochat.gpt import Flops
from nanochat.guard import ROLL_BACKS, SKIPS
from nanochat.plan import Horizon
from nanochat.run import Run, StopRequest, busy_line, core_seconds, data_sheet_peak

COMPUTE = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
SETTINGS = {
    "keep": 3,
    "logger": "",
    "compile": False,
    "hang_minutes": 30.0,
    "save_every": 0,
    "save_minutes": 10.0,
    "resume_from_checkpoint": None,
}
FRESH = SimpleNamespace(state=None)
RESUMED = SimpleNamespace(
    state={"guard": {"losses": [], "norms": [], "bad": [], "roll_backs": 0}})
STEPS = Horizon(8, None)
MINUTES = Horizon(None, 2.0)


class FakeLayout:
    """The model and the optimizers of a run: states that are saved and loaded."""

    def __init__(self):
        self.model = None
        self.loaded = None

    def whole_weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def load_weights(self, weights):
        self.model.load_state_dict(weights)

    def optimizer_state(self):
        return [[{"name": "weight", "start": 0, "count": 3, "values": {}}]]

    def load_optimizer_state(self, states):
        self.loaded = states


@pytest.fixture
def model():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 3)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes a Run that takes `seconds` a step, by a clock that only its steps advance."""
    monkeypatch.setattr("nanochat.run.faulthandler.dump_traceback_later", lambda *_, **__: None)
    # the meta files of these runs describe no model
    monkeypatch.setattr("nanochat.checkpoint_manager.check_weights", lambda *_: None)
    runs = []

    def make(horizon=STEPS, start=FRESH, step=0, elapsed=0.0, settings=(), **meta):
        meta = {"step": step, "elapsed": elapsed, "config": {}, **meta}
        run = Run(
            "test", {**SETTINGS, **dict(settings)}, COMPUTE, tmp_path / "run", start, meta,
            horizon, total_batch_size=100, flops=Flops(9, 10, 11), matmul_flops=1e9)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.stop_request.release()
        run.checkpoints.finish(raise_on_error=False)
        run.checkpoints.lock.close()
    gc.unfreeze()  # a Run turns the collector off
    gc.enable()


def take_steps(run, count=1, seconds=1.0, loss=2.0, grad_norm=1.0):
    """Accepted steps of `seconds` each."""
    for _ in range(count):
        run.begin_step()
        assert run.accepts(loss, grad_norm)
        elapsed = run.elapsed
        run.record(loss, 0.02, grad_norm)
        run.durations[-1] = seconds
        run.elapsed = elapsed + seconds


def bad_step(run, model, layout, loss=math.nan):
    """One step that the guard refuses; its verdict."""
    run.begin_step()
    assert not run.accepts(loss, 1.0)
    run.skip(layout)
    return run.verdict


def save(run, model, layout=None):
    layout = layout or FakeLayout()
    layout.model = model
    run.save(layout, {"place": run.step})
    run.checkpoints.finish()


def rows_of(run):
    lines = (run.folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------
# progress, and when the loop ends

def test_progress_counts_steps(make_run):
    run = make_run(STEPS)
    assert not run.over() and run.progress == 0
    take_steps(run, 6, seconds=1000.0)
    assert not run.over() and run.progress == 0.75
    take_steps(run, 2)
    assert run.over() and run.step == 8


@pytest.mark.parametrize("steps, seconds, over", [
    (2, 40.0, True),    # half of a step would not fit
    (4, 19.0, False),   # more than half of a step fits
    (5, 19.0, True),
])
def test_progress_counts_minutes_and_the_last_step_is_the_one_after_which_none_would_fit(
        make_run, steps, seconds, over):
    run = make_run(MINUTES, start=RESUMED, step=3, elapsed=30.0)
    assert not run.over() and run.progress == 0.25
    take_steps(run, steps, seconds)
    assert run.over() == over


def test_a_run_of_minutes_ends_earlier_where_its_text_is_used_up(make_run):
    run = make_run(Horizon(None, 60.0, 8))
    assert due_at(run, 8) == [2, 4, 6]
    assert run.over() and run.progress == 1


def test_a_stage_that_has_enough_ends_the_loop(make_run):
    run = make_run(STEPS)
    take_steps(run)
    assert not run.over()
    run.enough = True
    assert run.over() and run.last_save_is_due()


def test_time_before_the_run_counts_and_a_resumed_run_keeps_its_learning_rate_scale(make_run):
    run = make_run(MINUTES, elapsed=60.0, rate_scale=0.25)
    assert run.progress == 0.5 and run.lr_scale == 0.25


# ------------------------------------------------------------------------------------------------
# what is due before a step

def due_at(run, steps, every=None, times=4):
    """The steps before which an evaluation was due."""
    due = []
    for _ in range(steps):
        assert not run.over()
        if run.evaluation_due(every, times):
            due.append(run.step)
        take_steps(run)
    return due


def test_evaluation_is_due_at_each_quarter_and_not_at_the_first_step(make_run):
    assert due_at(make_run(STEPS), 8) == [2, 4, 6]


def test_evaluation_is_due_as_often_as_the_stage_says(make_run):
    assert due_at(make_run(STEPS), 8, times=8) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("every, expected", [(3, [3, 6]), (0, [])])
def test_evaluation_is_due_every_so_many_steps(make_run, every, expected):
    assert due_at(make_run(STEPS), 8, every) == expected


def test_a_resumed_run_does_not_evaluate_before_its_next_quarter(make_run):
    assert due_at(make_run(STEPS, start=RESUMED, step=3), 5) == [4, 6]


def test_no_evaluation_and_no_save_while_batches_are_bad(make_run, model):
    run = make_run(STEPS, settings={"save_every": 1})
    run.over()
    take_steps(run, 2)
    bad_step(run, model, FakeLayout())
    run.over()
    assert not run.evaluation_due() and not run.evaluation_due(every=1)
    assert not run.save_due() and not run.save_due(wanted=True)
    take_steps(run)
    run.over()
    assert run.save_due()
    assert run.evaluation_due(), "the quarter is made up for once the weights are trusted again"
    assert not run.evaluation_due()


def test_a_save_is_due_by_steps_by_minutes_and_when_the_stage_wants_it(make_run, model):
    run = make_run(STEPS, settings={"save_every": 4, "save_minutes": 1.0})
    assert not run.save_due(wanted=True), "nothing was trained yet"
    take_steps(run, 1)
    assert not run.save_due() and run.save_due(wanted=True)
    take_steps(run, 3)
    assert run.save_due()
    save(run, model)
    take_steps(run, 1, seconds=59.0)
    assert not run.save_due()
    take_steps(run, 1, seconds=1.0)
    assert run.save_due()


def test_a_save_is_finished_before_the_next_snapshot_is_made(make_run, model):
    """The memory of the host may not hold the weights twice."""
    run, layout, pending = make_run(), FakeLayout(), []
    layout.model = model

    def whole_weights():
        pending.append(run.checkpoints.pending)
        return {name: value.clone() for name, value in model.state_dict().items()}

    layout.whole_weights = whole_weights
    for _ in range(2):
        take_steps(run, 1)
        run.save(layout, {})
    run.checkpoints.finish()
    assert pending == [None, None] and complete_steps(run.folder) == [1, 2]


# ------------------------------------------------------------------------------------------------
# batches that go wrong

def test_a_bad_batch_is_skipped_and_is_no_step(make_run, model):
    run = make_run()
    take_steps(run)
    assert bad_step(run, model, FakeLayout()) == "skip"
    assert run.step == 1 and not run.diverged and not run.over()
    row = rows_of(run)[-1]
    assert row["step"] == 1 and row["skipped"] == "loss is nan" and row["verdict"] == "skip"


def test_bad_batches_in_a_row_roll_back_at_half_the_learning_rate(make_run, model):
    run, layout = make_run(), FakeLayout()
    take_steps(run, 2)
    save(run, model, layout)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    take_steps(run, 3)
    torch.nn.init.constant_(model.weight, math.nan)
    for _ in range(SKIPS):
        verdict = bad_step(run, model, layout)
    assert verdict == "roll back" and run.step == 2 and run.lr_scale == 0.5
    assert torch.equal(model.weight, weights["weight"])
    assert layout.loaded == [layout.optimizer_state()], "that of each rank"
    assert not run.over()


def test_a_run_without_a_good_step_diverges_and_exits_with_1(make_run, model, capsys):
    run = make_run()
    take_steps(run, 2)
    for _ in range(SKIPS):
        assert not run.over()
        bad_step(run, model, FakeLayout())
    assert run.over() and run.diverged == "loss is nan"
    assert not run.last_save_is_due()
    with pytest.raises(SystemExit) as ending:
        run.exit_unless_finished()
    assert ending.value.code == 1 and "does not recover" in capsys.readouterr().out


def test_roll_backs_have_a_limit(make_run, model):
    run, layout = make_run(), FakeLayout()
    take_steps(run, 2)
    save(run, model, layout)
    for _ in range(ROLL_BACKS + 1):
        assert not run.over()
        take_steps(run, 1)
        for _ in range(SKIPS):
            bad_step(run, model, layout)
    assert run.over() and run.lr_scale == 0.5**ROLL_BACKS


# ------------------------------------------------------------------------------------------------
# endings

def stop(run, number=signal.SIGINT):
    os.kill(os.getpid(), number)
    assert run.over() and run.stopped == number


def test_a_run_that_is_stopped_is_saved_and_says_so(make_run, model, capsys):
    run = make_run()
    take_steps(run, 3)
    stop(run, signal.SIGTERM)
    assert run.last_save_is_due()
    save(run, model)
    with pytest.raises(SystemExit) as ending:
        run.exit_unless_finished()
    assert ending.value.code == 143
    assert "saved step 3" in capsys.readouterr().out and complete_steps(run.folder) == [3]


def test_doubted_weights_are_saved_at_a_stop_only_where_there_is_nothing_else(
        make_run, model, capsys):
    run, layout = make_run(), FakeLayout()
    take_steps(run, 2)
    bad_step(run, model, layout)
    stop(run)
    assert run.last_save_is_due(), "something is better than nothing"
    save(run, model, layout)

    run.stop_request.signal = 0
    take_steps(run, 2)
    bad_step(run, model, layout)
    stop(run)
    assert not run.last_save_is_due()
    with pytest.raises(SystemExit) as ending:
        run.exit_unless_finished()
    assert ending.value.code == 130
    out = capsys.readouterr().out
    assert "not saved, for the last batches were bad (loss is nan); step 2" in out


def test_a_run_resumed_from_an_earlier_step_may_be_stopped_before_its_first(
        make_run, model, capsys):
    run = make_run()
    for _ in range(2):
        take_steps(run, 2)
        save(run, model)
    run.stop_request.release()
    run.checkpoints.lock.close()

    run = make_run(start=RESUMED, step=2)
    stop(run)
    assert run.last_save_is_due()
    save(run, model)
    with pytest.raises(SystemExit) as ending:
        run.exit_unless_finished()
    assert ending.value.code == 130 and "saved step 2" in capsys.readouterr().out


def test_a_finished_run_marks_its_last_step(make_run, model, capsys, base_dir):
    run = make_run(Horizon(2, None))
    take_steps(run, 2)
    assert run.over() and run.last_save_is_due()
    save(run, model)
    run.exit_unless_finished()
    run.finish(model, 1.0, {"val_bpb": 1.25}, val_bpb=1.5)
    row = json.loads(capsys.readouterr().out.split("\n")[-2])
    assert row["steps"] == 2 and row["tokens"] == 200 and row["val_bpb"] == 1.5
    assert row["tokens_per_second"] == 100 and row["flops_per_second"] == 1000
    assert row["flops_per_second_square"] == 1100 and row["flops_per_second_of_weights"] == 900
    assert row["mfu"] is row["mfu_square"] is row["peak_flops_per_second"] is None
    assert row["peak_memory"] is None, "that of a process is not what was planned"
    meta = json.loads((run.folder / "meta_000002.json").read_text(encoding="utf-8"))
    assert meta["finished"] and meta["val_bpb"] == 1.25


def test_a_line_of_progress_has_the_norm_and_the_share_of_the_matmul_rate(make_run, capsys):
    run = make_run()
    run.begin_step()
    run.accepts(2.0, 1.5)
    run.record(2.0, 0.02, 1.5)
    line = capsys.readouterr().out
    assert "loss 2.0000 | lr 0.02 | norm 1.50" in line and "% of matmul rate" in line


def compute_with(**more):
    return SimpleNamespace(**{**vars(COMPUTE), **more})


def test_the_peak_is_that_of_the_device_and_its_dtype_or_unknown(monkeypatch):
    """docs/traps.md: wrong-throughput"""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = {"device": torch.device("cuda", 0)}
    assert data_sheet_peak(compute_with(**gpu, dtype=torch.bfloat16)) == 989e12
    assert data_sheet_peak(compute_with(**gpu)) is None, "the compute dtype is float32"
    assert data_sheet_peak(COMPUTE) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    assert data_sheet_peak(compute_with(**gpu, dtype=torch.bfloat16)) is None


def test_the_share_of_the_peak_is_shown_and_published_by_both_conventions(
        make_run, model, capsys, base_dir):
    """docs/traps.md: wrong-throughput"""
    run = make_run(Horizon(2, None))
    run.peak, run.compute = 1000.0, compute_with(world_size=2, dtype=torch.bfloat16)
    take_steps(run, 2)  # of 100 tokens, and of 1000 or 1100 FLOPs a second
    run._show(2.0, 0.02, 1.0)
    assert "| mfu 50.0 % (55.0 % square) |" in capsys.readouterr().out
    assert run.over()
    save(run, model)
    run.exit_unless_finished()
    run.finish(model, 1.0)
    row = json.loads(capsys.readouterr().out.split("\n")[-2])
    assert (row["mfu"], row["mfu_square"]) == (0.5, 0.55)
    assert row["peak_flops_per_second"] == 2000 and row["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------
# a busy machine

def test_a_machine_is_busy_where_threads_wait_for_a_core():
    before = 100.0, 5.0
    assert busy_line(before, (120.0, 7.0), 10, 0.5, 760) == ""
    line = busy_line(before, (110.0, 35.0), 25, 1.1, 760.4)
    assert line.startswith("the machine is busy: 25 steps of about 760, ")
    assert "waits for a core 75 % of its time" in line
    assert "10 steps of about 760" in busy_line(before, (110.0, 35.0), 5, 0.5, 760)
    assert "steps" not in busy_line(before, (110.0, 35.0), 5, 0.5, None)
    assert "steps" not in busy_line(before, (110.0, 35.0), 70, 1.0, 69), "planned as busy"
    assert busy_line(None, None, 5, 0.5, 760) == "", "not every system counts it"


def test_seconds_on_a_core_grow_with_work():
    before = core_seconds()
    if before is None:
        pytest.skip("this system does not count them")
    sum(range(3_000_000))
    after = core_seconds()
    assert after[0] > before[0] and after[1] >= before[1]


def test_a_busy_machine_is_said_once_on_the_way_and_at_the_end(make_run, monkeypatch, capsys):
    run = make_run(MINUTES)
    monkeypatch.setattr("nanochat.run.core_seconds", lambda: (10.0, 30.0))
    take_steps(run, 4)
    run.cores_before = 0.0, 0.0
    run.say_where_busy()
    assert "busy" not in capsys.readouterr().out, "after seconds that would be rash"
    take_steps(run, 30)
    run.say_where_busy()
    run.say_where_busy()
    run.say_where_busy(at_the_end=True)
    assert capsys.readouterr().out.count("the machine is busy") == 2


# ------------------------------------------------------------------------------------------------
# stop requests

@pytest.fixture
def stop_request():
    """A StopRequest where SIGHUP has its usual effect, under nohup too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request = StopRequest()
    yield request
    request.release()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_and_the_second_one_ends_at_once(stop_request, number, capsys):
    assert stop_request.signal == 0
    os.kill(os.getpid(), number)
    assert stop_request.signal == number
    with pytest.raises(SystemExit) as ending:
        os.kill(os.getpid(), number)
        signal.getsignal(number)  # a line in which Python runs the handler
    assert ending.value.code == 128 + number
    assert "stopped at once" in capsys.readouterr().out


def test_after_the_last_step_a_signal_has_its_usual_effect(stop_request):
    stop_request.release()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal == 0
    finally:
        request.release()
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------
# its log

def test_the_log_opens_with_what_the_run_is_and_where_it_ends(make_run):
    run = make_run(MINUTES, elapsed=1.5, run="r1", origin=["base_checkpoints/d1", 7])
    [opening] = rows_of(run)
    assert opening == {
        "step": 0,
        "tokens": 0,
        "seconds": 1.5,
        "stage": "test",
        "run": "r1",
        "origin": ["base_checkpoints/d1", 7],
        "horizon": {"num_iterations": None, "minutes": 2.0, "max_steps": None},
    }


def test_a_run_that_resumes_opens_its_log_again_at_its_step(make_run, model):
    run = make_run(STEPS)
    take_steps(run, 3)
    save(run, model)
    take_steps(run, 2)
    run.checkpoints.lock.close()
    resumed = make_run(STEPS, start=RESUMED, step=3, elapsed=3.0, tokens=300)
    take_steps(resumed)
    rows = rows_of(resumed)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4]
    openings = [row for row in rows if "horizon" in row]
    assert [(row["step"], row["tokens"]) for row in openings] == [(0, 0), (3, 300)]


@pytest.mark.parametrize("horizon, progress, left", [
    (Horizon(8, None), 0.25, 60.0),
    (Horizon(None, 2.0), 0.5, 60.0),
    (Horizon(None, 60.0, 4), 0.5, 20.0),
    (Horizon(2, None), 1.0, 0.0),
])
def test_a_horizon_tells_what_is_used_and_what_is_left(horizon, progress, left):
    assert horizon.progress(2, 60.0) == progress
    assert horizon.seconds_left(2, 60.0, 10.0) == left
