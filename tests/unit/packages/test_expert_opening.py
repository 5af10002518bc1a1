from __future__ import annotations

from typing import Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, digest_of
from hocket.packages import (
    EmbeddedFacts,
    Limits,
    Package,
    Policy,
    Proof,
    ReleaseFacts,
    check_release_name,
    expert,
    inspect_package,
    open_package,
)
from hocket.packages.adapter import Adapter, AdapterFacts
from tests.builders import apr_bytes
from tests.experts import archived, expert_files, expert_package, signed_upstream
from tests.signing import ACME_ID, NOW, STRANGER_SEED, envelope_of, roots

NAME = "acme/expert-sql@1.0.0"
DATA = expert_package()
UNSIGNED_POLICY = Policy(allow_unsigned=True)


def released(data: bytes = DATA, name: str = NAME, **changes: Any) -> bytes:
    return envelope_of(data, name=name, **{"format": "expert", **changes})


def opened(data: bytes, *releases: bytes, **options: Any) -> Package:
    return open_package(data, releases=releases, **{"trust": roots(), "now": NOW, **options})


def reason_of(data: bytes, *releases: bytes, **options: Any) -> Reason:
    with pytest.raises(HocketError) as refusal:
        opened(data, *releases, **options)
    return refusal.value.reason


def test_a_released_expert_opens() -> None:
    envelope = released()
    package = opened(DATA, envelope)

    assert isinstance(package.facts, AdapterFacts)
    assert isinstance(package.model, Adapter)
    assert package.facts.digest == digest_of(DATA)
    assert package.provenance.proofs == (Proof("release", ACME_ID, "acme", ReleaseName.parse(NAME), envelope),)
    assert package.provenance.embedded == EmbeddedFacts()


def test_the_operator_may_accept_one_that_nobody_signed() -> None:
    assert reason_of(DATA) is Reason.UNSIGNED
    assert [proof.kind for proof in opened(DATA, policy=UNSIGNED_POLICY).provenance.proofs] == ["policy"]


def test_a_release_of_the_other_format_is_refused() -> None:
    assert reason_of(DATA, released(format="apr")) is Reason.BAD_RELEASE
    assert reason_of(apr_bytes(), envelope_of(apr_bytes(), format="expert")) is Reason.BAD_RELEASE


def test_upstream_s_signature_is_no_proof() -> None:
    signed = archived(signed_upstream(expert_files()))
    assert reason_of(signed) is Reason.UNSIGNED

    broken = archived({**signed_upstream(expert_files()), "more.txt": b""})
    assert opened(broken, released(broken)).facts.digest == digest_of(broken)


@pytest.mark.parametrize("releases", [(), (b"{}",), (envelope_of(DATA, STRANGER_SEED, NAME, format="expert"),)])
def test_nothing_is_decompressed_before_somebody_trusted_vouches(
    releases: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = []
    real = expert.decode

    def decode(*arguments: Any) -> Any:
        touched.append("decoded")
        return real(*arguments)

    monkeypatch.setattr(expert, "decode", decode)
    with pytest.raises(HocketError):
        opened(DATA, *releases)
    assert touched == []
    opened(DATA, released())
    assert touched == ["decoded"]


@pytest.mark.parametrize("damage", [DATA[:-9], DATA + b"x"])
def test_a_damaged_archive_is_refused_after_its_proof(damage: bytes) -> None:
    assert reason_of(damage) is Reason.UNSIGNED
    assert reason_of(damage, released(damage)) is Reason.BAD_ARCHIVE


def test_limits_hold_for_its_contents() -> None:
    assert reason_of(DATA, released(), limits=Limits(archive_files=2)) is Reason.TOO_LARGE
    opened(DATA, released(), limits=Limits(archive_files=3))


def test_what_is_of_no_format_is_refused() -> None:
    assert reason_of(b"nonsense" * 9) is Reason.BAD_MAGIC


def test_inspecting_shows_all_of_it_and_believes_nothing() -> None:
    shown = inspect_package(DATA, [released()], trust=roots(), now=NOW)
    assert isinstance(shown.facts, AdapterFacts)
    assert shown.facts.name == "expert-sql"
    assert shown.embedded == EmbeddedFacts()
    [release] = shown.releases
    assert isinstance(release, ReleaseFacts)
    assert release.refused is None

    [release] = inspect_package(DATA, [released()], now=NOW).releases
    assert release.refused is Reason.SIGNER_NOT_TRUSTED


def test_inspecting_shows_a_release_under_another_name() -> None:
    [release] = inspect_package(DATA, [released(name="acme/expert-sql@2.0.0")], trust=roots(), now=NOW).releases
    assert release.refused is Reason.NAME_MISMATCH


@pytest.mark.parametrize("name", ["acme/sql@1.0.0", "acme/expert-sql@1.0.1"])
def test_a_release_has_the_name_and_version_of_the_manifest(name: str) -> None:
    facts = opened(DATA, released()).facts
    check_release_name(facts, ReleaseName.parse(NAME))
    check_release_name(facts, ReleaseName.parse("zeta/expert-sql@1.0.0"))
    with pytest.raises(HocketError, match=r"the manifest says expert-sql@1\.0\.0") as refusal:
        check_release_name(facts, ReleaseName.parse(name))
    assert refusal.value.reason is Reason.NAME_MISMATCH


def test_an_apr_file_may_have_any_name() -> None:
    data = apr_bytes(name="iris")
    check_release_name(inspect_package(data, now=NOW).facts, ReleaseName.parse(NAME))
