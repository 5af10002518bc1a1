"""A base language model out of a Hugging Face folder: its identity, its weights, its tokenizer.

The files that count for the digest are hashed first, and nothing but those is then read: the model is loaded from a
view of the folder that holds them alone. So no pickle, no code and no adapter that lies beside them can come in. What
serves is a copy in memory: files that change while it is made are noticed, and afterwards they do not matter.
Before the model serves, its logits through the engine's attention are compared with those through its own, and the
windows that its layers ask for with its configuration: what the engine does not understand is refused then, and never
answers wrongly.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from hocket.base_folder import base_name, digest_of_hashes, file_hashes
from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.packages.adapter import Decoding
from services.expert_worker.engine import attention
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, KvShape, default_page_positions
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.runner import NoMixer, Runner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

_WEIGHTS: Final = ".safetensors"
_INDEX: Final = "model.safetensors.index.json"
_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "config.json"
_GENERATION: Final = "generation_config.json"
_CONFIG_BYTES: Final = 2**20
_OTHER_BYTES: Final = 2**27
"""Most of a file that is no weights: vocabularies of the largest bases take a quarter."""
_JSON_DEPTH: Final = 16
_INDEX_VALUES: Final = 2**20
_LAYERS_MAX: Final = 1024
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_ROPE_TYPES: Final = {"default", "linear", "llama3", "yarn"}
"""Those in which a token's rotation is a function of its position alone."""
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
_CHECK_TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Most that the engine's logits may differ from the model's own, as a share of their norm. What rounding does is a
tenth of it or less; attention to a wrong position is of the order of 1."""
_CHECK_STRIDE: Final = 7919
_CHECK_ROWS: Final = 9
"""Of the short one of the two sequences, and of the long one after its first page."""
_LISTED_MAX: Final = 3
_QUOTED_CHARS: Final = 300


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A base language model, ready to compute.

    Attributes:
        model: Its name and digests, as adapters are compared with them.
        causal_lm: Of transformers; frozen, in evaluation mode, with the engine's attention.
        tokenizer: Of the same folder.
        vocabulary_sha256: Hex SHA-256 of its tokens and their ids: bases with the same mean the same by an id.
        device: Where it lies.
        dtype: Of its weights.
        hidden_size: Numbers of an embedding.
        vocabulary_size: Ids it has embeddings for.
        context_length: Most positions of a sequence.
        kv_shape: What it keeps of a position.
        size_bytes: What its weights take.
        eos_ids: Tokens that end an answer.
        defaults: How it wants to be sampled.
        projections: Every linear layer of it by name, `lm_head` included.
        has_chat_template: Whether the tokenizer has one.
    """

    model: BaseModel
    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocabulary_sha256: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    vocabulary_size: int
    context_length: int
    kv_shape: KvShape
    size_bytes: int
    eos_ids: frozenset[int]
    defaults: Decoding
    projections: Mapping[str, nn.Linear]
    has_chat_template: bool


def open_base(
    folder: Path, *, expected_digest: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> Base:
    """Load a base. It takes as long as hashing and reading its weights; nothing is fetched from anywhere.

    Args:
        folder: A Hugging Face model directory.
        expected_digest: What the folder must hash to, `sha256:<hex>`; None takes it as it is.
        device: Where to put it.
        dtype: float32, bfloat16 or float16; None for float32 on a CPU, and what the weights are stored as elsewhere.

    Raises:
        HocketError: `BASE_MISMATCH` if it is another base; `BAD_REQUEST` if it cannot be read, or is no model;
            `NOT_SERVABLE` if it is damaged, or something that the engine cannot serve; `DEVICE_MEMORY` if it does not
            fit on the device.
    """
    before = {path.name: _state(path) for path in folder.glob("*")}
    hashes = file_hashes(folder)
    digest = digest_of_hashes(hashes)
    if expected_digest is not None and digest != expected_digest:
        raise HocketError(
            Reason.BASE_MISMATCH,
            f"the base in {folder} is {digest}, and {expected_digest} is wanted: give the folder that was meant, or, "
            "if this one is to be trusted, its digest",
            digest=digest,
            expected=expected_digest,
        )
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    try:
        with TemporaryDirectory(prefix="hocket-base-") as view:
            for name in hashes:
                (Path(view) / name).symlink_to((folder / name).resolve())
            base = _load(Path(view), base_name(folder), digest, hashes, device, dtype)
        _check_unchanged(folder, {name: before.get(name) for name in hashes})
        _check(base)
    except HocketError as error:
        if error.reason is Reason.DEVICE_MEMORY:
            raise
        raise HocketError(Reason.NOT_SERVABLE, f"the base in {folder} cannot be served: {error.message}") from error
    except torch.OutOfMemoryError as error:
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"{device} has no room for the base in {folder}: take a smaller one, or half precision",
        ) from error
    except Exception as error:  # libraries raise anything over a folder, and it is the folder's fault
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"the base in {folder} cannot be loaded: {str(error)[:_QUOTED_CHARS]} ({type(error).__name__}); "
            "is the download complete, and the model known to this release of transformers?",
        ) from error
    return base


def _state(path: Path) -> tuple[int, ...] | None:
    """What is another number once a file has been written to or replaced; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _check_unchanged(folder: Path, before: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse files that may not be those whose hashes were taken."""
    if changed := [name for name, state in before.items() if state is None or state != _state(folder / name)]:
        raise _refusal(f"{_listed(changed)} changed while it was read: start again once nobody writes there")


def _load(
    view: Path, name: str, digest: str, hashes: Mapping[str, str], device: torch.device, dtype: torch.dtype | None
) -> Base:
    _check_files(view, hashes)
    config = _config(view)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    _check_model(config, model_class)
    _check_size(config, model_class, sum((view / name).stat().st_size for name in hashes if name.endswith(_WEIGHTS)))
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    causal_lm, report = model_class.from_pretrained(
        view,
        config=config,
        dtype=dtype or "auto",
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    _check_report(report)
    if causal_lm.dtype not in _DTYPES:
        raise _refusal(f"its weights are {causal_lm.dtype}: float32, bfloat16 and float16 can be served")
    causal_lm.requires_grad_(requires_grad=False).eval()
    _move(causal_lm, device)
    vocabulary_size = causal_lm.get_input_embeddings().num_embeddings
    tokenizer = _tokenizer(view, vocabulary_size)
    weights = [file for file in hashes if file.endswith(_WEIGHTS)]
    tensors = {tensor.data_ptr(): tensor for tensor in (*causal_lm.parameters(), *causal_lm.buffers())}
    return Base(
        model=BaseModel(name, digest, hashes[weights[0]] if len(weights) == 1 else None),
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        vocabulary_sha256=_vocabulary_sha256(tokenizer),
        device=device,
        dtype=causal_lm.dtype,
        hidden_size=config.hidden_size,
        vocabulary_size=vocabulary_size,
        context_length=config.max_position_embeddings,
        kv_shape=_kv_shape(config),
        size_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        eos_ids=frozenset(_eos_ids(causal_lm, tokenizer)),
        defaults=_defaults(causal_lm.generation_config),
        projections={name: module for name, module in causal_lm.named_modules() if isinstance(module, torch.nn.Linear)},
        has_chat_template=bool(tokenizer.chat_template),
    )


def _move(causal_lm: PreTrainedModel, device: torch.device) -> None:
    """Put a model on a device, and into memory of its own.

    Where nothing has to be converted, its tensors are maps of the files until then: whoever writes to a file would
    change the model, and whoever shortens it would end the process. One after the other, so that no more than one
    tensor is there twice.
    """
    if device.type != "cpu":
        causal_lm.to(device)  # type: ignore[arg-type]  # transformers' own annotation
        return
    for tensor in (*causal_lm.parameters(), *causal_lm.buffers()):
        tensor.data = tensor.data.clone()


def _check_files(view: Path, hashes: Mapping[str, str]) -> None:
    """Refuse files that are absurdly large, or that lead out of the folder."""
    for name in hashes:
        most = _CONFIG_BYTES if name in (_CONFIG, _GENERATION) else _OTHER_BYTES
        if not name.endswith(_WEIGHTS) and (size := (view / name).stat().st_size) > most:
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


def _config(view: Path) -> PreTrainedConfig:
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
    if (view / _GENERATION).exists():
        _json(view / _GENERATION, _CONFIG_BYTES)
    config: PreTrainedConfig = AutoConfig.from_pretrained(view, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise _refusal(f"{kind} is no decoder-only language model")
    if config.get_text_config() is not config:
        raise _refusal(f"{kind} reads more than text: give a folder of its language model alone")
    return config


def _check_model(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuse architectures, and settings of them, whose attention or positions are not the engine's."""
    if not model_class.is_backend_compatible():  # type: ignore[no-untyped-call]  # theirs
        raise _refusal(f"{model_class.__name__} computes attention in a way of its own")
    kinds = set(getattr(config, "layer_types", None) or ())
    if strange := kinds - _LAYER_TYPES:
        raise _refusal(f"it has layers of the type {_listed(strange)}; served are {_listed(_LAYER_TYPES)}")
    rope: Any = getattr(config, "rope_parameters", None) or {}
    types = {each.get("rope_type", "default") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if strange := types - _ROPE_TYPES:
        raise _refusal(
            f"its rotary positions are of the type {_listed(strange)}, which a long neighbour in the batch may change; "
            f"served are {_listed(_ROPE_TYPES)}: set rope_parameters in a copy of the folder"
        )
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        number = getattr(config, field, None)
        if not isinstance(number, int) or number < 1:
            raise _refusal(f"its configuration has {number!r:.60} for {field}")
    if config.num_hidden_layers > _LAYERS_MAX:
        raise _refusal(f"it has {config.num_hidden_layers} layers; at most {_LAYERS_MAX} are served")


def _check_size(config: PreTrainedConfig, model_class: type[PreTrainedModel], weight_bytes: int) -> None:
    """Refuse a configuration for far more weights than there are, before memory is taken for them."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > weight_bytes:
        raise _refusal(
            f"its configuration is for {count} parameters, and its weights have {weight_bytes} bytes: "
            "is the download complete?"
        )


def _check_report(report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fill the model, or that it has no place for."""
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape"),
        ("unexpected_keys", "has, and the model has no place for,"),
        ("error_msgs", "gives errors:"),
    ):
        if found := report.get(key):
            raise _refusal(
                f"the folder {what} {_listed(map(str, found))}: configuration and weights are not of one model"
            )


def _tokenizer(view: Path, vocabulary_size: int) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(view, use_fast=True, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(f"its tokenizer, {type(tokenizer).__name__}, has no fast variant")
    ids = tokenizer.get_vocab().values()
    if not ids or max(ids) >= vocabulary_size:
        raise _refusal(
            f"its tokenizer has ids up to {max(ids, default=-1)}, and the model embeddings for {vocabulary_size}"
        )
    return tokenizer


def _vocabulary_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Over the JSON list of pairs of id and token, in ascending order."""
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def _kv_shape(config: PreTrainedConfig) -> KvShape:
    heads = config.num_attention_heads
    return KvShape(
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _eos_ids(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """Of the generation settings, which take them from the configuration if need be, and the tokenizer."""
    stated = causal_lm.generation_config.eos_token_id
    yield from stated if isinstance(stated, list) else [] if stated is None else [stated]
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id


def _defaults(generation: transformers.GenerationConfig) -> Decoding:
    """How `generate` would sample, as far as the folder says so; greedily where it does not ask for sampling."""
    if not generation.do_sample:
        return Decoding(temperature=0.0)
    found: dict[str, Any] = {}
    for field, least, most in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("top_k", 0, 2**31),
        ("min_p", 0.0, 1.0),
    ):
        value = getattr(generation, field)
        if value is not None and not (
            isinstance(value, (int, float)) and math.isfinite(value) and least <= value <= most
        ):
            raise _refusal(f"its {_GENERATION} has {value!r:.60} for {field}")
        found[field] = value
    return Decoding(**found)


def _check(base: Base) -> None:
    """Refuse a model whose logits through the engine are not its own, or whose windows are not those it states.

    Two sequences; one of them goes beyond a page, in three passes, and its pages are not in order. That is shorter than
    the windows of most models, so these are compared by their sizes.
    """
    positions = default_page_positions(base.device)
    long, short = _check_ids(base, positions + _CHECK_ROWS), _check_ids(base, _CHECK_ROWS)
    reference = [_own_logits(base, long, [6, len(long) - 2, len(long) - 1]), _own_logits(base, short, [len(short) - 1])]
    base.causal_lm.set_attn_implementation(attention.NAME)
    pool = KvPool(
        base.kv_shape, page_count=SCRATCH_PAGES + 3, page_positions=positions, dtype=base.dtype, device=base.device
    )
    runner = Runner(base, pool, NoMixer())
    first = runner.run([_check_part(0, long[:7], [3, 1]), _check_part(0, short, [2])])
    found = [
        first[0],
        runner.run([_check_part(7, long[7:-1], [3, 1])])[0],
        runner.run([_check_part(len(long) - 1, long[-1:], [3, 1])])[0],
        first[1],
    ]
    wanted = torch.cat(reference)
    error = float((torch.stack(found) - wanted).norm() / wanted.norm())
    if not error <= _CHECK_TOLERANCE[base.dtype]:  # not a number, too
        raise _refusal(
            f"through the engine's attention its logits differ from its own by {error:.2g} of their norm: "
            f"{type(base.causal_lm).__name__} does something there that the engine does not know, or has bad weights"
        )
    for layer, window in sorted(runner.windows.items()):
        stated = _window(base.causal_lm.config, layer)
        if window != stated:
            raise _refusal(
                f"its configuration gives layer {layer} a sliding window of {stated} positions, and "
                f"{type(base.causal_lm).__name__} asks attention for one of {window} (None for all that came before): "
                "long texts would be answered otherwise than by the model itself"
            )


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """How many positions a layer sees, as the configuration has it; None for all."""
    window: int | None = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[layer] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _check_ids(base: Base, count: int) -> list[int]:
    return [(count + index) * _CHECK_STRIDE % base.vocabulary_size for index in range(count)]


def _check_part(start: int, ids: list[int], pages: list[int]) -> Part:
    return Part(start=start, embeddings=None, token_ids=ids, pages=pages, mixture=(), sampled=True)


def _own_logits(base: Base, ids: list[int], after: list[int]) -> Tensor:
    """`[len(after), vocabulary]`, after these rows, by the model alone."""
    given = torch.tensor([ids], device=base.device)
    logits: Tensor = base.causal_lm(
        given, use_cache=False, logits_to_keep=torch.tensor(after, device=base.device)
    ).logits
    return logits[0].float()


def _json(path: Path, bytes_max: int) -> Any:  # noqa: ANN401 - a JSON value
    return strict_json.loads(
        path.read_bytes(), what=path.name, bytes_max=bytes_max, depth_max=_JSON_DEPTH, values_max=_INDEX_VALUES
    )


def _listed(names: Iterable[str]) -> str:
    every = sorted(names)
    more = f" and {len(every) - _LISTED_MAX} more" if len(every) > _LISTED_MAX else ""
    return ", ".join(name[:_QUOTED_CHARS] for name in every[:_LISTED_MAX]) + more


def _refusal(why: str) -> HocketError:
    return HocketError(Reason.NOT_SERVABLE, why)
