"""Products of activations with rows of experts, which are float32, or bfloat16 on a base in bfloat16.

On a CUDA device rows in bfloat16 are read as they are, with sums in float32; what stands between A and B is rounded to
bfloat16 for that, once, as the base rounds what stands between its own layers. Elsewhere they are converted to float32
first, and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read_as_they_are(rows: Tensor) -> bool:
    """Whether rows are multiplied in their own dtype."""
    return rows.is_cuda and rows.dtype is torch.bfloat16


def shrink(x: Tensor, stack: Tensor) -> Tensor:
    """`x A^T` for each A of a stack.

    Args:
        x: `[n, in]`, in the base's dtype.
        stack: `[k, rows, in]`.

    Returns:
        float32 `[k, n, rows]`.
    """
    if read_as_they_are(stack) and x.dtype is stack.dtype:
        return torch.bmm(x.expand(len(stack), *x.shape), stack.mT, out_dtype=torch.float32)
    x = x.to(torch.float32)
    return torch.bmm(x.expand(len(stack), *x.shape), stack.to(torch.float32).mT)


def expand_into(y: Tensor, middle: Tensor, rows: Tensor) -> None:
    """Add `middle B` to `y`, which is rounded once where it is not float32.

    Args:
        y: `[n, out]`, float32; or in the rows' dtype, where they are read as they are.
        middle: float32 `[n, rows]`, or in the rows' dtype.
        rows: `[rows, out]`.
    """
    if not read_as_they_are(rows):
        y.addmm_(middle, rows.to(torch.float32))
    elif y.dtype is rows.dtype:
        y.addmm_(middle.to(rows.dtype), rows)
    else:
        y.add_(torch.mm(middle.to(rows.dtype), rows, out_dtype=torch.float32))
