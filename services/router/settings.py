"""What an operator may choose about the router."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.settings import check_call_seconds, check_counts

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Table `[router]`.

    Args:
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        data_dir: Where it keeps the last view of the registry (`router.view`), to serve from when it starts while the
            registry is down; None to keep none.
        registry: Address of the registry whose feed it follows.
        aggregators: Addresses of the aggregators: the least busy is asked, and one that is away after all others.
        default_deadline_seconds: Deadline of a call that brings none.
        generate_deadline_seconds: The same of Generate, whose answers take longer.
        in_flight_max: Calls answered at once; the next one is refused as `QUEUE_FULL`. At most half of them are texts,
            which last long: rows find room beside them.
        in_flight_per_model_max: Of those, calls for one model, the L of its capacity factors, or for one base; the
            next one is refused as `QUEUE_FULL`. 0 for three quarters: a suite with one model loses few of its calls,
            and a model that hangs leaves the others enough to be answered.
        patience_seconds: Silence of an aggregator after which a call that ends without an answer counts against it.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    data_dir: Path | None = None
    registry: str = "127.0.0.1:50052"
    aggregators: tuple[str, ...] = ("127.0.0.1:50053",)
    default_deadline_seconds: float = 30.0
    generate_deadline_seconds: float = 600.0
    in_flight_max: int = 256
    in_flight_per_model_max: int = 0
    patience_seconds: float = 0.5
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.aggregators:
            raise ValueError("aggregators must name at least one address")
        check_counts(self, "in_flight_max")
        if self.in_flight_per_model_max < 0:
            raise ValueError("in_flight_per_model_max must be 0 (choose for me) or more")
        check_call_seconds(self, "default_deadline_seconds", "generate_deadline_seconds", "patience_seconds")

    @property
    def compartment(self) -> int:
        """Calls of one model answered at once."""
        return min(self.in_flight_per_model_max or math.ceil(0.75 * self.in_flight_max), self.in_flight_max)

    @property
    def texts_max(self) -> int:
        """Texts answered at once."""
        return max(1, self.in_flight_max // 2)
