"""Both optimizers against torch's own, and one rank against several."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conftest import ROOT
from nanochat.adagrad import DistRowAdagrad
from nanochat.adamw import DistAdamW
from nanochat.muon import DistMuon, orthogonalize

SHAPES = [(12, 8), (8, 8), (8, 8), (8, 24), (8, 8)]


def gradients(step, shape_index, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + shape_index))


def run(make_optimizer, steps=5, ranks=1, rank=0):
    """Parameters after some steps; rank r of n gets a gradient that is off by an amount which the average takes away."""
    params = [torch.nn.Parameter(gradients(99, i, shape)) for i, shape in enumerate(SHAPES)]
    optimizer = make_optimizer(params)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients(step, i, p.shape) + (rank - (ranks - 1) / 2) * gradients(step, i + 50, p.shape)
        if hasattr(optimizer, "reduce"):
            optimizer.reduce()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def run_table(ranks=1, rank=0, optimizer=lambda table: DistRowAdagrad([table.weight], lr=0.5), sparse=True):
    """A table of 11 rows after some steps; each rank looks up its share of the 12 tokens of a step, some of them twice."""
    table = torch.nn.Embedding(11, 8, sparse=sparse)
    with torch.no_grad():
        table.weight.copy_(gradients(99, 0, (11, 8)))
    optimizer = optimizer(table)
    for step in range(5):
        tokens = torch.randint(9, (12,), generator=torch.Generator().manual_seed(step))
        wanted = gradients(step, 1, (12, 8))
        (table(tokens) * wanted)[rank::ranks].sum().mul(ranks).backward()
        if hasattr(optimizer, "reduce"):
            optimizer.reduce()
        optimizer.step()
        table.weight.grad = None
    return table.weight.detach()


class SlowRowAdagrad:
    """Every row by itself, from a dense gradient."""

    def __init__(self, table):
        self.table, self.squares = table, [0.0] * len(table.weight)

    @torch.no_grad()
    def step(self):
        for i, (row, grad) in enumerate(zip(self.table.weight, self.table.weight.grad)):
            if grad.any():
                self.squares[i] += (grad ** 2).mean().item()
                row -= 0.5 * grad / self.squares[i] ** 0.5


def test_row_adagrad_equals_its_slow_twin_and_leaves_other_rows_alone():
    ours = run_table()
    torch.testing.assert_close(ours, run_table(optimizer=SlowRowAdagrad, sparse=False), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[9:], gradients(99, 0, (11, 8))[9:])


def test_adamw_equals_torch():
    options = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(run(lambda p: DistAdamW(p, **options)), run(lambda p: torch.optim.AdamW(p, **options)), atol=1e-6, rtol=1e-5)


def test_trap_18_adamw_computes_in_float32_and_corrects_before_epsilon():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = DistAdamW([p], lr=0.5, eps=1e-3)
    p.grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    optimizer.reduce()
    optimizer.step()
    assert optimizer.state[p]["v"].dtype == torch.float32
    torch.testing.assert_close(p.detach().float(), torch.full((4,), 0.75), atol=0.01, rtol=0)  # g / (g + eps) = 1/2


def test_muon_equals_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = run(lambda p: DistMuon(p, lr=0.02, momentum=0.95))
    theirs = run(lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True))
    # torch's runs Newton-Schulz in bfloat16; .009 without the factor for tall matrices, .006 with three steps in place of five
    assert (ours - theirs).abs().max() < 0.003


def test_decay_takes_only_what_the_update_would_take_too():
    plain, decayed = (run(lambda p, decay=decay: DistMuon(p, lr=0.02, weight_decay=decay), steps=1) for decay in (0.0, 0.5))
    before = torch.cat([gradients(99, i, shape).flatten() for i, shape in enumerate(SHAPES)])
    same_way = (before - plain) * before > 0
    assert same_way.any() and (~same_way).any()
    torch.testing.assert_close(decayed, plain - 0.02 * 0.5 * before * same_way)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalized_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), steps=5))
    assert values.max() < 1.25 and values.median() > 0.65
    wide = torch.linalg.svdvals(orthogonalize(torch.randn(2, 16, 256)))  # well conditioned: none is left behind
    assert 0.65 < wide.min() and wide.max() < 1.25


def _worker(rank, ranks, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    adamw = run(lambda p: DistAdamW(p, lr=0.03), ranks=ranks, rank=rank)
    muon = run(lambda p: DistMuon(p, lr=0.02), ranks=ranks, rank=rank)
    torch.save([adamw, muon, run_table(ranks, rank)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_trap_13_and_23_gloo_ranks_agree_with_one(tmp_path, ranks):
    """Neither 96 elements nor three matrices divide by every number of ranks; gloo has neither averages nor futures."""
    mp.start_processes(_worker, (ranks, 29500 + ranks + os.getpid() % 400, str(tmp_path)), nprocs=ranks, start_method="spawn")
    wanted = [run(lambda p: DistAdamW(p, lr=0.03)), run(lambda p: DistMuon(p, lr=0.02)), run_table()]
    for rank in range(ranks):
        for ours, one in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), wanted):
            torch.testing.assert_close(ours, one, atol=1e-6, rtol=1e-5)


GROUP_OF_ONE = """
import pathlib, torch
from nanochat.common import compute_cleanup, compute_init
from nanochat.adamw import DistAdamW

def threads():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]

compute_init("cpu", "float32")
parameter = torch.nn.Parameter(torch.ones(4))
optimizer = DistAdamW([parameter])
parameter.sum().backward()
optimizer.reduce()
optimizer.step()
torch.distributed.barrier()
during = threads()
compute_cleanup()
print([sum("gloo" in name for name in names) for names in (during, threads())])
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to read the threads' names from")
def test_no_thread_of_the_process_group_outlives_it():
    """One that did and wanted the interpreter while that was ending took a finished run down with SIGABRT, now and then."""
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    result = subprocess.run([sys.executable, "-c", GROUP_OF_ONE], cwd=ROOT, env={**os.environ, **environment},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    during, after = json.loads(result.stdout)
    assert during > 0 == after
