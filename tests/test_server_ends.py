"""How a server ends: by a signal, by the failure of its model, and by a model that hangs."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import requests

from chat_fakes import MODEL, wait_until
from conftest import ROOT

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}


class Process:
    """A server in a process of its own, with a fake engine. settings: of chat_fakes.run_server."""

    def __init__(self, **settings):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "chat_fakes.py"), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.address = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        wait_until(lambda: requests.get(self.address + "/ready", timeout=30).status_code == 200)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def stream(self):
        """A stream of which the first bytes are here."""
        response = requests.post(
            self.address + "/v1/chat/completions", json=BODY, stream=True, timeout=30)
        assert response.status_code == 200
        return response

    def signal(self, number):
        self.process.send_signal(number)

    def end(self, timeout=30):
        """(exit status, what it wrote to standard error), once it has ended."""
        error = self.process.communicate(timeout=timeout)[1]
        return self.process.returncode, error

    def get(self, path):
        """The status of a path, 0 where nobody answers any more."""
        try:
            return requests.get(self.address + path, timeout=30).status_code
        except requests.ConnectionError:
            return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end_and_refuses_what_is_new(number):
    """12 streams on 4 slots: those in the queue end as well."""
    with Process(delay=0.02) as server:
        streams = [server.stream() for _ in range(12)]
        server.signal(number)
        wait_until(lambda: server.get("/ready") == 503)
        refused = requests.post(server.address + "/v1/chat/completions", json=BODY, timeout=30)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert server.get("/health") == 200
        for response in streams:
            text = response.text
            assert text.count('"word "') == 20 and "[DONE]" in text
        assert server.end() == (0, "")


def test_at_the_deadline_streams_end_with_an_error_event():
    with Process(pieces=["word "] * 100, drain_seconds=0.3) as server:
        streams = [server.stream() for _ in range(6)]
        server.signal(signal.SIGTERM)
        for response in streams:
            last = response.text.strip().rpartition("data: ")[2]
            assert "shutting down" in json.loads(last)["error"]["message"]
        assert server.end()[0] == 0


def test_a_second_ctrl_c_ends_at_once_also_where_the_model_hangs():
    with Process(hangs=True, drain_seconds=600) as server:
        stream = server.stream()    # the engine takes it, and its step never ends
        wait_until(lambda: server.get("/health") == 503)
        refused = requests.post(server.address + "/v1/chat/completions", json=BODY, timeout=30)
        assert refused.status_code == 503
        server.signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.signal(signal.SIGINT)
        # no traceback of the lifespan; the step itself is given up after 30 seconds
        assert server.end(timeout=15) == (0, "")
        stream.close()


def test_where_the_engines_thread_dies_health_says_so_and_the_process_ends_with_1():
    with Process(fails=True) as server:
        text = server.stream().text
        assert '"error"' in text and "[DONE]" not in text
        assert server.get("/health") in (503, 0)
        status, error = server.end()
        assert status == 1 and "the model has failed" in error


def test_a_compilation_under_way_is_not_waited_for():
    with Process(compiles=True) as server:
        server.signal(signal.SIGTERM)
        assert server.end(timeout=20) == (0, "")
