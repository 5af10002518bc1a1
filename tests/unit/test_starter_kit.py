"""The starter kit as it lies in the repository."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hocket.base_folder import base_digest
from hocket.identity import digest_of
from hocket.packages import open_package
from hocket.packages.adapter import AdapterFacts, AdapterKind
from hocket.trust_folder import TrustFolder
from training.starter.corpus import TASKS

KIT = Path(__file__).parents[2] / "starter"
BASE = KIT / "hocket-starter"
PACKAGES = [KIT / "experts" / f"expert-{name}.expert" for name in TASKS]
MEBIBYTE = 2**20


def opened(path: Path) -> AdapterFacts:
    release = path.with_name(f"{path.name}.release.json").read_bytes()
    trust = TrustFolder(KIT / "trust").read()
    package = open_package(path.read_bytes(), releases=[release], trust=trust, now=datetime.now(UTC))
    assert isinstance(package.facts, AdapterFacts)
    return package.facts


def test_there_is_one_expert_for_every_task_and_nothing_else() -> None:
    assert sorted((KIT / "experts").glob("*.expert")) == sorted(PACKAGES)


@pytest.mark.parametrize("path", PACKAGES, ids=[*TASKS])
def test_an_expert_is_signed_by_the_kits_publisher_and_rides_on_this_base_alone(path: Path) -> None:
    facts = opened(path)
    assert f"{facts.name}.expert" == path.name
    assert facts.base.digest == base_digest(BASE)
    assert facts.routing is not None
    assert path.stat().st_size < 4 * MEBIBYTE


def test_the_kinds_are_spread() -> None:
    assert {opened(path).kind for path in PACKAGES} == {*AdapterKind}


def test_the_base_is_small() -> None:
    assert sum(each.stat().st_size for each in BASE.iterdir()) < 16 * MEBIBYTE


def test_the_digests_are_those_of_the_files() -> None:
    digests = json.loads((KIT / "digests.json").read_text())
    assert digests == {
        str(path.relative_to(KIT)): digest_of(path.read_bytes()) for path in sorted([*BASE.iterdir(), *PACKAGES])
    }
