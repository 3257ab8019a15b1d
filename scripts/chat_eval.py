"""How many held-out items of each task the chat model gets right, decoding greedily or picking the likeliest choice.

    python -m scripts.chat_eval                          # all tasks
    python -m scripts.chat_eval -a spelling,pydoc        # some of them, by name
    torchrun --standalone --nproc_per_node=2 -m scripts.chat_eval
"""
import time

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.metrics import finish_stage
from nanochat.configurator import configure, require
from nanochat.engine import Engine
from nanochat.hardware import raise_malloc_thresholds
from tasks.arithmetic import Arithmetic
from tasks.identity import Identity
from tasks.pydoc import PyDoc
from tasks.spellingbee import SimpleSpelling, SpellingBee

# settings
tasks: str = None      # -a, comma-separated names; None: all
source = "sft"         # stage of the model: mid, sft or rl
model_tag: str = None  # checkpoint folder; None: the newest
step: int = None       # step; None: the newest
items = 256            # held-out items a task
batch_size = 64        # answered at a time
max_new_tokens = 96    # of an answer
device_type = ""       # cuda, mps or cpu; empty: cuda where there is one, else cpu
settings = configure(globals(), aliases={"a": "tasks"})
require(settings, 1, "items", "batch_size", "max_new_tokens")

TASKS = {
    "arithmetic": lambda: Arithmetic("test", size=items),
    "spelling": lambda: SimpleSpelling("test", size=items),
    "counting": lambda: SpellingBee("test", size=items),
    "pydoc": lambda: PyDoc("test", "choice", stop=items),
    "pydoc_letter": lambda: PyDoc("test", "letter", stop=items),
    "pydoc_module": lambda: PyDoc("test", "module", stop=items),
    "identity": lambda: Identity("test", stop=items),
}
names = tasks.split(",") if tasks else list(TASKS)
if unknown := [name for name in names if name not in TASKS]:
    raise UserError(f"task {unknown[0]} does not exist: choose from {', '.join(TASKS)}")

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
model.cast_for_inference(model.compute_dtype)
engine = Engine(model, tokenizer)


@torch.inference_mode()
def pick_letters(conversations):
    """The most likely of each conversation's letters, as parts, for questions with choices."""
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    padded = torch.tensor([p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts], device=compute.device)
    ends = torch.arange(len(prompts)), torch.tensor([len(p) - 1 for p in prompts], device=compute.device)
    logits = model.logits(*(part[ends] for part in model.features(padded)))
    letters = [[tokenizer.encode(letter)[0] for letter in c["letters"]] for c in conversations]
    return [[{"type": "text", "text": c["letters"][int(row[ids].argmax())]}] for c, row, ids in zip(conversations, logits, letters)]


@torch.inference_mode()
def log_likelihoods(pairs):
    """Nats of each answer after its question, for (question, answer) pairs, (N,)."""
    rows, targets = [], []
    for question, text in pairs:
        prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
        ids = tokenizer.encode(text)
        rows.append((prompt + ids)[:-1])
        targets.append([-1] * (len(prompt) - 1) + ids)
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=compute.device)
    wanted = torch.tensor([row + [-1] * (longest - len(row)) for row in targets], device=compute.device)
    return -model(inputs, wanted, reduction="none").sum(-1)


def pick_choices(conversations):
    """The choice whose likelihood gains most, a token, when the neutral question becomes the real one.

    Plain likelihood prefers short and common sentences whatever was asked (PMI scoring, arXiv 2104.08315).
    """
    asked = log_likelihoods([(c["messages"][0]["content"], text) for c in conversations for text in c["choices"]])
    anyway = log_likelihoods([(c["neutral"], text) for c in conversations for text in c["choices"]])
    lengths = torch.tensor([len(tokenizer.encode(text)) for c in conversations for text in c["choices"]], device=compute.device)
    gains = ((asked - anyway) / lengths).view(len(conversations), -1)
    return [[{"type": "text", "text": c["choices"][int(best)]}] for c, best in zip(conversations, gains.argmax(-1))]


def answer(conversations):
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    completions = engine.generate_batch(prompts, max_new_tokens=max_new_tokens, temperature=0)
    return [tokenizer.parse_completion(ids) for ids in completions]


accuracy, counts, chance = {}, {}, {}
for name in names:
    task = TASKS[name]()
    mine = [task[i] for i in range(compute.rank, len(task), compute.world_size)]
    right = 0
    for start in range(0, len(mine), batch_size):
        part = mine[start:start + batch_size]
        how = pick_choices if "choices" in part[0] else pick_letters if "letters" in part[0] else answer
        answers = how(part)
        right += sum(task.evaluate(c, parts) for c, parts in zip(part, answers))
    totals = torch.tensor([right, len(mine)], device=compute.device)
    if compute.world_size > 1:
        torch.distributed.all_reduce(totals)
    right, counts[name] = totals.tolist()
    accuracy[name], chance[name] = right / counts[name], task.chance
    print0(f"{name:13s} {right:4d} of {counts[name]} right, {100 * accuracy[name]:5.1f} % (chance {100 * task.chance:.0f} %)")
finish_stage("chat_eval", time.perf_counter() - started, settings, accuracy=accuracy, items=counts, chance=chance, source=source,
             checkpoint=meta["dir"])
compute_cleanup()
