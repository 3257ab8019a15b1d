"""How many held-out items of each task the chat model gets right, or of your own questions.

    python -m scripts.chat_eval                          # all tasks
    python -m scripts.chat_eval -a spelling,pydoc        # some of them, by name
    python -m scripts.chat_eval -a "ARC-Easy|GSM8K" --max-problems=100
    python -m scripts.chat_eval -a qa.jsonl              # your own questions and answers
    python -m scripts.chat_eval -a mine.py               # a task of your own
    python -m scripts.chat_eval -a GSM8K --num_samples=8 --temperature=0.8      # pass@1 to pass@8
    torchrun --standalone --nproc_per_node=2 -m scripts.chat_eval

Questions with choices are answered with the likeliest choice; other answers are generated, greedily
unless several samples are wanted. The answers are the same at any batch size and on any number of
ranks (nanochat/answers.py). docs/chat-eval.md explains every number: the interval, chance, the
majority, the control, ChatCORE, and what was declined.
"""
import time

import torch

from nanochat.answers import Answerer
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.configurator import check_choices, configure, require
from nanochat.folders import chosen_line
from nanochat.hardware import raise_malloc_thresholds
from nanochat.loss_eval import set_draws
from nanochat.metrics import finish_stage
from nanochat.passage_store import load_passages
from tasks.asking import (
    How,
    ask_all,
    declined_of,
    declined_words,
    refusals_of,
    score,
    score_words,
    show_wrong,
)
from tasks.common import at_equal_distances
from tasks.named import (
    FROM_HUB,
    MADE,
    OF_LOCAL_MIXTURE,
    About,
    fetch_tasks,
    is_of_user,
    make_task,
    sandbox_error,
    split_names,
    task_name,
)

# settings
tasks: str = None      # -a, comma-separated: names of tasks, files of questions; None: all tasks
custom: str = None     # a file of questions, the task `custom`
source = "sft"         # stage of the model: mid, sft or rl
model_tag: str = None  # checkpoint folder; None: the newest
step: int = None       # step; None: the newest
items: int = None      # --max-problems: items a task; None: 256, of a file of yours all
control = True         # ask what has choices once more, below the question of another item
batch_size = 64        # answered at a time
num_samples = 1        # answers to each question, where they are generated
temperature = 0.0      # of these; 0: the likeliest token
top_k = 50             # of these, at a temperature above 0; 0: all tokens
draws: int = None      # of a diffusion model's bound, a choice; None: 128, on a CPU 8
max_new_tokens = 96    # of an answer; a quote comes besides, GSM8K and HumanEval have 512
allow_missing = ""     # layers of the sandbox that may be missing, comma-separated, of HumanEval
device_type = ""       # cuda, mps or cpu; empty: the best one here
dtype = ""             # float32 or bfloat16; empty: that of training
settings = configure(globals(), aliases={
    "a": "tasks",
    "task-name": "tasks",
    "x": "items",
    "max-problems": "items",
    "max_problems": "items",
    "n": "num_samples",
    "t": "temperature",
    "k": "top_k",
    "m": "max_new_tokens",
    "b": "batch_size",
    "i": "source",
    "g": "model_tag",
    "s": "step",
})
require(settings, 1, "items", "batch_size", "num_samples", "max_new_tokens", "draws")
require(settings, 0, "temperature", "top_k")
check_choices(settings, dtype=("", "float32", "bfloat16"))
if num_samples > 1 and temperature == 0:
    raise UserError(f"{num_samples} samples at temperature 0 are one answer: add --temperature=0.8")

USUAL_ITEMS = 256
SHOWN = 20      # wrong answers to a file's questions that are printed

# ---- the tasks that are named; a file with a mistake is told before the model is loaded
names = [task_name(name) for name in split_names(tasks)] if tasks else list(MADE)
if custom:
    names.append("custom")
names = list(dict.fromkeys(names))
of_user = {name: make_task(name, about=About(custom=custom)) for name in names if is_of_user(name)}

# ---- the model
started = time.perf_counter()
raise_malloc_thresholds()
device = compute_init(device_type).device
model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
print0(chosen_line(source, meta))
model.cast_for_inference(getattr(torch, dtype) if dtype else model.compute_dtype)
set_draws(model, draws, few=8)
passages = load_passages(meta)
may_miss = tuple(filter(None, allow_missing.split(",")))
about = About(meta, passages, custom, may_miss)
answerer = Answerer(model, tokenizer, passages, max_new_tokens)
how = How(answerer, batch_size, num_samples, temperature, top_k, control)

# ---- the tasks that fit the model
# a chat is asked about the user's text where it was made of that, else about Python's library
if not tasks:
    of_text = [name for name in MADE if name.startswith("own_text")]
    unfit = OF_LOCAL_MIXTURE if passages else of_text
    names = [name for name in names if name not in unfit]

# questions of the hub: those that are named; without names, where the chat practised their kind
from_hub = [name for name in names if name in FROM_HUB]
has_practised = not tasks and meta.get("chat_data") == "hub"
if has_practised:
    names = [name for name in names if name not in OF_LOCAL_MIXTURE]
    from_hub = list(FROM_HUB)
error = fetch_tasks(from_hub)
if error and not has_practised:
    raise error
if error:
    print0(f"without {', '.join(from_hub)}, which are not to be had: {error}")
elif has_practised:
    names += from_hub

# HumanEval's answers are programs: where nothing confines them, they are not run
error = sandbox_error(names, may_miss)
if error and not has_practised:
    raise error
if error:
    names.remove("HumanEval")
    print0(f"without HumanEval: {error}")

# ---- every task
scores, refusals, not_fitting = {}, {}, {}
for name in names:
    # the items
    is_of_file = name in of_user    # an empty task counts as False
    most = items if is_of_file else items or USUAL_ITEMS
    task = of_user[name] if is_of_file else make_task(name, "test", most, about)
    numbers = at_equal_distances(len(task), most)
    if not numbers:
        reason = "" if is_of_file else ": the text is too short to ask about"
        print0(f"{name:13s} has no items{reason}")
        continue
    conversations = [task[number] for number in numbers]

    # their answers
    asked = ask_all(how, name, task, numbers, conversations)
    too_long = sum(not one.fits for one in asked)
    if too_long:
        not_fitting[name] = too_long
        print0(f"{name}: {too_long} of {len(asked)} questions do not fit the context of "
               f"{answerer.max_seq_len} tokens")
    if too_long == len(asked):
        continue

    # the numbers, and of the user's questions what was wrong
    scores[name] = score(task, conversations, asked)
    refusals[name] = refusals_of(conversations, asked)
    if name in of_user:
        show_wrong(conversations, asked, SHOWN)
    print0(f"{name:13s} {score_words(scores[name])}")

if not scores and not_fitting:
    raise UserError(
        f"no question of {', '.join(not_fitting)} fits the context of {answerer.max_seq_len} "
        "tokens: evaluate a model with a longer one (--max_seq_len of scripts.base_train)")
if not scores:
    raise UserError(f"{', '.join(names)}: there are no items to ask")
if answerer.excess > 1:
    print0(f"scores of a batch differ by {answerer.excess:.1f} times as much as a near tie allows: "
           "another --batch_size may answer a few questions otherwise")
chatcore = sum(one.centred for one in scores.values()) / len(scores)
declined = declined_of(refusals)
if declined.should is not None:
    print0(f"declined      {declined_words(declined)}")
print0(f"ChatCORE {chatcore:.4f}: accuracy with chance at 0, mean over tasks ({len(scores)})")


def column(key):
    """{task: number} of those tasks that have it."""
    numbers = {name: getattr(one, key) for name, one in scores.items()}
    return {name: number for name, number in numbers.items() if number not in (None, {})}


finish_stage(
    "chat_eval",
    time.perf_counter() - started,
    settings,
    accuracy=column("accuracy"),
    f1=column("f1"),
    items=column("count"),
    interval=column("interval"),
    chance=column("chance"),
    majority=column("majority"),
    control=column("control"),
    centred=column("centred"),
    chatcore=chatcore,
    pass_at_k=column("pass_at_k"),
    declined=declined._asdict(),
    declined_by_task={name: sum(some) / len(some) for name, some in refusals.items() if some},
    not_fitting=not_fitting,
    near_ties=answerer.near_ties,
    batch_difference=answerer.excess,
    own_files=passages.document_count if passages else 0,
    source=source,
    checkpoint=meta["dir"],
)
compute_cleanup()
