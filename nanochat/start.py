"""Where a training run starts: fresh, from a checkpoint of its own, or from before an LR decay.

`choose_*` are pure: they decide by settings and meta files alone, so that tests reach every
combination without a process. `start_*` do the reading for pretraining and for the chat stages.
A run that starts fresh gets a folder of its own (folders.py), and no run starts over where one has
finished.
"""
import itertools
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.checkpoint import model_file
from nanochat.checkpoint_manager import (
    complete_metas,
    is_evaluated,
    load_model,
    load_weights,
    named_checkpoint,
    read_checkpoint,
    restore_model,
    resumable,
    tokenizer_of,
    validation_bpb,
)
from nanochat.common import UserError, expand_home, print0, require_alike
from nanochat.dataset import data_tag
from nanochat.folders import (
    checkpoint_dir,
    chosen_line,
    find_model_tag,
    folder_to_continue,
    folder_to_extend,
    free_folder,
    list_models,
    new_run,
    newest_model,
    refuse_taken,
    require_shared,
    run_of_speedrun,
    source_of,
)
from nanochat.loss_eval import protocol_id
from nanochat.plan import BUDGETS, is_overfitting
from nanochat.shards import read_index
from nanochat.tokenizer import get_tokenizer
from nanochat.variants import name_of

FRESH, RESUMED, EXTENDED = "fresh", "resumed", "extended"
# What fitted the devices, for the chat stages. Checkpoints of earlier versions lack some of it.
FROM_PRETRAINING = ("device_batch_size", "parallel", "checkpoint_activations")
START_AGAIN = "check that all machines see the same folder, and give the command again"
UNSEEN_DOCUMENTS = 200      # of whole sources that were held out, at the end of pretraining
COPY_MODEL = "copy the checkpoints of rank 0 to the other machines, or share their folder"


class Start(NamedTuple):
    """kind: FRESH, RESUMED or EXTENDED, with what was read.

    Of a fresh run weights, state and meta are None. A chat stage has its weights in the model
    already, so weights is None, and its meta is always that of the run.
    """
    kind: str
    folder: Path    # of the checkpoint; of a chat stage, that of the run; None: not known yet
    weights: dict   # of the model
    state: dict     # of resumed_state(): optimizers, loaders, guard, random numbers
    meta: dict


class Choice(NamedTuple):
    """What to read: kind as in Start; step None is the newest undamaged one."""
    kind: str
    step: int
    message: str = ""  # to print


def resume_hint(settings, folder, origin=None):
    """What a stage says after it was stopped and has saved in `folder`.

    origin: of a chat stage, the [folder, step] of the model that it started from.
    """
    replaced = [name for name in ("resume_from_checkpoint", "extend") if settings.get(name)]
    words = "--resume"
    if origin and replaced:
        # without the step of the run, the command must name the model where the run began
        begun = Path(origin[0])
        words += f" --model_tag={begun.name} --from_step={origin[1]}"
        if "source" in settings:
            words += f" --source={source_of(begun)}"
    elif not origin and settings.get("model_tag") not in (None, folder.name):
        words += f" --model_tag={folder.name}"
    for name in replaced:
        return f"the same command with {words} in place of --{name} resumes it"
    return f"the same command with {words} resumes it"


# ------------------------------------------------------------------------------------------------
# pretraining

def choose_base_folder(settings, models, run=None):
    """The Model whose folder a command without a --model_tag means, or None.

    settings: of base_train. models: the base models that are there. run: of the speedrun that gives
    the command, or None. --resume alone means the newest unfinished run of these settings, or a
    finished one where there is no other.
    """
    depth = settings["depth"]
    if depth:
        models = [model for model in models if model.meta.get("config", {}).get("depth") == depth]
    if settings["resume_from_checkpoint"] or settings["extend"] is not None:
        return newest_model(models, run)
    meant = [model for model in models if is_same_run(settings, model.meta, run)]
    unfinished = [model for model in meant if not model.finished]
    return newest_model(unfinished or meant)


def is_same_run(settings, meta, run=None):
    """Whether a command with these settings, in which no run is named, may resume that of a meta.

    It must be on the same data, toward the same budget. A command that gives no budget, or a depth,
    resumes toward any.
    """
    if run is not None:
        return meta.get("run") == run
    theirs = meta.get("settings", {})
    if not is_same_path(theirs.get("data"), settings["data"]):
        return False
    given = {name: settings[name] for name in BUDGETS if settings[name] is not None}
    return bool(settings["depth"]) or all(theirs.get(name) == given[name] for name in given)


def is_same_path(a, b):
    """Whether two --data are the same, or both None."""
    if a is None or b is None:
        return a is b
    absolute = [os.path.abspath(expand_home(str(path), "write the whole path")) for path in (a, b)]
    return absolute[0] == absolute[1]


def data_to_resume(given, meta):
    """The --data of a run that is resumed or extended: its own.

    given: what the command says, or None. meta: of the checkpoint. UserError for another text, of
    which the run would be a mixture, unless its own is no longer where it was.
    """
    settings = meta.get("settings", {})
    if "data" not in settings:
        return given  # a meta file of an earlier version
    own = settings["data"]
    if given is None:
        return own
    if is_same_path(own, given):
        return given
    if own is not None and not os.path.exists(expand_home(str(own), "write the whole path")):
        return given
    raise UserError(
        f"the run to resume was trained on {own or 'nanochat.dataset'}, not on {given}: leave "
        "--data out, or train another model without --resume")


def text_behind(data):
    """The path of the text that a --data is of: that from which `dataset --holdout=source` made the
    folder, or else data itself."""
    if data is None:
        return None
    index = read_index(Path(expand_home(str(data), "write the whole path")) / "index.json")
    return index.get("source", data) if index else data


def check_holdout(dataset, data, meta):
    """UserError where a base model was trained on the same text with another choice of validation.

    What is validation now would be text that it has read. dataset, data: the Dataset and its path.
    meta: of the model; that of another stage does not say, and an earlier version had documents.
    """
    usual = "documents" if meta.get("stage") == "base_train" else dataset.holdout
    then = meta.get("holdout", usual)
    own = meta.get("settings", {}).get("data")
    if then == dataset.holdout or not is_same_path(text_behind(own), text_behind(data)):
        return
    flag = " with --holdout=source" if then == "source" else " without --holdout"
    remedy = f"give --data={own}" if own else f"run python -m nanochat.dataset{flag} again"
    raise UserError(
        f"the model was trained on this text with validation by {then}, which is now by "
        f"{dataset.holdout}: {remedy}, or train another model")


def known_holdout(dataset, data, meta):
    """"source" where a model is known to have read nothing of the sources of validation, else
    "documents": of other text, of other stages and of others' models (meta None) that is not known.
    """
    meta = meta or {}
    is_its_text = is_same_path(meta.get("settings", {}).get("data"), data)
    is_by_source = dataset.holdout == meta.get("holdout") == "source"
    return "source" if is_its_text and is_by_source else "documents"


def read_unseen(dataset):
    """(documents of whole sources that were held out, their protocol); ([], None) without any."""
    documents = list(itertools.islice(dataset.documents("unseen"), UNSEEN_DOCUMENTS))
    return documents, protocol_id(documents, "source") if documents else None


def comparison_to_resume(settings, meta):
    """(domains, best_by) of a run that is resumed or extended: by these its steps were compared.

    settings: of base_train, paths absolute. meta: of the checkpoint. UserError where the command
    says others: a figure of theirs would say nothing of the steps that are there.
    """
    settings_then = meta.get("settings", {})
    for name, usual in (("domains", None), ("best_by", "val")):
        given, own = settings[name], settings_then.get(name) or usual
        if given is not None and given != own:
            raise UserError(
                f"the steps of the run to resume are compared with {name}={own}, not {given}: "
                f"leave --{name} out, or train another model without --resume")
    return settings_then.get("domains"), settings_then.get("best_by")


def choose_base_checkpoint(settings, metas, named_step=None, run=None):
    """Which checkpoint pretraining starts from.

    settings: of base_train. metas: of the complete steps in the folder, oldest first. named_step:
    of --resume_from_checkpoint, or None. run: as above; of the speedrun's own finished run nothing
    but the record may be missing, so that it is resumed. UserError where there is nothing to
    extend, and where the run to resume has finished.
    """
    factor = settings["extend"]
    newest = metas[-1] if metas else None
    finished = newest is not None and newest.get("finished")
    unfinished = newest is not None and not finished
    extends_already = factor is not None and unfinished and newest.get("extend") == factor
    if factor is not None and not extends_already:
        if named_step is not None:
            return Choice(EXTENDED, named_step)
        return Choice(EXTENDED, step_to_extend(metas))
    if named_step is not None:
        return Choice(RESUMED, named_step)
    if not settings["resume"] and not extends_already:
        return Choice(FRESH, None)
    if newest is None:
        return Choice(FRESH, None, "nothing to resume: starting from step 0")
    if finished and not is_of(newest, run):
        raise UserError(
            f"the run has finished at step {newest['step']}: use --extend, or leave --resume out "
            "and name another --model_tag")
    return Choice(RESUMED, None)


def step_to_extend(metas):
    """The step from which a longer run continues: the newest from before the LR decay.

    Of a run that ended early, for it was learning its text by heart, it is the best of these steps.
    metas: of the complete steps. UserError where there is none.
    """
    before_decay = [meta for meta in metas if meta.get("before_decay")]
    if not before_decay:
        raise UserError(
            "no checkpoint of this tag is from before LR decay, so that none can be "
            "extended: train again")
    if is_overfitting(metas[-1].get("bpbs") or []):
        validated = [meta for meta in before_decay if is_evaluated(meta)]
        return min(validated or before_decay[-1:], key=validation_bpb)["step"]
    return before_decay[-1]["step"]


def is_of(meta, run):
    """Whether a meta file is of the speedrun `run`."""
    return run is not None and meta.get("run") == run


def unfinished_extension(models, folder, factor):
    """The folder of the newest unfinished run that extends the one in `folder`, or `folder`."""
    found = [
        model for model in models
        if not model.finished
        and model.meta.get("extend") == factor
        and is_same_model(model.meta.get("continues"), [str(folder), None], any_step=True)
    ]
    return newest_model(found).dir if found else folder


def check_before_decay(folder, meta):
    """UserError where a checkpoint that is to be extended is from after the LR decay began."""
    if not meta.get("before_decay"):
        raise UserError(
            f"step {meta['step']} of {folder} is from after the LR decay began: extend another, "
            "or leave --resume_from_checkpoint out")


def start_base(settings, rank):
    """(Start, tokenizer) of pretraining. Every rank calls it."""
    require_shared("base")
    start, tokenizer = find_start(settings, rank)
    require_alike(
        "the tokenizer", tokenizer.fingerprint, "copy that of rank 0 to the other machines")
    return start, tokenizer


def find_start(settings, rank):
    """start_base(), which then compares what the ranks have found."""
    # 1. a run that begins
    tag, named = settings["model_tag"], settings["resume_from_checkpoint"]
    if not (settings["resume"] or named or settings["extend"] is not None):
        return fresh_base(settings)

    # 2. the folder to read
    models, run = list_models("base"), run_of_speedrun()
    folder = checkpoint_dir("base", tag) if tag else None
    if not tag:
        model = choose_base_folder(settings, models, run)
        folder = model.dir if model else None
    if folder and settings["extend"] is not None:
        folder = unfinished_extension(models, folder, settings["extend"])
    named_step = None
    if named:
        folder, named_step = named_checkpoint(named, folder or checkpoint_dir("base", ""))

    # 3. the step to read
    metas = complete_metas(folder) if folder and resumable(folder) else []
    choice = choose_base_checkpoint(settings, metas, named_step, run)
    require_alike("where the run starts", (shared_name(folder), *choice), START_AGAIN)
    if choice.message:
        print0(choice.message)
    if choice.kind == FRESH:
        return fresh_base(settings)
    weights, state, meta = read_checkpoint(folder, choice.step, rank=rank, stage="base_train")
    if choice.kind == EXTENDED:
        check_before_decay(folder, meta)
    return Start(choice.kind, folder, weights, state, meta), tokenizer_of(folder, meta)


def fresh_base(settings):
    """(Start, tokenizer) of a run that begins. The plan's depth may name its folder.

    Where the user names it, it must be free.
    """
    if settings["model_tag"]:
        refuse_taken(checkpoint_dir("base", settings["model_tag"]))
    return Start(FRESH, None, None, None, None), get_tokenizer(settings["data"])


def new_base_folder(settings, depth):
    """The folder of a run that begins: as --model_tag says, else named after its text or depth."""
    if settings["model_tag"]:
        return checkpoint_dir("base", settings["model_tag"])
    return free_folder(checkpoint_dir("base", data_tag(settings["data"]) or f"d{depth}"))


def place_of(start):
    """(folder to save in, meta) of a run that is resumed or extended.

    Another folder, where a finished model is in the way, makes it another run: its meta says from
    where it `continues`. Every rank calls it.
    """
    meta, folder = start.meta, start.folder
    if start.kind == EXTENDED:
        place = folder_to_extend(folder, meta["step"])
    elif is_of(meta, run_of_speedrun()):
        place = folder
    else:
        place = folder_to_continue(folder, meta["step"])
    if place == folder:
        return place, {**meta, "run": meta.get("run") or new_run()}
    meta = {**meta, "run": new_run(), "continues": [str(folder), meta["step"]]}
    # the best step stays behind: the validations of this run start again
    for name in ("bpbs", "best_bpb"):
        meta.pop(name, None)
    return place, meta


# ------------------------------------------------------------------------------------------------
# the chat stages

def choose_chat_run(models, origin, run=None):
    """The newest run of a chat stage that --resume means: a Model, or None.

    models: of the stage. origin: [folder, step] of the model from which the run must have started.
    run: of the speedrun that gives the command, or None. Of the speedrun's own finished run
    nothing but the record may be missing, so that it is resumed. UserError where all runs that
    started from the model have finished.
    """
    started = [model for model in models if is_same_model(model.meta.get("origin"), origin)]
    if run is not None:
        return newest_model([model for model in started if is_of(model.meta, run)])
    unfinished = newest_model([model for model in started if not model.finished])
    if unfinished is None and started:
        newest = newest_model(started)
        raise UserError(
            f"{newest.tag}, which started from this model, has finished at step "
            f"{newest.meta['step']}: leave --resume out to train another")
    return unfinished


def is_same_model(a, b, any_step=False):
    """Whether two [folder, step] are of the same model; the base directory may have moved."""
    if not a or not b:
        return False
    return shared_name(a[0]) == shared_name(b[0]) and (any_step or a[1:] == b[1:])


def shared_name(folder):
    """What all machines call the folder of a run, such as base_checkpoints/d4; None for none.

    The base directories before it may differ.
    """
    return folder and "/".join(Path(str(folder)).parts[-2:])


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
    require_shared(source)
    if settings["resume_from_checkpoint"]:
        found = start_chat_from_name(stage, source, settings, compute)
    else:
        found = start_chat_from_model(stage, source, settings, compute, model_source)
    meta = found.start.meta
    if settings["dtype"]:
        meta["dtype"] = settings["dtype"]  # otherwise the checkpoint's
    found.model.compute_dtype = getattr(torch, meta["dtype"])
    if found.start.kind == RESUMED:
        print0(f"resuming {stage} of {found.start.folder} at step {meta['step']}")
    return found


def start_chat_from_name(stage, source, settings, compute):
    """--resume_from_checkpoint: all that the run needs is in that checkpoint."""
    name = settings["resume_from_checkpoint"]
    tag = settings["model_tag"] or find_model_tag(source)
    folder, step = named_checkpoint(name, checkpoint_dir(source, tag))
    weights, state, meta = read_checkpoint(folder, step, rank=compute.rank, stage=stage)
    model, tokenizer = restore_model(folder, weights, meta, compute.device)
    start = with_place(Start(RESUMED, folder, None, state, meta))
    return ChatStart(start, model.train(), tokenizer)


def start_chat_from_model(stage, source, settings, compute, model_source):
    """From the model of an earlier stage, or with --resume from where the stage had stopped."""
    # 1. the model of the earlier stage, and the meta of a run that starts with it
    model, tokenizer, origin = load_model(
        model_source, compute.device, "train", settings["model_tag"], settings["from_step"])
    weights = origin["files"][model_file(origin["step"])]  # their SHA-256
    require_alike(
        "the model to start from", (origin["tag"], origin["step"], weights[:12]), COPY_MODEL)
    print0(f"starting from {chosen_line(model_source, origin)}")
    model = model.for_chat()
    meta = meta_of_chat_run(stage, origin, model)

    # 2. an unfinished run that started with the same model
    if settings["resume"]:
        found = choose_chat_run(list_models(source), meta["origin"], run_of_speedrun())
        require_alike("the run to resume", shared_name(found and found.dir), START_AGAIN)
        if found:
            start, tokenizer = resume_chat(stage, found.dir, compute, model)
            return ChatStart(start, model, tokenizer)
        print0(f"nothing to resume: no unfinished {stage} started from {origin['tag']}, step "
               f"{origin['step']}; starting from step 0")

    # 3. a run that begins, with a folder named after the model
    folder = free_folder(checkpoint_dir(source, origin["tag"]))
    return ChatStart(Start(FRESH, folder, None, None, meta), model, tokenizer)


def meta_of_chat_run(stage, origin, model):
    """The meta of a run that starts with a model. origin: the meta of its checkpoint."""
    meta = {
        "stage": stage,
        "run": new_run(),
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
    for key in FROM_PRETRAINING:
        if origin.get(key) is not None:
            meta[key] = origin[key]
    return meta


def resume_chat(stage, folder, compute, model):
    """(Start, tokenizer) of the run in `folder`, whose newest weights are loaded into `model`."""
    weights, state, meta = read_checkpoint(folder, rank=compute.rank, stage=stage)
    tokenizer = tokenizer_of(folder, meta)
    load_weights(model, weights, assign=False)
    return with_place(Start(RESUMED, folder, None, state, meta)), tokenizer


def with_place(start):
    """A Start with the folder and the meta of place_of()."""
    folder, meta = place_of(start)
    return start._replace(folder=folder, meta=meta)
