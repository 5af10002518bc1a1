"""`hocket experts`: the packages of a registry, and the workers that hold them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import describe, output, servers
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from hocket.client.blocking import RegistryClient
    from hocket.v1.package_pb2 import Package

app = typer.Typer(name="experts", help="List the packages of a registry, or show one.", no_args_is_help=True)

_MEANT_SHOWN: Final = 3
_MEANT_LIKENESS: Final = 0.8


@app.command("list")
def list_packages(
    *,
    publisher: Annotated[str, typer.Option(help="Only packages released by this publisher.", show_default=False)] = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    json: output.Json = False,
) -> None:
    """List the packages of a registry.

    $ hocket experts list --publisher acme
    """
    with servers.registry(registry) as client:
        packages = list(client.list_packages(publisher=publisher))
    if json:
        output.emit({"packages": [output.message_json(package) for package in packages]})
        return
    rows = [
        (
            describe.package_name(package),
            describe.kind_of(package.model),
            package.model.feature_count or None,
            describe.columns_of(package.model),
            describe.standing_of(package),
        )
        for package in sorted(packages, key=describe.package_name)
    ]
    empty = f"No packages released by {publisher}" if publisher else "No packages yet: `hocket publish`"
    output.print_table(("name", "kind", "features>", "answers~", "state~"), rows, empty)


@app.command()
def show(
    package: Annotated[str, typer.Argument(help="Digest or publisher/name@version.", show_default=False)],
    *,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    router: servers.Router = servers.ROUTER_ADDRESS,
    json: output.Json = False,
) -> None:
    """Show one package, and the workers that hold it in memory.

    $ hocket experts show acme/iris@1.0.0
    """
    with servers.registry(registry) as client:
        found = find_package(client, package)
    workers = _resident_workers(router, found.digest)
    if json:
        output.emit({**output.message_json(found), "resident_workers": workers})
    else:
        _print_card(found, workers)


def find_package(client: RegistryClient, package: str) -> Package:
    """One package by digest or name.

    Raises:
        HocketError: As `get_package`; of a name that is not known it says which one may be meant.
    """
    try:
        return client.get_package(package)
    except HocketError as error:
        if error.reason not in {Reason.UNKNOWN_PACKAGE, Reason.BAD_REQUEST}:
            raise
        names = [describe.release_name(release) for known in client.list_packages() for release in known.releases]
        meant = sorted(name for name in names if package in name)
        meant = meant or difflib.get_close_matches(package, names, cutoff=_MEANT_LIKENESS)
        if not meant:
            raise
        raise HocketError(
            error.reason, f"{error.message}; did you mean {' or '.join(meant[:_MEANT_SHOWN])}?"
        ) from error


def _resident_workers(router: str, digest: str) -> list[str] | None:
    """The workers that hold a package; None if the router cannot tell."""
    try:
        with servers.router(router) as client:
            members = client.get_mixture(digest).members
    except HocketError:
        return None
    return sorted({worker for member in members for worker in member.resident_workers})


def _print_card(package: Package, workers: list[str] | None) -> None:
    model = package.model
    resident = "unknown (the router cannot tell)" if workers is None else ", ".join(workers) or "none"
    output.card(
        describe.package_name(package),
        [
            ("digest", package.digest),
            ("state", describe.state_of(package.state)),
            ("releases", ", ".join(map(describe.release_name, package.releases)) or None),
            ("signed by", describe.signers_of(package)),
            ("model", describe.kind_of(model)),
            ("takes", f"{model.feature_count} features"),
            ("answers", describe.columns_of(model)),
            ("range", describe.range_text(model.output_range) if model.HasField("output_range") else None),
            ("file", f"{package.format} {model.format_version}, {output.size(package.size_bytes)}"),
            ("parameters", output.size(model.parameter_bytes)),
            ("published", package.publish_time.ToJsonString()),
            ("in memory of", resident),
        ],
    )
