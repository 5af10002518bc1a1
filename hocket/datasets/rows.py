"""Rows of a dataset file: one strict JSON object a line, in one of three formats.

`{"prompt": str, "completion": str}`, `{"messages": [{"role": str, "content": str}, ...]}` that ends with the
assistant, or `{"text": str}`: what TRL calls prompt-completion, conversational and language modelling. Other keys are
kept, and mean nothing here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.text_limits import MESSAGES_MAX, ROLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedReader
    from pathlib import Path

Progress: TypeAlias = "Callable[[int, int], None] | None"
"""What is told the bytes done, and all of them; None for nobody."""

_TOLD_EVERY_LINES: Final = 256
_SKIPPED_BYTES: Final = 2**16
_ANSWERING: Final = "assistant"
_SYSTEM: Final = "system"


class Format(StrEnum):
    """What the rows of a file are, by the key that tells."""

    PROMPT = "prompt"
    MESSAGES = "messages"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class DatasetLimits:
    """What a dataset file may be.

    Attributes:
        line_bytes: Most bytes of a line, its end not counted.
        depth: Most objects and lists inside each other.
        values: Most JSON values of a line.
        messages: Most turns of a conversation.
        rows: Most lines of a file.
        file_bytes: Most bytes of a file.
    """

    line_bytes: int = 2**20
    depth: int = 32
    values: int = 2**16
    messages: int = MESSAGES_MAX
    rows: int = 1_000_000
    file_bytes: int = 2**34


LIMITS: Final = DatasetLimits()


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        line: Its number in the file, from 1.
        offset_bytes: Where its line begins.
        raw: Its line as it is in the file, without the end.
        document: What it says, every key.
        format: How it says it.
    """

    line: int
    offset_bytes: int
    raw: bytes
    document: Mapping[str, Any]
    format: Format

    @property
    def question(self) -> tuple[Mapping[str, str], ...]:
        """The turns before the answer; of plain text none."""
        match self.format:
            case Format.PROMPT:
                return ({"role": "user", "content": self.document["prompt"]},)
            case Format.MESSAGES:
                return tuple(self.document["messages"][:-1])
            case Format.TEXT:
                return ()

    @property
    def answer(self) -> str:
        """What is learnt; of plain text nothing."""
        match self.format:
            case Format.PROMPT:
                return str(self.document["completion"])
            case Format.MESSAGES:
                return str(self.document["messages"][-1]["content"])
            case Format.TEXT:
                return ""

    @property
    def asked(self) -> str:
        """All that is read before the answer, as one text; plain text as it is."""
        if self.format is Format.TEXT:
            return str(self.document["text"])
        return "\n".join(turn["content"] for turn in self.question)


def read_rows(path: Path, *, limits: DatasetLimits = LIMITS, on_progress: Progress = None) -> Iterator[Row]:
    """The rows of a file.

    Raises:
        HocketError: As `scan_rows` yields and raises; the first refusal ends the reading.
    """
    for row in scan_rows(path, limits=limits, on_progress=on_progress):
        if isinstance(row, HocketError):
            raise row
        yield row


def scan_rows(
    path: Path, *, limits: DatasetLimits = LIMITS, on_progress: Progress = None
) -> Iterator[Row | HocketError]:
    """Every line of a file: its row, or why it is none, with `line` in the metadata.

    No line takes more memory than `limits.line_bytes` and what JSON of that size makes.

    Yields:
        `BAD_JSON` for a line that is no strict JSON; `TOO_LARGE` for one beyond a limit, and in place of all that
        follows after too many lines; `BAD_DATASET` for one that is no row, or of another format than those before;
        `BAD_DATASET` at line 1 for a file without lines.

    Raises:
        HocketError: As `open_dataset`.
    """
    tell = on_progress or (lambda _done, _total: None)
    expected: Format | None = None
    line = 0
    file, size_bytes = open_dataset(path, limits)
    with file:
        for line, (offset, raw) in enumerate(_lines(path, file, limits.line_bytes), start=1):
            if line > limits.rows:
                yield _refused(Reason.TOO_LARGE, path, line, f"there are more than {limits.rows} lines: divide it")
                return
            row = _row(path, line, offset, raw, limits)
            if isinstance(row, Row):
                expected = expected or row.format
                if row.format is not expected:
                    what = f"it is a {row.format!r} row, and those before are {expected!r}: one format a file"
                    row = _refused(Reason.BAD_DATASET, path, line, what)
            yield row
            if line % _TOLD_EVERY_LINES == 0:
                tell(offset, size_bytes)
    tell(size_bytes, size_bytes)
    if line == 0:
        yield _refused(Reason.BAD_DATASET, path, 1, "the file is empty")


def open_dataset(path: Path, limits: DatasetLimits = LIMITS) -> tuple[BufferedReader, int]:
    """Open a dataset for reading, and say how many bytes it has.

    No pipe is waited for, and no device read: only what is a file, and no larger than allowed, is opened.

    Raises:
        HocketError: `BAD_REQUEST` if it cannot be read or is no file; `TOO_LARGE` beyond `limits.file_bytes`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # the latter for a name that is none
        raise _unreadable(path, error) from error
    details = os.fstat(descriptor)
    if stat.S_ISREG(details.st_mode) and details.st_size <= limits.file_bytes:
        return os.fdopen(descriptor, "rb"), details.st_size
    os.close(descriptor)
    if not stat.S_ISREG(details.st_mode):
        raise HocketError(Reason.BAD_REQUEST, f"{path} is no file: give a file of JSON lines")
    raise HocketError(
        Reason.TOO_LARGE, f"{path} has {details.st_size} bytes, and at most {limits.file_bytes} are read: divide it"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a dataset, `sha256:<hex>`.

    Raises:
        HocketError: As `open_dataset`.
    """
    file, _ = open_dataset(path)
    with file:
        try:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise _unreadable(path, error) from error


def row_at(path: Path, offset_bytes: int, line: int, limits: DatasetLimits = LIMITS) -> Row:
    """One row again, from where it was.

    Raises:
        HocketError: As `read_rows`; the file may have changed.
    """
    file, _ = open_dataset(path, limits)
    with file:
        file.seek(offset_bytes)
        raw = _line(path, file, limits.line_bytes + 2).rstrip(b"\r\n")
    row = _row(path, line, offset_bytes, raw, limits)
    if isinstance(row, HocketError):
        raise row
    return row


def stratum(row: Row, key: str) -> str:
    """What a row has under a key, as text.

    Raises:
        HocketError: `BAD_DATASET` if it has no such key.
    """
    if key not in row.document:
        raise HocketError(
            Reason.BAD_DATASET, f"line {row.line} has no {key[:64]!r}: every row needs it here", line=str(row.line)
        )
    value = row.document[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _lines(path: Path, file: BufferedReader, bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line without its end; of one that is too long `bytes_max + 1` bytes."""
    offset = 0
    while line := _line(path, file, bytes_max + 2):
        whole = line.removesuffix(b"\n").removesuffix(b"\r")
        yield offset, whole[: bytes_max + 1]
        offset += len(line)
        while not line.endswith(b"\n") and (line := _line(path, file, _SKIPPED_BYTES)):
            offset += len(line)


def _line(path: Path, file: BufferedReader, bytes_max: int) -> bytes:
    try:
        return file.readline(bytes_max)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | ValueError) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, f"cannot read {path}: {getattr(error, 'strerror', error)}")


def _row(path: Path, line: int, offset: int, raw: bytes, limits: DatasetLimits) -> Row | HocketError:
    if not raw.strip():
        return _refused(Reason.BAD_DATASET, path, line, "it is empty")
    try:
        document = strict_json.loads(
            raw, what="it", bytes_max=limits.line_bytes, depth_max=limits.depth, values_max=limits.values
        )
    except HocketError as error:
        what = f"it is longer than {limits.line_bytes} bytes" if len(raw) > limits.line_bytes else error.message
        return _refused(error.reason, path, line, what)
    found = _format(document, limits)
    if isinstance(found, Format):
        return Row(line, offset, raw, document, found)
    return _refused(Reason.BAD_DATASET, path, line, found)


def _format(document: Any, limits: DatasetLimits) -> Format | str:  # noqa: ANN401 - a JSON value
    """Which format a document has, or what is wrong with it."""
    if not isinstance(document, dict):
        return "it is no JSON object"
    present = [each for each in Format if each in document]
    if len(present) != 1:
        has = f"it has {' and '.join(map(repr, map(str, present)))}" if present else "it has none of them"
        return f"a row has 'prompt' and 'completion', or 'messages', or 'text': {has}"
    [found] = present
    problem = {
        Format.PROMPT: lambda: _text_problem(document, "prompt") or _text_problem(document, "completion"),
        Format.MESSAGES: lambda: _messages_problem(document["messages"], limits.messages),
        Format.TEXT: lambda: _text_problem(document, "text"),
    }[found]()
    return problem or found


def _text_problem(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if not isinstance(value, str):
        return f"{key!r} is {'missing' if value is None else 'no text'}"
    return None if value.strip() else f"{key!r} is empty"


def _messages_problem(messages: Any, count_max: int) -> str | None:  # noqa: ANN401 - a JSON value
    if not isinstance(messages, list):
        return "'messages' is no list"
    if len(messages) > count_max:
        return f"it has {len(messages)} messages; at most {count_max} are allowed"
    for place, message in enumerate(messages):
        if problem := _message_problem(place, message):
            return f"message {place}: {problem}"
    if len(messages) < 2 or messages[-1]["role"] != _ANSWERING:  # noqa: PLR2004 - a question and its answer
        return "the assistant must have the last word, after a question"
    return None


def _message_problem(place: int, message: Any) -> str | None:  # noqa: ANN401 - a JSON value
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        return "it must have 'role' and 'content', and nothing else"
    role = message["role"]
    if role not in ROLES:
        return f"the role {role!r:.40} is none: roles are {', '.join(ROLES)}"
    if role == _SYSTEM and place:
        return "the system speaks first or not at all"
    return _text_problem(message, "content")


def _refused(reason: Reason, path: Path, line: int, what: str) -> HocketError:
    return HocketError(reason, f"{path.name}, line {line}: {what}", line=str(line), file=str(path))
