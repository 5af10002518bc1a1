"""Every flipped bit and truncation of small `.expert` packages, and every attack we know: refused, or harmless."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tarfile
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from safetensors.numpy import save

from hocket.errors import HocketError, Reason, Situation
from hocket.packages import Policy, TrustRoots, open_package
from hocket.packages.adapter import AdapterFacts, Outcome
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


def as_tarfile_reads(tar: bytes) -> dict[str, bytes]:
    """The files, by Python's reader."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {info.name: cast("Any", archive.extractfile(info)).read() for info in archive}


def test_a_flipped_bit_inside_the_tar_is_refused_or_changes_what_every_reader_reads(
    record_property: Callable[[str, object], None],
) -> None:
    """Many of these archives are whole, and hold another name or other content: then whoever reads one reads that."""
    seen = Counter[str]()
    for place, data in flips(TAR):
        start = place - place % 512
        if start in HEADERS:  # as somebody would who knows how a checksum is made
            data = data[:start] + archives.checked(data[start : start + 512]) + data[start + 512 :]  # noqa: PLW2901
        package = archives.gzipped(data, 0)
        seen[str(outcome(package))] += 1
        with contextlib.suppress(HocketError):
            assert read_archive(package).files == as_tarfile_reads(data)
    record_property("outcomes", str(dict(seen)))


def test_every_truncation_of_every_file_in_a_package_is_refused() -> None:
    for name, content in FILES.items():
        for size in range(len(content) - 1):
            assert outcome(archives.zip_bytes(FILES | {name: content[:size]}, archives.STORED)) is not None


def test_every_hostile_archive_is_refused_cheaply() -> None:
    for attack in archives.attacks():
        package = attack.refused()
        assert outcome(package) in {attack.reason, Reason.BAD_MAGIC, Reason.BAD_LENGTH}, attack.name
        assert cheaply(partial(opened, package)), attack.name


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


def prompt_of_zeros(hidden: int) -> bytes:
    """A soft prompt of one row."""
    return save({"prompt_embeddings": np.zeros((1, hidden), np.float32)})


def listed(times: int, hidden: int) -> experts.Files:
    """An expert whose manifest lists the same soft prompt again and again."""
    prompts = [{"name": f"p{number}", "path": "p.safetensors", "tokens": 1} for number in range(times)]
    return FILES | {"manifest.json": text(soft_prompts=prompts).encode(), "p.safetensors": prompt_of_zeros(hidden)}


def signed(**changes: Any) -> experts.Files:
    """A signed expert, with changes to what its signer wrote into the manifest."""
    return experts.signed_upstream(FILES, **changes)


EXPERTS = {
    "a soft prompt listed 256 times": (listed(256, 2**19), listed(1, 2**19)),
    "a soft prompt in 256 spellings": (
        FILES
        | {
            "manifest.json": text(
                soft_prompts=[{"name": "p", "path": f"{number}/p.safetensors", "tokens": 1} for number in range(256)]
            ).encode(),
            "p.safetensors": prompt_of_zeros(2**19),
        },
        listed(1, 2**19),
    ),
    "a long signature": (signed() | {"signature.sig": b"a" * 15 * 2**20}, signed()),
    "a long signature in the manifest": (signed(signature="a" * 2**16), signed()),
    "a long key": (signed(pubkey="ed25519:" + "a" * 65_000), signed()),
    "a long key in base64": (signed(pubkey="z" * 2**16), signed()),
    "a key of a megabyte": (signed(pubkey="a" * 10**6), signed()),
    "a long name of an algorithm": (signed(signature_algorithm="a" * 2**16), signed()),
    "a long hash": (signed(files={"manifest.json": "a" * 10**6}), signed()),
    "hashes of many files": (signed(files={str(number): "a" * 64 for number in range(10**4)}), signed()),
}


def signature_of(package: bytes) -> Outcome:
    """What the signature inside is worth."""
    facts = opened(package).facts
    assert isinstance(facts, AdapterFacts)
    return facts.signature.outcome


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_that_makes_readers_work_is_read_or_refused_cheaply(name: str) -> None:
    hostile, honest = (archives.zip_bytes(files) for files in EXPERTS[name])

    reason = outcome(hostile)
    assert reason in {None, Reason.BAD_ADAPTER, Reason.TOO_LARGE}
    assert reason is not None or signature_of(hostile) is Outcome.INVALID
    assert cheaply(lambda: opened(hostile))
    assert outcome(honest) is None


ANY_VALUES: tuple[Any, ...] = (None, True, 5, 0.5, "text", [], [5], ["q_proj"], [[]], {}, {"a": 5}, {"a": {}})


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "soft_prompt"])
def test_a_configuration_with_any_value_at_any_key_is_read_or_refused(kind: str) -> None:
    files = experts.expert_files(kind=kind)
    config = json.loads(files["adapter_config.json"])
    keys = {*config, "rank_pattern", "alpha_pattern", "num_transformer_submodules", "modules_to_save", "unknown"}
    for key in sorted(keys):
        for value in ANY_VALUES:
            changed = experts.json_bytes(config | {key: value})
            outcome(archives.zip_bytes(files | {"adapter_config.json": changed}, archives.STORED))


@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 2), (2, experts.HIDDEN)])
@pytest.mark.parametrize(
    "config", [None, {}, {"num_transformer_submodules": 2}, {"task_type": "SEQ_CLS"}, {"rank_pattern": [5]}]
)
def test_a_prompt_of_any_shape_is_read_or_refused(shape: tuple[int, ...], config: dict[str, Any] | None) -> None:
    files = experts.expert_files(
        kind="soft_prompt",
        tensors={"prompt_embeddings": np.zeros(shape, np.float32)},
        config=config,
        files={"adapter_config.json": None} if config is None else {},
    )

    reason = outcome(archives.zip_bytes(files))

    assert reason is None if len(shape) == 2 and config != {"rank_pattern": [5]} else reason is Reason.BAD_ADAPTER


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
