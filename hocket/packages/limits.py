"""Every bound a package reader enforces, with its unit.

A size read from a file is compared with one of these, or with the bytes that have arrived, before memory is taken
for it. The defaults suit a host with a few gigabytes of memory; pass your own `Limits` to change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds, all inclusive."""

    package_bytes: int = 1088 * _MIB
    """A whole file: the largest payload, the largest metadata, and room for incompressible data."""
    metadata_bytes: int = 16 * _MIB
    """The metadata section."""
    metadata_depth: int = 64
    """Maps and lists inside each other, the outermost map being 1."""
    metadata_values: int = 2**18
    """Values in the metadata at all depths together: each costs far more memory than bytes."""
    metadata_string_chars: int = 2**16
    """One metadata string."""
    uncompressed_bytes: int = 1024 * _MIB
    """The payload before compression; the format's own bound."""
    zstd_window_bytes: int = 8 * _MIB
    """The window a zstd frame may ask for; level 19 needs this much."""
    features: int = 2**21
    """Input values per row: the most a request may carry."""
    labels: int = 2**16
    """Output columns of a classifier, and clusters."""
    label_chars: int = 256
    """One label."""
    experts: int = 2**14
    """Experts in one mixture."""
    trees: int = 2**14
    """Trees in one forest."""
    tree_nodes: int = 2**22
    """Nodes of all trees of one package together."""
    tree_depth: int = 1024
    """Splits on the way from the root to a leaf."""


DEFAULT_LIMITS: Final = Limits()
