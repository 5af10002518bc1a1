"""The certificates that verbs connect with: options of `hocket` itself, for every verb that asks a server."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Final, TypedDict

import typer

CaFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="HOCKET_CA_FILE", help="Connect with TLS; who signs the servers' certificates (PEM)."
    ),
]
"""Option: whom to believe that a server is the one that was meant."""

CertificateFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="HOCKET_CERTIFICATE_FILE", help="Own certificate, for servers that ask for one (PEM)."
    ),
]
"""Option: what to show."""

KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="HOCKET_KEY_FILE", help="The private key of that certificate (PEM)."),
]
"""Option: the key that goes with it."""


class Files(TypedDict, total=False):
    """The options by the names of arguments that the functions of `hocket.client` take."""

    ca_file: Path | None
    certificate_file: Path | None
    key_file: Path | None


_chosen: Final[ContextVar[Files]] = ContextVar("certificates")


def choose(files: Files) -> None:
    """Keep what the command line says, for the verb that follows."""
    _chosen.set(files)


def chosen() -> Files:
    """What the command line says."""
    return _chosen.get(Files())


def in_options(message: str) -> str:
    """A message of the library with the options' names in place of the arguments'."""
    for name in ("ca_file", "certificate_file", "key_file"):
        message = message.replace(name, f"--{name.replace('_', '-')}")
    return message
