"""The shell scripts: bash reads them, and shellcheck has nothing to say."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"])
SCRIPTS = [str(path.relative_to(ROOT)) for path in SCRIPTS]


def test_all_are_found():
    assert {"serve_r1.sh", "speedrun.sh", "emergency_training.sh", "scripts/setup.sh", "tests/run.sh", ".ci/run"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
