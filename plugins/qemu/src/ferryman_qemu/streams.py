"""Connections that QEMU gets from us, so that they can be watched, limited, and ended whatever QEMU does."""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
import termios
import threading
from contextlib import suppress

import anyio
import anyio.to_thread

from ferryman.errors import PerformError
from ferryman.types import Side
from ferryman.uri import MigrationURI

_log = logging.getLogger(__name__)

CONNECT_S = 10.0
SILENCE_S = 30
"""How long a peer may be silent before the stream is broken: the longest blackout of a cut network."""


async def connect(text: str) -> socket.socket:
    """Do :func:`connect_stream` in a thread. :cancellation: at once; a connection that comes later is closed."""
    lock, kept, abandoned = threading.Lock(), list[socket.socket](), False

    def connect() -> socket.socket:
        stream = connect_stream(text)
        with lock:
            if abandoned:
                stream.close()
            else:
                kept.append(stream)
        return stream

    try:
        return await anyio.to_thread.run_sync(connect, abandon_on_cancel=True)
    except BaseException:
        with lock:
            abandoned = True
            for stream in kept:
                stream.close()
        raise


async def cut_silent(stream: socket.socket, scope: anyio.CancelScope) -> None:
    """End a connection unless ``scope`` is cancelled within :data:`CONNECT_S`.

    QEMU's main loop waits for a peer that is to answer at once, and the guest with it; neither ``yank`` nor anything
    else on the monitor ends that (seen on 7.2), but the end of the connection does.
    """
    with scope:
        await anyio.sleep(CONNECT_S)
        _log.warning(
            "the other end was silent for %g s, and QEMU waits for it: the connection is cut", CONNECT_S
        )
        with suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)


def taken(stream: socket.socket) -> int | None:
    """A number that changes whenever the peer takes something of what was sent; None where it has taken everything.

    A peer whose kernel still answers never lets ``TCP_USER_TIMEOUT`` run out, however long nobody reads there, once it
    has ended its own half (seen on Linux 6.18).

    :source: tcp(7) and unix(7) SIOCOUTQ; include/uapi/linux/tcp.h, ``tcpi_bytes_acked`` (Linux 4.1).
    """
    (waiting,) = struct.unpack("i", fcntl.ioctl(stream, termios.TIOCOUTQ, bytes(4)))
    if not waiting:
        return None
    if stream.family == socket.AF_UNIX:
        return int(waiting)
    info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    return int(_BYTES_ACKED.unpack(info)[0])


_BYTES_ACKED = struct.Struct("=120xQ")


def connect_stream(text: str) -> socket.socket:
    """Connect to a receiver; blocking.

    QEMU gets the connected socket, since it would leave Nagle's algorithm on: with a return path the last small
    segment then waits for a delayed acknowledgement, 40 ms of blackout.  And a peer that falls silent must end the
    stream, or the transfer would never end.

    :raises OSError: nobody listens there. :raises PerformError: there is no such transport.
    """
    uri = MigrationURI.parse(text)
    if uri.protocol == "unix" and uri.path:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(uri.path)
        except BaseException:
            stream.close()
            raise
        return stream
    if uri.protocol not in ("", "tcp") or not uri.host or not uri.port:
        raise PerformError(f"QEMU cannot send to {text}: use tcp://host:port or unix:/path", side=Side.SOURCE)
    stream = socket.create_connection((uri.host, uri.port), timeout=CONNECT_S)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, SILENCE_S // 3),
        (socket.TCP_KEEPINTVL, SILENCE_S // 6),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, SILENCE_S * 1000),
    ):
        stream.setsockopt(socket.IPPROTO_TCP, option, value)
    return stream
