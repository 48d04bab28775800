"""What a machine does when its guest has shut down or panicked, and how it boots again in the same process.

QEMU has no command that reboots a guest by ACPI.  The guest is asked to shut down while QEMU is told to stand still
instead of ending; then the machine is reset and runs::

    asked --- SHUTDOWN ---> resetting --- RESET ---> runs
      set-action              system_reset             set-action, cont
      system_powerdown

Both words stand in ``guest.json``, so that whoever opens the root next goes on from there.  A reset that is asked for
twice is harmless; a guest that runs is never reset.

INVARIANT: all of it happens under the guest's lock and after the core was asked whether a migration has locked the
domain: ``cont`` must never come after a proof of stop.

Sources: QEMU 7.2 softmmu/runstate.c (main_loop_should_exit, qemu_system_guest_panicked), qapi/run-state.json
(set-action); libvirt docs/formatdomain.rst (events configuration).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import HypervisorError
from ferryman_qemu.monitor import Command

if TYPE_CHECKING:
    from ferryman_qemu.guest import Guest

_RESET_S = 30.0
_NEEDS_RESET = ("shutdown", "guest-panicked", "internal-error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What a definition wants to happen, in libvirt's words."""

    on_poweroff: str = "destroy"
    on_crash: str = "destroy"


def read_wishes(root: Any) -> Wishes:
    """Read ``<on_poweroff>`` and ``<on_crash>`` of a ``<domain>``; QEMU itself does what ``<on_reboot>`` says."""
    return Wishes(
        on_poweroff=(root.findtext("on_poweroff") or "destroy").strip(),
        on_crash=(root.findtext("on_crash") or "destroy").strip(),
    )


async def ask_reboot(guest: Guest) -> None:
    """Press the power button of a machine that is to boot again; call it under the guest's lock."""
    guest.write(replace(guest.record, reboot="asked"))
    try:
        await guest.command_all(_shutdown_action("pause"), Command("system_powerdown"))
    except HypervisorError:
        guest.write(replace(guest.record, reboot=""))
        raise


async def forget_reboot(guest: Guest, wishes: Wishes) -> None:
    """Let the next shutdown be one; call it under the guest's lock."""
    if guest.record.reboot:
        await guest.command_all(_usual_action(wishes))
        guest.write(replace(guest.record, reboot=""))


async def settle_power(guest: Guest, wishes: Wishes) -> None:
    """Do what a machine's state calls for, after an event or at an opening; call it under the guest's lock.

    :raises HypervisorError: QEMU does not answer, or the machine could not be reset.
    """
    match await guest.run_state():
        case "shutdown" if guest.record.reboot or wishes.on_poweroff == "restart":
            await _boot_again(guest, wishes)
        case "shutdown" if wishes.on_poweroff == "destroy":
            await _end(guest, "shut-down")
        case "guest-panicked" if wishes.on_crash == "restart" or guest.record.reboot == "resetting":
            await _boot_again(guest, wishes)
        case "guest-panicked" if wishes.on_crash == "destroy":
            await _end(guest, "crashed")
        case _ if guest.record.reboot == "resetting":
            await _boot_again(guest, wishes)
        case _ if guest.record.reboot == "asked":
            # The program that asked may have died before it told QEMU to stand still.
            await guest.command_all(_shutdown_action("pause"))


async def _boot_again(guest: Guest, wishes: Wishes) -> None:
    if guest.record.reboot != "resetting":
        guest.write(replace(guest.record, reboot="resetting"))
    with guest.control.events("RESET") as events:
        if await guest.run_state() in _NEEDS_RESET:
            await guest.command("system_reset")
            # The command only asks for it, and QEMU refuses to run a machine that needs it.
            with anyio.move_on_after(_RESET_S) as waited:
                await events.get()
            if waited.cancelled_caught:
                raise HypervisorError(f"QEMU did not reset domain {guest.record.name} within {_RESET_S:g} s")
    await guest.command_all(_usual_action(wishes), Command("cont"))
    guest.write(replace(guest.record, reboot=""))


async def _end(guest: Guest, ending: str) -> None:
    # What QEMU has told of the end, with its reason, is better: after a panic it shuts down too.
    guest.ending = "" if guest.end_is_told else ending
    with anyio.CancelScope(shield=True):
        await guest.kill()


def _usual_action(wishes: Wishes) -> Command:
    return _shutdown_action("poweroff" if wishes.on_poweroff == "destroy" else "pause")


def _shutdown_action(action: str) -> Command:
    return Command("set-action", {"shutdown": action})
