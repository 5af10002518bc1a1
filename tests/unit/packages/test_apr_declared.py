"""What an encrypted package declares of its model: written by us, believed for routing, compared by who decrypts."""

from __future__ import annotations

from typing import Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import (
    Limits,
    Password,
    Policy,
    RecipientKey,
    TrustRoots,
    apr,
    describe_package,
    inspect_package,
    open_package,
)
from hocket.packages.apr.declared import FIELDS, declare
from hocket.packages.apr.encryption import seal
from hocket.packages.apr.header import Flag
from hocket.packages.keys import verify
from hocket.packages.model import KMeans, LinearRegression, ModelFacts
from tests import builders
from tests.signing import ACME_SEED, NOW, ZETA_SEED, envelope_of, roots, trusted

KEY = RecipientKey(b"\x09" * 32)
PASSWORD = Password("hunter2")
ANYBODY = Policy(allow_unsigned=True)


def encrypted(model: Any = None, **options: Any) -> bytes:
    return builders.apr_bytes(model, **{"encryption": KEY.recipient, **options})


def decoded(data: bytes, credential: Any = KEY) -> tuple[Any, Any]:
    return apr.decode(apr.split(data), digest_of(data), credential=credential)


def described(data: bytes) -> Any:
    return apr.describe(apr.split(data), digest_of(data))


def reason_of(call: Any, *arguments: Any, **options: Any) -> Reason:
    with pytest.raises(HocketError) as caught:
        call(*arguments, **options)
    return caught.value.reason


def told(data: bytes, **changes: Any) -> bytes:
    """An encrypted file whose metadata declares something else; None takes a key away."""
    container = apr.split(data)
    metadata = dict(described(data).metadata)
    own = {**metadata["custom"]["hocket"], **changes}
    kept = {key: value for key, value in own.items() if value is not None}
    metadata["custom"] = {**metadata["custom"], "hocket": kept}
    header = container.header
    return builders.raw_apr(
        bytes(container.payload),
        metadata,
        model_type_id=header.model_type_id,
        uncompressed_bytes=header.uncompressed_bytes,
        compression_id=header.compression_id,
        flags=header.flags,
    )


@pytest.mark.parametrize("name", sorted(builders.models()))
def test_a_model_of_every_layout_is_declared_as_it_is(name: str) -> None:
    model = builders.models()[name]
    data = encrypted(model)

    claims, (facts, read) = described(data), decoded(data)

    assert builders.same(read, model)
    assert {key: getattr(claims, key) for key in FIELDS} == {key: getattr(facts, key) for key in FIELDS}
    assert claims.not_servable is None
    assert (claims.encrypted, claims.flags) == (True, ("ENCRYPTED",))


def test_a_password_encrypts_as_well() -> None:
    data = encrypted(encryption=PASSWORD)

    assert builders.same(decoded(data, PASSWORD)[1], builders.linear())
    assert reason_of(decoded, data, None) is Reason.ENCRYPTED
    assert reason_of(decoded, data, Password("hunter3")) is Reason.DECRYPTION_FAILED
    assert reason_of(decoded, data, KEY) is Reason.WRONG_RECIPIENT


def test_nothing_of_the_model_is_left_in_the_clear() -> None:
    model = builders.linear(1234.5, -0.03125, 77.0)
    clear, closed = builders.apr_bytes(model, compression="none"), encrypted(model, compression="none")

    weights = bytes(apr.split(clear).payload[9:21])
    assert weights in clear
    assert weights not in closed


def test_what_is_encrypted_is_signed_as_it_is_stored() -> None:
    container = apr.split(encrypted(signing=builders.signer(ACME_SEED)))

    assert container.header.flags == Flag.ENCRYPTED | Flag.SIGNED
    assert container.signature is not None
    verify(container.signature.public_key, container.signed_bytes, container.signature.signature)
    assert builders.same(apr.decode(container, "sha256:", credential=KEY)[1], builders.linear())


def test_the_metadata_that_was_given_is_kept_and_completed() -> None:
    metadata = {**builders.METADATA, "custom": {"site": "Bern", "hocket": {"labels": ["a", None]}}, "description": "x"}
    facts, _ = decoded(encrypted(builders.logistic(), metadata=metadata))

    assert [*facts.metadata] == [*metadata]
    assert facts.metadata["custom"]["site"] == "Bern"
    assert facts.metadata["custom"]["hocket"] == {
        "expert_count": 1,
        "labels": ["a", None],
        "layout": "LogisticRegression",
        "n_features": 2,
        "n_features_min": 2,
        "output_columns": 2,
        "output_range": [0.0, 1.0],
        "parameter_bytes": 16,
    }


def test_a_model_that_cannot_answer_is_not_declared() -> None:
    data = encrypted(LinearRegression(None, 0.0), metadata={**builders.METADATA, "custom": {"hocket": {"x": 1}}})

    assert described(data).metadata["custom"]["hocket"] == {"x": 1}
    assert decoded(data)[0].not_servable is not None
    assert reason_of(describe_package, data, trust=TrustRoots(), policy=ANYBODY, now=NOW) is Reason.ENCRYPTED


def test_stale_declarations_are_replaced() -> None:
    stale = declare(builders.METADATA, decoded(encrypted(builders.mixture()))[0])
    facts, _ = decoded(encrypted(builders.mixture(*[builders.linear()] * 3), metadata=stale))

    assert facts.metadata["custom"]["hocket"]["expert_count"] == facts.expert_count == 3


LIES: list[tuple[str, dict[str, Any]]] = [
    ("LogisticRegression", {"parameter_bytes": 15}),
    ("LogisticRegression", {"expert_count": 2}),
    ("LogisticRegression", {"n_features": 3, "n_features_min": 3}),
    ("LogisticRegression", {"n_features": None}),
    ("LogisticRegression", {"n_features_min": 1}),
    ("LogisticRegression", {"output_range": [0.0, 2.0]}),
    ("LogisticRegression", {"output_range": None}),
    ("LogisticRegression", {"labels": None, "output_columns": 1}),
    ("LogisticRegression", {"labels": ["0", "1", "2"], "output_columns": 3}),
    ("LinearRegression", {"output_columns": 2}),
    ("LinearRegression", {"output_range": [0.0, 1.0]}),
    ("MixtureOfExperts", {"expert_count": 1}),
    ("MixtureOfExperts", {"expert_layout": None}),
]


@pytest.mark.parametrize(("layout", "lie"), LIES)
def test_a_model_that_is_declared_otherwise_than_it_is_is_refused(layout: str, lie: dict[str, Any]) -> None:
    honest = encrypted(builders.models()[layout])
    liar = told(honest, **lie)

    assert described(liar).not_servable is None  # nobody can know
    assert reason_of(decoded, liar) is Reason.BAD_METADATA
    decoded(told(honest))


def test_a_declaration_is_compared_in_the_clear_too() -> None:
    metadata = declare(builders.METADATA, decoded(encrypted())[0])
    builders.apr_bytes(metadata=metadata)
    metadata["custom"]["hocket"]["parameter_bytes"] += 1
    assert reason_of(builders.apr_bytes, metadata=metadata) is Reason.BAD_METADATA


IMPOSSIBLE: list[tuple[dict[str, Any], Reason]] = [
    ({"layout": None}, Reason.BAD_METADATA),
    ({"layout": "Transformer"}, Reason.UNSUPPORTED_LAYOUT),
    ({"parameter_bytes": -1}, Reason.BAD_METADATA),
    ({"parameter_bytes": True}, Reason.BAD_METADATA),
    ({"parameter_bytes": 16.0}, Reason.BAD_METADATA),
    ({"parameter_bytes": 2**63}, Reason.TOO_LARGE),
    ({"expert_count": 0}, Reason.BAD_METADATA),
    ({"expert_count": 2**14 + 1}, Reason.TOO_LARGE),
    ({"n_features": 0}, Reason.BAD_METADATA),
    ({"n_features": 2**21 + 1}, Reason.TOO_LARGE),
    ({"n_features_min": None}, Reason.BAD_METADATA),
    ({"n_features_min": 3}, Reason.TOO_LARGE),
    ({"output_columns": 3}, Reason.BAD_METADATA),
    ({"output_columns": 2**16 + 1, "labels": None}, Reason.TOO_LARGE),
    ({"labels": []}, Reason.BAD_METADATA),
    ({"labels": "ab"}, Reason.BAD_METADATA),
    ({"labels": ["a", "a"]}, Reason.BAD_METADATA),
    ({"labels": ["a", ["b"]]}, Reason.BAD_METADATA),
    ({"labels": ["a", "b" * 257]}, Reason.TOO_LARGE),
    ({"output_range": [1.0, 0.0]}, Reason.BAD_METADATA),
    ({"output_range": [0.0]}, Reason.BAD_METADATA),
    ({"output_range": [0, 1]}, Reason.BAD_METADATA),
    ({"output_range": "wide"}, Reason.BAD_METADATA),
]


@pytest.mark.parametrize(("claim", "reason"), IMPOSSIBLE)
def test_a_declaration_that_no_model_could_fulfil_is_refused(claim: dict[str, Any], reason: Reason) -> None:
    honest = encrypted(builders.logistic())

    assert reason_of(described, told(honest, **claim)) is reason
    described(told(honest))


@pytest.mark.parametrize("custom", ["text", ["list"], {"hocket": "text"}])
def test_metadata_that_cannot_be_declared_in_is_refused(custom: Any) -> None:
    assert reason_of(encrypted, metadata={**builders.METADATA, "custom": custom}) is Reason.BAD_METADATA


def test_labels_are_bounded_before_they_are_looked_at() -> None:
    data = encrypted(KMeans(3, builders.floats([0, 1], [2, 3], [4, 5])))
    container = apr.split(data)

    assert reason_of(apr.describe, container, "", Limits(labels=2)) is Reason.TOO_LARGE
    apr.describe(container, "", Limits(labels=3))


class TestPackages:
    DATA = encrypted(builders.logistic(), labels=["yes", "no"], signing=builders.signer(ZETA_SEED))
    RELEASE = envelope_of(DATA, name="acme/iris@1.0.0")
    DIGEST = digest_of(DATA)

    def open(self, data: bytes = DATA, **options: Any) -> Any:
        defaults = {"releases": (self.RELEASE,), "trust": roots(), "now": NOW}
        return open_package(data, **{**defaults, **options})

    def test_a_registry_describes_what_it_cannot_open(self) -> None:
        found = describe_package(self.DATA, releases=(self.RELEASE,), trust=roots(), now=NOW)

        assert found.model is None
        assert isinstance(found.facts, ModelFacts)
        assert found.facts.labels == ("yes", "no")
        assert [proof.kind for proof in found.provenance.proofs] == ["release", "embedded"]

    def test_whoever_describes_trusts_no_more_than_who_opens(self) -> None:
        assert reason_of(describe_package, self.DATA, trust=TrustRoots(), now=NOW) is Reason.SIGNER_NOT_TRUSTED
        altered = builders.edited(self.DATA, len(self.DATA) - 150, b"\x00\x01")
        assert reason_of(describe_package, altered, trust=roots(), now=NOW) is Reason.SIGNATURE_INVALID
        assert reason_of(describe_package, self.DATA, trust=roots(), now=NOW, digest="sha256:0") is (
            Reason.DIGEST_MISMATCH
        )

    def test_what_is_in_the_clear_is_described_with_its_model(self) -> None:
        data = builders.apr_bytes()
        found = describe_package(data, trust=roots(), policy=ANYBODY, now=NOW)
        assert builders.same(found.model, builders.linear())

    @pytest.mark.parametrize("address", [DIGEST, "acme/iris"], ids=["digest", "name"])  # each process has its own
    def test_a_credential_is_found_by_digest_and_by_released_name(self, address: str) -> None:
        assert self.open(credentials={address: KEY}).facts.labels == ("yes", "no")

    @pytest.mark.parametrize("address", ["acme/iris@1.0.0", "zeta/iris", "acme/other", "iris", "sha256:" + "0" * 64])
    def test_a_credential_for_something_else_opens_nothing(self, address: str) -> None:
        assert reason_of(self.open, credentials={address: KEY}) is Reason.ENCRYPTED

    def test_a_name_that_is_not_proven_opens_nothing(self) -> None:
        options = {"credentials": {"acme/iris": KEY}, "trust": roots()}
        assert reason_of(self.open, releases=(), **options) is Reason.ENCRYPTED
        zeta_alone = type(roots()).of([trusted(ZETA_SEED, "zeta")])
        assert reason_of(self.open, credentials={"acme/iris": KEY}, trust=zeta_alone) is Reason.ENCRYPTED
        self.open(credentials={self.DIGEST: KEY}, trust=zeta_alone)

    def test_the_digest_goes_first_and_nothing_else_is_tried(self) -> None:
        other = RecipientKey(b"\x0a" * 32)
        assert self.open(credentials={self.DIGEST: KEY, "acme/iris": other})
        assert reason_of(self.open, credentials={self.DIGEST: other, "acme/iris": KEY}) is Reason.WRONG_RECIPIENT

    def test_trust_comes_before_any_credential(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hocket.packages.apr.reader.unseal", lambda *_: pytest.fail("decrypted before trust"))
        credentials = {self.DIGEST: KEY, "acme/iris": KEY}
        assert reason_of(self.open, credentials=credentials, trust=TrustRoots()) is Reason.SIGNER_NOT_TRUSTED

    def test_what_it_declares_is_shown(self) -> None:
        facts = inspect_package(self.DATA, now=NOW).facts
        assert isinstance(facts, ModelFacts)
        assert facts.labels == ("yes", "no")

    def test_an_encrypted_file_that_declares_nothing_is_shown_and_not_described(self) -> None:
        data = builders.raw_apr(seal(b"x" * 22, KEY.recipient), flags=Flag.ENCRYPTED, uncompressed_bytes=22)
        facts = inspect_package(data, now=NOW).facts
        assert isinstance(facts, ModelFacts)
        assert facts.layout is None
        assert facts.not_servable is not None
        assert reason_of(describe_package, data, trust=roots(), policy=ANYBODY, now=NOW) is Reason.ENCRYPTED
