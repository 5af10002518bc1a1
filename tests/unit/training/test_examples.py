"""Rows become the tokens that the worker will read, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hocket.datasets.rows import read_rows
from hocket.errors import HocketError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainings import Workshop

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    return AutoTokenizer.from_pretrained(tiny)


def examples(shop: Workshop, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    from training.examples import Renderer  # noqa: PLC0415 - slow

    shape = {"template": None, "capabilities": (), "max_length": 256, **options}
    return list(Renderer(tokenizer, **shape).examples(read_rows(shop.data(rows=rows))))


@pytest.mark.parametrize("template", [None, "qwen3", "chatml", "llama", "alpaca"])
@pytest.mark.parametrize("text", ["who is it?", "context\n\nquestion <|im_end|> here", "Dialect: sql"])
def test_the_prompt_is_token_for_token_what_the_worker_reads(
    template: str | None, text: str, shop: Workshop, tokenizer: Any
) -> None:
    from services.expert_worker.text import UserPrompt, render  # type: ignore[attr-defined]  # as it uses them  # noqa: PLC0415 - slow

    capabilities = ["task:text2sql"]
    [example] = examples(
        shop, tokenizer, [{"prompt": text, "completion": "an answer"}], template=template, capabilities=capabilities
    )
    wanted = render(UserPrompt(text), tokenizer, template, capabilities)
    assert example.token_ids[: example.answer_start] == wanted.token_ids
    answer = example.token_ids[example.answer_start :]
    assert tokenizer.decode(answer[:-1]) == "an answer"
    assert answer[-1] == tokenizer.eos_token_id


def test_of_a_conversation_only_the_last_turn_is_learnt(shop: Workshop, tokenizer: Any) -> None:
    from services.expert_worker.text import Conversation, Turn, render  # type: ignore[attr-defined]  # as it uses them  # noqa: PLC0415 - slow

    turns = [("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "four")]]
    [example] = examples(shop, tokenizer, [{"messages": messages}])
    wanted = render(Conversation(tuple(Turn(*turn) for turn in turns)), tokenizer)
    assert example.token_ids[: example.answer_start] == wanted.token_ids
    assert tokenizer.decode(example.token_ids[example.answer_start : -1]) == "four"


def test_a_text_is_learnt_whole_in_pieces_with_one_end(shop: Workshop, tokenizer: Any) -> None:
    pieces = examples(shop, tokenizer, [{"text": "the quick brown fox " * 9}], max_length=16)
    assert len(pieces) > 2
    assert all(piece.answer_start == 0 and 0 < len(piece.token_ids) <= 16 for piece in pieces)
    whole = [token for piece in pieces for token in piece.token_ids]
    assert tokenizer.decode(whole[:-1]) == "the quick brown fox " * 9
    assert whole.index(tokenizer.eos_token_id) == len(whole) - 1


def test_a_question_that_is_too_long_with_its_answer_is_left_out(shop: Workshop, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 300, "completion": "b"}]
    assert [example is None for example in examples(shop, tokenizer, rows)] == [False, True]


def test_a_row_that_cannot_be_rendered_is_named_by_its_line(shop: Workshop, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "\ufdd0", "completion": "b"}]
    assert len(examples(shop, tokenizer, rows[:1])) == 1
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ raise_exception('no') }}{% endif %}x"
    try:
        with pytest.raises(HocketError, match="line 2"):
            examples(shop, tokenizer, [rows[0], {"prompt": "b", "completion": "c"}])
    finally:
        tokenizer.chat_template = template
