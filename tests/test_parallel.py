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

from conftest import ROOT
from nanochat import parallel
from nanochat.adagrad import RowAdagrad
from nanochat.adamw import AdamW
from nanochat.common import UserError
from nanochat.muon import Muon
from nanochat.parallel import Layout, accumulate_gradients, prepare
from toy import KINDS, SEQUENCES, WIDTH, T, Toy, Training, micro_batches


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
        except MemoryError as error:
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
    states = [None] * ranks
    dist.all_gather_object(states, first.layout.optimizer_state())
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
        pieces = [piece for state in rank[kind]["state"] for piece in state]
        tensors = [value for piece in pieces for value in piece["values"].values()]
        return sum(tensor.numel() for tensor in tensors if tensor.ndim)

    whole = elements(ranks[0], "replicated")
    assert [elements(rank, "replicated") for rank in ranks[1:]] == [0] * (len(ranks) - 1)
    for kind in ("zero2", "fsdp"):
        assert all(elements(rank, kind) < 0.75 * whole for rank in ranks)
        assert sum(elements(rank, kind) for rank in ranks) == whole, "no padding, nothing twice"


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
        assert message.startswith("out of memory with 2 sequences") and started > 0
        assert "other ranks wait" in message and "lower --device_batch_size" in message


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
    full = SmallMemory(halved.model, torch.OutOfMemoryError("CUDA"), most=0)
    with pytest.raises(MemoryError, match="with one sequence at a time: .*--checkpoint_activation"):
        accumulate_gradients(full, micro_batches(0), 1, 6, halved.layout)
    halved.layout.zero_grad()
    broken = SmallMemory(halved.model, RuntimeError("shape"))
    with pytest.raises(RuntimeError, match="shape"):
        accumulate_gradients(broken, micro_batches(0), 1, 6, halved.layout)


class SmallMemory(nn.Module):
    """Holds at most `most` sequences at a time, and runs out in the middle of a step."""

    def __init__(self, model, error, most=2):
        super().__init__()
        self.model, self.error, self.most = model, error, most

    def forward(self, inputs, targets):
        if len(inputs) > self.most and self.model.head.grad is not None:
            raise self.error
        return self.model(inputs, targets)


def test_unknown_kinds_and_dtypes_are_refused_in_one_line():
    kinds = "choose from auto, replicated, zero2, fsdp"
    with pytest.raises(ValueError, match=f"parallel=zero3 is unknown: {kinds}"):
        Layout(Toy(), [], kind="zero3")
    with pytest.raises(ValueError, match="reduce_dtype=float16: choose from float32, bfloat16"):
        Layout(Toy(), [], reduce_dtype="float16")


def state_dicts(layout):
    """What formats 1 and 2 had of the optimizers of a rank."""
    return [copy.deepcopy(optimizer.state_dict()) for optimizer in layout.optimizers]


def test_older_state_of_another_layout_is_refused_in_one_line():
    training = Training()
    states = state_dicts(training.layout)
    states[0]["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(UserError, match="resume with the version, ranks and layout that saved it"):
        training.layout.load_optimizer_state([states])
    training.layout.sharded = "a model"
    with pytest.raises(UserError, match="without --parallel=fsdp: resume with the layout"):
        training.layout.load_optimizer_state([states])


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


@pytest.mark.parametrize("situation", [
    "missing",
    pytest.param("failing", marks=pytest.mark.nightly),
    pytest.param("blank in the path", marks=pytest.mark.nightly),
])
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
    during, after = json.loads(result.stdout.splitlines()[-1])
    assert during > 0 == after


def layout_of(*optimizers):
    """A layout of a model whose parameters are those of the optimizers."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = nn.ParameterList(p for group in groups for p in group["params"])
    return Layout(parameters, list(optimizers))


def trained_layout(kind, shape):
    """The layout of two parameters after a step."""
    layout = new_layout(kind, shape)
    for p in layout.model:
        p.grad = torch.ones_like(p)
    layout.optimizers[0].step()
    return layout


def new_layout(kind, shape):
    return layout_of(kind([nn.Parameter(torch.ones(shape)) for _ in range(2)]))


WRONG_VALUES = [
    (AdamW, (2, 3), lambda values: values.pop("v")),
    (AdamW, (2, 3), lambda values: values.update(v=torch.zeros(5))),
    (AdamW, (2, 3), lambda values: values.update(m=torch.zeros(2, 3), v=torch.zeros(2, 3))),
    (AdamW, (2, 3), lambda values: values.update(step=torch.zeros(2))),
    (AdamW, (2, 3), lambda values: values.update(step=4)),
    (AdamW, (2, 3), lambda values: values.update(m="m")),
    (AdamW, (2, 3), lambda values: values.update(m=torch.zeros(6, device="meta"))),
    (AdamW, (2, 3), lambda values: values.update(m=torch.ones(6).to_sparse())),
    (AdamW, (2, 3), dict.clear),
    (Muon, (2, 3), lambda values: values.update(momentum=torch.zeros(3, 2, 3))),
    (Muon, (2, 3), lambda values: values.update(momentum=torch.zeros(2, 3))),
    (Muon, (2, 3), lambda values: values.update(exp_avg=values.pop("momentum"))),
    (RowAdagrad, (4, 3), lambda values: values.update(squares=torch.zeros(4, 3))),
    (RowAdagrad, (4, 3), lambda values: values.update(squares=torch.zeros(4, dtype=torch.int64))),
    (RowAdagrad, (4, 3), lambda values: values.update(squares=torch.zeros(()))),
]
NOT_OURS = "not that of this model .*its weights can still be loaded"


@pytest.mark.parametrize("kind, shape, change", WRONG_VALUES)
@pytest.mark.parametrize("older", [False, True])
def test_what_is_no_state_of_a_parameter_is_refused_in_one_line(kind, shape, change, older):
    trained = trained_layout(kind, shape)
    states = state_dicts(trained) if older else copy.deepcopy(trained.optimizer_state())
    new_layout(kind, shape).load_optimizer_state([states])
    change(states[0]["state"][0] if older else states[0][0]["values"])
    with pytest.raises(UserError, match=NOT_OURS):
        new_layout(kind, shape).load_optimizer_state([states])


def first_half(pieces):
    """The first of the pieces with its first three units, in a list."""
    values = pieces[0]["values"]
    half = {key: value[:3] if value.ndim else value for key, value in values.items()}
    return [{**pieces[0], "count": 3, "values": half}]


@pytest.mark.parametrize("change, needle", [
    (lambda pieces: pieces[0].update(name="2"), "a parameter 2 of another size"),
    (lambda pieces: pieces[0].update(count=7), "a parameter 0 of another size"),
    (lambda pieces: pieces[0].update(start=1), "a parameter 0 of another size"),
    (lambda pieces: pieces[0].update(count=5), "5 of 6 units of 0 are there"),
    (lambda pieces: pieces.append(pieces[0]), "units of 0 are missing or there twice"),
    (lambda pieces: pieces.__setitem__(slice(1), 2 * first_half(pieces)), "missing or there twice"),
    (lambda pieces: pieces.append({**pieces[0], "count": 0}), None),
])
def test_pieces_that_do_not_make_up_a_parameter_are_refused_in_one_line(change, needle):
    states = copy.deepcopy(trained_layout(AdamW, (2, 3)).optimizer_state())
    change(states[0])
    if needle is None:
        new_layout(AdamW, (2, 3)).load_optimizer_state([states])
        return
    with pytest.raises(UserError, match=f"{needle}.*resume with the version"):
        new_layout(AdamW, (2, 3)).load_optimizer_state([states])


def test_a_missing_piece_is_refused_and_a_parameter_without_any_begins_anew():
    states = copy.deepcopy(trained_layout(AdamW, (2, 3)).optimizer_state())
    states[0][:1] = first_half(states[0])
    with pytest.raises(UserError, match="3 of 6 units of 0 are there"):
        new_layout(AdamW, (2, 3)).load_optimizer_state([states])
    del states[0][0]
    layout = trained_layout(AdamW, (2, 3))
    layout.load_optimizer_state([states])
    first, second = layout.model
    assert first not in layout.optimizers[0].state
    assert layout.optimizers[0].state[second]["step"] == 1


def test_settings_are_those_of_this_run():
    p = nn.Parameter(torch.ones(3))
    layout = layout_of(AdamW([p], eps=1e-7))
    p.grad = torch.ones(3)
    layout.optimizers[0].step()
    layout.load_optimizer_state([layout.optimizer_state()])
    layout.load_optimizer_state([state_dicts(layout_of(AdamW([p], eps=1.0)))])
    assert layout.optimizers[0].param_groups[0]["eps"] == 1e-7


def test_optimizer_state_of_another_model_is_refused():
    def optimizers_of(*shapes):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return AdamW(parameters)

    saved = optimizers_of((2,), (3,))
    saved.step()
    states = [layout_of(saved).optimizer_state()]
    with pytest.raises(UserError, match=NOT_OURS):
        layout_of(optimizers_of((3,), (2,))).load_optimizer_state(states)
    two = layout_of(optimizers_of((2,), (3,)), optimizers_of((2,), (3,)))
    with pytest.raises(UserError, match="state of 1 optimizers, this run has 2"):
        two.load_optimizer_state(states)
