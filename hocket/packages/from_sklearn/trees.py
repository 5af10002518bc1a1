"""Trees: both libraries keep nodes in arrays, the root first, and send x <= threshold to the left.

scikit-learn's are in preorder, or with `max_leaf_nodes` in the order in which they were found; children are named by
their places, so that either does. The writer puts them in preorder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.packages.from_sklearn.reading import Estimator, narrow
from hocket.packages.model import Floats, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from hocket.packages.from_sklearn.scaling import Steps

_FLOAT32_MAX_BITS: Final = 0x7F7FFFFF
_SIGN_BIT: Final = np.uint32(0x80000000)


def column_tree(tree: Estimator, steps: Steps) -> Tree:
    """A classifier's `tree_` behind scalers: each leaf answers its largest class, the first of those equally large."""
    return _nodes(tree, steps, tree.value[:, 0, :].argmax(axis=1).astype(np.int64))


def value_tree(
    tree: Estimator,
    steps: Steps,
    change: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda leaves: leaves,
) -> Tree:
    """A regressor's `tree_` behind scalers.

    Args:
        tree: With one output.
        steps: What scalers do before it.
        change: What becomes of its leaves, all at once, in float64.
    """
    return _nodes(tree, steps, narrow(change(tree.value[:, 0, 0])))


def _nodes(tree: Estimator, steps: Steps, answers: NDArray[Any]) -> Tree:
    leaf = tree.children_left < 0
    return Tree(
        feature=np.where(leaf, -1, tree.feature).astype(np.int64),
        threshold=np.where(leaf, np.float32(0), _thresholds(tree, steps)),
        left=tree.children_left.astype(np.int64),
        right=tree.children_right.astype(np.int64),
        value=np.where(leaf, answers, answers.dtype.type(0)),
        n_samples=np.where(leaf, tree.n_node_samples, 0).astype(np.int64),
    )


def _thresholds(tree: Estimator, steps: Steps) -> Floats:
    """The greatest float32 that each split sends to the left: float32 `[nodes]`.

    scikit-learn scales in float64, rounds to float32, and compares with a float64 threshold. All of that keeps the
    order of its inputs, so there is one greatest float32 that still goes left, and it decides alike for every float32.
    It is found by halving the ordered float32 numbers 32 times.
    """
    columns = np.maximum(tree.feature, 0)

    def goes_left(ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        x = _float_at(ordinals).astype(np.float64)
        for step in steps:
            x = step.apply(x, columns)
        narrow: NDArray[np.bool_] = x.astype(np.float32) <= tree.threshold
        return narrow

    low = np.full(len(columns), -_FLOAT32_MAX_BITS, np.int64)
    high = np.full(len(columns), _FLOAT32_MAX_BITS, np.int64)
    with np.errstate(over="ignore"):
        while (low < high).any():
            middle = (low + high + 1) // 2
            left = goes_left(middle)
            low, high = np.where(left, middle, low), np.where(left, high, middle - 1)
    return _float_at(low)


def _float_at(ordinals: NDArray[np.int64]) -> Floats:
    """The float32 at a place in their order; 0 is at 0."""
    bits = np.abs(ordinals).astype(np.uint32)
    found: Floats = np.where(ordinals < 0, bits | _SIGN_BIT, bits).astype(np.uint32).view(np.float32)
    return found


def mixed_leaves(trees: Iterable[Estimator]) -> tuple[str, ...]:
    """What to note of classifiers' `tree_`s whose leaves are not all of one class."""
    rows = mixed = 0
    for tree in trees:
        leaf = tree.children_left < 0
        shares = tree.value[leaf, 0, :]
        samples = tree.n_node_samples[leaf]
        rows += int(samples.sum())
        mixed += int(samples[shares.max(axis=1) < shares.sum(axis=1) * (1 - 1e-9)].sum())
    if not mixed:
        return ()
    note = (
        f"{mixed / rows:.1%} of the training rows lie in leaves of several classes: such a leaf votes for the largest, "
        "where scikit-learn counts the share of each"
    )
    return (note,)
