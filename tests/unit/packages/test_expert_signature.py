from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hocket.errors import HocketError
from hocket.identity import key_id_of
from hocket.packages.adapter import Outcome, UpstreamSignature
from hocket.packages.expert.archive import read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.signature import message_of, verify_upstream
from hocket.packages.keys import public_key_of, sign, verify
from tests.experts import Files, expert_files, json_bytes, signed_upstream

SEED = b"\x42" * 32
KEY = public_key_of(SEED)
FILES = expert_files(files={"README.md": b"hello", "tests/cases.json": b"[]"})
SIGNED = signed_upstream(FILES)
METRICS = {"em": 0.5, "f1": 0.25, "valid": 1.0}


def judged(files: Files) -> UpstreamSignature:
    return verify_upstream(files, json.loads(files["manifest.json"]).get("integrity"))


def with_integrity(files: Files, /, **changes: Any) -> Files:
    """The files with other values in the integrity block; None drops a key."""
    manifest = json.loads(files["manifest.json"])
    block = {**manifest["integrity"], **changes}
    manifest["integrity"] = {key: value for key, value in block.items() if value is not None}
    return {**files, "manifest.json": json_bytes(manifest)}


class TestTheTestVector:
    """Of the format's description: seed 0x42 throughout, three files."""

    HASHES = {  # noqa: RUF012 - a constant
        "manifest.json": hashlib.sha256(b"{}").hexdigest(),
        "adapter_model.safetensors": hashlib.sha256(b"hello").hexdigest(),
        "soft_prompts/s.pt": hashlib.sha256(b"").hexdigest(),
    }
    SIGNATURE = (
        "46ed000efb1fc11b316d2936e273f531daef68dd917d30150d48c16e0985a1c0"
        "cc7ee6b2e9b77421a68923e623835626622290bc2bc94ece6750a6f7f494750d"
    )

    def test_the_message_is_the_same(self) -> None:
        message = message_of(self.HASHES)
        assert len(message) == 252
        assert hashlib.sha256(message).hexdigest() == "74b2bc43a8796f33718a061224caf549c06e8e44ec0f93537bbbac0e171e5168"

    def test_so_is_the_signature(self) -> None:
        assert KEY.hex() == "2152f8d19b791d24453242e15f2eab6cb7cffa7b6a5ed30097960e069881db12"
        assert sign(SEED, message_of(self.HASHES)).hex() == self.SIGNATURE
        verify(KEY, message_of(self.HASHES), bytes.fromhex(self.SIGNATURE))

    def test_the_package_verifies(self) -> None:
        block = {
            "pubkey": f"ed25519:{KEY.hex()}",
            "signature_algorithm": "ed25519",
            "signature": self.SIGNATURE,
            "files": self.HASHES,
        }
        files = {
            "manifest.json": json_bytes({"integrity": block}),
            "adapter_model.safetensors": b"hello",
            "soft_prompts/s.pt": b"",
            "signature.sig": self.SIGNATURE.encode(),
        }
        outcome = judged(files)
        assert outcome.outcome is Outcome.WEIGHTS_ONLY  # with line breaks, `{}` cannot be rebuilt
        files["manifest.json"] = json.dumps({"integrity": block}).encode()
        assert judged(files).outcome is Outcome.VALID


class TestOutcomes:
    def test_a_package_that_nobody_signed(self) -> None:
        assert judged(FILES) == UpstreamSignature(Outcome.UNSIGNED)

    def test_a_package_that_upstream_s_signer_signed(self) -> None:
        assert judged(SIGNED) == UpstreamSignature(
            Outcome.VALID, key_id_of(KEY), "expert-cli", "2026-06-01T12:00:00+00:00", None
        )

    def test_the_order_of_files_does_not_matter(self) -> None:
        assert judged(dict(reversed(SIGNED.items()))).outcome is Outcome.VALID

    def test_a_manifest_without_the_block_before_signing(self) -> None:
        for position in ("first", "last"):
            manifest = json.loads(FILES["manifest.json"])
            del manifest["integrity"]
            unsigned = {**FILES, "manifest.json": json_bytes(manifest)}
            block = json.loads(signed_upstream(unsigned)["manifest.json"])["integrity"]
            whole = {"integrity": block, **manifest} if position == "first" else {**manifest, "integrity": block}
            signed = {**signed_upstream(unsigned), "manifest.json": json_bytes(whole)}
            assert judged(signed).outcome is Outcome.VALID

    @pytest.mark.parametrize("order", list(itertools.permutations(METRICS)))
    def test_metrics_may_have_changed_their_order(self, order: tuple[str, ...]) -> None:
        def ordered(names: tuple[str, ...]) -> Any:
            return {"test_set_size": 3, "metrics": {name: METRICS[name] for name in names}}

        files = expert_files(manifest={"evaluation": ordered(tuple(METRICS))})
        signed = signed_upstream(files)
        manifest = json.loads(signed["manifest.json"])
        signed["manifest.json"] = json_bytes({**manifest, "evaluation": ordered(order)})
        assert judged(signed).outcome is Outcome.VALID

        signed["manifest.json"] = signed["manifest.json"].replace(b"0.25", b"0.75")
        assert judged(signed).outcome is Outcome.WEIGHTS_ONLY

    def test_more_metrics_than_six_are_not_tried(self) -> None:
        def signed(count: int) -> Files:
            metrics = {f"m{number}": number for number in range(count)}
            files = signed_upstream(expert_files(manifest={"evaluation": {"metrics": metrics}}))
            manifest = json.loads(files["manifest.json"])
            manifest["evaluation"]["metrics"] = dict(reversed(metrics.items()))
            return {**files, "manifest.json": json_bytes(manifest)}

        assert judged(signed(6)).outcome is Outcome.VALID
        assert judged(signed(7)).outcome is Outcome.WEIGHTS_ONLY

    def test_nor_are_orders_in_long_manifests(self) -> None:
        def signed(chars: int) -> Files:
            metrics = {"a": 1, "b": 2}
            filler = {"evaluation": {"metrics": metrics}, "description": "x" * chars}
            files = signed_upstream(expert_files(manifest=filler))
            manifest = json.loads(files["manifest.json"])
            manifest["evaluation"]["metrics"] = dict(reversed(metrics.items()))
            return {**files, "manifest.json": json_bytes(manifest)}

        assert judged(signed(60_000)).outcome is Outcome.VALID
        assert judged(signed(70_000)).outcome is Outcome.WEIGHTS_ONLY

    def test_another_manifest_leaves_the_weights_only(self) -> None:
        manifest = json.loads(SIGNED["manifest.json"])
        manifest["routing"]["keywords"].append("everything")
        outcome = judged({**SIGNED, "manifest.json": json_bytes(manifest)})
        assert outcome.outcome is Outcome.WEIGHTS_ONLY
        assert "not the one that was signed" in (outcome.explanation or "")

    def test_a_second_signature_hides_what_the_manifest_was(self) -> None:
        outcome = judged(signed_upstream(SIGNED))
        assert outcome.outcome is Outcome.WEIGHTS_ONLY
        assert "signed twice" in (outcome.explanation or "")

    def test_publisher_and_time_are_claims_alone(self) -> None:
        outcome = judged(with_integrity(SIGNED, publisher="acme", created_at="yesterday"))
        assert (outcome.outcome, outcome.publisher, outcome.created_at) == (Outcome.VALID, "acme", "yesterday")
        assert judged(with_integrity(SIGNED, publisher=["x"], created_at=5)).publisher is None
        assert len(judged(with_integrity(SIGNED, publisher="x" * 5000)).publisher or "") == 128

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"README.md": b"hallo"}, "'README.md' was changed"),
            ({"README.md": None}, "'README.md' was signed, but is missing"),
            ({"evil.bin": b"x"}, "'evil.bin' was added"),
            ({"signature.sig": None}, "signature.sig is missing"),
            ({"signature.sig": b"00" * 64}, "differ"),
            ({"signature.sig": b"\xff\xfe"}, "differ"),
        ],
    )
    def test_other_files_than_were_signed_are_invalid(self, change: dict[str, bytes | None], why: str) -> None:
        files = {name: content for name, content in {**SIGNED, **change}.items() if content is not None}
        outcome = judged(files)
        assert outcome.outcome is Outcome.INVALID
        assert why in (outcome.explanation or "")
        assert outcome.key_id == key_id_of(KEY)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"signature_algorithm": "rsa"}, "algorithm"),
            ({"signature_algorithm": None}, "algorithm"),
            ({"signature": None}, "differ"),
            ({"signature": "00"}, "differ"),
            ({"signature": "11" * 64}, "differ"),
            ({"files": None}, "not one of the hashes"),
            ({"files": ["README.md"]}, "not one of the hashes"),
            ({"files": {"README.md": 5}}, "hash listed for 'README.md'"),
            ({"files": {"README.md": "5"}}, "hash listed for 'README.md'"),
            ({"files": {}}, "not one of the hashes"),
            ({"pubkey": f"ed25519:{public_key_of(bytes(32)).hex()}"}, "not one of the hashes"),
            ({"pubkey": None}, "public key"),
            ({"pubkey": "ed25519:00"}, "public key"),
            ({"pubkey": "ed25519:!"}, "public key"),
            ({"pubkey": "ed25519:" + "00" * 32}, "not one of the hashes"),  # a point of small order
        ],
    )
    def test_a_block_that_does_not_verify_is_invalid(self, change: dict[str, Any], why: str) -> None:
        outcome = judged(with_integrity(SIGNED, **change))
        assert outcome.outcome is Outcome.INVALID
        assert why in (outcome.explanation or "")

    def test_a_signature_without_its_block_is_invalid(self) -> None:
        assert judged({**FILES, "signature.sig": SIGNED["signature.sig"]}).outcome is Outcome.INVALID
        assert verify_upstream(FILES, "nonsense").outcome is Outcome.INVALID


class TestSpellings:
    BLOCK = json.loads(SIGNED["manifest.json"])["integrity"]

    @pytest.mark.parametrize(
        "change",
        [
            {"pubkey": None, "public_key": BLOCK["pubkey"]},
            {"pubkey": KEY.hex()},
            {"pubkey": f"ed25519:{KEY.hex().upper()}"},
            {"pubkey": f"ed25519:hex:{KEY.hex()}"},
            {"pubkey": f"ed25519:{base64.b64encode(KEY).decode()}"},
            {"signature": f"hex:{BLOCK['signature']}"},
            {"signature": BLOCK["signature"].upper()},
            {"files": {path: f"sha256:{digest}" for path, digest in BLOCK["files"].items()}},
            {"created_at": None, "timestamp": BLOCK["created_at"]},
        ],
    )
    def test_a_block_may_be_spelled_otherwise(self, change: dict[str, Any]) -> None:
        assert judged(with_integrity(SIGNED, **change)) == judged(SIGNED)

    def test_the_file_may_end_with_a_line_break(self) -> None:
        assert judged({**SIGNED, "signature.sig": SIGNED["signature.sig"] + b"\n"}).outcome is Outcome.VALID


def test_no_manifest_makes_verifying_long() -> None:
    metrics = {f"m{number}": number for number in range(6)}
    filler = {"evaluation": {"metrics": metrics}, "description": "x" * 60_000}
    files = signed_upstream(expert_files(manifest=filler))
    files["manifest.json"] = files["manifest.json"].replace(b'"name"', b'"nome"')
    began = time.perf_counter()
    assert judged(files).outcome is Outcome.WEIGHTS_ONLY
    assert time.perf_counter() - began < 10


UPSTREAM = Path(os.environ.get("HOCKET_FIXTURES", "/nowhere")) / "expert" / "upstream-built"
TAMPERED = {
    "absolute-path": "BAD_FILE_NAME",
    "duplicate-manifest-entry": "DUPLICATE_FILE",
    "listed-file-missing": Outcome.INVALID,
    "manifest-keyword-edited": Outcome.WEIGHTS_ONLY,
    "path-traversal": "BAD_FILE_NAME",
    "pubkey-replaced": Outcome.INVALID,
    "signature-sig-differs-from-manifest": Outcome.INVALID,
    "signature-sig-missing": Outcome.INVALID,
    "symlink-entry": "BAD_FILE_TYPE",
    "truncated-gzip": "BAD_ARCHIVE",
    "unlisted-extra-file": Outcome.INVALID,
    "weights-byte-flipped": Outcome.INVALID,
}
SIGNED_BY_UPSTREAM = {
    "expert-sql-qwen3-0-6b.v0.3.0": Outcome.VALID,
    "expert-neo4j-qwen3-0-6b.v0.2.3": Outcome.VALID,
    "expert-ia3-qwen3-0-6b.v0.1.0": Outcome.VALID,
    "expert-tools-qwen3-0-6b.v0.1.0": Outcome.VALID,  # its metrics in another order
    "expert-v1lora-qwen306b.v1.0.0": Outcome.VALID,  # likewise
    "expert-ia3-qwen3-0-6b.v0.1.0.resigned-twice": Outcome.WEIGHTS_ONLY,
}


@pytest.mark.skipif(not UPSTREAM.exists(), reason="set HOCKET_FIXTURES to the folder of genuine files")
class TestFilesOfUpstreamsTools:
    def outcome(self, path: Path) -> str | Outcome:
        try:
            files = read_archive(path.read_bytes()).files
        except HocketError as error:
            return error.reason
        return verify_upstream(files, parse_manifest(files["manifest.json"]).integrity).outcome

    def test_unsigned_ones(self) -> None:
        assert {self.outcome(path) for path in (UPSTREAM / "unsigned").glob("*.expert")} == {Outcome.UNSIGNED}

    def test_signed_ones(self) -> None:
        assert {p.stem: self.outcome(p) for p in (UPSTREAM / "signed").glob("*.expert")} == SIGNED_BY_UPSTREAM

    def test_tampered_ones(self) -> None:
        assert {p.stem: self.outcome(p) for p in (UPSTREAM / "tampered").glob("*.expert")} == TAMPERED

    def test_two_bind_the_manifest_only_in_another_order_of_metrics(self) -> None:
        for name in ("expert-tools-qwen3-0-6b.v0.1.0", "expert-v1lora-qwen306b.v1.0.0"):
            files = read_archive((UPSTREAM / "signed" / f"{name}.expert").read_bytes()).files
            manifest = json.loads(files["manifest.json"])
            written = json_bytes({**manifest, "integrity": None})
            assert hashlib.sha256(written).hexdigest() != manifest["integrity"]["files"]["manifest.json"]
