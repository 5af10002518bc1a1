from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hocket.errors import HocketError, Reason
from training.soft_prompt import convert, main

MATRIX = torch.arange(12, dtype=torch.float32).reshape(3, 4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "style.pt"


@pytest.mark.parametrize("saved", [MATRIX, {"prompt_embeddings": MATRIX}, MATRIX.bfloat16(), MATRIX.double()])
def test_a_saved_matrix_becomes_safetensors(source: Path, saved: Any) -> None:
    torch.save(saved, source)
    target = source.with_suffix(".safetensors")

    assert convert(source, target) == (3, 4)

    [(name, written)] = load_file(target).items()
    assert name == "prompt_embeddings"
    assert torch.equal(written.float(), MATRIX)


@pytest.mark.parametrize(
    "saved",
    [
        MATRIX[0],
        MATRIX.long(),
        MATRIX / 0,
        {"a": MATRIX, "b": MATRIX},
        {"a": 1},
        [MATRIX],
    ],
    ids=["one dimension", "integers", "infinite", "two tensors", "no tensor", "a list"],
)
def test_anything_else_is_refused(source: Path, saved: Any) -> None:
    torch.save(saved, source)
    target = source.with_suffix(".safetensors")
    with pytest.raises(HocketError) as refusal:
        convert(source, target)
    assert refusal.value.reason is Reason.BAD_WEIGHTS
    assert not target.exists()


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, Any]:
        return os.system, ("touch pwned",)


def test_code_in_a_pickle_does_not_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    torch.save({"prompt": Payload()}, source)
    with pytest.raises(HocketError) as refusal:
        convert(source, source.with_suffix(".safetensors"))
    assert refusal.value.reason is Reason.BAD_WEIGHTS
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [b"", b"text", np.random.default_rng(0).bytes(200)])
def test_what_torch_has_not_written_is_refused(source: Path, content: bytes) -> None:
    source.write_bytes(content)
    with pytest.raises(HocketError) as refusal:
        convert(source, source.with_suffix(".safetensors"))
    assert refusal.value.reason is Reason.BAD_WEIGHTS


def test_the_command_says_what_to_do_next(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = source.with_suffix(".safetensors")
    monkeypatch.setattr(sys, "argv", ["soft_prompt", str(source), str(target)])
    assert main() == 2
    assert "cannot read" in capsys.readouterr().err

    torch.save(MATRIX, source)
    assert main() == 0
    assert "3 tokens of 4 values" in capsys.readouterr().out
