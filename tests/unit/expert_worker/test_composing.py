"""Which experts a worker lets answer together."""

from __future__ import annotations

from typing import Any

import pytest

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName
from hocket.packages import Proof
from hocket.packages.adapter import AdapterFacts, AdapterKind, UpstreamSignature
from hocket.requirements import Constraints
from hocket.text_limits import EXPERTS_MAX
from services.expert_worker.composing import check_count, check_together

BASE = BaseModel("Qwen/Qwen3-0.6B")

Expert = tuple[AdapterFacts, tuple[Proof, ...]]


def expert(name: str, *publishers: str, version: str = "1.0.0", base: BaseModel = BASE, **constraints: Any) -> Expert:
    facts = AdapterFacts(
        digest=f"sha256:{name}{version}",
        size_bytes=9,
        format_version="2.0",
        compression="gzip",
        name=name,
        version=version,
        description="",
        kind=AdapterKind.LORA,
        base=base,
        capabilities=(),
        tags=(),
        constraints=Constraints(**constraints),
        signature=UpstreamSignature(),
        metadata={},
        sections=(),
    )
    owners = publishers or ("acme",)
    proofs = [Proof("release", "k", owner, ReleaseName.parse(f"{owner}/{name}@{version}")) for owner in owners if owner]
    return facts, tuple(proofs) or (Proof("policy"),)


def refused(*experts: Expert) -> HocketError:
    with pytest.raises(HocketError) as refusal:
        check_together(experts)
    return refusal.value


def test_experts_without_constraints_go_together_and_so_does_one_alone_and_none() -> None:
    check_together([expert("sql"), expert("json")])
    check_together([expert("sql")])
    check_together([])


def test_what_an_expert_requires_must_be_named_as_well() -> None:
    needy = expert("sql", requires=("json@>=1.0.0",))
    refusal = refused(needy)
    assert refusal.reason is Reason.REQUIREMENT_MISSING
    assert "acme/json" in refusal.message
    assert refused(needy, expert("json", version="0.9.0")).reason is Reason.REQUIREMENT_MISSING
    check_together([needy, expert("json")])


def test_a_bare_requirement_means_an_expert_of_the_same_publisher() -> None:
    needy = expert("sql", requires=("json",))
    assert refused(needy, expert("json", "zeta")).reason is Reason.REQUIREMENT_MISSING
    check_together([needy, expert("json", "acme", "zeta")])
    check_together([expert("sql", requires=("zeta/json",)), expert("json", "acme", "zeta")])


def test_what_an_expert_excludes_must_not_be_named() -> None:
    picky = expert("sql", incompatible_with=("json<=1.0.0",))
    assert refused(picky, expert("json")).reason is Reason.EXPERTS_INCOMPATIBLE
    check_together([picky, expert("json", version="1.1.0")])


def test_an_expert_bounds_how_many_there_are() -> None:
    shy = expert("sql", max_chain=2)
    assert refused(shy, expert("json"), expert("xml")).reason is Reason.TOO_MANY_EXPERTS
    check_together([shy, expert("json")])


def test_so_many_as_the_suite_allows_and_not_one_more() -> None:
    check_count(EXPERTS_MAX)
    with pytest.raises(HocketError) as refusal:
        check_count(EXPERTS_MAX + 1)
    assert refusal.value.reason is Reason.TOO_MANY_EXPERTS


def test_two_versions_of_one_expert_do_not_go_together() -> None:
    assert refused(expert("sql"), expert("sql", version="2.0.0")).reason is Reason.EXPERTS_INCOMPATIBLE
    check_together([expert("sql"), expert("sql", "zeta", version="2.0.0")])


def test_experts_of_different_bases_do_not_go_together() -> None:
    assert refused(expert("sql"), expert("json", base=BaseModel("other"))).reason is Reason.BASE_MISMATCH


def test_experts_that_require_each_other_are_a_cycle() -> None:
    refusal = refused(expert("sql", requires=("json",)), expert("json", requires=("sql",)))
    assert refusal.reason is Reason.REQUIREMENT_CYCLE


def test_pre_releases_and_dates_may_be_asked_for() -> None:
    check_together([expert("sql", version="1.0.0-rc.1"), expert("json", version="2026-01-01")])


def test_what_nobody_released_is_nobodys() -> None:
    check_together([expert("sql", ""), expert("json")])
    assert refused(expert("sql", requires=("json",)), expert("json", "")).reason is Reason.REQUIREMENT_MISSING
