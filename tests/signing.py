"""Keys, roots and releases for tests: two publishers with fixed keys, and one time."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from hocket.identity import ReleaseName, key_id_of
from hocket.packages.keys import public_key_of
from hocket.packages.release import Purpose, Release, Subject, sign_release
from hocket.packages.trust import TrustedKey, TrustRoots

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)

ACME_SEED = b"\x01" * 32
ZETA_SEED = b"\x02" * 32
STRANGER_SEED = b"\x03" * 32

ACME_ID = key_id_of(public_key_of(ACME_SEED))
ZETA_ID = key_id_of(public_key_of(ZETA_SEED))
STRANGER_ID = key_id_of(public_key_of(STRANGER_SEED))


def trusted(seed: bytes = ACME_SEED, publisher: str = "acme", **terms: Any) -> TrustedKey:
    return TrustedKey(public_key_of(seed), publisher, **terms)


def roots(**terms: Any) -> TrustRoots:
    """acme, on the given terms, and zeta, without limits."""
    return TrustRoots.of([trusted(**terms), trusted(ZETA_SEED, "zeta")])


def release_of(data: bytes, name: str = "acme/iris@1.0.0", **changes: Any) -> Release:
    subject = {
        "purpose": Purpose.PACKAGE,
        "format": "apr",
        "digest": Subject.of(Purpose.PACKAGE, data, "apr").digest,
        "size_bytes": len(data),
    }
    return Release(ReleaseName.parse(name), Subject(**{**subject, **changes}))


def envelope_of(data: bytes, seed: bytes = ACME_SEED, name: str = "acme/iris@1.0.0", **changes: Any) -> bytes:
    """A signed release of `data`."""
    return sign_release(release_of(data, name, **changes), seed)


def statement_of(envelope: bytes) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return payload


def forged(data: bytes) -> bytes:
    """A release of `data` by a stranger who claims acme's key."""
    envelope: dict[str, Any] = json.loads(envelope_of(data, STRANGER_SEED))
    envelope["signatures"][0]["keyid"] = ACME_ID
    return json.dumps(envelope).encode()


def seal(payload: bytes, seed: bytes = ACME_SEED, payload_type: str = "application/vnd.in-toto+json") -> bytes:
    """A DSSE envelope of any payload, truly signed, made without the code under test."""
    kind = payload_type.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    signature = SigningKey(seed).sign(message).signature
    return json.dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": key_id_of(public_key_of(seed)), "sig": base64.b64encode(signature).decode()}],
        }
    ).encode()


def release_path(path: Path) -> Path:
    """Where the release of a package file lies."""
    return path.with_name(path.name + ".release.json")
