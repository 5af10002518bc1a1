from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.requirements import Constraints, Requirement
from hocket.resolution import Candidate, Resolution, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

QWEN = BaseModel("Qwen3-0.6B", digest=f"sha256:{'11' * 32}")
LLAMA = BaseModel("Llama-3", digest=f"sha256:{'22' * 32}")


def expert(
    release: str,
    *requires: str,
    incompatible_with: Iterable[str] = (),
    base: BaseModel = QWEN,
    load_order: int = 10,
    max_chain: int | None = None,
) -> Candidate:
    publisher, name, version = release.replace("@", "/").split("/")
    digest = f"sha256:{hashlib.sha256(release.encode()).hexdigest()}"
    constraints = Constraints(load_order, max_chain, requires, tuple(incompatible_with))
    return Candidate(digest, publisher, name, version, base, constraints)


def composed(wanted: Iterable[str], available: Iterable[Candidate]) -> Resolution:
    return resolve([Requirement.parse(text) for text in wanted], list(available))


def chosen(wanted: Iterable[str], *available: Candidate) -> list[str]:
    return [str(each.candidate) for each in composed(wanted, available).experts]


def refused(wanted: Iterable[str], *available: Candidate) -> HocketError:
    with pytest.raises(HocketError) as error:
        composed(wanted, available)
    return error.value


# Patterns.


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("expert-json", "expert-json"),
        ("expert-json@*", "expert-json"),
        ("expert-json@1.0.0", "expert-json@1.0.0"),
        ("expert-json@<=0.9.0", "expert-json@<=0.9.0"),
        ("expert-json<=0.9.0", "expert-json@<=0.9.0"),
        ("expert-json >= 1.0.0, < 2.0.0", "expert-json@>=1.0.0,<2.0.0"),
        ("acme/expert-json@>=1.0.0,<2.0.0", "acme/expert-json@>=1.0.0,<2.0.0"),
        ("acme/expert-json", "acme/expert-json"),
    ],
)
def test_a_pattern_is_a_name_perhaps_with_a_publisher_and_a_range(text: str, spelled: str) -> None:
    assert str(Requirement.parse(text)) == spelled
    assert Requirement.parse(spelled) == Requirement.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "@1.0.0", "a/b/c", "/a", "a/", "a@", "a@@1.0.0", "a b", "Expert", "../a", "a\n", "a@>=x", "a" * 600, "-a"],
)
def test_text_that_names_no_experts_is_refused(text: str) -> None:
    with pytest.raises(HocketError) as error:
        Requirement.parse(text)
    assert error.value.reason is Reason.BAD_REQUEST


# Choosing.


def test_the_newest_that_fits_is_chosen_with_all_that_it_requires() -> None:
    resolution = composed(
        ["acme/tools"],
        [
            expert("acme/tools@0.1.0", "json@>=0.3.0,<1.0.0", load_order=7),
            expert("acme/json@0.3.0"),
            expert("acme/json@0.4.1"),
            expert("acme/json@1.0.0"),
        ],
    )

    assert [(str(each.candidate), each.why) for each in resolution.experts] == [
        ("acme/json@0.4.1", ("acme/tools@0.1.0 requires acme/json@>=0.3.0,<1.0.0",)),
        ("acme/tools@0.1.0", ("it was asked for",)),
    ]
    assert resolution.warnings == ()


def test_nothing_wanted_is_nothing_chosen() -> None:
    assert composed([], [expert("acme/json@1.0.0")]) == Resolution(())


def test_a_pre_release_is_chosen_only_by_name() -> None:
    json = expert("acme/json@1.0.0-rc.1")

    assert refused(["acme/json"], json).reason is Reason.REQUIREMENT_MISSING
    assert chosen(["acme/json@>=1.0.0-rc.1"], json) == ["acme/json@1.0.0-rc.1"]


def test_a_release_whose_version_is_a_date_is_found_by_its_name() -> None:
    old, new = expert("acme/json@2025-01-01"), expert("acme/json@2025-11-27")

    assert chosen(["acme/json"], old, new) == ["acme/json@2025-11-27"]
    assert chosen(["acme/json@2025-01-01"], old, new) == ["acme/json@2025-01-01"]
    assert chosen(["acme/json"], old, new, expert("acme/json@0.0.1")) == ["acme/json@0.0.1"]


def test_an_older_version_is_chosen_where_the_newest_does_not_fit() -> None:
    tools = expert("acme/tools@1.0.0", incompatible_with=["json@>=2.0.0"])
    json = [expert(f"acme/json@{version}") for version in ("1.0.0", "2.0.0", "3.0.0")]
    llama = expert("acme/json@1.5.0", base=LLAMA)

    assert chosen(["acme/tools", "acme/json"], tools, *json, llama) == ["acme/json@1.0.0", "acme/tools@1.0.0"]


def test_what_was_asked_for_is_kept_at_its_newest_rather_than_what_it_requires() -> None:
    available = [
        expert("acme/a@2.0.0", "b"),
        expert("acme/a@1.0.0", "b"),
        expert("acme/b@2.0.0", "a@<2.0.0"),
        expert("acme/b@1.0.0"),
    ]

    assert chosen(["acme/a"], *available) == ["acme/b@1.0.0", "acme/a@2.0.0"]


def test_experts_compose_by_load_order_then_name_with_requirements_first() -> None:
    available = [
        expert("acme/late@1.0.0", load_order=9),
        expert("acme/early@1.0.0", "last", load_order=1),
        expert("acme/last@1.0.0", load_order=10),
        expert("acme/b@1.0.0", load_order=5),
        expert("acme/a@1.0.0", load_order=5),
    ]

    order = chosen(["acme/late", "acme/early", "acme/b", "acme/a"], *available)
    assert order == ["acme/a@1.0.0", "acme/b@1.0.0", "acme/late@1.0.0", "acme/last@1.0.0", "acme/early@1.0.0"]


def test_every_reason_for_an_expert_is_given() -> None:
    available = [expert("acme/a@1.0.0", "c"), expert("acme/b@1.0.0", "c@1.0.0"), expert("acme/c@1.0.0")]

    first = composed(["acme/c", "acme/a", "acme/b"], available).experts[0]
    assert set(first.why) == {
        "it was asked for",
        "acme/a@1.0.0 requires acme/c",
        "acme/b@1.0.0 requires acme/c@1.0.0",
    }


# Refusals, each beside its twin.


def test_a_requirement_that_nothing_fulfils_is_refused_with_who_required_what_and_what_there_is() -> None:
    tools, old = expert("acme/tools@0.1.0", "json@>=1.0.0"), expert("acme/json@0.4.1")

    error = refused(["acme/tools"], tools, old)
    assert error.reason is Reason.REQUIREMENT_MISSING
    assert "acme/tools@0.1.0 requires acme/json@>=1.0.0; of acme/json there is 0.4.1" in error.message
    assert "there is none" in refused(["acme/tools"], tools).message
    assert "acme/tools was asked for; of acme/tools there is none" in refused(["acme/tools"], old).message
    assert chosen(["acme/tools"], tools, expert("acme/json@1.0.0"))


def test_ranges_that_exclude_each_other_are_both_named() -> None:
    available = [expert("acme/a@1.0.0", "x@<2.0.0"), expert("acme/b@1.0.0", "x@>=2.0.0")]
    versions = [expert("acme/x@1.0.0"), expert("acme/x@2.0.0")]

    error = refused(["acme/a", "acme/b"], *available, *versions)
    assert error.reason is Reason.REQUIREMENT_MISSING
    assert "acme/a@1.0.0 requires acme/x@<2.0.0" in error.message
    assert "acme/b@1.0.0 requires acme/x@>=2.0.0" in error.message
    assert "of acme/x there is 2.0.0, 1.0.0" in error.message
    assert chosen(["acme/a"], *available, *versions)


def test_nobody_else_can_step_in_by_publishing_a_required_name() -> None:
    tools, theirs = expert("acme/tools@0.1.0", "json"), expert("zeta/json@9.0.0")

    assert refused(["acme/tools"], tools, theirs).reason is Reason.REQUIREMENT_MISSING
    assert "zeta/json@9.0.0" not in chosen(["acme/tools"], tools, theirs, expert("acme/json@0.1.0"))
    named = expert("acme/tools@0.1.0", "zeta/json")
    assert chosen(["acme/tools"], named, theirs) == ["zeta/json@9.0.0", "acme/tools@0.1.0"]


def test_what_is_asked_for_says_whose_it_is() -> None:
    json = expert("acme/json@1.0.0")

    assert refused(["json"], json).reason is Reason.BAD_REQUEST
    assert chosen(["acme/json"], json)


def test_a_cycle_is_refused_with_its_chain() -> None:
    cycle = [expert("acme/a@1.0.0", "b"), expert("acme/b@1.0.0", "c"), expert("acme/c@1.0.0", "a")]

    error = refused(["acme/a"], *cycle)
    assert error.reason is Reason.REQUIREMENT_CYCLE
    assert "acme/a@1.0.0 requires acme/b@1.0.0 requires acme/c@1.0.0 requires acme/a@1.0.0" in error.message
    assert chosen(["acme/a"], *cycle[:2], expert("acme/c@1.0.0"))
    assert refused(["acme/a"], expert("acme/a@1.0.0", "a")).reason is Reason.REQUIREMENT_CYCLE


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("json", True),
        ("json@>=1.0.0", True),
        ("zeta/json", True),
        ("json@<1.0.0", False),
        ("acme/json", False),
        ("jso", False),
    ],
)
@pytest.mark.parametrize("by_the_other", [False, True])
def test_incompatible_experts_are_refused_whichever_of_them_says_so(
    pattern: str,
    hit: bool,  # noqa: FBT001 - a parameter
    by_the_other: bool,  # noqa: FBT001 - a parameter
) -> None:
    one = expert("acme/sql@1.0.0", incompatible_with=[pattern])
    wanted = ["zeta/json", "acme/sql"] if by_the_other else ["acme/sql", "zeta/json"]

    if hit:
        error = refused(wanted, one, expert("zeta/json@1.0.0"))
        assert error.reason is Reason.EXPERTS_INCOMPATIBLE
        assert f"acme/sql@1.0.0 is incompatible with {pattern}, and zeta/json@1.0.0 is one" in error.message
    else:
        assert len(chosen(wanted, one, expert("zeta/json@1.0.0"))) == 2


def test_what_is_incompatible_with_an_expert_is_so_with_its_pre_releases() -> None:
    one = expert("acme/sql@1.0.0", incompatible_with=["json"])

    wanted = ["acme/sql", "acme/json@>=1.0.0-rc.1"]
    assert refused(wanted, one, expert("acme/json@1.0.0-rc.1")).reason is Reason.EXPERTS_INCOMPATIBLE


def test_an_expert_that_is_not_chosen_is_nobodys_conflict() -> None:
    one = expert("acme/sql@1.0.0", incompatible_with=["json"])

    assert chosen(["acme/sql"], one, expert("acme/json@1.0.0", incompatible_with=["sql"])) == ["acme/sql@1.0.0"]


def test_experts_of_different_bases_are_refused() -> None:
    sql, json = expert("acme/sql@1.0.0"), expert("acme/json@1.0.0", base=LLAMA)

    error = refused(["acme/sql", "acme/json"], sql, json)
    assert error.reason is Reason.BASE_MISMATCH
    assert "acme/json@1.0.0 and acme/sql@1.0.0 ride on different bases: the digest differs" in error.message
    assert refused(["acme/sql"], expert("acme/sql@1.0.0", "json"), json).reason is Reason.BASE_MISMATCH
    assert len(chosen(["acme/sql", "acme/json"], sql, expert("acme/json@1.0.0"))) == 2


def test_bases_that_only_their_names_tell_are_matched_with_a_warning() -> None:
    sql, json = expert("acme/sql@1.0.0"), expert("acme/json@1.0.0", base=BaseModel("F:/models/qwen3-0.6b"))

    resolution = composed(["acme/sql", "acme/json"], [sql, json])
    assert len(resolution.experts) == 2
    assert resolution.warnings == (
        "the bases: both are called 'qwen3-0.6b', and no digest proves that they are the same model",
    )


def test_at_most_ten_experts_go_together() -> None:
    chain = [expert(f"acme/e{n}@1.0.0", f"e{n + 1}") for n in range(9)]

    assert len(chosen(["acme/e0"], *chain, expert("acme/e9@1.0.0"))) == 10
    error = refused(["acme/e0"], *chain, expert("acme/e9@1.0.0", "e10"), expert("acme/e10@1.0.0"))
    assert error.reason is Reason.TOO_MANY_EXPERTS
    wanted = [f"acme/e{n}" for n in range(11)]
    assert refused(wanted, *chain).reason is Reason.TOO_MANY_EXPERTS


def test_no_more_experts_go_together_than_the_least_patient_of_them_allows() -> None:
    experts = [expert("acme/a@1.0.0", max_chain=2), expert("acme/b@1.0.0"), expert("acme/c@1.0.0", max_chain=3)]

    assert len(chosen(["acme/a", "acme/b"], *experts)) == 2
    error = refused(["acme/a", "acme/b", "acme/c"], *experts)
    assert error.reason is Reason.TOO_MANY_EXPERTS
    assert "acme/a@1.0.0 goes together with at most 2 experts" in error.message


def test_an_older_version_is_chosen_where_the_newest_needs_too_many_experts() -> None:
    many = [f"e{n}" for n in range(10)]
    available = [expert("acme/a@2.0.0", *many), expert("acme/a@1.0.0", *many[1:]), expert("acme/b@2.0.0", max_chain=1)]
    available += [expert(f"acme/{name}@1.0.0") for name in many]

    assert chosen(["acme/a"], *available)[-1] == "acme/a@1.0.0"
    assert refused(["acme/a@2.0.0"], *available).reason is Reason.TOO_MANY_EXPERTS
    assert refused(["acme/b", "acme/e0"], *available).reason is Reason.TOO_MANY_EXPERTS
    one = expert("acme/b@1.0.0")
    assert chosen(["acme/b", "acme/e0"], *available, one) == ["acme/b@1.0.0", "acme/e0@1.0.0"]


def test_an_expert_whose_constraints_cannot_be_read_is_left_out_and_said_to_be() -> None:
    bad = [expert("acme/a@3.0.0", "??"), expert("acme/a@2.0.0", incompatible_with=["b@^1"]), expert("acme/a@v 1")]

    assert chosen(["acme/a"], *bad, expert("acme/a@1.0.0")) == ["acme/a@1.0.0"]
    error = refused(["acme/a"], *bad)
    assert error.reason is Reason.REQUIREMENT_MISSING
    for candidate in bad:
        assert f"{candidate} is left out" in error.message


# Large and hostile catalogues.


def test_ten_experts_with_a_hundred_versions_each_are_no_trouble() -> None:
    available = [
        expert(f"acme/n{n}@1.{minor}.0", *[f"n{n + 1}@>=1.0.0,<2.0.0"] * (n < 9), incompatible_with=["old@<1.0.0"])
        for n in range(10)
        for minor in range(100)
    ]

    assert chosen(["acme/n0"], *available) == [f"acme/n{n}@1.99.0" for n in reversed(range(10))]


def test_ten_experts_with_many_versions_each_are_chosen_at_their_newest_or_as_asked_for() -> None:
    available = [expert(f"acme/n{n}@1.0.{patch}") for n in range(10) for patch in range(200)]
    names = [f"acme/n{n}" for n in range(10)]

    assert chosen(names, *available) == [f"{name}@1.0.199" for name in names]
    exactly = [f"{name}@1.0.3" for name in names]
    assert chosen(exactly, *available) == exactly


def test_versions_that_fail_alike_are_not_all_tried() -> None:
    old = [expert(f"acme/a@1.0.{patch}") for patch in range(100)]
    new = [expert(f"acme/a@2.0.{patch}", incompatible_with=["b", "c"]) for patch in range(500)]
    rest = [expert(f"acme/{name}@1.0.{patch}", "a@<3.0.0") for name in "bc" for patch in range(500)]

    assert chosen(["acme/a", "acme/b", "acme/c"], *old, *new, *rest) == [
        "acme/a@1.0.99",
        "acme/b@1.0.499",
        "acme/c@1.0.499",
    ]
    error = refused(["acme/a@>=2.0.0", "acme/b", "acme/c"], *old, *new, *rest)
    assert error.reason is Reason.EXPERTS_INCOMPATIBLE


def nine_slots(experts: int) -> list[Candidate]:
    """Experts no two of which may have the same of nine versions."""
    names = [f"n{n}" for n in range(experts)]
    return [
        expert(f"acme/{name}@{slot}.0.0", incompatible_with=[f"{other}@{slot}.0.0" for other in names if other != name])
        for name in names
        for slot in range(9)
    ]


def test_a_search_without_end_is_refused_for_what_it_is() -> None:
    error = refused([f"acme/n{n}" for n in range(10)], *nine_slots(10))

    assert error.reason is Reason.RESOLUTION_TOO_HARD
    assert "was not found out" in error.message
    assert len(chosen([f"acme/n{n}" for n in range(9)], *nine_slots(9))) == 9
    exactly = [f"acme/n{n}@{min(n, 8)}.0.0" for n in range(10)]
    assert refused(exactly, *nine_slots(10)).reason is Reason.EXPERTS_INCOMPATIBLE


def test_the_message_of_a_refusal_is_bounded() -> None:
    available = [expert(f"acme/{'n' * 60}{n}@1.0.0", *[f"{'m' * 60}{m}" for m in range(200)]) for n in range(10)]
    versions = [expert(f"acme/a@{n}.0.0", f"{'m' * 60}{n}@{'9' * 60}.0.0") for n in range(100)]

    error = refused([f"acme/{'n' * 60}{n}" for n in range(10)], *available)
    assert error.reason is Reason.TOO_MANY_EXPERTS
    assert len(error.message) < 3000
    error = refused(["acme/a"], *versions)
    assert error.reason is Reason.REQUIREMENT_MISSING
    assert len(error.message) < 3000


def test_an_expert_that_nobody_released_is_spelled_by_its_name() -> None:
    alone = replace(expert("acme/json@1.0.0"), publisher="")

    assert str(alone) == "json@1.0.0"
    with pytest.raises(HocketError, match="sql was asked for; of sql there is none") as error:
        resolve([Requirement("sql", publisher="")], [alone])
    assert error.value.reason is Reason.REQUIREMENT_MISSING
    assert "/sql" not in error.value.message
    assert [str(each.candidate) for each in resolve([Requirement("json", publisher="")], [alone]).experts] == [
        "json@1.0.0"
    ]
