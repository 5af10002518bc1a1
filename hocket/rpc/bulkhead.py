"""Compartments for calls: what hangs fills its own, and the others go on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

_RETRY_SECONDS: Final = 0.1


class Bulkhead:
    """Counts calls by what they are for, and refuses one more than a compartment holds.

    Args:
        limit: Calls in flight per compartment.
        what: What a compartment is for, as messages call it: `this model`, `texts`.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._in_flight: dict[str, int] = {}

    def enter(self, name: str) -> None:
        """Count one call in.

        Raises:
            HocketError: `QUEUE_FULL` if the compartment is full.
        """
        count = self._in_flight.get(name, 0)
        if count >= self._limit:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{count} calls already wait for {self._what}: try again soon",
                retry_after_seconds=_RETRY_SECONDS,
            )
        self._in_flight[name] = count + 1

    def leave(self, name: str) -> None:
        """Count one call out."""
        count = self._in_flight[name] - 1
        if count:
            self._in_flight[name] = count
        else:
            del self._in_flight[name]

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Count one call in while the context lasts.

        Raises:
            HocketError: As `enter`.
        """
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)
