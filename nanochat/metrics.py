"""Numbers for machines: a run's log.jsonl, the loggers, and the JSON line with which every stage ends.

$NANOCHAT_BASE_DIR/metrics.jsonl has the last line of every stage; no shell script greps a log.
"""
import datetime
import json
import os
import platform

from nanochat.common import UserError, atomic_write, get_base_dir, get_dist_info, print0


def machine():
    """What this run ran on, for the record."""
    from nanochat.hardware import cpu_name, instruction_set, memory_gb
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "isa": instruction_set(), "cores": os.cpu_count(), "memory_gb": memory_gb(), "gpus": gpus,
            "python": platform.python_version(), "torch": torch.__version__}


def append_metrics(row):
    with open(get_base_dir() / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def open_log(folder, step):
    """folder/log.jsonl, open for rows after `step`. What an interrupted run wrote beyond the step from which we go on is cut off."""
    path, kept = folder / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if step and path.exists() else []:
        if json.loads(line)["step"] > step:
            break
        kept.append(line + "\n")
    atomic_write(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


def open_logger(name, folder, settings):
    """A function (step, row) that shows a row's numbers in tensorboard (in `folder`) or wandb, or that does nothing.

    name: tensorboard, wandb or empty. Where the program is not installed one line says so, and the run goes on.
    """
    if name not in ("", "tensorboard", "wandb"):
        raise UserError(f"logger={name} is not supported: choose tensorboard or wandb, or none")
    if not name or get_dist_info()[1] != 0:
        return lambda step, row: None

    def numbers(row):
        return {key: value for key, value in row.items() if isinstance(value, (int, float))}

    try:
        if name == "wandb":
            import wandb
            run = wandb.init(project="nanochat", name=folder.name, config=settings)
            return lambda step, row: run.log(numbers(row), step=step)
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")
        return lambda step, row: [writer.add_scalar(key, value, step) for key, value in numbers(row).items()]
    except ImportError:
        print0(f"{name} is not installed, going on without it (log.jsonl in {folder} has the same numbers)")
        return lambda step, row: None


def finish_stage(stage, seconds, settings, **fields):
    """End a stage: one JSON line at column 0 of standard output, and the same line in $NANOCHAT_BASE_DIR/metrics.jsonl.

    seconds: wall clock of the whole stage. settings: what configure() returned. Rank 0 only. A stage of a speedrun names the run,
    so that a second call of speedrun.sh knows what is done.
    """
    if get_dist_info()[1] != 0:
        return
    row = {"stage": stage, "seconds": round(seconds, 2), "machine": machine(), "settings": settings, **fields,
           "time": datetime.datetime.now().isoformat(timespec="seconds"), "run": os.environ.get("NANOCHAT_RUN")}
    append_metrics(row)
    print(json.dumps(row), flush=True)
