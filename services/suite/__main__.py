"""`hocket-suite`, or `python -m services.suite`: the whole suite. `hocket up` starts this.

The four services run in this process; with `--split` in a process each, which this one supervises.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop

from hocket.client import connect_health
from hocket.client.health import Health
from hocket.errors import HocketError, Reason
from hocket.rpc.program import (
    METRICS_PORT_OFFSET,
    check_exposure,
    check_ports,
    first_of,
    freeze,
    parser,
    read_settings,
    read_tokens,
    refusals,
    set_up_logs,
    settings_of,
)
from hocket.rpc.server import PROBE_PORT_OFFSET, Address, stop_requested
from hocket.rpc.tls import open_tls
from services.aggregator.settings import AggregatorSettings
from services.expert_worker.settings import WorkerSettings
from services.registry.settings import RegistrySettings
from services.router.settings import RouterSettings
from services.suite.settings import SuiteSettings
from services.suite.supervisor import Part, Supervisor

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from hocket.rpc.handlers import Tokens
    from hocket.rpc.tls import Tls
    from services.suite.app import Suite

_GIVEN_UP: Final = 1
_WORKERS_MAX: Final = 64
_LOOK_SECONDS: Final = 0.1
_END_SECONDS: Final = 5.0
"""What a process may take to end beyond its own grace."""
_ROUTER_SERVICE: Final = "hocket.v1.RouterService"
_CHOICES: Final = {"router": "--router-port PORT", "registry": "--registry-port PORT"}
"""How `hocket up` is told a service's port, where it has an option of its own for it."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser("hocket-suite", "Run the four services of Hocket, in one process or in one each.")
    arguments.add_argument("--split", action="store_true", help="run each service as a process of its own")
    arguments.add_argument("--no-metrics", action="store_true", help="serve no /metrics (not with --split)")
    arguments.add_argument("--workers", type=int, default=1, metavar="N", help="expert workers (with --split)")
    return arguments.parse_args(argv)


def _settings(tables: Mapping[str, Mapping[str, Any]], environ: Mapping[str, str]) -> SuiteSettings:
    return SuiteSettings(
        router=settings_of(RouterSettings, "router", tables, environ),
        aggregator=settings_of(AggregatorSettings, "aggregator", tables, environ),
        registry=settings_of(RegistrySettings, "registry", tables, environ),
        worker=settings_of(WorkerSettings, "worker", tables, environ),
    )


async def _run(settings: SuiteSettings, tokens: Tokens, tls: Tls | None, arguments: argparse.Namespace) -> None:
    """The suite in this process."""
    from services.suite.app import Suite  # noqa: PLC0415 - loads torch: seconds after which nothing cheap is refused

    log = structlog.get_logger("suite")
    stopping = stop_requested(supervised=arguments.supervised)
    metrics = not arguments.no_metrics
    suite = Suite(settings, admin_token=tokens.admin, worker_token=tokens.worker, tls=tls, metrics=metrics)
    if not await _started(suite, stopping):
        log.info("stopping before it was ready")
        await suite.stop()
        os._exit(0)  # a thread that reads a base, of which nothing is left to end, would be waited for
    freeze()
    log.info("ready", router=str(suite.router_address), registry=str(suite.registry_address))
    await first_of(stopping, *suite.failures)
    log.info("draining")
    await suite.stop()
    if any(failure.is_set() for failure in suite.failures):
        raise HocketError(Reason.NOT_READY, "a disk or a device has failed: see the log, mend it, and start again")


async def _started(suite: Suite, stopping: asyncio.Event) -> bool:
    """Start the suite; whether that was done before it was asked to stop."""
    starting = asyncio.create_task(suite.start())
    asked = asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if starting.done():
        await starting
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


def _check_split_ports(settings: SuiteSettings, workers: int, *, tls: bool) -> None:
    """Pass if every process can have its ports: all are looked at before anything is started.

    Raises:
        HocketError: `BAD_REQUEST` if two of them are the same, or several workers would announce one address.
        OSError: One is taken.
    """
    if settings.worker.advertise and workers > 1:
        raise HocketError(
            Reason.BAD_REQUEST, "worker.advertise is one address: several workers need hosts or processes of their own"
        )
    services = (("router", settings.router), ("registry", settings.registry), ("aggregator", settings.aggregator))
    wanted = [(service, Address(table.host, table.port)) for service, table in services]
    wanted += [("worker", Address(settings.worker.host, settings.worker.port + place)) for place in range(workers)]
    addresses = [address for _, address in wanted]
    check_ports(addresses, tls=tls)
    offsets = (0, METRICS_PORT_OFFSET, PROBE_PORT_OFFSET) if tls else (0, METRICS_PORT_OFFSET)
    taken = Counter(address.port + offset for address in addresses for offset in offsets)
    if twice := [port for port, count in taken.items() if count > 1]:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"port {twice[0]} is wanted twice: router, registry, aggregator and workers (from {settings.worker.port}) "
            f"take a port each, and the one {METRICS_PORT_OFFSET} above it",
        )
    _check_free(wanted)


def _check_free(wanted: Sequence[tuple[str, Address]]) -> None:
    """Pass if nobody listens there yet: to find that out later costs the time in which a base is loaded.

    Raises:
        OSError: Somebody does, or the address is not this machine's.
    """
    for service, address in wanted:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        try:
            socket.create_server((address.host, address.port), family=family).close()
        except OSError as error:
            choice = _CHOICES.get(service, f"--set {service}.port=PORT")
            raise OSError(
                f"the {service} cannot listen on {address}, where another suite runs perhaps ({error}): stop that one, "
                f"or choose another port with {choice}"
            ) from error


def _parts(arguments: argparse.Namespace, settings: SuiteSettings) -> list[Part]:
    """The processes of a split suite, who sends work before who does it."""
    own = ["--supervised", "--log-level", arguments.log_level]
    own += ["--log-format", "text" if _for_people(arguments) else "json"]
    own += ["--config", str(arguments.config)] if arguments.config else []
    own += ["--insecure"] if arguments.insecure else []
    own += [part for assignment in arguments.set for part in ("--set", assignment)]

    def part(
        name: str,
        service: str,
        module: str,
        of: RouterSettings | AggregatorSettings | RegistrySettings | WorkerSettings,
        choices: Mapping[str, object],
    ) -> Part:
        chosen = [text for key, value in choices.items() for text in ("--set", f"{service}.{key}={value}")]
        command = (sys.executable, "-m", f"services.{module}", *own, *chosen)
        return Part(name, service, command, of.drain_notice_seconds + of.drain_grace_seconds + _END_SECONDS)

    registry = _reached(settings.registry.host, settings.registry.port)
    aggregator = _reached(settings.aggregator.host, settings.aggregator.port)
    worker = settings.worker
    return [
        part("router", "router", "router", settings.router, {"registry": registry, "aggregators": aggregator}),
        part("aggregator", "aggregator", "aggregator", settings.aggregator, {}),
        *(
            part(
                f"worker-{number}",
                "worker",
                "expert_worker",
                worker,
                {
                    "registry": registry,
                    "name": f"{worker.name or 'worker'}-{number}",
                    "port": worker.port + number - 1,
                    "data_dir": worker.data_dir / f"worker-{number}",
                    "workers_on_machine": arguments.workers,
                },
            )
            for number in range(1, arguments.workers + 1)
        ),
        part("registry", "registry", "registry", settings.registry, {}),
    ]


def _for_people(arguments: argparse.Namespace) -> bool:
    return bool(arguments.log_format == "text" or (arguments.log_format == "auto" and sys.stderr.isatty()))


def _reached(host: str, port: int) -> str:
    """Where this machine's own processes reach a listener."""
    if not port:
        raise HocketError(Reason.BAD_REQUEST, "the services find each other by their ports: none may be 0")
    everywhere = Address(host, port).is_wildcard
    return str(Address("127.0.0.1" if everywhere else host, port))


async def _supervise(parts: Sequence[Part], settings: SuiteSettings, tls: Tls | None, *, supervised: bool) -> bool:
    """The suite as processes; whether it ended because it was asked to."""
    stopping = stop_requested(supervised=supervised)
    router = _reached(settings.router.host, settings.router.port)
    registry = _reached(settings.registry.host, settings.registry.port)
    probed = _reached(settings.router.host, settings.router.port + PROBE_PORT_OFFSET) if tls else router
    saying = asyncio.create_task(_say_when_ready(probed, router, registry))
    try:
        return await Supervisor(parts).run(stopping)
    finally:
        saying.cancel()


async def _say_when_ready(probed: str, router: str, registry: str) -> None:
    async with connect_health(probed, timeout_seconds=1.0) as health:
        while True:
            try:
                if await health.check(_ROUTER_SERVICE) is Health.SERVING:
                    break
            except HocketError:
                pass
            await asyncio.sleep(_LOOK_SECONDS)
    structlog.get_logger("suite").info("ready", router=router, registry=registry)


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop; exit 2 with advice when the settings or a port forbid it, 1 when a service is lost."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    set_up_logs(arguments)
    with refusals():
        if not 1 <= arguments.workers <= _WORKERS_MAX or (arguments.workers > 1 and not arguments.split):
            raise HocketError(Reason.BAD_REQUEST, f"--workers is 1 to {_WORKERS_MAX}, and above 1 only with --split")
        if arguments.no_metrics and arguments.split:
            raise HocketError(Reason.BAD_REQUEST, "--no-metrics is for one process: leave it out, or --split")
        tables = read_settings(arguments, os.environ)
        settings, tls = _settings(tables, os.environ), open_tls(**tables.get("tls", {}))
        tokens = read_tokens(settings.registry)
        services = (("router", settings.router), ("registry", settings.registry))
        wanted = [(service, Address(table.host, table.port)) for service, table in services]
        addresses = [address for _, address in wanted]
        check_ports(addresses, tls=tls is not None)
        check_exposure(addresses, tokens, "registry", insecure=arguments.insecure)
        if not arguments.split:
            _check_free(wanted)
            uvloop.run(_run(settings, tokens, tls, arguments))
            return
        parts = _parts(arguments, settings)
        _check_split_ports(settings, arguments.workers, tls=tls is not None)
        if not asyncio.run(_supervise(parts, settings, tls, supervised=arguments.supervised)):
            sys.exit(_GIVEN_UP)


if __name__ == "__main__":
    main()
