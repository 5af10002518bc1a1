"""How a class is spelled as a label, whatever type a training library has stored it in."""

from __future__ import annotations

import numpy as np


def label_of(value: object) -> str | int:
    """A class as a label: whole numbers as integers, all else as text.

    Args:
        value: A Python or numpy number, truth value or text.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and plain.is_integer():
        return int(plain)
    return plain if isinstance(plain, int) and not isinstance(plain, bool) else str(plain)
