from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from hocket.base_folder import base_digest, base_name
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"tokens"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_digest_is_that_of_the_canonical_json_of_the_files_hashes(base: Path) -> None:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(FILES.items())}
    canonical = json.dumps(hashes, separators=(",", ":")).encode()
    assert base_digest(base) == f"sha256:{hashlib.sha256(canonical).hexdigest()}"


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    ],
)  # fmt: skip
def test_what_shapes_the_model_or_its_text_counts(base: Path, name: str) -> None:
    before = base_digest(base)
    (base / name).write_bytes(b"more")
    assert base_digest(base) != before


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "training_args.bin", ".gitattributes"])
def test_what_does_not_is_left_out(base: Path, name: str) -> None:
    before = base_digest(base)
    (base / name).write_bytes(b"more")
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_bytes(b"more")
    assert base_digest(base) == before


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused(base: Path, missing: str) -> None:
    (base / missing).unlink()
    with pytest.raises(HocketError) as refusal:
        base_digest(base)
    assert refusal.value.reason is Reason.BAD_REQUEST


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HocketError) as refusal:
        base_digest(tmp_path / "none")
    assert refusal.value.reason is Reason.BAD_REQUEST


def test_a_download_that_is_not_complete_is_refused(base: Path) -> None:
    (base / "tokenizer.model").symlink_to(base / "blobs" / "missing")
    with pytest.raises(HocketError, match=r"tokenizer\.model"):
        base_digest(base)


def test_a_base_in_the_hub_s_cache_is_called_by_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2"
    folder.mkdir(parents=True)
    assert base_name(folder) == "Qwen/Qwen3-0.6B"
    assert base_name(tmp_path) == tmp_path.name


def test_progress_is_told_up_to_the_last_byte(base: Path) -> None:
    told: list[tuple[int, int]] = []
    base_digest(base, lambda done, total: told.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert told[-1] == (size, size)
