"""Numbers on their way from the host to the device, without waiting for what the device computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def there(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of an array on a device; on a CPU the array itself."""
    host = _ready(array, device)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


def into(tensor: torch.Tensor, array: NDArray[Any]) -> None:
    """Put an array into a tensor of the same shape and dtype, where it lies."""
    tensor.copy_(_ready(array, tensor.device), non_blocking=True)


def _ready(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor on the host; in page-locked memory for a CUDA device, which else would be waited for."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory()
