"""What holds for every release, trust file and set of proofs."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName
from hocket.packages.keys import public_key_of, sign, verify
from hocket.packages.opening import evaluate
from hocket.packages.release import Purpose, Release, Subject, read_release, sign_release, verify_release
from hocket.packages.trust import Policy, TrustedKey, TrustRoots, format_publisher, parse_publisher
from tests.signing import (
    ACME_ID,
    ACME_SEED,
    NOW,
    STRANGER_ID,
    STRANGER_SEED,
    ZETA_ID,
    ZETA_SEED,
    envelope_of,
    forged,
    roots,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from random import Random

DATA = b"the bytes of a package"
SUBJECT = Subject.of(Purpose.PACKAGE, DATA, "apr")
ENVELOPE = envelope_of(DATA)

seeds = st.binary(min_size=32, max_size=32)
names = st.from_regex(r"[a-z0-9](?:[a-z0-9_-]{0,20}[a-z0-9])?", fullmatch=True)
versions = st.from_regex(r"[0-9A-Za-z](?:[0-9A-Za-z.+-]{0,20}[0-9A-Za-z])?", fullmatch=True)
releases = st.builds(
    Release,
    st.builds(ReleaseName, names, names, versions),
    st.builds(
        Subject,
        st.sampled_from(Purpose),
        st.binary(min_size=32, max_size=32).map(lambda digest: "sha256:" + digest.hex()),
        st.integers(0, 2**53 - 1),
        st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True),
    ),
)
instants = st.none() | st.timedeltas(timedelta(0), timedelta(days=36500)).map(lambda age: NOW - age)


def flips(data: bytes) -> Iterator[bytes]:
    """The data with each single bit turned over."""
    for index in range(len(data) * 8):
        changed = bytearray(data)
        changed[index // 8] ^= 1 << index % 8
        yield bytes(changed)


def test_an_envelope_with_any_bit_turned_over_proves_nothing() -> None:
    for changed in flips(ENVELOPE):
        with pytest.raises(HocketError):
            verify_release(changed, SUBJECT, trust=roots(), now=NOW)


def test_an_envelope_cut_short_anywhere_is_refused() -> None:
    for size in range(len(ENVELOPE)):
        with pytest.raises(HocketError, match="BAD_RELEASE"):
            read_release(ENVELOPE[:size])


def test_a_signature_key_or_message_with_any_bit_turned_over_does_not_verify() -> None:
    public_key, signature = public_key_of(ACME_SEED), sign(ACME_SEED, DATA)
    verify(public_key, DATA, signature)
    cases = [
        *((public_key, DATA, changed) for changed in flips(signature)),
        *((changed, DATA, signature) for changed in flips(public_key)),
        *((public_key, changed, signature) for changed in flips(DATA)),
    ]
    for case in cases:
        with pytest.raises(HocketError, match="SIGNATURE_INVALID"):
            verify(*case)


@given(st.binary(max_size=200), st.data())
@settings(max_examples=100)
def test_no_bytes_crash_the_reader(noise: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(ENVELOPE)))
    end = data.draw(st.integers(start, len(ENVELOPE)))
    spliced = ENVELOPE[:start] + noise + ENVELOPE[end:]
    for read in (read_release, lambda bytes_: verify_release(bytes_, SUBJECT, trust=roots(), now=NOW)):
        with contextlib.suppress(HocketError):
            read(spliced)


@given(releases, seeds)
@settings(max_examples=50)
def test_every_release_is_read_back_and_verified_as_signed_each_time_alike(release: Release, seed: bytes) -> None:
    envelope = sign_release(release, seed)
    assert envelope == sign_release(release, seed)
    assert read_release(envelope).release == release
    trust = TrustRoots.of([TrustedKey(public_key_of(seed), release.name.publisher)])
    assert verify_release(envelope, release.subject, trust=trust, now=NOW).release == release.name


@given(releases, releases)
@settings(max_examples=50)
def test_a_release_proves_its_own_subject_only(release: Release, other: Release) -> None:
    envelope = sign_release(release, ACME_SEED)
    trust = TrustRoots.of([TrustedKey(public_key_of(ACME_SEED), release.name.publisher)])
    if other.subject != release.subject:
        with pytest.raises(HocketError):
            verify_release(envelope, other.subject, trust=trust, now=NOW)


@given(
    st.lists(
        st.tuples(
            seeds,
            st.lists(st.from_regex(r"[a-z0-9._*?-]{1,20}", fullmatch=True), min_size=1, max_size=3),
            instants,
            st.none() | st.timedeltas(timedelta(microseconds=1), timedelta(days=3000)),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda terms: terms[0],
    )
)
@settings(max_examples=50)
def test_every_trust_file_written_is_read_back(
    terms: list[tuple[bytes, list[str], datetime | None, timedelta | None]],
) -> None:
    keys = tuple(
        TrustedKey(
            public_key_of(seed),
            "acme",
            tuple(patterns),
            start,
            None if start is None or length is None else start + length,
        )
        for seed, patterns, start, length in terms
    )
    assert parse_publisher(format_publisher(keys), "acme") == keys


# Each kind of evidence about one subject, with what it amounts to alone (None: a proof). zeta's key is revoked.
EVIDENCE = {
    "a release by acme": (ENVELOPE, None),
    "another release by acme": (envelope_of(DATA, name="acme/iris@2.0.0"), None),
    "a release by a stranger": (envelope_of(DATA, STRANGER_SEED), Reason.SIGNER_NOT_TRUSTED),
    "a release by a revoked key": (envelope_of(DATA, ZETA_SEED, "zeta/iris@1"), Reason.KEY_REVOKED),
    "a release in another's name": (envelope_of(DATA, name="zeta/iris@1"), Reason.NAME_NOT_ALLOWED),
    "a release of other bytes": (envelope_of(b"other bytes"), Reason.DIGEST_MISMATCH),
    "a forged release": (forged(DATA), Reason.SIGNATURE_INVALID),
    "noise": (b"noise", Reason.BAD_RELEASE),
}
EMBEDDED = {None: None, ACME_ID: None, STRANGER_ID: Reason.SIGNER_NOT_TRUSTED, ZETA_ID: Reason.KEY_REVOKED}


@given(
    st.lists(st.sampled_from(sorted(EVIDENCE)), max_size=4, unique=True),
    st.sampled_from(list(EMBEDDED)),
    st.builds(Policy, allow_unsigned=st.booleans()),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_one_proof_is_enough_and_order_does_not_matter(
    chosen: list[str], embedded: str | None, policy: Policy, random: Random
) -> None:
    failures = {EVIDENCE[kind][1] for kind in chosen}
    if embedded is not None:
        failures.add(EMBEDDED[embedded])
    proven = None in failures

    def outcome(kinds: list[str]) -> object:
        try:
            return {
                (proof.kind, proof.key_id, proof.release)
                for proof in evaluate(
                    SUBJECT,
                    [EVIDENCE[kind][0] for kind in kinds],
                    embedded,
                    trust=roots(),
                    policy=policy,
                    revoked=frozenset({ZETA_ID}),
                    now=NOW,
                )
            }
        except HocketError as refusal:
            return refusal.reason

    first = outcome(chosen)
    random.shuffle(chosen)
    assert outcome(chosen) == first
    if proven:
        assert isinstance(first, set)
        assert {kind for kind, _, _ in first} <= {"release", "embedded"}
        assert {key_id for _, key_id, _ in first} == {ACME_ID}
    elif policy.allow_unsigned and failures <= {Reason.SIGNER_NOT_TRUSTED}:
        assert first == {("policy", None, None)}
    else:
        assert first in (failures or {Reason.UNSIGNED})
