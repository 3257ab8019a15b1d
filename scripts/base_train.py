"""Pretrain the base model on text.

    python -m scripts.base_train                                             # chooses for the hardware that is here
    python -m scripts.base_train --data=notes/ --minutes=5
    python -m scripts.base_train --depth=4 --num_iterations=1000 config/my_machine.py
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
"""
import faulthandler
import gc
import itertools
import json
import statistics
import time
from dataclasses import asdict

import numpy as np
import torch

from nanochat.checkpoint_manager import (Checkpoints, build_model, checkpoint_dir, find_model_tag, is_extended,
                                         named_checkpoint, read_checkpoint, resumable, step_before_decay)
from nanochat.common import UserError, all_reduce_max, compute_cleanup, compute_init, print0
from nanochat.metrics import finish_stage, open_log, open_logger
from nanochat.run import StopRequest, how_to_go_on
from nanochat.configurator import configure, require
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state
from nanochat.dataset import iter_documents
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.guard import Guard, failure_message
from nanochat.hardware import measure_matmul_flops, peak_flops, raise_malloc_thresholds
from nanochat.loss_eval import evaluate_bpb
from nanochat.ngrams import NEXT_BITS, count
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.schedule import cpu_plan, default_minutes, gpu_plan, lr_multiplier, muon_momentum
from nanochat.tokenizer import get_tokenizer

# settings
data: str = None             # parquet folder, or your own .txt .md .jsonl; None: what python -m nanochat.dataset made
model_tag: str = None        # name of the checkpoint folder; None: dN for depth N
depth: int = None            # layers; width is 64 x depth and the rest follows. None: 20 on a GPU, from the minutes on a CPU
kv_heads: int = None         # key/value heads; None: as many as query heads, fewer is grouped-query attention
max_seq_len: int = None      # context in tokens; None: 2048 on a GPU, from the minutes on a CPU
minutes: float = None        # wall clock of the loop, compiling included, evaluation not; None: 5 on a CPU
num_iterations: int = None   # optimizer steps, in place of minutes
target_flops: float = None   # or so many FLOPs of training in all
target_param_data_ratio: float = None  # or so many tokens for each parameter of a matmul. None of the four: 20 of these on a GPU
device_batch_size: int = None  # sequences per device and pass, halved by itself when memory runs out; accumulation makes up. None: 32 on a GPU
total_batch_size: int = None   # tokens per optimizer step; None: from the depth on a GPU (524288 at 20), from the minutes on a CPU
ngram_tokens: int = None     # tokens of the training text whose n-grams are counted and mixed in; 0: none. None: 32 million on a CPU
learning_rate = 0.02         # Muon's, for the matrices; the AdamW groups keep their ratio to it
weight_decay: float = None   # of the matrices; None: from the depth on a GPU, 0 on a CPU, whose runs are too short for it
grad_clip = 0.0              # largest gradient norm; 0 does not clip
warmdown = 0.6               # share of the run over which the rate falls
device_type = ""             # cuda, mps or cpu; empty: cuda where there is one, else cpu
dtype = ""                   # float32 or bfloat16; empty: what the hardware is good at
compile = True               # compile the blocks
eval_every: int = None       # steps between validations and samples; None: at each quarter of the run
save_every = 1000            # steps between checkpoints; the last step is always saved
save_minutes = 10.0          # minutes between checkpoints, besides
keep = 3                     # newest checkpoints that stay; the best, and the last before the rate falls, stay besides
hang_minutes = 30.0          # a step that takes longer ends the run, and every rank prints where it stood
logger = ""                  # tensorboard or wandb, where installed, besides log.jsonl in the checkpoint's folder
resume = False               # go on from the newest checkpoint of this tag
resume_from_checkpoint: str = None  # or from this one: its step, or the path of one of its files
extend: float = None         # or from where its rate began to fall, toward a horizon so many times as long, at its own rate
seed = 42                    # of the initial weights
settings = configure(globals())

BUDGETS = ("minutes", "num_iterations", "target_flops", "target_param_data_ratio")
PROMPTS = ["def factorial(n):", "Return True if ", "import ", "The function ", "Once upon a time"]

# compute
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype, seed)
device, rank, world_size = compute.device, compute.rank, compute.world_size
on_gpu = device.type == "cuda"
matmul_rate = measure_matmul_flops(device, compute.dtype)
print0(f"{world_size} x {device.type}, {str(compute.dtype)[6:]}, matmul {matmul_rate / 1e9:,.0f} GFLOP/s a device")

# what to go on from
tokenizer = get_tokenizer()
weights = state = meta = None
resume = resume or bool(resume_from_checkpoint or extend)
tag = model_tag or (f"d{depth}" if depth else resume and find_model_tag("base", missing_ok=True))
folder = checkpoint_dir("base", tag or "")
extending = extend and not is_extended(folder, extend)  # otherwise the run goes on that did so before
if resume_from_checkpoint or extending:
    folder, from_step = named_checkpoint(resume_from_checkpoint, folder) if resume_from_checkpoint else (folder, step_before_decay(folder))
    weights, state, meta = read_checkpoint(folder, from_step, device, rank, "base_train")
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{folder} was trained with another tokenizer: bring that one back")
    if extending and not meta["before_decay"]:
        raise UserError(f"step {meta['step']} of {folder} is from after the rate began to fall: extend another, or leave --resume_from_checkpoint out")
elif resume and tag and resumable(folder):
    weights, state, meta = read_checkpoint(folder, device=device, rank=rank, stage="base_train")
    if meta["finished"]:
        print0(f"the newest checkpoint of {tag} is a finished run: starting from step 0")
        weights = state = meta = None
    elif not (model_tag or depth) and (meta["tokenizer"] != tokenizer.fingerprint
                                       or any(meta["settings"].get(name) != settings[name] for name in ("data", *BUDGETS))):
        print0(f"the newest checkpoint, of {tag}, is of another run: starting from step 0")
        weights = state = meta = None
    elif meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{tag} was trained with another tokenizer: train again without --resume")
elif resume:
    print0("nothing to resume: starting from step 0")

# what the budget buys
require(settings, 1, "depth", "max_seq_len", "device_batch_size", "total_batch_size", "keep")
require(settings, 0, "ngram_tokens")
budgets = {name: settings[name] for name in BUDGETS if settings[name] is not None}
if len(budgets) > 1 or any(budget <= 0 for budget in budgets.values()):
    raise UserError(f"{', '.join(f'{name}={budget}' for name, budget in budgets.items())}: give one budget, above zero")
if extend is not None and (extend <= 1 or budgets):
    raise UserError(f"extend={extend} must be above 1, and takes no other budget: it multiplies that of the run before")
if not budgets:
    budgets = {"minutes": default_minutes(device.type)} if default_minutes(device.type) else {"target_param_data_ratio": 20}
    if resume and meta:  # a resumed run keeps its budget
        budgets = {name: budget * (extend if extending else 1) for name, budget in meta["budgets"].items()}
    minutes, num_iterations, target_flops, target_param_data_ratio = map(budgets.get, BUDGETS)
if extending:
    meta["extend"] = extend
if meta and meta.get("extend"):  # it goes on as it began, whatever this command says
    settings |= {name: meta["settings"][name] for name in ("learning_rate", "warmdown", "data")}
    learning_rate, warmdown, data = settings["learning_rate"], settings["warmdown"], settings["data"]
if meta and dtype:
    meta["dtype"] = dtype
if meta:  # a resumed run keeps its shape
    depth, max_seq_len, total_batch_size = meta["config"]["depth"], meta["config"]["max_seq_len"], meta["total_batch_size"]
planned = cpu_plan(target_flops or world_size * all_reduce_max(matmul_rate)[0] * 60 * (minutes or default_minutes("cpu"))) if not on_gpu else (20, 2048, None)
depth, max_seq_len = depth or planned[0], max_seq_len or planned[1]
batch, decay = gpu_plan(depth, tokenizer.get_vocab_size()) if on_gpu else (planned[2], 0.0)
weight_decay = decay if weight_decay is None else weight_decay
row_tokens = max_seq_len * world_size
total_batch_size = total_batch_size or max(1, batch // row_tokens) * row_tokens
if total_batch_size % row_tokens:
    raise UserError(f"total_batch_size={total_batch_size} is not a multiple of max_seq_len x ranks = {max_seq_len} x {world_size}")
rows = total_batch_size // row_tokens  # sequences per rank and step
device_batch_size = min(device_batch_size or (32 if on_gpu else 16), rows)
if rows % device_batch_size:
    raise UserError(f"device_batch_size={device_batch_size} does not divide the {rows} sequences that a rank has per step")
accumulation = rows // device_batch_size

# model, and the n-grams that it mixes in
ngrams = None
if not meta:
    begin = time.perf_counter()
    folder = checkpoint_dir("base", model_tag or f"d{depth}")
    config, counted = GPTConfig.from_depth(depth, tokenizer.get_vocab_size(), max_seq_len, kv_heads), 0
    if config.vocab_size > 1 << NEXT_BITS and ngram_tokens:
        raise UserError(f"n-grams are for vocabularies up to {1 << NEXT_BITS}, this one has {config.vocab_size}: leave --ngram_tokens out")
    if ngram_tokens is None:
        ngram_tokens = 32_000_000 if device.type == "cpu" and config.vocab_size <= 1 << NEXT_BITS else 0
    if rank == 0:
        texts, ids = iter_documents("train", data), []
        # sorting takes three times as long as reading, and both together not more than a fifth of the minutes
        while counted < ngram_tokens and (not minutes or time.perf_counter() - begin < 3 * minutes) and (some := list(itertools.islice(texts, 1000))):
            ids.append(tokenizer.encode_to_numpy(some, prepend=tokenizer.get_bos_token_id())[0])
            counted += len(ids[-1])
        if ids:
            print0(f"counting the n-grams of {min(counted, ngram_tokens):,} tokens")
            ngrams = count(torch.from_numpy(np.concatenate(ids, dtype=np.int64)[:ngram_tokens]))
            counted = 0 if counted <= ngram_tokens and next(texts, None) is None else min(counted, ngram_tokens)  # 0: all of the text
    config.ngrams, counted = map(int, all_reduce_max(len(ngrams[0]) if ngrams else 0, counted))
    if config.ngrams:
        print0(f"kept {config.ngrams:,} of them in {time.perf_counter() - begin:.1f} s, which count as training time")
    meta = {"stage": "base_train", "model_class": "gpt", "config": asdict(config), "dtype": str(compute.dtype)[6:],
            "tokenizer": tokenizer.fingerprint, "total_batch_size": total_batch_size, "step": 0, "counted": counted,
            "elapsed": time.perf_counter() - begin}
meta["budgets"] = budgets
model = build_model(meta, device)
if state:
    model.load_state_dict(weights)
elif model.ngrams:
    if ngrams:
        model.ngrams.fill(*ngrams)
    if world_size > 1:
        for buffer in model.ngrams.buffers():
            torch.distributed.broadcast(buffer, 0)
if compile:
    print0("compiling the blocks in the first step: seconds when they are known, up to a minute when not")
    prepare(model)
parameters = sum(p.numel() for p in model.parameters())
flops_per_token = model.flops_per_token(max_seq_len)
if target_flops or target_param_data_ratio:
    tokens = target_flops / flops_per_token if target_flops else target_param_data_ratio * model.matmul_parameters()
    num_iterations = max(1, round(tokens / total_batch_size))
num_iterations = num_iterations and round(num_iterations)  # extended, it may have become a fraction
horizon = f"{num_iterations} steps" if num_iterations else f"{minutes:g} minutes"
print0(f"depth {depth}, width {model.config.width}, {parameters:,} parameters, vocabulary {model.config.vocab_size}, "
       f"context {max_seq_len}, {total_batch_size} tokens a step, {horizon}")

# optimizers
optimizers = model.setup_optimizers(learning_rate, weight_decay)
layout = Layout(optimizers)
guard = Guard()
if state:
    layout.load_optimizer_state(state["optimizers"])
    guard.load_state_dict(state["guard"])
    torch.set_rng_state(state["rng"].cpu())

# data
loader = tokenizing_distributed_data_loader_with_state(tokenizer, device_batch_size, max_seq_len, "train", data, device, rank,
                                                       world_size, state and state["loader"])
length = 0
for text in iter_documents("train", data):
    length += len(tokenizer.encode(text)) + 1
    if length > max_seq_len:
        break
else:
    raise UserError(f"the context of {max_seq_len} tokens is longer than the training text of {length}: lower --max_seq_len")
validation = list(itertools.islice(iter_documents("val", data), 300))  # the same on every rank
loader_state, rows_at_once = state and state["loader"], device_batch_size
batches = [next(loader) for _ in range(accumulation)]

# loop
step, elapsed = meta["step"], meta["elapsed"]
first_step, quarter = step, int(4 * (step / num_iterations if num_iterations else elapsed / 60 / minutes))
best_bpb, warmup = meta.get("best_bpb", float("inf")), 0.0 if meta.get("extend") else 0.02
durations, shown, stop = [], 0.0, StopRequest()
sick, rate_scale = False, meta.get("rate_scale", 1.0)
checkpoints = Checkpoints(folder, rank, keep, step if state else None)
saved, decaying = elapsed, step > 0 and (step / num_iterations if num_iterations else elapsed / 60 / minutes) > 1 - warmdown
send_to_logger = open_logger(logger, folder, settings)
log_file = open_log(folder, step) if rank == 0 else None


def log(**row):
    if rank == 0:
        log_file.write(json.dumps({"step": step, "tokens": step * total_batch_size, "seconds": round(elapsed, 2), **row}) + "\n")
        log_file.flush()
        send_to_logger(step, row)


def save(val_bpb=None):
    """Written by a thread while training goes on."""
    global saved
    saved = elapsed
    own = {"optimizers": layout.optimizer_state(), "loader": loader_state, "rng": torch.get_rng_state(), "guard": guard.state_dict()}
    checkpoints.save(step, model, own, {
        **meta, "settings": settings, "rate_scale": rate_scale, "elapsed": elapsed, "tokens": step * total_batch_size,
        "val_bpb": val_bpb, "best_bpb": best_bpb, "before_decay": not decaying, "finished": False})


def validate():
    """Bits per byte of few documents; the best step so far is saved."""
    global best_bpb
    bpb = evaluate_bpb(model, tokenizer, validation[:30], device, rank=rank, world_size=world_size)
    log(val_bpb=bpb, documents=len(validation[:30]))
    print0(f"step {step}: {bpb:.4f} bits per byte on {len(validation[:30])} validation documents")
    if bpb < best_bpb:
        best_bpb = bpb
        save(bpb)


def show_samples():
    if rank == 0:
        model.eval()
        engine = Engine(model, tokenizer)
        texts = [engine.generate(prompt, max_new_tokens=24, temperature=0) for prompt in PROMPTS]
        log(samples=[{"prompt": p, "text": t} for p, t in zip(PROMPTS, texts)])
        print0("\n".join(f"  {p}|{t!r}" for p, t in zip(PROMPTS, texts)))
        model.train()


model.train()
while True:
    faulthandler.dump_traceback_later(60 * hang_minutes, exit=True)  # unless the next step comes before
    elapsed, stopped, writing = all_reduce_max(elapsed, stop.signal, checkpoints.writing())
    if not writing:
        checkpoints.finish(must=False)
    progress = step / num_iterations if num_iterations else elapsed / (60 * minutes)
    # the last step is the one after which another would not fit
    spare = 0 if num_iterations or not durations else 0.5 * durations[-1] / (60 * minutes)
    if progress + spare >= 1 or stopped:
        break
    if step != first_step and not guard.bad and (eval_every and step % eval_every == 0 or eval_every is None and int(4 * progress) > quarter):
        quarter = int(4 * progress)
        validate()
        show_samples()
    if step != first_step and not guard.bad and (save_every and step % save_every == 0 or elapsed - saved >= 60 * save_minutes or
                                                not decaying and progress >= 1 - warmdown):
        save()
    decaying = progress >= 1 - warmdown

    begin = time.perf_counter()
    model.left_out = not meta.get("counted") or step * total_batch_size < meta["counted"]  # this text is in the counts
    loss, rows_at_once = accumulate_gradients(model, batches, 1 / (rows * max_seq_len), rows_at_once, layout)
    loader_state = batches[-1][2]
    batches = [next(loader) for _ in range(accumulation)]  # while the device works
    loss, norm = layout.reduce(loss)  # waits for the device
    verdict, reason = guard.verdict(loss, norm)
    rate = lr_multiplier(progress, warmup, warmdown) * rate_scale
    if verdict == "ok":
        layout.clip(grad_clip, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
                if "momentum" in group:
                    group["momentum"] = muon_momentum(step)
            optimizer.step()
        layout.gather()
        step += 1
    layout.zero_grad()
    durations.append(time.perf_counter() - begin)
    elapsed += durations[-1]
    if verdict != "ok":
        print0(f"step {step + 1}: {reason}: {verdict}")
        log(skipped=reason, verdict=verdict)
        if verdict == "skip":
            continue
        good_step = checkpoints.last_good(step)
        sick = verdict == "stop" or good_step is None
        if sick:
            break
        step, rate_scale = good_step, rate_scale / 2
        checkpoints.load(step, model, optimizers, device)
        print0(f"back to step {step}, with other data and {rate_scale:g} times the rate")
        continue
    if compile and len(durations) == 1 and durations[0] > 2:
        print0(f"the first step took {durations[0]:.0f} s with compiling; the result is kept for the next run")

    if step == first_step + 3:
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would stall the loop for half a second
    if elapsed - shown >= 5 or step <= first_step + 1:
        shown = elapsed
        typical = statistics.median(durations[-20:])
        speed, left = total_batch_size / typical, max(0, (num_iterations - step) * typical if num_iterations else 60 * minutes - elapsed)
        print0(f"step {step:5d} | {100 * progress:3.0f} % | loss {loss:.4f} | rate {rate:.2f} | norm {norm:.2f} | {speed:,.0f} tok/s | "
               f"{100 * flops_per_token * speed / world_size / matmul_rate:.0f} % of matmul rate | {left / 60:.1f} min left")
    log(loss=loss, lr=learning_rate * rate, grad_norm=norm)

gc.unfreeze()
if sick:
    print0(failure_message(reason, folder, checkpoints.newest()))
    compute_cleanup()
    raise SystemExit(1)
if stopped:
    newest = checkpoints.newest() if guard.bad else None
    if newest is None:
        save()
        checkpoints.finish()
        print0(f"saved step {step} in {folder}: {how_to_go_on(settings)}")
    else:
        print0(f"not saved, for the last batches were bad ({guard.bad[-1]}); step {newest} is in {folder}: {how_to_go_on(settings)}")
    compute_cleanup()
    raise SystemExit(128 + int(stopped))

# the last step: save, validate, say
save()
checkpoints.finish()  # before evaluation, which may run out of memory
stop.release()
faulthandler.dump_traceback_later(60 * hang_minutes, exit=True)
few = evaluate_bpb(model, tokenizer, validation[:30], device, rank=rank, world_size=world_size)
val_bpb = evaluate_bpb(model, tokenizer, validation, device, rank=rank, world_size=world_size)
log(val_bpb=val_bpb, documents=len(validation))
show_samples()
checkpoints.amend(step, val_bpb=few, finished=True)
faulthandler.cancel_dump_traceback_later()
speed = total_batch_size / statistics.median(durations[3:] or durations or [float("inf")])
peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
finish_stage("base_train", time.perf_counter() - started, settings, steps=step, tokens=step * total_batch_size, train_seconds=elapsed,
             tokens_per_second=speed, flops_per_second=speed * flops_per_token, flops_per_second_of_weights=speed * 6 * model.matmul_parameters(),
             matmul_flops_per_second=matmul_rate * world_size, share_of_matmul_rate=speed * flops_per_token / world_size / matmul_rate,
             mfu=speed * flops_per_token / world_size / peak if peak else None, val_bpb=val_bpb, checkpoint=str(folder), parameters=parameters, config=meta["config"])
compute_cleanup()
