"""An estimator, a pipeline or a vote as experts with names and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from hocket.identity import check_name
from hocket.packages import model as m
from hocket.packages.from_sklearn.estimators import CONVERTERS, WHY_NOT
from hocket.packages.from_sklearn.reading import Estimator, bad, kind_of
from hocket.packages.from_sklearn.scaling import Steps, steps_of
from hocket.packages.labels import label_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Label: TypeAlias = str | int | None

_NOT_IN_A_NAME: Final = re.compile(r"[^a-z0-9._-]+")
_ANSWERS_ONE_HOT: Final = (m.DecisionTreeClassifier, m.LinearSVM)


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedExpert:
    """One expert, to be written into a package of its own.

    Attributes:
        name: That it was given, or the vote's and the member's.
        model: What answers.
        labels: One per output column of a classifier; None for a regressor.
        notes: Where its answers differ from the estimator's, for people.
    """

    name: str
    model: m.Model
    labels: tuple[Label, ...] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """What an estimator became.

    Attributes:
        experts: One, or the members of a vote.
        weights: Of the mixture's fixed gate, one per member; None if there is no vote.
        labels: The ordered classes of the whole; None for regressors.
    """

    experts: tuple[ConvertedExpert, ...]
    weights: tuple[float, ...] | None
    labels: tuple[Label, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A converted member: its part of a name, its weight among all, its classes as the estimator spells them."""

    path: tuple[str, ...]
    weight: float
    model: m.Model
    classes: NDArray[Any] | None
    notes: tuple[str, ...] = ()


def convert(estimator: Estimator, *, name: str, labels: Sequence[Label] | None = None) -> Conversion:
    """The experts, and the weights of the mixture, that answer as a fitted estimator does.

    Args:
        estimator: Of scikit-learn: linear, ridge, lasso and elastic-net regression and their like; logistic regression,
            linear SVMs, trees, random and extra forests, gradient boosting for regression, k-means, naive Bayes and
            nearest neighbours; multi-layer perceptrons; a pipeline of scalers before one of these; and a vote.
        name: Of the package, or the mixture; members of a vote add theirs.
        labels: In place of the estimator's own classes: one per column, None for one to drop.

    Raises:
        HocketError: `BAD_REQUEST` for an estimator that is not fitted, or cannot be converted: it says why, and what
            can; or for labels that are not one per column.
    """
    check_name(name)
    found = _convert(estimator, ())
    classes = found[0].classes
    own = None if classes is None else tuple(map(label_of, classes))
    chosen = own if labels is None else tuple(labels)
    if (chosen is None) != (own is None) or (chosen is not None and own is not None and len(chosen) != len(own)):
        wanted = "no labels, for it is no classifier" if own is None else f"{len(own)} labels, one for each of {own}"
        raise bad(f"the {type(estimator).__name__} has {wanted}")
    named = dict(zip(own or (), chosen or (), strict=True))
    experts = tuple(
        ConvertedExpert(
            expert_name,
            member.model,
            None if member.classes is None else tuple(named[label_of(value)] for value in member.classes),
            member.notes,
        )
        for expert_name, member in zip(_names(name, found), found, strict=True)
    )
    weights = None if found[0].path == () else tuple(member.weight for member in found)
    return Conversion(experts, weights, chosen)


def _convert(estimator: Estimator, steps: Steps, inside: tuple[str, ...] = ()) -> list[_Found]:
    """An estimator behind scalers, as its only member or those of its vote; `inside` are the names that lead to it."""
    what = f"the {type(estimator).__name__}" + (f" ({' / '.join(inside)})" if inside else "")
    try:
        return _converted(estimator, steps, inside)
    except AttributeError as error:
        raise bad(f"{what} is not fitted: call its fit first ({error})") from error
    except (IndexError, TypeError, ValueError) as error:
        raise bad(f"{what} is not whole: its parts do not fit together ({error})") from error


def _converted(estimator: Estimator, steps: Steps, inside: tuple[str, ...]) -> list[_Found]:
    kind = kind_of(estimator)
    if kind == "Pipeline":
        *scalers, (_, last) = estimator.steps
        for _, scaler in scalers:
            steps += steps_of(scaler)
        return _convert(last, steps, inside)
    if kind in {"VotingClassifier", "VotingRegressor"}:
        return _vote(estimator, steps, inside, classifies=kind == "VotingClassifier")
    converter = CONVERTERS.get(kind)
    if converter is None:
        raise bad(f"{kind} cannot be converted: {WHY_NOT.get(kind, _instead())}")
    width = estimator.n_features_in_
    if any(step.values.shape != (width,) for step in steps):
        raise bad(f"the {kind} takes {width} columns, a scaler before it others")
    model, classes, notes = converter(estimator, steps)
    return [_Found((), 1.0, model, classes, notes)]


def _vote(estimator: Estimator, steps: Steps, inside: tuple[str, ...], *, classifies: bool) -> list[_Found]:
    hard = classifies and estimator.voting == "hard"
    given = estimator.weights if estimator.weights is not None else [1.0] * len(estimator.estimators)
    voters = [
        (name, float(weight))
        for (name, member), weight in zip(estimator.estimators, given, strict=True)
        if not isinstance(member, str)  # 'drop'
    ]
    total = sum(weight for _, weight in voters)
    if any(weight < 0 for _, weight in voters) or total <= 0:
        raise bad("the weights of a vote must not be negative, nor all zero: a mixture's are none of that")
    found: list[_Found] = []
    for (name, weight), member in zip(voters, estimator.estimators_, strict=True):
        inner = _convert(member, steps, (*inside, name))
        if hard and not (len(inner) == 1 and isinstance(inner[0].model, _ANSWERS_ONE_HOT)):
            raise bad(
                f"{name} answers probabilities, which a mixture adds; a hard vote counts winners: fit the vote with "
                "voting='soft'"
            )
        if classifies and not hard and any(isinstance(part.model, m.LinearSVM) for part in inner):
            raise bad(f"{name} is an SVM, whose probabilities .apr has no place for: leave it out of a soft vote")
        for part in inner:
            # Members of a vote have learned numbers of classes in place of the classes.
            classes = None if part.classes is None else np.asarray(estimator.classes_)[part.classes.astype(np.int64)]
            found.append(replace(part, path=(name, *part.path), weight=part.weight * weight / total, classes=classes))
    return found


def _names(name: str, found: Sequence[_Found]) -> list[str]:
    """A package name for each member; those that come out alike get numbers."""
    names: list[str] = []
    for member in found:
        part = "-".join((name, *(_NOT_IN_A_NAME.sub("-", step.lower()).strip("-._") for step in member.path)))
        number = 1
        while (wanted := part if number == 1 else f"{part}-{number}") in names:
            number += 1
        names.append(check_name(wanted))
    return names


def _instead() -> str:
    return f"what can be is {', '.join(sorted(CONVERTERS))}, pipelines of scalers before these, and votes of them"
