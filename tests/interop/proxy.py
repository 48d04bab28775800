"""A proxy between stock clients and a daemon that breaks one message of their choice."""

from __future__ import annotations

import enum
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ferryman_remote import ferry
from ferryman_remote.protocol import KEEPALIVE_PROGRAM, PROCEDURES, RemoteError
from ferryman_remote.wire import Packet, PacketReader, PacketType, Status
from ferryman_remote.xdr import decode, encode


class Kind(enum.Enum):
    """What is done to a call."""

    LOST = "the call is lost with the connection"
    UNANSWERED = "the answer is lost with the connection"
    TURNED = "the answer is turned into an error"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to the call of that number of a client's longest conversation, from 0."""

    call: int
    kind: Kind


_ERROR = RemoteError(1, 7, "a fault that the test made", 2, None, "%s", "a fault", None, -1, -1, None)


class Proxy:
    """Listens, and passes everything on to a daemon.

    :ivar target: port of the daemon, which may be set later.
    :ivar fault: of the next connection that comes to that call; it strikes once.
    :ivar conversations: names of the calls of each connection, in order.
    """

    def __init__(self, port: int = 0) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.fault: Fault | None = None
        self.struck = False
        self.conversations: list[list[str]] = []
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        self._begin(self._accept)

    def stop(self) -> None:
        """End it; every connection through it is cut."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            _cut(each)
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()

    def _begin(self, body: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            daemon = socket.create_connection(("127.0.0.1", self.target))
            self._sockets += [client, daemon]
            talk = _Conversation(self)
            self.conversations.append(talk.calls)
            self._begin(_pump, client, daemon, talk.asked)
            self._begin(_pump, daemon, client, talk.answered)


class _Conversation:
    """One connection, and what is done to its messages: None cuts it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._struck: set[int] = set()
        self.calls: list[str] = []

    def asked(self, packet: Packet) -> Packet | None:
        if packet.type is not PacketType.CALL or packet.program == KEEPALIVE_PROGRAM:
            return packet
        number = len(self.calls)
        self.calls.append(_name(packet))
        fault = self._proxy.fault
        if fault is not None and fault.call == number and not self._proxy.struck:
            self._proxy.struck = True
            if fault.kind is Kind.LOST:
                return None
            self._struck.add(packet.serial)
        return packet

    def answered(self, packet: Packet) -> Packet | None:
        if packet.type is not PacketType.REPLY or packet.serial not in self._struck:
            return packet
        assert self._proxy.fault is not None
        if self._proxy.fault.kind is Kind.UNANSWERED:
            return None
        return packet._replace(status=Status.ERROR, payload=encode(_ERROR))


def _pump(source: socket.socket, sink: socket.socket, change: Callable[[Packet], Packet | None]) -> None:
    """Pass packets on until either end closes, or one of them is lost."""
    try:
        with suppress(OSError):  # either end is cut at any moment, which is what this is for
            for packet in _packets(source):
                changed = change(packet)
                if changed is None:
                    break
                sink.sendall(changed.pack())
    finally:
        _cut(source)
        _cut(sink)


def _name(packet: Packet) -> str:
    if packet.program == ferry.PROGRAM:
        named = packet.procedure in (ferry.Number.HOOK, ferry.Number.HOST)
        return decode(ferry.Call, packet.payload).name if named else ferry.Number(packet.procedure).name
    return PROCEDURES[packet.procedure].name if packet.procedure in PROCEDURES else str(packet.procedure)


def _packets(source: socket.socket) -> Iterator[Packet]:
    reader = PacketReader()
    while data := source.recv(1 << 16):
        yield from reader.feed(data)


def _cut(each: socket.socket) -> None:
    with suppress(OSError):  # it is cut already
        each.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(port: int = 0) -> Iterator[Proxy]:
    """A proxy before a daemon for the length of a block.

    :param port: the daemon's; 0 is one that is not known yet.
    """
    made = Proxy(port)
    made.start()
    try:
        yield made
    finally:
        made.stop()
