from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.index import INDEX_BYTES_MAX, parse_index

if TYPE_CHECKING:
    from pathlib import Path

HTTPS = "https://git.example.org/acme/expert-sql"


def document(*experts: Any, **changes: Any) -> bytes:
    """An index as upstream describes it."""
    listed = list(experts) or [{"name": "expert-sql", "repository": HTTPS, "latest": "0.3.0"}]
    whole = {"version": "1.0", "updated_at": "2026-01-31T12:00:00Z", "experts_count": len(listed), "experts": listed}
    return json.dumps({**whole, **changes}).encode()


def listing(repository: str, *, is_local: bool = False) -> Any:
    data = document({"name": "expert-sql", "repository": repository})
    return parse_index(data, "the index", is_local=is_local).repository_of("expert-sql")


def test_an_expert_is_found_by_its_name_and_without_the_prefix() -> None:
    index = parse_index(document(), "the index")

    assert index.repository_of("expert-sql") == index.repository_of("sql") == ("expert-sql", HTTPS)
    assert index.repository_of("expert-json") is None


def test_the_full_name_comes_first() -> None:
    both = [{"name": name, "repository": f"{HTTPS}/{name}"} for name in ("expert-sql", "sql")]

    assert parse_index(document(*both), "").repository_of("sql") == ("sql", f"{HTTPS}/sql")


def test_what_is_for_people_may_be_missing_or_more() -> None:
    data = json.dumps({"version": "1.0", "experts": [{"name": "x", "repository": HTTPS, "stars": 5}], "x": 1}).encode()

    assert parse_index(data, "").repository_of("x") == ("x", HTTPS)


@pytest.mark.parametrize("repository", [f"git+{HTTPS}", "ssh://git@example.org/x", "git@example.org:x.git"])
def test_other_ways_to_a_repository_may_be_listed(repository: str) -> None:
    assert listing(repository) == ("expert-sql", repository.removeprefix("git+"))


def test_only_an_index_on_this_computer_may_list_folders_of_it(tmp_path: Path) -> None:
    for address in (f"file://{tmp_path}", str(tmp_path)):
        assert listing(address, is_local=True) == ("expert-sql", str(tmp_path))
        with pytest.raises(HocketError, match="a folder of this computer"):
            listing(address)
    for address in (".", "~", "./x"):
        with pytest.raises(HocketError, match="a folder of this computer"):
            listing(address, is_local=True)


@pytest.mark.parametrize(
    "repository",
    ["--upload-pack=touch pwned", "ext::sh -c 'touch pwned'", "http://example.org/x", "ssh://-oProxyCommand=x/y", "-x"],
)
def test_an_address_that_git_could_take_for_something_else_is_refused_when_it_is_used(repository: str) -> None:
    with pytest.raises(HocketError, match="the index lists expert-sql at an address that cannot be used") as caught:
        listing(repository)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert parse_index(document({"name": "x", "repository": repository}), "").repository_of("y") is None


def test_a_version_that_is_a_number_is_said_to_be_one() -> None:
    with pytest.raises(HocketError, match=r'has version 1\.0, not "1\.0"'):
        parse_index(document(version=1.0), "")
    with pytest.raises(HocketError, match=r'has version "2\.0", not "1\.0"'):
        parse_index(document(version="2.0"), "")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", Reason.BAD_JSON),
        (b"{", Reason.BAD_JSON),
        (b'{"version": "1.0", "experts": {}}', Reason.BAD_JSON),
        (b'{"version": "1.0", "version": "1.0", "experts": []}', Reason.BAD_JSON),
        (document("expert-sql"), Reason.BAD_JSON),
        (document({"name": "x"}), Reason.BAD_JSON),
        (document({"name": "", "repository": HTTPS}), Reason.BAD_JSON),
        (document({"name": "x", "repository": 1}), Reason.BAD_JSON),
        (document(*[{"name": "x", "repository": HTTPS}] * 2), Reason.BAD_JSON),
        (document(version="2.0"), Reason.UNSUPPORTED_VERSION),
        (document(updated_at="x" * INDEX_BYTES_MAX), Reason.TOO_LARGE),
    ],
)
def test_what_is_no_index_is_refused(data: bytes, reason: Reason) -> None:
    with pytest.raises(HocketError) as caught:
        parse_index(data, "the index")
    assert caught.value.reason is reason
