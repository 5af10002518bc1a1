"""`hocket apr`: make `.apr` packages out of trained models, and rewrite them."""

from __future__ import annotations

import json as json_format
import os
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import typer

from hocket import __version__, keyring
from hocket.cli import apr_models, files, output
from hocket.cli.package import Key, load_key
from hocket.cli.progress import spinner
from hocket.credential_files import read_password
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr, rewriting
from hocket.packages.apr.about import ModelCard, read_card
from hocket.packages.apr.encryption import Password, Recipient
from hocket.packages.apr.quantization import floats, weights_of
from hocket.packages.apr.writer import CompressionName  # noqa: TC001 - typer builds options from their types
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.model import QuantKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.packages.rewriting import Signing

app = typer.Typer(name="apr", help="Make .apr packages: convert, encrypt, quantize.", no_args_is_help=True)
app.add_typer(apr_models.app)

_INTERRUPTED: Final = 130
_RECIPIENT_KEY: Final = "recipient.key"
_DEFAULT_RECIPIENT_KEY: Final = f"~/.config/hocket/keys/{_RECIPIENT_KEY}"

File = Annotated[Path, typer.Argument(metavar="FILE", help="An .apr file.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Where the result goes.", show_default=False)]
SigningKey = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="Sign inside the result, with this private key.", show_default=False),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="The password, alone in a file that only you can read; without it you are asked.",
        show_default=False,
    ),
]
RecipientKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file", metavar="FILE", help="The recipient's private key, in place of a password.", show_default=False
    ),
]


@app.command()
def encrypt(
    file: File,
    out: Out,
    *,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The recipient, x25519:..., in place of a password: `hocket apr keygen` prints it."
        ),
    ] = None,
    password_file: PasswordFile = None,
    key: Key = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Do not sign inside: what stays clear can then be altered by anyone.")
    ] = False,
    json: output.Json = False,
) -> None:
    """Encrypt the model in a package, and sign the result.

    Whoever serves it needs the password, or the recipient's private key,
    in its own settings (worker.credentials). Its metadata stays clear,
    and says besides what others must know to route to it: layout, labels,
    widths, sizes. The signature inside is by your key.

    $ hocket apr encrypt iris.apr iris.sealed.apr --password-file iris.password
    $ hocket apr encrypt iris.apr iris.sealed.apr --to x25519:...
    """
    if to is not None and password_file is not None:
        raise HocketError(Reason.BAD_REQUEST, "give either --to or --password-file")
    if unsigned and key is not None:
        raise HocketError(Reason.BAD_REQUEST, "give either --key, to sign inside, or --unsigned")
    data = files.read_package(file)
    seed = None if unsigned else load_key(key)
    target = _password(password_file, twice=True) if to is None else Recipient.parse(to)
    signing = None if seed is None else rewriting.signing_with(seed)
    with spinner(f"encrypting {file}", shown=not json):
        written = rewriting.encrypted(data, target, signing=signing)
    mode = {"mode": "password"} if to is None else {"mode": "recipient", "recipient": to}
    _write(out, written, data, json=json, facts={"encrypted_for": mode}, shown=[("encrypted for", to or "a password")])


@app.command()
def decrypt(
    file: File,
    out: Out,
    *,
    password_file: PasswordFile = None,
    key_file: RecipientKeyFile = None,
    key: SigningKey = None,
    json: output.Json = False,
) -> None:
    """Decrypt the model in a package.

    A wrong password or key and an altered file look alike.

    $ hocket apr decrypt iris.sealed.apr iris.apr --password-file iris.password
    $ hocket apr decrypt iris.sealed.apr iris.apr --key-file ~/.config/hocket/keys/recipient.key
    """
    data = files.read_package(file)
    credential = files.credential(password_file, key_file) or _password(None, twice=False)
    with spinner(f"decrypting {file}", shown=not json):
        written = rewriting.decrypted(data, credential, signing=_signing(key))
    _write(out, written, data, json=json, publish=False)


@app.command()
def quantize(
    file: File,
    out: Out,
    *,
    kind: Annotated[QuantKind, typer.Option(help="Bits of a weight: 8, or 4.")] = QuantKind.Q8_0,
    key: SigningKey = None,
    json: output.Json = False,
) -> None:
    """Store the weights of a package in 8 or 4 bits each.

    For linear models, SVMs, k-means, nearest neighbours, mixtures and
    dense networks. The file gets smaller, and answers change a little:
    the largest change of a weight is told. Workers compute with the
    changed weights in full precision.

    $ hocket apr quantize ranker.apr ranker.q8.apr
    $ hocket apr quantize ranker.apr ranker.q4.apr --kind q4_0
    """
    data = files.read_package(file)
    with spinner(f"quantising {file}", shown=not json):
        written = rewriting.quantized(data, kind, signing=_signing(key))
        change = _largest_change(data, written)
    facts = {"kind": str(kind), "largest_change": change}
    shown = [("kind", str(kind)), ("largest change", f"{change:.3g}")]
    _write(out, written, data, json=json, facts=facts, shown=shown)


@app.command()
def compress(
    file: File,
    out: Out,
    *,
    method: Annotated[CompressionName, typer.Option(help="lz4 is unknown to older readers.")] = "zstd-max",
    key: SigningKey = None,
    json: output.Json = False,
) -> None:
    """Compress the model in a package otherwise, or not at all.

    $ hocket apr compress forest.apr forest.small.apr
    $ hocket apr compress forest.apr forest.plain.apr --method none
    """
    data = files.read_package(file)
    with spinner(f"compressing {file}", shown=not json):
        written = rewriting.compressed(data, method, signing=_signing(key))
    _write(out, written, data, json=json, facts={"compression": method}, shown=[("compression", method)])


@app.command()
def card(
    file: File,
    out: Out,
    *,
    card_file: Annotated[
        Path | None,
        typer.Option("--card", metavar="FILE", help="The card, as .toml or .json.", show_default=False),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the card away.")] = False,
    key: SigningKey = None,
    json: output.Json = False,
) -> None:
    """Put a model card into a package, in place of one that is there.

    The card needs a name and a version; model_id, created_at and
    framework_version are filled in. What else it may say, and that it may
    say more, is in docs/packages.md. `hocket inspect` shows it.

    $ hocket apr card iris.apr iris.carded.apr --card card.toml
    """
    if (card_file is None) != remove:
        raise HocketError(Reason.BAD_REQUEST, "give either --card FILE or --remove")
    data = files.read_package(file)
    new = None if card_file is None else _read_card(card_file)
    written = rewriting.with_card(data, new, signing=_signing(key))
    _write(out, written, data, json=json, facts={"card": None if new is None else new.section()})


@app.command()
def keygen(
    path: Annotated[Path | None, typer.Argument(help="Where to put it.", show_default=_DEFAULT_RECIPIENT_KEY)] = None,
    *,
    json: output.Json = False,
) -> None:
    """Make a recipient's key, to have packages encrypted for it.

    The private key stays in the file, readable by you alone, and goes to
    the workers that shall open such packages; what you give to those who
    encrypt is the public key.

    $ hocket apr keygen
    $ hocket apr keygen /run/secrets/recipient.key
    """
    where = keyring.keys_folder(os.environ, Path.home()) / _RECIPIENT_KEY if path is None else path
    public = str(keyring.create_recipient_key(where))
    if json:
        output.emit({"path": str(where), "public_key": public})
        return
    output.card(f"New recipient's key in {where}", [("public key", public)])
    output.say(f"To encrypt for it: hocket apr encrypt FILE OUT --to {public}")


def _signing(key: Path | None) -> Signing | None:
    return None if key is None else rewriting.signing_with(keyring.load_key(key))


def _password(path: Path | None, *, twice: bool) -> Password:
    """The password in a file, or what a person at the terminal types; twice, where a slip could not be noticed."""
    if path is not None:
        return read_password(path)
    if not sys.stdin.isatty():
        raise HocketError(Reason.BAD_REQUEST, "nobody is there to be asked for a password: give --password-file")
    try:
        return Password(typer.prompt("Password", hide_input=True, confirmation_prompt=twice, err=True))
    except typer.Abort as error:
        raise typer.Exit(_INTERRUPTED) from error


def _read_card(path: Path) -> ModelCard:
    """A card as its author writes it: what it does not say and the format wants is filled in."""
    data = files.read_file(path, DEFAULT_LIMITS.metadata_bytes)
    document: Any
    try:
        match path.suffix:
            case ".toml":
                document = tomllib.loads(data.decode())
            case ".json":
                document = json_format.loads(data)
            case _:
                raise HocketError(Reason.BAD_REQUEST, f"cannot tell what {path} is: name it .toml or .json")
    except (ValueError, RecursionError) as error:
        raise HocketError(Reason.BAD_REQUEST, f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(key), str) for key in ("name", "version")):
        raise HocketError(Reason.BAD_METADATA, f'a model card needs a name and a version: name = "iris" in {path}')
    filled = {
        "model_id": f"{document['name']}-{document['version']}",
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "framework_version": f"hocket {__version__}",
    }
    return read_card(filled | document)


def _largest_change(before: bytes, after: bytes) -> float:
    """Of any weight, by its storage in blocks."""
    pairs = zip(*(weights_of(apr.decode(apr.split(data), digest_of(data))[1]) for data in (before, after)), strict=True)
    return max(
        float(np.abs(floats(old) - floats(new)).max(initial=0))
        for old, new in pairs
        if old is not None and new is not None
    )


def _write(
    out: Path,
    written: bytes,
    original: bytes,
    *,
    json: bool,
    facts: Mapping[str, object] | None = None,
    shown: Sequence[tuple[str, str]] = (),
    publish: bool = True,
) -> None:
    """Write a result, and say what became of the file.

    Args:
        out: Where to.
        written: The result.
        original: What it was made of.
        json: Whether programs read what is said.
        facts: What it says besides, for programs.
        shown: The same, for people.
        publish: Whether it is meant to be published.
    """
    lost = apr.split(original).signature is not None and apr.split(written).signature is None
    files.write_file(out, written)
    digest = digest_of(written)
    if json:
        sizes = {"size_bytes": len(written), "size_bytes_before": len(original)}
        output.emit({"path": str(out), "digest": digest, **sizes, "signature_lost": lost, **(facts or {})})
        return
    if lost:
        output.say("warning: the signature inside was of other bytes, and is gone: --key makes a new one", stderr=True)
    if files.release_path(out).exists():
        output.say(f"warning: {files.release_path(out)} is no release of these bytes: sign again", stderr=True)
    size = f"{output.size(len(written))}, from {output.size(len(original))}"
    output.card(str(out), [("digest", digest), ("size", size), *shown])
    output.next_steps(*(files.publishing(out) if publish else [("hocket", "inspect", out)]))
