from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.cli import publish
from hocket.errors import HocketError
from hocket.identity import digest_of
from hocket.mixtures import parse_mixture
from hocket.packages import Purpose, read_release
from tests.builders import apr_bytes, linear
from tests.fakes import HIGH, LOW, ScriptedRegistry, expert_package
from tests.signing import ACME_ID, ACME_SEED, envelope_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Two released packages, acme/low@1.0.0 and acme/high@1.0.0."""
    paths = []
    for name, slope in (("low", 1.0), ("high", 2.0)):
        path = tmp_path / f"{name}.apr"
        data = apr_bytes(linear(slope, slope))
        path.write_bytes(data)
        path.with_name(f"{name}.apr.release.json").write_bytes(envelope_of(data, name=f"acme/{name}@1.0.0"))
        paths.append(path)
    return paths


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "acme.key"
    path.write_bytes(ACME_SEED)
    path.chmod(0o600)
    return path


@pytest.fixture
def draft(tmp_path: Path, packages: list[Path]) -> Path:
    """A mixture of both packages behind a softmax gate."""
    assert packages
    np.save(tmp_path / "gate.npy", np.eye(2))
    path = tmp_path / "digits.toml"
    path.write_text(
        'name = "digits"\nlabels = ["0", "1"]\n'
        '[[members]]\nexpert = "acme/low@1.0.0"\n[[members]]\nexpert = "high.apr"\n'
        '[gate]\nkind = "softmax"\nweights = "gate.npy"\n'
    )
    return path


def test_publish_uploads_each_file_with_the_release_beside_it(
    hocket: Any, packages: list[Path], registry: ScriptedRegistry
) -> None:
    outcome = hocket("publish", *packages, "--json")

    assert outcome.code == 0
    assert [line["created"] for line in outcome.lines] == [True, True]
    assert [line["package"]["digest"] for line in outcome.lines] == [digest_of(path.read_bytes()) for path in packages]
    assert [line["file"] for line in outcome.lines] == [str(path) for path in packages]
    assert outcome.lines[0]["package"]["releases"][0]["name"] == "low"
    assert list(registry.blobs.values()) == [path.read_bytes() for path in packages]


def test_publish_says_when_it_was_already_there(hocket: Any, packages: list[Path]) -> None:
    assert "published: acme/low@1.0.0, sha256:" in hocket("publish", packages[0]).out
    assert "was already there: acme/low@1.0.0" in hocket("publish", packages[0]).out


def test_publish_without_a_release_leaves_the_judgement_to_the_registry(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.apr"
    path.write_bytes(apr_bytes())
    out = hocket("publish", path).out

    assert "addressable by digest only" in out
    assert "UNSIGNED" in out


def test_the_token_is_read_from_a_file(hocket: Any, packages: list[Path], tmp_path: Path) -> None:
    token = tmp_path / "admin.token"
    token.write_text("0123456789abcdef\n")
    assert hocket("publish", packages[0], "--token-file", token).code == 0

    token.write_text("short")
    outcome = hocket("publish", packages[0], "--token-file", token, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_a_registry_that_is_not_there_is_said_so(hocket: Any, packages: list[Path]) -> None:
    outcome = hocket("publish", packages[0], "--registry", "127.0.0.1:1", "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "UNREACHABLE")


def test_publish_says_which_file_failed_and_which_were_not_tried(
    hocket: Any, packages: list[Path], tmp_path: Path
) -> None:
    missing = tmp_path / "missing.apr"
    outcome = hocket("publish", packages[0], missing, packages[1], "--json")

    assert outcome.code == 2
    assert outcome.lines[0]["file"] == str(packages[0])
    error = outcome.lines[1]["error"]
    assert (error["reason"], error["file"]) == ("BAD_REQUEST", str(missing))
    assert f"not tried: {packages[1]}" in error["message"]


def test_uploads_have_a_progress_bar_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with publish.upload_progress("x", shown=True) as on_progress:
        assert on_progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with publish.upload_progress("x", shown=False) as on_progress:
        assert on_progress is None
    with publish.upload_progress("[x]", shown=True) as on_progress:
        assert on_progress is not None
        on_progress(1, 2)


def test_experts_are_listed(hocket: Any, registry: ScriptedRegistry) -> None:
    assert "No packages yet" in hocket("experts", "list").out
    registry.packages[LOW] = expert_package(LOW, "low", output_range={"lower": 0, "upper": 1})
    many = expert_package(HIGH, "high", expert_layout="Ridge")
    many.model.expert_count = 4
    del many.releases[:], many.model.columns[:]
    many.embedded_signature.key_id = "cd" * 32
    many.unsigned_by_policy = True
    registry.packages[HIGH] = many

    listed = hocket("experts", "list").out
    for text in ("acme/low@1.0.0", "LogisticRegression", "0, 1", "active"):
        assert text in listed
    for text in ("sha256:222222222222", "4 x Ridge", "one number", "active, UNSIGNED"):
        assert text in listed
    card = hocket("experts", "show", HIGH, "--router", "127.0.0.1:1").out
    assert "inside (cdcdcdcdcdcd, not trusted), NOBODY (policy)" in card
    outcome = hocket("experts", "list", "--publisher", "acme", "--json")
    assert [package["digest"] for package in outcome.document["packages"]] == [LOW]


@pytest.mark.usefixtures("router_address")
def test_an_expert_is_shown_with_the_workers_that_hold_it(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[LOW] = expert_package(LOW, "low", output_range={"lower": 0, "upper": 1})

    card = hocket("experts", "show", "acme/low@1.0.0").out
    for text in (LOW, "worker-a", "2 features", "0 to 1", "acme/low@1.0.0"):
        assert text in card
    shown = hocket("experts", "show", LOW, "--json").document
    assert shown["resident_workers"] == ["worker-a"]
    assert shown["model"]["layout"] == "LogisticRegression"


def test_without_a_router_an_expert_is_shown_all_the_same(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[LOW] = expert_package(LOW, "low")
    nowhere = ("--router", "127.0.0.1:1")

    assert "the router cannot tell" in hocket("experts", "show", LOW, *nowhere).out
    assert hocket("experts", "show", LOW, *nowhere, "--json").document["resident_workers"] is None
    assert hocket("experts", "show", HIGH, *nowhere, "--json").document["error"]["reason"] == "UNKNOWN_PACKAGE"


def test_yank_withdraws_by_digest_or_name(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[HIGH] = expert_package(HIGH, "high")

    assert hocket("yank", LOW, "--yes", "--json").document["state"] == "TRUST_STATE_YANKED"
    assert f"{HIGH} is withdrawn" in hocket("yank", "acme/high@1.0.0", "--yes", "--explanation", "wrong").out
    assert registry.withdrawn == {LOW: "", HIGH: "wrong"}
    assert hocket("yank", "acme/none@1.0.0", "--json").document["error"]["reason"] == "UNKNOWN_PACKAGE"


def test_revoke_key_names_what_it_withdrew(hocket: Any, registry: ScriptedRegistry) -> None:
    out = hocket("revoke-key", "ab" * 32, "--yes", "--explanation", "stolen").out
    assert f"{LOW} has no other proof" in out
    assert f"hocket trust remove {'ab' * 32}" in out
    assert hocket("revoke-key", "ab" * 32, "--yes", "--json").document["withdrawn_digests"] == [LOW]
    assert list(registry.withdrawn) == ["ab" * 32]


def test_revoke_key_takes_what_is_printed_of_a_key_id(hocket: Any, registry: ScriptedRegistry, key: Path) -> None:
    registry.packages[LOW] = expert_package(LOW, "low")
    registry.packages[HIGH] = expert_package(HIGH, "high")
    registry.packages[HIGH].embedded_signature.key_id = "cd" * 32
    for written in ("ab" * 6, "cd" * 10, key):
        assert hocket("revoke-key", written, "--yes").code == 0
    assert list(registry.withdrawn) == ["ab" * 32, "cd" * 32, ACME_ID]

    outcome = hocket("revoke-key", "ef" * 6, "--yes", "--json")
    assert outcome.document["error"]["reason"] == "SIGNER_NOT_TRUSTED"
    registry.packages[HIGH].embedded_signature.key_id = "ab" * 31 + "ff"
    outcome = hocket("revoke-key", "ab" * 6, "--yes", "--json")
    assert "several key ids begin with" in outcome.document["error"]["message"]


@pytest.mark.parametrize("arguments", [("yank", LOW), ("revoke-key", "ab" * 32)])
def test_a_script_says_yes_before_anything_final(
    hocket: Any, registry: ScriptedRegistry, arguments: tuple[str, ...]
) -> None:
    for options in ((), ("--json",)):
        outcome = hocket(*arguments, *options)
        assert outcome.code == 2
        assert "add --yes" in outcome.err + outcome.out
    assert registry.withdrawn == {}


def test_a_name_that_is_nearly_right_gets_a_suggestion(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[HIGH] = expert_package(HIGH, "high")
    for written in ("acme/hihg@1.0.0", "high"):
        for verb in (("experts", "show"), ("yank", "--yes")):
            assert "did you mean acme/high@1.0.0?" in hocket(*verb, written).err
    assert "did you mean" not in hocket("experts", "show", "zeta/other@3").err


def test_nothing_of_a_publisher_is_said_so(hocket: Any) -> None:
    assert "No packages released by nobody" in hocket("experts", "list", "--publisher", "nobody").out


def test_a_person_at_a_terminal_is_asked_before_anything_final(monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []
    answers = iter([True, False])

    def confirm(question: str, **_options: Any) -> bool:
        questions.append(question)
        return next(answers)

    monkeypatch.setattr("typer.confirm", confirm)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    publish._ask("Sure?", yes=True)
    assert questions == []

    publish._ask("Sure?", yes=False)
    assert questions == ["Sure?"]
    with pytest.raises(HocketError, match="nothing was changed"):
        publish._ask("Sure?", yes=False)


def test_a_mixture_is_resolved_signed_and_put(
    hocket: Any, packages: list[Path], draft: Path, key: Path, registry: ScriptedRegistry
) -> None:
    hocket("publish", *packages)
    arguments = ("mixtures", "put", draft, "--publisher", "acme", "--version", "1.0.0", "--key", key)
    outcome = hocket(*arguments, "--json")

    assert outcome.code == 0
    header, gate = registry.mixtures["digits"]
    record = parse_mixture(header.body)
    assert outcome.document["digest"] == record.digest
    assert [str(member) for member in record.members] == [digest_of(path.read_bytes()) for path in packages]
    assert gate == np.eye(2, dtype=np.float32).tobytes()
    release = read_release(header.release).release
    assert str(release.name) == "acme/digits@1.0.0"
    assert (release.subject.purpose, release.subject.digest) == (Purpose.MIXTURE, record.digest)
    assert f"digits is {record.digest}" in hocket(*arguments).out


def test_a_mixture_is_unsigned_only_when_asked_for(
    hocket: Any, packages: list[Path], draft: Path, registry: ScriptedRegistry
) -> None:
    hocket("publish", *packages)
    outcome = hocket("mixtures", "put", draft, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")

    assert hocket("mixtures", "put", draft, "--unsigned", "--etag", LOW).code == 0
    header, _ = registry.mixtures["digits"]
    assert (header.release, header.etag) == (b"", LOW)


def test_a_mixture_of_what_is_not_there_is_refused(hocket: Any, draft: Path) -> None:
    outcome = hocket("mixtures", "put", draft, "--unsigned", "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "UNKNOWN_PACKAGE")


def test_a_mixture_is_deleted_by_name(hocket: Any, packages: list[Path], draft: Path) -> None:
    hocket("publish", *packages)
    hocket("mixtures", "put", draft, "--unsigned")

    assert hocket("mixtures", "delete", "digits", "--json").document == {"name": "digits", "revision": 12}
    assert hocket("mixtures", "delete", "digits", "--json").document["error"]["reason"] == "UNKNOWN_MIXTURE"
    hocket("mixtures", "put", draft, "--unsigned")
    assert hocket("mixtures", "delete", "digits").out == "digits is deleted\n"


@pytest.mark.usefixtures("router_address")
def test_mixtures_are_listed_and_shown(hocket: Any) -> None:
    listed = hocket("mixtures", "list").out
    assert "digits" in listed
    assert "fruit" in listed
    names = [mixture["name"] for mixture in hocket("mixtures", "list", "--json").document["mixtures"]]
    assert names == ["digits", "fruit"]

    card = hocket("mixtures", "show", "digits").out
    for text in (
        "softmax, 2 of the members it weighs answer a row",
        "1.5",
        "acme/digits@1.0.0",
        "acme/low@1.0.0",
        "worker-a",
        "0 to 1",
    ):
        assert text in card
    shown = hocket("mixtures", "show", "digits", "--json").document
    assert [member["expert"] for member in shown["members"]] == [LOW, HIGH]
    json.dumps(shown)
    assert hocket("mixtures", "show", "none", "--json").document["error"]["reason"] == "UNKNOWN_MODEL"
