"""One request for text: find its experts or have the gate choose them, choose a base, place it. The outcome is a plan.

Whether the experts go together otherwise, by what they require and exclude, is decided by the worker that reads their
packages.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from hocket.bases import Match, compatibility
from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from hocket.text_limits import (
    EXPERTS_MAX,
    LAST_ROLES,
    MESSAGES_MAX,
    ROLES,
    TEXT_BYTES_MAX,
    WEIGHT_MAX,
    check_queueing,
    is_weight,
)
from hocket.v1 import plan_pb2, router_pb2, text_pb2
from services.router import choosing, hivellm
from services.router.bases import RETRY_SECONDS, choose_base, shown
from services.router.choosing import Bounds, Choice
from services.router.placement import place_text
from services.router.prompt_features import gate_text
from services.router.rules import RULES_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hocket.v1.router_pb2 import ChosenExpert, GenerateRequest, Routing
    from services.router.directory import Snapshot
    from services.router.experts import Expert
    from services.router.placement import Base, Loads, Placed, Worker
    from services.router.rules import Evidence

_SEED_BITS: Final = 53
"""Seeds that are drawn: numbers that every client can repeat, those included whose numbers are all doubles."""
_SHOWN_CHARS_MAX: Final = 256
_HINTS_MAX: Final = 4
"""Experts that were not chosen and that a worker is told of, in case the next text wants them."""
NAMED_MAX: Final = 256
"""Experts that a request may allow, or deny."""
_POLICIES: Final = frozenset(text_pb2.Policy.values())


@dataclass(frozen=True, slots=True)
class TextDecision:
    """What one request comes to.

    Args:
        plan: Who computes, as a message.
        choice: How the gate has come to its experts.
        placed: The base with the first replica, and each expert, for the load counts.
        degradations: What the plan already gives up.
        seconds: Time the decision took.
    """

    plan: text_pb2.TextPlan
    choice: Choice
    placed: Placed
    degradations: Sequence[str]
    seconds: float

    def count(self) -> None:
        """Count who has decided, why, and what this decision gives up, once it is acted upon."""
        policy = text_pb2.Policy.Name(self.plan.policy).removeprefix("POLICY_")
        reason = text_pb2.DecisionReason.Name(self.plan.reason).removeprefix("DECISION_REASON_")
        metrics.TEXT_DECISIONS.labels(policy, reason).inc()
        if "UNSIGNED_EXPERT" in self.degradations:
            metrics.UNSIGNED_USES.labels("router").inc()

    def job(self, request: GenerateRequest) -> text_pb2.TextJob:
        """What a worker is asked for: the plan's seed is the only one."""
        missed = (each.expert.package.digest for each in self.choice.candidates if not each.weight)
        job = text_pb2.TextJob(
            plan=self.plan, input=request.input, sampling=request.sampling, hints=islice(missed, _HINTS_MAX)
        )
        if request.HasField("constraint"):
            job.constraint.CopyFrom(request.constraint)
        job.session, job.tenant = request.session, request.tenant
        if request.HasField("priority"):
            job.priority = request.priority
        job.sampling.ClearField("seed")
        return job


def decide_text(snapshot: Snapshot, loads: Loads, request: GenerateRequest) -> TextDecision:
    """Decide one request on a snapshot. Nothing is reserved yet.

    Raises:
        HocketError: As the contract of Generate says.
    """
    begin = time.perf_counter()
    _check_input(request.input)
    _check_routing(request)
    check_queueing(request.session, request.tenant, request.priority)
    chosen = _experts(snapshot, request.experts)
    base, by_name = choose_base(request.base, [expert for expert, _ in chosen], snapshot)
    choice = _choice(snapshot, request, base)
    if not chosen:
        chosen = [*choice.chosen]
        by_name = any(_is_by_name(expert, base) for expert, _ in chosen)
    experts = [expert for expert, _ in chosen]
    digests = frozenset(expert.package.digest for expert in experts)
    size_bytes = sum(expert.package.adapter.parameter_bytes for expert in experts)
    session = f"{len(request.tenant)} {request.tenant} {request.session}" if request.session else ""
    workers = place_text(digests, size_bytes, base.digest, snapshot.workers, loads, session)
    if not workers:
        raise _no_room(base, size_bytes, snapshot.workers)
    plan = text_pb2.TextPlan(
        mode=plan_pb2.MODE_ADAPTER_MIX if len(experts) > 1 else plan_pb2.MODE_PASS,
        base=base.digest,
        base_name=base.name,
        experts=[
            text_pb2.TextExpert(digest=expert.package.digest, name=expert.name, weight=weight)
            for expert, weight in chosen
        ],
        replicas=[
            plan_pb2.Replica(worker=worker.name, address=worker.address, resident=digests <= worker.resident)
            for worker in workers
        ],
        revision=snapshot.revision,
        seed=request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(_SEED_BITS),
        policy=choice.policy,
        reason=choice.reason,
    )
    placed = [(base.digest, workers[0].name), *((digest, None) for digest in digests)]
    degradations = []
    if any(expert.package.unsigned_by_policy for expert in experts):
        degradations.append("UNSIGNED_EXPERT")
    if by_name:
        degradations.append("BASE_BY_NAME")
    return TextDecision(plan, choice, placed, degradations, time.perf_counter() - begin)


def reading_count(snapshot: Snapshot, routing: Routing) -> int:
    """How many experts a decision looks at one by one, at most: that takes a text's length for each of them."""
    if routing.policy != text_pb2.POLICY_HIVELLM:
        return 0
    return max((len(gate.experts) for gate in snapshot.gates.values()), default=0)


def explain_text(decision: TextDecision, given: text_pb2.TextInput) -> router_pb2.TextDecision:
    """A decision with everything behind it."""
    plan, choice = decision.plan, decision.choice
    explained = router_pb2.TextDecision(
        plan=plan,
        base=router_pb2.TextCandidate(
            digest=plan.base,
            name=plan.base_name,
            score=sum(each.contribution for each in choice.base_evidence),
            probability=choice.base_probability,
            weight=float(not plan.experts),
            chosen=not plan.experts,
            evidence=_evidence(choice.base_evidence),
        ),
        candidates=[
            router_pb2.TextCandidate(
                digest=each.expert.package.digest,
                name=each.expert.name,
                score=each.score,
                probability=each.probability,
                weight=each.weight,
                chosen=each.weight > 0,
                evidence=_evidence(each.evidence()),
            )
            for each in choice.candidates
        ],
        candidate_count=choice.candidate_count,
        confidence=choice.confidence,
    )
    if choice.policy == text_pb2.POLICY_RULES:
        explained.rules_version = RULES_VERSION
        explained.thresholds.CopyFrom(
            router_pb2.GateThresholds(
                confidence_min=choosing.CONFIDENCE_MIN,
                share_min=choosing.SHARE_MIN,
            )
        )
    elif choice.policy == text_pb2.POLICY_HIVELLM:
        said = hivellm.Said(gate_text(given))
        for candidate, each in zip(explained.candidates, choice.candidates, strict=True):
            facts = each.expert.package.adapter
            candidate.hivellm.keyword = hivellm.keyword_score(said, facts)
            candidate.hivellm.embedding = hivellm.embedding_score(said, facts)
    return explained


def _evidence(evidence: Iterable[Evidence]) -> list[router_pb2.Evidence]:
    return [router_pb2.Evidence(kind=each.kind, text=each.text, contribution=each.contribution) for each in evidence]


def _choice(snapshot: Snapshot, request: GenerateRequest, base: Base) -> Choice:
    """Which experts answer a request, if it names none."""
    if request.experts:
        return Choice(text_pb2.POLICY_UNSPECIFIED, text_pb2.DECISION_REASON_EXPLICIT)
    routing = request.routing
    allowed = _named(snapshot, routing.allow, "allow") if routing.allow else None
    denied = _named(snapshot, routing.deny, "deny")
    if routing.policy == text_pb2.POLICY_BASE:
        return Choice(text_pb2.POLICY_BASE, text_pb2.DECISION_REASON_POLICY)
    gate = snapshot.gates[base.digest]
    if allowed is not None and not any(expert.package.digest in allowed for expert in gate.experts):
        raise HocketError(
            Reason.BAD_REQUEST,
            f"none of these experts can be chosen on the base {shown(base)}: the gate chooses the newest version of "
            "those that ride on it, say when they want to be asked, and require no others. Allow others, or name one",
            field="routing.allow",
        )
    rooms = [worker.adapter_bytes for worker in snapshot.workers if worker.serves(base.digest) and not worker.draining]
    bounds = Bounds(
        allowed=allowed,
        denied=denied,
        size_bytes_max=max(rooms, default=0),
        count_max=routing.expert_count_max or 1,
    )
    choose = choosing.by_hivellm if routing.policy == text_pb2.POLICY_HIVELLM else choosing.by_rules
    return choose(gate, gate_text(request.input), bounds)


def _check_routing(request: GenerateRequest) -> None:
    routing: Routing = request.routing
    if request.experts and routing.ByteSize():
        raise HocketError(
            Reason.BAD_REQUEST,
            "experts are named, so nothing is left to choose: leave out routing, or the experts",
            field="routing",
        )
    if routing.policy not in _POLICIES:
        raise HocketError(Reason.BAD_REQUEST, "the policy must be RULES, HIVELLM or BASE", field="routing.policy")
    if routing.expert_count_max > EXPERTS_MAX:
        raise HocketError(
            Reason.TOO_MANY_EXPERTS,
            f"{routing.expert_count_max} experts are more than the {EXPERTS_MAX} that go together",
            field="routing.expert_count_max",
        )


def _named(snapshot: Snapshot, addresses: Sequence[str], field: str) -> frozenset[str]:
    """The digests that names in a request stand for; of a name without a version, those of every version."""
    if len(addresses) > NAMED_MAX:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{len(addresses)} experts are named; at most {NAMED_MAX} may be",
            field=f"routing.{field}",
        )
    named: set[str] = set()
    for place, address in enumerate(addresses):
        expert = _find(snapshot, address, f"routing.{field}[{place}]")
        named.add(expert.package.digest)
        if address != expert.package.digest and "@" not in address:
            named |= snapshot.experts.digests[expert.name.rpartition("@")[0]]
    return frozenset(named)


def _no_room(base: Base, size_bytes: int, workers: Sequence[Worker]) -> HocketError:
    """Why nobody computes a text by experts of this size: never, or not now."""
    budgets = [each.adapter_bytes for each in workers if each.serves(base.digest)]
    if max(budgets) < size_bytes:
        return HocketError(
            Reason.DEVICE_MEMORY,
            f"these experts take {size_bytes} bytes together, and no worker that has the base {shown(base)} has more "
            f"than {max(budgets)} for experts: ask for fewer, or give a worker a larger budget_bytes or host_bytes",
            field="experts",
        )
    return HocketError(
        Reason.NO_REPLICA,
        f"no worker that has the base {shown(base)} and room for {size_bytes} bytes of experts takes new requests now: "
        "try again",
        retry_after_seconds=RETRY_SECONDS,
    )


def _check_input(given: text_pb2.TextInput) -> None:
    match given.WhichOneof("content"):
        case "prompt":
            texts = [given.prompt]
        case "raw":
            texts = [given.raw]
        case "conversation":
            messages = given.conversation.messages
            if not 1 <= len(messages) <= MESSAGES_MAX:
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"a conversation has 1 to {MESSAGES_MAX} messages, not {len(messages)}",
                    field="input.conversation.messages",
                )
            for place, message in enumerate(messages):
                allowed = LAST_ROLES if place == len(messages) - 1 else ROLES
                if message.role not in allowed:
                    raise HocketError(
                        Reason.BAD_REQUEST,
                        f"message {place + 1} of {len(messages)} may be by {' or '.join(allowed)}, not "
                        f"{message.role[:_SHOWN_CHARS_MAX]!r}",
                        field=f"input.conversation.messages[{place}].role",
                    )
            texts = [message.content for message in messages]
        case None:
            raise HocketError(
                Reason.BAD_REQUEST, "input is missing: send a prompt, a conversation or raw text", field="input"
            )
    size = sum(len(text.encode()) for text in texts)
    if size > TEXT_BYTES_MAX:
        raise HocketError(
            Reason.TOO_LARGE, f"the input is {size} bytes of text; at most {TEXT_BYTES_MAX} are taken", field="input"
        )


def _experts(snapshot: Snapshot, chosen: Sequence[ChosenExpert]) -> list[tuple[Expert, float]]:
    """The experts of a request, each with its weight, in its order."""
    if len(chosen) > EXPERTS_MAX:
        raise HocketError(
            Reason.TOO_MANY_EXPERTS,
            f"{len(chosen)} experts are asked for; at most {EXPERTS_MAX} go together",
            field="experts",
        )
    found: dict[str, tuple[Expert, float]] = {}
    for place, each in enumerate(chosen):
        weight = each.weight if each.HasField("weight") else 1.0
        if not is_weight(weight):
            raise HocketError(
                Reason.BAD_REQUEST,
                f"the weight {weight:g} is not a number from -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}",
                field=f"experts[{place}].weight",
            )
        expert = _expert(snapshot, each.expert, f"experts[{place}].expert")
        if expert.package.digest in found:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{expert.name} is named twice: name each expert once, with its whole weight",
                field=f"experts[{place}].expert",
            )
        found[expert.package.digest] = (expert, weight)
    return [*found.values()]


def _is_by_name(expert: Expert, base: Base) -> bool:
    return compatibility(expert.package.adapter.base, base).match is Match.BY_NAME


def _expert(snapshot: Snapshot, address: str, field: str) -> Expert:
    """The expert behind an address, which may serve."""
    expert = _find(snapshot, address, field)
    expert.check_servable()
    return expert


def _find(snapshot: Snapshot, address: str, field: str) -> Expert:
    shown = address[:_SHOWN_CHARS_MAX]
    if not address:
        raise HocketError(Reason.BAD_REQUEST, "an expert has no name: send a name or a digest", field=field)
    expert = snapshot.experts.find(address, field)
    if expert is not None:
        return expert
    of, mark, ordinal = address.partition("#")
    if mark and of in snapshot.experts.by_address:
        raise HocketError(
            Reason.UNKNOWN_EXPERT,
            f"{of[:_SHOWN_CHARS_MAX]} is one adapter expert, without others inside: leave out "
            f"{mark + ordinal[:_SHOWN_CHARS_MAX]!r}",
            field=field,
        )
    if of in snapshot.addresses or of in snapshot.packages:
        raise HocketError(
            Reason.NOT_SERVABLE, f"{shown} answers rows of numbers: only adapter experts answer text", field=field
        )
    raise HocketError(
        Reason.UNKNOWN_EXPERT, f"there is no expert {shown!r}; {snapshot.experts.advice(address)}", field=field
    )
