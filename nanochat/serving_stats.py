"""
What a server counts, in the text format of Prometheus.

    stats = ServingStats()
    stats.requests[("/v1/models", 200)] += 1
    print(stats.text({"nanochat_engine_alive": 1}))

Counters only grow and belong to whoever serves: the engines' threads count tokens and times, the
event loop counts requests.
"""
import bisect
import threading
import time
from collections import Counter

# Upper bounds of the histograms' buckets, in seconds
FIRST_TOKEN_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

HELP = {
    "nanochat_requests_total": "HTTP requests by route and status",
    "nanochat_prompt_tokens_total": "tokens of prompts, those of cached prefixes included",
    "nanochat_cached_tokens_total": "tokens of prompts that a cached prefix had",
    "nanochat_generated_tokens_total": "tokens generated",
    "nanochat_sequences": "sequences that run or wait",
    "nanochat_sequences_running": "sequences that have a slot",
    "nanochat_sequences_waiting": "sequences that wait for a slot",
    "nanochat_engine_alive": "1 while every engine takes steps or waits for work, else 0",
    "nanochat_time_to_first_token_seconds": "from a request's arrival to its first token",
    "nanochat_inter_token_seconds": "between two tokens of one sequence",
}


class Histogram:
    """How many of the observed values are at most as large as each bound."""

    def __init__(self, bounds):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value, times=1):
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name):
        """Its samples in the text format."""
        cumulated = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts):
            cumulated += count
            yield f'{name}_bucket{{le="{bound}"}} {cumulated}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {cumulated}"


class ServingStats:
    """All counters of one server."""

    def __init__(self):
        self.requests = Counter()       # {(route, status): count}
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.between = Histogram(BETWEEN_SECONDS)
        self._lock = threading.Lock()   # several engines count at once

    def on_update(self, live, update):
        """Count what a step has brought to a sequence. live: its state of seen_tokens, seen_at."""
        now = time.monotonic()
        prompt, generated, cached = update.counts
        new = generated - live.seen_tokens
        if new <= 0:
            return
        with self._lock:
            seconds = now - live.seen_at
            if live.seen_tokens == 0:
                self.prompt_tokens += prompt
                self.cached_tokens += cached
                self.first_token.observe(seconds)
            else:
                self.between.observe(seconds / new, new)
            self.generated_tokens += new
        live.seen_tokens, live.seen_at = generated, now

    def text(self, gauges):
        """Everything in Prometheus' text format. gauges: {name: number}."""
        samples = {
            "nanochat_requests_total": list(self._request_lines()),
            "nanochat_prompt_tokens_total": [self.prompt_tokens],
            "nanochat_cached_tokens_total": [self.cached_tokens],
            "nanochat_generated_tokens_total": [self.generated_tokens],
            **{name: [value] for name, value in gauges.items()},
        }
        lines = []
        for name, values in samples.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += _headers(name, kind)
            lines += [line if isinstance(line, str) else f"{name} {line}" for line in values]
        for name, histogram in (
            ("nanochat_time_to_first_token_seconds", self.first_token),
            ("nanochat_inter_token_seconds", self.between),
        ):
            lines += _headers(name, "histogram") + list(histogram.lines(name))
        return "\n".join(lines) + "\n"

    def _request_lines(self):
        for (route, status), count in sorted(self.requests.items()):
            yield f'nanochat_requests_total{{route="{route}",status="{status}"}} {count}'


def _headers(name, kind):
    return [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}"]
