"""An adapter expert as the engine computes it: every kind reduced to the same few pieces per projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hocket.packages.adapter import Decoding
    from hocket.requirements import Constraints


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What an expert does to one projection `y = W x + bias`.

    With weight w it makes of it

        x' = x * (1 + w (u - 1))
        y' = (W x') * (1 + w (o - 1)) + bias * (1 + w (o - 1) if gates_bias else 1) + w c + w B (A x')

    and several experts add up what stands behind `1 +`, and their last two terms. None stands for a piece that is not
    there.

    Attributes:
        u: `[in]`, factors of the input: IA3 on feed-forward projections.
        o: `[out]`, factors of the output: IA3 elsewhere; DoRA's magnitude over the length of the updated row.
        c: `[out]`, what is added to the bias, or stands in its place: trained biases.
        a: `[r, in]`.
        b: `[r, out]`: B transposed, its scale and DoRA's factor within.
        a_scales: float32 `[r]`, of the rows of `a` if they are int8 (see `int8`); None if they are floats.
        b_scales: The same of `b`.
        gates_bias: Whether `o` scales the bias as well: IA3 does, DoRA does not.
    """

    u: Tensor | None = None
    o: Tensor | None = None
    c: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    a_scales: Tensor | None = None
    b_scales: Tensor | None = None
    gates_bias: bool = False

    @property
    def rank(self) -> int:
        """Rows of `a`; 0 without one."""
        return 0 if self.a is None else len(self.a)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterExpert:
    """One adapter expert, folded for one base, in memory.

    Attributes:
        digest: Of its package.
        pieces: By the name of the projection in the base: `model.layers.0.self_attn.q_proj`.
        prompt: `[n, hidden]`, rows to put before the text, in the base's dtype; None for none.
        prompt_template: As its package names it; None leaves it to the base.
        decoding: How it wants to be sampled.
        constraints: How it goes together with others.
        size_bytes: What its tensors take.
        grammar: GBNF that its answers follow where nobody says otherwise; None for none.
    """

    digest: str
    pieces: Mapping[str, Piece]
    prompt: Tensor | None
    prompt_template: str | None
    decoding: Decoding
    constraints: Constraints
    size_bytes: int
    grammar: str | None = None

    @property
    def load_order(self) -> int:
        """Experts compose in ascending order."""
        return self.constraints.load_order

    @property
    def rank(self) -> int:
        """The largest rank of its pieces."""
        return max((piece.rank for piece in self.pieces.values()), default=0)


Mixture: TypeAlias = "tuple[tuple[AdapterExpert, float], ...]"
"""Experts with their weights, each expert once; empty for the base alone."""


def prompts_of(mixture: Mixture) -> list[Tensor]:
    """The soft prompts of a mixture, in the order in which they stand before the text.

    A soft prompt is there whenever its expert's weight is not 0, and it is not scaled.
    """
    present = sorted(
        (expert.load_order, expert.digest, expert.prompt)
        for expert, weight in mixture
        if weight != 0.0 and expert.prompt is not None
    )
    return [prompt for _, _, prompt in present]
