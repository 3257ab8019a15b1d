"""A live page that follows a run while it trains.

    python -m nanochat.report --serve           # whatever trains in $NANOCHAT_BASE_DIR
    python -m nanochat.report --serve d4        # the stages of this tag
    python -m nanochat.report --serve FOLDER    # or one folder that holds a run's log.jsonl

    log.jsonl -> Log (read as it grows) -> Follower (which run, and where it stands) -> the page

It reads what training writes anyway, log.jsonl beside the checkpoints and metrics.jsonl: it
measures nothing, and writes nothing. Of a log that grows, only what is new is read. Every text of
the page but its headings is made here; nanochat/live.html asks for it every two seconds and draws
the curves.
"""
import json
import math
import os
import time
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from nanochat.checkpoint import complete_metas
from nanochat.common import UserError, get_base_dir, print0
from nanochat.folders import FOLDERS, STAGES, checkpoint_dir, is_locked, source_of
from nanochat.http_guard import (
    READING,
    Access,
    GuardedProtocol,
    has_two_framings,
    is_loopback,
    listen,
    load_page,
)
from nanochat.openai_api import ApiError
from nanochat.plan import Horizon
from nanochat.plots import smooth
from nanochat.records import (
    NOT_OF_A_RUN,
    comparable,
    duration,
    measured_bpb,
    percent,
    read_jsonl,
    si,
)
from nanochat.start import shared_name

POINTS = 400            # of a curve on the page; of a longer run, each is the mean of some steps
PACE_STEPS = 20         # the speed is that of the last steps
SETTLE_SECONDS = 10     # a log that was written so recently grows, whether or not locks are offered
SAMPLES = 3             # of a prompt, the newest ones
NOTES = 6               # the newest batches that were left out and stages that began
BEFORE_TRAINING = ("dataset", "tok_train")  # their records name no checkpoint


# --------------------------------------------------------------------------------------------------
# a log that grows

class Step(NamedTuple):
    """A step of training, as the log tells it."""
    step: int
    seconds: float      # of training until then
    tokens: int
    loss: float


def is_number(value):
    """Whether a value of a log is a number that can be drawn: neither NaN nor a bool."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value)


def log_in(folder):
    """The path of the log of the run in a folder."""
    return Path(folder) / "log.jsonl"


class Log:
    """A log.jsonl, read as it grows. A line that is half written waits for its other half.

    opening   the newest line that says what the run is and where it ends; {} in older logs
    steps     [Step]
    others    the lines that are no steps: validations, samples, batches that were left out
    newest    the newest of all lines
    age       seconds since the last line was written; None where there is no log

    A run that resumes puts another file in its place, which is then read from its beginning. Steps
    that are taken once more, after a roll back, count once, as in records.training_log(); that
    batches were left out is remembered.
    """

    def __init__(self, folder):
        self.path = log_in(folder)
        self._begin(None)

    def _begin(self, identity):
        self.identity, self.offset = identity, 0
        self.opening, self.steps, self.others = {}, [], []
        self.newest, self.last_step, self.age = {}, 0, None

    def read(self):
        """Take in what was written since the last call."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            self._begin(None)
            return
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            if identity != self.identity or status.st_size < self.offset:
                self._begin(identity)
            file.seek(self.offset)
            data = file.read()
        self.age = max(0.0, time.time() - status.st_mtime)
        whole = data[:data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.split(b"\n"):
            self._add(line)

    def _add(self, line):
        try:
            entry = json.loads(line)
        except ValueError:
            return  # empty, or cut short by a crash
        if not isinstance(entry, dict) or not is_number(entry.get("step")):
            return
        if entry["step"] < self.last_step:
            self._roll_back(entry["step"])
        self.newest, self.last_step = entry, entry["step"]
        if "horizon" in entry:
            self.opening = entry
        elif is_number(entry.get("loss")):
            numbers = [entry.get(name) or 0 for name in Step._fields]
            self.steps.append(Step(*numbers))
        elif "loss" not in entry:
            self.others.append(entry)

    def _roll_back(self, step):
        """Forget what came from this step on: it is taken once more."""
        self.steps = [earlier for earlier in self.steps if earlier.step < step]
        self.others = [
            earlier for earlier in self.others if earlier["step"] < step or "skipped" in earlier
        ]


def first_line(folder):
    """The opening of the log in a folder: {} where it has none."""
    try:
        with open(log_in(folder), encoding="utf-8") as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    is_opening = isinstance(entry, dict) and "horizon" in entry
    return entry if is_opening else {}


# --------------------------------------------------------------------------------------------------
# which run

def folders_of(name):
    """The folders that may hold what is to be followed. name: a path, a tag, or None for all."""
    if name is None:
        return sorted(path for source in FOLDERS for path in checkpoint_dir(source, "").glob("*"))
    if is_path(name):
        return [Path(name).absolute()]
    return [checkpoint_dir(source, name) for source in FOLDERS]


def is_path(name):
    """Whether the name of a run is that of a folder; else it is a tag."""
    return os.sep in name or log_in(name).is_file()


def written_at(path):
    """When a file was written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def choose_folder(folders):
    """(the folder to follow or None, the others that train now).

    What trains now comes first, and of several runs the one that began last; else the one that has
    written last.
    """
    # the lock is written when a run begins, and never again
    training = {folder: written_at(folder / ".lock") for folder in folders if is_locked(folder)}
    ended = {folder: written_at(log_in(folder)) for folder in folders}
    for times in (training, ended):
        newest = max(times, key=times.get, default=None)
        if newest is not None and times[newest]:
            return newest, [folder for folder in training if folder != newest]
    return None, []


def lineage(folder):
    """The folder, that of the model which its run started from, and so on to pretraining."""
    found = [folder]
    origin = first_line(folder).get("origin")
    while origin:
        place = Path(origin[0])
        if not place.is_dir():  # the base directory has moved
            place = folder.parent.parent.joinpath(*place.parts[-2:])
        if place in found:
            break
        found.append(place)
        origin = first_line(place).get("origin")
    return found


def finished_records(records, folder, run):
    """The last record of every stage of this run, in the order in which they ended.

    A run's are those of its own checkpoints and of the ones that it started from, and how its text
    and tokenizer were made. records: of metrics.jsonl; run: its name in the log.
    """
    names = {shared_name(path) for path in lineage(folder)}
    found = {}
    for record in records:
        stage, checkpoint = record.get("stage"), record.get("checkpoint")
        is_before = stage in BEFORE_TRAINING and record.get("run") in (None, run)
        is_own = checkpoint and shared_name(checkpoint) in names
        if stage in NOT_OF_A_RUN or not (is_before or is_own):
            continue
        found.pop(stage, None)  # so that a repeated stage moves to the end
        found[stage] = record
    return list(found.values())


class Metrics:
    """The records of metrics.jsonl, read again when the file has changed."""

    def __init__(self):
        self.stamp, self.records = None, []

    def read(self, path):
        """[record]; [] where there is no file."""
        try:
            status = path.stat()
        except OSError:
            return []
        stamp = path, status.st_mtime_ns, status.st_size
        if stamp != self.stamp:
            self.stamp, self.records = stamp, read_jsonl(path)
        return self.records


# --------------------------------------------------------------------------------------------------
# where a run stands

def state_of(folder, log):
    """"starting", "training", "finished", "diverged" or "stopped"."""
    if is_locked(folder):
        return "training" if log.steps else "starting"
    metas = complete_metas(folder)
    if metas and metas[-1].get("finished"):
        return "finished"
    if has_diverged(log):
        return "diverged"
    grows = log.age is not None and log.age < SETTLE_SECONDS
    return "training" if grows and log.steps else "stopped"


def has_diverged(log):
    """Whether the log ends with a batch behind which the guard stopped the run, or wanted to roll
    it back and found no checkpoint."""
    return log.newest.get("verdict") in ("stop", "roll back")


def horizon_of(log):
    """The Horizon of a run, None where its log does not tell."""
    given = log.opening.get("horizon") or {}
    horizon = Horizon(*[given.get(name) for name in Horizon._fields])
    return horizon if horizon.num_iterations or horizon.minutes else None


# How fast the last steps were.
Pace = namedtuple("Pace", "seconds_per_step tokens_per_second")


def pace_of(steps):
    """The Pace of the last steps, None before there are two."""
    if len(steps) < 2:
        return None
    first, last = steps[-PACE_STEPS - 1:][0], steps[-1]
    seconds = last.seconds - first.seconds
    if seconds <= 0 or last.step == first.step:
        return None
    return Pace(seconds / (last.step - first.step), (last.tokens - first.tokens) / seconds)


WAITING = (
    "Nothing has trained {where} yet. This page waits for it: bash speedrun.sh or "
    "python -m scripts.base_train begins a run."
)
SENTENCES = {
    "starting": "{stage} of {tag} has begun; its first step is being prepared.",
    "training": "{stage} of {tag} is training.",
    "resumed": "{stage} of {tag} is training, resumed at step {resumed}.",
    "evaluated": "{stage} of {tag} has taken its last step and is being evaluated.",
    "finished": "{stage} of {tag} has finished, after {step} steps.",
    "diverged": "{stage} of {tag} has diverged at step {step}. bash emergency_training.sh resumes "
                "it with safe settings.",
    "stopped": "{stage} of {tag} does not run any more: it ended at step {step}, before its time. "
               "The same command with --resume resumes it.",
}


def is_at_its_end(log, horizon):
    """Whether training has taken its last step, as far as the log tells."""
    if horizon is None or len(log.steps) < 2:
        return False
    before, last = log.steps[-2:]
    return horizon.is_used(last.step, last.seconds, last.seconds - before.seconds)


def sentence(state, log, folder, is_at_end):
    """What becomes of the run, in words that change only when that does."""
    kind = state
    resumed = log.opening.get("step")
    if state == "training" and resumed:
        kind = "resumed"
    if state == "training" and is_at_end:
        kind = "evaluated"
    script = STAGES[source_of(folder)].rpartition(".")[2]
    return SENTENCES[kind].format(
        stage=log.opening.get("stage") or script,
        tag=folder.name,
        step=log.last_step,
        resumed=resumed,
    )


# --------------------------------------------------------------------------------------------------
# what the page shows

def thinned(steps):
    """[(step, mean loss)]: at most POINTS of them, each of as many steps."""
    each = math.ceil(len(steps) / POINTS)
    points = []
    for first in range(0, len(steps), each or 1):
        some = steps[first:first + each]
        points.append((some[-1].step, sum(one.loss for one in some) / len(some)))
    return points


def loss_curve(steps):
    """What the page draws of the loss: the points, and their smoothed course."""
    points = thinned(steps)
    means = smooth([loss for _, loss in points])
    return {
        "name": "Loss",
        "unit": "nats per token",
        "points": points,
        "smooth": [(step, mean) for (step, _), mean in zip(points, means)],
    }


def validation_curve(log):
    """What the page draws of the validations: bits per byte, or of reinforcement learning the right
    answers to held-out questions."""
    entries = [entry for entry in log.others if is_number(measured_bpb(entry))]
    # the second of a step is of an earlier one, which is better and becomes the model
    by_step = {entry["step"]: entry for entry in reversed(comparable(entries))}
    measured = sorted(by_step.values(), key=lambda entry: entry["step"])
    if measured:
        is_bound = measured[-1].get("val_bpb") is None
        documents = measured[-1].get("documents")
        return {
            "name": "A bound on bits per byte" if is_bound else "Bits per byte",
            "unit": f"of {documents} validation documents" if documents else "of validation text",
            "points": [(entry["step"], measured_bpb(entry)) for entry in measured],
        }
    answered = [entry for entry in log.others if is_number(entry.get("accuracy"))]
    return {
        "name": "Right answers",
        "unit": "per cent of held-out questions",
        "points": [(entry["step"], 100 * entry["accuracy"]) for entry in answered],
    }


def curves_of(log, validation):
    """What the page draws: the loss, of reinforcement learning the rewards, and the validations.

    validation: of validation_curve().
    """
    rewards = [entry for entry in log.others if is_number(entry.get("reward"))]
    reward = {
        "name": "Reward",
        "unit": "mean of the answers of a step",
        "points": [(entry["step"], entry["reward"]) for entry in rewards],
    }
    curves = [loss_curve(log.steps), reward, validation]
    return [curve for curve in curves if curve["points"]]


def last_step_of(horizon, last, pace):
    """The step at which a run ends, or None where at this pace its minutes end it before."""
    if horizon.num_iterations or not horizon.max_steps or not pace:
        return horizon.num_iterations
    seconds = (horizon.max_steps - last.step) * pace.seconds_per_step
    is_first = seconds <= 60 * horizon.minutes - last.seconds
    return horizon.max_steps if is_first else None


def tiles_of(log, horizon, validation, is_over):
    """[(label, value)]: where the run stands, in numbers as people read them."""
    last, pace = log.steps[-1], pace_of(log.steps)
    of_steps = horizon and last_step_of(horizon, last, pace)
    tiles = [("step", f"{last.step} of {of_steps}" if of_steps else str(last.step))]
    if not is_over:
        left = None
        if horizon and pace:
            left = horizon.seconds_left(last.step, last.seconds, pace.seconds_per_step)
        tiles.append(("time left", "unknown" if left is None else duration(left)))
    tiles.append(("time trained", duration(last.seconds)))
    tiles.append(("tokens/s", si(pace and pace.tokens_per_second)))
    tiles.append(("tokens", si(last.tokens)))
    tiles.append(("loss", f"{smooth([step.loss for step in log.steps[-POINTS:]])[-1]:.3f}"))
    if validation["points"]:
        tiles.append((validation["name"].lower(), f"{validation['points'][-1][1]:.3f}"))
    return tiles


def samples_of(log):
    """[{"prompt", "texts": [[step, text], ...]}]: what the model said last, the newest first."""
    by_prompt = {}
    for entry in reversed(log.others):
        for sample in entry.get("samples") or ():
            texts = by_prompt.setdefault(sample["prompt"], [])
            if len(texts) < SAMPLES:
                texts.append((entry["step"], sample["text"]))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def notes_of(log):
    """[[step, what happened]], the newest first."""
    notes = []
    for entry in log.others:
        if entry.get("skipped"):
            notes.append((entry["step"] + 1, f"{entry['skipped']}: {entry.get('verdict')}"))
        elif entry.get("curriculum_stage"):
            words = f"stage {entry['curriculum_stage']} begins, of {entry.get('length')} tokens"
            notes.append((entry["step"] + 1, words))
    return notes[:-NOTES - 1:-1]


def result_of(record):
    """The figure that a finished stage ended with, in words."""
    bpb = measured_bpb(record)
    if bpb is not None:
        return f"{'' if record.get('val_bpb') is not None else 'at most '}{bpb:.4f} bits per byte"
    if isinstance(record.get("accuracy"), dict):
        return ", ".join(f"{task} {percent(share)}" for task, share in record["accuracy"].items())
    if record.get("accuracy_after") is not None:
        return f"{percent(record['accuracy_after'])} right"
    if record.get("vocab_size"):
        return f"{record['vocab_size']} tokens in the vocabulary"
    return ""


def finished_rows(records):
    """Rows of the table of stages that have finished: stage, steps, time, tokens/s, result."""
    rows = []
    for record in records:
        speed = record.get("tokens_per_second")
        rows.append((
            record["stage"],
            si(record["steps"]) if record.get("steps") is not None else "",
            duration(record.get("seconds") or 0),
            si(speed) if speed else "",
            result_of(record),
        ))
    return rows


class Follower:
    """Follows one run: what state() returns is all that the page knows.

    name: a path or a tag; None: whatever trains in the base directory.
    """

    def __init__(self, name=None):
        self.name = name
        self.log = None
        self.metrics = Metrics()

    @property
    def where(self):
        """What is followed, in words."""
        if self.name is None:
            return f"in {get_base_dir()}"
        return f"in {self.name}" if is_path(self.name) else f"as {self.name}"

    def state(self):
        """A dict of the page's texts and numbers."""
        folder, others = choose_folder(folders_of(self.name))
        if folder is None:
            return {
                "state": "waiting",
                "words": WAITING.format(where=self.where),
                "here": [shared_name(run) for run in folders_of(None) if written_at(log_in(run))],
            }
        if self.log is None or self.log.path.parent != folder:
            self.log = Log(folder)
        self.log.read()
        state = state_of(folder, self.log)
        return {**self._course(folder, state), **self._surroundings(folder, others)}

    def _course(self, folder, state):
        """Where the run stands."""
        log, horizon = self.log, horizon_of(self.log)
        last = log.steps[-1] if log.steps else None
        progress = horizon and last and horizon.progress(last.step, last.seconds)
        if state == "finished":
            progress = 1    # also where it had enough before its time
        shown = {
            "state": state,
            "words": sentence(state, log, folder, is_at_its_end(log, horizon)),
            "progress": progress and min(1, progress),
            "age": log.age and duration(log.age),
            "notes": notes_of(log),
            "samples": samples_of(log),
        }
        if last:
            validation = validation_curve(log)
            shown["tiles"] = tiles_of(log, horizon, validation, state != "training")
            shown["curves"] = curves_of(log, validation)
        return shown

    def _surroundings(self, folder, others):
        """What is told beside the run itself."""
        records = self.metrics.read(folder.absolute().parent.parent / "metrics.jsonl")
        finished = finished_records(records, folder, self.log.opening.get("run"))
        return {
            "tag": folder.name,
            "folder": str(folder),
            "finished": finished_rows(finished),
            "others": [shared_name(other) for other in others],
        }


# --------------------------------------------------------------------------------------------------
# the server

class Guard:
    """The application behind what every request must pass: it comes from this machine's own page.

    A page from elsewhere is refused, and so is a foreign name that was pointed at this machine by
    DNS (http_guard.py).
    """

    def __init__(self, app, access):
        self.app, self.access = app, access

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http":
            answer = self._refusal(scope) or self.app
        await answer(scope, receive, send)

    def _refusal(self, scope):
        """The response to a request that goes no further, or None."""
        if has_two_framings(scope):
            return PlainTextResponse("send no body\n", 400, {"Connection": "close"})
        try:
            self.access.check_host(scope)
            self.access.check_origin(scope)
        except ApiError as error:
            port = scope["server"][1]
            words = f"this page is for this machine alone: open http://127.0.0.1:{port}\n"
            return PlainTextResponse(words, error.status)
        return None


def create_app(follower, access=None):
    """The application, to be served by uvicorn: GET / (the page) and GET /state (its numbers)."""
    page, page_headers = load_page("live.html")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.api_route("/", methods=READING)
    async def index():
        return HTMLResponse(page, headers=page_headers)

    # not in a thread: two pages must not read the same log at the same time
    @app.api_route("/state", methods=READING)
    async def state():
        status = 200
        try:
            told = follower.state()
        except (OSError, UserError) as error:
            status, told = 500, {"error": str(error)}
        # in ASCII: half a character, which UTF-8 lacks, is written as its escape
        text = json.dumps(told)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(text, status, headers, "application/json")

    return Guard(app, access or Access())


class LiveServer(uvicorn.Server):
    """Serves the page until SIGINT or SIGTERM."""

    def __init__(self, app):
        super().__init__(uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        ))

    def handle_exit(self, sig, frame):
        """A signal came. uvicorn's own way would raise it again at the end, and exit with it."""
        self.should_exit = True


def run(names, settings):
    """Serve the page. names: of one run, or none. settings: those of report.py."""
    if len(names) > 1:
        raise UserError(f"--serve follows one run, these are {len(names)}: name one, or none for "
                        "whatever trains now")
    host = settings["host"]
    if not is_loopback(host):
        raise UserError(f"host={host} lets others on the network read the run: leave --host out, "
                        "and from elsewhere use ssh -L 8001:127.0.0.1:8001 THIS_MACHINE")
    follower = Follower(*names)
    folders = folders_of(follower.name)     # refuses a name that can be none
    with listen(host, settings["port"]) as listener:
        port = listener.getsockname()[1]
        print0(f"open http://127.0.0.1:{port} to follow what trains {follower.where}; "
               "Ctrl+C ends the page")
        if not any(written_at(log_in(folder)) for folder in folders):
            print0(WAITING.format(where=follower.where))
        LiveServer(create_app(follower, Access(host))).run(sockets=[listener])
