"""One plan in progress: which experts have answered, what that makes the value, and when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason, Situation
from hocket.telemetry import metrics
from services.aggregator.combine import Combined, Share, combine
from services.aggregator.question import ExpertError, Reply, no_replica

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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

    def take(self, outcomes: Mapping[int, Reply | ExpertError]) -> None:
        """Line up what has become of experts, by place.

        Raises:
            HocketError: An expert is missing that the caller insists on.
        """
        for place, outcome in outcomes.items():
            self.replies[place] = outcome
            if isinstance(outcome, ExpertError):
                self._miss(place, outcome)

    def _miss(self, place: int, failure: ExpertError) -> None:
        metrics.EXPERT_FAILURES.labels(failure.reason).inc()
        if self._pass_through:
            raise no_replica(failure, "expert") if failure.situation is Situation.UNAVAILABLE else failure
        if self._insist:
            raise HocketError(
                Reason.COVERAGE,
                f"expert {self.experts[place]} is missing: {failure.message} ({failure.reason}); "
                "ask with on_missing RENORMALISE to accept an answer without it",
                expert=self.experts[place],
                expert_reason=failure.reason,
            )

    @property
    def is_complete(self) -> bool:
        """Whether every expert's outcome is known."""
        return None not in self.replies

    @property
    def outputs(self) -> list[NDArray[np.float32] | None]:
        """Each expert's output, or None while it is missing."""
        return [reply.output if isinstance(reply, Reply) else None for reply in self.replies]

    @property
    def work(self) -> int:
        """Multiplications of one sum, at most."""
        return sum(len(share.weights) for share in self.shares) * self._shape[1]

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
