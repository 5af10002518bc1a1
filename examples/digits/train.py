"""Train small experts that each know some digits, and a gate that learns who knows what.

Nobody sees the held-out rows. The experts see one part of the rest, the gate another, so that the gate learns how
good the experts are and not how well they remember.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOREST_DIGITS: Final = {"digits-026": (0, 2, 6), "digits-18": (1, 8), "digits-359": (3, 5, 9), "digits-47": (4, 7)}
"""Forests, and the look-alikes each of them has learnt to tell apart; they have never seen another digit."""
LOGISTIC_DIGITS: Final = (3, 8, 9)
"""Digits with a one-versus-rest expert of their own."""
_GATE_L2: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of 64 pixels scaled to [0, 1], float32 `[N, 64]`, with their digits."""

    rows: NDArray[np.float32]
    digits: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Member:
    """One expert.

    Args:
        name: Its package name.
        estimator: A fitted scikit-learn classifier.
        digits: What its output columns score; None for the 'rest' of one-versus-rest.
    """

    name: str
    estimator: Any
    digits: tuple[int | None, ...]


def splits() -> tuple[Split, Split, Split]:
    """The digits that come with scikit-learn in three parts: for the experts, for the gate, and held out."""
    pixels, digits = load_digits(return_X_y=True)
    rows = (pixels / 16).astype(np.float32)
    rest, held_out, rest_digits, held_out_digits = train_test_split(
        rows, digits, test_size=0.25, random_state=0, stratify=digits
    )
    expert, gate, expert_digits, gate_digits = train_test_split(
        rest, rest_digits, test_size=0.3, random_state=0, stratify=rest_digits
    )
    return Split(expert, expert_digits), Split(gate, gate_digits), Split(held_out, held_out_digits)


def train_members(data: Split) -> list[Member]:
    """A forest for each group of look-alikes, and a logistic expert for each of three digits."""
    members = []
    for name, known in FOREST_DIGITS.items():
        mine = np.isin(data.digits, known)
        forest = RandomForestClassifier(n_estimators=150, max_depth=10, random_state=0)
        members.append(Member(name, forest.fit(data.rows[mine], data.digits[mine]), known))
    for digit in LOGISTIC_DIGITS:
        logistic = LogisticRegression(max_iter=500).fit(data.rows, data.digits == digit)
        members.append(Member(f"is-{digit}", logistic, (None, digit)))
    return members


def train_gate(members: list[Member], data: Split) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A linear softmax gate that makes the right digit likely under the mixture.

    Minimises `-mean log sum_e g_e(x) p_e(digit | x)` with a small L2 penalty, the experts fixed: the gate of a
    mixture of experts (Jacobs, Jordan, Nowlan and Hinton 1991, equation 1.3 for discrete outcomes).

    Returns:
        Weights, float32 `[64, E]`, and bias, float64 `[E]`.
    """
    inputs = np.hstack([data.rows, np.ones((len(data.rows), 1))])
    likelihood = np.stack([_likelihood(member, data) for member in members], axis=1) + 1e-6

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(inputs.shape[1], len(members))
        logits = inputs @ weights
        gate = np.exp(logits - logits.max(axis=1, keepdims=True))
        gate /= gate.sum(axis=1, keepdims=True)
        joint = gate * likelihood
        total = joint.sum(axis=1, keepdims=True)
        slope = inputs.T @ (gate - joint / total) / len(inputs) + _GATE_L2 * weights
        return float(-np.log(total).mean() + _GATE_L2 / 2 * (weights**2).sum()), slope.ravel()

    found = minimize(loss, np.zeros(inputs.shape[1] * len(members)), jac=True, method="L-BFGS-B")
    weights = found.x.reshape(inputs.shape[1], len(members))
    return weights[:-1].astype(np.float32), weights[-1]


def _likelihood(member: Member, data: Split) -> NDArray[np.float64]:
    """Probability that the member gives to the right digit; 0 where it does not know that digit."""
    scores = member.estimator.predict_proba(data.rows)
    likelihood = np.zeros(len(data.digits))
    for column, digit in enumerate(member.digits):
        if digit is not None:
            likelihood[data.digits == digit] = scores[data.digits == digit, column]
    return likelihood
