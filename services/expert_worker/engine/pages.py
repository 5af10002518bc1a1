"""Where the keys and values of sequences lie: pages of a fixed number of positions, shared by all sequences.

A sequence's block table lists its pages in order: position p lies in the page `table[p // page_positions]`, at
`p % page_positions`. Page 0 belongs to nobody, so that rows of no sequence have a place to be written to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.int8 import dequantise, quantise
from services.expert_worker.engine.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

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

    def head_bytes(self, stored_as: torch.dtype) -> int:
        """Bytes of one head's keys or values; in int8 with a scale behind them."""
        if stored_as is not torch.int8:
            return self.head_dim * stored_as.itemsize
        scale_bytes = torch.float32.itemsize
        return -(-self.head_dim // scale_bytes) * scale_bytes + scale_bytes

    def position_bytes(self, stored_as: torch.dtype) -> int:
        """Bytes of one position's keys and values, over all layers."""
        return 2 * self.layers * self.heads * self.head_bytes(stored_as)


class KvPool:
    """The keys and values of every page, in the base's dtype or as int8.

    In int8 each head of each position has a scale of its own (see `int8`), so what a position gives when it is read
    depends on nothing but what was written there.

    Args:
        shape: Of one position.
        page_count: Pages, page 0 included.
        page_positions: Positions of a page.
        dtype: Of the base: what is written and read.
        device: Of the base.
        stored_as: int8, or None for `dtype`.
        slab: Where it lies, with pages as large as its own; None to give it memory of its own.

    Attributes:
        shape: Of one position.
        page_count: Pages, page 0 included.
        page_positions: Positions of a page.
        dtype: Of what is read.
        device: Where it lies.
        stored_as: The dtype of the numbers in memory.
        in_place: Whether `read` gives views of all pages.
        size_bytes: What it takes.

    Raises:
        HocketError: `DEVICE_MEMORY` if there is no room for it.
    """

    def __init__(
        self,
        shape: KvShape,
        *,
        page_count: int,
        page_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        stored_as: torch.dtype | None = None,
        slab: Slab | None = None,
    ) -> None:
        self.shape = shape
        self.page_count = page_count
        self.page_positions = page_positions
        self.dtype = dtype
        self.device = device
        self.stored_as = stored_as or dtype
        self.in_place = self.stored_as is dtype
        self.size_bytes = shape.position_bytes(self.stored_as) * page_positions * page_count
        page_bytes = shape.position_bytes(self.stored_as) // shape.layers * page_positions
        slab = slab or Slab(shape.layers, page_count * page_bytes, page_bytes=page_bytes, row_bytes=0, device=device)
        self._memory = [
            slab.pages(layer)[:page_count].view(page_count, page_positions, 2, shape.heads, -1)
            for layer in range(shape.layers)
        ]
        self._rows = [self._rows_of(memory) for memory in self._memory]
        self._workspace = _Workspace(device)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put rows of keys and values in their places.

        Args:
            layer: Whose.
            slots: `[T]`, int64: page times `page_positions` plus the place within the page.
            keys: `[T, heads, head_dim]`.
            values: As `keys`.
        """
        for stored, rows in zip(self._rows[layer], (keys, values), strict=True):
            stored.write(slots, rows)

    def read(self, layer: int, pages: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values, each `[n, page_positions, heads, head_dim]` of `dtype`.

        Args:
            layer: Whose.
            pages: `[n]`, int64: a copy of these, side by side, which lasts until the next one; None for views of all,
                where they lie `in_place`.
        """
        if pages is None:
            keys, values = self._rows[layer]
            return keys.numbers, values.numbers
        memory = self._memory[layer]
        copied = self._workspace.of("pages", (len(pages), *memory.shape[1:]), torch.uint8)
        keys, values = self._rows_of(torch.index_select(memory, 0, pages, out=copied))
        if self.in_place:
            return keys.numbers, values.numbers
        size = keys.numbers.shape
        floats = keys.floats(self._workspace.of("keys", size)), values.floats(self._workspace.of("values", size))
        return floats[0].to(self.dtype), floats[1].to(self.dtype)

    def _rows_of(self, memory: Tensor) -> tuple[_Rows, _Rows]:
        """Keys and values in uint8 `[pages, page_positions, 2, heads, head_bytes]`."""
        keys, values = (_Rows(each, self.shape.head_dim, self.stored_as) for each in memory.unbind(2))
        return keys, values


class _Rows:
    """Keys or values of one layer; in int8, with their scales.

    Args:
        memory: uint8 `[pages, page_positions, heads, head_bytes]`.
        head_dim: Numbers of a head.
        stored_as: Their dtype.
    """

    def __init__(self, memory: Tensor, head_dim: int, stored_as: torch.dtype) -> None:
        self.numbers = memory.view(stored_as)[..., :head_dim]
        self._scales = memory.view(torch.float32)[..., -1] if stored_as is torch.int8 else None

    def write(self, slots: Tensor, rows: Tensor) -> None:
        if self._scales is not None:
            rows, scales = quantise(rows)
            self._scales.flatten(0, 1).index_copy_(0, slots, scales)
        self.numbers.flatten(0, 1).index_copy_(0, slots, rows)

    def floats(self, out: Tensor) -> Tensor:
        return self.numbers if self._scales is None else dequantise(self.numbers, self._scales, out)


class _Workspace:
    """Memory that is used again: on a CPU, having as much anew each time takes longer than what is done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, Tensor] = {}

    def of(self, name: str, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """So many numbers, of any values; they are others' when that name is asked for again."""
        count = math.prod(size)
        if name not in self._parts or len(self._parts[name]) < count:
            with torch.inference_mode(mode=False):  # it can be written to in any mode then
                self._parts[name] = torch.empty(count, dtype=dtype, device=self._device)
        return self._parts[name][:count].view(size)


class Pages:
    """Which pages are free.

    Runs of consecutive pages are handed out where there are any: attention reads such a sequence in place.

    Args:
        page_count: Pages of the pool, page 0 included.
        slab: Where they lie, if that is shared with others: pages beyond its limit are asked for when they are needed.

    Attributes:
        count: Pages that sequences can have.
        shed: Asked to give back pages from the one given on that are only kept in case they are needed again.
    """

    def __init__(self, page_count: int, slab: Slab | None = None) -> None:
        self.shed: Callable[[int], None] = lambda _first: None
        self._slab = slab
        if slab is not None:
            slab.pages_retreat = self._retreat
        self.count = max(0, page_count - SCRATCH_PAGES)
        self._free = [range(SCRATCH_PAGES, page_count)] if self.count else []  # ascending, none touches the next

    @property
    def free_count(self) -> int:
        """Pages that nobody has."""
        return sum(map(len, self._free))

    @property
    def used_end(self) -> int:
        """After the last page that somebody has."""
        if self._free and self._free[-1].stop == self.count + SCRATCH_PAGES:
            return self._free[-1].start
        return self.count + SCRATCH_PAGES

    def take(self, count: int, *, after: int = 0, room: int = 0, growing: Collection[range] = ()) -> list[int] | None:
        """Hand out so many pages; None, and none at all, when fewer can be had.

        Args:
            count: How many.
            after: A page; those after it are the best, if they are free. 0 for none.
            room: How many pages in a row there should be where they begin, to grow into.
            growing: Free pages into which others would grow: they come last.
        """
        if not self.reach(count):
            return None
        taken: list[int] = []
        start = after + 1 if after and self._is_free(after + 1) else self._start(count, room, growing)
        while count:
            part = self._cut(start, count)
            taken += part
            count -= len(part)
            start = self._start(count, count, growing) if count else 0
        return taken

    def reach(self, count: int) -> bool:
        """Have the slab let so many free pages be used, the first that there are; whether it does."""
        if count > self.free_count:
            return False
        missing, end = count, 0
        for run in self._free:
            if missing <= 0:
                break
            end = run.start + min(len(run), missing)
            missing -= len(run)
        return end <= self._limit or (self._slab is not None and self._slab.claim_pages(end))

    def _usable(self) -> list[range]:
        """Free pages below the limit."""
        limit = self._limit
        return [range(run.start, min(run.stop, limit)) for run in self._free if run.start < limit]

    def _is_free(self, page: int) -> bool:
        return any(page in run for run in self._usable())

    def _start(self, count: int, room: int, growing: Collection[range]) -> int:
        """Where so many pages begin at best: in a row, with room to grow, in nobody's way."""
        runs = self._usable()
        clear = [part for run in runs for part in _without(run, growing)]
        for parts in (clear, runs):
            for least in (max(room, count), count):
                for part in parts:
                    if len(part) >= least:
                        return part.start
        return runs[0].start if runs else 0

    def _cut(self, start: int, count: int) -> range:
        """Take pages from one on, as many as are free in a row; at most `count`."""
        place, run = next((place, run) for place, run in enumerate(self._free) if start in run)
        part = range(start, min(start + count, run.stop, self._limit))
        self._free[place : place + 1] = [
            rest for rest in (range(run.start, part.start), range(part.stop, run.stop)) if rest
        ]
        return part

    @property
    def _limit(self) -> int:
        """Pages below this one may be used."""
        return self.count + SCRATCH_PAGES if self._slab is None else self._slab.page_limit

    def _retreat(self, end: int, kept: bool) -> bool:  # noqa: FBT001 - the slab's interface
        """Whether nobody has a page from this one on, any more."""
        if kept:
            self.shed(end)
        return self.used_end <= end

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


def _without(run: range, others: Collection[range]) -> list[range]:
    """What is left of a run of pages without others."""
    parts = [run]
    for other in others:
        parts = [
            rest
            for part in parts
            for rest in (range(part.start, min(part.stop, other.start)), range(max(part.start, other.stop), part.stop))
            if rest
        ]
    return parts
