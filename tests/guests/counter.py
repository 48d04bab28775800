"""The counter guest: a boot sector that ticks on its serial port and rewrites memory by a checkable rule.

``counter.asm`` is the source and says where everything is; :data:`SECTOR` is that source, assembled, so that
nobody needs an assembler to use it. An image is the sector with its parameter block filled in, padded to
:data:`IMAGE_BYTES`, because SeaBIOS does not boot a disk of 512 bytes.

What the guest prints: its tick number as eight upper-case hexadecimal digits and a line feed, from
``00000001`` on, ``tick_hz`` times a second.

What it writes: step ``s`` fills page ``s mod page_count`` with the little-endian 32-bit number ``s``, from the
first byte to the last, then increments the step counter. So a frozen guest's memory is known from that counter
alone, except for how far the page of the current step had come. :meth:`CounterGuest.verify_memory` compares
every byte; QMP ``pmemsave`` (val 0, size ``memory_bytes``) of a stopped guest is the dump it wants.
"""

from __future__ import annotations

import base64
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from uuid import UUID
from xml.sax.saxutils import escape, quoteattr

PAGE_BYTES = 4096
IMAGE_BYTES = 1024 * 1024

SECTOR_BYTES = 512
SECTOR_ADDRESS = 0x7C00
TICK_ADDRESS = 0x6000
STEP_ADDRESS = 0x6004
PAGES_ADDRESS = 0x200000
PARAMETERS_OFFSET = 0x1A0

# Base address, page count, pages per tick, PIT divisor, prefill flag, mask of the ticks that write the disk.
_PARAMETERS = struct.Struct("<IIIHBB")
_COUNTERS = struct.Struct("<II")
_PIT_HZ = 1_193_182
_DISK_TICKS = (0, 2, 4, 8, 16, 32, 64, 128)
_SLOWEST_TICK_HZ, _FASTEST_TICK_HZ = 19, 1000

# SeaBIOS keeps its tables in the last 256 KiB of memory and has used what lies below them while it started.
_FIRMWARE_BYTES = 1024 * 1024
# The PC's memory is in one piece, from address 0, only up to the PCI hole (QEMU hw/i386/pc_piix.c: 3.5 GiB).
_LARGEST_MEMORY_BYTES = 3 * 1024**3
_MAC = "52:54:00:00:00:01"

_REPORTED_PAGE_ERRORS = 16

SECTOR = base64.b64decode(
    b"+vwxwI7Y5JIMAiT+5pIPARaAfQ8gwAwBDyLAZuojfAAACABmuBAAjtiOwI7QvAB8AAC/AFAAALlCAAAAMcDzq8cFAFEAADp9CADH"
    b"BQRRAAAAjgAADwEdhn0AAKMAYAAAowRgAAC+QX0AAA+3FopGAoPGA+6B/mV9AABy7oA9rn0AAAB0C4sdpH0AAOh4AAAAsDTmQ6Cs"
    b"fQAA5kCgrX0AAOZA+/T6/wUAYAAAix0AYAAAuQgAAADBwwSI2CQPPAocaS/oLAAAAOLtsAroIwAAAIsdqH0AAOgtAAAAoK99AACE"
    b"wHS+hAUAYAAAdbbovwAAAOuviMS6/QMAAOyoIHT7iOC6+AMAAO7Dhdt0LaEEYAAAMdL3NaR9AADB4gwDFaB9AACJ16EEYAAAuQAE"
    b"AADzq/8FBGAAAEvrz8NQsCDmIFjPIAARIQAgIQAEIQABIQD+oQD/+QMA+wOA+AMB+QMA+wMD+gMAAAAAAAAAAAAAAAD//wAAAJvP"
    b"AP//AAAAk88AFwBofQAABwEAUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACAAAAEAAAAAAACcLgAAuvYDAACwAu6+8X0AALrxAQAA"
    b"Qqzugf73fQAAcvXsJIg8CHX5uvABAAC+AGAAALkAAQAA82ZvuvcBAADsqIB1+8MBAQAA4DAAAAAAAAAAVao="
)

Dump: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True, kw_only=True, slots=True)
class PageError:
    """A page that does not hold what the rule says.

    ``page`` is None for the boot sector. ``expected`` and ``found`` are the two little-endian words at
    ``address``, the first place that differs.
    """

    page: int | None
    address: int
    expected: int
    found: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a dump of guest memory held.

    ``errors`` counts the pages (and the boot sector) that are wrong; ``page_errors`` tells of the first 16.
    ``step`` and ``tick`` are the guest's own counters at the instant it was frozen.
    """

    errors: int
    pages_checked: int
    step: int
    tick: int
    page_errors: tuple[PageError, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterGuest:
    """One choice of the guest's parameters; images, machines and checks of memory follow from it.

    :param memory_bytes: a multiple of 8 KiB, up to 3 GiB.
    :param tick_hz: 19 to 1000.
    :param page_count: how many pages of 4 KiB are written, from 2 MiB upwards; the last MiB of memory stays
        with the firmware.
    :param pages_per_tick: how many steps a tick does. Under TCG one core does some 300,000 a second.
    :param prefill: write every page once before the first tick (steps 0 to ``page_count`` - 1), so that none
        is zero and a migration has to send all of them.
    :param disk_ticks: write the counters to the disk once in so many ticks, a power of two from 2 to 128; the disk
        is then a writable one. 0 never writes.
    :param network: a virtio network card too, with QEMU's user network; the guest has no driver for it.
    :raises ValueError: a parameter is outside its range, or the pages do not fit into the memory.
    """

    memory_bytes: int = 64 * 1024 * 1024
    tick_hz: int = 100
    page_count: int = 1024
    pages_per_tick: int = 0
    prefill: bool = False
    disk_ticks: int = 0
    network: bool = False

    def __post_init__(self) -> None:
        if self.memory_bytes % 8192 or not 0 < self.memory_bytes <= _LARGEST_MEMORY_BYTES:
            raise ValueError(f"memory_bytes must be a multiple of 8 KiB up to 3 GiB, not {self.memory_bytes}")
        if not _SLOWEST_TICK_HZ <= self.tick_hz <= _FASTEST_TICK_HZ:
            raise ValueError(f"tick_hz must be 19 to 1000, not {self.tick_hz}")
        most_pages = _most_pages(self.memory_bytes)
        if not 1 <= self.page_count <= most_pages:
            raise ValueError(
                f"page_count must be 1 to {most_pages} in {self.memory_bytes} bytes, not {self.page_count}"
            )
        if not 0 <= self.pages_per_tick < 2**32:
            raise ValueError(f"pages_per_tick must be 0 to 2**32 - 1, not {self.pages_per_tick}")
        if self.disk_ticks not in _DISK_TICKS:
            raise ValueError(f"disk_ticks must be 0 or a power of two from 2 to 128, not {self.disk_ticks}")

    @classmethod
    def filling(
        cls, *, memory_bytes: int, tick_hz: int = 100, pages_per_tick: int = 0, prefill: bool = True
    ) -> CounterGuest:
        """Return a guest that writes all the memory it can: everything but 3 MiB."""
        return cls(
            memory_bytes=memory_bytes,
            tick_hz=tick_hz,
            page_count=_most_pages(memory_bytes),
            pages_per_tick=pages_per_tick,
            prefill=prefill,
        )

    @property
    def tick_interval_s(self) -> float:
        """The time between two ticks, which the timer's divisor rounds to a multiple of 838 ns."""
        return self._divisor() / _PIT_HZ

    def _divisor(self) -> int:
        return round(_PIT_HZ / self.tick_hz)

    def sector(self) -> bytes:
        """Return the 512 bytes of the boot sector, with these parameters in it."""
        sector = bytearray(SECTOR)
        _PARAMETERS.pack_into(
            sector,
            PARAMETERS_OFFSET,
            PAGES_ADDRESS,
            self.page_count,
            self.pages_per_tick,
            self._divisor(),
            self.prefill,
            max(0, self.disk_ticks - 1),
        )
        return bytes(sector)

    def write_image(self, path: str | os.PathLike[str]) -> None:
        """Write the disk image, 1 MiB, over whatever is there. Without ``disk_ticks`` the guest only ever reads it."""
        Path(path).write_bytes(self.sector().ljust(IMAGE_BYTES, b"\0"))

    @staticmethod
    def tick_on_disk(path: str | os.PathLike[str]) -> int:
        """Return the tick that the guest has last written to its disk; 0 before the first."""
        with open(path, "rb") as image:
            image.seek(SECTOR_BYTES)
            tick, _ = _COUNTERS.unpack(image.read(_COUNTERS.size))
        return int(tick)

    def domain_xml(
        self,
        name: str,
        uuid: UUID | str,
        image_path: str | os.PathLike[str],
        serial_socket_path: str | os.PathLike[str],
    ) -> str:
        """Return the libvirt domain XML: software emulation, one virtio disk that is read-only, one serial port.

        A virtio disk may be read-only, an IDE one may not; and a read-only disk may be open on both hosts and
        needs no cache mode for libvirt to call its migration safe. Without ACPI the firmware starts 30 ms
        sooner, and this guest could not act on its power button anyway. With ``disk_ticks`` it is an IDE disk.

        :param serial_socket_path: where somebody listens already; QEMU connects when it starts, also while it
            waits for an incoming migration.
        """
        return domain_xml(
            name=name,
            uuid=uuid,
            memory_bytes=self.memory_bytes,
            os_xml="<boot dev='hd'/><bootmenu enable='no'/>",
            features_xml="",
            devices_xml=(
                "    <disk type='file' device='disk'>\n"
                "      <driver name='qemu' type='raw'/>\n"
                f"      <source file={quoteattr(os.fspath(image_path))}/>\n"
                f"{self._target_xml()}"
                "    </disk>\n"
                f"{self._network_xml()}"
            ),
            serial_socket_path=serial_socket_path,
        )

    def _target_xml(self) -> str:
        if self.disk_ticks:
            return "      <target dev='hda' bus='ide'/>\n"
        return "      <target dev='vda' bus='virtio'/>\n      <readonly/>\n"

    def _network_xml(self) -> str:
        if not self.network:
            return ""
        return f"    <interface type='user'><mac address='{_MAC}'/><model type='virtio'/></interface>\n"

    def qemu_argv(
        self,
        name: str,
        uuid: UUID | str,
        image_path: str | os.PathLike[str],
        serial_socket_path: str | os.PathLike[str],
        *,
        qmp_socket_path: str | os.PathLike[str] | None = None,
        qmp_fd: int | None = None,
        stopped: bool = False,
        incoming: bool = False,
        qemu: str = "qemu-system-x86_64",
    ) -> list[str]:
        """Return the command line of the same machine for a QEMU that nobody manages.

        :param qmp_socket_path: QEMU listens here for QMP, and does not wait for anybody.
        :param qmp_fd: a connected socket that QEMU inherits and speaks QMP on.
        :param stopped: start with ``-S``: ``cont`` starts the guest.
        :param incoming: start with ``-incoming defer``: ``migrate-incoming`` says where to listen.
        """
        read_only = "off" if self.disk_ticks else "on"
        network = (
            ["-netdev", "user,id=net", "-device", f"virtio-net-pci,netdev=net,mac={_MAC}"]
            if self.network
            else []
        )
        return machine_argv(
            name=name,
            uuid=uuid,
            memory_bytes=self.memory_bytes,
            machine="pc,accel=tcg,usb=off,hpet=off,acpi=off",
            more=[
                "-boot",
                "menu=off,strict=on",
                "-blockdev",
                f"driver=file,filename={_option(image_path)},node-name=image-file,read-only={read_only}",
                "-blockdev",
                f"driver=raw,file=image-file,node-name=image,read-only={read_only}",
                "-device",
                f"{'ide-hd,bus=ide.0,unit=0' if self.disk_ticks else 'virtio-blk-pci'},drive=image,bootindex=1",
                *network,
            ],
            serial_socket_path=serial_socket_path,
            qmp_socket_path=qmp_socket_path,
            qmp_fd=qmp_fd,
            stopped=stopped,
            incoming=incoming,
            qemu=qemu,
        )

    def verify_memory(self, dump: Dump) -> VerifyReport:
        """Check every page the guest writes, and its boot sector, against the rule.

        :param dump: the guest's physical memory from address 0, of a guest that stood still: a file or a buffer.
        :raises ValueError: the dump is shorter than ``memory_bytes``.
        """
        if isinstance(dump, str | os.PathLike):
            with open(dump, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                return self._verify(memory)
        return self._verify(dump)

    def _verify(self, memory: bytes | bytearray | memoryview | mmap.mmap) -> VerifyReport:
        if len(memory) < self.memory_bytes:
            raise ValueError(f"the dump has {len(memory)} bytes and the guest {self.memory_bytes}")
        tick, step = _COUNTERS.unpack_from(memory, TICK_ADDRESS)
        errors = 0
        page_errors: list[PageError] = []

        sector = bytes(memory[SECTOR_ADDRESS : SECTOR_ADDRESS + SECTOR_BYTES])
        if sector != self.sector():
            errors += 1
            page_errors.append(_first_difference(None, SECTOR_ADDRESS, self.sector(), sector))

        count = self.page_count
        unfinished = step % count
        words = PAGE_BYTES // 4
        for page in range(count):
            address = PAGES_ADDRESS + page * PAGE_BYTES
            # A slice of bytes, because comparing memoryviews goes element by element (CPython 3.11).
            found = bytes(memory[address : address + PAGE_BYTES])
            # The largest number below step that is page (mod count); the page was never written if it is negative.
            last = step - 1 - (step - 1 - page) % count
            expected = last.to_bytes(4, "little") * words if last >= 0 else bytes(PAGE_BYTES)
            if found == expected:
                continue
            if page == unfinished:
                new = step.to_bytes(4, "little")
                done = _leading_words(found, new)
                expected = new * done + expected[done * 4 :]
                if found == expected:
                    continue
            errors += 1
            if len(page_errors) < _REPORTED_PAGE_ERRORS:
                page_errors.append(_first_difference(page, address, expected, found))
        return VerifyReport(
            errors=errors, pages_checked=count, step=step, tick=tick, page_errors=tuple(page_errors)
        )


def _most_pages(memory_bytes: int) -> int:
    return (memory_bytes - PAGES_ADDRESS - _FIRMWARE_BYTES) // PAGE_BYTES


def _leading_words(page: bytes, word: bytes) -> int:
    for index in range(0, PAGE_BYTES, 4):
        if page[index : index + 4] != word:
            return index // 4
    return PAGE_BYTES // 4


def _first_difference(page: int | None, address: int, expected: bytes, found: bytes) -> PageError:
    offset = next(
        offset for offset in range(0, len(expected), 4) if expected[offset:][:4] != found[offset:][:4]
    )
    return PageError(
        page=page,
        address=address + offset,
        expected=int.from_bytes(expected[offset : offset + 4], "little"),
        found=int.from_bytes(found[offset : offset + 4], "little"),
    )


def domain_xml(
    *,
    name: str,
    uuid: UUID | str,
    memory_bytes: int,
    os_xml: str,
    features_xml: str,
    devices_xml: str,
    serial_socket_path: str | os.PathLike[str],
) -> str:
    """Return the domain XML that the guests share, with no device that libvirt would add by itself and need not."""
    return f"""\
<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='KiB'>{memory_bytes // 1024}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{os_xml}</os>
  <features>{features_xml}</features>
  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <devices>
{devices_xml}\
    <controller type='usb' model='none'/>
    <serial type='unix'>
      <source mode='connect' path={quoteattr(os.fspath(serial_socket_path))}/>
      <target port='0'/>
    </serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def machine_argv(
    *,
    name: str,
    uuid: UUID | str,
    memory_bytes: int,
    machine: str,
    more: list[str],
    serial_socket_path: str | os.PathLike[str],
    qmp_socket_path: str | os.PathLike[str] | None,
    qmp_fd: int | None,
    stopped: bool,
    incoming: bool,
    qemu: str,
) -> list[str]:
    """Return the QEMU command line that the guests share."""
    argv = [
        qemu,
        "-name",
        f"guest={_option(name)}",
        "-uuid",
        str(uuid),
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        machine,
        "-m",
        f"size={memory_bytes // 1024}k",
        "-smp",
        "1",
        "-rtc",
        "base=utc",
        *more,
        "-chardev",
        f"socket,id=serial,path={_option(serial_socket_path)},server=off",
        "-serial",
        "chardev:serial",
    ]
    if qmp_socket_path is not None:
        argv += ["-chardev", f"socket,id=qmp,path={_option(qmp_socket_path)},server=on,wait=off"]
    elif qmp_fd is not None:
        argv += ["-chardev", f"socket,id=qmp,fd={qmp_fd},server=off"]
    if qmp_socket_path is not None or qmp_fd is not None:
        argv += ["-mon", "chardev=qmp,mode=control"]
    if stopped:
        argv.append("-S")
    if incoming:
        argv += ["-incoming", "defer"]
    return argv


def _option(value: str | os.PathLike[str]) -> str:
    """Return a value for inside a QEMU option, where a comma is written twice."""
    return os.fspath(value).replace(",", ",,")
