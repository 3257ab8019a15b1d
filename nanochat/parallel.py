"""Parallelism, applied from outside: who averages gradients, and who updates which parameters.

The model is single-device code and the optimizers know no ranks. `prepare` compiles the model, and
a `Layout`, made after it, stands between the model and its optimizers. One training step is:

    loss, size = accumulate_gradients(model, micro_batches, scale, size, layout)
    loss, grad_norm = layout.reduce(loss)
    layout.apply(max_norm, grad_norm)           # clip, update, gather
    layout.zero_grad()

A step that is skipped calls only reduce() and zero_grad(). Every rank makes the same calls. The
contract, in phases:

1. reduce   The gradients are averaged over ranks. Parameters of one optimizer group and dtype
            travel in buckets of about 32 MB, as float32 or bfloat16. A bucket starts in the
            backward pass of the last micro-batch, as soon as its gradients are complete; reduce()
            starts the remaining ones and waits. Buckets start strictly in one order, the same on
            all ranks: the order in which rank 0's gradients were complete in the first step. On
            several ranks a missing gradient (a parameter that was not used) counts as zero.
2. judge    One all-reduce yields the loss and the norm of the averaged gradient, the same two
            numbers on every rank: a NaN on one rank is a NaN on all. clip() scales the averaged
            gradient.
3. apply    The optimizers update what they hold, from the `.grad` of the tensors in their groups.
4. gather   Ranks exchange updated parameters.

Three kinds of layout fill in the phases:

    kind         reduce           an optimizer holds          gather
    replicated   all-reduce       all parameters              nothing
    zero2        reduce-scatter   this rank's shards (1 / N)  all-gather (ZeRO-2, arXiv 1910.02054)
    fsdp         reduce-scatter   this rank's shards (1 / N)  nothing: each block's parameters are
                                                              gathered whenever it runs (fsdp.py)

A shard is cut as the optimizer's `partition` allows: "elements" of the flattened bucket (AdamW),
whole "rows" of a table (RowAdagrad), whole "matrices" (Muon). On one process nothing is
communicated, copied or cut: the optimizers hold the parameters, and reduce() only measures.

Under fsdp there are no buckets, nor is there a whole model between steps. Gradients are reduced in
the backward pass of every micro-batch and add up in the shards; reduce() only measures them. In
apply, Muon's matrices travel to their owners and back, all-to-all. Whoever wants whole weights asks
the layout: whole_model() to evaluate and sample, whole_weights() to save, load_weights().

Under zero2, ownership is block-cyclic over the parameters of a group: rank r owns slice r of every
bucket, and a bucket is short beside a large group. Within a bucket the slices are contiguous,
because that is what reduce-scatter and all-gather exchange without another copy. A finer cycle
would balance nothing, since all slices of a bucket have the same number of units of the same shape.
"""
import functools
import math

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from nanochat.common import UserError, all_reduce_max, get_dist_info, print0
from nanochat.fp8 import convert
from nanochat.fsdp import ShardedModel, overlap
from nanochat.hardware import compile_problem, empty_cache, is_out_of_memory
from nanochat.optimizer_state import (
    Segment,
    load_pieces,
    load_state_dict,
    pieces_of,
    unit_shape,
    units_of,
)

BUCKET_BYTES = 32 * 2**20  # large enough for full bandwidth, small enough to overlap with backward
ALIGNMENT = 16             # elements: a parameter in a bucket begins where vector loads may begin
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare(model, compile=True, checkpoint_activations=False, fp8=None, lengths=1):
    """Apply to a model, in place, what training wants from outside; returns the model.

    fp8: an Fp8Recipe (fp8.py), None for none. lengths: how many lengths of sequences it will be
    trained with, each of which has a graph of its own. The order is: FP8, activation checkpointing,
    compiling, and then a Layout, which may shard the model.
    State-dict keys stay plain, and `block.forward` stays uncompiled. Modules must be called through
    `__call__`; the hooks of fully_shard then run outside of the compiled code, in which dynamo
    enters no function of torch.nn or torch.distributed.

    Where this machine cannot compile, one line says why and what that costs, and the blocks stay
    as they are, on all ranks.
    """
    if fp8:
        convert(model, fp8)
    if checkpoint_activations:
        for block in model.blocks:
            recompute_in_backward(block)
    if compile and can_compile(model.device):
        compile_blocks(model.blocks, lengths)
        if model.device.type == "cuda":  # a CPU gains nothing by it
            model.compile_loss = True
            model.compiled_enter = torch.compile(model.enter, dynamic=False)
    return model


def compile_blocks(blocks, lengths=1):
    """Compile modules of one class in place, each when it is first called."""
    # All blocks share one code object and one limit. Each sequence length needs a graph for each
    # micro-batch size, and running out of memory halves the size.
    limit = max(32, 4 * lengths)
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    print0("compiling the blocks in the first step: seconds when they are known, up to a "
           "minute when not")
    for block in blocks:
        block.compile(dynamic=False)


def recompute_in_backward(block):
    """Keep no activations of a block but its inputs: the backward pass runs it again (arXiv
    1604.06174). The gradients are the same to the bit; a step takes a third more arithmetic."""
    forward = block.forward

    def recomputed(*inputs, **more):
        if not torch.is_grad_enabled():
            return forward(*inputs, **more)
        # blocks draw no random numbers, whose state would have to be kept
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(forward, *inputs, **options, **more)

    block.forward = recomputed


def can_compile(device):
    """Whether all ranks can compile for their device. If not, one line says what that costs."""
    problem = compile_problem(device)
    if not all_reduce_max(problem is not None)[0]:
        return True
    print0(
        f"warning: torch.compile does not work here ({problem or 'on another rank'}): continuing "
        "with uncompiled blocks, which train 20 to 40 % slower on a CPU (dev/LOG.md). For the full "
        "speed install a C++ compiler (Debian, Ubuntu: apt-get install g++), or name one in CXX; "
        "no blank may be in the paths of TMPDIR and TORCHINDUCTOR_CACHE_DIR"
    )
    return False


# -------------------------------------------------------------------------------------------------
# buckets

def round_up(number, multiple):
    return -(-number // multiple) * multiple


def cut_into_buckets(params, least):
    """Lists of consecutive parameters; each but the last holds at least `least` elements."""
    buckets = [[]]
    size = 0
    for p in params:
        if size >= least:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.numel()
    return buckets


def params_of(optimizer):
    """The tensors in an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole_segments(params, names, partition):
    """{parameter: its Segments}, for an optimizer that holds whole parameters."""
    return {p: [Segment(names[p], 0, units_of(p, partition), 0)] for p in params}


class ReplicatedBucket:
    """Parameters of one optimizer group that travel together. Every rank updates all of them.

    In a flat buffer of `numel` elements the parameters lie end to end, zero-padded so that `ranks`
    equal slices consist of whole units.
    """

    def __init__(self, params, unit, rank, ranks):
        self.params = params
        self.unit = unit
        self.rank = rank
        self.ranks = ranks
        self.places = []
        step = math.prod(unit) if unit else ALIGNMENT
        end = 0
        for p in params:
            self.places.append(slice(end, end + p.numel()))
            end += round_up(p.numel(), step)
        self.numel = round_up(end, ranks * step)
        self.missing = set(params)  # whose gradients are not complete in this step
        self.work = None            # the reduction that has started,
        self.buffer = None          # what it reads,
        self.summed = None          # and what it writes

    def expect_all(self):
        """A new step: all gradients are missing again."""
        self.missing = set(self.params)

    def held(self):
        """The tensors that this rank's optimizer holds."""
        return self.params

    def segments(self, names, partition):
        """{tensor that is held: its Segments}. names: {parameter: its name}."""
        return whole_segments(self.params, names, partition)

    def take_gradients(self, dtype):
        """All gradients in one flat buffer of this dtype. The gradients themselves are freed."""
        buffer = torch.zeros(self.numel, dtype=dtype, device=self.params[0].device)
        for p, place in zip(self.params, self.places):
            if p.grad is None:
                continue
            view = buffer[place].view(p.shape)
            if p.grad.is_sparse:
                grad = p.grad.coalesce()
                view.index_copy_(0, grad.indices()[0], grad.values().to(dtype))
            else:
                view.copy_(p.grad)
            p.grad = None
        return buffer

    def start(self, buffer):
        """Start to sum a buffer of gradients over ranks."""
        self.buffer = self.summed = buffer
        self.work = dist.all_reduce(buffer, async_op=True)

    def finish(self):
        """Wait for the sum; the averages become the gradients of what this rank holds."""
        self.work.wait()
        average = self.summed.float().div_(self.ranks)  # gloo has sums only
        for p, place in zip(self.params, self.places):
            p.grad = average[place].view_as(p).to(p.dtype)
        self._release()

    def start_gather(self):
        """Start to exchange updated parameters. Returns the work to wait for, or None."""
        return None

    def _release(self):
        self.work = self.buffer = self.summed = None


class ShardedBucket(ReplicatedBucket):
    """Each rank updates one slice: its shard.

    The parameters become views of one flat buffer, and the shard is a view of that buffer, too.
    So nothing is stored twice, whatever is loaded into the model is in the shard, and parameters
    are gathered in place.
    """

    def __init__(self, params, unit, rank, ranks):
        super().__init__(params, unit, rank, ranks)
        self.values = torch.zeros(self.numel, dtype=params[0].dtype, device=params[0].device)
        for p, place in zip(self.params, self.places):
            view = self.values[place].view(p.shape)
            view.copy_(p.detach())
            p.data = view
        self.shard = self.values.view(ranks, -1, *unit)[rank]

    def held(self):
        return [self.shard]

    def start(self, buffer):
        self.buffer = buffer
        self.summed = buffer.new_empty(self.numel // self.ranks)
        self.work = dist.reduce_scatter_tensor(self.summed, buffer, async_op=True)

    def finish(self):
        self.work.wait()
        average = self.summed.float().div_(self.ranks)
        self.shard.grad = average.view_as(self.shard).to(self.shard.dtype)
        self._release()

    def segments(self, names, partition):
        step = math.prod(self.unit)
        size = self.numel // self.ranks
        mine = self.rank * size, (self.rank + 1) * size
        found = []
        for p, place in zip(self.params, self.places):
            begin, end = overlap((place.start, place.stop), mine)
            if begin < end:
                start, count = (begin - place.start) // step, (end - begin) // step
                found.append(Segment(names[p], start, count, (begin - mine[0]) // step))
        return {self.shard: found}

    def start_gather(self):
        in_place = self.params[0].data_ptr() == self.values.data_ptr()
        assert in_place, "the model was moved after its layout was made"
        return dist.all_gather_into_tensor(self.values, self.shard.view(-1), async_op=True)


BUCKETS = {"replicated": ReplicatedBucket, "zero2": ShardedBucket}
KINDS = (*BUCKETS, "fsdp")


# -------------------------------------------------------------------------------------------------
# layout

class Layout:
    """Divides a model, its gradients and its optimizer state among the ranks of the process group.

    optimizers: Muon, AdamW, RowAdagrad, without state. kind: replicated, zero2, fsdp, or auto
    (zero2 on several ranks). reduce_dtype: of the gradients while they travel, float32 or bfloat16.
    UserError for another kind or dtype.

    For zero2 the optimizers' groups hold this rank's shards from here on, and the model's
    parameters are views of the buckets; for fsdp the model holds no more than its shards. Move the
    model to its device before, not after.
    """

    def __init__(self, model, optimizers, kind="auto", reduce_dtype="float32"):
        if kind not in ("auto", *KINDS):
            kinds = ", ".join(KINDS)
            raise UserError(f"parallel={kind} is unknown: choose from auto, {kinds}")
        if reduce_dtype not in WIRE_DTYPES:
            raise UserError(f"reduce_dtype={reduce_dtype}: choose from {', '.join(WIRE_DTYPES)}")

        self.model = model
        self.optimizers = optimizers
        self.reduce_dtype = WIRE_DTYPES[reduce_dtype]
        self.rank, self.ranks = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.kind = kind
        if kind == "auto":
            self.kind = "zero2" if self.ranks > 1 else "replicated"
        self.buckets = []           # in the order in which they start
        self.sharded = None         # a ShardedModel
        self.overlap = False        # whether buckets start during the backward pass
        self.order_is_known = False
        self._begin_step()
        # for optimizer_state.py: {name: how many units the parameter has} for each optimizer, and
        # the Segments of each tensor that an optimizer holds
        self.units, self.segments = [], {}
        self._divide()

    def _divide(self):
        """Give the optimizers what this rank updates."""
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            partition = optimizer.partition
            self.units.append({names[p]: units_of(p, partition) for p in params_of(optimizer)})
            if self.ranks == 1:
                self.segments |= whole_segments(params_of(optimizer), names, partition)
            else:
                assert not optimizer.state, "a layout cuts parameters before there is any state"
        if self.ranks == 1:
            return
        if self.kind == "fsdp":
            self._shard(names)
        else:
            self._make_buckets(names)

    def _shard(self, names):
        """Cut the model. Nothing may hold on to the whole parameters, lest they keep memory."""
        names_of = {}
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            names_of[optimizer] = [[names[p] for p in group["params"]] for group in groups]
            for group in groups:
                group["params"] = []
        names.clear()

        dtype = getattr(self.model, "compute_dtype", torch.float32)
        self.sharded = ShardedModel(self.model, dtype, self.reduce_dtype, self.rank, self.ranks)
        for optimizer, names_of_groups in names_of.items():
            if optimizer.partition == "matrices":
                elements = BUCKET_BYTES // 4
                self.segments |= self.sharded.divide_matrices(optimizer, names_of_groups, elements)
            else:
                self.segments |= self.sharded.divide(optimizer, names_of_groups)

    def _make_buckets(self, names):
        bucket_class = BUCKETS[self.kind]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                buckets = self._buckets_of(group["params"], optimizer.partition, bucket_class)
                group["params"] = [tensor for bucket in buckets for tensor in bucket.held()]
                self.buckets.extend(buckets)
                for bucket in buckets:
                    self.segments |= bucket.segments(names, optimizer.partition)

        self.buckets.reverse()  # a guess, until the first step has shown the order
        for bucket in self.buckets:
            for p in bucket.params:
                hook = functools.partial(self._gradient_is_complete, bucket)
                p.register_post_accumulate_grad_hook(hook)

    def _buckets_of(self, params, partition, bucket_class):
        """Buckets of one parameter group: parameters of one dtype and unit, about BUCKET_BYTES."""
        alike = {}
        for p in params:
            alike.setdefault((p.dtype, unit_shape(p, partition)), []).append(p)

        buckets = []
        for (dtype, unit), same in alike.items():
            # at least a unit for each rank, and no padding while parameters are single units
            elements_of_all_ranks = self.ranks * math.prod(unit)
            wanted = BUCKET_BYTES // dtype.itemsize
            least = max(1, wanted // elements_of_all_ranks) * elements_of_all_ranks
            for part in cut_into_buckets(same, least):
                buckets.append(bucket_class(part, unit, self.rank, self.ranks))
        return buckets

    # phase 1: reduce

    def expect_last_gradients(self):
        """Announce the backward pass that completes the gradients: buckets may start in it."""
        self.last_pass = True

    def _gradient_is_complete(self, bucket, p):
        """A hook, called in every backward pass once the gradient of p is accumulated."""
        if not self.last_pass or p not in bucket.missing:
            return
        bucket.missing.remove(p)
        if bucket.missing:
            return
        self.completed.append(bucket)
        if self.overlap:
            self._start_complete_buckets()

    def _start_complete_buckets(self):
        """Start the buckets whose turn it is, up to the first that still misses a gradient."""
        while self.started < len(self.buckets):
            bucket = self.buckets[self.started]
            if bucket.missing:
                return
            self._start(bucket)

    def _start(self, bucket):
        buffer = bucket.take_gradients(self.reduce_dtype)  # may run out of memory
        self.started += 1  # from here on other ranks wait for this one
        bucket.start(buffer)

    def _finish_reductions(self):
        for bucket in self.buckets[self.started:]:
            self._start(bucket)
        for bucket in self.buckets:
            bucket.finish()
        if self.buckets and not self.order_is_known:
            self._learn_order()
        self._begin_step()

    def _learn_order(self):
        """From the next step on, buckets start in the order in which rank 0 completed them."""
        others = [bucket for bucket in self.buckets if bucket not in self.completed]
        order = [self.buckets.index(bucket) for bucket in self.completed + others]
        order = torch.tensor(order, device=self.buckets[0].params[0].device)
        dist.broadcast(order, src=0)
        self.buckets = [self.buckets[i] for i in order.tolist()]
        self.order_is_known = True

    def _begin_step(self):
        self.started = 0        # how many buckets have started to reduce
        self.last_pass = False  # whether a backward pass completes the gradients
        self.completed = []     # the buckets whose gradients are complete, in that order
        for bucket in self.buckets:
            bucket.expect_all()

    # phase 2: judge

    @torch.no_grad()
    def reduce(self, loss):
        """Complete the reduction. loss: this rank's loss, a 0-D tensor.

        Returns (loss, norm of the gradient), two floats, both of the average over ranks and the
        same on every rank. Waits for the device.
        """
        self._finish_reductions()
        if self.sharded:
            self.sharded.take_gradients()
        for tensor in self._held():
            if tensor.grad is not None and tensor.grad.is_sparse:
                tensor.grad = tensor.grad.coalesce()
        norm_sq = self._grad_norm_sq(loss.device)
        if self.ranks > 1:
            if self.kind == "replicated":
                norm_sq = norm_sq / self.ranks  # every rank holds all of it
            both = torch.stack((norm_sq, loss / self.ranks))
            dist.all_reduce(both)
            norm_sq, loss = both
        return loss.item(), norm_sq.sqrt().item()

    def _grad_norm_sq(self, device):
        """Sum of the squares of all gradients that are held here, 0-D."""
        if self.sharded:
            return grad_norm_sq(self._held(), device)
        total = torch.zeros((), device=device)
        for optimizer in self.optimizers:
            as_one = optimizer.partition == "matrices"
            for group in optimizer.param_groups:
                total = total + grad_norm_sq(group["params"], device, as_one)
        return total

    @torch.no_grad()
    def clip(self, max_norm, grad_norm):
        """Scale the averaged gradient so that its norm is at most max_norm; 0 does not clip.

        grad_norm: as reduce() returned it.
        """
        if not max_norm:
            return
        scale = min(1.0, max_norm / (grad_norm + 1e-6))
        for tensor in self._held():
            if tensor.grad is not None:
                stored_values(tensor.grad).mul_(scale)

    # phases 3 and 4: apply and gather

    def apply(self, max_norm, grad_norm):
        """Clip the averaged gradient, update what is held here, exchange the parameters."""
        self.clip(max_norm, grad_norm)
        for optimizer in self.optimizers:
            if self.sharded and optimizer.partition == "matrices":
                self.sharded.update_matrices(optimizer)
            else:
                optimizer.step()
        self.gather()

    @torch.no_grad()
    def gather(self):
        """Exchange the updated parameters: afterwards every rank has all of them."""
        works = [bucket.start_gather() for bucket in self.buckets]
        for work in works:
            if work is not None:
                work.wait()

    # around a step

    def zero_grad(self):
        """Set all gradients to None, also those of a step that is skipped."""
        if self.started:
            self._finish_reductions()  # other ranks wait for what has begun
        self._begin_step()
        for tensor in (*self.model.parameters(), *self._held()):
            tensor.grad = None

    def memory_sufficed(self):
        """Note that a step's passes fitted into memory, so that later ones may overlap.

        Optimizer state is made by the first update, so only passes beside that state are proof.
        """
        self.overlap = any(optimizer.state for optimizer in self.optimizers)

    def _held(self):
        """The tensors whose gradients this rank judges, clips and applies."""
        if self.sharded:
            return list(self.sharded.shards.values())
        return [tensor for optimizer in self.optimizers for tensor in params_of(optimizer)]

    # whole weights

    def whole_model(self):
        """A model to evaluate and to sample from, in which nothing communicates.

        It is the model itself; under fsdp an unsharded copy in the compute dtype, for which all
        ranks must ask. Whoever asked lets go of it before training continues.
        """
        return self.sharded.whole_model() if self.sharded else self.model

    def whole_weights(self):
        """A snapshot of the whole model's state dict in the memory of rank 0's host; {} elsewhere.

        All ranks call it.
        """
        if self.sharded:
            return self.sharded.whole_weights()
        weights = self.model.state_dict() if self.rank == 0 else {}
        return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}

    def load_weights(self, weights):
        """Load the state dict of a whole model. All ranks call it with the same weights."""
        if self.sharded:
            self.sharded.load_weights(weights)
        else:
            self.model.load_state_dict(weights)

    # checkpoints

    def optimizer_state(self):
        """This rank's part of the optimizers' state: a list of pieces for each optimizer.

        See optimizer_state.py. What every rank holds is of rank 0 only.
        """
        if self.kind == "replicated" and self.rank != 0:
            return [[] for _ in self.optimizers]
        return [pieces_of(optimizer, self.segments) for optimizer in self.optimizers]

    def load_optimizer_state(self, states):
        """Load optimizer states, of any layout and number of ranks. All ranks call it.

        states: a list of what optimizer_state() returned on each rank that saved; of a checkpoint
        of format 1 or 2, what this rank saved, in a list. Learning rates and other settings stay
        those of this run. UserError where the state is that of another model.
        """
        for state in states:
            if len(state) != len(self.optimizers):
                raise UserError(
                    f"the checkpoint has the state of {len(state)} optimizers, this run has "
                    f"{len(self.optimizers)}: resume with the version that saved it, or train "
                    "again; its weights can still be loaded"
                )
        for number, optimizer in enumerate(self.optimizers):
            of_ranks = [state[number] for state in states]
            if isinstance(of_ranks[0], dict):
                self._load_older(optimizer, of_ranks[0])
                continue
            pieces = [piece for pieces in of_ranks for piece in pieces]
            load_pieces(optimizer, self.segments, self.units[number], pieces)

    def _load_older(self, optimizer, saved):
        """Load what format 1 or 2 has of an optimizer, which no fsdp layout has written."""
        if self.sharded:
            raise UserError(
                "the checkpoint was saved by an earlier version, without --parallel=fsdp: resume "
                "with the layout that saved it; the steps it saves then have any layout"
            )
        load_state_dict(optimizer, saved)


def grad_norm_sq(tensors, device, as_one=False):
    """Sum of the squares of the tensors' gradients, 0-D.

    as_one: measured as one stack, which Muon makes of them, so that the sum is rounded the same way
    however the matrices are stored.
    """
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if as_one and grads:
        grads = [torch.cat([grad.flatten() for grad in grads])]
    total = torch.zeros((), device=device)
    for grad in grads:
        total = total + torch.linalg.vector_norm(stored_values(grad)).square()
    return total


def stored_values(grad):
    """The numbers that a gradient stores, as a view: all, or the nonzero rows of a sparse one."""
    return grad.values() if grad.is_sparse else grad


# -------------------------------------------------------------------------------------------------
# gradients of one step

def accumulate_gradients(model, micro_batches, scale, micro_batch_size, layout):
    """Forward and backward through all micro-batches; fewer sequences at a time if memory runs out.

    micro_batches: list of (inputs (B, T), targets (B, T), ...); where the third is a tensor, these
    are the weights of the targets (B, T). scale: a number or 0-D tensor that multiplies each summed
    loss. micro_batch_size: sequences per pass, at most.
    Returns (the loss times scale, 0-D; the micro_batch_size that fitted).

    A step that ran out of memory starts over at half the size. It cannot once a reduction has
    started, since other ranks would wait for it. So buckets overlap with the backward pass only
    when memory has sufficed before. Under fsdp the ranks meet in every block, and no step can start
    over. MemoryError, one line with the remedy, where it cannot, or one sequence is too many.
    """
    while True:
        try:
            loss = forward_backward(model, micro_batches, scale, micro_batch_size, layout)
            layout.memory_sufficed()
            return loss, micro_batch_size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if layout.sharded or layout.started or micro_batch_size == 1:
                raise MemoryError(why_not_with_fewer(micro_batch_size, layout)) from error

        # after the except clause, whose traceback holds on to the tensors
        layout.zero_grad()
        layout.overlap = False
        empty_cache(micro_batches[0][0].device)
        micro_batch_size = (micro_batch_size + 1) // 2
        print(
            f"out of memory: continuing with {micro_batch_size} sequences at a time, "
            "which changes nothing but the speed",
            flush=True,
        )


def warm_up(model, micro_batches, micro_batch_size, layout):
    """Compile for the shape of these micro-batches, in a pass whose gradients are dropped.

    Nothing changes but that. Every rank calls it. Returns the micro_batch_size that fitted.
    """
    targets = sum(batch[1].numel() for batch in micro_batches)
    loss, fitted = accumulate_gradients(
        model, micro_batches, 1 / targets, micro_batch_size, layout)
    layout.reduce(loss)  # a step that is skipped
    layout.zero_grad()
    return fitted


def why_not_with_fewer(micro_batch_size, layout):
    """One line for a step that ran out of memory and cannot start over, with the remedy."""
    if micro_batch_size == 1:
        return ("out of memory with one sequence at a time: give --checkpoint_activations, on "
                "several GPUs --parallel=fsdp, or train a smaller model (python -m scripts.plan)")
    reason = "with --parallel=fsdp a step cannot start over with fewer"
    if not layout.sharded:
        reason = "other ranks wait for gradients of this step, which cannot start over with fewer"
    return (f"out of memory with {micro_batch_size} sequences at a time, and {reason}: lower "
            "--device_batch_size, or give --checkpoint_activations")


def count_targets(micro_batches):
    """How many targets (those that are not -1) the micro-batches of all ranks have, 0-D."""
    targets = sum((targets >= 0).sum() for _, targets, *_ in micro_batches)
    if get_dist_info()[3] > 1:
        dist.all_reduce(targets)
    return targets


def forward_backward(model, micro_batches, scale, micro_batch_size, layout):
    """One attempt of accumulate_gradients. Returns the loss times scale, 0-D."""
    pieces = []
    for micro_batch in micro_batches:
        tensors = [part for part in micro_batch if isinstance(part, torch.Tensor)]
        pieces.extend(zip(*(tensor.split(micro_batch_size) for tensor in tensors)))

    loss = torch.zeros((), device=pieces[0][0].device)
    for number, piece in enumerate(pieces, start=1):
        part = model(*piece) * scale
        if number == len(pieces):
            layout.expect_last_gradients()
        part.backward()
        loss += part.detach()
    return loss
