"""What the chat stages are made of: data sets of the hub, or tasks that every machine can make.

    python -m tasks.chat_data           # fetch all that training and chat_eval read, beforehand

On a GPU the stages have the documented mixtures of nanochat (scripts/mid_train.py and
scripts/chat_sft.py of github.com/karpathy/nanochat, October 2025), in rows:

    midtraining   SmolTalk 460 K, MMLU auxiliary_train 100 K, GSM8K 8 K, spelling 200 K, counting
                  letters 80 K, and identity
    fine-tuning   ARC-Easy 2.3 K, ARC-Challenge 1.1 K, GSM8K 8 K, SmolTalk 10 K, spelling 300,
                  counting letters 300, and identity

Ours adds arithmetic as a small share of each, for its short questions. Where the hub is out of
reach and the cache does not have these sets, and on a CPU, whose minutes they would not repay, both
stages have the local mixture. Every rank must have the same one: the first rank of each machine
fetches, and all decide alike.
"""
import time
from typing import NamedTuple

from nanochat.common import UserError, all_reduce_max, print0
from nanochat.configurator import configure
from nanochat.dataloader import count_cut
from nanochat.hub import HubError, on_first_rank
from nanochat.metrics import finish_stage
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic, TwoSteps
from tasks.common import HubTask
from tasks.follow_up import FollowUp
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mixing import Repeated
from tasks.mmlu import MMLU
from tasks.own_text import subject_tasks
from tasks.scope import Scope
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

ORIGINS = ("hub", "local")
LOCAL, HUB = "local", "hub"
TRIED = 100     # conversations of a task that tell whether its questions fit the context


# ----------------------------------------------------------------------------------------------
# the mixtures

def local_tasks(passages, own_text):
    """The tasks of both stages on a CPU, beside those of the model's name.

    passages, own_text: as in subject_tasks(). A chat about a text of the user's declines nothing:
    it looks up whatever it is asked, and says where it found nothing.
    """
    tasks = [
        SimpleSpelling("train", 80_000),
        SpellingBee("train", 6_000),
        Arithmetic("train", 26_000),
        *subject_tasks(passages, own_text),
    ]
    if passages is None:
        tasks += [
            Scope("train", 10_000),
            FollowUp("train", 6_000),
            TwoSteps("train", 4_000),
        ]
    return tasks


def midtraining_tasks(fetch=True):
    """The documented mixture of midtraining. fetch: as of HubTask."""
    return [
        SmolTalk("train", fetch),
        mmlu_for_training(fetch),
        GSM8K("train", fetch),
        SimpleSpelling("train", 200_000),
        SpellingBee("train", 80_000),
        Arithmetic("train", 26_000),
    ]


def finetuning_tasks(fetch=True):
    """The documented mixture of fine-tuning. fetch: as of HubTask."""
    return [
        ARC("ARC-Easy", "train", fetch=fetch),
        ARC("ARC-Challenge", "train", fetch=fetch),
        GSM8K("train", fetch),
        SmolTalk("train", fetch, stop=10_000),
        SimpleSpelling("train", 300),
        SpellingBee("train", 300),
        Arithmetic("train", 300),
    ]


def mmlu_for_training(fetch=True):
    """MMLU's auxiliary questions, or where these are not to be had its examples."""
    try:
        return MMLU("auxiliary_train", fetch)
    except (UserError, HubError) as error:
        examples = MMLU("dev", fetch)
        print0(f"MMLU's {len(examples)} examples take the place of its auxiliary_train: {error}")
        return examples


HUB_TASKS = {"mid_train": midtraining_tasks, "chat_sft": finetuning_tasks}


# ----------------------------------------------------------------------------------------------
# which one a run has

class Origin(NamedTuple):
    """Where the conversations of a stage are to come from."""
    name: str       # hub or local
    required: bool  # whether the run ends where they cannot be had


def choose_origin(chat_data, device_type, resumed=None):
    """The Origin that a run wants.

    chat_data: the setting: hub, local, or "" for hub on a GPU and local elsewhere. resumed: the
    name of the resumed run's, or None: its loader's position counts conversations of these.
    UserError for another setting, and for one that is not the resumed run's.
    """
    if chat_data not in ("", *ORIGINS):
        raise UserError(f"chat_data={chat_data} is not supported: choose {' or '.join(ORIGINS)}")
    if resumed and chat_data not in ("", resumed):
        raise UserError(
            f"the run to resume has the conversations of chat_data={resumed}, not of {chat_data}: "
            "leave --chat_data out, or train another model without --resume")
    if resumed or chat_data:
        return Origin(resumed or chat_data, True)
    return Origin(HUB if device_type == "cuda" else LOCAL, False)


def tasks_of_run(stage, chat_data, device_type, start, passages, own_text):
    """The built-in tasks of a run, whose meta learns where they are from and how many rows they
    have.

    start: a Start (start.py). A resumed run must find the rows that it began with: its place is a
    number of conversations. Others: as in choose_origin() and built_in_tasks().
    """
    resumed = None
    if start.state:
        resumed = start.meta.get("chat_data", LOCAL)  # runs of earlier versions knew no other
    origin = choose_origin(chat_data, device_type, resumed)
    name, tasks = built_in_tasks(stage, origin, passages, own_text)
    rows = sum(map(len, tasks))
    before = start.meta.get("chat_rows", rows) if resumed == HUB else rows
    if before != rows:
        raise UserError(
            f"the run to resume began with {before:,} conversations, of which {rows:,} are there "
            "now: bring the data sets back (docs/chat-data.md), or train another model without "
            "--resume")
    start.meta.update(chat_data=name, chat_rows=rows)
    return tasks


def built_in_tasks(stage, origin, passages, own_text):
    """(name of the origin, tasks) of a stage. Every rank calls it.

    stage: a key of HUB_TASKS. passages, own_text: of the user's text, as in subject_tasks(); what
    Python's library has to say belongs to the local mixture.
    """
    if origin.name == LOCAL:
        return LOCAL, local_tasks(passages, own_text)
    make = HUB_TASKS[stage]
    made = []
    error = on_first_rank(lambda: made.append(make()))
    if error is None:
        tasks = made[0] if made else make(fetch=False)
        _check_ranks_have_as_many(sum(map(len, tasks)))
        said = ", ".join(f"{type(task).__name__} {len(task):,}" for task in tasks)
        print0(f"conversations of the hub: {said}")
        return HUB, [*tasks, *(subject_tasks(passages, own_text) if passages else [])]
    if origin.required:
        raise error
    print0(f"the conversations of this machine alone, for the hub's are not to be had: {error}")
    return LOCAL, local_tasks(passages, own_text)


def _check_ranks_have_as_many(rows):
    """UserError where ranks have different data, as machines with caches of their own may have."""
    most, fewest = all_reduce_max(rows, -rows)
    if most != -fewest:
        raise UserError(
            f"the machines have different data sets of the hub ({most:,.0f} rows and "
            f"{-fewest:,.0f}): run python -m tasks.chat_data on each of them first")


def check_context(tokenizer, tasks, T):
    """Say of which data sets of the hub a context of T tokens cuts conversations.

    UserError where no answer at all of one of them is left to learn from. It tries TRIED
    conversations of each, at equal distances.
    """
    for task in tasks:
        if not isinstance(task, HubTask):
            continue
        tried = Repeated(task, min(TRIED, len(task)))
        cut, unanswered = count_cut(tokenizer, tried, T)
        if unanswered == len(tried):
            raise UserError(
                f"the context of {T} tokens is too short for {task.name}: none of {len(tried)} "
                "conversations keeps an answer when it is cut to it. Train a base model with a "
                "larger --max_seq_len, or give --chat_data=local")
        if cut:
            print0(f"{task.name}: the context of {T} tokens cuts {cut} of {len(tried)} "
                   f"conversations, {unanswered} of which keep no answer")


# ----------------------------------------------------------------------------------------------
# the command

# what chat_eval may ask of the hub
HELD_OUT = (
    lambda: ARC("ARC-Easy", "test"),
    lambda: ARC("ARC-Challenge", "test"),
    lambda: MMLU("test"),
    lambda: GSM8K("test"),
    lambda: HumanEval("test"),
)


def main():
    settings = configure(globals())
    start = time.time()
    rows = {}
    # one after the other, for each is held in memory while it is read
    for make in (*HUB_TASKS.values(), *HELD_OUT):
        made = make()
        for task in made if isinstance(made, list) else [made]:
            if isinstance(task, HubTask):
                rows[f"{task.name} {task.config} {task.split}"] = task.rows.total
    finish_stage("chat_data", time.time() - start, settings, rows=rows)


if __name__ == "__main__":
    main()
