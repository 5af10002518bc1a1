"""One memory by itself; with loads and requests around it, it is in `test_residency.py`."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.expert_worker.budget import Budget, Wait
from tests.shelves import LATER, SOON, A, B
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    import pytest


@dataclass(eq=False)
class Item:
    size_bytes: int
    in_use_count: int = 0
    worth: float = 0.0


@dataclass
class Cache:
    """Items in a budget of 100, those used longest ago first."""

    budget: Budget = field(default_factory=lambda: Budget(100))
    items: list[Item] = field(default_factory=list)

    def use(self, *items: Item) -> None:
        for item in items:
            if item in self.items:
                self.items.remove(item)
            else:
                for victim in self.budget.victims(item.size_bytes, self.items):
                    self.items.remove(victim)
                    self.budget.free(victim.size_bytes)
                assert self.budget.take(item.size_bytes)
            item.worth = self.budget.worth(item.size_bytes)
            self.items.append(item)


class TestWhoMakesRoom:
    """By GreedyDual-Size."""

    def test_a_large_one_leaves_before_a_small_one_that_takes_nearly_as_long_to_bring_back(self) -> None:
        cache, small, large, medium, last = Cache(), Item(10), Item(60), Item(30), Item(50)
        cache.use(small, large, medium, last)
        assert cache.items == [small, medium, last]

    def test_what_is_large_does_not_keep_out_what_is_small_for_ever_nor_the_other_way_round(self) -> None:
        cache, small, large = Cache(), Item(10), [Item(60) for _ in range(3)]
        cache.use(small)
        for _ in range(8):
            cache.use(*large)
        assert small not in cache.items

    def test_room_that_one_in_use_for_long_has_made_does_not_turn_the_order_round(self) -> None:
        cache = Cache()
        cache.use(*(Item(40) for _ in range(20)))
        stale, fresh = cache.items
        stale.worth = 0.0
        first, second = Item(40), Item(40)
        cache.use(first)
        assert cache.items == [fresh, first]
        cache.use(second)
        assert cache.items == [first, second]

    def test_no_more_of_what_is_in_use_leaves_than_must_and_what_is_idle_leaves_first(self) -> None:
        cache, idle, older, newer = Cache(), Item(20), Item(30, in_use_count=1), Item(30, in_use_count=1)
        cache.use(older, newer, idle)
        assert cache.budget.victims(60, cache.items) == [], "not at once"
        assert cache.budget.leavers(60, cache.items, 0) == [idle, older]
        assert cache.budget.leavers(60, cache.items, 30) == [idle]
        assert cache.budget.leavers(60, cache.items, 40) == []


class TestTurn:
    @in_virtual_time
    async def test_it_is_that_of_the_first_that_is_wanted_once_it_has_waited_long_enough(self) -> None:
        budget = Budget(100, patience_seconds=2.0)
        unwanted, first = Wait(frozenset([A]), lambda: False), Wait(frozenset([A]), lambda: True)
        turns: list[Wait | None] = []
        with budget.waiting(unwanted), budget.waiting(first):
            await asyncio.sleep(1.0)
            second = Wait(frozenset([B]), lambda: True)
            with budget.waiting(second):
                turns.append(budget.turn)
                await asyncio.sleep(1.0)
                turns.append(budget.turn)
                budget.put_first(second)
                turns.append(budget.turn)
                await asyncio.sleep(1.0)
                turns.append(budget.turn)
            turns.append(budget.turn)
        assert turns == [None, first, None, second, first]
        assert (budget.turn, budget.waits) == (None, [])


class _Owner:
    """Stands for an expert, as far as memory goes."""


class TestLingering:
    async def test_what_garbage_holds_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.budget._COLLECTING_SECONDS", SOON)
        budget, owner = Budget(100), _Owner()
        assert budget.take(40)
        gone = weakref.ref(owner)
        cycle: list[object] = [owner]
        cycle.append(cycle)
        gc.disable()
        try:
            del cycle, owner
            budget.free_when_gone(40, [gone])
            assert (budget.used_bytes, budget.lingering_bytes) == (40, 40)
            async with asyncio.timeout(LATER):
                while budget.used_bytes:
                    await budget.until_changed()
        finally:
            gc.enable()
        assert (gone(), budget.lingering_bytes) == (None, 0)
