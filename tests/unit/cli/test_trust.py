from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hocket.identity import key_text
from hocket.packages import public_key_of
from tests.signing import ACME_ID, ACME_SEED, ZETA_ID, ZETA_SEED

if TYPE_CHECKING:
    from pathlib import Path

ACME_KEY = key_text(public_key_of(ACME_SEED))
ZETA_KEY = key_text(public_key_of(ZETA_SEED))


def test_a_key_is_trusted_listed_and_removed(hocket: Any, home: Path) -> None:
    added = hocket("trust", "add", "acme", "--key", ACME_KEY, "--names", "iris-*", "--names", "digits", "--json")

    assert added.code == 0
    assert added.document == {
        "publisher": "acme",
        "key": ACME_KEY,
        "key_id": ACME_ID,
        "names": ["iris-*", "digits"],
        "not_before": None,
        "not_after": None,
    }
    assert (home / ".local" / "share" / "hocket" / "trust" / "acme.toml").exists()
    assert hocket("trust", "list", "--json").document == {"keys": [added.document]}
    assert hocket("trust", "remove", ACME_KEY, "--json").document == {"keys": [added.document]}
    assert hocket("trust", "list", "--json").document == {"keys": []}


def test_the_same_for_people(hocket: Any, tmp_path: Path) -> None:
    folder = ("--trust", tmp_path / "other")
    assert "Nobody is trusted yet" in hocket("trust", "list", *folder).out
    assert "acme may release *" in hocket("trust", "add", "acme", "--key", ACME_KEY, *folder).out
    hocket("trust", "add", "zeta", "--key", ZETA_KEY, "--not-after", "2031-05-01", *folder)
    listed = hocket("trust", "list", *folder).out
    assert ACME_ID[:12] in listed
    assert "2031-05-01 00:00" in listed
    assert f"zeta is no longer trusted with key {ZETA_ID}" in hocket("trust", "remove", ZETA_ID, *folder).out


def test_a_time_without_a_zone_means_utc(hocket: Any) -> None:
    added = hocket("trust", "add", "acme", "--key", ACME_KEY, "--not-before", "2026-01-02T03:04:05", "--json")

    assert added.document["not_before"] == "2026-01-02T03:04:05+00:00"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("add", "acme", "--key", "ed25519:12"), "BAD_REQUEST"),
        (("add", "A B", "--key", ACME_KEY), "BAD_REQUEST"),
        (("add", "acme", "--key", ACME_KEY, "--names", "a b"), "BAD_TRUST_FILE"),
        (("remove", ACME_KEY), "SIGNER_NOT_TRUSTED"),
        (("remove", "ed25519:12"), "BAD_REQUEST"),
        (("remove", ACME_ID), "SIGNER_NOT_TRUSTED"),
        (("remove", ACME_ID[:12]), "SIGNER_NOT_TRUSTED"),
        (("remove", ACME_ID[:11]), "BAD_REQUEST"),
    ],
)
def test_what_cannot_be_meant_is_refused(hocket: Any, arguments: tuple[str, ...], reason: str) -> None:
    outcome = hocket("trust", *arguments, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, reason)


def test_a_file_that_had_to_be_left_out_is_named(hocket: Any, tmp_path: Path) -> None:
    (tmp_path / "acme.toml").write_text("keys = 3")
    outcome = hocket("trust", "list", "--trust", tmp_path, "--json")

    assert outcome.document == {"keys": []}
    assert "warning: trust file of 'acme'" in outcome.err


@pytest.mark.parametrize("form", ["key", "id", "prefix", "file"])
def test_a_key_is_removed_by_whatever_names_it(hocket: Any, tmp_path: Path, form: str) -> None:
    path = tmp_path / "acme.key"
    path.write_bytes(ACME_SEED)
    path.chmod(0o600)
    hocket("trust", "add", "acme", "--key", ACME_KEY)
    hocket("trust", "add", "zeta", "--key", ZETA_KEY)
    written = {"key": ACME_KEY, "id": ACME_ID, "prefix": ACME_ID[:12], "file": str(path)}[form]

    [removed] = hocket("trust", "remove", written, "--json").document["keys"]
    assert removed["key_id"] == ACME_ID
    assert "`hocket trust list`" in hocket("trust", "remove", ACME_ID).err


def test_a_window_is_echoed_and_one_that_is_past_warned_of(hocket: Any) -> None:
    outcome = hocket("trust", "add", "acme", "--key", ACME_KEY, "--not-after", "2020-01-01")
    assert "warning: --not-after 2020-01-01 00:00 is past" in outcome.err
    assert "from: always, until: 2020-01-01 00:00 (UTC)" in outcome.out

    assert hocket("trust", "add", "acme", "--key", ACME_KEY, "--not-after", "2999-01-01").err == ""
