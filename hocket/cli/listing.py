"""Verbs that look for packages in a registry: list, search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import describe, output, servers
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from hocket.v1.package_pb2 import Package

app = typer.Typer()

_SAID_CHARS: Final = 160

Publisher = Annotated[str, typer.Option(help="Only packages released by this publisher.", show_default=False)]


@app.command("list")
def list_packages(
    *, publisher: Publisher = "", registry: servers.Registry = servers.REGISTRY_ADDRESS, json: output.Json = False
) -> None:
    """List the packages of a registry.

    $ hocket list
    $ hocket list --publisher acme
    """
    with servers.registry(registry) as client:
        packages = list(client.list_packages(publisher=publisher))
    if json:
        _emit(packages)
        return
    rows = [
        (describe.package_name(package), *describe.summary_of(package), describe.standing_of(package))
        for package in sorted(packages, key=describe.package_name)
    ]
    empty = f"No packages released by {publisher}" if publisher else "No packages yet: `hocket publish`"
    output.print_table(("name", "kind", "takes", "answers~", "state~"), rows, empty)


@app.command()
def search(
    words: Annotated[list[str] | None, typer.Argument(metavar="WORDS...", show_default=False)] = None,
    *,
    capability: Annotated[
        str, typer.Option(help="Only experts that can do this, such as task:text2sql.", show_default=False)
    ] = "",
    base: Annotated[
        str, typer.Option(metavar="NAME|DIGEST", help="Only adapters for this base language model.", show_default=False)
    ] = "",
    publisher: Publisher = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    json: output.Json = False,
) -> None:
    """Search the packages of a registry.

    Finds packages in whose names, description, tags, capabilities or
    labels all of the words occur; case does not matter.

    $ hocket search sql
    $ hocket search postgres query --base Qwen3-0.6B
    $ hocket search --capability task:text2sql
    """
    text = " ".join(words or ())
    if not (text or capability or base or publisher):
        raise HocketError(Reason.BAD_REQUEST, "say what to search for; `hocket list` shows everything")
    with servers.registry(registry) as client:
        found = client.list_packages(publisher=publisher, capability=capability, base=base, text=text)
        packages = list(found)
    if json:
        _emit(packages)
        return
    rows = [
        (describe.package_name(package), describe.summary_of(package)[0], _said(package), describe.standing_of(package))
        for package in sorted(packages, key=describe.package_name)
    ]
    output.print_table(("name", "kind", "about~", "state~"), rows, "Nothing found: try fewer words, or `hocket list`")


def _emit(packages: list[Package]) -> None:
    output.emit({"packages": [output.message_json(package) for package in packages]})


def _said(package: Package) -> str:
    """What a package is about, cut to a line or two."""
    said = package.adapter.description if package.HasField("adapter") else describe.summary_of(package)[2]
    return said if len(said) <= _SAID_CHARS else f"{said[:_SAID_CHARS].rstrip()}..."
