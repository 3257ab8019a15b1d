"""
The report card of a run: report.md, report.html (one self-contained file) and their plots.

    python -m nanochat.report                            # of the run in $NANOCHAT_BASE_DIR
    python -m nanochat.report --speedrun --seconds=900   # also records a whole speedrun
    python -m nanochat.report --compare d4 d4-2          # base models by tag, or any run's folder
    python -m nanochat.report --compare a42,a1 b42,b1    # pairs of runs with the same seeds
    python -m nanochat.report --card                     # a line for dev/LEADERBOARD.md
    python -m nanochat.report --serve                    # a page that follows what trains now
    python -m nanochat.report --serve d4 --port=8080     # or one run, by tag or folder

Every stage left one JSON line in metrics.jsonl, and every training stage a log.jsonl beside its
checkpoint. The report only reads these: it measures nothing. It has no section for what a run did
not do, so that half a run gets its report as well.
"""
import math
import os
import time
from collections import namedtuple

from nanochat import card as cards
from nanochat import compare as comparison
from nanochat.common import UserError, atomic_file, atomic_write, get_base_dir
from nanochat.configurator import configure
from nanochat.document import to_html, to_markdown
from nanochat.metrics import finish_stage
from nanochat.plots import draw_plots
from nanochat.records import (
    TRAINING,
    duration,
    interval,
    last_run,
    matmul_share,
    measured_bpb,
    percent,
    read_jsonl,
    si,
    training_log,
)

speedrun = False            # end with the record of a whole speedrun in place of this stage's own
seconds: float = None       # wall clock of that speedrun; None: the sum over its stages
compare = False             # compare the runs that are named, the baseline first
card = False                # one line for dev/LEADERBOARD.md about the last run's pretraining
serve = False               # a live page of what trains now, or of the run that is named
host = "127.0.0.1"          # the address on which that page is served, one of this machine alone
port = 8001                 # and its port

TITLE = "nanochat: the report card"
SPEEDRUN_TASKS = ("arithmetic", "spelling", "pydoc", "identity")

# Nobody measured these: watts and rent in dollars an hour, for each core of a CPU or each GPU, and
# dollars per kWh.
WATTS = {"core": 15, "gpu": 1000}
RENT = {"core": 0.05, "gpu": 3.0}
DOLLARS_PER_KWH = 0.30

# What a report is about. stages: {stage: its record in metrics.jsonl}. training: those of them that
# trained. total: seconds of the whole run. plots: {file name: figure}.
Run = namedtuple("Run", "stages training total plots")


# --------------------------------------------------------------------------------------------------
# what the report says: each section is a generator of blocks, and yields none where its stage is
# missing

NO_PLOTS = (
    "There are no plots, because matplotlib cannot be imported: pip install matplotlib, then "
    "python -m nanochat.report draws them."
)

LIKE_GPT2 = (
    "This model has {size}. That is the class of GPT-2 (2019; 124 M to 1.5 G parameters): fluent, "
    "often wrong. Today's assistants are hundreds of times larger and have read thousands of times "
    "more. Do not take its facts on trust."
)

SMALLER_THAN_GPT2 = (
    "This model has {size}. The smallest GPT-2 of 2019 had 124 M parameters; today's assistants "
    "have thousands of times more than that and have read far more text still. What it learned is "
    "the look of {text} and a few practised skills, those in the table of "
    "accuracies. It does not reason and it knows next to nothing: outside those skills its answers "
    "are fluent guesses, most of them false, and it cannot tell which. The accuracies are of "
    "held-out items of the same making as the training items, so they show that a skill carries "
    "over to new words, numbers or names, not that it carries over to other questions. And to "
    "choose among four answers is far easier than to give one."
)

NOT_PRETRAINED = (
    "This model has {size} parameters and was not pretrained: no step of pretraining was taken. "
    "{later} Do not expect language of it."
)

OWN_TEXT = (
    "It quotes from {files}: asked questions that were made from headings that were held out, it "
    "quoted the right passage for {held_out}, and from those that it practised for {practised}. It "
    "knows nothing else about the world."
)


def honest_words(run):
    """What a model of this size is and is not: a paragraph, with this run's own numbers."""
    first_training = next(iter(run.training.values()), {})
    base = run.stages.get("base_train") or first_training
    parameters = base.get("parameters")
    tokens = base.get("tokens")
    if not parameters or tokens is None:
        return "No training is recorded here, so that nothing can be said of what a model has read."
    if not tokens:
        return not_pretrained_words(run, parameters)

    size = f"{si(parameters)} parameters, pretrained on {reading(run, base)}"
    data = base.get("settings", {}).get("data")
    text = f"your text, {data}," if data else "the text it was trained on"
    words = LIKE_GPT2 if parameters >= 1e8 else SMALLER_THAN_GPT2
    words = words.format(size=size, text=text)
    return f"{words} {own_text_words(run.stages)}".strip()


def not_pretrained_words(run, parameters):
    """honest_words() of a run in which pretraining took no step."""
    tokens = sum(record.get("tokens") or 0 for record in run.training.values())
    later = "No later stage trained it."
    if tokens:
        later = f"What it can do, it learned from {si(tokens)} tokens of the later stages."
    return NOT_PRETRAINED.format(size=si(parameters), later=later)


def own_text_words(stages):
    """What a chat about the user's own text knows, and how well; "" for another chat."""
    record = stages.get("chat_eval", {})
    accuracy = record.get("accuracy", {})
    if "own_text" not in accuracy:
        return ""
    count = record.get("own_files")
    files = f"your {count} files" if count else "your files"
    return OWN_TEXT.format(
        files="your file" if count == 1 else files,
        held_out=percent(accuracy["own_text"]),
        practised=percent(accuracy.get("own_text_practised")),
    )


def reading(run, base):
    """How much text pretraining read, and how often: '1.5 M tokens (620 kB of text, read 8 times)'.

    base: its record. "text_bytes" are those of the training text, each counted once, and "epochs"
    how often it was read. A record without them says no more than how many bytes the tokens were.
    """
    tokens = base["tokens"]
    words = f"{si(tokens)} tokens"
    text_bytes, epochs = base.get("text_bytes"), base.get("epochs")
    if text_bytes and epochs:
        often = f"read {epochs:.1f} times"
        if epochs <= 1:
            often = f"of which it read {percent(epochs)}"
        return f"{words} ({si(text_bytes, 'B')} of text, {often})"
    size = tokens * run.stages.get("tok_train", {}).get("bytes_per_token", 0)
    return f"{words} ({si(size, 'B')} of text)" if size else words


def picture(run, name, alt):
    """The block of a plot, none where it could not be drawn."""
    if name in run.plots:
        yield ("picture", name, alt)


def overview_blocks(run):
    """The figures at the head of the report, and what the model is."""
    tiles = []
    base = run.stages.get("base_train", {})
    if base:
        tokens = sum(record.get("tokens") or 0 for record in run.training.values())
        if base.get("val_bpb") is not None:
            tiles.append(("bits per byte", f"{base['val_bpb']:.3f}"))
        if base.get("val_bpb_bound") is not None:
            tiles.append(("bits per byte at most", f"{base['val_bpb_bound']:.3f}"))
        if (base.get("unseen") or {}).get("val_bpb") is not None:
            tiles.append(("on unseen sources", f"{base['unseen']['val_bpb']:.3f}"))
        tiles.append(("parameters", si(base.get("parameters"))))
        if base.get("text_bytes") and base.get("epochs"):
            tiles.append(("of text", si(base["text_bytes"], "B")))
            tiles.append(("times read", f"{base['epochs']:.1f}"))
        tiles.append(("tokens trained on", si(tokens)))
        tiles.append(("tokens per second", si(base.get("tokens_per_second"))))
    tiles.append(("time in all", duration(run.total)))
    yield ("tiles", tiles)
    if not run.plots:
        yield ("text", NO_PLOTS)
    yield ("heading", "What this model is")
    yield ("text", honest_words(run))


def task_title(task):
    """The name of a task as people read it: questions that were practised are called so."""
    if task.endswith("_practised"):
        return task.removesuffix("_practised") + ", practised"
    return task


def accuracy_blocks(run):
    record = run.stages.get("chat_eval", {})
    if not record.get("accuracy"):
        return
    items = record.get("items", {})
    chance, controls = record.get("chance", {}), record.get("control", {})
    has_majority = "majority" in record     # records of an earlier version have not
    more = ["majority", "control"] if has_majority else []
    rows = []
    for task, fraction in record["accuracy"].items():
        row = [
            task_title(task),
            percent(fraction),
            interval(fraction, items.get(task)),
            percent(chance.get(task)),
        ]
        if has_majority:
            control = percent(controls[task]) if task in controls else "no choices"
            row += [percent(record["majority"].get(task)), control]
        rows.append((*row, str(items.get(task, "unknown"))))
    yield ("heading", "Accuracy")
    yield from picture(run, "report_accuracy.png", "Accuracy of each task with its chance level")
    yield ("table", ["task", "right", "95 % interval", "chance", *more, "items"], rows)
    yield ("text", f"Answers of {model_of(record)}. The items of built-in tasks were asked by no "
                   "training conversation; those called practised were. Chance is what guessing "
                   "would get; where it is 0 %, the answer has to be produced and not chosen.")
    if has_majority:
        yield ("text", "The majority is what always giving the most frequent right answer would "
                       "get. The control asks with the question of another item: what is left "
                       "above chance there is a habit, not knowledge.")
    if record.get("chatcore") is not None:
        yield ("text", f"ChatCORE, the mean accuracy with chance at 0: {record['chatcore']:.4f}.")
    declined = record.get("declined") or {}     # records of an earlier version have none
    if declined.get("should") is not None:
        yield ("text", f"Declined when it should: {percent(declined['should'])} of "
                       f"{declined['should_count']} questions outside of what it has learnt. "
                       f"Declined when it should not: {percent(declined['should_not'])} of "
                       f"{declined['should_not_count']} others.")
    for task, shares in record.get("pass_at_k", {}).items():
        words = ", ".join(f"{percent(share)} at {k}" for k, share in shares.items())
        yield ("text", f"pass@k of {task_title(task)}: {words}.")


def core_blocks(run):
    """The tasks of CORE, those of which the model knows most first."""
    record = run.stages.get("base_eval", {})
    if not record.get("tasks"):
        return
    tasks = sorted(record["tasks"].items(), key=lambda item: -item[1]["centred"])
    rows = []
    for name, task in tasks:
        control = task.get("control")
        rows.append((
            name,
            percent(task["accuracy"]),
            interval(task["accuracy"], task["rows"]),
            percent(task["baseline"]),
            f"{task['centred']:.4f}",
            "" if control is None else percent(control),
            str(task["rows"]),
        ))
    header = ["task", "right", "95 % interval", "guessing", "centred", "control", "rows"]
    mean = record["mean_centred"]
    of_model = record.get("settings", {}).get("hf_path") or record.get("model", "the base model")
    said = f"CORE of {of_model}: {mean:.4f}, the mean of the centred column."
    if record.get("limited"):
        said = f"Some tasks or rows of {of_model}: their mean, {mean:.4f}, is not CORE."
    yield ("heading", "CORE")
    yield ("table", header, rows)
    yield ("text", f"{said} Centred is 0 for guessing and 1 where all is right. The control is the "
                   "accuracy with another row's question: what is left there is the position or "
                   "the plausibility of the choices, and no knowledge. Equal runs differ by .002 "
                   "to .005: bits per byte tell models apart earlier.")


def is_of_a_gpu(record):
    """Whether a training stage ran on a GPU that has a data sheet, or could have one."""
    return "mfu_square" in record and bool(record.get("machine", {}).get("gpus"))


def mfu_cells(record, on_gpu):
    """The cells of a training stage's share of the peak; none in a report of a CPU."""
    if not on_gpu:
        return []
    return [percent(record.get("mfu")), percent(record.get("mfu_square"))]


def mfu_words(training):
    """What the shares of the peak are of: a paragraph. training: {stage: record}."""
    peaks = {}
    for record in training.values():
        if record.get("peak_flops_per_second"):
            peaks[record["peak_flops_per_second"]] = record.get("dtype", "unknown dtype")
    if not peaks:
        return "The peak of this GPU is unknown, and so is mfu, the share of it that was achieved."
    named = " and ".join(f"{si(peak, 'FLOP/s')} ({dtype})" for peak, dtype in peaks.items())
    return (f"mfu is the share of the data sheet's dense peak, {named}. Causal counts attention as "
            "it is computed; square counts every pair of positions, as most publications do.")


def training_blocks(run):
    if not run.training:
        return
    on_gpu = any(is_of_a_gpu(record) for record in run.training.values())
    rows = []
    for name, record in run.training.items():
        rows.append((
            name,
            si(record.get("steps")),
            si(record.get("tokens")),
            duration(record["seconds"]),
            si(record.get("tokens_per_second")),
            si(record.get("flops_per_second"), "FLOP/s"),
            percent(matmul_share(record)),
            *mfu_cells(record, on_gpu),
        ))
    header = [
        "stage",
        "steps",
        "tokens",
        "time",
        "tokens/s",
        "achieved",
        "of the matmul rate",
    ]
    if on_gpu:
        header += ["mfu, causal", "mfu, square"]
    peaks = {record.get("matmul_flops_per_second") for record in run.training.values()} - {None}
    here = " and ".join(si(peak, "FLOP/s") for peak in sorted(peaks))
    measured = f" ({here} here)" if here else ""

    yield ("heading", "Training")
    yield from picture(run, "report_loss.png", "Loss, validation bits per byte and learning rate "
                                               "of each training stage")
    yield ("table", header, rows)
    yield ("text", "Tokens per second are the median over steady steps: compilation and the first "
                   "steps do not count. The matmul rate is what one large matrix product reached "
                   f"on this machine{measured}, not a peak from a data sheet.")
    if on_gpu:
        yield ("text", mfu_words(run.training))


def curriculum_blocks(run):
    """The stages of pretraining's sequence length, where it had more than one."""
    stages = run.stages.get("base_train", {}).get("stages")
    if not stages:
        return
    yield ("heading", "Stages of the sequence length")
    rows = []
    for stage in stages:
        seconds = stage["seconds"]
        rows.append((
            str(stage["stage"]),
            str(stage["length"]),
            str(stage["window"] or "all"),
            si(stage["steps"]),
            si(stage["tokens"]),
            duration(seconds),
            si(stage["tokens"] / seconds if seconds else None),
        ))
    header = ["stage", "length", "attends to", "steps", "tokens", "time", "tokens/s"]
    yield ("table", header, rows)


def model_of(record):
    """The stage and the tag of the model that a record is of."""
    source = record.get("source", record["stage"])
    return f"{source} {os.path.basename(record.get('checkpoint', ''))}".strip()


def reinforcement_blocks(run):
    record = run.stages.get("chat_rl")
    if not record:
        return
    shown = (
        ("right, sampled (pass@1)", "accuracy", percent),
        (f"right at least once of {record['k']} (pass@{record['k']})", "pass_at_k", percent),
        ("right, greedy", "greedy", percent),
        ("mean reward", "reward", "{:.3f}".format),
    )
    rows = []
    for label, key, show in shown:
        rows.append((label, show(record[f"{key}_before"]), show(record[f"{key}_after"])))
    names = ", ".join(task_title(os.path.basename(name)) for name in record["tasks"])
    temperature = record["settings"]["temperature"]

    yield ("heading", "Reinforcement learning")
    yield from picture(run, "report_rl.png", "Right answers, pass@k and reward of held-out "
                                             "questions in the course of reinforcement learning")
    yield ("table", [names, "before", "after"], rows)
    yield ("text", f"What became of {model_of(record)}. Of {record['eval_items']} questions to "
                   f"score it by, each answered {record['k']} "
                   f"times at temperature {temperature:g}; one standard error of pass@1 is "
                   f"{percent(record['accuracy_error'])}. The mean reward of the answers in "
                   f"training was {record['mean_reward']:.3f}; {record['idle_steps']} of "
                   f"{record['steps']} steps had nothing to learn.")
    if record["warning"]:
        yield ("text", f"{record['warning']}.")


def validation_documents(record):
    """How many validation documents the val_bpb of a stage's record is of; None: not known."""
    if record.get("documents"):
        return record["documents"]
    measured = [entry for entry in training_log(record) if measured_bpb(entry) is not None]
    return measured[-1].get("documents") if measured else None


FIGURES = {
    "bits per byte": "val_bpb",
    "without counts": "val_bpb_without_counts",
    "a bound on them": "val_bpb_bound",
}
READ = "sources that were read"
UNSEEN = "whole sources that were not"
TWO_TEXTS = (
    "Of the sources that were read (packages, books) training saw other documents than these; of "
    "the others it saw nothing. The two are different texts, so that one may be harder than the "
    "other for every model: what tells is how much counts of n-grams save on each, and the second "
    "figure of one model beside that of another."
)


def text_of(record, run):
    """What the validation in a record is of; "" where the run held no sources out."""
    protocol = record.get("protocol") or ""
    if protocol.startswith("bpb1-source-"):
        return UNSEEN
    base = run.stages.get("base_train", {})
    is_read = protocol == base.get("protocol") and base.get("unseen")
    return READ if is_read else ""


def cells_of(record):
    """The FIGURES of a record, or of a part of it, as text; "" for those that it lacks."""
    found = [record.get(key) for key in FIGURES.values()]
    return ["" if one is None else f"{one:.4f}" for one in found]


def bits_per_byte_blocks(run):
    rows = []
    for name, record in run.stages.items():
        if measured_bpb(record) is not None:
            documents = str(validation_documents(record) or "unknown")
            rows.append((name, text_of(record, run), documents, *cells_of(record)))
        if record.get("unseen"):
            unseen = record["unseen"]
            rows.append((name, UNSEEN, str(unseen["documents"]), *cells_of(unseen)))
    if not rows:
        return

    guessing = ""
    tokenizer = run.stages.get("tok_train", {})
    if {"vocab_size", "bytes_per_token"} <= tokenizer.keys():
        bits = math.log2(tokenizer["vocab_size"]) / tokenizer["bytes_per_token"]
        guessing = f" Guessing every token at random costs {bits:.2f}."
    yield ("heading", "Validation bits per byte")
    columns = ["stage", "of", "validation documents", *FIGURES]
    empty = [column for column in range(len(columns)) if not any(row[column] for row in rows)]
    rows = [[cell for i, cell in enumerate(row) if i not in empty] for row in rows]
    yield ("table", [name for i, name in enumerate(columns) if i not in empty], rows)
    if any(record.get("unseen") for record in run.stages.values()):
        yield ("text", TWO_TEXTS)
    yield ("text", "Bits the model needs for each raw byte of validation text that it never "
                   "trained on: lower is better, and runs with different tokenizers compare, where "
                   "they are of the same documents. The curve of a run is of fewer documents, the "
                   f"same at each of its steps.{guessing}")


def domain_blocks(run):
    """Held-out texts of several domains, where base_loss measured more than one."""
    record = run.stages.get("base_loss", {})
    rows_of = record.get("domains") or {}
    if len(rows_of) < 2:
        return
    beside = [name for name in ("step_0", "reference") if name in next(iter(rows_of.values()))]
    shares = record.get("shares")
    rows = []
    for name, row in rows_of.items():
        cells = [
            name,
            str(row["documents"]),
            f"{row['bits_per_byte']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.3f}",
            *(f"{row[whose]['ratio']:.3f}" for whose in beside),
        ]
        rows.append((*cells, percent(shares[name])) if shares else tuple(cells))
    header = ["domain", "documents", "bits per byte", "perplexity of a token", "ratio"]
    header += [f"ratio of {whose.replace('_', ' ')}" for whose in beside]
    header += ["share of what is added"] if shares else []
    yield ("heading", "Domains")
    yield ("table", header, rows)
    yield ("text", f"Held-out texts, and what {os.path.basename(record['checkpoint'])} "
                   "spends on them. The ratio is bits per byte divided by "
                   f"those of {record['base']}. The shares are a heuristic: how far a "
                   "ratio is above the reference's, or else above that of step 0.")


def tokenizer_blocks(run):
    record = run.stages.get("tok_train")
    if not record:
        return
    average = ""
    if record.get("bytes_per_token"):
        average = (f"; one token is {record['bytes_per_token']:.2f} bytes of validation text "
                   "on average")
    size = record.get("vocab_size", "unknown size")
    yield ("heading", "Tokenizer")
    yield ("text", f"Byte-level BPE with a vocabulary of {size}{average}.")


def spread(items, at_most):
    """At most so many of a list's items: the first, the last and evenly spaced ones between."""
    count = min(at_most, len(items))
    if count <= 1:
        return items[-1:]
    gaps = count - 1
    return [items[round(i * (len(items) - 1) / gaps)] for i in range(count)]


def sample_blocks(run):
    """The continuations of the same prompts, early and late in each training stage."""
    by_prompt = {}
    for name, record in run.training.items():
        entries = [entry for entry in training_log(record) if entry.get("samples")]
        for entry in spread(entries, at_most=4):
            when = f"{name}, step {entry['step']}"
            for sample in entry["samples"]:
                by_prompt.setdefault(sample["prompt"], []).append((when, sample["text"]))
    if not by_prompt:
        return
    yield ("heading", "Samples")
    yield ("text", "The continuations of the same prompts in the course of training.")
    for prompt, texts in by_prompt.items():
        yield ("samples", prompt, texts)


def time_blocks(run):
    rows = [(name, duration(record["seconds"])) for name, record in run.stages.items()]
    yield ("heading", "Time")
    yield from picture(run, "report_time.png", "Seconds spent in each stage")
    yield ("table", ["stage", "time"], [*rows, ("all", duration(run.total))])


def cost(machine, hours):
    """[(what, dollars, assumption)] of a run of `hours` on `machine`, all as text.

    machine: a dict as metrics.machine() makes it.
    """
    kind, unit = "core", "CPU core"
    count = machine.get("cores") or 1
    if machine.get("gpus"):
        kind, unit = "gpu", "GPU"
        count = len(machine["gpus"])
    units = f"{count} {unit}" + ("s" if count > 1 else "")

    energy = WATTS[kind] * count * hours / 1000  # kWh
    rent = RENT[kind] * count * hours
    return [
        (
            "electricity",
            f"${energy * DOLLARS_PER_KWH:.3f}",
            f"{units} at {WATTS[kind]} W each with all around them: "
            f"{energy:.3f} kWh at ${DOLLARS_PER_KWH:.2f}",
        ),
        (
            "a rented machine",
            f"${rent:.3f}",
            f"{units} at ${RENT[kind]:.2f} an hour each",
        ),
    ]


# How the machine's fields are called in the report; other fields keep their names.
MACHINE_TITLES = {
    "cpu": "CPU",
    "isa": "matrix instructions",
    "memory_gb": "memory (GiB)",
    "gpus": "GPUs",
}


def machine_blocks(run):
    """What the run ran on, and what that would have cost."""
    machines = [record["machine"] for record in run.stages.values() if record.get("machine")]
    machine = machines[-1] if machines else {}
    rows = []
    for key, value in machine.items():
        if value:
            text = ", ".join(value) if isinstance(value, list) else value
            rows.append((MACHINE_TITLES.get(key, key), text))

    yield ("heading", "What it would have cost")
    yield ("table", ["", "cost", "assumption"], cost(machine, run.total / 3600))
    yield ("text", "These prices and watts are assumptions, not measurements: put in your own.")
    yield ("heading", "Machine")
    yield ("table", ["", ""], rows)


def side_by_side(title, stages, field):
    """A table of the dicts in `field` of all stages that have one.

    It has a row for each key and a column for each stage; a key that a stage does not have is
    empty.
    """
    columns = {name: record[field] for name, record in stages.items() if record.get(field)}
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    if not keys:
        return
    rows = []
    for key in keys:
        cells = [str(values[key]) if key in values else "" for values in columns.values()]
        rows.append((key, *cells))
    yield ("heading", title)
    yield ("table", ["", *columns], rows)


def blocks(run):
    """All blocks of the report."""
    yield from overview_blocks(run)
    yield from accuracy_blocks(run)
    yield from core_blocks(run)
    yield from training_blocks(run)
    yield from curriculum_blocks(run)
    yield from reinforcement_blocks(run)
    yield from bits_per_byte_blocks(run)
    yield from domain_blocks(run)
    yield from tokenizer_blocks(run)
    yield from sample_blocks(run)
    yield from time_blocks(run)
    yield from machine_blocks(run)
    yield from side_by_side("Model", run.training, "config")
    yield from side_by_side("Settings", run.stages, "settings")


# --------------------------------------------------------------------------------------------------
# the report's files

def write_report(base, total=None):
    """Write report.md, report.html and the plots into the folder `base`, a Path.

    total: seconds of the run; None: the sum over its stages. Without matplotlib the report is
    written without plots, and says so. UserError where no stage has been finished yet.
    Returns (stages, total, path of report.md).
    """
    # 1) what there is to report
    stages = last_run(read_jsonl(base / "metrics.jsonl"), os.environ.get("NANOCHAT_RUN"))
    if not stages:
        raise UserError(f"{base} holds no finished stage: "
                        "run one first, or point NANOCHAT_BASE_DIR at a run")
    if total is None:
        total = sum(record["seconds"] for record in stages.values())
    training = {name: stages[name] for name in TRAINING if name in stages}

    # 2) the plots
    run = Run(stages, training, total, draw_plots(stages))
    for name, figure in run.plots.items():
        with atomic_file(base / name) as file:
            figure.savefig(file, format="png")

    # 3) the same blocks twice
    contents = list(blocks(run))
    when = max(record.get("time", "") for record in stages.values()).replace("T", " ")
    atomic_write(base / "report.md", to_markdown(TITLE, [("text", when), *contents]))
    atomic_write(base / "report.html", to_html(TITLE, when, contents, base))
    return stages, total, base / "report.md"


def finish_speedrun(stages, total, settings, path):
    """The record of a whole speedrun, whose figures have fixed names: None where one is missing."""
    base = stages.get("base_train", {})
    accuracy = stages.get("chat_eval", {}).get("accuracy", {})
    finish_stage(
        "speedrun",
        total,
        settings,
        val_bpb=base.get("val_bpb"),
        val_bpb_bound=base.get("val_bpb_bound"),
        accuracy={task: accuracy.get(task) for task in SPEEDRUN_TASKS},
        report=str(path),
    )


def main():
    names = []
    settings = configure(globals(), texts=names)
    commands = [name for name in ("compare", "card", "serve") if settings[name]]
    if names and commands not in (["compare"], ["serve"]):
        raise UserError(f"'{names[0]}' is no setting: --compare and --serve take names of runs")
    if len(commands) > 1:
        raise UserError(f"--{commands[0]} and --{commands[1]} are two commands: give one of them")
    if serve:
        from nanochat import live  # whose web server no other command needs
        live.run(names, settings)
    elif compare:
        comparison.run(names, settings)
    elif card:
        cards.run(settings)
    else:
        report_run(settings)


def report_run(settings):
    """Write the report of the last run, and end with the record of it or of the speedrun."""
    start = time.time()
    stages, total, path = write_report(get_base_dir(), seconds)
    if speedrun:
        print(own_text_words(stages) or f"What it can do, and how well: {path}", flush=True)
        finish_speedrun(stages, total, settings, path)
    else:
        finish_stage("report", time.time() - start, settings, report=str(path))


if __name__ == "__main__":
    main()
