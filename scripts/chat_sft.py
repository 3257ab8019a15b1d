"""Supervised fine-tuning: the conversations of midtraining, and your own, under LR decay.

    python -m scripts.chat_sft --minutes=3
    python -m scripts.chat_sft --custom=my_conversations.jsonl --custom_share=0.3 --name=Bob
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""
import time

import torch

from nanochat.common import UserError, compute_init, print0
from nanochat.configurator import configure, require
from nanochat.dataloader import deliver, resumed_conversations, say_cut, sft_data_generator
from nanochat.fp8 import choose_fp8
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.parallel import Layout, accumulate_gradients, count_targets, prepare
from nanochat.passage_store import prepare_passages
from nanochat.plan import chat_layout, make_chat_plan
from nanochat.run import Run
from nanochat.samples import sample_chats
from nanochat.schedule import lr_multiplier, set_learning_rates
from nanochat.selftest import check_device
from nanochat.start import start_chat
from nanochat.userfiles import existing_path
from tasks.chat_data import check_context, choose_origin, tasks_of_run
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tasks.identity import Identity, check_name, choose_identity
from tasks.mixing import (
    check_share,
    mix_with_own,
    mixture_tokens,
    planned_draws,
    planned_tokens,
    say_times,
    times_each,
)
from tasks.own_text import FORMS, identity_tasks, sample_questions

# settings
model_tag: str = None        # checkpoint folder of the model to start from; None: the newest
from_step: int = None        # its step; None: the last, of a base model the best
minutes: float = None        # wall clock of the loop; None: 5; on a GPU 500 steps or one epoch
num_iterations: int = None   # optimizer steps, in place of minutes
device_batch_size: int = None  # sequences per device and pass; None: pretraining's, at most 16
total_batch_size: int = None   # tokens per step; None: one pass; on a GPU by the data
learning_rate = 0.01         # Muon's, for the matrices; decays to 2 % over the run
weight_decay = 0.0           # of the matrices
grad_clip = 0.0              # largest gradient norm; 0 does not clip
source = "mid"               # stage to start from: mid or base
custom: str = None           # your own conversations (jsonl, json, csv)
custom_share: float = None   # their share of what is drawn; None: .1 to .5, by their number
name: str = None             # of the model; None: midtraining's, what --custom says, or nanochat
data: str = None             # your own text, to look up; None: that of the model's pretraining
chat_data = ""               # hub or local; empty: hub on a GPU, local on a CPU
own_text = "lookup"          # how questions about it are practised: lookup or recall
device_type = ""             # cuda, mps or cpu; empty: the best one here
dtype = ""                   # float32 or bfloat16; empty: the checkpoint's
parallel = "auto"            # replicated, zero2 or fsdp; auto: as pretraining
reduce_dtype = "float32"     # of gradients between ranks: float32 or bfloat16
checkpoint_activations: bool = None  # recompute blocks in backward; None: as pretraining
compile = True               # compile the blocks
fp8: str = None              # hybrid, e4m3, mxfp8 or none (docs/fp8.md); None: as resumed, or none
fp8_scaling: str = None      # its scales: tensorwise or rowwise; None: tensorwise
fp8_backend: str = None      # torch, or te for TransformerEngine; None: torch
fp8_emulate: bool = None     # compute FP8's rounding without its products, slowly: for tests
save_every = 1000            # steps between checkpoints; the last step is always saved
save_minutes = 10.0          # minutes between checkpoints, besides
keep = 3                     # newest checkpoints that stay
hang_minutes = 30.0          # a step that takes longer ends the run; every rank prints where it was
logger = ""                  # tensorboard or wandb, besides log.jsonl; --no-wandb is --logger=
resume = False               # resume the newest unfinished run that started from this model
resume_from_checkpoint: str = None  # or from this one: its step, or the path of one of its files
seed = 43                    # of the order of the conversations
settings = configure(globals(), aliases={"no_wandb": "logger=", "use_fp8": "fp8=hybrid"})
if data is not None:
    data = settings["data"] = str(existing_path(data))
require(settings, 1, "device_batch_size", "total_batch_size", "keep")
require(settings, 0, "learning_rate", "weight_decay", "grad_clip")
if own_text not in FORMS:
    raise UserError(f"own_text={own_text} is no form of practice: choose {' or '.join(FORMS)}")
choose_origin(chat_data, device_type)  # refuses what is none
if source not in ("mid", "base"):
    raise UserError(f"source={source} is not a stage to start from: choose mid or base")
name = check_name(name)
check_share(custom, custom_share)
own = CustomJSON(custom) if custom else []

# ---- compute, and where the run starts
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype, seed)
checked = check_device(compute, compile)
device, rank, world_size = compute.device, compute.rank, compute.world_size
start, model, tokenizer = start_chat("chat_sft", "sft", settings, compute, model_source=source)
meta = start.meta
fp8_recipe = choose_fp8(settings, meta, compute)
meta["fp8"] = fp8_recipe and fp8_recipe.saved()
passages = prepare_passages(data, meta, start.folder)
meta["questions"] = sample_questions(passages)
arrangement = chat_layout(settings, meta, world_size)
prepare(model, checked.compile, arrangement.checkpoint_activations, fp8_recipe)
T = model.config.max_seq_len
matmul_flops = measure_matmul_flops(device, compute.dtype)

# ---- optimizers
optimizers = model.setup_optimizers(learning_rate, weight_decay)
checked.set_up(optimizers)
layout = Layout(model, optimizers, arrangement.parallel, reduce_dtype)
if start.state:
    layout.load_optimizer_state(start.state["optimizers"])
    torch.set_rng_state(start.state["rng"].cpu())

# ---- data: who the model is, the mixture, and how often each conversation comes
who = choose_identity(name or meta.get("name"), own)
meta.update(name=who.name, own_identity=who.own)
if who.message:
    print0(who.message)
built_in = tasks_of_run("chat_sft", chat_data, device.type, start, passages, own_text)
check_context(tokenizer, built_in, T)
identity = Identity("train", who.name, who.own, passages is not None)
mixture = TaskMixture([
    *built_in,
    *identity_tasks(identity, passages, meta["chat_data"]),
])
if own:
    mixture, portions = mix_with_own(own, mixture, custom_share)
    if rank == 0:
        say_cut(tokenizer, own, T)

# ---- batch and budget; on a GPU both follow from how much the mixture holds
plan = make_chat_plan(
    settings, device.type, T, world_size, meta, lambda: mixture_tokens(tokenizer, mixture, T))
for line in plan.describe(T, world_size):
    print0(line)
total_batch_size, micro_batch_size, grad_accum_steps = plan.batch

# ---- loader
loader_state = None
if start.state:
    loader_state = resumed_conversations(start.state["loaders"], rank, world_size)
batches = sft_data_generator(
    tokenizer, mixture, micro_batch_size, T, "cpu", rank, world_size, loader_state, seed,
    model.end_padding)
loader = deliver(batches, device)
micro_batches = [next(loader) for _ in range(grad_accum_steps)]
print0(f"{len(mixture)} conversations, context {T}, {total_batch_size} tokens a step, matmul "
       f"{matmul_flops / 1e9:,.0f} GFLOP/s a device")
if own:
    flops = matmul_flops * world_size, model.flops_per_token(T)
    tokens = planned_tokens(plan.horizon, total_batch_size, device.type, *flops)
    times = times_each(len(own), portions, planned_draws(tokenizer, mixture, tokens))
    print0(f"{100 * portions.share:.3g} % of the conversations drawn are your own: this run shows "
           f"{say_times(len(own), times)}")

run = Run(
    "chat_sft", settings, compute, start.folder, start, meta, plan.horizon, total_batch_size,
    model.flops(T), matmul_flops)
run.checkpoints.save_tokenizer(tokenizer)
del start  # what was read is mapped from files that the run may delete


def show_samples():
    whole = layout.whole_model()
    if rank == 0:
        run.log(samples=sample_chats(whole, tokenizer, meta["questions"], 48, passages))


while not run.over():
    # once in a while: save, and show what the model says
    if run.save_due():
        run.save(layout, loader_state)
    if run.evaluation_due():
        show_samples()

    # the learning rate decays over the whole run, without warm-up
    multiplier = run.lr_scale * lr_multiplier(run.progress, warmup=0, warmdown=1)

    # forward and backward: the mean is over the targets of all ranks, wherever they fell; the
    # next batches are read while the device works
    run.begin_step()
    targets = count_targets(micro_batches)
    loss_scale = world_size / targets.clamp(min=1)  # the layout averages over ranks
    noised = model.noised(micro_batches, run.step, rank)
    loss, micro_batch_size = accumulate_gradients(
        model, noised, loss_scale, micro_batch_size, layout)
    loader_state = micro_batches[-1][2]
    micro_batches = [next(loader) for _ in range(grad_accum_steps)]

    # reduce, then judge, then apply
    loss, grad_norm = layout.reduce(loss)
    accepted = run.accepts(loss, grad_norm)
    if accepted and targets > 0:  # a batch without a single target teaches nothing
        set_learning_rates(optimizers, multiplier)
        layout.apply(grad_clip, grad_norm)
    layout.zero_grad()

    # keep the record
    if accepted:
        run.record(loss, learning_rate * multiplier, grad_norm)
    else:
        run.skip(layout)

# ---- the ending: save, sample, say
loader.close()
if run.last_save_is_due():
    run.save(layout, loader_state)
run.exit_unless_finished()
show_samples()
seen = None
if own:
    drawn, waiting = loader_state
    times = times_each(len(own), portions, (drawn - len(waiting)) * world_size)
    print0(f"this run has shown {say_times(len(own), times)}")
    seen = {"conversations": len(own), "share": portions.share, "times_each": times}
run.finish(model, time.perf_counter() - started, val_bpb=None, custom=seen, name=who.name)
