"""Checkpoints that are whole or not there.

    $NANOCHAT_BASE_DIR/base_checkpoints/d4/model_000500.pt          weights, plain keys
                                           optim_000500_rank0.pt    optimizer shard, loader position and RNG of a rank
                                           meta_000500.json         written last, with the hash of each file above

A step without its meta file does not exist, and weights that are not finite are not saved. `latest` is decided from meta files,
never from a model file's name. Numbers count completed optimizer steps. Of the complete steps a run keeps the newest few, the best
by validation (`val_bpb`, of the same few documents at each step) and the last one before its rate began to fall, from which a
longer run can go on.

    python -m nanochat.checkpoint_manager DIR            # lists the steps: size, validation, complete or why not
    python -m nanochat.checkpoint_manager DIR --verify   # reads every file and compares its hash
    python -m nanochat.checkpoint_manager DIR --prune    # deletes what a run would not have kept
    python -m nanochat.checkpoint_manager DIR --rescue   # goes on with training, with safe settings (emergency_training.sh)
"""
import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from nanochat.common import (
    UserError, all_reduce_max, atomic_file, atomic_write, get_base_dir, get_dist_info, install_error_hook, print0, sha256,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer

MODEL_CLASSES = {"gpt": GPT}  # a checkpoint names its class
FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
KEEP = 3  # the newest complete steps that stay
STEP_FILE = re.compile(r"(?:meta|model|optim)_(\d+)(?:_rank\d+)?\.(?:json|pt)")
STAGES = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft"}


def checkpoint_dir(source, model_tag):
    """Folder of the checkpoints of a stage (base, mid, sft or rl)."""
    if source not in FOLDERS:
        raise UserError(f"source={source} is not a stage: choose from {', '.join(FOLDERS)}")
    return get_base_dir() / FOLDERS[source] / model_tag


def advice(source):
    """How to come by a checkpoint of a stage."""
    return f"run python -m {STAGES[source]} first" if source in STAGES else f"no stage makes {source} checkpoints yet"


class SaveUnderWay:
    """A step that a thread writes, from a snapshot, while training goes on.

    model: the module; optimizer: this rank's state (a dict), or None; meta: dict for JSON. Order: all files under their
    names by rename (here the training may go on), all ranks meet, then rank 0 writes the meta file with the hashes and
    prunes the folder to `keep`. Ranks meet in finish(), on the main thread, so that no two collectives ever cross.
    A step of that number that another run left is gone from the beginning on.
    """

    def __init__(self, dir, step, model, optimizer, meta, rank, keep=KEEP):
        self.dir, self.step, self.meta, self.rank, self.keep = Path(dir), step, dict(meta), rank, keep
        self.dir.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (self.dir / f"meta_{step:06d}.json").unlink(missing_ok=True)
        files = {f"model_{step:06d}.pt": model.state_dict()} if rank == 0 else {}
        if optimizer is not None:
            files[f"optim_{step:06d}_rank{rank}.pt"] = optimizer
        files = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), files)
        self.hashes, self.error = {}, RuntimeError(f"the files of step {step} were not all written")
        self.thread = threading.Thread(target=self._write, args=(files,), daemon=True)
        self.thread.start()

    def _write(self, files):
        try:
            for name, state in files.items():
                if name.startswith("model") and not all(tensor.isfinite().all() for tensor in state.values()):
                    raise RuntimeError("its weights are not finite")
                with atomic_file(self.dir / name) as file:
                    torch.save(state, file)
                self.hashes[name] = sha256(self.dir / name)
            self.error = None
        except (OSError, RuntimeError) as error:  # torch's writer calls a full disk a RuntimeError
            self.error = error

    def done(self):
        """Whether this rank's files are written, so that finish() would not wait for them."""
        return not self.thread.is_alive()

    def finish(self):
        """Wait for the files of all ranks and make the step complete. Every rank calls it. OSError on all where one could not write."""
        self.thread.join()
        everyone = [(self.hashes, self.error and str(self.error.__context__ or self.error))]
        if get_dist_info()[3] > 1:
            everyone *= get_dist_info()[3]
            dist.all_gather_object(everyone, everyone[0])
        hashes = {name: digest for part, _ in everyone for name, digest in part.items()}
        error = next((error for _, error in everyone if error), None)
        if self.rank == 0 and not error:
            try:
                write_meta(self.dir, {**self.meta, "step": self.step, "saved": time.time(), "world_size": len(everyone), "files": hashes})
                prune(self.dir, self.keep)
            except OSError as failure:
                error = str(failure)
        if all_reduce_max(bool(error))[0]:
            raise OSError(f"step {self.step} was not saved in {self.dir}: {error or 'rank 0 says why'}")


class Checkpoints:
    """The checkpoints of one run: the lock on their folder, the save under way, and the steps to go back to.

    resumed_from: the step that the run goes on from, or None. Ranks call all but writing() alike.
    """

    def __init__(self, dir, rank, keep=KEEP, resumed_from=None):
        self.dir, self.rank, self.keep = Path(dir), rank, keep
        self.lock = lock_folder(dir, rank)
        self.good_steps, self.under_way = [], None
        for step in reversed(complete_steps(dir) if resumed_from is not None else []):
            if step == resumed_from or self.good_steps and step < self.good_steps[0]:
                self.good_steps.insert(0, step)
            elif self.good_steps:  # a run before this one in the same folder
                break

    def save(self, step, model, optimizer, meta):
        """Begin to save; finish() completes it. What is saved already is not saved again."""
        self.finish(must=False)
        if step not in self.good_steps[-1:]:
            self.good_steps.append(step)
            self.under_way = SaveUnderWay(self.dir, step, model, optimizer, meta, self.rank, self.keep)

    def writing(self):
        """Whether finish() would wait for this rank's files."""
        return self.under_way is not None and not self.under_way.done()

    def finish(self, must=True):
        """Complete the save under way. Where that fails, OSError if it must not; otherwise a line, for the next may work."""
        under_way, self.under_way = self.under_way, None
        if under_way:
            try:
                under_way.finish()
            except OSError as error:
                self.good_steps.remove(under_way.step)
                if must:
                    raise
                print0(f"warning: {error}: going on without it")

    def newest(self):
        """The newest complete step, or None."""
        self.finish(must=False)
        return (complete_steps(self.dir) or [None])[-1]

    def amend(self, step, **fields):
        """Write more into the meta file of a complete step."""
        if self.rank == 0:
            write_meta(self.dir, {**read_metas(self.dir)[step], **fields})
            prune(self.dir, self.keep)

    def last_good(self, step):
        """The step to go back to from `step`, or None."""
        self.finish(must=False)
        there = complete_steps(self.dir)
        self.good_steps = [good for good in self.good_steps if good in there]  # others were pruned
        if len(self.good_steps) > 1 and step == self.good_steps[-1]:
            self.good_steps.pop()  # not a single good step since: that one may be sick itself
        return self.good_steps[-1] if self.good_steps else None

    def load(self, step, model, optimizers, device):
        """Take weights and optimizer states of `step` into a model and its optimizers that exist."""
        weights, state, _ = read_checkpoint(self.dir, step, device, self.rank)
        model.load_state_dict(weights)
        load_optimizers(optimizers, state["optimizers"])


def lock_folder(dir, rank):
    """Hold `dir` for this run until the process ends, however it does. UserError where another run holds it.

    What killed runs left half written is deleted. The kernel drops the lock (flock) with the process, so that nothing stale is
    left after a kill. Keep what is returned.
    """
    if rank != 0:
        return None
    Path(dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(dir) / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"process {file.read().strip() or '?'} is training into {dir}: stop it, or name another --model_tag") from None
    for path in Path(dir).glob("*.tmp"):
        path.unlink()
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def digest_of(meta):
    """Of all that a meta file says."""
    return hashlib.sha256(json.dumps({key: meta[key] for key in sorted(meta) if key != "digest"}).encode()).hexdigest()


def write_meta(dir, meta):
    meta = json.loads(json.dumps(meta))  # as it will be read
    atomic_write(Path(dir) / f"meta_{meta['step']:06d}.json", json.dumps({**meta, "digest": digest_of(meta)}, indent=1))


def read_metas(dir):
    """{step: meta, or a line that says why the step is not complete} of all steps in `dir`, in the order in which they were saved."""
    dir, found = Path(dir), {}
    for step in sorted({int(match[1]) for path in dir.glob("*_[0-9]*") if (match := STEP_FILE.fullmatch(path.name))}):
        path = dir / f"meta_{step:06d}.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            missing = [name for name in meta["files"] if not (dir / name).exists()]
            if meta.get("digest", digest_of(meta)) != digest_of(meta) or (meta["step"], float) != (step, type(meta["saved"])):
                raise ValueError  # (a file from before there were digests has none)
            found[step] = f"{missing[0]} is missing" if missing else meta
        except FileNotFoundError:
            found[step] = f"{path.name} is missing: the run ended while it saved"
        except (ValueError, KeyError, TypeError, OSError) as error:
            found[step] = f"{path.name} is damaged ({type(error).__name__})"
    return dict(sorted(found.items(), key=lambda item: item[1]["saved"] if isinstance(item[1], dict) else 0))


def complete_metas(dir):
    """The meta of each step in `dir` whose meta file is readable and whose other files are there, in the order in which they were saved."""
    return [meta for meta in read_metas(dir).values() if isinstance(meta, dict)]


def complete_steps(dir):
    """Their steps, in that order."""
    return [meta["step"] for meta in complete_metas(dir)]


def step_before_decay(dir):
    """The newest step of `dir` that was saved before its run's rate began to fall."""
    steps = [meta["step"] for meta in complete_metas(dir) if meta.get("before_decay")]
    if not steps:
        raise UserError(f"no checkpoint in {dir} is from before the rate fell, so that none can be extended: train anew")
    return steps[-1]


def is_extended(dir, factor):
    """Whether the newest complete step of `dir` is of a run that was extended by `factor` and has not ended."""
    return any(not meta["finished"] and meta.get("extend") == factor for meta in complete_metas(dir)[-1:])


def prune(dir, keep=KEEP):
    """Delete every complete step of `dir` but the newest `keep`, the best by validation and the newest before a decay.

    Returns the steps that went. Steps that are not complete stay, for somebody may still want to look at them.
    """
    metas = complete_metas(dir)
    judged = [meta for meta in metas if meta.get("val_bpb") is not None]
    stay = metas[-keep:] + [meta for meta in metas if meta.get("before_decay")][-1:]
    stay += [min(judged, key=lambda meta: meta["val_bpb"])] if judged else []
    gone = [meta for meta in metas if meta not in stay]
    for meta in gone:
        (Path(dir) / f"meta_{meta['step']:06d}.json").unlink()  # first: from here on the step does not exist
        for name in meta["files"]:
            (Path(dir) / name).unlink()
    return [meta["step"] for meta in gone]


def usable_metas(dir):
    """{step: meta} of the complete steps, in that order. Names those that are not complete."""
    metas = read_metas(dir)
    for number, meta in metas.items():
        if not isinstance(meta, dict):
            print0(f"step {number} of {dir} is ignored: {meta}")
    return {number: meta for number, meta in metas.items() if isinstance(meta, dict)}


def resumable(dir):
    """Whether `dir` has a complete step; names what it has instead."""
    return bool(complete_steps(dir) or usable_metas(dir))


def bad_files(dir, meta, names=None):
    """Those of a step's files (or of `names`) whose hash is not the meta file's."""
    return [name for name in names or meta["files"] if sha256(Path(dir) / name) != meta["files"][name]]


def read_checkpoint(dir, step=None, device="cpu", rank=None, stage=None):
    """(weights, optimizer state of `rank` or None, meta) of a step of `dir`; None: the newest that is complete and undamaged.

    Every rank calls it with the same step, and all take the same one. Hashes are checked before anything is read. stage: what must
    have written it.
    """
    dir, metas = Path(dir), usable_metas(dir)
    steps = list(metas)
    if not steps:
        source = next((s for s, folder in FOLDERS.items() if folder == dir.parent.name), "base")
        raise UserError(f"no complete checkpoint in {dir}: {advice(source)}, or name another --model_tag")
    if step is not None and step not in steps:
        raise UserError(f"step {step} is not in {dir}: choose from {', '.join(map(str, steps))}")
    for number in reversed(steps) if step is None else [step]:
        meta = metas[number]
        if stage and meta["stage"] != stage:
            raise UserError(f"step {number} of {dir} is of {meta['stage']}, not of {stage}: name another checkpoint")
        names = [f"model_{number:06d}.pt"] + ([f"optim_{number:06d}_rank{rank}.pt"] if rank is not None else [])
        if rank is not None and (meta["world_size"] != get_dist_info()[3] or names[-1] not in meta["files"]):
            raise UserError(f"the checkpoint was saved by {meta['world_size']} ranks, this run has {get_dist_info()[3]}: resume with as many")
        bad = bad_files(dir, meta, names)
        if not all_reduce_max(len(bad))[0]:
            states = [torch.load(dir / name, map_location=device, weights_only=True) for name in names]
            return states[0], states[1] if rank is not None else None, meta
        damage = f"{dir / bad[0] if bad else 'a file of another rank'} is damaged (its hash differs from the meta file's)"
        print0(f"step {number} is ignored: {damage}")
    raise UserError(f"{damage}: choose another step or train again")


def named_checkpoint(name, dir):
    """(folder, step) of what a user calls a checkpoint: a step of `dir`, or the path of one of a step's files."""
    if name.isdigit():
        return Path(dir), int(name)
    match = STEP_FILE.fullmatch(Path(name).name)
    if not match or not Path(name).exists():
        raise UserError(f"{name} is no checkpoint: give a step, or the path of a file such as {Path(dir) / 'meta_000500.json'}")
    return Path(name).absolute().parent, int(match[1])


def load_optimizers(optimizers, states):
    """The state of each optimizer from a checkpoint; rate and weight decay stay those of this run's settings."""
    for optimizer, state in zip(optimizers, states):
        own = [{key: group[key] for key in ("initial_lr", "weight_decay") if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, own):
            group.update(values)


def newest_meta(*sources):
    """Path of the meta file written last by any of these stages, or None."""
    paths = [path for source in sources for path in (get_base_dir() / FOLDERS[source]).glob("*/meta_*.json")]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def find_model_tag(source, missing_ok=False):
    """The tag of a stage's most recently completed checkpoint. None, or UserError, where there is none."""
    newest = newest_meta(source) if source in FOLDERS else None
    if newest is None and missing_ok:
        return None
    if newest is None:
        where = checkpoint_dir(source, "")
        raise UserError(f"no {source} checkpoint under {where}: {advice(source)}")
    return newest.parent.name


def load_model(source, device, phase="eval", model_tag=None, step=None):
    """(model, tokenizer, meta) of a stage's checkpoint. source: base, mid, sft or rl; phase: train or eval.

    The newest tag and the newest complete step are taken where none is named.
    """
    dir = checkpoint_dir(source, model_tag or find_model_tag(source))
    weights, _, meta = read_checkpoint(dir, step, device)
    model, tokenizer = restore_model(dir, weights, meta, device)
    model.train(phase == "train")
    return model, tokenizer, {**meta, "dir": str(dir), "tag": dir.name}


def restore_model(dir, weights, meta, device):
    """(model, tokenizer) of what read_checkpoint() found in `dir`. UserError where the tokenizer is another by now."""
    tokenizer = get_tokenizer()
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise UserError(f"the checkpoint in {dir} was trained with another tokenizer ({meta['tokenizer']}, now {tokenizer.fingerprint}): "
                        "train again, or bring its tokenizer back")
    model = build_model(meta, device)
    model.load_state_dict(weights)
    return model, tokenizer


def build_model(meta, device):
    """The model that a meta file describes, initialised, on `device`."""
    with torch.device("meta"):
        model = MODEL_CLASSES[meta["model_class"]](GPTConfig(**meta["config"]))
    model.to_empty(device=device)
    model.init_weights()
    model.compute_dtype = getattr(torch, meta["dtype"])
    return model


SAFE = {"grad_clip": 1.0, "compile": False, "save_minutes": 2.0}  # and half the learning rate


def rescue(dir):
    """Start the stage that wrote the newest undamaged step of `dir` again from that step, with safe settings. Does not return."""
    metas = [meta for meta in usable_metas(dir).values() if not bad_files(dir, meta)]
    if not metas or metas[-1]["finished"]:
        raise UserError(f"no unfinished run has a whole checkpoint in {dir}: name the folder of the sick run")
    meta = metas[-1]
    before = meta["settings"]
    changed = {**SAFE, "learning_rate": before["learning_rate"] / (1 if SAFE.items() <= before.items() else 2)}  # once, not at every call
    settings = {**before, **changed, "resume": False, "extend": None, "resume_from_checkpoint": f"{dir / 'meta_'}{meta['step']:06d}.json"}
    words = [f"--{name}={value}" for name, value in settings.items() if value not in (None, "")]
    print0(f"going on from step {meta['step']} of {dir} with " + ", ".join(f"{k}={v} (was {before.get(k)})" for k, v in changed.items())
           + ". Ctrl+C saves; the same call goes on")
    ranks = meta["world_size"]
    launcher = ["-m", f"scripts.{meta['stage']}"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher, "--"]
    os.execv(sys.executable, [sys.executable, *launcher, *words])


def main():
    install_error_hook()
    parser = argparse.ArgumentParser(prog="python -m nanochat.checkpoint_manager", description="List the checkpoints of a folder.")
    parser.add_argument("dir", nargs="?", help="a folder of checkpoints; without one, that of the checkpoint saved last")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its hash; damage ends with status 1")
    parser.add_argument("--prune", action="store_true", help=f"delete all but the newest {KEEP}, the best, and the one before the decay")
    parser.add_argument("--rescue", action="store_true", help="go on with training from the newest step, with safe settings")
    options = parser.parse_args()
    newest = newest_meta(*FOLDERS)
    options.dir = Path(options.dir or newest and newest.parent or checkpoint_dir("base", "d4")).absolute()
    if not options.dir.is_dir():
        raise UserError(f"{options.dir} is not a folder: name one that holds checkpoints")
    if options.rescue:
        rescue(options.dir)
    if options.prune:
        lock = lock_folder(options.dir, 0)  # noqa: F841 - held while we delete
        print(f"deleted steps: {', '.join(map(str, prune(options.dir))) or 'none'}")
    damaged, metas = False, read_metas(options.dir)
    if not metas:
        print(f"no checkpoint in {options.dir}")
    for step, meta in metas.items():
        if not isinstance(meta, dict):
            damaged = damaged or options.verify
            print(f"{step:8d}  {'':>10}  {'':>8}  not to be used: {meta}")
            continue
        size = sum((options.dir / name).stat().st_size for name in meta["files"])
        bad = bad_files(options.dir, meta) if options.verify else []
        damaged = damaged or bool(bad)
        words = ["DAMAGED: " + ", ".join(bad) if bad else "verified" if options.verify else "complete",
                 *["finished"] * bool(meta.get("finished")), *["before the decay"] * bool(meta.get("before_decay"))]
        bpb = meta.get("val_bpb")
        print(f"{step:8d}  {size / 1e6:7.1f} MB  {f'{bpb:.4f}' if bpb else '':>8}  {', '.join(words)}")
    raise SystemExit(int(damaged))


if __name__ == "__main__":
    main()
