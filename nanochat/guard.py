"""Judge every training step before it is taken: may the optimizers use this gradient?

One bad batch, one flipped bit or a learning rate slightly too high ends in NaN, and NaN spreads:
once it is in a weight or in Adam's running averages it never leaves. The guard therefore judges
loss and gradient norm after the reduction over ranks and before the update. All ranks hold the same
two numbers (a NaN on one rank makes the sum over all ranks NaN), so all ranks come to the same
verdict without another collective. The guard never replaces a value: a batch counts whole or not at
all, and a run that skipped a batch equals a run that never saw it.

    ok         the optimizers take the step
    skip       the batch is dropped: gradients are cleared, the step is not counted, and the next
               batch is tried
    roll back  the fifth bad batch in a row, so the weights themselves have diverged: load the last
               good checkpoint, keep the data position, halve the learning rate
    stop       a fourth roll-back, or no checkpoint to load: the run ends with status 1 and names
               the command that resumes it with safe settings

parallel.Layout.reduce() makes the two numbers; Run.accepts() and Run.skip() in run.py ask the guard
and do what it says, on every rank alike.
"""
import math
import statistics
from collections import deque

# A finite value counts as a spike from this multiple of the recent median. In 51 healthy runs of
# ours (dev/LOG.md) the gradient norm never exceeded 5.4 times its median, the loss never 1.9 times.
SPIKE = 8.0
MEMORY = 64      # accepted steps that the median is taken over
WARM_UP = 16     # accepted steps that are needed before a finite value can count as a spike
SKIPS = 5        # consecutive bad batches of which the last triggers a roll-back
ROLL_BACKS = 3   # roll-backs before the run stops


def failure_message(reason, folder, step):
    """One line for a run that does not recover.

    reason: the guard's last reason. folder: the checkpoint folder. step: its newest checkpoint,
    None where it has none.
    """
    if step is None:
        remedy = "Nothing was saved yet: try again with a lower --learning_rate"
    else:
        remedy = (f"Step {step} is in {folder}: bash emergency_training.sh {folder} "
                  "resumes from it with safe settings")
    return f"stopping, for the run does not recover; last seen: {reason}. {remedy}"


class Guard:
    """Verdicts on training steps, from the recent losses and gradient norms that were accepted.

    Its state travels in the checkpoint, so that a resumed run judges as the interrupted one would
    have.
    """

    def __init__(self):
        self.losses = deque(maxlen=MEMORY)   # of accepted steps only
        self.norms = deque(maxlen=MEMORY)
        self.bad = []                        # the reason for each of the batches skipped in a row
        self.roll_backs = 0

    def state_dict(self):
        """The state as plain lists and numbers; the keys are part of the checkpoint format."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "bad": list(self.bad),
            "roll_backs": self.roll_backs,
        }

    def load_state_dict(self, state):
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.bad = list(state["bad"])
        self.roll_backs = state["roll_backs"]

    def verdict(self, loss, norm):
        """Judge one step.

        loss, norm: floats of this step, the same on every rank.
        Returns (verdict, reason). The verdict is "ok", "skip", "roll back" or "stop"; the reason
        says what was wrong and is empty for "ok".
        """
        reason = (self._reason("loss", loss, self.losses)
                  or self._reason("gradient norm", norm, self.norms))
        if reason:
            return self._refuse(reason), reason

        # Only accepted values move the medians: a NaN in them would stay for MEMORY steps.
        self.losses.append(loss)
        self.norms.append(norm)
        self.bad.clear()
        return "ok", ""

    def _refuse(self, reason):
        """Count a bad batch, and say what follows from it."""
        self.bad.append(reason)
        if len(self.bad) < SKIPS:
            return "skip"
        self.bad.clear()
        self.roll_backs += 1
        return "roll back" if self.roll_backs <= ROLL_BACKS else "stop"

    def _reason(self, name, value, past):
        """What is wrong with `value`, compared with the accepted values `past`; else None."""
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(past) < WARM_UP:
            return None
        median = statistics.median(past)
        if value > SPIKE * median:
            return f"{name} is {value:.3g}, recent median {median:.3g}"
        return None
