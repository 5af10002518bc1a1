"""What experts do to projections, in tensors that stay where they are: as a recorded step wants it.

A step that was recorded computes with the memory that it was recorded with. So everything in which steps may differ is
a number in some tensor: a window of rows at the end of the arena holds the experts of the step, and each row of the
batch has a weight for each row of the window, 0 for those of others. Sizes are rounded up, so that few recordings do
for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from services.expert_worker.engine.projection import Update, Vectors, Work
from services.expert_worker.engine.transfer import into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from services.expert_worker.engine.arena import Place

_QUARTERED_MIN: Final = 32
"""Three quarters of it are still a multiple of what matrix units like."""


def rounded(count: int) -> int:
    """The next power of two; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def window_size(count: int) -> int:
    """The next power of two, or three quarters of it where that is enough."""
    size = rounded(count)
    return 3 * size // 4 if size >= _QUARTERED_MIN and count <= 3 * size // 4 else size


@dataclass(frozen=True, slots=True)
class Members:
    """Experts that do something to a projection, by their columns among all of the step.

    Attributes:
        inputs: Those with factors of the input.
        outputs: With factors of the output, its bias included.
        products: With factors of the output without its bias.
        biases: With biases.
        updates: With low-rank updates.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    products: tuple[int, ...]
    biases: tuple[int, ...]
    updates: tuple[int, ...]


class StandingWork:
    """Work for steps of so many rows, whoever the experts are.

    Args:
        members: Of the first such step. Others have about as many.
        row_count: Rows of the batch.
        window: Rows of the arena that experts may lie in.
        vector_rows: Rows that a factor or a bias takes.
        device: Where to compute.

    Attributes:
        work: What projections have to do.
    """

    def __init__(self, members: Members, row_count: int, window: range, vector_rows: int, device: torch.device) -> None:
        self._window = window

        def vectors(who: tuple[int, ...]) -> Vectors | None:
            if not who:
                return None
            count = rounded(len(who)) * vector_rows
            return Vectors(
                torch.zeros((row_count, count), device=device), torch.full((count,), window.stop - 1, device=device)
            )

        updates: tuple[Update, ...] = ()
        if members.updates:
            weights = torch.zeros((row_count, len(window)), device=device)
            updates = (Update(window.start, window.stop, slice(None), weights, weights == 0),)
        self.work = Work(
            inputs=vectors(members.inputs),
            outputs=vectors(members.outputs),
            products=vectors(members.products),
            biases=vectors(members.biases),
            updates=updates,
        )

    def fill(self, members: Members, weights: NDArray[np.float32], places: Sequence[Place]) -> None:
        """Make ready for a step.

        Args:
            members: Of this step, as many of each as the rounding of the first ones' lets.
            weights: `[row_count, experts]`.
            places: Of all experts, in the window.
        """
        factors = [place.factors for place in places]
        for vectors, who, rows in (
            (self.work.inputs, members.inputs, factors),
            (self.work.outputs, members.outputs, factors),
            (self.work.products, members.products, factors),
            (self.work.biases, members.biases, [place.biases for place in places]),
        ):
            if vectors is not None:
                self._fill_vectors(vectors, who, weights, rows)
        for update in self.work.updates:
            spread = np.zeros(update.weights.shape, np.float32)
            for member in members.updates:
                place = places[member]
                spread[:, place.start - self._window.start : place.stop - self._window.start] = weights[:, [member]]
            into(update.weights, spread)
            if update.absent is not None:
                torch.eq(update.weights, 0, out=update.absent)

    def _fill_vectors(
        self, vectors: Vectors, who: tuple[int, ...], weights: NDArray[np.float32], rows: Sequence[range]
    ) -> None:
        where = [(row, member) for member in who for row in rows[member]]
        indices = np.full(len(vectors.rows), self._window.stop - 1)  # whatever lies there is a number; its weight is 0
        spread = np.zeros(vectors.weights.shape, np.float32)
        indices[: len(where)] = [row for row, _ in where]
        spread[:, : len(where)] = weights[:, [member for _, member in where]]
        into(vectors.rows, indices)
        into(vectors.weights, spread)
