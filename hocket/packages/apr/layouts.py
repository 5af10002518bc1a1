"""Which model types are laid out how, and telling them apart.

Fields are in file order; the tables are the format. The header's type id is chosen freely by whoever saves a file and
several layouts share one, so an id only names candidates. A layout recorded under `custom.hocket` decides at once.
Otherwise the one candidate that consumes the payload exactly, with sound tags, lengths and numbers, is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hocket.errors import HocketError, Reason
from hocket.packages import model as m
from hocket.packages.apr import conventions
from hocket.packages.apr.bincode import (
    BOOL,
    F32,
    MATRIX,
    U64,
    U64S,
    VECTOR,
    Codec,
    Reader,
    option,
    record,
    sequence,
)
from hocket.packages.apr.facts import is_fitted
from hocket.packages.apr.quantization import QUANTIZED, QUANTIZED_MATRIX, QUANTIZED_VECTOR, kind_of, weights_of
from hocket.packages.apr.trees import COLUMN_TREE, VALUE_TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hocket.packages.limits import Limits


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload layout.

    Attributes:
        name: As recorded: class name of the model, within `Quantized<...>` if its weights are blocks.
        codec: Reads and writes it.
        expert: Class name of a mixture's experts.
        since_0_13: Which variant of a tree classifier: later releases store the input width. None for other layouts.
        quantized: Whether its weights are blocks; false of a lone tensor.
        guess: Whether it is tried although nothing speaks for it.
    """

    name: str
    codec: Codec[Any]
    expert: str | None = None
    since_0_13: bool | None = None
    quantized: bool = False
    guess: bool = False


_NORMAL_MIN: Final = 2.0**-126  # below it, a float32 has lost precision


def _read_penalty(reader: Reader) -> float:
    """A penalty nobody would set gives away a layout that is misread: a tag and a count taken for a float."""
    value = F32.read(reader)
    if 0 < abs(value) < _NORMAL_MIN:
        raise reader.bad(f"a penalty is {value}")
    return value


_PENALTY: Final = Codec(_read_penalty, F32.write)


def _linear(vector: Codec[Any]) -> dict[str, Codec[Any]]:
    base: dict[str, Codec[Any]] = {"coefficients": option(vector), "intercept": F32, "fit_intercept": BOOL}
    return {
        "LinearRegression": record(m.LinearRegression, **base),
        "Ridge": record(m.Ridge, alpha=_PENALTY, **base),
        "Lasso": record(m.Lasso, alpha=_PENALTY, **base, max_iter=U64, tol=F32),
        "ElasticNet": record(m.ElasticNet, alpha=_PENALTY, l1_ratio=_PENALTY, **base, max_iter=U64, tol=F32),
    }


def _logistic(vector: Codec[Any]) -> Codec[m.LogisticRegression]:
    return record(
        m.LogisticRegression,
        coefficients=option(vector),
        intercept=F32,
        learning_rate=F32,
        max_iter=U64,
        tol=F32,
    )


_TREE_CLASSIFIER: Final = record(m.DecisionTreeClassifier, tree=option(COLUMN_TREE), max_depth=option(U64))
_TREE_CLASSIFIER_0_13: Final = record(
    m.DecisionTreeClassifier, tree=option(COLUMN_TREE), max_depth=option(U64), n_features=option(U64)
)
_TREE_REGRESSOR: Final = record(
    m.DecisionTreeRegressor,
    tree=option(VALUE_TREE),
    max_depth=option(U64),
    min_samples_split=U64,
    min_samples_leaf=U64,
)


def _forest(kind: type[Any], tree: Codec[Any], targets: Codec[Any]) -> Codec[Any]:
    return record(
        kind,
        trees=sequence(tree, lambda limits: limits.trees, "trees"),
        n_estimators=U64,
        max_depth=option(U64),
        random_state=option(U64),
        oob_indices=sequence(U64S, lambda limits: limits.trees, "out-of-bag lists"),
        x_train=option(MATRIX),
        y_train=option(targets),
    )


def _kmeans(matrix: Codec[Any]) -> Codec[m.KMeans]:
    return record(
        m.KMeans,
        n_clusters=U64,
        max_iter=U64,
        tol=F32,
        random_state=option(U64),
        centroids=option(matrix),
        labels=option(U64S),
        inertia=F32,
        n_iter=U64,
    )


def _read_bare(reader: Reader, features: int, experts: int) -> m.Floats:
    """Gate weights: a bare list, feature by feature."""
    weights = VECTOR.read(reader)
    if weights.size != features * experts:
        raise reader.bad(f"a gate of {features} features x {experts} experts has {weights.size} weights")
    return weights.reshape(features, experts)


def _read_blocks(reader: Reader, features: int, experts: int) -> m.Quantized:
    weights = QUANTIZED_MATRIX.read(reader)
    if weights.shape != (features, experts):
        raise reader.bad(f"a gate of {features} features x {experts} experts has {weights.shape} weights")
    return weights


def _gate(read_weights: Callable[[Reader, int, int], m.Weights], weights: Codec[Any]) -> Codec[m.SoftmaxGate]:
    def read(reader: Reader) -> m.SoftmaxGate:
        features, experts, temperature = U64.read(reader), U64.read(reader), F32.read(reader)
        if features > reader.limits.features:
            raise reader.too_large("features", reader.limits.features)
        if experts > reader.limits.experts:
            raise reader.too_large("experts", reader.limits.experts)
        if temperature <= 0:
            raise reader.bad(f"the gate's temperature is {temperature}, it must be above 0")
        return m.SoftmaxGate(read_weights(reader, features, experts), temperature)

    def write(out: bytearray, gate: m.SoftmaxGate) -> None:
        features, experts = gate.weights.shape
        U64.write(out, features)
        U64.write(out, experts)
        F32.write(out, gate.temperature)
        weights.write(out, gate.weights)

    return Codec(read, write)


def _mixture(expert: Codec[Any], gate: Codec[m.SoftmaxGate]) -> Codec[m.MixtureOfExperts]:
    return record(
        m.MixtureOfExperts,
        experts=sequence(expert, lambda limits: limits.experts, "experts"),
        gate=gate,
        config=record(m.MoeConfig, top_k=U64, capacity_factor=F32, expert_dropout=F32, load_balance_weight=F32),
    )


_BARE_GATE: Final = _gate(_read_bare, VECTOR)
_QUANTIZED_GATE: Final = _gate(_read_blocks, QUANTIZED_MATRIX)


def _within_quantized(name: str) -> str:
    return f"Quantized<{name}>"


def _quantized(name: str, codec: Codec[Any], expert: str | None = None) -> Layout:
    return Layout(_within_quantized(name), codec, expert, quantized=True)


_CANDIDATES: Final = {
    0x0001: tuple(Layout(name, codec) for name, codec in _linear(VECTOR).items()),
    0x0002: (Layout("LogisticRegression", _logistic(VECTOR)),),
    0x0003: (
        Layout("DecisionTreeClassifier", _TREE_CLASSIFIER, since_0_13=False),
        Layout("DecisionTreeClassifier", _TREE_CLASSIFIER_0_13, since_0_13=True),
        Layout("DecisionTreeRegressor", _TREE_REGRESSOR),
    ),
    0x0004: (
        Layout(
            "RandomForestClassifier",
            _forest(m.RandomForestClassifier, _TREE_CLASSIFIER, U64S),
            since_0_13=False,
        ),
        Layout(
            "RandomForestClassifier",
            _forest(m.RandomForestClassifier, _TREE_CLASSIFIER_0_13, U64S),
            since_0_13=True,
        ),
        Layout("RandomForestRegressor", _forest(m.RandomForestRegressor, _TREE_REGRESSOR, VECTOR)),
    ),
    0x0005: (
        Layout("GradientBoostingClassifier", conventions.boosting(_TREE_CLASSIFIER), since_0_13=False),
        Layout("GradientBoostingClassifier", conventions.boosting(_TREE_CLASSIFIER_0_13), since_0_13=True),
    ),
    0x0006: (Layout("KMeans", _kmeans(MATRIX)),),
    0x0008: (Layout("GaussianNB", conventions.NAIVE_BAYES),),
    0x0009: (Layout("KNearestNeighbors", conventions.neighbors(MATRIX)),),
    0x000A: (Layout("LinearSVM", conventions.svm(VECTOR)),),
    0x0040: tuple(
        Layout("MixtureOfExperts", _mixture(codec, _BARE_GATE), expert=name) for name, codec in _linear(VECTOR).items()
    ),
}
_QUANTIZED_LINEAR: Final = _linear(QUANTIZED_VECTOR)
_RECORDED: Final = {
    0x0001: tuple(_quantized(name, codec) for name, codec in _QUANTIZED_LINEAR.items()),
    0x0002: (_quantized("LogisticRegression", _logistic(QUANTIZED_VECTOR)),),
    0x0006: (_quantized("KMeans", _kmeans(QUANTIZED_MATRIX)),),
    0x0009: (_quantized("KNearestNeighbors", conventions.neighbors(QUANTIZED_MATRIX)),),
    0x000A: (_quantized("LinearSVM", conventions.svm(QUANTIZED_VECTOR)),),
    0x0020: (
        Layout("DenseNetwork", conventions.DENSE),
        _quantized("DenseNetwork", conventions.dense(QUANTIZED_MATRIX)),
    ),
    0x0040: tuple(
        _quantized("MixtureOfExperts", _mixture(codec, _QUANTIZED_GATE), name)
        for name, codec in _QUANTIZED_LINEAR.items()
    ),
}
"""Layouts of ours that nobody need guess: they count only where the metadata records them."""
_BLOCK_TYPE_ID: Final = 0x0021
_BLOCK: Final = Layout("QuantizedBlock", QUANTIZED)
"""A lone tensor, which the reference writes under any type id."""


def candidates(type_id: int, hocket: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts a payload may have.

    Args:
        type_id: Model type id of the header.
        hocket: Our own metadata, `custom.hocket`: `layout` decides whatever the id, `expert_layout` for a mixture.

    Raises:
        HocketError: `UNSUPPORTED_LAYOUT` if nobody can read the recorded one.
    """
    name, expert = hocket.get("layout"), hocket.get("expert_layout")
    of_type = (*_CANDIDATES.get(type_id, ()), replace(_BLOCK, guess=True)) if name is None else _LAYOUTS
    found = tuple(layout for layout in of_type if name in (None, layout.name) and expert in (None, layout.expert))
    if not found:
        what = f"the layout {name[:64]!r}" if name else f"any layout of model type 0x{type_id:04x}"
        raise HocketError(Reason.UNSUPPORTED_LAYOUT, f"this version cannot read {what}")
    return found


def read_model(
    payload: memoryview, layouts: tuple[Layout, ...], writer_version: object, limits: Limits
) -> tuple[Layout, m.Model]:
    """Decode a payload by the one layout that fits it.

    Several layouts can fit a payload. A reading without parameters could not serve, so it counts only if there is no
    other, and then which it is does not matter. Of the two variants of a tree classifier, the one that the writing
    library's version does not call for is tried only if nothing else has parameters. What is still open is refused.

    There is room for one copy of a payload: once a layout has fitted, others are tried without making one. The first
    that fits is nearly always the one, any other is read again.

    Args:
        payload: Uncompressed.
        layouts: Candidates, at least one.
        writer_version: The metadata's `aprender_version`.
        limits: Bounds on what is decoded.

    Raises:
        HocketError: `BAD_PAYLOAD` or `TOO_LARGE` if none fits, `UNSUPPORTED_LAYOUT` if the choice is open.
    """
    since_0_13 = _is_since_0_13(writer_version)

    def expected(layout: Layout) -> bool:
        return layout.since_0_13 in (None, since_0_13)

    fits: list[tuple[Layout, bool]] = []
    refusals: list[_Refusal] = []
    first: m.Model | None = None
    for layout in sorted(layouts, key=expected, reverse=True):
        if not expected(layout) and any(fitted for _, fitted in fits):
            break
        reader = Reader(payload, limits, copies=first is None)
        try:
            model = _read_whole(reader, layout)
            fits.append((layout, is_fitted(model)))
            first = model if first is None else first
            del model
        except HocketError as error:
            refusals.append(_Refusal(expected(layout), reader.position, layout, error.reason, error.message))
    if not fits:
        raise _none_fits(refusals)
    chosen = [layout for layout, fitted in fits if fitted] or [fits[0][0]]
    if len(chosen) > 1:
        names = ", ".join(map(_spoken, chosen))
        raise HocketError(
            Reason.UNSUPPORTED_LAYOUT,
            f"the payload can be read as {names}: record which under custom.hocket.layout in the metadata",
        )
    if first is None or chosen[0] is not fits[0][0]:
        first = None  # before another is read
        first = _read_whole(Reader(payload, limits), chosen[0])
    return chosen[0], first


def layout_of(model: m.Model) -> tuple[int, Layout]:
    """The type id by convention, and the layout to write a model in.

    Raises:
        HocketError: `UNSUPPORTED_LAYOUT` if the format has none for it.
    """
    if isinstance(model, m.Quantized):
        return _BLOCK_TYPE_ID, _BLOCK
    name, expert = type(model).__name__, None
    if isinstance(model, m.MixtureOfExperts):
        kinds = {type(member).__name__ for member in model.experts}
        if len(kinds) != 1:
            raise HocketError(
                Reason.UNSUPPORTED_LAYOUT, "the experts of one .apr file are at least one, and of one kind"
            )
        expert = kinds.pop()
    if kind_of(model) is not None:
        name = _within_quantized(name)
    for type_id, layout in _BY_TYPE_ID:
        if (layout.name, layout.expert) == (name, expert):
            return type_id, layout
    raise HocketError(Reason.UNSUPPORTED_LAYOUT, f"the .apr format has no layout for {name} of {expert}")


def _read_whole(reader: Reader, layout: Layout) -> m.Model:
    model: m.Model = layout.codec.read(reader)
    if reader.rest:
        raise reader.bad(f"{reader.rest} bytes follow the model")
    if isinstance(model, m.KMeans):
        if model.n_clusters > reader.limits.labels:
            raise reader.too_large("clusters", reader.limits.labels)
        if model.centroids is not None and model.centroids.shape[0] != model.n_clusters:
            raise reader.bad(f"{model.n_clusters} clusters have {model.centroids.shape[0]} centroids")
    conventions.check(reader, model)
    if len({weights.kind for weights in weights_of(model) if isinstance(weights, m.Quantized)}) > 1:
        raise reader.bad("the blocks of one model are of one kind, Q8_0 or Q4_0")
    return model


class _Refusal(NamedTuple):
    """Why a layout does not fit: in words, for the error's traceback keeps in memory all that was read until then."""

    expected: bool
    position: int
    layout: Layout
    reason: Reason
    message: str


def _none_fits(refusals: list[_Refusal]) -> HocketError:
    """The refusal of the expected reading that came furthest, telling of the others."""
    refusals = [refusal for refusal in refusals if not refusal.layout.guess]
    if not refusals:
        return HocketError(
            Reason.UNSUPPORTED_LAYOUT,
            "this version knows no layout of this model type, and the payload is no quantised tensor either",
        )
    best = max(refusals, key=lambda refusal: (refusal.expected, refusal.position))
    if len(refusals) == 1:
        return HocketError(best.reason, best.message)
    told = "; ".join(f"{_spoken(refusal.layout)}: {refusal.message}" for refusal in refusals)
    return HocketError(best.reason, f"the payload fits no layout of its model type ({told})")


def _spoken(layout: Layout) -> str:
    of = f" of {layout.expert}" if layout.expert else ""
    return f"{layout.name}{of}{' (0.13)' if layout.since_0_13 else ''}"


def _is_since_0_13(version: object) -> bool:
    numbers = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", str(version))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (0, 13)


_BY_TYPE_ID: Final = tuple(
    (type_id, layout) for table in (_CANDIDATES, _RECORDED) for type_id, layouts in table.items() for layout in layouts
)
_LAYOUTS: Final = (*(layout for _, layout in _BY_TYPE_ID), _BLOCK)
