"""Calls between the programs of the fault campaign: pickles with a length, over TCP, both ends ours.

::

    caller                                  server
      |--- call: number, target, name, ... --->|   every call runs in a task of its own
      |<-- progress: number, value ------------|
      |--- cancel: number -------------------->|   the task is cancelled
      |<-- result, error, cancelled: number ---|

A connection that is gone cancels its calls at the server, and is an error of every call at the caller.  A peer that is
silent for some two seconds counts as gone.
"""

from __future__ import annotations

import io
import math
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream, TaskGroup

from ferryman.errors import ConnectError, ConnectionClosedError, FerrymanError

CONNECT_S = 1.0
SILENCE_S = 1.5
"""How long a peer may be silent before the connection to it counts as gone."""

_CANCEL_S = 5.0
_LENGTH = struct.Struct(">I")
_GONE = (
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
    OSError,
)

Progress = Callable[[Any], None]


class _Pickler(pickle.Pickler):
    """Exceptions travel with their attributes and causes, whatever their constructors take."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, BaseException):
            return _rebuild, (type(value), value.args, dict(value.__dict__), value.__cause__)
        return NotImplemented


def _rebuild(
    kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any], cause: BaseException | None
) -> BaseException:
    made = kind.__new__(kind)
    made.args = args
    made.__dict__.update(attributes)
    made.__cause__ = cause
    return made


def be_impatient(stream: socket.socket, silence_s: float = SILENCE_S) -> None:
    """Let the system end a connection whose peer is silent."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, 2),
        (socket.TCP_USER_TIMEOUT, int(silence_s * 1000)),
    ):
        stream.setsockopt(socket.IPPROTO_TCP, option, value)


class _Wire:
    """One connection: messages go out in order by a task of their own, so that nobody waits to send."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._queue, self._waiting = anyio.create_memory_object_stream[bytes](math.inf)
        self._rest = b""

    def send(self, *message: object) -> None:
        """Queue a message; one to a peer that is gone is dropped."""
        buffer = io.BytesIO()
        _Pickler(buffer).dump(message)
        data = buffer.getvalue()
        try:
            self._queue.send_nowait(_LENGTH.pack(len(data)) + data)
        except anyio.BrokenResourceError:
            return

    async def write(self) -> None:
        """Send what is queued, until the connection is gone."""
        with self._waiting:
            async for data in self._waiting:
                try:
                    await self._stream.send(data)
                except _GONE:
                    return

    async def receive(self) -> tuple[Any, ...]:
        (length,) = _LENGTH.unpack(await self._exactly(_LENGTH.size))
        message: tuple[Any, ...] = pickle.loads(await self._exactly(length))
        return message

    async def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += await self._stream.receive()
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    async def close(self) -> None:
        self._queue.close()
        await anyio.aclose_forcefully(self._stream)


async def serve(
    stream: ByteStream, targets: Mapping[str, object], *, progress_of: frozenset[str], busy: list[str]
) -> None:
    """Serve one connection until it is gone.

    :param progress_of: names of calls that take a last argument to report progress by.
    :param busy: holds the name of every call that is being done.
    """
    if isinstance(stream, SocketStream):
        be_impatient(stream.extra(SocketAttribute.raw_socket))
    wire = _Wire(stream)
    scopes: dict[int, anyio.CancelScope] = {}

    async def run(number: int, target: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        busy.append(name)
        with anyio.CancelScope() as scope:
            scopes[number] = scope
            if name in progress_of:
                args = (*args, lambda value: wire.send("progress", number, value))
            try:
                found = targets[target]
                wire.send("result", number, await getattr(found, name)(*args, **named))
            except anyio.get_cancelled_exc_class():
                wire.send("cancelled", number)
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
                wire.send("error", number, error)
            finally:
                del scopes[number]
                busy.remove(name)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wire.write)
            try:
                while True:
                    match await wire.receive():
                        case ("call", number, target, name, args, named):
                            tasks.start_soon(run, number, target, name, args, named)
                        case ("cancel", number):
                            if number in scopes:
                                scopes[number].cancel()
                        case message:
                            raise ValueError(f"a message that no client of ours sends: {message!r}")
            except _GONE:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await wire.close()


@dataclass(eq=False, slots=True)
class _Call:
    progress: Progress | None
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: tuple[Any, ...] = ()


class Link:
    """The caller's end of one connection."""

    def __init__(self, stream: ByteStream, name: str) -> None:
        self.gone = False
        self._wire = _Wire(stream)
        self._name = name
        self._calls: dict[int, _Call] = {}
        self._numbers = 0

    @classmethod
    async def dial(cls, host: str, port: int, tasks: TaskGroup) -> Link:
        """Connect.  :raises ConnectError: nobody answers there in time."""
        try:
            with anyio.fail_after(CONNECT_S):
                stream = await anyio.connect_tcp(host, port)
        except OSError as error:  # the time-out too
            raise ConnectError(f"{host}:{port} cannot be reached: {error}") from error
        be_impatient(stream.extra(SocketAttribute.raw_socket))
        link = cls(stream, f"{host}:{port}")
        tasks.start_soon(link._read)
        tasks.start_soon(link._wire.write)
        return link

    async def _read(self) -> None:
        try:
            while True:
                kind, number, *rest = await self._wire.receive()
                call = self._calls.get(number)
                if call is None:
                    continue
                if kind == "progress":
                    if call.progress is not None:
                        call.progress(*rest)
                else:
                    call.answer = (kind, *rest)
                    call.done.set()
        except _GONE:
            pass
        finally:
            self.gone = True
            for call in self._calls.values():
                call.done.set()
            with anyio.CancelScope(shield=True):
                await self._wire.close()

    async def call(
        self, target: str, name: str, *args: object, progress: Progress | None = None, **named: object
    ) -> Any:
        """Call, and return or raise what comes of it.

        :raises ConnectionClosedError: the connection is gone, and nobody knows what came of the call.
        :cancellation: cancels the call at the server, and returns with its result where that was too late.
        """
        if self.gone:
            raise self._closed()
        self._numbers += 1
        number = self._numbers
        call = self._calls[number] = _Call(progress)
        try:
            self._wire.send("call", number, target, name, args, named)
            try:
                await call.done.wait()
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True), anyio.move_on_after(_CANCEL_S):
                    self._wire.send("cancel", number)
                    await call.done.wait()
                if call.answer[:1] != ("result",):
                    raise
        finally:
            del self._calls[number]
        match call.answer:
            case ("result", value):
                return value
            case ("error", error):
                raise error
            case _:
                raise self._closed()

    def _closed(self) -> ConnectionClosedError:
        return ConnectionClosedError(f"the connection to {self._name} was closed before or during the call")


async def ask(host: str, port: int, question: Callable[[Link], Awaitable[None]]) -> None:
    """Connect for the length of one question, whose error is raised as it is."""
    failure: FerrymanError | None = None
    async with anyio.create_task_group() as tasks:
        try:
            await question(await Link.dial(host, port, tasks))
        except FerrymanError as error:
            failure = error  # not through the group, which would wrap it
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
