"""Nothing that interprets content is entered before somebody trusted vouches for the bytes.

Every function that runs while a package is opened is written down. Until a proof holds, these are functions that hash,
compare lengths and verify, and no other.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Policy, TrustRoots, describe_package, open_package
from hocket.packages.apr.encryption import Password, RecipientKey
from hocket.packages.apr.quantization import quantized_model
from hocket.packages.model import QuantKind
from tests import builders, experts
from tests.signing import ACME_ID, ACME_SEED, NOW, STRANGER_SEED, envelope_of, forged, roots

if TYPE_CHECKING:
    from collections.abc import Iterator

BEFORE_TRUST = {
    "hocket.errors",
    "hocket.identity",
    "hocket.packages.apr.container",
    "hocket.packages.apr.header",
    "hocket.packages.expert.archive.is_expert",
    "hocket.packages.expert.archive._compression",
    "hocket.packages.keys",
    "hocket.packages.opening",
    "hocket.packages.release",
    "hocket.packages.strict_json",
    "hocket.packages.trust",
}
"""Modules, and single functions, of ours that may run before."""
DECODERS = ("cryptography.", "lz4.", "nacl.pwhash.", "zstandard.")
"""Libraries that interpret content or make keys; the rest of `nacl` verifies signatures. What is compiled by Cython,
such as msgpack, is not seen: its one caller, our metadata reader, is."""

KEY = RecipientKey(b"\x09" * 32)
PASSWORD = Password("secret")
MODELS: dict[str, dict[str, Any]] = {
    "stored": {"compression": "none"},
    "zstd": {"compression": "zstd"},
    "lz4": {"compression": "lz4"},
    "quantised": {"model": quantized_model(builders.linear(), QuantKind.Q8_0)},
    "for a recipient": {"encryption": KEY.recipient},
    "with a password": {"encryption": PASSWORD},
}


def signed(kind: str, seed: bytes | None) -> bytes:
    return builders.apr_bytes(**MODELS[kind], signing=None if seed is None else builders.signer(seed))


@contextmanager
def written_down() -> Iterator[set[str]]:
    """Names of all functions that are entered: `module.function`."""
    seen: set[str] = set()

    def note(frame: Any, event: str, function: Any) -> None:
        if event == "call" and not frame.f_code.co_filename.startswith("<"):
            function_name = frame.f_code.co_qualname.partition(".<locals>")[0]
            seen.add(f"{frame.f_globals.get('__name__')}.{function_name}")
        elif event == "c_call":
            owner = getattr(function, "__self__", None)
            module = getattr(function, "__module__", None) or type(owner).__module__
            seen.add(f"{module}.{function.__name__}")

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def too_early(seen: set[str]) -> set[str]:
    """Of the functions that were entered, those that interpret content."""
    allowed = tuple(f"{name}." for name in BEFORE_TRUST)
    return {
        name
        for name in seen
        if (name.startswith("hocket.") and not f"{name}.".startswith(allowed)) or name.startswith(DECODERS)
    }


def entered(data: bytes, *releases: bytes, **options: Any) -> tuple[Reason | None, set[str]]:
    """Why a package is refused, and what interpreted its content until then."""
    credential = PASSWORD if data == PASSWORD_FILE else KEY
    options = {"trust": roots(), "now": NOW, "credentials": {digest_of(data): credential}, **options}
    with written_down() as seen:
        try:
            open_package(data, releases=releases, **options)
            reason = None
        except HocketError as error:
            reason = error.reason
    return reason, too_early(seen)


PASSWORD_FILE = signed("with a password", ACME_SEED)

UNTRUSTED: dict[str, tuple[dict[str, Any], Reason]] = {
    "nobody's": ({"trust": TrustRoots()}, Reason.SIGNER_NOT_TRUSTED),
    "a revoked key's": ({"revoked": frozenset({ACME_ID})}, Reason.KEY_REVOKED),
    "an expired key's": ({"trust": roots(not_after=NOW - timedelta(days=1))}, Reason.KEY_EXPIRED),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("whose", UNTRUSTED)
def test_with_a_signature_that_nobody_trusts_no_decoder_is_entered(kind: str, whose: str) -> None:
    options, reason = UNTRUSTED[whose]

    assert entered(signed(kind, ACME_SEED), **options) == (reason, set())


@pytest.mark.parametrize("kind", MODELS)
def test_with_no_signature_or_a_broken_one_no_decoder_is_entered(kind: str) -> None:
    whole = signed(kind, ACME_SEED)

    assert entered(signed(kind, None)) == (Reason.UNSIGNED, set())
    assert entered(signed(kind, STRANGER_SEED)) == (Reason.SIGNER_NOT_TRUSTED, set())
    altered = builders.edited(whole, 40, bytes([whole[40] ^ 1]))
    assert entered(altered) == (Reason.SIGNATURE_INVALID, set())
    assert entered(altered, policy=Policy(allow_unsigned=True)) == (Reason.SIGNATURE_INVALID, set())


def test_with_a_release_that_proves_nothing_no_decoder_is_entered() -> None:
    data = signed("zstd", None)

    assert entered(data, envelope_of(data, STRANGER_SEED)) == (Reason.SIGNER_NOT_TRUSTED, set())
    assert entered(data, forged(data)) == (Reason.SIGNATURE_INVALID, set())
    assert entered(data, envelope_of(b"other bytes")) == (Reason.DIGEST_MISMATCH, set())
    assert entered(data, b"{}") == (Reason.BAD_RELEASE, set())


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "quantised"])
def test_of_a_package_whose_licence_has_ended_the_payload_is_neither_decrypted_nor_decoded(kind: str) -> None:
    data = builders.apr_bytes(**MODELS[kind], metadata=builders.ABOUT, signing=builders.signer(ACME_SEED))
    policy = Policy(allow_expired_licences=True)
    credentials = {digest_of(data): PASSWORD if kind == "with a password" else KEY}

    reason, seen = entered(data, credentials=credentials)

    assert reason is Reason.LICENCE_EXPIRED
    payload = tuple(f"hocket.packages.apr.{module}." for module in ("encryption", "payload", "layouts", "bincode"))
    assert not {name for name in seen if name.startswith((*payload, *DECODERS))}
    reason, seen = entered(data, credentials=credentials, policy=policy)
    assert (reason, "hocket.packages.apr.payload.decompress" in seen) == (None, True)


def test_bytes_that_are_none_of_the_ones_asked_for_are_only_hashed() -> None:
    data = signed("zstd", ACME_SEED)

    assert entered(data, digest=digest_of(b"others")) == (Reason.DIGEST_MISMATCH, set())


def test_a_registry_enters_no_decoder_either() -> None:
    for kind in MODELS:
        data = signed(kind, STRANGER_SEED)
        with written_down() as seen, pytest.raises(HocketError):
            describe_package(data, trust=roots(), now=NOW)
        assert too_early(seen) == set()


def test_an_archive_is_not_even_unpacked() -> None:
    data = experts.archived(experts.expert_files())

    reason, early = entered(data, envelope_of(data, STRANGER_SEED, format="expert"))

    assert (reason, early) == (Reason.SIGNER_NOT_TRUSTED, set())


@pytest.mark.parametrize("kind", MODELS)
def test_with_a_trusted_signature_the_decoders_are_seen(kind: str) -> None:
    """The twin, without which a blind tracer would pass."""
    data = PASSWORD_FILE if kind == "with a password" else signed(kind, ACME_SEED)
    reason, seen = entered(data)

    wanted = {"hocket.packages.apr.metadata._Decoder.value", "hocket.packages.apr.payload.decompress"}
    wanted |= {"hocket.packages.apr.layouts.read_model", "hocket.packages.apr.bincode.Reader.take"}
    assert reason is None
    assert wanted <= seen
    libraries = {name.partition(".")[0] for name in seen}
    assert ("zstandard" in libraries) == (kind in {"zstd", "quantised", "for a recipient", "with a password"})
    assert ("lz4" in libraries) == (kind == "lz4")
    assert ("hocket.packages.apr.encryption.unseal" in seen) == ("encryption" in MODELS[kind])
