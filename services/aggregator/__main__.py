"""`hocket-aggregator`, or `python -m services.aggregator`: the aggregator as a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hocket.rpc.program import Program, run
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Program(
    "aggregator", AggregatorSettings, lambda settings, channels, _: AggregatorApp(settings, channels)
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run until asked to stop."""
    run(PROGRAM, argv)


if __name__ == "__main__":
    main()
