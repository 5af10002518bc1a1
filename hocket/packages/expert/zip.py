"""Zip archives, read strictly: stored or deflated files, told the same way at both ends.

    PK 03 04  30 bytes, name, extra    local header, then the content, then perhaps a data descriptor
    PK 01 02  46 bytes, name, extra    central directory, one entry per file in the same order
    PK 05 06  22 bytes                 end of the central directory, and of the file

A zip file has two indexes, and tools differ in which they believe. Here each central entry must point to where the
entry before it ended, and the local header there must say the same: the parts tile the file, nothing overlaps, nothing
comes before or after. Zip64, encryption, comments and Unicode names beside the name are refused.
"""

from __future__ import annotations

import stat
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages.expert.streams import PIECE_BYTES, Member, Meter, damaged, inflate, shown, wrong_type

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC: Final = b"PK\x03\x04"
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_CENTRAL_MAGIC: Final = b"PK\x01\x02"
_END: Final = struct.Struct("<4s4H2LH")
_END_MAGIC: Final = b"PK\x05\x06"
_SIZES: Final = struct.Struct("<3L")
_DESCRIPTOR_MAGIC: Final = b"PK\x07\x08"

_STORED: Final = 0
_DEFLATED: Final = 8

_ENCRYPTED: Final = 1 << 0
_SIZES_FOLLOW: Final = 1 << 3
_UTF8: Final = 1 << 11
_FLAGS: Final = 0b110 | _SIZES_FOLLOW | _UTF8  # two bits say how hard the deflater tried

_CHANGES_THE_ENTRY: Final = frozenset({0x0001, 0x0017, 0x7075, 0x9901})
"""Extra fields: zip64, strong encryption, a name beside the name, AES."""
_EXTRA_FIELDS_MAX: Final = 64  # of one header: each is a step of ours


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the central directory says of one file, and its local header has to repeat."""

    flags: int
    method: int
    time: int
    date: int
    crc: int
    stored_bytes: int
    size_bytes: int
    name: bytes
    mode: int
    offset: int
    end: int  # of this entry in the central directory


def members(data: memoryview, meter: Meter) -> Iterator[Member]:
    """Every file and folder of a zip archive, in order.

    Raises:
        HocketError: `BAD_ARCHIVE`, `ENCRYPTED`, `UNSUPPORTED_COMPRESSION`, `BAD_FILE_TYPE` (a link or a device),
            `BAD_FILE_NAME` for a name that is not marked as UTF-8 and not ASCII either, `TOO_LARGE`.
    """
    directory_end = len(data) - _END.size
    if directory_end < 0:
        raise damaged("ends too soon")
    magic, disk, first_disk, here, count, size, directory, comment = _END.unpack(data[directory_end:])
    if magic != _END_MAGIC or comment:
        raise damaged("does not end where its central directory ends, or has a comment")
    if (disk, first_disk, here) != (0, 0, count) or directory + size != directory_end:
        raise damaged("has no complete central directory, or is a zip64 file")
    position, place = 0, directory
    for _ in range(count):
        entry = _central(data[place:directory_end])
        place += entry.end
        if entry.offset != position:
            raise damaged("has bytes outside its files, or files that overlap")
        start = _local(data[position:directory], entry) + position
        end = start + entry.stored_bytes
        if end > directory:
            raise damaged("ends too soon")
        name = _name(entry)
        yield Member(name.removesuffix("/"), name.endswith("/"), entry.size_bytes, _content(data, start, entry, meter))
        position = end + _descriptor(data[end:directory], entry)
    if position != directory or place != directory_end:
        raise damaged("has bytes outside its files")


def _central(view: memoryview) -> _Entry:
    if len(view) < _CENTRAL.size:
        raise damaged("has no complete central directory")
    magic, _made, _needed, flags, method, time, date, crc, stored, size, *lengths, disk, _hints, attributes, offset = (
        _CENTRAL.unpack(view[: _CENTRAL.size])
    )
    name_bytes, extra_bytes, comment_bytes = lengths
    end = _CENTRAL.size + name_bytes + extra_bytes
    if magic != _CENTRAL_MAGIC or disk or comment_bytes or end > len(view):
        raise damaged("has a malformed central directory, or comments in it")
    if flags & _ENCRYPTED:
        raise HocketError(Reason.ENCRYPTED, "the archive is encrypted: pack it again without a password")
    if flags & ~_FLAGS:
        raise damaged(f"has a file with flags {flags:#06x}, which are not understood")
    if method not in (_STORED, _DEFLATED):
        raise HocketError(
            Reason.UNSUPPORTED_COMPRESSION,
            f"the archive has a file with zip method {method}: pack it again with deflate",
        )
    if method == _STORED and stored != size:
        raise damaged("states two sizes for one file")
    name = bytes(view[_CENTRAL.size : _CENTRAL.size + name_bytes])
    _check_extra(view[_CENTRAL.size + name_bytes : end])
    return _Entry(flags, method, time, date, crc, stored, size, name, attributes >> 16, offset, end)


def _local(view: memoryview, entry: _Entry) -> int:
    """How long the local header is, that says the same as the central directory."""
    if len(view) < _LOCAL.size:
        raise damaged("ends too soon")
    magic, _needed, flags, method, time, date, crc, stored, size, name_bytes, extra_bytes = _LOCAL.unpack(
        view[: _LOCAL.size]
    )
    end: int = _LOCAL.size + name_bytes + extra_bytes
    same = (flags, method, time, date) == (entry.flags, entry.method, entry.time, entry.date)
    for here, told in ((crc, entry.crc), (stored, entry.stored_bytes), (size, entry.size_bytes)):
        same = same and (here == told or (here == 0 and flags & _SIZES_FOLLOW != 0))
    if magic != _LOCAL_MAGIC or not same or view[_LOCAL.size : _LOCAL.size + name_bytes] != entry.name:
        raise damaged("says one thing of a file in its central directory and another in front of the file")
    if end > len(view):
        raise damaged("ends too soon")
    _check_extra(view[_LOCAL.size + name_bytes : end])
    return end


def _check_extra(extra: memoryview) -> None:
    """Extra fields tile their place, and none changes what the entry is."""
    position = 0
    for _ in range(_EXTRA_FIELDS_MAX):
        if position + 4 > len(extra):
            break
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind in _CHANGES_THE_ENTRY:
            raise damaged(f"has an extra field {kind:#06x} (zip64, encryption or a second name)")
        position += 4 + size
    if position != len(extra):
        raise damaged("has a malformed extra field, or too many")


def _name(entry: _Entry) -> str:
    try:
        name = entry.name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
    except UnicodeDecodeError as error:
        raise HocketError(
            Reason.BAD_FILE_NAME,
            f"the name {shown(entry.name)} in the archive is neither ASCII nor marked as UTF-8: rename the file",
        ) from error
    kind = stat.S_IFMT(entry.mode)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
        raise wrong_type(name)
    if name.endswith("/") and (entry.stored_bytes or entry.size_bytes):
        raise damaged("has a folder with content")
    return name


def _content(data: memoryview, start: int, entry: _Entry, meter: Meter) -> Iterator[bytes]:
    stored = data[start : start + entry.stored_bytes]
    pieces = inflate(stored, meter, start) if entry.method == _DEFLATED else _slices(stored)
    left, crc = entry.size_bytes, 0
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        crc = zlib.crc32(piece, crc)
        yield piece
    if left != 0 or crc != entry.crc:
        raise damaged("has a file that is not the one its headers describe")


def _slices(view: memoryview) -> Iterator[bytes]:
    for start in range(0, len(view), PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES])


def _descriptor(view: memoryview, entry: _Entry) -> int:
    """How long the data descriptor after a file is, that repeats the sizes; 0 if the file has none."""
    if not entry.flags & _SIZES_FOLLOW:
        return 0
    sizes = _SIZES.pack(entry.crc, entry.stored_bytes, entry.size_bytes)
    for descriptor in (_DESCRIPTOR_MAGIC + sizes, sizes):
        if view[: len(descriptor)] == descriptor:
            return len(descriptor)
    raise damaged("has a file whose sizes do not follow it as announced")
