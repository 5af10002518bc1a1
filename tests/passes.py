"""Sequences fed to a base pass by pass, and what transformers makes of them: for tests of the engine's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.part import Part

KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Kinds of bases with what makes them worth a test: biases, scaled positions, windows, layers of two types."""


def ids_of(count: int, seed: int = 0) -> list[int]:
    """Token ids of a sequence."""
    return [(7 * index * index + 31 * index + 97 * seed + 5) % 380 for index in range(count)]


def part(start: int, token_ids: Sequence[int], pages: Sequence[int], **changes: Any) -> Part:
    """A part without experts whose last row is sampled."""
    from services.expert_worker.engine.part import Part  # noqa: PLC0415 - imports torch

    settings: dict[str, Any] = {"embeddings": None, "mixture": (), "sampled": True} | changes
    return Part(start=start, token_ids=token_ids, pages=pages, **settings)


class Passes:
    """A base, a runner and pages. `mixer` is told of each pass."""

    def __init__(
        self, base: Base, page_positions: int = 16, page_count: int = 64, mixer: Any = None, kv_dtype: Any = None
    ) -> None:
        from services.expert_worker.engine.pages import KvPool, Pages  # noqa: PLC0415 - as below
        from services.expert_worker.engine.runner import NoMixer, Runner  # noqa: PLC0415 - imports transformers

        self.pages = Pages(page_count)
        self.page_positions = page_positions
        self.pool = KvPool(
            base.kv_shape,
            page_count=page_count,
            page_positions=page_positions,
            dtype=base.dtype,
            device=base.device,
            stored_as=kv_dtype,
        )
        self.run = Runner(base, self.pool, mixer or NoMixer()).run

    def take(self, row_count: int, *, scattered: bool = False) -> list[int]:
        """Pages for that many rows; `scattered` in descending order, so that none follows the other."""
        pages = self.pages.take(-(-row_count // self.page_positions))
        assert pages is not None
        return pages[::-1] if scattered else pages

    def logits(self, token_ids: Sequence[int], chunk: int, *, scattered: bool = False) -> Tensor:
        """Logits after the last row of each chunk, the sequence being alone."""
        import torch  # noqa: PLC0415 - seconds, and few tests want it

        pages = self.take(len(token_ids), scattered=scattered)
        found = [
            self.run([part(start, token_ids[start : start + chunk], pages)])
            for start in range(0, len(token_ids), chunk)
        ]
        self.pages.give(pages)
        return torch.cat(found)


def oracle(folder: Path, **settings: Any) -> Any:
    """The model of transformers, with its own attention."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds, and few tests want it

    model: Any = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return model.eval()
