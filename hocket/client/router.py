"""Typed caller of RouterService: rows or text in, events and answers out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
from google.protobuf.empty_pb2 import Empty

from hocket.client.calls import GRPC_STATUS, call_metadata, refusals
from hocket.errors import HocketError, Reason
from hocket.rpc.convert import matrix_to_tensor, tensor_to_matrix
from hocket.text_limits import check_queueing
from hocket.v1 import plan_pb2, router_pb2, router_pb2_grpc, text_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import Unpack

    import grpc
    from numpy.typing import ArrayLike, NDArray

    from hocket.v1.tensor_pb2 import Tensor


@dataclass(frozen=True, slots=True)
class Planned:
    """First event: who will answer.

    Args:
        plan: Mode, experts, digests, weights, replicas.
        request_id: Quote it when you report a problem.
    """

    plan: plan_pb2.Plan
    request_id: str


@dataclass(frozen=True, slots=True)
class Partial:
    """The value so far; each one replaces the one before.

    Args:
        sequence: From 1, without gaps.
        value: float32 `[N, C]`; 0 in rows nobody has answered yet.
        coverage: float64 `[N]`: how much of the planned weight is in.
        contributions: What became of every planned expert, in plan order.
        lower: float32 `[N, C]` that the final value cannot be below; None when the output range is unknown.
        upper: float32 `[N, C]` that the final value cannot be above.
    """

    sequence: int
    value: NDArray[np.float32]
    coverage: NDArray[np.float64]
    contributions: Sequence[plan_pb2.Contribution]
    lower: NDArray[np.float32] | None
    upper: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The final value.

    Args:
        value: float32 `[N, C]`.
        labels: The class each column scores; empty for regression.
        coverage: float64 `[N]`: share of the planned weight that is in.
        contributions: What became of every planned expert, in plan order.
        plan: Who was to answer.
        finish: How it ended, timings, what was given up.
        request_id: Quote it when you report a problem.
    """

    value: NDArray[np.float32]
    labels: tuple[str, ...]
    coverage: NDArray[np.float64]
    contributions: Sequence[plan_pb2.Contribution]
    plan: plan_pb2.Plan
    finish: plan_pb2.Finish
    request_id: str

    def best_labels(self) -> list[str]:
        """The label with the highest score of each row, the earlier one at ties; none for regression."""
        if not self.labels:
            return []
        return [self.labels[column] for column in self.value.argmax(axis=1)]


@dataclass(frozen=True, slots=True)
class TextPlanned:
    """First event of an answer in text: who will answer.

    Args:
        plan: Base, experts, digests, weights, replicas, seed.
        request_id: Quote it when you report a problem.
    """

    plan: text_pb2.TextPlan
    request_id: str


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """A whole answer in text.

    Args:
        text: What was answered.
        tokens: Its tokens with their probabilities, in order.
        plan: Who was to answer.
        start: Who did, and how tokens were chosen, every default filled in.
        finish: Why it ended, usage, timings, what was given up.
        request_id: Quote it when you report a problem.
    """

    text: str
    tokens: Sequence[text_pb2.Token]
    plan: text_pb2.TextPlan
    start: text_pb2.TextStart
    finish: text_pb2.TextFinish
    request_id: str


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen, as in `hocket.v1.Sampling`; what is absent or None is left to the experts and the base."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    top_logprobs: int | None
    ignore_eos: bool | None


class TextOptions(SamplingOptions, total=False):
    """What may be said of a text besides: as in `SamplingOptions`, and when and where it is answered.

    `session` names what it is a turn of: its worker keeps what it has computed for the next turn. `priority` says how
    urgent it is among the texts of its tenant: 0 to 9, 5 if it is absent or None. `tenant` is who asks: tenants share
    workers fairly.
    """

    session: str
    priority: int | None
    tenant: str


WeightedExperts: TypeAlias = "Mapping[str, float] | Sequence[str | tuple[str, float]] | str"
"""Experts to compose: names or digests, each with its weight; one without weighs 1."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen for a text that names none.

    Args:
        policy: `rules`, `hivellm`, or `base` for the base alone.
        allow: Only these experts, by name or digest; none for all.
        deny: Not these.
        expert_count_max: Most experts that are composed, 1 to 10.
    """

    policy: Literal["rules", "hivellm", "base"] = "rules"
    allow: Sequence[str] = ()
    deny: Sequence[str] = ()
    expert_count_max: int = 1


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer in text must be. One of them; without any it is as if there were no `Constraint`.

    Args:
        json_schema: JSON that satisfies this schema: a JSON document, or what `json.dumps` makes one of.
        gbnf: A text of this grammar in GBNF.
        none: Any text, also where an expert has a grammar.
    """

    json_schema: Mapping[str, Any] | bool | str | None = None
    gbnf: str | None = None
    none: bool = False


_SECONDS_MAX = 1e9
_POLICIES = {
    "rules": text_pb2.POLICY_RULES,
    "hivellm": text_pb2.POLICY_HIVELLM,
    "base": text_pb2.POLICY_BASE,
}
_ON_MISSING = {"fail": plan_pb2.ON_MISSING_FAIL, "renormalise": plan_pb2.ON_MISSING_RENORMALISE}


class RouterClient:
    """Asks one router.

    Args:
        channel: To the router.
        timeout_seconds: Deadline of every call but those for text.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout_seconds: float = 30.0) -> None:
        self._stub = router_pb2_grpc.RouterServiceStub(channel)
        self._timeout_seconds = timeout_seconds

    async def predict(
        self,
        model: str,
        rows: ArrayLike,
        *,
        top_k: int | None = None,
        partials: bool = False,
        min_coverage: float | None = None,
        straggler_timeout_seconds: float | None = None,
        on_missing: Literal["fail", "renormalise"] = "fail",
    ) -> AsyncGenerator[Planned | Partial | Answer, None]:
        """The events of one prediction: the plan, partials if asked for, then the answer.

        Closing the generator early cancels the call.

        Args:
            model: Mixture name, `publisher/name@version`, a digest, or `digest#ordinal`.
            rows: Numbers `[N, F]`, or one row `[F]`; sent as float32.
            top_k: Experts per row, instead of the mixture's own number.
            partials: Whether to hear of every arrival.
            min_coverage: Least acceptable coverage of every row, 0 to 1.
            straggler_timeout_seconds: How long to wait before late experts count as missing.
            on_missing: Whether missing experts fail the call or are left out.

        Raises:
            HocketError: As the contract of Predict says.
        """
        if on_missing not in _ON_MISSING:
            raise HocketError(Reason.BAD_REQUEST, "on_missing is 'fail' or 'renormalise'", field="on_missing")
        request = router_pb2.PredictRequest(
            model=_text("model", model),
            input=_tensor(rows),
            top_k=_count(top_k),
            partials=partials,
            min_coverage=min_coverage,
            on_missing=_ON_MISSING[on_missing],
        )
        if straggler_timeout_seconds is not None:
            if not 0 < straggler_timeout_seconds < _SECONDS_MAX:
                raise HocketError(
                    Reason.BAD_REQUEST, "straggler_timeout_seconds must be above 0", field="straggler_timeout"
                )
            request.straggler_timeout.FromNanoseconds(round(straggler_timeout_seconds * 1e9))
        plan = plan_pb2.Plan()
        call = self._stub.Predict(request, timeout=self._timeout_seconds, metadata=call_metadata())
        try:
            with refusals():
                async for response in call:
                    match response.WhichOneof("event"):
                        case "plan":
                            plan = response.plan
                            yield Planned(plan, response.request_id)
                        case "partial":
                            yield _partial(response.partial)
                        case "final":
                            yield _answer(response, plan)
        finally:
            call.cancel()

    async def answer(
        self,
        model: str,
        rows: ArrayLike,
        *,
        top_k: int | None = None,
        min_coverage: float | None = None,
        straggler_timeout_seconds: float | None = None,
        on_missing: Literal["fail", "renormalise"] = "fail",
    ) -> Answer:
        """The answer alone. Arguments and refusals are those of `predict`."""
        events = self.predict(
            model,
            rows,
            top_k=top_k,
            min_coverage=min_coverage,
            straggler_timeout_seconds=straggler_timeout_seconds,
            on_missing=on_missing,
        )
        answer = None
        async for event in events:  # to its end: leaving before would count as a cancellation on the server
            if isinstance(event, Answer):
                answer = event
        if answer is None:
            raise HocketError(Reason.INTERNAL, "the stream ended without a final value")
        return answer

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        constraint: Constraint | None = None,
        base: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncGenerator[TextPlanned | text_pb2.TextStart | text_pb2.TextDelta | text_pb2.TextFinish, None]:
        """The events of one answer in text: the plan, a start, what is added as it is made, then the finish.

        Closing the generator early cancels the call; who reads slowly pauses the answer.

        Args:
            prompt: One turn of a user. Give this, `messages` or `raw`.
            messages: A conversation: `{"role": "user", "content": "..."}` for each turn, in order.
            raw: Text that the model reads as it is, without a template.
            experts: What to compose, with weights; none to have them chosen.
            routing: How they are chosen; None for by the rules, at most one. Only without `experts`.
            constraint: What the answer must be; None for the grammar of the heaviest expert, if it uses one.
            base: Its digest or name; empty for the one that the experts ride on, or the only one there is.
            timeout_seconds: Deadline of the call; None leaves it to the server, where it is ten minutes by default.
            **options: How tokens are chosen, and when and where it is answered.

        Raises:
            HocketError: As the contract of Generate says.
        """
        session, tenant = _text("session", options.pop("session", "")), _text("tenant", options.pop("tenant", ""))
        priority = options.pop("priority", None)
        check_queueing(session, tenant, priority or 0)
        request = router_pb2.GenerateRequest(
            input=_text_input(prompt, messages, raw),
            experts=_chosen(experts),
            routing=_routing(routing),
            constraint=_constraint(constraint),
            base=_text("base", base),
            sampling=_sampling(options),
            session=session,
            priority=priority,
            tenant=tenant,
        )
        call = self._stub.Generate(request, timeout=_timeout(timeout_seconds), metadata=call_metadata())
        begun = False
        try:
            with refusals():
                async for response in call:
                    begun = True
                    match response.WhichOneof("event"):
                        case "plan":
                            yield TextPlanned(response.plan, response.request_id)
                        case "start":
                            yield response.start
                        case "delta":
                            yield response.delta
                        case "finish":
                            yield response.finish
        except HocketError as error:
            if begun and error.reason is Reason.UNREACHABLE and GRPC_STATUS in error.metadata:
                raise HocketError(
                    Reason.STREAM_BROKEN,
                    "the answer broke off: the server has gone away; ask again",
                    grpc_status=error.metadata[GRPC_STATUS],
                ) from error
            raise
        finally:
            call.cancel()

    async def answer_text(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        constraint: Constraint | None = None,
        base: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TextOptions],
    ) -> TextAnswer:
        """The whole answer. Arguments and refusals are those of `generate`."""
        events = self.generate(
            prompt,
            messages=messages,
            raw=raw,
            experts=experts,
            routing=routing,
            constraint=constraint,
            base=base,
            timeout_seconds=timeout_seconds,
            **options,
        )
        planned = TextPlanned(text_pb2.TextPlan(), "")
        start = text_pb2.TextStart()
        texts: list[str] = []
        tokens: list[text_pb2.Token] = []
        finish = None
        async for event in events:  # to its end: leaving before would count as a cancellation on the server
            match event:
                case TextPlanned():
                    planned = event
                case text_pb2.TextStart():
                    start = event
                case text_pb2.TextDelta():
                    texts.append(event.text)
                    tokens.extend(event.tokens)
                case text_pb2.TextFinish():
                    finish = event
        if finish is None:
            raise HocketError(Reason.INTERNAL, "the stream ended without a finish")
        return TextAnswer("".join(texts), tokens, planned.plan, start, finish, planned.request_id)

    async def route(self, model: str, rows: ArrayLike, *, top_k: int | None = None) -> router_pb2.RouteResponse:
        """What `predict` would do now, with every score; nothing runs.

        Raises:
            HocketError: As the contract of Route says.
        """
        request = router_pb2.RouteRequest(model=_text("model", model), input=_tensor(rows), top_k=_count(top_k))
        with refusals():
            return await self._stub.Route(request, timeout=self._timeout_seconds, metadata=call_metadata())

    async def route_text(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        base: str = "",
    ) -> router_pb2.TextDecision:
        """What `generate` would do now, with every score; nothing runs. Arguments are those of `generate`.

        Raises:
            HocketError: As the contract of Route says.
        """
        request = router_pb2.RouteRequest(
            text=_text_input(prompt, messages, raw),
            experts=_chosen(experts),
            routing=_routing(routing),
            base=_text("base", base),
        )
        with refusals():
            response = await self._stub.Route(request, timeout=self._timeout_seconds, metadata=call_metadata())
        return response.text

    async def list_mixtures(self) -> AsyncGenerator[router_pb2.MixtureSummary, None]:
        """Every model the router knows, by name."""
        token = ""
        while True:
            with refusals():
                page = await self._stub.ListMixtures(
                    router_pb2.ListMixturesRequest(page_token=token),
                    timeout=self._timeout_seconds,
                    metadata=call_metadata(),
                )
            for summary in page.mixtures:
                yield summary
            token = page.next_page_token
            if not token:
                return

    async def get_mixture(self, model: str) -> router_pb2.GetMixtureResponse:
        """One model: members, labels, signers.

        Raises:
            HocketError: `UNKNOWN_MODEL`; `BAD_REQUEST` if that is no text.
        """
        request = router_pb2.GetMixtureRequest(model=_text("model", model))
        with refusals():
            return await self._stub.GetMixture(request, timeout=self._timeout_seconds, metadata=call_metadata())


def _text(field: str, value: str) -> str:
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise HocketError(
            Reason.BAD_REQUEST, f"{field} cannot be {value!a:.80}: give a text in UTF-8", field=field
        ) from error
    return value


def _timeout(seconds: object) -> float | None:
    """A deadline; None for the server's."""
    if seconds is None or (isinstance(seconds, int | float) and 0 < seconds < _SECONDS_MAX):
        return seconds
    raise HocketError(
        Reason.BAD_REQUEST,
        f"timeout_seconds cannot be {seconds!a:.80}: give a number of seconds above 0",
        field="timeout_seconds",
    )


def _tensor(rows: ArrayLike) -> Tensor:
    try:
        matrix = np.atleast_2d(np.asarray(rows, dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise HocketError(Reason.BAD_TENSOR, f"rows are not a table of numbers: {error}", field="input") from error
    if matrix.ndim != 2:  # noqa: PLR2004 - rows and columns
        raise HocketError(Reason.BAD_TENSOR, f"rows must be [N, F], not {matrix.ndim} dimensions", field="input.shape")
    return matrix_to_tensor(matrix)


def _count(top_k: int | None) -> int | None:
    if top_k is not None and not 0 <= top_k < 2**32:
        raise HocketError(Reason.TOP_K_OUT_OF_RANGE, "top_k must be at least 1", field="top_k")
    return top_k


def _text_input(
    prompt: str | None, messages: Sequence[Mapping[str, str]] | None, raw: str | None
) -> text_pb2.TextInput:
    if (prompt, messages, raw).count(None) != 2:  # noqa: PLR2004 - of three, one is given
        raise HocketError(Reason.BAD_REQUEST, "give one of prompt, messages and raw", field="input")
    try:
        if prompt is not None:
            return text_pb2.TextInput(prompt=prompt)
        if raw is not None:
            return text_pb2.TextInput(raw=raw)
        turns = [text_pb2.Message(**message) for message in messages or ()]
        return text_pb2.TextInput(conversation=text_pb2.Conversation(messages=turns))
    except (TypeError, ValueError) as error:
        raise HocketError(
            Reason.BAD_REQUEST,
            f'the input is text, or messages such as {{"role": "user", "content": "..."}}: {error}',
            field="input",
        ) from error


def _chosen(experts: WeightedExperts) -> list[router_pb2.ChosenExpert]:
    try:
        if isinstance(experts, str):
            experts = [experts]
        return [
            router_pb2.ChosenExpert(expert=each)
            if isinstance(each, str)
            else router_pb2.ChosenExpert(expert=each[0], weight=each[1])
            for each in (experts.items() if isinstance(experts, Mapping) else experts)
        ]
    except (TypeError, ValueError, LookupError) as error:
        raise HocketError(
            Reason.BAD_REQUEST,
            f'experts are names, or names with weights such as {{"sql": 0.7, "json": 0.3}}: {error}',
            field="experts",
        ) from error


def _routing(routing: Routing | None) -> router_pb2.Routing | None:
    if routing is None:
        return None
    if routing.policy not in _POLICIES:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"the policy is 'rules', 'hivellm' or 'base', not {routing.policy!a:.80}",
            field="routing.policy",
        )
    named = {
        field: [_text(f"routing.{field}", each) for each in each_of]
        for field, each_of in (("allow", _listed(routing.allow)), ("deny", _listed(routing.deny)))
    }
    try:
        return router_pb2.Routing(policy=_POLICIES[routing.policy], expert_count_max=routing.expert_count_max, **named)
    except (TypeError, ValueError) as error:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"expert_count_max cannot be {routing.expert_count_max!a:.80}: give a number from 1 to 10",
            field="routing.expert_count_max",
        ) from error


def _constraint(constraint: Constraint | None) -> text_pb2.Constraint | None:
    if constraint is None:
        return None
    every = {"json_schema": constraint.json_schema, "gbnf": constraint.gbnf, "none": constraint.none or None}
    given = [name for name, value in every.items() if value is not None]
    if len(given) > 1:
        raise HocketError(
            Reason.BAD_REQUEST, f"an answer has one constraint: give {given[0]} or {given[1]}", field="constraint"
        )
    if constraint.gbnf is not None:
        return text_pb2.Constraint(gbnf=_text("constraint.gbnf", constraint.gbnf))
    if constraint.json_schema is not None:
        return text_pb2.Constraint(json_schema=_schema(constraint.json_schema))
    return text_pb2.Constraint(none=Empty()) if constraint.none else None


def _schema(schema: Mapping[str, Any] | bool | str) -> str:  # noqa: FBT001 - `true` is a schema
    if isinstance(schema, str):
        return _text("constraint.json_schema", schema)
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise HocketError(
            Reason.BAD_SCHEMA, f"the schema is no JSON document: {error}", field="constraint.json_schema"
        ) from error


def _listed(names: Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _sampling(options: SamplingOptions) -> text_pb2.Sampling:
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    sampling = text_pb2.Sampling()
    for name, value in given.items():
        try:
            sampling.MergeFrom(text_pb2.Sampling(**{name: value}))
        except (TypeError, ValueError) as error:
            raise HocketError(
                Reason.BAD_REQUEST, f"{name} cannot be {value!r:.80}: {error}", field=f"sampling.{name}"
            ) from error
    return sampling


def _partial(message: plan_pb2.Combination) -> Partial:
    bounded = message.HasField("lower_bound")
    return Partial(
        sequence=message.sequence,
        value=tensor_to_matrix(message.value, "value"),
        coverage=np.array(message.coverage),
        contributions=message.contributions,
        lower=tensor_to_matrix(message.lower_bound, "lower_bound") if bounded else None,
        upper=tensor_to_matrix(message.upper_bound, "upper_bound") if bounded else None,
    )


def _answer(response: router_pb2.PredictResponse, plan: plan_pb2.Plan) -> Answer:
    combination = response.final.combination
    return Answer(
        value=tensor_to_matrix(combination.value, "value"),
        labels=tuple(plan.labels),
        coverage=np.array(combination.coverage),
        contributions=combination.contributions,
        plan=plan,
        finish=response.final.finish,
        request_id=response.request_id,
    )
