"""A softmax gate that learns which of several experts does best on a row.

The reference library has a gate and never trains it. Here the gate is a multinomial logistic regression: per row, the
answer to be learned is the expert that does best, and experts that do equally well share it. Rows that the gate has not
seen say how well the mixture does, beside its members.

    answers = align([answer(model, facts, rows) for model, facts in ...], [facts.labels for ...])
    trained = train_gate(rows, answers, truth, top_k=1)
    trained.weights, trained.figures

The experts must not have learned from the rows: on those they do better than they will, each in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages.answering import heaviest, softmax
from hocket.packages.labels import label_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

_EQUAL: Final = 1e-9
"""Relative difference within which experts do equally well."""
_MEMBERS_MIN: Final = 2
_ROWS_MIN: Final = 2
_STEPS_MAX: Final = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What each expert answers to each row.

    Attributes:
        outputs: float64 `[N, E, C]`; 0 for a label that an expert does not know.
        labels: The classes that the columns stand for; None for regressors, which have one column.
    """

    outputs: Numbers
    labels: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Figures:
    """How well a mixture does on rows that its gate has not seen.

    Attributes:
        measure: `accuracy`, the share of rows whose heaviest label is the true one, where more is better; or `rmse`,
            the root of the mean squared error, where less is.
        rows: How many rows that is.
        mixture: The experts behind the trained gate.
        members: Each of them alone.
        equal: All of them, weighed alike.
        ideal: If for each row the one that does best were known.
        chosen_best: Share of rows whose heaviest expert is one that does best, among those where experts differ.
    """

    measure: Literal["accuracy", "rmse"]
    rows: int
    mixture: float
    members: tuple[float, ...]
    equal: float
    ideal: float
    chosen_best: float


@dataclass(frozen=True, slots=True, eq=False)
class TrainedGate:
    """A gate: softmax(x @ weights + bias).

    Attributes:
        weights: float32 `[F, E]`.
        bias: One per expert; None if it was trained without, as the gate inside an `.apr` mixture is.
        rows: How many rows it has learned from.
        converged: Whether training came to its end; if not, it was stopped, and a better gate may exist.
        figures: On others.
    """

    weights: NDArray[np.float32]
    bias: tuple[float, ...] | None
    rows: int
    converged: bool
    figures: Figures


def align(outputs: Sequence[Numbers], labels: Sequence[tuple[str | None, ...] | None]) -> Answers:
    """Answers of several experts, side by side under one list of labels.

    Args:
        outputs: Of each expert, float64 `[N, C]`.
        labels: Of each expert, one per column, None for one to drop; None for a regressor.

    Raises:
        HocketError: `MEMBERS_NOT_ALIGNED` if some classify and others do not, or a regressor has several columns;
            `BAD_REQUEST` for fewer than two.
    """
    if len(outputs) < _MEMBERS_MIN:
        raise HocketError(Reason.BAD_REQUEST, "a gate chooses among two experts or more")
    classifiers = [names for names in labels if names is not None]
    if not classifiers:
        if any(output.shape[1] != 1 for output in outputs):
            raise HocketError(Reason.MEMBERS_NOT_ALIGNED, "members that answer several numbers cannot be compared")
        return Answers(np.stack(outputs, axis=1), None)
    if len(classifiers) < len(labels):
        raise HocketError(Reason.MEMBERS_NOT_ALIGNED, "some members answer labels, others numbers")
    every = tuple(dict.fromkeys(name for names in classifiers for name in names if name is not None))
    aligned = np.zeros((len(outputs[0]), len(outputs), len(every)))
    for expert, (output, names) in enumerate(zip(outputs, classifiers, strict=True)):
        for column, name in enumerate(names):
            if name is not None:
                aligned[:, expert, every.index(name)] = output[:, column]
    return Answers(aligned, every)


def train_gate(
    rows: NDArray[np.float32],
    answers: Answers,
    truth: Sequence[str] | Sequence[float],
    *,
    top_k: int = 1,
    bias: bool = True,
    held_out: float = 0.25,
    penalty: float = 1e-3,
    seed: int = 0,
) -> TrainedGate:
    """Train a gate on some of the rows, and measure it on the others.

    Args:
        rows: float32 `[N, F]`, which the experts have not learned from.
        answers: Of the experts to these rows.
        truth: Per row its label, or its number.
        top_k: Experts that will answer a row; training does not depend on it, the figures do.
        bias: Whether the gate has one; that inside an `.apr` file has none.
        held_out: Share of the rows to measure on.
        penalty: L2, on weights of columns of unit spread.
        seed: Which rows those are.

    Raises:
        HocketError: `BAD_TENSOR` for rows that are not finite, or not as many as answers and truth; `BAD_REQUEST` for
            too few rows, a truth that is no number, experts that do not differ, or options that make no sense;
            `TOP_K_OUT_OF_RANGE`.
    """
    count, experts, _ = answers.outputs.shape
    if not len(rows) == count == len(truth):
        raise HocketError(Reason.BAD_TENSOR, f"there are {len(rows)} rows, {count} answers and {len(truth)} truths")
    if not np.isfinite(rows).all():
        raise HocketError(Reason.BAD_TENSOR, "a gate cannot learn from rows that hold NaN or infinity")
    if not 1 <= top_k <= experts:
        raise HocketError(Reason.TOP_K_OUT_OF_RANGE, f"top_k is {top_k}, there are {experts} experts")
    if not (0 < held_out < 1 and 0 <= penalty < float("inf")):
        raise HocketError(Reason.BAD_REQUEST, "held_out is a share between 0 and 1, penalty a number from 0 on")
    score = _accuracy(answers, truth) if answers.labels is not None else _closeness(answers, truth)
    order = np.random.default_rng(seed).permutation(count)
    measured = max(1, round(held_out * count))
    if count - measured < _ROWS_MIN:
        raise HocketError(Reason.BAD_REQUEST, f"{count} rows are too few to learn from some and measure on others")
    unseen, seen = order[:measured], order[measured:]
    best = _best(score.quality)
    learned = seen[best[seen].any(axis=1)]
    if not len(learned):
        raise HocketError(
            Reason.BAD_REQUEST,
            "all experts do equally well on every row, or none knows any of the true labels: nothing can be learned",
        )
    x = rows.astype(np.float64)
    exact_weights, exact_biases, converged = _fit(x[learned], best[learned], penalty, bias=bias)
    with np.errstate(over="ignore"):
        weights, biases = exact_weights.astype(np.float32), exact_biases.astype(np.float32)
    if not (np.isfinite(weights).all() and np.isfinite(biases).all()):
        raise HocketError(Reason.BAD_TENSOR, "the gate's weights leave float32: scale the rows")
    gate = softmax(x[unseen] @ weights.astype(np.float64) + biases)
    differ = best[unseen].any(axis=1)
    first = gate.argmax(axis=1)
    figures = Figures(
        measure=score.measure,
        rows=measured,
        mixture=score.of(unseen, heaviest(gate, top_k)),
        members=tuple(score.of(unseen, np.tile(alone, (measured, 1))) for alone in np.eye(experts)),
        equal=score.of(unseen, np.full((measured, experts), 1 / experts)),
        ideal=score.of(unseen, np.eye(experts)[score.quality[unseen].argmax(axis=1)]),
        chosen_best=float(best[unseen][np.arange(measured), first][differ].mean()) if differ.any() else 1.0,
    )
    return TrainedGate(weights, tuple(map(float, biases)) if bias else None, len(learned), converged, figures)


@dataclass(frozen=True, slots=True, eq=False)
class _Score:
    """How good answers are.

    Args:
        measure: Of the figures.
        quality: How well each expert does on each row, `[N, E]`; more is better.
        of: The measure of some rows under weights `[n, E]` of the experts.
    """

    measure: Literal["accuracy", "rmse"]
    quality: Numbers
    of: Callable[[NDArray[np.int64], Numbers], float]


def _accuracy(answers: Answers, truth: Sequence[str] | Sequence[float]) -> _Score:
    """An expert does as well as the probability that it gives to the true label."""
    numbers = {name: column for column, name in enumerate(answers.labels or ())}
    column = np.array([numbers.get(str(label_of(label)), -1) for label in truth])
    quality = np.take_along_axis(answers.outputs, np.maximum(column, 0)[:, None, None], axis=2)[:, :, 0]
    quality = np.where(column[:, None] >= 0, quality, 0.0)

    def of(rows: NDArray[np.int64], weights: Numbers) -> float:
        chosen = np.einsum("ne,nec->nc", weights, answers.outputs[rows]).argmax(axis=1)
        return float((chosen == column[rows]).mean())

    return _Score("accuracy", quality, of)


def _closeness(answers: Answers, truth: Sequence[str] | Sequence[float]) -> _Score:
    """An expert does the better the closer it is."""
    try:
        wanted = np.array([float(value) for value in truth])
    except (TypeError, ValueError) as error:
        raise HocketError(Reason.BAD_REQUEST, f"these experts answer numbers, and a truth is none: {error}") from error
    if not np.isfinite(wanted).all():
        raise HocketError(Reason.BAD_REQUEST, "a truth is NaN or infinite")
    outputs = answers.outputs[:, :, 0]

    def of(rows: NDArray[np.int64], weights: Numbers) -> float:
        error = (weights * outputs[rows]).sum(axis=1) - wanted[rows]
        return float(np.sqrt((error**2).mean()))

    return _Score("rmse", -np.abs(outputs - wanted[:, None]), of)


def _best(quality: Numbers) -> NDArray[np.bool_]:
    """Which experts do best on each row, `[N, E]`; none where all do equally well: nothing is to be learned there."""
    most = quality.max(axis=1, keepdims=True)
    best: NDArray[np.bool_] = quality >= most - _EQUAL * np.abs(most)
    best[best.all(axis=1)] = False
    return best


def _fit(rows: Numbers, best: NDArray[np.bool_], penalty: float, *, bias: bool) -> tuple[Numbers, Numbers, bool]:
    """A multinomial logistic regression: weights `[F, E]`, biases `[E]`, and whether it came to its end.

    Those `best` share a row's target.

    Minimises the mean cross-entropy and penalty / 2 * |weights|**2, on columns moved (with a bias) and stretched to a
    mean of 0 and a spread of 1, by L-BFGS. Moving and stretching are folded into the result.
    """
    try:
        from scipy.optimize import minimize  # noqa: PLC0415 - an extra, for those who train
    except ImportError as error:
        raise HocketError(Reason.BAD_REQUEST, "training a gate needs scipy: pip install 'hocket[sklearn]'") from error
    mean = rows.mean(axis=0) if bias else np.zeros(rows.shape[1])
    spread = np.sqrt(((rows - mean) ** 2).mean(axis=0))
    spread[spread == 0] = 1
    inputs = np.hstack([(rows - mean) / spread, np.ones((len(rows), 1))]) if bias else (rows - mean) / spread
    targets = best / best.sum(axis=1, keepdims=True)
    shape = (inputs.shape[1], best.shape[1])
    held = np.ones(shape)
    if bias:
        held[-1] = 0  # which is not held back

    def loss(flat: Numbers) -> tuple[float, Numbers]:
        weights = flat.reshape(shape)
        logits = inputs @ weights
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        totals = exponentials.sum(axis=1, keepdims=True)
        cost = -(targets * (logits - np.log(totals))).sum() / len(inputs) + penalty / 2 * (held * weights**2).sum()
        slope = inputs.T @ (exponentials / totals - targets) / len(inputs) + penalty * held * weights
        return float(cost), slope.ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS_MAX})
    solution = found.x.reshape(shape)
    weights: Numbers = (solution[:-1] if bias else solution) / spread[:, None]
    biases: Numbers = solution[-1] - mean @ weights if bias else np.zeros(shape[1])
    return weights, biases, bool(found.success)
