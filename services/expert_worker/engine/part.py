"""A piece of work of one sequence in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from services.expert_worker.engine.expert import Mixture


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive rows of one sequence, to be computed in one pass: a chunk of its prompt, or its newest token.

    Attributes:
        start: Position of the first row. Rows before it have been computed already.
        embeddings: `[m, hidden]`: rows of soft prompts, the first m of the part; None for none.
        token_ids: The rows after those.
        pages: The sequence's block table: the KV page of each run of `page_positions` positions, enough for these rows.
        mixture: The experts that compute these rows, with their weights.
        sampled: Whether the logits after the last row are wanted.
    """

    start: int
    embeddings: Tensor | None
    token_ids: Sequence[int]
    pages: Sequence[int]
    mixture: Mixture
    sampled: bool

    @property
    def row_count(self) -> int:
        """Rows of the part."""
        return len(self.token_ids) + (0 if self.embeddings is None else len(self.embeddings))
