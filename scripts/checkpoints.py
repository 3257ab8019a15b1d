"""The models that are there, and the checkpoints of a run: list, verify, prune, rescue.

    python -m scripts.checkpoints                # every model: stage, tag, step, data, size
    python -m scripts.checkpoints DIR            # each step: size, validation, complete or why not
    python -m scripts.checkpoints DIR --verify   # reads every file and compares its hash
    python -m scripts.checkpoints DIR --prune    # deletes what a run would not have kept
    python -m scripts.checkpoints DIR --rescue   # resumes training, with safe settings

A finished model is deleted by --prune --finished alone, and by no training run. Without DIR,
--verify and --rescue take the folder of the checkpoint that was saved last.
emergency_training.sh calls the last one; docs/numerical_stability.md describes it.
"""
import argparse
import datetime
import os
import sys
from pathlib import Path

import torch

from nanochat.checkpoint import (
    complete_metas,
    damaged_files,
    list_steps,
    meta_file,
    verify_files,
)
from nanochat.checkpoint_manager import (
    KEEP,
    delete_step,
    is_evaluated,
    lock_folder,
    print_incomplete,
    steps_to_delete,
    validation_bpb,
)
from nanochat.common import UserError, expand_home, get_base_dir, install_error_hook, print0
from nanochat.folders import FOLDERS, checkpoint_dir, list_models, newest_meta
from nanochat.passage_store import is_undamaged

# the stages that can be resumed
RESCUABLE = ("base_train", "mid_train", "chat_sft", "chat_rl")
# the settings of a rescued run, besides half the learning rate
SAFE = {"grad_clip": 1.0, "compile": False, "save_minutes": 2.0}

# stage, tag, step, state, when it was saved, bits per byte, a diffusion model's bound on them, the
# best step's, size, data
ROW = "{:5}  {:24} {:>6}  {:10}  {:16}  {:>7}  {:>7}  {:14}  {:>10}  {}"


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="python -m scripts.checkpoints",
        description="List the models that are there, or the checkpoints of a folder.",
    )
    parser.add_argument(
        "dir",
        nargs="?",
        help="a folder of checkpoints; without one, all models are listed",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file and compare its hash; damage ends with status 1",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help=f"delete all but the newest {KEEP}, the best, the one before LR decay, and finished "
        "models",
    )
    parser.add_argument(
        "--finished",
        action="store_true",
        help="with --prune: finished models, too, where they are not among the newest",
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


def print_models():
    """One line for each model there is, the newest last."""
    models = list_models()
    if not models:
        print(f"no model in {get_base_dir()}")
        return
    heads = ("stage", "tag", "step", "state", "saved", "val_bpb", "bound", "best", "size", "data")
    print(ROW.format(*heads))
    for model in models:
        print(line_of(model))
    print(
        "the chat takes the newest sft, or --model_tag=TAG; the steps of one are listed by "
        f"python -m scripts.checkpoints {models[-1].dir}"
    )


def line_of(model):
    """What print_models() says of a Model."""
    meta = model.meta
    state = "finished" if model.finished else "unfinished"
    saved = datetime.datetime.fromtimestamp(model.saved).strftime("%Y-%m-%d %H:%M")
    bpb, bound = (
        f"{meta[name]:.4f}" if meta.get(name) else "" for name in ("val_bpb", "val_bpb_bound"))
    best = best_of(complete_metas(model.dir))
    data = data_of(meta)
    size = f"{folder_bytes(model.dir) / 1e6:.1f} MB"
    return ROW.format(
        model.source, model.tag, meta["step"], state, saved, bpb, bound, best, size, data)


def best_of(metas):
    """The bits per byte of the best step and its number, '2.1034 (50)'; "" of none.

    A run may end with a step that is worse. metas: of its complete steps. A bound is '<=2.1034'.
    """
    evaluated = [meta for meta in metas if is_evaluated(meta)]
    best = min(evaluated, key=validation_bpb, default=None)
    return f"{bpb_of(best)} ({best['step']})" if best else ""


def bpb_of(meta):
    """The validation of a meta in words: '2.1034', of a bound '<=2.1034', "" of none."""
    bpb = validation_bpb(meta)
    bound = "" if meta.get("val_bpb") else "<="
    return f"{bound}{bpb:.4f}" if bpb else ""


def folder_bytes(dir):
    """The size of all checkpoints in a folder."""
    return sum(path.stat().st_size for path in dir.glob("*.pt"))


def data_of(meta):
    """The text or the model that a run was trained from, in words."""
    origin = meta.get("origin")
    if origin:
        return "from " + "/".join(Path(str(origin[0])).parts[-2:])
    if "imported" in meta:
        return str(meta["imported"])
    return str(meta.get("settings", {}).get("data") or "nanochat's own text")


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
        damaged = verify_step(dir, meta) if verify else []
        damage = damage or bool(damaged)
        size = sum((dir / name).stat().st_size for name in meta["files"])
        state = state_of(meta, damaged, verify)
        print(f"{number:8d}  {size / 1e6:7.1f} MB  {bpb_of(meta):>8}  {state}")
    return damage and verify


def verify_step(dir, meta):
    """The files of a step that are damaged; the text that a chat quotes is one, too."""
    damaged = verify_files(dir, meta, list(meta["files"]))
    if not is_undamaged(meta, dir):
        damaged.append(str(meta["passages"]))
    return damaged


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


def ranks_here(saved_by, device_type):
    """How many ranks a rescued run gets: as many as saved it, unless this machine has fewer GPUs.

    Any number can resume any step. device_type: of the run's settings; empty: a GPU where there is.
    """
    gpus = torch.cuda.device_count() if device_type in ("", "cuda", None) else 0
    if not gpus or gpus >= saved_by:
        return saved_by
    print0(f"the run had {saved_by} ranks, this machine has {gpus} GPUs: resuming with {gpus}")
    return gpus


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

    # 2) its ranks
    launcher = ["-m", f"scripts.{meta['stage']}"]
    ranks = ranks_here(meta["world_size"], before.get("device_type"))
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


def prune(dir, finished):
    """Delete what a run would not have kept, after saying what."""
    lock = lock_folder(dir, 0)
    metas = steps_to_delete(complete_metas(dir), KEEP, finished=finished)
    numbers = ", ".join(str(meta["step"]) for meta in metas)
    print(f"deleting steps: {numbers or 'none'}")
    for meta in metas:
        delete_step(dir, meta)
    lock.close()


def main():
    options = parse_arguments()
    if options.prune and not options.dir:
        raise UserError("--prune needs the folder: python -m scripts.checkpoints DIR --prune")
    if options.finished and not options.prune:
        raise UserError("--finished is for --prune: give both, or leave it out")
    if not (options.dir or options.verify or options.rescue):
        print_models()
        raise SystemExit(0)
    dir = chosen_folder(options.dir)
    if options.rescue:
        rescue(dir)
    if options.prune:
        prune(dir, options.finished)
    damage = print_steps(dir, options.verify)
    raise SystemExit(int(damage))


if __name__ == "__main__":
    install_error_hook()
    main()
