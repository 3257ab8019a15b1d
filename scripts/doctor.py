"""What this machine can do for training, what stands in the way, and which settings to use.

    python -m scripts.doctor                # everything, in at most 60 seconds; --all is the same
    python -m scripts.doctor --memory       # memory of the machine and its devices, and the plan
    python -m scripts.doctor --cuda         # the devices: driver, kernels, speed, exchange
    python -m scripts.doctor --device_type=cpu

Nothing is changed on the machine. Each probe runs in another process with a time limit of its own,
so that a driver or a network that hangs is reported and not waited for. docs/doctor.md explains the
findings. Exit status: 0 where training can run, 1 where it cannot. The last line is JSON.
"""
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

from nanochat.configurator import check_choices, configure, require
from nanochat.doctor import MARK, PROBES
from nanochat.environment import gpu_variables, this_system
from nanochat.metrics import finish_stage
from nanochat.probes import Check, exports_of, note, problem, relevant_variables

# settings
all = False          # every part; so does no option
memory = False       # only memory: of the machine, of its devices, and of the planned run
cuda = False         # only the devices: driver, kernels, speed, exchange (without a GPU: the CPU)
device_type = ""     # cuda, mps or cpu; empty: what training would choose
dtype = ""           # float32 or bfloat16; empty: what the hardware is good at
seconds = 60.0       # limit of the whole

USUAL_SECONDS = 60.0  # for which the limits of PROBES are: with more, each has more
ENDING = 6.0         # seconds of the whole that are for the table and the last line
WIDTH = 100          # columns of the table
DEVICE_TYPES = ("", "cuda", "mps", "cpu")
NEED_TORCH = ("matmul", "bandwidth", "exchange", "plan", "compiler", "selftests")


def chosen_probes(settings):
    """Names of the probes that the options ask for, in the order of PROBES."""
    parts = {part for part in ("memory", "cuda") if settings[part]}
    if settings["all"] or not parts:
        parts = {"machine", "memory", "cuda"}
    return [name for name, probe in PROBES.items() if parts & set(probe.parts)]


# --------------------------------------------------------------------------------------------------
# probes in another process

class Worker:
    """A process that runs probes one after another, and is killed when one of them hangs."""

    def __init__(self, command):
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that what the probes start ends with them
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.lines.put(json.loads(line.removeprefix(MARK)))
        self.lines.put(None)  # it has ended

    def answer(self, name, limit, cut):
        """(the Checks of a probe, its numbers, whether the process can take the next one).

        limit: seconds to wait. cut: whether that is less than the probe's own limit.
        """
        try:
            answer = self.lines.get(timeout=limit)
        except queue.Empty:
            if cut:
                late = unfinished(name, f"not finished in the {limit:.0f} seconds left")
                return [late], {}, False
            hangs = problem(
                name, f"no answer within {limit:.0f} seconds",
                "run it again; if it stays so, restart the machine or its driver",
                stops=name == "torch")
            return [hangs], {}, False
        if answer is None:
            return [self.crash(name)], {}, False
        return [Check(**check) for check in answer["checks"]], answer["numbers"], True

    def crash(self, name):
        """The Check of a probe whose process has ended."""
        status = self.process.wait()
        self.errors.seek(0)
        said = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        reason = said[-1][:200] if said else "without a word"
        return problem(
            name, f"ended with {how}: {reason}", "docs/doctor.md says what a failed probe means",
            stops=name == "torch")

    def end(self):
        """Kill the process and all that it has started. One that the kernel holds is left."""
        if hasattr(os, "killpg"):
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended by itself
        else:
            self.process.kill()
        self.errors.close()


def unfinished(name, detail):
    """The Check of a probe that the limit of the whole has cut off."""
    return note(name, detail, "give it more --seconds, or only its part (--memory, --cuda)")


def examine(names, limit, command):
    """Run probes, each within its own limit and all within `limit` seconds.

    command: what starts a process, without the probes' names. Yields (name, Checks, numbers).
    """
    deadline = time.monotonic() + limit
    longer = max(1.0, (limit + ENDING) / USUAL_SECONDS)
    worker = None
    torch_is_broken = False
    try:
        for position, name in enumerate(names):
            left = deadline - time.monotonic()
            if left < 1:
                yield name, [unfinished(name, f"not examined: {limit:.0f} seconds were over")], {}
                continue
            if torch_is_broken and name in NEED_TORCH:
                yield name, [], {}
                continue
            if worker is None:
                others = ",".join(names[position:])
                worker = Worker([*command, others, device_type, dtype])
            own_limit = PROBES[name].seconds * longer
            checks, numbers, usable = worker.answer(name, min(own_limit, left), left < own_limit)
            if not usable:
                worker.end()
                worker = None
                torch_is_broken = torch_is_broken or name == "torch"
            yield name, checks, numbers
    finally:
        if worker:
            worker.end()


# --------------------------------------------------------------------------------------------------
# what is printed

def table(checks):
    """Lines of a table: status, name, what was found; the remedy below a problem or note."""
    lines = []
    for check in checks:
        head = f"{check.status:<8} {check.name:<15} "
        text = textwrap.wrap(check.detail, WIDTH - len(head)) or [""]
        lines.append(head + text[0])
        lines += [" " * len(head) + line for line in text[1:]]
        if check.remedy:
            remedy = textwrap.wrap("-> " + check.remedy, WIDTH - len(head))
            lines += [" " * len(head) + line for line in remedy]
    return lines


def own_variables():
    """{name: value} of the variables that every stage sets here by itself."""
    wanted = gpu_variables(this_system(), {})
    return {name: value for name, value in wanted.items() if os.environ.get(name) == value}


def settings_to_use(where, plan, exports, own):
    """Lines: variables to export, the command that trains here, and the plan that it would make.

    where, plan: numbers of the probes "torch" and "plan", {} where they have failed. own: what
    own_variables() gives, of which nothing has to be exported.
    """
    lines = [f"export {name}={value}" for name, value in exports.items()]
    lines += [f"(set by itself: {name}={value})" for name, value in own.items()]
    launcher = "python"
    if plan.get("ranks", 1) > 1:
        launcher = f"torchrun --standalone --nproc_per_node={plan['ranks']}"
    lines.append(f"{launcher} -m scripts.base_train")
    if plan:
        lines.append("which would choose by itself:")
        lines.append(f"  device {where['device']}, {where['dtype']}, model {plan['model']}")
        lines += ["  " + line for line in plan["lines"]]
    return lines


def main(settings):
    require(settings, 1, "seconds")
    check_choices(settings, device_type=DEVICE_TYPES, dtype=("", "float32", "bfloat16"))
    started = time.perf_counter()
    names = chosen_probes(settings)
    print(f"doctor: {len(names)} probes, at most {seconds:.0f} seconds; nothing is changed here",
          flush=True)

    # 1) look
    checks, numbers = [], {}
    command = [sys.executable, "-m", "nanochat.doctor"]
    examination = examine(names, seconds - ENDING, command)
    for number in range(1, len(names) + 1):
        name = names[number - 1]
        print(f"[{number}/{len(names)}] {PROBES[name].about} ...", flush=True)
        _, found, measured = next(examination)
        checks += found
        numbers[name] = measured
    examination.close()

    # 2) say
    exports = exports_of(checks)
    print("\n" + "\n".join(table(checks)) + "\n")
    print("settings to use")
    where, plan = numbers.get("torch", {}), numbers.get("plan", {})
    use = settings_to_use(where, plan, exports, own_variables())
    print("\n".join("  " + line for line in use))
    problems = [check for check in checks if check.status == "problem"]
    stops = [check for check in problems if check.stops]
    if stops:
        reasons = "; ".join(f"{check.name}: {check.remedy}" for check in stops)
        print(f"\ntraining cannot run here before this is mended: {reasons}")
    print(f"\n{len(problems)} problems, {'training cannot run' if stops else 'training can run'}")

    # 3) for machines
    record = {
        "can_train": not stops,
        "problems": len(problems),
        "checks": [check._asdict() for check in checks],
        "numbers": numbers,
        "export": exports,
        "variables": relevant_variables(os.environ),
    }
    elapsed = time.perf_counter() - started
    if numbers.get("torch") and not stops:
        finish_stage("doctor", elapsed, settings, **record)
    else:  # the record of a stage names the devices, which might hang here
        print(json.dumps({"stage": "doctor", "seconds": elapsed, "settings": settings, **record}))
    raise SystemExit(1 if stops else 0)


if __name__ == "__main__":
    main(configure(globals()))
