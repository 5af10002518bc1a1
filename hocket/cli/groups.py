"""`hocket expert` makes experts, `hocket experts` looks at those of a registry: who mixes them up is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from typer.core import TyperGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERBS: Final[Mapping[str, frozenset[str]]] = {
    "expert": frozenset({"new", "validate", "pack"}),
    "experts": frozenset({"show", "resolve"}),
}


class ExpertGroup(TyperGroup):
    """A group of verbs whose name differs by one letter from that of another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - click's types are private to typer
        """The verb; one of the other group's is refused with its whole name."""
        owner = next((name for name, verbs in _VERBS.items() if args[0] in verbs), self.name)
        if owner != self.name and args[0] not in self.commands:
            ctx.fail(f"No such command '{args[0]}'. Did you mean `hocket {owner} {args[0]}`?")
        return super().resolve_command(ctx, args)
