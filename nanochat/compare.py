"""Runs beside each other: curves against seconds and against FLOPs, and the compute multiplier.

    python -m nanochat.report --compare d4 d4-2          # the baseline first
    python -m nanochat.report --compare a42,a1 b42,b1    # the runs of each side, in pairs

The compute multiplier of a variant is what the baseline spends until it reaches the variant's final
bits per byte, divided by what the variant spent: above 1 the variant is cheaper. What the baseline
spends is read off its own validations, by a line through the two next to that figure in log cost
and log bits per byte. Where the baseline never came so far, or was there before its first
validation, the answer is '?' and no extrapolation.

So a variant that is better than the baseline needs a baseline that trained for longer, or shows
'?'. And the multiplier is a little too high: before its decay phase the baseline is above what a
shorter run, whose learning rate had decayed by then, would have reached for the same cost. Compare
variants with each other against one baseline, and trust differences more than the figure.
"""
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, atomic_file, atomic_write, get_base_dir
from nanochat.document import to_html, to_markdown
from nanochat.folders import checkpoint_dir
from nanochat.metrics import finish_stage
from nanochat.plots import plot_comparison
from nanochat.records import comparable, duration, measured_bpb, read_jsonl, si, training_log

TITLE = "nanochat: runs compared"
COSTS = ("seconds", "flops")


class Point(NamedTuple):
    """A number of a run's log, and what the run had cost until then."""
    seconds: float
    flops: float    # None where the log does not tell
    value: float


class Course(NamedTuple):
    """The course of one run."""
    name: str
    losses: list        # of Point: nats per token of each step
    validations: list   # of Point: bits per byte, all of the same documents
    documents: int      # how many
    is_bound: bool      # whether these are bounds, as a diffusion model has them
    record: dict        # of the stage in metrics.jsonl; {} where there is none

    @property
    def final(self):
        """The Point of the last validation."""
        return self.validations[-1]


# --------------------------------------------------------------------------------------------------
# reading

def folder_of(name):
    """The folder of a run: a path, or the tag of a base model. UserError where there is no log."""
    for folder in (Path(name), checkpoint_dir("base", "") / name):
        if (folder / "log.jsonl").is_file():
            return folder
    raise UserError(
        f"there is no run '{name}': name a base model's tag, as python -m scripts.checkpoints "
        "lists them, or the folder that holds a run's log.jsonl")


def record_of(folder):
    """The last record in metrics.jsonl of the stage that trained into `folder`, or {}."""
    for base in (folder.absolute().parent.parent, get_base_dir()):
        for record in reversed(read_jsonl(base / "metrics.jsonl")):
            checkpoint = record.get("checkpoint")
            if checkpoint and Path(checkpoint).absolute() == folder.absolute():
                return record
    return {}


def with_flops(log):
    """[(record, FLOPs until then)] of a log. The FLOPs are None from where a step does not tell
    them, as in logs of earlier versions."""
    flops, tokens, rows = 0, 0, []
    for record in log:
        if "loss" in record:
            per_token = record.get("flops_per_token")
            is_known = flops is not None and per_token is not None
            flops = flops + (record["tokens"] - tokens) * per_token if is_known else None
            tokens = record["tokens"]
        rows.append((record, flops))
    return rows


def read_run(name):
    """The Course of a run. UserError where it has no validation that cost anything."""
    folder = folder_of(name)
    log = training_log({"checkpoint": str(folder)})
    validated = [id(record) for record in comparable(log)]
    losses, validations, documents, is_bound = [], [], None, False
    for record, flops in with_flops(log):
        if "loss" in record:
            losses.append(Point(record["seconds"], flops, record["loss"]))
        elif id(record) in validated and record.get("seconds"):
            validations.append(Point(record["seconds"], flops, measured_bpb(record)))
            documents = record.get("documents")
            is_bound = record.get("val_bpb") is None
    if not validations:
        raise UserError(f"the run '{name}' has no validation in its log: "
                        "train it with --eval_every=N, or to its end")
    return Course(name, losses, validations, documents, is_bound, record_of(folder))


def read_sides(names):
    """[[Course, ...], ...]: the runs of each side. names: words like 'a42,a1', the baseline first.

    UserError where the sides cannot be paired, or their bits per byte not be compared.
    """
    if len(names) < 2:
        raise UserError("--compare takes two runs or more, the baseline first: "
                        "python -m nanochat.report --compare BASELINE VARIANT")
    sides = [[read_run(name) for name in word.split(",") if name] for word in names]
    counts = [len(side) for side in sides]
    if len(set(counts)) > 1 or not counts[0]:
        raise UserError(f"the sides have {', '.join(map(str, counts))} runs: runs are compared in "
                        "pairs of the same seed, so name as many of each side")
    check_documents([course for side in sides for course in side])
    return sides


def check_documents(courses):
    """UserError where two runs were validated on different text."""
    first = courses[0]
    for other in courses[1:]:
        if other.documents != first.documents:
            raise UserError(
                f"'{first.name}' was validated on {first.documents} documents and '{other.name}' "
                f"on {other.documents}: only figures of the same text compare; train both alike")
        if other.is_bound != first.is_bound:
            raise UserError(
                f"of '{first.name}' and '{other.name}' one has bits per byte and the other a "
                "bound on them, as a diffusion model has: these do not compare")
        protocols = {course.record.get("protocol") for course in (first, other)} - {None}
        if len(protocols) > 1:
            raise UserError(
                f"'{first.name}' and '{other.name}' were validated on different text "
                f"({' and '.join(sorted(protocols))}): train both with the same --data")


def is_same_machine(courses):
    """Whether all runs whose machine is known were of one kind, so that their seconds compare."""
    machines = [course.record["machine"] for course in courses if course.record.get("machine")]
    kinds = {(str(m.get("cpu")), m.get("cores"), str(m.get("gpus"))) for m in machines}
    return len(kinds) <= 1


# --------------------------------------------------------------------------------------------------
# the compute multiplier

def cost_to_reach(validations, cost, target):
    """What a run had spent when it reached `target` bits per byte, None where that is unknown.

    validations: list of Point. cost: "seconds" or "flops". Between the last validation above the
    target and the first at or below it, log cost is linear in log bits per byte.

    >>> halved = [Point(10, None, 4.0), Point(1000, None, 1.0)]
    >>> round(cost_to_reach(halved, "seconds", 2.0))
    100
    """
    before = None
    for point in validations:
        spent = getattr(point, cost)
        if spent is None:
            return None
        if point.value == target:
            return spent
        if point.value < target:
            return _between(before, (spent, point.value), target)
        before = (spent, point.value)
    return None


def _between(before, after, target):
    if before is None:
        return None
    (cost_a, bits_a), (cost_b, bits_b) = before, after
    share = math.log(bits_a / target) / math.log(bits_a / bits_b)
    return cost_a * (cost_b / cost_a) ** share


def multiplier(baseline, variant, cost):
    """The compute multiplier of a variant's run, None where it would be extrapolated."""
    spent = getattr(variant.final, cost)
    reached = cost_to_reach(baseline.validations, cost, variant.final.value)
    if not spent or reached is None:
        return None
    return reached / spent


def mean_and_range(ratios):
    """{"mean", "lowest", "highest", "each"} of the multipliers of some pairs, rounded.

    The mean is the geometric one, for they are ratios. All are None where a pair has none: the
    mean of the others would be of the easy pairs.
    """
    each = [None if ratio is None else round(ratio, 4) for ratio in ratios]
    if None in ratios:
        return {"mean": None, "lowest": None, "highest": None, "each": each}
    mean = round(statistics.geometric_mean(ratios), 4)
    return {"mean": mean, "lowest": min(each), "highest": max(each), "each": each}


def compare_sides(sides):
    """One dict for each side: its runs and final figures; for a variant its multipliers, too."""
    seconds_compare = is_same_machine([course for side in sides for course in side])
    rows = []
    for side in sides:
        finals = [course.final for course in side]
        row = {
            "runs": [course.name for course in side],
            "bpb": [final.value for final in finals],
            "mean_bpb": statistics.mean(final.value for final in finals),
            "seconds": [final.seconds for final in finals],
            "flops": [final.flops for final in finals],
        }
        for cost in COSTS if side is not sides[0] else ():
            ratios = [multiplier(a, b, cost) for a, b in zip(sides[0], side)]
            if cost == "seconds" and not seconds_compare:
                ratios = [None] * len(side)
            row[f"multiplier_{cost}"] = mean_and_range(ratios)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# what is written

def multiplier_words(found):
    """'1.25', of several pairs '1.25 (1.10 to 1.41)', '?' where it is not known."""
    if found["mean"] is None:
        return "?"
    if len(found["each"]) == 1:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"


def range_words(values, show):
    """The mean of a side's figures, with their range where there are several."""
    if None in values:
        return "unknown"
    words = show(statistics.mean(values))
    if len(values) == 1:
        return words
    return f"{words} ({show(min(values))} to {show(max(values))})"


def comparison_blocks(sides, rows, has_picture):
    """The blocks (document.py) of a comparison."""
    table = []
    for row in rows:
        is_baseline = row is rows[0]
        table.append((
            ", ".join(row["runs"]),
            range_words(row["bpb"], "{:.4f}".format),
            range_words(row["seconds"], duration),
            range_words(row["flops"], lambda flops: si(flops, "FLOP")),
            *("1" if is_baseline else multiplier_words(row[f"multiplier_{c}"]) for c in COSTS),
        ))
    header = ["runs", "bits per byte", "training time", "FLOPs",
              "multiplier in seconds", "multiplier in FLOPs"]
    yield ("table", header, table)
    yield ("text", f"Of {sides[0][0].documents} validation documents. The multiplier is what the "
                   "baseline, in the first line, spent until it had the variant's bits per byte, "
                   "divided by what the variant spent; of several pairs the geometric mean and the "
                   "range. '?': the baseline was not seen there (train it for longer where the "
                   "variant is better), or that cost is not known.")
    if not is_same_machine([course for side in sides for course in side]):
        yield ("text", "The runs are of different machines, so their seconds do not compare.")
    if has_picture:
        yield ("picture", "compare.png", "Loss and validation bits per byte of all runs against "
                                         "seconds and against FLOPs")
        yield ("text", "The loss is of a token: with another tokenizer it is another scale.")


def run(names, settings):
    """Compare runs: compare.md, compare.html and compare.png in the base directory, the table on
    standard output, and the JSON line."""
    start = time.time()
    base = get_base_dir()
    sides = read_sides(names)
    rows = compare_sides(sides)
    figure = _figure_of(sides)
    if figure:
        with atomic_file(base / "compare.png") as file:
            figure.savefig(file, format="png")

    blocks = list(comparison_blocks(sides, rows, figure is not None))
    text = to_markdown(TITLE, blocks)
    atomic_write(base / "compare.md", text)
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    atomic_write(base / "compare.html", to_html(TITLE, when, blocks, base))
    print(text, flush=True)
    finish_stage("compare", time.time() - start, settings, sides=rows,
                 report=str(base / "compare.md"))


def _figure_of(sides):
    """The plot, None without matplotlib."""
    try:
        return plot_comparison(sides)
    except ImportError:
        return None
