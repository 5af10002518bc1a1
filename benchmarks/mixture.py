"""What every server under test serves: four linear experts behind a softmax gate, asked for one row.

Needs only numpy: peers import it in environments of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NAME: Final = "bench"
FEATURES: Final = 768
EXPERTS: Final = 4
DESCRIPTION: Final = f"{EXPERTS} linear experts, {FEATURES} features, one row"
_TOLERANCE: Final = 1e-4
"""How far an answer may lie from that of float64 mathematics: some experts compute in float32, sums of 768 products."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Four linear experts behind a softmax gate, in numpy.

    Args:
        gate: float64 `[F, E]`.
        experts: float64 `[F, E]`.
        biases: float64 `[E]`.
    """

    gate: NDArray[np.float64]
    experts: NDArray[np.float64]
    biases: NDArray[np.float64]

    @classmethod
    def random(cls) -> Mixture:
        """The one of all benchmarks."""
        random = np.random.default_rng(0)
        shape = (FEATURES, EXPERTS)
        gate = (random.standard_normal(shape) * 0.02).astype(np.float32)
        experts = random.standard_normal(shape).astype(np.float32)
        biases = random.standard_normal(EXPERTS).astype(np.float32)
        return cls(gate.astype(float), experts.astype(float), biases.astype(float))

    @classmethod
    def read(cls, path: Path) -> Mixture:
        """The one that `write` has written."""
        with np.load(path) as saved:
            return cls(saved["gate"], saved["experts"], saved["biases"])

    def write(self, path: Path) -> None:
        """Keep it for servers in other processes, as `.npz`."""
        np.savez(path, gate=self.gate, experts=self.experts, biases=self.biases)

    def weigh(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """The gate's weights, float64 `[N, E]`, for float32 `[N, F]`."""
        logits = rows @ self.gate
        weights: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    def answer(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weighted sum, float32 `[N, 1]`."""
        return self.mix(self.weigh(rows), rows @ self.experts + self.biases)

    def mix(self, weights: NDArray[np.float64], outputs: NDArray[np.float64]) -> NDArray[np.float32]:
        """The weighted sum, float32 `[N, 1]`, of outputs float64 `[N, E]`."""
        value: NDArray[np.float32] = (weights * outputs).sum(axis=1, keepdims=True).astype(np.float32)
        return value


def row() -> NDArray[np.float32]:
    """The row that every call sends, float32 `[1, F]`."""
    return np.random.default_rng(1).standard_normal((1, FEATURES)).astype(np.float32)


def check(name: str, value: bytes) -> None:
    """Pass if a server's answer to that row, little-endian float32, is right.

    Raises:
        RuntimeError: It is not.
    """
    expected = Mixture.random().answer(row())
    if not np.allclose(np.frombuffer(value, dtype="<f4"), expected, rtol=0.0, atol=_TOLERANCE):
        raise RuntimeError(f"{name} answers something else")
