"""Scalers: what moves and stretches each column by itself, and how that is folded into what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from hocket.packages.from_sklearn.reading import Estimator, bad, kind_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation that a scaler does to every column, in float64.

    Args:
        operation: What.
        values: With what, float64 `[F]`.
    """

    operation: Literal["add", "subtract", "multiply", "divide"]
    values: NDArray[np.float64]

    def apply(self, x: NDArray[np.float64], columns: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        """Values of some columns after it."""
        change = _OPERATIONS[self.operation]
        changed: NDArray[np.float64] = change(x, self.values[columns])
        return changed


Steps: TypeAlias = tuple[Step, ...]
_OPERATIONS: Final[dict[str, np.ufunc]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
}


def steps_of(scaler: Estimator) -> Steps:
    """What a scaler does, in its own order."""
    kind = "passthrough" if scaler is None or isinstance(scaler, str) else kind_of(scaler)
    if getattr(scaler, "clip", False):
        raise bad(f"a {kind} that clips cannot be folded into what follows: fit it with clip=False")
    match kind:
        case "passthrough":
            found: tuple[tuple[Any, Any], ...] = ()
        case "StandardScaler":
            found = (("subtract", scaler.mean_ if scaler.with_mean else None), ("divide", scaler.scale_))
        case "MinMaxScaler":
            found = (("multiply", scaler.scale_), ("add", scaler.min_))
        case "MaxAbsScaler":
            found = (("divide", scaler.scale_),)
        case "RobustScaler":
            found = (("subtract", scaler.center_), ("divide", scaler.scale_))
        case _:
            raise bad(
                f"{kind} cannot be folded into what follows it: a pipeline may have StandardScaler, MinMaxScaler, "
                "MaxAbsScaler and RobustScaler before its estimator; apply anything else to the rows beforehand"
            )
    return tuple(Step(operation, np.asarray(values, np.float64)) for operation, values in found if values is not None)


def affine(steps: Steps, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All steps as one: x * factor + offset, each float64 `[F]`."""
    zero = np.zeros(width)
    offset = zero
    factor = np.ones(width)
    for step in steps:
        offset = step.apply(offset, slice(None))
        if step.operation in {"multiply", "divide"}:
            factor = step.apply(factor, slice(None))
    return factor, offset


def folded(
    coefficients: Estimator,
    intercept: Estimator,
    steps: Steps,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights `[F, outputs]` and biases `[outputs]` that take rows as they are before the scalers."""
    weights = np.asarray(coefficients.toarray() if hasattr(coefficients, "toarray") else coefficients, np.float64)
    factor, offset = affine(steps, len(weights))
    return weights * factor[:, None], np.asarray(intercept, np.float64) + offset @ weights
