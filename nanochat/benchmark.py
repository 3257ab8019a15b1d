"""What the training benchmarks share: sizes, training steps, times, peaks and memory.

The scripts simple_train_benchmark, transformer_benchmark and multigpu_benchmark hold the loops;
docs/benchmarks.md explains each number. Nothing here needs a tokenizer or data, so that the
scripts run in an image in which nothing is installed but torch.
"""
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.adamw import AdamW
from nanochat.attention import choose_kernel
from nanochat.checkpoint_manager import build_model, is_consistent, is_possible
from nanochat.common import UserError, all_reduce_max, print0
from nanochat.configurator import read_config
from nanochat.gpt import GPTConfig
from nanochat.hardware import (
    CGROUPS,
    cpu_name,
    is_out_of_memory,
    known_device,
    memory_limit,
    synchronize,
    text_of,
)
from nanochat.memory import MEMORY_SHARE, build_on_meta, memory
from nanochat.muon import Muon
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.plan import largest_divisor
from nanochat.probes import parse_meminfo
from nanochat.variants import MODEL_CLASSES, TRAINABLE

# --------------------------------------------------------------------------------------------------
# sizes

VOCAB_SIZE = 50257  # GPT-2's


class Size(NamedTuple):
    """A row of SIZES: the shape, the documented batch, the documented number of parameters."""
    depth: int
    width: int
    heads: int
    batch_size: int    # sequences
    seq_len: int       # tokens of a sequence
    documented: float  # parameters


# Shapes of the GPT, whose MLP is 4 x width, that have the documented number of parameters when
# embedding and head are counted as one matrix (tests/test_benchmarks.py: within 1 %). medium, large
# and xl are GPT-2's small, medium and large. The batches of the large sizes are documented, that of
# the small ones is the documented command's.
SIZES = {
    # name       depth width heads batch length documented
    "small":  Size(6,   384,  6, 8, 1024, 30e6),
    "medium": Size(12,  768, 12, 8, 1024, 124e6),
    "large":  Size(24, 1024, 16, 8, 1024, 354e6),
    "xl":     Size(36, 1280, 20, 8, 1024, 773e6),
    "1.5b":   Size(48, 1536, 12, 4,  512, 1.44e9),
    "3b":     Size(32, 2560, 20, 2,  512, 2.65e9),
    "7b":     Size(25, 4096, 32, 8, 1024, 5.24e9),
    "13b":    Size(33, 4992, 39, 4, 1024, 10.12e9),
}
LARGE = ("1.5b", "3b", "7b", "13b")


def chosen_sizes(model, full, large_models):
    """Names of the sizes to measure, in the order of SIZES.

    model: one name, or "" for several: those below 1.5b, which is also what `full` means;
    `large_models`: the others; both: all. UserError for an unknown name, and for a name beside
    full or large_models.
    """
    if model and model not in SIZES:
        raise UserError(f"model={model} does not exist: choose from {', '.join(SIZES)}")
    if model and (full or large_models):
        raise UserError(f"model={model} is one size, full and large_models are several: "
                        "leave one of them out")
    if model:
        return [model]
    wanted = []
    for name in SIZES:
        is_wanted = large_models if name in LARGE else full or not large_models
        if is_wanted:
            wanted.append(name)
    return wanted


class Case(NamedTuple):
    """What is trained: a class of MODEL_CLASSES, its config, and sequences per step and rank."""
    name: str
    model_class: str
    config: object
    batch_size: int


def case_of_size(name, batch_size=None, seq_len=None):
    """The Case of a name in SIZES. batch_size, seq_len: in place of the documented ones."""
    size = SIZES[name]
    config = GPTConfig(
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        kv_heads=size.heads,
        vocab_size=VOCAB_SIZE,
        max_seq_len=seq_len or size.seq_len,
    )
    return Case(name, "gpt", config, batch_size or size.batch_size)


def case_of_file(path, batch_size=None, seq_len=None):
    """The Case of a config file: a `model` of nanochat/variants, and fields of its config.

    `depth` is needed, the other fields follow from it. batch_size, seq_len: in place of the file's
    device_batch_size and max_seq_len, which are else 8 and 1024. Prints what in the file a
    benchmark does not use. UserError for a model or a shape that cannot be.
    """
    if not Path(path).is_file():
        raise UserError(f"config={path} does not exist: name a file of lines like depth = 12")
    given = {name: value for name, value in read_config(path) if value is not None}
    model_class = given.pop("model", "gpt")
    if model_class not in TRAINABLE:
        raise UserError(f"{path}: model={model_class} does not exist: choose from "
                        f"{', '.join(TRAINABLE)}")
    config_class = MODEL_CLASSES[model_class].config_class
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    shape = {name: given.pop(name) for name in list(given) if name in fields}
    of_file = given.pop("device_batch_size", 8)
    case = Case(Path(path).stem, model_class, None, batch_size or of_file)
    if seq_len:
        shape["max_seq_len"] = seq_len

    wrong = wrong_fields(case, shape, fields)
    if not wrong:
        config = config_with(config_class, shape)
        if is_consistent(config):
            if given:
                print0(f"of {path}, not used here: {', '.join(sorted(given))}")
            return case._replace(config=config)
        wrong = [f"width={config.width}, heads={config.heads}, kv_heads={config.kv_heads}"]
    raise UserError(f"{path} does not describe a {model_class}: {', '.join(wrong)}")


def wrong_fields(case, shape, fields):
    """What in the shape, {name: value}, and in the batch of a file cannot be, as words."""
    wrong = [
        f"{name}={value}" for name, value in shape.items() if not is_possible(value, fields[name])
    ]
    if not isinstance(case.batch_size, int) or case.batch_size < 1:
        wrong.append(f"device_batch_size={case.batch_size}")
    if "depth" not in shape:
        wrong.append("no depth")
    if "width" in shape and "heads" not in shape:
        wrong.append(f"width={shape['width']} without heads")
    return wrong


def config_with(config_class, shape):
    """A config of these fields; what is missing is that of the depth, and kv_heads the heads."""
    usual = config_class.from_depth(
        shape["depth"], shape.get("vocab_size", VOCAB_SIZE), shape.get("max_seq_len", 1024))
    kv_heads = shape.get("heads", usual.kv_heads)
    return dataclasses.replace(usual, **{"kv_heads": kv_heads, **shape})


# --------------------------------------------------------------------------------------------------
# does it fit

# muon: Muon and AdamW by role, as in training; adamw: AdamW for all parameters, to compare
# with the documented figures
OPTIMIZERS = ("muon", "adamw")


def choose_optimizers(model, optimizer):
    """Give a model the table of one of OPTIMIZERS. Hashed tables keep their own, which alone takes
    sparse gradients."""
    if optimizer == "muon":
        return
    table = {}
    for role, recipe in model.optimizers.items():
        if recipe.optimizer is Muon:
            recipe = recipe._replace(optimizer=AdamW, lr=0.05)  # 0.001, with the usual setting
        table[role] = recipe
    model.optimizers = table


class Setup(NamedTuple):
    """How a Case is trained: one of OPTIMIZERS, a kind of Layout, and what prepare() does."""
    optimizer: str = "muon"
    parallel: str = "replicated"
    compile: bool = True
    checkpoint_activations: bool = False
    fp8: object = None      # an Fp8Recipe


def planned_memory(case, micro_batch_size, setup, compute):
    """The Memory (memory.py) of a Case on each of compute's devices. compute: a Compute."""
    model = build_on_meta(MODEL_CLASSES[case.model_class], case.config)
    choose_optimizers(model, setup.optimizer)
    return memory(
        model,
        micro_batch_size,
        compute.dtype.itemsize,
        compute.world_size,
        compute.device.type,
        parallel=setup.parallel,
        checkpoint_activations=setup.checkpoint_activations,
        compiled=setup.compile,
    )


def fitting_micro_batch(case, free, setup, compute):
    """(sequences per pass that fit, their Memory): the largest divisor of the batch that does.

    free: bytes, None where they are not known: then all are said to fit. 0 sequences where not even
    one fits, with the Memory of one.
    """
    size = case.batch_size
    while True:
        needed = planned_memory(case, size, setup, compute)
        if free is None or needed.total <= MEMORY_SHARE * free:
            return size, needed
        if size == 1:
            return 0, needed
        size = largest_divisor(case.batch_size, size - 1)


def does_not_fit(case, needed, free, seq_len="--seq-len"):
    """One line that says by how much a Case is too large, and what would help.

    needed: the Memory of one sequence. seq_len: what the script calls that setting.
    """
    return (f"{case.name} does not fit: one sequence of {case.config.max_seq_len} tokens needs "
            f"{needed.total / 1e9:.1f} GB ({needed.describe()}), and "
            f"{100 * MEMORY_SHARE:.0f} % of the {free / 1e9:.1f} GB that are free are "
            f"{MEMORY_SHARE * free / 1e9:.1f}: take a smaller model or a shorter {seq_len}, or end "
            "what else uses the memory")


def problem_of(row):
    """Why a benchmark's row has no speed: "skipped" before, "failed" while it was measured. None
    where it has one."""
    return row.get("skipped") or row.get("failed")


def attempt(measure, *arguments):
    """(what measure(*arguments) returns, whether it ran out of memory). Other errors are raised."""
    try:
        return measure(*arguments), False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None, True


def free_memory(device):
    """Bytes that are free on a device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = parse_meminfo(text_of(Path("/proc/meminfo"))).get("MemAvailable")
    return None if available is None else min(available, cgroup_room())


def memory_of_a_rank(compute):
    """Bytes that are free for each rank, the same number on all of them, which all must call it;
    None where that is not known."""
    free = free_memory(compute.device)
    if free is None:
        return None
    if compute.device.type == "cpu":
        free //= compute.world_size  # they share it
    return -all_reduce_max(-free)[0]  # the fullest device decides for all


def cgroup_room(root=CGROUPS):
    """Bytes that a container's limit leaves, infinite without a limit, and with one of version 1.

    What the kernel may drop of its file cache does not count as used.
    """
    limit = memory_limit(root)
    try:
        used = int((root / "memory.current").read_text(encoding="utf-8"))
        lines = (root / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return math.inf
    cached = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
    return limit - used + sum(cached) if limit else math.inf


# --------------------------------------------------------------------------------------------------
# peaks

# A dtype -> the column of DEVICES with its peak. float16 has bfloat16's on every device in that
# table; of float32, and of TF32, no peak is listed.
PEAKS = {"fp16": "bf16", "float16": "bf16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8"}


def device_name(device):
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def peak_of(name, dtype):
    """Dense peak of a device in FLOP/s for a dtype, None where it is not known."""
    device, column = known_device(name), PEAKS.get(dtype)
    return getattr(device, column) if device and column else None


def peak_bandwidth(name):
    """Memory bandwidth of a device in bytes/s, None where it is not known."""
    device = known_device(name)
    return device.bandwidth if device else None


def share_of(rate, peak):
    """rate / peak, None where the peak is not known."""
    return rate / peak if peak else None


def percent(share):
    """
    >>> percent(0.4432), percent(None)
    ('44 %', 'unknown')
    """
    return "unknown" if share is None else f"{100 * share:.0f} %"


def tera(rate):
    """A rate in units of 10^12, with enough digits on a GPU and on a CPU.

    >>> tera(1.0223e15), tera(171.81e12), tera(6.12e10)
    ('1,022', '171.8', '0.061')
    """
    rate = rate / 1e12
    if rate >= 1000:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.3f}"


# --------------------------------------------------------------------------------------------------
# times

SAMPLE_SECONDS = 0.02   # a sample of measure_calls() is at least that long
MIN_SAMPLES = 5
PROGRESS_SECONDS = 2.0  # between two lines of progress


class Times(NamedTuple):
    """Seconds of a step or call. spread: the interquartile range as a share of the median."""
    median: float
    spread: float
    all: list


def summarize(seconds):
    """The Times of a list of seconds.

    >>> summarize([1.0, 2.0, 2.0, 2.0, 9.0])[:2]
    (2.0, 0.0)
    """
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Times(median, 0.0, list(seconds))
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(median, (high - low) / median, list(seconds))


def measure_calls(call, device, seconds):
    """Times of one call of a function that gives work to a device. seconds: to spend, about.

    The first call does not count. A sample is of so many calls that starting and waiting for them
    weighs little.
    """
    call()
    once = seconds_of(call, 1, device)
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-6)))
    samples = []
    deadline = time.perf_counter() + seconds
    while len(samples) < MIN_SAMPLES or time.perf_counter() < deadline:
        samples.append(seconds_of(call, calls, device) / calls)
    return summarize(samples)


def seconds_of(call, calls, device):
    """Seconds of that many calls, from an idle device to an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return time.perf_counter() - begin


READ_BYTES = 2**28  # more than any cache holds


def measure_read_bandwidth(device, seconds=1.0):
    """Bytes a second that the device reads from its memory, as a decode step reads its weights.

    The fastest of several reductions of a large tensor: which of them reaches the memory's rate,
    and which is bound by its arithmetic, differs from machine to machine.
    """
    x = torch.ones(READ_BYTES // 4, device=device)
    reductions = (torch.sum, torch.amax, torch.linalg.vector_norm)
    share = seconds / len(reductions)
    rates = []
    for reduction in reductions:
        times = measure_calls(lambda: reduction(x), device, share)
        rates.append(x.nbytes / times.median)
    return max(rates)


class Progress:
    """Lines on standard error, none sooner than two seconds after the one before."""

    def __init__(self):
        self.last = time.perf_counter()

    def say(self, text):
        now = time.perf_counter()
        if now - self.last >= PROGRESS_SECONDS:
            print(f"  {text}", file=sys.stderr, flush=True)
            self.last = now


# --------------------------------------------------------------------------------------------------
# training steps

class Step(NamedTuple):
    """One training step. passes: forward, backward and the reduction; update: the rest."""
    passes: float  # seconds
    update: float  # seconds
    loss: float    # nats per token

    @property
    def seconds(self):
        return self.passes + self.update


class Training:
    """A Case in training on random tokens: the real model, layout and optimizers.

    micro_batch_size: sequences per pass; less after a pass that ran out of memory.
    """

    def __init__(self, case, compute, micro_batch_size, setup):
        meta = {
            "model_class": case.model_class,
            "config": dataclasses.asdict(case.config),
            "dtype": str(compute.dtype).removeprefix("torch."),
        }
        self.network = build_model(meta, compute.device).train()
        choose_kernel(compute.device, compute.dtype)    # as training does
        prepare(self.network, setup.compile, setup.checkpoint_activations, setup.fp8)
        choose_optimizers(self.network, setup.optimizer)
        optimizers = self.network.setup_optimizers()
        self.layout = Layout(self.network, optimizers, setup.parallel)
        self.device = compute.device
        self.random = torch.Generator(compute.device).manual_seed(compute.rank)
        self.shape = case.batch_size, case.config.max_seq_len + 1
        self.micro_batch_size = micro_batch_size

    def step(self):
        """Take one training step on new tokens and wait for its end. Returns a Step."""
        vocab_size = self.network.config.vocab_size
        ids = torch.randint(
            vocab_size, self.shape, device=self.device, generator=self.random)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        synchronize(self.device)
        begin = time.perf_counter()

        # 1. forward, backward, and the average over ranks; reduce() waits for the device
        loss, self.micro_batch_size = accumulate_gradients(
            self.network,
            [(inputs, targets)],
            1 / targets.numel(),
            self.micro_batch_size,
            self.layout,
        )
        loss, grad_norm = self.layout.reduce(loss)
        reduced = time.perf_counter()

        # 2. update
        self.layout.apply(0.0, grad_norm)
        self.layout.zero_grad()
        synchronize(self.device)
        return Step(reduced - begin, time.perf_counter() - reduced, loss)


def default_warmup(device_type):
    """Steps that do not count: they compile, and make the optimizer's state. On a GPU one more, in
    which the allocator settles."""
    return 3 if device_type == "cuda" else 2


def default_iterations(device_type):
    """Steps that count where the user names no number."""
    return 20 if device_type == "cuda" else 5


def check_loss(loss):
    """RuntimeError where a loss is not finite: a device that computes nonsense has no speed."""
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss became {loss}: this device or its kernels compute nonsense, "
                           "so that its speed means nothing")


class Throughput(NamedTuple):
    """Rates of training, of all ranks together. FLOP/s with attention are 6 N and 6 (causal) or
    12 (square) x depth x width x T of attention for each token."""
    tokens_per_second: float
    flops_of_weights: float         # 6 N
    flops_with_attention: float     # causal: half of the square
    flops_with_square_attention: float


def throughput(network, tokens, seconds):
    """The Throughput of a step of so many tokens. network: also one on the meta device."""
    T = network.config.max_seq_len
    rate = tokens / seconds
    of_weights = 6 * network.matmul_parameters()
    causal = network.flops_per_token(T)
    square = causal + (causal - of_weights)
    return Throughput(rate, rate * of_weights, rate * causal, rate * square)


# --------------------------------------------------------------------------------------------------
# several ranks

def rank_counts(gpus, scaling_test, available, kind="GPUs"):
    """Numbers of ranks to measure: all or `gpus`, for a scaling test also 1, 2, 4, 8 below that.

    available: devices here, or cores where there is no GPU. UserError where gpus are more.
    """
    gpus = available if gpus is None else gpus
    if gpus > available:
        raise UserError(f"gpus={gpus}, and this machine has {available} {kind}: "
                        f"take --gpus={available} or fewer")
    if not scaling_test:
        return [gpus]
    return [count for count in (1, 2, 4, 8) if count < gpus] + [gpus]


def efficiency(tokens_per_second, ranks, of_one):
    """Share of `ranks` times the tokens per second of one rank; None where that is not known.

    >>> round(efficiency(101124, 8, 18381), 2)
    0.69
    """
    return tokens_per_second / (ranks * of_one) if of_one else None


class _Done:
    """Stands for the work of a collective that was skipped."""

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True


class Skipped:
    """What without_communication() has skipped: collectives, and the bytes of their larger side."""

    def __init__(self):
        self.collectives = 0
        self.bytes = 0

    def take(self, larger):
        self.collectives += 1
        self.bytes += larger.numel() * larger.element_size()


def _copy_parts(output, input):
    """Fill the output of a collective with this rank's own numbers. What is left as it was
    allocated could be slow to compute with (denormal numbers)."""
    if output.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        return  # in place: it holds numbers already
    source = input.detach().flatten()[:output.numel()]
    if source.numel() == 0:
        return
    copies = output.numel() // source.numel()
    filled = output.detach().view(-1)[:copies * source.numel()]
    filled.view(copies, -1).copy_(source)


@contextlib.contextmanager
def without_communication():
    """Within this context torch.distributed's collectives on tensors return at once. Yields a
    Skipped.

    The difference between a step with and a step without communication is what communication costs
    that no computation hides. The arithmetic of a step stays the same, its numbers do not: ranks
    use their own in place of all ranks'. A barrier still waits.
    """
    skipped = Skipped()

    def in_place(tensor, *args, async_op=False, **more):
        skipped.take(tensor)
        return _Done() if async_op else None

    def from_input(output, input, *args, async_op=False, **more):
        skipped.take(max(output, input, key=torch.Tensor.numel))
        _copy_parts(output, input)
        return _Done() if async_op else None

    stands_for = {
        "all_reduce": in_place,
        "broadcast": in_place,
        "reduce_scatter_tensor": from_input,
        "all_gather_into_tensor": from_input,
        "all_to_all_single": from_input,
        # what fully_shard of newer versions of torch calls
        "reduce_scatter_single": from_input,
        "all_gather_single": from_input,
    }
    originals = {name: getattr(dist, name) for name in stands_for if hasattr(dist, name)}
    try:
        for name in originals:
            setattr(dist, name, stands_for[name])
        yield skipped
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
