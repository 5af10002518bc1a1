from __future__ import annotations

import itertools

import pytest

from hocket.errors import HocketError, Reason
from hocket.versions import ANY, Range, Version


def allows(text: str, version: str, *, prereleases: bool = False) -> bool:
    return Range.parse(text).allows(Version.parse(version), prereleases=prereleases)


# The example of semver.org, clause 11, with versions that are not semantic before it.
ASCENDING = [
    "2025-11-27",
    "nightly",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-alpha.beta",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "1.0.0",
    "1.0.0+cpu",
    "1.0.0+cuda",
    "1.0.10",
    "1.2.0",
    "10.0.0",
]


def test_versions_are_ordered_by_precedence() -> None:
    versions = [Version.parse(text) for text in ASCENDING]

    assert sorted(map(Version.parse, sorted(ASCENDING))) == versions
    for older, newer in itertools.combinations(versions, 2):
        assert older < newer
        assert newer >= older
        assert older != newer
    assert str(versions[-1]) == "10.0.0"


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        ("*", ["0.0.1", "99.0.0", "2025-11-27"], ["1.0.0-rc.1"]),
        ("1.0.0", ["1.0.0", "1.0.0+cpu"], ["1.0.1", "1.0.0-rc.1", "2025-11-27"]),
        ("=1.0.0", ["1.0.0"], ["1.0.1"]),
        ("1.0.0+cpu", ["1.0.0+cpu"], ["1.0.0", "1.0.0+cuda"]),
        ("<1.0.0", ["0.9.9"], ["1.0.0", "1.0.0-rc.1"]),
        ("<=1.0.0", ["1.0.0"], ["1.0.1"]),
        (">1.0.0", ["1.0.1"], ["1.0.0"]),
        (">=1.0.0", ["1.0.0", "10.0.0"], ["0.10.0", "2.0.0-rc.1", "2025-11-27"]),
        (">=1.0.0,<2.0.0", ["1.0.0", "1.9.9"], ["2.0.0", "0.9.0"]),
        (" >= 1.0.0 , < 2.0.0 ", ["1.5.0"], ["2.0.0"]),
        ("*,<2.0.0", ["1.5.0"], ["2.0.0"]),
        (">=1.0.0-rc.1", ["1.0.0-rc.1", "1.0.0-rc.2", "1.0.0"], ["1.0.0-beta"]),
        ("2025-11-27", ["2025-11-27"], ["2025-11-28", "1.0.0"]),
        (">1.0.0,<1.0.0", [], ["1.0.0"]),
    ],
)
def test_a_range_allows_what_fulfils_each_of_its_comparators(
    range_: str, inside: list[str], outside: list[str]
) -> None:
    assert [version for version in inside if not allows(range_, version)] == []
    assert [version for version in outside if allows(range_, version)] == []


def test_pre_releases_count_like_any_other_where_the_caller_says_so() -> None:
    assert allows("*", "1.0.0-rc.1", prereleases=True)
    assert allows("<1.0.0", "1.0.0-rc.1", prereleases=True)
    assert not allows("<1.0.0-rc.1", "1.0.0-rc.1", prereleases=True)


@pytest.mark.parametrize(
    ("refused", "accepted"),
    [
        ("", "*"),
        ("1.0.0,", "1.0.0"),
        ("^1.0.0", ">=1.0.0"),
        ("~1.0", "1.0"),
        (">=2025-11-27", "=2025-11-27"),
        ("=>1.0.0", ">=1.0.0"),
        ("1.0.0 2.0.0", "1.0.0,2.0.0"),
        (">=1.0.0 || 2.0.0", ">=1.0.0"),
        (">=", "*"),
        (",".join(["1.0.0"] * 43), ",".join(["1.0.0"] * 42)),
    ],
)
def test_text_that_is_no_range_is_refused(refused: str, accepted: str) -> None:
    with pytest.raises(HocketError) as error:
        Range.parse(refused)
    assert error.value.reason is Reason.BAD_REQUEST
    Range.parse(accepted)


def test_text_that_can_be_no_version_is_refused() -> None:
    with pytest.raises(HocketError) as error:
        Version.parse("1.0.0\n")
    assert error.value.reason is Reason.BAD_REQUEST
    assert Version.parse("1.0").semantic is None


@pytest.mark.parametrize("text", ["*", "1.0.0", "<1.0.0", ">=1.0.0,<2.0.0-rc.1", "2025-11-27"])
def test_a_range_is_spelled_as_it_is_read(text: str) -> None:
    assert str(Range.parse(text)) == text
    assert Range.parse("*") == ANY
