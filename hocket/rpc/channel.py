"""One way to open a channel, by address, and to share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc

from hocket.rpc.convert import MESSAGE_BYTES_MAX
from hocket.rpc.local import LocalChannel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.rpc.handlers import Handlers

LOCAL: Final = "local:"
"""Addresses inside this process begin with this: `local:worker`."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # One layer retries (the aggregator, over replicas); the transport does not.
    ("grpc.enable_retries", 0),
)


class Channels:
    """Channels by address, opened at first use and shared until `close`.

    Args:
        local: Servers of this process, by the name that follows `local:` in their address. The mapping is read at
            first use of an address, so a composition root can fill it after it hands this object out.
    """

    def __init__(self, local: Mapping[str, Handlers] | None = None) -> None:
        self._local = {} if local is None else local
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`, `unix:///path` or `local:name`.

        Raises:
            KeyError: No server of this process has that local name.
        """
        channel = self._channels.get(address)
        if channel is None:
            channel = self._open(address)
            self._channels[address] = channel
        return channel

    def _open(self, address: str) -> grpc.aio.Channel:
        if address.startswith(LOCAL):
            return LocalChannel(self._local[address.removeprefix(LOCAL)])
        return grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()
