"""Run a program that nobody has read, such as one that a language model wrote.

    python -m nanochat.sandbox program.py                # its output, and its failure as status
    python -m nanochat.sandbox program.py --seconds=60 --memory_mb=2048
    python -m nanochat.sandbox program.py --allow_missing=landlock

    run("print(6 * 7)").stdout                           -> b"42\\n"
    check("def f(x): return x + 1", "def check(f): assert f(1) == 2", "f").passed    -> True

The program runs in processes that have confined themselves (nanochat/confinement.py has the
layers, nanochat/sandbox_runner.py the processes). This file is the parent: it starts them, limits
their time and output, kills what is left, and says how it ended. Where the system lacks a layer,
nothing runs, unless the caller allows that layer to be missing, by its name. docs/sandbox.md says
what is protected and what is not.
"""
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

from nanochat.common import UserError
from nanochat.configurator import configure, require
from nanochat.confinement import LAYERS, SCRATCH, command, missing_layers

# settings of the command
seconds = 10            # of CPU time, for each process
wall_seconds = 60       # from the start to the end
memory_mb = 512         # of address space, for each process
allow_missing = ""      # layers that may be missing here, comma-separated; see docs/sandbox.md

OUTPUT_BYTES = 1 << 20  # of standard output, and of standard error; a program with more is killed
REASON_BYTES = 1 << 16  # of what the checker says
READ_BYTES = 1 << 16
KILL_SECONDS = 5        # that the supervisor has for the end of the others

# status: the exit status, or minus the number of the signal that ended the program; None where the
# parent ended it. limit: the parent's limit that ended it, "" for none. stdout, stderr: bytes, at
# most OUTPUT_BYTES of each. seconds: from the start to the end.
Result = namedtuple("Result", "status limit stdout stderr seconds")

# passed: whether the tests passed. reason: why not, in one line; "" where they did. result: how the
# checker ended, with what the candidate has printed.
Verdict = namedtuple("Verdict", "passed reason result")


def run(
        code,
        seconds=10,
        wall_seconds=60,
        memory_mb=512,
        allow_missing=(),
        filename="program.py",
        echo=None,
):
    """Run a program in the sandbox; its Result.

    code: the program's text. It runs as a script whose standard input is empty, in a folder in
    memory that is gone afterwards.
    seconds, memory_mb: CPU time and address space of its process; wall_seconds: of everything.
    allow_missing: names of layers that may be missing on this system.
    filename: what its tracebacks call it. echo: a function of ("stdout" or "stderr", bytes) for
    output as it comes.
    UserError where a layer is missing that may not be.
    """
    settings = _settings(seconds, memory_mb, allow_missing, filename)
    with _file_of(code) as code_file:
        settings["code_fd"] = code_file.fileno()
        return _Job(settings, wall_seconds, echo).finish()


def check(
        code,
        tests,
        entry_point,
        setup="",
        seconds=10,
        wall_seconds=60,
        memory_mb=512,
        allow_missing=(),
):
    """Whether a program's function passes tests; a Verdict. The parameters are those of run(), and

    tests: text that defines check(candidate), which raises where the candidate fails.
    entry_point: the function's name. setup: text that runs before the tests, for names that they
    use. In both, entry_point is the candidate, as well as in the argument of check().

    The tests run in a process of their own, and the candidate's function is called by proxy: it
    gets copies of plain data (None, numbers, text, bytes, lists, tuples, sets, dicts), and its
    result must be plain data. An argument that it changes is unchanged for the tests.
    """
    settings = _settings(seconds, memory_mb, allow_missing, "candidate.py")
    job = {"tests": tests, "entry_point": entry_point, "setup": setup}
    with contextlib.ExitStack() as files:
        code_file = files.enter_context(_file_of(code))
        tests_file = files.enter_context(_file_of(json.dumps(job)))
        settings["code_fd"] = code_file.fileno()
        settings["tests_fd"] = tests_file.fileno()
        process = _Job(settings, wall_seconds)
        result = process.finish()
    if result.limit:
        return Verdict(False, result.limit, result)
    said = process.said()
    passed = said == "pass" and result.status == 0
    return Verdict(passed, "" if passed else _reason(said, process.record), result)


def _reason(said, record):
    """Why tests did not pass, in one line, from what the checker said and how both ended."""
    ended = record.get("candidate")
    reason = " ".join(said.split()) or f"the checker ended with status {record.get('status')}"
    if ended is not None and ended < 0:
        reason += f" ({_signal_name(-ended)})"
    return reason


def _signal_name(number):
    """The name of a signal; its number where it has none, as the real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_many(jobs, workers=None):
    """The results of jobs, in their order. Several jobs run at the same time.

    jobs: functions without arguments, such as partial(run, code) or partial(check, ...).
    workers: how many at a time; None: as many as this process has CPUs.
    """
    if workers is None:
        from nanochat.hardware import available_cpus
        workers = available_cpus()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --------------------------------------------------------------------------------------------------
# layers


def layers_here(allow_missing=()):
    """The layers to apply on this system.

    allow_missing: names of those that may be missing. UserError for a name that is no layer's, and
    for a layer that is missing and not among them.
    """
    for name in allow_missing:
        if name not in LAYERS:
            raise UserError(f"{name} is no layer of the sandbox: choose from {', '.join(LAYERS)}")
    missing = missing_layers()
    refused = [name for name in missing if name not in allow_missing]
    if refused:
        reasons = "; ".join(missing[name] for name in refused)
        raise UserError(
            f"this system cannot confine a program ({reasons}): nothing was run. If that is "
            f"acceptable, allow it by name: --allow_missing={','.join(refused)}")
    return [name for name in LAYERS if name not in missing]


def _settings(seconds, memory_mb, allow_missing, filename):
    """What the supervisor is told, but for the files."""
    return {
        "layers": layers_here(allow_missing),
        "seconds": seconds,
        "memory_mb": memory_mb,
        "filename": filename,
    }


def _file_of(text):
    """An unnamed file that holds a text, which the supervisor inherits."""
    file = tempfile.TemporaryFile()
    file.write(text.encode("utf-8", "surrogatepass"))
    file.flush()
    return file


# --------------------------------------------------------------------------------------------------
# a job


class _Job:
    """The processes of one job, from the parent's side.

    What they write is read until the one that decides has ended. The status pipe says so, which
    belongs to the supervisor and its init alone: whoever holds standard output delays nothing.

    record: what the supervisor or init has said: how the processes ended.
    """

    def __init__(self, settings, wall_seconds, echo=None):
        self.echo = echo
        self.limit = ""
        self.record = {}
        self.wall_seconds = wall_seconds
        self.started = time.monotonic()
        self.outputs = {}
        self.files = {}
        names = ["stdout", "stderr", "status"]
        if "tests_fd" in settings:
            names.append("verdict")
        ends = {}
        for name in names:
            reading, ends[name] = os.pipe()
            os.set_blocking(reading, False)
            self.files[name] = reading
            self.outputs[name] = bytearray()
        settings["status_fd"] = ends["status"]
        if "verdict" in ends:
            settings["verdict_fd"] = ends["verdict"]
        try:
            self.process = self._start(settings, ends)
        except BaseException:
            self._close_files()
            raise
        finally:
            for fd in ends.values():
                os.close(fd)

    def _start(self, settings, ends):
        """The supervisor, as the first process of a process group of its own."""
        inherited = [number for name, number in settings.items() if name.endswith("_fd")]
        variables = {"LANG": "C.UTF-8", "HOME": SCRATCH, "TMPDIR": SCRATCH}
        return subprocess.Popen(
            command("nanochat.sandbox_runner", "main", json.dumps(settings)),
            stdin=subprocess.DEVNULL,
            stdout=ends["stdout"],
            stderr=ends["stderr"],
            cwd="/",
            env=variables,
            pass_fds=inherited,
            start_new_session=True,
        )

    def finish(self):
        """Wait for the end, or bring it about; the Result. UserError where a layer failed."""
        try:
            self._read_until_end()
        finally:
            self._kill()
        self._read_rest()
        self._close_files()
        self.record = self._status_record()
        output, errors = (bytes(self.outputs[name]) for name in ("stdout", "stderr"))
        elapsed = time.monotonic() - self.started
        return Result(self.record.get("status"), self.limit, output, errors, elapsed)

    def _read_until_end(self):
        deadline = self.started + self.wall_seconds
        with selectors.DefaultSelector() as selector:
            for name, fd in self.files.items():
                selector.register(fd, selectors.EVENT_READ, name)
            while not self.limit:
                left = deadline - time.monotonic()
                if left <= 0:
                    self.limit = f"over {self.wall_seconds} seconds"
                for key, _ in selector.select(max(0, left)):
                    is_open = self._read(key.data)
                    if key.data == "status":
                        return
                    if not is_open:     # whoever held the other end has closed it
                        selector.unregister(key.fd)

    def _read(self, name):
        """Read from a pipe without waiting; whether it may have more."""
        try:
            data = os.read(self.files[name], READ_BYTES)
        except BlockingIOError:
            return True
        self._add(name, data)
        return bool(data)

    def _add(self, name, data):
        """Keep output up to its limit, and remember that there was more."""
        kept = self.outputs[name]
        limit = OUTPUT_BYTES if name in ("stdout", "stderr") else REASON_BYTES
        fitting = data[:limit - len(kept)]
        kept += fitting
        if len(fitting) < len(data):
            self.limit = f"over {limit:,} bytes of {name}"
        if self.echo and name in ("stdout", "stderr") and fitting:
            self.echo(name, fitting)

    def _kill(self):
        """Have the supervisor kill its init, and with it all processes of the namespace.

        Where the supervisor does not end, as one that was stopped, the group is killed.
        """
        self.process.terminate()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _read_rest(self):
        """What is in the pipes already, and no more: a process outside may hold their other end."""
        for name, fd in self.files.items():
            with contextlib.suppress(BlockingIOError):
                while not self.limit and (data := os.read(fd, READ_BYTES)):
                    self._add(name, data)

    def _close_files(self):
        for fd in self.files.values():
            os.close(fd)

    def said(self):
        """What the checker has said."""
        return self.outputs["verdict"].decode("utf-8", "replace")

    def _status_record(self):
        """What the supervisor or init has said, {} for nothing. UserError for a failed layer."""
        if not self.outputs["status"]:
            return {}
        text = self.outputs["status"].decode("utf-8")
        record, _ = json.JSONDecoder().raw_decode(text)     # the first: what failed comes first
        if "refused" in record:
            raise UserError(
                f"the sandbox could not confine a program ({record['refused']}): nothing was run. "
                "Allow the layer to be missing by its name, or repair the system")
        return record


# --------------------------------------------------------------------------------------------------
# the command


def _pass_through(name, data):
    """Write output of the program to the same stream of this process."""
    stream = getattr(sys, name).buffer
    stream.write(data)
    stream.flush()


def main():
    """Run the program of a file; the exit status is the program's."""
    words = []
    settings = configure(globals(), texts=words)
    require(settings, 1, "seconds", "wall_seconds", "memory_mb")
    if len(words) != 1:
        raise UserError("name one file: python -m nanochat.sandbox program.py")
    try:
        with open(words[0], encoding="utf-8") as file:
            code = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {words[0]} as UTF-8 text: {error}") from error
    names = [name for name in allow_missing.split(",") if name]
    result = run(
        code, seconds, wall_seconds, memory_mb, names, os.path.basename(words[0]), _pass_through)
    raise SystemExit(_exit_status(result))


def _exit_status(result):
    """The status for a shell: the program's, 128 + the signal's number, or 1 for a limit."""
    if result.limit:
        print(f"error: the program was ended: {result.limit}", file=sys.stderr)
        return 1
    if result.status is None:
        print("error: the program's processes were killed from outside", file=sys.stderr)
        return 1
    if result.status < 0:
        name = _signal_name(-result.status)
        print(f"error: the program was ended by {name}", file=sys.stderr)
        return 128 - result.status
    return result.status


if __name__ == "__main__":
    main()
