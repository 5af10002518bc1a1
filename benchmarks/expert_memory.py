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
import itertools
import statistics
import time
import zlib
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import zstandard

from benchmarks.answers import Text, answer
from benchmarks.rig import RANK, adapter_files, another, arena_for, load, measure_shapes, running
from hocket.identity import digest_of
from hocket.packages import Policy
from hocket.packages.expert.writer import write_archive
from hocket.trust_folder import TrustFolder
from services.expert_worker.authority import Authority
from services.expert_worker.engine.sampling import Sampling
from services.expert_worker.engine.sequence import Delta, TextRequest
from services.expert_worker.loader import Prepared, place, prepare
from services.expert_worker.residency import Residency
from services.expert_worker.supply import Supplied

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from benchmarks.rig import Measured, Rig, Row
    from services.expert_worker.authority import Standing
    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.loader import Served
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
        self._shared: Prepared | None = None
        authority = Authority(TrustFolder(folder / "trust"), Policy(allow_unsigned=True))
        self.residency = Residency(budget_bytes, 8, 60.0, authority, self._bring, self._place, lambda: None)
        device_bytes, host_bytes = (budget_bytes, None) if rig.device.type == "cpu" else (0, budget_bytes)
        self.residency.divide(device_bytes, host_bytes)

    def add(self, data: bytes) -> str:
        """Put a file there."""
        digest = digest_of(data)
        (self._folder / digest.replace(":", "-")).write_bytes(data)
        return digest

    async def fill(self, digest: str, count: int) -> None:
        """Have so many resident: with the numbers of one, whose memory they share, under digests of their own."""
        for number in range(count):
            await self.cold(f"{digest}#{number}")

    async def cold(self, digest: str) -> None:
        """Load an expert that is not there."""
        self.residency.release(await self.residency.acquire(digest, 600.0))

    async def _bring(self, digest: str, standing: Standing, report: Report) -> Supplied:
        del report
        whole, _, number = digest.partition("#")
        supplied = await asyncio.to_thread(self._open, whole, standing)
        if not number:
            return supplied
        self._shared = self._shared or supplied.prepared
        return replace(supplied, prepared=replace(self._shared, digest=digest))

    async def _place(self, prepared: Prepared) -> tuple[Served, ...]:
        return await asyncio.to_thread(place, prepared, self._rig.device)

    def _open(self, digest: str, standing: Standing) -> Supplied:
        data = (self._folder / digest.replace(":", "-")).read_bytes()
        package, evidence = standing.open(digest, data, ())
        return Supplied(prepare(package, self._rig.base), evidence, package.provenance.proofs)


async def _cold(rig: Rig, plan: Plan, files: Mapping[str, bytes]) -> list[Row]:
    raise NotImplementedError
