"""Whether the tensors of an adapter are those that its configuration speaks of.

Names are PEFT's: `base_model.model.`, the path of a module in the base, and what the tensor does there. With rank r:

    <module>.lora_A.weight          [r, in]
    <module>.lora_B.weight          [out, r]
    <module>.lora_B.bias            [out]               with `lora_bias`
    <module>.base_layer.bias        [out]               in place of the base's, with `bias` `lora_only` or `all`
    <module>.bias                   [out]               the same where nothing else is adapted, with `all`
    <module>.lora_magnitude_vector  [out]               DoRA
    <module>.ia3_l                  [1, in] or [out, 1]  feed-forward modules, and others
    prompt_embeddings               [tokens, hidden]

The format's documents shorten some of these names (`.lora_A`, `.lora_magnitude`, `.ia3_scale`, no prefix); they are
read as PEFT's. Every tensor has to be understood, every module has to have all its tensors and to be among those that
the configuration chooses, because an adapter with a part missing still answers, only wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from hocket.errors import HocketError, Reason
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hocket.packages.adapter import RawTensor

PROMPT: Final = "prompt_embeddings"
LORA_A: Final = "lora_A.weight"
LORA_B: Final = "lora_B.weight"
LORA_BIAS: Final = "lora_B.bias"
BASE_BIAS: Final = "base_layer.bias"
BIAS: Final = "bias"
MAGNITUDE: Final = "lora_magnitude_vector"
IA3: Final = "ia3_l"

_PREFIX: Final = "base_model.model."
_PARTS: Final[dict[AdapterKind, tuple[str, ...]]] = {
    AdapterKind.LORA: (LORA_A, LORA_B),
    AdapterKind.DORA: (LORA_A, LORA_B, MAGNITUDE),
    AdapterKind.IA3: (IA3,),
    AdapterKind.SOFT_PROMPT: (),
}
_SHORTENED: Final = {
    ".lora_A": f".{LORA_A}",
    ".lora_B": f".{LORA_B}",
    ".lora_magnitude": f".{MAGNITUDE}",
    f".{MAGNITUDE}.weight": f".{MAGNITUDE}",
    ".ia3_scale": f".{IA3}",
}
"""How documents, and PEFT in memory, end names that PEFT's files end otherwise."""
_BEYOND: Final[dict[str, str]] = {
    "lora_embedding_A": "adapts the embedding table, which the suite cannot: train without it",
    "lora_embedding_B": "adapts the embedding table, which the suite cannot: train without it",
    "base_layer.weight": "is a copy of the base's weights: save the adapter with save_embedding_layers=False",
}
"""What PEFT saves besides, and why it cannot be served."""
_MATRIX: Final = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Findings:
    """What the tensors show.

    Attributes:
        rank: The largest of all modules; 0 for kinds without one.
        projections: Last part of the names of the modules they adapt, each once, in order.
        not_servable: Why they cannot serve, for people; None if they can.
        unmatched: Names in `target_modules` that no tensor adapts. That is legal (a list that serves several bases,
            `exclude_modules`), and whoever knows the base knows whether anything is missing.
    """

    rank: int = 0
    projections: tuple[str, ...] = ()
    not_servable: str | None = None
    unmatched: tuple[str, ...] = ()


def check_tensors(config: AdapterConfig, tensors: Mapping[str, RawTensor], limits: Limits = DEFAULT_LIMITS) -> Findings:
    """Compare tensors with a configuration that the suite supports.

    Raises:
        HocketError: `BAD_ADAPTER` if they do not belong together; `TOO_LARGE` beyond a limit.
    """
    if not tensors:
        raise _bad("the weights hold no tensor")
    if config.kind is AdapterKind.SOFT_PROMPT:
        _check_prompt(config, tensors)
        return Findings()
    modules: dict[str, dict[str, RawTensor]] = {}
    parts_known = parts_of(config)
    for name, tensor in tensors.items():
        for beyond, why in _BEYOND.items():
            if name.endswith(f".{beyond}"):
                return Findings(config.rank, projections_of(config.target_modules, limits), f"tensor {name} {why}")
        module, part = module_and_part(name, parts_known)
        if len(module) > limits.tag_chars:
            raise HocketError(
                Reason.TOO_LARGE, f"a module's name has {len(module)} characters, more than {limits.tag_chars}"
            )
        modules.setdefault(module, {})[part] = tensor
    adapted = [module for module, parts in modules.items() if parts.keys() != {BIAS}]
    if not adapted:
        raise _bad("the weights adapt no projection, only biases")
    unmatched = _unmatched(config, adapted)
    ranks = values_for(adapted, config.rank_pattern, config.rank)
    for module in adapted:
        _check_module(config, module, modules[module], ranks[module])
    return Findings(max(ranks.values()), projections_of(adapted, limits), unmatched=unmatched)


def as_peft_names(tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """The same tensors under the names that PEFT gives them, in order.

    Raises:
        HocketError: `BAD_ADAPTER` if two of them have the same name then.
    """
    renamed: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        full = _peft_name(name)
        if full in renamed:
            raise _bad(f"tensor {name[:200]!r} is there twice, also as PEFT spells it")
        renamed[full] = tensor
    return dict(sorted(renamed.items()))


def projections_of(modules: Iterable[str], limits: Limits) -> tuple[str, ...]:
    """Last parts of names of modules, each once, in order.

    Raises:
        HocketError: `TOO_LARGE` if there are too many to list.
    """
    found = sorted({module.rpartition(".")[2] for module in modules})
    if len(found) > limits.capabilities:
        raise HocketError(
            Reason.TOO_LARGE, f"{len(found)} kinds of modules are adapted, more than the limit of {limits.capabilities}"
        )
    return tuple(found)


def values_for(modules: Iterable[str], pattern: Mapping[str, T], default: T) -> dict[str, T]:
    """Ranks or alphas of modules: that of the first name in the pattern that a module's path ends with.

    Args:
        modules: Paths in the base, such as `model.layers.0.self_attn.q_proj`.
        pattern: `rank_pattern` or `alpha_pattern`.
        default: What holds where no name fits.
    """
    places = {name: place for place, name in enumerate(pattern)}
    values = {}
    for module in modules:
        fitting = [name for name in endings(module) if name in places]
        values[module] = pattern[min(fitting, key=places.__getitem__)] if fitting else default
    return values


def parts_of(config: AdapterConfig) -> tuple[str, ...]:
    """What tensors of an adapter may do to a module: names above, the last the shortest."""
    return (
        *_PARTS[config.kind],
        *([LORA_BIAS] if config.lora_bias else []),
        *([BASE_BIAS] if config.bias != "none" else []),
        *([BIAS] if config.bias == "all" else []),
    )


def module_and_part(name: str, parts: tuple[str, ...]) -> tuple[str, str]:
    """The path of a tensor's module in the base, and what the tensor does there.

    Args:
        name: Of the tensor.
        parts: As `parts_of` says.

    Raises:
        HocketError: `BAD_ADAPTER` for a name that PEFT does not give to tensors of such an adapter.
    """
    if name.startswith(_PREFIX):
        for part in parts:
            if name.endswith(f".{part}") and (module := name[len(_PREFIX) : -len(part) - 1]):
                return module, part
    raise _bad(f"tensor {name[:200]!r} is none that PEFT saves for this configuration")


def chosen(config: AdapterConfig, modules: Iterable[str]) -> list[str]:
    """Which of these modules a configuration chooses, as PEFT 0.21 does (`check_target_module_exists`).

    A name fits a path that is it, or ends with it after a dot. What regular expressions choose is not known here:
    without names in `target_modules` nothing is chosen, and what `exclude_modules` leaves out is chosen.

    Args:
        config: With targets by name.
        modules: Paths in the base.
    """
    targets, excluded = set(config.target_modules), set(config.exclude_modules or ())
    layers = set(config.layers_to_transform)
    patterns = {name: place for place, name in reversed([*enumerate(config.layers_pattern)])}
    return [
        module
        for module in modules
        if excluded.isdisjoint(endings(module))
        and not targets.isdisjoint(endings(module))
        and (not layers or module in targets or _layer(module, patterns) in layers)
    ]


def _layer(module: str, patterns: Mapping[str, int]) -> int | None:
    """The number in a path: the first after the first of the names that one comes after; None if there is none.

    Without names it is the first that is neither first nor second in the path. What ends a path is no number.

    Args:
        module: The path.
        patterns: Places of the names, which may be of several parts.
    """
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not patterns:
        return next((int(parts[place]) for place in numbers if place > 1), None)
    found = [
        (patterns[ending], place)
        for place in numbers
        for ending in endings(".".join(parts[:place]))
        if ending in patterns
    ]
    return int(parts[min(found)[1]]) if found else None


def _peft_name(name: str) -> str:
    if name == PROMPT:
        return name
    full = name if name.startswith(_PREFIX) else f"{_PREFIX}{name}"
    short = next((short for short in _SHORTENED if full.endswith(short)), None)
    return full if short is None else f"{full.removesuffix(short)}{_SHORTENED[short]}"


def _unmatched(config: AdapterConfig, modules: Sequence[str]) -> tuple[str, ...]:
    """Targets without tensors, once every module is known to be a target."""
    if not config.target_modules:
        return ()
    unwanted = set(modules).difference(chosen(config, modules))
    if unwanted:
        raise _bad(
            f"tensors adapt {min(unwanted)!r}, which target_modules does not name, or exclude_modules or "
            "layers_to_transform leaves out"
        )
    return tuple(sorted(set(config.target_modules).difference(*map(endings, modules))))


def _check_module(config: AdapterConfig, module: str, parts: Mapping[str, RawTensor], rank: int) -> None:
    """Whether the tensors of one module are all there and fit each other."""
    if BIAS in parts:
        raise _bad(f"{module!r} is adapted, so that PEFT calls its bias {BASE_BIAS}, not {BIAS}")
    for part in (*_PARTS[config.kind], *([LORA_BIAS] if config.lora_bias else [])):
        if part not in parts:
            raise _bad(f"{module!r} has no {part}: the weights are incomplete")
    if config.kind is AdapterKind.IA3:
        _check_factors(config, module, parts[IA3])
        return
    first, second = parts[LORA_A].shape, parts[LORA_B].shape
    if len(first) != _MATRIX or len(second) != _MATRIX:
        raise _bad(f"lora_A and lora_B of {module!r} are not matrices: {_shape(first)} and {_shape(second)}")
    if (first[0], second[1]) != (rank, rank):
        raise _bad(
            f"lora_A and lora_B of {module!r} have the shapes {_shape(first)} and {_shape(second)}, "
            f"which is not of the rank {rank} that adapter_config.json says"
        )
    if config.kind is AdapterKind.DORA and parts[MAGNITUDE].shape != (second[0],):
        raise _bad(
            f"{MAGNITUDE} of {module!r} has the shape {_shape(parts[MAGNITUDE].shape)}, "
            f"not one number for each of the {second[0]} outputs"
        )


def _check_factors(config: AdapterConfig, module: str, factors: RawTensor) -> None:
    reads = not set(config.feedforward_modules).isdisjoint(endings(module))
    shape = factors.shape
    if len(shape) != _MATRIX or shape[0 if reads else 1] != 1:
        expected = "[1, in], as for the feed-forward module it is" if reads else "[out, 1], as it is not feed-forward"
        raise _bad(f"{IA3} of {module!r} has the shape {_shape(shape)}, not {expected}")


def _check_prompt(config: AdapterConfig, tensors: Mapping[str, RawTensor]) -> None:
    for name in tensors:
        if name != PROMPT:
            raise _bad(f"tensor {name[:200]!r} is none that PEFT saves for prompt tuning")
    shape = tensors[PROMPT].shape
    if len(shape) != _MATRIX or shape[0] != config.token_count:
        raise _bad(
            f"{PROMPT} has the shape {_shape(shape)}, not one row for each of {config.token_count} virtual tokens"
        )


def endings(module: str) -> Iterator[str]:
    """The path itself, then without its first part, and so on: what a name may be to fit it."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _bad(why: str) -> HocketError:
    return HocketError(Reason.BAD_ADAPTER, f"the adapter cannot be used: {why}")
