"""Decoding on a CPU as one compiled function.

    use_fast_linear(model)                      # once, after cast_for_inference()
    decode = CompiledDecode(model, kv_cache)
    decode.warm_up(1)                           # compile for one sequence
    if decode.is_ready(1):
        logits = decode(tokens, slots)          # (n, V), as model.decode() gives them

A decode step of a small model is hundreds of small operations, each a call of several microseconds
from Python through torch: several times what the arithmetic takes. Compiled, the step of one
sequence is one loop nest after the other in one C++ function, with the products as sums in it
(fast_linear.py); for several sequences the products are oneDNN's and everything between two of them
is one function. The idea is gpt-fast's, the form that of a CPU.

Shapes have to be static, so there is a function for each number of sequences in BATCHES, and a
smaller number is padded. How many cached tokens are attended to is dynamic: one function serves all
lengths. The first call of each takes seconds, the later ones read inductor's cache on disk.

What a variant overrides in the forward pass is compiled with it. Where its logits() cannot be
compiled (counts of n-grams, whose number differs from token to token), it says so by its attribute
`compiles_logits`, and torch runs that part as it is written.
"""
import functools
import threading
import time
import types

import torch

from nanochat.common import print0
from nanochat.fast_linear import FastLinear
from nanochat.gpt import Head, Linear
from nanochat.hardware import COMPILE_ERRORS, compile_problem, reason_of
from nanochat.kv_cache import CacheWindow

BATCHES = 1, 4, 8, 16, 32, 64, 128     # numbers of sequences that are compiled for
SHORTEST = 2    # cached tokens to attend to: a size of 1 would be compiled by itself


def use_fast_linear(model, int8=False, native=False):
    """Replace the matrices of a model, and the head, by FastLinear: once, and for inference alone.

    int8: round their weights to 8 bits. native: for NativeDecode, in place of CompiledDecode.
    """
    if model.fast_head is not None:
        return model
    options = {"dtype": model.compute_dtype, "int8": int8, "native": native}
    make = functools.partial(FastLinear, **options)
    model.fast_head = make(model.head_weight())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and not isinstance(child, Head):
                setattr(module, name, make(child.weight))
    return model


def decode_step(model, kv_cache, idx, slots, positions, keys, run_block=None):
    """What is compiled: idx, slots and positions (n, 1) int64 -> logits (n, V).

    keys: a tensor with as many elements as there are cached tokens to attend to. Of a model that
    does not compile its logits, the result is what they are made of: x (n, C) and recent tokens.
    run_block: as of GPT.features().
    """
    window = CacheWindow(slots[:, 0], positions, keys.size(0), slots)
    x, recent = model.features(idx, kv_cache, window=window, run_block=run_block)
    x = x[:, 0]
    if recent is not None:
        recent = recent[:, 0]
    return model.logits(x, recent) if model.compiles_logits else (x, recent)


def padded_columns(columns, batch):
    """Lists of n ints, padded to `batch`: the first sequence again changes nothing."""
    return [column + column[:1] * (batch - len(column)) for column in columns]


def compile_for(batch):
    """decode_step() compiled for one number of sequences, model and cache.

    Whether the code on hand fits its arguments is decided by CompiledDecode. Torch would look at
    every module and weight of the model again at each call, which takes a tenth of a step. What is
    compiled belongs to a code object, so each function gets one of its own.
    """
    code = decode_step.__code__.replace(co_name=f"decode_step_of_{batch}")
    own = types.FunctionType(code, decode_step.__globals__, argdefs=decode_step.__defaults__)
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(own, dynamic=False, fullgraph=True, options=options)


class CompilesBehind:
    """A decode step whose compiling takes seconds, which a thread of its own can do.

    A subclass has _problem_of_compiling(): it compiles, and returns why that fails, as one line, or
    None. Until a step is ready, whoever decodes does so without it.
    """

    is_compiling = False    # whether that thread compiles

    def warm_up_behind(self):
        """Compile on a thread, which is returned. Where that fails, one line says so."""
        self.is_compiling = True
        thread = threading.Thread(target=self._compile_behind, name="compile", daemon=True)
        thread.start()
        return thread

    def _compile_behind(self):
        try:
            problem = self._problem_of_compiling()
            if problem:
                print0(f"warning: decoding stays uncompiled, which is slower ({problem})")
        finally:
            self.is_compiling = False


class CompilesByTorch(CompilesBehind):
    """A decode step that torch compiles, in a cache of its own, which is freed at its end.

    A subclass has `model` and _problem_of_warming_up(): as _problem_of_compiling().
    """

    def _problem_of_compiling(self):
        begin = time.perf_counter()
        problem = compile_problem(self.model.device) or self._problem_of_warming_up()
        if not problem:
            print0(f"decoding is compiled, after {time.perf_counter() - begin:.0f} s")
        return problem


class CompiledDecode(CompilesByTorch):
    """model.decode() for some slots of one KV cache, compiled.

    batches    the numbers of sequences that there are functions for
    ready      those of them whose function is compiled
    """

    def __init__(self, model, kv_cache):
        self.model = model
        self.kv_cache = kv_cache
        self.keys = torch.arange(kv_cache.length)
        self.batches = [n for n in BATCHES if n < kv_cache.slots] + [kv_cache.slots]
        self.compiled = {}              # {batch: its function}
        self.ready = set()

    def batch_for(self, n):
        """The number in `batches` that n sequences are padded to."""
        return next(batch for batch in self.batches if batch >= n)

    def is_ready(self, n):
        """Whether the function for n sequences is compiled."""
        return self.batch_for(n) in self.ready

    def __call__(self, tokens, slots):
        """One more token in each slot: two lists of n ints -> the logits of the next, (n, V).

        The caller advances the slots.
        """
        positions = [self.kv_cache.lengths[slot] for slot in slots]
        return self._run(tokens, slots, positions)

    def _run(self, tokens, slots, positions):
        """__call__() with the positions at which the tokens stand."""
        # 1. pad to a number that is compiled for, (3, batch, 1)
        n = len(slots)
        batch = self.batch_for(n)
        rows = torch.tensor(padded_columns((tokens, slots, positions), batch))[:, :, None]

        # 2. how many cached tokens there are to attend to
        end = max(max(positions) + 1, SHORTEST)
        keys = self.keys[:end]
        torch._dynamo.mark_dynamic(keys, 0, min=SHORTEST, max=len(self.keys) - 1)

        # 3. the compiled part, and what is left of it
        if batch not in self.compiled:
            self.compiled[batch] = compile_for(batch)
        found = self.compiled[batch](self.model, self.kv_cache, *rows, keys)
        if self.model.compiles_logits:
            return found[:n]
        x, recent = found
        return self.model.logits(x[:n], recent[:n])

    @torch.inference_mode()
    def warm_up(self, batch):
        """Compile the function for one of `batches`; RuntimeError where that fails.

        The slots must be empty. The compiler takes the number of cached tokens that it sees for the
        usual one: of few, it would leave attention to a single thread.
        """
        middle = len(self.keys) // 2
        self._run([0] * batch, list(range(batch)), [middle] * batch)
        self.ready.add(batch)

    def _problem_of_warming_up(self):
        """Compile for all of `batches`; why that fails, as one line, or None."""
        try:
            kv_cache = self.model.new_kv_cache(self.kv_cache.slots, self.kv_cache.length)
            scratch = CompiledDecode(self.model, kv_cache)
            scratch.compiled = self.compiled
            for batch in self.batches:
                scratch.warm_up(batch)
                self.ready.add(batch)
        except COMPILE_ERRORS as error:
            return reason_of(str(error))
        return None
