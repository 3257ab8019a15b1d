"""How many held-out items of each task the chat model gets right.

    python -m scripts.chat_eval                          # all tasks
    python -m scripts.chat_eval -a spelling,pydoc        # some of them, by name
    torchrun --standalone --nproc_per_node=2 -m scripts.chat_eval

Answers are decoded greedily; questions with choices are answered with the likeliest choice.
"""
import time

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.configurator import configure, require
from nanochat.engine import Engine, check_finite
from nanochat.folders import chosen_line
from nanochat.hardware import raise_malloc_thresholds
from nanochat.loss_eval import pad_batch
from nanochat.metrics import finish_stage
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
unknown = [name for name in names if name not in TASKS]
if unknown:
    raise UserError(f"task {unknown[0]} does not exist: choose from {', '.join(TASKS)}")

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
device, rank, world_size = compute.device, compute.rank, compute.world_size
model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
print0(chosen_line(source, meta))
model.cast_for_inference(model.compute_dtype)
engine = Engine(model, tokenizer)


# ---- three ways to answer; each returns one list of parts for each conversation

def answer(conversations):
    """Whatever the model generates."""
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    completions = engine.generate_batch(prompts, max_new_tokens=max_new_tokens, temperature=0)
    return [tokenizer.parse_completion(ids) for ids in completions]


@torch.inference_mode()
def pick_letters(conversations):
    """The likeliest of each conversation's letters after its question."""
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    kv_cache = model.new_kv_cache(len(prompts), max(lengths))
    slots = list(range(len(prompts)))
    logits = model.prefill(torch.tensor(padded, device=device), kv_cache, slots, lengths)
    answers = []
    for conversation, row in zip(conversations, logits):
        ids = [tokenizer.encode(letter)[0] for letter in conversation["letters"]]
        check_finite(row[ids])
        best = int(row[ids].argmax())
        answers.append([{"type": "text", "text": conversation["letters"][best]}])
    return answers


def pick_choices(conversations):
    """The choice whose likelihood gains most, a token, when the neutral question becomes the real
    one. Plain likelihood prefers short and common sentences whatever was asked (PMI scoring, arXiv
    2104.08315)."""
    asked, neutral, lengths = [], [], []
    for conversation in conversations:
        question = conversation["messages"][0]["content"]
        for text in conversation["choices"]:
            asked.append((question, text))
            neutral.append((conversation["neutral"], text))
            lengths.append(len(tokenizer.encode(text)))
    gains = log_likelihoods(asked) - log_likelihoods(neutral)
    gains = (gains / torch.tensor(lengths, device=device)).view(len(conversations), -1)
    check_finite(gains)
    answers = []
    for conversation, best in zip(conversations, gains.argmax(-1).tolist()):
        answers.append([{"type": "text", "text": conversation["choices"][best]}])
    return answers


def log_likelihoods(pairs):
    """Nats of each answer after its question, (N,), for N pairs (question, answer)."""
    sequences, answer_lengths = [], []
    for question, text in pairs:
        message = {"role": "user", "content": question}
        prompt = tokenizer.render_for_completion({"messages": [message]})
        ids = tokenizer.encode(text)
        sequences.append(prompt + ids)
        answer_lengths.append(len(ids))
    inputs, targets = pad_batch(sequences, device)
    for row, ids, answer_length in zip(targets, sequences, answer_lengths):
        row[:len(ids) - 1 - answer_length] = -1  # the question is not scored
    return model.log_probs(inputs, targets).sum(-1)


def how_to_answer(conversation):
    if "choices" in conversation:
        return pick_choices
    if "letters" in conversation:
        return pick_letters
    return answer


# ---- every task, its items shared out over the ranks
accuracy, counts, chance = {}, {}, {}
for name in names:
    task = TASKS[name]()
    mine = [task[i] for i in range(rank, len(task), world_size)]
    right = 0
    for start in range(0, len(mine), batch_size):
        batch = mine[start:start + batch_size]
        answers = how_to_answer(batch[0])(batch)
        right += sum(task.evaluate(c, parts) for c, parts in zip(batch, answers))

    # ranks with no items at all still take part
    totals = torch.tensor([right, len(mine)], device=device)
    if world_size > 1:
        torch.distributed.all_reduce(totals)
    right, counts[name] = totals.tolist()
    accuracy[name] = right / counts[name]
    chance[name] = task.chance
    print0(
        f"{name:13s} {right:4d} of {counts[name]} right, {100 * accuracy[name]:5.1f} % "
        f"(chance {100 * task.chance:.0f} %)")

finish_stage(
    "chat_eval",
    time.perf_counter() - started,
    settings,
    accuracy=accuracy,
    items=counts,
    chance=chance,
    source=source,
    checkpoint=meta["dir"],
)
compute_cleanup()
