from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.int8 import dequantise, quantise
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


def test_one_that_grows_goes_on_in_a_row_while_nobody_is_in_its_way() -> None:
    pages = Pages(20)
    first = pages.take(2, room=6)
    assert first == [1, 2]
    assert pages.take(2, room=4, growing=[range(3, 7)]) == [7, 8]
    assert pages.take(2, after=2, room=4) == [3, 4]
    assert pages.take(1, after=8, room=2, growing=[range(5, 7)]) == [9]
    assert pages.take(3, after=4, room=3, growing=[range(10, 11)]) == [5, 6, 11]


def test_room_to_grow_is_a_wish() -> None:
    pages = Pages(10)
    assert pages.take(2, room=40) == [1, 2]
    assert pages.take(3, growing=[range(3, 10)]) == [3, 4, 5]
    assert pages.take(4, growing=[range(7, 9)]) == [6, 7, 8, 9]


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
    assert pool.size_bytes == sum(tensor.nbytes for layer in range(2) for tensor in pool.read(layer, None))


def test_rows_are_written_to_their_slots_and_nowhere_else() -> None:
    pool = KvPool(SHAPE, page_count=3, page_positions=2, dtype=torch.float32, device=CPU)
    rows = torch.ones(2, 3, 4)
    pool.write(1, torch.tensor([5, 2]), rows, 2 * rows)
    keys, values = pool.read(1, None)
    assert keys.flatten(0, 1).sum((1, 2)).tolist() == [0, 0, 12, 0, 0, 12]
    assert values.flatten(0, 1).sum((1, 2)).tolist() == [0, 0, 24, 0, 0, 24]
    assert not pool.read(0, None)[0].any()


def test_a_pool_without_room_is_refused_and_a_smaller_one_is_not() -> None:
    with pytest.raises(HocketError) as refusal:
        KvPool(SHAPE, page_count=2**50, page_positions=16, dtype=torch.float32, device=CPU)
    assert refusal.value.reason is Reason.DEVICE_MEMORY
    KvPool(SHAPE, page_count=2, page_positions=16, dtype=torch.float32, device=CPU)


def test_pages_are_as_large_as_a_devices_attention_likes_them() -> None:
    assert default_page_positions(CPU) == 16
    assert default_page_positions(torch.device("cuda:0")) == 256


def int8_pool(dtype: torch.dtype = torch.float32) -> KvPool:
    return KvPool(SHAPE, page_count=5, page_positions=2, dtype=dtype, device=CPU, stored_as=torch.int8)


def test_a_pool_in_int8_takes_a_byte_a_number_and_a_scale_a_head() -> None:
    assert SHAPE.position_bytes(torch.int8) == 2 * 2 * 3 * (4 + 4)
    assert int8_pool().size_bytes == 5 * 2 * SHAPE.position_bytes(torch.int8)
    wide = KvShape(layers=28, heads=8, head_dim=128)
    assert wide.position_bytes(torch.bfloat16) / wide.position_bytes(torch.int8) == pytest.approx(1.94, abs=0.01)
    assert wide.position_bytes(torch.float32) / wide.position_bytes(torch.int8) == pytest.approx(3.88, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_pool_in_int8_gives_is_what_was_written_rounded_by_half_a_step(dtype: torch.dtype) -> None:
    pool = int8_pool(dtype)
    rows = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    pool.write(1, torch.tensor([7, 2, 6]), rows, 100 * rows)
    keys, values = pool.read(1, torch.tensor([3, 1]))
    assert (keys.dtype, keys.shape) == (dtype, (2, 2, 3, 4))
    assert torch.equal(keys[0, 1], dequantise(*quantise(rows[0])).to(dtype))
    most = rows.float().abs().amax(-1, keepdim=True)
    rounded = 2**-8 * most if dtype is torch.bfloat16 else 1e-6 * most
    assert ((keys[0, 0].float() - rows[2].float()).abs() <= most[2] / 254 + rounded[2]).all()
    assert ((values[1, 0].float() / 100 - rows[1].float()).abs() <= most[1] / 254 + 2 * rounded[1]).all()
    assert not keys[1, 1].any()  # nobody has written there
    assert not pool.read(0, torch.tensor([3, 1]))[0].any()


def test_a_position_in_int8_depends_on_nothing_but_what_was_written_there() -> None:
    rows = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    together, apart = int8_pool(), int8_pool()
    together.write(0, torch.arange(4), rows, rows)
    for slot in range(4):
        apart.write(0, torch.tensor([slot]), rows[slot : slot + 1], rows[slot : slot + 1])
    every = torch.arange(5)
    assert torch.equal(together.read(0, every)[0], apart.read(0, every)[0])
    apart.write(0, torch.tensor([1]), 1e9 * rows[:1], rows[:1])
    assert torch.equal(together.read(0, every)[0].flatten(0, 1)[2], apart.read(0, every)[0].flatten(0, 1)[2])


def test_heads_of_any_size_can_be_kept_in_int8() -> None:
    shape = KvShape(layers=1, heads=2, head_dim=6)
    pool = KvPool(shape, page_count=3, page_positions=2, dtype=torch.float32, device=CPU, stored_as=torch.int8)
    rows = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    pool.write(0, torch.tensor([3, 4]), rows, 2 * rows)
    keys, values = pool.read(0, torch.tensor([1, 2]))
    assert torch.equal(keys.flatten(0, 1)[1:3], dequantise(*quantise(rows)))
    assert torch.equal(values.flatten(0, 1)[1:3], dequantise(*quantise(2 * rows)))
