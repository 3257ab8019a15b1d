"""Latent attention and experts, each against transformers' DeepSeek-V3 and a plain definition."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import CONTEXT, VOCAB_SIZE, in_pieces, make_model, noise
from nanochat.adamw import AdamW
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.parallel import Layout, accumulate_gradients
from nanochat.schedule import lr_multiplier, set_learning_rates
from nanochat.variants.deepseek import (
    DeepSeekConfig,
    DeepSeekGPT,
    grouped_linear,
    linear_of_each,
)
from nanochat.variants.mla import MLAConfig, MLAGPT

# DeepSeek's proportions, where values are narrower than keys, and some others; with queries' rank
SHAPES = {
    "ours": {},
    "as DeepSeek": {"nope_dim": 16, "rope_dim": 8, "v_dim": 16},
    "a large rank": {"nope_dim": 12, "rope_dim": 4, "v_dim": 16, "kv_rank": 24},
    "queries of a rank": {"q_rank": 24},
}


def deepseek_of_transformers(config):
    """The classes of transformers and its config in the shape of one of ours."""
    module = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="the outside opinion")
    from transformers import DeepseekV3Config
    experts = {}
    if isinstance(config, DeepSeekConfig):
        experts = {
            "n_routed_experts": config.experts,
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.top_k,
            "n_shared_experts": config.shared_experts,
            "moe_intermediate_size": config.expert_width,
            "routed_scaling_factor": config.routed_scale,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        }
    theirs = DeepseekV3Config(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        q_lora_rank=config.q_rank or None,
        kv_lora_rank=config.kv_rank,
        qk_nope_head_dim=config.nope_dim,
        qk_rope_head_dim=config.rope_dim,
        v_head_dim=config.v_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        max_position_embeddings=config.max_seq_len,
        rope_interleave=True,
        attention_bias=False,
        attn_implementation="eager",
        **experts,
    )
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    return module, theirs


def interleaved(rows):
    """Rows of a matrix that make a rotated vector, from our layout to DeepSeek's.

    Ours has all first numbers of the rotated pairs and then all second ones, theirs pair by pair.
    We rotate the other way round, for which the two of a pair change places.
    """
    first, second = rows.chunk(2)
    return torch.stack((second, first), 1).flatten(0, 1)


def attention_of_transformers(ours):
    """Their attention with the weights of ours."""
    config = ours.config
    module, theirs_config = deepseek_of_transformers(config)
    theirs = module.DeepseekV3Attention(theirs_config, 0).eval()
    q = ours.q.weight.unflatten(0, (config.heads, -1))
    heads = [torch.cat((h[:config.nope_dim], interleaved(h[config.nope_dim:]))) for h in q]
    q = torch.cat(heads)
    c, rope = ours.kv_down.weight.split((config.kv_rank, config.rope_dim))
    with torch.no_grad():
        if config.q_rank:
            theirs.q_a_proj.weight.copy_(ours.q_down.weight)
            theirs.q_a_layernorm.weight.copy_(ours.q_norm.gain)
            theirs.q_b_proj.weight.copy_(q)
        else:
            theirs.q_proj.weight.copy_(q)
        theirs.kv_a_proj_with_mqa.weight.copy_(torch.cat((c, interleaved(rope))))
        theirs.kv_a_layernorm.weight.copy_(ours.kv_norm.gain)
        both = torch.cat((ours.k_up.weight, ours.v_up.weight), 1)
        theirs.kv_b_proj.weight.copy_(both.flatten(0, 1))
        theirs.o_proj.weight.copy_(ours.out.weight)
    rotary = module.DeepseekV3RotaryEmbedding(theirs_config)
    return theirs, rotary


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_equals_transformers_expanded_absorbed_and_cached(shape):
    model = make_model(MLAGPT, depth=1, **shape).eval()
    ours = model.blocks[0].attention
    theirs, rotary = attention_of_transformers(ours)
    x = torch.randn(2, 20, 64)
    angles = rotary(x, torch.arange(20)[None])
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        wanted, _ = theirs(x, angles, mask)
        whole = ours(x, model.cos[:, :20], model.sin[:, :20])

        # in pieces, the single ones of which are absorbed, and others expand what is cached
        kv_cache = model.new_kv_cache(2, CONTEXT)
        pieces = []
        for piece in x.split([7, 1, 1, 6, 5], dim=1):
            window = kv_cache.window(None, piece.size(1))
            cos, sin = model.cos[0, window.positions], model.sin[0, window.positions]
            pieces.append(ours(piece, cos, sin, kv_cache.layers[0], window))
            kv_cache.advance([0, 1], [piece.size(1)] * 2)
    torch.testing.assert_close(whole, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, atol=1e-5, rtol=1e-5)


def test_a_single_query_is_absorbed_and_others_are_not(monkeypatch):
    """As many tokens as there are, each by itself, give what all at once give."""
    model, idx = make_model(MLAGPT).eval(), noise(2, 12)
    absorbed = []
    attend = type(model.blocks[0].attention).attend_absorbed
    monkeypatch.setattr(
        type(model.blocks[0].attention), "attend_absorbed",
        lambda self, *more: absorbed.append(1) or attend(self, *more))
    with torch.no_grad():
        whole = model(idx)
        assert not absorbed
        one_by_one = in_pieces(model, idx, [1] * 12)
    assert len(absorbed) == 2 * 12
    torch.testing.assert_close(one_by_one, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth, share", [(4, 0.1875), (6, 1 / 6), (20, 0.15), (32, 0.140625)])
def test_the_cache_is_14_to_20_percent_of_that_of_all_keys_and_values(depth, share):
    with torch.device("meta"):
        ours = MLAGPT(MLAConfig.from_depth(depth, VOCAB_SIZE, CONTEXT))
        plain = GPT(GPTConfig.from_depth(depth, VOCAB_SIZE, CONTEXT))
    sizes = [model.new_kv_cache(2, 16).nbytes for model in (ours, plain)]
    assert sizes[0] / sizes[1] == share


def test_grouped_queries_are_refused():
    with pytest.raises(UserError, match="kv_heads=2 .* leave it out"):
        MLAConfig.from_depth(4, VOCAB_SIZE, CONTEXT, kv_heads=2)


# -------------------------------------------------------------------------------- experts

def mixture_of_transformers(ours, config):
    """Their mixture of experts with the weights of ours."""
    module, theirs_config = deepseek_of_transformers(config)
    theirs = module.DeepseekV3MoE(theirs_config).eval()
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
        theirs.experts.gate_up_proj.copy_(torch.cat((ours.gate.weight, ours.up.weight), 1))
        theirs.experts.down_proj.copy_(ours.down.weight)
        for name in ("gate", "up", "down"):
            projection = getattr(theirs.shared_experts, f"{name}_proj")
            projection.weight.copy_(getattr(ours.shared, name).weight)
    return theirs


@pytest.mark.parametrize("shape", [{}, {"experts": 5, "top_k": 2, "shared_experts": 2}])
def test_experts_and_their_gradients_equal_transformers(shape):
    model = make_model(DeepSeekGPT, **shape)
    ours = model.blocks[1].mlp
    theirs = mixture_of_transformers(ours, model.config)
    x = torch.randn(2, 20, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [ours(inputs[0]), theirs(inputs[1])]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for y in results:
        (y * torch.linspace(-1, 1, 64)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.down.weight.grad, theirs.experts.down_proj.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_equal_one_product_for_each_expert(dtype):
    """Some experts have no token."""
    counts = torch.tensor([3, 0, 6, 1, 0])
    results = []
    for multiply in (grouped_linear, linear_of_each):
        torch.manual_seed(0)
        x = torch.randn(10, 16).to(dtype).requires_grad_()
        weights = torch.randn(5, 24, 16).to(dtype).requires_grad_()
        y = multiply(x, weights, counts)
        y.backward(torch.randn(10, 24).to(dtype))
        results.append((y, x.grad, weights.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def load(mixture, x):
    """The tokens of the expert that has most of them, as a multiple of the mean."""
    chosen, _ = mixture.router(x.flatten(0, 1))
    return load_of(chosen, mixture)


def load_of(chosen, mixture):
    """load() of the experts that tokens have chosen."""
    counts = chosen.flatten().bincount(minlength=mixture.experts).float()
    return (counts.max() / counts.mean()).item()


def new_model(**more):
    torch.manual_seed(0)
    config = DeepSeekConfig(2, 64, 4, 4, VOCAB_SIZE, CONTEXT, **more)
    model = DeepSeekGPT(config)
    model.init_weights()
    return model


def text_of(step, sequences=16):
    """Tokens (B, T + 1), each of which follows from the one before, mostly."""
    generator = torch.Generator().manual_seed(step)
    shape = sequences, CONTEXT + 1
    ids = torch.randint(VOCAB_SIZE, shape, generator=generator)
    is_noise = torch.rand(shape, generator=generator) < 0.2
    for t in range(CONTEXT):
        following = (5 * ids[:, t] + 3) % VOCAB_SIZE
        ids[:, t + 1] = torch.where(is_noise[:, t + 1], ids[:, t + 1], following)
    return ids


class Training:
    """A new model and its layout."""

    def __init__(self, learning_rate=0.02):
        self.model = new_model().train()
        self.layout = Layout(self.model, self.model.setup_optimizers(learning_rate))

    def step(self, number, accept=True):
        ids = text_of(number)
        batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
        accumulate_gradients(self.model, batches, 1 / ids.numel(), len(ids), self.layout)
        _, grad_norm = self.layout.reduce(torch.zeros(()))
        if accept:
            self.layout.apply(1.0, grad_norm)
        self.layout.zero_grad()
        return grad_norm


def test_a_bias_against_the_load_brings_experts_to_the_same_number_of_tokens():
    """The bias alone learns, of experts of which three had most tokens; without it they keep them.
    """
    model = new_model()
    mixture = model.blocks[1].mlp
    with torch.no_grad():
        mixture.router.bias[:3] = 0.2
    groups = [group for o in model.setup_optimizers() for group in o.param_groups]
    [group] = [group for group in groups if group["params"][0] is mixture.router.bias]
    optimizer = AdamW([{**group, "lr": 0.005}])
    x = F.rms_norm(torch.randn(1, 1024, 64), (64,))
    before = load(mixture, x)
    for _ in range(40):
        mixture(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 2.5 and load(mixture, x) < 1.1
    assert group["lr"] == pytest.approx(0.01), "ten times DeepSeek's step"


def loads_while_training(dtype, steps):
    """load() of each step's tokens; every loss and gradient on the way must be finite."""
    training = Training()
    training.model.compute_dtype = dtype
    mixture = training.model.blocks[1].mlp
    with torch.no_grad():
        mixture.router.bias[:3] = 0.3
    found = []
    mixture.router.register_forward_hook(
        lambda router, inputs, outputs: found.append(load_of(outputs[0], mixture)))
    for number in range(steps):
        progress = number / steps
        set_learning_rates(training.layout.optimizers, lr_multiplier(progress))
        assert math.isfinite(training.step(number))
    assert all(p.isfinite().all() for p in training.model.parameters())
    return found


@pytest.mark.parametrize("dtype", [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.nightly),
])
def test_training_keeps_the_experts_balanced(dtype):
    """Of 512 tokens a step: at first three experts have nearly all, at the end the fullest has less
    than 1.5 times the mean."""
    found = loads_while_training(dtype, 300)
    assert found[0] > 3
    assert sum(found[-20:]) / 20 < 1.5


def test_a_step_that_is_skipped_moves_no_bias_and_a_resumed_run_continues_to_the_bit():
    straight, first = Training(), Training()
    for number in range(2):
        straight.step(number)
        first.step(number)
    bias = straight.model.blocks[1].mlp.router.bias
    before = bias.detach().clone()
    straight.step(7, accept=False)
    assert torch.equal(bias, before) and before.any()

    resumed = Training()
    resumed.layout.load_weights(first.layout.whole_weights())
    resumed.layout.load_optimizer_state([first.layout.optimizer_state()])
    for training in (straight, resumed):
        training.step(2)
    ours, theirs = (each.model.state_dict() for each in (straight, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_balance_counts_for_nothing_in_the_norm_of_the_gradient():
    model, ids = new_model(), text_of(0)
    (model(ids[:, :-1], ids[:, 1:]) / ids.numel()).backward()
    of_all = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    bias = model.blocks[1].mlp.router.bias.grad
    assert 0 < bias.norm() < 0.001 * of_all
    assert bias.sum().abs() < 1e-9, "what one has too many, others have too few"


# -------------------------------------------------------------------------------- counting

@pytest.mark.parametrize("model_class", [MLAGPT, DeepSeekGPT])
def test_the_flops_are_those_that_torch_counts(model_class, monkeypatch):
    """Forward, a third of a training step: twice each weight that a token is multiplied with."""
    monkeypatch.setattr("nanochat.variants.deepseek.grouped_linear", linear_of_each)
    shape = {"q_rank": 24, "nope_dim": 16, "v_dim": 16, "rope_dim": 8}
    model, idx = make_model(model_class, depth=3, **shape), noise(2, 20)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x, _ = model.features(idx)
    head = model.config.vocab_size * model.config.width
    # scores and values of every pair, the values as wide as the keys
    padding = 2 * model.config.depth * model.config.heads * (24 - 16) * 20
    counted = counter.get_total_flops() / idx.numel() - padding
    assert counted == model.flops(20).square / 3 - 2 * head


def test_active_and_total_parameters_of_the_documented_depth():
    with torch.device("meta"):
        model = DeepSeekGPT(DeepSeekConfig.from_depth(20, 65536, 2048))
        plain = GPT(GPTConfig.from_depth(20, 65536, 2048))
    C, I = 1280, 864                                    # a quarter of the dense 3,456
    attention = C * C + C * (320 + 64) + C // 4 * (C // 2 + C) + C * C
    dense = 3 * C * 4 * I
    active = 20 * (attention + dense) + 19 * 16 * C     # four experts are as wide, and the router
    assert model.matmul_parameters() == active + 65536 * C
    matrices = sum(p.numel() for p in model.parameters_by_role()["matrix"])
    assert matrices == active + 19 * 13 * 3 * C * I
    assert model.matmul_parameters() < 1.01 * plain.matmul_parameters()
    assert model.blocks[1].mlp.down.weight.shape == (16, C, I), "a stack for Muon"
