"""scripts/plan.py: what it prints, what it refuses, and that docs/planning.md is what it prints."""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, last_json
from nanochat import doctor, plan as planning
from nanochat.common import Compute
from nanochat.configurator import declared_values
from nanochat.forecast import RATES, assumed_machine
from nanochat.hardware import DEVICES, device_kind
from scripts import plan as script


def plan(tmp_path, *arguments):
    command = [sys.executable, "-m", "scripts.plan", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "NANOCHAT_BASE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_the_documented_command_prints_memory_batch_speed_and_the_command(tmp_path):
    done = plan(tmp_path, "--depth=32", "--gpus=6", "--memory_gb=24")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert found["stage"] == "plan" and found["gpus"] == 6
    assert [row["parallel"] for row in found["layouts"]] == ["zero2", "fsdp"]
    assert found["too_large"]["replicated"] > 24e9
    chosen = found["recommended"]
    assert chosen["parallel"] == "zero2" and chosen["checkpoint_activations"]
    assert chosen["memory_total"] <= 0.85 * 24e9
    assert "nproc_per_node=6 -m scripts.base_train -- --model=gpt --depth=32" in found["command"]
    assert "--parallel=zero2 --checkpoint_activations" in found["command"]
    assert "never measured by us" in done.stdout and "is assumed" in done.stdout
    for word in ("parameters", "gradients", "optimizer", "activations", "logits", "tables"):
        assert word in done.stdout


def test_a_machine_without_a_gpu_is_planned_as_it_is(tmp_path):
    done = plan(tmp_path, "--depth=2", "--max_seq_len=64", "--total_batch_size=1024")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert found["device"] == "cpu" and found["gpus"] == 0
    assert found["recommended"]["parallel"] == "replicated"


def settings_with(**given):
    return {**declared_values(ROOT / "scripts" / "plan.py"), **given}


@pytest.mark.parametrize("speed, deep", [(1e3, 2), (2e4, 4)])
def test_the_doctor_and_the_planner_choose_alike_for_the_machine_here(monkeypatch, speed, deep):
    """base_train has the doctor's plan, but for its text and vocabulary."""
    compute = Compute(False, 0, 0, 1, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(planning, "measure_step", lambda *_: speed)
    monkeypatch.setattr(doctor, "compute", lambda: compute)
    monkeypatch.setattr(script, "compute_init", lambda: compute)
    for module in (doctor, script):
        monkeypatch.setattr(module, "measure_matmul_flops", lambda *_: 2e11)
    _, theirs = doctor.probe_plan()
    ours = script.plan_one(settings_with())
    chosen = ours["recommended"]
    assert ours["depth"] == theirs["depth"] == deep
    assert chosen["micro_batch_size"] == theirs["device_batch_size"]
    assert chosen["total_batch_size"] == theirs["total_batch_size"]
    assert chosen["tokens_per_second"] == pytest.approx(speed)
    assert (chosen["memory_total"], chosen["hours"]) == (theirs["memory"], theirs["hours"])


def test_gpus_that_are_here_are_measured_and_not_taken_from_a_data_sheet(monkeypatch):
    compute = Compute(False, 0, 0, 1, torch.device("cuda"), torch.float32)
    monkeypatch.setattr(script, "compute_init", lambda: compute)
    monkeypatch.setattr(script, "measure_matmul_flops", lambda *_: 4e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(planning, "device_memory", lambda device: 25_300_000_000)
    machine, about, _ = script.find_machine()
    assert machine == planning.Machine("cuda", 4, 25_300_000_000, 4, 4e12, "rtx-3090")
    assert about == "NVIDIA GeForce RTX 3090: what is here, measured in float32"
    monkeypatch.setattr(script, "gpus", "2")
    assert script.find_machine()[0].ranks == 2
    monkeypatch.setattr(script, "device", "h100")
    elsewhere, about, here = script.find_machine()
    assert (elsewhere.kind, elsewhere.dtype_bytes, here) == ("h100", 2, None)


def test_of_a_memory_that_the_cpu_shares_a_part_is_left_to_it(monkeypatch):
    compute = Compute(False, 0, 0, 1, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB10")
    monkeypatch.setattr(planning, "device_memory", lambda device: 10**11)
    assert planning.this_machine(compute, 9e13).memory == 8 * 10**10
    assert assumed_machine("mi300a", 1).memory == int(0.8 * 128e9)
    assert assumed_machine("h100", 1).memory == 80e9


def test_the_command_and_the_reason_say_what_was_given(tmp_path):
    done = plan(tmp_path, "--depth=12", "--device=h100", "--gpus=8", "--parallel=fsdp",
                "--kv_heads=2", "--reduce_dtype=bfloat16", "--num_iterations=9")
    assert done.returncode == 0, done.stderr
    assert "Recommended: fsdp: as --parallel says." in done.stdout
    command = last_json(done.stdout)["command"]
    assert command.endswith(
        "--parallel=fsdp --kv_heads=2 --reduce_dtype=bfloat16 --num_iterations=9")


@pytest.mark.parametrize("name, kind", [
    ("H100", "h100"), ("RTX 4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("7900 XTX", "7900-xtx"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("DGX Spark", "dgx-spark"), ("mi350x", "mi350x")])
def test_a_device_is_found_under_the_names_that_people_give_it(name, kind):
    assert script.named_device(name) == kind


def test_a_device_without_a_published_peak_is_planned_with_a_given_one(tmp_path):
    done = plan(tmp_path, "--device=dgx-spark", "--gpus=1", "--matmul_tflops=90")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["depth"] in (10, 12)


def test_what_is_given_and_leaves_no_margin_is_called_so(tmp_path):
    done = plan(tmp_path, "--gpus=16", "--device=h100", "--depth=20", "--device_batch_size=32",
                "--total_batch_size=1048576")
    said = done.stdout
    assert done.returncode == 0 and "are as given, above the" in said
    assert "docs/multi-node.md" in said


@pytest.mark.parametrize("arguments, words", [
    (["--device=foo"], "device=foo is not in the table: choose from h100-pcie"),
    (["--device=dgx-spark"], "its peak in bf16 is not published: give --matmul_tflops"),
    (["--gpus=many"], "gpus=many is neither auto nor a number of at least 1"),
    (["--gpus=0"], "gpus=0 is neither auto nor a number of at least 1"),
    (["--gpus=3"], "no GPU is here: say which with --device, or its --memory_gb"),
    (["--memory_gb=-1"], "memory_gb=-1 is neither auto nor a number of GB above 0"),
    (["--fp8=foo"], "fp8=foo is unknown: choose from hybrid"),
    (["--device=h100", "--model=no"], "model=no is not in the table"),
    (["--device=h100", "--reduce_dtype=no"], "reduce_dtype=no: choose from float32, bfloat16"),
    (["--device=h100", "--parallel=no"], "parallel=no is unknown: choose from auto, replicated"),
    (["--depth=32", "--gpus=1", "--memory_gb=24"], "there are 24.0 GB: --depth=26 would fit"),
    (["--depth=32", "--gpus=6", "--memory_gb=24", "--parallel=replicated"],
     "would fit with --parallel=zero2 --checkpoint_activations"),
    (["--gpus=6", "--device=h100", "--total_batch_size=524288"],
     "total_batch_size=524288 is not a multiple of max_seq_len x ranks = 2048 x 6: 516096 is one"),
])
def test_what_cannot_be_is_refused_in_one_line_with_the_remedy(tmp_path, arguments, words):
    done = plan(tmp_path, *arguments)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and words in lines[0], done.stderr


def test_docs_planning_has_the_tables_that_the_command_prints(tmp_path):
    done = plan(tmp_path, "--forecasts")
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    written = [line for line in page.splitlines() if line.startswith("|")]
    assert written == printed


def test_the_page_of_the_documented_shape_has_what_the_command_prints(tmp_path):
    done = plan(tmp_path, "config/yxanul_197m.py", "--curriculum=three_stage",
                "--vocab_size=200012", "--device=rtx-4090", "--gpus=1")
    row = last_json(done.stdout)["recommended"]
    cell = f"| {row['memory_total'] / 1e9:.1f} ({row['micro_batch_size']}) |"
    page = (ROOT / "docs" / "models" / "yxanul.md").read_text(encoding="utf-8")
    assert f"memory, GB (sequences at a time) {cell}" in page
    assert "depth 28 (491,520 tokens, as given)" in done.stdout
    # a shell passes a table of stages on in one word
    done = plan(tmp_path, "--device=h100", "--curriculum=0.5 64; 0.5 2048")
    assert "'--curriculum=0.5 64; 0.5 2048'" in last_json(done.stdout)["command"]


def test_every_assumed_rate_is_of_a_device_of_the_table():
    assert RATES.keys() <= DEVICES.keys()
    for rate in RATES.values():
        assert 0 < rate.step < 1 and 0 < rate.matmul < 1


@pytest.mark.parametrize("name, kind", [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GH200 480GB", "gh200"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA L4", "l4"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA GB200", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("AMD Radeon RX 7900 XTX", "7900-xtx"),
])
def test_a_device_is_known_by_whole_words(name, kind):
    assert device_kind(name) == kind
