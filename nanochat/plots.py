"""The figures of reports, drawn by matplotlib.

Each function returns one, or None where a run has nothing to show for it.
"""
import itertools
import os

from nanochat.records import TRAINING, comparable, duration, measured_bpb, training_log

BLUE = "#2b6cb0"
RED = "#c0392b"
AMBER = "#c9821b"
GREY = "#b8bec6"
PALE = "#e6e9ed"
INK = "#333a44"


def new_figure(width, height, rows=1, columns=1):
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
    axes.plot(
        steps,
        losses,
        color=BLUE,
        alpha=0.25,
        linewidth=0.8,
    )
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=1.6)
    axes.set_title(stage, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_ylabel("loss (nats per token)", fontsize=8, color=BLUE)


def _draw_bits_per_byte(axes, log):
    """Validation bits per byte as points, on an axis of their own on the right."""
    measured = comparable(log)
    if not measured:
        return
    steps = [record["step"] for record in measured]
    bits = [measured_bpb(record) for record in measured]
    is_bound = measured[-1].get("val_bpb") is None
    right = axes.twinx()
    right.plot(
        steps,
        bits,
        color=RED,
        marker="o",
        markersize=3.5,
        linewidth=0.8,
    )
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
    figure, (upper, lower) = new_figure(width, 4.4, rows=2, columns=len(logs))
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
    figure, [[axes]] = new_figure(7.2, 0.8 + 0.42 * len(accuracy))
    for y, (task, fraction) in enumerate(accuracy.items()):
        axes.barh(y, 100 * fraction, color=BLUE, height=0.55)
        chance = 100 * record.get("chance", {}).get(task, 0)
        legend = "chance" if y == 0 else None
        axes.plot(
            [chance, chance],
            [y - 0.38, y + 0.38],
            color=RED,
            linewidth=2,
            label=legend,
        )
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
    figure, [[axes]] = new_figure(7.2, 2.8)
    for key, label, colour in (
        ("accuracy", "right", BLUE),
        ("pass_at_k", f"pass@{record['k']}", AMBER),
    ):
        rates = [100 * entry[key] for entry in log]
        axes.plot(
            steps,
            rates,
            color=colour,
            marker="o",
            markersize=3.5,
            label=label,
        )
    axes.set_ylim(0, 102)
    axes.set_ylabel("per cent of held-out questions", fontsize=8, color=INK)
    axes.set_xlabel("step", fontsize=8, color=INK)

    right = axes.twinx()
    rewards = [entry["held_out_reward"] for entry in log]
    right.plot(
        steps,
        rewards,
        color=RED,
        linewidth=0.8,
        linestyle="--",
        label="reward",
    )
    right.set_ylabel("mean reward", fontsize=8, color=RED)
    right.tick_params(colors=INK, labelsize=8, color=GREY)
    right.spines[:].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(handles=lines, fontsize=8, frameon=False, loc="lower right")
    return figure


def plot_times(stages):
    """A bar for each stage: its seconds."""
    figure, [[axes]] = new_figure(7.2, 0.7 + 0.28 * len(stages))
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


SIDE_COLOURS = (GREY, BLUE, RED, AMBER, INK)
COST_WORDS = {
    "seconds": "seconds of training",
    "flops": "FLOPs of training",
}


def _draw_course(axes, points, cost, **style):
    """The curve of a run. points: of Course (compare.py). cost: seconds or flops."""
    known = [point for point in points if getattr(point, cost)]
    axes.plot(
        [getattr(point, cost) for point in known],
        [point.value for point in known],
        linewidth=1.4,
        **style,
    )
    axes.set_xscale("log")
    axes.set_xlabel(COST_WORDS[cost], fontsize=8, color=INK)
    axes.tick_params(axis="x", which="both", labelsize=8)


def _draw_side(column, side, cost, colour):
    """The runs of a side: loss in the upper axes of a column, validations in the lower."""
    upper, lower = column
    label = ", ".join(course.name for course in side)
    for course in side:
        means = smooth([point.value for point in course.losses])
        losses = []
        for point, mean in zip(course.losses, means):
            losses.append(point._replace(value=mean))
        _draw_course(upper, losses, cost, color=colour, label=label)
        _draw_course(
            lower,
            course.validations,
            cost,
            color=colour,
            marker="o",
            markersize=3,
        )
        label = None    # a side has one line in the legend


def plot_comparison(sides):
    """Loss above, validation bits per byte below; against seconds on the left, FLOPs on the right.

    sides: lists of Course (compare.py), the baseline's, in grey, first.
    """
    figure, (upper, lower) = new_figure(9, 6, rows=2, columns=2)
    for column, cost in zip(zip(upper, lower), COST_WORDS):
        for side, colour in zip(sides, itertools.cycle(SIDE_COLOURS)):
            _draw_side(column, side, cost, colour)
    for axes in upper:
        axes.set_ylabel("loss (nats per token)", fontsize=8, color=INK)
    for axes in lower:
        axes.set_ylabel("validation bits per byte", fontsize=8, color=INK)
    upper[0].legend(fontsize=8, frameon=False)
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
