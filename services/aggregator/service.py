"""AggregatorService: messages in, messages out."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import Breakers
from hocket.rpc.budget import RetryBudget
from hocket.rpc.bulkhead import Bulkhead
from hocket.rpc.convert import COLUMNS_MAX, duration, matrix_to_tensor, positive_seconds, tensor_to_matrix_unchecked
from hocket.rpc.handlers import LOAD_KEY, add_trailing, remaining_seconds
from hocket.v1 import aggregator_pb2, aggregator_pb2_grpc, plan_pb2
from services.aggregator.combine import Combined, Share
from services.aggregator.fanout import ask_all
from services.aggregator.lineup import Lineup
from services.aggregator.question import ExpertError, Question, Reply, Safeguards
from services.aggregator.relay import check_plan, relay
from services.aggregator.workers import Workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from numpy.typing import NDArray

    from hocket.rpc.channel import Channels
    from hocket.rpc.handlers import Context
    from hocket.v1.tensor_pb2 import Tensor
    from services.aggregator.settings import AggregatorSettings

_INLINE_WORK_MAX: Final = 2**18
"""Multiplications up to which a sum is made in the event loop: a few milliseconds."""
_ROUNDING: Final = 1e-9
"""How far a row's planned weights may sum from 1: float64 rounding over any number of experts, and no more."""


class AggregatorServicer(aggregator_pb2_grpc.AggregatorServiceServicer):
    """Combines the answers of a plan's experts."""

    def __init__(self, settings: AggregatorSettings, channels: Channels) -> None:
        self._settings = settings
        self._workers = Workers(channels)
        per_expert_max = settings.in_flight_per_expert_max or max(1, settings.in_flight_max // 2)
        self._safeguards = Safeguards(
            settings.patience_seconds,
            RetryBudget("aggregator"),
            Breakers("aggregator"),
            Bulkhead(per_expert_max, "this expert"),
        )
        self._texts = Bulkhead(max(1, settings.in_flight_max // 2), "texts")
        self._text_safeguards = replace(self._safeguards, bulkhead=Bulkhead(per_expert_max, "this base"))

    async def Combine(
        self, request: aggregator_pb2.CombineRequest, context: Context
    ) -> AsyncIterator[aggregator_pb2.CombineResponse]:
        """Partials if asked for, then exactly one final; of a text job its events, the last one a finish."""
        begin = time.perf_counter()
        deadline = time.monotonic() + remaining_seconds(context, self._settings.default_deadline_seconds)
        loads: dict[str, bytes] = {}
        if request.HasField("text"):
            if len(request.ListFields()) > 1:
                raise HocketError(Reason.BAD_REQUEST, "a text job stands in place of everything else", field="text")
            check_plan(request.text.plan)
            answer = relay(self._text_safeguards, self._workers, request.text, deadline, loads)
            with self._texts.holding("texts"):
                async with aclosing(answer) as events:
                    async for event in events:
                        yield aggregator_pb2.CombineResponse(text=event)
            _report(context, loads)
            return
        plan = request.plan
        rows = tensor_to_matrix_unchecked(request.input, "input")  # NaN is for each worker to refuse
        shares = _shares(plan, len(rows))
        insist = request.on_missing != plan_pb2.ON_MISSING_RENORMALISE
        lineup = Lineup(
            [planned.expert for planned in plan.experts],
            shares,
            (plan.row_count, plan.column_count),
            (plan.output_range.lower, plan.output_range.upper) if plan.HasField("output_range") else None,
            insist=insist,
            min_coverage=request.min_coverage if request.HasField("min_coverage") else 0.0,
            pass_through=plan.mode == plan_pb2.MODE_PASS and insist,
        )
        straggler = None
        if request.HasField("straggler_timeout"):
            straggler = positive_seconds(request.straggler_timeout, "straggler_timeout")
        questions = [
            self._question(planned, share, request.input, rows, deadline, loads)
            for planned, share in zip(plan.experts, shares, strict=True)
        ]
        sequence = 0
        arriving = ask_all(questions, every=request.partials, deadline=deadline, straggler_seconds=straggler)
        async with aclosing(arriving) as arrivals:
            async for outcomes in arrivals:
                lineup.take(outcomes)
                if request.partials and not lineup.is_complete:
                    sequence += 1
                    partial = _combination(sequence, plan, lineup, await _made(lineup, lineup.combined))
                    yield aggregator_pb2.CombineResponse(partial=partial)
        _report(context, loads)
        final = _combination(sequence + 1, plan, lineup, await _made(lineup, lineup.conclude))
        finish = plan_pb2.Finish(reason=plan_pb2.FINISH_REASON_COMPLETE)
        if any(isinstance(reply, ExpertError) for reply in lineup.replies):
            finish.reason = plan_pb2.FINISH_REASON_PARTIAL
            finish.degradations.append("MISSING_EXPERT")
        finish.timings.combine.CopyFrom(duration(time.perf_counter() - begin))
        yield aggregator_pb2.CombineResponse(final=plan_pb2.Prediction(combination=final, finish=finish))

    def _question(
        self,
        planned: plan_pb2.PlannedExpert,
        share: Share,
        tensor: Tensor,
        rows: NDArray[np.float32],
        deadline: float,
        loads: dict[str, bytes],
    ) -> Question:
        part = tensor if isinstance(share.rows, slice) else matrix_to_tensor(rows[share.rows])
        return Question(
            self._safeguards,
            planned.expert,
            () if planned.unavailable_reason else planned.replicas,
            (len(planned.rows), len(planned.columns)),
            lambda address: self._workers.run_tensor(address, planned.expert, part, deadline, loads),
            self._workers.is_away,
            Reason.__members__.get(planned.unavailable_reason, Reason.NO_REPLICA),
        )


def tokens_of(response: aggregator_pb2.CombineResponse) -> int | None:
    """How many tokens of a text a response brings; None if it is none of a text."""
    return len(response.text.delta.tokens) if response.HasField("text") else None


def _report(context: Context, loads: dict[str, bytes]) -> None:
    """Relay what workers have said of their load."""
    for load in loads.values():
        add_trailing(context, LOAD_KEY, load)


async def _made(lineup: Lineup, make: Callable[[], Combined]) -> Combined:
    """A sum over the lineup; in a thread when other calls would wait for it."""
    return make() if lineup.work <= _INLINE_WORK_MAX else await asyncio.to_thread(make)


def _shares(plan: plan_pb2.Plan, row_count: int) -> list[Share]:
    """The plan's shares, checked against the input: whatever a plan says, no index may leave the answer.

    Raises:
        HocketError: `BAD_REQUEST` if the plan does not fit its input or itself.
    """
    if plan.row_count != row_count or not plan.experts or not 1 <= plan.column_count <= COLUMNS_MAX:
        raise HocketError(Reason.BAD_REQUEST, "the plan does not fit its input", field="plan")
    every_row, every_column = [*range(row_count)], [*range(plan.column_count)]
    total = np.zeros(row_count)
    shares = []
    for place, planned in enumerate(plan.experts):
        rows, weights, columns = list(planned.rows), np.array(planned.weights), list(planned.columns)
        if not (
            len(rows) == len(weights) > 0
            and (rows == every_row or _ascends(rows, row_count))
            and weights.min() >= 0.0
            and (columns == every_column or _scatters(columns, plan.column_count))
        ):
            raise HocketError(Reason.BAD_REQUEST, "the plan contradicts itself", field=f"plan.experts[{place}]")
        share = Share(
            slice(None) if rows == every_row else np.array(rows),
            weights,
            slice(None) if columns == every_column else np.array(columns),
        )
        total[share.rows] += weights
        shares.append(share)
    if not np.abs(total - 1.0).max() <= _ROUNDING:
        raise HocketError(Reason.BAD_REQUEST, "the weights of a row do not sum to 1", field="plan.experts")
    return shares


def _ascends(rows: list[int], row_count: int) -> bool:
    return rows[-1] < row_count and all(before < after for before, after in pairwise(rows))


def _scatters(columns: list[int], column_count: int) -> bool:
    kept = [column for column in columns if column >= 0]
    return len(set(kept)) == len(kept) and all(column < column_count for column in kept)


def _combination(sequence: int, plan: plan_pb2.Plan, lineup: Lineup, combined: Combined) -> plan_pb2.Combination:
    message = plan_pb2.Combination(
        sequence=sequence,
        value=matrix_to_tensor(combined.value),
        coverage=combined.coverage.tolist(),
        contributions=[
            _contribution(planned, reply, effective.tolist())
            for planned, reply, effective in zip(plan.experts, lineup.replies, combined.weights, strict=True)
        ],
    )
    if combined.lower is not None and combined.upper is not None:
        message.lower_bound.CopyFrom(matrix_to_tensor(combined.lower))
        message.upper_bound.CopyFrom(matrix_to_tensor(combined.upper))
    return message


def _contribution(
    planned: plan_pb2.PlannedExpert, reply: Reply | ExpertError | None, weights: list[float]
) -> plan_pb2.Contribution:
    if reply is None:
        return plan_pb2.Contribution(
            expert=planned.expert, state=plan_pb2.CONTRIBUTION_STATE_PENDING, rows=planned.rows, weights=weights
        )
    contribution = plan_pb2.Contribution(
        expert=planned.expert,
        rows=planned.rows,
        weights=weights,
        latency=duration(reply.seconds),
        attempt_count=reply.attempts,
    )
    if isinstance(reply, Reply):
        contribution.state = plan_pb2.CONTRIBUTION_STATE_ARRIVED
        contribution.worker = reply.worker
    else:
        contribution.state = _MISSING.get(reply.reason, _FAILED)
        contribution.reason = reply.reason
    return contribution


_FAILED: Final = plan_pb2.CONTRIBUTION_STATE_FAILED
_MISSING: Final = {
    Reason.STRAGGLER: plan_pb2.CONTRIBUTION_STATE_TIMED_OUT,
    Reason.BAD_ANSWER: plan_pb2.CONTRIBUTION_STATE_EXCLUDED,
}
