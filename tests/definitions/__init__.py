"""Domain definitions that the QEMU driver takes, and such that it refuses.

``accepted/NAME.xml`` defines and starts; ``accepted/NAME.argv`` is the command line that it becomes, one argument a
line.  ``refused/NAME.xml`` begins with a comment ``<!-- CODE | ELEMENT | WORDS -->`` about the error.  ``@DIRECTORY@``
stands for a directory of the test.  ``python -m tests.definitions`` rewrites the command lines and shows what changed.

What begins with ``virt-install-`` was written by ``virt-install --print-xml`` 4.1 for an osinfo-db of 2022; only sizes,
paths and uuids are others.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from ferryman_qemu.machine import Interface, Machine, command_line, pin, read_machine
from ferryman_qemu.machine.pin import ChosenFirmware

HERE = Path(__file__).parent
DIRECTORY = "/srv/definitions"
"""What ``@DIRECTORY@`` is in the command lines that are kept."""

_FILES = ("disk.raw", "disk2.raw", "disk3.raw", "cd.iso", "floppy.img", "initrd", 'a,b=c "d" \'é.raw')
_MIB = 1 << 20
_HEADER = re.compile(r"<!-- (\S+) \| (.*?) \| (.+?) -->\n")
_RANDOM_MAC = re.compile(r"(52:54:00)(:[0-9a-f]{2}){3}")


def names(kind: str = "accepted") -> list[str]:
    """Names of the definitions of a kind."""
    return sorted(path.stem for path in (HERE / kind).glob("*.xml"))


def text_of(name: str, *, directory: str = DIRECTORY, kind: str = "accepted") -> str:
    """A definition, with its places filled in."""
    text = (HERE / kind / f"{name}.xml").read_text(encoding="utf-8")
    return text.replace("@DIRECTORY@", directory)


def expectation(name: str) -> tuple[str, str, str, str]:
    """Code, element and words of the error that a refused definition causes, and its text."""
    text = text_of(name, kind="refused")
    header = _HEADER.match(text)
    assert header is not None, f"{name} does not begin with what is expected"
    return header[1], header[2], header[3], text[header.end() :]


def lay_out(directory: Path) -> None:
    """Make the files that the definitions name."""
    for name in _FILES:
        with open(directory / name, "wb") as file:
            file.truncate(2 * _MIB if name != "floppy.img" else 1440 * 1024)
    for suffix in ("in", "out"):
        os.mkfifo(directory / f"pipe.{suffix}")
    kernel = bytearray(16384)
    # The head of a bzImage (Linux Documentation/x86/boot.rst): one sector of set-up, signature, protocol 2.2.
    kernel[0x1F1], kernel[0x1FE:0x200], kernel[0x202:0x208] = 1, b"\x55\xaa", b"HdrS\x02\x02"
    (directory / "kernel").write_bytes(kernel)
    for name, inside in (("disk.qcow2", "disk.raw"), ("alone.qcow2", "")):
        backing = ["-b", str(directory / inside), "-F", "raw"] if inside else []
        size = [] if inside else ["2M"]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(directory / name), *size], check=True
        )


class FixedChooser:
    """Chooses what some host might."""

    def machine_type(self, machine: Machine) -> str:
        return {"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2"}.get(machine.machine, machine.machine)

    def cpu(self, machine: Machine, machine_type: str) -> tuple[str, tuple[tuple[str, bool], ...]]:
        if machine.cpu.host_model:
            return "Westmere-v1", (("avx", True),)
        return machine.cpu.model or "qemu64", ()

    def memory(self, machine: Machine, memory_bytes: int) -> int:
        return memory_bytes + (8192 if memory_bytes % (256 << 10) == 0 else 0)

    def firmware(self, machine: Machine, machine_type: str) -> ChosenFirmware:
        secure = dict(machine.firmware.wanted).get("secure-boot", machine.firmware.secure or False)
        kind = ".secboot" if secure else ""
        return ChosenFirmware(
            code=f"/srv/firmware/code{kind}.fd", template="/srv/firmware/vars.fd", secure=secure
        )


@dataclass(kw_only=True)
class FixedSite:
    """Gives a command line what some host might; its descriptors are numbered in their order."""

    emulator: str = "/usr/bin/qemu-system-x86_64"
    incoming: bool = False
    pidfile: str = "/run/domain/pid"
    given: list[str] = field(default_factory=list)

    def _give(self, what: str) -> int:
        self.given.append(what)
        return 9 + len(self.given)

    def listen(self, name: str) -> int:
        return self._give(name)

    def tap(self, interface: Interface) -> tuple[list[int], list[int]]:
        if interface.kind == "user":
            return [], []
        return [self._give(f"tap of {interface.alias}") for _ in range(interface.queues or 1)], []

    def secret(self, name: str, text: str) -> str:
        return f"/run/domain/{name}"

    def nvram(self, machine: Machine) -> str:
        return machine.firmware.nvram or f"/srv/root/nvram/{machine.definition.uuid}.fd"

    def tpm(self) -> int:
        return self._give("tpm")

    def free_port(self, address: str, first: int) -> int:
        return first

    def now_s(self) -> float:
        return 1_000_000_000.0


def pinned(text: str) -> Machine:
    """Read and pin a definition."""
    return pin(read_machine(text), FixedChooser())


def arguments(machine: Machine, *, incoming: bool = False) -> list[str]:
    """The command line of a pinned machine."""
    line = command_line(machine, FixedSite(incoming=incoming))
    return [*line.argv, *(f"then {command} {values}" for command, values in line.prelude)]


def snapshot(name: str) -> str:
    """What is kept of an accepted definition."""
    text = text_of(name)
    lines = [argument.replace("\n", "\\n") for argument in arguments(pinned(text))]
    known = {found[0] for found in _RANDOM_MAC.finditer(text.lower())}
    written = "\n".join(lines) + "\n"
    return _RANDOM_MAC.sub(lambda found: found[0] if found[0] in known else "52:54:00:MAC", written)
