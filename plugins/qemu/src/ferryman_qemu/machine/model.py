"""A machine as this driver understands it: what :mod:`read` finds in a definition and :mod:`build` builds from.

Words and values are those of libvirt's domain XML.  ``element`` is where a device stands in the document; it takes no
part in comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferryman.definition import Definition


# Addresses


@dataclass(frozen=True, kw_only=True, slots=True)
class PCIAddress:
    """A place on a PCI bus; ``bus`` is the index of its controller."""

    bus: int
    slot: int
    function: int = 0
    multifunction: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DriveAddress:
    """A place on an IDE, SATA, SCSI or floppy controller."""

    controller: int
    bus: int = 0
    target: int = 0
    unit: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class USBAddress:
    """A port of a USB controller."""

    bus: int
    port: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PortAddress:
    """A port of a virtio-serial controller."""

    controller: int
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ISAAddress:
    """Ports and interrupt of an ISA device; None is the usual one."""

    iobase: int | None = None
    irq: int | None = None


Address = PCIAddress | DriveAddress | USBAddress | PortAddress | ISAAddress


# Devices


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What every device has.

    :param alias: id of the device; '' until it is pinned.
    :param address: None until it is pinned, and for devices that need none.
    :param rom_bar: whether the option ROM is visible; None leaves it to QEMU.
    :param rom_file: file of the option ROM; '' is QEMU's own.
    """

    element: Any = field(default=None, compare=False, repr=False)
    alias: str = ""
    address: Address | None = None
    boot_order: int | None = None
    rom_bar: bool | None = None
    rom_file: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a disk's data are: a file, a block device, or an NBD export.

    :param kind: file, block or nbd.
    :param path: of the file or device; of an export's unix socket.
    :param host: of an export, with ``port``; '' where it is a socket.
    :param export: name of the export.
    """

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0
    export: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk(Device):
    """A disk, a CD-ROM or a floppy drive.

    :param source: None for an empty drive.
    :param bus: virtio, scsi, sata, ide, usb or fdc.
    :param model: of a virtio disk: virtio, virtio-transitional or virtio-non-transitional.
    :param backing: False where the definition says that the image stands alone.
    """

    source: Source | None
    device: str
    target: str
    bus: str
    model: str = "virtio"
    format: str = "raw"
    readonly: bool = False
    shareable: bool = False
    cache: str = "default"
    io: str = ""
    discard: str = ""
    detect_zeroes: str = ""
    error_policy: str = ""
    rerror_policy: str = ""
    serial: str = ""
    wwn: str = ""
    vendor: str = ""
    product: str = ""
    logical_block_bytes: int | None = None
    physical_block_bytes: int | None = None
    rotation_rate: int | None = None
    removable: bool | None = None
    iothread: int | None = None
    queues: int | None = None
    backing: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Controller(Device):
    """A controller.

    :param kind: pci, usb, scsi, sata, ide, virtio-serial or fdc.
    :param master: first port of the USB 2 controller that a companion serves; None for one that is none.
    :param chassis: of a PCI bridge or root port.
    """

    kind: str
    index: int
    model: str = ""
    ports: int | None = None
    vectors: int | None = None
    master: int | None = None
    queues: int | None = None
    iothread: int | None = None
    chassis: int | None = None
    port: int | None = None
    hotplug: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface(Device):
    """A network interface.

    :param kind: user, ethernet or bridge.
    :param bridge: that its tap joins.
    :param tap: name of the tap; '' lets the kernel choose.
    :param managed: whether the tap is made here, or must be there.
    :param link: whether the cable is plugged in.
    :param networks: of ``user``: addresses with prefix, by family.
    """

    kind: str
    mac: str
    model: str
    bridge: str = ""
    tap: str = ""
    managed: bool = True
    backend: str = ""
    queues: int | None = None
    rx_queue_size: int | None = None
    tx_queue_size: int | None = None
    mtu: int | None = None
    link: bool = True
    networks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Character:
    """What is at the host's end of a port.

    :param kind: pty, unix, tcp, file, dev, pipe, null or spicevmc.
    :param listen: QEMU listens instead of connecting.
    :param path: '' for a unix socket that is made beside the process.
    """

    kind: str
    path: str = ""
    listen: bool = False
    append: bool = False
    host: str = ""
    port: int = 0
    telnet: bool = False
    log: str = ""
    log_append: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Port(Device):
    """A serial port, a parallel port, a console or a channel.

    :param kind: serial, parallel, console or channel.
    :param model: isa-serial, pci-serial, isa-parallel, virtconsole or virtserialport.
    :param name: of a channel, as the guest sees it.
    """

    kind: str
    model: str
    character: Character
    index: int = 0
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graphics(Device):
    """A display that is served.

    :param kind: vnc or spice.
    :param port: -1 lets QEMU choose a free one.
    :param options: further options, as QEMU writes them.
    """

    kind: str
    address_text: str = "127.0.0.1"
    socket: str = ""
    port: int = -1
    websocket: int | None = None
    keymap: str = ""
    password: str = field(default="", repr=False)
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Video(Device):
    """A display adapter."""

    model: str
    primary: bool = True
    vram_kib: int | None = None
    vram64_kib: int | None = None
    ram_kib: int | None = None
    vgamem_kib: int | None = None
    heads: int | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound(Device):
    """A sound card: ich6, ich9, ac97, es1370 or sb16; only the first two have codecs."""

    model: str
    codecs: tuple[str, ...] = ()
    audio: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Audio:
    """Where sound goes: none, spice, or a file."""

    element: Any = field(default=None, compare=False, repr=False)
    index: int
    kind: str
    path: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Random(Device):
    """A source of random numbers: random (of a file) or builtin."""

    backend: str
    model: str = "virtio"
    path: str = ""
    rate_bytes: int | None = None
    period_ms: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Balloon(Device):
    """A memory balloon."""

    model: str = "virtio"
    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    statistics_period_s: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchdog(Device):
    """A watchdog: i6300esb, ib700 or itco."""

    model: str
    action: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Input(Device):
    """A keyboard, mouse or tablet on usb, virtio or ps2."""

    kind: str
    bus: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TPM(Device):
    """A TPM 2.0 that swtpm emulates: tpm-tis or tpm-crb."""

    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panic(Device):
    """A device by which the guest says that it panicked: isa or pvpanic (PCI)."""

    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Vsock(Device):
    """A socket between guest and host."""

    cid: int
    model: str = "virtio"


@dataclass(frozen=True, kw_only=True, slots=True)
class Redirection(Device):
    """A USB device that a viewer brings over its connection."""

    character: Character


# The whole


@dataclass(frozen=True, kw_only=True, slots=True)
class CPU:
    """The processor.

    :param model: '' is the machine type's default; 'max' and 'host' are QEMU's.
    :param host_model: the model is to be chosen by what the host has.
    :param features: name -> whether the guest has it, in the document's order.
    :param enforce: a feature that is missing here is an error at start.
    """

    model: str = ""
    host_model: bool = False
    features: tuple[tuple[str, bool], ...] = ()
    check: str = ""
    enforce: bool = False
    migratable: bool = True
    sockets: int | None = None
    dies: int = 1
    cores: int = 1
    threads: int = 1
    cache: str = ""
    address_bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A NUMA node of the guest."""

    index: int
    cpus: tuple[tuple[int, int], ...]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How the guest's memory is backed.

    :param hugepage_bytes: 0 is the host's default size of huge pages; None are ordinary pages.
    :param source: '', anonymous or memfd.
    """

    hugepage_bytes: int | None = None
    locked: bool = False
    merge: bool = True
    source: str = ""
    shared: bool = False
    preallocate: bool = False

    @property
    def plain(self) -> bool:
        """Whether QEMU's own memory does."""
        return self.hugepage_bytes is None and not self.source and not self.shared and not self.preallocate


@dataclass(frozen=True, kw_only=True, slots=True)
class Firmware:
    """What starts the machine instead of SeaBIOS.

    :param automatic: choose by the host's firmware descriptors.
    :param loader: the code; '' where it is to be chosen.
    :param flash: the loader is a flash chip (pflash) rather than a ROM.
    :param nvram: file of the variables; '' keeps it beside the domain.
    :param template: file that the variables begin as.
    :param wanted: features that automatic choice must find, or must not.
    """

    automatic: bool = False
    loader: str = ""
    flash: bool = False
    readonly: bool = True
    secure: bool | None = None
    nvram: str = ""
    template: str = ""
    wanted: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The guest's clock.

    :param base: utc or localtime.
    :param adjustment_s: seconds that the clock is ahead of its base.
    """

    base: str = "utc"
    adjustment_s: int = 0
    rtc_catchup: bool = False
    pit_delay: bool = False
    hpet: bool | None = None
    kvmclock: bool | None = None
    hypervclock: bool | None = None
    tsc_hz: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Boot:
    """What the machine starts from.

    :param devices: classes in their order: hd, cdrom, network, fd.
    """

    devices: tuple[str, ...] = ()
    menu: bool | None = None
    menu_timeout_ms: int | None = None
    serial: bool = False
    reboot_timeout_ms: int | None = None
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features of the machine, and enlightenments for Windows.

    :param hyperv: name -> value of the enlightenments, as QEMU's CPU properties.
    """

    acpi: bool = False
    smm: bool | None = None
    vmport: bool | None = None
    pmu: bool | None = None
    kvm_hidden: bool = False
    vmcoreinfo: bool = False
    hyperv: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A definition, understood."""

    definition: Definition
    accelerated: bool
    machine: str
    emulator: str
    max_memory_bytes: int
    current_memory_bytes: int
    vcpus: int
    max_vcpus: int
    iothreads: int
    cpu: CPU
    cells: tuple[Cell, ...]
    memory: Memory
    firmware: Firmware
    clock: Clock
    boot: Boot
    features: Features
    smbios: tuple[tuple[int, tuple[tuple[str, str], ...]], ...]
    generation_id: str
    suspend_to_memory: bool | None
    suspend_to_disk: bool | None
    on_poweroff: str
    on_reboot: str
    on_crash: str
    controllers: tuple[Controller, ...]
    disks: tuple[Disk, ...]
    interfaces: tuple[Interface, ...]
    ports: tuple[Port, ...]
    graphics: tuple[Graphics, ...]
    videos: tuple[Video, ...]
    sounds: tuple[Sound, ...]
    audios: tuple[Audio, ...]
    randoms: tuple[Random, ...]
    balloon: Balloon | None
    watchdogs: tuple[Watchdog, ...]
    inputs: tuple[Input, ...]
    tpm: TPM | None
    panics: tuple[Panic, ...]
    vsock: Vsock | None
    redirections: tuple[Redirection, ...]
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @property
    def q35(self) -> bool:
        """Whether the machine has PCI Express (q35) rather than PCI (i440fx)."""
        return "q35" in self.machine

    @property
    def boots_by_device(self) -> bool:
        """Whether devices say themselves in which order the guest starts from them."""
        return any(device.boot_order is not None for device in self.devices)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices that have an id, controllers first, in the order in which they are built."""
        single = (self.tpm, self.balloon, self.vsock)
        return (
            *self.controllers,
            *self.disks,
            *self.interfaces,
            *self.ports,
            *self.inputs,
            *self.graphics,
            *self.videos,
            *self.sounds,
            *self.redirections,
            *self.watchdogs,
            *self.randoms,
            *self.panics,
            *(device for device in single if device is not None),
        )

    @property
    def first_serial(self) -> Port | None:
        """The serial port that a console repeats."""
        return next((port for port in self.ports if port.kind == "serial"), None)
