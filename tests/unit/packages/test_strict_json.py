from __future__ import annotations

from typing import Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.packages.strict_json import loads


def read(data: bytes, *, bytes_max: int = 2**20, depth_max: int = 8, values_max: int = 2**18) -> Any:
    return loads(data, what="manifest.json", bytes_max=bytes_max, depth_max=depth_max, values_max=values_max)


def refusal(data: bytes, **limits: int) -> Reason:
    with pytest.raises(HocketError) as error:
        read(data, **limits)
    return error.value.reason


def test_a_document_is_read_in_its_own_order() -> None:
    document = read('{"z": [1, -2.5, true, null], "a": {"é": "\\ud83d\\ude00 \\"[\\""}}'.encode())

    assert document == {"z": [1, -2.5, True, None], "a": {"é": '😀 "["'}}
    assert list(document) == ["z", "a"]


@pytest.mark.parametrize(
    ("refused", "accepted"),
    [
        (b'{"a": 1, "a": 1}', b'{"a": 1, "A": 1}'),
        (b'[{"a": {"b": 1, "b": 2}}]', b'[{"a": {"b": 1}}, {"b": 2}]'),
        (b"[NaN]", b"[null]"),
        (b"[Infinity]", b'["Infinity"]'),
        (b"[-Infinity]", b"[-1]"),
        (b"[1e999]", b"[1e99]"),
        (b"[18446744073709551616]", b"[18446744073709551615]"),
        (b"[-9223372036854775809]", b"[-9223372036854775808]"),
        (b"[" + b"9" * 100_000 + b"]", b"[" + b"9" * 19 + b"]"),
        (b'["\\ud800"]', b'["\\ud83d\\ude00"]'),
        (b'{"\\udc00": 1}', b'{"\\\\udc00": 1}'),
        (b'["\xed\xa0\x80"]', b'["\xed\x9f\xbf"]'),
        (b'["\xff"]', b'["\xc3\xbf"]'),
        (b"\xef\xbb\xbf{}", b"{}"),
        ("[]".encode("utf-16"), b"[]"),
        (b"[1,]", b"[1]"),
        (b"[1] 2", b"[1] "),
        (b"", b"0"),
        (b'["a', b'["a"]'),
        (b'["\n"]', b'["\\n"]'),
        (b"[01]", b"[0.1]"),
        (b"// why\n[]", b"\n[]"),
    ],
)
def test_what_two_readers_could_take_for_different_things_is_refused(refused: bytes, accepted: bytes) -> None:
    assert refusal(refused) is Reason.BAD_JSON
    read(accepted)


def test_size_depth_and_number_of_values_are_bounded_before_anything_is_parsed() -> None:
    assert refusal(b"[1]" + b" " * 6, bytes_max=8) is Reason.TOO_LARGE
    read(b"[1]" + b" " * 5, bytes_max=8)
    assert refusal(b'[{"a": [[1]]}]', depth_max=3) is Reason.TOO_LARGE
    assert read(b'[{"a": [1]}, "[[[[\\"[["]', depth_max=3) == [{"a": [1]}, '[[[["[[']
    assert refusal(b'[1, {"a": 2}, 3]', values_max=4) is Reason.TOO_LARGE
    read(b'[1, {"a": ",,,,"}]', values_max=4)


def test_the_message_names_the_document_and_what_is_wrong() -> None:
    with pytest.raises(HocketError, match=r"manifest\.json cannot be read: the key 'a' occurs twice"):
        read(b'{"a": 1, "b": 2, "a": 3}')
    with pytest.raises(HocketError, match=r"line 2 column 3"):
        read(b"[1\n  2]")
