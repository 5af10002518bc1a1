"""`hocket-worker`, or `python -m services.expert_worker`: an expert worker as a process of its own."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import Tokens
from hocket.rpc.program import Program, run
from hocket.rpc.server import Address
from services.expert_worker.app import WorkerApp
from services.expert_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.rpc.channel import Channels


def _make(settings: WorkerSettings, channels: Channels, tokens: Tokens) -> WorkerApp:
    return WorkerApp(settings, channels, _advertised(settings), tokens.worker, Tokens(admin=tokens.admin))


def _advertised(settings: WorkerSettings) -> str:
    """Where others reach this worker."""
    if settings.advertise:
        return settings.advertise
    if not settings.port:
        raise HocketError(
            Reason.BAD_REQUEST, "a worker that takes any free port needs worker.advertise, or choose worker.port"
        )
    address = Address(settings.host, settings.port)
    return str(Address(socket.gethostname(), settings.port) if address.is_wildcard else address)


PROGRAM: Final = Program("worker", WorkerSettings, _make, guarded=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop."""
    run(PROGRAM, argv)


if __name__ == "__main__":
    main()
