"""How libvirt's procedures are answered: the registry that :mod:`ferryman_remote.daemon.calls` fills."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ferryman_remote.protocol import PROCEDURES, Procedure

if TYPE_CHECKING:
    from ferryman_remote.daemon.session import Session

Body: TypeAlias = "Callable[[Session, Any], Any]"

_BY_NAME = {procedure.name: procedure for procedure in PROCEDURES.values()}
CLOSE = _BY_NAME["CONNECT_CLOSE"].number


@dataclass(frozen=True, slots=True)
class Answer:
    """How a procedure is answered.

    :param body: takes the session and the arguments, and returns the result; None is an empty one.
    :param waits: it is a coroutine function or streams, and runs in a task of its own; others are called where the
        packet is read.
    :param needs_host: only after a host has been opened.
    :param action: what it does to the host, as rules name it, and not on a connection that is read-only; '' only reads.
    :param streams: what it returns is a context that gives a stream of bytes, which the client reads and writes.
    """

    procedure: Procedure
    body: Body
    waits: bool
    needs_host: bool
    action: str
    streams: bool


ANSWERS: dict[int, Answer] = {}
"""By number."""


def answers(
    *names: str, needs_host: bool = True, action: str = "", streams: bool = False
) -> Callable[[Body], Body]:
    """Register a function as the answer to these procedures."""

    def keep(body: Body) -> Body:
        for name in names:
            procedure = _BY_NAME[name]
            waits = inspect.iscoroutinefunction(body)
            ANSWERS[procedure.number] = Answer(procedure, body, waits or streams, needs_host, action, streams)
        return body

    return keep
