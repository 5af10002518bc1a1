"""One pass of the base, over parts of several sequences at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from services.expert_worker.engine.attention import Step
from services.expert_worker.engine.transfer import there

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.graphs import Graphs
    from services.expert_worker.engine.pages import KvPool
    from services.expert_worker.engine.part import Part


class Mixer(Protocol):
    """What composes experts during a pass: whoever has wrapped the base's projections."""

    def begin(self, counts: Sequence[tuple[int, Mixture]], kept: NDArray[np.int64]) -> None:
        """Make ready for a pass.

        Args:
            counts: The rows of each part, in packed order, and who computes them.
            kept: `[n]`, ascending: the rows that reach `lm_head`.
        """

    def end(self) -> None:
        """The pass is over, well or not."""


class NoMixer:
    """Composes nothing: for the base alone, whatever the mixtures."""

    def begin(self, counts: Sequence[tuple[int, Mixture]], kept: NDArray[np.int64]) -> None:
        """See `Mixer`."""

    def end(self) -> None:
        """See `Mixer`."""


class Runner:
    """Runs passes. Not for several threads at once.

    Args:
        base: The model.
        pool: Where keys and values of its sequences lie.
        mixer: Composes experts.
        graphs: Computes the steps that have been recorded; None computes all of them as they come.

    Attributes:
        windows: The sliding window that each layer asked for in the last pass, by its index; None for one without.
    """

    def __init__(self, base: Base, pool: KvPool, mixer: Mixer, graphs: Graphs | None = None) -> None:
        self.windows: dict[int, int | None] = {}
        self._base = base
        self._pool = pool
        self._mixer = mixer
        self._graphs = graphs
        self._embed = base.causal_lm.get_input_embeddings()

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Compute parts: their keys and values, and the logits after those that are sampled.

        Args:
            parts: At least one, each of at least one row, no two of the same sequence. Ids are of the vocabulary, and
                positions within the context.

        Returns:
            `[sampled parts, vocabulary]`, float32, in the order of the parts; a tensor of inference mode, that lasts
            until the next pass.
        """
        if self._graphs is not None and self._graphs.takes(parts):
            return self._graphs.run(parts)
        kept = []
        row = 0
        for part in parts:
            row += part.row_count
            if part.sampled:
                kept.append(row - 1)
        positions = np.concatenate([np.arange(part.start, part.start + part.row_count) for part in parts])
        kept_rows = np.array(kept, np.int64)
        step = Step(self._pool, parts)
        self._mixer.begin([(part.row_count, part.mixture) for part in parts], kept_rows)
        try:
            with torch.inference_mode():  # spares the bookkeeping of autograd, a tenth of the time of small models
                answer = self._base.causal_lm(
                    **self._inputs(parts),
                    position_ids=there(positions, self._base.device)[None],
                    use_cache=False,
                    logits_to_keep=there(kept_rows, self._base.device),
                    return_dict=True,
                    step=step,
                )
                logits: Tensor = answer.logits[0].float()
        finally:
            self._mixer.end()
        self.windows = step.windows
        return logits

    def _inputs(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """The packed row of tokens: as ids, or as embeddings where soft prompts are among them."""
        if all(part.embeddings is None for part in parts):
            return {"input_ids": self._int64([token_id for part in parts for token_id in part.token_ids])[None]}
        rows = []
        for part in parts:
            if part.embeddings is not None:
                rows.append(part.embeddings.to(self._base.device, non_blocking=True))
            if part.token_ids:
                rows.append(self._embed(self._int64(part.token_ids)))
        return {"inputs_embeds": torch.cat(rows)[None]}

    def _int64(self, numbers: Sequence[int]) -> Tensor:
        return there(np.array(numbers, np.int64), self._base.device)
