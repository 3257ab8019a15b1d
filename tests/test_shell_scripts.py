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
        "launch_6x_amd_xtx.sh",
        "scripts/setup.sh",
        "scripts/supervise.sh",
        "tests/nightly.sh",
        "tests/run.sh",
        "tests/families.sh",
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


@pytest.mark.parametrize("words, status", [([], 0), (["--no-skips"], 1)])
def test_a_night_has_failed_if_its_test_was_skipped(tmp_path, words, status):
    test = 'import pytest\n\ndef test_it():\n    pytest.skip("no llama.cpp")\n'
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", *words, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("was skipped: no llama.cpp" in done.stdout) == bool(status)


def test_no_file_of_a_checkout_with_autocrlf_ends_its_lines_as_windows_does(tmp_path):
    """bash cannot run a script whose lines end in a carriage return."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout here")
    index = ["git", "-c", "core.autocrlf=true", "checkout-index", "--all", f"--prefix={tmp_path}/"]
    subprocess.run(index, cwd=ROOT, check=True)
    texts = [path for path in tmp_path.rglob("*") if path.suffix in (".sh", ".py", ".toml", ".md")]
    assert len(texts) > 100
    assert not [path.name for path in texts if b"\r\n" in path.read_bytes()]
