"""
Chat in the terminal with any server that speaks OpenAI's API: vLLM, ollama, llama.cpp, or our own scripts/chat_web.py.

    python scripts/chat.py                                  # the server on this machine, port 8000
    python scripts/chat.py --url=http://localhost:11434 --model=qwen3:32b --system="Answer in one sentence."
    python scripts/chat.py --once "What is 12 times 7?"     # one answer; into a file or a pipe goes the answer alone
    OPENAI_API_KEY=... python scripts/chat.py               # a server that wants a key

quit ends the conversation, clear starts it afresh. Ctrl+C ends the answer under way; at the prompt it ends the program.
What a model thinks before it answers is dim, and no part of the conversation. (Where only the closing </think> comes, it was shown
as the answer by then, and where that is cut off, it is taken for one.) This file needs `requests` (pip install requests) and
nothing else of this repository, so that it may be copied to wherever one sits.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
import time

try:
    import requests
except ImportError:
    sys.exit("error: this needs the package requests: pip install requests")

TRIES = 3                               # of a request whose answer has not begun
TIMEOUT = (10, 600)                     # seconds to connect, and between two pieces: a long prompt is silent at first
PASSING = (408, 429, 502, 503, 504)     # statuses that another try may get past
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "<think>", "</think>"

# What a model writes must not steer the terminal. Out go control sequences (ESC [ ... letter), strings (ESC ] ... BEL or
# ESC \), other escapes (ESC letter), and every control character alone but tab and newline.
ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BEGUN_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]P^_X][^\x07\x1b]*\x1b?|[ -/]*)\Z")
LONGEST_ESCAPE = 1000                   # characters; what goes on for longer was none


class ServerError(Exception):
    """What went wrong, as one line. again: seconds after which another try may help; None where none will."""

    def __init__(self, message, again=None):
        super().__init__(ESCAPE.sub("", " ".join(str(message).split())))
        self.again = again


# ---------------------------------------------------------------------------------------------------------------------
# an answer, piece by piece

class Cleaner:
    """Takes the escapes out of a text that comes in pieces. One that is cut in two is held back until it is whole."""

    def __init__(self):
        self.held = ""

    def feed(self, text, last=False):
        text = self.held + text
        begun = None if last else BEGUN_ESCAPE.search(text)
        place = begun.start() if begun and len(begun[0]) < LONGEST_ESCAPE else len(text)
        self.held = text[place:]
        return ESCAPE.sub("", text[:place])


class Thoughts:
    """
    Parts an answer from thoughts that are written into it: "<think>12 * 7 = 84</think>It is 84."

    Pieces may cut a tag anywhere. The opening tag counts at the start alone. R1's template puts it into the prompt, so that only
    the closing one may come; what was taken for the answer until then was thought. `answer` is what belongs to the conversation.
    """

    def __init__(self):
        self.state, self.held, self.answer = "start", "", ""    # then: thought or untagged, then: answer

    def feed(self, text, last=False):
        """[(is it a thought, text), ...] of all that is certain by now; `last` makes everything certain."""
        self.held += text
        if self.state == "start":
            begin = self.held.lstrip()
            if not last and len(begin) < len(OPEN) and OPEN.startswith(begin):
                return []
            self.state = "thought" if begin.startswith(OPEN) else "untagged"
            self.held = begin.removeprefix(OPEN)
        found = []
        if self.state != "answer":
            thought = self.state == "thought"
            sure, tag, rest = self.held.partition(CLOSE)
            if not tag and not last:
                cut = next((n for n in range(len(CLOSE) - 1, 0, -1) if sure.endswith(CLOSE[:n])), 0)
                sure, rest = sure[:len(sure) - cut], sure[len(sure) - cut:]
            self.held = rest
            found.append((thought, sure))
            self.answer += "" if thought else sure
            if not tag:
                return found
            self.state, self.answer = "answer", ""
        text, self.held = self.held if self.answer else self.held.lstrip(), ""
        self.answer += text
        return [*found, (False, text)]


def events(response):
    """The JSON objects of a stream of server-sent events. ServerError where it breaks off or says that something failed."""
    try:
        # the pieces as they come; without chunks on the wire only byte by byte does not wait for more
        for line in response.iter_lines(chunk_size=None if response.raw.chunked else 1):
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                return
            event = json.loads(line[5:])
            if not isinstance(event, dict) or event.get("error"):
                raise ServerError(message_of(event))
            yield event
    except requests.RequestException as error:
        raise ServerError("the connection was lost", again=1) from error
    except ValueError as error:
        raise ServerError("the server sent an event that is not JSON") from error


class Answer:
    """One answer. text: what belongs to the conversation. finish_reason: why it ended, None while it is not whole."""

    def __init__(self):
        self.begun, self.finish_reason = False, None
        self.thoughts, self.cleaners = Thoughts(), (Cleaner(), Cleaner())

    @property
    def text(self):
        return self.thoughts.answer.strip()

    def read(self, response):
        """Yield (is it a thought, text). Servers send thoughts in a field of their own, whose name differs, or in the text."""
        for event in events(response):
            try:
                for choice in event.get("choices") or []:
                    delta = choice.get("delta") or {}
                    thought, text = delta.get("reasoning_content") or delta.get("reasoning") or "", delta.get("content") or ""
                    self.begun |= bool(thought or text)
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    if thought and self.thoughts.state == "start":
                        self.thoughts.state = "answer"      # this server parts them, so that a tag in the text is text
                    yield True, self.cleaners[0].feed(thought)
                    yield from self.thoughts.feed(self.cleaners[1].feed(text))
            except (AttributeError, TypeError) as error:
                raise ServerError("the server sent an event that has not OpenAI's shape") from error
        yield from self.thoughts.feed(self.cleaners[1].feed("", last=True), last=True)
        if self.finish_reason is None:
            raise ServerError("the stream ended before the answer did", again=1)


# ---------------------------------------------------------------------------------------------------------------------
# the server

def message_of(body):
    """What an error says, in whichever shape: OpenAI's, an error of mere text, FastAPI's detail."""
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body
    if isinstance(body, dict):
        body = body.get("message") or body
    return str(body)[:300]


class Server:
    def __init__(self, url):
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.session = requests.Session()
        if key := os.environ.get("OPENAI_API_KEY"):
            self.session.headers["Authorization"] = f"Bearer {key}"

    def request(self, method, path, **options):
        """The response. ServerError for every status but 200."""
        try:
            response = self.session.request(method, self.base + path, timeout=TIMEOUT, **options)
        except requests.RequestException as error:
            raise ServerError(f"no answer from {self.base}: start a server there, or name another with --url", again=1) from error
        if response.status_code == 200:
            return response
        with response:
            try:
                said = message_of(response.json())
            except (ValueError, requests.RequestException):
                said = response.reason
        if response.status_code == 401:
            said += " (OPENAI_API_KEY holds the key)"
        wait = response.headers.get("Retry-After", "")
        again = min(60, int(wait)) if wait.isdecimal() else 1
        raise ServerError(f"{response.status_code}: {said}", again if response.status_code in PASSING else None)

    def models(self):
        """The names of all models there."""
        try:
            return [row["id"] for row in self.request("GET", "/models").json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.base}/models is no list of models: name one with --model") from error


# ---------------------------------------------------------------------------------------------------------------------
# the conversation

class Screen:
    """Prints an answer, thoughts dim. Where the output is no terminal there are no thoughts."""

    def __init__(self):
        self.dim, self.terminal = False, sys.stdout.isatty()

    def show(self, thought, text):
        if not text or thought and not self.terminal:
            return
        if thought != self.dim:
            print(DIM if thought else PLAIN + "\n", end="")
            self.dim = thought
        print(text, end="", flush=True)

    def end(self, mark=""):
        print((PLAIN if self.dim else "") + (mark if self.terminal else ""), flush=True)
        if mark and not self.terminal:
            print(mark.strip(), file=sys.stderr)
        self.dim = False


def ask(server, body):
    """Show the answer as it comes and return it. Until it has begun, a failure that may pass is tried again."""
    screen, mark = Screen(), ""
    try:
        for attempt in range(1, TRIES + 1):
            answer = Answer()
            try:
                with server.request("POST", "/chat/completions", json=body, stream=True) as response:
                    for thought, text in answer.read(response):
                        screen.show(thought, text)
                break
            except ServerError as error:
                if answer.begun or error.again is None or attempt == TRIES:
                    raise
                print(f"({error}; trying again in {error.again} s)", file=sys.stderr)
                time.sleep(error.again)
        mark = {"stop": "", "length": " (cut: no more tokens were allowed)"}.get(answer.finish_reason, f" ({answer.finish_reason})")
    except KeyboardInterrupt:
        answer.finish_reason, mark = "stopped", " (stopped)"
    finally:
        screen.end(ESCAPE.sub("", mark))
    return answer


def chat(server, body):
    """Question and answer until quit, the end of input, or Ctrl+C at the prompt. body: the request without a question."""
    messages = list(body["messages"])
    name = ESCAPE.sub("", body["model"].rpartition("/")[2])
    print("quit ends the conversation, clear starts a new one, Ctrl+C ends an answer")
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "quit":
            return
        if text == "clear":
            messages = list(body["messages"])
            print("a new conversation")
        elif text:
            print(f"{name}: ", end="", flush=True)
            turn = [*messages, {"role": "user", "content": text}]
            try:
                answer = ask(server, {**body, "messages": turn})
            except ServerError as error:
                print(f"({error})")
                continue
            if answer.text:     # a turn without an answer leaves no trace
                messages = [*turn, {"role": "assistant", "content": answer.text}]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all settings\n")


def arguments(words):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--url", default="http://localhost:8000", help="the server, with or without /v1")
    parser.add_argument("--model", help="its model; without it the first that the server lists")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--once", metavar="QUESTION", help="answer this and leave")
    parser.add_argument("--max_tokens", "--max-tokens", type=int, help="longest answer; without it the server decides")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token; without it the server decides")
    found = parser.parse_args(words)
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", found.url):
        parser.error(f"--url={found.url} must be an address such as http://localhost:8000")
    if not re.fullmatch("[!-~]*", os.environ.get("OPENAI_API_KEY", "")):
        parser.error("OPENAI_API_KEY must be printable ASCII without spaces")
    if found.max_tokens is not None and found.max_tokens < 1:
        parser.error(f"--max_tokens={found.max_tokens} must be at least 1")
    if found.temperature is not None and not 0 <= found.temperature < math.inf:
        parser.error(f"--temperature={found.temperature} must be a number from 0")
    if found.once is not None and not found.once.strip():
        parser.error('the question is empty: write --once "your question"')
    return found


def main(words=None):
    """The status with which the program ends."""
    given = arguments(words)
    server = Server(given.url)
    try:
        names = [given.model] if given.model else server.models()
        if not names:
            raise ServerError(f"{server.base} lists no model: name one with --model")
        if len(names) > 1:
            print(ESCAPE.sub("", f"talking to {names[0]}, the first of {len(names)}: --model names another"), file=sys.stderr)
        body = {"model": names[0], "stream": True, "messages": [{"role": "system", "content": given.system}] if given.system else []}
        body |= {name: getattr(given, name) for name in ("max_tokens", "temperature") if getattr(given, name) is not None}
        if given.once is None:
            chat(server, body)
            return 0
        answer = ask(server, {**body, "messages": [*body["messages"], {"role": "user", "content": given.once.strip()}]})
        return 130 if answer.finish_reason == "stopped" else 0
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")    # half a character must not end the program
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401, input() then has a history and can be edited
    try:
        sys.exit(main())
    except BrokenPipeError:     # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
