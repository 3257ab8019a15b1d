"""What a budget and a machine buy: depth, context, batch, sequences per device, horizon, memory.

Everything is decided here, before the loop, by pure functions that return small named tuples, so
that tests reach every combination without a process. `Plan.describe()` gives the decisions as
numbered steps, each with its reason, and a training script prints them.

What a device holds and what ranks send is in memory.py; how fast a machine trains, forecast.py.
"""
import dataclasses
import functools
import math
import os
import time
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import NoInitialisers
from nanochat.common import UserError, all_reduce_max, choose_device_type
from nanochat.curriculum import (
    describe,
    mean_over_tokens,
    read_curriculum,
    sequences_per_pass,
)
from nanochat.forecast import Machine, expected_step, planned_share
from nanochat.hardware import device_kind, device_memory, host_memory
from nanochat.memory import (
    MEMORY_SHARE,
    PARALLEL,
    Memory,
    build_on_meta,
    memory,
    micro_batch_limit,
)
from nanochat.parallel import WIRE_DTYPES, round_up
from nanochat.variants import default_model
from nanochat.variants.lookup import LookupGPT, usual_hashed_rows

# Fields of a model's config that base_train has settings for; None: as the depth has them
SHAPE_SETTINGS = ("width", "heads", "kv_heads", "mlp_width", "tied", "rotary_base")
NEED_DEPTH = ("width", "heads", "mlp_width")
BUDGETS = ("minutes", "num_iterations", "target_flops", "target_param_data_ratio")
CPU_MINUTES = 5.0              # the budget without a CUDA device where none is given
GPU_PARAM_DATA_RATIO = 20.0    # tokens per matmul parameter on a GPU (Chinchilla, arXiv 2203.15556)
GPU_DEPTH, GPU_CONTEXT = 20, 2048
NGRAM_TOKENS = 32_000_000      # tokens whose n-grams a CPU counts
DOCUMENTED_VOCAB = 65536       # of the documented run at depth 20
# Tokens of a vocabulary where it is not known yet, by device; a slow CPU takes fewer (tok_train).
USUAL_VOCAB = {"cuda": DOCUMENTED_VOCAB, "mps": 4096, "cpu": 4096}
# What a run on GPUs may take where neither its depth nor a budget is given: a night. The documented
# depth of 20 takes eight H100 some 2 hours, and one card of 24 GB 3 days, which nobody expects.
GPU_HOURS = 12.0
GPU_DEPTHS = range(4, 33, 2)   # that are chosen from, up to GPU_DEPTH where no minutes are given
SIZES = {  # layers, width and heads of the documented sizes: in weights of layers those of GPT-2
    "small": (12, 768, 6),
    "medium": (18, 1152, 9),
    "large": (24, 1536, 12),
    "xl": (32, 2048, 16),
}


# ------------------------------------------------------------------------------------------------
# 1. the budget

class Budget(NamedTuple):
    """What limits a run: one of BUDGETS, and how much of it."""
    kind: str
    amount: float


def choose_budget(settings, device_type, resumed=None, factor=None):
    """The one budget of a run.

    settings: of the script; at most one of BUDGETS may be set. resumed: the {kind: amount} of the
    run that this one continues, or None; factor: by how much that is extended now, or None (an
    extended run that is resumed has been extended before).
    UserError for two budgets, for one that is not positive, and for extend with a budget.
    """
    given = {kind: settings[kind] for kind in BUDGETS if settings.get(kind) is not None}
    words = ", ".join(f"{kind}={amount}" for kind, amount in given.items())
    if len(given) > 1 or any(amount <= 0 for amount in given.values()):
        raise UserError(f"{words}: give one budget, above zero")
    extend = settings.get("extend")
    if extend is not None and (extend <= 1 or given):
        raise UserError(
            f"extend={extend} must be above 1, and takes no other budget: it multiplies that of "
            "the run before")
    if given:
        return Budget(*next(iter(given.items())))
    if resumed:
        kind, amount = next(iter(resumed.items()))
        return Budget(kind, amount * (factor or 1))
    if device_type != "cuda":
        return Budget("minutes", CPU_MINUTES)
    return Budget("target_param_data_ratio", GPU_PARAM_DATA_RATIO)


def depth_of_size(size, depth=None):
    """The layers of a size in SIZES. UserError for an unknown one, and for another depth."""
    if size not in SIZES:
        raise UserError(f"size={size} does not exist: choose from {', '.join(SIZES)}")
    layers = SIZES[size][0]
    if depth not in (None, layers):
        raise UserError(f"size={size} is a depth of {layers}, not depth={depth}: give one of them")
    return layers


def pretraining_defaults(settings):
    """What base_train's settings of None become on this machine, for its --help."""
    try:
        device_type = choose_device_type(settings["device_type"])
    except UserError:
        device_type = "cpu"  # a GPU that torch does not see: the run itself will say so
    if device_type == "cuda":
        depth = settings["depth"] or GPU_DEPTH
        return {
            "model": "gpt",
            "depth": f"{GPU_DEPTH}, or less: what fits the memory and takes at most "
                     f"{GPU_HOURS:g} hours; with --minutes what they pay for",
            "max_seq_len": GPU_CONTEXT,
            "target_param_data_ratio": GPU_PARAM_DATA_RATIO,
            "total_batch_size": gpu_shape(depth, DOCUMENTED_VOCAB).total_batch_size,
            "weight_decay": round(gpu_weight_decay(depth), 4),
            "ngram_tokens": 0,
        }
    shapes = [f"{row[1]} from {row[0] / 1e6:g} M tokens on" for row in CPU_SHAPES[1:]]
    return {
        "model": default_model(device_type),
        "depth": f"by measured speed: {', '.join(shapes)}",
        "max_seq_len": f"{CPU_SHAPES[0][2]}, at depth {CPU_SHAPES[-1][1]} {CPU_SHAPES[-1][2]}",
        "minutes": CPU_MINUTES,
        "weight_decay": 0.0,
        "ngram_tokens": NGRAM_TOKENS if device_type == "cpu" else 0,
    }


# ------------------------------------------------------------------------------------------------
# 2. the text

# How often a run reads its text at most, where its budget is time or follows from the model. So
# often, text is nearly as good as new text (arXiv 2305.16264); more is learning by heart, and bits
# per byte of other text rise (dev/LOG.md).
MOST_EPOCHS = 4
TOO_LITTLE_BYTES = 20_000  # of training text, from which hardly more than spelling is learnt
MOST_EVALUATIONS = 20      # on the way: one for each epoch, up to these
TOKENS_PER_ROW = 512       # of text that is read several times, for each row of a hashed table
MIN_HASHED_ROWS = 64
OVERFITTING_BPB = 0.01     # bits per byte above the best that are no chance


def most_tokens(text, budget, resumed=None):
    """How many tokens a run trains on at most, however long its budget is.

    text: a TextSize (dataloader.py), or None where it is not known. Infinite for steps that the
    user named. A run that is extended trains so many times as long as it did: `extended` in its
    meta is the product of all factors, `extend` the last one.
    """
    if text is None or budget.kind == "num_iterations":
        return math.inf
    resumed = resumed or {}
    factor = resumed.get("extended") or resumed.get("extend") or 1
    return MOST_EPOCHS * text.tokens * factor


def fitting_hashed_rows(text, usual):
    """Rows of a hashed table for a text that is read several times, a power of two.

    0, for the usual number, where that is no more. Tables with a row for each triple of tokens know
    such a text by heart after two epochs.
    """
    fitting = 2 ** round(math.log2(max(1, text.tokens / TOKENS_PER_ROW)))
    fitting = max(MIN_HASHED_ROWS, fitting)
    return fitting if fitting < usual else 0


def given_fields(settings, model_class):
    """{field of the config: value} of the settings that give a model a shape of its own.

    UserError for one that the class does not have, and for a width or heads without a depth, which
    is not chosen for them.
    """
    given = {name: settings[name] for name in SHAPE_SETTINGS if settings.get(name) is not None}
    known = {field.name for field in dataclasses.fields(model_class.config_class)}
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"{name}={value} is not part of {model_class.__name__}: leave it out, or take "
                "--model=portable")
        if name in NEED_DEPTH and not settings["depth"]:
            raise UserError(f"{name}={value} needs --depth, which is not chosen for it")
    return given


def config_for(model_class, shape, vocab_size, given=None, text=None):
    """The config of a model of a Shape.

    given: what given_fields() returned, or None. text: the TextSize of a text that is read several
    times, which gets smaller tables, or None.
    """
    config = model_class.config_class.from_depth(
        shape.depth, vocab_size, shape.max_seq_len, **(given or {}))
    if text and issubclass(model_class, LookupGPT):
        config.hashed_rows = fitting_hashed_rows(text, usual_hashed_rows(vocab_size))
    return config


class Reading(NamedTuple):
    """How a run reads its text."""
    text: tuple       # a TextSize
    wanted: float     # epochs: how often the budget alone would read it
    epochs: float     # how often the run does

    def describe(self):
        """One line: how much text there is, and how often it is read."""
        about = "" if self.text.exact else "about "
        size = f"{about}{megabytes(self.text.bytes)}, {about}{self.text.tokens:,} tokens"
        if self.wanted < 1:
            return f"text: {size}: the budget reads {100 * self.wanted:.0f} % of it"
        line = f"text: {size}: the budget reads it {times(self.wanted)}"
        if self.epochs < self.wanted:
            line += f", the run {times(self.epochs)} and ends before"
        return line

    def warnings(self):
        """What should be known before minutes are spent: a list of lines."""
        size = megabytes(self.text.bytes)
        if self.text.bytes < TOO_LITTLE_BYTES:
            return [
                f"warning: {size} of text teach hardly more than how a few words are spelled "
                f"({megabytes(TOO_LITTLE_BYTES)} is little, 1 MB a beginning): add text, or train "
                "on this machine's text (without --data) and practise yours in --custom"]
        if self.wanted > MOST_EPOCHS:
            return [
                f"warning: {size} of text for this budget: more text would help more than more "
                f"minutes, for after {MOST_EPOCHS} times a text teaches little that is new"]
        return []

    def repeated(self):
        """The TextSize where the text is read several times, else None."""
        return self.text if self.epochs > 1 else None

    def evaluations(self):
        """How many validations there are in the run: at each quarter, or after each epoch."""
        return max(4, min(MOST_EVALUATIONS, math.ceil(self.epochs)))


def times(epochs):
    """A number of epochs in words.

    >>> times(2.54), times(12.4)
    ('2.5 times', '12 times')
    """
    return f"{epochs:.1f} times" if epochs < 9.95 else f"{epochs:,.0f} times"


def megabytes(size):
    """A number of bytes in words.

    >>> megabytes(600_000)
    '0.6 MB'
    """
    if size < 100_000:
        return f"{size / 1000:.0f} kB"
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def is_overfitting(bpbs):
    """Whether the last two validations of a run are clearly worse than its best.

    bpbs: bits per byte of the same documents, in the order of the validations.
    """
    if len(bpbs) < 3:
        return False
    return min(bpbs[-2:]) > min(bpbs) + OVERFITTING_BPB


# ------------------------------------------------------------------------------------------------
# 3. the shape

class Shape(NamedTuple):
    """The dials of a model and its batch."""
    depth: int
    max_seq_len: int
    total_batch_size: int  # tokens per optimizer step
    reason: str


# What a CPU's time buys: (training tokens within the budget at which the row begins to pay, depth,
# context, batch in tokens). Tokens are counted at the row's own measured speed, so the table holds
# for any instruction set. Found by the experiments in dev/LOG.md.
CPU_SHAPES = [
    (0.0,    2, 256, 2048),
    (0.9e6,  2, 256, 4096),
    (2.5e6,  3, 256, 4096),
    (5.5e6,  4, 256, 4096),
    (26.0e6, 6, 512, 8192),  # an estimate: no machine of ours was that fast
]


def cpu_shape(tokens_at, depth=None):
    """The deepest shape of CPU_SHAPES that the budget pays for.

    tokens_at(depth, max_seq_len): the training tokens within the budget at that shape. It may
    measure, so the rows are asked from the smallest on, up to the first that does not pay.
    depth: where it is given already; then the rows nearest to it decide context and batch.
    """
    rows, reason = CPU_SHAPES, "the smallest shape"
    if depth is not None:
        nearest = max((row[1] for row in rows if row[1] <= depth), default=rows[0][1])
        rows = [row for row in rows if row[1] == nearest]
        reason = f"the smallest context and batch of depth {nearest}"
    chosen = rows[0]
    for row in rows[1:]:
        enough, row_depth, context, _ = row
        tokens = tokens_at(depth or row_depth, context)
        words = f"{tokens / 1e6:.1f} M tokens at depth {depth or row_depth}"
        if tokens < enough:
            reason += f"; {words} would be too few, {enough / 1e6:.1f} M are needed"
            break
        chosen, reason = row, f"the budget buys {words}"
    return Shape(depth or chosen[1], chosen[2], chosen[3], reason)


def gpu_shape(depth, vocab_size, parameters=None):
    """The documented shape of a depth.

    parameters: those that a token is multiplied with, where another width is given. The batch grows
    with the tokens of the run to the power .383 (Power Lines, arXiv 2505.13738) from the documented
    524,288 at depth 20, in powers of two.
    """
    depth = depth or GPU_DEPTH
    parameters = parameters or matmul_parameters(depth, vocab_size)
    growth = parameters / matmul_parameters(GPU_DEPTH, DOCUMENTED_VOCAB)
    batch = 2 ** round(19 + 0.383 * math.log2(growth))
    reason = f"524,288 tokens at depth 20, x (size of the run)^.383 = {batch:,} at depth {depth}"
    return Shape(depth, GPU_CONTEXT, batch, reason)


def matmul_parameters(depth, vocab_size):
    """How many weights a token is multiplied with in the documented model of a depth."""
    width = 64 * depth
    return 12 * depth * width**2 + width * vocab_size


def gpu_weight_decay(depth):
    """Falls with the square of the depth from .2 at depth 12, as nanochat has it."""
    return 0.2 * (12 / depth) ** 2


# ------------------------------------------------------------------------------------------------
# 4. the batch

class Batch(NamedTuple):
    """total_batch_size tokens = micro_batch_size x max_seq_len x ranks x grad_accum_steps."""
    total_batch_size: int
    micro_batch_size: int   # sequences per device and pass
    grad_accum_steps: int


def largest_divisor(n, limit):
    """The largest divisor of n that is at most limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def choose_batch(wanted, max_seq_len, ranks, limit, total_batch_size=None, micro_batch_size=None,
                 multiple=1):
    """Divide a batch among ranks and passes.

    wanted: tokens per step that the shape asks for. limit: sequences that fit a device.
    total_batch_size, micro_batch_size: the user's, or None. A given number is never changed:
    UserError where it does not divide. Else the sequences of a rank are rounded down a little
    where their largest divisor would leave over half of the device unused (43 is a prime).
    multiple: a pass has a multiple of so many sequences, for the lengths of a curriculum.
    """
    if multiple > 1:
        check_for_lengths(max_seq_len, ranks, total_batch_size, micro_batch_size, multiple)
    # 1. what a rank has per step, in groups of `multiple` sequences
    tokens = multiple * max_seq_len * ranks  # of one group on every rank
    most = max(1, limit // multiple)
    if total_batch_size:
        if total_batch_size % tokens:
            below = max(1, total_batch_size // tokens) * tokens
            raise UserError(
                f"total_batch_size={total_batch_size} is not a multiple of max_seq_len x ranks = "
                f"{max_seq_len} x {ranks}: {below} is one, or leave it out")
        groups = total_batch_size // tokens
    else:
        groups = max(1, wanted // tokens)
        if not micro_batch_size:
            groups = with_large_divisor(groups, most)

    # 2. what it has per pass
    if micro_batch_size:
        in_pass = min(micro_batch_size // multiple, groups)
        if groups % in_pass:
            divisor = multiple * largest_divisor(groups, in_pass)
            raise UserError(
                f"device_batch_size={micro_batch_size} does not divide the {multiple * groups} "
                f"sequences that a rank has per step: {divisor} does")
    else:
        in_pass = largest_divisor(groups, most)
    return Batch(groups * tokens, multiple * in_pass, groups // in_pass)


def check_for_lengths(max_seq_len, ranks, total_batch_size, micro_batch_size, multiple):
    """UserError where a number of the user's, or None, does not suit a curriculum, whose lengths
    divide `multiple` sequences."""
    tokens = multiple * max_seq_len
    reason = f"the lengths of the curriculum divide {multiple} x {max_seq_len} = {tokens} tokens"
    if total_batch_size and total_batch_size % (tokens * ranks):
        below = max(1, total_batch_size // (tokens * ranks)) * tokens * ranks
        raise UserError(
            f"total_batch_size={total_batch_size} does not suit: {reason}, x {ranks} ranks: "
            f"{below} is a multiple, or leave it out")
    if micro_batch_size and micro_batch_size % multiple:
        above = round_up(micro_batch_size, multiple)
        raise UserError(
            f"device_batch_size={micro_batch_size} does not suit: {reason}: {above} is a multiple "
            f"of {multiple}, or leave it out")


def with_large_divisor(sequences, limit):
    """sequences, or up to a tenth fewer, so that a divisor uses at least half of the limit."""
    enough = min(sequences, limit) / 2
    for fewer in range(sequences, math.ceil(0.9 * sequences) - 1, -1):
        if largest_divisor(fewer, limit) >= enough:
            return fewer
    return sequences


# ------------------------------------------------------------------------------------------------
# 5. the horizon

TRIAL_MINUTES = 0.25


class Horizon(NamedTuple):
    """Where progress reaches 1: a number of steps or of minutes; the other is None."""
    num_iterations: int
    minutes: float
    max_steps: int = None  # besides minutes: after so many steps at the latest

    @property
    def is_trial(self):
        """Whether so few minutes only show that everything works: measuring must not take more."""
        return self.minutes is not None and self.minutes < TRIAL_MINUTES

    def progress(self, step, elapsed):
        """The share that is used. elapsed: seconds of training."""
        if self.num_iterations:
            return step / self.num_iterations
        of_minutes = elapsed / (60 * self.minutes)
        of_steps = step / (self.max_steps or math.inf)
        return max(of_minutes, of_steps)

    def is_used(self, step, elapsed, last_step):
        """Whether the run ends here, since another step would not fit. last_step: its seconds."""
        half_a_step = 0.0
        if self.minutes:
            half_a_step = 0.5 * last_step / (60 * self.minutes)
        return self.progress(step, elapsed) + half_a_step >= 1

    def seconds_left(self, step, elapsed, seconds_per_step):
        """Seconds of training until progress reaches 1, at this speed."""
        if self.num_iterations:
            return max(0, self.num_iterations - step) * seconds_per_step
        left = max(0, 60 * self.minutes - elapsed)
        steps_left = (self.max_steps or math.inf) - step
        return min(left, max(0, steps_left) * seconds_per_step)


def choose_horizon(budget, total_batch_size, flops_per_token, parameters, most=math.inf):
    """Steps or minutes of a Budget.

    parameters: those that a token is multiplied with. most: tokens that the run trains on at most.
    """
    if budget.kind == "minutes":
        max_steps = None if most == math.inf else max(1, round(most / total_batch_size))
        return Horizon(None, budget.amount, max_steps)
    if budget.kind == "num_iterations":
        return Horizon(round(budget.amount), None)  # extended, it may have become a fraction
    if budget.kind == "target_flops":
        tokens = budget.amount / flops_per_token
    else:
        tokens = budget.amount * parameters
    return Horizon(max(1, round(min(tokens, most) / total_batch_size)), None)


def check_not_passed(budget, horizon, resumed):
    """UserError where a run is resumed toward a budget that it has passed.

    The run would count as finished, without the LR decay. resumed: the meta of the run, or None.
    Toward its own budget it may lack nothing but its last evaluation.
    """
    if not resumed or resumed.get("budgets") == {budget.kind: budget.amount}:
        return
    step, minutes = resumed["step"], resumed["elapsed"] / 60
    if horizon.minutes:
        passed = minutes >= horizon.minutes
    else:
        passed = step >= horizon.num_iterations
    if passed:
        raise UserError(
            f"{budget.kind}={budget.amount:g} is over at step {step}, after {minutes:.3g} minutes, "
            "where the run is resumed: give it more, or leave the budget out")


def batch_to_resume(resumed, ranks, multiple=1):
    """Tokens per step of a run that is resumed: its own, or the nearest that the ranks can share.

    Fewer or more GPUs than before must not end a run. resumed: its meta. multiple: as in
    choose_batch().
    """
    tokens = multiple * resumed["config"]["max_seq_len"] * ranks  # of one pass of every rank
    return max(1, round(resumed["total_batch_size"] / tokens)) * tokens


# Of a chat stage on a GPU that is given neither steps nor minutes. Fewer updates teach too little
# of what is new in it: a name, the tool, the form of a conversation. In batches that fill the
# devices, eight GPUs would read the local conversations in 15 steps.
MIN_CHAT_STEPS = 500
MAX_CHAT_MICRO_BATCH = 16   # sequences of packed conversations


def chat_batch(settings, max_seq_len, ranks, pretraining_batch, data_tokens=None,
               device_batch_size=None):
    """The Batch of a chat stage. UserError where the settings do not divide.

    data_tokens: of one pass over the conversations, or None where the batch does not follow from
    them (on a CPU): then one pass of every device over what pretraining had in a step, at most 16
    sequences. Else the largest batch of which a pass over the data has MIN_CHAT_STEPS, at most
    pretraining's and at least one sequence for every rank. device_batch_size: pretraining's, where
    it is known: so many sequences fit a device.
    """
    micro_batch_size = settings["device_batch_size"]
    if data_tokens is not None and settings["total_batch_size"] is None:
        limit = min(MAX_CHAT_MICRO_BATCH, device_batch_size or MAX_CHAT_MICRO_BATCH)
        tokens = max_seq_len * ranks  # of one sequence on every rank
        sequences = min(pretraining_batch, data_tokens // MIN_CHAT_STEPS) // tokens
        if micro_batch_size and sequences > micro_batch_size:
            sequences -= sequences % micro_batch_size
        wanted = max(1, sequences) * tokens
        return choose_batch(wanted, max_seq_len, ranks, limit, None, micro_batch_size)

    if micro_batch_size is None:
        most = max(1, pretraining_batch // (max_seq_len * ranks))
        micro_batch_size = min(MAX_CHAT_MICRO_BATCH, most)
    tokens = micro_batch_size * max_seq_len * ranks  # of one pass
    total_batch_size = settings["total_batch_size"] or tokens
    if total_batch_size % tokens:
        raise UserError(
            f"total_batch_size={total_batch_size} is not a multiple of device_batch_size x "
            f"context x ranks = {micro_batch_size} x {max_seq_len} x {ranks}")
    return Batch(total_batch_size, micro_batch_size, total_batch_size // tokens)


def chat_horizon(settings, device_type, total_batch_size, data_tokens):
    """The Horizon of a chat stage: as given, else 5 minutes, or on a GPU one pass over the data, or
    as many as MIN_CHAT_STEPS take.

    data_tokens: as in chat_batch(), None on any other device.
    """
    minutes, num_iterations = settings["minutes"], settings["num_iterations"]
    for given in (minutes, num_iterations):
        if given is not None and given <= 0:
            raise UserError(
                f"minutes={minutes} and num_iterations={num_iterations}: a budget must be above "
                "zero")
    if num_iterations:
        return Horizon(num_iterations, None)
    if minutes is None and device_type == "cuda":
        return Horizon(max(MIN_CHAT_STEPS, round(data_tokens / total_batch_size)), None)
    return Horizon(None, minutes or CPU_MINUTES)


class ChatLayout(NamedTuple):
    """How a chat stage is divided among the ranks."""
    parallel: str
    checkpoint_activations: bool


def chat_layout(settings, meta, ranks):
    """The ChatLayout of a stage: what pretraining needed to fit the devices, where the settings do
    not say.

    meta: of the run, with what pretraining had; checkpoints of earlier versions do not tell.
    """
    parallel = settings["parallel"]
    if parallel == "auto" and ranks > 1 and meta.get("parallel") == "fsdp":
        parallel = "fsdp"
    recompute = settings["checkpoint_activations"]
    if recompute is None:
        recompute = meta.get("checkpoint_activations", False)
    return ChatLayout(parallel, recompute)


def import_batch(model, device_type):
    """Tokens per step that the chat stages take for pretraining's, of a model that others trained.

    On a CPU those of CPU_SHAPES at its depth; on a GPU the documented ones of its size.
    """
    config = model.config
    if device_type == "cpu":
        return cpu_shape(lambda depth, max_seq_len: 0, config.depth).total_batch_size
    shape = gpu_shape(config.depth, config.vocab_size, model.matmul_parameters())
    return shape.total_batch_size


class ChatPlan(NamedTuple):
    """All that is decided before the first step of a chat stage."""
    batch: Batch
    horizon: Horizon
    data_tokens: int    # of one pass over the conversations, where these decide; else None

    def describe(self, max_seq_len, ranks):
        """The decisions as numbered lines, each with its reason; [] where the data decide none."""
        if self.data_tokens is None:
            return []
        b = self.batch
        steps = self.data_tokens / b.total_batch_size   # of one pass over the data
        reason = f"one pass over the conversations has {steps:,.0f} steps"
        if steps < MIN_CHAT_STEPS:
            reason += f", fewer than {MIN_CHAT_STEPS}"
        ends = f"{self.horizon.minutes} minutes"
        if self.horizon.num_iterations:
            read = times(self.horizon.num_iterations / steps)
            ends = f"{self.horizon.num_iterations:,} steps, which read the conversations {read}"
        return [
            f"1) data: about {self.data_tokens / 1e6:,.1f} M tokens of conversations",
            f"2) batch: {b.total_batch_size:,} tokens a step = {b.micro_batch_size} sequences x "
            f"{max_seq_len} tokens x {ranks} ranks x {b.grad_accum_steps} passes ({reason})",
            f"3) horizon: {ends}",
        ]


def make_chat_plan(settings, device_type, max_seq_len, ranks, meta, count_tokens):
    """The ChatPlan of a stage.

    settings: of the script. meta: of the run, with what pretraining's batch was. count_tokens():
    tokens of one pass over the conversations; it is called only on a GPU.
    """
    data_tokens = count_tokens() if device_type == "cuda" else None
    batch = chat_batch(
        settings, max_seq_len, ranks, meta["total_batch_size"], data_tokens,
        meta.get("device_batch_size"))
    horizon = chat_horizon(settings, device_type, batch.total_batch_size, data_tokens)
    return ChatPlan(batch, horizon, data_tokens)


# ------------------------------------------------------------------------------------------------
# 6. the layout, and whether it fits

class Arrangement(NamedTuple):
    """How a model is trained on a machine."""
    parallel: str                  # replicated, zero2 or fsdp
    checkpoint_activations: bool
    limit: int                     # sequences that fit a device, by estimate
    batch: Batch
    memory: Memory
    tokens_per_second: float       # of all ranks, an estimate


def options_of(settings):
    """What of a run's settings concerns memory, as words for memory()."""
    reduce_dtype = settings.get("reduce_dtype") or "float32"
    if reduce_dtype not in WIRE_DTYPES:
        raise UserError(f"reduce_dtype={reduce_dtype}: choose from {', '.join(WIRE_DTYPES)}")
    return {
        "compiled": settings.get("compile", True),
        "wire_bytes": WIRE_DTYPES[reduce_dtype].itemsize,
    }


def pass_multiple(settings, max_seq_len):
    """Of how many sequences a pass has a multiple, as the lengths of --curriculum need it."""
    stages = read_curriculum(settings.get("curriculum"), max_seq_len)
    return sequences_per_pass(stages, max_seq_len)


def layouts_to_try(settings, ranks):
    """Lists of (parallel, checkpoint_activations); a later list only where nothing earlier fits.

    fsdp comes last: it moves the model in every micro-batch, zero2 once in a step.
    """
    parallel = settings.get("parallel") or "auto"
    if parallel not in ("auto", *PARALLEL):
        raise UserError(
            f"parallel={parallel} is unknown: choose from auto, {', '.join(PARALLEL)}")
    kinds = [parallel]
    if parallel == "auto":
        kinds = ["zero2", "fsdp"] if ranks > 1 else ["replicated"]
    given = settings.get("checkpoint_activations")
    recomputing = (False, True) if given is None else (given,)
    return [[(kind, recompute) for recompute in recomputing] for kind in kinds]


def arrangements(settings, machine, model, wanted, total_batch_size=None, micro_batch_size=None):
    """The Arrangements that fit, the fastest first, and those of a later list behind.

    wanted, total_batch_size, micro_batch_size: as of choose_batch(). A micro-batch that is given is
    taken where it fits the memory to the last byte.
    """
    size = machine.dtype_bytes, machine.ranks, machine.device_type
    options = options_of(settings)
    # the stages of a curriculum have as many tokens in a pass, and take as much memory
    multiple = pass_multiple(settings, model.config.max_seq_len)
    found = []
    for alternatives in layouts_to_try(settings, machine.ranks):
        fitting = []
        for parallel, recompute in alternatives:
            layout = {"parallel": parallel, "checkpoint_activations": recompute, **options}
            limit = micro_batch_limit(model, machine.memory, *size, multiple, **layout)
            if limit < multiple and not micro_batch_size:
                continue
            batch = choose_batch(
                wanted, model.config.max_seq_len, machine.ranks, max(multiple, limit),
                total_batch_size, micro_batch_size, multiple)
            needed = memory(
                model, batch.micro_batch_size, *size,
                grad_accum_steps=batch.grad_accum_steps, **layout)
            if machine.memory and needed.total > machine.memory:
                continue
            step = expected_step(
                machine, model, batch, parallel, recompute, options["wire_bytes"])
            speed = step.tokens_per_second
            fitting.append(Arrangement(parallel, recompute, limit, batch, needed, speed))
        # where two are as fast, the one without recomputation
        found += sorted(fitting, key=lambda way: -way.tokens_per_second)
    return found


def arrange(settings, machine, model, wanted, total_batch_size=None, micro_batch_size=None):
    """The best Arrangement; UserError with both numbers and a remedy where nothing fits."""
    found = arrangements(settings, machine, model, wanted, total_batch_size, micro_batch_size)
    if found:
        return found[0]
    raise UserError(what_would_fit(settings, machine, model, wanted, micro_batch_size))


def what_would_fit(settings, machine, model, wanted, micro_batch_size):
    """One line: how much is needed, how much there is, and the nearest thing that fits."""
    size = machine.dtype_bytes, machine.ranks, machine.device_type
    parallel, recompute = layouts_to_try(settings, machine.ranks)[-1][-1]
    layout = {"parallel": parallel, "checkpoint_activations": recompute, **options_of(settings)}
    multiple = pass_multiple(settings, model.config.max_seq_len)
    sequences = micro_batch_size or multiple
    needed = memory(model, sequences, *size, **layout).total
    count = f"{sequences} sequences" if sequences > 1 else "1 sequence"
    recomputing = ", checkpoint_activations" if recompute else ""
    words = (
        f"depth {model.config.depth} takes {needed / 1e9:.1f} GB of a device ({parallel}"
        f"{recomputing}, {count} at a time), and there are {machine.memory / 1e9:.1f} GB")
    share = "" if needed > machine.memory else f", of which {100 * MEMORY_SHARE:.0f} % are planned"
    words += share + ": "

    freed = {**settings, "parallel": "auto", "checkpoint_activations": None}
    other = next(iter(arrangements(freed, machine, model, wanted)), None)
    if other:
        remedy = f"--device_batch_size={other.batch.micro_batch_size} would fit"
        remedy += f" with --parallel={other.parallel}"
        if other.checkpoint_activations:
            remedy += " --checkpoint_activations"
        return words + remedy
    if multiple > 1 and arrangements({**freed, "curriculum": None}, machine, model, wanted):
        return (
            f"{words}the lengths of the curriculum need a multiple of {multiple} sequences in a "
            f"pass; lengths that divide the context of {model.config.max_seq_len} would fit")
    depth = largest_fitting_depth(freed, machine, model)
    if depth:
        one_gpu = machine.device_type == "cuda" and machine.ranks == 1
        return f"{words}--depth={depth} would fit" + (", or more GPUs" if one_gpu else "")
    return f"{words}not even depth {GPU_DEPTHS[0]} fits; a shorter --max_seq_len needs less"


def largest_fitting_depth(settings, machine, model):
    """The largest depth of GPU_DEPTHS whose model of the same class fits, or None."""
    config = model.config
    for depth in reversed(GPU_DEPTHS):
        if depth >= config.depth:
            continue
        smaller = build_on_meta(type(model), type(config).from_depth(
            depth, config.vocab_size, config.max_seq_len))
        if arrangements(settings, machine, smaller, 1):
            return depth
    return None


def gpu_depth(settings, budget, machine, model_class, vocab_size, most=math.inf):
    """(depth, reason) of a run on GPUs that is given none.

    With minutes: the largest that they pay for, at GPU_PARAM_DATA_RATIO tokens for each matmul
    parameter. Else the documented one, or the largest below that fits the memory and, trained as
    long as the budget says, takes at most GPU_HOURS.
    """
    largest = GPU_DEPTHS[-1] if budget.kind == "minutes" else GPU_DEPTH
    reason = ""
    for depth in reversed([depth for depth in GPU_DEPTHS if depth <= largest]):
        shape = gpu_shape(depth, vocab_size)
        max_seq_len = settings["max_seq_len"] or shape.max_seq_len
        kv_heads = settings["kv_heads"]
        config = model_class.config_class.from_depth(depth, vocab_size, max_seq_len)
        if kv_heads and config.heads % kv_heads == 0:
            config.kv_heads = kv_heads
        model = build_on_meta(model_class, config)
        found = arrangements(settings, machine, model, shape.total_batch_size)
        if not found:
            reason = f"depth {depth} does not fit the memory"
            continue
        hours, limit = hours_at(budget, model, found[0].tokens_per_second, most)
        if hours <= limit:
            return depth, f"about {hours:.2g} h by estimate" + (f"; {reason}" if reason else "")
        reason = f"depth {depth} would take {hours:.2g} h, above {limit:.2g}"
    return GPU_DEPTHS[0], f"the smallest; {reason}"


def hours_at(budget, model, tokens_per_second, most):
    """(how long a model's training takes, how long it may), in hours."""
    ratio = GPU_PARAM_DATA_RATIO
    limit = GPU_HOURS
    if budget.kind == "minutes":
        limit = budget.amount / 60
    elif budget.kind == "target_param_data_ratio":
        ratio = budget.amount
    else:
        return 0.0, limit  # steps or FLOPs that the user named
    tokens = min(ratio * model.matmul_parameters(), most)
    if budget.kind == "minutes" and tokens == most:
        return math.inf, limit  # a text that is too short for a model of this size
    return tokens / tokens_per_second / 3600, limit


# ------------------------------------------------------------------------------------------------
# 7. time and disk

def checkpoint_bytes(model):
    """Disk space of one step with its optimizer state, in bytes (n-gram counts come on top)."""
    whole = memory(model, 1, 4)
    return whole.parameters + whole.tables + whole.optimizer


def check_disk(plan, keep, free, folder):
    """None, or a warning where the checkpoints will not fit; UserError where not even one will.

    keep: the setting. free: bytes of the disk that `folder` is on.
    """
    one = plan.disk / (keep + 2)
    if free < one:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB of disk free, one checkpoint takes {one / 1e9:.2f}: "
            "make room, or set NANOCHAT_BASE_DIR to a folder on a larger disk")
    if free < plan.disk:
        return (
            f"warning: {folder} has {free / 1e9:.2f} GB of disk free, and {plan.disk / 1e9:.2f} GB "
            f"of checkpoints are to stay: make room, or give --keep below {keep}")
    return None


def measure_step(model_class, config, device, dtype, tokens=512, repeats=2):
    """Training tokens per second of a model, by running it: the fastest of a few small steps.

    Uncompiled and without communication. A matmul's speed says too little: a step reaches half to
    four fifths of it with AVX2, a quarter with AVX512-bf16 (dev/LOG.md).
    """
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay untouched
        # built in place: moving a model off the meta device imports torch's compiler
        with torch.device(device), NoInitialisers():
            model = model_class(config)
        model.init_weights()
        model.compute_dtype = dtype
        shape = max(1, tokens // config.max_seq_len), config.max_seq_len + 1
        idx = torch.randint(config.vocab_size, shape, device=device)
    fastest = math.inf
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        loss = model(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
        loss.backward()
        loss.item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    return idx[:, 1:].numel() / fastest


def speed_of(model_class, vocab_size, compute, given=None):
    """A function (depth, max_seq_len) -> measured training tokens per second of all ranks.

    given: what given_fields() returned, or None. Every rank must call the function alike: it
    contains a collective.
    """
    @functools.cache
    def speed(depth, max_seq_len):
        config = model_class.config_class.from_depth(
            depth, vocab_size, max_seq_len, **(given or {}))
        own = measure_step(model_class, config, compute.device, compute.dtype)
        return compute.world_size * all_reduce_max(own)[0]

    return speed


def tokens_within(budget, flops_per_token, tokens_per_second):
    """How many training tokens a Budget buys at a shape; tokens_per_second() measures if needed."""
    if budget.kind == "target_flops":
        return budget.amount / flops_per_token
    # a number of steps says nothing about time, and a ratio grows with the depth that is to be
    # chosen: the usual minutes stand for both
    minutes = budget.amount if budget.kind == "minutes" else CPU_MINUTES
    return 60 * minutes * tokens_per_second()


# ------------------------------------------------------------------------------------------------
# the whole plan

def this_machine(compute, matmul_flops):
    """The Machine that this process runs on, the same on all ranks, which all must call it.

    compute: what compute_init() returned. matmul_flops: measured, of this rank's device.
    """
    device = compute.device
    memory = device_memory(device)
    if memory is not None:
        # the smallest device's, so that all ranks plan alike
        memory = -int(all_reduce_max(-memory)[0])
    dtype_bytes = compute.dtype.itemsize
    # likewise the slowest device's
    slowest = -all_reduce_max(-matmul_flops)[0]
    kind = None
    if device.type == "cuda":
        kind = device_kind(torch.cuda.get_device_name(device))
        memory = int(memory * planned_share(kind))
    elif device.type == "cpu" and host_memory():
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", compute.world_size))
        memory = host_memory() // ranks_here
    return Machine(device.type, compute.world_size, memory, dtype_bytes, slowest, kind)


class Plan(NamedTuple):
    """All that is decided before the first step of pretraining."""
    budget: Budget
    shape: Shape
    batch: Batch
    horizon: Horizon
    weight_decay: float
    memory: Memory
    steps: float             # an estimate where the horizon is one of minutes
    hours: float             # of training, an estimate
    disk: int                # bytes of the checkpoints that stay
    reading: Reading = None  # where the text is known
    parallel: str = "replicated"
    checkpoint_activations: bool = False
    tokens_per_second: float = None  # of all ranks
    measured: bool = False           # whether that was
    stages: tuple = ()               # of the sequence length: Stages (curriculum.py)

    def describe(self, model_name, ranks):
        """The decisions as numbered lines, each with its reason."""
        b, s = self.batch, self.shape
        if self.horizon.num_iterations:
            horizon = f"{self.horizon.num_iterations:,} steps"
        else:
            horizon = f"{self.horizon.minutes:g} minutes of training"
        reading = [f"8) {self.reading.describe()}"] if self.reading else []
        source = "measured here" if self.measured else "estimate, never measured by us"
        layout = f"{self.parallel} on {ranks} ranks" if ranks > 1 else "one device"
        if self.checkpoint_activations:
            layout += ", blocks recomputed in the backward pass to save memory"
        return [
            f"1) budget: {self.budget.kind}={self.budget.amount:g}",
            f"2) shape: model {model_name}, depth {s.depth}, context {s.max_seq_len} ({s.reason})",
            f"3) batch: {b.total_batch_size:,} tokens a step = {b.micro_batch_size} sequences x "
            f"{s.max_seq_len} tokens x {ranks} ranks x {b.grad_accum_steps} passes",
            f"4) layout: {layout}",
            f"5) memory of a device: about {self.memory.total / 1e9:.2f} GB "
            f"({self.memory.describe()})",
            f"6) horizon: {horizon}, about {self.hours:.2g} h at {self.tokens_per_second:,.0f} "
            f"tokens/s ({source}); weight decay {self.weight_decay:.3g}",
            f"7) disk: about {self.disk / 1e9:.2f} GB of checkpoints",
            *reading,
            *describe(self.stages, self.steps),
        ]


def depends_on_speed(settings, machine, resumed=None):
    """Whether a shape is to be chosen by the measured speed of this machine."""
    if resumed or machine.device_type == "cuda":
        return False
    given = settings["depth"], settings["max_seq_len"], settings["total_batch_size"]
    return not all(given)


def choose_shape(settings, budget, machine, model_class, vocab_size, speed, resumed=None,
                 most=math.inf):
    """The Shape of a run: the user's settings, else what the hardware's table says.

    most: the tokens that the run trains on at most, for its text is short.
    """
    if resumed:
        config, before = resumed["config"], resumed["total_batch_size"]
        reason = "as the run that is resumed"
        multiple = pass_multiple(settings, config["max_seq_len"])
        batch = batch_to_resume(resumed, machine.ranks, multiple)
        if batch != before:
            reason += (f", but for its {before:,} tokens a step, which {machine.ranks} ranks "
                       "cannot share")
        return Shape(config["depth"], config["max_seq_len"], batch, reason)
    depth, max_seq_len = settings["depth"], settings["max_seq_len"]
    if machine.device_type == "cuda":
        reason = None
        if not depth:
            depth, reason = gpu_depth(settings, budget, machine, model_class, vocab_size, most)
        parameters = None
        given = given_fields(settings, model_class)
        if given.keys() & set(NEED_DEPTH):
            usual = config_for(model_class, gpu_shape(depth, vocab_size), vocab_size, given)
            parameters = build_on_meta(model_class, usual).matmul_parameters()
        shape = gpu_shape(depth, vocab_size, parameters)
        if settings["total_batch_size"]:
            shape = shape._replace(reason=f"{settings['total_batch_size']:,} tokens, as given")
        if reason:
            shape = shape._replace(reason=f"{reason}; {shape.reason}")
    elif not depends_on_speed(settings, machine, resumed):
        shape = Shape(depth, max_seq_len, settings["total_batch_size"], "as the settings say")
    else:
        given = given_fields(settings, model_class)

        def tokens_at(depth, max_seq_len):
            config = model_class.config_class.from_depth(depth, vocab_size, max_seq_len, **given)
            model = build_on_meta(model_class, config)
            flops = model.flops_per_token(max_seq_len)
            return min(most, tokens_within(budget, flops, lambda: speed(depth, max_seq_len)))

        shape = cpu_shape(tokens_at, depth)
    if max_seq_len:
        shape = shape._replace(max_seq_len=max_seq_len)
    return shape


def make_plan(settings, budget, machine, model_class, vocab_size, speed, resumed=None, text=None):
    """The Plan of pretraining.

    settings: of base_train. speed(depth, max_seq_len): measured training tokens per second of all
    ranks; it is called only where the shape depends on it. resumed: the meta of the run that is
    resumed or extended; its shape stays, and its batch if the ranks can share it. text: the
    TextSize of the training text, or None.
    """
    on_gpu = machine.device_type == "cuda"
    # 1. the shape, how it reads the text, and a model of it that takes no memory
    most = most_tokens(text, budget, resumed)
    shape = choose_shape(settings, budget, machine, model_class, vocab_size, speed, resumed, most)
    if resumed:
        config = model_class.config_class(**resumed["config"])
    else:
        config = config_for(model_class, shape, vocab_size, given_fields(settings, model_class))
    model = build_on_meta(model_class, config)
    stages = read_curriculum(settings.get("curriculum"), shape.max_seq_len)
    for stage in stages:
        model.set_training_window(stage.window)  # a model that has none refuses
    flops_per_token = mean_over_tokens(
        stages, lambda stage: model.flops_per_token(stage.attended))

    # 2. the layout and the batch; the loader's position counts in micro-batches, so a resumed run
    # keeps their size
    earlier_micro_batch = None
    if resumed:
        earlier_micro_batch = resumed.get("device_batch_size")
    given = (
        shape.total_batch_size,
        shape.total_batch_size if resumed else settings["total_batch_size"],
        settings["device_batch_size"] or earlier_micro_batch,
    )
    if earlier_micro_batch and not arrangements(settings, machine, model, *given):
        machine = machine._replace(memory=None)  # it has run, whatever the estimate says
    best = arrange(settings, machine, model, *given)
    batch = best.batch
    tokens_per_second = best.tokens_per_second
    measured = depends_on_speed(settings, machine, resumed)
    if measured:
        tokens_per_second = speed(shape.depth, shape.max_seq_len)

    # 3. how long, how often that reads the text, and how the weights decay
    parameters = model.matmul_parameters()
    horizon = choose_horizon(budget, batch.total_batch_size, flops_per_token, parameters, most)
    steps_per_hour = 3600 * tokens_per_second / batch.total_batch_size
    steps, hours = expected_steps(horizon, steps_per_hour)
    reading = None
    if text:
        unlimited = choose_horizon(budget, batch.total_batch_size, flops_per_token, parameters)
        wanted, _ = expected_steps(unlimited, steps_per_hour)
        epochs = batch.total_batch_size / text.tokens  # of one step
        reading = Reading(text, wanted * epochs, steps * epochs)
    weight_decay = settings["weight_decay"]
    if weight_decay is None:
        weight_decay = gpu_weight_decay(shape.depth) if on_gpu else 0.0

    # 4. what it takes, with tables that fit the text
    if reading and not resumed:
        given = given_fields(settings, model_class)
        config = config_for(model_class, shape, vocab_size, given, reading.repeated())
        model = build_on_meta(model_class, config)
    needed = memory(
        model,
        batch.micro_batch_size,
        machine.dtype_bytes,
        machine.ranks,
        machine.device_type,
        parallel=best.parallel,
        checkpoint_activations=best.checkpoint_activations,
        grad_accum_steps=batch.grad_accum_steps,
        **options_of(settings),
    )
    disk = (settings["keep"] + 2) * checkpoint_bytes(model)
    return Plan(
        budget, shape, batch, horizon, weight_decay, needed, steps, hours, disk, reading,
        best.parallel, best.checkpoint_activations, tokens_per_second, measured, stages)


def expected_steps(horizon, steps_per_hour):
    """(steps, hours) of a Horizon at a speed."""
    if horizon.num_iterations:
        return horizon.num_iterations, horizon.num_iterations / steps_per_hour
    hours = horizon.minutes / 60
    if horizon.max_steps:
        hours = min(hours, horizon.max_steps / steps_per_hour)
    return hours * steps_per_hour, hours
