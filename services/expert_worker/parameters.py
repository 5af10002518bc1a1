"""Parameters on their way from a package to a device: arrays as they are, in half precision, or as quantised blocks.

Quantised blocks travel as they are stored and become values where they compute, so that the way there is short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch

from hocket.packages.apr.quantization import BLOCK_BYTES, BLOCK_VALUES, part_of
from hocket.packages.model import Quantized, QuantKind

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from hocket.packages.model import Weights

_SCALE_BYTES: Final = 2
_NIBBLE_ZERO: Final = 8
VALUES_AT_ONCE: Final = 2**20
"""Values in progress while parameters are laid out, so that this takes little memory beside them."""
_BLOCKS_AT_ONCE: Final = VALUES_AT_ONCE // BLOCK_VALUES
_HALF_MAX: Final = 65504.0
_HALF_NORMAL_MIN: Final = 2.0**-14


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Quantised values that have not been expanded yet.

    Args:
        raw: uint8 `[blocks, block bytes]`, on any device.
        kind: What a block looks like.
        shape: Of the values.
        dtype: What they become.
    """

    raw: Tensor
    kind: QuantKind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the values will take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def on(self, raw: Tensor) -> Tensor:
        """The values, computed where these blocks were moved to: float32 products of units and scales.

        Args:
            raw: `raw`, moved.
        """
        values = torch.empty(math.prod(self.shape), dtype=self.dtype, device=raw.device)
        parts = zip(torch.split(values, _BLOCKS_AT_ONCE * BLOCK_VALUES), torch.split(raw, _BLOCKS_AT_ONCE), strict=True)
        for part, blocks in parts:
            scales = blocks[:, :_SCALE_BYTES].contiguous().view(torch.float16).to(torch.float32)
            codes = blocks[:, _SCALE_BYTES:].contiguous()
            if self.kind is QuantKind.Q4_0:
                units = torch.stack((codes & 0x0F, codes >> 4), dim=2).view(len(blocks), -1).to(torch.float32)
                units.sub_(_NIBBLE_ZERO)
            else:
                units = codes.view(torch.int8).to(torch.float32)
            part.copy_(units.mul_(scales).view(-1)[: len(part)])
        return values.view(self.shape)


Parameter: TypeAlias = "Tensor | Blocks"
"""Something to move to a device."""


def parameter(values: Weights, dtype: torch.dtype = torch.float32) -> Parameter:
    """Weights of a model, ready to be moved. The result shares no memory with them.

    Args:
        values: float32 values, perhaps quantised.
        dtype: What they become on the device.
    """
    if isinstance(values, Quantized):
        raw = np.frombuffer(values.blocks, np.uint8).reshape(-1, BLOCK_BYTES[values.kind])
        return Blocks(torch.from_numpy(raw.copy()), values.kind, values.shape, dtype)
    result = torch.empty(values.shape, dtype=dtype)
    result.numpy()[...] = values  # no float32 copy on the way
    return result


def weights_type(values: Weights, *, half: bool) -> torch.dtype:
    """float16 for weights that shall be halved, and whose rounding is within 2**-11 of the largest then; else float32.

    Weights that are all tiny, or of which one is too large, stay float32.

    Args:
        values: float32 values, perhaps quantised.
        half: Whether they shall be halved.
    """
    if not half:
        return torch.float32
    starts = range(0, values.size, VALUES_AT_ONCE)
    parts = (part_of(values, start, min(start + VALUES_AT_ONCE, values.size)) for start in starts)
    largest = max((float(np.abs(part).max()) for part in parts), default=0.0)
    return torch.float16 if _HALF_NORMAL_MIN <= largest <= _HALF_MAX else torch.float32


def move(parameters: tuple[Parameter, ...], device: torch.device) -> list[Tensor]:
    """The values of parameters on a device; the copies may still be on their way, in its current stream."""

    def copy(host: Tensor) -> Tensor:
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    return [given.on(copy(given.raw)) if isinstance(given, Blocks) else copy(given) for given in parameters]


def tensor(array: NDArray[Any]) -> Tensor:
    """A tensor of its own memory: arrays of a package are read-only views that would keep the whole file."""
    return torch.from_numpy(array.copy())
