"""Where commands find the router and the registry, and what they say when they do not."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hocket.cli import certificates, output
from hocket.client import REGISTRY_ADDRESS, ROUTER_ADDRESS, blocking
from hocket.client.calls import GRPC_STATUS, TLS_DETAILS
from hocket.errors import HocketError, Reason
from hocket.settings import read_token

if TYPE_CHECKING:
    from collections.abc import Iterator

Router = Annotated[
    str,
    typer.Option(
        "--router",
        metavar="HOST:PORT",
        envvar="HOCKET_ROUTER",
        help="Address of the router; of several ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT.",
    ),
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

__all__ = [
    "REGISTRY_ADDRESS",
    "ROUTER_ADDRESS",
    "Registry",
    "Router",
    "TokenFile",
    "explained",
    "insecure",
    "read_token",
    "registry",
    "router",
]


@contextmanager
def router(address: str) -> Iterator[blocking.RouterClient]:
    """A connection to the router; failures of the connection are explained."""
    with explained(address, "router"), blocking.connect(address, **certificates.chosen()) as client:
        yield client


@contextmanager
def registry(address: str, token_file: Path | None = None) -> Iterator[blocking.RegistryClient]:
    """A connection to the registry; failures of the connection are explained."""
    token = read_token(token_file)
    on_this_machine = address.startswith(("127.", "localhost:", "[::1]:", "unix:"))
    if token is not None and not certificates.chosen().get("ca_file") and not on_this_machine:
        output.say(f"warning: anyone on the way to {address} can read the token: use TLS (--ca-file)", stderr=True)
    with (
        explained(address, "registry"),
        blocking.connect_registry(address, token, **certificates.chosen()) as client,
    ):
        yield client


@contextmanager
def explained(address: str, server: str) -> Iterator[None]:
    """Say what to do when nobody answers at the address of the `router` or `registry`, or somebody else does."""
    try:
        yield
    except HocketError as error:
        if TLS_DETAILS in error.metadata:
            raise insecure(address, error) from error
        if error.metadata.keys() != {GRPC_STATUS}:  # a service of ours has refused
            raise
        match error.metadata[GRPC_STATUS]:
            case "UNAVAILABLE":
                advice = f"nobody answers at {address}: start a suite with `hocket up`, or give --{server} HOST:PORT"
                raise HocketError(Reason.UNREACHABLE, advice) from error
            case "UNIMPLEMENTED":
                other = "registry" if server == "router" else "router"
                advice = (
                    f"{address} does not serve hocket.v1.{server.capitalize()}Service: is it the {other}'s port? "
                    f"Give --{server} HOST:PORT"
                )
                raise HocketError(Reason.BAD_REQUEST, advice) from error
        raise


def insecure(address: str, error: HocketError) -> HocketError:
    """A refusal of the connection to an address for its certificates, in words of the command line."""
    message = f"no secure connection to {address}: {certificates.in_options(error.message)}"
    return HocketError(error.reason, message, tls_details=error.metadata[TLS_DETAILS])
