"""How many held-out items of each task the chat model gets right, decoding greedily.

    python -m scripts.chat_eval                          # all tasks
    python -m scripts.chat_eval -a spelling -a pydoc     # some of them, by name
    torchrun --standalone --nproc_per_node=2 -m scripts.chat_eval
"""
import time

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, finish_stage, print0
from nanochat.configurator import configure
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
device_type = ""       # cuda, mps or cpu; empty: the best that is here
settings = configure(globals(), aliases={"a": "tasks"})

TASKS = {
    "arithmetic": lambda: Arithmetic("test", size=items),
    "spelling": lambda: SimpleSpelling("test", size=items),
    "counting": lambda: SpellingBee("test", size=items),
    "pydoc": lambda: PyDoc("test", "choice", stop=items),
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
engine = Engine(model, tokenizer)


@torch.inference_mode()
def pick_letters(conversations):
    """The most likely of each conversation's letters, as parts, for questions with choices."""
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    padded = torch.tensor([p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts], device=compute.device)
    ends = torch.tensor([len(p) - 1 for p in prompts], device=compute.device)
    logits = model.logits(model.features(padded)[torch.arange(len(prompts)), ends])
    letters = [[tokenizer.encode(letter)[0] for letter in c["letters"]] for c in conversations]
    return [[{"type": "text", "text": c["letters"][int(row[ids].argmax())]}] for c, row, ids in zip(conversations, logits, letters)]


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
        answers = pick_letters(part) if task.eval_type == "categorical" else answer(part)
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
