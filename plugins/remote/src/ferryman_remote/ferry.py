"""Ferryman's own program on the wire: hooks, the host's end of migrations, events, and the progress of a transfer.

It stands beside libvirt's program on the same listener, and hosts ask each other through it.  Values are JSON as
:mod:`ferryman_remote.values` writes it; frames, serials and errors are libvirt's.

An error is a :class:`~ferryman_remote.protocol.RemoteError` whose ``str1`` is Ferryman's code and whose ``str2`` holds
what the error's class needs besides its message.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeAlias

from ferryman.hookspecs import DriverHooks, hook_names
from ferryman_remote.protocol import Names, Void
from ferryman_remote.xdr import U32, Opaque, Str

PROGRAM = 0x66657279
VERSION = 1
MAX_VALUE_BYTES = 16_777_216

Value: TypeAlias = Annotated[bytes, Opaque(MAX_VALUE_BYTES)]


class Open(NamedTuple):
    """Open a host by its local connection URI; the first call."""

    uri: Str
    flags: U32


class OpenReply(NamedTuple):
    """The driver's distribution, the address by which others ask this host, and the hooks that its driver has."""

    distribution: Str
    address: Str
    hooks: Names


class Call(NamedTuple):
    """Call a hook with its request, or a method of the host's end with an object of its arguments."""

    name: Str
    arguments: Value


class CallReply(NamedTuple):
    """What the hook or the method returned."""

    result: Value


class Cancel(NamedTuple):
    """Cancel a call that has not been answered; its own answer says what came of it."""

    serial: U32


class Happened(NamedTuple):
    """Something happened to a domain of the host."""

    event: Value


class Progress(NamedTuple):
    """A sample of the transfer that the call of that serial performs."""

    serial: U32
    statistics: Value


class Number(IntEnum):
    """Numbers of the program."""

    OPEN = 1
    HOOK = 2
    HOST = 3
    CANCEL = 4
    CONSOLE = 5
    EVENT = 16
    PROGRESS = 17


MESSAGES: dict[Number, tuple[type[Any], type[Any] | None]] = {
    Number.OPEN: (Open, OpenReply),
    Number.HOOK: (Call, CallReply),
    Number.HOST: (Call, CallReply),
    Number.CANCEL: (Cancel, Void),
    Number.CONSOLE: (Call, Void),
    Number.EVENT: (Happened, None),
    Number.PROGRESS: (Progress, None),
}
"""Arguments and result of each call; an event has no result.  A console's bytes follow the answer, as a stream."""

_PREFIXES = ("domain_", "host_", "capabilities", "migrate_check")
_OWN = ("host_autostart", "domain_console")
FORWARDED = frozenset(
    name for name in hook_names(DriverHooks) if name.startswith(_PREFIXES) and name not in _OWN
)
"""Hooks that a client may call; those of a migration are the host's end alone to call."""

OFFERED = FORWARDED | {"domain_console"}
"""Hooks that a client has where the host's driver has them."""

READS = frozenset(
    {
        "capabilities",
        "domain_list",
        "domain_lookup",
        "domain_definition",
        "domain_statistics",
        "host_statistics",
        "migrate_check",
    }
)
"""Hooks that change nothing."""
