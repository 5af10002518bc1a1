"""An answer in text as it comes: for people at a terminal, for a script, or as JSON."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, Self

from rich.text import Text

from hocket.cli import output
from hocket.cli.colours import Colours
from hocket.cli.decisions import why
from hocket.client import TextDelta, TextFinish, TextPlanned, TextStart
from hocket.errors import HocketError, Reason
from hocket.v1.plan_pb2 import Mode
from hocket.v1.text_pb2 import (
    DECISION_REASON_EXPLICIT,
    TEXT_FINISH_REASON_LENGTH,
    ConstraintKind,
    TextFinishReason,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from google.protobuf.duration_pb2 import Duration

    from hocket.v1.text_pb2 import AppliedConstraint, Sampling, TextExpert, TextPlan, Token

    Event = TextPlanned | TextStart | TextDelta | TextFinish

_KEPT: Final = "\n\t"
_CONSTRAINTS: Final[Mapping[int, str]] = {
    ConstraintKind.CONSTRAINT_KIND_JSON_SCHEMA: "a JSON schema",
    ConstraintKind.CONSTRAINT_KIND_GBNF: "a grammar",
}
_DEGRADATIONS: Final = {
    "BASE_BY_NAME": "BASE_BY_NAME, an expert says for which base it is by name alone (pack it with --base FOLDER)",
    "UNSIGNED_EXPERT": "UNSIGNED_EXPERT, nobody trusted has signed an expert that answered",
}


class Telling:
    """Shows one answer. Leaving it ends the line, and tells what people want to know of what has come.

    Standard output carries the answer alone, or JSON alone. At a terminal what is no text is shown in escapes, since
    nobody knows what a model writes, and in the colours of the experts behind it; a program gets every character.

    Args:
        as_json: Whether every event is a line of JSON.
        debug: Whether everything known is shown, on standard error.
        colours: Of the experts, as earlier answers had them; None for new ones.

    Attributes:
        text: What has come so far.
    """

    def __init__(self, *, as_json: bool, debug: bool, colours: Colours | None = None) -> None:
        self.text = ""
        self._colours = colours or Colours()
        self._as_json = as_json
        self._debug = debug and not as_json
        self._at_terminal = sys.stdout.isatty()
        self._planned: TextPlanned | None = None
        self._deltas: list[TextDelta] = []
        self._finish: TextFinish | None = None
        self._start: TextStart | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._as_json:
            return
        if self.text or self._finish is not None:
            _write("\n")
        if self._debug:
            _print_deltas(self._deltas)
            if self._finish is not None:
                _print_finish(self._finish)
        if self._planned is not None and self._finish is not None:
            if self._at_terminal:
                _print_summary(self._planned.plan, self._finish, self._colours)
            if self._finish.degradations:
                output.say(f"Note: {'; '.join(map(_explained, self._finish.degradations))}", stderr=True)
            if self._start is not None and self._finish.reason == TEXT_FINISH_REASON_LENGTH:
                self._say_cut(self._start, self._finish)

    def show(self, events: Generator[Event, None, None]) -> None:
        """Show an answer to its end. An interrupt ends the call as well.

        Raises:
            HocketError: What the answer fails with; `INTERNAL` if it ends without a finish.
        """
        try:
            with closing(events):
                for event in events:
                    self._take(event)
        except HocketError as error:
            raise error if self._planned is None else _by_name(error, self._planned.plan) from error
        if self._finish is None:
            raise HocketError(Reason.INTERNAL, "the stream ended without a finish")

    def _take(self, event: Event) -> None:
        if self._as_json:
            output.emit(_json(event))
        match event:
            case TextPlanned():
                self._planned = event
                if self._debug:
                    _print_plan(event)
            case TextStart():
                self._start = event
                if self._debug:
                    _print_start(event, () if self._planned is None else self._planned.plan.experts)
            case TextDelta():
                self.text += event.text
                if self._debug:
                    self._deltas.append(event)
                if event.text and not self._as_json:
                    _write(self._painted(event) if self._at_terminal else event.text)
            case TextFinish():
                self._finish = event

    def _say_cut(self, start: TextStart, finish: TextFinish) -> None:
        """Say why an answer is a beginning: to programs as well, where it had to be something whole."""
        if start.HasField("constraint"):
            output.say(f"Note: {_cut(start, finish)}", stderr=True)
        elif self._at_terminal:
            _dim(f"Note: {_cut(start, finish)}")

    def _painted(self, delta: TextDelta) -> str:
        """Text for a terminal, in the colour of the experts that made it."""
        experts = () if self._planned is None else self._planned.plan.experts
        weights = {expert.digest: weight for expert, weight in zip(experts, delta.contributions, strict=False)}
        return output.painted(_visible(delta.text), self._colours.style(weights))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _visible(text: str) -> str:
    """Text of a model, whose control characters must not reach the terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in _KEPT else c.encode("unicode_escape").decode() for c in text)


def _print_summary(plan: TextPlan, finish: TextFinish, colours: Colours) -> None:
    """Say who answered, each in their colour, how much, how fast."""
    who = [
        output.plain(
            f"{expert.name or output.short(expert.digest)} {expert.weight:g}", colours.style({expert.digest: 1})
        )
        for expert in plan.experts
    ]
    who = who or [output.plain(plan.base_name or output.short(plan.base), "dim")]
    line = Text(", ", "dim").join([*who, output.plain(_measured(finish), "dim")])
    output.console(stderr=True).print(line, soft_wrap=True)


def _measured(finish: TextFinish) -> str:
    """How much was answered, and how fast."""
    count = finish.usage.completion_token_count
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if finish.reason == TEXT_FINISH_REASON_LENGTH:
        parts[-1] += " (cut off)"
    if finish.speed.decode_tokens_per_second:
        parts.append(f"{finish.speed.decode_tokens_per_second:.3g} tokens/s")
    timings = finish.timings
    first_seconds = sum(_seconds(each) for each in (timings.route, timings.wait, timings.prefill))
    parts.append(f"first after {first_seconds:.2g} s")
    return ", ".join(parts)


def _cut(start: TextStart, finish: TextFinish) -> str:
    """Of an answer that its length has ended, what has set that, and what to do."""
    count, count_max = finish.usage.completion_token_count, start.sampling.max_tokens
    ended = f"the answer ended after {count} token{'' if count == 1 else 's'}, before it was whole"
    if count < count_max:
        return f"{ended}: the base's context has no room for more, ask with a shorter prompt"
    return f"{ended}: raise --max-tokens ({count_max} was the limit)"


def _by_name(error: HocketError, plan: TextPlan) -> HocketError:
    """A refusal of the grammar that an expert has: by the expert's name, and with the options that help."""
    digest = error.metadata.get("digest")
    expert = next((each for each in plan.experts if each.digest == digest), None)
    if error.reason is not Reason.BAD_GRAMMAR or expert is None:
        return error
    name = expert.name or expert.digest
    why = error.message.partition(f"; it is of the expert {digest}")[0]
    without = "leave it out of --experts" if plan.reason == DECISION_REASON_EXPLICIT else f"with --deny {name}"
    return error.restated(f"{why}; it is of the expert {name}: ask with --no-grammar, or {without}")


def _print_plan(planned: TextPlanned) -> None:
    plan = planned.plan
    base = f"{plan.base_name} ({plan.base})" if plan.base_name else plan.base
    _dim(f"plan: {Mode.Name(plan.mode).removeprefix('MODE_')} on base {base}")
    _dim(f"  {why(plan)}")
    for expert in plan.experts:
        _dim(f"  {expert.weight:g} of {expert.name} {expert.digest if expert.digest != expert.name else ''}".rstrip())
    for replica in plan.replicas:
        held = ", holds every expert" if replica.resident and plan.experts else ""
        _dim(f"  worker {replica.worker} at {replica.address}{held}")
    _dim(f"  seed {plan.seed}, registry revision {plan.revision}, request id {planned.request_id}")


def _print_start(start: TextStart, experts: Iterable[TextExpert]) -> None:
    prompt = f"{start.prompt_token_count} tokens of prompt"
    if start.soft_prompt_token_count:
        prompt += f" after {start.soft_prompt_token_count} of soft prompts"
    _dim(f"start: {start.worker}, {prompt}, template {start.prompt_template}, waited {_milliseconds(start.wait)}")
    if start.variant:
        _dim(f"  base as served: {start.variant}")
    if start.HasField("constraint"):
        _dim(f"  {_constraint(start.constraint, experts)}")
    _dim(f"  {_sampling(start.sampling)}")


def _constraint(constraint: AppliedConstraint, experts: Iterable[TextExpert]) -> str:
    what = _CONSTRAINTS.get(constraint.kind, ConstraintKind.Name(constraint.kind))
    if not constraint.expert:
        return f"constraint: {what}, as asked"
    name = next((each.name for each in experts if each.digest == constraint.expert and each.name), constraint.expert)
    return f"constraint: {what}, of the expert {name} (--no-grammar leaves it out)"


def _sampling(sampling: Sampling) -> str:
    values = output.message_json(sampling)
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != [] and value is not False)


def _print_deltas(deltas: Sequence[TextDelta]) -> None:
    rows = [
        (
            repr(delta.text),
            " ".join(str(token.id) for token in delta.tokens),
            " ".join(f"{token.logprob:.3f}" for token in delta.tokens),
            " | ".join(_top(token) for token in delta.tokens if token.top),
            " ".join(f"{weight:g}" for weight in delta.contributions),
        )
        for delta in deltas
    ]
    if rows:
        columns = ("text~", "token ids~", "logprobs~", "most probable~", "weights~")
        output.console(stderr=True).print(output.table(columns, rows), style="dim")


def _top(token: Token) -> str:
    return " ".join(f"{other.id}:{other.logprob:.3f}" for other in token.top)


def _print_finish(finish: TextFinish) -> None:
    reason = TextFinishReason.Name(finish.reason).removeprefix("TEXT_FINISH_REASON_")
    usage, timings, speed = finish.usage, finish.timings, finish.speed
    stop = f" at {finish.stop!r}" if finish.stop else ""
    cached = f" ({usage.cached_prompt_token_count} found)" if usage.cached_prompt_token_count else ""
    counts = f"{usage.prompt_token_count} tokens of prompt{cached}, {usage.completion_token_count} of answer"
    made_way = f", made way {speed.preemption_count} times" if speed.preemption_count else ""
    _dim(f"finish: {reason}{stop}, {counts}{made_way}")
    named = {name: getattr(timings, name) for name in ("route", "wait", "prefill", "decode")}
    _dim(f"  {', '.join(f'{name} {_milliseconds(spent)}' for name, spent in named.items())}")
    _dim(
        f"  prefill {speed.prefill_tokens_per_second:.1f} tokens per second, "
        f"decode {speed.decode_tokens_per_second:.1f}; {speed.step_count} steps, "
        f"from token to token {_milliseconds(speed.step_mean)}, at most {_milliseconds(speed.step_max)}"
    )


def _explained(degradation: str) -> str:
    """What a stable word means to a person."""
    return _DEGRADATIONS.get(degradation, degradation)


def _dim(text: str) -> None:
    output.console(stderr=True).print(Text.assemble(output.plain(text, "dim")), soft_wrap=True)


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _milliseconds(duration: Duration) -> str:
    return f"{1000 * _seconds(duration):.1f} ms"


def _json(event: Event) -> dict[str, Any]:
    match event:
        case TextPlanned():
            return {"event": "plan", "request_id": event.request_id, "plan": output.message_json(event.plan)}
        case TextStart():
            return {"event": "start", "start": output.message_json(event)}
        case TextDelta():
            return {"event": "delta", "delta": output.message_json(event)}
        case TextFinish():
            return {"event": "finish", "finish": output.message_json(event)}
