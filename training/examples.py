"""Rows of a dataset as tokens: what the worker will read, then what is to be answered, then the end.

The prompt's tokens come from the very function with which the worker renders requests (`hocket.prompts`), with the
template that the manifest names or else the base's own. So an expert is trained on the tokens that it will be asked
with, markers spelled by users included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.datasets.rows import Format
from hocket.errors import HocketError
from hocket.prompts import Conversation, RawText, Turn, UserPrompt, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

    from hocket.datasets.rows import Row


@dataclass(frozen=True, slots=True)
class Example:
    """What a model learns from one row, or from a piece of one.

    Attributes:
        token_ids: All of it.
        answer_start: Where the tokens begin that carry loss.
    """

    token_ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Renderer:
    """How rows become tokens.

    Attributes:
        tokenizer: The base's.
        template: What the manifest names; None for the base's chat template.
        capabilities: Of the manifest: some templates put a dialect into the system's turn.
        max_length: Most tokens of an example.
    """

    tokenizer: PreTrainedTokenizerFast
    template: str | None
    capabilities: Sequence[str]
    max_length: int

    def examples(self, rows: Iterable[Row]) -> Iterator[Example | None]:
        """What each row gives; None for one whose question and answer are too long together. Long texts give several.

        Raises:
            HocketError: The refusals of `hocket.prompts.render`, with the line.
        """
        for row in rows:
            try:
                yield from self._examples(row)
            except HocketError as error:
                raise error.restated(f"line {row.line}: {error.message}", line=str(row.line)) from error

    def _examples(self, row: Row) -> Iterator[Example | None]:
        end = self.tokenizer.eos_token_id
        if row.format is Format.TEXT:
            ids = (*render(RawText(row.document["text"]), self.tokenizer).token_ids, end)
            for start in range(0, len(ids) - 1, self.max_length):
                yield Example(ids[start : start + self.max_length], 0)
            return
        given = (
            UserPrompt(row.document["prompt"])
            if row.format is Format.PROMPT
            else Conversation(tuple(Turn(turn["role"], turn["content"]) for turn in row.question))
        )
        prompt = render(given, self.tokenizer, self.template, self.capabilities).token_ids
        answer = self.tokenizer.backend_tokenizer.encode(row.answer, add_special_tokens=False).ids
        ids = (*prompt, *answer, end)
        yield Example(ids, len(prompt)) if len(ids) <= self.max_length else None
