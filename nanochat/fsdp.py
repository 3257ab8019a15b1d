"""A model of which every rank holds a slice: parameters, gradients and optimizer state (FSDP2).

torch's fully_shard (arXiv 2304.11277) is applied to every block and to the model. It cuts each
parameter by its first dimension: rank r of N holds the rows [r * c, (r + 1) * c) where c is
ceil(rows / N). The slices stay in float32 and are what the optimizers update. Before a block runs,
its parameters are gathered, as copies in the compute dtype; after its backward pass its gradients
are averaged, and each rank keeps its slice of them. So a rank holds no more than a few whole blocks
at a time, and from the forward to the backward pass what lies outside of blocks: embeddings, tables
and head. Before it is cut, the model is whole on every rank, in float32.

What that leaves to do is here:

    update_matrices   Muon wants whole matrices. Each matrix has an owner, which holds its momentum.
                      Slices of gradients travel to the owners, slices of updates travel back: two
                      all-to-all exchanges for each bucket of matrices, so that no rank ever holds
                      more of a bucket than its slices and the matrices that it owns.
    whole_model       An unsharded copy for evaluation and sampling. Nothing communicates in it, so
                      ranks may use it unevenly, or one rank alone.
    whole_weights     The float32 weights for a checkpoint, in the host memory of rank 0.
    load_weights      Whole weights, back into the slices.

The exchange is in ranges of elements of the flattened parameter, so that stacks (E, m, n) and
heights that the ranks do not divide are no special case.
"""
import copy
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn as nn

from nanochat.optimizer_state import Segment, unit_shape


# -------------------------------------------------------------------------------------------------
# slices

def rows_of_a_slice(shape, ranks):
    """How many rows of a parameter a rank holds; the last ranks may hold fewer, or none."""
    return -(-shape[0] // ranks)


def slice_of(shape, rank, ranks):
    """(begin, end) of the elements of a flattened parameter that a rank holds."""
    numel = math.prod(shape)
    size = rows_of_a_slice(shape, ranks) * math.prod(shape[1:])
    return min(rank * size, numel), min((rank + 1) * size, numel)


def overlap(a, b):
    """What two ranges (begin, end) have in common; an empty range where that is nothing."""
    begin = max(a[0], b[0])
    return begin, max(begin, min(a[1], b[1]))


def structure_of(model):
    """A copy of a model that shares its buffers and has parameters without memory (meta device)."""
    known = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        known[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    structure = copy.deepcopy(model, known)
    for module in structure.modules():
        # what parallel.prepare() puts before the class's forward belongs to the original,
        module.__dict__.pop("forward", None)
    structure.compiled_enter = None  # and so does this
    return structure


# -------------------------------------------------------------------------------------------------
# matrices

class Matrix:
    """One matrix (m, n) of a parameter: the parameter itself, or number `index` of a stack.

    pieces: for each rank the slice of this matrix's elements that it holds. mine: where those of
    this rank lie in its own flattened slice of the parameter.
    """

    def __init__(self, name, shape, index, owner, rank, ranks):
        self.name = name
        self.index = index
        self.owner = owner
        numel = shape[-2] * shape[-1]
        whole = index * numel, (index + 1) * numel
        self.pieces = []
        for holder in range(ranks):
            held = slice_of(shape, holder, ranks)
            begin, end = overlap(whole, held)
            self.pieces.append(slice(begin - whole[0], end - whole[0]))
            if holder == rank:
                self.mine = slice(begin - held[0], end - held[0])

    def elements_of(self, rank):
        """How many elements of the matrix a rank holds."""
        piece = self.pieces[rank]
        return piece.stop - piece.start


class MatrixBucket:
    """Matrices of one shape that are exchanged and orthogonalized together.

    group: a parameter group of Muon. Its parameters stand for the matrices that this rank owns;
    they have a shape and a gradient, and no memory.
    """

    def __init__(self, matrices, shape, group, device, rank, ranks):
        self.shape = shape
        self.group = group
        self.device = device
        self.rank, self.ranks = rank, ranks
        self.matrices = sorted(matrices, key=lambda matrix: matrix.owner)  # as all-to-all sends
        self.owned = [matrix for matrix in self.matrices if matrix.owner == rank]
        self.here = [0] * ranks   # elements that this rank holds of the matrices of each owner
        for matrix in matrices:
            self.here[matrix.owner] += matrix.elements_of(rank)
        self.there = [            # elements that each rank holds of the matrices owned here
            sum(matrix.elements_of(holder) for matrix in self.owned) for holder in range(ranks)
        ]

    def start_gradients(self, shards, dtype):
        """Start to send slices of gradients to the owners. shards: {name: this rank's slice}."""
        sent = [shards[matrix.name].grad.view(-1)[matrix.mine] for matrix in self.matrices]
        self.buffer = torch.cat(sent).to(dtype)  # kept until it was sent
        self.received = self.buffer.new_empty(sum(self.there))
        self.work = dist.all_to_all_single(
            self.received, self.buffer, self.there, self.here, async_op=True)

    def finish_gradients(self):
        """Wait for the slices; the whole gradients are then in the group."""
        self.work.wait()
        stack = torch.empty(len(self.owned), *self.shape, device=self.device)

        # what a rank sent lies in the order of the matrices
        for holder, received in enumerate(self.received.split(self.there)):
            counts = [matrix.elements_of(holder) for matrix in self.owned]
            for matrix, whole, piece in zip(self.owned, stack, received.split(counts)):
                whole.view(-1)[matrix.pieces[holder]] = piece

        for p, gradient in zip(self.group["params"], stack):
            p.grad = gradient
        self.work = self.buffer = self.received = None

    def exchange_updates(self, updates, dtype):
        """Send updates (matrices owned here, m, n) to where the slices are.

        Returns for each of self.matrices the update of this rank's elements, flat.
        """
        sent = []
        for holder in range(self.ranks):
            for matrix, update in zip(self.owned, updates):
                sent.append(update.reshape(-1)[matrix.pieces[holder]])
        sent.append(torch.empty(0, device=self.device))  # a rank may own nothing
        buffer = torch.cat(sent).to(dtype)
        received = buffer.new_empty(sum(self.here))
        dist.all_to_all_single(received, buffer, self.here, self.there)
        counts = [matrix.elements_of(self.rank) for matrix in self.matrices]
        return received.split(counts)


# -------------------------------------------------------------------------------------------------
# the model

class ShardedModel:
    """A model that fully_shard has cut, in place, and what the head of this file lists.

    dtype: of the gathered copies, in which the model computes. reduce_dtype: of the gradients while
    they are averaged, and of what the matrices' owners exchange. Every rank makes the same calls.

    shards: {name: this rank's slice of a parameter, float32}. The slice is the memory of the
    model's own parameter. It may be empty.
    """

    def __init__(self, model, dtype, reduce_dtype, rank, ranks):
        self.model = model
        self.dtype = dtype
        self.reduce_dtype = reduce_dtype
        self.rank, self.ranks = rank, ranks
        self.structure = structure_of(model)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = False  # fully_shard averages dense gradients only
        self._shard()
        self.params = dict(model.named_parameters())  # DTensors, in which slices are wrapped
        with torch.no_grad():
            self.shards = {name: p.to_local().detach() for name, p in self.params.items()}
        self.buckets = {}  # of each optimizer of matrices

    def _shard(self):
        """Let torch cut the model: its blocks, then what is left of it."""
        # imported here, for it takes a second that no other layout needs to spend
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(
            param_dtype=None if self.dtype == torch.float32 else self.dtype,
            reduce_dtype=self.reduce_dtype,
            cast_forward_inputs=False,  # the model casts by itself
        )
        mesh = init_device_mesh(next(self.model.parameters()).device.type, (self.ranks,))
        for block in getattr(self.model, "blocks", ()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)

        for module in self.model.modules():
            if isinstance(module, FSDPModule) and dist.get_backend() == "gloo":
                module.set_force_sum_reduction_for_comms(True)  # it has no averages
        if hasattr(self.model, "set_reduce_scatter_unused_params"):
            # an older torch wants every parameter to be used on every rank, or on none
            self.model.set_reduce_scatter_unused_params(True)

    # gradients

    @torch.no_grad()
    def take_gradients(self):
        """Make the averaged gradients, which the backward pass has left, those of the shards."""
        for name, p in self.params.items():
            shard = self.shards[name]
            in_place = p.to_local().data_ptr() == shard.data_ptr()
            assert in_place, "the model was moved after its layout was made"
            shard.grad = torch.zeros_like(shard) if p.grad is None else p.grad.to_local()

    # optimizers

    def divide(self, optimizer, names):
        """Give an optimizer of elements or rows this rank's slices; returns {slice: its Segments}.

        names: for each of its parameter groups, the names of the parameters.
        """
        segments = {}
        for group, names_of_group in zip(optimizer.param_groups, names):
            for name in names_of_group:
                shard = self.shards[name]
                if not shard.numel():
                    continue
                step = math.prod(unit_shape(shard, optimizer.partition))
                begin, _ = slice_of(self.params[name].shape, self.rank, self.ranks)
                segments[shard] = [Segment(name, begin // step, shard.numel() // step, 0)]
                group["params"].append(shard)
        return segments

    def divide_matrices(self, optimizer, names, bucket_elements):
        """Give every matrix of an optimizer an owner, and the optimizer those owned here.

        names: as in divide(). bucket_elements: of a bucket, for each rank; a single matrix may be
        larger. Returns {what stands for a matrix: its Segments}.
        """
        # 1. the ranks take turns as owners, from one group to the next, so that none has many more
        turns = itertools.cycle(range(self.ranks))
        buckets = []
        for group, names_of_group in zip(optimizer.param_groups, names):
            matrices = []
            for name in names_of_group:
                shape = self.params[name].shape
                numel = shape[-2] * shape[-1]
                for index in range(math.prod(shape) // numel):
                    owner = next(turns)
                    matrices.append(Matrix(name, shape, index, owner, self.rank, self.ranks))

            # 2. all matrices of a group have one shape; a bucket has as many for each rank
            size = self.ranks * max(1, bucket_elements // numel)
            for begin in range(0, len(matrices), size):
                buckets.append(self._bucket(matrices[begin:begin + size], shape[-2:], group))

        # 3. a bucket is a group of the optimizer, with the settings of the group that it is of
        optimizer.param_groups[:] = [bucket.group for bucket in buckets]
        self.buckets[optimizer] = buckets
        segments = {}
        for bucket in buckets:
            for p, matrix in zip(bucket.group["params"], bucket.owned):
                segments[p] = [Segment(matrix.name, matrix.index, 1, 0)]
        return segments

    def _bucket(self, matrices, shape, group):
        """The MatrixBucket of some matrices of a group."""
        device = self.shards[matrices[0].name].device
        owned = sum(matrix.owner == self.rank for matrix in matrices)
        stand_ins = [torch.zeros((), device=device).expand(shape) for _ in range(owned)]
        group = {**group, "params": stand_ins}
        return MatrixBucket(matrices, shape, group, device, self.rank, self.ranks)

    @torch.no_grad()
    def update_matrices(self, optimizer):
        """What optimizer.step() does, for an optimizer of matrices.

        While a bucket is orthogonalized, the gradients of the next one are under way.
        """
        buckets = self.buckets[optimizer]
        buckets[0].start_gradients(self.shards, self.reduce_dtype)
        for bucket, following in zip(buckets, [*buckets[1:], None]):
            bucket.finish_gradients()
            if following:
                following.start_gradients(self.shards, self.reduce_dtype)

            # whole matrices, for which there is memory as long as a bucket takes
            updates = ()
            if bucket.owned:
                updates = optimizer.updates(bucket.group)
            for p in bucket.group["params"]:
                p.grad = None

            # slices
            pieces = bucket.exchange_updates(updates, self.reduce_dtype)
            for matrix, update in zip(bucket.matrices, pieces):
                values = self.shards[matrix.name].view(-1)[matrix.mine]
                optimizer.apply(bucket.group, bucket.shape, values, update.float())

    # whole weights

    @torch.no_grad()
    def gather(self, name, dtype):
        """A parameter, whole, on every rank."""
        shape = self.params[name].shape
        size = rows_of_a_slice(shape, self.ranks) * math.prod(shape[1:])
        shard = self.shards[name]
        padded = torch.zeros(size, dtype=dtype, device=shard.device)
        padded[:shard.numel()] = shard.view(-1)
        whole = padded.new_empty(self.ranks * size)
        dist.all_gather_into_tensor(whole, padded)
        return whole[:math.prod(shape)].view(shape)

    def whole_model(self):
        """An unsharded copy of the model in the compute dtype, on the device of each rank."""
        known = {id(buffer): buffer for buffer in self.structure.buffers()}
        whole = copy.deepcopy(self.structure, known)
        for name in self.params:
            module, _, attribute = name.rpartition(".")
            value = nn.Parameter(self.gather(name, self.dtype), requires_grad=False)
            setattr(whole.get_submodule(module), attribute, value)
        return whole.train(self.model.training)

    def whole_weights(self):
        """The state dict of the whole model in the memory of rank 0's host; {} elsewhere."""
        weights = {}
        for name, value in self.model.state_dict().items():
            if name in self.params:
                value = self.gather(name, torch.float32)
            if self.rank == 0:
                weights[name] = value.to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load_weights(self, weights):
        """Load the state dict of a whole model, on any device."""
        for name, value in self.model.state_dict().items():
            if name not in self.params:
                value.copy_(weights[name])
                continue
            begin, end = slice_of(self.params[name].shape, self.rank, self.ranks)
            self.shards[name].view(-1).copy_(weights[name].reshape(-1)[begin:end])
