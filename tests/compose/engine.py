"""A Docker engine to test with: the one that runs, or one of the test's own that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 60.0
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
TRACES = (Path("/etc/docker/key.json"), Path("/opt/containerd"), Path("/run/docker"))
"""What an engine writes outside of the folders it is given."""
EMPTY_TABLES = {
    "*filter": ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]",
    "*nat": ":PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]",
}
"""The tables of the firewall that an engine writes to, as they are where nobody has written to them."""


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches an engine.

    That is the engine that answers `docker info`. Where there is none and we are root, one is started in a folder of
    its own and stopped at the end, and the firewall, forwarding and links are put back as they were.
    """
    if shutil.which("docker") is not None and _answers(dict(os.environ)):
        yield dict(os.environ)
        return
    needed = ("docker", "dockerd", "iptables-save", "iptables-restore", "ip")
    missing = [program for program in needed if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(
            "needs a Docker engine that answers `docker info`; or root, to start one of its own from Debian's packages "
            f"docker.io, docker-compose, iptables and debootstrap (missing here: {', '.join(missing) or 'root'})"
        )
    folder = Path(tempfile.mkdtemp(prefix="hocket-docker-"))
    firewall = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    forwarding, links = FORWARDING.read_text(), _links()
    traces = [trace for trace in TRACES if not trace.exists()]
    groups = _control_groups()
    process = None
    try:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/socket"}
        process = _start(folder)
        _await_answer(process, environment, folder / "log")
        yield environment
    finally:
        if process is not None:
            process.terminate()
            process.wait(STOP_SECONDS_MAX)
        for link in _links() - links:
            if link.startswith(("docker", "br-")):
                subprocess.run(["ip", "link", "delete", link], check=True)
        untouched = "".join(
            f"{table}\n{chains}\nCOMMIT\n" for table, chains in EMPTY_TABLES.items() if table not in firewall
        )
        subprocess.run(["iptables-restore"], input=firewall + untouched, text=True, check=True)
        FORWARDING.write_text(forwarding)
        for trace in (*traces, folder):
            _remove(trace)
        for group in _control_groups() - groups:
            group.rmdir()


def _control_groups() -> set[Path]:
    """Where an engine keeps those of its containers: in one place, or in one for each controller."""
    root = Path("/sys/fs/cgroup")
    return {*root.glob("docker"), *root.glob("*/docker")}


def _links() -> set[str]:
    return {link.name for link in Path("/sys/class/net").iterdir()}


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                "dockerd",
                *("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"),
                *("--host", f"unix://{folder}/socket", "--storage-driver", "overlay2", "--oom-score-adjust", "0"),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the test, which stops the engine when it is done with it
        )


def _await_answer(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    end = time.monotonic() + START_SECONDS_MAX
    while not _answers(environment):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the engine did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def _answers(environment: dict[str, str]) -> bool:
    done = subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False, timeout=30)
    return done.returncode == 0


def _remove(path: Path) -> None:
    """Remove a file or folder, unmounting what is left mounted in it."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{path}/"):
            subprocess.run(["umount", "--lazy", mount], check=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
