"""A server whose answers are played from a list, and its page in a headless Chromium.

    with PlayedServer() as server:
        server.answers = [Played(["Hel", "lo"]), Played(status=429, headers={"Retry-After": "3"})]
        page = open_page(browser, server)

The page and its policy are those of nanochat.server; everything else is said by the test.
"""
import contextlib
import dataclasses
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat.http_guard import load_page

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
DESKTOP, PHONE, SMALL_PHONE = (1280, 800), (390, 844), (320, 480)
GATE_SECONDS = 30       # a gate that stays closed for so long stands for a test that hangs
ABOUT = {
    "model": "nanochat-test",
    "name": "nanochat",
    "continues": False,
    "suggestions": ["Who are you?", "What is 12 * 7?", "Spell window.", "How tall is a tree?"],
}


@dataclasses.dataclass
class Played:
    """One answer: the pieces of a stream, or a status with a body of its own.

    finish: the finish_reason, None for a stream that breaks off. error: said in the middle of the
    stream. gate: the index of the piece before which the server waits until its gate is opened.
    """

    pieces: list = dataclasses.field(default_factory=lambda: ["Hello", " 🙂", "!"])
    finish: str | None = "stop"
    has_usage: bool = True
    error: str | None = None
    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)
    body: str = ""
    gate: int | None = None


class PlayedServer:
    """The server. `requests` lists (path, headers, fields) of everything that was asked of it."""

    def __init__(self, **about):
        self.about = {**ABOUT, **about}
        self.answers = [Played()]           # the last one is played again and again
        self.is_ready = True
        self.key = None
        self.gate = threading.Event()
        self.left = threading.Event()       # a client has left in the middle of an answer
        self.requests = []
        self.page, self.page_headers = load_page("ui.html")

    def __enter__(self):
        played = self

        class Handler(PlayedHandler):
            server_of_test = played

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def next_answer(self):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def asked(self):
        """The fields of every question, in order."""
        return [fields for path, _, fields in self.requests if path.startswith("/v1/")]


class PlayedHandler(BaseHTTPRequestHandler):
    """One request to a PlayedServer."""

    server_of_test = None

    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=None, kind="application/json"):
        data = body.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def is_refused(self):
        """Whether the key is missing or wrong; then 401 is said."""
        server = self.server_of_test
        if not server.key or self.headers.get("Authorization") == f"Bearer {server.key}":
            return False
        self.reply(401, error_body("a key is needed"))
        return True

    def do_GET(self):
        server = self.server_of_test
        server.requests.append((self.path, dict(self.headers), None))
        if self.path == "/":
            self.reply(200, server.page, server.page_headers, "text/html; charset=utf-8")
        elif self.path == "/about":
            self.reply(200 if server.is_ready else 503, json.dumps(server.about))
        elif self.path == "/ready":
            self.reply(200 if server.is_ready else 503, "{}")
        else:
            self.reply(404, error_body("there is nothing here"))

    def do_POST(self):
        server = self.server_of_test
        length = int(self.headers["Content-Length"])
        fields = json.loads(self.rfile.read(length))
        server.requests.append((self.path, dict(self.headers), fields))
        if self.is_refused():
            return
        answer = server.next_answer()
        if answer.status != 200:
            kind = "text/html" if answer.body.startswith("<") else "application/json"
            self.reply(answer.status, answer.body, answer.headers, kind)
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.play(answer)
            return
        server.left.set()

    def play(self, answer):
        """Send the events of an answer, in OpenAI's shape."""
        server = self.server_of_test
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for number, piece in enumerate(answer.pieces):
            if number == answer.gate:
                server.gate.wait(GATE_SECONDS)
            self.send({"choices": [self.choice(piece)]})
        if answer.error:
            self.send({"error": {"message": answer.error}})
            return
        if answer.finish is None:
            return
        self.send({"choices": [{**self.choice(""), "finish_reason": answer.finish}]})
        if answer.has_usage:
            self.send({"choices": [], "usage": {"completion_tokens": len(answer.pieces)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def choice(self, piece):
        if self.path == "/v1/completions":
            return {"index": 0, "text": piece}
        return {"index": 0, "delta": {"content": piece}}

    def send(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


def error_body(message):
    """An error in OpenAI's shape."""
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})


# ------------------------------------------------------------------------------------------------
# the browser

def launch_chromium():
    """A context manager of a headless Chromium; skips the tests where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"{CHROMIUM} is not there")
    return _chromium(sync_api)


@contextlib.contextmanager
def _chromium(sync_api):
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


def open_page(browser, server, size=DESKTOP, **options):
    """The page of a server in a browser without a memory. options: of Browser.new_context().

    page.problems lists what its console calls an error, page.elsewhere every request to another
    address than the server's.
    """
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.problems, page.elsewhere = [], []

    def on_console(message):
        expected = "the server responded with a status" in message.text
        if message.type == "error" and not expected:
            page.problems.append(message.text)

    def on_request(request):
        if not request.url.startswith((server.address, "data:")):
            page.elsewhere.append(request.url)

    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", on_console)
    context.on("request", on_request)
    page.goto(server.address + "/")
    return page


def ask(page, question):
    """Type a question and send it."""
    page.get_by_label("Your message").fill(question)
    page.get_by_label("Your message").press("Enter")


def wait_for_end(page):
    """Wait until no answer is being made."""
    page.get_by_role("button", name="Send", exact=True).wait_for()


def shown(page, kind):
    """The texts of all messages of a kind: "user" or "assistant"."""
    return page.locator(f".{kind} .body").all_inner_texts()


def luminance(colour):
    """The relative luminance of (red, green, blue) in 0 to 255, as WCAG 2 defines it."""
    linear = []
    for channel in colour:
        share = channel / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """The contrast of two colours, from 1 to 21, as WCAG 2 defines it."""
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def low_contrasts(page, pairs):
    """{pair: contrast} of the pairs that have less than they should.

    pairs: (what is drawn, on what, the least contrast), two names of the page's table of colours.
    """
    colours = {}
    for name in {name for pair in pairs for name in pair[:2]}:
        text = page.evaluate("""name => {
          document.body.style.color = `var(--${name})`;
          return getComputedStyle(document.body).color;
        }""", name)
        colours[name] = [int(number) for number in re.findall(r"\d+", text)[:3]]
    found = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    return {pair: value for pair, value in found.items() if value < pair[2]}
