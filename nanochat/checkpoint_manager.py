"""Checkpoints that are whole or not there.

    $NANOCHAT_BASE_DIR/base_checkpoints/d4/model_000500.pt          weights, plain keys
                                           optim_000500_rank0.pt    optimizer shard, loader position and RNG of a rank
                                           meta_000500.json         written last, with the hash of each file above

A step without its meta file does not exist. `latest` is decided from meta files, never from a model file's name.
Numbers count completed optimizer steps.
"""
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.common import UserError, atomic_file, atomic_write, get_base_dir, get_dist_info, sha256
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer

MODEL_CLASSES = {"gpt": GPT}  # a checkpoint names its class
FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
STAGES = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft"}


def checkpoint_dir(source, model_tag):
    """Folder of the checkpoints of a stage (base, mid, sft or rl)."""
    if source not in FOLDERS:
        raise UserError(f"source={source} is not a stage: choose from {', '.join(FOLDERS)}")
    return get_base_dir() / FOLDERS[source] / model_tag


def advice(source):
    """How to come by a checkpoint of a stage."""
    return f"run python -m {STAGES[source]} first" if source in STAGES else f"no stage makes {source} checkpoints yet"


def save_checkpoint(dir, step, model, optimizer, meta, rank):
    """Save one step; every rank calls it. model: the module; optimizer: this rank's state (a dict), or None; meta: dict for JSON.

    Order: all files under their names by rename, all ranks meet, then rank 0 writes the meta file with the hashes.
    """
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    files = {}
    if rank == 0:
        files[f"model_{step:06d}.pt"] = model.state_dict()
    if optimizer is not None:
        files[f"optim_{step:06d}_rank{rank}.pt"] = optimizer
    hashes = {}
    for name, state in files.items():
        with atomic_file(dir / name) as file:
            torch.save(state, file)
        hashes[name] = sha256(dir / name)
    world_size = get_dist_info()[3]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, hashes)
        hashes = {name: digest for part in everyone for name, digest in part.items()}
    if rank == 0:
        atomic_write(dir / f"meta_{step:06d}.json",
                     json.dumps({**meta, "step": step, "saved": time.time(), "world_size": world_size, "files": hashes}, indent=1))


def complete_steps(dir):
    """Steps in `dir` whose meta file is readable and whose other files are there, in the order in which they were saved."""
    steps = []
    for path in Path(dir).glob("meta_*.json"):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if all((path.parent / name).exists() for name in meta["files"]):
                steps.append((meta["saved"], meta["step"]))
        except (ValueError, KeyError, TypeError, OSError):
            continue  # a damaged meta file: that step is not whole
    return [step for _, step in sorted(steps)]


def read_checkpoint(dir, step=None, device="cpu", rank=None):
    """(weights, optimizer state of `rank` or None, meta) of a step of `dir`, the newest complete one by default; hashes are checked."""
    steps = complete_steps(dir)
    if not steps:
        source = next((s for s, folder in FOLDERS.items() if folder == Path(dir).parent.name), "base")
        raise UserError(f"no complete checkpoint in {dir}: {advice(source)}, or name another --model_tag")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"step {step} is not in {dir}: choose from {', '.join(map(str, steps))}")
    meta = json.loads((Path(dir) / f"meta_{step:06d}.json").read_text(encoding="utf-8"))

    def load(name):
        path = Path(dir) / name
        if sha256(path) != meta["files"][name]:
            raise UserError(f"{path} is damaged (its hash differs from the meta file's): choose another --step or train again")
        return torch.load(path, map_location=device, weights_only=True)

    optimizer = None
    if rank is not None:
        name = f"optim_{step:06d}_rank{rank}.pt"
        if meta["world_size"] != get_dist_info()[3] or name not in meta["files"]:
            raise UserError(f"the checkpoint was saved by {meta['world_size']} ranks, this run has {get_dist_info()[3]}: resume with as many")
        optimizer = load(name)
    return load(f"model_{step:06d}.pt"), optimizer, meta


def load_optimizers(optimizers, states):
    """The state of each optimizer from a checkpoint; rate and weight decay stay those of this run's settings."""
    for optimizer, state in zip(optimizers, states):
        own = [{key: group[key] for key in ("initial_lr", "weight_decay")} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, own):
            group.update(values)


def find_model_tag(source, missing_ok=False):
    """The tag of a stage's most recently completed checkpoint. None, or UserError, where there is none."""
    metas = (get_base_dir() / FOLDERS[source]).glob("*/meta_*.json") if source in FOLDERS else []
    newest = max(metas, key=lambda path: path.stat().st_mtime, default=None)
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
    tokenizer = get_tokenizer()
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise UserError(f"the checkpoint in {dir} was trained with another tokenizer ({meta['tokenizer']}, now {tokenizer.fingerprint}): "
                        "train again, or bring its tokenizer back")
    model = build_model(meta, device)
    model.load_state_dict(weights)
    model.train(phase == "train")
    return model, tokenizer, {**meta, "dir": str(dir), "tag": dir.name}


def build_model(meta, device):
    """The model that a meta file describes, initialised, on `device`."""
    with torch.device("meta"):
        model = MODEL_CLASSES[meta["model_class"]](GPTConfig(**meta["config"]))
    model.to_empty(device=device)
    model.init_weights()
    model.compute_dtype = getattr(torch, meta["dtype"])
    return model
