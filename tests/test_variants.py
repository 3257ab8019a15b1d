"""What every model class owes, and each variant against a definition of its own."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from models import CONTEXT, VOCAB_SIZE, empty_model, in_pieces, make_model, noise
from nanochat.configurator import read_config
from nanochat.forecast import assumed_machine
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_export import portable_config
from nanochat.hf_names import parameters_by_hf_name
from nanochat.parallel import Layout, accumulate_gradients, prepare
from nanochat.plan import Shape, choose_shape, config_for, given_fields
from nanochat.variants import CAUSAL, MODEL_CLASSES
from nanochat.variants.lookup import (
    HASHED_ROWS_MAX,
    HashedEmbedding,
    LookupConfig,
    LookupGPT,
)
from nanochat.variants.portable import PortableConfig, PortableGPT

every_class = pytest.mark.parametrize(
    "model_class", MODEL_CLASSES.values(), ids=MODEL_CLASSES.keys())


every_causal_class = pytest.mark.parametrize(
    "model_class", [MODEL_CLASSES[name] for name in CAUSAL], ids=CAUSAL)


def config_of(model_class, depth=1, **more):
    """The class's own config of a depth; an NGramGPT has room for as many n-grams as it counted."""
    if model_class is MODEL_CLASSES["lookup_ngrams"]:
        more["ngrams"] = 7
    return model_class.config_class.from_depth(depth, VOCAB_SIZE, CONTEXT, **more)


# -------------------------------------------------------------------------------- every class

@every_class
def test_every_class_trains_and_its_loss_falls(model_class):
    torch.manual_seed(0)
    config = config_of(model_class)
    assert (config.depth, config.width, config.vocab_size) == (1, 64, VOCAB_SIZE)
    model = model_class(config)
    model.init_weights()
    if model_class is MODEL_CLASSES["lookup_ngrams"]:
        model.ngrams.fill(torch.arange(7), torch.ones(7, dtype=torch.int32))  # counts of nothing
    layout = Layout(model, model.setup_optimizers())
    idx = noise(4, 17)
    batches = [(idx[:, :-1], idx[:, 1:])]
    losses = []
    for _ in range(5):
        loss, _ = accumulate_gradients(model, batches, 1 / 64, 4, layout)
        loss, grad_norm = layout.reduce(loss)
        layout.apply(1.0, grad_norm)
        layout.zero_grad()
        losses.append(loss)
    assert losses[0] == pytest.approx(torch.tensor(VOCAB_SIZE).log().item(), rel=0.4)
    assert losses[-1] < 0.95 * losses[0]


@every_causal_class
def test_cached_decoding_of_every_class_equals_the_whole(model_class):
    model = make_model(model_class, kv_heads=2).eval()
    idx = noise(2, 20)
    with torch.no_grad():
        whole = model(idx)
    pieces = in_pieces(model, idx, [7, 1, 1, 11])
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


@every_causal_class
def test_prefill_and_decode_of_every_class_equal_the_whole(model_class):
    model = make_model(model_class).eval()
    idx, lengths = noise(2, 9), [5, 8]
    kv_cache = model.new_kv_cache(2, CONTEXT)
    with torch.no_grad():
        found = model.prefill(idx, kv_cache, [0, 1], lengths)
        kv_cache.advance([0, 1], lengths)
        newest = noise(2, 1)
        after = model.decode(newest, kv_cache)
        for slot, length in enumerate(lengths):
            ids = torch.cat((idx[slot, :length], newest[slot]))
            alone = model(ids[None])[0]
            torch.testing.assert_close(found[slot], alone[-2], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(after[slot], alone[-1], atol=1e-5, rtol=1e-5)


@every_causal_class
def test_log_probs_of_every_class_are_the_logits_own(model_class):
    model = make_model(model_class).eval()
    idx, targets = noise(2, 16), noise(2, 16)
    targets[:, ::5] = -1
    each = F.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    log_probs = model.log_probs(idx, targets)
    torch.testing.assert_close(log_probs, -each.detach().view(2, 16), atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 16)
    loss = model(idx, targets, weights)
    torch.testing.assert_close(loss, -(log_probs * weights).sum(), atol=1e-4, rtol=1e-5)


@every_class
def test_the_roles_of_every_class_partition_its_parameters(model_class):
    model = make_model(model_class)
    roles = [id(p) for group in model.parameters_by_role().values() for p in group]
    assert sorted(roles) == sorted(id(p) for p in model.parameters())
    groups = [group for o in model.setup_optimizers() for group in o.param_groups]
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(roles)


@every_class
def test_init_weights_of_every_class_sets_everything_on_the_meta_device(model_class):
    """docs/traps.md: meta-init"""
    model = empty_model(model_class, config_of(model_class, depth=2))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if model_class is MODEL_CLASSES["lookup_ngrams"]:
        model.ngrams.fill(torch.arange(7), torch.ones(7, dtype=torch.int32))
    assert torch.isfinite(model(noise(1, CONTEXT))).all()


@every_class
def test_casting_the_matrices_of_every_class_once_changes_no_bit(model_class):
    idx = noise(2, CONTEXT - 1)
    targets = torch.randint(VOCAB_SIZE - 1, (2, CONTEXT - 1))   # a mask, the last, is no target
    for dtype in (torch.float32, torch.bfloat16):
        cast_each_time, cast_once = make_model(model_class).eval(), make_model(model_class).eval()
        cast_each_time.compute_dtype = dtype
        cast_once.cast_for_inference(dtype)
        dtypes = {
            p.dtype for name, p in cast_once.named_parameters()
            if name.startswith(("head", "blocks.")) and p.ndim >= 2 and "router" not in name
        }
        assert dtypes == {dtype} and cast_once.embed.weight.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(cast_once(idx), cast_each_time(idx))
            both = [model.log_probs(idx, targets) for model in (cast_once, cast_each_time)]
            assert torch.equal(*both)


@every_class
def test_one_compiled_graph_serves_all_blocks_of_a_kind_of_every_class(model_class):
    """docs/traps.md: compile-recompiles"""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = make_model(model_class, depth=4)
    if hasattr(model, "look_up_in_blocks"):
        model.look_up_in_blocks = True  # as on a GPU
    for block in model.blocks:
        block.compile(dynamic=False, backend=count, fullgraph=True)
    for sequences in (4, 4, 2):  # two sizes of a micro-batch
        model(noise(sequences, 16), noise(sequences, 16)).backward()
    torch.compiler.reset()
    kinds = {type(block.mlp) for block in model.blocks}  # some have experts
    assert len(graphs) == 2 * len(kinds)


@every_class
def test_on_a_gpu_the_loss_and_the_entrance_are_compiled_for_training_alone(
        model_class, monkeypatch):
    compiled = []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *inputs: pytest.fail("inference ran what was compiled for training")

    monkeypatch.setattr("nanochat.parallel.compile_problem", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(torch, "compile", compile)
    model = make_model(model_class)
    assert not prepare(model).compile_loss and compiled == []

    with monkeypatch.context() as gpu:
        gpu.setattr(GPT, "device", torch.device("cuda"))
        prepare(model)
        assert model.compile_loss and compiled == [("enter", {"dynamic": False})]
    model.eval()(noise(1, 5))
    model.log_probs(noise(1, 5), noise(1, 5))
    with pytest.raises(pytest.fail.Exception):
        model.train()(noise(1, 5))


@every_causal_class
def test_features_of_some_positions_are_those_of_all_of_them(model_class):
    """Alone, into an empty cache, and behind what a cache holds; of other positions each."""
    model, idx = make_model(model_class, kv_heads=2).eval(), noise(3, 16)
    at = torch.tensor([[0, 1, 2], [7, 8, 9], [13, 14, 15]])
    cache = model.new_kv_cache(4, 24)
    slots = [3, 0, 2]
    cases = [{}, {"kv_cache": cache, "slots": slots}]
    for where in cases:
        x, recent = model.features(idx, **where)
        some, some_recent = model.features(idx, **where, at=at)
        torch.testing.assert_close(some, x.gather(1, at[..., None].expand_as(some)))
        if recent is not None:
            assert torch.equal(some_recent[1, 2], recent[1, 9])

    cache.advance(slots, [16, 5, 11])
    end, at = noise(3, 6), torch.tensor([[5], [0], [3]])
    x, _ = model.features(end, cache, slots)
    some, _ = model.features(end, cache, slots, at)
    torch.testing.assert_close(some, x.gather(1, at[..., None].expand_as(some)))


@every_class
def test_the_compiled_entrance_of_every_class_is_one_graph_and_changes_nothing(model_class):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, idx = make_model(model_class), noise(2, 16)
    for module in model.modules():
        if isinstance(module, HashedEmbedding):
            module.sparse = False  # as on a GPU
    wanted = model.features(idx)[0]
    model.compiled_enter = torch.compile(
        model.enter, dynamic=False, backend=count, fullgraph=True)
    for _ in range(2):
        assert torch.equal(model.features(idx)[0], wanted)
    torch.compiler.reset()
    assert len(graphs) == 1


# -------------------------------------------------------------------------------- lookup

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_looked_up_inside_the_blocks_are_the_same(dtype):
    idx, targets = noise(2, 16), noise(2, 16)
    models = [make_model(LookupGPT, depth=3) for _ in range(2)]
    for model, inside in zip(models, (False, True)):
        model.look_up_in_blocks, model.compute_dtype = inside, dtype
    outside, inside = (model(idx, targets) for model in models)
    assert torch.equal(outside, inside)
    for a, b in zip(*(torch.autograd.grad(loss, [table.weight for table in model.values])
                      for loss, model in zip((outside, inside), models))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_on_a_gpu_and_on_mps_gradients_are_dense_and_values_looked_up_inside(monkeypatch):
    model = make_model(LookupGPT)
    for device_type, on_cpu in (("cuda", False), ("mps", False), ("cpu", True)):
        monkeypatch.setattr(LookupGPT, "device", torch.device(device_type))
        model.choose_gradients()
        assert model.bigram.sparse == model.trigram.sparse == on_cpu
        assert model.look_up_in_blocks != on_cpu


def test_a_token_is_looked_up_alone_and_with_the_one_and_the_two_before_it():
    model = make_model(LookupGPT, depth=0)
    idx, rows = noise(2, 9), model.bigram.num_embeddings
    assert rows == model.trigram.num_embeddings == 64 * 128
    with torch.no_grad():
        for ids, logits in zip(idx.tolist(), model(idx)):
            for first, before, token, found in zip([0, 0] + ids, [0] + ids, ids, logits):
                pair, triple = before * 7919 + token, first * 1000003 + before * 7919 + token
                x = model.embed.weight[token] + model.bigram.weight[pair % rows]
                x = x + model.trigram.weight[triple % rows]
                x = x + model.smear * model.embed.weight[before]
                x = F.rms_norm(F.rms_norm(x, (64,)), (64,))
                wanted = 15 * torch.tanh(model.head.weight[:97] @ x / 15)
                torch.testing.assert_close(found, wanted)


def test_grouped_query_attention_equals_repeated_heads_and_values():
    grouped, full = make_model(LookupGPT, kv_heads=2), make_model(LookupGPT, kv_heads=4)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
        if name.startswith("values"):
            state[name] = state[name].view(-1, 2, 16).repeat_interleave(2, 1).reshape(-1, 64)
    full.load_state_dict(state)
    idx = noise(2, 32)
    torch.testing.assert_close(grouped(idx), full(idx))


def test_with_its_lookups_neutralised_it_is_the_plain_model():
    lookup, plain = make_model(LookupGPT), make_model()
    with torch.no_grad():
        tables = [lookup.bigram.weight, lookup.trigram.weight]
        for p in (lookup.smear, *tables, *(table.weight for table in lookup.values)):
            p.zero_()
        for block in lookup.blocks:
            block.blend.copy_(torch.tensor([1.0, 0.0]))
    weights = lookup.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    idx = noise(2, 32)
    torch.testing.assert_close(lookup(idx), plain(idx))


def test_value_embeddings_are_shared_from_both_ends():
    for depth, shared in ((1, [0]), (4, [0, 1, 1, 0]), (5, [0, 1, 2, 1, 0])):
        model = make_model(LookupGPT, depth=depth)
        idx = noise(1, 3)
        inputs = model.block_inputs(idx, model.embed(idx))
        assert len(model.values) == (depth + 1) // 2
        for given, table in zip(inputs, shared):
            assert torch.equal(given["value"], model.values[table](idx))


def test_fresh_lookups_have_no_effect():
    torch.manual_seed(0)
    model = LookupGPT(LookupConfig.from_depth(2, VOCAB_SIZE, CONTEXT))
    model.init_weights()
    idx = noise(2, 8)
    entrance = F.rms_norm(model.embed(idx), (128,))
    torch.testing.assert_close(model.enter(idx, model.recent_tokens(idx)), entrance)
    assert all(block.blend.tolist() == [1.0, pytest.approx(0.1)] for block in model.blocks)


def test_hashed_tables_are_bounded_and_their_gradients_sparse_on_a_cpu():
    model = make_model(LookupGPT)
    model(noise(2, 8), noise(2, 8)).backward()
    for table in (model.bigram, model.trigram):
        assert isinstance(table, HashedEmbedding) and table.weight.grad.is_sparse
    assert not model.embed.weight.grad.is_sparse
    with torch.device("meta"):
        large = LookupGPT(LookupConfig.from_depth(1, 65536, CONTEXT))
    assert large.bigram.num_embeddings == HASHED_ROWS_MAX == 131072


# -------------------------------------------------------------------------------- portable

def portable_of_transformers(config):
    """The Qwen3ForCausalLM of transformers in the shape of a PortableConfig.

    LlamaForCausalLM where that has no QK norm.
    """
    transformers = pytest.importorskip("transformers", reason="the outside opinion")
    family = "Qwen3" if config.qk_norm else "Llama"
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    theirs = getattr(transformers, f"{family}Config")(
        **portable_config(config), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    return getattr(transformers, f"{family}ForCausalLM")(theirs).eval()


@pytest.mark.parametrize("shape", [
    dict(tied=False, rotary_base=1000000.0, norm_eps=1e-6),
    dict(tied=True, rotary_base=10000.0, norm_eps=1e-2),  # large enough to matter
    dict(tied=False, rotary_base=10000.0, head_dim=24),   # not the share of a head, 16
    dict(tied=True, rotary_base=10000.0, qk_norm=False),
], ids=["qwen3", "qwen3, tied", "qwen3, wide heads", "llama"])
def test_portable_logits_and_gradients_equal_transformers(shape):
    ours = make_model(PortableGPT, kv_heads=2, **shape)
    theirs = portable_of_transformers(ours.config)
    pairs = parameters_by_hf_name(ours)
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == pairs.keys() and len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(pairs[name][:parameter.size(0)])  # without the padded vocabulary

    idx = noise(3, 20)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
    cached = in_pieces(ours.eval(), idx, [7, 1, 12])
    torch.testing.assert_close(cached, ours(idx), atol=1e-4, rtol=1e-4)

    inputs, targets = idx[:, :-1], idx[:, 1:]
    (ours(inputs, targets) / targets.numel()).backward()
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in wanted.items():
        gradient = pairs[name].grad[:parameter.size(0)]
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name, parameters, of_the_embedding", [
    ("yxanul_197m", 197.9e6, 0.52),
    ("yxanul_270m", 272.6e6, 0.47),
])
def test_the_documented_shapes_of_28_layers(name, parameters, of_the_embedding):
    settings = dict(read_config(ROOT / "config" / f"{name}.py"))
    model_class = MODEL_CLASSES[settings["model"]]
    fields = given_fields(settings, model_class)
    shape = Shape(settings["depth"], settings["max_seq_len"], settings["total_batch_size"], "")
    config = config_for(model_class, shape, 200_005, fields)  # of the published SuperBPE tokenizers
    assert (config.depth, config.head_dim, config.kv_heads, config.tied) == (28, 64, 2, True)
    with torch.device("meta"):
        model = model_class(config)
    # the batch that the plan would take by itself for a model of so many parameters
    wanted = choose_shape(
        {**settings, "total_batch_size": None}, None, assumed_machine("h100", 1), model_class,
        200_005, None)
    assert wanted.total_batch_size == pytest.approx(settings["total_batch_size"], rel=0.1)
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(parameters, rel=1e-3)
    assert model.embed.weight.numel() / found == pytest.approx(of_the_embedding, abs=5e-3)

    # its blocks are those of a Qwen3: the same logits with two of them, and a small vocabulary
    small = replace(config, depth=2, vocab_size=96, max_seq_len=64)
    torch.manual_seed(0)
    ours = model_class(small)
    ours.init_weights()
    theirs = portable_of_transformers(small)
    pairs = parameters_by_hf_name(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for parameter_name, parameter in theirs.named_parameters():
            parameter.copy_(pairs[parameter_name][:parameter.size(0)])
    idx = torch.randint(96, (2, 64))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=2e-4, rtol=2e-4)


def test_portable_without_gains_has_no_scalars():
    model = make_model(PortableGPT, gains=False)
    assert model.parameters_by_role()["scalar"] == []
    assert all(p.ndim == 2 for p in model.parameters())
    assert torch.isfinite(model(noise(2, 8))).all()
    with_gains = make_model(PortableGPT)
    # two norms of a block and the last one, (C,) each; queries' and keys' (D,)
    scalars = sum(p.numel() for p in with_gains.parameters_by_role()["scalar"])
    assert scalars == 2 * (2 * 64 + 2 * 16) + 64


def test_portable_without_gains_is_portable_with_gains_of_one():
    plain, gains = make_model(PortableGPT, gains=False), make_model(PortableGPT)
    with torch.no_grad():
        for p in gains.parameters_by_role()["scalar"]:
            p.fill_(1)
    gains.load_state_dict(plain.state_dict(), strict=False)
    idx = noise(2, 16)
    torch.testing.assert_close(plain(idx), gains(idx))


def test_a_tied_embedding_is_trained_as_a_head_is():
    def learning_rates(**options):
        model = make_model(PortableGPT, **options)
        groups = [g for each in model.setup_optimizers(0.02) for g in each.param_groups]
        return [g["lr"] for g in groups for p in g["params"] if p is model.embed.weight]

    # at an embedding's learning rate a tied model loses a nat (dev/LOG.md)
    [tied], [untied] = learning_rates(tied=True), learning_rates(tied=False)
    assert tied == pytest.approx(untied * 0.4 / 10)


def test_portable_adds_only_what_it_overrides():
    names = {name for name, _ in make_model(PortableGPT, gains=False).named_parameters()}
    plain = {name for name, _ in make_model(GPT).named_parameters()}
    assert names - plain == {f"blocks.{i}.mlp.gate.weight" for i in range(2)}
    assert plain <= names
    tied = {name for name, _ in make_model(PortableGPT, gains=False, tied=True).named_parameters()}
    assert names - tied == {"head.weight"}


def test_swiglu_weighs_as_much_as_two_matrices_of_four_widths():
    config = PortableConfig.from_depth(12, 65536, 2048)
    assert (config.width, config.mlp_width) == (768, 2048)
    with torch.device("meta"):
        portable, plain = PortableGPT(config), GPT(GPTConfig.from_depth(12, 65536, 2048))
    assert portable.matmul_parameters() == plain.matmul_parameters()
    # an odd width is rounded up to a multiple of 64; a given one stays
    assert PortableConfig.from_depth(1, 97, 32).mlp_width == 192
    assert PortableConfig.from_depth(1, 97, 32, mlp_width=100).mlp_width == 100
