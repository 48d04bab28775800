"""How libvirt's procedures are answered: the registry that :mod:`ferryman_remote.daemon.calls` fills."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ferryman_remote.protocol import PROCEDURES, Procedure

if TYPE_CHECKING:
    from ferryman_remote.daemon.session import Session

    Body = Callable[[Session, Any], Any]
    AsyncBody = Callable[[Session, Any], Awaitable[Any]]

_BY_NAME = {procedure.name: procedure for procedure in PROCEDURES.values()}
CLOSE = _BY_NAME["CONNECT_CLOSE"].number


@dataclass(frozen=True, slots=True)
class Answer:
    """How a procedure is answered.

    :param body: takes the session and the arguments, and returns the result; None is an empty one.
    :param waits: it is a coroutine function or streams, and runs in a task of its own; others are called where the
        packet is read.
    :param needs_host: only after a host has been opened.
    :param writes: not on a connection that is read-only.
    :param streams: what it returns is a context that gives a stream of bytes, which the client reads and writes.
    """

    procedure: Procedure
    body: Body
    waits: bool
    needs_host: bool
    writes: bool
    streams: bool


ANSWERS: dict[int, Answer] = {}
"""By number."""


def answers(
    *names: str, needs_host: bool = True, writes: bool = False, streams: bool = False
) -> Callable[[Body], Body]:
    """Register a function as the answer to these procedures."""

    def keep(body: Body) -> Body:
        for name in names:
            procedure = _BY_NAME[name]
            waits = inspect.iscoroutinefunction(body)
            ANSWERS[procedure.number] = Answer(procedure, body, waits or streams, needs_host, writes, streams)
        return body

    return keep
