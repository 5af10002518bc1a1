"""One expert, asked replica by replica until one answers."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from hocket.errors import HocketError, Reason, Situation
from hocket.rpc.breaker import Breakers, Circuit, is_fault
from hocket.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from hocket.rpc.budget import RetryBudget
    from hocket.rpc.bulkhead import Bulkhead

_RETRIES: Final = metrics.RETRIES.labels("aggregator")
_SAME_EVERYWHERE: Final = frozenset({Situation.MALFORMED, Situation.UNKNOWN, Situation.REFUSED})
"""What is wrong with the request, or forbidden: no other replica has a better answer."""
_HERE_ALONE: Final = frozenset({Reason.QUARANTINED, Reason.ENCRYPTED, Reason.DECRYPTION_FAILED, Reason.WRONG_RECIPIENT})
"""What is wrong with one worker: it has crashed on the package, or lacks the credential that another may have."""
_SILENT: Final = frozenset({Reason.DEADLINE, Reason.STRAGGLER})
_RETRY_SECONDS: Final = 1.0
"""Pause advised when no worker has named one: a worker that is gone is known to be by then."""


def no_replica(refusal: HocketError, what: str) -> HocketError:
    """Says that workers are away, and not that this aggregator is.

    Args:
        refusal: How the last worker was.
        what: What none of them can run, as messages call it: `expert`, `plan`.
    """
    return HocketError(
        Reason.NO_REPLICA,
        f"no worker can run this {what} now: try again soon",
        retry_after_seconds=refusal.retry_after_seconds or _RETRY_SECONDS,
        expert_reason=refusal.reason,
    )


@dataclass(frozen=True, slots=True)
class Safeguards:
    """What the calls of one aggregator share, so that trouble stays where it is.

    Args:
        patience_seconds: Silence of a replica after which one more is asked; less for callers in a hurry.
        budget: Pays for every attempt of a question but its first.
        breakers: By worker and expert.
        bulkhead: By expert.
    """

    patience_seconds: float
    budget: RetryBudget
    breakers: Breakers[tuple[str, str]]
    bulkhead: Bulkhead


class Replica(Protocol):
    """A worker that can run an expert, as a plan lists it."""

    @property
    def worker(self) -> str:
        """Its name."""

    @property
    def address(self) -> str:
        """Where to call it."""

    @property
    def resident(self) -> bool:
        """Whether it holds the expert, and does not have to load it first."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one expert answered.

    Args:
        output: float32 `[n, C]`, finite.
        worker: Who answered.
        attempts: Replicas asked, including that one.
        seconds: From asking to answer.
    """

    output: NDArray[np.float32]
    worker: str
    attempts: int
    seconds: float


class ExpertError(HocketError):
    """An expert that did not answer: the refusal that counts, and how many replicas were asked.

    Args:
        refusal: Why.
        attempts: Replicas asked.
        seconds: From asking to giving up.
    """

    def __init__(self, refusal: HocketError, attempts: int, seconds: float) -> None:
        super().__init__(
            refusal.reason,
            refusal.message,
            field=refusal.field,
            retry_after_seconds=refusal.retry_after_seconds,
            **refusal.metadata,
        )
        self.attempts = attempts
        self.seconds = seconds


@dataclass(slots=True)
class _Attempt:
    """A call that runs.

    Attributes:
        replica: Who was asked.
        probe: Its circuit, if the call finds out whether it works again.
        silent: Whether the patience has passed without an answer from a replica that holds the expert.
        end: When the call itself ended; it may be noticed later.
    """

    replica: Replica
    probe: Circuit | None
    silent: bool = False
    end: float = 0.0


@dataclass(slots=True, eq=False)
class Question:
    """One expert, and how to ask its replicas.

    A replica that is out of reach, or whose breaker is open, is asked after the others. The next one is asked in
    place of one that is unavailable, keeps the expert in quarantine or cannot decrypt it, and beside one that is
    silent: running an expert is a pure function, so it may run twice. The first answer counts; a refusal counts when
    nobody else is being asked, or when every replica would give it. A refusal that was waited with is the outcome when
    all others end in silence: it says more.

    A replica that has to load the expert first may well be silent: that does not speak against it, and no second one
    is made to load it meanwhile.

    Times are `time.monotonic()` seconds.

    Args:
        safeguards: What all questions share.
        expert: Its name.
        replicas: Who can run it, in the order to try them.
        shape: What the output must look like.
        call: Runs the expert on the worker at that address; ends at the deadline.
        is_away: Whether the worker at that address is known to be out of reach.
        unavailable: Why there are no replicas, when there are none.

    Attributes:
        outcome: What became of it, once that is decided.
        running: Calls that may decide it: at least one while it is not decided.
        dropped: Calls that were cancelled and may not have ended yet.
    """

    safeguards: Safeguards
    expert: str
    replicas: Sequence[Replica]
    shape: tuple[int, int]
    call: Callable[[str], Coroutine[Any, Any, NDArray[np.float32]]]
    is_away: Callable[[str], bool]
    unavailable: Reason = Reason.NO_REPLICA
    outcome: Reply | ExpertError | None = field(init=False, default=None)
    running: dict[asyncio.Task[NDArray[np.float32]], _Attempt] = field(init=False, default_factory=dict)
    dropped: list[asyncio.Task[NDArray[np.float32]]] = field(init=False, default_factory=list)
    _untried: list[Replica] = field(init=False)
    _begun: float = field(init=False, default=0.0)
    _asked: float = field(init=False, default=0.0)
    _patience: float = field(init=False, default=0.0)
    _refusal: HocketError | None = field(init=False, default=None)

    def begin(self, now: float, patience_seconds: float) -> None:
        """Ask the first replica, and have so much patience with each."""
        self._begun, self._patience = now, patience_seconds
        self._untried = [*self.replicas]
        if not self._untried:
            self.outcome = ExpertError(HocketError(self.unavailable, "nobody can run this expert now"), 0, 0.0)
            return
        try:
            self.safeguards.bulkhead.enter(self.expert)
        except HocketError as refusal:
            self.outcome = ExpertError(refusal, 0, 0.0)
        else:
            self.safeguards.budget.earn()
            self._ask(now)

    def settle(self, task: asyncio.Task[NDArray[np.float32]], now: float) -> None:
        """Take note that a running call has ended: the question is decided, or somebody else is still asked."""
        error = task.exception()
        attempt = self.running[task]
        if error is None:
            self._leave(task, healthy=True)
            self._decide(Reply(task.result(), attempt.replica.worker, self._attempts, attempt.end - self._begun))
        elif isinstance(error, HocketError):
            silent = attempt.silent and error.reason is Reason.DEADLINE
            self._leave(task, healthy=False if silent or is_fault(error) else None)
            if not self._goes_on(error, now):
                self._decide(self._missing(error, attempt.end))
        else:
            raise error

    def hedge(self, now: float) -> float:
        """Ask one more replica if those that were asked are silent, and say when to look again."""
        if now < self._asked + self._patience:
            return self._asked + self._patience
        for attempt in self.running.values():
            attempt.silent = attempt.replica.resident
        if not self._untried:
            return math.inf
        nobody_loads_it = all(attempt.silent for attempt in self.running.values())
        if (nobody_loads_it or self._next.resident) and self._ask_one_more(now):
            metrics.HEDGES.inc()
        return now + self._patience

    def give_up(self, refusal: HocketError, now: float) -> None:
        """Wait no longer: the expert is missing."""
        self._decide(self._missing(refusal, now))

    def close(self) -> None:
        """Cancel what still runs: nobody waits for it. That speaks against those alone that were silent already."""
        for task, attempt in tuple(self.running.items()):
            self._leave(task, healthy=False if attempt.silent else None)
            task.cancel()
            self.dropped.append(task)

    @property
    def _attempts(self) -> int:
        return len(self.replicas) - len(self._untried)

    @property
    def _next(self) -> Replica:
        return next(filter(self._is_fit, self._untried), self._untried[0])

    def _goes_on(self, error: HocketError, now: float) -> bool:
        """Whether somebody may still answer after this refusal."""
        elsewhere = error.situation is Situation.UNAVAILABLE or error.reason in _HERE_ALONE
        if elsewhere and self._untried and self._ask_one_more(now):
            _RETRIES.inc()
        if error.situation is not Situation.UNAVAILABLE and error.reason not in _SILENT:
            self._refusal = error
        return bool(self.running) and (elsewhere or error.situation not in _SAME_EVERYWHERE)

    def _missing(self, error: HocketError, now: float) -> ExpertError:
        refusal = self._refusal if self._refusal is not None and error.reason in _SILENT else error
        return ExpertError(refusal, self._attempts, now - self._begun)

    def _ask_one_more(self, now: float) -> bool:
        try:
            self.safeguards.bulkhead.enter(self.expert)
        except HocketError:
            return False  # too many wait for this expert already: what is not asked is not paid for
        if not self.safeguards.budget.spend():
            self.safeguards.bulkhead.leave(self.expert)
            return False
        self._ask(now)
        return True

    def _ask(self, now: float) -> None:
        """Ask the next replica. The call is in its compartment already."""
        replica = self._next
        self._untried.remove(replica)
        self._asked = now
        attempt = _Attempt(replica, self.safeguards.breakers.enter((replica.worker, self.expert)))
        task = asyncio.create_task(self._run(attempt))
        task.add_done_callback(lambda _: self.safeguards.bulkhead.leave(self.expert))
        self.running[task] = attempt

    def _is_fit(self, replica: Replica) -> bool:
        return not self.is_away(replica.address) and self.safeguards.breakers.admits((replica.worker, self.expert))

    async def _run(self, attempt: _Attempt) -> NDArray[np.float32]:
        try:
            output = await self.call(attempt.replica.address)
        finally:
            attempt.end = time.monotonic()
        if output.shape != self.shape:
            raise HocketError(
                Reason.BAD_ANSWER, f"the expert answered the shape {list(output.shape)}, not {list(self.shape)}"
            )
        if not np.isfinite(output).all():
            raise HocketError(Reason.BAD_ANSWER, "the expert answered NaN or infinity")
        return output

    def _decide(self, outcome: Reply | ExpertError) -> None:
        self.outcome = outcome
        self.close()

    def _leave(self, task: asyncio.Task[NDArray[np.float32]], *, healthy: bool | None) -> None:
        attempt = self.running.pop(task)
        self.safeguards.breakers.leave((attempt.replica.worker, self.expert), attempt.probe, healthy=healthy)
