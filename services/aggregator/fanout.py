"""Asking the experts: one call each, all at once, failing over to the plan's next replica."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason, Situation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from numpy.typing import NDArray

_MARGIN_SHARE: Final = 0.05
_MARGIN_SECONDS_MAX: Final = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    """What one expert answered.

    Args:
        output: float32 `[n, C]`, finite.
        worker: Who answered.
        attempts: Replicas tried, including that one.
        seconds: From asking to answer.
    """

    output: NDArray[np.float32]
    worker: str
    attempts: int
    seconds: float


class ExpertError(HocketError):
    """An expert that did not answer: the last replica's refusal, and how many were tried.

    Args:
        refusal: Why the last one failed.
        attempts: Replicas tried.
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


async def ask(
    workers: Sequence[str],
    call: Callable[[int], Awaitable[NDArray[np.float32]]],
    shape: tuple[int, int],
) -> Reply:
    """Ask one expert, replica by replica.

    RunTensor is a pure function, so a call that broke may be repeated. Only unavailability moves on: any other
    refusal would be the same elsewhere.

    Args:
        workers: Names of the replicas, in the order to try them.
        call: Runs the expert on the replica at that index.
        shape: What the output must look like.

    Raises:
        ExpertError: No replica answered; `BAD_ANSWER` if one did with NaN, infinity or another shape.
    """
    begin = time.perf_counter()
    refusal: HocketError | None = None
    for attempt, worker in enumerate(workers):
        try:
            output = await call(attempt)
            _check(output, shape)
        except HocketError as error:
            refusal = error
            if error.situation is not Situation.UNAVAILABLE:
                raise ExpertError(error, attempt + 1, time.perf_counter() - begin) from error
        else:
            return Reply(output, worker, attempt + 1, time.perf_counter() - begin)
    if refusal is None:
        refusal = HocketError(Reason.NO_REPLICA, "no worker can run this expert")
    raise ExpertError(refusal, len(workers), time.perf_counter() - begin)


def _check(output: NDArray[np.float32], shape: tuple[int, int]) -> None:
    if output.shape != shape:
        raise HocketError(Reason.BAD_ANSWER, f"the expert answered the shape {list(output.shape)}, not {list(shape)}")
    if not np.isfinite(output).all():
        raise HocketError(Reason.BAD_ANSWER, "the expert answered NaN or infinity")


def hand_down(remaining_seconds: float) -> float:
    """The deadline for a call made on behalf of another: what remains, less a margin to use its answer in."""
    return max(0.0, remaining_seconds - min(_MARGIN_SHARE * remaining_seconds, _MARGIN_SECONDS_MAX))


async def cancel_all(tasks: Sequence[asyncio.Task[Reply]]) -> None:
    """Cancel what still runs, wait until it has stopped, and take note of every end: nobody else will."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()
