"""The decode step in C++ against model.decode()."""
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nanochat import native_decode
from nanochat.decoding import use_fast_linear
from nanochat.engine import Engine, serving_engine
from nanochat.fast_linear import can_multiply_fast, quantize
from nanochat.gpt import GPT, MLP, Block, GPTConfig, Linear
from nanochat.hardware import text_of
from nanochat.native_decode import NativeDecode, can_decode_natively
from nanochat.variants.deepseek import DeepSeekGPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.mla import MLAGPT
from nanochat.variants.ngrams import NGramGPT, count_ngrams
from nanochat.variants.portable import PortableGPT, TiedEmbedding

CONTEXT = 48
VOCAB_SIZE = 97
SLOTS = 13      # rows that the C++ function multiplies 8, 4 and 1 at a time
LENGTHS = [1 + 3 * slot for slot in range(SLOTS)]


# MLA's latent is a quarter of the width, and its heads are halves that are rotated and not
LATENT = {"width": 128, "heads": 2, "kv_heads": 2}
SWIGLU = {"mlp_width": 160}


def make_model(
        model_class=GPT, dtype=torch.float32, int8=False, kv_heads=1, width=96, heads=3, **more):
    """A model of two layers with weights of noise, int8: that are rounded already."""
    torch.manual_seed(0)
    counted = None
    if model_class is NGramGPT:
        counted = count_ngrams(torch.randint(VOCAB_SIZE, (400,)))
        more["ngrams"] = len(counted[0])
    config = model_class.config_class(2, width, heads, kv_heads, VOCAB_SIZE, CONTEXT, **more)
    model = model_class(config)
    model.init_weights()
    if counted:
        model.ngrams.fill(*counted)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if int8 and isinstance(module, (Linear, TiedEmbedding)):
            quantized, scale = quantize(module.weight)
            module.weight.data = quantized * scale[:, None]
    return model.eval().cast_for_inference(dtype)


needs_native = pytest.mark.skipif(
    not can_multiply_fast(torch.device("cpu")) or not can_decode_natively(make_model()),
    reason="no C++ compiler, or another system")


def filled_cache(model, lengths=LENGTHS):
    """A cache with a prompt of another length in each slot."""
    torch.manual_seed(1)
    kv_cache = model.new_kv_cache(len(lengths), CONTEXT)
    slots = list(range(len(lengths)))
    idx = torch.randint(VOCAB_SIZE, (len(lengths), max(lengths)))
    model.prefill(idx, kv_cache, slots, lengths)
    kv_cache.advance(slots, lengths)
    return kv_cache


def steps_of(decode, kv_cache, turns):
    """Logits of some decode steps, each of other slots; the tokens are given."""
    found = []
    for slots in turns:
        tokens = [(10 + 7 * slot + len(found)) % VOCAB_SIZE for slot in slots]
        found.append(decode(tokens, slots).clone())
        kv_cache.advance(slots, [1] * len(slots))
    return found


def both(model, turns, int8=False, lengths=LENGTHS):
    """(logits of the native steps, of model.decode())"""
    with torch.inference_mode():
        kv_cache = filled_cache(model, lengths)
        wanted = steps_of(
            lambda tokens, slots: model.decode(torch.tensor(tokens)[:, None], kv_cache, slots),
            kv_cache,
            turns,
        )
        kv_cache = filled_cache(model, lengths)
        use_fast_linear(model, int8, native=True)
        decode = NativeDecode(model, kv_cache)
        decode.warm_up()
        return steps_of(decode, kv_cache, turns), wanted


ALL = list(range(SLOTS))
TURNS = [[0], [12], [0], [5, 2, 9], ALL, ALL[::-1], [3]]


@needs_native
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("model_class", [GPT, LookupGPT, NGramGPT])
def test_a_native_step_gives_the_logits_of_the_plain_one(model_class, kv_heads, int8):
    found, wanted = both(make_model(model_class, int8=int8, kv_heads=kv_heads), TURNS, int8)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


# Qwen3, with a head that is its embedding, with heads that are wider than their share of the width,
# without gains; Llama; latents
OTHERS = {
    "qwen3": (PortableGPT, SWIGLU),
    "tied": (PortableGPT, {**SWIGLU, "tied": True, "norm_eps": 1e-3}),
    "wide heads": (PortableGPT, {**SWIGLU, "head_dim": 64}),
    "without gains": (PortableGPT, {**SWIGLU, "gains": False, "kv_heads": 3}),
    "llama": (PortableGPT, {**SWIGLU, "qk_norm": False}),
    "mla": (MLAGPT, LATENT),
    "mla, narrow values": (MLAGPT, {**LATENT, "nope_dim": 64, "v_dim": 32, "kv_rank": 96}),
}


@needs_native
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("model_class, more", OTHERS.values(), ids=OTHERS)
def test_other_families_get_the_logits_of_the_plain_step(model_class, more, int8):
    model = make_model(model_class, int8=int8, **more)
    assert can_decode_natively(model)
    found, wanted = both(model, TURNS, int8)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("model_class, more", OTHERS.values(), ids=OTHERS)
def test_other_families_in_bfloat16_differ_by_its_rounding_alone(model_class, more):
    last = {"turns": [[0]], "lengths": [CONTEXT - 1]}
    for case in ({"turns": TURNS}, last):
        exact = both(make_model(model_class, **more), **case)[1]
        found, wanted = both(make_model(model_class, torch.bfloat16, **more), **case)
        for ours, plain, true in zip(found, wanted, exact):
            allowed = 1.5 * (plain - true).pow(2).mean().sqrt()
            assert (ours - true).pow(2).mean().sqrt() <= allowed


@needs_native
@pytest.mark.parametrize("model_class", [GPT, LookupGPT])
def test_bfloat16_differs_by_its_rounding_alone(model_class):
    exact = both(make_model(model_class), TURNS)[1]
    found, wanted = both(make_model(model_class, torch.bfloat16), TURNS)
    for ours, plain, true in zip(found, wanted, exact):
        allowed = 1.5 * (plain - true).pow(2).mean().sqrt()
        assert (ours - true).pow(2).mean().sqrt() <= allowed


@needs_native
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_bits_alone_and_among_others(dtype, int8):
    model = make_model(dtype=dtype)
    with torch.inference_mode():
        use_fast_linear(model, int8, native=True)
        decode = NativeDecode(model, filled_cache(model))
        decode.warm_up()
        tokens = [(11 * slot) % VOCAB_SIZE for slot in ALL]
        together = decode(tokens, ALL).clone()
        for slot in ALL:
            assert decode([tokens[slot]], [slot])[0].equal(together[slot])


# (width, heads, kv_heads): head dimensions of 32, 64, 96 and 128, with and without groups
SHAPES = (32, 1, 1), (256, 4, 2), (192, 2, 1), (256, 2, 2)


@needs_native
@pytest.mark.parametrize("width, heads, kv_heads", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_heads_at_the_last_position_without_a_softcap(width, heads, kv_heads, dtype):
    shape = {"width": width, "heads": heads, "kv_heads": kv_heads, "softcap": 0.0}
    last = {"turns": [[0]], "lengths": [CONTEXT - 1]}
    exact = both(make_model(**shape), **last)[1][0]
    [found], [plain] = both(make_model(dtype=dtype, **shape), **last)
    allowed = 1.5 * (plain - exact).norm() + 1e-4 * exact.norm()
    assert (found - exact).norm() <= allowed


@needs_native
def test_more_sequences_than_torch_is_compiled_for():
    slots = list(range(133))
    [found], [wanted] = both(make_model(), [slots], lengths=[1 + slot % 40 for slot in slots])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@needs_native
def test_a_full_slot_is_an_error_and_not_a_write_behind_the_cache():
    model = make_model()
    with torch.inference_mode():
        kv_cache = filled_cache(model, [CONTEXT])
        use_fast_linear(model, native=True)
        decode = NativeDecode(model, kv_cache)
        decode.warm_up()
        with pytest.raises(AssertionError):
            decode([1], [0])


@needs_native
def test_engines_on_two_threads_do_not_disturb_each_other():
    """Replicas of a server: each thread has a team, and buffers of its own."""
    models = make_model(), make_model(width=192, heads=2)
    decodes, wanted = [], []
    tokens = [(11 * slot) % VOCAB_SIZE for slot in ALL]
    with torch.inference_mode():
        for model in models:
            use_fast_linear(model, native=True)
            decodes.append(NativeDecode(model, filled_cache(model)))
            decodes[-1].warm_up()
            wanted.append(decodes[-1](tokens, ALL).clone())

    def run(number):
        return all(decodes[number](tokens, ALL).equal(wanted[number]) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [True, True]


@needs_native
def test_a_team_may_be_smaller_than_asked_for():
    """OpenMP gives fewer threads where the user limits them: every share must still be done."""
    library = native_decode.native_library()
    levels = library.omp_get_max_active_levels()
    library.omp_set_max_active_levels(0)
    try:
        test_a_native_step_gives_the_logits_of_the_plain_one(GPT, 1, False)
    finally:
        library.omp_set_max_active_levels(levels)


# Instruction sets for which other parts of the source are compiled, and what they need
INSTRUCTIONS = {
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


@pytest.fixture(params=INSTRUCTIONS)
def older_instructions(request, monkeypatch):
    """The library as an older processor has it."""
    if not INSTRUCTIONS[request.param] <= set(text_of(Path("/proc/cpuinfo")).split()):
        pytest.skip(f"the processor lacks {request.param}")
    flags = [flag for flag in native_decode.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(native_decode, "FLAGS", (*flags, f"-march={request.param}"))
    native_decode.native_library.cache_clear()
    yield
    native_decode.native_library.cache_clear()


@needs_native
def test_older_processors_get_the_same_logits(older_instructions):
    for dtype in (torch.float32, torch.bfloat16):
        for int8 in (False, True):
            test_a_sequence_gets_the_same_bits_alone_and_among_others(dtype, int8)
    for int8 in (False, True):
        test_a_native_step_gives_the_logits_of_the_plain_one(LookupGPT, 1, int8)
    test_bfloat16_differs_by_its_rounding_alone(GPT)


@needs_native
def test_a_library_that_is_cut_or_of_another_processor_is_compiled_again(monkeypatch, tmp_path):
    whole = Path(native_decode.native_library()._name).read_bytes()
    compiled = []

    def compile_again(command, **options):
        compiled.append(command)
        Path(command[-1]).write_bytes(whole)
        return subprocess.CompletedProcess(command, 0, "", "")

    def library():
        native_decode.native_library.cache_clear()
        return Path(native_decode.native_library()._name)

    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        patch.setattr(subprocess, "run", compile_again)
        path = library()
        assert library() == path and len(compiled) == 1
        path.unlink()
        path.write_bytes(whole[:len(whole) // 2])
        assert library() == path and path.read_bytes() == whole and len(compiled) == 2
        processors = itertools.product(("flags", "Features", "CPU part"), ("sse2", "sve"))
        for name, value in processors:
            line = f"{name} : {value}\n\n"
            patch.setattr(native_decode, "text_of", lambda path, line=line: line)
            library()
        assert len(compiled) == 2 + 6
    native_decode.native_library.cache_clear()


@needs_native
def test_a_slot_with_nan_spoils_its_own_logits_alone():
    model = make_model()
    with torch.inference_mode():
        use_fast_linear(model, native=True)
        kv_cache = filled_cache(model)
        kv_cache.layers[0].v[4] = torch.nan
        decode = NativeDecode(model, kv_cache)
        decode.warm_up()
        is_finite = decode([1] * SLOTS, ALL).isfinite().all(1).tolist()
    assert is_finite == [slot != 4 for slot in ALL]


class OtherMLP(MLP):
    def forward(self, x):
        return -super().forward(x)


class OtherBlock(Block):
    mlp_class = OtherMLP


class OtherGPT(GPT):
    block_class = OtherBlock


@pytest.mark.parametrize("model", [
    make_model(OtherGPT),
    make_model(DeepSeekGPT, **LATENT),
    make_model(MLAGPT, q_rank=32, **LATENT),
    make_model(MLAGPT, **{**LATENT, "kv_rank": 24}),
    make_model(PortableGPT, mlp_width=72),
    GPT(GPTConfig(1, 64, 4, 4, VOCAB_SIZE, CONTEXT)),   # heads of 16 dimensions
])
def test_what_the_function_does_not_compute_is_left_to_torch(model):
    assert not can_decode_natively(model)


class Tokenizer:
    """What the engine asks of one that never writes a special token."""

    def encode_special(self, name):
        return -1

    def get_vocab_size(self):
        return VOCAB_SIZE


@needs_native
def test_the_engine_gives_the_same_tokens_before_and_after_it_is_compiled():
    prompts = [[5, 6, 7, 8, 9], [1, 2], [3, 3, 3, 3]]
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "seed": 3}
    wanted = Engine(make_model(), Tokenizer(), max_slots=3).generate_batch(prompts, **options)
    engine = serving_engine(make_model(), Tokenizer(), max_slots=3, wait=True)
    assert isinstance(engine.compiled_decode, NativeDecode)
    assert engine.generate_batch(prompts, **options) == wanted


@needs_native
def test_where_the_compiler_fails_one_line_says_so_and_the_engine_answers(monkeypatch, capsys):
    def fail(*command, **options):
        return subprocess.CompletedProcess(command, 1, "", "x.cpp:1: error: no room\nmore")

    model = make_model()
    use_fast_linear(model, native=True)
    native_decode.native_library.cache_clear()
    monkeypatch.setattr(native_decode, "SOURCE", native_decode.SOURCE.with_name("kv_cache.py"))
    monkeypatch.setattr(subprocess, "run", fail)
    decode = NativeDecode(model, model.new_kv_cache(1, CONTEXT))
    decode.warm_up_behind().join()
    native_decode.native_library.cache_clear()
    assert not decode.is_ready(1)
    assert "stays uncompiled, which is slower (x.cpp:1: error: no room)" in capsys.readouterr().out
