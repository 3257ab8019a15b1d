"""The protocol of a training run: what every training stage does around its loop."""
import signal

from nanochat.common import print0


class StopRequest:
    """Ctrl+C or SIGTERM asks the loop to stop at its next step; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

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


def how_to_go_on(settings):
    """What a stage says when it was stopped and has saved."""
    named = [f"--{name}" for name in ("resume_from_checkpoint", "extend") if settings.get(name) is not None]
    return f"the same command with --resume {'in place of ' + named[0] + ' ' if named else ''}goes on"
