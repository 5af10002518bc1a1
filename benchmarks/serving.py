"""`make bench`: one 4-expert mixture, served bare and by Hocket in one process, against a bare echo.

Every server is a process of its own; the client is this one.
"""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import uvloop

from benchmarks.mixture import DESCRIPTION, Mixture
from benchmarks.report import command_line, record
from benchmarks.sides import CALLS, ROUNDS, Figures, Side, compare, server, stream, unary
from benchmarks.suites import PREDICT, first_answer, predict_request, start

if TYPE_CHECKING:
    from collections.abc import Mapping

_ONE_MESSAGE: Final = "bare mixture, one message"
_TWO_MESSAGES: Final = "bare mixture, plan and final"
_HOCKET: Final = "Hocket, one process"
_BUDGET: Final = 1.3


async def run(device: str, rounds: int, *, save: bool) -> None:
    """The whole benchmark."""
    request = predict_request()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hocket-bench-")))
        running = await start(stack, folder / "suite", f"worker.device={device}")
        saved = folder / "mixture.npz"
        Mixture.random().write(saved)
        bare, address = stack.enter_context(server("-m", "benchmarks.bare", str(saved)))
        floor = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.router))
        await first_answer(floor, "/bare/Stream")
        await first_answer(channel)
        sides = [
            Side("bare echo", (bare,), unary(floor, "/bare/Echo", request)),
            Side(_ONE_MESSAGE, (bare,), unary(floor, "/bare/Unary", request)),
            Side(_TWO_MESSAGES, (bare,), stream(floor, "/bare/Stream", request)),
            Side(_HOCKET, (running.pid,), stream(channel, PREDICT, request)),
        ]
        _report(await compare(sides, rounds), device, save=save)


def _report(found: Mapping[tuple[int, str], Figures], device: str, *, save: bool) -> None:
    rows = [
        {
            "in flight": str(in_flight),
            "server": name,
            "p50 ms": figures.p50_ms,
            "p99 ms": figures.p99_ms,
            "calls/s": figures.calls_per_second,
            "server CPU ms/call": figures.cpu_ms_per_call,
        }
        for (in_flight, name), figures in found.items()
    ]
    notes: dict[str, Any] = {"mixture": f"{DESCRIPTION}, device {device}"}
    for in_flight in CALLS:
        ours = found[in_flight, _HOCKET]
        for floor in (_ONE_MESSAGE, _TWO_MESSAGES):
            theirs = found[in_flight, floor]
            notes[f"Hocket / {floor}, {in_flight} in flight"] = (
                f"p50 {ours.p50_ms / theirs.p50_ms:.2f} x (budget {_BUDGET}), "
                f"CPU {ours.cpu_ms_per_call / theirs.cpu_ms_per_call:.2f} x"
            )
    name = "serving" if device == "cpu" else f"serving-{device.partition(':')[0]}"
    record(name, rows, notes, save=save)


def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = command_line(__doc__, rounds=ROUNDS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the worker computes")
    arguments = parser.parse_args()
    device = "cuda:0" if arguments.device == "cuda" else "cpu"
    uvloop.run(run(device, arguments.rounds, save=not arguments.no_save))


if __name__ == "__main__":
    main()
