import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fakes import FakeEngine, FakeTokenizer, type_lines
from checkpoint_cases import folder, meta, save, tokenizer  # noqa: F401

from nanochat.common import UserError
from scripts import chat_cli, chat_web


def converse(engine, monkeypatch, capsys, *lines):
    """Type the lines at the prompt, each a text or an exception.

    Returns what was printed, and the prompts that the model got, as text.
    """
    type_lines(monkeypatch, lines)
    chat_cli.converse(chat_cli.Chat(engine, FakeTokenizer(), "nanochat"))
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


def test_ctrl_c_before_the_first_step_ends_the_answer_only(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_cli, "fit_conversation", interrupt)
    out, prompts = converse(FakeEngine(), monkeypatch, capsys, "one", "two", "quit")
    assert out.count("nanochat:  (stopped)") == 2 and prompts == []


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
    chat_cli.Chat(engine, FakeTokenizer()).ask("x")
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"


# --------------------------------------------------------------------------------------------------
# commands at the prompt


def test_a_system_prompt_holds_until_it_is_removed(monkeypatch, capsys):
    lines = "/system Be  brief.", "one", "clear", "two", "/system", "/clear", "three", "quit"
    _, prompts = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert prompts == ["\1\2Be  brief.\2one\3", "\1\2Be  brief.\2two\3", "\1\2three\3"]


def test_an_answer_is_regenerated_with_other_random_numbers_and_replaced(monkeypatch, capsys):
    engine = FakeEngine()
    lines = "/regenerate", "one", "two", "/regenerate", "three", "quit"
    out, prompts = converse(engine, monkeypatch, capsys, *lines)
    assert "(there is no question yet: ask one)" in out
    assert prompts[1] == prompts[2] and engine.calls[1]["seed"] != engine.calls[2]["seed"]
    turns = "one", "Hello 🙂!", "two", "Hello 🙂!", "three"
    assert prompts[3] == "\1" + "".join("\2" + turn for turn in turns) + "\3"


def test_a_saved_conversation_continues_where_it_ended(monkeypatch, capsys, tmp_path):
    path = tmp_path / "talk ü.json"
    lines = "/system s", "Grüße", f"/save {path}", f"/save {path}", "quit"
    out, _ = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert out.count(f"saved {path}: 2 messages") == 2
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    lines = "forgotten", f"/load {path}", "two", "quit"
    _, prompts = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert prompts[1] == "\1\2s\2Grüße\2Hello 🙂!\2two\3"

    # the same at the start, where --system is the later word
    monkeypatch.setattr(chat_cli, "load", str(path))
    monkeypatch.setattr(chat_cli, "system", "t")
    monkeypatch.setattr(chat_cli, "prompt", "two")
    engine = FakeEngine()
    chat_cli.talk(chat_cli.Chat(engine, FakeTokenizer()), "Bob")
    assert "".join(map(chr, engine.calls[0]["prompt"])) == "\1\2t\2Grüße\2Hello 🙂!\2two\3"
    assert capsys.readouterr().out == "Hello 🙂!\n"


NO_CONVERSATIONS = [
    b"",
    b"{",
    b"\xff",
    b"[" * 100_000,
    b"[]",
    b"{}",
    b'{"messages": "x"}',
    b'[{"role": "king", "content": "x"}]',
    b'[{"role": "assistant", "content": ""}]',
]


@pytest.mark.parametrize("content", NO_CONVERSATIONS, ids=range(len(NO_CONVERSATIONS)))
def test_a_file_that_is_no_conversation_is_neither_loaded_nor_overwritten(
    monkeypatch, capsys, tmp_path, content
):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    lines = "one", f"/load {path}", f"/save {path}", "two", "quit"
    out, prompts = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert out.count(f"({path} ") == 2 and out.count(": name another file)") == 2
    assert path.read_bytes() == content
    assert prompts[1] == "\1\2one\2Hello 🙂!\2two\3"


@pytest.mark.parametrize("line, said", [
    ("/hello", "/hello is not known: /help lists what there is"),
    ("/load", "name a file, such as talk.json"),
    ("/save", "name a file, such as talk.json"),
    ("/save talk.json", "there is nothing to save yet: ask a question"),
    ("/load /no/such/file", "/no/such/file cannot be read"),
    ("/load /", "/ cannot be read"),
    ("/set", "/set takes a name and a value; now: temperature 0.6, top_k 50,"),
    ("/set colour 3", "/set takes a name and a value"),
    ("/set temperature warm", "temperature must be a number from 0, such as 0.6"),
    ("/set temperature 9", "temperature=9.0 must be at most 2"),
    ("/set temperature nan", "temperature must be a number from 0, such as 0.6"),
    ("/set top_k 1.5", "top_k must be a number from 0, such as 50"),
    ("/set seed -1", "seed must be a number from 0, such as 42"),
    ("/set max_tokens 0", "max_tokens must be a number from 1, such as 256"),
])
def test_a_command_that_cannot_be_is_one_line_and_the_conversation_continues(
    monkeypatch, capsys, line, said
):
    out, prompts = converse(FakeEngine(), monkeypatch, capsys, line, "one", "quit")
    errors = [text for text in out.splitlines() if text.startswith("(")]
    assert len(errors) == 1 and said in errors[0] and prompts == ["\1\2one\3"]


@pytest.mark.parametrize("name, said", [
    ("/no/talk.json", "(/no/talk.json cannot be written (No such file or directory): name another"),
    ("x" * 5000, "cannot be written (File name too long): name another file)"),
    ("talk\0.json", "(name a file, such as talk.json)"),
])
def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys, name, said):
    lines = "one", f"/save {name}", f"/load {name}", "two", "quit"
    out, prompts = converse(FakeEngine(), monkeypatch, capsys, *lines)
    assert said in out and len([line for line in out.splitlines() if line[:1] == "("]) == 2
    assert prompts[1] == "\1\2one\2Hello 🙂!\2two\3"


def test_sampling_is_changed_from_the_next_answer_on(monkeypatch, capsys):
    engine = FakeEngine()
    lines = "one", "/set temperature 0.25", "/set top_k  7", "/set max_tokens 2", "two", "quit"
    out, _ = converse(engine, monkeypatch, capsys, *lines)
    first, second = engine.calls
    assert first["temperature"] == 0.6
    assert (second["temperature"], second["top_k"], second["max_new_tokens"]) == (0.25, 7, 2)
    assert out.count("(cut at max_tokens)") == 1


def test_a_path_at_the_beginning_of_a_question_is_no_command(monkeypatch, capsys):
    _, prompts = converse(FakeEngine(), monkeypatch, capsys, "/etc/hosts is what?", "quit")
    assert prompts == ["\1\2/etc/hosts is what?\3"]


@pytest.mark.parametrize("given, hint", [
    ({"load": "no.json"}, "no.json cannot be read"),
    ({"prompt": " "}, "-p"),
    ({"temperature": 3.0}, "temperature=3.0 must be at most 2"),
    ({"source": "base", "system": "x"}, "leave --system and --load out"),
    ({"source": "base", "load": "x.json"}, "leave --system and --load out"),
])
def test_settings_that_cannot_be_are_refused_before_a_model_is_loaded(monkeypatch, given, hint):
    for name, value in given.items():
        monkeypatch.setattr(chat_cli, name, value)
    with pytest.raises(UserError, match=hint):
        chat_cli.main()


def test_help_names_every_command(monkeypatch, capsys):
    out, _ = converse(FakeEngine(), monkeypatch, capsys, "/help", "quit")
    for word in "/system", "/regenerate", "/set", "/save", "/load", "/clear", "/help", "quit":
        assert f"\n  {word} " in out


def test_the_speed_is_said_where_it_is_asked_for_and_not_in_the_answer(monkeypatch, capsys):
    chat_cli.Chat(FakeEngine(), FakeTokenizer()).ask("x")
    assert capsys.readouterr() == ("Hello 🙂!\n", "")
    monkeypatch.setattr(chat_cli, "stats", True)
    chat_cli.Chat(FakeEngine(), FakeTokenizer()).ask("x")
    out, err = capsys.readouterr()
    assert out == "Hello 🙂!\n" and err.count("\n") == 1
    assert "(4 tokens of the prompt and 5 of the answer in" in err and "tokens/s)" in err


# --------------------------------------------------------------------------------------------------
# as its user runs it


def run_chat(typed, **environment):
    """The conversation at the prompt in a process of its own; `typed` is bytes."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from chat_fakes import FakeEngine, FakeTokenizer\n"
        "from nanochat.common import install_error_hook\n"
        "from scripts import chat_cli\n"
        "install_error_hook()\n"
        "engine = FakeEngine(['na\\u00efve \\u2192', '\\U0001f642'])\n"
        "chat_cli.converse(chat_cli.Chat(engine, FakeTokenizer(), 'nanochat'))\n"
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
    chat_cli.talk(chat_cli.Chat(FakeEngine(["Hi"]), FakeTokenizer()), "Bob")
    assert "Bob: Hi\n" in capsys.readouterr().out


def test_half_a_character_in_the_command_is_replaced(monkeypatch):
    assert chat_cli.question("caf\udcc3 ") == {"role": "user", "content": "caf?"}
    monkeypatch.setattr(chat_cli, "system", "caf\udcc3")
    engine = FakeEngine()
    chat_cli.Chat(engine, FakeTokenizer()).ask("x")
    assert "".join(map(chr, engine.calls[0]["prompt"])) == "\1\2caf?\2x\3"


def test_a_cut_answer_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(chat_cli, "max_tokens", 2)
    chat_cli.Chat(FakeEngine(), FakeTokenizer()).ask("x")
    assert capsys.readouterr().out == "Hello (cut at max_tokens)\n"


ASK = """
import runpy, sys
sys.argv = ["chat_cli", "--source=base", "--model_tag=d1", "-p", "the cat", "--max_tokens=3"]
runpy.run_module("scripts.chat_cli", run_name="__main__", alter_sys=True)
print([name for name in ("torch._dynamo", "sympy", "torch._inductor") if name in sys.modules])
"""


def test_an_answer_does_not_wait_for_the_import_of_torchs_compiler(
    base_dir, folder, meta  # noqa: F811
):
    """It took a second, and four without compiled Python files."""
    save(folder, 7, meta)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("the cat")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments, hint", [
    (["scripts.chat_cli", "-p", " "], "-p"),
    (["scripts.chat_cli", "-p", "hello"], "sft"),
    (["scripts.chat_cli", "-p", "hello", "--max_tokens=0"], "error: max_tokens=0 must be at least"),
    (["scripts.chat_web", "--top_k=-1"], "error: top_k=-1 must be at least 0"),
    (["scripts.chat_web", "--port=99999"], "--port"),
    (["scripts.chat_web", "--prot=80"], "--port"),
    (["scripts.chat_web", "--port=0", "--source=basse"], "source=basse is not a stage"),
    (["scripts.chat_web", "--port=0", "--model_tag=nope"], "no complete checkpoint"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, hint):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and hint in result.stderr
    assert result.stdout == "", "nothing was begun"


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


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
