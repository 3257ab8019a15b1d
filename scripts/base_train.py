"""Pretrain the base model on text.

    python -m scripts.base_train                               # chooses for the hardware here
    python -m scripts.base_train --data=notes/ --minutes=5
    python -m scripts.base_train --depth=4 --num_iterations=1000 config/my_machine.py
    python -m scripts.base_train --domains=c4,gsm8k,humaneval --best_by=mean
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

From top to bottom: settings, where the run starts, what the budget buys, the model, the data, the
loop, the ending.
"""
import itertools
import math
import shutil
import time
from dataclasses import asdict

import torch

from nanochat.checkpoint_manager import build_model, load_weights
from nanochat.common import UserError, all_reduce_max, compute_init, get_base_dir, print0
from nanochat.configurator import configure, require
from nanochat.curriculum import (
    curriculum_to_resume,
    reshaped,
    sequences_of,
    stage_at,
    stage_records,
    with_stage,
)
from nanochat.dataloader import (
    measure_text,
    resumed_text,
    tokenizing_distributed_data_loader_with_state,
)
from nanochat.dataset import open_dataset
from nanochat.folders import new_run
from nanochat.fp8 import choose_fp8
from nanochat.gpt import require_causal
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.loss_eval import evaluate_bpb, figure_to_compare, protocol_id, score_documents
from nanochat.parallel import Layout, accumulate_gradients, prepare, warm_up
from nanochat.plan import (
    NGRAM_TOKENS,
    check_disk,
    check_not_passed,
    choose_budget,
    config_for,
    depth_of_size,
    given_fields,
    is_overfitting,
    make_plan,
    pretraining_defaults,
    speed_of,
    this_machine,
)
from nanochat.prompts import text_prompts
from nanochat.run import Run
from nanochat.samples import sample_texts
from nanochat.schedule import lr_multiplier, muon_momentum, set_learning_rates
from nanochat.selftest import check_device
from nanochat.start import (
    EXTENDED,
    FRESH,
    check_holdout,
    comparison_to_resume,
    data_to_resume,
    new_base_folder,
    place_of,
    read_unseen,
    start_base,
)
from nanochat.userfiles import existing_path
from nanochat.variants import MODEL_CLASSES, TRAINABLE, WITH_COUNTS, default_model
from nanochat.variants.ngrams import MAX_VOCAB_SIZE, NGramConfig, count_texts
from tasks.domains import OWN, canonical_domains, check_best_by, load_domains

# settings
data: str = None             # parquet, or your own txt, md, jsonl, json, csv; None: nanochat's
model_tag: str = None        # name of the checkpoint folder; None: dN for depth N, or the data's
model: str = None            # gpt, mla, deepseek, ... (docs/models/families.md); None: gpt on CUDA
depth: int = None            # layers; width 64 x depth. None: by memory and hours, CPU: by speed
width: int = None            # of the residual stream; None: 64 x depth
heads: int = None            # query heads; None: of 128 dimensions, or 64 in small models
kv_heads: int = None         # key/value heads; None: as many as query heads; fewer: grouped queries
size: str = None             # small, medium, large or xl: a depth of 12, 18, 24 or 32
mlp_width: int = None        # of portable's hidden layer (SwiGLU); None: 8/3 of the width
tied: bool = None            # portable's head is its embedding; None: no
rotary_base: float = None    # RoPE's theta; None: 10000, portable 1000000
max_seq_len: int = None      # context in tokens; None: 2048 on a GPU, by speed on a CPU
curriculum: str = None       # three_stage (it paid at 512), ten_stage, or "0.25 64; 0.75 512"
minutes: float = None        # budget: wall clock of the loop, compiling included. None: 5 on a CPU
num_iterations: int = None   # budget: optimizer steps
target_flops: float = None   # budget: training FLOPs
target_param_data_ratio: float = None  # budget: tokens per matmul parameter. None: 20 on a GPU
device_batch_size: int = None  # sequences per device and pass; None: the largest divisor that fits
total_batch_size: int = None   # tokens per optimizer step; None: from depth, or by speed on a CPU
ngram_tokens: int = None     # tokens whose n-grams are counted; 0: none; None: 32 million on a CPU
learning_rate = 0.02         # Muon's, for the matrices; the other groups keep their ratio to it
weight_decay: float = None   # of the matrices; None: from the depth on a GPU, 0 on a CPU
grad_clip = 0.0              # largest gradient norm; 0 does not clip
warmdown = 0.6               # share of the run over which the learning rate decays
device_type = ""             # cuda, mps or cpu; empty: the best one here
dtype = ""                   # float32 or bfloat16; empty: what the hardware is good at
parallel = "auto"            # replicated, zero2 or fsdp; auto: zero2 on several ranks if it fits
reduce_dtype = "float32"     # of gradients between ranks: float32 or bfloat16
checkpoint_activations: bool = None  # recompute blocks in the backward pass; None: if it must be
compile = True               # compile the blocks
fp8: str = None              # hybrid, e4m3, mxfp8 or none (docs/fp8.md); None: as resumed, or none
fp8_scaling: str = None      # its scales: tensorwise or rowwise; None: tensorwise
fp8_backend: str = None      # torch, or te for TransformerEngine; None: torch
fp8_emulate: bool = None     # compute FP8's rounding without its products, slowly: for tests
eval_every: int = None       # steps between validations and samples; None: each quarter, or epoch
domains: str = None          # also validated on: c4, gsm8k, NAME=PATH, ..., as in base_loss
best_by: str = None          # what decides the best step: val, a domain or mean; None: val
save_every = 1000            # steps between checkpoints; the last step is always saved
save_minutes = 10.0          # minutes between checkpoints, besides
keep = 3                     # newest checkpoints that stay, besides the best and that before decay
hang_minutes = 30.0          # a step that takes longer ends the run; every rank prints where it was
logger = ""                  # tensorboard or wandb, besides log.jsonl; --no-wandb is --logger=
resume = False               # resume the newest unfinished run: of this tag, or of these settings
resume_from_checkpoint: str = None  # or from this one: its step, or the path of one of its files
extend: float = None         # or from before the LR decay, to a horizon so many times as long
seed = 42                    # of the initial weights
aliases = {
    "no_wandb": "logger=",
    "use_fp8": "fp8=hybrid",
    "model_type": "model",
    "batch_size": "device_batch_size",
    "block_size": "max_seq_len",
}
settings = configure(globals(), aliases=aliases, defaults_here=pretraining_defaults)
if size is not None:
    depth = settings["depth"] = depth_of_size(size, depth)
if data is not None:
    data = settings["data"] = str(existing_path(data))
domains = settings["domains"] = canonical_domains(domains)
require(settings, 1, "depth", "max_seq_len", "device_batch_size", "total_batch_size", "keep")
require(settings, 1, "width", "heads", "kv_heads", "mlp_width", "rotary_base")
require(settings, 0, "ngram_tokens")
require(settings, 0, "learning_rate", "weight_decay", "grad_clip")
require(settings, 0, "warmdown", highest=1)

VALIDATION_DOCUMENTS = 300   # of the last validation
FEW_DOCUMENTS = 30           # of each domain on the way, by which steps are compared
TRIAL_DOCUMENTS = 8          # of a run of seconds, which only shows that everything works

# ---- compute
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype, seed)
device, rank, world_size = compute.device, compute.rank, compute.world_size
checked = check_device(compute, compile)
matmul_flops = measure_matmul_flops(device, compute.dtype)
dtype_name = str(compute.dtype).removeprefix("torch.")
print0(f"{world_size} x {device.type}, {dtype_name}, matmul {matmul_flops / 1e9:,.0f} GFLOP/s each")

# ---- where the run starts: fresh, resumed or extended
start, tokenizer = start_base(settings, rank)
resumed = start.meta  # of the run that is resumed or extended; None for a fresh one
if start.kind == EXTENDED:
    resumed["extended"] = (resumed.get("extended") or resumed.get("extend") or 1) * extend
    resumed["extend"] = extend
if resumed and resumed.get("extend") and (start.kind == EXTENDED or not resume_from_checkpoint):
    # an extended run continues as it began, whatever this command says
    learning_rate = settings["learning_rate"] = resumed["settings"]["learning_rate"]
    warmdown = settings["warmdown"] = resumed["settings"]["warmdown"]
if resumed:
    data = settings["data"] = data_to_resume(data, resumed)
    domains, best_by = comparison_to_resume(settings, resumed)
    settings.update(domains=domains, best_by=best_by)
    resumed["dtype"] = dtype or resumed["dtype"]
    curriculum = settings["curriculum"] = curriculum_to_resume(curriculum, resumed)
fp8_recipe = choose_fp8(settings, resumed, compute)
check_best_by(best_by, domains)
held_out = load_domains(domains, FEW_DOCUMENTS) if domains else []

# ---- what the budget buys: every decision, and its reason
earlier_budget = resumed.get("budgets") if resumed else None
factor = extend if start.kind == EXTENDED else None
budget = choose_budget(settings, device.type, earlier_budget, factor)
model_name = model or default_model(device.type)
if model_name not in TRAINABLE:
    raise UserError(f"model={model_name} does not exist: choose from {', '.join(TRAINABLE)}")
if resumed:
    model_name = resumed["model_class"]
model_class = MODEL_CLASSES[model_name]
if domains:
    require_causal(model_class, "--domains")
vocab_size = tokenizer.get_vocab_size()
planning_began = time.perf_counter()  # measuring and counting are training time
dataset = open_dataset(data)
if resumed:
    check_holdout(dataset, data, resumed)
unseen_documents, unseen_protocol = read_unseen(dataset)
if resumed and resumed.get("unseen") != unseen_protocol:
    resumed["unseen"] = None  # the text was made again meanwhile: the run may now read them
text_size = measure_text(dataset, tokenizer)
text_size.check_context(max_seq_len)
machine = this_machine(compute, matmul_flops)
given = given_fields(settings, model_class)
speed = speed_of(model_class, vocab_size, compute, given)
known = resumed
if resumed and resumed["world_size"] != world_size:
    known = {**resumed, "device_batch_size": None}  # which need not divide what a rank has now
planned = {**settings, "compile": checked.compile}  # uncompiled blocks take more memory
plan = make_plan(planned, budget, machine, model_class, vocab_size, speed, known, text_size)
check_not_passed(budget, plan.horizon, resumed)
reading = plan.reading
for line in plan.describe(model_name, world_size) + reading.warnings():
    print0(line)
disk_warning = check_disk(plan, keep, shutil.disk_usage(get_base_dir()).free, get_base_dir())
if disk_warning:
    print0(disk_warning)
max_seq_len, total_batch_size = plan.shape.max_seq_len, plan.batch.total_batch_size
micro_batch_size, grad_accum_steps = plan.batch.micro_batch_size, plan.batch.grad_accum_steps
text_size.check_context(max_seq_len)

# ---- a fresh run counts n-grams, and describes its model
counted = None
if start.kind != FRESH:
    folder, meta = place_of(start)
else:
    folder = new_base_folder(settings, plan.shape.depth)
    counts_fit = model_name in WITH_COUNTS and vocab_size <= MAX_VOCAB_SIZE
    if ngram_tokens and not counts_fit:
        raise UserError(
            f"n-grams are for --model={'|'.join(WITH_COUNTS)} and vocabularies up to "
            f"{MAX_VOCAB_SIZE}, this is {model_name} with {vocab_size}: leave --ngram_tokens out")
    if ngram_tokens is None:
        ngram_tokens = NGRAM_TOKENS if device.type == "cpu" and counts_fit else 0
    if rank == 0 and ngram_tokens:
        # reading and counting, which takes three times as long, may take a fifth of the minutes
        minutes_to_read = plan.horizon.minutes / 5 / 4 if plan.horizon.minutes else math.inf
        texts = dataset.documents("train")
        counted = count_texts(texts, tokenizer, ngram_tokens, 60 * minutes_to_read)
    kept, counted_tokens = 0, 0
    if counted:
        kept, counted_tokens = len(counted.keys), counted.tokens
    kept, counted_tokens = map(int, all_reduce_max(kept, counted_tokens))
    config = config_for(model_class, plan.shape, vocab_size, given, reading.repeated())
    if kept:
        model_name = WITH_COUNTS[model_name]
        config = NGramConfig(**asdict(config), ngrams=kept)
        print0(f"kept {kept:,} n-grams")
    elapsed = all_reduce_max(time.perf_counter() - planning_began)[0]
    print0(f"planning and counting took {elapsed:.1f} s, which count as training time")
    meta = {
        "stage": "base_train",
        "run": new_run(),
        "model_class": model_name,
        "config": asdict(config),
        "dtype": dtype_name,
        "tokenizer": tokenizer.fingerprint,
        "step": 0,
        "counted": counted_tokens,  # from the beginning of the text; 0: all of it
        "holdout": dataset.holdout,
        "unseen": unseen_protocol,  # of the sources that training does not read
        "elapsed": elapsed,
    }
meta["budgets"] = {budget.kind: budget.amount}
meta["total_batch_size"] = total_batch_size  # other ranks than before may share another
meta.update(
    device_batch_size=micro_batch_size,
    parallel=plan.parallel,
    checkpoint_activations=plan.checkpoint_activations,
    fp8=fp8_recipe and fp8_recipe.saved(),
)

# ---- the model; from here on `model` is the module
model = build_model(meta, device)
if start.weights:
    load_weights(model, start.weights, assign=False)
elif meta["config"].get("ngrams"):
    if counted:
        model.ngrams.fill(counted.keys, counted.counts)
        counted = None  # the model has them now
    if world_size > 1:
        for buffer in model.ngrams.buffers():
            torch.distributed.broadcast(buffer, 0)
stages = plan.stages
shapes = {(stage.length, stage.window): stage for stage in stages}
prepare(model, checked.compile, plan.checkpoint_activations, fp8_recipe, len(shapes))
parameters = sum(p.numel() for p in model.parameters())
print0(f"{parameters:,} parameters, width {model.config.width}, vocabulary {vocab_size}")

# ---- optimizers
optimizers = model.setup_optimizers(learning_rate, plan.weight_decay)
checked.set_up(optimizers)
layout = Layout(model, optimizers, plan.parallel, reduce_dtype)
if start.state:
    layout.load_optimizer_state(start.state["optimizers"])
    torch.set_rng_state(start.state["rng"].cpu())

# ---- data
loader_state = None
if start.state:
    saved_batch_size = resumed.get("device_batch_size") or micro_batch_size
    loader_state = resumed_text(
        start.state["loaders"], saved_batch_size, tokenizer, micro_batch_size, max_seq_len, dataset,
        rank, world_size)
loader = tokenizing_distributed_data_loader_with_state(
    tokenizer, micro_batch_size, max_seq_len, "train", dataset, device, rank, world_size,
    loader_state)
validation = list(itertools.islice(dataset.documents("val"), VALIDATION_DOCUMENTS))
meta.setdefault("prompts", text_prompts(validation, data))
if plan.horizon.is_trial:
    validation = validation[:TRIAL_DOCUMENTS]
    unseen_documents = unseen_documents[:TRIAL_DOCUMENTS]
few = {OWN: validation[:FEW_DOCUMENTS], **dict(held_out)}  # of each domain
micro_batches = [next(loader) for _ in range(grad_accum_steps)]
pass_tokens = micro_batch_size * max_seq_len  # the same in all stages

# ---- a curriculum compiles for all its lengths before the first step
warm_up_began = time.perf_counter()
if checked.compile and len(stages) > 1:
    for stage in shapes.values():
        print0(f"compiling for sequences of {stage.length} tokens")
        model.set_training_window(stage.window)
        batch = reshaped(micro_batches[0], stage.length)
        fitted = warm_up(model, [batch], sequences_of(pass_tokens, stage.length), layout)
        pass_tokens = fitted * stage.length
    elapsed = all_reduce_max(time.perf_counter() - warm_up_began)[0]
    meta["elapsed"] += elapsed
    print0(f"compiling took {elapsed:.1f} s, which count as training time")

# ---- the run
run = Run(
    "base_train", settings, compute, folder, start, meta, plan.horizon, total_batch_size,
    model.flops(max_seq_len), matmul_flops, plan.steps)
run.checkpoints.save_tokenizer(tokenizer)
del start  # what was read is mapped from files that the run may delete
counted_tokens = meta.get("counted", 0)
bpbs = list(meta.get("bpbs", []))  # of the validations after steps in the whole context
best_bpb = meta.get("best_bpb", math.inf)
bpb_name = model.val_bpb_name  # a bound is not recorded as what it bounds
lr_warmup = 0.0 if meta.get("extend") else 0.02
decaying = run.step > 0 and run.progress > 1 - warmdown
stage_index = None   # in the curriculum
stages_begun = meta.get("stages_begun", [])
stage_factor = meta.get("extended") or 1  # an extended run has the stages of the run before
loss_scale = 1 / (micro_batch_size * grad_accum_steps * max_seq_len)  # a mean over a rank's tokens


def score(documents):
    whole = layout.whole_model()
    return score_documents(whole, tokenizer, documents, device, rank=rank, world_size=world_size)


def evaluate(documents):
    whole = layout.whole_model()
    return evaluate_bpb(whole, tokenizer, documents, device, rank=rank, world_size=world_size)


def evaluate_few():
    """({name of a domain: bits per byte}, the figure by which steps are compared)."""
    bits = {name: evaluate(documents) for name, documents in few.items()}
    figure = figure_to_compare(bits, best_by or OWN)
    if domains:
        said = ", ".join(f"{name} {value:.4f}" for name, value in bits.items())
        print0(f"step {run.step}: bits per byte of {said}; steps are compared by "
               f"{best_by or OWN}, {figure:.4f}")
    return bits, figure


def save(val_bpb=None, bits=None):
    run.save(
        layout, loader_state,
        best_by=best_by, domain_bpbs=bits if domains else None, stages_begun=stages_begun,
        best_bpb=best_bpb, bpbs=list(bpbs), before_decay=not decaying, **{bpb_name: val_bpb})


def begin_stage(index):
    """Train in the sequences of another stage of the curriculum; returns its Stage."""
    stage = stages[index]
    model.set_training_window(stage.window)
    if len(stages) > 1:
        name = f"stage {index + 1} of {len(stages)}, {stage.length} tokens"
        run.change_length(model.flops(stage.attended), name)
        run.log(curriculum_stage=index + 1, length=stage.length, window=stage.window)
        print0(f"step {run.step + 1} begins {name}: "
               f"{sequences_of(pass_tokens, stage.length)} sequences a pass")
    return stage


def show_samples():
    whole = layout.whole_model()
    if rank == 0:
        samples = sample_texts(whole, tokenizer, meta["prompts"], max_new_tokens=24)
        run.log(samples=samples)


model.train()
while not run.over():
    # once in a while: validate, and save the best step
    if run.evaluation_due(eval_every, reading.evaluations()):
        bits, bpb = evaluate_few()
        if stage_index == len(stages) - 1:  # what came before has not seen the whole context
            bpbs.append(bpb)
        by_domain = {f"bpb_{name}": value for name, value in bits.items() if name != OWN}
        run.log(documents=len(few[OWN]), **{bpb_name: bits[OWN]}, **by_domain)
        print0(f"step {run.step}: {bits[OWN]:.4f} bits per byte on {len(few[OWN])} validation "
               "documents")
        if bpb < best_bpb:
            best_bpb = bpb
            save(bpb, bits)
        show_samples()
        # text that is read several times is learnt by heart in the end
        run.enough = reading.repeated() is not None and is_overfitting(bpbs)
        if run.enough:
            print0(f"ending here: the validation text ({best_by or OWN}) has become harder to "
                   f"predict than at its best ({best_bpb:.4f}), so that more steps would only "
                   "memorise the text")
            continue

    # save now and then, and before the learning rate begins to decay
    decay_begins = not decaying and run.progress >= 1 - warmdown
    if run.save_due(decay_begins):
        save()
    decaying = run.progress >= 1 - warmdown

    # the same tokens in the sequences of the curriculum's stage
    index = stage_at(stages, stage_factor * run.progress)
    if index != stage_index:
        stage_index, stage = index, begin_stage(index)
        stages_begun = with_stage(stages_begun, index, run.step, run.elapsed)
    batches = [reshaped(batch, stage.length) for batch in micro_batches]

    # forward and backward; the next batches are read while the device works
    run.begin_step()
    trained_tokens = run.step * total_batch_size
    model.leave_one_out = not counted_tokens or trained_tokens < counted_tokens
    noised = model.noised(batches, run.step, rank, is_text=True)
    loss, fitted = accumulate_gradients(
        model, noised, loss_scale, sequences_of(pass_tokens, stage.length), layout)
    pass_tokens = fitted * stage.length
    loader_state = micro_batches[-1][2]
    micro_batches = [next(loader) for _ in range(grad_accum_steps)]

    # reduce, then judge, then apply
    loss, grad_norm = layout.reduce(loss)
    multiplier = run.lr_scale * lr_multiplier(run.progress, lr_warmup, warmdown)
    accepted = run.accepts(loss, grad_norm)
    if accepted:
        set_learning_rates(optimizers, multiplier, muon_momentum(run.step))
        layout.apply(grad_clip, grad_norm)
    layout.zero_grad()

    # keep the record
    if accepted:
        run.record(loss, learning_rate * multiplier, grad_norm)
    else:
        run.skip(layout)

# ---- the ending: save, validate, say
if run.last_save_is_due():
    save()
run.exit_unless_finished()
bits, few_bpb = evaluate_few()
run.log(documents=len(few[OWN]), **{bpb_name: bits[OWN]})  # where the curve of the run ends
# steps are compared by the few documents
amended = {bpb_name: few_bpb, "domain_bpbs": bits if domains else None}
best, bpb_of_best = run.checkpoints.better_than(few_bpb)
if best is not None:
    print0(f"the last step has {few_bpb:.4f} bits per byte, step {best} had {bpb_of_best:.4f}: "
           "that one is the model")
    run.checkpoints.load(best, layout)
    bits = evaluate_few()[0] if domains else None
has_counts = bool(meta["config"].get("ngrams"))


def figures_of(documents, protocol):
    """What the record says of a text: bits per byte, where counts are mixed in also without."""
    found = score(documents)
    figures = {bpb_name: found.bits_per_byte, "protocol": protocol}
    if has_counts:
        figures["val_bpb_without_counts"] = found.bits_per_byte_without_counts
    return figures


of_validation = figures_of(validation, protocol_id(validation, dataset.holdout))
run.log(documents=len(validation), **{bpb_name: of_validation[bpb_name]})

# whole sources that no step has read; where the text has changed since the run began, it may have
of_unseen = None
if unseen_documents and meta.get("unseen") == unseen_protocol:
    unseen_began = time.perf_counter()
    print0(f"scoring {len(unseen_documents)} documents of sources that training never read")
    of_unseen = figures_of(unseen_documents, protocol_id(unseen_documents, "source"))
    of_unseen["documents"] = len(unseen_documents)
    of_unseen["seconds"] = time.perf_counter() - unseen_began
    print0(f"{of_unseen[bpb_name]:.4f} bits per byte on them, {of_validation[bpb_name]:.4f} on "
           f"{len(validation)} documents of sources that it read")
show_samples()
if run.step == 0:
    print0(f"warning: no step was taken: what comes before the first one took {run.elapsed:.1f} s "
           f"of {60 * plan.horizon.minutes:.1f} s; train with more --minutes")
run.finish(
    model, time.perf_counter() - started, amended,
    **of_validation,
    holdout=dataset.holdout,
    unseen=of_unseen,
    best_step=run.step if best is None else best,
    best_by=best_by,
    domain_bpbs=bits if domains else None,
    planned_memory=plan.memory.total,
    text_bytes=text_size.bytes,
    stages=stage_records(stages, stages_begun, run.step, run.elapsed, total_batch_size),
    epochs=run.step * total_batch_size / text_size.tokens)
