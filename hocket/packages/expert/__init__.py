"""The `.expert` format: bytes in, values or one `HocketError` out. No I/O.

`is_expert` looks at the magic bytes and no further. `decode` reads everything, so trust comes first: a release over
the whole file, since the signature that upstream's tools leave inside is verified and shown but decides nothing.
`docs/experts.md` has the format on one screen.
"""

from __future__ import annotations

from hocket.packages.expert.archive import is_expert
from hocket.packages.expert.reader import decode

__all__ = ["decode", "is_expert"]
