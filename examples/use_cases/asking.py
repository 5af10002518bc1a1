"""What the three programs share: their arguments, questions asked some at a time, refusals with what to do."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import TYPE_CHECKING, Final

from hocket.client import ROUTER_ADDRESS, RouterClient, TextAnswer, connect
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

_AT_A_TIME: Final = 8
_NOT_THERE: Final = (Reason.UNREACHABLE, Reason.NO_BASE, Reason.UNKNOWN_EXPERT)
_WHAT_TO_DO: Final = 'This needs a suite with the starter kit: "Use it" in docs/starter.md has the four commands.\n'


def arguments(document: str) -> argparse.ArgumentParser:
    """A parser with the options of all three.

    Args:
        document: The program's own docstring.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    address = os.environ.get("HOCKET_ROUTER", ROUTER_ADDRESS)
    parser.add_argument("--router", default=address, metavar="HOST:PORT", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result")
    return parser


def run(program: Callable[[RouterClient], Coroutine[None, None, None]], router: str) -> None:
    """Run a program with a client of a router. A refusal ends it with its reason."""

    async def connected() -> None:
        async with connect(router) as client:
            await program(client)

    try:
        asyncio.run(connected())
    except HocketError as error:
        sys.stderr.write(f"{error.reason}: {error.message}\n")
        sys.exit(_WHAT_TO_DO if error.reason in _NOT_THERE else 1)


async def answers(
    router: RouterClient, prompts: Iterable[str], experts: dict[str, float], *, max_tokens: int
) -> list[TextAnswer]:
    """Ask these experts every question, eight at a time: they share the passes of the worker.

    Args:
        router: Whom to ask.
        prompts: The questions.
        experts: Who answers, with weights.
        max_tokens: Most tokens of an answer.

    Returns:
        An answer for each question, the most probable one, each token with the 20 likeliest.
    """
    turns = asyncio.Semaphore(_AT_A_TIME)

    async def answer(prompt: str) -> TextAnswer:
        async with turns:
            return await router.answer_text(
                prompt, experts=experts, temperature=0.0, max_tokens=max_tokens, top_logprobs=20
            )

    return await asyncio.gather(*map(answer, prompts))


def plain(text: str) -> str:
    """A text in one line, without what would move a terminal's cursor: it was made by a model."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def who(answer: TextAnswer) -> dict[str, float]:
    """Who made an answer: `publisher/name@version`, each with its weight."""
    return {expert.name: expert.weight for expert in answer.plan.experts}
