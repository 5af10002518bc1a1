"""Features of the input -> a weight per member.

Logits are accumulated in float64 and the softmax is rounded to float32: members with equal columns then get equal
weights whatever order a matrix library sums in, so that ties are ties (and go to the earlier member), as in the
reference, which computes in float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hocket.mixtures import FixedGate, SoftmaxGate


@dataclass(frozen=True, slots=True)
class Gate:
    """Weights `softmax((x @ W + bias) / temperature)`; a fixed gate has no W.

    Args:
        kind: `softmax` or `fixed`.
        slope: W / temperature, float64 `[F, E]`; None for a fixed gate.
        offset: bias / temperature, or the fixed weights scaled to sum 1; float64 `[E]`.
    """

    kind: str
    slope: NDArray[np.float64] | None
    offset: NDArray[np.float64]

    def weigh(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """A weight per member for each row: `[N, E]`, not negative, each row summing to 1 within float32."""
        if self.slope is None:
            return np.broadcast_to(self.offset, (len(rows), len(self.offset)))
        logits = rows.astype(np.float64) @ self.slope + self.offset
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits.astype(np.float32).astype(np.float64)


def softmax_gate(gate: SoftmaxGate, weights: NDArray[np.float32]) -> Gate:
    """A gate from its record and its tensor, float32 `[F, E]`."""
    bias = np.zeros(gate.experts) if gate.bias is None else np.array(gate.bias, dtype=np.float64)
    return Gate("softmax", weights.astype(np.float64) / gate.temperature, bias / gate.temperature)


def fixed_gate(gate: FixedGate) -> Gate:
    """A gate that ignores its input."""
    weights = np.array(gate.weights, dtype=np.float64)
    return Gate("fixed", None, weights / weights.sum())


def lone_gate() -> Gate:
    """The gate of a model with one expert."""
    return Gate("none", None, np.ones(1))
