"""A second adapter for the tiny base, as PEFT's `save_pretrained` would leave it: IA3 with random factors.

python -m examples.text.random_expert /tmp/tiny-ia3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from examples.text.random_base import TINY

_CONFIG: Final[dict[str, Any]] = {
    "peft_type": "IA3",
    "task_type": "CAUSAL_LM",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def write_expert(folder: Path, seed: int = 0) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    heads = TINY["num_key_value_heads"] * TINY["head_dim"]
    shapes = {
        "self_attn.k_proj": (heads, 1),
        "self_attn.v_proj": (heads, 1),
        "mlp.down_proj": (1, TINY["intermediate_size"]),
    }
    tensors = {
        f"base_model.model.model.layers.{layer}.{module}.ia3_l": random.uniform(0.2, 1.8, shape).astype(np.float32)
        for layer in range(TINY["num_hidden_layers"])
        for module, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_CONFIG, indent=2))
    return folder


def main() -> None:
    """Write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(f"wrote {write_expert(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
