"""FP8 training on a CPU: against torchao, against kernels, against bf16; and a model around it.

docs/traps.md: fp8-saturation, fp8-formats
"""
import copy
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from models import make_model
from nanochat import fp8
from nanochat.common import Compute, UserError
from nanochat.fp8 import (
    Fp8Linear,
    Fp8Product,
    Fp8Recipe,
    choose_fp8,
    convert,
    dequantize,
    fits,
    in_formats,
    in_tiles,
    kernel_problem,
    quantize,
    quantize_blocks,
    to_fp8,
)
from nanochat.fsdp import structure_of
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.hardware import fp8_format, mxfp8_problem
from nanochat.parallel import Layout, accumulate_gradients, prepare

OFF = {"fp8": None, "fp8_scaling": None, "fp8_backend": None, "fp8_emulate": None}
CPU = Compute(False, 0, 0, 1, torch.device("cpu"), torch.bfloat16)


def recipe_named(name, scaling="tensorwise", emulate=True):
    scaling = "blockwise" if name == "mxfp8" else scaling
    return in_formats(Fp8Recipe(name, scaling, emulate=emulate), torch.float8_e4m3fn)


EMULATED = [
    recipe_named("hybrid"),
    recipe_named("hybrid", "rowwise"),
    recipe_named("e4m3"),
    recipe_named("e4m3", "rowwise"),
    recipe_named("mxfp8"),
]
IDS = [f"{recipe.name}-{recipe.scaling}" for recipe in EMULATED]


def small_gpt(depth=2, compute_dtype=torch.float32):
    """A model whose matrices are large enough: width 128, or 64 * depth."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab_size=64, max_seq_len=32))
    model.init_weights()
    model.compute_dtype = compute_dtype
    return model.train()


def products(recipe, x, weight, dy):
    """[y, dx, dW] of a product."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = Fp8Product.apply(x, weight, recipe)
    y.backward(dy)
    return [y.detach(), x.grad, weight.grad]


def operands(tokens=64, n_in=128, n_out=256, seed=0):
    """x, weight and dy of a product, with outliers as training has them."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, n_in), (n_out, n_in), (tokens, n_out)))
    x[:, 3] *= 20
    return x, weight / 16, dy * torch.logspace(-6, -3, tokens)[:, None]


def cosine(a, b):
    return F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


# --------------------------------------------------------------------------------------------------
# against code that no one here wrote

def torchao_linear(recipe, weight):
    """torchao's Float8Linear with this weight and recipe, emulated."""
    pytest.importorskip("torchao", reason="torchao, a dev extra, is the outside opinion on FP8")
    from torchao.float8 import CastConfig, Float8LinearConfig, ScalingGranularity
    from torchao.float8.float8_linear import Float8Linear
    granularity = ScalingGranularity.TENSORWISE
    if recipe.scaling == "rowwise":
        granularity = ScalingGranularity.AXISWISE
    forward, backward = (
        CastConfig(scaling_granularity=granularity, target_dtype=dtype)
        for dtype in (recipe.forward, recipe.backward))
    config = Float8LinearConfig(
        cast_config_input=forward, cast_config_weight=forward, cast_config_grad_output=backward,
        emulate=True)
    linear = torch.nn.Linear(weight.size(1), weight.size(0), bias=False)
    linear.weight.data.copy_(weight)
    return Float8Linear.from_float(linear, config)


@pytest.mark.parametrize("recipe", EMULATED[:4], ids=IDS[:4])
def test_all_three_products_are_those_of_torchao(recipe):
    x, weight, dy = operands()
    theirs = torchao_linear(recipe, weight)
    inputs = x.clone().requires_grad_()
    y = theirs(inputs)
    y.backward(dy)
    for ours, wanted in zip(products(recipe, x, weight, dy), (y, inputs.grad, theirs.weight.grad)):
        assert cosine(ours, wanted) > 0.9999
        assert (ours - wanted).norm() < 0.01 * wanted.norm()


def test_blocks_of_mxfp8_are_those_of_torchao_to_the_bit():
    pytest.importorskip("torchao", reason="torchao, a dev extra, is the outside opinion on FP8")
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.utils import to_blocked
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 256, generator=generator)
    x *= torch.logspace(-38, 38, 160)[:, None]  # from below what float32 has as normal
    x[3] = 0.0
    x[4, :32] = 1.999  # saturates: 1.999 / 2^-8 is above 448
    for values in (x, x.bfloat16()):
        scales, wanted = to_mx(values, torch.float8_e4m3fn, 32)
        found = quantize_blocks(values)
        assert torch.equal(found.values.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(found.unscale.view(torch.uint8), scales.view(torch.uint8))
        tiles, blocked = in_tiles(found.unscale), to_blocked(scales)
        assert torch.equal(tiles.view(torch.uint8), blocked.view(torch.uint8))


@pytest.mark.parametrize("recipe", EMULATED[:4], ids=IDS[:4])
@pytest.mark.parametrize("e4m3", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_the_kernel_equals_dequantizing_and_multiplying(recipe, e4m3):
    """torch has the kernel for a CPU, too; OCP's formats and MI300's."""
    recipe = in_formats(recipe, e4m3)
    assert torch.finfo(recipe.forward).max == (448 if e4m3 == torch.float8_e4m3fn else 240)
    tensors = operands()
    emulated = products(recipe, *tensors)
    computed = products(recipe._replace(emulate=False), *tensors)
    for ours, wanted in zip(computed, emulated):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert kernel_problem(recipe._replace(emulate=False), CPU.device) == ""


@pytest.mark.parametrize("recipe", EMULATED, ids=IDS)
def test_products_are_near_those_of_float32(recipe):
    x, weight, dy = operands()
    exact = [x @ weight.t(), dy @ weight, dy.t() @ x]
    for found, wanted in zip(products(recipe, x, weight, dy), exact):
        assert 0.997 < cosine(found, wanted) < 0.99999, "rounded, and not more than that"


def test_gradients_keep_small_rows_in_e5m2_and_with_a_scale_for_each_row():
    """Why hybrid is the usual recipe: E4M3 ends 2^-18 below its maximum, E5M2 at 2^-32."""
    x, weight, dy = operands()
    kept = {}
    for recipe, name in zip(EMULATED, IDS):
        dx = products(recipe, x, weight, dy * torch.logspace(-4, 0, len(dy))[:, None])[1]
        kept[name] = (dx.abs().amax(dim=1) > 0).float().mean().item()
    assert kept["e4m3-tensorwise"] < kept["hybrid-tensorwise"] == 1
    assert kept["e4m3-rowwise"] == kept["hybrid-rowwise"] == 1


# --------------------------------------------------------------------------------------------------
# values

@pytest.mark.parametrize("dtype, largest", [
    (torch.float8_e4m3fn, 448.0),
    (torch.float8_e4m3fnuz, 240.0),
    (torch.float8_e5m2, 57344.0),
    (torch.float8_e5m2fnuz, 57344.0),
])
def test_a_value_beyond_the_range_of_fp8_becomes_the_largest(dtype, largest):
    values = to_fp8(torch.tensor([1e6, -1e6, 1.0]), dtype).float()
    assert values.tolist() == [largest, -largest, 1.0]
    assert to_fp8(torch.tensor(math.nan), dtype).float().isnan()


@pytest.mark.parametrize("recipe", EMULATED, ids=IDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_largest_value_fills_the_range_and_zeros_stay_zeros(recipe, dim):
    x, _, _ = operands()
    operand = quantize(x, recipe.forward, recipe, dim)
    assert operand.values.is_contiguous() and operand.values.shape == (x if dim else x.t()).shape
    assert 224 <= operand.values.float().abs().max() <= 448
    error = dequantize(operand) - (x if dim else x.t())
    assert error.norm() < 0.05 * x.norm()
    zeros = dequantize(quantize(torch.zeros(64, 128), recipe.forward, recipe, dim))
    assert torch.equal(zeros, torch.zeros_like(zeros))
    assert all(torch.isfinite(t).all() for t in products(recipe, *(0 * t for t in operands())))


@pytest.mark.parametrize("recipe", EMULATED, ids=IDS)
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden_from_the_guard(recipe, wrong):
    x, weight, dy = operands()
    x[5, 7] = wrong
    y, _, dw = products(recipe, x, weight, dy)
    assert not y[5].isfinite().any() and not dw.isfinite().all()


# --------------------------------------------------------------------------------------------------
# a Linear

@pytest.mark.parametrize("recipe", EMULATED, ids=IDS)
def test_any_number_of_tokens_is_padded(recipe):
    linear = Linear(128, 256)
    twin = copy.deepcopy(linear)
    linear.__class__, linear.recipe = Fp8Linear, recipe
    x = torch.randn(3, 7, 128, requires_grad=True)  # 21 tokens
    y = linear(x)
    y.square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    twin(plain).square().sum().backward()
    assert y.shape == (3, 7, 256) and linear.weight.grad.dtype == torch.float32
    assert cosine(x.grad, plain.grad) > 0.99
    assert cosine(linear.weight.grad, twin.weight.grad) > 0.99


def test_evaluation_is_that_of_the_plain_model():
    plain, model = small_gpt(), convert(small_gpt(), EMULATED[0])
    ids = torch.randint(64, (2, 32))
    for m in (plain, model):
        torch.nn.init.normal_(m.blocks[0].mlp.down.weight, std=0.1,
                              generator=torch.Generator().manual_seed(1))
    trained = model(ids)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    assert torch.equal(model.eval()(ids), plain(ids)) and not torch.equal(trained, plain(ids))


def test_the_backward_pass_has_the_recipe_of_its_forward_pass():
    """Whoever leaves a context, or changes a recipe, between the two changes nothing."""
    def gradient(*recipes):
        model = convert(small_gpt(), recipes[0])
        loss = model(torch.arange(32)[None], torch.arange(32)[None])
        for module in model.modules():
            if isinstance(module, Fp8Linear):
                module.recipe = recipes[-1]
        model(torch.arange(32)[None])  # another forward pass, with that recipe
        model.eval()
        loss.backward()
        return model.blocks[1].mlp.down.weight.grad

    hybrid, blocks = EMULATED[0], EMULATED[4]
    assert torch.equal(gradient(hybrid), gradient(hybrid, blocks))
    assert not torch.equal(gradient(hybrid), gradient(blocks))


# --------------------------------------------------------------------------------------------------
# a model

def test_matrices_that_do_not_fit_are_named_and_stay(capsys):
    config = GPTConfig(depth=2, width=256, heads=4, kv_heads=1, vocab_size=256, max_seq_len=32)
    model = GPT(config)
    keys = list(model.state_dict())
    convert(model, EMULATED[0])
    out = capsys.readouterr().out
    assert "2 of blocks.*.attention.k (64 x 256), 2 of blocks.*.attention.v (64 x 256)" in out
    assert "8 matrices" in out and "E5M2 for gradients" in out
    assert type(model.blocks[0].attention.k) is Linear and type(model.head) is not Fp8Linear
    assert type(model.blocks[0].attention.q) is Fp8Linear
    assert list(model.state_dict()) == keys

    assert "at most 0.3 MB for a matrix and 1.0 kB for a token" in out  # 256 x 1024

    total = model.flops_per_token(32)
    inside = 6 * 2 * (2 * 256**2 + 8 * 256**2) / total
    assert f"{100 * inside:.1f} % in FP8, 0.0 % in BF16, {100 - 100 * inside:.1f} % in FP32" in out


@pytest.mark.parametrize("shape, name, does", [
    ((128, 128), "hybrid", True),
    ((144, 128), "hybrid", True),
    ((144, 128), "mxfp8", False),
    ((128, 136), "hybrid", False),
    ((112, 128), "hybrid", False),
])
def test_dimensions_are_multiples_and_large_enough(shape, name, does):
    assert fits(Linear(*shape), recipe_named(name)) == does


def test_a_model_without_a_large_matrix_is_refused():
    with pytest.raises(UserError, match="below 128 or no multiple of 16: leave --fp8 out"):
        convert(make_model(), EMULATED[0])


def test_shares_of_flops_are_in_bf16_where_the_rest_is(capsys):
    convert(small_gpt(compute_dtype=torch.bfloat16), EMULATED[4])
    assert "0.0 % in FP32" in capsys.readouterr().out


RULE = torch.randint(64, (64, 4), generator=torch.Generator().manual_seed(1))


def text_of(step, sequences=8):
    """ids (sequences, 33): each token is one of the four that may follow the one before it."""
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(64, (sequences,), generator=generator)]
    for _ in range(32):
        ids.append(RULE[ids[-1], torch.randint(4, (sequences,), generator=generator)])
    return torch.stack(ids, dim=1)


def train(recipe, steps, passes=1, **prepared):
    """(losses of a small model in bfloat16, the model)."""
    model = small_gpt(compute_dtype=torch.bfloat16)
    prepare(model, **{"compile": False, **prepared}, fp8=recipe)
    layout = Layout(model, model.setup_optimizers())
    found = []
    for step in range(steps):
        ids = text_of(step)
        batches = [(part[:, :-1], part[:, 1:]) for part in ids.chunk(passes)]
        loss, _ = accumulate_gradients(model, batches, 1 / ids[:, 1:].numel(), 8, layout)
        loss, norm = layout.reduce(loss)
        layout.apply(0.0, norm)
        layout.zero_grad()
        found.append(loss)
    return torch.tensor(found), model


LOSS_STEPS = 40  # dev/LOG.md has 300, of the other recipes as well


@pytest.mark.nightly
def test_the_loss_is_within_one_percent_of_bf16():
    in_bf16, _ = train(None, LOSS_STEPS)
    losses, _ = train(EMULATED[0], LOSS_STEPS)
    last = LOSS_STEPS // 6
    assert in_bf16[-last:].mean() < 0.5 * in_bf16[0], "it learns"
    ratio = losses[-last:].mean() / in_bf16[-last:].mean()
    assert abs(ratio - 1) < 0.01
    assert not torch.equal(losses, in_bf16)


def test_accumulated_and_recomputed_steps_are_like_plain_ones():
    recipe = EMULATED[0]
    plain, _ = train(recipe, 3)
    recomputed, _ = train(recipe, 3, checkpoint_activations=True)
    accumulated, _ = train(recipe, 3, passes=2)  # each pass has scales of its own
    assert torch.equal(plain, recomputed)
    torch.testing.assert_close(accumulated, plain, rtol=5e-3, atol=0)


@pytest.mark.parametrize("recipe", [EMULATED[0], EMULATED[1], EMULATED[4]],
                         ids=[IDS[0], IDS[1], IDS[4]])
def test_a_compiled_product_is_one_graph(recipe):
    """Dynamo and AOTAutograd trace all of it; what inductor makes of it took minutes to see. E4M3
    for gradients differs by a dtype alone."""
    x, weight, dy = operands()
    linear = Linear(128, 256)
    linear.weight.data.copy_(weight)
    linear.__class__, linear.recipe = Fp8Linear, recipe
    x.requires_grad_()
    torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)(x[:50]).backward(
        dy[:50])
    padded = [F.pad(t[:50], (0, 0, 0, 14)) for t in (x.detach(), dy)]
    _, dx, dw = products(recipe, padded[0], weight, padded[1])
    torch.testing.assert_close(x.grad[:50], dx[:50])
    torch.testing.assert_close(linear.weight.grad, dw)
    torch.compiler.reset()


def test_whole_models_of_shards_have_the_linears_and_keep_their_keys():
    model = convert(small_gpt(), EMULATED[0])
    structure = structure_of(model)
    assert type(structure.blocks[0].mlp.up) is Fp8Linear
    assert list(structure.state_dict()) == list(small_gpt().state_dict())


# --------------------------------------------------------------------------------------------------
# which recipe

def chosen(meta=None, compute=CPU, **settings):
    names = {"fp8": "fp8", "scaling": "fp8_scaling", "backend": "fp8_backend",
             "emulate": "fp8_emulate"}
    given = {**OFF, **{names[key]: value for key, value in settings.items()}}
    return choose_fp8(given, meta, compute)


def test_fp8_is_off_unless_it_is_asked_for_or_resumed():
    assert chosen() is None and chosen(fp8="none") is None and chosen(fp8="") is None
    assert chosen({"dtype": "bfloat16"}) is None, "of a version that had none"
    recipe = chosen(fp8="hybrid", emulate=True)
    assert recipe == EMULATED[0] and chosen(fp8="mxfp8", emulate=True) == EMULATED[4]

    meta = {"dtype": "bfloat16", "fp8": chosen(fp8="e4m3", scaling="rowwise", emulate=True).saved()}
    assert chosen(meta) == EMULATED[3], "resumed"
    assert chosen(meta, scaling="tensorwise") == EMULATED[2]
    assert chosen(meta, fp8="e4m3") == EMULATED[3]
    assert chosen(meta, fp8="hybrid", emulate=True) == EMULATED[0], "another recipe starts afresh"
    assert chosen(meta, fp8="none") is None


@pytest.mark.parametrize("settings, words", [
    ({"fp8": "fp4"}, "fp8=fp4 is unknown: choose from hybrid, e4m3, mxfp8, or none"),
    ({"fp8": "hybrid"}, "cpu has no FP8 matrix products.*--fp8=none.*--fp8_emulate=1"),
    ({"fp8": "hybrid", "backend": "te"}, "--fp8_backend=torch --fp8_emulate=1 computes"),
    ({"fp8": "hybrid", "scaling": "blockwise", "emulate": True}, "fp8_scaling=blockwise is unkn"),
    ({"fp8": "mxfp8", "scaling": "rowwise", "emulate": True}, "a scale for each block of 32"),
    ({"fp8": "hybrid", "backend": "cutlass"}, "fp8_backend=cutlass is unknown"),
    ({"fp8": "hybrid", "backend": "te", "scaling": "rowwise"}, "te is neither"),
    ({"scaling": "rowwise"}, "--fp8_scaling=rowwise says how to train in FP8, which is off"),
])
def test_what_cannot_be_is_refused_in_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        chosen(**settings)
    assert "\n" not in str(caught.value)


HOPPER = ("cuda", None, "", (9, 0))
DEVICES = [
    # device type, torch.version.hip, ROCm's architecture, capability; E4M3; mxfp8
    (HOPPER, "float8_e4m3fn", "since Blackwell.*9.0"),
    (("cuda", None, "", (8, 9)), "float8_e4m3fn", "since Blackwell"),
    (("cuda", None, "", (8, 0)), None, "since Blackwell"),
    (("cuda", None, "", (10, 0)), "float8_e4m3fn", "^$"),
    (("cuda", "7.0", "gfx942:sramecc+:xnack-", (9, 4)), "float8_e4m3fnuz", "gfx942"),
    (("cuda", "7.0", "gfx950:sramecc+:xnack-", (9, 5)), "float8_e4m3fn", "gfx950"),
    (("cuda", "7.0", "gfx1100", (11, 0)), None, "gfx1100"),
]


def on(monkeypatch, generation):
    """Let any device be one of this generation, whose kernel is the CPU's."""
    monkeypatch.setattr(fp8, "fp8_format_here", lambda device: fp8_format(*generation))
    monkeypatch.setattr(fp8, "mxfp8_problem_here", lambda device: mxfp8_problem(*generation))


@pytest.mark.parametrize("generation, e4m3, mxfp8", DEVICES)
def test_formats_are_those_of_the_generation(monkeypatch, generation, e4m3, mxfp8):
    assert re.search(mxfp8, mxfp8_problem(*generation))
    on(monkeypatch, generation)
    if e4m3 is None:
        with pytest.raises(UserError, match="has no FP8.*--fp8=none"):
            chosen(fp8="hybrid")
        return
    recipe = chosen(fp8="hybrid")
    assert recipe.forward == getattr(torch, e4m3)
    e5m2 = "float8_e5m2fnuz" if e4m3.endswith("uz") else "float8_e5m2"
    assert recipe.backward == getattr(torch, e5m2)
    assert chosen(fp8="e4m3").backward == recipe.forward
    assert ("FNUZ" in recipe.describe()) == e4m3.endswith("uz")


def test_a_device_is_refused_whose_dtype_or_kernel_is_not_right(monkeypatch):
    on(monkeypatch, HOPPER)
    with pytest.raises(UserError, match="this run computes in float32: --dtype=bfloat16"):
        chosen({"dtype": "float32"}, fp8="hybrid")
    kernel = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **more: 1.1 * kernel(*given, **more))
    with pytest.raises(UserError, match="off by 0.1 of the norm"):
        chosen(fp8="hybrid")

    def missing(*given, **more):
        raise NotImplementedError("'aten::_scaled_mm' is not implemented\nfor this device")
    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(UserError, match="fails: 'aten::_scaled_mm' is not implemented;"):
        chosen(fp8="hybrid")


# --------------------------------------------------------------------------------------------------
# TransformerEngine, of which nothing runs without CUDA: a stand-in that says what it is asked

class Asked:
    """transformer_engine.pytorch, which multiplies by torch and counts contexts."""
    depth = 0
    seen = []

    class Linear(torch.nn.Module):
        def __init__(self, n_in, n_out, bias, device):
            super().__init__()
            assert not bias
            self.weight = torch.nn.Parameter(torch.empty(n_out, n_in, device=device))

        def forward(self, x):
            Asked.seen.append((Asked.depth, len(x), Asked.recipe))
            return F.linear(x, self.weight)

    class autocast:
        def __init__(self, recipe):
            Asked.recipe = recipe

        def __enter__(self):
            Asked.depth += 1

        def __exit__(self, *error):
            Asked.depth -= 1

    @staticmethod
    def is_fp8_available(return_reason):
        return True, ""


def test_transformer_engine_is_refused_where_it_is_missing(monkeypatch):
    on(monkeypatch, HOPPER)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UserError, match="needs TransformerEngine, which cannot be imported"):
        chosen(fp8="hybrid", backend="te")


def test_transformer_engine_multiplies_under_its_recipe_and_keeps_our_keys(monkeypatch):
    on(monkeypatch, HOPPER)
    recipes = types.SimpleNamespace(
        Format=types.SimpleNamespace(HYBRID="hybrid", E4M3="e4m3"),
        Float8CurrentScaling=lambda fp8_format: ("current", fp8_format))
    modules = {"transformer_engine.pytorch": Asked, "transformer_engine.common.recipe": recipes}
    monkeypatch.setattr(fp8.importlib, "import_module", modules.get)
    Asked.seen = []
    model = small_gpt(compute_dtype=torch.bfloat16)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    convert(model, chosen(fp8="hybrid", backend="te"))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters))

    ids = torch.arange(30)[None]
    loss = model(ids, ids)
    assert set(Asked.seen) == {(1, 32, ("current", "hybrid"))} and len(Asked.seen) == 12
    loss.backward()
    assert all(p.grad is not None for p in parameters), "its weight is ours"
    with torch.no_grad():
        model(ids)
    assert len(Asked.seen) == 12, "evaluation does without"


# --------------------------------------------------------------------------------------------------
# whole runs

RUN = ("--depth=2", "--max_seq_len=64", "--total_batch_size=256", "--compile=0", "--model=gpt",
       "--ngram_tokens=0", "--eval_every=1000", "--dtype=bfloat16")


def test_a_run_resumes_with_its_recipe_or_another_and_starts_a_chat(stages, text):
    from stage_runs import meta_of, weights_of
    command = ("scripts.base_train", f"--data={text}", *RUN)
    wanted = {"recipe": "hybrid", "scaling": "rowwise", "backend": "torch", "emulate": True}
    emulated = ("--fp8=hybrid", "--fp8_scaling=rowwise", "--fp8_emulate=1")

    def folder_of(steps):
        [meta] = stages.folder("base", "").glob(f"*/meta_{steps:06d}.json")
        return meta.parent

    def trained(steps, *words, ranks=1):
        """What a run printed, and the recipe in its checkpoint. Each has a folder of its own."""
        out, _ = stages.fork(*command, f"--num_iterations={steps}", *words, ranks=ranks)
        return out, meta_of(folder_of(steps), steps)["fp8"]

    def resumed(steps, *words, ranks=1):
        before = folder_of(steps - 1) / f"meta_{steps - 1:06d}.json"
        return trained(steps, f"--resume_from_checkpoint={before}", *words, ranks=ranks)

    out, saved = trained(2, "--model_tag=f", *emulated)
    assert "hybrid: E4M3" in out and "% in FP8" in out and saved == wanted
    out, saved = resumed(3)
    assert "hybrid: E4M3" in out and saved == wanted, "the checkpoint's"
    out, saved = resumed(4, "--fp8=none")
    assert "in FP8" not in out and saved is None
    out, saved = resumed(5, *emulated)
    assert "hybrid: E4M3" in out and saved == wanted, "a checkpoint in bfloat16"
    for steps, parallel in ((6, "zero2"), (7, "fsdp")):
        out, saved = resumed(steps, f"--parallel={parallel}", ranks=2)
        assert "hybrid: E4M3" in out and saved == wanted
    keys = weights_of(folder_of(7), 7).keys()
    assert keys == small_gpt().state_dict().keys()
    assert "fp8=hybrid cannot run here: cpu has no FP8" in stages.refusal(*command, "--use_fp8")

    words = ("--model_tag=f", "--num_iterations=1", "--compile=0", "--device_batch_size=2")
    out, _ = stages.fork("scripts.mid_train", *words, "--fp8=e4m3", "--fp8_emulate=1")
    assert "e4m3: E4M3, for gradients too" in out
    assert meta_of(stages.folder("mid", "f"), 1)["fp8"]["recipe"] == "e4m3"
    out, _ = stages.fork("scripts.chat_sft", *words)
    assert "in FP8" not in out and meta_of(stages.folder("chatsft", "f"), 1)["fp8"] is None
