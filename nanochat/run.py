"""The protocol of a training run: what every training stage does around its own loop.

The loop stays in each script and calls this, never the other way round:

    while not run.over():                            # budget, stop request, diverged weights
        if run.evaluation_due():  ...                # the stage's own evaluation
        if run.save_due():  run.save(...)
        run.begin_step()
        ...                                          # forward, backward, reduce
        accepted = run.accepts(loss, grad_norm)
        if accepted:  ...                            # apply at this learning rate
        if accepted:  run.record(loss, lr, grad_norm)
        else:  run.skip(layout)                      # or roll back
    run.exit_unless_finished()

It imports no loader, no loss and no schedule, and knows no stage.
"""
import faulthandler
import gc
import json
import math
import signal
import statistics
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import CheckpointManager
from nanochat.common import all_reduce_max, compute_cleanup, print0
from nanochat.guard import Guard, failure_message
from nanochat.hardware import peak_flops, peak_memory
from nanochat.metrics import finish_stage, open_log, open_logger
from nanochat.start import resume_hint

PROGRESS_SECONDS = 5      # of training between two lines of progress
SPEED_STEPS = 20          # the speed that is shown is the median of the last steps
WARM_STEPS = 3            # steps that compile and allocate; they do not count for the speed
BUSY_SECONDS = 20         # of training before the machine is called busy
BUSY_SHARE = 0.25         # of the time that threads want a core, for which they wait for one


class StopRequest:
    """Ctrl+C, SIGTERM or SIGHUP asks the loop to stop after its step; a second one stops at once.

    signal is the number of the signal that came, or 0.
    """

    def __init__(self):
        self.signal = 0
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the run continues
            signals.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._handle) for number in signals}

    def release(self):
        """No step is to come: from here on a signal ends the process at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal:
            print0("stopped at once")
            raise SystemExit(128 + number)
        self.signal = number
        print0("stopping after this step; once more stops at once")


def core_seconds():
    """(seconds that the threads of this process ran, seconds that they waited for a core).

    From the kernel's scheduler; None where it does not say (it is Linux's).
    """
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            numbers = path.read_text(encoding="ascii").split()
        except OSError:
            continue  # a thread that has just ended
        ran += int(numbers[0])
        waited += int(numbers[1])
    return (ran / 1e9, waited / 1e9) if ran else None


def busy_line(before, after, step, progress, planned_steps):
    """What to say where other processes take the cores, or "".

    before, after: what core_seconds() gave at the start and now. step: of the run; progress: the
    share of its horizon; planned_steps: how many were planned, or None.
    """
    if not before or not after:
        return ""
    ran, waited = after[0] - before[0], after[1] - before[1]
    if waited <= BUSY_SHARE * (ran + waited):
        return ""
    share = 100 * waited / (ran + waited)
    steps = ""
    if planned_steps and progress > 0:
        expected = step / min(1.0, progress)
        # a plan that was made on a machine as busy expects no more
        if expected < 0.8 * planned_steps:
            steps = f"{expected:.0f} steps of about {planned_steps:.0f}, for "
    return (f"the machine is busy: {steps}this process waits for a core {share:.0f} % of its time "
            "(stop the other programs, or give it more minutes)")


def dtype_name(compute):
    """Of what the device multiplies, such as "bfloat16"."""
    return str(compute.dtype).removeprefix("torch.")


def data_sheet_peak(compute):
    """Dense FLOP/s of a device in the compute dtype, None where no data sheet is known."""
    if compute.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(compute.device), dtype_name(compute))


class Run:
    """A training run: its clock and budget, its checkpoints, its guard and its record.

    stage: the script's name. settings: what configure() returned; read here are keep, save_every,
    save_minutes, hang_minutes, logger, compile, and those of resume_hint(). compute: what
    compute_init() returned. start: a Start (start.py). meta: the run's entry in every meta file.
    horizon: a Horizon (plan.py), of steps or of minutes. flops: of a token, the Flops of the model
    (gpt.py). matmul_flops: measured, of one device.

    planned_steps: how many the plan expects within the minutes, or None.

    step, elapsed (seconds of training, evaluation aside), progress and lr_scale (halved by every
    roll back) are for the loop to read.
    """

    def __init__(self, stage, settings, compute, folder, start, meta, horizon, total_batch_size,
                 flops, matmul_flops, planned_steps=None):
        self.stage, self.settings, self.compute, self.folder = stage, settings, compute, folder
        self.meta, self.horizon, self.total_batch_size = meta, horizon, total_batch_size
        self.flops, self.matmul_flops = flops, matmul_flops
        self.peak = data_sheet_peak(compute)
        self.stage_words = ""        # of the curriculum, for the lines of progress
        self.stage_from = 0          # index in durations of its first step
        self.planned_steps = planned_steps if horizon.minutes else None

        # where the run stands
        self.step = self.first_step = meta["step"]
        self.elapsed = self.saved_at = meta["elapsed"]
        self.lr_scale = meta.get("rate_scale", 1.0)
        self.progress = horizon.progress(self.step, self.elapsed)
        self.evaluated = 0.0         # progress at the last evaluation
        self.durations = []          # seconds of each step
        self.shown_at = 0.0          # elapsed at the last line of progress
        self.cores_before = None     # core_seconds() when the first steps were taken
        self.said_busy = False

        # what may end it
        self.stopped = 0             # the signal that asked for it
        self.diverged = ""           # why no step may be taken any more
        self.enough = False          # whether the stage wants no more steps
        self.stop_request = StopRequest()
        self.guard = Guard()
        if start.state:
            self.guard.load_state_dict(start.state["guard"])

        # where it is written
        resumed_from = self.step if start.state else None
        self.checkpoints = CheckpointManager(
            folder, compute.rank, settings["keep"], resumed_from, meta.get("run"))
        self.logger = open_logger(settings["logger"], folder, settings)
        self.log_file = open_log(folder, self.step) if compute.rank == 0 else None
        # what the run is and where it ends, for those who follow its log (live.py)
        self.log(
            tokens=meta.get("tokens", 0), stage=stage, run=meta.get("run"),
            origin=meta.get("origin"), horizon=horizon._asdict())

    # ---------------------------------------------------------------------- before each step

    def over(self):
        """Whether the loop ends here: budget used or enough, stop asked for, or weights diverged.

        Every rank calls it: all take the same decision.
        """
        self.watch()
        if self.diverged:
            return True
        writing = self.checkpoints.writing()
        last_step = self.durations[-1] if self.durations else 0.0  # seconds
        numbers = self.elapsed, last_step, self.stop_request.signal, writing
        self.elapsed, last_step, stopped, writing = all_reduce_max(*numbers)
        self.stopped = int(stopped)
        if not writing:
            self.checkpoints.finish(raise_on_error=False)
        self.progress = self.horizon.progress(self.step, self.elapsed)
        if not self.durations:
            self.evaluated = self.progress  # a resumed run has been evaluated before
        used = self.horizon.is_used(self.step, self.elapsed, last_step)
        return bool(self.stopped) or self.enough or used

    def watch(self):
        """The watchdog: a step that takes too long ends the run, every rank saying where it was."""
        faulthandler.dump_traceback_later(60 * self.settings["hang_minutes"], exit=True)

    def evaluation_due(self, every=None, times=4):
        """Whether to evaluate before this step: every so many steps, or at each quarter of the
        run (or after as many equal parts as `times` says). Never on weights that the guard doubts.
        """
        if self.step == self.first_step or self.guard.bad:
            return False
        if every is not None:
            return bool(every) and self.step % every == 0
        if int(times * self.progress) <= int(times * self.evaluated):
            return False
        self.evaluated = self.progress
        return True

    def save_due(self, wanted=False):
        """Whether to save before this step: by steps, by minutes, or because the stage wants it."""
        if self.step == self.first_step or self.guard.bad:
            return False
        every = self.settings["save_every"]
        if every and self.step % every == 0:
            return True
        return wanted or self.elapsed - self.saved_at >= 60 * self.settings["save_minutes"]

    def save(self, layout, loader_state, **fields):
        """Begin to save this step; a thread writes it while training continues. All ranks call it.

        fields: what the stage adds to the meta file.
        """
        self.saved_at = self.elapsed
        # before the next snapshot is made, for the host's memory may not hold two
        self.checkpoints.finish(raise_on_error=False)
        rank_state = {
            "optimizers": layout.optimizer_state(),
            "loader": loader_state,
            "rng": torch.get_rng_state(),
            "guard": self.guard.state_dict(),
        }
        meta = {
            **self.meta,
            "settings": self.settings,
            "rate_scale": self.lr_scale,
            "elapsed": self.elapsed,
            "tokens": self.step * self.total_batch_size,
            "finished": False,
            **fields,
        }
        self.checkpoints.save(self.step, layout.whole_weights(), rank_state, meta)

    # ---------------------------------------------------------------------- a step

    def change_length(self, flops, words):
        """The steps that follow are of another sequence length: speeds are those of its own steps.

        flops: of a token, from here on. words: what the lines of progress say of it.
        """
        self.flops, self.stage_words = flops, f"{words} | "
        self.stage_from = len(self.durations)

    def begin_step(self):
        self.step_began = time.perf_counter()

    def _end_step(self):
        self.durations.append(time.perf_counter() - self.step_began)
        self.elapsed += self.durations[-1]

    def accepts(self, loss, grad_norm):
        """Whether the optimizers may use this gradient. loss, grad_norm: the same on all ranks."""
        self.verdict, self.reason = self.guard.verdict(loss, grad_norm)
        return self.verdict == "ok"

    def skip(self, layout):
        """Instead of record(): leave this batch out, or roll back, or give the run up."""
        self._end_step()
        print0(f"step {self.step + 1}: {self.reason}: {self.verdict}")
        self.log(skipped=self.reason, verdict=self.verdict)
        if self.verdict == "skip":
            return
        good_step = self.checkpoints.last_good(self.step)
        if self.verdict == "stop" or good_step is None:
            self.diverged = self.reason
            return
        self.step = good_step
        self.lr_scale /= 2
        self.checkpoints.load(good_step, layout)
        print0(f"back to step {good_step}, with other data and {self.lr_scale:g} times the "
               "learning rate")

    def record(self, loss, lr, grad_norm):
        """A step was taken: count it, show it, log it. lr: the learning rate of the matrices."""
        self._end_step()
        self.step += 1
        if self.settings["compile"] and len(self.durations) == 1 and self.durations[0] > 2:
            print0(f"the first step took {self.durations[0]:.0f} s with compiling; the result is "
                   "kept for the next run")
        if self.step == self.first_step + WARM_STEPS:
            gc.collect()
            gc.freeze()
            gc.disable()  # a collection would stall the loop for half a second
            self.cores_before = core_seconds()
        if self.elapsed - self.shown_at >= PROGRESS_SECONDS or self.step <= self.first_step + 1:
            self.shown_at = self.elapsed
            self._show(loss, lr, grad_norm)
            self.say_where_busy()
        self.log(
            loss=loss, lr=lr, grad_norm=grad_norm, flops_per_token=self.flops.causal)

    def _show(self, loss, lr, grad_norm):
        seconds = statistics.median(self.durations[self.stage_from:][-SPEED_STEPS:])
        speed = self.total_batch_size / seconds
        flops = speed * self.flops.causal / self.compute.world_size
        share = 100 * flops / self.matmul_flops
        seconds_left = self.horizon.seconds_left(self.step, self.elapsed, seconds)
        mfu, mfu_square = self._mfu(speed)
        of_peak = f"mfu {100 * mfu:.1f} % ({100 * mfu_square:.1f} % square) | " if mfu else ""
        print0(
            f"step {self.step:5d} | {100 * self.progress:3.0f} % | loss {loss:.4f} | "
            f"lr {lr:.2g} | norm {grad_norm:.2f} | {speed:,.0f} tok/s | "
            f"{share:.0f} % of matmul rate | {of_peak}{self.stage_words}"
            f"{seconds_left / 60:.1f} min left")

    def _mfu(self, speed):
        """The share of the data sheet's peak at a speed in tokens/s: (with causal attention, with
        square attention), or (None, None) where no peak is known."""
        if not self.peak:
            return None, None
        peak = self.peak * self.compute.world_size
        return speed * self.flops.causal / peak, speed * self.flops.square / peak

    def say_where_busy(self, at_the_end=False):
        """One line where other processes take the cores: once on the way, and at the end."""
        long_enough = sum(self.durations) >= BUSY_SECONDS
        if self.compute.device.type != "cpu" or not (long_enough or at_the_end):
            return
        if self.said_busy and not at_the_end:
            return
        after = core_seconds()
        line = busy_line(
            self.cores_before, after, self.step, self.progress, self.planned_steps)
        if line:
            self.said_busy = True
            print0(line)

    def log(self, **row):
        """One line of log.jsonl, and the same numbers for the logger. Rank 0 writes."""
        if self.compute.rank != 0:
            return
        tokens = self.step * self.total_batch_size
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.elapsed, 2), **row}
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        self.logger(self.step, row)

    # ---------------------------------------------------------------------- endings

    def last_save_is_due(self):
        """Whether to save after the loop: not where the run diverged, nor where it was stopped
        while the guard doubts the weights and an earlier step is there."""
        if self.diverged:
            return False
        if self.stopped and self.guard.bad:
            return self.checkpoints.newest() is None
        return True

    def exit_unless_finished(self):
        """End the process with its status where the loop ended early: 1 where the run diverged,
        128 + signal where it was stopped. Otherwise every file of the last save is complete."""
        gc.unfreeze()
        if self.diverged:
            newest = self.checkpoints.newest()
            print0(failure_message(self.diverged, self.folder, newest))
            compute_cleanup()
            raise SystemExit(1)
        if self.stopped:
            hint = resume_hint(self.settings, self.folder, self.meta.get("origin"))
            self.checkpoints.finish()
            if not self.guard.bad or self.checkpoints.newest() == self.step:
                print0(f"saved step {self.step} in {self.folder}: {hint}")
            else:
                print0(f"not saved, for the last batches were bad ({self.guard.bad[-1]}); step "
                       f"{self.checkpoints.newest()} is in {self.folder}: {hint}")
            compute_cleanup()
            raise SystemExit(128 + self.stopped)
        self.checkpoints.finish()  # before the last evaluation, which may run out of memory
        self.stop_request.release()
        self.say_where_busy(at_the_end=True)
        self.watch()

    def finish(self, model, seconds, amended={}, **fields):
        """Mark the last step as finished, and end the stage with its JSON line.

        seconds: wall clock of the whole stage. amended: what changes in the meta file of the last
        step. fields: what the stage adds to the JSON line.
        """
        self.checkpoints.amend(self.step, finished=True, **amended)
        faulthandler.cancel_dump_traceback_later()
        # of a curriculum, in the last stage, whose FLOPs these are
        durations = self.durations[self.stage_from:]
        steady = durations[WARM_STEPS:] or durations or [math.inf]
        speed = self.total_batch_size / statistics.median(steady)
        flops = speed * self.flops.causal
        mfu, mfu_square = self._mfu(speed)
        ranks = self.compute.world_size
        # of tensors on a GPU, to be held to the plan; a CPU tells that of the whole process only
        on_gpu = self.compute.device.type == "cuda"
        finish_stage(
            self.stage,
            seconds,
            self.settings,
            steps=self.step,
            tokens=self.step * self.total_batch_size,
            train_seconds=self.elapsed,
            tokens_per_second=speed,
            flops_per_second=flops,
            flops_per_second_square=speed * self.flops.square,
            flops_per_second_of_weights=speed * self.flops.weights,
            matmul_flops_per_second=self.matmul_flops * ranks,
            share_of_matmul_rate=flops / ranks / self.matmul_flops,
            mfu=mfu,
            mfu_square=mfu_square,
            peak_flops_per_second=self.peak and self.peak * ranks,
            device=self.compute.device.type,
            dtype=dtype_name(self.compute),
            ranks=ranks,
            peak_memory=peak_memory(self.compute.device) if on_gpu else None,
            checkpoint=str(self.folder),
            parameters=sum(p.numel() for p in model.parameters()),
            config=self.meta["config"],
            **fields,
        )
        compute_cleanup()
