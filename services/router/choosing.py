"""Who answers a text that names no experts: the gate's scores, turned into a choice.

By the rules two things are decided. Whether any expert answers, on scores, by the highest one:

    confidence = 1 / (1 + exp(SHARPNESS (score of the base - highest score)))

has to be at least `CONFIDENCE_MIN`; otherwise the base does. How many other experts there are, and what they say, does
not matter to it. And which one, on ranks, by the share of each expert whose score is above 0:

    p_e = confidence exp(SHARPNESS rank_e) / sum over these experts.

The base has the rest, 1 - confidence. Where several may answer, those join the best whose probability is at least
`SHARE_MIN` of its, best first, as far as they go together; weights are the probabilities, scaled to sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket import composition
from hocket.errors import HocketError
from hocket.v1.router_pb2 import EvidenceKind
from hocket.v1.text_pb2 import DecisionReason, Policy
from services.router import hivellm
from services.router.rules import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.router.experts import Expert
    from services.router.rules import RulesGate

SHARPNESS: Final = 2.0
"""How fast a higher score becomes a higher probability: one keyword more makes odds e^2 times what they were."""
CONFIDENCE_MIN: Final = 0.6
"""Theta: harm of a wrong expert, divided by the sum of that and the harm of a missing one."""
SHARE_MIN: Final = 0.5
"""Rho: least share of the best probability that joins it."""
CANDIDATES_MAX: Final = 32
"""So many candidates are kept, the best ones."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert that something in a text speaks for or against.

    Attributes:
        expert: It.
        score: How much.
        evidence: Tells what the score is made of.
        probability: As the module says; 0 where the policy has none, and for a score that is not above 0.
        weight: In the plan; 0 when not chosen.
    """

    expert: Expert
    score: float
    evidence: Callable[[], Sequence[Evidence]]
    probability: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers, and why.

    Attributes:
        policy: Who has decided.
        reason: Why these.
        chosen: The experts with their weights, heaviest first; none for the base.
        candidates: Whom something in the text speaks for or against, best first, `CANDIDATES_MAX` of them.
        candidate_count: How many there are.
        base_evidence: What speaks for the base.
        base_probability: As the module says; 0 where the policy has none.
        confidence: As the module says; 0 where the policy has none, and where nothing speaks for an expert.
    """

    policy: Policy.ValueType
    reason: DecisionReason.ValueType
    chosen: Sequence[tuple[Expert, float]] = ()
    candidates: Sequence[Candidate] = ()
    candidate_count: int = 0
    base_evidence: Sequence[Evidence] = ()
    base_probability: float = 0.0
    confidence: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Who may be chosen.

    Attributes:
        allowed: Digests; None for all.
        denied: Digests that are not.
        size_bytes_max: Most that the chosen may take together: the largest worker's room.
        count_max: Most experts.
    """

    allowed: frozenset[str] | None = None
    denied: frozenset[str] = field(default_factory=frozenset)
    size_bytes_max: int = 2**63
    count_max: int = 1

    @property
    def is_selective(self) -> bool:
        """Whether the caller has named anybody."""
        return self.allowed is not None or bool(self.denied)

    def admits(self, expert: Expert) -> bool:
        """Whether an expert may be chosen at all."""
        digest = expert.package.digest
        return (
            (self.allowed is None or digest in self.allowed)
            and digest not in self.denied
            and expert.package.adapter.parameter_bytes <= self.size_bytes_max
        )


def by_rules(gate: RulesGate, text: str, bounds: Bounds) -> Choice:
    """Choose by the rules gate.

    Args:
        gate: Of the base.
        text: As `gate_text` gave it.
        bounds: Who may be chosen: nobody else has a probability.
    """
    reading = gate.read(text)
    places = reading.scores.nonzero()[0]
    places = places[gate.sizes_bytes[places] <= bounds.size_bytes_max]
    if bounds.is_selective:
        places = places[[bounds.admits(gate.experts[place]) for place in places]]
    scores, ranks = reading.scores[places], reading.ranks[places]
    order = np.lexsort((-ranks, scores <= 0))
    places, scores, ranks = places[order], scores[order], ranks[order]
    count = int((scores > 0).sum())
    odds = np.zeros(len(places))
    odds[:count] = np.exp(SHARPNESS * (ranks[:count] - ranks[:1]))
    best = float(scores.max(initial=0.0))
    confidence = 1.0 / (1.0 + math.exp(SHARPNESS * (reading.base_score - best))) if count else 0.0
    total = math.fsum(odds) if count else 1.0
    candidates = [
        Candidate(
            expert=gate.experts[place],
            score=float(score),
            evidence=partial(gate.evidence, int(place), reading),
            probability=confidence * float(each) / total,
        )
        for place, score, each in zip(places[:CANDIDATES_MAX], scores, odds, strict=False)
    ]
    weights: Mapping[str, float] = {}
    if not count:
        reason = DecisionReason.DECISION_REASON_BASE_NO_MATCH
    elif confidence >= CONFIDENCE_MIN:
        reason = DecisionReason.DECISION_REASON_GATE
        weights = _weights(candidates[:count], bounds)
    elif reading.seen.generic_form:
        reason = DecisionReason.DECISION_REASON_BASE_GENERIC
    else:
        reason = DecisionReason.DECISION_REASON_BASE_LOW_CONFIDENCE
    return Choice(
        policy=Policy.POLICY_RULES,
        reason=reason,
        chosen=_chosen(candidates, weights),
        candidates=_weighted(candidates, weights),
        candidate_count=len(places),
        base_evidence=reading.base_evidence(),
        base_probability=1.0 - confidence,
        confidence=confidence,
    )


def by_hivellm(gate: RulesGate, text: str, bounds: Bounds) -> Choice:
    """Choose as the format's own chat command does: one expert at most, of equals the one with the lower digest."""
    said = hivellm.Said(text)
    general = hivellm.general_question(said)
    candidates = []
    for expert in filter(bounds.admits, gate.experts):
        evidence = hivellm.chat_evidence(said, expert.package.adapter)
        if score := math.fsum(each.contribution for each in evidence):
            candidates.append(Candidate(expert, score, partial(list, evidence)))
    candidates.sort(key=lambda candidate: -candidate.score)
    weights: Mapping[str, float] = {}
    if general:
        reason = DecisionReason.DECISION_REASON_BASE_GENERIC
    elif candidates and candidates[0].score > 0:
        reason = DecisionReason.DECISION_REASON_GATE
        weights = {candidates[0].expert.package.digest: 1.0}
    else:
        reason = DecisionReason.DECISION_REASON_BASE_NO_MATCH
    generic = Evidence(EvidenceKind.EVIDENCE_KIND_GENERIC, general, 0.0)
    return Choice(
        policy=Policy.POLICY_HIVELLM,
        reason=reason,
        chosen=_chosen(candidates, weights),
        candidates=_weighted(candidates[:CANDIDATES_MAX], weights),
        candidate_count=len(candidates),
        base_evidence=[generic] if general else [],
    )


def _weights(ranked: Sequence[Candidate], bounds: Bounds) -> dict[str, float]:
    """The weights of those that answer, by digest: the best, and whoever joins it."""
    best = ranked[0]
    members = [best]
    for candidate in ranked[1:]:
        if len(members) == bounds.count_max or candidate.probability < SHARE_MIN * best.probability:
            break
        if _go_together([each.expert for each in (*members, candidate)], bounds.size_bytes_max):
            members.append(candidate)
    total = math.fsum(each.probability for each in members)
    return {each.expert.package.digest: each.probability / total for each in members}


def _go_together(experts: Sequence[Expert], size_bytes_max: int) -> bool:
    """Whether experts may be composed, by the rules that a worker has for it."""
    packages = [expert.package for expert in experts]
    if sum(package.adapter.parameter_bytes for package in packages) > size_bytes_max:
        return False
    try:
        composition.check_exactly([[*composition.candidates([package])] for package in packages])
    except HocketError:
        return False
    return True


def _chosen(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> list[tuple[Expert, float]]:
    return [
        (candidate.expert, weights[candidate.expert.package.digest])
        for candidate in candidates
        if candidate.expert.package.digest in weights
    ]


def _weighted(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> Sequence[Candidate]:
    if not weights:
        return candidates
    return [
        Candidate(
            each.expert, each.score, each.evidence, each.probability, weights.get(each.expert.package.digest, 0.0)
        )
        for each in candidates
    ]
