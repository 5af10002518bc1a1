"""Verbs on package files: inspect, verify, sign; and the keys to sign with."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hocket import keyring
from hocket.cli import files, output
from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, check_name, check_version, key_bytes, key_id_of, key_text
from hocket.packages import (
    Policy,
    Purpose,
    Release,
    Subject,
    apr,
    inspect_package,
    open_package,
    public_key_of,
    read_release,
    sign_release,
)

if TYPE_CHECKING:
    from hocket.packages import EmbeddedFacts, Proof, ReleaseFacts
    from hocket.packages.model import ModelFacts

app = typer.Typer()

File = Annotated[Path, typer.Argument(metavar="FILE", help="An .apr file.", show_default=False)]
Key = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="The private key.", show_default="~/.config/hocket/keys/default.key"),
]

_DEFAULT_KEY: Final = "default.key"
_TRUSTED: Final = "trusted by this trust folder"


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
    $ hocket inspect iris.apr --json | jq .signature
    """
    data = files.read_package(file)
    releases, problem = _release_beside(file)
    shown = inspect_package(data, releases, trust=files.read_trust(trust), now=datetime.now(UTC))
    facts = shown.facts if shown.facts.encrypted else apr.decode(apr.split(data), shown.facts.digest)[0]
    release = shown.releases[0] if shown.releases else problem
    if json:
        output.emit(_document(facts, shown.embedded, release))
    else:
        _print_card(file, facts, shown.embedded, release)


@app.command()
def verify(
    file: File,
    *,
    trust: files.Trust = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Accept a file that nobody you trust has signed.")
    ] = False,
    json: output.Json = False,
) -> None:
    """Check that a package file may serve, and say why.

    Opens the file as a worker would: hash, release and signature against
    the trust folder, and only then the content. Only your trust folder is
    asked: what a registry has revoked or withdrawn is not known here.

    $ hocket verify iris.apr
    """
    package = open_package(
        files.read_package(file),
        releases=files.read_releases(file),
        trust=files.read_trust(trust),
        policy=Policy(allow_unsigned=allow_unsigned),
        now=datetime.now(UTC),
    )
    if (why := package.facts.not_servable) is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"{file} is proven genuine, but cannot answer: {why}")
    proofs = package.provenance.proofs
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
    name: Annotated[str, typer.Option(help="What the package is called.")],
    version: Annotated[str, typer.Option(help="Which version of it this is.")],
    key: Key = None,
    json: output.Json = False,
) -> None:
    """Bind a name to a package file, and sign that.

    Writes the release beside the file, as FILE.release.json, from where
    `publish` and `verify` take it. The package itself is not changed.

    $ hocket sign iris.apr --publisher acme --name iris --version 1.0.0
    """
    release_name = ReleaseName(check_name(publisher, "publisher"), check_name(name), check_version(version))
    data = files.read_package(file)
    facts = inspect_package(data, now=datetime.now(UTC)).facts
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


def _release_beside(path: Path) -> tuple[tuple[bytes, ...], HocketError | None]:
    """The release beside a file if it can be read, or else what is wrong with it."""
    try:
        releases = files.read_releases(path)
        for envelope in releases:
            read_release(envelope)
    except HocketError as error:
        return (), error
    return releases, None


def _cannot_serve(data: bytes, facts: ModelFacts) -> str | None:
    if facts.encrypted:
        return "it is encrypted"
    try:
        return apr.decode(apr.split(data), facts.digest)[0].not_servable
    except HocketError as error:
        return error.message


def _document(facts: ModelFacts, embedded: EmbeddedFacts, release: ReleaseFacts | HocketError | None) -> dict[str, Any]:
    return {
        "format": facts.format,
        "digest": facts.digest,
        "size": facts.size_bytes,
        "version": facts.format_version,
        "model_type": {"id": facts.model_type_id, "name": facts.model_type},
        "layout": facts.layout,
        "compression": facts.compression,
        "flags": facts.flags,
        "encrypted": facts.encrypted,
        "signature": asdict(embedded),
        "release": None if release is None else _release_json(release),
        "model": None if facts.encrypted else _model_json(facts),
        "metadata": facts.metadata,
        "sections": [asdict(section) for section in facts.sections],
    }


def _model_json(facts: ModelFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "expert_layout": facts.expert_layout,
        "expert_count": facts.expert_count,
        "feature_count": facts.n_features,
        "column_count": facts.output_columns,
        "labels": facts.labels,
        "output_range": facts.output_range,
        "parameter_bytes": facts.parameter_bytes,
        "not_servable": facts.not_servable,
    }


def _release_json(release: ReleaseFacts | HocketError) -> dict[str, Any]:
    if isinstance(release, HocketError):
        nothing = dict.fromkeys(("publisher", "name", "version", "key_id"))
        return {**nothing, "trusted": False, "refused": release.reason}
    name = release.claim.release.name
    return {
        "publisher": name.publisher,
        "name": name.name,
        "version": name.version,
        "key_id": release.claim.key_id,
        "trusted": release.refused is None,
        "refused": release.refused,
    }


def _print_card(
    path: Path, facts: ModelFacts, embedded: EmbeddedFacts, release: ReleaseFacts | HocketError | None
) -> None:
    labels = None if facts.labels is None else ", ".join("(dropped)" if name is None else name for name in facts.labels)
    kind = facts.layout or facts.model_type
    output.card(
        facts.name or path.name,
        [
            ("file", f"{path} ({output.size(facts.size_bytes)}, {facts.format} {facts.format_version})"),
            ("digest", facts.digest),
            ("model", f"{facts.expert_count} x {facts.expert_layout} in a {kind}" if facts.expert_layout else kind),
            ("takes", None if facts.n_features is None else f"{facts.n_features} features"),
            ("answers", None if facts.encrypted else labels or "one number"),
            ("storage", f"{facts.compression}, {'encrypted' if facts.encrypted else 'in the clear'}"),
            ("flags", ", ".join(facts.flags).lower() or None),
            ("signature", _signature_text(embedded)),
            ("release", "none beside the file: `hocket sign`" if release is None else _release_text(release)),
            ("cannot serve", facts.not_servable),
            ("description", facts.metadata.get("description")),
        ],
    )


def _signature_text(embedded: EmbeddedFacts) -> str:
    if embedded.key_id is None:
        return "none in the file"
    if not embedded.verified:
        return f"DOES NOT VERIFY: these are not the bytes that key {output.short(embedded.key_id)} signed"
    return f"verifies, key {output.short(embedded.key_id)} ({_TRUSTED if embedded.trusted else 'not trusted here'})"


def _release_text(release: ReleaseFacts | HocketError) -> str:
    if isinstance(release, HocketError):
        return f"cannot be used ({release.reason}): {release.message}"
    judged = _TRUSTED if release.refused is None else f"proves nothing here: {release.refused}"
    return f"{release.claim.release.name}, key {output.short(release.claim.key_id)} ({judged})"


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
