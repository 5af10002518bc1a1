from __future__ import annotations

import asyncio
import itertools
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hocket.cli import serve
from hocket.errors import HocketError, Reason
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import ScriptedRouter, ThreadedServer, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUTER = "hocket.v1.RouterService"


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    with serving(add_RouterServiceServicer_to_server, ScriptedRouter()) as running:
        yield running


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would have replaced this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _program, arguments: commands.append(arguments))
    return commands


def settings_of(command: list[str]) -> set[str]:
    return {value for option, value in itertools.pairwise(command) if option == "--set"}


def test_health_is_0_when_everything_serves(hocket: Any, server: ThreadedServer) -> None:
    outcome = hocket("health", "--address", server.address, "--json")

    assert outcome.code == 0
    states = {"": "SERVING", ROUTER: "SERVING"}
    assert outcome.document == {"servers": [{"address": server.address, "services": states}]}
    assert "(process)" in hocket("health", "--address", server.address).out


def test_health_is_1_when_something_does_not_serve(hocket: Any, server: ThreadedServer) -> None:
    server.set_ready(ready=False)

    outcome = hocket("health", "--address", server.address, "--service", ROUTER, "--json")
    [told] = outcome.document["servers"]
    assert (outcome.code, told) == (1, {"address": server.address, "services": {ROUTER: "NOT_SERVING"}})
    assert hocket("health", "--address", server.address).code == 1


def test_health_is_2_when_nobody_answers(hocket: Any) -> None:
    outcome = hocket("health", "--address", "127.0.0.1:1", "--timeout", 1, "--json")

    [told] = outcome.document["servers"]
    assert (outcome.code, told["address"], told["error"]["reason"]) == (2, "127.0.0.1:1", "UNREACHABLE")


def test_health_asks_router_and_registry_and_the_worse_decides(hocket: Any, server: ThreadedServer) -> None:
    both = ("--router", server.address, "--registry", server.address)
    outcome = hocket("health", *both, "--json")
    assert (outcome.code, len(outcome.document["servers"])) == (0, 2)

    outcome = hocket("health", "--router", server.address, "--registry", "127.0.0.1:1")
    assert outcome.code == 2
    assert f"service at {server.address}" in outcome.out
    assert outcome.err == "UNREACHABLE nobody answers at 127.0.0.1:1\n"


@pytest.mark.parametrize(("service", "port"), [(ROUTER, 1), ("hocket.v1.RegistryService", 2)])
def test_health_asks_for_a_service_where_it_is(hocket: Any, service: str, port: int) -> None:
    outcome = hocket("health", "--service", service, "--router", "127.0.0.1:1", "--registry", "127.0.0.1:2")

    assert outcome.err == f"UNREACHABLE nobody answers at 127.0.0.1:{port}\n"


def test_health_is_3_when_the_server_does_not_know_the_service(hocket: Any, server: ThreadedServer) -> None:
    outcome = hocket("health", "--address", server.address, "--service", "nobody")

    assert outcome.code == 3
    assert "service unknown" in outcome.out


def test_health_is_3_when_the_server_refuses_the_question(hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_arguments: object, **_options: object) -> None:
        await asyncio.sleep(0)
        raise HocketError(Reason.INTERNAL, "not implemented")

    monkeypatch.setattr(serve, "_ask", refuse)

    assert hocket("health").code == 3


@pytest.mark.parametrize("as_json", [True, False])
def test_a_watch_prints_every_change_until_the_server_ends(hocket: Any, *, as_json: bool) -> None:
    with serving(add_RouterServiceServicer_to_server, ScriptedRouter()) as server:
        arguments = ["health", "--address", server.address, "--service", ROUTER, "--watch"]

        async def drain_soon() -> None:
            await asyncio.sleep(0.2)
            await server._server.drain(0)

        asyncio.run_coroutine_threadsafe(drain_soon(), server._loop)
        outcome = hocket(*arguments, *(["--json"] if as_json else []))

    assert outcome.code == 2
    if as_json:
        assert outcome.lines[:2] == [{"service": ROUTER, "state": state} for state in ("SERVING", "NOT_SERVING")]
        assert outcome.lines[2]["error"] == {
            "reason": "UNREACHABLE", "message": f"the server at {server.address} has stopped",
        }  # fmt: skip
    else:
        assert outcome.out.splitlines() == [f"{ROUTER} serving", f"{ROUTER} not serving"]


def test_a_watch_of_a_server_that_is_not_there_ends_at_once(hocket: Any) -> None:
    assert hocket("health", "--address", "127.0.0.1:1", "--watch", "--timeout", 1).code == 2


def test_up_starts_the_suite_as_it_is(hocket: Any, started: list[list[str]]) -> None:
    outcome = hocket("up")

    assert outcome.code == 0
    assert started == [[sys.executable, "-P", "-m", "services.suite", "--log-level", "info"]]


def test_up_translates_its_options_into_settings(hocket: Any, started: list[list[str]], tmp_path: Path) -> None:
    config = tmp_path / "hocket.toml"
    config.write_text("")
    hocket(
        "up", "--config", config, "--data", "d", "--trust", "t", "--host", "0.0.0.0", "--router-port", 6001,  # noqa: S104 - only parsed
        "--registry-port", 6002, "--device", "cpu", "--insecure", "--allow-unsigned", "--log-level", "debug",
        "--set", "worker.queue_max=3",
    )  # fmt: skip
    [command] = started

    assert command[: command.index("--set")] == [
        sys.executable, "-P", "-m", "services.suite", "--log-level", "debug", "--config", str(config), "--insecure",
    ]  # fmt: skip
    assert settings_of(command) == {
        "router.data_dir=d", "registry.data_dir=d", "worker.data_dir=d", "worker.bases_dir=d/bases",
        "registry.trust_dir=t", "worker.trust_dir=t",
        "router.host=0.0.0.0", "router.port=6001", "registry.port=6002", "worker.device=cpu",
        "registry.allow_unsigned=True", "worker.allow_unsigned=True", "worker.queue_max=3",
    }  # fmt: skip


def test_up_says_what_has_to_be_installed(hocket: Any, monkeypatch: pytest.MonkeyPatch, started: Any) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "torch" else name)
    outcome = hocket("up")

    assert outcome.code == 2
    assert "a suite needs torch as well: pip install -e '.[all]'" in outcome.err
    assert started == []
