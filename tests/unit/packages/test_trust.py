from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, key_text
from hocket.packages.keys import public_key_of
from hocket.packages.trust import TrustedKey, TrustRoots, format_publisher, parse_publisher
from tests.signing import ACME_ID, ACME_SEED, NOW, STRANGER_ID, ZETA_SEED, roots, trusted

KEY = key_text(public_key_of(ACME_SEED))
OTHER_KEY = key_text(public_key_of(ZETA_SEED))
SECOND = timedelta(seconds=1)


def reason_of_check(trust: TrustRoots, key_id: str = ACME_ID, revoked: frozenset[str] = frozenset()) -> Reason:
    with pytest.raises(HocketError) as refusal:
        trust.check(key_id, NOW, revoked)
    assert refusal.value.metadata["key_id"] == key_id
    return refusal.value.reason


def problem_of(text: str, publisher: str = "acme") -> str:
    with pytest.raises(HocketError) as refusal:
        parse_publisher(text, publisher)
    assert refusal.value.reason is Reason.BAD_TRUST_FILE
    assert publisher in refusal.value.message
    return refusal.value.message


class TestRoots:
    def test_a_listed_key_is_trusted(self) -> None:
        assert roots().check(ACME_ID, NOW) == trusted()

    def test_a_stranger_is_not(self) -> None:
        assert reason_of_check(roots(), STRANGER_ID) is Reason.SIGNER_NOT_TRUSTED

    def test_nobody_is_trusted_by_default(self) -> None:
        assert reason_of_check(TrustRoots()) is Reason.SIGNER_NOT_TRUSTED

    def test_a_revoked_key_is_refused_though_listed(self) -> None:
        assert reason_of_check(roots(), revoked=frozenset({ACME_ID})) is Reason.KEY_REVOKED

    def test_a_revoked_key_is_called_revoked_though_not_listed(self) -> None:
        assert reason_of_check(TrustRoots(), revoked=frozenset({ACME_ID})) is Reason.KEY_REVOKED

    def test_a_revocation_of_another_key_changes_nothing(self) -> None:
        assert roots().check(ACME_ID, NOW, frozenset({STRANGER_ID})) == trusted()

    def test_a_window_holds_from_its_first_instant_until_its_last(self) -> None:
        assert roots(not_before=NOW, not_after=NOW + SECOND).check(ACME_ID, NOW).publisher == "acme"
        assert reason_of_check(roots(not_before=NOW + SECOND)) is Reason.KEY_EXPIRED
        assert reason_of_check(roots(not_after=NOW)) is Reason.KEY_EXPIRED

    def test_a_window_in_another_zone_is_the_same_window(self) -> None:
        tokyo = timezone(timedelta(hours=9))
        assert roots(not_after=(NOW + SECOND).astimezone(tokyo)).check(ACME_ID, NOW).publisher == "acme"
        assert reason_of_check(roots(not_after=NOW.astimezone(tokyo))) is Reason.KEY_EXPIRED

    def test_a_key_of_two_publishers_is_refused(self) -> None:
        with pytest.raises(HocketError) as refusal:
            TrustRoots.of([trusted(), trusted(publisher="zeta")])
        assert refusal.value.reason is Reason.BAD_TRUST_FILE


class TestNames:
    @pytest.mark.parametrize(
        ("patterns", "name"),
        [
            (("*",), "acme/iris@1"),
            (("iris",), "acme/iris@1"),
            (("digits-*", "iris-?"), "acme/iris-7@1"),
            (("[a-i]*",), "acme/iris@1"),
            (("[!a-h]*",), "acme/iris@1"),
        ],
    )
    def test_a_key_may_release_names_that_match_a_pattern(self, patterns: tuple[str, ...], name: str) -> None:
        trusted(names=patterns).check_may_release(ReleaseName.parse(name))

    @pytest.mark.parametrize(
        ("patterns", "name"),
        [
            (("*",), "zeta/iris@1"),
            (("iris",), "acme/iris2@1"),
            (("iris",), "acme/an-iris@1"),
            (("digits-*", "iris-?"), "acme/iris-77@1"),
            (("[!a-i]*",), "acme/iris@1"),
        ],
    )
    def test_it_may_release_no_other(self, patterns: tuple[str, ...], name: str) -> None:
        with pytest.raises(HocketError) as refusal:
            trusted(names=patterns).check_may_release(ReleaseName.parse(name))
        assert refusal.value.reason is Reason.NAME_NOT_ALLOWED


class TestFile:
    def test_a_key_alone_is_trusted_for_every_name_and_always(self) -> None:
        assert parse_publisher(f'[[keys]]\nkey = "{KEY}"\n', "acme") == (trusted(),)

    def test_names_and_window_are_read(self) -> None:
        text = f"""
            [[keys]]  # the key of the build machine
            key = "{KEY}"
            names = ["iris", "digits-*"]
            not_before = 2026-01-01T00:00:00Z
            not_after = 2027-01-01T09:00:00+09:00

            [[keys]]
            key = "{OTHER_KEY}"
            """
        first, second = parse_publisher(text, "acme")
        assert first == TrustedKey(
            public_key_of(ACME_SEED),
            "acme",
            ("iris", "digits-*"),
            datetime(2026, 1, 1, tzinfo=UTC),
            datetime(2027, 1, 1, tzinfo=UTC),
        )
        assert second.publisher == "acme"

    def test_what_is_written_is_read_back(self) -> None:
        keys = (
            trusted(names=("iris", "[!a-c]*"), not_before=NOW, not_after=NOW + SECOND),
            trusted(ZETA_SEED),
        )
        assert parse_publisher(format_publisher(keys), "acme") == keys

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "no [[keys]]"),
            ("keys = []", "no [[keys]]"),
            ('keys = "all"', "no [[keys]]"),
            ("keys = [1]", "not a list of tables"),
            ("[[keys]", "not TOML"),
            ("[" * 5000, "not TOML"),
            (f"n = {'9' * 5000}", "not TOML"),
            (f'[[keys]]\nkey = "{KEY}"\n[other]', "unknown field 'other'"),
            (f'[[keys]]\nkey = "{KEY}"\nname = "iris"', "unknown field 'name'"),
            ("[[keys]]\nnames = ['*']", "lacks key"),
            ("[[keys]]\nkey = 7", "lacks key"),
            (f'[[keys]]\nkey = "{KEY[:-1]}"', "is not a public key"),
            (f'[[keys]]\nkey = "{KEY.upper()}"', "is not a public key"),
            ('[[keys]]\nkey = "ed25519:01' + "00" * 31 + '"', "not a point"),
            (f'[[keys]]\nkey = "{KEY}"\n[[keys]]\nkey = "{KEY}"', "listed twice"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = []', "not a list of patterns"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = "*"', "not a list of patterns"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = [""]', "name pattern"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = [1]', "name pattern"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = ["Iris"]', "name pattern"),
            (f'[[keys]]\nkey = "{KEY}"\nnames = ["acme/iris"]', "name pattern"),
            (f'[[keys]]\nkey = "{KEY}"\nnot_after = 2027-01-01', "not a time with its zone"),
            (f'[[keys]]\nkey = "{KEY}"\nnot_after = 2027-01-01T00:00:00', "not a time with its zone"),
            (f'[[keys]]\nkey = "{KEY}"\nnot_after = "never"', "not a time with its zone"),
            (
                f'[[keys]]\nkey = "{KEY}"\nnot_before = 2027-01-01T00:00:00Z\nnot_after = 2027-01-01T00:00:00Z',
                "not earlier",
            ),
        ],
    )
    def test_anything_else_is_refused(self, text: str, problem: str) -> None:
        assert problem in problem_of(text)

    @pytest.mark.parametrize("publisher", ["", "..", "a/b", "Acme", ".acme", "acme.toml.", "a" * 65])
    def test_a_file_with_a_name_that_no_publisher_has_is_refused(self, publisher: str) -> None:
        problem_of(f'[[keys]]\nkey = "{KEY}"\n', publisher)

    def test_a_file_is_limited_in_size(self) -> None:
        text = f'[[keys]]\nkey = "{KEY}"\n#'
        full = text + "x" * (64 * 1024 - len(text))
        assert len(parse_publisher(full, "acme")) == 1
        assert "larger" in problem_of(full + "x")
