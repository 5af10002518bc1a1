from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from hocket.identity import digest_of, key_id_of, key_text
from hocket.keyring import create_recipient_key
from hocket.packages import Password, Purpose, RecipientKey, public_key_of, read_release
from tests.builders import ABOUT, apr_bytes, edited, forest, logistic, mixture, raw_apr, signer
from tests.signing import ACME_ID, ACME_SEED, envelope_of, release_path

ACME_KEY = key_text(public_key_of(ACME_SEED))
VECTORS = Path(__file__).parents[2] / "vectors" / "reference-0.11.0"
INSPECT_KEYS = {
    "format", "digest", "size", "version", "model_type", "layout", "compression", "flags", "encrypted",
    "signature", "release", "model", "license", "metadata", "sections",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "iris.apr"
    path.write_bytes(apr_bytes(forest(), name="iris", labels=["setosa", "virginica", None]))
    return path


def test_inspect_prints_one_object(hocket: Any, package: Path) -> None:
    data = package.read_bytes()
    outcome = hocket("inspect", package, "--json")
    shown = outcome.document

    assert outcome.code == 0
    assert shown.keys() == INSPECT_KEYS
    assert (shown["format"], shown["version"], shown["size"]) == ("apr", "1.0", len(data))
    assert shown["digest"] == digest_of(data)
    assert shown["model_type"] == {"id": 4, "name": "RandomForest"}
    assert shown["layout"] == "RandomForestClassifier"
    assert shown["compression"] == "zstd"
    assert shown["flags"] == []
    assert shown["encrypted"] is False
    assert shown["signature"] == {"present": False, "key_id": None, "verified": False, "trusted": False}
    assert shown["release"] is None
    assert shown["metadata"]["model_name"] == "iris"
    assert shown["model"]["labels"] == ["setosa", "virginica", None]
    assert sum(section["size"] for section in shown["sections"]) == len(data)


def test_inspect_shows_a_signature_and_whether_it_is_trusted(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "signed.apr"
    path.write_bytes(apr_bytes(signing=signer(ACME_SEED)))
    assert hocket("inspect", path, "--json").document["signature"] == {
        "present": True, "key_id": ACME_ID, "verified": True, "trusted": False,
    }  # fmt: skip

    hocket("trust", "add", "acme", "--key", ACME_KEY)
    assert hocket("inspect", path, "--json").document["signature"]["trusted"]
    assert not hocket("inspect", path, "--trust", tmp_path / "nobody", "--json").document["signature"]["trusted"]

    path.write_bytes(edited(path.read_bytes(), -50, b"\0\0"))
    outcome = hocket("inspect", path, "--json")
    assert outcome.code == 0
    assert outcome.document["signature"]["verified"] is False


def test_inspect_shows_the_release_beside_the_file(hocket: Any, package: Path) -> None:
    release_path(package).write_bytes(envelope_of(package.read_bytes()))
    expected = {"publisher": "acme", "name": "iris", "version": "1.0.0", "key_id": ACME_ID}

    shown = hocket("inspect", package, "--json").document["release"]
    assert shown == {**expected, "trusted": False, "refused": "SIGNER_NOT_TRUSTED"}

    hocket("trust", "add", "acme", "--key", ACME_KEY)
    shown = hocket("inspect", package, "--json").document["release"]
    assert shown == {**expected, "trusted": True, "refused": None}


def test_inspect_describes_an_encrypted_file_as_far_as_it_can_be_read(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "sealed.apr"
    path.write_bytes(raw_apr(b"x" * 64, flags=1))
    outcome = hocket("inspect", path, "--json")

    assert outcome.code == 0
    assert outcome.document["encrypted"] is True
    assert outcome.document["flags"] == ["ENCRYPTED"]
    assert outcome.document["layout"] is None
    assert outcome.document["model"] is None
    assert "cannot serve" in hocket("inspect", path).out


def test_inspect_shows_what_an_encrypted_file_declares(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "sealed.apr"
    path.write_bytes(apr_bytes(logistic(), labels=["yes", "no"], encryption=RecipientKey(b"\x09" * 32).recipient))
    shown = hocket("inspect", path, "--json").document

    assert (shown["layout"], shown["encrypted"]) == ("LogisticRegression", True)
    assert shown["model"]["labels"] == ["yes", "no"]
    assert "yes, no" in hocket("inspect", path).out
    assert "cannot serve" not in hocket("inspect", path).out


def test_verify_opens_an_encrypted_file_with_its_credential_alone(hocket: Any, tmp_path: Path) -> None:
    sealed, secret = tmp_path / "sealed.apr", tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    sealed.write_bytes(apr_bytes(encryption=Password("hunter2")))
    key = tmp_path / "recipient.key"
    create_recipient_key(key)

    assert hocket("verify", sealed, "--allow-unsigned", "--password-file", secret).code == 0
    outcome = hocket("verify", sealed, "--allow-unsigned", "--json")
    assert outcome.document["error"]["reason"] == "ENCRYPTED"
    outcome = hocket("verify", sealed, "--allow-unsigned", "--key-file", key, "--json")
    assert outcome.document["error"]["reason"] == "WRONG_RECIPIENT"
    secret.chmod(0o644)
    outcome = hocket("verify", sealed, "--allow-unsigned", "--password-file", secret, "--json")
    assert outcome.document["error"]["reason"] == "BAD_KEY_FILE"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"APRX" + data[4:], "BAD_MAGIC"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "BAD_CHECKSUM"),
        (lambda data: data[:-5], "BAD_LENGTH"),
        (lambda _data: raw_apr(b"\x02"), "BAD_PAYLOAD"),
    ],
)
def test_inspect_refuses_a_damaged_file_with_its_reason(hocket: Any, package: Path, damage: Any, reason: str) -> None:
    package.write_bytes(damage(package.read_bytes()))

    outcome = hocket("inspect", package, "--json")
    assert outcome.code == 2
    assert outcome.document["error"].keys() == {"reason", "message"}
    assert outcome.document["error"]["reason"] == reason
    assert outcome.err == ""

    outcome = hocket("inspect", package)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith(reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("edge_magic", "BAD_MAGIC"),
        ("edge_major_2", "UNSUPPORTED_VERSION"),
        ("edge_unknown_type", "UNSUPPORTED_TYPE"),
        ("edge_crc", "BAD_CHECKSUM"),
        ("edge_metadata_garbage", "BAD_METADATA"),
        ("edge_option_tag_2", "BAD_PAYLOAD"),
        ("edge_trailing_bytes", "BAD_LENGTH"),
        ("edge_minor_9", None),
        ("edge_flags_encrypted_only", None),
        ("edge_reserved_nonzero", None),
        ("edge_signed_sig_edit", None),
    ],
)
def test_files_of_the_reference_are_shown_or_refused(hocket: Any, name: str, reason: str | None) -> None:
    outcome = hocket("inspect", VECTORS / f"{name}.apr", "--json")

    assert outcome.code == (0 if reason is None else 2)
    assert outcome.document.get("error", {}).get("reason") == reason


def test_inspect_refuses_what_it_cannot_read(hocket: Any, package: Path) -> None:
    outcome = hocket("inspect", package.with_name("missing.apr"), "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


@pytest.mark.parametrize(("release", "reason"), [(b"x" * 20_000, "TOO_LARGE"), (b"{}", "BAD_RELEASE")])
def test_inspect_shows_a_sound_file_beside_a_broken_release(
    hocket: Any, package: Path, release: bytes, reason: str
) -> None:
    release_path(package).write_bytes(release)
    outcome = hocket("inspect", package, "--json")

    assert outcome.code == 0
    assert outcome.document["release"] == {
        "publisher": None, "name": None, "version": None, "key_id": None, "trusted": False, "refused": reason,
    }  # fmt: skip
    assert f"cannot be used ({reason})" in hocket("inspect", package).out


def test_inspect_prints_a_card_for_people(hocket: Any, package: Path) -> None:
    release_path(package).write_bytes(envelope_of(package.read_bytes()))
    card = hocket("inspect", package).out

    for text in ("iris", "RandomForestClassifier", "setosa, virginica, (dropped)", "acme/iris@1.0.0"):
        assert text in card
    assert "SIGNER_NOT_TRUSTED" in card


@pytest.mark.parametrize(
    ("seed", "text"), [(None, "none in the file"), (ACME_SEED, "not trusted here"), (b"\x07" * 32, "DOES NOT VERIFY")]
)
def test_the_card_says_what_the_signature_is_worth(hocket: Any, tmp_path: Path, seed: bytes | None, text: str) -> None:
    path = tmp_path / "mixture.apr"
    data = apr_bytes(mixture(), **({} if seed is None else {"signing": signer(seed)}))
    path.write_bytes(data if seed != b"\x07" * 32 else edited(data, -50, b"\0\0"))
    card = hocket("inspect", path).out

    assert text in card
    assert "2 x LinearRegression in a MixtureOfExperts" in card
    assert "one number" in card


def test_inspect_prints_licence_card_and_origin_for_people(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "churn.apr"
    path.write_bytes(apr_bytes(metadata=ABOUT))
    out = hocket("inspect", path).out

    for text in (
        "Licence", "Enterprise", "Example GmbH", "2020-01-31 (HAS ENDED)", "300 (shown, never counted)",
        "Model card", "Churn 3 (acme/churn)", "ada", "MIT", "crm-2025, 70,000 rows", "cpu, cuda", '{"kg": 0.5}',
        "Distilled", "RandomForest t0, 12,345 parameters, an ensemble of 1, signature sig (verified by nobody)",
        "Knn t1", "temperature 2.5", "1 mapped",
        "Training", "2025-11-27 21:29:07+00:00, in the form of aprender 0.11.0", "1.5 s", "alpha 0.1, nested [1, null]",
        "m11 11 and 8 more", "seed", "Also in the metadata", '{"theirs": {"x": []}}', "later", "(1000 characters)",
    ):  # fmt: skip
        assert text in out, text
    assert "d" * 301 not in out


@pytest.mark.parametrize(
    ("expiry", "text", "expired"),
    [
        ("2999-01-01", "2999-01-01 (holds now)", False),
        ("2020-01-01", "2020-01-01 (HAS ENDED)", True),
        ("soon", "soon (CANNOT BE READ as a date)", None),
        (None, "never", False),
    ],
)
def test_inspect_says_whether_a_licence_holds(
    hocket: Any, tmp_path: Path, expiry: str | None, text: str, *, expired: bool | None
) -> None:
    licence = {key: value for key, value in ABOUT["license"].items() if key not in {"expiry", "seats"}}
    licence |= {} if expiry is None else {"expiry": expiry}
    path = tmp_path / "licensed.apr"
    path.write_bytes(apr_bytes(metadata={**ABOUT, "license": licence}))

    assert text in hocket("inspect", path).out
    assert "any number" in hocket("inspect", path).out
    assert hocket("inspect", path, "--json").document["license"] == {**licence, "expired": expired}


def test_inspect_prints_no_part_that_is_not_there(hocket: Any, package: Path) -> None:
    out = hocket("inspect", package).out

    assert "Training" in out
    for title in ("Licence", "Model card", "Distilled", "Also in the metadata"):
        assert title not in out
    assert hocket("inspect", package, "--json").document["license"] is None


def test_verify_refuses_a_licence_that_has_ended_unless_told_otherwise(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "licensed.apr"
    path.write_bytes(apr_bytes(metadata=ABOUT))

    outcome = hocket("verify", path, "--allow-unsigned", "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "LICENCE_EXPIRED")
    assert hocket("verify", path, "--allow-unsigned", "--allow-expired-licences").code == 0


def test_metadata_cannot_write_to_the_terminal(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.apr"
    path.write_bytes(apr_bytes(name="\x1b[2Jgone [red]x"))
    card = hocket("inspect", path).out

    assert "\x1b" not in card
    assert "\\x1b[2Jgone [red]x" in card


def test_verify_says_which_proofs_hold(hocket: Any, package: Path) -> None:
    release_path(package).write_bytes(envelope_of(package.read_bytes()))
    outcome = hocket("verify", package, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "SIGNER_NOT_TRUSTED")

    hocket("trust", "add", "acme", "--key", ACME_KEY)
    outcome = hocket("verify", package, "--json")
    assert outcome.code == 0
    assert outcome.document == {
        "digest": digest_of(package.read_bytes()),
        "proofs": [{"kind": "release", "key_id": ACME_ID, "publisher": "acme", "release": "acme/iris@1.0.0"}],
    }
    out = hocket("verify", package).out
    assert "released as acme/iris@1.0.0" in out
    assert "what a registry has revoked is not known here" in out


def test_verify_takes_an_embedded_signature_and_the_operator_s_word(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.apr"
    path.write_bytes(apr_bytes())
    refused = hocket("verify", path, "--json").document["error"]
    assert refused["reason"] == "UNSIGNED"
    assert f"its release would be beside it, as {path}.release.json" in refused["message"]
    outcome = hocket("verify", path, "--allow-unsigned")
    assert outcome.code == 0
    assert "nobody vouches for it" in outcome.out

    hocket("trust", "add", "acme", "--key", ACME_KEY)
    path.write_bytes(apr_bytes(signing=signer(ACME_SEED)))
    assert "signed inside the file" in hocket("verify", path).out


def test_verify_refuses_what_is_genuine_but_cannot_answer(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "idle.apr"
    path.write_bytes(apr_bytes(mixture(top_k=0)))

    outcome = hocket("verify", path, "--allow-unsigned", "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "NOT_SERVABLE")


def test_keygen_makes_the_default_key_once(hocket: Any, home: Path) -> None:
    made = hocket("keygen", "--json").document
    path = home / ".config" / "hocket" / "keys" / "default.key"
    public_key = public_key_of(path.read_bytes())

    assert made == {"path": str(path), "public_key": key_text(public_key), "key_id": key_id_of(public_key)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    outcome = hocket("keygen", "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "NAME_TAKEN")


def test_keygen_says_what_to_do_next(hocket: Any, tmp_path: Path) -> None:
    outcome = hocket("keygen", tmp_path / "keys" / "other.key")

    public_key = key_text(public_key_of((tmp_path / "keys" / "other.key").read_bytes()))
    assert f"hocket trust add acme --key {public_key}" in outcome.out


def test_sign_writes_the_release_beside_the_file(hocket: Any, package: Path, key: Path) -> None:
    arguments = ("sign", package, "--publisher", "acme", "--name", "iris", "--version", "2.0.0")
    outcome = hocket(*arguments, "--key", key, "--json")

    assert outcome.code == 0
    assert outcome.document == {
        "release": "acme/iris@2.0.0",
        "digest": digest_of(package.read_bytes()),
        "key_id": ACME_ID,
        "path": str(release_path(package)),
    }
    claimed = read_release(release_path(package).read_bytes())
    assert str(claimed.release.name) == "acme/iris@2.0.0"
    assert claimed.release.subject.purpose is Purpose.PACKAGE
    assert claimed.release.subject.digest == digest_of(package.read_bytes())
    hocket("trust", "add", "acme", "--key", ACME_KEY)
    assert hocket("verify", package).code == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (raw_apr(b"x" * 64, flags=1), "does not declare"),
        (apr_bytes(encryption=RecipientKey(b"\x09" * 32).recipient), None),
        (apr_bytes(mixture(top_k=0)), "top_k"),
        (raw_apr(b"\x02"), "payload"),
        (apr_bytes(), None),
    ],
)
def test_sign_warns_of_what_cannot_serve(hocket: Any, package: Path, key: Path, data: bytes, why: str | None) -> None:
    package.write_bytes(data)
    outcome = hocket("sign", package, "--publisher", "a", "--name", "b", "--version", "1", "--key", key, "--json")

    assert outcome.code == 0
    if why is None:
        assert outcome.err == ""
    else:
        assert "cannot serve" in outcome.err
        assert why in outcome.err


@pytest.mark.parametrize("path", ["", "."])
def test_keygen_wants_the_name_of_a_file(hocket: Any, path: str) -> None:
    outcome = hocket("keygen", path, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_sign_uses_the_default_key(hocket: Any, package: Path) -> None:
    arguments = ("sign", package, "--publisher", "acme", "--name", "iris", "--version", "2.0.0")
    outcome = hocket(*arguments, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_KEY_FILE")
    assert "hocket keygen" in outcome.document["error"]["message"]

    hocket("keygen")
    assert "is acme/iris@2.0.0" in hocket(*arguments).out


@pytest.mark.parametrize(("option", "value"), [("--publisher", "A/B"), ("--name", ".."), ("--version", "1 0")])
def test_sign_refuses_a_name_that_could_not_be_addressed(
    hocket: Any, package: Path, key: Path, option: str, value: str
) -> None:
    options = {"--publisher": "acme", "--name": "iris", "--version": "1", "--key": str(key), option: value}
    outcome = hocket("sign", package, "--json", *(text for pair in options.items() for text in pair))

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")
    assert not release_path(package).exists()


def test_sign_refuses_what_is_no_package(hocket: Any, tmp_path: Path, key: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a model")
    outcome = hocket("sign", path, "--publisher", "a", "--name", "b", "--version", "1", "--key", key, "--json")

    assert outcome.document["error"]["reason"] == "BAD_MAGIC"


def test_sign_says_when_the_release_cannot_be_written(hocket: Any, package: Path, key: Path) -> None:
    release_path(package).mkdir()
    outcome = hocket("sign", package, "--publisher", "a", "--name", "b", "--version", "1", "--key", key, "--json")

    assert outcome.document["error"]["reason"] == "BAD_REQUEST"
    assert "cannot write" in outcome.document["error"]["message"]
    assert sorted(path.name for path in package.parent.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("options", [("--name", "iris"), ("--version", "1.0.0"), ()])
def test_sign_wants_name_and_version_of_a_file_that_has_none(
    hocket: Any, package: Path, key: Path, options: tuple[str, ...]
) -> None:
    outcome = hocket("sign", package, "--publisher", "acme", *options, "--key", key, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")
    assert "add --name, --version" in outcome.document["error"]["message"]


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("sign", "--publisher", "acme")])
def test_what_is_no_package_is_told_to_be_of_neither_format(
    hocket: Any, tmp_path: Path, command: tuple[str, ...]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Hocket")
    refused = hocket(*command, page, "--json").document["error"]
    assert refused["reason"] == "BAD_MAGIC"
    assert "not an .apr file" in refused["message"]
    assert "nor is it an .expert file" in refused["message"]
