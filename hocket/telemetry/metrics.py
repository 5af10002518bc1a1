"""Every metric of the suite, named in one place.

The `grpc_server_*` names are the conventional ones, so that existing dashboards work. Identifiers of requests,
experts or users are never labels: those belong in logs.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import Metric

_METHOD: Final = ("grpc_type", "grpc_service", "grpc_method")
_CALL_SECONDS: Final = tuple(0.00025 * 2**step for step in range(18))  # 0.25 ms to 33 s


class MethodCounts:
    """What is counted of one rpc, as plain numbers: six library counters per call would cost more than the call.

    Incremented in the event loop only; the collector reads them when `/metrics` is scraped.
    """

    __slots__ = ("buckets", "handled", "labels", "received", "seconds", "sent", "started")

    def __init__(self, labels: tuple[str, str, str]) -> None:
        self.labels = labels
        self.started = 0
        self.received = 0
        self.sent = 0
        self.handled: dict[str, int] = {}
        self.buckets = [0] * (len(_CALL_SECONDS) + 1)
        self.seconds = 0.0

    def end(self, code: str, seconds: float) -> None:
        """Count the end of a call."""
        self.handled[code] = self.handled.get(code, 0) + 1
        self.buckets[bisect_left(_CALL_SECONDS, seconds)] += 1
        self.seconds += seconds


class _Calls(Collector):
    """Every rpc's counts, under the conventional names."""

    def __init__(self) -> None:
        self._methods: dict[tuple[str, str, str], MethodCounts] = {}

    def of(self, labels: tuple[str, str, str]) -> MethodCounts:
        return self._methods.setdefault(labels, MethodCounts(labels))

    def collect(self) -> Iterator[Metric]:
        started = CounterMetricFamily("grpc_server_started", "Calls begun on the server.", labels=_METHOD)
        received = CounterMetricFamily("grpc_server_msg_received", "Messages received.", labels=_METHOD)
        sent = CounterMetricFamily("grpc_server_msg_sent", "Messages sent.", labels=_METHOD)
        handled = CounterMetricFamily("grpc_server_handled", "Calls ended.", labels=(*_METHOD, "grpc_code"))
        seconds = HistogramMetricFamily("grpc_server_handling_seconds", "Time of a call.", labels=_METHOD)
        for counts in self._methods.values():
            started.add_metric(counts.labels, counts.started)
            received.add_metric(counts.labels, counts.received)
            sent.add_metric(counts.labels, counts.sent)
            for code, count in counts.handled.items():
                handled.add_metric((*counts.labels, code), count)
            bounds = (*map(str, _CALL_SECONDS), "+Inf")
            seconds.add_metric(counts.labels, [*zip(bounds, accumulate(counts.buckets), strict=True)], counts.seconds)
        yield from (started, received, sent, handled, seconds)


_CALLS: Final = _Calls()
REGISTRY.register(_CALLS)


def method_counts(grpc_type: str, service: str, method: str) -> MethodCounts:
    """The counts of one rpc, shared by everyone in this process who serves it."""
    return _CALLS.of((grpc_type, service, method))


REFUSALS: Final = Counter(
    "hocket_refusals", "Calls refused, by stable reason.", ("grpc_service", "grpc_method", "reason")
)
UNSIGNED_USES: Final = Counter(
    "hocket_unsigned_uses", "Requests that used an expert which only the allow_unsigned policy admits.", ("service",)
)
EXPERT_FAILURES: Final = Counter(
    "hocket_expert_failures", "Experts that did not make it into an answer, by reason.", ("reason",)
)
RETRIES: Final = Counter(
    "hocket_retries", "Calls repeated at another server because the one before was away.", ("service",)
)
HEDGES: Final = Counter("hocket_hedges", "Experts asked at one more worker because the one before was silent.")
RETRIES_DENIED: Final = Counter(
    "hocket_retries_denied", "Repeats and hedges not made because the retry budget was spent.", ("service",)
)
BREAKER_OPENINGS: Final = Counter("hocket_breaker_openings", "Circuit breakers that opened.", ("service",))
CAPACITY_OVERFLOWS: Final = Counter(
    "hocket_capacity_overflows", "Preferred experts passed over because they were full."
)
TEXT_DECISIONS: Final = Counter("hocket_text_decisions", "Texts, by who has decided and why.", ("policy", "reason"))
SNAPSHOT_REVISION: Final = Gauge("hocket_snapshot_revision", "Registry revision of the current snapshot.", ("service",))
EXPERT_LOADS: Final = Counter("hocket_expert_loads", "Experts brought into memory, by outcome.", ("outcome",))
EXPERT_EVICTIONS: Final = Counter("hocket_expert_evictions", "Experts that left memory to make room.")
QUARANTINED_PACKAGES: Final = Gauge(
    "hocket_quarantined_packages", "Packages refused because this worker ended too often while it loaded or ran them."
)
RESIDENT_BYTES: Final = Gauge("hocket_resident_bytes", "Bytes of experts in memory.", ("device",))
EXECUTIONS: Final = Counter(
    "hocket_executions", "Times a worker's device was given rows: once per pass, in a long pass once per slice."
)
BATCH_ROWS: Final = Histogram(
    "hocket_batch_rows",
    "Rows computed in one pass.",
    buckets=tuple(2**step for step in range(11)),
)
TEXT_PROMPT_TOKENS: Final = Counter("hocket_text_prompt_tokens", "Tokens of prompts whose answers have begun.")
TEXT_TOKENS: Final = Counter("hocket_text_tokens", "Tokens of answers.")
TEXT_TOKEN_SECONDS: Final = Histogram(
    "hocket_text_token_seconds",
    "Time from one token of an answer to the next: the mean of each answer.",
    buckets=tuple(0.001 * 2**step for step in range(14)),  # to 8 s
)
TEXT_FIRST_TOKEN_SECONDS: Final = Histogram(
    "hocket_text_first_token_seconds",
    "Time from the arrival of a text request to the first token of its answer.",
    buckets=tuple(0.005 * 2**step for step in range(15)),  # to 82 s
)
TEXT_RUNNING: Final = Gauge(
    "hocket_text_running", "Texts whose answers have begun and not ended, those that have made way among them."
)
TEXT_PREEMPTED: Final = Gauge("hocket_text_preempted", "Texts that have made way for others and wait to go on.")
TEXT_WAITING: Final = Gauge("hocket_text_waiting", "Texts whose answers wait to begin.")
TEXT_WAITING_SECONDS: Final = Gauge(
    "hocket_text_waiting_seconds", "How long the text that waits for longest has waited for the engine."
)
TEXT_PREEMPTIONS: Final = Counter("hocket_text_preemptions", "Times a text had to make way and went on later.")
TEXT_PREFIX_HIT_TOKENS: Final = Counter(
    "hocket_text_prefix_hit_tokens", "Tokens of prompts whose keys and values were found when their texts ran first."
)
TEXT_PREFIX_MISS_TOKENS: Final = Counter(
    "hocket_text_prefix_miss_tokens", "Tokens of prompts whose keys and values had to be computed."
)
KV_PAGES_USED: Final = Gauge("hocket_kv_pages_used", "KV pages that running texts have, shared ones once.")
KV_PAGES_CACHED: Final = Gauge(
    "hocket_kv_pages_cached", "KV pages that no text has, kept for those that begin in the same way."
)
KV_PAGES: Final = Gauge("hocket_kv_pages", "KV pages there are.")


def serve_metrics(host: str, port: int) -> Callable[[], None]:
    """Serve `/metrics` over HTTP from a thread of its own.

    Returns:
        A function that stops serving.

    Raises:
        OSError: The port is taken.
    """
    server, thread = start_http_server(port, addr=host)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
