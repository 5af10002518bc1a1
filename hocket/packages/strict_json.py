"""JSON from strangers: one meaning per document, and no more memory or time than its size allows.

Python's parser lets the last of two equal keys win, reads `NaN`, turns large exponents into infinity and passes lone
surrogates on. Here all of that is refused (RFC 8259 section 4 and 8, RFC 7493), and depth and number of values are
counted before anything is parsed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # one that never ends runs to the end
_BRACKETS: Final = b"[]{}"
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(_BRACKETS))
_STEP: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_INTEGER_CHARS: Final = 20
_INTEGERS: Final = range(-(2**63), 2**64)


def loads(
    data: bytes, *, what: str, bytes_max: int, depth_max: int, values_max: int = DEFAULT_LIMITS.metadata_values
) -> Any:  # noqa: ANN401 - a JSON value
    """Parse one JSON document.

    Args:
        data: UTF-8 without byte order mark.
        what: What the document is called in messages, such as `manifest.json`.
        bytes_max: Most bytes.
        depth_max: Most objects and lists inside each other, the outermost being 1.
        values_max: Most values at all depths together: each costs far more memory than bytes.

    Returns:
        str, int (64 bits), float (finite), bool, None, list, and dict in document order.

    Raises:
        HocketError: `BAD_JSON` for anything but one document of unambiguous meaning; `TOO_LARGE` beyond a bound.
    """
    if len(data) > bytes_max:
        raise HocketError(Reason.TOO_LARGE, f"{what} has {len(data)} bytes; at most {bytes_max} are allowed")
    _check_structure(data, what, depth_max, values_max)
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_object(what),
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
    except UnicodeDecodeError as error:
        raise _bad(what, f"byte {error.start} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise _bad(what, "it has half of a surrogate pair") from error
    except ValueError as error:
        raise _bad(what, str(error)) from error
    return value


def _bad(what: str, problem: str) -> HocketError:
    return HocketError(Reason.BAD_JSON, f"{what} cannot be read: {problem}")


def _check_structure(data: bytes, what: str, depth_max: int, values_max: int) -> None:
    structure = _STRING.sub(b"", data)
    brackets = structure.translate(None, _ALL_BUT_BRACKETS)
    if max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0) > depth_max:
        raise HocketError(Reason.TOO_LARGE, f"{what} is nested more than {depth_max} deep")
    # The first value in a bracket comes with the bracket, each further one with a comma.
    if 1 + structure.count(b",") + structure.count(b"[") + structure.count(b"{") > values_max:
        raise HocketError(Reason.TOO_LARGE, f"{what} has more than {values_max} values")


def _object(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise _bad(what, f"the key {twice[:64]!r} occurs twice in one object")
        return members

    return build


def _integer(text: str) -> int:
    if len(text) > _INTEGER_CHARS or (value := int(text)) not in _INTEGERS:
        raise ValueError(f"the integer {text[:24]} does not fit 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is not finite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
