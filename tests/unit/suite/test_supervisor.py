"""The supervisor: parts are started, watched, started again within bounds, and ended in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.suite.supervisor import Part, Restarts, Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SOON = Restarts(pause_seconds_min=0.01, pause_seconds_max=0.02, count_max=3, window_seconds=60.0)
ENDLESS = "import sys; print('begun', file=sys.stderr, flush=True); sys.stdin.read()"
OBEDIENT = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('ended', file=sys.stderr)));"
    "print('begun', file=sys.stderr, flush=True); sys.stdin.read()"
)
DEAF = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', file=sys.stderr); signal.pause()"
)


def part(name: str, code: str, service: str = "", grace_seconds: float = 1.0) -> Part:
    return Part(name, service or name, (sys.executable, "-u", "-c", code), grace_seconds)


@asynccontextmanager
async def supervised(*parts: Part) -> AsyncIterator[tuple[list[str], asyncio.Task[bool], asyncio.Event]]:
    lines: list[str] = []
    stopping = asyncio.Event()
    task = asyncio.create_task(Supervisor(parts, SOON, lines.append).run(stopping))
    try:
        yield lines, task, stopping
    finally:
        stopping.set()
        await task


async def until(lines: list[str], line: str, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while lines.count(line) < count:  # noqa: ASYNC110 - the line is another process's
            await asyncio.sleep(0.01)


async def test_what_a_part_logs_comes_out_behind_its_name() -> None:
    async with supervised(part("one", ENDLESS), part("three", ENDLESS)) as (lines, _, _):
        await until(lines, "one   | begun")
        await until(lines, "three | begun")


async def test_an_endless_line_does_not_end_the_part() -> None:
    shout = "import sys; sys.stderr.write('x' * 3_000_000 + '\\nafter\\n'); sys.stdin.read()"
    async with supervised(part("loud", shout)) as (lines, _, _):
        await until(lines, "loud | after")
    assert sum(len(line) - len("loud | ") for line in lines) == 3_000_000 + len("after")


async def test_a_part_that_dies_is_started_again() -> None:
    dying = "import os, sys; print(os.getpid(), file=sys.stderr, flush=True); sys.stdin.read()"
    async with supervised(part("p", dying)) as (lines, task, _):
        for life in range(2):
            async with asyncio.timeout(10):
                while len(lines) <= life:  # noqa: ASYNC110 - the line is another process's
                    await asyncio.sleep(0.01)
            os.kill(int(lines[life].split()[-1]), signal.SIGKILL)
        async with asyncio.timeout(10):
            while len(lines) < 3:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        assert not task.done()


async def test_a_part_that_dies_too_often_ends_the_suite() -> None:
    async with supervised(part("p", "import sys; print('dies', file=sys.stderr); sys.exit(1)")) as (lines, task, _):
        assert await asyncio.wait_for(asyncio.shield(task), 10) is False
    assert lines == ["p | dies"] * (1 + SOON.count_max)


async def test_one_worker_that_dies_too_often_leaves_the_others_alone() -> None:
    dies = part("worker-1", "import sys; print('dies', file=sys.stderr); sys.exit(1)", "worker")
    async with supervised(dies, part("worker-2", ENDLESS, "worker")) as (lines, task, _):
        await until(lines, "worker-1 | dies", 1 + SOON.count_max)
        await asyncio.sleep(0.1)
        assert not task.done()
        assert lines.count("worker-1 | dies") == 1 + SOON.count_max


async def test_a_part_that_refuses_its_settings_is_not_started_again() -> None:
    async with supervised(part("p", "import sys; print('no', file=sys.stderr); sys.exit(2)")) as (lines, task, _):
        assert await asyncio.wait_for(asyncio.shield(task), 10) is False
    assert lines == ["p | no"]


async def test_a_refusal_in_a_later_life_is_one_more_end(tmp_path: Path) -> None:
    mark = tmp_path / "lived"
    code = (
        f"import pathlib, sys; mark = pathlib.Path({str(mark)!r}); first = not mark.exists(); mark.touch();"
        "print('lives', file=sys.stderr); sys.exit(1 if first else 2)"
    )
    async with supervised(part("p", code)) as (lines, task, _):
        assert await asyncio.wait_for(asyncio.shield(task), 10) is False
    assert lines == ["p | lives"] * (1 + SOON.count_max)


async def test_a_command_that_cannot_be_run_is_tried_within_bounds() -> None:
    missing = Part("worker-1", "worker", ("/nowhere/python",), 1.0)
    async with supervised(missing, part("worker-2", ENDLESS, "worker")) as (lines, task, _):
        await until(lines, "worker-2 | begun")
        await asyncio.sleep(0.3)
        assert not task.done()
    async with supervised(missing) as (_, task, _):
        assert await asyncio.wait_for(asyncio.shield(task), 10) is False


async def test_parts_end_in_their_order_and_those_of_one_service_together() -> None:
    parts = [part("a", OBEDIENT), part("b1", OBEDIENT, "b"), part("b2", OBEDIENT, "b"), part("c", OBEDIENT)]
    async with supervised(*parts) as (lines, task, stopping):
        for one in parts:
            await until(lines, f"{one.name:<2} | begun")
        stopping.set()
        assert await asyncio.wait_for(asyncio.shield(task), 10) is True
    ended = [line.split()[0] for line in lines if line.endswith("ended")]
    assert (ended[0], {*ended[1:3]}, ended[3]) == ("a", {"b1", "b2"}, "c")


async def test_a_part_that_does_not_end_is_killed() -> None:
    async with supervised(part("p", DEAF, grace_seconds=0.2)) as (lines, task, stopping):
        await until(lines, "p | begun")
        stopping.set()
        assert await asyncio.wait_for(asyncio.shield(task), 5) is True
