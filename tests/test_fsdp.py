"""Real models that fully_shard has cut, against one process: training, evaluation, saving, bytes.

test_parallel.py has what the layouts have in common.
"""
import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from models import VOCAB_SIZE, make_model
from nanochat import parallel
from nanochat.fsdp import overlap, slice_of, structure_of
from nanochat.loss_eval import evaluate_bpb
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.variants import MODEL_CLASSES
from traffic import counted

RANKS = [2, 3, 6]
SEQUENCES, T = 12, 16
STEPS = 3
ONE_DOCUMENT = ["\1\2\3\4\5\6\7"]


def batches_of(step, rank=0, ranks=1):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB_SIZE, (SEQUENCES, T + 1), generator=generator)[rank::ranks]
    return [(part[:, :-1], part[:, 1:], "state") for part in ids.chunk(2)]


def model_of(name):
    options = {"tied": True} if name == "portable" else {}
    return make_model(MODEL_CLASSES[name], **options).train()


class Training:
    """A small model that trains as rank `rank` of `ranks`."""

    def __init__(self, name="gpt", rank=0, ranks=1, kind="fsdp", dtype=torch.float32, **prepared):
        self.rank, self.ranks = rank, ranks
        model = model_of(name)
        model.compute_dtype = dtype
        self.model = prepare(model, **{"compile": False, **prepared})
        # no weight decay: it acts by the sign of an update, also of one that is all rounding
        self.optimizers = model.setup_optimizers(learning_rate=0.0005)
        for group in self.optimizers[0].param_groups:
            # so that no update is the sign of a gradient that is all rounding; the balance of
            # experts, without averages, is the sign of a count
            if group["betas"] != (0.0, 0.0):
                group["eps"] = 1e-3
        self.layout = Layout(model, self.optimizers, kind)
        self.losses = []

    def step(self, number):
        batches = batches_of(number, self.rank, self.ranks)
        scale = self.ranks / (SEQUENCES * T)
        loss, _ = accumulate_gradients(self.model, batches, scale, SEQUENCES, self.layout)
        loss, grad_norm = self.layout.reduce(loss)
        self.losses.append(loss)
        self.layout.apply(1.0, grad_norm)
        self.layout.zero_grad()

    def run(self, steps=STEPS):
        for number in range(steps):
            self.step(number)
        return self

    def weights(self):
        whole = self.layout.whole_model()
        return {name: value.clone() for name, value in whole.state_dict().items()}

    def result(self):
        return {"weights": self.weights(), "losses": self.losses}


class Bytes:
    """A tokenizer whose tokens are the numbers of characters."""

    def encode(self, texts, prepend):
        return [[prepend, *map(ord, text)] for text in texts]

    def get_bos_token_id(self):
        return 0


# -------------------------------------------------------------------------------------------------
# several ranks: one group of processes does everything, the tests look at what it returned

def worker(rank, ranks, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel.BUCKET_BYTES = 4 * 64 * 64  # a matrix
    results = {"gpt": Training("gpt", rank, ranks).run().result()}
    if ranks == 3:
        for name in ("lookup_ngrams", "portable"):
            results[name] = Training(name, rank, ranks).run().result()
        results["deepseek"] = Training("deepseek", rank, ranks).run().result()
        results["zero2 deepseek"] = Training("deepseek", rank, ranks, "zero2").run().result()
    if ranks == 2:
        for name in ("gpt", "lookup_ngrams"):
            halves = Training(name, rank, ranks, dtype=torch.bfloat16)
            results[f"bfloat16 {name}"] = halves.run().result()
        results["recomputed"] = Training(
            "lookup", rank, ranks, checkpoint_activations=True).run().result()
        results["lookup"] = Training("lookup", rank, ranks).run().result()
        results["compiled"] = Training(
            "lookup", rank, ranks, checkpoint_activations=True, compile=True).run(2).result()
        for kind in ("replicated", "zero2", "fsdp"):
            results[f"bytes {kind}"] = bytes_of_a_step(rank, ranks, kind)
    results["whole"] = whole(rank, ranks)
    results["freed"] = whole_parameters_left(rank, ranks)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def bytes_of_a_step(rank, ranks, kind):
    training = Training("gpt", rank, ranks, kind).run(1)
    with counted() as moved:
        training.step(1)
    return dict(moved)


def whole(rank, ranks):
    """An uneven evaluation, whole weights, and those loaded into another sharded model."""
    training = Training("gpt", rank, ranks).run(1)
    evaluated = training.layout.whole_model()
    with counted() as moved:
        bpb = evaluate_bpb(evaluated, Bytes(), ONE_DOCUMENT, "cpu", rank=rank, world_size=ranks)
    snapshot = training.layout.whole_weights()
    [weights] = broadcast([snapshot])
    again = Training("gpt", rank, ranks)
    again.layout.load_weights(weights)
    return {
        "bpb": bpb,
        "moved": dict(moved),
        "keys": list(training.model.state_dict()),
        "snapshot": snapshot,
        "loaded": again.weights(),
        "elements": sum(shard.numel() for shard in training.layout.sharded.shards.values()),
    }


def whole_parameters_left(rank, ranks):
    """How many of a model's parameters are still there, whole, after it was cut."""
    model = model_of("lookup")
    optimizers = model.setup_optimizers()
    whole = [weakref.ref(p) for p in model.parameters()]
    layout = Layout(model, optimizers, "fsdp")
    gc.collect()
    assert layout.sharded.model is model
    return sum(p() is not None for p in whole)


def broadcast(values):
    dist.broadcast_object_list(values, src=0)
    return values


@pytest.fixture(scope="module", params=RANKS)
def ranks(request, tmp_path_factory):
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("fsdp")
    count = request.param
    port = 30000 + count + os.getpid() % 400
    mp.start_processes(worker, (count, port, str(folder)), nprocs=count, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def only(ranks, *counts):
    """Leave a test out where these numbers of ranks have not run it."""
    if len(ranks) not in counts:
        pytest.skip(f"run by {counts} ranks")


def assert_near(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **tolerance)


@pytest.mark.parametrize("name", ["gpt", "lookup_ngrams", "portable"])
def test_ranks_with_a_slice_each_train_what_one_process_trains(ranks, name):
    """A vocabulary padded to 128, which neither 3 nor 6 divide; a tied head.

    docs/traps.md: padded-vocabulary-ranks
    """
    if name != "gpt":
        only(ranks, 3)
    one = Training(name).run().result()
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_near(rank[name]["weights"], one["weights"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("result", ["deepseek", "zero2 deepseek"])
def test_experts_are_balanced_by_the_loads_of_all_ranks(ranks, result):
    """The biases, too, move as on one process, by steps that are far above the tolerance."""
    only(ranks, 3)
    one = Training("deepseek").run().result()
    bias = "blocks.1.mlp.router.bias"
    moved = (one["weights"][bias] - model_of("deepseek").state_dict()[bias]).abs()
    assert moved.max() > 2e-5
    for rank in ranks:
        assert rank[result]["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_near(rank[result]["weights"], one["weights"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt", "lookup_ngrams"])
def test_copies_in_bfloat16_train_float32_slices(ranks, name):
    only(ranks, 2)
    one = Training(name, dtype=torch.bfloat16).run().result()
    for rank in ranks:
        result = rank[f"bfloat16 {name}"]
        assert result["losses"] == pytest.approx(one["losses"], rel=0.02)
        assert result["weights"]["head.weight"].dtype == torch.bfloat16


def test_recomputed_activations_change_no_bit_and_compiled_blocks_little(ranks):
    """docs/traps.md: compile-recompiles"""
    only(ranks, 2)
    for rank in ranks:
        assert rank["recomputed"]["losses"] == rank["lookup"]["losses"]
        assert_near(rank["recomputed"]["weights"], rank["lookup"]["weights"], atol=0, rtol=0)
        assert rank["compiled"]["losses"] == pytest.approx(rank["lookup"]["losses"][:2], abs=1e-5)


def test_an_evaluation_in_which_a_rank_has_nothing_to_do_meets_once(ranks):
    """docs/traps.md: uneven-collectives"""
    one = Training("gpt").run(1)
    bpb = evaluate_bpb(one.model, Bytes(), ONE_DOCUMENT, "cpu")
    for rank in ranks:
        assert rank["whole"]["bpb"] == pytest.approx(bpb, abs=1e-5)
        assert rank["whole"]["moved"] == {"all_reduce": 16}, "two sums of nats at once"


def test_whole_weights_are_those_of_the_slices_with_plain_keys(ranks):
    plain = model_of("gpt").state_dict()
    snapshot = ranks[0]["whole"]["snapshot"]
    for rank in ranks:
        assert rank["whole"]["keys"] == list(plain)
        assert_near(rank["whole"]["loaded"], snapshot, atol=0, rtol=0)
    assert [rank["whole"]["snapshot"] for rank in ranks[1:]] == [{}] * (len(ranks) - 1)
    elements = sum(rank["whole"]["elements"] for rank in ranks)
    assert elements == sum(value.numel() for value in plain.values()), "each is held once"


def test_no_rank_keeps_whole_parameters(ranks):
    assert [rank["freed"] for rank in ranks] == [0] * len(ranks)


def test_a_step_moves_no_more_bytes_than_it_must(ranks):
    """Two micro-batches a step, float32. By convention a reduce-scatter moves its input."""
    only(ranks, 2)
    model = model_of("gpt")
    P = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.blocks.parameters())  # all of them matrices
    agreed = 8  # loss and norm
    assert ranks[0]["bytes replicated"] == {"all_reduce": 4 * P + agreed}
    assert ranks[0]["bytes zero2"] == {
        "reduce_scatter": 4 * P,
        "all_gather": 4 * P,
        "all_reduce": agreed,
    }
    micro_batches, times = 2, 2  # blocks are gathered in the forward and in the backward pass
    of_all = [rank["bytes fsdp"] for rank in ranks]
    for moved in of_all:
        assert moved["all_gather"] == 4 * micro_batches * (P - blocks + times * blocks)
        assert moved["reduce_scatter"] == 4 * micro_batches * P
        assert moved["all_reduce"] == agreed
    # slices of gradients to the owners and of updates back: each element twice, over all ranks
    assert sum(moved["all_to_all"] for moved in of_all) == 4 * 2 * blocks


# -------------------------------------------------------------------------------------------------
# one process

def test_slices_partition_a_parameter_in_whole_rows():
    for shape in [(13, 8), (5,), (2, 3, 3), (1,), (128, 64), (7, 1)]:
        for ranks in (1, 2, 3, 6, 8):
            slices = [slice_of(shape, rank, ranks) for rank in range(ranks)]
            rows = [tensor.numel() for tensor in torch.zeros(shape).chunk(ranks)]
            rows += [0] * (ranks - len(rows))
            assert [end - begin for begin, end in slices] == rows, "as torch cuts a tensor"
            assert [end for _, end in slices[:-1]] == [begin for begin, _ in slices[1:]]
    assert overlap((0, 4), (2, 9)) == (2, 4) and overlap((0, 2), (5, 9)) == (5, 5)


@pytest.mark.parametrize("name", ["gpt", "lookup", "lookup_ngrams", "portable", "deepseek"])
def test_recomputed_activations_give_the_same_gradients_and_keys(name):
    gradients, kept = [], []
    for recompute in (False, True):
        model = prepare(model_of(name), compile=False, checkpoint_activations=recompute)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            inputs, targets, _ = batches_of(0)[0]
            loss = model(inputs, targets)
        loss.backward()
        gradients.append({key: p.grad.to_dense() for key, p in model.named_parameters()})
        kept.append(sum(tensor.numel() for tensor in saved))
        assert list(model.state_dict()) == list(model_of(name).state_dict())
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert kept[1] < 0.7 * kept[0], "fewer numbers wait for the backward pass"


def test_a_copy_of_a_model_has_none_of_the_code_that_was_put_before_its_own():
    model = prepare(model_of("gpt"), compile=False, checkpoint_activations=True)
    model.compiled_enter = model.enter  # as on a GPU
    structure = structure_of(model)
    assert structure.compiled_enter is None
    assert "forward" in vars(model.blocks[0]) and "forward" not in vars(structure.blocks[0])


def test_a_whole_model_is_the_model_itself_where_nothing_is_cut():
    training = Training(kind="fsdp")
    assert training.layout.whole_model() is training.model
    assert training.layout.sharded is None, "one process has nothing to share"
    assert isinstance(training.model.embed.weight, nn.Parameter)
