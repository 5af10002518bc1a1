"""Asking all experts of a plan at once."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import patience

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from services.aggregator.question import ExpertError, Question, Reply


async def ask_all(
    questions: Sequence[Question], *, every: bool, deadline: float, straggler_seconds: float | None
) -> AsyncGenerator[dict[int, Reply | ExpertError], None]:
    """Ask every question at once, and yield outcomes by place until each question has its own.

    What is decided while the consumer is busy comes together. What is no longer needed is cancelled, also when the
    consumer leaves early, and has ended when this generator is closed.

    Args:
        questions: At least one.
        every: Whether to yield at each answer; otherwise at failures, and when all is decided.
        deadline: When the calls end, in `time.monotonic()` seconds.
        straggler_seconds: How long to wait in all; None for as long as the calls last.
    """
    begin = time.monotonic()
    end = math.inf if straggler_seconds is None else begin + straggler_seconds
    patience_seconds = patience(questions[0].safeguards.patience_seconds, min(deadline, end) - begin)
    look = begin + patience_seconds
    undecided = dict(enumerate(questions))
    try:
        for question in questions:
            question.begin(begin, patience_seconds)
        while undecided:
            if decided := {place: asked.outcome for place, asked in undecided.items() if asked.outcome is not None}:
                for place in decided:
                    del undecided[place]
                yield decided
                continue
            if await _settle_next(undecided.values(), every=every, wake=min(look, end)):
                continue
            if end <= look:
                late = HocketError(Reason.STRAGGLER, "the straggler timeout passed before this expert answered")
                for question in undecided.values():
                    question.give_up(late, end)
            else:
                look = min(question.hedge(look) for question in undecided.values())
    finally:
        for question in questions:
            question.close()
        await _ended([task for question in questions for task in question.dropped])


async def _settle_next(undecided: Collection[Question], *, every: bool, wake: float) -> bool:
    """Wait for calls to end and settle their questions; False if none has ended at `wake`."""
    running = {task: question for question in undecided for task in question.running}
    # Of two calls with one question each may decide it; otherwise nothing changes until a failure, or the end of all.
    until = asyncio.FIRST_COMPLETED if every or len(running) > len(undecided) else asyncio.FIRST_EXCEPTION
    timeout = None if wake == math.inf else max(0.0, wake - time.monotonic())
    done, _ = await asyncio.wait(running, timeout=timeout, return_when=until)
    for task in done:
        if running[task].outcome is None:  # two calls with one question may end in the same step
            running[task].settle(task, time.monotonic())
    return bool(done)


async def _ended(cancelled: Sequence[asyncio.Task[NDArray[np.float32]]]) -> None:
    """Wait until cancelled calls have stopped, and take note of every end: nobody else will."""
    if cancelled:
        await asyncio.wait(cancelled)
    for task in cancelled:
        if not task.cancelled():
            task.exception()
