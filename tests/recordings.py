"""What a CUDA device does with a step, on a CPU: its attention in plain operations, and recordings that are played.

With both, a step computes on a CPU as it is recorded on CUDA: operation by operation, on the memory that it was
recorded with, and nothing of Python in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.passes import Passes, ids_of, part

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest
    from torch import Tensor

    from services.expert_worker.engine.arena import Arena
    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.graphs import Record


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Remembers every operation that runs meanwhile.

    Attributes:
        calls: What ran, with its arguments and what came out.
        dependent: Operations among them that wait for what a device computes: whose result is a number of Python's, or
            as large as the data says.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.dependent: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        if tags and (func is not torch.ops.aten.index.Tensor or _has_mask(args[1])):
            self.dependent.append(str(func))
        return out

    def play(self) -> None:
        """Run the same operations again, on the same memory but for what they made themselves."""
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            before, after = (each if isinstance(each, (tuple, list)) else [each] for each in (out, again))
            made |= {id(old): new for old, new in zip(before, after, strict=True) if isinstance(old, torch.Tensor)}


def _has_mask(indices: Any) -> bool:
    """Whether an index is as large as the data says; by numbers it is as large as these are many."""
    return any(index is not None and index.dtype is torch.bool for index in indices)


def on_tape(compute: Callable[[], object]) -> Callable[[], None]:
    """Record a step as a CUDA graph would."""
    tape = Tape()
    with tape:
        compute()
    assert not tape.dependent, "a device would have to be waited for"
    return tape.play


class Twins:
    """The same sequences twice: in steps that are recorded, and in steps that are computed as they come.

    Args:
        base: Whose projections are wrapped until `close`.
        arena: Where experts lie.
        rows_max: Most sequences of a recorded step.
        record: How steps are recorded.
        tolerance: Most that logits may differ, as a share of their norm.

    Attributes:
        recordings: What has been recorded.
    """

    def __init__(
        self,
        base: Base,
        *,
        arena: Arena,
        rows_max: int = 16,
        record: Record = on_tape,
        tolerance: float = 1e-5,
        page_positions: int = 16,
    ) -> None:
        from services.expert_worker.engine.graphs import Graphs  # noqa: PLC0415 - imports transformers
        from services.expert_worker.engine.mixing import Mixer  # noqa: PLC0415 - as above
        from services.expert_worker.engine.runner import Runner  # noqa: PLC0415 - as above

        self.base = base
        self.arena = arena
        self.mixer = Mixer(base.causal_lm, base.projections, arena)
        self.passes = Passes(base, page_positions=page_positions, mixer=self.mixer)
        self.recordings: list[Callable[[], None]] = []
        self._record = record
        self._tolerance = tolerance
        graphs = Graphs(base, self.passes.pool, self.mixer, rows_max=rows_max, record=self._noted, compute_first=0)
        self.recorded = Runner(base, self.passes.pool, self.mixer, graphs).run
        self._tables: dict[int, list[int]] = {}

    def _noted(self, compute: Callable[[], object]) -> Callable[[], None]:
        self.recordings.append(self._record(compute))
        return self.recordings[-1]

    def prompt(self, number: int, mixture: Mixture, count: int = 20) -> None:
        """Begin a sequence."""
        self._tables[number] = self.passes.take(count + 20, scattered=True)
        self.passes.run([part(0, ids_of(count, number), self._tables[number], mixture=mixture)])

    def step(self, *rows: tuple[int, int, Mixture]) -> None:
        """A token of some sequences: number, position, experts. Both ways come to the same."""
        parts = [part(at, [ids_of(99, n)[at]], self._tables[n], mixture=mixture) for n, at, mixture in rows]
        wanted = self.passes.run(parts)
        found = self.recorded(parts)
        assert found.shape == wanted.shape
        apart = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(apart.max()) <= self._tolerance

    def close(self) -> None:
        """Give the base its projections back, and let go of what was recorded."""
        self.recordings.clear()
        del self.recorded
        for name, linear in self.base.projections.items():
            parent, _, child = name.rpartition(".")
            setattr(self.base.causal_lm.get_submodule(parent), child, linear)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` of pages, as its documentation has it; no operation depends on data."""
    assert enable_gqa
    assert num_splits == 1
    assert window_size[1] == 0
    for numbers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert numbers.dtype is torch.int32
    assert max_q >= 1
    assert max_k >= 1
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 == len(block_table) + 1
    rows = torch.arange(len(query))
    part = torch.searchsorted(cu_seq_q[1:].contiguous(), rows, right=True)
    lengths = seqused_k[part]
    positions = rows - cu_seq_q[part] + lengths - (cu_seq_q[1:] - cu_seq_q[:-1])[part]
    keys, values = (
        pool[block_table.long()].flatten(1, 2)[part].repeat_interleave(query.shape[1] // pool.shape[2], 2)
        for pool in (key, value)
    )
    columns = torch.arange(keys.shape[1])
    seen = (columns <= positions[:, None]) & (columns < lengths[:, None])
    if window_size[0] >= 0:
        seen &= columns >= positions[:, None] - window_size[0]
    scores = torch.einsum("thd,tkhd->thk", query, keys) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("thk,tkhd->thd", weights, values)


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have attention go through the kernel from now on, as it does in half precision on CUDA."""
    import torch.nn.attention.varlen  # noqa: PLC0415 - beside its only use

    from services.expert_worker.engine import attention  # noqa: PLC0415 - imports transformers

    monkeypatch.setattr(attention, "has_kernel", lambda _pool: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
