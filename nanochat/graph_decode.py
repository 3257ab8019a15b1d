"""Decoding on a GPU as one CUDA graph.

    decode = GraphDecode(model, kv_cache)
    logits = decode(tokens, slots)              # (n, V), as model.decode() gives them
    decode.warm_up_behind()                     # compile the blocks, too

A decode step is hundreds of kernels of a few microseconds each, and launching one from Python takes
longer than that: the GPU waits. A CUDA graph is the launches of one step, captured, which are then
replayed by one call (as in gpt-fast and vLLM; on ROCm it is a HIP graph).

What is captured has static shapes and addresses. So there is a graph for each number of sequences
in BATCHES, a smaller number being padded, and for each number of cached tokens to attend to:
SHORTEST_WINDOW and its doubles. Tokens, slots and positions are written into one tensor that all
graphs read. A step is captured when it is first needed, which takes a tenth of a second.

Compiled, a block has fewer kernels, and none that copies what the cache holds. All blocks are one
code, for any number of sequences and tokens, so that compiling takes no longer for a deep model.
Nothing is captured meanwhile: the compiler waits for the whole device, which a capture forbids.
"""
import functools
import threading
import types

import torch

from nanochat.common import print0
from nanochat.decoding import BATCHES, CompilesByTorch, decode_step, padded_columns
from nanochat.hardware import COMPILE_ERRORS, reason_of
from nanochat.kv_cache import CacheWindow

SHORTEST_WINDOW = 256   # cached tokens to attend to: fewer would save nothing
CODES = 32      # of a block: of one sequence or several, of the whole cache, of layers that differ

CAPTURING = threading.Lock()    # a process captures one graph at a time; each GPU has an engine


class CapturedStep:
    """A step as a graph. replay() takes it again, with what its inputs hold then.

    outputs     what the step returned: tensors that each replay overwrites
    """

    def __init__(self, step, device, memory):
        """step: a function of no arguments. memory: the Memory of the graphs of one device."""
        with CAPTURING, torch.cuda.device(device):
            # 1. once as it is: libraries allocate and choose kernels in their first calls
            before = torch.cuda.current_stream()
            memory.stream.wait_stream(before)
            with torch.cuda.stream(memory.stream):
                step()
            before.wait_stream(memory.stream)
            # 2. capture. What other threads do is not the graph's business: thread_local
            self._graph = torch.cuda.CUDAGraph()
            options = {"pool": memory.pool, "stream": memory.stream}
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local", **options):
                self.outputs = step()

    def replay(self):
        self._graph.replay()


class Memory:
    """What graphs that are replayed one at a time share: the stream of their capture, a pool."""

    def __init__(self, device):
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()


def block_step(block, x, cos, sin, layer_cache, slots, positions, keys, more):
    """What is compiled: a block for one new token of each of n sequences.

    x (n, 1, C); slots and positions (n, 1) int64; keys: as of decode_step(); more: its other
    inputs, a dict.
    """
    window = CacheWindow(slots[:, 0], positions, keys.size(0), slots)
    return block._call_impl(x, cos, sin, layer_cache, window, **more)


def compile_block():
    """block_step() compiled: a function of its own, with what is compiled of it."""
    torch._dynamo.config.recompile_limit = max(CODES, torch._dynamo.config.recompile_limit)
    code = block_step.__code__.replace(co_name="block_step_of_a_model")
    own = types.FunctionType(code, block_step.__globals__)
    return torch.compile(own, fullgraph=True)


def run_compiled(compiled, keys, block, x, cos, sin, layer_cache, window, **more):
    """As run_block of GPT.features(), by what compile_block() returned."""
    # the numbers of sequences, of slots and of cached tokens
    for tensor in (x, cos, sin, window.index, window.positions, layer_cache.k, layer_cache.v, keys):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(block, x, cos, sin, layer_cache, window.index, window.positions, keys, more)


class GraphDecode(CompilesByTorch):
    """model.decode() for some slots of one KV cache, captured.

    batches     the numbers of sequences that there are graphs for
    windows     the numbers of cached tokens that there are graphs for
    captured    {(batch, window): its CapturedStep}
    compiled    what compile_block() returned, once it is ready: steps are captured again then
    problem     why capturing failed, as one line, or None
    """

    def __init__(self, model, kv_cache):
        self.model = model
        self.kv_cache = kv_cache
        self.batches = [n for n in BATCHES if n < kv_cache.slots] + [kv_cache.slots]
        self.windows = windows_up_to(kv_cache.length)
        self.rows = torch.zeros(3, kv_cache.slots, 1, dtype=torch.long, device=model.device)
        self.keys = torch.arange(kv_cache.length)   # only its size matters: it stays on the host
        self.captured = {}
        self.compiled = None
        self.problem = None
        self._memory = None
        self._captured_compiled = None  # the value of `compiled` that was captured

    def is_ready(self, n):
        """Whether n sequences can be decoded: unless capturing has failed."""
        return self.problem is None

    def __call__(self, tokens, slots):
        """One more token in each slot: two lists of n ints -> the logits of the next, (n, V).

        The caller advances the slots. Where capturing fails, one line says so, and this step and
        all later ones are taken as they are written.
        """
        # 1. what the graph reads
        n = len(slots)
        batch = next(batch for batch in self.batches if batch >= n)
        positions = [self.kv_cache.lengths[slot] for slot in slots]
        columns = padded_columns((tokens, slots, positions), batch)
        self.rows[:, :batch, 0] = torch.tensor(columns).to(self.rows.device)

        # 2. the graph that attends to as many cached tokens as the longest sequence has
        window = next(window for window in self.windows if window > max(positions))
        captured = self._captured_for(batch, window)
        if captured is None:
            idx = torch.tensor(tokens, device=self.rows.device)[:, None]
            return self.model.decode(idx, self.kv_cache, slots)

        # 3. replay it; what it returns is copied, since the next replay overwrites it
        captured.replay()
        if self.model.compiles_logits:
            return captured.outputs[:n].clone()
        x, recent = captured.outputs
        return self.model.logits(x[:n], recent[:n])

    def _captured_for(self, batch, window):
        """The CapturedStep for a number of sequences and of cached tokens, or None."""
        # 1. as it was last time, or as it cannot be
        if self._captured_compiled is not self.compiled:
            self._captured_compiled = self.compiled
            self.captured.clear()
        found = self.captured.get((batch, window))
        if found or self.is_compiling or self.problem:
            return found
        # 2. compiled; where that cannot be captured, as it is written from now on
        if self.compiled:
            self._try_to_capture(batch, window)
            if not self.problem:
                return self.captured[batch, window]
            self.compiled = self._captured_compiled = self.problem = None
            self.captured.clear()
        # 3. as it is written
        self._try_to_capture(batch, window)
        return self.captured.get((batch, window))

    def _try_to_capture(self, batch, window):
        """Make a CapturedStep, or say why that fails, and note it as the problem."""
        try:
            self.captured[batch, window] = self._capture(batch, window)
        except RuntimeError as error:
            # the error of what may not be captured, not that of a capture which came to nothing
            while isinstance(error.__context__, RuntimeError):
                error = error.__context__
            self.problem = reason_of(str(error))
            self._memory = None
            what = "compiled decode step" if self.compiled else "decode step"
            print0(f"warning: the {what} cannot be captured as a CUDA graph, which makes it "
                   f"slower ({self.problem})")

    def _capture(self, batch, window):
        """A CapturedStep of decode_step()."""
        self._memory = self._memory or Memory(self.model.device)
        rows = self.rows[:, :batch]
        step = functools.partial(self._step, self.compiled, self.kv_cache, rows, window)
        return CapturedStep(step, self.model.device, self._memory)

    def _step(self, compiled, kv_cache, rows, window):
        """decode_step() of rows (3, n, 1): tokens, slots and positions."""
        keys = self.keys[:window]
        run_block = functools.partial(run_compiled, compiled, keys) if compiled else None
        return decode_step(self.model, kv_cache, *rows, keys, run_block)

    @torch.inference_mode()
    def warm_up(self, batch):
        """Compile, and capture the first step for one of `batches`; RuntimeError if that fails.

        The slots must be empty.
        """
        problem = self._problem_of_compiling()
        if not problem:
            self._captured_for(batch, self.windows[0])
            problem = self.problem
        if not problem and self.compiled is None:
            problem = "the compiled decode step cannot be captured"
        if problem:
            raise RuntimeError(problem)

    @torch.inference_mode()
    def _problem_of_warming_up(self):
        """Compile all that is needed; why that fails, as one line, or None.

        A single sequence is code of its own, and so is a window that is the whole cache.
        """
        several = min(2, self.kv_cache.slots)
        with torch.inference_mode(False):   # tensors like those of the engine: else, other code
            kv_cache = self.model.new_kv_cache(several, self.kv_cache.length)
            rows = torch.zeros_like(self.rows)
        rows[1, :several, 0] = torch.arange(several)
        compiled = compile_block()
        try:
            for batch in {1, several}:
                for window in {self.windows[0], self.windows[-1]}:
                    self._step(compiled, kv_cache, rows[:, :batch], window)
        except COMPILE_ERRORS as error:
            return reason_of(str(error))
        self.compiled = compiled
        return None


def windows_up_to(length):
    """Numbers of cached tokens, each the double of the one before; the last is `length`.

    >>> windows_up_to(1000)
    [256, 512, 1000]
    """
    windows = [SHORTEST_WINDOW]
    while windows[-1] < length:
        windows.append(2 * windows[-1])
    return windows[:-1] + [length]
