"""Adapters with random tensors for a toy base, and what they have to compute, written out densely in float64."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hocket.bases import BaseModel
from hocket.packages.expert.reader import decode
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.folding import fold
from services.expert_worker.engine.layout import RowLayout
from services.expert_worker.engine.slab import ALIGNMENT_BYTES, Slab
from tests.experts import expert_package

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from hocket.packages import adapter as a
    from services.expert_worker.engine.expert import AdapterExpert

NAME = "Toy"
KINDS = ("lora", "rslora", "dora", "ia3", "biased", "biased_dora")
_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {},
    "biased": {"lora_bias": True, "bias": "lora_only"},
    "biased_dora": {"bias": "lora_only"},
}
"""Of their configurations, where they are of low rank."""
SHAPES = {"block.0.up": (24, 40), "block.0.down": (40, 24), "block.1.up": (24, 40), "block.1.down": (40, 24)}
HEAD = "lm_head"
_HEAD_SHAPE = (24, 50)


class ToyModel(nn.Module):
    """Two feed-forward blocks, `up` with a bias, and a head that sees some rows. No row sees another."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.block = nn.ModuleList(
                [nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)}) for _ in range(2)]
            )
            self.lm_head = nn.Linear(*_HEAD_SHAPE, bias=False)
        self.requires_grad_(requires_grad=False).to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        for block in self.block:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](torch.tanh(block["up"](x)))
        answer: Tensor = self.lm_head(x if kept is None else x[:, kept])
        return answer


@dataclass
class ToyBase:
    """What folding has to know, and the model itself."""

    dtype: torch.dtype = torch.float32
    seed: int = 0
    model: BaseModel = field(default_factory=lambda: BaseModel(NAME))
    hidden_size: int = 24
    causal_lm: Any = None
    projections: dict[str, nn.Linear] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.causal_lm = ToyModel(self.dtype, self.seed)
        self.projections = {n: m for n, m in self.causal_lm.named_modules() if isinstance(m, nn.Linear)}


def arena_of(
    base: Any,
    rows: int,
    *,
    outside_rows: int = 72,
    kind: type[Arena] = Arena,
    pages_bytes: int = 0,
    page_bytes: int = 0,
) -> Arena:
    """An arena with so many rows for a base, the toy or another, and memory of pages beside them in each layer."""
    layout = RowLayout(base.projections, base.dtype)
    device = next(iter(base.projections.values())).weight.device
    layer_bytes = -(-(pages_bytes + rows * layout.row_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    slab = Slab(layout.layer_count, layer_bytes, page_bytes=page_bytes, row_bytes=layout.row_bytes, device=device)
    return kind(layout, slab, outside_rows=outside_rows, device=device)


def tensors_for(
    kind: str, modules: Sequence[str], *, rank: int, seed: int, ranks: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """By the names that PEFT gives them; `ranks` holds for modules that have another."""
    random = np.random.default_rng(seed)

    def numbers(*shape: int, around: float = 0.0) -> Any:
        return (around + 0.4 * random.standard_normal(shape)).astype(np.float32)

    if kind == "soft_prompt":
        return {"prompt_embeddings": numbers(rank, 24)}
    tensors = {}
    for module in modules:
        inputs, outputs = SHAPES.get(module, _HEAD_SHAPE)
        path = f"base_model.model.{module}"
        if kind == "ia3":
            shape = (1, inputs) if module.endswith("down") else (outputs, 1)
            tensors[f"{path}.ia3_l"] = numbers(*shape, around=1.0)
            continue
        own = (ranks or {}).get(module, rank)
        tensors[f"{path}.lora_A.weight"] = numbers(own, inputs)
        tensors[f"{path}.lora_B.weight"] = numbers(outputs, own)
        if kind == "biased":
            tensors[f"{path}.lora_B.bias"] = numbers(outputs)
        if kind.startswith("biased") and module.endswith("up"):
            tensors[f"{path}.base_layer.bias"] = numbers(outputs)
        if kind.endswith("dora"):
            tensors[f"{path}.lora_magnitude_vector"] = np.abs(numbers(outputs, around=1.0))
    return tensors


def toy_package(
    kind: str = "lora",
    modules: Sequence[str] = tuple(SHAPES),
    *,
    rank: int = 3,
    seed: int = 0,
    base: str = NAME,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[a.AdapterFacts, a.Adapter]:
    """An adapter as its package is read; `tensors` replace or add some, or (None) drop them."""
    own = dict(_OPTIONS.get(kind, {}))
    if kind != "soft_prompt":
        own["target_modules"] = list(modules)
    if kind == "ia3":
        own["feedforward_modules"] = ["down"]
    changed = {**tensors_for(kind, modules, rank=rank, seed=seed), **(tensors or {})}
    package = expert_package(
        kind="dora" if kind.endswith("dora") else "lora" if kind in _OPTIONS else kind,
        rank=rank,
        base=base,
        config={**own, **(config or {})},
        tensors={name: tensor for name, tensor in changed.items() if tensor is not None},
        **options,
    )
    return decode(package, f"sha256:{hashlib.sha256(package).hexdigest()}")


@dataclass(frozen=True)
class Known:
    """An expert, and what it was made from."""

    expert: AdapterExpert = field(repr=False)
    kind: str
    alpha: float
    tensors: Mapping[str, Any] = field(repr=False)


def toy_expert(
    base: ToyBase,
    kind: str = "lora",
    modules: Sequence[str] = tuple(SHAPES),
    *,
    rank: int = 3,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> Known:
    tensors = tensors_for(kind, modules, rank=rank, seed=seed, ranks=ranks)
    config = {"rank_pattern": dict(ranks)} if ranks else {}
    facts, adapter = toy_package(kind, modules, rank=rank, tensors=tensors, config=config)
    folded = fold(adapter, facts, base)
    return Known(folded.build(folded.flat.clone()), kind, 2.0 * rank, tensors)


def dense(base: ToyBase, x: Tensor, mixture: Sequence[tuple[Known, float]]) -> Tensor:
    """`x` through a base into which a mixture has been merged: float64 `[n, 50]`."""
    model = ToyModel(seed=base.seed).to(base.dtype).double()
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            _merge(linear, name, mixture)
    answer: Tensor = model(x.double())
    return answer


def _merge(linear: nn.Linear, name: str, mixture: Sequence[tuple[Known, float]]) -> None:
    weight = linear.weight.clone()
    delta = torch.zeros_like(weight)
    shift = torch.zeros_like(weight[:, 0])
    inputs, outputs, biases = (torch.ones(n, dtype=torch.float64) for n in (weight.shape[1], *2 * weight.shape[:1]))
    for known, w in mixture:
        mine = {
            key.removeprefix(f"base_model.model.{name}."): torch.from_numpy(tensor).double()
            for key, tensor in known.tensors.items()
            if key.startswith(f"base_model.model.{name}.")
        }
        if not mine:
            continue
        if known.kind == "ia3":
            factors = mine["ia3_l"]
            if factors.shape[0] == 1:
                inputs += w * (factors[0] - 1)
            else:
                outputs += w * (factors[:, 0] - 1)
                biases += w * (factors[:, 0] - 1)
            continue
        rank = mine["lora_A.weight"].shape[0]
        scale = known.alpha / (math.sqrt(rank) if known.kind == "rslora" else rank)
        own = scale * mine["lora_B.weight"] @ mine["lora_A.weight"]
        if "lora_B.bias" in mine:
            shift += w * scale * mine["lora_B.bias"]
        if "base_layer.bias" in mine:
            shift += w * (mine["base_layer.bias"] - linear.bias)
        if known.kind.endswith("dora"):
            factors = mine["lora_magnitude_vector"] / (weight + own).norm(dim=1)
            outputs += w * (factors - 1)
            own *= factors[:, None]
        delta += w * own
    linear.weight.copy_((outputs[:, None] * weight + delta) * inputs)
    bias: Tensor | None = linear.bias
    linear.bias = nn.Parameter(shift if bias is None else bias * biases + shift, requires_grad=False)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within a tolerance relative to the largest number."""
    assert actual.shape == expected.shape
    largest = max(1.0, float(expected.abs().max()))
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance * largest
