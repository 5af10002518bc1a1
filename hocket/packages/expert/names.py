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
SIGNATURE: Final = "signature.sig"
