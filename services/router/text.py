"""One request for text: find its experts, choose a base, place it. The outcome is a plan.

Whether the experts go together otherwise, by what they require and exclude, is decided by the worker that reads their
packages.
"""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.bases import Match, compatibility, normalised_name
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.telemetry import metrics
from hocket.v1 import plan_pb2, text_pb2
from services.router.placement import place_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hocket.v1.router_pb2 import ChosenExpert, GenerateRequest
    from services.router.directory import Snapshot
    from services.router.experts import Expert
    from services.router.placement import Base, Loads, Placed, Worker

EXPERTS_MAX: Final = 10
"""Most experts of one text."""
WEIGHT_MAX: Final = 100.0
"""Largest weight of an expert, either way."""
TEXT_BYTES_MAX: Final = 2**20
"""Most text of a request, in UTF-8."""
MESSAGES_MAX: Final = 1024
"""Most messages of a conversation."""
_ROLES: Final = ("system", "user", "assistant", "tool")
_LAST_ROLES: Final = ("user", "tool")
_SEED_BITS: Final = 53
"""Seeds that are drawn: numbers that every client can repeat, those included whose numbers are all doubles."""
_SHOWN_CHARS_MAX: Final = 256
_BASES_SHOWN_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class TextDecision:
    """What one request comes to.

    Args:
        plan: Who computes, as a message.
        placed: The base with the first replica, and each expert, for the load counts.
        degradations: What the plan already gives up.
        seconds: Time the decision took.
    """

    plan: text_pb2.TextPlan
    placed: Placed
    degradations: Sequence[str]
    seconds: float

    def count(self) -> None:
        """Count what this decision gives up, once it is acted upon."""
        if "UNSIGNED_EXPERT" in self.degradations:
            metrics.UNSIGNED_USES.labels("router").inc()

    def job(self, request: GenerateRequest) -> text_pb2.TextJob:
        """What a worker is asked for: the plan's seed is the only one."""
        job = text_pb2.TextJob(plan=self.plan, input=request.input, sampling=request.sampling)
        job.sampling.ClearField("seed")
        return job


def decide_text(snapshot: Snapshot, loads: Loads, request: GenerateRequest) -> TextDecision:
    """Decide one request on a snapshot. Nothing is reserved yet.

    Raises:
        HocketError: As the contract of Generate says.
    """
    begin = time.perf_counter()
    _check_input(request.input)
    chosen = _experts(snapshot, request.experts)
    experts = [expert for expert, _ in chosen]
    base, by_name = _base(request.base, experts, snapshot.workers)
    digests = frozenset(expert.package.digest for expert in experts)
    size_bytes = sum(expert.package.adapter.parameter_bytes for expert in experts)
    workers = place_text(digests, size_bytes, base.digest, snapshot.workers, loads)
    if not workers:
        raise HocketError(
            Reason.NO_REPLICA,
            f"no worker that has the base {_shown(base)} takes new requests with room for {size_bytes} bytes of "
            "experts: try again, or give a worker a larger budget_bytes",
            retry_after_seconds=1.0,
        )
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
    )
    placed = [(base.digest, workers[0].name), *((digest, None) for digest in digests)]
    degradations = []
    if any(expert.package.unsigned_by_policy for expert in experts):
        degradations.append("UNSIGNED_EXPERT")
    if by_name:
        degradations.append("BASE_BY_NAME")
    return TextDecision(plan, placed, degradations, time.perf_counter() - begin)


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
                allowed = _LAST_ROLES if place == len(messages) - 1 else _ROLES
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
        if not math.isfinite(weight) or abs(weight) > WEIGHT_MAX:
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


def _expert(snapshot: Snapshot, address: str, field: str) -> Expert:
    shown = address[:_SHOWN_CHARS_MAX]
    if not address:
        raise HocketError(Reason.BAD_REQUEST, "an expert has no name: send a name or a digest", field=field)
    expert = snapshot.experts.find(address, field)
    if expert is not None:
        expert.check_servable()
        return expert
    if (of := address.partition("#")[0]) in snapshot.addresses or of in snapshot.packages:
        raise HocketError(
            Reason.NOT_SERVABLE, f"{shown} answers rows of numbers: only adapter experts answer text", field=field
        )
    raise HocketError(
        Reason.UNKNOWN_EXPERT, f"there is no expert {shown!r}; {snapshot.experts.advice(address)}", field=field
    )


def _base(wanted: str, experts: Sequence[Expert], workers: Iterable[Worker]) -> tuple[Base, bool]:
    """The base of a request, and whether nothing but a name says that an expert belongs to it."""
    bases = _live_bases(workers)
    if wanted:
        bases = _named(wanted, bases)
    elif not bases:
        raise HocketError(
            Reason.UNKNOWN_BASE,
            "no live worker has a base: add one (`hocket base add FOLDER`) and start a worker with it",
            field="base",
        )
    fitting = [
        (len([match for match in matches if match is Match.BY_NAME]), base)
        for base in bases
        if Match.DIFFERENT not in (matches := [_match(expert, base) for expert in experts])
    ]
    if not fitting:
        raise _mismatch(experts, bases)
    fewest = min(count for count, _ in fitting)
    best = [base for count, base in fitting if count == fewest]
    if len(best) > 1:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"several bases could answer: say which in `base`, by digest: {_listed(best)}",
            field="base",
        )
    return best[0], fewest > 0


def _live_bases(workers: Iterable[Worker]) -> list[Base]:
    """Each base that a worker takes text for; where none does, each that one will no longer take text for."""
    able = sorted((worker for worker in workers if "expert" in worker.formats), key=lambda worker: worker.name)
    for draining in (False, True):
        bases = {
            worker.base.digest: worker.base
            for worker in able
            if worker.base is not None and worker.draining is draining
        }
        if bases:
            return [*bases.values()]
    return []


def _named(wanted: str, bases: Sequence[Base]) -> list[Base]:
    name = normalised_name(wanted)
    if is_digest(wanted):
        named = [base for base in bases if base.digest == wanted]
    else:
        named = [base for base in bases if name and normalised_name(base.name) == name]
    if not named:
        there = f"there is {_listed(bases)}" if bases else "nor any other"
        raise HocketError(
            Reason.UNKNOWN_BASE,
            f"no live worker has the base {wanted[:_SHOWN_CHARS_MAX]!r}; {there}. `hocket base add FOLDER` adds one",
            field="base",
        )
    if len(named) > 1:
        raise HocketError(
            Reason.BAD_REQUEST, f"several bases have that name: say which by digest: {_listed(named)}", field="base"
        )
    return named


def _match(expert: Expert, base: Base) -> Match:
    return compatibility(expert.package.adapter.base, base).match


def _mismatch(experts: Sequence[Expert], bases: Sequence[Base]) -> HocketError:
    problems = [
        f"{expert.name} and {_shown(base)}: {found.explanation}"
        for base in bases[:_BASES_SHOWN_MAX]
        for expert in experts
        if (found := compatibility(expert.package.adapter.base, base)).match is Match.DIFFERENT
    ]
    return HocketError(
        Reason.BASE_MISMATCH,
        "no base is right for all of these experts: " + "; ".join(problems[:_BASES_SHOWN_MAX]),
        field="experts",
    )


def _listed(bases: Sequence[Base]) -> str:
    return ", ".join(map(_shown, bases[:_BASES_SHOWN_MAX]))


def _shown(base: Base) -> str:
    return f"{base.name[:_SHOWN_CHARS_MAX]} ({base.digest})"
