import json
import re
import socket
import threading

import pytest
import requests
from chat_fakes import MODEL, FakeEngine, serve, wait_until

from models import make_model
from nanochat import server
from nanochat.common import UserError
from nanochat.engine import NonFiniteError
from nanochat.http_guard import check_names
from nanochat.openai_api import NUMBERS
from nanochat.sampling import MAX_TEMPERATURE
from scripts import chat_web

HELLO = [{"role": "user", "content": "hello"}]
BODY = {"messages": HELLO}
TEXT = "Hello 🙂!"


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine()
    with serve(engine) as address:
        yield engine, address


@pytest.fixture
def engine(served):
    served[0].reset()
    return served[0]


@pytest.fixture
def address(served, engine):
    return served[1]


@pytest.fixture
def client(address):
    reason = "the openai package, the client of this test, is not installed"
    openai = pytest.importorskip("openai", reason=reason)
    return openai.OpenAI(base_url=address + "/v1", api_key="any", max_retries=0, timeout=30)


def post(address, **fields):
    return requests.post(
        address + "/v1/chat/completions",
        json={"messages": HELLO, **fields},
        timeout=30,
        stream=fields.get("stream", False),
    )


def test_openai_client_whole_answer(client, engine):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, seed=7)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 5, 13)
    assert engine.calls[0]["temperature"] == 0 and engine.calls[0]["seed"] == 7


def test_openai_client_stream(client):
    chunks = list(client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
    ))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5


def test_openai_client_length_and_text_parts(client, engine):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
        ],
        max_tokens=5,
        max_completion_tokens=2,
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello", "length")
    assert engine.calls[0]["prompt"] == [1, 2, *map(ord, "be brief"), 2, *map(ord, "hello"), 3]


def test_openai_client_models_and_errors(client):
    import openai
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=0)
    assert error.value.param == "max_tokens"


def test_stream_on_the_wire(address):
    body = post(address, stream=True).content.decode("utf-8")
    events = body.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(e.startswith("data: {") for e in events[:-2])
    assert "usage" not in json.loads(events[-3].removeprefix("data: "))


@pytest.mark.parametrize("fields, param", [
    *[({"max_tokens": bad}, "max_tokens") for bad in (0, -1, "5", 1.5, True, [1])],
    ({"max_tokens": 2**20 + 1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    *[({"temperature": bad}, "temperature") for bad in (-0.1, 2.1, "1", False)],
    *[({"top_k": bad}, "top_k") for bad in (-2, 2**40, 1.5, True)],
    *[({"top_p": bad}, "top_p") for bad in (-0.1, 1.1, "1")],
    *[({"min_p": bad}, "min_p") for bad in (-0.1, 2)],
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": "0"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    *[({"seed": bad}, "seed") for bad in (2**70, "1")],
    *[({"n": bad}, "n") for bad in (0, 10**6, True, "2")],
    *[({"stop": bad}, "stop") for bad in (5, [""], list("abcde"), ["x" * 501])],
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{}], "tool_choice": "auto"}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {}}, "guided_json"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"), ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": "yes"}}, "include_usage"),
    ({"ignore_eos": 1}, "ignore_eos"), ({"echo": True}, "echo"),
    ({"continue_final_message": True}, "continue_final_message"),
    *[({"messages": bad}, "messages") for bad in (
        None,
        [],
        "hello",
        {},
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": [], "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "x" * 5000}],
    )],
])
def test_bad_fields_are_400_in_openai_shape(address, engine, fields, param):
    response = post(address, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] in (param, None)
    assert engine.calls == []


@pytest.mark.parametrize("body, status", [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff", 400),
    (b"[" * 100_000, 400),
    (b" " * 1_100_000, 413),
    (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400),
    (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": NaN}', 400),
    (b'{"messages": [{"role": "user", "content": "  "}]}', 400),
])
def test_bad_bodies(address, body, status):
    url = address + "/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    response = requests.post(url, data=body, headers=headers, timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_body_must_be_declared_as_json(address):
    url, body = address + "/v1/chat/completions", json.dumps({"messages": HELLO})
    headers = {"Content-Type": "text/plain"}
    assert requests.post(url, data=body, headers=headers, timeout=30).status_code == 400


def test_unknown_routes_are_404_in_openai_shape(address):
    for path in ("/v1/nothing", "/v1/", "/docs", "/health/", "/../etc/passwd"):
        response = requests.get(address + path, timeout=30)
        assert response.status_code == 404 and response.json()["error"]["message"]
    response = requests.get(address + "/v1/chat/completions", timeout=30)
    assert response.status_code == 405 and response.json()["error"]["message"]


def test_max_tokens_is_capped_and_the_context_is_never_exceeded(address, engine):
    post(address)
    for limit in (200, 201, 4096, 2**19, 2**20):
        assert post(address, max_tokens=limit).status_code == 200
        assert post(address, max_completion_tokens=limit).status_code == 200
    assert [len(c["prompt"]) + c["max_new_tokens"] for c in engine.calls] == [200] * 11


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", f"/v1/models/{MODEL}"])
def test_whatever_can_be_read_can_be_asked_for_with_head(address, path):
    head, get = (ask(address + path, timeout=30) for ask in (requests.head, requests.get))
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["Content-Length"] == get.headers["Content-Length"]


def test_a_single_model_is_described_and_another_is_not_found(address):
    listed = requests.get(address + "/v1/models", timeout=30).json()["data"]
    assert requests.get(f"{address}/v1/models/{MODEL}", timeout=30).json() == listed[0]
    for name in ("gpt-4", "meta/llama-3"):
        response = requests.get(f"{address}/v1/models/{name}", timeout=30)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


SYSTEM, ANSWER = {"role": "system", "content": "s"}, {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize("messages, prompt", [
    ([*HELLO, {"role": "assistant", "content": None}, *HELLO], "\1\2hello\n\nhello\3"),
    ([*HELLO, {"role": "assistant"}, *HELLO], "\1\2hello\n\nhello\3"),
    ([*HELLO, *HELLO], "\1\2hello\n\nhello\3"),
    ([{"role": "user", "content": ""}, *HELLO], "\1\2hello\3"),
    ([*HELLO, ANSWER, {"role": "user", "content": []}, *HELLO], "\1\2hello\2hi\2hello\3"),
    ([*HELLO, ANSWER, ANSWER, *HELLO], "\1\2hello\2hi\n\nhi\2hello\3"),
    ([ANSWER, *HELLO], "\1\2hello\3"),
    ([SYSTEM, ANSWER, *HELLO], "\1\2s\2hello\3"),
    ([SYSTEM, *HELLO, ANSWER, SYSTEM, *HELLO], "\1\2s\n\ns\2hello\2hi\2hello\3"),
    ([*HELLO, SYSTEM], "\1\2s\2hello\3"),
])
def test_messages_of_other_clients_are_made_well_formed(address, engine, messages, prompt):
    assert post(address, messages=messages).status_code == 200
    assert "".join(map(chr, engine.calls[0]["prompt"])) == prompt


def test_oldest_turns_are_dropped(address, engine):
    turns = [
        {"role": role, "content": f"{i} " + "x" * 20}
        for i in range(20) for role in ("user", "assistant")
    ]
    assert post(address, messages=[*turns, *HELLO], max_tokens=50).status_code == 200
    prompt = engine.calls[0]["prompt"]
    assert len(prompt) <= 150 and prompt[-6:] == [*map(ord, "hello"), 3]


def test_sequences_of_many_clients_share_the_steps_while_health_answers(address, engine):
    engine.gate.clear()
    answers = []

    def ask():
        answers.append(post(address).json())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert requests.get(address + "/health", timeout=30).json() == {"status": "ok"}
    assert answers == []
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert [a["choices"][0]["message"]["content"] for a in answers] == [TEXT] * 8
    assert engine.most_running == engine.max_slots, "a slot for each, as far as there are slots"


def test_a_client_that_leaves_frees_the_slot(address, engine):
    """docs/traps.md: server-slots-and-leaks"""
    engine.pieces = ["word "] * 150
    for i in range(20):
        engine.gate.clear()
        if i % 2:       # in mid-stream, else before the first piece
            engine.gate.set()
            response = post(address, stream=True)
            next(response.iter_content(1000))
            response.close()
        else:
            with pytest.raises(requests.Timeout):
                requests.post(address + "/v1/chat/completions", json=BODY, timeout=0.01)
        engine.gate.set()
        wait_until(lambda: not engine.running)
    engine.pieces = ["free"]
    assert post(address).json()["choices"][0]["message"]["content"] == "free"


def test_a_client_that_leaves_the_queue_is_never_served(address, engine):
    """docs/traps.md: server-slots-and-leaks"""
    engine.gate.clear()
    first = threading.Thread(target=post, args=[address])
    first.start()
    wait_until(lambda: engine.running)
    for stream in (False, True) * 3:
        with pytest.raises(requests.Timeout):
            requests.post(
                address + "/v1/chat/completions", json={**BODY, "stream": stream}, timeout=0.1)
    for _ in range(3):      # the loop sees the closed connections before it answers these
        requests.get(address + "/health", timeout=30)
    engine.gate.set()
    first.join()
    assert post(address).status_code == 200
    assert len(engine.calls) == 2


def test_a_failing_model_says_so_and_the_next_request_is_served(address, engine):
    engine.pieces = ["Hel", RuntimeError("secret detail")]
    response = post(address)
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    stream = post(address, stream=True).text
    assert '"server_error"' in stream and "secret" not in stream
    assert '"finish_reason": "' not in stream and "[DONE]" not in stream
    engine.pieces = [UserError("the prompt is too long")]
    assert post(address).status_code == 400
    assert "the prompt is too long" in post(address, stream=True).text
    engine.pieces = ["fine"]
    assert post(address).json()["choices"][0]["message"]["content"] == "fine"


def test_an_error_of_the_server_itself_is_not_shown(monkeypatch, address):
    def fail(*_):
        raise RuntimeError("/home/secret detail")

    monkeypatch.setattr(server, "chat_prompt", fail)
    response = post(address)
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_logits_that_are_not_finite_are_the_servers_failure_with_its_reason(address, engine):
    engine.pieces = ["Hel", NonFiniteError()]
    response = post(address)
    error = response.json()["error"]
    assert response.status_code == 500 and error["type"] == "server_error"
    assert "not finite" in error["message"] and "\n" not in error["message"]
    stream = post(address, stream=True).text
    assert "not finite" in stream and '"server_error"' in stream and "[DONE]" not in stream


def test_every_option_of_sampling_reaches_the_engine(client, engine):
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"50": -100},
        seed=3,
        extra_body={"top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    expected = {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {50: -100.0},
        "seed": 3,
        "top_k": 0,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_stop_tokens": True,
        "logprobs": None,
        "tenant": "",
        "questions": ["hello"],
    }
    assert {name: engine.calls[0][name] for name in expected} == expected


@pytest.mark.parametrize("fields", [
    {"top_k": 0},
    {"top_p": 0},
    {"stop": None}, {"stop": []}, {"stop": ""},
    {"tools": []}, {"tools": None}, {"tools": [{"type": "function"}], "tool_choice": "none"},
    {"tool_choice": "auto"}, {"parallel_tool_calls": True},
    {"functions": []}, {"function_call": "none"},
    {"stream_options": None}, {"temperature": None}, {"top_p": 1.0}, {"n": 1}, {"n": None},
    {"logit_bias": {}}, {"logprobs": False}, {"top_logprobs": 0}, {"top_logprobs": None},
    {"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"audio": None},
    {"user": "me"}, {"store": True}, {"metadata": {}}, {"reasoning_effort": "low"},
    {"service_tier": "auto"}, {"keep_alive": "5m"}, {"options": {}}, {"chat_id": "1"},
    {"guided_json": None}, {"best_of": 1}, {"max_tokens": 4096},
    {"messages": [{"role": "user", "content": "x", "name": "a", "cache_control": {}}]},
])
def test_fields_that_ask_for_nothing_are_accepted(address, fields):
    assert post(address, **fields).status_code == 200


def test_openai_client_several_choices_and_their_usage(client, engine):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=5)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, TEXT) for i in range(3)]
    assert [call["seed"] for call in engine.calls] == [5, 6, 7], "each samples for itself"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 15)
    texts, reasons = [""] * 3, [None] * 3
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True)
    for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [TEXT] * 3 and reasons == ["stop"] * 3


@pytest.mark.parametrize("stop, text", [
    ("lo", "Hel"),
    (["x", " "], "Hello"),
    (["🙂"], "Hello "),
    (["lo 🙂?"], TEXT),     # begun, and then not it
])
def test_openai_client_an_answer_ends_before_a_stop_text(client, stop, text):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, stop=stop)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stop=stop, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text
    assert chunks[-1].finish_reason == "stop"


def test_openai_client_logprobs_of_a_chat(client, engine):
    options = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == TEXT
    assert bytes(content[3].bytes) == "🙂".encode("utf-8") and content[0].logprob == -0.5
    assert [top.token for top in content[0].top_logprobs] == ["Hel", "a"]
    assert engine.calls[0]["logprobs"] == 2
    chunks = client.chat.completions.create(**options, stream=True)
    found = [chunk.choices[0].logprobs for chunk in chunks]
    entries = [entry for logprobs in found if logprobs for entry in logprobs.content]
    assert "".join(entry.token for entry in entries) == TEXT
    stopped = client.chat.completions.create(**options, stop=[" "])
    tokens = [entry.token for entry in stopped.choices[0].logprobs.content]
    assert tokens == ["Hel", "lo"], "what is cut off is not listed"


def test_the_tokens_of_a_tools_reply_are_listed_as_certain(address, engine):
    engine.forced = ["lo", " "]
    content = post(address, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == TEXT
    assert [entry["logprob"] for entry in content] == [-0.5, 0, 0, -0.5, -0.5]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["Hel", "a"]
    assert [top["token"] for top in content[1]["top_logprobs"]] == ["lo"]


def test_a_piece_of_a_character_has_its_bytes_as_its_token(address, engine):
    engine.pieces = ["🙂".encode("utf-8")[:2], "🙂".encode("utf-8")[2:]]
    choice = post(address, logprobs=True).json()["choices"][0]
    assert choice["message"]["content"] == "🙂"
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert tokens == [r"bytes:\xf0\x9f", r"bytes:\x99\x82"]


def test_a_begun_answer_is_continued(address, engine):
    begun = {"role": "assistant", "content": "It is"}
    assert post(address, messages=[*HELLO, begun]).status_code == 200
    assert engine.calls[0]["prompt"] == [1, 2, *map(ord, "hello"), 3, *map(ord, "It is")]
    marked = {"messages": [*HELLO, begun], "continue_final_message": True}
    assert post(address, **marked).status_code == 200
    refused = post(address, messages=[*HELLO, begun], continue_final_message=False)
    assert refused.status_code == 400


@pytest.mark.parametrize("kind, word", [
    ("image_url", "images"), ("input_image", "images"), ("input_audio", "audio"),
])
def test_what_a_model_of_text_cannot_read_is_named(address, kind, word):
    part = {"type": kind, kind: {"url": "data:,"}}
    response = post(address, messages=[{"role": "user", "content": [part]}])
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and word in message and "not supported" in message


def test_metrics_count_requests_tokens_and_times(engine):
    with serve(engine) as address:
        post(address)
        post(address, n=True)
        requests.get(address + "/somewhere/else", timeout=30)
        response = requests.get(address + "/metrics", timeout=30)
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    chats = 'nanochat_requests_total{route="/v1/chat/completions",status='
    assert lines[chats + '"200"}'] == lines[chats + '"400"}'] == "1"
    assert lines['nanochat_requests_total{route="other",status="404"}'] == "1"
    assert lines["nanochat_prompt_tokens_total"] == "8"
    assert lines["nanochat_generated_tokens_total"] == "5"
    assert lines["nanochat_time_to_first_token_seconds_count"] == "1"
    assert lines["nanochat_inter_token_seconds_count"] == "4"
    assert lines['nanochat_inter_token_seconds_bucket{le="+Inf"}'] == "4"
    assert lines["nanochat_engine_alive"] == "1" and lines["nanochat_sequences_running"] == "0"


def test_the_schema_names_the_routes_and_the_bounds(address):
    schema = requests.get(address + "/openapi.json", timeout=30).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    fields = body["content"]["application/json"]["schema"]["properties"]
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert "/v1/completions" in schema["paths"]


def test_while_the_model_is_loaded_requests_are_told_to_come_again():
    engine, loaded = FakeEngine(), threading.Event()

    def load():
        assert loaded.wait(30)
        return engine

    with serve(engine, load=load) as address:
        wait_until(lambda: answers(address + "/health"))
        assert requests.get(address + "/health", timeout=30).json() == {"status": "loading"}
        for refused in (
            requests.get(address + "/ready", timeout=30),
            requests.get(address + "/about", timeout=30),
            post(address),
            complete(address, prompt="x"),
        ):
            assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
            assert "being loaded" in refused.json()["error"]["message"]
        assert requests.get(address + "/", timeout=30).status_code == 200
        loaded.set()
        wait_until(lambda: requests.get(address + "/ready", timeout=30).status_code == 200)
        assert post(address).status_code == 200


def answers(url):
    """Whether anybody answers there."""
    try:
        return requests.get(url, timeout=30)
    except requests.ConnectionError:
        return None


def test_every_piece_is_sent_when_it_is_there():
    """Nagle's algorithm would hold it back until the client has acknowledged the last one."""
    with chat_web.listen("127.0.0.1", 0) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()
        accepted.close()


@pytest.mark.parametrize("name, value", [
    ("max_slots", 0), ("max_queue", -1), ("drain_seconds", -1), ("num_gpus", 0),
    ("temperature", -1), ("temperature", 9.0), ("max_tokens", 0), ("dtype", "half"),
    ("allowed_hosts", "http://x y"), ("allowed_hosts", "b.test,a.test:80"),
    ("allowed_origins", "foo"), ("allowed_origins", "http://a.test/page"),
    ("allowed_origins", "http://A.test"),
])
def test_settings_with_which_nothing_can_be_served_are_refused(monkeypatch, name, value):
    monkeypatch.setattr(chat_web, name, value)
    with pytest.raises(UserError, match=str(value).rpartition(",")[2]):
        chat_web.check_settings()


def test_a_default_and_a_request_may_have_the_same_temperatures():
    assert NUMBERS["temperature"].high == MAX_TEMPERATURE


def test_hosts_and_origins_of_every_form_are_accepted():
    hosts = ["*", "a.test", "A.test", "10.0.0.1", "::1", "fe80::1"]
    check_names(hosts, ["*", "null", "http://a.test", "https://a.test:3000", "http://[::1]:8"])


@pytest.mark.parametrize("free, slots", [
    (10**12, 32), (4 * 5 * 2 * 16_384 + 9, 5), (1, 1), (None, 32),
])
def test_so_many_slots_are_chosen_as_the_free_memory_holds(monkeypatch, free, slots):
    model = make_model(depth=2, vocab_size=300)     # 32 tokens of 64 numbers, keys and values
    monkeypatch.setattr(chat_web, "free_memory", lambda device: free)
    [layer, other] = model.new_kv_cache(1, model.config.max_seq_len).layers
    assert layer.nbytes == other.nbytes == 32 * 64 * 2 * 4
    assert chat_web.fitting_slots(model, None) == slots


def test_two_engines_share_the_requests(engine):
    other = FakeEngine()
    engine.delay = other.delay = 0.02
    with serve(engine, engines=[other]) as address:
        threads = [threading.Thread(target=post, args=[address]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(engine.calls) == len(other.calls) == 4


def test_conversations_are_not_logged(engine, capfd, caplog):
    """docs/traps.md: server-slots-and-leaks"""
    engine.pieces = ["canary-answer"]
    with serve(engine) as address:
        for stream in (False, True):
            question = [{"role": "user", "content": "canary-question"}]
            response = post(address, messages=question, stream=stream)
            assert "canary-answer" in response.text
    assert "canary" not in "".join(capfd.readouterr()) + caplog.text


def test_no_foreign_origin_is_allowed(address):
    """docs/traps.md: server-slots-and-leaks"""
    chat, models = address + "/v1/chat/completions", address + "/v1/models"
    origin = {"Origin": "http://evil.test"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    for response in (
        requests.options(chat, headers=preflight, timeout=30),
        requests.get(models, headers=origin, timeout=30),
    ):
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


# ------------------------------------------------------------------------------------------------
# a base model, which continues texts

@pytest.fixture(scope="module")
def base_served():
    engine = FakeEngine()
    with serve(engine, continues=True, suggestions=["Die Uhr"]) as address:
        yield engine, address


@pytest.fixture
def base_engine(base_served):
    base_served[0].reset()
    return base_served[0]


@pytest.fixture
def base_address(base_engine, base_served):
    return base_served[1]


def complete(address, **fields):
    return requests.post(address + "/v1/completions", json=fields, timeout=30)


def test_openai_client_continues_a_text(base_address, base_engine):
    reason = "the openai package, the client of this test, is not installed"
    openai = pytest.importorskip("openai", reason=reason)
    client = openai.OpenAI(base_url=base_address + "/v1", api_key="any", max_retries=0, timeout=30)
    options = {"model": MODEL, "prompt": "My name", "temperature": 0, "seed": 7}
    whole = client.completions.create(**options, echo=True)
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason) == ("My name" + TEXT, "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 5)
    assert base_engine.calls[0]["prompt"] == [1, *map(ord, "My name")]
    assert base_engine.calls[0]["temperature"] == 0 and base_engine.calls[0]["seed"] == 7

    usage = {"include_usage": True}
    chunks = list(client.completions.create(**options, stream=True, stream_options=usage))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == TEXT
    assert {c.object for c in chunks} == {whole.object} == {"text_completion"}
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].usage.completion_tokens == 5
    echoed = client.completions.create(**options, stream=True, echo=True)
    assert "".join(c.choices[0].text for c in echoed) == "My name" + TEXT


def test_the_same_prompt_twice_is_sampled_twice_unless_a_seed_is_given(base_address, base_engine):
    for seed in (None, 7):
        assert complete(base_address, prompt=["x", "x"], seed=seed).status_code == 200
    first, second, *seeded = [call["seed"] for call in base_engine.calls]
    assert first != second and seeded == [7, 7]


@pytest.mark.parametrize("fields, text, reason", [
    ({"stop": "lo"}, "Hel", "stop"),
    ({"stop": ["x", " "]}, "Hello", "stop"),
    ({"stop": []}, TEXT, "stop"),
    ({"max_tokens": 2}, "Hello", "length"),
    ({"prompt": ["one text"]}, TEXT, "stop"),
    ({"prompt": ""}, TEXT, "stop"),
    ({"prompt": None}, TEXT, "stop"),
])
def test_a_continuation_ends_where_it_was_asked_to(base_address, fields, text, reason):
    response = complete(base_address, **{"prompt": "x", **fields})
    choice = response.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)


@pytest.mark.parametrize("prompt", ["x" * 500 + "end", [5] * 500 + [*map(ord, "end")]])
def test_the_end_of_a_long_prompt_is_continued_only_where_that_was_asked_for(
    base_address, base_engine, prompt
):
    refused = complete(base_address, prompt=prompt, max_tokens=50)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded"
    said = f"has {len(prompt) + isinstance(prompt, str)} tokens, the model reads 199"
    assert said in error["message"] and "truncate_prompt_tokens" in error["message"]
    assert base_engine.calls == []
    for wanted, kept in ((-1, 150), (20, 20)):
        fields = {"prompt": prompt, "max_tokens": 50, "truncate_prompt_tokens": wanted}
        assert complete(base_address, **fields).status_code == 200
        ids = base_engine.calls[-1]["prompt"]
        assert len(ids) == kept and ids[-3:] == list(map(ord, "end"))
    echoed = complete(base_address, **fields, echo=True).json()["choices"][0]["text"]
    assert echoed.partition("end")[0] == base_engine.tokenizer.decode(ids[:-3])


def test_a_prompt_that_fits_keeps_its_beginning_and_the_answer_gets_what_is_left(
    base_address, base_engine
):
    assert complete(base_address, prompt="x" * 190, max_tokens=50).status_code == 200
    call = base_engine.calls[0]
    assert len(call["prompt"]) == 191 and call["max_new_tokens"] == 9


@pytest.mark.parametrize("fields, param", [
    *[({"prompt": bad}, "prompt") for bad in (5, [], [1000], [-1], [1.5], {}, [[]], [[1], 5])],
    ({"prompt": ["a"] * 105}, "prompt"),
    *[({"stop": bad}, "stop") for bad in (5, [""], [1], list("abcde"), {"a": 1})],
    ({"echo": "yes"}, "echo"),
    ({"n": 17}, "n"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
    ({"logprobs": 21}, "logprobs"), ({"max_tokens": 0}, "max_tokens"),
    *[({"truncate_prompt_tokens": bad}, "truncate_prompt_tokens") for bad in (0, -2, "5", 1.5)],
    ({"temperature": -1}, "temperature"), ({"stream": 1}, "stream"),
    ({"model": "gpt-4"}, "model"),
])
def test_bad_fields_of_a_text_are_refused(base_address, base_engine, fields, param):
    response = complete(base_address, **{"prompt": "x", **fields})
    error = response.json()["error"]
    assert response.status_code in (400, 404) and error["param"] == param
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert base_engine.calls == []


def test_openai_client_several_prompts_of_every_form(base_address, base_engine):
    for prompt, texts in (
        (["one", "two"], ["one", "two"]),
        ([65, 66], ["AB"]),
        ([[65], [66]], ["A", "B"]),
    ):
        answer = complete(base_address, prompt=prompt, echo=True, n=2).json()
        found = [(c["index"], c["text"]) for c in answer["choices"]]
        doubled = [text + TEXT for text in texts for _ in range(2)]
        assert found == list(enumerate(doubled))
    ids = [call["prompt"] for call in base_engine.calls]
    assert ids[0] == [1, *map(ord, "one")], "a text begins with <|bos|>"
    assert ids[4] == [65, 66], "ids are taken as they are"


def test_openai_client_logprobs_of_a_continuation_with_its_prompt(base_address, base_engine):
    answer = complete(base_address, prompt="My", echo=True, logprobs=2, max_tokens=2).json()
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "MyHello" and logprobs["tokens"] == ["M", "y", "Hel", "lo"]
    assert logprobs["text_offset"] == [0, 1, 2, 5]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][2] == {"Hel": -0.5, "a": -1.0}
    assert base_engine.calls[0]["prompt_logprobs"] is True
    plain = complete(base_address, prompt="My", logprobs=0, max_tokens=2).json()["choices"][0]
    assert plain["logprobs"]["tokens"] == ["Hel", "lo"]
    assert plain["logprobs"]["text_offset"] == [0, 3]


def test_a_text_is_scored_without_an_answer(base_address):
    """As evaluation harnesses do: token ids, max_tokens=0, echo and logprobs."""
    answer = complete(
        base_address, prompt=[[65, 66, 67], [68, 69]], max_tokens=0, echo=True, logprobs=1).json()
    first, second = answer["choices"]
    assert first["text"] == "ABC" and first["finish_reason"] == "length"
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert first["logprobs"]["top_logprobs"][0] is None
    assert second["logprobs"]["tokens"] == ["D", "E"]
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 5


def test_a_text_that_is_to_be_repeated_is_never_cut(base_address):
    response = complete(base_address, prompt="x" * 300, echo=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_chat_model_continues_texts_as_well_and_a_base_model_has_no_chats(base_address, address):
    refused = requests.post(
        base_address + "/v1/chat/completions", json={"messages": HELLO}, timeout=30)
    message = refused.json()["error"]["message"]
    assert refused.status_code == 400 and "POST /v1/completions" in message
    assert complete(address, prompt="x").json()["choices"][0]["text"] == TEXT


def test_the_page_is_told_what_fits_the_model(base_address, address):
    about = requests.get(base_address + "/about", timeout=30).json()
    expected = {"model": MODEL, "name": "nanochat", "continues": True, "suggestions": ["Die Uhr"]}
    assert {name: about[name] for name in expected} == expected, "name heads the page"
    assert about["needs_key"] is False and about["context"] == 200
    defaults = {"temperature": 0.6, "top_p": 1.0, "top_k": 50, "max_tokens": 256}
    assert about["defaults"] == defaults
    about = requests.get(address + "/about", timeout=30).json()
    assert about["continues"] is False and "Who are you?" in about["suggestions"]


def test_a_failing_base_model_says_so(base_address, base_engine):
    base_engine.pieces = ["Hel", RuntimeError("secret detail")]
    response = complete(base_address, prompt="x")
    assert response.status_code == 500 and "secret" not in response.text
    stream = complete(base_address, prompt="x", stream=True).text
    assert '"server_error"' in stream and "[DONE]" not in stream and "secret" not in stream


def test_page_allows_nothing_from_elsewhere(address):
    response = requests.get(address + "/", timeout=30)
    policy = response.headers["Content-Security-Policy"]
    assert re.sub("'sha256-[^']{44}'", "HASH", policy).split("; ") == [
        "default-src 'none'",
        "script-src HASH",
        "style-src HASH",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "innerHTML" not in response.text and " src=" not in response.text
