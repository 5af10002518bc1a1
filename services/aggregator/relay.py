"""A text job: one worker answers it, and every event is passed on as it comes."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason, Situation
from hocket.identity import is_digest
from hocket.telemetry import metrics
from hocket.text_limits import REPLICAS_MAX, WEIGHT_MAX, is_weight
from hocket.v1 import plan_pb2
from services.aggregator.question import no_replica

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from hocket.v1.text_pb2 import TextEvent, TextJob, TextPlan
    from services.aggregator.question import Safeguards
    from services.aggregator.workers import Workers

_ELSEWHERE: Final = frozenset(
    {Reason.BASE_MISMATCH, Reason.DEVICE_MEMORY, Reason.NO_BASE, Reason.QUARANTINED, Reason.QUEUE_FULL}
)
"""Refusals of one worker that another one may not share: it serves another base by now, is too small, fears an expert,
or is busy."""
_FAULTY: Final = frozenset({Situation.UNAVAILABLE, Situation.BUG})
"""What speaks against a worker and its base. A bad answer or a quarantine speaks against an expert of the plan."""
_FOLLOWING: Final[dict[str | None, tuple[str, ...]]] = {
    None: ("start",),
    "start": ("delta", "finish"),
    "delta": ("delta", "finish"),
    "finish": (),
}
_RETRIES: Final = metrics.RETRIES.labels("aggregator")


def check_plan(plan: TextPlan) -> None:
    """Pass if a text plan is one that a worker can be asked with. Input and sampling are for the worker to judge.

    Raises:
        HocketError: `BAD_REQUEST` if it is not.
    """
    experts = plan.experts
    if plan.mode != (plan_pb2.MODE_ADAPTER_MIX if len(experts) > 1 else plan_pb2.MODE_PASS):
        raise _bad("the mode must be ADAPTER_MIX for several experts, and PASS otherwise", "mode")
    if not is_digest(plan.base):
        raise _bad("the base must be a digest, sha256:<64 hex digits>", "base")
    for place, expert in enumerate(experts):
        if not is_digest(expert.digest):
            raise _bad("an expert must be a digest, sha256:<64 hex digits>", f"experts[{place}].digest")
        if not is_weight(expert.weight):
            raise _bad(f"a weight must be from -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}", f"experts[{place}].weight")
    if len(plan.replicas) > REPLICAS_MAX:
        raise _bad(f"a plan has at most {REPLICAS_MAX} replicas", "replicas")
    for place, replica in enumerate(plan.replicas):
        if not replica.address:
            raise _bad("a replica needs an address", f"replicas[{place}].address")


def _bad(message: str, field: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, message, field=f"text.plan.{field}")


async def relay(
    safeguards: Safeguards, workers: Workers, job: TextJob, deadline: float, loads: dict[str, bytes]
) -> AsyncGenerator[TextEvent, None]:
    """The answer of the first worker of the plan that gives one, event by event.

    A replica that is out of reach, or whose breaker is open, is asked after the others. The next one is asked in
    place of one that is unavailable, busy or too small, serves another base by now, or keeps an expert in quarantine.
    From its first event on an answer is that worker's alone. Nobody is asked beside one that is silent: it may be
    loading experts or have others to answer first, and a text is too dear to be computed twice.

    Nothing is read ahead, so whoever reads slowly holds back the worker. Closing the generator cancels the call.

    Args:
        safeguards: What all texts share: a budget, breakers by worker and base, compartments by base.
        workers: Where to call.
        job: Its plan is checked.
        deadline: When the answer ends, in `time.monotonic()` seconds.
        loads: Takes the worker's report of its load, by address.

    Raises:
        HocketError: As the worker refuses; `NO_REPLICA` if all are away, `QUEUE_FULL` if those that are not are busy
            or too many wait for the base, `UNREACHABLE` if the worker went away in mid-answer, `BAD_ANSWER` if its
            events are out of order.
    """
    base = job.plan.base
    untried = [*job.plan.replicas]
    refusals: list[HocketError] = []
    with safeguards.bulkhead.holding(base):
        safeguards.budget.earn()
        while untried and (not refusals or safeguards.budget.spend()):
            if refusals:
                _RETRIES.inc()
            replica = _first_fit(safeguards, workers, untried, base)
            untried.remove(replica)
            probe = safeguards.breakers.enter((replica.worker, base))
            healthy: bool | None = None
            progress = _Progress(replica.worker)
            try:
                async with aclosing(workers.run_text(replica.address, job, deadline, loads)) as events:
                    async for event in events:
                        progress.note(event)
                        healthy = True
                        yield event
                progress.check_finished()
            except HocketError as error:
                if progress.last == "finish":
                    return  # whoever asked has the whole answer: how its call ended means nothing to them
                healthy = False if error.situation in _FAULTY else None
                if not (_is_gone(error) or (error.reason in _ELSEWHERE and progress.last is None)):
                    raise
                if progress.last is not None:
                    raise progress.broken(error) from error
                refusals.append(error)
            else:
                return
            finally:
                safeguards.breakers.leave((replica.worker, base), probe, healthy=healthy)
    raise _outcome(refusals)


@dataclass(slots=True)
class _Progress:
    """How far the answer of one worker has come.

    Attributes:
        worker: Its name.
        last: Which event came last.
    """

    worker: str
    last: str | None = None

    def note(self, event: TextEvent) -> None:
        """Take note of the next event.

        Raises:
            HocketError: `BAD_ANSWER` if it cannot be the next one.
        """
        kind = event.WhichOneof("event")
        if kind not in _FOLLOWING[self.last]:
            raise HocketError(
                Reason.BAD_ANSWER,
                f"worker {self.worker!r} answered {kind or 'nothing'} after {self.last or 'nothing'}",
                worker=self.worker,
            )
        self.last = kind

    def check_finished(self) -> None:
        """Pass if the last event was a finish.

        Raises:
            HocketError: `UNREACHABLE` if not: the worker does not answer any more.
        """
        if self.last != "finish":
            raise HocketError(Reason.UNREACHABLE, "the worker ended its answer without a finish")

    def broken(self, error: HocketError) -> HocketError:
        """The refusal for a worker that has gone in mid-answer."""
        return HocketError(
            Reason.UNREACHABLE, f"worker {self.worker!r} went away ({error.reason}): ask again", worker=self.worker
        )


def _first_fit(
    safeguards: Safeguards, workers: Workers, untried: Sequence[plan_pb2.Replica], base: str
) -> plan_pb2.Replica:
    """The first replica that is neither out of reach nor behind an open breaker, else the first of all."""
    for replica in untried:
        if not workers.is_away(replica.address) and safeguards.breakers.admits((replica.worker, base)):
            return replica
    return untried[0]


def _is_gone(error: HocketError) -> bool:
    """Whether the worker is unavailable, or the transport broke: that names no reason of ours, so it has no facts."""
    return error.situation is Situation.UNAVAILABLE or (error.situation is Situation.BUG and not error.metadata)


def _outcome(refusals: Sequence[HocketError]) -> HocketError:
    """What is said when no replica has answered: that one is busy, else what one that is there has said."""
    for reasons in ({Reason.QUEUE_FULL}, _ELSEWHERE):
        for refusal in refusals:
            if refusal.reason in reasons:
                return refusal
    return no_replica(refusals[-1] if refusals else HocketError(Reason.NO_REPLICA, "the plan has no replicas"), "plan")
