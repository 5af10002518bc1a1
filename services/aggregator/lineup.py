"""One plan in progress: which experts have answered, what that makes the value, and when it is over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from services.aggregator.combine import Combined, Share, combine
from services.aggregator.fanout import ExpertError, Reply, cancel_all

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray


class Lineup:
    """The answers to one plan, lined up in plan order.

    Args:
        experts: Name of each planned expert.
        shares: Part of the answer each is planned for.
        shape: Rows and columns of the answer.
        output_range: Range of every value, when known.
        insist: Whether a missing expert fails the call.
        min_coverage: Least coverage of every row that is an answer.
        pass_through: Whether the one expert's own refusal is the call's.
    """

    def __init__(
        self,
        experts: Sequence[str],
        shares: Sequence[Share],
        shape: tuple[int, int],
        output_range: tuple[float, float] | None,
        *,
        insist: bool,
        min_coverage: float,
        pass_through: bool,
    ) -> None:
        self.experts = experts
        self.shares = shares
        self.replies: list[Reply | ExpertError | None] = [None] * len(experts)
        self._shape = shape
        self._output_range = output_range
        self._insist = insist
        self._min_coverage = min_coverage
        self._pass_through = pass_through

    async def run(
        self, asks: Sequence[Coroutine[Any, Any, Reply]], *, every: bool, straggler_seconds: float | None
    ) -> AsyncGenerator[None, None]:
        """Run the calls at once until all is decided; with `every`, yield after each arrival but the last.

        Experts that answer while the consumer is busy are seen together. What is no longer needed is cancelled,
        also when the consumer stops early.

        Raises:
            HocketError: The call cannot become what the caller insists on.
        """
        tasks = [asyncio.create_task(ask) for ask in asks]
        places = {task: place for place, task in enumerate(tasks)}
        pending: set[asyncio.Task[Reply]] = set(tasks)
        loop = asyncio.get_running_loop()
        end = None if straggler_seconds is None else loop.time() + straggler_seconds
        until = asyncio.FIRST_COMPLETED if every else asyncio.FIRST_EXCEPTION
        try:
            while pending:
                left = None if end is None else max(0.0, end - loop.time())
                done, pending = await asyncio.wait(pending, timeout=left, return_when=until)
                for task in done:
                    self._settle(places[task], task)
                if not done:
                    break
                if every and pending:
                    yield
        finally:
            await cancel_all(tasks)
        late = HocketError(Reason.STRAGGLER, "the straggler timeout passed before this expert answered")
        for task in pending:
            self._miss(places[task], ExpertError(late, 1, straggler_seconds or 0.0))

    def _settle(self, place: int, task: asyncio.Task[Reply]) -> None:
        error = task.exception()
        if error is None:
            self.replies[place] = task.result()
        elif isinstance(error, ExpertError):
            self._miss(place, error)
        else:
            raise error

    def _miss(self, place: int, failure: ExpertError) -> None:
        self.replies[place] = failure
        metrics.EXPERT_FAILURES.labels(failure.reason).inc()
        if self._pass_through:
            raise failure
        if self._insist:
            raise HocketError(
                Reason.COVERAGE,
                f"expert {self.experts[place]} is missing: {failure.message} ({failure.reason}); "
                "ask with on_missing RENORMALISE to accept an answer without it",
                expert=self.experts[place],
                expert_reason=failure.reason,
            )

    @property
    def outputs(self) -> list[NDArray[np.float32] | None]:
        """Each expert's output, or None while it is missing."""
        return [reply.output if isinstance(reply, Reply) else None for reply in self.replies]

    def combined(self) -> Combined:
        """The value over the experts that have answered so far."""
        return combine(self.shares, self.outputs, self._shape, self._output_range)

    def conclude(self) -> Combined:
        """The final value.

        Raises:
            HocketError: `COVERAGE` if a row has less than the least coverage, or no expert at all.
        """
        combined = self.combined()
        least = float(combined.coverage.min())
        if least < self._min_coverage or least <= 0.0:
            missing = {str(reply.reason) for reply in self.replies if isinstance(reply, ExpertError)}
            raise HocketError(
                Reason.COVERAGE,
                f"a row has coverage {least:.3f} and {self._min_coverage:.3f} is asked for; "
                f"missing experts: {', '.join(sorted(missing)) or 'none'}",
                coverage=f"{least:.6f}",
            )
        return combined
