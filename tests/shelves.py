"""A residency over packages that are made up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import REGISTRY

from hocket.errors import HocketError
from hocket.packages import Policy, Purpose, Subject
from hocket.trust_folder import TrustFolder
from hocket.v1.expert_worker_pb2 import LOAD_STATE_FETCHING
from services.expert_worker.authority import Authority, Evidence
from services.expert_worker.budget import Budget
from services.expert_worker.gathering import Gathering
from services.expert_worker.loader import Prepared, Served
from services.expert_worker.parameters import move
from services.expert_worker.residency import Residency, ResidentPackage
from services.expert_worker.supply import Supplied
from tests.signing import NOW, envelope_of

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from services.expert_worker.authority import Standing
    from services.expert_worker.supply import Report

A, B, C, D = ("sha256:" + letter * 64 for letter in "abcd")
SOON, LATER = 0.05, 10.0


@dataclass
class Shelf:
    """Packages of 40 bytes in a budget of 100, brought at once unless `hold` is set."""

    folder: Path
    budget_bytes: int = 100
    sizes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    hold_placing: asyncio.Event | None = None
    loading_max: int = 8
    placing_seconds: float = LATER
    patience_seconds: float = 2.0
    pinned: tuple[str, ...] = ()
    brought: list[str] = field(default_factory=list)
    changes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.authority = Authority(TrustFolder(self.folder), Policy(allow_unsigned=True))
        self.residency = Residency(
            Budget(self.budget_bytes, patience_seconds=self.patience_seconds),
            self.loading_max,
            self.placing_seconds,
            self.authority,
            self.bring,
            self.place,
            self.count,
            self.pinned,
        )
        self.gathering = Gathering(self.residency)

    async def bring(self, digest: str, standing: Standing, report: Report) -> Supplied:
        self.brought.append(digest)
        report(LOAD_STATE_FETCHING, 1, 2)
        if self.hold is not None:
            await self.hold.wait()
        if digest in self.failures:
            raise self.failures[digest]
        prepared = Prepared(digest, (torch.zeros(self.sizes.get(digest, 40), dtype=torch.uint8),), lambda _moved: ())
        evidence = self.evidence.get(digest) or Evidence(subject_of(digest), (), None, NOW)
        return Supplied(prepared, evidence, standing.judge(evidence))

    async def place(self, prepared: Prepared) -> tuple[Served, ...]:
        if self.hold_placing is not None:
            await self.hold_placing.wait()
        return prepared.assemble(move(prepared.tensors, torch.device("cpu")))

    def count(self) -> None:
        self.changes += 1
        self.changed.set()

    async def use(self, digest: str, seconds: float = LATER) -> ResidentPackage:
        return await self.residency.acquire(digest, seconds)

    async def use_all(self, *digests: str, seconds: float = LATER) -> list[ResidentPackage]:
        return await self.gathering.acquire(digests, seconds)

    async def load(self, *digests: str) -> None:
        for digest in digests:
            self.residency.release(await self.use(digest))

    @property
    def resident(self) -> list[str]:
        return [package.digest for package in self.residency.packages]


def subject_of(digest: str) -> Subject:
    return Subject(Purpose.PACKAGE, digest, 9, "apr")


def signed(digest: str, time: datetime = NOW) -> Evidence:
    """Evidence by a release of acme."""
    return Evidence(subject_of(digest), (envelope_of(b"", digest=digest, size_bytes=9),), None, time)


async def refused(waiting: Any) -> HocketError:
    with pytest.raises(HocketError) as refusal:
        await waiting
    return refusal.value


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def until_loaded(shelf: Shelf) -> None:
    async with asyncio.timeout(LATER):
        while shelf.residency._loadings:  # noqa: ASYNC110 - a prefetch tells nobody
            await asyncio.sleep(0)
