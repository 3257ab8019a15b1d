"""The thread that owns the engine, and the event loop's view of it."""
import asyncio
import itertools
import time

import pytest
from chat_fakes import FakeEngine, fake_pool, wait_until

from nanochat import async_engine
from nanochat.async_engine import EngineStopped, Generation, QueueFull, StepFailed
from nanochat.common import UserError
from nanochat.serving_stats import ServingStats


def generation(prompt=(1, 2), **options):
    return Generation(list(prompt), {"max_new_tokens": 100, **options})


def played(*engines, max_queue=100, stats=None):
    """A decorator's work: run a coroutine function of a pool to its end, and stop the pool."""
    def run(scenario):
        async def main():
            pool = fake_pool(*engines, max_queue=max_queue, stats=stats)
            pool.start(asyncio.get_running_loop())
            while pool.state == "loading":
                await asyncio.sleep(0.001)
            try:
                await asyncio.wait_for(scenario(pool), 30)
            finally:
                for engine in engines:
                    if hasattr(engine, "gate"):
                        engine.gate.set()
                pool.stop()
                await asyncio.to_thread(pool.join, 10)
            assert not pool.is_running
        asyncio.run(main())
    return run


async def text_of(request):
    await request.finished()
    return [one.take()[0] for one in request.generations]


def test_a_sequence_that_comes_later_joins_the_steps_of_the_others():
    engine = FakeEngine(["a", "b", "c"])
    engine.delay = 0.01

    @played(engine)
    async def scenario(pool):
        first = pool.submit([generation()])
        await first.admitted()
        second = pool.submit([generation(), generation()])
        assert await text_of(first) == ["abc"] and await text_of(second) == ["abc"] * 2
        assert engine.most_running == 3 and engine.steps < 9
        assert pool.in_flight == 0


def test_what_a_step_brings_to_all_sequences_comes_in_one_callback():
    engine = FakeEngine(["a"] * 20, max_slots=8)

    @played(engine)
    async def scenario(pool):
        loop, callbacks = asyncio.get_running_loop(), []
        original = loop.call_soon_threadsafe

        def counted(function, *arguments):
            callbacks.append(function)
            return original(function, *arguments)

        engine.gate.clear()
        request = pool.submit([generation() for _ in range(8)])
        await request.admitted()
        loop.call_soon_threadsafe = counted
        try:
            engine.gate.set()
            await request.finished()
        finally:
            loop.call_soon_threadsafe = original
        assert len(callbacks) <= engine.steps <= 22


def test_between_the_first_token_and_the_end_tokens_travel_together(monkeypatch):
    """What is not due yet waits: for its time, which never comes here, or for the end."""
    engine = FakeEngine(["a", "b", "c", "d"])
    monkeypatch.setattr(async_engine, "SECONDS_OF_PIECE", 1e9)

    @played(engine)
    async def scenario(pool):
        requests = [pool.submit([generation()]) for _ in range(3)]
        for request in requests:
            pieces = [one.take()[0] async for _, one in request.moves()]
            assert [piece for piece in pieces if piece] in (["a", "bcd"], ["abcd"])
        assert engine.steps < 12
        monkeypatch.setattr(async_engine, "SECONDS_OF_PIECE", 0)
        engine.delay = 0.01
        pieces = [one.take()[0] async for _, one in pool.submit([generation()]).moves()]
        assert [piece for piece in pieces if piece] == ["a", "b", "c", "d"]


def test_pieces_wait_for_those_that_are_sent_and_not_for_the_queue(monkeypatch):
    """With one slot, the sequences that wait for it do not delay the one that runs."""
    ticks = itertools.count()       # half a second passes whenever somebody asks for the time

    class Clock:
        @staticmethod
        def monotonic():
            return 0.5 * next(ticks)

    engine = FakeEngine(["a", "b", "c", "d"], max_slots=1)
    monkeypatch.setattr(async_engine, "time", Clock)
    monkeypatch.setattr(async_engine, "SECONDS_OF_PIECE", 0.9)      # a step asks twice

    @played(engine)
    async def scenario(pool):
        [owner] = pool.engines
        texts = []
        deliver = owner._deliver

        def noted(updates):
            texts.extend(update.text for update in updates if update.text)
            deliver(updates)

        owner._deliver = noted
        await pool.submit([generation() for _ in range(9)]).finished()
        assert texts == ["a", "b", "c", "d"] * 9


def test_a_stop_text_ends_an_answer_whatever_comes_behind_it(monkeypatch):
    """The engine may be some tokens ahead of the text: they, and their error, do not count."""
    monkeypatch.setattr(async_engine, "SECONDS_OF_PIECE", 1e9)
    engine = FakeEngine(["a", "b", "c", "d", UserError("not finite")])

    @played(engine)
    async def scenario(pool):
        one = Generation([1, 2], {"max_new_tokens": 100}, stop=["bc"])
        await pool.submit([one]).finished()
        assert one.take()[0] == "a" and one.finish_reason == "stop"
        assert one.counts[:2] == (2, 3), "the tokens up to the end of the stop text"


def test_a_slow_reader_finds_the_pieces_joined():
    engine = FakeEngine(["x"] * 90)

    @played(engine)
    async def scenario(pool):
        request = pool.submit([generation()])
        await request.finished()
        pieces = [one.take()[0] async for _, one in request.moves()]
        assert pieces == ["x" * 90], "as much memory as the answer, however slow the reader"


def test_a_cancelled_sequence_is_retired_within_a_step_wherever_it_is():
    engine = FakeEngine(["word "] * 10**6, max_slots=1)

    @played(engine)
    async def scenario(pool):
        running, waiting = pool.submit([generation()]), pool.submit([generation()])
        await waiting.admitted()
        waiting.cancel()
        running.cancel()
        running.cancel()    # harmless
        await running.finished()
        await waiting.finished()
        assert engine.running == [] and pool.in_flight == 0
        assert running.generations[0].finish_reason is None
        never_admitted = pool.submit([generation()])
        never_admitted.cancel()
        await never_admitted.finished()
        wait_until(lambda: not engine.running)


def test_a_full_queue_refuses_and_takes_more_when_there_is_room():
    engine = FakeEngine(["a"], max_slots=1)

    @played(engine, max_queue=2)
    async def scenario(pool):
        engine.gate.clear()
        requests = [pool.submit([generation()]) for _ in range(3)]
        with pytest.raises(QueueFull):
            pool.submit([generation()])
        engine.gate.set()
        for request in requests:
            await request.finished()
        await pool.submit([generation()]).finished()
        with pytest.raises(QueueFull):
            pool.submit([generation() for _ in range(4)])


def test_an_error_of_one_sequence_ends_it_alone():
    engine = FakeEngine(["a", "b"])

    @played(engine)
    async def scenario(pool):
        good = pool.submit([generation()])
        bad = pool.submit([generation([7] * 300)])      # longer than the context
        with pytest.raises(UserError, match="too long"):
            await bad.admitted()
        assert await text_of(good) == ["ab"]


def test_a_step_that_raises_ends_all_its_sequences_and_later_ones_are_served(caplog):
    engine = FakeEngine(["a", RuntimeError("out of memory")])

    @played(engine)
    async def scenario(pool):
        requests = [pool.submit([generation()]) for _ in range(2)]
        for request in requests:
            with pytest.raises(StepFailed):
                await request.finished()
        assert engine.running == [] and pool.in_flight == 0
        engine.pieces = ["fine"]
        assert await text_of(pool.submit([generation()])) == ["fine"]
    assert "out of memory" in caplog.text


def test_an_engine_whose_steps_always_raise_is_given_up():
    engine = FakeEngine([RuntimeError("broken")])

    @played(engine)
    async def scenario(pool):
        for _ in range(3):
            with pytest.raises(UserError):
                await pool.submit([generation()]).finished()
        while pool.state != "dead":
            await asyncio.sleep(0.001)
        with pytest.raises(EngineStopped):
            pool.submit([generation()])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exception_that_ends_the_thread_ends_every_sequence(error):
    engine = FakeEngine(["a", error])

    @played(engine)
    async def scenario(pool):
        request = pool.submit([generation(), generation()])
        with pytest.raises(EngineStopped):
            await request.finished()
        assert pool.state == "dead" and pool.error is error and pool.in_flight == 0


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_pool():
    def load():
        raise UserError("there is no checkpoint")

    @played(load)
    async def scenario(pool):
        assert pool.state == "dead" and str(pool.error) == "there is no checkpoint"


def test_a_step_that_does_not_end_is_noticed_and_its_sequences_can_be_ended():
    engine = FakeEngine(["a"])

    @played(engine)
    async def scenario(pool):
        assert not pool.is_hung(0.01)
        engine.gate.clear()
        request = pool.submit([generation()])
        await request.admitted()
        began = time.monotonic()
        while not pool.is_hung(0.01):
            assert time.monotonic() < began + 30
            await asyncio.sleep(0.005)
        pool.end_all(EngineStopped("the server is shutting down"))
        with pytest.raises(EngineStopped, match="shutting down"):
            await request.finished()


def test_the_engine_with_the_fewest_sequences_is_chosen():
    one, two = FakeEngine(["a"]), FakeEngine(["a"])

    @played(one, two)
    async def scenario(pool):
        one.gate.clear()
        two.gate.clear()
        requests = [pool.submit([generation()]) for _ in range(6)]
        assert [len(engine.generations) for engine in pool.engines] == [3, 3]
        one.gate.set()
        two.gate.set()
        for request in requests:
            await request.finished()
        assert len(one.calls) == len(two.calls) == 3


def test_a_pool_that_drains_takes_nothing_new_and_ends_what_it_has():
    engine = FakeEngine(["a", "b"])

    @played(engine)
    async def scenario(pool):
        request = pool.submit([generation()])
        pool.is_draining = True
        with pytest.raises(EngineStopped):
            pool.submit([generation()])
        assert await text_of(request) == ["ab"]


def test_tokens_and_times_are_counted():
    stats = ServingStats()

    @played(FakeEngine(["a", "b", "c"]), stats=stats)
    async def scenario(pool):
        await pool.submit([generation(), generation()]).finished()

    assert stats.generated_tokens == 6 and stats.prompt_tokens == 4
    assert sum(stats.first_token.counts) == 2 and sum(stats.between.counts) == 4


def test_a_histogram_counts_what_is_at_most_each_bound():
    stats = ServingStats()
    stats.first_token.observe(0.005)
    stats.first_token.observe(1000)
    lines = list(stats.first_token.lines("t"))
    assert lines[0] == 't_bucket{le="0.005"} 1' and lines[-1] == "t_count 2"
    assert lines[-3] == 't_bucket{le="+Inf"} 2' and lines[-2] == "t_sum 1000.005000"
