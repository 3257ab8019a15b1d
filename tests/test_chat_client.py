"""The terminal client against hand-written streams in the shapes of vLLM and ollama
(stream_fakes.py), and against our own server."""

import ast
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest
from chat_fakes import FakeEngine, serve, type_lines
from stream_fakes import (
    OLD_VLLM_ERROR,
    OLLAMA_ERROR,
    OLLAMA_WIRE,
    VLLM_ERROR,
    VLLM_WIRE,
    Reply,
    catching_environment,
    play,
    variants_of,
    vllm,
)

from conftest import ROOT
from scripts import chat

FILE = ROOT / "scripts" / "chat.py"
THOUGHT = (
    {"reasoning_content": "They greet"},
    {"reasoning_content": " me."},
    {"content": "\n\nHello"},
    "!",
)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have waited."""
    waited = []
    monkeypatch.setattr(chat.time, "sleep", waited.append)
    return waited


@pytest.fixture
def terminal(monkeypatch):
    """As if the output were a terminal."""
    begin = chat.Screen.__init__

    def on_a_terminal(screen):
        begin(screen)
        screen.terminal = True

    monkeypatch.setattr(chat.Screen, "__init__", on_a_terminal)


@pytest.fixture
def converse(monkeypatch, capsys):
    """converse(server, line, ..., words=()) -> what was printed.

    A line is typed at the prompt, or an exception that comes there.
    """

    def run(server, *lines, words=()):
        type_lines(monkeypatch, lines)
        assert chat.main([f"--url={server.address}", *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def once(capsys):
    """once(server, ...) -> (status, output, errors) of one question."""

    def run(server, *words):
        status = chat.main([f"--url={server.address}", "--once", "hello", *words])
        return (status, *capsys.readouterr())

    return run


def contents(server):
    """The conversation of each question as (role, text) pairs."""
    return [
        [(message["role"], message["content"]) for message in body["messages"]]
        for body, _ in server.asked
    ]


# --------------------------------------------------------------------------------------------------
# conversations


def test_a_conversation_remembers_and_clear_forgets(converse):
    with play(vllm("Hel", "lo", "!")) as server:
        out = converse(
            server, "one", "", " two ", "clear", "three", "quit", words=["--system=Be brief."]
        )
    assert out.count("model-7b: Hello!\n") == 3
    system, answer = ("system", "Be brief."), ("assistant", "Hello!")
    assert contents(server) == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]
    assert all(
        body["model"] == "test/model-7b" and body["stream"] and "max_tokens" not in body
        for body, _ in server.asked
    )


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_end_of_input_and_ctrl_c_at_the_prompt_end_the_program(converse, end):
    with play(vllm("a")) as server:
        converse(server, end)
    assert server.asked == []


def test_settings_reach_the_server(once):
    with play(vllm("a"), models=None) as server:
        assert once(server, "--model=m", "--max-tokens=9", "--temperature=0", "--system=s")[0] == 0
    assert server.asked[0][0] == {
        "model": "m",
        "stream": True,
        "max_tokens": 9,
        "temperature": 0.0,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
    }


def test_our_own_server_is_talked_to(converse):
    engine = FakeEngine()
    with serve(engine) as address:
        server = type("Ours", (), {"address": address + "/v1/"})
        out = converse(server, "one", "two", "quit", words=["--max_tokens=50"])
        engine.pieces = [RuntimeError("secret")]
        failed = converse(server, "one", "quit")
    assert out.count("nanochat-test: Hello 🙂!\n") == 2
    prompts = ["".join(map(chr, call["prompt"])) for call in engine.calls]
    assert (
        prompts == ["\1\2one\3", "\1\2one\2Hello 🙂!\2two\3", "\1\2one\3"]
        and engine.calls[0]["max_new_tokens"] == 50
    )
    assert "(the model failed; the server's log says why)" in failed and "secret" not in failed


def test_the_first_of_several_models_is_taken_and_none_is_an_error(once):
    with play(vllm("a"), models=("first", "second")) as server:
        status, out, err = once(server)
        assert (
            (status, out) == (0, "a\n")
            and "first" in err
            and "--model" in err
            and server.asked[0][0]["model"] == "first"
        )
    with play(vllm("a"), models=()) as server:
        status, out, err = once(server)
        assert (status, out) == (1, "") and "--model" in err and err.count("\n") == 1


def test_the_key_is_sent_and_a_missing_one_is_named(once, monkeypatch):
    with play(Reply({"error": {"message": "Unauthorized"}}, status=401)) as server:
        status, _, err = once(server)
        assert status == 1 and err == "error: 401: Unauthorized (OPENAI_API_KEY holds the key)\n"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with play(vllm("a")) as server:
        once(server)
        assert server.asked[0][1]["Authorization"] == "Bearer secret"


@pytest.fixture
def caught(monkeypatch, tmp_path):
    """As if the machine had a ~/.netrc and proxies for everything."""
    for name, value in catching_environment(tmp_path).items():
        monkeypatch.setenv(name, value)


def test_the_key_is_not_replaced_by_what_netrc_knows(once, caught, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with play(vllm("a")) as server:
        assert once(server) == (0, "a\n", "")
    assert server.asked[0][1]["Authorization"] == "Bearer secret"


def test_without_a_key_netrc_is_asked(once, caught):
    with play(vllm("a")) as server:
        once(server)
    assert server.asked[0][1]["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("url, caught_by_proxy", [
    ("http://localhost:8000/v1", False),
    ("http://127.0.0.1:8000/v1", False),
    ("http://127.8.9.1/v1", False),
    ("http://[::1]:8000/v1", False),
    ("http://0.0.0.0:8000/v1", False),
    ("http://box.localhost/v1", False),
    ("http://localhost.example.org/v1", True),
    ("http://192.168.0.7:8000/v1", True),
    ("https://api.example.org/v1", True),
])
def test_a_proxy_catches_other_machines_alone(caught, url, caught_by_proxy):
    proxies = chat.open_session(url).proxies
    assert (chat.requests.utils.select_proxy(url, proxies) is not None) == caught_by_proxy


def test_a_proxy_that_does_not_answer_is_named(caught, waits, capsys):
    assert chat.main(["--url=http://a.test", "--once", "hello"]) == 1
    assert "through the proxy that the environment names" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# thoughts


@pytest.mark.parametrize(
    "deltas",
    [
        THOUGHT,
        [{"reasoning": "They greet"}, {"reasoning": " me.", "content": None}, "\n\nHello", "!"],
        ["<think>They greet me.</think>\n\nHello!"],
        list("<think>They greet me.</think>\n\nHello!"),
    ],
    ids=["reasoning_content", "reasoning", "inline", "inline, letter by letter"],
)
def test_thoughts_are_dim_and_no_part_of_the_conversation(converse, terminal, deltas):
    with play(vllm(*deltas)) as server:
        out = converse(server, "one", "two", "quit")
    assert out.count(f"model-7b: {chat.DIM}They greet me.{chat.PLAIN}\nHello!\n") == 2
    assert contents(server)[1] == [("user", "one"), ("assistant", "Hello!"), ("user", "two")]


def test_a_real_terminal_is_recognised():
    screen, output = pty.openpty()
    with play(vllm(*THOUGHT)) as server:
        process = subprocess.Popen(
            [sys.executable, str(FILE), f"--url={server.address}", "--once", "hello"],
            stdin=subprocess.DEVNULL,
            stdout=output,
        )
        os.close(output)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end, on Linux
            while piece := os.read(screen, 1000):
                seen += piece
        assert process.wait(timeout=60) == 0
    os.close(screen)
    assert seen == f"{chat.DIM}They greet me.{chat.PLAIN}\r\nHello!\r\n".encode()


def test_into_a_pipe_goes_the_answer_alone(once):
    with play(vllm(*THOUGHT)) as server:
        assert once(server) == (0, "Hello!\n", "")


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("<think>7 < 12</thin </think>\n\nIt is <b>.", "7 < 12</thin ", "It is <b>."),
        ("\n<think>\n</think>yes", "\n", "yes"),
        ("a <think>b", "", "a <think>b"),  # the opening tag counts at the start alone
        ("<think>a</think>b</think><think>c", "a", "b</think><think>c"),
        ("<think>never ends", "never ends", ""),
        ("<thin", "", "<thin"),
        ("", "", ""),
        ("a</thin", "", "a</thin"),
    ],
)
def test_inline_thoughts_are_separated_wherever_the_pieces_are_cut(text, thought, answer):
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            parts, shown = chat.Thoughts(), []
            for piece in (text[:i], text[i:j], text[j:]):
                shown += parts.feed(piece)
            shown += parts.feed("", last=True)
            assert "".join(piece for dim, piece in shown if dim) == thought, (i, j)
            assert "".join(piece for dim, piece in shown if not dim) == parts.answer == answer, (
                i,
                j,
            )


def test_thoughts_whose_opening_tag_was_in_the_prompt_are_no_part_of_the_conversation(converse):
    with play(vllm("They greet", " me.</th", "ink>", "\n\nHello!")) as server:
        converse(server, "one", "two", "quit")
    assert contents(server)[1] == [("user", "one"), ("assistant", "Hello!"), ("user", "two")]


def test_a_tag_in_the_text_is_text_where_the_server_parts_the_thoughts(once):
    with play(vllm({"reasoning_content": "hm"}, "It is </think>", ", yes.")) as server:
        assert once(server) == (0, "It is </think>, yes.\n", "")


def test_thoughts_that_used_up_the_tokens_leave_no_trace(converse, terminal):
    with play(vllm("<think>hm", finish="length")) as server:
        out = converse(server, "one", "two", "quit")
    assert out.count("(cut: no more tokens were allowed)") == 2 and contents(server)[1] == [
        ("user", "two")
    ]


# --------------------------------------------------------------------------------------------------
# streams as they are on the wire


@pytest.mark.parametrize("wire", [VLLM_WIRE, OLLAMA_WIRE], ids=["vLLM", "ollama"])
@pytest.mark.parametrize("variant", variants_of(b""))
@pytest.mark.parametrize("size", [1000, 7])
def test_streams_of_vllm_and_of_ollama_are_read_wherever_they_are_cut(
    converse, terminal, wire, variant, size
):
    wire = variants_of(wire)[variant]
    pieces = [wire[i:i + size] for i in range(0, len(wire), size)]
    with play(pieces) as server:
        out = converse(server, "one", "two", "quit")
    assert out.count(f"{chat.DIM}12 * 7 is 84.{chat.PLAIN}\nIt is 84.\n") == 2
    assert contents(server)[1] == [("user", "one"), ("assistant", "It is 84."), ("user", "two")]


@pytest.mark.parametrize("error", [VLLM_ERROR, OLD_VLLM_ERROR, OLLAMA_ERROR])
def test_an_error_in_the_middle_of_a_stream_is_said_and_leaves_no_trace(converse, error):
    begun = VLLM_WIRE.partition(b'"content":" 84."')[0].rpartition(b"data: ")[0]
    with play([begun, error], vllm("Hello")) as server:
        out = converse(server, "one", "two", "quit")
    assert "It is" in out and "(EngineCore died)" in out
    assert contents(server)[1] == [("user", "two")]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("reply", [b"data: ", b'{"choices": "', b"[\n", b"<"])
def test_a_line_without_an_end_is_given_up(once, waits, monkeypatch, reply, chunked):
    monkeypatch.setattr(chat, "LONGEST_ANSWER", 100_000)
    body = [reply, *[b"x" * 10_000] * 30]
    if reply == b"[\n":
        body = [reply, *[b"1,\n" * 1000] * 100]
    with play(Reply(body, chunked=chunked)) as server:
        status, out, err = once(server)
    assert (status, out, waits) == (1, "\n", []) and err.count("\n") == 1
    assert "more than 100,000 bytes" in err and "--url" in err


@pytest.mark.parametrize("status", [200, 500])
def test_a_long_answer_is_given_up_where_no_stream_is_expected(once, waits, monkeypatch, status):
    monkeypatch.setattr(chat, "LONGEST_ANSWER", 100_000)
    long = "x" * 200_000
    with play(Reply({"error": long}, status=status), models=[long]) as server:
        code, out, err = once(server)
        assert (code, out) == (1, "") and "more than 100,000 bytes" in err
        code, out, err = once(server, "--model=m")
    assert (code, out, waits) == (1, "\n", []) and len(err) < 300 and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# what reaches the terminal


@pytest.mark.parametrize(
    "escape",
    [
        "\x1b[2J",
        "\x1b[38;5;1m",
        "\x1b]0;title\x07",
        "\x1b]8;;http://x\x1b\\",
        "\x1bc",
        "\x1b(0",
        "\x1bP1$q\x1b\\",
        "\x07",
        "\r",
        "\x9b",
    ],
)
def test_escapes_are_stripped_wherever_the_pieces_are_cut(escape):
    # docs/traps.md: control-tokens
    text = f"a{escape}b\n\tc"
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            cleaner = chat.Cleaner()
            assert (
                "".join(map(cleaner.feed, (text[:i], text[i:j], text[j:])))
                + cleaner.feed("", last=True)
                == "ab\n\tc"
            ), (i, j)


def test_an_escape_that_never_ends_holds_nothing_back_for_ever():
    cleaner = chat.Cleaner()
    out = cleaner.feed("a\x1b]0;") + "".join(cleaner.feed("word ") for _ in range(1000))
    assert "word word" in out and "\x1b" not in out
    assert chat.Cleaner().feed("a\x1b[1", last=True) == "a1"


def test_nothing_that_a_server_sends_controls_the_terminal(once, terminal):
    # docs/traps.md: control-tokens
    with play(
        vllm({"reasoning_content": "\x1b[2"}, {"reasoning_content": "Jhm"}, "\x1b[", "31mred")
    ) as server:
        assert once(server)[1] == f"{chat.DIM}hm{chat.PLAIN}\nred\n"
    with play(
        Reply({"error": {"message": "\x1b[2Jno\n\x07"}}, status=400), models=("\x1b[2Jx", "y")
    ) as server:
        _, out, err = once(server)
        assert "\x1b" not in out + err and "400: no" in err
    with play(vllm("a", finish="\x1b[2Jodd")) as server:
        assert once(server)[1] == "a (odd)\n"


# --------------------------------------------------------------------------------------------------
# failures

CUT = [
    Reply(vllm("Hel", "lo", finish=None), cut=True),
    Reply(vllm("Hel", "lo", finish=None)),
    Reply(vllm("Hel", "lo", finish=None), chunked=False),
]


@pytest.mark.parametrize("reply", CUT, ids=["connection lost", "no finish_reason", "closed"])
def test_an_answer_that_was_cut_is_an_error_and_not_tried_again(once, waits, reply):
    with play(reply) as server:
        status, out, err = once(server)
    assert status == 1 and out == "Hello\n" and err.startswith("error: ") and err.count("\n") == 1
    assert waits == [] and len(server.asked) == 1


@pytest.mark.parametrize("mark", [b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE]"])
@pytest.mark.parametrize("chunked", [True, False])
def test_the_end_that_a_server_marks_is_the_end_of_a_whole_answer(converse, mark, chunked):
    with play(Reply([*vllm("Hel", "lo", finish=None), mark], chunked=chunked)) as server:
        out = converse(server, "one", "two", "quit")
    assert out.count("model-7b: Hello\n") == 2
    assert contents(server)[1] == [("user", "one"), ("assistant", "Hello"), ("user", "two")]


def whole(content, finish_reason="stop", **fields):
    """An answer in the shape that OpenAI documents for requests without a stream."""
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "chatcmpl-7", "object": "chat.completion", "choices": [choice]}


@pytest.mark.parametrize("reply", [
    Reply(whole("Hello")),
    Reply(whole("Hello", finish_reason=None)),
    Reply(whole("<think>They greet me.</think>Hello")),
    Reply(whole("Hello", reasoning_content="They greet me.")),
    Reply([json.dumps(whole("Hello"), indent=2).encode()]),
    Reply([b"\n", json.dumps(whole("Hello")).encode() + b"\n"], chunked=False),
])
def test_json_in_place_of_a_stream_is_shown(converse, once, reply):
    with play(reply) as server:
        assert once(server) == (0, "Hello\n", "")
        converse(server, "one", "two", "quit")
    assert contents(server)[2] == [("user", "one"), ("assistant", "Hello"), ("user", "two")]


@pytest.mark.parametrize("body, said", [
    ({"error": {"message": "model is loading"}}, "model is loading"),
    ({"detail": "quota exceeded"}, "quota exceeded"),
    ({"status": "ok"}, "{'status': 'ok'}"),
    ({"choices": [{"message": "x"}]}, "not OpenAI's shape"),
    ({"choices": [{"message": {"content": ["x"]}}]}, "not OpenAI's shape"),
])
def test_json_in_place_of_a_stream_that_is_no_answer_is_an_error(once, waits, body, said):
    with play(Reply(body)) as server:
        status, out, err = once(server)
    assert status == 1 and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert waits == []


def test_a_cut_answer_leaves_no_trace_in_the_conversation(converse, waits):
    with play(CUT[0], vllm("Hello")) as server:
        out = converse(server, "one", "two", "quit")
    assert "Hello\n(the connection was lost)" in out and contents(server)[1] == [("user", "two")]


@pytest.mark.parametrize(
    "failure, wait",
    [
        (Reply({"error": {"message": "busy"}}, status=503), 1),
        (Reply({"detail": "slow down"}, status=429, headers={"Retry-After": "7"}), 7),
        (Reply({"error": "later"}, status=502, headers={"Retry-After": "9999"}), 60),
        (Reply([], cut=True), 1),
        (Reply(vllm(finish=None)), 1),
    ],
)
def test_before_the_first_token_a_passing_failure_is_tried_again(once, waits, failure, wait):
    with play(failure, failure, vllm("<think>hm</think>Hello")) as server:
        status, out, err = once(server)
    assert (
        (status, out) == (0, "Hello\n")
        and waits == [wait, wait]
        and err.count("trying again") == 2
        and len(server.asked) == 3
    )


def test_a_wait_may_be_named_by_a_date(monkeypatch):
    monkeypatch.setattr(chat.time, "time", lambda: 1_763_683_200.0)    # 00:00:00
    assert chat.seconds_of("Fri, 21 Nov 2025 00:00:09 GMT") == 9
    assert chat.seconds_of("Fri, 21 Nov 2025 09:00:00 GMT") == chat.LONGEST_WAIT
    assert chat.seconds_of("Mon, 01 Jan 0001 00:00:00 GMT") == 1
    for nonsense in ("", "soon", "-3", "1e9", "9" * 5000, "٣"):
        assert chat.seconds_of(nonsense) == 1


def test_after_three_tries_it_gives_up(once, waits):
    with play(Reply({"error": {"message": "busy"}}, status=503)) as server:
        status, out, err = once(server)
    assert (
        status == 1
        and err.endswith("error: 503: busy\n")
        and len(server.asked) == 3
        and waits == [1, 1]
    )


@pytest.mark.parametrize(
    "reply, said",
    [
        (
            Reply({"error": {"message": "the prompt is too long", "code": 400}}, status=400),
            "400: the prompt is too long",
        ),
        (Reply({"detail": [{"loc": ["body"], "msg": "bad"}]}, status=422), "422: "),
        (Reply([b"<html>"], status=500), "500: Internal Server Error"),
        (Reply([b'data: {"error": {"message": "out of memory"}}\n\n']), "out of memory"),
        (Reply([b"data: {oops\n\n"]), "not JSON"),
        (Reply([b"data: []\n\n"]), "[]"),
        (Reply([b"\n<!DOCTYPE html><html>sign in</html>"]), "a page in place of a stream"),
        (Reply([b'data: {"choices": [{"delta": "x"}]}\n\n']), "not OpenAI's shape"),
        (Reply([b'data: {"choices": [1]}\n\n']), "not OpenAI's shape"),
    ],
)
def test_other_failures_are_told_at_once_and_the_conversation_continues(
    converse, once, waits, reply, said
):
    with play(reply) as server:
        status, _, err = once(server)
        assert (
            status == 1
            and err.startswith("error: ")
            and said in err
            and waits == []
            and len(server.asked) == 1
        )
    with play(reply, vllm("Hello")) as server:
        out = converse(server, "one", "two", "quit")
        assert said in out and "Hello" in out and contents(server)[1] == [("user", "two")]


def test_comments_and_other_lines_of_a_stream_are_ignored(once):
    with play(
        [b": ping\n\n", b"event: x\r\nid: 7\r\n", *vllm("a"), b"data: after the end\n\n"]
    ) as server:
        assert once(server) == (0, "a\n", "")


@pytest.mark.parametrize("chunked", [True, False])
def test_pieces_are_shown_when_they_come(monkeypatch, once, chunked):
    gate, show = threading.Event(), chat.Screen.show

    def show_and_continue(screen, thought, text):
        show(screen, thought, text)
        if text:
            gate.set()  # the server waits for this before it sends more

    monkeypatch.setattr(chat.Screen, "show", show_and_continue)
    first, *rest = vllm("a", finish=None)[1:] + vllm("b")[1:]
    with play(Reply([first, gate, *rest], chunked=chunked)) as server:
        assert once(server) == (0, "ab\n", "")


# --------------------------------------------------------------------------------------------------
# as its user runs it


def start(server, *words, **environment):
    return subprocess.Popen(
        [sys.executable, str(FILE), f"--url={server.address}", *words],
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def read_until(process, text):
    seen = ""
    while text not in seen:
        piece = process.stdout.read(1)
        assert piece, f"ended after {seen!r}: {process.stderr.read()}"
        seen += piece
    return seen


def test_ctrl_c_ends_the_answer_and_then_the_program():
    gate = threading.Event()
    with play(Reply([*vllm("begun", finish=None), gate]), vllm("Hello")) as server:
        process = start(server)
        try:
            process.stdin.write("one\n")
            process.stdin.flush()
            read_until(process, "begun")
            process.send_signal(signal.SIGINT)
            read_until(process, "you: ")
            gate.set()
            process.stdin.write("two\n")
            process.stdin.flush()
            read_until(process, "you: ")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            gate.set()
            process.kill()
    assert process.returncode == 0 and err == "(stopped)\n"
    assert contents(server)[1] == [("user", "one"), ("assistant", "begun"), ("user", "two")]


def test_ctrl_c_in_a_single_answer_ends_with_130():
    gate = threading.Event()
    with play(Reply([*vllm("begun", finish=None), gate])) as server:
        process = start(server, "--once", "hello")
        try:
            read_until(process, "begun")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            gate.set()
            process.kill()
            process.communicate()


def test_it_runs_from_anywhere_without_torch_and_the_rest_of_the_repository(tmp_path):
    for name in ("torch", "numpy", "nanochat", "fastapi", "tiktoken"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')", encoding="utf-8")
    with play(vllm("Grüße")) as server:
        process = subprocess.run(
            [sys.executable, str(FILE), f"--url={server.address}", "--once", "hello"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
    assert (process.returncode, process.stdout, process.stderr) == (0, "Grüße\n", "")
    nodes = list(ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.partition(".")[0] for name in names}
    assert names <= sys.stdlib_module_names | {"requests"}


def test_half_a_character_does_not_end_the_program():
    with play(vllm("a\ud83d", "b")) as server:
        process = start(server, "--once", "hello", PYTHONIOENCODING="utf-8")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "a?b\n", "")


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--url=localhost:8000"], "http://"),
        (["--url=http://"], "http://"),
        (["--url=http://[1:2]"], "http://"),
        (["--url=http://a b"], "http://"),
        (["--url=http://localhost:99999"], "http://"),
        (["--url=http://localhost:abc"], "http://"),
        (["--once", " "], "--once"),
        (["--promt=x"], "--promt"),
        (["--max_tokens=many"], "max_tokens"),
        (["--max_tokens=0"], "max_tokens"),
        (["--temperature=nan"], "temperature"),
        (["--temperature=-1"], "temperature"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, hint, capsys):
    with pytest.raises(SystemExit) as end:
        chat.main(words)
    err = capsys.readouterr().err
    assert (
        end.value.code == 2 and err.startswith("error: ") and hint in err and err.count("\n") == 1
    )


@pytest.mark.parametrize("key", ["k€", "k\r", "two words"])
def test_a_key_that_no_header_can_carry_is_named(monkeypatch, capsys, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as end:
        chat.main([])
    assert end.value.code == 2 and capsys.readouterr().err.startswith(
        "error: OPENAI_API_KEY must be"
    )


def test_a_reader_that_has_gone_is_no_traceback():
    with play(vllm(*["word "] * 9)) as server:
        process = start(server, "--once", "hello")
        process.stdout.close()
        assert process.wait(timeout=60) == 1 and process.stderr.read() == ""
        process.stderr.close()
        process.stdin.close()


def test_what_is_not_found_is_named_with_the_settings_that_may_be_wrong(once, waits):
    with play(Reply({"error": {"message": "no such model"}}, status=404), models=None) as server:
        for words in [], ["--model=x"]:
            status, _, err = once(server, *words)
            assert status == 1 and server.address in err and "--url and --model" in err


def test_a_server_that_is_not_there_is_one_line_and_status_1(once, waits):
    with play(vllm("a")) as server:
        pass
    status, out, err = once(server)
    assert (
        (status, out) == (1, "")
        and err.startswith("error: no answer")
        and "--url" in err
        and err.count("\n") == 1
    )
