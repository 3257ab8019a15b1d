"""What this machine is: the CPUs a process may use, and a GPU that torch cannot see."""
import os

import pytest

from nanochat import hardware
from nanochat.common import UserError, choose_device_type
from nanochat.hardware import available_cpus, cpu_quota, unseen_gpu


@pytest.mark.parametrize("text, cpus", [
    ("max 100000\n", None),
    ("200000 100000\n", 2),
    ("250000 100000\n", 2),
    ("10000 100000\n", 1),
    ("", None),
    ("1 0", None),
])
def test_a_cgroups_quota_is_a_number_of_cpus(text, cpus):
    assert cpu_quota(text) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_cpus_are_those_that_the_scheduler_gives(monkeypatch):
    assert 1 <= available_cpus() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert available_cpus() == 1


# The files of drivers, whether torch sees a GPU, its build, the environment, and what the line says
NVIDIA, AMD = "/dev/nvidia0", "/dev/kfd"


@pytest.mark.parametrize("files, build, environment, said", [
    ([NVIDIA], "CPU", {}, "torch's CUDA build"),
    ([AMD], "CPU", {}, "torch's ROCm build"),
    ([AMD], "CUDA 12.8", {"CUDA_VISIBLE_DEVICES": ""}, "torch's ROCm build"),
    ([NVIDIA], "CUDA 12.8", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' may hide it"),
    ([AMD], "ROCm 6.4", {"ROCR_VISIBLE_DEVICES": "9"}, "ROCR_VISIBLE_DEVICES='9' may hide it"),
    ([NVIDIA], "CUDA 12.8", {}, "`nvidia-smi` must list"),
    ([AMD], "ROCm 6.4", {}, "`rocminfo` must list"),
])
def test_a_gpu_that_torch_cannot_see_is_named_with_the_remedy(files, build, environment, said):
    line = unseen_gpu(files, False, "2.10.0", build, environment)
    assert said in line and files[0] in line and f"torch 2.10.0 (build: {build})" in line
    assert "--device_type=cpu" in line and "\n" not in line


def test_nothing_is_said_where_torch_sees_a_gpu_or_there_is_none():
    assert unseen_gpu([NVIDIA], True, "2.10.0", "CUDA 12.8", {}) is None
    assert unseen_gpu([], False, "2.10.0", "CPU", {}) is None


def test_a_run_is_refused_unless_its_device_was_named(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "find_unseen_gpu", lambda: "this machine has a GPU")
    with pytest.raises(UserError, match="this machine has a GPU"):
        choose_device_type("")
    assert choose_device_type("cpu") == "cpu"
    with pytest.raises(UserError, match="device_type=cuda is not available here"):
        choose_device_type("cuda")
    monkeypatch.setattr(hardware, "find_unseen_gpu", lambda: None)
    assert choose_device_type("") == "cpu"
