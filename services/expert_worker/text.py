"""A text job, from its message to its events. Imports transformers: only workers with a base do."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.prompts import (
    Conversation,
    RawText,
    Turn,
    UserPrompt,
    check_size,
    longest_token_bytes,
    render,
)
from hocket.rpc.convert import duration
from hocket.rpc.handlers import remaining_seconds
from hocket.telemetry import metrics
from hocket.text_limits import PRIORITY_DEFAULT, WEIGHT_MAX, check_queueing, is_weight
from hocket.v1 import text_pb2
from services.expert_worker.composing import check_count, check_together
from services.expert_worker.engine.constraints import Constraint, ConstraintKind, Constraints
from services.expert_worker.engine.defaults import Requested, complete
from services.expert_worker.engine.expert import AdapterExpert, prompts_of
from services.expert_worker.engine.sequence import Delta, Finished, FinishReason, Started, TextRequest
from services.expert_worker.gathering import Gathering
from services.expert_worker.residency import loading_seconds
from services.expert_worker.tokenising import SmallestFirst

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from hocket.prompts import Input, Prompt
    from hocket.rpc.handlers import Context
    from hocket.v1.expert_worker_pb2 import ExpertState
    from hocket.v1.expert_worker_pb2 import TextEngine as TextEngineMessage
    from services.expert_worker.engine.answer import Answer
    from services.expert_worker.engine.constraints import Matcher
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.sampling import Choice
    from services.expert_worker.residency import Residency, ResidentPackage
    from services.expert_worker.text_engine import TextEngine

_INLINE_BYTES_MAX: Final = 256
"""An input that becomes tokens in the event loop, within half a millisecond; a larger one in a thread."""
_NUMBERS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "top_logprobs",
)
"""Of a `hocket.v1.Sampling`, what may be absent; its seed is the plan's."""
_REASONS: Final = {
    FinishReason.END: text_pb2.TEXT_FINISH_REASON_END,
    FinishReason.STOP: text_pb2.TEXT_FINISH_REASON_STOP,
    FinishReason.LENGTH: text_pb2.TEXT_FINISH_REASON_LENGTH,
}
_KINDS: Final = {
    ConstraintKind.JSON_SCHEMA: text_pb2.CONSTRAINT_KIND_JSON_SCHEMA,
    ConstraintKind.GBNF: text_pb2.CONSTRAINT_KIND_GBNF,
}
_HINTS_MAX: Final = 16
"""Of a job, that are looked at."""
_UNSIGNED: Final = "UNSIGNED_EXPERT"
"""Degradation of an answer with an expert that only this worker's policy admits."""
_UNSIGNED_USES: Final = metrics.UNSIGNED_USES.labels("expert_worker")


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A job that the engine has. It keeps no experts: they stay in memory for the engine, and not for a slow reader.

    Args:
        answer: Its events.
        start: The first event, but for the wait.
        degradations: For the last event.
        load_seconds: From the request's arrival until the engine had it.
    """

    answer: Answer
    start: text_pb2.TextStart
    degradations: tuple[str, ...]
    load_seconds: float


class Texts:
    """Answers text jobs.

    Args:
        worker: The worker's own name.
        text: Its base, and what computes with it.
        residency: Where its experts are.
        deadline_seconds: Longest deadline of a call, and that of a call that brings none.
    """

    def __init__(self, worker: str, text: TextEngine, residency: Residency, deadline_seconds: float) -> None:
        self._worker = worker
        self._text = text
        self._residency = residency
        self._gathering = Gathering(residency)
        self._deadline_seconds = deadline_seconds
        self._tokenising = SmallestFirst("tokens")
        self._constraints = Constraints(text.base.tokenizer, text.base.eos_ids)
        longest_token_bytes(text.base.tokenizer)  # now, and not when somebody waits: it looks at every token

    def stop(self) -> None:
        """End its threads."""
        self._tokenising.stop()
        self._constraints.stop()

    def report(self) -> TextEngineMessage:
        """What the engine has, and how busy it is."""
        return self._text.report()

    def state_of(self, digest: str) -> ExpertState.ValueType:
        """What an adapter expert in host memory is to the device."""
        return self._text.state_of(digest)

    async def answer(self, job: text_pb2.TextJob, context: Context) -> AsyncGenerator[text_pb2.TextEvent, None]:
        """A start, deltas, then exactly one finish.

        Whoever closes it early, or whose deadline passes, frees what the answer holds within one step of the engine.

        Raises:
            HocketError: As the contract of RunText says.
        """
        seconds = min(remaining_seconds(context, self._deadline_seconds), self._deadline_seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        begun = await self._begin(job, deadline)
        weights = [expert.weight for expert in job.plan.experts]
        finished = False
        ending = asyncio.create_task(_close_at(deadline, begun.answer))
        try:
            async with aclosing(begun.answer) as answer:
                async for event in answer:
                    finished = isinstance(event, Finished)
                    match event:
                        case Started():
                            yield _start(begun, event)
                        case Delta():
                            yield _delta(event, weights, logprobs_wanted=begun.start.sampling.top_logprobs > 0)
                        case Finished():
                            yield _finish(begun, event)
        finally:
            ending.cancel()
        if not finished:
            raise self._late()

    async def _begin(self, job: text_pb2.TextJob, deadline: float) -> _Begun:
        """Bring a job's experts and make its text tokens; then the engine has it."""
        arrival = time.perf_counter()
        self._check_plan(job.plan)
        check_queueing(job.session, job.tenant, job.priority)
        self._text.engine.check()
        given = _input(job.input)
        check_size(given, self._text.base.tokenizer, self._text.engine.context_length)
        packages = await self._packages(job.plan, deadline)
        self._residency.prefetch([digest for digest in job.hints[:_HINTS_MAX] if is_digest(digest)])
        release = partial(self._release, packages)
        try:
            check_together((package.facts, package.proofs) for package in packages if package.facts is not None)
            mixture = _mixture(job.plan, packages)
            leader = _leader(packages, mixture)
            prompt = await self._prompt(given, job.input.ByteSize(), leader, deadline)
            constraint, source = _constraint(job, leader)
            matcher = await self._matcher(constraint, source, deadline)
            request = self._request(job, prompt, mixture, leader, matcher)
            load_seconds = time.perf_counter() - arrival
            answer = self._text.engine.submit(request, release)
        except BaseException:
            release()
            raise
        unsigned_count = sum(package.unsigned_by_policy for package in packages)
        _UNSIGNED_USES.inc(unsigned_count)
        start = text_pb2.TextStart(
            worker=self._worker,
            prompt_token_count=len(prompt.token_ids),
            soft_prompt_token_count=sum(map(len, prompts_of(mixture))),
            variant=self._text.base.variant,
            prompt_template=prompt.template,
            sampling=_sampling(request, answer.token_count_max, ignore_eos=job.sampling.ignore_eos),
            constraint=_applied(constraint, source),
        )
        return _Begun(answer, start, (_UNSIGNED,) if unsigned_count else (), load_seconds)

    def _late(self) -> HocketError:
        return HocketError(
            Reason.DEADLINE,
            f"the answer was not complete in time: this worker ends every text after {self._deadline_seconds:g} s "
            "(worker.text_deadline_seconds), or at the call's own deadline if that is sooner: ask for fewer tokens, "
            "allow more time, or use a worker with less to do",
        )

    def _check_plan(self, plan: text_pb2.TextPlan) -> None:
        """Return if the plan is one, and for this base."""
        own = self._text.base.model
        if plan.base != own.digest:
            raise HocketError(
                Reason.BASE_MISMATCH,
                f"the plan is for the base {plan.base[:100]!r}, this worker serves {own.digest} ({own.name}): "
                "route the request again",
                field="job.plan.base",
            )
        check_count(len(plan.experts))
        seen = set()
        for place, expert in enumerate(plan.experts):
            field = f"job.plan.experts[{place}]"
            if not is_digest(expert.digest) or expert.digest in seen:
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"{expert.digest[:100]!r} is not a digest (sha256:<64 hex digits>), or stands there twice",
                    field=f"{field}.digest",
                )
            if not is_weight(expert.weight):
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"the weight {expert.weight:g} is not a number from -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}",
                    field=f"{field}.weight",
                )
            seen.add(expert.digest)

    async def _packages(self, plan: text_pb2.TextPlan, deadline: float) -> list[ResidentPackage]:
        """The experts' packages, in use, in the plan's order."""
        left = deadline - asyncio.get_running_loop().time()
        return await self._gathering.acquire([each.digest for each in plan.experts], loading_seconds(left))

    def _release(self, packages: Sequence[ResidentPackage]) -> None:
        for package in packages:
            self._residency.release(package)

    async def _prompt(
        self, given: Input, size_bytes: int, leader: tuple[ResidentPackage, AdapterExpert] | None, deadline: float
    ) -> Prompt:
        """The tokens of an input."""
        to_tokens = partial(
            render,
            given,
            self._text.base.tokenizer,
            None if leader is None else leader[1].prompt_template,
            () if leader is None or leader[0].facts is None else leader[0].facts.capabilities,
        )
        if size_bytes <= _INLINE_BYTES_MAX:
            return to_tokens()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._tokenising.run(size_bytes, to_tokens)
        except TimeoutError:
            raise self._late() from None

    async def _matcher(self, constraint: Constraint | None, expert: str, deadline: float) -> Matcher | None:
        """A constraint, compiled."""
        if constraint is None:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                return await self._constraints.matcher(constraint)
        except TimeoutError:
            raise self._late() from None
        except HocketError as error:
            if error.reason not in (Reason.BAD_GRAMMAR, Reason.BAD_SCHEMA):
                raise
            if expert:
                raise error.restated(
                    f"{error.message}; it is of the expert {expert}: ask with the constraint `none`, or leave the "
                    "expert out",
                    digest=expert,
                ) from error
            raise HocketError(error.reason, error.message, field=f"constraint.{constraint.kind}") from error

    def _request(
        self,
        job: text_pb2.TextJob,
        prompt: Prompt,
        mixture: Mixture,
        leader: tuple[ResidentPackage, AdapterExpert] | None,
        matcher: Matcher | None,
    ) -> TextRequest:
        """What the engine is asked for."""
        base = self._text.base
        decoding = None if leader is None else leader[1].decoding
        sampling, max_tokens, stops = complete(_requested(job.sampling), decoding, base.defaults, job.plan.seed)
        # A constraint says where the answer is whole; a stop text in the middle of it would make it no answer at all.
        every_stop = tuple(dict.fromkeys([*stops, *prompt.stops])) if matcher is None else ()
        eos_ids = frozenset[int]() if job.sampling.ignore_eos else base.eos_ids
        return TextRequest(
            prompt.token_ids,
            mixture,
            sampling,
            every_stop,
            max_tokens,
            eos_ids,
            matcher,
            tenant=job.tenant,
            session=job.session,
            priority=job.priority if job.HasField("priority") else PRIORITY_DEFAULT,
        )


async def _close_at(deadline: float, answer: Answer) -> None:
    """End an answer at its deadline, even if its reader has stopped reading."""
    await asyncio.sleep(deadline - asyncio.get_running_loop().time())
    await answer.aclose()


def _mixture(plan: text_pb2.TextPlan, packages: Sequence[ResidentPackage]) -> Mixture:
    return tuple((_adapter(package), planned.weight) for package, planned in zip(packages, plan.experts, strict=True))


def _leader(packages: Sequence[ResidentPackage], mixture: Mixture) -> tuple[ResidentPackage, AdapterExpert] | None:
    """Whose template and defaults count: the first of those with the largest weight. None if nobody weighs anything."""
    place = max(range(len(mixture)), key=lambda place: abs(mixture[place][1]), default=None)
    if place is None or mixture[place][1] == 0:
        return None
    return packages[place], mixture[place][0]


def _adapter(package: ResidentPackage) -> AdapterExpert:
    (expert, *_) = package.experts
    if not isinstance(expert, AdapterExpert):
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"{package.digest} answers rows of numbers (Predict): only adapter experts answer text",
            digest=package.digest,
        )
    return expert


def _input(given: text_pb2.TextInput) -> Input:
    match given.WhichOneof("content"):
        case "prompt":
            return UserPrompt(given.prompt)
        case "conversation":
            return Conversation(tuple(Turn(each.role, each.content) for each in given.conversation.messages))
        case "raw":
            return RawText(given.raw)
        case _:
            raise HocketError(
                Reason.BAD_REQUEST, "input is missing: send a prompt, a conversation or raw text", field="input"
            )


def _constraint(
    job: text_pb2.TextJob, leader: tuple[ResidentPackage, AdapterExpert] | None
) -> tuple[Constraint | None, str]:
    """What the answer must be, and the digest of the expert that says so if the request does not."""
    constraint, expert = None, ""
    match job.constraint.WhichOneof("kind"):
        case "json_schema":
            constraint = Constraint(ConstraintKind.JSON_SCHEMA, job.constraint.json_schema)
        case "gbnf":
            constraint = Constraint(ConstraintKind.GBNF, job.constraint.gbnf)
        case None if leader is not None and leader[1].grammar is not None:
            constraint, expert = Constraint(ConstraintKind.GBNF, leader[1].grammar), leader[1].digest
    if constraint is not None and job.sampling.ignore_eos:
        raise HocketError(
            Reason.BAD_REQUEST,
            "ignore_eos is set, but a constraint decides where this answer ends: leave it out, or ask with the "
            "constraint `none`",
            field="sampling.ignore_eos",
        )
    return constraint, expert


def _applied(constraint: Constraint | None, expert: str) -> text_pb2.AppliedConstraint | None:
    return None if constraint is None else text_pb2.AppliedConstraint(kind=_KINDS[constraint.kind], expert=expert)


def _requested(sampling: text_pb2.Sampling) -> Requested:
    numbers = {name: getattr(sampling, name) for name in _NUMBERS if sampling.HasField(name)}
    return Requested(**numbers, stop=tuple(sampling.stop))


def _sampling(request: TextRequest, max_tokens: int, *, ignore_eos: bool) -> text_pb2.Sampling:
    sampling = request.sampling
    numbers = {name: getattr(sampling, name) for name in (*_NUMBERS, "seed") if name != "max_tokens"}
    return text_pb2.Sampling(**numbers, max_tokens=max_tokens, stop=request.stops, ignore_eos=ignore_eos)


def _start(begun: _Begun, started: Started) -> text_pb2.TextEvent:
    metrics.TEXT_PROMPT_TOKENS.inc(begun.start.prompt_token_count)
    event = text_pb2.TextEvent(start=begun.start)
    event.start.wait.CopyFrom(duration(begun.load_seconds + started.wait_seconds))
    return event


def _delta(delta: Delta, weights: Sequence[float], *, logprobs_wanted: bool) -> text_pb2.TextEvent:
    metrics.TEXT_TOKENS.inc(len(delta.choices))
    return text_pb2.TextEvent(
        delta=text_pb2.TextDelta(
            text=delta.text,
            tokens=[_token(choice, logprobs_wanted=logprobs_wanted) for choice in delta.choices],
            contributions=weights,
        )
    )


def _token(choice: Choice, *, logprobs_wanted: bool) -> text_pb2.Token:
    token = text_pb2.Token(id=choice.token_id, logprob=choice.logprob)
    if logprobs_wanted:
        token.top.extend(text_pb2.TokenLogprob(id=token_id, logprob=logprob) for token_id, logprob in choice.top)
    return token


def _finish(begun: _Begun, finished: Finished) -> text_pb2.TextEvent:
    steps = finished.token_count - 1
    prompt_token_count = begun.start.prompt_token_count
    wait_seconds = begun.load_seconds + finished.wait_seconds
    metrics.TEXT_FIRST_TOKEN_SECONDS.observe(wait_seconds + finished.prefill_seconds)
    if steps > 0:
        metrics.TEXT_TOKEN_SECONDS.observe(finished.decode_seconds / steps)
    return text_pb2.TextEvent(
        finish=text_pb2.TextFinish(
            reason=_REASONS[finished.reason],
            stop=finished.stop,
            usage=text_pb2.Usage(
                prompt_token_count=prompt_token_count,
                completion_token_count=finished.token_count,
                cached_prompt_token_count=finished.cached_token_count,
            ),
            timings=text_pb2.TextTimings(
                wait=duration(wait_seconds),
                prefill=duration(finished.prefill_seconds),
                decode=duration(finished.decode_seconds),
            ),
            speed=text_pb2.Speed(
                prefill_tokens_per_second=_rate(
                    prompt_token_count - finished.cached_token_count, finished.prefill_seconds
                ),
                decode_tokens_per_second=_rate(steps, finished.decode_seconds),
                step_count=finished.step_count,
                step_mean=duration(finished.decode_seconds / steps if steps > 0 else 0.0),
                step_max=duration(finished.step_seconds_max),
                preemption_count=finished.preemption_count,
            ),
            degradations=begun.degradations,
        )
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
