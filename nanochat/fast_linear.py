"""Products with the weights of a model that decodes on a CPU.

Decoding one token multiplies every weight with one number. The time is that of reading the weights,
if nothing else stands in the way, and in torch much does: each product, norm and sum is a call, and
each call costs microseconds of its own. Compiled as one function (decoding.py) they cost none, as
long as the products are something that the compiler fuses. A matrix product is not; a sum is. So
there are two forms of a weight (N, K):

    one row         a sum over K that the compiler fuses with its neighbours, from a copy of the
                    weights in tiles of 32 outputs, (N / 32, K, 32): vector instructions then add
                    along the outputs, and nothing is added across a vector
    several rows    oneDNN's product with weights that were packed for it, one call

int8 weights (a scale for each output, the largest weight is 127) are kept four to an int32, tiles
of 64 outputs as (N / 64, K, 16). Masks take them apart faster than conversions of single bytes do
(measured, dev/LOG.md). Products of several rows multiply the same rounded weights in the dtype of
the activations.

For native_decode.py the first form is in lanes of 32 bits, (N / 32, K / P, 32) int32, with P
neighbours in K in each: one float32, two bfloat16 or four int8 weights. It is for any number of
rows, and oneDNN's for prefill alone.

The copies cost memory: twice the weights in bfloat16, 1.5 times with int8.
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

TILE = 32               # outputs of a tile
BYTES = 4               # int8 weights in an int32
LANES = 16              # int32 in a row of a tile of int8 weights
INT8_MAX = 127
# Several rows are padded to a multiple of this. oneDNN generates code for every number of rows that
# it meets, 2 ms each: a prompt of an odd length cost more in that than in its products.
ROWS = 16
# Byte b of an int32 as a multiple of 2^(8 b). All bytes but the highest hold weight + 128, for a
# mask leaves them without a sign.
MASKS = 0xFF, 0xFF00, 0xFF0000, -(1 << 24)
OFFSET = 128


def materialize(x):
    """x, computed once and stored, where the compiler would compute it again for every use.

    as_strided() is what inductor cannot fuse through: it needs its input in memory.

    Whether this very call is being compiled says is_dynamo_compiling(). While any thread compiles,
    is_compiling() is true on all of them, of which one decodes.
    """
    if not torch.compiler.is_dynamo_compiling():
        return x
    return torch.as_strided(x, x.shape, x.stride())


def pad_outputs(weight, multiple):
    """weight (N, K) with rows of zeros up to a multiple of outputs."""
    return F.pad(weight, (0, 0, 0, -len(weight) % multiple))


def tiles_of(weight):
    """weight (N, K) -> (N / TILE, K, TILE)."""
    padded = pad_outputs(weight, TILE)
    return padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def quantize(weight):
    """weight (N, K) -> (int8 (N, K), scale float32 (N,)): weight is about int8 * scale[:, None]."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / INT8_MAX
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def int8_tiles_of(quantized):
    """int8 (N, K) -> int32 (N / 64, K, 16): byte b of lane l is output 16 b + l of its tile."""
    padded = pad_outputs(quantized, BYTES * LANES)
    split = padded.unflatten(0, (-1, BYTES, LANES))     # tile, byte, lane, K
    last = split.permute(0, 3, 2, 1).contiguous()       # tile, K, lane, byte
    as_bytes = last.view(torch.uint8)
    as_bytes[..., :-1] += OFFSET                        # wraps around: -1 becomes 127
    return as_bytes.view(torch.int32).squeeze(-1)


def lane_tiles(weight):
    """weight (N, K) of P numbers in 32 bits -> int32 (N / TILE, K / P, TILE); N may be padded."""
    per_lane = 4 // weight.element_size()
    padded = pad_outputs(weight, TILE)
    split = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, per_lane))
    return split.transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


def int8_lane_tiles(quantized):
    """lane_tiles() of int8 weights: all bytes of a lane but the highest hold weight + 128."""
    with_offset = quantized.view(torch.uint8).unflatten(1, (-1, BYTES)).clone()
    with_offset[..., :-1] += OFFSET     # wraps around: -1 becomes 127
    return lane_tiles(with_offset.flatten(1))


def multiply_tiles(x, tiles):
    """x (K,) float32, tiles of bfloat16 or float32 -> (N,) float32, with the padding."""
    return (x[:, None] * tiles.float()).sum(1).flatten()


def multiply_int8_tiles(x, tiles):
    """x (K,) float32, tiles of int8_tiles_of() -> (N,) float32, padded and without the scale."""
    offset = OFFSET * x.sum()
    parts = []
    for byte, mask in enumerate(MASKS):
        taken = (tiles & mask).float()                  # tile, K, lane
        part = (x[:, None] * taken).sum(1) * 2.0 ** (-8 * byte)
        parts.append(part if byte == BYTES - 1 else part - offset)
    return torch.stack(parts, 1).flatten()              # tile, byte, lane


@functools.cache
def packed_linear():
    """torch.ops.nanochat.packed_linear(x (n, K), packed weights, N) -> (n, N), known to torch.

    oneDNN's own operator cannot be compiled with weights that are an input of the graph.
    """
    def multiply(x, packed, N):
        n = len(x)
        if n > ROWS:
            x = F.pad(x, (0, 0, 0, -n % ROWS))
        y = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
        return y[:n]

    def shape_alone(x, packed, N):
        return x.new_empty(len(x), N)

    library = torch.library.Library("nanochat", "FRAGMENT")
    library.define("packed_linear(Tensor x, Tensor packed, int N) -> Tensor")
    for key in ("CPU", "MkldnnCPU"):    # the packed weights are of the second kind
        library.impl("packed_linear", multiply, key)
    library.impl("packed_linear", shape_alone, "Meta")
    return library                      # it must be kept: with it the operator would go


def can_pack(dtype):
    """Whether oneDNN packs weights of this dtype: bfloat16 not on processors with AVX2 alone."""
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FastLinear(nn.Module):
    """The product with one matrix, (..., K) -> (..., N), in the two forms of this file's head.

    weight (N, K); dtype: of the activations; int8: whether the weights are rounded to 8 bits.
    native: whether the form for one row is that of native_decode.cpp, whose scale is padded.
    """

    def __init__(self, weight, dtype, int8=False, native=False):
        super().__init__()
        packed_linear()
        self.N, self.K = weight.shape
        weight = weight.detach().float()
        self.int8 = int8
        if int8:
            quantized, scale = quantize(weight)
            weight = quantized.float() * scale[:, None]
            self.tiles = int8_lane_tiles(quantized) if native else int8_tiles_of(quantized)
            self.scale = F.pad(scale, (0, -len(scale) % TILE)) if native else scale
        else:
            weight = weight.to(dtype)
            self.tiles = lane_tiles(weight) if native else tiles_of(weight)
        weight = weight.to(dtype).contiguous()
        self.is_packed = can_pack(dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            self.weight = weight

    def forward(self, x):
        rows = x.reshape(-1, self.K)
        if len(rows) == 1 and torch.compiler.is_dynamo_compiling():
            y = self.multiply_one(materialize(rows.float())[0]).to(x.dtype)
        elif self.is_packed:
            y = torch.ops.nanochat.packed_linear(rows, self.weight, self.N)
        else:
            y = F.linear(rows, self.weight)
        return y.view(*x.shape[:-1], self.N)

    def multiply_one(self, x):
        """x (K,) float32 -> (N,) float32."""
        if self.int8:
            return multiply_int8_tiles(x, self.tiles)[:self.N] * self.scale
        return multiply_tiles(x, self.tiles)[:self.N]


def can_multiply_fast(device):
    """Whether this torch has what FastLinear needs: oneDNN's packed products, on a CPU."""
    has_operator = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and has_operator
