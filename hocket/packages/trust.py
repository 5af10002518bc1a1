"""Which keys are trusted, for what and when.

Pure values: the roots come from a trust folder (`hocket.trust_folder`), revocations from a registry, the time from
the caller. The form of a publisher's file, checked here and written here (`docs/security.md`):

    [[keys]]
    key = "ed25519:<64 hex digits>"
    names = ["*"]                        # shell patterns of the names this key may release; default: all
    not_before = 2026-01-01T00:00:00Z    # optional
    not_after = 2027-01-01T00:00:00Z     # optional
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, check_name, key_bytes, key_id_of, key_text
from hocket.packages.keys import is_public_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TRUST_FILE_SIZE_BYTES_MAX: Final = 64 * 1024

Revocations: TypeAlias = frozenset[str]
"""Ids of keys that no longer vouch for anything, wherever they are trusted."""

_PATTERN: Final = re.compile(r"[a-z0-9._*?\[\]!-]{1,64}")
_FILE_FIELDS: Final = {"keys"}
_KEY_FIELDS: Final = {"key", "names", "not_before", "not_after"}


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key, and how far it is trusted.

    Attributes:
        public_key: The raw 32 bytes.
        publisher: The one publisher this key speaks for.
        names: Shell patterns of the packages and mixtures it may release.
        not_before: First instant of validity; None: always was.
        not_after: First instant at which validity is over; None: never.
    """

    public_key: bytes
    publisher: str
    names: tuple[str, ...] = ("*",)
    not_before: datetime | None = None
    not_after: datetime | None = None

    @property
    def key_id(self) -> str:
        """The SHA-256 of the raw key, in hex."""
        return key_id_of(self.public_key)

    def check_may_release(self, name: ReleaseName) -> None:
        """Return if this key may bind `name`: its own publisher, and a name one of its patterns matches.

        Raises:
            HocketError: `NAME_NOT_ALLOWED` otherwise.
        """
        if name.publisher != self.publisher:
            raise HocketError(
                Reason.NAME_NOT_ALLOWED,
                f"{name} is signed by a key of publisher {self.publisher}: "
                f"{name.publisher} has to sign it, or trust has to list the key under {name.publisher}",
                key_id=self.key_id,
            )
        if not any(fnmatchcase(name.name, pattern) for pattern in self.names):
            raise HocketError(
                Reason.NAME_NOT_ALLOWED,
                f"the key that signed {name} may release only {', '.join(self.names)}: "
                "use another key, or widen its names in the trust folder",
                key_id=self.key_id,
            )


@dataclass(frozen=True, slots=True)
class TrustRoots:
    """Every trusted key by its id. Empty: nobody is trusted."""

    keys: Mapping[str, TrustedKey] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[TrustedKey]) -> Self:
        """Roots of these keys.

        Raises:
            HocketError: `BAD_TRUST_FILE` if a key is listed twice: it could not be told whom it speaks for.
        """
        by_id: dict[str, TrustedKey] = {}
        for key in keys:
            if (other := by_id.get(key.key_id)) is not None:
                raise HocketError(
                    Reason.BAD_TRUST_FILE,
                    f"{key_text(key.public_key)} is listed twice ({other.publisher}, {key.publisher}): list a key once",
                    key_id=key.key_id,
                )
            by_id[key.key_id] = key
        return cls(by_id)

    def check(self, key_id: str, now: datetime, revoked: Revocations = frozenset()) -> TrustedKey:
        """The trusted key of this id.

        What it may sign is a separate question, asked once the signed text has been verified:
        `TrustedKey.check_may_release`.

        Args:
            key_id: SHA-256 of the raw key, in hex.
            now: The time, with its zone.
            revoked: Key ids that are trusted no longer.

        Raises:
            HocketError: `KEY_REVOKED`, `SIGNER_NOT_TRUSTED` (not in these roots), or `KEY_EXPIRED` (outside its
                window, on either side).
        """
        if key_id in revoked:
            raise HocketError(
                Reason.KEY_REVOKED,
                f"key {key_id} is revoked: the publisher has to sign again with another key",
                key_id=key_id,
            )
        key = self.keys.get(key_id)
        if key is None:
            raise HocketError(
                Reason.SIGNER_NOT_TRUSTED,
                f"key {key_id} is not in the trust folder: if you trust its owner, "
                "add the public key with `hocket trust add`",
                key_id=key_id,
            )
        if key.not_before is not None and now < key.not_before:
            raise HocketError(
                Reason.KEY_EXPIRED,
                f"key {key_id} of {key.publisher} is not valid before {key.not_before.isoformat()}",
                key_id=key_id,
            )
        if key.not_after is not None and now >= key.not_after:
            raise HocketError(
                Reason.KEY_EXPIRED,
                f"key {key_id} of {key.publisher} expired at {key.not_after.isoformat()}: "
                "the publisher has to sign again with a current key",
                key_id=key_id,
            )
        return key


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator's configuration allows beyond proof.

    Attributes:
        allow_unsigned: Accept bytes for which nobody trusted vouches: unsigned, or signed by strangers only.
            Nothing else is forgiven: a signature that does not verify, a key revoked or expired, a release of
            other bytes are refused all the same.
        allow_expired_licences: Accept a package whose licence has ended, or does not say when in a way that can be
            read.
    """

    allow_unsigned: bool = False
    allow_expired_licences: bool = False


@dataclass(frozen=True, slots=True)
class Proof:
    """Why bytes are accepted. Every accepted package or mixture has at least one.

    Attributes:
        kind: `release`: a verified release names them. `embedded`: the file's own signature by a trusted key
            covers them. `policy`: nothing does, and the operator's policy accepts that.
        key_id: The key that vouches; None under `policy`.
        publisher: Whom that key speaks for; None under `policy`.
        release: The name the bytes are bound to; None unless a release.
        envelope: The release as signed, to be kept and handed on; None unless a release.
    """

    kind: Literal["release", "embedded", "policy"]
    key_id: str | None = None
    publisher: str | None = None
    release: ReleaseName | None = None
    envelope: bytes | None = field(default=None, repr=False)


def parse_publisher(text: str, publisher: str) -> tuple[TrustedKey, ...]:
    """Read a publisher's trust file, strictly.

    Args:
        text: The TOML text.
        publisher: Whom the keys speak for (the file's name without `.toml`).

    Raises:
        HocketError: `BAD_TRUST_FILE` for a file too large, not TOML, with an unknown or missing field, without
            keys, with a key twice or a key, pattern, time or publisher that cannot be right.
    """
    try:
        check_name(publisher, "publisher")
        if len(text) > TRUST_FILE_SIZE_BYTES_MAX:
            raise _bad(f"larger than {TRUST_FILE_SIZE_BYTES_MAX} bytes")
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad(f"not TOML: {error}") from error
        if unknown := document.keys() - _FILE_FIELDS:
            raise _bad(f"unknown field {min(unknown)!r}")
        tables = document.get("keys")
        if not isinstance(tables, list) or not tables:
            raise _bad("no [[keys]] table")
        keys = tuple(_trusted_key(table, publisher) for table in tables)
        TrustRoots.of(keys)
    except HocketError as error:
        raise HocketError(
            Reason.BAD_TRUST_FILE, f"trust file of {publisher!r}: {error.message}", publisher=publisher
        ) from error
    return keys


def format_publisher(keys: Iterable[TrustedKey]) -> str:
    """The trust file of one publisher's keys; `parse_publisher` reads back what is written here."""
    tables = []
    for key in keys:
        lines = ["[[keys]]", f'key = "{key_text(key.public_key)}"', f"names = {json.dumps(list(key.names))}"]
        for name, time in (("not_before", key.not_before), ("not_after", key.not_after)):
            if time is not None:
                lines.append(f"{name} = {time.astimezone(UTC).isoformat()}")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _trusted_key(table: object, publisher: str) -> TrustedKey:
    if not isinstance(table, dict):
        raise _bad("keys is not a list of tables")
    if unknown := table.keys() - _KEY_FIELDS:
        raise _bad(f"unknown field {min(unknown)!r} of a key")
    text = table.get("key")
    if not isinstance(text, str):
        raise _bad('a key lacks key = "ed25519:<64 hex digits>"')
    public_key = key_bytes(text)
    if not is_public_key(public_key):
        raise _bad(f"{text} is not a point that could verify a signature: check for a typing error")
    names = table.get("names", ["*"])
    if not isinstance(names, list) or not names:
        raise _bad('names of a key is not a list of patterns such as ["*"]')
    for pattern in names:
        if not isinstance(pattern, str) or _PATTERN.fullmatch(pattern) is None:
            raise _bad(f"name pattern {pattern!r}: use 1 to 64 of a-z 0-9 . _ - and * ? [ ] !")
    not_before, not_after = _instant(table, "not_before"), _instant(table, "not_after")
    if not_before is not None and not_after is not None and not_before >= not_after:
        raise _bad("not_before is not earlier than not_after")
    return TrustedKey(public_key, publisher, tuple(names), not_before, not_after)


def _instant(table: Mapping[str, Any], name: str) -> datetime | None:
    value = table.get(name)
    if value is not None and (not isinstance(value, datetime) or value.tzinfo is None):
        raise _bad(f"{name} is not a time with its zone, such as 2026-01-01T00:00:00Z")
    return value


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_TRUST_FILE, what)
