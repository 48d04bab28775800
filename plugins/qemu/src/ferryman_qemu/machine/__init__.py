"""Machines: from libvirt domain XML to QEMU's command line.

::

    text --read--> Machine --pin--> Machine, every place fixed --build--> command line
                                         |
                                     its XML travels to the destination, which reads and builds the same
"""

from __future__ import annotations

from ferryman_qemu.machine.build import (
    AGENT_CHANNEL,
    CommandLine,
    Site,
    boot_paths,
    command_line,
)
from ferryman_qemu.machine.compare import differences
from ferryman_qemu.machine.ignored import IGNORED
from ferryman_qemu.machine.model import Interface, Machine
from ferryman_qemu.machine.pin import Chooser, pin
from ferryman_qemu.machine.read import read_machine, read_pinned

__all__ = [
    "AGENT_CHANNEL",
    "IGNORED",
    "Chooser",
    "CommandLine",
    "Interface",
    "Machine",
    "Site",
    "boot_paths",
    "command_line",
    "differences",
    "pin",
    "read_machine",
    "read_pinned",
]
