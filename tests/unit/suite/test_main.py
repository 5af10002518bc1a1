"""The suite's program: stopped while it starts, and with and without metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from hocket.rpc.program import METRICS_PORT_OFFSET
from services.suite.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
SLOW = """
import asyncio, os, pathlib, time
from services.expert_worker.app import WorkerApp
from services.suite.__main__ import main
async def open_base(self):
    pathlib.Path(os.environ["STARTED"]).touch()
    await asyncio.to_thread(time.sleep, 60)
WorkerApp._open_base = open_base
main()
"""
PORTS = ("--set", "router.port=0", "--set", "registry.port=0")


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """A program that runs in this process sets up its logs for this test alone."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("end", [signal.SIGTERM, None])
def test_a_suite_that_still_starts_ends_at_once_and_in_order(tmp_path: Path, end: signal.Signals | None) -> None:
    """Although a thread reads a base, which nothing can interrupt; without a signal, by its standard input."""
    started = tmp_path / "started"
    command = [sys.executable, "-c", SLOW, "--supervised", "--log-format", "json", *PORTS]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "XDG_DATA_HOME": str(tmp_path), "STARTED": str(started)},
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if end is not None:
            process.send_signal(end)
        _, log = process.communicate(timeout=10)

    assert process.returncode == 0
    assert json.loads(log.splitlines()[-1])["event"] == "stopping before it was ready"
    assert "Traceback" not in log


@pytest.mark.parametrize("arguments", [(), ("--no-metrics",)])
def test_metrics_are_served_unless_they_are_not_wanted(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "services.suite", "--supervised", "--log-format", "json", *PORTS, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        ready = next(json.loads(line) for line in process.stderr if '"ready"' in line)
        reached = []
        for server in ("router", "registry"):
            host, _, port = ready[server].rpartition(":")
            with socket.socket() as probe:
                reached.append(probe.connect_ex((host, int(port) + METRICS_PORT_OFFSET)) == 0)
        process.communicate(timeout=20)

    assert reached == [not arguments] * 2
    assert process.returncode == 0


def test_processes_of_one_service_serve_metrics_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--split", "--no-metrics", "--set", f"worker.data_dir={tmp_path}"])
    assert ended.value.code == 2
    assert "--no-metrics is for one process" in capsys.readouterr().err
