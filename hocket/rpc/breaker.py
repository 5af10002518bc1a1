"""Circuit breakers: who has kept failing is asked last for a while, until one call has shown that it works again.

A breaker only advises. Who has to choose puts those it does not admit last and never leaves them out, so the last
one there is gets asked whatever its breaker says.

    closed -- 5 failures in a row --> open -- 5 s, doubling to 60 s --> half-open: one call goes there as a probe
       ^                               ^                                    |
       |                               +------------ it failed -------------+
       +------------------------- any success ------------------------------+
"""

from __future__ import annotations

import random
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from hocket.errors import Reason, Situation
from hocket.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from hocket.errors import HocketError

FAILURES_MAX: Final = 5
"""Failures in a row that open a circuit."""
OPEN_SECONDS: Final = 5.0
"""How long a circuit is open the first time."""
OPEN_SECONDS_MAX: Final = 60.0
JITTER: Final = 0.2
"""Share by which the time is varied either way, so that the probes of many processes do not come together."""
_PATIENCE_SECONDS_MIN: Final = 0.05
"""Less silence speaks against nobody, however short the caller's deadline is."""
_CIRCUITS_MAX: Final = 4096
_FAULTY_SITUATIONS: Final = frozenset({Situation.UNAVAILABLE, Situation.CORRUPT, Situation.BUG})
_FAULTY_REASONS: Final = frozenset({Reason.BAD_ANSWER, Reason.QUARANTINED})

Key = TypeVar("Key", bound=Hashable)


def is_fault(refusal: HocketError) -> bool:
    """Whether a refusal speaks against who gave it: not what a caller has caused, and not being busy."""
    return refusal.situation in _FAULTY_SITUATIONS or refusal.reason in _FAULTY_REASONS


def patience(set_seconds: float, left_seconds: float) -> float:
    """Seconds of silence after which somebody counts as failing: as set, or half of the time a hurried caller has."""
    return min(set_seconds, max(left_seconds / 2, _PATIENCE_SECONDS_MIN))


@dataclass(slots=True, eq=False)
class Circuit:
    """What is remembered of somebody who has failed.

    Attributes:
        failures: In a row, while closed.
        open_seconds: How long it was last opened for; 0 while closed.
        until: When that ends, on the breakers' clock.
        probing: Whether a call is finding out if it works again.
    """

    failures: int = 0
    open_seconds: float = 0.0
    until: float = 0.0
    probing: bool = False


class Breakers(Generic[Key]):
    """A circuit for each key that has failed since it last succeeded; all others are closed.

    Every call that is made is told by `enter`, and its end, whatever it is, by `leave`.

    Args:
        service: Who keeps them, for the metrics.
        clock: Seconds that only go up.
    """

    def __init__(self, service: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._circuits: dict[Key, Circuit] = {}
        self._clock = clock
        self._openings = metrics.BREAKER_OPENINGS.labels(service)

    def admits(self, key: Key) -> bool:
        """Whether a call should go there now rather than elsewhere."""
        circuit = self._circuits.get(key)
        return circuit is None or not circuit.open_seconds or self._is_half_open(circuit)

    def enter(self, key: Key) -> Circuit | None:
        """A call goes there. Returns its circuit if the call is the probe, for `leave`."""
        circuit = self._circuits.get(key)
        if circuit is None or not circuit.open_seconds or not self._is_half_open(circuit):
            return None
        circuit.probing = True
        return circuit

    def leave(self, key: Key, probe: Circuit | None, *, healthy: bool | None) -> None:
        """A call has ended.

        Args:
            key: Where it went.
            probe: What `enter` returned.
            healthy: Whether it was answered as it should be; None when the end says nothing about that.
        """
        if healthy:
            self._circuits.pop(key, None)
            return
        circuit = self._circuits.get(key)
        if probe is not None:
            probe.probing = False
        if healthy is None:
            return
        if circuit is None:
            circuit = self._remember(key)
        if circuit is probe:
            self._open(circuit, min(2 * circuit.open_seconds, OPEN_SECONDS_MAX))
        elif not circuit.open_seconds:
            circuit.failures += 1
            if circuit.failures >= FAILURES_MAX:
                self._open(circuit, OPEN_SECONDS)

    def _is_half_open(self, circuit: Circuit) -> bool:
        return not circuit.probing and self._clock() >= circuit.until

    def _open(self, circuit: Circuit, seconds: float) -> None:
        circuit.open_seconds = seconds
        circuit.until = self._clock() + seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
        self._openings.inc()

    def _remember(self, key: Key) -> Circuit:
        if len(self._circuits) >= _CIRCUITS_MAX:
            del self._circuits[next(iter(self._circuits))]  # the oldest: what is gone for good never succeeds again
        circuit = self._circuits[key] = Circuit()
        return circuit
