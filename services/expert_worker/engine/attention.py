"""Attention over the paged keys and values of packed sequences, as a function that transformers' models call.

A pass computes rows of several sequences, packed as one row of tokens. In every layer the new keys and values are
written to their pages first; then each sequence's new rows attend to all its positions up to their own, within the
layer's window if it has one. What a pass has to know about that is made once, as a `Step`, and travels to every layer
as a keyword of the model's call.

On a CUDA device in half precision this is one kernel for all sequences, which reads the pages in place. Elsewhere it
is PyTorch's attention for one sequence after another: in place where the pages are consecutive, else on a copy. Of a
pool in int8 both read a copy of the pages that they need, in the base's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.transfer import into, there

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from services.expert_worker.engine.pages import KvPool
    from services.expert_worker.engine.part import Part

NAME: Final = "hocket_paged"
"""What models know the function by. There is no mask function of that name, so models build no masks for it."""
_WITHOUT_MEANING: Final = {"position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position"}
"""Keywords of models that change nothing here: positions are in queries and keys already, the cache is the pool."""
_KERNEL_CAPABILITY: Final = (8, 0)
_KERNEL_PAGE_POSITIONS: Final = 256
_KERNEL_HEAD_DIM_MAX: Final = 256
_KERNEL_HEAD_DIM_STEP: Final = 8
"""What PyTorch's paged flash attention is made for."""


class Step:
    """What attention has to know about one pass. It is made once for it, and read in every layer.

    Args:
        pool: Where keys and values lie.
        parts: What is computed, in the order in which the rows are packed.
        table_width: Most pages of a part in passes that it is renewed for; 0 for those of these parts.

    Attributes:
        pool: Where keys and values lie.
        row_counts: Rows of each part.
        slots: `[T]`, int64: where each row's keys and values are put.
        kernel: What attends for all parts at once; None where each is attended to for itself.
        windows: The window of each layer that has been computed, by its index; None for one that sees everything.
    """

    def __init__(self, pool: KvPool, parts: Sequence[Part], table_width: int = 0) -> None:
        self.pool = pool
        self._parts = parts
        self.row_counts = [part.row_count for part in parts]
        self.slots = there(_slots(pool, parts), pool.device)
        self.kernel = _Kernel(pool, parts, table_width) if has_kernel(pool) else None
        self.windows: dict[int, int | None] = {}
        self._reads: dict[int | None, list[_Read]] = {}

    def renew(self, parts: Sequence[Part]) -> None:
        """Be about other parts of as many rows each; every tensor stays where it is."""
        self._parts = parts
        self._reads.clear()
        into(self.slots, _slots(self.pool, parts))
        if self.kernel is not None:
            self.kernel.renew(parts)

    def reads(self, window: int | None) -> list[_Read]:
        """What each part reads in layers with that window."""
        if window not in self._reads:
            self._reads[window] = [_read(self.pool, part, window) for part in self._parts]
        return self._reads[window]


def _slots(pool: KvPool, parts: Sequence[Part]) -> NDArray[np.int64]:
    """Where the keys and values of each row are put."""
    size = pool.page_positions
    slots = []
    for part in parts:
        positions = np.arange(part.start, part.start + part.row_count)
        slots.append(np.asarray(part.pages)[positions // size] * size + positions % size)
    return np.concatenate(slots)


def attend(  # noqa: PLR0913 - transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,  # noqa: ANN401 - theirs
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' `AttentionInterface` has it.

    Args:
        module: The layer's attention; its `layer_idx` says whose keys and values they are.
        query: `[1, heads, T, head_dim]`, rotated.
        key: `[1, kv_heads, T, head_dim]`, rotated.
        value: As `key`.
        attention_mask: None.
        step: What is computed.
        scaling: Of the products of queries and keys.
        dropout: Nothing, as the model is not in training.
        sliding_window: How many positions a row sees, its own included; None for all.
        **others: Whatever else a model has to say.

    Returns:
        `[1, T, heads, head_dim]`, and no weights.

    Raises:
        HocketError: `NOT_SERVABLE` if the model wants something of attention that is not done here.
    """
    unknown = sorted(name for name, what in others.items() if what is not None and name not in _WITHOUT_MEANING)
    if unknown or attention_mask is not None or dropout or not getattr(module, "is_causal", True):
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"its attention wants {', '.join(unknown) or 'a mask, dropout, or to look ahead'}, and the engine has none",
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention of transformers has it, as an int
    step.windows[layer] = sliding_window
    step.pool.write(layer, step.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if step.kernel is not None:
        return step.kernel(layer, query[0].transpose(0, 1), scaling, sliding_window)[None], None
    queries = query.view(step.pool.shape.heads, -1, *query.shape[2:])  # those that share keys, side by side
    positions = _Positions(step.pool, layer, queries.shape[1])
    answers = []
    for rows, read in zip(torch.split(queries, step.row_counts, dim=2), step.reads(sliding_window), strict=True):
        keys, values = positions.of(read)
        answers.append(
            scaled_dot_product_attention(rows, keys, values, attn_mask=read.mask, is_causal=read.causal, scale=scaling)
        )
    return torch.cat(answers, dim=2).flatten(0, 1).transpose(0, 1)[None], None


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What one part attends to.

    Attributes:
        pages: `[n]`, the pages to copy side by side first; None where they lie so in the pool, and can be read there.
        span: The positions to read, counted from the first of those pages, or of the pool.
        mask: `[rows, span]`, added to the scores: 0 for positions a row sees, else minus infinity. None for no mask.
        causal: Whether each row sees the positions up to its own, and the first row stands at the first position.
    """

    pages: Tensor | None
    span: slice
    mask: Tensor | None
    causal: bool


def _read(pool: KvPool, part: Part, window: int | None) -> _Read:
    count = part.row_count
    end = part.start + count
    first = 0 if window is None else max(0, part.start + 1 - window)
    first_page, size = first // pool.page_positions, pool.page_positions
    pages = list(part.pages[first_page : (end - 1) // size + 1])
    in_place = pool.in_place and pages == list(range(pages[0], pages[0] + len(pages)))
    offset = ((pages[0] if in_place else 0) - first_page) * size
    causal = part.start == 0 and (window is None or end <= window) and count > 1
    mask = None
    if count > 1 and not causal:
        rows = torch.arange(part.start, end, device=pool.device)[:, None]
        positions = torch.arange(first, end, device=pool.device)
        hidden = (positions > rows) | (positions <= rows - (end if window is None else window))
        mask = torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device).masked_fill_(hidden, -torch.inf)
    return _Read(
        pages=None if in_place else there(np.array(pages), pool.device),
        span=slice(first + offset, end + offset),
        mask=mask,
        causal=causal,
    )


class _Positions:
    """Keys and values of one layer, as `[heads, group, positions, head_dim]`: each once for every query that shares it.

    All are views, except what `of` has to copy.
    """

    def __init__(self, pool: KvPool, layer: int, group: int) -> None:
        self._pool = pool
        self._layer = layer
        self._group = group
        self._whole: tuple[Tensor, Tensor] | None = None

    def of(self, read: _Read) -> tuple[Tensor, Tensor]:
        """Those that one part reads."""
        if read.pages is None:
            keys, values = self._whole = self._whole or self._shared(None)
        else:
            keys, values = self._shared(read.pages)
        return keys[:, :, read.span], values[:, :, read.span]

    def _shared(self, pages: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = (
            each.flatten(0, 1).transpose(0, 1)[:, None].expand(-1, self._group, -1, -1)
            for each in self._pool.read(self._layer, pages)
        )
        return keys, values


def has_kernel(pool: KvPool) -> bool:
    """Whether PyTorch's paged flash attention can be used on this pool."""
    return (
        pool.device.type == "cuda"
        and pool.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(pool.device) >= _KERNEL_CAPABILITY
        and pool.page_positions % _KERNEL_PAGE_POSITIONS == 0
        and pool.shape.head_dim % _KERNEL_HEAD_DIM_STEP == 0
        and pool.shape.head_dim <= _KERNEL_HEAD_DIM_MAX
    )


class _Kernel:
    """One call of `torch.nn.attention.varlen.varlen_attn` for all parts of a pass.

    `num_splits=1` makes a sequence's numbers independent of its neighbours: else the longest of the batch decides how
    the sums over positions are split.
    """

    def __init__(self, pool: KvPool, parts: Sequence[Part], table_width: int) -> None:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every PyTorch that serves on a CPU

        self._attend = varlen_attn
        self._pool = pool
        rows = [part.row_count for part in parts]
        lengths = _lengths(parts)
        pages, tables = _tables(pool, lengths, parts, table_width)
        self._pages = None if pages is None else there(pages, pool.device)
        self._row_max, self._length_max = max(rows), table_width * pool.page_positions or int(lengths.max())
        self._row_ends = there(_ends(rows), pool.device)
        self._lengths = there(lengths, pool.device)
        self._length_ends = there(_ends(lengths), pool.device)
        self._tables = there(tables, pool.device)

    def renew(self, parts: Sequence[Part]) -> None:
        """Attend for other parts of as many rows each, in a pool that is read in place."""
        lengths = _lengths(parts)
        into(self._lengths, lengths)
        into(self._length_ends, _ends(lengths))
        into(self._tables, _tables(self._pool, lengths, parts, self._tables.shape[1])[1])

    def __call__(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        """Attention of one layer; `query` and answer are `[T, heads, head_dim]`."""
        return self._attend(  # type: ignore[return-value]  # a tuple only with return_aux
            query.contiguous(),
            *self._pool.read(layer, self._pages),
            self._row_ends,
            self._length_ends,
            self._row_max,
            self._length_max,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            seqused_k=self._lengths,
            block_table=self._tables,
            num_splits=1,
        )


def _lengths(parts: Sequence[Part]) -> NDArray[np.int32]:
    """Positions of each part and of what is before it."""
    return np.array([part.start + part.row_count for part in parts], np.int32)


def _ends(counts: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """Where each of them begins if they stand one after the other, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _tables(
    pool: KvPool, lengths: NDArray[np.int32], parts: Sequence[Part], width: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int32]]:
    """The pages to copy side by side first, if the pool is not read in place; and `[parts, width]`, those of each part.

    After the last one of a part stand zeros; a width of 0 stands for that of the longest.
    """
    counts = [-(-int(length) // pool.page_positions) for length in lengths]
    tables = np.zeros((len(parts), width or max(counts)), np.int32)
    for table, part, count in zip(tables, parts, counts, strict=True):
        table[:count] = part.pages[:count]
    if pool.in_place:
        return None, tables
    for table, count, end in zip(tables, counts, np.cumsum(counts), strict=True):
        table[:count] = range(end - count, end)
    return np.concatenate([part.pages[:count] for part, count in zip(parts, counts, strict=True)]), tables


AttentionInterface.register(NAME, attend)
