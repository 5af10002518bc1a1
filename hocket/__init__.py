"""Hocket: mixtures of signed experts, served over gRPC.

Where to find what:

* `hocket.client` - talk to a running suite, async or blocking.
* `hocket.packages` - open, verify, write and sign `.apr` packages. No I/O, no torch.
* `hocket.mixtures` - the mixture record: members, gate, canonical form and digest.
* `hocket.rpc` - servers and channels: status mapping, drain, the in-process channel.
* `hocket.v1` - the generated contracts (`proto/hocket/v1`).
* `services` - the four processes built from the above.
"""

__version__ = "0.1.0"
