"""One request: weigh, select, place. The outcome is a plan."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import ANSWER_VALUES_MAX, ROWS_MAX, tensor_to_matrix
from hocket.telemetry import metrics
from hocket.v1 import plan_pb2
from services.router.model import Leaf, Model, union_range
from services.router.placement import Loads, place
from services.router.selection import Load, Selection, scores, select

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hocket.v1.tensor_pb2 import Tensor
    from services.router.directory import Snapshot
    from services.router.placement import Placed, Worker

_SLICE_WORK: Final = 2**26
"""Multiplications in one go: tens of milliseconds."""
_SLICE_VALUES: Final = 2**17
"""Weights written into plans in one go, likewise."""
_SORTING: Final = 256
"""Ranking the members costs about as much as multiplying so many features."""

_Sliceable = TypeVar("_Sliceable", "list[int]", "NDArray[np.float32]")


@dataclass(frozen=True, slots=True)
class Decision:
    """What one request comes to.

    Args:
        model: What the client addressed.
        rows: Its input, float32 `[N, F]`.
        selection: Weights per expert.
        plan: Who computes what, as a message.
        placed: Each planned expert with its first replica, for the load counts.
        degradations: What the plan already gives up.
        seconds: Time the decision took.
    """

    model: Model
    rows: NDArray[np.float32]
    selection: Selection
    plan: plan_pb2.Plan
    placed: Placed
    degradations: Sequence[str]
    seconds: float

    def count(self) -> None:
        """Count what this decision gives up, once it is acted upon."""
        if self.selection.overflowed:
            metrics.CAPACITY_OVERFLOWS.inc(len(self.selection.overflowed))
        if "UNSIGNED_EXPERT" in self.degradations:
            metrics.UNSIGNED_USES.labels("router").inc()

    def gate_scores(self) -> NDArray[np.float64]:
        """What the gate thinks of every expert, float64 `[N, leaves]`."""
        return scores(self.model.top, self.rows, len(self.model.leaves))


def work(tensor: Tensor, model: Model) -> int:
    """About how many multiplications a decision takes, before anything about its input is known to be sound."""
    row_count = min(tensor.shape[0], ROWS_MAX) if tensor.shape else 0
    return max(len(tensor.contents) // 4, _SORTING * row_count) * len(model.leaves)


def decide(
    snapshot: Snapshot,
    loads: Loads,
    in_flight_max: int,
    address: str,
    tensor: Tensor,
    top_k: int | None,
    given_up: threading.Event | None = None,
) -> Decision:
    """Decide one request on a snapshot. Nothing is reserved yet.

    Args:
        snapshot: What the router knows.
        loads: What runs where.
        in_flight_max: Requests for one model that the router may run.
        address: As in `PredictRequest.model`.
        tensor: As in `PredictRequest.input`.
        top_k: Members of the top level that answer, or None for the model's own number.
        given_up: Set when nobody waits for the decision any more: it then ends within a slice of the work.

    Raises:
        HocketError: As the contract of Route says.
        CancelledError: It was given up.
    """
    begin = time.perf_counter()
    model = snapshot.resolve(address)
    model.check_servable()
    rows = tensor_to_matrix(tensor)
    model.check_width(rows.shape[1])
    if top_k is not None and not 1 <= top_k <= len(model.top.members):
        raise HocketError(
            Reason.TOP_K_OUT_OF_RANGE, f"top_k must be 1 to {len(model.top.members)} for {model.name}", field="top_k"
        )
    load = Load(lambda leaf: loads.by_expert.get(model.leaves[leaf].name, 0), in_flight_max)
    selection = _select(model, rows, load, top_k, given_up)
    chosen: list[int] = np.flatnonzero(selection.weights.any(axis=0)).tolist()
    _check_answer_size(len(rows), model, chosen)
    chosen.sort(key=lambda leaf: model.leaves[leaf].expert)
    planned, placed = [], []
    for some in _slices(chosen, _SLICE_VALUES // len(rows), given_up):
        for leaf, weights in zip(some, selection.weights[:, some].T.tolist(), strict=True):
            replicas, unavailable = _replicas(model.leaves[leaf], snapshot.workers, loads)
            planned.append(_planned(model.leaves[leaf], weights, replicas, unavailable))
            placed.append((model.leaves[leaf].name, replicas[0].name if replicas else None))
    plan = _plan(address, model, snapshot, len(rows), planned)
    leaves = tuple(model.leaves[leaf] for leaf in chosen)
    if (output_range := union_range(leaves)) is not None:
        plan.output_range.lower, plan.output_range.upper = output_range
    plan.overflowed.extend(model.leaves[leaf].name for leaf in sorted(selection.overflowed))
    degradations = _degradations(leaves, selection)
    return Decision(model, rows, selection, plan, placed, degradations, time.perf_counter() - begin)


def _select(
    model: Model, rows: NDArray[np.float32], load: Load, top_k: int | None, given_up: threading.Event | None
) -> Selection:
    row_work = max(rows.shape[1], _SORTING) * len(model.leaves)
    parts = [
        select(model.top, some, len(model.leaves), load, top_k)
        for some in _slices(rows, _SLICE_WORK // row_work, given_up)
    ]
    if len(parts) == 1:
        return parts[0]
    overflowed = set().union(*(part.overflowed for part in parts))
    return Selection(np.concatenate([part.weights for part in parts]), overflowed)


def _slices(of: _Sliceable, size: int, given_up: threading.Event | None) -> Iterator[_Sliceable]:
    size = max(1, size)
    for start in range(0, len(of), size):
        if given_up is not None and given_up.is_set():
            raise asyncio.CancelledError
        yield of[start : start + size]


def _check_answer_size(row_count: int, model: Model, chosen: Sequence[int]) -> None:
    columns = max(model.column_count, *(len(model.leaves[leaf].columns) for leaf in chosen))
    if row_count * columns > ANSWER_VALUES_MAX:
        raise HocketError(
            Reason.BAD_TENSOR,
            f"{row_count} rows of {columns} columns are too large an answer: send at most "
            f"{max(1, ANSWER_VALUES_MAX // columns)} rows at once",
            field="input.shape[0]",
        )


def _replicas(leaf: Leaf, workers: Sequence[Worker], loads: Loads) -> tuple[list[Worker], str]:
    package = leaf.package
    if leaf.refusal is not None:
        return [], leaf.refusal
    able = [worker for worker in workers if worker.opens(package)] if package.model.encrypted else workers
    if workers and not able:
        return [], Reason.ENCRYPTED
    replicas = place(package.digest, package.model.parameter_bytes, package.format, able, loads)
    return replicas, "" if replicas else Reason.NO_REPLICA


def _planned(leaf: Leaf, weights: list[float], replicas: Sequence[Worker], unavailable: str) -> plan_pb2.PlannedExpert:
    rows = [row for row, weight in enumerate(weights) if weight > 0]
    return plan_pb2.PlannedExpert(
        expert=leaf.name,
        rows=rows,
        weights=weights if len(rows) == len(weights) else [weights[row] for row in rows],
        columns=leaf.columns,
        replicas=[
            plan_pb2.Replica(worker=worker.name, address=worker.address, resident=leaf.expert.digest in worker.resident)
            for worker in replicas
        ],
        unavailable_reason=unavailable,
    )


def _plan(
    address: str, model: Model, snapshot: Snapshot, row_count: int, planned: Sequence[plan_pb2.PlannedExpert]
) -> plan_pb2.Plan:
    return plan_pb2.Plan(
        mode=plan_pb2.MODE_PASS if len(model.leaves) == 1 else plan_pb2.MODE_VECTOR,
        model=address,
        digest=model.digest,
        revision=snapshot.revision,
        row_count=row_count,
        column_count=model.column_count,
        labels=model.labels,
        experts=planned,
    )


def _degradations(leaves: Sequence[Leaf], selection: Selection) -> list[str]:
    degradations = []
    if selection.overflowed:
        degradations.append("CAPACITY_OVERFLOW")
    if any(leaf.package.unsigned_by_policy for leaf in leaves):
        degradations.append("UNSIGNED_EXPERT")
    return degradations
