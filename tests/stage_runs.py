"""Runs of whole stages for the tests: in a process of their own, or in a fork, which is faster.

The fixtures that make them, `stages` and `trained`, are in conftest.py.
"""
import json
import os
import socket
import subprocess
import sys

import torch

from conftest import ROOT, last_json

TINY = ("--depth=1", "--max_seq_len=128", "--total_batch_size=512", "--compile=0")
TINY_CHAT = ("--compile=0", "--device_batch_size=2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
# A second thread is no help to matrices as small as these. Compiling the sources of torch's
# compiler and of sympy takes ten seconds of every stage where an environment forbids Python to keep
# the result.
QUICK = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false", "PYTHONDONTWRITEBYTECODE": ""}


class ForkServer:
    """The process of fork_server.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env={**os.environ, **QUICK},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def run(self, **request):
        """The exit codes of a request's processes."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Stages:
    """Runs stages with the base directory `base`.

    run() and fork() return (standard output, standard error) of a command that must end with
    `status`; record() and fork_record() its JSON line; refusal() the one line that bad input gets.
    """

    def __init__(self, base, server):
        self.base = base
        self.server = server
        self.environment = {"NANOCHAT_BASE_DIR": str(base), **QUICK}

    def run(self, *words, launcher=("-m",), status=0):
        """A command as its user runs it."""
        process = subprocess.Popen(
            [sys.executable, *launcher, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            text=True,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, out + err
        return out, err

    def record(self, *words, **options):
        return last_json(self.run(*words, **options)[0])

    def fork(self, *words, status=0, faults=None, ranks=1):
        """As run(), faster; with batches that go wrong as faults.py says, and on several ranks."""
        environment = dict(self.environment)
        if faults:
            environment["FAULTS"] = json.dumps(faults)
        environments = [environment]
        if ranks > 1:
            environments = [{**environment, **variables} for variables in rank_variables(ranks)]
        out, err = self.base / "forked.out", self.base / "forked.err"
        statuses = self.server.run(
            words=list(map(str, words)), environments=environments, out=str(out), err=str(err))
        texts = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        assert set(statuses) == {status}, (statuses, *texts)
        return texts

    def fork_record(self, *words, **options):
        return last_json(self.fork(*words, **options)[0])

    def refusal(self, *words):
        _, err = self.fork(*words, status=2)
        assert err.count("\n") == 1 and err.startswith("error: "), err
        return err

    def folder(self, stage, tag):
        """The checkpoints of a stage: base, mid or chatsft."""
        return self.base / f"{stage}_checkpoints" / tag


def rank_variables(ranks):
    """What torchrun tells each of the ranks of one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


# ------------------------------------------------------------------------------------------------
# what a run left

def meta_of(folder, step):
    return json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))


def weights_of(folder, step):
    return torch.load(folder / f"model_{step:06d}.pt", weights_only=True)


def rows_of(folder, key):
    """The rows of log.jsonl that have a key."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if key in row]


def losses_of(folder):
    return {row["step"]: row["loss"] for row in rows_of(folder, "loss")}


def damage(path):
    """Cut the end of a file off."""
    path.write_bytes(path.read_bytes()[:-7])


def all_finite(weights):
    return all(value.isfinite().all() for value in weights.values())


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_values(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
