"""Who is behind a piece of text, as a colour: every expert has its own, a mixture the blend of those of its experts."""

from __future__ import annotations

from colorsys import hls_to_rgb
from typing import TYPE_CHECKING, Final

from rich.color import Color
from rich.style import Style

if TYPE_CHECKING:
    from collections.abc import Mapping

_TURN: Final = 0.618034
"""From one hue to the next, in turns of the colour wheel: by the golden ratio any number of hues lies well apart."""
_FIRST_HUE: Final = 0.55
_LIGHTNESS: Final = 0.55
"""Neither too bright for a white terminal nor too dark for a black one."""
_SATURATION: Final = 0.75
_BRIGHTEST: Final = 255


class Colours:
    """Gives every expert a colour that it keeps, in the order in which experts are met."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def style(self, weights: Mapping[str, float]) -> Style:
        """The colour of what experts make together.

        Args:
            weights: Of each expert, by its digest. What counts is its share of all magnitudes.

        Returns:
            The style; an empty one where nobody has a weight, for that is the base alone.
        """
        whole = sum(map(abs, weights.values()))
        parts = [(self._colour(expert), abs(weight) / whole) for expert, weight in weights.items() if weight]
        if not parts:
            return Style.null()
        red, green, blue = (
            round(_BRIGHTEST * sum(colour[channel] * share for colour, share in parts)) for channel in range(3)
        )
        return Style(color=Color.from_rgb(red, green, blue))

    def _colour(self, expert: str) -> tuple[float, float, float]:
        place = self._places.setdefault(expert, len(self._places))
        return hls_to_rgb((_FIRST_HUE + place * _TURN) % 1.0, _LIGHTNESS, _SATURATION)
