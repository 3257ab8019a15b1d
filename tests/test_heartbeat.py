"""The heartbeat: which endings of a rank end the others, what they say, and which do not."""
import contextlib
import socket
import sys
import threading
import time

import pytest
import torch

from nanochat import common, heartbeat
from nanochat.common import UserError, is_one_machine, require_alike
from nanochat.heartbeat import Heartbeat, Peer

LONG = 30.0  # seconds, after which a test gives up
NEVER = 3600.0


class Group:
    """Rank 0, whose connections to the others are here, in one process and on fast beats.

    said: the lines with which a rank's process would have ended, by rank.
    """

    def __init__(self, watched=(), beat_seconds=0.05, grace_seconds=NEVER):
        self.said = {}
        self.ended = threading.Condition()
        self.settings = {"beat_seconds": beat_seconds, "grace_seconds": grace_seconds}
        self.others = {}   # the ends of ranks without a heartbeat
        self.ranks = {}
        peers = []
        for rank in (1, 2, 3):
            here, there = socket.socketpair()
            peers.append(Peer(here, f"rank {rank}"))
            self.others[rank] = there
            if rank in watched:
                self.ranks[rank] = self.heartbeat(rank, [Peer(there, "rank 0")])
        self.ranks[0] = self.heartbeat(0, peers)

    def heartbeat(self, rank, peers):
        return Heartbeat(peers, lambda line: self.end(rank, line), **self.settings)

    def end(self, rank, line):
        with self.ended:
            self.said.setdefault(rank, line)
            self.ended.notify_all()

    def line_of(self, rank):
        """The line with which a rank ends."""
        with self.ended:
            assert self.ended.wait_for(lambda: rank in self.said, LONG), self.said
            return self.said[rank]


@contextlib.contextmanager
def beating(*connections):
    """Other ranks that do nothing but beat."""
    done = threading.Event()

    def beat():
        while not done.wait(0.02):
            for connection in connections:
                connection.sendall(b"beat\n")

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    done.set()
    thread.join()


# docs/traps.md: dead-rank
def test_a_connection_that_closes_without_a_farewell_is_a_death_with_a_name():
    group = Group(watched=(1, 2))
    group.others[3].close()
    for rank in (0, 1, 2):
        assert group.line_of(rank).startswith("rank 3 has died: "), "rank 0 tells the others"
        assert "--resume" in group.line_of(rank) and "\n" not in group.line_of(rank)


def test_the_death_of_rank_0_is_seen_by_every_other_rank():
    group = Group()
    here, there = socket.socketpair()
    group.ranks[4] = group.heartbeat(4, [Peer(here, "rank 0")])
    there.close()
    assert group.line_of(4).startswith("rank 0 has died: ")


def test_a_rank_that_is_not_heard_is_dead_after_some_beats_and_one_that_beats_is_not():
    group = Group(beat_seconds=0.2)
    with beating(group.others[1], group.others[3]):
        line = group.line_of(0)
    assert line.startswith("rank 2 has not been heard for ")


def test_silence_is_counted_in_beats_so_that_ranks_that_were_all_stopped_may_continue():
    """A clock would have seen a silence that was everybody's."""
    here, _there = socket.socketpair()
    peer = Peer(here, "rank 1")
    said = []
    rank = Heartbeat([peer], said.append, beat_seconds=NEVER)
    while peer.unheard == 0:
        time.sleep(0.01)  # the first beat
    for _ in range(heartbeat.MISSED_BEATS - 1):
        rank._beat()
    assert not said
    rank._beat()
    assert len(said) == 1


@pytest.mark.parametrize("first", [0, 1])
def test_who_says_goodbye_is_not_missed_whichever_rank_is_the_first_to_end(monkeypatch, first):
    monkeypatch.setattr(heartbeat, "LEAVE_SECONDS", LONG)
    group = Group(watched=(1, 2, 3))
    order = [first, *(rank for rank in range(4) if rank != first)]
    for rank in order:
        group.ranks[rank].leave()
        assert not group.ranks[rank].thread.is_alive(), "every connection was closed"
    assert group.said == {}


def test_a_rank_that_failed_by_itself_ends_the_others_after_they_had_time_to_fail_likewise():
    group = Group(watched=(1, 2, 3), grace_seconds=0.5)
    group.ranks[2].leave("the text\nis damaged")
    assert group.line_of(0).startswith("rank 2 has failed: the text is damaged: ")
    assert group.line_of(1) == group.line_of(0)


def test_an_error_that_all_ranks_have_names_none_of_them():
    group = Group(watched=(1, 2, 3))
    for rank in (2, 0, 1, 3):
        group.ranks[rank].leave("no such file")
    group.ranks[0]._judge_failure(now=2 * time.monotonic() + NEVER)
    assert group.said == {}


def test_a_collective_that_fails_does_not_wait_for_the_time_of_grace():
    group = Group(watched=(1, 2, 3))
    group.ranks[3].leave("ValueError: a bug")
    group.ranks[1].explain(seconds=0.1)
    assert group.line_of(1).startswith("rank 3 has failed: ValueError: a bug: ")
    assert group.line_of(0) == group.line_of(1)


def test_only_an_error_of_a_connection_waits_for_the_name_of_a_dead_rank(monkeypatch):
    asked = []

    class Asked:
        def explain(self):
            asked.append(self)

    monkeypatch.setattr(heartbeat, "RUNNING", [Asked()])
    errors = [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"),
        RuntimeError("shape '[2, 3]' is invalid for input of size 7"),
        RuntimeError("out of memory"),
        ValueError("NCCL"),
    ]
    counts = []
    for error in errors:
        heartbeat.explain(error)
        counts.append(len(asked))
    assert counts == [1, 2, 2, 2, 2]


def test_the_ranks_find_each_other_and_a_stranger_is_not_let_in():
    listener, host = heartbeat.listen(True, ("127.0.0.1", 29500))
    address = host, listener.getsockname()[1]
    stranger = heartbeat.connect(address, "guess", 1, "rank 0", LONG)
    connections = []
    for rank in (2, 1):
        connections.append(heartbeat.connect(address, "token", rank, "rank 0", LONG))
    with listener:
        peers = heartbeat.accept_peers(listener, 3, "token", LONG)
    assert sorted(peers) == [1, 2]
    assert peers[2].name == heartbeat.own_name(2)
    assert stranger.receive() is None, "the connection was closed"


def test_a_stranger_who_never_ends_his_line_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(heartbeat, "HELLO_SECONDS", 0.3)
    listener, host = heartbeat.listen(True, ("127.0.0.1", 29500))
    address = host, listener.getsockname()[1]
    stranger = socket.create_connection(address)
    done = threading.Event()

    def send_slowly():
        with contextlib.suppress(OSError):
            while not done.wait(0.05):
                stranger.sendall(b"x")

    thread = threading.Thread(target=send_slowly)
    thread.start()
    _rank = heartbeat.connect(address, "token", 1, "rank 0", LONG)
    with listener:
        assert list(heartbeat.accept_peers(listener, 2, "token", LONG)) == [1]
    done.set()
    thread.join()


def test_a_rank_that_does_not_connect_is_not_waited_for_without_end():
    listener, _ = heartbeat.listen(True, ("127.0.0.1", 29500))
    with listener:
        assert heartbeat.accept_peers(listener, 2, "token", 0.2) == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_this_machine_is_named_as_the_others_know_it(host):
    assert heartbeat.own_address((host, 29500)) == host


# ------------------------------------------------------------------------------------------------
# joining

class FakeStore(dict):
    """A dist.Store in this process."""

    def set(self, key, value):
        self[key] = value.encode("utf-8")

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def set_timeout(self, timeout):
        self.timeout = timeout


# docs/traps.md: dead-rank
def test_ranks_wait_for_each_other_before_they_join():
    store = FakeStore()
    others = [threading.Thread(target=heartbeat.gather, args=(store, rank, 3)) for rank in (1, 2)]
    for other in others:
        other.start()
    heartbeat.gather(store, 0, 3, LONG)
    for other in others:
        other.join()
    assert store["rank 2"].decode("utf-8") == heartbeat.own_name(2)


def test_ranks_that_do_not_come_are_named_after_a_while():
    store = FakeStore({"rank 2": b""})
    with pytest.raises(TimeoutError, match="^rank 1, 3 of 4 did not come within 0.2 s: .*again"):
        heartbeat.gather(store, 0, 4, seconds=0.2)


def test_a_rank_that_fails_before_it_has_joined_tells_those_that_wait(monkeypatch):
    store = FakeStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    heartbeat.give_up("no\nGPU here")
    with pytest.raises(TimeoutError, match=r"^rank 1 \(host .*\) has failed: no GPU here: "):
        heartbeat.gather(store, 0, 2, LONG)


def test_without_the_store_there_is_nobody_to_wait_for(monkeypatch):
    def gone(*_, **__):
        raise RuntimeError("Connection was likely closed")

    store = FakeStore()
    store.check = gone
    with pytest.raises(TimeoutError, match="^the torchrun at which the ranks meet has ended: "):
        heartbeat.gather(store, 0, 2, LONG)
    monkeypatch.setattr(torch.distributed, "rendezvous", gone)
    heartbeat.give_up("no GPU here")  # says nothing, and raises nothing


@pytest.mark.parametrize("by_torchrun, wanted", [("True", ["a reason"]), ("", [])])
def test_an_error_is_told_to_the_others_where_torchrun_has_a_store(
        monkeypatch, by_torchrun, wanted):
    said = []
    monkeypatch.delitem(sys.modules, "nanochat.heartbeat")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", by_torchrun)
    monkeypatch.setattr(heartbeat, "give_up", said.append)
    common._tell_other_ranks("a reason")
    assert said == wanted

RANK = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("device, backend", [("cuda:1", "nccl"), ("cpu", "gloo")])
def test_a_rank_joins_with_its_device_and_more_time_than_a_save_takes(
        monkeypatch, device, backend):
    joined, watched = [], []
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        torch.distributed, "init_process_group",
        lambda name, **options: joined.append({"backend": name, **options}))
    monkeypatch.setattr(heartbeat, "start", lambda *arguments: watched.append(arguments))
    stores = iter([(FakeStore(), 3, 4)])
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: stores)
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(
        heartbeat, "gather", lambda store, *ranks: watched.append((store.timeout, *ranks)))
    common._join_process_group(torch.device(device))
    [options] = joined
    assert options["backend"] == backend
    assert options["device_id"] == (torch.device(device) if backend == "nccl" else None)
    assert options["timeout"].total_seconds() > 60 * 30, "the watchdog of a step ends earlier"
    assert (options["rank"], options["world_size"]) == (3, 4)
    assert watched == [(options["timeout"], 3, 4), (3, 4, False, ("gpu1", 29500))]


def test_ranks_are_on_one_machine_where_torchrun_says_so(monkeypatch):
    assert is_one_machine()
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    assert not is_one_machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert is_one_machine()


def test_what_must_be_alike_is_compared_among_the_ranks(monkeypatch):
    require_alike("the run", "d4", "look")
    theirs = []

    def reduced(*numbers):
        theirs.append(numbers)
        return [max(pair) for pair in zip(*theirs)]

    monkeypatch.setattr(common, "all_reduce_max", reduced)
    require_alike("the run", ("d4", 3), "look")
    require_alike("the run", ("d4", 3), "look")
    with pytest.raises(UserError, match="the ranks differ in the run, rank 0 has .*'d5'.*: look"):
        require_alike("the run", ("d5", 3), "look")
