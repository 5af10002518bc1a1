"""What reading any object of scikit-learn's takes: its kind, numbers in float32, and the refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from hocket.packages.model import Floats

Estimator: TypeAlias = Any
"""An object of scikit-learn's, or a part of one: it comes without types."""


def kind_of(estimator: Estimator) -> str:
    """The class name of what is scikit-learn's own; subclasses may answer otherwise.

    Raises:
        HocketError: `BAD_REQUEST` for anything else.
    """
    kind = type(estimator)
    if kind.__module__.partition(".")[0] != "sklearn":
        raise bad(f"{kind.__module__}.{kind.__qualname__} is none of scikit-learn's own, and may answer otherwise")
    return kind.__name__


def narrow(values: ArrayLike) -> Floats:
    """float32; what lies beyond becomes infinite, which the writer refuses."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)


def bad(what: str) -> HocketError:
    """The refusal of an estimator."""
    return HocketError(Reason.BAD_REQUEST, what)
