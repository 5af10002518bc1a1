"""Where the keys and values of sequences lie: pages of a fixed number of positions, shared by all sequences.

A sequence's block table lists its pages in order: position p lies in the page `table[p // page_positions]`, at
`p % page_positions`. Page 0 belongs to nobody, so that rows of no sequence have a place to be written to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

SCRATCH_PAGES: Final = 1
"""The page 0."""
_CPU_PAGE_POSITIONS: Final = 16
_CUDA_PAGE_POSITIONS: Final = 256
"""What the flash attention kernels in PyTorch ask for: they refuse pages that are no multiple of it."""


def default_page_positions(device: torch.device) -> int:
    """Positions of a page that suit a device's attention."""
    return _CUDA_PAGE_POSITIONS if device.type == "cuda" else _CPU_PAGE_POSITIONS


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a base keeps of one position.

    Attributes:
        layers: Layers with attention.
        heads: Heads of keys, and of values, in a layer.
        head_dim: Numbers of a head.
    """

    layers: int
    heads: int
    head_dim: int

    def position_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one position's keys and values, over all layers."""
        return 2 * self.layers * self.heads * self.head_dim * dtype.itemsize


class KvPool:
    """The keys and values of every page.

    Args:
        shape: Of one position.
        page_count: Pages, page 0 included.
        page_positions: Positions of a page.
        dtype: Of the base.
        device: Of the base.

    Attributes:
        shape: Of one position.
        page_count: Pages, page 0 included.
        page_positions: Positions of a page.
        dtype: Of the numbers.
        device: Where they lie.
        keys: For each layer `[pages, page_positions, heads, head_dim]`. They start as zeros: kernels read whole pages.
        values: As `keys`.
        size_bytes: What it takes.

    Raises:
        HocketError: `DEVICE_MEMORY` if there is no room for it.
    """

    def __init__(
        self, shape: KvShape, *, page_count: int, page_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_count = page_count
        self.page_positions = page_positions
        self.dtype = dtype
        self.device = device
        self.size_bytes = shape.position_bytes(dtype) * page_positions * page_count
        size = (page_count, page_positions, shape.heads, shape.head_dim)
        try:
            self.keys = [_zeros(size, dtype, device) for _ in range(shape.layers)]
            self.values = [_zeros(size, dtype, device) for _ in range(shape.layers)]
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{device} has no room for {self.size_bytes} bytes of keys and values: give them fewer",
            ) from error

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put rows of keys and values in their places.

        Args:
            layer: Whose.
            slots: `[T]`, int64: page times `page_positions` plus the place within the page.
            keys: `[T, heads, head_dim]`.
            values: As `keys`.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU those of numpy, which take memory page by page as they are written: torch writes them all."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, np.uint8)).view(dtype).view(size)


class Pages:
    """Which pages are free.

    Runs of consecutive pages are handed out where there are any: attention reads such a sequence in place.

    Args:
        page_count: Pages of the pool, page 0 included.
    """

    def __init__(self, page_count: int) -> None:
        self.count = max(0, page_count - SCRATCH_PAGES)
        """Pages that sequences can have."""
        self._free = [range(SCRATCH_PAGES, page_count)] if self.count else []  # ascending, none touches the next

    @property
    def free_count(self) -> int:
        """Pages that nobody has."""
        return sum(map(len, self._free))

    def take(self, count: int) -> list[int] | None:
        """Hand out so many pages; None, and none at all, when fewer are free."""
        if count > self.free_count:
            return None
        taken: list[int] = []
        whole = next((index for index, run in enumerate(self._free) if len(run) >= count), 0)
        while len(taken) < count:
            run = self._free[whole]
            part = run[: count - len(taken)]
            taken += part
            if rest := run[len(part) :]:
                self._free[whole] = rest
            else:
                del self._free[whole]
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Take pages back.

        Raises:
            HocketError: `INTERNAL` for pages that nobody has: two sequences would share them from now on.
        """
        runs = sorted([*self._free, *(range(page, page + 1) for page in pages)], key=lambda run: run.start)
        merged: list[range] = []
        for run in runs:
            if run.start < (merged[-1].stop if merged else SCRATCH_PAGES) or run.stop > self.count + SCRATCH_PAGES:
                raise HocketError(Reason.INTERNAL, f"page {run.start} is given back, and nobody has it")
            if merged and merged[-1].stop == run.start:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                merged.append(run)
        self._free = merged
