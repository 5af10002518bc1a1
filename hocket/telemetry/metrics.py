"""Every metric of the suite, named in one place.

The `grpc_server_*` names are the conventional ones, so that existing dashboards work. Identifiers of requests,
experts or users are never labels: those belong in logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Gauge, Histogram, start_http_server

if TYPE_CHECKING:
    from collections.abc import Callable

_METHOD: Final = ("grpc_type", "grpc_service", "grpc_method")
_CALL_SECONDS: Final = tuple(0.00025 * 2**step for step in range(18))  # 0.25 ms to 33 s

CALLS_STARTED: Final = Counter("grpc_server_started", "Calls begun on the server.", _METHOD)
CALLS_HANDLED: Final = Counter("grpc_server_handled", "Calls ended on the server, by status.", (*_METHOD, "grpc_code"))
CALL_SECONDS: Final = Histogram(
    "grpc_server_handling_seconds", "Time from begin to end of a call.", _METHOD, buckets=_CALL_SECONDS
)
MESSAGES_RECEIVED: Final = Counter("grpc_server_msg_received", "Messages received by the server.", _METHOD)
MESSAGES_SENT: Final = Counter("grpc_server_msg_sent", "Messages sent by the server.", _METHOD)
REFUSALS: Final = Counter(
    "hocket_refusals", "Calls refused, by stable reason.", ("grpc_service", "grpc_method", "reason")
)
UNSIGNED_USES: Final = Counter(
    "hocket_unsigned_uses", "Requests that used an expert which only the allow_unsigned policy admits.", ("service",)
)
EXPERT_FAILURES: Final = Counter(
    "hocket_expert_failures", "Experts that did not make it into an answer, by reason.", ("reason",)
)
CAPACITY_OVERFLOWS: Final = Counter(
    "hocket_capacity_overflows", "Preferred experts passed over because they were full."
)
SNAPSHOT_REVISION: Final = Gauge("hocket_snapshot_revision", "Registry revision of the current snapshot.", ("service",))
EXPERT_LOADS: Final = Counter("hocket_expert_loads", "Experts brought into memory, by outcome.", ("outcome",))
EXPERT_EVICTIONS: Final = Counter("hocket_expert_evictions", "Experts that left memory to make room.")
RESIDENT_BYTES: Final = Gauge("hocket_resident_bytes", "Bytes of experts in memory.", ("device",))
BATCH_ROWS: Final = Histogram(
    "hocket_batch_rows",
    "Rows computed in one pass of one expert.",
    buckets=tuple(2**step for step in range(11)),
)


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
