"""
The engine on a thread of its own, and the event loop's view of it.

    pool = EnginePool([load], max_queue=64, stats=stats)    # load() -> Engine, on the thread
    pool.start(loop)
    request = pool.submit(generations)                      # QueueFull where there is no place
    async for index, generation in request.moves(): ...     # pieces of text, as they come

One thread owns one engine: it loads the model, and nobody else ever calls the engine. Orders (start
this sequence, cancel that one) travel to the thread through a queue, which it empties between two
steps. What steps have brought, for all sequences together, travels back as one callback of the
event loop.

    event loop                                      engine's thread
    submit(), cancel()  -> orders (SimpleQueue) ->  admit, retire
                                                    step, text of each sequence that moved
    deliver()           <- call_soon_threadsafe <-  one list of Updates

To send a piece of an answer takes the event loop a tenth of a millisecond of Python, in which the
engine's thread waits: with many clients of a small model that was more than the steps took. So
what comes within SECONDS_OF_PIECE for each piece travels together (vLLM's --stream-interval
counts tokens in the place of time): one client gets its tokens one by one, and each of 32 gets a
piece 30 times a second. The first token and the end of a sequence never wait.

A sequence has a place from submit() until the thread has said that it is over: that is what bounds
the queue. What was delivered waits in its Generation, joined to what waits there already, so that a
slow reader costs no more memory than its answer.

A step that raises ends all sequences with an error, and the next ones are served. FAILED_STEPS of
them in a row, a model that cannot be loaded, or an exception that is no Exception ends the thread.
"""
import asyncio
import logging
import queue
import threading
import time
import traceback
from collections import namedtuple

from nanochat.common import UserError
from nanochat.completion import printable
from nanochat.sequence_text import TextOfSequence

FAILED_STEPS = 3            # after so many that raised, one after the other, an engine is given up
SECONDS_OF_PIECE = 0.001    # of the time between two deliveries, for each piece of them


class QueueFull(Exception):
    """There is no place for a request now."""


class EngineStopped(UserError):
    """The engine ends no sequence any more: it has failed, or the server is shutting down."""

    status = 503    # of the server's answer


class StepFailed(UserError):
    """A step of the engine, or what prepares one, has raised an exception."""

    status = 500

    def __init__(self):
        super().__init__("the model failed; the server's log says why")


# What a step has brought to one sequence. text: what is new; logprobs: (token, TokenLogprob) pairs
# of it; finish_reason, error: None unless this is the end; counts: (tokens of the prompt, of the
# answer, of the prompt that a cached prefix had).
Update = namedtuple("Update", "generation text logprobs finish_reason error counts prompt_logprobs")


class Generation:
    """One answer under way: asked for on the event loop, made on the engine's thread.

    prompt, options    of Engine.new_sequence()
    stop               texts before which it ends
    is_admitted        whether the engine has taken it, so that nothing is wrong with the request
    finish_reason      "stop" or "length" once it is whole
    error              the exception that ended it
    is_over            nothing more will come; without finish_reason and error it was cancelled
    counts             tokens of the prompt, of the answer, and of the prompt's cached prefix
    prompt_logprobs    a TokenLogprob for each token of the prompt, where they were asked for
    """

    def __init__(self, prompt, options, stop=()):
        self.prompt, self.options, self.stop = prompt, options, stop
        self.is_admitted = self.is_over = self.is_cancelled = False
        self.finish_reason = self.error = self.prompt_logprobs = None
        self.counts = (len(prompt), 0, 0)
        self.submitted = time.monotonic()
        self.changed = None     # the asyncio.Event of the request
        self._texts, self._logprobs = [], []

    def add(self, update):
        """Take what a step has brought. On the event loop."""
        self.is_admitted = True
        if update.text:
            self._texts.append(update.text)
        self._logprobs += update.logprobs
        self.counts = update.counts
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = update.prompt_logprobs
        if update.finish_reason or update.error:
            self.end(update.finish_reason, update.error)
        self.changed.set()

    def end(self, finish_reason=None, error=None):
        """Note that nothing more will come; what has ended already stays as it is."""
        if not self.is_over:
            self.is_over, self.finish_reason, self.error = True, finish_reason, error
        self.changed.set()

    def take(self):
        """(text, logprobs) that came since the last call."""
        text, self._texts = "".join(self._texts), []
        logprobs, self._logprobs = self._logprobs, []
        return text, logprobs


class Request:
    """The generations of one HTTP request. Whoever leaves it cancels what is not over."""

    def __init__(self, generations, engine):
        self.generations = generations
        self._engine = engine
        self._changed = asyncio.Event()
        for generation in generations:
            generation.changed = self._changed

    async def admitted(self):
        """Wait until the engine has taken all generations. Raises the error of one that it has not.
        """
        while not all(one.is_admitted or one.is_over for one in self.generations):
            await self._change()
        self.raise_error()

    def raise_error(self):
        """Raise the first error of a generation, if there is one."""
        for generation in self.generations:
            if generation.error is not None:
                raise generation.error

    async def moves(self):
        """Yield (index, generation) whenever a generation has something new, until all are over."""
        over = set()
        while len(over) < len(self.generations):
            self._changed.clear()
            for index, generation in enumerate(self.generations):
                if index not in over:
                    over |= {index} if generation.is_over else set()
                    yield index, generation
            if len(over) < len(self.generations):
                await self._changed.wait()

    async def finished(self):
        """Wait until all generations are over. Raises the error of one."""
        while not all(one.is_over for one in self.generations):
            await self._change()
        self.raise_error()

    async def _change(self):
        self._changed.clear()
        await self._changed.wait()

    def cancel(self):
        """End what is not over. Harmless when repeated."""
        for generation in self.generations:
            self._engine.cancel(generation)


class AsyncEngine:
    """One engine, its thread, and the generations that are under way.

    load()      makes the engine, on the thread
    stats       a ServingStats that counts tokens and times
    state       "loading", "ready" or "dead"; then `error` says why
    """

    def __init__(self, load, stats, name="engine"):
        self.load, self.stats = load, stats
        self.state, self.error, self.engine = "loading", None, None
        self.generations = set()            # under way; of the event loop
        self.step_began = None              # time.monotonic() of a step that is not over
        self._orders = queue.SimpleQueue()
        self._live = {}                     # {sequence: _Live}; of the thread
        self._moved = {}                    # of these, what was not delivered yet; of the thread
        self._delivered = 0.0               # time.monotonic() of the last delivery; of the thread
        self._failed_steps = 0
        self._loop = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # --------------------------------------------------------------------------------------------
    # the event loop's side

    def start(self, loop):
        """Start the thread. loop: the event loop on which generations are delivered."""
        self._loop = loop
        self._thread.start()

    def submit(self, generations):
        """Hand generations to the thread; a Request. EngineStopped where it has ended."""
        if self.state == "dead":
            raise EngineStopped("the model has failed, and the server is ending")
        request = Request(generations, self)
        self.generations.update(generations)
        for generation in generations:
            self._orders.put(("admit", generation))
        return request

    def cancel(self, generation):
        """End a generation that nobody wants any more; its slot is free within a step."""
        if generation in self.generations and not generation.is_cancelled:
            generation.is_cancelled = True
            self._orders.put(("cancel", generation))

    def end_all(self, error):
        """End all generations at once with an error, whatever the thread is doing."""
        for generation in list(self.generations):
            self.cancel(generation)
            generation.end(error=error)

    def is_hung(self, seconds):
        """Whether a step has been under way for longer than that."""
        began = self.step_began
        return began is not None and time.monotonic() - began > seconds

    def stop(self):
        """Let the thread end after the step that it is in."""
        self._orders.put(("stop", None))

    def join(self, seconds):
        """Wait for the thread's end, so long at most."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def is_running(self):
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _deliver(self, updates):
        for update in updates:
            update.generation.add(update)
            if update.generation.is_over:
                self.generations.discard(update.generation)

    def _forget(self, generation):
        """The thread has let go of a cancelled generation."""
        generation.end()
        self.generations.discard(generation)

    def _ready(self, engine):
        self.engine, self.state = engine, "ready"

    def _bury(self, error):
        self.state, self.error = "dead", error
        self.end_all(EngineStopped("the model has failed, and the server is ending"))
        self.generations.clear()

    def _call(self, function, *arguments):
        """Run a function on the event loop. A loop that has ended needs nothing any more."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    # --------------------------------------------------------------------------------------------
    # the thread's side

    def _run(self):
        try:
            engine = self.load()
            self._call(self._ready, engine)
            self._serve(engine)
        except BaseException as error:      # whatever ends the thread ends the server
            self._call(self._bury, error)

    def _serve(self, engine):
        """Take orders and steps until the order to stop."""
        while self._obey(engine):
            self.step_began = time.monotonic()
            try:
                moved = engine.step()
            except Exception as error:
                self._end_live(engine, error)
            else:
                self._failed_steps = 0
                self._report(engine, moved)
            self.step_began = None

    def _obey(self, engine):
        """Carry out all orders, waiting for one where nothing is live. False: stop."""
        while True:
            try:
                order, generation = self._orders.get(block=not self._live)
            except queue.Empty:
                return True
            if order == "stop":
                return False
            if order == "admit":
                self._admit(engine, generation)
            else:
                self._cancel(engine, generation)

    def _admit(self, engine, generation):
        """Make a sequence of a generation and queue it. What is wrong with it ends it alone."""
        if generation.is_cancelled:
            self._call(self._forget, generation)
            return
        try:
            sequence = engine.new_sequence(generation.prompt, **generation.options)
            engine.admit(sequence)
        except Exception as error:
            self._call(self._deliver, [last_update(generation, shown_error(error))])
            return
        live = _Live(engine, generation, sequence)
        self._live[sequence] = live
        self._call(self._deliver, [live.update()])

    def _cancel(self, engine, generation):
        for sequence, live in self._live.items():
            if live.generation is generation:
                engine.retire(sequence)
                del self._live[sequence]
                self._moved.pop(sequence, None)
                break
        self._call(self._forget, generation)

    def _report(self, engine, moved):
        """Send out what steps have brought to sequences, where it is time."""
        # 1. who has something new
        for sequence in moved:
            if sequence in self._live:
                self._moved[sequence] = self._live[sequence]

        # 2. what is due: the first token and the end at once, all else together
        now = time.monotonic()
        is_time = now >= self._delivered + SECONDS_OF_PIECE * len(self._moved)
        due = {
            sequence: live for sequence, live in self._moved.items() if is_time or live.is_urgent
        }
        if not due:
            return
        if is_time:
            self._delivered = now

        # 3. their texts
        updates = []
        for sequence, live in due.items():
            del self._moved[sequence]
            update = live.update()
            self.stats.on_update(live, update)
            updates.append(update)
            if update.finish_reason or update.error:
                engine.retire(sequence)
                del self._live[sequence]
        self._call(self._deliver, updates)

    def _end_live(self, engine, error):
        """A step has raised: end all sequences. Raises the error where that happens repeatedly."""
        self._failed_steps += 1
        shown = shown_error(error)
        updates = []
        for sequence, live in self._live.items():
            engine.retire(sequence)
            updates.append(last_update(live.generation, shown))
        self._live.clear()
        self._moved.clear()
        self._call(self._deliver, updates)
        if self._failed_steps == FAILED_STEPS:
            raise error


def shown_error(error):
    """What the caller of a generation learns of an error. The log learns what is not for users."""
    if isinstance(error, UserError):
        return error
    lines = "".join(traceback.format_exception(error))
    logging.getLogger("uvicorn.error").error("the model failed\n%s", printable(lines))
    return StepFailed()


def last_update(generation, error):
    """The Update that ends a generation with an error."""
    return Update(generation, "", [], None, error, generation.counts, None)


class _Live:
    """A sequence of the engine, the generation that wants it, and what of it was sent already."""

    def __init__(self, engine, generation, sequence):
        self.generation, self.sequence = generation, sequence
        self.text = TextOfSequence(engine.tokenizer, sequence, generation.stop)
        self.wants_logprobs = generation.options.get("logprobs") is not None
        self.wants_prompt = generation.options.get("prompt_logprobs", False)
        self.lists_all = self.wants_prompt  # also tokens without a text
        self.token_bytes = engine.tokenizer.id_to_bytes
        self.sent_logprobs = 0      # tokens whose logprobs were sent
        self.began_bytes = 0        # bytes of the text of these tokens
        self.sent_bytes = 0         # bytes of the text that was sent
        self.seen_tokens = 0        # of ServingStats
        self.seen_at = generation.submitted

    @property
    def is_urgent(self):
        """Whether its client waits for what is new: the first token, or the end."""
        is_over = self.sequence.finish_reason is not None
        return is_over or self.text.completion_tokens == 0

    def update(self):
        """What is new since the last call, an Update."""
        text = self.text.read()
        # an answer that a stop text has ended is whole, whatever the tokens behind it met
        error = None if self.text.is_stopped else self.sequence.error
        finish_reason = "stop" if self.text.is_stopped else self.sequence.finish_reason
        finish_reason = None if error else finish_reason
        counts = (
            self.text.prompt_tokens,
            self.text.completion_tokens,
            self.sequence.cached_tokens,
        )
        logprobs = self._new_logprobs(text, finish_reason) if self.wants_logprobs else []
        return Update(
            self.generation, text, logprobs, finish_reason, error, counts, self._of_prompt())

    def _of_prompt(self):
        """The prompt's logprobs, once: as soon as they are there."""
        if not self.wants_prompt or not self.sequence.tokens:
            return None
        self.wants_prompt = False
        return self.sequence.prompt_logprobs

    def _new_logprobs(self, text, finish_reason):
        """The logprobs of the tokens of which the text that was sent has shown a part.

        Text may be held back, as it may begin a stop text; the logprobs of its tokens are held back
        with it. The token that ends an answer has no text, and is not listed, except behind a
        prompt that is scored: evaluation harnesses cut the list by the number of tokens. Those of a
        tool's reply are part of the text, so they are listed, as what they were: certain.
        """
        self.sent_bytes += len(text.encode("utf-8", "replace"))
        is_whole = finish_reason is not None and not self.text.is_stopped
        found = []
        start = self.sent_logprobs
        for entry, is_sampled in zip(self.sequence.logprobs[start:], self.sequence.sampled[start:]):
            if self.began_bytes >= self.sent_bytes and not is_whole:
                break
            self.sent_logprobs += 1
            self.began_bytes += len(self.token_bytes(entry.token))
            if self.lists_all or self.token_bytes(entry.token):
                found.append(entry if is_sampled else certain(entry))
        return found


def certain(entry):
    """The TokenLogprob of a token that was forced: the model had no choice, whatever it had taken.
    """
    top = [(entry.token, 0.0)] if entry.top else []
    return entry._replace(logprob=0.0, top=top)


# ------------------------------------------------------------------------------------------------
# several engines

class EnginePool:
    """One engine or several replicas, behind one bounded queue.

    loads         a load() for each engine
    max_queue     sequences that may wait besides those that run, for all engines together
    is_draining   whether new work is refused, as the server is about to end
    """

    def __init__(self, loads, max_queue, stats):
        self.engines = [
            AsyncEngine(load, stats, f"engine-{number}")
            for number, load in enumerate(loads)
        ]
        self.max_queue = max_queue
        self.is_draining = False

    def start(self, loop):
        """Start to load all engines."""
        for engine in self.engines:
            engine.start(loop)

    @property
    def state(self):
        """"dead" where one engine is, "loading" until all are ready, then "ready"."""
        states = {engine.state for engine in self.engines}
        return next(state for state in ("dead", "loading", "ready") if state in states)

    @property
    def error(self):
        """What ended an engine, or None."""
        return next((engine.error for engine in self.engines if engine.error), None)

    @property
    def in_flight(self):
        """Sequences that run or wait."""
        return sum(len(engine.generations) for engine in self.engines)

    @property
    def max_slots(self):
        """Sequences that run at a time, once the engines are ready."""
        return sum(engine.engine.max_slots for engine in self.engines)

    @property
    def capacity(self):
        """Sequences that may run or wait."""
        return self.max_slots + self.max_queue

    @property
    def context(self):
        """Tokens that a sequence may have, once an engine is ready."""
        return self.engines[0].engine.max_seq_len

    def is_hung(self, seconds):
        """Whether a step of one engine has been under way for longer than that."""
        return any(engine.is_hung(seconds) for engine in self.engines)

    def submit(self, generations):
        """Give generations of one request to the engine with the fewest; a Request.

        QueueFull where there are not places for all of them, EngineStopped for a server that ends.
        """
        if self.is_draining:
            raise EngineStopped("the server is shutting down")
        if self.in_flight + len(generations) > self.capacity:
            raise QueueFull
        least = min(self.engines, key=lambda engine: len(engine.generations))
        return least.submit(generations)

    def end_all(self, error):
        """End everything that is under way at once, with an error."""
        for engine in self.engines:
            engine.end_all(error)

    def stop(self):
        """Let the threads end."""
        for engine in self.engines:
            engine.stop()

    def join(self, seconds):
        """Wait for the threads' ends, so long at most in all."""
        deadline = time.monotonic() + seconds
        for engine in self.engines:
            engine.join(max(0, deadline - time.monotonic()))

    @property
    def is_running(self):
        """Whether a thread has not ended, one that compiles the decode step included."""
        engines = [engine.engine for engine in self.engines if engine.engine]
        compiles = any(engine.is_compiling for engine in engines)
        return compiles or any(engine.is_running for engine in self.engines)
