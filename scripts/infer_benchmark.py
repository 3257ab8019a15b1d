"""How fast our engine and our server answer, by batch size and context.

    python -m scripts.infer_benchmark                                # random weights, depth 6
    python -m scripts.infer_benchmark --source=sft --batches=1,16 --contexts=512
    python -m scripts.infer_benchmark --server                       # chat_web under load
    python -m scripts.infer_benchmark --server --concurrency=32 --minutes=5
    python -m scripts.infer_benchmark --url=http://localhost:8000    # one that runs already

The engine alone, in this process. For each batch size and context, that many sequences of random
tokens are admitted at once:

    time to first token   from admitting the sequences to the first token of each
    step                  a decode step, which gives every sequence one token
    bandwidth             the bytes that a step must read (the weights once, and the keys and values
                          of all sequences) over its time, as a share of what this machine was
                          measured to read (nanochat/benchmark.py)

The server: started here as a process of its own, under the load of nanochat/load_test.py, whose
clients share the cores with it. Beside their figures stand how long /health took meanwhile, and the
server's memory at the beginning, in the middle and at the end. docs/benchmarks.md explains each
number; the last line is JSON.
"""
import contextlib
import dataclasses
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import requests

from nanochat.benchmark import (
    Progress,
    attempt,
    device_name,
    free_memory,
    measure_read_bandwidth,
    percent,
    problem_of,
    summarize,
)
from nanochat.checkpoint_manager import build_model, load_model
from nanochat.common import UserError, compute_init, print0
from nanochat.configurator import check_choices, configure, require
from nanochat.engine import WEIGHTS, serving_engine
from nanochat.fast_linear import can_multiply_fast
from nanochat.gpt import require_causal
from nanochat.hardware import compile_problem, text_of
from nanochat.load_test import (
    TITLES,
    Request,
    Server,
    base_of,
    figure_cells,
    find_model,
    how_counted,
    measured,
    median,
    open_session,
    percentile,
    requests_until,
    run_clients,
    words_for,
)
from nanochat.metrics import finish_stage
from nanochat.native_decode import can_decode_natively, native_problem
from nanochat.roofline import numbers
from nanochat.variants import MODEL_CLASSES, TRAINABLE

source = ""                 # measure a trained model: base, mid, sft or rl. Empty: random weights
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: the last
model = "gpt"               # the class of a model with random weights: gpt, lookup, mla, ...
depth = 6                   # and its layers
vocab_size = 32768          # and its vocabulary
batches = "1,2,4,8,16,32"   # sequences at a time
contexts = "128,512,1024"   # tokens of each prompt
tokens = 32                 # decode steps to measure for each batch size and context
temperature = 1.0           # of their sampling, among the 50 likeliest. 0: the likeliest token
server = False              # measure the server in place of the engine; of source, or of sft
url: str = None             # measure a server that runs already, with or without /v1
concurrency = "1,4,16,32"   # clients at a time
input = 128                 # tokens of a client's prompt
output = 64                 # longest answer in tokens
rounds = 3                  # requests that each client sends
minutes: float = None       # send requests for that long, in place of rounds
ignore_eos = False          # ask the server for full-length answers
weights = ""                # int8: weights of 8 bits; empty: those of the dtype
compile = True              # compile the decode step, and on a GPU capture it
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_TOKENS = 64     # of the prompts that come before those that are measured
MOST_TOKENS = 2**20     # of a context: more than any model here was trained for
START_SECONDS = 300     # that a server may take until it is ready
STOP_SECONDS = 30       # that it may take to end
HEALTH_SECONDS = 0.2    # between two requests of /health


# --------------------------------------------------------------------------------------------------
# the engine

class PlainTokenizer:
    """Stands in for a tokenizer: ids are made up here, and none of them ends a sequence or calls a
    tool, so that every sequence runs to its full length."""

    def __init__(self, size):
        self.size = size

    def get_vocab_size(self):
        return self.size

    def encode_special(self, name):
        return -1


def make_model(compute, max_seq_len):
    """(the model to measure, what to call it). max_seq_len: of one with random weights."""
    if source:
        network, _, meta = load_model(source, compute.device, "eval", model_tag, step)
        return network.cast_for_inference(compute.dtype), f"{source} {meta['tag']}"
    config = MODEL_CLASSES[model].config_class.from_depth(depth, vocab_size, max_seq_len)
    meta = {
        "model_class": model,
        "config": dataclasses.asdict(config),
        "dtype": str(compute.dtype).removeprefix("torch."),
    }
    network = build_model(meta, compute.device).eval()
    return network.cast_for_inference(compute.dtype), f"{model} of depth {depth}, random weights"


def make_engine(network, slots):
    """The Engine that is measured, for at most so many sequences at a time."""
    require_causal(network, "this benchmark of prefill and decode")
    tokenizer = PlainTokenizer(network.config.vocab_size)
    return serving_engine(network, tokenizer, None, slots, weights, compile, wait=True)


def require_compiler(network):
    """UserError where the decode step is to be compiled, and that is not possible."""
    problem = None
    if compile and can_decode_natively(network):
        problem = native_problem()
    elif compile and (can_multiply_fast(network.device) or network.device.type == "cuda"):
        problem = compile_problem(network.device)
    if problem:
        raise UserError(f"the decode step cannot be compiled ({problem}): --compile=0 measures it "
                        "as it is written")


def bytes_per_step(network, batch, context, matrix_bytes):
    """Bytes that a decode step reads: each matrix once, and the cache of every sequence.

    context: tokens in the cache of each. matrix_bytes: of all matrices. Of the embeddings, one row
    for each sequence is read, which counts for nothing.
    """
    return matrix_bytes + cache_bytes(network, batch, context)


def cache_bytes(network, batch, context):
    """Bytes of the keys and values of so many sequences with so many tokens each."""
    few = 64
    return batch * context * network.new_kv_cache(1, few).nbytes / few


def matrix_bytes_of(network, batch, parameters):
    """Bytes of the matrices that a step of `batch` sequences reads.

    Where torch compiles the step, int8 weights are read as such for one sequence alone
    (fast_linear.py).
    """
    is_int8 = weights == "int8" and (batch == 1 or can_decode_natively(network))
    return parameters * (1 if is_int8 else network.compute_dtype.itemsize)


def random_prompts(batch, context, size):
    """Lists of random ids below `size`, with nothing in common that a cached prefix could help."""
    generator = random.Random(f"{batch} {context}")
    return [[generator.randrange(size) for _ in range(context)] for _ in range(batch)]


def run_to_first_tokens(engine, prompts):
    """Seconds until each prompt has its first token, a sorted list."""
    sequences = [engine.new_sequence(prompt, max_new_tokens=1) for prompt in prompts]
    begin = time.perf_counter()
    for sequence in sequences:
        engine.admit(sequence)
    seconds = []
    try:
        while len(seconds) < len(sequences):
            engine.step()
            begun = sum(len(sequence.tokens) for sequence in sequences)
            seconds += [time.perf_counter() - begin] * (begun - len(seconds))
    finally:
        for sequence in sequences:
            engine.retire(sequence)
    return seconds


def run_decode_steps(engine, prompts, steps):
    """Seconds of up to `steps` decode steps in each of which every prompt got a token.

    The prompts may need several steps until all of them are in the cache; none of those counts.
    """
    limit = engine.max_seq_len - len(prompts[0])
    options = {"max_new_tokens": limit, "temperature": temperature}
    sequences = [engine.new_sequence(prompt, **options) for prompt in prompts]
    for sequence in sequences:
        engine.admit(sequence)
    seconds = []
    try:
        while len(seconds) < steps and not any(s.finish_reason for s in sequences):
            all_run = all(sequence.tokens for sequence in sequences)
            begin = time.perf_counter()
            found = engine.step()
            if all_run and len(found) == len(sequences):
                seconds.append(time.perf_counter() - begin)
    finally:
        for sequence in sequences:
            engine.retire(sequence)
    return seconds


def measure_engine(engine, batch, context):
    """(seconds to the first tokens, seconds of the decode steps) of so many sequences."""
    prompts = random_prompts(batch, context, engine.model.config.vocab_size)
    first = run_to_first_tokens(engine, prompts)
    run_decode_steps(engine, prompts, 1)    # at a new length a GPU captures its first step
    return first, run_decode_steps(engine, prompts, tokens)


def warmed_up(network, batch):
    """An Engine for a batch size, which has taken its first steps: those allocate and compile.

    MemoryError where its cache is larger than the memory that is free: a CPU's would be granted,
    and the system would end the process that uses it.
    """
    needed = cache_bytes(network, batch, network.config.max_seq_len)
    free = free_memory(network.device)
    if free is not None and needed > free:
        raise MemoryError
    engine = make_engine(network, batch)
    context = min(WARM_UP_TOKENS, engine.max_seq_len // 2)
    run_decode_steps(engine, random_prompts(batch, context, network.config.vocab_size), 2)
    return engine


def rows_of_batch(network, batch, lengths, bandwidth, matrix_bytes):
    """Yield the row of engine_row() for each context. The cache of the engine goes with it."""
    engine, out_of_memory = attempt(warmed_up, network, batch)
    for context in lengths:
        if out_of_memory:
            yield {"batch": batch, "context": context, "failed": "out of memory"}
        else:
            yield engine_row(engine, batch, context, bandwidth, matrix_bytes)


def engine_row(engine, batch, context, bandwidth, matrix_bytes):
    """The figures of a batch size and a context as a dict; "skipped" or "failed" and why where
    there are none."""
    row = {"batch": batch, "context": context}
    if context + tokens > engine.max_seq_len:
        return {**row, "skipped": f"the model's context is {engine.max_seq_len} tokens"}
    result, out_of_memory = attempt(measure_engine, engine, batch, context)
    if out_of_memory:
        return {**row, "failed": "out of memory"}
    first, seconds = result
    if not seconds:
        return {**row, "failed": "no decode step had all sequences at once"}
    steps = summarize(seconds)
    size = bytes_per_step(engine.model, batch, context + tokens / 2, matrix_bytes)
    return {
        **row,
        "ttft": statistics.median(first),
        "ttft_worst": first[-1],
        "prefill_tokens_per_second": batch * context / first[-1],
        "step_seconds": steps.median,
        "spread": steps.spread,
        "tokens_per_second": batch / steps.median,
        "bytes_per_step": size,
        "share_of_bandwidth": size / steps.median / bandwidth,
    }


ENGINE_HEAD = """\
| batch | context | TTFT, ms: median | worst | prefill, tokens/s | step, ms | spread | tokens/s | \
of bandwidth |
|---|---|---|---|---|---|---|---|---|"""


def describe(row):
    """A line of the engine's table."""
    head = f"| {row['batch']} | {row['context']} |"
    if problem_of(row):
        return f"{head} {problem_of(row)} | | | | | | |"
    cells = [
        f"{1000 * row['ttft']:,.1f}",
        f"{1000 * row['ttft_worst']:,.1f}",
        f"{row['prefill_tokens_per_second']:,.0f}",
        f"{1000 * row['step_seconds']:,.2f}",
        percent(row["spread"]),
        f"{row['tokens_per_second']:,.0f}",
        percent(row["share_of_bandwidth"]),
    ]
    return f"{head} {' | '.join(cells)} |"


def benchmark_engine(settings):
    """Measure every batch size at every context, and print a line for each."""
    # 1) what was asked for, and on what
    started = time.perf_counter()
    sizes = numbers(batches, "batches")
    lengths = numbers(contexts, "contexts")
    compute = compute_init(device_type, dtype)
    network, title = make_model(compute, max(lengths) + 2 * tokens)
    require_compiler(network)
    parameters = network.matmul_parameters()    # before make_engine() replaces the matrices
    matrix_bytes = [matrix_bytes_of(network, batch, parameters) for batch in sizes]
    bandwidth = measure_read_bandwidth(compute.device)
    name, dtype_name = device_name(compute.device), str(compute.dtype).removeprefix("torch.")
    print0(f"{title}, {parameters / 1e6:,.1f} M weights in {weights or dtype_name}, on {name}, "
           f"which reads {bandwidth / 1e9:,.1f} GB/s; {tokens} decode steps of each")

    # 2) one batch size after the other, each line as soon as it is known
    rows = []
    progress = Progress()
    print0(ENGINE_HEAD)
    for batch, read in zip(sizes, matrix_bytes):
        for row in rows_of_batch(network, batch, lengths, bandwidth, read):
            rows.append(row)
            print0(describe(row))
            progress.say(f"{len(rows)} of {len(sizes) * len(lengths)} measured")

    # 3) for machines
    if all(problem_of(row) for row in rows):
        raise UserError(f"nothing could be measured ({problem_of(rows[0])}): take smaller "
                        "--batches or --contexts")
    finish_stage(
        "infer_benchmark",
        time.perf_counter() - started,
        settings,
        model=title,
        device=name,
        dtype=dtype_name,
        parameters=parameters,
        bytes_per_second=bandwidth,
        rows=rows,
    )


# --------------------------------------------------------------------------------------------------
# the server

def server_command(port):
    """The words that start our server."""
    words = [sys.executable, "-m", "scripts.chat_web", f"--port={port}"]
    given = {
        "source": source or "sft",
        "model_tag": model_tag,
        "step": step,
        "device_type": device_type,
        "dtype": dtype,
        "weights": weights,
        "compile": None if compile else 0,
    }
    return words + [f"--{key}={value}" for key, value in given.items() if value not in (None, "")]


def free_port():
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_server():
    """Start our server, wait until it is ready, and end it afterwards. Yields (url, process).

    UserError where it ends before; its own error stands on standard error.
    """
    port = free_port()
    process = subprocess.Popen(server_command(port), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, process)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(address, process):
    """Wait until a server answers. UserError where its process ends before, or it takes too long.

    A server without /ready answers 404 there, and nothing before its model is loaded.
    """
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise UserError(f"the server ended with status {process.returncode} before it was "
                            "ready: its own message stands above")
        with contextlib.suppress(requests.RequestException), open_session(address) as session:
            if session.get(f"{address}/ready", timeout=5).status_code in (200, 404):
                return
        time.sleep(0.1)
    raise UserError(f"the server was not ready after {START_SECONDS} s: start it by hand, and name "
                    "it with --url")


def memory_of(process):
    """Bytes that a process has in memory; None where the system does not tell, or without one."""
    if process is None:
        return None
    status = text_of(Path(f"/proc/{process.pid}/status"))
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


class HealthProbe:
    """Asks a server for /health again and again, in a thread.

    seconds: how long each answer took; failures: how many were none; memory: of the server's
    process each time, where it is known.
    """

    def __init__(self, base, process=None):
        self.address = base.removesuffix("/v1") + "/health"
        self.process = process
        self.seconds, self.memory = [], []
        self.failures = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()

    def _run(self):
        with open_session(self.address) as session:
            is_over = False
            while not is_over:
                begin = time.perf_counter()
                try:
                    answered = session.get(self.address, timeout=60).ok
                except requests.RequestException:
                    answered = False
                self.seconds.append(time.perf_counter() - begin)
                self.failures += not answered
                self.memory.append(memory_of(self.process))
                is_over = self.stopped.wait(HEALTH_SECONDS)


def load_of(target, words, clients):
    """For each client the requests that it sends: `rounds` of them, or for `minutes`."""
    if minutes is None:
        return [
            [Request(target, words, output) for _ in range(rounds)] for _ in range(clients)
        ]
    deadline = time.perf_counter() + 60 * minutes
    return [requests_until(deadline, target, words, output) for _ in range(clients)]


def server_row(target, words, clients, process):
    """The figures of so many clients at a time as a dict."""
    with HealthProbe(target.base, process) as probe:
        done = run_clients(target, load_of(target, words, clients))
    return {
        **measured(done, clients),
        "health": median(probe.seconds),
        "health_p95": percentile(probe.seconds, 0.95),
        "health_worst": max(probe.seconds, default=None),
        "health_failures": probe.failures,
        "health_over_100_ms": sum(seconds > 0.1 for seconds in probe.seconds),
        "health_requests": len(probe.seconds),
        "memory_before": probe.memory[0],
        "memory_middle": probe.memory[len(probe.memory) // 2],
        "memory_after": probe.memory[-1],
    }


def in_units(value, scale, decimals):
    """A figure in its unit, "" where it is not known."""
    return "" if value is None else f"{value * scale:,.{decimals}f}"


def server_table(rows):
    """Yield the lines of the server's table."""
    titles = ["at a time", *TITLES, "/health, ms: median", "worst", "memory, MB"]
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        memory = [row[f"memory_{when}"] for when in ("before", "middle", "after")]
        cells = [
            str(row["concurrency"]),
            *figure_cells(row),
            in_units(row["health"], 1000, 1),
            in_units(row["health_worst"], 1000, 1),
            ", ".join(in_units(size, 1e-6, 0) for size in memory if size),
        ]
        yield f"| {' | '.join(cells)} |"


def benchmark_server(settings, address, process):
    """Measure every number of clients. process: the server's, None for one that ran already."""
    # 1) the server, and how long its prompts must be
    started = time.perf_counter()
    base = base_of(address)
    target = Server(base, find_model(base), ignore_eos)
    words = words_for(target, input)
    how_long = f"{rounds} from each client" if minutes is None else f"for {minutes:g} minutes"
    print0(f"{target.model} at {base}: prompts of {input} tokens, answers of at most {output}, "
           f"{how_long}")

    # 2) the load
    rows = []
    for clients in numbers(concurrency, "concurrency"):
        rows.append(server_row(target, words, clients, process))

    # 3) for people, then for machines
    print0("\n" + "\n".join(server_table(rows)) + "\n")
    print0(how_counted(rows))
    slow = sum(row["health_over_100_ms"] for row in rows)
    print0(f"/health took more than 100 ms {slow} of {sum(row['health_requests'] for row in rows)} "
           "times. Memory is that at the beginning, in the middle and at the end.")
    failures = sum(row["health_failures"] for row in rows)
    if failures:
        print0(f"/health did not answer with 200 {failures} times")
    finish_stage(
        "infer_benchmark",
        time.perf_counter() - started,
        settings,
        model=target.model,
        rows=rows,
    )


def check_settings(settings):
    """UserError for settings that can be refused before anything is measured."""
    require(settings, 1, "depth", "vocab_size", "tokens", "input", "output", "rounds")
    check_choices(settings, model=TRAINABLE, weights=WEIGHTS)
    if source and model != "gpt":
        raise UserError(f"source={source} is a trained model, which has a class of its own: leave "
                        f"out --model={model}, or --source for random weights")
    for name in ("batches", "contexts", "concurrency"):
        numbers(settings[name], name)
    if max(numbers(contexts, "contexts")) > MOST_TOKENS:
        raise UserError(f"contexts={contexts}: a context may have {MOST_TOKENS:,} tokens at most")
    if minutes is not None and not minutes > 0:
        raise UserError(f"minutes={minutes} must be more than 0")
    if server and source == "base":
        raise UserError("a base model holds no conversations: measure --source=sft, or the engine "
                        "alone without --server")


def main(settings):
    check_settings(settings)
    if url:
        benchmark_server(settings, url, None)
    elif server:
        with running_server() as (address, process):
            benchmark_server(settings, address, process)
    else:
        benchmark_engine(settings)


if __name__ == "__main__":
    main(configure(globals()))
