"""What holds for every catalogue, held against a search through all choices."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bases import BaseModel, Match, compatibility
from hocket.errors import HocketError, Reason
from hocket.requirements import Constraints, Requirement
from hocket.resolution import Candidate, Resolution, resolve
from hocket.versions import Version

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

RANGES = ["", "@*", "@1.0.0", "@>=2.0.0", "@<3.0.0", "@>=3.0.0-rc.1"]
patterns = st.builds(
    lambda *parts: "".join(parts), st.sampled_from(["", "", "b/"]), st.sampled_from("xyz"), st.sampled_from(RANGES)
)
constraints = st.builds(
    Constraints,
    st.integers(0, 3),
    st.sampled_from([None, None, None, 1, 2]),
    st.lists(patterns, max_size=2).map(tuple),
    st.just(()) | st.lists(patterns, max_size=2).map(tuple),
)
candidates = st.builds(
    Candidate,
    st.just("sha256:00"),
    st.sampled_from("aaab"),
    st.sampled_from("xyz"),
    st.sampled_from(["1.0.0", "2.0.0", "3.0.0-rc.1", "3.0.0"]),
    st.sampled_from([BaseModel("m")] * 4 + [BaseModel("n")]),
    constraints,
)
catalogues = st.lists(candidates, max_size=9, unique_by=str)
wishes = st.lists(patterns, min_size=1, max_size=2).map(
    lambda texts: [Requirement.parse(text if "/" in text else f"a/{text}") for text in texts]
)


def names(pattern: Requirement, owner: str | None, candidate: Candidate) -> bool:
    """Whether a requirement of `owner` is fulfilled; without one, whether a conflict hits."""
    publisher = pattern.publisher or owner or candidate.publisher
    return (publisher, pattern.name) == (candidate.publisher, candidate.name) and pattern.range.allows(
        Version.parse(candidate.version), prereleases=owner is None
    )


def requirements(candidate: Candidate) -> list[Requirement]:
    return [Requirement.parse(text) for text in candidate.constraints.requires]


def fits(chosen: Sequence[Candidate], wanted: Sequence[Requirement]) -> bool:
    met = all(any(names(each, each.publisher, other) for other in chosen) for each in wanted) and all(
        any(names(each, owner.publisher, other) for other in chosen) for owner in chosen for each in requirements(owner)
    )
    few = all(len(chosen) <= (each.constraints.max_chain or len(chosen)) for each in chosen)
    return (
        few
        and met
        and not any(
            compatibility(one.base, other.base).match is Match.DIFFERENT
            or any(names(Requirement.parse(text), None, other) for text in one.constraints.incompatible_with)
            for one, other in itertools.permutations(chosen, 2)
        )
    )


def solutions(available: Sequence[Candidate], wanted: Sequence[Requirement]) -> Iterator[list[Candidate]]:
    by_name: dict[tuple[str, str], list[Candidate | None]] = {}
    for each in available:
        by_name.setdefault((each.publisher, each.name), [None]).append(each)
    for choice in itertools.product(*by_name.values()):
        chosen = [each for each in choice if each is not None]
        if fits(chosen, wanted):
            yield chosen


def outcome(wanted: Sequence[Requirement], available: Sequence[Candidate]) -> Resolution | str:
    try:
        return resolve(wanted, available)
    except HocketError as error:
        return str(error)


@given(wishes, catalogues)
@settings(max_examples=100, deadline=None)
def test_an_answer_is_found_exactly_where_there_is_one(wanted: list[Requirement], available: list[Candidate]) -> None:
    result = outcome(wanted, available)

    possible = list(solutions(available, wanted))
    if isinstance(result, str) and not result.startswith(Reason.REQUIREMENT_CYCLE):
        assert possible == []
        return
    assert possible != []
    if isinstance(result, Resolution):
        chosen = [each.candidate for each in result.experts]
        assert fits(chosen, wanted)
        first = min(wanted, key=str)
        newest = max(
            Version.parse(each.version)
            for solution in possible
            for each in solution
            if names(first, first.publisher, each)
        )
        assert any(names(first, first.publisher, each) and each.version == newest.text for each in chosen)


@given(wishes, catalogues)
@settings(max_examples=100, deadline=None)
def test_requirements_come_first_and_nothing_is_there_without_a_reason(
    wanted: list[Requirement], available: list[Candidate]
) -> None:
    result = outcome(wanted, available)

    if isinstance(result, Resolution):
        chosen = [each.candidate for each in result.experts]
        assert len({(each.publisher, each.name) for each in chosen}) == len(chosen)
        for position, owner in enumerate(chosen):
            for each in requirements(owner):
                assert any(names(each, owner.publisher, other) for other in chosen[:position])
        for entry in result.experts:
            asked = any(names(wish, wish.publisher, entry.candidate) for wish in wanted)
            required = [
                owner
                for owner in chosen
                if any(names(need, owner.publisher, entry.candidate) for need in requirements(owner))
            ]
            assert entry.why
            assert ("it was asked for" in entry.why) == asked
            assert all(any(reason.startswith(str(owner)) for reason in entry.why) for owner in required)


@given(wishes, catalogues, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_what_is_listed_does_not_matter(
    wanted: list[Requirement], available: list[Candidate], chance: Random
) -> None:
    result = outcome(wanted, available)

    chance.shuffle(wanted)
    chance.shuffle(available)
    assert outcome(wanted, available) == result
