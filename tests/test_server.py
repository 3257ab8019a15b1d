import json
import threading

import pytest
import requests
from chat_fakes import MODEL, FakeEngine, serve

from nanochat.common import UserError
from nanochat.engine import NonFiniteError

HELLO = [{"role": "user", "content": "hello"}]
TEXT = "Hello 🙂!"


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine()
    with serve(engine) as address:
        yield engine, address


@pytest.fixture
def engine(served):
    served[0].__init__()    # as new for every test
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
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["stop"]
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
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    *[({"temperature": bad}, "temperature") for bad in (-0.1, 2.1, "1", False)],
    *[({"top_k": bad}, "top_k") for bad in (0, 1001)],
    *[({"seed": bad}, "seed") for bad in (2**70, "1")],
    ({"n": 10**6}, "n"),
    ({"stop": ["x"]}, "stop"),
    ({"tools": [{}]}, "tools"),
    ({"top_p": 0.5}, "top_p"),
    ({"stream": "yes"}, "stream"), ({"stream_options": []}, "stream_options"),
    *[({"messages": bad}, "messages") for bad in (
        None,
        [],
        "hello",
        {},
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": [], "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": ["x"]}],
        [*HELLO, {"role": "assistant", "content": "hi"}],
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
    for path in ("/v1/nothing", "/v1/", "/docs", "/openapi.json", "/../etc/passwd"):
        response = requests.get(address + path, timeout=30)
        assert response.status_code == 404 and response.json()["error"]["message"]
    response = requests.get(address + "/v1/chat/completions", timeout=30)
    assert response.status_code == 405 and response.json()["error"]["message"]


def test_max_tokens_is_capped_and_the_context_is_never_exceeded(address, engine):
    post(address)
    for limit in (200, 201, 4096, 10**9, 2**80):
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


def test_requests_queue_while_health_answers(address, engine):
    engine.gate.clear()
    answers = []

    def ask():
        answers.append(post(address).json())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert requests.get(address + "/health", timeout=30).json() == {"status": "ok"}
    assert answers == []
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert [a["choices"][0]["message"]["content"] for a in answers] == [TEXT] * 4
    assert engine.most_running == 1


def test_a_client_that_leaves_frees_the_slot(address, engine):
    """docs/traps.md: server-slots-and-leaks"""
    engine.pieces = ["word "] * 150
    for i in range(20):
        engine.gate.clear()
        response = post(address, stream=True)
        if i % 2:       # in mid-stream, else before the first piece
            engine.gate.set()
            next(response.iter_content(1000))
            engine.gate.clear()
        response.close()
        requests.get(address + "/health", timeout=30)
        engine.gate.set()
    engine.pieces = ["free"]
    assert post(address).json()["choices"][0]["message"]["content"] == "free"
    assert engine.running == 0


def test_a_client_that_leaves_the_queue_is_never_served(address, engine):
    """docs/traps.md: server-slots-and-leaks"""
    engine.gate.clear()
    first = threading.Thread(target=post, args=[address])
    first.start()
    while engine.running == 0:
        requests.get(address + "/health", timeout=30)
    for _ in range(5):
        post(address, stream=True).close()
    with pytest.raises(requests.Timeout):     # the same for one that waits for a whole answer
        requests.post(address + "/v1/chat/completions", json={"messages": HELLO}, timeout=0.3)
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


def test_logits_that_are_not_finite_are_the_servers_failure_with_its_reason(address, engine):
    engine.pieces = ["Hel", NonFiniteError()]
    response = post(address)
    error = response.json()["error"]
    assert response.status_code == 500 and error["type"] == "server_error"
    assert "not finite" in error["message"] and "\n" not in error["message"]
    stream = post(address, stream=True).text
    assert "not finite" in stream and '"server_error"' in stream and "[DONE]" not in stream


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
    base_served[0].__init__()
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


def test_of_a_long_text_the_end_is_continued(base_address, base_engine):
    assert complete(base_address, prompt="x" * 500 + "end", max_tokens=50).status_code == 200
    prompt = base_engine.calls[0]["prompt"]
    assert len(prompt) == 150 and prompt[-3:] == list(map(ord, "end"))


@pytest.mark.parametrize("fields, param", [
    *[({"prompt": bad}, "prompt") for bad in (5, [], ["a", "b"], [1, 2], {}, [[1]])],
    *[({"stop": bad}, "stop") for bad in (5, [""], [1], list("abcde"), {"a": 1})],
    ({"echo": "yes"}, "echo"),
    ({"n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
    ({"logprobs": 3}, "logprobs"), ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -1}, "temperature"), ({"stream": 1}, "stream"),
    ({"model": "gpt-4"}, "model"),
])
def test_bad_fields_of_a_text_are_refused(base_address, base_engine, fields, param):
    response = complete(base_address, **{"prompt": "x", **fields})
    error = response.json()["error"]
    assert response.status_code in (400, 404) and error["param"] == param
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert base_engine.calls == []


def test_each_kind_of_model_names_the_address_of_its_own(base_address, address):
    refused = requests.post(
        base_address + "/v1/chat/completions", json={"messages": HELLO}, timeout=30)
    message = refused.json()["error"]["message"]
    assert refused.status_code == 400 and "POST /v1/completions" in message
    refused = complete(address, prompt="x")
    message = refused.json()["error"]["message"]
    assert refused.status_code == 400 and "POST /v1/chat/completions" in message


def test_the_page_is_told_what_fits_the_model(base_address, address):
    about = requests.get(base_address + "/about", timeout=30).json()
    expected = {"model": MODEL, "name": "nanochat", "continues": True, "suggestions": ["Die Uhr"]}
    assert about == expected, "name heads the page"
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
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "innerHTML" not in response.text and " src=" not in response.text
