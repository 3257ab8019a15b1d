"""scripts/plan.py: what it prints, what it refuses, and that docs/planning.md is what it prints."""
import subprocess
import sys

import pytest

from conftest import ROOT, last_json
from nanochat.forecast import RATES
from nanochat.hardware import DEVICES, device_kind


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


@pytest.mark.parametrize("arguments, words", [
    (["--device=foo"], "device=foo is not in the table: choose from h100-pcie"),
    (["--device=dgx-spark"], "its peak in bf16 is not published"),
    (["--gpus=many"], "gpus=many is neither auto nor a number of at least 1"),
    (["--gpus=0"], "gpus=0 is neither auto nor a number of at least 1"),
    (["--gpus=3"], "no GPU is here: say which with --device, or its --memory_gb"),
    (["--memory_gb=-1"], "memory_gb=-1 is neither auto nor a number of GB above 0"),
    (["--device=h100", "--model=no"], "model=no is not in the table"),
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
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("AMD Radeon RX 7900 XTX", "7900-xtx"),
])
def test_a_device_is_known_by_whole_words(name, kind):
    assert device_kind(name) == kind
