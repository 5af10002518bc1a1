"""`hocket up` and `hocket health`: start a suite, and ask servers how they are."""

from __future__ import annotations

import asyncio
import os
import sys
from enum import IntEnum, StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import certificates, output, servers
from hocket.client import connect_health
from hocket.client.calls import GRPC_STATUS, TLS_DETAILS
from hocket.client.health import Health
from hocket.errors import HocketError, Reason, Situation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import NoReturn, TypeAlias

    _Answer: TypeAlias = Mapping[str, Health] | HocketError
    """The state of each service, or why there is none to tell."""

app = typer.Typer()

_REGISTRY_SERVICE: Final = "hocket.v1.RegistryService"
_NEEDED: Final = ("grpc_reflection", "sqlalchemy", "torch", "uvloop")

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Settings of the services (TOML)."),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Packages, caches and database.", show_default="~/.local/share/hocket"),
]
Trust = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The trust folder.", show_default="~/.local/share/hocket/trust")
]
Port = Annotated[
    int | None,
    typer.Option(
        metavar="PORT", min=1, max=64535, help="Where it listens; metrics are 1000 above.", show_default=False
    ),
]


class LogLevel(StrEnum):
    """Least severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Exit(IntEnum):
    """Exit statuses of `hocket health`."""

    SERVING = 0
    NOT_SERVING = 1
    UNREACHABLE = 2
    FAILED = 3


@app.command()
def up(
    *,
    config: Config = None,
    data: Data = None,
    trust: Trust = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Where the router listens.", show_default="127.0.0.1")
    ] = None,
    router_port: Port = None,
    registry_port: Port = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:0.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIGEST", help="Base model of the workers.", show_default="the only one of `hocket base list`"
        ),
    ] = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Serve what nobody trusted has signed. Logged and shown.")
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without tokens.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="Least severity that is logged.")] = LogLevel.INFO,
    split: Annotated[bool, typer.Option("--split", help="Run each service as a process of its own.")] = False,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Expert workers (with --split).")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any other setting; may be repeated."),
    ] = None,
) -> None:
    """Start a whole suite on this machine.

    Router, aggregator, registry and worker in one process; the router
    listens on port 50051 and the registry on 50052. Ctrl-C ends it when
    running calls are done.

    With --split each service is a process of its own, started again when
    it dies; the aggregator listens on 50053, workers on 50054 and above.

    $ hocket up
    $ hocket up --split --workers 2
    $ hocket up --data ./data --trust ./trust --router-port 6001
    $ hocket up --base qwen3-0.6b --device cuda:0
    $ hocket up --config hocket.toml --set worker.budget_bytes=2000000000
    """
    check_installed(*(("transformers",) if base is not None else ()))
    chosen = {
        **data_settings(data),
        "registry.trust_dir": trust,
        "worker.trust_dir": trust,
        "router.host": host,
        "router.port": router_port,
        "registry.port": registry_port,
        "worker.device": device,
        "worker.base": base,
        "registry.allow_unsigned": allow_unsigned or None,
        "worker.allow_unsigned": allow_unsigned or None,
    }
    command = [sys.executable, "-P", "-m", "services.suite", "--log-level", log_level]
    if config is not None:
        command += ["--config", str(config)]
    if insecure:
        command.append("--insecure")
    if workers > 1 and not split:
        raise HocketError(Reason.BAD_REQUEST, "several workers need a process each: add --split")
    if split:
        command += ["--split", "--workers", str(workers)]
    for assignment in (*assignments(chosen), *(settings or ())):
        command += ["--set", assignment]
    os.execv(sys.executable, command)  # noqa: S606 - the arguments are ours, and no shell reads them


def check_installed(*more: str) -> None:
    """Return if this environment can run a suite.

    Args:
        more: Modules that are needed as well.

    Raises:
        HocketError: `BAD_REQUEST` if something is not installed.
    """
    missing = [name for name in (*_NEEDED, *more) if find_spec(name) is None]
    if missing:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"a suite needs {', '.join(missing)} as well: pip install -e '.[all]' in a clone of Hocket",
        )


def data_settings(data: Path | None) -> dict[str, object]:
    """The settings of a suite whose data lie in a folder; what is None is left as it is."""
    folders: dict[str, object] = {f"{table}.data_dir": data for table in ("registry", "router", "worker")}
    return {**folders, "worker.bases_dir": None if data is None else data / "bases"}


def assignments(chosen: Mapping[str, object]) -> Iterator[str]:
    """Settings as `--set` takes them, without those that are None."""
    for key, value in chosen.items():
        if value is not None:
            yield f"{key}={value}"


@app.command()
def health(
    *,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Any of our servers.", show_default="router and registry"),
    ] = None,
    router: servers.Router = servers.ROUTER_ADDRESS,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    service: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One service, such as hocket.v1.RouterService.", show_default="all of them"),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on and print every change.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long to wait for an answer.")] = 5.0,
    json: output.Json = False,
) -> None:
    """Ask a server whether it serves.

    Without --address the router and the registry are asked; a watch is
    of one server, by default the router.

    Exit status: 0 every service asked about is serving; 1 one is not;
    2 nobody answers at the address; 3 the server does not know the
    service, or refuses the question.

    $ hocket health
    $ hocket health --address 127.0.0.1:50052 --service hocket.v1.RegistryService
    $ hocket health --watch
    """
    if address is not None:
        asked = [address]
    elif service is None and not watch:
        asked = [router, registry]
    else:
        asked = [registry if service == _REGISTRY_SERVICE else router]
    if watch:
        raise typer.Exit(_watched(asked[0], service, timeout, as_json=json))
    answers = [_answer(server, service, timeout) for server in asked]
    if json:
        output.emit({"servers": list(map(_document, asked, answers))})
    else:
        for server, answer in zip(asked, answers, strict=True):
            _print(server, answer)
    raise typer.Exit(max(map(_exit_of, answers)))


def _watched(address: str, service: str | None, timeout: float, *, as_json: bool) -> Exit:
    """How a watch has ended: with the refusal that says why."""
    try:
        asyncio.run(_watch(address, service, timeout, as_json=as_json))
    except HocketError as error:
        refusal = _explained(address, error)
    output.refuse(refusal, as_json=as_json)
    return _exit_of(refusal)


def _answer(address: str, service: str | None, timeout: float) -> _Answer:
    try:
        return asyncio.run(_ask(address, service, timeout))
    except HocketError as error:
        return _explained(address, error)


def _explained(address: str, error: HocketError) -> HocketError:
    """A refusal, or a connection that failed, in words for people."""
    if TLS_DETAILS in error.metadata:
        return servers.insecure(address, error)
    if _is_unreachable(error) and error.metadata.keys() == {GRPC_STATUS}:
        return HocketError(error.reason, f"nobody answers at {address}")
    return error


def _is_unreachable(error: HocketError) -> bool:
    return error.situation in {Situation.UNAVAILABLE, Situation.TIMED_OUT}


async def _ask(address: str, service: str | None, timeout_seconds: float) -> Mapping[str, Health]:
    async with connect_health(address, timeout_seconds=timeout_seconds, **certificates.chosen()) as client:
        return await client.list_services() if service is None else {service: await client.check(service)}


def _document(address: str, answer: _Answer) -> dict[str, object]:
    if isinstance(answer, HocketError):
        return {"address": address, **output.refusal_json(answer)}
    return {"address": address, "services": answer}


def _print(address: str, answer: _Answer) -> None:
    if isinstance(answer, HocketError):
        output.refuse(answer, as_json=False)
        return
    rows = [(name or "(process)", _coloured(state)) for name, state in answer.items()]
    output.print_table((f"service at {address}", "state"), rows, "The server has no services")


async def _watch(address: str, service: str | None, timeout_seconds: float, *, as_json: bool) -> NoReturn:
    """Until the server goes away: then the refusal that says so is raised."""
    name = service or ""
    async with connect_health(address, timeout_seconds=timeout_seconds, **certificates.chosen()) as client:
        last: Health | None = None
        while True:
            try:
                await client.check(name)  # a watch alone would wait for a server that is not there
            except HocketError as error:
                if last is None:
                    raise
                raise HocketError(Reason.UNREACHABLE, f"the server at {address} has stopped") from error
            try:
                async for state in client.watch(name):
                    if state is not last:
                        _print_change(name, state, as_json=as_json)
                    last = state
            except HocketError as error:
                if error.situation is not Situation.UNAVAILABLE:
                    raise
            # Servers end a connection now and then (its age); one that is gone does not answer the next check.


def _print_change(name: str, state: Health, *, as_json: bool) -> None:
    if as_json:
        output.emit({"service": name, "state": state})
    else:
        output.console().print(name or "(process)", _coloured(state))


def _exit_of(answer: _Answer) -> Exit:
    if isinstance(answer, HocketError):
        return Exit.UNREACHABLE if _is_unreachable(answer) else Exit.FAILED
    if Health.SERVICE_UNKNOWN in answer.values():
        return Exit.FAILED
    return Exit.SERVING if all(state is Health.SERVING for state in answer.values()) else Exit.NOT_SERVING


def _coloured(state: Health) -> object:
    return output.plain(state.lower().replace("_", " "), "green" if state is Health.SERVING else "red")
