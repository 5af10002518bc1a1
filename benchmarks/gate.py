"""The router's decision alone, for rows and for texts, beside a floor.

Rows: gate and top-k, beside reading the gate's weights once. Texts: the rules gate, scores to choice, beside splitting
the text into its words once; prompts name a few keywords of some experts, and one that many share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.report import record
from hocket.mixtures import SoftmaxGate
from hocket.v1.package_pb2 import AdapterFacts, Package, RoutingHints
from services.router.choosing import Bounds, by_rules
from services.router.experts import Expert
from services.router.gating import softmax_gate
from services.router.prompt_features import words
from services.router.rules import RulesGate, Terms
from services.router.selection import Level, Load, select

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES: Final = 768
_BUDGET_MS: Final = {1_000: 1.0, 10_000: 20.0}
_REPEATS: Final = 400
_RULES_BUDGET_MS: Final = 0.5
_KEYWORDS: Final = 32
_CAPABILITIES: Final = 16
_SHARED_BY: Final = 20
"""One keyword in so many experts is everybody's."""


def _level(experts: int, random: np.random.Generator, first: int = 0) -> Level:
    weights = random.standard_normal((FEATURES, experts)).astype(np.float32)
    gate = softmax_gate(SoftmaxGate(FEATURES, experts, ""), weights)
    return Level(gate, tuple(range(first, first + experts)), 2)


def _hierarchy(experts: int, random: np.random.Generator) -> Level:
    """The same number of experts in groups of its square root."""
    groups = round(experts**0.5)
    size = experts // groups
    below = tuple(_level(size, random, group * size) for group in range(groups))
    weights = random.standard_normal((FEATURES, groups)).astype(np.float32)
    return Level(softmax_gate(SoftmaxGate(FEATURES, groups, ""), weights), below, 2)


def _rules_gate(experts: int) -> RulesGate:
    """Experts as the published ones are: dozens of keywords, some of them shared, capabilities, a hint."""
    found = []
    for number in range(experts):
        keywords = [f"word{number}x{keyword}" for keyword in range(_KEYWORDS)]
        keywords[0] = f"shared{number % _SHARED_BY}"
        keywords[1] = f"phrase {number} of two"
        capabilities = [f"feature:thing{number}x{each}" for each in range(_CAPABILITIES)]
        capabilities[0] = f"query:shared{number % _SHARED_BY}"
        hint = f"query=shared{number % _SHARED_BY} OR task=thing{number}x1"
        routing = RoutingHints(keywords=keywords, exclude_keywords=["what is", "novel"], priority=0.8, router_hint=hint)
        facts = AdapterFacts(name=f"e{number}", capabilities=capabilities, routing=routing)
        found.append(Expert(Package(digest=f"sha256:{number:064x}", adapter=facts), f"acme/e{number}@1.0.0", None))
    return RulesGate(found, {each.package.digest: Terms.of(each.package) for each in found})


_PROMPT: Final = (
    "Please write the shared7 statement for word7x3 and word7x9, phrase 7 of two, that lists the names of all people "
    "who have bought something since January and live in a city with more than 100,000 inhabitants."
)
_PROMPTS: Final = {"200 characters": _PROMPT, "8 KiB": (_PROMPT + " ") * 41}


def _times(function: Callable[[], object]) -> list[float]:
    for _ in range(20):
        function()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-save", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    row = random.standard_normal((1, FEATURES)).astype(np.float32)
    idle = Load(lambda _: 0, 256)
    rows, notes = [], {}
    for experts in (4, 100, 1_000, 10_000):
        weights = random.standard_normal((FEATURES, experts))
        for name, level in (("dense", _level(experts, random)), ("hierarchical", _hierarchy(experts, random))):
            count = max(leaf for leaf in _leaves(level)) + 1
            times = _times(lambda level=level, count=count: select(level, row, count, idle))  # type: ignore[misc]  # defaults bind the loop variables
            floor = statistics.median(_times(lambda weights=weights: weights.sum()))  # type: ignore[misc]  # the same
            p99 = float(np.quantile(times, 0.99))
            figures: dict[str, Any] = {
                "gate": name,
                "experts": f"{experts:,}",
                "p50 ms": statistics.median(times),
                "p99 ms": p99,
                "floor ms": floor,
            }
            rows.append(figures)
            if name == "dense" and experts in _BUDGET_MS:
                notes[f"dense, {experts:,} experts"] = f"p99 {p99:.3f} ms of a budget of {_BUDGET_MS[experts]:g} ms"
    for experts in (10, 100, 1_000, 10_000):
        begin = time.perf_counter()
        gate = _rules_gate(experts)
        built = time.perf_counter() - begin
        for name, prompt in _PROMPTS.items():
            times = _times(lambda gate=gate, prompt=prompt: by_rules(gate, prompt, Bounds()))  # type: ignore[misc]  # the same
            p99 = float(np.quantile(times, 0.99))
            rows.append(
                {
                    "gate": f"rules, {name}",
                    "experts": f"{experts:,}",
                    "p50 ms": statistics.median(times),
                    "p99 ms": p99,
                    "floor ms": statistics.median(_times(lambda prompt=prompt: words(prompt))),  # type: ignore[misc]  # the same
                }
            )
            if experts == 1_000 and prompt == _PROMPT:  # noqa: PLR2004 - what the budget is for
                notes["rules, 1,000 experts"] = f"p99 {p99:.3f} ms of a budget of {_RULES_BUDGET_MS:g} ms"
        notes[f"rules, {experts:,} experts, index"] = f"{built:.2f} s to build, once a snapshot"
    notes["floor"] = "rows: the weights of the dense gate read once (sum of float64); texts: their words"
    record("gate", rows, notes, save=not arguments.no_save)


def _leaves(level: Level) -> list[int]:
    return [leaf for member in level.members for leaf in (_leaves(member) if isinstance(member, Level) else [member])]


if __name__ == "__main__":
    main()
