"""Runs commands in forks of one process that has imported torch.

    python -m tests.fork_server

Most of the time of a short command goes into importing torch. One process imports it here, and
every command is a fork of that process, which has computed nothing, so that there are no threads
yet that a fork would lose.

Each line of standard input is a request, a JSON object:

    words          the command line, the name of a module first
    environments   environment variables, one object for each process; two processes are two ranks
    out, err       files that take the output of all of them

The reply is one line, the exit codes as a JSON list. That of a process which a signal ended is the
signal's number, negative.
"""
import gc
import json
import os
import runpy
import signal
import sys

# torch does without triton on a CPU; imported, it complains at the end of a process that froze it
sys.modules["triton"] = None

# what the forks need not import again
import matplotlib  # noqa: F401
import numpy  # noqa: F401
import pyarrow.parquet  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo  # noqa: F401

TRAINING = ("scripts.base_train", "scripts.mid_train", "scripts.chat_sft", "scripts.chat_rl")
LONGEST_SECONDS = 300  # of a command; a longer one hangs, and SIGALRM ends it
SAMPLE_TOKENS = 2


def serve(requests):
    """Answer each line of `requests`."""
    for line in requests:
        request = json.loads(line)
        for path in (request["out"], request["err"]):
            open(path, "w", encoding="utf-8").close()
        children = [fork(request, variables) for variables in request["environments"]]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


def fork(request, variables):
    """Start one process of a request, and return its number."""
    child = os.fork()
    if child:
        return child

    signal.alarm(LONGEST_SECONDS)
    os.environ.update(variables)
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = request["words"]
    module = sys.argv[0]
    if module in TRAINING:
        take_shortcuts()
    if "FAULTS" in variables:
        from tests import faults
        faults.install()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit


def take_shortcuts():
    """Leave out what takes most of a short training run and is tested elsewhere.

    The machine's speed is assumed, samples have two tokens, and nobody waits for a network's files.
    """
    from nanochat import folders, hardware, samples
    sample_texts = samples.sample_texts

    def short_samples(model, tokenizer, prompts, max_new_tokens, ids_of=None, passages=None):
        return sample_texts(model, tokenizer, prompts, SAMPLE_TOKENS, ids_of, passages)

    def assume_matmul_flops(device, dtype):
        m, k, n = hardware.MATMUL_SHAPES["cpu"]
        for shape in ((m, k), (k, n)):
            torch.randn(shape, dtype=dtype)  # the random numbers that a measurement takes
        return 1e10

    folders.SHARE_SECONDS = 1.0
    samples.sample_texts = short_samples
    hardware.measure_matmul_flops = assume_matmul_flops


if __name__ == "__main__":
    assert torch.get_num_threads() == 1, "started with OMP_NUM_THREADS=1"
    gc.freeze()  # collecting what was imported takes a fork longer than a refusal
    serve(sys.stdin)
