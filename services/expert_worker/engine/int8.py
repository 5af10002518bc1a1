"""Rows of numbers as int8, each row with a scale of its own, symmetric around 0.

    scale = max |x| / 127        n = round(x / scale)        x' = scale * n

No number of a row loses more than half a step: |x - x'| <= max |x| / 254, and what float32 rounds (less than one part
in a million). A row depends on nothing but itself. Rows whose largest number is below 2**-119 become zeros; one with a
number that is not finite stays not finite.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 127
_SCALE_MIN: Final = torch.finfo(torch.float32).tiny
"""Smaller ones are not held precisely enough to divide by."""


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take rows of floats apart.

    Args:
        rows: `[..., n]`.

    Returns:
        The numbers, int8 `[..., n]`, and the scales, float32 `[...]`.
    """
    rows = rows.to(torch.float32)
    scales = rows.abs().amax(dim=-1, keepdim=True) / _STEPS
    scales = scales.masked_fill_(scales < _SCALE_MIN, 0)
    numbers = rows.div(scales.masked_fill(scales == 0, torch.inf)).round_().to(torch.int8)
    return numbers, scales.squeeze(-1)


def dequantise(numbers: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Put rows together again.

    Args:
        numbers: int8 `[..., n]`.
        scales: float32 `[...]`.
        out: float32, as `numbers`, to write to; None for a new one.

    Returns:
        float32 `[..., n]`.
    """
    rows = numbers.to(torch.float32) if out is None else out.copy_(numbers)
    return rows.mul_(scales.unsqueeze(-1))  # faster than a product of two dtypes
