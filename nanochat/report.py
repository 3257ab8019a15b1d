"""
The report card of a run: report.md, report.html (one self-contained file) and their plots.

    python -m nanochat.report                            # of the run in $NANOCHAT_BASE_DIR
    python -m nanochat.report --speedrun --seconds=900   # also records a whole speedrun

Every stage left one JSON line in metrics.jsonl, and every training stage a log.jsonl beside its
checkpoint. The report only reads these: it measures nothing. It has no section for what a run did
not do, so that half a run gets its report as well.

The report is a list of blocks: tuples whose first item is the kind. MARKDOWN and HTML, two tables,
hold a function for each kind that draws it.

    ("heading", text)
    ("text", text)
    ("table", header, rows)
    ("picture", file name, what it shows)
    ("tiles", [(label, value), ...])
    ("samples", prompt, [(when, continuation), ...])
"""
import base64
import functools
import html
import json
import math
import os
import re
import time
from collections import Counter, namedtuple
from pathlib import Path

from nanochat.common import UserError, atomic_file, atomic_write, get_base_dir
from nanochat.metrics import finish_stage, wilson_interval
from nanochat.configurator import configure

speedrun = False            # end with the record of a whole speedrun in place of this stage's own
seconds: float = None       # wall clock of that speedrun; None: the sum over its stages

TITLE = "nanochat: the report card"
TRAINING = ("base_train", "mid_train", "chat_sft", "chat_rl")
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
# what the stages left

def read_jsonl(path):
    """The objects in a jsonl file, [] where there is none. A line that a crash cut short is
    skipped."""
    if not Path(path).is_file():
        return []
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_run(records, run=None):
    """{stage: record}: the last record of every stage since the run began.

    The stages are in the order in which they ended. records: those of metrics.jsonl. run: the name
    of a speedrun; None: the one that began last, with what was run by hand since.
    """
    if run is not None:
        records = [record for record in records if record.get("run") == run]
    begin, began = 0, None
    for i, record in enumerate(records):
        if record.get("stage") == "start":
            begin, began = i + 1, record.get("run")

    stages = {}
    for record in records[begin:]:
        if began and record.get("run") not in (None, began):
            continue  # of another speedrun, which was resumed meanwhile
        name = record["stage"]
        stages.pop(name, None)  # so that a repeated stage moves to the end
        stages[name] = record
    for name in ("report", "speedrun"):
        stages.pop(name, None)
    return stages


def training_log(record):
    """The records in a training stage's log.jsonl.

    record: the stage's own, whose "checkpoint" is the folder. The steps that a resumed run repeated
    count once: a record removes the earlier ones of the same and of later steps.
    """
    log = []
    for entry in read_jsonl(Path(record.get("checkpoint") or ".") / "log.jsonl"):
        if log and log[-1]["step"] > entry["step"]:
            log = [earlier for earlier in log if earlier["step"] < entry["step"]]
        log.append(entry)
    return log


# --------------------------------------------------------------------------------------------------
# numbers as people read them

PREFIXES = ("", "k", "M", "G", "T", "P")


def si(number, unit=""):
    """1234567 -> '1.23 M', 3.1e11 with FLOP/s -> '310 GFLOP/s'; None -> 'unknown'."""
    if number is None:
        return "unknown"
    power = 0
    if number:
        power = int(math.log10(abs(number)) // 3)
        power = min(len(PREFIXES) - 1, max(0, power))
    return f"{number / 1000**power:.3g} {PREFIXES[power]}{unit}".strip()


def duration(number):
    """Seconds as text: 65 -> '1 min 5 s', 7500 -> '2 h 5 min'."""
    number = round(number)
    if number < 60:
        return f"{number} s"
    if number < 3600:
        return f"{number // 60} min {number % 60} s"
    return f"{number // 3600} h {number % 3600 // 60} min"


def percent(fraction):
    """0.256 -> '25.6 %', None -> 'unknown'."""
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def interval(fraction, items):
    """The 95 % interval of an accuracy: 0.985 of 200 items -> '95.7 to 99.5 %'."""
    if not items:
        return "unknown"
    low, high = wilson_interval(fraction, items)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def matmul_share(record):
    """Achieved FLOP/s as a part of the measured matmul FLOP/s, None where one of them is
    unknown."""
    flops = record.get("flops_per_second")
    peak = record.get("matmul_flops_per_second")
    return flops / peak if flops and peak else None


# --------------------------------------------------------------------------------------------------
# plots

BLUE = "#2b6cb0"
RED = "#c0392b"
AMBER = "#c9821b"
GREY = "#b8bec6"
PALE = "#e6e9ed"
INK = "#333a44"


def _figure(width, height, rows=1, columns=1):
    """A figure in inches, and its axes as a list of lists. ImportError without matplotlib.

    Not made by pyplot, which keeps global state and may look for a screen.
    """
    # matplotlib fails on import where the environment names a backend that is not installed, as
    # the environment that a notebook leaves to its processes does.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8, color=GREY)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, grid.tolist()


def smooth(values):
    """Mean over a window around each value; unlike a running average it does not lag behind."""
    half = len(values) // 60
    means = []
    for i in range(len(values)):
        window = values[max(0, i - half):i + half + 1]
        means.append(sum(window) / len(window))
    return means


def _draw_loss(axes, stage, log):
    """The loss of each step, pale, and its smoothed course."""
    steps = [record["step"] for record in log]
    losses = [record["loss"] for record in log]
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=1.6)
    axes.set_title(stage, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_ylabel("loss (nats per token)", fontsize=8, color=BLUE)


def measured_bpb(record):
    """The validation in a record: bits per byte, of a diffusion model a bound on them; or None."""
    bpb = record.get("val_bpb")
    return record.get("val_bpb_bound") if bpb is None else bpb


def comparable(log):
    """The validations of a log that are of the same documents, of which most are.

    The last one of a run is of more documents than those on the way, and on another scale.
    """
    measured = [record for record in log if measured_bpb(record) is not None]
    counts = Counter(record.get("documents") for record in measured)
    if not counts:
        return []
    [(documents, _)] = counts.most_common(1)
    return [record for record in measured if record.get("documents") == documents]


def _draw_bits_per_byte(axes, log):
    """Validation bits per byte as points, on an axis of their own on the right."""
    measured = comparable(log)
    if not measured:
        return
    steps = [record["step"] for record in measured]
    bits = [measured_bpb(record) for record in measured]
    is_bound = measured[-1].get("val_bpb") is None
    right = axes.twinx()
    right.plot(steps, bits, color=RED, marker="o", markersize=3.5, linewidth=0.8)
    sign = "≤" if is_bound else ""
    axes.set_title(f"{sign}{bits[-1]:.3f} bpb", fontsize=9, color=RED, loc="right")
    label = "bound on validation bits per byte" if is_bound else "validation bits per byte"
    right.set_ylabel(label, fontsize=8, color=RED)
    right.tick_params(colors=INK, labelsize=8, color=GREY)
    right.spines[:].set_visible(False)


def _draw_learning_rate(axes, log):
    steps = [record["step"] for record in log]
    axes.plot(steps, [record["lr"] for record in log], color=AMBER, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", fontsize=8, color=AMBER)
    axes.set_xlabel("step", fontsize=8, color=INK)


def plot_training(stages):
    """Loss above, learning rate below, a column for each training stage; None without a log."""
    logs = {}
    for name in TRAINING:
        log = training_log(stages[name]) if name in stages else []
        if any("loss" in record for record in log):
            logs[name] = log
    if not logs:
        return None

    width = 3.1 * max(2, len(logs))
    figure, (upper, lower) = _figure(width, 4.4, rows=2, columns=len(logs))
    for (name, log), above, below in zip(logs.items(), upper, lower):
        steps = [record for record in log if "loss" in record]
        _draw_loss(above, name, steps)
        _draw_bits_per_byte(above, log)
        _draw_learning_rate(below, steps)
    return figure


def _label(axes, x, y, text):
    """Text just behind the end of a bar."""
    axes.annotate(
        text,
        (x, y),
        textcoords="offset points",
        xytext=(5, 0),
        va="center",
        fontsize=8,
        color=INK,
    )


def plot_accuracy(record):
    """A bar for each task, its chance level as a tick across the bar.

    record: that of chat_eval. None where it has no accuracy.
    """
    accuracy = record.get("accuracy")
    if not accuracy:
        return None
    figure, [[axes]] = _figure(7.2, 0.8 + 0.42 * len(accuracy))
    for y, (task, fraction) in enumerate(accuracy.items()):
        axes.barh(y, 100 * fraction, color=BLUE, height=0.55)
        chance = 100 * record.get("chance", {}).get(task, 0)
        legend = "chance" if y == 0 else None
        axes.plot([chance, chance], [y - 0.38, y + 0.38], color=RED, linewidth=2, label=legend)
        _label(axes, 100 * fraction, y, f"{100 * fraction:.1f}")

    axes.set_yticks(range(len(accuracy)), accuracy, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_xlabel("per cent right of held-out items", fontsize=8, color=INK)
    axes.legend(
        fontsize=8,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )
    return figure


def plot_reinforcement(record):
    """Right answers and pass@k of held-out questions in the course of chat_rl, and their reward.

    record: that of chat_rl. None where its log has no two evaluations.
    """
    log = [entry for entry in training_log(record) if "pass_at_k" in entry]
    if len(log) < 2:
        return None
    steps = [entry["step"] for entry in log]
    figure, [[axes]] = _figure(7.2, 2.8)
    for key, label, colour in (
        ("accuracy", "right", BLUE),
        ("pass_at_k", f"pass@{record['k']}", AMBER),
    ):
        rates = [100 * entry[key] for entry in log]
        axes.plot(steps, rates, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_ylim(0, 102)
    axes.set_ylabel("per cent of held-out questions", fontsize=8, color=INK)
    axes.set_xlabel("step", fontsize=8, color=INK)

    right = axes.twinx()
    rewards = [entry["held_out_reward"] for entry in log]
    right.plot(steps, rewards, color=RED, linewidth=0.8, linestyle="--", label="reward")
    right.set_ylabel("mean reward", fontsize=8, color=RED)
    right.tick_params(colors=INK, labelsize=8, color=GREY)
    right.spines[:].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(handles=lines, fontsize=8, frameon=False, loc="lower right")
    return figure


def plot_times(stages):
    """A bar for each stage: its seconds."""
    figure, [[axes]] = _figure(7.2, 0.7 + 0.28 * len(stages))
    times = [record["seconds"] for record in stages.values()]
    colours = [BLUE if name in TRAINING else GREY for name in stages]
    axes.barh(range(len(stages)), times, height=0.6, color=colours)
    for y, number in enumerate(times):
        _label(axes, number, y, duration(number))

    axes.set_yticks(range(len(stages)), stages, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds (training in blue)", fontsize=8, color=INK)
    axes.grid(axis="y", visible=False)
    return figure


def draw_plots(stages):
    """{file name: figure} of all that this run has something to show for; {} without matplotlib."""
    try:
        plots = {
            "report_loss.png": plot_training(stages),
            "report_accuracy.png": plot_accuracy(stages.get("chat_eval", {})),
            "report_rl.png": plot_reinforcement(stages.get("chat_rl", {})),
            "report_time.png": plot_times(stages),
        }
    except ImportError:
        return {}
    return {name: figure for name, figure in plots.items() if figure}


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
    if not parameters or not tokens:
        return "Without a trained model there is nothing to be honest about yet."

    size = f"{si(parameters)} parameters, pretrained on {reading(run, base)}"
    data = base.get("settings", {}).get("data")
    text = f"your text, {data}," if data else "the text it was trained on"
    words = LIKE_GPT2 if parameters >= 1e8 else SMALLER_THAN_GPT2
    words = words.format(size=size, text=text)
    return f"{words} {own_text_words(run.stages)}".strip()


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


def bits_per_byte_blocks(run):
    rows = []
    for name, record in run.stages.items():
        if measured_bpb(record) is not None:
            documents = str(validation_documents(record) or "unknown")
            bits = [record.get(key) for key in ("val_bpb", "val_bpb_bound")]
            bits = ["" if one is None else f"{one:.4f}" for one in bits]
            rows.append((name, documents, *bits))
    if not rows:
        return

    guessing = ""
    tokenizer = run.stages.get("tok_train", {})
    if {"vocab_size", "bytes_per_token"} <= tokenizer.keys():
        bits = math.log2(tokenizer["vocab_size"]) / tokenizer["bytes_per_token"]
        guessing = f" Guessing every token at random costs {bits:.2f}."
    yield ("heading", "Validation bits per byte")
    columns = ["stage", "validation documents", "bits per byte", "a bound on them"]
    if not any(bound for *_, bound in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    yield ("table", columns, rows)
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
# the blocks as Markdown

def _escape_markdown(text):
    return re.sub(r"([\\`*<|\[])", r"\\\1", str(text)).replace("\n", " ")


def _markdown_table(header, rows):
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([_escape_markdown(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_samples(prompt, texts):
    """Indented code: no markup that a model writes has an effect inside it."""
    parts = [f"**{_escape_markdown(prompt)}**"]
    for when, text in texts:
        parts.append(f"{when}:")
        parts.append("\n".join("    " + line for line in text.split("\n")))
    return "\n\n".join(parts)


MARKDOWN = {
    "heading": lambda text: f"## {text}",
    "text": _escape_markdown,
    "table": _markdown_table,
    "picture": lambda name, alt: f"![{alt}]({name})",
    "tiles": lambda tiles: _markdown_table(["", ""], tiles),
    "samples": _markdown_samples,
}


def to_markdown(title, contents):
    """A Markdown document of a list of blocks."""
    parts = [f"# {title}"]
    for kind, *rest in contents:
        parts.append(MARKDOWN[kind](*rest))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------
# the blocks as HTML

CSS = """
:root { color-scheme: light; --ink: #20262e; --soft: #66707c; --line: #e3e7ec; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.02em; }
.when { color: var(--soft); margin: 6px 0 24px; }
h2 { font-size: 19px; margin: 44px 0 12px; letter-spacing: -.01em; }
p { margin: 12px 0; max-width: 72ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.tile, .table, figure, .sample { background: #fff; border: 1px solid var(--line);
                                 border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; letter-spacing: -.02em;
          white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.table { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 16px; border-top: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tr:first-child > * { border-top: 0; }
td:first-child { font-weight: 550; white-space: nowrap; }
figure { margin: 12px 0; padding: 14px; }
img { display: block; width: 100%; height: auto; }
.sample { padding: 14px 16px; margin: 12px 0; }
.sample b { font-weight: 600; }
.sample dl { margin: 8px 0 0; display: grid; grid-template-columns: 150px 1fr; gap: 6px 16px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; min-width: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
     white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 24px 14px; }
  th, td { padding: 7px 10px; }
  .sample dl { grid-template-columns: 1fr; gap: 2px; }
  dd { margin-bottom: 8px; }
}
""".strip()


def _escape_html(text):
    return html.escape(str(text))


def _html_cells(tag, cells):
    """A line of a table; tag: th or td."""
    return "<tr>" + "".join(f"<{tag}>{_escape_html(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_table(header, rows):
    head = _html_cells("th", header) if any(header) else ""
    body = "".join(_html_cells("td", row) for row in rows)
    return f"<div class=table><table>{head}{body}</table></div>"


def _html_picture(folder, name, alt):
    data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{_escape_html(alt)}" src="{source}"></figure>'


def _html_tiles(tiles):
    parts = []
    for label, value in tiles:
        value, label = _escape_html(value), _escape_html(label)
        parts.append(f"<div class=tile><b>{value}</b><span>{label}</span></div>")
    return f"<div class=tiles>{''.join(parts)}</div>"


def _html_samples(prompt, texts):
    parts = []
    for when, text in texts:
        parts.append(f"<dt>{_escape_html(when)}</dt><dd>{_escape_html(text)}</dd>")
    return f"<div class=sample><b>{_escape_html(prompt)}</b><dl>{''.join(parts)}</dl></div>"


HTML = {
    "heading": lambda text: f"<h2>{_escape_html(text)}</h2>",
    "text": lambda text: f"<p>{_escape_html(text)}</p>",
    "table": _html_table,
    "picture": _html_picture,  # takes the folder of the pictures first
    "tiles": _html_tiles,
    "samples": _html_samples,
}


def to_html(title, when, contents, folder):
    """One self-contained page of a list of blocks: the pictures, read from `folder`, are inside."""
    draw = {**HTML, "picture": functools.partial(_html_picture, folder)}
    body = "\n".join(draw[kind](*rest) for kind, *rest in contents)
    title, when = _escape_html(title), _escape_html(when)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>\n{CSS}\n</style></head>\n"
            f"<body><main><h1>{title}</h1><p class=when>{when}</p>\n"
            f"{body}\n</main></body></html>\n")


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
    """The record of a whole speedrun, whose accuracies have fixed names: None where one is
    missing."""
    accuracy = stages.get("chat_eval", {}).get("accuracy", {})
    finish_stage(
        "speedrun",
        total,
        settings,
        val_bpb=stages.get("base_train", {}).get("val_bpb"),
        accuracy={task: accuracy.get(task) for task in SPEEDRUN_TASKS},
        report=str(path),
    )


def main():
    settings = configure(globals())
    start = time.time()
    stages, total, path = write_report(get_base_dir(), seconds)
    if speedrun:
        print(own_text_words(stages) or f"What it can do, and how well: {path}", flush=True)
        finish_speedrun(stages, total, settings, path)
    else:
        finish_stage("report", time.time() - start, settings, report=str(path))


if __name__ == "__main__":
    main()
