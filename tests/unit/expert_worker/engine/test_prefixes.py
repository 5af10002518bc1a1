from __future__ import annotations

import pytest
import torch

from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.prefixes import PrefixCache, page_key, salt_of
from services.expert_worker.engine.slab import Slab
from tests.scripted_engine import expert

A, B = expert("a"), expert("b")


def keyed(cache: PrefixCache, count: int, name: str) -> list[int]:
    """So many pages in use, with keys `name` 0, 1, ..."""
    pages = cache.take(count)
    assert pages is not None
    for place, page in enumerate(pages):
        cache.keep(f"{name}{place}".encode(), page)
    return pages


def found(cache: PrefixCache, count: int, name: str) -> int:
    return len(cache.find(f"{name}{place}".encode() for place in range(count)))


class TestKeys:
    def test_the_order_of_experts_means_nothing_and_everything_else_does(self) -> None:
        salt = salt_of("base", ((A, 0.5), (B, 1.0)), "tenant")
        assert salt_of("base", ((B, 1.0), (A, 0.5)), "tenant") == salt
        others = [
            salt_of("base", ((A, 1.0), (B, 0.5)), "tenant"),
            salt_of("base", ((A, 0.5000000000000001), (B, 1.0)), "tenant"),
            salt_of("base", ((A, 0.5),), "tenant"),
            salt_of("base", ((A, 0.0),), "tenant"),
            salt_of("base", ((A, -0.0),), "tenant"),
            salt_of("base2", ((A, 0.5), (B, 1.0)), "tenant"),
            salt_of("base", ((A, 0.5), (B, 1.0)), "other"),
            salt_of("baset", ((A, 0.5), (B, 1.0)), "enant"),
            salt_of("base", (), "tenant"),
        ]
        assert len({salt, *others}) == len(others) + 1

    def test_a_key_is_of_its_tokens_their_order_and_everything_before(self) -> None:
        keys = [page_key(b"p", [1, 2]), page_key(b"p", [2, 1]), page_key(b"q", [1, 2]), page_key(b"p", [1, -2])]
        assert len({*keys}) == 4
        assert page_key(b"p", [1, 2]) == keys[0]


class TestPrefixCache:
    def test_what_was_left_first_goes_first_and_all_of_it(self) -> None:
        cache = PrefixCache(Pages(9))
        first, second = keyed(cache, 4, "a"), keyed(cache, 3, "b")
        cache.release(first)
        cache.release(second)
        assert (cache.idle_count, cache.used_count) == (7, 0)
        assert cache.take(2, room=5) == [1, 2]
        assert (found(cache, 4, "a"), found(cache, 3, "b")) == (0, 3)

    def test_what_is_awaited_goes_after_everything_else_and_its_last_page_first(self) -> None:
        cache = PrefixCache(Pages(9))
        awaited, pinned, left = keyed(cache, 3, "a"), keyed(cache, 2, "p"), keyed(cache, 3, "l")
        cache.pin("", "s", pinned, 10.0)
        cache.release(awaited, awaited=True)
        cache.release(pinned)
        cache.release(left)
        have: list[int] = []
        for counts in ((3, 2, 0), (3, 2, 0), (3, 2, 0), (3, 0, 0), (3, 0, 0), (2, 0, 0), (1, 0, 0)):
            have += cache.take(1) or ()
            assert (found(cache, 3, "a"), found(cache, 2, "p"), found(cache, 3, "l")) == counts
        have += cache.take(1) or ()
        assert cache.take(1) is None
        cache.release(have)
        assert (cache.idle_count, cache.used_count) == (0, 0)

    def test_what_several_have_is_idle_when_the_last_one_lets_go(self) -> None:
        cache = PrefixCache(Pages(9))
        pages = keyed(cache, 2, "a")
        cache.use(pages)
        assert (cache.used_count, cache.idle_count) == (2, 0)
        cache.release(pages)
        assert (cache.used_count, cache.idle_count) == (2, 0)
        cache.release(pages)
        assert (cache.used_count, cache.idle_count) == (0, 2)

    def test_it_knows_what_would_be_in_use_if_some_let_go_and_one_had_what_was_found(self) -> None:
        cache = PrefixCache(Pages(9))
        shared, own, idle = keyed(cache, 2, "a"), cache.take(1) or [], keyed(cache, 1, "b")
        cache.use(shared)
        cache.release(idle)
        tables = [[*shared, *own], shared]
        assert cache.used_count_after([], []) == cache.used_count == 3
        assert cache.used_count_after(tables[:1], []) == 2
        assert cache.used_count_after(tables, []) == 0
        assert cache.used_count_after(tables, shared[:1]) == 1
        assert cache.used_count_after([], [*shared, *idle]) == 4

    def test_nothing_is_forgotten_where_that_would_not_help(self) -> None:
        slab = Slab(1, 64 * 9, page_bytes=64, row_bytes=64, device=torch.device("cpu"))
        pages = Pages(9, slab)
        cache = PrefixCache(pages)
        left, pinned, awaited = (keyed(cache, 1, name) for name in "lpa")
        cache.pin("", "s", pinned, 10.0)
        for each in (left, pinned, awaited):
            cache.release(each, awaited=each is awaited)
        assert slab.claim_rows(5, kept_pages=False)  # an expert is on its way there
        slab.rows_retreat = lambda _first: False
        assert (pages.free_count, slab.page_limit) == (5, 5)
        assert cache.take(5) is None
        assert [found(cache, 1, name) for name in "lpa"] == [1, 1, 1]
        assert cache.take(3) == [1, 2, 4]
        assert [found(cache, 1, name) for name in "lpa"] == [0, 0, 1]
        assert cache.take(2) is None
        assert found(cache, 1, "a") == 1
        slab.rows_retreat = lambda _first: True
        assert cache.take(2) == [5, 6]
        assert found(cache, 1, "a") == 1

    def test_of_two_pages_with_one_key_the_first_is_found_and_the_other_is_free_at_once(self) -> None:
        pages = Pages(9)
        cache = PrefixCache(pages)
        first, second = keyed(cache, 1, "a"), keyed(cache, 1, "a")
        cache.release(second)
        assert (pages.free_count, cache.find([b"a0"])) == (7, first)

    @pytest.mark.parametrize("awaited", [True, False])
    def test_idle_pages_retreat_and_those_in_use_do_not(self, *, awaited: bool) -> None:
        pages = Pages(9)
        cache = PrefixCache(pages)
        low, high, last = keyed(cache, 2, "a"), keyed(cache, 3, "b"), keyed(cache, 1, "c")
        cache.pin("", "s", last, 10.0)
        for each in (low, high, last):
            cache.release(each, awaited=awaited)
        pages.shed(4)
        assert (found(cache, 2, "a"), found(cache, 3, "b"), found(cache, 1, "c")) == (2, 1, 0)
        assert pages.used_end == 4

    def test_a_page_of_two_sessions_is_pinned_until_both_have_let_go(self) -> None:
        cache = PrefixCache(Pages(9))
        pages = keyed(cache, 2, "a")
        cache.pin("", "s", pages, 10.0)
        cache.pin("", "t", pages, 20.0)
        cache.release(pages)
        others = keyed(cache, 2, "b")
        cache.release(others)
        cache.expire(10.0)
        cache.release(cache.take(5) or [])
        assert (found(cache, 2, "a"), found(cache, 2, "b")) == (2, 0)
        cache.expire(20.0)
        cache.release(cache.take(7) or [])
        assert found(cache, 2, "a") == 0

    def test_what_is_pinned_while_nobody_has_it_goes_with_the_pinned(self) -> None:
        cache = PrefixCache(Pages(9))
        for name, awaited in (("a", False), ("b", True)):
            cache.release(keyed(cache, 2, name), awaited=awaited)
        cache.pin("", "s", cache.find([b"a0", b"a1"]), 10.0)
        cache.pin("", "t", cache.find([b"b0", b"b1"]), 10.0)
        assert (cache.idle_count, cache.used_count) == (4, 0)
        cache.release(keyed(cache, 2, "c"))
        cache.release(cache.take(4) or [])
        assert (found(cache, 2, "a"), found(cache, 2, "b"), found(cache, 2, "c")) == (2, 2, 0)
        cache.clear()
        assert (cache.idle_count, cache.used_count) == (0, 0)

    def test_sessions_that_share_their_pages_are_bounded_as_well(self) -> None:
        cache = PrefixCache(Pages(9))
        pages = keyed(cache, 1, "a")
        for number in range(100):
            cache.pin("", str(number), pages, float(number))
        assert len(cache._pins) == 4
        cache.expire(98.0)
        assert len(cache._pins) == 1
        cache.expire(99.0)
        assert (len(cache._pins), len(cache._pinned)) == (0, 0)

    def test_everything_can_be_forgotten(self) -> None:
        pages = Pages(9)
        cache = PrefixCache(pages)
        for name, awaited in (("a", True), ("b", False), ("c", False)):
            each = keyed(cache, 2, name)
            if name == "c":
                cache.pin("", "s", each, 10.0)
            cache.release(each, awaited=awaited)
        cache.clear()
        assert (pages.free_count, cache.idle_count) == (8, 0)
