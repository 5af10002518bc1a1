"""`docker-compose.yml` in a copy of the repository of its own, with tokens, a trust folder and free ports."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.clusters import ROOT, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

PUBLIC_BASE_IMAGE = "docker.io/library/python:3.13-slim"
OWN_BASE_IMAGE = "hocket-base:bookworm"
OWN_BASE_PYTHON = "3.11"
KEPT = ROOT / ".tools" / "compose"
"""What took long to get and is the same in the next run."""
SERVICES = ("registry", "worker-1", "worker-2", "aggregator", "router")
BUILD_SECONDS_MAX = 1800.0
HEALTHY_SECONDS_MAX = 120.0


_COMPOSE_OF_OLD = 'docker() { if [ "$1" = compose ]; then shift; docker-compose "$@"; else command docker "$@"; fi; }\n'


def _has_plugin() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def _run(*command: str | Path, environment: Mapping[str, str], cwd: Path = ROOT, seconds: float = 120.0) -> str:
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@dataclass
class Stack:
    """One compose project.

    Attributes:
        folder: The copy of the repository; its `trust/` is the trust folder.
        environment: Of every command, `docker` and `hocket` alike.
    """

    folder: Path
    environment: dict[str, str]
    router: str
    registry: str

    @classmethod
    def in_folder(cls, folder: Path, environment: Mapping[str, str]) -> Stack:
        """A project that is not built yet."""
        for name in (
            "docker-compose.yml",
            ".dockerignore",
            "pyproject.toml",
            "constraints.txt",
            "README.md",
            "LICENSE",
        ):
            shutil.copy(ROOT / name, folder / name)
        for name in ("deploy", "hocket", "services"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "secrets", "*.whl")
            )
        router, registry = free_port(), free_port()
        return cls(
            folder,
            {
                **environment,
                "COMPOSE_PROJECT_NAME": f"hocket-test-{os.getpid()}",
                "IMAGE_TAG": f"test-{os.getpid()}",
                "ROUTER_PORT": str(router),
                "REGISTRY_PORT": str(registry),
                "XDG_CONFIG_HOME": str(folder / "config"),
                "HOCKET_ROUTER": f"127.0.0.1:{router}",
                "HOCKET_REGISTRY": f"127.0.0.1:{registry}",
            },
            f"127.0.0.1:{router}",
            f"127.0.0.1:{registry}",
        )

    def docker(self, *arguments: str | Path, seconds: float = 120.0) -> str:
        return _run("docker", *arguments, environment=self.environment, cwd=self.folder, seconds=seconds)

    @property
    def key(self) -> Path:
        """What signs everything that is published here."""
        return self.folder / "config" / "hocket" / "keys" / "default.key"

    @property
    def admin_token_file(self) -> Path:
        return self.folder / "deploy" / "secrets" / "admin_token"

    def compose(self, *arguments: str, seconds: float = 300.0) -> str:
        """The plugin where there is one, and the program of old otherwise."""
        command = ("docker", "compose") if _has_plugin() else ("docker-compose",)
        return _run(*command, *arguments, environment=self.environment, cwd=self.folder, seconds=seconds)

    def shell(self, script: str) -> str:
        """What commands print that a person would type in the folder; the first that fails ends them."""
        search = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        environment = {**self.environment, "PATH": search, "PYTHONPATH": str(ROOT)}
        preamble = "set -eu\n" + ("" if _has_plugin() else _COMPOSE_OF_OLD)
        return _run("bash", "-c", preamble + script, environment=environment, cwd=self.folder, seconds=300.0)

    def hocket(self, *arguments: str | Path) -> str:
        """What the `hocket` command prints, run outside of the containers."""
        command = (sys.executable, "-m", "hocket.cli.main", *arguments)
        environment = {**self.environment, "PYTHONPATH": str(ROOT)}
        return _run(*command, environment=environment, cwd=self.folder)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        labels = (
            f"com.docker.compose.project={self.environment['COMPOSE_PROJECT_NAME']}",
            f"com.docker.compose.service={service}",
        )
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        return self.docker("ps", "--all", "--quiet", *filters).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", self.container(service)))
        return found[0]

    def inside(self, service: str, *command: str) -> str:
        """What a command prints that runs inside of a container."""
        return self.docker("exec", self.container(service), *command)

    def crash(self, service: str) -> None:
        """End the process of a service; unlike after `docker kill`, the restart policy applies."""
        all_others = "import os, signal; os.kill(-1, signal.SIGKILL)"  # but for the container's first process
        # What runs this command ends with the container, and then has no status of its own.
        subprocess.run(
            ["docker", "exec", self.container(service), "python", "-c", all_others],
            env=self.environment,
            capture_output=True,
            check=False,
            timeout=30,
        )

    async def healthy(self, *services: str, restarts: int | None = None) -> None:
        """Return when containers are healthy, and were restarted as often as said."""
        begin = time.monotonic()
        for service in services:
            while True:
                facts = await asyncio.to_thread(self.inspect, service)
                state = facts["State"]
                restarted = restarts is None or facts["RestartCount"] >= restarts
                if restarted and state["Running"] and state["Health"]["Status"] == "healthy":
                    break
                if time.monotonic() - begin > HEALTHY_SECONDS_MAX:
                    pytest.fail(f"{service} is not healthy: {state}\n{self.compose('logs', '--tail', '50', service)}")
                await asyncio.sleep(0.2)

    def up(self) -> None:
        """Build the images, and start everything in the order in which it gets healthy."""
        self._choose_base_image()
        _run(self.folder / "deploy" / "prepare.sh", environment=self.environment, cwd=self.folder)
        self.compose("up", "--build", "--detach", seconds=BUILD_SECONDS_MAX)
        asyncio.run(self.healthy(*SERVICES))

    def down(self) -> None:
        """Remove containers, networks, volumes and images."""
        self.compose("down", "--volumes", "--remove-orphans", "--rmi", "all")

    def left(self) -> dict[str, list[str]]:
        """What of the project is still there."""
        project = f"label=com.docker.compose.project={self.environment['COMPOSE_PROJECT_NAME']}"
        return {
            "containers": self.docker("ps", "--all", "--quiet", "--filter", project).split(),
            "networks": self.docker("network", "ls", "--quiet", "--filter", project).split(),
            "volumes": self.docker("volume", "ls", "--quiet", "--filter", project).split(),
            "images": self.docker(
                "images", "--quiet", "--filter", f"reference=hocket-*:{self.environment['IMAGE_TAG']}"
            ).split(),
        }

    def _choose_base_image(self) -> None:
        """The public image if it can be had, and then the public index; otherwise one of our own, and wheels."""
        for command in (("image", "inspect"), ("pull", "--quiet")):
            pulled = subprocess.run(
                ["docker", *command, PUBLIC_BASE_IMAGE],
                env=self.environment,
                capture_output=True,
                check=False,
                timeout=600,
            )
            if pulled.returncode == 0:
                return
        KEPT.mkdir(parents=True, exist_ok=True)
        base = KEPT / "base-bookworm.tar"
        if not base.exists():
            _run(ROOT / "tests" / "compose" / "base-image.sh", base, environment=self.environment, seconds=600.0)
        self.docker("import", base, OWN_BASE_IMAGE)
        for wheel in self._wheels().glob("*.whl"):
            shutil.copy(wheel, self.folder / "deploy" / "wheels")
        self.environment |= {"BASE_IMAGE": OWN_BASE_IMAGE, "PIP_NO_INDEX": "1"}

    def _wheels(self) -> Path:
        """A folder with everything that an installation needs, got by this machine's pip."""
        asked = b"".join((self.folder / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
        wheels = KEPT / f"wheels-{hashlib.sha256(asked).hexdigest()[:16]}"
        if not wheels.exists():
            for old in KEPT.glob("wheels-*"):
                shutil.rmtree(old)
            draft = KEPT / "wheels.new"
            shutil.rmtree(draft, ignore_errors=True)
            download = (
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--only-binary=:all:"),
                *("--python-version", OWN_BASE_PYTHON, "--constraint", "constraints.txt", "--dest", draft),
            )
            index = self.environment.get("TORCH_INDEX")
            torch = ("--index-url", index) if index else ()
            for wanted in ((*torch, "torch"), ("--find-links", draft, ".[health,registry,worker]", "hatchling")):
                _run(*download, *wanted, environment=self.environment, cwd=self.folder, seconds=BUILD_SECONDS_MAX)
            draft.rename(wheels)
        return wheels
