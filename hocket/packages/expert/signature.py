"""The signature that upstream's tools leave inside a package: verified, shown, never decisive.

Upstream's signer hashes every file, the manifest as it was before; signs the sorted lines `path:sha256`, joined by
newlines; and then writes all that into the manifest, as its `integrity` block, and the signature once more into
`signature.sig`. So the signature of an honest package never covers the manifest that lies in it. What was signed can
be rebuilt, mostly: the block was `null` before. But upstream writes the map `evaluation.metrics` in another order
every time, so that all orders of it are tried; and of a package that was signed twice, the block that was there
before the second time is gone.

Publisher and time are not covered at all, and the key lies inside the package: this proves that files belong
together, not who made them.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError
from hocket.identity import key_id_of
from hocket.packages.adapter import Outcome, UpstreamSignature
from hocket.packages.expert.names import MANIFEST, SIGNATURE
from hocket.packages.keys import PUBLIC_KEY_SIZE_BYTES, SIGNATURE_SIZE_BYTES, verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ALGORITHM: Final = "ed25519"
_HASH: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_TEXT_CHARS: Final = 256
"""Most of a key or a signature as text; both are far shorter."""
_BLANKS: Final = re.compile(r"[ \t\n\r]*")
_CLAIM_CHARS: Final = 128
_SHUFFLED_METRICS: Final = 6
_SHUFFLED_BYTES: Final = 2**16
"""Orders are tried of so many metrics, in manifests of so many bytes: 720 hashes of 64 KiB at the most."""


def message_of(hashes: Mapping[str, str]) -> bytes:
    """What upstream signs: hex SHA-256 by path, a line each, in the order of the paths' bytes."""
    return "\n".join(f"{path}:{hashes[path]}" for path in sorted(hashes, key=str.encode)).encode()


def verify_upstream(files: Mapping[str, bytes], integrity: object) -> UpstreamSignature:
    """What the signature inside a package is worth.

    Args:
        files: Content by name, the manifest among them: JSON without repeated keys.
        integrity: The manifest's value of that name; None if there is none.
    """
    if integrity is None and SIGNATURE not in files:
        return UpstreamSignature()
    if not isinstance(integrity, dict):
        return _invalid(UpstreamSignature(), f"{SIGNATURE} is there, but the manifest has no integrity block")
    shown = UpstreamSignature(
        publisher=_claim(integrity.get("publisher")),
        created_at=_claim(_either(integrity, "created_at", "timestamp")),
    )
    public_key = _public_key(_either(integrity, "pubkey", "public_key"))
    if public_key is None:
        return _invalid(shown, "the public key in the manifest cannot be read")
    shown = replace(shown, key_id=key_id_of(public_key))
    try:
        hashes = _signed_hashes(integrity, files, public_key)
        _compare(hashes, files)
    except _Broken as error:
        return _invalid(shown, str(error))
    signed = hashes.get(MANIFEST)
    if any(digest == signed for digest in _digests_before_signing(files[MANIFEST])):
        return replace(shown, outcome=Outcome.VALID)
    return replace(shown, outcome=Outcome.WEIGHTS_ONLY, explanation=_unbound(hashes))


class _Broken(Exception):  # noqa: N818 - an outcome, not an error
    """The signature is not one of these files; says why."""


def _signed_hashes(integrity: Mapping[str, Any], files: Mapping[str, bytes], public_key: bytes) -> dict[str, str]:
    """The hashes that were signed, by path, once the signature has been verified."""
    if integrity.get("signature_algorithm") != _ALGORITHM:
        raise _Broken(f"the signature algorithm is not {_ALGORITHM}")
    if SIGNATURE not in files:
        raise _Broken(f"the manifest says that the package is signed, but {SIGNATURE} is missing")
    signature = _signature(integrity.get("signature"))
    beside = files[SIGNATURE][: _TEXT_CHARS + 1].decode("ascii", "replace")
    if signature is None or _signature(beside) != signature:
        raise _Broken(f"the signatures in {MANIFEST} and {SIGNATURE} differ or cannot be read")
    hashes = {}
    listed = integrity.get("files")
    for path, text in listed.items() if isinstance(listed, dict) else ():
        match = _HASH.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise _Broken(f"the hash listed for {path!r} cannot be read")
        hashes[path] = match[1]
    try:
        verify(public_key, message_of(hashes), signature)
    except HocketError as error:
        raise _Broken("the signature is not one of the hashes listed, by the key that lies beside it") from error
    return hashes


def _compare(hashes: Mapping[str, str], files: Mapping[str, bytes]) -> None:
    """Whether exactly the files that were signed are there; the manifest is another matter."""
    apart = {MANIFEST, SIGNATURE}
    for path in sorted((hashes.keys() | files.keys()) - apart):
        if path not in files:
            raise _Broken(f"{path!r} was signed, but is missing")
        if path not in hashes:
            raise _Broken(f"{path!r} was added after signing")
        if hashlib.sha256(files[path]).hexdigest() != hashes[path]:
            raise _Broken(f"{path!r} was changed after signing")


def _unbound(hashes: Mapping[str, str]) -> str:
    if SIGNATURE in hashes:
        return "it was signed twice: what the manifest was before the second time is gone, so nothing proves it"
    return "the manifest is not the one that was signed, or can no longer be shown to be"


@dataclass(frozen=True, slots=True)
class _Member:
    """One member of a JSON object, as places in its text."""

    key: str
    start: int
    value: int
    end: int


def _digests_before_signing(manifest: bytes) -> Iterator[str]:
    """Hex SHA-256 of what the manifest may have been before it was signed, likeliest first."""
    text = manifest.decode()
    members = _members(text, _skip(text, 0))
    place = next(place for place, member in enumerate(members) if member.key == "integrity")
    block = members[place]
    nulled = f"{text[: block.value]}null{text[block.end :]}"
    yield _sha256(nulled)
    if place + 1 < len(members):
        yield _sha256(text[: block.start] + text[members[place + 1].start :])
    else:
        yield _sha256(text[: members[place - 1].end if place else block.start] + text[block.end :])
    if len(manifest) <= _SHUFFLED_BYTES:
        yield from map(_sha256, _shuffled(nulled))


def _shuffled(text: str) -> Iterator[str]:
    """The text with its evaluation metrics in every other order."""
    whole = {member.key: member for member in _members(text, _skip(text, 0))}
    evaluation = {member.key: member for member in _members_of(text, whole.get("evaluation"))}
    metrics = _members_of(text, evaluation.get("metrics"))
    if len(metrics) > _SHUFFLED_METRICS:
        return
    written = [text[metric.start : metric.end] for metric in metrics]
    for order in itertools.islice(itertools.permutations(written), 1, None):
        parts = []
        end = 0
        for metric, other in zip(metrics, order, strict=True):
            parts += [text[end : metric.start], other]
            end = metric.end
        yield "".join([*parts, text[end:]])


def _members_of(text: str, member: _Member | None) -> list[_Member]:
    return _members(text, member.value) if member is not None and text[member.value] == "{" else []


def _members(text: str, start: int) -> list[_Member]:
    """The members of the object that starts there; the text is well-formed JSON."""
    decoder = json.JSONDecoder()
    members = []
    place = _skip(text, start + 1)
    while text[place] != "}":
        key, key_end = decoder.raw_decode(text, place)
        value = _skip(text, _skip(text, key_end) + 1)
        _, end = decoder.raw_decode(text, value)
        members.append(_Member(key, place, value, end))
        place = _skip(text, end)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return members


def _skip(text: str, place: int) -> int:
    match = _BLANKS.match(text, place)
    return place if match is None else match.end()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _either(block: Mapping[str, Any], name: str, other: str) -> object:
    value = block.get(name)
    return block.get(other) if value is None else value


def _claim(value: object) -> str | None:
    return value[:_CLAIM_CHARS] if isinstance(value, str) else None


def _public_key(value: object) -> bytes | None:
    """A key after `ed25519:` or alone, in hex or base64."""
    if not isinstance(value, str) or len(value) > _TEXT_CHARS:
        return None
    text = value.removeprefix("ed25519:").removeprefix("hex:")
    key = _from_hex(text)
    if key is None:
        try:
            key = base64.b64decode(text, validate=True)
        except ValueError:
            return None
    return key if len(key) == PUBLIC_KEY_SIZE_BYTES else None


def _signature(value: object) -> bytes | None:
    """A signature in hex, with or without `hex:` before it."""
    if not isinstance(value, str) or len(value) > _TEXT_CHARS:
        return None
    signature = _from_hex(value.strip().removeprefix("hex:"))
    return signature if signature is not None and len(signature) == SIGNATURE_SIZE_BYTES else None


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _invalid(shown: UpstreamSignature, why: str) -> UpstreamSignature:
    return replace(shown, outcome=Outcome.INVALID, explanation=why)
