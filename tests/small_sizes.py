"""transformer_benchmark with sizes small enough for a test, run by test_benchmarks.py.

    python -m tests.small_sizes --model=small

medium runs out of memory in its first step, and xl does not fit.
"""
import runpy

from nanochat import benchmark

WIDTHS = {"small": 64, "medium": 128, "large": 64, "xl": 1 << 20}


class RunsOut(benchmark.Training):
    """Training in which medium runs out of memory."""

    def step(self):
        if self.network.config.width == WIDTHS["medium"]:
            raise RuntimeError("CUDA out of memory")
        return super().step()


if __name__ == "__main__":
    benchmark.VOCAB_SIZE = 300
    benchmark.Training = RunsOut
    for name, width in WIDTHS.items():
        benchmark.SIZES[name] = benchmark.Size(1, width, width // 64, 4, 16, 1e6)
    runpy.run_module("scripts.transformer_benchmark", run_name="__main__")
