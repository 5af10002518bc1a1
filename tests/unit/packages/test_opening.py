from __future__ import annotations

import dataclasses
import json
import os
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, digest_of, key_id_of
from hocket.packages import (
    EmbeddedFacts,
    Inspection,
    Limits,
    Package,
    Policy,
    Proof,
    Purpose,
    Subject,
    TrustedKey,
    TrustRoots,
    evaluate,
    inspect_package,
    open_package,
)
from hocket.packages.apr import split, write
from hocket.packages.apr.container import join
from hocket.packages.apr.header import Flag
from hocket.packages.keys import public_key_of, sign
from hocket.packages.model import LinearRegression, ModelFacts
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

NAME = ReleaseName("acme", "iris", "1.0.0")
MODEL = LinearRegression(np.array([2, -1], np.float32), 0.5)
UNSIGNED_POLICY = Policy(allow_unsigned=True)

if FIXTURES := os.environ.get("HOCKET_FIXTURES"):
    REFERENCE = Path(FIXTURES) / "apr" / "reference-0.11.0"
    MANIFEST = json.loads((REFERENCE / "manifest.json").read_text())
    SIGNED_FILES = ["edge_signed_opened_plain.apr", "edge_signed_embedded_key.apr"] + [
        item["file"]
        for item in MANIFEST["files"]
        if item["open_with"]["mode"].endswith("signed") and item["origin"] != "mutated"
    ]
else:
    SIGNED_FILES = []


def file(seed: bytes | None = None, payload: bytes | None = None, flags: int = 0) -> bytes:
    """A small linear model; with `payload`, that in place of the model."""

    def signing(data: bytes) -> tuple[bytes, bytes]:
        assert seed is not None
        return sign(seed, data), public_key_of(seed)

    plain = split(write(MODEL, compression="none", created_at="0"))
    payload = bytes(plain.payload) if payload is None else payload
    header = dataclasses.replace(
        plain.header,
        payload_bytes=len(payload),
        uncompressed_bytes=len(payload),
        flags=flags | (Flag.SIGNED if seed else 0),
    )
    return join(header, bytes(plain.metadata), payload, signing if seed else None)


def edited(data: bytes, offset: int, change: int = 1) -> bytes:
    """The file with one byte changed and its checksum made right again."""
    changed = bytearray(data[:-4])
    changed[offset] ^= change
    return bytes(changed) + zlib.crc32(changed).to_bytes(4, "little")


PLAIN = file()
SIGNED = file(ACME_SEED)
SIGNED_BY_STRANGER = file(STRANGER_SEED)


def open_at_noon(data: bytes, *releases: bytes, **options: Any) -> Package:
    return open_package(data, releases=releases, **{"trust": roots(), "now": NOW, **options})


def reason_of(data: bytes, *releases: bytes, **options: Any) -> Reason:
    with pytest.raises(HocketError) as refusal:
        open_at_noon(data, *releases, **options)
    return refusal.value.reason


def outcome(data: bytes, *releases: bytes, **options: Any) -> Reason | list[str]:
    try:
        return kinds(open_at_noon(data, *releases, **options))
    except HocketError as refusal:
        return refusal.reason


def kinds(package: Package) -> list[str]:
    return [proof.kind for proof in package.provenance.proofs]


class TestByRelease:
    def test_a_released_package_opens(self) -> None:
        envelope = envelope_of(PLAIN)
        package = open_at_noon(PLAIN, envelope)
        assert package.provenance.proofs == (Proof("release", ACME_ID, "acme", NAME, envelope),)
        assert package.provenance.embedded == EmbeddedFacts()
        assert package.facts.digest == digest_of(PLAIN)
        assert isinstance(package.model, LinearRegression)

    def test_a_package_nobody_signed_is_refused(self) -> None:
        assert reason_of(PLAIN) is Reason.UNSIGNED

    def test_a_release_of_other_bytes_is_refused(self) -> None:
        assert reason_of(PLAIN, envelope_of(SIGNED)) is Reason.DIGEST_MISMATCH

    def test_a_forged_release_is_refused(self) -> None:
        assert reason_of(PLAIN, forged(PLAIN)) is Reason.SIGNATURE_INVALID

    def test_a_release_by_a_stranger_is_refused(self) -> None:
        assert reason_of(PLAIN, envelope_of(PLAIN, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED

    def test_a_release_for_a_mixture_does_not_release_a_package(self) -> None:
        envelope = envelope_of(PLAIN, purpose=Purpose.MIXTURE)
        assert reason_of(PLAIN, envelope) is Reason.BAD_RELEASE

    def test_a_release_for_another_format_is_refused(self) -> None:
        assert reason_of(PLAIN, envelope_of(PLAIN, format="expert")) is Reason.BAD_RELEASE

    def test_several_releases_are_several_proofs(self) -> None:
        package = open_at_noon(PLAIN, envelope_of(PLAIN), envelope_of(PLAIN, ZETA_SEED, "zeta/flowers@7"))
        assert [str(proof.release) for proof in package.provenance.proofs] == ["acme/iris@1.0.0", "zeta/flowers@7"]

    @pytest.mark.parametrize(
        "worthless",
        [
            forged(PLAIN),
            envelope_of(SIGNED),
            envelope_of(PLAIN, STRANGER_SEED),
            envelope_of(PLAIN, ZETA_SEED),
            b"noise",
        ],
    )
    def test_a_worthless_release_beside_a_proof_changes_nothing(self, worthless: bytes) -> None:
        package = open_at_noon(PLAIN, worthless, envelope_of(PLAIN), worthless)
        assert [proof.release for proof in package.provenance.proofs] == [NAME]

    def test_when_one_of_two_keys_is_revoked_the_other_release_still_holds(self) -> None:
        releases = envelope_of(PLAIN), envelope_of(PLAIN, ZETA_SEED, "zeta/flowers@7")
        package = open_at_noon(PLAIN, *releases, revoked=frozenset({ACME_ID}))
        assert [proof.publisher for proof in package.provenance.proofs] == ["zeta"]
        assert reason_of(PLAIN, *releases, revoked=frozenset({ACME_ID, ZETA_ID})) is Reason.KEY_REVOKED

    def test_of_several_failures_the_most_telling_is_reported(self) -> None:
        stranger, other = envelope_of(PLAIN, STRANGER_SEED), envelope_of(PLAIN)
        assert reason_of(PLAIN, stranger, other, trust=roots(not_after=NOW)) is Reason.KEY_EXPIRED
        assert reason_of(PLAIN, other, stranger, trust=roots(not_after=NOW)) is Reason.KEY_EXPIRED


class TestByEmbeddedSignature:
    def test_a_file_signed_by_a_trusted_key_opens_without_a_name(self) -> None:
        package = open_at_noon(SIGNED)
        assert package.provenance.proofs == (Proof("embedded", ACME_ID, "acme"),)
        assert package.provenance.embedded == EmbeddedFacts(True, ACME_ID, True, True)  # noqa: FBT003 - as printed

    def test_a_file_signed_by_a_stranger_is_refused(self) -> None:
        assert reason_of(SIGNED_BY_STRANGER) is Reason.SIGNER_NOT_TRUSTED

    def test_a_file_signed_by_a_stranger_opens_under_a_release(self) -> None:
        package = open_at_noon(SIGNED_BY_STRANGER, envelope_of(SIGNED_BY_STRANGER))
        assert kinds(package) == ["release"]
        assert package.provenance.embedded == EmbeddedFacts(True, STRANGER_ID, True, False)  # noqa: FBT003 - as printed

    def test_both_proofs_count_together(self) -> None:
        assert kinds(open_at_noon(SIGNED, envelope_of(SIGNED))) == ["release", "embedded"]

    def test_a_file_signed_by_a_revoked_or_expired_key_is_refused(self) -> None:
        assert reason_of(SIGNED, revoked=frozenset({ACME_ID})) is Reason.KEY_REVOKED
        assert reason_of(SIGNED, trust=roots(not_after=NOW)) is Reason.KEY_EXPIRED

    def test_a_file_signed_by_a_revoked_key_opens_under_the_release_of_another(self) -> None:
        release = envelope_of(SIGNED, ZETA_SEED, "zeta/flowers@7")
        package = open_at_noon(SIGNED, release, revoked=frozenset({ACME_ID}))
        assert [proof.publisher for proof in package.provenance.proofs] == ["zeta"]
        assert not package.provenance.embedded.trusted

    @pytest.mark.parametrize("offset", [22, 40, -101, -100, -68, -36, -5])
    def test_an_altered_file_is_refused_even_under_a_release_and_any_policy(self, offset: int) -> None:
        altered = edited(SIGNED, offset)
        assert reason_of(altered) is Reason.SIGNATURE_INVALID
        assert reason_of(altered, envelope_of(altered)) is Reason.SIGNATURE_INVALID
        assert reason_of(altered, policy=UNSIGNED_POLICY) is Reason.SIGNATURE_INVALID

    def test_a_stranger_who_puts_the_trusted_key_beside_his_signature_is_refused(self) -> None:
        body = SIGNED_BY_STRANGER[:-36] + public_key_of(ACME_SEED)
        swapped = body + zlib.crc32(body).to_bytes(4, "little")
        assert split(swapped).signature is not None
        assert reason_of(swapped) is Reason.SIGNATURE_INVALID

    def test_a_signature_cut_out_leaves_an_unsigned_file(self) -> None:
        stripped = edited(SIGNED[:-100] + b"crc.", 21, Flag.SIGNED)
        assert reason_of(stripped) is Reason.UNSIGNED
        assert reason_of(stripped, envelope_of(SIGNED)) is Reason.DIGEST_MISMATCH


class TestPolicy:
    @pytest.mark.parametrize("data", [PLAIN, SIGNED_BY_STRANGER])
    def test_what_nobody_trusted_signed_opens_only_when_the_policy_says_so(self, data: bytes) -> None:
        stranger = envelope_of(data, STRANGER_SEED)
        assert open_at_noon(data, policy=UNSIGNED_POLICY).provenance.proofs == (Proof("policy"),)
        assert open_at_noon(data, stranger, policy=UNSIGNED_POLICY).provenance.proofs == (Proof("policy"),)
        assert reason_of(data, policy=Policy()) in {Reason.UNSIGNED, Reason.SIGNER_NOT_TRUSTED}

    def test_a_real_proof_is_preferred_to_the_policy(self) -> None:
        assert kinds(open_at_noon(PLAIN, envelope_of(PLAIN), policy=UNSIGNED_POLICY)) == ["release"]
        assert kinds(open_at_noon(SIGNED, policy=UNSIGNED_POLICY)) == ["embedded"]

    @pytest.mark.parametrize(
        ("envelope", "options", "reason"),
        [
            (forged(PLAIN), {}, Reason.SIGNATURE_INVALID),
            (envelope_of(SIGNED), {}, Reason.DIGEST_MISMATCH),
            (envelope_of(PLAIN), {"revoked": frozenset({ACME_ID})}, Reason.KEY_REVOKED),
            (envelope_of(PLAIN), {"trust": roots(not_after=NOW)}, Reason.KEY_EXPIRED),
            (envelope_of(PLAIN), {"trust": roots(names=("digits",))}, Reason.NAME_NOT_ALLOWED),
            (b"noise", {}, Reason.BAD_RELEASE),
        ],
    )
    def test_the_policy_forgives_nothing_else(self, envelope: bytes, options: dict[str, Any], reason: Reason) -> None:
        assert reason_of(PLAIN, envelope, policy=UNSIGNED_POLICY, **options) is reason


class TestOrder:
    def test_the_bytes_have_to_be_those_asked_for(self) -> None:
        assert open_at_noon(SIGNED, digest=digest_of(SIGNED)).facts.digest == digest_of(SIGNED)
        assert reason_of(SIGNED, digest=digest_of(PLAIN)) is Reason.DIGEST_MISMATCH

    def test_no_content_is_decoded_before_somebody_trusted_vouches_for_it(self) -> None:
        garbage, stranger = file(ACME_SEED, payload=b"\x07" * 40), file(STRANGER_SEED, payload=b"\x07" * 40)
        assert reason_of(stranger) is Reason.SIGNER_NOT_TRUSTED
        assert reason_of(garbage) is Reason.BAD_PAYLOAD
        unsigned = file(payload=b"\x07" * 40)
        assert reason_of(unsigned) is Reason.UNSIGNED
        assert reason_of(unsigned, envelope_of(unsigned, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED
        assert reason_of(unsigned, envelope_of(unsigned)) is Reason.BAD_PAYLOAD

    def test_no_metadata_is_parsed_before_somebody_trusted_vouches_for_it(self) -> None:
        garbage = edited(PLAIN, 32)
        assert reason_of(garbage) is Reason.UNSIGNED
        assert reason_of(garbage, envelope_of(garbage, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED
        assert reason_of(garbage, envelope_of(garbage)) is Reason.BAD_METADATA

    def test_a_damaged_container_is_reported_before_trust(self) -> None:
        assert reason_of(PLAIN[:-1]) is Reason.BAD_LENGTH
        assert reason_of(b"GGUF" + PLAIN[4:], envelope_of(PLAIN)) is Reason.BAD_MAGIC

    def test_limits_reach_the_reader(self) -> None:
        limits = Limits(package_bytes=len(SIGNED) - 1)
        assert reason_of(SIGNED, limits=limits) is Reason.TOO_LARGE
        assert outcome(SIGNED, limits=Limits(package_bytes=len(SIGNED))) == ["embedded"]

    def test_an_encrypted_file_is_refused_once_its_bytes_are_trusted(self) -> None:
        sealed = file(ACME_SEED, payload=bytes(100), flags=Flag.ENCRYPTED)
        assert reason_of(sealed) is Reason.ENCRYPTED
        assert reason_of(sealed, policy=UNSIGNED_POLICY) is Reason.ENCRYPTED
        assert reason_of(sealed, trust=TrustRoots()) is Reason.SIGNER_NOT_TRUSTED


class TestEvaluate:
    """What was opened is judged again when trust, revocations or the time change."""

    SUBJECT = Subject.of(Purpose.PACKAGE, SIGNED, "apr")

    def judge(self, *releases: bytes, embedded: str | None = None, **options: Any) -> tuple[Proof, ...]:
        subject = options.pop("subject", self.SUBJECT)
        defaults = {"trust": roots(), "policy": Policy(), "revoked": frozenset(), "now": NOW}
        return evaluate(subject, releases, embedded, **{**defaults, **options})

    def test_it_agrees_with_opening(self) -> None:
        releases = (envelope_of(SIGNED),)
        provenance = open_at_noon(SIGNED, *releases).provenance
        assert self.judge(*releases, embedded=provenance.embedded.key_id) == provenance.proofs

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"trust": TrustRoots()}, Reason.SIGNER_NOT_TRUSTED),
            ({"revoked": frozenset({ACME_ID})}, Reason.KEY_REVOKED),
            ({"now": NOW + timedelta(days=1)}, Reason.KEY_EXPIRED),
        ],
    )
    def test_a_proof_ends_with_its_key(self, options: dict[str, Any], reason: Reason) -> None:
        options = {"trust": roots(not_after=NOW + timedelta(days=1)), **options}
        for releases, embedded in (((envelope_of(SIGNED),), None), ((), ACME_ID)):
            assert self.judge(*releases, embedded=embedded)
            with pytest.raises(HocketError) as refusal:
                self.judge(*releases, embedded=embedded, **options)
            assert refusal.value.reason is reason

    def test_mixtures_are_judged_alike(self) -> None:
        body = b'{"name":"iris"}'
        subject = Subject.of(Purpose.MIXTURE, body, "mixture")
        release = envelope_of(body, purpose=Purpose.MIXTURE, format="mixture")
        assert self.judge(release, subject=subject)[0].release == NAME
        assert self.judge(subject=subject, policy=UNSIGNED_POLICY) == (Proof("policy"),)
        with pytest.raises(HocketError, match="UNSIGNED"):
            self.judge(subject=subject)
        with pytest.raises(HocketError, match="BAD_RELEASE"):
            self.judge(envelope_of(body), subject=subject)


class TestInspection:
    def inspect(self, data: bytes, *releases: bytes, **options: Any) -> Inspection:
        return inspect_package(data, releases, **{"trust": roots(), "now": NOW, **options})

    def test_a_file_is_shown_whoever_signed_it(self) -> None:
        for data, embedded in (
            (PLAIN, EmbeddedFacts()),
            (SIGNED, EmbeddedFacts(present=True, key_id=ACME_ID, verified=True, trusted=True)),
            (SIGNED_BY_STRANGER, EmbeddedFacts(present=True, key_id=STRANGER_ID, verified=True)),
            (edited(SIGNED, 45), EmbeddedFacts(present=True, key_id=ACME_ID)),
        ):
            inspection = self.inspect(data)
            assert inspection.embedded == embedded
            assert inspection.facts.digest == digest_of(data)

    def test_without_roots_nobody_is_trusted(self) -> None:
        embedded = inspect_package(SIGNED, now=NOW).embedded
        assert embedded == EmbeddedFacts(present=True, key_id=ACME_ID, verified=True)

    def test_a_revoked_key_is_not_shown_as_trusted(self) -> None:
        assert not self.inspect(SIGNED, revoked=frozenset({ACME_ID})).embedded.trusted

    def test_each_release_is_shown_with_why_it_proves_nothing(self) -> None:
        shown = self.inspect(
            PLAIN, envelope_of(PLAIN), envelope_of(PLAIN, STRANGER_SEED), forged(PLAIN), envelope_of(SIGNED)
        ).releases
        assert [release.refused for release in shown] == [
            None,
            Reason.SIGNER_NOT_TRUSTED,
            Reason.SIGNATURE_INVALID,
            Reason.DIGEST_MISMATCH,
        ]
        assert [release.claim.key_id for release in shown] == [ACME_ID, STRANGER_ID, ACME_ID, ACME_ID]
        assert {release.claim.release.name for release in shown} == {NAME}

    def test_an_encrypted_file_is_shown(self) -> None:
        facts = self.inspect(file(payload=bytes(100), flags=Flag.ENCRYPTED)).facts
        assert isinstance(facts, ModelFacts)
        assert facts.encrypted

    def test_malformed_bytes_are_refused(self) -> None:
        for data, releases, reason in (
            (PLAIN[:-1], (), Reason.BAD_LENGTH),
            (edited(PLAIN, 32), (), Reason.BAD_METADATA),
            (PLAIN, (b"noise",), Reason.BAD_RELEASE),
        ):
            with pytest.raises(HocketError) as refusal:
                self.inspect(data, *releases)
            assert refusal.value.reason is reason


class TestLicences:
    @staticmethod
    def licensed(expiry: str | None) -> bytes:
        terms = {"uuid": "u", "hash": "h", "seats": 1, "tier": "Team"} | ({} if expiry is None else {"expiry": expiry})
        metadata = {"created_at": "0", "aprender_version": "0.11.0", "license": terms}
        return write(MODEL, metadata=metadata, signing=lambda data: (sign(ACME_SEED, data), public_key_of(ACME_SEED)))

    @pytest.mark.parametrize("expiry", ["2026-06-01T12:00:00Z", "2026-05-31", "soon"])
    def test_a_licence_that_has_ended_or_cannot_be_read_is_refused_unless_policy_says_otherwise(
        self, expiry: str
    ) -> None:
        data = self.licensed(expiry)

        assert reason_of(data) is Reason.LICENCE_EXPIRED
        assert outcome(data, policy=Policy(allow_expired_licences=True)) == ["embedded"]

    @pytest.mark.parametrize("expiry", ["2026-06-01T12:00:01Z", "2026-06-01", "2031-01-31T00:00:00Z", None])
    def test_a_licence_that_holds_is_no_obstacle(self, expiry: str | None) -> None:
        assert outcome(self.licensed(expiry)) == ["embedded"]

    def test_it_is_the_time_asked_about_that_counts(self) -> None:
        data = self.licensed("2026-05-31")

        assert outcome(data, now=datetime(2026, 5, 31, 23, tzinfo=UTC)) == ["embedded"]

    def test_trust_comes_before_the_licence(self) -> None:
        assert reason_of(self.licensed("2026-05-31"), trust=TrustRoots()) is Reason.SIGNER_NOT_TRUSTED

    def test_a_licence_says_what_it_says_and_no_more(self) -> None:
        with pytest.raises(HocketError) as refusal:
            open_at_noon(self.licensed("\x1b[2J" + "x" * 1000))

        assert refusal.value.metadata["digest"] == digest_of(self.licensed("\x1b[2J" + "x" * 1000))
        assert refusal.value.message.isprintable()
        assert len(refusal.value.message) < 250

    def test_an_inspection_refuses_no_licence(self) -> None:
        assert inspect_package(self.licensed("2020-01-01"), now=NOW).facts.metadata["license"]["seats"] == 1


@pytest.mark.skipif(not SIGNED_FILES, reason="set HOCKET_FIXTURES to the folder of genuine files")
@pytest.mark.parametrize("name", SIGNED_FILES)
def test_the_signatures_of_the_reference_verify_under_its_key(name: str) -> None:
    public_key = bytes.fromhex(MANIFEST["signing_public_key"])
    assert public_key_of(bytes.fromhex(MANIFEST["signing_seed"])) == public_key
    trust = TrustRoots.of([TrustedKey(public_key, "reference")])
    data = (REFERENCE / name).read_bytes()
    embedded = inspect_package(data, trust=trust, now=NOW).embedded
    assert embedded == EmbeddedFacts(present=True, key_id=key_id_of(public_key), verified=True, trusted=True)
    # Its signature alone proves the file: what is refused now is refused for its content.
    assert outcome(data, trust=trust) in (["embedded"], Reason.ENCRYPTED, Reason.UNSUPPORTED_LAYOUT)
    assert reason_of(data, trust=TrustRoots()) is Reason.SIGNER_NOT_TRUSTED


@pytest.mark.skipif(not SIGNED_FILES, reason="set HOCKET_FIXTURES to the folder of genuine files")
def test_an_edited_signature_of_the_reference_is_refused() -> None:
    trust = TrustRoots.of([TrustedKey(bytes.fromhex(MANIFEST["signing_public_key"]), "reference")])
    data = (REFERENCE / "edge_signed_sig_edit.apr").read_bytes()
    assert reason_of(data, trust=trust) is Reason.SIGNATURE_INVALID
