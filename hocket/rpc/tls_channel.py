"""A `grpc.aio.Channel` over TLS that goes over to new certificates when their files change."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hocket.rpc.tls import Files, Tls


@dataclass(slots=True, eq=False)
class _Connection:
    """A channel made with the files of one time.

    Attributes:
        files: Those.
        channel: What carries the calls.
        calls: How many run.
    """

    files: Files
    channel: grpc.aio.Channel
    calls: int = 0


class TlsChannel(grpc.aio.Channel):
    """A channel whose connections are made with the certificates of the moment.

    Each call goes over the connection of the moment; an older one is closed when its last call has ended.

    Args:
        target: Where to.
        tls: The certificates.
        options: Of the channel.
    """

    def __init__(self, target: str, tls: Tls, options: Sequence[tuple[str, Any]]) -> None:
        self._target = target
        self._tls = tls
        self._options = list(options)
        if tls.server_name:
            self._options.append(("grpc.ssl_target_name_override", tls.server_name))
        self._connection = self._open(tls.current())
        self._older: set[_Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def _open(self, files: Files) -> _Connection:
        credentials = grpc.ssl_channel_credentials(files.ca, *(files.pair or ()))
        return _Connection(files, grpc.aio.secure_channel(self._target, credentials, options=self._options))

    def _now(self) -> _Connection:
        files = self._tls.current()
        if files is not self._connection.files:
            before, self._connection = self._connection, self._open(files)
            self._older.add(before)
            self._close_unused(before)
        return self._connection

    def _close_unused(self, connection: _Connection) -> None:
        if connection in self._older and not connection.calls:
            self._older.discard(connection)
            closing = asyncio.get_running_loop().create_task(connection.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _multi_callable(self, shape: str, method: str, *codec: Any, **options: Any) -> Callable[..., Any]:  # noqa: ANN401 - what stubs hand over
        connection: _Connection | None = None
        call_it: Callable[..., Any]

        def start(*arguments: Any, **how: Any) -> Any:  # noqa: ANN401 - grpc's signature
            nonlocal connection, call_it
            if connection is not (now := self._now()):
                connection, call_it = now, getattr(now.channel, shape)(method, *codec, **options)
            call = call_it(*arguments, **how)
            now.calls += 1
            call.add_done_callback(lambda _: self._note_end(now))
            return call

        return start

    def _note_end(self, connection: _Connection) -> None:
        connection.calls -= 1
        self._close_unused(connection)

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401, D102 - grpc's signature
        return self._multi_callable("unary_unary", method, *codec, **options)

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401, D102 - grpc's signature
        return self._multi_callable("unary_stream", method, *codec, **options)

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401, D102 - grpc's signature
        return self._multi_callable("stream_unary", method, *codec, **options)

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401, D102 - grpc's signature
        return self._multi_callable("stream_stream", method, *codec, **options)

    async def close(self, grace: float | None = None) -> None:
        """Cancel what is running, after `grace` seconds at most."""
        channels = [connection.channel for connection in (self._connection, *self._older)]
        await asyncio.gather(*self._closing, *(channel.close(grace) for channel in channels))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - grpc's signature
        """The state of the connection that the next call would take."""
        return self._now().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return when that connection is in another state."""
        await self._now().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Return when that connection is ready."""
        await self._now().channel.channel_ready()
