"""The suite as people start it: a process with settings, ports, signals and a log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from examples.publishing import Publisher
from examples.running import suite
from hocket.client import Answer, RouterClient, connect, connect_registry
from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages import model as m
from services.suite.__main__ import main
from tests.builders import floats

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DATA = apr.write(m.LinearRegression(floats(1, 1), 0.0), created_at="0")
TOKEN = "a-token-long-enough-to-count"


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """A program that runs in this process sets up its logs for this test alone."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (("--set", "router.prot=1"), {}, "unknown setting router.prot"),
        (("--set", "nonsense"), {}, "is not table.key=value"),
        (("--set", "worker.device=tpu"), {}, "device must be auto, cpu or cuda"),
        ((), {"HOCKET_TYPO__PORT": "1"}, "unknown settings table"),
        (("--config", "/nowhere.toml"), {}, "cannot read the settings"),
        (("--set", "router.host=0.0.0.0"), {}, "listening beyond loopback needs"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_advice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    environment: dict[str, str],
    expected: str,
) -> None:
    for name, value in {"XDG_DATA_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["--log-level", "error", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_taken_port_stops_the_start(tmp_path: Path) -> None:
    """As a process: nothing is left behind, and no traceback is shown."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "services.suite", "--set", f"router.port={taken.getsockname()[1]}"]
        done = subprocess.run(
            [*command, "--set", "registry.port=0"],
            cwd=ROOT,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert "the router cannot listen" in done.stderr
    assert "--router-port PORT" in done.stderr
    assert "Traceback" not in done.stderr
    assert "opening" not in done.stderr, "nothing is loaded for nothing"


def test_whether_a_port_is_free_is_known_before_torch_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, services.suite.__main__; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


async def test_tokens_guard_what_changes_things_and_sigterm_ends_in_order(tmp_path: Path) -> None:
    admin, worker = tmp_path / "admin.token", tmp_path / "worker.token"
    admin.write_text(TOKEN)
    worker.write_text(TOKEN[::-1])
    async with suite(
        tmp_path,
        f"registry.admin_token_file={admin}",
        f"registry.worker_token_file={worker}",
        "registry.allow_unsigned=true",
        "worker.allow_unsigned=true",
    ) as running:
        for token, reason in ((None, Reason.TOKEN_REQUIRED), (TOKEN[::-1], Reason.TOKEN_NOT_ALLOWED)):
            async with connect_registry(running.registry, token) as registry:
                with pytest.raises(HocketError) as caught:
                    await registry.publish(DATA)
                assert caught.value.reason is reason
        async with connect_registry(running.registry, TOKEN) as registry, connect(running.router) as router:
            package = (await registry.publish(DATA)).package
            assert package.unsigned_by_policy
            answer = await _answer(router, package.digest)
            assert "UNSIGNED_EXPERT" in answer.finish.degradations
        with urllib.request.urlopen(f"http://{_metrics(running.router)}/metrics", timeout=5) as response:  # noqa: ASYNC210 - a test's own server
            text = response.read().decode()
        assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Predict"' in text
        assert 'hocket_unsigned_uses_total{service="router"} 1.0' in text
        assert 'hocket_refusals_total{grpc_method="PublishPackage"' in text
    log = (tmp_path / "suite.log").read_text()
    assert "allow_unsigned" in log
    assert "draining" in log
    assert "Traceback" not in log


def _metrics(address: str) -> str:
    host, port = address.split(":")
    return f"{host}:{int(port) + 1000}"


async def _answer(router: RouterClient, digest: str) -> Answer:
    async with asyncio.timeout(5):
        while True:
            try:
                return await router.answer(digest, [1.0, 2.0])
            except HocketError as error:
                if error.reason is not Reason.UNKNOWN_MODEL:
                    raise
            await asyncio.sleep(0.01)


async def test_it_drains_at_sigterm_and_keeps_what_was_published(tmp_path: Path) -> None:
    publisher = Publisher.trusted_in(tmp_path, "acme")
    async with suite(tmp_path) as running, connect_registry(running.registry) as registry:
        digest = await publisher.publish(registry, DATA, "sum")
    async with suite(tmp_path) as running, connect(running.router) as router:
        await _answer(router, digest)
        assert (await router.answer("acme/sum@1.0.0", [1.0, 2.0])).value.tolist() == [[3.0]]


def test_hocket_up_starts_it_and_ends_with_status_0(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1] % 40000 + 20000) for probe in (one, two)]
    command = [sys.executable, "-m", "hocket.cli.main", "up", "--router-port", ports[0], "--registry-port", ports[1]]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if '"ready"' in line:
                assert json.loads(line)["router"] == f"127.0.0.1:{ports[0]}"
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
