"""Requests that need several experts each, in a budget for few: nobody waits for ever, nothing is left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.packages import Policy, Purpose, Subject
from hocket.trust_folder import TrustFolder
from services.expert_worker.authority import Authority, Evidence
from services.expert_worker.budget import Budget
from services.expert_worker.gathering import Gathering
from services.expert_worker.loader import Prepared, Served
from services.expert_worker.parameters import move
from services.expert_worker.residency import Residency
from services.expert_worker.supply import Report, Supplied
from tests.signing import NOW
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from services.expert_worker.authority import Standing
    from services.expert_worker.residency import ResidentPackage

DIGESTS = ["sha256:" + letter * 64 for letter in "abcdef"]
BUDGET = 100
FOR_EVER = 10_000.0
"""More virtual seconds than any request waits."""
LONG = 500.0
"""More than all requests of an example together take, one after the other."""


@dataclass(frozen=True)
class Request:
    """Wants some experts, keeps them for a while; may have left by then."""

    wanted: list[int]
    begin: float
    hold: float
    patience: float
    leaves_after: float | None


@dataclass
class Memory:
    """A residency whose packages take time to come, and sometimes do not come at all."""

    sizes: list[int]
    delays: list[float]
    broken: set[int]
    peak_bytes: int = 0
    found: dict[int, str] = field(default_factory=dict)
    in_use: Counter[ResidentPackage] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        authority = Authority(TrustFolder(Path("/nowhere")), Policy(allow_unsigned=True))
        self.residency = Residency(Budget(BUDGET), 64, 5.0, authority, self.bring, self.place, self.look)
        self.gathering = Gathering(self.residency)

    async def bring(self, digest: str, standing: Standing, report: Report) -> Supplied:
        del report
        which = DIGESTS.index(digest)
        await asyncio.sleep(self.delays[which])
        if which in self.broken:
            raise HocketError(Reason.BAD_ADAPTER, "scripted")
        prepared = Prepared(digest, (torch.empty(self.sizes[which], dtype=torch.uint8),), lambda _moved: ())
        evidence = Evidence(Subject(Purpose.PACKAGE, digest, 9, "expert"), (), None, NOW)
        return Supplied(prepared, evidence, standing.judge(evidence))

    async def place(self, prepared: Prepared) -> tuple[Served, ...]:
        self.look()
        await asyncio.sleep(0.1)
        return prepared.assemble(move(prepared.tensors, torch.device("cpu")))

    def look(self) -> None:
        residency = self.residency
        there = {*residency.packages, *(+self.in_use)}
        assert sum(package.size_bytes for package in there) <= residency.used_bytes, "what is in use was dropped"
        self.peak_bytes = max(self.peak_bytes, residency.used_bytes)

    async def serve(self, place: int, request: Request) -> None:
        await asyncio.sleep(request.begin)
        digests = [DIGESTS[which] for which in request.wanted]
        try:
            packages: list[ResidentPackage] = await self.gathering.acquire(digests, request.patience)
        except HocketError as error:
            self.found[place] = error.reason
            return
        try:
            self.found[place] = "OK"
            assert [package.digest for package in packages] == digests
            assert all(package.in_use_count > 0 for package in packages)
            self.in_use.update(packages)
            self.look()
            await asyncio.sleep(request.hold)
            self.look()
        finally:
            self.in_use.subtract(packages)
            for package in packages:
                self.residency.release(package)


seconds = st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0.0, 20.0)
requests = st.builds(
    Request,
    wanted=st.lists(st.integers(0, len(DIGESTS) - 1), min_size=1, max_size=3, unique=True),
    begin=seconds,
    hold=seconds,
    patience=st.sampled_from([5.0, FOR_EVER, FOR_EVER]),
    leaves_after=st.none() | st.none() | seconds,
)


EACH_WOULD_HOLD_HALF = {
    "sizes": [40] * 6,
    "delays": [1.0, 2.0, 1.0, 2.2, 0.0, 0.0],
    "broken": set[int](),
    "asked": [Request(wanted, 0.0, 1.0, FOR_EVER, None) for wanted in ([0, 1], [2, 3])],
}


@example(**EACH_WOULD_HOLD_HALF)
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([20, 30, 40, 60]) | st.integers(5, 70), min_size=len(DIGESTS), max_size=len(DIGESTS)
    ),
    delays=st.lists(st.floats(0.0, 3.0), min_size=len(DIGESTS), max_size=len(DIGESTS)),
    broken=st.sets(st.integers(0, len(DIGESTS) - 1), max_size=1),
    asked=st.lists(requests, min_size=2, max_size=14),
)
def test_every_request_ends_and_every_set_that_fits_is_had_by_whoever_waits(
    sizes: list[int], delays: list[float], broken: set[int], asked: list[Request]
) -> None:
    memory = Memory(sizes, delays, broken)

    @in_virtual_time
    async def run() -> None:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(memory.serve(place, request)) for place, request in enumerate(asked)]
        for task, request in zip(tasks, asked, strict=True):
            if request.leaves_after is not None:
                loop.call_later(request.begin + request.leaves_after, task.cancel)
        async with asyncio.timeout(LONG):
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()
        await asyncio.sleep(FOR_EVER)  # loads that nobody waits for any more
        assert all(package.in_use_count == 0 for package in memory.residency.packages)
        assert memory.residency.used_bytes == sum(package.size_bytes for package in memory.residency.packages)
        assert memory.residency.digests == {package.digest for package in memory.residency.packages}

    run()
    assert memory.peak_bytes <= BUDGET
    for place, request in enumerate(asked):
        if request.patience < FOR_EVER or request.leaves_after is not None:
            continue
        if broken.intersection(request.wanted):
            assert memory.found[place] == Reason.BAD_ADAPTER
        elif sum(sizes[which] for which in request.wanted) > BUDGET:
            assert memory.found[place] == Reason.DEVICE_MEMORY
        else:
            assert memory.found[place] == "OK"
