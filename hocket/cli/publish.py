"""Verbs that change the packages of a registry: publish, yank, uninstall, revoke-key."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import describe, files, names, output, servers
from hocket.cli.experts import dependents, find_packages
from hocket.cli.progress import progress_of
from hocket.client.calls import GRPC_STATUS
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.v1.package_pb2 import TRUST_STATE_YANKED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hocket.client.blocking import RegistryClient
    from hocket.v1.package_pb2 import Package
    from hocket.v1.registry_pb2 import PublishPackageResponse

app = typer.Typer()

_INTERRUPTED: Final = 130

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Package files.", show_default=False)]
Explanation = Annotated[
    str, typer.Option(metavar="TEXT", help="Why, for people; the registry keeps and logs it.", show_default=False)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether this is meant.")]


@app.command()
def publish(
    paths: Files,
    *,
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    json: output.Json = False,
) -> None:
    """Put package files into a registry.

    The release of each is taken from FILE.release.json beside it, as
    `hocket sign` writes it. Publishing the same again changes nothing.

    $ hocket publish low.apr sql.expert
    $ hocket publish *.apr --registry registry.example:50052 --token-file admin.token
    """
    with servers.registry(registry, token_file) as client:
        for place, path in enumerate(paths):
            with _blame(path, paths[place + 1 :]):
                data = files.read_package(path)
                release = next(iter(files.read_releases(path)), b"")
                with progress_of(path.name, shown=not json) as on_progress:
                    response = client.publish(data, release, on_progress=on_progress)
            if json:
                output.emit({"file": str(path), **output.message_json(response)})
            else:
                output.say(_published(path, response))


@app.command()
def yank(
    package: Annotated[str, typer.Argument(help="Digest or [PUBLISHER/]NAME[@VERSION].", show_default=False)],
    *,
    explanation: Explanation = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    yes: Yes = False,
    json: output.Json = False,
) -> None:
    """Withdraw a package for good.

    No new answer uses it, and workers drop it. There is no way back: the
    same bytes cannot be published again. A terminal asks whether that is
    meant; scripts say --yes. All versions of a name go by `uninstall`.

    $ hocket yank sql@0.2.1
    $ hocket yank acme/iris@1.0.0 --explanation "trained on the wrong labels"
    """
    with servers.registry(registry, token_file) as client:
        digest, meant = _one(client, package)
        _ask(f"Withdraw {meant} for good?", yes=yes)
        gone = client.yank(digest, explanation)
    if json:
        output.emit(output.message_json(gone))
    else:
        named = f"{describe.all_names(gone)} is withdrawn ({digest})"
        output.say(named if gone.releases else f"{digest} is withdrawn")


@app.command()
def uninstall(
    written: Annotated[
        list[str],
        typer.Argument(metavar="NAME[@VERSION]...", help="What to withdraw; of a bare name all versions."),
    ],
    *,
    explanation: Explanation = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    yes: Yes = False,
    json: output.Json = False,
) -> None:
    """Withdraw packages for good, by name.

    Yanks every release of that name, or of one version. The publisher may
    be left out when only one has such a name, and so may `expert-` at its
    beginning. A terminal shows what would go and asks whether that is
    meant; scripts say --yes.

    $ hocket uninstall sql@0.2.1
    $ hocket uninstall acme/expert-sql --explanation "replaced by expert-postgres"
    """
    with servers.registry(registry, token_file) as client:
        packages = list(client.list_packages())
        found = {package.digest: package for name in written for package, _ in names.releases(name, packages)}
        going = {digest: package for digest, package in found.items() if package.state != TRUST_STATE_YANKED}
        if not going and not json:
            output.say(f"{', '.join(written)}: withdrawn already")
        if going:
            _show_loss(going, packages)
            _ask(f"Withdraw {'this package' if len(going) == 1 else 'these packages'} for good?", yes=yes)
        for digest, package in going.items():
            gone = client.yank(digest, explanation)
            if json:
                output.emit(output.message_json(gone))
            else:
                output.say(f"{describe.all_names(package)} is withdrawn ({digest})")


@app.command("revoke-key")
def revoke_key(
    key: files.KeyName,
    *,
    explanation: Explanation = "",
    registry: servers.Registry = servers.REGISTRY_ADDRESS,
    token_file: servers.TokenFile = None,
    yes: Yes = False,
    json: output.Json = False,
) -> None:
    """Withdraw everything a key has signed, for good.

    For a key that is lost or stolen. What other keys have signed as well
    goes on serving. A terminal asks whether that is meant; scripts say
    --yes. The registry and its workers know it then, trust folders do not:
    remove the key there, too.

    $ hocket revoke-key ed25519:207a... --explanation "laptop stolen"
    """
    with servers.registry(registry, token_file) as client:
        key_id = files.find_key_id(key, lambda: _signers(client.list_packages()), "the packages of the registry")
        _ask(f"Withdraw everything that rests on key {key_id} for good?", yes=yes)
        response = client.revoke_key(key_id, explanation)
    if json:
        output.emit(output.message_json(response))
        return
    output.say(f"Key {response.key_id} is revoked")
    for digest in response.withdrawn_digests:
        output.say(f"  {digest} has no other proof and is withdrawn")
    output.say("Trust folders still list it where you have trusted it: remove it there, too:")
    output.say(f"  hocket trust remove {response.key_id}")


def _one(client: RegistryClient, written: str) -> tuple[str, str]:
    """Digest and name of the only package that is meant."""
    if is_digest(written):
        return written, written
    found = find_packages(client, written)
    if len(found) > 1:
        versions = ", ".join(map(describe.all_names, found))
        raise HocketError(
            Reason.BAD_REQUEST,
            f"several packages are called {written}: {versions}; say which, or `hocket uninstall` all",
        )
    return found[0].digest, describe.all_names(found[0])


def _show_loss(going: Mapping[str, Package], packages: Sequence[Package]) -> None:
    """Say what would go, and which experts would miss it."""
    for digest, package in going.items():
        output.say(f"{describe.all_names(package)}, {digest}", stderr=True)
    for needs in dependents(packages, going.keys()):
        output.say(f"warning: {needs}, of which nothing else is left", stderr=True)


def _published(path: Path, response: PublishPackageResponse) -> str:
    package = response.package
    names = ", ".join(f"{release.publisher}/{release.name}@{release.version}" for release in package.releases)
    done = "published" if response.created else "was already there"
    if response.healed:
        done += ", and its damaged copy is replaced"
    unsigned = " (UNSIGNED: only the registry's policy admits it)" if package.unsigned_by_policy else ""
    return f"{path} {done}: {names or 'addressable by digest only'}, {package.digest}{unsigned}"


@contextmanager
def _blame(path: Path, later: Sequence[Path]) -> Iterator[None]:
    """Say which file was refused, and which ones were not tried any more."""
    try:
        yield
    except HocketError as error:
        if GRPC_STATUS in error.metadata:  # the connection is to blame
            raise
        left = f" (not tried: {', '.join(map(str, later))})" if later else ""
        message = f"{path}: {error.message.removeprefix(f'{path}: ')}{left}"
        raise error.restated(message, **{output.BLAMED_FILE: str(path)}) from error


def _signers(packages: Iterable[Package]) -> set[str]:
    """The ids of all keys that have signed some of the packages."""
    found: set[str] = set()
    for package in packages:
        found.update(release.key_id for release in package.releases)
        if package.HasField("embedded_signature"):
            found.add(package.embedded_signature.key_id)
    return found


def _ask(question: str, *, yes: bool) -> None:
    """Have a person at a terminal confirm what cannot be undone; a script says so beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise HocketError(Reason.BAD_REQUEST, "this cannot be undone, and nobody is there to be asked: add --yes")
    try:
        meant = typer.confirm(question, err=True)
    except typer.Abort as error:
        raise typer.Exit(_INTERRUPTED) from error
    if not meant:
        raise HocketError(Reason.BAD_REQUEST, "nothing was changed")
