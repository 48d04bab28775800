"""Sockets that whoever started the daemon has opened for it. Source: sd_listen_fds(3)."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_FIRST = 3


class Given(NamedTuple):
    """A listening socket.

    :param name: as its unit calls it (``FileDescriptorName=``); '' where it does not.
    """

    name: str
    listener: socket.socket


def given_sockets(environ: MutableMapping[str, str]) -> list[Given]:
    """Take the sockets that were passed to this process, and what speaks of them out of its environment.

    :raises ValueError: what the environment says of them cannot be true.
    """
    pid, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if not count or pid != str(os.getpid()):
        return []  # they are somebody else's: variables are inherited, sockets are not meant to be
    if not count.isdigit() or int(count) > 4096:
        raise ValueError(f"LISTEN_FDS is {count!r:.40}, and not a number of sockets")
    called = names.split(":") if names else []
    with ExitStack() as stack:
        given = []
        for index in range(int(count)):
            listener = stack.enter_context(_listener(_FIRST + index))
            given.append(Given(called[index] if index < len(called) else "", listener))
        stack.pop_all()
        return given


def _listener(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ValueError(f"descriptor {descriptor}, which was passed, is no socket: {error}") from error
    kind = listener.type, listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if kind != (socket.SOCK_STREAM, 1):
        listener.close()
        raise ValueError(f"descriptor {descriptor}, which was passed, is no socket that listens for streams")
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener
