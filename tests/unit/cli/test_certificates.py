from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from hocket.rpc import server as server_module
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests import certificates
from tests.fakes import ScriptedRegistry, ScriptedRouter, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUTER = "hocket.v1.RouterService"
MIXTURE = 'name = "digits"\n[[members]]\nexpert = "sha256:' + "1" * 64 + '"\n[gate]\nkind = "fixed"\nweights = [1]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.make(tmp_path_factory.mktemp("certificates"), "router")


@pytest.fixture(autouse=True)
def servers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A router and a registry whose callers must show certificates."""
    tls = certificates.tls(folder, mutual=("router",))
    with (
        serving(add_RouterServiceServicer_to_server, ScriptedRouter(), tls) as router,
        serving(add_RegistryServiceServicer_to_server, ScriptedRegistry(), tls) as registry,
    ):
        monkeypatch.setenv("HOCKET_ROUTER", router.address)
        monkeypatch.setenv("HOCKET_REGISTRY", registry.address)
        yield


@pytest.fixture
def options(folder: Path) -> list[str]:
    files = certificates.files(folder)
    return [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", str(path))]


VERBS = [
    ("predict", "digits", "--row", "1,2"),
    ("route", "digits", "--row", "1,2"),
    ("mixtures", "list"),
    ("list",),
    ("health",),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_verb_connects_with_the_certificates_of_the_command_line(
    hocket: Any, options: list[str], verb: tuple[str, ...]
) -> None:
    assert hocket(*options, *verb).code == 0


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_verb_without_them_is_refused_with_advice_in_options(hocket: Any, verb: tuple[str, ...]) -> None:
    outcome = hocket(*verb)
    assert outcome.code == 2
    assert "no secure connection to 127.0.0.1:" in outcome.err
    assert "name its authority in --ca-file" in outcome.err


def test_a_mixture_is_put_with_them(hocket: Any, options: list[str], home: Path) -> None:
    (home / "digits.toml").write_text(MIXTURE)
    put = ("mixtures", "put", home / "digits.toml", "--unsigned")
    assert "no secure connection" in hocket(*put).err
    assert hocket(*options, *put).code == 0


def test_the_environment_names_them_too(hocket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in certificates.files(folder).items():
        monkeypatch.setenv(f"HOCKET_{name.upper()}", str(path))
    assert hocket("health").code == 0


def test_they_are_asked_for_once_more_by_the_next_command(hocket: Any, options: list[str]) -> None:
    assert hocket(*options, "health").code == 0
    assert hocket("health").code == 2


def test_a_program_reads_why_there_is_no_secure_connection(hocket: Any) -> None:
    error = hocket("mixtures", "list", "--json").document["error"]
    assert error["reason"] == "UNREACHABLE"
    assert "--ca-file" in error["message"]


def test_a_file_that_cannot_be_used_is_named(hocket: Any, home: Path) -> None:
    outcome = hocket("--ca-file", home / "nowhere.pem", "health")
    assert outcome.code == 3
    assert "cannot read" in outcome.err


def test_a_watch_goes_on_when_its_connection_has_become_old(hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"grpc.max_connection_age_ms": 50, "grpc.max_connection_age_grace_ms": 50}
    monkeypatch.setattr(server_module, "_OPTIONS", tuple({**dict(server_module._OPTIONS), **short}.items()))
    with serving(add_RouterServiceServicer_to_server, ScriptedRouter()) as server:

        async def drain_later() -> None:
            await asyncio.sleep(0.6)
            await server._server.drain(0)

        asyncio.run_coroutine_threadsafe(drain_later(), server._loop)
        outcome = hocket("health", "--address", server.address, "--service", ROUTER, "--watch", "--json")

    *changes, last = [json.loads(line) for line in outcome.out.splitlines()]
    assert changes in (
        [{"service": ROUTER, "state": "SERVING"}],
        [{"service": ROUTER, "state": state} for state in ("SERVING", "NOT_SERVING")],
    )
    assert "has stopped" in last["error"]["message"]
