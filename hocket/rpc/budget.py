"""How many calls may be repeated: a share of those that are made, so that trouble is never multiplied."""

from __future__ import annotations

from typing import Final

from hocket.telemetry import metrics

CALLS_PER_REPEAT: Final = 10
"""Calls that together pay for one repeat."""
REPEATS_MAX: Final = 256
"""Repeats that can be saved up: enough for what runs at the moment at which a peer dies."""


class RetryBudget:
    """A bucket that calls pay into and repeats are taken from. It starts full.

    Args:
        service: Whose calls, for the metrics.
    """

    def __init__(self, service: str) -> None:
        self._paid = REPEATS_MAX * CALLS_PER_REPEAT
        self._denials = metrics.RETRIES_DENIED.labels(service)

    def earn(self) -> None:
        """A call is made for the first time."""
        self._paid = min(self._paid + 1, REPEATS_MAX * CALLS_PER_REPEAT)

    def spend(self) -> bool:
        """Whether one more call may be made in place of, or beside, one that was made already."""
        if self._paid < CALLS_PER_REPEAT:
            self._denials.inc()
            return False
        self._paid -= CALLS_PER_REPEAT
        return True
