"""How many held-out items of each task the chat model gets right, or of your own questions.

    python -m scripts.chat_eval                          # all tasks
    python -m scripts.chat_eval -a spelling,pydoc        # some of them, by name
    python -m scripts.chat_eval -a "ARC-Easy|GSM8K"      # of the hub: ARC-Challenge and MMLU, too
    python -m scripts.chat_eval -a qa.jsonl              # your own questions and answers
    torchrun --standalone --nproc_per_node=2 -m scripts.chat_eval

Answers are decoded greedily; questions with choices are answered with the likeliest choice.
tasks/questions.py says what a file of questions looks like, and when an answer is right.
"""
import os
import re
import time
from collections import defaultdict

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, expand_home, print0
from nanochat.configurator import configure, require
from nanochat.conversation import fit_conversation, prompt_room
from nanochat.engine import Engine, check_finite
from nanochat.folders import chosen_line
from nanochat.hardware import raise_malloc_thresholds
from nanochat.hub import on_first_rank
from nanochat.loss_eval import pad_batch
from nanochat.metrics import finish_stage, wilson_interval
from nanochat.passage_store import load_passages
from tasks.arithmetic import Arithmetic
from tasks.chat_data import HELD_OUT, held_out
from tasks.common import answer_text
from tasks.identity import Identity, identity_of
from tasks.own_text import OwnText
from tasks.pydoc import PyDoc
from tasks.questions import Questions
from tasks.spellingbee import SimpleSpelling, SpellingBee

# settings
tasks: str = None      # -a, comma-separated: names of tasks, files of questions; None: all tasks
source = "sft"         # stage of the model: mid, sft or rl
model_tag: str = None  # checkpoint folder; None: the newest
step: int = None       # step; None: the newest
items = 256            # held-out items a task; of a file of questions all are asked
batch_size = 64        # answered at a time
max_new_tokens = 96    # of an answer; a quote of your text comes besides, GSM8K has 512
device_type = ""       # cuda, mps or cpu; empty: the best one here
settings = configure(globals(), aliases={"a": "tasks"})
require(settings, 1, "items", "batch_size", "max_new_tokens")

SHOWN = 20              # wrong answers to a file's questions that are printed
PROGRESS_SECONDS = 5
TASKS = {
    "arithmetic": lambda: Arithmetic("test", size=items),
    "spelling": lambda: SimpleSpelling("test", size=items),
    "counting": lambda: SpellingBee("test", size=items),
    "pydoc": lambda: PyDoc("test", "choice", stop=items),
    "pydoc_letter": lambda: PyDoc("test", "letter", stop=items),
    "pydoc_module": lambda: PyDoc("test", "module", stop=items),
    "identity": lambda: Identity("test", *identity_of(meta), passages is not None, stop=items),
    "own_text": lambda: OwnText("test", passages.passages, items, own_form),
    "own_text_practised": lambda: OwnText("train", passages.passages, items, own_form),
}


def split_names(text):
    """The names in a list with commas or bars between them; a file may have these in its name."""
    is_file = os.path.isfile(expand_home(text, "write the whole path"))
    return [text] if is_file else re.split("[,|]", text)


def read_questions(name):
    """The Questions of a file. UserError where `name` is neither a task nor a file."""
    is_a_path = "." in name or os.sep in name
    if not is_a_path and not os.path.exists(name):
        choices = ", ".join((*TASKS, *HELD_OUT))
        raise UserError(f"task {name} does not exist: choose from {choices}, or name a file of "
                        "questions (jsonl, json, csv, parquet)")
    return Questions(name)


names = split_names(tasks) if tasks else list(TASKS)
known = {*TASKS, *HELD_OUT}
files = {name: read_questions(name) for name in names if name not in known}

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
device, rank, world_size = compute.device, compute.rank, compute.world_size
model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
print0(chosen_line(source, meta))
model.cast_for_inference(model.compute_dtype)
passages = load_passages(meta)
own_form = meta.get("settings", {}).get("own_text", "lookup")
engine = Engine(model, tokenizer, passages)

# a chat is asked about the user's text where it was made of that, else about Python's library
if not tasks:
    unfit = "pydoc" if passages else "own_text"
    names = [name for name in names if not name.startswith(unfit)]
elif not passages and any(name.startswith("own_text") for name in names):
    raise UserError("own_text: this chat was not trained on a text of yours, ask for other tasks")

# questions of the hub: those that are named; without names, where the chat practised their kind
from_hub = [name for name in names if name in HELD_OUT]
has_practised = not tasks and meta.get("chat_data") == "hub"
if has_practised:
    names = [name for name in names if not name.startswith("pydoc")]
    from_hub = list(HELD_OUT)
error = on_first_rank(lambda: [HELD_OUT[name]() for name in from_hub]) if from_hub else None
if error and not has_practised:
    raise error
if error:
    print0(f"without {', '.join(from_hub)}, which are not to be had: {error}")
elif has_practised:
    names += from_hub


def make_task(name):
    """The task of a name, a key of `files` among them."""
    if name in files:
        return files[name]
    if name in HELD_OUT:
        return held_out(name, items)
    return TASKS[name]()


# ---- three ways to answer; each returns one list of parts for each conversation

def prompt_of(conversation):
    """A conversation's last question as ids, after as many of the turns before it as fit."""
    room = prompt_room(engine.max_seq_len, max_new_tokens)
    messages = conversation["messages"][:-1]
    messages = fit_conversation(tokenizer, messages, room)
    return tokenizer.render_for_completion({"messages": messages})


def answer(conversations):
    """Whatever the model generates; nothing where the question alone fills the context."""
    prompts = [prompt_of(conversation) for conversation in conversations]
    fitting = [prompt for prompt in prompts if len(prompt) < engine.max_seq_len]
    room = max(conversation.get("answer_tokens", max_new_tokens) for conversation in conversations)
    completions = engine.generate_batch(
        fitting,
        max_new_tokens=max(max_new_tokens, room),
        temperature=0,
    )
    waiting = iter(completions)
    answers = []
    for prompt in prompts:
        fits = len(prompt) < engine.max_seq_len
        answers.append(tokenizer.parse_completion(next(waiting)) if fits else [])
    return answers


@torch.inference_mode()
def pick_letters(conversations):
    """The likeliest of each conversation's letters after its question."""
    prompts = [tokenizer.render_for_completion(c) for c in conversations]
    prompts = [prompt[-engine.max_seq_len:] for prompt in prompts]  # the choices stand at the end
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
        question = conversation["messages"][-2]["content"]
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
        sequences.append((prompt + ids)[-engine.max_seq_len - 1:])
        answer_lengths.append(min(len(ids), engine.max_seq_len))
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


def answer_all(conversations):
    """The answers, in order. Those that are answered together have as many choices each."""
    # 1) the places of the conversations that are alike
    alike = defaultdict(list)
    for i, conversation in enumerate(conversations):
        count = len(conversation.get("choices", ()))
        alike[how_to_answer(conversation), count].append(i)

    # 2) their answers
    answers = {}
    for (how, _), places in alike.items():
        some = how([conversations[i] for i in places])
        answers.update(zip(places, some))
    return [answers[i] for i in range(len(conversations))]


# ---- every task, its items shared out over the ranks
def evaluate(name, task):
    """(right, sum of similarities, wrong answers) of this rank's items.

    Similarities are of the user's questions only.
    """
    mine = [task[i] for i in range(rank, len(task), world_size)]
    right, similarity, wrong = 0, 0.0, []
    said_at = time.perf_counter()
    for start in range(0, len(mine), batch_size):
        # judge the answers of a batch
        batch = mine[start:start + batch_size]
        for conversation, parts in zip(batch, answer_all(batch)):
            if name in files:
                similarity += task.similarity(conversation, parts)
            if task.evaluate(conversation, parts):
                right += 1
            else:
                wrong.append((conversation, answer_text(parts)))

        # say how far it has come
        if time.perf_counter() - said_at > PROGRESS_SECONDS:
            said_at = time.perf_counter()
            done = start + len(batch)
            print0(f"{name}: {done} of {len(mine)} answered")
    return right, similarity, wrong


def one_line(text):
    """A text as one short line of visible characters."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "?" for c in words)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def show_wrong(wrong):
    """Question, expected and given answer of the first wrong ones, of rank 0."""
    for conversation, given in wrong[:SHOWN]:
        *_, asked, expected = conversation["messages"]
        print0(f"  asked     {one_line(asked['content'])}")
        print0(f"  expected  {one_line(answer_text(expected['content']))}")
        print0(f"  given     {one_line(given)}")


accuracy, counts, chance, intervals, f1 = {}, {}, {}, {}, {}
for name in names:
    is_file = name in files
    task = make_task(name)
    right, similarity, wrong = evaluate(name, task)

    # ranks with no items at all still take part
    mine = len(range(rank, len(task), world_size))
    totals = torch.tensor(
        [right, mine, similarity],
        device=device,
        dtype=torch.float32,
    )
    if world_size > 1:
        torch.distributed.all_reduce(totals)
    right, count, similarity = totals.tolist()
    if not count:
        print0(f"{name:13s} has no items: the text is too short to ask about")
        continue

    # the numbers, and for a file what was wrong
    accuracy[name] = right / count
    counts[name] = round(count)
    intervals[name] = wilson_interval(accuracy[name], count)
    chance[name] = task.chance
    percent = 100 * accuracy[name]
    words = f"chance {100 * task.chance:.0f} %"
    if is_file:
        f1[name] = similarity / count
        low, high = intervals[name]
        words += f", 95 % interval {100 * low:.0f} to {100 * high:.0f} %"
        words += f", F1 {100 * f1[name]:.1f} %"
        show_wrong(wrong)
    print0(f"{name:13s} {right:4.0f} of {count:.0f} right, {percent:5.1f} % ({words})")

finish_stage(
    "chat_eval",
    time.perf_counter() - started,
    settings,
    accuracy=accuracy,
    f1=f1,
    items=counts,
    interval=intervals,
    chance=chance,
    own_files=passages.document_count if passages else 0,
    source=source,
    checkpoint=meta["dir"],
)
compute_cleanup()
