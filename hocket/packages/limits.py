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
    layers: int = 2**10
    """Layers of one dense network."""
    archive_bytes: int = 1024 * _MIB
    """Contents of all files of an archive together."""
    archive_ratio: int = 20
    """What comes out of an archive per byte of it, beyond `archive_ratio_free_bytes`: trained adapters give 1.1 to 1.3,
    a LoRA whose B matrices are still zeros 2 to 4, tokenizers and other text 3 to 10."""
    archive_ratio_free_bytes: int = 16 * _MIB
    """What `archive_ratio` does not count: IA3 vectors of ones, and all else that is small, may compress as well as
    they like."""
    archive_end_bytes: int = _MIB
    """Zeros after the two blocks that end a tar archive. They fill its last record: of 10 KiB unless `tar -b` says
    otherwise, and who sends files instead of tapes has no use for records of more than 1 MiB."""
    archive_files: int = 2048
    """Files and folders in an archive, repetitions included."""
    archive_text_bytes: int = 64 * _MIB
    """One file of an archive that holds no weights: tokenizers are the largest."""
    pax_bytes: int = 2**16
    """One extended header of a tar archive."""
    file_name_chars: int = 255
    """A file's whole name inside an archive."""
    file_name_depth: int = 8
    """Parts of that name."""
    manifest_bytes: int = _MIB
    """A JSON document of a package: manifest and adapter configuration."""
    tensors: int = 2**12
    """Tensors in one safetensors file."""
    tensor_header_bytes: int = 8 * _MIB
    """The header of a safetensors file."""
    capabilities: int = 256
    """Capabilities and tags of one expert, each; and modules, constraints and stop sequences."""
    keywords: int = 512
    """Keywords that route to one expert, and as many that do not."""
    tag_chars: int = 128
    """One capability, tag, keyword, module or constraint."""
    grammar_bytes: int = _MIB
    """The grammar of one expert."""
    soft_prompt_tokens: int = 512
    """Rows of all soft prompts of one expert together."""
    rank: int = 1024
    """Rank of an adapter."""


DEFAULT_LIMITS: Final = Limits()
