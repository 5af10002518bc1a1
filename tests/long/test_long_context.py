"""Contexts of 32k from the first token on, also with keys and values in int8; and a start that fetches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bases import tiny_base
from tests.engines import opened
from tests.passes import Passes, ids_of, oracle, part

pytestmark = pytest.mark.long

LENGTH = 32_768
CHUNK = 512
PAGE = 256
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rope", ["auto", "yarn"])
def test_a_prefill_of_32k_is_that_of_transformers(rope: str, tmp_path: Path) -> None:
    native = LENGTH if rope == "auto" else LENGTH // 4
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    folder = tiny_base(
        tmp_path / "tiny", max_position_embeddings=native, num_attention_heads=2, num_key_value_heads=1,
        rope_parameters=plain,
    )  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": native}
    told = {} if rope == "auto" else {"rope_parameters": plain | yarn}
    base = opened(folder, rope=rope, context_length=LENGTH if told else 0)
    ids = ids_of(LENGTH)
    rows = [LENGTH // 3 // CHUNK * CHUNK - 1, LENGTH - CHUNK - 1, LENGTH - 1]
    with torch.no_grad():
        model = oracle(folder, attn_implementation="sdpa", **told)
        wanted = model(torch.tensor([ids]), logits_to_keep=torch.tensor(rows), use_cache=False).logits[0]
    found: dict[Any, torch.Tensor] = {}
    for kv_dtype in (None, torch.int8):
        passes = Passes(base, PAGE, LENGTH // PAGE + 1, kv_dtype=kv_dtype)
        pages = passes.take(LENGTH)
        begin = time.perf_counter()
        logits = [
            passes.run([part(start, ids[start : start + CHUNK], pages, sampled=start + CHUNK - 1 in rows)])
            for start in range(0, LENGTH, CHUNK)
        ]
        found[kv_dtype] = torch.cat(logits)
        print(f"{rope}, keys and values in {kv_dtype}: {time.perf_counter() - begin:.1f} s")  # noqa: T201 - measured
    torch.testing.assert_close(found[None], wanted, atol=5e-4, rtol=0)
    assert (found[torch.int8] - wanted).norm() / wanted.norm() < 0.02


def test_opening_a_quantised_base_fetches_no_code(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "tiny", intermediate_size=128)
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    open('fetched', 'w').close()\n")
    code = (
        "import pathlib, sys; from tests.engines import opened; opened(pathlib.Path(sys.argv[1]), quantisation='nf4')"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=environment, check=True)
    assert not (tmp_path / "fetched").exists()
    plainly = [sys.executable, "-c", "import bitsandbytes"]
    subprocess.run(plainly, cwd=tmp_path, env=environment, check=True)
    has_kernel = "from bitsandbytes.functional import has_avx512bf16; raise SystemExit(not has_avx512bf16())"
    if subprocess.run([sys.executable, "-c", has_kernel], check=False).returncode == 0:
        assert (tmp_path / "fetched").exists()
