"""What is set before torch is imported: for which GPUs, and never over the user's own."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from nanochat.environment import (
    ALLOCATOR_VARIABLES,
    AOTRITON,
    VISIBLE_DEVICES,
    System,
    amd_targets,
    gfx_name,
    gpu_variables,
    installed_torch_build,
    torch_build,
    visible_devices,
)

NVIDIA = System("CUDA", True, [], False)
SIX_XTX = System("ROCm", False, ["gfx1100"] * 6 + ["gfx1036"], False)  # and the Ryzen's own
MI300X = System("ROCm", False, ["gfx942"] * 8, False)
RYZEN_AND_NVIDIA = System("CUDA", True, ["gfx1036"], False)
STRIX_HALO = System("ROCm", False, ["gfx1151"], False)
MAC = System("CPU", False, [], True)
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
UNLOCKED = {AOTRITON: "1"}


@pytest.mark.parametrize("system, wanted", [
    (NVIDIA, EXPANDABLE),
    (RYZEN_AND_NVIDIA, EXPANDABLE),
    (SIX_XTX, {"HIP_VISIBLE_DEVICES": "0,1,2,3,4,5", **UNLOCKED}),
    (STRIX_HALO, UNLOCKED),
    (MI300X, {}),
    (MAC, {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}),
    (System("CPU", True, ["gfx1100"], False), {}),
    (System("CUDA", False, [], False), {}),
    (System("", False, [], False), {}),
])
def test_each_machine_gets_the_variables_that_its_gpus_need(system, wanted):
    assert gpu_variables(system, {}) == wanted


def test_expandable_segments_are_never_switched_on_for_rocm():
    """docs/traps.md: expandable-segments"""
    for targets in (["gfx1100"], ["gfx942"] * 8, []):
        # an NVIDIA card beside them changes nothing: torch's build decides
        variables = gpu_variables(System("ROCm", True, targets, False), {})
        assert not set(ALLOCATOR_VARIABLES) & variables.keys()


def test_the_attention_kernel_of_rdna_is_unlocked():
    """docs/traps.md: slow-attention-kernel"""
    unlocked = {
        target: AOTRITON in gpu_variables(System("ROCm", False, [target], False), {})
        for target in ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1102", "gfx1201")
    }
    assert [target for target in unlocked if unlocked[target]] == ["gfx1100", "gfx1102", "gfx1201"]


def test_integrated_gpus_are_hidden_only_beside_others():
    """docs/traps.md: nccl-channels"""
    assert visible_devices(["gfx1036", "gfx1100", "gfx1100"]) == "1,2"
    assert visible_devices(["gfx1100", "gfx1036", "gfx1101"]) == "0,2"
    assert visible_devices(["gfx1100"] * 6) == visible_devices(["gfx1103"]) == ""
    assert visible_devices([]) == ""


@pytest.mark.parametrize("name", [*ALLOCATOR_VARIABLES, *VISIBLE_DEVICES, AOTRITON])
def test_what_the_user_has_set_stands(name):
    for system in (NVIDIA, SIX_XTX):
        variables = gpu_variables(system, {name: ""})
        assert name not in variables
        if name in ALLOCATOR_VARIABLES:
            assert not set(ALLOCATOR_VARIABLES) & variables.keys()
        if name in VISIBLE_DEVICES:
            assert not set(VISIBLE_DEVICES) & variables.keys()


def test_the_targets_are_read_from_the_kernels_topology_in_its_order(tmp_path):
    nodes = {"0": 0, "1": 110000, "2": 110000, "10": 100306, "9": 90402}
    for name, version in nodes.items():
        (tmp_path / name).mkdir()
        text = f"cpu_cores_count 0\nsimd_count 192\ngfx_target_version {version}\nvendor_id 4098\n"
        (tmp_path / name / "properties").write_text(text, encoding="utf-8")
    (tmp_path / "3").mkdir()  # of another container: there is nothing to read
    assert amd_targets(tmp_path) == ["gfx1100", "gfx1100", "gfx942", "gfx1036"]
    assert amd_targets(tmp_path / "none") == []
    assert [gfx_name(n) for n in (90010, 90402, 120001, 110501)] == [
        "gfx90a", "gfx942", "gfx1201", "gfx1151"]


@pytest.mark.parametrize("text, build", [
    ("cuda: Optional[str] = '13.2'\ngit_version = 'a'\nhip: Optional[str] = None\n", "CUDA"),
    ("cuda: str | None = None\nhip: str | None = '6.4.43482'\n", "ROCm"),
    ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "CPU"),
    ("cuda = None\nhip = \"7.0\"\n", "ROCm"),
])
def test_torchs_build_is_read_without_importing_it(text, build):
    assert torch_build(text) == build


def test_the_build_that_is_read_is_the_one_that_is_imported():
    import torch
    wanted = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
    assert installed_torch_build() == wanted


def test_scripts_set_them_before_torch_is_imported():
    code = (
        "import sys, nanochat.environment as e\n"
        "e.this_system = lambda: e.System('CUDA', True, [], False)\n"
        "import scripts, os\n"
        "print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules)"
    )
    inherited = {n: v for n, v in os.environ.items() if n not in ALLOCATOR_VARIABLES}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert done.stdout.split() == ["expandable_segments:True", "False"], done.stderr
