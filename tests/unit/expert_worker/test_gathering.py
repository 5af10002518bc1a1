from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hocket.errors import HocketError, Reason
from tests.shelves import SOON, A, B, C, D, Shelf, refused
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class TestSets:
    """`tests/property/test_expert_sets.py` has many of them at once."""

    async def test_all_of_a_set_are_in_use_in_the_order_asked_for(self, shelf: Shelf) -> None:
        packages = await shelf.use_all(B, A)
        assert [package.digest for package in packages] == [B, A]
        assert [package.in_use_count for package in packages] == [1, 1]
        assert await shelf.use_all(A, B) == packages[::-1]
        assert await shelf.use_all(A) == [packages[1]]
        assert packages[1].in_use_count == 3
        assert shelf.brought == [B, A]

    async def test_no_expert_at_all_is_a_set_too(self, shelf: Shelf) -> None:
        assert await shelf.use_all() == []

    async def test_a_set_of_one_waits_for_nobody(self, shelf: Shelf) -> None:
        (package,) = await shelf.use_all(A)
        assert package.in_use_count == 1

    async def test_while_a_set_is_loaded_it_holds_nothing(self, shelf: Shelf) -> None:
        await shelf.load(A)
        shelf.hold = asyncio.Event()
        waiting = asyncio.create_task(shelf.use_all(A, B))
        await asyncio.sleep(SOON)
        assert [package.in_use_count for package in shelf.residency.packages] == [0]
        shelf.hold.set()
        assert [package.in_use_count for package in await waiting] == [1, 1]

    async def test_a_set_that_cannot_be_loaded_holds_nothing_and_says_why_at_once(self, shelf: Shelf) -> None:
        await shelf.load(A)
        shelf.failures[C] = HocketError(Reason.BAD_ADAPTER, "no")
        assert (await refused(shelf.use_all(A, B, C))).reason is Reason.BAD_ADAPTER
        shelf.hold = asyncio.Event()
        slow = asyncio.create_task(shelf.use_all(D, A))
        assert (await refused(shelf.use_all(D, C))).reason is Reason.BAD_ADAPTER
        shelf.hold.set()
        await slow
        assert [package.in_use_count for package in shelf.residency.packages if package.digest == B] in ([], [0])

    async def test_what_together_exceeds_the_budget_is_refused_for_good(self, shelf: Shelf) -> None:
        refusal = await refused(shelf.use_all(A, B, C))
        assert (refusal.reason, refusal.retry_after_seconds) == (Reason.DEVICE_MEMORY, None)
        assert all(not package.in_use_count for package in shelf.residency.packages)
        await shelf.use_all(A, B)

    async def test_a_set_that_made_room_for_another_is_gathered_again(self, shelf: Shelf) -> None:
        held = await shelf.use(D)
        waiting = asyncio.create_task(shelf.use_all(A, B))  # one of them drops the other
        await asyncio.sleep(SOON)
        assert not waiting.done()
        shelf.residency.release(held)
        assert [package.digest for package in await waiting] == [A, B]
        assert sorted(shelf.resident) == [A, B]

    async def test_waiting_for_a_set_ends_at_the_deadline_and_leaves_nothing(self, shelf: Shelf) -> None:
        held = await shelf.use(D)
        first = asyncio.create_task(refused(shelf.use_all(A, B, seconds=3 * SOON)))
        await asyncio.sleep(SOON)
        assert (await refused(shelf.use_all(A, C, seconds=SOON))).reason is Reason.EXPERT_LOADING  # waits its turn
        assert (await first).reason is Reason.EXPERT_LOADING
        assert [package.in_use_count for package in shelf.residency.packages if package is not held] == [0]
        shelf.residency.release(held)
        await shelf.use_all(A, B)

    async def test_one_who_leaves_while_gathering_lets_the_next_in(self, shelf: Shelf) -> None:
        held = await shelf.use(D)
        first, second = (asyncio.create_task(shelf.use_all(A, other)) for other in (B, C))
        await asyncio.sleep(SOON)
        first.cancel()
        await asyncio.sleep(SOON)
        shelf.residency.release(held)
        assert [package.in_use_count for package in await second] == [1, 1]


class TestTurns:
    """Sets among loads that wait for room."""

    @in_virtual_time
    async def test_a_set_that_holds_something_goes_before_who_has_the_turn_and_the_next_set_behind_it(
        self, tmp_path: Path
    ) -> None:
        e = "sha256:" + "e" * 64
        shelf = Shelf(tmp_path, sizes={A: 40, B: 50, C: 90, D: 20, e: 50})
        held = await shelf.use(D)
        large = asyncio.create_task(shelf.use(C, 60.0))
        await asyncio.sleep(0.1)
        first, second = (asyncio.create_task(shelf.use_all(*digests, seconds=60.0)) for digests in ((A, B), (B, e)))
        await asyncio.sleep(1.95)
        assert len(shelf.residency.host.waits) > 2
        assert shelf.residency.host.turn is None, "a set is the first, and has not waited long enough"
        assert not any(task.done() for task in (large, first, second))
        shelf.residency.release(held)
        for package in await first:
            shelf.residency.release(package)
        package = await large
        await asyncio.sleep(3.0)
        assert not second.done()
        shelf.residency.release(package)
        assert [package.digest for package in await second] == [B, e]
        assert not shelf.residency.host.waits

    async def test_a_set_whose_experts_are_not_there_waits_behind_one_that_has_the_turn(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, sizes={A: 40, B: 40, C: 90, D: 30}, patience_seconds=SOON)
        held = await shelf.use(D)
        large = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(2 * SOON)
        gathering = asyncio.create_task(shelf.use_all(A, B))
        await asyncio.sleep(2 * SOON)
        assert shelf.residency.used_bytes == 30
        shelf.residency.release(held)
        package = await large
        await asyncio.sleep(2 * SOON)
        assert not gathering.done()
        shelf.residency.release(package)
        assert [package.digest for package in await gathering] == [A, B]
