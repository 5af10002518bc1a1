"""Releases: the signed statements that bind publisher, name and version to bytes.

A release is a DSSE envelope (https://github.com/secure-systems-lab/dsse) with exactly one Ed25519 signature over an
in-toto Statement v1 (https://in-toto.io/Statement/v1). The statement's one subject is the SHA-256 of a file or of a
mixture; its predicate type says which, so that a signature made for one purpose is worth nothing for another. Both
documents are written as RFC 8785 canonical JSON, and read strictly: unknown or repeated fields, numbers that are not
integers and loosely spelled base64 are refused.

Of an envelope that is not yet verified only the envelope itself is parsed; `verify_release` looks at the statement
after its signature has been verified by a trusted key. `read_release` alone looks earlier, for display.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import rfc8785
from securesystemslib.dsse import Envelope

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, check_name, check_version, digest_of, is_digest, key_id_of
from hocket.packages.keys import SIGNATURE_SIZE_BYTES, public_key_of, sign, verify
from hocket.packages.trust import Proof, Revocations, TrustRoots

if TYPE_CHECKING:
    from datetime import datetime

RELEASE_SUFFIX: Final = ".release.json"
"""What the name of a release adds to that of its package file, which it lies beside."""

ENVELOPE_SIZE_BYTES_MAX: Final = 16 * 1024
"""No envelope is larger; a genuine one has about 700 bytes."""

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"

_SIZE_BYTES_MAX: Final = 2**53 - 1  # the largest integer of RFC 8785
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FORMAT: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


class Purpose(StrEnum):
    """What a release is about: the predicate type of its statement."""

    PACKAGE = "urn:hocket:release:package:v1"
    MIXTURE = "urn:hocket:release:mixture:v1"


@dataclass(frozen=True, slots=True)
class Subject:
    """The bytes a release speaks of.

    Attributes:
        purpose: What they are.
        digest: `sha256:<hex>` of all of them.
        size_bytes: How many there are.
        format: `apr` or `expert` for a package, `mixture` for a mixture.
    """

    purpose: Purpose
    digest: str
    size_bytes: int
    format: str

    @classmethod
    def of(cls, purpose: Purpose, data: bytes, format: str) -> Subject:  # noqa: A002 - the field's own name
        """The subject that these bytes are."""
        return cls(purpose, digest_of(data), len(data), format)


@dataclass(frozen=True, slots=True)
class Release:
    """A name, and the bytes it is bound to."""

    name: ReleaseName
    subject: Subject


@dataclass(frozen=True, slots=True)
class ClaimedRelease:
    """What an envelope says before anything is verified. For display only: anyone can write one.

    Attributes:
        release: The release it claims to be.
        key_id: The key it claims to be signed by.
    """

    release: Release
    key_id: str


def sign_release(release: Release, seed: bytes) -> bytes:
    """The envelope of a release, signed. Deterministic: the same arguments give the same bytes.

    Raises:
        HocketError: `BAD_RELEASE` if a field could not be read back, `BAD_REQUEST` if the seed is not 32 bytes.
    """
    subject = release.subject
    if not is_digest(subject.digest):
        raise _bad(f"the digest {subject.digest!r} is not sha256:<64 hex digits>")
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "subject": [{"digest": {"sha256": subject.digest.removeprefix("sha256:")}}],
        "predicateType": str(subject.purpose),
        "predicate": {
            "publisher": release.name.publisher,
            "name": release.name.name,
            "version": release.name.version,
            "size": subject.size_bytes,
            "format": subject.format,
        },
    }
    _read_statement(statement)  # what could not be read is not signed
    envelope = Envelope(rfc8785.dumps(statement), PAYLOAD_TYPE, {})
    signature = {
        "keyid": key_id_of(public_key_of(seed)),
        "sig": base64.b64encode(sign(seed, envelope.pae())).decode(),
    }
    return rfc8785.dumps({**envelope.to_dict(), "signatures": [signature]})


def read_release(envelope: bytes) -> ClaimedRelease:
    """What an envelope claims. Nothing is verified here: use `verify_release` to decide anything.

    Raises:
        HocketError: `BAD_RELEASE` if it is not well formed.
    """
    opened, key_id, _ = _open_envelope(envelope)
    return ClaimedRelease(_read_statement(_parse_json(opened.payload)), key_id)


def verify_release(
    envelope: bytes,
    subject: Subject,
    *,
    trust: TrustRoots,
    revoked: Revocations = frozenset(),
    now: datetime,
) -> Proof:
    """The proof that a trusted key released exactly this subject.

    In this order: the envelope's form; that its key is trusted now; the signature; only then what the statement
    says: its form, purpose, digest, size and format; and last that the key may bind the name.

    Args:
        envelope: The DSSE envelope as received.
        subject: The bytes at hand, measured by the caller, not taken from the envelope.
        trust: The trusted keys.
        revoked: Key ids that are trusted no longer.
        now: The time, with its zone.

    Raises:
        HocketError: `BAD_RELEASE` for a form that is not ours, another purpose, format, or a size that contradicts
            the digest; `KEY_REVOKED`, `SIGNER_NOT_TRUSTED`, `KEY_EXPIRED`; `SIGNATURE_INVALID`;
            `DIGEST_MISMATCH` if it releases other bytes; `NAME_NOT_ALLOWED`.
    """
    opened, key_id, signature = _open_envelope(envelope)
    key = trust.check(key_id, now, revoked)
    verify(key.public_key, opened.pae(), signature)
    release = _read_statement(_parse_json(opened.payload))
    claimed = release.subject
    if claimed.purpose is not subject.purpose:
        raise _bad(f"it is a {claimed.purpose.name.lower()} release, not a {subject.purpose.name.lower()} release")
    if claimed.digest != subject.digest:
        raise HocketError(
            Reason.DIGEST_MISMATCH,
            f"these bytes are {subject.digest}, and {release.name} was released as {claimed.digest}: "
            "the file was changed or damaged, fetch it again; or the release is another file's",
            expected=claimed.digest,
            actual=subject.digest,
        )
    if claimed.size_bytes != subject.size_bytes:
        raise _bad(f"it says {claimed.size_bytes} bytes of a subject that has {subject.size_bytes}")
    if claimed.format != subject.format:
        raise _bad(f"it says format {claimed.format!r} of a subject that is {subject.format!r}")
    key.check_may_release(release.name)
    return Proof("release", key.key_id, key.publisher, release.name, envelope)


def _open_envelope(data: bytes) -> tuple[Envelope, str, bytes]:
    """The envelope, its payload still opaque, with the key id and the bytes of its one signature."""
    if len(data) > ENVELOPE_SIZE_BYTES_MAX:
        raise _bad(f"the envelope is larger than {ENVELOPE_SIZE_BYTES_MAX} bytes")
    document = _fields(_parse_json(data), "the envelope", "payload", "payloadType", "signatures")
    if document["payloadType"] != PAYLOAD_TYPE:
        raise _bad(f"the payloadType is not {PAYLOAD_TYPE}")
    payload = _decode_base64(document["payload"], "the payload")
    signatures = document["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _bad("an envelope has exactly one signature")
    item = _fields(signatures[0], "the signature", "keyid", "sig")
    key_id = _matching(item["keyid"], _KEY_ID, "keyid")
    signature = _decode_base64(item["sig"], "the signature")
    if len(signature) != SIGNATURE_SIZE_BYTES:
        raise _bad(f"a signature has {SIGNATURE_SIZE_BYTES} bytes, not {len(signature)}")
    return Envelope(payload, PAYLOAD_TYPE, {}), key_id, signature


def _read_statement(document: object) -> Release:
    statement = _fields(document, "the statement", "_type", "subject", "predicateType", "predicate")
    if statement["_type"] != STATEMENT_TYPE:
        raise _bad(f"the statement's _type is not {STATEMENT_TYPE}")
    if statement["predicateType"] not in tuple(Purpose):
        raise _bad("the predicateType is none of " + ", ".join(Purpose))
    subjects = statement["subject"]
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise _bad("a release has exactly one subject")
    digests = _fields(_fields(subjects[0], "the subject", "digest")["digest"], "the subject's digest", "sha256")
    predicate = _fields(statement["predicate"], "the predicate", "publisher", "name", "version", "size", "format")
    size_bytes = predicate["size"]
    if type(size_bytes) is not int or not 0 <= size_bytes <= _SIZE_BYTES_MAX:
        raise _bad("the size is not a number of bytes")
    try:
        name = ReleaseName(
            check_name(_text(predicate["publisher"], "publisher"), "publisher"),
            check_name(_text(predicate["name"], "name")),
            check_version(_text(predicate["version"], "version")),
        )
    except HocketError as error:
        raise _bad(error.message) from error
    digest = "sha256:" + _matching(digests["sha256"], _SHA256, "sha256")
    subject = Subject(
        Purpose(statement["predicateType"]), digest, size_bytes, _matching(predicate["format"], _FORMAT, "format")
    )
    return Release(name, subject)


def _parse_json(data: bytes) -> object:
    """JSON in UTF-8 whose objects have unique keys."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad("it is not JSON in UTF-8 with unique keys") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key appears twice")
    return keys


def _fields(value: object, what: str, *names: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise _bad(f"{what} is not an object of exactly {', '.join(names)}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"{what} is not text")
    return value


def _matching(value: object, pattern: re.Pattern[str], what: str) -> str:
    text = _text(value, what)
    if pattern.fullmatch(text) is None:
        raise _bad(f"{what} is not spelled as {pattern.pattern}")
    return text


def _decode_base64(value: object, what: str) -> bytes:
    """Standard base64 in its one canonical spelling, so that no two envelopes hold the same signature."""
    text = _text(value, what)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _bad(f"{what} is not base64") from error
    if base64.b64encode(data).decode() != text:
        raise _bad(f"{what} is not canonical base64")
    return data


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_RELEASE, f"not a valid release: {what}")
