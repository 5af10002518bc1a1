"""Where the numbers of an expert stand in a row of the arena: one column for each input and output of a projection.

A row of a layer is as long as all projections of that layer together; first come the inputs of all of them, then the
outputs. What lies outside the layers, `lm_head` above all, has rows of its own: few experts adapt it, and it can be as
wide as many layers.

Rows are float32, or bfloat16 on a base in bfloat16. Factors and biases are float32 all the same: in bfloat16 they take
three rows, whose sum they are to the last bit (8 + 8 + 8 bits of 24).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_LAYER: Final = re.compile(r"\.(\d+)\.")
_WIDTH_MULTIPLE: Final = 16
"""Rows begin at multiples of at least 32 bytes."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Of one projection.

    Attributes:
        layer: Which layer it belongs to, counted from 0; None outside the layers.
        inputs: Those of its inputs.
        outputs: Those of its outputs.
    """

    layer: int | None
    inputs: slice
    outputs: slice


class RowLayout:
    """The columns of every projection of a base.

    Args:
        projections: By name; the first number in a name is that of its layer.
        dtype: Of the base.

    Attributes:
        dtype: Of rows.
        columns: By the projection's name.
        layer_count: Layers with projections.
        width: Numbers of a row in a layer.
        outside_width: Numbers of a row outside the layers; 0 if no projection is there.
        vector_rows: Rows that a float32 vector takes.
    """

    def __init__(self, projections: Mapping[str, nn.Linear], dtype: torch.dtype) -> None:
        self.dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        self.vector_rows = 3 if self.dtype is torch.bfloat16 else 1
        self.columns: dict[str, Columns] = {}
        groups: dict[int, list[str]] = {}
        outside: list[str] = []
        for name in projections:
            found = _LAYER.search(name)
            (groups.setdefault(int(found[1]), []) if found else outside).append(name)
        layers = [groups[number] for number in sorted(groups)]
        self.layer_count = len(layers)
        self.width = max((self._lay_out(layer, names, projections) for layer, names in enumerate(layers)), default=0)
        self.outside_width = self._lay_out(None, outside, projections)

    @property
    def row_bytes(self) -> int:
        """Of a row in one layer."""
        return self.width * self.dtype.itemsize

    @property
    def outside_row_bytes(self) -> int:
        """Of a row outside the layers."""
        return self.outside_width * self.dtype.itemsize

    def _lay_out(self, layer: int | None, names: list[str], projections: Mapping[str, nn.Linear]) -> int:
        """Give these projections their columns; answers how many there are."""
        begin, end = 0, sum(projections[name].in_features for name in names)
        for name in names:
            linear = projections[name]
            inputs = slice(begin, begin + linear.in_features)
            outputs = slice(end, end + linear.out_features)
            self.columns[name] = Columns(layer, inputs, outputs)
            begin, end = inputs.stop, outputs.stop
        return -(-end // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def put_vector(rows: Tensor, vector: Tensor) -> None:
    """Write a float32 vector into rows that add up to it.

    Args:
        rows: `[vector_rows, n]`, of the layout's dtype.
        vector: float32 `[n]`, on the same device.
    """
    finite = torch.finfo(rows.dtype)
    rest = vector
    for row in rows:
        row.copy_(rest.clamp(finite.min, finite.max))  # the largest numbers of float32 would be rounded to infinity
        rest = rest - row.to(torch.float32)
