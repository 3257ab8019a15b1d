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
majority, the control and ChatCORE.
"""
import time
import zlib
from typing import NamedTuple

import torch.distributed as dist

from nanochat.answers import Answerer, Noise, is_generated
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.configurator import configure, require
from nanochat.folders import chosen_line
from nanochat.hardware import raise_malloc_thresholds
from nanochat.metrics import finish_stage, wilson_interval
from nanochat.passage_store import load_passages
from nanochat.scores import centred, majority_share, pass_at_k, sample_counts
from tasks.common import answer_text, at_equal_distances, stem_of, with_stem
from tasks.named import (
    FROM_HUB,
    MADE,
    TASKS,
    About,
    fetch_tasks,
    make_task,
    split_names,
    task_name,
)
from tasks.questions import Questions
from tasks.task_file import FileTask

# settings
tasks: str = None      # -a, comma-separated: names of tasks, files of questions; None: all tasks
custom: str = None     # a file of questions for the task `custom`
source = "sft"         # stage of the model: mid, sft or rl
model_tag: str = None  # checkpoint folder; None: the newest
step: int = None       # step; None: the newest
items: int = None      # --max-problems: items a task; None: 256, of a file of yours all
control = True         # ask what has choices again with the question of another item
batch_size = 64        # answered at a time
num_samples = 1        # answers to each question, where they are generated
temperature = 0.0      # of these; 0: the likeliest token
top_k = 50             # of these, at a temperature above 0; 0: all tokens
max_new_tokens = 96    # of an answer; a quote of your text comes besides, GSM8K has 512
device_type = ""       # cuda, mps or cpu; empty: the best one here
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
require(settings, 1, "items", "batch_size", "num_samples", "max_new_tokens")
require(settings, 0, "temperature", "top_k")
if num_samples > 1 and temperature == 0:
    raise UserError(f"{num_samples} samples at temperature 0 are one answer: add --temperature=0.8")

USUAL_ITEMS = 256
SHOWN = 20              # wrong answers to a file's questions that are printed
PROGRESS_SECONDS = 2

# ---- which tasks
if tasks:
    names = [task_name(name) for name in split_names(tasks)]
else:
    names = list(MADE)
if custom:
    names.append("custom")
names = list(dict.fromkeys(names))
is_of_user = {name: name == "custom" or name not in TASKS for name in names}
of_user = {
    name: make_task(name, about=About(custom=custom)) for name in names if is_of_user[name]
}

started = time.perf_counter()
raise_malloc_thresholds()
compute = compute_init(device_type)
rank, world_size = compute.rank, compute.world_size
model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
print0(chosen_line(source, meta))
model.cast_for_inference(model.compute_dtype)
passages = load_passages(meta)
about = About(meta, passages, custom)
answerer = Answerer(model, tokenizer, passages, max_new_tokens)

# a chat is asked about the user's text where it was made of that, else about Python's library
if not tasks:
    unfit = "pydoc" if passages else "own_text"
    names = [name for name in names if not name.startswith(unfit)]

# questions of the hub: those that are named; without names, where the chat practised their kind
from_hub = [name for name in names if name in FROM_HUB]
has_practised = not tasks and meta.get("chat_data") == "hub"
if has_practised:
    names = [name for name in names if not name.startswith("pydoc")]
    from_hub = list(FROM_HUB)
error = fetch_tasks(from_hub)
if error and not has_practised:
    raise error
if error:
    print0(f"without {', '.join(from_hub)}, which are not to be had: {error}")
elif has_practised:
    names += from_hub


# ---- one task
class Asked(NamedTuple):
    """An item and how it was answered."""
    number: int         # of the item in its data set
    right: list         # for each sample whether it is right
    control: object     # whether the control is right; None where there is none
    similarity: float   # to the accepted answer, of a file's questions
    fits: bool          # whether the question fits the context
    given: str          # the text of the first answer


def control_of(conversations, place):
    """A multiple-choice conversation with the question of another one; None where it has none.

    The other one stands half of the items away: in a sorted data set, in another subject.
    """
    stem = stem_of(conversations[place])
    if stem is None:
        return None
    count = len(conversations)
    for distance in range(count // 2, count // 2 + count):
        other = stem_of(conversations[(place + distance) % count])
        if other not in (None, stem):
            return with_stem(conversations[place], other)
    return None


def noise_of(number, sample):
    """The Noise of one sample of an item; None for a greedy answer."""
    if temperature == 0:
        return None
    return Noise(temperature, top_k, zlib.crc32(f"{number} {sample}".encode()))


def ask(task, numbers, conversations, controls):
    """The Asked of items, whose numbers, conversations and controls are given."""
    # 1) answer every sample of every item, and every control
    again = [num_samples if is_generated(one) else 1 for one in conversations]
    prompts, noises = [], []
    for number, conversation, samples in zip(numbers, conversations, again):
        prompts += [conversation] * samples
        noises += [noise_of(number, sample) for sample in range(samples)]
    with_control = [one for one in controls if one]
    answers = answerer.answer(prompts + with_control, noises + [None] * len(with_control))

    # 2) judge them, together
    pairs = list(zip(prompts + with_control, answers))
    verdicts = task.evaluate_many(pairs)
    of_controls = iter(verdicts[len(prompts):])

    # 3) what belongs to each item
    asked = []
    first = 0
    for number, conversation, other, samples in zip(numbers, conversations, controls, again):
        parts = answers[first]
        asked.append(Asked(
            number,
            verdicts[first:first + samples],
            next(of_controls) if other else None,
            task.similarity(conversation, parts) if isinstance(task, Questions) else 0.0,
            not answerer.does_not_fit(conversation),
            answer_text(parts),
        ))
        first += samples
    return asked


def ask_all(name, task, numbers, conversations):
    """The Asked of all items, in their order, on every rank: the ranks share them out."""
    # 1) this rank's items, those of a length together: a batch is padded to its longest
    def length(place):
        return len(str(conversations[place]["messages"][-2]["content"])), place

    mine = sorted(range(rank, len(conversations), world_size), key=length)
    samples = num_samples if any(map(is_generated, conversations)) else 1
    at_a_time = max(1, batch_size // samples)

    # 2) answer them
    asked = []
    began = said_at = time.perf_counter()
    for start in range(0, len(mine), at_a_time):
        places = mine[start:start + at_a_time]
        asked += ask(
            task,
            [numbers[place] for place in places],
            [conversations[place] for place in places],
            [control_of(conversations, place) if control else None for place in places],
        )
        now = time.perf_counter()
        if now - said_at > PROGRESS_SECONDS and len(asked) < len(mine):
            said_at = now
            left = (now - began) / len(asked) * (len(mine) - len(asked))
            print0(f"{name}: {len(asked)} of {len(mine)} answered, {left:.0f} s left")

    # 3) those of the other ranks
    if world_size > 1:
        gathered = [None] * world_size
        dist.all_gather_object(gathered, asked)
        asked = [one for some in gathered for one in some]
    return sorted(asked, key=lambda one: one.number)


def one_line(text):
    """A text as one short line of visible characters."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "?" for c in words)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def show_wrong(conversations, asked):
    """Question, expected and given answer of the first wrong ones."""
    wrong = [pair for pair in zip(conversations, asked) if not pair[1].right[0]]
    for conversation, one in wrong[:SHOWN]:
        *_, question, expected = conversation["messages"]
        print0(f"  asked     {one_line(question['content'])}")
        print0(f"  expected  {one_line(answer_text(expected['content']))}")
        print0(f"  given     {one_line(one.given)}")


def chance_of(task, conversations):
    """What guessing gets right of these conversations."""
    choices = [one.get("choices") or one.get("letters") for one in conversations]
    shares = [1 / len(some) for some in choices if some]
    return sum(shares) / len(conversations) if shares else task.chance


def gold_of(conversation):
    """The right answer, for the majority: of choices the place of the right one."""
    if "gold" in conversation:
        return conversation["gold"]
    return answer_text(conversation["messages"][-1]["content"])


# ---- every task
accuracy, counts, chance, intervals, f1 = {}, {}, {}, {}, {}
majority, controls, centred_accuracy, pass_at, unfit = {}, {}, {}, {}, {}
for name in names:
    # the items
    task = of_user.get(name) or make_task(name, "test", items or USUAL_ITEMS, about)
    most = items if is_of_user[name] else items or USUAL_ITEMS
    numbers = at_equal_distances(len(task), most)
    if not numbers:
        print0(f"{name:13s} has no items: the text is too short to ask about")
        continue
    conversations = [task[number] for number in numbers]

    # their answers
    asked = ask_all(name, task, numbers, conversations)
    count = len(asked)
    not_fitting = sum(not one.fits for one in asked)
    if not_fitting:
        unfit[name] = not_fitting
        print0(f"{name}: {not_fitting} of {count} questions do not fit the context of "
               f"{answerer.max_seq_len} tokens")
    if not_fitting == count:
        continue

    # the numbers
    shares = [sum(one.right) / len(one.right) for one in asked]
    accuracy[name] = sum(shares) / count
    counts[name] = count
    intervals[name] = wilson_interval(accuracy[name], count)
    chance[name] = chance_of(task, conversations)
    majority[name] = majority_share([gold_of(one) for one in conversations])
    centred_accuracy[name] = centred(accuracy[name], chance[name])
    of_control = [one.control for one in asked if one.control is not None]
    if of_control:
        controls[name] = sum(of_control) / len(of_control)
    samples = len(asked[0].right)
    if samples > 1:
        pass_at[name] = {
            k: sum(pass_at_k(samples, sum(one.right), k) for one in asked) / count
            for k in sample_counts(samples)
        }

    # a line of them, and for a file what was wrong
    low, high = intervals[name]
    words = f"95 % interval {100 * low:.0f} to {100 * high:.0f} %, chance {100 * chance[name]:.0f} %"
    words += f", majority {100 * majority[name]:.0f} %"
    if name in controls:
        words += f", control {100 * controls[name]:.1f} %"
    if isinstance(task, Questions):
        f1[name] = sum(one.similarity for one in asked) / count
        words += f", F1 {100 * f1[name]:.1f} %"
    for k, share in pass_at.get(name, {}).items():
        words += f", pass@{k} {100 * share:.1f} %"
    if isinstance(task, (Questions, FileTask)):
        show_wrong(conversations, asked)
    print0(f"{name:13s} {sum(shares):4.0f} of {count} right, {100 * accuracy[name]:5.1f} % ({words})")

if not accuracy and unfit:
    raise UserError(
        f"no question of {', '.join(unfit)} fits the context of {answerer.max_seq_len} tokens: "
        "evaluate a model with a longer one (--max_seq_len of scripts.base_train)")
if not accuracy:
    raise UserError(f"{', '.join(names)}: there are no items to ask")
chatcore = sum(centred_accuracy.values()) / len(centred_accuracy)
print0(f"ChatCORE {chatcore:.4f}: the mean over {len(accuracy)} tasks of accuracy with chance at 0")

finish_stage(
    "chat_eval",
    time.perf_counter() - started,
    settings,
    accuracy=accuracy,
    f1=f1,
    items=counts,
    interval=intervals,
    chance=chance,
    majority=majority,
    control=controls,
    centred=centred_accuracy,
    chatcore=chatcore,
    pass_at_k=pass_at,
    not_fitting=unfit,
    near_ties=answerer.near_ties,
    own_files=passages.document_count if passages else 0,
    source=source,
    checkpoint=meta["dir"],
)
compute_cleanup()
