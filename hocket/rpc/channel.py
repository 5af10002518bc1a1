"""One way to open a channel, by address, and to share it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import grpc

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import MESSAGE_BYTES_MAX
from hocket.rpc.local import LocalChannel
from hocket.rpc.tls_channel import TlsChannel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.rpc.handlers import Handlers
    from hocket.rpc.tls import Tls

LOCAL: Final = "local:"
"""Addresses inside this process begin with this: `local:worker`."""
_ROUTER_SERVICE: Final = "hocket.v1.RouterService"

_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # How long an attempt to connect may take; it would be 20 s.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # No name server has a say in how we call.
    ("grpc.service_config_disable_resolution", 1),
)

# A retry policy is only for clients of the router: inside the suite one layer retries (the aggregator, over replicas).
# The transport's own repetition stays on everywhere. It takes only calls that have never reached a handler, such as
# those that meet the end of an old connection (`grpc.max_connection_age_ms`): without it one in ten of these ends
# fails a call under load.
_SERVICE_OPTIONS: Final = (
    *_OPTIONS,
    # What is set for the web is not for these.
    ("grpc.enable_http_proxy", 0),
    # How far a stream runs ahead of who reads it. Left to its probe it grows to 4 MiB per hop, also while nobody reads:
    # an answer in text would be computed to its end for a client that has stopped.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
)

_BALANCED: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": _ROUTER_SERVICE},
    # Never `timeout` here: grpc for Python mishandles it (https://github.com/grpc/grpc/issues/40633).
    "methodConfig": [
        {
            "name": [{"service": _ROUTER_SERVICE}],
            # Applies until the first message of an answer: what has been delivered is not asked for again.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # Cancelled is what a server that stops says to calls that are before its door.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # Each call earns a tenth of a retry; when 256 more have failed than were earned, calls fail at once.
    "retryThrottling": {"maxTokens": 512, "tokenRatio": 0.1},
}


class Channels:
    """Channels of a service to others, by address, opened at first use and shared until `close`.

    Args:
        local: Servers of this process, by the name that follows `local:` in their address. The mapping is read at
            first use of an address, so a composition root can fill it after it hands this object out.
        tls: What to make connections with; None for no TLS.
    """

    def __init__(self, local: Mapping[str, Handlers] | None = None, tls: Tls | None = None) -> None:
        self._local = {} if local is None else local
        self._tls = tls
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
        return _open(address, self._tls, _SERVICE_OPTIONS)

    async def forget(self, address: str) -> None:
        """Close the channel to an address, if there is one; calls that still run on it are cancelled."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()


def client_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel of a client of the suite to one server: `host:port` or `unix:///path`."""
    return _open(address, tls, _OPTIONS)


def router_channel(target: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel of a client to routers.

    Several of them take turns, those that are not ready are left out, and a call that no router has begun to answer
    is made again, four times in all. One alone gets each call once.

    Args:
        target: `host:port` or `unix:///path` for one; `ipv4:host:port,host:port` or `dns:///name:port` for several.
            With TLS, all certificates must be for `name`, or for the first address.
        tls: What to make connections with; None for no TLS.

    Raises:
        HocketError: `BAD_REQUEST` for several addresses written otherwise.
    """
    several = "," in target
    if several and not target.startswith(("ipv4:", "ipv6:")):
        raise HocketError(
            Reason.BAD_REQUEST, f"{target!r}: write several routers as ipv4:host:port,host:port or dns:///name:port"
        )
    if not (several or target.startswith("dns:")):
        return client_channel(target, tls)
    options: list[tuple[str, Any]] = [
        *_OPTIONS,
        ("grpc.service_config", json.dumps(_BALANCED)),
        # A router that has moved is looked up at once when a connection breaks; it would be every 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ]
    if several:
        options.append(("grpc.default_authority", target.partition(":")[2].partition(",")[0].lstrip("/")))
    return _open(target, tls, options)


def _open(
    target: str, tls: Tls | None, options: tuple[tuple[str, Any], ...] | list[tuple[str, Any]]
) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return TlsChannel(target, tls, options)
