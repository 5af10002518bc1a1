"""`make bench`: the same mixture as processes - Hocket's, and bare ones over the same hops.

Every server is a process of its own; the client is this one. See `benchmarks.relay` for the bare ones.
"""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import psutil
import uvloop

from benchmarks.mixture import DESCRIPTION, Mixture
from benchmarks.report import command_line, record
from benchmarks.sides import CALLS, ROUNDS, Figures, Side, compare, cpu_by_process, server, stream
from benchmarks.suites import PREDICT, WORKERS, first_answer, predict_request, start

if TYPE_CHECKING:
    from collections.abc import Mapping

_BARE_PREDICT: Final = "/bare/Predict"
_RELAY: Final = "bare relay, three hops"
_RELAY_FAN_OUT: Final = "bare relay, three hops, fan-out"
_FAN_OUT: Final = "bare fan-out, two hops"
_HOCKET: Final = "Hocket, split"
_HOCKET_PARTIALS: Final = "Hocket, split, partials"
_BUDGET: Final = 1.5


class Bare:
    """The bare processes, ended with the block.

    Args:
        stack: Ends them.
        folder: Of the mixture and of Hocket's two messages.
    """

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._pids: list[int] = []

    def start(self, role: str, *addresses: str) -> str:
        """Start one, and return its address."""
        command = ("-m", "benchmarks.relay", role, str(self._folder), *addresses)
        pid, address = self._stack.enter_context(server(*command))
        self._pids.append(pid)
        return address

    async def side(self, name: str, address: str) -> Side:
        """What has been started since the last time, answering at `address`."""
        channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(address))
        processes, self._pids = tuple(self._pids), []
        await first_answer(channel, _BARE_PREDICT)
        return Side(name, processes, stream(channel, _BARE_PREDICT, predict_request()))


async def run(rounds: int, *, save: bool) -> None:
    """The whole benchmark."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hocket-bench-")))
        running = await start(stack, folder / "suite", split=True)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.router))
        plan, final = await first_answer(channel)
        Mixture.random().write(folder / "mixture.npz")
        (folder / "plan.bin").write_bytes(plan)
        (folder / "final.bin").write_bytes(final)
        bare = Bare(stack, folder)
        relay = await bare.side(_RELAY, bare.start("entry", bare.start("middle", bare.start("leaf"))))
        workers = [bare.start("worker") for _ in range(WORKERS)]
        relay_fan_out = await bare.side(_RELAY_FAN_OUT, bare.start("router", bare.start("aggregator", *workers)))
        workers = [bare.start("worker") for _ in range(WORKERS)]
        fan_out = await bare.side(_FAN_OUT, bare.start("fanout", *workers))
        sides = [
            relay,
            relay_fan_out,
            fan_out,
            Side(_HOCKET, (running.pid,), stream(channel, PREDICT, predict_request())),
            Side(_HOCKET_PARTIALS, (running.pid,), stream(channel, PREDICT, predict_request(partials=True))),
        ]
        found = await compare(sides, rounds)
        where = {f"CPU ms/call of {side.name}": await _where(side) for side in (relay, relay_fan_out, sides[3])}
        _report(found, where, save=save)


async def _where(side: Side) -> str:
    """The processes that take the time, by the role or the service in their command line."""
    shares = []
    for pid, milliseconds in (await cpu_by_process(side, CALLS[32])).items():
        module, role = psutil.Process(pid).cmdline()[2:4]
        name = role if module == "benchmarks.relay" else module.removeprefix("services.")
        shares.append(f"{name} {milliseconds:.2f}")
    return ", ".join(shares)


def _report(found: Mapping[tuple[int, str], Figures], where: Mapping[str, str], *, save: bool) -> None:
    rows = [
        {
            "in flight": str(in_flight),
            "servers": name,
            "p50 ms": figures.p50_ms,
            "p99 ms": figures.p99_ms,
            "1st event ms": figures.first_ms,
            "2nd event ms": figures.second_ms,
            "calls/s": figures.calls_per_second,
            "CPU ms/call": figures.cpu_ms_per_call,
        }
        for (in_flight, name), figures in found.items()
    ]
    notes = {
        "mixture": f"{DESCRIPTION}; {WORKERS} workers with half of the experts each",
        "CPU": "summed over all processes of a side, the registry and the supervisor included",
        **where,
        "events": "the first is the plan, the second the first value: the whole answer, or the first partial",
    }
    for in_flight in CALLS:
        ours, partials = found[in_flight, _HOCKET], found[in_flight, _HOCKET_PARTIALS]
        for name in (_RELAY, _RELAY_FAN_OUT, _FAN_OUT):
            theirs = found[in_flight, name]
            budget = f" (budget {_BUDGET})" if name == _RELAY else ""
            notes[f"Hocket / {name}, {in_flight} in flight"] = (
                f"p50 {ours.p50_ms / theirs.p50_ms:.2f} x{budget}, "
                f"CPU {ours.cpu_ms_per_call / theirs.cpu_ms_per_call:.2f} x{budget}"
            )
        relay = found[in_flight, _RELAY]
        notes[f"first events, Hocket / {_RELAY}, {in_flight} in flight"] = (
            f"the plan {ours.first_ms / relay.first_ms:.2f} x (budget {_BUDGET}), "
            f"the first partial {partials.second_ms / relay.second_ms:.2f} x (budget {_BUDGET})"
        )
    record("split", rows, notes, save=save)


def main() -> None:
    """Measure; `--no-save` only prints."""
    arguments = command_line(__doc__, rounds=ROUNDS).parse_args()
    uvloop.run(run(arguments.rounds, save=not arguments.no_save))


if __name__ == "__main__":
    main()
