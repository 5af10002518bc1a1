"""The keys that a manifest is known to have, and the shapes of their values.

`_MANIFEST` declares them. A declared key is optional, `_Due` (refused when absent) or `_Expected` (upstream's parser
insists on it; the default mode does without). Other keys are not looked at. `null` is the same as absent.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from hocket.packages.limits import Limits

LOAD_ORDER_DEFAULT: Final = 10
ITEMS_MAX: Final = 4096
"""Items of all declared lists together; published manifests have about a hundred."""


class _Kind(enum.Enum):
    TEXT = "a text"
    TAG = "a short text"
    FLAG = "true or false"
    NUMBER = "a number"
    UINT32 = "a whole number from 0 to 2^32-1"
    UINT64 = "a whole number from 0 to 2^64-1"
    OBJECT = "an object"
    NUMBERS = "an object of numbers"


@dataclass(frozen=True, slots=True)
class _Due:
    shape: _Shape


@dataclass(frozen=True, slots=True)
class _Expected:
    shape: _Shape
    instead: str = ""
    """What the default mode takes it for; empty where nothing depends on it."""


# A kind, an object with declared keys, a list of one thing, or one of several of these.
_Shape: TypeAlias = "_Kind | Mapping[str, _Shape | _Due | _Expected] | list[_Shape] | tuple[_Shape, ...]"

_TAGS: Final[list[_Shape]] = [_Kind.TAG]

_ADAPTER: Final[_Shape] = {
    "type": _Due(_Kind.TAG),
    "target_modules": _Due(_TAGS),
    "feedforward_modules": _TAGS,
    "r": _Kind.UINT32,
    "alpha": _Kind.UINT32,
    "scaling": _Kind.TAG,
    "dropout": _Kind.NUMBER,
    "use_dora": _Kind.FLAG,
    "path": _Kind.TEXT,
    "size_bytes": _Kind.UINT64,
    "sha256": _Kind.TEXT,
}

_ROPE: Final[_Shape] = {
    "type": _Expected(_Kind.TEXT),
    "factor": _Expected(_Kind.NUMBER),
    "max_position_embeddings": _Expected(_Kind.UINT32),
    "original_max_position_embeddings": _Expected(_Kind.UINT32),
    "fine_grained": _Expected(_Kind.FLAG),
}

_BASE: Final[_Shape] = {
    "name": _Kind.TEXT,
    "sha256": _Kind.TEXT,
    "hocket_base": _Kind.TEXT,
    "quantization": _Kind.TAG,
    "rope_scaling": (_Kind.TEXT, _ROPE),
    "prompt_template": _Kind.TAG,
    "adapters": [_ADAPTER],
}

_TRAINING: Final[_Shape] = {
    "dataset": _Expected(_Kind.OBJECT),
    "config": _Expected(
        {
            "method": _Expected(_Kind.TEXT),
            "adapter_type": _Expected(_Kind.TEXT),
            "target_modules": _Expected(_TAGS),
            "epochs": _Expected(_Kind.NUMBER),
            "learning_rate": _Expected(_Kind.NUMBER),
            "batch_size": _Expected(_Kind.UINT32),
            "gradient_accumulation_steps": _Expected(_Kind.UINT32),
            "warmup_steps": _Expected(_Kind.UINT32),
            "lr_scheduler": _Expected(_Kind.TEXT),
            "rank": _Kind.UINT32,
        }
    ),
    "decoding": {
        "temperature": _Kind.NUMBER,
        "top_p": _Kind.NUMBER,
        "top_k": _Kind.UINT32,
        "min_p": _Kind.NUMBER,
        "max_new_tokens": _Kind.UINT32,
        "stop_sequences": _TAGS,
        "use_grammar": _Kind.FLAG,
        "grammar_type": _Kind.TAG,
        "grammar_file": _Kind.TEXT,
        "validation": _Kind.TEXT,
    },
    "packaging_checkpoint": _Kind.TEXT,
}

_MANIFEST: Final[Mapping[str, _Shape | _Due | _Expected]] = {
    "name": _Kind.TAG,
    "version": _Kind.TAG,
    "schema_version": _Kind.TEXT,
    "description": _Due(_Kind.TEXT),
    "author": _Kind.TEXT,
    "homepage": _Kind.TEXT,
    "repository": {"type": _Expected(_Kind.TEXT), "url": _Expected(_Kind.TEXT)},
    "base_model": _BASE,
    "base_models": [_BASE],
    "adapters": [_ADAPTER],
    "soft_prompts": [
        {
            "name": _Due(_Kind.TAG),
            "path": _Due(_Kind.TEXT),
            "tokens": _Expected(_Kind.UINT32, "its `length`, or unknown"),
            "length": _Kind.UINT32,
        }
    ],
    "capabilities": _Due(_TAGS),
    "routing": {
        "keywords": _Expected([_Kind.TEXT], "empty"),
        "exclude_keywords": [_Kind.TEXT],
        "router_hint": _Kind.TEXT,
        "priority": _Kind.NUMBER,
    },
    "constraints": _Expected(
        {
            "max_chain": _Kind.UINT32,
            "load_order": _Expected(_Kind.UINT32, str(LOAD_ORDER_DEFAULT)),
            "incompatible_with": _Expected(_TAGS, "empty"),
            "requires": _Expected(_TAGS, "empty"),
        },
        f"load_order {LOAD_ORDER_DEFAULT} and no conditions",
    ),
    "dependencies": [{"name": _Due(_Kind.TAG), "version": _Kind.TAG, "optional": _Kind.FLAG}],
    "perf": {
        "latency_ms_overhead": _Expected(_Kind.NUMBER),
        "vram_mb_overhead": _Expected(_Kind.UINT32),
        "supported_batch_sizes": _Expected([_Kind.UINT32]),
    },
    "runtime": {
        "candle_compatible": _Kind.FLAG,
        "requires_kv_cache_persistence": _Kind.FLAG,
        "attention_kernel": _Kind.TEXT,
    },
    "training": _Expected(_TRAINING, "no training and no decoding"),
    "evaluation": {
        "test_set_size": _Expected(_Kind.UINT32),
        "metrics": _Expected((_Kind.OBJECT, _TAGS)),
    },
    "integrity": {
        "publisher": _Expected(_Kind.TEXT),
        "signature_algorithm": _Expected(_Kind.TEXT),
        "files": _Expected(_Kind.OBJECT),
    },
    "license": _Kind.TEXT,
    "tags": _TAGS,
}

_UPSTREAM: Final[Mapping[str, _Shape | _Due | _Expected]] = {
    **_MANIFEST,
    # Its schema allows more than its parser.
    "evaluation": {"test_set_size": _Due(_Kind.UINT32), "metrics": _Due(_Kind.NUMBERS)},
}

_PYTHON_TYPES: Final[Mapping[_Kind, type | tuple[type, ...]]] = {
    _Kind.TEXT: str,
    _Kind.TAG: str,
    _Kind.FLAG: bool,
    _Kind.NUMBER: (int, float),
    _Kind.OBJECT: dict,
}
_ENDS: Final = {_Kind.UINT32: 2**32, _Kind.UINT64: 2**64}


def check_shapes(document: Mapping[str, Any], *, upstream: bool, limits: Limits) -> list[str]:
    """Check every declared key of a manifest.

    Args:
        document: The whole manifest.
        upstream: Whether to refuse what upstream's parser insists on and is absent.
        limits: `capabilities` for lists, beside `ITEMS_MAX`; `tag_chars` and `metadata_string_chars` for texts.

    Returns:
        Warnings: what is absent and expected.

    Raises:
        HocketError: `BAD_MANIFEST` for a wrong type or an absent key; `TOO_LARGE` beyond a limit.
    """
    checker = _Checker(upstream, limits)
    checker.check(document, _UPSTREAM if upstream else _MANIFEST, "")
    return checker.warnings


class _Checker:
    def __init__(self, upstream: bool, limits: Limits) -> None:  # noqa: FBT001 - private
        self._upstream = upstream
        self._limits = limits
        self._items = 0
        self.warnings: list[str] = []

    def check(self, value: Any, shape: _Shape, path: str) -> None:  # noqa: ANN401 - a JSON value
        if not _is(value, shape):
            raise _bad(path, f"must be {_spoken(shape)}")
        if isinstance(shape, tuple):
            self.check(value, next(each for each in shape if _is(value, each)), path)
        elif isinstance(shape, Mapping):
            for key, inner in shape.items():
                self._check_member(value.get(key), inner, f"{path}.{key}" if path else key)
        elif isinstance(shape, list):
            self._check_items(value, shape[0], path)
        elif isinstance(value, str):
            chars_max = self._limits.tag_chars if shape is _Kind.TAG else self._limits.metadata_string_chars
            if len(value) > chars_max:
                raise _too_large(path, f"has {len(value)} characters; at most {chars_max} are allowed")

    def _check_items(self, items: list[Any], shape: _Shape, path: str) -> None:
        # Lists of long texts are keywords, which are cut.
        if len(items) > self._limits.capabilities and shape is not _Kind.TEXT:
            raise _too_large(path, f"has {len(items)} items; at most {self._limits.capabilities} are allowed")
        self._items += len(items)
        if self._items > ITEMS_MAX:
            raise _too_large(path, f"brings the items of all lists to more than {ITEMS_MAX}")
        for index, item in enumerate(items):
            self.check(item, shape, f"{path}[{index}]")

    def _check_member(self, value: Any, declared: _Shape | _Due | _Expected, path: str) -> None:  # noqa: ANN401
        if value is not None:
            self.check(value, declared.shape if isinstance(declared, _Due | _Expected) else declared, path)
        elif isinstance(declared, _Due) or (isinstance(declared, _Expected) and self._upstream):
            raise _bad(path, "is missing; add it")
        elif isinstance(declared, _Expected):
            read_as = f", and read as {declared.instead}" if declared.instead else ""
            self.warnings.append(f"{path} is missing{read_as}: upstream's tools refuse such a manifest")


def _bad(path: str, problem: str) -> HocketError:
    return HocketError(Reason.BAD_MANIFEST, f"{path} {problem}", field=path)


def _too_large(path: str, problem: str) -> HocketError:
    return HocketError(Reason.TOO_LARGE, f"{path} {problem}", field=path)


def _is(value: object, shape: _Shape) -> bool:
    if isinstance(shape, tuple):
        return any(_is(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list)
    if shape is _Kind.NUMBERS:
        return isinstance(value, dict) and all(_is(member, _Kind.NUMBER) for member in value.values())
    if isinstance(value, bool):
        return shape is _Kind.FLAG
    kind = _Kind.OBJECT if isinstance(shape, Mapping) else shape
    if kind in _ENDS:
        return isinstance(value, int) and 0 <= value < _ENDS[kind]
    return isinstance(value, _PYTHON_TYPES[kind])


def _spoken(shape: _Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_spoken, shape))
    if isinstance(shape, list):
        return "a list"
    return (_Kind.OBJECT if isinstance(shape, Mapping) else shape).value
