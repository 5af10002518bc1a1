"""A suite whose services believe each other by certificates."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.client import connect_health, connect_registry
from hocket.client.health import Health
from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.server import PROBE_PORT_OFFSET
from tests import certificates
from tests.builders import floats
from tests.clusters import free_port
from tests.deployments import deployed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]
DATA = apr.write(m.LinearRegression(floats(1, 2), 0.5), created_at="0")
EVERYONE = ("router", "aggregator", "registry", "worker")


@pytest.mark.parametrize("kind", ["one process", "four servers"])
async def test_every_hop_may_ask_for_certificates(tmp_path: Path, kind: str) -> None:
    folder = certificates.make(tmp_path / "certificates", "router")
    tls = certificates.tls(folder, mutual=EVERYONE)
    async with deployed(kind, tmp_path / "data", tls) as suite:
        digest = await suite.publish(DATA)
        answer = await suite.router.answer(digest, floats([1, 1], [0, 2]))
        np.testing.assert_allclose(answer.value[:, 0], [3.5, 4.5])


@asynccontextmanager
async def process(service: str, port: int, log: Path, *settings: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A service as people start it; ended in order when the context is left."""
    arguments = [part for setting in (f"{service}.port={port}", *settings) for part in ("--set", setting)]
    with log.open("wb") as stream:
        running = await asyncio.to_thread(
            subprocess.Popen[bytes],
            [sys.executable, "-m", f"services.{service}", *arguments],
            cwd=ROOT,
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            stderr=stream,
        )
        try:
            yield running
        finally:
            running.terminate()
            assert await asyncio.to_thread(running.wait, 20) == 0


async def serves(port: int, service: str, **files: Any) -> None:
    """Return when a server says that it serves."""
    async with asyncio.timeout(20), connect_health(f"127.0.0.1:{port}", **files) as health:
        while True:
            try:
                if await health.check(service) is Health.SERVING:
                    return
            except HocketError as error:
                assert error.reason is Reason.UNREACHABLE  # noqa: PT017 - waiting
            await asyncio.sleep(0.05)


async def test_processes_speak_tls_as_their_settings_say_and_renew_it_without_a_restart(tmp_path: Path) -> None:
    ours = certificates.make(tmp_path / "ours", "registry")
    theirs = certificates.make(tmp_path / "theirs", "registry")
    files = certificates.files(ours, "registry")
    settings = [f"tls.{name}={path}" for name, path in files.items()]
    folders = [f"registry.data_dir={tmp_path}", f"registry.trust_dir={tmp_path}", "registry.allow_unsigned=true"]
    port, log = free_port(), tmp_path / "registry.log"
    async with process("registry", port, log, *settings, "tls.mutual=registry", *folders):
        await serves(port + PROBE_PORT_OFFSET, "hocket.v1.RegistryService")
        address = f"127.0.0.1:{port}"
        async with connect_registry(address, **files) as client:
            await client.publish(DATA)
            feed = client.watch()
            assert (await anext(feed)).package.digest

            before = certificates.files(certificates.make(tmp_path / "before", "registry"), "registry")
            certificates.replace(ours, theirs, "registry.pem", "registry.key", "ca.pem")
            await asyncio.sleep(1.1)

            async with connect_registry(address, **certificates.files(theirs, "registry")) as later:
                assert [package.size_bytes async for package in later.list_packages()] == [len(DATA)]
            async with connect_registry(address, **before) as stranger:
                with pytest.raises(HocketError):
                    await stranger.get_package("acme/low@1")
            assert (await anext(feed)).WhichOneof("event") == "synced", "the connection from before goes on"
            await feed.aclose()
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]
    assert "certificates replaced" in events


def test_wrong_settings_stop_the_start_with_advice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.router", "--set", f"router.data_dir={tmp_path}"]
    wrong = ["--set", "tls.certificate_file=/nowhere.pem"]
    done = subprocess.run([*command, *wrong], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "certificate_file and key_file go together" in done.stderr


async def test_an_authority_alone_is_not_enough_for_a_service(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "certificates", "router")
    with pytest.raises(HocketError, match="needs \\[tls\\] certificate_file") as caught:
        async with deployed("one process", tmp_path, certificates.tls(folder, None)):
            pass
    assert caught.value.reason is Reason.BAD_REQUEST
