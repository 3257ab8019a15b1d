"""The benchmark of the engine, with small models and an engine that prefills one prompt a step, and
that of the server, against our own and one that is started as a process."""
import sys

import pytest
import torch
from chat_fakes import FakeEngine, serve
from checkpoint_cases import folder, meta, save, tokenizer  # noqa: F401
from stream_fakes import Reply, play, vllm

from conftest import ROOT, last_json
from nanochat import benchmark as shared
from nanochat.common import UserError
from nanochat.configurator import configure
from nanochat.gpt import GPT, GPTConfig
from nanochat.variants import CAUSAL, TRAINABLE
from scripts import infer_benchmark

DEFAULTS = {
    name: value
    for name, value in vars(infer_benchmark).items()
    if name.islower() and (value is None or isinstance(value, (int, float, str)))
}
SMALL = ("--depth=1", "--vocab_size=300", "--tokens=3", "--compile=0")


@pytest.fixture
def benchmark(capsys, base_dir, monkeypatch):
    """benchmark("--batches=1", ...) -> (what it printed, its JSON record)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets its own
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(infer_benchmark, "measure_read_bandwidth", lambda device: 1e10)

    def run(*words):
        for name, value in DEFAULTS.items():
            monkeypatch.setattr(infer_benchmark, name, value)
        infer_benchmark.main(configure(vars(infer_benchmark), list(words)))
        out = capsys.readouterr().out
        assert last_json((base_dir / "metrics.jsonl").read_text(encoding="utf-8")) == last_json(out)
        return out, last_json(out)

    return run


# --------------------------------------------------------------------------------------------------
# the engine


@pytest.mark.parametrize("model", [name for name in TRAINABLE if name in CAUSAL])
def test_the_engine_is_measured_at_each_batch_size_and_context(benchmark, model):
    out, record = benchmark(*SMALL, f"--model={model}", "--batches=1,3", "--contexts=8,20")
    rows = record["rows"]
    sizes = [(row["batch"], row["context"]) for row in rows]
    assert sizes == [(1, 8), (1, 20), (3, 8), (3, 20)]
    for row in rows:
        assert 0 < row["ttft"] <= row["ttft_worst"]
        assert row["tokens_per_second"] == row["batch"] / row["step_seconds"]
        assert row["share_of_bandwidth"] == pytest.approx(
            row["bytes_per_step"] / row["step_seconds"] / record["bytes_per_second"])
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 2 + 4


def test_the_bytes_of_a_step_are_those_of_the_matrices_and_of_the_caches():
    model = GPT(GPTConfig.from_depth(2, vocab_size=256, max_seq_len=64))
    model.init_weights()
    model.cast_for_inference(torch.bfloat16)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert len(matrices) == 2 * 6 + 1      # of each block, and the head
    cached = model.new_kv_cache(3, 40).nbytes
    elements = sum(p.numel() for p in matrices)
    assert model.matmul_parameters() == elements
    read = infer_benchmark.matrix_bytes_of(model, 3, elements)
    assert read == 2 * elements
    assert infer_benchmark.bytes_per_step(model, 3, 40, read) == read + cached


class OneAtATime:
    """An engine that prefills one prompt a step, and decodes the others in the same step, as
    chunked prefill does. wait: how many steps pass before each prompt's first token."""

    max_seq_len = 100

    def __init__(self):
        self.waiting, self.running, self.steps = [], [], 0

    def new_sequence(self, prompt, max_new_tokens, temperature=1.0):
        sequence = type("Sequence", (), {})()
        sequence.prompt, sequence.tokens = prompt, []
        sequence.limit, sequence.finish_reason = max_new_tokens, None
        return sequence

    def admit(self, sequence):
        self.waiting.append(sequence)

    def retire(self, sequence):
        self.running = [other for other in self.running if other is not sequence]
        self.waiting = [other for other in self.waiting if other is not sequence]

    def step(self):
        self.steps += 1
        self.running += [self.waiting.pop(0)] if self.waiting else []
        found = list(self.running)
        for sequence in found:
            sequence.tokens.append(7)
            if len(sequence.tokens) == sequence.limit:
                sequence.finish_reason = "length"
                self.retire(sequence)
        return found


def test_decode_steps_count_only_where_all_sequences_are_past_their_prompts():
    engine = OneAtATime()
    first = infer_benchmark.run_to_first_tokens(engine, [[1]] * 5)
    assert len(first) == 5 == engine.steps and first == sorted(first)
    assert not engine.running and not engine.waiting

    seconds = infer_benchmark.run_decode_steps(engine, [[1]] * 5, 6)
    assert len(seconds) == 6 and engine.steps == 5 + 5 + 6
    assert not engine.running and not engine.waiting


def test_sequences_that_never_run_together_are_no_measurement():
    engine = OneAtATime()
    engine.max_seq_len = 3     # the first sequence ends before the last has begun
    assert infer_benchmark.run_decode_steps(engine, [[1]] * 5, 6) == []


def test_what_does_not_fit_is_said_and_the_rest_is_measured(benchmark, monkeypatch):
    measure = infer_benchmark.measure_engine

    def without_memory(engine, batch, context):
        if batch == 2:
            raise MemoryError
        return measure(engine, batch, context)

    monkeypatch.setattr(infer_benchmark, "measure_engine", without_memory)
    out, record = benchmark(*SMALL, "--batches=1,2", "--contexts=8")
    assert record["rows"][1]["failed"] == "out of memory" and "| 2 | 8 | out of memory |" in out
    assert "tokens_per_second" in record["rows"][0]
    with pytest.raises(UserError, match="--batches or --contexts"):
        benchmark(*SMALL, "--batches=2", "--contexts=8")


def test_a_cache_that_cannot_be_allocated_leaves_the_other_batch_sizes(benchmark, monkeypatch):
    make = infer_benchmark.make_engine

    def without_memory(network, slots):
        if slots == 2:
            raise MemoryError
        return make(network, slots)

    monkeypatch.setattr(infer_benchmark, "make_engine", without_memory)
    _, record = benchmark(*SMALL, "--batches=2,1", "--contexts=8,9")
    failed = [row.get("failed") for row in record["rows"]]
    assert failed == ["out of memory", "out of memory", None, None]


def test_a_cache_larger_than_the_free_memory_is_not_allocated(benchmark, monkeypatch):
    free = iter([1000, None])
    monkeypatch.setattr(infer_benchmark, "free_memory", lambda device: next(free))
    _, record = benchmark(*SMALL, "--batches=2,1", "--contexts=8")
    assert [row.get("failed") for row in record["rows"]] == ["out of memory", None]


def test_a_machine_without_a_compiler_is_told_how_to_measure(benchmark, monkeypatch):
    monkeypatch.setattr(infer_benchmark, "can_multiply_fast", lambda device: True)
    monkeypatch.setattr(infer_benchmark, "compile_problem", lambda device: "no C++ compiler")
    monkeypatch.setattr(infer_benchmark, "native_problem", lambda: "no C++ compiler")
    with pytest.raises(UserError, match=r"\(no C\+\+ compiler\): --compile=0"):
        benchmark("--depth=1")


def test_a_trained_model_is_measured_as_far_as_its_context_goes(
    benchmark, folder, meta  # noqa: F811
):
    save(folder, 7, meta)
    out, record = benchmark("--source=base", "--batches=1", "--contexts=16,30", "--tokens=4")
    assert record["model"] == "base d1" and "step_seconds" in record["rows"][0]
    assert "| 1 | 30 | the model's context is 32 tokens |" in out


def test_the_bandwidth_is_that_of_the_fastest_reduction(monkeypatch):
    monkeypatch.setattr(shared, "READ_BYTES", 2**20)
    assert 0 < shared.measure_read_bandwidth(torch.device("cpu"), 0.03) < 1e15
    seconds = iter([4.0, 1.0, 2.0])
    monkeypatch.setattr(
        shared, "measure_calls", lambda *_: shared.Times(next(seconds), 0.0, []))
    assert shared.measure_read_bandwidth(torch.device("cpu")) == 2**20


# --------------------------------------------------------------------------------------------------
# the server


def test_our_own_server_is_measured_under_load(benchmark):
    engine = FakeEngine()
    with serve(engine) as address:
        out, record = benchmark(
            f"--url={address}", "--concurrency=1,3", "--input=64", "--output=5", "--rounds=2")
    assert [(row["requests"], row["errors"]) for row in record["rows"]] == [(2, {}), (6, {})]
    for row in record["rows"]:
        assert row["tokens_per_second"] > 0 and row["output_tokens"] == 5
        assert 0 < row["health"] <= row["health_worst"] and row["health_failures"] == 0
        assert row["memory_before"] is None and row["memory_after"] is None
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [11] * 4 and " | 0 of 6 | " in table[3]


def test_requests_are_sent_for_the_minutes_asked_for(benchmark):
    with play(vllm("a", "b", usage=(9, 2))) as server:
        _, record = benchmark(
            f"--url={server.address}", "--concurrency=2", "--minutes=0.01", "--rounds=1")
        assert record["rows"][0]["requests"] == len(server.asked) - 2 > 2 * 1


def test_a_health_check_that_fails_is_said(benchmark):
    with play(vllm("a", "b", usage=(9, 2))) as server:      # which has no /health
        out, record = benchmark(f"--url={server.address}", "--concurrency=1", "--rounds=1")
    assert record["rows"][0]["health_failures"] >= 1 and "/health did not answer" in out


STAND_IN = """
import sys, time
sys.path.insert(0, "tests")
from stream_fakes import play, vllm
with play(vllm("a", "b", usage=(9, 2)), port=int(sys.argv[1])):
    time.sleep(600)
"""


def test_a_server_is_started_measured_and_ended(benchmark, monkeypatch):
    processes = []
    popen = infer_benchmark.subprocess.Popen

    def started(*words, **options):
        processes.append(popen(*words, **options))
        return processes[-1]

    monkeypatch.setattr(infer_benchmark.subprocess, "Popen", started)
    monkeypatch.setattr(
        infer_benchmark, "server_command", lambda port: [sys.executable, "-c", STAND_IN, str(port)])
    out, record = benchmark("--server", "--concurrency=1", "--rounds=2")
    row = record["rows"][0]
    assert row["requests"] == 2 and row["memory_before"] > 10e6 and row["memory_after"] > 10e6
    assert row["memory_middle"] > 10e6 and row["health_over_100_ms"] <= row["health_requests"]
    assert " MB |" in out and processes[0].poll() is not None


def test_a_server_that_cannot_start_is_said_with_its_own_reason(run_module, tmp_path):
    done = run_module("scripts.infer_benchmark", "--server", base=tmp_path)
    reason, ours = done.stderr.splitlines()
    assert done.returncode == 2 and "sft" in reason and "ended with status 2" in ours


def test_the_server_gets_the_settings_that_it_shares(monkeypatch):
    monkeypatch.setattr(infer_benchmark, "model_tag", "d4")
    monkeypatch.setattr(infer_benchmark, "dtype", "float32")
    _, *words = infer_benchmark.server_command(8123)
    settings = ["--port=8123", "--source=sft", "--model_tag=d4", "--dtype=float32"]
    assert words == ["-m", "scripts.chat_web", *settings]
    assert (ROOT / "scripts" / "chat_web.py").exists()


def test_a_server_that_answers_nothing_ends_the_program(benchmark):
    with play(Reply({"error": {"message": "busy"}}, status=503)) as server:
        with pytest.raises(ConnectionError, match="busy"):
            benchmark(f"--url={server.address}")


@pytest.mark.parametrize("words, hint", [
    (["--batches=one"], "1,8,32"),
    (["--contexts=0"], "contexts"),
    (["--contexts=128,9999999"], "1,048,576 tokens at most"),
    (["--concurrency="], "concurrency"),
    (["--depth=0"], "depth"),
    (["--minutes=0"], "minutes"),
    (["--minutes=nan"], "minutes"),
    (["--weights=int3"], "int8"),
    (["--model=rwkv"], "portable"),
    (["--server", "--source=base"], "--source=sft"),
    (["--url=localhost:8000"], "http://"),
    (["--source=king"], "king"),
    (["--source=sft", "--model=mla"], "leave out --model=mla"),
])
def test_bad_input_is_refused(benchmark, words, hint):
    with pytest.raises(UserError, match=hint):
        benchmark(*words)
