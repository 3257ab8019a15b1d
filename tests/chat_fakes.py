"""A tokenizer, an engine and a running server, for the tests of all that is between a model and its
user."""
import atexit
import contextlib
import json
import socket
import sys
import threading
import time
from collections import namedtuple

from nanochat.async_engine import EnginePool
from nanochat.common import UserError
from nanochat.http_guard import Access
from nanochat.server import ChatServer, Settings, create_app, end_process
from nanochat.serving_stats import ServingStats

MODEL = "nanochat-test"
FIRST_PIECE = 5000      # ids from here on stand for pieces of an answer
SPECIALS = [
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]


class FakeTokenizer:
    """One id per character, one more per message and per conversation, and one per piece of text
    that a fake engine answers with."""

    def __init__(self):
        self.pieces = []

    def get_vocab_size(self):
        return 1000

    def get_bos_token_id(self):
        return 1

    def encode(self, text, prepend=None):
        return [*([] if prepend is None else [prepend]), *map(ord, text)]

    def encode_special(self, name):
        return 900 + SPECIALS.index(name)

    def piece_id(self, piece):
        """The id of a piece of an answer, a str or bytes."""
        data = piece.encode("utf-8", "replace") if isinstance(piece, str) else piece
        if data not in self.pieces:
            self.pieces.append(data)
        return FIRST_PIECE + self.pieces.index(data)

    def id_to_bytes(self, token):
        if token >= FIRST_PIECE:
            return self.pieces[token - FIRST_PIECE]
        return b"" if 900 <= token < 900 + len(SPECIALS) else chr(token).encode("utf-8")

    def decode(self, ids):
        return b"".join(map(self.id_to_bytes, ids)).decode("utf-8", "replace")

    def render_conversation(self, conversation, max_tokens=None):
        ids = [1]
        for message in conversation["messages"]:
            ids += [2, *map(ord, text_of(message["content"]))]
            ids += [4] if message["role"] == "assistant" else []
        return ids[:max_tokens], [0] * len(ids[:max_tokens])

    def render_for_completion(self, conversation):
        if any(not text_of(m["content"]).strip() for m in conversation["messages"]):
            raise UserError("a message is empty")
        ids = self.render_conversation(conversation)[0]
        return [token for token in ids if token != 4] + [3]


def text_of(content):
    """The text of a message's content, of which parts may be calls."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


class FakeStream:
    """The given pieces one by one, each behind the engine's gate."""

    def __init__(self, engine, prompt, max_new_tokens):
        self.engine, self.max_new_tokens = engine, max_new_tokens
        self.finish_reason, self.prompt_tokens, self.completion_tokens = None, len(prompt), 0

    def __iter__(self):
        self.engine.running.append(self)
        try:
            for piece in self.engine.pieces[:self.max_new_tokens]:
                assert self.engine.gate.wait(30)
                if isinstance(piece, BaseException):
                    raise piece
                self.completion_tokens += 1
                yield piece
            pieces = len(self.engine.pieces)
            self.finish_reason = "stop" if self.max_new_tokens >= pieces else "length"
        finally:
            self.engine.running.remove(self)


FakeLogprob = namedtuple("FakeLogprob", "token logprob top")


def fake_logprob(token):
    """The logprob of a token, and of one alternative: the character "a"."""
    return FakeLogprob(token, -0.5, [(token, -0.5), (ord("a"), -1.0)])


class FakeSequence:
    """A sequence that the fake engine answers with its pieces."""

    def __init__(self, prompt, max_new_tokens, logprobs, prompt_logprobs):
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.tokens, self.sampled, self.status = [], [], "new"
        self.finish_reason = self.error = None
        self.cached_tokens, self.may_look_up = 0, False
        self.logprobs = [] if logprobs is not None else None
        self.prompt_logprobs = None
        if prompt_logprobs:
            self.prompt_logprobs = [None, *map(fake_logprob, prompt[1:])]


class FakeEngine:
    """An engine that answers every prompt with the same pieces, one a step.

    pieces      texts, each one token; an exception ends its sequence (UserError) or the step
    gate        closed: a step "computes" until the test opens it
    calls       the options of all sequences
    forced      pieces that the model did not choose, as those of a tool's reply
    running     sequences that were admitted and not retired
    """

    max_seq_len = 200
    is_compiling = False

    def __init__(self, pieces=("Hel", "lo", " ", "🙂", "!"), max_slots=4):
        self.tokenizer = FakeTokenizer()
        self.running, self.gate, self.max_slots = [], threading.Event(), max_slots
        self.reset(pieces)

    def reset(self, pieces=("Hel", "lo", " ", "🙂", "!")):
        """As new, for the next test. Waits until nothing runs any more."""
        self.gate.set()
        wait_until(lambda: not self.running)
        self.pieces, self.calls, self.forced = list(pieces), [], ()
        self.most_running, self.steps, self.delay = 0, 0, 0

    def new_sequence(self, prompt, **options):
        self.calls.append({"prompt": prompt, **options})
        if len(prompt) >= self.max_seq_len:
            raise UserError("the prompt is too long")
        return FakeSequence(
            prompt,
            options["max_new_tokens"],
            options.get("logprobs"),
            options.get("prompt_logprobs"),
        )

    def admit(self, sequence):
        sequence.status = "waiting"
        self.running.append(sequence)

    def retire(self, sequence):
        sequence.status = "finished"
        if sequence in self.running:
            self.running.remove(sequence)

    def step(self):
        assert self.gate.wait(30)
        time.sleep(self.delay)
        self.steps += 1
        moved = self.running[:self.max_slots]
        self.most_running = max(self.most_running, len(moved))
        for sequence in moved:
            self._append(sequence)
        return moved

    def _append(self, sequence):
        place = len(sequence.tokens)
        piece = self.pieces[place] if place < len(self.pieces) else None
        if isinstance(piece, UserError):
            sequence.error, sequence.finish_reason = piece, "error"
        elif isinstance(piece, BaseException):
            raise piece
        else:
            self._add(sequence, piece)
        if sequence.finish_reason:
            self.retire(sequence)

    def _add(self, sequence, piece):
        token = 900 if piece is None else self.tokenizer.piece_id(piece)
        sequence.status = "running"
        sequence.tokens.append(token)
        sequence.sampled.append(piece not in self.forced)
        if sequence.logprobs is not None:
            sequence.logprobs.append(fake_logprob(token))
        if len(sequence.tokens) >= len(self.pieces) and piece is self.pieces[-1]:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) == sequence.max_new_tokens:
            sequence.finish_reason = "length"

    def stream(self, prompt, max_new_tokens=256, **options):
        self.calls.append({"prompt": prompt, "max_new_tokens": max_new_tokens, **options})
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


def fake_pool(*engines, max_queue=100, stats=None):
    """An EnginePool of engines that are loaded already, or of functions that load them."""
    loads = []
    for engine in engines:
        loads.append(engine if not hasattr(engine, "step") else lambda engine=engine: engine)
    return EnginePool(loads, max_queue, stats or ServingStats())


@contextlib.contextmanager
def serve(
    engine,
    max_queue=100,
    drain_seconds=1,
    access=None,
    engines=(),
    load=None,
    **settings,
):
    """Serve the engine on a free port of this machine; yields the server's address.

    engines: others besides; load: what loads the engine, for which nobody waits; settings: of
    Settings, and `suggestions` and `shown_name` of the page.
    """
    described = {}
    for name, field in (("suggestions", "suggestions"), ("shown_name", "name")):
        if name in settings:
            described[field] = settings.pop(name)
    stats = ServingStats()
    pool = fake_pool(load or engine, *engines, max_queue=max_queue, stats=stats)
    settings = Settings(MODEL, describe=lambda: described, **settings)
    app = create_app(pool, settings, access or Access(), stats)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = ChatServer(app, pool, drain_seconds)
        thread = threading.Thread(target=server.serve_until_end, args=[listener])
        thread.start()
        wait_until(lambda: load or pool.state != "loading")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            if hasattr(engine, "gate"):     # a real engine has none
                engine.gate.set()
            server.should_exit = True
            thread.join()


def wait_until(condition, seconds=30):
    """Wait for a condition that comes true soon; the seconds stand for never."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def run_server(settings):
    """Serve a fake engine in this process until a signal ends it; prints its port.

    settings: pieces and delay of the engine; fails: whether a step ends the thread; hangs: whether
    one never ends; compiles: whether decoding is being compiled, for whose end the interpreter
    would wait; drain_seconds.
    """
    engine = FakeEngine(settings.get("pieces", ["word "] * 20))
    engine.delay = settings.get("delay", 0.05)
    if settings.get("fails"):
        engine.pieces = ["word ", SystemExit(3)]
    if settings.get("hangs"):
        engine.gate = threading.Event()
    if settings.get("compiles"):
        engine.is_compiling = True
        atexit.register(time.sleep, 60)
    pool = fake_pool(engine, max_queue=settings.get("max_queue", 100))
    app = create_app(pool, Settings(MODEL, hang_seconds=0.2))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        status = ChatServer(app, pool, settings.get("drain_seconds", 30)).serve_until_end(listener)
    end_process(pool, status)


if __name__ == "__main__":
    run_server(json.loads(sys.argv[1]))
