"""`hocket up --split`: each service as a process of its own, as people start it."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from typing import TYPE_CHECKING

import psutil
import pytest
import structlog

from examples.publishing import Publisher, known
from examples.running import suite
from hocket.client import connect, connect_registry
from hocket.rpc.program import settings_of
from services.aggregator.__main__ import main as aggregator
from services.expert_worker.__main__ import main as worker
from services.expert_worker.settings import WorkerSettings
from services.registry.__main__ import main as registry
from services.router.__main__ import main as router
from services.suite.__main__ import main as whole
from tests.builders import apr_bytes, linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

TOKEN = "a-token-long-enough-to-count"
DATA = apr_bytes(linear(1.0, 1.0, intercept=0.0))


def parts(pid: int) -> dict[str, psutil.Process]:
    """The processes of a split suite by what they run; workers by their names."""
    found = {}
    for child in psutil.Process(pid).children():
        try:
            line = child.cmdline() if child.status() != psutil.STATUS_ZOMBIE else []  # empty for one that is just going
        except psutil.NoSuchProcess:  # it has gone
            continue
        module = next((word.removeprefix("services.") for word in line if word.startswith("services.")), None)
        if module is None:
            continue
        names = [word.partition("=")[2] for word in line if word.startswith("worker.name=")]
        found[names[-1] if module == "expert_worker" else module] = child
    return found


async def test_each_service_is_a_process_that_is_started_again_when_it_dies(tmp_path: Path) -> None:
    publisher = Publisher.trusted_in(tmp_path, "acme")
    async with suite(tmp_path, workers=2) as running:
        before = parts(running.pid)
        assert before.keys() == {"router", "aggregator", "registry", "worker-1", "worker-2"}
        async with connect_registry(running.registry) as client:
            digest = await publisher.publish(client, DATA, "sum")
        async with connect(running.router) as client:
            await known(client, digest)
            assert (await client.answer(digest, [1.0, 2.0])).value.tolist() == [[3.0]]
            before["worker-1"].kill()
            before["aggregator"].kill()
            async with asyncio.timeout(20):
                while (after := parts(running.pid)).keys() != before.keys() or any(  # noqa: ASYNC110 - other processes
                    after[name].pid == before[name].pid for name in ("worker-1", "aggregator")
                ):
                    await asyncio.sleep(0.05)
        host, port = running.router.split(":")
        with urllib.request.urlopen(f"http://{host}:{int(port) + 1000}/metrics", timeout=5) as response:  # noqa: ASYNC210 - a test's own server
            assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Predict"' in response.read().decode()
        last = [*after.values()]
    assert not any(process.is_running() for process in last)
    log = (tmp_path / "suite.log").read_text()
    draining = [line.split()[0] for line in log.splitlines() if '"draining"' in line]
    order = ["router", "aggregator", "worker", "registry"]
    assert draining == sorted(draining, key=lambda name: order.index(name.partition("-")[0]))
    assert {"router", "registry"} <= {*draining}  # what was killed may not have been up again
    assert "Traceback" not in log
    assert all(json.loads(line.partition(" | ")[2]) for line in log.splitlines() if " | {" in line)


async def test_no_process_outlives_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    async with suite(tmp_path, workers=1) as running:
        left = [*parts(running.pid).values()]
        psutil.Process(running.pid).kill()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, left, 10)
        assert (len(gone), alive) == (4, [])


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """A program that runs in this process sets up its logs for this test alone."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("main", "arguments", "expected"),
    [
        (router, ("--set", "router.prot=1"), "unknown setting router.prot"),
        (router, ("--set", "router.port=70000"), "port 70000 cannot be"),
        (router, ("--set", "router.port=65000"), "choose 1 to 64535"),
        (router, ("--set", "nonsense"), "is not table.key=value"),
        (router, ("--config", "/nowhere.toml"), "cannot read the settings"),
        (worker, ("--set", "worker.device=tpu"), "device must be auto, cpu or cuda"),
        (worker, ("--set", "worker.port=0"), "needs worker.advertise"),
        (worker, ("--set", "worker.host=0.0.0.0"), "[worker] admin_token_file and worker_token_file"),
        (registry, ("--set", "registry.host=0.0.0.0"), "[registry] admin_token_file and worker_token_file"),
        (registry, ("--set", "registry.admin_token_file=/nowhere"), "cannot read the token file"),
        (whole, ("--workers", "2"), "--workers is 1 to 64"),
        (whole, ("--split", "--set", "aggregator.port=0"), "none may be 0"),
        (whole, ("--split", "--set", "aggregator.port=50052"), "port 50052 is wanted twice"),
        (whole, ("--split", "--workers", "3", "--set", "router.port=50056"), "port 50056 is wanted twice"),
        (whole, ("--split", "--workers", "2", "--set", "worker.advertise=h:1"), "worker.advertise is one address"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_advice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Sequence[str]], None],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["--log-level", "error", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("main", "table"), [(router, "router"), (aggregator, "aggregator"), (registry, "registry")])
def test_a_taken_port_stops_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Sequence[str]], None],
    table: str,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as ended:
            main(["--log-level", "error", "--set", f"{table}.port={taken.getsockname()[1]}"])
    assert ended.value.code == 2
    assert "cannot listen" in capsys.readouterr().err


def test_the_token_files_of_the_registry_are_the_workers_as_well(tmp_path: Path) -> None:
    tables = {"registry": {"admin_token_file": "/a", "worker_token_file": "/b"}, "worker": {"worker_token_file": "/c"}}
    settings = settings_of(WorkerSettings, "worker", tables, {"XDG_DATA_HOME": str(tmp_path)})
    assert (str(settings.admin_token_file), str(settings.worker_token_file)) == ("/a", "/c")
