"""The base's own training, on models of its size for a step or two: torch and transformers are slow to import."""

from __future__ import annotations

from itertools import islice
from random import Random
from typing import TYPE_CHECKING

import pytest

from training.starter.corpus import texts

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

WORDS = ("Rome", "1984", "singers", "naĝas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    from training.starter.tokenizer import write_tokenizer  # noqa: PLC0415 - slow

    return write_tokenizer(folder, islice(texts(Random(1)), 2_000))


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer, word: str) -> None:
    alone = tokenizer.encode(word).tokens
    for text in (f"a {word} b", f"'{word}'", f"({word})", f"{word},"):
        tokens = tokenizer.encode(text).tokens
        assert any(tokens[start : start + len(alone)] == alone for start in range(len(tokens))), text


def test_every_digit_and_every_space_is_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1984  7").tokens == ["1", "9", "8", "4", "Ġ", "Ġ", "7"]


def test_any_text_is_read_and_written_back(tokenizer: Tokenizer) -> None:
    for text in (
        "SELECT name FROM t WHERE a >= 3",
        "La ĝardeno 東京 🎉",
        "tab\tand\nline",
        *islice(texts(Random(2)), 20),
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_step_reads_what_its_number_says(tokenizer: Tokenizer) -> None:
    from training.starter.pretrain import ROWS, batch  # noqa: PLC0415 - slow
    from training.starter.tokenizer import CONTEXT  # noqa: PLC0415

    assert batch(tokenizer, 7).shape == (ROWS, CONTEXT)
    assert batch(tokenizer, 7).equal(batch(tokenizer, 7))
    assert not batch(tokenizer, 7).equal(batch(tokenizer, 8))


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    from training.starter.pretrain import rate_at  # noqa: PLC0415 - slow

    rates = [rate_at(step, 1_000) for step in range(1_000)]
    assert rates[0] == 0.01
    assert rates[100:600] == [1.0] * 500
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert rates[-1] < 0.01


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from training.starter.pretrain import Training, batch  # noqa: PLC0415 - slow

    ids = [batch(tokenizer, step)[:1, :64] for step in range(2)]
    whole, stopped = Training(tmp_path / "whole.pt"), Training(tmp_path / "stopped.pt")
    losses = [whole.learn(each, 0.5) for each in ids]
    stopped.learn(ids[0], 0.5)
    stopped.keep()
    again = Training(tmp_path / "stopped.pt")
    assert again.step == 1
    assert again.learn(ids[1], 0.5) == losses[1]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)
