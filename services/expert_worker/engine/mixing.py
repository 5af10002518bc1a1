"""Experts side by side: every row of a batch gets its own weighted set, in one pass through the base.

Where the experts of a step lie is up to the `arena`; here is what the base's projections do with them. Low-rank updates
are computed in one of two ways, both exact:

    concatenated   one pair of products for all experts that lie next to each other, whose middle is weighted and
                   masked for each row: few operations, but every row pays for every expert
    segments       one pair of products for each expert, with the rows that use it

What a step does is made anew from its experts each time; nothing of it outlives the step.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.projection import Projection, StepWork, Update, Vectors, Work
from services.expert_worker.engine.standing import Members, StandingWork, rounded
from services.expert_worker.engine.transfer import there

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from services.expert_worker.engine.arena import Arena, Place
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
class _Task:
    """What experts do to a projection; the same for many projections.

    Attributes:
        is_head: Whether it sees only the rows that are kept.
        outside: Whether it lies outside the layers.
        members: Which experts do what.
    """

    is_head: bool
    outside: bool
    members: Members

    @property
    def likeness(self) -> tuple[bool | int, ...]:
        """What it has in common with tasks of other experts that the same standing work can do."""
        who = self.members
        counts = map(len, (who.inputs, who.outputs, who.products, who.biases))
        return self.is_head, self.outside, bool(who.updates), *map(rounded, counts)


def _members(base: nn.Linear, pieces: Sequence[tuple[int, Piece]]) -> Members:
    gated = [(column, piece.gates_bias or base.bias is None) for column, piece in pieces if piece.o is not None]
    return Members(
        inputs=tuple(column for column, piece in pieces if piece.u is not None),
        outputs=tuple(column for column, whole in gated if whole),
        products=tuple(column for column, whole in gated if not whole),
        biases=tuple(column for column, piece in pieces if piece.c is not None),
        updates=tuple(column for column, piece in pieces if piece.a is not None),
    )


_TEAMS: Final = {child: team for team in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) for child in team}
"""Projections that read the same input in transformers' models. Another that does so too computes for itself."""


def teams(names: Iterable[str]) -> list[list[str]]:
    """Names of projections, those together that read the same input."""
    found: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        found.setdefault((parent, _TEAMS.get(child, child)), []).append(name)
    return list(found.values())


def stacks(arena: Arena, teams: Iterable[list[str]]) -> dict[str, tuple[Tensor, int]]:
    """The A of projections and of those they share their input with, and their place among them, by name."""
    found: dict[str, tuple[Tensor, int]] = {}
    for team in teams:
        stack = arena.stack(team)
        if stack is None:
            found |= stacks(arena, [[name] for name in team])
        else:
            found |= {name: (stack, place) for place, name in enumerate(team)}
    return found


class Mixer:
    """The experts of a base, as far as they are computing.

    Wraps the projections of the base in place. Not for several threads at once.

    Args:
        model: The base.
        projections: What experts can adapt, by name; all on one device and of one dtype.
        arena: Where experts lie.
        method: How low-rank updates are computed; None chooses by cost, each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Mapping[str, nn.Linear],
        arena: Arena,
        *,
        method: Method | None = None,
    ) -> None:
        self._arena = arena
        self._device = next(iter(projections.values())).weight.device
        self._method = method
        self._step = StepWork()
        self._digests: tuple[str, ...] = ()
        self._tasks: dict[_Task, list[str]] = {}
        self._likeness: Hashable = ()
        self._standing: dict[Hashable, list[StandingWork]] = {}
        self._projections = dict(projections)
        self._width = sum(base.in_features + base.out_features for base in projections.values()) // len(projections)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # theirs
        self._head = next((name for name, base in projections.items() if base is head), None)
        for name, base in projections.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Projection(name, base, arena.strips(name), self._step))

    def begin(self, counts: Sequence[tuple[int, Mixture]], kept: NDArray[np.int64] | None = None) -> None:
        """Prepare a step: have its experts there, and work out what each projection has to do.

        Whoever plans steps brings their experts first; those that are not there yet are waited for.

        Args:
            counts: The batch, piece by piece: how many rows, and the experts that compute them with their weights.
            kept: The rows that the language model's head will see; None for all.

        Raises:
            HocketError: `DEVICE_MEMORY` if there is no room for all of them.
        """
        experts, weights = self._bring([mixture for _, mixture in counts])
        if not experts:
            return
        part_of_row = np.repeat(np.arange(len(counts)), [count for count, _ in counts])
        seen = part_of_row if kept is None else part_of_row[kept]
        made: dict[tuple[bool, bool], _Rows] = {}
        works: dict[str, Work] = {}
        for task, names in self._tasks.items():
            kind = task.is_head, task.outside
            if kind not in made:
                places = [self._arena.place(digest, outside=task.outside) for digest in experts]
                made[kind] = _Rows(seen if task.is_head else part_of_row, weights, places, self._width, self._device)
            works.update(dict.fromkeys(names, made[kind].work(task.members, self._method)))
        self._step.works = works

    def begin_standing(self, mixtures: Sequence[Mixture]) -> Hashable:
        """Prepare a step of one row for each mixture, all of them kept, in tensors that stay where they are.

        Returns:
            What steps have in common that do the same with the same tensors, whatever numbers are in them.

        Raises:
            HocketError: As `begin`.
        """
        experts, weights = self._bring(mixtures)
        if not experts:
            return ()
        windows = {outside: self._arena.window(experts, outside=outside) for outside in (False, True)}
        likeness = (len(mixtures), *windows.values(), self._likeness)
        standing = self._standing.get(likeness)
        if standing is None:
            standing = self._standing[likeness] = [
                StandingWork(
                    task.members,
                    len(mixtures),
                    windows[task.outside],
                    self._arena.layout.vector_rows,
                    self._device,
                )
                for task in self._tasks
            ]
        works: dict[str, Work] = {}
        for (task, names), work in zip(self._tasks.items(), standing, strict=True):
            places = [self._arena.place(digest, outside=task.outside) for digest in experts]
            work.fill(task.members, weights, places)
            works.update(dict.fromkeys(names, work.work))
        self._step.works = works
        return likeness

    def forget(self, likeness: Hashable) -> None:
        """Let go of the tensors for steps that nobody will ask for any more."""
        self._standing.pop(likeness, None)

    def end(self) -> None:
        """End the step: projections are the base's again."""
        self._step.clear()

    def _bring(self, mixtures: Sequence[Mixture]) -> tuple[dict[str, AdapterExpert], NDArray[np.float32]]:
        """Have the experts of a step there: them, by digest, and their weights, `[mixtures, experts]`."""
        self.end()
        experts = {
            expert.digest: expert
            for mixture in mixtures
            for expert, weight in mixture
            if weight != 0.0 and expert.pieces
        }
        weights = np.zeros((len(mixtures), len(experts)), np.float32)
        if not experts:
            return experts, weights
        if not self._arena.bring_now(experts.values()):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{len(experts)} experts do not fit side by side into the memory that running experts may take: use "
                "fewer at once, or set worker.slab_bytes higher",
                retry_after_seconds=_RETRY_SECONDS,
            )
        columns = {digest: column for column, digest in enumerate(experts)}
        for row, mixture in enumerate(mixtures):
            for expert, weight in mixture:
                if expert.digest in columns:
                    weights[row, columns[expert.digest]] = weight
        if tuple(experts) != self._digests:
            self._learn(experts)
        return experts, weights

    def _learn(self, experts: Mapping[str, AdapterExpert]) -> None:
        """Find out what there is to do for these experts, and the projections that it is to do for.

        It depends on what experts are made of alone, and they are the same in most steps, so the last is kept.
        """
        self._tasks = {}
        for name, base in self._projections.items():
            pieces = [
                (column, piece)
                for column, expert in enumerate(experts.values())
                if (piece := expert.pieces.get(name)) is not None
            ]
            if pieces:
                outside = self._arena.layout.columns[name].layer is None
                task = _Task(name == self._head, outside, _members(base, pieces))
                self._tasks.setdefault(task, []).append(name)
        self._step.stacks = {}
        for task, names in self._tasks.items():
            if task.members.updates:  # who changes its input first has it for itself
                alone = [[name] for name in names]
                self._step.stacks |= stacks(self._arena, alone if task.members.inputs else teams(names))
        self._likeness = tuple((task.likeness, tuple(names)) for task, names in self._tasks.items())
        self._digests = tuple(experts)


class _Rows:
    """The rows of the batch that some projections see, and what experts do to them; made once for all of these.

    Members are columns of the weights.

    Args:
        part_of_row: int64 `[n]`.
        weights: `[parts, experts]`.
        places: Of the experts.
        width: Inputs and outputs of a projection, on average.
        device: Where to compute.
    """

    def __init__(
        self,
        part_of_row: NDArray[np.int64],
        weights: NDArray[np.float32],
        places: Sequence[Place],
        width: int,
        device: torch.device,
    ) -> None:
        self._part_of_row = part_of_row
        self._weights = weights
        self._places = places
        self._width = width
        self._device = device
        self._part_of_row_there = there(part_of_row, device)
        uses = weights[part_of_row] != 0
        self._tokens = [_compact(np.flatnonzero(column)) for column in uses.T]
        self._token_counts = uses.sum(axis=0).tolist()
        self._vectors: dict[tuple[tuple[int, ...], tuple[range, ...]], Vectors] = {}
        self._updates: dict[tuple[Method, tuple[int, ...]], tuple[Update, ...]] = {}

    def work(self, members: Members, method: Method | None) -> Work:
        """What projections have to do; the method None chooses by cost."""
        return Work(
            inputs=self._factors_of(members.inputs),
            outputs=self._factors_of(members.outputs),
            products=self._factors_of(members.products),
            biases=self._vectors_of(members.biases, [self._places[member].biases for member in members.biases]),
            updates=self._updates_of(members.updates, method),
        )

    def _factors_of(self, members: tuple[int, ...]) -> Vectors | None:
        return self._vectors_of(members, [self._places[member].factors for member in members])

    def _vectors_of(self, members: tuple[int, ...], rows: list[range]) -> Vectors | None:
        if not members:
            return None
        key = members, tuple(rows)
        if key not in self._vectors:
            where = there(np.array([row for each in rows for row in each]), self._device)
            weights = np.repeat(self._weights[:, members], [len(each) for each in rows], axis=1)
            self._vectors[key] = Vectors(self._by_row(weights), where)
        return self._vectors[key]

    def _updates_of(self, members: tuple[int, ...], method: Method | None) -> tuple[Update, ...]:
        if not members:
            return ()
        method = method or self._cheaper(members)
        key = method, members
        if key not in self._updates:
            make = self._concatenated if method is Method.CONCATENATED else self._segments
            self._updates[key] = tuple(make(members))
        return self._updates[key]

    def _cheaper(self, members: tuple[int, ...]) -> Method:
        costs = _CPU if self._device.type == "cpu" else _CUDA
        heights = sum(self._height(member) for member in members)
        concatenated = len(self._runs(members)) * costs.update + self._width * heights * len(self._part_of_row)
        segments = len(members) * costs.update
        for member in members:
            gathered = 0 if isinstance(self._tokens[member], slice) else costs.moved
            segments += self._width * self._token_counts[member] * (self._height(member) + gathered)
        return Method.CONCATENATED if concatenated <= segments else Method.SEGMENTS

    def _concatenated(self, members: tuple[int, ...]) -> Iterator[Update]:
        for run in self._runs(members):
            start, stop = self._places[run[0]].start, self._places[run[-1]].stop
            weights = np.zeros((len(self._weights), stop - start), np.float32)
            for member in run:
                place = self._places[member]
                weights[:, place.start - start : place.stop - start] = self._weights[:, [member]]
            by_row = self._by_row(weights)
            everyone = all(self._token_counts[member] == len(self._part_of_row) for member in run)
            whole = sum(map(self._height, run)) == stop - start
            yield Update(start, stop, slice(None), by_row, None if everyone and whole else by_row == 0)

    def _segments(self, members: tuple[int, ...]) -> Iterator[Update]:
        for member in members:
            tokens, place = self._tokens[member], self._places[member]
            if self._token_counts[member]:
                weights = self._by_row(self._weights[:, [member]])
                which = tokens if isinstance(tokens, slice) else there(tokens, self._device)
                yield Update(place.start, place.stop, which, weights[which])

    def _runs(self, members: tuple[int, ...]) -> list[list[int]]:
        """Members that lie next to each other, from the lowest on."""
        runs: list[list[int]] = []
        for member in sorted(members, key=lambda member: self._places[member].start):
            if runs and self._places[runs[-1][-1]].end == self._places[member].start:
                runs[-1].append(member)
            else:
                runs.append([member])
        return runs

    def _height(self, member: int) -> int:
        return self._places[member].stop - self._places[member].start

    def _by_row(self, by_part: NDArray[np.float32]) -> Tensor:
        """What holds for parts, for each row: float32 `[n, columns]`, on the device."""
        return there(by_part, self._device).index_select(0, self._part_of_row_there)


def _compact(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Indices that follow each other as a slice, which is read in place."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
