"""Plain sockets as byte streams, connected and accepted, for any event loop.

anyio's own stream over a unix socket makes asyncio report an error where it is cancelled while data comes in; and here
a read that finds data does not wait for the event loop to say so.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel

from ferryman_remote.contain import contained

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

_BACKLOG = 1024
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SHORT_WAIT_S = 0.1
_IN_A_ROW = 16


class PlainStream(anyio.abc.ByteStream):
    """A connected socket.  One task reads at a time, and one writes."""

    def __init__(self, raw: socket.socket) -> None:
        raw.setblocking(False)
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._raw = raw
        self._in_a_row = 0

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {anyio.abc.SocketAttribute.raw_socket: lambda: self._raw}

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """What has come, at least a byte.

        :raises EndOfStream: the peer sends no more. :raises BrokenResourceError: the connection broke.
        """
        while True:
            try:
                data = self._raw.recv(max_bytes)
            except BlockingIOError:
                self._in_a_row = 0
                await anyio.wait_readable(self._raw)
                continue
            except OSError as error:
                raise anyio.BrokenResourceError from error
            if not data:
                raise anyio.EndOfStream
            self._in_a_row += 1
            if self._in_a_row >= _IN_A_ROW:
                # A peer that never stops sending is not the only one.
                self._in_a_row = 0
                await anyio.lowlevel.checkpoint()
            return data

    async def send(self, item: bytes) -> None:
        """Write all of it.

        :raises BrokenResourceError: the connection broke. :cancellation: a part of it may have been written.
        """
        await anyio.lowlevel.checkpoint()
        with memoryview(item) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self._raw.send(view[sent:])
                except BlockingIOError:
                    await anyio.wait_writable(self._raw)
                except OSError as error:
                    raise anyio.BrokenResourceError from error

    def send_now(self, data: bytes) -> int:
        """Write what the kernel takes at once; returns how many bytes.  Where the connection broke that is none."""
        try:
            return self._raw.send(data)
        except OSError:
            return 0

    async def send_eof(self) -> None:
        """Send no more, and go on reading."""
        self._raw.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """Close the socket; whoever waits for it is told."""
        if self._raw.fileno() >= 0:
            anyio.notify_closing(self._raw)
            self._raw.close()


async def connect_unix(path: str | Path) -> PlainStream:
    """Connect to a unix socket. :raises OSError: nobody listens there."""
    return await _connected(socket.AF_UNIX, os.fspath(path))


async def connect_tcp(host: str, port: int) -> PlainStream:
    """Connect to the first address of a host that answers. :raises OSError: none does, or the name is unknown."""
    failure: OSError | None = None
    for family, _, _, _, address in await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return await _connected(family, address)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{host} has no address")


async def _connected(family: int, address: Any) -> PlainStream:
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        code = raw.connect_ex(address)
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(raw)
            code = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return PlainStream(raw)
    except BaseException:
        raw.close()
        raise


def listen_unix(path: Path, mode: int) -> socket.socket:
    """Listen at a path that is free. :raises OSError: it is not, or it cannot be made."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The permissions are there before anybody can connect: the socket listens only afterwards.
        raw.bind(str(path))
        path.chmod(mode)
        return _listening(raw)
    except BaseException:
        raw.close()
        raise


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen at an address. :raises OSError: it is taken, or not of this machine."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    raw = socket.socket(family, kind)
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        raw.bind(address)
        return _listening(raw)
    except BaseException:
        raw.close()
        raise


def _listening(raw: socket.socket) -> socket.socket:
    raw.listen(_BACKLOG)
    raw.setblocking(False)
    return raw


async def accept(listener: socket.socket, serve: Callable[[PlainStream, Any], Awaitable[None]]) -> None:
    """Serve every connection by a task of its own, until cancelled; then the listener and they are closed.

    :param serve: takes the connection, and the peer's address as :meth:`socket.socket.accept` has it.
    """

    async def serve_one(raw: socket.socket, peer: Any) -> None:
        with contained(f"serving a connection from {peer or 'a unix socket'}"):
            async with PlainStream(raw) as stream:
                await serve(stream, peer)

    with listener:
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(listener)
                try:
                    raw, peer = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    if error.errno not in _SHORT:
                        raise
                    # The connection waits in the kernel until somebody has closed another one.
                    await anyio.sleep(_SHORT_WAIT_S)
                    continue
                tasks.start_soon(serve_one, raw, peer)
