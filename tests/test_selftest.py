"""The self-test finds what it should find, and a run takes the plain path where a fast one errs."""
import subprocess
import sys
import time

import pytest
import torch

from nanochat import loss, selftest
from nanochat.adamw import AdamW
from nanochat.common import Compute, UserError
from nanochat.muon import Muon
from nanochat.selftest import (
    COMPILED,
    EAGER,
    Checked,
    Finding,
    Outcome,
    check_device,
    decide,
    distance,
    is_fatal,
    outcome_line,
    peer_to_peer_probe,
    report_lines,
    run_selftests,
    wait_for_all,
)

CPU = torch.device("cpu")
GPU = Compute(False, 0, 0, 1, torch.device("cuda"), torch.bfloat16)
JSON = 'a line of NCCL\n{"ranks": 2, "gigabytes_per_second": 20.5}\nanother\n'


@pytest.fixture
def compiler(monkeypatch):
    """A function that says what stands in for torch.compile: function -> compiled function."""
    def stands_in(make):
        loss.compiled.cache_clear()
        monkeypatch.setattr(torch, "compile", lambda function, **options: make(function))
    yield stands_in
    loss.compiled.cache_clear()


def failed(findings):
    return [finding.name for finding in findings if not finding.ok]


# -------------------------------------------------------------------------------- what it finds

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_well_on_this_cpu(compiler, dtype):
    compiler(lambda function: function)
    findings = run_selftests(CPU, dtype)
    assert [finding.name for finding in findings] == [*EAGER, *COMPILED]
    assert failed(findings) == [] and not any(finding.remedy for finding in findings)
    assert len(run_selftests(CPU, dtype, compile=False)) == len(EAGER)


def first_result_wrong(function):
    """A compiler whose code is right but for the first tensor that it returns."""
    def wrong(*arguments, **keywords):
        found = function(*arguments, **keywords)
        if isinstance(found, tuple):
            return (found[0] * 1.2, *found[1:])
        return found * 1.2
    return wrong


def test_a_compiler_that_makes_wrong_code_is_found(compiler):
    compiler(first_result_wrong)
    findings = run_selftests(CPU, torch.float32)
    assert failed(findings) == ["compiled block", "compiled loss"]
    assert all("uncompiled" in finding.remedy for finding in findings if not finding.ok)


def test_a_compiler_that_cannot_compile_is_found_with_its_reason(compiler):
    def fail(function):
        raise RuntimeError("\n\nx.cpp: error: no such instruction\n")
    compiler(fail)
    findings = run_selftests(CPU, torch.float32)
    assert failed(findings) == ["compiled block", "compiled loss"]
    assert "does not compile: x.cpp: error: no such instruction" in findings[-1].detail


@pytest.mark.parametrize("wrong", [
    lambda y: y.flip(0),                   # of other slots
    lambda y: y * float("nan"),
    lambda y: y + 0.05 * y.norm() / y.numel() ** 0.5,
])
def test_wrong_attention_to_a_kv_cache_is_found(monkeypatch, wrong):
    right = selftest.cached_attention
    monkeypatch.setattr(selftest, "cached_attention", lambda *inputs: wrong(right(*inputs)))
    finding = selftest.check_cached_attention(CPU, torch.float32)
    assert not finding.ok and "chats" in finding.remedy and not is_fatal(finding)


def test_the_self_test_leaves_the_random_state_alone(compiler):
    compiler(lambda function: function)
    before = torch.get_rng_state()
    run_selftests(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("eps, beta, lr, is_right", [
    (1e-10, 0.95, 0.1, True),
    (1e-10, 0.5, 0.1, False),
    (1e-10, 0.95, 0.101, False),
    (1e-1, 0.95, 0.1, False),
])
def test_a_fused_adamw_that_diverges_is_found(monkeypatch, eps, beta, lr, is_right):
    """docs/traps.md: fused-adamw-rocm"""
    right = selftest.AdamW

    def kernel(parameters, *_):
        return right(parameters, lr, (0.8, beta), eps, 0.1)

    monkeypatch.setattr(selftest, "AdamW", kernel)
    finding = selftest.check_adamw(CPU, torch.float32)
    assert finding.ok == is_right and bool(finding.remedy) != is_right


def test_the_plain_adamw_takes_the_steps_of_the_fused_one():
    """docs/traps.md: fused-adamw-rocm"""
    torch.manual_seed(0)
    begin, gradients = torch.randn(30, 7), torch.randn(3, 30, 7)
    ends = []
    for fused in (True, False):
        p = torch.nn.Parameter(begin.clone())
        optimizer = AdamW([p], 0.1, weight_decay=0.1)
        Checked(True, fused).set_up([optimizer, Muon([torch.nn.Parameter(begin.clone())])])
        assert optimizer.fused == fused
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_a_nan_is_as_far_away_as_anything():
    ones = torch.ones(3)
    assert distance([ones, ones * 1.5], [ones, ones]) == pytest.approx(0.5)
    for nan in (torch.tensor([1.0, 1.0, float("nan")]), ones * float("inf")):
        for found in ([ones, nan], [nan, ones]):
            assert not distance(found, [ones, ones]) <= 1e9


def test_a_test_that_the_device_cannot_run_is_a_finding(monkeypatch):
    def fail(device, dtype):
        raise NotImplementedError("The operator 'aten::x' is not implemented for MPS")
    monkeypatch.setitem(EAGER, "attention", fail)
    findings = run_selftests(CPU, torch.float32, compile=False)
    assert failed(findings) == ["attention"] and is_fatal(findings[1])
    assert "aten::x" in findings[1].detail and "--device_type=cpu" in findings[1].remedy


def test_on_mps_only_what_runs_there_is_tested(monkeypatch):
    for table in (EAGER, COMPILED):
        for name in table:
            monkeypatch.setitem(table, name, lambda device, dtype: device.type)
    assert len(run_selftests(torch.device("cuda"), torch.bfloat16)) == 6
    assert len(run_selftests(torch.device("mps"), torch.float32)) == 5
    assert len(run_selftests(torch.device("mps"), torch.float32, compile=False)) == 4


# -------------------------------------------------------------------------------- at the start

@pytest.mark.parametrize("wrong, wants, wanted", [
    ([], True, Checked(True, True)),
    ([], False, Checked(False, True)),
    (["compiled block"], True, Checked(False, True)),
    (["compiled loss"], True, Checked(False, True)),
    (["fused AdamW"], True, Checked(True, False)),
    (["attention"], True, Checked(True, True)),   # the next kernel runs
    (["cached attention"], True, Checked(True, True)),   # training has none
])
def test_what_errs_is_replaced_by_the_plain_path(wrong, wants, wanted):
    names = [*EAGER, *(COMPILED if wants else {})]
    assert decide({name: name in wrong for name in names}, wants) == wanted


def findings_with(monkeypatch, *bad):
    found = [
        Finding(name, name not in bad, "cudnn" if name == "attention" else "off by 0.001",
                "do this" if name in bad else "")
        for name in (*EAGER, *COMPILED)
    ]
    monkeypatch.setattr(selftest, "run_selftests", lambda *arguments: found)


def test_a_run_on_a_gpu_says_its_kernel_and_what_is_wrong(monkeypatch, capsys):
    """docs/traps.md: slow-attention-kernel"""
    findings_with(monkeypatch, "compiled block")
    assert check_device(GPU) == Checked(False, True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention kernel: cudnn"
    assert lines[1] == "WARNING: compiled block: off by 0.001: do this"
    assert len(lines) == 3 and lines[2].startswith("self-test of cuda: ")


def test_a_run_on_a_device_that_multiplies_wrongly_ends_with_the_remedy(monkeypatch):
    findings_with(monkeypatch, "matmul")
    with pytest.raises(UserError, match="matmul: off by 0.001: do this"):
        check_device(GPU)


def test_all_ranks_decide_alike_by_the_worst_of_them(monkeypatch, capsys):
    findings_with(monkeypatch)
    monkeypatch.setattr(selftest, "all_reduce_max", lambda *flags: [
        1.0 if len(flags) > 1 and i == list(EAGER).index("fused AdamW") else flag
        for i, flag in enumerate(flags)
    ])
    assert check_device(GPU) == Checked(True, False)
    assert "fused AdamW: off by 0.001 here; it fails on another rank" in capsys.readouterr().out
    monkeypatch.setattr(selftest, "all_reduce_max", lambda *flags: [1.0] * len(flags))
    with pytest.raises(UserError, match="another rank"):
        check_device(GPU)


def test_training_on_a_cpu_starts_without_a_test(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "run_selftests", lambda *_: pytest.fail("a test ran"))
    compute = Compute(False, 0, 0, 1, CPU, torch.float32)
    assert check_device(compute, True) == Checked(True, True)
    assert check_device(compute, False) == Checked(False, True)
    assert capsys.readouterr().out == ""


def test_only_the_kernel_and_failures_are_printed():
    findings = [Finding("matmul", True, "a", ""), Finding("attention", False, "b", "update")]
    assert report_lines(findings, [0.0, 1.0]) == ["WARNING: attention: b: update"]


# -------------------------------------------------------------------------------- several GPUs

def probe(*outcomes):
    """The Finding of outcomes one after another, and the variables of each probe."""
    given, left = [], list(outcomes)

    def run(variables):
        given.append(variables)
        return left.pop(0)

    finding = peer_to_peer_probe(2, run=run)
    assert not left
    return finding, given


def test_where_transfers_work_their_bandwidth_is_said():
    finding, given = probe(Outcome(0, JSON))
    assert finding == Finding("all-reduce", True, "20.5 GB/s of bus bandwidth, 2 ranks", "")
    assert given == [{}]


def test_where_transfers_hang_the_way_round_them_is_tried_and_offered(monkeypatch):
    """docs/traps.md: nccl-channels"""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    finding, given = probe(Outcome(None, ""), Outcome(0, JSON))
    assert not finding.ok and finding.remedy == "export NCCL_P2P_DISABLE=1"
    assert "hangs" in finding.detail and "20.5 GB/s" in finding.detail
    assert given == [{}, {"NCCL_P2P_DISABLE": "1"}]


def test_where_nothing_helps_it_is_not_offered(monkeypatch):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    finding, _ = probe(Outcome(None, ""), Outcome(1, "x\nncclSystemError: no route\n"))
    assert not finding.ok and "export" not in finding.remedy and "NCCL_DEBUG" in finding.remedy
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    finding, given = probe(Outcome(None, ""))
    assert given == [{}] and "export" not in finding.remedy


def test_the_reason_of_a_failed_probe_is_its_last_error():
    assert outcome_line(Outcome(3, "no word"), 9) == "fails: exit status 3"
    text = "E1 Error: a\nncclSystemError: b\nbye\n"
    assert outcome_line(Outcome(1, text), 9) == "fails: ncclSystemError: b"


SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]
FAILS = [sys.executable, "-c", "raise SystemExit(3)"]
ENDS = [sys.executable, "-c", ""]


@pytest.mark.parametrize("commands, seconds, status", [
    ([ENDS, ENDS], 30, 0),
    ([SLEEPS, FAILS], 30, 3),        # the other is not waited for
    ([ENDS, SLEEPS], 0.2, None),
])
def test_no_process_of_a_probe_outlives_it(commands, seconds, status):
    processes = [subprocess.Popen(command) for command in commands]
    assert wait_for_all(processes, time.monotonic() + seconds) == status
    assert all(process.poll() is not None for process in processes)


def test_two_processes_of_a_cpu_pass_the_probe():
    finding = peer_to_peer_probe(2, backend="gloo", seconds=120)
    assert finding.ok and "2 ranks" in finding.detail, finding
