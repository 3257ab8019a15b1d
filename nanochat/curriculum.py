"""The stages of a run's sequence length: short sequences first, the whole context at the end.

Attention costs a token as much as there are tokens before it, so that early steps are cheaper in
short sequences (sequence length warm-up, arXiv 2108.06084). A stage is a share of the run's tokens,
a length, and a window of attention. Two things stay as they are in a run without stages:

1. The tokens. The loader yields (B, T) at the full context; reshaped() cuts the sequences of each
   batch into shorter ones. All stages have as many tokens in a step and in a pass, no target is
   left out, and the loader's state and the learning rate do not know of it.
2. The model that comes out. The last stage has the whole context and attends to all of it, and
   validation always does.

A length that does not divide the context (768 of 2048) is cut from sequences laid end to end, as
documents are: then a pass holds so many sequences that it can be divided (sequences_per_pass).

Shapes: B sequences of T tokens, the context; b sequences of t tokens, those of a stage.
"""
import math
from typing import NamedTuple

import torch

from nanochat.common import UserError

# What is one to the plan, and to a step of a resumed run, may differ in the last digits.
ROUNDING = 1e-9


class Stage(NamedTuple):
    """A row of the table."""
    share: float         # of the run's tokens; of its time where the budget is minutes
    length: int          # tokens of a sequence
    window: int = None   # a token attends to so many up to itself; None: to all before it

    @property
    def attended(self):
        """The length whose full causal attention costs as much: twice the mean number of keys."""
        window = min(self.window or self.length, self.length)
        return round(2 * window - window**2 / self.length)

    def describe(self):
        """Such as "25 % in sequences of 128 tokens"."""
        words = f"{100 * self.share:.3g} % in sequences of {self.length} tokens"
        return words + (f", attending to {self.window}" if self.window else "")


# Eight tokens teach little but frequent phrases: 1 % of the run. What the rows that are shorter
# than the context leave goes to a last stage of the whole context: 35 % of 2048, 20 % of 4096.
TEN_STAGES = (
    Stage(0.01, 8),
    Stage(0.01, 16),
    Stage(0.02, 32),
    Stage(0.03, 64),
    Stage(0.05, 128),
    Stage(0.08, 256),
    Stage(0.12, 512),
    Stage(0.15, 768),
    Stage(0.18, 1536),
    Stage(0.15, 2048),
)
PRESETS = {
    "ten_stage": lambda context: [stage for stage in TEN_STAGES if stage.length < context],
    "three_stage": lambda context: [Stage(0.25, context // 4), Stage(0.25, context // 2)],
}


# ------------------------------------------------------------------------------------------------
# reading the setting

def read_curriculum(setting, context):
    """The Stages of a run with a context of so many tokens: a tuple, one stage without a setting.

    setting: None, a name of PRESETS, or a table: rows of SHARE LENGTH [WINDOW], each on a line of
    its own or behind a semicolon. UserError for a table that cannot be trained.

    >>> read_curriculum("0.25 64; 0.75 256", 256)
    (Stage(share=0.25, length=64, window=None), Stage(share=0.75, length=256, window=None))
    """
    if setting is None:
        return (Stage(1.0, context),)
    if setting in PRESETS:
        stages = PRESETS[setting](context)
        rest = 1 - math.fsum(stage.share for stage in stages)
        stages = (*stages, Stage(round(rest, 9), context))
    else:
        rows = [row.split() for row in setting.replace(";", "\n").split("\n")]
        stages = tuple(read_row(row) for row in rows if row)
    check(stages, context)
    return stages


def read_row(words):
    """The Stage of a row's words. UserError where they are none."""
    try:
        share, length, *window = words
        [window] = window or [None]
        return Stage(float(share), int(length), window and int(window))
    except ValueError:
        pass
    raise UserError(
        f"curriculum: '{' '.join(words)}' is neither a row of SHARE LENGTH [WINDOW], such as "
        f"'0.25 128', nor one of {', '.join(PRESETS)}")


def check(stages, context):
    """UserError where a table cannot be trained in a context of so many tokens."""
    for stage in stages:
        words = f"curriculum: stage '{stage.share:g} {stage.length}'"
        if not 0 < stage.share <= 1:
            raise UserError(f"{words}: the share of the tokens must be above 0 and at most 1")
        if stage.length < 1:
            raise UserError(f"{words}: a sequence has at least 1 token")
        if stage.length > context:
            raise UserError(
                f"{words} is longer than the context of {context}: raise --max_seq_len, or leave "
                "the stage out")
        if stage.window is not None and not 1 <= stage.window <= stage.length:
            raise UserError(
                f"{words}: a window of {stage.window} must be from 1 to the {stage.length} tokens "
                "of a sequence")
    total = math.fsum(stage.share for stage in stages)
    if not stages:
        raise UserError(f"curriculum is empty: give rows, or one of {', '.join(PRESETS)}")
    if abs(total - 1) > 1e-6:
        raise UserError(f"curriculum: the shares of its stages add up to {total:g}, not to 1")
    last = stages[-1]
    if last.length < context or (last.window or context) < context:
        raise UserError(
            f"curriculum: its last stage must have sequences of the whole context of {context} "
            "without a window, as the model is evaluated and used: add such a row, or give "
            f"--max_seq_len={last.length}")


def curriculum_to_resume(given, meta):
    """The --curriculum of a run that is resumed or extended: its own.

    given: what the command says, or None. meta: of the checkpoint. UserError for another.
    """
    own = meta.get("settings", {}).get("curriculum")
    context = meta["config"]["max_seq_len"]
    if given is None:
        return own
    if read_curriculum(given, context) == read_curriculum(own, context):
        return own
    raise UserError(
        f"the run to resume has {own and 'another' or 'no'} curriculum: leave --curriculum out, or "
        "train another model without --resume")


# ------------------------------------------------------------------------------------------------
# batches and steps

def sequences_per_pass(stages, context):
    """Of how many sequences of the context a pass must have a multiple, so that all lengths divide
    its tokens. 1 where they divide the context.

    >>> sequences_per_pass([Stage(0.5, 768), Stage(0.5, 2048)], 2048)
    3
    """
    return math.lcm(context, *(stage.length for stage in stages)) // context


def stage_at(stages, progress):
    """The index of the stage at a progress from 0 to 1: a stage begins where those before it end.

    A run of N steps is at the progress s / N before step s + 1.
    """
    end = 0.0
    for index, stage in enumerate(stages[:-1]):
        end += stage.share
        if progress + ROUNDING < end:
            return index
    return len(stages) - 1


def sequences_of(pass_tokens, length):
    """How many sequences of a length a pass of so many tokens has.

    At least one: a pass may have been made smaller, where memory ran out, than a later sequence is.
    """
    return max(1, pass_tokens // length)


def reshaped(batch, length):
    """The tensors (B, T) of a loader's batch -> (b, length) each, with the same tokens.

    Each sequence is cut into pieces; the target of a piece's last token is the first token of the
    next piece. The loader's state is left out.
    """
    return [part.reshape(-1, length) for part in batch if isinstance(part, torch.Tensor)]


def mean_over_tokens(stages, function):
    """The mean of function(stage) over the tokens of a run."""
    return math.fsum(stage.share * function(stage) for stage in stages)


def with_stage(begun, index, step, seconds):
    """Where the stages of a run began, with one that begins now: lists [index, step, seconds].

    begun: what was returned before, or []. A run that was rolled back is in an earlier stage again;
    what came later has not been.
    """
    rows = [row for row in begun if row[0] <= index]
    if not rows or rows[-1][0] < index:
        rows.append([index, step, seconds])
    return rows


def stage_records(stages, begun, steps, seconds, total_batch_size):
    """A dict for each stage that a run had, for its record: length, window, steps, tokens, seconds.

    begun: of with_stage(). steps, seconds: of training, at the end. total_batch_size: tokens of a
    step. [] for a run without a curriculum.
    """
    if len(stages) == 1:
        return []
    records = []
    ends = [*begun[1:], [None, steps, seconds]]
    for (index, step, began), (_, end, ended) in zip(begun, ends):
        stage = stages[index]
        records.append({
            "stage": index + 1,
            "length": stage.length,
            "window": stage.window,
            "steps": end - step,
            "tokens": (end - step) * total_batch_size,
            "seconds": ended - began,
        })
    return records


def describe(stages, steps):
    """Lines for the plan: the stages, and which of them are less than one of so many steps."""
    if len(stages) == 1:
        return []
    lines = [f"9) curriculum: {len(stages)} stages"]
    for number, stage in enumerate(stages, start=1):
        line = f"   stage {number}: {stage.describe()}"
        if stage.share * steps < 1:
            line += f" (warning: less than one of {steps:,.0f} steps)"
        lines.append(line)
    return lines
