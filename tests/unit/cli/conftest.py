from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from typer.testing import CliRunner

from hocket.cli.main import app
from hocket.telemetry.logs import configure_logs
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import ScriptedRegistry, ScriptedRouter, serving
from tests.signing import ACME_SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Standard output as JSON, line by line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> Any:
        [line] = self.lines
        return line


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Scripted servers log in this process, and not into the command's output."""
    configure_logs("critical", json=False)
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of its own for every test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", *(name for name in os.environ if name.startswith("HOCKET_"))):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def _not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that hands its process over to another program would end the tests: the program runs beside them."""

    def execv(_path: str, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)

    monkeypatch.setattr(os, "execv", execv)


@pytest.fixture
def hocket() -> Callable[..., Outcome]:
    """Runs the command line."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes commands believe that some of `<stdin>`, `<stdout>` and `<stderr>` are a terminal."""
    with CliRunner().isolation():
        stream_type = type(sys.stdin)

    def pretend(*names: str) -> None:
        monkeypatch.setattr(stream_type, "isatty", lambda stream: stream.name in names)

    return pretend


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """The file of acme's private key."""
    path = tmp_path / "acme.key"
    path.write_bytes(ACME_SEED)
    path.chmod(0o600)
    return path


@pytest.fixture
def router() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def router_address(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the scripted router, which commands find by themselves."""
    with serving(add_RouterServiceServicer_to_server, router) as server:
        monkeypatch.setenv("HOCKET_ROUTER", server.address)
        yield server.address


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedRegistry]:
    """The scripted registry, which commands find by themselves."""
    servicer = ScriptedRegistry()
    with serving(add_RegistryServiceServicer_to_server, servicer) as server:
        monkeypatch.setenv("HOCKET_REGISTRY", server.address)
        yield servicer
