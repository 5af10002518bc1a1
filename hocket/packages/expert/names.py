"""Where things lie inside a package. Everything is at its root, unless the manifest says otherwise."""

from __future__ import annotations

from typing import Final

MANIFEST: Final = "manifest.json"
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = ("adapter_model.safetensors", "weights.safetensors")
"""Looked for in this order."""
PICKLED_WEIGHTS: Final = ("adapter_model.bin", "adapter_model.pt")
"""What older tools write instead, and nothing here ever loads."""
GRAMMAR: Final = "grammar.gbnf"
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What adapters adapt, in the models this format was made for."""
SIGNATURE: Final = "signature.sig"
