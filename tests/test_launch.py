"""launch_6x_amd_xtx.sh: what it sets, which cards and batch it takes, and what it then runs.

rocm-smi, torchrun and python are fakes: no card is needed, and none is seen.
"""
import shlex
import shutil
import subprocess

import pytest

from conftest import ROOT
from nanochat.forecast import assumed_machine
from nanochat.gpt import GPT
from nanochat.plan import Budget, make_plan
from speedrun_fakes import Sandbox, modules, speedrun

SCRIPT = "launch_6x_amd_xtx.sh"
DOCUMENTED = {
    "HSA_FORCE_FINE_GRAIN_PCIE": "1",
    "HSA_ENABLE_INTERRUPT": "1",
    "HSA_XNACK": "0",
    "NCCL_P2P_LEVEL": "PHB",
    "NCCL_P2P_DISABLE": "0",
    "NCCL_BUFFSIZE": "33554432",
    "NCCL_IB_DISABLE": "1",
    "NCCL_DMABUF_ENABLE": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:False",
}
OF_THE_USER = (*DOCUMENTED, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF",
               "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NCCL_MIN_NCHANNELS")
GIB = 2**30
XTX = 25_753_026_560    # bytes of a 7900 XTX
RAPHAEL = 536_870_912   # of the GPU in a desktop processor
ROCM_SMI = r"""#!/usr/bin/env bash
if [ "$*" != "--showmeminfo vram --csv" ] || [ -z "$CARDS" ]; then exit 1; fi
echo "WARNING: AMD GPU device(s) is/are in a low-power state."
echo "device,VRAM Total Memory (B),VRAM Total Used Memory (B)"
number=0
for bytes in $CARDS; do
    echo "card$number,$bytes,27754496"
    number=$((number + 1))
done
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Sandbox of six cards."""
    for name in OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    sandbox = Sandbox(tmp_path)
    rocm_smi = tmp_path / "bin" / "rocm-smi"
    rocm_smi.write_text(ROCM_SMI, encoding="utf-8")
    rocm_smi.chmod(0o755)
    return sandbox


def launch(machine, *words, cards=(XTX,) * 6, **variables):
    """The finished process."""
    machine.calls.write_text("", encoding="utf-8")
    machine.ranks.write_text("", encoding="utf-8")
    variables = machine.variables(CARDS=" ".join(map(str, cards)), **variables)
    return speedrun(machine.folder, script=SCRIPT, words=words, **variables)


def dry_run(machine, *words, **options):
    """({name: value} of the exports, the commands, the lines on standard error)."""
    done = launch(machine, "--dry_run=1", *words, **options)
    assert done.returncode == 0, done.stderr
    assert not machine.base.exists() and machine.calls.read_text(encoding="utf-8") == ""
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    exports = dict(words[1].split("=", 1) for words in lines if words[0] == "export")
    return exports, [words for words in lines if words[0] != "export"], done.stderr.splitlines()


def settings_of(commands, stage):
    """The settings of a stage, a list of words."""
    [words] = [words for words in commands if f"scripts.{stage}" in words]
    behind = words[words.index(f"scripts.{stage}") + 1:]
    return [word for word in behind if word != "--"]


# docs/traps.md: nccl-channels, expandable-segments
def test_six_cards_get_the_documented_variables_depth_and_batch(machine):
    exports, commands, err = dry_run(machine)
    assert exports == DOCUMENTED, "and no NCCL_MIN_NCHANNELS"
    assert not err and "190" in commands[1]
    assert [words[2] for words in commands if words[0] == "torchrun"] == ["--nproc_per_node=6"] * 7
    assert settings_of(commands, "base_train") == [
        "--depth=20", "--device_batch_size=7", "--total_batch_size=516096"]
    assert settings_of(commands, "mid_train") == []


def test_a_machine_without_cards_shows_the_documented_run(machine):
    _, commands, err = dry_run(machine, cards=())
    assert err == ["warning: rocm-smi lists no GPU here: as if there were six of 24 GB"]
    assert commands == dry_run(machine)[1]


def test_what_the_user_has_exported_stands(machine):
    exports, _, _ = dry_run(
        machine, HSA_XNACK="1", NCCL_P2P_LEVEL="SYS", PYTORCH_HIP_ALLOC_CONF="")
    assert exports["HSA_XNACK"] == "1" and exports["NCCL_P2P_LEVEL"] == "SYS"
    assert "PYTORCH_ALLOC_CONF" not in exports and len(exports) == len(DOCUMENTED) - 1


# docs/traps.md: nccl-channels
@pytest.mark.parametrize("cards, visible", [
    ((XTX, XTX, RAPHAEL), "0,1"),
    ((RAPHAEL, XTX, XTX), "1,2"),
    ((XTX, 16 * GIB), None),
    ((RAPHAEL,), None),
])
def test_integrated_gpus_are_hidden(machine, cards, visible):
    exports, commands, _ = dry_run(machine, "--depth=2", cards=cards)
    assert exports.get("HIP_VISIBLE_DEVICES") == visible
    ranks = [words[2] for words in commands if words[0] == "torchrun"]
    several = len(cards) > 1
    assert ranks == (["--nproc_per_node=2"] * 7 if several else [])


def test_devices_that_the_user_has_made_visible_stand(machine):
    exports, commands, _ = dry_run(machine, cards=(RAPHAEL, XTX, XTX), HIP_VISIBLE_DEVICES="2")
    assert "HIP_VISIBLE_DEVICES" not in exports
    assert not any(words[0] == "torchrun" for words in commands)


# sequences: on 1, 6 and 7 cards
@pytest.mark.parametrize("gib, sequences", [
    (10, (2, 2, 2)), (16, (4, 4, 4)), (20, (5, 5, 5)), (24, (7, 7, 7)), (32, (9, 8, 9)),
    (48, (15, 14, 12)), (192, (32, 21, 18))])
@pytest.mark.parametrize("gpus", [1, 6, 7])
def test_the_batch_is_one_that_base_train_accepts(machine, gib, sequences, gpus):
    _, commands, _ = dry_run(machine, f"--gpus={gpus}", cards=(gib * GIB,) * 8)
    _, device, total = settings_of(commands, "base_train")
    device, total = int(device.partition("=")[2]), int(total.partition("=")[2])
    assert device == sequences[(1, 6, 7).index(gpus)]
    assert 0.9 * 524_288 <= total <= 524_288

    settings = {
        **dict.fromkeys(("max_seq_len", "kv_heads", "weight_decay")), "depth": 20, "keep": 3,
        "device_batch_size": device, "total_batch_size": total}
    cards = assumed_machine("7900-xtx", gpus, memory=gib * GIB)
    plan = make_plan(settings, Budget("num_iterations", 10), cards, GPT, 65_536, speed=None)
    assert (plan.batch.micro_batch_size, plan.batch.total_batch_size) == (device, total)
    assert plan.memory.total <= cards.memory


def test_minutes_leave_the_depth_to_the_plan(machine):
    _, commands, _ = dry_run(machine, MINUTES="30")
    [budget] = settings_of(commands, "base_train")
    assert budget.startswith("--minutes=")
    _, commands, _ = dry_run(machine, "--depth=12", MINUTES="30")
    assert settings_of(commands, "base_train")[0] == "--depth=12"


def test_what_the_command_says_stands_before_what_is_exported(machine):
    every = (
        "dataset,tok_train,tok_eval,base_train,base_loss,base_eval,mid_train,chat_sft,chat_rl,"
        "chat_eval,report")
    _, commands, _ = dry_run(machine, f"--stages={every}", STAGES="mid_train")
    assert commands == dry_run(machine)[1]
    done = launch(machine, "--dry_run=0", TORCH_SEES="6", DRY_RUN="1")
    assert done.returncode == 0 and "base_train" in machine.calls.read_text(encoding="utf-8")


def test_the_batch_follows_from_the_smallest_card_and_other_depths_leave_it_to_the_plan(machine):
    _, commands, _ = dry_run(machine, cards=(XTX, 16 * GIB))
    assert "--device_batch_size=4" in settings_of(commands, "base_train")
    _, commands, _ = dry_run(machine, "--depth=12")
    assert settings_of(commands, "base_train") == ["--depth=12"]
    _, commands, _ = dry_run(machine, "--vram_gb=16")
    assert "--device_batch_size=4" in settings_of(commands, "base_train")
    _, commands, _ = dry_run(machine, "--depth=12", "--device_batch_size=6")
    assert settings_of(commands, "base_train") == [
        "--depth=12", "--device_batch_size=6", "--total_batch_size=516096"]


def test_stages_are_chosen_or_left_out(machine):
    def stages(*words, **variables):
        commands = dry_run(machine, *words, **variables)[1]
        return [words[words.index("-m") + 1].removeprefix("scripts.") for words in commands]

    assert stages("--stages=chat_sft,mid_train") == ["mid_train", "chat_sft"]
    assert stages("--skip=dataset,tok_train,tok_eval,base_train,chat_eval,report") == [
        "base_loss", "base_eval", "mid_train", "chat_sft", "chat_rl"]
    assert stages("--stages=mid_train,chat_sft", "--skip=chat_sft") == ["mid_train"]
    # reinforcement learning needs minutes, or to be named
    assert stages("--skip=dataset,report", MINUTES="10")[-2:] == ["chat_sft", "chat_eval"]
    assert stages("--stages=chat_sft,chat_rl", MINUTES="10") == ["chat_sft", "chat_rl"]
    assert stages("--stages=mid_train, chat_sft") == ["mid_train", "chat_sft"]


@pytest.mark.parametrize("words, needle", [
    (["--gpus=0"], "gpus=0 is not a whole number"),
    (["--gpus=six"], "gpus=six"),
    (["--gpus=7"], "--gpus=7, but there are 6 cards"),
    (["--depth=-2"], "depth=-2"),
    (["--stages=base"], "base is no stage: choose from dataset,"),
    (["--skip=chat_dpo"], "chat_dpo is no stage"),
    (["--stages=mid_train", "--skip=mid_train"], "leave no stage"),
    (["--stages=,"], "leave no stage"),
    (["--dry_run=yes"], "unknown word '--dry_run=yes': choose from --gpus=N"),
    (["6"], "unknown word '6'"),
    (["--vram_gb=9"], "9 GB of memory are too few for depth 20: give --depth=12"),
])
def test_bad_input_is_one_line_and_status_2(machine, words, needle):
    done = launch(machine, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert needle in done.stderr
    assert machine.calls.read_text(encoding="utf-8") == ""


def test_a_machine_without_cards_is_refused_with_the_remedy_and_may_be_described(machine):
    done = launch(machine, cards=())
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--gpus=6 --vram_gb=24" in done.stderr and "--dry_run=1" in done.stderr
    done = launch(machine, "--gpus=2", "--vram_gb=24", cards=(), TORCH_SEES="2")
    assert done.returncode == 0, done.stderr


def test_help_lists_the_settings():
    done = subprocess.run(["bash", SCRIPT, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("gpus", "depth", "device_batch_size", "stages", "skip", "vram_gb", "dry_run"):
        assert f"--{name}=" in done.stdout
    assert "set -e" not in done.stdout


# ------------------------------------------------------------------------------------------------
# what it runs

def environment_of_training(machine):
    text = (machine.folder / "calls.scripts.base_train.environment").read_text(encoding="utf-8")
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def calls_of(machine):
    return [shlex.split(line) for line in machine.calls.read_text(encoding="utf-8").splitlines()]


def test_the_stages_run_on_all_cards_with_the_variables_after_a_test_of_the_cards(machine):
    done = launch(machine, TORCH_SEES="6")
    assert done.returncode == 0, done.stderr
    first, *calls = calls_of(machine)
    assert first == ["probe"], "before anything else"
    assert modules(calls)[-1] == "nanochat.report"
    assert set(machine.ranks.read_text(encoding="utf-8").split()) == {"--nproc_per_node=6"}
    environment = environment_of_training(machine)
    assert DOCUMENTED.items() <= environment.items()
    assert "NCCL_MIN_NCHANNELS" not in environment


def test_cards_that_cannot_reach_each_other_train_through_the_memory_of_the_cpu(machine):
    done = launch(machine, TORCH_SEES="6", PROBE="export NCCL_P2P_DISABLE=1: hangs after 40 s")
    assert done.returncode == 0 and "training with NCCL_P2P_DISABLE=1" in done.stdout
    assert environment_of_training(machine)["NCCL_P2P_DISABLE"] == "1"


def test_a_user_who_has_decided_about_peer_to_peer_is_not_asked(machine):
    done = launch(machine, TORCH_SEES="6", NCCL_P2P_DISABLE="0", PROBE="export NCCL_P2P_DISABLE=1:")
    assert done.returncode == 0 and ["probe"] not in calls_of(machine)
    assert environment_of_training(machine)["NCCL_P2P_DISABLE"] == "0"


def test_a_set_up_that_fails_ends_the_launcher(machine):
    (machine.folder / "scripts" / "setup.sh").write_text(
        'echo "setup: no compiler" >&2; return 1\n', encoding="utf-8")
    done = launch(machine, TORCH_SEES="6")
    assert done.returncode == 1 and done.stderr == "setup: no compiler\n" and done.stdout == ""


def test_the_closing_lines_are_those_of_speedrun_for_the_callers_environment(machine):
    fakes = machine.folder / ".venv" / "bin"
    fakes.mkdir(parents=True)
    for name in ("python", "torchrun"):
        shutil.copy(machine.folder / "bin" / name, fakes)
    setup = machine.folder / "scripts" / "setup.sh"
    setup.write_text(f'export PATH="{fakes}:$PATH"\n', encoding="utf-8")
    done = launch(machine, TORCH_SEES="6")
    assert "source .venv/bin/activate" in done.stdout


def test_one_card_has_no_peer(machine):
    done = launch(machine, "--gpus=1", TORCH_SEES="6")
    assert done.returncode == 0 and ["probe"] not in calls_of(machine)


def test_the_same_command_resumes_what_was_interrupted(machine):
    done = launch(machine, TORCH_SEES="6", STOP_IN="scripts.base_train", STATUS="130")
    assert done.returncode == 130 and "The same command resumes it" in done.stderr
    launch(machine, TORCH_SEES="6")
    _, first, *_ = calls_of(machine)
    assert first[1] == "scripts.base_train" and first[-1] == "--resume"
