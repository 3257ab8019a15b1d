"""
How fast a server answers, whichever it is, as long as it speaks OpenAI's API.

    python -m scripts.serve_benchmark --url=http://localhost:8000 --concurrency=1,8,32 --input=1024 --output=256
    python -m scripts.serve_benchmark --model=qwen3-32b --device=dgx-spark --dtype=fp8   # beside what the hardware allows
    python -m scripts.serve_benchmark --input=64 --output=64                             # our chat_web with a small model

At each concurrency so many clients send `rounds` requests one after the other, each with words of its own, so that no
cached prefix helps. Time to first token (TTFT) is that from sending a request to the first piece of its answer or of its
thoughts; the time between tokens is that between two pieces, which are tokens with most servers. Tokens/s are the tokens of all
whole answers over the time from the first request to the end of the last. Tokens are what the server reports as usage; where
it reports none, pieces are counted and the result says so. Failed and cut answers are errors and count for nothing else.

The roofline (nanochat/roofline.py) bounds decoding alone, while the time measured has the prompts in it too. $OPENAI_API_KEY
is sent where it is set. The table is Markdown; the last line is JSON.
"""
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

import requests

from nanochat.common import UserError, print0
from nanochat.metrics import finish_stage
from nanochat.configurator import configure, require
from nanochat.hardware import DEVICES
from nanochat.roofline import MODELS, decode_rate, look_up, numbers

url = "http://localhost:8000"   # the server, with or without /v1
concurrency = "1,8,32"          # requests at a time
input = 1024                    # tokens of a prompt
output = 256                    # longest answer in tokens
rounds = 3                      # requests that each client sends
served_model: str = None        # its name there. None: the first that the server lists
ignore_eos = False              # ask for answers of full length: vLLM and SGLang know the field, others may refuse it
timeout = 600                   # seconds without a sign of life after which a request has failed
model: str = None               # for the roofline: one of serve_plan's models
device: str = None              # and one of its devices
devices: int = None             # so many of it. None: what the deployment here has
dtype = ""                      # of its weights there: bf16, fp8 or int4. May be empty where the model is published in one alone

WORDS = "time year people way day man thing life child world school state family group country hand part place case week".split()
TASK = "Tell a long story with these words."


class Request:
    """One request and what came of it. Times are time.perf_counter()'s."""

    def __init__(self, words, limit):
        self.prompt, self.limit = " ".join([*random.choices(WORDS, k=words), TASK]), limit
        self.begin, self.end, self.times = 0.0, 0.0, []     # times: when each piece of text came
        self.usage, self.status, self.error = {}, None, "never sent"

    def run(self, base, name):
        body = {"model": name, "messages": [{"role": "user", "content": self.prompt}], "max_tokens": self.limit,
                "stream": True, "stream_options": {"include_usage": True}, **({"ignore_eos": True} if ignore_eos else {})}
        self.begin = time.perf_counter()
        try:
            with requests.post(base + "/chat/completions", json=body, headers=headers(), stream=True, timeout=timeout) as response:
                self.status = response.status_code
                self.error = self.read(response) if response.ok else said(response.json())
        except requests.RequestException as error:
            self.error = f"{self.status or 'no answer'} ({type(error).__name__})"
        except (ValueError, AttributeError, TypeError):
            self.error = f"{self.status}, and what came has not OpenAI's shape"
        self.end = time.perf_counter()

    def read(self, response):
        """Take the times of a stream's pieces; returns what went wrong. Without a finish_reason an answer is not whole."""
        finish_reason = None
        # the pieces as they come; without chunks on the wire only byte by byte does not wait for more
        for line in response.iter_lines(chunk_size=None if response.raw.chunked else 1):
            now = time.perf_counter()
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if event.get("error"):
                return said(event)
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                    self.times.append(now)
                finish_reason = choice.get("finish_reason") or finish_reason
        return "" if finish_reason else "cut: the stream ended without a finish_reason"

    def tokens(self):
        return self.usage.get("completion_tokens") or len(self.times)


def headers():
    return {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"} if os.environ.get("OPENAI_API_KEY") else {}


def said(body):
    """What an error says, on one line without escapes: OpenAI's shape, or mere text."""
    error = body.get("error") or body.get("detail") or body
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def raise_error(request):
    """End the program with what a failed request has met: status 2 where other settings help, else 1."""
    if request.status in (401, 403):
        raise UserError(f"{request.status}: {request.error}: set OPENAI_API_KEY to the server's key")
    if request.status is not None and 400 <= request.status < 500 and request.status != 429:
        raise UserError(f"{request.status}: {request.error}: try smaller --input and --output, or another --served_model")
    raise ConnectionError(f"no request was answered by {url}: {request.error}")


def find_model(base):
    """The name of the first model that the server lists."""
    try:
        response = requests.get(base + "/models", headers=headers(), timeout=30)
    except requests.RequestException as error:
        raise ConnectionError(f"no answer from {base}: start a server there, or name another with --url") from error
    if response.status_code in (401, 403):
        raise UserError(f"{response.status_code} from {base}/models: set OPENAI_API_KEY to the server's key")
    if response.status_code >= 500:
        raise ConnectionError(f"{response.status_code} from {base}/models: the server's log may say why")
    try:
        return response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{base}/models names no model ({response.status_code}): name one with --served_model") from error


def words_for(base, name):
    """How many words make a prompt of `input` tokens there: two short prompts tell. Without usage, a word is taken for a token."""
    few, many = 4, 20
    probes = [Request(few, 1), Request(many, 1)]
    for probe in probes:
        probe.run(base, name)
        if probe.error:
            raise_error(probe)
    tokens = [probe.usage.get("prompt_tokens") or 0 for probe in probes]
    if tokens[1] <= tokens[0]:
        return input
    return max(1, few + round((input - tokens[0]) * (many - few) / (tokens[1] - tokens[0])))


def measure(base, name, clients, words):
    """All requests of so many clients at a time, done."""
    queues = [[Request(words, output) for _ in range(rounds)] for _ in range(clients)]
    everything = list(itertools.chain(*queues))

    def client(queue):
        for request in queue:
            request.run(base, name)

    threads = [threading.Thread(target=client, args=[queue], daemon=True) for queue in queues]   # daemons: Ctrl+C ends all
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(2)
            if thread.is_alive():
                print(f"  {clients} at a time: {sum(r.end > 0 for r in everything)} of {len(everything)} requests done, "
                      f"{sum(len(r.times) for r in everything):,} pieces", file=sys.stderr, flush=True)
    return everything


def percentile(values, share):
    """The smallest value that `share` of all do not exceed; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def summary(everything, clients):
    """The figures of one concurrency as a dict: seconds and tokens."""
    whole = [request for request in everything if not request.error]
    row = {"concurrency": clients, "requests": len(everything), "errors": dict(Counter(r.error for r in everything if r.error))}
    if not whole:
        return row
    tokens = sum(request.tokens() for request in whole)
    first = [request.times[0] - request.begin for request in whole if request.times]
    between = [later - sooner for request in whole for sooner, later in itertools.pairwise(request.times)]
    prompts = [request.usage["prompt_tokens"] for request in whole if request.usage.get("prompt_tokens")]
    row |= {"tokens_per_second": tokens / (max(r.end for r in whole) - min(r.begin for r in everything)),
            "output_tokens": tokens / len(whole), "input_tokens": statistics.mean(prompts) if prompts else None,
            "pieces": sum(len(request.times) for request in whole) / len(whole),
            "tokens_from_usage": all(request.usage.get("completion_tokens") for request in whole),
            "ttft": statistics.median(first) if first else None, "ttft_p95": percentile(first, 0.95),
            "between_tokens": statistics.median(between) if between else None, "between_tokens_p95": percentile(between, 0.95)}
    if model:
        context = (row["input_tokens"] or input) + row["output_tokens"] / 2     # what a request holds on average
        shape = MODELS[model]
        row["roofline"] = decode_rate(shape, DEVICES[device], dtype or shape.dtypes[0], clients, context, devices or shape.devices)[0]
    return row


def table(rows):
    """The Markdown table, TTFT in seconds and the time between tokens in milliseconds."""
    def cell(value, scale, digits):
        return "" if value is None else f"{value * scale:,.{digits}f}"

    yield "| at a time | tokens/s | TTFT, s: median | p95 | between tokens, ms: median | p95 | errors |" + " % of the roofline |" * bool(model)
    yield "|" + "---|" * (8 if model else 7)
    for row in rows:
        cells = [f"{row['concurrency']}", cell(row.get("tokens_per_second"), 1, 1),
                 cell(row.get("ttft"), 1, 3), cell(row.get("ttft_p95"), 1, 3),
                 cell(row.get("between_tokens"), 1000, 1), cell(row.get("between_tokens_p95"), 1000, 1),
                 f"{sum(row['errors'].values())} of {row['requests']}"]
        if model:
            cells.append(f"{100 * row['tokens_per_second'] / row['roofline']:.0f} of {row['roofline']:,.1f}" if "roofline" in row else "")
        yield "| " + " | ".join(cells) + " |"


def main(settings):
    require(settings, 1, "input", "output", "rounds", "devices", "timeout")
    batches = numbers(concurrency, "concurrency")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise UserError(f"url={url} must be an address such as http://localhost:8000")
    if not re.fullmatch("[!-~]*", os.environ.get("OPENAI_API_KEY", "")):
        raise UserError("OPENAI_API_KEY must be printable ASCII without spaces")
    if (model is None) != (device is None) or model is None and (dtype or devices):
        raise UserError("the roofline needs --model and --device; without both, --dtype and --devices are for nothing")
    if model:
        look_up(DEVICES, device, "device")
        kinds = look_up(MODELS, model, "model").dtypes
        if dtype or len(kinds) > 1:
            look_up(dict.fromkeys(kinds), dtype, "dtype")
    started = time.perf_counter()
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    name = served_model or find_model(base)
    words = words_for(base, name)
    print0(f"{name} at {base}: prompts of {input} tokens ({words} words), answers of at most {output}, {rounds} from each client")
    rows = []
    for clients in batches:
        done = measure(base, name, clients, words)
        rows.append(summary(done, clients))
        for error, count in rows[-1]["errors"].items():
            print0(f"  {clients} at a time, {count} x {error}")
        if "tokens_per_second" not in rows[-1]:
            raise_error(done[0])
    print0("\n" + "\n".join(table(rows)) + "\n")
    counted = "the server's usage" if all(row["tokens_from_usage"] for row in rows) else "pieces of the streams, as usage was not reported for all"
    print0(f"Tokens are counted by {counted}: prompts of {rows[-1]['input_tokens'] or 'unknown'}, answers of {rows[-1]['output_tokens']:.0f} tokens "
           f"in {rows[-1]['pieces']:.0f} pieces on average at {batches[-1]} at a time.")
    finish_stage("serve_benchmark", time.perf_counter() - started, settings, served_model=name, rows=rows)


if __name__ == "__main__":
    main(configure(globals()))
