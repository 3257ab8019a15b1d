"""speedrun.sh: which commands it runs on which hardware, and how a second call goes on where the first one stopped."""
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT, last_json

TRAINING = ("base_train", "mid_train", "chat_sft")
ON_A_CPU = ["nanochat.dataset", "scripts.tok_train", "scripts.tok_eval", "scripts.base_train", "scripts.mid_train",
            "scripts.chat_sft", "scripts.chat_eval", "nanochat.report"]


def speedrun(folder, **variables):
    """The finished process of speedrun.sh in `folder`."""
    dials = ("MINUTES", "DATA", "GPUS", "DRY_RUN")
    environment = {name: value for name, value in os.environ.items() if name not in dials} | variables
    return subprocess.run(["bash", "speedrun.sh"], cwd=folder, env=environment, timeout=60, capture_output=True, text=True,
                          encoding="utf-8")


def dry_run(base, **variables):
    """The commands, each a list of words, of DRY_RUN=1."""
    done = speedrun(ROOT, DRY_RUN="1", NANOCHAT_BASE_DIR=str(base / "unused"), **variables)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not (base / "unused").exists(), "a dry run leaves nothing behind"
    return [shlex.split(line) for line in done.stdout.splitlines()]


def module_of(words):
    return words[words.index("-m") + 1]


def minutes_of(commands):
    """{stage: minutes} of the stages that have a budget."""
    return {module_of(words).removeprefix("scripts."): float(word.partition("=")[2])
            for words in commands for word in words if word.startswith("--minutes=")}


def test_dry_run_on_a_cpu_is_a_quarter_of_an_hour(tmp_path):
    commands = dry_run(tmp_path)
    assert [module_of(words) for words in commands] == ON_A_CPU
    assert all(words[:2] == ["python", "-m"] for words in commands)
    assert commands[0] == ["python", "-m", "nanochat.dataset", "--source=local"]
    assert commands[-1][2:] == ["nanochat.report", "--speedrun"]
    assert commands == dry_run(tmp_path, MINUTES="15")


@pytest.mark.parametrize("minutes", ["0.5", "1", "2", "3", "15", "60"])
def test_the_training_stages_share_the_minutes(tmp_path, minutes):
    commands = dry_run(tmp_path, MINUTES=minutes)
    assert [module_of(words) for words in commands] == ON_A_CPU
    budget = minutes_of(commands)
    assert tuple(budget) == TRAINING and all(share > 0 for share in budget.values())
    assert abs(sum(budget.values()) - float(minutes)) < 0.01


def test_dry_run_on_eight_gpus_is_the_documented_run(tmp_path):
    commands = dry_run(tmp_path, GPUS="8")
    modules = [module_of(words) for words in commands]
    assert modules == [*ON_A_CPU[:4], "scripts.base_loss", *ON_A_CPU[4:]]
    assert commands[0][2:] == ["nanochat.dataset", "--source=fineweb", "-n", "180"]
    for words in commands:
        if module_of(words).removeprefix("scripts.") in (*TRAINING, "base_loss", "chat_eval"):
            assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=8", "-m"]
        else:
            assert words[0] == "python"
    base = commands[modules.index("scripts.base_train")]
    assert base[5:] == ["--", "--depth=20"], "settings follow the two dashes, and the horizon follows from the depth"
    assert minutes_of(commands) == {}


def test_one_gpu_needs_no_torchrun_and_a_budget_of_time_replaces_the_depth(tmp_path):
    commands = dry_run(tmp_path, GPUS="1")
    assert ["python", "-m", "scripts.base_train", "--depth=20"] in commands
    assert not any("torchrun" in words for words in commands)
    commands = dry_run(tmp_path, GPUS="1", MINUTES="30")
    assert set(minutes_of(commands)) == set(TRAINING) and not any("--depth=20" in words for words in commands)


@pytest.mark.parametrize("gpus", ["0", "8"])
def test_data_with_spaces_stays_one_word_and_needs_no_other_text(tmp_path, gpus):
    data = tmp_path / "my 'notes' & more"
    data.mkdir()
    commands = dry_run(tmp_path, DATA=str(data), GPUS=gpus)
    assert "nanochat.dataset" not in map(module_of, commands)
    reads = {"tok_train", "tok_eval", "base_train", "base_loss"}
    for words in commands:
        assert (f"--data={data}" in words) == (module_of(words).removeprefix("scripts.") in reads), words


@pytest.mark.parametrize("minutes", ["soon", "-3", "1e3", "3 4", "3m"])
def test_bad_minutes_are_one_line_and_status_2(tmp_path, minutes):
    done = speedrun(ROOT, DRY_RUN="1", MINUTES=minutes, NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and minutes in done.stderr and "MINUTES" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# going on, with a python that only writes down what it was asked to do

FAKE_PYTHON = r"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 0; exit; fi   # how many GPUs there are
printf '%q ' "$@" >>"$CALLS"
echo >>"$CALLS"
record() { echo "{\"stage\": \"${2#*.}\", \"run\": \"${NANOCHAT_RUN:?}\"}" >>"$NANOCHAT_BASE_DIR/metrics.jsonl"; }
case "$2" in
    "${WAIT_IN:-nowhere}")
        trap 'echo "the stage saves"; exit 1' INT TERM   # as torchrun ends, whatever its ranks did
        touch "$NANOCHAT_BASE_DIR/waiting"
        while :; do sleep 0.05; done ;;
    "${STOP_IN:-nowhere}") if [ -n "${RECORDED:-}" ]; then record "$@"; fi; exit "${STATUS:-1}" ;;
    nanochat.report) echo '{"stage": "speedrun"}' ;;
    *) record "$@" ;;
esac
"""


class Sandbox:
    """A copy of speedrun.sh beside an empty set-up, and the fake python."""

    def __init__(self, folder):
        self.folder, self.base, self.calls = folder, folder / "base", folder / "calls"
        (folder / "scripts").mkdir()
        (folder / "bin").mkdir()
        (folder / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "scripts" / "setup.sh").write_text("", encoding="utf-8")
        python = folder / "bin" / "python"
        python.write_text(FAKE_PYTHON, encoding="utf-8")
        python.chmod(0o755)

    def run(self, status=0, **variables):
        """(what was asked of python, the finished process)."""
        self.calls.write_text("", encoding="utf-8")
        done = speedrun(self.folder, PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", CALLS=str(self.calls),
                        NANOCHAT_BASE_DIR=str(self.base), **variables)
        assert done.returncode == status, done.stdout + done.stderr
        return [shlex.split(line) for line in self.calls.read_text(encoding="utf-8").splitlines()], done


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def modules(calls):
    return [words[1] for words in calls]


def test_a_whole_run_ends_with_its_record_and_forgets_its_state(sandbox):
    calls, done = sandbox.run()
    assert modules(calls) == ON_A_CPU and not any("--resume" in words for words in calls)
    assert last_json(done.stdout) == {"stage": "speedrun"}
    assert "chat_cli" in done.stdout and re.fullmatch(r"--seconds=\d+", calls[-1][-1])
    assert not (sandbox.base / "speedrun.state").exists()
    assert modules(sandbox.run()[0]) == ON_A_CPU, "the next run is a new one"


@pytest.mark.parametrize("stage", TRAINING)
def test_an_interrupted_training_stage_is_resumed_and_what_was_done_is_not_done_again(sandbox, stage):
    module = f"scripts.{stage}"
    place = ON_A_CPU.index(module)
    calls, done = sandbox.run(status=130, STOP_IN=module, STATUS="130")
    assert modules(calls) == ON_A_CPU[:place + 1]
    assert f"stopped in {stage} (status 130)" in done.stderr and "same command" in done.stderr
    calls, done = sandbox.run(status=130, STOP_IN=module, STATUS="130")  # and stopped there once more
    assert modules(calls) == [module]
    calls, done = sandbox.run()
    assert modules(calls) == ON_A_CPU[place:] and "going on" in done.stdout
    assert [words[1] for words in calls if "--resume" in words] == [module]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_alone_goes_on_to_the_stage_and_ends_both(sandbox, number):
    environment = {**os.environ, "PATH": f"{sandbox.folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(sandbox.calls), "MINUTES": "3",
                   "NANOCHAT_BASE_DIR": str(sandbox.base), "WAIT_IN": "scripts.mid_train"}
    with subprocess.Popen(["bash", "speedrun.sh"], cwd=sandbox.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (sandbox.base / "waiting").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "the stage saves" in out and f"stopped in mid_train (status {128 + number})" in err
    calls, _ = sandbox.run(MINUTES="3")
    assert calls[0][1] == "scripts.mid_train" and "--resume" in calls[0]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_a_stage_whose_script_was_killed_is_stopped_by_the_next_call(sandbox):
    environment = {**os.environ, "PATH": f"{sandbox.folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(sandbox.calls),
                   "NANOCHAT_BASE_DIR": str(sandbox.base), "WAIT_IN": "scripts.base_train"}
    with subprocess.Popen(["bash", "speedrun.sh"], cwd=sandbox.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (sandbox.base / "waiting").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    stage = int(re.findall(r"^pid (\d+)$", (sandbox.base / "speedrun.state").read_text(encoding="utf-8"), re.M)[-1])
    os.kill(stage, 0)  # it goes on
    calls, done = sandbox.run()
    assert f"stopping process {stage}" in done.stdout and calls[0][1] == "scripts.base_train" and "--resume" in calls[0]
    state = Path(f"/proc/{stage}/stat")
    assert not state.exists() or state.read_text(encoding="utf-8").split()[2] == "Z"


def test_a_stage_that_was_killed_after_its_record_is_not_done_again(sandbox):
    """It would be trained a second time, on the budget of the first."""
    sandbox.run(status=137, STOP_IN="scripts.base_train", STATUS="137", RECORDED="1")
    assert modules(sandbox.run()[0]) == ON_A_CPU[ON_A_CPU.index("scripts.mid_train"):]


def test_a_record_of_another_run_does_not_count(sandbox):
    """One may try a stage by hand before going on."""
    sandbox.run(status=130, STOP_IN="scripts.base_train", STATUS="130")
    with open(sandbox.base / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "base_train", "run": null}\n{"stage": "base_train", "run": "1763750000-1"}\n')
    calls, _ = sandbox.run()
    assert calls[0][1] == "scripts.base_train" and "--resume" in calls[0]


@pytest.mark.parametrize("stage", ["tok_train", "tok_eval", "chat_eval"])
def test_other_stages_simply_run_again_whatever_the_data_is_called(sandbox, tmp_path, stage):
    data = tmp_path / "base_train notes for chat_sft"
    data.mkdir()
    sandbox.run(status=2, STOP_IN=f"scripts.{stage}", STATUS="2", DATA=str(data))
    calls, _ = sandbox.run(DATA=str(data))
    assert calls[0][1] == f"scripts.{stage}" and not any("--resume" in words for words in calls)


def test_another_budget_or_other_data_begin_anew(sandbox, tmp_path):
    (tmp_path / "notes").mkdir()
    for variables in ({"MINUTES": "7"}, {"MINUTES": "7", "DATA": "notes"}):
        sandbox.run(status=130, STOP_IN="scripts.mid_train", STATUS="130")
        calls, done = sandbox.run(**variables)
        assert modules(calls) == ON_A_CPU["DATA" in variables:] and not any("--resume" in words for words in calls)
        assert "going on" not in done.stdout


def test_each_new_run_is_marked_in_the_metrics_and_a_resumed_one_is_not(sandbox):
    sandbox.run(status=130, STOP_IN="scripts.mid_train", STATUS="130")
    sandbox.run()
    assert (sandbox.base / "metrics.jsonl").read_text(encoding="utf-8").count("start") == 1
    sandbox.run()
    assert (sandbox.base / "metrics.jsonl").read_text(encoding="utf-8").count("start") == 2


def test_arguments_are_refused_and_help_is_given():
    run = subprocess.run(["bash", "speedrun.sh", "MINUTES=3"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "MINUTES=3 bash speedrun.sh" in run.stderr and run.stderr.count("\n") == 1
    run = subprocess.run(["bash", "speedrun.sh", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "DRY_RUN=1" in run.stdout and "set -e" not in run.stdout


@pytest.mark.parametrize("variables, needle", [
    ({"DATA": "nowhere/x"}, "DATA=nowhere/x does not exist"), ({"MINUTES": "0"}, "above zero"), ({"MINUTES": "soon"}, "above zero"),
    ({"GPUS": "two"}, "GPUS=two")])
def test_bad_variables_are_one_line_before_anything_is_written(tmp_path, variables, needle):
    environment = {**os.environ, "DRY_RUN": "1", "NANOCHAT_BASE_DIR": str(tmp_path / "base"), **variables}
    run = subprocess.run(["bash", "speedrun.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and needle in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "base").exists()


def test_data_is_found_from_where_the_user_stands(tmp_path):
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    environment = {**os.environ, "DRY_RUN": "1", "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "DATA": "notes.txt"}
    run = subprocess.run(["bash", str(ROOT / "speedrun.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and f"--data={tmp_path}/notes.txt" in run.stdout
