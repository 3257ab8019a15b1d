"""The benchmark against our own server, and against hand-written streams that fail in every way."""

import sys
import threading

import pytest
from chat_fakes import MODEL, FakeEngine, serve
from stream_fakes import Reply, catching_environment, play, vllm

from conftest import last_json
from nanochat import load_test
from nanochat.common import UserError
from nanochat.configurator import configure
from nanochat.hardware import DEVICES
from nanochat.roofline import MODELS, decode_rate
from scripts import serve_benchmark

DEFAULTS = {
    name: getattr(serve_benchmark, name)
    for name in (
        "url",
        "concurrency",
        "input",
        "output",
        "rounds",
        "served_model",
        "ignore_eos",
        "timeout",
        "model",
        "device",
        "devices",
        "dtype",
    )
}


@pytest.fixture
def benchmark(capsys, base_dir, monkeypatch):
    """benchmark(address, "--concurrency=1", ...) -> (what it printed, its JSON record)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets its own
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(address, *words):
        for name, value in DEFAULTS.items():
            monkeypatch.setattr(serve_benchmark, name, value)
        serve_benchmark.main(configure(vars(serve_benchmark), [f"--url={address}", *words]))
        out = capsys.readouterr().out
        assert last_json((base_dir / "metrics.jsonl").read_text(encoding="utf-8")) == last_json(out)
        return out, last_json(out)

    return run


def probes_then(*replies):
    """Replies to the two requests that find out how many tokens a word has, then these.

    Here a word is one token, and the rest of a prompt is 10.
    """
    return [vllm("a", finish="length", usage=(10 + words, 1)) for words in (4, 20)] + list(replies)


def test_our_own_server_is_measured(benchmark):
    engine = FakeEngine()
    with serve(engine) as address:
        out, record = benchmark(
            address, "--concurrency=1,3", "--input=64", "--output=5", "--rounds=2"
        )
    assert record["stage"] == "serve_benchmark" and record["served_model"] == MODEL
    assert [(row["concurrency"], row["requests"], row["errors"]) for row in record["rows"]] == [
        (1, 2, {}),
        (3, 6, {}),
    ]
    assert len(engine.calls) == 2 + 2 + 6
    for row in record["rows"]:
        assert row["output_tokens"] == 5 and row["tokens_from_usage"]
        assert 1 <= row["pieces"] <= 5, "a server may send several tokens as one piece"
        assert 44 < row["input_tokens"] < 84, (
            "words differ in length, and this tokenizer's tokens are characters"
        )
        assert (
            row["tokens_per_second"] > 0
            and 0 < row["ttft"] <= row["ttft_p95"]
            and 0 <= row["between_tokens"] <= row["between_tokens_p95"]
        )
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert (
        [line.count("|") for line in table] == [8] * 4
        and table[2].startswith("| 1 |")
        and table[3].endswith("| 0 of 6 |")
    )
    assert "the server's usage" in out and "roofline" not in out.splitlines()[-2]


def test_an_answer_longer_than_the_context_of_our_server_is_as_long_as_there_is_room(benchmark):
    engine = FakeEngine(["a"] * 300)
    with serve(engine) as address:
        _, record = benchmark(
            address, "--concurrency=2", "--input=60", "--output=201", "--rounds=1"
        )
    (row,) = record["rows"]
    assert row["errors"] == {} and 0 < row["output_tokens"] < 200


def test_a_prompt_longer_than_the_context_of_our_server_is_refused_with_its_reason(benchmark):
    with (
        serve(FakeEngine()) as address,
        pytest.raises(UserError, match="400: .* the model reads 199: .*--input"),
    ):
        benchmark(address, "--concurrency=2", "--input=400", "--output=5")


def test_prompts_have_the_tokens_asked_for_and_nothing_in_common(benchmark):
    with play(*probes_then(vllm("a", usage=(64, 1)))) as server:
        _, record = benchmark(
            server.address + "/v1/",
            "--concurrency=4",
            "--input=64",
            "--output=7",
            "--ignore_eos",
            "--rounds=2",
        )
    bodies = [body for body, _ in server.asked[2:]]
    texts = [
        body["messages"][0]["content"].removesuffix(load_test.TASK).split() for body in bodies
    ]
    assert [len(text) for text in texts] == [54] * 8 and len(
        {tuple(text[:20]) for text in texts}
    ) == 8
    assert all(
        body["max_tokens"] == 7
        and body["ignore_eos"]
        and body["stream_options"] == {"include_usage": True}
        for body in bodies
    )
    assert record["rows"][0]["input_tokens"] == 64


def test_tokens_are_those_of_usage_where_pieces_hold_several(benchmark):
    with play(*probes_then(vllm("two tokens", " and three more", usage=(30, 5)))) as server:
        out, record = benchmark(server.address, "--concurrency=2")
    row = record["rows"][0]
    assert (
        row["output_tokens"] == 5
        and row["pieces"] == 2
        and row["tokens_from_usage"]
        and "the server's usage" in out
    )


def test_without_usage_pieces_are_counted_and_the_report_says_so(benchmark):
    with play(vllm("a", "b", "c")) as server:
        out, record = benchmark(server.address, "--concurrency=2", "--input=9", "--rounds=1")
    row = record["rows"][0]
    assert (
        row["output_tokens"] == 3 and not row["tokens_from_usage"] and row["input_tokens"] is None
    )
    assert "pieces of the streams" in out and "prompts of unknown" in out
    assert len(server.asked[2][0]["messages"][0]["content"].split()) == 9 + len(
        load_test.TASK.split()
    )


def test_thoughts_count_as_pieces_of_the_answer(benchmark):
    with play(vllm({"reasoning_content": "hm"}, {"reasoning": "yes"}, "a")) as server:
        assert benchmark(server.address, "--concurrency=1")[1]["rows"][0]["pieces"] == 3


def test_failures_of_every_kind_are_counted_and_nothing_else_of_them(benchmark):
    whole = vllm("a", "b", usage=(20, 2))
    failures = [
        Reply(vllm("a", "b", "c", finish=None), cut=True),
        Reply(vllm("a", "b", "c", finish=None)),
        Reply(
            [
                *vllm("a", finish=None),
                b'data: {"error": {"message": "out of memory", "code": 500}}\n\n',
            ]
        ),
        Reply({"error": {"message": "busy"}}, status=503),
        Reply([b"data: {oops\n\n"]),
        Reply([b"data: [1]\n\n"]),
        Reply({"detail": "slow down"}, status=429),
    ]
    with play(*probes_then(*failures, whole)) as server:
        out, record = benchmark(server.address, "--concurrency=1,5", "--rounds=9")
    first, second = record["rows"]
    assert sum(first["errors"].values()) == 7 and len(first["errors"]) == 6, first["errors"]
    assert {
        "out of memory",
        "busy",
        "slow down",
        "cut: the stream ended without a finish_reason",
    } < first["errors"].keys()
    assert first["output_tokens"] == 2 and first["pieces"] == 2 and second["errors"] == {}
    assert "| 7 of 9 |" in out and "1 x out of memory" in out


@pytest.mark.parametrize(
    "reply, error, said",
    [
        (
            Reply({"error": {"message": "the prompt is too long"}}, status=400),
            UserError,
            "400: the prompt is too long: try smaller --input",
        ),
        (Reply({"error": "Unauthorized"}, status=401), UserError, "OPENAI_API_KEY"),
        (
            Reply({"error": {"message": "load\x1b[31ming"}}, status=503),
            ConnectionError,
            r"load \[31ming",
        ),
        (Reply(vllm("a", finish=None), cut=True), ConnectionError, "200"),
    ],
)
def test_a_server_that_answers_nothing_ends_the_program(benchmark, reply, error, said):
    with play(reply) as server, pytest.raises(error, match=said):
        benchmark(server.address)
    with (
        play(*probes_then(reply)) as server,
        pytest.raises(error, match=said),
    ):  # the same once it is being measured
        benchmark(server.address, "--concurrency=2", "--rounds=1")


def test_the_key_is_sent_and_the_model_found_unless_named(benchmark, monkeypatch):
    with play(*probes_then(vllm("a"))) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        out, record = benchmark(
            server.address, "--concurrency=1", "--rounds=1", "--served_model=other"
        )
        assert {headers["Authorization"] for _, headers in server.asked} == {
            "Bearer secret"
        } and "secret" not in out
        assert {body["model"] for body, _ in server.asked} == {"other"}
    for models in ((), None):
        with (
            play(vllm("a"), models=models) as server,
            pytest.raises(UserError, match="--served_model"),
        ):
            benchmark(server.address)


def test_the_share_of_the_roofline_is_of_the_context_that_was_measured(benchmark):
    with play(*probes_then(vllm("a", "b", usage=(1000, 48)))) as server:
        out, record = benchmark(
            server.address,
            "--concurrency=4",
            "--rounds=1",
            "--model=qwen3-32b",
            "--device=dgx-spark",
            "--dtype=fp8",
        )
    row, bound = (
        record["rows"][0],
        decode_rate(MODELS["qwen3-32b"], DEVICES["dgx-spark"], "fp8", 4, 1024)[0],
    )
    assert row["roofline"] == bound
    assert (
        f"{100 * row['tokens_per_second'] / bound:.0f} of {bound:.1f} |" in out
        and "% of the roofline" in out
    )


@pytest.mark.parametrize("chunked", [True, False])
def test_pieces_are_timed_when_they_come_not_when_the_answer_ends(chunked):
    gate = threading.Event()

    class Times(list):
        def append(self, time):
            super().append(time)
            gate.set()  # the server waits for this before it sends more

    first, *rest = vllm("a", finish=None)[1:] + vllm("b")[1:]
    with play(Reply([first, gate, *rest], chunked=chunked)) as server:
        request = load_test.Request(load_test.Server(server.address + "/v1", "x"), 3, 5)
        request.times = Times()
        request.run(load_test.open_session(request.server.base))
    assert request.error == "" and len(request.times) == 2


def test_a_usage_without_numbers_is_no_usage(benchmark):
    null = b'data: {"choices": [], "usage": {"prompt_tokens": null, "completion_tokens": null}}\n\n'
    with play([*vllm("a", "b")[:-1], null]) as server:
        row = benchmark(server.address, "--concurrency=1", "--rounds=1", "--input=9")[1]["rows"][0]
    assert (
        row["output_tokens"] == 2 and not row["tokens_from_usage"] and row["input_tokens"] is None
    )


def test_a_server_whose_list_of_models_fails_is_no_bad_input(benchmark, monkeypatch):
    broken = load_test.requests.Response()
    broken.status_code = 500
    monkeypatch.setattr(load_test.requests.Session, "get", lambda *_, **__: broken)
    with pytest.raises(ConnectionError, match="500"):
        benchmark("http://localhost:1")


@pytest.mark.parametrize("key", ["k€", "k\r", "two words"])
def test_a_key_that_no_header_can_carry_is_named(benchmark, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with play(vllm("a")) as server, pytest.raises(UserError, match="OPENAI_API_KEY"):
        benchmark(server.address)


def test_the_end_that_a_server_marks_is_the_end_of_a_whole_answer(benchmark):
    marked = [*vllm("a", "b", finish=None), b"data: [DONE]\n\n"]
    with play(*probes_then(marked)) as server:
        row = benchmark(server.address, "--concurrency=1", "--rounds=2")[1]["rows"][0]
    assert row["errors"] == {} and row["output_tokens"] == 2


@pytest.mark.parametrize("body, said", [
    ({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}, "Hello"),
    ({"error": {"message": "model is loading"}}, "model is loading"),
    ({"detail": "quota"}, "quota"),
])
def test_json_in_place_of_a_stream_is_an_error_that_shows_it(benchmark, body, said):
    with (
        play(Reply(body)) as server,
        pytest.raises(ConnectionError, match=f"JSON in place of a stream.*{said}"),
    ):
        benchmark(server.address, "--concurrency=1", "--rounds=1")


def test_netrc_and_proxies_do_not_come_between_client_and_server(
    benchmark, monkeypatch, tmp_path
):
    for name, value in catching_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with play(*probes_then(vllm("a"))) as server:
        benchmark(server.address, "--concurrency=1", "--rounds=1")
    assert {headers["Authorization"] for _, headers in server.asked} == {"Bearer secret"}
    assert load_test.open_session("http://a.test/v1").proxies["http"]


def test_percentiles_are_values_that_were_seen():
    values = list(range(1, 101))
    assert (
        load_test.percentile(values[::-1], 0.95) == 95
        and load_test.percentile([7], 0.95) == 7
    )
    assert load_test.percentile([], 0.95) is None


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--concurrency=one"], "1,8,32"),
        (["--output=0"], "output"),
        (["--rounds=0"], "rounds"),
        (["--model=qwen3-32b"], "--device"),
        (["--model=qwen3-32b", "--device=pc"], "dgx-spark"),
        (["--model=deepseek-r1", "--device=mi350x", "--dtype=int4"], "fp8"),
        (["--url=localhost:8000"], "http://"),
        (["--url=http://"], "http://"),
        (["--url=http://[::z]:80"], "http://"),
        (["--model=qwen3-32b", "--device=dgx-spark"], "dtype.*bf16, fp8, int4"),
        (["--dtype=fp8"], "--model"),
        (["--devices=2"], "--model"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(benchmark, words, hint):
    with play(vllm("a")) as server, pytest.raises(UserError, match=hint):
        benchmark(server.address, *words)
    assert server.asked == []


def test_a_server_that_is_not_there_is_one_line_and_status_1(run_module, tmp_path):
    with play(vllm("a")) as server:
        address = server.address
    done = run_module("scripts.serve_benchmark", f"--url={address}", base=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--url" in done.stderr
