"""The manifests are valid, complete, and agree with each other and with the programs."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from hocket.rpc.program import TABLES, read_tokens, settings_of
from hocket.settings import read_tables
from services.aggregator.__main__ import PROGRAM as AGGREGATOR
from services.expert_worker.__main__ import PROGRAM as WORKER
from services.registry.__main__ import PROGRAM as REGISTRY
from services.router.__main__ import PROGRAM as ROUTER
from tests.clusters import ROOT
from tests.clusters import SERVICES as GRPC_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
OVERLAYS = [path.parent for path in sorted(FOLDER.glob("*/kustomization.yaml")) if path.parent != BASE]
OLDEST, NEWEST = "1.29", "1.37"
"""Versions of Kubernetes: native sleep, grpc probes and what else is used is stable from the first on."""
MADE_BY_THE_OPERATOR = {("Secret", "hocket-tokens"), ("ConfigMap", "hocket-trust")}
MADE_FOR_TEXTS = {("ConfigMap", "hocket-bases"), ("PersistentVolumeClaim", "hocket-models")}
PROGRAMS: dict[str, Any] = {"router": ROUTER, "aggregator": AGGREGATOR, "registry": REGISTRY, "worker": WORKER}
USER = 10001
FAREWELL_SECONDS = 3.0
NAME = "app.kubernetes.io/name"

Manifest = dict[str, Any]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifests(path: Path) -> list[Manifest]:
    return [*yaml.safe_load_all(path.read_text())]


def base() -> list[Manifest]:
    return [manifest for name in read(BASE / "kustomization.yaml")["resources"] for manifest in manifests(BASE / name)]


def built(*overlays: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send, as far as these overlays go: the base with `add` operations."""
    every = base()
    patches = [(overlay, patch) for overlay in overlays for patch in read(overlay / "kustomization.yaml")["patches"]]
    for folder, patch in patches:
        target = patch["target"]
        (manifest,) = (m for m in every if m["kind"] == target["kind"] and m["metadata"]["name"] == target["name"])
        for operation in read(folder / patch["path"]):
            assert operation["op"] == "add"
            *path, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
            place: Any = manifest
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            if isinstance(place, list):
                assert last == "-"
                place.append(operation["value"])
            else:
                place[last] = operation["value"]
    return every


ALL = base()
WORKLOADS = {m["metadata"]["name"]: m for m in ALL if m["kind"] in {"Deployment", "StatefulSet"}}


def pod(name: str) -> Any:
    return WORKLOADS[name]["spec"]["template"]["spec"]


def container(name: str) -> Any:
    (only,) = pod(name)["containers"]
    return only


def worker_of(*overlays: Path) -> Any:
    """The pod of the worker that these overlays make."""
    (worker,) = (m for m in built(*overlays) if m["metadata"]["name"] == "worker" and m["kind"] == "StatefulSet")
    return worker["spec"]["template"]["spec"]


def of_kind(kind: str) -> Iterator[Manifest]:
    return (manifest for manifest in ALL if manifest["kind"] == kind)


@pytest.mark.parametrize(
    ("every", "version"),
    [
        (ALL, OLDEST),
        (ALL, NEWEST),
        *((built(overlay), NEWEST) for overlay in OVERLAYS),
        (built(*OVERLAYS), NEWEST),
    ],
    ids=["oldest", "newest", *(overlay.name for overlay in OVERLAYS), "together"],
)
def test_every_manifest_has_the_form_that_kubernetes_demands(every: list[Manifest], version: str) -> None:
    for manifest in every:
        kubernetes_validate.validate(manifest, version, strict=True)  # an unknown kind or field is refused as well


def test_the_checker_refuses_what_is_misspelled() -> None:
    manifest = copy.deepcopy(WORKLOADS["worker"])
    manifest["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_a_kustomization_lists_the_files_beside_it(folder: Path) -> None:
    kustomization = read(folder / "kustomization.yaml")
    resources = kustomization.get("resources", ())  # a component has none
    assert bool(resources) == (kustomization["kind"] == "Kustomization")
    listed = {path for path in resources if not path.startswith("..")}
    listed |= {patch["path"] for patch in kustomization.get("patches", ())}
    listed |= {file for made in kustomization.get("configMapGenerator", ()) for file in made["files"]}
    assert listed == {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
    assert all((folder / path).resolve() == BASE for path in resources if path.startswith(".."))


def test_there_is_one_workload_per_service() -> None:
    assert {name: manifest["spec"]["replicas"] for name, manifest in WORKLOADS.items()} == {
        "router": 2,
        "aggregator": 2,
        "worker": 2,
        "registry": 1,
    }
    assert WORKLOADS["registry"]["spec"]["strategy"] == {"type": "Recreate"}


def test_what_selects_pods_finds_them() -> None:
    labels = {name: workload["spec"]["template"]["metadata"]["labels"] for name, workload in WORKLOADS.items()}
    for name, workload in WORKLOADS.items():
        assert labels[name] == workload["spec"]["selector"]["matchLabels"] == {NAME: name}
    selectors = [
        *(service["spec"]["selector"] for service in of_kind("Service")),
        *(budget["spec"]["selector"]["matchLabels"] for budget in of_kind("PodDisruptionBudget")),
        *(
            spread["labelSelector"]["matchLabels"]
            for w in WORKLOADS
            for spread in pod(w).get("topologySpreadConstraints", ())
        ),
        *_policy_selectors(),
    ]
    assert all(selector in labels.values() for selector in selectors)
    assert {service["metadata"]["name"] for service in of_kind("Service")} == set(WORKLOADS)
    assert {budget["metadata"]["name"] for budget in of_kind("PodDisruptionBudget")} == {
        "router",
        "aggregator",
        "worker",
    }


def _policy_selectors() -> Iterator[Any]:
    """The labels of pods of ours that network policies name."""
    for policy in of_kind("NetworkPolicy"):
        spec = policy["spec"]
        sides = [*spec.get("ingress", ()), *spec.get("egress", ())]
        peers = [peer for side in sides for peer in (*side.get("from", ()), *side.get("to", ()))]
        for selector in (spec["podSelector"], *(p["podSelector"] for p in peers if p.keys() == {"podSelector"})):
            if selector:
                yield selector["matchLabels"]


def test_services_reach_a_port_that_is_there() -> None:
    for service in of_kind("Service"):
        name = service["metadata"]["name"]
        (port,) = service["spec"]["ports"]
        ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
        assert port["port"] == ports[port["targetPort"]] == PROGRAMS[name].settings.__dataclass_fields__["port"].default
        assert ports["metrics"] == ports["grpc"] + 1000
        assert service["spec"].get("clusterIP") == (None if name == "registry" else "None")
        if WORKLOADS[name]["kind"] == "StatefulSet":
            assert WORKLOADS[name]["spec"]["serviceName"] == name


def test_what_a_pod_mounts_is_there() -> None:
    made = {("ConfigMap", generated["name"]) for generated in read(BASE / "kustomization.yaml")["configMapGenerator"]}
    there = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in ALL} | made | MADE_BY_THE_OPERATOR
    used = set()
    for name in WORKLOADS:
        volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
        used |= {("ConfigMap", v["configMap"]["name"]) for v in volumes.values() if "configMap" in v}
        used |= {("Secret", v["secret"]["secretName"]) for v in volumes.values() if "secret" in v}
        used |= {
            ("PersistentVolumeClaim", v["persistentVolumeClaim"]["claimName"])
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        }
        claimed = {c["metadata"]["name"] for c in WORKLOADS[name]["spec"].get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in container(name)["volumeMounts"]} == volumes.keys() | claimed
    assert used <= there
    assert made | MADE_BY_THE_OPERATOR <= used


def test_what_the_operator_makes_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    for kind, name in MADE_BY_THE_OPERATOR | MADE_FOR_TEXTS:
        how = {
            "Secret": f"create secret generic {name}",
            "ConfigMap": f"create configmap {name}",
            "PersistentVolumeClaim": f"the claim `{name}`",
        }
        assert how[kind] in guide


@pytest.mark.parametrize("name", PROGRAMS)
def test_probes_ask_what_the_program_serves(name: str) -> None:
    only = container(name)
    port = next(port["containerPort"] for port in only["ports"] if port["name"] == "grpc")
    assert only["startupProbe"]["grpc"] == only["livenessProbe"]["grpc"] == {"port": port, "service": ""}
    assert only["readinessProbe"]["grpc"] == {"port": port, "service": GRPC_NAMES[name]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_pod_can_do_more_than_it_must(name: str) -> None:
    assert pod(name)["automountServiceAccountToken"] is False
    assert pod(name)["enableServiceLinks"] is False
    allowed = pod(name)["securityContext"]
    assert (allowed["runAsNonRoot"], allowed["runAsUser"], allowed["fsGroup"]) == (True, USER, USER)
    assert allowed["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container(name)["image"] == f"hocket-{name}"
    assert container(name)["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_settings_are_good_and_the_end_has_time(name: str) -> None:
    environ = {entry["name"]: entry["value"] for entry in container(name).get("env", ()) if "value" in entry}
    environ = {
        key: value.replace("$(POD_NAME)", "worker-0").replace("$(POD_IP)", "10.0.0.1") for key, value in environ.items()
    }
    program = PROGRAMS[name]
    settings = settings_of(
        program.settings, name, read_tables(BASE / "hocket.toml", environ, TABLES), {"XDG_DATA_HOME": "/var/lib"}
    )
    assert settings.host == "0.0.0.0"  # noqa: S104 - in a pod
    assert settings.port == container(name)["ports"][0]["containerPort"]
    if name != "aggregator":
        assert settings.data_dir == Path("/var/lib/hocket")
        assert str(settings.data_dir) in {mount["mountPath"] for mount in container(name)["volumeMounts"]}
    if program.guarded:
        mounts = {mount["mountPath"] for mount in container(name)["volumeMounts"]}
        assert {str(settings.trust_dir), str(settings.admin_token_file.parent)} <= mounts
        assert {settings.admin_token_file.name, settings.worker_token_file.name} == {
            "admin_token.sha256",
            "worker_token",
        }
        with pytest.raises(Exception, match="cannot read the token file"):
            read_tokens(settings)
    if name == "worker":
        assert (settings.name, settings.advertise) == ("worker-0", "10.0.0.1:50054")
    notice = float(container(name)["lifecycle"]["preStop"]["exec"]["command"][1])
    end = notice + settings.drain_notice_seconds + settings.drain_grace_seconds + FAREWELL_SECONDS
    assert pod(name)["terminationGracePeriodSeconds"] > end


def test_addresses_in_the_settings_are_names_of_the_cluster() -> None:
    tables = tomllib.loads((BASE / "hocket.toml").read_text())
    assert tables["router"]["registry"] == tables["worker"]["registry"] == "registry:50052"
    replicas = WORKLOADS["aggregator"]["spec"]["replicas"]
    assert WORKLOADS["aggregator"]["kind"] == "StatefulSet"
    assert tables["router"]["aggregators"] == [f"aggregator-{number}.aggregator:50053" for number in range(replicas)]


def test_who_may_talk_to_whom_is_the_way_of_a_request_and_no_more() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ways = {("router", "aggregator"), ("aggregator", "worker"), ("worker", "registry"), ("router", "registry")}
    assert _ways(policies, "ingress", "from") == {(source, target) for source, target in ways}
    assert _ways(policies, "egress", "to") == {(target, source) for source, target in ways}
    assert policies["router"]["ingress"] == [{"ports": [{"port": 50051}]}]
    for name in WORKLOADS:
        (side,) = policies[name]["ingress"]
        assert side["ports"] == [{"port": container(name)["ports"][0]["containerPort"]}]


def _ways(policies: dict[str, Any], direction: str, peers: str) -> set[tuple[str, str]]:
    """Pairs of peer and pod that policies allow."""
    return {
        (peer["podSelector"]["matchLabels"][NAME], name)
        for name in WORKLOADS
        for side in policies[name].get(direction, ())
        for peer in side.get(peers, ())
        if peer.keys() == {"podSelector"}
    }


def test_the_gpu_overlay_gives_each_worker_a_gpu() -> None:
    (only,) = worker_of(FOLDER / "gpu")["containers"]
    assert only["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "HOCKET_WORKER__DEVICE", "value": "cuda:0"} in only["env"]


def test_the_text_component_gives_each_worker_the_bases_and_time_to_read_one() -> None:
    without, worker = pod("worker"), worker_of(FOLDER / "text")
    volumes = {volume["name"]: volume for volume in worker["volumes"] if volume not in without["volumes"]}
    assert {
        ("ConfigMap", volumes["bases"]["configMap"]["name"]),
        ("PersistentVolumeClaim", volumes["models"]["persistentVolumeClaim"]["claimName"]),
    } == MADE_FOR_TEXTS
    (only,), (before,) = worker["containers"], without["containers"]
    mounts = {mount["mountPath"]: mount for mount in only["volumeMounts"] if mount not in before["volumeMounts"]}
    settings = settings_of(WORKER.settings, "worker", read_tables(None, {}, TABLES), {"XDG_DATA_HOME": "/var/lib"})
    assert {path: mount["name"] for path, mount in mounts.items()} == {
        str(settings.bases_dir): "bases",
        "/models": "models",
    }
    assert all(mount["readOnly"] for mount in mounts.values())
    assert only["startupProbe"]["failureThreshold"] > before["startupProbe"]["failureThreshold"]
    assert only["resources"]["limits"]["memory"] == only["resources"]["requests"]["memory"]
