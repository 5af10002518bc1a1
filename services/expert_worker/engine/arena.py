"""The experts that compute, side by side on the device: who lies where, who comes, who goes.

An expert takes consecutive rows, the same in every layer: as many as its largest rank, then those of its factors, if it
has any, and those of its biases. Where it adapts something outside the layers it takes rows there as well, which are
apart (see `layout`). What it does not have is not written, with zeros where a projection needs fewer rows.

An expert is absent, on its way, or resident. It is brought ahead of the step that needs it, by a thread of its own and,
on a CUDA device, on a stream of its own, while other experts compute. Those who are held stay; the others stay as long
as nobody needs their room, and the one that was held longest ago leaves first: a byte is as dear to bring back as any
other. Room is, in this order: what is free, what is left when others have left, what the pages of the slab give up, and
what there is once those that stay have been pushed together.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from services.expert_worker.engine.int8 import dequantise
from services.expert_worker.engine.layout import put_vector
from services.expert_worker.engine.projection import Strips
from services.expert_worker.engine.slab import zeros
from services.expert_worker.engine.standing import window_size
from services.expert_worker.engine.transfer import there

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from services.expert_worker.engine.expert import AdapterExpert, Piece
    from services.expert_worker.engine.layout import RowLayout
    from services.expert_worker.engine.slab import Slab

_CUDA_ROW_MULTIPLE: Final = 8
"""What matrix units like."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of an expert.

    Attributes:
        start: First row of A and B.
        stop: After the last.
        factors: The rows that add up to its factors; empty if it has none.
        biases: The same of its biases.
        end: After the last of all.
    """

    start: int
    stop: int
    factors: range
    biases: range
    end: int


@dataclass(frozen=True, slots=True)
class _Need:
    """Rows that an expert takes: of A and B, of factors, of biases, and in all."""

    rank: int
    factors: int
    biases: int
    rows: int

    def at(self, start: int) -> Place:
        stop = start + self.rank
        middle = stop + self.factors
        return Place(start, stop, range(stop, middle), range(middle, middle + self.biases), start + self.rows)


@dataclass(frozen=True, slots=True)
class _Needs:
    """What an expert takes in the layers, and outside of them."""

    layers: _Need
    outside: _Need


@dataclass(slots=True, eq=False)
class _Seat:
    """An expert in the arena.

    Attributes:
        layers: Where in the layers.
        outside: Where outside of them.
        arrival: Done when it is there; holds why, if it did not come.
    """

    layers: Place
    outside: Place
    arrival: Future[None] | None

    @property
    def is_there(self) -> bool:
        """Whether it has come."""
        return self.arrival is None or (self.arrival.done() and self.arrival.exception() is None)


class Arena:
    """Rows of experts in a slab. For one thread, except `fits` and the attributes. It keeps no expert alive.

    Args:
        layout: Of the base's projections.
        slab: Where the layers are; rows of `layout.row_bytes`. Its pages are asked to retreat from here, and it asks
            here for rows to retreat.
        outside_rows: Rows outside the layers.
        device: Of the base.

    Attributes:
        layout: As given.
        slab: As given.
        used_bytes: What experts take, those included that stay in case they are needed again.
        resident: Digests of those that are there.
        coming: Of those on their way.
        arrived: Called from another thread whenever an expert has come, or could not.
    """

    def __init__(self, layout: RowLayout, slab: Slab, *, outside_rows: int, device: torch.device) -> None:
        self.layout = layout
        self.slab = slab
        self.used_bytes = 0
        self.resident: frozenset[str] = frozenset()
        self.coming: frozenset[str] = frozenset()
        self.arrived: Callable[[], None] = lambda: None
        self._device = device
        self._multiple = _CUDA_ROW_MULTIPLE if device.type == "cuda" else 1
        self._layers = [slab.rows(layer, layout.dtype) for layer in range(layout.layer_count)]
        self._outside_count = outside_rows if layout.outside_width else 0
        self._outside = zeros((self._outside_count, layout.outside_width), layout.dtype, device)
        self._strips: dict[str, Strips] = {}
        for name, columns in layout.columns.items():
            rows = self._outside if columns.layer is None else self._layers[columns.layer]
            self._strips[name] = Strips(rows[:, columns.inputs], rows[:, columns.outputs])
        self._seats: OrderedDict[str, _Seat] = OrderedDict()  # by digest, held longest ago first
        self._held: frozenset[str] = frozenset()
        self._soon: frozenset[str] = frozenset()
        self._needs: weakref.WeakKeyDictionary[AdapterExpert, _Needs] = weakref.WeakKeyDictionary()
        self._uploading = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        slab.rows_retreat = self._retreat

    @property
    def size_bytes(self) -> int:
        """Bytes outside the layers: what is not the slab's."""
        return self._outside.nbytes

    def strips(self, name: str) -> Strips:
        """Where experts lie side by side, for one projection."""
        return self._strips[name]

    def stack(self, names: Sequence[str]) -> Tensor | None:
        """The A of some projections, `[k, rows, in]`; None if they do not lie in one layer, equally far apart."""
        strips = [self._strips[name].inputs for name in names]
        first = strips[0]
        starts = [strip.storage_offset() for strip in strips]
        steps = {after - before for before, after in pairwise(starts)} or {0}
        same = all(strip.shape == first.shape for strip in strips)
        layers = {self.layout.columns[name].layer for name in names}
        if len(steps) > 1 or min(steps) < 0 or len(layers) > 1 or not same:
            return None
        return first.as_strided((len(strips), *first.shape), (*steps, *first.stride()))

    def place(self, digest: str, *, outside: bool) -> Place:
        """The rows of an expert that is resident, in the layers or outside of them."""
        seat = self._seats[digest]
        return seat.outside if outside else seat.layers

    def window(self, digests: Collection[str], *, outside: bool) -> range:
        """The rows at the end, of a size that many others have too, that hold those of some experts that are there.

        Where others lie among them, so that it would be more rows than it could be, these change places first. That
        costs what two steps take to read the larger window. None of the rows is a page's: where pages in use do not
        let it have a usual size, it is smaller.
        """
        count = self._outside_count if outside else self.slab.row_count
        places = [self.place(digest, outside=outside) for digest in digests]
        places = [place for place in places if place.start < place.end]
        if not places:
            return range(count, count)
        needed = sum(place.end - place.start for place in places)
        first = min(place.start for place in places)
        if window_size(count - first) > window_size(needed):
            self._push_together(outside=outside, since=first, last=frozenset(digests))
            places = [self.place(digest, outside=outside) for digest in digests]
            first = min(place.start for place in places if place.start < place.end)
        start = max(0, count - window_size(count - first))
        if not outside and not self.slab.claim_rows(start, kept_pages=False):
            start = self.slab.row_limit
        return range(start, count)

    def fits(self, experts: Collection[AdapterExpert], page_count: int = 0) -> bool:
        """Whether these experts could compute together beside so many pages; a function of these alone.

        Any thread may ask.
        """
        needs = [self._need(expert) for expert in {expert.digest: expert for expert in experts}.values()]
        return (
            self.slab.has_room(page_count, sum(need.layers.rows for need in needs))
            and sum(need.outside.rows for need in needs) <= self._outside_count
        )

    def hold(self, experts: Collection[AdapterExpert], soon: Collection[AdapterExpert] = ()) -> None:
        """Have these stay, from now on and in place of those held before. They need not be there yet.

        Args:
            experts: They compute.
            soon: They will. They make room for those who compute, and for pages.
        """
        self._held = frozenset(expert.digest for expert in experts)
        self._soon = frozenset(expert.digest for expert in soon)
        for digest, seat in tuple(self._seats.items()):
            if seat.arrival is not None and seat.arrival.done():
                if seat.is_there:
                    seat.arrival = None
                elif digest not in self._held | self._soon:  # who is waited for is heard of where it is waited for
                    del self._seats[digest]
        self._count()
        self._note_use((*soon, *experts))

    def bring(self, expert: AdapterExpert, *, ahead: bool = False) -> bool:
        """Have an expert come, if it has to and can; whether it is there.

        Held experts make no room for it. One that is not held itself may leave again at once.

        Args:
            expert: Which.
            ahead: Whether it is not needed yet: then nothing is done for it that the pages would feel.

        Raises:
            Exception: Why it did not come. It is absent again then, and can be brought once more.
        """
        seat = self._seats.get(expert.digest)
        if seat is None:
            seat = self._seat(expert, ahead=ahead)
        if seat is None or (seat.arrival is not None and not seat.arrival.done()):
            return False
        return self._settle(expert.digest, seat)

    def bring_now(self, experts: Collection[AdapterExpert]) -> bool:
        """Wait until these are there, and hold them if they had to come; False if there is no room for all of them.

        Raises:
            Exception: As `bring`.
        """
        if all(expert.digest in self._seats and self._seats[expert.digest].is_there for expert in experts):
            self._note_use(experts)
            return True
        self.hold(experts)
        for expert in experts:
            while (seat := self._seats.get(expert.digest) or self._seat(expert)) is None:
                coming = [other.arrival for other in self._seats.values() if other.arrival is not None]
                if not coming:
                    return False
                wait(coming)
                for digest, other in tuple(self._seats.items()):
                    self._settle(digest, other)
            if seat.arrival is not None:
                wait([seat.arrival])
            self._settle(expert.digest, seat)
        return True

    def close(self) -> None:
        """End its thread, once nothing is brought any more."""
        self._uploading.shutdown()

    def _note_use(self, experts: Iterable[AdapterExpert]) -> None:
        for expert in experts:
            if expert.digest in self._seats:
                self._seats.move_to_end(expert.digest)

    def _settle(self, digest: str, seat: _Seat) -> bool:
        """Take note that an expert has come; let its rows go if it could not."""
        if seat.arrival is not None:
            if (error := seat.arrival.exception()) is not None:
                self._leave(digest)
                raise error
            seat.arrival = None
            self._count()
        return True

    def _need(self, expert: AdapterExpert) -> _Needs:
        needs = self._needs.get(expert)
        if needs is None:
            inner: list[Piece] = []
            outer: list[Piece] = []
            for name, piece in expert.pieces.items():
                (outer if self.layout.columns[name].layer is None else inner).append(piece)
            needs = self._needs[expert] = _Needs(self._rows_of(inner), self._rows_of(outer))
        return needs

    def _rows_of(self, pieces: list[Piece]) -> _Need:
        rank = self._rounded(max((piece.rank for piece in pieces), default=0))
        factors = self.layout.vector_rows * any(piece.u is not None or piece.o is not None for piece in pieces)
        biases = self.layout.vector_rows * any(piece.c is not None for piece in pieces)
        return _Need(rank, factors, biases, self._rounded(rank + factors + biases))

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._multiple) * self._multiple

    def _seat(self, expert: AdapterExpert, *, ahead: bool = False) -> _Seat | None:
        """Begin to bring an expert; None if there is no room."""
        needs = self._need(expert)
        inner = self._make_room(needs.layers.rows, outside=False, ahead=ahead)
        outer = None if inner is None else self._make_room(needs.outside.rows, outside=True, ahead=ahead)
        if inner is None or outer is None:
            return None
        seat = _Seat(needs.layers.at(inner), needs.outside.at(outer), None)
        before = None
        if self._stream is not None:  # steps may still be computing with what lay here
            before = torch.cuda.current_stream(self._device).record_event()
        seat.arrival = self._uploading.submit(self._upload, expert, seat, before)
        seat.arrival.add_done_callback(lambda _: self.arrived())
        self._seats[expert.digest] = seat
        self._count()
        return seat

    def _make_room(self, count: int, *, outside: bool, ahead: bool) -> int | None:
        """The first of so many free rows; None if there are none, not even once everybody has left who may."""
        if not count:
            return 0
        while (start := self._free(count, outside=outside)) is None:
            idle = self._idle(self._held | self._soon, outside=outside)
            if idle is None and not ahead:
                idle = self._idle(self._held, outside=outside)
            if idle is None:
                break
            self._leave(idle)
        if start is None and not ahead:
            start = self._free(count, outside=outside, kept_pages=True)
        if start is None and not ahead:
            self._push_together(outside=outside)
            start = self._free(count, outside=outside, kept_pages=True)
        return start

    def _free(self, count: int, *, outside: bool, kept_pages: bool = False) -> int | None:
        """The first of so many free rows, the last that there are; None if there are none."""
        taken = self._taken(outside=outside)
        end = self._outside_count if outside else self.slab.row_count
        for first, stop in (*reversed(taken), (0, 0)):
            if end - stop >= count:
                if outside or self.slab.claim_rows(end - count, kept_pages=kept_pages):
                    return end - count
                return None
            end = first
        return None

    def _taken(self, *, outside: bool) -> list[tuple[int, int]]:
        """Rows in use: first, and after the last, in order."""
        places = [seat.outside if outside else seat.layers for seat in self._seats.values()]
        return sorted((place.start, place.end) for place in places if place.start < place.end)

    def _idle(self, staying: frozenset[str], *, outside: bool) -> str | None:
        """Who was held longest ago of those who are there, need not stay, and leave rows; None if nobody is."""
        for digest, seat in self._seats.items():
            place = seat.outside if outside else seat.layers
            arrived = seat.arrival is None or seat.arrival.done()
            if digest not in staying and arrived and place.start < place.end:
                return digest
        return None

    def _leave(self, digest: str) -> None:
        del self._seats[digest]
        self._count()

    def _count(self) -> None:
        """Say who is there, and what they take."""
        self.coming = frozenset(
            digest for digest, seat in self._seats.items() if seat.arrival is not None and not seat.arrival.done()
        )
        self.resident = frozenset(self._seats) - self.coming
        inner = sum(stop - first for first, stop in self._taken(outside=False))
        outer = sum(stop - first for first, stop in self._taken(outside=True))
        self.used_bytes = (
            inner * self.layout.row_bytes * self.layout.layer_count + outer * self.layout.outside_row_bytes
        )

    def _retreat(self, first: int) -> bool:
        """Free the rows before one, if those that are held have room after it. What is on its way stays where it is."""
        staying = 0
        for digest, seat in self._seats.items():
            coming = seat.arrival is not None and not seat.arrival.done()
            if coming and seat.layers.start < min(first, seat.layers.end):
                return False
            if coming or digest in self._held:
                staying += seat.layers.end - seat.layers.start
        if staying > self.slab.row_count - first:
            return False
        while (taken := self._taken(outside=False)) and taken[0][0] < first:
            idle = self._idle(self._held, outside=False)
            if idle is None:
                self._push_together(outside=False)
                return self._taken(outside=False)[0][0] >= first
            self._leave(idle)
        return True

    def _push_together(self, *, outside: bool, since: int = 0, last: Collection[str] = ()) -> None:
        """Move those that are there to the end, as far as what is on its way lets them.

        Args:
            outside: Whether outside the layers.
            since: Those before this row stay where they are.
            last: These come last.
        """
        stop = self._outside_count if outside else self.slab.row_count
        group: list[tuple[bool, Place, _Seat]] = []
        for digest, seat in self._seats.items():
            place = seat.outside if outside else seat.layers
            if since <= place.start < place.end:
                group.append((digest in last, place, seat))
        group.sort(key=lambda each: each[1].start, reverse=True)
        while group:
            free = [*takewhile(lambda each: each[2].is_there, group)]
            self._pack(sorted(free, key=lambda each: not each[0]), stop, outside=outside)
            stop = group[len(free)][1].start if len(free) < len(group) else 0
            del group[: len(free) + 1]

    def _pack(self, group: list[tuple[bool, Place, _Seat]], stop: int, *, outside: bool) -> None:
        """Put experts side by side so that the first given ends at a row, the second where that begins, and so on."""
        sources: list[range] = []
        start = stop
        for _, place, seat in group:
            moved = _moved(place, start - place.end)
            start = moved.start
            if not sources and moved == place:
                stop = start
                continue
            sources.append(range(place.start, place.end))
            if outside:
                seat.outside = moved
            else:
                seat.layers = moved
        if sources:
            order = there(np.concatenate([*map(np.array, reversed(sources))]), self._device)
            for rows in [self._outside] if outside else self._layers:
                rows[start:stop] = rows.index_select(0, order)

    def _upload(self, expert: AdapterExpert, seat: _Seat, before: torch.cuda.Event | None) -> None:
        """Copy an expert to its rows; returns when it is there. In the thread for that."""
        if self._stream is None or before is None:
            self._copy_in(expert, seat)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            try:
                self._copy_in(expert, seat)
            finally:  # also if it fails half way: copies that have begun still read the expert's memory
                # Its event: what the engine computes meanwhile is not waited for. The thread sleeps.
                there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
                self._stream.record_event(there).synchronize()

    def _copy_in(self, expert: AdapterExpert, seat: _Seat) -> None:
        for place, every in ((seat.layers, self._layers), (seat.outside, [self._outside])):
            for memory in every if place.stop < place.end else ():
                memory[place.stop : place.end].zero_()  # products run over them, with weights of 0
        staging = _Staging(self._device)
        copies = _Copies()
        for name, piece in expert.pieces.items():
            strips = self.strips(name)
            place = seat.outside if self.layout.columns[name].layer is None else seat.layers
            if piece.a is not None and piece.b is not None:
                _put_rows(copies, strips.inputs, place, staging.of(piece.a), staging.of_any(piece.a_scales))
                _put_rows(copies, strips.outputs, place, staging.of(piece.b), staging.of_any(piece.b_scales))
            for strip, factors in ((strips.inputs, piece.u), (strips.outputs, piece.o)):
                if factors is not None:
                    put_vector(_of(strip, place.factors), staging.of(factors) - 1)
            if piece.c is not None:
                put_vector(_of(strips.outputs, place.biases), staging.of(piece.c))
        copies.make()


class _Copies:
    """Copies that are made with one call: others get on while it runs, which many small ones would let them less."""

    def __init__(self) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []

    def add(self, target: Tensor, source: Tensor) -> None:
        """One more."""
        self._targets.append(target)
        self._sources.append(source)

    def make(self) -> None:
        """Make them."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)


class _Staging:
    """The memory of an expert on the device, moved there as a whole: one copy, and not one for each tensor.

    On a CPU it is where it was.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor's counterpart there; contiguous, as it is."""
        storage = tensor.untyped_storage()
        moved = self._moved.get(storage.data_ptr())
        if moved is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            moved = self._moved[storage.data_ptr()] = whole.to(self._device, non_blocking=True)
        start = tensor.storage_offset() * tensor.itemsize
        return moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def of_any(self, tensor: Tensor | None) -> Tensor | None:
        """The same of one that need not be there."""
        return None if tensor is None else self.of(tensor)


def _put_rows(copies: _Copies, strip: Tensor, place: Place, rows: Tensor, scales: Tensor | None) -> None:
    """Have rows of A or B written, and zeros where there are fewer than in other projections."""
    end = place.start + len(rows)
    copies.add(strip[place.start : end], rows if scales is None else dequantise(rows, scales))
    if end < place.stop:
        strip[end : place.stop].zero_()


def _of(strip: Tensor, rows: range) -> Tensor:
    return strip[rows.start : rows.stop]


def _moved(place: Place, by: int) -> Place:
    return Place(
        place.start + by,
        place.stop + by,
        range(place.factors.start + by, place.factors.stop + by),
        range(place.biases.start + by, place.biases.stop + by),
        place.end + by,
    )
