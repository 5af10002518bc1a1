"""Ask every question, several at a time, and score what comes back."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Situation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from hocket.evaluation.metrics import Question

_ATTEMPTS: Final = 6
_PAUSE_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Reply:
    """What somebody answers.

    Attributes:
        text: The answer.
        experts: Names of those who gave it; none for a base alone.
    """

    text: str
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its answer.

    Attributes:
        question: What was asked.
        reply: What was answered.
        score: How good that is, 0 to 1.
        seconds: How long it took.
    """

    question: Question
    reply: Reply
    score: float
    seconds: float


def answer_all(
    questions: Sequence[Question], ask: Callable[[Question], Reply], *, concurrency: int = 8
) -> Iterator[Answered]:
    """Every question with its answer, in order.

    Who is too busy is asked again, after a pause that grows, six times in all.

    Args:
        questions: What to ask.
        ask: Answers one; called from several threads.
        concurrency: Most questions at a time.

    Raises:
        HocketError: What `ask` raises, for the first question in order that fails.
    """
    waiting: deque[Future[Answered]] = deque()
    left = iter(questions)
    with ThreadPoolExecutor(concurrency, thread_name_prefix="hocket-evaluate") as pool:
        try:
            for question in left:
                waiting.append(pool.submit(_answered, question, ask))
                if len(waiting) >= 2 * concurrency:  # so that a slow one does not keep others from being asked
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _answered(question: Question, ask: Callable[[Question], Reply]) -> Answered:
    for attempt in range(_ATTEMPTS):
        started = time.monotonic()
        try:
            reply = ask(question)
        except HocketError as error:
            if error.situation is not Situation.OVERLOADED or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(max(error.retry_after_seconds or 0.0, _PAUSE_SECONDS * 2**attempt))
        else:
            seconds = time.monotonic() - started
            return Answered(question, reply, question.score(reply.text), seconds)
    raise AssertionError  # the last attempt has returned or raised
