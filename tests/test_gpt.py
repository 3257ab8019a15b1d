"""The model against implementations that no one here wrote, and against slow twins."""
import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, GPTConfig, SoftcapCrossEntropy
from nanochat.hardware import is_out_of_memory
from nanochat.parallel import Layout, accumulate_gradients, prepare


def make_model(depth=2, width=64, heads=4, kv_heads=4, vocab_size=97, T=32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth, width, heads, kv_heads, vocab_size, T))
    model.init_weights()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    torch.nn.init.normal_(model.smear, std=0.5)
    return model


@torch.no_grad()
def make_extras_neutral(model):
    """Take away what the documented model has not: the token before, pairs and triples of tokens, value embeddings, and the second look at x0."""
    for silent in (model.smear, model.bigram.weight, model.trigram.weight, *(table.weight for table in model.values)):
        silent.zero_()
    for block in model.blocks:
        block.blend.copy_(torch.tensor([1.0, 0.0]))


def test_logits_and_gradients_equal_transformers_nanochat():
    transformers = pytest.importorskip("transformers", reason="the outside opinion needs transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChat")
    ours = make_model()
    make_extras_neutral(ours)
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=97, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, rms_norm_eps=1.19e-7, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        final_logit_softcapping=15.0, hidden_act="relu2", attention_bias=False, tie_word_embeddings=False)).eval()
    pairs = {"model.embed_tokens.weight": ours.embed.weight, "lm_head.weight": ours.head.weight}
    for i, block in enumerate(ours.blocks):
        a, m = block.attention, block.mlp
        for name, linear in (("self_attn.q_proj", a.q), ("self_attn.k_proj", a.k), ("self_attn.v_proj", a.v), ("self_attn.o_proj", a.out),
                             ("mlp.fc1", m.up), ("mlp.fc2", m.down)):
            pairs[f"model.layers.{i}.{name}.weight"] = linear.weight
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == pairs.keys()
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(pairs[name][:parameter.size(0)])  # padded rows stay behind
    idx = torch.randint(3, 97, (3, 20))  # theirs learns nothing about its padding, token 2
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
    (ours(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()).backward()
    F.cross_entropy(theirs(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for name, parameter in wanted.items():
        torch.testing.assert_close(pairs[name].grad[:parameter.size(0)], parameter.grad, atol=2e-5, rtol=1e-4)


class SmallMemory(torch.nn.Module):
    """Holds at most 3 sequences at a time, and runs out in the middle of a step."""

    def __init__(self, model, error):
        super().__init__()
        self.model, self.error = model, error

    def forward(self, inputs, targets):
        if inputs.size(0) > 3 and self.model.head.weight.grad is not None:
            raise self.error
        return self.model(inputs, targets)


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_gradients(capsys):
    idx = torch.randint(97, (2, 8, 17))
    batches = [(rows[:, :-1], rows[:, 1:], "state") for rows in idx]
    whole = make_model()
    loss, rows = accumulate_gradients(whole, batches, 1 / 256, 8, Layout(whole.setup_optimizers()))
    assert rows == 8 and capsys.readouterr().out == ""
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        halved = make_model()
        again, rows = accumulate_gradients(SmallMemory(halved, error), batches, 1 / 256, 8, Layout(halved.setup_optimizers()))
        assert rows == 2 and capsys.readouterr().out.count("\n") == 2
        torch.testing.assert_close(again, loss)
        for a, b in zip(halved.parameters(), whole.parameters()):
            torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense(), atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="shape"):
        accumulate_gradients(SmallMemory(whole, RuntimeError("shape")), batches, 1, 8, Layout([]))


def test_the_message_of_a_full_memory_is_known():
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60)
    assert is_out_of_memory(full.value) and not is_out_of_memory(RuntimeError("sizes do not match"))


def test_a_token_is_looked_up_alone_and_with_the_one_and_the_two_before_it():
    model = make_model(depth=0)
    idx, rows = torch.randint(97, (2, 9)), model.bigram.num_embeddings
    assert rows == model.trigram.num_embeddings
    with torch.no_grad():
        for ids, logits in zip(idx.tolist(), model(idx)):
            for first, before, token, found in zip([0, 0] + ids, [0] + ids, ids, logits):
                x = model.embed.weight[token] + model.bigram.weight[(before * 7919 + token) % rows]
                x = x + model.trigram.weight[(first * 1000003 + before * 7919 + token) % rows]
                x = x + model.smear * model.embed.weight[before]
                x = F.rms_norm(F.rms_norm(x, (64,)), (64,))
                torch.testing.assert_close(found, 15 * torch.tanh(model.head.weight[:97] @ x / 15))


@pytest.mark.parametrize("chunk", [97 * 16, 1 << 20])
def test_chunked_cross_entropy_equals_the_plain_one(monkeypatch, chunk):
    monkeypatch.setattr(SoftcapCrossEntropy, "CHUNK", chunk)
    x, w = torch.randn(70, 24, requires_grad=True), torch.randn(97, 24, requires_grad=True)
    targets = torch.randint(97, (70,))
    targets[::7] = -1
    loss = SoftcapCrossEntropy.apply(x, w, targets, 15.0, "sum") * 0.3
    gradients = torch.autograd.grad(loss, (x, w))
    plain = F.cross_entropy(15 * torch.tanh(x @ w.T / 15), targets, ignore_index=-1, reduction="sum") * 0.3
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(gradients, torch.autograd.grad(plain, (x, w))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        each = SoftcapCrossEntropy.apply(x, w, targets, 15.0, "none")
    torch.testing.assert_close(each, F.cross_entropy(15 * torch.tanh(x @ w.T / 15), targets, ignore_index=-1, reduction="none").detach())


def test_grouped_query_attention_equals_repeated_heads():
    grouped, full = make_model(kv_heads=2), make_model(kv_heads=4)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
        if name.startswith("values"):
            state[name] = state[name].view(-1, 2, 16).repeat_interleave(2, 1).reshape(-1, 64)
    full.load_state_dict(state)
    idx = torch.randint(97, (2, 32))
    torch.testing.assert_close(grouped(idx), full(idx))
    with pytest.raises(ValueError, match="kv_heads=3"):
        GPTConfig.from_depth(4, 97, 32, kv_heads=3)


def test_cached_reading_in_pieces_equals_the_whole():
    model = make_model(kv_heads=2).eval()
    idx = torch.randint(97, (2, 20))
    cache, pieces = model.new_kv_cache(2, 32), []
    with torch.no_grad():
        for part in idx.split([7, 1, 1, 11], dim=1):
            pieces.append(model(part, kv_cache=cache))
            cache.advance([0, 1], [part.size(1)] * 2)
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)
    assert cache.nbytes == 2 * 2 * (2 * 32 * 2 * 16) * 4  # layers x (k, v) x B S G D x bytes


def test_trap_19_init_weights_sets_everything_on_the_meta_device():
    config = GPTConfig(2, 64, 4, 4, 97, 32)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(torch.randint(97, (1, 32)))).all()


def test_trap_20_compiled_blocks_keep_plain_keys_and_inference_stays_uncompiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(kw))
    model = make_model()
    keys = list(model.state_dict())
    prepare(model)
    assert compiled == [{"dynamic": False}] * 2
    assert list(model.state_dict()) == keys and not any("_orig_mod" in key for key in keys)
    for block in model.blocks:
        block._compiled_call_impl = lambda *a: pytest.fail("inference ran the compiled block")
    model.eval()(torch.randint(97, (1, 5)))


def test_roles_partition_the_parameters():
    model = make_model()
    roles = [id(p) for group in model.parameters_by_role().values() for p in group]
    assert sorted(roles) == sorted(id(p) for p in model.parameters())
    in_groups = [id(p) for o in model.setup_optimizers() for g in o.param_groups for p in g["params"]]
    assert sorted(in_groups) == sorted(roles)


def test_trap_13_padded_vocabulary_rows_are_never_predicted_and_get_no_gradient():
    model = make_model()
    assert model.head.weight.size(0) == 128 and model(torch.randint(97, (1, 4))).size(-1) == 97
    model(torch.randint(97, (2, 8)), torch.randint(97, (2, 8))).backward()
    assert model.head.weight.grad[97:].abs().sum() == 0


def test_casting_the_matrices_once_changes_no_bit():
    idx, targets = torch.randint(97, (2, 32)), torch.randint(97, (2, 32))
    for dtype in (torch.float32, torch.bfloat16):
        cast_each_time, cast_once = make_model().eval(), make_model().eval()
        cast_each_time.compute_dtype = dtype
        cast_once.cast_for_inference(dtype)
        dtypes = {p.dtype for name, p in cast_once.named_parameters() if name.startswith(("head", "blocks.")) and p.ndim == 2}
        assert dtypes == {dtype} and cast_once.embed.weight.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(cast_once(idx), cast_each_time(idx))
            assert torch.equal(cast_once(idx, targets, reduction="none"), cast_each_time(idx, targets, reduction="none"))


def test_bfloat16_compute_is_near_float32_and_too_long_a_row_is_refused():
    model = make_model().eval()
    idx = torch.randint(97, (1, 16))
    exact = model(idx)
    model.compute_dtype = torch.bfloat16
    assert (model(idx) - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        model(torch.randint(97, (1, 33)))
