"""Hostile JSON, manifests and catalogues end within a quarter of a second and 64 MiB each.

In unit tests the same kinds are refused; here they are as large as they may be, and nothing measures coverage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.strict_json import loads
from hocket.requirements import Constraints, Requirement
from hocket.resolution import Candidate, resolve
from tests.manifests import V2, changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.long

SECONDS_MAX = 0.25
BYTES_MAX = 64 * 2**20
MANY = 2**20
DOCUMENTS = {
    "open brackets": b"[" * MANY,
    "brackets closed first": b"]" * (MANY // 2) + b"[" * (MANY // 2),
    "quotes": b'"' * MANY,
    "escaped quotes": b'"' + b'\\"' * (MANY // 2 - 1),
    "backslashes": b'"' + b"\\" * (MANY - 1),
    "empty objects": b"[" + b"{}," * (MANY // 3 - 2) + b"{}]",
    "objects within the bound": b"[" + b"{}," * (2**17 - 8) + b"{}]",
    "numbers": b"[" + b"1.5," * (2**18 - 8) + b"1]",
    "keys": b"{" + b",".join(b'"%x":{}' % n for n in range(80_000)) + b"}",
    "digits": b"1" * MANY,
    "escapes": b'["' + b"\\u1234" * (MANY // 6 - 2) + b'"]',
}

_ADAPTER: dict[str, Any] = {"type": "", "target_modules": [], "sha256": "x"}
_BASE = {"name": "x", "adapters": [_ADAPTER] * 256}
MANIFESTS = {
    "too many adapters": changed(V2, "base_models", [_BASE] * 80),
    "adapters within the bound": changed(V2, "base_models", [_BASE] * 15),
    "too many keywords": changed(V2, "routing.keywords", ["a"] * 200_000),
    "long keywords": changed(V2, "routing.keywords", ["x" * 60_000] * 16),
    "keywords to compose": changed(V2, "routing.keywords", ["\u1100\u1161" * 20_000] * 8),
    "metrics": changed(V2, "evaluation.metrics", {str(n): 1 for n in range(70_000)}),
}


def expert(
    release: str, *requires: str, incompatible_with: Iterable[str] = (), base: BaseModel | None = None
) -> Candidate:
    publisher, name, version = release.replace("@", "/").split("/")
    digest = f"sha256:{hashlib.sha256(release.encode()).hexdigest()}"
    constraints = Constraints(requires=requires, incompatible_with=tuple(incompatible_with))
    return Candidate(digest, publisher, name, version, base or BaseModel("Qwen3-0.6B"), constraints)


def _random_requirements() -> list[Candidate]:
    chance = random.Random(1)
    return [
        expert(
            f"acme/n{n}@{version}.0.0",
            *(
                f"n{other}@{chance.choice(['<', '>=', '='])}{chance.randrange(10)}.0.0"
                for other in chance.sample(range(20), 4)
            ),
        )
        for n in range(20)
        for version in range(10)
    ]


def _exclusive_slots(slots: int) -> list[Candidate]:
    """Ten experts, no two of which may have the same version."""
    return [
        expert(f"acme/n{n}@{slot}.0.0", incompatible_with=[f"n{other}@{slot}.0.0" for other in range(10) if other != n])
        for n in range(10)
        for slot in range(slots)
    ]


def _everything_requires_everything() -> list[Candidate]:
    names = [f"n{n}" for n in range(200)]
    return [expert(f"acme/{name}@1.0.0", *names) for name in names]


def _long_lists() -> list[Candidate]:
    patterns = [f"n{n % 20}@{n}.0.0" for n in range(256)]
    return [
        expert(f"acme/n{n}@{version}.0.0", *[f"q{n}x{m}" for m in range(256)], incompatible_with=patterns)
        for n in range(20)
        for version in range(10)
    ]


CATALOGUES = {
    "random requirements": (_random_requirements(), Reason.TOO_MANY_EXPERTS),
    "nine slots for ten": (_exclusive_slots(9), Reason.RESOLUTION_TOO_HARD),
    "twenty slots for ten": (_exclusive_slots(20), None),
    "everything requires everything": (_everything_requires_everything(), Reason.TOO_MANY_EXPERTS),
    "long lists": (_long_lists(), Reason.TOO_MANY_EXPERTS),
    "a long chain": ([expert(f"acme/n{n}@1.0.0", f"n{n + 1}") for n in range(200)], Reason.TOO_MANY_EXPERTS),
    "each its own base": (
        [
            expert(f"acme/n{n}@{version}.0.0", base=BaseModel(f"m{version + 20 * n}"))
            for n in range(10)
            for version in range(20)
        ],
        Reason.BASE_MISMATCH,
    ),
}


VERSIONS = [f"{n // 1000}.{n // 10 % 100}.{n % 10}" for n in range(5_000)]
NEWEST, OLD = VERSIONS[-1], VERSIONS[3]
LONG_LIVED: dict[str, tuple[Callable[[int], dict[str, Any]], str, str]] = {
    "unconstrained": (lambda _: {}, "", NEWEST),
    "exact versions": (lambda _: {}, f"@{OLD}", OLD),
    "old ones of the first": (lambda n: {"requires": ["n0@<1.0.0"] if n else []}, "", NEWEST),
    "all of one base but one expert": (lambda n: {"base": BaseModel("x")} if n == 5 else {}, "", ""),
    "each excludes all others": (lambda n: {"incompatible_with": [f"n{m}" for m in range(10) if m != n]}, "", ""),
}
"""What ten experts of 5,000 versions each say, which versions are asked for, and which of the last is found, if any."""


def seconds(work: Callable[[], object]) -> float:
    """The best of three, in time of this process: others may be busy."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        with contextlib.suppress(HocketError):
            work()
        best = min(best, time.process_time() - began)
    return best


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(HocketError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_hostile_document_takes_neither_time_nor_memory(data: bytes) -> None:
    def work() -> object:
        return loads(data, what="manifest.json", bytes_max=2**20, depth_max=64)

    assert seconds(work) < SECONDS_MAX
    assert peak_bytes(work) < BYTES_MAX


@pytest.mark.parametrize("document", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_hostile_manifest_takes_neither_time_nor_memory(document: dict[str, Any]) -> None:
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    assert seconds(lambda: parse_manifest(data)) < SECONDS_MAX
    assert peak_bytes(lambda: parse_manifest(data)) < BYTES_MAX


@pytest.mark.parametrize(("available", "reason"), CATALOGUES.values(), ids=CATALOGUES.keys())
def test_a_hostile_catalogue_takes_neither_time_nor_memory(available: list[Candidate], reason: Reason | None) -> None:
    names = sorted({f"{each.publisher}/{each.name}" for each in available})[:10]
    wanted = [Requirement.parse(name) for name in names]
    found = None

    try:
        resolve(wanted, available)
    except HocketError as error:
        found = error.reason
    assert found is reason
    assert seconds(lambda: resolve(wanted, available)) < SECONDS_MAX
    assert peak_bytes(lambda: resolve(wanted, available)) < BYTES_MAX


@pytest.mark.parametrize(("says", "range_", "newest"), LONG_LIVED.values(), ids=LONG_LIVED.keys())
def test_ten_experts_of_five_thousand_versions_each_are_soon_resolved(
    says: Callable[[int], dict[str, Any]], range_: str, newest: str
) -> None:
    available = []
    for n in range(10):
        requires = says(n).get("requires", [])
        others = {key: value for key, value in says(n).items() if key != "requires"}
        available += [expert(f"acme/n{n}@{version}", *requires, **others) for version in VERSIONS]
    random.Random(1).shuffle(available)
    wanted = [Requirement.parse(f"acme/n{n}{range_}") for n in range(10)]
    found = {}

    with contextlib.suppress(HocketError):
        found = {each.candidate.name: each.candidate.version for each in resolve(wanted, available).experts}
    assert found.get("n9", "") == newest
    assert seconds(lambda: resolve(wanted, available)) < SECONDS_MAX
    assert peak_bytes(lambda: resolve(wanted, available)) < BYTES_MAX
