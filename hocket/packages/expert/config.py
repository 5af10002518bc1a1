"""`adapter_config.json`: what the tensors of an adapter were trained with, as PEFT 0.21 writes it.

Two questions, apart. Is it well formed? `read_config` answers or refuses. Can the suite do what it says? `unsupported`
says why not. What changes the result and is not known here is never passed over: of the keys that PEFT has or will
have, only those listed below may hold anything.

Two things are looked at more strictly than PEFT does. Patterns of module names are compared as they are, never run as
regular expressions, because data must not bring programs. And no initialisation is accepted that changed the base
(PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), because its tensors belong to a base that nobody else has.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")

_DEPTH: Final = 16
_BIASES: Final = ("none", "all", "lora_only")
_PLAIN_NAME: Final = re.compile(r"[\w.-]+")
_TEXT_TASK: Final = "CAUSAL_LM"
_NEUTRAL_STARTS: Final = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is. EVA chooses where to start and which ranks, no more."""

_UNDERSTOOD: Final = frozenset(
    {
        # what `read_config` reads
        "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "feedforward_modules",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "num_virtual_tokens", "peft_type", "r",
        "rank_pattern", "target_modules", "use_dora", "use_rslora",
        # what `unsupported` looks at
        "init_lora_weights", "num_transformer_submodules", "task_type",
        # what says how it was trained
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "init_ia3_weights",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "num_attention_heads", "num_layers",
        "peft_version", "prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size", "revision",
        "runtime_config", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
    }
)  # fmt: skip


def read_config(data: bytes, limits: Limits = DEFAULT_LIMITS) -> AdapterConfig:
    """The configuration of an adapter. Null is the same as absent.

    Modules that are named by a regular expression are left out: the tensors show which they were. Keys that PEFT knows
    for other kinds alone are passed over, as PEFT does.

    Args:
        data: The file.
        limits: Bounds on its size, and on ranks, names and tokens.

    Raises:
        HocketError: `BAD_JSON`; `BAD_ADAPTER` for a value that PEFT could not use; `UNSUPPORTED_TYPE` for a
            `peft_type` other than LORA, IA3 and PROMPT_TUNING; `TOO_LARGE` beyond a limit.
    """
    document = _document(data, limits)
    base = _base_name(document)
    ranks = _pattern(document, "rank_pattern", lambda value, what: _count(value, what, limits.rank), limits)
    alphas = _pattern(document, "alpha_pattern", _number, limits)
    match _text(document, "peft_type"):
        case None:
            raise _bad("peft_type is absent: save the adapter with PEFT")
        case "LORA":
            return AdapterConfig(
                kind=AdapterKind.DORA if _flag(document, "use_dora") else AdapterKind.LORA,
                base_model_name=base,
                rank=_count(document.get("r"), "r", limits.rank),
                alpha=_number(document.get("lora_alpha"), "lora_alpha"),
                use_rslora=_flag(document, "use_rslora"),
                rank_pattern=ranks,
                alpha_pattern=alphas,
                target_modules=_modules(document, "target_modules", limits),
                exclude_modules=_excluded(document, limits),
                layers_to_transform=_layers(document, limits),
                layers_pattern=_layers_pattern(document, limits),
                fan_in_fan_out=_flag(document, "fan_in_fan_out"),
                bias=_bias(document),
                lora_bias=_lora_bias(document),
            )
        case "IA3":
            return AdapterConfig(
                kind=AdapterKind.IA3,
                base_model_name=base,
                target_modules=_modules(document, "target_modules", limits),
                exclude_modules=_excluded(document, limits),
                feedforward_modules=_modules(document, "feedforward_modules", limits),
                fan_in_fan_out=_flag(document, "fan_in_fan_out"),
            )
        case "PROMPT_TUNING":
            tokens = _count(document.get("num_virtual_tokens"), "num_virtual_tokens", limits.soft_prompt_tokens)
            return AdapterConfig(kind=AdapterKind.SOFT_PROMPT, base_model_name=base, token_count=tokens)
        case other:
            raise unsupported_type(other)


def unsupported(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Why the suite cannot do what a configuration says, for people; None if it can.

    Args:
        data: A file that `read_config` accepts.
        limits: Bounds on its size.

    Raises:
        HocketError: `BAD_JSON`, `BAD_ADAPTER`, `TOO_LARGE`.
    """
    document = _document(data, limits)
    return next((why for key in sorted(document) if (why := _obstacle(key, document[key])) is not None), None)


def _obstacle(key: str, value: Any) -> str | None:  # noqa: ANN401 - a JSON value
    why = None
    match key:
        case "task_type" if value not in (None, _TEXT_TASK):
            why = f"it was trained for task_type {_short(value)}: the suite serves {_TEXT_TASK} alone"
        case "feedforward_modules" if isinstance(value, str):
            why = (
                "feedforward_modules is a regular expression, and packages must not bring any: "
                "write the list of names in its place into adapter_config.json, and pack again"
            )
        case "rank_pattern" | "alpha_pattern" | "layers_pattern" if not _are_plain(value or ()):
            why = (
                f"{key} names modules by regular expressions, and packages must not bring any: "
                "write plain names into adapter_config.json, and pack again"
            )
        case "init_lora_weights" if value not in _NEUTRAL_STARTS:
            why = (
                f"init_lora_weights {_short(value)} changed the base it was trained on, so that its tensors belong to "
                "a base nobody else has: convert it to a plain LoRA (PEFT's save_pretrained can, for PiSSA, CorDA and "
                "OLoRA: path_initial_model_for_weight_conversion), or train it again"
            )
        case "num_transformer_submodules" if value not in (None, 1):
            why = "its prompt is made for a base with encoder and decoder: train it for one with a decoder alone"
        case _ if key not in _UNDERSTOOD and value:
            why = f"it was trained with {_short(key)}, which the suite cannot apply: train without it"
    return why


def unsupported_type(name: str) -> HocketError:
    """The refusal of a kind of adapter that the suite has no name for."""
    return HocketError(
        Reason.UNSUPPORTED_TYPE,
        f"adapters of type {_short(name)} are not supported: train LoRA, DoRA, IA3 or a soft prompt (prompt tuning)",
    )


def _document(data: bytes, limits: Limits) -> dict[str, Any]:
    document = strict_json.loads(data, what="adapter_config.json", bytes_max=limits.manifest_bytes, depth_max=_DEPTH)
    if not isinstance(document, dict):
        raise _bad("it is not an object")
    return document


def _base_name(document: Mapping[str, Any]) -> str | None:
    return _text(document, "base_model_name_or_path") or None


def _text(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if not isinstance(value, str | None):
        raise _bad(f"{key} is not text")
    return value


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key)
    if not isinstance(value, bool | None):
        raise _bad(f"{key} is neither true nor false")
    return bool(value)


def _count(value: object, what: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(f"{what} is not a whole number above 0")
    if value > most:
        raise HocketError(Reason.TOO_LARGE, f"adapter_config.json: {what} is {value}, more than the limit of {most}")
    return value


def _number(value: object, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _bad(f"{what} is not a number")
    return float(value)


def _are_plain(names: str | Iterable[str]) -> bool:
    """Whether none of them is a regular expression."""
    return all(_PLAIN_NAME.fullmatch(name) for name in ([names] if isinstance(names, str) else names))


def _excluded(document: Mapping[str, Any], limits: Limits) -> tuple[str, ...] | None:
    value = document.get("exclude_modules")
    return None if value and isinstance(value, str) else _modules(document, "exclude_modules", limits)


def _layers(document: Mapping[str, Any], limits: Limits) -> tuple[int, ...]:
    """Layer 0 alone is a choice, too."""
    value = document.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise _bad("layers_to_transform is neither a whole number nor a list of such")
    if len(layers) > limits.tensors:
        raise HocketError(
            Reason.TOO_LARGE, f"adapter_config.json: layers_to_transform has more than {limits.tensors} numbers"
        )
    return tuple(sorted(set(layers)))


def _layers_pattern(document: Mapping[str, Any], limits: Limits) -> tuple[str, ...]:
    """In the order in which they are tried."""
    value = document.get("layers_pattern") or []
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(name, str) and name for name in patterns):
        raise _bad("layers_pattern is neither a name nor a list of names")
    _check_names(patterns, "layers_pattern", limits)
    return tuple(patterns)


def _lora_bias(document: Mapping[str, Any]) -> bool:
    lora_bias = _flag(document, "lora_bias")
    if lora_bias and _flag(document, "use_dora"):
        raise _bad("lora_bias and use_dora exclude each other")
    return lora_bias


def _bias(document: Mapping[str, Any]) -> str:
    bias = _text(document, "bias") or "none"
    if bias not in _BIASES:
        raise _bad(f"bias is {_short(bias)}, not one of {', '.join(_BIASES)}")
    return bias


def _modules(document: Mapping[str, Any], key: str, limits: Limits) -> tuple[str, ...]:
    """A list of names in order, so that two configurations that say the same are the same; PEFT writes a set."""
    value = document.get(key) or []
    if isinstance(value, str):
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _bad(f"{key} is not a list of names")
    _check_names(value, key, limits)
    return tuple(sorted(set(value)))


def _pattern(document: Mapping[str, Any], key: str, read: Callable[[object, str], T], limits: Limits) -> dict[str, T]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(f"{key} is not an object")
    _check_names(value, key, limits)
    return {name: read(item, f"{key} of {_short(name)}") for name, item in value.items()}


def _check_names(names: list[str] | dict[str, Any], key: str, limits: Limits) -> None:
    if len(names) > limits.tensors or any(len(name) > limits.tag_chars for name in names):
        raise HocketError(
            Reason.TOO_LARGE,
            f"adapter_config.json: {key} has more than {limits.tensors} names, "
            f"or one of more than {limits.tag_chars} characters",
        )


def _short(value: object) -> str:
    return repr(value)[:60]


def _bad(why: str) -> HocketError:
    return HocketError(Reason.BAD_ADAPTER, f"adapter_config.json cannot be used: {why}")
