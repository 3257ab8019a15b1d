"""A folder for each run, and the list of the models that are there.

    $NANOCHAT_BASE_DIR/base_checkpoints/d4/              the first run of this name
                                        d4-2/            the second
                                        notes-1a2b3c4d/  one on the user's own text
                       mid_checkpoints/d4/               what midtraining made of base d4
                       chatsft_checkpoints/d4/           and what fine-tuning made of that

A folder holds one run: its steps, its log and its tokenizer. A run that begins takes the next free
name, so that no run overwrites or deletes what another one has saved. Earlier versions put several
runs into one folder. For their sake every meta file names its run (`run`, absent in theirs), and a
run that resumes beside a finished model continues in a folder of its own.
"""
import datetime
import fcntl
import os
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from nanochat.checkpoint import complete_metas
from nanochat.common import (
    NOT_OFFERED,
    UserError,
    all_reduce_max,
    get_base_dir,
    get_dist_info,
    is_one_machine,
    print0,
    warn_once,
)

FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
STAGES = {
    "base": "scripts.base_train",
    "mid": "scripts.mid_train",
    "sft": "scripts.chat_sft",
    "rl": "scripts.chat_rl",
}
TOKENIZER_FOLDER = "tokenizer"  # in the folder of a run
LISTED = 8  # models that one line names at most
LOCK_ATTEMPTS = 5  # to lock a folder, 0.02 seconds apart
SHARE_SECONDS = 60.0  # after which a network file system shows a new file on all machines


def checkpoint_dir(source, model_tag):
    """Folder of the checkpoints of a stage (base, mid, sft or rl); of all its models for "".

    UserError for a tag that is more than the name of a folder: it may lead out of the base folder.
    """
    if source not in FOLDERS:
        choices = ", ".join(FOLDERS)
        raise UserError(f"source={source} is not a stage: choose from {choices}")
    if model_tag in (".", "..") or set(model_tag) & set("/\\\0"):
        raise UserError(
            f"model_tag={model_tag!r} is not the name of a folder: give a single name, such as "
            "d4, without slashes")
    return get_base_dir() / FOLDERS[source] / model_tag


def source_of(dir):
    """The stage (base, mid, sft or rl) whose checkpoints are in `dir`; base for other folders."""
    for source, folder in FOLDERS.items():
        if folder == Path(dir).parent.name:
            return source
    return "base"


def advice(source):
    """How to get a checkpoint of a stage."""
    return f"run python -m {STAGES[source]} first"


# --------------------------------------------------------------------------------------------------
# runs

def run_of_speedrun():
    """The name of the speedrun to which this process belongs, or None."""
    return os.environ.get("NANOCHAT_RUN") or None


def new_run():
    """The name of a run that begins: the speedrun's, else one that no other run has."""
    return run_of_speedrun() or f"{int(time.time())}-{os.getpid()}"


def what_holds(dir):
    """What a run that begins would find in `dir`, in words; "" where the folder is free.

    A step that was never completed is nothing, an unreadable meta file is something.
    """
    metas = complete_metas(dir)
    if metas:
        return "a finished run" if metas[-1].get("finished") else "an unfinished run"
    if any(Path(dir).glob("meta_*.json")):
        return "checkpoints that cannot be read"
    return "a run that is training now" if is_locked(dir) else ""


def is_locked(dir):
    """Whether a process trains into `dir`. No where the file system has no locks."""
    path = Path(dir) / ".lock"
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def take_lock(file):
    """Lock an open lock file. BlockingIOError where another process holds the lock.

    Whoever looks whether it is held, as is_locked() does, holds it for an instant: so it is tried
    again for a moment.
    """
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise
        time.sleep(0.02)


def lock_folder(dir, rank):
    """Lock `dir` for this process until it ends. UserError if another process holds the lock.

    A folder that this process has claimed is locked already: that lock is handed over.
    Returns the open lock file, which the caller keeps; None on ranks other than 0. The kernel
    releases the lock (flock) when the process ends, however it ends, so no stale lock is left.
    Temporary files of killed runs are deleted. Where the file system has no locks, a warning says
    so, and no file is deleted: it may belong to another run.
    """
    if rank != 0:
        return None
    dir = Path(dir)
    if dir.absolute() in CLAIMED:
        return CLAIMED.pop(dir.absolute())
    dir.mkdir(parents=True, exist_ok=True)
    file = open(dir / ".lock", "a+", encoding="utf-8")
    try:
        take_lock(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise UserError(
            f"process {holder} is training into {dir}: stop it, or name another --model_tag"
        ) from None
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        warn_once(
            f"the file system of {dir} has no locks ({error.strerror}): make sure that no other "
            "run trains into it"
        )
        return file
    for path in (*dir.glob("*.tmp"), *dir.glob(f"{TOKENIZER_FOLDER}/*.tmp")):
        path.unlink(missing_ok=True)  # a process that reads may have just renamed it
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


CLAIMED = {}  # the open lock files of chosen folders, until lock_folder() hands them to the run


def claim_folder(dir):
    """Lock a free folder for the run that begins in this process. Whether that succeeded."""
    # docs/traps.md: chosen-before-locked
    if what_holds(dir):
        return False
    try:
        file = lock_folder(dir, 0)
    except UserError:
        return False  # two processes looked at the same time

    # a short run may have come and gone since the first look
    if complete_metas(dir):
        file.close()
        return False
    CLAIMED[Path(dir).absolute()] = file
    return True


REMEDIES = {
    "a finished run": "extend it with --extend=2, or name another --model_tag",
    "an unfinished run": "resume it with --resume, or name another --model_tag",
}


def refuse_taken(dir):
    """UserError where the folder that the user has named for a run that begins holds one.

    Otherwise rank 0 claims it. Every rank calls it.
    """
    holds = ""
    if get_dist_info()[1] == 0 and not claim_folder(dir):
        holds = what_holds(dir) or "a run"
    if all_reduce_max(bool(holds))[0]:
        remedy = REMEDIES.get(holds, "name another --model_tag")
        raise UserError(f"{dir.name} holds {holds or 'a run'}: {remedy}")


def free_folder(dir):
    """`dir`, or the first free one of dir-2, dir-3, ...: for a run that begins.

    Every rank calls it: all take the folder that rank 0 has claimed.
    """
    dir = Path(dir)
    number = 1
    if get_dist_info()[1] == 0:
        while not claim_folder(numbered(dir, number)):
            number += 1
    number = int(all_reduce_max(number)[0])
    free = numbered(dir, number)
    if number > 1:
        holds = what_holds(dir) or "a run"
        hint = ", which --resume resumes" if holds == "an unfinished run" else ""
        print0(f"{dir.name} holds {holds}{hint}: this one is {free.name}")
    return free


def numbered(dir, number):
    """d4, 1 -> d4; d4, 2 -> d4-2."""
    return dir if number == 1 else dir.with_name(f"{dir.name}-{number}")


def folder_to_continue(dir, step):
    """The folder in which a run that continues from a step of `dir` saves.

    That is `dir`, but where it holds a finished model, which only its owner may delete or
    overwrite, a free folder. The log up to the step comes along. Every rank calls it.
    """
    if any(meta.get("finished") for meta in complete_metas(dir)):
        return folder_to_extend(dir, step)
    return Path(dir)


def folder_to_extend(dir, step):
    """A free folder for a run that continues from a step of `dir`, with the log. As above."""
    free = free_folder(dir)
    log = Path(dir) / "log.jsonl"
    if get_dist_info()[1] == 0 and log.exists():
        shutil.copyfile(log, free / log.name)
    print0(f"{free.name} continues from step {step} of {Path(dir).name}")
    return free


def require_shared(source):
    """UserError where the machines of a run do not share the folder of a stage's checkpoints.

    Every rank writes a part of a step, and rank 0 makes the step complete. Every rank calls this.
    """
    if is_one_machine():
        return
    folder = checkpoint_dir(source, "")
    folder.mkdir(parents=True, exist_ok=True)
    rank = get_dist_info()[1]

    # 1) rank 0 writes a file whose name no other run has
    number = random.SystemRandom().randrange(2**48) if rank == 0 else -1
    path = folder / f".shared-{int(all_reduce_max(number)[0])}"
    if rank == 0:
        path.touch()

    # 2) the others look for it
    deadline = time.monotonic() + SHARE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = int(all_reduce_max(-1 if path.exists() else rank)[0])
    if rank == 0:
        path.unlink()
    if missing >= 0:
        raise UserError(
            f"rank {missing} does not see what rank 0 writes to {folder}, so that its checkpoints "
            "could not be resumed: all machines need one NANOCHAT_BASE_DIR, such as a folder on NFS"
        )


# --------------------------------------------------------------------------------------------------
# models

class Model(NamedTuple):
    """A folder that has a complete step."""
    source: str      # base, mid, sft or rl
    dir: Path
    meta: dict       # of the newest complete step
    steps: int       # how many complete steps there are

    @property
    def tag(self):
        return self.dir.name

    @property
    def saved(self):
        """When the step was saved, in seconds since 1970."""
        return self.meta["saved"]

    @property
    def finished(self):
        return bool(self.meta.get("finished"))


def list_models(*sources):
    """[Model] of these stages, or of all; the one that was saved last is the last."""
    models = []
    for source in sources or FOLDERS:
        for dir in (get_base_dir() / FOLDERS[source]).glob("*"):
            metas = complete_metas(dir)
            if metas:
                models.append(Model(source, dir, metas[-1], len(metas)))
    return sorted(models, key=lambda model: model.saved)


def newest_model(models, run=None):
    """The Model that was saved last, of the speedrun `run` where it has one; None of no models."""
    of_run = [model for model in models if run and model.meta.get("run") == run]
    return max(of_run or models, key=lambda model: model.saved, default=None)


def tag_setting(source, run):
    """The setting that names the model of the speedrun `run`: "--model_tag=d4". "" where a command
    takes that model of the stage without it."""
    models = list_models(source)
    own = newest_model([model for model in models if model.meta.get("run") == run])
    if own is None or own == newest_model(models):
        return ""
    return f"--model_tag={own.tag}"


def newest_meta(*sources):
    """Path of the meta file written last by any of these stages, or None."""
    paths = []
    for source in sources:
        paths += (get_base_dir() / FOLDERS[source]).glob("*/meta_*.json")
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def find_model_tag(source, missing_ok=False):
    """The tag of a stage's checkpoint written last. If there is none: None, or UserError.

    Within a speedrun, whose name is in NANOCHAT_RUN, that run's own come first.
    """
    models = list_models(source) if source in FOLDERS else []
    newest = newest_model(models, run_of_speedrun())
    if newest is not None:
        return newest.tag
    unreadable = newest_meta(source) if source in FOLDERS else None
    if unreadable is not None:
        return unreadable.parent.name  # whoever reads it says what is wrong
    if missing_ok:
        return None
    where = checkpoint_dir(source, "")
    instead = ""
    if source != "base" and list_models("base"):
        instead = ", or take the base model that is there: --source=base"
    raise UserError(f"no {source} checkpoint under {where}: {advice(source)}{instead}")


def describe(model):
    """A Model in words: 'd4 (finished, step 500, 2026-11-26 09:30)'."""
    state = "finished" if model.finished else "unfinished"
    when = datetime.datetime.fromtimestamp(model.saved).strftime("%Y-%m-%d %H:%M")
    return f"{model.tag} ({state}, step {model.meta['step']}, {when})"


def describe_all(models):
    """The newest of some models in one line, the last one first."""
    words = [describe(model) for model in models[:-LISTED - 1:-1]]
    if len(models) > LISTED:
        words.append(f"and {len(models) - LISTED} more (python -m scripts.checkpoints)")
    return ", ".join(words)


def remedy_for_missing(dir):
    """What to do where `dir` has no complete checkpoint."""
    source = source_of(dir)
    models = list_models(source)
    if not models:
        return f"{advice(source)}, or name another --model_tag"
    return f"choose --model_tag from {describe_all(models)}"


def chosen_line(source, meta):
    """Which model was taken, and the newest of the others.

    meta: of load_model(). 'sft d4, step 500, of 3 models; --model_tag=TAG for another: d3, d3-2'
    """
    line = f"{source} {meta['tag']}, step {meta['step']}"
    models = list_models(source)
    # of a finished run, the last step alone says so, and the best may be another
    if not any(model.finished for model in models if model.tag == meta["tag"]):
        line += " (unfinished)"
    others = [model.tag for model in models if model.tag != meta["tag"]]
    if not others:
        return line
    shown = ", ".join(others[:-LISTED - 1:-1]) + (", ..." if len(others) > LISTED else "")
    return f"{line}, of {len(others) + 1} models; --model_tag=TAG for another: {shown}"
