"""The last view of the registry on disk, so that a router that starts while the registry is down can serve.

One file, replaced whole: a SHA-256, then length-prefixed messages: the feed that leads to the view, then the mixtures'
bodies and gates. Nothing in it is believed without the checks that the registry's own words get.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import TYPE_CHECKING, Final

import structlog
from google.protobuf.message import DecodeError

from hocket.client.registry import FetchedMixture
from hocket.v1.registry_pb2 import FetchMixtureHeader, WatchResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_log: Final = structlog.get_logger("router")
_LENGTH: Final = struct.Struct("<Q")
_MAGIC: Final = b"hocket-router-1\n"


class Kept:
    """The copy of one router.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, events: Sequence[WatchResponse], mixtures: Iterable[FetchedMixture]) -> None:
        """Replace the copy: a crash leaves the old one or the new one. A full disk is logged and costs nothing else."""
        draft = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with draft.open("wb") as file:
                file.write(_MAGIC + bytes(digest.digest_size))
                for part in _parts(events, mixtures):
                    for piece in (_LENGTH.pack(len(part)), part):
                        digest.update(piece)
                        file.write(piece)
                file.seek(len(_MAGIC))
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            _log.warning("the view of the registry was not kept", path=str(self._path), error=str(error))

    def read(self) -> tuple[list[WatchResponse], Mapping[str, FetchedMixture]]:
        """The events and the mixtures by digest; nothing if there is no sound copy."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return [], {}
        try:
            return _read(data)
        except (DecodeError, ValueError, struct.error) as error:
            _log.warning("the kept view of the registry is damaged", path=str(self._path), error=type(error).__name__)
            return [], {}


def _parts(events: Sequence[WatchResponse], mixtures: Iterable[FetchedMixture]) -> Iterator[bytes]:
    yield from (event.SerializeToString() for event in events)  # the last one says synced
    for mixture in mixtures:
        header = FetchMixtureHeader(mixture=mixture.mixture, body=mixture.body, release=mixture.release)
        yield header.SerializeToString()
        yield mixture.gate


def _read(data: bytes) -> tuple[list[WatchResponse], dict[str, FetchedMixture]]:
    if not data.startswith(_MAGIC):
        raise ValueError("not a kept view")
    start = len(_MAGIC) + hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(data)[start:]).digest() != data[len(_MAGIC) : start]:
        raise ValueError("the bytes are not the ones that were written")
    parts = _split(data, start)
    events: list[WatchResponse] = []
    for part in parts:
        events.append(WatchResponse.FromString(part))
        if events[-1].HasField("synced"):
            break
    else:
        raise ValueError("the end of the feed is missing")
    mixtures = {}
    for part in parts:
        header = FetchMixtureHeader.FromString(part)
        gate = next(parts, None)
        if gate is None:
            raise ValueError("a gate is missing")
        mixtures[header.mixture.digest] = FetchedMixture(header.mixture, header.body, header.release, gate)
    return events, mixtures


def _split(data: bytes, start: int) -> Iterator[bytes]:
    while start < len(data):
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        if length > len(data) - start:
            raise ValueError("a part is cut off")
        yield data[start : start + length]
        start += length
