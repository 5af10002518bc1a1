"""Requests become tokens: a template puts turns into the form that a model was trained with.

Which template: the one that the heaviest expert's package names, else the base's own chat template. The packages' were
never written down as chat templates; they are those of the tools that made the packages' training data, for one turn.
With more turns, each is put the same way, one after the other; where a template has no place for a system text or for
tools, a system text stands where its family of models has it, and a tool speaks as the user does.

Nobody speaks in another role by writing markers. What would be a token of its own (`<|im_start|>`), or a marker of the
template, is spelled letter by letter where it stands in somebody's text: the same text, but not the same tokens. What a
chat template puts together into a marker from pieces of what was said is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

import jinja2
from tokenizers import AddedToken, Tokenizer, models

from hocket.errors import HocketError, Reason
from hocket.text_limits import LAST_ROLES, MESSAGES_MAX, ROLES, TEXT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerFast

BASE: Final = "base"
"""Name of the base's own chat template."""
SINGLE_TURN: Final = "single_turn"
"""Name of the same around the last turn alone: for experts that were trained on single questions."""
NONE: Final = "none"
"""Name of no template at all."""
_WORDS_MAX: Final = 200
"""Characters of others' words in a refusal."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""What stands around a marker that somebody wrote, until it is spelled: Unicode keeps them for such inner uses."""
_MARKS: Final = re.compile(f"({_OPEN}[^{_OPEN}{_CLOSE}]*{_CLOSE})")
_WORD: Final = re.compile(r"\S+")
_MARKED: Final = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one party says.

    Attributes:
        role: One of `ROLES`.
        content: Their text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class UserPrompt:
    """One turn of a user; goes into a template if there is one.

    Attributes:
        text: What they say.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; go into a template.

    Attributes:
        turns: In order; the last one is a user's or a tool's.
    """

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class RawText:
    """Text that the model reads as it is, markers included.

    Attributes:
        text: All of it, but for a token with which the tokenizer begins every text.
    """

    text: str


Input: TypeAlias = UserPrompt | Conversation | RawText


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads.

    Attributes:
        token_ids: At least one.
        template: What it was put into: a package template by its name, `base`, or `none`.
        stops: Markers of a package template, with which another turn would begin: the answer ends before them.
    """

    token_ids: tuple[int, ...]
    template: str
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Form:
    """How turns become text.

    Attributes:
        name: As in `Prompt.template`.
        write: Turns to text.
        source: Where its markers are found.
        stops: As in `Prompt.stops`.
        has_begin: Whether it writes the token itself with which the tokenizer begins every text.
    """

    name: str
    write: Callable[[Sequence[Turn]], str]
    source: str = ""
    stops: tuple[str, ...] = ()
    has_begin: bool = False


def render(
    given: Input, tokenizer: PreTrainedTokenizerFast, template: str | None = None, capabilities: Sequence[str] = ()
) -> Prompt:
    """Turn an input into tokens.

    A token with which the tokenizer begins every text comes first, unless the base's chat template decides that, or a
    raw text has it already. A megabyte takes up to a second, most of it without Python's lock: not for an event loop.

    Args:
        given: What a request says.
        tokenizer: The base's, a fast one.
        template: What the heaviest expert's package names, in any case: `qwen3`; `chatml` or `qwen`; `llama` or
            `llama2`; `alpaca`; `single_turn` for the base's chat template around the last turn, and the system's,
            alone. Others, and None, leave it to the base's chat template; without that, a prompt stays as it is.
        capabilities: That package's: they decide on the dialect in a system text.

    Raises:
        HocketError: BAD_REQUEST with the field (`input.conversation.messages[2].role`) for what the contract does not
            allow, what the chat template refuses or makes a marker of, what gives no token, and for a conversation
            where there is no template; TOO_LARGE for more than `TEXT_BYTES_MAX`.
    """
    field, _ = _check(given)
    begin = tokenizer.bos_token_id if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else None
    if isinstance(given, RawText):
        form = _Form(NONE, lambda turns: turns[0].content)
        (ids,) = _encode(tokenizer, [given.text])
    else:
        turns = given.turns if isinstance(given, Conversation) else (Turn("user", given.text),)
        form = _form(given, tokenizer, template, capabilities, begin)
        guard = _Guard(tokenizer, form)
        said = [Turn(turn.role, guard.mark(turn.content)) for turn in turns]
        written = form.write(said)
        if form.name in (BASE, SINGLE_TURN):  # others put nothing said beside anything else said, and leave none out
            guard.check(written, form.write([Turn(turn.role, _neutral(turn.content)) for turn in said]), field)
        ids = guard.encode(written, field)
    if begin is not None and not form.has_begin and ids[:1] != [begin]:
        ids = [begin, *ids]
    if not ids:
        raise HocketError(Reason.BAD_REQUEST, "the text gives no token: say something", field=field)
    return Prompt(tuple(ids), form.name, form.stops)


def check_size(given: Input, tokenizer: PreTrainedTokenizerFast, context_length: int) -> None:
    """Return unless an input is longer than the context in any case, however few tokens it takes. Quick.

    Args:
        given: What a request says.
        tokenizer: The base's.
        context_length: Positions that prompt and answer may take.

    Raises:
        HocketError: TOO_LARGE; as `render` for what the contract does not allow.
    """
    field, size_bytes = _check(given)
    token_count = -(-size_bytes // longest_token_bytes(tokenizer))
    if token_count >= context_length:
        raise HocketError(
            Reason.TOO_LARGE,
            f"{size_bytes} bytes of text are at least {token_count} tokens; the context has {context_length} with the "
            "answer: shorten it",
            field=field,
        )


@lru_cache(maxsize=8)
def longest_token_bytes(tokenizer: PreTrainedTokenizerFast) -> int:
    """Bytes of text that one token stands for at most: not fewer, where tokens are written otherwise than text."""
    return max(len(token.encode()) for token in tokenizer.get_vocab())


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The tokens of each text. Without Python's lock, so that other threads go on, and without places in the text."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # as its file may say
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _check(given: Input) -> tuple[str, int]:
    """The field that an input came in, and the bytes of its text, if it is as the contract says."""
    if isinstance(given, Conversation):
        field, texts = "input.conversation.messages", [turn.content for turn in given.turns]
        _check_turns(given.turns, field)
    else:
        field, texts = "input.prompt" if isinstance(given, UserPrompt) else "input.raw", [given.text]
    try:
        size_bytes = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise HocketError(
            Reason.BAD_REQUEST, "the text holds half a surrogate pair: send valid Unicode", field=field
        ) from error
    if size_bytes > TEXT_BYTES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"{size_bytes} bytes of text: send at most {TEXT_BYTES_MAX}", field=field)
    return field, size_bytes


def _check_turns(turns: Sequence[Turn], field: str) -> None:
    if not 0 < len(turns) <= MESSAGES_MAX:
        raise HocketError(
            Reason.BAD_REQUEST, f"a conversation of {len(turns)} messages: send 1 to {MESSAGES_MAX}", field=field
        )
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"no role {turn.role[:_WORDS_MAX]!r}: use one of {', '.join(ROLES)}",
                field=f"{field}[{index}].role",
            )
    if turns[-1].role not in LAST_ROLES:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"the last message is the {turns[-1].role}'s: let it be a user's or a tool's",
            field=f"{field}[{len(turns) - 1}].role",
        )


def _form(
    given: Input,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    capabilities: Sequence[str],
    begin: int | None,
) -> _Form:
    """The template for an input."""
    name = _ALIASES.get((template or "").lower(), (template or "").lower())
    if name in _MARKERS:
        border = (tokenizer.eos_token or "") + (tokenizer.bos_token if begin is not None else "")
        write = {
            "qwen3": lambda turns: _qwen3(turns, _dialect(capabilities), alone=isinstance(given, UserPrompt)),
            "chatml": lambda turns: _chatml(turns, _dialect(capabilities)),
            "llama": lambda turns: _llama(turns, border),
            "alpaca": _alpaca,
        }[name]
        return _Form(name, write, "".join(_MARKERS[name]), _MARKERS[name])
    source = tokenizer.chat_template
    if isinstance(source, dict):  # several, by purpose
        source = source.get("default")
    if source and name == SINGLE_TURN:
        return _Form(name, lambda turns: _base(_single(turns), tokenizer, source), source, has_begin=True)
    if source:
        return _Form(BASE, lambda turns: _base(turns, tokenizer, source), source, has_begin=True)
    if isinstance(given, Conversation):
        raise HocketError(
            Reason.BAD_REQUEST,
            "this base has no chat template for a conversation: send a prompt or raw text, or ask an expert whose "
            "package names a template",
            field="input.conversation",
        )
    return _Form(NONE, lambda turns: turns[0].content)


def _single(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The last turn, after the system's if there is one."""
    return turns[-1:] if len(turns) == 1 or turns[0].role != "system" else (turns[0], turns[-1])


def _base(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """The base's own chat template, which transformers runs in a sandbox."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        words = _unmarked(str(error))[:_WORDS_MAX] or type(error).__name__
        raise HocketError(
            Reason.BAD_REQUEST, f"the base's chat template refuses this: {words}", field="input"
        ) from error
    return str(text)


_NEUTRAL: Final = "You are a helpful assistant."
_DIALECT: Final = "Dialect:"
_DIALECTS: Final = {
    "cypher": ("cypher", "neo4j"),
    "sql": ("sql", "postgres", "mysql"),
    "json": ("json",),
    "python": ("python",),
    "rust": ("rust",),
    "typescript": ("typescript", "javascript"),
}
"""What a capability has to contain; the first that one does is the dialect."""
_ALIASES: Final = {"qwen": "chatml", "llama2": "llama"}
_MARKERS: Final = {
    "qwen3": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "chatml": ("<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
    "llama": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "alpaca": ("### Instruction:", "### Response:"),
}
"""Of the package templates. `chatml` is what packages mean by it, not what others call ChatML: that is `qwen3`."""


def _dialect(capabilities: Sequence[str]) -> str | None:
    """What a system text says about the dialect; None for plain text."""
    written = " ".join(capabilities).lower()
    for dialect, words in _DIALECTS.items():
        if any(word in written for word in words):
            return f"{_DIALECT} {dialect}"
    return None


def _system(context: str | None, dialect: str | None) -> Turn:
    """The system's turn: the context if there is one, and before it the dialect unless it names one itself."""
    if context is None:
        return Turn("system", dialect or _NEUTRAL)
    if dialect is None or context.startswith(_DIALECT):
        return Turn("system", context)
    return Turn("system", f"{dialect}\n{context}")


def _led(turns: Sequence[Turn], dialect: str | None) -> list[Turn]:
    """The turns with the system's first, and tools as users."""
    heard = [Turn("user", turn.content) if turn.role == "tool" else turn for turn in turns]
    if heard[0].role == "system":
        return [_system(heard[0].content, dialect), *heard[1:]]
    return [_system(None, dialect), *heard]


def _qwen3(turns: Sequence[Turn], dialect: str | None, *, alone: bool) -> str:
    """ChatML. Of a prompt that stands alone, what comes before the first blank line is the system's context.

    That is how packages' data was made, from one text each. The turns of a conversation say who speaks themselves.
    """
    said = turns[0].content
    context, _, question = said.partition("\n\n")
    led = _led(turns, dialect)
    if alone and context.strip() and question.strip():
        led = [_system(context, dialect), Turn("user", question)]
    elif alone and said.startswith(_DIALECT):
        led[0] = Turn("system", said)
    written = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in led)
    return f"{written}<|im_start|>assistant\n"


def _chatml(turns: Sequence[Turn], dialect: str | None) -> str:
    said = "".join(f"<|{turn.role}|>\n{turn.content}\n<|end|>\n" for turn in _led(turns, dialect))
    return f"{said}<|assistant|>\n"


def _llama(turns: Sequence[Turn], border: str) -> str:
    """Llama 2's. A system text stands within the user's turn after it; `border` is what ends an answer."""
    said = ""
    system = ""
    for turn in turns:
        if turn.role == "system":
            system = f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
        elif turn.role == "assistant":
            said += f" {turn.content} {border}"
        else:
            said += f"[INST] {system}{turn.content} [/INST]"
            system = ""
    return said


def _alpaca(turns: Sequence[Turn]) -> str:
    frames = {"system": "{}\n\n", "assistant": "{}\n\n"}
    return "".join(
        frames.get(turn.role, "### Instruction:\n{}\n\n### Response:\n").format(turn.content) for turn in turns
    )


class _Guard:
    """Keeps what is said apart from the markers of a form.

    Marks what would be a marker in what is said, and spells it letter by letter when the written form becomes tokens.
    Without any, the tokens are those of the whole text.

    Args:
        tokenizer: The base's.
        form: What is going to be written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, form: _Form) -> None:
        self._tokenizer = tokenizer
        self._scanner, self._control_ids = _scanner(tokenizer, form.source, form.stops)
        self._found: set[str] = set()
        self._inner: dict[str, list[int]] = {}

    def mark(self, said: str) -> str:
        """What somebody says, with its markers marked. What marks them is no text, and left out."""
        said = _unmarked(said)
        (seen,) = self._scanner.encode_batch([said])  # unlike `encode` without Python's lock
        pieces, end = [], 0
        for number, (start, stop) in zip(seen.ids, seen.offsets, strict=True):
            if number:
                self._found.add(said[start:stop])
                pieces += [said[end:start], _OPEN, said[start:stop], _CLOSE]
                end = stop
        return "".join([*pieces, said[end:]])

    def check(self, written: str, neutral: str, field: str) -> None:
        """Return unless what was said adds markers to a written form.

        Marking finds what is a marker in one text. A form can make others: from the end of one text and the beginning
        of the next, or by leaving something out between.

        Args:
            written: The form.
            neutral: The same of what says nothing.
            field: Where it came from.

        Raises:
            HocketError: BAD_REQUEST.
        """
        if self._markers(written) - self._markers(neutral):
            raise HocketError(
                Reason.BAD_REQUEST,
                "the template makes a marker of its own from pieces of what is said: leave out what looks like one",
                field=field,
            )

    def _markers(self, written: str) -> Counter[int]:
        """How often each marker stands in a written form, but for those that are going to be spelled."""
        pieces = [piece for piece, is_said in self._pieces(written) if not is_said]
        return Counter(number for seen in self._scanner.encode_batch(pieces) for number in seen.ids if number)

    def _pieces(self, written: str) -> list[tuple[str, bool]]:
        """The pieces of a written form in order, and whether each is a marker that was said: these stand between marks.

        The same letters may also stand beside marks, made by a template: that is a marker of the form, and not said.
        """
        pieces = _MARKED.split(written)  # every other one stood between marks, or is None for a lone mark
        return [(piece or "", index % 2 == 1 and piece in self._found) for index, piece in enumerate(pieces)]

    def encode(self, written: str, field: str) -> list[int]:
        """The tokens of a written form.

        Raises:
            HocketError: BAD_REQUEST if the tokenizer makes a marker even of single letters.
        """
        (first, _), *pieces = self._pieces(written)
        (ids,) = _encode(self._tokenizer, [first])
        inner: set[str] = set()
        for piece, is_said in pieces:
            inner.update(piece if is_said else [piece] if piece else ())
        self._prepare(sorted(inner))
        for piece, is_said in pieces:
            if is_said:
                spelled = [token_id for letter in piece for token_id in self._inner[letter]]
                if not self._control_ids.isdisjoint(spelled):
                    raise HocketError(
                        Reason.BAD_REQUEST,
                        f"{piece[:_WORDS_MAX]!r} is a token of its own, and cannot be spelled as text: leave it out",
                        field=field,
                    )
                ids += spelled
            elif piece:
                ids += self._inner[piece]
        return ids

    def _prepare(self, texts: list[str]) -> None:
        """Work out the tokens of texts that others come before.

        Some tokenizers put a space before the first word of every text: it does not get one after a line feed.
        """
        newline, *after = _encode(self._tokenizer, ["\n", *(f"\n{text}" for text in texts)])
        alone = [text for text, ids in zip(texts, after, strict=True) if ids[: len(newline)] != newline]
        self._inner = {text: ids[len(newline) :] for text, ids in zip(texts, after, strict=True)}
        self._inner |= dict(zip(alone, _encode(self._tokenizer, alone), strict=True))


@lru_cache(maxsize=16)
def _scanner(
    tokenizer: PreTrainedTokenizerFast, source: str, markers: tuple[str, ...]
) -> tuple[Tokenizer, frozenset[int]]:
    """What finds markers in a text, and the ids of those that are tokens.

    Markers are: special tokens; other tokens of their own that the form's source writes, or that look as if it could
    put them together (`<|...|>`), but not white space; and the form's own words. The scanner finds them exactly where
    the tokenizer would, each as an id above 0.
    """
    tokens = {
        token_id: token
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or (not token.content.isspace() and (token.content in source or token.content.startswith("<|")))
    }
    scanner = Tokenizer(models.WordLevel({"?": 0}, "?"))
    if tokenizer.backend_tokenizer.normalizer is not None:
        scanner.normalizer = tokenizer.backend_tokenizer.normalizer
    scanner.add_tokens([*tokens.values(), *(AddedToken(marker, normalized=False) for marker in markers)])
    return scanner, frozenset(tokens)


def _neutral(marked: str) -> str:
    """A text that says nothing; white space and markers stay as they are, since templates look for some."""
    pieces = _MARKS.split(marked)
    pieces[::2] = [_WORD.sub("a", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")
