"""What runs inside the sandbox: the processes that confine themselves, then run a program.

nanochat/sandbox.py starts this file in a bare interpreter. One job is a tree of processes:

    supervisor      enters the namespaces, gives up root
      init          the first process in the namespace: when it ends, all others in it are killed
        candidate   runs the program; where there are tests, it answers calls of its functions
        checker     where there are tests: runs them, and has the candidate called by proxy

The verdict is the checker's word to the parent, over a pipe that the candidate does not have. What
the candidate does to its own process (patches of builtins, an early exit, a look at frames and
garbage) happens where neither the tests nor the verdict are: the two processes exchange plain data
and nothing else. The candidate is forked from a process that has read no tests.

A request or an answer is a frame: the length as 4 bytes, then JSON.
"""
import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
import time

from nanochat.confinement import (
    ConfinementError,
    confine_process,
    confine_session,
    die_with_parent,
    readable_paths,
)

FRAME_BYTES = 8 << 20           # the longest frame that the checker reads
REASON_CHARS = 1000             # of a verdict
EXACT_INTEGER = 1 << 53         # larger ones travel in hexadecimal: no limit of digits applies
FIRST_FD = 3                    # behind standard input, output and error
HIGH_FD = 32                    # above those, below the limit of open files
ALL_FDS = 1 << 16
ENDING_SECONDS = 1.0            # for a candidate to end by itself when the checker has

# --------------------------------------------------------------------------------------------------
# plain data

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value):
    """Plain data as what JSON has: containers become [kind, items]. TypeError for any other value.

    An object of a subclass, such as a Counter, becomes one of the plain class.

    >>> encode((1, {2: b"x"}))
    ['tuple', [1, ['dict', [[2, ['bytes', '78']]]]]]
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < EXACT_INTEGER else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    for kind, container in CONTAINERS.items():
        if isinstance(value, container):
            return [kind, [encode(item) for item in value]]
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(data):
    """The inverse of encode(). ValueError or TypeError for what encode() does not make."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no kind of plain data")
        return data
    kind, items = data
    if kind == "int":
        return int(items, 16)
    if kind == "complex":
        return complex(*items)
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind not in CONTAINERS:
        raise ValueError(f"{kind!r} is no kind of plain data")
    return CONTAINERS[kind](decode(item) for item in items)


def write_frame(file, data):
    text = json.dumps(data).encode("ascii")
    file.write(struct.pack("!I", len(text)) + text)
    file.flush()


def read_frame(file):
    """The next frame's data. EOFError at the end, ValueError for a frame that is too long."""
    head = file.read(4)
    if len(head) < 4:
        raise EOFError
    length = struct.unpack("!I", head)[0]
    if length > FRAME_BYTES:
        raise ValueError(f"an answer of {length:,} bytes, at most {FRAME_BYTES:,}")
    text = file.read(length)
    if len(text) < length:
        raise EOFError
    return json.loads(text)


# --------------------------------------------------------------------------------------------------
# the candidate


def _keep_open(*kept):
    """Close every file but the standard ones and `kept`, which become 3, 4, ...; their numbers."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH_FD) for fd in kept]
    numbers = range(FIRST_FD, FIRST_FD + len(high))
    for fd, number in zip(high, numbers):
        os.dup2(fd, number, inheritable=False)
    os.closerange(FIRST_FD + len(high), ALL_FDS)
    return list(numbers)


def _read_all(fd):
    """The bytes of a file from its beginning; the file is closed."""
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()


def _execute(source, filename, namespace):
    """Run source text, as bytes, in a namespace. An exception prints its traceback and exits."""
    import linecache
    try:
        text = source.decode("utf-8")
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        exec(compile(text, filename, "exec"), namespace)
    except SystemExit:
        raise
    except BaseException as error:
        import traceback
        trace = error.__traceback__.tb_next     # without this function's frame
        traceback.print_exception(type(error), error, trace)
        raise SystemExit(1) from None


def _run_program(config):
    """Run the job's program as a script, to its end."""
    import types
    confine(config)
    source = _read_all(_keep_open(config["code_fd"])[0])
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [config["filename"]]
    _execute(source, config["filename"], module.__dict__)


def _answer_calls(config, requests_fd, answers_fd):
    """Run the job's program, then call its functions as the checker asks."""
    confine(config)
    fds = _keep_open(config["code_fd"], requests_fd, answers_fd)
    source = _read_all(fds[0])
    requests = open(fds[1], "rb")
    answers = open(fds[2], "wb")
    namespace = {"__name__": "candidate"}
    _execute(source, config["filename"], namespace)
    write_frame(answers, "ready")
    while True:
        try:
            name, arguments, keywords = decode(read_frame(requests))
        except EOFError:
            return
        write_frame(answers, _outcome(namespace, name, arguments, keywords))


def _outcome(namespace, name, arguments, keywords):
    """["returned", value] or ["raised", class, message] of a call. SystemExit ends the process."""
    try:
        return ["returned", encode(namespace[name](*arguments, **keywords))]
    except Exception as error:
        return ["raised", type(error).__name__, str(error)]


# --------------------------------------------------------------------------------------------------
# the checker


class CandidateLost(BaseException):
    """The candidate's process has ended, or what it sends is no answer."""


class Proxy:
    """Calls the function `name` of the candidate. Arguments and results are copies.

    An exception of a builtin class comes out as one, any other as RuntimeError.
    """

    def __init__(self, name, requests, answers):
        self.name = self.__name__ = name
        self.requests = requests
        self.answers = answers
        self.is_lost = False

    def wait_until_ready(self):
        if self._exchange(None) != "ready":
            self._lose("the candidate sent no word that it is ready")

    def __call__(self, *arguments, **keywords):
        answer = self._exchange(encode((self.name, arguments, keywords)))
        try:
            kind, *rest = answer
            if kind == "returned":
                [value] = rest
                return decode(value)
            name, message = rest
        except (ValueError, TypeError, RecursionError) as error:
            self._lose(f"no plain data: {error}")
        raise _exception(str(name), str(message))

    def _exchange(self, request):
        """Send a request, if there is one, and read one answer."""
        try:
            if request is not None:
                write_frame(self.requests, request)
            return read_frame(self.answers)
        except (EOFError, OSError):
            self._lose("the candidate's process ended")
        except (ValueError, RecursionError) as error:
            self._lose(str(error))

    def _lose(self, reason):
        """A test may catch any exception, so that the loss is also remembered."""
        self.is_lost = True
        raise CandidateLost(reason)


def _exception(name, message):
    """The exception that a candidate raised, of its own class where that is a builtin one.

    Not a StopIteration: `all(map(candidate, inputs))` would take it for the end of the inputs.
    """
    import builtins
    kind = getattr(builtins, name, None)
    is_exception = isinstance(kind, type) and issubclass(kind, Exception)
    if is_exception and not issubclass(kind, (StopIteration, StopAsyncIteration)):
        try:
            return kind(message)
        except TypeError:   # a UnicodeDecodeError wants five arguments
            pass
    return RuntimeError(f"{name}: {message}")


def _check(config, requests_fd, answers_fd):
    """Run the tests; write "pass" or the reason of the failure to the parent."""
    confine(config)
    fds = _keep_open(config["tests_fd"], config["verdict_fd"], requests_fd, answers_fd)
    job = json.loads(_read_all(fds[0]))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(FIRST_FD):
        os.dup2(nothing, standard)
    os.close(nothing)
    proxy = Proxy(job["entry_point"], open(fds[2], "wb"), open(fds[3], "rb"))
    verdict = _verdict(proxy, job)
    with open(fds[1], "w", encoding="utf-8", errors="replace") as file:
        file.write(verdict[:REASON_CHARS])


def _verdict(proxy, job):
    """Run a job's tests on a proxy."""
    namespace = {"__name__": "checker"}
    try:
        proxy.wait_until_ready()
        exec(compile(job["setup"], "setup", "exec"), namespace)
        namespace[job["entry_point"]] = proxy
        exec(compile(job["tests"], "tests", "exec"), namespace)
        namespace["check"](proxy)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "the candidate's process ended" if proxy.is_lost else "pass"


# --------------------------------------------------------------------------------------------------
# the tree of processes


def confine(config):
    """Confine the calling process by the layers of the job."""
    die_with_parent()
    confine_process(config["layers"], readable_paths(), config["seconds"], config["memory_mb"])


def _fork(config, function, *arguments):
    """Run a function in a child process, which ends with it; the child's number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function(config, *arguments)
        status = 0
    except SystemExit as error:
        status = _exit_status(error.code)
    except ConfinementError as error:
        _refuse(config, error)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        _end(status)


def _refuse(config, error):
    """Tell the parent that a layer could not be applied, so that nothing has been run."""
    os.write(config["status_fd"], json.dumps({"refused": str(error)}).encode("utf-8"))
    os._exit(1)


def _exit_status(code):
    """The exit status of sys.exit(code)."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _end(status):
    """End as the interpreter does: threads are waited for, what is buffered is written."""
    import atexit
    import threading
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _run_init(config):
    """Start the job's processes, wait for the one that decides, and report how it ended."""
    die_with_parent()
    if "tests_fd" in config:
        requests = os.pipe()
        answers = os.pipe()
        candidate = _fork(config, _answer_calls, requests[0], answers[1])
        deciding = _fork(config, _check, requests[1], answers[0])
        for fd in (*requests, *answers):
            os.close(fd)
    else:
        candidate = deciding = _fork(config, _run_program)
    record = {"status": os.waitstatus_to_exitcode(os.waitpid(deciding, 0)[1])}
    if candidate != deciding:
        record["candidate"] = _status_of(candidate)
    os.write(config["status_fd"], json.dumps(record).encode("ascii"))
    os._exit(0)


def _status_of(candidate):
    """How the candidate ended, or None where it does not; it is killed then.

    Its pipes close a moment before it can be waited for, so that the checker, which has read their
    end, may be done first. Where there is a namespace, the end of init kills it as well.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(candidate, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    _kill(candidate)
    return None


def _kill(pid):
    """Kill a process, if it has not just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main():
    """Supervise one job, whose settings are the last argument as JSON."""
    config = json.loads(sys.argv[-1])
    die_with_parent()
    try:
        confine_session(config["layers"], readable_paths())
    except ConfinementError as error:
        _refuse(config, error)
    die_with_parent()   # a change of the user has undone it
    pid = os.fork()
    if pid == 0:
        _run_init(config)
    for name in ("status_fd", "verdict_fd"):
        if name in config:
            os.close(config[name])
    # The parent ends a job by this signal. When init has been waited for, all are gone.
    signal.signal(signal.SIGTERM, lambda *_: _kill(pid))
    os.waitpid(pid, 0)
    os._exit(0)
