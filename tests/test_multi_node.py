"""Several ranks: one that dies ends the others, and two machines train as one.

The two machines are two torchruns on this one, which find each other as two machines do
(docs/multi-node.md).
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from torch.distributed.run import parse_args

from conftest import ROOT, last_json
from nanochat.checkpoint import complete_steps
from stage_runs import TINY, Stages, losses_of, rank_variables

DEAD = re.compile(r"^error: rank (\d) \(host \S+, pid (\d+)\) (.*): the other ranks end, too; .*$",
                  re.M)
MINUTE = 60.0
NO_END = "--num_iterations=100000"


@pytest.fixture(scope="module")
def base(stages, text):
    """A function that gives the words of a training command, and the folder of its run."""
    def command(tag, *settings):
        words = (
            "scripts.base_train", f"--data={text}", *TINY, "--eval_every=0", "--save_every=2",
            f"--model_tag={tag}", *settings)
        return words, stages.folder("base", tag)
    return command


def fork(stages, words, ranks=2, others=(), **faults):
    """(exit statuses, standard error) of forked ranks.

    others: environment variables of each rank, besides torchrun's.
    """
    out, err = stages.base / "forked.out", stages.base / "forked.err"
    environments = []
    for variables, more in zip(rank_variables(ranks), others or [{}] * ranks):
        own = {"FAULTS": json.dumps(faults), **variables, **more}
        environments.append({**stages.environment, **own})
    statuses = stages.server.run(
        words=list(map(str, words)), environments=environments, out=str(out), err=str(err))
    return statuses, err.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# ranks of one machine

@pytest.fixture(scope="module")
def killed(stages, base):
    """(the words, the folder, exit statuses, standard error) of a run whose last rank is killed."""
    words, folder = base("standalone", NO_END)
    return words, folder, *fork(stages, words, **{"9": "kill last"})


# docs/traps.md: dead-rank
def test_the_ranks_of_a_killed_one_end_with_its_name_in_one_line(killed):
    _, _, statuses, err = killed
    assert statuses == [1, -signal.SIGKILL]
    assert [found[:1] + found[2:] for found in DEAD.findall(err)] == [("1", "has died")]
    assert "Traceback" not in err


def test_the_checkpoints_of_a_run_that_lost_a_rank_are_resumed(killed, stages):
    words, folder, _, _ = killed
    step = complete_steps(folder)[-1]
    again = (*words[:-1], f"--num_iterations={step + 2}", "--resume")
    assert stages.fork_record(*again, ranks=2)["steps"] == step + 2


def test_an_error_of_one_rank_is_named_by_the_others(stages, base):
    words, _ = base("buggy", NO_END)
    statuses, err = fork(stages, words, **{"2": "fail last"})
    assert statuses == [1, 1]
    assert [found[2] for found in DEAD.findall(err)] == ["has failed: ArithmeticError: a bug"]
    assert err.count("Traceback") == 1, "that of the rank with the bug"


# docs/traps.md: swallowed-error
def test_an_error_of_all_ranks_and_a_run_that_ends_name_none(stages, base):
    words, _ = base("quiet", "--num_iterations=2")
    _, err = stages.fork(*words, ranks=2)
    assert not DEAD.search(err)
    _, err = stages.fork(*words, "--resume_from_checkpoint=77", status=2, ranks=2)
    assert not DEAD.search(err)
    assert err.count("error: step 77 is not in ") == 2, "each rank says what is wrong"


# ------------------------------------------------------------------------------------------------
# two machines

def copies_of(folder, tmp_path):
    """Variables of two machines, each with a copy of the base directory of its own."""
    machines = []
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
        machines.append({
            "NANOCHAT_BASE_DIR": str(tmp_path / name), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    return machines


def test_machines_that_share_no_folder_are_told_that_checkpoints_need_one(stages, base, tmp_path):
    words, _ = base("alone", "--num_iterations=2")
    statuses, err = fork(stages, words, others=copies_of(stages.base, tmp_path))
    assert statuses == [2, 2] and not DEAD.search(err)
    assert len(err.splitlines()) == 2
    for line in err.splitlines():
        assert line.startswith("error: rank 1 does not see what rank 0 writes to ")
        assert "NANOCHAT_BASE_DIR" in line


def test_machines_that_share_their_checkpoints_alone_must_have_the_same_tokenizer(
        stages, base, text, tmp_path):
    machines = copies_of(stages.base, tmp_path)
    shutil.rmtree(tmp_path / "two" / "base_checkpoints", ignore_errors=True)
    (tmp_path / "one" / "base_checkpoints").mkdir(exist_ok=True)
    (tmp_path / "two" / "base_checkpoints").symlink_to(tmp_path / "one" / "base_checkpoints")
    words, _ = base("copied", "--num_iterations=3", "--resume")
    for faults, ended in (({"2": "interrupt"}, 130), ({}, 0)):
        statuses, err = fork(stages, words, others=machines, **faults)
        assert statuses == [ended, ended], err

    shutil.rmtree(tmp_path / "two" / "tokenizers")
    shutil.rmtree(tmp_path / "two" / "tokenizer")
    other = Stages(tmp_path / "two", stages.server)
    other.fork("scripts.tok_train", f"--data={text}", "--vocab_size=400")
    words, _ = base("other", "--num_iterations=2")
    statuses, err = fork(stages, words, others=machines)
    assert statuses == [2, 2] and err.count("error: the ranks differ in the tokenizer") == 2


@contextlib.contextmanager
def two_nodes(stages, *words):
    """The torchruns of two machines with a rank each, and the files of their output."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = (
        "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=nanochat")
    nodes, paths = [], []
    for node in range(2):
        path = stages.base / f"node{node}.txt"
        with open(path, "w", encoding="utf-8") as file:
            nodes.append(subprocess.Popen(
                [sys.executable, "-m", *launcher, f"--node_rank={node}", "-m", words[0], "--",
                 *map(str, words[1:])],
                cwd=ROOT,
                env={**os.environ, **stages.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            ))
        paths.append(path)
    try:
        yield nodes, paths
    finally:
        for node in nodes:
            if node.poll() is None:
                node.terminate()
                node.wait()


def test_the_documented_command_is_one_that_torchrun_reads_as_that_of_two_machines():
    page = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    command = re.search(r"^(torchrun .*?[^\\])$", page, re.M | re.S)[1]
    words = shlex.split(command.replace("\\\n", " "))
    given = parse_args(words[1:])
    assert (given.nnodes, given.nproc_per_node, given.rdzv_backend) == ("2", "8", "c10d")
    assert given.rdzv_endpoint == "gpu1:29500" and given.rdzv_id == "run7"
    assert given.module and given.training_script == "scripts.base_train"
    assert given.training_script_args[-1] == "--depth=20"


def texts_of(paths):
    return [path.read_text(encoding="utf-8") for path in paths]


@pytest.fixture(scope="module")
def cut(stages, base):
    """A run on two machines whose rank 0 is killed: (words, folder, statuses, seconds, texts)."""
    words, folder = base("nodes", NO_END)
    with two_nodes(stages, *words) as (nodes, paths):
        while len(complete_steps(folder)) < 3:
            assert all(node.poll() is None for node in nodes), texts_of(paths)
            time.sleep(0.1)
        os.kill(int((folder / ".lock").read_text(encoding="utf-8")), signal.SIGKILL)
        killed_at = time.monotonic()
        statuses = [node.wait(300) for node in nodes]
        seconds = time.monotonic() - killed_at
    return words, folder, statuses, seconds, texts_of(paths)


def test_two_machines_take_the_steps_of_two_ranks_of_one(cut, killed):
    _, folder, *_ = cut
    here = losses_of(folder)
    there = losses_of(killed[1])
    assert [here[step] for step in range(1, 8)] == pytest.approx(
        [there[step] for step in range(1, 8)], abs=1e-6)


def test_the_machine_of_a_killed_rank_ends_the_other_within_a_minute_with_its_name(cut):
    _, _, statuses, seconds, texts = cut
    assert statuses == [1, 1] and seconds < MINUTE
    dead = [DEAD.findall(text) for text in texts]
    assert sorted(len(found) for found in dead) == [0, 1], texts
    [[(rank, _, what)]] = [found for found in dead if found]
    assert (rank, what) == ("0", "has died")


def test_a_run_on_two_machines_is_resumed_by_both(cut, stages):
    words, folder, *_ = cut
    step = complete_steps(folder)[-1]
    again = (*words[:-1], f"--num_iterations={step + 2}", "--resume")
    with two_nodes(stages, *again) as (nodes, paths):
        assert [node.wait(300) for node in nodes] == [0, 0], texts_of(paths)
    texts = texts_of(paths)
    assert not any(DEAD.search(text) for text in texts)
    records = [last_json(text) for text in texts if '"stage": "base_train"' in text]
    assert [record["steps"] for record in records] == [step + 2]
