"""Every estimator that is converted answers as it did, from the file it is written into; every other one is refused."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from skops import io as skops_io

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.answering import answer
from hocket.packages.from_sklearn import Conversion, convert, load_estimator
from hocket.packages.from_sklearn.estimators import CONVERTERS
from hocket.packages.labels import label_of
from hocket.packages.limits import DEFAULT_LIMITS
from tests.sklearn_models import (
    BETWEEN,
    CHOOSING,
    CLUSTERING,
    EXACT,
    LENGTH,
    REGRESSORS,
    SPECIES,
    TWO,
    WARNINGS,
    X2,
    X,
    fitted,
    of_each_kind,
)

SCALERS = (StandardScaler, MinMaxScaler, MaxAbsScaler, RobustScaler)


pytestmark = WARNINGS


@pytest.fixture(scope="module")
def of_each() -> Any:
    return of_each_kind()


def written(conversion: Conversion) -> list[tuple[Any, Any]]:
    """What each expert of a conversion is read back as: facts and model."""
    experts = []
    for expert in conversion.experts:
        data = apr.write(expert.model, name=expert.name, labels=expert.labels)
        experts.append(apr.decode(apr.split(data), digest_of(data)))
    return experts


def answers(conversion: Conversion, rows: Any) -> Any:
    """The answers of the whole, weighed as its mixture does."""
    outputs = [answer(model, facts, rows.astype(np.float32)) for facts, model in written(conversion)]
    weights = np.array(conversion.weights or (1.0,))
    return np.einsum("e,enc->nc", weights / weights.sum(), np.stack(outputs))


def refusal(estimator: Any, **more: Any) -> str:
    with pytest.raises(HocketError) as refused:
        convert(estimator, name="x", **more)
    assert refused.value.reason is Reason.BAD_REQUEST
    return refused.value.message


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_answers_as_it_did(name: str) -> None:
    kind = REGRESSORS[name][1]
    estimator = fitted(REGRESSORS[name][0])
    conversion = convert(estimator, name="length")

    np.testing.assert_allclose(answers(conversion, X)[:, 0], estimator.predict(X), rtol=2e-6, atol=2e-6)
    assert isinstance(conversion.experts[0].model, kind)
    assert (conversion.weights, conversion.labels) == (None, None)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_a_classifier_gives_the_probabilities_that_it_gave(name: str, classes: int) -> None:
    kind = EXACT[name][1]
    estimator = fitted(EXACT[name][0], classes)
    if name == "SGDClassifier" and classes == 3:
        assert "two classes" in refusal(estimator)
        return
    conversion = convert(estimator, name="iris")

    np.testing.assert_allclose(answers(conversion, BETWEEN), estimator.predict_proba(BETWEEN), rtol=2e-5, atol=1e-5)
    [expert] = conversion.experts
    assert isinstance(expert.model, m.DenseNetwork if classes == 3 and kind is m.LogisticRegression else kind)
    assert expert.labels == conversion.labels == tuple(map(str, estimator.classes_))


@pytest.mark.parametrize("estimator", CHOOSING)
def test_a_linear_svm_chooses_what_it_chose(estimator: Any) -> None:
    estimator = fitted(estimator, classes=2)
    conversion = convert(estimator, name="iris")

    chosen = np.array(conversion.labels)[answers(conversion, BETWEEN).argmax(axis=1)]
    np.testing.assert_array_equal(chosen, estimator.predict(BETWEEN))
    assert "answers 1 for the class it chooses" in conversion.experts[0].notes[0]


@pytest.mark.parametrize("estimator", CLUSTERING)
def test_clusters_are_found_again(estimator: Any) -> None:
    estimator = fitted(estimator)
    conversion = convert(estimator, name="kinds")

    np.testing.assert_array_equal(answers(conversion, BETWEEN).argmax(axis=1), estimator.predict(BETWEEN))
    assert conversion.labels == (0, 1, 2)


def test_a_forest_of_mixed_leaves_says_how_it_differs() -> None:
    mixed = RandomForestClassifier(20, max_depth=2, random_state=0).fit(X, SPECIES)
    conversion = convert(mixed, name="iris")

    [note] = conversion.experts[0].notes
    assert "of the training rows lie in leaves of several classes" in note
    votes = np.stack([tree.predict(X) for tree in mixed.estimators_])
    shares = np.stack([(votes == column).mean(axis=0) for column in range(3)], axis=1)
    np.testing.assert_allclose(answers(conversion, X), shares)
    assert convert(DecisionTreeClassifier().fit(X, SPECIES), name="iris").experts[0].notes == ()


@pytest.mark.parametrize(
    "scaler", [*SCALERS, lambda: StandardScaler(with_mean=False), lambda: StandardScaler(with_std=False)]
)
@pytest.mark.parametrize(
    "estimator",
    [
        Ridge(0.5),
        LogisticRegression(),
        GaussianNB(),
        MLPClassifier((5,), max_iter=50, random_state=0),
        DecisionTreeClassifier(random_state=0),
        RandomForestRegressor(5, max_depth=6, random_state=0),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_scaler_is_folded_into_what_follows_it(scaler: Any, estimator: Any) -> None:
    regresses = (hasattr(estimator, "alpha") and not hasattr(estimator, "activation")) or "Regressor" in str(estimator)
    pipeline = make_pipeline(scaler(), estimator).fit(X, LENGTH if regresses else SPECIES)

    found = answers(convert(pipeline, name="scaled"), BETWEEN)

    wanted = pipeline.predict(BETWEEN)[:, None] if regresses else pipeline.predict_proba(BETWEEN)
    np.testing.assert_allclose(found, wanted, rtol=5e-5, atol=5e-6)


def test_thresholds_behind_scalers_decide_alike_for_the_float32_numbers_next_to_them() -> None:
    pipeline = make_pipeline(StandardScaler(), MinMaxScaler((-3, 5)), DecisionTreeRegressor(random_state=0))
    pipeline.fit(X, LENGTH)
    model: Any = convert(pipeline, name="tree").experts[0].model
    split = model.tree.feature >= 0

    rows = np.repeat(X[:1], 2 * split.sum(), axis=0).astype(np.float32)
    for index, (feature, threshold) in enumerate(
        zip(model.tree.feature[split], model.tree.threshold[split], strict=True)
    ):
        rows[2 * index, feature] = threshold
        rows[2 * index + 1, feature] = np.nextafter(threshold, np.float32(np.inf))

    scaled = pipeline[:-1].transform(rows.astype(np.float64)).astype(np.float32)
    thresholds = pipeline[-1].tree_.threshold[split]
    features = model.tree.feature[split]
    every = np.arange(len(thresholds))
    assert (scaled[::2][every, features] <= thresholds).all()
    assert (scaled[1::2][every, features] > thresholds).all()


def test_a_soft_vote_becomes_its_members_and_their_weights() -> None:
    vote = VotingClassifier(
        [
            ("lr", make_pipeline(StandardScaler(), LogisticRegression())),
            ("Naive Bayes", GaussianNB()),
            ("gone", "drop"),
            ("lr-", MLPClassifier((4,), max_iter=50, random_state=0)),
        ],
        voting="soft",
        weights=[2, 1, 5, 0.5],
    ).fit(X, SPECIES)
    conversion = convert(make_pipeline(RobustScaler(), vote).fit(X, SPECIES), name="vote")

    assert [expert.name for expert in conversion.experts] == ["vote-lr", "vote-naive-bayes", "vote-lr-2"]
    assert conversion.weights == pytest.approx([2 / 3.5, 1 / 3.5, 0.5 / 3.5])
    assert conversion.labels == ("setosa", "versicolor", "virginica")
    wanted = make_pipeline(RobustScaler(), vote).fit(X, SPECIES).predict_proba(BETWEEN)
    np.testing.assert_allclose(answers(conversion, BETWEEN), wanted, rtol=1e-4, atol=1e-5)


def test_votes_inside_votes_multiply_their_weights() -> None:
    inner = VotingRegressor([("a", LinearRegression()), ("b", Ridge(5.0))], weights=[1, 3])
    outer = VotingRegressor([("in", inner), ("tree", DecisionTreeRegressor(max_depth=3))]).fit(X, LENGTH)
    conversion = convert(outer, name="vote")

    assert [expert.name for expert in conversion.experts] == ["vote-in-a", "vote-in-b", "vote-tree"]
    assert conversion.weights == pytest.approx([0.125, 0.375, 0.5])
    np.testing.assert_allclose(answers(conversion, X)[:, 0], outer.predict(X), rtol=1e-5)


def test_a_hard_vote_is_converted_where_members_answer_winners_and_refused_elsewhere() -> None:
    trees = [("a", DecisionTreeClassifier(max_depth=1)), ("b", DecisionTreeClassifier(max_depth=2)), ("c", LinearSVC())]
    vote = VotingClassifier(trees, voting="hard", weights=[1, 1, 1.5]).fit(X2, TWO)
    conversion = convert(vote, name="vote")

    chosen = np.array(conversion.labels)[answers(conversion, BETWEEN).argmax(axis=1)]
    np.testing.assert_array_equal(chosen, vote.predict(BETWEEN))
    probable = VotingClassifier([("lr", LogisticRegression()), *trees], voting="hard").fit(X2, TWO)
    assert "voting='soft'" in refusal(probable)
    svms = VotingClassifier([("svm", SVC(kernel="linear")), *trees[:2]], voting="soft").fit(X2, TWO)
    assert "leave it out of a soft vote" in refusal(svms)


def test_labels_are_the_estimator_s_classes_unless_others_are_given() -> None:
    is_virginica = SPECIES == "virginica"
    estimator = LogisticRegression().fit(X, is_virginica)

    assert convert(estimator, name="x").labels == ("False", "True")
    assert convert(estimator, name="x", labels=[None, "virginica"]).experts[0].labels == (None, "virginica")
    assert convert(LogisticRegression().fit(X, is_virginica * 2.0), name="x").labels == (0, 2)
    assert "2 labels" in refusal(estimator, labels=["one"])
    assert "no labels" in refusal(LinearRegression().fit(X, LENGTH), labels=["one"])


@pytest.mark.parametrize(
    ("value", "label"),
    [("a", "a"), (3, 3), (np.int64(3), 3), (np.float32(2), 2), (0.5, "0.5"), (True, "True"), (np.str_("b"), "b")],
)
def test_a_class_is_spelled_alike_however_it_is_stored(value: object, label: object) -> None:
    assert label_of(value) == label
    assert type(label_of(value)) is type(label)


def test_what_has_no_form_in_the_format_is_refused_with_what_has() -> None:
    class Special(LinearRegression):  # type: ignore[misc] # scikit-learn is untyped
        pass

    both = np.stack([LENGTH, -LENGTH], axis=1)
    said = {
        "is not fitted": LinearRegression(),
        "none of scikit-learn's own": Special().fit(X, LENGTH),
        "has 2 outputs": LinearRegression().fit(X, both),
        "answers 2 questions": DecisionTreeRegressor().fit(X, both),
        "KNeighborsClassifier answers 2 questions": KNeighborsClassifier().fit(X, np.stack([SPECIES, SPECIES], axis=1)),
        "fit one for each": MLPRegressor(hidden_layer_sizes=(2,), max_iter=5).fit(X, both),
        "by one step each": GradientBoostingClassifier(n_estimators=2).fit(X2, TWO),
        "starts from another": GradientBoostingRegressor(n_estimators=2, init=LinearRegression()).fit(X, LENGTH),
        "vote for classes": KNeighborsRegressor().fit(X, LENGTH),
        "PCA cannot be folded": make_pipeline(PCA(2), Ridge()).fit(X, LENGTH),
        "Normalizer cannot be": make_pipeline(Normalizer(), Ridge()).fit(X, LENGTH),
        "clip=False": make_pipeline(MinMaxScaler(clip=True), Ridge()).fit(X, LENGTH),
        "told apart by distance": make_pipeline(StandardScaler(), KMeans(2, n_init=1)).fit(X),
        "found by distance": make_pipeline(StandardScaler(), KNeighborsClassifier()).fit(X, SPECIES),
        "two classes apart": LinearSVC().fit(X, SPECIES),
        "kernel='linear'": SVC().fit(X2, TWO),
        "two classes with": SGDClassifier(loss="modified_huber").fit(X2, TWO),
        "uniform": KNeighborsClassifier(weights=lambda distance: distance).fit(X, SPECIES),
        "not chebyshev": KNeighborsClassifier(metric="chebyshev").fit(X, SPECIES),
        "must not be negative": VotingRegressor([("a", Ridge()), ("b", Ridge())], weights=[2, -1]).fit(X, LENGTH),
        "what can be is": PCA(2).fit(X),
    }
    for what, estimator in said.items():
        assert what in refusal(estimator)


def test_steps_that_pass_through_are_no_steps() -> None:
    pipeline = make_pipeline("passthrough", StandardScaler(), None, Ridge()).fit(X, LENGTH)

    np.testing.assert_allclose(answers(convert(pipeline, name="x"), X)[:, 0], pipeline.predict(X), rtol=1e-5)


def test_a_file_says_that_it_holds_the_training_rows() -> None:
    notes = convert(KNeighborsClassifier(weights="distance").fit(X, SPECIES), name="x").experts[0].notes

    assert "whoever has it has them" in notes[0]
    assert "a row equal to a training row" in notes[-1]


def test_an_estimator_is_read_from_a_file_that_runs_nothing() -> None:
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, SPECIES)

    again = load_estimator(skops_io.dumps(pipeline))

    np.testing.assert_array_equal(again.predict_proba(X), pipeline.predict_proba(X))


@pytest.mark.parametrize("kind", CONVERTERS)
def test_an_estimator_of_every_kind_is_read_from_its_file(kind: str, of_each: Any) -> None:
    estimator = of_each[kind]

    again = load_estimator(skops_io.dumps(estimator))

    np.testing.assert_array_equal(answers(convert(again, name="x"), X), answers(convert(estimator, name="x"), X))


def test_a_vote_is_read_from_its_file() -> None:
    vote = VotingClassifier([("lr", LogisticRegression()), ("nb", GaussianNB())], voting="soft").fit(X, SPECIES)

    again = load_estimator(skops_io.dumps(make_pipeline(StandardScaler(), vote).fit(X, SPECIES)))

    assert [expert.name for expert in convert(again, name="x").experts] == ["x-lr", "x-nb"]


def test_an_estimator_whose_parts_do_not_fit_together_is_refused() -> None:
    pipeline = make_pipeline(StandardScaler(), Ridge()).fit(X, LENGTH)
    pipeline[-1].coef_ = np.ones(3)

    assert "the Ridge is not whole" in refusal(pipeline)
    vote = VotingRegressor([("a", Ridge()), ("b", VotingRegressor([("c", Ridge())]))]).fit(X, LENGTH)
    del vote.estimators_[1].estimators_[0].coef_
    assert "the Ridge (b / c) is not fitted" in refusal(vote)


def test_a_file_of_other_types_or_another_kind_is_refused() -> None:
    strange = skops_io.dumps({"run": np.testing.assert_allclose, "on": zipfile.Path})
    for data, what in (
        (strange, "nobody vouches for"),
        (b"\x80\x04pickle", "not a .skops file"),
        (_archive("x"), "cannot be read"),
    ):
        with pytest.raises(HocketError, match=what) as refused:
            load_estimator(data)
        assert refused.value.reason is Reason.BAD_REQUEST


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is_unpacked() -> None:
    data = skops_io.dumps(LinearRegression())

    with pytest.raises(HocketError) as refused:
        load_estimator(data, replace(DEFAULT_LIMITS, archive_files=0))
    assert refused.value.reason is Reason.TOO_LARGE


def _archive(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"nothing")
    return file.getvalue()
