from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.pages import KvPool, KvShape, Pages, default_page_positions

CPU = torch.device("cpu")
SHAPE = KvShape(layers=2, heads=3, head_dim=4)


def test_page_0_is_nobodys() -> None:
    pages = Pages(4)
    assert pages.count == 3
    assert pages.take(3) == [1, 2, 3]


@pytest.mark.parametrize("page_count", [0, 1])
def test_a_pool_of_the_scratch_page_alone_has_nothing_to_give(page_count: int) -> None:
    pages = Pages(page_count)
    assert (pages.count, pages.free_count, pages.take(1)) == (0, 0, None)


def test_all_pages_are_handed_out_or_none() -> None:
    pages = Pages(6)
    assert pages.take(6) is None
    assert pages.free_count == 5
    assert pages.take(5) is not None
    assert pages.free_count == 0


def test_consecutive_pages_are_preferred() -> None:
    pages = Pages(10)
    first, second, _ = pages.take(2), pages.take(3), pages.take(2)
    assert first is not None
    assert second is not None
    pages.give(first)
    assert pages.take(2) == [1, 2]
    pages.give(first)
    pages.give(second)
    assert pages.take(5) == [1, 2, 3, 4, 5]


def test_scattered_pages_are_better_than_none() -> None:
    pages = Pages(6)
    taken = pages.take(5)
    assert taken is not None
    pages.give([5, 1, 3])
    assert pages.take(3) == [1, 3, 5]


@pytest.mark.parametrize("given_back", [[1], [2, 2], [0], [9], [-1]])
def test_pages_that_nobody_has_cannot_be_given_back(given_back: list[int]) -> None:
    pages = Pages(4)
    pages.take(3)
    pages.give([1])
    with pytest.raises(HocketError) as refusal:
        pages.give(given_back)
    assert refusal.value.reason is Reason.INTERNAL
    pages.give([2])
    assert pages.free_count == 2


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), max_size=40))
@settings(max_examples=50)
def test_no_page_is_ever_had_twice_and_all_come_back(moves: list[tuple[int, int]]) -> None:
    pages = Pages(20)
    had: list[list[int]] = []
    for count, victim in moves:
        taken = pages.take(count)
        assert (taken is None) == (count > 19 - sum(map(len, had)))
        if taken is not None:
            had.append(taken)
        elif had:
            pages.give(had.pop(victim % len(had)))
        everything = [page for each in had for page in each]
        assert len(set(everything)) == len(everything)
        assert all(1 <= page < 20 for page in everything)
        assert pages.free_count == 19 - len(everything)
    for each in had:
        pages.give(each)
    assert pages.take(19) == list(range(1, 20))


def test_a_pool_takes_what_its_shape_says() -> None:
    pool = KvPool(SHAPE, page_count=5, page_positions=16, dtype=torch.bfloat16, device=CPU)
    assert SHAPE.position_bytes(torch.bfloat16) == 2 * 2 * 3 * 4 * 2
    assert pool.size_bytes == 5 * 16 * SHAPE.position_bytes(torch.bfloat16)
    assert pool.size_bytes == sum(tensor.nbytes for tensor in (*pool.keys, *pool.values))


def test_rows_are_written_to_their_slots_and_nowhere_else() -> None:
    pool = KvPool(SHAPE, page_count=3, page_positions=2, dtype=torch.float32, device=CPU)
    rows = torch.ones(2, 3, 4)
    pool.write(1, torch.tensor([5, 2]), rows, 2 * rows)
    assert pool.keys[1].flatten(0, 1).sum((1, 2)).tolist() == [0, 0, 12, 0, 0, 12]
    assert pool.values[1].flatten(0, 1).sum((1, 2)).tolist() == [0, 0, 24, 0, 0, 24]
    assert not pool.keys[0].any()


def test_a_pool_without_room_is_refused_and_a_smaller_one_is_not() -> None:
    with pytest.raises(HocketError) as refusal:
        KvPool(SHAPE, page_count=2**50, page_positions=16, dtype=torch.float32, device=CPU)
    assert refusal.value.reason is Reason.DEVICE_MEMORY
    KvPool(SHAPE, page_count=2, page_positions=16, dtype=torch.float32, device=CPU)


def test_pages_are_as_large_as_a_devices_attention_likes_them() -> None:
    assert default_page_positions(CPU) == 16
    assert default_page_positions(torch.device("cuda:0")) == 256
