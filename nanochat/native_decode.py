"""Decoding on a CPU by one call of a C++ function a step (native_decode.cpp).

    if can_decode_natively(model):
        use_fast_linear(model, native=True)         # decoding.py
        decode = NativeDecode(model, kv_cache)
        decode.warm_up()                            # compile, some seconds; then it is in a cache
        logits = decode(tokens, slots)              # (n, V), as model.decode() gives them

A step of a small model on two cores takes one to two milliseconds, of which its weights need most
to come from memory. So nothing may stand beside that: no call for each product, no loop in Python,
no memory that is mapped again at each step. The function is written by hand, as in llama.cpp; what
is looked up (embeddings, the n-grams of a variant) is left to torch. Sums run in the same order for
any number of sequences, so that one gets the same logits alone and among others, to the last bit,
in bfloat16 as well. What it is for stands in the table COMPUTED: a model with another block,
attention or MLP is decoded by the step that torch compiles (decoding.py).

Weights are kept in tiles of 32 outputs, (N / 32, K / P, 32) int32, with P neighbours in K in each:
one float32, two bfloat16 or four int8 weights. oneDNN's product of several tokens (fast_linear.py),
for prefill, has a copy of its own.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from nanochat.decoding import CompilesBehind
from nanochat.fast_linear import TILE
from nanochat.gpt import GPT, MLP, Attention, Block
from nanochat.hardware import COMPILE_ERRORS, is_cut, kernel_cache, reason_of, text_of
from nanochat.kv_cache import CacheWindow, LayerCache
from nanochat.variants.lookup import LookupAttention, LookupBlock
from nanochat.variants.mla import NORM_EPS, LatentAttention
from nanochat.variants.portable import PortableAttention, PortableBlock, PortableGPT, SwiGLU

SOURCE = Path(__file__).with_suffix(".cpp")
# The order of sums may be chosen for vectors, NaN and infinity are kept. (-ffast-math would also
# round the small numbers of the whole process to zero.)
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
    "-ffp-contract=fast",
)
MATRICES = "q", "k", "v", "out", "gate", "up", "down"
# The lines of /proc/cpuinfo that say what -march=native means: of x86, and of ARM. Machines with
# different processors may share the cache.
PROCESSOR = "model", "flags", "Features", "CPU"
MULTIPLE = 32       # of which these fields of a config are multiples, where it has them
WIDTHS = "width", "head_dim", "mlp_width", "kv_rank", "nope_dim", "rope_dim", "v_dim"

# The methods that the C++ function computes: (what has it, its name, the functions that it may be)
COMPUTED = (
    ("model", "features", (GPT.features,)),
    ("model", "leave", (GPT.leave, PortableGPT.leave)),
    ("block", "forward", (Block.forward, LookupBlock.forward, PortableBlock.forward)),
    ("mlp", "forward", (MLP.forward, SwiGLU.forward)),
    ("cache", "copy", (LayerCache.copy,)),
)
# And the attentions: one of these has all of its methods
ATTENTIONS = {
    Attention: ("forward", "project", "place"),
    LookupAttention: ("forward", "project", "place"),
    PortableAttention: ("forward", "project", "place"),
    LatentAttention: (
        "forward", "queries", "latents", "expand", "attend_cached", "attend_absorbed"),
}


def can_decode_natively(model):
    """Whether the C++ function computes what this model does, on this machine."""
    if platform.system() != "Linux" or compiler() is None:
        return False
    if model.device.type != "cpu" or model.compute_dtype not in (torch.float32, torch.bfloat16):
        return False
    widths = [getattr(model.config, name, 0) for name in WIDTHS]
    if any(width % MULTIPLE for width in widths) or getattr(model.config, "q_rank", 0):
        return False
    cache = model.new_kv_cache(1, 1).layers[0]
    for block in model.blocks:
        owners = {"model": model, "block": block, "mlp": block.mlp, "cache": cache}
        for owner, name, known in COMPUTED:
            if getattr(type(owners[owner]), name) not in known:
                return False
        if not is_computed(type(block.attention)):
            return False
    return True


def is_computed(attention_class):
    """Whether an attention is one of ATTENTIONS, or differs in nothing that decoding calls."""
    return any(
        all(getattr(attention_class, name, None) is getattr(known, name) for name in names)
        for known, names in ATTENTIONS.items()
    )


# ------------------------------------------------------------------------------------------------
# the library

def compiler():
    """The path of the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def native_library():
    """native_decode.cpp as a ctypes library, from the cache of kernels or compiled.

    RuntimeError with the compiler's message where that fails. Whoever compiles at the same time
    writes a file of its own; the last one stays.
    """
    processor = text_of(Path("/proc/cpuinfo")).partition("\n\n")[0]
    features = [line for line in processor.splitlines() if line.startswith(PROCESSOR)]
    source = SOURCE.read_text(encoding="utf-8")
    machine = platform.machine(), platform.libc_ver(), features
    key = repr((source, FLAGS, compiler(), machine))
    folder = kernel_cache() / "nanochat"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if not library.exists() or is_cut(library):     # cut where the power went or a disk was full
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            command = [compiler(), *FLAGS, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr or "the C++ compiler failed")
            os.replace(made, library)
    return ctypes.CDLL(str(library))


# The structures of native_decode.cpp

class Matrix(ctypes.Structure):
    """Weights (N, K) in tiles, and the scale of int8 ones, (N,)."""
    _fields_ = [
        ("tiles", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
    ]


GAINS = "attention_gain", "mlp_gain", "q_gain", "k_gain"
LATENT = "latent_gain", "k_up", "v_up"


class Layer(ctypes.Structure):
    """A block: its matrices, its cache, its float32 weights, and the blend that it reads."""
    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in ("cache_k", "cache_v", *GAINS, *LATENT)),
        ("blend_x", ctypes.c_float),
        ("blend_x0", ctypes.c_float),
    ]


NO_QK_NORM, ROTATE_THEN_NORM, NORM_THEN_ROTATE = range(3)
SIZES = (
    "depth", "width", "heads", "kv_heads", "head_dim", "hidden", "cache_length", "threads",
    "qk_norm", "kv_rank", "nope_dim", "rope_dim", "v_dim",
)


class Model(ctypes.Structure):
    """What is the same at every step."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("eps", ctypes.c_float),
        ("latent_eps", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("head", Matrix),
        ("final_gain", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """Inputs and results of a step."""
    _fields_ = [
        ("n", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("x0", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


def native_problem():
    """Why the library cannot be compiled, as one line, or None."""
    try:
        native_library()
    except COMPILE_ERRORS as error:
        return reason_of(str(error))
    return None


def qk_norm_of(config):
    """Whether queries and keys are normalised, and whether before their rotation."""
    if not hasattr(config, "qk_norm"):
        return ROTATE_THEN_NORM
    return NORM_THEN_ROTATE if config.qk_norm else NO_QK_NORM


def matrix_of(linear):
    """The Matrix of a FastLinear."""
    scale = linear.scale.data_ptr() if linear.int8 else None
    return Matrix(linear.tiles.data_ptr(), scale, len(linear.tiles) * TILE, linear.K)


# ------------------------------------------------------------------------------------------------
# the step

class NativeDecode(CompilesBehind):
    """model.decode() for some slots of one KV cache. The model has native FastLinears.

    The logits that a call returns are overwritten by the next one. OpenMP's threads stay with the
    parent of a fork: a child that calls with more than one thread waits forever.
    """

    def __init__(self, model, kv_cache):
        self.model = model
        self.kv_cache = kv_cache
        self.int8 = model.fast_head.int8
        self.library = None
        self.kept = []                  # what `native` points into
        self.own_logits = type(model).logits is GPT.logits
        self.native = self._native_model()
        self.logits = torch.empty(kv_cache.slots, self.native.head.N)

    def is_ready(self, n):
        """Whether n sequences can be decoded."""
        return self.library is not None

    def warm_up(self, n=None):
        """Compile; RuntimeError where that fails. One function is for any n."""
        self.library = native_library()

    def _problem_of_compiling(self):
        problem = native_problem()
        if not problem:
            self.warm_up()
        return problem

    # -------------------------------------------------------------------------------- structures

    def _native_model(self):
        """The Model with pointers to the weights, the cache and the rotary table."""
        model, config, dtype = self.model, self.model.config, self.model.compute_dtype
        layers = (Layer * config.depth)()
        for layer, block, cache in zip(layers, model.blocks, self.kv_cache.layers):
            layer.cache_k, layer.cache_v = cache.k.data_ptr(), cache.v.data_ptr()
            self._fill_attention(layer, block.attention)
            for name in ("gate", "up", "down"):
                linear = getattr(block.mlp, name, None)
                setattr(layer, name, matrix_of(linear) if linear else Matrix())
            if isinstance(block, PortableBlock):
                layer.attention_gain = self._pointer(block.attention_norm.gain)
                layer.mlp_gain = self._pointer(block.mlp_norm.gain)
            layer.blend_x, layer.blend_x0 = 1, 0
            if isinstance(block, LookupBlock):
                layer.blend_x, layer.blend_x0 = block.blend.to(dtype).tolist()

        cos, sin = (table[0, :, 0] for table in (model.cos, model.sin))
        is_portable = isinstance(model, PortableGPT)
        latent = [getattr(config, name, 0) for name in ("kv_rank", "nope_dim", "rope_dim", "v_dim")]
        self.kept.append(layers)
        return Model(
            config.depth, config.width, config.heads, config.kv_heads, config.head_dim,
            layers[0].up.N, self.kv_cache.length, 1, qk_norm_of(config), *latent,
            config.norm_eps if is_portable else torch.finfo(dtype).eps, NORM_EPS, config.softcap,
            layers, matrix_of(model.fast_head),
            self._pointer(model.norm.gain) if is_portable else None,
            # a portable model rotates the other way
            self._pointer(cos), self._pointer(-sin if is_portable else sin))

    def _fill_attention(self, layer, attention):
        """The matrices of an attention, and what else it multiplies with."""
        if isinstance(attention, LatentAttention):
            matrices = attention.q, attention.kv_down, None, attention.out
            layer.latent_gain = self._pointer(attention.kv_norm.gain)
            layer.k_up = self._pointer(attention.k_up.weight)
            layer.v_up = self._pointer(attention.v_up.weight)
        else:
            matrices = attention.q, attention.k, attention.v, attention.out
        for name, linear in zip(("q", "k", "v", "out"), matrices):
            setattr(layer, name, matrix_of(linear) if linear else Matrix())
        if isinstance(attention, PortableAttention) and self.model.config.qk_norm:
            layer.q_gain = self._pointer(attention.q_norm.gain)
            layer.k_gain = self._pointer(attention.k_norm.gain)

    def _pointer(self, tensor):
        """The address of a tensor, rounded to the model's dtype, as float32; None of None."""
        if tensor is None:
            return None
        kept = tensor.detach().to(self.model.compute_dtype).float().contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    # -------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def __call__(self, tokens, slots):
        """One more token in each slot: two lists of n ints -> the logits of the next, (n, V).

        The caller advances the slots.
        """
        # 1. what torch looks up
        model, n = self.model, len(slots)
        positions = [self.kv_cache.lengths[slot] for slot in slots]
        assert max(positions) < self.kv_cache.length    # the C++ function would write behind it
        idx, index, places = torch.tensor([tokens, slots, positions])[:, :, None]   # n, 1
        window = CacheWindow(index[:, 0], places, max(positions) + 1, index)
        recent = model.recent_tokens(idx, self.kv_cache, window)
        x0 = model.enter(idx, recent)
        inputs = model.block_inputs(idx, x0)
        values = [one["value"].float() for one in inputs if "value" in one]
        pointers = (ctypes.c_void_p * len(inputs))(*(value.data_ptr() for value in values))
        x0 = x0.float().contiguous()

        # 2. the blocks and the head
        features = None if self.own_logits else torch.empty(n, model.config.width)
        self.native.threads = torch.get_num_threads()
        step = Step(
            n, index.data_ptr(), places.data_ptr(), x0.data_ptr(), ctypes.addressof(pointers),
            None if self.own_logits else features.data_ptr(),
            self.logits.data_ptr() if self.own_logits else None)
        is_bfloat16 = model.compute_dtype == torch.bfloat16
        self.library.decode_step(
            ctypes.byref(self.native), ctypes.byref(step), is_bfloat16, self.int8)

        # 3. what a variant makes of it
        if self.own_logits:
            return self.logits[:n, :model.config.vocab_size]
        recent = None if recent is None else recent[:, 0]
        return model.logits(features.to(model.compute_dtype), recent)
