"""
Chat in the terminal with any server that speaks OpenAI's API: vLLM, ollama, llama.cpp, or our own
scripts/chat_web.py.

    python scripts/chat.py                                  # the server on this machine, port 8000
    python scripts/chat.py --url=http://localhost:11434 --model=qwen3:32b --system="Be brief."
    python scripts/chat.py --once "What is 12 times 7?"     # one answer; only it goes into a pipe
    OPENAI_API_KEY=... python scripts/chat.py               # a server that wants a key

quit ends the conversation, clear starts a new one. Ctrl+C ends the answer that is being written; at
the prompt it ends the program. What a model thinks before it answers is shown dim and is no part of
the conversation. (Where a server sends only the closing </think>, the thoughts were shown as the
answer before it came; where that tag is cut off, they count as the answer.)

This file needs `requests` (pip install requests) and nothing else of this repository, so that it
may be copied anywhere.
"""
import argparse
import contextlib
import ipaddress
import itertools
import json
import math
import os
import re
import sys
import time
from email.utils import parsedate_to_datetime

try:
    import requests
except ImportError:
    sys.exit("error: this needs the package requests: pip install requests")

TRIES = 3                               # of a request whose answer has not begun
CONNECT_TIMEOUT = 10                    # seconds
PIECE_TIMEOUT = 600                     # seconds between two pieces: prefill may take minutes
RETRIED = (408, 429, 502, 503, 504)     # statuses that may be different on another try
LONGEST_WAIT = 60                       # seconds, whatever a server asks for
LONGEST_ANSWER = 2**20                  # bytes of one event, or of an answer that is no stream
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "<think>", "</think>"
DONE = {"choices": []}                  # stands for the end that a server marks
# What is raised where a body is no JSON: its end is lost, another text, nested without an end
NO_JSON = (requests.RequestException, ValueError, RecursionError)

# What a model writes must not control the terminal: all of these are removed.
ESCAPE = re.compile("|".join([
    r"\x1b\[[0-?]*[ -/]*[@-~]",                     # control sequences: ESC [ ... letter
    r"\x1b[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)",     # strings: ESC ] ... BEL, or ESC ] ... ESC \
    r"\x1b[ -/]*[0-~]",                             # other escapes: ESC letter
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]",               # control characters but tab and newline
]))
# The beginning of one of the first three at the end of a text.
BEGUN_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]P^_X][^\x07\x1b]*\x1b?|[ -/]*)\Z")
LONGEST_ESCAPE = 1000                   # characters; anything longer is not an escape


class ServerError(Exception):
    """What went wrong, as one line.

    again: seconds after which another try may help; None where no try will.
    """

    def __init__(self, message, again=None):
        super().__init__(ESCAPE.sub("", " ".join(str(message).split())))
        self.again = again


# --------------------------------------------------------------------------------------------------
# an answer, piece by piece

class Cleaner:
    """Removes escapes from a text that comes in pieces. An escape that is cut in two is held back
    until it is complete."""

    def __init__(self):
        self.held = ""

    def feed(self, text, last=False):
        """The clean text that is certain with this piece; `last` makes everything certain."""
        text = self.held + text
        certain = len(text)
        begun = None if last else BEGUN_ESCAPE.search(text)
        if begun and len(begun[0]) < LONGEST_ESCAPE:
            certain = begun.start()
        self.held = text[certain:]
        return ESCAPE.sub("", text[:certain])


def begun_tag(text, tag):
    """How many characters at the end of `text` may be the beginning of `tag`."""
    for length in range(len(tag) - 1, 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


class Thoughts:
    """
    Separates an answer from thoughts in the same text: "<think>12 * 7 = 84</think>It is 84."

    Pieces may cut a tag anywhere. The opening tag counts only at the start. DeepSeek-R1's template
    puts it into the prompt, so that only the closing tag may come; the text before it then turns
    out to be thoughts.

    answer: the text that belongs to the conversation.
    state: "start", then "thought" after an opening tag or "untagged" without one, then "answer".
    """

    def __init__(self):
        self.state = "start"
        self.held = ""      # text that may be a part of a tag
        self.answer = ""

    def feed(self, text, last=False):
        """[(whether it is a thought, text), ...] of all that is certain with this piece.

        last: there is no further piece, which makes everything certain.
        """
        self.held += text
        if self.state == "start" and not self._start(last):
            return []
        found = []
        if self.state != "answer":
            found.append(self._before_closing_tag(last))
        if self.state == "answer":
            found.append((False, self._rest()))
        return found

    def _start(self, last):
        """Leave the start, if the text so far decides whether there is an opening tag."""
        begin = self.held.lstrip()
        may_be_tag = len(begin) < len(OPEN) and OPEN.startswith(begin)
        if may_be_tag and not last:
            return False
        self.state = "thought" if begin.startswith(OPEN) else "untagged"
        self.held = begin.removeprefix(OPEN)
        return True

    def _before_closing_tag(self, last):
        """(whether it is a thought, text) up to the closing tag, or as much as is certain."""
        is_thought = self.state == "thought"
        text, tag, self.held = self.held.partition(CLOSE)
        if tag:
            self.state = "answer"
            self.answer = ""  # what was taken for the answer until now was thoughts
            return is_thought, text
        if not last:
            certain = len(text) - begun_tag(text, CLOSE)
            text, self.held = text[:certain], text[certain:]
        if not is_thought:
            self.answer += text
        return is_thought, text

    def _rest(self):
        """The answer's next piece; the white space before the answer is dropped."""
        text = self.held if self.answer else self.held.lstrip()
        self.held = ""
        self.answer += text
        return text


def lines_of(response):
    """Yield the lines of a stream without their ends, LF or CR LF, each as soon as it is whole.

    ServerError for a line that does not end. (iter_lines of requests joins and splits all that it
    holds at every piece: a line of 200 MB kept it busy for 40 s.)
    """
    # None yields the pieces as they arrive. Without chunks on the wire it would wait for more, and
    # only reading byte by byte does not.
    chunk_size = None if response.raw.chunked else 1
    held = bytearray()      # of a line that has not ended
    for piece in response.iter_content(chunk_size):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield bytes(held + end).removesuffix(b"\r")
            held.clear()
        held += rest
        check_length(held)
    yield bytes(held)


def joined(pieces):
    """The bytes of a whole answer. ServerError where they are too many for one."""
    text = bytearray()
    for piece in pieces:
        text += piece
        check_length(text)
    return bytes(text)


def check_length(text):
    """ServerError for more bytes than an answer, or one event of it, can have."""
    if len(text) > LONGEST_ANSWER:
        raise ServerError(f"the server sent more than {LONGEST_ANSWER:,} bytes in place of an "
                          "answer: is --url right?")


def events(response):
    """Yield the JSON objects of a stream of server-sent events; DONE where its end is marked.

    A server that answers with one JSON object, as if no stream was asked for, gives that and DONE.
    ServerError where the stream breaks off or says that something failed.
    """
    lines = lines_of(response)
    try:
        for line in lines:
            if line.lstrip().startswith((b"{", b"[")):
                yield checked(json.loads(joined(itertools.chain([line], lines))), "choices")
                yield DONE
                return
            if line.lstrip().startswith(b"<"):
                raise ServerError("the server sent a page in place of a stream: is --url right?")
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                yield DONE
                return
            yield checked(json.loads(line[5:]))
    except requests.RequestException as error:
        raise ServerError("the connection was lost", again=1) from error
    except NO_JSON as error:
        raise ServerError("the server sent an event that is not JSON") from error


def checked(event, *fields):
    """`event`; ServerError with what it says where it is an error, or lacks one of the fields.

    Older versions of vLLM mark an error in a stream by its "object" alone.
    """
    known = isinstance(event, dict) and all(field in event for field in fields)
    if not known or event.get("error") or event.get("object") == "error":
        raise ServerError(message_of(event))
    return event


class Answer:
    """One answer.

    text: what belongs to the conversation. begun: whether any text has come. finish_reason: why it
    ended, None while it is not complete.
    """

    def __init__(self):
        self.begun = False
        self.finish_reason = None
        self.thoughts = Thoughts()
        self.thought_cleaner = Cleaner()
        self.text_cleaner = Cleaner()

    @property
    def text(self):
        return self.thoughts.answer.strip()

    def read(self, response):
        """Yield (whether it is a thought, text) as they come."""
        for event in events(response):
            if event is DONE:   # some servers give no reason, and the answer is whole
                self.finish_reason = self.finish_reason or "stop"
            try:
                for choice in event.get("choices") or []:
                    yield from self._read_choice(choice)
            except (AttributeError, TypeError) as error:
                message = "the server sent an event that has not OpenAI's shape"
                raise ServerError(message) from error

        held = self.text_cleaner.feed("", last=True)
        yield from self.thoughts.feed(held, last=True)
        if self.finish_reason is None:
            raise ServerError("the stream ended before the answer did", again=1)

    def _read_choice(self, choice):
        """Servers send thoughts in a field of their own, whose name differs, or in the text.

        A piece of a stream is a delta, a whole answer is a message.
        """
        delta = choice.get("delta") or choice.get("message") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        text = delta.get("content") or ""
        if thought or text:
            self.begun = True
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if thought and self.thoughts.state == "start":
            self.thoughts.state = "answer"  # this server separates them: a tag in the text is text
        yield True, self.thought_cleaner.feed(thought)
        yield from self.thoughts.feed(self.text_cleaner.feed(text))


# --------------------------------------------------------------------------------------------------
# the server

def message_of(body):
    """The message of an error in any shape: OpenAI's, mere text, FastAPI's detail."""
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body
    if isinstance(body, dict):
        body = body.get("message") or body
    return str(body)[:300]


def is_loopback(url):
    """Whether an address is this machine's own, which no proxy can reach."""
    host = requests.compat.urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def open_session(url):
    """A session for a server. Of the environment, it takes what `requests` would take on its own,
    with two exceptions: ~/.netrc is for a server without a key, and proxies are for others than
    this machine."""
    session = requests.Session()
    session.trust_env = False
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    session.verify = bundle or True
    if not is_loopback(url):
        session.proxies = requests.utils.get_environ_proxies(url)
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    else:
        session.auth = requests.utils.get_netrc_auth(url)
    return session


class Server:
    """A server at `url`, which may end in /v1 or not."""

    def __init__(self, url):
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.session = open_session(self.base)

    def request(self, method, path, **options):
        """The response to a request. ServerError for every status but 200."""
        try:
            response = self.session.request(
                method,
                self.base + path,
                stream=True,    # so that the length of what comes is limited here
                timeout=(CONNECT_TIMEOUT, PIECE_TIMEOUT),
                **options,
            )
        except requests.RequestException as error:
            proxy = requests.utils.select_proxy(self.base, self.session.proxies)
            through = " through the proxy that the environment names" if proxy else ""
            message = (f"no answer from {self.base}{through}: start a server there, "
                       "or name another with --url")
            raise ServerError(message, again=1) from error
        if response.status_code != 200:
            raise status_error(response)
        return response

    def models(self):
        """The names of all models that the server lists."""
        try:
            with self.request("GET", "/models") as response:
                listed = json.loads(joined(response.iter_content(2**16)))
            return [row["id"] for row in listed["data"]]
        except (*NO_JSON, KeyError, TypeError) as error:
            message = (f"{self.base}/models is no list of models: is --url right? If it is, name "
                       "one with --model")
            raise ServerError(message) from error


def status_error(response):
    """The ServerError for a response whose status is not 200."""
    with response:
        try:
            said = message_of(json.loads(joined(response.iter_content(2**16))))
        except (*NO_JSON, ServerError):
            said = response.reason
    if response.status_code == 401:
        said += " (OPENAI_API_KEY holds the key)"
    if response.status_code == 404:
        said += f" (at {response.url}: are --url and --model right?)"

    again = None
    if response.status_code in RETRIED:
        again = seconds_of(response.headers.get("Retry-After", ""))
    return ServerError(f"{response.status_code}: {said}", again)


def seconds_of(retry_after):
    """How long to wait by the header Retry-After: seconds, or a date (RFC 9110, 10.2.3).

    1 where it says neither, and at most LONGEST_WAIT.
    """
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return min(LONGEST_WAIT, int(retry_after))
    try:
        then = parsedate_to_datetime(retry_after).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 1
    return min(LONGEST_WAIT, max(1, math.ceil(then - time.time())))


# --------------------------------------------------------------------------------------------------
# the conversation

class Screen:
    """Prints an answer, thoughts dim. Into a file or a pipe it prints no thoughts."""

    def __init__(self):
        self.dim = False
        self.terminal = sys.stdout.isatty()

    def show(self, is_thought, text):
        hidden = is_thought and not self.terminal
        if hidden or not text:
            return
        if is_thought != self.dim:
            print(DIM if is_thought else PLAIN + "\n", end="")
            self.dim = is_thought
        print(text, end="", flush=True)

    def end(self, mark=""):
        """End the line. mark: how the answer ended; it goes to standard error without a
        terminal."""
        plain = PLAIN if self.dim else ""
        print(plain + (mark if self.terminal else ""), flush=True)
        if mark and not self.terminal:
            print(mark.strip(), file=sys.stderr)
        self.dim = False


def ask_once(server, body, answer, screen):
    """Send one request and show its answer as it comes."""
    with server.request("POST", "/chat/completions", json=body) as response:
        for is_thought, text in answer.read(response):
            screen.show(is_thought, text)


def end_mark(finish_reason):
    """What is shown behind an answer that ended for another reason than its own end."""
    if finish_reason == "stop":
        return ""
    if finish_reason == "length":
        return " (cut: no more tokens were allowed)"
    return f" ({finish_reason})"


def ask(server, body):
    """Show an answer as it comes and return it, an Answer.

    Until it has begun, a failure that may pass is tried again; a ServerError is raised for others.
    Ctrl+C ends the answer, which then has the finish_reason "stopped".
    """
    screen = Screen()
    mark = ""
    try:
        for attempt in range(1, TRIES + 1):
            answer = Answer()
            try:
                ask_once(server, body, answer, screen)
                break
            except ServerError as error:
                if answer.begun or error.again is None or attempt == TRIES:
                    raise
                print(f"({error}; trying again in {error.again} s)", file=sys.stderr)
                time.sleep(error.again)
        mark = end_mark(answer.finish_reason)
    except KeyboardInterrupt:
        answer.finish_reason = "stopped"
        mark = end_mark(answer.finish_reason)
    finally:
        screen.end(ESCAPE.sub("", mark))
    return answer


def chat(server, body):
    """Question and answer until quit, the end of input, or Ctrl+C at the prompt.

    body: the request without a question. An answer that failed or stayed empty leaves no trace in
    the conversation.
    """
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
        if text in ("", "clear"):
            continue

        print(f"{name}: ", end="", flush=True)
        turn = [*messages, {"role": "user", "content": text}]
        try:
            answer = ask(server, {**body, "messages": turn})
        except ServerError as error:
            print(f"({error})")
            continue
        if answer.text:
            messages = [*turn, {"role": "assistant", "content": answer.text}]


# --------------------------------------------------------------------------------------------------
# the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all settings\n")


# The settings: names, then what argparse takes.
ARGUMENTS = [
    (["--url"], {
        "default": "http://localhost:8000",
        "help": "the server, with or without /v1",
    }),
    (["--model"], {
        "help": "its model; without it the first that the server lists",
    }),
    (["--system"], {
        "help": "the system prompt",
    }),
    (["--once"], {
        "metavar": "QUESTION",
        "help": "answer this and leave",
    }),
    (["--max_tokens", "--max-tokens"], {
        "type": int,
        "help": "longest answer; without it the server decides",
    }),
    (["--temperature"], {
        "type": float,
        "help": "0 always takes the likeliest token; without it the server decides",
    }),
]


def is_address(url):
    """Whether a text is the address of a server, http://localhost:8000 say."""
    try:
        parts = requests.compat.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:      # brackets that hold no IPv6 address, or a port above 65535
        return False
    return bool(host) and re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) is not None


def arguments(words):
    """The settings on the command line; bad ones end the program with one line and status 2."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for names, options in ARGUMENTS:
        parser.add_argument(*names, **options)
    found = parser.parse_args(words)

    if not is_address(found.url):
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


def choose_model(server):
    """The first model that the server lists; one line on standard error where there are others."""
    names = server.models()
    if not names:
        raise ServerError(f"{server.base} lists no model: name one with --model")
    if len(names) > 1:
        line = f"talking to {names[0]}, the first of {len(names)}: --model names another"
        print(ESCAPE.sub("", line), file=sys.stderr)
    return names[0]


def request_body(given, model):
    """The request without a question."""
    body = {"model": model, "stream": True, "messages": []}
    if given.system:
        body["messages"].append({"role": "system", "content": given.system})
    for name in ("max_tokens", "temperature"):
        value = getattr(given, name)
        if value is not None:
            body[name] = value
    return body


def run(given):
    """Chat, or answer one question. Returns the status with which the program ends."""
    server = Server(given.url)
    body = request_body(given, given.model or choose_model(server))
    if given.once is None:
        chat(server, body)
        return 0
    body["messages"].append({"role": "user", "content": given.once.strip()})
    answer = ask(server, body)
    return 130 if answer.finish_reason == "stopped" else 0


def main(words=None):
    """The status with which the program ends: 0, 1 for a server's error, 130 for Ctrl+C."""
    given = arguments(words)
    try:
        return run(given)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")    # half a character must not end the program
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401, gives input() a history and lets a line be edited
    try:
        sys.exit(main())
    except BrokenPipeError:     # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
