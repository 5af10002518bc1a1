"""The router's decision alone: gate and top-k, beside the floor of reading the gate's weights once."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.report import record
from hocket.mixtures import SoftmaxGate
from services.router.gating import softmax_gate
from services.router.selection import Level, Load, select

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES: Final = 768
_BUDGET_MS: Final = {1_000: 1.0, 10_000: 20.0}
_REPEATS: Final = 400


def _level(experts: int, random: np.random.Generator, first: int = 0) -> Level:
    weights = random.standard_normal((FEATURES, experts)).astype(np.float32)
    gate = softmax_gate(SoftmaxGate(FEATURES, experts, ""), weights)
    return Level(gate, tuple(range(first, first + experts)), 2)


def _hierarchy(experts: int, random: np.random.Generator) -> Level:
    """The same number of experts in groups of its square root."""
    groups = round(experts**0.5)
    size = experts // groups
    below = tuple(_level(size, random, group * size) for group in range(groups))
    weights = random.standard_normal((FEATURES, groups)).astype(np.float32)
    return Level(softmax_gate(SoftmaxGate(FEATURES, groups, ""), weights), below, 2)


def _times(function: Callable[[], object]) -> list[float]:
    for _ in range(20):
        function()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-save", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    row = random.standard_normal((1, FEATURES)).astype(np.float32)
    idle = Load(lambda _: 0, 256)
    rows, notes = [], {}
    for experts in (4, 100, 1_000, 10_000):
        weights = random.standard_normal((FEATURES, experts))
        for name, level in (("dense", _level(experts, random)), ("hierarchical", _hierarchy(experts, random))):
            count = max(leaf for leaf in _leaves(level)) + 1
            times = _times(lambda level=level, count=count: select(level, row, count, idle))  # type: ignore[misc]  # defaults bind the loop variables
            floor = statistics.median(_times(lambda weights=weights: weights.sum()))  # type: ignore[misc]  # the same
            p99 = float(np.quantile(times, 0.99))
            figures: dict[str, Any] = {
                "gate": name,
                "experts": f"{experts:,}",
                "p50 ms": statistics.median(times),
                "p99 ms": p99,
                "floor ms": floor,
            }
            rows.append(figures)
            if name == "dense" and experts in _BUDGET_MS:
                notes[f"dense, {experts:,} experts"] = f"p99 {p99:.3f} ms of a budget of {_BUDGET_MS[experts]:g} ms"
    notes["floor"] = "the weights of the dense gate read once (sum of float64)"
    record("gate", rows, notes, save=not arguments.no_save)


def _leaves(level: Level) -> list[int]:
    return [leaf for member in level.members for leaf in (_leaves(member) if isinstance(member, Level) else [member])]


if __name__ == "__main__":
    main()
