"""Versions compare as the `semver` library has them compare."""

from __future__ import annotations

import semver
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hocket.identity import check_version
from hocket.versions import Version

numbers = st.sampled_from(["0", "1", "2", "10", "01"])
words = st.sampled_from(["0", "1", "10", "01", "alpha", "beta", "rc", "x-y", "-", "1a", "A"])
dotted = st.lists(words, min_size=1, max_size=3).map(".".join)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Semantic versions, and texts that nearly are."""
    text = ".".join(draw(st.lists(numbers, min_size=3, max_size=3)))
    if draw(st.booleans()):
        text += f"-{draw(dotted)}"
    if draw(st.booleans()):
        text += f"+{draw(dotted)}"
    return text


def parsed(text: str) -> semver.Version | None:
    try:
        return semver.Version.parse(text)
    except ValueError:
        return None


@given(texts(), texts())
@example("1.0.0-alpha", "1.0.0-1")
@example("1.0.0+a", "1.0.0+b")
@settings(max_examples=200, deadline=None)
def test_what_is_semantic_and_what_is_newer_is_as_the_library_has_it(one: str, other: str) -> None:
    versions = [text for text in (one, other) if _may_be_one(text)]
    ours = [Version.parse(text) for text in versions]
    theirs = [parsed(text) for text in versions]

    assert [version.semantic is None for version in ours] == [version is None for version in theirs]
    if len(theirs) == 2 and theirs[0] is not None and theirs[1] is not None:
        compared = theirs[0].compare(theirs[1])
        if compared:
            assert (ours[0] < ours[1]) is (compared < 0)
        else:
            assert ours[0].semantic == ours[1].semantic


def _may_be_one(text: str) -> bool:
    try:
        check_version(text)
    except Exception:  # noqa: BLE001 - what may be a version at all is not the question here
        return False
    return True
