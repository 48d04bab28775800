"""Moments of a migration with QEMU at which a test strikes, in this process or in one that it kills.

Run as ``python -m tests.fault.moments MOMENT SOURCE DESTINATION BYTES_PER_S`` it migrates the domain ``counter`` (0: as
fast as it can; -1: it only opens both hosts), says ``here`` at the moment, and stands still until it is killed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import ferryman.sync
from ferryman import MigrationOptions
from ferryman.journal import Journal
from ferryman_qemu.driver import QemuDriver
from ferryman_qemu.guest import Guest
from ferryman_qemu.monitor import Monitor
from ferryman_qemu.process import Process
from ferryman_qemu.transfer import Transfer

Test = Callable[..., bool]


def _always(*_arguments: Any, **_named: Any) -> bool:
    return True


def _wrote(record: str) -> Test:
    return lambda _journal, row: bool(row.record.value == record)


_MOMENTS: dict[str, tuple[type[Any], str, Test]] = {
    # The receiver's process was started, and nobody has written its number down.
    "receiver-started": (Process, "spawn", lambda argv, **_named: "-incoming" in argv),
    # It answers, and has not been told anything; the plan may still be under way.
    "receiver-up": (Guest, "start", lambda record, *_rest, **_named: bool(record.migration)),
    "receiver-listens": (
        Guest,
        "command_all",
        lambda _guest, *commands: any(command.name == "migrate-incoming" for command in commands),
    ),
    # The source's QEMU was told to send, and has not answered.
    "migrate-sent": (Monitor, "_submit", lambda _monitor, call: b'"execute":"migrate"' in bytes(call.unsent)),
    "sending": (Transfer, "_migrate", _always),
    # The source's QEMU has said that the migration completed, and nobody was shown the proof.
    "completed": (Transfer, "_prove", _always),
    # The guest runs at the destination, which has not written that down.
    "ran": (QemuDriver, "_run", _always),
    "adopted": (Guest, "write", lambda _guest, record: not record.migration),
    **{
        f"wrote-{record}": (Journal, "write_now", _wrote(record))
        for record in ("begun", "prepared", "handing", "claiming", "claimed", "refused", "kept", "given")
    },
}


@contextmanager
def at(moment: str, strike: Callable[[], None]) -> Iterator[list[str]]:
    """Call ``strike`` right after the first passing of a moment; the list that the block gets then names it."""
    owner, name, test = _MOMENTS[moment]
    passed: list[str] = []
    real = inspect.getattr_static(owner, name)
    function = real.__func__ if isinstance(real, classmethod) else real

    def comes(*arguments: Any, **named: Any) -> bool:
        return not passed and test(*arguments[isinstance(real, classmethod) :], **named)

    def come() -> None:
        passed.append(moment)
        strike()

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def wrapper(*arguments: Any, **named: Any) -> Any:
            now = comes(*arguments, **named)
            result = await function(*arguments, **named)
            if now:
                come()
            return result
    else:

        @wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            now = comes(*arguments, **named)
            result = function(*arguments, **named)
            if now:
                come()
            return result

    replacement = classmethod(wrapper) if isinstance(real, classmethod) else wrapper
    with mock.patch.object(owner, name, replacement):
        yield passed


def _stand_still() -> None:
    print("here", flush=True)
    sys.stdin.read()


def main(moment: str, source: str, destination: str, bytes_per_s: str) -> None:
    with (
        at(moment, _stand_still),
        ferryman.sync.connect(source) as a,
        ferryman.sync.connect(destination) as b,
    ):
        if int(bytes_per_s) < 0:
            sys.stdin.read()
        options = MigrationOptions(bandwidth_bytes_per_s=int(bytes_per_s) or None)
        a.lookup_by_name("counter").migrate(b, options).result()


if __name__ == "__main__":
    main(*sys.argv[1:])
