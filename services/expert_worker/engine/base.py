"""A base language model out of a Hugging Face folder: its identity, its weights, its tokenizer.

The files that count for the digest are hashed first, and nothing but those is then read: the model is loaded from a
view of the folder that holds them alone. So no pickle, no code and no adapter that lies beside them can come in. What
serves is a copy in memory: files that change while it is made are noticed, and afterwards they do not matter.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import rfc8785
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from hocket.base_folder import base_name, digest_of_hashes, file_hashes
from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages.adapter import Decoding
from services.expert_worker.engine.checkpoint import (
    GENERATION,
    WEIGHTS,
    check_files,
    check_model,
    check_report,
    check_size,
    listed,
    read_config,
    read_tokenizer,
)
from services.expert_worker.engine.pages import KvShape
from services.expert_worker.engine.quantised import load_options, settle
from services.expert_worker.engine.rotary import AS_CONFIGURED, settle_rope
from services.expert_worker.engine.self_check import check_engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_QUOTED_CHARS: Final = 300


@dataclass(frozen=True, slots=True)
class Serving:
    """How a base is served, where its folder leaves that open.

    Attributes:
        dtype: float32, bfloat16 or float16; None for float32 on a CPU, and what the weights are stored as elsewhere.
        quantisation: What linear layers are kept as: `none`, `int8` or `nf4`.
        rope: How rotary positions are scaled (see `rotary`).
        context_length: Most positions of a sequence; 0 for what the base has.
    """

    dtype: torch.dtype | None = None
    quantisation: str = "none"
    rope: str = AS_CONFIGURED
    context_length: int = 0


AS_IT_IS: Final = Serving()


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A base language model, ready to compute.

    Attributes:
        model: Its name and digests, as adapters are compared with them.
        variant: Digest of the base together with how it is served: bases with the same compute the same.
        causal_lm: Of transformers; frozen, in evaluation mode, with the engine's attention.
        tokenizer: Of the same folder.
        vocabulary_sha256: Hex SHA-256 of its tokens and their ids: bases with the same mean the same by an id.
        device: Where it lies.
        dtype: Of its weights, those apart that are quantised, and of what it computes.
        quantisation: `none`, `int8` or `nf4`.
        rope: Kind of its rotary positions: `default`, `linear`, `ntk`, ...; empty for none.
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
    variant: str
    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocabulary_sha256: str
    device: torch.device
    dtype: torch.dtype
    quantisation: str
    rope: str
    hidden_size: int
    vocabulary_size: int
    context_length: int
    kv_shape: KvShape
    size_bytes: int
    eos_ids: frozenset[int]
    defaults: Decoding
    projections: Mapping[str, nn.Linear]
    has_chat_template: bool


def open_base(folder: Path, *, expected_digest: str | None, device: torch.device, serving: Serving = AS_IT_IS) -> Base:
    """Load a base. It takes as long as hashing and reading its weights; nothing is fetched from anywhere.

    Args:
        folder: A Hugging Face model directory.
        expected_digest: What the folder must hash to, `sha256:<hex>`; None takes it as it is.
        device: Where to put it.
        serving: How it is to be served.

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
            base = _load(Path(view), base_name(folder), digest, hashes, device, serving)
        _check_unchanged(folder, {name: before.get(name) for name in hashes})
        check_engine(base)
    except HocketError as error:
        if error.reason is Reason.DEVICE_MEMORY:
            raise
        raise HocketError(Reason.NOT_SERVABLE, f"the base in {folder} cannot be served: {error.message}") from error
    except torch.OutOfMemoryError as error:
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"{device} has no room for the base in {folder}: take a smaller one, half precision, or quantise it",
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
        raise _refusal(f"{listed(changed)} changed while it was read: start again once nobody writes there")


def _load(
    view: Path, name: str, digest: str, hashes: Mapping[str, str], device: torch.device, serving: Serving
) -> Base:
    check_files(view, hashes)
    config = read_config(view)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    check_model(config, model_class)
    rope = settle_rope(config, serving.rope, serving.context_length)
    weights = [file for file in hashes if file.endswith(WEIGHTS)]
    check_size(config, model_class, sum((view / file).stat().st_size for file in weights))
    dtype = torch.float32 if serving.dtype is None and device.type == "cpu" else serving.dtype
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
        **load_options(serving.quantisation, device),
    )
    check_report(report)
    if causal_lm.dtype not in _DTYPES:
        raise _refusal(f"its weights are {causal_lm.dtype}: float32, bfloat16 and float16 can be served")
    causal_lm.requires_grad_(requires_grad=False).eval()
    if device.type == "cpu":
        _own(causal_lm)
    elif serving.quantisation == "none":
        causal_lm.to(device)
    projections = {name: module for name, module in causal_lm.named_modules() if isinstance(module, torch.nn.Linear)}
    held = settle(projections.items(), causal_lm.dtype)
    vocabulary_size = causal_lm.get_input_embeddings().num_embeddings
    tokenizer = read_tokenizer(view, vocabulary_size)
    tensors = {tensor.data_ptr(): tensor for tensor in (*causal_lm.parameters(), *causal_lm.buffers(), *held)}
    return Base(
        model=BaseModel(name, digest, hashes[weights[0]] if len(weights) == 1 else None),
        variant=_variant(digest, causal_lm, serving.quantisation),
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        vocabulary_sha256=_vocabulary_sha256(tokenizer),
        device=device,
        dtype=causal_lm.dtype,
        quantisation=serving.quantisation,
        rope=rope.kind,
        hidden_size=config.hidden_size,
        vocabulary_size=vocabulary_size,
        context_length=rope.context_length,
        kv_shape=_kv_shape(config),
        size_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        eos_ids=frozenset(_eos_ids(causal_lm, tokenizer)),
        defaults=_defaults(causal_lm.generation_config),
        projections=projections,
        has_chat_template=bool(tokenizer.chat_template),
    )


def _own(causal_lm: PreTrainedModel) -> None:
    """Put a model into memory of its own.

    Where nothing had to be converted, its tensors are maps of the files until then: whoever writes to a file would
    change the model, and whoever shortens it would end the process. One after the other, so that no more than one
    tensor is there twice. What is quantised has its own memory.
    """
    for tensor in (*causal_lm.parameters(), *causal_lm.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _variant(digest: str, causal_lm: PreTrainedModel, quantisation: str) -> str:
    """Over the canonical JSON of all that decides, beside the device, what the base computes."""
    of = {
        "base": digest,
        "dtype": str(causal_lm.dtype),
        "quantisation": quantisation,
        "rope": getattr(causal_lm.config, "rope_parameters", None),
    }
    return digest_of(rfc8785.dumps(of))


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
            raise _refusal(f"its {GENERATION} has {value!r:.60} for {field}")
        found[field] = value
    return Decoding(**found)


def _refusal(why: str) -> HocketError:
    return HocketError(Reason.NOT_SERVABLE, why)
