"""Streams of bytes beside the calls of a link, such as a guest's console.

A stream follows the answer to the call that opens it, under the same program, procedure and serial.  A packet of it
holds bytes (CONTINUE; without any: none will follow from that side), or ends it: in order (OK), which the other side
answers with the same, or not (ERROR).  There is no flow control: what a receiver does not take waits in its memory.

Source: libvirt ``src/rpc/virnetclientstream.c`` and ``src/remote/remote_daemon_stream.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import anyio
import anyio.abc
import anyio.lowlevel

from ferryman_remote.protocol import RemoteError
from ferryman_remote.wire import Packet, PacketType, Status
from ferryman_remote.xdr import XDRError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ferryman_remote.link import Link

PIECE_BYTES = 65_536
"""At most so many in a packet, as libvirt's daemon sends them."""

MAX_WAITING_BYTES = 4_194_304
"""A stream whose receiver lets more than this wait is broken off."""

_OPERATION_FAILED, _OF_STREAMS = 9, 38
"""Numbers of an error, and of the part of libvirt that it is of. Source: libvirt include/libvirt/virterror.h."""


class PacketStream(anyio.abc.ByteStream):
    """Our end of a stream.  One task receives at a time, and one sends.

    :param opening: the call that opened it.
    :param when_closed: called once this side has ended it: what comes for it later is nobody's.
    """

    def __init__(self, link: Link, opening: Packet, when_closed: Callable[[], object] | None = None) -> None:
        self._link = link
        self._head = opening._replace(type=PacketType.STREAM, status=Status.OK, payload=b"", descriptors=0)
        self._received = bytearray()
        self._no_more = False
        self._sent_end = False
        self._changed = anyio.Event()
        self._when_closed = when_closed
        self.finished = False
        """The other side has ended it, or its link has ended."""
        self.failure = ""
        """Why it broke."""

    def owns(self, packet: Packet) -> bool:
        """Whether a packet of its serial belongs to it."""
        return (packet.program, packet.procedure) == (self._head.program, self._head.procedure)

    def take(self, packet: Packet) -> None:
        """Take a packet that the other side sent."""
        if packet.status is Status.CONTINUE and packet.payload:
            if not self._no_more:
                self._received += packet.payload
            if len(self._received) > MAX_WAITING_BYTES:
                self._received.clear()
                self.break_off(f"more than {MAX_WAITING_BYTES} bytes wait to be taken")
        elif packet.status is Status.ERROR:
            self.end(_reason(packet.payload))
        else:
            self._no_more = True
            self.finished = self.finished or packet.status is Status.OK
        self._wake()

    def end(self, failure: str) -> None:
        """The other side is gone, for that reason."""
        self.failure = self.failure or failure
        self._no_more = self.finished = True
        self._wake()

    def break_off(self, reason: str) -> None:
        """End it with an error, of which the other side is told."""
        self.failure = self.failure or reason
        self._no_more = True
        self._end_with(self._head._replace(status=Status.ERROR, payload=encode(broken(reason))))

    async def receive(self, max_bytes: int = PIECE_BYTES) -> bytes:
        """Wait for some bytes.

        :raises EndOfStream: the other side sends no more. :raises BrokenResourceError: the stream or its link broke.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        while not self._received:
            if self.failure:
                self._broken()
            if self._sent_end:
                raise anyio.ClosedResourceError
            if self._no_more:
                raise anyio.EndOfStream
            await self._changed.wait()
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        return data

    async def send(self, item: bytes) -> None:
        """Send all of it, a piece whenever the link has room.

        :raises BrokenResourceError: the stream or its link broke. :cancellation: a part of it may have been sent.
        """
        for at in range(0, len(item), PIECE_BYTES):
            await self._link.room()
            if self.failure or self.finished:
                self._broken()
            if self._sent_end:
                raise anyio.ClosedResourceError
            piece = bytes(item[at : at + PIECE_BYTES])
            self._link.send(self._head._replace(status=Status.CONTINUE, payload=piece))

    async def send_eof(self) -> None:
        """Say that no more bytes will follow from here."""
        if not self._sent_end:
            self._link.send(self._head._replace(status=Status.CONTINUE))

    async def wait_finished(self) -> None:
        """Wait until one of the sides has ended it."""
        while not (self.finished or self._sent_end):
            await self._changed.wait()

    async def aclose(self) -> None:
        """End it in order, if it has not ended already."""
        self._end_with(self._head)

    def _end_with(self, packet: Packet) -> None:
        if not self._sent_end:
            self._sent_end = True
            self._link.send(packet)
            if self._when_closed is not None:
                self._when_closed()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _broken(self) -> NoReturn:
        raise anyio.BrokenResourceError from ConnectionError(self.failure or "the other side ended it")


def broken(reason: str) -> RemoteError:
    """Why a stream is ended, for the other side."""
    return RemoteError(_OPERATION_FAILED, _OF_STREAMS, reason, 2, None, "%s", reason, None, -1, -1, None)


def _reason(payload: bytes) -> str:
    """Why the other side broke a stream off."""
    try:
        told = decode(RemoteError, payload).message if payload else None
    except XDRError as error:
        return f"the other side broke it off, for a reason that cannot be read: {error}"
    return told or "the other side broke it off"


async def carry(stream: PacketStream, guest: anyio.abc.ByteStream) -> None:
    """Carry bytes both ways until the other side ends a stream, or something breaks; then it is ended here, too."""

    async def outwards() -> None:
        try:
            while True:
                await stream.send(await guest.receive(PIECE_BYTES))
        except anyio.EndOfStream:
            await stream.send_eof()

    async def inwards() -> None:
        try:
            while True:
                await guest.send(await stream.receive())
        except anyio.EndOfStream:
            if not stream.finished:
                await guest.send_eof()

    async def until_it_breaks(direction: Callable[[], Awaitable[None]]) -> None:
        try:
            await direction()
        except anyio.BrokenResourceError as error:
            # What the other side has ended takes nothing any more, and that is no failure.
            if not stream.finished:
                stream.break_off(f"the guest's side broke: {error.__cause__ or 'it was closed'}")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(until_it_breaks, outwards)
        tasks.start_soon(until_it_breaks, inwards)
        await stream.wait_finished()
        tasks.cancel_scope.cancel()
    await stream.aclose()
