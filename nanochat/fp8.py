"""Training in FP8: the products of the blocks' matrices with 8-bit operands, applied from outside.

A product of a Linear is one of three: y = x W^T forward, dx = dy W and dW = dy^T x backward. Each
operand is scaled into the range of an 8-bit format, rounded, and multiplied by a kernel that adds
up in float32:

    s = MAX / amax(x)      x8 = round(clamp(x s))      y = (x8 @ w8) / (sx sw)

E4M3 has 3 bits of mantissa and ends at 448, E5M2 has 2 and ends at 57,344 (arXiv 2209.05433).

    recipe   activations, weights   gradients   a scale for
    hybrid   E4M3                   E5M2        a tensor, or a row of a product's operand
    e4m3     E4M3                   E4M3        the same
    mxfp8    E4M3                   E4M3        32 values, a power of two (OCP Microscaling v1.0)

Master weights, optimizer, norms, attention, embedding and head stay as they are. `convert` changes
the class of a model's Linears in place, so that parameters and keys of the state dict stay those of
the plain model, and a checkpoint of either resumes as the other. Without gradients, which is how
models are evaluated and sampled from, such a Linear is a plain one. The recipe is captured in the
forward pass: what is set between it and the backward pass has no effect on that.

Rowwise scales and those of blocks depend on the dimension that is summed over, so each operand is
quantized once for the forward pass and once, along its other dimension, for the backward pass, from
the values in full precision. For tensorwise scales both are the same numbers, and torch.compile
finds that out. Blocks of 128 x 128 as in DeepSeek-V3 are not here (docs/fp8.md says why).
"""
import importlib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.common import UserError, print0
from nanochat.gpt import Head, Linear
from nanochat.hardware import fp8_format_here, mxfp8_problem_here, reason_of

RECIPES = ("hybrid", "e4m3", "mxfp8")
SCALINGS = ("tensorwise", "rowwise")
BACKENDS = ("torch", "te")
NONE = ("", "none")
SETTINGS = ("fp8_scaling", "fp8_backend", "fp8_emulate")

# The format with the larger range that a generation of devices has beside its E4M3
E5M2_OF = {
    torch.float8_e4m3fn: torch.float8_e5m2,
    torch.float8_e4m3fnuz: torch.float8_e5m2fnuz,
}
MIN_DIMENSION = 128     # below, quantizing costs more than the product gains
ALIGNMENT = 16          # the kernels' of every dimension, which is 16 bytes
BLOCK = 32              # values that share a scale of mxfp8
E4M3_EXPONENT = 8       # of its largest value, 448 = 1.75 * 2^8
FLOAT32_MANTISSA = 23   # bits
SMALLEST_AMAX = 1e-12   # for which there is a scale: that of zeros is finite
KERNEL_TOLERANCE = 0.01  # of the norm: the kernel rounds its result to bfloat16, .002


class Fp8Recipe(NamedTuple):
    """How products are computed. forward: of activations and weights. backward: of gradients."""
    name: str            # one of RECIPES
    scaling: str         # one of SCALINGS; of mxfp8 blockwise
    backend: str = "torch"
    emulate: bool = False
    forward: torch.dtype = torch.float8_e4m3fn
    backward: torch.dtype = torch.float8_e4m3fn

    def saved(self):
        """What a checkpoint's meta file says."""
        return {"recipe": self.name, "scaling": self.scaling, "backend": self.backend,
                "emulate": self.emulate}

    def multiple(self):
        """Of what the dimensions of a product must be multiples."""
        return BLOCK if self.name == "mxfp8" else ALIGNMENT

    def describe(self):
        gradients = "E5M2 for gradients" if self.backward != self.forward else "for gradients too"
        kernel = "TransformerEngine" if self.backend == "te" else "torch._scaled_mm"
        if self.emulate:
            kernel = "emulated, which is slower than no FP8"
        variant = " (FNUZ)" if self.forward == torch.float8_e4m3fnuz else ""
        return f"{self.name}: E4M3{variant}, {gradients}, {self.scaling} scales, {kernel}"


# --------------------------------------------------------------------------------------------------
# which recipe

def choose_fp8(settings, meta, compute):
    """The Fp8Recipe of a run, or None for none.

    settings: of a script: fp8 and what SETTINGS lists, None where the command does not say. meta:
    of the run that is resumed, which then decides, or of one that begins; None: none. compute: what
    compute_init() returned. UserError where the device has no such products.
    """
    saved = (meta or {}).get("fp8") or {}
    name = saved.get("recipe", "none")
    if settings["fp8"] is not None:
        name = settings["fp8"]
    given = [f"--{key}={settings[key]}" for key in SETTINGS if settings[key] is not None]
    if name in NONE:
        if given and not saved:
            raise UserError(f"{given[0]} says how to train in FP8, which is off: add "
                            f"--fp8={RECIPES[0]}, or leave it out")
        return None
    recipe = recipe_of(name, settings, saved if name == saved.get("recipe") else {})
    if not recipe.emulate:
        dtype = meta["dtype"] if meta else str(compute.dtype).removeprefix("torch.")
        recipe = recipe_on(recipe, compute.device, dtype)
    return recipe


def check_recipe(name):
    """UserError for a recipe that does not exist. None, "" and "none" stand for bfloat16."""
    if name not in (None, *NONE, *RECIPES):
        raise UserError(f"fp8={name} is unknown: choose from {', '.join(RECIPES)}, or none")


def recipe_of(name, settings, saved):
    """The Fp8Recipe of these settings, in the formats of most devices. saved: what they leave out.

    UserError for a recipe that does not exist.
    """
    chosen = {}
    for key, usual in (("scaling", "tensorwise"), ("backend", "torch"), ("emulate", False)):
        given = settings[f"fp8_{key}"]
        chosen[key] = saved.get(key, usual) if given is None else given
    if name == "mxfp8":
        if settings["fp8_scaling"] not in (None, "blockwise"):
            raise UserError("fp8=mxfp8 has a scale for each block of 32 values: leave "
                            "--fp8_scaling out")
        chosen["scaling"] = "blockwise"
    elif chosen["scaling"] not in SCALINGS:
        raise UserError(
            f"fp8_scaling={chosen['scaling']} is unknown: choose from {', '.join(SCALINGS)}")
    check_recipe(name)
    if chosen["backend"] not in BACKENDS:
        raise UserError(
            f"fp8_backend={chosen['backend']} is unknown: choose from {', '.join(BACKENDS)}")
    if chosen["backend"] == "te" and (chosen["emulate"] or chosen["scaling"] == "rowwise"):
        raise UserError("fp8_backend=te is neither emulated nor rowwise: leave one of them out")
    recipe = Fp8Recipe(name, **chosen)
    return in_formats(recipe, torch.float8_e4m3fn)


def in_formats(recipe, e4m3):
    """A recipe in the formats of a generation of devices. e4m3: its format with 3 mantissa bits."""
    gradients = E5M2_OF[e4m3] if recipe.name == "hybrid" else e4m3
    return recipe._replace(forward=e4m3, backward=gradients)


def recipe_on(recipe, device, dtype):
    """The recipe in the formats of a device. UserError where the device cannot multiply so.

    dtype: the name of the compute dtype.
    """
    name, problem = fp8_format_here(device)
    if recipe.name == "mxfp8":
        problem = problem or mxfp8_problem_here(device)
    if recipe.backend == "te":
        problem = problem or engine_problem(recipe)
    if not problem and dtype != "bfloat16":
        problem = f"its products give bfloat16 and this run computes in {dtype}: --dtype=bfloat16"
    if not problem:
        recipe = in_formats(recipe, getattr(torch, name))
        problem = kernel_problem(recipe, device) if recipe.backend == "torch" else ""
    if problem:
        # Transformer Engine's products are not emulated
        others = "" if recipe.backend == "torch" else "--fp8_backend=torch "
        raise UserError(
            f"fp8={recipe.name} cannot run here: {problem}; --fp8=none trains in bfloat16, "
            f"{others}--fp8_emulate=1 computes the same rounding slowly")
    return recipe


def kernel_problem(recipe, device):
    """Why the device's kernel does not compute a small product, as one line; "" where it does."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 256, generator=generator).to(device) for size in (192, 160))
    # the two pairs of formats that products have
    for dtype in {recipe.forward, recipe.backward}:
        operands = quantize(a, dtype, recipe, 1), quantize(b, recipe.forward, recipe, 1)
        wanted = multiply(*operands, recipe._replace(emulate=True), torch.float32)
        try:
            found = multiply(*operands, recipe, torch.bfloat16).float()
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return f"torch._scaled_mm fails: {reason_of(str(error))}"
        error = ((found - wanted).norm() / wanted.norm()).item()
        if not error <= KERNEL_TOLERANCE:  # true of a NaN as well
            return f"torch._scaled_mm is off by {error:.2g} of the norm: update torch"
    return ""


# --------------------------------------------------------------------------------------------------
# quantization

class Quantized(NamedTuple):
    """An operand of a product: the last dimension of its values is the one that is summed over.

    values (M, K) in FP8, contiguous. unscale: what a value times it is the number meant, float32,
    0-D (tensorwise) or (M, 1) (rowwise); of mxfp8 (M, K / 32) in float8_e8m0fnu.
    """
    values: torch.Tensor
    unscale: torch.Tensor


def to_fp8(x, dtype):
    """x in a format of 8 bits. Values beyond its range become the largest one, never a NaN: E4M3
    has no infinity, and E5M2 would overflow to it. A NaN stays one."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def quantize(x, dtype, recipe, dim):
    """x (M, K) as an operand that is summed over `dim` -> Quantized, (M, K) or for dim 0 (K, M)."""
    if recipe.scaling == "blockwise":
        return quantize_blocks(x if dim == 1 else x.t())
    x = x.float()
    amax = x.abs().amax(dim, keepdim=True) if recipe.scaling == "rowwise" else x.abs().amax()
    # an amax of zero must not give inf, and then NaN
    scale = torch.finfo(dtype).max / amax.clamp(min=SMALLEST_AMAX)
    values, unscale = to_fp8(x * scale, dtype), scale.reciprocal()
    if dim == 0:
        values = values.t()
    if recipe.scaling == "rowwise":
        unscale = unscale.view(-1, 1)  # with these strides, which t() would not give
    return Quantized(values.contiguous(), unscale)


def quantize_blocks(x):
    """x (M, K) -> Quantized in E4M3, with the scale 2^(floor(log2 amax) - 8) for 32 values of K.

    Source: OCP Microscaling Formats v1.0, section 6.3. An amax of which 1.75 * 2^8 is not enough
    saturates, as the standard has it. A NaN stays one, and an infinity becomes 448 * 2^120, which
    float32 does not hold.
    """
    blocks = x.float().contiguous().view(len(x), -1, BLOCK)
    amax = blocks.abs().amax(-1)
    # the exponent of a float32 is floor(log2 x), biased by the same 127 as that of E8M0
    exponent = (amax.view(torch.int32) >> FLOAT32_MANTISSA) - E4M3_EXPONENT
    exponent = exponent.clamp(min=0)
    # an exponent of 0 would be 2^-127, which GPUs flush to zero
    scale = (exponent.clamp(min=1) << FLOAT32_MANTISSA).view(torch.float32)
    values = to_fp8(blocks / scale[..., None], torch.float8_e4m3fn)
    unscale = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    return Quantized(values.view(x.shape), unscale)


def dequantize(operand):
    """Quantized -> the numbers meant, (M, K) float32."""
    values, unscale = operand.values.float(), operand.unscale.float()
    if operand.unscale.dtype != torch.float8_e8m0fnu:
        return values * unscale
    blocks = values.view(*unscale.shape, BLOCK) * unscale[..., None]
    return blocks.view(values.shape)


# --------------------------------------------------------------------------------------------------
# products

def multiply(a, b, recipe, dtype, fast=False):
    """Quantized a (M, K) and b (N, K) -> a b^T (M, N) in a dtype.

    fast: let a GPU add up with fewer bits, as is usual in the forward pass.
    """
    if recipe.emulate:
        return (dequantize(a) @ dequantize(b).t()).to(dtype)
    if recipe.scaling == "blockwise":
        scales = in_tiles(a.unscale), in_tiles(b.unscale)
    else:
        scales = a.unscale, b.unscale.t()
    return torch._scaled_mm(
        a.values, b.values.t(), *scales, out_dtype=dtype, use_fast_accum=fast)


def in_tiles(scales):
    """The scales of blocks, (M, K / 32), flat, in the order in which the tensor cores read them.

    Tiles of 128 x 4, padded with zeros; in a tile the rows r, r + 32, r + 64 and r + 96 lie beside
    each other. Source: cuBLAS documentation, "1D block scaling factors layout".
    """
    rows, columns = scales.shape
    padding = (0, -columns % 4, 0, -rows % 128)
    padded = F.pad(scales.view(torch.uint8), padding)
    tiles = padded.view(padded.size(0) // 128, 4, 32, padded.size(1) // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


class Fp8Product(torch.autograd.Function):
    """x (N, n_in), weight (n_out, n_in) -> x weight^T in the dtype of x, all three products in FP8.

    All dimensions must be multiples of recipe.multiple().
    """

    @staticmethod
    def forward(ctx, x, weight, recipe):
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe  # the backward pass may run wherever it likes
        a = quantize(x, recipe.forward, recipe, 1)
        b = quantize(weight, recipe.forward, recipe, 1)
        return multiply(a, b, recipe, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        recipe = ctx.recipe
        # dx = dy W, summed over the outputs
        a = quantize(dy, recipe.backward, recipe, 1)
        b = quantize(weight, recipe.forward, recipe, 0)
        dx = multiply(a, b, recipe, x.dtype)
        # dW = dy^T x, summed over the tokens
        a = quantize(dy, recipe.backward, recipe, 0)
        b = quantize(x, recipe.forward, recipe, 0)
        dw = multiply(a, b, recipe, x.dtype)
        return dx, dw.to(weight.dtype), None


class Fp8Linear(Linear):
    """A Linear that multiplies in FP8 where it is trained; it has an Fp8Recipe as `recipe`."""

    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)  # evaluation and samples are in the compute dtype
        tokens = x.flatten(0, -2)
        padded = F.pad(tokens, (0, 0, 0, -len(tokens) % self.recipe.multiple()))
        y = self.multiply(padded)
        return y[:len(tokens)].unflatten(0, x.shape[:-1])

    def multiply(self, x):
        """x (N, n_in) -> (N, n_out)."""
        return Fp8Product.apply(x, self.weight, self.recipe)


# --------------------------------------------------------------------------------------------------
# TransformerEngine

def engine():
    """transformer_engine.pytorch, or None where it cannot be imported."""
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError):  # a library of another CUDA raises any of them
        return None


def engine_problem(recipe):
    """Why TransformerEngine cannot compute a recipe here, as one line; "" where it can."""
    found = engine()
    if found is None:
        return ("fp8_backend=te needs TransformerEngine, which cannot be imported (NVIDIA's NGC "
                "containers have it)")
    if not hasattr(found, "autocast"):
        return "this TransformerEngine has no autocast(): update it"
    if recipe.name == "mxfp8":
        return found.is_mxfp8_available(return_reason=True)[1]
    return found.is_fp8_available(return_reason=True)[1]


def engine_recipe(recipe):
    """TransformerEngine's object for an Fp8Recipe. Its scales are of the current tensor."""
    recipes = importlib.import_module("transformer_engine.common.recipe")
    if recipe.name == "mxfp8":
        return recipes.MXFP8BlockScaling()
    format = recipes.Format.HYBRID if recipe.name == "hybrid" else recipes.Format.E4M3
    return recipes.Float8CurrentScaling(fp8_format=format)


class EngineLinear(Fp8Linear):
    """A Linear whose products in training are those of transformer_engine.pytorch.Linear.

    That module has no memory of its own, and it is no submodule, so that parameters and keys of the
    state dict stay plain. Only its forward pass is in autocast(): it captures the recipe.
    """

    def set_up(self):
        shape = self.in_features, self.out_features
        module = engine().Linear(*shape, bias=False, device="meta")
        self.unregistered = (module, engine_recipe(self.recipe))

    def multiply(self, x):
        module, recipe = self.unregistered
        module.weight = self.weight  # which sharding replaces
        # of float32 weights TransformerEngine wants to know the compute dtype
        with torch.autocast(x.device.type, x.dtype), engine().autocast(recipe=recipe):
            return module(x)


# --------------------------------------------------------------------------------------------------
# a model

def fits(linear, recipe):
    """Whether a product with this matrix can be, and can gain by being, in FP8."""
    return all(size >= MIN_DIMENSION and size % recipe.multiple() == 0
               for size in linear.weight.shape)


def convert(model, recipe):
    """Let the matrices of a model multiply as an Fp8Recipe says, in place, and say which do not.

    The head stays in the compute dtype: its gradients are the most sensitive, and its chunks of
    logits are no Linear's forward pass. UserError where no matrix of the model is large enough.
    """
    converted, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or isinstance(module, Head):
            continue
        if not fits(module, recipe):
            skipped.append((name, module))
            continue
        converted.append(module)
        module.__class__ = EngineLinear if recipe.backend == "te" else Fp8Linear
        module.recipe = recipe
        if recipe.backend == "te":
            module.set_up()
    if not converted:
        raise UserError(
            f"fp8={recipe.name}: every matrix of this model has a dimension that is below "
            f"{MIN_DIMENSION} or no multiple of {recipe.multiple()}: leave --fp8 out, or train a "
            "deeper model")
    for line in describe(model, recipe, converted, skipped):
        print0(line)
    return model


def describe(model, recipe, converted, skipped):
    """Lines that say what is computed in which dtype. converted: modules; skipped: with names."""
    lines = [f"fp8={recipe.describe()}; {len(converted)} matrices"]
    names = {}
    for name, module in skipped:
        rows, columns = module.weight.shape
        kind = re.sub(r"\.\d+\.", ".*.", name) + f" ({rows} x {columns})"
        names[kind] = names.get(kind, 0) + 1
    if names:
        listed = ", ".join(f"{count} of {kind}" for kind, count in names.items())
        lines.append(f"not in FP8, for a dimension is below {MIN_DIMENSION} or no multiple of "
                     f"{recipe.multiple()}: {listed}")
    shares = flops_shares(model, converted)
    listed = ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items())
    lines.append(f"FLOPs of the products of a token: {listed}; head and attention are not in FP8")
    lines.append(copies_in_8_bits(converted))
    return lines


def copies_in_8_bits(converted):
    """A line on the memory that no plan counts. converted: modules whose products are in FP8."""
    largest = max(converted, key=lambda module: module.weight.numel())
    return (
        "memory is planned as without FP8; the 8-bit operands of one product at a time come to it, "
        f"at most {largest.weight.numel() / 1e6:.1f} MB for a matrix and "
        f"{max(largest.weight.shape) / 1e3:.1f} kB for a token")


def flops_shares(model, converted):
    """{"FP8", "BF16", "FP32": share of a token's training FLOPs at the full context}.

    Counted as the model counts them: products of matrices and causal attention. Norms, softmax,
    loss and updates are in float32 and are no products.
    """
    total = model.flops_per_token(model.config.max_seq_len)
    in_fp8 = 6 * sum(module.weight.numel() for module in converted) / total
    rest = 1 - in_fp8
    is_bf16 = model.compute_dtype == torch.bfloat16
    return {"FP8": in_fp8, "BF16": rest * is_bf16, "FP32": rest * (not is_bf16)}
