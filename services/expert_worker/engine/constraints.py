"""What an answer in text must be: JSON of a schema, or a text of a grammar, compiled for the tokens of one base.

llguidance does the work: it parses what has been answered, and says which tokens may come next. Compiling takes
milliseconds, hostile texts may take seconds; it happens in a thread of its own, and what is compiled is kept.

Copies of what is compiled share the states of its lexer, which grow with the texts they see, up to a limit at which
all of them fail. So after some answers it is compiled anew, and nobody fails for what others have been answered.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.lark import HEADER, to_lark
from services.expert_worker.engine.schemas import bad_schema, explained, read_schema
from services.expert_worker.tokenising import SmallestFirst

if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedTokenizerFast

_KEPT_MAX: Final = 32
"""Constraints that are kept compiled."""
_ANSWERS_MAX: Final = 100
"""Answers after which a constraint is compiled anew."""
_LIMITS: Final = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)
"""A state takes some 2 KB; published grammars have hundreds."""
_JSON_OPTIONS: Final = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r" |\r?\n[ \t]{0,16}",
    "json_allowed_escapes": r"nrbtf\"",
}
r"""Nothing of a schema is left out; blanks are those that JSON writers write, so that a model spends few tokens on
them; and no name of a property can be spelled in a second way (`\u0061`), in which llguidance would not know it
again."""
_JSON_EXTENSION: Final = "x-guidance"
"""Where a schema says that; its own would loosen it."""
_QUOTED_CHARS: Final = 200
_NO_REASON: Final = "NoExtensionBias"
"""What it says where no token may come next."""


class ConstraintKind(StrEnum):
    """What a constraint is written in."""

    JSON_SCHEMA = auto()
    GBNF = auto()


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be.

    Attributes:
        kind: What it is written in.
        text: The schema or grammar.
    """

    kind: ConstraintKind
    text: str


class Matcher:
    """How far one answer has come in its constraint. For one thread at a time.

    Args:
        matcher: Of llguidance; its own.
        kind: What the constraint is written in.
    """

    __slots__ = ("_kind", "_matcher")

    def __init__(self, matcher: LLMatcher, kind: ConstraintKind) -> None:
        self._matcher = matcher
        self._kind = kind

    def allowed(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tokens that may come next, the ones that end the answer among them where it may end: bits, lowest first.

        Raises:
            HocketError: `BAD_GRAMMAR` or `BAD_SCHEMA` if finding out takes more than the limits allow, or nothing may.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or not mask.any():
            raise _refusal(self._kind, f"the answer cannot go on: {_said(self._matcher)}")
        return mask

    def advance(self, token_id: int) -> None:
        """A token has been chosen. One that was not allowed is told by `allowed`."""
        self._matcher.consume_token(token_id)


class Constraints:
    """Constraints for the tokens of one base, compiled and kept. For one event loop.

    Args:
        tokenizer: The base's.
        eos_ids: Tokens by which the model says that it has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._thread = SmallestFirst("constraints")
        self._kept: OrderedDict[Constraint, _Kept] = OrderedDict()

    def stop(self) -> None:
        """End its thread."""
        self._thread.stop()

    async def matcher(self, constraint: Constraint) -> Matcher:
        """A constraint at the beginning of an answer.

        Raises:
            HocketError: `BAD_GRAMMAR`, `BAD_SCHEMA`; `NOT_SERVABLE` if the base's tokens allow no constraints;
                `QUEUE_FULL` if too many wait to be compiled.
        """
        kept = self._kept.pop(constraint, None)
        if kept is None or not kept.answers_left:
            compile_ = partial(self._compile, constraint)
            kept = _Kept(asyncio.ensure_future(self._thread.run(len(constraint.text), compile_)))
            kept.compiled.add_done_callback(partial(self._note, constraint))
        self._kept[constraint] = kept
        if len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)
        kept.answers_left -= 1
        compiled = await asyncio.shield(kept.compiled)  # others may wait for it
        if isinstance(compiled, HocketError):
            raise compiled.restated(compiled.message)  # its own each: raising one changes it
        return Matcher(compiled.deep_copy(), constraint.kind)

    def _note(self, constraint: Constraint, compiled: asyncio.Future[LLMatcher | HocketError]) -> None:
        """Keep a refusal, which would come again; but not that there was no room for the work."""
        if compiled.cancelled() or compiled.exception() is not None:
            self._kept.pop(constraint, None)

    # What follows runs in the thread.

    def _compile(self, constraint: Constraint) -> LLMatcher | HocketError:
        kind = constraint.kind
        try:
            grammar = _GRAMMARS[kind](constraint.text)
            matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        except HocketError as error:
            return error
        if matcher.is_error():
            said = _said(matcher)
            return _refusal(kind, explained(said, constraint.text) if kind is ConstraintKind.JSON_SCHEMA else said)
        # Here, and not when the engine waits: the first one takes longest.
        begins = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        begins[[*self._eos_ids]] = 0
        if matcher.is_error() or not begins.any():
            return _refusal(kind, f"no answer could begin: {_said(matcher, 'what begins never ends')}")
        return matcher

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The tokens as bytes; a second of work for a large vocabulary."""
        if not self._eos_ids:
            raise HocketError(
                Reason.NOT_SERVABLE,
                "no answer of this base can be constrained: it does not say by which token answers end (eos_token_id)",
            )
        tokenizer = self._tokenizer
        count = 1 + max(tokenizer.get_vocab().values())
        try:
            return LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=count, eos_token=sorted(self._eos_ids))
        except ValueError as error:
            raise HocketError(
                Reason.NOT_SERVABLE, f"no answer of this base can be constrained: its tokenizer: {error}"
            ) from error


@dataclass(slots=True, eq=False)
class _Kept:
    """A constraint that is compiled, or being compiled, or refused."""

    compiled: asyncio.Future[LLMatcher | HocketError]
    answers_left: int = _ANSWERS_MAX


def _grammar(text: str) -> str:
    grammar: str = LLMatcher.grammar_from_lark(to_lark(text))
    return grammar


def _json_grammar(text: str) -> str:
    return f"{HEADER}\nstart: %json {json.dumps(read_schema(text) | {_JSON_EXTENSION: _JSON_OPTIONS})}"


_GRAMMARS: Final = {ConstraintKind.JSON_SCHEMA: _json_grammar, ConstraintKind.GBNF: _grammar}


def _refusal(kind: ConstraintKind, why: str) -> HocketError:
    if kind is ConstraintKind.GBNF:
        return HocketError(Reason.BAD_GRAMMAR, f"the grammar cannot be used: {why}")
    return bad_schema(why)


def _said(matcher: LLMatcher, otherwise: str = "no token may come next") -> str:
    """Why llguidance does not go on, in its words; `otherwise` if they say nothing to a reader."""
    said = matcher.get_error().partition("<state>")[0].partition("\n   1 | ")[0]  # where it lists what it read
    said = " ".join(said.rpartition("failed to compile JSON schema: ")[2].split())
    return otherwise if not said or said.startswith(_NO_REASON) else said[:_QUOTED_CHARS]
