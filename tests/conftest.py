"""What several test files share.

A base directory for each test, the command of a stage as a user runs it, and the record that a
stage ends with.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
