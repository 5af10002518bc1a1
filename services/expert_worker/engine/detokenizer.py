"""Tokens back into text, one at a time: whole characters only, up to the first stop text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedTokenizerFast

_UNFINISHED: Final = "\ufffd"
"""How decoders show bytes that are no character, or not yet."""
_CHARACTER_TOKENS_MAX: Final = 4
"""A character is at most four bytes of UTF-8, and a token that shows is at least one."""
_WINDOW_MAX: Final = 16
"""Tokens to decode together when none of their bytes make a character."""


class Detokenizer:
    """The text of one answer as its tokens come.

    What it releases, all in all, is the decoded answer without special tokens, cut where a stop text is first complete;
    of those that are complete at once the longest counts. A special token whose text is a stop text ends the answer as
    well. Where tokens are bytes to the decoder (SentencePiece's byte fallback), a character is shown as soon as it is
    complete, even if the bytes after it turn out to be none. transformers' clean-up of spaces, which rewrites code, is
    not done.

    Args:
        tokenizer: A fast one.
        stops: Texts that end the answer; none empty.

    Attributes:
        stopped: The stop text that has come; None as long as none has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Iterable[str] = ()) -> None:
        self.stopped: str | None = None
        self._decode = tokenizer.backend_tokenizer.decode
        self._specials = _specials(tokenizer)
        self._stops = [_Stop(text) for text in stops]
        self._window: list[int] = []
        """The newest tokens, and before them those that went out together last: decoders look at neighbours."""
        self._fresh = 0
        """Tokens at the end of the window that have come since."""
        self._waits = 0
        """Tokens in a row after which a character could have been unfinished."""
        self._sent = 0
        """Characters of the window's text that have gone out."""
        self._held = ""
        """Characters that could be the beginning of a stop text."""

    def push(self, token_id: int) -> str:
        """Take the next token of the answer, and say what may be shown now. After a stop text: nothing."""
        if self.stopped is not None:
            return ""
        special = self._specials.get(token_id)
        if special is None:
            return self._release(self._characters(token_id))
        if all(special != stop.text for stop in self._stops):
            return ""
        rest = self.finish()
        if self.stopped is None:
            self.stopped = special
        return rest

    def finish(self) -> str:
        """The answer has ended: what has been held back until now."""
        if self.stopped is not None:
            return ""
        released = self._release(self._text()[self._sent :])
        self._window, self._fresh, self._waits, self._sent = [], 0, 0, 0
        if self.stopped is None:
            released, self._held = released + self._held, ""
        return released

    def _text(self) -> str:
        text: str = self._decode(self._window, skip_special_tokens=False)
        return text

    def _characters(self, token_id: int) -> str:
        """The characters that a token completes."""
        self._window.append(token_id)
        self._fresh += 1
        text = self._text()
        whole = len(text.rstrip(_UNFINISHED))
        self._waits = self._waits + 1 if whole < len(text) else 0
        if self._waits >= _CHARACTER_TOKENS_MAX:
            whole = len(text) - 1  # only the last bytes can still become a character
        new = text[self._sent : whole]
        self._sent = max(self._sent, whole)
        if new and whole == len(text):
            self._keep(self._fresh, 0)
            self._fresh = 0
        elif len(self._window) > _WINDOW_MAX:
            self._keep(len(self._window) - self._border(text), len(text) - self._sent)
            self._fresh = min(self._fresh, len(self._window))
        return new

    def _border(self, text: str) -> int:
        """Where the window can be cut so that both sides decode to what they are together; else near its end."""
        last = len(self._window) - _CHARACTER_TOKENS_MAX
        for border in range(last, 0, -1):
            head, tail = self._window[:border], self._window[border:]
            if self._decode(head, skip_special_tokens=False) + self._decode(tail, skip_special_tokens=False) == text:
                return border
        return last

    def _keep(self, count: int, unsent: int) -> None:
        """Forget all but the last `count` tokens, of whose text `unsent` characters have not gone out."""
        del self._window[:-count]
        self._sent = max(0, len(self._text()) - unsent)

    def _release(self, text: str) -> str:
        """What may be shown of what was held back and this text."""
        held = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            ended = [stop.text for stop in self._stops if stop.ends_with(character)]
            if ended:
                self.stopped = max(ended, key=len)
                self._held = ""
                return held[: index - len(self.stopped)]
        begun = max((stop.matched for stop in self._stops), default=0)
        self._held = held[len(held) - begun :]
        return held[: len(held) - begun]


class _Stop:
    """How much of a stop text stands at the end of a text that grows (Knuth, Morris and Pratt 1977)."""

    __slots__ = ("_borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0]
        """For each beginning of the stop text: how long a shorter beginning is that ends it."""
        for character in text[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def ends_with(self, character: str) -> bool:
        """Whether the text ends with the stop text once this character is there."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.text)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)


@lru_cache(maxsize=8)
def _specials(tokenizer: PreTrainedTokenizerFast) -> Mapping[int, str]:
    """The special tokens, which are never shown: their texts by id."""
    return {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
