"""Bytes on disk, named by their SHA-256: `blobs/sha256/ab/ab34...`.

A blob comes in as a draft in `blobs/incoming`, which is the same file system: written and hashed at once, synced, and
then renamed to its digest, and the folder synced. What has its name is whole and outlasts a power failure. A blob
without a row in the store is harmless: the same bytes, published again, take its place.

Every method may raise `services.registry.disk.StorageError`, after which the process has to stop.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from services.registry.disk import FOLDER_MODE, disk, sync_folder

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

CHUNK_BYTES: Final = 512 * 1024
"""Bytes that are read at once."""


class Blobs:
    """A folder of blobs, used by one process.

    Args:
        folder: `blobs`; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._named = folder / "sha256"
        self._incoming = folder / "incoming"

    def open(self) -> None:
        """Make the folders, and remove the drafts of a process that died."""
        with disk():
            for folder in (self._named, self._incoming):
                folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            for draft in self._incoming.iterdir():
                draft.unlink()
            for folder in (self._incoming, self._named, self._named.parent, self._named.parent.parent):
                sync_folder(folder)

    def draft(self) -> Draft:
        """A new draft, empty. Nothing is on disk before it is written to."""
        return Draft(self, self._incoming / uuid.uuid4().hex)

    def reader(self) -> Reader:
        """What reads a blob, once it is opened."""
        return Reader(self)

    def remove(self, digest: str) -> None:
        """Remove a blob; the store must have forgotten it before. Nothing happens if it is not there."""
        with disk():
            self.path(digest).unlink(missing_ok=True)

    def is_whole(self, digest: str) -> bool:
        """Whether a blob is there, and its bytes are those of its name: all of them are read."""
        with disk():
            try:
                with self.path(digest).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest() == digest.removeprefix("sha256:")
            except FileNotFoundError:
                return False

    def path(self, digest: str) -> Path:
        """Where a blob lies, or would."""
        name = digest.removeprefix("sha256:")
        return self._named / name[:2] / name


class Draft:
    """A blob on its way in. `discard` it in the end, whatever became of it."""

    def __init__(self, blobs: Blobs, path: Path) -> None:
        self._blobs = blobs
        self._path = path
        self._file: FileIO | None = None
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises:
            HocketError: `CAPACITY` if the disk is full.
        """
        with disk():
            file = self._opened()
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    def finish(self) -> str:
        """Bring all bytes to the disk, and return their digest."""
        with disk(), self._opened() as file:
            os.fsync(file.fileno())
        return f"sha256:{self._hash.hexdigest()}"

    def read(self) -> bytes:
        """All bytes, as they are on disk."""
        with disk():
            return self._path.read_bytes()

    def commit(self) -> None:
        """Give the blob its name, in place of one that is there: that heals a damaged one."""
        path = self._blobs.path(f"sha256:{self._hash.hexdigest()}")
        with disk():
            if not path.parent.is_dir():
                path.parent.mkdir(mode=FOLDER_MODE)
                sync_folder(path.parent.parent)
            self._path.replace(path)
            sync_folder(path.parent)

    def discard(self) -> None:
        """Forget the draft; what was committed stays."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
        return self._file


class Reader:
    """The bytes of one blob, in chunks. `close` it in the end."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._file: FileIO | None = None
        self._hash = hashlib.sha256()
        self._digest = ""
        self._left_to_skip = 0

    def open(self, digest: str, size_bytes: int, offset: int = 0) -> None:
        """Begin to read a blob.

        Args:
            digest: `sha256:<64 hex>`.
            size_bytes: How many bytes it has.
            offset: First byte wanted; those before it are read to be hashed.

        Raises:
            HocketError: `BLOB_CORRUPT` if the blob is not there or has another size.
        """
        self._digest = digest
        self._left_to_skip = offset
        try:
            self._file = self._blobs.path(digest).open("rb", buffering=0)
        except FileNotFoundError:
            raise self._corrupt() from None
        if os.fstat(self._file.fileno()).st_size != size_bytes:
            raise self._corrupt()

    def read(self) -> bytes:
        """The next chunk; empty at the end, when all bytes have been found to be right.

        Raises:
            HocketError: `BLOB_CORRUPT` at the end if the bytes are not those of the digest.
        """
        if self._file is None:
            raise ValueError("the reader is not open")
        while chunk := self._file.read(CHUNK_BYTES):
            self._hash.update(chunk)
            skipped = min(self._left_to_skip, len(chunk))
            self._left_to_skip -= skipped
            if skipped < len(chunk):
                return chunk[skipped:]
        if f"sha256:{self._hash.hexdigest()}" != self._digest:
            raise self._corrupt()
        return b""

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _corrupt(self) -> HocketError:
        return HocketError(
            Reason.BLOB_CORRUPT,
            f"the stored bytes of {self._digest} are damaged: publish the same bytes again",
            digest=self._digest,
        )
