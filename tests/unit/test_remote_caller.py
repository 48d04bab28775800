"""The calling end of a link, against a peer that answers late, wrongly, or not at all."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

import ferryman_remote.caller
from ferryman.errors import ConnectionClosedError, DomainNotFoundError, HypervisorError
from ferryman_remote import ferry
from ferryman_remote.caller import Caller
from ferryman_remote.daemon.errors import told_to_ferryman
from ferryman_remote.link import Link
from ferryman_remote.sockets import PlainStream
from ferryman_remote.values import ValueFormError
from ferryman_remote.wire import MAX_MESSAGE_BYTES, Packet, PacketReader, PacketType, Status
from ferryman_remote.xdr import decode, encode

OPEN = (ferry.PROGRAM, ferry.Number.OPEN, ferry.Open("test:///a/b", 0), ferry.OpenReply)
OPENED = ferry.OpenReply("there", "", ())


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Peer:
    """The far end, by hand."""

    def __init__(self, stream: PlainStream) -> None:
        self.stream = stream
        self._reader = PacketReader()
        self._read: list[Packet] = []

    async def call(self) -> Packet:
        with anyio.fail_after(10):
            while not self._read:
                self._read += self._reader.feed(await self.stream.receive())
        return self._read.pop(0)

    async def answer(self, call: Packet, result: tuple[object, ...], status: Status = Status.OK) -> None:
        payload = encode(result) if result else b""
        answer = call._replace(type=PacketType.REPLY, status=status, payload=payload)
        await self.stream.send(answer.pack())

    async def tell(self, number: int, payload: bytes) -> None:
        await self.stream.send(Packet(ferry.PROGRAM, 1, number, PacketType.EVENT, 0, payload=payload).pack())


def refuse(_packet: Packet) -> None:
    raise ValueFormError("no event that is known here")


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Caller, Peer]]:
    ours, theirs = socket.socketpair()
    async with PlainStream(ours) as near, PlainStream(theirs) as far, anyio.create_task_group() as tasks:
        caller = Caller(Link(near, name="the far end", limit=MAX_MESSAGE_BYTES), refuse)
        tasks.start_soon(caller.run)
        yield caller, Peer(far)
        caller.link.cut("the test is over")


async def test_answers_come_in_any_order() -> None:
    async with linked() as (caller, peer), anyio.create_task_group() as tasks:
        names: list[str] = []

        async def call(uri: str) -> None:
            reply = await caller.call(ferry.PROGRAM, ferry.Number.OPEN, ferry.Open(uri, 0), ferry.OpenReply)
            assert reply.distribution == uri
            names.append(uri)

        for uri in "abc":
            tasks.start_soon(call, uri)
        for asked in reversed([await peer.call() for _ in range(3)]):
            await peer.answer(asked, ferry.OpenReply(decode(ferry.Open, asked.payload).uri, "", ()))
    assert names == ["c", "b", "a"]


async def test_a_cancelled_call_is_cancelled_there_and_undone_where_that_was_too_late() -> None:
    undone: list[ferry.OpenReply] = []

    async def undo(reply: ferry.OpenReply) -> None:
        undone.append(reply)

    async with linked() as (caller, peer):
        async with anyio.create_task_group() as tasks:

            async def call() -> None:
                await caller.call(*OPEN, late=undo)

            tasks.start_soon(call)
            asked = await peer.call()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                cancel = await peer.call()
                assert cancel.procedure == ferry.Number.CANCEL
                assert decode(ferry.Cancel, cancel.payload).serial == asked.serial
                await peer.answer(asked, OPENED)
                await peer.answer(cancel, ())
        assert undone == [OPENED]
        # The link is as good as before.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, *OPEN)
            await peer.answer(await peer.call(), OPENED)


async def test_an_answer_after_a_cancelled_call_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferryman_remote.caller, "CANCEL_PATIENCE_S", 0.1)
    async with linked() as (caller, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, *OPEN)
            asked = await peer.call()
            tasks.cancel_scope.cancel()
        await peer.answer(asked, OPENED)
        await peer.answer(await peer.call(), ())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.call, *OPEN)
            await peer.answer(await peer.call(), OPENED)
        assert not caller.link.ended


async def test_the_error_of_the_far_end_is_raised_here() -> None:
    async with linked() as (caller, peer), anyio.create_task_group() as tasks:

        async def call() -> None:
            with pytest.raises(DomainNotFoundError, match="no web there") as caught:
                await caller.call(*OPEN)
            assert caught.value.domain == "web"
            with pytest.raises(HypervisorError, match="cannot be read"):
                await caller.call(*OPEN)

        tasks.start_soon(call)
        refusal = told_to_ferryman(DomainNotFoundError("no web there", domain="web"))
        await peer.answer(await peer.call(), refusal, Status.ERROR)
        await peer.answer(await peer.call(), ())


@pytest.mark.parametrize("how", ["closed", "an answer to nothing", "garbage", "progress", "event", "a call"])
async def test_calls_fail_when_the_link_ends(how: str) -> None:
    async with linked() as (caller, peer), anyio.create_task_group() as tasks:

        async def call() -> None:
            with pytest.raises(ConnectionClosedError, match="the far end ended"):
                await caller.call(*OPEN)
            with pytest.raises(ConnectionClosedError):
                await caller.call(*OPEN)

        tasks.start_soon(call)
        asked = await peer.call()
        match how:
            case "closed":
                await peer.stream.aclose()
            case "an answer to nothing":
                await peer.answer(asked._replace(serial=99), OPENED)
            case "garbage":
                await peer.stream.send(b"\x7f" * 64)
            case "progress":
                await peer.tell(ferry.Number.PROGRESS, b"\0")
            case "event":
                await peer.tell(ferry.Number.EVENT, b"")
            case "a call":
                await peer.stream.send(asked.pack())
