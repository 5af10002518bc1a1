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
from hocket.rpc.convert import duration
from hocket.rpc.handlers import remaining_seconds
from hocket.telemetry import metrics
from hocket.v1 import text_pb2
from services.expert_worker.composing import check_count, check_together
from services.expert_worker.engine.expert import AdapterExpert, prompts_of
from services.expert_worker.engine.prompts import Conversation, RawText, Turn, UserPrompt, render
from services.expert_worker.engine.sampling import Requested, complete
from services.expert_worker.engine.sequence import Delta, Finished, FinishReason, Started, TextRequest
from services.expert_worker.residency import loading_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from hocket.rpc.handlers import Context
    from hocket.v1.expert_worker_pb2 import TextEngine as TextEngineMessage
    from services.expert_worker.engine.engine import Answer
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.prompts import Input, Prompt
    from services.expert_worker.engine.sampling import Choice, Sampling
    from services.expert_worker.residency import Residency, ResidentPackage
    from services.expert_worker.text_engine import TextEngine

WEIGHT_MAX: Final = 100.0
"""Largest weight of an expert, either way."""
_INLINE_BYTES_MAX: Final = 4096
"""Text that becomes tokens in the event loop, within a millisecond; more of it in a thread."""
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
_UNSIGNED_USES: Final = metrics.UNSIGNED_USES.labels("expert_worker")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A job, ready to be computed.

    Args:
        request: For the engine.
        prompt: Its tokens, and what they were put into.
        sampling: How tokens are chosen, as a message.
    """

    request: TextRequest
    prompt: Prompt
    sampling: text_pb2.Sampling


class Texts:
    """Answers text jobs.

    Args:
        worker: The worker's own name.
        text: Its base, and what computes with it.
        residency: Where its experts are.
        default_deadline_seconds: Deadline of a call that brings none.
    """

    def __init__(self, worker: str, text: TextEngine, residency: Residency, default_deadline_seconds: float) -> None:
        self._worker = worker
        self._text = text
        self._residency = residency
        self._default_deadline_seconds = default_deadline_seconds

    def report(self) -> TextEngineMessage:
        """What the engine has, and how busy it is."""
        return self._text.report()

    async def answer(self, job: text_pb2.TextJob, context: Context) -> AsyncGenerator[text_pb2.TextEvent, None]:
        """A start, deltas, then exactly one finish.

        Whoever closes it early, or whose deadline passes, frees what the answer holds within one step of the engine.

        Raises:
            HocketError: As the contract of RunText says.
        """
        arrival = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + remaining_seconds(context, self._default_deadline_seconds)
        self._check_plan(job.plan)
        packages = await self._packages(job.plan, deadline)
        release = partial(self._release, packages)
        try:
            check_together((package.facts, package.proofs) for package in packages if package.facts is not None)
            asked = await self._read(job, packages)
            loaded = time.perf_counter()
            answer = self._text.engine.submit(asked.request, partial(self._end, release))
        except BaseException:
            release()
            raise
        self._text.observe()
        for package in packages:
            if package.unsigned_by_policy:
                _UNSIGNED_USES.inc()
        weights = [expert.weight for expert in job.plan.experts]
        finished = False
        ending = asyncio.create_task(_close_at(deadline, answer))
        try:
            async with aclosing(answer):
                async for event in answer:
                    finished = isinstance(event, Finished)
                    match event:
                        case Started():
                            self._text.observe()
                            yield self._start(asked, loaded - arrival + event.wait_seconds)
                        case Delta():
                            yield _delta(event, weights, logprobs_wanted=asked.request.sampling.top_logprobs > 0)
                        case Finished():
                            yield _finish(event, len(asked.prompt.token_ids), loaded - arrival)
        finally:
            ending.cancel()
        if not finished:
            raise HocketError(Reason.DEADLINE, "the answer was not complete by this server's own deadline")

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
            if not abs(expert.weight) <= WEIGHT_MAX:  # not a number, too
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"the weight {expert.weight:g} is not a number from -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}",
                    field=f"{field}.weight",
                )
            seen.add(expert.digest)

    async def _packages(self, plan: text_pb2.TextPlan, deadline: float) -> list[ResidentPackage]:
        """The experts' packages, in use, in the plan's order."""
        left = deadline - asyncio.get_running_loop().time()
        return await self._residency.acquire_all([each.digest for each in plan.experts], loading_seconds(left))

    def _release(self, packages: Sequence[ResidentPackage]) -> None:
        for package in packages:
            self._residency.release(package)

    def _end(self, release: Callable[[], None]) -> None:
        """The engine has let go of an answer."""
        release()
        self._text.observe()

    async def _read(self, job: text_pb2.TextJob, packages: Sequence[ResidentPackage]) -> _Asked:
        """What a job comes to with these experts, all of which there are."""
        base = self._text.base
        mixture: Mixture = tuple(
            (_adapter(package), planned.weight) for package, planned in zip(packages, job.plan.experts, strict=True)
        )
        heaviest = max(range(len(mixture)), key=lambda place: abs(mixture[place][1]), default=None)
        expert = None if heaviest is None else mixture[heaviest][0]
        facts = None if heaviest is None else packages[heaviest].facts
        to_tokens = partial(
            render,
            _input(job.input),
            base.tokenizer,
            None if expert is None else expert.prompt_template,
            () if facts is None else facts.capabilities,
        )
        prompt = to_tokens() if job.input.ByteSize() <= _INLINE_BYTES_MAX else await asyncio.to_thread(to_tokens)
        soft_count = sum(map(len, prompts_of(mixture)))
        sampling, max_tokens, stops = complete(
            _requested(job.sampling),
            None if expert is None else expert.decoding,
            base.defaults,
            job.plan.seed,
            base.context_length - soft_count - len(prompt.token_ids),
        )
        every_stop = tuple(dict.fromkeys([*stops, *prompt.stops]))
        eos_ids = frozenset[int]() if job.sampling.ignore_eos else base.eos_ids
        request = TextRequest(prompt.token_ids, mixture, sampling, every_stop, max_tokens, eos_ids)
        return _Asked(request, prompt, _sampling(request, sampling, ignore_eos=job.sampling.ignore_eos))

    def _start(self, asked: _Asked, wait_seconds: float) -> text_pb2.TextEvent:
        token_count = len(asked.prompt.token_ids)
        metrics.TEXT_PROMPT_TOKENS.inc(token_count)
        return text_pb2.TextEvent(
            start=text_pb2.TextStart(
                worker=self._worker,
                prompt_token_count=token_count,
                soft_prompt_token_count=sum(map(len, prompts_of(asked.request.mixture))),
                prompt_template=asked.prompt.template,
                sampling=asked.sampling,
                wait=duration(wait_seconds),
            )
        )


async def _close_at(deadline: float, answer: Answer) -> None:
    """End an answer at its deadline, even if its reader has stopped reading."""
    await asyncio.sleep(deadline - asyncio.get_running_loop().time())
    await answer.aclose()


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


def _requested(sampling: text_pb2.Sampling) -> Requested:
    numbers = {name: getattr(sampling, name) for name in _NUMBERS if sampling.HasField(name)}
    return Requested(**numbers, stop=tuple(sampling.stop))


def _sampling(request: TextRequest, sampling: Sampling, *, ignore_eos: bool) -> text_pb2.Sampling:
    numbers = {name: getattr(sampling, name) for name in (*_NUMBERS, "seed") if name != "max_tokens"}
    return text_pb2.Sampling(**numbers, max_tokens=request.max_tokens, stop=request.stops, ignore_eos=ignore_eos)


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


def _finish(finished: Finished, prompt_token_count: int, load_seconds: float) -> text_pb2.TextEvent:
    """The last event.

    Args:
        finished: As the engine says.
        prompt_token_count: Tokens of the prompt.
        load_seconds: From the request's arrival until the engine had it.
    """
    steps = finished.token_count - 1
    wait_seconds = load_seconds + finished.wait_seconds
    metrics.TEXT_FIRST_TOKEN_SECONDS.observe(wait_seconds + finished.prefill_seconds)
    if steps > 0:
        metrics.TEXT_TOKEN_SECONDS.observe(finished.decode_seconds / steps)
    return text_pb2.TextEvent(
        finish=text_pb2.TextFinish(
            reason=_REASONS[finished.reason],
            stop=finished.stop,
            usage=text_pb2.Usage(prompt_token_count=prompt_token_count, completion_token_count=finished.token_count),
            timings=text_pb2.TextTimings(
                wait=duration(wait_seconds),
                prefill=duration(finished.prefill_seconds),
                decode=duration(finished.decode_seconds),
            ),
            speed=text_pb2.Speed(
                prefill_tokens_per_second=_rate(prompt_token_count, finished.prefill_seconds),
                decode_tokens_per_second=_rate(steps, finished.decode_seconds),
                step_count=finished.step_count,
                step_mean=duration(finished.decode_seconds / steps if steps > 0 else 0.0),
                step_max=duration(finished.step_seconds_max),
            ),
        )
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
