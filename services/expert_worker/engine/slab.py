"""One memory for the keys and values of sequences and for the experts that compute, and the line between them.

For each layer of the base there is one tensor of bytes, all of one size, allocated once. Pages of keys and values are
counted from its beginning, rows of experts up to its end:

    | page 0 | page 1 | ...          |boundary|          ... | row R-2 | row R-1 |

A page may be used if it ends at or below the boundary, a row if it begins at or above it; the boundary is the same in
every layer. So neither can take a byte of the other's, both together can take no byte more than there is, and nothing
ever moves to another address. Who wants more than its side has asks for it here, and the other side has to retreat:
the boundary moves when nothing that is in use lies between.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ALIGNMENT_BYTES: Final = 64
"""The bytes of a layer are a multiple of it."""


class Slab:
    """Layers of bytes, and the boundary in them. For one thread, except `has_room` and the sizes.

    Args:
        layer_count: Layers of the base.
        layer_bytes: Bytes of each; a multiple of `ALIGNMENT_BYTES`.
        page_bytes: What a page takes in one layer; 0 where there are none.
        row_bytes: What a row takes in one layer; 0 where there are none.
        device: Of the base.

    Attributes:
        layer_bytes: Bytes of each layer.
        page_bytes: As given.
        row_bytes: As given.
        page_count: Pages that there would be without rows.
        row_count: Rows that there would be without pages.
        rows_retreat: Asked to let go of every row before the one given, as far as they are not in use; answers whether
            all of them are free now.
        pages_retreat: The same for every page from the one given on. Told, besides, whether pages that are only kept
            in case they are needed again have to go as well.

    Raises:
        HocketError: `DEVICE_MEMORY` if there is no room for it.
    """

    def __init__(
        self, layer_count: int, layer_bytes: int, *, page_bytes: int, row_bytes: int, device: torch.device
    ) -> None:
        self.layer_bytes = layer_bytes
        self.page_bytes = page_bytes
        self.row_bytes = row_bytes
        self.page_count = layer_bytes // page_bytes if page_bytes else 0
        self.row_count = layer_bytes // row_bytes if row_bytes else 0
        self.rows_retreat: Callable[[int], bool] = lambda _first: True
        self.pages_retreat: Callable[[int, bool], bool] = lambda _end, _kept: True
        self._boundary = layer_bytes
        try:
            self._layers = [zeros((layer_bytes,), torch.uint8, device) for _ in range(layer_count)]
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{device} has no room for {layer_count * layer_bytes} bytes of keys, values and running experts: "
                "set worker.slab_bytes lower",
            ) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers."""
        return len(self._layers) * self.layer_bytes

    @property
    def page_limit(self) -> int:
        """Pages below this one may be used."""
        return self._boundary // self.page_bytes if self.page_bytes else 0

    @property
    def row_limit(self) -> int:
        """Rows from this one on may be used."""
        return self._row_from(self._boundary)

    def pages(self, layer: int) -> Tensor:
        """uint8 `[page_count, page_bytes]`: a view of a layer."""
        return self._layers[layer][: self.page_count * self.page_bytes].view(self.page_count, self.page_bytes)

    def rows(self, layer: int, dtype: torch.dtype) -> Tensor:
        """`[row_count, row_bytes / itemsize]` of a dtype: a view of a layer."""
        return (
            self._layers[layer][self._row_start(0) :].view(dtype).view(self.row_count, self.row_bytes // dtype.itemsize)
        )

    def has_room(self, page_count: int, row_count: int) -> bool:
        """Whether there would be room for so many of both if nothing else were there. Any thread may ask."""
        return page_count * self.page_bytes + row_count * self.row_bytes <= self.layer_bytes

    def claim_pages(self, end: int) -> bool:
        """Have every page below `end` usable; False if experts that compute are in the way, or if there are fewer."""
        if end <= self.page_limit:
            return True
        if end > self.page_count or not self.rows_retreat(self._row_from(end * self.page_bytes)):
            return False
        self._move(end * self.page_bytes)
        return True

    def claim_rows(self, first: int, *, kept_pages: bool) -> bool:
        """Have every row from `first` on usable; False if pages in use are in the way.

        Args:
            first: A row.
            kept_pages: Whether pages make way that are only kept in case they are needed again.
        """
        start = self._row_start(first)
        if start < self._boundary:
            if not self.pages_retreat(start // self.page_bytes if self.page_bytes else 0, kept_pages):
                return False
            self._move(start)
        return True

    def _move(self, boundary: int) -> None:
        """Move the boundary. What changes sides becomes zeros: products run over whole pages, and over rows of nobody.

        With weights of 0; but bytes of the other side can be no number, which times 0 is not 0.
        """
        begin, end = sorted((self._boundary, boundary))
        for layer in self._layers:
            layer[begin:end].zero_()
        self._boundary = boundary

    def _row_start(self, row: int) -> int:
        return self.layer_bytes - (self.row_count - row) * self.row_bytes

    def _row_from(self, start: int) -> int:
        """The first row that begins at or after a byte."""
        return self.row_count - (self.layer_bytes - start) // self.row_bytes if self.row_bytes else 0


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU those of numpy, which take memory page by page as they are written: torch writes them all."""
    size_bytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or not size_bytes:
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size_bytes, np.uint8)).view(dtype).view(size)
