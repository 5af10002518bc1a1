"""What an operator may choose about the aggregator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AggregatorSettings:
    """Table `[aggregator]`.

    Args:
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        default_deadline_seconds: Deadline of a call that brings none.
        in_flight_max: Calls combined at once; the next one is refused as `QUEUE_FULL`.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    host: str = "127.0.0.1"
    port: int = 50053
    default_deadline_seconds: float = 30.0
    in_flight_max: int = 1024
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0
