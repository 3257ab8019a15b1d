"""What several test files share.

A base directory for each test, the command of a stage as a user runs it, the record that a stage
ends with, and for the tests of whole stages a text, a tokenizer and a trained model.
"""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {call.excinfo.value}"
    return report


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """A fresh, empty $NANOCHAT_BASE_DIR."""
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


@pytest.fixture(scope="session", autouse=True)
def _nothing_in_the_home_directory(tmp_path_factory):
    """A test that forgets `base_dir` must not touch the user's base directory in ~/.cache."""
    os.environ["NANOCHAT_BASE_DIR"] = str(tmp_path_factory.mktemp("shared_base"))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_what_the_tests_start():
    """A shell starts a background job with SIGINT ignored, and every child would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_module():
    """A function that runs a module in a process of its own and gives its CompletedProcess.

    run_module("scripts.tok_train", "--vocab_size=300", base=folder): output is text, `base` becomes
    $NANOCHAT_BASE_DIR, and further keywords are environment variables.
    """
    def run(module, *arguments, base=None, timeout=300, **variables):
        environment = dict(os.environ)
        if base:
            environment["NANOCHAT_BASE_DIR"] = str(base)
        environment.update(variables)
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
    return run


def last_json(output):
    """The record with which a stage ends its standard output."""
    return json.loads(output.rstrip("\n").split("\n")[-1])


# ------------------------------------------------------------------------------------------------
# whole stages; stage_runs.py, which imports torch, is imported where it is needed

ADJECTIVES = ("small", "green", "quick", "old")
ANIMALS = ("cat", "dog", "bird", "horse", "fox")
VERBS = ("sees", "follows", "finds", "leaves")
PLACES = ("house", "river", "garden", "street", "forest")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of a few hundred sentences, enough for a vocabulary of 430."""
    words = itertools.product(ADJECTIVES, ANIMALS, VERBS, PLACES)
    lines = []
    for i, (adjective, animal, verb, place) in enumerate(words):
        lines.append(f"The {adjective} {animal} {verb} the {place} number {i * 37 % 1009}.")
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text("\n\n".join(lines * 3), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server():
    """The process that forks."""
    from stage_runs import ForkServer
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def stages(tmp_path_factory, text, server):
    """Runs of stages in a base directory that has a tokenizer."""
    from stage_runs import Stages
    stages = Stages(tmp_path_factory.mktemp("stages"), server)

    # words and objects to ask about; gathering the real ones takes a while
    rng = random.Random(1)
    words = sorted({"".join(rng.choices("abcdefghi", k=rng.randint(4, 8))) for _ in range(300)})
    (stages.base / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    objects = [{"name": f"cats.{word}", "sentence": f"Return {word} of the cat."} for word in words]
    lines = [json.dumps(row) + "\n" for row in objects]
    (stages.base / "pydoc.jsonl").write_text("".join(lines), encoding="utf-8")

    stages.tokenizer_record = stages.fork_record(
        "scripts.tok_train", f"--data={text}", "--vocab_size=430")
    [own] = (stages.base / "tokenizers").iterdir()
    shutil.copytree(own, stages.base / "tokenizer")  # other text has no tokenizer of its own
    return stages


@pytest.fixture(scope="module")
def trained(stages, text):
    """The record of a base model of ten steps, as its user trains it."""
    from stage_runs import TINY
    return stages.record(
        "scripts.base_train", f"--data={text}", *TINY, "--num_iterations=10", "--model_tag=d1")
