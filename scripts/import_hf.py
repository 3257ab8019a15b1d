"""Bring a local model of transformers in: NanoChat, Qwen3, Llama or Mistral becomes one of ours.

    python -m scripts.import_hf models/Qwen3-0.6B      # config.json, safetensors, tokenizer.json
    python -m scripts.import_hf exported/ --model_tag=mine --source=sft --max_seq_len=1024
    python -m scripts.complete "My name is" --model_tag=Qwen3-0.6B
    python -m scripts.base_loss --model_tag=Qwen3-0.6B
    python -m scripts.chat_sft --source=base --model_tag=Qwen3-0.6B

What is written is a checkpoint like any other, with the tokenizer beside it. Before it stays, its
logits are compared with those of transformers, on the CPU in float32: a difference above .001
deletes it, and the exit status is 1. docs/import.md says what can be imported, and what cannot.
"""
import shutil
import sys
import time
import unicodedata
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat.checkpoint import read_meta
from nanochat.checkpoint_manager import (
    build_model,
    delete_step,
    load_model,
    load_weights,
    save_checkpoint,
)
from nanochat.common import UserError, compute_init, expand_home, print0
from nanochat.configurator import configure, require
from nanochat.export_check import MAX_LOGIT_ERROR
from nanochat.folders import (
    FOLDERS,
    TOKENIZER_FOLDER,
    checkpoint_dir,
    free_folder,
    new_run,
    refuse_taken,
    what_holds,
)
from nanochat.hf_import import (
    config_from,
    different_text,
    largest_difference,
    rows_of_tokens,
    sample_logits,
    weights_from,
)
from nanochat.hf_model import load_hf_model
from nanochat.metrics import finish_stage
from nanochat.plan import import_batch
from nanochat.tokenizer_json import SAMPLE, read_with_ids

# settings
model_tag: str = None    # folder to write; None: the name of the model's folder, or the next free
source = "base"          # as a model of which stage: base, mid, sft or rl
max_seq_len: int = None  # context in tokens; None: the model's, at most 2048
dtype = ""               # of the activations later: float32 or bfloat16; empty: the hardware's
paths = []               # the folder to import, named without dashes
settings = configure(globals(), texts=paths)
require(settings, 2, "max_seq_len")
if len(paths) != 1:
    raise UserError(
        f"one folder can be imported, not {len(paths)}: python -m scripts.import_hf FOLDER")
if source not in FOLDERS:
    raise UserError(f"source={source} is not a stage: choose from {', '.join(FOLDERS)}")
path = Path(expand_home(paths[0], "write the whole path")).absolute()
tag = model_tag or path.name
folder = checkpoint_dir(source, tag)
if model_tag and what_holds(folder):
    refuse_taken(folder)        # before minutes are spent
if not path.is_dir():
    raise UserError(f"{path} is not a folder: name one that holds config.json and the weights")

RANDOM_TEXTS = 8    # of random tokens, to compare the tokenizers with
TEXT_TOKENS = 200   # of each of these

started = time.perf_counter()
compute = compute_init("", dtype)


def texts_to_compare(tokenizer):
    """Texts of random tokens, and one of characters of all kinds; all in the normal form NFC."""
    ordinary = sum(size > 0 for size in tokenizer.token_bytes())
    generator = torch.Generator().manual_seed(0)
    texts = [SAMPLE]
    for _ in range(RANDOM_TEXTS):
        ids = torch.randint(ordinary, (TEXT_TOKENS,), generator=generator)
        texts.append(tokenizer.decode(ids.tolist()))
    return [unicodedata.normalize("NFC", text) for text in texts]


# ---- 1) the tokenizer, which is quickly refused
read = read_with_ids(path / "tokenizer.json")
vocab_size = read.tokenizer.get_vocab_size()
for line in read.differences:
    print0(f"warning: {line}, and ours does not: such text gets other tokens than it was trained "
           "with")

# ---- 2) their model, and what ours is like
print0(f"reading {path}")
theirs, their_tokenizer = load_hf_model(str(path), "cpu")
model_class, config = config_from(theirs, vocab_size, max_seq_len)
rows = rows_of_tokens(read, their_tokenizer.bos, theirs.config.vocab_size)
weights = weights_from(theirs, model_class, config, rows)
text = different_text(read, their_tokenizer, texts_to_compare(read.tokenizer))
if text is not None:
    raise UserError(
        f"its tokenizer.json splits {text[:40]!r} into other tokens than we do: only a byte-level "
        "BPE with one split can be read")
print0(f"{model_class}: depth {config.depth}, width {config.width}, {config.heads} heads of "
       f"{config.head_dim}, {config.kv_heads} for keys and values, context {config.max_seq_len}, "
       f"vocabulary {vocab_size:,}")

# ---- 3) the same logits, before anything is written
meta = {
    "stage": "import_hf",
    "run": new_run(),
    "imported": str(path),
    "model_class": model_class,
    "config": asdict(config),
    "dtype": str(compute.dtype).removeprefix("torch."),
    "tokenizer": read.tokenizer.fingerprint,
    "step": 0,
    "elapsed": 0.0,
    "finished": True,
}
print0("comparing the logits with those of transformers")
sample = sample_logits(theirs, rows, config.max_seq_len)
model = build_model({**meta, "dtype": "float32"}, "cpu").eval()
load_weights(model, weights, assign=True)
meta["total_batch_size"] = import_batch(model, compute.device.type)
difference = largest_difference(model, sample)
del theirs, model
if difference > MAX_LOGIT_ERROR:
    print0(f"the logits differ by {difference:.2g}, more than {MAX_LOGIT_ERROR}: "
           "nothing was written")
    sys.exit(1)

# ---- 4) the checkpoint, and the logits of what lies on the disk
if model_tag:
    refuse_taken(folder)
else:
    folder = free_folder(folder)
read.tokenizer.save(folder / TOKENIZER_FOLDER)
save_checkpoint(folder, 0, weights, None, meta)
del weights
model = load_model(source, "cpu", model_tag=folder.name)[0]
model.compute_dtype = torch.float32
difference = largest_difference(model, sample)
if difference > MAX_LOGIT_ERROR:
    delete_step(folder, read_meta(folder, 0))
    shutil.rmtree(folder / TOKENIZER_FOLDER)
    print0(f"the logits of what was written differ by {difference:.2g}, more than "
           f"{MAX_LOGIT_ERROR}: the checkpoint in {folder} was deleted")
    sys.exit(1)
print0(f"logits within {difference:.2g} of transformers'; wrote {folder}")

parameters = sum(p.numel() for p in model.parameters())
finish_stage(
    "import_hf",
    time.perf_counter() - started,
    settings,
    model_class=model_class,
    parameters=parameters,
    vocab_size=vocab_size,
    largest_difference=difference,
    checkpoint=str(folder),
)
