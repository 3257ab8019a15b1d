"""A verdict on every step, before it is taken: may the optimizers use this gradient?

One bad batch, a bit that flipped or a rate too high by a little ends in NaN, and NaN spreads: once in a weight or in
Adam's averages it never leaves. So loss and gradient norm are judged after the reduction over ranks and before the
update. All ranks hold the same two numbers (a NaN of one is in the sum of all), so all come to the same verdict. A value
is never replaced: a batch counts whole or not at all, and a run that skipped one is the run that never had it.

    ok         go on
    skip       leave this batch out
    roll back  too many skips in a row: the weights themselves are sick. Back to the last good checkpoint, the data moved
               on, at half the rate
    stop       rolled back too often, or nothing to go back to: somebody has to look
"""
import math
import statistics
from collections import deque

SPIKE = 8.0      # times the median of the last steps; 51 healthy runs of ours (dev/LOG.md) had norms up to 5.4, losses up to 1.9
MEMORY = 64      # steps that make the median ...
WARM_UP = 16     # ... and how many there must be before anything finite counts as a spike
SKIPS = 5        # in a row, then back
ROLL_BACKS = 3   # then stop


def last_words(reason, folder, step):
    """What a run says that does not recover. step: the newest in `folder`, or None."""
    remedy = "Nothing was saved yet: try again with a lower --learning_rate" if step is None else (
        f"Step {step} is in {folder}: bash emergency_training.sh {folder} goes on from it with safe settings")
    return f"stopping, for the run does not recover; last seen: {reason}. {remedy}"


class Guard:
    def __init__(self):
        self.losses, self.norms = deque(maxlen=MEMORY), deque(maxlen=MEMORY)
        self.bad = []        # what was wrong with each of the batches skipped in a row
        self.roll_backs = 0

    def state_dict(self):
        return {"losses": list(self.losses), "norms": list(self.norms), "bad": list(self.bad), "roll_backs": self.roll_backs}

    def load_state_dict(self, state):
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.bad, self.roll_backs = list(state["bad"]), state["roll_backs"]

    def verdict(self, loss, norm):
        """(verdict, reason). loss and norm: floats of this step, the same on every rank."""
        reason = self._reason("loss", loss, self.losses) or self._reason("gradient norm", norm, self.norms)
        if not reason:  # only what was found good moves the medians
            self.losses.append(loss)
            self.norms.append(norm)
            self.bad.clear()
            return "ok", ""
        self.bad.append(reason)
        if len(self.bad) < SKIPS:
            return "skip", reason
        self.bad.clear()
        self.roll_backs += 1
        return "roll back" if self.roll_backs <= ROLL_BACKS else "stop", reason

    def _reason(self, name, value, past):
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(past) >= WARM_UP and value > SPIKE * statistics.median(past):
            return f"{name} is {value:.3g}, of late {statistics.median(past):.3g}"
        return None
