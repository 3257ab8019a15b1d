"""speedrun.sh: which commands it runs on which hardware, and how a second call resumes a run."""
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, last_json
from speedrun_fakes import (
    Sandbox,
    environment_of,
    is_alive,
    is_resumed,
    module_of,
    modules,
    speedrun,
)

TRAINING = ("base_train", "mid_train", "chat_sft")
MODEL_STAGES = (*TRAINING, "chat_rl", "base_loss", "base_eval", "chat_eval")
ON_A_CPU = [
    "nanochat.dataset",
    "scripts.tok_train",
    "scripts.tok_eval",
    "scripts.base_train",
    "scripts.mid_train",
    "scripts.chat_sft",
    "scripts.chat_eval",
    "nanochat.report",
]
# where there are minutes for it
WITH_RL = [*ON_A_CPU[:6], "scripts.chat_rl", *ON_A_CPU[6:]]
ON_GPUS = [*WITH_RL[:4], "scripts.base_loss", "scripts.base_eval", *WITH_RL[4:]]


def dry_run(base, **variables):
    """The commands, each a list of words, of DRY_RUN=1."""
    done = speedrun(ROOT, DRY_RUN="1", NANOCHAT_BASE_DIR=str(base / "unused"), **variables)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not (base / "unused").exists(), "a dry run leaves nothing behind"
    return [shlex.split(line) for line in done.stdout.splitlines()]


def stage_of(words):
    return module_of(words).removeprefix("scripts.")


def minutes_of(commands):
    """{stage: minutes} of the stages that have a budget."""
    return {
        stage_of(words): float(word.partition("=")[2])
        for words in commands
        for word in words
        if word.startswith("--minutes=")
    }


def test_dry_run_on_a_cpu_is_a_quarter_of_an_hour(tmp_path):
    commands = dry_run(tmp_path)
    assert [module_of(words) for words in commands] == ON_A_CPU
    assert all(words[:2] == ["python", "-m"] for words in commands)
    assert commands[0] == ["python", "-m", "nanochat.dataset", "--source=local"]
    assert commands[-1][2:] == ["nanochat.report", "--speedrun"]
    assert commands == dry_run(tmp_path, MINUTES="15")


@pytest.mark.parametrize("minutes", ["0.5", "1", "2", "3", "15", "19.9"])
def test_the_training_stages_share_the_minutes(tmp_path, minutes):
    commands = dry_run(tmp_path, MINUTES=minutes)
    assert [module_of(words) for words in commands] == ON_A_CPU
    budget = minutes_of(commands)
    assert tuple(budget) == TRAINING and all(share > 0 for share in budget.values())
    assert abs(sum(budget.values()) - float(minutes)) < 0.01


@pytest.mark.parametrize("minutes, asked", [("0.5", ["--items=32"]), ("1.25", []), ("15", [])])
def test_a_run_of_seconds_is_asked_fewer_questions(tmp_path, minutes, asked):
    commands = dry_run(tmp_path, MINUTES=minutes)
    [evaluation] = [words for words in commands if "scripts.chat_eval" in words]
    assert evaluation[3:] == asked


@pytest.mark.parametrize("minutes, rl", [("20", 2.5), ("60", 7.5), ("600", 10)])
def test_from_twenty_minutes_on_reinforcement_learning_has_an_eighth(tmp_path, minutes, rl):
    commands = dry_run(tmp_path, MINUTES=minutes)
    assert [module_of(words) for words in commands] == WITH_RL
    budget = minutes_of(commands)
    assert tuple(budget) == (*TRAINING, "chat_rl") and budget["chat_rl"] == rl
    assert abs(sum(budget.values()) - float(minutes)) < 0.01
    [evaluation] = [words for words in commands if "scripts.chat_eval" in words]
    assert evaluation[3:] == ["--source=rl"], "the model of the last stage is evaluated"


def test_a_chat_about_ones_own_text_has_no_reinforcement_learning(tmp_path):
    commands = dry_run(tmp_path, MINUTES="60", DATA=str(tmp_path))
    assert [module_of(words) for words in commands] == ON_A_CPU[1:]


@pytest.mark.parametrize("stage", ["chat_rl", "base_eval", "base_loss"])
def test_a_stage_that_is_named_runs_where_it_would_be_left_out(tmp_path, stage):
    [words] = dry_run(tmp_path, STAGES=stage)
    assert words[2] == f"scripts.{stage}"


def locale_with_a_decimal_comma():
    """The name of one that is installed, or None."""
    listed = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    languages = re.compile(r"(de|es|fr|it|pl|pt|ru)_[A-Z]{2}\.utf-?8$", re.IGNORECASE)
    return next(filter(languages.match, listed), None)


@pytest.mark.skipif(shutil.which("locale") is None, reason="this system has no locales")
def test_a_locale_with_a_decimal_comma_changes_no_command(tmp_path):
    name = locale_with_a_decimal_comma()
    if name is None:
        pytest.skip("no locale with a decimal comma is installed")
    assert dry_run(tmp_path, MINUTES="2.5", LC_ALL=name) == dry_run(tmp_path, MINUTES="2.5")


def test_numbers_are_made_in_the_c_locale(tmp_path):
    """Also where no other locale is installed: the environment of awk shows it."""
    seen = tmp_path / "seen"
    awk = tmp_path / "awk"
    awk.write_text(
        f'#!/bin/sh\necho "$LC_ALL" >>"{seen}"\nexec "{shutil.which("awk")}" "$@"\n',
        encoding="utf-8",
    )
    awk.chmod(0o755)
    dry_run(tmp_path, LC_ALL="POSIX", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert seen.read_text(encoding="utf-8").splitlines() == ["C"] * 5


def test_dry_run_on_eight_gpus_is_the_documented_run(tmp_path):
    commands = dry_run(tmp_path, GPUS="8")
    fetch = ["python", "-m", "nanochat.dataset", "--source=fineweb", "-n"]
    assert commands[:2] == [[*fetch, "8"], [*fetch, "190", "&"]]
    assert commands.index(["wait"]) == 4, "after the tokenizer, before the pretraining"
    stages = [commands[0], *commands[2:4], *commands[5:]]
    modules = [module_of(words) for words in stages]
    assert modules == ON_GPUS
    for words in stages:
        if stage_of(words) in MODEL_STAGES:
            assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=8", "-m"]
            assert words[5] == "--", "settings follow the dashes"
            given = {"base_eval": ["--optional=1"], "chat_eval": ["--source=rl"]}
            assert words[6:] == given.get(stage_of(words), []), "the plan chooses the depth"
        else:
            assert words[0] == "python"
    assert minutes_of(stages) == {}


def test_one_gpu_needs_no_torchrun_and_a_budget_of_time_is_shared_out(tmp_path):
    commands = dry_run(tmp_path, GPUS="1")
    assert ["python", "-m", "scripts.base_train"] in commands
    assert not any("torchrun" in words for words in commands)
    commands = dry_run(tmp_path, GPUS="1", MINUTES="30")
    assert set(minutes_of(commands)) == {*TRAINING, "chat_rl"}


def test_as_much_text_is_fetched_as_the_planned_depth_needs(sandbox):
    calls, _ = sandbox.run(TORCH_SEES="1", PLANNED="12")
    assert [*FETCH, "54"] in calls
    _, done = sandbox.run(status=2, TORCH_SEES="1", PLAN_STATUS="2", NAME="another run")
    assert "stage" not in done.stdout


def test_a_given_model_reaches_the_pretraining_alone(tmp_path):
    commands = dry_run(tmp_path, MODEL="mla", MINUTES="3")
    given = [words for words in commands if "--model=mla" in words]
    assert ["scripts.base_train" in words for words in given] == [True]


# 20 tokens of 4.8 characters for each of 12 x depth x width^2 + 65,536 x width weights, by shards
# of 250 million, and 3.5 %
@pytest.mark.parametrize("depth, shards", [("1", 2), ("12", 54), ("20", 190), ("32", 694)])
def test_a_given_depth_reaches_the_pretraining_and_the_shards_that_it_needs(
        tmp_path, depth, shards):
    commands = dry_run(tmp_path, GPUS="1", DEPTH=depth)
    [base] = [words for words in commands if "scripts.base_train" in words]
    assert base[3:] == [f"--depth={depth}"]
    counts = [words[5] for words in commands if "nanochat.dataset" in words]
    assert counts == ([str(shards)] if shards < 8 else ["8", str(shards)])
    assert (["wait"] in commands) == (shards > 8)
    width = 64 * int(depth)
    characters = (12 * int(depth) * width**2 + 65536 * width) * 20 * 4.8
    assert shards * 250e6 >= characters


@pytest.mark.parametrize("model, has_rl", [("portable", True), ("llada", False)])
def test_a_given_class_reaches_the_pretraining_and_is_practised_if_it_can_be(
        tmp_path, model, has_rl):
    commands = dry_run(tmp_path, MODEL=model, MINUTES="30")
    [base] = [words for words in commands if "scripts.base_train" in words]
    assert f"--model={model}" in base
    assert has_rl == any("scripts.chat_rl" in words for words in commands)


@pytest.mark.parametrize("model, digits", [
    ("portable", ["--digits=1"]), ("gpt", []), ("mla", []), ("", [])])
def test_a_portable_model_has_a_vocabulary_that_llama_cpp_reads_alike(tmp_path, model, digits):
    """docs/traps.md: another-model-loads"""
    commands = dry_run(tmp_path, MODEL=model, DATA=str(tmp_path))
    [words] = [words for words in commands if "scripts.tok_train" in words]
    assert words[3:] == [f"--data={tmp_path}", *digits]
    given = [stage_of(words) for words in commands if "--digits=1" in words]
    assert given == (["tok_train"] if digits else [])


def test_a_resumed_portable_run_keeps_its_tokenizer(sandbox):
    sandbox.run(status=1, MODEL="portable", STOP_IN="scripts.base_train")
    calls, _ = sandbox.run(MODEL="portable")
    assert "scripts.tok_train" not in modules(calls)
    assert calls[0][:2] == ["-m", "scripts.base_train"] and is_resumed(calls[0])
    sandbox.run(status=1, MODEL="portable", STOP_IN="scripts.tok_train")
    calls, _ = sandbox.run(MODEL="portable")
    assert calls[0] == ["-m", "scripts.tok_train", "--digits=1"], "unfinished, it is trained again"


def test_the_batch_of_a_launcher_reaches_the_pretraining_alone(tmp_path):
    sizes = {"DEVICE_BATCH_SIZE": "7", "TOTAL_BATCH_SIZE": "516096"}
    commands = dry_run(tmp_path, GPUS="6", **sizes)
    given = [words for words in commands if "_batch_size=" in " ".join(words)]
    assert [words[4:] for words in given] == [
        ["scripts.base_train", "--", "--device_batch_size=7", "--total_batch_size=516096"]]


@pytest.mark.parametrize("gpus", ["0", "2"])
def test_stages_can_be_chosen(tmp_path, gpus):
    commands = dry_run(tmp_path, GPUS=gpus, STAGES="mid_train,report")
    assert [stage_of(words) for words in commands] == ["mid_train", "nanochat.report"]
    commands = dry_run(tmp_path, GPUS=gpus, STAGES="chat_sft")
    assert [stage_of(words) for words in commands] == ["chat_sft"]
    commands = dry_run(tmp_path, GPUS=gpus, STAGES="mid_train, chat_sft,")
    assert [stage_of(words) for words in commands] == ["mid_train", "chat_sft"]


def test_no_gpus_means_that_every_stage_with_a_model_runs_on_the_cpu(tmp_path):
    commands = dry_run(tmp_path, GPUS="0")
    assert [module_of(words) for words in commands] == ON_A_CPU
    for words in commands:
        assert ("--device_type=cpu" in words) == (stage_of(words) in MODEL_STAGES), words


@pytest.mark.parametrize("gpus", ["0", "8"])
def test_data_with_spaces_stays_one_word_and_needs_no_other_text(tmp_path, gpus):
    data = tmp_path / "my 'notes' & more"
    data.mkdir()
    commands = dry_run(tmp_path, DATA=str(data), GPUS=gpus)
    assert "nanochat.dataset" not in map(module_of, commands)
    reads = {"tok_train", "tok_eval", "base_train", "base_loss"}
    for words in commands:
        assert (f"--data={data}" in words) == (stage_of(words) in reads), words


@pytest.mark.parametrize("gpus", ["0", "8"])
def test_ones_own_conversations_and_name_are_handed_to_the_chat_stages(tmp_path, gpus):
    custom = tmp_path / "q & a.jsonl"
    custom.write_text("", encoding="utf-8")
    commands = dry_run(tmp_path, CUSTOM=str(custom), NAME="Bob $1's", GPUS=gpus)
    for words in commands:
        stage = stage_of(words)
        assert (f"--custom={custom}" in words) == (stage == "chat_sft"), words
        assert ("--name=Bob $1's" in words) == (stage in ("mid_train", "chat_sft")), words


def test_the_name_of_a_machine_under_windows_is_not_the_models(tmp_path):
    variables = {"NAME": "DESKTOP-1", "HOSTNAME": "DESKTOP-1", "WSL_DISTRO_NAME": "Debian"}
    assert dry_run(tmp_path, **variables) == dry_run(tmp_path)
    commands = dry_run(tmp_path, **{**variables, "NAME": "Bob"})
    assert sum("--name=Bob" in words for words in commands) == 2


@pytest.mark.parametrize("minutes", ["soon", "-3", "1e3", "3 4", "3m"])
def test_bad_minutes_are_one_line_and_status_2(tmp_path, minutes):
    base = str(tmp_path / "base")
    done = speedrun(ROOT, DRY_RUN="1", MINUTES=minutes, NANOCHAT_BASE_DIR=base)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and minutes in done.stderr and "MINUTES" in done.stderr


# --------------------------------------------------------------------------------------------------
# whole runs, with a python that only writes down what it was asked to do

@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_a_whole_run_ends_with_its_record_and_forgets_its_state(sandbox):
    calls, done = sandbox.run()
    assert modules(calls) == ON_A_CPU and not any(map(is_resumed, calls))
    assert last_json(done.stdout) == {"stage": "speedrun"}
    assert "chat_cli" in done.stdout and re.fullmatch(r"--seconds=\d+", calls[-1][-1])
    assert not list(sandbox.base.glob("speedrun.*")), "neither its state nor its process"
    assert modules(sandbox.run()[0]) == ON_A_CPU, "the next run is a new one"


@pytest.mark.parametrize("stage", TRAINING)
def test_an_interrupted_training_stage_is_resumed_and_no_finished_one_is(sandbox, stage):
    module = f"scripts.{stage}"
    place = ON_A_CPU.index(module)
    calls, done = sandbox.run(status=130, STOP_IN=module, STATUS="130")
    assert modules(calls) == ON_A_CPU[:place + 1]
    assert f"stopped in {stage} (status 130)" in done.stderr
    assert "same command resumes it" in done.stderr
    calls, done = sandbox.run(status=130, STOP_IN=module, STATUS="130")  # and stopped there again
    assert modules(calls) == [module]
    calls, done = sandbox.run()
    assert modules(calls) == ON_A_CPU[place:] and "resuming" in done.stdout
    assert [words[1] for words in calls if is_resumed(words)] == [module]


def closing_lines(done):
    """The lines behind "To talk to it:", without the last, the record."""
    return done.stdout.partition("To talk to it:\n")[2].splitlines()[:-1]


def test_the_closing_lines_are_commands_that_work_where_the_caller_stands(sandbox, tmp_path):
    _, done = sandbox.run(NANOCHAT_BASE_DIR="", HOME=str(tmp_path / "home"))
    cli, web, base = [line.split("  #")[0].strip() for line in closing_lines(done)]
    assert cli == "python -m scripts.chat_cli" and web == "python -m scripts.chat_web"
    assert shlex.split(base)[-2:] == ["scripts.complete", "My name is"]

    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    _, done = sandbox.run(cwd=elsewhere, NANOCHAT_BASE_DIR="my runs")
    folder, *commands = closing_lines(done)
    assert shlex.split(folder) == ["cd", str(sandbox.folder)]
    for command in commands:
        assert shlex.split(command)[0] == f"NANOCHAT_BASE_DIR={elsewhere}/my runs"


def test_the_closing_lines_name_models_that_are_not_the_newest(sandbox):
    _, done = sandbox.run(TAGS="--model_tag=d4-2 -")
    cli, web, base = [line.split("  #")[0].strip() for line in closing_lines(done)]
    assert cli.endswith("python -m scripts.chat_cli --model_tag=d4-2")
    assert web.endswith("python -m scripts.chat_web --model_tag=d4-2")
    assert shlex.split(base)[-2:] == ["scripts.complete", "My name is"]


def test_the_closing_lines_activate_an_environment_that_was_not_active(sandbox):
    fakes = sandbox.folder / ".venv" / "bin"
    fakes.mkdir(parents=True)
    for name in ("python", "torchrun"):
        shutil.copy(sandbox.folder / "bin" / name, fakes)
    setup = sandbox.folder / "scripts" / "setup.sh"
    setup.write_text('export PATH="$PWD/.venv/bin:$PATH"\n', encoding="utf-8")
    _, done = sandbox.run()
    assert closing_lines(done)[0].strip() == "source .venv/bin/activate"
    active = f"{fakes}:{sandbox.variables()['PATH']}"
    _, done = sandbox.run(PATH=active)
    assert "activate" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_alone_is_forwarded_to_the_stage_and_ends_both(sandbox, number):
    with sandbox.waiting_in("scripts.mid_train", MINUTES="3") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "the stage saves" in out
    assert f"stopped in mid_train (status {128 + number})" in err
    calls, _ = sandbox.run(MINUTES="3")
    assert calls[0][1] == "scripts.mid_train" and is_resumed(calls[0])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_a_stage_whose_script_was_killed_is_stopped_by_the_next_call(sandbox):
    with sandbox.waiting_in("scripts.base_train", output=subprocess.DEVNULL) as process:
        process.kill()
    state = sandbox.states()[0].read_text(encoding="utf-8")
    stage = int(re.findall(r"^pid (\d+)$", state, re.M)[-1])
    os.kill(stage, 0)  # it is still running
    calls, done = sandbox.run()
    assert f"stopping process {stage}" in done.stdout
    assert calls[0][1] == "scripts.base_train" and is_resumed(calls[0])
    status = Path(f"/proc/{stage}/stat")
    assert not status.exists() or status.read_text(encoding="utf-8").split()[2] == "Z"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_a_stage_whose_script_was_killed_is_stopped_by_a_call_with_another_plan(sandbox):
    """It would train beside the other, each in the time of the other."""
    with sandbox.waiting_in("scripts.base_train", output=subprocess.DEVNULL) as process:
        process.kill()
    state = sandbox.states()[0].read_text(encoding="utf-8")
    stage = int(re.findall(r"^pid (\d+)$", state, re.M)[-1])
    calls, done = sandbox.run(MINUTES="7")
    assert f"stopping process {stage}" in done.stdout and modules(calls) == ON_A_CPU
    status = Path(f"/proc/{stage}/stat")
    assert not status.exists() or status.read_text(encoding="utf-8").split()[2] == "Z"
    calls, _ = sandbox.run()
    assert is_resumed(calls[0]), "the first waits for its own command"


def test_a_stage_that_was_killed_after_its_record_is_not_repeated(sandbox):
    """It would be trained a second time, on the budget of the first."""
    sandbox.run(status=137, STOP_IN="scripts.base_train", STATUS="137", RECORDED="1")
    assert modules(sandbox.run()[0]) == ON_A_CPU[ON_A_CPU.index("scripts.mid_train"):]


def test_a_record_of_another_run_does_not_count(sandbox):
    """One may try a stage by hand before resuming."""
    sandbox.run(status=130, STOP_IN="scripts.base_train", STATUS="130")
    with open(sandbox.base / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "base_train", "run": null}\n')
        file.write('{"stage": "base_train", "run": "1763750000-1"}\n')
    calls, _ = sandbox.run()
    assert calls[0][1] == "scripts.base_train" and is_resumed(calls[0])


@pytest.mark.parametrize("stage", ["tok_train", "tok_eval", "chat_eval"])
def test_other_stages_simply_run_again_whatever_the_data_is_called(sandbox, tmp_path, stage):
    data = tmp_path / "base_train notes for chat_sft"
    data.mkdir()
    sandbox.run(status=2, STOP_IN=f"scripts.{stage}", STATUS="2", DATA=str(data))
    calls, _ = sandbox.run(DATA=str(data))
    assert calls[0][1] == f"scripts.{stage}" and not any(map(is_resumed, calls))


def runs_of(sandbox):
    """The names of the runs whose stages left records, in the order of their first ones."""
    lines = (sandbox.base / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["run"] for line in lines))


def test_another_budget_or_other_data_begin_a_run_and_the_first_waits_for_its_own_command(
    sandbox, tmp_path
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "qa.jsonl").touch()
    plans = [
        {"MINUTES": "7"},
        {"MINUTES": "7", "DATA": "notes"},
        {"MINUTES": "7", "CUSTOM": "qa.jsonl"},
        {"MINUTES": "7", "CUSTOM": "qa.jsonl", "NAME": "Bob"},
    ]
    sandbox.run(status=130, STOP_IN="scripts.mid_train", STATUS="130")
    for variables in plans:
        calls, done = sandbox.run(**variables)
        assert modules(calls) == ON_A_CPU["DATA" in variables:]
        assert not any(map(is_resumed, calls)) and "resuming" not in done.stdout
    assert len(sandbox.states()) == 1 and len(runs_of(sandbox)) == 5

    calls, done = sandbox.run()
    assert modules(calls) == ON_A_CPU[ON_A_CPU.index("scripts.mid_train"):]
    assert is_resumed(calls[0]) and "resuming" in done.stdout
    assert not sandbox.states() and len(runs_of(sandbox)) == 5


def test_two_runs_that_were_stopped_are_resumed_in_any_order(sandbox):
    stops = {"3": "scripts.base_train", "7": "scripts.chat_sft"}
    for minutes, module in stops.items():
        sandbox.run(status=130, STOP_IN=module, STATUS="130", MINUTES=minutes)
    for minutes, module in stops.items():
        calls, _ = sandbox.run(MINUTES=minutes)
        assert calls[0][1] == module and is_resumed(calls[0])


def test_a_second_run_is_refused_while_the_first_one_runs(sandbox):
    with sandbox.waiting_in("scripts.mid_train", MINUTES="3") as process:
        for minutes in ("3", "7"):
            calls, done = sandbox.run(status=2, MINUTES=minutes)
            assert not calls and done.stderr.count("\n") == 1
            assert f"(process {process.pid})" in done.stderr and "speedrun.sh" in done.stderr
            assert "NANOCHAT_BASE_DIR" in done.stderr
        assert process.poll() is None, "the first one is left alone"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert modules(sandbox.run(MINUTES="7")[0]) == ON_A_CPU


@pytest.mark.parametrize("left", ["", "999999999 speedrun.sh", "{pid} speedrun.sh", "1"])
def test_a_process_that_has_ended_or_is_another_program_refuses_no_run(sandbox, left):
    sandbox.base.mkdir()
    text = left.format(pid=os.getpid())  # pytest
    (sandbox.base / "speedrun.pid").write_text(text + "\n", encoding="utf-8")
    if left == "1":
        (sandbox.base / "speedrun.pid").write_text("1 no-such-script\n", encoding="utf-8")
    assert modules(sandbox.run()[0]) == ON_A_CPU


def test_bad_input_of_a_stage_must_be_mended_before_the_same_command_resumes(sandbox):
    _, done = sandbox.run(status=2, STOP_IN="scripts.base_train", STATUS="2")
    assert "Once that is mended, the same command resumes it." in done.stderr


def test_each_new_run_is_marked_in_the_metrics_and_a_resumed_one_is_not(sandbox):
    def starts():
        return (sandbox.base / "metrics.jsonl").read_text(encoding="utf-8").count("start")

    sandbox.run(status=130, STOP_IN="scripts.mid_train", STATUS="130")
    sandbox.run()
    assert starts() == 1
    sandbox.run()
    assert starts() == 2


# --------------------------------------------------------------------------------------------------
# how many GPUs

def test_all_gpus_that_torch_sees_are_used(sandbox):
    calls, _ = sandbox.run(TORCH_SEES="8")
    ranks = sandbox.ranks.read_text(encoding="utf-8").split()
    assert ranks == ["--nproc_per_node=8"] * len(MODEL_STAGES)
    assert "--source=fineweb" in calls[0]


def test_resume_is_a_setting_of_the_stage_and_not_of_torchrun(sandbox):
    """Also where the stage has no other setting."""
    sandbox.run(status=130, STOP_IN="scripts.mid_train", STATUS="130", TORCH_SEES="2")
    calls, _ = sandbox.run(TORCH_SEES="2")
    assert calls[0] == ["-m", "scripts.mid_train", "--", "--resume"]


@pytest.mark.parametrize("gpus, ranks", [("1", []), ("2", ["--nproc_per_node=2"] * 7), ("0", [])])
def test_a_number_of_gpus_is_honoured_where_there_are_eight(sandbox, gpus, ranks):
    calls, _ = sandbox.run(TORCH_SEES="8", GPUS=gpus)
    assert sandbox.ranks.read_text(encoding="utf-8").split() == ranks
    on_cpu = [words[1].removeprefix("scripts.") for words in calls if "--device_type=cpu" in words]
    assert on_cpu == ([*TRAINING, "chat_eval"] if gpus == "0" else [])


def refused(sandbox, *needles, **variables):
    """Asserts that the run is refused in one line that names `needles`, before anything is run."""
    calls, done = sandbox.run(status=2, **variables)
    assert not calls and done.stdout == "" and not sandbox.base.exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(needle in done.stderr for needle in needles), done.stderr


@pytest.mark.parametrize("seen, gpus", [("1", "2"), ("0", "1")])
def test_more_gpus_than_torch_sees_are_refused(sandbox, seen, gpus):
    refused(sandbox, f"GPUS={gpus}", f"torch sees {seen}", TORCH_SEES=seen, GPUS=gpus)


@pytest.mark.parametrize("asked", [{}, {"GPUS": "2"}])
def test_a_gpu_that_torch_does_not_see_is_refused_with_the_remedy(sandbox, tmp_path, asked):
    kfd = tmp_path / "kfd"
    kfd.touch()
    files = f"{tmp_path}/nvidia0 {kfd}"
    refused(sandbox, str(kfd), "driver", "--torch-backend", "GPUS=0", GPU_FILES=files, **asked)
    calls, _ = sandbox.run(GPU_FILES=files, GPUS="0")
    assert modules(calls) == ON_A_CPU
    assert sandbox.run(GPU_FILES=files, TORCH_SEES="1")[0], "torch sees it"


def test_a_python_that_fails_ends_the_run_and_does_not_train_on_the_cpu(sandbox):
    python = sandbox.folder / "bin" / "python"
    fake = python.read_text(encoding="utf-8")
    broken = 'if [ "$1" = -c ]; then echo "no torch" >&2; exit 1; fi'
    python.write_text(fake.replace("\n", f"\n{broken}\n", 1), encoding="utf-8")
    calls, done = sandbox.run(status=1)
    assert not calls and done.stderr == "no torch\n" and done.stdout == ""


def test_a_torchrun_that_does_not_wait_for_a_save_is_named(sandbox):
    assert "30 seconds after Ctrl+C" in sandbox.run(TORCH_SEES="2 30")[1].stdout
    assert "Ctrl+C" not in sandbox.run(TORCH_SEES="2 600")[1].stdout
    assert "Ctrl+C" not in sandbox.run(TORCH_SEES="1 30")[1].stdout


# --------------------------------------------------------------------------------------------------
# the text of a GPU's run, which is fetched while the tokenizer is trained

FETCH = ["-m", "nanochat.dataset", "--source=fineweb", "-n"]


def test_the_pretraining_waits_for_the_text(sandbox):
    process = sandbox.start(TORCH_SEES="2", WAIT_AT="190")
    sandbox.wait_for_call(process, "scripts.tok_eval")
    assert "scripts.base_train" not in sandbox.calls.read_text(encoding="utf-8")
    (sandbox.base / "arrived").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "in the background" in out
    calls = sandbox.calls.read_text(encoding="utf-8")
    assert calls.index("tok_eval") < calls.index("base_train")
    assert calls.count("nanochat.dataset") == 2


def test_a_download_that_fails_is_reported_before_the_pretraining_and_repeated(sandbox):
    calls, done = sandbox.run(status=1, TORCH_SEES="2", FAIL_AT="190")
    assert [*FETCH, "190"] in calls and "scripts.base_train" not in modules(calls)
    assert "2 shards are missing" in done.stderr
    assert "stopped in dataset_rest (status 1). The same command resumes it." in done.stderr
    calls, _ = sandbox.run(TORCH_SEES="2")
    assert calls[0] == [*FETCH, "190"] and calls[1][1] == "scripts.base_train"
    assert not is_resumed(calls[1])


def test_a_download_in_the_background_ends_with_the_script(sandbox):
    process = sandbox.start(TORCH_SEES="2", WAIT_AT="190")
    sandbox.wait_for_call(process, "scripts.tok_eval")
    [state] = sandbox.states()
    download = int(re.search(r"^background (\d+)$", state.read_text(encoding="utf-8"), re.M)[1])
    os.kill(download, 0)  # it is running
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "(status 143)" in err
    while is_alive(download):
        time.sleep(0.05)
    (sandbox.base / "arrived").touch()
    calls, _ = sandbox.run(TORCH_SEES="2", WAIT_AT="190")
    assert [*FETCH, "190"] in calls and "scripts.base_train" in modules(calls)


def test_ctrl_c_in_a_terminal_ends_the_wait_for_the_text_with_words(sandbox):
    """It reaches every process of the script, the one of `sleep` as well."""
    process = sandbox.start(TORCH_SEES="2", WAIT_AT="190", own_group=True)
    sandbox.wait_for_call(process, "scripts.tok_eval")
    [state] = sandbox.states()
    while state.read_text(encoding="utf-8").count("\nseconds ") < 3:
        time.sleep(0.05)
    time.sleep(0.5)     # until it waits
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped in dataset_rest (status 130). The same command resumes it." in err
    assert state.read_text(encoding="utf-8").count("\nseconds ") == 4


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_a_download_whose_script_was_killed_is_stopped_by_the_next_call(sandbox):
    """Two would write to the same files."""
    process = sandbox.start(TORCH_SEES="2", WAIT_AT="190", output=subprocess.DEVNULL)
    sandbox.wait_for_call(process, "scripts.tok_eval")
    process.kill()
    process.wait()
    [state] = sandbox.states()
    download = int(re.search(r"^background (\d+)$", state.read_text(encoding="utf-8"), re.M)[1])
    _, done = sandbox.run(TORCH_SEES="2")
    assert f"stopping process {download}" in done.stdout and not is_alive(download)


# --------------------------------------------------------------------------------------------------
# arguments, variables and folders

def test_arguments_are_refused_and_help_is_given():
    command = ["bash", "speedrun.sh"]
    run = subprocess.run([*command, "MINUTES=3"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "MINUTES=3 bash speedrun.sh" in run.stderr
    run = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "DRY_RUN=1" in run.stdout and "set -e" not in run.stdout


@pytest.mark.parametrize("variables, needle", [
    ({"DATA": "nowhere/x"}, "DATA=nowhere/x does not exist"),
    ({"CUSTOM": "nowhere.jsonl"}, "CUSTOM=nowhere.jsonl is not a file"),
    ({"CUSTOM": "/"}, "CUSTOM=/ is not a file"),
    ({"NAME": "a\nb"}, "one line"),
    ({"NAME": "x" * 61}, "60 characters"),
    ({"MINUTES": "0"}, "above zero"),
    ({"MINUTES": "soon"}, "above zero"),
    ({"GPUS": "two"}, "GPUS=two"),
    ({"GPUS": "-1"}, "GPUS=-1"),
    ({"DEPTH": "deep"}, "DEPTH=deep"),
    ({"MODEL": "gpt5"}, "MODEL=gpt5 does not exist"),
    ({"MODEL": "lookup_ngrams"}, "MODEL=lookup_ngrams does not exist"),
    ({"DEVICE_BATCH_SIZE": "0"}, "DEVICE_BATCH_SIZE=0"),
    ({"STAGES": "report"}, "python -m nanochat.report"),
    ({"STAGES": ", "}, "STAGES=,  names no stage"),
    ({"STAGES": "mid_train,chat_dpo"}, "chat_dpo, which is no stage: choose from dataset,"),
])
def test_bad_variables_are_one_line_before_anything_is_written(tmp_path, variables, needle):
    base = tmp_path / "base"
    run = speedrun(ROOT, DRY_RUN="1", NANOCHAT_BASE_DIR=str(base), **variables)
    assert run.returncode == 2 and needle in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not base.exists()


@pytest.mark.parametrize("variables, needle", [
    ({"CUSTOM": "mine.jsonl"}, "line 1 is not JSON"),
    ({"NAME": "a\tb"}, "not a name"),
])
def test_what_a_chat_stage_would_refuse_is_refused_before_the_pretraining(
        sandbox, tmp_path, variables, needle):
    """With the real Python for the check alone."""
    (tmp_path / "mine.jsonl").write_text("Hello", encoding="utf-8")
    python = tmp_path / "bin" / "python"
    fake = python.read_text(encoding="utf-8")
    real = f'if [[ "$1" = -c && "$2" == *tasks* ]]; then cd {ROOT}; exec {sys.executable} "$@"; fi'
    python.write_text(fake.replace("\n", f"\n{real}\n", 1), encoding="utf-8")
    refused(sandbox, needle, **variables)

    (tmp_path / "mine.jsonl").write_text('{"q": "Hello", "a": "Hi."}', encoding="utf-8")
    calls, done = sandbox.run(CUSTOM="mine.jsonl", NAME="Bob")
    assert modules(calls) == ON_A_CPU and "1 conversations" in done.stdout
    assert f"--custom={tmp_path}/mine.jsonl" in calls[-3] and "--name=Bob" in calls[-3]


def test_data_is_found_from_where_the_user_stands(tmp_path):
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    run = speedrun(ROOT, tmp_path, DRY_RUN="1", DATA="notes.txt")
    assert run.returncode == 0 and f"--data={tmp_path}/notes.txt" in run.stdout


@pytest.mark.parametrize("given, meant", [
    ("runs/one", "here/runs/one"),
    ("~/runs", "home/runs"),
    ("~", "home"),
    ("", "home/.cache/nanochat"),
])
def test_shell_and_python_share_the_callers_base_folder(sandbox, tmp_path, given, meant):
    here = tmp_path / "here"
    here.mkdir()
    folders = {"NANOCHAT_BASE_DIR": given, "HOME": str(tmp_path / "home")}
    module = "scripts.tok_eval"
    _, done = sandbox.run(status=1, cwd=here, STOP_IN=module, **folders)
    base = tmp_path / meant
    [state] = base.glob("speedrun.*.state")  # the shell's
    assert '"tok_train"' in (base / "metrics.jsonl").read_text(encoding="utf-8"), "Python's"
    calls, done = sandbox.run(cwd=here, **folders)
    assert modules(calls)[0] == module and str(state) in done.stdout


NO_HOME = ["env", "-u", "HOME", "-u", "NANOCHAT_BASE_DIR", "DRY_RUN=1"]


def test_without_home_the_systems_list_of_users_says_where_it_is():
    command = [*NO_HOME, "bash", "-x", "speedrun.sh"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert run.returncode == 0 and f"NANOCHAT_BASE_DIR={home}/.cache/nanochat" in run.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become an unlisted user")
@pytest.mark.parametrize("given", [None, "~", "~/x"])
def test_an_unlisted_user_without_home_is_told_what_to_set(given):
    unlisted = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv here")
    folder = [f"NANOCHAT_BASE_DIR={given}"] if given else []
    run = subprocess.run(
        [*unlisted, *NO_HOME, *folder, "bash", str(ROOT / "speedrun.sh")],
        capture_output=True,
        text=True,
    )
    if "Permission denied" in run.stderr:
        pytest.skip("another user may not read the repository")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stdout == ""
    assert "set NANOCHAT_BASE_DIR to a folder you can write" in run.stderr


@pytest.mark.parametrize("given, meant", [
    ("~root/x", "x"),
    ("~root", ""),
    ("~no-such-user/x", None),
    ("~$(touch ran)/x", None),
    ("~0/x", None),
    ("~+/x", None),
])
def test_the_home_of_a_named_user_is_expanded_and_nothing_else(tmp_path, given, meant):
    run = subprocess.run(
        ["bash", "-x", str(ROOT / "speedrun.sh")],
        cwd=tmp_path,
        env=environment_of(DRY_RUN="1", NANOCHAT_BASE_DIR=given),
        capture_output=True,
        text=True,
    )
    assert not list(tmp_path.iterdir())
    if meant is None:
        assert run.returncode == 2 and f"error: {given}: there is no user" in run.stderr
    else:
        path = os.path.join(pwd.getpwnam("root").pw_dir, meant).rstrip("/")
        assert f"NANOCHAT_BASE_DIR={path}\n" in run.stderr
