"""The payload's compression: stored, one zstd frame, or one LZ4 block behind its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import lz4.block
import zstandard

from hocket.errors import HocketError, Reason
from hocket.packages.apr.header import Compression

if TYPE_CHECKING:
    from hocket.packages.limits import Limits

_LEVELS: Final = {Compression.ZSTD: 3, Compression.ZSTD_MAX: 19}
_ZSTD_RATIO_MAX: Final = 2**15  # a 4-byte block can stand for 128 KiB, no more
_LZ4_RATIO_MAX: Final = 255  # a byte of a match's length can stand for 255, no more
_LZ4_LENGTH_BYTES: Final = 4


def compress(image: bytes, compression: Compression) -> bytes:
    """Compress as the reference does.

    zstd is one streamed frame, without content size or checksum. LZ4, which later releases of the reference alone can
    read, is the length as u32 and one block.
    """
    if compression is Compression.NONE:
        return image
    if compression is Compression.LZ4:
        return len(image).to_bytes(_LZ4_LENGTH_BYTES, "little") + bytes(lz4.block.compress(image, store_size=False))
    stream = zstandard.ZstdCompressor(level=_LEVELS[compression], write_content_size=False).compressobj()
    return stream.compress(image) + stream.flush()


def decompress(block: memoryview, compression: Compression, size_bytes: int, limits: Limits) -> memoryview:
    """Undo `compress`, taking memory for no more than the block can hold.

    Args:
        block: The payload block as stored.
        compression: How it is stored.
        size_bytes: The uncompressed size that the header declares, within the limits.
        limits: Bounds the window of a frame.

    Raises:
        HocketError: `BAD_LENGTH` if the uncompressed size is not the declared one, `BAD_PAYLOAD` if the block is
            not exactly one sound zstd frame without a dictionary, or one sound LZ4 block behind its length;
            `TOO_LARGE` if the frame's window is.
    """
    if compression is Compression.NONE:
        if len(block) != size_bytes:
            raise _wrong_size(size_bytes)
        return block
    if compression is Compression.LZ4:
        return _decompress_lz4(block, size_bytes)
    if size_bytes > len(block) * _ZSTD_RATIO_MAX:
        raise _wrong_size(size_bytes)
    decompressor = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes)
    try:
        frame = zstandard.get_frame_parameters(block)
        if frame.window_size > limits.zstd_window_bytes:
            raise HocketError(
                Reason.TOO_LARGE,
                f"the payload's zstd window is {frame.window_size} bytes, more than {limits.zstd_window_bytes}",
            )
        # A recorded size overrides max_output_size, and bytes after the frame are reported only when the output
        # fills the buffer: both sizes are compared here.
        if frame.content_size not in (zstandard.CONTENTSIZE_UNKNOWN, size_bytes):
            raise _wrong_size(size_bytes)
        image = decompressor.decompress(block, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        if _holds_more(decompressor, block, size_bytes):
            raise _wrong_size(size_bytes) from error
        raise HocketError(Reason.BAD_PAYLOAD, "the payload is not exactly one sound zstd frame") from error
    if len(image) != size_bytes:
        raise _wrong_size(size_bytes)
    return memoryview(image)


def _decompress_lz4(block: memoryview, size_bytes: int) -> memoryview:
    """The length is stored twice, here and in the header: both have to be the block's own."""
    if len(block) < _LZ4_LENGTH_BYTES:
        raise HocketError(Reason.BAD_PAYLOAD, "the payload ends inside the length of its LZ4 block")
    told, packed = int.from_bytes(block[:_LZ4_LENGTH_BYTES], "little"), block[_LZ4_LENGTH_BYTES:]
    if told != size_bytes or size_bytes > len(packed) * _LZ4_RATIO_MAX:
        raise _wrong_size(size_bytes)
    try:
        image = lz4.block.decompress(packed, uncompressed_size=size_bytes)
    except lz4.block.LZ4BlockError as error:  # it does not tell a block that holds more from one that is not sound
        raise HocketError(
            Reason.BAD_PAYLOAD, f"the payload is not one sound LZ4 block of {size_bytes} bytes"
        ) from error
    if len(image) != size_bytes:
        raise _wrong_size(size_bytes)
    return memoryview(image)


def _holds_more(decompressor: zstandard.ZstdDecompressor, block: memoryview, size_bytes: int) -> bool:
    try:
        with decompressor.stream_reader(block) as reader:
            return len(reader.read(size_bytes + 1)) > size_bytes
    except zstandard.ZstdError:
        return False


def _wrong_size(size_bytes: int) -> HocketError:
    return HocketError(Reason.BAD_LENGTH, f"the payload does not hold the {size_bytes} bytes that the header declares")
