"""One memory for pages and rows: neither takes a byte of the other's, and what changes hands is zeros."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.slab import Slab

CPU = torch.device("cpu")


def slab_of(layer_bytes: int = 640, page_bytes: int = 48, row_bytes: int = 32) -> Slab:
    return Slab(2, layer_bytes, page_bytes=page_bytes, row_bytes=row_bytes, device=CPU)


def test_pages_are_counted_from_the_beginning_and_rows_up_to_the_end() -> None:
    slab = slab_of()
    assert (slab.page_count, slab.row_count, slab.size_bytes) == (13, 20, 1280)
    slab.rows(1, torch.float32)[19] = 7
    slab.pages(1)[0] = 9
    assert slab.rows(1, torch.uint8)[0, :16].tolist() == [9] * 16  # they begin at the same byte here
    assert not slab.pages(1)[12, :32].any()
    assert slab.pages(1)[12, 32:].any()  # where the last row begins
    assert not slab.pages(0).any()


def test_everything_is_for_pages_until_rows_are_wanted_and_back() -> None:
    slab = slab_of()
    assert (slab.page_limit, slab.row_limit) == (13, 20)
    assert slab.claim_rows(10, kept_pages=False)
    assert (slab.page_limit, slab.row_limit) == (6, 10)  # 6 * 48 <= 320
    assert not slab.claim_pages(14)
    slab.rows_retreat = lambda first: first <= 10  # row 10 is in use
    assert not slab.claim_pages(7)
    assert slab.page_limit == 6
    slab.rows_retreat = lambda first: first <= 11
    assert slab.claim_pages(7)
    assert (slab.page_limit, slab.row_limit) == (7, 11)


def test_pages_in_use_stay_and_those_that_are_only_kept_go_when_they_have_to() -> None:
    slab = slab_of()
    slab.pages_retreat = lambda end, kept: end >= (3 if kept else 8)
    assert not slab.claim_rows(0, kept_pages=True)
    assert not slab.claim_rows(5, kept_pages=False)
    assert slab.claim_rows(5, kept_pages=True)
    assert slab.page_limit == 3


def test_what_rows_have_had_is_zeros_before_it_is_a_page() -> None:
    slab = slab_of()
    slab.claim_rows(0, kept_pages=False)
    for layer in range(2):
        slab.rows(layer, torch.float32).fill_(float("nan"))
    assert slab.claim_pages(5)
    for layer in range(2):
        assert not slab.pages(layer)[:5].any()
        assert slab.rows(layer, torch.float32)[slab.row_limit :].isnan().all()


def test_what_pages_have_had_is_zeros_before_it_is_a_row() -> None:
    slab = slab_of()
    for layer in range(2):
        slab.pages(layer).fill_(255)  # no number, as float32
    assert slab.claim_rows(10, kept_pages=False)
    for layer in range(2):
        assert not slab.rows(layer, torch.float32)[10:].any()
        assert (slab.pages(layer)[: slab.page_limit] == 255).all()


def test_there_is_room_for_both_or_not() -> None:
    slab = slab_of()
    assert slab.has_room(0, 20)
    assert slab.has_room(12, 2)
    assert not slab.has_room(12, 3)


def test_a_slab_without_room_is_refused() -> None:
    with pytest.raises(HocketError) as refusal:
        slab_of(layer_bytes=2**60)
    assert refusal.value.reason is Reason.DEVICE_MEMORY


@dataclass
class Rows:
    """Whoever has rows, of which some are only kept."""

    slab: Slab
    used: list[range] = field(default_factory=list)
    kept: list[range] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slab.rows_retreat = self.retreat

    def take(self, count: int) -> None:
        end = min((each.start for each in (*self.used, *self.kept)), default=self.slab.row_count)
        if 0 < count <= end and self.slab.claim_rows(end - count, kept_pages=True):
            self.used.append(range(end - count, end))

    def retreat(self, first: int) -> bool:
        self.kept = [each for each in self.kept if each.start >= first]
        return all(each.start >= first for each in self.used)


moves = st.lists(
    st.tuples(st.sampled_from(["take rows", "keep rows", "take pages", "give pages"]), st.integers(0, 7)), max_size=40
)


@given(moves)
@settings(max_examples=80, deadline=None)
def test_no_byte_is_ever_had_twice_and_nobody_starves(moves: list[tuple[str, int]]) -> None:
    slab = slab_of()
    pages, rows = Pages(slab.page_count, slab), Rows(slab)
    had: list[list[int]] = []
    for move, count in moves:
        if move == "take rows":
            rows.take(count)
        elif move == "keep rows" and rows.used:
            rows.kept.append(rows.used.pop(count % len(rows.used)))
        elif move == "take pages":
            free = pages.free_count
            if (taken := pages.take(count)) is not None:
                had.append(taken)
            else:
                lowest = min((each.start for each in rows.used), default=slab.row_count)
                assert count > free or (free - count) * 48 < (slab.row_count - lowest) * 32 + 48 + slab.layer_bytes % 48
        elif move == "give pages" and had:
            pages.give(had.pop(count % len(had)))
        page_end = max((page for each in had for page in each), default=0) + 1
        lowest = min((each.start for each in (*rows.used, *rows.kept)), default=slab.row_count)
        assert page_end <= slab.page_limit
        assert lowest >= slab.row_limit
        assert (
            slab.page_limit * slab.page_bytes <= slab.layer_bytes - (slab.row_count - slab.row_limit) * slab.row_bytes
        )
    for each in had:
        pages.give(each)
    rows.take(slab.row_count - sum(map(len, rows.used)) - sum(map(len, rows.kept)) - 2)
    rows.used, rows.kept = [], rows.used
    assert pages.take(pages.count) is not None
    assert rows.kept == []
