from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hocket.packages import model as m
from services.expert_worker.loader import prepare
from services.expert_worker.parameters import move
from tests import apr_oracle
from tests.builders import apr_bytes, chain, floats, grow, linear, mixture, models
from tests.reference_files import credential_of
from tests.worker_numerics import (
    RECORDED_MIN,
    answer,
    assert_meets_the_oracle,
    assert_meets_the_record,
    lone,
    on_device,
    opened,
    random_models,
    recorded,
)

if TYPE_CHECKING:
    from hocket.packages import Package
    from services.expert_worker.loader import Expert

SMALL = st.floats(-8, 8, width=32)


@pytest.mark.parametrize("layout", models())
def test_every_layout_answers_like_the_reference(layout: str) -> None:
    rows = np.random.default_rng(3).normal(size=(64, 2)).astype(np.float32) * 3
    assert_meets_the_oracle(models()[layout], rows)


@pytest.mark.parametrize("width", [1, 5, 33])
def test_random_models_answer_like_the_reference(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = rng.normal(size=(50, width)).astype(np.float32)
    for model in random_models(rng, width):
        assert_meets_the_oracle(model, rows)


def test_recorded_answers_of_the_reference_are_met() -> None:
    assert sum(assert_meets_the_record(entry) for entry in recorded()) >= RECORDED_MIN


def test_the_genuine_digit_model_serves() -> None:
    folder = os.environ.get("HOCKET_FIXTURES")
    if not folder:
        pytest.skip("HOCKET_FIXTURES is not set: the genuine files are not here")
    data = (Path(folder) / "apr" / "genuine" / "realizar-mnist_784x2-logreg-v0.11.0.apr").read_bytes()
    rows = np.random.default_rng(0).random((20, 784), dtype=np.float32)
    assert_meets_the_oracle(opened(data).model, rows)


class TestTrees:
    def test_a_value_at_the_threshold_goes_left(self) -> None:
        model = m.DecisionTreeRegressor(grow((0, 1.5, (-1.0, 1), (1.0, 1))))
        above = np.nextafter(np.float32(1.5), np.float32(2))
        assert answer(lone(model), [[1.5], [above]]).tolist() == [[-1.0], [1.0]]

    def test_a_tree_of_one_leaf_answers_it(self) -> None:
        assert answer(lone(m.DecisionTreeRegressor(grow((2.5, 1)), n_features=1)), [[0.0]]).tolist() == [[2.5]]

    def test_deep_and_shallow_trees_share_a_pass(self) -> None:
        model = m.RandomForestRegressor(
            tuple(m.DecisionTreeRegressor(tree) for tree in (chain(40), grow((3.0, 1)), chain(3))), n_estimators=3
        )
        rows = np.linspace(-1, 45, 30, dtype=np.float32).reshape(-1, 1)
        assert_meets_the_oracle(model, rows)

    def test_a_mean_is_a_float32_sum_in_file_order(self) -> None:
        values = [1e8, 1.0, -1e8, 1.0, 3.0]
        model = m.RandomForestRegressor(
            tuple(m.DecisionTreeRegressor(grow((value, 1))) for value in values), n_estimators=5, n_features=1
        )
        assert answer(lone(model), [[0.0]]).tolist() == [[np.float32(4.0) / np.float32(5)]]

    def test_more_rows_than_the_workspace_holds_are_done_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.compute._WORKSPACE_VALUES", 16)
        rng = np.random.default_rng(1)
        for model in random_models(rng, 3):
            assert_meets_the_oracle(model, rng.normal(size=(21, 3)).astype(np.float32))


class TestClusters:
    def test_at_a_tie_the_lowest_cluster_wins(self) -> None:
        model = m.KMeans(3, floats([2, 0], [0, 0], [0, 0]))
        assert answer(lone(model), [[1, 0], [0, 0]]).argmax(axis=1).tolist() == [0, 1]

    def test_float32_rounding_decides_as_in_the_reference(self) -> None:
        # In exact arithmetic the second centroid is nearer, by less than float32 can tell: a tie, the first wins.
        model = m.KMeans(2, floats([2, 0], [2, 2.0**-14]))
        row = floats([1, 2.0**-14])
        assert np.square(row.astype(np.float64) - model.centroids).sum(axis=1).argmin() == 1
        assert answer(lone(model), row).tolist() == [[1.0, 0.0]]
        assert_meets_the_oracle(model, row)

    def test_distances_beyond_float32_tie_like_infinities(self) -> None:
        big = float(np.finfo(np.float32).max)
        model = m.KMeans(3, floats([-big], [-big / 2], [big]))
        with np.errstate(over="ignore"):
            assert_meets_the_oracle(model, floats([big / 2], [-big], [0.0]))

    @settings(max_examples=60, deadline=None)
    @given(
        st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
            lambda shape: st.tuples(
                arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0, 1.0 + 2.0**-23, 1e-3, -1.0, 3.0, 1e-30])),
                arrays(np.float32, (4, shape[1]), elements=st.sampled_from([0.0, 1.0, 1.0 + 2.0**-22, 2.0, -1e-3])),
            )
        )
    )
    def test_near_ties_fall_as_in_the_reference(self, case: tuple[Any, Any]) -> None:
        centroids, rows = case
        assert_meets_the_oracle(m.KMeans(len(centroids), centroids), rows)


class TestBatchMates:
    """A row's answer does not depend on the rows that share its pass."""

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32), st.integers(1, 40), st.lists(st.integers(1, 19), min_size=1, max_size=6))
    def test_rows_alone_and_together_answer_the_same_bits(self, seed: int, width: int, sizes: list[int]) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(sum(sizes), width)).astype(np.float32)
        for model in random_models(rng, width):
            for expert in on_device(model):
                assert_same_bits_in_any_company(expert, rows, sizes)

    @pytest.mark.parametrize("width", [2**15 - 1, 2**15, 70_001])
    def test_wide_rows_too_though_threads_share_the_work(self, width: int) -> None:
        rng = np.random.default_rng(width)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            rows = rng.normal(size=(3, width)).astype(np.float32)
            for model in random_models(rng, width)[:2]:
                assert_same_bits_in_any_company(on_device(model)[0], rows, [1, 2])
        finally:
            torch.set_num_threads(before)

    def test_sigmoids_round_alike_at_every_place(self) -> None:
        expert = lone(m.LogisticRegression(floats(1.0), 0.0))
        rows = np.random.default_rng(0).normal(size=(1001, 1)).astype(np.float32) * 4
        assert_same_bits_in_any_company(expert, rows, [1] * 1001)


def assert_same_bits_in_any_company(expert: Expert, rows: Any, sizes: list[int]) -> None:
    together = answer(expert, rows)
    apart = np.concatenate([answer(expert, part) for part in np.split(rows, np.cumsum(sizes)[:-1])])
    assert together.tobytes() == apart.tobytes()


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=SMALL), st.data())
def test_linear_answers_stay_within_the_stated_bound(rows: Any, data: st.DataObject) -> None:
    coefficients = data.draw(arrays(np.float32, rows.shape[1], elements=SMALL))
    assert_meets_the_oracle(linear(*coefficients.tolist(), intercept=0.25), rows)


def test_sums_too_large_for_float32_answer_infinity() -> None:
    assert answer(lone(linear(3e38, 3e38)), [[1, 1], [1, -1]]).tolist() == [[np.inf], [0.5]]


def test_members_of_a_mixture_are_experts_of_one_package() -> None:
    model = mixture()
    first, second = on_device(model)
    rows = floats([1, 2], [3, 4])
    assert np.array_equal(answer(first, rows), apr_oracle.predict(model.experts[0], rows))
    assert np.array_equal(answer(second, rows), apr_oracle.predict(model.experts[1], rows))


class TestSizes:
    """The router compares what the facts say with what workers have: it must be what they take."""

    @pytest.mark.parametrize("layout", [*models()])
    def test_the_facts_of_every_layout_say_what_it_takes(self, layout: str) -> None:
        assert_size_as_stated(opened(apr_bytes(models()[layout])))

    def test_the_facts_of_larger_models_do_too(self) -> None:
        for model in random_models(np.random.default_rng(3), 12):
            assert_size_as_stated(opened(apr_bytes(model)))

    def test_the_facts_of_the_reference_s_files_do_too(self) -> None:
        counted = 0
        for entry in recorded():
            package = opened(entry["data"], credential_of(entry))
            if package.facts.not_servable is None:
                assert_size_as_stated(package)
                counted += 1
        assert counted >= RECORDED_MIN


def assert_size_as_stated(package: Package) -> None:
    prepared = prepare(package)
    assert package.facts.parameter_bytes == prepared.size_bytes
    held = move(prepared.tensors, torch.device("cpu"))
    assert prepared.size_bytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
