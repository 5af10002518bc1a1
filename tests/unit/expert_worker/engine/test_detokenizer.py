from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.expert_worker.engine.detokenizer import Detokenizer
from tests.tokenizers import END, byte_level, sentence_piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerFast

SNIPPETS = st.sampled_from(
    ["the ", "🎉", "👩‍👩‍👧", "東京", "é", "e\u0301", "\ufffd", "\n", "a", "ab", "  ", "<|im_end|", "x"]
)
STOPS = st.lists(
    st.sampled_from(["the", "ab", "aab", "🎉🎉", "東", "\n", "京é", "<|", "a", "e\u0301", "\ufffd\ufffd"]), max_size=4
)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(added=["<think>"])


@pytest.fixture(scope="module")
def words_tokenizer() -> PreTrainedTokenizerFast:
    return sentence_piece()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def bytes_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token a byte, as GPT-2 names them: itself if it shows, else the next free letter from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: byte for byte in shown}
    for byte in range(256):
        letters.setdefault(byte, 256 + len(letters) - len(shown))
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[chr(letters[byte])] for byte in data]


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token a byte."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[f"<0x{byte:02X}>"] for byte in data]


def cut(text: str, stops: Iterable[str]) -> tuple[str, str | None]:
    """The text up to the first stop text, and that; plainly."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


def told(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stops: Sequence[str] = ()
) -> tuple[list[str], str | None]:
    """What is released with each token, and at the end."""
    detokenizer = Detokenizer(tokenizer, stops)
    released = [detokenizer.push(token_id) for token_id in ids]
    return [*released, detokenizer.finish()], detokenizer.stopped


@settings(max_examples=150, deadline=None)
@given(data=st.data(), stops=STOPS)
def test_what_is_released_is_the_decoded_answer_up_to_the_first_stop_text(
    bytes_tokenizer: PreTrainedTokenizerFast, data: st.DataObject, stops: list[str]
) -> None:
    text = st.lists(SNIPPETS, max_size=12).map(lambda pieces: ids_of(bytes_tokenizer, "".join(pieces)))
    noise = st.lists(st.integers(0, len(bytes_tokenizer) - 1), max_size=30)
    ids = data.draw(
        st.one_of(text, noise, st.tuples(text, noise, text).map(lambda parts: [*parts[0], *parts[1], *parts[2]]))
    )
    released, stopped = told(bytes_tokenizer, ids, stops)
    assert ("".join(released), stopped) == cut(decoded(bytes_tokenizer, ids), stops)


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(SNIPPETS.filter(lambda piece: piece != "\ufffd"), max_size=12), stops=STOPS)
def test_so_it_is_where_words_begin_with_their_space_and_bytes_are_tokens(
    words_tokenizer: PreTrainedTokenizerFast, pieces: list[str], stops: list[str]
) -> None:
    ids = ids_of(words_tokenizer, "".join(pieces))
    released, stopped = told(words_tokenizer, ids, stops)
    assert ("".join(released), stopped) == cut(decoded(words_tokenizer, ids), stops)


def test_a_character_is_released_with_the_token_that_completes_it(
    bytes_tokenizer: PreTrainedTokenizerFast, words_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [*ids_of(bytes_tokenizer, "x"), *bytes_ids(bytes_tokenizer, "😀".encode())]
    assert told(bytes_tokenizer, ids)[0] == ["x", "", "", "", "😀", ""]
    ids = [*ids_of(words_tokenizer, "the"), *byte_tokens(words_tokenizer, "東😀".encode())]
    assert told(words_tokenizer, ids)[0] == ["the", "", "", "東", "", "", "", "😀", ""]


def test_bytes_that_are_no_character_show_as_such_and_do_not_pile_up(
    bytes_tokenizer: PreTrainedTokenizerFast, words_tokenizer: PreTrainedTokenizerFast
) -> None:
    garbage = random.Random(0).choices(range(128, 256), k=400)
    for tokenizer, ids in (
        (bytes_tokenizer, bytes_ids(bytes_tokenizer, bytes(garbage))),
        (words_tokenizer, byte_tokens(words_tokenizer, bytes(garbage))),
    ):
        detokenizer = Detokenizer(tokenizer)
        text = ""
        for count, token_id in enumerate(ids, 1):
            text += detokenizer.push(token_id)
            assert len(detokenizer._window) <= 16
            assert len(text) >= (count - 16) / 4
        text += detokenizer.finish()
        assert text.count("\ufffd") > 100
    assert "".join(told(bytes_tokenizer, bytes_ids(bytes_tokenizer, bytes(garbage)))[0]) == decoded(
        bytes_tokenizer, bytes_ids(bytes_tokenizer, bytes(garbage))
    )


def test_text_comes_again_after_bytes_that_are_no_character(words_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*byte_tokens(words_tokenizer, b"\xff" * 40), *ids_of(words_tokenizer, "the a")]
    assert "".join(told(words_tokenizer, ids)[0]).endswith("the a")


def test_what_could_begin_a_stop_text_is_held_back_until_it_is_none(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [token_id for letter in "xaabaaby" for token_id in ids_of(bytes_tokenizer, letter)]
    assert told(bytes_tokenizer, ids, ["aabaac", "aaby"]) == (["x", "", "", "", "", "", "aab", "", ""], "aaby")
    assert told(bytes_tokenizer, ids[:-1], ["aabaac"]) == (["x", "", "", "", "", "", "aab", "aab"], None)


def test_the_stop_text_that_is_complete_first_counts_and_then_the_longest(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = ids_of(bytes_tokenizer, "xabcd")
    assert told(bytes_tokenizer, ids, ["abcd", "bc"])[1] == "bc"
    assert told(bytes_tokenizer, ids, ["c", "abc"])[1] == "abc"


def test_nothing_comes_after_a_stop_text(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    released, stopped = told(bytes_tokenizer, ids_of(bytes_tokenizer, "x\nthe fox"), ["\n"])
    assert released[0] == "x"
    assert not any(released[1:])
    assert stopped == "\n"


def test_special_tokens_are_not_shown_and_others_are(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(bytes_tokenizer, f"a{END}<think>b")
    assert "".join(told(bytes_tokenizer, ids)[0]) == "a<think>b"


def test_a_special_token_whose_text_is_a_stop_text_ends_the_answer(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [
        *ids_of(bytes_tokenizer, "a<"),
        *bytes_ids(bytes_tokenizer, b"\xf0\x9f"),
        *ids_of(bytes_tokenizer, f"{END}b"),
    ]
    released, stopped = told(bytes_tokenizer, ids, [END])
    assert ("".join(released), stopped) == ("a<\ufffd", END)


def test_a_stop_text_that_comes_out_just_before_a_special_one_counts(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*ids_of(bytes_tokenizer, "a"), *bytes_ids(bytes_tokenizer, b"\xf0\x9f"), *ids_of(bytes_tokenizer, END)]
    assert told(bytes_tokenizer, ids, [END, "\ufffd"]) == (["a", "", "", "", ""], "\ufffd")
