"""Tiny base language models with random weights, as Hugging Face folders: quick to make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN: Final = 64
LAYERS: Final = 2
VOCABULARY: Final = 384
CONTEXT: Final = 512
EOS: Final = "<|im_end|>"
_HEADER: Final = b'{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   '
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def tiny_base(folder: Path, kind: str = "qwen3", *, seed: int = 0, chat: bool = True, **changes: Any) -> Path:
    """Make a base: qwen3, qwen2 (it has biases), llama, mistral, gemma, gemma3_text; `changes` are of its sizes."""
    from examples.text.random_base import write_base  # noqa: PLC0415 - torch takes seconds, and few tests want it

    return write_base(folder, {**_SIZES, **changes}, kind, seed=seed, chat=chat)


def hollow_base(folder: Path, weights: bytes = b"abc") -> Path:
    """Make what looks like a base to whoever does not open it, with three bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b'{"model_type": "toy"}')
    (folder / "model.safetensors").write_bytes(len(_HEADER).to_bytes(8, "little") + _HEADER + weights)
    (folder / "tokenizer.json").write_bytes(b"{}")
    return folder
