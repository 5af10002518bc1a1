"""Tiny base language models with random weights, as Hugging Face folders: for tests, and quick to make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN: Final = 64
LAYERS: Final = 2
VOCABULARY: Final = 384
CONTEXT: Final = 512
EOS: Final = "<|im_end|>"
SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", EOS)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: Final = (
    "the quick brown fox jumps over the lazy dog",
    "select name from people where age > 42 order by name",
    '{"key": "value", "list": [1, 2, 3]}',
    "naïve café, 東京 and 🎉 are words too",
)
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def tiny_base(folder: Path, kind: str = "qwen3", *, seed: int = 0, chat: bool = True, **changes: Any) -> Path:
    """Make a base in `folder`: weights, configuration, tokenizer. Weights are wide enough that tokens differ clearly.

    Args:
        folder: Made if need be.
        kind: `model_type` of transformers: qwen3, qwen2 (biases), llama, mistral, gemma...
        seed: Of the weights.
        chat: Whether it has a chat template (ChatML).
        **changes: Of its configuration.
    """
    import torch  # noqa: PLC0415 - seconds, and few tests want it
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(kind, **{**_COMMON, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # theirs
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                torch.nn.init.normal_(tensor, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.1)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, safe_serialization=True)
    _save_tokenizer(folder, chat=chat)
    return folder


def _save_tokenizer(folder: Path, *, chat: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,  # a few ids have no token, as in real bases
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": SPECIALS[0],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
