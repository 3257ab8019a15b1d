"""Notices that a rank has died, says which one, and ends the others.

A rank may be killed (the kernel's out-of-memory killer, a batch system), be stopped, or lose its
machine. The others then wait in a collective: on gloo they fail at once with a message that names a
port, on NCCL they wait until its watchdog gives up. So every rank has a thread here, and
connections apart from those of torch:

1. Rank 0 listens, the address goes to all ranks by a broadcast, and each of them connects.
2. Over each connection both ends send a line every few seconds.
3. Whoever ends says so first. A connection that closes without a farewell, or over which nothing
   comes any more, means that the rank at its other end has died.
4. Rank 0 tells the others which rank that was. Where it is rank 0, all of them see it themselves.
   Each process prints one line and ends with status 1.

The kernel closes the connections of a process that is killed, so that the others know at once. A
rank that is stopped, or whose machine is gone, is not heard any more: that takes MISSED_BEATS.
Beats come from a thread, so that they do not stop during a long compilation, evaluation or save.
What could stop them is a call that keeps Python's lock for all that time.

Why not torch's TCPStore: it does not say who has left, and ends together with the torchrun that
holds it, before the ranks of other machines could read there what has happened.
"""
import atexit
import contextlib
import datetime
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time

import torch.distributed as dist

BEAT_SECONDS = 3.0
MISSED_BEATS = 12       # of our own without one of the other's: 36 s
# A rank that ends with an error of its own: the others may be about to end with the same one.
GRACE_SECONDS = 20.0
TELL_SECONDS = 1.0      # that rank 0 leaves the others to read what it has sent, before it ends
EXPLAIN_SECONDS = 15.0  # that a failed collective waits for the name of a dead rank
GATHER_SECONDS = 180.0  # from the first rank that is there to the last, when they start
CONNECT_SECONDS = 60.0  # for all ranks to connect
HELLO_SECONDS = 2.0     # for the line with which a rank begins; nobody else may hold up the start
HELLO_BYTES = 1000
STORE_TIMEOUT = datetime.timedelta(seconds=10)
FAILED = "failed"       # the store's key under which a rank says why it does not come
LEAVE_SECONDS = 5.0     # that a farewell waits for the other end to close
REASON_CHARS = 300

REMEDY = "the other ranks end, too; the same command with --resume resumes a training run"

# What gloo, NCCL and torch's stores say where the other end of a connection is gone
LOST_CONNECTION = re.compile(
    r"gloo|NCCL|by peer|Broken pipe|Connection (?:closed|reset|refused)|Socket", re.IGNORECASE)

RUNNING = []  # the Heartbeat of this process, while it is one of several ranks


class Peer:
    """The connection to another rank.

    name: "rank 3 (host gpu2, pid 123)". unheard: beats of ours since it was last heard.
    """

    def __init__(self, connection, name):
        self.connection = connection
        self.name = name
        self.unheard = 0
        self.rest = b""  # of a line that has not come whole

    def send(self, line):
        with contextlib.suppress(OSError):  # receive() will say that the other end is gone
            self.connection.sendall(line.encode("utf-8") + b"\n")

    def receive(self):
        """The lines that have come, or None where the other end has closed. Waits for neither."""
        try:
            data = self.connection.recv(4096)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.unheard = 0
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]


class Heartbeat:
    """The thread of one rank that watches its peers: rank 0 all others, the others rank 0.

    end: called with one line when a rank has died; it must end the process.
    """

    def __init__(self, peers, end=None, beat_seconds=BEAT_SECONDS, grace_seconds=GRACE_SECONDS):
        self.peers = list(peers)
        self.end = end or self._end_process
        self.beat_seconds = beat_seconds
        self.grace_seconds = grace_seconds
        self.process = os.getpid()
        self.leaving = False      # this rank has said farewell: the others may close
        self.suspicious = False   # a collective has failed: some rank must have died
        self.failure = None       # (when to end, the line), of a rank that has failed by itself
        self.selector = selectors.DefaultSelector()
        for peer in self.peers:
            self.selector.register(peer.connection, selectors.EVENT_READ, peer)
        self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------------ called by the main thread

    def leave(self, failure=""):
        """Say farewell to the others, and wait a moment until they have heard it.

        failure: why this rank cannot continue; "" where it is done.
        """
        # a process that was forked from a rank is none
        if self.leaving or os.getpid() != self.process:
            return
        self.leaving = True
        words = " ".join(failure.split())[:REASON_CHARS]
        for peer in list(self.peers):
            peer.send(f"failed {words}" if failure else "goodbye")
        self.thread.join(LEAVE_SECONDS)

    def explain(self, seconds=EXPLAIN_SECONDS):
        """A collective has failed: wait for the name of the rank that has died.

        Where one has, the process ends meanwhile; where this returns, none has.
        """
        if self.leaving or os.getpid() != self.process:
            return
        self.suspicious = True
        for peer in list(self.peers):
            peer.send("suspicious")
        self.thread.join(seconds)

    # ------------------------------------------------------------------ the thread

    def _watch(self):
        next_beat = time.monotonic()
        while self.peers or self.failure:
            now = time.monotonic()
            if now >= next_beat:
                self._beat()
                next_beat = now + self.beat_seconds
            self._judge_failure(now)
            for key, _ in self.selector.select(max(0.0, next_beat - now)):
                self._read(key.data)

    def _beat(self):
        for peer in list(self.peers):
            peer.send("beat")
            peer.unheard += 1
            # counted in beats of our own: where all ranks were stopped together and continue, no
            # time has passed
            if peer.unheard > MISSED_BEATS:
                seconds = MISSED_BEATS * self.beat_seconds
                self._lost(peer, f"{peer.name} has not been heard for {seconds:.0f} s, it is "
                                 "stopped or its machine cannot be reached")

    def _read(self, peer):
        lines = peer.receive()
        if lines is None:
            self._lost(peer, f"{peer.name} has died")
            return
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "goodbye":
                self._forget(peer)
            elif word == "failed":
                self._forget(peer)
                deadline = time.monotonic() + self.grace_seconds
                self.failure = self.failure or (deadline, f"{peer.name} has failed: {rest}")
            elif word == "suspicious":
                self.suspicious = True
            elif word == "dead" and not self.leaving:
                self.end(rest)

    def _judge_failure(self, now):
        """End after a rank that has failed by itself, once this rank had the time to do as much."""
        if self.failure is None:
            return
        deadline, line = self.failure
        if self.leaving:
            self.failure = None
        elif self.suspicious or now >= deadline:
            self.failure = None
            self._tell(line)

    def _lost(self, peer, line):
        self._forget(peer)
        if not self.leaving:
            self._tell(line)

    def _forget(self, peer):
        if peer in self.peers:
            self.peers.remove(peer)
            self.selector.unregister(peer.connection)
            peer.connection.close()

    def _tell(self, what):
        """End, on rank 0 after the others have been told why."""
        line = f"{what}: {REMEDY}"
        for peer in self.peers:
            peer.send(f"dead {line}")
        self.end(line)

    def _end_process(self, line):
        """The main thread may wait for ever, so the process ends here; files are written whole or
        not at all (common.atomic_file)."""
        os.write(sys.__stderr__.fileno(), f"error: {line}\n".encode())
        if self.peers:
            time.sleep(TELL_SECONDS)
        os._exit(1)


# --------------------------------------------------------------------------------------------------
# meeting, before there is a process group

def own_name(rank):
    return f"rank {rank} (host {socket.gethostname()}, pid {os.getpid()})"


def gather(store, rank, ranks, seconds=GATHER_SECONDS):
    """Wait until all ranks are there. store: the dist.Store in which torchrun lets them meet.

    Joining a process group waits as long as a collective may take, which is hours: also for a rank
    that has ended before it could join, and whose torchrun on another machine nobody here hears.
    TimeoutError, one line, that names a rank which has failed, or those that have not come.
    """
    deadline = time.monotonic() + seconds
    missing = list(range(ranks))
    try:
        store.set(f"rank {rank}", own_name(rank))
        while missing and time.monotonic() < deadline:
            if store.check([FAILED]):
                raise TimeoutError(f"{store.get(FAILED).decode('utf-8')}: {REMEDY}")
            missing = [other for other in missing if not store.check([f"rank {other}"])]
            time.sleep(0.1 if missing else 0)
    except RuntimeError as error:  # that of the store
        raise TimeoutError(
            "the torchrun at which the ranks meet has ended: see what it says, on its machine, and "
            "give the command again on all") from error
    if missing:
        names = ", ".join(map(str, missing))
        raise TimeoutError(
            f"rank {names} of {ranks} did not come within {seconds:g} s: see what it says, on its "
            "machine, and give the command again on all")


def give_up(failure):
    """Tell the ranks that wait in gather() why this one, which has not joined, cannot come."""
    with contextlib.suppress(RuntimeError):  # there is no store any more
        store, rank, _ = next(dist.rendezvous("env://", timeout=STORE_TIMEOUT))
        words = " ".join(failure.split())[:REASON_CHARS]
        store.set(FAILED, f"{own_name(rank)} has failed: {words}")


# --------------------------------------------------------------------------------------------------
# connecting

def own_address(master):
    """The address at which other machines find this one. master: (host, port) of torchrun's store.

    It is the one from which the store is reached. Where that is a loopback address, the store is on
    this machine, and its host is a name that the others know.
    """
    host, port = master
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[4])  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return host
    is_loopback = address.startswith("127.") or address == "::1"
    return host if is_loopback else address


def listen(is_one_machine, master):
    """(listening socket, the host that others connect to) of rank 0."""
    if is_one_machine:
        return socket.create_server(("127.0.0.1", 0)), "127.0.0.1"
    host = own_address(master)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(("", 0), family=family), host


def accept_peers(listener, ranks, token, seconds):
    """{rank: Peer} of those that have connected within some seconds.

    A rank begins with a line: the token, its number and its name.
    """
    peers = {}
    deadline = time.monotonic() + seconds
    while len(peers) < ranks - 1 and time.monotonic() < deadline:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except OSError:  # nobody came
            continue
        said, _, rest = read_hello(connection).partition(" ")
        rank, _, name = rest.partition(" ")
        if secrets.compare_digest(said.encode(), token.encode()) and rank.isdecimal():
            connection.settimeout(5.0)
            peers[int(rank)] = Peer(connection, name)
        else:
            connection.close()
    return peers


def read_hello(connection):
    """The line with which whoever has connected begins, or what has come of it in time."""
    deadline = time.monotonic() + HELLO_SECONDS
    hello = b""
    with contextlib.suppress(OSError):
        while len(hello) < HELLO_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)  # what follows the line is for receive()
            if byte in (b"", b"\n") or time.monotonic() > deadline:
                break
            hello += byte
    return hello.decode("utf-8", errors="replace")


def connect(address, token, rank, name_of_first, seconds):
    """The Peer of rank 0, from any other rank. OSError where it cannot be reached."""
    connection = socket.create_connection(address, timeout=seconds)
    connection.settimeout(5.0)
    peer = Peer(connection, name_of_first)
    peer.send(f"{token} {rank} {own_name(rank)}")
    return peer


def start(rank, ranks, is_one_machine, master):
    """Begin to watch the other ranks. Every rank calls it, once it has joined the process group.

    is_one_machine: whether all ranks are on this one. master: (host, port) of torchrun's store.
    A rank that cannot connect is not watched, and a warning says so.
    """
    # 1) rank 0 listens, and all learn where
    invitation = [None]
    if rank == 0:
        listener, host = listen(is_one_machine, master)
        port = listener.getsockname()[1]
        invitation = [(host, port, secrets.token_hex(16), own_name(0))]
    dist.broadcast_object_list(invitation, src=0)
    host, port, token, name_of_first = invitation[0]

    # 2) the connections
    peers = []
    if rank == 0:
        with listener:
            found = accept_peers(listener, ranks, token, CONNECT_SECONDS)
        peers = list(found.values())
        missing = [str(other) for other in range(1, ranks) if other not in found]
        if missing:
            warn(f"rank {', '.join(missing)} did not connect to {host}:{port}")
    else:
        try:
            peers = [connect((host, port), token, rank, name_of_first, CONNECT_SECONDS)]
        except OSError as error:
            warn(f"rank {rank} cannot connect to {host}:{port} ({error.strerror or error})")

    # 3) the thread, and a farewell however the process ends
    RUNNING.append(Heartbeat(peers))
    atexit.register(leave, "it has ended before the others")


def warn(problem):
    print(f"warning: {problem}: where a rank dies, the others may not notice it", file=sys.stderr,
          flush=True)


# --------------------------------------------------------------------------------------------------
# what the process tells its heartbeat, where it has one

def leave(failure=""):
    """Say farewell to the other ranks. failure: why this one cannot continue; "": it is done."""
    while RUNNING:
        RUNNING.pop().leave(failure)


def explain(error):
    """Where an exception comes from a rank that has died, end the process with the rank's name."""
    text = f"{type(error).__name__}: {error}"
    if RUNNING and isinstance(error, RuntimeError) and LOST_CONNECTION.search(text):
        RUNNING[-1].explain()
