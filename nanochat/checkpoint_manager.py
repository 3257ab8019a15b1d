"""The steps of a training run: saved while training continues, kept, found, loaded.

    $NANOCHAT_BASE_DIR/base_checkpoints/d4/    the folder of one run

checkpoint.py has the files of a step, folders.py the folders of all runs.

Of the complete steps a run keeps the newest few, the best by validation (`val_bpb`, of the same
documents at each step) and the last one before LR decay, from which a longer run can resume. The
tokenizer is beside them, so that a model can be loaded whatever was trained since.

    python -m nanochat.checkpoint_manager DIR    # runs python -m scripts.checkpoints DIR
"""
import dataclasses
import math
import runpy
import threading
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nanochat.checkpoint import (
    STEP_FILE,
    begin_step,
    complete_metas,
    complete_step,
    complete_steps,
    damaged_files,
    list_steps,
    load_checkpoint,
    map_file,
    meta_file,
    model_file,
    optimizer_file,
    read_meta,
    save_checkpoint,  # noqa: F401, its documented place is this file
    states_of_rank,
    write_meta,
    write_states,
)
from nanochat.common import UserError, all_reduce_max, get_dist_info, print0
from nanochat.folders import (
    TOKENIZER_FOLDER,
    checkpoint_dir,
    find_model_tag,
    list_models,
    lock_folder,
    remedy_for_missing,
)
from nanochat.guard import Guard
from nanochat.optimizer_state import problem_of
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.variants import MODEL_CLASSES

KEEP = 3  # newest complete steps that stay
LONGEST_CONTEXT = 2**20  # tokens; no model has a longer one, and its table of rotary angles fits
DTYPES = ("float32", "bfloat16")


# --------------------------------------------------------------------------------------------------
# a run's checkpoints

class AsyncSave:
    """A step that a thread writes from a snapshot while training continues.

    The arguments are those of save_checkpoint. The snapshot, in the memory of the host, is made
    here (weights that are given as a dict are one already); the thread writes the files of this
    rank. The collectives are in finish(), which the main thread calls, so that no two collectives
    ever cross.
    """

    def __init__(self, dir, step, model, optimizer, meta, rank):
        self.dir = Path(dir)
        self.step = step
        self.meta = dict(meta)
        self.rank = rank
        begin_step(dir, step, rank)
        snapshot = states_of_rank(step, model, optimizer, rank)
        for name, state in snapshot.items():
            if state is not model:
                snapshot[name] = tree_map_only(torch.Tensor, copy_to_host, state)
        self.hashes = {}
        self.error = f"the files of step {step} were not all written"  # until they are
        self.thread = threading.Thread(target=self._write, args=(snapshot,), daemon=True)
        self.thread.start()

    def _write(self, snapshot):
        self.hashes, self.error = write_states(self.dir, snapshot)

    def done(self):
        """Whether this rank's files are written, so that finish() would not wait for them."""
        return not self.thread.is_alive()

    def finish(self):
        """Wait for the files of all ranks and make the step complete. Every rank calls it.

        OSError on every rank if one of them could not write its files.
        """
        self.thread.join()
        complete_step(self.dir, self.step, self.meta, self.rank, self.hashes, self.error)


def copy_to_host(tensor):
    return tensor.detach().to("cpu", copy=True)


class CheckpointManager:
    """The checkpoints of one run: the lock on its folder, the async save, the good steps.

    keep: how many of the newest steps stay. resumed_from: the step from which the run resumes, or
    None. run: the name of the run in its meta files, whose steps alone are deleted; None: those of
    any run. All ranks make the same calls in the same order, except writing().
    """

    def __init__(self, dir, rank, keep=KEEP, resumed_from=None, run=None):
        self.dir = Path(dir)
        self.rank = rank
        self.keep = keep
        self.run = run
        self.lock = lock_folder(dir, rank)
        self.pending = None  # an AsyncSave
        self.good_steps = []  # to which a roll-back may return, in the order they were saved
        if resumed_from is not None:
            self.good_steps = steps_of_run(complete_steps(dir), resumed_from)

    def save_tokenizer(self, tokenizer):
        """Put the run's tokenizer beside its checkpoints, before there is the first of them."""
        if self.rank != 0:
            return
        found = own_tokenizer(self.dir)
        if found is None or found.fingerprint != tokenizer.fingerprint:
            tokenizer.save(self.dir / TOKENIZER_FOLDER)

    def save(self, step, model, optimizer_state, meta):
        """Begin to save a step; finish() completes it. A step that is saved is not saved again."""
        self.finish(raise_on_error=False)
        if self.good_steps and self.good_steps[-1] == step:
            return
        self.good_steps.append(step)
        self.pending = AsyncSave(self.dir, step, model, optimizer_state, meta, self.rank)

    def writing(self):
        """Whether finish() would wait for this rank's files."""
        return self.pending is not None and not self.pending.done()

    def finish(self, raise_on_error=True):
        """Complete the pending save and delete the steps that need not stay.

        If the step could not be saved: OSError, or one printed line, for the next save may work.
        """
        pending = self.pending
        self.pending = None
        if pending is None:
            return
        try:
            pending.finish()
        except OSError as error:
            self.good_steps.remove(pending.step)
            if raise_on_error:
                raise
            print0(f"warning: {error}: continuing without it")
            return
        self._prune()

    def newest(self):
        """The newest complete step, or None."""
        self.finish(raise_on_error=False)
        steps = complete_steps(self.dir)
        return steps[-1] if steps else None

    def amend(self, step, **fields):
        """Change or add fields of the meta file of a complete step."""
        if self.rank == 0:
            write_meta(self.dir, {**read_meta(self.dir, step), **fields})
        self._prune()

    def last_good(self, step):
        """The step to return to when training diverged at `step`, or None."""
        self.finish(raise_on_error=False)
        complete = complete_steps(self.dir)
        self.good_steps = [good for good in self.good_steps if good in complete]
        # no good step was trained since the last save: its weights may have diverged already
        if len(self.good_steps) > 1 and self.good_steps[-1] == step:
            self.good_steps.pop()
        # rank 0 decides, for another rank may have listed the folder while rank 0 pruned it
        mine = self.good_steps[-1] if self.good_steps and self.rank == 0 else -1
        good_step = int(all_reduce_max(mine)[0])
        return good_step if good_step >= 0 else None

    def better_than(self, bpb):
        """(step, its bits per byte) of the best step where that is below bpb; else (None, bpb).

        Every rank calls it; rank 0 decides.
        """
        found = better_step(complete_metas(self.dir), bpb) if self.rank == 0 else None
        step = int(all_reduce_max(-1 if found is None else found)[0])
        if step < 0:
            return None, bpb
        return step, validation_bpb(read_meta(self.dir, step))

    def load(self, step, layout):
        """Load weights and optimizer states of `step` into a layout in use, and its model."""
        weights, state, _ = read_checkpoint(self.dir, step, self.rank)
        layout.load_weights(weights)
        layout.load_optimizer_state(state["optimizers"])

    def _prune(self):
        if self.rank != 0:
            return
        try:
            prune(self.dir, self.keep, self.run)
        except OSError as error:
            print0(f"warning: old checkpoints in {self.dir} were not deleted: {error}")


def steps_of_run(steps, last):
    """The steps of one run up to `last`. steps: those of a folder, in the order they were saved.

    Step numbers rise within a run, so an earlier run ends where a number is not below the next:
    [4, 10, 2, 6, 8], 8 -> [2, 6, 8].
    """
    if last not in steps:
        return []
    run = [last]
    for step in reversed(steps[:steps.index(last)]):
        if step >= run[0]:
            break
        run.insert(0, step)
    return run


# --------------------------------------------------------------------------------------------------
# the steps of a folder

def print_incomplete(dir, steps):
    """One line for each of `steps`, of list_steps(dir), that is ignored: it is not complete."""
    for step in steps:
        if step.problem:
            print0(f"step {step.step} of {dir} is ignored: {step.problem}")


def resumable(dir):
    """Whether `dir` has a complete step. If it has not, the incomplete ones are printed."""
    if complete_steps(dir):
        return True
    print_incomplete(dir, list_steps(dir))
    return False


def prune(dir, keep=KEEP, run=None):
    """Delete the complete steps of `dir` that need not stay, and return their numbers.

    run: the name of a run; the steps of others, and those that name none, are left alone. None:
    the steps of all runs. Incomplete steps stay, for somebody may want to examine them.
    """
    deleted = []
    for meta in steps_to_delete(complete_metas(dir), keep, run):
        delete_step(dir, meta)
        deleted.append(meta["step"])
    return deleted


def steps_to_delete(metas, keep, run=None, finished=False):
    """The metas of the steps that prune() deletes. metas: in the order they were saved.

    The newest `keep`, the best by validation and the newest before LR decay stay, and so does every
    finished model, unless `finished` says that those may be deleted as well.
    """
    if run is not None:
        metas = [meta for meta in metas if meta.get("run") == run]
    staying = steps_that_stay(metas, keep)
    deleted = []
    for meta in metas:
        is_model = meta.get("finished") and not finished
        if meta["step"] not in staying and not is_model:
            deleted.append(meta)
    return deleted


def delete_step(dir, meta):
    """Delete the files of a complete step."""
    (Path(dir) / meta_file(meta["step"])).unlink()  # first: now the step does not exist
    for name in meta["files"]:
        (Path(dir) / name).unlink()


def steps_that_stay(metas, keep):
    """The numbers of the newest `keep` steps, of the best, and of the newest before LR decay."""
    newest = metas[-keep:]
    before_decay = [meta for meta in metas if meta.get("before_decay")]
    evaluated = [meta for meta in metas if is_evaluated(meta)]
    best = sorted(evaluated, key=validation_bpb)
    return {meta["step"] for meta in (*newest, *before_decay[-1:], *best[:1])}


def best_step(dir):
    """The step of a finished run that is best by validation, where that is not its last; else None.

    A run on little text may have learnt it by heart by its end.
    """
    metas = complete_metas(dir)
    if not metas or not metas[-1].get("finished") or not is_evaluated(metas[-1]):
        return None
    return better_step(metas, validation_bpb(metas[-1]))


def better_step(metas, bpb):
    """The best step by validation of the last run among metas, if it is better than bpb; or None.

    metas: of complete steps, in the order they were saved. bpb: bits per byte.
    """
    steps = [meta["step"] for meta in metas]
    of_run = steps_of_run(steps, steps[-1]) if steps else []
    evaluated = [meta for meta in metas[len(steps) - len(of_run):] if is_evaluated(meta)]
    best = min(evaluated, key=validation_bpb, default=None)
    return best["step"] if best and validation_bpb(best) < bpb else None


def is_evaluated(meta):
    """Whether a meta has bits per byte of the validation documents by which steps are compared."""
    return math.isfinite(validation_bpb(meta) or math.nan)


def validation_bpb(meta):
    """The number by which the steps of a run are compared, or None: the bits per byte in a meta,
    of a diffusion model the bound on them."""
    bpb = meta.get("val_bpb")
    return meta.get("val_bpb_bound") if bpb is None else bpb


# --------------------------------------------------------------------------------------------------
# read

def read_checkpoint(dir, step=None, rank=None, stage=None):
    """(weights, what `rank` resumes with or None, meta) of a step of `dir`.

    What a rank resumes with is the dict of resumed_state(), whatever the number of ranks that saved
    the step.

    step: None is the newest that is complete and undamaged. stage: the stage that must have
    written it, such as base_train. Every rank calls it with the same step, and all ranks take the
    same one. The hashes are verified first, each file by one rank; the tensors are mapped from the
    files, on the CPU (see load_checkpoint). UserError if there is no such step.
    """
    dir = Path(dir)
    _, own_rank, _, ranks = get_dist_info()
    for meta in reversed(candidates(dir, step)):
        check_origin(dir, meta, stage)
        names = [model_file(meta["step"])]
        if rank is not None:
            names += optimizer_files(meta)

        # all ranks take the step, or none
        damaged = damaged_files(dir, meta, names[own_rank::ranks])
        numbers = [1 + names.index(name) for name in damaged]
        worst = int(all_reduce_max(max(numbers, default=0))[0])
        if not worst:
            weights, _, meta = load_checkpoint(dir, meta["step"])
            check_weights(meta, weights, dir / model_file(meta["step"]))
            state = None
            if rank is not None:
                states = [read_state(dir / name) for name in names[1:]]
                state = resumed_state(states, rank, ranks)
            return weights, state, meta
        damage = f"{dir / names[worst - 1]} is damaged (its hash differs from the meta file's)"
        print0(f"step {meta['step']} is ignored: {damage}")
    raise UserError(f"{damage}: choose another step or train again")


def candidates(dir, step):
    """The metas of the steps that may be read: of `step`, or of all complete ones if it is None."""
    steps = list_steps(dir)
    print_incomplete(dir, steps)
    return complete_ones(dir, steps, step)


def complete_ones(dir, steps, step):
    """The metas of the complete ones of list_steps(), or of `step` alone. UserError for none."""
    metas = [found.meta for found in steps if found.meta]
    if not metas:
        newest = f" ({steps[-1].problem})" if steps else ""
        raise UserError(f"no complete checkpoint in {dir}{newest}: {remedy_for_missing(dir)}")
    if step is None:
        return metas
    for meta in metas:
        if meta["step"] == step:
            return [meta]
    known = ", ".join(str(meta["step"]) for meta in metas)
    raise UserError(f"step {step} is not in {dir}: choose from {known}")


def check_origin(dir, meta, stage):
    """UserError if another stage than `stage` wrote a step; None accepts any."""
    if stage and meta.get("stage") != stage:
        raise UserError(
            f"step {meta['step']} of {dir} is of {meta.get('stage')}, not of {stage}: "
            "name another checkpoint"
        )


def optimizer_files(meta):
    """The names of the files that the ranks have written of a step, in the order of the ranks."""
    names = []
    for rank in range(meta["world_size"]):
        names.append(optimizer_file(meta["step"], rank))
        if names[-1] not in meta["files"]:
            raise UserError(
                f"step {meta['step']} has no {names[-1]}, without which its run cannot be "
                "resumed: choose another step, or start from its weights")
    return names


def read_state(path):
    """What a rank has saved besides the weights, mapped from its file and checked."""
    state = map_file(path)
    check_state(state, path)
    return state


def resumed_state(states, rank, ranks):
    """What a rank resumes with, from what each rank has saved: a dict.

    optimizers  for Layout.load_optimizer_state()
    loaders     the states of the loaders of all ranks that saved: dataloader.py has what a rank
                resumes with
    rng, guard  this rank's own; rank 0's where the number of ranks is another

    UserError for formats 1 and 2, whose optimizer state belongs to a number of ranks, where that is
    another.
    """
    same = len(states) == ranks
    own = states[rank if same else 0]
    optimizers = [state["optimizers"] for state in states]
    formats = {type(saved) for state in states for saved in state["optimizers"]}
    if dict in formats:
        if not same or list in formats:
            raise UserError(
                f"the checkpoint was saved by {len(states)} ranks of an earlier version, this run "
                f"has {ranks}: resume with as many; the steps it saves then can be resumed by any "
                "number")
        optimizers = [own["optimizers"]]
    return {
        "optimizers": optimizers,
        "loaders": [state["loader"] for state in states],
        "rng": own["rng"],
        "guard": own["guard"],
    }


def named_checkpoint(name, dir):
    """(folder, step) of a user's name for a checkpoint: a step of `dir`, or the path of a file."""
    if name.isdecimal():
        return Path(dir), int(name)
    match = STEP_FILE.fullmatch(Path(name).name)
    if not match or not Path(name).exists():
        example = Path(dir) / meta_file(500)
        raise UserError(
            f"{name} is no checkpoint: give a step, or the path of a file such as {example}"
        )
    return Path(name).absolute().parent, int(match[1])


# --------------------------------------------------------------------------------------------------
# models

def require_model(source, model_tag=None, step=None):
    """UserError where load_model() would find no complete step. Of the files, metas are read."""
    dir = checkpoint_dir(source, model_tag or find_model_tag(source))
    complete_ones(dir, list_steps(dir), step)


def load_model(source, device, phase="eval", model_tag=None, step=None):
    """(model, tokenizer, meta) of a stage's checkpoint; meta has `dir` and `tag` besides.

    source: base, mid, sft or rl. phase: train or eval. Without a model_tag or step the newest is
    taken; of a finished base run the best by validation. On a CPU, a model for evaluation uses the
    mapped pages of the file in place.
    """
    dir = checkpoint_dir(source, model_tag or find_model_tag(source))
    if step is None and source == "base":
        step = best_step(dir)
        if step is not None and phase == "train":
            print0(f"starting from step {step} of {dir.name}, the best by validation")
    weights, _, meta = read_checkpoint(dir, step)
    tokenizer = tokenizer_of(dir, meta)
    model = build_model(meta, device)
    in_place = phase == "eval" and torch.device(device).type == "cpu"
    load_weights(model, weights, assign=in_place and same_dtypes(model, weights))
    model.train(phase == "train")
    return model, tokenizer, {**meta, "dir": str(dir), "tag": dir.name}


def restore_model(dir, weights, meta, device):
    """(model, tokenizer) of what read_checkpoint returned for `dir`, for training.

    The weights are copied: training would otherwise update the mapped pages of a file that the run
    may delete, whose space on the disk would then stay taken.
    """
    tokenizer = tokenizer_of(dir, meta)
    model = build_model(meta, device)
    load_weights(model, weights, assign=False)
    return model, tokenizer


def tokenizer_of(dir, meta):
    """The tokenizer with which a checkpoint of `dir` was trained.

    It is beside the checkpoint. A folder of an earlier version has none; the one of the base
    directory is then taken, if it is the same. UserError where neither is.
    """
    check_keys(meta, "tokenizer")
    tokenizer = own_tokenizer(dir)
    if tokenizer is None or tokenizer.fingerprint != meta["tokenizer"]:
        tokenizer = get_tokenizer()
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise UserError(
            f"the checkpoint in {dir} was trained with another tokenizer ({meta['tokenizer']}, "
            f"now {tokenizer.fingerprint}): train again, or bring its tokenizer back"
        )
    check_keys(meta, "config")
    vocab_size = tokenizer.get_vocab_size()
    known = meta["config"].get("vocab_size", vocab_size)
    if known < vocab_size:
        raise UserError(
            f"the model in {dir} knows {known} tokens, its tokenizer has {vocab_size}: "
            "train again, or get the checkpoint again from where it came"
        )
    return tokenizer


def own_tokenizer(dir):
    """The tokenizer that was saved beside the checkpoints of `dir`, or None."""
    folder = Path(dir) / TOKENIZER_FOLDER
    if not folder.exists():
        return None
    try:
        return Tokenizer.load(folder)
    except UserError as error:
        print0(f"warning: the tokenizer beside the checkpoints is ignored: {error}")
        return None


def hand_out_tokenizer(folder):
    """Put the tokenizer in `folder`, which is about to be replaced, beside the checkpoints that
    were trained with it and have none: those of earlier versions."""
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError:
        return  # there is none, or a damaged one, with which no checkpoint can be loaded
    for model in list_models():
        if model.meta.get("tokenizer") != tokenizer.fingerprint:
            continue
        found = own_tokenizer(model.dir)
        if found is None or found.fingerprint != tokenizer.fingerprint:
            tokenizer.save(model.dir / TOKENIZER_FOLDER)
            print0(f"kept the tokenizer of {model.dir} beside its checkpoints")


def build_model(meta, device):
    """The model that a meta file describes, initialised, on `device`.

    UserError for an unknown class or dtype, and for a config that no model can have.
    """
    check_keys(meta, "dtype")
    if meta["dtype"] not in DTYPES:
        raise UserError(f"dtype={meta['dtype']} is unknown: choose from {', '.join(DTYPES)}")
    model = uninitialised_model(meta, device)
    model.init_weights()
    model.compute_dtype = getattr(torch, meta["dtype"])
    return model


def untrained_model(meta, device):
    """The network that a meta file describes as it is before the first step, to be evaluated.

    It has no counts of n-grams: they are of the training text.
    """
    model = build_model(meta, device).for_chat()
    return model.cast_for_inference(model.compute_dtype).eval()


def uninitialised_model(meta, device):
    """The model that a meta file describes, its tensors allocated and not set, on `device`."""
    check_keys(meta, "model_class", "config")
    model_class = MODEL_CLASSES.get(meta["model_class"])
    if model_class is None:
        choices = ", ".join(MODEL_CLASSES)
        raise UserError(f"model_class={meta['model_class']} is unknown: choose from {choices}")
    config = config_of(model_class, meta)
    with torch.device(device), NoInitialisers():
        return model_class(config)


def config_of(model_class, meta):
    """The config that a meta file describes.

    UserError: a field is unknown, has no value, or has one that no model can have.
    """
    config_class = model_class.config_class
    given = meta["config"]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    wrong = sorted((given.keys() - fields.keys()) | (required - given.keys()))
    wrong += [
        f"{name}={str(value)[:30]}"
        for name, value in given.items()
        if name in fields and not is_possible(value, fields[name])
    ]
    if not wrong:
        config = config_class(**given)
        if is_consistent(config):
            return config
        wrong = [f"width={config.width}, heads={config.heads}, kv_heads={config.kv_heads}"]
    raise UserError(
        f"the config of the checkpoint does not fit model_class={meta['model_class']} "
        f"({', '.join(wrong)}): use the version of nanochat that saved it, or train again"
    )


def is_possible(value, field):
    """Whether a value may stand in a field of a config; a size is 0 only where that is a default.

    field: of dataclasses.fields(), its type int, float or bool.
    """
    if field.type is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if field.type is int:
        smallest = 0 if field.default == 0 else 1
        return isinstance(value, int) and value >= smallest
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def is_consistent(config):
    """Whether the width divides into heads, and the heads among the key/value heads."""
    if config.width % config.heads or config.heads % config.kv_heads:
        return False
    return config.head_dim % 2 == 0  # rotary positions turn pairs of dimensions


def check_weights(meta, weights, path):
    """UserError unless `weights`, mapped from the file at `path`, are those that a meta file says.

    Nothing is allocated: the model is built without storage (on torch's meta device), and only once
    its sizes are known to be those of a model that fits into the file.
    """
    check_keys(meta, "model_class", "config", "dtype", "tokenizer")
    problem = problem_of_weights(meta, weights, path)
    if problem:
        raise UserError(
            f"the weights of the checkpoint do not fit the model ({problem}): "
            "use the version of nanochat that saved it, or train again"
        )


def problem_of_weights(meta, weights, path):
    """What check_weights has to say of the weights, or None."""
    # 1. what is in the file: tensors that lie in it one behind the other
    if not isinstance(weights, dict):
        return f"{path.name} holds no table of tensors"
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is no tensor"
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            return f"{name} is not stored whole"
    file_bytes = path.stat().st_size
    bytes_of_all = sum(tensor.nbytes for tensor in weights.values())
    if bytes_of_all > file_bytes:
        return f"they are {bytes_of_all:,} bytes, {path.name} has {file_bytes:,}"

    # 2. sizes, so that building the model takes neither long nor more than numbers can say
    limits = {"depth": len(weights), "max_seq_len": LONGEST_CONTEXT}
    for name, value in meta["config"].items():
        limit = limits.get(name, file_bytes)
        if isinstance(value, int) and value > limit:
            return f"{name}={str(value)[:30]}, at most {limit:,} in a file of {file_bytes:,} bytes"

    # 3. names and shapes
    try:
        expected = uninitialised_model(meta, "meta").state_dict()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    other = sorted(expected.keys() ^ weights.keys(), key=str)
    if other:
        return f"{other[0]} is in one of the two alone"
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            return f"{name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}"
        if weights[name].is_floating_point() != tensor.is_floating_point():
            return f"{name} is of {weights[name].dtype}, expected {tensor.dtype}"
    return None


def check_state(state, path):
    """UserError unless a file holds the state of a rank, in the form in which Run.save() writes it,
    or that of an earlier version.

    Whether it is the state of this model is for optimizer_state.py to say, which knows the
    parameters.
    """
    problem = _problem_of_state(state)
    if problem:
        raise UserError(
            f"{path} holds no optimizer state ({problem}): start from the weights of the "
            "checkpoint, or get the file again from where it came"
        )


def _problem_of_state(state):
    """What is wrong with the state of a rank, or None."""
    if not isinstance(state, dict) or not isinstance(state.get("optimizers"), list):
        return "no list of optimizers"
    for problem in map(problem_of, state["optimizers"]):
        if problem:
            return problem

    missing = [key for key in ("loader", "rng", "guard") if key not in state]
    if missing:
        return f"no {missing[0]}"
    if not isinstance(state["guard"], dict) or Guard().state_dict().keys() - state["guard"].keys():
        return "no state of the guard"

    own = torch.get_rng_state()
    rng = state["rng"]
    is_rng = isinstance(rng, torch.Tensor) and rng.dtype == own.dtype
    return None if is_rng and rng.shape == own.shape else "no random state of this torch"


def check_keys(meta, *keys):
    """UserError if a meta file lacks one of these keys."""
    missing = [key for key in keys if key not in meta]
    if missing:
        raise UserError(
            f"{meta_file(meta.get('step', 0))} has no {', '.join(missing)}: "
            "choose another step or train again"
        )


class NoInitialisers(TorchFunctionMode):
    """A context in which the functions of torch.nn.init leave tensors as they are.

    init_weights() sets every value later. (To build a model on the meta device instead, and to
    allocate with to_empty, imports torch's compiler and sympy: one second, and four without
    compiled Python files.)
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def same_dtypes(model, weights):
    """Whether every tensor has the same dtype in a model and in weights for it."""
    own = model.state_dict()
    return all(name in own and own[name].dtype == weights[name].dtype for name in weights)


def load_weights(model, weights, assign):
    """Load weights into a model. UserError, one line, if they are of another architecture."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        raise UserError(
            f"the weights of the checkpoint do not fit the model ({reason}): "
            "use the version of nanochat that saved it, or train again"
        ) from None


if __name__ == "__main__":
    # by its name, because no file of this package imports a script
    runpy.run_module("scripts.checkpoints", run_name="__main__", alter_sys=True)
