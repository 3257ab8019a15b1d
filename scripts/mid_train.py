"""Midtraining: the base model learns the shape of a conversation, the Python tool, choices and spelling.

    python -m scripts.mid_train --minutes=2
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train

The rate is flat, half of pretraining's peak; fine-tuning takes it down on the same kind of text.
"""
import faulthandler
import gc
import json
import statistics
import time
from dataclasses import asdict

import torch

from nanochat.checkpoint_manager import (Checkpoints, checkpoint_dir, find_model_tag, load_model, named_checkpoint,
                                         read_checkpoint, restore_model, resumable)
from nanochat.common import UserError, all_reduce_max, compute_cleanup, compute_init, print0
from nanochat.metrics import finish_stage, open_log, open_logger
from nanochat.run import StopRequest, how_to_go_on
from nanochat.configurator import configure, require
from nanochat.dataloader import sft_data_generator
from nanochat.engine import Engine
from nanochat.guard import Guard, failure_message
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.schedule import default_minutes
from tasks.arithmetic import Arithmetic
from tasks.common import TaskMixture
from tasks.identity import Identity
from tasks.pydoc import PyDoc
from tasks.spellingbee import SimpleSpelling, SpellingBee

# settings
model_tag: str = None        # checkpoint folder to read and write; None: the newest base model
from_step: int = None        # step of the model to start from; None: its newest
minutes: float = None        # wall clock of the loop, compiling included; None: 5 on a CPU, one pass of the mixture on a GPU
num_iterations: int = None   # optimizer steps, in place of minutes
device_batch_size: int = None  # sequences per device and pass; None: pretraining's per step, at most 16
total_batch_size: int = None  # tokens per optimizer step; None: one pass of every device
learning_rate = 0.01         # Muon's, for the matrices; the AdamW groups keep their ratio to it. Flat
weight_decay = 0.0           # of the matrices
grad_clip = 0.0              # largest gradient norm; 0 does not clip
device_type = ""             # cuda, mps or cpu; empty: cuda where there is one, else cpu
dtype = ""                   # float32 or bfloat16; empty: the checkpoint's
compile = True               # compile the blocks
save_every = 1000            # steps between checkpoints; the last step is always saved
save_minutes = 10.0          # minutes between checkpoints, besides
keep = 3                     # newest checkpoints that stay
hang_minutes = 30.0          # a step that takes longer ends the run, and every rank prints where it stood
logger = ""                  # tensorboard or wandb, where installed, besides log.jsonl in the checkpoint's folder
resume = False               # go on from the newest checkpoint of this tag
resume_from_checkpoint: str = None  # or from this one: its step, or the path of one of its files
seed = 42                    # of the order of the conversations
settings = configure(globals())

PROMPTS = ["Who are you?", "What is 12 times 7?", "Spell window.", "How many e are in letter?", "What does textwrap.dedent do?"]

# compute
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype, seed)
device, rank, world_size = compute.device, compute.rank, compute.world_size
matmul_rate = measure_matmul_flops(device, compute.dtype)

# tokenizer and model
state = None
if resume_from_checkpoint:  # all that it takes is in there
    folder, step = named_checkpoint(resume_from_checkpoint, checkpoint_dir("mid", model_tag or find_model_tag("mid")))
    weights, state, meta = read_checkpoint(folder, step, device, rank, "mid_train")
    model, tokenizer = restore_model(folder, weights, meta, device)
else:
    model, tokenizer, origin = load_model("base", device, "train", model_tag, from_step)
    model.drop_ngrams()  # they know the text that was read, not how to answer
    folder = checkpoint_dir("mid", origin["tag"])
    meta = {"stage": "mid_train", "origin": [origin["dir"], origin["step"]], "step": 0, "elapsed": 0.0, "dtype": origin["dtype"],
            "config": asdict(model.config), **{key: origin[key] for key in ("model_class", "tokenizer", "total_batch_size")}}
    if resume and resumable(folder):
        weights, state, saved_meta = read_checkpoint(folder, device=device, rank=rank, stage="mid_train")
        if saved_meta["finished"] or saved_meta["origin"] != meta["origin"]:
            print0(f"the newest checkpoint of {folder} is of a finished run or of another start: starting from step 0")
            state = None
        else:
            meta = saved_meta
            model.load_state_dict(weights)
    elif resume:
        print0(f"nothing to resume in {folder} (--model_tag names another): starting from step 0")
if dtype:
    meta["dtype"] = dtype  # otherwise the checkpoint's
model.compute_dtype = getattr(torch, meta["dtype"])
if compile:
    print0("compiling the blocks in the first step: seconds when they are known, up to a minute when not")
    prepare(model)
T = model.config.max_seq_len
require(settings, 1, "device_batch_size", "total_batch_size", "keep")
device_batch_size = device_batch_size or min(16, max(1, meta["total_batch_size"] // (T * world_size)))
total_batch_size = total_batch_size or device_batch_size * T * world_size
if total_batch_size % (device_batch_size * T * world_size):
    raise UserError(f"total_batch_size={total_batch_size} is not a multiple of device_batch_size x context x ranks = "
                    f"{device_batch_size} x {T} x {world_size}")
accumulation = total_batch_size // (device_batch_size * T * world_size)
flops_per_token = model.flops_per_token(T)
if any(budget is not None and budget <= 0 for budget in (minutes, num_iterations)):
    raise UserError(f"minutes={minutes} and num_iterations={num_iterations}: a budget must be above zero")
if minutes is None and num_iterations is None:
    minutes = default_minutes(device.type)

# optimizers
optimizers = model.setup_optimizers(learning_rate, weight_decay)
layout = Layout(optimizers)
guard = Guard()
if state:
    layout.load_optimizer_state(state["optimizers"])
    guard.load_state_dict(state["guard"])
    torch.set_rng_state(state["rng"].cpu())

# data: the mixture, and how often each conversation comes
mixture = TaskMixture([SimpleSpelling("train", 80_000), SpellingBee("train", 6_000), Arithmetic("train", 26_000), PyDoc("train", "what", 15_000),
                       PyDoc("train", "module", 4_000), PyDoc("train", "letter", 1_600), *[Identity("train")] * 4])
loader_state = state and state["loader"]
loader = sft_data_generator(tokenizer, mixture, device_batch_size, T, device, rank, world_size, loader_state, seed)
batches, rows_at_once = [next(loader) for _ in range(accumulation)], device_batch_size
print0(f"{len(mixture)} conversations, context {T}, {total_batch_size} tokens a step, matmul {matmul_rate / 1e9:,.0f} GFLOP/s a device")

# loop
step, elapsed, quarter = meta["step"], meta["elapsed"], 0
first_step, durations, shown, stop = step, [], 0.0, StopRequest()
sick, rate_scale = False, meta.get("rate_scale", 1.0)
checkpoints = Checkpoints(folder, rank, keep, step if state else None)
saved = elapsed
send_to_logger = open_logger(logger, folder, settings)
log_file = open_log(folder, step) if rank == 0 else None


def log(**row):
    if rank == 0:
        log_file.write(json.dumps({"step": step, "tokens": step * total_batch_size, "seconds": round(elapsed, 2), **row}) + "\n")
        log_file.flush()
        send_to_logger(step, row)


def save():
    """Written by a thread while training goes on."""
    global saved
    saved = elapsed
    own = {"optimizers": layout.optimizer_state(), "loader": loader_state, "rng": torch.get_rng_state(), "guard": guard.state_dict()}
    checkpoints.save(step, model, own, {
        **meta, "settings": settings, "rate_scale": rate_scale, "elapsed": elapsed, "tokens": step * total_batch_size, "finished": False})


def show_samples():
    if rank == 0:
        model.eval()
        engine = Engine(model, tokenizer)
        chats = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": prompt}]}) for prompt in PROMPTS]
        texts = [engine.generate(chat, max_new_tokens=48, temperature=0) for chat in chats]
        log(samples=[{"prompt": p, "text": t} for p, t in zip(PROMPTS, texts)])
        print0("\n".join(f"  {p}|{t!r}" for p, t in zip(PROMPTS, texts)))
        model.train()


while True:
    faulthandler.dump_traceback_later(60 * hang_minutes, exit=True)  # unless the next step comes before
    elapsed, stopped, writing = all_reduce_max(elapsed, stop.signal, checkpoints.writing())
    if not writing:
        checkpoints.finish(must=False)
    if num_iterations:
        progress, spare = step / num_iterations, 0
    elif minutes:
        progress, spare = elapsed / (60 * minutes), 0.5 * durations[-1] / (60 * minutes) if durations else 0
    else:  # one pass through the mixture
        progress, spare = all_reduce_max(loader_state[0] * world_size / len(mixture) if loader_state else 0)[0], 0
    if progress + spare >= 1 or stopped:
        break
    if step != first_step and not guard.bad and (save_every and step % save_every == 0 or elapsed - saved >= 60 * save_minutes):
        save()
    if int(4 * progress) > quarter:
        quarter = int(4 * progress)
        show_samples()

    begin = time.perf_counter()
    count = sum((targets >= 0).sum() for _, targets, _ in batches)
    if world_size > 1:  # the mean is over the targets of all ranks, wherever they fell
        torch.distributed.all_reduce(count)
    scale = world_size / count.clamp(min=1)  # the optimizers average over ranks
    loss, rows_at_once = accumulate_gradients(model, batches, scale, rows_at_once, layout)
    loader_state = batches[-1][2]
    batches = [next(loader) for _ in range(accumulation)]  # while the device works
    loss, norm = layout.reduce(loss)  # waits for the device
    verdict, reason = guard.verdict(loss, norm)
    rate = rate_scale
    if verdict == "ok":
        layout.clip(grad_clip, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            if count > 0:  # a batch without a single target teaches nothing
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
        speed, left = total_batch_size / typical, elapsed * (1 / max(progress, 1e-3) - 1)  # of one pass
        if num_iterations or minutes:
            left = max(0, (num_iterations - step) * typical if num_iterations else 60 * minutes - elapsed)
        print0(f"step {step:5d} | {100 * progress:3.0f} % | loss {loss:.4f} | rate {rate:.2f} | {speed:,.0f} tok/s | "
               f"{left / 60:.1f} min left")
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

# the last step: save, sample, say
save()
checkpoints.finish()
stop.release()
faulthandler.dump_traceback_later(60 * hang_minutes, exit=True)
show_samples()
checkpoints.amend(step, finished=True)
faulthandler.cancel_dump_traceback_later()
speed = total_batch_size / statistics.median(durations[3:] or durations or [float("inf")])
finish_stage("mid_train", time.perf_counter() - started, settings, steps=step, tokens=step * total_batch_size, train_seconds=elapsed,
             tokens_per_second=speed, flops_per_second=speed * flops_per_token, matmul_flops_per_second=matmul_rate * world_size,
             val_bpb=None, checkpoint=str(folder), parameters=sum(p.numel() for p in model.parameters()), config=meta["config"])
compute_cleanup()
