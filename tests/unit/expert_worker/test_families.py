"""Naive Bayes, margins, boosting, dense networks and neighbours: their ties, their edges, and what decides them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hocket.packages import model as m
from services.expert_worker.families import Layer
from tests import apr_oracle
from tests.builders import dense, floats, grow, neighbors
from tests.worker_numerics import answer, assert_meets_the_oracle, lone

GRID = st.sampled_from([0.0, 1.0, 1.0 + 2.0**-23, 1e-3, -1.0, 3.0, 1e-30, -2.5])
BIG = float(np.finfo(np.float32).max)


class TestNaiveBayes:
    def test_a_class_that_never_is_gets_nothing(self) -> None:
        model = m.GaussianNB(floats(0, 1), floats([0], [9]), floats([1], [1]), np.array([0, 1], np.uint64))

        assert answer(lone(model), [[0.0]]).tolist() == [[0.0, 1.0]]

    def test_rows_beyond_all_likelihood_are_still_told_apart(self) -> None:
        model = m.GaussianNB(floats(0.5, 0.5), floats([0], [1]), floats([1e-9], [1e-9]), np.array([0, 1], np.uint64))

        assert answer(lone(model), [[-BIG], [-1.0], [0.5], [2.0]]).tolist() == [[0.5, 0.5], [1, 0], [0.5, 0.5], [0, 1]]

    def test_more_than_the_workspace_holds_is_done_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(2)
        classes = np.arange(5, dtype=np.uint64)
        means, variances = rng.normal(size=(5, 7)).astype(np.float32), rng.uniform(1, 2, (5, 7)).astype(np.float32)
        expert = lone(m.GaussianNB(np.full(5, 0.2, np.float32), means, variances, classes))
        rows = rng.normal(size=(9, 7)).astype(np.float32)
        whole = answer(expert, rows)
        monkeypatch.setattr("services.expert_worker.compute._WORKSPACE_VALUES", 16)

        assert answer(expert, rows).tobytes() == whole.tobytes()


class TestMargins:
    def test_a_margin_of_zero_is_column_1(self) -> None:
        model = m.LinearSVM(floats(1), -1.0)

        assert answer(lone(model), [[1.0], [np.nextafter(np.float32(1), np.float32(0))]]).tolist() == [[0, 1], [1, 0]]

    def test_float32_rounding_decides_as_in_the_reference(self) -> None:
        # 1 + 2**-25 - 1 is above 0, but not in float32, where the first sum is 1.
        model = m.LinearSVM(floats(2.0**-25, -1.0, -(2.0**-27)), 1.0)

        assert answer(lone(model), [[1, 1, 1]]).tolist() == [[1.0, 0.0]]
        assert_meets_the_oracle(model, floats([1, 1, 1]))

    @settings(max_examples=60, deadline=None)
    @given(arrays(np.float32, 4, elements=GRID), arrays(np.float32, (5, 4), elements=GRID), GRID)
    def test_margins_near_zero_fall_as_in_the_reference(self, weights: Any, rows: Any, bias: float) -> None:
        assert_meets_the_oracle(m.LinearSVM(weights, float(np.float32(bias))), rows)

    def test_a_margin_beyond_float32_is_the_reference_s(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            assert_meets_the_oracle(m.LinearSVM(floats(BIG, -BIG), 0.0), floats([3, 1], [1, 3], [3, 3], [1, 1]))
            # float64 adds these up to less than 0; in float32 the first two are infinite, and stay so.
            model = m.LinearSVM(floats(3e38, 3e38, -3e38, -3e38, -3e38), 0.0)
            assert_meets_the_oracle(model, np.ones((1, 5), np.float32))
            assert answer(lone(model), np.ones((1, 5))).tolist() == [[0, 1]]
            assert answer(lone(model), np.full((1, 5), 0.1)).tolist() == [[1, 0]], "which float32 can hold"


class TestBoosting:
    def test_steps_are_added_in_float32_in_file_order(self) -> None:
        tree = m.DecisionTreeClassifier(grow((0, 0.0, (0, 1), (2, 1))))
        model = m.GradientBoostingClassifier((tree,) * 9, init_prediction=1e8, learning_rate=3.0)
        # 1e8 + 3 is 1e8 + 0 in float32, whose step there is 8: nine steps of 3 change nothing.
        total = 1.0 / (1.0 + math.exp(-1e8))

        assert answer(lone(model), [[1.0]]).tolist() == [[1 - total, total]]
        small = replace(model, init_prediction=0.0, learning_rate=0.25)
        expected = 1.0 / (1.0 + math.exp(-2.25))
        np.testing.assert_allclose(
            answer(lone(small), [[1.0], [-1.0]]), [[1 - expected, expected], [expected, 1 - expected]], atol=1e-7
        )

    def test_a_probability_of_one_half_is_shown_as_that_and_whoever_picks_takes_the_first(self) -> None:
        """The reference answers class 1 there, of boosting and of logistic regression."""
        tree = m.DecisionTreeClassifier(grow((0, 0.0, (0, 1), (1, 1))), n_features=1)
        boosting = m.GradientBoostingClassifier((tree,), init_prediction=-0.25, learning_rate=0.25, n_features=1)

        for model in (boosting, m.LogisticRegression(floats(1), -1.0)):
            given = answer(lone(model), [[1.0]])
            assert given.tolist() == [[0.5, 0.5]]
            assert given.argmax(axis=1).tolist() == [0]

    def test_any_answer_but_0_is_a_step_up(self) -> None:
        tree = m.DecisionTreeClassifier(grow((5, 1)), n_features=1)
        model = m.GradientBoostingClassifier((tree,), init_prediction=0.0, n_features=1)

        assert answer(lone(model), [[0.0]])[0, 1] > 0.5


class TestNeighbours:
    def test_of_equal_distances_the_row_stored_first_is_nearer(self) -> None:
        model = m.KNearestNeighbors(1, floats([2, 0], [0, 0], [0, 0]), np.array([0, 1, 2], np.uint64))

        assert answer(lone(model), [[1, 0], [0, 0]]).argmax(axis=1).tolist() == [0, 1]

    def test_tied_votes_go_to_the_smallest_column(self) -> None:
        model = neighbors(k=2, y_train=np.array([1, 0, 0, 0, 0], np.uint64))

        assert answer(lone(model), [[0.4, 0.0]]).tolist() == [[0.5, 0.5]]

    def test_roots_that_are_equal_in_float32_tie_though_their_squares_differ(self) -> None:
        far = np.nextafter(np.float32(4), np.float32(5))
        samples = floats([np.sqrt(far, dtype=np.float32)], [2.0])
        model = m.KNearestNeighbors(1, samples, np.array([0, 1], np.uint64))

        assert_meets_the_oracle(model, floats([0.0]))
        tied = m.KNearestNeighbors(1, floats([2.0, 3e-4], [2.0, 0.0]), np.array([0, 1], np.uint64))
        assert answer(lone(tied), [[0.0, 0.0]]).tolist() == [[1.0, 0.0]], "the first, though the second is nearer"
        assert_meets_the_oracle(tied, floats([0.0, 0.0]))

    def test_a_neighbour_at_the_very_place_counts_as_one_at_distance_1(self) -> None:
        model = neighbors(k=2, weighted=True, y_train=np.array([0, 1, 0, 0, 0], np.uint64))

        np.testing.assert_allclose(answer(lone(model), [[0, 0], [0.25, 0]]), [[0.5, 0.5], [0.75, 0.25]], atol=1e-7)

    def test_neighbours_infinitely_far_count_alike(self) -> None:
        samples = floats([-BIG], [-BIG / 2], [-BIG / 4])
        model = m.KNearestNeighbors(2, samples, np.array([0, 1, 1], np.uint64), weighted=True)

        assert answer(lone(model), [[BIG]]).tolist() == [[0.5, 0.5]]

    def test_all_rows_may_vote(self) -> None:
        model = neighbors(k=5)

        assert answer(lone(model), [[0, 0], [9, 9]]).tolist() == [[np.float32(0.4), np.float32(0.6)]] * 2

    @pytest.mark.parametrize("power", [0.05, 0.5, 1.5, 2.0, 7.0, 300.0])
    def test_any_power_chooses_as_float32_does(self, power: float) -> None:
        rng = np.random.default_rng(int(power * 100))
        samples = rng.normal(size=(30, 3)).astype(np.float32)
        classes = rng.integers(3, size=30).astype(np.uint64)
        model = m.KNearestNeighbors(4, samples, classes, m.Metric.MINKOWSKI, power)
        with np.errstate(over="ignore", under="ignore"):
            assert_meets_the_oracle(model, rng.normal(size=(20, 3)).astype(np.float32))

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_near_ties_fall_as_in_the_reference(self, data: st.DataObject) -> None:
        count, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
        samples = data.draw(arrays(np.float32, (count, width), elements=GRID))
        classes = data.draw(arrays(np.uint64, count, elements=st.integers(0, 2)))
        rows = data.draw(arrays(np.float32, (3, width), elements=GRID))
        k, weighted = data.draw(st.integers(1, count)), data.draw(st.booleans())
        metric = data.draw(st.sampled_from([m.Metric.EUCLIDEAN, m.Metric.MANHATTAN]))
        assert_meets_the_oracle(m.KNearestNeighbors(k, samples, classes, metric, weighted=weighted), rows)

    def test_data_far_from_the_origin_is_told_apart_as_well(self) -> None:
        rng = np.random.default_rng(8)
        samples = (rng.normal(size=(200, 5)) + 1e4).astype(np.float32)
        model = m.KNearestNeighbors(7, samples, rng.integers(3, size=200).astype(np.uint64))

        assert_meets_the_oracle(model, (rng.normal(size=(20, 5)) + 1e4).astype(np.float32))

    def test_more_rows_than_the_workspace_holds_are_done_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.compute._WORKSPACE_VALUES", 16)
        rng = np.random.default_rng(1)
        samples, classes = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(3, size=20).astype(np.uint64)
        rows = rng.normal(size=(9, 3)).astype(np.float32)

        for metric in (m.Metric.EUCLIDEAN, m.Metric.MANHATTAN):
            assert_meets_the_oracle(m.KNearestNeighbors(3, samples, classes, metric), rows)
            assert_meets_the_oracle(m.KNearestNeighbors(3, samples, classes, metric, weighted=True), rows)


class TestNetworks:
    def sums(self, weights: Any, biases: Any, rows: Any) -> Any:
        layer = Layer(torch.from_numpy(weights), torch.from_numpy(biases), m.Activation.IDENTITY)
        return layer(torch.from_numpy(rows)).numpy()

    def exact(self, weights: Any, biases: Any, rows: Any) -> Any:
        """Each sum as if made exactly and then rounded, to float64 and to float32."""
        w, b, x = (array.astype(np.float64) for array in (weights, biases, rows))
        return np.array(
            [[math.fsum([*(row * column), bias]) for column, bias in zip(w.T, b, strict=True)] for row in x], np.float32
        )

    @pytest.mark.parametrize("width", [1, 7, 64, 700])
    def test_sums_are_rounded_once(self, width: int) -> None:
        rng = np.random.default_rng(width)
        weights, biases = rng.normal(size=(width, 11)).astype(np.float32), rng.normal(size=11).astype(np.float32)
        rows = rng.normal(size=(17, width)).astype(np.float32)

        assert self.sums(weights, biases, rows).tobytes() == self.exact(weights, biases, rows).tobytes()

    @settings(max_examples=60, deadline=None)
    @given(
        arrays(np.float32, (5, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
        arrays(np.float32, 3, elements=GRID),
        arrays(np.float32, (2, 5), elements=st.floats(-1e6, 1e6, width=32)),
    )
    def test_sums_that_cancel_are_too(self, weights: Any, biases: Any, rows: Any) -> None:
        weights = np.concatenate((weights, -weights))
        rows = np.concatenate((rows, np.nextafter(rows, np.float32(9))), axis=1)
        with np.errstate(over="ignore"):
            expected = np.clip(self.exact(weights, biases, rows), -BIG, BIG) + np.float32(0)

        assert self.sums(weights, biases, rows).tobytes() == expected.tobytes()

    @pytest.mark.parametrize("share", [1, 10**9], ids=["one by one", "all together"])
    @pytest.mark.parametrize("spread", [0, 40])
    def test_exact_sums_are_the_same_either_way(self, share: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.families._PAIRS_SHARE", share)
        monkeypatch.setattr("services.expert_worker.compute._WORKSPACE_VALUES", 64)
        rng = np.random.default_rng(spread)
        powers = np.exp2(rng.integers(-spread, spread + 1, size=12)).astype(np.float32)
        half, rows = rng.normal(size=(12, 9)).astype(np.float32), rng.normal(size=(7, 12)).astype(np.float32) * powers
        rows[2], half[:, 3] = 0, 0
        weights, biases = np.concatenate((half, -half)), (rng.normal(size=9) * 2.0**-60).astype(np.float32)
        rows = np.concatenate((rows, np.nextafter(rows, np.float32(9))), axis=1)

        assert self.sums(weights, biases, rows).tobytes() == self.exact(weights, biases, rows).tobytes()

    def test_sums_that_somebody_has_made_cancel_are_not_added_term_by_term(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = np.random.default_rng(9)
        half, rows = rng.normal(size=(200, 60)).astype(np.float32), rng.normal(size=(50, 200)).astype(np.float32)
        weights, rows = np.concatenate((half, -half)), np.concatenate((rows, rows), axis=1)
        added = 0

        def counted(terms: list[float]) -> float:
            nonlocal added
            added += len(terms)
            return fsum(terms)

        fsum = math.fsum
        monkeypatch.setattr(math, "fsum", counted)

        assert not self.sums(weights, np.zeros(60, np.float32), rows).any()
        assert 0 < added <= 50 * 60 * 20, "of 400 terms each"

    def test_a_zero_has_one_sign(self) -> None:
        rows, weights = np.zeros((2, 3), np.float32), np.full((3, 2), -1, np.float32)

        assert not np.signbit(self.sums(weights, floats(-0.0, 0.0), rows)).any()

    @pytest.mark.parametrize("name", list(m.Activation))
    def test_every_activation_is_its_function(self, name: m.Activation) -> None:
        rng = np.random.default_rng(4)
        weights, biases = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
        model = dense((weights, biases, name), (weights.T[:, :2].copy(), biases[:2], "identity"))
        rows = rng.normal(size=(30, 4)).astype(np.float32)

        np.testing.assert_allclose(
            answer(lone(model), rows), apr_oracle.predict(model, rows), rtol=1e-5, atol=1e-6 * np.exp(5)
        )

    def test_one_logistic_output_is_answered_as_two_columns(self) -> None:
        model = dense((floats([1], [2]), floats(-1), "logistic"))
        logistic = m.LogisticRegression(floats(1, 2), -1.0)
        rows = np.random.default_rng(3).normal(size=(20, 2)).astype(np.float32)

        np.testing.assert_allclose(answer(lone(model), rows), answer(lone(logistic), rows), atol=1e-7)

    def test_several_logistic_outputs_are_columns_of_their_own(self) -> None:
        model = dense((floats([1, -1]), floats(0, 0), "logistic"))

        p = 1 / (1 + math.exp(-9))
        np.testing.assert_allclose(answer(lone(model), [[0.0], [9.0]]), [[0.5, 0.5], [p, 1 - p]], atol=1e-7)

    def test_what_overflows_on_the_way_is_as_large_as_can_be(self) -> None:
        hidden = (floats([BIG, -BIG]), floats(0, 0), "relu")
        numbers = dense(hidden, (floats([1, -1], [1, 1]), floats(0, 0), "identity"))
        labels = dense(hidden, (floats([1, -1], [1, 1]), floats(0, 0), "softmax"))

        assert answer(lone(numbers), [[9.0]]).tolist() == [[BIG, -BIG]]
        assert answer(lone(labels), [[9.0]]).tolist() == [[1.0, 0.0]]
        assert answer(lone(dense((floats([1]), floats(0), "exp"))), [[1000.0]]).tolist() == [[BIG]]

    @pytest.mark.parametrize("name", ["tanh", "softmax", "exp", "logistic"])
    def test_functions_round_alike_at_every_place(self, name: str) -> None:
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(3, 5)).astype(np.float32)
        expert = lone(dense((weights, np.zeros(5, np.float32), name)))
        rows = rng.normal(size=(1001, 3)).astype(np.float32)

        together = answer(expert, rows)

        alone = np.concatenate([answer(expert, row[None]) for row in rows])
        assert together.tobytes() == alone.tobytes()
