"""`make bench-peers`: the mixture on MLServer and on Ray Serve, beside Hocket, in one run.

What is compared alternates round by round; a peer runs only while it is measured, because Ray is busy also when nobody
asks it anything.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import grpc
import uvloop
from google.protobuf.wrappers_pb2 import BytesValue

from benchmarks.mixture import DESCRIPTION, Mixture, check, row
from benchmarks.report import command_line, record
from benchmarks.sides import CALLS, ROUNDS, Figures, Side, compare, idle_share, server, stream, unary
from benchmarks.suites import PREDICT, first_answer, predict_request, start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ROOT: Final = Path(__file__).parents[2]
_MLSERVER: Final = _ROOT / ".venv-mlserver" / "bin" / "python"
_RAY: Final = _ROOT / ".venv-ray" / "bin" / "python"
_MODEL_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
_RAY_PREDICT: Final = "/peers.Mixture/Predict"
_READY_SECONDS_MAX: Final = 60.0
_IDLE_SECONDS: Final = 5.0
_LOG_SHOWN: Final = 4000

_ONE: Final = "Hocket, one process"
_SPLIT: Final = "Hocket, split"
_MLSERVERS: Final = {"MLServer, in its own process": 0, "MLServer, pool of one": 1}
"""MLServer at its best, and as it comes: a pool of one inference process beside the one that serves."""
_RAYS: Final[Mapping[str, Mapping[str, str]]] = {
    "Ray Serve, as it comes": {},
    "Ray Serve, tuned": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
"""Ray Serve through its proxy; and with its throughput settings, the router deployment asked without a proxy."""
_RAY_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # no token to make in the home folder and to check
    "RAY_worker_niceness": "0",  # replicas would yield to everybody else
}
_BUDGETS: Final = {**dict.fromkeys(_MLSERVERS, 1.3), **dict.fromkeys(_RAYS, 3.0)}


async def run(rounds: int, *, save: bool) -> None:
    """The whole benchmark."""
    found: dict[tuple[int, str], Figures] = {}
    notes: dict[str, Any] = {"mixture": DESCRIPTION, "versions": _versions()}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hocket-bench-")))
        Mixture.random().write(folder / "mixture.npz")
        sides = {}
        for name, split in ((_ONE, False), (_SPLIT, True)):
            running = await start(stack, folder / str(split), split=split)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.router))
            await first_answer(channel)
            sides[name] = Side(name, (running.pid,), stream(channel, PREDICT, predict_request()))
        log = stack.enter_context((folder / "peers.log").open("w+"))
        stack.push(partial(_tell, log))
        with ExitStack() as peers:
            compared = [await _mlserver(peers, name, workers, folder, log) for name, workers in _MLSERVERS.items()]
            found |= await compare([*compared, sides[_ONE]], rounds)
        notes |= _ratios(found, _ONE, _ONE, list(_MLSERVERS))
        for name, settings in _RAYS.items():
            with ExitStack() as peers:
                side = await _ray(peers, name, settings, folder, log)
                notes[f"{name}, idle"] = f"{await idle_share(side, _IDLE_SECONDS):.0%} of a core"
                measured = await compare([side, sides[_SPLIT]], rounds)
            ours = f"{_SPLIT}, beside {name}"
            found |= {(in_flight, ours if key == _SPLIT else key): each for (in_flight, key), each in measured.items()}
            notes |= _ratios(found, ours, _SPLIT, [name])
    _report(found, notes, save=save)


def _tell(log: TextIO, error: type[BaseException] | None, *_rest: object) -> None:
    """What the peers have said, when something has failed."""
    if error is not None:
        log.seek(0)
        sys.stderr.write(log.read()[-_LOG_SHOWN:])


async def _mlserver(stack: ExitStack, name: str, workers: int, folder: Path, log: TextIO) -> Side:
    request = folder / "model_infer.bin"
    command = [_MLSERVER, "-m", "benchmarks.peers.mlserver_mixture", folder / "mixture.npz", request, workers]
    pid, address = stack.enter_context(server(*map(str, [*command, *_free_ports(3)]), stderr=log, cwd=_ROOT))
    channel = grpc.aio.insecure_channel(address)
    # raw_output_contents is the last field of a ModelInferResponse: the value is its last four bytes.
    await _right(channel, _MODEL_INFER, request.read_bytes(), lambda response: response[-4:])
    return Side(name, (pid,), unary(channel, _MODEL_INFER, request.read_bytes()))


async def _ray(stack: ExitStack, name: str, settings: Mapping[str, str], folder: Path, log: TextIO) -> Side:
    http, proxy, direct, direct_http = _free_ports(4)
    environment = {**os.environ, **_RAY_ENVIRONMENT, **settings, "PYTHONPATH": str(_ROOT)}
    if settings:
        for kind, port in (("GRPC", direct), ("HTTP", direct_http)):
            environment[f"RAY_SERVE_DIRECT_INGRESS_MIN_{kind}_PORT"] = str(port)
            environment[f"RAY_SERVE_DIRECT_INGRESS_MAX_{kind}_PORT"] = str(port + 100)
    command = [_RAY, "-m", "benchmarks.peers.ray_mixture", folder / "mixture.npz", folder / "ray", http, proxy]
    pid, address = stack.enter_context(server(*map(str, command), stderr=log, cwd=_ROOT, env=environment))
    channel = grpc.aio.insecure_channel(address)
    request = BytesValue(value=row().astype("<f4").tobytes()).SerializeToString()
    await _right(channel, _RAY_PREDICT, request, lambda response: BytesValue.FromString(response).value)
    return Side(name, (pid,), unary(channel, _RAY_PREDICT, request))


async def _right(channel: grpc.aio.Channel, method: str, request: bytes, value: Callable[[bytes], bytes]) -> None:
    """Return when a peer answers, and answers right."""
    call: Any = channel.unary_unary(method)
    end = time.monotonic() + _READY_SECONDS_MAX
    while True:
        try:
            response = await call(request, timeout=30, wait_for_ready=True)
        except grpc.aio.AioRpcError:  # it serves before it has loaded
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.2)
        else:
            check(method, value(response))
            return


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _versions() -> str:
    said = []
    for python, packages in ((_MLSERVER, ("mlserver", "grpcio")), (_RAY, ("ray", "grpcio"))):
        program = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {packages}), sep=', ')"
        said.append(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip())  # noqa: S603 - our own program
    return "; ".join(said)


def _ratios(found: Mapping[tuple[int, str], Figures], ours: str, shown: str, peers: Sequence[str]) -> dict[str, str]:
    notes = {}
    for in_flight in CALLS:
        hocket = found[in_flight, ours]
        for name in peers:
            peer = found[in_flight, name]
            notes[f"{shown} / {name}, {in_flight} in flight"] = (
                f"{hocket.calls_per_second / peer.calls_per_second:.2f} x the calls per second "
                f"(budget {_BUDGETS[name]:g}), p50 {hocket.p50_ms / peer.p50_ms:.2f} x, "
                f"CPU {hocket.cpu_ms_per_call / peer.cpu_ms_per_call:.2f} x"
            )
    return notes


def _report(found: Mapping[tuple[int, str], Figures], notes: Mapping[str, Any], *, save: bool) -> None:
    rows = [
        {
            "in flight": str(in_flight),
            "server": name,
            "p50 ms": figures.p50_ms,
            "p99 ms": figures.p99_ms,
            "calls/s": figures.calls_per_second,
            "CPU ms/call": figures.cpu_ms_per_call,
        }
        for (in_flight, name), figures in sorted(found.items(), key=lambda item: item[0][0])
    ]
    record("peers", rows, notes, save=save)


def main() -> None:
    """Measure; `--no-save` only prints."""
    arguments = command_line(__doc__, rounds=ROUNDS).parse_args()
    uvloop.run(run(arguments.rounds, save=not arguments.no_save))


if __name__ == "__main__":
    main()
