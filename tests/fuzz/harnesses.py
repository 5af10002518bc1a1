"""What is fuzzed: readers of bytes from strangers, and the bytes to start from.

A harness takes any bytes and may raise `HocketError`. It undoes what hides a reader behind a checksum: whoever attacks
it can compute one as well.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError
from hocket.identity import digest_of
from hocket.packages import apr, expert
from hocket.packages.expert.archive import is_expert, read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.weights import read_tensors
from tests import archives, builders, experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

BYTES_MAX: Final = 2**16
"""The longest input."""

_SEPARATOR: Final = b"\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Harness:
    """One reader, and where to begin."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]


def archive(data: bytes) -> None:
    """An archive, or else the inside of a gzip-tar."""
    read_archive(data if is_expert(data) else archives.gzipped(_with_checksums(data), 1))


def manifest(data: bytes) -> None:
    """A manifest, read leniently and as upstream reads it."""
    with contextlib.suppress(HocketError):
        parse_manifest(data, upstream=True)
    parse_manifest(data)


def weights(data: bytes) -> None:
    """A safetensors file."""
    read_tensors(data)


def adapter(data: bytes) -> None:
    """A package: manifest, adapter configuration and weights, in this order."""
    parts = dict(zip(_PARTS, data.split(_SEPARATOR, 2), strict=False))
    package = archives.zip_bytes(parts, archives.STORED)
    expert.decode(package, digest_of(package))


def model(data: bytes) -> None:
    """An `.apr` file."""
    whole = builders.sealed(data[:-4])
    apr.decode(apr.split(whole), digest_of(whole))


_PARTS: Final = ("manifest.json", "adapter_config.json", "adapter_model.safetensors")
_KINDS: Final = ("lora", "dora", "ia3", "soft_prompt")


def _archives() -> Iterator[bytes]:
    for attack in archives.attacks():
        yield from (attack.refused, attack.accepted)
    for records in (b"", archives.pax(path=b"b", mtime=b"1.5")):
        yield records + archives.member(b"a", b"content") + archives.END
    yield archives.tar_bytes()


def _manifests() -> Iterator[bytes]:
    for kind in _KINDS:
        yield experts.json_bytes(experts.expert_manifest(kind=kind))
    fixtures = os.environ.get("HOCKET_FIXTURES")
    if fixtures is not None:
        yield from (path.read_bytes() for path in sorted(Path(fixtures, "expert").rglob("manifest*.json")))


def _weights() -> Iterator[bytes]:
    for kind in _KINDS:
        yield experts.expert_files(kind=kind)[_PARTS[-1]]


def _adapters() -> Iterator[bytes]:
    for kind in _KINDS:
        files = experts.expert_files(kind=kind)
        yield _SEPARATOR.join(files[name] for name in _PARTS)
    signed = experts.signed_upstream(experts.expert_files())
    yield _SEPARATOR.join(signed[name] for name in _PARTS)


def _models() -> Iterator[bytes]:
    for made in (builders.linear(), builders.mixture()):
        for compression in ("none", "zstd"):
            yield builders.apr_bytes(made, compression=compression)
    yield builders.apr_bytes(signing=builders.signer())


def _with_checksums(tar: bytes) -> bytes:
    """A tar whose header blocks have the checksums they should have."""
    blocks = [tar[start : start + 512] for start in range(0, len(tar), 512)]
    return b"".join(archives.checked(block) if block[257:262] == b"ustar" else block for block in blocks)


HARNESSES: Final[Mapping[str, Harness]] = {
    "archive": Harness(archive, _archives),
    "manifest": Harness(manifest, _manifests),
    "weights": Harness(weights, _weights),
    "adapter": Harness(adapter, _adapters),
    "apr": Harness(model, _models),
}
