"""The gate on the routing set, beside a majority and the nearest training example; `--page` renews docs/routing.md."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.nearest import Nearest
from benchmarks.report import record
from benchmarks.routing_metrics import Decision, Figures, figures, flips
from benchmarks.routing_set import BASE, STRATA, read
from hocket.evaluation import wilson_interval
from hocket.identity import digest_of
from hocket.packages.expert.manifest import parse_manifest
from hocket.v1.package_pb2 import AdapterFacts, Package, RoutingHints
from services.router.choosing import Bounds, by_hivellm, by_rules
from services.router.experts import Expert
from services.router.rules import RulesGate, Terms
from training.starter import world
from training.starter.corpus import TASKS
from training.starter.task import Split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from benchmarks.routing_set import Prompt, RoutingSet
    from services.router.choosing import Choice

MANIFESTS: Final = Path(__file__).parents[1] / "training" / "starter" / "experts"
PAGE: Final = Path(__file__).parents[1] / "docs" / "routing.md"
FIGURES_BEGIN: Final = "<!-- figures: python -m benchmarks.routing --page -->\n"
FIGURES_END: Final = "<!-- end of figures -->\n"
ALL: Final = "all"
CHESS: Final = RoutingHints(
    keywords=["chess", "rook", "bishop", "gambit", "endgame", "checkmate", "grandmaster", "castling"], priority=0.9
)
"""What an expert says that has nothing to do with the kit."""
_CONVENTION: Final = "expert-"
_EXAMPLES: Final = 200
_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class Policy:
    """Somebody who decides.

    Attributes:
        name: In the table.
        decide: Gives the decision for a text.
    """

    name: str
    decide: Callable[[str], Decision]


def expert(name: str, capabilities: Iterable[str], routing: RoutingHints) -> Expert:
    """An expert as the directory would hold it, by what its manifest says."""
    facts = AdapterFacts(name=name, version="1.0.0", capabilities=capabilities, routing=routing)
    return Expert(Package(digest=digest_of(name.encode()), adapter=facts), f"hocket/{name}@1.0.0", None)


def kit(folder: Path = MANIFESTS) -> list[Expert]:
    """The experts of the starter kit, by digest as the directory has them."""
    experts = []
    for path in folder.glob("*.json"):
        manifest = parse_manifest(path.read_bytes())
        stated = manifest.routing
        if stated is not None:
            routing = RoutingHints(
                keywords=stated.keywords,
                exclude_keywords=stated.exclude_keywords,
                router_hint=stated.router_hint or "",
                priority=stated.priority,
            )
            experts.append(expert(manifest.name, manifest.capabilities, routing))
    return sorted(experts, key=lambda each: each.package.digest)


def policies(experts: Sequence[Expert]) -> list[Policy]:
    """Those that choose among experts by what they say about themselves."""
    gate = RulesGate(experts, {each.package.digest: Terms.of(each.package) for each in experts})
    return [
        Policy("rules", lambda text: _decision(by_rules(gate, text, Bounds()))),
        Policy("hivellm", lambda text: _decision(by_hivellm(gate, text, Bounds()))),
    ]


def majority(prompts: Sequence[Prompt]) -> Policy:
    """Whoever may answer most of the prompts answers all."""
    labels = sorted({label for prompt in prompts for label in prompt.accept})
    most = max(labels, key=lambda label: sum(label in prompt.accept for prompt in prompts))
    return Policy("majority", lambda _: Decision(most))


def nearest(examples: int = _EXAMPLES, seed: str = "routing") -> Policy:
    """Whoever answered the most similar training example, or question or piece of talk of the base.

    Args:
        examples: So many of each expert; of the base three times as many, half of them talk.
        seed: Another one draws other examples.
    """
    random = Random(seed)  # noqa: S311  # reproducible, not secret
    drawn: dict[tuple[str, str], None] = {}
    for name, task in TASKS.items():
        for _ in range(examples):
            drawn[task.example(random, Split.TRAIN).prompt, name] = None
    for _ in range(3 * examples // 2):
        drawn[world.TASK.example(random, Split.TRAIN).prompt, BASE] = None
        drawn[world.conversation(random)[0][0], BASE] = None
    known = Nearest([*drawn])

    def decide(text: str) -> Decision:
        ranked = known.ranked(text)
        (label, similarity), experts = ranked[0], [label for label, _ in ranked if label != BASE]
        return Decision(label, experts, similarity)

    return Policy("nearest example", decide)


def decisions(policy: Policy, prompts: Sequence[Prompt]) -> list[Decision]:
    """What a policy decides for each prompt."""
    return [policy.decide(prompt.text) for prompt in prompts]


def parts(prompts: Sequence[Prompt], decided: Sequence[Decision]) -> Iterator[tuple[str, Figures]]:
    """The figures of each stratum, then of all prompts."""
    for stratum in STRATA:
        pairs = [each for each in zip(prompts, decided, strict=True) if each[0].stratum == stratum]
        yield stratum, figures([prompt for prompt, _ in pairs], [decision for _, decision in pairs])
    yield ALL, figures(prompts, decided)


def page_table(rows: Sequence[tuple[str, str, Figures]], digest: str) -> str:
    """The figures as Markdown: rows of policy, stratum and figures."""
    columns = (
        *("policy", "stratum", "prompts", "right", "wrong expert", "macro-F1", "in the first two", "coverage at 95 %"),
        *("calibration error", "log-loss"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for policy, stratum, found in rows:
        cells = (
            *(policy, stratum, str(found.count), _share(found.right, found.count)),
            _share(found.activated, found.count),
            f"{found.macro_f1:.2f}" if found.ranked_count else "",
            _share(found.top_2, found.ranked_count) if found.ranked_count else "",
            *(
                "" if each is None else f"{each:.2f}"
                for each in (found.coverage, found.calibration_error, found.log_loss)
            ),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Set: `{digest}`.", ""])


def measure(routing_set: RoutingSet, chosen: Sequence[Policy]) -> list[tuple[str, str, Figures]]:
    """The figures of policies, stratum by stratum."""
    prompts = routing_set.prompts
    return [(each.name, *part) for each in chosen for part in parts(prompts, decisions(each, prompts))]


def write_page(table: str, page: Path = PAGE) -> None:
    """Put the figures in their place in the page."""
    before, _, rest = page.read_text().partition(FIGURES_BEGIN)
    _, _, after = rest.partition(FIGURES_END)
    page.write_text(f"{before}{FIGURES_BEGIN}\n{table}\n{FIGURES_END}{after}")


def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-save", action="store_true", help="do not keep the result")
    parser.add_argument("--page", action="store_true", help="write the figures into docs/routing.md")
    arguments = parser.parse_args()
    routing_set, experts = read(), kit()
    prompts = routing_set.prompts
    chosen = [*policies(experts), majority(prompts), nearest()]
    measured = measure(routing_set, chosen)
    table = page_table(measured, routing_set.digest)
    print(table)
    if arguments.page:
        write_page(table)
    notes: dict[str, Any] = {"set": routing_set.digest, "experts": len(experts), "prompts": len(prompts)}
    for each in chosen:
        times = _times(each, prompts)
        p50, p99 = np.quantile(times, [0.5, 0.99])
        notes[f"{each.name}, per decision"] = f"p50 {p50:.3f} ms, p99 {p99:.3f} ms"
    before = decisions(chosen[0], prompts)
    more = [*experts, expert("expert-chess", ["domain:chess"], CHESS)]
    for change, others in (
        ("an expert for chess beside them", more),
        ("other digests, in reverse order", experts[::-1]),
    ):
        notes[f"rules, decided otherwise with {change}"] = (
            f"{flips(before, decisions(policies(others)[0], prompts))} of {len(prompts)}"
        )
    record("routing", [_row(*each) for each in measured], notes, save=not arguments.no_save)


def _decision(choice: Choice) -> Decision:
    """A choice of the router, in the set's labels."""
    scored = [each for each in choice.candidates if each.score > 0]
    probabilities = {_label(each.expert): each.probability for each in scored if each.probability}
    if choice.confidence or choice.base_probability:
        probabilities[BASE] = choice.base_probability
    chosen = _label(choice.chosen[0][0]) if choice.chosen else BASE
    return Decision(
        chosen=chosen,
        ranked=[_label(each.expert) for each in scored],
        confidence=probabilities.get(chosen),
        probabilities=probabilities,
    )


def _label(one: Expert) -> str:
    return one.package.adapter.name.removeprefix(_CONVENTION)


def _times(policy: Policy, prompts: Sequence[Prompt]) -> list[float]:
    """Milliseconds of every decision; the set has been decided before."""
    times = []
    for _ in range(_ROUNDS):
        for prompt in prompts:
            begin = time.perf_counter()
            policy.decide(prompt.text)
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def _share(some: int, count: int) -> str:
    low, high = wilson_interval(some, count)
    return f"{some / count:.2f} [{low:.2f}, {high:.2f}]"


def _row(policy: str, stratum: str, found: Figures) -> dict[str, Any]:
    def optional(value: float | None) -> float | str:
        return "" if value is None else value

    return {
        "policy": policy,
        "stratum": stratum,
        "prompts": str(found.count),
        "right": _share(found.right, found.count),
        "wrong expert": _share(found.activated, found.count),
        "macro-F1": found.macro_f1 if found.ranked_count else "",
        "top 2": _share(found.top_2, found.ranked_count) if found.ranked_count else "",
        "coverage": optional(found.coverage),
        "ECE": optional(found.calibration_error),
        "log-loss": optional(found.log_loss),
    }


if __name__ == "__main__":
    main()
