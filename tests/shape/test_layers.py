"""Imports go down only, and torch stays where it belongs. Read from the sources, nothing is imported here."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("router", "aggregator", "registry", "expert_worker")

# What may import what, from the top down; a layer may import itself and anything its row names.
ALLOWED = {
    "training": {"hocket.packages", "hocket.base"},
    "services": {"hocket.client", "hocket.rpc", "hocket.telemetry", "hocket.packages", "hocket.v1", "hocket.base"},
    "hocket.cli": {"hocket.client", "hocket.rpc", "hocket.telemetry", "hocket.packages", "hocket.v1", "hocket.base"},
    "hocket.client": {"hocket.rpc", "hocket.telemetry", "hocket.v1", "hocket.base"},
    "hocket.rpc": {"hocket.telemetry", "hocket.v1", "hocket.base"},
    "hocket.packages": {"hocket.base"},
    "hocket.telemetry": set(),
    "hocket.v1": set(),
    "hocket.base": {"hocket.packages", "hocket.client", "hocket.v1"},
}
# Plain modules of the library; of these a few look upwards.
BASE_UPWARDS = {
    "hocket.authoring": {"hocket.client"},
    "hocket.composition": {"hocket.v1"},
    "hocket.credential_files": {"hocket.packages"},
    "hocket.datasets.rows": {"hocket.packages"},
    "hocket.evaluation.metrics": {"hocket.packages"},
    "hocket.evaluation.scores": {"hocket.packages"},
    "hocket.index": {"hocket.packages"},
    "hocket.installing": {"hocket.packages"},
    "hocket.keyring": {"hocket.packages"},
    "hocket.sources": {"hocket.packages"},
    "hocket.trust_folder": {"hocket.packages"},
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("hocket", "services", "training"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith("hocket.vendored"):
                found[name] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of ours, and torch, that a module imports when it runs; imports for types alone do not count."""
    tree = ast.parse(modules()[module].read_text())
    hidden = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found for name in names if (found := _known(name)) is not None)


def _known(name: str) -> str | None:
    if name.split(".", maxsplit=1)[0] == "torch":
        return "torch"
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def layer(module: str) -> str:
    top = module.partition(".")[0]
    if module == "hocket.__main__":
        return "hocket.cli"
    if top in {"services", "training"}:
        return top
    prefix = ".".join(module.split(".")[:2])
    return prefix if prefix in ALLOWED else "hocket.base"


def test_imports_go_down_only() -> None:
    wrong = [
        f"{module} -> {target}"
        for module in modules()
        for target in imports(module) - {"torch", "hocket"}
        if layer(target) != layer(module) and layer(target) not in ALLOWED[layer(module)]
    ]
    assert wrong == []


def test_the_plain_modules_of_the_library_look_up_only_where_said() -> None:
    upwards = {
        module: above
        for module in modules()
        if layer(module) == "hocket.base"
        and (above := {layer(target) for target in imports(module) - {"torch"}} - {"hocket.base"})
    }
    assert all(above <= BASE_UPWARDS.get(module, set()) for module, above in upwards.items()), upwards


def test_services_never_import_each_other() -> None:
    wrong = [
        f"{module} -> {target}"
        for service in SERVICES
        for module in modules()
        if module.startswith(f"services.{service}.")
        for target in imports(module)
        if target.startswith("services.") and not target.startswith(f"services.{service}")
    ]
    assert wrong == []


def test_the_library_never_imports_a_service() -> None:
    wrong = [m for m in modules() if m.startswith("hocket") and any(t.startswith("services") for t in imports(m))]
    assert wrong == []


def test_torch_is_named_where_experts_compute_and_where_they_are_made() -> None:
    folders = {".".join(module.split(".")[:2]) for module in modules() if "torch" in imports(module)}
    assert {"training" if folder.startswith("training") else folder for folder in folders} == {
        "services.expert_worker",
        "training",
    }


def test_nothing_that_serves_imports_training() -> None:
    wrong = [m for m in modules() if layer(m) != "training" and any(layer(t) == "training" for t in imports(m))]
    assert wrong == []


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for target in imports(module) - {"torch", module}:
            if target in modules():
                visit(target, (*path, module))
        done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("forbidden", ["pickle", "marshal", "shelve", "joblib", "dill", "torch.load", "yaml"])
def test_no_process_that_serves_can_run_what_data_names(forbidden: str) -> None:
    wrong = [
        module
        for module, path in modules().items()
        if layer(module) != "training"
        and any(
            (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == forbidden for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and node.module == forbidden)
            or (isinstance(node, ast.Attribute) and ast.unparse(node) == forbidden)
            or (isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "__import__"})
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    ["services.router.app", "services.aggregator.app", "services.registry.app", "hocket.cli.main", "hocket.client"],
)
def test_it_works_with_torch_unimportable(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("module", ["services.router.app", "services.aggregator.app"])
def test_router_and_aggregator_reach_no_package_reader(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name.startswith('hocket.packages') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_client_may_live_beside_another_health_library() -> None:
    code = "import sys, hocket.client.blocking; sys.exit(any('health_pb2' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
