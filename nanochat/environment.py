"""Variables of the environment that torch and the GPU's runtime read when they are imported.

They are decided without torch, from the files of torch's installation and of the kernel's drivers,
and set by scripts/__init__.py before a script imports torch. What the user has set stands.
docs/gpu.md has each variable with its reason.
"""
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

# Whichever of these is set, the allocator is the user's business. All versions from torch 2.10 on
# read the first; the others are its older names (c10/core/AllocatorConfig.h).
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Whichever of these is set, the user has chosen the visible devices.
VISIBLE_DEVICES = (
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
)
AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"

# The targets that are part of a processor: "APU" in the table of processors of LLVM's user guide
# for the AMDGPU backend. MI300A (gfx942) is one as well, but is no display adapter.
INTEGRATED = {
    "gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037",
    "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153",
}
# RDNA3 and RDNA4, which several releases of AOTriton call experimental
EXPERIMENTAL = re.compile(r"gfx1[12]\d\d")


class System(NamedTuple):
    """What the decisions follow from."""
    build: str          # torch's: "CUDA", "ROCm" or "CPU"; "" where torch is not installed
    has_nvidia: bool    # whether the driver of an NVIDIA GPU is loaded
    targets: list       # gfx names of the AMD GPUs, in HIP's order
    is_mac: bool


def gpu_variables(system, environment):
    """The variables to set: {name: value}, without those that the user has set.

    system: a System. environment: os.environ.

    >>> gpu_variables(System("CUDA", True, [], False), {})
    {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'}
    >>> gpu_variables(System("ROCm", False, ["gfx1036", "gfx1100"], False), {})
    {'HIP_VISIBLE_DEVICES': '1', 'TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL': '1'}
    """
    wanted = {}
    on_nvidia = system.build == "CUDA" and system.has_nvidia
    if on_nvidia and not any(name in environment for name in ALLOCATOR_VARIABLES):
        # Blocks of changing sizes would otherwise split the memory into pieces too small for the
        # next one. On ROCm the setting hangs or is unsupported (docs/traps.md).
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

    if system.build == "ROCm":
        visible = visible_devices(system.targets)
        if visible and not any(name in environment for name in VISIBLE_DEVICES):
            wanted["HIP_VISIBLE_DEVICES"] = visible
        # Only unlocks the kernels: whether one is right, attention.py finds out.
        if any(EXPERIMENTAL.fullmatch(target) for target in system.targets):
            wanted[AOTRITON] = "1"

    if system.is_mac:
        # An operation that MPS lacks is computed on the CPU, with a warning, in place of an error.
        wanted["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def visible_devices(targets):
    """HIP_VISIBLE_DEVICES without the integrated GPUs; "" where nothing is to be hidden.

    targets: gfx names in HIP's order. A machine that has integrated ones only keeps them.

    >>> visible_devices(["gfx1100", "gfx1100", "gfx1036"])
    '0,1'
    """
    discrete = [str(i) for i, target in enumerate(targets) if target not in INTEGRATED]
    if not discrete or len(discrete) == len(targets):
        return ""
    return ",".join(discrete)


def gfx_name(version):
    """The target of a number in the kernel's topology: major, minor and stepping, two digits each.

    >>> gfx_name(110000), gfx_name(90010), gfx_name(90402)
    ('gfx1100', 'gfx90a', 'gfx942')
    """
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def amd_targets(topology=Path("/sys/class/kfd/kfd/topology/nodes")):
    """The gfx names of the AMD GPUs that this process may use, in the order of HIP's numbers.

    HIP counts the GPUs among the nodes of the kernel's topology, in which CPUs have the version 0.
    A node that a container may not use cannot be read. Source: the Linux kernel's kfd_topology.c.
    """
    if not topology.is_dir():
        return []
    nodes = (path for path in topology.iterdir() if path.name.isdecimal())
    targets = []
    for node in sorted(nodes, key=lambda path: int(path.name)):
        try:
            properties = (node / "properties").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        found = re.search(r"^gfx_target_version (\d+)$", properties, re.M)
        if found and int(found.group(1)):
            targets.append(gfx_name(int(found.group(1))))
    return targets


def torch_build(text):
    """What an installed torch was built for, of the text of its version.py: CUDA, ROCm or CPU.

    >>> torch_build("cuda: str | None = '13.2'\\nhip: str | None = None")
    'CUDA'
    """
    for name, build in (("hip", "ROCm"), ("cuda", "CUDA")):
        if re.search(rf"^{name}\b[^=\n]*= *['\"]", text, re.M):
            return build
    return "CPU"


def installed_torch_build():
    """torch_build() of the torch that would be imported, "" where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return ""
    version_file = Path(found.origin).with_name("version.py")
    try:
        return torch_build(version_file.read_text(encoding="utf-8"))
    except OSError:
        return ""


def this_system():
    """The System on which this process runs."""
    return System(
        build=installed_torch_build(),
        has_nvidia=any(Path("/dev").glob("nvidia[0-9]*")),
        targets=amd_targets(),
        is_mac=platform.system() == "Darwin",
    )


def set_gpu_variables():
    """Set what gpu_variables() says, for this process and those that it starts."""
    os.environ.update(gpu_variables(this_system(), os.environ))
