"""Where a training run starts: fresh, from a checkpoint of its own, or from before an LR decay.

`choose_*` are pure: they decide by settings and meta files alone, so that tests reach every
combination without a process. `start_*` do the reading for pretraining and for the chat stages.
"""
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    complete_metas,
    find_model_tag,
    load_model,
    load_weights,
    named_checkpoint,
    read_checkpoint,
    restore_model,
    resumable,
)
from nanochat.common import UserError, print0
from nanochat.plan import BUDGETS
from nanochat.variants import name_of

FRESH, RESUMED, EXTENDED = "fresh", "resumed", "extended"


class Start(NamedTuple):
    """kind: FRESH, RESUMED or EXTENDED, with what was read.

    Of a fresh run weights, state and meta are None. A chat stage has its weights in the model
    already, so weights is None, and its meta is always that of the run.
    """
    kind: str
    folder: Path    # of the checkpoints, None where the tag is not known yet
    weights: dict   # of the model
    state: dict     # of this rank: optimizers, loader, guard, random numbers
    meta: dict


class Choice(NamedTuple):
    """What to read: kind as in Start; step None is the newest undamaged one."""
    kind: str
    step: int
    message: str = ""  # to print


def resume_hint(settings):
    """What a stage says after it was stopped and has saved."""
    for name in ("resume_from_checkpoint", "extend"):
        if settings.get(name) is not None:
            return f"the same command with --resume in place of --{name} resumes it"
    return "the same command with --resume resumes it"


# ------------------------------------------------------------------------------------------------
# pretraining

def choose_base_checkpoint(settings, metas, named_step=None):
    """Which checkpoint pretraining starts from.

    settings: of base_train. metas: of the complete steps in the folder, oldest first. named_step:
    of --resume_from_checkpoint, or None. UserError where there is nothing to extend.
    """
    factor = settings["extend"]
    newest = metas[-1] if metas else None
    unfinished = newest is not None and not newest["finished"]
    extends_already = factor is not None and unfinished and newest.get("extend") == factor
    if factor is not None and not extends_already:
        if named_step is not None:
            return Choice(EXTENDED, named_step)
        before_decay = [meta["step"] for meta in metas if meta.get("before_decay")]
        if not before_decay:
            raise UserError(
                "no checkpoint of this tag is from before LR decay, so that none can be "
                "extended: train again")
        return Choice(EXTENDED, before_decay[-1])
    if named_step is not None:
        return Choice(RESUMED, named_step)
    if not settings["resume"] and not extends_already:
        return Choice(FRESH, None)
    if newest is None:
        return Choice(FRESH, None, "nothing to resume: starting from step 0")
    return Choice(RESUMED, None)


def reason_to_start_fresh(settings, tag, meta, fingerprint):
    """Why the newest checkpoint of a tag is not resumed: one line, or "" where it is.

    A run whose tag or depth was named must be of the same tokenizer, else UserError.
    """
    if meta["finished"]:
        return f"the newest checkpoint of {tag} is a finished run: starting from step 0"
    same_tokenizer = meta["tokenizer"] == fingerprint
    if settings["model_tag"] or settings["depth"]:
        if not same_tokenizer:
            raise UserError(
                f"{tag} was trained with another tokenizer: train again without --resume")
        return ""
    if settings["extend"] is not None and meta.get("extend") == settings["extend"]:
        return ""  # the command that extended it need not repeat the run's settings
    names = ("data", *BUDGETS)
    same_run = all(meta["settings"].get(name) == settings[name] for name in names)
    if same_tokenizer and same_run:
        return ""
    return f"the newest checkpoint, of {tag}, is of another run: starting from step 0"


def check_named(kind, folder, meta, fingerprint):
    """UserError where a checkpoint that the user named, or that is extended, cannot be used."""
    if meta["tokenizer"] != fingerprint:
        raise UserError(f"{folder} was trained with another tokenizer: bring that one back")
    if kind == EXTENDED and not meta["before_decay"]:
        raise UserError(
            f"step {meta['step']} of {folder} is from after the LR decay began: extend another, "
            "or leave --resume_from_checkpoint out")


def start_base(settings, rank, fingerprint):
    """The Start of pretraining. fingerprint: of the tokenizer that is there now."""
    # 1. the folder
    tag = settings["model_tag"]
    if not tag and settings["depth"]:
        tag = f"d{settings['depth']}"
    wants_checkpoint = (
        settings["resume"] or settings["resume_from_checkpoint"] or settings["extend"])
    if not tag and wants_checkpoint:
        tag = find_model_tag("base", missing_ok=True)
    folder = checkpoint_dir("base", tag) if tag else None
    named_step = None
    if settings["resume_from_checkpoint"]:
        named = settings["resume_from_checkpoint"]
        folder, named_step = named_checkpoint(named, folder or checkpoint_dir("base", ""))

    # 2. the checkpoint
    metas = []
    if wants_checkpoint and folder and resumable(folder):
        metas = complete_metas(folder)
    choice = choose_base_checkpoint(settings, metas, named_step)
    if choice.message:
        print0(choice.message)
    fresh = Start(FRESH, None, None, None, None)  # the plan's depth may name the folder
    if choice.kind == FRESH:
        return fresh

    # 3. what is in it
    weights, state, meta = read_checkpoint(folder, choice.step, rank=rank, stage="base_train")
    if choice.step is not None:
        check_named(choice.kind, folder, meta, fingerprint)
    else:
        reason = reason_to_start_fresh(settings, tag, meta, fingerprint)
        if reason:
            print0(reason)
            return fresh
    return Start(choice.kind, folder, weights, state, meta)


# ------------------------------------------------------------------------------------------------
# the chat stages

def reason_for_fresh_chat(meta, origin):
    """Why the newest checkpoint of a chat stage is not resumed, or ""."""
    if meta["finished"]:
        return "is of a finished run"
    if meta["origin"] != origin:
        return "started from another model"
    return ""


class ChatStart(NamedTuple):
    """Where a chat stage starts: a Start whose meta is that of this run, and the model."""
    start: Start
    model: torch.nn.Module
    tokenizer: object


def start_chat(stage, source, settings, compute, model_source):
    """The ChatStart of a stage.

    stage: mid_train or chat_sft. source: its key among the checkpoint folders (mid or sft).
    model_source: the key of the stage whose model it starts from (base or mid).
    """
    if settings["resume_from_checkpoint"]:
        found = start_chat_from_name(stage, source, settings, compute)
    else:
        found = start_chat_from_model(stage, source, settings, compute, model_source)
    meta = found.start.meta
    if settings["dtype"]:
        meta["dtype"] = settings["dtype"]  # otherwise the checkpoint's
    found.model.compute_dtype = getattr(torch, meta["dtype"])
    return found


def start_chat_from_name(stage, source, settings, compute):
    """--resume_from_checkpoint: all that the run needs is in that checkpoint."""
    name = settings["resume_from_checkpoint"]
    tag = settings["model_tag"] or find_model_tag(source)
    folder, step = named_checkpoint(name, checkpoint_dir(source, tag))
    weights, state, meta = read_checkpoint(folder, step, rank=compute.rank, stage=stage)
    model, tokenizer = restore_model(folder, weights, meta, compute.device)
    return ChatStart(Start(RESUMED, folder, None, state, meta), model.train(), tokenizer)


def start_chat_from_model(stage, source, settings, compute, model_source):
    """From the model of an earlier stage, or with --resume from where the stage had stopped."""
    # 1. the model of the earlier stage, and the meta of a run that starts with it
    model, tokenizer, origin = load_model(
        model_source, compute.device, "train", settings["model_tag"], settings["from_step"])
    model = model.for_chat()
    meta = {
        "stage": stage,
        "origin": [origin["dir"], origin["step"]],
        "step": 0,
        "elapsed": 0.0,
        "dtype": origin["dtype"],
        "config": asdict(model.config),
        "model_class": name_of(model),
        "tokenizer": origin["tokenizer"],
        "total_batch_size": origin["total_batch_size"],
        "name": origin.get("name"),  # the model's, where the user chose one
    }
    folder = checkpoint_dir(source, origin["tag"])
    fresh = ChatStart(Start(FRESH, folder, None, None, meta), model, tokenizer)

    # 2. an unfinished run that started with the same model
    if not settings["resume"]:
        return fresh
    if not resumable(folder):
        print0(f"nothing to resume in {folder} (--model_tag names another): starting from step 0")
        return fresh
    weights, state, found = read_checkpoint(folder, rank=compute.rank, stage=stage)
    reason = reason_for_fresh_chat(found, meta["origin"])
    if reason:
        print0(f"the newest checkpoint of {folder} {reason}: starting from step 0")
        return fresh
    load_weights(model, weights, assign=False)
    return ChatStart(Start(RESUMED, folder, None, state, found), model, tokenizer)
