"""What an operator may choose about the aggregator."""

from __future__ import annotations

from dataclasses import dataclass

from hocket.settings import check_call_seconds, check_counts


@dataclass(frozen=True, slots=True)
class AggregatorSettings:
    """Table `[aggregator]`.

    Args:
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        default_deadline_seconds: Deadline of a call that brings none.
        in_flight_max: Calls combined at once; the next one is refused as `QUEUE_FULL`.
        in_flight_per_expert_max: Calls to workers that run at once for one expert, hedges and those that are given up
            but have not ended included; in a plan that would make one more it counts as missing, with `QUEUE_FULL`.
            Texts that run at once on one base as well; one more is refused. 0 for half of `in_flight_max`.
        patience_seconds: Silence of a worker that holds an expert after which another one that can run it is asked as
            well; half of its time for a call that has less than twice that.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    host: str = "127.0.0.1"
    port: int = 50053
    default_deadline_seconds: float = 30.0
    in_flight_max: int = 1024
    in_flight_per_expert_max: int = 0
    patience_seconds: float = 0.5
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_counts(self, "in_flight_max")
        if self.in_flight_per_expert_max < 0:
            raise ValueError("in_flight_per_expert_max must be 0 (choose for me) or more")
        check_call_seconds(self, "default_deadline_seconds", "patience_seconds")
