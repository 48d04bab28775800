"""One client of the daemon that says what no client should: it is answered or cut off, and nobody else notices."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

import ferryman_remote.link
from ferryman import hookspecs
from ferryman.testing import forget_world
from ferryman_remote import ferry, protocol
from ferryman_remote.daemon import calls  # noqa: F401 - it fills the registry of answers
from ferryman_remote.daemon.answers import ANSWERS
from ferryman_remote.daemon.hosts import Hosts
from ferryman_remote.daemon.session import Limits, serve
from ferryman_remote.protocol import KEEPALIVE_PROGRAM, PROCEDURES, REMOTE_PROGRAM, RemoteError
from ferryman_remote.sockets import PlainStream, accept, connect_unix, listen_tcp, listen_unix
from ferryman_remote.wire import Packet, PacketReader, PacketType, Status
from ferryman_remote.xdr import decode, encode

NUMBERS = {procedure.name: procedure.number for procedure in PROCEDURES.values()}
LIMITS = Limits(opening_s=20.0)
WHO = hookspecs.Client(transport="unix", uid=1000, pid=7)
LAB = "test:///session/host"
DOMAIN = (
    "<domain type='test'><name>web</name><uuid>00000000-0000-4000-8000-000000000001</uuid>"
    "<memory unit='MiB'>8</memory><vcpu>1</vcpu></domain>"
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Client:
    """Says anything, and reads packets."""

    def __init__(self, stream: PlainStream) -> None:
        self.stream = stream
        self._reader = PacketReader()
        self._read: list[Packet] = []
        self._serial = 0

    async def send(self, name: str, *arguments: object, **header: Any) -> int:
        """Make a call; returns its serial."""
        procedure = PROCEDURES[NUMBERS[name]]
        payload = encode(procedure.arguments(*arguments)) if arguments else b""
        packet = Packet(REMOTE_PROGRAM, 1, procedure.number, PacketType.CALL, self._serial, payload=payload)
        self._serial += 1
        await self.stream.send(packet._replace(**header).pack())
        return int(header.get("serial", self._serial - 1))

    async def packet(self) -> Packet:
        with anyio.fail_after(10):
            while not self._read:
                self._read += self._reader.feed(await self.stream.receive())
        return self._read.pop(0)

    async def error(self) -> RemoteError:
        packet = await self.packet()
        assert (packet.type, packet.status) == (PacketType.REPLY, Status.ERROR)
        return decode(RemoteError, packet.payload)

    async def ok(self) -> Packet:
        packet = await self.packet()
        assert packet.status is Status.OK, decode(RemoteError, packet.payload)
        return packet

    async def open(self, uri: str = LAB, flags: int = 0) -> None:
        await self.send("CONNECT_OPEN", uri, flags)
        await self.ok()

    async def cut_off(self) -> None:
        """See that the daemon ends the connection."""
        with anyio.fail_after(10):
            try:
                while True:
                    await self.stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return


class Served:
    """A place where sessions are served."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await connect_unix(self.path) as stream:
            yield Client(stream)


@asynccontextmanager
async def served(
    directory: Path, limits: Limits = LIMITS, *, read_only: bool = False, reviewer: object | None = None
) -> AsyncIterator[Served]:
    place = Served(directory / "socket")
    try:
        async with anyio.create_task_group() as tasks:
            hosts = Hosts(
                tasks,
                lambda uri: None,
                default=LAB,
                features=frozenset({1, 3, 6, 13}),
                allows=lambda uri: not uri.params,
                reviewer=reviewer,
            )

            async def session(stream: PlainStream, _peer: object) -> None:
                await serve(stream, hosts, limits, client=WHO, read_only=read_only)
                place.ended += 1

            tasks.start_soon(accept, listen_unix(place.path, 0o600), session)
            yield place
            # Whatever was said to it: another client is served.
            async with place.client() as other:
                await other.open()
                await other.send("CONNECT_GET_HOSTNAME")
                await other.ok()
            tasks.cancel_scope.cancel()
    finally:
        forget_world("session")


async def test_garbage_ends_its_connection(tmp_path: Path) -> None:
    chance = random.Random(1)
    async with served(tmp_path) as place:
        for length in (0x7FFFFFFF, 27, 0, 65_541):
            async with place.client() as client:
                await client.stream.send(length.to_bytes(4, "big") + bytes(100))
                await client.cut_off()
        for _ in range(50):
            async with place.client() as client:
                await client.stream.send(b"\0\0\0\x40" + chance.randbytes(60))
                await client.stream.send_eof()
                await client.cut_off()


@pytest.mark.parametrize("kind", [PacketType.REPLY, PacketType.EVENT, PacketType.CALL_WITH_DESCRIPTORS])
async def test_what_no_client_sends(tmp_path: Path, kind: PacketType) -> None:
    async with served(tmp_path) as place, place.client() as client:
        await client.send("CONNECT_GET_TYPE", type=kind)
        await client.cut_off()


async def test_the_order_of_calls(tmp_path: Path) -> None:
    async with served(tmp_path) as place, place.client() as client:
        await client.send("CONNECT_SUPPORTS_FEATURE", 10)
        assert decode(protocol.ConnectSupportsFeatureReply, (await client.ok()).payload).supported == 1
        await client.send("CONNECT_GET_HOSTNAME")
        assert (await client.error()).message == "hypervisor connection not open"
        await client.send("CONNECT_OPEN", None, 0)
        assert (await client.error()).code == 1
        await client.send("CONNECT_OPEN", "nosuch:///x", 0)
        assert (await client.error())[:2] == (5, 0)
        await client.send("CONNECT_OPEN", "no uri", 0)
        assert (await client.error()).code == 8
        await client.send("CONNECT_OPEN", "test:///session/host?root=/", 0)
        assert "is not served here" in ((await client.error()).message or "")
        await client.open()
        await client.send("CONNECT_OPEN", LAB, 0)
        assert (await client.error()).message == "connection already open"
        for feature, answer in ((13, 1), (12, 0), (-1, 0), (99, 0)):
            await client.send("CONNECT_SUPPORTS_FEATURE", feature)
            found = decode(protocol.ConnectSupportsFeatureReply, (await client.ok()).payload)
            assert found.supported == answer
        await client.send("CONNECT_CLOSE")
        await client.ok()
        await client.cut_off()


async def test_unknown_and_malformed_calls(tmp_path: Path) -> None:
    async with served(tmp_path) as place, place.client() as client:
        await client.open()
        await client.send("CONNECT_GET_TYPE", procedure=52)
        error = await client.error()
        assert (error.code, error.domain, error.level) == (39, 7, 2)
        assert (error.message or "").startswith("unknown procedure")
        await client.send("CONNECT_GET_TYPE", program=7)
        assert (await client.error()).message == "Cannot find program 7 version 1"
        await client.send("CONNECT_GET_TYPE", version=2)
        assert (await client.error()).code == 39
        for payload in (b"", b"\0\0\0\x05ab", b"\xff" * 40):
            await client.send("DOMAIN_LOOKUP_BY_NAME", payload=payload)
            assert (await client.error()).code == 39
        await client.send("DOMAIN_LOOKUP_BY_NAME", "nobody")
        assert (await client.error()).code == 42
        for number in (99, 4, 0, -1):
            packet = Packet(ferry.PROGRAM, 1, number, PacketType.CALL, 1000 + number)
            await client.stream.send(packet.pack())
            assert (await client.error()).code in (3, 39)
        for name, arguments in (
            ("connection_close", b"{}"),
            ("migrate_finish", b"{}"),
            ("domain_list", b"["),
        ):
            call = encode(ferry.Call(name, arguments))
            await client.stream.send(
                Packet(ferry.PROGRAM, 1, ferry.Number.HOOK, PacketType.CALL, 2000, payload=call).pack()
            )
            assert (await client.error()).code in (3, 39)
        for name, arguments in (("_journal", b"{}"), ("decide", b"{}"), ("decide", b'{"cookie":"e30="}')):
            call = encode(ferry.Call(name, arguments))
            await client.stream.send(
                Packet(ferry.PROGRAM, 1, ferry.Number.HOST, PacketType.CALL, 3000, payload=call).pack()
            )
            assert (await client.error()).code in (3, 8, 39)


async def test_two_openings_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as place, place.client() as client:
        for _ in range(2):
            await client.send("CONNECT_OPEN", LAB, 1)
        # The second comes while the first is under way, and changes nothing of what the first has asked for.
        answers = [await client.packet(), await client.packet()]
        assert sorted(answer.status for answer in answers) == [Status.OK, Status.ERROR]
        await client.send("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        await client.ok()
        async with place.client() as other:
            await other.open()
            await other.send("DOMAIN_CREATE_XML", DOMAIN, 0)
            await other.ok()
        told = await client.packet()
        assert (told.type, told.procedure) == (PacketType.EVENT, 318)
        await client.send("DOMAIN_DEFINE_XML", DOMAIN)
        assert (await client.error()).code == 29


async def test_a_defect_in_the_answer_to_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    for name in ("CONNECT_GET_HOSTNAME", "CONNECT_GET_TYPE"):
        number = NUMBERS[name]
        monkeypatch.setitem(ANSWERS, number, replace(ANSWERS[number], body=broken))
    async with served(tmp_path) as place, place.client() as client:
        await client.open()
        for name in ("CONNECT_GET_HOSTNAME", "CONNECT_GET_TYPE"):
            await client.send(name)
            assert (await client.error()).code == 1
        await client.send("CONNECT_LIST_ALL_DOMAINS", 1, 0)
        await client.ok()
        monkeypatch.undo()


async def test_clients_that_are_gone_before_they_are_served(tmp_path: Path) -> None:
    """The kernel accepts for the daemon: the peer of what it hands over may have reset the connection long ago."""
    async with anyio.create_task_group() as tasks:
        listener = listen_tcp("127.0.0.1", 0)
        port = listener.getsockname()[1]
        ended = anyio.Event()

        async def answer(stream: PlainStream, peer: Any) -> None:
            raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
            raw.getpeername()  # raises where the peer is gone
            with_room.append(peer)
            ended.set()

        with_room: list[Any] = []
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tasks.start_soon(accept, listener, answer)
        with socket.create_connection(("127.0.0.1", port)) as alive, anyio.fail_after(10):
            await ended.wait()
            assert alive.getsockname() in with_room
        tasks.cancel_scope.cancel()


async def test_a_serial_that_is_used_twice(tmp_path: Path) -> None:
    async with served(tmp_path, replace(LIMITS, calls=1)) as place, place.client() as client:
        await client.open()
        call = Packet(REMOTE_PROGRAM, 1, NUMBERS["CONNECT_LIST_ALL_DOMAINS"], PacketType.CALL, 7)
        payload = encode(protocol.ConnectListAllDomains(1, 0))
        await client.stream.send(call._replace(payload=payload).pack() * 2)
        await client.cut_off()


async def test_calls_in_a_row_and_a_ping_beside_them(tmp_path: Path) -> None:
    async with served(tmp_path, replace(LIMITS, calls=4)) as place, place.client() as client:
        await client.open()
        serials = {await client.send("CONNECT_LIST_ALL_DOMAINS", 1, 0) for _ in range(200)}
        await client.stream.send(Packet(KEEPALIVE_PROGRAM, 1, 1, PacketType.EVENT, 0).pack())
        pongs = 0
        while serials:
            packet = await client.packet()
            if packet.program == KEEPALIVE_PROGRAM:
                assert packet.procedure == 2
                pongs += 1
            else:
                serials.remove(packet.serial)
        while not pongs:
            pongs += (await client.packet()).program == KEEPALIVE_PROGRAM


async def test_limits_of_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(LIMITS, opening_s=0.2, listeners=3)
    async with served(tmp_path, limits) as place:
        async with place.client() as silent:
            await silent.cut_off()
        async with place.client() as client:
            await client.open()
            for _ in range(3):
                await client.send("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
                await client.ok()
            await client.send("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
            assert "at most 3" in ((await client.error()).message or "")
            await client.send("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", 77)
            assert (await client.error()).code == 8
        monkeypatch.setattr(ferryman_remote.link, "MAX_BACKLOG_BYTES", 100_000)
        async with place.client() as client:
            await client.open()
            for _ in range(100_000):
                try:
                    await client.send("CONNECT_GET_CAPABILITIES")
                except (anyio.BrokenResourceError, OSError):
                    break
            else:
                raise AssertionError("a client that reads nothing was not cut off")
        monkeypatch.undo()


async def test_a_peer_that_answers_no_ping(tmp_path: Path) -> None:
    limits = replace(LIMITS, keepalive_s=0.1, keepalive_count=2)
    async with served(tmp_path, limits) as place, place.client() as client:
        # From the answer on the daemon pings, whenever that is: before it answers the next call, too.
        await client.send("CONNECT_SUPPORTS_FEATURE", 10)
        await client.ok()
        while (await client.packet()).program != KEEPALIVE_PROGRAM:
            pass
        await client.cut_off()


async def test_read_only(tmp_path: Path) -> None:
    async with served(tmp_path) as place, place.client() as client:
        await client.open(flags=1)
        await client.send("DOMAIN_DEFINE_XML", "<domain/>")
        error = await client.error()
        assert (error.code, error.domain) == (29, 20)
        assert error.message == "operation forbidden: read only access prevents DOMAIN_DEFINE_XML"
        async with place.client() as other:
            await other.open()
            await other.send("DOMAIN_CREATE_XML", DOMAIN, 0)
            (dom,) = decode(protocol.OfDomain, (await other.ok()).payload)
        for flags in (1, 8, 9):
            await client.send("DOMAIN_GET_XML_DESC", dom, flags)
            assert (await client.error()).code == 29
        await client.send("DOMAIN_GET_XML_DESC", dom, 0)
        await client.ok()
        for number, name in ((ferry.Number.HOOK, "domain_define"), (ferry.Number.HOST, "begin")):
            call = encode(ferry.Call(name, b'{"definition":"<domain/>"}'))
            await client.stream.send(
                Packet(ferry.PROGRAM, 1, number, PacketType.CALL, 50, payload=call).pack()
            )
            assert "read-only" in ((await client.error()).message or "")
