"""The files of a Hugging Face folder, and what they may hold: refusals before memory is taken, or a model built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS: Final = ".safetensors"
GENERATION: Final = "generation_config.json"
_INDEX: Final = "model.safetensors.index.json"
_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "config.json"
_CONFIG_BYTES: Final = 2**20
_OTHER_BYTES: Final = 2**27
"""Most of a file that is no weights: vocabularies of the largest bases take a quarter."""
_JSON_DEPTH: Final = 16
_INDEX_VALUES: Final = 2**20
_LAYERS_MAX: Final = 1024
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
_LISTED_MAX: Final = 3
_QUOTED_CHARS: Final = 300


def check_files(view: Path, hashes: Mapping[str, str]) -> None:
    """Refuse files that are absurdly large, or that lead out of the folder."""
    for name in hashes:
        most = _CONFIG_BYTES if name in (_CONFIG, GENERATION) else _OTHER_BYTES
        if not name.endswith(WEIGHTS) and (size := (view / name).stat().st_size) > most:
            raise _refusal(f"{name} has {size} bytes, and at most {most} are read")
    if _TOKENIZER not in hashes:
        raise _refusal(
            f"it has no {_TOKENIZER}: save it there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if _INDEX in hashes:
        index = _json(view / _INDEX, _OTHER_BYTES)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) and name in hashes for name in files.values()):
            raise _refusal(f"{_INDEX} names weights that are not in the folder: is the download complete?")


def read_config(view: Path) -> PreTrainedConfig:
    """The configuration, once it is known to be one of a model that transformers itself can build."""
    written = _json(view / _CONFIG, _CONFIG_BYTES)
    kind = written.get("model_type") if isinstance(written, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        advice = (
            "it brings its own code, which is never run"
            if "auto_map" in (written or ())
            else "is transformers new enough?"
        )
        raise _refusal(f"transformers {transformers.__version__} does not know the model_type {kind!r:.60}: {advice}")
    if "quantization_config" in written or "compression_config" in written:
        raise _refusal("it is stored quantised: give the folder with its weights in float32, bfloat16 or float16")
    if (view / GENERATION).exists():
        _json(view / GENERATION, _CONFIG_BYTES)
    config: PreTrainedConfig = AutoConfig.from_pretrained(view, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise _refusal(f"{kind} is no decoder-only language model")
    if config.get_text_config() is not config:
        raise _refusal(f"{kind} reads more than text: give a folder of its language model alone")
    return config


def check_model(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuse architectures, and settings of them, whose attention or positions are not the engine's."""
    if not model_class.is_backend_compatible():  # type: ignore[no-untyped-call]  # theirs
        raise _refusal(f"{model_class.__name__} computes attention in a way of its own")
    kinds = set(getattr(config, "layer_types", None) or ())
    if strange := kinds - _LAYER_TYPES:
        raise _refusal(f"it has layers of the type {listed(strange)}; served are {listed(_LAYER_TYPES)}")
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        number = getattr(config, field, None)
        if not isinstance(number, int) or number < 1:
            raise _refusal(f"its configuration has {number!r:.60} for {field}")
    if config.num_hidden_layers > _LAYERS_MAX:
        raise _refusal(f"it has {config.num_hidden_layers} layers; at most {_LAYERS_MAX} are served")


def check_size(config: PreTrainedConfig, model_class: type[PreTrainedModel], weight_bytes: int) -> None:
    """Refuse a configuration for far more weights than there are, before memory is taken for them."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > weight_bytes:
        raise _refusal(
            f"its configuration is for {count} parameters, and its weights have {weight_bytes} bytes: "
            "is the download complete?"
        )


def check_report(report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fill the model, or that it has no place for."""
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape"),
        ("unexpected_keys", "has, and the model has no place for,"),
        ("error_msgs", "gives errors:"),
    ):
        if found := report.get(key):
            raise _refusal(
                f"the folder {what} {listed(map(str, found))}: configuration and weights are not of one model"
            )


def read_tokenizer(view: Path, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer, once it is known to be a fast one with an embedding for each of its ids."""
    tokenizer = AutoTokenizer.from_pretrained(view, use_fast=True, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(f"its tokenizer, {type(tokenizer).__name__}, has no fast variant")
    ids = tokenizer.get_vocab().values()
    if not ids or max(ids) >= vocabulary_size:
        raise _refusal(
            f"its tokenizer has ids up to {max(ids, default=-1)}, and the model embeddings for {vocabulary_size}"
        )
    return tokenizer


def _json(path: Path, bytes_max: int) -> Any:  # noqa: ANN401 - a JSON value
    return strict_json.loads(
        path.read_bytes(), what=path.name, bytes_max=bytes_max, depth_max=_JSON_DEPTH, values_max=_INDEX_VALUES
    )


def listed(names: Iterable[str]) -> str:
    """Some names for a message: the first ones, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - _LISTED_MAX} more" if len(every) > _LISTED_MAX else ""
    return ", ".join(name[:_QUOTED_CHARS] for name in every[:_LISTED_MAX]) + more


def _refusal(why: str) -> HocketError:
    return HocketError(Reason.NOT_SERVABLE, why)
