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

from services.expert_worker.engine.products import expand_into, read_as_they_are, shrink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

    def shrunk(self, x: Tensor, stack: Tensor) -> Tensor:
        """What lies between A and B, weighted, as `expand_into` takes it: `[k, n, rows]`, of `x [T, in]` and k A."""
        rows = x[self.tokens] if isinstance(self.tokens, slice) else x.index_select(0, self.tokens)
        shrunk = shrink(rows, stack[:, self.start : self.stop]).mul_(self.weights)
        if self.absent is not None:
            # Not left to a weight of 0: where an expert of another request overflows, 0 times infinity is not 0.
            shrunk.masked_fill_(self.absent, 0)
        return shrunk.to(stack.dtype) if read_as_they_are(stack) else shrunk  # once for all that share it

    def add_to(self, y: Tensor, shrunk: Tensor, outputs: Tensor) -> None:
        """Add to `y [T, out]` what lies between, `[n, rows]`, times the B of one projection."""
        b = outputs[self.start : self.stop]
        if isinstance(self.tokens, slice):
            expand_into(y[self.tokens], shrunk, b)
        else:
            added = y.new_zeros((len(shrunk), y.shape[1]))
            expand_into(added, shrunk, b)
            y.index_add_(0, self.tokens, added)


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

    @property
    def is_one_product(self) -> bool:
        """Whether there is nothing but one low-rank update."""
        vectors = (self.inputs, self.outputs, self.products, self.biases)
        return len(self.updates) == 1 and all(each is None for each in vectors)


class StepWork:
    """What projections do in the step that is computed; nothing between steps.

    Projections that read the same input and do the same with it, as those of queries, keys and values do, share one
    product with all of their A: the first of them computes it, the others find it.

    Attributes:
        works: By the name of the projection; not there means nothing.
        stacks: `[k, rows, in]`, the A of a projection and of those it shares its input with, and its place among them.
    """

    def __init__(self) -> None:
        self.works: Mapping[str, Work] = {}
        self.stacks: Mapping[str, tuple[Tensor, int]] = {}
        self._last: tuple[Tensor, Tensor, list[Tensor]] | None = None

    def clear(self) -> None:
        """The step is over."""
        self.works = {}
        self._last = None

    def shrunk(self, name: str, x: Tensor, updates: tuple[Update, ...]) -> Iterator[Tensor]:
        """What lies between A and B of a projection, for each of its updates.

        Args:
            name: Of the projection.
            x: Its input, as it came: whoever shares it has got the same tensor.
            updates: Those of its work.
        """
        stack, which = self.stacks[name]
        if self._last is None or self._last[0] is not x or self._last[1] is not stack:
            rows = x.reshape(-1, x.shape[-1])
            self._last = x, stack, [update.shrunk(rows, stack) for update in updates]
        return (shrunk[which] for shrunk in self._last[2])


class Projection(nn.Module):
    """A linear layer of the base, and experts on top of it where a step has any.

    Args:
        name: Its own.
        base: The layer.
        strips: Where experts lie.
        step: What is done in this step.
    """

    def __init__(self, name: str, base: nn.Linear, strips: Strips, step: StepWork) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._strips = strips
        self._step = step

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
        work = self._step.works.get(self._name)
        if work is None:
            return self.base(x)  # type: ignore[no-any-return]  # modules are not typed
        strips = self._strips
        if work.inputs is not None:
            rows = x.reshape(-1, x.shape[-1])
            x = torch.addcmul(rows, rows, work.inputs.sum_of(strips.inputs)).to(x.dtype).view(x.shape)
        y: Tensor = self.base(x)
        plain = y.view(-1, y.shape[-1])
        if not (
            work.is_one_product and read_as_they_are(strips.outputs)
        ):  # which adds to what is there, and rounds once
            plain = plain.to(torch.float32)
        total = plain
        if work.outputs is not None:
            total = torch.addcmul(total, plain, work.outputs.sum_of(strips.outputs))
        if work.products is not None:
            product = plain if self.bias is None else plain - self.bias
            total = torch.addcmul(total, product, work.products.sum_of(strips.outputs))
        if work.biases is not None:
            total = total + work.biases.sum_of(strips.outputs)
        if work.updates:
            shrunk = self._step.shrunk(self._name, x, work.updates)
            for update, each in zip(work.updates, shrunk, strict=True):
                update.add_to(total, each, strips.outputs)
        return total.to(y.dtype).view(y.shape)
