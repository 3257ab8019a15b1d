import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fakes import FakeEngine, FakeTokenizer, type_lines

from nanochat.common import UserError
from scripts import chat_cli, chat_web


def converse(engine, monkeypatch, capsys, *lines):
    """Type the lines at the prompt, each a text or an exception.

    Returns what was printed, and the prompts that the model got, as text.
    """
    type_lines(monkeypatch, lines)
    chat_cli.chat(engine, FakeTokenizer())
    return capsys.readouterr().out, ["".join(map(chr, call["prompt"])) for call in engine.calls]


def run(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_conversation_remembers_and_clear_forgets(monkeypatch, capsys):
    lines = "one", "", " two ", "clear", "three", "quit"
    out, prompts = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert out.count("Hello 🙂!") == 3
    assert prompts == ["\1\2one\3", "\1\2one\2Hello 🙂!\2two\3", "\1\2three\3"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_end_of_input_and_ctrl_c_at_the_prompt_end_the_program(monkeypatch, capsys, end):
    assert converse(FakeEngine(), monkeypatch, capsys, end)[1] == []


def test_ctrl_c_ends_the_answer_only(monkeypatch, capsys):
    engine = FakeEngine(["begun", KeyboardInterrupt()])
    out, prompts = converse(engine, monkeypatch, capsys, "one", "two", "quit")
    assert out.count("begun (stopped)") == 2 and prompts[1] == "\1\2one\2begun\2two\3"
    engine = FakeEngine([KeyboardInterrupt()])  # before the first word: the turn leaves no trace
    _, prompts = converse(engine, monkeypatch, capsys, "one", "two", "quit")
    assert prompts == ["\1\2one\3", "\1\2two\3"]


def test_a_question_that_is_too_long_is_told_and_the_conversation_continues(monkeypatch, capsys):
    engine = FakeEngine([UserError("the prompt is too long")])
    out, prompts = converse(engine, monkeypatch, capsys, "one", "two", "quit")
    assert out.count("(the prompt is too long)") == 2 and prompts[1] == "\1\2two\3"


def test_turns_of_a_conversation_draw_differently(monkeypatch, capsys):
    engine = FakeEngine()
    converse(engine, monkeypatch, capsys, "one", "one", "quit")
    assert engine.calls[0]["seed"] != engine.calls[1]["seed"]


def test_control_characters_do_not_reach_the_terminal(capsys):
    """docs/traps.md: control-tokens"""
    engine = FakeEngine(["a\x1b[2J\x07", "b\n\tc\x9b"])
    chat_cli.answer(engine, FakeTokenizer(), [chat_cli.question("x")])
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"


def run_chat(typed, **environment):
    """The conversation at the prompt in a process of its own; `typed` is bytes."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from chat_fakes import FakeEngine, FakeTokenizer\n"
        "from nanochat.common import install_error_hook\n"
        "from scripts import chat_cli\n"
        "install_error_hook()\n"
        "chat_cli.chat(FakeEngine(['na\\u00efve \\u2192', '\\U0001f642']), FakeTokenizer())\n"
        "sys.stderr.write(repr(sys.stdin.errors))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONUTF8": "0", **environment},
        input=typed,
        capture_output=True,
    )


@pytest.mark.parametrize("encoding, shown", [
    ("utf-8", "naïve →🙂".encode()),
    ("ascii:surrogateescape", b"na?ve ??"),
])
def test_neither_half_a_character_nor_a_poor_terminal_ends_the_chat(encoding, shown):
    done = run_chat(b"caf\xc3\n\xff\xfe\n\xf0\x9f\nquit\n", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"'replace'")
    assert done.stdout.count(b"nanochat: " + shown) == 3


def test_an_answer_stands_behind_the_models_name(monkeypatch, capsys):
    words = iter(["hello", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    chat_cli.chat(FakeEngine(["Hi"]), FakeTokenizer(), "Bob")
    assert "Bob: Hi\n" in capsys.readouterr().out


def test_half_a_character_of_a_prompt_in_the_command_is_replaced():
    assert chat_cli.question("caf\udcc3 ") == {"role": "user", "content": "caf?"}


def test_a_cut_answer_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(chat_cli, "max_tokens", 2)
    chat_cli.answer(FakeEngine(), FakeTokenizer(), [chat_cli.question("x")])
    assert capsys.readouterr().out == "Hello (cut at max_tokens)\n"


@pytest.mark.parametrize("arguments, hint", [
    (["scripts.chat_cli", "-p", " "], "-p"),
    (["scripts.chat_cli", "-p", "hello"], "sft"),
    (["scripts.chat_web", "--port=99999"], "--port"),
    (["scripts.chat_web", "--prot=80"], "--port"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, hint):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and hint in result.stderr


def test_a_port_in_use_is_one_line_naming_the_setting(tmp_path):
    with chat_web.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = run(tmp_path, "scripts.chat_web", f"--port={port}")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "--port" in result.stderr and str(port) in result.stderr


def test_only_this_machine_is_listened_to_by_default():
    with chat_web.listen(chat_web.host, 0) as listener:
        assert listener.family == socket.AF_INET and listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("once, terminal, out, err", [
    (None, False, "sft d3\n", ""),
    (["a question"], True, "", "sft d3\n"),
    (["a question"], False, "", ""),
])
def test_which_model_was_taken_is_said_where_a_person_reads_it(
    capsys, monkeypatch, once, terminal, out, err
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    chat_cli.say_choice("sft d3", once)
    assert capsys.readouterr() == (out, err)
