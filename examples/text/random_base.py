"""A base language model of random weights, as a Hugging Face folder: small enough to make on the spot.

    python -m examples.text.random_base /tmp/tiny-qwen3

What it writes means nothing. Everything else is as with a real base: its digest, its tokenizer and chat template, the
adapters that fit it, the arithmetic.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

END: Final = "<|im_end|>"
SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", END)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY: Final[dict[str, Any]] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
"""What the adapter in tests/vectors/peft-lora was made for."""
_SPACE: Final = "Ġ"
"""How a space is written in byte-level vocabularies."""
_SPARE_IDS: Final = 16
"""Ids that no token has: real bases have some, too."""
_WORDS: Final = (
    "the quick brown fox jumps over the lazy dog",
    "select name from people where age > 42 order by name",
    '{"key": "value", "list": [1, 2, 3]}',
    "naïve café, 東京 and 🎉 are words too",
)


def write_base(
    folder: Path,
    sizes: dict[str, Any],
    kind: str = "qwen3",
    *,
    seed: int = 0,
    chat: bool = True,
    ascii_only: bool = False,
) -> Path:
    """Write weights, configuration and tokenizer. Weights are spread so widely that tokens differ clearly.

    Args:
        folder: Made if need be.
        sizes: Of its configuration, as transformers names them; `vocab_size` among them.
        kind: Its architecture, as transformers names it: `qwen3`, `llama`, `gemma`, ...
        seed: Of the weights.
        chat: Whether it has a chat template (ChatML).
        ascii_only: Whether it hardly ever answers with pieces of other characters, which show as question marks. Of use
            with tied embeddings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(folder, sizes["vocab_size"], sizes["max_position_embeddings"], chat=chat)
    config = AutoConfig.for_model(kind, **{"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None, **sizes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # theirs
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        if ascii_only:
            others = {
                place for token, place in tokenizer.get_vocab().items() if not token.replace(_SPACE, " ").isascii()
            }
            model.get_input_embeddings().weight[[*others, *range(len(tokenizer.get_vocab()), sizes["vocab_size"])]] = 0
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, vocabulary: int, context: int, *, chat: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - _SPARE_IDS,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": SPECIALS[0],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def main() -> None:
    """Write the tiny base that the examples use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    print(f"wrote {write_base(folder, TINY, ascii_only=True)}")


if __name__ == "__main__":
    main()
