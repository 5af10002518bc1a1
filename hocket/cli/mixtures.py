"""`hocket mixtures`: what clients can ask, and how it is put together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hocket import client
from hocket.authoring import read_draft, resolve
from hocket.cli import certificates, describe, output, servers
from hocket.cli.package import Key, load_key
from hocket.cli.progress import progress_of
from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, check_name, check_version
from hocket.packages import Purpose, Release, Subject, sign_release

if TYPE_CHECKING:
    from hocket.mixtures import MixtureRecord
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.router_pb2 import GetMixtureResponse

Toml = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The mixture.", show_default=False)]

app = typer.Typer(name="mixtures", help="List, show, put and delete mixtures.", no_args_is_help=True)


@app.command("list")
def list_mixtures(*, router: servers.Router = servers.ROUTER_ADDRESS, json: output.Json = False) -> None:
    """List what can be asked: mixtures, and experts on their own.

    $ hocket mixtures list
    """
    with servers.router(router) as client_of_router:
        mixtures = list(client_of_router.list_mixtures())
    if json:
        output.emit({"mixtures": [output.message_json(mixture) for mixture in mixtures]})
        return
    rows = [
        (
            mixture.name,
            output.short(mixture.digest),
            mixture.expert_count,
            mixture.feature_count,
            describe.state_of(mixture.state),
        )
        for mixture in mixtures
    ]
    output.print_table(
        ("name", "digest", "experts>", "features>", "state"), rows, "Nothing to ask yet: `hocket publish`"
    )


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Name, publisher/name@version, or digest.", show_default=False)],
    *,
    router: servers.Router = servers.ROUTER_ADDRESS,
    json: output.Json = False,
) -> None:
    """Show one mixture: its gate, its members, and who signed each.

    $ hocket mixtures show digits
    """
    with servers.router(router) as client_of_router:
        found = client_of_router.get_mixture(model)
    if json:
        output.emit(output.message_json(found))
    else:
        _print_card(found)


@app.command()
def put(
    file: Toml,
    *,
    publisher: Annotated[str, typer.Option(help="Who you are; needed unless --unsigned.", show_default=False)] = "",
    version: Annotated[str, typer.Option(help="Which version this is; the same.", show_default=False)] = "",
    key: Key = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Do not sign; few registries accept that.")] = False,
    etag: Annotated[
        str, typer.Option(metavar="DIGEST", help="Replace this version only, else fail.", show_default=False)
    ] = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    json: output.Json = False,
) -> None:
    """Sign a mixture, and put it into a registry.

    Names of members become digests here: what is signed and stored does
    not change when somebody publishes a newer version. Put it again to
    take that.

    $ hocket mixtures put digits.toml --publisher acme --version 1.0.0
    """
    draft = read_draft(file)
    release_name, seed = None, b""
    if not unsigned:
        if not (publisher and version):
            raise HocketError(
                Reason.BAD_REQUEST,
                "a mixture is signed: give --publisher and --version, or --unsigned where the registry allows that",
            )
        release_name = ReleaseName(check_name(publisher, "publisher"), check_name(draft.name), check_version(version))
        seed = load_key(key)

    async def put_it() -> Mixture:
        token = servers.read_token(token_file)
        async with client.connect_registry(registry, token, **certificates.chosen()) as client_of_registry:
            record, gate = await resolve(draft, client_of_registry)
            release = b"" if release_name is None else sign_release(_release(release_name, record), seed)
            with progress_of(f"gate of {draft.name}", shown=bool(gate) and not json) as on_progress:
                return await client_of_registry.put_mixture(
                    record.body(), release, gate, etag=etag, on_progress=on_progress
                )

    with servers.explained(registry, "registry"):
        mixture = asyncio.run(put_it())
    if json:
        output.emit(output.message_json(mixture))
    else:
        output.say(f"{mixture.name} is {mixture.digest}, revision {mixture.revision}")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="Name of the mixture.", show_default=False)],
    *,
    etag: Annotated[
        str, typer.Option(metavar="DIGEST", help="Delete this version only, else fail.", show_default=False)
    ] = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    json: output.Json = False,
) -> None:
    """Remove a mixture's name. Its members stay.

    $ hocket mixtures delete digits
    """
    with servers.registry(registry, token_file) as client_of_registry:
        revision = client_of_registry.delete_mixture(name, etag)
    if json:
        output.emit({"name": name, "revision": revision})
    else:
        output.say(f"{name} is deleted")


def _release(name: ReleaseName, record: MixtureRecord) -> Release:
    return Release(name, Subject.of(Purpose.MIXTURE, record.body(), "mixture"))


def _print_card(found: GetMixtureResponse) -> None:
    summary = found.summary
    gate = "none: one expert on its own"
    if found.gate != "none":
        gate = f"{found.gate}, {found.top_k} of the members it weighs answer a row"
    output.card(
        summary.name,
        [
            ("digest", summary.digest),
            ("state", describe.state_of(summary.state)),
            ("release", describe.release_name(found.release) if found.HasField("release") else None),
            ("gate", gate),
            ("experts", f"{summary.expert_count}, those of inner mixtures included"),
            ("capacity", f"{found.capacity_factor:g}" if found.HasField("capacity_factor") else None),
            ("takes", f"{summary.feature_count} features"),
            ("answers", describe.labels_text(found.labels)),
            ("range", describe.range_text(found.output_range) if found.HasField("output_range") else None),
        ],
    )
    names = describe.expert_names(found.members)
    rows = [
        (
            names[member.expert],
            describe.kind_of(member.package.model),
            describe.columns_of(member.package.model),
            describe.standing_of(member.package),
            ", ".join(member.resident_workers),
        )
        for member in found.members
    ]
    columns = ("expert", "kind", "answers~", "state~", "in memory of~")
    output.print_table(columns, rows, "It has no members")
