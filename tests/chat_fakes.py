"""A tokenizer, an engine and a running server, for the tests of all that is between a model and its
user."""
import contextlib
import socket
import threading

import uvicorn

from nanochat.common import UserError
from nanochat.server import create_app

MODEL = "nanochat-test"


class FakeTokenizer:
    """One id per character, and one more per message and per conversation."""

    def get_vocab_size(self):
        return 1000

    def get_bos_token_id(self):
        return 1

    def encode(self, text, prepend):
        return [prepend, *map(ord, text)]

    def render_conversation(self, conversation, max_tokens=None):
        ids = [1]
        for message in conversation["messages"]:
            ids += [2, *map(ord, message["content"])]
        return ids[:max_tokens], [0] * len(ids[:max_tokens])

    def render_for_completion(self, conversation):
        if any(not m["content"].strip() for m in conversation["messages"]):
            raise UserError("a message is empty")
        return self.render_conversation(conversation)[0] + [3]


class FakeStream:
    """The given pieces one by one, each behind the engine's gate."""

    def __init__(self, engine, prompt, max_new_tokens):
        self.engine, self.max_new_tokens = engine, max_new_tokens
        self.finish_reason, self.prompt_tokens, self.completion_tokens = None, len(prompt), 0

    def __iter__(self):
        engine = self.engine
        engine.running += 1
        engine.most_running = max(engine.most_running, engine.running)
        try:
            for piece in engine.pieces[:self.max_new_tokens]:
                assert engine.gate.wait(30)
                if isinstance(piece, BaseException):
                    raise piece
                self.completion_tokens += 1
                yield piece
            self.finish_reason = "stop" if self.max_new_tokens >= len(engine.pieces) else "length"
        finally:
            engine.running -= 1


class FakeEngine:
    max_seq_len = 200

    def __init__(self, pieces=("Hel", "lo", " ", "🙂", "!")):
        self.pieces, self.calls = list(pieces), []
        self.running = self.most_running = 0
        self.gate = threading.Event()   # closed: the model "computes" until the test opens it
        self.gate.set()

    def stream(
            self, prompt, max_new_tokens=256, temperature=1.0, top_k=50, seed=42, questions=None):
        self.calls.append({
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "seed": seed,
        })
        return FakeStream(self, prompt, max_new_tokens)


def type_lines(monkeypatch, lines):
    """Answer the prompt with the lines, each a text or an exception that comes there."""
    script = iter(lines)

    def typed(_):
        line = next(script)
        if isinstance(line, type):
            raise line
        return line
    monkeypatch.setattr("builtins.input", typed)


@contextlib.contextmanager
def serve(engine, **options):
    """Serve the engine on a free port of this machine; yields the server's address.

    options: of create_app().
    """
    app = create_app(engine, FakeTokenizer(), MODEL, **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            engine.gate.set()
            server.should_exit = True
            thread.join()
