"""The report card of a run: report.md, report.html (one self-contained file) and their plots, from metrics.jsonl.

    python -m nanochat.report                            # in $NANOCHAT_BASE_DIR
    python -m nanochat.report --speedrun --seconds=900   # the same, ending with the record of a whole speedrun

Every stage left one JSON line in metrics.jsonl, every training stage a log.jsonl beside its checkpoint. Nothing is
measured or computed anew here, and what a run did not do is left out, so the report of half a run works as well.

The report is a list of blocks, tuples whose first item is the kind; to_markdown() and to_html() each draw every kind:

    ("heading", text)  ("text", text)  ("table", header, rows)  ("picture", file name, what it shows)
    ("tiles", [(label, value), ...])   ("samples", prompt, [(when, continuation), ...])
"""
import base64
import html
import json
import math
import re
import time
from pathlib import Path

from nanochat.common import UserError, atomic_file, atomic_write, get_base_dir
from nanochat.metrics import finish_stage
from nanochat.configurator import configure

speedrun = False            # end with the record of a whole speedrun in place of this stage's own
seconds: float = None       # wall clock of that speedrun; None: the sum over its stages

TRAINING = tuple("base_train mid_train chat_sft chat_rl".split())
SPEEDRUN_TASKS = tuple("arithmetic spelling pydoc identity".split())
# What nobody measured: watts and rent in dollars an hour, for each core of a CPU or each GPU, and dollars per kWh.
WATTS = dict(core=15, gpu=1000)
RENT = dict(core=0.05, gpu=3.0)
DOLLARS_PER_KWH = float("0.30")


# ---------------------------------------------------------------------------------------------------------------------
# what the stages left

def read_jsonl(path):
    """The objects of a jsonl file, [] where there is none. A line cut short by a crash is passed over."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def last_run(rows):
    """{stage: record}: the last record of every stage since the run began, in the order in which the stages ended."""
    begins = [i for i, row in enumerate(rows) if row.get("stage") == "start"]
    stages = {}
    for row in rows[begins[-1] + 1 if begins else 0:]:
        stages.pop(row["stage"], None)
        stages[row["stage"]] = row
    return {name: row for name, row in stages.items() if name not in ("report", "speedrun")}


def training_log(row):
    """The rows of a training stage's log.jsonl. After a resume, the steps that were done again count once."""
    rows = []
    for entry in read_jsonl(Path(row.get("checkpoint") or ".") / "log.jsonl"):
        if rows and rows[-1]["step"] > entry["step"]:
            rows = [row for row in rows if row["step"] < entry["step"]]
        rows.append(entry)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# numbers as people read them

def si(number, unit=""):
    """1234567 -> '1.23 M', 3.1e11 with FLOP/s -> '310 GFLOP/s'; None -> 'unknown'."""
    if number is None:
        return "unknown"
    power = min(5, max(0, int(math.log10(abs(number)) // 3))) if number else 0
    return f"{number / 1000**power:.3g} {' KMGTP'[power].strip().replace('K', 'k')}{unit}".strip()


def duration(number):
    """65 -> '1 min 5 s', 7500 -> '2 h 5 min'."""
    number = round(number)
    if number < 60:
        return f"{number} s"
    return f"{number // 60} min {number % 60} s" if number < 3600 else f"{number // 3600} h {number % 3600 // 60} min"


def percent(fraction):
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


def interval(fraction, items):
    """Wilson's 95 % interval for `fraction` right of `items`, as '96.2 to 99.4 %': honest near 0 and 1, too."""
    if not items:
        return "unknown"
    z, f, n = 1.96, fraction, items
    centre = (f + z * z / 2 / n) / (1 + z * z / n)
    width = z / (1 + z * z / n) * math.sqrt(f * (1 - f) / n + z * z / 4 / n / n)
    return f"{100 * max(0, centre - width):.1f} to {100 * min(1, centre + width):.1f} %"


def matmul_share(row):
    """Achieved share of the measured matmul rate, None where one of the two is not known."""
    flops, peak = row.get("flops_per_second"), row.get("matmul_flops_per_second")
    return flops / peak if flops and peak else None


# ---------------------------------------------------------------------------------------------------------------------
# plots

BLUE, RED, AMBER, GREY, INK = "#2b6cb0 #c0392b #c9821b #b8bec6 #333a44".split()


def _figure(width, height, rows=1, columns=1):
    """A figure and its axes as a list of lists. Not by pyplot, which keeps global state and may look for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8, color=GREY)
        axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, grid.tolist()


def smooth(values):
    """Mean over a window around each value: unlike a running average it does not lag behind."""
    half = len(values) // 60
    return [sum(window) / len(window) for i in range(len(values)) for window in [values[max(0, i - half):i + half + 1]]]


def plot_training(stages):
    """Loss over learning rate, a column for each training stage; validation bits per byte as points on the right."""
    logs = {name: training_log(stages[name]) for name in TRAINING if name in stages}
    logs = {name: log for name, log in logs.items() if any("loss" in row for row in log)}
    if not logs:
        return None
    figure, (losses, rates) = _figure(3.1 * max(2, len(logs)), 4.4, rows=2, columns=len(logs))
    for name, log, loss_axes, rate_axes in zip(logs, logs.values(), losses, rates):
        rows = [row for row in log if "loss" in row]
        steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
        loss_axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        loss_axes.plot(steps, smooth(values), color=BLUE, linewidth=1.6)
        loss_axes.set_title(name, fontsize=10, color=INK, loc="left", fontweight="bold")
        loss_axes.set_ylabel("loss (nats per token)", fontsize=8, color=BLUE)
        measured = [(row["step"], row["val_bpb"]) for row in log if row.get("val_bpb") is not None]
        if measured:
            right = loss_axes.twinx()
            right.plot(*zip(*measured), color=RED, marker="o", markersize=3.5, linewidth=0.8)
            loss_axes.set_title(f"{measured[-1][1]:.3f} bpb", fontsize=9, color=RED, loc="right")
            right.set_ylabel("validation bits per byte", fontsize=8, color=RED)
            right.tick_params(colors=INK, labelsize=8, color=GREY)
            right.spines[:].set_visible(False)
        rate_axes.plot(steps, [row["lr"] for row in rows], color=AMBER, linewidth=1.6)
        rate_axes.set_ylim(bottom=0)
        rate_axes.set_ylabel("learning rate", fontsize=8, color=AMBER)
        rate_axes.set_xlabel("step", fontsize=8, color=INK)
    return figure


def _label(axes, x, y, text):
    """Text just behind the end of a bar."""
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(5, 0), va="center", fontsize=8, color=INK)


def plot_accuracy(row):
    """A bar for each task, its chance level as a tick across the bar."""
    accuracy = row.get("accuracy")
    if not accuracy:
        return None
    figure, [[axes]] = _figure(7.2, 0.8 + 0.42 * len(accuracy))
    for y, (task, fraction) in enumerate(accuracy.items()):
        axes.barh(y, 100 * fraction, color=BLUE, height=0.55)
        chance = 100 * row.get("chance", {}).get(task, 0)
        axes.plot([chance, chance], [y - 0.38, y + 0.38], color=RED, linewidth=2, label="chance" if y == 0 else None)
        _label(axes, 100 * fraction, y, f"{100 * fraction:.1f}")
    axes.set_yticks(range(len(accuracy)), accuracy, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e9ed", linewidth=0.8)
    axes.set_xlabel("per cent right of held-out items", fontsize=8, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def plot_times(stages):
    """How the time was spent, stage by stage."""
    figure, [[axes]] = _figure(7.2, 0.7 + 0.28 * len(stages))
    axes.barh(range(len(stages)), [row["seconds"] for row in stages.values()], height=0.6,
              color=[BLUE if name in TRAINING else GREY for name in stages])
    for y, row in enumerate(stages.values()):
        _label(axes, row["seconds"], y, duration(row["seconds"]))
    axes.set_yticks(range(len(stages)), stages, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds (training in blue)", fontsize=8, color=INK)
    axes.grid(axis="y", visible=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# what the report says

def cost(machine, hours):
    """[(what, cost, assumption)] of a run of `hours` on `machine`."""
    gpus = len(machine.get("gpus") or [])
    kind, count = ("gpu", gpus) if gpus else ("core", machine.get("cores") or 1)
    parts = f"{count} {'GPU' if gpus else 'CPU core'}{'s' if count > 1 else ''}"
    energy = WATTS[kind] * count * hours / 1000
    return [
        ("electricity", f"${energy * DOLLARS_PER_KWH:.3f}",
         f"{parts} at {WATTS[kind]} W each with all around them: {energy:.3f} kWh at ${DOLLARS_PER_KWH:.2f}"),
        ("a rented machine", f"${RENT[kind] * count * hours:.3f}", f"{parts} at ${RENT[kind]:.2f} an hour each"),
    ]


def honest_words(stages):
    """What a model of this size is and is not: a paragraph, with this run's own numbers."""
    base = stages.get("base_train") or next((stages[name] for name in TRAINING if name in stages), {})
    parameters, tokens = base.get("parameters"), base.get("tokens")
    if not parameters or not tokens:
        return "Without a trained model there is nothing to be honest about yet."
    text = tokens * stages.get("tok_train", {}).get("bytes_per_token", 0)
    size = f"{si(parameters)} parameters, pretrained on {si(tokens)} tokens"
    size += f" ({si(text, 'B')} of text)" if text else ""
    if parameters >= 1e8:
        return (f"This model has {size}. That is the class of GPT-2 (2019; 124 M to 1.5 G parameters): fluent, often "
                "wrong. Today's assistants are hundreds of times larger and have read thousands of times more. Do not "
                "take its facts on trust.")
    return (f"This model has {size}. The smallest GPT-2 of 2019 had 124 M parameters; today's assistants have "
            "thousands of times more than that and have read far more text still. What it learned is the look of the text "
            "it was trained on and a few rehearsed skills, those in the table of accuracies. It does not reason and it knows "
            "next to nothing: outside those skills its answers are fluent guesses, most of them false, and it cannot "
            "tell which. The accuracies are of held-out items of the same making as the training items, so they show "
            "that a skill carries over to new words, numbers or names, not that it carries over to other questions. "
            "And to choose among four answers is far easier than to give one.")


def machine_block(machine):
    names = {"cpu": "CPU", "isa": "matrix instructions", "memory_gb": "memory (GiB)", "gpus": "GPUs"}
    rows = [(names.get(key, key), ", ".join(value) if isinstance(value, list) else value)
            for key, value in machine.items() if value]
    return ("table", ["", ""], rows)


def side_by_side(stages, field):
    """A table of the dicts `row[field]` of all stages that have one: a row for each key, a column for each stage."""
    columns = {name: row[field] for name, row in stages.items() if row.get(field)}
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    if not keys:
        return []
    rows = [(key, *("" if key not in values else str(values[key]) for values in columns.values())) for key in keys]
    return [("table", ["", *columns], rows)]


def training_blocks(training):
    rows = [(name, si(row.get("steps")), si(row.get("tokens")), duration(row["seconds"]),
             si(row.get("tokens_per_second")), si(row.get("flops_per_second"), "FLOP/s"), percent(matmul_share(row)))
            for name, row in training.items()]
    yield ("table", ["stage", "steps", "tokens", "time", "tokens/s", "achieved", "of the matmul rate"], rows)
    rates = {row.get("matmul_flops_per_second") for row in training.values()} - {None}
    measured = f" ({' and '.join(si(rate, 'FLOP/s') for rate in sorted(rates))} here)" if rates else ""
    yield ("text", "Tokens per second are the median over steady steps: compilation and the first steps are left out. "
                   f"The matmul rate is what one large matrix product reached on this machine{measured}, not a peak "
                   "from a data sheet.")


def sample_blocks(training, at_most=4):
    """The same prompts as training went on: of every stage the first, the last and some samples between."""
    by_prompt = {}
    for name, row in training.items():
        entries = [entry for entry in training_log(row) if entry.get("samples")]
        count = min(at_most, len(entries))
        for i in range(count):
            entry = entries[round(i * (len(entries) - 1) / max(1, count - 1)) if count > 1 else -1]
            for sample in entry["samples"]:
                by_prompt.setdefault(sample["prompt"], []).append((f"{name}, step {entry['step']}", sample["text"]))
    if by_prompt:
        yield ("heading", "Samples")
        yield ("text", "The continuations of the same prompts as training went on.")
    for prompt, texts in by_prompt.items():
        yield ("samples", prompt, texts)


def blocks(stages, total, pictures):
    """All blocks of the report. total: seconds of the run. pictures: names of the plots that were made."""
    training = {name: stages[name] for name in TRAINING if name in stages}
    base, chat = stages.get("base_train", {}), stages.get("chat_eval", {})
    machine = next((row["machine"] for row in reversed(stages.values()) if row.get("machine")), {})
    tokenizer = stages.get("tok_train", {})

    def picture(name, alt):
        return [("picture", name, alt)] if name in pictures else []

    tiles = [("time in all", duration(total))]
    if base:
        tiles = [("parameters", si(base.get("parameters"))),
                 ("tokens read", si(sum(row.get("tokens") or 0 for row in training.values()))),
                 ("tokens per second", si(base.get("tokens_per_second"))), *tiles]
        if base.get("val_bpb") is not None:
            tiles.insert(0, ("bits per byte", f"{base['val_bpb']:.3f}"))
    yield ("tiles", tiles)
    yield ("heading", "What this model is")
    yield ("text", honest_words(stages))

    if chat.get("accuracy"):
        yield ("heading", "Accuracy")
        yield from picture("report_accuracy.png", "Accuracy of each task with its chance level")
        yield ("table", ["task", "right", "95 % interval", "chance", "items"],
               [(task, percent(fraction), interval(fraction, chat.get("items", {}).get(task)),
                 percent(chat.get("chance", {}).get(task)), str(chat.get("items", {}).get(task, "unknown")))
                for task, fraction in chat["accuracy"].items()])
        yield ("text", "Items that no training conversation asked, each answered once. Chance is what guessing would get; "
                       "where it is 0 %, the answer has to be produced and not chosen.")

    measured = [(name, f"{row['val_bpb']:.4f}") for name, row in stages.items() if row.get("val_bpb") is not None]
    if training:
        yield ("heading", "Training")
        yield from picture("report_loss.png", "Loss, validation bits per byte and learning rate of each training stage")
        yield from training_blocks(training)
    if measured:
        yield ("heading", "Validation bits per byte")
        yield ("table", ["stage", "bits per byte"], measured)
        guessing = (f" Guessing every token at random costs {math.log2(tokenizer['vocab_size']) / tokenizer['bytes_per_token']:.2f}."
                    if tokenizer and {"vocab_size", "bytes_per_token"} <= tokenizer.keys() else "")
        yield ("text", "Bits the model needs for each raw byte of validation text that it never trained on: lower is better, "
                       f"and runs with different tokenizers compare.{guessing}")
    if tokenizer:
        yield ("heading", "Tokenizer")
        bytes_per_token = tokenizer.get("bytes_per_token")
        average = f"; one token is {bytes_per_token:.2f} bytes of validation text on average" if bytes_per_token else ""
        yield ("text", f"Byte-level BPE with a vocabulary of {tokenizer.get('vocab_size', 'unknown size')}{average}.")
    yield from sample_blocks(training)

    yield ("heading", "Time")
    yield from picture("report_time.png", "Seconds spent in each stage")
    yield ("table", ["stage", "time"],
           [*((name, duration(row["seconds"])) for name, row in stages.items()), ("all", duration(total))])
    yield ("heading", "What it would have cost")
    yield ("table", ["", "cost", "assumption"], cost(machine, total / 3600))
    yield ("text", "These prices and watts are assumptions, not measurements: put in your own.")
    yield ("heading", "Machine")
    yield machine_block(machine)
    for title, field in (("Model", "config"), ("Settings", "settings")):
        if table := side_by_side(stages if field == "settings" else training, field):
            yield ("heading", title)
            yield from table


# ---------------------------------------------------------------------------------------------------------------------
# the two ways to draw the blocks

def _escape_markdown(text):
    return re.sub(r"([\\`*<|\[])", r"\\\1", str(text)).replace("\n", " ")


def to_markdown(title, contents):
    """Markdown of the blocks. Samples are indented code, inside which no markup of a model's making has an effect."""
    out = [f"# {title}"]
    for kind, *rest in contents:
        if kind == "heading":
            out.append(f"## {rest[0]}")
        elif kind == "text":
            out.append(_escape_markdown(rest[0]))
        elif kind == "picture":
            out.append(f"![{rest[1]}]({rest[0]})")
        elif kind == "samples":
            out.append(f"**{_escape_markdown(rest[0])}**")
            for when, text in rest[1]:
                out += [f"{when}:", "\n".join("    " + line for line in text.split("\n"))]
        else:
            header, rows = (("", ""), rest[0]) if kind == "tiles" else rest
            lines = [header, ["---"] * len(header), *([_escape_markdown(cell) for cell in row] for row in rows)]
            out.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(out) + "\n"


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
.tile, .table, figure, .sample { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; letter-spacing: -.02em; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.table { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 16px; border-top: 1px solid var(--line); vertical-align: top; }
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


def to_html(title, when, contents, folder):
    """One self-contained page: the pictures, read from `folder`, are inside it."""
    e = lambda text: html.escape(str(text))  # noqa: E731
    out = []
    for kind, *rest in contents:
        if kind == "heading":
            out.append(f"<h2>{e(rest[0])}</h2>")
        elif kind == "text":
            out.append(f"<p>{e(rest[0])}</p>")
        elif kind == "picture":
            data = base64.b64encode((folder / rest[0]).read_bytes()).decode("ascii")
            out.append(f'<figure><img alt="{e(rest[1])}" src="data:image/png;base64,{data}"></figure>')
        elif kind == "tiles":
            tiles = (f"<div class=tile><b>{e(value)}</b><span>{e(label)}</span></div>" for label, value in rest[0])
            out.append(f"<div class=tiles>{''.join(tiles)}</div>")
        elif kind == "samples":
            lines = "".join(f"<dt>{e(moment)}</dt><dd>{e(text)}</dd>" for moment, text in rest[1])
            out.append(f"<div class=sample><b>{e(rest[0])}</b><dl>{lines}</dl></div>")
        else:
            header, rows = rest
            head = "<tr>" + "".join(f"<th>{e(cell)}</th>" for cell in header) + "</tr>" if any(header) else ""
            body = "".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            out.append(f"<div class=table><table>{head}{body}</table></div>")
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{e(title)}</title><style>\n{CSS}\n</style></head>\n"
            f"<body><main><h1>{e(title)}</h1><p class=when>{e(when)}</p>\n"
            + "\n".join(out) + "\n</main></body></html>\n")


def write_report(base, total=None):
    """Write report.md, report.html and the plots into `base`. Returns (stages, total seconds, path of report.md).

    UserError where no stage has been finished yet.
    """
    stages = last_run(read_jsonl(base / "metrics.jsonl"))
    if not stages:
        raise UserError(f"{base} holds no finished stage: run one first, or point NANOCHAT_BASE_DIR at a run")
    total = sum(row["seconds"] for row in stages.values()) if total is None else total
    plots = {"report_loss.png": plot_training(stages),
             "report_accuracy.png": plot_accuracy(stages.get("chat_eval", {})),
             "report_time.png": plot_times(stages)}
    plots = {name: figure for name, figure in plots.items() if figure}
    for name, figure in plots.items():
        with atomic_file(base / name) as file:
            figure.savefig(file, format="png")
    contents = list(blocks(stages, total, plots))
    when = max(row.get("time", "") for row in stages.values()).replace("T", " ")
    title = "nanochat: the report card"
    atomic_write(base / "report.md", to_markdown(title, [("text", when), *contents]))
    atomic_write(base / "report.html", to_html(title, when, contents, base))
    return stages, total, base / "report.md"


def main():
    settings = configure(globals())
    start = time.time()
    stages, total, path = write_report(get_base_dir(), seconds)
    if not speedrun:
        finish_stage("report", time.time() - start, settings, report=str(path))
        return
    accuracy = stages.get("chat_eval", {}).get("accuracy", {})
    finish_stage("speedrun", total, settings, val_bpb=stages.get("base_train", {}).get("val_bpb"),
                 accuracy={task: accuracy.get(task) for task in SPEEDRUN_TASKS}, report=str(path))


if __name__ == "__main__":
    main()
