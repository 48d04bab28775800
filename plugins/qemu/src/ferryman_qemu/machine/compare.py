"""Whether two definitions describe the same machine to the guest.

What stands at the host's end of a device may differ between hosts: files, bridges, sockets, caches.  What the guest
sees may not, or its state does not fit.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ferryman_qemu.machine.model import Character, Device, Disk, Interface, Port, Random, Redirection

if TYPE_CHECKING:
    from ferryman_qemu.machine.model import Machine

_HOSTS_OWN = frozenset(
    {
        "definition",
        "emulator",
        "memory",
        "firmware",
        "iothreads",
        "graphics",
        "audios",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "environment",
    }
)
"""Fields of a machine that the guest does not see."""

_NO_END = Character(kind="null")


def differences(source: Machine, destination: Machine) -> list[str]:
    """What the guest would find changed, in words; empty where it is the same machine."""
    found = []
    for field in fields(source):
        if field.name in _HOSTS_OWN:
            continue
        before, after = getattr(source, field.name), getattr(destination, field.name)
        if isinstance(before, tuple) and isinstance(after, tuple):
            found += _differing_devices(field.name, before, after)
        elif _seen(before) != _seen(after):
            found.append(_named(field.name))
    return found


def _differing_devices(name: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> list[str]:
    if len(before) != len(after):
        return [f"the number of {_named(name)} ({len(before)} and {len(after)})"]
    return [
        f"{_named(name)} ({one.alias})" if isinstance(one, Device) and one.alias else _named(name)
        for one, other in zip(before, after, strict=True)
        if _seen(one) != _seen(other)
    ]


def _seen(value: Any) -> Any:
    """A device as the guest sees it."""
    match value:
        case Disk():
            return replace(
                value,
                source=None,
                format="",
                cache="",
                io="",
                discard="",
                detect_zeroes="",
                error_policy="",
                rerror_policy="",
                iothread=None,
                backing=True,
                shareable=False,
            )
        case Interface():
            return replace(
                value,
                kind="",
                bridge="",
                tap="",
                managed=True,
                backend="",
                networks=(),
                queues=value.queues or 1,
            )
        case Port() | Redirection():
            return replace(value, character=_NO_END)
        case Random():
            return replace(value, backend="", path="", rate_bytes=None, period_ms=None)
    return value


def _named(field: str) -> str:
    return field.replace("_", " ")
