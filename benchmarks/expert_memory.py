"""Experts that come while others compute: a cold load, a hot swap, and what running answers feel of either.

A cold load goes from a file in the page cache to an expert that is resident, through the worker's own residency: read,
hash, inflate, check, fold, place; beside reading, hashing and inflating the same bytes alone, and beside 1, 50 and 500
other experts. A hot swap goes from host memory to where experts compute, beside one copy of the same bytes. The time
from a running answer's token to its next is taken while experts are swapped without a pause, beside the same while as
many texts are answered by an expert that stays.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import statistics
import time
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import zstandard

from benchmarks.answers import Text, answer, answer_all
from benchmarks.rig import adapter_files, another, arena_for, load, measure_shapes, running, synchronise
from hocket.identity import digest_of
from hocket.packages import Policy
from hocket.packages.expert.writer import write_archive
from hocket.trust_folder import TrustFolder
from services.expert_worker.authority import Authority
from services.expert_worker.budget import Budget
from services.expert_worker.engine.expert import AdapterExpert
from services.expert_worker.loader import place, prepare
from services.expert_worker.residency import Residency
from services.expert_worker.supply import Supplied

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from benchmarks.rig import Measured, Rig, Row
    from services.expert_worker.authority import Standing
    from services.expert_worker.engine.arena import Arena
    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.loader import Prepared, Served
    from services.expert_worker.supply import Report

_INFLATE: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "gzip": lambda data: zlib.decompress(data, wbits=31),
    "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    "gzip, stored": lambda data: zlib.decompress(data, wbits=31),
}
_COLD_BUDGET: Final = "1.3"
_HOT_BUDGET: Final = "1.5"
_ARENA_EXPERTS: Final = 8
_RUNNING: Final = 4
"""Answers that go on while others come."""
_WARM_STEPS: Final = 5
_ALONE: Final = "alone"
_STAYS: Final = "others by an expert that stays"
_COMES: Final = "others by experts that come"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        residents: How many experts are resident beside a cold load.
        loads: Cold loads, and hot swaps, of each kind.
        steps: Of a running answer, of each kind and round.
    """

    residents: tuple[int, ...]
    loads: int
    steps: int


def archives(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same package as it may lie on a disk, by compression; the last one stores what the others compress."""
    found = {name: write_archive(files, compression=name) for name in ("gzip", "zstd")}
    return {**found, "gzip, stored": gzip.compress(gzip.decompress(found["gzip"]), compresslevel=0, mtime=0)}


class Host:
    """The residency of a worker, over files that lie in a folder by digest.

    Args:
        rig: Where experts are to be.
        folder: For the files.
        budget_bytes: What they may take.
    """

    def __init__(self, rig: Rig, folder: Path, budget_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rig = rig
        self._folder = folder
        self._brought: Supplied | None = None
        self._placed: tuple[Served, ...] = ()
        authority = Authority(TrustFolder(folder / "trust"), Policy(allow_unsigned=True))
        self.residency = Residency(Budget(budget_bytes), 8, 60.0, authority, self._bring, self._place, lambda: None)

    def add(self, data: bytes) -> str:
        """Put a file there."""
        digest = digest_of(data)
        self.path(digest).write_bytes(data)
        return digest

    def path(self, digest: str) -> Path:
        """Where a file is."""
        return self._folder / digest.replace(":", "-")

    async def cold(self, digest: str) -> AdapterExpert:
        """Load an expert that is not there."""
        package = await self.residency.acquire(digest, 600.0)
        self.residency.release(package)
        (expert,) = package.experts
        if not isinstance(expert, AdapterExpert):
            raise TypeError("not an adapter")
        return expert

    async def fill(self, count: int, digest: str) -> None:
        """Have so many resident: with the numbers of a file's, and digests of their own."""
        await self.cold(digest)
        self.residency.drop(digest)
        for number in range(len(self.residency.packages), count):
            await self.cold(f"copy {number}")

    async def _bring(self, digest: str, standing: Standing, _report: Report) -> Supplied:
        if self._brought is not None and digest.startswith("copy"):
            return replace(self._brought, prepared=replace(self._brought.prepared, digest=digest))
        self._brought = await asyncio.to_thread(self._open, digest, standing)
        return self._brought

    async def _place(self, prepared: Prepared) -> tuple[Served, ...]:
        if not prepared.digest.startswith("copy"):
            self._placed = await asyncio.to_thread(place, prepared, self._rig.device)
        return self._placed

    def _open(self, digest: str, standing: Standing) -> Supplied:
        package, evidence = standing.open(digest, self.path(digest).read_bytes(), ())
        return Supplied(prepare(package, self._rig.base), evidence, package.provenance.proofs)


def _row(step: str, size: int, seconds: list[float], floor_seconds: float, budget: str = "-") -> Row:
    middle = statistics.median(seconds)
    return {
        "step": step, "MB": size / 1e6, "ms": 1e3 * middle, "p99 ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "longest ms": 1e3 * max(seconds), "floor ms": 1e3 * floor_seconds, "x its floor": middle / floor_seconds,
        "budget": budget,
    }  # fmt: skip


async def _load_cold(
    rig: Rig, plan: Plan, arena: Arena, hosts: Mapping[str, Host], digest: str, inflate: Callable[[bytes], bytes]
) -> dict[str, list[float]]:
    """Seconds of each load in each host, by its name, and of the parts that nobody can do without; in turns."""
    path = next(iter(hosts.values())).path(digest)
    data = path.read_bytes()
    parts: dict[str, Callable[[], object]] = {
        "read": path.read_bytes,
        "hash": lambda: hashlib.sha256(data).digest(),
        "inflate": lambda: inflate(data),
    }
    times: dict[str, list[float]] = {name: [] for name in (*parts, *hosts)}
    for _ in range(plan.loads + 1):  # the first one warms
        for name, part in parts.items():
            times[name].append(rig.seconds(part))
        for name, host in hosts.items():
            begin = time.perf_counter()
            expert = await host.cold(digest)
            await asyncio.to_thread(arena.bring_now, [another(expert)])
            synchronise(rig.device)
            times[name].append(time.perf_counter() - begin)
            host.residency.drop(digest)
    return {name: each[1:] for name, each in times.items()}


async def _cold(rig: Rig, plan: Plan, arena: Arena, files: Mapping[str, bytes]) -> tuple[list[Row], dict[str, str]]:
    """From a file to where it computes, beside what reading, hashing and inflating that file alone take."""
    budget_bytes = 2 * plan.residents[-1] * sum(map(len, files.values()))
    hosts: dict[str, Host] = {}
    digests: dict[str, str] = {}
    for count in plan.residents:
        host = hosts[f"cold, beside {count} resident"] = Host(rig, rig.folder / "packages", budget_bytes)
        digests = {name: host.add(data) for name, data in archives(files).items()}
        await host.fill(count, digests["zstd"])
    rows: list[Row] = []
    flat: list[str] = []
    for name, digest in digests.items():
        times = await _load_cold(rig, plan, arena, hosts, digest, _INFLATE[name])
        floor_seconds = max(statistics.median(times["read"]), statistics.median(times["hash"]))
        size = host.path(digest).stat().st_size
        rows += [
            _row(f"{name}: {step}", size, each, floor_seconds, _COLD_BUDGET if step in hosts else "-")
            for step, each in times.items()
        ]
        few, *_, many = (statistics.median(times[step]) for step in hosts)
        flat.append(f"{many / few:.2f} x ({name})")
    return rows, {
        "floor of cold loads": "the longer of reading the file, which is in the page cache, and hashing it",
        "cold loads are flat": f"beside {plan.residents[-1]} resident experts, {', '.join(flat)} what they take beside "
        f"{plan.residents[0]}",
    }


def memory_of(expert: AdapterExpert) -> Tensor:
    """The bytes in which all tensors of an expert lie."""
    tensor = next(piece.a for piece in expert.pieces.values() if piece.a is not None)
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _hot(rig: Rig, plan: Plan, arena: Arena, expert: AdapterExpert) -> list[Row]:
    """From host memory to where it computes, beside one copy of the same bytes."""
    memory = memory_of(expert)
    there = torch.empty_like(memory, device=rig.device)
    steps: dict[str, Callable[[], object]] = {
        "copy of an expert's bytes": lambda: there.copy_(memory, non_blocking=True),
        "hot: from host memory into the arena": lambda: arena.bring_now([another(expert)]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(plan.loads + 1):
        for name, step in steps.items():
            times[name].append(rig.seconds(step))
    floor, hot = steps
    floor_seconds = statistics.median(times[floor][1:])
    return [
        _row(floor, memory.nbytes, times[floor][1:], floor_seconds),
        _row(hot, memory.nbytes, times[hot][1:], floor_seconds, _HOT_BUDGET),
    ]


async def _gaps(rig: Rig, engine: Engine, steps: int, ask: Callable[[], Mixture] | None) -> tuple[list[float], int]:
    """Seconds from token to token of running answers, and how many others were answered meanwhile.

    Args:
        rig: Where.
        engine: Which.
        steps: How many.
        ask: Who answers the others, one token each, one after the other; None for no others.
    """
    going_on = True
    count = 0

    async def others(ask: Callable[[], Mixture]) -> None:
        nonlocal count
        while going_on:
            await answer(engine, Text(rig.prompt(3), ask(), 1))
            count += 1

    asking = None if ask is None else asyncio.create_task(others(ask))
    answered = await answer_all(engine, [Text(rig.prompt(3), (), steps + _WARM_STEPS) for _ in range(_RUNNING)])
    going_on = False
    if asking is not None:
        await asking
    return answered[0].gaps[_WARM_STEPS - 1 :], count


async def _swapping(rig: Rig, plan: Plan, arena: Arena, expert: AdapterExpert) -> tuple[list[Row], dict[str, str]]:
    """What running answers feel of experts that come."""
    sides: dict[str, Callable[[], Mixture] | None] = {
        _ALONE: None,
        _STAYS: lambda: ((expert, 1.0),),
        _COMES: lambda: ((another(expert), 1.0),),
    }
    gaps: dict[str, list[float]] = {name: [] for name in sides}
    counts = dict.fromkeys(sides, 0)
    positions = 2 * _RUNNING * (plan.steps + rig.page_positions)
    async with running(rig.base, arena, threads=rig.threads, positions=positions) as engine:
        for turn in range(rig.rounds + 1):
            for name, ask in sides.items():
                found, count = await _gaps(rig, engine, plan.steps if turn else _WARM_STEPS, ask)
                if turn:
                    gaps[name] += found
                    counts[name] += count
    stays, comes = gaps[_STAYS], gaps[_COMES]
    floor_seconds = statistics.median(stays)
    rows = [
        _row(f"token to token, {name}", 0 if name == _ALONE else expert.size_bytes, each, floor_seconds)
        for name, each in gaps.items()
    ]
    p99 = float(np.quantile(comes, 0.99) / np.quantile(stays, 0.99))
    return rows, {
        "no stall": f"while {counts[_COMES]} experts were swapped, beside "
        f"{counts[_STAYS]} answers without a swap: from token to token "
        f"{statistics.median(comes) / floor_seconds:.2f} x, p99 {p99:.2f} x, longest {max(comes) / max(stays):.2f} x",
    }


def plan_of(rig: Rig) -> Plan:
    """What there is time for."""
    return Plan(residents=(1, 50, 500), loads=30 if rig.is_quick else 5, steps=300 if rig.is_quick else 60)


async def measure(rig: Rig, plan: Plan | None = None) -> Measured:
    """One shape."""
    plan = plan or plan_of(rig)
    files = adapter_files(rig.base, rig.folder / "expert", 0)
    expert = load(write_archive(files), rig.base)
    arena = arena_for(rig.base, _ARENA_EXPERTS)
    for _ in range(_ARENA_EXPERTS):  # memory that was never written to takes longer
        arena.bring_now([another(expert)])
    cold, cold_notes = await _cold(rig, plan, arena, files)
    hot = await asyncio.to_thread(_hot, rig, plan, arena, expert)
    swapping, swapping_notes = await _swapping(rig, plan, arena, expert)
    return cold + hot + swapping, {**cold_notes, **swapping_notes}


if __name__ == "__main__":
    asyncio.run(measure_shapes(__doc__, "expert-memory", measure))
