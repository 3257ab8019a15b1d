"""Bytes on one device, and bytes between devices, of training a model: computed before it begins.

`memory()` says what a device holds, `communication()` what a rank sends in a step. Both read a
model on the meta device, so that a plan takes no memory itself. Sizes are in bytes, GB = 10^9.

What is held all the time, P parameters, M of them in matrices, N ranks:

    kind          replicated         zero2              fsdp
    parameters    4 P                4 P                4 P / N      float32, tables among them
    gradients     4 P                4 P                4 P / N
    optimizer     4 M + 8 (P - M)    the same / N       the same / N

A matrix has Muon's momentum, all else two moments of Adam; a hashed table has 4 bytes a row. Hence
zero2 shards what is nearly half of the memory at no cost, and fsdp shards all of it, for which it
gathers every block twice in each micro-batch.

Beside that there are three phases, and the largest counts:

    loss      activations of all layers, gathered parameters, logits
    backward  activations of all layers, gathered parameters, temporaries of one block
    update    what reduces and applies gradients: buckets, Muon's stacks; no activations any more.
              fsdp: or a whole model in the activations' dtype, to evaluate, beside no gradients;
              or the whole model in float32, before it is cut, and nothing else

Gradients are counted in all of them, as is the case from the second micro-batch of a step on.
Not counted: fragments of the allocator, the device's context (.5 to 1 GB) and the buffers of the
collectives. MEMORY_SHARE leaves 15 % of a device to them.

tests/test_memory.py holds the sum to 10 % of the bytes that torch's CPU allocator reports for real
steps, on one process and on two ranks. No GPU has been asked yet (docs/gpu-checklist.md).
"""
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import NoInitialisers
from nanochat.loss import CHUNK_LOGITS, CHUNK_LOGITS_DEFAULT, MIN_CHUNK_TOKENS
from nanochat.parallel import BUCKET_BYTES, ReplicatedBucket, cut_into_buckets, unit_shape

PARALLEL = ("replicated", "zero2", "fsdp")
MEMORY_SHARE = 0.85  # of a device's memory that a plan uses; what is left: see above
MAX_MICRO_BATCH = {"cpu": 16, "mps": 16, "cuda": 32}


class Numbers(NamedTuple):
    """How many numbers a layer keeps of each token for each channel of the model, of all queries
    together, of all keys together, and of the MLP's hidden layer.

    Where the other widths follow from the model's, all are in the first.
    """
    width: int
    queries: int = 0
    keys: int = 0
    mlp: int = 0

    def of(self, config):
        """Numbers of a token."""
        found = self.width * config.width
        found += self.queries * config.heads * config.head_dim
        found += self.keys * config.kv_heads * config.head_dim
        if self.mlp:
            found += self.mlp * config.mlp_width
        return found


class Kept(NamedTuple):
    """What a layer keeps for the backward pass.

    Numbers are of the dtype of the activations; around is in bytes, in float32 and in bfloat16.
    checkpointed and around are of each token and channel.
    """
    compiled: Numbers        # blocks compiled
    eager: Numbers           # in float32
    eager_bfloat16: Numbers  # norms compute in float32 and keep that
    checkpointed: int        # what a block is recomputed from
    backward: Numbers        # what the backward pass of a block works with besides
    around: tuple            # once, not for each layer: embeddings, last norm, the loss's gradient


# By the name of the class, the nearest ancestor of a model's class. Counted from autograd's saved
# tensors; compiled: as torch's partitioner divides a block, which saves what a matmul of the
# backward pass reads and recomputes most of the rest. tests/test_memory.py counts again.
KEPT = {
    "GPT": Kept(Numbers(18), Numbers(18), Numbers(22), 1, Numbers(11), (12, 10)),
    "LookupGPT": Kept(Numbers(18), Numbers(19), Numbers(23), 2, Numbers(11), (16, 14)),
    # keys and values that heads share are repeated, and kept as wide as the queries
    "PortableGPT": Kept(
        compiled=Numbers(4, queries=5, keys=1, mlp=3),
        eager=Numbers(6, queries=6, keys=2, mlp=4),
        eager_bfloat16=Numbers(10, queries=8, keys=4, mlp=4),
        checkpointed=1,
        backward=Numbers(1, mlp=2),
        around=(12, 10),
    ),
    "MLAGPT": Kept(Numbers(17), Numbers(17), Numbers(20), 1, Numbers(11), (12, 10)),
    # a layer of experts and a dense one alike
    "DeepSeekGPT": Kept(Numbers(23), Numbers(25), Numbers(29), 1, Numbers(7), (12, 10)),
}
MUON_BYTES = {"cpu": 20}  # for each number of the largest stack of matrices: gradients, X, A, B
MUON_BYTES_DEFAULT = 14   # and the update before; all but gradients in bfloat16 on a GPU
ADAGRAD_BYTES = 8         # for each number of a table with dense gradients: squares and update


class Memory(NamedTuple):
    """Bytes on one device, by kind."""
    parameters: int       # of the network
    gradients: int
    optimizer: int
    activations: int      # of all layers, from the forward to the backward pass
    logits: int           # a chunk of them and its gradient, and the head's gradient
    tables: int           # embeddings, hashed tables: parameters, too
    gathered: int         # fsdp: whole copies of some blocks
    backward: int         # temporaries of one block, in place of the logits
    update: int           # buckets and stacks, in place of activations, logits and gathered

    @property
    def held(self):
        """What is there all the time."""
        return self.parameters + self.tables + self.gradients + self.optimizer

    @property
    def total(self):
        """The largest sum at any time."""
        while_training = self.activations + self.gathered + max(self.logits, self.backward)
        return self.held + max(while_training, self.update)

    def describe(self):
        """The kinds that are there at the peak, in GB."""
        if self.peak == "update":
            later = ("activations", "logits", "gathered", "backward")
        elif self.peak == "loss":
            later = ("update", "backward")
        else:
            later = ("update", "logits")
        kinds = [
            f"{name} {size / 1e9:.2f}"
            for name, size in self._asdict().items()
            if size and name not in later
        ]
        return ", ".join(kinds)

    @property
    def peak(self):
        """Where that is: "loss", "backward" or "update"."""
        if self.total == self.held + self.update:
            return "update"
        return "loss" if self.logits >= self.backward else "backward"


def build_on_meta(model_class, config):
    """A model without memory, to count its parameters."""
    with torch.device("meta"), NoInitialisers():
        return model_class(config)


def count(parameters):
    return sum(p.numel() for p in parameters)


# ------------------------------------------------------------------------------------------------
# how parameters are divided

class Group(NamedTuple):
    """Parameters of one optimizer group and unit, as parallel.py puts them in buckets."""
    partition: str   # "elements", "rows" or "matrices"
    unit: tuple      # shape of what cannot be cut
    numel: int
    padded: int      # with zeros, so that a bucket has equal slices for all ranks
    largest: int     # elements of the largest bucket

    def state_bytes(self, numel):
        """Optimizer state of so many of the elements."""
        if self.partition == "elements":
            return 8 * numel
        if self.partition == "matrices":
            return 4 * numel
        return 4 * numel // self.unit[0]  # a number for each row


def groups_of(model, ranks=1):
    """The Groups of a model's parameters, as its optimizers have them."""
    groups = []
    for role, parameters in model.parameters_by_role().items():
        # making the optimizers would import torch's compiler, which takes seconds
        partition = model.optimizers[role].optimizer.partition
        alike = {}
        for p in parameters:
            alike.setdefault(unit_shape(p, partition), []).append(p)
        for unit, params in alike.items():
            groups.append(group_of(params, partition, unit, ranks))
    return groups


def group_of(params, partition, unit, ranks):
    """The Group of parameters that have one unit. See Layout._buckets_of."""
    numel = count(params)
    if ranks == 1:
        return Group(partition, unit, numel, numel, 0)
    elements = ranks * torch.Size(unit).numel()
    wanted = BUCKET_BYTES // params[0].itemsize
    least = max(1, wanted // elements) * elements
    sizes = [
        ReplicatedBucket(part, unit, 0, ranks).numel
        for part in cut_into_buckets(params, least)
    ]
    return Group(partition, unit, numel, sum(sizes), max(sizes))


# ------------------------------------------------------------------------------------------------
# memory

def memory(model, micro_batch_size, dtype_bytes, ranks=1, device_type="cuda", *,
           parallel="replicated", checkpoint_activations=False, compiled=True, wire_bytes=4,
           grad_accum_steps=1):
    """The Memory of training a model (on any device, the meta device included).

    micro_batch_size: sequences of max_seq_len per pass. dtype_bytes: of an activation. parallel:
    replicated, zero2 or fsdp. checkpoint_activations: whether blocks are recomputed in the backward
    pass. compiled: whether blocks are. wire_bytes: of a gradient that travels. grad_accum_steps:
    counts for sparse gradients alone, those of hashed tables on a CPU, which grow with it.
    """
    config = model.config
    tokens = micro_batch_size * config.max_seq_len
    sharding = ranks if parallel == "fsdp" else 1
    roles = model.parameters_by_role()
    tables = count(roles["embedding"]) + count(roles.get("hashed", []))
    whole = count(model.parameters())
    groups = groups_of(model, ranks if parallel == "zero2" else 1)

    # 1. what is held
    is_sparse = device_type == "cpu" and parallel != "fsdp"
    hashed = count(roles.get("hashed", [])) if is_sparse else 0
    gradients = 4 * (whole - hashed) // sharding
    if hashed:
        row = 4 * config.width + 8  # its numbers, and which row it is
        gradients += len(roles["hashed"]) * row * tokens * grad_accum_steps
    optimizer = sum(group.state_bytes(group.padded) for group in groups)
    if parallel != "replicated":
        optimizer //= ranks
    padding = sum(group.padded - group.numel for group in groups)

    # 2. what is there for a while
    kept, backward = activation_bytes(
        model, tokens, dtype_bytes, parallel, checkpoint_activations, compiled)
    gathered = 0
    if parallel == "fsdp":
        block = max(count(block.parameters()) for block in model.blocks)
        root = whole - count(model.blocks.parameters())
        # embedding and head stay, and the next block comes while one is at work; of gradients
        # there are those of a block, and as float32 while they are averaged
        gathered = dtype_bytes * (root + block)
        backward += (2 * dtype_bytes + 4) * block
    update = update_bytes(groups, device_type, ranks, parallel, wire_bytes, 4 * whole)
    if hashed:
        update = max(update, gradients - 4 * (whole - hashed))  # coalesced
    if parallel == "fsdp":
        update += 4 * block  # fully_shard keeps the buffer of its last reduction
        update = max(update, dtype_bytes * whole - gradients)  # a whole copy, to evaluate
        held = (4 * whole) // ranks + gradients + optimizer
        update = max(update, 4 * whole - held)  # the model before it is cut
    return Memory(
        parameters=4 * (whole - tables + padding) // sharding,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        logits=logits_bytes(config, tokens, dtype_bytes, device_type),
        tables=4 * tables // sharding,
        gathered=gathered,
        backward=backward,
        update=update,
    )


def activation_bytes(model, tokens, dtype_bytes, parallel, checkpoint_activations, compiled):
    """(what all layers keep until the backward pass, what the backward pass of one works with)."""
    kept = next(KEPT[c.__name__] for c in type(model).__mro__ if c.__name__ in KEPT)
    is_float32 = dtype_bytes == 4
    if compiled:
        numbers = kept.compiled
    else:
        numbers = kept.eager if is_float32 else kept.eager_bfloat16
    config = model.config
    number = tokens * dtype_bytes   # bytes of one for each token
    # matrices are cast for the multiplication, and the backward pass multiplies with the copies;
    # fsdp gathers them in that dtype
    casts = 0
    if not is_float32 and parallel != "fsdp":
        casts = dtype_bytes * count(model.parameters_by_role()["matrix"])
    around = tokens * config.width * kept.around[0 if is_float32 else 1]

    whole = config.depth * numbers.of(config) * number + casts
    backward = kept.backward.of(config) * number
    if not checkpoint_activations:
        return around + whole, backward
    from_there = config.depth * kept.checkpointed * config.width * number
    return around + from_there, backward + whole // config.depth


def logits_bytes(config, tokens, dtype_bytes, device_type):
    """The loss (loss.py): temporaries of a chunk, the features, the head's gradient, whole.

    In float32 four arrays of the chunk's logits are there at once. In bfloat16 it is three and a
    half, beside the head in bfloat16; later one and a half, beside the chunk's share of the head's
    gradient, too.
    """
    limit = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS_DEFAULT)
    chunk_tokens = min(tokens, max(MIN_CHUNK_TOKENS, limit // config.vocab_size))
    chunk = chunk_tokens * config.vocab_size
    head = config.vocab_size * config.width
    if dtype_bytes == 4:
        temporaries = 16 * chunk
    else:
        # adding bfloat16 to float32, a CPU casts first
        cast = 4 * head if device_type == "cpu" else 0
        temporaries = max(14 * chunk + 2 * head, 6 * chunk + 4 * head + cast)
    copies = 4 * head  # of the head's gradient, when the backward pass multiplies it
    features = tokens * config.width * dtype_bytes
    return 4 * head + features + max(temporaries, copies)


def update_bytes(groups, device_type, ranks, parallel, wire_bytes, gradients):
    """What reduces and applies gradients, beyond parameters, gradients and optimizer state.

    gradients: bytes of all, which zero2 no longer has when it applies them.
    """
    shards = 1 if parallel == "replicated" else ranks
    muon = MUON_BYTES.get(device_type, MUON_BYTES_DEFAULT)
    stacks = [muon * group.padded for group in groups if group.partition == "matrices"]
    if device_type != "cpu":
        stacks += [ADAGRAD_BYTES * group.padded for group in groups if group.partition == "rows"]
    applying = max(stacks, default=0) // shards
    if ranks == 1:
        return applying
    if parallel == "fsdp":
        return exchange_bytes(groups, ranks, muon)

    bucket = wire_bytes * max(group.largest for group in groups)
    if parallel == "replicated":
        return max(applying, bucket)
    padded = sum(group.padded for group in groups)
    sums = wire_bytes * padded // ranks
    in_flight = wire_bytes * padded + sums
    if device_type == "cpu":
        in_flight += wire_bytes * padded  # gloo sums into a copy of each bucket
    reducing = max(sums + bucket, in_flight - gradients)
    return max(reducing, applying + 4 * padded // ranks - gradients)


def micro_batch_limit(
        model, device_memory, dtype_bytes, ranks, device_type, needed=1, **options):
    """How many sequences a device takes at a time; 0 where not even one fits.

    device_memory: bytes, or None where it is not known (then the usual number). needed: sequences
    that a pass must have, where these are more than the usual number. options: of memory().
    """
    usual = max(MAX_MICRO_BATCH[device_type], needed)
    if not device_memory:
        return usual
    largest = 0
    too_many = usual + 1
    while too_many - largest > 1:
        middle = (largest + too_many) // 2
        if fits(model, middle, dtype_bytes, ranks, device_type, device_memory, **options):
            largest = middle
        else:
            too_many = middle
    return largest


def fits(model, micro_batch_size, dtype_bytes, ranks, device_type, device_memory, **options):
    """Whether training with that many sequences fits the device."""
    needed = memory(model, micro_batch_size, dtype_bytes, ranks, device_type, **options).total
    return needed <= MEMORY_SHARE * device_memory


def exchange_bytes(groups, ranks, muon):
    """fsdp: the largest bucket of matrices, as its owners see it (fsdp.py).

    Muon's stacks, gradients twice, and the slices of the next bucket, to be sent and received.
    """
    largest = 0
    for group in groups:
        if group.partition == "matrices":
            matrix = torch.Size(group.unit).numel()
            of_a_bucket = max(1, BUCKET_BYTES // 4 // matrix) * matrix
            largest = max(largest, min(of_a_bucket, group.numel // ranks))
    return (muon + 12) * largest


# ------------------------------------------------------------------------------------------------
# communication

class Communication(NamedTuple):
    """Bytes that one rank sends in a step, by what they are."""
    gradients: int
    parameters: int
    muon: int        # fsdp: whole matrices to their owners, and the updates back

    @property
    def total(self):
        return sum(self)


def communication(model, ranks, parallel="zero2", *, grad_accum_steps=1, dtype_bytes=2,
                  wire_bytes=4):
    """The Communication of a step. n = (N - 1) / N, P parameters in buckets padded for N ranks.

        replicated   gradients   all-reduce               2 n P wire_bytes
        zero2        gradients   reduce-scatter             n P wire_bytes
                     parameters  all-gather                 n P 4
        fsdp         gradients   reduce-scatter             n P wire_bytes each micro-batch
                     parameters  all-gather, twice        2 n P dtype_bytes each micro-batch
                     muon        all-to-all, twice          2 n M / N 4

    A ring sends these many; so does a direct exchange. fsdp keeps embedding and head gathered from
    the forward to the backward pass, which therefore are gathered once. The loss and the norm of
    the gradient, two numbers, and the sparse rows of nothing (they travel as whole tables) are
    left aside.
    """
    if ranks == 1:
        return Communication(0, 0, 0)
    groups = groups_of(model, ranks)
    padded = sum(group.padded for group in groups)
    matrices = sum(group.numel for group in groups if group.partition == "matrices")

    def sent(numbers, each):
        return each * numbers * (ranks - 1) // ranks

    if parallel == "replicated":
        return Communication(2 * sent(padded, wire_bytes), 0, 0)
    if parallel == "zero2":
        return Communication(sent(padded, wire_bytes), sent(padded, 4), 0)
    whole = count(model.parameters())
    blocks = count(model.blocks.parameters())
    return Communication(
        gradients=grad_accum_steps * sent(whole, wire_bytes),
        parameters=grad_accum_steps * sent(whole + blocks, dtype_bytes),
        muon=2 * sent(matrices, 4) // ranks,
    )
