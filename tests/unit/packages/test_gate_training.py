from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages import gate_training
from hocket.packages.gate_training import align, train_gate

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.uniform(-1, 1, (400, 3)).astype(np.float32)
NORTH = ROWS[:, 0] > 0
TRUTH = np.where(NORTH, 1.0, -1.0) + ROWS[:, 1]


def regressors() -> Any:
    """One is right in the north, one in the south, one is never as good."""
    right: Any = np.stack([1 + ROWS[:, 1], -1 + ROWS[:, 1], 0 * ROWS[:, 1]], axis=1).astype(np.float64)
    return align([right[:, [0]], right[:, [1]], right[:, [2]]], [None, None, None])


def classifiers() -> Any:
    """One knows a from b in the north, the other in the south, where each is asked to guess elsewhere."""
    sure, guess = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    north = np.where(NORTH[:, None], sure, guess)
    south = np.where(NORTH[:, None], guess, sure)
    return align([north, south], [("a", "b"), ("a", "b")])


def refusal(*arguments: Any, **options: Any) -> Reason:
    with pytest.raises(HocketError) as refused:
        train_gate(*arguments, **options)
    return refused.value.reason


def test_a_gate_learns_who_does_best_where() -> None:
    trained = train_gate(ROWS, regressors(), TRUTH.tolist())

    logits = ROWS @ trained.weights + np.array(trained.bias)
    assert (logits.argmax(axis=1) == np.where(NORTH, 0, 1)).mean() > 0.97
    assert trained.weights.dtype == np.float32
    assert trained.rows == 300
    figures = trained.figures
    assert (figures.measure, figures.rows) == ("rmse", 100)
    assert figures.chosen_best > 0.95
    assert figures.ideal <= figures.mixture < min(*figures.members, figures.equal)


def test_figures_are_those_of_the_rows_that_the_gate_has_not_seen() -> None:
    figures = train_gate(ROWS, regressors(), TRUTH.tolist(), held_out=0.5).figures

    unseen = np.random.default_rng(0).permutation(400)[:200]
    wanted = np.sqrt(((1 + ROWS[unseen, 1] - TRUTH[unseen]) ** 2).mean())
    assert figures.members[0] == pytest.approx(wanted, rel=1e-6)
    assert figures.rows == 200


def test_a_gate_for_inside_an_apr_file_has_no_bias() -> None:
    trained = train_gate(ROWS, regressors(), TRUTH.tolist(), bias=False)

    assert trained.bias is None
    assert trained.figures.chosen_best > 0.95


def test_classifiers_are_as_good_as_the_probability_of_the_true_label() -> None:
    trained = train_gate(ROWS, classifiers(), ["a"] * 400, top_k=2)

    assert trained.figures.measure == "accuracy"
    assert trained.figures.chosen_best > 0.95
    assert trained.figures.mixture == 1.0


def test_experts_that_do_equally_well_share_a_row_and_rows_where_all_do_teach_nothing() -> None:
    one, two = np.where(NORTH, 1.0, 0.0)[:, None], np.where(NORTH, 0.0, 1.0)[:, None]
    twins = align([np.hstack([one, 1 - one]), np.hstack([one, 1 - one]), np.hstack([two, 1 - two])], [("a", "b")] * 3)
    trained = train_gate(ROWS, twins, ["a"] * 400)

    np.testing.assert_allclose(trained.weights[:, 0], trained.weights[:, 1], atol=1e-3)
    alike = align([one, one], [None, None])
    assert refusal(ROWS, alike, [0.0] * 400) is Reason.BAD_REQUEST


def test_an_expert_that_never_does_best_gets_little_weight() -> None:
    trained = train_gate(ROWS, regressors(), TRUTH.tolist())

    logits = ROWS @ trained.weights + np.array(trained.bias)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert shares[:, 2].mean() < 0.1


def test_a_gate_is_the_multinomial_regression_of_who_does_best() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'hocket[sklearn]'")
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an extra

    random = np.random.default_rng(1)
    best = (ROWS @ random.normal(0, 2, (3, 3)) + random.gumbel(size=(400, 3))).argmax(axis=1)
    alone = np.eye(3)[best]
    trained = train_gate(ROWS, align([alone[:, [i]] for i in range(3)], [None] * 3), [1.0] * 400, penalty=0.01)

    seen = np.random.default_rng(0).permutation(400)[100:]
    mean, spread = ROWS[seen].mean(axis=0), ROWS[seen].std(axis=0)
    theirs = LogisticRegression(C=1 / (0.01 * 300), tol=1e-8, max_iter=1000)
    theirs.fit((ROWS[seen] - mean) / spread, best[seen])
    logits = theirs.decision_function((ROWS - mean) / spread)
    ours = ROWS @ trained.weights + np.array(trained.bias)
    np.testing.assert_allclose(ours - ours.mean(axis=1, keepdims=True), logits, atol=2e-3)
    assert trained.converged


def test_training_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_training, "_STEPS_MAX", 1)

    assert not train_gate(ROWS, regressors(), TRUTH.tolist()).converged


def test_columns_of_any_scale_and_constant_ones_do_no_harm() -> None:
    scaled = np.hstack([ROWS * [1e4, 1e-4, 1], np.full((400, 1), 7)]).astype(np.float32)

    plain, stretched = (train_gate(rows, regressors(), TRUTH.tolist()).figures for rows in (ROWS, scaled))

    assert stretched.mixture == pytest.approx(plain.mixture, rel=0.05)


def test_members_are_aligned_by_label_and_dropped_columns_left_out() -> None:
    one, two = np.array([[0.2, 0.8]]), np.array([[0.5, 0.3, 0.2]])
    answers = align([one, two], [(None, "b"), ("c", "b", "a")])

    assert answers.labels == ("b", "c", "a")
    np.testing.assert_array_equal(answers.outputs, [[[0.8, 0, 0], [0.3, 0.5, 0.2]]])


def test_labels_are_recognised_however_they_are_stored() -> None:
    numbered = align([classifiers().outputs[:, 0], classifiers().outputs[:, 1]], [("0", "1"), ("0", "1")])

    by_text, by_number = (train_gate(ROWS, numbered, truth) for truth in (["0"] * 400, [0.0] * 400))

    np.testing.assert_array_equal(by_text.weights, by_number.weights)


def test_what_cannot_be_compared_is_refused() -> None:
    number, shares = np.zeros((1, 1)), np.zeros((1, 2))
    for outputs, labels, wanted in (
        ([number], [None], Reason.BAD_REQUEST),
        ([number, shares], [None, ("a", "b")], Reason.MEMBERS_NOT_ALIGNED),
        ([number, shares], [None, None], Reason.MEMBERS_NOT_ALIGNED),
    ):
        with pytest.raises(HocketError) as refused:
            align(outputs, labels)
        assert refused.value.reason is wanted


def test_training_says_what_it_lacks() -> None:
    answers, truth = regressors(), TRUTH.tolist()
    holed = ROWS.copy()
    holed[0, 0] = np.nan

    assert refusal(ROWS[:9], answers, truth) is Reason.BAD_TENSOR
    assert refusal(holed, answers, truth) is Reason.BAD_TENSOR
    assert refusal(ROWS, answers, truth, top_k=4) is Reason.TOP_K_OUT_OF_RANGE
    assert refusal(ROWS, answers, truth, held_out=1.0) is Reason.BAD_REQUEST
    assert refusal(ROWS, answers, truth, penalty=float("nan")) is Reason.BAD_REQUEST
    assert refusal(ROWS, answers, ["a"] * 400) is Reason.BAD_REQUEST
    assert refusal(ROWS, answers, [float("inf")] * 400) is Reason.BAD_REQUEST
    assert refusal(ROWS, classifiers(), ["neither"] * 400) is Reason.BAD_REQUEST
    few = align([answers.outputs[:2, 0], answers.outputs[:2, 1]], [None, None])
    assert refusal(ROWS[:2], few, truth[:2]) is Reason.BAD_REQUEST
    away = (np.zeros((3, 3)), np.array([0.0, 1e39, 0.0]), True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gate_training, "_fit", lambda *_, **__: away)
        assert refusal(ROWS, answers, truth) is Reason.BAD_TENSOR
    tiny = (ROWS * 1e-38).astype(np.float32) * np.float32(1e-3)
    assert refusal(tiny, answers, truth) is Reason.BAD_TENSOR
