from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2 import Synced, WorkerState
from services.registry.feed import Feed, WorkerGone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from services.registry.feed import Change, Item


class World:
    """Things that change, and a feed over them."""

    def __init__(self) -> None:
        self.revision = 0
        self.newest: dict[str, int] = {}
        self.workers: dict[str, WorkerState] = {}
        self.reads = 0
        self.feed = Feed(self._changes, lambda: dict(self.workers))

    def change(self, digest: str) -> None:
        self.revision += 1
        self.newest[digest] = self.revision
        self.feed.advance(self.revision)

    def announce(self, name: str, **changes: Any) -> None:
        self.workers[name] = WorkerState(worker=name, **changes)
        self.feed.wake()

    def expire(self, name: str) -> None:
        del self.workers[name]
        self.feed.wake()

    async def _changes(self, after: int) -> Sequence[tuple[int, Change]]:
        """Two at a time."""
        self.reads += 1
        await asyncio.sleep(0)
        ordered = sorted((revision, digest) for digest, revision in self.newest.items() if revision > after)
        return [(revision, Package(digest=digest)) for revision, digest in ordered[:2]]


def spoken(item: Item) -> tuple[int, str]:
    match item.event:
        case Package(digest=digest):
            return item.revision, digest
        case WorkerState() as state:
            return item.revision, f"+{state.worker}"
        case WorkerGone(worker):
            return item.revision, f"-{worker}"
        case Synced():
            return item.revision, "synced"
    raise AssertionError(item)


async def take(feed: AsyncGenerator[Item, None], count: int) -> list[tuple[int, str]]:
    async with asyncio.timeout(2):
        return [spoken(await anext(feed)) for _ in range(count)]


async def test_a_watcher_is_told_everything_then_the_mark_then_changes() -> None:
    world = World()
    for digest in "abc":
        world.change(digest)
    world.announce("w")
    async with aclosing(world.feed.watch(0)) as feed:
        assert await take(feed, 5) == [(1, "a"), (2, "b"), (3, "c"), (3, "+w"), (3, "synced")]

        world.change("a")
        assert await take(feed, 1) == [(4, "a")]


async def test_a_watcher_goes_on_where_it_was() -> None:
    world = World()
    for digest in "abca":
        world.change(digest)
    async with aclosing(world.feed.watch(2)) as feed:
        assert await take(feed, 3) == [(3, "c"), (4, "a"), (4, "synced")]


async def test_a_revision_ahead_of_history_is_refused() -> None:
    world = World()
    world.change("a")
    async with aclosing(world.feed.watch(1)) as feed:
        assert await take(feed, 1) == [(1, "synced")]
    with pytest.raises(HocketError) as caught:
        await anext(world.feed.watch(2))
    assert caught.value.reason is Reason.REVISION_UNKNOWN


async def test_a_slow_watcher_skips_what_was_overtaken() -> None:
    world = World()
    async with aclosing(world.feed.watch(0)) as feed:
        await take(feed, 1)
        for _ in range(1000):
            world.change("a")
            world.announce("w", budget_bytes=world.revision)
        assert await take(feed, 2) == [(1000, "a"), (1000, "+w")]


async def test_workers_come_change_and_go() -> None:
    world = World()
    async with aclosing(world.feed.watch(0)) as feed:
        await take(feed, 1)
        world.announce("w")
        assert await take(feed, 1) == [(0, "+w")]
        world.announce("w", draining=True)
        assert await take(feed, 1) == [(0, "+w")]
        world.expire("w")
        assert await take(feed, 1) == [(0, "-w")]


async def test_a_worker_that_came_and_went_unseen_is_not_mentioned() -> None:
    world = World()
    async with aclosing(world.feed.watch(0)) as feed:
        await take(feed, 1)
        world.announce("short")
        world.expire("short")
        world.announce("w")
        assert await take(feed, 1) == [(0, "+w")]


async def test_news_of_workers_does_not_touch_the_store() -> None:
    world = World()
    world.change("a")
    async with aclosing(world.feed.watch(0)) as feed:
        await take(feed, 2)
        reads = world.reads
        world.announce("w")
        await take(feed, 1)
    assert world.reads == reads


async def test_closing_ends_every_watcher() -> None:
    world = World()
    async with aclosing(world.feed.watch(0)) as feed:
        await take(feed, 1)
        world.feed.close()
        with pytest.raises(HocketError) as caught:
            await take(feed, 1)
    assert caught.value.reason is Reason.DRAINING


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(st.sampled_from("abcdef"), max_size=20), breaks=st.lists(st.integers(1, 5), max_size=4))
def test_a_watcher_that_breaks_off_anywhere_misses_nothing(changes: list[str], breaks: list[int]) -> None:
    async def scenario() -> None:
        world = World()
        known: dict[str, int] = {}
        after = 0
        for items in [*breaks, 100]:
            for digest in changes[: len(changes) // 2]:
                world.change(digest)
            changes.reverse()
            async with aclosing(world.feed.watch(after)) as feed:
                for _ in range(items):
                    revision, what = spoken(await anext(feed))
                    assert revision >= after
                    after = revision
                    if what == "synced":
                        break
                    known[what] = revision
        assert known == world.newest

    asyncio.run(scenario())
