"""One step of a run on disk: complete, or not there.

    d4/model_000500.pt          weights of the whole model, with plain keys
       optim_000500_rank0.pt    what one rank had besides: optimizer state, loader, guard, RNG
       meta_000500.json         written last, with the SHA-256 of each file above
       .verified.json           size, modification time and SHA-256 of the files that were verified
       tokenizer/               of the run; tokenizer.py has its files

A step without its meta file does not exist, so a process that is killed at any moment leaves only
complete steps behind. Weights that are not finite are never saved. Step numbers count completed
optimizer steps. The steps of one run are the subject of checkpoint_manager.py, the folders of all
runs that of folders.py.

A checkpoint may come from elsewhere. Nothing in its files is executed, and a meta file is believed
only as far as problem_of() has checked it: above all it names no file outside of its step.
"""
import hashlib
import json
import pickle
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.common import (
    UserError,
    all_reduce_max,
    atomic_file,
    atomic_write,
    get_dist_info,
    sha256,
    warn_once,
)
from nanochat.hardware import is_out_of_memory

FORMAT = 3  # of the meta file and of the optimizers' state
STEP_FILE = re.compile(r"(?:meta|model|optim)_(\d+)(?:_rank\d+)?\.(?:json|pt)")
VERIFIED_FILE = ".verified.json"
META_BYTES = 2**24  # a larger meta file is none: one of ten thousand ranks has a tenth of that


def model_file(step):
    return f"model_{step:06d}.pt"


def optimizer_file(step, rank):
    return f"optim_{step:06d}_rank{rank}.pt"


def meta_file(step):
    return f"meta_{step:06d}.json"


# --------------------------------------------------------------------------------------------------
# save and load

def save_checkpoint(dir, step, model, optimizer, meta, rank=0):
    """Save a step and return when it is complete. Every rank calls it: it contains a collective.

    model: the module, or on rank 0 the state dict of the whole model. optimizer: the state of this
    rank (a dict of tensors, numbers, lists and dicts), or None. meta: a dict for JSON; load_model
    needs model_class, config, dtype and tokenizer in it. OSError on every rank if one rank could
    not write its files or if the weights are not finite.
    """
    begin_step(dir, step, rank)
    states = states_of_rank(step, model, optimizer, rank)
    hashes, error = write_states(dir, states)
    complete_step(dir, step, meta, rank, hashes, error)


def load_checkpoint(dir, step, rank=None):
    """(weights, optimizer state of `rank` or None, meta) of a complete step.

    The tensors are the pages of the files, mapped into memory (copy on write): a page is read when
    it is first used, and a change to a tensor never changes the file. Hence load_state_dict on a
    GPU's model holds one copy on the GPU. The contents are not verified here: see damaged_files.
    UserError if the step is not complete.
    """
    meta = read_meta(dir, step)
    weights = map_file(Path(dir) / model_file(step))
    if rank is None:
        return weights, None, meta
    return weights, map_file(Path(dir) / optimizer_file(step, rank)), meta


# What torch.load raises for files that torch.save did not write, or that were cut or crafted
NO_STATE = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
)


def map_file(path):
    """What torch.save wrote, its tensors mapped from the file. No code in the file is executed.

    Where the file system cannot map files, they are read. UserError, one line, for another file.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except NO_STATE as error:
        if is_out_of_memory(error):
            raise
        if "unable to mmap" not in str(error):
            raise no_state(path, error) from None
    warn_once(f"the file system of {path.parent} cannot map files: they are read into memory")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except NO_STATE as error:
        if is_out_of_memory(error):
            raise
        raise no_state(path, error) from None


def no_state(path, error):
    """The UserError for a file with the right hash that holds no state of a checkpoint."""
    return UserError(
        f"{path} is no file of a checkpoint ({type(error).__name__}), though its hash is the meta "
        "file's: choose another step, or get the file again from where it came"
    )


# --------------------------------------------------------------------------------------------------
# the parts of saving, which an asynchronous save calls one by one

def begin_step(dir, step, rank):
    """Make the folder, and remove the meta file of a step of that number which another run left."""
    Path(dir).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (Path(dir) / meta_file(step)).unlink(missing_ok=True)


def states_of_rank(step, model, optimizer, rank):
    """{file name: state} of what a rank writes: rank 0 the weights, every rank its own state."""
    states = {}
    if rank == 0:
        states[model_file(step)] = model if isinstance(model, dict) else model.state_dict()
    if optimizer is not None:
        states[optimizer_file(step, rank)] = optimizer
    return states


def write_states(dir, states):
    """Write each state to its file, atomically.

    Returns ({file name: SHA-256}, None), or what was written so far and one line about the error.
    """
    hashes = {}
    try:
        for name, state in states.items():
            if name.startswith("model"):
                check_finite(state)
            path = Path(dir) / name
            with atomic_file(path) as file:
                torch.save(state, file)
            hashes[name] = sha256(path)
    except (OSError, RuntimeError) as error:
        # torch.save turns the OSError of a full disk into a RuntimeError about its archive
        return hashes, str(error.__context__ or error)
    return hashes, None


def check_finite(weights):
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RuntimeError(f"its weights are not finite ({name})")


def complete_step(dir, step, meta, rank, hashes, error):
    """Gather what all ranks wrote; then rank 0 writes the meta file, which makes the step complete.

    hashes, error: what write_states returned on this rank. Every rank calls it. OSError on every
    rank if one of them had an error.
    """
    # 1) every rank learns the hashes and errors of all ranks
    world_size = get_dist_info()[3]
    gathered = [(hashes, error)]
    if world_size > 1:
        gathered = [None] * world_size
        dist.all_gather_object(gathered, (hashes, error))
    files = {}
    for hashes_of_rank, error_of_rank in gathered:
        files.update(hashes_of_rank)
        error = error or error_of_rank

    # 2) the meta file
    if rank == 0 and not error:
        own = {
            "format": FORMAT,
            "step": step,
            "saved": time.time(),
            "world_size": world_size,
            "files": files,
        }
        try:
            write_meta(dir, {**meta, **own})
        except OSError as failure:
            error = str(failure)

    # 3) every rank learns whether that worked
    if all_reduce_max(bool(error))[0]:
        reason = error or "rank 0 says why"
        raise OSError(f"step {step} was not saved in {dir}: {reason}")


# --------------------------------------------------------------------------------------------------
# meta files

class Step(NamedTuple):
    """A step of which there are files in a folder."""
    step: int
    meta: dict    # None if the step is not complete or not readable ...
    problem: str  # ... and this line says why; otherwise None


def list_steps(dir):
    """[Step] of all steps in `dir`, in the order in which they were saved, incomplete ones first.

    The newest step is the one saved last, not the one with the highest number: a shorter run may
    have followed a longer one in the same folder.
    """
    numbers = set()
    for path in Path(dir).glob("*_[0-9]*"):
        match = STEP_FILE.fullmatch(path.name)
        if match:
            numbers.add(int(match[1]))

    steps = []
    for number in sorted(numbers):
        try:
            steps.append(Step(number, read_meta(dir, number), None))
        except UserError as error:
            steps.append(Step(number, None, str(error)))
    return sorted(steps, key=lambda step: step.meta["saved"] if step.meta else 0)


def complete_metas(dir):
    """The meta of each complete step of `dir`, in the order in which they were saved."""
    return [step.meta for step in list_steps(dir) if step.meta]


def complete_steps(dir):
    """The numbers of the complete steps of `dir`, in the order in which they were saved."""
    return [meta["step"] for meta in complete_metas(dir)]


def read_meta(dir, step):
    """The meta file of a complete step, in the current format.

    UserError, one line, says why the step cannot be used.
    """
    path = Path(dir) / meta_file(step)
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.loads(file.read(META_BYTES))  # a longer one is cut, and so no JSON
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing: the run ended while it saved") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path.name} is damaged ({type(error).__name__})") from None
    problem = problem_of(meta, step)
    if problem:
        raise UserError(f"{path.name} {problem}")
    for name in meta["files"]:
        if not (path.parent / name).is_file():
            raise UserError(f"{name} is missing")
    return upgrade_meta(meta)


NUMBER = (int, float)
LAST_SECOND = 2e11  # since 1970, of a date that can be shown in any time zone
LARGEST = 1e300     # a number that can be made a float
# Of keys that a meta file need not have, the type, for every reader that would fail at another
KINDS_IF_PRESENT = {
    "stage": str,
    "run": str,
    "name": (str, type(None)),
    "origin": list,
    "continues": list,
    "own_identity": (list, type(None)),
    "model_class": str,
    "config": dict,
    "dtype": str,
    "tokenizer": str,
    "settings": dict,
    "budgets": dict,
    "finished": bool,
    "before_decay": bool,
    "elapsed": NUMBER,
    "val_bpb": (*NUMBER, type(None)),
    "val_bpb_bound": (*NUMBER, type(None)),
    "best_bpb": NUMBER,
    "bpbs": list,
    "best_by": (str, type(None)),
    "domain_bpbs": (dict, type(None)),
    "fp8": (dict, type(None)),
    "stages_begun": list,
    "extend": (*NUMBER, type(None)),
    "extended": NUMBER,
    "rate_scale": NUMBER,
    "total_batch_size": int,
    "device_batch_size": (int, type(None)),
    "parallel": str,
    "checkpoint_activations": bool,
    "prompts": list,
    "questions": list,
}


def problem_of(meta, step):
    """Why this is not the meta file that was written for a step, or None."""
    if not isinstance(meta, dict):
        return "is damaged (it holds no object)"
    # the first meta files had neither a format nor a digest
    if "digest" not in meta and "format" in meta:
        return "is damaged (it has no digest)"
    if "digest" in meta and meta["digest"] != digest_of(meta):
        return "is damaged (its digest differs)"
    kinds = {"step": int, "saved": float, "world_size": int, "files": dict}
    missing = kinds.keys() - meta.keys()
    if missing:
        return f"is damaged (it has no {', '.join(sorted(missing))})"
    for key, kind in kinds.items():
        if type(meta[key]) is not kind:
            return f"is damaged ({key} is not of type {kind.__name__})"
    for key, kind in KINDS_IF_PRESENT.items():
        if key in meta and not isinstance(meta[key], kind):
            return f"is damaged ({key} is of type {type(meta[key]).__name__})"
    for key in ("saved", "elapsed"):
        if not 0 <= meta.get(key, 0) <= LAST_SECOND:
            return f"is damaged ({key} is {str(meta[key])[:30]})"
    return problem_of_contents(meta) or problem_of_step(meta, step)


def problem_of_contents(meta):
    """What is wrong in the lists and numbers of a meta file whose keys are of the right types."""
    for key in ("origin", "continues"):
        if key in meta and not is_checkpoint(meta[key]):
            return f"is damaged ({key} is no folder and step)"
    for key in ("val_bpb", "val_bpb_bound", "extend", "extended", "rate_scale"):
        if not is_number(meta.get(key) or 0):
            return f"is damaged ({key} is {str(meta[key])[:30]})"
    for key in ("total_batch_size", "device_batch_size"):
        size = meta.get(key)
        if size is not None and size < 1:
            return f"is damaged ({key} is {str(size)[:30]})"
    if not all(map(is_number, meta.get("bpbs", []))):
        return "is damaged (bpbs are not all numbers)"
    if not all(map(is_number, (meta.get("domain_bpbs") or {}).values())):
        return "is damaged (domain_bpbs are not all numbers)"
    if not all(map(is_stage_begun, meta.get("stages_begun", []))):
        return "is damaged (stages_begun are not all index, step and seconds)"
    if not all(isinstance(own, list) for own in meta.get("own_identity") or []):
        return "is damaged (own_identity is no list of lists)"
    return None


def is_number(value):
    """Whether a value of a meta file can be computed with: NaN can, and a number of 400 digits not.
    """
    if isinstance(value, float):
        return True
    return isinstance(value, int) and abs(value) <= LARGEST


def is_stage_begun(value):
    """Whether a list is [index, step, seconds], as curriculum.with_stage() makes it."""
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def is_checkpoint(value):
    """Whether a list is [folder, step]."""
    return len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def problem_of_step(meta, step):
    """Why a meta file whose keys are as they should be is not that of a step, or None."""
    if meta["world_size"] < 1:
        return f"is damaged (it was saved by {meta['world_size']} ranks)"
    if meta["step"] != step:
        return f"is damaged (it is of step {meta['step']})"
    return problem_of_names(meta["files"], step)


def problem_of_names(files, step):
    """Why these are not the names of the files of a step, or None.

    Names are checked here, where they are read, because they are opened and, by prune(), deleted:
    a meta file from elsewhere must not name ../../thesis.tex.
    """
    if model_file(step) not in files:
        return f"is damaged (it does not name {model_file(step)})"
    of_rank = re.compile(rf"optim_{step:06d}_rank(?:0|[1-9][0-9]{{0,5}})\.pt")
    for name in files:
        if name != model_file(step) and not of_rank.fullmatch(name):
            return f"names {name[:80]!r}, which is no file of step {step}: do not use it"
    return None


def upgrade_meta(meta):
    """The meta of an older format in the current one, as a new dict. UserError: a newer format.

    Format 2 differs in the optimizers' state, which says itself what it is: it belonged to a layout
    and to a number of ranks (optimizer_state.py reads both).

    Format 1 had no `format` and a single class, whose config said with `ngrams` how many n-grams
    are mixed in:
        {"model_class": "gpt", "config": {"depth": 3, "ngrams": 0}}
        -> {"format": 3, "model_class": "lookup", "config": {"depth": 3}}
        {"model_class": "gpt", "config": {"depth": 3, "ngrams": 9}}
        -> {"format": 3, "model_class": "lookup_ngrams", "config": {"depth": 3, "ngrams": 9}}
    """
    found = meta.get("format", 1)
    if found == FORMAT:
        return meta
    if found == 2:
        return {**meta, "format": FORMAT}
    if found != 1:
        raise UserError(
            f"{meta_file(meta.get('step', 0))} has format {found}, "
            f"this version reads 1 to {FORMAT}: update nanochat"
        )
    upgraded = {**meta, "format": FORMAT}
    if meta.get("model_class") != "gpt" or "config" not in meta:
        return upgraded
    config = dict(meta["config"])
    if config.get("ngrams"):
        upgraded["model_class"] = "lookup_ngrams"
    else:
        upgraded["model_class"] = "lookup"
        config.pop("ngrams", None)
    upgraded["config"] = config
    return upgraded


def write_meta(dir, meta):
    """Write the meta file of meta["step"], atomically, with a digest of its own contents."""
    meta = json.loads(json.dumps(meta))  # tuples become lists, as they will be when read
    text = json.dumps({**meta, "digest": digest_of(meta)}, indent=1)
    atomic_write(Path(dir) / meta_file(meta["step"]), text)


def digest_of(meta):
    """SHA-256 of everything in a meta file except the digest itself."""
    content = {key: meta[key] for key in sorted(meta) if key != "digest"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# verify

def verify_files(dir, meta, names):
    """Read `names`, files of a step, and return those whose hash is not the meta file's.

    The hashes are remembered in .verified.json for damaged_files.
    """
    dir = Path(dir)
    verified = read_verified(dir)
    damaged = []
    for name in names:
        stamp = stamp_of(dir / name)  # before reading, so that a change meanwhile is noticed
        digest = sha256(dir / name)
        verified[name] = [*stamp, digest]
        if digest != meta["files"][name]:
            damaged.append(name)
    write_verified(dir, verified)
    return damaged


def damaged_files(dir, meta, names):
    """As verify_files, but files that were verified and not changed since are not read again.

    A file counts as unchanged if its size and its modification time are the same. Damage that
    changes neither is found by verify_files alone.
    """
    dir = Path(dir)
    verified = read_verified(dir)
    to_read = []
    for name in names:
        if verified.get(name) != [*stamp_of(dir / name), meta["files"][name]]:
            to_read.append(name)
    return verify_files(dir, meta, to_read) if to_read else []


def stamp_of(path):
    """(size in bytes, modification time in ns) of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_verified(dir):
    """{file name: [size, modification time, SHA-256]} of the files that were verified in `dir`."""
    try:
        verified = json.loads((dir / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(verified, dict):
        return {}
    entries = {}
    for name, entry in verified.items():
        if STEP_FILE.fullmatch(name) and isinstance(entry, list):
            entries[name] = entry
    return entries


def write_verified(dir, verified):
    """Remember verified files. Without permission to write, they are verified at every start."""
    # a file that was changed a moment ago may change again within the resolution of the clock
    settled = time.time_ns() - 2_000_000_000
    kept = {}
    for name, entry in verified.items():
        if not (dir / name).exists():
            continue
        size, modified = stamp_of(dir / name)
        if entry[:2] == [size, modified] and modified < settled:
            kept[name] = entry
    try:
        atomic_write(dir / VERIFIED_FILE, json.dumps(kept, indent=1))
    except OSError:
        pass
