"""One connection of the wire: packets in, packets out, and whether the peer still lives.

Both ends use it: the daemon for each client, the client for its host.  What is sent is queued, and written in one go
by a task of its own, so that no answer waits for another one's reader.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from ferryman_remote.protocol import KEEPALIVE_PROGRAM
from ferryman_remote.wire import Packet, PacketReader, PacketType, WireError

if TYPE_CHECKING:
    from anyio.abc import ByteStream

_CHUNK_BYTES = 262_144
_PING = 1
_PONG = 2
_ROOM_BYTES = 262_144
MAX_BACKLOG_BYTES = 67_108_864
"""A peer that takes no answers is cut off when so much of them waits."""


class Link:
    """Packets over a stream.

    :param name: of the peer, for messages.
    :param limit: of one message, in bytes without its length.
    """

    def __init__(self, stream: ByteStream, *, name: str, limit: int) -> None:
        self.name = name
        self._stream = stream
        self._reader = PacketReader(limit)
        self._send_now: Callable[[bytes], int] | None = getattr(stream, "send_now", None)
        self._waiting = bytearray()
        self._writing = False
        self._wake = anyio.Event()
        self._ended = anyio.Event()
        self._last = False
        self._scope = anyio.CancelScope()
        self._heard_at = 0.0
        self._taking = False
        """What has come is not taken yet, so nothing is read, and silence is nobody's fault but ours."""
        self._written = anyio.Event()
        self._to_watch = anyio.Event()
        self._interval_s: float | None = None
        self._count = 0
        self.reason = ""
        """Why the link ended; '' while it stands, and where the peer closed it between two messages."""

    @property
    def ended(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._ended.is_set()

    def limit(self, limit: int) -> None:
        """Take longer messages from now on, or shorter ones."""
        self._reader.limit = limit

    def keep_alive(self, interval_s: float, count: int) -> None:
        """Ask a silent peer for a sign every so often, and cut the link when so many stay without one."""
        self._interval_s, self._count = interval_s, count
        self._to_watch.set()

    def send(self, packet: Packet) -> None:
        """Queue a packet; nothing where the link has ended.

        :raises WireError: it is too long to be a message.
        """
        if self._ended.is_set() or self._last:
            return
        data = packet.pack()
        if self._send_now is not None and not self._waiting and not self._writing:
            # Most answers fit into the socket's buffer: nobody has to be woken to write them.
            sent = self._send_now(data)
            if sent == len(data):
                return
            data = data[sent:]
        self._waiting += data
        if len(self._waiting) > MAX_BACKLOG_BYTES:
            self.cut(f"more than {MAX_BACKLOG_BYTES} bytes of answers wait to be taken")
        self._wake.set()

    async def room(self) -> None:
        """Wait until little is queued: for a sender who always has more. It returns, too, when the link has ended."""
        await anyio.lowlevel.checkpoint()
        while len(self._waiting) > _ROOM_BYTES and not self._ended.is_set():
            if self._written.is_set():
                self._written = anyio.Event()
            await self._written.wait()

    def finish(self) -> None:
        """End the link when what is queued has been written."""
        self._last = True
        self._wake.set()

    def cut(self, reason: str) -> None:
        """End the link now."""
        self.reason = self.reason or reason
        self._scope.cancel()

    async def run(self, take: Callable[[Packet], Awaitable[None]]) -> None:
        """Serve the link until it ends; packets are given to ``take`` in their order, one at a time.

        :cancellation: ends it, without writing what is queued.
        """
        self._heard_at = anyio.current_time()
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write)
                    tasks.start_soon(self._watch)
                    await self._read(take)
                    self._scope.cancel()
        finally:
            self._ended.set()
            self._written.set()
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await anyio.aclose_forcefully(self._stream)

    async def _read(self, take: Callable[[Packet], Awaitable[None]]) -> None:
        try:
            while True:
                data = await self._stream.receive(_CHUNK_BYTES)
                self._heard_at = anyio.current_time()
                for packet in self._reader.feed(data):
                    if packet.program == KEEPALIVE_PROGRAM:
                        if packet.procedure == _PING:
                            self._signal(_PONG)
                        continue
                    self._taking = True
                    await take(packet)
                    self._taking = False
                    self._heard_at = anyio.current_time()
        except anyio.EndOfStream:
            if self._reader.waiting_bytes:
                self.reason = self.reason or "the peer closed the connection within a message"
        except WireError as error:
            self.reason = self.reason or str(error)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            self.reason = self.reason or f"the connection broke: {error.__cause__ or error}"

    async def _write(self) -> None:
        try:
            while True:
                while self._waiting:
                    data, self._waiting = bytes(self._waiting), bytearray()
                    self._writing = True
                    await self._stream.send(data)
                    self._writing = False
                    self._written.set()
                if self._last:
                    self._scope.cancel()
                    return
                self._wake = anyio.Event()
                await self._wake.wait()
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            self.cut(f"the connection broke: {error.__cause__ or error}")

    async def _watch(self) -> None:
        unanswered = 0
        while True:
            if self._interval_s is None:
                await self._to_watch.wait()
                continue
            silent_s = 0.0 if self._taking else anyio.current_time() - self._heard_at
            if silent_s < self._interval_s:
                unanswered = 0
                await anyio.sleep(self._interval_s - silent_s)
                continue
            if unanswered >= self._count:
                self.cut(f"the peer was silent for {silent_s:.0f} s")
                return
            unanswered += 1
            self._signal(_PING)
            await anyio.sleep(self._interval_s)

    def _signal(self, procedure: int) -> None:
        self.send(Packet(KEEPALIVE_PROGRAM, 1, procedure, PacketType.EVENT, 0))
