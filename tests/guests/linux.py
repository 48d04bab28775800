"""The Linux guest: a distribution's kernel and an initramfs of busybox, which checks its memory itself.

What ``/init`` prints on the first serial port, besides what the kernel may have to say:

===================  =======================================================================================
``boot ok``          once, before anything else
``no power button``  once, if an ACPI shutdown would have no effect
``tick N``           every ``tick_ms``, from 1 on
``mem ok N``         after pass N every block holds what that pass wrote
``mem BAD N``        a block does not
``power button``     once, before it powers off
===================  =======================================================================================

A pass goes over the blocks, which are files in tmpfs, writes another of four known contents over each in place,
and pauses after each. Then it compares all their MD5 sums. So every pass dirties all the blocks and finds any page
that did not survive since it was written.

Debian's kernel for clouds has no virtio, disk or network driver built in, and nor has it the driver of the
ACPI power button: this guest has no device but its serial port, and an ACPI shutdown reaches it only if the
modules ``button`` and ``evdev`` of the same kernel lie beside it (:func:`find_modules`).

With the guest agent (``build_initramfs(agent=True)``) it also has drivers of the agent's channel and of the balloon,
and ``agent ok`` says that the agent was started; its ``/sbin/shutdown`` says ``shutdown`` before it acts.

The initramfs is made here, without ``cpio``; it needs a statically linked ``busybox``. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import UUID
from xml.sax.saxutils import escape

from tests.guests.counter import domain_xml, machine_argv

TICK_PREFIX = "tick "

KERNEL_DIRECTORY = Path(__file__).parents[2] / ".cache" / "kernel"

# In the order in which they are loaded.
_MODULES = ("button.ko", "evdev.ko")

_AGENT_MODULES = (
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_balloon.ko",
    "virtio_console.ko",
)

_PT_INTERP = 3

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmpfs /mem
stty -F /dev/ttyS0 raw -echo
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo boot ok

# Names of our own only: a parameter "ferryman.tick_ms=20" becomes tick_ms=20.
for word in $(cat /proc/cmdline); do
    case $word in ferryman.*=*) eval "${word#ferryman.}" ;; esac
done

# Reading from it waits, without a process, because nobody ever writes to it.
mkfifo /mem/never
exec 3<>/mem/never

for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
if [ -e /dev/input/event0 ] && grep -q '"Power Button"' /proc/bus/input/devices; then
    acpid -c /etc/acpi -l /dev/null -p /mem/acpid.pid
    # It writes this once it listens; a button pressed before that is lost.
    while [ ! -e /mem/acpid.pid ]; do read -r -t 0.01 nothing <&3; done
else
    echo no power button
fi

if [ -e /usr/sbin/qemu-ga ]; then
    for port in /sys/class/virtio-ports/*; do
        if [ "$(cat $port/name)" = org.qemu.guest_agent.0 ]; then
            /usr/sbin/qemu-ga -m virtio-serial -p /dev/${port##*/} -t /mem -f /mem/agent.pid &
            echo agent ok
        fi
    done
fi

seconds() {
    printf %d.%03d $(($1 / 1000)) $(($1 % 1000))
}
tick_s=$(seconds $tick_ms)
pause_s=$(seconds $pause_ms)

work_memory() {
    blocks=$((blocks_kib / block_kib))
    for pattern in 0 1 2 3; do
        yes "pattern $pattern of the file" | head -c $((block_kib * 1024)) >/mem/pattern$pattern
        sum=$(md5sum </mem/pattern$pattern)
        block=0
        # sumsR: what the blocks must hold after pass R (mod 4), in which block B gets pattern (R + B) mod 4.
        while [ $block -lt $blocks ]; do
            echo "${sum%-}/mem/block$block" >>/mem/sums$(((pattern + 4 - block % 4) % 4))
            block=$((block + 1))
        done
    done
    pass=0
    while :; do
        if [ $pass -gt 0 ]; then
            md5sum -c -s /mem/sums$(((pass - 1) % 4)) && echo "mem ok $pass" || echo "mem BAD $pass"
        fi
        block=0
        while [ $block -lt $blocks ]; do
            dd if=/mem/pattern$(((pass + block) % 4)) of=/mem/block$block bs=${block_kib}k conv=notrunc 2>/dev/null
            block=$((block + 1))
            read -r -t $pause_s nothing <&3
        done
        pass=$((pass + 1))
    done
}
if [ $blocks_kib -gt 0 ]; then
    work_memory &
    renice -n 19 -p $! >/dev/null
fi

renice -n -20 -p $$ >/dev/null
tick=0
while :; do
    tick=$((tick + 1))
    echo "tick $tick"
    read -r -t $tick_s nothing <&3
done
"""

_POWER_BUTTON = """\
#!/bin/sh
echo power button >/dev/ttyS0
exec poweroff -f
"""


# The agent calls it as: shutdown -h -P|-r|-H +0 TEXT
_SHUTDOWN = """\
#!/bin/sh
echo shutdown $2 >/dev/ttyS0
case $2 in
-P) exec poweroff -f ;;
-r) exec reboot -f ;;
*) exec halt -f ;;
esac
"""


class _Entry(NamedTuple):
    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def make_cpio(entries: Iterable[_Entry]) -> bytes:
    """Return an archive of the "newc" format, which is what the kernel unpacks into its first file system.

    :source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    archive = bytearray()
    for number, entry in enumerate([*entries, _Entry("TRAILER!!!", 0)], start=1):
        name = os.fsencode(entry.name) + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file system, device of the node, name, check
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def find_modules(directory: Path = KERNEL_DIRECTORY / "modules") -> tuple[Path, ...]:
    """Return the kernel modules the guest can use and that are there, in the order in which they are loaded."""
    return tuple(directory / name for name in _MODULES if (directory / name).is_file())


def build_initramfs(
    cache_directory: Path,
    *,
    busybox: Path | None = None,
    modules: Sequence[Path] | None = None,
    agent: bool = False,
) -> Path:
    """Return the initramfs in ``cache_directory``, made now unless the same content was made before.

    :param busybox: None takes the one on ``PATH``.
    :param modules: None takes those of :func:`find_modules`.
    :param agent: put this machine's ``qemu-ga`` into it, with its libraries and the drivers that it needs.
    :raises FileNotFoundError: there is no ``busybox``, or no ``qemu-ga``.
    :raises ValueError: ``busybox`` is not a statically linked 64-bit program.
    """
    if busybox is None:
        found = shutil.which("busybox")
        if found is None:
            raise FileNotFoundError("no busybox on PATH; Debian has it in busybox-static")
        busybox = Path(found)
    program = busybox.read_bytes()
    if not _is_static(program):
        raise ValueError(f"{busybox} is not statically linked; Debian has it in busybox-static")
    directory, executable, plain = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    names = ["bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "mem", "modules", "proc", "sys"]
    found_modules = [*(find_modules() if modules is None else modules)]
    programs: list[_Entry] = []
    if agent:
        found_modules += [KERNEL_DIRECTORY / "modules" / name for name in _AGENT_MODULES]
        programs = [
            _Entry("sbin/shutdown", executable, _SHUTDOWN.encode()),
            *(_Entry(str(path).lstrip("/"), executable, path.read_bytes()) for path in _agent_files()),
        ]
        parents = {str(parent) for entry in programs for parent in Path(entry.name).parents}
        names += sorted(parents - {"."} - set(names))
    archive = make_cpio(
        [
            *(_Entry(name, directory) for name in names),
            _Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            _Entry("bin/busybox", executable, program),
            _Entry("init", executable, _INIT.encode()),
            _Entry("etc/acpi/PWRF/00000080", executable, _POWER_BUTTON.encode()),
            *(
                _Entry(f"modules/{index}-{path.name}", plain, path.read_bytes())
                for index, path in enumerate(found_modules)
            ),
            *programs,
        ]
    )
    result = cache_directory / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not result.exists():
        cache_directory.mkdir(parents=True, exist_ok=True)
        unfinished = result.with_name(f"{result.name}.{os.getpid()}")
        unfinished.write_bytes(archive)
        unfinished.replace(result)
    return result


def _agent_files() -> list[Path]:
    """Return the guest agent and the libraries that it is linked with, by their paths on this machine."""
    found = shutil.which("qemu-ga", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        raise FileNotFoundError("no qemu-ga on PATH; Debian has it in qemu-guest-agent")
    listing = subprocess.run(["ldd", found], check=True, capture_output=True, text=True, timeout=30).stdout
    return [Path("/usr/sbin/qemu-ga"), *(Path(path) for path in re.findall(r"(/\S+) \(0x", listing))]


def _is_static(program: bytes) -> bool:
    """Say whether these are the bytes of an ELF64 program that asks for no dynamic linker."""
    if program[:6] != b"\x7fELF\x02\x01":
        return False
    table = int.from_bytes(program[0x20:0x28], "little")
    size, count = (int.from_bytes(program[at : at + 2], "little") for at in (0x36, 0x38))
    kinds = (
        int.from_bytes(program[at : at + 4], "little") for at in range(table, table + size * count, size)
    )
    return _PT_INTERP not in kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class LinuxGuest:
    """One choice of the guest's parameters.

    :param memory_bytes: a multiple of 1 MiB; 128 MiB is enough for the kernel and 32 MiB of blocks.
    :param tick_ms: the pause between two ticks, 1 to 60,000; a tick itself takes about 1 ms more under TCG.
    :param blocks_bytes: the size of all blocks together, a multiple of ``block_bytes``; 0 writes and checks nothing.
    :param block_bytes: a multiple of 4 KiB.
    :param pause_ms: the pause after each block, 1 to 60,000: with ``block_bytes`` it sets the dirty rate.
    :raises ValueError: a parameter is outside its range.
    """

    memory_bytes: int = 192 * 1024 * 1024
    tick_ms: int = 20
    blocks_bytes: int = 8 * 1024 * 1024
    block_bytes: int = 256 * 1024
    pause_ms: int = 20

    def __post_init__(self) -> None:
        if self.memory_bytes % (1024 * 1024) or self.memory_bytes <= 0:
            raise ValueError(f"memory_bytes must be a multiple of 1 MiB, not {self.memory_bytes}")
        for name, value in (("tick_ms", self.tick_ms), ("pause_ms", self.pause_ms)):
            if not 1 <= value <= 60_000:
                raise ValueError(f"{name} must be 1 to 60000, not {value}")
        if self.block_bytes % 4096 or self.block_bytes <= 0:
            raise ValueError(f"block_bytes must be a multiple of 4096, not {self.block_bytes}")
        if self.blocks_bytes % self.block_bytes or not 0 <= self.blocks_bytes <= self.memory_bytes // 2:
            raise ValueError(
                f"blocks_bytes must be a multiple of block_bytes and at most half the memory, not {self.blocks_bytes}"
            )

    def cmdline(self) -> str:
        """Return the kernel's command line, which also carries the parameters of ``/init``."""
        return (
            # The console is where a panic would be told; level 1 keeps all else from breaking into a tick's line.
            "console=ttyS0 loglevel=1 panic=-1 mitigations=off"
            f" ferryman.tick_ms={self.tick_ms} ferryman.blocks_kib={self.blocks_bytes // 1024}"
            f" ferryman.block_kib={self.block_bytes // 1024} ferryman.pause_ms={self.pause_ms}"
        )

    def domain_xml(
        self,
        name: str,
        uuid: UUID | str,
        kernel_path: str | os.PathLike[str],
        initramfs_path: str | os.PathLike[str],
        serial_socket_path: str | os.PathLike[str],
    ) -> str:
        """Return the libvirt domain XML: software emulation, direct kernel boot, one serial port, no disk."""
        return domain_xml(
            name=name,
            uuid=uuid,
            memory_bytes=self.memory_bytes,
            os_xml=(
                f"<kernel>{escape(os.fspath(kernel_path))}</kernel>"
                f"<initrd>{escape(os.fspath(initramfs_path))}</initrd>"
                f"<cmdline>{escape(self.cmdline())}</cmdline>"
            ),
            features_xml="<acpi/><apic/>",
            devices_xml="",
            serial_socket_path=serial_socket_path,
        )

    def qemu_argv(
        self,
        name: str,
        uuid: UUID | str,
        kernel_path: str | os.PathLike[str],
        initramfs_path: str | os.PathLike[str],
        serial_socket_path: str | os.PathLike[str],
        *,
        qmp_socket_path: str | os.PathLike[str] | None = None,
        qmp_fd: int | None = None,
        stopped: bool = False,
        incoming: bool = False,
        qemu: str = "qemu-system-x86_64",
    ) -> list[str]:
        """Return the command line of the same machine; see :meth:`CounterGuest.qemu_argv`."""
        return machine_argv(
            name=name,
            uuid=uuid,
            memory_bytes=self.memory_bytes,
            machine="pc,accel=tcg,usb=off,hpet=off,acpi=on",
            more=[
                "-kernel",
                os.fspath(kernel_path),
                "-initrd",
                os.fspath(initramfs_path),
                "-append",
                self.cmdline(),
            ],
            serial_socket_path=serial_socket_path,
            qmp_socket_path=qmp_socket_path,
            qmp_fd=qmp_fd,
            stopped=stopped,
            incoming=incoming,
            qemu=qemu,
        )
