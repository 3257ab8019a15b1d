"""Time to quality: what a pretraining run reached, in which time and on what, as one line.

    python -m nanochat.report --card

The line is for dev/LEADERBOARD.md. Lines compare where their protocol is the same: it names the
validation text itself (loss_eval.protocol_id), so that no figure stands beside one of other text.
"""
import time

from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.document import MARKDOWN
from nanochat.metrics import finish_stage
from nanochat.records import last_run, read_jsonl

HEADER = [
    "minutes",
    "machine",
    "bits per byte",
    "protocol",
    "on unseen sources",
    "protocol there",
    "commit",
]


def machine_class(record):
    """The kind of machine that a training stage ran on, as words: devices, instructions, dtype.

    >>> machine = {"cpu": "AMD EPYC", "cores": 2, "isa": "AVX512-bf16", "gpus": []}
    >>> machine_class({"machine": machine, "dtype": "bfloat16"})
    '2 cores of AMD EPYC (AVX512-bf16), bfloat16'
    """
    machine = record["machine"]
    dtype = record.get("dtype", "unknown dtype")
    if record.get("device") == "cuda" and machine.get("gpus"):
        return f"{record.get('ranks', 1)} x {machine['gpus'][0]}, {dtype}"
    cores = machine.get("cores")
    words = f"{cores} core{'' if cores == 1 else 's'} of {machine.get('cpu')}"
    if machine.get("isa"):
        words += f" ({machine['isa']})"
    return f"{words}, {dtype}"


def card_of(record):
    """The fields of the card, from base_train's record. UserError where it lacks one."""
    if record.get("val_bpb_bound"):
        raise UserError("the last run of base_train has a bound on bits per byte and not the "
                        "figure itself: a card of a diffusion model would compare with no other")
    missing = [key for key in ("val_bpb", "train_seconds", "protocol") if not record.get(key)]
    if missing:
        raise UserError(
            f"the last run of base_train recorded no {' and no '.join(missing)}, which is of an "
            "earlier version or an unfinished run: train again, to the end")
    unseen = record.get("unseen") or {}
    return {
        "minutes": round(record["train_seconds"] / 60, 2),
        "machine_class": machine_class(record),
        "bpb": record["val_bpb"],
        "bpb_without_counts": record.get("val_bpb_without_counts"),
        "protocol": record["protocol"],
        "unseen_bpb": unseen.get("val_bpb"),
        "unseen_bpb_without_counts": unseen.get("val_bpb_without_counts"),
        "unseen_protocol": unseen.get("protocol"),
        "commit": record.get("commit") or "unknown",
    }


def bits_cell(bits, without_counts):
    """Bits per byte as a cell of a table.

    >>> bits_cell(1.05153, 1.12), bits_cell(None, None)
    ('**1.0515** (1.1200 without counts)', '')
    """
    if bits is None:
        return ""
    also = f" ({without_counts:.4f} without counts)" if without_counts is not None else ""
    return f"**{bits:.4f}**{also}"


def card_line(fields):
    """The card as a row of a Markdown table, whose columns are HEADER."""
    cells = (
        f"{fields['minutes']:.2f}",
        fields["machine_class"],
        bits_cell(fields["bpb"], fields["bpb_without_counts"]),
        fields["protocol"],
        bits_cell(fields["unseen_bpb"], fields["unseen_bpb_without_counts"]),
        fields["unseen_protocol"] or "",
        fields["commit"],
    )
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def run(settings):
    """Write card.md into the base directory, and print it and the JSON line."""
    start = time.time()
    base = get_base_dir()
    record = last_run(read_jsonl(base / "metrics.jsonl")).get("base_train")
    if record is None:
        raise UserError(f"{base} has no finished run of base_train: "
                        "train one, or point NANOCHAT_BASE_DIR at it")
    fields = card_of(record)
    line = card_line(fields)
    atomic_write(base / "card.md", MARKDOWN["table"](HEADER, []) + "\n" + line + "\n")
    print(line, flush=True)
    finish_stage("card", time.time() - start, settings, **{**fields, "of": record["checkpoint"]})
