"""Compressed bytes taken apart piece by piece, so that memory is taken for what has arrived, never for what is claimed.

`gunzip` and `unzstd` yield what one gzip member or one zstd frame holds, `inflate` what a raw deflate stream holds.
The compressed stream has to end where its bytes end. Every piece is metered: what comes out is held against what went
in so far, so that a bomb is refused while it is small, and against a maximum for all of it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zstandard

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hocket.packages.limits import Limits

PIECE_BYTES: Final = 2**16
"""About the most that goes into, or comes out of, one step."""

_BESIDE_BYTES: Final = 2**12
"""What a tar may have beside the content of a file, on average: a header of 512 bytes, as many to fill the last block,
and what an extended header needs for a long name and a few attributes."""
_SHOWN_CHARS: Final = 128

_GZIP: Final = 31  # zlib's number for: largest window, gzip header and checksum required
_RAW_DEFLATE: Final = -15

_BLOCK_BYTES_MAX: Final = 2**17  # RFC 8878, 3.1.1.2.4: what one block may hold
_BLOCKS_MAX: Final = 2**16  # each is a step of ours: so many full ones hold 8 GiB
_RLE: Final = 1
_COMPRESSED: Final = 2
_RESERVED: Final = 3


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive as its container states it; nothing of it is checked against any limit.

    Attributes:
        name: As stored, a folder's without its last slash.
        folder: Whether it is a folder, which has no content.
        size_bytes: Of the content.
        content: Yields exactly so many bytes. Use it up before asking the container for the next member.
    """

    name: str
    folder: bool
    size_bytes: int
    content: Iterator[bytes]


class Meter:
    """Holds what came out of an archive, content or not, against what was read of it and against a maximum.

    Args:
        limits: `archive_ratio` and `archive_ratio_free_bytes` are used; `archive_bytes`, `archive_files` and
            `archive_end_bytes` make the maximum.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._produced_bytes = 0
        self._most_bytes = limits.archive_bytes + limits.archive_files * _BESIDE_BYTES + limits.archive_end_bytes

    def count(self, piece: bytes, consumed_bytes: int) -> bytes:
        """The same piece, once it is counted.

        Args:
            piece: What came out.
            consumed_bytes: How much of the archive has been read by now.

        Raises:
            HocketError: `TOO_LARGE`.
        """
        self._produced_bytes += len(piece)
        if self._produced_bytes > self._most_bytes:
            raise HocketError(
                Reason.TOO_LARGE,
                f"the archive holds more than {self._most_bytes} bytes, the headers of its files included: "
                "leave out what the expert does not need, and pack without extended attributes",
            )
        limits = self._limits
        if self._produced_bytes > limits.archive_ratio_free_bytes + limits.archive_ratio * consumed_bytes:
            raise HocketError(
                Reason.TOO_LARGE,
                f"the first {consumed_bytes} bytes of the archive hold more than {limits.archive_ratio} times as much, "
                f"beyond {limits.archive_ratio_free_bytes} bytes: leave out what is only repetition",
            )
        return piece


class Pieces:
    """Reads exact numbers of bytes from pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._piece = b""
        self._position = 0

    def take(self, size_bytes: int) -> Iterator[bytes]:
        """The next so many bytes, in pieces.

        Raises:
            HocketError: `BAD_ARCHIVE` if there are fewer, and what the pieces themselves raise.
        """
        while size_bytes > 0:
            if self._position == len(self._piece):
                piece = next(self._pieces, None)
                if piece is None:
                    raise damaged("ends too soon")
                self._piece, self._position = piece, 0
            part = self._piece[self._position : self._position + size_bytes]
            self._position += len(part)
            size_bytes -= len(part)
            yield part

    def read(self, size_bytes: int) -> bytes:
        """The same in one; compare the size with a limit first."""
        return b"".join(self.take(size_bytes))

    def rest(self) -> Iterator[bytes]:
        """All that is left, in pieces."""
        yield self._piece[self._position :]
        yield from self._pieces


def gunzip(data: memoryview, meter: Meter) -> Iterator[bytes]:
    """What one gzip member holds; its checksum and length are verified when all of it has been read.

    Raises:
        HocketError: `BAD_ARCHIVE` if the data are not exactly one sound member, `TOO_LARGE`.
    """
    return _inflate(data, meter, 0, _GZIP)


def inflate(data: memoryview, meter: Meter, offset: int) -> Iterator[bytes]:
    """What one raw deflate stream holds.

    Args:
        data: The stream.
        meter: Counts what comes out.
        offset: Where in the archive the stream starts.

    Raises:
        HocketError: `BAD_ARCHIVE` if the data are not exactly one sound stream, `TOO_LARGE`.
    """
    return _inflate(data, meter, offset, _RAW_DEFLATE)


def _inflate(data: memoryview, meter: Meter, offset: int, window: int) -> Iterator[bytes]:
    stream = zlib.decompressobj(window)
    for start in range(0, len(data), PIECE_BYTES):
        waiting: memoryview | bytes = data[start : start + PIECE_BYTES]
        end = start + len(waiting)
        more = True
        while more:
            try:
                piece = stream.decompress(waiting, PIECE_BYTES)
            except zlib.error as error:
                raise damaged("is damaged in its compressed data") from error
            waiting = stream.unconsumed_tail
            if piece:
                yield meter.count(piece, offset + end - len(waiting))
            # a full piece may have left output inside, though no input waits
            more = not stream.eof and (len(waiting) > 0 or len(piece) == PIECE_BYTES)
        if stream.eof:
            if stream.unused_data or end < len(data):
                raise damaged("goes on after the end of its compressed data")
            return
    raise damaged("ends too soon")


def unzstd(data: memoryview, meter: Meter, limits: Limits) -> Iterator[bytes]:
    """What one zstd frame holds.

    The library's streams go on to the next frame and do not say where one ended, or have no bound on what one step
    yields (zstandard 0.25). The frame is therefore fed block by block: a block's header says where it ends, and none
    holds more than 128 KiB.

    Raises:
        HocketError: `BAD_ARCHIVE` if the data are not exactly one sound frame without a dictionary; `TOO_LARGE`, also
            for its window and for too many blocks.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
        header_bytes = zstandard.frame_header_size(data)
    except zstandard.ZstdError as error:
        raise damaged("is damaged in the header of its zstd frame") from error
    if frame.window_size > limits.zstd_window_bytes:
        raise HocketError(
            Reason.TOO_LARGE,
            f"the archive's zstd window is {frame.window_size} bytes, more than {limits.zstd_window_bytes}: "
            "compress it at level 19 or below",
        )
    stream = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes).decompressobj()
    start = 0
    for end in _block_ends(data, header_bytes, has_checksum=frame.has_checksum):
        try:
            piece = stream.decompress(data[start:end])
        except zstandard.ZstdError as error:
            raise damaged("is damaged in its compressed data") from error
        if piece:
            yield meter.count(piece, end)
        start = end
    if start < len(data) or not stream.eof:
        raise damaged("goes on after the end of its compressed data")


def _block_ends(data: memoryview, header_bytes: int, *, has_checksum: bool) -> Iterator[int]:
    """Where to pause in a frame, so that what lies between holds at most one full block. RFC 8878, 3.1.1."""
    position = header_bytes
    held_bytes = 0
    for _ in range(_BLOCKS_MAX):
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == _RESERVED or size > _BLOCK_BYTES_MAX:
            raise damaged("is damaged in a block of its zstd frame")
        held_bytes += _BLOCK_BYTES_MAX if kind == _COMPRESSED else size
        if held_bytes > _BLOCK_BYTES_MAX:
            yield position
            held_bytes = _BLOCK_BYTES_MAX if kind == _COMPRESSED else size
        position += 3 + (1 if kind == _RLE else size)
        end = position + (4 if last and has_checksum else 0)
        if end > len(data):
            raise damaged("ends too soon")
        if last:
            yield end
            return
    raise HocketError(Reason.TOO_LARGE, f"the archive's zstd frame has more than {_BLOCKS_MAX} blocks: pack it again")


def damaged(how: str) -> HocketError:
    """The refusal of an archive that is not well formed."""
    return HocketError(Reason.BAD_ARCHIVE, f"the archive {how}: fetch it again, or pack it anew")


def wrong_type(name: str) -> HocketError:
    """The refusal of a member that is neither a file nor a folder."""
    return HocketError(
        Reason.BAD_FILE_TYPE,
        f"{shown(name)} in the archive is neither a file nor a folder: pack what it stands for instead",
        file=shown(name),
    )


def shown(name: str | bytes) -> str:
    """A name nobody has checked, fit to be shown: ASCII, quoted, and no longer than a line or two."""
    return ascii(name[:_SHOWN_CHARS])
