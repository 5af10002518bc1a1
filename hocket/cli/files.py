"""The files that commands read: packages, the releases beside them, and the trust folder."""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket import paths
from hocket.cli import output
from hocket.credential_files import read_password, read_recipient_key
from hocket.errors import HocketError, Reason
from hocket.files import write_whole
from hocket.identity import key_bytes, key_id_of
from hocket.keyring import load_key
from hocket.packages.keys import public_key_of
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.release import ENVELOPE_SIZE_BYTES_MAX, RELEASE_SUFFIX
from hocket.telemetry.logs import configure_logs
from hocket.trust_folder import TrustFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hocket.packages import Credential, TrustRoots

Trust = Annotated[
    Path | None,
    typer.Option("--trust", metavar="DIR", help="The trust folder.", show_default="~/.local/share/hocket/trust"),
]
"""Option: the trust folder."""

AllowExpiredLicences = Annotated[
    bool, typer.Option("--allow-expired-licences", help="Let pass packages whose licence has ended.")
]
"""Option: packages whose licence has ended."""

KeyName = Annotated[
    str,
    typer.Argument(
        metavar="KEY",
        help="The public key, its id or the first 12 digits or more of that, or a key file of your own.",
        show_default=False,
    ),
]
"""Argument: a key that is known already."""

_KEY_ID: Final = re.compile(r"[0-9a-f]{12,64}")
_KEY_ID_DIGITS: Final = 64


def standard_input() -> TextIOWrapper:
    """Standard input.

    Raises:
        HocketError: `BAD_REQUEST` if the command was started without one.
    """
    if not isinstance(sys.stdin, TextIOWrapper):
        raise HocketError(Reason.BAD_REQUEST, "standard input is closed: write to it, or `< /dev/null` for nothing")
    return sys.stdin


def read_file(path: Path, bytes_max: int) -> bytes:
    """A whole file.

    Raises:
        HocketError: `BAD_REQUEST` if it cannot be read, `TOO_LARGE` if it has more than `bytes_max` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read {path}: {error.strerror}") from error
    if len(data) > bytes_max:
        raise HocketError(Reason.TOO_LARGE, f"{path} is larger than {output.size(bytes_max)}")
    return data


def read_package(path: Path) -> bytes:
    """The bytes of a package file. Raises as `read_file`."""
    return read_file(path, DEFAULT_LIMITS.package_bytes)


def release_path(path: Path) -> Path:
    """Where the release of a package file lies: beside it."""
    return path.with_name(path.name + RELEASE_SUFFIX)


def publishing(path: Path, name: str = "NAME") -> list[tuple[object, ...]]:
    """The commands that sign a package file and publish it, with capitals where a person has to say what."""
    chosen = ("--publisher", "YOU", "--name", name, "--version", "VERSION")
    return [("hocket", "sign", path, *chosen), ("hocket", "publish", path)]


def read_releases(path: Path) -> tuple[bytes, ...]:
    """The release beside a package file, if there is one. Raises as `read_file`."""
    beside = release_path(path)
    return (read_file(beside, ENVELOPE_SIZE_BYTES_MAX),) if beside.exists() else ()


def credential(password_file: Path | None, key_file: Path | None) -> Credential | None:
    """What opens an encrypted package, from the one file that was named; None if neither was.

    Raises:
        HocketError: `BAD_REQUEST` if both were, `BAD_KEY_FILE` if the file holds none, or others could read it.
    """
    if password_file is not None and key_file is not None:
        raise HocketError(Reason.BAD_REQUEST, "give either --password-file or --key-file")
    if password_file is not None:
        return read_password(password_file)
    return None if key_file is None else read_recipient_key(key_file)


def public_key(text: str) -> bytes:
    """The raw public key behind `ed25519:<hex>`, or of the private key in a file.

    Raises:
        HocketError: `BAD_REQUEST` if it is neither, `BAD_KEY_FILE` if the file holds no private key.
    """
    if text.startswith("ed25519:"):
        return key_bytes(text)
    return public_key_of(load_key(Path(text).expanduser()))


def find_key_id(text: str, known: Callable[[], Iterable[str]], where: str) -> str:
    """The id of the key that is meant by `KeyName`.

    Args:
        text: What was written.
        known: The key ids among which the beginning of one must tell which; asked only then.
        where: What those are, for people.

    Raises:
        HocketError: `SIGNER_NOT_TRUSTED` if no key there begins so, `BAD_REQUEST` if several do, or the text is none
            of these; `BAD_KEY_FILE` if it is a file without a private key.
    """
    if text.startswith("ed25519:"):
        return key_id_of(key_bytes(text))
    if _KEY_ID.fullmatch(text) is None:
        if not Path(text).expanduser().exists():
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{text!r} is neither a public key (ed25519:<64 hex digits>), nor a key id or the first 12 digits or "
                "more of one, nor a key file",
            )
        return key_id_of(public_key(text))
    if len(text) == _KEY_ID_DIGITS:
        return text
    found = sorted({key_id for key_id in known() if key_id.startswith(text)})
    if not found:
        raise HocketError(Reason.SIGNER_NOT_TRUSTED, f"no key id in {where} begins with {text}: give the whole key")
    if len(found) > 1:
        raise HocketError(Reason.BAD_REQUEST, f"several key ids begin with {text}: {', '.join(found)}")
    return found[0]


def write_file(path: Path, data: bytes) -> None:
    """Write a file at once: readers find the old bytes or the new ones.

    Raises:
        HocketError: `BAD_REQUEST` if it cannot be written.
    """
    try:
        write_whole(path, data)
    except (OSError, ValueError) as error:  # the latter for a name with a NUL
        raise HocketError(Reason.BAD_REQUEST, f"cannot write {path}: {getattr(error, 'strerror', error)}") from error


def trust_folder(chosen: Path | None) -> TrustFolder:
    """The trust folder that was asked for, or the one of this person's suite."""
    configure_logs("error", json=False)  # problems of the folder are shown by `read_trust`
    return TrustFolder(chosen or paths.trust_folder(os.environ, Path.home()))


def read_trust(chosen: Path | None) -> TrustRoots:
    """Whom that folder trusts; files that had to be left out are named on standard error."""
    folder = trust_folder(chosen)
    roots = folder.read()
    for problem in folder.problems:
        output.say(f"warning: {problem.message}", stderr=True)
    return roots
