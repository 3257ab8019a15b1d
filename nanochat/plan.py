"""What a budget and a machine buy: depth, context, batch, sequences per device, horizon, memory.

Everything is decided here, before the loop, by pure functions that return small named tuples, so
that tests reach every combination without a process. `Plan.describe()` gives the decisions as
numbered steps, each with its reason, and a training script prints them.

Memory of one device has six terms, in bytes (`memory()`; tests/test_plan.py holds the first three
and the activations to an account of the real tensors):

    parameters   4 for each parameter of the network
    gradients    4 for each of them; sparse ones of hashed tables count as activations
    optimizer    matrices 4 (momentum), hashed tables 4 a row, all others 8 (two moments),
                 divided by the ranks (ZeRO-2)
    activations  ACTIVATIONS_PER_LAYER numbers for each token, layer and channel
    logits       one chunk of logits, three times, and the head's gradient
    tables       4 for each parameter of embeddings and hashed tables
"""
import functools
import math
import time
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import NoInitialisers
from nanochat.common import UserError, all_reduce_max, choose_device_type
from nanochat.hardware import device_memory
from nanochat.loss import CHUNK_LOGITS, CHUNK_LOGITS_DEFAULT
from nanochat.variants import default_model
from nanochat.variants.lookup import LookupGPT, usual_hashed_rows

BUDGETS = ("minutes", "num_iterations", "target_flops", "target_param_data_ratio")
CPU_MINUTES = 5.0              # the budget without a CUDA device where none is given
GPU_PARAM_DATA_RATIO = 20.0    # tokens per matmul parameter on a GPU (Chinchilla, arXiv 2203.15556)
GPU_DEPTH, GPU_CONTEXT = 20, 2048
NGRAM_TOKENS = 32_000_000      # tokens whose n-grams a CPU counts
DOCUMENTED_VOCAB = 65536       # of the documented run at depth 20
# Numbers that a layer keeps of each token for the backward pass, in units of the width. Counted
# from autograd's saved tensors in float32 (tests/test_plan.py): 19 in GPT, 20 in LookupGPT, 26 in
# PortableGPT; 19 in each with compiled blocks, which in bfloat16 keep the cast matrices as well.
ACTIVATIONS_PER_LAYER = 22
MEMORY_SHARE = 0.85            # of a device's memory that a plan uses; the rest is fragmentation
MAX_MICRO_BATCH = {"cpu": 16, "mps": 16, "cuda": 32}
# Of the measured matmul rate that a training step reaches, for an estimate of the hours. CPU:
# dev/LOG.md, AVX2. GPU: an assumption that no machine of ours has tested.
ASSUMED_SHARE = {"cpu": 0.5, "mps": 0.4, "cuda": 0.4}


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
            "depth": GPU_DEPTH,
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


def config_for(model_class, shape, vocab_size, kv_heads=None, text=None):
    """The config of a model of a Shape.

    text: the TextSize of a text that is read several times, which gets smaller tables, or None.
    """
    config = model_class.config_class.from_depth(
        shape.depth, vocab_size, shape.max_seq_len, kv_heads)
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


def gpu_shape(depth, vocab_size):
    """The documented shape of a depth.

    The batch grows with the tokens of the run to the power .383 (Power Lines, arXiv 2505.13738)
    from the documented 524,288 at depth 20, in powers of two.
    """
    depth = depth or GPU_DEPTH
    growth = matmul_parameters(depth, vocab_size) / matmul_parameters(GPU_DEPTH, DOCUMENTED_VOCAB)
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


def choose_batch(wanted, max_seq_len, ranks, limit, total_batch_size=None, micro_batch_size=None):
    """Divide a batch among ranks and passes.

    wanted: tokens per step that the shape asks for. limit: sequences that fit a device.
    total_batch_size, micro_batch_size: the user's, or None. A given number is never changed:
    UserError where it does not divide. Else the sequences of a rank are rounded down a little
    where their largest divisor would leave over half of the device unused (43 is a prime).
    """
    tokens = max_seq_len * ranks  # of one sequence on every rank
    if total_batch_size:
        if total_batch_size % tokens:
            raise UserError(
                f"total_batch_size={total_batch_size} is not a multiple of max_seq_len x ranks = "
                f"{max_seq_len} x {ranks}")
        sequences = total_batch_size // tokens
    else:
        sequences = max(1, wanted // tokens)
        if not micro_batch_size:
            sequences = with_large_divisor(sequences, limit)
    if micro_batch_size:
        micro_batch_size = min(micro_batch_size, sequences)
        if sequences % micro_batch_size:
            raise UserError(
                f"device_batch_size={micro_batch_size} does not divide the {sequences} sequences "
                "that a rank has per step")
    else:
        micro_batch_size = largest_divisor(sequences, limit)
    return Batch(sequences * tokens, micro_batch_size, sequences // micro_batch_size)


def with_large_divisor(sequences, limit):
    """sequences, or up to a tenth fewer, so that a divisor uses at least half of the limit."""
    enough = min(sequences, limit) / 2
    for fewer in range(sequences, math.ceil(0.9 * sequences) - 1, -1):
        if largest_divisor(fewer, limit) >= enough:
            return fewer
    return sequences


# ------------------------------------------------------------------------------------------------
# 5. the horizon

class Horizon(NamedTuple):
    """Where progress reaches 1: a number of steps or of minutes; the other is None."""
    num_iterations: int
    minutes: float
    max_steps: int = None  # besides minutes: after so many steps at the latest


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


def chat_batch(settings, max_seq_len, ranks, pretraining_batch):
    """The Batch of a chat stage: by default one pass of every device over what pretraining had in
    a step, at most 16 sequences. UserError where the settings do not divide."""
    micro_batch_size = settings["device_batch_size"]
    if micro_batch_size is None:
        micro_batch_size = min(16, max(1, pretraining_batch // (max_seq_len * ranks)))
    tokens = micro_batch_size * max_seq_len * ranks  # of one pass
    total_batch_size = settings["total_batch_size"] or tokens
    if total_batch_size % tokens:
        raise UserError(
            f"total_batch_size={total_batch_size} is not a multiple of device_batch_size x "
            f"context x ranks = {micro_batch_size} x {max_seq_len} x {ranks}")
    return Batch(total_batch_size, micro_batch_size, total_batch_size // tokens)


def chat_horizon(settings, device_type):
    """The Horizon of a chat stage: as given, else 5 minutes on a CPU and, with neither steps nor
    minutes, one pass over the mixture on a GPU."""
    minutes, num_iterations = settings["minutes"], settings["num_iterations"]
    for given in (minutes, num_iterations):
        if given is not None and given <= 0:
            raise UserError(
                f"minutes={minutes} and num_iterations={num_iterations}: a budget must be above "
                "zero")
    if num_iterations:
        return Horizon(num_iterations, None)
    if minutes is None and device_type != "cuda":
        minutes = CPU_MINUTES
    return Horizon(None, minutes)


# ------------------------------------------------------------------------------------------------
# 6. memory

class Memory(NamedTuple):
    """Bytes on one device, by kind."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    tables: int

    @property
    def total(self):
        return sum(self)


def build_on_meta(model_class, config):
    """A model without memory, to count its parameters."""
    with torch.device("meta"), NoInitialisers():
        return model_class(config)


def memory(model, micro_batch_size, dtype_bytes, ranks=1, device_type="cuda"):
    """Memory of training a model (on any device, the meta device included). See the module's head.

    micro_batch_size: sequences of max_seq_len per pass. dtype_bytes: of an activation.
    """
    config = model.config
    numbers = {
        role: sum(p.numel() for p in parameters)
        for role, parameters in model.parameters_by_role().items()
    }
    hashed = numbers.pop("hashed", 0)
    tables = numbers.pop("embedding") + hashed
    network = sum(numbers.values())
    adam = network - numbers["matrix"] + tables - hashed
    hashed_rows = hashed // config.width
    tokens = micro_batch_size * config.max_seq_len
    layers = ACTIVATIONS_PER_LAYER * config.width * config.depth
    chunk = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS_DEFAULT)
    chunk = min(chunk, tokens * config.vocab_size)
    sparse = device_type == "cpu"
    return Memory(
        parameters=4 * network,
        gradients=4 * (network + tables - (hashed if sparse else 0)),
        optimizer=(4 * numbers["matrix"] + 4 * hashed_rows + 8 * adam) // ranks,
        activations=tokens * layers * dtype_bytes,
        logits=3 * 4 * chunk + 4 * config.vocab_size * config.width,
        tables=4 * tables,
    )


def micro_batch_limit(model, device_memory, dtype_bytes, ranks, device_type):
    """How many sequences a device takes at a time, at least 1.

    device_memory: bytes, or None where it is not known (then the usual number).
    """
    usual = MAX_MICRO_BATCH[device_type]
    if not device_memory:
        return usual
    for sequences in range(usual, 1, -1):
        if fits(model, sequences, dtype_bytes, ranks, device_type, device_memory):
            return sequences
    return 1


def fits(model, micro_batch_size, dtype_bytes, ranks, device_type, device_memory):
    """Whether training with that many sequences fits the device."""
    needed = memory(model, micro_batch_size, dtype_bytes, ranks, device_type).total
    return needed <= MEMORY_SHARE * device_memory


# ------------------------------------------------------------------------------------------------
# 7. time and disk

def checkpoint_bytes(model):
    """Disk space of one step with its optimizer state, in bytes (n-gram counts come on top)."""
    whole = memory(model, 1, 4)
    return whole.parameters + whole.tables + whole.optimizer


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


def speed_of(model_class, vocab_size, compute):
    """A function (depth, max_seq_len) -> measured training tokens per second of all ranks.

    Every rank must call it alike: it contains a collective.
    """
    @functools.cache
    def speed(depth, max_seq_len):
        config = model_class.config_class.from_depth(depth, vocab_size, max_seq_len)
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

class Machine(NamedTuple):
    """What a plan needs to know of the hardware."""
    device_type: str     # cuda, mps or cpu
    ranks: int
    memory: int          # bytes of a device, or None where it is not known
    dtype_bytes: int     # of an activation
    matmul_flops: float  # measured, of a device


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
    return Machine(device.type, compute.world_size, memory, dtype_bytes, slowest)


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

    def describe(self, model_name, ranks):
        """The decisions as numbered lines, each with its reason."""
        b, s, m = self.batch, self.shape, self.memory
        if self.horizon.num_iterations:
            horizon = f"{self.horizon.num_iterations:,} steps"
        else:
            horizon = f"{self.horizon.minutes:g} minutes of training"
        reading = [f"7) {self.reading.describe()}"] if self.reading else []
        kinds = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in m._asdict().items())
        return [
            f"1) budget: {self.budget.kind}={self.budget.amount:g}",
            f"2) shape: model {model_name}, depth {s.depth}, context {s.max_seq_len} ({s.reason})",
            f"3) batch: {b.total_batch_size:,} tokens a step = {b.micro_batch_size} sequences x "
            f"{s.max_seq_len} tokens x {ranks} ranks x {b.grad_accum_steps} passes",
            f"4) horizon: {horizon}, about {self.hours:.2g} h; "
            f"weight decay {self.weight_decay:.3g}",
            f"5) memory of a device: about {m.total / 1e9:.2f} GB ({kinds})",
            f"6) disk: about {self.disk / 1e9:.2f} GB of checkpoints",
            *reading,
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
        config = resumed["config"]
        reason = "as the run that is resumed"
        batch = resumed["total_batch_size"]
        return Shape(config["depth"], config["max_seq_len"], batch, reason)
    depth, max_seq_len = settings["depth"], settings["max_seq_len"]
    if machine.device_type == "cuda":
        shape = gpu_shape(depth, vocab_size)
    elif not depends_on_speed(settings, machine, resumed):
        shape = Shape(depth, max_seq_len, settings["total_batch_size"], "as the settings say")
    else:
        def tokens_at(depth, max_seq_len):
            config = model_class.config_class.from_depth(depth, vocab_size, max_seq_len)
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
    resumed or extended; its shape and batch stay. text: the TextSize of the training text, or None.
    """
    on_gpu = machine.device_type == "cuda"
    # 1. the shape, how it reads the text, and a model of it that takes no memory
    most = most_tokens(text, budget, resumed)
    shape = choose_shape(settings, budget, machine, model_class, vocab_size, speed, resumed, most)
    if resumed:
        config = model_class.config_class(**resumed["config"])
    else:
        config = config_for(model_class, shape, vocab_size, settings["kv_heads"])
    model = build_on_meta(model_class, config)
    flops_per_token = model.flops_per_token(shape.max_seq_len)
    tokens_per_second = expected_speed(machine, flops_per_token)
    if depends_on_speed(settings, machine, resumed):
        tokens_per_second = speed(shape.depth, shape.max_seq_len)

    # 2. the batch
    size = machine.dtype_bytes, machine.ranks, machine.device_type
    limit = micro_batch_limit(model, machine.memory, *size)
    batch = choose_batch(
        shape.total_batch_size,
        shape.max_seq_len,
        machine.ranks,
        limit,
        shape.total_batch_size if resumed else settings["total_batch_size"],
        # the loader's position counts in micro-batches, so a resumed run keeps their size
        settings["device_batch_size"] or (resumed or {}).get("device_batch_size"),
    )

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
        config = config_for(
            model_class, shape, vocab_size, settings["kv_heads"], reading.repeated())
        model = build_on_meta(model_class, config)
    needed = memory(model, batch.micro_batch_size, *size)
    disk = (settings["keep"] + 2) * checkpoint_bytes(model)
    return Plan(
        budget, shape, batch, horizon, weight_decay, needed, steps, hours, disk, reading)


def expected_speed(machine, flops_per_token):
    """Training tokens per second of all ranks, from the measured rate of matmuls alone."""
    flops = machine.matmul_flops * machine.ranks * ASSUMED_SHARE[machine.device_type]
    return flops / flops_per_token


def expected_steps(horizon, steps_per_hour):
    """(steps, hours) of a Horizon at a speed."""
    if horizon.num_iterations:
        return horizon.num_iterations, horizon.num_iterations / steps_per_hour
    hours = horizon.minutes / 60
    if horizon.max_steps:
        hours = min(hours, horizon.max_steps / steps_per_hour)
    return hours * steps_per_hour, hours
