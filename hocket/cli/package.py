"""Verbs on package files: inspect, verify, sign; and the keys to sign with."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket import keyring
from hocket.cli import about, files, inspection, output
from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, check_name, check_version, digest_of, key_bytes, key_id_of, key_text
from hocket.packages import (
    Policy,
    Purpose,
    Release,
    Subject,
    apr,
    check_release_name,
    expert,
    inspect_package,
    open_package,
    public_key_of,
    read_release,
    sign_release,
)
from hocket.packages.adapter import AdapterFacts
from hocket.packages.expert import gbnf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hocket.packages import PackageFacts, Proof

app = typer.Typer()

File = Annotated[Path, typer.Argument(metavar="FILE", help="An .apr or .expert file.", show_default=False)]
Key = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="The private key.", show_default="~/.config/hocket/keys/default.key"),
]

_DEFAULT_KEY: Final = "default.key"


def load_key(chosen: Path | None) -> bytes:
    """The private key to sign with: the file that was asked for, or this person's default one.

    Raises:
        HocketError: `BAD_KEY_FILE` if there is no such key, or others could read it.
    """
    return keyring.load_key(chosen or _default_key())


def _default_key() -> Path:
    return keyring.keys_folder(os.environ, Path.home()) / _DEFAULT_KEY


@app.command()
def inspect(file: File, *, trust: files.Trust = None, json: output.Json = False) -> None:
    """Show what a package file says about itself.

    Nothing is refused for want of trust, and nothing is believed: the
    card says whose signatures are there, whether they verify, and whether
    you trust them. Only a file that is damaged or cannot be read at all
    is refused. Trust is that of your trust folder: what a registry has
    revoked or withdrawn is not known here.

    $ hocket inspect iris.apr
    $ hocket inspect expert-sql.expert
    $ hocket inspect iris.apr --json | jq .signature
    """
    data = files.read_package(file)
    releases, unusable = _release_beside(file)
    now = datetime.now(UTC)
    with _either_format():
        shown = inspect_package(data, releases, trust=files.read_trust(trust), now=now)
    release = shown.releases[0] if shown.releases else unusable
    if isinstance(shown.facts, AdapterFacts):
        grammar = expert.decode(data, shown.facts.digest)[1].grammar if shown.facts.has_grammar else None
        problem = None if grammar is None else gbnf.problem_of(grammar)
        if json:
            output.emit(inspection.adapter_document(shown.facts, release, problem))
        else:
            inspection.print_adapter(file, shown.facts, release, problem)
        return
    facts = shown.facts if shown.facts.encrypted else apr.decode(apr.split(data), shown.facts.digest)[0]
    if json:
        output.emit(inspection.model_document(facts, shown.embedded, release, now))
    else:
        inspection.print_model(file, facts, shown.embedded, release)
        about.print_about(facts.metadata, now)


@app.command()
def verify(
    file: File,
    *,
    trust: files.Trust = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Accept a file that nobody you trust has signed.")
    ] = False,
    allow_expired_licences: files.AllowExpiredLicences = False,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The password of an encrypted file.", show_default=False)
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipient's private key of one.", show_default=False)
    ] = None,
    json: output.Json = False,
) -> None:
    """Check that a package file may serve, and say why.

    Opens the file as a worker would: hash, release and signature against
    the trust folder, and only then the content. Only your trust folder is
    asked: what a registry has revoked or withdrawn is not known here.
    What an .expert file needs besides, such as other experts, is for the
    registry to find.

    $ hocket verify iris.apr
    $ hocket verify iris.sealed.apr --password-file iris.password
    """
    data = files.read_package(file)
    credential = files.credential(password_file, key_file)
    releases = files.read_releases(file)
    try:
        with _either_format():
            package = open_package(
                data,
                releases=releases,
                trust=files.read_trust(trust),
                policy=Policy(allow_unsigned=allow_unsigned, allow_expired_licences=allow_expired_licences),
                now=datetime.now(UTC),
                credentials={} if credential is None else {digest_of(data): credential},
            )
    except HocketError as error:
        if error.reason is not Reason.UNSIGNED or releases:
            raise
        beside = files.release_path(file)
        raise error.restated(f"{error.message}; its release would be beside it, as {beside}, and is not") from error
    if (why := package.facts.not_servable) is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"{file} is proven genuine, but cannot answer: {why}")
    proofs = package.provenance.proofs
    for proof in proofs:
        if proof.release is not None:
            check_release_name(package.facts, proof.release)
    if json:
        output.emit({"digest": package.facts.digest, "proofs": [_proof_json(proof) for proof in proofs]})
        return
    folder = files.trust_folder(trust).path
    output.say(f"{file} may serve: {package.facts.digest}")
    output.say(f"  by the trust folder {folder}; what a registry has revoked is not known here")
    for proof in proofs:
        output.say(f"  {_proof_text(proof)}")


@app.command()
def keygen(
    path: Annotated[
        Path | None,
        typer.Argument(help="Where to put it.", show_default="~/.config/hocket/keys/default.key"),
    ] = None,
    *,
    json: output.Json = False,
) -> None:
    """Make a key to sign with.

    The private key stays in the file, readable by you alone; what you
    give to others is the public key.

    $ hocket keygen
    $ hocket keygen ~/.config/hocket/keys/acme.key
    """
    where = _default_key() if path is None else path
    if where.is_dir():
        raise HocketError(Reason.BAD_REQUEST, f"{where} is a folder: name the file that shall hold the key")
    public_key = keyring.create_key(where)
    key_id = key_id_of(key_bytes(public_key))
    if json:
        output.emit({"path": str(where), "public_key": public_key, "key_id": key_id})
        return
    output.card(f"New key in {where}", [("public key", public_key), ("key id", key_id)])
    output.say("Whoever runs a suite that shall trust it, under your publisher name (here: acme), runs:")
    output.say(f"  hocket trust add acme --key {public_key}")


@app.command()
def sign(
    file: File,
    *,
    publisher: Annotated[str, typer.Option(help="Who you are: the name of your file in trust folders.")],
    name: Annotated[
        str | None,
        typer.Option(help="What the package is called; an .expert file says so itself.", show_default=False),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(help="Which version of it this is; an .expert file says so itself.", show_default=False),
    ] = None,
    key: Key = None,
    json: output.Json = False,
) -> None:
    """Bind a name to a package file, and sign that.

    Writes the release beside the file, as FILE.release.json, from where
    `publish` and `verify` take it. The package itself is not changed. An
    .expert file is released under the name and version of its manifest.

    $ hocket sign iris.apr --publisher acme --name iris --version 1.0.0
    $ hocket sign expert-sql.expert --publisher acme
    """
    check_name(publisher, "publisher")
    data = files.read_package(file)
    with _either_format():
        facts = inspect_package(data, now=datetime.now(UTC)).facts
    release_name = _release_name(facts, publisher, name, version)
    seed = load_key(key)
    beside = files.release_path(file)
    release = Release(release_name, Subject.of(Purpose.PACKAGE, data, facts.format))
    files.write_file(beside, sign_release(release, seed))
    if (why := _cannot_serve(data, facts)) is not None:
        output.say(f"warning: {file} is signed, but cannot serve: {why}", stderr=True)
    public_key = public_key_of(seed)
    if json:
        output.emit(
            {
                "release": str(release_name),
                "digest": facts.digest,
                "key_id": key_id_of(public_key),
                "path": str(beside),
            }
        )
        return
    facts_shown = [("digest", facts.digest), ("signed by", key_text(public_key)), ("written to", beside)]
    output.card(f"{file} is {release_name}", facts_shown)


@contextmanager
def _either_format() -> Iterator[None]:
    """Say of what is no package that it is none of either format: who reads it begins with one of them."""
    try:
        yield
    except HocketError as error:
        if error.reason is not Reason.BAD_MAGIC:
            raise
        raise error.restated(f"{error.message}; nor is it an .expert file (gzip, zstd or zip)") from error


def _release_beside(path: Path) -> tuple[tuple[bytes, ...], HocketError | None]:
    """The release beside a file if it can be read, or else what is wrong with it."""
    try:
        releases = files.read_releases(path)
        for envelope in releases:
            read_release(envelope)
    except HocketError as error:
        return (), error
    return releases, None


def _release_name(facts: PackageFacts, publisher: str, name: str | None, version: str | None) -> ReleaseName:
    """What the package shall be called: as asked for, and else what its manifest says."""
    if isinstance(facts, AdapterFacts):
        name, version = name or facts.name, version or facts.version
    if name is None or version is None:
        raise HocketError(Reason.BAD_REQUEST, "an .apr file has no name and version of its own: add --name, --version")
    release_name = ReleaseName(publisher, check_name(name), check_version(version))
    check_release_name(facts, release_name)
    return release_name


def _cannot_serve(data: bytes, facts: PackageFacts) -> str | None:
    if isinstance(facts, AdapterFacts):
        return facts.not_servable
    if facts.encrypted:
        return facts.not_servable
    try:
        return apr.decode(apr.split(data), facts.digest)[0].not_servable
    except HocketError as error:
        return error.message


def _proof_json(proof: Proof) -> dict[str, Any]:
    release = None if proof.release is None else str(proof.release)
    return {"kind": proof.kind, "key_id": proof.key_id, "publisher": proof.publisher, "release": release}


def _proof_text(proof: Proof) -> str:
    match proof.kind:
        case "release":
            return f"released as {proof.release} by key {proof.key_id} of {proof.publisher}"
        case "embedded":
            return f"signed inside the file by key {proof.key_id} of {proof.publisher}"
        case "policy":
            return "nobody vouches for it: only --allow-unsigned accepts it"
