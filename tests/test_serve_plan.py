"""The computed figures, each beside the one that was documented or follows from the vendor's and
the model's own pages."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT, last_json
from nanochat.hardware import DEVICES, peak_flops
from nanochat.roofline import (
    MODELS,
    active_parameters,
    cache_bytes,
    cache_room,
    decode_rate,
    numbers,
    read_bytes,
    weight_bytes,
)

QWEN, R1 = MODELS["qwen3-32b"], MODELS["deepseek-r1"]
SPARK, MI350X = DEVICES["dgx-spark"], DEVICES["mi350x"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.serve_plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def rows(output):
    """{first cell: the other cells} of all tables in a report."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


def test_shapes_have_the_published_numbers_of_parameters():
    assert QWEN.dense + QWEN.routed + 2 * QWEN.head == pytest.approx(32.8e9, rel=0.002)
    assert QWEN.dense == pytest.approx(31.2e9, rel=0.002)  # "non-embedding"
    assert R1.dense + R1.routed + 2 * R1.head == pytest.approx(671e9, rel=0.001)
    assert active_parameters(R1) == pytest.approx(37e9, rel=0.02)


def test_one_request_on_a_spark_is_8_3_tokens_a_second_in_fp8_and_4_2_in_bf16():
    rates = {dtype: decode_rate(QWEN, SPARK, dtype, 1, 1024) for dtype in QWEN.dtypes}
    assert f"{rates['fp8'][0]:.1f}" == "8.3" and f"{rates['bf16'][0]:.1f}" == "4.2"
    assert rates["fp8"][1] == rates["bf16"][1] == "memory"


def test_32_requests_on_a_spark_are_at_most_211_tokens_a_second():
    assert int(decode_rate(QWEN, SPARK, "fp8", 32, 1024)[0]) == 211


def test_a_step_in_fp8_reads_32_8_gb_and_int4_takes_about_20_gb():
    assert f"{read_bytes(QWEN, 'fp8', 1) / 1e9:.1f}" == "32.8"
    assert 18e9 < weight_bytes(QWEN, "int4") < 20.5e9


def test_a_token_of_qwen_takes_256_kib_and_271360_tokens_66_gib():
    assert cache_bytes(QWEN) == 256 * 1024
    assert int(271_360 * cache_bytes(QWEN) / 2**30) == 66
    row = last_json(
        run("--model=qwen3-32b", "--device=dgx-spark", "--dtype=fp8", "--kv_gib=66.25").stdout
    )["plans"]["fp8"]
    assert row["cache_tokens"] == 271_360 and f"{row['contexts']:.2f}" == "8.48"


def test_a_token_of_r1_takes_70_kb_on_every_gpu_however_many_there_are():
    assert int(cache_bytes(R1) / 1000) == 70 and cache_bytes(R1, devices=8) == cache_bytes(R1)
    assert cache_bytes(QWEN, devices=8) * 8 == cache_bytes(QWEN), (
        "heads are shared out where there are several"
    )


def test_r1_leaves_a_little_more_on_eight_mi350x_than_the_155_gib_that_others_reported():
    """The bound knows nothing of activations and graphs, so that what was reported lies below it,
    by less than a tenth."""
    room = cache_room(R1, MI350X, "fp8", 8, 0.9) / 2**30
    assert 155 < room < 155 * 1.1


def test_a_batch_reads_the_experts_that_any_of_its_requests_chose():
    shared = read_bytes(R1, "fp8", 1) - R1.routed * 8 / 256
    assert read_bytes(R1, "fp8", 2) == pytest.approx(shared + R1.routed * (1 - (248 / 256) ** 2))
    assert read_bytes(R1, "fp8", 10_000) == pytest.approx(shared + R1.routed)
    assert read_bytes(QWEN, "fp8", 1) == read_bytes(QWEN, "fp8", 32)


def test_multiplications_bound_large_batches_where_the_peak_is_known():
    rate, bound = decode_rate(QWEN, DEVICES["h100"], "fp8", 4096, 1)
    assert bound == "FLOP/s" and rate == pytest.approx(1979e12 / (2 * active_parameters(QWEN)))
    assert decode_rate(QWEN, DEVICES["a100"], "fp8", 4096, 1)[0] == pytest.approx(
        312e12 / (2 * active_parameters(QWEN))
    ), "no fp8: in bf16"
    assert decode_rate(QWEN, SPARK, "fp8", 4096, 1)[1] == "memory"


def test_more_devices_and_a_smaller_cache_raise_the_rate():
    one = decode_rate(QWEN, DEVICES["h200"], "bf16", 8, 4096)[0]
    assert decode_rate(QWEN, DEVICES["h200"], "bf16", 8, 4096, devices=2)[0] == pytest.approx(
        2 * one
    )
    assert decode_rate(QWEN, DEVICES["h200"], "bf16", 8, 4096, kv_dtype="fp8")[0] > one


def test_the_report_is_markdown_and_ends_with_json():
    done = run("--model=qwen3-32b", "--device=dgx-spark")
    assert done.returncode == 0 and done.stderr == ""
    tables = rows(done.stdout)
    assert (
        tables["requests"] == ["bf16", "fp8", "int4"]
        and tables["1"][:2] == ["4.2", "8.3"]
        and tables["32"][1] == "211.3"
    )
    assert (
        tables["fp8"][:2] == ["34.3", "32.8"]
        and "256.0 KiB" in done.stdout
        and "none is measured" in done.stdout
    )
    record = last_json(done.stdout)
    assert record["settings"]["device"] == "dgx-spark"
    assert record["plans"]["fp8"]["tokens_per_second"]["1"] == pytest.approx(8.27, abs=0.01)


def test_the_report_of_r1_says_what_is_on_each_device():
    done = run("--model=deepseek-r1", "--device=mi350x", "--concurrency=1,64")
    tables = rows(done.stdout)
    assert (
        "contexts of 32,768" in tables["weights"]
        and "GiB for the cache on each device" in tables["weights"]
    )
    assert list(tables)[-3:] == ["requests", "1", "64"] and "8 x mi350x" in done.stdout


@pytest.mark.parametrize("page", ["qwen3-32b", "deepseek-r1"])
def test_the_pages_show_what_the_plan_prints(page):
    text = (ROOT / "docs" / "models" / f"{page}.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m scripts\.serve_plan (.*)$", text, re.M)
    assert commands
    for command in commands:
        report, _, _ = run(*command.split()).stdout.rpartition("\n\n")
        assert report.count("|") > 30 and report in text, command


def test_no_rate_is_given_for_requests_that_the_cache_cannot_hold():
    done = run("--dtype=bf16", "--context=32000", "--concurrency=1,32")
    assert rows(done.stdout)["32"] == ["no room"] and rows(done.stdout)["1"] != ["no room"]


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--model=qwen"], "qwen3-32b"),
        (["--device=spark"], "dgx-spark"),
        (["--dtype=fp4"], "fp8"),
        (["--kv_dtype=int4"], "fp8"),
        (["--model=deepseek-r1", "--device=mi350x", "--devices=2"], "--devices"),
        (["--model=deepseek-r1", "--dtype=bf16"], "dtype"),
        (["--dtype=fp8", "--kv_gib=100"], "--kv_gib"),
        (["--kv_gib=0"], "--kv_gib"),
        (["--utilization=0.1"], "--utilization"),
        (["--utilization=90"], "at most 1"),
        (["--context=40000"], "max_model_len"),
        (["--concurrency=0"], "1,8,32"),
        (["--concurrency=1,,2"], "1,8,32"),
        (["--devices=0"], "devices"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, hint):
    done = run(*arguments)
    assert (
        done.returncode == 2
        and hint in done.stderr
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )


def test_lists_of_numbers_are_read():
    assert numbers("1, 8,32", "concurrency") == [1, 8, 32]


def test_peaks_are_found_by_torchs_name_of_a_device_and_unknown_stays_unknown():
    assert (
        peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    )
    assert (
        peak_flops("AMD Instinct MI350X") == 2307e12
        and peak_flops("NVIDIA GB10") is None
        and peak_flops("Some Card") is None
    )
