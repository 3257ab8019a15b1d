"""The sandbox: what leaves it, what ends it, and whose verdict counts.

docs/traps.md: sandbox-by-name. The attempts are in escapes.py; each is also made outside of the
sandbox, where it succeeds, unless that would harm the machine.
"""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT
from escapes import ESCAPES, program
from nanochat import sandbox
from nanochat.common import UserError
from nanochat.confinement import LAYERS, missing_layers
from nanochat.sandbox import OUTPUT_BYTES, check, layers_here, run, run_many
from nanochat.sandbox_runner import decode, encode

NOBODY = 65534
MISSING = missing_layers()
confined = pytest.mark.skipif(bool(MISSING), reason=f"this system lacks layers: {MISSING}")
is_root = os.geteuid() == 0 if hasattr(os, "geteuid") else False
as_root = pytest.mark.skipif(not is_root, reason="only root becomes another user")
NAMES = [escape.name for escape in ESCAPES]
SHOWN = [escape.name for escape in ESCAPES if escape.shown]
# what root alone may do; of others it is not shown that they succeed outside of the sandbox
ROOT_ONLY = {
    "open the library to write", "write beside the library", "make a device", "be root",
    "raise its priority", "be still root", "change the root folder", "load a BPF map",
    "measure by perf", "type on a terminal", "enter a namespace", "make a mount namespace",
}
# what a kernel may lack or refuse to everybody
OPTIONAL = {
    "use io_uring", "use userfaultfd", "load a BPF map", "measure by perf", "type on a terminal",
    "make a call of another architecture", "read a key", "add a key", "compare processes",
}


# ------------------------------------------------------------------------------------------------
# escapes


@pytest.fixture(scope="module")
def machine():
    """What the attempts want: files that everybody may change, sockets, a process, an open file.

    The folder is not one of pytest's, which other users cannot enter.
    """
    folder = Path(tempfile.mkdtemp(prefix="nanochat-machine-"))
    folder.chmod(0o777)
    (folder / "work").mkdir()
    try:
        yield from _fill(folder)
    finally:
        shutil.rmtree(folder)


def _fill(folder):
    for name in ("secret", "victim"):
        (folder / name).write_text("secret text", encoding="utf-8")
        (folder / name).chmod(0o666)

    abstract = f"nanochat-escape-{os.getpid()}"
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
        (socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "\0" + abstract + "-datagrams"),
    ]
    with contextlib.ExitStack() as stack:
        sockets = []
        for family, kind, address in addresses:
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(100)
            sockets.append(listener)
        (folder / "socket").chmod(0o666)
        secret = stack.enter_context(open(folder / "secret", "rb"))
        os.set_inheritable(secret.fileno(), True)
        yield SimpleNamespace(
            folder=folder,
            open_file=secret.fileno(),
            context={
                "SECRET": str(folder / "secret"),
                "FOLDER": str(folder),
                "TCP": sockets[0].getsockname()[1],
                "UDP": sockets[1].getsockname()[1],
                "UNIX": str(folder / "socket"),
                "ABSTRACT": abstract,
                "PARENT": os.getpid(),
            },
        )


@pytest.fixture(scope="module")
def attempts(machine):
    """A function that makes attempts in the sandbox, from a process of a user."""
    def make(uid, without=(), names=NAMES):
        job = {"uid": uid, "without": without, "names": names, "context": machine.context}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "escapes.py"), json.dumps(job)],
            capture_output=True,
            text=True,
            env={**os.environ, "NANOCHAT_SECRET": "secret"},
            pass_fds=[machine.open_file],
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return make


@pytest.fixture(scope="module")
def by_this_user(attempts):
    return attempts(None)


@pytest.fixture(scope="module")
def by_nobody(attempts):
    return attempts(NOBODY)


@pytest.fixture(scope="module")
def unconfined(machine):
    """{name: standard output} of the attempts outside of the sandbox."""
    def make(escape):
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", program(escape, machine.context)],
            cwd=machine.folder / "work",
            env={**os.environ, "NANOCHAT_SECRET": "secret"},
            pass_fds=[machine.open_file],
            capture_output=True,
            timeout=120,
        )

    shown = [escape for escape in ESCAPES if escape.shown]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHOWN, pool.map(make, shown)))


def test_the_attempts_have_names_of_their_own():
    assert len(set(NAMES)) == len(NAMES) >= 60
    assert ROOT_ONLY <= set(NAMES)


@confined
@pytest.mark.parametrize("name", SHOWN)
def test_outside_of_the_sandbox_the_attempt_succeeds(unconfined, name):
    if name in ROOT_ONLY and not is_root:
        pytest.skip("only root may do this")
    done = unconfined[name]
    if name in OPTIONAL and b"ESCAPED" not in done.stdout:
        pytest.skip("this kernel offers it to nobody")
    assert b"ESCAPED" in done.stdout, done.stderr[-500:]


@confined
@pytest.mark.parametrize("name", NAMES)
def test_no_attempt_leaves_the_sandbox(by_this_user, name):
    has_escaped, status, limit, errors = by_this_user[name]
    assert not has_escaped
    assert limit == "" and status is not None, errors


@confined
@as_root
@pytest.mark.parametrize("name", NAMES)
def test_no_attempt_leaves_the_sandbox_of_a_user(by_nobody, name):
    has_escaped, status, limit, errors = by_nobody[name]
    assert not has_escaped
    assert limit == "" and status is not None, errors


# layer: attempts that it alone stops
STOPPED_BY = {
    "namespaces": {"see the number of the parent", "see the size of a file of the user"},
    "unprivileged_user": {"be still root"},
    "limits": {"take 2 GB of memory", "open 200 files", "lift the limit of memory"},
    "landlock": {"list the root folder"},
    "seccomp": {"fork", "multiprocessing", "trace", "use userfaultfd", "leave the session",
                "make a call of another architecture", "make a user namespace", "add a key"},
}


@confined
@as_root
@pytest.mark.parametrize("layer", STOPPED_BY)
def test_without_a_layer_some_attempt_succeeds(attempts, layer):
    wanted = STOPPED_BY[layer] & set(SHOWN)
    made = attempts(0, [layer], sorted(wanted | {"read a file of the user", "connect by TCP"}))
    assert {name for name, (has_escaped, *_) in made.items() if has_escaped} == wanted


@confined
@as_root
def test_without_namespaces_a_program_sees_sizes_of_files_and_no_more(attempts):
    names = NAMES[:NAMES.index("fill the disk with 50 MB")]
    made = attempts(0, ["namespaces", "unprivileged_user"], names)
    escaped = [name for name, (has_escaped, *_) in made.items() if has_escaped]
    assert escaped == ["see the size of a file of the user"]


@confined
def test_without_no_new_privs_the_kernel_refuses_the_layers_that_follow(monkeypatch):
    layers = [layer for layer in LAYERS if layer != "no_new_privs"]
    monkeypatch.setattr(sandbox, "layers_here", lambda allowed: layers)
    with pytest.raises(UserError, match="could not confine a program .landlock.*nothing was run"):
        run("print(1)")


# ------------------------------------------------------------------------------------------------
# missing layers


def test_a_missing_layer_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"landlock": "landlock: not there"})
    with pytest.raises(UserError, match="landlock: not there.*--allow_missing=landlock"):
        run("print(1)")
    with pytest.raises(UserError, match="--allow_missing=landlock"):
        run("print(1)", allow_missing=["seccomp"])
    with pytest.raises(UserError, match="landlok is no layer of the sandbox: choose from namespac"):
        run("print(1)", allow_missing=["landlok"])
    assert "landlock" not in layers_here(["landlock"])
    assert len(layers_here(["landlock"])) == len(LAYERS) - 1


@confined
def test_what_is_allowed_by_name_runs_without_that_layer(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"landlock": "not there"})
    done = run("import os; print(len(os.listdir('/')) > 0)", allow_missing=["landlock"])
    assert done.stdout == b"True\n"


@confined
def test_on_this_system_no_layer_is_missing():
    assert layers_here() == list(LAYERS)


# ------------------------------------------------------------------------------------------------
# programs


@confined
def test_a_program_runs_as_a_script():
    code = (
        "import sys, threading, asyncio, decimal, tempfile\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "with tempfile.NamedTemporaryFile('w+') as file:\n"
        "    file.write('text'); file.seek(0); print(file.read())\n"
        "if __name__ == '__main__': print(sys.argv, repr(sys.stdin.read()))\n"
        "print('caf\u00e9', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    done = run(code)
    assert done.stdout == b"thread\ntext\n['program.py'] ''\n"
    assert done.stderr.decode("utf-8") == "caf\u00e9\n"
    assert (done.status, done.limit) == (3, "")


@confined
def test_a_traceback_has_the_lines_of_the_program_alone():
    done = run("def f():\n    return 1 / 0\n\nf()\n", filename="sums.py")
    text = done.stderr.decode("utf-8")
    assert done.status == 1 and text.count("File ") == 2 and "return 1 / 0" in text
    assert 'File "sums.py", line 4' in text and "sandbox_runner" not in text
    done = run("def f(:\n")
    assert done.status == 1 and b"SyntaxError" in done.stderr


@confined
@pytest.mark.parametrize("code, status", [
    ("", 0),
    ("print('MemoryError')", 0),
    ("raise SystemExit", 0),
    ("raise SystemExit('no')", 1),
    ("import os; os._exit(7)", 7),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ("import os; os.kill(os.getpid(), 40)", -40),   # a real-time signal, which has no name
    ("import os; os.abort()", -signal.SIGABRT),
    ("x = bytearray(1 << 40)", 1),
])
def test_the_status_is_the_kernels_word(code, status):
    done = run(code)
    assert (done.status, done.limit) == (status, "")


@confined
def test_an_endless_loop_ends_at_the_limit_of_cpu_time():
    assert run("while True: pass", seconds=1).status == -signal.SIGXCPU
    stubborn = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(stubborn, seconds=1).status == -signal.SIGKILL


@confined
def test_a_program_that_waits_ends_at_the_limit_of_the_clock():
    done = run("print('before', flush=True)\nimport time; time.sleep(100)", wall_seconds=1)
    assert (done.status, done.stdout) == (None, b"before\n")
    assert done.limit == "over 1 seconds"


@confined
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_120_mb_of_output_end_the_program_at_the_first(stream):
    done = run(f"import sys\nfor _ in range(120): sys.{stream}.write('x' * (1 << 20))")
    assert len(getattr(done, stream)) == OUTPUT_BYTES
    assert done.limit == f"over {OUTPUT_BYTES:,} bytes of {stream}"
    exact = run(f"import sys; sys.{stream}.write('x' * {OUTPUT_BYTES})")
    assert (len(getattr(exact, stream)), exact.limit, exact.status) == (OUTPUT_BYTES, "", 0)


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(30)
    os._exit(0)
time.sleep(0.2)
"""


def test_outside_of_the_sandbox_a_daemon_holds_its_output():
    command = [sys.executable, "-I", "-S", "-c", DAEMON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        daemon = int(process.stdout.readline())
        process.wait()
        os.kill(daemon, 0)      # it lives; its output would end when it does
        os.kill(daemon, signal.SIGKILL)


def processes_with(text):
    """Numbers of the processes whose command line contains a text."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and text in open(f"/proc/{name}/cmdline", "rb").read():
                found.append(int(name))
    return found


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@confined
def test_a_daemon_that_holds_the_output_dies_with_the_program(monkeypatch):
    layers = [layer for layer in LAYERS if layer != "seccomp"]    # else it could not be started
    monkeypatch.setattr(sandbox, "layers_here", lambda allowed: layers)
    done = run(DAEMON, filename="the-daemon.py")
    assert done.status == 0 and done.seconds < 20
    assert done.stdout.strip().isdigit(), "it was there"
    assert processes_with(b"the-daemon.py") == []


@confined
def test_what_runs_dies_with_the_process_that_asked_for_it(tmp_path):
    path = tmp_path / f"lonely-{os.getpid()}.py"
    path.write_text("import time; print('runs', flush=True); time.sleep(100)", encoding="utf-8")
    command = [sys.executable, "-m", "nanochat.sandbox", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"runs\n"
        name = path.name.encode()
        assert len(processes_with(name)) >= 4       # command, supervisor, init, program
        process.kill()
        wait_until(lambda: processes_with(name) == [])


@confined
def test_many_jobs_come_back_in_their_order():
    jobs = [partial(run, f"print({i})") for i in range(12)]
    assert [done.stdout for done in run_many(jobs, 8)] == [b"%d\n" % i for i in range(12)]
    assert run_many([]) == []


@confined
def test_no_file_of_the_parent_stays_open():
    run("print(1)")
    before = os.listdir("/proc/self/fd")
    run("print(1)")
    check("def f(): return 1", "def check(f): assert f() == 1", "f")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert threading.active_count() < 20


# ------------------------------------------------------------------------------------------------
# verdicts

TESTS = """
def check(candidate):
    assert candidate(2000) == 4000
    assert candidate(3000) == 9000
"""
CHEATS = {
    "an exit before the tests": "import os; os._exit(0)",
    "an exit in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the function": "def f(x): raise SystemExit(0)",
    "a hook for exceptions": "import os, sys; sys.excepthook = lambda *a: os._exit(0)\n"
                             "def f(x): return 0",
    "a function at the exit": "import atexit, os; atexit.register(os._exit, 0)\n"
                              "def f(x): return 0",
    "a thread that exits": "import os, threading\n"
                           "def f(x): threading.Thread(target=os._exit, args=(0,)).start(); f(x)",
    "an object that equals all": "class E:\n    def __eq__(self, other): return True\n"
                                 "def f(x): return E()",
    "a number that equals all": "class E(int):\n    def __eq__(self, other): return True\n"
                                "def f(x): return E()",
    "a text that equals all": "class E(str):\n    def __eq__(self, other): return True\n"
                              "def f(x): return E()",
    "a list that equals all": "class E(list):\n    def __eq__(self, other): return True\n"
                              "def f(x): return E()",
    "the constants of the caller": "import sys\ndef f(x):\n"
                                   "    c = sys._getframe(1).f_code.co_consts\n"
                                   "    return c[c.index(x) + 1]",
    "the code of the tests among the garbage":
        "import gc, types\ndef f(x):\n"
        "    for o in gc.get_objects():\n"
        "        c = getattr(getattr(o, '__code__', None), 'co_consts', ())\n"
        "        if x in c: return c[c.index(x) + 1]",
    "a printed verdict": "import os; print('pass', flush=True); os._exit(1)",
    "a verdict into every file":
        "import os\nfor fd in range(64):\n"
        "    try: os.write(fd, b'pass')\n"
        "    except OSError: pass\n"
        "os._exit(1)",
    "guessed nonces": "print('\\n'.join(f'{i:08x} pass' for i in range(5000)))\ndef f(x): return 0",
    "an exception of the name of success":
        "class passed(Exception):\n    def __str__(self): return 'pass'\n"
        "def f(x): raise passed",
    "a lying exception": "def f(x): raise StopIteration('pass')",
    "a changed builtin": "import builtins; builtins.AssertionError = None\n"
                         "builtins.__build_class__ = None\ndef f(x): return 0",
}

def naive_check(code):
    """Whether a program passes where it runs with its tests: status 0, or the word pass."""
    reading, writing = os.pipe()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code + TESTS + "check(f)"],
        capture_output=True,
        pass_fds=[writing],
    )
    os.close(writing)
    with open(reading, "rb") as file:
        return done.returncode == 0 or b"pass" in done.stdout or file.read() == b"pass"


@confined
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(name):
    verdict = check(CHEATS[name], TESTS, "f", wall_seconds=30)
    assert not verdict.passed and verdict.reason


NOT_SHOWN = {   # they aim at other ways to judge than the simple one
    "a thread that exits", "guessed nonces", "an exception of the name of success",
    "a lying exception", "a changed builtin",
}


@pytest.mark.parametrize("name", sorted(CHEATS.keys() - NOT_SHOWN))
def test_the_cheat_passes_where_tests_and_program_are_one_process(name):
    if "constants" in name and sys.version_info >= (3, 14):
        pytest.skip("the constants of this Python are elsewhere")
    assert naive_check(CHEATS[name])


@confined
@pytest.mark.parametrize("code", [
    "def f(x): return 2 * x if x == 2000 else 3 * x",
    "def f(x): print('MemoryError'); return 2 * x if x == 2000 else 3 * x",
    "import builtins; builtins.print = None\ndef f(x): return (2 if x == 2000 else 3) * x",
    "f = lambda x: (2.0 if x == 2000 else 3.0) * x",
])
def test_a_right_program_passes(code):
    verdict = check(code, TESTS, "f")
    assert verdict[:2] == (True, "") and verdict.result.status == 0


@confined
@pytest.mark.parametrize("code, reason", [
    ("def f(x): return 0", "AssertionError"),
    ("def f(x): return x / 0", "ZeroDivisionError: division by zero"),
    ("def f(x): raise KeyError(x)", "KeyError"),
    ("def f(x): return lambda: x", "TypeError: function is no plain data"),
    ("def f(x):\n    l = []\n    l.append(l)\n    return l", "RecursionError"),
    ("def f(x): return f(x)", "RecursionError"),
    ("def g(x): return 0", "KeyError"),
    ("def f(x:", "the candidate's process ended"),
    ("raise ValueError", "the candidate's process ended"),
    ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSEGV)", "(SIGSEGV)"),
    ("import os\ndef f(x): os.kill(os.getpid(), 40)", "(signal 40)"),
    ("def f(x): print('x' * (2 << 20))", "bytes of stdout"),
    ("def f(x): return 'x' * (9 << 20)", "an answer of 9,437,200 bytes, at most 8,388,608"),
])
def test_a_failure_has_its_reason(code, reason):
    verdict = check(code, TESTS, "f")
    assert not verdict.passed and reason in verdict.reason
    assert "\n" not in verdict.reason


@confined
def test_a_candidate_that_never_ends_fails():
    verdict = check("def f(x):\n    while True: pass", TESTS, "f", seconds=1)
    assert not verdict.passed and "SIGXCPU" in verdict.reason
    verdict = check("import time\ntime.sleep(100)", TESTS, "f", wall_seconds=1)
    assert (verdict.passed, verdict.reason) == (False, "over 1 seconds")


JUNK = {
    "no JSON": b"\0\0\0\x01{",
    "a length beyond all": b"\xff\xff\xff\xff",
    "a frame cut short": b"\0\0\0\x09{}",
    "deep nesting": b"\0\0\x75\x30" + b"[" * 30000,
    "an object": b'\0\0\0\x02{}',
    "no kind": b'\0\0\0\x18["returned",["evil", 1]]',
    "a set of lists": b'\0\0\0\x26["returned",["set",[["list",[]],1,2]]]',
    "too few words": b'\0\0\0\x0a["raised"]',
    "too many words": b'\0\0\0\x10["returned",1,2]',
}


@confined
@pytest.mark.parametrize("name", JUNK)
def test_junk_in_place_of_an_answer_fails(name):
    junk = JUNK[name]
    code = f"import os\ndef f(x):\n    os.write(5, {junk!r}); os._exit(0)"
    verdict = check(code, TESTS, "f", wall_seconds=30)
    assert not verdict.passed and verdict.reason.startswith("CandidateLost")
    early = f"import os\nos.write(5, {junk!r}); os._exit(0)"
    assert not check(early, TESTS, "f", wall_seconds=30).passed


@confined
def test_a_test_that_catches_everything_does_not_hide_a_lost_candidate():
    tests = "def check(f):\n    try: f(1)\n    except BaseException: pass\n"
    assert check("def f(x): return 1", tests, "f").passed
    assert check("def f(x): raise ValueError", tests, "f").passed
    verdict = check("import os\ndef f(x): os._exit(0)", tests, "f")
    assert not verdict.passed and "ended" in verdict.reason


@confined
def test_an_exception_does_not_end_a_loop_over_inputs():
    tests = "def check(f):\n    assert all(map(f, [1, 2]))\n"
    assert check("def f(x): return True", tests, "f").passed
    verdict = check("def f(x): raise StopIteration", tests, "f")
    assert not verdict.passed and verdict.reason.startswith("RuntimeError: StopIteration")


VALUES = [
    None, True, 0, -1, 2**53, -(2**200), 10**5000, 0.1, -0.0, float("inf"), 1e-320, 2 + 3j,
    "caf\u00e9 \ud800 \0", "", b"\0\xff", [], (), set(), frozenset(), {}, [[1, (2, [3])], {4: {5}}],
    {(1, "a"): [None], frozenset({1}): b""}, {1: True, "1": False}, [1, True, 1.0],
]


def over_the_pipe(value):
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(type(value).__name__))
def test_plain_data_arrives_as_it_was(value):
    arrived = over_the_pipe(value)
    assert repr(arrived) == repr(value) if value != 10**5000 else arrived == value


def test_what_is_no_plain_data_is_refused_and_subclasses_become_plain():
    for value in (object(), len, int, range(3), iter([]), [lambda: 0], {1: Path("x")}):
        with pytest.raises(TypeError, match="is no plain data"):
            encode(value)
    plain = over_the_pipe([Counter("aab"), SomeInt(3), SomeText("x")])
    assert plain == [{"a": 2, "b": 1}, 3, "x"]
    assert [type(item) for item in plain] == [dict, int, str]


class SomeInt(int):
    pass


class SomeText(str):
    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


@confined
def test_arguments_are_copies_and_names_of_the_setup_are_there():
    tests = (
        "def check(f):\n"
        "    numbers = [3, 1, 2]\n"
        "    assert f(numbers) == [1, 2, 3] and numbers == [3, 1, 2]\n"
        "    assert helper(f([2, 1])) == 3 and g([5, 4], reverse=True) == [5, 4]\n"
    )
    setup = "def helper(x): return sum(x)\ndef g(x, reverse=False): pass\n"
    code = (
        "def helper(x): return 0\n"
        "def g(numbers, reverse=False): numbers.sort(reverse=reverse); return numbers\n"
    )
    verdict = check(code, tests, "g", setup)
    assert verdict.passed, verdict.reason


# ------------------------------------------------------------------------------------------------
# the command


@confined
def test_the_command_passes_output_and_failure_on(run_module, tmp_path):
    path = tmp_path / "program.py"

    def command(code, *options):
        path.write_text(code, encoding="utf-8")
        return run_module("nanochat.sandbox", str(path), *options, base=tmp_path / "base")

    done = command("import sys; print('out'); print('err', file=sys.stderr)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
    assert command("raise SystemExit(5)").returncode == 5
    done = command("while True: pass", "--seconds=1")
    assert (done.returncode, done.stderr) == (152, "error: the program was ended by SIGXCPU\n")
    done = command("print('x' * (2 << 20))")
    assert done.returncode == 1 and len(done.stdout) == OUTPUT_BYTES
    assert done.stderr == "error: the program was ended: over 1,048,576 bytes of stdout\n"
    assert not (tmp_path / "base").exists(), "a program of the user is no stage of a run"


@pytest.mark.parametrize("words, message", [
    ([], "name one file"),
    (["a.py", "b.py"], "name one file"),
    (["missing.py"], "cannot read missing.py"),
    (["--allow_missing=fence", "README.md"], "fence is no layer of the sandbox: choose from"),
    (["--seconds=0", "README.md"], "seconds"),
    (["--second=1", "README.md"], "second"),
])
def test_bad_usage_is_one_line_and_status_2(run_module, words, message):
    done = run_module("nanochat.sandbox", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
