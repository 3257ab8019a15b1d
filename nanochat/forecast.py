"""How fast a machine trains, by estimate: before it has trained, or without being there.

A GPU's speed follows from the rate of its matmuls, measured where the GPU is here and otherwise a
share of its data sheet; from the share of it that a training step reaches (RATES, with sources);
and from what the ranks send to each other. No GPU of ours has confirmed any of it: every line that
prints such a number says that it is an estimate. A CPU is measured (plan.measure_step).
"""
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.hardware import DEVICES
from nanochat.memory import communication

# Of the measured matmul rate that a training step reaches. CPU: dev/LOG.md, AVX2. Others: RATES.
ASSUMED_SHARE = {"cpu": 0.5, "mps": 0.4, "cuda": 0.5}


class Rate(NamedTuple):
    """What a kind of GPU reaches, by assumption.

    matmul: of the data sheet's bf16 peak, by a large product. step: of that product's rate, by a
    training step, with causal attention counted. link: bytes/s between GPUs in a collective.
    """
    matmul: float
    step: float
    link: float


PCIE = 12e9  # bytes/s of a collective over PCIe 4.0 cards without peer-to-peer links
# H100: nanochat's 137k tokens/s a GPU at depth 20 and a vocabulary of 65,536, on eight; as
# efficient, a vocabulary of 32,768 gives 148k, 433 TFLOP/s or 44 % of the peak. .8 of the peak is
# what products of 8192 reach. 350 GB/s: NVLink as NCCL's own tests show it; A100 in proportion.
# RTX 4090: nanochat's users saw 38k there, our estimate was 31k: the middle, 101 TFLOP/s.
# 7900 XTX: 14k to 16k tokens/s by estimate, with fused attention: 44 TFLOP/s.
# MI350X: documented with products of 1,022 TFLOP/s (44 % of the peak) and 578 TFLOP/s of a 7B
# model. All others: half of three quarters, which nobody has seen.
RATES = {
    "h100": Rate(0.80, 0.55, 350e9),
    "h200": Rate(0.80, 0.55, 350e9),
    "a100": Rate(0.80, 0.55, 230e9),
    "a100-40gb": Rate(0.80, 0.55, 230e9),
    "rtx-4090": Rate(0.90, 0.68, PCIE),
    "7900-xtx": Rate(0.75, 0.48, PCIE),
    "mi350x": Rate(0.44, 0.57, 300e9),
    "mi300x": Rate(0.44, 0.57, 300e9),
}
OTHER_RATE = Rate(0.75, 0.50, PCIE)
RECOMPUTING = 4 / 3   # of the arithmetic of a step, with activation checkpointing: forward twice
# A pass takes as long as so many tokens more: casting weights, starting kernels. Estimated at 5 %
# of passes of 8,192 tokens.
PASS_TOKENS = 410
# Dollars for a GPU and hour. H100: eight of them for 24 dollars are documented.
PRICES = {"h100": 3.0}


# Of a memory that the CPU shares: programs, the file cache and copies to be saved are in it, too
UNIFIED_SHARE = 0.8


def planned_share(kind):
    """Of a device's memory, what a plan counts as the device's. kind: of DEVICES, or None."""
    return UNIFIED_SHARE if kind and DEVICES[kind].unified else 1


class Machine(NamedTuple):
    """What a plan needs to know of the hardware."""
    device_type: str     # cuda, mps or cpu
    ranks: int
    memory: int          # bytes of a device, or None where it is not known
    dtype_bytes: int     # of an activation
    matmul_flops: float  # of a device, measured, or assumed_machine()'s
    kind: str = None     # of hardware.DEVICES, where it is one of those
    link: float = None   # bytes/s between ranks; None: as RATES has it

    @property
    def rate(self):
        """The Rate of this kind of device."""
        return RATES.get(self.kind, OTHER_RATE)

    @property
    def step_share(self):
        """Of the matmul rate that a training step reaches."""
        if self.kind in RATES:
            return RATES[self.kind].step
        return ASSUMED_SHARE[self.device_type]

    @property
    def bandwidth(self):
        """Bytes/s that a rank sends."""
        return self.link or self.rate.link


def assumed_machine(kind, gpus, memory=None, link=None, matmul_flops=None):
    """The Machine of GPUs that are not here, by their data sheet.

    matmul_flops: of a device, where it is known. UserError where it is not, and the device's peak
    is not published either.
    """
    device = DEVICES[kind]
    if not (device.bf16 or matmul_flops):
        known = [name for name, row in DEVICES.items() if row.bf16]
        raise UserError(
            f"device={kind}: its peak in bf16 is not published: give --matmul_tflops, which "
            f"base_train prints on such a device when it starts, or choose from {', '.join(known)}")
    flops = matmul_flops or device.bf16 * RATES.get(kind, OTHER_RATE).matmul
    size = int(memory or device.memory * planned_share(kind))
    return Machine("cuda", gpus, size, 2, flops, kind, link)


def expected_speed(machine, flops_per_token):
    """Training tokens per second of all ranks, from the rate of matmuls alone."""
    return machine.matmul_flops * machine.ranks * machine.step_share / flops_per_token


class Step(NamedTuple):
    """Seconds of an optimizer step, and what they are spent on."""
    computing: float
    communicating: float
    tokens: int      # of all ranks

    @property
    def seconds(self):
        return self.computing + self.communicating

    @property
    def tokens_per_second(self):
        return self.tokens / self.seconds


def expected_step(machine, model, batch, parallel="replicated", checkpoint_activations=False,
                  wire_bytes=4):
    """The Step of a model under a layout; communication counts as if none of it were hidden.

    batch: a plan.Batch.
    """
    T = model.config.max_seq_len
    tokens = batch.total_batch_size
    seconds = tokens / expected_speed(machine, model.flops_per_token(T))
    if machine.device_type != "cuda":
        return Step(seconds, 0.0, tokens)
    seconds *= 1 + PASS_TOKENS / (batch.micro_batch_size * T)
    if checkpoint_activations:
        seconds *= RECOMPUTING
    sent = communication(
        model, machine.ranks, parallel,
        grad_accum_steps=batch.grad_accum_steps,
        dtype_bytes=machine.dtype_bytes,
        wire_bytes=wire_bytes,
    )
    return Step(seconds, sent.total / machine.bandwidth, tokens)
