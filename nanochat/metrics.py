"""Numbers for machines: a run's log.jsonl, the loggers, and the JSON line that ends every stage.

$NANOCHAT_BASE_DIR/metrics.jsonl collects the JSON lines of all stages, so that no shell script has
to search a log.
"""
import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from nanochat.common import UserError, atomic_write, get_base_dir, get_dist_info, print0


def machine():
    """What this run ran on, as a dict for the record."""
    from nanochat.hardware import available_cpus, cpu_name, instruction_set, memory_gb
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "isa": instruction_set(),
        "cores": available_cpus(),
        "memory_gb": memory_gb(),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit():
    """The commit of these sources as git describes it, with -dirty where files were changed; None
    outside of a repository. That is what lies there when a stage ends."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def append_metrics(row):
    """Append one record, a dict, to $NANOCHAT_BASE_DIR/metrics.jsonl."""
    with open(get_base_dir() / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def open_log(folder, step):
    """folder/log.jsonl, open for appending the records after `step`.

    Records beyond `step`, which an interrupted run wrote after the checkpoint that is resumed, are
    removed. step 0 starts an empty log.
    """
    path = folder / "log.jsonl"
    lines = []
    if step and path.exists():
        # Without the last item: it is empty, or a record that a crash cut short.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]

    kept = []
    for line in lines:
        if json.loads(line)["step"] > step:
            break
        kept.append(line + "\n")
    atomic_write(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# loggers: each opener returns a function (step, numbers), or raises ImportError where the package
# is not installed and LoggerError where it cannot start

class LoggerError(Exception):
    """Why a logger that is installed cannot start."""


@contextlib.contextmanager
def _nobody_answers():
    """Standard input is empty meanwhile: a package that finds no terminal there asks no question,
    and a training run does not wait for the answer."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def _open_wandb(folder, settings):
    import wandb
    try:
        with _nobody_answers():  # without a key, wandb would ask for one
            run = wandb.init(
                project="nanochat",
                name=folder.name,
                config=settings,
                dir=folder,
            )
    except (wandb.errors.Error, ValueError) as error:  # ValueError: of a key that cannot be one
        raise LoggerError(" ".join(str(error).split())) from error
    return lambda step, numbers: run.log(numbers, step=step)


def _open_tensorboard(folder, settings):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder / "tensorboard")

    def log(step, numbers):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
    return log


LOGGERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}


def open_logger(name, folder, settings):
    """A function (step, row) that sends the numbers in a log record to tensorboard or wandb.

    name: tensorboard, wandb or "" (the function then does nothing, as on every rank but 0).
    folder: the checkpoint folder, a Path; both loggers keep their files in it.
    settings: what configure() returned, for wandb's page of the run.
    Where the package is not installed or cannot start, one line says so and the run continues.
    """
    if name and name not in LOGGERS:
        raise UserError(f"logger={name} is not supported: choose tensorboard or wandb, or none")
    if not name or get_dist_info()[1] != 0:
        return lambda step, row: None

    try:
        log = LOGGERS[name](folder, settings)
    except (ImportError, LoggerError) as error:
        problem = "is not installed"
        if isinstance(error, LoggerError):
            problem = f"cannot start ({error})"
        print0(f"{name} {problem}, continuing without it "
               f"(log.jsonl in {folder} has the same numbers)")
        return lambda step, row: None

    def send(step, row):
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        log(step, numbers)
    return send


def wilson_interval(share, items):
    """(low, high): the 95 % interval of a share that was measured on so many items, from 0 to 1.

    Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which also holds near 0 and 1.

    >>> [round(bound, 3) for bound in wilson_interval(0.985, 200)]
    [0.957, 0.995]
    """
    z = 1.96  # standard deviations on each side
    scale = 1 + z * z / items
    centre = (share + z * z / (2 * items)) / scale
    variance = share * (1 - share) / items + z * z / (4 * items * items)
    half = z * math.sqrt(variance) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def finish_stage(stage, seconds, settings, **fields):
    """End a stage: one JSON line at column 0 of standard output, and the same in metrics.jsonl.

    seconds: wall clock of the whole stage. settings: what configure() returned. fields: the stage's
    own results. Only rank 0 writes. "run" names the speedrun that the stage belongs to, so that a
    second call of speedrun.sh knows what is done.
    """
    if get_dist_info()[1] != 0:
        return
    row = {
        "stage": stage,
        "seconds": round(seconds, 2),
        "machine": machine(),
        "settings": settings,
        "commit": commit(),
        **fields,
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "run": os.environ.get("NANOCHAT_RUN"),
    }
    append_metrics(row)
    print(json.dumps(row), flush=True)
