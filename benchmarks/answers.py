"""Texts put to an engine, and when their tokens come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from services.expert_worker.engine.sampling import Sampling
from services.expert_worker.engine.sequence import Delta, Finished, TextRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import Mixture


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, who answers it, and how long the answer is.

    Attributes:
        token_ids: The prompt.
        mixture: Experts with their weights; empty for the base alone.
        new_tokens: Of the answer, whatever the model says.
        session: What it is a turn of; empty for nothing.
    """

    token_ids: tuple[int, ...]
    mixture: Mixture
    new_tokens: int
    session: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer.

    Attributes:
        token_ids: Its tokens.
        times: When each came, in seconds since all texts were put.
        finished: What the engine reports of it.
    """

    token_ids: tuple[int, ...]
    times: tuple[float, ...]
    finished: Finished

    @property
    def first_seconds(self) -> float:
        """Until its first token."""
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in pairwise(self.times)]


async def answer(engine: Engine, text: Text, begin: float | None = None) -> Answered:
    """Put one text, and read its answer as it comes."""
    begin = time.perf_counter() if begin is None else begin
    request = TextRequest(
        text.token_ids,
        text.mixture,
        Sampling(temperature=0.0),
        (),
        text.new_tokens,
        frozenset(),
        session=text.session,
    )
    token_ids: list[int] = []
    times: list[float] = []
    finished: Finished | None = None
    async for event in engine.submit(request, lambda: None):
        if isinstance(event, Delta):
            times += [time.perf_counter() - begin] * len(event.choices)
            token_ids += [choice.token_id for choice in event.choices]
        elif isinstance(event, Finished):
            finished = event
    if finished is None or len(token_ids) != text.new_tokens:
        raise RuntimeError("an answer is too short")
    return Answered(tuple(token_ids), tuple(times), finished)


async def answer_all(engine: Engine, texts: Sequence[Text]) -> list[Answered]:
    """Put all texts at once."""
    begin = time.perf_counter()
    return await asyncio.gather(*(answer(engine, text, begin) for text in texts))


def seconds_of(answered: Sequence[Answered]) -> float:
    """Until the last token of the last answer."""
    return max(each.times[-1] for each in answered)


def first_seconds_of(answered: Sequence[Answered]) -> float:
    """Until the first token of the first answer."""
    return min(each.first_seconds for each in answered)
