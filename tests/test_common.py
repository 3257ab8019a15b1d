"""Settings, errors as one line, files that are whole or not there."""
import errno
import os
import pwd
import subprocess
import sys

import pytest

from conftest import ROOT
from nanochat import common
from nanochat.common import (
    UserError,
    atomic_file,
    atomic_write,
    get_base_dir,
    install_error_hook,
    warn_once,
)
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
    (["--fast=maybe"], "--fast takes 1, 0, True or False, not 'maybe'"),
    (["none.py"], "'none.py' does not exist: settings are written"),
    ([f"{ROOT}/config/yxanul_197.py"], f"did you mean {ROOT}/config/yxanul_197m.py?"),
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
    ('MemoryError("out of memory: take less")', 1, "error: out of memory: take less\n"),
    ("MemoryError()", 1, "error: MemoryError\n"),
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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1:strict"])
def test_what_a_terminal_cannot_show_ends_nothing(encoding):
    """Samples hold any character, and consoles (Windows, LC_ALL=C) know few."""
    code = (
        "from nanochat.common import UserError, install_error_hook, print0\n"
        "install_error_hook()\n"
        "print0('sample: caf\\u00e9 \\u4f60\\u597d \\U0001f600 \\ud800')\n"
        "print0('step 2')\n"
        "raise UserError('\\u4f60 is no file')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(b"sample: caf") and done.stdout.endswith(b"?? ? ?\nstep 2\n")
    assert done.stderr == b"error: ? is no file\n"


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


# --------------------------------------------------------------------------------------------------
# the base folder


@pytest.mark.parametrize("given, meant", [
    ("runs/one", "here/runs/one"),
    ("./~x", "here/~x"),
    ("~/runs", "home/runs"),
    ("~", "home"),
    ("", "home/.cache/nanochat"),
    (None, "home/.cache/nanochat"),
    ("with a blank/x", "here/with a blank/x"),
])
def test_the_base_folder_is_relative_to_the_caller_and_knows_the_home(
    tmp_path, monkeypatch, given, meant
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    if given is not None:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
    assert get_base_dir() == tmp_path / meant and (tmp_path / meant).is_dir()


def test_without_home_the_systems_list_of_users_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/x")
    entry = pwd.struct_passwd(("me", "x", 1, 1, "", str(tmp_path), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda number: entry)
    assert get_base_dir() == tmp_path / "x"


@pytest.mark.parametrize("given", ["", "~", "~/x", "~nobody-of-this-name/x"])
def test_where_no_home_is_known_one_line_names_the_variable(monkeypatch, given):
    def unlisted(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
    monkeypatch.setattr(pwd, "getpwuid", unlisted)
    with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR to a folder you can write") as error:
        get_base_dir()
    assert "\n" not in str(error.value)


def test_a_named_folder_needs_no_home(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "x"))
    assert get_base_dir() == tmp_path / "x"


# --------------------------------------------------------------------------------------------------
# system calls that some file systems refuse


def refuse(monkeypatch, call, number, folders_only=False):
    """Let os.`call` fail with an error number, as a network file system does."""
    real = getattr(os, call)

    def refused(path, *arguments):
        if folders_only and not os.path.isdir(path):
            return real(path, *arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refused)


@pytest.mark.parametrize("call, number, folders_only, said", [
    ("chmod", errno.EPERM, False, "chmod"),                  # CIFS, exFAT
    ("chmod", errno.ENOSYS, False, "chmod"),
    ("fsync", errno.EINVAL, True, "fsync of a folder"),      # CIFS
    ("fsync", errno.EOPNOTSUPP, False, "fsync of a file"),   # FUSE
    ("open", errno.EACCES, True, "fsync of a folder"),       # folders cannot be opened
])
def test_a_refused_call_is_a_warning_once_and_the_file_is_written(
    tmp_path, monkeypatch, capsys, call, number, folders_only, said
):
    warn_once.cache_clear()
    refuse(monkeypatch, call, number, folders_only)
    for text in ("one", "two", "three"):
        atomic_write(tmp_path / "file", text)
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert captured.err.count(f"warning: the file system refuses {said} (") == 1
    assert captured.out == "", "standard output is for the stage's own lines"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "three"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["chmod", "fsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_is_still_an_error(tmp_path, monkeypatch, call, number):
    refuse(monkeypatch, call, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_write(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# threads


@pytest.mark.parametrize("is_dist, chosen, torch_has, set_to", [
    (False, False, 64, 6),     # OpenMP does not know of the quota
    (False, False, 4, None),
    (False, True, 64, None),
    (True, False, 1, 3),       # torchrun's 1
    (True, True, 1, None),
    (True, True, 5, None),
])
def test_threads_are_the_share_of_the_cpus_unless_the_user_chose(
    monkeypatch, is_dist, chosen, torch_has, set_to
):
    import torch
    from nanochat import hardware
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_has)
    monkeypatch.setattr(hardware, "available_cpus", lambda: 6)
    monkeypatch.setattr(hardware, "bind_workers", lambda: None)
    monkeypatch.setattr(hardware, "threads_are_chosen", lambda is_dist: chosen)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    common._set_up_threads(is_dist)
    assert numbers == ([set_to] if set_to else [])
