"""How good decisions about who answers are. Everything is plain counting over prompts and decisions."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

from benchmarks.routing_set import BASE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.routing_set import Prompt

PRECISION: Final = 0.95
"""How many of the prompts that count as covered must be decided rightly."""
BINS: Final = 10
"""Of equal width, over confidence."""
PROBABILITY_FLOOR: Final = 1e-6
"""What an impossible label is taken to have, so that a loss is finite: 13.8 at most."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers one prompt.

    Attributes:
        chosen: A task, or `BASE`.
        ranked: The experts that something spoke for, best first; the base is not among them.
        confidence: Rises with certainty, comparable between prompts; None for a policy that has no such thing.
        probabilities: By label, summing to 1, those of 0 left out; empty for a policy that has none.
    """

    chosen: str
    ranked: Sequence[str] = ()
    confidence: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted over some prompts.

    Attributes:
        count: How many.
        right: Decided for somebody who may answer.
        activated: Decided for an expert that may not answer. Where only the base may, this is false activation.
        ranked_count: Prompts that some expert may answer.
        top_2: Of these, one that may is among the two experts ranked first.
        macro_f1: The mean F1 over the labels that are right for some of the prompts.
        coverage: The largest share of prompts, most certain first, of which `PRECISION` are right; None without
            confidence.
        calibration_error: The expected calibration error of the chosen label's probability, over `BINS`; None without.
        log_loss: The mean of -ln(what those who may answer have together); None without probabilities.
    """

    count: int
    right: int
    activated: int
    ranked_count: int
    top_2: int
    macro_f1: float
    coverage: float | None
    calibration_error: float | None
    log_loss: float | None


def figures(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> Figures:
    """Count over prompts and their decisions, at least one."""
    pairs = [*zip(prompts, decisions, strict=True)]
    for_experts = [(prompt, decision) for prompt, decision in pairs if prompt.accept != (BASE,)]
    return Figures(
        count=len(pairs),
        right=sum(_is_right(prompt, decision) for prompt, decision in pairs),
        activated=sum(decision.chosen not in (BASE, *prompt.accept) for prompt, decision in pairs),
        ranked_count=len(for_experts),
        top_2=sum(not set(prompt.accept).isdisjoint(decision.ranked[:2]) for prompt, decision in for_experts),
        macro_f1=macro_f1(prompts, decisions),
        coverage=coverage(prompts, decisions),
        calibration_error=calibration_error(prompts, decisions),
        log_loss=log_loss(prompts, decisions),
    )


def macro_f1(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> float:
    """The mean F1 over labels. Where several may answer, the chosen one counts if it may, else the first of them."""
    true, found, both = (defaultdict[str, int](int) for _ in range(3))
    for prompt, decision in zip(prompts, decisions, strict=True):
        label = decision.chosen if _is_right(prompt, decision) else prompt.accept[0]
        true[label] += 1
        found[decision.chosen] += 1
        both[label] += label == decision.chosen
    return math.fsum(2 * both[label] / (true[label] + found[label]) for label in true) / len(true)


def coverage(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> float | None:
    """The largest share, most certain first, of which `PRECISION` are right. The equally certain are one step."""
    steps: list[tuple[float, bool]] = []
    for prompt, decision in zip(prompts, decisions, strict=True):
        if decision.confidence is None:
            return None
        steps.append((decision.confidence, _is_right(prompt, decision)))
    covered = taken = right = 0
    for _, step in groupby(sorted(steps, reverse=True), key=lambda each: each[0]):
        outcomes = [outcome for _, outcome in step]
        taken += len(outcomes)
        right += sum(outcomes)
        if right >= PRECISION * taken:
            covered = taken
    return covered / len(steps)


def calibration_error(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> float | None:
    """How far the chosen label's probability is from the share of right ones, weighted over `BINS`.

    M. P. Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning" (2015).
    """
    bins: dict[int, list[float]] = defaultdict(list)
    for prompt, decision in zip(prompts, decisions, strict=True):
        if not decision.probabilities:
            return None
        probability = decision.probabilities.get(decision.chosen, 0.0)
        bins[min(int(probability * BINS), BINS - 1)].append(_is_right(prompt, decision) - probability)
    return math.fsum(abs(math.fsum(gaps)) for gaps in bins.values()) / len(prompts)


def log_loss(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> float | None:
    """The mean of -ln(p), p being what those who may answer have together, at least `PROBABILITY_FLOOR`."""
    losses = []
    for prompt, decision in zip(prompts, decisions, strict=True):
        if not decision.probabilities:
            return None
        accepted = math.fsum(decision.probabilities.get(label, 0.0) for label in prompt.accept)
        losses.append(-math.log(min(max(accepted, PROBABILITY_FLOOR), 1.0)))
    return math.fsum(losses) / len(losses)


def flips(before: Sequence[Decision], after: Sequence[Decision]) -> int:
    """How many prompts are decided otherwise."""
    return sum(one.chosen != other.chosen for one, other in zip(before, after, strict=True))


def _is_right(prompt: Prompt, decision: Decision) -> bool:
    return decision.chosen in prompt.accept
