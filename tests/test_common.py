"""Settings, errors as one line, files that are whole or not there."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from nanochat.common import UserError, atomic_file, atomic_write, install_error_hook
from nanochat.configurator import configure

SCRIPT = '''"""What it does."""
import sys
from nanochat.configurator import configure
depth: int = None   # layers
rate = 0.5          # of learning
name = "x"          # a name
fast = False        # hurry
CONSTANT = 3
settings = configure(globals())
later = 1
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def settings_of(script, *words, **options):
    namespace = {"__file__": str(script), "depth": None, "rate": 0.5, "name": "x", "fast": False}
    return configure(namespace, list(words), **options)


def test_settings_in_every_spelling(script, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text('"""Mine."""\ndepth = 6   # because\nrate = 2\n', encoding="utf-8")
    assert settings_of(script) == {"depth": None, "rate": 0.5, "name": "x", "fast": False}
    changed = {"depth": 4, "rate": 1.0, "name": "x", "fast": True}
    assert settings_of(script, "--depth=4", "--rate", "1", "--fast") == changed
    assert settings_of(script, "--", str(config), "--depth=3", "--name=7")["depth"] == 3
    assert settings_of(script, str(config))["rate"] == 2.0
    assert settings_of(script, "--name=7")["name"] == "7"
    assert settings_of(script, "-d", "4", aliases={"d": "depth"})["depth"] == 4
    assert settings_of(script, "--depth=4", "--depth=None")["depth"] is None
    assert settings_of(script, "--fast=0", "--fast=1")["fast"] is True


@pytest.mark.parametrize("words, message", [
    (["--dpth=4"], "unknown setting --dpth; did you mean --depth?"),
    (["--CONSTANT=4"], "unknown setting"),
    (["--later=4"], "unknown setting"),
    (["--depth=four"], "--depth takes int, not 'four'"),
    (["--depth=1.5"], "--depth takes int"),
    (["--rate=True"], "--rate takes float"),
    (["--depth"], "--depth needs a value"),
    (["--rate=None"], "--rate takes float, not None"),
    (["none.py"], "'none.py' does not exist"),
])
def test_bad_settings(script, words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        settings_of(script, *words)


def test_help_says_what_a_none_becomes_on_this_machine(script, capsys):
    with pytest.raises(SystemExit) as end:
        settings_of(
            script,
            "--rate=2",
            "--help",
            defaults_here=lambda settings: {"depth": 10 * settings["rate"], "name": "unused"},
        )
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    words = lines[-4].split()
    assert words == ["--depth=None", "int", "layers", "(here:", "20.0)"]
    assert lines[-2].endswith("a name"), "a setting that is given needs no other value"


def run_code(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("error, status, line", [
    ('UserError("no such\\nthing: make one")', 2, "error: no such thing: make one\n"),
    ('OSError(28, "No space left on device")', 1, "error: [Errno 28] No space left on device\n"),
    ("KeyboardInterrupt()", 130, "error: interrupted\n"),
])
def test_errors_end_with_one_line_and_their_status(error, status, line):
    done = run_code("from nanochat.common import UserError, install_error_hook\n"
                    f"install_error_hook()\nraise {error}")
    assert (done.returncode, done.stderr) == (status, line)


@pytest.mark.parametrize("encoding, shown", [
    ("ascii", "na?ve ? ?\n"), ("latin-1", "na\xefve ? ?\n"), ("cp437", "na\x8bve ? ?\n"),
])
def test_no_program_ends_because_its_output_cannot_encode_a_character(encoding, shown):
    done = subprocess.run(
        [sys.executable, "-c", "from nanochat.common import install_error_hook\n"
         "print('before')\ninstall_error_hook()\n"
         "print('na\\u00efve \\u2192 \\ud83d')\nprint(input())\n"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        input=b"caf\xc3\n" if encoding == "ascii" else b"cafe\n",
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("latin-1").replace("\r\n", "\n").startswith("before\n" + shown)


def test_streams_that_are_none_or_no_files_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", object())
    install_error_hook()


def test_a_bug_keeps_its_traceback():
    done = run_code(
        "from nanochat.common import install_error_hook\ninstall_error_hook()\n1 / 0")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_atomic_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError):
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]

    def fail(handle):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]
