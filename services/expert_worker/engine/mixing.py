"""Experts side by side: every row of a batch gets its own weighted set, in one pass through the base.

The experts of a step are copied into the *arena*, which has for each projection a matrix of rows of A and one of rows
of B. An expert takes the same rows in all of them, as many as its largest rank, and at the other end of the matrices
one row for its factors, if it has any, and one for its biases. Only what it has is written and read, with zeros where a
projection needs fewer rows. It stays until others need the room, the least recently used leaving first. All of it is
float32, also on a base in half precision (see `projection`).

Low-rank updates are computed in one of two ways, both exact:

    concatenated   one pair of products for all experts that lie next to each other, whose middle is weighted and
                   masked for each row: few operations, but every row pays for every expert
    segments       one pair of products for each expert, with the rows that use it

What a step does is made anew from its experts each time; nothing of it outlives the step.
"""

from __future__ import annotations

import enum
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.projection import Projection, Strips, Update, Vectors, Work

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from services.expert_worker.engine.expert import AdapterExpert, Mixture, Piece

_RETRY_SECONDS: Final = 1.0


class Method(enum.Enum):
    """How low-rank updates are computed."""

    CONCATENATED = enum.auto()
    SEGMENTS = enum.auto()


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a device takes, in the time of one multiplication with addition in a large product.

    Reading A and B costs the same either way.

    Attributes:
        update: Starting the operations of one `Update`.
        moved: Gathering one number of the input, or adding one to the output.
    """

    update: int
    moved: int


_CPU: Final = _Costs(update=300_000, moved=24)
"""Fitted to one core in float32, 1 to 256 rows, 1 to 32 experts of ranks 16 and 64: 1 % above the better way."""
_CUDA: Final = _Costs(update=1_000_000_000, moved=100)
"""Estimated: 25 us of kernel launches beside 40 Tera-operations per second and 3 TB/s."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an expert lies in the arena.

    Attributes:
        start: First row of A and B.
        stop: After the last.
        single: First of the rows at the other end.
        end: After the last of these.
    """

    start: int
    stop: int
    single: int
    end: int

    @property
    def factors(self) -> int:
        """The row of its factors, if it has any."""
        return self.single

    @property
    def biases(self) -> int:
        """The row of its biases, if it has any."""
        return self.end - 1


@dataclass(frozen=True, slots=True)
class _Need:
    """What an expert takes: rows of A and B, and rows for factors and for biases."""

    rows: int
    singles: int


@dataclass(frozen=True, slots=True)
class _Task:
    """What experts do to a projection, by their columns; the same for many projections.

    Attributes:
        is_head: Whether it sees only the rows that are kept.
        width: Inputs and outputs together.
        inputs: Experts with factors of the input.
        outputs: With factors of the output, its bias included.
        products: With factors of the output without its bias.
        biases: With biases.
        updates: With low-rank updates.
    """

    is_head: bool
    width: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    products: tuple[int, ...]
    biases: tuple[int, ...]
    updates: tuple[int, ...]


def _task(base: nn.Linear, pieces: Sequence[tuple[int, Piece]], *, is_head: bool) -> _Task:
    gated = [(column, piece.gates_bias or base.bias is None) for column, piece in pieces if piece.o is not None]
    return _Task(
        is_head=is_head,
        width=base.in_features + base.out_features,
        inputs=tuple(column for column, piece in pieces if piece.u is not None),
        outputs=tuple(column for column, whole in gated if whole),
        products=tuple(column for column, whole in gated if not whole),
        biases=tuple(column for column, piece in pieces if piece.c is not None),
        updates=tuple(column for column, piece in pieces if piece.a is not None),
    )


class Mixer:
    """The experts of a base, as far as they are computing.

    Wraps the projections of the base in place. The arena is allocated at once and never grows. Experts are told apart
    by their digests, and none is kept alive. Not for several threads at once, except `fits` and the attributes.

    Args:
        model: The base.
        projections: What experts can adapt, by name; all on one device and of one dtype.
        arena_bytes: What the arena may take.
        method: How low-rank updates are computed; None chooses by cost, each time.

    Attributes:
        budget_bytes: What the arena may take.
        used_bytes: What experts take of it, those included that stay in case they are needed again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Mapping[str, nn.Linear],
        arena_bytes: int,
        *,
        method: Method | None = None,
    ) -> None:
        weight = next(iter(projections.values())).weight
        self.budget_bytes = arena_bytes
        self.used_bytes = 0
        self._device = weight.device
        self._method = method
        self._multiple = 8 if weight.is_cuda else 1  # what matrix units like
        widths = sum(base.in_features + base.out_features for base in projections.values())
        self._row_bytes = widths * torch.float32.itemsize
        self._row_count = arena_bytes // self._row_bytes // self._multiple * self._multiple
        self._strips = {name: self._strips_for(base) for name, base in projections.items()}
        self._works: dict[str, Work] = {}
        self._tasks: tuple[tuple[str, ...], dict[_Task, list[str]]] = ((), {})
        self._places: OrderedDict[str, _Place] = OrderedDict()  # by digest, least recently used first
        self._needs: weakref.WeakKeyDictionary[AdapterExpert, _Need] = weakref.WeakKeyDictionary()
        self._projections = dict(projections)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # theirs
        self._head = next((name for name, base in projections.items() if base is head), None)
        for name, base in projections.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Projection(name, base, self._strips[name], self._works))

    def fits(self, experts: Collection[AdapterExpert]) -> bool:
        """Whether these experts could compute together; a function of them alone. Any thread may ask."""
        distinct = {expert.digest: expert for expert in experts}
        return sum(map(self._rows, distinct.values())) <= self._row_count

    def begin(self, counts: Sequence[tuple[int, Mixture]], kept: Tensor | None = None) -> None:
        """Prepare a step: copy in the experts that are not there, and work out what each projection has to do.

        Args:
            counts: The batch, piece by piece: how many rows, and the experts that compute them with their weights.
            kept: int64, the rows that the language model's head will see; None for all. Best on the host: reading it
                from a device waits for that.

        Raises:
            HocketError: `DEVICE_MEMORY` if the experts do not fit.
        """
        self.end()
        experts = {
            expert.digest: expert
            for _, mixture in counts
            for expert, weight in mixture
            if weight != 0.0 and expert.pieces
        }
        if not experts:
            return
        self._seat(experts)
        columns = {digest: column for column, digest in enumerate(experts)}
        weights = np.zeros((len(counts), len(experts)), np.float32)
        for part, (_, mixture) in enumerate(counts):
            for expert, weight in mixture:
                if expert.digest in columns:
                    weights[part, columns[expert.digest]] = weight
        places = [self._places[digest] for digest in experts]
        part_of_row = np.repeat(np.arange(len(counts)), [count for count, _ in counts])
        rows = _Rows(part_of_row, weights, places, self._device)
        head_rows = rows
        if kept is not None and any(self._head in expert.pieces for expert in experts.values()):
            head_rows = _Rows(part_of_row[kept.cpu().numpy()], weights, places, self._device)
        for task, names in self._tasks_of(experts).items():
            work = (head_rows if task.is_head else rows).work(task, self._method)
            self._works.update(dict.fromkeys(names, work))

    def end(self) -> None:
        """End the step: projections are the base's again."""
        self._works.clear()

    def _tasks_of(self, experts: Mapping[str, AdapterExpert]) -> dict[_Task, list[str]]:
        """What there is to do for these experts, and the projections it is to do for.

        It depends on what experts are made of alone, and they are the same in most steps, so the last is kept.
        """
        digests = tuple(experts)
        if digests != self._tasks[0]:
            tasks: dict[_Task, list[str]] = {}
            for name, base in self._projections.items():
                pieces = [
                    (column, piece)
                    for column, expert in enumerate(experts.values())
                    if (piece := expert.pieces.get(name)) is not None
                ]
                if pieces:
                    tasks.setdefault(_task(base, pieces, is_head=name == self._head), []).append(name)
            self._tasks = digests, tasks
        return self._tasks[1]

    def _strips_for(self, base: nn.Linear) -> Strips:
        widths = base.in_features, base.out_features
        return Strips(*(torch.empty(self._row_count, n, dtype=torch.float32, device=self._device) for n in widths))

    def _need(self, expert: AdapterExpert) -> _Need:
        need = self._needs.get(expert)
        if need is None:
            rows = -(-expert.rank // self._multiple) * self._multiple
            factors = any(piece.u is not None or piece.o is not None for piece in expert.pieces.values())
            biases = any(piece.c is not None for piece in expert.pieces.values())
            need = self._needs[expert] = _Need(rows, factors + biases)
        return need

    def _rows(self, expert: AdapterExpert) -> int:
        need = self._need(expert)
        return need.rows + need.singles

    def _seat(self, experts: Mapping[str, AdapterExpert]) -> None:
        """See to it that all of these are in the arena."""
        if not self.fits(experts.values()):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{len(experts)} experts do not fit side by side into {self.budget_bytes} bytes: use fewer at once, "
                "or set worker.arena_bytes higher",
                retry_after_seconds=_RETRY_SECONDS,
            )
        for digest in experts:
            if digest in self._places:
                self._places.move_to_end(digest)
        for digest, expert in experts.items():
            if digest in self._places:
                continue
            place = self._make_room(self._need(expert), experts)
            if place is None:
                # There is room, but in pieces. Laid out anew it is whole: A and B grow from below, the rest from above.
                self._places.clear()
                self._seat(experts)
                return
            self._copy_in(expert, place)
            self._places[digest] = place
        self.used_bytes = sum(stop - start for start, stop in self._taken()) * self._row_bytes

    def _make_room(self, need: _Need, staying: Collection[str]) -> _Place | None:
        """A free place, once enough of those that need not stay have left; None if that is not enough."""
        while (place := self._free_place(need)) is None:
            idle = next((digest for digest in self._places if digest not in staying), None)
            if idle is None:
                return None
            del self._places[idle]
        return place

    def _free_place(self, need: _Need) -> _Place | None:
        """The lowest free rows for A and B, and the highest for the rest; None if there are none."""
        taken = self._taken()
        start = _lowest_gap(taken, need.rows, self._row_count)
        if start is None:
            return None
        stop = start + need.rows
        count = self._row_count
        taken = sorted([*taken, (start, stop)], reverse=True)
        from_above = _lowest_gap([(count - last, count - first) for first, last in taken], need.singles, count)
        if from_above is None:
            return None
        end = count - from_above
        return _Place(start, stop, end - need.singles, end)

    def _taken(self) -> list[tuple[int, int]]:
        """Rows in use: first, and after the last, in order."""
        spans = [
            span for place in self._places.values() for span in ((place.start, place.stop), (place.single, place.end))
        ]
        return sorted((first, stop) for first, stop in spans if first < stop)

    def _copy_in(self, expert: AdapterExpert, place: _Place) -> None:
        for name, piece in expert.pieces.items():
            strips = self._strips[name]
            for strip, rows in ((strips.inputs, piece.a), (strips.outputs, piece.b)):
                if rows is not None:
                    strip[place.start : place.start + piece.rank].copy_(rows)
                    strip[place.start + piece.rank : place.stop].zero_()
            for strip, factors in ((strips.inputs, piece.u), (strips.outputs, piece.o)):
                if factors is not None:
                    torch.sub(factors, 1, out=strip[place.factors])
            if piece.c is not None:
                strips.outputs[place.biases].copy_(piece.c)


class _Rows:
    """The rows of the batch that some projections see, and what experts do to them; made once for all of these.

    Members are columns of the weights.

    Args:
        part_of_row: int64 `[n]`.
        weights: `[parts, experts]`.
        places: Of the experts.
        device: Where to compute.
    """

    def __init__(
        self,
        part_of_row: NDArray[np.int64],
        weights: NDArray[np.float32],
        places: Sequence[_Place],
        device: torch.device,
    ) -> None:
        self._part_of_row = part_of_row
        self._weights = weights
        self._places = places
        self._device = device
        self._part_of_row_there = torch.from_numpy(part_of_row).to(device)
        uses = weights[part_of_row] != 0
        self._tokens = [_compact(np.flatnonzero(column)) for column in uses.T]
        self._token_counts = uses.sum(axis=0).tolist()
        self._vectors: dict[tuple[tuple[int, ...], tuple[int, ...]], Vectors] = {}
        self._updates: dict[tuple[Method, tuple[int, ...]], tuple[Update, ...]] = {}

    def work(self, task: _Task, method: Method | None) -> Work:
        """What projections have to do; the method None chooses by cost."""
        return Work(
            inputs=self._factors_of(task.inputs),
            outputs=self._factors_of(task.outputs),
            products=self._factors_of(task.products),
            biases=self._vectors_of(task.biases, [self._places[member].biases for member in task.biases]),
            updates=self._updates_of(task.updates, task.width, method),
        )

    def _factors_of(self, members: tuple[int, ...]) -> Vectors | None:
        return self._vectors_of(members, [self._places[member].factors for member in members])

    def _vectors_of(self, members: tuple[int, ...], rows: list[int]) -> Vectors | None:
        if not members:
            return None
        key = members, tuple(rows)
        if key not in self._vectors:
            where = torch.tensor(rows, device=self._device)
            self._vectors[key] = Vectors(self._by_row(self._weights[:, members]), where)
        return self._vectors[key]

    def _updates_of(self, members: tuple[int, ...], width: int, method: Method | None) -> tuple[Update, ...]:
        if not members:
            return ()
        method = method or self._cheaper(members, width)
        key = method, members
        if key not in self._updates:
            make = self._concatenated if method is Method.CONCATENATED else self._segments
            self._updates[key] = tuple(make(members))
        return self._updates[key]

    def _cheaper(self, members: tuple[int, ...], width: int) -> Method:
        costs = _CPU if self._device.type == "cpu" else _CUDA
        heights = sum(self._height(member) for member in members)
        concatenated = len(self._runs(members)) * costs.update + width * heights * len(self._part_of_row)
        segments = len(members) * costs.update
        for member in members:
            gathered = 0 if isinstance(self._tokens[member], slice) else costs.moved
            segments += width * self._token_counts[member] * (self._height(member) + gathered)
        return Method.CONCATENATED if concatenated <= segments else Method.SEGMENTS

    def _concatenated(self, members: tuple[int, ...]) -> Iterator[Update]:
        for run in self._runs(members):
            weights = np.repeat(self._weights[:, run], [self._height(member) for member in run], axis=1)
            by_row = self._by_row(weights)
            everyone = all(self._token_counts[member] == len(self._part_of_row) for member in run)
            start, stop = self._places[run[0]].start, self._places[run[-1]].stop
            yield Update(start, stop, slice(None), by_row, None if everyone else by_row == 0)

    def _segments(self, members: tuple[int, ...]) -> Iterator[Update]:
        for member in members:
            tokens, place = self._tokens[member], self._places[member]
            if self._token_counts[member]:
                weights = self._by_row(self._weights[:, [member]])
                there = tokens if isinstance(tokens, slice) else torch.from_numpy(tokens).to(self._device)
                yield Update(place.start, place.stop, there, weights[there])

    def _runs(self, members: tuple[int, ...]) -> list[list[int]]:
        """Members whose rows follow each other without a gap, from the lowest on."""
        runs: list[list[int]] = []
        for member in sorted(members, key=lambda member: self._places[member].start):
            if runs and self._places[runs[-1][-1]].stop == self._places[member].start:
                runs[-1].append(member)
            else:
                runs.append([member])
        return runs

    def _height(self, member: int) -> int:
        return self._places[member].stop - self._places[member].start

    def _by_row(self, by_part: NDArray[np.float32]) -> Tensor:
        """What holds for parts, for each row: float32 `[n, columns]`, on the device."""
        return torch.from_numpy(by_part).to(self._device).index_select(0, self._part_of_row_there)


def _lowest_gap(taken: Sequence[tuple[int, int]], count: int, end: int) -> int | None:
    """Where so many rows are free in a row; None if nowhere before the end. `taken` is in order."""
    free = 0
    for first, stop in taken:
        if first - free >= count:
            return free
        free = max(free, stop)
    return free if end - free >= count else None


def _compact(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Indices that follow each other as a slice, which is read in place."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
