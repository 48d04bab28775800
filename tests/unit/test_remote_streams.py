"""Streams beside calls: what each end says, and what is made of nonsense, floods and a link that breaks."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

import ferryman_remote.streams
from ferryman.errors import ConnectionClosedError, HypervisorError
from ferryman_remote.caller import Caller
from ferryman_remote.link import Link
from ferryman_remote.protocol import RemoteError, Void
from ferryman_remote.sockets import PlainStream
from ferryman_remote.streams import MAX_WAITING_BYTES, PIECE_BYTES, PacketStream, carry
from ferryman_remote.wire import MAX_MESSAGE_BYTES, Packet, PacketType, Status
from ferryman_remote.xdr import decode, encode

PROGRAM, PROCEDURE = 7, 9


class Far:
    """The other end of a link: it answers calls with a stream, and says anything."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.stream: PacketStream | None = None
        self.heard: list[Packet] = []
        self.refuses = False

    async def take(self, packet: Packet) -> None:
        if packet.type is PacketType.CALL:
            answer = packet._replace(type=PacketType.REPLY, payload=b"")
            if self.refuses:
                error = RemoteError(55, 10, "no such console", 2, None, None, None, None, -1, -1, None)
                self.link.send(answer._replace(status=Status.ERROR, payload=encode(error)))
                return
            self.stream = PacketStream(self.link, packet)
            self.link.send(answer)
            # Right behind the answer, before anybody can have looked at it.
            self.say(Status.CONTINUE, b"login: ", packet.serial)
        elif self.stream is not None:
            self.heard.append(packet)
            self.stream.take(packet)

    def say(self, status: Status, payload: bytes = b"", serial: int = 0, procedure: int = PROCEDURE) -> None:
        self.link.send(Packet(PROGRAM, 1, procedure, PacketType.STREAM, serial, status, payload))


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[Caller, Far]]:
    """A caller and its far end, over a real socket."""
    near, far = (PlainStream(raw) for raw in socket.socketpair())
    caller = Caller(Link(near, name="far", limit=MAX_MESSAGE_BYTES), lambda packet: None)
    answering = Far(Link(far, name="near", limit=MAX_MESSAGE_BYTES))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.run)
        tasks.start_soon(answering.link.run, answering.take)
        yield caller, answering
        caller.link.cut("the test is over")
        answering.link.cut("the test is over")


async def opened(caller: Caller) -> PacketStream:
    return await caller.stream(PROGRAM, PROCEDURE, Void())


async def test_bytes_both_ways_and_an_end_in_order() -> None:
    data = random.Random(1).randbytes(3 * PIECE_BYTES + 5)
    async with ends() as (caller, far):
        near = await opened(caller)
        assert await near.receive() == b"login: "
        assert far.stream is not None
        for sender, receiver in ((near, far.stream), (far.stream, near)):
            received = b""
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, data)
                while len(received) < len(data):
                    received += await receiver.receive(1000)
            assert received == data
        await near.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await far.stream.receive()
        await far.stream.send(b"still heard")
        assert await near.receive() == b"still heard"
        await near.aclose()
        await far.stream.wait_finished()
        assert not far.stream.failure
        await far.stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await near.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await near.send(b"more")
        # What comes for it late is nobody's, and the link serves on.
        far.say(Status.CONTINUE, b"late")
        second = await opened(caller)
        assert await second.receive() == b"login: "
        assert [packet.status for packet in far.heard[-2:]] == [Status.CONTINUE, Status.OK]


async def test_the_other_side_breaks_it_off() -> None:
    async with ends() as (caller, far):
        stream = await opened(caller)
        assert far.stream is not None
        far.stream.break_off("the guest is on fire")
        assert await stream.receive() == b"login: "
        for _ in range(2):
            with pytest.raises(anyio.BrokenResourceError) as failure:
                await stream.receive()
            assert "on fire" in str(failure.value.__cause__)
        with pytest.raises(anyio.BrokenResourceError):
            await stream.send(b"?")
        for payload, reason in ((b"", "broke it off"), (b"\0garbage", "cannot be read")):
            stream = await opened(caller)
            far.say(Status.ERROR, payload, serial=caller._serial - 1)
            await stream.receive()
            with pytest.raises(anyio.BrokenResourceError) as failure:
                await stream.receive()
            assert reason in str(failure.value.__cause__)


async def test_a_receiver_who_takes_nothing() -> None:
    async with ends() as (caller, far):
        stream = await opened(caller)
        assert far.stream is not None
        for _ in range(MAX_WAITING_BYTES // PIECE_BYTES + 1):
            await stream.send(bytes(PIECE_BYTES))
        with pytest.raises(anyio.BrokenResourceError):
            while True:
                await stream.receive()
        assert "wait to be taken" in stream.failure
        assert far.stream._received == b""
        error = decode(RemoteError, encode(ferryman_remote.streams.broken("x")))
        assert (error.code, error.domain, error.message) == (9, 38, "x")


async def test_a_sender_waits_while_much_is_to_be_written() -> None:
    near, far = (PlainStream(raw) for raw in socket.socketpair())
    link = Link(near, name="far", limit=MAX_MESSAGE_BYTES)
    stream = PacketStream(link, Packet(PROGRAM, 1, PROCEDURE, PacketType.CALL, 0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run, _nothing)
        with anyio.move_on_after(0.2) as scope:
            for _ in range(100):
                await stream.send(bytes(PIECE_BYTES * 4))
        assert scope.cancelled_caught
        assert len(link._waiting) < 10 * PIECE_BYTES
        await far.aclose()
        with pytest.raises(anyio.BrokenResourceError), anyio.fail_after(10):
            while True:
                await stream.send(bytes(PIECE_BYTES))
                if link.ended:
                    stream.end(link.reason)


async def _nothing(packet: Packet) -> None:
    """Take what nobody sends."""


async def test_an_opening_that_is_refused_cancelled_or_cut() -> None:
    async with ends() as (caller, far):
        far.refuses = True
        with pytest.raises(HypervisorError, match="no such console"):
            await opened(caller)
        assert caller._streams == {}
        far.refuses = False
        # Of a program that is not ours, nobody is told of a cancellation.
        with anyio.CancelScope() as scope:
            scope.cancel()
            await opened(caller)
        assert caller._streams == {}
        stream = await opened(caller)
        await stream.receive()
        far.link.cut("it crashed")
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        with pytest.raises(ConnectionClosedError):
            await opened(caller)


async def test_packets_that_belong_to_nobody() -> None:
    async with ends() as (caller, far):
        stream = await opened(caller)
        await stream.receive()
        for status in Status:
            far.say(status, b"x", serial=77)
            far.say(status, b"x", procedure=PROCEDURE + 1)
        far.say(Status.CONTINUE, b"mine")
        assert await stream.receive() == b"mine"


class Guest(anyio.abc.ByteStream):
    """A console whose guest does what it is told to."""

    def __init__(self, says: bytes, *, breaks: bool = False, deaf: bool = False) -> None:
        self._says = says
        self._breaks = breaks
        self._deaf = deaf
        self.heard = b""
        self.eof = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self._says:
            if self._breaks:
                raise anyio.BrokenResourceError
            raise anyio.EndOfStream
        data, self._says = self._says[:max_bytes], self._says[max_bytes:]
        return data

    async def send(self, item: bytes) -> None:
        if self._deaf:
            raise anyio.BrokenResourceError from OSError("nobody reads")
        self.heard += item

    async def send_eof(self) -> None:
        self.eof = True

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("how", [{}, {"breaks": True}, {"deaf": True}], ids=str)
async def test_carrying_ends_with_either_side(how: dict[str, bool]) -> None:
    guest = Guest(b"bye", **how)
    async with ends() as (caller, far):
        near = await opened(caller)
        await near.receive()
        assert far.stream is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(carry, far.stream, guest)
            await near.send(b"hello")
            await near.send_eof()
            if how:
                with pytest.raises(anyio.BrokenResourceError):
                    while True:
                        await near.receive()
            else:
                assert await near.receive() == b"bye"
                with pytest.raises(anyio.EndOfStream):
                    await near.receive()
                await near.aclose()
        if not how:
            assert (guest.heard, guest.eof) == (b"hello", True)
