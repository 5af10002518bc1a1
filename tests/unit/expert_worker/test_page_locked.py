"""Host memory that is locked for CUDA. What locks is scripted here: CUDA's own calls are not made without a GPU."""

from __future__ import annotations

import gc
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker import loader
from services.expert_worker.loader import Prepared
from services.expert_worker.page_locked import PAGE_BYTES, in_pages, page_locked


@dataclass
class Book:
    """Remembers what is locked; each unlocking must find it still mapped."""

    refusal: int = 0
    locked: dict[int, int] = field(default_factory=dict)
    unlocked: list[bool] = field(default_factory=list)

    def lock(self, address: int, size_bytes: int) -> int:
        if not self.refusal:
            self.locked[address] = size_bytes
        return self.refusal

    def unlock(self, address: int) -> int:
        self.unlocked.append(is_mapped(address))
        del self.locked[address]
        return self.refusal


def is_mapped(address: int) -> bool:
    ranges = (line.split(maxsplit=1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2)])
def test_memory_is_counted_in_whole_pages(size: int, pages: int) -> None:
    assert in_pages(size) == pages * PAGE_BYTES


@pytest.mark.parametrize("count", [1, 1024, 1025, 3 * 2**18 + 1])
def test_a_copy_lies_in_locked_pages_of_its_own_and_no_more_than_it_needs(count: int) -> None:
    book = Book()
    tensor = torch.arange(count, dtype=torch.float32).view(1, -1)
    copy = page_locked(tensor, book)
    assert torch.equal(copy, tensor)
    assert (copy.dtype, copy.shape, copy.untyped_storage().nbytes()) == (tensor.dtype, tensor.shape, tensor.nbytes)
    assert book.locked == {copy.data_ptr(): in_pages(tensor.nbytes)}
    assert copy.data_ptr() % mmap.PAGESIZE == 0
    copy.mul_(2)
    assert not torch.equal(copy, tensor[0]) or count == 1


def test_memory_is_locked_for_as_long_as_any_view_of_it_lives_and_unlocked_before_it_is_given_back() -> None:
    book = Book()
    copy = page_locked(torch.arange(5000, dtype=torch.uint8), book)
    ((address, _),) = book.locked.items()
    view = copy[4000:].view(torch.float16)
    del copy
    gc.collect()
    assert address in book.locked
    assert view.untyped_storage().data_ptr() == address
    del view
    assert (book.locked, book.unlocked) == ({}, [True])


def test_what_is_empty_locks_nothing() -> None:
    book = Book()
    assert page_locked(torch.empty(0, 3), book).shape == (0, 3)
    assert not book.locked


def test_what_cannot_be_locked_is_an_error_and_leaves_nothing_locked() -> None:
    book = Book(refusal=2)
    with pytest.raises(OSError, match="error 2"):
        page_locked(torch.zeros(8), book)
    assert (book.locked, book.unlocked) == ({}, [])


def test_what_cannot_be_unlocked_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    book = Book()
    copy = page_locked(torch.zeros(8), book)
    book.refusal = 1
    del copy
    assert book.unlocked == [True]
    assert "memory stays locked" in capsys.readouterr().out


class TestPlacing:
    def test_what_will_lie_in_pages_counts_them(self) -> None:
        tensors = (torch.zeros(PAGE_BYTES + 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
        assert Prepared("x", tensors, lambda _: ()).size_bytes == PAGE_BYTES + 4
        assert Prepared("x", tensors, lambda _: (), in_pages=True).size_bytes == 3 * PAGE_BYTES

    def test_what_is_counted_is_what_is_locked(self) -> None:
        book = Book()
        prepared = Prepared("x", (torch.zeros(5000, dtype=torch.uint8), torch.ones(7)), lambda _: (), in_pages=True)
        placed = loader._page_locked(prepared, book)
        assert sum(book.locked.values()) == prepared.size_bytes
        assert [tensor.nbytes for tensor in placed] == [5000, 28]

    def test_too_little_memory_is_a_refusal_that_says_which_setting_and_passes(self) -> None:
        with pytest.raises(HocketError) as refusal:
            loader._page_locked(Prepared("x", (torch.zeros(8),), lambda _: ()), Book(refusal=2))
        assert refusal.value.reason is Reason.DEVICE_MEMORY
        assert "host_bytes" in refusal.value.message
        assert refusal.value.retry_after_seconds
