"""The `.apr` format: bytes in, values or one `HocketError` out. No I/O.

`split` takes a file apart without parsing it; check the signature over `signed_bytes`, or a release over the whole
file, before going on. `decode` then yields the facts and the model, `describe` the facts of an encrypted file.
`write` encodes a model. `docs/packages.md` has the format on one screen.
"""

from __future__ import annotations

from hocket.packages.apr.container import Container, EmbeddedSignature, split
from hocket.packages.apr.header import MAGIC
from hocket.packages.apr.reader import decode, describe
from hocket.packages.apr.writer import write

__all__ = ["MAGIC", "Container", "EmbeddedSignature", "decode", "describe", "split", "write"]
