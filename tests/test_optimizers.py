"""The optimizers against torch's own, and bit for bit against reference implementations."""
import copy

import pytest
import torch
from torch.optim.adamw import adamw

from nanochat.adagrad import RowAdagrad
from nanochat.adamw import AdamW, DistAdamW
from nanochat.muon import DistMuon, Muon, orthogonalize

SHAPES = [(12, 8), (8, 8), (8, 8), (8, 24), (8, 8)]


def gradients(step, shape_index, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + shape_index))


def run(make_optimizer, steps=5, shapes=SHAPES, missing=None):
    """Parameters after some steps; from the third on, parameter `missing` has no gradient."""
    params = [torch.nn.Parameter(gradients(99, i, shape)) for i, shape in enumerate(shapes)]
    optimizer = make_optimizer(params)
    for step in range(steps):
        for i, p in enumerate(params):
            absent = i == missing and step >= 2
            p.grad = None if absent else gradients(step, i, p.shape)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def run_table(make_optimizer, sparse=True):
    """A table of 11 rows after some steps that look up 12 tokens each, some of them twice."""
    table = torch.nn.Embedding(11, 8, sparse=sparse)
    with torch.no_grad():
        table.weight.copy_(gradients(99, 0, (11, 8)))
    optimizer = make_optimizer(table.weight)
    for step in range(5):
        tokens = torch.randint(9, (12,), generator=torch.Generator().manual_seed(step))
        (table(tokens) * gradients(step, 1, (12, 8))).sum().backward()
        optimizer.step()
        table.weight.grad = None
    return table.weight.detach()


# reference implementations: the maths as recorded when checkpoints and logs began, without any
# structure, so that a run of then and a run of now are the same to the last bit

class ReferenceMuon:
    def __init__(self, params, lr, momentum, weight_decay):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.by_shape = {}
        self.buffers = {}
        for p in params:
            self.by_shape.setdefault(tuple(p.shape), []).append(p)

    @torch.no_grad()
    def step(self):
        for shape, params in self.by_shape.items():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grad = torch.stack(grads)
            buffer = self.buffers.setdefault(shape, torch.zeros_like(grad))
            buffer.lerp_(grad, 1 - self.momentum)
            updates = reference_orthogonalize(grad.lerp_(buffer, self.momentum))
            for p, u in zip(params, updates):
                if self.weight_decay:
                    p.sub_(p * (u * p > 0), alpha=self.lr * self.weight_decay)
                p.sub_(u, alpha=self.lr * max(1, shape[0] / shape[1]) ** 0.5)


def reference_orthogonalize(G):
    a, b, c = 3.4445, -4.775, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


class ReferenceAdamW:
    """One parameter at a time."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        self.states = [(p, torch.zeros(()), torch.zeros(p.numel()), torch.zeros(p.numel()))
                       for p in params]
        self.options = dict(lr=lr, eps=eps, weight_decay=weight_decay)
        self.options |= dict(beta1=betas[0], beta2=betas[1])

    @torch.no_grad()
    def step(self):
        for p, step, m, v in self.states:
            if p.grad is not None:
                adamw([p.detach().view(-1)], [p.grad.view(-1)], [m], [v], [], [step],
                      fused=True, amsgrad=False, maximize=False, **self.options)


class ReferenceRowAdagrad:
    """From a sparse gradient."""

    def __init__(self, table, lr=0.5):
        self.table, self.lr = table, lr
        self.squares = torch.zeros(len(table), 1)

    @torch.no_grad()
    def step(self):
        sparse = self.table.grad.coalesce()
        rows, grad = sparse.indices()[0], sparse.values()
        self.squares.index_add_(0, rows, grad.square().mean(dim=1, keepdim=True))
        update = grad * self.squares[rows].clamp(min=1e-30).rsqrt_()
        self.table.index_add_(0, rows, update, alpha=-self.lr)


class RowByRowAdagrad:
    """Every row by itself, from a dense gradient."""

    def __init__(self, table):
        self.table, self.squares = table, [0.0] * len(table)

    @torch.no_grad()
    def step(self):
        for i, (row, grad) in enumerate(zip(self.table, self.table.grad)):
            if grad.any():
                self.squares[i] += (grad ** 2).mean().item()
                row -= 0.5 * grad / self.squares[i] ** 0.5


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("missing", [None, 2])
def test_muon_equals_its_reference_implementation_bit_for_bit(decay, missing):
    options = dict(lr=0.02, momentum=0.9, weight_decay=decay)
    ours = run(lambda p: Muon(p, **options), missing=missing)
    assert torch.equal(ours, run(lambda p: ReferenceMuon(p, **options), missing=missing))


@pytest.mark.parametrize("missing", [None, 2])
def test_adamw_equals_its_reference_implementation_bit_for_bit(missing):
    options = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    ours = run(lambda p: AdamW(p, **options), missing=missing)
    assert torch.equal(ours, run(lambda p: ReferenceAdamW(p, **options), missing=missing))


def test_row_adagrad_equals_its_reference_implementation_bit_for_bit():
    ours = run_table(lambda table: RowAdagrad([table], lr=0.5))
    assert torch.equal(ours, run_table(ReferenceRowAdagrad))


@pytest.mark.parametrize("sparse", [True, False])
def test_row_adagrad_equals_every_row_by_itself_and_leaves_other_rows_alone(sparse):
    ours = run_table(lambda table: RowAdagrad([table], lr=0.5), sparse)
    theirs = run_table(RowByRowAdagrad, sparse=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[9:], gradients(99, 0, (11, 8))[9:])


def test_adamw_equals_torch():
    options = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    ours = run(lambda p: AdamW(p, **options))
    theirs = run(lambda p: torch.optim.AdamW(p, **options))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_adamw_computes_in_float32_and_corrects_before_epsilon():
    # docs/traps.md: adam-epsilon
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=0.5, eps=1e-3)
    p.grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[p]["v"].dtype == torch.float32
    # g / (g + eps) = 1/2
    torch.testing.assert_close(p.detach().float(), torch.full((4,), 0.75), atol=0.01, rtol=0)


def test_muon_equals_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = run(lambda p: Muon(p, lr=0.02, momentum=0.95))
    options = dict(lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True)
    theirs = run(lambda p: torch.optim.Muon(p, **options))
    # torch's runs Newton-Schulz in bfloat16; .009 without the factor for tall matrices, .006 with
    # three steps in place of five
    assert (ours - theirs).abs().max() < 0.003


def test_a_stack_of_matrices_is_updated_like_its_matrices():
    """A stack (E, m, n) and matrices (m, n) share a group, a momentum buffer and their updates."""
    stack = torch.nn.Parameter(gradients(99, 0, (3, 8, 6)))
    single = torch.nn.Parameter(gradients(99, 1, (8, 6)))
    matrices = [torch.nn.Parameter(p.detach().clone()) for p in (*stack, single)]
    ours = Muon([stack, single], lr=0.02, weight_decay=0.1)
    theirs = Muon(matrices, lr=0.02, weight_decay=0.1)
    assert len(ours.param_groups) == 1
    for step in range(3):
        stack.grad = gradients(step, 0, stack.shape)
        single.grad = gradients(step, 1, single.shape)
        for p, grad in zip(matrices, (*stack.grad, single.grad)):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
    assert ours.state[stack]["momentum"].shape == (4, 8, 6)
    for a, b in zip((*stack, single), matrices):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_decay_takes_only_what_the_update_would_take_too():
    plain = run(lambda p: Muon(p, lr=0.02, weight_decay=0.0), steps=1)
    decayed = run(lambda p: Muon(p, lr=0.02, weight_decay=0.5), steps=1)
    before = torch.cat([gradients(99, i, shape).flatten() for i, shape in enumerate(SHAPES)])
    same_way = (before - plain) * before > 0
    assert same_way.any() and (~same_way).any()
    torch.testing.assert_close(decayed, plain - 0.02 * 0.5 * before * same_way)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalized_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), steps=5))
    assert values.max() < 1.25 and values.median() > 0.65
    # well conditioned: no direction is left behind
    wide = torch.linalg.svdvals(orthogonalize(torch.randn(2, 16, 256)))
    assert 0.65 < wide.min() and wide.max() < 1.25


def test_orthogonalized_matrices_have_the_singular_vectors_of_the_gradient():
    torch.manual_seed(0)
    G = torch.randn(2, 16, 64)
    u, _, vt = torch.linalg.svd(G, full_matrices=False)
    inside = u.mT @ orthogonalize(G) @ vt.mT  # diagonal: the same vectors, other values
    off_diagonal = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_state_dicts_continue_a_run_exactly():
    for make in (lambda p: Muon(p, lr=0.02), lambda p: AdamW(p, lr=0.03)):
        params = [torch.nn.Parameter(gradients(99, i, shape)) for i, shape in enumerate(SHAPES)]
        optimizer = make(params)
        for step in range(4):
            if step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                other_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
                other = make(other_params)
                other.load_state_dict(saved)
            for i, p in enumerate(params):
                p.grad = gradients(step, i, p.shape)
            optimizer.step()
            if step >= 2:
                for i, p in enumerate(other_params):
                    p.grad = gradients(step, i, p.shape)
                other.step()
        assert all(torch.equal(a, b) for a, b in zip(params, other_params))


def test_the_documented_names_are_the_optimizers():
    assert DistMuon is Muon and DistAdamW is AdamW
