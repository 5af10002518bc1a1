"""One answer on its way: what was asked for, what is reported of it, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import TYPE_CHECKING, TypeAlias

import torch

from hocket.errors import HocketError, Reason
from hocket.text_limits import PRIORITY_DEFAULT
from services.expert_worker.engine.expert import prompts_of
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.prefixes import page_key, salt_of
from services.expert_worker.engine.sampling import SamplingRow

if TYPE_CHECKING:
    from services.expert_worker.engine.constraints import Matcher
    from services.expert_worker.engine.detokenizer import Detokenizer
    from services.expert_worker.engine.expert import AdapterExpert, Mixture
    from services.expert_worker.engine.sampling import Choice, Sampling


@dataclass(frozen=True, slots=True, eq=False)
class TextRequest:
    """What one answer is computed from.

    Attributes:
        token_ids: The prompt, template included; soft prompts are the mixture's.
        mixture: The experts that answer, with their weights.
        sampling: How tokens are chosen.
        stops: Texts that end the answer and are no part of it.
        max_tokens: Most tokens of the answer, at least 1; fewer if the context has no room for them.
        eos_ids: Tokens by which the model says that it has ended; empty to go on whatever it says.
        matcher: What the answer must be, at its beginning, for this answer alone; None if it may be anything.
        tenant: Who asks: tenants share the engine fairly, and find nothing of each other.
        session: What the request is a turn of: what it leaves is kept for the next one. Empty for nothing.
        priority: How urgent it is among those of its tenant, 0 to 9; 9 is the most urgent.
    """

    token_ids: tuple[int, ...]
    mixture: Mixture
    sampling: Sampling
    stops: tuple[str, ...]
    max_tokens: int
    eos_ids: frozenset[int]
    matcher: Matcher | None = None
    tenant: str = ""
    session: str = ""
    priority: int = PRIORITY_DEFAULT


class FinishReason(StrEnum):
    """Why an answer ended."""

    END = auto()
    """The model said so."""
    STOP = auto()
    """One of the stop texts came."""
    LENGTH = auto()
    """It has as many tokens as were allowed, or as the context holds."""


@dataclass(frozen=True, slots=True)
class Started:
    """An answer runs from now on.

    Attributes:
        wait_seconds: Time since it was submitted.
    """

    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What has been added to an answer.

    Attributes:
        text: Whole characters; empty while a character or a stop text is not complete.
        choices: The tokens that were chosen.
    """

    text: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """How an answer ended, and what it took.

    Attributes:
        reason: Why it ended.
        stop: The stop text, if that was why; else empty.
        token_count: Tokens of the answer, the one that ended it included.
        wait_seconds: From its submission until it ran.
        prefill_seconds: From there until its first token.
        decode_seconds: From its first token to its last.
        step_count: Steps of the engine that it took part in.
        step_seconds_max: Longest time from one of its tokens to the next; 0 if there is one token.
        cached_token_count: Tokens of the prompt whose keys and values were there when it ran first.
        preemption_count: How often it had to make way, and went on later.
    """

    reason: FinishReason
    stop: str
    token_count: int
    wait_seconds: float
    prefill_seconds: float
    decode_seconds: float
    step_count: int
    step_seconds_max: float
    cached_token_count: int
    preemption_count: int


Event: TypeAlias = "Started | Delta | Finished"
"""What an answer consists of: it starts, grows by any number of deltas, and finishes."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer on its way. The engine thread's own from its submission on.

    Its rows are those of soft prompts, then the tokens of the prompt, then those of the answer. It is the one place
    where they are held against the context.

    Args:
        request: What it is computed from.
        detokenizer: Of its own.
        page_positions: Positions of a KV page.
        context_length: Positions that one answer may take with its prompt.
        arrival_time: When it was submitted.
        variant: Of the base, as it is served.

    Raises:
        HocketError: `BAD_REQUEST` for no prompt at all; `TOO_LARGE` if the context has no room for an answer.
    """

    request: TextRequest
    detokenizer: Detokenizer
    page_positions: int
    context_length: int
    arrival_time: float
    variant: str = ""
    soft_prompts: list[torch.Tensor] = field(init=False)
    """`[n, hidden]` each, in the order in which they stand."""
    experts: frozenset[AdapterExpert] = field(init=False)
    """Who computes it."""
    soft_row_count: int = field(init=False)
    prompt_row_count: int = field(init=False)
    """Rows of soft prompts and prompt."""
    token_count_max: int = field(init=False)
    """Most tokens of its answer, the context considered."""
    page_count_max: int = field(init=False)
    """KV pages that its longest answer takes."""
    _keys: list[bytes] = field(init=False)
    """The salt, then the keys of its whole pages, as far as they were asked for."""
    row: SamplingRow = field(init=False)
    """What its next token depends on besides logits."""
    answer_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    """Its block table: pages for all of its rows, once it runs; empty while it waits."""
    computed_count: int = 0
    """Rows whose keys and values are in its pages."""
    kept_page_count: int = 0
    """Its first pages that are in the prefix cache, as far as it has said."""
    charged_row_count: int = 0
    """Rows that its tenant has been charged for."""
    cached_token_count: int = 0
    """Tokens of its prompt that were found when it ran first."""
    preemption_count: int = 0
    unread_count: int = 0
    """Events that its reader has not said to have read."""
    turn: int = 0
    """Number of the last step that it took part in."""
    number: int = 0
    """Its place among all that have come."""
    start_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    step_count: int = 0
    step_seconds_max: float = 0.0

    def __post_init__(self) -> None:
        self.soft_prompts = prompts_of(self.request.mixture)
        self.experts = frozenset(expert for expert, _ in self.request.mixture)
        self.soft_row_count = sum(map(len, self.soft_prompts))
        self.prompt_row_count = self.soft_row_count + len(self.request.token_ids)
        self.token_count_max = min(self.request.max_tokens, self._room())
        self.row = SamplingRow(self.request.sampling, self.request.token_ids, matcher=self.request.matcher)
        self.page_count_max = self.pages_for(self.prompt_row_count + self.token_count_max)
        self._keys = [salt_of(self.variant, self.request.mixture, self.request.tenant)]

    def _room(self) -> int:
        """Positions that prompt and soft prompts leave to the answer."""
        if not self.prompt_row_count:
            raise HocketError(Reason.BAD_REQUEST, "the prompt is empty: there is nothing to answer", field="input")
        room = self.context_length - self.prompt_row_count
        if room < 1:
            soft = f" and the experts' soft prompts {self.soft_row_count}" if self.soft_row_count else ""
            raise HocketError(
                Reason.TOO_LARGE,
                f"the prompt has {len(self.request.token_ids)} tokens{soft}; the context has {self.context_length} "
                "with the answer: shorten it",
                field="input",
            )
        return room

    @property
    def row_count(self) -> int:
        """Rows to compute for its next token, those that are computed included."""
        return self.prompt_row_count + len(self.answer_ids)

    @property
    def rows_left(self) -> int:
        """Rows to compute until the next token can be chosen."""
        return self.row_count - self.computed_count

    def pages_for(self, row_count: int) -> int:
        """KV pages that so many rows take."""
        return -(-row_count // self.page_positions)

    def page_keys(self, count: int) -> list[bytes]:
        """The keys of its first pages, as many as that; all of their tokens must be known."""
        while len(self._keys) <= count:
            end = len(self._keys) * self.page_positions
            begin = end - self.page_positions
            soft = range(begin, min(end, self.soft_row_count))
            row_ids = [*(-1 - place for place in soft), *self._tokens(begin + len(soft), end)]
            self._keys.append(page_key(self._keys[-1], row_ids))
        return self._keys[1 : count + 1]

    def part(self, row_count: int) -> Part:
        """Its next so many rows."""
        begin = self.computed_count
        end = begin + row_count
        soft = min(end, self.soft_row_count)
        return Part(
            start=begin,
            embeddings=_rows(self.soft_prompts, begin, soft) if begin < soft else None,
            token_ids=self._tokens(max(begin, self.soft_row_count), max(end, self.soft_row_count)),
            pages=self.pages,
            mixture=self.request.mixture,
            sampled=row_count == self.rows_left,
        )

    def _tokens(self, begin: int, end: int) -> list[int]:
        """Tokens of the rows from `begin` to `end`."""
        prompt = self.request.token_ids[begin - self.soft_row_count : end - self.soft_row_count]
        answer = self.answer_ids[max(0, begin - self.prompt_row_count) : max(0, end - self.prompt_row_count)]
        return [*prompt, *answer]

    def append(self, token_id: int, now: float) -> tuple[str, FinishReason | None]:
        """Take the next token of the answer.

        Returns:
            The text that may be shown now, and why this was the last token if it was.
        """
        if self.answer_ids:
            self.step_seconds_max = max(self.step_seconds_max, now - self.last_token_time)
        else:
            self.first_token_time = now
        self.last_token_time = now
        self.row.append(token_id)
        self.answer_ids.append(token_id)
        reason: FinishReason | None = None
        text = ""
        if token_id in self.request.eos_ids:
            reason = FinishReason.END
        else:
            text = self.detokenizer.push(token_id)
            if len(self.answer_ids) == self.token_count_max:
                reason = FinishReason.LENGTH
        if reason is not None:
            text += self.detokenizer.finish()
        return text, reason if self.detokenizer.stopped is None else FinishReason.STOP

    def finished(self, reason: FinishReason) -> Finished:
        """The report of its end."""
        return Finished(
            reason=reason,
            stop=self.detokenizer.stopped or "",
            token_count=len(self.answer_ids),
            wait_seconds=self.start_time - self.arrival_time,
            prefill_seconds=self.first_token_time - self.start_time,
            decode_seconds=self.last_token_time - self.first_token_time,
            step_count=self.step_count,
            step_seconds_max=self.step_seconds_max,
            cached_token_count=self.cached_token_count,
            preemption_count=self.preemption_count,
        )


def _rows(prompts: list[torch.Tensor], begin: int, end: int) -> torch.Tensor:
    """Rows of the soft prompts as if they were one."""
    return (prompts[0] if len(prompts) == 1 else torch.cat(prompts))[begin:end]
