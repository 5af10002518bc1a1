"""Whether the engine computes what a model itself does, found out before it serves.

Its logits through the engine's attention are compared with those through its own, and the windows that its layers ask
for with its configuration: what the engine does not understand is refused then, and never answers wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine import attention
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, default_page_positions
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.runner import NoMixer, Runner

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from services.expert_worker.engine.base import Base

_TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Most that the engine's logits may differ from the model's own, as a share of their norm. What rounding does is a
tenth of it or less; attention to a wrong position is of the order of 1. A quantised base rounds as bfloat16 does."""
_STRIDE: Final = 7919
_ROWS: Final = 9
"""Of the short one of the two sequences, and of the long one after its first page."""


def check_engine(base: Base) -> None:
    """Refuse a model whose logits through the engine are not its own, or whose windows are not those it states.

    Two sequences; one of them goes beyond a page, in three passes, and its pages are not in order. That is shorter than
    the windows of most models, so these are compared by their sizes.

    Raises:
        HocketError: `NOT_SERVABLE` if that is so; `DEVICE_MEMORY` if there is no room for a few pages.
    """
    positions = default_page_positions(base.device)
    long, short = _ids(base, positions + _ROWS), _ids(base, _ROWS)
    reference = [_own_logits(base, long, [6, len(long) - 2, len(long) - 1]), _own_logits(base, short, [len(short) - 1])]
    base.causal_lm.set_attn_implementation(attention.NAME)
    pool = KvPool(
        base.kv_shape, page_count=SCRATCH_PAGES + 3, page_positions=positions, dtype=base.dtype, device=base.device
    )
    runner = Runner(base, pool, NoMixer())
    first = runner.run([_part(0, long[:7], [3, 1]), _part(0, short, [2])])
    found = [
        first[0],
        runner.run([_part(7, long[7:-1], [3, 1])])[0],
        runner.run([_part(len(long) - 1, long[-1:], [3, 1])])[0],
        first[1],
    ]
    wanted = torch.cat(reference)
    error = float((torch.stack(found) - wanted).norm() / wanted.norm())
    tolerance = _TOLERANCE[base.dtype if base.quantisation == "none" else torch.bfloat16]
    if not error <= tolerance:  # not a number, too
        raise _refusal(
            f"through the engine's attention its logits differ from its own by {error:.2g} of their norm: "
            f"{type(base.causal_lm).__name__} does something there that the engine does not know, or has bad weights"
        )
    for layer, window in sorted(runner.windows.items()):
        stated = _window(base.causal_lm.config, layer)
        if window != stated:
            raise _refusal(
                f"its configuration gives layer {layer} a sliding window of {stated} positions, and "
                f"{type(base.causal_lm).__name__} asks attention for one of {window} (None for all that came before): "
                "long texts would be answered otherwise than by the model itself"
            )


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """How many positions a layer sees, as the configuration has it; None for all."""
    window: int | None = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[layer] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _ids(base: Base, count: int) -> list[int]:
    return [(count + index) * _STRIDE % base.vocabulary_size for index in range(count)]


def _part(start: int, ids: list[int], pages: list[int]) -> Part:
    return Part(start=start, embeddings=None, token_ids=ids, pages=pages, mixture=(), sampled=True)


def _own_logits(base: Base, ids: list[int], after: list[int]) -> Tensor:
    """`[len(after), vocabulary]`, after these rows, by the model alone."""
    given = torch.tensor([ids], device=base.device)
    logits: Tensor = base.causal_lm(
        given, use_cache=False, logits_to_keep=torch.tensor(after, device=base.device)
    ).logits
    return logits[0].float()


def _refusal(why: str) -> HocketError:
    return HocketError(Reason.NOT_SERVABLE, why)
