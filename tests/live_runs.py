"""Made-up runs, and the live page of what is in a base directory: for test_live.py and
test_live_page.py."""
import contextlib
import json
import os
import threading
import time

from nanochat.checkpoint import model_file, write_meta
from nanochat.common import sha256
from nanochat.folders import FOLDERS
from nanochat.http_guard import listen
from nanochat.live import Follower, LiveServer, create_app

STEP_SECONDS, STEP_TOKENS = 2.0, 100


def opening(stage="base_train", step=0, origin=None, run="r1", **horizon):
    """The line that begins a log. horizon: 40 steps where nothing is said."""
    horizon = {"num_iterations": None, "minutes": None, "max_steps": None, **horizon}
    if not any(horizon.values()):
        horizon["num_iterations"] = 40
    place = {"step": step, "tokens": STEP_TOKENS * step, "seconds": STEP_SECONDS * step}
    return {**place, "stage": stage, "run": run, "origin": origin, "horizon": horizon}


def steps(first, last, loss=None):
    """The lines of some steps. Their losses fall from 5, unless another is given."""
    lines = []
    for step in range(first, last + 1):
        lines.append({
            "step": step,
            "tokens": STEP_TOKENS * step,
            "seconds": STEP_SECONDS * step,
            "loss": 5 - step / 100 if loss is None else loss,
            "lr": 0.02,
        })
    return lines


def validation(step, bpb, documents=30):
    return {"step": step, "val_bpb": bpb, "documents": documents}


def samples(step, prompt, text):
    return {"step": step, "samples": [{"prompt": prompt, "text": text}]}


class MadeRun:
    """A run's folder in a base directory, whose log is written line by line."""

    def __init__(self, base, tag="d4", source="base"):
        self.folder = base / FOLDERS[source] / tag
        self.folder.mkdir(parents=True)
        self.log = self.folder / "log.jsonl"

    def write(self, *lines):
        """Append lines; a str is written as it is, without the end of a line."""
        with open(self.log, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(line if isinstance(line, str) else json.dumps(line) + "\n")
        return self

    def age(self, seconds=1000):
        """The log was last written so long ago."""
        then = time.time() - seconds
        os.utime(self.log, (then, then))
        return self

    def save(self, step, finished):
        """A complete step, whose weights are an empty file."""
        weights = self.folder / model_file(step)
        weights.touch()
        meta = {"step": step, "saved": time.time(), "world_size": 1, "format": 3}
        files = {weights.name: sha256(weights)}
        write_meta(self.folder, {**meta, "files": files, "finished": finished})
        return self


@contextlib.contextmanager
def serve(name=None):
    """The live page on a free port; yields its address."""
    with listen("127.0.0.1", 0) as listener:
        server = LiveServer(create_app(Follower(name)))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
