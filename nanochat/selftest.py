"""Does this device compute what it should? Small tests of every fast path against a plain one.

GPUs, their compilers and wheels have been wrong in ways that nothing reports: attention with NaNs,
a fused optimizer that diverges, compiled code with other numbers (docs/traps.md). So a training
script on a GPU runs these before its first step, in seconds besides compiling, and takes the plain
path where the fast one errs; the doctor prints them all. On a CPU training starts without.

`check_device` is what a training script calls, `run_selftests` what the doctor calls, and
`peer_to_peer_probe` is for several GPUs.
"""
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.adamw import AdamW
from nanochat.attention import (
    TOLERANCES,
    cached_attention,
    causal_attention,
    choose_kernel,
    small_case,
)
from nanochat.common import UserError, all_reduce_max, compute_cleanup, compute_init, print0
from nanochat.gpt import Block, GPTConfig
from nanochat.hardware import COMPILE_ERRORS, reason_of, synchronize
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.loss import softcap_cross_entropy

ADAMW_TOLERANCE = 1e-3   # of the norm of an update: both are computed in float32
FAILS = "cannot run:"    # begins the detail of a Finding whose test raised an error
PROBE_SECONDS = 40       # of all processes of a probe, of which starting them takes most
PROBE_NUMBERS = {"nccl": 1 << 24, "gloo": 1 << 20}  # float32 numbers of one all-reduce
PROBE_REPEATS = 5


class Finding(NamedTuple):
    """What one test found."""
    name: str
    ok: bool
    detail: str    # one line
    remedy: str    # one line, "" where all is well


# ------------------------------------------------------------------------------------------------
# the tests: each takes (device, dtype) and returns a Finding

def distance(found, wanted):
    """How far tensors are from others, relative to the norm: the largest of all; NaN of a NaN."""
    errors = []
    for ours, theirs in zip(found, wanted):
        ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
        errors.append((ours - theirs).norm() / theirs.norm())
    return torch.stack(errors).max().item()  # max() of a tensor keeps a NaN


def verdict(name, found, wanted, tolerance, remedy):
    """The Finding of a comparison."""
    error = distance(found, wanted)
    ok = error <= tolerance
    detail = f"off by {error:.2g} of the norm, at most {tolerance:g}"
    return Finding(name, ok, detail, "" if ok else remedy)


def noise(*shape, device, seed=0):
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def check_matmul(device, dtype):
    """A product in the compute dtype against the CPU's in float32."""
    a, b = noise(256, 512, device=device), noise(512, 384, device=device, seed=1)
    found = a.to(dtype) @ b.to(dtype)
    remedy = "the device multiplies wrongly: try --dtype=float32, then --device_type=cpu"
    return verdict("matmul", [found], [a.cpu() @ b.cpu()], TOLERANCES[dtype], remedy)


def check_attention(device, dtype):
    """The attention kernels, of which the best right one is set for the process."""
    choice = choose_kernel(device, dtype)
    remedy = ""
    if choice.dropped:
        remedy = "update torch and the driver; what runs instead is right, but slower"
    if choice.dropped and torch.version.hip:
        remedy = ("install a newer ROCm build of torch; unless it is unset, "
                  "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 is needed on Radeon")
    return Finding("attention", not choice.dropped, choice.describe(), remedy)


def check_cached_attention(device, dtype):
    """Attention to a KV cache, which has a mask and other kernels, against the causal one.

    A prompt for two slots that are no neighbours, then a token for all of them, as the engine asks.
    """
    q, k, v, _ = small_case(device, dtype, T=33)
    layer = LayerCache(3, 64, k.size(2), k.size(3), device, dtype)
    cache, slots = KVCache([layer], 3, device), [0, 2]
    with torch.no_grad():
        wanted = causal_attention(q.cpu().float(), k.cpu().float(), v.cpu().float())
        prompt = (x[:, :-1] for x in (q, k, v))
        prefilled = cached_attention(*prompt, layer, cache.window(slots, 32))
        cache.advance(slots, [32, 32])
        newest = (x[[0, 0, 1], -1:] for x in (q, k, v))  # slot 1 is idle
        decoded = cached_attention(*newest, layer, cache.window(None, 1))[slots]
    remedy = "samples and chats are wrong here, training is not: update torch and the driver"
    found = [torch.cat((prefilled, decoded), dim=1)]
    return verdict("cached attention", found, [wanted], TOLERANCES[dtype], remedy)


def block_outputs(block, x, dy):
    """One block forward and backward: (its output, the gradients of x and of its parameters)."""
    half = block.attention.head_dim // 2
    angles = noise(1, x.size(1), 1, half, device=x.device, seed=2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    x = x.clone().requires_grad_()
    y = block(x, cos, sin)
    return y, *torch.autograd.grad(y, (x, *block.parameters()), dy)


def small_block(device):
    """A Block of two heads of 128 with weights that all matter."""
    with torch.device("meta"):  # where no random number is drawn: the run's are to stay as they are
        block = Block(GPTConfig(depth=1, width=256, heads=2, kv_heads=2))
    block.to_empty(device=device)
    for seed, p in enumerate(block.parameters(), start=3):
        p.data = noise(*p.shape, device=device, seed=seed) / 16
    return block


def check_compiled_block(device, dtype):
    """A compiled block against the same one uncompiled, forward and gradient."""
    block = small_block(device)
    x, dy = (noise(2, 256, 256, device=device, seed=seed).to(dtype) for seed in (0, 1))
    wanted = block_outputs(block, x, dy)

    def run_compiled():
        block.compile(dynamic=False)
        return block_outputs(block, x, dy)

    # the two may round at other places
    return compare_compiled("compiled block", run_compiled, wanted, 2 * TOLERANCES[dtype])


def check_compiled_loss(device, dtype):
    """The compiled arithmetic of a chunk of logits against the uncompiled, and its gradients."""
    x, head = noise(300, 256, device=device).to(dtype), noise(1000, 256, device=device, seed=1) / 16
    targets = torch.arange(300, device=device) * 7 % 1000
    weights = noise(300, device=device, seed=2)

    def outputs(compile):
        inputs = x.clone().requires_grad_(), head.clone().requires_grad_()
        total = softcap_cross_entropy(*inputs, targets, weights, 15.0, compile)
        return total, *torch.autograd.grad(total, inputs)

    return compare_compiled(
        "compiled loss", functools.partial(outputs, True), outputs(False), 2 * TOLERANCES[dtype])


def compare_compiled(name, run, wanted, tolerance):
    """The Finding of what a compiled function gives, or of the error that compiling it raises."""
    remedy = "training runs uncompiled, and slower: update torch, its Triton and the driver"
    try:
        found = run()
    except COMPILE_ERRORS as error:
        return Finding(name, False, f"does not compile: {reason_of(str(error))}", remedy)
    finally:
        torch.compiler.reset()  # the training has its own graphs
    return verdict(name, found, wanted, tolerance, remedy)


def check_adamw(device, dtype):
    """Two steps of the fused AdamW against its formula (arXiv 1711.05101, algorithm 2)."""
    lr, betas, eps, decay = 0.1, (0.8, 0.95), 1e-10, 0.1
    begin = noise(300, 70, device=device)
    gradients = [noise(300, 70, device=device, seed=seed) for seed in (1, 2)]

    parameter = torch.nn.Parameter(begin.clone())
    optimizer = AdamW([parameter], lr, betas, eps, decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()

    plain, m, v = begin.cpu(), 0, 0
    for step, gradient in enumerate(gradients, start=1):
        gradient = gradient.cpu()
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient.square()
        unbiased = (v / (1 - betas[1] ** step)).sqrt() + eps
        plain = plain * (1 - lr * decay) - lr * m / (1 - betas[0] ** step) / unbiased

    remedy = "training takes the plain AdamW, which is slower: update torch and the driver"
    found, wanted = [parameter.cpu() - begin.cpu()], [plain - begin.cpu()]
    return verdict("fused AdamW", found, wanted, ADAMW_TOLERANCE, remedy)


EAGER = {
    "matmul": check_matmul,
    "attention": check_attention,
    "cached attention": check_cached_attention,
    "fused AdamW": check_adamw,
}
COMPILED = {"compiled block": check_compiled_block, "compiled loss": check_compiled_loss}


def run_test(name, test, device, dtype):
    """The Finding of one test, also where the device cannot run it at all."""
    try:
        return test(device, dtype)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        remedy = "update torch and the driver, or train with --device_type=cpu"
        return Finding(name, False, f"{FAILS} {reason_of(str(error))}", remedy)


def run_selftests(device, dtype, compile=True):
    """All tests on a device, a torch.device, in a compute dtype: a list of Findings.

    compile: whether to test what is compiled, which takes seconds to a minute.
    """
    tests = dict(EAGER)
    if compile:
        tests.update(COMPILED)
        if device.type == "mps":
            del tests["compiled loss"]  # prepare() compiles the loss on a GPU only
    return [run_test(name, test, device, dtype) for name, test in tests.items()]


# ------------------------------------------------------------------------------------------------
# at the start of training

class Checked(NamedTuple):
    """What a training run may use on this device."""
    compile: bool
    fused_adamw: bool

    def set_up(self, optimizers):
        """Take the plain AdamW where the fused one is wrong."""
        for optimizer in optimizers:
            if isinstance(optimizer, AdamW):
                optimizer.fused = self.fused_adamw


def check_device(compute, compile=True):
    """Test a GPU before training on it, and say in a line each what is wrong and what runs.

    compute: what compute_init() returned; every rank calls this, and all decide alike. compile:
    whether the run wants to compile. On a CPU nothing is tested. UserError where the device
    multiplies wrongly or cannot attend, for which there is no plain path.
    """
    if compute.device.type == "cpu":
        return Checked(compile, True)
    began = time.perf_counter()
    findings = run_selftests(compute.device, compute.dtype, compile)
    failed = all_reduce_max(*(not finding.ok for finding in findings))
    for line in report_lines(findings, failed):
        print0(line)
    print0(f"self-test of {compute.device.type}: {time.perf_counter() - began:.1f} s")
    stop_if_fatal(findings)
    return decide({finding.name: bool(bad) for finding, bad in zip(findings, failed)}, compile)


def report_lines(findings, failed):
    """The lines to print: the attention kernel, and each Finding that failed on any rank."""
    lines = []
    for finding, bad in zip(findings, failed):
        where = " here; it fails on another rank" if finding.ok else ""
        if bad:
            remedy = f": {finding.remedy}" if finding.remedy else ""
            lines.append(f"WARNING: {finding.name}: {finding.detail}{where}{remedy}")
        elif finding.name == "attention":
            lines.append(f"attention kernel: {finding.detail}")
    return lines


def stop_if_fatal(findings):
    """UserError on every rank where one of them has a device with no plain path."""
    fatal = [finding for finding in findings if is_fatal(finding)]
    if not all_reduce_max(bool(fatal))[0]:
        return
    if not fatal:
        raise UserError("self-test: the device of another rank is broken: see its message")
    raise UserError(f"self-test: {fatal[0].name}: {fatal[0].detail}: {fatal[0].remedy}")


def is_fatal(finding):
    """Whether nothing else computes what failed: products, and attention by any kernel."""
    if finding.name == "attention":
        return finding.detail.startswith(FAILS)
    return finding.name == "matmul" and not finding.ok


def decide(failed, compile):
    """What a run may use. failed: {name of a test: whether it failed on any rank}."""
    wrong = [name for name in COMPILED if failed.get(name)]
    return Checked(compile and not wrong, not failed["fused AdamW"])


# ------------------------------------------------------------------------------------------------
# several GPUs

class Outcome(NamedTuple):
    """How the processes of one probe ended."""
    status: int       # 0 where the sums were right; None where the limit of time ended them
    output: str       # of all of them


def peer_to_peer_probe(devices, backend="nccl", seconds=PROBE_SECONDS, run=None):
    """The Finding of an all-reduce between devices, in processes of its own.

    Transfers between cards hang on some boards, where nothing but a time limit ends them. If they
    do, the probe is repeated with NCCL_P2P_DISABLE=1, which routes them through the CPU's memory.

    devices: how many. backend: nccl, or gloo for processes of a CPU. run(variables): for tests, in
    place of run_all_reduce; it returns an Outcome.
    """
    if run is None:
        run = functools.partial(run_all_reduce, devices, backend, seconds)
    first = run({})
    if first.status == 0:
        return Finding("all-reduce", True, bandwidth_line(first.output), "")
    problem = outcome_line(first, seconds)
    elsewhere = "see what NCCL_DEBUG=INFO says; one device trains all the same"
    if backend != "nccl" or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return Finding("all-reduce", False, problem, elsewhere)
    second = run({"NCCL_P2P_DISABLE": "1"})
    if second.status == 0:
        detail = f"{problem}; with NCCL_P2P_DISABLE=1 {bandwidth_line(second.output)}"
        return Finding("all-reduce", False, detail, "export NCCL_P2P_DISABLE=1")
    return Finding("all-reduce", False, f"{problem}, with NCCL_P2P_DISABLE=1 as well", elsewhere)


def bandwidth_line(output):
    """What a probe measured, from the JSON line in its output."""
    record = json.loads(next(line for line in output.split("\n") if line.startswith("{")))
    return f"{record['gigabytes_per_second']:.3g} GB/s of bus bandwidth, {record['ranks']} ranks"


def outcome_line(outcome, seconds):
    """Why a probe failed."""
    if outcome.status is None:
        return f"hangs (ended after {seconds:g} s)"
    lines = [line.strip() for line in outcome.output.split("\n") if "rror" in line]
    return f"fails: {lines[-1][:160] if lines else f'exit status {outcome.status}'}"


def run_all_reduce(devices, backend, seconds, variables):
    """The Outcome of one all-reduce between so many processes; all are ended at the limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, outputs = [], []
    for rank in range(devices):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": devices,
                 "LOCAL_WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        outputs.append(output)
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "nanochat.selftest", backend],
            env={**os.environ, **variables, **{name: str(n) for name, n in ranks.items()}},
            stdout=output,
            stderr=subprocess.STDOUT,
        ))
    status = wait_for_all(processes, time.monotonic() + seconds)
    text = ""
    for output in outputs:
        with output:
            output.seek(0)
            text += output.read()
    return Outcome(status, text)


def wait_for_all(processes, deadline):
    """0 where all processes succeed, the status of the first that fails, None at the deadline.

    Afterwards none of them runs.
    """
    status = None
    while status is None and time.monotonic() < deadline:
        time.sleep(0.05)
        statuses = [process.poll() for process in processes]
        failed = [number for number in statuses if number]
        if failed:
            status = failed[0]
        elif None not in statuses:
            status = 0
    for process in processes:
        process.kill()
        process.wait()
    return status


def all_reduce_process(backend):
    """One process of the probe: sums the ranks' numbers, and rank 0 prints a JSON line.

    The bus bandwidth is that of nccl-tests (PERFORMANCE.md): 2 (n - 1) / n of the bytes a second.
    """
    compute = compute_init("cuda" if backend == "nccl" else "cpu")
    ranks, device = compute.world_size, compute.device
    numbers = torch.full((PROBE_NUMBERS[backend],), compute.rank + 1.0, device=device)
    wanted = ranks * (ranks + 1) / 2
    seconds = []
    for _ in range(PROBE_REPEATS):
        summed = numbers.clone()
        synchronize(device)
        began = time.perf_counter()
        dist.all_reduce(summed)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        if not (summed == wanted).all():
            raise SystemExit(f"Error: the sum over {ranks} ranks is wrong")
    volume = 2 * (ranks - 1) / ranks * 4 * len(numbers)
    rate = volume / min(seconds) / 1e9
    print0(json.dumps({"ranks": ranks, "gigabytes_per_second": rate}))
    compute_cleanup()


if __name__ == "__main__":
    all_reduce_process(sys.argv[1])  # a process that run_all_reduce() has started
