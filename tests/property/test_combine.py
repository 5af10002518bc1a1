"""The algebra of the weighted mean."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.aggregator.combine import Share, combine

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS, COLUMNS = 3, 2


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Share], list[NDArray[np.float32]]]:
    """A plan whose weights sum to 1 in each row, and an output per expert within [-1, 1]."""
    count = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = random.random((count, ROWS)) < 0.7
    chosen[0] |= ~chosen.any(axis=0)
    weights = random.random((count, ROWS)) * chosen
    weights /= weights.sum(axis=0)
    shares, outputs = [], []
    for place in range(count):
        rows = np.flatnonzero(chosen[place])
        if len(rows) == 0:
            continue
        columns = random.permutation([0, 1, -1]) if random.random() < 0.5 else np.array([0, 1])
        everywhere = len(rows) == ROWS and random.random() < 0.5
        whole = len(columns) == COLUMNS and random.random() < 0.5
        shares.append(
            Share(slice(None) if everywhere else rows, weights[place, rows], slice(None) if whole else columns)
        )
        outputs.append(random.uniform(-1, 1, (len(rows), len(columns))).astype(np.float32))
    return shares, outputs


def with_missing(outputs: list[NDArray[np.float32]], present: tuple[bool, ...]) -> list[NDArray[np.float32] | None]:
    return [output if here else None for output, here in zip(outputs, present, strict=True)]


@given(plans())
def test_the_whole_answer_is_the_weighted_mean(plan: tuple[list[Share], list[NDArray[np.float32]]]) -> None:
    shares, outputs = plan
    expected = np.zeros((ROWS, COLUMNS))
    for share, output in zip(shares, outputs, strict=True):
        rows = np.arange(ROWS)[share.rows]
        columns = np.arange(COLUMNS) if isinstance(share.columns, slice) else share.columns
        for place, row in enumerate(rows):
            for source, target in enumerate(columns):
                if target >= 0:
                    expected[row, target] += share.weights[place] * float(output[place, source])
    combined = combine(shares, outputs, (ROWS, COLUMNS), (-1.0, 1.0))
    np.testing.assert_allclose(combined.value, expected, rtol=1e-6, atol=1e-7)
    assert (combined.coverage == 1.0).all()


@given(plans())
def test_bounds_hold_every_completion_whatever_is_missing(
    plan: tuple[list[Share], list[NDArray[np.float32]]],
) -> None:
    shares, outputs = plan
    patterns = list(itertools.product([False, True], repeat=len(shares)))
    finals = {
        pattern: combine(shares, with_missing(outputs, pattern), (ROWS, COLUMNS), (-1.0, 1.0)) for pattern in patterns
    }
    for early, late in itertools.product(patterns, repeat=2):
        if not all(b or not a for a, b in zip(early, late, strict=True)):
            continue  # what has arrived does not go away
        answered = finals[late].coverage > 0
        lower, upper = finals[early].lower, finals[early].upper
        assert lower is not None
        assert upper is not None
        assert (lower <= finals[late].value)[answered].all()
        assert (finals[late].value <= upper)[answered].all()


@given(plans())
def test_weights_of_the_present_sum_to_one_per_row(plan: tuple[list[Share], list[NDArray[np.float32]]]) -> None:
    shares, outputs = plan
    for pattern in itertools.product([False, True], repeat=len(shares)):
        present = with_missing(outputs, pattern)
        sums = np.zeros(ROWS)
        combined = combine(shares, present, (ROWS, COLUMNS), None)
        for share, effective in zip(shares, combined.weights, strict=True):
            sums[share.rows] += effective
        coverage = combined.coverage
        np.testing.assert_allclose(sums, (coverage > 0).astype(float), atol=1e-12)


def test_a_row_nobody_has_answered_is_zero_with_no_coverage() -> None:
    share = Share(np.array([1]), np.array([1.0]), np.array([0]))
    combined = combine([share, share], [None, None], (2, 1), (2.0, 5.0))
    assert combined.value.tolist() == [[0.0], [0.0]]
    assert combined.coverage.tolist() == [0.0, 0.0]


def test_without_a_known_range_there_are_no_bounds() -> None:
    share = Share(np.array([0]), np.array([1.0]), np.array([0]))
    combined = combine([share], [np.array([[3.0]], dtype=np.float32)], (1, 1), None)
    assert (combined.lower, combined.upper) == (None, None)
    assert combined.value.tolist() == [[3.0]]
