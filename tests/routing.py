"""Adapter experts that say when they want to be asked, for tests of the gate."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hocket.v1.package_pb2 import BaseModel, Package, RoutingHints
from services.router.experts import index
from services.router.placement import Base
from services.router.rules import RulesGate
from tests.fakes import adapter_package

if TYPE_CHECKING:
    from collections.abc import Iterable

BASE = Base("Qwen3-0.6B", f"sha256:{'b' * 64}")
PUBLISHED = ("sql", "neo4j", "json", "elastic", "typescript")
"""Published experts, in the order in which the recorded scores have them."""


def asking_for(
    number: int,
    name: str,
    *keywords: str,
    exclude: Iterable[str] = (),
    hint: str = "",
    priority: float | None = 1.0,
    **facts: Any,
) -> Package:
    """A package of publisher acme with these hints."""
    hints = RoutingHints(keywords=keywords, exclude_keywords=exclude, router_hint=hint, priority=priority)
    stated = {"base": BaseModel(name=BASE.name, digest=BASE.digest), "routing": hints, **facts}
    return adapter_package(f"sha256:{number:064x}", name, **stated)


def gate_of(*packages: Package) -> RulesGate:
    """The gate over these on one base."""
    experts = index(packages)
    return RulesGate(experts.riding_on(BASE), experts.terms)


@cache
def published() -> tuple[Package, ...]:
    """The published experts, with the routing of their manifests; one has none. Skips without the fixtures."""
    folder = os.environ.get("HOCKET_FIXTURES")
    if not folder:
        pytest.skip("HOCKET_FIXTURES is not set: the published manifests are there")
    packages = []
    for number, name in enumerate(PUBLISHED):
        manifest = json.loads((Path(folder) / "expert" / f"expert-{name}" / "manifest.json").read_text())
        package = asking_for(number, f"expert-{name}", capabilities=manifest["capabilities"])
        routing = manifest.get("routing")
        if routing is None:
            package.adapter.ClearField("routing")
        else:
            package.adapter.routing.CopyFrom(
                RoutingHints(
                    keywords=routing["keywords"],
                    exclude_keywords=routing.get("exclude_keywords", ()),
                    router_hint=routing["router_hint"],
                    priority=routing["priority"],
                )
            )
        packages.append(package)
    return tuple(packages)


def recorded(name: str) -> Any:
    """A document of recorded scores or cases."""
    folder = os.environ.get("HOCKET_FIXTURES")
    if not folder:
        pytest.skip("HOCKET_FIXTURES is not set: the recorded scores are there")
    return json.loads((Path(folder) / "expert" / name).read_text())
