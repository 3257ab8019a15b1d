"""The shell scripts: bash reads them, and shellcheck has nothing to say."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PATHS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("[!.]*/*.sh"), ROOT / ".ci" / "run"])
SCRIPTS = [str(path.relative_to(ROOT)) for path in PATHS]


def test_all_are_found():
    assert set(SCRIPTS) >= {
        "serve_r1.sh",
        "speedrun.sh",
        "emergency_training.sh",
        "scripts/setup.sh",
        "scripts/supervise.sh",
        "tests/run.sh",
        ".ci/run",
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_shellcheck_finds_nothing():
    beside_python = str(Path(sys.executable).parent)
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=beside_python)
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
