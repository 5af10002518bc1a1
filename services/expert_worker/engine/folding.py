"""A package becomes an `AdapterExpert`: its tensors, its configuration and the base's weights folded into pieces.

With rank r, s = alpha / r (rank-stabilised: alpha / sqrt(r)), and the base's W:

    LoRA   a = A          b = (s B)^T
    DoRA   a = A          b = (s g B)^T     o = g = magnitude / |W + s B A|, the length of each row
    IA3    u = factors on feed-forward projections, o = factors on others, and on their bias
    biases c = s (bias of B), + new bias - bias of the base

Formulas: Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732), Liu et al. 2024 (arXiv:2402.09353),
Liu et al. 2022 (arXiv:2205.05638). Everything is computed in float32. What is kept is float32 for u, o and c, and the
base's dtype for a, b and soft prompts, except that a and b stay float32 on a float16 base: that range is too small for
what lies between them. W is what serves: on a quantised base, what its few bits stand for.

An expert with a part missing still answers, only wrongly. So every tensor has to land on a projection of the base, and
every projection that the configuration chooses has to get its tensors. That no others do, the reader has seen to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import torch

from hocket.bases import Match, compatibility
from hocket.errors import HocketError, Reason
from hocket.packages.adapter import AdapterKind
from hocket.packages.expert.tensors import (
    BASE_BIAS,
    BIAS,
    IA3,
    LORA_A,
    LORA_B,
    LORA_BIAS,
    MAGNITUDE,
    chosen,
    endings,
    module_and_part,
    parts_of,
    values_for,
)
from services.expert_worker.engine.expert import AdapterExpert, Piece
from services.expert_worker.engine.int8 import quantise
from services.expert_worker.engine.quantised import weight_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from hocket.bases import BaseModel
    from hocket.packages.adapter import Adapter, AdapterConfig, AdapterFacts, RawTensor, SoftPrompt

_ALIGNMENT_BYTES: Final = 64
"""Every tensor starts at a multiple of this, for fast reads."""
_ROWS_AT_ONCE: Final = 256
"""Rows of W + s B A that are made together: so few that they stay in the processor's cache."""
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Foldable(Protocol):
    """What has to be known of a base."""

    @property
    def model(self) -> BaseModel:
        """Which it is."""

    @property
    def projections(self) -> Mapping[str, nn.Linear]:
        """What experts can adapt, by name: `model.layers.0.self_attn.q_proj`."""

    @property
    def hidden_size(self) -> int:
        """Columns of its embeddings."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """An expert in host memory, ready to move.

    Attributes:
        flat: uint8, every tensor of the expert; nothing else takes device memory.
        build: From the same bytes, moved: the expert, whose tensors are views of them.
    """

    flat: Tensor
    build: Callable[[Tensor], AdapterExpert]


def fold(adapter: Adapter, facts: AdapterFacts, base: Foldable, *, int8: bool = False) -> Folded:
    """Reduce an adapter to what the engine computes with. The result shares no memory with the package.

    Args:
        adapter: Its tensors, as read from a package.
        facts: About the package.
        base: Which it shall ride on.
        int8: Whether a and b are kept as int8, each row with its scale: they move by 1 / 254 of their row's largest
            number at most (see `int8`).

    Raises:
        HocketError: `NOT_SERVABLE` if the package says so; `BASE_MISMATCH` if it was made for another base;
            `BAD_ADAPTER` for a tensor that has no place in the base or does not fit there, for one that is missing, and
            for numbers that the base's dtype cannot hold.
    """
    if facts.not_servable is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"{facts.digest} cannot serve: {facts.not_servable}")
    compared = compatibility(facts.base, base.model)
    if compared.match is Match.DIFFERENT:
        raise HocketError(
            Reason.BASE_MISMATCH,
            f"{facts.digest} was made for another base than this worker serves: {compared.explanation}",
        )
    modules = _modules(adapter)
    _check_places(adapter.config, modules, base.projections)
    flat = _Flat()
    alphas = values_for(modules, adapter.config.alpha_pattern, adapter.config.alpha)
    laid_out: dict[str, tuple[list[_Span | None], bool]] = {}
    for module, parts in modules.items():
        if adapter.config.kind is AdapterKind.IA3:
            piece = _factors(module, parts, base.projections[module], adapter.config)
        elif LORA_A in parts:
            rank = parts[LORA_A].shape[0]
            scale = alphas[module] / (math.sqrt(rank) if adapter.config.use_rslora else rank)
            piece = replace(_low_rank(module, parts, base, scale), c=_bias(module, parts, base, scale))
        else:
            piece = Piece(c=_bias(module, parts, base, 0))
        a, b, *scales = _in_int8(piece) if int8 else (piece.a, piece.b, None, None)
        spans = [flat.add(tensor) for tensor in (piece.u, piece.o, piece.c, a, b, *scales)]
        laid_out[module] = spans, piece.gates_bias
    prompt = flat.add(_prompt(adapter.soft_prompts, base))

    def build(moved: Tensor) -> AdapterExpert:
        pieces = {}
        for module, (spans, gates_bias) in laid_out.items():
            u, o, c, a, b, a_scales, b_scales = (None if span is None else span.of(moved) for span in spans)
            pieces[module] = Piece(u, o, c, a, b, a_scales, b_scales, gates_bias)
        return AdapterExpert(
            digest=facts.digest,
            pieces=pieces,
            prompt=None if prompt is None else prompt.of(moved),
            prompt_template=facts.base.prompt_template,
            decoding=adapter.decoding,
            constraints=facts.constraints,
            size_bytes=moved.nbytes,
            grammar=adapter.grammar if facts.uses_grammar else None,
        )

    return Folded(flat.joined(), build)


_Parts = dict[str, "RawTensor"]


def _modules(adapter: Adapter) -> dict[str, _Parts]:
    """The tensors by module, then by what they do there."""
    modules: dict[str, _Parts] = {}
    known = parts_of(adapter.config)
    for name, tensor in adapter.tensors.items():
        module, part = module_and_part(name, known)
        modules.setdefault(module, {})[part] = tensor
    return modules


def _check_places(config: AdapterConfig, modules: Mapping[str, _Parts], projections: Mapping[str, nn.Linear]) -> None:
    """Whether every tensor has a projection, and every projection that was chosen its tensors."""
    if modules and config.fan_in_fan_out:
        raise _bad("fan_in_fan_out says that its weights are transposed, and the base has no such projections")
    for module, parts in modules.items():
        if module not in projections:
            raise _bad(f"{_named(module, *parts)} has no place in the base, which has no projection {module[:200]!r}")
    adapted = {module for module, parts in modules.items() if parts.keys() != {BIAS}}
    if config.exclude_modules is None:  # by an expression that is not run: then each name has to be met once
        left = set(config.target_modules).difference(*map(endings, adapted))
        config = replace(config, target_modules=tuple(left))
    for name in chosen(config, projections):
        if name not in adapted:
            raise _bad(f"its configuration chooses {name!r}, and no tensor adapts it: the weights are incomplete")
    for name, projection in projections.items():
        trained = config.bias == "all" or (config.bias == "lora_only" and name in adapted)
        if trained and _bias_of(projection) is not None and modules.get(name, {}).keys().isdisjoint((BASE_BIAS, BIAS)):
            raise _bad(f"the bias of {name!r} was trained, and no tensor holds it: the weights are incomplete")


def _factors(module: str, parts: _Parts, projection: nn.Linear, config: AdapterConfig) -> Piece:
    """IA3."""
    reads = not set(config.feedforward_modules).isdisjoint(endings(module))
    shape = (1, projection.in_features) if reads else (projection.out_features, 1)
    factors = _read(module, IA3, parts, shape).flatten()
    _check_finite(factors, _named(module, IA3))
    return Piece(u=factors) if reads else Piece(o=factors, gates_bias=True)


def _low_rank(module: str, parts: _Parts, base: Foldable, scale: float) -> Piece:
    """LoRA, and DoRA if there is a magnitude."""
    projection = base.projections[module]
    rank = parts[LORA_A].shape[0]
    a = _read(module, LORA_A, parts, (rank, projection.in_features))
    b = _read(module, LORA_B, parts, (projection.out_features, rank)) * scale
    o = None
    if MAGNITUDE in parts:
        o = _read(module, MAGNITUDE, parts, (projection.out_features,)) / _row_lengths(weight_of(projection), a, b)
        b *= o.unsqueeze(1)
        _check_finite(o, _named(module, MAGNITUDE))
    dtype = torch.float32 if base.dtype is torch.float16 else base.dtype
    a, b = a.to(dtype), b.T.to(dtype).contiguous()
    _check_finite(a, _named(module, LORA_A))
    _check_finite(b, _named(module, LORA_B))
    return Piece(o=o, a=a, b=b)


def _in_int8(piece: Piece) -> tuple[Tensor | None, ...]:
    """Its a and b, and their scales."""
    if piece.a is None or piece.b is None:
        return None, None, None, None
    (a, a_scales), (b, b_scales) = quantise(piece.a), quantise(piece.b)
    return a, b, a_scales, b_scales


def _bias(module: str, parts: _Parts, base: Foldable, scale: float) -> Tensor | None:
    """What is added to the bias."""
    projection = base.projections[module]
    shape = (projection.out_features,)
    added = [_read(module, LORA_BIAS, parts, shape) * scale] if LORA_BIAS in parts else []
    for part in (BASE_BIAS, BIAS):
        if part in parts:
            base_bias = _bias_of(projection)
            if base_bias is None:
                raise _bad(f"{_named(module, part)} has no place in the base, where {module[:200]!r} has no bias")
            added.append(_read(module, part, parts, shape) - base_bias.detach().to("cpu", torch.float32))
    if not added:
        return None
    c = torch.stack(added).sum(dim=0)
    _check_finite(c, _named(module, *(part for part in (LORA_BIAS, BASE_BIAS, BIAS) if part in parts)))
    return c


def _bias_of(projection: nn.Linear) -> Tensor | None:
    """The base's. torch types it as if there were always one."""
    return projection.bias


def _row_lengths(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Euclidean lengths of the rows of W + b a: float32 `[out]`, on the host.

    |W|^2 + 2 <b, W a^T> + <b (a a^T), b> would be the same without the sum, and takes the same time: reading W is what
    costs. But it cancels where an expert shortens rows much.
    """
    a, b = a.to(weight.device), b.to(weight.device)
    lengths = [
        torch.addmm(rows.to(torch.float32), more, a).norm(dim=1)
        for rows, more in zip(torch.split(weight.detach(), _ROWS_AT_ONCE), torch.split(b, _ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(lengths).cpu()


def _prompt(soft_prompts: tuple[SoftPrompt, ...], base: Foldable) -> Tensor | None:
    """Rows to put before the text, one soft prompt after the other."""
    rows = []
    for prompt in soft_prompts:
        shape = prompt.embeddings.shape
        if shape[1] != base.hidden_size:
            raise _bad(
                f"the soft prompt {prompt.name[:200]!r} has {shape[1]} columns, the embeddings of the base have "
                f"{base.hidden_size}"
            )
        rows.append(_tensor(prompt.embeddings).to(base.dtype))
        _check_finite(rows[-1], f"the soft prompt {prompt.name[:200]!r}")
    return torch.cat(rows) if rows else None


def _read(module: str, part: str, parts: _Parts, shape: tuple[int, ...]) -> Tensor:
    """A tensor in float32, once it is known to fit."""
    if parts[part].shape != shape:
        raise _bad(
            f"{_named(module, part)} has the shape {list(parts[part].shape)}, and the base needs {list(shape)} there"
        )
    return _tensor(parts[part])


def _tensor(raw: RawTensor) -> Tensor:
    """In float32, of its own memory: packages are read-only views that would keep the whole file."""
    return torch.frombuffer(bytearray(raw.data), dtype=_DTYPES[raw.dtype]).reshape(raw.shape).to(torch.float32)


def _check_finite(folded: Tensor, what: str) -> None:
    if not bool(folded.isfinite().all()):
        raise _bad(f"{what} holds numbers that are not finite once folded into the base's dtype {folded.dtype}")


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a tensor lies in the flat buffer."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.dtype).view(self.shape)


class _Flat:
    """Tensors on their way into one buffer."""

    def __init__(self) -> None:
        self._tensors: list[tuple[_Span, Tensor]] = []
        self._end = 0

    def add(self, tensor: Tensor | None) -> _Span | None:
        if tensor is None:
            return None
        start = -(-self._end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._end = start + tensor.nbytes
        span = _Span(start, self._end, tensor.dtype, tuple(tensor.shape))
        self._tensors.append((span, tensor))
        return span

    def joined(self) -> Tensor:
        flat = torch.zeros(self._end, dtype=torch.uint8)
        for span, tensor in self._tensors:
            span.of(flat).copy_(tensor)
        return flat


def _named(module: str, *parts: str) -> str:
    return f"tensor {f'{module[:200]}.{parts[0]}'!r}"


def _bad(why: str) -> HocketError:
    return HocketError(Reason.BAD_ADAPTER, f"the expert cannot ride on this base: {why}")
