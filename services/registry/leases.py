"""Live workers: each is listed from its first word until its lease ends.

A lease belongs to a name, not to a stream: when a stream breaks, the worker stays listed until the lease ends, and a
new stream under the same name goes on with it. Nothing here outlives the process; workers announce themselves again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.credential_files import CREDENTIALS_MAX
from hocket.errors import HocketError, Reason
from hocket.identity import check_name, is_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.v1.registry_pb2 import WorkerState

_TEXT_LENGTH_MAX: Final = 256
_FORMATS_MAX: Final = 16
_RESIDENT_MAX: Final = 2**16
_RETRY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Lease:
    state: WorkerState
    end: float


class Leases:
    """The live workers by name. Times are seconds of one monotonic clock, given by the caller.

    Args:
        lease_seconds: How long a worker stays listed without another word.
        workers_max: How many may be listed.
    """

    def __init__(self, lease_seconds: float, workers_max: int) -> None:
        self._lease_seconds = lease_seconds
        self._workers_max = workers_max
        self._leases: dict[str, _Lease] = {}

    def live(self) -> Mapping[str, WorkerState]:
        """Everyone listed, by name."""
        return {name: lease.state for name, lease in self._leases.items()}

    def renew(self, state: WorkerState, now: float) -> bool:
        """Take a worker's word, and start its lease anew.

        Returns:
            Whether it says anything new.

        Raises:
            HocketError: `BAD_REQUEST` for a state that cannot be true, `QUEUE_FULL` for one worker too many.
        """
        _check(state)
        before = self._leases.get(state.worker)
        if before is None and len(self._leases) >= self._workers_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"this registry already lists {self._workers_max} workers",
                retry_after_seconds=_RETRY_SECONDS,
            )
        if before is not None and before.state == state:
            state = before.state  # the same object, so that it is seen to be the same
        self._leases[state.worker] = _Lease(state, now + self._lease_seconds)
        return before is None or before.state is not state

    def expire(self, now: float) -> tuple[str, ...]:
        """Drop the workers whose lease has ended, and name them."""
        gone = tuple(name for name, lease in self._leases.items() if lease.end <= now)
        for name in gone:
            del self._leases[name]
        return gone


def _check(state: WorkerState) -> None:
    check_name(state.worker, "worker name")
    for field, text in (("address", state.address), ("device", state.device)):
        if not 1 <= len(text) <= _TEXT_LENGTH_MAX:
            raise _bad(f"worker.{field}", f"a worker's {field} has 1 to {_TEXT_LENGTH_MAX} characters")
    if len(state.formats) > _FORMATS_MAX or any(len(name) > _TEXT_LENGTH_MAX for name in state.formats):
        raise _bad("worker.formats", f"a worker loads at most {_FORMATS_MAX} formats")
    if len(state.residency) > _RESIDENT_MAX:
        raise _bad("worker.residency", f"a worker lists at most {_RESIDENT_MAX} packages")
    if len(state.unlocks) > CREDENTIALS_MAX or any(len(address) > _TEXT_LENGTH_MAX for address in state.unlocks):
        raise _bad(
            "worker.unlocks", f"a worker has credentials for at most {CREDENTIALS_MAX} packages, each named briefly"
        )
    for resident in state.residency:
        if not is_digest(resident.digest):
            raise _bad("worker.residency", f"{resident.digest[:80]!r} is not a digest (sha256:<64 hex digits>)")


def _bad(field: str, message: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, message, field=field)
