"""A service as a process: what is the same for each of them, from the command line to an orderly end.

    hocket-router --config hocket.toml --set router.port=6001

Settings come from one TOML file, then the environment, then `--set`. The process answers as soon as its port is open,
says that it is ready when a request sent now would be served, and drains at SIGTERM: it is not ready any more, tells
its peers, still takes calls for a moment so that they learn of it, finishes what runs, and exits with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import os
import sys
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import structlog
import uvloop

from hocket.errors import HocketError, Reason
from hocket.paths import data_folder
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Tokens
from hocket.rpc.server import PROBE_PORT_OFFSET, Address, Server, stop_requested
from hocket.rpc.tls import Tls, open_tls
from hocket.settings import build, read_tables, read_token
from hocket.telemetry.logs import configure_logs
from hocket.telemetry.metrics import serve_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from hocket.rpc.handlers import Handlers

METRICS_PORT_OFFSET: Final = 1000
"""`/metrics` of a port is that many above it."""
TABLES: Final = frozenset({"router", "aggregator", "registry", "worker", "tls"})
EXIT_REFUSED: Final = 2
"""Exit status when settings, a port or a disk forbid to go on: the same start would end the same way."""

S = TypeVar("S", bound="ServiceSettings")


class ServiceSettings(Protocol):
    """What the settings of every service have."""

    @property
    def host(self) -> str:
        """Interface to listen on."""

    @property
    def port(self) -> int:
        """Port to listen on."""

    @property
    def drain_notice_seconds(self) -> float:
        """At shutdown, time in which calls are still taken."""

    @property
    def drain_grace_seconds(self) -> float:
        """Time for running calls to end after that."""


class App(Protocol):
    """A service without its port.

    Attributes:
        handlers: What it serves.
        failed: Set when the process must end, and start again from what is on disk.
    """

    handlers: Handlers
    failed: asyncio.Event

    async def start(self) -> None:
        """Open what it needs; calls may arrive when this returns."""

    async def ready(self) -> None:
        """Return when a request sent now would be served."""

    def leave(self) -> None:
        """The process is about to end: tell those who would send more work."""

    async def stop(self) -> None:
        """End every task, and close what was opened."""


@dataclass(frozen=True, slots=True)
class Program(Generic[S]):
    """One kind of process.

    Args:
        name: Of the service, and of its table of settings.
        settings: Type of its settings.
        make: The app, from its settings, its channels and its tokens.
        guarded: Whether some of its methods need tokens, so that it does not listen beyond loopback without them.
    """

    name: str
    settings: type[S]
    make: Callable[[S, Channels, Tokens], App]
    guarded: bool = False


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments that every process of a suite takes."""
    arguments = argparse.ArgumentParser(prog=prog, description=description)
    arguments.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML)")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="one setting, above file and environment"
    )
    arguments.add_argument("--insecure", action="store_true", help="bind beyond loopback without tokens")
    arguments.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    arguments.add_argument("--log-format", default="auto", choices=["auto", "json", "text"], help="auto: as it is read")
    arguments.add_argument("--supervised", action="store_true", help="stop when standard input is closed")
    return arguments


def set_up_logs(arguments: argparse.Namespace) -> None:
    """Log as the command line says."""
    configure_logs(arguments.log_level, json={"auto": None, "json": True, "text": False}[arguments.log_format])


def read_settings(arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """All tables: the file's, overridden by the environment's, overridden by `--set`.

    Raises:
        HocketError: `BAD_REQUEST` as `read_tables`, or for an assignment that is none.
    """
    tables = read_tables(arguments.config, environ, TABLES)
    for assignment in arguments.set:
        path, equals, value = assignment.partition("=")
        table, dot, key = path.partition(".")
        if not (equals and dot) or table not in TABLES:
            known = ", ".join(sorted(TABLES))
            raise HocketError(
                Reason.BAD_REQUEST, f"--set {assignment!r} is not table.key=value with one of the tables {known}"
            )
        tables.setdefault(table, {})[key] = value
    return tables


def settings_of(
    settings: type[S], table: str, tables: Mapping[str, Mapping[str, Any]], environ: Mapping[str, str]
) -> S:
    """The settings of one service.

    Data lies in the XDG directory unless a table says otherwise, and the token files of `[registry]` are everyone's.

    Raises:
        HocketError: `BAD_REQUEST` as `hocket.settings.build`.
    """
    data = data_folder(environ, Path.home())
    common: dict[str, Any] = {"data_dir": data, "trust_dir": data / "trust", "bases_dir": data / "bases"}
    for key in ("admin_token_file", "worker_token_file"):
        common[key] = tables.get("registry", {}).get(key)
    known = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]  # settings are dataclasses
    defaults = {key: value for key, value in common.items() if key in known and value is not None}
    return build(settings, {**defaults, **tables.get(table, {})}, table)


def read_tokens(settings: object) -> Tokens:
    """The tokens in the files that some settings name.

    Raises:
        HocketError: `BAD_REQUEST` as `read_token`.
    """
    return Tokens(
        admin=read_token(getattr(settings, "admin_token_file", None)),
        worker=read_token(getattr(settings, "worker_token_file", None)),
    )


def check_exposure(addresses: Sequence[Address], tokens: Tokens, table: str, *, insecure: bool) -> None:
    """Pass if it is safe to listen there: beyond loopback, not everyone may change what is served.

    Raises:
        HocketError: `BAD_REQUEST` if a token is missing.
    """
    if insecure or (tokens.admin and tokens.worker) or all(address.is_loopback for address in addresses):
        return
    raise HocketError(
        Reason.BAD_REQUEST,
        f"listening beyond loopback needs [{table}] admin_token_file and worker_token_file, so that not everyone "
        f"may change what is served: --set {table}.admin_token_file=FILE --set {table}.worker_token_file=FILE, "
        "each made by `head -c 32 /dev/urandom | base64 > FILE`; --insecure starts without them",
    )


def check_ports(addresses: Iterable[Address], *, tls: bool) -> None:
    """Pass if these are ports, and those above them too: metrics, and probes where there is TLS.

    Raises:
        HocketError: `BAD_REQUEST` if one is not.
    """
    highest = 2**16 - 1 - (PROBE_PORT_OFFSET if tls else METRICS_PORT_OFFSET)
    for address in addresses:
        if not 0 <= address.port <= highest:
            raise HocketError(
                Reason.BAD_REQUEST, f"port {address.port} cannot be: choose 1 to {highest}, or 0 for any free one"
            )


@contextmanager
def refusals() -> Iterator[None]:
    """End the process with status 2 and a line of advice when it cannot start or go on."""
    try:
        yield
    except (HocketError, OSError) as error:
        message = error.message if isinstance(error, HocketError) else str(error)
        sys.stderr.write(f"hocket: {message}\n")
        sys.exit(EXIT_REFUSED)


def freeze() -> None:
    """Let no collection walk what the start has built: it lives as long as the process."""
    gc.collect()
    gc.freeze()


async def first_of(*events: asyncio.Event) -> None:
    """Return when one of them is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def run(program: Program[S], argv: Sequence[str] | None = None) -> None:
    """Run one service until it is asked to stop.

    Exits with status 2 and advice when its settings, a port or its disk forbid to go on.
    """
    arguments = parser(f"hocket-{program.name}", f"Run the {program.name} of Hocket.").parse_args(argv)
    set_up_logs(arguments)
    with refusals():
        tables = read_settings(arguments, os.environ)
        settings = settings_of(program.settings, program.name, tables, os.environ)
        tls = open_tls(**tables.get("tls", {}))
        tokens = read_tokens(settings)
        address = Address(settings.host, settings.port)
        check_ports([address], tls=tls is not None)
        if program.guarded:
            check_exposure([address], tokens, program.name, insecure=arguments.insecure)
        uvloop.run(_serve(program, settings, tokens, tls, supervised=arguments.supervised))


async def _serve(program: Program[S], settings: S, tokens: Tokens, tls: Tls | None, *, supervised: bool) -> None:
    log = structlog.get_logger(program.name)
    stopping = stop_requested(supervised=supervised)
    credentials = None if tls is None else tls.server_credentials(program.name)
    async with AsyncExitStack() as stack:
        channels = Channels(tls=tls)
        stack.push_async_callback(channels.close)
        app = program.make(settings, channels, tokens)
        server = Server(app.handlers, Address(settings.host, settings.port), credentials=credentials)
        stack.push_async_callback(app.stop)
        await app.start()
        await server.start()
        stop_metrics = serve_metrics(server.address.host, server.address.port + METRICS_PORT_OFFSET)
        stack.push_async_callback(asyncio.to_thread, stop_metrics)
        freeze()
        getting_ready = asyncio.create_task(_get_ready(app, server, log))
        await first_of(stopping, app.failed)
        getting_ready.cancel()
        log.info("draining")
        if not app.failed.is_set():
            app.leave()
        await drain([(server, settings)], give_notice=not app.failed.is_set())
    if app.failed.is_set():
        raise HocketError(Reason.NOT_READY, f"the {program.name} cannot go on: see the log, mend it, and start again")


async def drain(servers: Sequence[tuple[Server, ServiceSettings]], *, give_notice: bool) -> None:
    """End ports in order: not ready, still taking calls for a moment so that callers learn of it, then drained.

    Args:
        servers: Each with the settings that say how long.
        give_notice: Whether there is such a moment.
    """
    for server, _ in servers:
        server.set_ready(ready=False)
    if give_notice:
        await asyncio.sleep(max(settings.drain_notice_seconds for _, settings in servers))
    for server, settings in servers:
        await server.drain(settings.drain_grace_seconds)


async def _get_ready(app: App, server: Server, log: Any) -> None:  # noqa: ANN401 - structlog's logger
    log.info("listening", address=str(server.address))
    await app.ready()
    server.set_ready()
    log.info("ready", address=str(server.address))
