"""Which worker runs an expert: residents first, two choices by load, rendezvous hashing when nobody holds it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hocket.identity import ExpertId

K = TypeVar("K")

REPLICAS_MAX: Final = 3
"""Replicas a plan lists per expert."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A live worker, as placement sees it.

    Args:
        name: Its own name.
        address: Where to call it.
        formats: Package formats it can load.
        budget_bytes: Memory it may use for experts.
        resident: Digests it holds in memory.
        draining: Whether it takes no new requests.
    """

    name: str
    address: str
    formats: frozenset[str]
    budget_bytes: int
    resident: frozenset[str]
    draining: bool


@dataclass(slots=True)
class Loads:
    """What runs where, counted as it is dispatched; workers' own reports only correct it upwards.

    A count goes up in the same event-loop step that chose the replica, so that concurrent requests see it.
    """

    by_worker: Counter[str] = field(default_factory=Counter)
    by_expert: Counter[ExpertId] = field(default_factory=Counter)
    reported: dict[str, int] = field(default_factory=dict)

    def of_worker(self, name: str) -> int:
        """Requests on a worker: ours, or its own last word if that is more."""
        return max(self.by_worker[name], self.reported.get(name, 0))

    def reserve(self, placed: Iterable[tuple[ExpertId, str | None]]) -> None:
        """Count experts, and the first replica of each, as running one more request."""
        for expert, worker in placed:
            self.by_expert[expert] += 1
            if worker is not None:
                self.by_worker[worker] += 1

    def release(self, placed: Iterable[tuple[ExpertId, str | None]]) -> None:
        """Undo `reserve`; entries that fall to zero disappear."""
        for expert, worker in placed:
            _decrement(self.by_expert, expert)
            if worker is not None:
                _decrement(self.by_worker, worker)


def _decrement(counts: Counter[K], key: K) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]


def place(digest: str, size_bytes: int, package_format: str, workers: Sequence[Worker], loads: Loads) -> list[Worker]:
    """Up to three workers that hold a package or can load it, in the order to try them.

    Among those that hold it, two are drawn at random and the less busy one comes first: that spreads load as well as
    asking everybody, and does not herd on stale counts. When nobody holds it, rendezvous hashing makes every router
    send it to the same worker, so it is loaded once.
    """
    able = [
        worker
        for worker in workers
        if not worker.draining and package_format in worker.formats and size_bytes <= worker.budget_bytes
    ]
    holders = [worker for worker in able if digest in worker.resident]
    if len(holders) > 1:
        first, second = random.sample(holders, 2)
        if loads.of_worker(second.name) < loads.of_worker(first.name):
            first, second = second, first
        rest = sorted(
            (worker for worker in holders if worker not in {first, second}),
            key=lambda worker: loads.of_worker(worker.name),
        )
        holders = [first, second, *rest]
    if len(holders) < min(REPLICAS_MAX, len(able)):
        others = [worker for worker in able if digest not in worker.resident]
        holders += sorted(others, key=lambda worker: _affinity(digest, worker.name), reverse=True)
    return holders[:REPLICAS_MAX]


def _affinity(digest: str, worker: str) -> bytes:
    """Rendezvous hashing: the worker with the highest value of a package is its home."""
    return hashlib.blake2b(f"{digest} {worker}".encode(), digest_size=8).digest()
