"""The captured decode step against model.decode().

Without a GPU, a step is taken again where it would be replayed: what is tested then is everything
but the capture itself.
"""
import pytest
import torch
from models import count_graphs, make_model, steps_of

from nanochat import graph_decode
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.graph_decode import GraphDecode, windows_up_to
from nanochat.variants.deepseek import DeepSeekGPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.mla import MLAGPT
from nanochat.variants.ngrams import NGramGPT
from nanochat.variants.portable import PortableGPT

SLOTS = 5
PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3, 3, 3, 3], [4] * 11, [8]]
TURNS = [[0], [0, 2], [0, 1, 2, 3, 4], [1, 3, 4], [3]]
WINDOW = 8      # in place of 256: the prompts above then need several
CLASSES = [GPT, LookupGPT, MLAGPT, DeepSeekGPT, PortableGPT, NGramGPT]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Repeated:
    """Stands in for a CapturedStep on a CPU."""

    made = 0

    def __init__(self, step, device, memory):
        Repeated.made += 1
        self.step = step
        self.outputs = step()

    def replay(self):
        new = self.step()
        if isinstance(new, torch.Tensor):
            self.outputs.copy_(new)
        else:
            self.outputs = new


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(graph_decode, "SHORTEST_WINDOW", WINDOW)


@pytest.fixture
def repeated(monkeypatch):
    """Captures that a CPU can make."""
    monkeypatch.setattr(graph_decode, "CapturedStep", Repeated)
    monkeypatch.setattr(graph_decode, "Memory", lambda device: None)
    monkeypatch.setattr(Repeated, "made", 0)


def filled_cache(model):
    """A cache with a prompt in each slot."""
    kv_cache = model.new_kv_cache(SLOTS, model.config.max_seq_len)
    fill(kv_cache, model)
    return kv_cache


def fill(kv_cache, model):
    """Read a prompt into each slot."""
    for slot, prompt in enumerate(PROMPTS):
        idx = torch.tensor([prompt], device=model.device)
        model.prefill(idx, kv_cache, [slot], [len(prompt)])
        kv_cache.advance([slot], [len(prompt)])


def plain_steps(model):
    """steps_of() model.decode()."""
    kv_cache = filled_cache(model)

    def decode(tokens, slots):
        return model.decode(torch.tensor(tokens, device=model.device)[:, None], kv_cache, slots)

    return steps_of(decode, kv_cache, TURNS)


@torch.inference_mode()
def compare(model, tolerance, compile=False):
    """Assert that captured steps give the logits of model.decode(); the GraphDecode."""
    wanted = plain_steps(model)
    kv_cache = filled_cache(model)
    captured = GraphDecode(model, kv_cache)
    if compile:
        assert captured._problem_of_warming_up() is None
    found = steps_of(captured, kv_cache, TURNS)
    assert captured.problem is None
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    return captured


@pytest.mark.parametrize("model_class", CLASSES)
def test_captured_steps_are_those_of_the_model(repeated, model_class):
    captured = compare(make_model(model_class, depth=2).eval(), 1e-5)
    # of one, four and five sequences; of as many cached tokens as the longest one needs
    assert set(captured.captured) == {(1, 8), (4, 8), (5, 16), (4, 16), (1, 16)}
    assert Repeated.made == 5


@pytest.mark.parametrize("model_class", CLASSES)
def test_all_that_a_server_needs_is_compiled_behind_it(repeated, model_class, monkeypatch):
    """Nothing is compiled in the engine's own thread, where its clients would wait for it."""
    graphs = count_graphs(monkeypatch)
    torch.compiler.reset()
    model = make_model(model_class, depth=2).eval()
    with torch.inference_mode():
        wanted = plain_steps(model)
    captured = GraphDecode(model, model.new_kv_cache(SLOTS, model.config.max_seq_len))
    assert captured._problem_of_warming_up() is None
    compiled = len(graphs)
    with torch.inference_mode():
        fill(captured.kv_cache, model)
        found = steps_of(captured, captured.kv_cache, TURNS)
    torch.compiler.reset()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert captured.compiled is not None and captured.problem is None
    assert len(graphs) == compiled > 0


def test_nothing_is_captured_beside_the_compiler(repeated):
    model = make_model(GPT, depth=1).eval()
    with torch.inference_mode():
        kv_cache = filled_cache(model)
        captured = GraphDecode(model, kv_cache)
        before = captured([5], [0])
        captured.is_compiling = True
        torch.testing.assert_close(captured([5], [0]), before)
        captured([5, 6], [0, 1])
        assert Repeated.made == 1, "a graph that is there is replayed, and no other is made"
        captured.is_compiling = False
        captured([5, 6], [0, 1])
    assert Repeated.made == 2


def test_a_benchmark_is_told_that_compiled_blocks_cannot_be_captured(repeated, monkeypatch):
    class OfPlainSteps(Repeated):
        def __init__(self, step, device, memory):
            if step.args[0] is not None:
                raise RuntimeError("not while capturing")
            super().__init__(step, device, memory)

    monkeypatch.setattr(graph_decode, "CapturedStep", OfPlainSteps)
    model = make_model(GPT, depth=1).eval()
    captured = GraphDecode(model, model.new_kv_cache(1, 8))

    def warm_up():
        captured.compiled = graph_decode.block_step

    monkeypatch.setattr(captured, "_problem_of_compiling", warm_up)
    with pytest.raises(RuntimeError, match="compiled decode step cannot be captured"):
        captured.warm_up(1)


def test_graphs_are_captured_again_once_the_blocks_are_compiled(repeated):
    with torch.inference_mode():
        model = make_model(GPT, depth=1).eval()
        kv_cache = filled_cache(model)
        captured = GraphDecode(model, kv_cache)
        before = captured([5], [0])
        called = []

        def compiled(block, x, cos, sin, layer_cache, slots, positions, keys, more):
            called.append(keys.size(0))
            return graph_decode.block_step(
                block, x, cos, sin, layer_cache, slots, positions, keys, more)

        captured.compiled = compiled
        torch.testing.assert_close(captured([5], [0]), before)
    assert called and Repeated.made == 2 and len(captured.captured) == 1


def test_where_nothing_can_be_captured_one_line_says_so(capsys, monkeypatch):
    def fail(step, device, memory):
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    monkeypatch.setattr(graph_decode, "CapturedStep", fail)
    monkeypatch.setattr(graph_decode, "Memory", lambda device: None)
    model = make_model(GPT, depth=1).eval()
    with torch.inference_mode():
        wanted = plain_steps(model)
        kv_cache = filled_cache(model)
        captured = GraphDecode(model, kv_cache)
        torch.testing.assert_close(steps_of(captured, kv_cache, TURNS), wanted)
    assert not captured.is_ready(1)
    out = capsys.readouterr().out
    assert out.count("the decode step cannot be captured as a CUDA graph") == 1
    assert "(operation not permitted when stream is capturing)" in out


def test_compiled_blocks_that_cannot_be_captured_are_left_for_those_as_written(
    repeated, capsys, monkeypatch
):
    class OfPlainSteps(Repeated):
        def __init__(self, step, device, memory):
            is_compiled = step.args[0] is not None
            if is_compiled:
                try:
                    raise RuntimeError("not while capturing")
                except RuntimeError:
                    raise RuntimeError("failed due to a previous error")
            super().__init__(step, device, memory)

    monkeypatch.setattr(graph_decode, "CapturedStep", OfPlainSteps)
    model = make_model(GPT, depth=1).eval()
    with torch.inference_mode():
        wanted = plain_steps(model)
        kv_cache = filled_cache(model)
        captured = GraphDecode(model, kv_cache)
        captured.compiled = graph_decode.block_step
        torch.testing.assert_close(steps_of(captured, kv_cache, TURNS), wanted)
    assert captured.is_ready(1) and captured.captured and captured.compiled is None
    out = capsys.readouterr().out
    assert out.count("the compiled decode step cannot be captured") == 1
    assert "(not while capturing)" in out


class Tokenizer:
    """Nothing ends an answer but its length."""

    def encode_special(self, name):
        return -1

    def get_vocab_size(self):
        return 97


def test_the_engine_gives_the_same_tokens_by_captured_steps(repeated):
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "seed": 3}
    model = make_model(GPT, depth=1).eval()
    wanted = Engine(model, Tokenizer(), max_slots=SLOTS).generate_batch(PROMPTS, **options)
    engine = Engine(model, Tokenizer(), max_slots=SLOTS)
    engine.compiled_decode = GraphDecode(model, engine.kv_cache)
    assert engine.generate_batch(PROMPTS, **options) == wanted
    assert Repeated.made > 1


def test_windows_end_with_the_length_of_the_cache():
    assert windows_up_to(6) == [6]
    assert windows_up_to(8) == [8]
    assert windows_up_to(40) == [8, 16, 32, 40]


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("model_class", CLASSES)
def test_steps_are_captured_on_a_gpu(model_class, compile):
    torch.manual_seed(0)
    model = make_model(model_class, depth=2).cuda().eval()
    model.build_rotary()
    if model_class is DeepSeekGPT:  # its experts need to know their numbers of tokens in float32
        model.cast_for_inference(torch.bfloat16)
    tolerance = 1e-3 if model.compute_dtype == torch.float32 else 5e-2
    captured = compare(model, tolerance, compile)
    assert len(captured.captured) == 5


@needs_gpu
def test_a_server_engine_compiles_behind_its_answers():
    options = {"max_new_tokens": 12, "temperature": 0}
    model = make_model(GPT, depth=2).cuda().eval()
    model.build_rotary()
    plain = Engine(model, Tokenizer(), max_slots=SLOTS)
    plain.compiled_decode = None
    wanted = plain.generate_batch(PROMPTS, **options)
    engine = Engine(model, Tokenizer(), max_slots=SLOTS)
    early = engine.generate_batch(PROMPTS, **options)
    engine.compiled_decode.warm_up_behind().join()
    assert engine.compiled_decode.compiled is not None
    assert engine.generate_batch(PROMPTS, **options) == early == wanted
