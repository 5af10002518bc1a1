"""Products of activations with rows of experts, exact but for the order of float32 sums.

Rows of experts are float32, or bfloat16 on a base in bfloat16. On a CUDA device the latter are read as they are: the
products of two numbers in bfloat16 are exact in float32, and a float32 number is the sum of three in bfloat16 (8 + 8 +
8 bits of 24). Elsewhere they are converted first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(x: Tensor, stack: Tensor) -> Tensor:
    """`x A^T` for each A of a stack.

    Args:
        x: `[n, in]`, in the base's dtype.
        stack: `[k, rows, in]`.

    Returns:
        float32 `[k, n, rows]`.
    """
    if _is_read_as_it_is(stack) and x.dtype is stack.dtype:
        return torch.bmm(x.expand(len(stack), *x.shape), stack.mT, out_dtype=torch.float32)
    x = x.to(torch.float32)
    return torch.bmm(x.expand(len(stack), *x.shape), stack.to(torch.float32).mT)


def expand_into(y: Tensor, x: Tensor, rows: Tensor) -> None:
    """Add `x B` to `y`.

    Args:
        y: float32 `[n, out]`.
        x: float32 `[n, rows]`.
        rows: `[rows, out]`.
    """
    if _is_read_as_it_is(rows):
        parts = torch.mm(torch.cat(split(x, rows.dtype)), rows, out_dtype=torch.float32)
        y.add_(parts.view(-1, *y.shape).sum(dim=0))
    else:
        y.addmm_(x, rows.to(torch.float32))


def split(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Three tensors that add up to a float32 one, as long as it is no larger than the dtype's largest number."""
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(torch.float32)
    return parts


def _is_read_as_it_is(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype is torch.bfloat16
