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
    assert ACME_KEY in listed
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
