"""
An OpenAI-compatible chat server around one engine, and the page that talks to it.

One thread owns the model and answers one request after the other, in the order in which they came.
The event loop never waits for the model, so /health answers at once and a client that leaves is
noticed: its sequence is retired after the next step, or never admitted if it was still waiting.
Pieces of text travel from the thread to the loop through a queue that the length of an answer
bounds. Neither questions nor answers are written to any log.
"""
import asyncio
import base64
import hashlib
import json
import logging
import math
import random
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanochat.common import UserError
from nanochat.completion import UntilStop, fit_text
from nanochat.conversation import (
    fit_conversation,
    normalise_messages,
    prompt_room,
    questions_of,
)
from nanochat.prompts import SUGGESTIONS

MAX_BODY_BYTES = 1_000_000
READING = ("GET", "HEAD")   # what asks for a page; HEAD, for nothing but whether it is there

# Fields that would change the answer in a way this server cannot, with the values that ask for
# nothing.
UNSUPPORTED = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
}
UNSUPPORTED_OF_CHATS = {
    **UNSUPPORTED,
    "stop": ([],),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
UNSUPPORTED_OF_TEXTS = {**UNSUPPORTED, "best_of": (1,), "suffix": ("",)}

# Where a model is asked, and what one of the other kind says there
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
NO_CHATS = f"this is a base model, which continues texts: use POST {TEXTS} with a prompt"
NO_TEXTS = f"this model answers in conversations: use POST {CHATS} with messages"


class ApiError(Exception):
    """A request refused: HTTP status, one line for the caller, and the field it is about."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def status_of(error):
    """The HTTP status of an exception: its own, else 400 for bad input and 500 for a failure."""
    return getattr(error, "status", 400 if isinstance(error, UserError) else 500)


def error_body(error):
    """Any exception in OpenAI's shape. Only messages meant for users are shown."""
    known = isinstance(error, (ApiError, UserError))
    message = str(error) if known else "the model failed; the server's log says why"
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if status_of(error) < 500 else "server_error",
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


# ------------------------------------------------------------------------------------------------
# reading a request

async def read_json(request):
    """The body as a dict.

    JSON must be declared: a foreign page cannot do that without asking, and is never allowed.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, "send the header Content-Type: application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def read_messages(fields):
    """The messages, well formed, the last one the user's. ApiError where that cannot be."""
    try:
        messages = normalise_messages(fields.get("messages"))
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error
    if not messages or messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return messages


def read_text(fields):
    """The text to continue: a string, or a list of one. ApiError for anything else."""
    text = "" if fields.get("prompt") is None else fields["prompt"]
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise ApiError(400, "prompt must be one text", "prompt")
    return text.encode("utf-8", "replace").decode("utf-8")  # half a character becomes "?"


def read_stops(fields):
    """The texts before which a continuation ends: a list of 0 to 4. ApiError for anything else."""
    stops = fields.get("stop") or []
    if isinstance(stops, str):
        stops = [stops]
    texts = isinstance(stops, list) and all(stop and isinstance(stop, str) for stop in stops)
    if not texts or len(stops) > 4:
        raise ApiError(400, "stop must be a text or a list of up to 4 texts", "stop")
    return stops


def read_number(fields, name, default, low, high, kinds=(int,)):
    """The number in a field, or `default` where it is absent. NaN and booleans are no numbers."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in kinds or not low <= value <= high:
        kind = "number" if float in kinds else "whole number"
        range_ = f"from {low}" if high == math.inf else f"from {low} to {high}"
        raise ApiError(400, f"{name} must be a {kind} {range_}", name)
    return value


def read_typed(fields, name, default):
    """The value of a field, which must have the type of its default."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not type(default):
        kind = "true or false" if type(default) is bool else "an object"
        raise ApiError(400, f"{name} must be {kind}", name)
    return value


# ------------------------------------------------------------------------------------------------
# making an answer

class Generation:
    """One answer: made on the model's thread by `start() -> Stream`, read on the event loop."""

    def __init__(self, start):
        self.start = start
        self.stream = None              # not before its turn has come
        self.error = None               # what went wrong on the model's thread, if anything
        self.gone = threading.Event()   # the client has left

    async def pieces(self, worker, request):
        """Yield the text piece by piece. `error` is set afterwards."""
        loop = asyncio.get_running_loop()
        queue = asyncio.Queue()

        def produce():
            if self.gone.is_set():      # the client left while waiting for its turn
                return
            self.stream = self.start()
            for piece in self.stream:
                if self.gone.is_set():  # leaving the loop retires the sequence
                    return
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.gone.set()

        watcher = asyncio.create_task(watch())
        answer = loop.run_in_executor(worker, produce)
        # None comes after the last piece: the loop keeps the order of its callbacks.
        answer.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            self.error = answer.exception()
        finally:
            self.gone.set()
            watcher.cancel()

    @property
    def finish_reason(self):
        """None for an answer that was not finished, or not even begun."""
        return self.stream.finish_reason if self.stream else None

    def usage(self):
        prompt = self.stream.prompt_tokens
        completion = self.stream.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def chat_choice(piece, finish_reason=None):
    """A piece of an answer, in OpenAI's shape for conversations."""
    delta = {} if finish_reason else {"content": piece}
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def text_choice(piece, finish_reason=None):
    """A piece of a continuation, or all of it, in OpenAI's shape for texts."""
    return {"index": 0, "text": piece, "logprobs": None, "finish_reason": finish_reason}


async def events(generation, pieces, head, first, choice, with_usage):
    """Server-sent events of one answer. Without a finish_reason, an answer is not whole.

    first: the first choice, before there is a piece; choice: chat_choice or text_choice.
    """
    def event(fields):
        return f"data: {json.dumps(fields)}\n\n"

    def chunk(choice):
        return event({**head, "choices": [choice]})

    yield chunk(first)
    async for piece in pieces:
        if piece:
            yield chunk(choice(piece))
    if generation.error:
        if not isinstance(generation.error, UserError):
            log = logging.getLogger("uvicorn.error")
            log.error("generation failed", exc_info=generation.error)
        yield event(error_body(generation.error))
    elif generation.finish_reason:
        yield chunk(choice("", generation.finish_reason))
        if with_usage:
            yield event({**head, "choices": [], "usage": generation.usage()})
        yield "data: [DONE]\n\n"


async def whole_text(generation, pieces):
    """All pieces as one text. Raises what went wrong, and ClientDisconnect for a client that left.
    """
    text = "".join([piece async for piece in pieces])
    if generation.error:
        raise generation.error
    if generation.finish_reason is None:
        raise ClientDisconnect
    return text


def stream_of(events):
    """The response that sends server-sent events."""
    return StreamingResponse(
        events,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


def head_of(kind, prefix, model_name):
    """The fields that every object of one answer has. kind: OpenAI's name for such objects."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model_name,
    }


# ------------------------------------------------------------------------------------------------
# the application

def load_page():
    """The page and its headers.

    Its policy names the one script and the one style by their hashes: nothing else ever runs.
    """
    page = (Path(__file__).parent / "ui.html").read_text(encoding="utf-8")

    def hashed(tag):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = (
        "default-src 'none'",
        f"script-src {hashed('script')}",
        f"style-src {hashed('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return page, {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def create_app(
    engine,
    tokenizer,
    model_name,
    temperature=0.6,
    top_k=50,
    max_tokens=256,
    continues=False,
    suggestions=SUGGESTIONS,
    shown_name="nanochat",
):
    """
    The application: GET / (the page), /about (what the page must know), /health, /v1/models and
    /v1/models/NAME, and POST /v1/chat/completions or, for a base model, /v1/completions.

    temperature, top_k and max_tokens hold where a request does not say. Errors have OpenAI's shape.
    continues: whether it is a base model, which continues texts and does not answer. suggestions:
    what the page offers to send. shown_name heads the page.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    context, vocab_size = engine.max_seq_len, tokenizer.get_vocab_size()
    page, page_headers = load_page()
    created = int(time.time())

    @app.exception_handler(ApiError)
    @app.exception_handler(UserError)
    @app.exception_handler(ClientDisconnect)    # nobody reads this answer, and nothing went wrong
    @app.exception_handler(Exception)
    async def on_error(request, error):
        return JSONResponse(error_body(error), status_of(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        status, message = error.status_code, "there is nothing here"
        if status == 405:
            message = f"{request.method} is not possible here"
        return JSONResponse(error_body(ApiError(status, message)), status, error.headers)

    @app.api_route("/", methods=READING)
    async def index():
        return HTMLResponse(page, headers=page_headers)

    @app.api_route("/health", methods=READING)
    async def health():
        return {"status": "ok"}

    @app.api_route("/about", methods=READING)
    async def about():
        return {
            "model": model_name,
            "name": shown_name,
            "continues": continues,
            "suggestions": list(suggestions),
        }

    the_model = {
        "id": model_name,
        "object": "model",
        "created": created,
        "owned_by": "nanochat",
    }

    @app.api_route("/v1/models", methods=READING)
    async def models():
        return {"object": "list", "data": [the_model]}

    @app.api_route("/v1/models/{name:path}", methods=READING)
    async def model(name: str):
        check_model(name)
        return the_model

    def check_model(name):
        """ApiError for another model than ours."""
        if name != model_name:
            problem = f"this server has one model, {model_name}"
            raise ApiError(404, problem, "model", "model_not_found")

    def check_supported(fields, unsupported):
        """ApiError for another model, and for a field that this server cannot honour."""
        if fields.get("model") is not None:
            check_model(fields["model"])
        for name, harmless in unsupported.items():
            value = fields.get(name)
            if value is not None and value not in harmless:
                problem = f"{name} is not supported here"
                raise ApiError(400, problem, name, "unsupported_parameter")

    def read_options(fields):
        """The options of a Sequence. ApiError for a number outside of its range.

        A client asks for the most that it would take: more than the context holds is no error.
        """
        limit = read_number(fields, "max_tokens", max_tokens, 1, math.inf)
        limit = read_number(fields, "max_completion_tokens", limit, 1, math.inf)
        number = int, float
        some_seed = random.getrandbits(31)
        return {
            "temperature": read_number(fields, "temperature", temperature, 0, 2, number),
            "top_k": read_number(fields, "top_k", min(top_k, vocab_size), 1, vocab_size),
            "seed": read_number(fields, "seed", some_seed, -2**63, 2**63 - 1),
            "max_new_tokens": min(limit, context),
        }

    def read_prompt(fields, room):
        """(ids, questions): the conversation, in `room` tokens where its oldest turns can be
        dropped for that, and all that the user has asked."""
        asked = read_messages(fields)
        messages = fit_conversation(tokenizer, asked, room)
        ids = tokenizer.render_for_completion({"messages": messages})
        if len(ids) >= context:
            problem = (
                f"the question takes {len(ids)} tokens, the model reads {context - 1}: shorten it"
            )
            raise ApiError(400, problem, "messages", "context_length_exceeded")
        return ids, questions_of(asked)

    @app.post(CHATS)
    async def chat_completions(request: Request):
        # 1. read and check the request
        fields = await read_json(request)
        if continues:
            raise ApiError(400, NO_CHATS)
        check_supported(fields, UNSUPPORTED_OF_CHATS)
        options = read_options(fields)
        streaming = read_typed(fields, "stream", False)
        stream_options = read_typed(fields, "stream_options", {})
        room = prompt_room(context, options["max_new_tokens"])
        ids, options["questions"] = await asyncio.to_thread(read_prompt, fields, room)
        options["max_new_tokens"] = min(options["max_new_tokens"], context - len(ids))

        # 2. generate on the model's thread, one request after the other
        generation = Generation(lambda: engine.stream(ids, **options))
        pieces = generation.pieces(worker, request)

        # 3. answer piece by piece ...
        if streaming:
            head = head_of("chat.completion.chunk", "chatcmpl", model_name)
            first = {"role": "assistant", "content": ""}
            first = {"index": 0, "delta": first, "finish_reason": None}
            with_usage = stream_options.get("include_usage")
            return stream_of(events(generation, pieces, head, first, chat_choice, with_usage))

        # ... or at once
        text = await whole_text(generation, pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": generation.finish_reason,
        }
        head = head_of("chat.completion", "chatcmpl", model_name)
        return {**head, "choices": [choice], "usage": generation.usage()}

    @app.post(TEXTS)
    async def completions(request: Request):
        # 1. read and check the request
        fields = await read_json(request)
        if not continues:
            raise ApiError(400, NO_TEXTS)
        check_supported(fields, UNSUPPORTED_OF_TEXTS)
        options = read_options(fields)
        streaming = read_typed(fields, "stream", False)
        stream_options = read_typed(fields, "stream_options", {})
        text, stops = read_text(fields), read_stops(fields)
        echoed = text if read_typed(fields, "echo", False) else ""
        room = prompt_room(context, options["max_new_tokens"])
        ids = await asyncio.to_thread(fit_text, tokenizer, text, room)
        options["max_new_tokens"] = min(options["max_new_tokens"], context - len(ids))

        # 2. generate on the model's thread
        generation = Generation(lambda: UntilStop(engine.stream(ids, **options), stops))
        pieces = generation.pieces(worker, request)

        # 3. answer piece by piece, or at once
        head = head_of("text_completion", "cmpl", model_name)
        if streaming:
            with_usage = stream_options.get("include_usage")
            first = text_choice(echoed)
            return stream_of(events(generation, pieces, head, first, text_choice, with_usage))
        text = echoed + await whole_text(generation, pieces)
        choice = text_choice(text, generation.finish_reason)
        return {**head, "choices": [choice], "usage": generation.usage()}

    return app
