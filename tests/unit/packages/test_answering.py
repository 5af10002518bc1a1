"""What numpy answers is what the reference's formulas give, and what workers compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import answering, apr
from hocket.packages import model as m
from hocket.packages.apr.quantization import quantized_model
from tests import apr_oracle, builders

ROWS = np.random.default_rng(3).normal(0, 2, (64, 2)).astype(np.float32)


def opened(model: Any, **more: Any) -> Any:
    data = builders.apr_bytes(model, **more)
    return apr.decode(apr.split(data), digest_of(data))


@pytest.mark.parametrize("name", builders.models())
def test_every_kind_of_model_answers_as_the_reference_does(name: str) -> None:
    facts, model = opened(builders.models()[name])

    found = answering.answer(model, facts, ROWS)

    wanted = apr_oracle.predict(model, ROWS, facts.output_columns)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workspace_values", [1, 6, 50, 200])
@pytest.mark.parametrize("name", builders.models())
def test_rows_that_take_much_memory_are_answered_in_parts(
    name: str, workspace_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, model = opened(builders.models()[name])
    whole = answering.answer(model, facts, ROWS)

    monkeypatch.setattr(answering, "_WORKSPACE_VALUES", workspace_values)

    np.testing.assert_allclose(answering.answer(model, facts, ROWS), whole, rtol=1e-12)


@pytest.mark.parametrize(("points", "parts", "blocks"), [(3, 1, 1), (2**16, 64, 8)])
def test_no_part_is_empty_and_training_rows_are_compared_with_many_at_once(
    points: int, parts: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.random.default_rng(0).normal(size=(points, 2)).astype(np.float32)
    facts, model = opened(m.KNearestNeighbors(1, samples, np.zeros(points, np.uint64)))
    pieces: list[int] = []
    split = np.split

    def counted(values: Any, at: Any) -> Any:
        found = split(values, at)
        pieces.extend(map(len, found))
        return found

    monkeypatch.setattr(answering, "_WORKSPACE_VALUES", 2**14)
    monkeypatch.setattr(np, "split", counted)
    answering.answer(model, facts, ROWS)

    assert len(pieces) == parts + parts * blocks
    assert min(pieces) > 0


def test_a_quantised_model_answers_with_the_weights_that_it_has() -> None:
    coarse = quantized_model(builders.linear(2.0, -1.0), m.QuantKind.Q8_0)
    facts, model = opened(coarse)

    found = answering.answer(model, facts, np.array([[1, 0], [0, 1]], np.float32))

    np.testing.assert_allclose(found[:, 0], [2.4998779, -0.50784], rtol=1e-3)


def test_the_heaviest_are_weighed_anew_and_of_equal_ones_the_first_count() -> None:
    weights = np.array([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]])

    np.testing.assert_allclose(answering.heaviest(weights, 2), [[1 / 3, 2 / 3, 0], [0, 0.5, 0.5]])
    np.testing.assert_array_equal(answering.heaviest(weights, 1).argmax(axis=1), [1, 1])


def test_rows_of_another_width_are_refused_and_a_tree_of_unknown_width_takes_what_it_needs() -> None:
    facts, model = opened(builders.linear())
    tree_facts, tree = opened(m.DecisionTreeClassifier(builders.COLUMN_TREE))

    for found, of, width in ((facts, model, 3), (facts, model, 1), (tree_facts, tree, 1)):
        with pytest.raises(HocketError) as refusal:
            answering.answer(of, found, np.zeros((1, width), np.float32))
        assert refusal.value.reason is Reason.BAD_TENSOR
    assert answering.answer(tree, tree_facts, np.zeros((1, 5), np.float32)).shape == (1, 3)


def test_a_model_that_cannot_answer_is_refused() -> None:
    facts, model = opened(m.LinearRegression(None, 0.0))

    with pytest.raises(HocketError) as refusal:
        answering.answer(model, facts, ROWS)
    assert refusal.value.reason is Reason.NOT_SERVABLE
