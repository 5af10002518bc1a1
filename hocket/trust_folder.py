"""The trust folder: `<publisher>.toml` files that say whose signatures count.

Services read it and poll it; only `hocket trust add` and `hocket trust remove` write it. A file that cannot be
trusted to mean what its author meant is left out, with all its keys: trust only ever shrinks by mistake.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.files import sync_folder, write_whole
from hocket.identity import check_name
from hocket.packages.trust import (
    TRUST_FILE_SIZE_BYTES_MAX,
    TrustedKey,
    TrustRoots,
    format_publisher,
    parse_publisher,
)

if TYPE_CHECKING:
    from pathlib import Path

_SUFFIX: Final = ".toml"
_FILE_MODE: Final = 0o644

_log = structlog.get_logger(__name__)

_Fingerprint = tuple[tuple[str, int, int, int], ...]


class TrustFolder:
    """One trust folder.

    Args:
        path: The folder. It need not exist: without it nobody is trusted.

    Attributes:
        problems: Why files were left out by the last `read`, one refusal each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: tuple[HocketError, ...] = ()
        self._seen: _Fingerprint | None = None

    def read(self) -> TrustRoots:
        """The roots as the folder now states them.

        Files not called `*.toml` and hidden files are ignored. A file that is unreadable, too large, malformed or
        misnamed is left out, logged and listed in `problems`; so are all files that list the same key, since it
        cannot be told whom it speaks for.
        """
        self._seen = self._fingerprint()
        problems: list[HocketError] = []
        keys: dict[str, list[TrustedKey]] = {}
        try:
            paths = self._files()
        except HocketError as error:
            paths = []
            problems.append(error)
        for path in paths:
            try:
                for key in _read_file(path):
                    keys.setdefault(key.key_id, []).append(key)
            except HocketError as error:
                problems.append(error)
        ambiguous: set[str] = set()
        for same in keys.values():
            if len(same) > 1:
                names = sorted(key.publisher for key in same)
                ambiguous.update(names)
                problems.append(_bad(f"{' and '.join(names)} list the same key {same[0].key_id}: keep one"))
        self.problems = tuple(problems)
        for problem in problems:
            _log.warning("trust_file_left_out", folder=str(self.path), problem=problem.message)
        return TrustRoots.of(key for same in keys.values() for key in same if key.publisher not in ambiguous)

    def changed(self) -> bool:
        """Whether the folder differs from what the last `read` found (one `stat` per file; true before a read)."""
        return self._fingerprint() != self._seen

    def add_key(self, key: TrustedKey) -> None:
        """Trust a key, or change how far it is trusted. The publisher's file is rewritten without its comments.

        Raises:
            HocketError: `BAD_REQUEST` for a bad publisher name, `NAME_TAKEN` if the key is another publisher's,
                `BAD_TRUST_FILE` if the key's terms or the publisher's present file are not valid, or the folder
                cannot be written.
        """
        for path in self._files():
            if path.stem != key.publisher and any(other.key_id == key.key_id for other in _read_leniently(path)):
                raise HocketError(
                    Reason.NAME_TAKEN,
                    f"the key is trusted for {path.stem}: remove it there before trusting it for {key.publisher}",
                )
        path = self.path / (check_name(key.publisher, "publisher") + _SUFFIX)
        present = _read_file(path) if path.exists() else ()
        self._write(path, (*(other for other in present if other.key_id != key.key_id), key))

    def remove_key(self, key_id: str) -> tuple[TrustedKey, ...]:
        """Stop trusting a key, in every file that lists it; a file left without keys is deleted.

        Returns:
            The key as each file listed it.

        Raises:
            HocketError: `SIGNER_NOT_TRUSTED` if no valid file lists it, `BAD_TRUST_FILE` if the folder cannot be
                written.
        """
        removed: list[TrustedKey] = []
        for path in self._files():
            present = _read_leniently(path)
            kept = tuple(key for key in present if key.key_id != key_id)
            if len(kept) < len(present):
                removed += (key for key in present if key.key_id == key_id)
                self._write(path, kept)
        if not removed:
            raise HocketError(
                Reason.SIGNER_NOT_TRUSTED, f"no valid file in {self.path} lists key {key_id}", key_id=key_id
            )
        return tuple(removed)

    def _files(self) -> list[Path]:
        try:
            paths = sorted(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _bad(f"folder {self.path} cannot be listed ({error.strerror})") from error
        return [path for path in paths if path.suffix == _SUFFIX and not path.name.startswith(".")]

    def _fingerprint(self) -> _Fingerprint:
        """What tells one state of the folder from another; ctime, because nothing can set it back."""
        try:
            return tuple(_mark(path) for path in self._files())
        except HocketError:
            return (("", 0, 0, 0),)

    def _write(self, path: Path, keys: tuple[TrustedKey, ...]) -> None:
        """Replace a file at once, so that a reader finds the old keys or the new ones."""
        text = format_publisher(keys)
        if keys:
            parse_publisher(text, path.stem)  # what could not be read is not written
        try:
            if keys:
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(path, text.encode(), mode=_FILE_MODE)
            else:
                path.unlink()
                sync_folder(self.path)  # a removed key must not come back
        except OSError as error:
            raise _bad(f"{path} cannot be written ({error.strerror})") from error


def _mark(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return path.name, 0, 0, 0
    return path.name, status.st_ino, status.st_ctime_ns, status.st_size


def _read_file(path: Path) -> tuple[TrustedKey, ...]:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _bad(f"{path} is not a regular file")
            text = file.read(TRUST_FILE_SIZE_BYTES_MAX + 1).decode()
    except OSError as error:
        raise _bad(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _bad(f"{path} is not UTF-8 text") from error
    return parse_publisher(text, path.stem)


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe that nobody writes would wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_leniently(path: Path) -> tuple[TrustedKey, ...]:
    """The keys of a file, none if it is not valid: `read` reports it, editing another file goes on."""
    try:
        return _read_file(path)
    except HocketError:
        return ()


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_TRUST_FILE, what)
