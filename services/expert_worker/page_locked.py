"""Host memory that a CUDA device copies from by itself: locked page by page, for as long as a tensor lies there.

torch's own allocator of such memory (`Tensor.pin_memory`) rounds each block up to a power of two and keeps it for the
next one when its tensor has gone (`aten/src/ATen/core/CachingHostAllocator.h`, issue 150517 of pytorch): up to twice
what was asked for, and no budget of bytes holds. Here every tensor has pages of its own, which are registered with CUDA
and given back to the system with it.

That allocator also waits with the reuse of a block until copies from it have ended. Here whoever copies holds the
tensor until then.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import structlog
import torch

if TYPE_CHECKING:
    from torch import Tensor

PAGE_BYTES: Final = mmap.PAGESIZE
_log: Final = structlog.get_logger("worker")
_PORTABLE: Final = 1
"""`cudaHostRegisterPortable`: locked for every context."""


class Locker(Protocol):
    """What locks pages."""

    def lock(self, address: int, size_bytes: int) -> int:
        """Lock whole pages; 0, or the number of an error."""

    def unlock(self, address: int) -> int:
        """Undo it; 0, or the number of an error."""


@dataclass(frozen=True, slots=True)
class CudaLocker:
    """CUDA's.

    Args:
        device: Whose context locks.
    """

    device: torch.device

    def lock(self, address: int, size_bytes: int) -> int:
        """As `Locker`."""
        with torch.cuda.device(self.device):
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
            error = int(cuda.cudaHostRegister(address, size_bytes, _PORTABLE))
            if error:  # it would be raised for whatever this thread starts next: here it is raised, and heard
                with suppress(RuntimeError):
                    torch.ones(1, device=self.device).add_(1)
            return error

    def unlock(self, address: int) -> int:
        """As `Locker`."""
        with torch.cuda.device(self.device):
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
            return int(cuda.cudaHostUnregister(address))


def in_pages(size_bytes: int) -> int:
    """Bytes of the pages that hold so many."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def page_locked(tensor: Tensor, locker: Locker) -> Tensor:
    """A copy of a tensor in pages of its own, which are unlocked and given back when nothing lies there any more.

    Args:
        tensor: In host memory.
        locker: Locks them.

    Raises:
        OSError: The system has no memory for it, or CUDA cannot lock it.
    """
    if not tensor.nbytes:
        return tensor.clone()
    # The array stands between the tensor's storage and its pages: it goes first, and tells so, which a map does not.
    pages = mmap.mmap(-1, in_pages(tensor.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(pages, np.uint8, count=tensor.nbytes)
    del pages
    address = array.ctypes.data
    if error := locker.lock(address, in_pages(tensor.nbytes)):
        raise OSError(f"CUDA cannot lock {tensor.nbytes} bytes of host memory: error {error}")
    weakref.finalize(array, _unlock, locker, address).atexit = False  # the driver sees to what is left at the end
    copy = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _unlock(locker: Locker, address: int) -> None:
    if error := locker.unlock(address):
        _log.error("memory stays locked", address=address, error=error)
