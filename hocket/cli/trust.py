"""`hocket trust`: whose signatures count. Edits the files of a trust folder, which services read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from hocket.cli import files, output
from hocket.errors import HocketError, Reason
from hocket.identity import key_text
from hocket.packages.trust import TrustedKey

app = typer.Typer(
    name="trust",
    help="""Decide whose signatures count.

    A running suite reads the folder again within seconds: what only a
    removed key has signed stops serving.
    """,
    no_args_is_help=True,
)

Time = Annotated[datetime | None, typer.Option(metavar="TIME", help="Such as 2027-01-01, in UTC.")]


@app.command()
def add(
    publisher: Annotated[str, typer.Argument(help="Whom the key speaks for, such as acme.", show_default=False)],
    *,
    key: Annotated[
        str,
        typer.Option(help="The public key, ed25519:<64 hex digits>, or a key file of your own.", show_default=False),
    ],
    names: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Names it may release, such as 'iris-*'; may be repeated.", show_default="*"
        ),
    ] = None,
    not_before: Time = None,
    not_after: Time = None,
    trust: files.Trust = None,
    json: output.Json = False,
) -> None:
    """Trust a key, or change how far it is trusted.

    $ hocket trust add acme --key ed25519:207a...
    $ hocket trust add me --key ~/.config/hocket/keys/default.key
    $ hocket trust add acme --key ed25519:207a... --names 'digits-*' --not-after 2027-01-01
    """
    trusted = TrustedKey(files.public_key(key), publisher, tuple(names or ("*",)), _utc(not_before), _utc(not_after))
    folder = files.trust_folder(trust)
    folder.add_key(trusted)
    if trusted.not_after is not None and trusted.not_after <= datetime.now(UTC):
        output.say(f"warning: --not-after {_day(trusted.not_after)} is past: the key counts for nothing", stderr=True)
    if json:
        output.emit(_json(trusted))
        return
    output.say(f"{publisher} may release {', '.join(trusted.names)} with key {trusted.key_id} ({folder.path})")
    if not_before is not None or not_after is not None:
        output.say(f"It counts from: {_day(trusted.not_before)}, until: {_day(trusted.not_after)} (UTC)")
    output.say("A running suite takes that up within 5 seconds.")


@app.command("list")
def list_keys(*, trust: files.Trust = None, json: output.Json = False) -> None:
    """List the trusted keys.

    With --json each with its whole id and public key.
    """
    roots = files.read_trust(trust)
    keys = sorted(roots.keys.values(), key=lambda key: (key.publisher, key.key_id))
    if json:
        output.emit({"keys": [_json(key) for key in keys]})
        return
    rows = [
        (key.publisher, output.short(key.key_id), ", ".join(key.names), _day(key.not_before), _day(key.not_after))
        for key in keys
    ]
    output.print_table(
        ("publisher", "key id", "may release~", "from", "until"), rows, "Nobody is trusted yet: `hocket trust add`"
    )


@app.command()
def remove(
    key: files.KeyName,
    *,
    trust: files.Trust = None,
    json: output.Json = False,
) -> None:
    """Stop trusting a key: what rests on it alone stops serving.

    $ hocket trust remove ed25519:207a...
    $ hocket trust remove 9f86d081884c
    """
    folder = files.trust_folder(trust)
    key_id = files.find_key_id(key, lambda: folder.read().keys, f"{folder.path}")
    try:
        removed = folder.remove_key(key_id)
    except HocketError as error:
        if error.reason is not Reason.SIGNER_NOT_TRUSTED:
            raise
        raise HocketError(error.reason, f"{error.message}: `hocket trust list` shows those there are") from error
    if json:
        output.emit({"keys": [_json(gone) for gone in removed]})
    else:
        for gone in removed:
            output.say(f"{gone.publisher} is no longer trusted with key {gone.key_id}")


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)


def _day(time: datetime | None) -> str:
    return "always" if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _json(key: TrustedKey) -> dict[str, Any]:
    return {
        "publisher": key.publisher,
        "key": key_text(key.public_key),
        "key_id": key.key_id,
        "names": key.names,
        "not_before": None if key.not_before is None else key.not_before.isoformat(),
        "not_after": None if key.not_after is None else key.not_after.isoformat(),
    }
