"""What ``/metrics`` tells, in Prometheus' text format. A dozen numbers need no library."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from swift.inference.engines.base import EngineStats

__all__ = ["Histogram", "ServerMetrics"]

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Seconds, counted by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a duration ``times`` times."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def lines(self, name: str, help: str) -> list[str]:
        """In Prometheus' form."""
        found, so_far = [f"# HELP {name} {help}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {so_far}"]


class ServerMetrics:
    """Counts since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """(route, status) -> number."""
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.next_token = Histogram(NEXT_TOKEN_BOUNDS)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.disconnects = 0
        self.timeouts = 0

    def text(self, stats: EngineStats) -> str:
        """Everything, with how the engine stands now."""
        lines = [
            "# HELP swift_http_requests_total Requests by route and status.",
            "# TYPE swift_http_requests_total counter",
        ]
        lines += [
            f'swift_http_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, kind, help, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens of answers.", self.generated_tokens),
            ("disconnects_total", "counter", "Clients that left early.", self.disconnects),
            ("timeouts_total", "counter", "Requests that took too long.", self.timeouts),
            ("requests_running", "gauge", "Answers being written.", stats.running),
            ("requests_waiting", "gauge", "Answers waiting for a place.", stats.waiting),
            ("requests_aborted_total", "counter", "Answers given up.", stats.aborted_total),
            ("cache_tokens", "gauge", "Places of the key-value cache.", stats.cache_tokens),
            ("cache_tokens_used", "gauge", "Places in use.", stats.cache_tokens_used),
        ):
            lines += [f"# HELP swift_{name} {help}", f"# TYPE swift_{name} {kind}", f"swift_{name} {value}"]
        lines += self.first_token.lines(
            "swift_time_to_first_token_seconds", "From the request to its first token."
        )
        lines += self.next_token.lines("swift_inter_token_seconds", "Between a token and the next.")
        return "\n".join(lines) + "\n"
