"""Formats that only look like `.apr` version 1, or are brought along with it, told by their first bytes."""

from __future__ import annotations

import enum
import struct
from typing import Final

FIRST_BYTES: Final = 16
"""What is looked at."""

_ROUTES: Final = b"APR\0\x01\0\0\0\0PST"
_TENSORS: Final = b"APR\0\x02"
_OTHER_APR: Final = b"APR\0"
_TENSORS_START: Final = struct.Struct("<4x2BHI")  # version, flags, number of tensors
_SAFETENSORS_HEADER_BYTES_MAX: Final = 100_000_000
_SAVE_AGAIN: Final = "save the model again in version 1 of the format (APRN)"

_NAMES: Final = (
    (b"APR1", f"a tensor container of a later release (APR1): {_SAVE_AGAIN}"),
    (b"APR2", f"an early version 2 tensor container (APR2): {_SAVE_AGAIN}"),
    (_ROUTES, "a route-planning model of a companion tool, which holds routes and no expert"),
    (_OTHER_APR, f"an APR\\0 file of an unknown version: {_SAVE_AGAIN}"),
    (b"APBUNDLE", "a bundle of several models (APBUNDLE): take out the one that you mean"),
    (b"GGUF", "a GGUF model of llama.cpp: base language models are folders of safetensors (`hocket base add`)"),
)


class _TensorsFlag(enum.IntFlag):
    """What a version 2 header says about the file."""

    LZ4 = 0x0001
    ZSTD = 0x0002
    ENCRYPTED = 0x0004
    SIGNED = 0x0008
    SHARDED = 0x0010
    QUANTIZED = 0x0020


def neighbour(start: bytes) -> str:
    """What a file is that is no `.apr` version 1, and what to do instead, to end a sentence with.

    Args:
        start: Its first `FIRST_BYTES`, or all it has.
    """
    if start.startswith(_TENSORS):
        return f"it is {_tensors(start.ljust(FIRST_BYTES, bytes(1)))}"
    for magic, name in _NAMES:
        if start.startswith(magic):
            return f"it is {name}"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _SAFETENSORS_HEADER_BYTES_MAX:
        return "it is a SafeTensors file, bare tensors: an adapter goes into an .expert package (`hocket expert pack`)"
    return f"it begins with {start[:4].hex() or 'nothing'}"


def _tensors(start: bytes) -> str:
    major, minor, flags, count = _TENSORS_START.unpack_from(start)
    told = "".join(f", {name.lower()}" for name, flag in _TensorsFlag.__members__.items() if flags & flag)
    return f"a version {major}.{minor} tensor container of {count} tensors{told}: {_SAVE_AGAIN}"
