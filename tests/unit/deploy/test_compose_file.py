"""`docker-compose.yml` and what belongs to it agree with the programs, and can be read by compose 1.29 and later."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from hocket.identity import digest_of
from hocket.rpc.program import TABLES, settings_of
from hocket.settings import read_tables, read_token
from services.aggregator.__main__ import PROGRAM as AGGREGATOR
from services.expert_worker.__main__ import PROGRAM as WORKER
from services.registry.__main__ import PROGRAM as REGISTRY
from services.router.__main__ import PROGRAM as ROUTER
from tests.clusters import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

COMPOSE: Any = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: Mapping[str, Any] = COMPOSE["services"]
PROGRAMS: dict[str, Any] = {
    "router": ROUTER,
    "aggregator": AGGREGATOR,
    "registry": REGISTRY,
    "worker-1": WORKER,
    "worker-2": WORKER,
}
FAREWELL_SECONDS = 3.0


def settings(name: str) -> Any:
    program = PROGRAMS[name]
    tables = read_tables(None, SERVICES[name].get("environment", {}), TABLES)
    return settings_of(program.settings, program.name, tables, {"XDG_DATA_HOME": "/var/lib"})


def test_both_old_and_new_compose_can_read_it() -> None:
    assert not {"name", "version"} & COMPOSE.keys()
    for service in SERVICES.values():
        for needed, condition in service.get("depends_on", {}).items():
            # One worker is enough for a router, which waits for it by itself.
            expected = "service_started" if needed.startswith("worker-") else "service_healthy"
            assert condition == {"condition": expected}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_locked_down_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert (service["init"], service["read_only"], service["restart"]) == (True, True, "unless-stopped")
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - in the container
    assert service["pids_limit"]
    assert service["mem_limit"]


@pytest.mark.parametrize("name", SERVICES)
def test_its_settings_are_good_and_its_end_has_time(name: str) -> None:
    chosen = settings(name)
    assert chosen.host == "0.0.0.0"  # noqa: S104 - in a container
    grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert grace > chosen.drain_notice_seconds + chosen.drain_grace_seconds + FAREWELL_SECONDS
    if name == "aggregator":
        return
    mounted = {volume.rsplit(":", 2)[1 if volume.endswith(":ro") else -1] for volume in SERVICES[name]["volumes"]}
    assert str(chosen.data_dir) in mounted
    if PROGRAMS[name].guarded:
        assert str(chosen.trust_dir) in mounted
        secrets = {Path("/run/secrets") / secret for secret in SERVICES[name]["secrets"]}
        assert {chosen.admin_token_file, chosen.worker_token_file} == secrets


@pytest.mark.parametrize("name", ["worker-1", "worker-2"])
def test_a_worker_reads_bases_and_models_and_changes_neither(name: str) -> None:
    volumes = SERVICES[name]["volumes"]
    assert f"${{BASES_DIR:-./bases}}:{settings(name).bases_dir}:ro" in volumes
    assert "${MODELS_DIR:-./models}:/models:ro" in volumes


def test_every_image_is_built_once() -> None:
    builds = {name: service["build"] for name, service in SERVICES.items() if "build" in service}
    assert builds.keys() == SERVICES.keys() - {"worker-2"}
    assert SERVICES["worker-2"]["image"] == SERVICES["worker-1"]["image"]
    for name, build in builds.items():
        service = PROGRAMS[name].name
        assert SERVICES[name]["image"] == f"hocket-{service}:${{IMAGE_TAG:-latest}}"
        assert (build["args"]["SERVICE"], build["args"]["PORT"]) == (service, settings(name).port)


def test_addresses_are_names_of_services() -> None:
    router = settings("router")
    assert [router.registry, *router.aggregators] == ["registry:50052", "aggregator:50053"]
    for name in ("worker-1", "worker-2"):
        worker = settings(name)
        assert (worker.registry, worker.name, worker.advertise) == ("registry:50052", name, f"{name}:50054")


def test_only_the_router_is_published_beyond_this_machine() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"router": ["${ROUTER_PORT:-50051}:50051"], "registry": ["127.0.0.1:${REGISTRY_PORT:-50052}:50052"]}
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "outside" in service["networks"]} == {"router", "registry"}


def test_data_are_nobody_elses() -> None:
    named = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    own = [name for name in named if not name.startswith("$")]
    assert sorted(own) == sorted(COMPOSE["volumes"])


def test_the_overlay_changes_the_workers_alone() -> None:
    overlay = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    assert overlay.keys() == {"worker-1", "worker-2"}
    assert overlay["worker-1"]["build"] == {"args": {"TORCH_INDEX": ""}}
    for worker in overlay.values():
        assert worker["environment"] == {
            "HOCKET_WORKER__DEVICE": "cuda:0",
            "HOCKET_WORKER__WORKERS_ON_MACHINE": "${WORKERS_PER_GPU:-2}",
        }
        (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_the_scripts_tokens_are_good_and_nobody_elses(tmp_path: Path) -> None:
    script = tmp_path / "deploy" / "prepare.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "deploy" / "prepare.sh").read_bytes())
    script.chmod(0o755)
    subprocess.run([script], check=True, env={**os.environ, "LC_ALL": "C"})
    files = {name: tmp_path / secret["file"] for name, secret in COMPOSE["secrets"].items()}
    tokens = {name: read_token(file) for name, file in files.items()}
    assert len({*tokens.values()}) == 2
    admin = read_token(tmp_path / "deploy" / "secrets" / "admin_token")
    assert tokens["admin_token_hash"] == digest_of((admin or "").encode())
    subprocess.run([script], check=True)
    assert {name: read_token(file) for name, file in files.items()} == tokens
    assert (tmp_path / "deploy" / "secrets").stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o004 for file in files.values())  # for the container's user
    mounted = [volume for service in SERVICES.values() for volume in service.get("volumes", ())]
    folders = {found[1] for volume in mounted if (found := re.match(r"\$\{[A-Z]+_DIR:-\./([a-z]+)\}:/", volume))}
    assert folders == {"trust", "bases", "models"}
    assert all((tmp_path / folder).is_dir() for folder in folders)


def test_prometheus_asks_every_process() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    assert targets == {f"{name}:{settings(name).port + 1000}" for name in SERVICES}


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = [
        line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    wanted = {source for sources in copied for source in sources} - {"hocket/__init__.py"}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert wanted == {line[1:] for line in ignore if line.startswith("!")} - {"deploy"}
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
