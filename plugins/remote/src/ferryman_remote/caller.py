"""The calling end of a link: each call waits for the answer with its serial."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from ferryman.errors import ConnectionClosedError, FerrymanError, HypervisorError
from ferryman_remote import ferry
from ferryman_remote.protocol import RemoteError, Void
from ferryman_remote.streams import PacketStream
from ferryman_remote.values import ValueFormError, load_error
from ferryman_remote.wire import Packet, PacketType, Status
from ferryman_remote.xdr import XDRError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ferryman_remote.link import Link

T = TypeVar("T", bound=tuple[Any, ...])

CANCEL_PATIENCE_S = 30.0


@dataclass(eq=False, slots=True)
class _Waiting:
    """A call that has not been answered, and what is done with samples that come meanwhile."""

    answered: anyio.Event = field(default_factory=anyio.Event)
    answer: Packet | None = None
    progress: Callable[[bytes], None] | None = None


class Caller:
    """Calls over one link.

    :param happened: takes every event that belongs to no call; it may raise XDRError or ValueFormError.
    """

    def __init__(self, link: Link, happened: Callable[[Packet], None]) -> None:
        self.link = link
        self._happened = happened
        self._waiting: dict[int, _Waiting] = {}
        self._streams: dict[int, PacketStream] = {}
        self._serial = 0

    async def run(self) -> None:
        """Serve the link until it ends; calls that wait then fail."""
        try:
            await self.link.run(self._take)
        finally:
            for waiting in self._waiting.values():
                waiting.answered.set()
            for stream in self._streams.values():
                stream.end(str(self._closed()))

    async def _take(self, packet: Packet) -> None:
        if packet.type is PacketType.REPLY:
            waiting = self._waiting.pop(packet.serial, None)
            if waiting is None:
                self.link.cut(f"an answer to a call that was not made: serial {packet.serial}")
                return
            waiting.answer = packet
            waiting.answered.set()
        elif packet.type is PacketType.EVENT:
            try:
                self._hear(packet)
            except (XDRError, ValueFormError) as error:
                self.link.cut(f"an event cannot be read: {error}")
        elif packet.type is PacketType.STREAM:
            stream = self._streams.get(packet.serial)
            if stream is not None and stream.owns(packet):
                stream.take(packet)
        else:
            self.link.cut(f"a packet of type {packet.type.name}, which nobody asked for")

    def _hear(self, packet: Packet) -> None:
        if (packet.program, packet.procedure) != (ferry.PROGRAM, ferry.Number.PROGRESS):
            self._happened(packet)
            return
        sample = decode(ferry.Progress, packet.payload)
        called = self._waiting.get(sample.serial)
        if called is not None and called.progress is not None:
            called.progress(sample.statistics)

    async def call(
        self,
        program: int,
        procedure: int,
        arguments: tuple[Any, ...],
        result: type[T],
        *,
        progress: Callable[[bytes], None] | None = None,
        late: Callable[[T], Any] | None = None,
    ) -> T:
        """Call, and wait for the answer.

        :param late: awaited with an answer that came although the call was cancelled, to undo what it reports.
        :raises ConnectionClosedError: the link ended before the answer: what became of the call is not known.
        :raises FerrymanError: what the far end raised.
        :cancellation: of Ferryman's own program: the far end is told, and its answer awaited for at most 30 s.
        """
        serial, waiting = self._send(program, procedure, arguments, progress)
        return await self._answer(program, serial, waiting, result, late)

    async def stream(self, program: int, procedure: int, arguments: tuple[Any, ...]) -> PacketStream:
        """Make a call that opens a stream, and wait for its answer.

        :raises ConnectionClosedError: the link ended before the answer. :raises FerrymanError: what the far end raised.
        :cancellation: as of :meth:`call`; a stream that is opened then is closed.
        """
        serial, waiting = self._send(program, procedure, arguments)
        opening = Packet(program, 1, procedure, PacketType.CALL, serial)
        forget = partial(self._streams.pop, serial, None)
        stream = self._streams[serial] = PacketStream(self.link, opening, forget)

        async def close(_answer: Void) -> None:
            await stream.aclose()

        try:
            await self._answer(program, serial, waiting, Void, close)
        except BaseException:
            forget()
            raise
        return stream

    async def _answer(
        self,
        program: int,
        serial: int,
        waiting: _Waiting,
        result: type[T],
        late: Callable[[T], Any] | None,
    ) -> T:
        try:
            await waiting.answered.wait()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_PATIENCE_S):
                if program == ferry.PROGRAM:
                    self._send(ferry.PROGRAM, ferry.Number.CANCEL, ferry.Cancel(serial))
                    await waiting.answered.wait()
                if late is not None and waiting.answer is not None and waiting.answer.status is Status.OK:
                    await late(self._result(waiting, result))
            raise
        return self._result(waiting, result)

    def _send(
        self,
        program: int,
        procedure: int,
        arguments: tuple[Any, ...],
        progress: Callable[[bytes], None] | None = None,
    ) -> tuple[int, _Waiting]:
        """Make a call; returns its serial, and where its answer will be, which is known until it comes."""
        if self.link.ended:
            raise self._closed()
        payload = encode(arguments)
        serial, self._serial = self._serial, (self._serial + 1) & 0xFFFFFFFF
        waiting = self._waiting[serial] = _Waiting(progress=progress)
        self.link.send(Packet(program, 1, procedure, PacketType.CALL, serial, payload=payload))
        return serial, waiting

    def _closed(self) -> ConnectionClosedError:
        why = self.link.reason or "it was closed"
        return ConnectionClosedError(f"the connection to {self.link.name} ended: {why}")

    def _result(self, waiting: _Waiting, result: type[T]) -> T:
        answer = waiting.answer
        if answer is None:
            raise self._closed()
        try:
            if answer.status is Status.ERROR:
                raise error_of(decode(RemoteError, answer.payload))
            return decode(result, answer.payload)
        except XDRError as error:
            raise HypervisorError(f"{self.link.name} answered what cannot be read: {error}") from error


def error_of(told: RemoteError) -> FerrymanError:
    """The error that the far end raised; a stock daemon's is a hypervisor's."""
    message = told.message or "the far end failed, and does not say why"
    if told.str1 is not None and told.str2 is not None and told.str2.startswith("{"):
        return load_error(message, told.str1, told.str2.encode())
    return HypervisorError(message)
