"""A load on a server that speaks OpenAI's API, and the figures of how it bore that.

Several clients send one request after the other, each of which streams an answer, and note when
each piece arrived. scripts/serve_benchmark.py measures any server with it, and
scripts/infer_benchmark.py our own.

    time to first token (TTFT)   from sending a request to the first piece of its answer or of its
                                 thoughts
    time between tokens          between two pieces, which are tokens with most servers
    tokens/s                     tokens of all complete answers, divided by the time from the first
                                 request to the end of the last

Tokens are what the server reports as usage; where it reports none, pieces are counted. Failed and
cut answers are errors and count for nothing else. The clients are threads of this process: a
request takes about 1 ms of a core, and a piece 10 us.
"""
import ipaddress
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple
from urllib.parse import urlsplit

import requests

from nanochat.common import UserError, print0

WORDS = (
    "time year people way day man thing life child world school state family group country hand "
    "part place case week"
).split()
TASK = "Tell a long story with these words."


class Server(NamedTuple):
    """What is asked: its address with /v1, its model, and how."""
    base: str
    model: str
    ignore_eos: bool = False    # ask for full-length answers (vLLM, SGLang; others may refuse it)
    timeout: float = 600        # seconds without any data after which a request has failed


# --------------------------------------------------------------------------------------------------
# one request

class Request:
    """One request and its result. All times are those of time.perf_counter().

    begin, end: when it was sent, and when it ended. times: when each piece of text arrived.
    usage: the server's token counts, {} without them. status: the HTTP status, None without one.
    error: what went wrong, "" for a complete answer.
    """

    def __init__(self, server, words, limit):
        """words: number of random words in the prompt. limit: longest answer in tokens."""
        self.server = server
        self.prompt = " ".join([*random.choices(WORDS, k=words), TASK])
        self.limit = limit
        self.begin = 0.0
        self.end = 0.0
        self.times = []
        self.usage = {}
        self.status = None
        self.error = "never sent"

    def body(self):
        """The JSON of the request."""
        body = {
            "model": self.server.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.limit,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.server.ignore_eos:
            body["ignore_eos"] = True
        return body

    def run(self, session):
        """Send the request in a session of open_session(), and wait for its end."""
        self.begin = time.perf_counter()
        try:
            self.error = self.send(session)
        except requests.RequestException as error:
            self.error = f"{self.status or 'no answer'} ({type(error).__name__})"
        except (ValueError, AttributeError, TypeError):
            self.error = f"{self.status}, and what came has not OpenAI's shape"
        self.end = time.perf_counter()

    def send(self, session):
        """Send and read; returns what went wrong, "" for nothing."""
        with session.post(
            self.server.base + "/chat/completions",
            json=self.body(),
            stream=True,
            timeout=self.server.timeout,
        ) as response:
            self.status = response.status_code
            return self.read(response) if response.ok else error_text(response.json())

    def read(self, response):
        """Note when each piece of a stream arrives; returns what went wrong, "" for nothing.

        Without a finish_reason or [DONE] an answer is not complete.
        """
        finish_reason = None
        # None yields the pieces as they arrive. Without chunks on the wire it would wait for more,
        # and only reading byte by byte does not.
        chunk_size = None if response.raw.chunked else 1
        lines = response.iter_lines(chunk_size=chunk_size)
        for line in lines:
            now = time.perf_counter()
            if line.lstrip().startswith((b"{", b"[")):
                said = error_text(json.loads(b"\n".join([line, *lines])))
                return f"JSON in place of a stream, which has no times: {said}"
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                finish_reason = finish_reason or "stop"     # some servers give no reason
                continue
            event = json.loads(line[5:])
            if event.get("error"):
                return error_text(event)
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices") or []:
                if has_text(choice.get("delta") or {}):
                    self.times.append(now)
                finish_reason = choice.get("finish_reason") or finish_reason
        return "" if finish_reason else "cut: the stream ended without a finish_reason"

    def tokens(self):
        """Tokens of the answer as the server counts them, else its pieces."""
        return self.usage.get("completion_tokens") or len(self.times)


def has_text(delta):
    """Whether a piece of a stream has text: of the answer, or of thoughts under either name."""
    return any(delta.get(field) for field in ("content", "reasoning_content", "reasoning"))


def is_loopback(url):
    """Whether an address is this machine's own, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def open_session(base):
    """A session for a server: ~/.netrc never replaces the key, and no proxy catches this machine.

    (The same as in scripts/chat.py, which needs nothing of this repository.)
    """
    key = os.environ.get("OPENAI_API_KEY")
    session = requests.Session()
    session.trust_env = False   # which would allow both; the rest of it follows
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    else:
        session.auth = requests.utils.get_netrc_auth(base)
    session.proxies = {} if is_loopback(base) else requests.utils.get_environ_proxies(base)
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    session.verify = bundle or True
    return session


def error_text(body):
    """The message of an error on one line without escapes, from OpenAI's shape or mere text."""
    error = body
    if isinstance(body, dict):
        error = body.get("error") or body.get("detail") or body
    if isinstance(error, dict):
        error = error.get("message", error)
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(printable.split())[:200]


def raise_error(request):
    """End the program with the error of a failed request: status 2 where other settings help, else
    1. The settings are named as both benchmarks name them."""
    status = request.status
    if status in (401, 403):
        raise UserError(f"{status}: {request.error}: set OPENAI_API_KEY to the server's key")
    refused = status is not None and 400 <= status < 500
    if refused and status != 429:
        raise UserError(f"{status}: {request.error}: "
                        "try smaller --input and --output, or another model")
    raise ConnectionError(f"no request was answered by {request.server.base}: {request.error}")


# --------------------------------------------------------------------------------------------------
# the server

def is_address(url):
    """Whether a text is the address of a server, http://localhost:8000 say."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:      # brackets that hold no IPv6 address, or a port above 65535
        return False
    return bool(host) and re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) is not None


def base_of(url):
    """The address with /v1 of a server whose url may have that or not.

    UserError for what is no address, and for a key in the environment that no header can carry.
    """
    if not is_address(url):
        raise UserError(f"url={url} must be an address such as http://localhost:8000")
    if not re.fullmatch("[!-~]*", os.environ.get("OPENAI_API_KEY", "")):
        raise UserError("OPENAI_API_KEY must be printable ASCII without spaces")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def find_model(base):
    """The name of the first model that the server lists."""
    try:
        with open_session(base) as session:
            response = session.get(base + "/models", timeout=30)
    except requests.RequestException as error:
        raise ConnectionError(
            f"no answer from {base}: start a server there, or name another with --url"
        ) from error

    status = response.status_code
    if status in (401, 403):
        raise UserError(f"{status} from {base}/models: set OPENAI_API_KEY to the server's key")
    if status >= 500:
        raise ConnectionError(f"{status} from {base}/models: the server's log may say why")
    try:
        return response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{base}/models names no model ({status}): name one with --served_model"
        ) from error


def words_for(server, tokens):
    """How many words make a prompt of so many tokens for this server's tokenizer and template.

    Two short prompts tell: tokens grow linearly with words. Without usage, a word counts as a
    token.
    """
    few, many = 4, 20
    counts = []
    for words in (few, many):
        probe = Request(server, words, 1)
        with open_session(server.base) as session:
            probe.run(session)
        if probe.error:
            raise_error(probe)
        counts.append(probe.usage.get("prompt_tokens") or 0)

    for_few, for_many = counts
    if for_many <= for_few:
        return tokens
    words_per_token = (many - few) / (for_many - for_few)
    return max(1, few + round((tokens - for_few) * words_per_token))


# --------------------------------------------------------------------------------------------------
# measuring

def show_progress(clients, sent):
    done = sum(request.end > 0 for request in sent)
    pieces = sum(len(request.times) for request in sent)
    print(
        f"  {clients} at a time: {done} of {len(sent)} requests done, {pieces:,} pieces",
        file=sys.stderr,
        flush=True,
    )


def run_clients(server, queues):
    """Send the requests of several clients at a time; returns all of them, done.

    queues: for each client its requests, an iterable from which it takes the next one when the one
    before has ended. A client keeps its connection, as the common ones do.
    """
    sent = []

    def client(queue):
        with open_session(server.base) as session:
            for request in queue:
                sent.append(request)
                request.run(session)

    # Daemons, so that Ctrl+C ends all of them.
    threads = [threading.Thread(target=client, args=[queue], daemon=True) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(2)
            if thread.is_alive():
                show_progress(len(queues), sent)
    return sent


def requests_until(deadline, server, words, limit):
    """Yield requests until time.perf_counter() has passed the deadline."""
    while time.perf_counter() < deadline:
        yield Request(server, words, limit)


def percentile(values, share):
    """The smallest value that `share` of all values do not exceed; None of an empty list."""
    if not values:
        return None
    index = math.ceil(share * len(values)) - 1
    return sorted(values)[max(0, index)]


def median(values):
    """The median, None of an empty list."""
    return statistics.median(values) if values else None


def summary(everything, clients):
    """The figures of one concurrency as a dict, in seconds and tokens.

    Errors count by their text; with no complete answer there are no other figures.
    """
    row = {
        "concurrency": clients,
        "requests": len(everything),
        "errors": dict(Counter(request.error for request in everything if request.error)),
    }
    whole = [request for request in everything if not request.error]
    if not whole:
        return row

    tokens = sum(request.tokens() for request in whole)
    pieces = sum(len(request.times) for request in whole)
    wall_clock = max(r.end for r in whole) - min(r.begin for r in everything)
    first = [request.times[0] - request.begin for request in whole if request.times]
    between = []
    for request in whole:
        between += [later - sooner for sooner, later in itertools.pairwise(request.times)]
    prompts = [request.usage.get("prompt_tokens") for request in whole]
    prompts = [count for count in prompts if count]
    return {
        **row,
        "tokens_per_second": tokens / wall_clock,
        "output_tokens": tokens / len(whole),
        "input_tokens": statistics.mean(prompts) if prompts else None,
        "pieces": pieces / len(whole),
        "tokens_from_usage": all(request.usage.get("completion_tokens") for request in whole),
        "ttft": median(first),
        "ttft_p95": percentile(first, 0.95),
        "between_tokens": median(between),
        "between_tokens_p95": percentile(between, 0.95),
    }


def measured(done, clients):
    """summary() of requests that are done, its errors printed. Where no request had an answer,
    raise_error() of the first."""
    row = summary(done, clients)
    for error, count in row["errors"].items():
        print0(f"  {clients} at a time, {count} x {error}")
    if "tokens_per_second" not in row:
        raise_error(done[0])
    return row


# --------------------------------------------------------------------------------------------------
# the report

# Each column: its title, the field of a row, the factor to its unit, and its decimals
COLUMNS = [
    ("tokens/s", "tokens_per_second", 1, 1),
    ("TTFT, s: median", "ttft", 1, 3),
    ("p95", "ttft_p95", 1, 3),
    ("between tokens, ms: median", "between_tokens", 1000, 1),
    ("p95", "between_tokens_p95", 1000, 1),
]
TITLES = [*[title for title, *_ in COLUMNS], "errors"]   # of figure_cells()


def figure_cell(row, field, scale, decimals):
    """A figure of a row in the unit of its column; "" where there is none."""
    value = row.get(field)
    return "" if value is None else f"{value * scale:,.{decimals}f}"


def figure_cells(row):
    """The cells of COLUMNS, and how many of a row's requests failed."""
    cells = [figure_cell(row, *column) for _, *column in COLUMNS]
    return [*cells, f"{sum(row['errors'].values())} of {row['requests']}"]


def how_counted(rows):
    """Two sentences: who counted the tokens, and how many there were at the last concurrency."""
    counted = "pieces of the streams, as usage was not reported for all"
    if all(row["tokens_from_usage"] for row in rows):
        counted = "the server's usage"
    last = rows[-1]
    prompts = last["input_tokens"]
    prompts = "unknown" if prompts is None else f"{prompts:.0f}"
    return (f"Tokens are counted by {counted}: prompts of {prompts}, "
            f"answers of {last['output_tokens']:.0f} tokens in {last['pieces']:.0f} pieces "
            f"on average at {last['concurrency']} at a time.")
