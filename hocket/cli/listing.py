"""Verbs that look for packages in a registry: list, search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import describe, output, servers
from hocket.errors import HocketError, Reason
from hocket.v1.package_pb2 import TRUST_STATE_KEY_REVOKED, TRUST_STATE_YANKED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hocket.v1.package_pb2 import Package

app = typer.Typer()

_SAID_CHARS: Final = 160
_WITHDRAWN: Final = frozenset({TRUST_STATE_YANKED, TRUST_STATE_KEY_REVOKED})

Publisher = Annotated[str, typer.Option(help="Only packages released by this publisher.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Show what is withdrawn as well; --json always does.")]


@app.command("list")
def list_packages(
    *,
    publisher: Publisher = "",
    every: All = False,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    json: output.Json = False,
) -> None:
    """List the packages of a registry.

    What was yanked, or lost its last key, is left out unless asked for.

    $ hocket list
    $ hocket list --publisher acme
    """
    with servers.registry(registry) as client:
        packages = list(client.list_packages(publisher=publisher))
    if json:
        _emit(packages)
        return
    empty = f"No packages released by {publisher}" if publisher else "No packages yet: `hocket publish`"
    columns = ("name", "kind", "takes", "answers~", "state~")
    _print(packages, columns, describe.summary_of, empty, every=every)


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
    every: All = False,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    json: output.Json = False,
) -> None:
    """Search the packages of a registry.

    Finds packages in whose names, publishers, description, tags,
    capabilities or labels all of the words occur; case does not matter.
    Of long descriptions the beginning counts.

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
    empty = "Nothing found: try fewer words, or `hocket list`"
    columns = ("name", "kind", "about~", "state~")
    _print(packages, columns, lambda package: (describe.summary_of(package)[0], _said(package)), empty, every=every)


def _print(
    packages: Sequence[Package],
    columns: Sequence[str],
    said: Callable[[Package], tuple[str, ...]],
    empty: str,
    *,
    every: bool,
) -> None:
    """Print a table of packages, by name and version.

    Args:
        packages: What was found.
        columns: Of the table.
        said: What stands between name and state.
        empty: The sentence if nothing was found.
        every: Whether what is withdrawn is shown.
    """
    shown = [package for package in packages if every or package.state not in _WITHDRAWN]
    rows = [
        (describe.package_name(package), *said(package), describe.standing_of(package))
        for package in sorted(shown, key=describe.by_name)
    ]
    if rows or not packages:
        output.print_table(columns, rows, empty)
    if hidden := len(packages) - len(shown):
        output.say(f"{hidden} withdrawn {'is' if hidden == 1 else 'are'} not shown: --all")


def _emit(packages: list[Package]) -> None:
    output.emit({"packages": [output.message_json(package) for package in packages]})


def _said(package: Package) -> str:
    """What a package is about, cut to a line or two."""
    said = package.adapter.description if package.HasField("adapter") else describe.summary_of(package)[2]
    return said if len(said) <= _SAID_CHARS else f"{said[:_SAID_CHARS].rstrip()}..."
