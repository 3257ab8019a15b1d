"""The first GPU hour, proven without a GPU: its commands, its clock, what it reads and writes.

And the two tools that it brings: the profile of a step and the times of the two kernels.
"""
import json
import os
import subprocess
import sys
import time
import types

import pytest

from conftest import ROOT, last_json
from nanochat.common import UserError
from nanochat.configurator import _declared
from scripts import gpu_checklist as checklist
from scripts import profile_step
from scripts.gpu_checklist import STEPS, Command, Failed, Setup, Step
from scripts.profile_step import LABEL, Piece, account, covered, kind_of
from speedrun_fakes import is_alive

SETUPS = [
    Setup(size, gpus, data, online)
    for size in checklist.SIZES
    for gpus in (1, 8)
    for data, online in (("", True), ("", False), ("my.txt", True))
]


def commands_of(setup):
    return [command for step in STEPS for command in step.commands(setup)]


# --------------------------------------------------------------------------------------------------
# the commands

@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup.size}-{setup.gpus}")
def test_every_command_is_a_module_with_settings_that_it_has(setup):
    for command in commands_of(setup):
        module, *options = command.words
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), module
        if module == "nanochat.dataset":
            assert options in ([], ["-n", "8"])
            continue
        declared = _declared(path)
        names = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in options]
        assert set(names) <= declared.keys(), (module, set(names) - declared.keys())


def test_a_run_on_several_devices_starts_under_torchrun():
    alone = Command(["scripts.base_train", "--depth=1"]).line()
    several = Command(["scripts.base_train", "--depth=1"], ranks=3).line()
    assert alone == [sys.executable, "-m", "scripts.base_train", "--depth=1"]
    assert several[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
        "-m", "scripts.base_train", "--", "--depth=1"]


def test_the_short_list_ends_within_twelve_minutes_on_one_gpu():
    alone = [step for step in STEPS if step.least_gpus == 1]
    assert sum(step.limit("short") for step in alone) <= 12 * 60
    assert sum(step.limit("full") for step in STEPS) <= 95 * 60


def test_text_comes_from_the_hub_where_it_answers():
    [step] = [step for step in STEPS if step.name == "text"]
    first = [step.commands(setup)[0].words for setup in SETUPS[:3]]
    assert first[0] == ["nanochat.dataset", "-n", "8"]
    assert first[1] == ["nanochat.dataset"]
    assert first[2][:2] == ["scripts.tok_train", "--data=my.txt"]


def test_a_step_that_trains_brings_its_text_where_there_is_none():
    def names(steps, has_tokenizer):
        wanted = checklist.with_text(checklist.chosen_steps(steps), has_tokenizer)
        return [step.name for step in wanted]

    assert names("depth12,profile", False) == ["text", "profile", "depth12"]
    assert names("depth12", True) == ["depth12"]
    assert names("profile", False) == ["profile"]
    assert names("text,depth12", False) == ["text", "depth12"]
    assert checklist.TRAIN_ON_TEXT <= {step.name for step in STEPS}


def test_three_seeds_of_both_models_have_equal_minutes():
    [step] = [step for step in STEPS if step.name == "models"]
    commands = step.commands(SETUPS[0])
    minutes = {word for command in commands for word in command.words if "--minutes" in word}
    assert len(commands) == 6 and len(minutes) == 1
    assert len({command.words[1] for command in commands}) == 6    # a tag for each


# --------------------------------------------------------------------------------------------------
# what is read from the records

@pytest.mark.parametrize("gains, words", [
    ([0.01, 0.02, 0.03], "--model=lookup"),
    ([-0.01, -0.02, -0.03], "--model=gpt: better"),
    ([-0.01, 0.02, 0.03], "--model=gpt: the seeds disagree"),
    ([0.01], "nothing: 3 seeds are needed"),
])
def test_three_seeds_decide_and_one_does_not(gains, words):
    assert checklist.verdict(gains).startswith(words)


def test_memory_stands_beside_the_plan_and_what_the_log_warns_of(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "attention kernel: cudnn\nWARNING: compiled loss: off\n[0/1] Recompiling function f\n",
        encoding="utf-8")
    record = {
        "tokens_per_second": 8000.0, "ranks": 8, "mfu": 0.48, "peak_memory": 50e9,
        "planned_memory": 40e9, "log": str(log)}
    figures = checklist.depth_figures([record])
    assert figures["tokens/s of a device"] == 1000 and figures["peak / planned"] == 1.25
    assert figures["attention"] == "cudnn"
    assert figures["warnings"] == figures["recompilations"] == 1
    without = {**record, "peak_memory": None, "mfu": None}
    assert list(checklist.run_figures(without)) == ["tokens/s of a device"]


def test_fp8_is_compared_with_bf16_of_the_same_shape():
    [step] = [step for step in STEPS if step.name == "fp8"]
    commands = [command.words for command in step.commands(SETUPS[0])]
    shapes = [[word for word in words if "fp8" not in word] for words in commands]
    assert shapes[0] == shapes[1] == shapes[2] == commands[0]
    settings = [(None, None), ("hybrid", None), ("hybrid", "rowwise")]
    records = [
        {"settings": {"fp8": fp8, "fp8_scaling": scaling}, "tokens_per_second": speed}
        for (fp8, scaling), speed in zip(settings, (100.0, 117.0, 90.0))]
    figures = checklist.fp8_figures(records)
    assert figures["hybrid tensorwise / bf16"] == 1.17
    assert figures["hybrid rowwise / bf16"] == 0.9


def test_bits_per_byte_are_compared_by_seed():
    bpbs = [("gpt", 1.0), ("lookup", 0.9), ("gpt", 1.2), ("lookup", 1.15), ("gpt", 1.1),
            ("lookup", 1.0)]
    records = [{"settings": {"model": model}, "val_bpb": bpb} for model, bpb in bpbs]
    figures = checklist.model_figures(records)
    assert figures["gpt bpb"] == pytest.approx(1.1)
    assert figures["lookup's gain, least"] == pytest.approx(0.05)
    assert figures["decides"].startswith("--model=lookup")


@pytest.mark.parametrize("text, reason", [
    ("a\nerror: parallel=fsdp is unknown\n====\nE1126 agent.py exit code 2\n",
     "error: parallel=fsdp is unknown"),
    ("Traceback\n  File\nRuntimeError: it broke\nmore\n=====\n", "RuntimeError: it broke"),
    ("[rank1]: torch.OutOfMemoryError: CUDA\n=====\n", "[rank1]: torch.OutOfMemoryError: CUDA"),
    ("the last words\n-----\n", "the last words"),
    ("", "without a word"),
])
def test_the_reason_of_a_failure_is_found_in_the_output(text, reason):
    assert checklist.reason_of(text) == reason


def test_a_table_row_for_each_step_whatever_became_of_it():
    rows = [
        {"step": "a", "status": "ok", "figures": {"tokens/s": 148_123.4}, "expected": "148 k",
         "seconds": 60.2, "machine": {"gpus": ["H100", "H100"], "torch": "2.10"}},
        {"step": "b", "status": "failed", "error": "exit | status 1", "expected": "x",
         "seconds": 1},
    ]
    heading = checklist.heading_of(rows, SETUPS[0])
    table = checklist.summary(rows, heading).split("\n")
    assert "2 x H100, torch 2.10, full checklist" in table[0]
    assert table[4] == "| a | tokens/s 148,123 | 148 k | 60 |"
    assert table[5] == "| b | failed: exit / status 1 | x | 1 |"


# --------------------------------------------------------------------------------------------------
# running

class Fake:
    """A command of Python code."""

    def __init__(self, code, kill_tag=""):
        self.code, self.kill_tag, self.words = code, kill_tag, ["fake"]
        self.variables = {"TORCH_LOGS": "recompiles"}

    def line(self):
        return [sys.executable, "-c", self.code]


RECORD = 'print("text"); print(\'{"stage": "x", "n": 1}\'); print("a word behind")'
SLOW = "import time; time.sleep(60)"
STOPPED = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"], "base_checkpoints", "killed")
folder.mkdir(parents=True)
(folder / "log.jsonl").write_text('{"step": 1, "loss": 2}\\n' * 4)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    def run(command, seconds=60):
        deadline = time.monotonic() + seconds
        return checklist.run_command(command, tmp_path / "log", tmp_path / "base", deadline)
    return run


def test_a_command_gives_its_last_json_line(run):
    record = run(Fake(RECORD))
    assert record.pop("log").endswith("log") and record == {"stage": "x", "n": 1}
    assert list(run(Fake("print(1)"))) == ["log"]
    shown = run(Fake("import os, json; print(json.dumps({'it': os.environ['TORCH_LOGS']}))"))
    assert shown["it"] == "recompiles"


def test_a_command_that_fails_or_hangs_is_told(run):
    with pytest.raises(Failed, match="exit status 3: without a word"):
        run(Fake("raise SystemExit(3)"))
    begin = time.monotonic()
    with pytest.raises(Failed, match="no end after"):
        run(Fake(SLOW), seconds=0.5)
    assert time.monotonic() - begin < 30


RANK = """
import os, pathlib, time
path = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"], os.environ["RANK"])
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(120)
"""


def test_the_ranks_of_a_command_that_hangs_end_with_it(run, tmp_path, monkeypatch):
    """torchrun starts each in a session of its own; they would keep the memory of their GPUs."""
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    command = Fake("")
    command.line = lambda: [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(tmp_path / "rank.py")]

    def wait_for_ranks(process, *_):
        while not ((base / "0").exists() and (base / "1").exists()):
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            time.sleep(0.05)
        raise Failed("no end")

    monkeypatch.setattr(checklist, "wait_for", wait_for_ranks)
    with pytest.raises(Failed, match="no end"):
        run(command)
    for name in ("0", "1"):
        assert not is_alive(int((base / name).read_text(encoding="utf-8")))


def test_a_run_is_stopped_once_it_has_trained_some_steps(run):
    assert run(Fake(STOPPED, kill_tag="killed")) == {"stopped_at": 4}
    with pytest.raises(Failed, match="before it could be stopped"):
        run(Fake("pass", kill_tag="other"))
    with pytest.raises(Failed, match="exit status 2: error: no tokenizer"):
        run(Fake("print('error: no tokenizer'); raise SystemExit(2)", kill_tag="other"))


SETTINGS = {"gpus": None, "minutes": None}


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checklist.path_of("~/results") == tmp_path / "results"
    assert checklist.path_of("results").is_absolute()


def step_of(name, code, figures=lambda records: {"n": records[0]["n"]}, least_gpus=1):
    limits = (60, 60, 60)
    return Step(name, lambda setup: [Fake(code)], figures, limits, "nothing", least_gpus)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, base_dir, monkeypatch, capsys):
    fakes = [
        step_of("one", RECORD),
        step_of("two", "raise SystemExit(1)"),
        step_of("three", "print(1)"),                # no record: its figures are missing
        step_of("four", RECORD, least_gpus=2),
        step_of("five", RECORD),
        step_of("six", RECORD, lambda records: {"rate": 1 / records[0].get("rate")}),
        step_of("seven", RECORD, lambda records: {"rate": None}),
    ]
    monkeypatch.setattr(checklist, "STEPS", fakes)
    monkeypatch.setattr(checklist, "count_gpus", lambda: 1)
    monkeypatch.setattr(checklist, "out", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as ended:
        checklist.main(SETTINGS)
    assert ended.value.code == 1
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["status"] for row in rows] == [
        "ok", "failed", "failed", "skipped", "ok", "failed", "ok"]
    assert rows[0]["figures"] == {"n": 1}
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "summary.md").read_text(encoding="utf-8") in printed
    assert last_json(printed)["steps"] == rows


def test_a_second_call_adds_to_the_table_of_the_first(monkeypatch):
    monkeypatch.setattr(checklist, "STEPS", [step_of(name, "") for name in ("a", "b", "c")])
    rows = [("c", "ok", 1), ("a", "failed", 2), ("a", "ok", 3), ("c", "skipped", 4),
            ("b", "skipped", 5), ("gone", "ok", 6)]
    lines = [json.dumps({"step": step, "status": status, "n": n}) for step, status, n in rows]
    assert [row["n"] for row in checklist.latest_rows("\n".join(lines))] == [3, 5, 1]


def test_what_there_is_no_time_for_is_skipped(tmp_path, base_dir, monkeypatch, capsys):
    monkeypatch.setattr(checklist, "STEPS", [step_of("one", SLOW), step_of("two", RECORD)])
    monkeypatch.setattr(checklist, "SHORTEST", 1)
    monkeypatch.setattr(checklist, "count_gpus", lambda: 1)
    monkeypatch.setattr(checklist, "out", str(tmp_path / "out"))
    monkeypatch.setattr(checklist, "minutes", 2 / 60)
    with pytest.raises(SystemExit):
        checklist.main(SETTINGS)
    slow, late = last_json(capsys.readouterr().out)["steps"]
    assert slow["status"] == "failed" and "no end after" in slow["error"]
    assert late["status"] == "skipped" and late["error"] == "0.0333333 minutes were over"


def test_bad_input_is_refused(monkeypatch):
    with pytest.raises(UserError, match="nonsense does not exist: choose from doctor, text"):
        checklist.chosen_steps("doctor,nonsense")
    assert [step.name for step in checklist.chosen_steps("models, doctor")] == ["doctor", "models"]
    monkeypatch.setattr(checklist, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match="scripts.doctor"):
        checklist.main(SETTINGS)
    monkeypatch.setattr(checklist, "short", True)
    monkeypatch.setattr(checklist, "tiny", True)
    with pytest.raises(UserError, match="choose one"):
        checklist.main(SETTINGS)


def script(*words, base):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_checklist.sh"), *words],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"},
        cwd=base,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_dry_run_prints_every_command_and_runs_none(base_dir):
    done = script("--dry_run=1", "--gpus=6", base=base_dir)
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node=6 -m scripts.base_train -- --model_tag=depth20" in done.stdout
    assert all(f"\n{step.name}: expect {step.expect}" in done.stdout for step in STEPS)
    assert os.listdir(base_dir) == []


def test_a_tiny_run_stops_and_resumes_a_training_run_here(text, base_dir):
    done = script(
        "--tiny", "--gpus=1", "--steps=resume", f"--data={text}", "--out=here", base=base_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    tokenizer, resume = last_json(done.stdout)["steps"]
    assert tokenizer["figures"] == {"vocabulary": 430}
    assert 3 <= resume["figures"]["stopped at step"] < 150
    assert resume["figures"]["then trained to"] == 150
    assert (base_dir / "here" / "summary.md").read_text(encoding="utf-8") in done.stdout


# --------------------------------------------------------------------------------------------------
# the profile of a step

@pytest.mark.parametrize("name, kind", [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_tn", "matmul"),
    ("Cijk_Alik_Bljk_BBS_BH_MT256x256x64", "matmul"),
    ("aten::mm", "matmul"),
    ("aten::bmm", "matmul"),
    ("aten::addmm_", "matmul"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("void flash::flash_bwd_kernel", "attention"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
    ("c10d::allreduce_", "communication"),
    ("Memcpy DtoD (Device -> Device)", "copy"),
    ("aten::copy_", "copy"),
    ("triton_poi_fused_mul_relu_pow_0", "elementwise"),
    ("aten::mul", "elementwise"),
    ("aten::tanh_", "elementwise"),
])
def test_an_operation_is_known_by_its_name(name, kind):
    assert kind_of(name) == kind


def test_what_runs_in_the_loss_and_the_optimizer_is_theirs_except_communication():
    assert kind_of("aten::mm", "loss") == "loss"
    assert kind_of("ncclDevKernel_AllGather", "optimizer") == "communication"


def test_the_account_adds_up_by_kind_and_overlap_counts_once():
    pieces = [
        Piece("aten::mm", 0, 10, 10),
        Piece("ncclDevKernel_AllGather", 5, 15, 10),      # beside the product
        Piece(LABEL + "optimizer", 20, 40, 0),
        Piece("aten::bmm", 20, 30, 10),
        Piece("aten::mul", 50, 55, 5),
    ]
    kinds, names = account(pieces)
    assert kinds["matmul"] == 10 and kinds["communication"] == 10
    assert kinds["optimizer"] == 10 and kinds["elementwise"] == 5
    assert names["optimizer", "aten::bmm"] == [10, 1]
    assert covered([piece for piece in pieces if piece.own]) == 30


def test_ranges_of_one_label_may_overlap_on_several_streams():
    labels = profile_step.Labels([
        Piece(LABEL + "optimizer", 0, 100, 0),
        Piece(LABEL + "optimizer", 10, 20, 0),
        Piece(LABEL + "loss", 200, 210, 0),
    ])
    assert [labels.at(moment) for moment in (5, 50, 100, 150, 205, 220, -1)] == [
        "optimizer", "optimizer", "optimizer", "", "loss", "", ""]


def test_a_marked_method_still_does_what_it_did():
    owner = types.SimpleNamespace(double=lambda x: 2 * x)
    profile_step.mark(owner, "double", "loss")
    assert owner.double(3) == 6


def test_the_profile_of_a_step_accounts_for_its_time(stages):
    record = stages.fork_record(
        "scripts.profile_step", "--depth=1", "--device_batch_size=2", "--max_seq_len=64",
        "--vocab_size=512", "--compile=0", "--warm_steps=3", "--steps=2", "--device_type=cpu")
    assert set(record["kinds_ms"]) == set(profile_step.ALL_KINDS)
    for kind in ("matmul", "attention", "loss", "optimizer", "elementwise"):
        assert record["kinds_ms"][kind] > 0, kind
    total = sum(record["kinds_ms"].values()) + record["idle_ms"]
    assert total == pytest.approx(record["profiled_step_ms"], rel=0.05)
    assert "must be at least 3" in stages.refusal("scripts.profile_step", "--warm_steps=2")
    too_large = stages.refusal(
        "scripts.profile_step", "--depth=400", "--device_batch_size=1", "--device_type=cpu")
    assert "depth 400 does not fit: one sequence of 256 tokens needs " in too_large


def test_the_kernels_that_a_machine_has_are_timed(stages):
    record = stages.fork_record(
        "scripts.kernel_benchmark", "--depth=2", "--device_batch_size=1", "--vocab_size=512",
        "--seconds=0.01", "--compile=0", "--device_type=cpu")
    assert record["attention_ms"]["math"] > 0
    assert isinstance(record["attention_ms"]["cudnn"], str)    # why it is not here
    assert set(record["loss_ms"]) == {"eager", "products"}
