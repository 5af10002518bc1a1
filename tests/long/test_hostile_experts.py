"""Every flipped bit and truncation of small `.expert` packages, and every attack we know: refused, or harmless."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason, Situation
from hocket.packages import Policy, TrustRoots, open_package
from hocket.packages.adapter import AdapterFacts
from hocket.packages.expert.archive import read_archive
from tests import archives, experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hocket.packages import Package

pytestmark = pytest.mark.long

ONE_LAYER: dict[str, Any] = {"rank": 1, "modules": ("k_proj",)}
FILES = experts.expert_files(tensors=experts.adapter_tensors(layers=1, **ONE_LAYER), **ONE_LAYER)
TAR = b"".join(archives.member(name.encode(), content) for name, content in FILES.items()) + archives.END
PACKAGES = {
    "gzip": archives.gzipped(TAR),
    "zstd": archives.zstd(TAR, told=True),
    "zip": archives.zip_bytes(FILES),
}
HEADERS = [start for start in range(0, len(TAR), 512) if TAR[start + 257 : start + 262] == b"ustar"]


def opened(data: bytes) -> Package:
    """The package, whoever made it."""
    return open_package(data, trust=TrustRoots(), policy=Policy(allow_unsigned=True), now=datetime.now(UTC))


def outcome(data: bytes) -> Reason | None:
    """Why it is refused: always by blaming the bytes, or policy."""
    try:
        opened(data)
    except HocketError as refusal:
        assert refusal.situation in {Situation.MALFORMED, Situation.REFUSED}, refusal  # noqa: PT017 - it may also succeed
        return refusal.reason
    return None


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each file that differs in one bit, with the place of its byte."""
    for place in range(len(data)):
        for bit in range(8):
            yield place, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def cheaply(call: Callable[[], object]) -> bool:
    """Whether a call takes no more than a hostile package may."""
    cost = archives.cost(call)
    return cost.seconds < archives.REFUSAL_SECONDS_MAX and cost.peak_bytes < archives.REFUSAL_BYTES_MAX


@pytest.mark.parametrize("compression", PACKAGES)
def test_no_truncation_is_opened_and_no_flipped_bit_changes_what_is_read(
    compression: str, record_property: Callable[[str, object], None]
) -> None:
    package = PACKAGES[compression]
    assert outcome(package) is None

    assert {outcome(package[:size]) for size in range(len(package))} <= {
        Reason.BAD_ARCHIVE,
        Reason.BAD_MAGIC,
        Reason.BAD_LENGTH,
    }
    seen = Counter[str]()
    for _, data in flips(package):
        reason = outcome(data)
        seen[str(reason)] += 1
        if reason is None:
            assert read_archive(data).files == FILES
    record_property("outcomes", str(dict(seen)))


def test_a_flipped_bit_inside_the_tar_is_read_or_refused(record_property: Callable[[str, object], None]) -> None:
    seen = Counter[str]()
    for place, data in flips(TAR):
        start = place - place % 512
        if start in HEADERS:  # as somebody would who knows how a checksum is made
            data = data[:start] + archives.checked(data[start : start + 512]) + data[start + 512 :]  # noqa: PLW2901
        seen[str(outcome(archives.gzipped(data, 0)))] += 1
    record_property("outcomes", str(dict(seen)))


def test_every_truncation_of_every_file_in_a_package_is_refused() -> None:
    for name, content in FILES.items():
        for size in range(len(content) - 1):
            assert outcome(archives.zip_bytes(FILES | {name: content[:size]}, archives.STORED)) is not None


def test_every_hostile_archive_is_refused_cheaply() -> None:
    for attack in archives.attacks():
        assert outcome(attack.refused) in {attack.reason, Reason.BAD_MAGIC, Reason.BAD_LENGTH}, attack.name
        assert cheaply(lambda data=attack.refused: opened(data)), attack.name  # type: ignore[misc]  # a default binds it


def text(**changes: Any) -> str:
    """A manifest."""
    return json.dumps(experts.expert_manifest(**ONE_LAYER, **changes))


def with_value(value: str) -> str:
    """A manifest with a key nobody knows, and this in it."""
    return text(unknown=12345).replace("12345", value)


MANIFESTS = {
    "a key twice": (with_value('1, "unknown": 2'), Reason.BAD_JSON, with_value('1, "Unknown": 2')),
    "a key twice, escaped": (with_value('1, "\\u006eame": 2'), Reason.BAD_JSON, with_value('1, "\\u006fame": 2')),
    "not a number": (with_value("NaN"), Reason.BAD_JSON, with_value("null")),
    "infinite": (with_value("-Infinity"), Reason.BAD_JSON, with_value("-1")),
    "a large exponent": (with_value("1e999"), Reason.BAD_JSON, with_value("1e99")),
    "many digits": (with_value("1" * 10**6), Reason.BAD_JSON, with_value("1" * 15)),
    "many lists": (with_value("[" * 10**5 + "]" * 10**5), Reason.TOO_LARGE, with_value("[[[]]]")),
    "many objects": (with_value('{"a":' * 10**5 + "1" + "}" * 10**5), Reason.TOO_LARGE, with_value('{"a":{"a":1}}')),
    "half a surrogate pair": (with_value('"\\ud800"'), Reason.BAD_JSON, with_value('"\\ud83d\\ude00"')),
    "a mark at its start": ("\ufeff" + text(), Reason.BAD_JSON, text()),
    "too long": (text() + " " * 2**20, Reason.TOO_LARGE, text() + " " * 2**19),
    "more after it": (text() + "{}", Reason.BAD_JSON, text() + "\n"),
    "a list": (f"[{text()}]", Reason.BAD_MANIFEST, text()),
    "a soft prompt elsewhere": (
        text(soft_prompts=[{"name": "s", "path": "../../etc/passwd"}]),
        Reason.BAD_FILE_NAME,
        text(soft_prompts=[]),
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused_cheaply_beside_a_twin_that_is_read(name: str) -> None:
    refused, reason, accepted = MANIFESTS[name]
    packages = [archives.zip_bytes(FILES | {"manifest.json": manifest.encode()}) for manifest in (refused, accepted)]

    assert [outcome(package) for package in packages] == [reason, None]
    assert cheaply(lambda: opened(packages[0]))


@pytest.mark.parametrize(
    "value",
    [
        "[" + "0," * 500_000 + "0]",
        "[" + "[]," * 300_000 + "[]]",
        "{" + ",".join(f'"{number}":0' for number in range(80_000)) + "}",
        '"' + "\\u0041" * 150_000 + '"',
    ],
)
def test_a_manifest_of_many_values_is_read_or_refused_cheaply(value: str) -> None:
    package = archives.zip_bytes(FILES | {"manifest.json": with_value(value).encode()})

    assert outcome(package) in {None, Reason.TOO_LARGE}
    assert cheaply(lambda: opened(package))


class Exploit:
    """What a pickle does when somebody loads it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("name", "is_prompt"),
    [("training_args.bin", False), ("weights.safetensors", False), ("soft_prompts/s.pt", True), ("s.bin", True)],
)
def test_a_pickle_is_never_loaded(name: str, is_prompt: bool, tmp_path: Path) -> None:  # noqa: FBT001 - of the table
    harm = tmp_path / "harm"
    poison = pickle.dumps(Exploit(str(harm)))
    prompts = [{"name": "s", "path": name, "tokens": 3}] if is_prompt else []
    package = archives.zip_bytes(FILES | {"manifest.json": text(soft_prompts=prompts).encode(), name: poison})

    facts = opened(package).facts

    assert isinstance(facts, AdapterFacts)
    assert (facts.not_servable is not None) is is_prompt
    assert not harm.exists()
    pickle.loads(poison).close()  # noqa: S301 - it would have worked
    assert harm.exists()
