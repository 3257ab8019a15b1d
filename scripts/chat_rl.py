"""Reinforcement learning: the chat model answers questions, and learns from what it got right.

    python -m scripts.chat_rl                                    # a task of this machine, 5 minutes
    python -m scripts.chat_rl --tasks=counting,arithmetic --minutes=10
    python -m scripts.chat_rl --tasks=mine.py                    # your own task and reward
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --tasks=GSM8K
    python -m scripts.chat_eval --source=rl                      # and chat_cli, chat_web

Every step samples groups of answers from the model as it is and makes those that are better than
their group likelier: GRPO, on-policy, with a loss over tokens and without a KL penalty
(nanochat/rollouts.py). docs/chat-rl.md says how to choose a task and how to write one.
"""
import time

import torch

from nanochat.common import UserError, all_reduce_max, compute_init, gathered, print0
from nanochat.configurator import configure, require
from nanochat.engine import Engine, check_sampling
from nanochat.gpt import require_causal
from nanochat.hardware import measure_matmul_flops, raise_malloc_thresholds
from nanochat.parallel import Layout, accumulate_gradients, count_targets, prepare
from nanochat.passage_store import origins_of, prepare_passages
from nanochat.plan import chat_horizon, chat_layout
from nanochat.rollouts import (
    Score,
    asks_the_same,
    distinct_draws,
    draw_questions,
    evened_out,
    hacking_warning,
    has_spread,
    micro_batches,
    nothing_to_learn,
    outcome_warning,
    sample_groups,
    score_of,
    seed_of,
    weighted_rollouts,
)
from nanochat.run import Run
from nanochat.schedule import lr_multiplier, set_learning_rates
from nanochat.selftest import check_device
from nanochat.start import start_chat
from tasks.named import About, fetch_tasks, is_of_user, make_task, split_names, task_name

# settings
tasks: str = None            # names or files, with commas; None: counting, or GSM8K (hub data)
model_tag: str = None        # checkpoint folder of the model to start from; None: the newest
from_step: int = None        # its step; None: the last
source = "sft"               # stage to start from: sft, mid or rl
minutes: float = None        # wall clock of the loop, evaluation aside; None: 5, on a GPU one epoch
num_iterations: int = None   # optimizer steps, in place of minutes
examples_per_step: int = None  # questions per step; None: 8, on a GPU 16, at least one a rank
num_samples = 8              # answers to each, a group
max_new_tokens: int = None   # of an answer; None: 96, of GSM8K 512
temperature = 1.0            # of sampling in training and in evaluation
top_k = 0                    # tokens to sample from; 0: all
device_batch_size = 16       # answers per device and training pass
learning_rate = 0.001        # Muon's, for the matrices; decays to 2 % over the run
weight_decay = 0.0           # of the matrices
grad_clip = 0.0              # largest gradient norm; 0 does not clip
eval_items = 128             # held-out questions at most, num_samples answers to each
eval_times = 4               # evaluations after as many equal parts; there is one before, too
device_type = ""             # cuda, mps or cpu; empty: the best one here
dtype = ""                   # float32 or bfloat16; empty: the checkpoint's
parallel = "auto"            # replicated, zero2 or fsdp; auto: as pretraining
reduce_dtype = "float32"     # of gradients between ranks: float32 or bfloat16
checkpoint_activations: bool = None  # recompute blocks in backward; None: as pretraining
compile = False              # compile the blocks, for a few lengths of answers; for long runs
save_every = 1000            # steps between checkpoints; the last step is always saved
save_minutes = 10.0          # minutes between checkpoints, besides
keep = 3                     # newest checkpoints that stay
hang_minutes = 30.0          # a step that takes longer ends the run; every rank prints where it was
logger = ""                  # tensorboard or wandb, besides log.jsonl; --no-wandb is --logger=
resume = False               # resume the newest unfinished run that started from this model
resume_from_checkpoint: str = None  # or from this one: its step, or the path of one of its files
seed = 44                    # of the questions and of the answers
settings = configure(globals(), aliases={"no_wandb": "logger=", "task": "tasks"})
require(settings, 1, "examples_per_step", "device_batch_size", "eval_items", "eval_times", "keep")
require(settings, 2, "num_samples")  # one answer has no group to be compared with
require(settings, 0, "learning_rate", "weight_decay", "grad_clip")
check_sampling(temperature, top_k, 1 if max_new_tokens is None else max_new_tokens)
if temperature == 0:
    raise UserError("temperature=0: the answers to a question would all be the same; choose 1")
if source not in ("sft", "mid", "rl"):
    raise UserError(f"source={source} is not a stage to start from: choose sft, mid or rl")
names = [task_name(name) for name in split_names(tasks)] if tasks else None

INHERITED = ("own_identity", "chat_data", "questions")  # from the meta of the model it starts from
QUESTIONS_PER_STEP = {"cuda": 16}  # on other devices 8
TRAINING_ITEMS = 20_000      # of a task that makes its items up
LENGTH_MULTIPLE = 64         # tokens, where every length would be compiled
SAMPLE_STREAM, SCORE_STREAM = 0, 1  # seeds of answers in training and in evaluation differ

# ---- compute, and where the run starts
started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type, dtype, seed)
checked = check_device(compute, compile)
device, rank, world_size = compute.device, compute.rank, compute.world_size
if examples_per_step is None:
    examples_per_step = QUESTIONS_PER_STEP.get(device.type, 8)
    examples_per_step = world_size * max(1, examples_per_step // world_size)
if examples_per_step % world_size:
    raise UserError(f"examples_per_step={examples_per_step} questions cannot be shared by "
                    f"{world_size} ranks: give a multiple")
start, model, tokenizer = start_chat("chat_rl", "rl", settings, compute, model_source=source)
require_causal(model, "reinforcement learning")
meta = start.meta
passages = prepare_passages(None, meta, start.folder)
if not start.state:
    origin = next(origins_of(meta), None) or {}
    meta.update({key: origin[key] for key in INHERITED if key in origin})
arrangement = chat_layout(settings, meta, world_size)
prepare(model, checked.compile, arrangement.checkpoint_activations)
T = model.config.max_seq_len
matmul_flops = measure_matmul_flops(device, compute.dtype)

# ---- optimizers
optimizers = model.setup_optimizers(learning_rate, weight_decay)
checked.set_up(optimizers)
layout = Layout(model, optimizers, arrangement.parallel, reduce_dtype)
if start.state:
    layout.load_optimizer_state(start.state["optimizers"])
    torch.set_rng_state(start.state["rng"].cpu())

# ---- tasks: what is practised, and what is held out
names = names or ["GSM8K" if meta.get("chat_data") == "hub" else "counting"]
for split in ("train", "test"):
    error = fetch_tasks(names, split)
    if error:
        raise error
about = About(meta, passages)
practised = [make_task(name, "train", TRAINING_ITEMS, about) for name in names]
held_out = [make_task(name, "test", eval_items, about) for name in names]
for name, task in zip(names * 2, practised + held_out):
    if not len(task):
        raise UserError(f"{name} has no items to practise: choose another task")
asked = distinct_draws(held_out, eval_items)    # held-out questions by their numbers
for name, own, scored in zip(names, practised, held_out):
    if is_of_user(name) and asks_the_same(own, scored, eval_items):
        print0(f"{name} asks the same questions in training and to score it: a better score does "
               "not say that others are answered better (docs/chat-rl.md: let it take split)")

# ---- budget
horizon = chat_horizon(settings, device.type, examples_per_step, sum(map(len, practised)))
print0(f"{', '.join(names)}: {examples_per_step} questions a step, {num_samples} answers to each, "
       f"at temperature {temperature:g}; {len(asked)} held-out questions")

run = Run(
    "chat_rl", settings, compute, start.folder, start, meta, horizon, 0, model.flops(T),
    matmul_flops)
run.checkpoints.save_tokenizer(tokenizer)
options = {"temperature": temperature, "top_k": top_k, "max_new_tokens": max_new_tokens}

# what a resumed run continues: questions drawn so far, tokens trained on, steps that had nothing to
# learn, the mean reward of each step, scores
drawn, trained_tokens, idle_steps, rewards = 0, 0, 0, []
scores = [(step, Score(*numbers)) for step, numbers in meta.get("scores", [])]
if start.state:
    drawn, trained_tokens, idle_steps, rewards = start.state["loaders"][0]
micro_batch_size = device_batch_size
said_idle = False            # whether it was said that a step has nothing to learn
del start  # what was read is mapped from files that the run may delete


def answer_held_out(samples, **options):
    """Groups of Rollouts of the held-out questions, those of all ranks. Every rank calls it."""
    engine = Engine(layout.whole_model(), tokenizer, passages)
    groups = []
    for first in range(0, len(asked), examples_per_step):
        run.watch()
        numbers = asked[first:first + examples_per_step][rank::world_size]
        questions = [draw_questions(held_out, number, 1, 0)[0] for number in numbers]
        seeds = [[seed_of(SCORE_STREAM, number, i) for i in range(samples)] for number in numbers]
        groups += sample_groups(engine, questions, seeds, **options)
    return gathered(groups)


def evaluate():
    """Score the held-out questions as the model answers them in training."""
    print0(f"answering {len(asked)} held-out questions, {num_samples} times each")
    score = score_of(answer_held_out(num_samples, **options))
    scores.append((run.step, score))
    run.log(
        accuracy=score.accuracy, pass_at_k=score.pass_at_k, held_out_reward=score.reward,
        cut=score.cut)
    print0(
        f"step {run.step}: held out {100 * score.accuracy:.1f} % right (pass@1), "
        f"pass@{num_samples} {100 * score.pass_at_k:.1f} %, reward {score.reward:.3f}, "
        f"{100 * score.cut:.0f} % cut")


def greedy_accuracy():
    """The share of held-out questions that are answered rightly at temperature 0."""
    greedy = {"temperature": 0, "top_k": 0, "max_new_tokens": max_new_tokens}
    return score_of(answer_held_out(1, **greedy)).accuracy


# ---- before the first step
if not scores:
    evaluate()
    meta["greedy_before"] = greedy_accuracy()
    print0(f"greedy: {100 * meta['greedy_before']:.1f} % right")

while not run.over():
    # once in a while: answer held-out questions, and save
    if run.evaluation_due(times=eval_times):
        evaluate()
        warning = hacking_warning(scores[0][1], scores[-1][1])
        if warning:
            print0(warning)
    if run.save_due():
        continued = drawn, trained_tokens, idle_steps, list(rewards)
        run.save(layout, continued, scores=list(scores))

    # the learning rate decays over the whole run, without warm-up
    multiplier = run.lr_scale * lr_multiplier(run.progress, warmup=0, warmdown=1)

    # rollouts: each rank answers its share of the questions with the weights as they are; the seed
    # of an answer depends on its question alone
    run.begin_step()
    numbers = range(drawn, drawn + examples_per_step)[rank::world_size]
    questions = [draw_questions(practised, number, 1, seed)[0] for number in numbers]
    seeds = [
        [seed_of(seed, SAMPLE_STREAM, number, i) for i in range(num_samples)]
        for number in numbers
    ]
    engine = Engine(layout.whole_model(), tokenizer, passages)
    groups = sample_groups(engine, questions, seeds, **options)
    del engine
    drawn += examples_per_step

    # advantages: groups whose answers are worth the same are left out
    weighted = weighted_rollouts(groups)
    multiple = LENGTH_MULTIPLE if checked.compile else 1
    batches = micro_batches(weighted, device_batch_size, device, multiple, T)
    batches = evened_out(batches, all_reduce_max(len(batches))[0], device)
    targets = count_targets(batches)

    # forward and backward: the loss is the mean over the tokens that the model chose, on all ranks
    loss_scale = world_size / targets.clamp(min=1)  # the layout averages over ranks
    loss, micro_batch_size = accumulate_gradients(
        model, batches, loss_scale, micro_batch_size, layout)

    # reduce, then judge, then apply; the loss is of either sign, and the guard wants its size
    loss, grad_norm = layout.reduce(loss)
    learns = bool(targets > 0)
    accepted = not learns or run.accepts(abs(loss), grad_norm)
    if accepted and learns:
        set_learning_rates(optimizers, multiplier)
        layout.apply(grad_clip, grad_norm)
    layout.zero_grad()

    # keep the record; the tokens of a step are those that it read in training
    groups = gathered(groups)
    reward = sum(rollout.reward for group in groups for rollout in group)
    reward /= max(1, sum(map(len, groups)))
    if not learns:
        idle_steps += 1
        if not said_idle:
            print0(f"step {run.step + 1}: {nothing_to_learn(groups)}")
        said_idle = True
    if accepted:
        rewards.append(reward)
        trained_tokens += sum(gathered([batch[0].numel() for batch in batches]))
        run.total_batch_size = trained_tokens // (run.step + 1)  # the mean, for steps differ
        run.record(loss, learning_rate * multiplier, grad_norm)
        run.log(reward=reward, groups=sum(map(has_spread, groups)))
    else:
        run.skip(layout)

# ---- the ending: save, answer held-out questions, say
if run.last_save_is_due():
    run.save(layout, (drawn, trained_tokens, idle_steps, rewards), scores=list(scores))
run.exit_unless_finished()
evaluate()
greedy_after = greedy_accuracy()
before, after = scores[0][1], scores[-1][1]
print0(f"right at temperature {temperature:g}: {100 * before.accuracy:.1f} to "
       f"{100 * after.accuracy:.1f} %; greedy: {100 * meta['greedy_before']:.1f} to "
       f"{100 * greedy_after:.1f} %")
warning = outcome_warning(before, after)
if warning:
    print0(warning)
if idle_steps:
    print0(f"{idle_steps} of {run.step} steps had nothing to learn")
run.finish(
    model,
    time.perf_counter() - started,
    amended={"scores": scores},
    val_bpb=None,
    tasks=names,
    accuracy_before=before.accuracy,
    accuracy_after=after.accuracy,
    greedy_before=meta["greedy_before"],
    greedy_after=greedy_after,
    pass_at_k_before=before.pass_at_k,
    pass_at_k_after=after.pass_at_k,
    k=num_samples,
    reward_before=before.reward,
    reward_after=after.reward,
    accuracy_error=after.accuracy_error,
    eval_items=len(asked),
    mean_reward=sum(rewards) / max(1, len(rewards)),
    idle_steps=idle_steps,
    warning=warning or None,
)
