"""What the stages of a run left, read back: metrics.jsonl, the logs, and their numbers as people
read them.

nanochat/metrics.py wrote them. A file that is being written, or that a crash cut short, is read as
far as it is whole.
"""
import json
import math
from collections import Counter
from pathlib import Path

from nanochat.metrics import wilson_interval

TRAINING = ("base_train", "mid_train", "chat_sft", "chat_rl")
NOT_OF_A_RUN = ("report", "speedrun", "compare", "card")  # records that only repeat others


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
    for name in NOT_OF_A_RUN:
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
