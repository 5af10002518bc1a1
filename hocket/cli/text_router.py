"""Who answers text: the router that is asked, or a suite of the command's own."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from hocket.cli import certificates, sampling, servers
from hocket.cli.own_suite import own_router
from hocket.client import blocking
from hocket.client.calls import GRPC_STATUS
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import typer

_ON_COMMAND_LINE: Final = "COMMANDLINE"


@dataclass(frozen=True, slots=True)
class TextRouter:
    """Who answers.

    Attributes:
        client: The connection.
        base: What requests name as their base.
        failures: What explains failures of the connection.
    """

    client: blocking.RouterClient
    base: str
    failures: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say in words of the command line what calls fail with."""
        try:
            with sampling.explained(), self.failures():
                yield
        except HocketError as error:
            if error.reason is not Reason.DEADLINE or GRPC_STATUS not in error.metadata:
                raise
            raise error.restated("the answer was not whole in time: --timeout SECONDS gives it longer") from error


@contextmanager
def text_router(
    context: typer.Context, *, router: str, device: str | None, data: Path | None, base: str, shown: bool
) -> Iterator[TextRouter]:
    """Who answers, as the options say.

    Args:
        context: Of the command, which has these options.
        router: Address of the router.
        device: Where a suite of the command's own computes.
        data: That one's data.
        base: The base that is asked for.
        shown: Whether people are told that such a suite starts.

    Raises:
        HocketError: `BAD_REQUEST` if the options name a router and a suite of the command's own; as `own_router`.
    """
    if device is None and data is None:
        with blocking.connect(router, **certificates.chosen()) as client:
            yield TextRouter(client, base, partial(servers.explained, router, "router"))
        return
    source = context.get_parameter_source("router")
    if source is not None and source.name == _ON_COMMAND_LINE:
        raise HocketError(
            Reason.BAD_REQUEST, "--device and --data start a suite of this command's own: leave out --router, or them"
        )
    with own_router(device=device, data=data, wanted=base, shown=shown) as (client, failures):
        yield TextRouter(client, "", failures)  # which has one base, whatever it calls it
