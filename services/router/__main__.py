"""`hocket-router`, or `python -m services.router`: the router as a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hocket.rpc.program import Program, run
from services.router.app import RouterApp
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program("router", RouterSettings, lambda settings, channels, _: RouterApp(settings, channels))


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop."""
    run(PROGRAM, argv)


if __name__ == "__main__":
    main()
