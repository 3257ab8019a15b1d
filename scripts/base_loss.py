"""Bits per byte of a base model on validation text, and samples.

    python -m scripts.base_loss           # the newest base model, on nanochat.dataset's validation
    python -m scripts.base_loss --data=notes/ --documents=50
"""
import itertools
import time

from nanochat.checkpoint_manager import load_model
from nanochat.common import compute_cleanup, compute_init, print0
from nanochat.configurator import configure, require
from nanochat.dataset import iter_documents
from nanochat.engine import sample_texts
from nanochat.folders import chosen_line
from nanochat.hardware import raise_malloc_thresholds
from nanochat.loss_eval import evaluate_bpb
from nanochat.metrics import finish_stage
from nanochat.prompts import text_prompts

# settings
source = "base"          # stage of the model: base, mid, sft or rl
model_tag: str = None    # checkpoint folder; None: the newest
step: int = None         # step; None: of a base model the best by validation, else the last
data: str = None         # parquet folder or your own text; None: nanochat.dataset's
split = "val"            # train or val
documents = 300          # how many, whole
device_type = ""         # cuda, mps or cpu; empty: the best one here
settings = configure(globals())
require(settings, 1, "documents")

# the model
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
device, rank, world_size = compute.device, compute.rank, compute.world_size
model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
print0(chosen_line(source, meta))
model.cast_for_inference(model.compute_dtype)

# bits per byte, and samples
texts = list(itertools.islice(iter_documents(split, data), documents))
bpb = evaluate_bpb(model, tokenizer, texts, device, rank=rank, world_size=world_size)
print0(f"{bpb:.4f} bits per byte on {len(texts)} documents of {split}")
if rank == 0:
    prompts = text_prompts(texts, data)
    sample_texts(model, tokenizer, prompts, max_new_tokens=32)
finish_stage(
    "base_loss",
    time.perf_counter() - started,
    settings,
    val_bpb=bpb,
    split=split,
    documents=len(texts),
    checkpoint=meta["dir"],
)
compute_cleanup()
