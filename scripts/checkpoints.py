"""The checkpoints of a run: list, verify, prune, rescue.

    python -m scripts.checkpoints                # the folder of the checkpoint that was saved last
    python -m scripts.checkpoints DIR            # each step: size, validation, complete or why not
    python -m scripts.checkpoints DIR --verify   # reads every file and compares its hash
    python -m scripts.checkpoints DIR --prune    # deletes what a run would not have kept
    python -m scripts.checkpoints DIR --rescue   # resumes training, with safe settings

emergency_training.sh calls the last one; docs/numerical_stability.md describes it.
"""
import argparse
import os
import sys
from pathlib import Path

from nanochat.checkpoint import damaged_files, list_steps, meta_file, verify_files
from nanochat.checkpoint_manager import (
    FOLDERS,
    KEEP,
    checkpoint_dir,
    lock_folder,
    newest_meta,
    print_incomplete,
    prune,
)
from nanochat.common import UserError, expand_home, install_error_hook, print0

# the stages that can be resumed
RESCUABLE = ("base_train", "mid_train", "chat_sft")
# the settings of a rescued run, besides half the learning rate
SAFE = {"grad_clip": 1.0, "compile": False, "save_minutes": 2.0}


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="python -m scripts.checkpoints",
        description="List the checkpoints of a folder.",
    )
    parser.add_argument(
        "dir",
        nargs="?",
        help="a folder of checkpoints; without one, that of the checkpoint saved last",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file and compare its hash; damage ends with status 1",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help=f"delete all but the newest {KEEP}, the best, and the one before LR decay",
    )
    parser.add_argument(
        "--rescue",
        action="store_true",
        help="resume training from the newest step, with safe settings",
    )
    return parser.parse_args()


def chosen_folder(name):
    """The named folder, or that of the checkpoint saved last. UserError if it is no folder."""
    newest = newest_meta(*FOLDERS)
    if name:
        dir = Path(expand_home(name, "write the whole path")).absolute()
    elif newest:
        dir = newest.parent
    else:
        dir = checkpoint_dir("base", "d4")
    if not dir.is_dir():
        raise UserError(f"{dir} is not a folder: name one that holds checkpoints")
    return dir


def print_steps(dir, verify):
    """One line for each step of `dir`. Returns whether `verify` found one that cannot be used."""
    steps = list_steps(dir)
    if not steps:
        print(f"no checkpoint in {dir}")
    damage = False
    for number, meta, problem in steps:
        if problem:
            damage = True
            print(f"{number:8d}  {'':>10}  {'':>8}  not to be used: {problem}")
            continue
        damaged = verify_files(dir, meta, list(meta["files"])) if verify else []
        damage = damage or bool(damaged)
        size = sum((dir / name).stat().st_size for name in meta["files"])
        bpb = f"{meta['val_bpb']:.4f}" if meta.get("val_bpb") else ""
        state = state_of(meta, damaged, verify)
        print(f"{number:8d}  {size / 1e6:7.1f} MB  {bpb:>8}  {state}")
    return damage and verify


def state_of(meta, damaged, verified):
    """What is known of a complete step, such as 'verified, finished'."""
    if damaged:
        words = [f"DAMAGED: {', '.join(damaged)}"]
    else:
        words = ["verified" if verified else "complete"]
    if meta.get("finished"):
        words.append("finished")
    if meta.get("before_decay"):
        words.append("before LR decay")
    return ", ".join(words)


def newest_undamaged(dir):
    """The meta of the newest step of `dir` whose files all have their hash, or None."""
    steps = list_steps(dir)
    print_incomplete(dir, steps)
    for _, meta, problem in reversed(steps):
        if problem:
            continue
        if not damaged_files(dir, meta, list(meta["files"])):
            return meta
    return None


def safe_settings(settings):
    """What a rescued run changes in the settings of the run before.

    The learning rate is halved once: a run that already has the safe settings keeps its own.
    """
    already_safe = SAFE.items() <= settings.items()
    divisor = 1 if already_safe else 2
    return {**SAFE, "learning_rate": settings["learning_rate"] / divisor}


def rescue(dir):
    """Resume, in this process, the stage that wrote `dir` from its newest undamaged step.

    All its settings stay but those of safe_settings. Does not return.
    """
    meta = newest_undamaged(dir)
    if meta is None or meta.get("finished") or "settings" not in meta:
        raise UserError(
            f"no unfinished run has a whole checkpoint in {dir}: name the folder of another run"
        )

    before = meta["settings"]
    is_ours = meta.get("stage") in RESCUABLE and isinstance(before.get("learning_rate"), float)
    if not is_ours:
        raise UserError(
            f"step {meta['step']} of {dir} is of no stage that can be resumed "
            f"({', '.join(RESCUABLE)}): name the folder of another run"
        )

    # 1) its settings
    changed = safe_settings(before)
    settings = {
        **before,
        **changed,
        "resume": False,
        "extend": None,
        "resume_from_checkpoint": str(dir / meta_file(meta["step"])),
    }
    words = []
    for name, value in settings.items():
        if value not in (None, ""):
            words.append(f"--{name}={value}")

    # 2) as many ranks as saved the step
    launcher = ["-m", f"scripts.{meta['stage']}"]
    ranks = meta["world_size"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher = [*torchrun, *launcher, "--"]

    # 3) start
    changes = [f"{name}={value} (was {before.get(name)})" for name, value in changed.items()]
    print0(
        f"resuming from step {meta['step']} of {dir} with {', '.join(changes)}. "
        "Ctrl+C saves; the same command resumes"
    )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save, for torchrun
    os.execv(sys.executable, [sys.executable, *launcher, *words])


def main():
    options = parse_arguments()
    dir = chosen_folder(options.dir)
    if options.rescue:
        rescue(dir)
    if options.prune:
        lock = lock_folder(dir, 0)
        deleted = ", ".join(str(step) for step in prune(dir))
        lock.close()
        print(f"deleted steps: {deleted or 'none'}")
    damage = print_steps(dir, options.verify)
    raise SystemExit(int(damage))


if __name__ == "__main__":
    install_error_hook()
    main()
