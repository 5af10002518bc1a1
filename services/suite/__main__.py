"""`python -m services.suite`: read the settings, run the suite, drain at SIGTERM. `hocket up` starts this."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop

from hocket.errors import HocketError, Reason
from hocket.paths import data_folder
from hocket.rpc.server import Address, stop_requested
from hocket.settings import build, read_tables, read_token
from hocket.telemetry.logs import configure_logs
from services.aggregator.settings import AggregatorSettings
from services.expert_worker.settings import WorkerSettings
from services.registry.disk import StorageError
from services.registry.settings import RegistrySettings
from services.router.settings import RouterSettings
from services.suite.app import Suite, SuiteSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TABLES: Final = frozenset({"router", "aggregator", "registry", "worker"})
_EXIT_REFUSED: Final = 2


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hocket-suite", description="Run the four services of Hocket in one process.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="one setting, above file and environment"
    )
    parser.add_argument("--insecure", action="store_true", help="bind beyond loopback without tokens")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace, environ: Mapping[str, str]) -> SuiteSettings:
    tables = read_tables(arguments.config, environ, _TABLES)
    for assignment in arguments.set:
        path, equals, value = assignment.partition("=")
        table, dot, key = path.partition(".")
        if not (equals and dot) or table not in _TABLES:
            raise HocketError(Reason.BAD_REQUEST, f"--set {assignment!r} is not table.key=value")
        tables.setdefault(table, {})[key] = value
    data = data_folder(environ, Path.home())
    folders: dict[str, Any] = {"data_dir": data, "trust_dir": data / "trust"}
    return SuiteSettings(
        router=build(RouterSettings, {"data_dir": data, **tables.get("router", {})}, "router"),
        aggregator=build(AggregatorSettings, tables.get("aggregator", {}), "aggregator"),
        registry=build(RegistrySettings, {**folders, **tables.get("registry", {})}, "registry"),
        worker=build(WorkerSettings, {**folders, **tables.get("worker", {})}, "worker"),
    )


def _tokens(settings: SuiteSettings, *, insecure: bool) -> tuple[str | None, str | None]:
    """The admin's and the workers' token; both are needed where others than this machine can call."""
    admin, worker = read_token(settings.registry.admin_token_file), read_token(settings.registry.worker_token_file)
    addresses = [Address(table.host, table.port) for table in (settings.router, settings.registry)]
    if not (insecure or (admin and worker) or all(address.is_loopback for address in addresses)):
        raise HocketError(
            Reason.BAD_REQUEST,
            "listening beyond loopback needs [registry] admin_token_file and worker_token_file, so that not everyone "
            "may change what is served; --insecure starts without them",
        )
    return admin, worker


async def _run(settings: SuiteSettings, admin_token: str | None, worker_token: str | None) -> None:
    log = structlog.get_logger("suite")
    stopping = stop_requested()
    suite = Suite(settings, admin_token=admin_token, worker_token=worker_token)
    await suite.start()
    gc.collect()
    gc.freeze()  # what the start has built lives as long as the process: no collection needs to walk it again
    log.info("ready", router=str(suite.router_address), registry=str(suite.registry_address))
    ends = [asyncio.create_task(event.wait()) for event in (stopping, suite.failed)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    log.info("draining")
    await suite.stop()
    if suite.failed.is_set():
        raise HocketError(Reason.NOT_READY, "the disk has failed: see the log, mend it, and start again")


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop; exit 2 with advice when the settings or a port forbid it."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    configure_logs(arguments.log_level)
    try:
        settings = _settings(arguments, os.environ)
        uvloop.run(_run(settings, *_tokens(settings, insecure=arguments.insecure)))
    except (HocketError, StorageError, OSError) as error:
        message = error.message if isinstance(error, HocketError) else str(error)
        sys.stderr.write(f"hocket: {message}\n")
        sys.exit(_EXIT_REFUSED)


if __name__ == "__main__":
    main()
