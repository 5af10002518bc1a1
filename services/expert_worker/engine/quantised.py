"""A base whose linear layers are kept in 8 or 4 bits, by bitsandbytes. Embeddings, norms and `lm_head` are not.

    int8   a scale for each row of a weight; inputs are rounded to int8 as well, row by row
    nf4    a scale for each block of 64 numbers, kept in 8 bits itself (QLoRA's double quantisation)

Outliers of inputs are not computed apart (`llm_int8_threshold` is 0): which columns hold some is decided over the whole
batch, and what a text computes would depend on others.

On a processor with AVX512-BF16 an nf4 layer lays its weight out anew the first time it computes, for a kernel of its
own, and from then on neither moves nor reads as before. So all of them compute once while the base is opened, nothing
moves afterwards, and `weight_of` is the one way to read a weight.
"""

from __future__ import annotations

import copy
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import structlog
import torch

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

_log: Final = structlog.get_logger("worker")
_OUTPUTS_MULTIPLE: Final = 32
_INPUTS_MULTIPLE: Final = 64
"""Of the kernel for processors with AVX512-BF16."""


def load_options(quantisation: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` has to be told; nothing for `none`.

    Args:
        quantisation: `none`, `int8` or `nf4`.
        device: Where the base goes: it is quantised there, and never moves again.

    Raises:
        HocketError: `NOT_SERVABLE` if bitsandbytes is not installed.
    """
    if quantisation == "none":
        return {}
    _bitsandbytes()
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 - seconds, and workers without a base do not need it

    how: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if quantisation == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how)  # type: ignore[no-untyped-call]  # theirs
    return {"quantization_config": config, "device_map": {"": device}}


def settle(projections: Iterable[tuple[str, nn.Linear]], dtype: torch.dtype) -> list[Tensor]:
    """Have every quantised layer compute once: from then on it stays as it is.

    Args:
        projections: The linear layers of a base by name, those that are not quantised among them.
        dtype: What the base computes in.

    Returns:
        Scales and tables that they hold beside their weights.

    Raises:
        HocketError: `NOT_SERVABLE` for a shape that the processor's kernel cannot compute.
    """
    held: list[Tensor] = []
    quantised = {name: each for name, each in projections if not each.weight.is_floating_point()}
    if not quantised:
        return held
    bnb = _bitsandbytes()
    _check_kernel({name: each for name, each in quantised.items() if isinstance(each, bnb.nn.Linear4bit)})
    module: Any
    for module in quantised.values():
        is_nf4 = isinstance(module, bnb.nn.Linear4bit)
        if is_nf4:
            module.compute_dtype = dtype
        with torch.inference_mode():
            module(torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device))
        state = module.weight.quant_state if is_nf4 else module.state
        held += _tensors(state) + _tensors(getattr(state, "state2", None))
    return held


def weight_of(projection: nn.Linear) -> Tensor:
    """The weight that a layer multiplies by, `[out, in]`: its own, or what its few bits stand for, in float32.

    Args:
        projection: Of a base; if it is quantised, `settle` has seen it.
    """
    if projection.weight.is_floating_point():
        return projection.weight
    bnb = _bitsandbytes()
    module: Any = projection
    if not isinstance(module, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.state.SCB)
        return weight
    numbers, state = module.weight.data, copy.copy(module.weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False  # else it would round the scales once more
        unpacked = bnb.functional._convert_weight_packed_for_cpu_inverse  # noqa: SLF001 - no other knows the layout
        numbers, state = unpacked(numbers, state)
        state.absmax = state.absmax.T.flatten().float()
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(numbers, state)  # type: ignore[no-any-return]  # theirs


def _check_kernel(projections: Mapping[str, nn.Linear]) -> None:
    """Return if nf4 layers can be computed where they lie."""
    if not any(projection.weight.device.type == "cpu" for projection in projections.values()):
        return
    if not _bitsandbytes().functional.has_avx512bf16():
        _log.warning("nf4 is slower than float32 on this processor, which has no AVX512-BF16")
        return
    for name, projection in projections.items():
        if projection.out_features % _OUTPUTS_MULTIPLE or projection.in_features % _INPUTS_MULTIPLE:
            raise HocketError(
                Reason.NOT_SERVABLE,
                f"{name} has {projection.in_features} inputs and {projection.out_features} outputs, and nf4 on this "
                f"processor needs multiples of {_INPUTS_MULTIPLE} and {_OUTPUTS_MULTIPLE}: take int8 or none",
            )


def _tensors(state: object) -> list[Tensor]:
    return [each for each in getattr(state, "__dict__", {}).values() if isinstance(each, torch.Tensor)]


def _bitsandbytes() -> Any:  # noqa: ANN401 - it has no types
    """The library, quiet, and without the package `kernels`, with which it would fetch code when it is imported.

    Raises:
        HocketError: `NOT_SERVABLE` if it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says on every call what it is made for
    try:
        if "bitsandbytes" in sys.modules:
            import bitsandbytes  # noqa: PLC0415 - an extra
        else:
            with _without("kernels"):
                import bitsandbytes  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise HocketError(
            Reason.NOT_SERVABLE,
            "base_quantisation needs bitsandbytes, which is not installed: pip install 'hocket[quantised]'",
        ) from error
    return bitsandbytes


@contextmanager
def _without(name: str) -> Iterator[None]:
    """A block in which a module cannot be imported."""
    modules: dict[str, Any] = sys.modules
    before = modules.get(name, modules)
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        if before is not modules:
            modules[name] = before
