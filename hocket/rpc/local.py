"""A `grpc.aio.Channel` that calls servicers in the same event loop.

Stubs, clients and servicers are the same as over a socket. Messages pass by reference and are read-only by
agreement. Deadline, cancellation, metadata and status behave as on the wire; `tests/contract` holds both to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
from grpc.aio import AbortError, AioRpcError, Metadata

from hocket.rpc.convert import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable

    from hocket.rpc.handlers import Handlers

_RESPONSES_AHEAD: Final = 16
"""Messages a handler may be ahead of its reader: what a socket's flow-control window is on the wire."""

_END: Final = object()
_NO_CODE: Final = grpc.StatusCode.UNKNOWN


class LocalChannel(grpc.aio.Channel):
    """Calls the handlers of one server that lives in this event loop."""

    def __init__(self, handlers: Handlers) -> None:
        self._services = handlers.services
        self._calls: set[_Call] = set()

    def _multi_callable(self, method: str, *_codec: object, **_options: object) -> Callable[..., Any]:
        _, service, name = method.split("/")

        def call(request: Any = None, *, timeout: float | None = None, metadata: Any = None, **_: object) -> _Call:  # noqa: ANN401 - grpc's signature
            handler = self._services.get(service, {}).get(name)
            started = _Call(handler, method, request, timeout, metadata)
            self._calls.add(started)
            started.add_done_callback(self._calls.discard)
            return started

        return call

    # One implementation serves the four shapes: the handler knows which of them it is.
    unary_unary = unary_stream = stream_unary = stream_stream = _multi_callable  # type: ignore[assignment]  # the base types each shape apart

    async def close(self, grace: float | None = None) -> None:
        """Cancel what is running, after `grace` seconds at most."""
        running = [call.task for call in self._calls]
        if running and grace:
            await asyncio.wait(running, timeout=grace)
        for call in tuple(self._calls):
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - grpc's signature
        """Always ready: there is nothing to connect."""
        del try_to_connect
        return grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait for ever: the state does not change."""
        del last_observed_state
        await asyncio.Event().wait()

    async def channel_ready(self) -> None:
        """Return at once."""


class _Context:
    """The server's side of a local call: what `grpc.aio.ServicerContext` offers."""

    def __init__(
        self,
        metadata: Iterable[tuple[str, str | bytes]],
        deadline: float | None,
        write: Callable[[Any], Awaitable[None]],
    ) -> None:
        self.write = write
        self._metadata = tuple(metadata)
        self._deadline = deadline
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._callbacks: list[Callable[[Any], None]] = []
        self._ended = False

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        self._code, self._details, self._trailing = code, details, tuple(trailing_metadata)
        raise AbortError(details)

    async def abort_with_status(self, status: grpc.Status) -> None:
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    async def send_initial_metadata(self, initial_metadata: object) -> None:
        """Accepted and dropped: nobody in the suite reads it."""

    def set_trailing_metadata(self, trailing_metadata: Iterable[tuple[str, str | bytes]]) -> None:
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._trailing

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str:
        return self._details

    def peer(self) -> str:
        return "local:"

    def time_remaining(self) -> float | None:
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def cancelled(self) -> bool:
        return self._code is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self._ended

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        self._ended = True
        for callback in self._callbacks:
            callback(self)


class _Call:
    """The client's side of a local call, for all four shapes: what `grpc.aio.Call` offers.

    Not a subclass of it: a real channel that closes takes every such object among the running tasks for its own.
    """

    def __init__(
        self,
        handler: grpc.RpcMethodHandler[Any, Any] | None,
        method: str,
        request: Any,  # noqa: ANN401 - a message, or an iterable of messages
        timeout: float | None,
        metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = None if timeout is None else loop.time() + timeout
        self._context = _Context(metadata or (), self._deadline, self._put)
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._responses: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._writes: asyncio.Queue[Any] | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._timed_out = False
        self._cancelled = False
        if handler is not None and handler.request_streaming and request is None:
            self._writes = asyncio.Queue(1)
            request = _drain(self._writes)
        self.task = loop.create_task(self._run(handler, method, request))
        self.task.add_done_callback(self._note_end)
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire)

    async def _run(self, handler: grpc.RpcMethodHandler[Any, Any] | None, method: str, request: Any) -> Any:  # noqa: ANN401 - any message
        try:
            if handler is None:
                return self._end(grpc.StatusCode.UNIMPLEMENTED, f"no method {method} here")
            response = await self._answer(handler, request)
        except AbortError:
            self._end(self._context.code() or _NO_CODE, self._context.details())
        except asyncio.CancelledError:
            if self._timed_out:
                self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            else:
                self._end(grpc.StatusCode.CANCELLED, "the call was cancelled")
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # this runs in a task
                    self._cancelled = True
                    raise
        except Exception as error:  # noqa: BLE001 - as on the wire, a handler's exception is a status
            self._end(_NO_CODE, f"Unexpected {type(error).__name__}")
        else:
            self._end(self._context.code() or grpc.StatusCode.OK, self._context.details())
            return response
        return None

    async def _answer(self, handler: grpc.RpcMethodHandler[Any, Any], request: Any) -> Any:  # noqa: ANN401 - any message
        requests = _as_async(request) if handler.request_streaming else request
        if not handler.request_streaming:
            await self._check_size(request)
        if not handler.response_streaming:
            unary: Callable[..., Any] = handler.stream_unary if handler.request_streaming else handler.unary_unary  # type: ignore[assignment]  # grpc types handlers as synchronous
            response = await unary(requests, self._context)
            await self._check_size(response)
            return response
        streaming: Callable[..., Any] = handler.stream_stream if handler.request_streaming else handler.unary_stream  # type: ignore[assignment]  # grpc types handlers as synchronous
        await streaming(requests, self._context)
        return None

    async def _check_size(self, message: Any) -> None:  # noqa: ANN401 - any message
        """End the call as a transport would if a message is larger than it carries."""
        if (size := message.ByteSize()) > MESSAGE_BYTES_MAX:
            text = f"message larger than max ({size} vs. {MESSAGE_BYTES_MAX})"
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    async def _put(self, response: Any) -> None:  # noqa: ANN401 - any message
        await self._check_size(response)
        while len(self._responses) >= _RESPONSES_AHEAD:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self._responses.append(response)
        _wake(self._reader)

    def _expire(self) -> None:
        self._timed_out = True
        self.task.cancel()

    def _note_end(self, _task: object) -> None:
        """A call that is cancelled before its first step has never run, but ends all the same."""
        if self._code is None:
            self._cancelled = not self._timed_out
            code = grpc.StatusCode.CANCELLED if self._cancelled else grpc.StatusCode.DEADLINE_EXCEEDED
            self._end(code, "the call ended before it began")

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details
        if self._timer is not None:
            self._timer.cancel()
        self._context.end()
        _wake(self._reader)
        for callback in self._callbacks:
            callback(self)

    def _error(self) -> AioRpcError:
        trailing = Metadata(*self._context.trailing_metadata())
        return AioRpcError(self._code or _NO_CODE, Metadata(), trailing, self._details, None)

    # The answer: awaited for one response, iterated or read for several.

    def __await__(self) -> Generator[Any, None, Any]:
        response = yield from self.task.__await__()
        if self._code is not grpc.StatusCode.OK:
            raise self._error()
        return response

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (response := await self._next()) is not _END:
            yield response

    async def read(self) -> Any:  # noqa: ANN401 - any message
        """The next response, or `grpc.aio.EOF`."""
        response = await self._next()
        return grpc.aio.EOF if response is _END else response

    async def _next(self) -> Any:  # noqa: ANN401 - any message
        while not self._responses and self._code is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            except asyncio.CancelledError:
                self.cancel()  # as on the wire: a reader that is cancelled cancels its call
                raise
        if self._responses:
            response = self._responses.popleft()
            _wake(self._room)
            return response
        if self._cancelled:
            raise asyncio.CancelledError
        if self._code is not grpc.StatusCode.OK:
            raise self._error()
        return _END

    # The requests, for a call that was started without an iterable of them.

    async def write(self, request: Any) -> None:  # noqa: ANN401 - any message
        """Hand one more request to the handler."""
        if self._writes is None:
            raise grpc.aio.UsageError("this call has all its requests")
        if self.task.done():
            raise self._error()
        await self._writes.put(request)

    async def done_writing(self) -> None:
        """Tell the handler that no more requests come."""
        if self._writes is not None and not self.task.done():
            await self._writes.put(_END)

    # The rest of `grpc.aio.Call`.

    def cancel(self) -> bool:
        """Stop the call; True if that was still possible."""
        return self.task.cancel()

    def cancelled(self) -> bool:
        """Whether the call ended by `cancel`."""
        return self._code is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        """Whether the call has ended."""
        return self.task.done()

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one."""
        return self._context.time_remaining()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback(call)` when the call ends."""
        self._callbacks.append(callback)

    async def initial_metadata(self) -> Metadata:
        """Always empty."""
        return Metadata()

    async def trailing_metadata(self) -> Metadata:
        """What the handler set, once the call has ended."""
        await self._ended()
        return Metadata(*self._context.trailing_metadata())

    async def code(self) -> grpc.StatusCode:
        """The status, once the call has ended."""
        await self._ended()
        return self._code or _NO_CODE

    async def details(self) -> str:
        """The status message, once the call has ended."""
        await self._ended()
        return self._details

    async def wait_for_connection(self) -> None:
        """Return at once."""

    async def _ended(self) -> None:
        if self._code is None:
            await asyncio.wait((self.task,))


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


async def _drain(queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while (request := await queue.get()) is not _END:
        yield request


async def _as_async(requests: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    if hasattr(requests, "__aiter__"):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
