"""Where commands find the router and the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hocket.cli import files
from hocket.client import REGISTRY_ADDRESS, ROUTER_ADDRESS, blocking
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

Router = Annotated[
    str, typer.Option("--router", metavar="HOST:PORT", envvar="HOCKET_ROUTER", help="Address of the router.")
]
"""Option: where to ask."""

Registry = Annotated[
    str, typer.Option("--registry", metavar="HOST:PORT", envvar="HOCKET_REGISTRY", help="Address of the registry.")
]
"""Option: where packages and mixtures are kept."""

TokenFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="HOCKET_TOKEN_FILE", help="File with the admin token, if one is needed."),
]
"""Option: what allows to change the registry."""

_TOKEN_BYTES_MAX: Final = 4096

__all__ = ["REGISTRY_ADDRESS", "ROUTER_ADDRESS", "Registry", "Router", "TokenFile", "read_token", "registry", "router"]


def router(address: str) -> AbstractContextManager[blocking.RouterClient]:
    """A connection to the router."""
    return blocking.connect(address)


def registry(address: str, token_file: Path | None = None) -> AbstractContextManager[blocking.RegistryClient]:
    """A connection to the registry."""
    return blocking.connect_registry(address, read_token(token_file))


def read_token(token_file: Path | None) -> str | None:
    """The token in a file, without the line's end; None without a file.

    Raises:
        HocketError: `BAD_REQUEST` if the file cannot be read or holds no token.
    """
    if token_file is None:
        return None
    token = files.read_file(token_file, _TOKEN_BYTES_MAX).strip()
    if not (token.isascii() and token.decode().isprintable() and token):
        raise HocketError(Reason.BAD_REQUEST, f"{token_file} holds no token: one line of printable ASCII")
    return token.decode()
