"""What a server must survive: hostile requests, clients that leave, keys, hosts, and a model whose
logits are not finite. Each test names what it stands for; how a server ends is in
test_server_ends.py, and what a damaged checkpoint may do in test_checkpoint.py."""
import base64
import contextlib
import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from chat_fakes import MODEL, FakeEngine, serve, wait_until

from models import make_model
from nanochat import http_guard, server
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.http_guard import Access
from nanochat.tokenizer import Tokenizer
from scripts import chat_web

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": MODEL, "messages": HELLO}


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine()
    with serve(engine, max_queue=12) as address:
        yield engine, address


@pytest.fixture
def engine(served):
    served[0].reset()
    return served[0]


@pytest.fixture
def address(served, engine):
    return served[1]


def post(address, path=CHATS, **fields):
    body = {**BODY, **fields} if path == CHATS else fields
    return requests.post(address + path, json=body, timeout=30)


def send(address, body, path=CHATS, **headers):
    headers = {"Content-Type": "application/json", **headers}
    return requests.post(address + path, data=body, headers=headers, timeout=30)


def raw(address, data, seconds=30):
    """All that the server says to these bytes, until it closes the connection."""
    with connected(address, seconds) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):      # closed while it was still being sent
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                answer += part
    return answer


def connected(address, seconds=30):
    """A connection to the server."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=seconds)


def is_refused(response, status=400):
    error = response.json()["error"]
    return response.status_code == status and set(error) == {"message", "type", "param", "code"}


# ------------------------------------------------------------------------------------------------
# numbers and bodies

BAD_BIASES = (
    [],
    "x",
    5,
    {"x": 1},
    {"-1": 1},
    {"1000": 1},
    {"1": "x"},
    {"1": 101},
    {"1": None},
    {"1": True},
    {"1" * 5000: 1},
    {str(i).zfill(width): 1 for width in (4, 5) for i in range(501)},
)


@pytest.mark.parametrize("fields", [
    {"n": 10**6},
    {"stop": ["x"] * 10**4},
    {"top_logprobs": 10**5}, {"top_logprobs": -1}, {"top_logprobs": "x"},
    {"logprobs": True, "top_logprobs": 10**5},
    *[{"logit_bias": bad} for bad in BAD_BIASES],
    *[{"max_tokens": bad} for bad in (10**9, 0, -1, "5", True, 1.5, [], {})],
], ids=lambda fields: str(fields)[:40])
def test_a_value_out_of_range_is_400(address, engine, fields):
    assert is_refused(post(address, **fields)) and engine.calls == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000])
def test_a_number_that_is_none_is_400(address, engine, number):
    for field in ("max_tokens", "temperature", "top_p", "seed", "n"):
        body = json.dumps(BODY)[:-1] + f', "{field}": {number}}}'
        assert is_refused(send(address, body)) and engine.calls == []


def test_without_max_tokens_the_answer_is_bounded(address, engine):
    post(address)
    assert engine.calls[0]["max_new_tokens"] <= engine.max_seq_len


def in_chunks(total, size):
    for _ in range(total // size):
        yield b" " * size


def test_50_mb_are_413_with_and_without_a_length(address):
    assert is_refused(send(address, b" " * 50_000_000), 413)
    assert is_refused(send(address, in_chunks(50_000_000, 100_000)), 413)


def test_a_length_of_a_terabyte_is_413_at_once(address):
    host = address.removeprefix("http://")
    head = (
        f"POST {CHATS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: 1000000000000\r\n\r\n"
    )
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.connect()
    connection.sock.sendall(head.encode("ascii"))
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert response.status == 413
    connection.close()


def test_a_body_that_never_comes_and_a_head_that_never_ends_have_a_deadline(monkeypatch, engine):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(http_guard, "HEAD_SECONDS", 0.2)
    with serve(engine) as address:
        host = address.removeprefix("http://").encode("ascii")
        head = b"POST " + CHATS.encode("ascii") + b" HTTP/1.1\r\nHost: " + host
        head += b"\r\nConnection: close\r\nContent-Type: application/json\r\n"
        answer = raw(address, head + b"Content-Length: 100\r\n\r\n{")
        assert b"408" in answer.split(b"\r\n")[0]
        assert raw(address, head) == b"" and raw(address, b"") == b""


def test_of_too_many_connections_the_oldest_idle_one_is_closed(monkeypatch, engine):
    monkeypatch.setattr(http_guard, "MAX_CONNECTIONS", 5)
    with serve(engine) as address, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connected(address, 5)) for _ in range(20)]
        assert requests.get(address + "/health", timeout=30).status_code == 200
        assert opened[0].recv(1) == b""


def test_a_client_that_stops_to_read_loses_its_connection(monkeypatch, engine):
    """Else 500 of them would hold all the requests that a server handles at a time."""
    monkeypatch.setattr(http_guard, "STALL_SECONDS", 0.1)
    engine.pieces = ["word " * 20_000] * 100
    body = json.dumps({**BODY, "stream": True})
    with serve(engine) as address:
        head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connected(address) as connection:
            request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
            connection.sendall(request.encode("ascii"))
            assert connection.recv(12) == b"HTTP/1.1 200"
            wait_until(lambda: gauge(address, "nanochat_sequences") == 0)
            time.sleep(0.3)
            rest = b""
            while part := connection.recv(65_536):
                rest += part
            assert b"[DONE]" not in rest


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("data", [
    b"\r\n" * 100_000,
    b"GET /health\r\n\r\n",
    b"\x16\x03\x01\x02\x00" + b"x" * 100,
    HEAD + b"X: " + b"a" * 100_000,
    HEAD + b"Host: evil.test\r\n\r\n",
    HEAD + b"X: a\0b\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Transfer-Encoding: xchunked\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HEAD + b"\r\n",
], ids=lambda data: str(data[-40:]))
def test_what_is_no_request_is_answered_once_and_closed(address, data, caplog):
    answer = raw(address, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "Traceback" not in caplog.text


@pytest.mark.parametrize("chunk", [b"-5\r\nabc", b"z\r\n", b"f" * 30 + b"\r\n"])
def test_a_broken_chunk_is_400_also_behind_an_answer(address, chunk, caplog):
    head = b"POST " + CHATS.encode("ascii") + b" HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Transfer-Encoding: chunked\r\n"
    declared = head + b"Content-Type: application/json\r\n\r\n"
    assert raw(address, declared + chunk).startswith(b"HTTP/1.1 400 ")
    with connected(address) as connection:
        connection.sendall(head + b"\r\n")       # of a type that is refused at once
        assert b"application/json" in connection.recv(65_536)
        connection.sendall(chunk)
        while connection.recv(65_536):
            pass
    assert "Traceback" not in caplog.text


def test_one_connection_brings_a_few_bytes_at_a_time(monkeypatch, address):
    sizes = []
    received = http_guard.GuardedProtocol.data_received

    def noted(protocol, data):
        sizes.append(len(data))
        received(protocol, data)

    monkeypatch.setattr(http_guard.GuardedProtocol, "data_received", noted)
    assert is_refused(send(address, b" " * 500_000))
    assert sum(sizes) > 500_000 and max(sizes) <= http_guard.READ_BYTES <= 5_000


@pytest.mark.parametrize("depth", [10**4, 10**5])
def test_deep_nesting_is_400(address, depth):
    assert is_refused(send(address, b"[" * depth + b"]" * depth))
    for field in ("messages", "stop", "logit_bias", "model", "response_format"):
        body = json.dumps(BODY)[:-1] + f', "{field}": ' + "[" * depth + "]" * depth + "}"
        assert send(address, body).status_code in (400, 404)


@pytest.mark.parametrize("depth", [500, 900, 1500, 3000])
def test_nesting_that_json_reads_is_refused_as_well(address, depth):
    nested = "[" * depth + "]" * depth
    for content in (nested, f'[{nested}]', f'[{{"type": {nested}}}]'):
        body = f'{{"messages": [{{"role": "user", "content": {content}}}]}}'
        assert is_refused(send(address, body))
    body = f'{{"messages": [{{"role": {nested}, "content": "x"}}]}}'
    assert is_refused(send(address, body))


def test_100_000_messages_are_413_or_served_in_part(address, engine):
    many = json.dumps({"messages": HELLO * 10**5})
    assert is_refused(send(address, many), 413)
    fewer = json.dumps({"messages": HELLO * 25_000})
    assert send(address, fewer).status_code in (200, 400)


def other_requests_are_answered(address, work):
    """Whether /health is answered again and again while work() runs; the longest wait is below
    what stands for a server that hangs."""
    longest = 0
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work)
        while not working.done():
            began = time.monotonic()
            assert requests.get(address + "/health", timeout=30).status_code == 200
            longest = max(longest, time.monotonic() - began)
        working.result()
    return longest < 5


def test_a_body_in_chunks_of_one_byte_does_not_block_the_others(address):
    def work():
        host = address.removeprefix("http://")
        head = f"POST {CHATS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"
        assert raw(address, head.encode("ascii") + chunks).startswith(b"HTTP/1.1 400 ")

    assert other_requests_are_answered(address, work)


@pytest.mark.parametrize("text", [
    "`a` → " * 90_000,
    "`" * 900_000,
    "` → " * 150_000,
    "a\n(source: " * 80_000,
], ids=["calls", "backticks", "arrows", "sources"])
def test_a_long_crafted_history_does_not_block_the_others(address, text):
    history = [*HELLO, {"role": "assistant", "content": text}, *HELLO]
    assert other_requests_are_answered(address, lambda: chat(address, history))


def test_thousands_of_replies_and_calls_do_not_block_the_others(address):
    """Each reply is put behind the call that it answers: a search among all of them each time would
    take minutes."""
    reply, call = {"role": "tool", "content": "1"}, {"function": {"name": "f"}}
    called = {"role": "assistant", "content": "x", "tool_calls": [call] * 10_000}
    for answers in ([called, *[reply] * 10_000], [*HELLO, {"role": "assistant", "content": "x"}]):
        history = [*HELLO, *answers, *[reply] * 8_000, *HELLO]
        assert other_requests_are_answered(address, lambda: chat(address, history))


def chat(address, messages):
    body = json.dumps({"messages": messages, "max_tokens": 1}, ensure_ascii=False)
    assert send(address, body.encode("utf-8")).status_code in (200, 400)


# ------------------------------------------------------------------------------------------------
# clients that leave, and those that do not read

def test_200_clients_that_leave_cost_nothing(address, engine):
    """docs/traps.md: server-slots-and-leaks"""
    engine.pieces, engine.delay = ["word "] * 150, 0.001
    host = address.removeprefix("http://").split(":")
    body = json.dumps({**BODY, "stream": True})
    head = f"POST {CHATS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head = head.replace("Host: x", "Host: " + ":".join(host))
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode("ascii")
    for number in range(200):
        with socket.create_connection((host[0], int(host[1])), timeout=30) as connection:
            if number % 4 == 0:         # in the middle of the request
                connection.sendall(whole[:-5])
            elif number % 4 == 1:       # before the first byte, or in the queue
                connection.sendall(whole)
            else:                       # in mid-stream
                connection.sendall(whole)
                connection.recv(100)
    wait_until(lambda: not engine.running)
    assert len(engine.calls) > 50, "many were served before they left"
    engine.pieces, engine.most_running, engine.delay = ["a", "b", "c"], 0, 0.02
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: post(address).status_code, range(8)))
    assert answers == [200] * 8 and engine.most_running == engine.max_slots, "full capacity"


def test_a_client_that_never_reads_holds_no_slot(address, engine):
    engine.pieces = ["word " * 1000] * 150
    readers = []
    for _ in range(6):
        response = requests.post(
            address + CHATS, json={**BODY, "stream": True}, stream=True, timeout=30)
        readers.append(response)
    wait_until(lambda: not engine.running)
    engine.pieces = ["free"]
    assert post(address).json()["choices"][0]["message"]["content"] == "free"
    for response in readers:
        response.close()


def test_a_full_queue_is_429_while_health_answers(address, engine):
    engine.gate.clear()
    with ThreadPoolExecutor(30) as clients:
        waiting = [clients.submit(post, address, stream=bool(i % 2)) for i in range(16)]
        wait_until(lambda: gauge(address, "nanochat_sequences") == 16)
        for _ in range(5):
            refused = post(address, stream=True)
            assert is_refused(refused, 429) and int(refused.headers["Retry-After"]) >= 1
            assert requests.get(address + "/health", timeout=30).status_code == 200
        assert is_refused(post(address, messages="none"), 429), "before its messages are read"
        engine.gate.set()
        assert {answer.result().status_code for answer in waiting} == {200}
    assert post(address).status_code == 200, "and then there is room again"


def test_too_many_requests_at_a_time_are_503_while_health_answers(monkeypatch, address, engine):
    engine.gate.clear()
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(post, address) for _ in range(3)]
        wait_until(lambda: gauge(address, "nanochat_sequences") == 3)
        monkeypatch.setattr(server, "MAX_REQUESTS", 3)
        refused = post(address)
        assert is_refused(refused, 503) and int(refused.headers["Retry-After"]) >= 1
        assert requests.get(address + "/health", timeout=30).status_code == 200
        engine.gate.set()
        assert {answer.result().status_code for answer in waiting} == {200}


def gauge(address, name):
    text = requests.get(address + "/metrics", timeout=30).text
    [line] = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[1])


# ------------------------------------------------------------------------------------------------
# keys, hosts and origins

KEYS = ("secret-one", "secret-two")
WITH_KEY = {"Authorization": "Bearer secret-one"}
PATHS = (
    "/v1/models", f"/v1/models/{MODEL}", CHATS, TEXTS, "/ready", "/metrics", "/openapi.json",
    "//v1/models", "/v1//models", "/v1/../health", "/V1/models", "/v1/../v1/models", "/HEALTH",
    "/health/", "//", "/v1/%2e%2e/health", "/nothing",
)


@pytest.fixture(scope="module")
def locked():
    engine = FakeEngine()
    with serve(engine, access=Access(keys=KEYS)) as address:
        yield engine, address


def status_with(address, path, *authorizations, method="GET"):
    """The status of a path as it is written, with these Authorization headers."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path)
    for value in authorizations:
        connection.putheader("Authorization", value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("authorizations", [
    (),
    ("Bearer wrong",),
    ("Bearer ",),
    ("Bearer",),
    ("",),
    ("bearer secret-one",),
    ("BEARER secret-one",),
    ("secret-one",),
    ("Bearer  secret-one",),
    ("Bearer secret-one,secret-two",),
    ("Bearer secret-one2",),
    ("Bearer secret-on",),
    ("Basic " + base64.b64encode(b":secret-one").decode("ascii"),),
    ("Bearer secret-one", "Bearer secret-one"),
    ("Bearer wrong", "Bearer secret-one"),
    ("Bearer \xff\xfe",),
])
def test_without_a_valid_key_every_path_but_health_and_the_page_is_401(locked, authorizations):
    for path in PATHS:
        for method in ("GET", "POST"):
            assert status_with(locked[1], path, *authorizations, method=method) == 401, path
    assert status_with(locked[1], "/health", *authorizations) == 200
    assert status_with(locked[1], "/", *authorizations) == 200
    assert status_with(locked[1], "/about", *authorizations) == (401 if authorizations else 200)


def test_with_a_key_everything_is_served_and_without_one_the_page_learns_that_it_needs_one(locked):
    engine, address = locked
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.post(address + CHATS, json=BODY, headers=headers, timeout=30)
        assert answer.status_code == 200
        about = requests.get(address + "/about", headers=headers, timeout=30).json()
        assert about["needs_key"] is True and about["model"] == MODEL
    assert [call["tenant"] for call in engine.calls] == ["key-0", "key-1"], "no shared prefixes"
    assert requests.get(address + "/about", timeout=30).json() == {"needs_key": True}
    refused = requests.get(address + "/v1/models", timeout=30)
    assert refused.headers["WWW-Authenticate"] == "Bearer" and is_refused(refused, 401)
    assert not any(key in refused.text for key in KEYS)


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(http_guard.hmac, "compare_digest", compare)
    access = Access(keys=KEYS)
    for key in ("secret-one", "x", "y" * 1000):
        access.tenant({"headers": [(b"authorization", b"Bearer " + key.encode("ascii"))]})
    assert compared == [(32, 32)] * 6, "digests of one length, all keys each time"


@pytest.mark.parametrize("headers", [
    {"Host": "evil.test"}, {"Host": "evil.test:8000"}, {"Host": "localhost.evil.test"},
    {"Host": ""}, {"Host": "["}, {"Host": "127.0.0.1@evil.test"}, {"Host": "evil.test@localhost"},
    {"Host": "localhost/evil.test"}, {"Host": "localhost?x"}, {"Host": "evil.test\\@localhost"},
    {"Host": "localhost:x"}, {"Host": "localhost."}, {"Host": "127.1"},
    {"Origin": "http://evil.test"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
    {"Origin": "http://localhost.evil.test"}, {"Origin": "file://"}, {"Origin": ""},
    {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://127.0.0.1.evil.test"},
])
def test_a_foreign_host_or_origin_is_refused(address, engine, headers):
    for path in ("/health", "/", "/v1/models"):
        assert is_refused(requests.get(address + path, headers=headers, timeout=30), 403)
    assert is_refused(send(address, json.dumps(BODY), **headers), 403)
    assert engine.calls == []


def test_our_own_page_and_the_names_of_this_machine_are_served(address):
    port = address.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert send(address, json.dumps(BODY), **headers).status_code == 200


def test_other_hosts_and_origins_can_be_allowed(engine):
    page = "http://other.test:3000"
    access = Access(keys=KEYS, allowed_hosts=["chat.test"], allowed_origins=[page])
    with serve(engine, access=access) as address:
        headers = {"Host": "chat.test", "Origin": "https://chat.test", **WITH_KEY}
        assert send(address, json.dumps(BODY), **headers).status_code == 200
        answer = send(address, json.dumps(BODY), Origin=page, **WITH_KEY)
        assert answer.headers["Access-Control-Allow-Origin"] == page
        preflight = {"Origin": page, "Access-Control-Request-Method": "POST"}
        asked = requests.options(address + CHATS, headers=preflight, timeout=30)
        assert asked.status_code == 204, "a browser asks without the key"
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert requests.get(address + "/", headers={"Host": "evil.test"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_without_a_key_is_refused(monkeypatch, host):
    monkeypatch.delenv(chat_web.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match="--api_key"):
        chat_web.read_keys(host)
    monkeypatch.setenv(chat_web.KEY_VARIABLE, "a, b")
    assert chat_web.read_keys(host) == ["a", "b"]


@pytest.mark.parametrize("key", ["schlüssel", "a\x1bb", "good, k\u2026y"])
def test_a_key_that_no_client_can_send_is_refused(monkeypatch, key):
    monkeypatch.setattr(chat_web, "api_key", key)
    with pytest.raises(UserError, match="ASCII") as error:
        chat_web.read_keys("127.0.0.1")
    assert key not in str(error.value)


def test_this_machine_alone_needs_no_key(monkeypatch):
    monkeypatch.delenv(chat_web.KEY_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert chat_web.read_keys(host) == []


# ------------------------------------------------------------------------------------------------
# text

@pytest.mark.parametrize("body", [
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}',
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
    b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    b'{"stop": "\\udc00", "messages": [{"role": "user", "content": "x"}]}',
    json.dumps(BODY).encode("utf-16"),
    b"\xef\xbb\xbf" + json.dumps(BODY).encode("utf-8"),
])
def test_odd_characters_are_served_or_refused(address, body):
    assert send(address, body).status_code in (200, 400, 404)
    text = body.replace(b"messages", b"prompt").replace(b'[{"role": "user", "content": ', b"[")
    assert send(address, text.replace(b"}]", b"]"), TEXTS).status_code in (200, 400, 404)


def test_an_emoji_over_several_tokens_is_shown_whole(address, engine):
    data = "🙂".encode("utf-8")
    engine.pieces = [data[:1], data[1:3], data[3:], "!"]
    stream = requests.post(address + CHATS, json={**BODY, "stream": True}, timeout=30).text
    events = [line[6:] for line in stream.split("\n\n") if line.startswith("data: {")]
    texts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(texts) == "🙂!" and not any("\ufffd" in text for text in texts)


def test_an_answer_that_spells_a_control_token_does_not_stop(address, engine):
    """docs/traps.md: control-tokens"""
    engine.pieces = ["<|assistant_end|>", "<|bos|>", " more"]
    content = post(address).json()["choices"][0]["message"]["content"]
    assert content == "<|assistant_end|><|bos|> more"


def test_what_was_asked_does_not_reach_the_log(address, engine, capfd, caplog):
    """docs/traps.md: server-slots-and-leaks"""
    attack = "\x1b[2J\x1b]0;title\x07\nINFO: all is well canary"
    engine.pieces = [RuntimeError("it failed \x1b[2J")]
    for fields in ({"messages": [{"role": "user", "content": attack}]}, {"model": attack}):
        post(address, **fields)
    requests.get(address + "/" + attack, headers={"X-Canary": "canary"}, timeout=30)
    log = "".join(capfd.readouterr()) + caplog.text
    assert "it failed" in log and "canary" not in log and "\x1b" not in log


# ------------------------------------------------------------------------------------------------
# a real model

@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20]
    return Tokenizer.train_from_iterator(texts, 290)


class Poisoned(Engine):
    """An engine that makes the logits of prompts with a certain token non-finite, once they are
    decoded."""

    poison = None

    def _decode(self, sequences):
        logits = super()._decode(sequences)
        for place, sequence in enumerate(sequences):
            if self.poison in sequence.prompt:
                logits[place, 3] = float("nan")
        return logits


@pytest.fixture(scope="module")
def real(tokenizer):
    model = make_model(GPT, vocab_size=tokenizer.get_vocab_size()).eval()
    engine = Poisoned(model, tokenizer, max_slots=8)
    engine.gate = threading.Event()     # of a fake, which this is not
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # two that share a busy machine wait for each other
    with serve(engine, max_queue=64) as address:
        yield engine, address
    torch.set_num_threads(threads)


def seeded(address, number, **fields):
    """The text of a continuation with a seed of its own."""
    body = {
        "prompt": [5 + number, 9, 20 + number],
        "seed": number,
        "max_tokens": 12,
        "temperature": 1.0,
        "top_p": 0.9 if number % 2 else 1.0,
        "ignore_eos": True,
        **fields,
    }
    answer = requests.post(address + TEXTS, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_seeded_request_gets_the_same_tokens_alone_and_among_31_others(real):
    """docs/traps.md: shared-rng"""
    alone = [seeded(real[1], number) for number in (0, 13, 30)]
    with ThreadPoolExecutor(32) as clients:
        among = list(clients.map(lambda number: seeded(real[1], number), range(32)))
    assert [among[0], among[13], among[30]] == alone
    assert len(set(among)) > 20, "the requests differ"


def test_logits_that_are_not_finite_end_that_request_alone(real):
    engine, address = real
    engine.poison = 7
    try:
        with ThreadPoolExecutor(4) as clients:
            good = [clients.submit(seeded, address, number) for number in (20, 21)]
            bad = [
                clients.submit(post, address, TEXTS, prompt=[7, 9], temperature=temperature)
                for temperature in (0, 1)
            ]
        for answer in bad:
            assert is_refused(answer.result(), 500) and "not finite" in answer.result().text
        during = [answer.result() for answer in good]
    finally:
        engine.poison = None
    assert during == [seeded(address, number) for number in (20, 21)]


@pytest.mark.parametrize("temperature", [1e-50, 1e-308, 1e-6, 5e-324])
def test_a_tiny_temperature_is_greedy(real, temperature):
    greedy = seeded(real[1], 3, temperature=0)
    assert seeded(real[1], 3, temperature=temperature) == greedy


def test_control_tokens_that_anyone_types_are_plain_text(real, tokenizer):
    """docs/traps.md: control-tokens"""
    marker = "<|user_end|>"
    plain = len(tokenizer.encode(marker))
    for role in ("user", "system", "assistant", "tool"):
        def prompt_tokens(text, role=role):
            odd = [{"role": role, "content": text}]
            messages = [*HELLO, *odd, {"role": "user", "content": "x"}]
            messages = messages if role != "system" else odd + HELLO
            fields = {"messages": messages, "max_tokens": 1}
            return post(real[1], **fields).json()["usage"]["prompt_tokens"]

        assert plain > 3 and prompt_tokens("a" + marker) >= prompt_tokens("a") + plain - 3


def test_memory_is_flat_under_requests_of_every_kind(real):
    engine, address = real

    def round_of_requests():
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda number: seeded(address, number), range(40)))

    round_of_requests()
    before = resident()
    for _ in range(3):
        round_of_requests()
    assert resident() < before + 30_000_000 and not engine.running


def resident():
    """Bytes of memory of this process that are in RAM."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * 4096


# ------------------------------------------------------------------------------------------------
# fuzzing

ODD = (
    None, True, False, 0, 1, -1, 2, 5, 2**31, -2**63, 10**30, 0.5, 1e-50, 1e308, "", "x", "5",
    "\ud800", "\x00", [], [None], ["x"], [1, 2], [[1], [2]], [[]], {}, {"type": "text"},
    {"1": 1}, {"a": {"b": []}}, "none", "auto", [{"role": "user", "content": "x"}],
    [{"role": "assistant", "content": None}], [{"role": "tool", "content": []}],
    [{"type": "text", "text": "x"}], [{"type": "image_url"}], MODEL,
)
PARTS = (*ODD, [{"type": "text", "text": "\ud800"}], [{"type": "text", "text": 5}])
FIELDS = (
    "messages", "prompt", "model", "stream", "stream_options", "max_tokens", "n", "stop",
    "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs",
    "top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "user", "tools", "tool_choice", "functions", "response_format", "echo", "best_of", "suffix",
    "ignore_eos", "continue_final_message", "guided_json", "modalities", "unknown",
)
ROLES = ("system", "developer", "user", "assistant", "tool", "human", "nobody", None, 5, [])


def fuzzed(random_):
    """A path and a body: a good request with some of its fields made odd."""
    path = random_.choice((CHATS, TEXTS))
    fields = {"messages": HELLO} if path == CHATS else {"prompt": "x"}
    if path == CHATS and random_.random() < 0.5:
        count = random_.randint(0, 5)
        fields["messages"] = [
            {"role": random_.choice(ROLES), "content": random_.choice(PARTS)}
            for _ in range(count)
        ]
    for _ in range(random_.randint(0, 4)):
        fields[random_.choice(FIELDS)] = random_.choice(ODD)
    return path, fields


def test_2000_fuzzed_requests_are_never_a_failure_of_the_server(address, engine):
    random_ = random.Random(1)
    statuses = {}
    with requests.Session() as session:
        for _ in range(2000):
            path, fields = fuzzed(random_)
            answer = session.post(address + path, json=fields, timeout=30)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (fields, answer.text)
            assert "/tmp" not in answer.text and ".py" not in answer.text, "no paths"
    assert statuses[200] > 300 and statuses[400] > 300, statuses
