"""The documented model against code that no one here wrote, and against slow definitions."""
import pytest
import torch
import torch.nn.functional as F

from models import CONTEXT, VOCAB_SIZE, empty_model, in_pieces, make_model, noise
from nanochat.adamw import AdamW
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import is_out_of_memory
from nanochat.hf_export import nanochat_config
from nanochat.hf_names import parameters_by_hf_name
from nanochat.muon import Muon
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.variants.lookup import LookupGPT


def meta_model(depth, vocab_size=65536, max_seq_len=2048):
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(depth, vocab_size, max_seq_len))


# -------------------------------------------------------------------------------- the function

def nanochat_of_transformers(config):
    """The NanoChatForCausalLM of transformers in the shape of a GPTConfig."""
    transformers = pytest.importorskip("transformers", reason="the outside opinion")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChat")
    theirs = transformers.NanoChatConfig(
        **nanochat_config(config), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return transformers.NanoChatForCausalLM(theirs).eval()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_gradients_equal_transformers_nanochat(kv_heads):
    ours = make_model(kv_heads=kv_heads)
    theirs = nanochat_of_transformers(ours.config)
    pairs = parameters_by_hf_name(ours)
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == pairs.keys() and len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(pairs[name][:parameter.size(0)])  # without the padded vocabulary

    idx = torch.randint(3, VOCAB_SIZE, (3, 20))  # theirs learns nothing about its padding, token 2
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)

    inputs, targets = idx[:, :-1], idx[:, 1:]
    (ours(inputs, targets) / targets.numel()).backward()
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in wanted.items():
        gradient = pairs[name].grad[:parameter.size(0)]
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5, rtol=1e-4)


def test_the_documented_depth_20_has_561_million_parameters():
    model = meta_model(20)
    config = model.config
    assert (config.width, config.heads, config.kv_heads, config.head_dim) == (1280, 10, 10, 128)
    assert sum(p.numel() for p in model.parameters()) == 560_988_160
    assert model.vocab_size_padded == 65536
    # each layer has 4 C^2 of attention and 8 C^2 of MLP; a table is looked up, not multiplied
    assert model.matmul_parameters() == 20 * 12 * 1280**2 + 65536 * 1280
    assert model.flops_per_token(2048) == 6 * model.matmul_parameters() + 6 * 20 * 1280 * 2048


def test_flops_of_a_token_by_both_conventions_are_the_published_ones():
    flops = meta_model(20, vocab_size=32768).flops(2048)
    assert flops.weights / 1e9 == pytest.approx(2.61, abs=0.005)
    assert flops.causal / 1e9 == pytest.approx(2.93, abs=0.005)
    assert flops.square / 1e9 == pytest.approx(3.24, abs=0.005)
    # nanochat's own 3.49 GF a token at a vocabulary of 65,536
    assert meta_model(20).flops(2048).square / 1e9 == pytest.approx(3.49, abs=0.005)


def test_depth_alone_decides_the_heads():
    shapes = {}
    for depth in (1, 4, 12, 13, 32):
        config = GPTConfig.from_depth(depth, 97, 32)
        shapes[depth] = (config.width, config.heads, config.kv_heads, config.head_dim)
    assert shapes == {
        1: (64, 1, 1, 64),
        4: (256, 4, 4, 64),
        12: (768, 6, 6, 128),
        13: (832, 13, 13, 64),  # 128 does not divide its width
        32: (2048, 16, 16, 128),
    }


def test_grouped_query_attention_equals_repeated_heads():
    grouped, full = make_model(kv_heads=2), make_model(kv_heads=4)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
    full.load_state_dict(state)
    idx = noise(2, 32)
    torch.testing.assert_close(grouped(idx), full(idx))
    with pytest.raises(ValueError, match="kv_heads=3"):
        GPTConfig.from_depth(4, 97, 32, kv_heads=3)


def test_bfloat16_compute_is_near_float32_and_too_long_a_sequence_is_refused():
    model = make_model().eval()
    idx = noise(1, 16)
    exact = model(idx)
    model.compute_dtype = torch.bfloat16
    near = model(idx)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        model(noise(1, 33))


def test_casting_the_matrices_once_changes_no_bit():
    idx, targets = noise(2, 32), noise(2, 32)
    for dtype in (torch.float32, torch.bfloat16):
        cast_each_time, cast_once = make_model().eval(), make_model().eval()
        cast_each_time.compute_dtype = dtype
        assert cast_once.cast_for_inference(dtype) is cast_once
        dtypes = {
            p.dtype for name, p in cast_once.named_parameters()
            if name.startswith(("head", "blocks.")) and p.ndim == 2
        }
        assert dtypes == {dtype} and cast_once.embed.weight.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(cast_once(idx), cast_each_time(idx))
            both = [model.log_probs(idx, targets) for model in (cast_once, cast_each_time)]
            assert torch.equal(*both)


# -------------------------------------------------------------------------------- decoding

def test_cached_decoding_in_pieces_equals_the_whole():
    model = make_model(kv_heads=2).eval()
    idx = noise(2, 20)
    with torch.no_grad():
        whole = model(idx)
    torch.testing.assert_close(in_pieces(model, idx, [7, 1, 1, 11]), whole, atol=1e-5, rtol=1e-5)
    kv_cache = model.new_kv_cache(2, 32)
    assert kv_cache.nbytes == 2 * 2 * (2 * 32 * 2 * 16) * 4  # layers x (k, v) x B S G D x bytes


def test_prefill_and_decode_give_the_logits_after_each_sequence():
    model = make_model().eval()
    idx, lengths = noise(2, 9), [5, 8]
    kv_cache = model.new_kv_cache(3, CONTEXT)
    with torch.no_grad():
        found = model.prefill(idx, kv_cache, [2, 0], lengths)  # of two of the three slots
        assert found.shape == (2, VOCAB_SIZE) and kv_cache.lengths == [0, 0, 0]
        for logits, ids, length in zip(found, idx, lengths):
            alone = model(ids[None, :length])[0, -1]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)

        kv_cache.advance([2, 0], lengths)
        newest = noise(3, 1)
        found = model.decode(newest, kv_cache)
        for slot, ids, length in zip([2, 0], idx, lengths):
            alone = model(torch.cat((ids[:length], newest[slot]))[None])[0, -1]
            torch.testing.assert_close(found[slot], alone, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------- weights

def test_init_weights_sets_everything_on_the_meta_device():
    """docs/traps.md: meta-init"""
    model = empty_model(GPT, GPTConfig(2, 64, 4, 4, VOCAB_SIZE, CONTEXT))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(noise(1, CONTEXT))).all()


def test_a_fresh_model_is_flat_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, VOCAB_SIZE, CONTEXT))
    model.init_weights()
    idx = noise(2, 8)
    assert model(idx).abs().max() < 0.1
    entrance = F.rms_norm(model.embed(idx), (128,))
    torch.testing.assert_close(model.features(idx)[0], F.rms_norm(entrance, (128,)))
    assert model.blocks[0].attention.q.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)


def test_padded_vocabulary_is_never_predicted_and_gets_no_gradient():
    """docs/traps.md: padded-vocabulary-ranks"""
    model = make_model()
    assert model.head.weight.size(0) == model.vocab_size_padded == 128
    assert model(noise(1, 4)).size(-1) == 97
    model(noise(2, 8), noise(2, 8)).backward()
    assert model.head.weight.grad[97:].abs().sum() == 0


def test_compiled_blocks_keep_plain_keys_and_inference_stays_uncompiled(monkeypatch):
    """docs/traps.md: compile-recompiles"""
    compiled = []
    monkeypatch.setattr("nanochat.parallel.compile_problem", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(kw))
    model = make_model()
    keys = list(model.state_dict())
    assert prepare(model) is model
    assert compiled == [{"dynamic": False}] * 2
    assert list(model.state_dict()) == keys and not any("_orig_mod" in key for key in keys)
    for block in model.blocks:
        block._compiled_call_impl = lambda *a, **kw: pytest.fail("inference ran the compiled block")
    model.eval()(noise(1, 5))
    prepare(make_model(), compile=False)
    assert len(compiled) == 2


# -------------------------------------------------------------------------------- training

def test_roles_partition_the_parameters():
    model = make_model()
    roles = [id(p) for group in model.parameters_by_role().values() for p in group]
    assert sorted(roles) == sorted(id(p) for p in model.parameters())
    groups = [group for o in model.setup_optimizers() for group in o.param_groups]
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(roles)


def test_the_table_of_roles_gives_each_group_its_learning_rate():
    model = meta_model(12)  # of width 768, where the table holds as it stands
    optimizers = model.setup_optimizers(learning_rate=0.02, weight_decay=0.3)
    assert [type(optimizer) for optimizer in optimizers] == [AdamW, Muon]
    lr, decay = {}, {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        assert group["lr"] == group["initial_lr"]
        for p in group["params"]:
            lr[p], decay[p] = group["lr"], group["weight_decay"]
    assert lr[model.embed.weight] == pytest.approx(0.2)
    assert lr[model.head.weight] == pytest.approx(0.004)
    assert lr[model.blocks[3].mlp.up.weight] == 0.02
    assert decay[model.blocks[3].mlp.up.weight] == 0.3 and decay[model.embed.weight] == 0

    wider = meta_model(48).setup_optimizers()[0]  # twice the square root of the width
    assert wider.param_groups[0]["lr"] == pytest.approx(0.1)


class SmallMemory(torch.nn.Module):
    """Holds at most 3 sequences at a time, and runs out in the middle of a step."""

    def __init__(self, model, error):
        super().__init__()
        self.model, self.error = model, error

    def forward(self, inputs, targets):
        if inputs.size(0) > 3 and self.model.head.weight.grad is not None:
            raise self.error
        return self.model(inputs, targets)


@pytest.mark.parametrize("model_class", [GPT, LookupGPT])  # dense gradients, and sparse ones
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])
def test_a_batch_that_does_not_fit_is_halved_with_the_same_gradients(model_class, error, capsys):
    idx = noise(2, 8, 17)
    batches = [(ids[:, :-1], ids[:, 1:], "state") for ids in idx]
    whole = make_model(model_class)
    layout = Layout(whole, whole.setup_optimizers())
    loss, size = accumulate_gradients(whole, batches, 1 / 256, 8, layout)
    assert size == 8 and capsys.readouterr().out == ""

    halved = make_model(model_class)
    layout = Layout(halved, halved.setup_optimizers())
    again, size = accumulate_gradients(SmallMemory(halved, error), batches, 1 / 256, 8, layout)
    assert size == 2 and capsys.readouterr().out.count("\n") == 2
    torch.testing.assert_close(again, loss)
    for a, b in zip(halved.parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense(), atol=1e-6, rtol=1e-4)


def test_another_error_than_a_full_memory_is_raised():
    idx = noise(8, 17)
    batches = [(idx[:, :-1], idx[:, 1:])]
    model = make_model()
    model(idx[:, :-1], idx[:, 1:]).backward()
    with pytest.raises(RuntimeError, match="shape"):
        broken = SmallMemory(model, RuntimeError("shape"))
        accumulate_gradients(broken, batches, 1, 8, Layout(model, []))


def test_the_message_of_a_full_memory_is_known():
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60)
    assert is_out_of_memory(full.value)
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
