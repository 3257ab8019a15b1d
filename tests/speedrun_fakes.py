"""A copy of speedrun.sh whose python and torchrun only write down what they are asked to do."""
import os
import shlex
import subprocess
import time
from contextlib import contextmanager

from conftest import ROOT

DIALS = (
    "MINUTES", "DATA", "CUSTOM", "NAME", "GPUS", "DRY_RUN", "WSL_DISTRO_NAME", "DEPTH", "STAGES",
    "MODEL", "DEVICE_BATCH_SIZE", "TOTAL_BATCH_SIZE")


def environment_of(**variables):
    """This process's environment without the dials of speedrun.sh, and with `variables`."""
    inherited = {name: value for name, value in os.environ.items() if name not in DIALS}
    return {**inherited, "GPU_FILES": "", **variables}


def speedrun(script_folder, cwd=None, script="speedrun.sh", words=(), **variables):
    """The finished process of a script in `script_folder`, called from `cwd`."""
    return subprocess.run(
        ["bash", str(script_folder / script), *words],
        cwd=cwd or script_folder,
        env=environment_of(**variables),
        timeout=60,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


FAKE_PYTHON = r"""#!/usr/bin/env bash
if [ "$1" = -c ]; then
    case "$2" in
        *tag_setting*) echo "${TAGS:-- -}" ;;    # this run's models are the newest
        *'["depth"]'*) echo "${PLANNED:-20}" ;;  # the layers that the plan chooses
        *peer_to_peer*) echo probe >>"$CALLS"; echo "${PROBE:-works}" ;;
        *) echo "${TORCH_SEES:-0}" ;;            # how many GPUs there are
    esac
    exit
fi
if [ "$2" = scripts.plan ]; then exit "${PLAN_STATUS:-0}"; fi
env >"$CALLS.$2.environment"
# in one write: a download in the background writes down its call at the same time as a stage
line="$(printf '%q ' "$@")"
echo "$line" >>"$CALLS"
record() {
    echo "{\"stage\": \"${2#*.}\", \"run\": \"${NANOCHAT_RUN:?}\"}" \
        >>"$NANOCHAT_BASE_DIR/metrics.jsonl"
}
case " $* " in
    *" ${FAIL_AT:-nowhere} "*) echo "2 shards are missing" >&2; exit 1 ;;
    *" ${WAIT_AT:-nowhere} "*) while [ ! -e "$NANOCHAT_BASE_DIR/arrived" ]; do sleep 0.05; done ;;
esac
case "$2" in
    "${WAIT_IN:-nowhere}")
        trap 'echo "the stage saves"; exit 1' INT TERM   # as torchrun ends, whatever its ranks did
        touch "$NANOCHAT_BASE_DIR/waiting"
        while :; do sleep 0.05; done ;;
    "${STOP_IN:-nowhere}")
        if [ -n "${RECORDED:-}" ]; then record "$@"; fi
        exit "${STATUS:-1}" ;;
    nanochat.report) echo '{"stage": "speedrun"}' ;;
    *) record "$@" ;;
esac
"""

# Runs the module in the fake python, once whatever the ranks: `torchrun ... -m MODULE [--] ...`
FAKE_TORCHRUN = r"""#!/usr/bin/env bash
echo "$2 ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:?the ranks would be killed while they save}" \
    >/dev/null || exit 1
echo "$2" >>"$CALLS.ranks"
shift 2
exec python "$@"
"""


class Sandbox:
    """A copy of speedrun.sh beside an empty set-up, and the fake python and torchrun."""

    def __init__(self, folder):
        self.folder, self.base, self.calls = folder, folder / "base", folder / "calls"
        self.ranks = folder / "calls.ranks"
        (folder / "scripts").mkdir()
        (folder / "bin").mkdir()
        (folder / "nanochat" / "variants").mkdir(parents=True)
        copied = (
            "speedrun.sh", "launch_6x_amd_xtx.sh", "scripts/supervise.sh",
            "nanochat/variants/__init__.py",    # the table of models, which speedrun.sh searches
        )
        for name in copied:
            (folder / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "scripts" / "setup.sh").write_text("", encoding="utf-8")
        for name, text in (("python", FAKE_PYTHON), ("torchrun", FAKE_TORCHRUN)):
            tool = folder / "bin" / name
            tool.write_text(text, encoding="utf-8")
            tool.chmod(0o755)

    def variables(self, **others):
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "NANOCHAT_BASE_DIR": str(self.base),
            **others,
        }

    def states(self):
        """The state files of the runs that have not finished."""
        return sorted(self.base.glob("speedrun.*.state"))

    def run(self, status=0, cwd=None, **variables):
        """(what was asked of python, the finished process)."""
        self.calls.write_text("", encoding="utf-8")
        self.ranks.write_text("", encoding="utf-8")
        done = speedrun(self.folder, cwd, **self.variables(**variables))
        assert done.returncode == status, done.stdout + done.stderr
        lines = self.calls.read_text(encoding="utf-8").splitlines()
        return [shlex.split(line) for line in lines], done

    def start(self, output=subprocess.PIPE, own_group=False, **variables):
        """The process of speedrun.sh. own_group: in a process group of its own."""
        self.calls.write_text("", encoding="utf-8")
        return subprocess.Popen(
            ["bash", "speedrun.sh"],
            cwd=self.folder,
            env=environment_of(**self.variables(**variables)),
            text=True,
            stdout=output,
            stderr=output,
            start_new_session=own_group,
        )

    def wait_for_call(self, process, module):
        """Wait until a running speedrun.sh has asked for a module."""
        while module not in self.calls.read_text(encoding="utf-8"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    @contextmanager
    def waiting_in(self, module, output=subprocess.PIPE, **variables):
        """The process of speedrun.sh, once its stage `module` waits for a signal."""
        with self.start(output, WAIT_IN=module, **variables) as process:
            while not (self.base / "waiting").exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield process


def module_of(words):
    """Of a command, its module; the only other word is "wait"."""
    return words[words.index("-m") + 1] if "-m" in words else words[0]


def modules(calls):
    return [words[1] for words in calls]


def is_resumed(words):
    return "--resume" in words


def is_alive(process):
    """Whether a process runs; one that has ended may still be listed as a zombie."""
    listed = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return listed != "" and not listed.startswith("Z")
