"""A projection of the base, and what experts make of it in one step.

    x' = x + x * D_u
    y  = W x' + bias;  y' = y + y * D_o + (y - bias) * D_g + sum_e w_e c_e + sum_e w_e B_e (A_e x')

with D = sum_e w_e (factors_e - 1) for each row of the batch, over the experts with factors of the input (D_u), of the
output with its bias (D_o), and of the output without (D_g); c_e is what an expert adds to the bias.

x' and y are in the base's dtype, as the base reads and gives them. Everything else is float32, and y' is rounded once,
at the end: what a row computes would otherwise depend on how the experts of others are put together with its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Strips:
    """Where experts lie side by side, for one projection, in the dtype of the arena: float32 or bfloat16.

    Attributes:
        inputs: `[rows, in]`: rows of A, and factors of the input, less 1.
        outputs: `[rows, out]`: rows of B transposed, factors of the output, less 1, and what is added to the bias.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Factors or biases of some experts, weighted for each row of the batch.

    Attributes:
        weights: float32 `[T, S]`.
        rows: int64 `[S]`: where they lie; several add up to a vector in bfloat16.
    """

    weights: Tensor
    rows: Tensor

    def sum_of(self, strip: Tensor) -> Tensor:
        """`[T, n]`, of `[rows, n]`."""
        return self.weights @ strip.index_select(0, self.rows).to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Low-rank updates by consecutive rows of A and B.

    Attributes:
        start: First row.
        stop: After the last row.
        tokens: The rows of the batch that are updated: n of them.
        weights: float32 `[n, stop - start]` or `[n, 1]`.
        absent: bool, as `weights`: which of these are of experts that a row does not use; None if there are none.
    """

    start: int
    stop: int
    tokens: slice | Tensor
    weights: Tensor
    absent: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor, strips: Strips) -> None:
        """Add to `y [T, out]` what `x [T, in]` gives; both float32."""
        b = strips.outputs[self.start : self.stop].to(torch.float32)
        if isinstance(self.tokens, slice):
            y[self.tokens].addmm_(self._shrunk(x[self.tokens], strips), b)
        else:
            y.index_add_(0, self.tokens, self._shrunk(x.index_select(0, self.tokens), strips) @ b)

    def _shrunk(self, x: Tensor, strips: Strips) -> Tensor:
        shrunk = (x @ strips.inputs[self.start : self.stop].to(torch.float32).T).mul_(self.weights)
        if self.absent is not None:
            # Not left to a weight of 0: where an expert of another request overflows, 0 times infinity is not 0.
            shrunk.masked_fill_(self.absent, 0)
        return shrunk


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the experts of one step do to one projection.

    Attributes:
        inputs: Factors of the input.
        outputs: Factors of the output and its bias.
        products: Factors of the output without its bias.
        biases: What is added, whatever the input.
        updates: What is added.
    """

    inputs: Vectors | None
    outputs: Vectors | None
    products: Vectors | None
    biases: Vectors | None
    updates: tuple[Update, ...]


class Projection(nn.Module):
    """A linear layer of the base, and experts on top of it where a step has any.

    Args:
        name: Its own.
        base: The layer.
        strips: Where experts lie.
        works: What they do in this step, by the name of the projection; not there means nothing.
    """

    def __init__(self, name: str, base: nn.Linear, strips: Strips, works: Mapping[str, Work]) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._strips = strips
        self._works = works

    @property
    def weight(self) -> Tensor:
        """The base's."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., out]` of `[..., in]`: rows of the batch, in the order for which the step was made."""
        work = self._works.get(self._name)
        if work is None:
            return self.base(x)  # type: ignore[no-any-return]  # modules are not typed
        strips = self._strips
        if work.inputs is not None:
            rows = x.reshape(-1, x.shape[-1])
            x = torch.addcmul(rows, rows, work.inputs.sum_of(strips.inputs)).to(x.dtype).view(x.shape)
        y: Tensor = self.base(x)
        plain = y.view(-1, y.shape[-1]).to(torch.float32)
        total = plain
        if work.outputs is not None:
            total = torch.addcmul(total, plain, work.outputs.sum_of(strips.outputs))
        if work.products is not None:
            product = plain if self.bias is None else plain - self.bias
            total = torch.addcmul(total, product, work.products.sum_of(strips.outputs))
        if work.biases is not None:
            total = total + work.biases.sum_of(strips.outputs)
        if work.updates:
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
            for update in work.updates:
                update.add_to(total, rows, strips)
        return total.to(y.dtype).view(y.shape)
