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
