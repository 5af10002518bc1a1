"""Where commands find the router and the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hocket.client import REGISTRY_ADDRESS, ROUTER_ADDRESS, blocking
from hocket.settings import read_token

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

__all__ = ["REGISTRY_ADDRESS", "ROUTER_ADDRESS", "Registry", "Router", "TokenFile", "read_token", "registry", "router"]


def router(address: str) -> AbstractContextManager[blocking.RouterClient]:
    """A connection to the router."""
    return blocking.connect(address)


def registry(address: str, token_file: Path | None = None) -> AbstractContextManager[blocking.RegistryClient]:
    """A connection to the registry."""
    return blocking.connect_registry(address, read_token(token_file))
