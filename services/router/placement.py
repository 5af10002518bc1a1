"""Which worker runs what: residents first, two choices by load, rendezvous hashing when nobody holds it."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from services.router.model import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.v1.package_pb2 import Package

Placed: TypeAlias = "Sequence[tuple[str, str | None]]"
"""Planned experts, as text, each with the name of its first replica if it has one."""

REPORT_SECONDS: Final = 1.0
"""How long a worker's word counts: an older one would keep requests away that could correct it."""
REPLICAS_MAX: Final = 3
"""Replicas a plan lists per expert."""
BUSY_COUNT: Final = 16
"""Requests on a worker from which an idler one may be asked to hold its experts as well."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base language model, as a worker that serves it describes it; empty is not stated.

    Args:
        name: What it is called.
        digest: Of its folder, `sha256:<hex>`.
        weights_sha256: Hex SHA-256 of its weight file.
    """

    name: str
    digest: str
    weights_sha256: str = ""


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
        base: The base language model that it serves; None when it serves none.
        unlocks: Encrypted packages that it has a credential for: digests, and `publisher/name`.
        host_budget_bytes: Host memory for adapter experts; 0 where they take of `budget_bytes`.
    """

    name: str
    address: str
    formats: frozenset[str]
    budget_bytes: int
    resident: frozenset[str]
    draining: bool
    base: Base | None = None
    unlocks: frozenset[str] = frozenset()
    host_budget_bytes: int = 0

    @property
    def adapter_bytes(self) -> int:
        """Memory it may use for adapter experts."""
        return self.host_budget_bytes or self.budget_bytes

    def can_load(self, package_format: str, size_bytes: int) -> bool:
        """Whether it takes new requests for what has this format and size."""
        room = self.adapter_bytes if package_format == "expert" else self.budget_bytes
        return not self.draining and package_format in self.formats and size_bytes <= room

    def opens(self, package: Package) -> bool:
        """Whether it can read what is inside a package: of an encrypted one, with its credential, as it has said."""
        if not package.model.encrypted or package.digest in self.unlocks or package.digest in self.resident:
            return True
        released = (release for release in package.releases if release.state not in REFUSALS)
        return any(f"{release.publisher}/{release.name}" in self.unlocks for release in released)

    def serves(self, base: str | None = None) -> bool:
        """Whether it answers text, by the base of this digest or by any, also when it takes no new requests."""
        return self.base is not None and "expert" in self.formats and base in {None, self.base.digest}


@dataclass(slots=True)
class Loads:
    """What runs where, counted as it is dispatched; workers' own reports only correct it upwards.

    A count goes up in the same event-loop step that chose the replica, so that concurrent requests see it.
    """

    by_worker: dict[str, int] = field(default_factory=dict)
    by_expert: dict[str, int] = field(default_factory=dict)
    _reported: dict[str, tuple[float, int]] = field(default_factory=dict)

    def note(self, worker: str, in_flight: int) -> None:
        """Take a worker's own word for how busy it is."""
        self._reported[worker] = (time.monotonic(), in_flight)

    def of_worker(self, name: str) -> int:
        """Requests on a worker: ours, or its own last word if that is more and still fresh."""
        said, count = self._reported.get(name, (0.0, 0))
        fresh = count if time.monotonic() - said < REPORT_SECONDS else 0
        return max(self.by_worker.get(name, 0), fresh)

    def reserve(self, placed: Placed) -> None:
        """Count experts, and the first replica of each, as running one more request."""
        self._change(placed, 1)

    def release(self, placed: Placed) -> None:
        """Undo `reserve`."""
        self._change(placed, -1)

    def _change(self, placed: Placed, step: int) -> None:
        for expert, worker in placed:
            _add(self.by_expert, expert, step)
            if worker is not None:
                _add(self.by_worker, worker, step)


def _add(counts: dict[str, int], key: str, step: int) -> None:
    counts[key] = counts.get(key, 0) + step
    if not counts[key]:
        del counts[key]


def place(digest: str, size_bytes: int, package_format: str, workers: Sequence[Worker], loads: Loads) -> list[Worker]:
    """Up to three workers that hold a package or can load it, in the order to try them.

    Among those that hold it, two are drawn at random and the less busy one comes first: that spreads load as well as
    asking everybody, and does not herd on stale counts. When nobody holds it, rendezvous hashing makes every router
    send it to the same worker, so it is loaded once. When those that hold it are busy and the next in that order has
    less than half as much to do, that one comes first and holds it from then on: so a new worker takes its part.
    """
    able = [worker for worker in workers if worker.can_load(package_format, size_bytes)]
    return _in_order(able, frozenset({digest}), loads)


def place_text(
    digests: frozenset[str], size_bytes: int, base: str, workers: Sequence[Worker], loads: Loads, session: str = ""
) -> list[Worker]:
    """Up to three workers that can compute a text by these adapters on a base, in the order to try them.

    As `place`, where those hold it that hold every adapter, and of the others those come first that hold most: without
    any adapter all hold it.

    Of those that hold it every router sends the turns of a session to the same one, by rendezvous hashing, as long as
    it is not busy: what it has computed for the last turn is there. While it is, they go to the next in that order.

    Args:
        digests: Of the adapters.
        size_bytes: What they take together.
        base: Digest of the base.
        workers: Live ones.
        loads: What runs where.
        session: What the text is a turn of; empty for nothing.
    """
    able = [worker for worker in workers if worker.serves(base) and worker.can_load("expert", size_bytes)]
    return _in_order(able, digests, loads, session)


def _in_order(able: Sequence[Worker], digests: frozenset[str], loads: Loads, session: str = "") -> list[Worker]:
    holders = [worker for worker in able if digests <= worker.resident]
    if session:
        holders.sort(key=lambda worker: _affinity(session, worker.name), reverse=True)
        holders.sort(key=lambda worker: loads.of_worker(worker.name) >= BUSY_COUNT)
    elif len(holders) > 1:
        first, second = random.sample(holders, 2)
        if loads.of_worker(second.name) < loads.of_worker(first.name):
            first, second = second, first
        rest = sorted(
            (worker for worker in holders if worker not in {first, second}),
            key=lambda worker: loads.of_worker(worker.name),
        )
        holders = [first, second, *rest]
    busy = bool(holders) and loads.of_worker(holders[0].name) >= BUSY_COUNT
    if busy or len(holders) < min(REPLICAS_MAX, len(able)):
        others = [worker for worker in able if not digests <= worker.resident]
        key = " ".join(sorted(digests))
        others.sort(key=lambda worker: (len(digests & worker.resident), _affinity(key, worker.name)), reverse=True)
        if busy and others and 2 * loads.of_worker(others[0].name) < loads.of_worker(holders[0].name):
            holders.insert(0, others.pop(0))
        holders += others
    return holders[:REPLICAS_MAX]


def _affinity(key: str, worker: str) -> bytes:
    """Rendezvous hashing: the worker with the highest value is the home of a package, a set of them, or a session."""
    return hashlib.blake2b(f"{key} {worker}".encode(), digest_size=8).digest()
