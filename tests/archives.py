"""Archives of `.expert` packages: honest ones by other people's writers, hostile ones put together byte by byte."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import zstandard

from hocket.errors import HocketError, Reason

FILES: Final[Mapping[str, bytes]] = {
    "manifest.json": b'{"name": "n"}',
    "adapter_model.safetensors": bytes(range(256)) * 5,
    "adapter_config.json": b"{}",
    "tests/test_cases.json": b"[]",
    "LICENSE": b"",
}

FILE: Final = b"0"
FOLDER: Final = b"5"
LONG_NAME: Final = b"L"
PAX: Final = b"x"
PAX_GLOBAL: Final = b"g"
POSIX: Final = b"ustar\x0000"
GNU: Final = b"ustar  \x00"

END: Final = bytes(1024)

STORED: Final = zipfile.ZIP_STORED

REFUSAL_SECONDS_MAX: Final = 0.25
REFUSAL_BYTES_MAX: Final = 64 * 2**20


# Honest archives.


def tar_bytes(files: Mapping[str, bytes] = FILES, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar by Python's writer: `tarfile.USTAR_FORMAT`, `GNU_FORMAT` or `PAX_FORMAT`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def gzipped(data: bytes, level: int = 6) -> bytes:
    """One gzip member."""
    return gzip.compress(data, level, mtime=0)


def zstd(data: bytes, *, told: bool = False, level: int = 3) -> bytes:
    """One zstd frame, which tells its size and checksum or not."""
    return zstandard.ZstdCompressor(level=level, write_content_size=told, write_checksum=told).compress(data)


def zip_bytes(files: Mapping[str, bytes] = FILES, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip by Python's writer."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def expert_bytes(files: Mapping[str, bytes] = FILES) -> bytes:
    """A package as upstream packs it."""
    return gzipped(tar_bytes(files))


# Tar, byte by byte.


def header(name: bytes, size: int = 0, kind: bytes = FILE, /, *, magic: bytes = POSIX, **fields: bytes) -> bytes:
    """One header block; `fields` replace others, a checksum among them."""
    values = {
        "name": name[:100],
        "mode": b"0000644\0",
        "uid": b"0000000\0",
        "gid": b"0000000\0",
        "size": b"%011o\0" % size,
        "mtime": b"00000000000\0",
        "chksum": b" " * 8,
        "kind": kind,
        "linkname": b"",
        "magic": magic,
        "uname": b"",
        "gname": b"",
        "devmajor": b"",
        "devminor": b"",
        "prefix": b"",
    } | fields
    layout = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
    block = layout.pack(*values.values())
    return block if "chksum" in fields else checked(block)


def checked(block: bytes) -> bytes:
    """A header block with the right checksum."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % total + block[156:]


def member(name: bytes, content: bytes = b"", kind: bytes = FILE, /, **fields: bytes) -> bytes:
    """A header, the content, and what fills its last block."""
    return header(name, len(content), kind, **fields) + content + bytes(-len(content) % 512)


def record(keyword: bytes, value: bytes) -> bytes:
    """One record of an extended header."""
    text = b" " + keyword + b"=" + value + b"\n"
    size = len(text)
    while size != len(text) + len(b"%d" % size):
        size = len(text) + len(b"%d" % size)
    return b"%d" % size + text


def pax(kind: bytes = PAX, **records: bytes) -> bytes:
    """An extended header."""
    return pax_of(b"".join(record(keyword.encode(), value) for keyword, value in records.items()), kind)


def pax_of(content: bytes, kind: bytes = PAX) -> bytes:
    """An extended header with this content."""
    return member(b"././@PaxHeader", content, kind)


def tar_of(*members: bytes, end: bytes = END) -> bytes:
    """A gzip-tar of these members."""
    return gzipped(b"".join(members) + end)


# Zip, byte by byte.


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One file of a zip; `local` and `central` replace fields of its two headers."""

    name: bytes
    content: bytes = b"content"
    method: int = 8
    flags: int = 0
    mode: int = 0o100644
    extra: bytes = b""
    descriptor: bytes = b""
    stored: bytes | None = None
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)


def deflated(content: bytes) -> bytes:
    """A raw deflate stream."""
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(content) + stream.flush()


def zip_of(*entries: ZipEntry, before: bytes = b"", between: bytes = b"", **end: Any) -> bytes:
    """A zip of these entries, `before` in front of them and `between` in front of the central directory."""
    body, directory = bytearray(before), bytearray()
    for entry in entries:
        stored = entry.stored
        if stored is None:
            stored = deflated(entry.content) if entry.method == 8 else entry.content
        fields = {
            "needed": 20,
            "flags": entry.flags,
            "method": entry.method,
            "time": 0,
            "date": 33,
            "crc": zlib.crc32(entry.content),
            "stored": len(stored),
            "size": len(entry.content),
            "name": len(entry.name),
            "extra": len(entry.extra),
        }
        offset = len(body)
        body += b"PK\x03\x04" + struct.pack("<5H3L2H", *(fields | dict(entry.local)).values())
        body += entry.name + entry.extra + stored + entry.descriptor
        central = (
            {"made": 3 << 8 | 20}
            | fields
            | {"comment": 0, "disk": 0, "hints": 0, "mode": entry.mode << 16, "offset": offset}
            | dict(entry.central)
        )
        directory += b"PK\x01\x02" + struct.pack("<6H3L5H2L", *central.values()) + entry.name + entry.extra
    body += between
    count = len(entries)
    last = {
        "disk": 0,
        "first": 0,
        "here": count,
        "all": count,
        "size": len(directory),
        "offset": len(body),
        "comment": 0,
    }
    return bytes(body + directory) + b"PK\x05\x06" + struct.pack("<4H2LH", *(last | end).values())


# Hostile archives, each beside one that is accepted.


@dataclass(frozen=True, slots=True)
class Attack:
    """How to make an archive that is refused, and its twin one change away that is read."""

    name: str
    refused: Callable[[], bytes]
    reason: Reason
    accepted: Callable[[], bytes]


def attacks() -> Iterator[Attack]:
    """All of them; those that take long to make are not made yet."""
    for group in (
        _containers,
        _names,
        _kinds,
        _duplicates,
        _headers,
        _extensions,
        _zips,
        _zip_files,
        _polyglots,
    ):
        for name, refused, reason, accepted in group():
            yield Attack(name, partial(bytes, refused), reason, partial(bytes, accepted))
    yield from _bombs()


_Rows = Iterator[tuple[str, bytes, Reason, bytes]]

_A: Final = member(b"a", b"content")
_HONEST: Final = tar_of(_A)


def _containers() -> _Rows:
    plain = _A + END
    bad = Reason.BAD_ARCHIVE
    yield "gzip cut short", _HONEST[:-1], bad, _HONEST
    yield "gzip with a byte after it", _HONEST + b"\0", bad, _HONEST
    yield "two gzip members", gzipped(_A) + gzipped(END), bad, _HONEST
    yield "gzip checksum", _HONEST[:-8] + bytes([_HONEST[-8] ^ 1]) + _HONEST[-7:], bad, _HONEST
    yield "gzip length", _HONEST[:-1] + b"\1", bad, _HONEST
    yield "gzip of nothing", gzipped(b""), bad, gzipped(END)
    frame = zstd(plain)
    yield "zstd cut short", frame[:-1], bad, frame
    yield "zstd with a byte after it", frame + b"\0", bad, frame
    yield "two zstd frames", zstd(_A) + zstd(END), bad, frame
    yield "zstd skippable frame", frame + b"\x50\x2a\x4d\x18\0\0\0\0", bad, frame
    told = zstd(plain, told=True)
    yield "zstd checksum", told[:-1] + bytes([told[-1] ^ 1]), bad, told
    yield "zstd cut before its checksum", told[:-4], bad, told
    yield "zstd header cut short", frame[:5], bad, frame
    raw = _in_blocks(plain, 512)
    yield "zstd block of a reserved kind", raw[:6] + bytes([raw[6] | 6]) + raw[7:], bad, raw
    yield "zstd frame of no last block", raw[:-3], bad, raw
    dictionary = zstandard.ZstdCompressionDict(bytes(range(256)) * 8, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    with_dictionary = zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(range(256)) * 4 + plain)
    yield "zstd dictionary", with_dictionary, bad, zstd(plain)
    yield "zstd window", _frame_with_window(14, plain), Reason.TOO_LARGE, _frame_with_window(13, plain)
    yield "binary format", b"HLLMEXP\0" + bytes(124), Reason.UNSUPPORTED_VERSION, _HONEST
    yield "uncompressed tar", plain, Reason.BAD_MAGIC, _HONEST
    yield "nothing", b"", Reason.BAD_MAGIC, _HONEST


def _frame_with_window(exponent: int, content: bytes) -> bytes:
    """A zstd frame that asks for a window of 2**(10 + exponent) bytes; its content is one raw block."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([exponent << 3]) + (len(content) << 3 | 1).to_bytes(3, "little") + content


def _names() -> _Rows:
    for what, name, twin in (
        ("absolute", "/etc/passwd", "etc/passwd"),
        ("upwards", "../x", "x"),
        ("upwards inside", "a/../b", "a/b"),
        ("upwards at the end", "a/..", "a/..b"),
        ("empty part", "a//b", "a/b"),
        ("dot inside", "a/./b", "a/.b"),
        ("two leading dots", "././a", "./a"),
        ("a dot", ".", ".a"),
        ("nothing", "", "a"),
        ("backslash", "a\\b", "a-b"),
        ("drive", "C:a", "C-a"),
        ("stream", "a:b", "a.b"),
        ("dot at the end", "manifest.json.", "manifest.json"),
        ("space at the end", "manifest.json ", "manifest.json"),
        ("dot at a folder's end", "a./b", ".a/b"),
        ("space at a folder's end", "a /b", " a/b"),
        *((f"a character {character}", f"a{character}", "a_") for character in '<>"|?*'),
        ("line feed", "a\nb", "a b"),
        ("escape", "a\x1b[2Jb", "a[2Jb"),
        ("delete", "a\x7f", "a~"),
        ("right to left", "a\u202etxt.exe", "atxt.exe"),
        ("zero width", "mani\u200bfest.json", "manifest.json"),
        ("decomposed", "cafe\u0301", "caf\u00e9"),
        ("too deep", "/".join("abcdefghi"), "/".join("abcdefgh")),
        ("slash after a file", "a/", "a"),
    ):
        for kind in ("tar", "zip"):
            if kind == "zip" and what == "slash after a file":
                continue  # that is how a zip marks a folder
            make = _tar_named if kind == "tar" else _zip_named
            yield f"{kind} name: {what}", make(name.encode()), Reason.BAD_FILE_NAME, make(twin.encode())
    yield "name: too long", tar_of(pax(path=b"n" * 256), _A), Reason.BAD_FILE_NAME, tar_of(pax(path=b"n" * 255), _A)
    for name, make in (("tar name: not UTF-8", _tar_named), ("zip name: not UTF-8", _zip_named)):
        yield name, make(b"caf\xe9"), Reason.BAD_FILE_NAME, make("café".encode())
    yield (
        "zip name: neither ASCII nor marked",
        zip_of(ZipEntry("café".encode())),
        Reason.BAD_FILE_NAME,
        _zip_named("café".encode()),
    )
    folder = member(b"../f/", b"", FOLDER)
    yield "a folder's name", tar_of(folder, _A), Reason.BAD_FILE_NAME, tar_of(member(b"./f/", b"", FOLDER), _A)


def _tar_named(name: bytes) -> bytes:
    return tar_of(member(name, b"content"))


def _zip_named(name: bytes) -> bytes:
    return zip_of(ZipEntry(name, flags=1 << 11))


def _kinds() -> _Rows:
    bad = Reason.BAD_FILE_TYPE
    kinds = {
        "hard link": b"1",
        "symbolic link": b"2",
        "character device": b"3",
        "block device": b"4",
        "FIFO": b"6",
        "contiguous file": b"7",
        "sparse file": b"S",
        "GNU volume": b"V",
        "multi-volume": b"M",
        "GNU folder": b"D",
        "long link name": b"K",
        "Solaris header": b"X",
        "an unknown type": b"Z",
    }
    for name, kind in kinds.items():
        yield name, tar_of(member(b"a", b"", kind, linkname=b"b")), bad, tar_of(member(b"a", b"", FILE, linkname=b"b"))
    yield (
        "PAX sparse file",
        tar_of(pax(**{"GNU.sparse.major": b"1", "GNU.sparse.realsize": b"1000000000000"}), _A),
        bad,
        tar_of(pax(comment=b"1"), _A),
    )
    yield "PAX link", tar_of(pax(linkpath=b"b"), _A), bad, tar_of(pax(path=b"b"), _A)
    for name, mode in (("link", 0o120777), ("device", 0o020644), ("FIFO", 0o010644), ("file for a folder", 0o040755)):
        yield f"zip {name}", zip_of(ZipEntry(b"a", mode=mode)), bad, zip_of(ZipEntry(b"a", mode=0o100644))
    folder = ZipEntry(b"f/", b"", method=0, mode=0o040755)
    wrong = ZipEntry(b"f/", b"", method=0, mode=0o100644)
    yield "zip folder that is a file", zip_of(wrong), bad, zip_of(folder)


def _duplicates() -> _Rows:
    bad = Reason.DUPLICATE_FILE
    other = member(b"a", b"Content")
    yield "two contents", tar_of(_A, other), bad, tar_of(_A, _A)
    yield "two sizes", tar_of(_A, member(b"a", b"conten")), bad, tar_of(_A, _A)
    yield "two contents, named two ways", tar_of(_A, pax(path=b"./a"), other), bad, tar_of(_A, pax(path=b"./a"), _A)
    yield "case", tar_of(_A, member(b"A", b"content")), bad, tar_of(_A, member(b"B", b"content"))
    sharp, double = member("straße".encode(), b"1"), member(b"STRASSE", b"1")
    yield "case that changes the length", tar_of(sharp, double), bad, tar_of(sharp, sharp)
    yield "a folder's case", tar_of(member(b"F/a"), member(b"f/b")), bad, tar_of(member(b"f/a"), member(b"f/b"))
    yield "file and folder", tar_of(_A, member(b"a/b")), bad, tar_of(_A, member(b"b/a"))
    yield "folder and file", tar_of(member(b"a", b"", FOLDER), _A), bad, tar_of(member(b"b", b"", FOLDER), _A)
    one, two = ZipEntry(b"a"), ZipEntry(b"a", b"other")
    yield "zip: two contents", zip_of(one, two), bad, zip_of(one, one)
    yield "zip: case", zip_of(one, ZipEntry(b"A")), bad, zip_of(one, ZipEntry(b"B"))


def _headers() -> _Rows:
    bad = Reason.BAD_ARCHIVE
    yield "tar checksum", tar_of(member(b"a", chksum=b"000001\0 ")), bad, tar_of(member(b"a"))
    signed = header("é".encode())
    total = b"%06o\0 " % (sum(signed[:148]) + sum(signed[156:]) + 256 - 2 * 256)
    yield "checksum of signed bytes", tar_of(header("é".encode(), chksum=total)), bad, tar_of(signed)
    yield "no end", tar_of(_A, end=b""), bad, _HONEST
    yield "half an end", tar_of(_A, end=bytes(512)), bad, _HONEST
    yield "one block of zeros between", tar_of(_A, bytes(512), _A), bad, tar_of(_A, _A)
    yield "a member after the end", tar_of(_A, END, _A), bad, tar_of(_A, END, bytes(len(_A)))
    yield "a byte after the end", tar_of(_A, END, b"\1", end=b""), bad, tar_of(_A, END, b"\0", end=b"")
    yield (
        "content cut short",
        tar_of(header(b"a", 513), bytes(512), end=b""),
        bad,
        tar_of(header(b"a", 512), bytes(512)),
    )
    filled = header(b"a", 1) + b"1" + bytes(510)
    yield "bytes that fill a block", tar_of(filled, b"\1"), bad, tar_of(filled, b"\0")
    yield "a folder with content", tar_of(member(b"f", b"1", FOLDER)), bad, tar_of(member(b"f", b"", FOLDER))
    yield "tar without ustar", tar_of(member(b"a", magic=b"")), bad, tar_of(member(b"a", magic=GNU))
    yield "another version of ustar", tar_of(member(b"a", magic=b"ustar\x0001")), bad, tar_of(member(b"a", magic=POSIX))
    yield "bytes after a name's end", tar_of(member(b"a\0b")), bad, tar_of(member(b"a"))
    for name, size in (
        ("negative", b"\xff" * 12),
        ("negative octal", b"-0000000000\0"),
        ("octal with an 8", b"00000000008\0"),
        ("octal with a prefix", b"0o000000000\0"),
        ("octal with two numbers", b"0000 000000\0"),
        ("no octal", b"\0" * 12),
        ("an unknown base", b"\x81" + bytes(11)),
    ):
        yield f"size: {name}", tar_of(member(b"a", size=size)), bad, tar_of(member(b"a", size=b"\x80" + bytes(11)))
    blank = {"mode": b"", "uid": b" " * 8, "mtime": b"\xff" * 12, "devmajor": b"0\0"}  # mtime before 1970, as GNU
    for number in ("mode", "uid", "gid", "mtime", "devmajor", "devminor"):
        wrong = {number: b"0000008\0"}
        yield f"{number} with an 8", tar_of(member(b"a", **wrong)), bad, tar_of(member(b"a", **blank))
    huge = b"\x80" + b"\xff" * 11
    yield "size: claimed only", tar_of(member(b"a", size=huge)), Reason.TOO_LARGE, tar_of(member(b"a"))
    claim = header(b"a.safetensors", 2**30)
    yield "a gigabyte claimed", tar_of(claim), bad, tar_of(header(b"a.safetensors", 512), bytes(512))


def _extensions() -> _Rows:
    bad = Reason.BAD_ARCHIVE
    named = pax(path=b"b")
    yield "two extended headers", tar_of(named, named, _A), bad, tar_of(named, _A)
    long = member(b"././@LongLink", b"b\0", LONG_NAME, magic=GNU)
    yield "long name and extended header", tar_of(long, named, _A), bad, tar_of(long, _A)
    yield "extended header for nothing", tar_of(_A, named), bad, tar_of(named, _A)
    yield "extended header before the end", tar_of(named), bad, tar_of(named, _A)
    yield "PAX size overrides", tar_of(pax(size=b"1024"), _A), bad, tar_of(pax(size=b"7"), _A)
    yield "PAX size of no digits", tar_of(pax(size=b"0x7"), _A), bad, tar_of(pax(size=b"07"), _A)
    yield "PAX size without end", tar_of(pax(size=b"7" * 5000), _A), bad, tar_of(pax(size=b"7"), _A)
    yield "PAX path outside", tar_of(pax(path=b"../b"), _A), Reason.BAD_FILE_NAME, tar_of(named, _A)
    yield "PAX path of nothing", tar_of(pax(path=b""), _A), Reason.BAD_FILE_NAME, tar_of(named, _A)
    outside = tar_of(pax(path=b"b"), member(b"../a", b"content"))
    yield "long name outside", tar_of(member(b"L", b"../b\0", LONG_NAME), _A), Reason.BAD_FILE_NAME, outside
    yield (
        "long name with two ends",
        tar_of(member(b"L", b"b\0c\0", LONG_NAME), _A),
        Reason.BAD_FILE_NAME,
        tar_of(long, _A),
    )
    yield "PAX charset", tar_of(pax(hdrcharset=b"BINARY"), _A), bad, tar_of(pax(charset=b"BINARY"), _A)
    yield (
        "PAX keyword nobody knows",
        tar_of(pax(**{"ACME.path": b"b"}), _A),
        bad,
        tar_of(pax(**{"SCHILY.ino": b"1"}), _A),
    )
    yield (
        "PAX keyword twice",
        tar_of(pax_of(record(b"path", b"b") * 2), _A),
        bad,
        tar_of(pax_of(record(b"path", b"b")), _A),
    )
    right = tar_of(pax_of(b"10 path=b\n"), _A)
    for name, content in (
        ("short", b"9 path=b\n\n"),
        ("long", b"11 path=b\n"),
        ("zero", b"0 path=b\n"),
        ("leading zero", b"010 path=b\n"),
        ("signed", b"+10 path=b\n"),
        ("without end", b"99999999999999999999 path=b\n"),
        ("of a record without value", b"8 path\n"),
        ("of a record without line feed", b"10 path=bc"),
        ("of a record without keyword", b"6 =b\n"),
        ("of nothing", b"\0" * 10),
    ):
        yield f"PAX length {name}", tar_of(pax_of(content), _A), bad, right
    many = [record(b"SCHILY.xattr.%d" % number, b"") for number in range(33)]
    yield "too many PAX records", tar_of(pax_of(b"".join(many)), _A), bad, tar_of(pax_of(b"".join(many[:-1])), _A)
    full = 2**16 - len(record(b"comment", b"c" * 65000)) + 65000
    yield "PAX bomb", tar_of(pax(comment=b"c" * (full + 1)), _A), Reason.TOO_LARGE, tar_of(pax(comment=b"c" * full), _A)
    comment = pax(PAX_GLOBAL, comment=b"0" * 40)
    yield "global PAX path", tar_of(pax(PAX_GLOBAL, path=b"b"), _A), bad, tar_of(comment, _A)
    yield "two global headers", tar_of(comment, comment, _A), bad, tar_of(comment, named, _A)
    yield "global header between", tar_of(named, comment, _A), bad, tar_of(comment, named, _A)


def _zips() -> _Rows:
    bad = Reason.BAD_ARCHIVE
    a, b = ZipEntry(b"a"), ZipEntry(b"b", b"other")
    right = zip_of(a)
    yield "zip cut short", right[:-1], bad, right
    yield "zip of a magic", right[:4], bad, right
    yield "zip of no end", right[:-22], bad, right
    yield "zip comment", zip_of(a, comment=1) + b"c", bad, right
    yield "zip comment claimed", zip_of(a, comment=1), bad, right
    yield "zip with bytes after it", right + b"\0", bad, right
    yield "zip with bytes before its directory", zip_of(a, between=b"\0"), bad, right
    yield "zip with another count", zip_of(a, b, here=1, all=1), bad, zip_of(a, b)
    yield "zip with two counts", zip_of(a, b, here=1), bad, zip_of(a, b)
    yield "zip with too high a count", zip_of(a, here=2, all=2), bad, right
    yield "zip on two disks", zip_of(a, disk=1), bad, right
    yield "zip directory elsewhere", zip_of(a, offset=0), bad, right
    yield "zip64 marks", zip_of(a, here=0xFFFF, all=0xFFFF, size=0xFFFFFFFF, offset=0xFFFFFFFF), bad, right
    yield "zip with its last file on another disk", zip_of(ZipEntry(b"a", central={"disk": 1})), bad, right
    yield "zip with a file's comment", zip_of(ZipEntry(b"a", central={"comment": 1})), bad, right
    yield "zip with a long name claimed", zip_of(ZipEntry(b"a", central={"name": 60000})), bad, right
    yield "zip with a long local name claimed", zip_of(ZipEntry(b"a", local={"name": 60000})), bad, right
    yield "zip with long local extra fields claimed", zip_of(ZipEntry(b"a", local={"extra": 60000})), bad, right


def _zip_files() -> _Rows:
    bad = Reason.BAD_ARCHIVE
    a, b = ZipEntry(b"a"), ZipEntry(b"b", b"other")
    right = zip_of(a)
    for what, value in (
        ("flags", 1 << 11),
        ("method", 0),
        ("time", 1),
        ("date", 34),
        ("crc", 1),
        ("stored", 1),
        ("size", 1),
    ):
        yield f"zip headers disagree: {what}", zip_of(ZipEntry(b"a", local={what: value})), bad, right
    renamed = right[:30] + b"b" + right[31:]
    yield "zip headers disagree: name", renamed, bad, right
    both = {"crc": 1}
    yield "zip checksum", zip_of(ZipEntry(b"a", local=both, central=both)), bad, right
    for size in (6, 8):
        both = {"size": size}
        yield f"zip content of another size, {size}", zip_of(ZipEntry(b"a", local=both, central=both)), bad, right
    stored = ZipEntry(b"a", method=0)
    both = {"size": 6}
    yield "zip stored in two sizes", zip_of(ZipEntry(b"a", method=0, local=both, central=both)), bad, zip_of(stored)
    yield "zip claims a gigabyte", zip_of(_claiming(2**30)), bad, right
    yield "zip deflate damaged", zip_of(ZipEntry(b"a", stored=b"\xff" * 9)), bad, right
    yield "zip deflate cut short", zip_of(ZipEntry(b"a", stored=deflated(b"content")[:-1])), bad, right
    yield "zip deflate and more", zip_of(ZipEntry(b"a", stored=deflated(b"content") + b"\0")), bad, right
    yield "zip deflate of nothing", zip_of(ZipEntry(b"a", stored=b"")), bad, right
    yield "zip files overlap", zip_of(a, ZipEntry(b"b", b"other", central={"offset": 0})), bad, zip_of(a, b)
    yield "zip files out of order", _swapped(a, b), bad, zip_of(a, b)
    yield "zip file that is not there", _ghost(a, b), bad, zip_of(a, b)
    yield "zip hidden file", zip_of(a, before=zip_of(b)[:-80]), bad, right
    long = {"stored": 2**31}
    yield "zip file beyond the end", zip_of(ZipEntry(b"a", local=long, central=long)), bad, right
    yield "zip folder with content", zip_of(ZipEntry(b"f/", mode=0)), bad, zip_of(ZipEntry(b"f/", b"", 0, mode=0))
    empty = ZipEntry(b"f/", b"", mode=0)
    yield "zip folder with a stream", zip_of(empty), bad, zip_of(ZipEntry(b"f/", b"", 0, mode=0))
    yield "zip encrypted", zip_of(ZipEntry(b"a", flags=1)), Reason.ENCRYPTED, right
    for bit in (4, 5, 6, 13):
        yield f"zip flag {bit}", zip_of(ZipEntry(b"a", flags=1 << bit)), bad, zip_of(ZipEntry(b"a", flags=1 << 1))
    for method in (1, 9, 12, 14, 93):
        yield f"zip method {method}", zip_of(ZipEntry(b"a", method=method)), Reason.UNSUPPORTED_COMPRESSION, right
    timestamp = struct.pack("<2HBL", 0x5455, 5, 1, 0)
    with_extra = zip_of(ZipEntry(b"a", extra=timestamp))
    for name, kind in (("zip64", 0x0001), ("encryption", 0x0017), ("Unicode name", 0x7075), ("AES", 0x9901)):
        extra = struct.pack("<2HBL", kind, 5, 1, 0)
        yield f"zip extra field: {name}", zip_of(ZipEntry(b"a", extra=extra)), bad, with_extra
    yield "zip extra field cut short", zip_of(ZipEntry(b"a", extra=timestamp[:-1])), bad, with_extra
    yield "zip extra field of three bytes", zip_of(ZipEntry(b"a", extra=bytes(3))), bad, with_extra
    fields = struct.pack("<2H", 0x5455, 0)
    many, enough = (zip_of(ZipEntry(b"a", extra=fields * count)) for count in (65, 64))
    yield "zip with too many extra fields", many, bad, enough
    sizes = struct.pack("<3L", zlib.crc32(b"content"), len(deflated(b"content")), 7)
    follows = zip_of(_following(b"PK\x07\x08" + sizes))
    early = [replace(_following(sizes), local={"crc": 0, "stored": 0, "size": size}) for size in (8, 7)]  # as Info-ZIP
    yield "zip descriptor, and another size before", zip_of(early[0]), bad, zip_of(early[1])
    yield "zip descriptor missing", zip_of(_following(b"")), bad, follows
    yield (
        "zip descriptor of another size",
        zip_of(_following(sizes[:-4] + struct.pack("<L", 8))),
        bad,
        zip_of(_following(sizes)),
    )
    yield "zip descriptor and more", zip_of(_following(sizes + b"\0")), bad, follows


def _claiming(size: int) -> ZipEntry:
    both = {"size": size}
    return ZipEntry(b"a.safetensors", local=both, central=both)


def _following(descriptor: bytes) -> ZipEntry:
    """An entry whose sizes come after it, though the central directory has them too."""
    return ZipEntry(b"a", flags=1 << 3, descriptor=descriptor, local={"crc": 0, "stored": 0, "size": 0})


def _swapped(first: ZipEntry, second: ZipEntry) -> bytes:
    """Two files whose central entries are the other way round."""
    straight = zip_of(first, second)
    size = 46 + len(first.name)
    start = len(straight) - 22 - 2 * size
    middle = start + size
    return straight[:start] + straight[middle:-22] + straight[start:middle] + straight[-22:]


def _ghost(first: ZipEntry, second: ZipEntry) -> bytes:
    """Two files in the central directory, the second of which has no local header."""
    end = zip_of(first).index(b"PK\x01\x02")
    whole = zip_of(first, second, offset=end)
    return whole[:end] + whole[whole.index(b"PK\x01\x02") :]


def _polyglots() -> _Rows:
    bad = Reason.BAD_ARCHIVE
    right = zip_of(ZipEntry(b"a"))
    yield "gzip, then zip", _HONEST + right, bad, _HONEST
    yield "zstd, then zip", zstd(_A + END) + right, bad, zstd(_A + END)
    yield "zip in front of zip", right + right, bad, right
    shifted = zip_of(ZipEntry(b"a"), before=b"PK\x03\x04 a prefix, counted in all offsets")
    yield "zip with a prefix that is counted", shifted, bad, right
    yield "zip with a prefix", b"PK\x03\x04 a prefix" + right, bad, right
    yield "program with a zip", b"#!/bin/sh\n" + right, Reason.BAD_MAGIC, right
    noise = random.Random(0).randbytes(2000)
    inner = tar_of(member(b"a", noise))
    yield "gzip inside gzip", gzipped(inner), bad, tar_of(member(b"inner.expert", inner))
    inner = zip_of(ZipEntry(b"a", noise))
    yield "zip inside gzip", gzipped(inner), bad, tar_of(member(b"inner.zip", inner))


def _bombs() -> Iterator[Attack]:
    bad = Reason.TOO_LARGE
    small = member(b"a.safetensors", bytes(2**20)) + END
    size = 2**26
    yield Attack("gzip bomb", partial(gzip_bomb, size), bad, partial(gzipped, small))
    yield Attack("zstd bomb", partial(zstd_bomb, size), bad, partial(zstd, small))
    yield Attack("zip bomb", partial(zip_bomb, size), bad, lambda: zip_of(ZipEntry(b"a.safetensors", bytes(2**20))))
    full = _A + END + bytes(2**20)
    yield Attack("zeros after the end", lambda: gzipped(full + b"\0"), bad, partial(gzipped, full))
    many = partial(gzip_of_ratio, _A + END, 400 * 2**20, 67)
    yield Attack("zeros after the end, 67 for a byte", many, bad, partial(gzip_of_ratio, _A + END, 2**20, 67))
    weights = member_of_zeros(b"a.safetensors", 100 * 2**20)
    fewer = member_of_zeros(b"a.safetensors", 24 * 2**20)
    yield Attack(
        "a large file, 74 bytes for a byte",
        partial(gzip_of_ratio, *weights, 74),
        bad,
        partial(gzip_of_ratio, *fewer, 19),
    )
    yield Attack("a file above the ratio", partial(gzip_of_ratio, *fewer, 60), bad, partial(gzip_of_ratio, *fewer, 19))
    long, json = header(b"a.json", 2**26 + 1), member(b"a.json", bytes(2**20))
    yield Attack("a bomb of text", partial(tar_of, long), bad, partial(tar_of, json))
    yield Attack("zstd cut into bytes", _in_too_many_blocks, bad, partial(_in_blocks, _A + END, 1))
    yield Attack("too many folders", partial(_folders, 2049), bad, partial(_folders, 2048))
    yield Attack("too many zip files", partial(_zip_files_of, 2049), bad, partial(_zip_files_of, 2048))
    yield Attack("the most of everything", partial(_laborious, 2049), bad, partial(_laborious, 100))
    again = "the same file again and again"
    yield Attack(again, lambda: tar_of(*[_A] * 2049), bad, lambda: tar_of(*[_A] * 2048))


def _folders(count: int) -> bytes:
    return tar_of(*(member(b"f%d" % number, b"", FOLDER) for number in range(count)))


def _zip_files_of(count: int) -> bytes:
    return zip_of(*(ZipEntry(b"f%d" % number, b"", method=0) for number in range(count)))


def _in_too_many_blocks() -> bytes:
    """A zstd frame of raw blocks of one byte each."""
    return b"\x28\xb5\x2f\xfd\0\x50" + b"\x08\0\0\0" * 2**16 + b"\1\0\0"


def _laborious(count: int) -> bytes:
    """A tar whose every member takes as long to read as it may."""
    records = b"".join(record(b"SCHILY.xattr.%02d" % number, b"") for number in range(31))
    names = (
        "/".join([*("\u01f0" * 35 for _ in range(6)), f"{number:04}" + "\u01f0" * 30, "a"]) for number in range(count)
    )
    return tar_of(*[pax_of(records + record(b"path", name.encode())) + member(b"a") for name in names])


def _in_blocks(content: bytes, size: int) -> bytes:
    """A zstd frame of raw blocks, and an empty one last."""
    blocks = [
        (len(part) << 3).to_bytes(3, "little") + part
        for part in (content[start : start + size] for start in range(0, len(content), size))
    ]
    return b"\x28\xb5\x2f\xfd\0\x50" + b"".join(blocks) + b"\1\0\0"


def _repeated(step: Callable[[bytes], bytes], start: bytes, zeros: int) -> bytes:
    """A compressor's output for `start` and then zeros, made without holding them."""
    piece = bytes(2**20)
    return step(start) + b"".join(step(piece) for _ in range(zeros // len(piece)))


def member_of_zeros(name: bytes, size: int) -> tuple[bytes, int]:
    """The first and the last of a tar with one file of so many zeros: its header, and how many zeros follow."""
    return header(name, size), size + -size % 512 + len(END)


def gzip_of_ratio(start: bytes, zeros: int, ratio: int) -> bytes:
    """One gzip member of `start` and then zeros, which are told in as many bytes as `ratio` allows."""
    stream = zlib.compressobj(wbits=-15)
    first = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH)
    piece_bytes = 2**16
    stream = zlib.compressobj(9, wbits=-15)
    piece = stream.compress(bytes(piece_bytes)) + stream.flush(zlib.Z_FULL_FLUSH)
    piece += b"\0\0\0\xff\xff" * ((piece_bytes // ratio - len(piece)) // 5)  # stored blocks of nothing
    count, left = divmod(zeros, piece_bytes)
    stream = zlib.compressobj(wbits=-15)
    last = stream.compress(bytes(left)) + stream.flush()
    checksum = zlib.crc32(start)
    for _ in range(count):
        checksum = zlib.crc32(bytes(piece_bytes), checksum)
    checksum = zlib.crc32(bytes(left), checksum)
    end = struct.pack("<2L", checksum, len(start) + zeros)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + first + piece * count + last + end


def gzip_bomb(size: int) -> bytes:
    """A gzip-tar with one file of so many zeros."""
    stream = zlib.compressobj(9, wbits=31)
    return _repeated(stream.compress, header(b"a.safetensors", size), size) + stream.compress(END) + stream.flush()


def zstd_bomb(size: int) -> bytes:
    """The same as a zstd-tar."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return _repeated(stream.compress, header(b"a.safetensors", size), size) + stream.compress(END) + stream.flush()


def zip_bomb(size: int) -> bytes:
    """The same as a zip."""
    stream = zlib.compressobj(9, wbits=-15)
    stored = _repeated(stream.compress, b"", size) + stream.flush()
    both = {"size": size}
    return zip_of(ZipEntry(b"a.safetensors", stored=stored, local=both, central=both))


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call took."""

    seconds: float
    peak_bytes: int


def cost(call: Callable[[], object]) -> Cost:
    """Processor time of a call at best, and the most memory that Python held meanwhile; a `HocketError` is dropped."""

    def run() -> float:
        begin = time.thread_time()
        with contextlib.suppress(HocketError):
            call()
        return time.thread_time() - begin

    seconds = min(run() for _ in range(3))
    tracemalloc.start()
    try:
        run()
        return Cost(seconds, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
