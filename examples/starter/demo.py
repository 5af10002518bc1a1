"""`make demo`: the starter kit in a suite of its own, asked a dozen questions.

Nothing is faked: every expert is verified by its signature and published, the gate of the router chooses who answers,
and what is shown is the stream as it comes, in the colour of whoever makes it. An answer is judged as the kit's scores
judge it, and one that is wrong is shown as wrong.

    python -m examples.starter.demo --kit starter --strict
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.style import Style
from rich.text import Text

from examples.running import run, suite
from examples.starter.checks import tried
from examples.starter.kit import BASE, Kit
from examples.starter.prompts import MIXED, MIXTURE, PROMPTS, Prompt
from hocket.cli.colours import Colours
from hocket.cli.decisions import why
from hocket.cli.output import bar, plain, size, table
from hocket.client import Routing, TextDelta, TextFinish, TextPlanned, connect, connect_registry
from hocket.errors import HocketError, Reason
from hocket.v1 import text_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.client import RegistryClient, RouterClient
    from hocket.v1.router_pb2 import TextDecision
    from hocket.v1.text_pb2 import TextPlan

_BASE_STYLE: Final = Style(color="grey58")
_TOKENS_MAX: Final = 96
_BAR_WIDTH: Final = 10
_DIGEST_WIDTH: Final = 12
_PIPE_COLUMNS: Final = 1000
_EVIDENCE_SHOWN: Final = 4
_UNDECIDED: Final = 2
"""Experts that the gate may put together where it cannot tell which."""


class Screen:
    """Shows answers as they come.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._colours = Colours()

    def ask(self, prompt: str) -> None:
        """Show what is asked."""
        self.console.print()
        for place, line in enumerate(prompt.splitlines()):
            self.console.print(Text("  " if place else "> ", "bold").append_text(plain(line)), soft_wrap=True)

    def answering(self, plan: TextPlan, evidence: Sequence[str]) -> None:
        """Show who will answer, in their colours, and why these: what in the text spoke for them."""
        who = Text("  ")
        for expert in plan.experts:
            style = self._colours.style({expert.digest: 1.0})
            who.append(f"{_name(expert)} {expert.weight:g} {bar(expert.weight, _BAR_WIDTH).rstrip()}  ", style)
        if not plan.experts:
            who.append(f"{plan.base_name}  ", _BASE_STYLE)
        because = f": {', '.join(evidence)}" if evidence else ""
        who.append_text(plain(f"{why(plan)}{because}", "dim"))
        self.console.print(who, soft_wrap=True)
        self.console.print("  ", end="")

    def show(self, plan: TextPlan, delta: TextDelta) -> None:
        """Show what was added, in the colour of whoever made it."""
        weights = {expert.digest: weight for expert, weight in zip(plan.experts, delta.contributions, strict=False)}
        text = plain(delta.text)
        text.stylize(self._colours.style(weights) or _BASE_STYLE)
        self.console.print(text, end="", soft_wrap=True)

    def judge(self, prompt: Prompt, answer: str, first_seconds: float, finish: TextFinish) -> bool:
        """Show what comes of an answer, whether it is right, and how fast it was.

        Returns:
            Whether it is right.
        """
        self.console.print()
        for line in tried(prompt, answer):
            self.console.print(Text("    ").append_text(plain(line)), soft_wrap=True)
        right = prompt.is_right(answer)
        mark = ("✓", "green") if right else ("✗", "red")
        expected = "" if right else f" expected {prompt.example.answer};"
        speed = f" first text after {first_seconds * 1e3:.0f} ms, {finish.speed.decode_tokens_per_second:.0f} tokens/s"
        self.console.print(Text.assemble("  ", mark, plain(expected), (speed, "dim")), soft_wrap=True)
        return right


async def ask(screen: Screen, router: RouterClient, prompt: Prompt, experts: Mapping[str, float] | None = None) -> bool:
    """Ask one question and show its answer; without experts the gate chooses who answers.

    Returns:
        Whether the answer is right, and whoever should have answered did.
    """
    question = prompt.example.prompt
    routing = None if experts else Routing(expert_count_max=_UNDECIDED)
    evidence = () if experts else _evidence(await router.route_text(question, routing=routing))
    plan, finish = text_pb2.TextPlan(), text_pb2.TextFinish()
    answer, first_seconds = "", 0.0
    begin = time.perf_counter()
    async for event in router.generate(question, experts=experts or {}, routing=routing, max_tokens=_TOKENS_MAX):
        match event:
            case TextPlanned():
                plan = event.plan
                screen.answering(plan, evidence)
            case TextDelta():
                if event.text and not answer:
                    first_seconds = time.perf_counter() - begin
                answer += event.text
                screen.show(plan, event)
            case TextFinish():
                finish = event
    who = {_name(expert) for expert in plan.experts}
    meant = who == set(experts) if experts else prompt.expert in who or (not prompt.expert and not who)
    return screen.judge(prompt, answer, first_seconds, finish) and meant


async def publish(console: Console, kit: Kit, registry: RegistryClient) -> list[str]:
    """Verify and publish every expert, and show that as a table.

    Returns:
        Their names, `publisher/name`.
    """
    names, rows = [], []
    for path in kit.experts():
        begin = time.perf_counter()
        expert = kit.verified(path)
        await registry.publish(expert.data, expert.release)
        seconds = time.perf_counter() - begin
        facts, publisher = expert.facts, expert.proof.publisher
        names.append(f"{publisher}/{facts.name}")
        digest = facts.digest.removeprefix("sha256:")[:_DIGEST_WIDTH]
        signed = Text(f"{publisher}, ok", "green")
        rows.append((facts.name, facts.kind, size(facts.size_bytes), digest, signed, f"{seconds * 1e3:.0f} ms"))
    columns = ("expert", "kind", "size>", "digest", "signature", "time>")
    console.print(table(columns, rows, "Experts, verified and published"))
    return names


async def known(router: RouterClient, experts: Sequence[str]) -> None:
    """Wait until the router's feed has brought all experts.

    Raises:
        TimeoutError: It has not within ten seconds.
    """
    async with asyncio.timeout(10):
        for expert in experts:
            while not await _is_known(router, expert):  # noqa: ASYNC110 - the news is in another process
                await asyncio.sleep(0.02)


async def _is_known(router: RouterClient, expert: str) -> bool:
    try:
        await router.route_text("hello", experts=[expert])
    except HocketError as error:
        if error.reason is Reason.UNKNOWN_EXPERT:
            return False
        raise
    return True


async def demo(console: Console, kit: Kit, folder: Path) -> list[bool]:
    """Everything.

    Returns:
        Which answers were right: of each prompt of `PROMPTS`, and last of the mixture.
    """
    kit.prepare(folder)
    console.print(f"[bold]Starting[/] router, aggregator, registry and a worker with {BASE}, in one process")
    async with (
        suite(folder) as running,
        connect(running.router) as router,
        connect_registry(running.registry) as registry,
    ):
        await known(router, await publish(console, kit, registry))
        console.print("\n[bold]Questions[/] that name nobody: the gate chooses who answers")
        screen = Screen(console)
        right = []
        for prompt in PROMPTS:
            screen.ask(prompt.example.prompt)
            right.append(await ask(screen, router, prompt))
        console.print("\n[bold]A mixture[/]: one sentence with words of two experts, asked of each alone, then of both")
        screen.ask(MIXED.example.prompt)
        for name in MIXTURE:
            await ask(screen, router, MIXED, {name: 1.0})
        right.append(await ask(screen, router, MIXED, MIXTURE))
    return right


def _evidence(decision: TextDecision) -> list[str]:
    """What spoke most for the experts that were chosen."""
    found = [each for candidate in decision.candidates if candidate.chosen for each in candidate.evidence]
    best = sorted(found, key=lambda each: -each.contribution)[:_EVIDENCE_SHOWN]
    return list(dict.fromkeys(each.text for each in best if each.contribution > 0))


def _name(expert: text_pb2.TextExpert) -> str:
    """The name of an expert, without publisher and version."""
    return expert.name.rpartition("/")[2].partition("@")[0]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, default=Path("starter"), metavar="FOLDER", help="the starter kit")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if an answer is wrong")
    arguments = parser.parse_args()
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS  # rather than cut lines in a pipe
    console = Console(highlight=False, width=width)
    kit = Kit(arguments.kit)
    try:
        kit.check()
        with tempfile.TemporaryDirectory(prefix="hocket-starter-") as folder:
            right = run(demo(console, kit, Path(folder)))
    except HocketError as error:
        sys.exit(f"{error.reason}: {error.message}")
    console.print(f"\n{sum(right)} of {len(right)} answers are right (docs/starter.md has the scores on held-out data)")
    console.print("Go on: the kit in [bold]hocket chat[/] (docs/starter.md), an expert of your own (docs/tutorial.md)")
    if arguments.strict and not all(right):
        sys.exit(1)


if __name__ == "__main__":
    main()
