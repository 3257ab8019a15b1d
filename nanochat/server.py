"""
An OpenAI-compatible chat server around one engine or several, and the page that talks to it.

    request -> Guard (host, origin, key) -> route -> openai_api (reading) -> EnginePool -> answer

The event loop never waits for the model: the engines have threads of their own (async_engine.py),
so that /health answers at once, and a client that leaves is noticed: its sequence is retired before
the next step. A place in the bounded queue is taken before the status line is sent, so that a
full server says 429. Neither questions nor answers are written to any log.
"""
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections import namedtuple

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanochat import openai_api as api
from nanochat.async_engine import EngineStopped, Generation, QueueFull
from nanochat.common import UserError
from nanochat.completion import printable
from nanochat.conversation import (
    fit_conversation,
    prompt_room,
    questions_of,
    restore_tool_calls,
)
from nanochat.http_guard import READING, Access, GuardedProtocol, has_two_framings, load_page
from nanochat.openai_api import ApiError
from nanochat.openai_schema import openapi_schema
from nanochat.prompts import SUGGESTIONS
from nanochat.serving_stats import ServingStats

MAX_BODY_BYTES = 1_000_000
BODY_SECONDS = 30           # in which the body of a request must be complete
MAX_REQUESTS = 500          # that are handled at a time, those that wait for a slot included
CHOICES_PER_SLOT = 4        # of one request
RETRY_SECONDS = 1           # after which a client may try again

# Where a model is asked, and what a base model says to a conversation
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
TRUNCATE = "shorten it, or send truncate_prompt_tokens: -1, which keeps its end"
NO_CHATS = f"this is a base model, which continues texts: use POST {TEXTS} with a prompt"
ROUTES = {"/", "/about", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models"}
ROUTES |= {CHATS, TEXTS}

# What holds where a request does not say, and how the server presents itself.
# continues: whether it is a base model; describe() -> {"name", "suggestions"} of the page, called
# once the model is loaded; hang_seconds: after which a step counts as one that never ends.
Settings = namedtuple(
    "Settings",
    "model temperature top_k max_tokens continues describe hang_seconds",
    defaults=(0.6, 50, 256, False, None, 120),
)


class JsonResponse(Response):
    """JSON in ASCII: half a character, which UTF-8 lacks, is written as its escape."""

    media_type = "application/json"

    def render(self, content):
        """The bytes of a body."""
        return json.dumps(content).encode("ascii")


def refusal(error):
    """The response to an exception, in OpenAI's shape."""
    headers = {}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    status = api.status_of(error)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse(api.error_body(error), status, headers)


# ------------------------------------------------------------------------------------------------
# before a request is routed

class Guard:
    """The application behind what every request must pass: access, and a bound on their number.

    Counts every answer by its route and status.
    """

    def __init__(self, app, access, stats):
        self.app, self.access, self.stats = app, access, stats
        self.in_flight = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        extra = []

        async def send_counted(message):
            if message["type"] == "http.response.start":
                self.stats.requests[(route_of(scope["path"]), message["status"])] += 1
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        self.in_flight += 1
        try:
            answer = self._checked(scope, extra) or self.app
            await answer(scope, receive, send_counted)
        finally:
            self.in_flight -= 1

    def _checked(self, scope, extra):
        """The response to a request that goes no further, or None. extra: learns the headers that
        every answer to this request must have."""
        try:
            scope.setdefault("state", {})["tenant"] = self._admit(scope, extra)
        except ApiError as error:
            return refusal(error)
        is_preflight = scope["method"] == "OPTIONS" and extra
        return Response(status_code=204) if is_preflight else None

    def _admit(self, scope, extra):
        """The tenant of a request. ApiError for one that is refused."""
        if has_two_framings(scope):
            extra.append((b"connection", b"close"))     # who knows where the next request begins
            raise ApiError(400, "send either Content-Length or Transfer-Encoding, not both")
        self.access.check_host(scope)
        self.access.check_origin(scope)
        extra += self.access.cross_origin_headers(scope)
        if scope["method"] == "OPTIONS" and extra:
            return ""       # a browser asks without the key whether it may ask with it
        tenant = self.access.check_key(scope)
        if self.in_flight > MAX_REQUESTS and scope["path"] != "/health":
            raise ApiError(503, "the server has too many requests", retry_after=RETRY_SECONDS)
        return tenant


def route_of(path):
    """The path as the counters name it: one of few."""
    if path in ROUTES:
        return path
    return "/v1/models/NAME" if path.startswith("/v1/models/") else "other"


# ------------------------------------------------------------------------------------------------
# reading a request

async def read_fields(request):
    """The fields of a request's body, a dict.

    JSON must be declared: a foreign page cannot do that without asking.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, "send the header Content-Type: application/json")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large()
    try:
        body = await asyncio.wait_for(read_body(request), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        problem = f"the body was not complete after {BODY_SECONDS} seconds"
        raise ApiError(408, problem) from error
    return api.parse_body(body)


async def read_body(request):
    """All bytes of a body. ApiError for too many."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
    return body


def too_large():
    """The refusal of a body."""
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")


def chat_prompt(tokenizer, messages, room, context):
    """Ids of a conversation, in `room` tokens where its oldest turns can be dropped for that.

    Where the last message is the assistant's, the ids end with it, and the answer continues it.
    """
    begun = []
    if messages[-1]["role"] == "assistant":
        messages, begun = messages[:-1], begun_turn(tokenizer, messages[-1])
    messages = fit_conversation(tokenizer, messages, max(1, room - len(begun)))
    ids = tokenizer.render_for_completion({"messages": messages}) + begun
    check_length(ids, context, "messages")
    return ids


def begun_turn(tokenizer, message):
    """Ids of an assistant's message that is not over: as it is rendered, but for its last token."""
    question = [{"role": "user", "content": "?"}]
    before = tokenizer.render_for_completion({"messages": question})
    turns = [*question, restore_tool_calls(message)]
    ids, _ = tokenizer.render_conversation({"messages": turns})
    return ids[len(before):-1]


def check_length(ids, context, param, remedy="shorten it"):
    """ApiError for a prompt that leaves no room for an answer."""
    if len(ids) >= context:
        problem = f"the prompt has {len(ids)} tokens, the model reads {context - 1}: {remedy}"
        raise ApiError(400, problem, param, "context_length_exceeded")


# A prompt of a continuation. ids: its tokens; text: what echo repeats; first: the first of the ids
# that is part of the text.
Prompt = namedtuple("Prompt", "ids text first")


def text_prompt(tokenizer, given, asked, context):
    """A Prompt from a text or from token ids. One that is too long is refused, as vLLM refuses it:
    its beginning is left out only where the client has asked for that."""
    if isinstance(given, list):
        prompt = Prompt(given, tokenizer.decode(given) if asked.echo else "", 0)
    else:
        ids = tokenizer.encode(given, prepend=tokenizer.get_bos_token_id())
        prompt = Prompt(ids, given if asked.echo else "", 1)
    prompt = truncated(tokenizer, prompt, asked, context)
    check_length(prompt.ids, context, "prompt", TRUNCATE)
    return prompt


def truncated(tokenizer, prompt, asked, context):
    """The end of a Prompt, as long as the client wants it at most."""
    kept = len(prompt.ids) if asked.truncate is None else asked.truncate
    if kept == -1:
        kept = prompt_room(context, asked.options["max_new_tokens"])
    if kept >= len(prompt.ids):
        return prompt
    ids = prompt.ids[-kept:]
    return Prompt(ids, tokenizer.decode(ids) if asked.echo else "", 0)


# ------------------------------------------------------------------------------------------------
# answering

class EventStream(Response):
    """Server-sent events of a request. However it ends, so does what it asked for.

    texts: an asynchronous iterator of str.
    """

    def __init__(self, work, watcher, texts):
        super().__init__()
        self.work, self.watcher, self.texts = work, watcher, texts

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for text in self.texts:
                body = text.encode("ascii")
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.watcher.cancel()
            self.work.cancel()


async def watch(receive, work):
    """Cancel the work of a client as soon as it has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    work.cancel()


class Answer:
    """How the generations of one request become an answer: the base of ChatAnswer and TextAnswer.

    kind, prefix    OpenAI's name for the whole answer, and the first letters of its id
    """

    kind = prefix = None

    def __init__(self, asked, tokenizer, model, prompts):
        self.asked, self.tokenizer, self.prompts = asked, tokenizer, prompts
        self.head = api.head_of(self.chunk_kind if asked.stream else self.kind, self.prefix, model)
        self.opening = f"{json.dumps(self.head)[:-1]}, "    # of every event: written once

    def usage(self, generations):
        """The usage of all choices together. A prompt counts once, however many its choices."""
        prompt = sum(one.counts[0] for one in generations[::self.asked.n])
        cached = sum(one.counts[2] for one in generations[::self.asked.n])
        completion = 0 if self.asked.scoring else sum(one.counts[1] for one in generations)
        return api.usage_of(prompt, completion, cached)

    def whole(self, generations):
        """The answer at once."""
        choices = [self.choice(index, one) for index, one in enumerate(generations)]
        return {**self.head, "choices": choices, "usage": self.usage(generations)}

    async def events(self, work):
        """The answer as server-sent events. Without a finish_reason, a choice is not whole."""
        for index in range(len(work.generations)):
            if first := self.first_chunk(index):
                yield self.event(first)
        async for index, generation in work.moves():
            text, logprobs = generation.take()
            if text or logprobs:
                yield self.event(self.chunk(index, generation, text, logprobs))
            if generation.error:
                yield api.event(api.error_body(generation.error))
                return
            if generation.finish_reason:
                yield self.event(self.last_chunk(index, generation.finish_reason))
        if not all(one.finish_reason for one in work.generations):
            return          # the client has left
        if self.asked.include_usage:
            usage = self.usage(work.generations)
            yield api.event({**self.head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def event(self, choice):
        """A chunk with one choice."""
        return f'data: {self.opening}"choices": [{json.dumps(choice)}]}}\n\n'


class ChatAnswer(Answer):
    """The answer to a conversation."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def logprobs(self, entries):
        """What a choice or chunk says of its tokens' logprobs."""
        if self.asked.logprobs is None:
            return None
        return api.chat_logprobs(self.tokenizer, entries)

    def choice(self, index, generation):
        """A whole choice."""
        text, entries = generation.take()
        return api.chat_choice(index, text, self.logprobs(entries), generation.finish_reason)

    def first_chunk(self, index):
        """Who speaks."""
        return api.chat_chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index, generation, text, entries):
        """What is new of a choice."""
        return api.chat_chunk(index, {"content": text}, self.logprobs(entries))

    def last_chunk(self, index, finish_reason):
        """Why a choice ends."""
        return api.chat_chunk(index, {}, None, finish_reason)


class TextAnswer(Answer):
    """The continuation of a text, or of several."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.written = [0] * len(self.prompts) * self.asked.n   # characters of each choice

    def prompt(self, index):
        """The prompt of a choice."""
        return self.prompts[index // self.asked.n]

    def logprobs(self, entries, offset):
        """What a choice or chunk says of its tokens' logprobs. offset: of its text."""
        if self.asked.logprobs is None:
            return None
        tokens = [entry.token for entry in entries]
        return api.text_logprobs(self.tokenizer, entries, tokens, offset)

    def choice(self, index, generation):
        """A whole choice."""
        text, entries = generation.take()
        if self.asked.scoring:
            text, entries = "", []
        prompt = self.prompt(index)
        logprobs = self.logprobs(entries, len(prompt.text))
        if logprobs is not None and self.asked.echo:
            logprobs = joined(self.prompt_logprobs(prompt, generation), logprobs)
        reason = "length" if self.asked.scoring else generation.finish_reason
        return api.text_choice(index, prompt.text + text, logprobs, reason)

    def prompt_logprobs(self, prompt, generation):
        """The logprobs of a prompt that is repeated."""
        entries = generation.prompt_logprobs[prompt.first:]
        return api.text_logprobs(self.tokenizer, entries, prompt.ids[prompt.first:])

    def first_chunk(self, index):
        """The prompt, where it is to be repeated."""
        text = self.prompt(index).text
        self.written[index] = len(text)
        return api.text_choice(index, text) if text else None

    def chunk(self, index, generation, text, entries):
        """What is new of a choice."""
        logprobs = self.logprobs(entries, self.written[index])
        self.written[index] += len(text)
        return api.text_choice(index, text, logprobs)

    def last_chunk(self, index, finish_reason):
        """Why a choice ends."""
        return api.text_choice(index, "", None, finish_reason)


def joined(first, second):
    """Two dicts of lists as one."""
    return {key: first[key] + second[key] for key in first}


# ------------------------------------------------------------------------------------------------
# the application

class Service:
    """What the routes share: the engines, the settings, and the way from a request to an answer."""

    def __init__(self, pool, settings, access, stats):
        self.pool, self.settings, self.access, self.stats = pool, settings, access, stats
        self.created = int(time.time())

    @property
    def tokenizer(self):
        """The tokenizer of the model, once it is loaded."""
        return self.pool.engines[0].engine.tokenizer

    @property
    def health(self):
        """"ok", "loading", "draining", or why the server cannot live any longer."""
        if self.pool.state == "dead":
            return "dead"
        if self.pool.is_hung(self.settings.hang_seconds):
            return "hung"
        if self.pool.is_draining:
            return "draining"
        return "ok" if self.pool.state == "ready" else "loading"

    def require_ready(self):
        """ApiError unless a request can be answered."""
        problems = {
            "dead": "the model has failed, and the server is ending",
            "hung": "the model does not answer any more",
            "draining": "the server is shutting down",
            "loading": "the model is being loaded: try again in a moment",
        }
        problem = problems.get(self.health)
        if problem:
            raise ApiError(503, problem, code=self.health, retry_after=RETRY_SECONDS)

    def served(self):
        """What a request is read against."""
        settings = self.settings
        return api.Served(
            model=settings.model,
            continues=settings.continues,
            context=self.pool.context,
            vocab_size=self.tokenizer.get_vocab_size(),
            max_choices=min(self.pool.max_slots * CHOICES_PER_SLOT, self.pool.capacity),
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens,
        )

    def model(self):
        """The model, as /v1/models describes it."""
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat",
        }

    def about(self):
        """What the page must know."""
        settings = self.settings
        defaults = {
            "temperature": settings.temperature,
            "top_p": 1.0,
            "top_k": settings.top_k,
            "max_tokens": settings.max_tokens,
        }
        described = settings.describe() if settings.describe else {}
        return {
            "model": settings.model,
            "name": "nanochat",
            "continues": settings.continues,
            "suggestions": list(SUGGESTIONS),
            "needs_key": self.access.needs_key,
            "defaults": defaults,
            "context": self.pool.context,
            **described,
        }

    def gauges(self):
        """What /metrics says of this moment."""
        engines = [engine.engine for engine in self.pool.engines if engine.engine]
        running = sum(len(engine.running) for engine in engines)
        return {
            "nanochat_sequences": self.pool.in_flight,
            "nanochat_sequences_running": running,
            "nanochat_sequences_waiting": max(0, self.pool.in_flight - running),
            "nanochat_engine_alive": int(self.health not in ("dead", "hung")),
        }

    def generations(self, asked, prompts, tenant):
        """A Generation for each choice of each prompt, a list of lists of ids."""
        found = []
        for ids in prompts:
            room = self.pool.context - len(ids)
            options = {**asked.options, "tenant": tenant}
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
            seed = random.getrandbits(31) if options["seed"] is None else options["seed"]
            for choice in range(asked.n):
                own = {**options, "seed": seed + choice}
                found.append(Generation(ids, own, asked.stop))
        return found

    def require_place(self):
        """ApiError where the queue is full: nothing of a request is read then."""
        if self.pool.in_flight >= self.pool.capacity:
            raise self.no_place()

    def no_place(self):
        """The refusal of a request that finds no place in the queue."""
        problem = f"the queue is full: {self.pool.in_flight} sequences run or wait"
        return ApiError(429, problem, code="queue_full", retry_after=RETRY_SECONDS)

    def submit(self, generations):
        """A Request in flight. ApiError where it has no place."""
        try:
            return self.pool.submit(generations)
        except QueueFull as error:
            raise self.no_place() from error
        except EngineStopped as error:
            raise ApiError(503, str(error), retry_after=RETRY_SECONDS) from error

    async def answer(self, request, answer, generations):
        """The response to a request: whole, or a stream. The engine takes it before the status
        line, so that what is wrong with it is said by the status."""
        work = self.submit(generations)
        watcher = asyncio.create_task(watch(request.receive, work))
        try:
            await work.admitted()
            if answer.asked.stream:
                return EventStream(work, watcher, answer.events(work))
            await work.finished()
            if not all(one.finish_reason for one in work.generations):
                raise ClientDisconnect
        except BaseException:
            watcher.cancel()
            work.cancel()
            raise
        watcher.cancel()
        return JsonResponse(answer.whole(work.generations))

    async def chat(self, request):
        """Answer a conversation."""
        # 1. read and check the request
        fields = await read_fields(request)
        self.require_ready()
        self.require_place()
        if self.settings.continues:
            raise ApiError(400, NO_CHATS)
        served = self.served()
        asked = api.read_chat(fields, served)
        room = prompt_room(served.context, asked.options["max_new_tokens"])

        # 2. its messages and their tokens, beside the event loop: there may be many
        def read():
            messages = api.read_messages(fields)
            ids = chat_prompt(self.tokenizer, messages, room, served.context)
            return questions_of(messages), ids

        asked.options["questions"], ids = await asyncio.to_thread(read)

        # 3. answer
        generations = self.generations(asked, [ids], request.state.tenant)
        answer = ChatAnswer(asked, self.tokenizer, served.model, [ids])
        return await self.answer(request, answer, generations)

    async def continuation(self, request):
        """Continue a text, or several."""
        # 1. read and check the request
        fields = await read_fields(request)
        self.require_ready()
        self.require_place()
        served = self.served()
        asked = api.read_continuation(fields, served)
        given = api.read_prompts(fields, served)
        if len(given) * asked.n > self.pool.capacity:
            problem = (
                f"{len(given)} prompts with n={asked.n} are {len(given) * asked.n} answers: "
                f"at most {self.pool.capacity}"
            )
            raise ApiError(400, problem, "prompt")

        # 2. its tokens, beside the event loop
        def read():
            return [text_prompt(self.tokenizer, one, asked, served.context) for one in given]

        prompts = await asyncio.to_thread(read)

        # 3. answer
        ids = [prompt.ids for prompt in prompts]
        generations = self.generations(asked, ids, request.state.tenant)
        answer = TextAnswer(asked, self.tokenizer, served.model, prompts)
        return await self.answer(request, answer, generations)


def create_app(pool, settings, access=None, stats=None):
    """
    The application, to be served by uvicorn: GET / (the page), /about (what the page must know),
    /health, /ready, /metrics, /openapi.json, /v1/models and /v1/models/NAME, and POST
    /v1/chat/completions and /v1/completions. Errors have OpenAI's shape.

    pool: an EnginePool, started and stopped with the application; settings: Settings; access: an
    Access; stats: the ServingStats that the pool's engines count in.
    """
    access, stats = access or Access(), stats or ServingStats()
    service = Service(pool, settings, access, stats)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        pool.start(asyncio.get_running_loop())
        yield
        pool.stop()

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    add_pages(app, service)
    add_api(app, service)
    return Guard(app, access, stats)


def add_error_handlers(app):
    """Give every exception a response in OpenAI's shape."""
    @app.exception_handler(ApiError)
    @app.exception_handler(UserError)
    @app.exception_handler(ClientDisconnect)    # nobody reads this answer, and nothing went wrong
    @app.exception_handler(Exception)
    async def on_error(request, error):
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        status, message = error.status_code, "there is nothing here"
        if status == 405:
            message = f"{request.method} is not possible here"
        body = api.error_body(ApiError(status, message))
        return JsonResponse(body, status, error.headers)


def add_pages(app, service):
    """The routes for people and for those who watch the server."""
    page, page_headers = load_page("ui.html")

    @app.api_route("/", methods=READING)
    async def index():
        return HTMLResponse(page, headers=page_headers)

    @app.api_route("/about", methods=READING)
    async def about(request: Request):
        if service.access.needs_key and not request.state.tenant:
            return JsonResponse({"needs_key": True})
        service.require_ready()
        return JsonResponse(service.about())

    @app.api_route("/health", methods=READING)
    async def health():
        status = 503 if service.health in ("dead", "hung") else 200
        return JsonResponse({"status": service.health}, status)

    @app.api_route("/ready", methods=READING)
    async def ready():
        service.require_ready()
        return JsonResponse({"status": "ready"})

    @app.api_route("/metrics", methods=READING)
    async def metrics():
        return PlainTextResponse(service.stats.text(service.gauges()))


def add_api(app, service):
    """OpenAI's routes."""
    @app.api_route("/openapi.json", methods=READING)
    async def schema():
        return JsonResponse(openapi_schema(service.settings.model))

    @app.api_route("/v1/models", methods=READING)
    async def models():
        return JsonResponse({"object": "list", "data": [service.model()]})

    @app.api_route("/v1/models/{name:path}", methods=READING)
    async def model(name: str):
        if name != service.settings.model:
            problem = f"this server has one model, {service.settings.model}"
            raise ApiError(404, problem, "model", "model_not_found")
        return JsonResponse(service.model())

    @app.post(CHATS)
    async def chat_completions(request: Request):
        return await service.chat(request)

    @app.post(TEXTS)
    async def completions(request: Request):
        return await service.continuation(request)


# ------------------------------------------------------------------------------------------------
# the process

KEEP_ALIVE_SECONDS = 75     # longer than clients keep idle connections: they close first
GONE_SECONDS = 2            # for clients to read their last bytes, at the end
DEAD_SECONDS = 1            # for which a server without a model says so, before it ends


class ChatServer(uvicorn.Server):
    """The server of one application, until a signal or the model's failure.

    SIGTERM and SIGINT begin to drain: new work is refused, answers under way and those that wait
    are finished until drain_seconds are over, then they end with an error. A second SIGINT ends
    them at once.
    """

    def __init__(self, app, pool, drain_seconds=30):
        super().__init__(uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GONE_SECONDS,
        ))
        self.pool, self.drain_seconds = pool, drain_seconds
        self.deadline = None        # of draining, in seconds of time.monotonic()
        self.died_at = None

    def handle_exit(self, sig, frame):
        """A signal came. uvicorn's own way would raise it again at the end, and exit with it."""
        if self.deadline is None:
            self.pool.is_draining = True
            self.deadline = time.monotonic() + self.drain_seconds
        elif sig == signal.SIGINT:
            self.deadline = time.monotonic()    # not force_exit, which skips the lifespan's end

    async def on_tick(self, counter):
        """Whether to end, ten times a second."""
        should_exit = await super().on_tick(counter)
        now = time.monotonic()
        if self.pool.state == "dead":
            self.died_at = self.died_at or now
            return should_exit or now > self.died_at + self.dead_seconds
        if self.deadline is not None:
            is_over = now >= self.deadline or self.pool.in_flight == 0
            if is_over:
                self.pool.end_all(EngineStopped("the server is shutting down"))
            return should_exit or is_over
        return should_exit

    @property
    def dead_seconds(self):
        """How long to say that there is no model: not at all where there never was one."""
        return DEAD_SECONDS if self.pool.engines[0].engine else 0

    def serve_until_end(self, listener):
        """Serve on a listening socket. Returns the exit status: 0 after a signal, 1 where the model
        has failed. Raises what kept the model from being loaded."""
        self.run(sockets=[listener])
        error = self.pool.error
        if error is None:
            return 0
        if isinstance(error, UserError):
            raise error
        lines = "".join(traceback.format_exception(error))
        logging.getLogger("uvicorn.error").error("the model has failed\n%s", printable(lines))
        return 1


def end_process(pool, status):
    """End this process with an exit status, also where an engine's thread never ends.

    A compilation is left where it is: the interpreter would wait for its processes. What it has
    compiled so far is on disk already.
    """
    pool.join(GONE_SECONDS)
    sys.stdout.flush()
    if pool.is_running:
        os._exit(status)
    sys.exit(status)
