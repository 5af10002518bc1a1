"""The starter base's tokenizer: byte-level BPE in which a word is the same tokens wherever it stands.

A space is a token of its own and so is every digit. `Rome`, ` Rome` and `'Rome'` then share their tokens, and a model
of a few million parameters copies from a question into a query by repeating what it read, instead of learning for
each word how it is written after a space.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

END_OF_TEXT: Final = "<|endoftext|>"
TURN: Final = "<|im_start|>"
END_OF_TURN: Final = "<|im_end|>"
SPECIALS: Final = (END_OF_TEXT, TURN, END_OF_TURN)
"""The special tokens, as Qwen3 calls them. A token's place here is its id."""

VOCABULARY: Final = 2_048
CONTEXT: Final = 512
"""Most tokens of a prompt with its answer; what the base is trained on."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen3 has it."""

_WORDS: Final = Regex(r"\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]+")


def write_tokenizer(folder: Path, texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from texts, and write what transformers reads.

    Args:
        folder: Of the base; made if need be.
        texts: What it is learnt from.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer
