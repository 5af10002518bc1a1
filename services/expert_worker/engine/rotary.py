"""Rotary positions (RoPE): which a base has, and how its context is made longer than it was trained for.

Whatever is chosen becomes rope parameters of the configuration, from which transformers' own model then computes its
frequencies. With b = rope_theta, d = the rotated numbers of a head, L = the native context, s = how many times longer:

    linear         positions / s
    ntk            b' = b s^(d/(d-2))
    ntk-by-parts   slow frequencies / s, fast ones as they are, a ramp between them
    yarn           the same, and cosines and sines times 0.1 ln(s) + 1
    llama3         slow frequencies / s, fast ones as they are, a ramp by wavelength (Llama 3.1's: factors 1 and 4)

Two kinds of a configuration depend on the longest text of a batch, and are settled for the context that is served:

    dynamic        b' = b (s n/L - (s - 1))^(d/(d-2)), with the context for n: as the model has it for texts so long
    longrope       the long factors if the context is longer than the original one, else the short ones

Formulas: Chen et al. 2023 (arXiv:2306.15595), Peng et al. 2023 (arXiv:2309.00071), Ding et al. 2024 (arXiv:2402.13753).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AS_CONFIGURED: Final = "auto"
_CHOICE: Final = re.compile(r"(linear|ntk-by-parts|ntk|yarn|llama3)(?:-([1-9][0-9]{0,4})k)?")
_KILO: Final = 1024
_POSITIONS_MAX: Final = 2**24
"""Beyond, float32 does not tell a position from the next one."""
_FIXED: Final = {"default", "linear", "llama3", "yarn"}
"""Kinds in which a token's rotation is a function of its position alone."""
_SETTLED: Final = {"dynamic", "longrope"}
_KEYS: Final = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
}
"""Those of plain and dynamic parameters. Others are an architecture's own."""
_SLIDING: Final = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary positions of a base, settled.

    Attributes:
        kind: `default`, `linear`, `yarn`, ...; those of layers that differ are joined by `+`; empty for none.
        context_length: Most positions of a sequence.
    """

    kind: str
    context_length: int


def check_rope(rope: str, context_length: int) -> None:
    """Return if these can be settings.

    Raises:
        ValueError: If they cannot.
    """
    found = _CHOICE.fullmatch(rope)
    if rope != AS_CONFIGURED and found is None:
        raise ValueError(
            f"rope must be auto, linear, ntk, ntk-by-parts, yarn or llama3, the latter with -<N>k if they are to say "
            f"how long the context is, not {rope!r}"
        )
    if context_length < 0:
        raise ValueError("context_length must be 0 (as long as the base has it) or more")
    if max(context_length, _length(found)) > _POSITIONS_MAX:
        raise ValueError(f"a context has at most {_POSITIONS_MAX} positions ({_POSITIONS_MAX // _KILO}k)")
    if found is not None and bool(found[2]) == bool(context_length):
        raise ValueError(f"rope is {rope!r}: say either there (-<N>k) or with context_length how long the context is")


def settle_rope(config: PreTrainedConfig, rope: str, context_length: int) -> Rope:
    """Write into a configuration how positions are rotated.

    Args:
        config: Of the base; its rope parameters change.
        rope: What `check_rope` accepts.
        context_length: Most positions of a sequence; 0 for what the base has.

    Raises:
        HocketError: `NOT_SERVABLE` if the base has other rotary positions than can be served or scaled, or none, or the
            context would be longer than they reach.
    """
    native = config.max_position_embeddings
    found = _CHOICE.fullmatch(rope)
    every = _parameters(config)
    kinds = {each["rope_type"] for each in every.values()}
    if strange := kinds - _FIXED - _SETTLED:
        raise _refusal(f"its rotary positions are of the kind {', '.join(sorted(strange))}, which is not served")
    length = _length(found) or context_length or native
    if found is None or length <= native:
        reach = max([native, *(_reach(each, native) for each in every.values())])
        if length > reach:
            raise _refusal(f"context_length is {length}, and its positions reach {reach}: choose a worker.rope as well")
        for each in every.values():
            _freeze(each, config, length)
        return Rope("+".join(sorted(kinds)), length)
    if kinds != {"default"} or any(each.keys() - _KEYS for each in every.values()):
        raise _refusal(
            f"worker.rope is {rope}, and its configuration has {' and '.join(sorted(kinds)) or 'no'} rotary positions, "
            "which cannot be scaled: leave it at auto"
        )
    factor = length / native
    for layers, each in every.items():
        if layers != _SLIDING:  # what those see is never far apart
            _scale(each, found[1], factor, config)
    return Rope(found[1], length)


def _length(choice: re.Match[str] | None) -> int:
    """The context that a choice says; 0 if it does not."""
    return int(choice[2]) * _KILO if choice is not None and choice[2] else 0


def _parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The rope parameters by type of layer; those of all layers under an empty name."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    every = {"": rope} if "rope_type" in rope else rope
    return {layers: each for layers, each in every.items() if isinstance(each, dict)}


def _reach(rope: dict[str, Any], native: int) -> int:
    """How many positions parameters are meant for; longrope's, as many as the model says."""
    if rope["rope_type"] == "longrope":
        return native
    return int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or native))


def _freeze(rope: dict[str, Any], config: PreTrainedConfig, length: int) -> None:
    """Settle parameters that depend on the longest text of a batch."""
    if rope["rope_type"] == "dynamic":
        if own := rope.keys() - _KEYS:
            raise _refusal(f"its dynamic rotary positions have {', '.join(sorted(own))}, which is not known here")
        factor, native = rope["factor"], config.max_position_embeddings
        stretch = factor * max(length, native) / native - (factor - 1)
        rope |= {"rope_type": "default", "rope_theta": _ntk_theta(rope, config, stretch)}
    elif rope["rope_type"] == "longrope":
        which = "long" if length > rope["original_max_position_embeddings"] else "short"
        for what in ("factor", "mscale"):  # the latter is Phi-3.5-MoE's
            if (chosen := rope.get(f"{which}_{what}")) is not None:
                rope |= {f"long_{what}": chosen, f"short_{what}": chosen}


def _scale(rope: dict[str, Any], kind: str, factor: float, config: PreTrainedConfig) -> None:
    """Make the context so many times longer."""
    native = config.max_position_embeddings
    if kind == "ntk":
        rope |= {"rope_theta": _ntk_theta(rope, config, factor)}
        return
    rope |= {"factor": factor, "rope_type": kind}
    if kind != "linear":
        rope |= {"original_max_position_embeddings": native}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind == "ntk-by-parts":
        rope |= {"rope_type": "yarn", "attention_factor": 1.0}
    if getattr(config, "head_dim", 0) is None:  # Mixtral's: transformers multiplies by it for YaRN
        config.head_dim = _head_dim(config)


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _ntk_theta(rope: dict[str, Any], config: PreTrainedConfig, stretch: float) -> float:
    rotated = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    return float(rope["rope_theta"] * stretch ** (rotated / (rotated - 2)))


def _refusal(why: str) -> HocketError:
    return HocketError(Reason.NOT_SERVABLE, why)
