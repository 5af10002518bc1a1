"""What happens around every rpc, the same over sockets and inside one process.

Each handler of a service is wrapped once, when the service is added: request id, admission, credentials, metrics,
and the mapping of every exception to a status. No exception text leaves the process; a bug answers INTERNAL with a
correlation id, and its traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc.aio import AbortError

from hocket.errors import HocketError, Reason, Situation
from hocket.identity import digest_of, is_digest
from hocket.rpc.status import CODES, DETAILS_KEY, clip, to_status
from hocket.telemetry import metrics
from hocket.telemetry.context import REQUEST_ID_KEY, accept_request_id, request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
"""The server's side of one call, over a socket or inside the process."""

LOAD_KEY: Final = "hocket-load-bin"
"""Trailing metadata: a serialized WorkerLoad of each worker that took part."""

_log: Final = structlog.get_logger("rpc")
_DRAINING_RETRY_SECONDS: Final = 1.0
_QUEUE_FULL_RETRY_SECONDS: Final = 0.1
_MARGIN_SHARE: Final = 0.05
_MARGIN_SECONDS_MAX: Final = 0.05
_TOLD: Final = "request_id"
"""In a refusal's metadata: a service that was called has made it, and has logged it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Bearer tokens that guard some methods. A token of None leaves its methods open.

    `sha256:<64 hex digits>` stands for the token of that hash: who only checks a token need not have it.

    Args:
        admin: Needed by `admin_methods`.
        worker: Needed by `worker_methods`.
        admin_methods: Names of methods that change things.
        worker_methods: Names of methods that only workers call.
    """

    admin: str | None = None
    worker: str | None = None
    admin_methods: frozenset[str] = frozenset()
    worker_methods: frozenset[str] = frozenset()

    def check(self, method: str, context: Context) -> None:
        """Pass if the call may enter `method`.

        Raises:
            HocketError: `TOKEN_REQUIRED` without a known token, `TOKEN_NOT_ALLOWED` with the other one.
        """
        if self.admin is None and self.worker is None:
            return
        if method in self.admin_methods:
            needed, other = self.admin, self.worker
        elif method in self.worker_methods:
            needed, other = self.worker, self.admin
        else:
            return
        if needed is None:
            return
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        if isinstance(sent, str) and _shows(sent, needed):
            return
        if other is not None and isinstance(sent, str) and _shows(sent, other):
            raise HocketError(Reason.TOKEN_NOT_ALLOWED, f"this token does not allow {method}")
        raise HocketError(
            Reason.TOKEN_REQUIRED, f"{method} needs a token: send the metadata 'authorization: Bearer <token>'"
        )


def _shows(sent: str, token: str) -> bool:
    if is_digest(token):
        scheme, _, sent = sent.partition(" ")
        sent = digest_of(sent.encode()) if scheme == "Bearer" else ""
    else:
        token = f"Bearer {token}"
    return hmac.compare_digest(sent.encode(), token.encode())


@dataclass(slots=True)
class Handlers:
    """The wrapped handlers of one or more services: what a server or a local channel serves.

    Args:
        tokens: Which methods need which credentials.
        in_flight_max: Calls admitted at once; the next one is refused as `QUEUE_FULL`.
        unlimited: Methods that do not count: feeds and leases, which last as long as their peer.
        deadlines: Seconds after which calls of these methods end whose callers have set no deadline, even if nobody
            reads their answers.
        texts: Methods that answer in text, each with what tells how many tokens a response brings; None for one that
            no worker has made. What ends as unavailable when a worker's part has been delivered is `STREAM_BROKEN`.
    """

    tokens: Tokens = field(default_factory=Tokens)
    in_flight_max: int = 1024
    unlimited: frozenset[str] = frozenset()
    deadlines: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, Callable[[Any], int | None]] = field(default_factory=dict)
    services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = field(default_factory=dict)
    running: set[_Call] = field(default_factory=set)
    draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, add_servicer: Callable[[Any, Any], None], servicer: object) -> None:
        """Add a servicer by its generated `add_...Servicer_to_server`, which takes this for a server."""
        add_servicer(servicer, self)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Part of the generated registration; everything needed arrives by the next one."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Wrap and keep the handlers of a service."""
        self.services[service] = {
            method: _wrap(handler, _Method(self, service, method, handler)) for method, handler in handlers.items()
        }

    @property
    def in_flight(self) -> int:
        """Counted calls that run."""
        return len(self.running)

    def leave(self, call: _Call) -> None:
        """Count one call out."""
        self.running.discard(call)
        if not self.running:
            self.idle.set()

    def end_running(self) -> None:
        """End every counted call that runs, as `DRAINING`."""
        for call in tuple(self.running):
            call.stop(_draining("this server has shut down before the call was answered: try again"))

    async def wait_idle(self, seconds: float) -> None:
        """Return when no counted call runs, or after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.running:
                    self.idle.clear()
                    await self.idle.wait()


@dataclass(frozen=True, slots=True)
class _Shape:
    """One of the four kinds of rpc: its metric label, where grpc keeps its handler, and how to make one."""

    label: str
    attribute: str
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]]


_SHAPES: Final = {
    (False, False): _Shape("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): _Shape("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): _Shape("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): _Shape("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _shape(handler: grpc.RpcMethodHandler[Any, Any]) -> tuple[bool, bool]:
    return bool(handler.request_streaming), bool(handler.response_streaming)


class _Method:
    """One rpc of one service: its labels and its rules."""

    def __init__(self, handlers: Handlers, service: str, name: str, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        self.handlers = handlers
        self.service = service
        self.name = name
        self.counted = name not in handlers.unlimited
        self.counts = metrics.method_counts(_SHAPES[_shape(handler)].label, service, name)


class _Call:
    """One call in progress: counted from its construction to `end`."""

    __slots__ = ("_begin", "_context", "_id", "_is_cut", "_method", "_stopped_by", "_task", "_timer", "_token_count")

    def __init__(self, method: _Method, context: Context) -> None:
        self._begin = time.perf_counter()
        self._method = method
        self._context = context
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped_by: HocketError | None = None
        self._is_cut = False
        self._token_count: int | None = None
        sent = None
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY:
                sent = value
        self._id = accept_request_id(sent)
        request_id.set(self._id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))
        method.counts.started += 1
        if method.counted:
            method.handlers.running.add(self)

    def admit(self) -> None:
        """Pass if this call may run now. From then on its deadline counts.

        Raises:
            HocketError: `DRAINING`, `QUEUE_FULL`, or a token's reason.
        """
        method, handlers = self._method, self._method.handlers
        if handlers.draining:
            raise _draining("this server is shutting down: try another one")
        if method.counted and handlers.in_flight > handlers.in_flight_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"this server already runs {handlers.in_flight_max} calls",
                retry_after_seconds=_QUEUE_FULL_RETRY_SECONDS,
            )
        handlers.tokens.check(method.name, self._context)
        seconds = handlers.deadlines.get(method.name)
        if seconds is not None and remaining_seconds(self._context, math.inf) == math.inf:
            late = HocketError(Reason.DEADLINE, "the answer was not complete by this server's own deadline")
            self._timer = asyncio.get_running_loop().call_later(seconds, self.stop, late)

    async def write(self, response: Any) -> None:  # noqa: ANN401 - any message
        """Send one response of several."""
        try:
            await self._context.write(response)
        except Exception:
            self._is_cut = True  # nobody is there to be told anything
            raise
        self.note(response)

    def note(self, response: Any) -> None:  # noqa: ANN401 - any message
        """Take note of a response that has been delivered."""
        self._method.counts.sent += 1
        count_tokens = self._method.handlers.texts.get(self._method.name)
        if count_tokens is not None and (count := count_tokens(response)) is not None:
            self._token_count = (self._token_count or 0) + count

    def stop(self, error: HocketError) -> None:
        """End the call as `error` says, also while it waits for its caller to read."""
        if self._stopped_by is None and self._task is not None:
            self._stopped_by = error
            self._task.cancel()

    def end(self, code: str) -> None:
        """Count the end."""
        if self._timer is not None:
            self._timer.cancel()
        if self._method.counted:
            self._method.handlers.leave(self)
        self._method.counts.end(code, time.perf_counter() - self._begin)

    async def fail(self, raised: BaseException) -> NoReturn:
        """Count the end, then end the call as what was raised says. Always raises.

        The status is the last thing: it waits until the caller has read what was sent before.
        """
        error = self._told(raised)
        self.end(self._code_of(error))
        if isinstance(error, Exception) and not (self._is_cut or isinstance(error, AbortError)):
            await self._abort(error)
        raise raised

    def _told(self, error: BaseException) -> BaseException:
        """What a caller is told of.

        Work that was cancelled on this side, not by the caller, is a refusal: a transport would leave the caller
        waiting for its deadline instead.
        """
        if isinstance(error, asyncio.CancelledError) and self._task is not None:
            if self._stopped_by is not None:
                self._task.uncancel()
                error = self._stopped_by
            elif not self._task.cancelling():
                error = _draining("this server has stopped working on the call: try again")
        if (
            self._token_count is not None
            and isinstance(error, HocketError)
            and error.situation is Situation.UNAVAILABLE
        ):
            facts: dict[str, Any] = {**error.metadata, "tokens": str(self._token_count)}
            said = f"the answer broke off after {self._token_count} tokens: {error.message}"
            return HocketError(Reason.STREAM_BROKEN, said, **facts)
        return error

    def _code_of(self, error: BaseException) -> str:
        """Name of the status that `error` becomes."""
        if isinstance(error, HocketError):
            return CODES[error.situation].name
        if isinstance(error, AbortError):
            return str(self._context.code().name)
        if self._is_cut or isinstance(error, asyncio.CancelledError | GeneratorExit):
            return grpc.StatusCode.CANCELLED.name
        return grpc.StatusCode.INTERNAL.name

    async def _abort(self, error: Exception) -> None:
        """End the call with the status of `error`. Always raises."""
        if isinstance(error, HocketError) and error.situation is not Situation.BUG:
            refusal = error
            level = "info"
            if (
                refusal.situation is Situation.CORRUPT
            ):  # an operator has to act: told once, by the service that found it
                level = "debug" if _TOLD in refusal.metadata else "error"
            getattr(_log, level)(
                "refused", method=self._method.name, reason=refusal.reason, message=clip(refusal.message)
            )
        else:
            _log.error("bug", method=self._method.name, exc_info=error)
            refusal = HocketError(Reason.INTERNAL, f"internal error; quote {self._id} when you report it")
        metrics.REFUSALS.labels(self._method.service, self._method.name, refusal.reason).inc()
        status = to_status(refusal, self._id)
        await self._context.abort(
            CODES[refusal.situation],
            clip(refusal.message),
            ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, self._id)),
        )


def _wrap(handler: grpc.RpcMethodHandler[Any, Any], method: _Method) -> grpc.RpcMethodHandler[Any, Any]:
    shape = _SHAPES[_shape(handler)]
    surround = _streaming if handler.response_streaming else _answering
    behaviour = surround(getattr(handler, shape.attribute), method, counting=bool(handler.request_streaming))
    return shape.make(behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)


_UNREADABLE: Final = object()
"""Stands for bytes that are no message of the rpc's type, until the call is there to be refused."""


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """A deserializer that leaves refusing to the handler: the transport would answer with the exception's text."""

    def read(data: bytes) -> Any:  # noqa: ANN401 - any message
        try:
            return data if deserialize is None else deserialize(data)
        except DecodeError:
            return _UNREADABLE

    return read


def _readable(request: Any) -> Any:  # noqa: ANN401 - any message
    if request is _UNREADABLE:
        raise HocketError(Reason.BAD_REQUEST, "the request is not a message of this rpc")
    return request


def _answering(behaviour: Callable[..., Any], method: _Method, *, counting: bool) -> Callable[..., Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
        call = _Call(method, context)
        try:
            call.admit()
            response = await behaviour(_received(request, method, counting=counting), context)
        except BaseException as raised:  # noqa: BLE001 - the one place where every bug ends
            await call.fail(raised)
        call.note(response)
        call.end("OK")
        return response

    return answer


def _streaming(behaviour: Callable[..., Any], method: _Method, *, counting: bool) -> Callable[..., Awaitable[None]]:
    """A handler that writes what the behaviour yields.

    It writes, and does not yield in its turn: so a call that waits for its reader can be ended like any other.
    """

    async def stream(request: Any, context: Context) -> None:  # noqa: ANN401 - any message
        call = _Call(method, context)
        try:
            call.admit()
            async with aclosing(behaviour(_received(request, method, counting=counting), context)) as responses:
                async for response in responses:
                    await call.write(response)
        except BaseException as raised:  # noqa: BLE001 - the one place where every bug ends
            await call.fail(raised)
        call.end("OK")

    return stream


def _draining(message: str) -> HocketError:
    return HocketError(Reason.DRAINING, message, retry_after_seconds=_DRAINING_RETRY_SECONDS)


def _received(request: Any, method: _Method, *, counting: bool) -> Any:  # noqa: ANN401 - any message
    if not counting:
        method.counts.received += 1
        return _readable(request)
    return _counted(request, method)


async def _counted(requests: AsyncIterator[Any], method: _Method) -> AsyncIterator[Any]:
    async for request in requests:
        method.counts.received += 1
        yield _readable(request)


def add_trailing(context: Context, key: str, value: str | bytes) -> None:
    """Add one entry to the call's trailing metadata, keeping what is there."""
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (key, value)))


def remaining_seconds(context: Context, default: float) -> float:
    """Time left until the call's deadline, or `default` when the caller set none."""
    left = cast("float | None", context.time_remaining())  # None for "no deadline", which the types do not say
    return default if left is None else left


def hand_down(left_seconds: float) -> float:
    """The deadline for a call made on behalf of another: what remains, less a margin to use its answer in."""
    return max(0.0, left_seconds - min(_MARGIN_SHARE * left_seconds, _MARGIN_SECONDS_MAX))
