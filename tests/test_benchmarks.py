"""The training benchmarks: their tables, what they count, what they refuse, and small real runs."""
import ast
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, last_json
from nanochat import benchmark
from nanochat.benchmark import (
    LARGE,
    SIZES,
    VOCAB_SIZE,
    Setup,
    attempt,
    case_of_file,
    case_of_size,
    cgroup_room,
    check_loss,
    chosen_sizes,
    does_not_fit,
    efficiency,
    fitting_micro_batch,
    measure_calls,
    peak_bandwidth,
    peak_of,
    percent,
    planned_memory,
    rank_counts,
    share_of,
    summarize,
    tera,
    throughput,
    without_communication,
)
from nanochat.common import Compute, UserError
from nanochat.configurator import configure
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import available_cpus
from nanochat.memory import MEMORY_SHARE, build_on_meta, communication

SCRIPTS = ("simple_train_benchmark", "transformer_benchmark", "multigpu_benchmark")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
MI350X_PEAK = 2307  # TFLOPS in fp16 and bf16

# --------------------------------------------------------------------------------------------------
# the sizes


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_documented_number_of_parameters(name):
    """With embedding and head as one matrix, which is also what a token is multiplied with."""
    model = build_on_meta(GPT, case_of_size(name).config)
    size = SIZES[name]
    assert abs(model.matmul_parameters() / size.documented - 1) < 0.01
    assert model.matmul_parameters() == 12 * size.depth * size.width**2 + VOCAB_SIZE * size.width
    untied = sum(p.numel() for p in model.parameters())
    padded = model.vocab_size_padded
    assert untied == 12 * size.depth * size.width**2 + 2 * padded * size.width


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_a_shape_that_kernels_like(name):
    size = SIZES[name]
    assert size.width / size.heads in (64, 128) and size.width % 128 == 0


def test_the_sizes_and_their_batches_are_the_documented_ones():
    assert list(SIZES) == ["small", "medium", "large", "xl", "1.5b", "3b", "7b", "13b"]
    batches = {name: (SIZES[name].batch_size, SIZES[name].seq_len) for name in SIZES}
    assert [batches[name] for name in LARGE] == [(4, 512), (2, 512), (8, 1024), (4, 1024)]
    assert {batches[name] for name in SIZES if name not in LARGE} == {(8, 1024)}
    case = case_of_size("7b", 2, 64)
    assert (case.batch_size, case.config.max_seq_len) == (2, 64)


SMALL = ["small", "medium", "large", "xl"]


@pytest.mark.parametrize("model, full, large_models, names", [
    ("", False, False, SMALL),
    ("", True, False, SMALL),
    ("", False, True, list(LARGE)),
    ("", True, True, SMALL + list(LARGE)),
    ("7b", False, False, ["7b"]),
])
def test_the_bare_command_and_full_mean_the_small_sizes(model, full, large_models, names):
    assert chosen_sizes(model, full, large_models) == names


@pytest.mark.parametrize("words, what", [
    (("8b", False, False), "choose from small, medium"),
    (("7b", True, False), "leave one of them out"),
    (("7b", False, True), "leave one of them out"),
])
def test_a_size_that_does_not_exist_or_stands_beside_full_is_refused(words, what):
    with pytest.raises(UserError, match=what):
        chosen_sizes(*words)


# --------------------------------------------------------------------------------------------------
# the shape of a config file

def write(tmp_path, text):
    path = tmp_path / "shape.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_file_of_a_training_run_gives_the_shape(tmp_path, capsys):
    path = write(tmp_path, "depth = 3\nkv_heads = None\nminutes = 2.0\ndevice_batch_size = 5\n"
                 "max_seq_len = 48\nmodel = 'portable'\n")
    case = case_of_file(path)
    assert (case.name, case.model_class, case.batch_size) == ("shape", "portable", 5)
    assert (case.config.depth, case.config.width, case.config.max_seq_len) == (3, 192, 48)
    assert "not used here: minutes" in capsys.readouterr().out
    case = case_of_file(path, batch_size=7, seq_len=16)
    assert (case.batch_size, case.config.max_seq_len) == (7, 16)


def test_a_config_file_may_name_every_field_of_the_model(tmp_path):
    path = write(tmp_path, "depth = 28\nwidth = 640\nheads = 10\nkv_heads = 5\nvocab_size = 999\n")
    case = case_of_file(path)
    wanted = GPTConfig(28, 640, 10, 5, 999, 1024)
    assert (case.config, case.batch_size) == (wanted, 8)
    path = write(tmp_path, "depth = 2\nwidth = 96\nheads = 3\n")
    assert case_of_file(path).config.kv_heads == 3, "without kv_heads they are the heads"


def test_every_config_file_here_describes_a_shape():
    files = sorted((ROOT / "config").glob("*.py"))
    assert files
    for file in files:
        assert case_of_file(str(file)).config.depth >= 1


@pytest.mark.parametrize("text, what", [
    ("minutes = 3\n", "no depth"),
    ("depth = 0\n", "depth=0"),
    ("depth = 'six'\n", "depth=six"),
    ("depth = 2\nwidth = 100\n", "width=100 without heads"),
    ("depth = 2\nwidth = 100\nheads = 3\n", "width=100, heads=3"),
    ("depth = 2\ndevice_batch_size = 0\n", "device_batch_size=0"),
    ("depth = 2\nmodel = 'mamba'\n", "model=mamba does not exist"),
])
def test_a_config_file_that_describes_no_shape_is_refused(tmp_path, text, what):
    with pytest.raises(UserError, match=what):
        case_of_file(write(tmp_path, text))


def test_a_config_file_that_is_missing_is_refused():
    with pytest.raises(UserError, match="config=nowhere.py does not exist"):
        case_of_file("nowhere.py")


# --------------------------------------------------------------------------------------------------
# the documented flags

def settings_of(script, *words):
    """What the command line of a script sets, without running it."""
    path = ROOT / "scripts" / f"{script}.py"
    namespace = {"__file__": str(path)}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            namespace[node.targets[0].id] = node.value.value
        elif isinstance(node, ast.AnnAssign):
            namespace[node.target.id] = ast.literal_eval(node.value)
    return configure(namespace, list(words))


@pytest.fixture(autouse=True)
def _own_error_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets its own


@pytest.mark.parametrize("words", [
    ["--model", "7b", "--batch-size", "8", "--seq-len", "1024", "--iterations", "3"],
    ["--model=7b", "--batch-size=8", "--seq-len=1024", "--iterations=3"],
    ["--model=7b", "--batch_size=8", "--seq_len", "1024", "--iterations=3"],
])
def test_the_documented_options_are_read_with_blank_and_with_equals(words):
    settings = settings_of("transformer_benchmark", *words)
    wanted = {"model": "7b", "batch_size": 8, "seq_len": 1024, "iterations": 3}
    assert settings | wanted == settings


def test_the_documented_flags_need_no_value():
    settings = settings_of("transformer_benchmark", "--full", "--large-models")
    assert settings["full"] and settings["large_models"]
    settings = settings_of("multigpu_benchmark", "--model", "7b", "--scaling-test")
    assert settings["scaling_test"] and settings["model"] == "7b"
    settings = settings_of(
        "multigpu_benchmark", "--model", "7b", "--gpus", "8", "--batch-size", "8")
    assert (settings["gpus"], settings["batch_size"]) == (8, 8)
    assert settings_of("simple_train_benchmark")["dtypes"].split(",")[2] == "fp16"


# --------------------------------------------------------------------------------------------------
# memory

def on_gpus(ranks):
    return Compute(ranks > 1, 0, 0, ranks, torch.device("cuda"), torch.bfloat16)


def test_the_largest_divisor_of_the_batch_that_fits_is_taken():
    case, setup, one = case_of_size("medium", 12, 128), Setup(), on_gpus(1)
    whole = planned_memory(case, 12, setup, one).total
    half = planned_memory(case, 6, setup, one).total
    assert half < whole
    assert fitting_micro_batch(case, None, setup, one)[0] == 12
    assert fitting_micro_batch(case, whole / MEMORY_SHARE + 9, setup, one)[0] == 12
    size, needed = fitting_micro_batch(case, whole / MEMORY_SHARE - 9, setup, one)
    assert size == 6 and needed.total == half
    assert fitting_micro_batch(case, 1e9, setup, one)[0] == 0


def test_what_does_not_fit_is_said_with_the_numbers_of_the_plan():
    case = case_of_size("13b")
    size, needed = fitting_micro_batch(case, 80e9, Setup(), on_gpus(1))
    line = does_not_fit(case, needed, 80e9)
    assert size == 0 and "\n" not in line
    for words in (f"{needed.total / 1e9:.1f} GB", "optimizer", "80.0 GB", "68.0", "--seq-len"):
        assert words in line
    kinds = [float(size) for size in re.findall(r"[a-z] (\d+\.\d\d)", line)]
    assert sum(kinds) == pytest.approx(needed.total / 1e9, abs=0.1), "those at the peak alone"


def test_adamw_for_all_parameters_takes_two_moments_of_each():
    case = case_of_size("small", 1, 64)
    muon = planned_memory(case, 1, Setup("muon"), on_gpus(1))
    adamw = planned_memory(case, 1, Setup("adamw"), on_gpus(1))
    model = build_on_meta(GPT, case.config)
    assert adamw.optimizer == 8 * sum(p.numel() for p in model.parameters()) > muon.optimizer
    assert adamw.update < muon.update, "there are no stacks of matrices"


def test_the_layout_decides_what_the_ranks_share():
    case = case_of_size("small", 1, 64)
    kinds = ("replicated", "zero2", "fsdp")
    plans = [planned_memory(case, 1, Setup("muon", kind), on_gpus(4)) for kind in kinds]
    replicated, zero2, fsdp = plans
    assert zero2.optimizer < 0.3 * replicated.optimizer
    assert fsdp.parameters < 0.3 * zero2.parameters


def test_the_documented_sizes_fit_the_documented_gpu_as_they_were_run():
    """288 GB; the documented runs took 108 and 120 GB of them."""
    for name in LARGE:
        case = case_of_size(name)
        size, needed = fitting_micro_batch(case, 288e9, Setup("adamw"), on_gpus(1))
        assert size == case.batch_size and needed.total < 250e9


def test_a_container_leaves_what_its_limit_and_the_file_cache_leave(tmp_path):
    def room(**files):
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
        return cgroup_room(tmp_path)

    assert room() == math.inf
    assert room(max="max\n", current="700\n", stat="inactive_file 300\n") == math.inf
    assert room(max="1000\n", stat="anon 400\ninactive_file 300\n") == 600


def test_only_running_out_of_memory_is_forgiven():
    def fail(error):
        raise error

    assert attempt(max, 1, 2) == (2, False)
    assert attempt(fail, RuntimeError("CUDA out of memory. Tried to allocate")) == (None, True)
    assert attempt(fail, MemoryError()) == (None, True)
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(fail, RuntimeError("shapes differ"))


# --------------------------------------------------------------------------------------------------
# peaks. docs/traps.md: wrong-throughput

@pytest.mark.parametrize("name, dtype, peak", [
    ("AMD Instinct MI350X", "fp16", 2307e12),
    ("AMD Instinct MI350X", "bfloat16", 2307e12),
    ("AMD Instinct MI350X", "fp8", 4614e12),
    ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
    ("NVIDIA H100 80GB HBM3", "fp32", None),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("NVIDIA A100-SXM4-80GB", "fp8", None),
    ("AMD EPYC 7B13", "float32", None),
    ("NVIDIA Unheard-of 9000", "bf16", None),
])
def test_a_peak_is_that_of_the_device_and_dtype_or_unknown(name, dtype, peak):
    assert peak_of(name, dtype) == peak


def test_a_share_of_an_unknown_peak_is_unknown():
    assert percent(share_of(1e12, peak_of("AMD EPYC", "float32"))) == "unknown"
    assert percent(share_of(1022e12, peak_of("AMD Instinct MI350X", "fp16"))) == "44 %"
    assert peak_bandwidth("AMD EPYC") is None and peak_bandwidth("NVIDIA H100 PCIe") == 2e12


# --------------------------------------------------------------------------------------------------
# rates

def test_a_rate_counts_all_tokens_and_attention_as_half_of_the_square():
    model = build_on_meta(GPT, GPTConfig(2, 64, 1, 1, 128, 32))
    rates = throughput(model, 3 * 32, 0.5)
    weights = 12 * 2 * 64**2 + 128 * 64
    assert rates.tokens_per_second == 192.0
    assert rates.flops_of_weights == 192 * 6 * weights
    attention = 6 * 2 * 64 * 32  # causal, of one token
    assert rates.flops_with_attention == 192 * (6 * weights + attention)
    assert rates.flops_with_square_attention == 192 * (6 * weights + 2 * attention)


def test_times_are_the_median_and_the_interquartile_range():
    assert summarize([2.0]) == (2.0, 0.0, [2.0])
    assert summarize([1.0, 2.0, 3.0, 4.0, 100.0])[:2] == (3.0, 2 / 3)
    assert summarize([5.0, 1.0])[:2] == (3.0, 2 / 3)


def test_a_call_is_warmed_up_and_many_of_a_short_one_are_one_sample(monkeypatch):
    clock = [0.0]
    calls = []

    def call():
        calls.append(clock[0])
        clock[0] += 1.0 if len(calls) == 1 else 2**-10  # the first one compiles

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    times = measure_calls(call, torch.device("cpu"), 0.2)
    assert times.median == 2**-10 and times.spread == 0.0
    assert len(calls) - 2 == 21 * len(times.all), "20 ms are 20.5 calls"
    assert len(times.all) >= benchmark.MIN_SAMPLES


@pytest.mark.parametrize("rate, text", [
    (1.0223e15, "1,022"),
    (171.81e12, "171.8"),
    (6e10, "0.060"),
])
def test_a_rate_is_readable_on_a_gpu_and_on_a_cpu(rate, text):
    assert tera(rate) == text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonsense_has_no_speed(loss):
    check_loss(3.0)
    with pytest.raises(RuntimeError, match="means nothing"):
        check_loss(loss)


# --------------------------------------------------------------------------------------------------
# ranks

@pytest.mark.parametrize("gpus, scaling, available, counts", [
    (None, False, 8, [8]),
    (4, False, 8, [4]),
    (None, True, 8, [1, 2, 4, 8]),
    (None, True, 6, [1, 2, 4, 6]),
    (2, True, 8, [1, 2]),
    (1, True, 8, [1]),
])
def test_a_scaling_test_has_one_two_four_and_eight_ranks(gpus, scaling, available, counts):
    assert rank_counts(gpus, scaling, available) == counts


def test_more_gpus_than_there_are_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="gpus=8.*has 2 GPUs.*--gpus=2"):
        rank_counts(8, False, 2)


def test_efficiency_is_the_share_of_so_many_single_ranks():
    assert efficiency(300.0, 4, 100.0) == 0.75
    assert efficiency(300.0, 4, None) is None


def test_collectives_are_skipped_and_counted_and_work_again_afterwards():
    before = {name: getattr(dist, name) for name in ("all_reduce", "reduce_scatter_tensor")}
    whole, shard = torch.arange(6.0), torch.zeros(2)
    gathered = torch.arange(6.0)
    with without_communication() as skipped:
        assert dist.all_reduce(whole) is None
        work = dist.reduce_scatter_tensor(shard, whole, async_op=True)
        work.wait()
        dist.all_gather_into_tensor(gathered, gathered[2:4], async_op=True).wait()
    assert whole.tolist() == [0, 1, 2, 3, 4, 5] and shard.tolist() == [0, 1]
    assert gathered.tolist() == [0, 1, 2, 3, 4, 5], "in place there is nothing to copy"
    assert (skipped.collectives, skipped.bytes) == (3, 3 * 6 * 4)
    assert {name: getattr(dist, name) for name in before} == before


def test_collectives_work_again_after_an_error():
    before = dist.all_reduce
    with pytest.raises(KeyError), without_communication():
        raise KeyError
    assert dist.all_reduce is before


# --------------------------------------------------------------------------------------------------
# small real runs

TINY_SHAPE = "depth = 2\nvocab_size = 300\nmax_seq_len = 16\ndevice_batch_size = 4\n"
QUICK_STEPS = ("--iterations=2", "--warmup=1", "--compile=0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file of a model that trains in milliseconds."""
    path = tmp_path_factory.mktemp("shape") / "tiny.py"
    path.write_text(TINY_SHAPE, encoding="utf-8")
    return path


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_transformer_benchmark_measures_a_shape(stages, tiny, optimizer):
    out, _ = stages.fork("scripts.transformer_benchmark", f"--config={tiny}", *QUICK_STEPS,
                         f"--optimizer={optimizer}", "--dtype=float32")
    record = last_json(out)
    [row] = record["rows"]
    assert record["stage"] == "transformer_benchmark" and record["dtype"] == "float32"
    assert len(row["step_seconds"]) == 2 and row["micro_batch_size"] == row["batch_size"] == 4
    assert abs(row["loss"] - math.log(300)) < 1
    seconds = sum(row["step_seconds"]) / 2
    assert math.isclose(row["tokens_per_second"], 64 / seconds)
    assert math.isclose(row["flops_of_weights"], 6 * row["parameters"] * row["tokens_per_second"])
    assert row["share_of_peak"] is None and "| unknown |" in out
    assert row["memory_bytes"] > row["planned_bytes"] > 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and {line.count("|") for line in table} == {12}


@pytest.mark.parametrize("model", ["lookup", "portable"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_transformer_benchmark_measures_variants(stages, tmp_path, model, optimizer):
    path = write(tmp_path, TINY_SHAPE + f"model = '{model}'\n")
    record = stages.fork_record("scripts.transformer_benchmark", f"--config={path}", *QUICK_STEPS,
                                f"--optimizer={optimizer}")
    [row] = record["rows"]
    assert row["class"] == model and abs(row["loss"] - math.log(300)) < 1


def test_a_size_that_runs_out_of_memory_or_does_not_fit_does_not_end_the_others(stages):
    record = stages.fork_record("tests.small_sizes", *QUICK_STEPS)
    small, medium, large, xl = record["rows"]
    assert small["tokens_per_second"] > 0 and large["tokens_per_second"] > 0
    assert "ran out of memory" in medium["failed"] and "--batch-size" in medium["failed"]
    assert "does not fit" in xl["skipped"]


@pytest.mark.parametrize("model, status, what", [
    ("xl", 2, "xl does not fit"),
    ("medium", 1, "medium ran out of memory"),
])
def test_a_single_size_without_a_speed_is_one_line(stages, model, status, what):
    out, err = stages.fork("tests.small_sizes", *QUICK_STEPS, f"--model={model}", status=status)
    assert err.count("\n") == 1 and err.startswith(f"error: {what}")
    assert "|" not in out


def test_simple_train_benchmark_measures_products_copying_and_training(stages):
    record = stages.fork_record(
        "scripts.simple_train_benchmark",
        "--dtypes=fp32,tf32,bf16,fp8",
        "--sizes=32,16",
        "--seconds=0",
        "--copy-megabytes=1",
        "--mlp-layers=1",
        "--mlp-width=16",
        "--batch-size=4",
        *QUICK_STEPS,
    )
    rows = record["rows"]
    products = [row for row in rows if row["what"] == "matmul"]
    sizes = [(row["dtype"], row["size"]) for row in products if "size" in row]
    assert sizes == [("fp32", 16), ("fp32", 32), ("bf16", 16), ("bf16", 32)]
    for row in products:
        if "size" not in row:
            assert row["dtype"] in ("tf32", "fp8") and row["skipped"]
            continue
        assert math.isclose(row["flops_per_second"], 2 * row["size"]**3 / row["seconds"])
        assert row["share_of_peak"] is None
    best = max(row["flops_per_second"] for row in products if row["dtype"] == "fp32")
    assert record["matmul_flops_per_second"]["fp32"] == best
    copy, mlp = rows[-2:]
    assert math.isclose(copy["bytes_per_second"], 2e6 / copy["seconds"])
    assert mlp["parameters"] == 8 * 16**2 and len(mlp["step_seconds"]) == 2
    assert math.isclose(mlp["flops_per_second"], 6 * mlp["parameters"] * mlp["rows_per_second"])


@pytest.mark.parametrize("script, word, what", [
    ("transformer_benchmark", "--model=8b", "model=8b"),
    ("transformer_benchmark", "--batch-size=0", "batch_size=0 must be at least 1"),
    ("transformer_benchmark", "--seq-len=-1", "seq_len=-1"),
    ("transformer_benchmark", "--optimizer=sgd", "optimizer=sgd"),
    ("transformer_benchmark", "--fp8=hybrid", "cpu has no FP8"),
    ("transformer_benchmark", "--config=nowhere.py", "nowhere.py"),
    ("simple_train_benchmark", "--dtypes=fp64", "fp64"),
    ("simple_train_benchmark", "--sizes=100", "multiples of 16"),
    ("simple_train_benchmark", "--batch-size=0", "batch_size=0"),
    ("multigpu_benchmark", "--gpus=9999", "gpus=9999"),
    ("multigpu_benchmark", "--gpus=0", "gpus=0"),
    ("multigpu_benchmark", "--parallel=pipeline", "replicated or zero2 or fsdp"),
    ("multigpu_benchmark", "--dtype=float64", "dtype=float64"),
])
def test_bad_input_is_one_line(stages, script, word, what):
    assert what in stages.refusal(f"scripts.{script}", word)


@pytest.fixture(scope="module")
def nothing_installed(tmp_path_factory):
    """The environment of an image in which nothing of ours is installed, and the folder to run
    in."""
    folder = tmp_path_factory.mktemp("image")
    for name in ("rustbpe", "tiktoken", "pyarrow", "requests", "fastapi"):
        text = f"raise ModuleNotFoundError('{name} is not installed')\n"
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder, {
        **os.environ,
        "PYTHONPATH": str(folder),
        "NANOCHAT_BASE_DIR": str(folder / "base"),
        "PYTHONDONTWRITEBYTECODE": "",
    }


def run_file(script, nothing_installed, *words):
    """A script as a plain file, from another folder, where nothing is installed."""
    folder, environment = nothing_installed
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_plain_file_sets_what_torch_reads_before_it_imports_torch(script):
    """As `python -m scripts.NAME` does, by importing the package first."""
    source = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8")
    assert 0 < source.index('importlib.import_module("scripts")') < source.index("\nimport torch")


def test_a_plain_file_needs_no_installation(nothing_installed):
    assert "--mlp_width=None" in run_file("simple_train_benchmark", nothing_installed, "--help")


def test_a_plain_file_measures_without_an_installation(nothing_installed, tiny):
    out = run_file("transformer_benchmark", nothing_installed, f"--config={tiny}", *QUICK_STEPS)
    assert last_json(out)["rows"][0]["tokens_per_second"] > 0


@pytest.mark.skipif(available_cpus() < 2, reason="a scaling test needs two cores")
def test_multigpu_benchmark_measures_its_ranks_and_their_communication(nothing_installed, tiny):
    out = run_file("multigpu_benchmark", nothing_installed, f"--config={tiny}", "--scaling-test",
                   "--gpus=2", "--dtype=float32", *QUICK_STEPS)
    record = last_json(out)
    one, two = record["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["efficiency"] == 1.0
    assert math.isclose(
        two["efficiency"], two["tokens_per_second"] / (2 * one["tokens_per_second"]))
    seconds = sorted(two["step_seconds"])
    assert math.isclose(two["tokens_per_second"], 2 * 4 * 16 / (sum(seconds) / 2))
    # what is handed over; the planner says what a rank sends of it: the other half is its own
    model = build_on_meta(GPT, case_of_file(str(tiny)).config)
    sent = communication(model, 2, "zero2", dtype_bytes=4).total
    loss_and_norm = 2 * 4
    assert two["communicated_bytes"] == 2 * sent + loss_and_norm
    assert one["collectives"] == 0 < two["collectives"]
    assert 0 <= two["exposed_communication"] < 1
    assert two["memory_bytes"] > 0 and two["share_of_peak"] is None


# --------------------------------------------------------------------------------------------------
# the page

def documented_rows():
    """[cells] of the tables of the page that hold documented figures."""
    section = PAGE.partition("## The documented figures")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.M)
    return [line.split(" | ") for line in lines if not line.startswith("--")]


def number(text):
    return float(text.replace(",", "").strip("*").removesuffix("M").removesuffix("B").strip())


def test_the_documented_figures_on_the_page_agree_with_each_other():
    checked = 0
    for cells in documented_rows():
        if cells[0].lower() not in SIZES:
            continue
        name = cells[0].lower()
        params, tokens, tflops, share = cells[1], cells[-4], cells[-3], cells[-2]
        scale = 1e9 if params.endswith("B") else 1e6
        assert abs(number(params) * scale / SIZES[name].documented - 1) < 1e-9
        # TFLOPS are 6 x parameters x tokens/s
        flops = 6 * number(params) * scale * number(tokens)
        assert abs(flops / 1e12 / number(tflops) - 1) < 0.01
        assert share == percent(number(tflops) / MI350X_PEAK)
        checked += 1
    assert checked == len(SIZES)


def test_the_documented_sizes_of_the_page_are_measured_with_their_batches():
    for name in LARGE:
        size = SIZES[name]
        assert f"| {size.batch_size} | {size.seq_len} |" in PAGE


def test_the_page_shows_the_commands_of_the_benchmarks():
    for script in SCRIPTS:
        assert f"/workspace/scripts/{script}.py" in PAGE
    assert "madengine run --tags pyt_train_llama-3.1-8b --live-output --timeout 3600" in PAGE


def test_the_shapes_on_the_page_are_those_of_the_table():
    for name, size in SIZES.items():
        row = re.search(rf"^\| {re.escape(name)} \| (.*)$", PAGE, re.M).group(1)
        cells = [cell.strip() for cell in row.split("|")]
        model = build_on_meta(GPT, case_of_size(name).config)
        untied = sum(p.numel() for p in model.parameters())
        shape = [size.depth, f"{size.width:,}", size.heads, f"{size.batch_size} x {size.seq_len}"]
        counts = [f"{model.matmul_parameters() / 1e6:,.0f} M", f"{untied / 1e6:,.0f} M"]
        assert cells[:6] == [*map(str, shape), *counts], name


def test_the_json_lines_that_the_page_quotes_are_json():
    for line in re.findall(r'^\{"stage".*\}$', PAGE, re.M):
        assert json.loads(line)["stage"] in SCRIPTS
