"""Tar archives, read strictly: POSIX ustar, the long names of GNU tar, and PAX extended headers.

    offset  bytes  of a header block of 512
    0       100    name
    100     24     mode, owner and group, 8 each
    124     12     size
    136     12     time
    148     8      checksum: the sum of the block's bytes, these eight taken as spaces
    156     1      type: '0' or NUL file, '5' folder, 'L' long name, 'x' and 'g' extended headers
    257     8      "ustar", NUL, "00" (POSIX) or "ustar", two spaces, NUL (GNU)
    329     16     numbers of a device, 8 each
    345     155    prefix of the name (POSIX only)

A member's content follows its header, filled up with zeros to whole blocks; two blocks of zeros end the archive and
only zeros may follow, as many as fill a record. What two readers could read differently is refused: links, devices,
sparse files, a name or a size given twice, records that are not known to be harmless.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages.expert.streams import Member, Pieces, damaged, shown, wrong_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hocket.packages.limits import Limits

BLOCK_BYTES: Final = 512

_ZEROS: Final = bytes(BLOCK_BYTES)
_POSIX: Final = b"ustar\x0000"
_GNU: Final = b"ustar  \x00"
_SIZE: Final = slice(124, 136)
_CHECKSUM: Final = slice(148, 156)
_UNUSED_NUMBERS: Final = (*(slice(start, start + 8) for start in (100, 108, 116, 329, 337)), slice(136, 148))
"""Fields that say nothing to us, but where they are malformed, other readers take the archive to be at its end."""
_UNUSED: Final = re.compile(rb" *[0-7]*[ \0]*|[\x80\xff].*", re.DOTALL)
_OCTAL: Final = re.compile(rb" *([0-7]+)[ \0]*")

_FILES: Final = b"0\0"
_FOLDER: Final = ord("5")
_LONG_NAME: Final = ord("L")
_EXTENDED: Final = ord("x")
_GLOBAL: Final = ord("g")

_RECORD: Final = re.compile(rb"([1-9][0-9]{0,6}) ([^=\n]+)=")
_RECORDS_MAX: Final = 32  # of one extended header: each is a step of ours
_HARMLESS: Final = frozenset(
    {"atime", "charset", "comment", "ctime", "gid", "gname", "mtime", "path", "size", "uid", "uname"}
    | {"SCHILY.dev", "SCHILY.fflags", "SCHILY.ino", "SCHILY.nlink"}
)
_HARMLESS_PREFIXES: Final = ("LIBARCHIVE.", "RHT.security.", "SCHILY.acl.", "SCHILY.xattr.")


def members(stream: Iterable[bytes], limits: Limits) -> Iterator[Member]:
    """Every file and folder of a tar archive, in order.

    Args:
        stream: The archive, in pieces; read to its end.
        limits: `pax_bytes` bounds an extended header and a long name, `archive_end_bytes` the zeros after the end.

    Raises:
        HocketError: `BAD_ARCHIVE`, `BAD_FILE_TYPE` (a link, device, FIFO, sparse file or unknown type),
            `BAD_FILE_NAME` for a name that is not UTF-8, `TOO_LARGE`.
    """
    pieces = Pieces(stream)
    extended: _Extended | None = None  # what came before the next member, and belongs to it
    seen_global = False
    while (block := pieces.read(BLOCK_BYTES)) != _ZEROS:
        _check(block)
        kind = block[156]
        if kind in (_LONG_NAME, _EXTENDED, _GLOBAL):
            if extended is not None or (kind == _GLOBAL and seen_global):
                raise damaged("has two extended headers for one member")
            content = _extension(pieces, block, limits)
            if kind == _GLOBAL:
                seen_global = True
                _check_global(content)
            else:
                extended = _Extended(name=_text(content.removesuffix(b"\0"))) if kind == _LONG_NAME else _own(content)
            continue
        member = _member(pieces, block, extended or _Extended())
        yield member
        _check_filling(pieces, member.size_bytes)
        extended = None
    if extended is not None:
        raise damaged("has an extended header for no member")
    if pieces.read(BLOCK_BYTES) != _ZEROS:
        raise damaged("goes on after its end")
    _check_end(pieces, limits)


@dataclass(frozen=True, slots=True)
class _Extended:
    """What an extended header says of the next member, where it says anything."""

    name: str | None = None
    size_bytes: int | None = None


def _check_end(pieces: Pieces, limits: Limits) -> None:
    """Only zeros fill the last record, and no more than a record has."""
    left_bytes = limits.archive_end_bytes
    for rest in pieces.rest():
        if rest != bytes(len(rest)):
            raise damaged("goes on after its end")
        left_bytes -= len(rest)
        if left_bytes < 0:
            raise HocketError(
                Reason.TOO_LARGE,
                f"the archive has more than {limits.archive_end_bytes} bytes of zeros after its end: pack it again",
            )


def _extension(pieces: Pieces, block: bytes, limits: Limits) -> bytes:
    """The content of an extended header or a long name."""
    size_bytes = _number(block[_SIZE])
    if size_bytes > limits.pax_bytes:
        raise HocketError(
            Reason.TOO_LARGE,
            f"an extended header of the archive has {size_bytes} bytes, more than {limits.pax_bytes}: "
            "pack without extended attributes",
        )
    content = pieces.read(size_bytes)
    _check_filling(pieces, size_bytes)
    return content


def _own(content: bytes) -> _Extended:
    records = _records(content)
    return _Extended(
        name=_text(records["path"]) if "path" in records else None,
        size_bytes=_decimal(records["size"]) if "size" in records else None,
    )


def _check_global(content: bytes) -> None:
    if _records(content).keys() - {"comment"}:
        raise damaged("has a global extended header that is more than a comment, which would change every file")


def _member(pieces: Pieces, block: bytes, extended: _Extended) -> Member:
    kind, size_bytes = block[156], _number(block[_SIZE])
    name = _header_name(block) if extended.name is None else extended.name
    folder = kind == _FOLDER
    if not folder and kind not in _FILES:
        raise wrong_type(name)
    if extended.size_bytes not in (None, size_bytes):
        raise damaged("states two sizes for one file")
    if folder and size_bytes:
        raise damaged("has a folder with content")
    return Member(name.removesuffix("/") if folder else name, folder, size_bytes, pieces.take(size_bytes))


def _check(block: bytes) -> None:
    if block[257:265] not in (_POSIX, _GNU):
        raise damaged("has a member without a ustar header")
    if _number(block[_CHECKSUM]) != sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "):
        raise damaged("has a header whose checksum is wrong")
    if not all(_UNUSED.fullmatch(block[place]) for place in _UNUSED_NUMBERS):
        raise damaged("has a header with a malformed number")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 after a byte of 0x80; never negative."""
    if field[0] == 0x80:  # noqa: PLR2004 - GNU tar's mark, for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise damaged("has a header with a malformed number")
    return int(match[1], 8)


def _header_name(block: bytes) -> str:
    name = _terminated(block[:100])
    prefix = _terminated(block[345:500]) if block[257:265] == _POSIX else b""
    return _text(prefix + b"/" + name if prefix else name)


def _terminated(field: bytes) -> bytes:
    """What stands before the zeros that fill a field."""
    text = field.rstrip(b"\0")
    if b"\0" in text:
        raise damaged("has a header with bytes after a name's end")
    return text


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise HocketError(
            Reason.BAD_FILE_NAME, f"the name {shown(name)} in the archive is not UTF-8: rename the file"
        ) from error


def _records(content: bytes) -> dict[str, bytes]:
    """The records of an extended header, each `length keyword=value` and a line feed (POSIX, `pax`)."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(content):
        match = _RECORD.match(content, position)
        if match is None:
            raise damaged("has a malformed extended header")
        end = position + int(match[1])
        if not match.end() < end <= len(content) or content[end - 1] != ord("\n"):
            raise damaged("has a malformed extended header")
        keyword = ascii(match[2])[2:-1]
        if keyword not in _HARMLESS and not keyword.startswith(_HARMLESS_PREFIXES):
            raise _harmful(keyword)
        if keyword in records or len(records) == _RECORDS_MAX:
            raise damaged(f"has an extended header with a record twice, or with more than {_RECORDS_MAX}")
        records[keyword] = content[match.end() : end - 1]
        position = end
    return records


def _harmful(keyword: str) -> HocketError:
    if keyword == "linkpath" or keyword.startswith("GNU.sparse."):
        return HocketError(Reason.BAD_FILE_TYPE, "the archive has a link or a sparse file: pack plain files")
    return damaged(f"has an extended header with {shown(keyword)}, which could change what a file is")


def _decimal(digits: bytes) -> int:
    if not 0 < len(digits) <= 20 or not digits.isdigit():  # noqa: PLR2004 - digits of the largest 64-bit number
        raise damaged("has a malformed extended header")
    return int(digits)


def _check_filling(pieces: Pieces, size_bytes: int) -> None:
    filling = pieces.read(-size_bytes % BLOCK_BYTES)
    if filling != _ZEROS[: len(filling)]:
        raise damaged("has bytes between two members")
