"""`hocket-registry`, or `python -m services.registry`: the registry as a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hocket.rpc.program import Program, run
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "registry", RegistrySettings, lambda settings, _, tokens: RegistryApp(settings, tokens), guarded=True
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop."""
    run(PROGRAM, argv)


if __name__ == "__main__":
    main()
