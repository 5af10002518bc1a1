from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined] # it has no __all__

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, key_id_of
from hocket.packages.keys import public_key_of
from hocket.packages.release import (
    ENVELOPE_SIZE_BYTES_MAX,
    Purpose,
    Subject,
    read_release,
    sign_release,
    verify_release,
)
from hocket.packages.trust import Proof, TrustRoots
from tests.signing import (
    ACME_ID,
    ACME_SEED,
    NOW,
    STRANGER_SEED,
    ZETA_SEED,
    envelope_of,
    release_of,
    roots,
    seal,
    statement_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = b"the bytes of a package"
SUBJECT = Subject.of(Purpose.PACKAGE, DATA, "apr")
ENVELOPE = envelope_of(DATA)


def check(envelope: bytes, subject: Subject = SUBJECT, trust: TrustRoots | None = None, **options: Any) -> Proof:
    return verify_release(envelope, subject, trust=roots() if trust is None else trust, now=NOW, **options)


def reason_of(envelope: bytes, *args: Any, **options: Any) -> Reason:
    with pytest.raises(HocketError) as refusal:
        check(envelope, *args, **options)
    return refusal.value.reason


def edited(edit: Callable[[dict[str, Any]], object], envelope: bytes = ENVELOPE) -> bytes:
    """The envelope with its JSON changed after signing."""
    document = json.loads(envelope)
    edit(document)
    return json.dumps(document).encode()


def restated(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """An envelope whose statement was changed before a trusted key signed it."""
    statement = statement_of(ENVELOPE)
    edit(statement)
    return seal(json.dumps(statement).encode())


class TestForm:
    def test_a_release_is_a_dsse_envelope_of_an_in_toto_statement(self) -> None:
        document = json.loads(ENVELOPE)
        assert document["payloadType"] == "application/vnd.in-toto+json"
        assert [item["keyid"] for item in document["signatures"]] == [ACME_ID]
        assert statement_of(ENVELOPE) == {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"digest": {"sha256": SUBJECT.digest.removeprefix("sha256:")}}],
            "predicateType": "urn:hocket:release:package:v1",
            "predicate": {
                "publisher": "acme",
                "name": "iris",
                "version": "1.0.0",
                "size": len(DATA),
                "format": "apr",
            },
        }

    def test_another_dsse_implementation_verifies_it(self) -> None:
        key = SSlibKey(ACME_ID, "ed25519", "ed25519", {"public": public_key_of(ACME_SEED).hex()})
        assert Envelope.from_dict(json.loads(ENVELOPE)).verify([key], 1) == {ACME_ID: key}

    def test_an_envelope_made_by_other_code_verifies_here(self) -> None:
        assert check(seal(json.dumps(statement_of(ENVELOPE), indent=2).encode())).release is not None

    def test_signing_twice_gives_the_same_bytes(self) -> None:
        assert envelope_of(DATA) == ENVELOPE

    def test_reading_shows_the_claim_and_asks_for_no_trust(self) -> None:
        claimed = read_release(envelope_of(DATA, STRANGER_SEED))
        assert claimed.release == release_of(DATA)
        assert claimed.key_id == key_id_of(public_key_of(STRANGER_SEED))

    @pytest.mark.parametrize(
        "changes",
        [
            {"digest": SUBJECT.digest.removeprefix("sha256:")},
            {"digest": "md5:" + "0" * 32},
            {"size_bytes": -1},
            {"size_bytes": 2**53},
            {"format": "APR"},
            {"format": ""},
        ],
    )
    def test_what_could_not_be_read_is_not_signed(self, changes: dict[str, Any]) -> None:
        with pytest.raises(HocketError) as refusal:
            envelope_of(DATA, **changes)
        assert refusal.value.reason is Reason.BAD_RELEASE

    def test_a_name_that_is_none_is_not_signed(self) -> None:
        release = release_of(DATA)
        for name in (ReleaseName("acme", "../x", "1"), ReleaseName("", "x", "1"), ReleaseName("acme", "x", " ")):
            with pytest.raises(HocketError) as refusal:
                sign_release(type(release)(name, release.subject), ACME_SEED)
            assert refusal.value.reason is Reason.BAD_RELEASE


class TestProof:
    def test_a_release_by_a_trusted_key_proves_its_subject(self) -> None:
        assert check(ENVELOPE) == Proof("release", ACME_ID, "acme", ReleaseName("acme", "iris", "1.0.0"), ENVELOPE)

    def test_a_mixture_is_released_under_its_own_purpose(self) -> None:
        subject = Subject.of(Purpose.MIXTURE, DATA, "mixture")
        envelope = envelope_of(DATA, purpose=Purpose.MIXTURE, format="mixture")
        assert check(envelope, subject).kind == "release"
        assert reason_of(envelope) is Reason.BAD_RELEASE
        assert reason_of(ENVELOPE, subject) is Reason.BAD_RELEASE

    def test_a_release_of_other_bytes_is_refused(self) -> None:
        other = Subject.of(Purpose.PACKAGE, DATA + b"!", "apr")
        assert reason_of(ENVELOPE, other) is Reason.DIGEST_MISMATCH
        with pytest.raises(HocketError, match="the file was changed or damaged, fetch it again; or the release is"):
            check(ENVELOPE, other)
        assert check(envelope_of(DATA + b"!"), other).kind == "release"

    def test_a_release_with_another_size_is_refused(self) -> None:
        assert reason_of(envelope_of(DATA, size_bytes=len(DATA) + 1)) is Reason.BAD_RELEASE

    def test_a_release_of_another_format_is_refused(self) -> None:
        assert reason_of(envelope_of(DATA, format="expert")) is Reason.BAD_RELEASE

    def test_a_release_by_a_stranger_is_refused(self) -> None:
        assert reason_of(envelope_of(DATA, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED

    def test_a_release_by_a_revoked_key_is_refused(self) -> None:
        assert reason_of(ENVELOPE, revoked=frozenset({ACME_ID})) is Reason.KEY_REVOKED

    def test_a_release_by_an_expired_key_is_refused(self) -> None:
        assert reason_of(ENVELOPE, trust=roots(not_after=NOW)) is Reason.KEY_EXPIRED

    def test_a_publisher_cannot_release_in_the_name_of_another(self) -> None:
        assert reason_of(envelope_of(DATA, ZETA_SEED)) is Reason.NAME_NOT_ALLOWED
        assert check(envelope_of(DATA, ZETA_SEED, "zeta/iris@1.0.0")).publisher == "zeta"

    def test_a_key_cannot_release_names_beyond_its_patterns(self) -> None:
        assert reason_of(ENVELOPE, trust=roots(names=("digits-*",))) is Reason.NAME_NOT_ALLOWED
        assert check(ENVELOPE, trust=roots(names=("iri?",))).kind == "release"

    def test_a_forged_signature_is_refused(self) -> None:
        forged = edited(lambda document: document["signatures"][0].update(sig=base64.b64encode(bytes(64)).decode()))
        assert reason_of(forged) is Reason.SIGNATURE_INVALID

    def test_a_signature_under_the_id_of_a_trusted_key_by_another_is_refused(self) -> None:
        forged = edited(
            lambda document: document["signatures"][0].update(keyid=ACME_ID), envelope_of(DATA, STRANGER_SEED)
        )
        assert reason_of(forged) is Reason.SIGNATURE_INVALID

    def test_a_changed_statement_is_refused(self) -> None:
        payload = json.dumps({**statement_of(ENVELOPE), "_type": "x"}).encode()
        changed = edited(lambda document: document.update(payload=base64.b64encode(payload).decode()))
        assert reason_of(changed) is Reason.SIGNATURE_INVALID

    def test_a_signature_of_the_bare_statement_is_refused(self) -> None:
        payload = base64.b64decode(json.loads(ENVELOPE)["payload"])
        bare = json.loads(seal(payload, payload_type="text/plain"))["signatures"]
        assert reason_of(edited(lambda document: document.update(signatures=bare))) is Reason.SIGNATURE_INVALID


class TestNothingIsReadBeforeTheSignature:
    @pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"{", b'{"a":1,"a":2}', b"[" * 9000])
    def test_a_broken_statement_is_reported_only_once_its_signature_is_trusted(self, payload: bytes) -> None:
        assert reason_of(seal(payload, STRANGER_SEED)) is Reason.SIGNER_NOT_TRUSTED
        wrong = edited(lambda document: document["signatures"][0].update(keyid=ACME_ID), seal(payload, STRANGER_SEED))
        assert reason_of(wrong) is Reason.SIGNATURE_INVALID
        assert reason_of(seal(payload)) is Reason.BAD_RELEASE


ENVELOPE_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no payload": lambda document: document.pop("payload"),
    "no payload type": lambda document: document.pop("payloadType"),
    "no signatures": lambda document: document.pop("signatures"),
    "an unknown field": lambda document: document.update(comment=""),
    "a number for a payload": lambda document: document.update(payload=1),
    "another payload type": lambda document: document.update(payloadType="application/json"),
    "signatures not a list": lambda document: document.update(signatures={}),
    "an empty list of signatures": lambda document: document.update(signatures=[]),
    "two signatures": lambda document: document["signatures"].append(document["signatures"][0]),
    "a signature not an object": lambda document: document.update(signatures=["x"]),
    "no keyid": lambda document: document["signatures"][0].pop("keyid"),
    "an empty keyid": lambda document: document["signatures"][0].update(keyid=""),
    "a keyid in capitals": lambda document: document["signatures"][0].update(keyid=ACME_ID.upper()),
    "a null keyid": lambda document: document["signatures"][0].update(keyid=None),
    "no sig": lambda document: document["signatures"][0].pop("sig"),
    "an unknown field of a signature": lambda document: document["signatures"][0].update(cert=""),
    "a short signature": lambda document: document["signatures"][0].update(sig=base64.b64encode(bytes(63)).decode()),
    "base64 with a newline": lambda document: document.update(payload=document["payload"] + "\n"),
    "base64 without padding": lambda document: document["signatures"][0].update(
        sig=document["signatures"][0]["sig"].rstrip("=")
    ),
    "url-safe base64": lambda document: document["signatures"][0].update(
        sig=base64.urlsafe_b64encode(b"\xff" * 64).decode()
    ),
    "base64 beyond ASCII": lambda document: document.update(payload="é" + document["payload"]),
    "base64 with loose last bits": lambda document: document["signatures"][0].update(
        sig=base64.b64encode(bytes(64)).decode()[:-3] + "B=="
    ),
}

STATEMENT_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": lambda statement: statement.update(_type="https://in-toto.io/Statement/v0.1"),
    "an unknown field": lambda statement: statement.update(comment=""),
    "no predicate": lambda statement: statement.pop("predicate"),
    "another predicate type": lambda statement: statement.update(predicateType="https://slsa.dev/provenance/v1"),
    "a list for a predicate type": lambda statement: statement.update(predicateType=[]),
    "no subject": lambda statement: statement.update(subject=[]),
    "two subjects": lambda statement: statement["subject"].append(statement["subject"][0]),
    "a subject not in a list": lambda statement: statement.update(subject=statement["subject"][0]),
    "a subject that is text": lambda statement: statement.update(subject=["x"]),
    "a subject with a name": lambda statement: statement["subject"][0].update(name="iris"),
    "a second digest": lambda statement: statement["subject"][0]["digest"].update(sha512="00" * 64),
    "another digest": lambda statement: statement["subject"][0].update(digest={"sha1": "00" * 20}),
    "a short digest": lambda statement: statement["subject"][0]["digest"].update(sha256="00" * 31),
    "a digest in capitals": lambda statement: statement["subject"][0]["digest"].update(sha256="AB" * 32),
    "a digest with a newline": lambda statement: statement["subject"][0]["digest"].update(sha256="ab" * 32 + "\n"),
    "a null digest": lambda statement: statement["subject"][0]["digest"].update(sha256=None),
    "no version": lambda statement: statement["predicate"].pop("version"),
    "an unknown field of the predicate": lambda statement: statement["predicate"].update(license="MIT"),
    "a path for a name": lambda statement: statement["predicate"].update(name="../iris"),
    "a number for a name": lambda statement: statement["predicate"].update(name=1),
    "a bad publisher": lambda statement: statement["predicate"].update(publisher="Acme"),
    "a bad version": lambda statement: statement["predicate"].update(version="1 0"),
    "text for a size": lambda statement: statement["predicate"].update(size=str(len(DATA))),
    "true for a size": lambda statement: statement["predicate"].update(size=True),
    "a fraction for a size": lambda statement: statement["predicate"].update(size=22.0),
    "infinity for a size": lambda statement: statement["predicate"].update(size=float("inf")),
    "a negative size": lambda statement: statement["predicate"].update(size=-1),
    "a huge size": lambda statement: statement["predicate"].update(size=2**63),
    "a bad format": lambda statement: statement["predicate"].update(format="a/b"),
}


class TestStrictness:
    def test_an_envelope_spelled_with_other_white_space_is_accepted(self) -> None:
        assert check(json.dumps(json.loads(ENVELOPE), indent=4).encode() + b"\n").kind == "release"

    @pytest.mark.parametrize("edit", ENVELOPE_EDITS.values(), ids=ENVELOPE_EDITS)
    def test_an_envelope_of_any_other_form_is_refused(self, edit: Callable[[dict[str, Any]], object]) -> None:
        envelope = edited(edit)
        assert reason_of(envelope) is Reason.BAD_RELEASE
        with pytest.raises(HocketError, match="BAD_RELEASE"):
            read_release(envelope)

    @pytest.mark.parametrize("edit", STATEMENT_EDITS.values(), ids=STATEMENT_EDITS)
    def test_a_signed_statement_of_any_other_form_is_refused(self, edit: Callable[[dict[str, Any]], object]) -> None:
        envelope = restated(edit)
        assert reason_of(envelope) is Reason.BAD_RELEASE
        with pytest.raises(HocketError, match="BAD_RELEASE"):
            read_release(envelope)

    def test_the_unedited_twins_are_accepted(self) -> None:
        assert check(edited(lambda _: None)).kind == "release"
        assert check(restated(lambda _: None)).kind == "release"

    @pytest.mark.parametrize(
        "envelope",
        [
            b"",
            b"null",
            b"[]",
            b"\xef\xbb\xbf" + ENVELOPE,
            ENVELOPE.decode().encode("utf-16"),
            ENVELOPE + b"{}",
            ENVELOPE[:-1] + b',"payload":""}',
            ENVELOPE[:-1] + b',"x":NaN}',
            ENVELOPE[:-1] + b',"x":1e999}',
            b"[" * ENVELOPE_SIZE_BYTES_MAX,
            b'{"a":' * 2000,
            b"9" * 5000,
            b'"\xff"',
        ],
    )
    def test_bytes_that_are_not_strict_json_are_refused(self, envelope: bytes) -> None:
        assert reason_of(envelope) is Reason.BAD_RELEASE

    def test_a_repeated_key_in_a_signed_statement_is_refused(self) -> None:
        payload = base64.b64decode(json.loads(ENVELOPE)["payload"])
        assert check(seal(payload)).kind == "release"
        assert reason_of(seal(payload[:-1] + b',"_type":"https://in-toto.io/Statement/v1"}')) is Reason.BAD_RELEASE

    def test_an_envelope_is_limited_in_size_before_it_is_parsed(self) -> None:
        full = ENVELOPE + b" " * (ENVELOPE_SIZE_BYTES_MAX - len(ENVELOPE))
        assert check(full).kind == "release"
        assert reason_of(full + b" ") is Reason.BAD_RELEASE
