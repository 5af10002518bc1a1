"""Gates, top-k, capacity and nesting."""

from __future__ import annotations

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.mixtures import FixedGate, SoftmaxGate
from services.router.gating import Gate, fixed_gate, softmax_gate
from services.router.selection import Level, Load, scores, select

IDLE = Load(lambda _: 0, 100)
ANY = np.ones((1, 1), dtype=np.float32)


def gate(*weights: float) -> Gate:
    return fixed_gate(FixedGate(weights))


def reference_gate(features: int, experts: int, temperature: float) -> Gate:
    """The reference's untrained gate: s * (0.1 * (i + j) - 0.5), s = sqrt(2 / (F + E))."""
    i, j = np.meshgrid(np.arange(features), np.arange(experts), indexing="ij")
    weights = (np.sqrt(2 / (features + experts)) * (0.1 * (i + j) - 0.5)).astype(np.float32)
    return softmax_gate(SoftmaxGate(features, experts, "", temperature), weights)


@pytest.mark.parametrize(
    ("experts", "temperature", "expected"),
    [
        (3, 1.0, [0.1779604, 0.3037130, 0.5183266]),
        (3, 0.1, [2.2652714e-05, 4.748113e-03, 0.99522924]),
        (3, 10.0, [0.3156830, 0.3330161, 0.3513009]),
        (2, 1.0, [0.3595425, 0.6404575]),
    ],
)
def test_the_softmax_gate_gives_the_reference_weights(experts: int, temperature: float, expected: list[float]) -> None:
    row = np.array([[1, 2, 3, 4]], dtype=np.float32)
    np.testing.assert_allclose(reference_gate(4, experts, temperature).weigh(row)[0], expected, rtol=2e-5)


@pytest.mark.parametrize(("top_k", "expected"), [(1, 30.0), (2, 26.30538), (3, 23.40366)])
def test_top_k_renormalises_over_the_chosen(top_k: int, expected: float) -> None:
    level = Level(reference_gate(4, 3, 1.0), (0, 1, 2), top_k)
    selection = select(level, np.array([[1, 2, 3, 4]], dtype=np.float32), 3, IDLE)
    assert selection.weights[0] @ [10, 20, 30] == pytest.approx(expected, rel=1e-6)
    assert np.count_nonzero(selection.weights) == top_k


def test_ties_go_to_the_earlier_member() -> None:
    assert select(Level(gate(1, 1, 1), (0, 1, 2), 2), ANY, 3, IDLE).weights.tolist() == [[0.5, 0.5, 0.0]]


def test_equal_columns_tie_exactly_however_wide_the_gate() -> None:
    random = np.random.default_rng(0)
    column = random.standard_normal((768, 1)).astype(np.float32)
    for count in (2, 3, 7, 64, 1000):
        weights = np.repeat(column, count, axis=1)
        level = Level(softmax_gate(SoftmaxGate(768, count, ""), weights), tuple(range(count)), 1)
        for _ in range(3):
            row = random.standard_normal((1, 768)).astype(np.float32)
            assert np.flatnonzero(select(level, row, count, IDLE).weights).tolist() == [0]


def test_a_request_may_override_top_k() -> None:
    level = Level(gate(3, 2, 1), (0, 1, 2), 1)
    assert select(level, ANY, 3, IDLE, top_k=3).weights[0].tolist() == pytest.approx([0.5, 1 / 3, 1 / 6])


def test_each_row_is_gated_by_itself() -> None:
    weights = np.array([[10.0, -10.0]], dtype=np.float32)
    level = Level(softmax_gate(SoftmaxGate(1, 2, ""), weights), (0, 1), 1)
    rows = np.array([[1.0], [-1.0]], dtype=np.float32)
    assert select(level, rows, 2, IDLE).weights.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_permuting_members_permutes_weights() -> None:
    random = np.random.default_rng(1)
    weights = random.standard_normal((8, 5)).astype(np.float32)
    rows = random.standard_normal((16, 8)).astype(np.float32)
    order = random.permutation(5)
    plain = select(Level(softmax_gate(SoftmaxGate(8, 5, ""), weights), tuple(range(5)), 2), rows, 5, IDLE)
    moved = select(Level(softmax_gate(SoftmaxGate(8, 5, ""), weights[:, order]), tuple(range(5)), 2), rows, 5, IDLE)
    np.testing.assert_allclose(moved.weights, plain.weights[:, order], rtol=1e-12)
    np.testing.assert_allclose(plain.weights.sum(axis=1), 1.0, rtol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    level = Level(softmax_gate(SoftmaxGate(1, 2, "", 1e-6), np.array([[1e30, -1e30]], np.float32)), (0, 1), 2)
    assert select(level, ANY * np.float32(1e30), 2, IDLE).weights.tolist() == [[1.0, 0.0]]


def nested() -> Level:
    """The worked example: a = (.6, .3, .1), b_0 = (.7, .2, .1), b_1 = (.5, .3, .2), two of each."""
    below = [
        Level(gate(0.7, 0.2, 0.1), (0, 1, 2), 2),
        Level(gate(0.5, 0.3, 0.2), (3, 4, 5), 2),
        Level(gate(1.0), (6,), 1),
    ]
    return Level(gate(0.6, 0.3, 0.1), tuple(below), 2)


def test_nested_weights_multiply_with_one_normalisation_at_the_end() -> None:
    weights = select(nested(), ANY, 7, IDLE).weights[0]
    expected = [0.538462, 0.153846, 0, 0.192308, 0.115385, 0, 0]
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_an_expert_reached_twice_counts_once_with_the_sum_of_its_weights() -> None:
    level = Level(gate(1, 1), (Level(gate(1.0), (0,), 1), Level(gate(3, 1), (0, 1), 2)), 2)
    assert select(level, ANY, 2, IDLE).weights[0].tolist() == pytest.approx([0.875, 0.125])


def test_scores_show_the_whole_opinion_of_nested_gates() -> None:
    np.testing.assert_allclose(scores(nested(), ANY, 7)[0], [0.42, 0.12, 0.06, 0.15, 0.09, 0.06, 0.1], atol=1e-12)


def full(*leaves: int) -> Load:
    return Load(lambda leaf: 100 if leaf in leaves else 0, 100)


@pytest.mark.parametrize(("busy", "chosen"), [((), 1), ((1,), 2), ((1, 2), 0), ((0, 1, 2), 3)])
def test_a_full_expert_hands_over_down_the_whole_ranking(busy: tuple[int, ...], chosen: int) -> None:
    level = Level(gate(0.1, 0.5, 0.3, 0.1), (0, 1, 2, 3), 1, capacity_factor=1.0)
    selection = select(level, ANY, 4, full(*busy))
    assert np.flatnonzero(selection.weights).tolist() == [chosen]
    assert selection.overflowed == ({1} if busy else set())


def test_without_a_capacity_factor_a_busy_expert_is_kept() -> None:
    assert np.flatnonzero(select(Level(gate(1, 2), (0, 1), 1), ANY, 2, full(0, 1)).weights).tolist() == [1]


def test_when_every_expert_is_full_the_request_is_refused_with_a_pause() -> None:
    with pytest.raises(HocketError) as caught:
        select(Level(gate(1, 2), (0, 1), 1, capacity_factor=1.0), ANY, 2, full(0, 1))
    assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.CAPACITY, 0.1)


def test_capacity_is_the_share_of_the_routers_limit_with_head_room() -> None:
    level = Level(gate(2, 1), (0, 1), 1, capacity_factor=1.5)
    for running, chosen in ((74, 0), (75, 1)):  # ceil(1.5 * 1 * 100 / 2) = 75
        load = Load(lambda leaf, running=running: running if leaf == 0 else 0, 100)  # type: ignore[misc]  # a default binds the loop variable
        assert np.flatnonzero(select(level, ANY, 2, load).weights).tolist() == [chosen]


def test_a_chosen_expert_whose_weight_underflows_still_answers() -> None:
    weights = np.array([[0.0, -1e6]], dtype=np.float32)
    level = Level(softmax_gate(SoftmaxGate(1, 2, ""), weights), (0, 1), 1, capacity_factor=1.0)
    selection = select(level, ANY, 2, full(0))
    assert selection.weights.tolist() == [[0.0, 1.0]]


def test_overflow_spreads_and_nobody_passes_the_limit() -> None:
    running = [0, 0, 0, 0]
    level = Level(gate(8, 4, 2, 1), (0, 1, 2, 3), 1, capacity_factor=1.0)
    for _ in range(40):
        selection = select(level, ANY, 4, Load(lambda leaf: running[leaf], 40))
        running[int(np.flatnonzero(selection.weights)[0])] += 1
    assert running == [10, 10, 10, 10]
