"""The layouts: gloo ranks against one process, what starts when, and what a skipped step leaves."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

from conftest import ROOT
from nanochat import parallel
from nanochat.adagrad import RowAdagrad
from nanochat.adamw import AdamW
from nanochat.common import UserError
from nanochat.muon import Muon
from nanochat.parallel import Layout, accumulate_gradients, prepare

KINDS = ("replicated", "zero2", "fsdp")
VOCAB, WIDTH, T, SEQUENCES = 13, 8, 7, 12
RARE = 3  # a token on which one parameter depends


class Block(nn.Module):
    """A part of the model that fsdp gathers by itself."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x, scale):
        return x + scale * torch.tanh(x @ self.matrix.T)


class Toy(nn.Module):
    """Every kind of parameter, in numbers that neither 2 nor 3 divide; some without a gradient."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator))

        self.table = nn.Embedding(11, WIDTH, sparse=True, _weight=normal(11, WIDTH).data)
        self.embed = normal(VOCAB, WIDTH)
        self.scales = normal(5)
        self.blocks = nn.ModuleList(Block(normal(WIDTH, WIDTH)) for _ in range(5))
        self.experts = normal(2, WIDTH, WIDTH)
        self.tall = normal(3 * WIDTH, WIDTH)
        self.rare = normal(1)
        self.unused = normal(7)
        self.head = normal(VOCAB, WIDTH)

    def forward(self, inputs, targets):
        """inputs, targets (B, T) -> the summed loss."""
        x = self.embed[inputs] + self.table(inputs % 11)
        if (inputs == RARE).any():
            x = x + self.rare * (inputs == RARE)[..., None]
        for scale, block in zip(self.scales, self.blocks):
            x = block(x, scale)
        for expert in self.experts:
            x = x + torch.tanh(x @ expert.T)
        x = x + torch.tanh(x @ self.tall.T).view(*x.shape, 3).sum(-1)
        return F.cross_entropy((x @ self.head.T).flatten(0, 1), targets.flatten(), reduction="sum")

    def setup_optimizers(self):
        adamw = AdamW([
            {"params": [self.embed], "lr": 0.01},
            {"params": [self.scales, self.rare, self.unused], "lr": 0.02},
            {"params": [self.head], "lr": 0.01},
        ], eps=1e-6)
        matrices = [block.matrix for block in self.blocks]
        muon = Muon([*matrices, self.experts, self.tall], lr=0.02, weight_decay=0.1)
        return [adamw, muon, RowAdagrad([self.table.weight], lr=0.05)]


def micro_batches(step, rank=0, ranks=1):
    """Two micro-batches: this rank's share of the sequences of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (SEQUENCES, T + 1), generator=generator)[rank::ranks]
    return [(part[:, :-1], part[:, 1:], "state") for part in ids.chunk(2)]


class Training:
    """A Toy and its layout, as rank `rank` of `ranks`."""

    def __init__(self, rank=0, ranks=1, **options):
        self.rank, self.ranks = rank, ranks
        self.model = Toy()
        self.optimizers = self.model.setup_optimizers()
        self.layout = Layout(self.model, self.optimizers, **options)
        self.losses, self.norms, self.started = [], [], []

    def step(self, number, clip=0.0, poison=False):
        """One training step. poison: a NaN in one gradient, and the step is skipped."""
        batches = micro_batches(number, self.rank, self.ranks)
        scale = self.ranks / (SEQUENCES * T)
        self.layout.overlap = self.layout.overlap and not poison
        loss, _ = accumulate_gradients(self.model, batches, scale, 2, self.layout)
        if poison:
            grad = self.model.head.grad
            grad = grad.to_local() if self.layout.sharded else grad
            grad[0, 0] = torch.nan
        self.started.append(self.layout.started)
        loss, grad_norm = self.layout.reduce(loss)
        self.losses.append(loss)
        self.norms.append(grad_norm)
        if grad_norm == grad_norm:
            self.layout.apply(clip, grad_norm)
        self.layout.zero_grad()

    def run(self, steps=4, clip=0.5):
        for number in range(steps):
            self.step(number, clip)
        return self

    def parameters(self):
        whole = self.layout.whole_model()
        return {name: value.clone() for name, value in whole.state_dict().items()}

    def result(self):
        return {"parameters": self.parameters(), "losses": self.losses, "norms": self.norms}


def local_gradients():
    """The gradient of each parameter for the whole of step 0, without any of our code."""
    model = Toy()
    for inputs, targets, _ in micro_batches(0):
        (model(inputs, targets) / (SEQUENCES * T)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


class FullMemory(nn.Module):
    """Runs out of memory in the backward pass of the last micro-batch.

    late: after a bucket has started; otherwise before.
    """

    def __init__(self, training, late):
        super().__init__()
        self.training_, self.late, self.armed = training, late, True

    def forward(self, inputs, targets):
        if len(inputs) > 1 and self.armed:
            # the last gradient of all is that of the embedding, the first that of the head
            p = self.training_.model.embed if self.late else self.training_.model.head
            p.register_hook(self.fail)
        return self.training_.model(inputs, targets)

    def fail(self, grad):
        if self.armed and self.training_.layout.last_pass:
            self.armed = False
            raise torch.OutOfMemoryError("CUDA out of memory.")


# -------------------------------------------------------------------------------------------------
# several ranks: one group of processes does everything, the tests look at what it returned

def worker(rank, ranks, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel.BUCKET_BYTES = 4 * WIDTH * WIDTH  # a matrix
    results = {}

    results["auto"] = Training(rank, ranks).layout.kind
    for kind in KINDS:
        training = Training(rank, ranks, kind=kind).run()
        results[kind] = training.result() | {
            "started": training.started,
            "buckets": len(training.layout.buckets),
            "order": bucket_names(training),
            "state": training.layout.optimizer_state(),
        }
        narrow = Training(rank, ranks, kind=kind, reduce_dtype="bfloat16")
        results[kind]["bfloat16"] = narrow.run().result()

    results["gradients"] = averaged_gradients(rank, ranks)
    for kind in ("zero2", "fsdp"):
        results[kind]["poisoned"] = poisoned(rank, ranks, kind)
        results[kind]["reloaded"] = reloaded(rank, ranks, kind)
    results["memory"] = full_memory(rank, ranks)
    results["fsdp"]["memory"] = full_memory_in_a_block(rank, ranks)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def bucket_names(training):
    names = {p: name for name, p in training.model.named_parameters()}
    return [names[bucket.params[0]] for bucket in training.layout.buckets]


def averaged_gradients(rank, ranks):
    training = Training(rank, ranks, kind="replicated")
    batches = micro_batches(0, rank, ranks)
    accumulate_gradients(training.model, batches, ranks / (SEQUENCES * T), 2, training.layout)
    training.layout.reduce(torch.zeros(()))
    return {name: p.grad for name, p in training.model.named_parameters()}


def poisoned(rank, ranks, kind):
    """Step 9 has a NaN on the last rank and is skipped; the others follow, with overlap."""
    training = Training(rank, ranks, kind=kind)
    for number in (0, 1):
        training.step(number, 0.5)
    training.step(9, poison=rank == ranks - 1)
    for number in (2, 3):
        training.step(number, 0.5)

    # a step that is dropped before it was judged, while its reductions are in flight
    batches = micro_batches(9, rank, ranks)
    accumulate_gradients(training.model, batches, 1.0, 2, training.layout)
    started = training.layout.started
    training.layout.zero_grad()
    tensors = [*training.model.parameters(), *training.layout._held()]
    clean = all(tensor.grad is None for tensor in tensors) and training.layout.started == 0
    training.step(4, 0.5)
    return training.result() | {"dropped": started, "clean": clean}


def full_memory(rank, ranks):
    found = {}
    for late in (False, True):
        training = Training(rank, ranks).run(3)
        model = FullMemory(training, late)
        batches = micro_batches(3, rank, ranks)
        scale = ranks / (SEQUENCES * T)
        try:
            _, size = accumulate_gradients(model, batches, scale, 2, training.layout)
            found[late] = [size, training.layout.started]
            training.layout.reduce(torch.zeros(()))
        except torch.OutOfMemoryError as error:
            found[late] = [str(error), training.layout.started]
        training.layout.zero_grad()
    return found


def full_memory_in_a_block(rank, ranks):
    """Under fsdp no rank can start over by itself: the line that it ends with."""
    training = Training(rank, ranks, kind="fsdp")

    def fail(block, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    training.model.blocks[3].register_forward_pre_hook(fail)
    try:
        accumulate_gradients(training.model, micro_batches(0, rank, ranks), 1, 2, training.layout)
    except MemoryError as error:
        return str(error)


def reloaded(rank, ranks, kind):
    """Saved after two steps and loaded into another model: two more steps on both."""
    first = Training(rank, ranks, kind=kind).run(2)
    states = copy.deepcopy(first.layout.optimizer_state())
    second = Training(rank, ranks, kind=kind)
    for optimizer in second.optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 if group.get("weight_decay") else 0.0
            group["initial_lr"] = 77.0
    second.layout.load_weights(first.parameters())
    second.layout.load_optimizer_state(states)
    kept = {group["initial_lr"] for o in second.optimizers for group in o.param_groups}
    for training in (first, second):
        training.step(2)
        training.step(3)
    pairs = zip(first.parameters().values(), second.parameters().values())
    equal = all(torch.equal(a, b) for a, b in pairs)
    return {"kept": kept, "equal": equal}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    count = request.param
    port = 29500 + count + os.getpid() % 400
    arguments = (count, port, str(folder))
    mp.start_processes(worker, arguments, nprocs=count, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def one():
    """The result of one process."""
    return Training().run().result()


def assert_near(ours, theirs, atol=1e-6, rtol=1e-5):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=rtol, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gloo_ranks_equal_one_process(ranks, one, kind):
    """Nothing divides by the number of ranks; gloo has neither averages nor futures.

    docs/traps.md: padded-vocabulary-ranks, gloo-futures, local-clipping
    """
    for rank in ranks:
        assert_near(rank[kind]["parameters"], one["parameters"])
        assert rank[kind]["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert rank[kind]["norms"] == pytest.approx(one["norms"], abs=1e-5)
        assert rank[kind]["losses"] == ranks[0][kind]["losses"]
        assert rank[kind]["norms"] == ranks[0][kind]["norms"]
        for name, value in ranks[0][kind]["parameters"].items():
            assert torch.equal(rank[kind]["parameters"][name], value)


def test_several_ranks_shard_unless_told_otherwise(ranks):
    assert [rank["auto"] for rank in ranks] == ["zero2"] * len(ranks)


def test_a_reduced_gradient_is_the_average(ranks):
    wanted = local_gradients()
    for rank in ranks:
        for name, grad in wanted.items():
            dense = torch.zeros(7) if grad is None else grad.to_dense()  # missing counts as zero
            torch.testing.assert_close(rank["gradients"][name], dense, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_the_wire_is_near_float32(ranks, one, kind):
    for rank in ranks:
        narrow = rank[kind]["bfloat16"]
        assert narrow["norms"] == ranks[0][kind]["bfloat16"]["norms"] != rank[kind]["norms"]
        assert narrow["norms"] == pytest.approx(one["norms"], rel=0.02)
        assert narrow["losses"] == pytest.approx(one["losses"], rel=0.01)


def test_a_shard_is_all_that_a_rank_keeps_state_for(ranks):
    def elements(rank, kind):
        states = [entry for state in rank[kind]["state"] for entry in state["state"].values()]
        tensors = [value for entry in states for value in entry.values()]
        return sum(tensor.numel() for tensor in tensors if tensor.ndim)

    for rank in ranks:
        # padding weighs much here: the one tall matrix becomes one for each rank
        assert elements(rank, "zero2") < 0.75 * elements(rank, "replicated")
    all_ranks = sum(elements(rank, "fsdp") for rank in ranks)
    assert all_ranks == elements(ranks[0], "replicated"), "no element is padding, none is twice"


@pytest.mark.parametrize("kind", ["replicated", "zero2"])
def test_buckets_start_during_the_backward_pass_once_memory_has_sufficed(ranks, kind):
    for rank in ranks:
        started = rank[kind]["started"]
        assert rank[kind]["buckets"] > 6
        assert started[:2] == [0, 0]  # neither before nor beside new optimizer state
        assert all(0 < count <= rank[kind]["buckets"] for count in started[2:])


def test_buckets_start_in_the_order_in_which_gradients_come_the_same_on_all_ranks(ranks):
    for rank in ranks:
        order = rank["zero2"]["order"]
        assert order == ranks[0]["zero2"]["order"]
        assert order[0] == "head" and order[-1] in ("unused", "scales", "rare")
        assert order.index("tall") < order.index("blocks.0.matrix") < order.index("embed")


@pytest.mark.parametrize("kind", ["zero2", "fsdp"])
def test_a_nan_on_one_rank_is_a_nan_on_all_and_a_skipped_step_leaves_nothing(ranks, kind):
    """docs/traps.md: nan-guards"""
    never = Training().run(5)
    for rank in ranks:
        poisoned = rank[kind]["poisoned"]
        assert [norm != norm for norm in poisoned["norms"]] == [False] * 2 + [True] + [False] * 3
        assert poisoned["clean"] and (poisoned["dropped"] > 0) == (kind == "zero2")
        assert_near(poisoned["parameters"], never.parameters())


def test_a_rank_starts_over_only_if_no_reduction_has_started(ranks):
    for rank in ranks:
        assert rank["memory"][False] == [1, 0]  # halved, and it reduces after the backward pass
        message, started = rank["memory"][True]
        assert message == "CUDA out of memory." and started > 0


def test_a_rank_of_a_sharded_model_that_runs_out_of_memory_says_what_to_lower(ranks):
    for rank in ranks:
        message = rank["fsdp"]["memory"]
        assert "--device_batch_size" in message and "--checkpoint_activations" in message
        assert "\n" not in message


@pytest.mark.parametrize("kind", ["zero2", "fsdp"])
def test_a_rank_continues_from_its_own_part_of_the_state(ranks, kind):
    for rank in ranks:
        assert rank[kind]["reloaded"] == {"kept": {77.0}, "equal": True}


# -------------------------------------------------------------------------------------------------
# one process

def test_one_process_is_neither_copied_nor_cut():
    training = Training()
    held = [id(p) for o in training.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, training.model.parameters()))
    assert not any(p._post_accumulate_grad_hooks for p in training.model.parameters())
    assert training.layout.buckets == []


def test_reduce_measures_and_clip_scales_the_gradient():
    training = Training()
    loss, _ = accumulate_gradients(training.model, micro_batches(0), 0.5, 12, training.layout)
    norm = torch.cat([grad.to_dense().flatten() * SEQUENCES * T / 2
                      for grad in local_gradients().values() if grad is not None]).norm().item()
    reduced, grad_norm = training.layout.reduce(loss)
    assert reduced == loss.item() and grad_norm == pytest.approx(norm, rel=1e-5)
    before = training.model.table.weight.grad.to_dense(), training.model.head.grad.clone()
    training.layout.clip(0.0, grad_norm)
    training.layout.clip(2 * grad_norm, grad_norm)
    assert torch.equal(training.model.head.grad, before[1])
    training.layout.clip(grad_norm / 4, grad_norm)
    torch.testing.assert_close(training.model.head.grad, before[1] / 4)
    torch.testing.assert_close(training.model.table.weight.grad.to_dense(), before[0] / 4)
    assert training.model.unused.grad is None


def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradients(capsys):
    whole, halved = Training(), Training()
    loss, size = accumulate_gradients(whole.model, micro_batches(0), 1 / 84, 6, whole.layout)
    assert size == 6 and capsys.readouterr().out == ""
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")):
        model = SmallMemory(halved.model, error)
        again, size = accumulate_gradients(model, micro_batches(0), 1 / 84, 6, halved.layout)
        assert size == 2 and capsys.readouterr().out.count("\n") == 2
        torch.testing.assert_close(again, loss)
        for a, b in zip(halved.model.parameters(), whole.model.parameters()):
            if b.grad is not None:
                torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense())
        halved.layout.zero_grad()
    broken = SmallMemory(halved.model, RuntimeError("shape"))
    with pytest.raises(RuntimeError, match="shape"):
        accumulate_gradients(broken, micro_batches(0), 1, 6, halved.layout)


class SmallMemory(nn.Module):
    """Holds at most 2 sequences at a time, and runs out in the middle of a step."""

    def __init__(self, model, error):
        super().__init__()
        self.model, self.error = model, error

    def forward(self, inputs, targets):
        if len(inputs) > 2 and self.model.head.grad is not None:
            raise self.error
        return self.model(inputs, targets)


def test_unknown_kinds_and_dtypes_are_refused_in_one_line():
    kinds = "choose from auto, replicated, zero2, fsdp"
    with pytest.raises(ValueError, match=f"parallel=zero3 is unknown: {kinds}"):
        Layout(Toy(), [], kind="zero3")
    with pytest.raises(ValueError, match="reduce_dtype=float16: choose from float32, bfloat16"):
        Layout(Toy(), [], reduce_dtype="float16")


def test_state_of_another_layout_is_refused_in_one_line():
    training = Training()
    states = training.layout.optimizer_state()
    states[0]["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="resume with the version, ranks and layout that saved it"):
        training.layout.load_optimizer_state(states)


def test_prepared_blocks_keep_plain_keys(monkeypatch):
    """docs/traps.md: compile-recompiles"""
    monkeypatch.setattr(parallel, "compile_problem", lambda device: None)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.device = torch.device("cpu")
    keys = list(model.state_dict())
    assert prepare(model) is model
    assert list(model.state_dict()) == keys
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert torch._dynamo.config.recompile_limit >= 32


# A step of a tiny model, which must compute what an uncompiled one does
ONE_STEP = """
import torch
from torch import nn
from nanochat.parallel import prepare

model = nn.Module()
model.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
model.device = torch.device("cpu")
prepare(model)
x = torch.randn(4, 8)
y = x
for block in model.blocks:
    y = block(y)
y.sum().backward()
print(torch.allclose(y, model.blocks[1].forward(model.blocks[0].forward(x))))
"""


@pytest.mark.parametrize("situation", ["missing", "failing", "blank in the path"])
def test_without_a_compiler_that_works_one_line_says_what_that_costs(tmp_path, situation):
    compiler = tmp_path / "g++"
    cache = tmp_path / "cache"
    variables = {"CXX": str(compiler)}
    if situation == "failing":  # it says its version, as one without cc1plus does
        compiler.write_text(
            "#!/bin/sh\ncase $* in *version*) echo 'g++ (GCC) 12.2.0';; "
            "*) echo 'fatal error: cannot execute cc1plus' >&2; exit 1;; esac\n",
            encoding="utf-8",
        )
        compiler.chmod(0o755)
    if situation == "blank in the path":
        variables = {}
        cache = tmp_path / "my cache"
    result = subprocess.run(
        [sys.executable, "-c", ONE_STEP],
        cwd=ROOT,
        env={**os.environ, **variables, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "True" and len(lines) == 2
    if situation == "blank in the path" and lines[0].startswith("compiling"):
        return  # this torch can
    assert "continuing with uncompiled blocks" in lines[0] and "20 to 40 % slower" in lines[0]
    assert "g++" in lines[0] and "Traceback" not in result.stderr


def test_no_rank_compiles_where_one_cannot(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "compile_problem", lambda device: None)
    monkeypatch.setattr(parallel, "all_reduce_max", lambda number: (1.0,))
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    model.device = torch.device("cpu")
    prepare(model)
    assert model.blocks[0]._compiled_call_impl is None
    assert "on another rank" in capsys.readouterr().out


GROUP_OF_ONE = """
import pathlib, torch
from nanochat.common import compute_cleanup, compute_init
from nanochat.adamw import AdamW
from nanochat.parallel import Layout

def threads():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]

compute_init("cpu", "float32")
parameter = torch.nn.Parameter(torch.ones(4))
optimizer = AdamW([parameter])
layout = Layout(torch.nn.ParameterList([parameter]), [optimizer])
loss = parameter.sum()
loss.backward()
layout.reduce(loss.detach())
optimizer.step()
layout.gather()
torch.distributed.barrier()
during = threads()
compute_cleanup()
print([sum("gloo" in name for name in names) for names in (during, threads())])
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to read threads from")
def test_no_thread_of_the_process_group_outlives_it():
    """A thread that wants the interpreter while it ends aborts a finished run with SIGABRT."""
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    result = subprocess.run(
        [sys.executable, "-c", GROUP_OF_ONE],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    during, after = json.loads(result.stdout)
    assert during > 0 == after


def layout_of(*optimizers):
    """A layout of a model whose parameters are those of the optimizers."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = nn.ParameterList(p for group in groups for p in group["params"])
    return Layout(parameters, list(optimizers))


@pytest.mark.parametrize("kind, shape, change", [
    (AdamW, (2, 3), lambda values: values.pop("v")),
    (AdamW, (2, 3), lambda values: values.update(v=torch.zeros(5))),
    (AdamW, (2, 3), lambda values: values.update(m=torch.zeros(2, 3), v=torch.zeros(2, 3))),
    (AdamW, (2, 3), lambda values: values.update(step=torch.zeros(2))),
    (AdamW, (2, 3), lambda values: values.update(step=4)),
    (AdamW, (2, 3), lambda values: values.update(m="m")),
    (AdamW, (2, 3), dict.clear),
    (Muon, (2, 3), lambda values: values.update(momentum=torch.zeros(3, 2, 3))),
    (Muon, (2, 3), lambda values: values.update(momentum=torch.zeros(2, 3))),
    (Muon, (2, 3), lambda values: values.update(exp_avg=values.pop("momentum"))),
    (RowAdagrad, (4, 3), lambda values: values.update(squares=torch.zeros(4, 3))),
    (RowAdagrad, (4, 3), lambda values: values.update(squares=torch.zeros(4, dtype=torch.int64))),
])
def test_what_is_no_state_of_a_parameter_is_refused_in_one_line(kind, shape, change):
    def layout():
        parameters = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return layout_of(kind(parameters))

    trained = layout()
    trained.optimizers[0].step()
    states = copy.deepcopy(trained.optimizer_state())
    layout().load_optimizer_state(states)
    change(states[0]["state"][0])
    with pytest.raises(UserError, match="not that of this model .*its weights can still be loaded"):
        layout().load_optimizer_state(states)


def test_a_setting_that_a_saved_group_lacks_is_that_of_this_run():
    p = torch.nn.Parameter(torch.ones(3))
    layout = layout_of(AdamW([p], eps=1e-7))
    states = copy.deepcopy(layout.optimizer_state())
    del states[0]["param_groups"][0]["eps"]
    layout.load_optimizer_state(states)
    p.grad = torch.ones(3)
    layout.optimizers[0].step()
    assert layout.optimizers[0].param_groups[0]["eps"] == 1e-7


def test_optimizer_state_of_another_model_is_refused_and_a_step_moves_to_its_device():
    def optimizers_of(*shapes):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return AdamW(parameters)

    saved = optimizers_of((2,), (3,))
    saved.step()
    state = layout_of(saved).optimizer_state()
    with pytest.raises(UserError, match=r"not that of this model .*shape \(3,\)"):
        layout_of(optimizers_of((3,), (2,))).load_optimizer_state(state)
    with pytest.raises(UserError, match="state of 1 optimizers, this run has 2"):
        layout_of(*[optimizers_of((2,), (3,)) for _ in range(2)]).load_optimizer_state(state)

    elsewhere = torch.nn.Parameter(torch.ones(2, device="meta"))  # stands for another device
    optimizer = AdamW([elsewhere])
    optimizer.state[elsewhere].update(step=torch.tensor(3.0), m=torch.ones(2), v=torch.ones(2))
    assert optimizer._state_of(elsewhere)["step"].device.type == "meta"
