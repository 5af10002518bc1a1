"""The archive of an `.expert` package: gzip-tar, zstd-tar or zip, told apart by magic, read in memory.

Nothing is extracted to disk. Only plain files come out, each under a plain and relative name: what two readers could
take for two different things is refused instead of interpreted.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.packages.expert import tar, zip  # noqa: A004 - the format's name
from hocket.packages.expert.streams import Member, Meter, gunzip, shown, unzstd
from hocket.packages.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Compression: TypeAlias = Literal["gzip", "zstd", "zip"]

_COMPRESSIONS: Final[Mapping[bytes, Compression]] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_BINARY: Final = b"HLLMEXP\0"
_WEIGHTS: Final = ".safetensors"
_SPECIAL: Final = frozenset('\\:<>"|?*')
"""What separates folders, drives and streams on Windows, or cannot be in a name there."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive, read.

    Attributes:
        compression: Which of the three containers it is.
        files: Content by name, in the archive's order; a file that is there twice with the same bytes, once. Folders
            are not listed.
    """

    compression: Compression
    files: Mapping[str, bytes]


def is_expert(data: bytes | memoryview) -> bool:
    """Whether bytes start like an `.expert` package, of a kind that can be read or not."""
    return bytes(data[: len(_BINARY)]) == _BINARY or _compression(data) is not None


def read_archive(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Archive:
    """Read every file of an archive.

    Of the limits, `package_bytes`, `zstd_window_bytes`, `pax_bytes` and those of archives and file names count. The
    ratio is that of what came out so far, the tar's own blocks included, to what went in so far. So an archive takes
    memory and time in proportion to its size, and `archive_ratio_free_bytes` at the most beyond that.

    Args:
        data: The whole file.
        limits: Bounds on everything.

    Raises:
        HocketError: `BAD_MAGIC`; `UNSUPPORTED_VERSION` for the binary format, `UNSUPPORTED_COMPRESSION` for other
            zip methods, `ENCRYPTED` for zip's own encryption; `BAD_ARCHIVE` if the container is damaged, cut short,
            ambiguous or goes on after its end; `BAD_FILE_TYPE` for links, devices, FIFOs and sparse files;
            `BAD_FILE_NAME`; `DUPLICATE_FILE` for a name that stands for two contents, or two names that differ by
            case only; `TOO_LARGE`.
    """
    view = memoryview(data).toreadonly().cast("B")
    if len(view) > limits.package_bytes:
        raise HocketError(
            Reason.TOO_LARGE, f"the archive has {len(view)} bytes, more than the {limits.package_bytes} allowed"
        )
    compression = _compression(view)
    if compression is None:
        raise _unknown(bytes(view[: len(_BINARY)]))
    meter = Meter(limits)
    match compression:
        case "gzip":
            members = tar.members(gunzip(view, meter), limits)
        case "zstd":
            members = tar.members(unzstd(view, meter, limits), limits)
        case "zip":
            members = zip.members(view, meter)
    return Archive(compression, MappingProxyType(_collect(members, limits)))


def safe_name(text: str, limits: Limits = DEFAULT_LIMITS) -> str:
    r"""A file's name inside a package, checked: relative, of plain parts that file systems keep as they are.

    A leading `./`, as GNU tar writes it, is dropped; nothing else is changed. Two names may still be one where case
    is ignored, which only an archive as a whole can show; and names of Windows' devices (`con`) are let pass.

    Args:
        text: The name, its parts separated by `/`.
        limits: `file_name_chars` and `file_name_depth`.

    Raises:
        HocketError: `BAD_FILE_NAME` for an absolute name, an empty part, `.` or `..`, a part that ends with a dot or
            a space (Windows drops them), one of `\ : < > " | ? *`, characters that are not printable, text that is
            not NFC, or too many characters or parts.
    """
    name = text.removeprefix("./")
    parts = name.split("/")
    wrong = None
    if len(name) > limits.file_name_chars:
        wrong = f"has {len(name)} characters, more than {limits.file_name_chars}"
    elif len(parts) > limits.file_name_depth:
        wrong = f"has {len(parts)} parts, more than {limits.file_name_depth}"
    elif any(part in ("", ".", "..") for part in parts):
        wrong = "is absolute, or has a part that is empty, '.' or '..'"
    elif any(part.endswith((".", " ")) for part in parts):
        wrong = "has a part that ends with a dot or a space"
    elif not _SPECIAL.isdisjoint(name):
        wrong = "has one of the characters " + " ".join(sorted(_SPECIAL))
    elif not name.isprintable():
        wrong = "has characters that cannot be printed"
    elif not unicodedata.is_normalized("NFC", name):
        wrong = "is not in normal form C"
    if wrong is not None:
        raise HocketError(
            Reason.BAD_FILE_NAME, f"the file name {shown(text)} {wrong}: rename the file", file=shown(text)
        )
    return name


def _compression(data: bytes | memoryview) -> Compression | None:
    start = bytes(data[: len(_BINARY)])
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)


def _unknown(start: bytes) -> HocketError:
    if start == _BINARY:
        return HocketError(
            Reason.UNSUPPORTED_VERSION,
            "this is a binary .expert file (format 2), which nobody writes yet: pack the expert as gzip-tar",
        )
    return HocketError(
        Reason.BAD_MAGIC,
        f"the file starts with {start.hex() or 'nothing'}, not like an .expert archive (gzip, zstd or zip)",
    )


def _collect(members: Iterable[Member], limits: Limits) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    places = _Places()
    left_bytes = limits.archive_bytes
    for number, member in enumerate(members, 1):
        if number > limits.archive_files:
            raise HocketError(Reason.TOO_LARGE, f"the archive has more than {limits.archive_files} files and folders")
        if member.folder and member.name == ".":
            continue
        name = safe_name(member.name, limits)
        places.take(name, folder=member.folder)
        if member.folder:
            continue
        most = left_bytes if name.endswith(_WEIGHTS) else min(left_bytes, limits.archive_text_bytes)
        if member.size_bytes > most:
            raise HocketError(
                Reason.TOO_LARGE,
                f"{name!a} in the archive has {member.size_bytes} bytes, more than the {most} it may have: "
                f"{limits.archive_bytes} for all files, {limits.archive_text_bytes} for one without weights",
                file=name,
            )
        left_bytes -= member.size_bytes
        buffer = io.BytesIO()  # gives its bytes away without a copy
        buffer.writelines(member.content)
        content = buffer.getvalue()
        if files.setdefault(name, content) != content:
            raise HocketError(
                Reason.DUPLICATE_FILE, f"{name!a} is in the archive twice with different bytes: keep one", file=name
            )
    return files


class _Places:
    """Names taken so far, so that none means two things on a file system that ignores case."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[str, bool]] = {}

    def take(self, name: str, *, folder: bool) -> None:
        """Take a name and the folders above it.

        Raises:
            HocketError: `DUPLICATE_FILE`.
        """
        parts = name.split("/")
        folded = unicodedata.normalize("NFC", name.casefold()).split("/")
        for depth in range(1, len(parts)):
            self._take("/".join(parts[:depth]), "/".join(folded[:depth]), folder=True)
        self._take(name, "/".join(folded), folder=folder)

    def _take(self, name: str, folded: str, *, folder: bool) -> None:
        spelling, is_folder = self._taken.setdefault(folded, (name, folder))
        if spelling != name:
            raise HocketError(
                Reason.DUPLICATE_FILE,
                f"{spelling!a} and {name!a} in the archive differ by case only: rename one",
                file=name,
            )
        if is_folder != folder:
            raise HocketError(
                Reason.DUPLICATE_FILE, f"{name!a} is both a file and a folder in the archive: rename one", file=name
            )
