"""Bits per byte of a base model on held-out text, by domain.

Of a diffusion model (docs/llada.md) it is an upper bound, which is recorded as val_bpb_bound.

    python -m scripts.base_loss           # the newest base model, on nanochat.dataset's validation
    python -m scripts.base_loss --data=notes/ --documents=50
    python -m scripts.base_loss --domains=c4,gsm8k,humaneval --documents=2000
    python -m scripts.base_loss --domains="val,c4=web.jsonl,code=src.parquet" --reference=d12
    python -m scripts.base_loss --domains=validation/   # its files (python -m tasks.domains)
    python -m scripts.base_loss --check   # first, whether the loss can be trusted: status 1 if not
    python -m scripts.base_loss --hf-path=models/gpt2 --domains=validation/ --check

Of several domains it prints a table: bits per byte, perplexity per token, and the surprise ratio,
bits per byte divided by those of C4; beside it that of an untrained model of the same shape, and of
a reference. The ratios end in a recommended mix. docs/domains.md says what each can tell.
"""
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import load_model, require_model, untrained_model
from nanochat.common import UserError, compute_cleanup, compute_init, expand_home, print0
from nanochat.configurator import configure, require
from nanochat.dataset import open_dataset
from nanochat.folders import chosen_line
from nanochat.gpt import require_causal
from nanochat.hardware import raise_malloc_thresholds
from nanochat.hf_model import load_hf_model
from nanochat.loss_check import check_loss
from nanochat.loss_eval import (
    base_domain,
    domain_rows,
    protocol_id,
    recommended_shares,
    score_documents,
    set_draws,
)
from nanochat.metrics import finish_stage
from nanochat.prompts import text_prompts
from nanochat.samples import sample_texts
from nanochat.start import UNSEEN_DOCUMENTS, check_holdout, known_holdout, read_unseen
from tasks.domains import OWN, load_domains, parse_domains

# settings
source = "base"          # stage of the model: base, mid, sft or rl
model_tag: str = None    # checkpoint folder; None: the newest
step: int = None         # step; None: of a base model the best by validation, else the last
hf_path: str = None      # folder of a local Hugging Face model to measure in place of ours
data: str = None         # of the domain val: parquet folder or your own text; None: nanochat's
split = "val"            # of that text: train, val, or unseen (whole sources, docs/data.md)
domains = "val"          # comma-separated: val, c4, encyclopedia, gsm8k, humaneval, code, chat,
                         # NAME=PATH, or a folder with a file for each
documents: int = None    # at most, of each domain, whole; None: 300, of the split unseen 200
step_zero = True         # with several domains: also measure an untrained model of the same shape
reference: str = None    # also measure this one: a tag of ours, or a Hugging Face model's folder
draws: int = None        # of a diffusion model's bound, a sequence; None: 128, on a CPU 4
check = False            # first check the loss itself: probabilities, causality, bytes
device_type = ""         # cuda, mps or cpu; empty: the best one here
settings = configure(globals())
require(settings, 1, "documents", "draws")
if split not in ("train", "val", "unseen"):
    raise UserError(f"split is train or val, or unseen, not {split!r}")
if documents is None:
    # as many as pretraining measures
    documents = settings["documents"] = UNSEEN_DOCUMENTS if split == "unseen" else 300
names = [item.name for item in parse_domains(domains)]

CHECKED_DOCUMENTS = 4    # of each domain, at most
PROGRESS_SECONDS = 5

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
device, rank, world_size = compute.device, compute.rank, compute.world_size


class Loaded(NamedTuple):
    """A model that is measured. called: for people; checkpoint: its folder; meta: None of others'.
    """
    model: object
    tokenizer: object
    called: str
    checkpoint: str
    meta: dict


def load(tag, path, its_step=None):
    """The Loaded of a tag of ours, or of a Hugging Face model's folder."""
    if path:
        model, tokenizer = load_hf_model(path, device)
        return Loaded(model, tokenizer, f"{path}, a Hugging Face model", path, None)
    model, tokenizer, meta = load_model(source, device, "eval", tag, its_step)
    return Loaded(model, tokenizer, chosen_line(source, meta), meta["dir"], meta)


# ---- the model and the texts
if reference:
    path = Path(expand_home(reference, "write the whole path"))
    reference_is_folder = (path / "config.json").is_file()
    if not reference_is_folder:     # before the model is measured, which takes minutes
        require_model(source, reference)
loaded = load(model_tag, hf_path, step)
model, tokenizer = loaded.model, loaded.tokenizer
print0(loaded.called)
if check:
    require_causal(model, "--check")
if names != [OWN] or reference:
    require_causal(model, "a comparison of bits per byte")
set_draws(model, draws, few=4)
own, protocol = None, None
if OWN in names:
    dataset = open_dataset(data)
    if loaded.meta:
        check_holdout(dataset, data, loaded.meta)
    if split == "unseen":
        unseen_protocol = read_unseen(dataset)[1]
        if not unseen_protocol:
            raise UserError("this text has no split unseen: python -m nanochat.dataset "
                            "--source=local makes one with it")
        if loaded.meta and loaded.meta.get("unseen") != unseen_protocol:
            raise UserError(f"{loaded.called} was not trained without these sources: train it "
                            "again on this text, or leave --split out")
    own = list(itertools.islice(dataset.documents(split), documents))
    if split != "train":
        holdout = known_holdout(dataset, data, loaded.meta)
        protocol = protocol_id(own, "source" if split == "unseen" else holdout)
texts = load_domains(domains, documents, own)

# ---- can its loss be trusted? in float32, with counts of n-grams and without
checked = {}
compute_dtype = None if hf_path else model.compute_dtype
if check:
    print0("checking the loss")
    some = [text for domain in texts for text in domain.documents[:CHECKED_DOCUMENTS]]
    models = {"": model}
    if not hf_path:
        model.compute_dtype = torch.float32
        network = model.for_chat()
        if network is not model:
            models = {"with counts of n-grams": model, "without": network}
    for label, its_model in models.items():
        for finding in check_loss(its_model, tokenizer, some, device):
            print0(f"check {label}: {finding.line()}" if label else f"check: {finding.line()}")
            name = f"{finding.name} {label}".strip()
            checked[name] = {
                "value": finding.value, "limit": finding.limit, "passed": finding.passed}
failed = [name for name, finding in checked.items() if not finding["passed"]]
if failed:
    print0(f"the loss of this model cannot be trusted: {', '.join(failed)}")
    finish_stage("base_loss", time.perf_counter() - started, settings,
                 check=checked, checkpoint=loaded.checkpoint)
    compute_cleanup()
    sys.exit(1)


# ---- every domain
class Progress:
    """Says every few seconds how much of a domain is scored."""

    def __init__(self, label):
        self.label = label
        self.said_at = time.perf_counter()

    def __call__(self, share):
        if time.perf_counter() - self.said_at > PROGRESS_SECONDS:
            self.said_at = time.perf_counter()
            print0(f"  {self.label}: {100 * share:.0f} %")


def measure(its_model, its_tokenizer, whose=""):
    """{name of a domain: Score} of a model."""
    scores = {}
    for domain in texts:
        scores[domain.name] = score_documents(
            its_model,
            its_tokenizer,
            domain.documents,
            device,
            rank=rank,
            world_size=world_size,
            progress=Progress(f"{domain.name}{whose}"),
        )
    return scores


if not hf_path:
    model.cast_for_inference(compute_dtype)
scores = measure(model, tokenizer)
others = {}     # {"step_0" or "reference": {name of a domain: Score}}
if step_zero and len(texts) > 1:
    fresh = model.step_zero() if hf_path else untrained_model(loaded.meta, device)
    others["step_0"] = measure(fresh, tokenizer, " at step 0")
    del fresh
if reference:
    other = load(None, reference) if reference_is_folder else load(reference, None)
    require_causal(other.model, "a reference")
    print0(f"reference: {other.called}")
    if other.meta:
        other.model.cast_for_inference(other.model.compute_dtype)
    others["reference"] = measure(other.model, other.tokenizer, " of the reference")
    del other

# ---- the figures of each domain, and the mix that they recommend
rows = domain_rows(scores, others)
for domain in texts:
    row = rows[domain.name]
    row["documents"] = len(domain.documents)
    at_most = "" if model.causal else f"at most, by {model.draws} draws, "
    alone = scores[domain.name].bits_per_byte_without_counts
    mixes = ""
    if alone != row["bits_per_byte"]:
        row["bits_per_byte_without_counts"] = alone
        mixes = f" ({alone:.4f} without counts of n-grams)"
    print0(f"{at_most}{row['bits_per_byte']:.4f} bits per byte{mixes}, perplexity "
           f"{row['perplexity']:.2f} of a token, on {row['documents']} documents of {domain.name}")
without_counts = rows[OWN].get("bits_per_byte_without_counts") if own else None
shares = None
if others:
    # a reference is what the model should be like, an untrained one what it began as
    beside = "reference" if reference else "step_0"
    compared_with = "the reference" if reference else "step 0"
    shares = recommended_shares(
        {name: row["ratio"] for name, row in rows.items()},
        {name: row[beside]["ratio"] for name, row in rows.items()},
    )

# ---- the table
if len(texts) > 1:
    print0("")
    heads = ["domain", "documents", "bytes", "bits/byte", "perplexity", "ratio", *others]
    widths = [14, 10, 12, 10, 12, 8, *[10 for _ in others]]
    print0("".join(head.rjust(width) for head, width in zip(heads, widths)))
    for name, row in rows.items():
        cells = [
            name,
            f"{row['documents']:,}",
            f"{row['bytes']:,}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.3f}",
            *(f"{row[whose]['ratio']:.3f}" for whose in others),
        ]
        print0("".join(cell.rjust(width) for cell, width in zip(cells, widths)))
    print0(f"ratio: bits per byte divided by those of {base_domain(scores)}; beside it the same "
           "of step 0 and of the reference, where they were measured")
if shares:
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
    print0(f"recommended for what is added to the training text: {said} (a heuristic, of how far "
           f"each ratio is above that of {compared_with})")
elif others:
    print0(f"no mix is recommended: no ratio is above that of {compared_with}")

# ---- samples, and the record
if rank == 0 and own and not hf_path:
    sample_texts(model, tokenizer, text_prompts(own, data), max_new_tokens=32)
finish_stage(
    "base_loss",
    time.perf_counter() - started,
    settings,
    **{model.val_bpb_name: rows[OWN]["bits_per_byte"] if own else None},
    val_bpb_without_counts=without_counts,
    split=split,
    documents=len(own) if own else None,
    protocol=protocol,
    domains=rows if model.causal else None,
    base=base_domain(scores),
    shares=shares,
    check=checked,
    checkpoint=loaded.checkpoint,
)
compute_cleanup()
