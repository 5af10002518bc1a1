"""Refusals of packages, repeated for a while without looking at the packages again, unless trust changes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason, Situation

if TYPE_CHECKING:
    from services.expert_worker.authority import Authority, Standing

_REFUSAL_SECONDS: Final = 5.0
"""How long a refusal is repeated. That of a wrong credential is repeated until trust changes, a new release of the
package, or an admin's LoadExpert."""
_REFUSALS_MAX: Final = 1024
_WRONG_CREDENTIAL: Final = frozenset({Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT})


class Refusals:
    """Refusals that are repeated.

    Args:
        authority: What counts.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._refusals: dict[str, tuple[HocketError, Standing, float]] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Why packages are refused now, by digest."""
        return {
            digest: error.reason
            for digest, (error, standing, until) in self._refusals.items()
            if self._counts(standing, until)
        }

    def remember(self, digest: str, error: HocketError, standing: Standing) -> None:
        """Repeat a refusal from now on, if the next look at the package would end in it too.

        Args:
            digest: Of the package.
            error: Why it cannot be loaded.
            standing: What counted when it was looked at.
        """
        lasting = error.situation in {Situation.REFUSED, Situation.MALFORMED}
        if lasting or (error.reason is Reason.DEVICE_MEMORY and error.retry_after_seconds is None):
            if len(self._refusals) >= _REFUSALS_MAX:
                self._refusals.clear()
            # Credentials are read at start: a wrong one stays so, and every other try would derive a key in vain.
            seconds = math.inf if error.reason in _WRONG_CREDENTIAL else _REFUSAL_SECONDS
            # A copy: the traceback of the error itself keeps the bytes of the package in memory.
            self._refusals[digest] = error.restated(error.message), standing, time.monotonic() + seconds

    def repeat(self, digest: str) -> None:
        """Return if nothing speaks against looking at a package.

        Raises:
            HocketError: Why it was refused a moment ago.
        """
        if (remembered := self._refusals.get(digest)) is not None:
            error, standing, until = remembered
            if self._counts(standing, until):
                raise error.with_traceback(None)
            del self._refusals[digest]

    def forget(self, digest: str) -> None:
        """Look at a package again when it is next asked for."""
        self._refusals.pop(digest, None)

    def _counts(self, standing: Standing, until: float) -> bool:
        return standing is self._authority.standing and time.monotonic() < until
