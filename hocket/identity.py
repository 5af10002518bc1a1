"""How digests, keys, experts and releases are spelled.

`sha256:<64 hex>` names bytes, `ed25519:<64 hex>` a public key, and a key id is the SHA-256 of the raw key in
hex. `sha256:...#2` is the third expert inside an `.apr` mixture. `publisher/name@version` names a release.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from hocket.errors import HocketError, Reason

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_KEY: Final = re.compile(r"ed25519:[0-9a-f]{64}")
_EXPERT: Final = re.compile(r"(sha256:[0-9a-f]{64})(?:#(0|[1-9][0-9]{0,5}))?")
_SEPARATORS: Final = re.compile(r"[/\\]")
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_VERSION: Final = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z.+-]{0,62}[0-9A-Za-z])?")


def digest_of(data: bytes | memoryview) -> str:
    """The digest of bytes held in memory, as `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether `text` is spelled as a digest."""
    return _DIGEST.fullmatch(text) is not None


def key_text(public_key: bytes) -> str:
    """A raw 32-byte Ed25519 public key as `ed25519:<hex>`."""
    return f"ed25519:{public_key.hex()}"


def key_bytes(text: str) -> bytes:
    """The raw public key behind `ed25519:<hex>`.

    Raises:
        HocketError: `BAD_REQUEST` if the text is not spelled as a key.
    """
    if _KEY.fullmatch(text) is None:
        raise HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} is not a public key (ed25519:<64 hex digits>)")
    return bytes.fromhex(text.removeprefix("ed25519:"))


def key_id_of(public_key: bytes) -> str:
    """The id of a raw public key: its SHA-256 in hex."""
    return hashlib.sha256(public_key).hexdigest()


def check_name(text: str, what: str = "name") -> str:
    """Return `text` if it may name a publisher, package or mixture.

    Names are 1 to 64 of `a-z 0-9 . _ -`, beginning and ending with a letter or digit, so that no name can be
    mistaken for a path, a digest or a release.

    Raises:
        HocketError: `BAD_REQUEST` otherwise.
    """
    if _NAME.fullmatch(text) is None or ".." in text:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{text[:80]!r} is not a valid {what}: 1 to 64 of a-z 0-9 . _ - (letter or digit at both ends)",
        )
    return text


def check_version(text: str) -> str:
    """Return `text` if it may be a version (`1.0.0`, `2025-11-27`, `1.2.0-rc.1+cpu`).

    Raises:
        HocketError: `BAD_REQUEST` otherwise.
    """
    if _VERSION.fullmatch(text) is None:
        raise HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} is not a valid version: use letters, digits and . + -")
    return text


def short_name(model: str) -> str:
    """The last part of a base model's name, which may be a hub id, or a path on somebody's disk."""
    return _SEPARATORS.split(model.strip().rstrip("/\\"))[-1]


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One expert: a package digest, and its ordinal inside a package that holds several.

    The order of expert ids is the order of sums: by digest, then ordinal.
    """

    digest: str
    ordinal: int = 0

    @classmethod
    def parse(cls, text: str) -> ExpertId:
        """Read `sha256:...` or `sha256:...#2`.

        Raises:
            HocketError: `BAD_REQUEST` if the text is neither.
        """
        match = _EXPERT.fullmatch(text)
        if match is None:
            raise HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} is not an expert (sha256:<64 hex digits>[#ordinal])")
        return cls(match[1], int(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.digest}#{self.ordinal}" if self.ordinal else self.digest


@dataclass(frozen=True, slots=True, order=True)
class ReleaseName:
    """What a release calls a package: `publisher/name@version`."""

    publisher: str
    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> ReleaseName:
        """Read `publisher/name@version`.

        Raises:
            HocketError: `BAD_REQUEST` if a part is missing or misspelled.
        """
        publisher, slash, rest = text.partition("/")
        name, at, version = rest.partition("@")
        if not (slash and at):
            raise HocketError(Reason.BAD_REQUEST, f"{text[:80]!r} is not a release (publisher/name@version)")
        return cls(check_name(publisher, "publisher"), check_name(name), check_version(version))

    def __str__(self) -> str:
        return f"{self.publisher}/{self.name}@{self.version}"
