"""Writes QEMU's command line of a pinned machine, and the same devices as commands for a machine that runs.

Devices, block nodes and network backends are JSON, which is what QMP takes too: a device that is plugged in later is
the one that the destination of a migration builds at its start.

Source: QEMU 7.2 qemu-options.hx, qapi/block-core.json, qapi/net.json, ``-device NAME,help``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ferryman_qemu.machine.model import (
    TPM,
    Balloon,
    Controller,
    Device,
    Disk,
    DriveAddress,
    Graphics,
    Input,
    Interface,
    ISAAddress,
    Machine,
    Panic,
    PCIAddress,
    Port,
    PortAddress,
    Random,
    Redirection,
    Sound,
    Source,
    USBAddress,
    Video,
    Vsock,
    Watchdog,
)
from ferryman_qemu.machine.pin import built_in
from ferryman_qemu.machine.read import VNC_PORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman_qemu.machine.model import Character

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_VNC_PORTS = 99
_SPICE_PORT = 5900


class Site(Protocol):
    """What a command line needs of the host where it will run; what it gives belongs to the process to come."""

    emulator: str
    incoming: bool
    """It is a receiver's."""
    pidfile: str

    def listen(self, name: str) -> int:
        """Descriptor of a unix socket that listens beside the process."""

    def tap(self, interface: Interface) -> tuple[list[int], list[int]]:
        """Descriptors of an interface's tap, one for each queue, and of vhost, if that is to be used."""

    def secret(self, name: str, text: str) -> str:
        """Path of a file that only this process's user reads."""

    def nvram(self, machine: Machine) -> str:
        """Path of the firmware's variables; the file is there."""

    def tpm(self) -> int:
        """Descriptor of the control connection to a TPM emulator that has been started."""

    def free_port(self, address: str, first: int) -> int:
        """A TCP port from ``first`` on at which nobody listens now."""

    def now_s(self) -> float:
        """Seconds since the epoch."""


@dataclass(kw_only=True)
class CommandLine:
    """What to start, and what to command before the guest runs.

    :param prelude: commands of QMP with their arguments, to be executed on either side before the guest may run.
    """

    argv: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    prelude: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def option(self, name: str, *values: str) -> None:
        """Add an option."""
        self.argv += [f"-{name}", ",".join(values)]

    def flag(self, name: str) -> None:
        """Add an option that has no value."""
        self.argv.append(f"-{name}")

    def json(self, name: str, values: dict[str, Any]) -> None:
        """Add an option as JSON."""
        self.argv += [f"-{name}", json.dumps(values, separators=(",", ":"))]


def command_line(machine: Machine, site: Site) -> CommandLine:
    """Write the command line of a pinned machine.

    The guest never starts by itself (``-S``), and a receiver listens only when it is told to (``-incoming defer``).
    """
    line = CommandLine(argv=[site.emulator], environment=dict(machine.environment))
    _machine(machine, site, line)
    _memory(machine, line)
    _monitors(site, line)
    for number in range(1, machine.iothreads + 1):
        line.json("object", {"qom-type": "iothread", "id": f"iothread{number}"})
    for controller in _in_order(machine.controllers):
        _controller(machine, controller, line)
    for device in machine.devices:
        if not isinstance(device, Controller):
            _device(machine, device, site, line)
    if site.incoming:
        line.option("incoming", "defer")
    line.option("msg", "timestamp=on")
    line.option("pidfile", site.pidfile)
    line.argv += machine.arguments
    return line


# The machine itself


def _machine(machine: Machine, site: Site, line: CommandLine) -> None:
    definition = machine.definition
    line.option("name", f"guest={escape(definition.name)}")
    line.option("uuid", definition.uuid)
    for name in ("no-user-config", "nodefaults", "S"):
        line.flag(name)
    line.option("display", "none")
    features, clock = machine.features, machine.clock
    options = {
        "accel": "kvm" if machine.accelerated else "tcg",
        "usb": "off",
        "dump-guest-core": "off",
        "hpet": on_off(clock.hpet is not False),
        "acpi": on_off(features.acpi),
        "vmport": _maybe(features.vmport),
        "smm": _maybe(features.smm),
        # SeaBIOS shows itself on the first serial port then.
        "graphics": "off" if machine.boot.serial else "",
        "mem-merge": "" if machine.memory.merge else "off",
    }
    options |= _firmware(machine, site, line)
    if not machine.cells and not machine.memory.plain:
        options["memory-backend"] = "ram0"
    line.option("machine", machine.machine, *(f"{k}={v}" for k, v in options.items() if v))
    line.option("cpu", _cpu_text(machine))
    cpu = machine.cpu
    sockets = cpu.sockets if cpu.sockets is not None else machine.max_vcpus
    line.option(
        "smp",
        f"cpus={machine.vcpus}",
        f"maxcpus={machine.max_vcpus}",
        f"sockets={sockets}",
        f"dies={cpu.dies}",
        f"cores={cpu.cores}",
        f"threads={cpu.threads}",
    )
    _clock(machine, site, line)
    _boot(machine, line)
    chipset = "ICH9-LPC" if machine.q35 else "PIIX4_PM"
    for number, wanted in ((3, machine.suspend_to_memory), (4, machine.suspend_to_disk)):
        if wanted is not None:
            line.option("global", f"{chipset}.disable_s{number}={int(not wanted)}")
    for number, values in machine.smbios:
        line.option("smbios", f"type={number}", *(f"{k}={escape(v)}" for k, v in values))
    if machine.generation_id:
        line.json("device", {"driver": "vmgenid", "guid": machine.generation_id, "id": "vmgenid0"})
    if features.vmcoreinfo:
        line.json("device", {"driver": "vmcoreinfo", "id": "vmcoreinfo0"})
    actions = {
        "reboot": "reset" if machine.on_reboot == "restart" else "shutdown",
        "shutdown": "poweroff" if machine.on_poweroff == "destroy" else "pause",
        "panic": "shutdown" if machine.on_crash == "destroy" else "pause",
    }
    for watchdog in machine.watchdogs[:1]:
        actions["watchdog"] = watchdog.action
    line.option("action", *(f"{k}={v}" for k, v in actions.items()))


def _cpu_text(machine: Machine) -> str:
    """The processor as ``-cpu`` takes it: model and features."""
    cpu, features, clock = machine.cpu, machine.features, machine.clock
    parts = [cpu.model]
    if not cpu.migratable:
        parts.append("migratable=off")
    parts += [f"{name}={on_off(has)}" for name, has in cpu.features]
    if cpu.enforce:
        parts.append("enforce=on")
    if cpu.address_bits is not None:
        parts.append(f"phys-bits={cpu.address_bits}")
    parts += {
        "passthrough": ["host-cache-info=on", "l3-cache=off"],
        "emulate": ["l3-cache=on"],
        "disable": ["l3-cache=off"],
    }.get(cpu.cache, [])
    parts += [f"{name}={value}" for name, value in features.hyperv]
    for name, value in (("hv-time", clock.hypervclock), ("kvmclock", clock.kvmclock), ("pmu", features.pmu)):
        if value is not None:
            parts.append(f"{name}={on_off(value)}")
    if clock.tsc_hz is not None:
        parts.append(f"tsc-frequency={clock.tsc_hz}")
    if features.kvm_hidden:
        parts.append("kvm=off")
    return ",".join(parts)


def _firmware(machine: Machine, site: Site, line: CommandLine) -> dict[str, str]:
    firmware = machine.firmware
    if not firmware.loader:
        return {}
    if not firmware.flash:
        line.option("bios", escape(firmware.loader))
        return {}
    chips = [("pflash0", firmware.loader, firmware.readonly)]
    if firmware.template or firmware.nvram:
        chips.append(("pflash1", site.nvram(machine), False))
    for name, path, readonly in chips:
        line.json(
            "blockdev",
            {"driver": "file", "node-name": f"{name}-file", "filename": path, "read-only": readonly},
        )
        line.json(
            "blockdev",
            {"driver": "raw", "node-name": name, "file": f"{name}-file", "read-only": readonly},
        )
    if firmware.secure:
        line.option("global", "driver=cfi.pflash01", "property=secure", "value=on")
    return {name: name for name, _, _ in chips}


def _memory(machine: Machine, line: CommandLine) -> None:
    memory = machine.memory
    line.option("m", f"size={machine.max_memory_bytes // 1024}k")
    if memory.locked:
        line.option("overcommit", "mem-lock=on")
    if not machine.cells:
        if not memory.plain:
            line.json("object", _memory_object(machine, "ram0", machine.max_memory_bytes))
        return
    for cell in machine.cells:
        name = f"ram-node{cell.index}"
        line.json("object", _memory_object(machine, name, cell.memory_bytes))
        cpus = [f"cpus={low}-{high}" if high > low else f"cpus={low}" for low, high in cell.cpus]
        line.option("numa", "node", f"nodeid={cell.index}", *cpus, f"memdev={name}")


def _memory_object(machine: Machine, name: str, size: int) -> dict[str, Any]:
    memory = machine.memory
    huge = memory.hugepage_bytes is not None
    values: dict[str, Any] = {
        "qom-type": "memory-backend-memfd" if huge or memory.source == "memfd" else "memory-backend-ram",
        "id": name,
        "size": size,
    }
    if huge:
        values["hugetlb"] = True
        if memory.hugepage_bytes:
            values["hugetlbsize"] = memory.hugepage_bytes
    if memory.shared or values["qom-type"] == "memory-backend-memfd":
        values["share"] = memory.shared
    if memory.preallocate:
        values["prealloc"] = True
    return values


def _monitors(site: Site, line: CommandLine) -> None:
    for name in ("control", "read"):
        line.option("chardev", f"socket,id={name},fd={site.listen(name)},server=on,wait=off")
        line.option("mon", f"chardev={name},mode=control")


def _clock(machine: Machine, site: Site, line: CommandLine) -> None:
    clock = machine.clock
    base = clock.base
    if clock.adjustment_s:
        seconds = int(site.now_s()) + clock.adjustment_s
        if clock.base == "localtime":
            seconds += time.localtime(seconds).tm_gmtoff
        base = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(max(0, seconds)))
    line.option("rtc", f"base={base}", *(["driftfix=slew"] if clock.rtc_catchup else []))
    if machine.accelerated and clock.pit_delay:
        line.option("global", "kvm-pit.lost_tick_policy=delay")


def _boot(machine: Machine, line: CommandLine) -> None:
    boot = machine.boot
    values = [f"menu={on_off(bool(boot.menu))}"]
    if boot.menu_timeout_ms is not None:
        values.append(f"splash-time={boot.menu_timeout_ms}")
    if boot.reboot_timeout_ms is not None:
        values.append(f"reboot-timeout={boot.reboot_timeout_ms}")
    line.option("boot", *values, "strict=on")
    if boot.kernel:
        # Paths stand as they are: only a multiboot kernel takes a comma-separated list here.
        line.argv += ["-kernel", boot.kernel]
        if boot.initrd:
            line.argv += ["-initrd", boot.initrd]
        if boot.cmdline:
            line.argv += ["-append", boot.cmdline]


_BOOT_CLASSES = {
    "hd": lambda d: isinstance(d, Disk) and d.device == "disk",
    "cdrom": lambda d: isinstance(d, Disk) and d.device == "cdrom",
    "fd": lambda d: isinstance(d, Disk) and d.device == "floppy",
    "network": lambda d: isinstance(d, Interface),
}


def _boot_index(machine: Machine, device: Device) -> int | None:
    """Place of a device in the order of what is started from: the first of each class that <boot dev> names."""
    if device.boot_order is not None or machine.boot.kernel or machine.boots_by_device:
        return device.boot_order
    for number, name in enumerate(machine.boot.devices or ("hd",), start=1):
        first = next((d for d in machine.devices if _BOOT_CLASSES[name](d)), None)
        if first is not None and first.alias == device.alias:
            return number
    return None


# Devices


def _place(machine: Machine, device: Device) -> dict[str, Any]:
    """Where a device is, as properties."""
    match device.address:
        case PCIAddress() as place:
            values: dict[str, Any] = {"bus": _pci_bus(machine, place.bus), "addr": f"{place.slot:#x}"}
            if place.function or place.multifunction:
                values["addr"] += f".{place.function:#x}"
            if place.multifunction:
                values["multifunction"] = True
            return values
        case USBAddress(bus=bus, port=port):
            return {"bus": f"{_controller_id(machine, 'usb', bus)}.0", "port": port}
        case PortAddress(controller=index, port=port):
            return {"bus": f"{_controller_id(machine, 'virtio-serial', index)}.0", "nr": port}
        case ISAAddress(iobase=iobase, irq=irq):
            where = {"ioport" if isinstance(device, Panic) else "iobase": iobase, "irq": irq}
            return {name: number for name, number in where.items() if number is not None}
    return {}


def _pci_bus(machine: Machine, index: int) -> str:
    return ("pcie.0" if machine.q35 else "pci.0") if index == 0 else _controller_id(machine, "pci", index)


def _controller_id(machine: Machine, kind: str, index: int) -> str:
    # A USB 2 controller comes before its companions, which have its index.
    found = [c for c in machine.controllers if c.kind == kind and c.index == index and c.master is None]
    return found[0].alias


def _common(machine: Machine, device: Device, driver: str) -> dict[str, Any]:
    values: dict[str, Any] = {"driver": driver, "id": device.alias, **_place(machine, device)}
    index = _boot_index(machine, device) if isinstance(device, Disk | Interface | Redirection) else None
    if index is not None and driver != "floppy":
        values["bootindex"] = index
    if device.rom_bar is not None:
        values["rombar"] = int(device.rom_bar)
    if device.rom_file:
        values["romfile"] = device.rom_file
    return values


def _virtio(model: str, name: str) -> str:
    """A virtio driver's name by its model: virtio, virtio-transitional or virtio-non-transitional."""
    return f"virtio-{name}-pci{model.removeprefix('virtio')}" if model.startswith("virtio") else model


def _in_order(controllers: Sequence[Controller]) -> list[Controller]:
    """Buses before what is behind them: PCI by its depth, and companions after their master."""
    parents = {
        c.index: c.address.bus for c in controllers if c.kind == "pci" and isinstance(c.address, PCIAddress)
    }

    def depth(index: int) -> int:
        return 0 if index == 0 else 1 + depth(parents[index])

    return sorted(
        controllers,
        key=lambda c: (c.kind != "pci", depth(c.index) if c.kind == "pci" else 0, c.master is not None),
    )


def _controller(machine: Machine, controller: Controller, line: CommandLine) -> None:
    if built_in(controller, machine) or controller.model == "none":
        return
    drivers = {
        ("usb", "ehci"): "usb-ehci",
        ("usb", "piix3-uhci"): "piix3-usb-uhci",
        ("usb", "piix4-uhci"): "piix4-usb-uhci",
        ("usb", "nec-xhci"): "nec-usb-xhci",
        ("scsi", "virtio-scsi"): "virtio-scsi-pci",
        ("scsi", "lsilogic"): "lsi53c895a",
        ("pci", "pcie-to-pci-bridge"): "pcie-pci-bridge",
    }
    driver = drivers.get((controller.kind, controller.model))
    if driver is None:
        match controller.kind:
            case "usb":
                driver = controller.model.replace("ich9-", "ich9-usb-")
            case "sata":
                driver = "ahci"
            case "fdc":
                driver = "isa-fdc"
            case "scsi":
                driver = _virtio(controller.model, "scsi")
            case "virtio-serial":
                driver = _virtio(controller.model or "virtio", "serial")
            case _:
                driver = controller.model
    values = _common(machine, controller, driver)
    if controller.master is not None:
        master = _controller_id(machine, "usb", controller.index)
        values |= {"masterbus": f"{master}.0", "firstport": controller.master}
    if controller.model == "pcie-root-port":
        values |= {"chassis": controller.chassis, "port": controller.port}
        if not controller.hotplug:
            values["hotplug"] = False
    if controller.model == "pci-bridge":
        values["chassis_nr"] = controller.chassis if controller.chassis is not None else controller.index
    if controller.ports is not None:
        if controller.model in ("qemu-xhci", "nec-xhci"):
            values |= {"p2": controller.ports, "p3": controller.ports}
        elif controller.kind == "virtio-serial":
            values["max_ports"] = controller.ports
    if controller.vectors is not None:
        values["vectors"] = controller.vectors
    if controller.queues is not None:
        values["num_queues"] = controller.queues
    if controller.iothread is not None:
        values["iothread"] = f"iothread{controller.iothread}"
    line.json("device", values)


def _device(machine: Machine, device: Device, site: Site, line: CommandLine) -> None:
    match device:
        case Disk():
            for node in disk_nodes(device):
                line.json("blockdev", node)
            line.json("device", disk_device(machine, device))
            index = _boot_index(machine, device) if device.bus == "fdc" else None
            if index is not None and isinstance(device.address, DriveAddress):
                # The controller knows which of its drives is started from.
                line.option("global", f"isa-fdc.bootindex{'AB'[device.address.unit]}={index}")
        case Interface():
            line.json("netdev", network_backend(device, *site.tap(device)))
            line.json("device", network_device(machine, device))
            if not device.link:
                line.prelude.append(("set_link", {"name": device.alias, "up": False}))
        case Port():
            _port(machine, device, site, line)
        case Graphics():
            _graphics(device, site, line)
        case Video():
            _video(machine, device, line)
        case Sound():
            _sound(machine, device, line)
        case Random():
            _random(machine, device, line)
        case Balloon():
            values = _common(machine, device, _virtio(device.model, "balloon"))
            values |= {"deflate-on-oom": True} if device.deflate_on_oom else {}
            values |= {"free-page-reporting": True} if device.free_page_reporting else {}
            line.json("device", values)
            if device.statistics_period_s is not None:
                setting = {
                    "path": f"/machine/peripheral/{device.alias}",
                    "property": "guest-stats-polling-interval",
                    "value": device.statistics_period_s,
                }
                line.prelude.append(("qom-set", setting))
        case Watchdog(model="itco"):
            line.option("global", "ICH9-LPC.noreboot=off")
        case Watchdog():
            line.json("device", _common(machine, device, device.model))
        case Input():
            _input(machine, device, line)
        case TPM():
            line.option("chardev", f"socket,id=char-{device.alias},fd={site.tpm()}")
            line.option("tpmdev", f"emulator,id=dev-{device.alias},chardev=char-{device.alias}")
            line.json("device", {**_common(machine, device, device.model), "tpmdev": f"dev-{device.alias}"})
        case Panic(model=model):
            line.json("device", _common(machine, device, "pvpanic-pci" if model == "pvpanic" else "pvpanic"))
        case Vsock(cid=cid, model=model):
            driver = _virtio(model, "vsock").replace("virtio-", "vhost-", 1)
            line.json("device", {**_common(machine, device, driver), "guest-cid": cid})
        case Redirection():
            _character(device.alias, device.character, "usbredir", site, line)
            line.json("device", {**_common(machine, device, "usb-redir"), "chardev": f"char-{device.alias}"})


# Disks


_CACHES = {
    "writeback": {"direct": False, "no-flush": False},
    "none": {"direct": True, "no-flush": False},
    "writethrough": {"direct": False, "no-flush": False},
    "directsync": {"direct": True, "no-flush": False},
    "unsafe": {"direct": False, "no-flush": True},
}


def node_name(disk: Disk) -> str:
    """Name of the block node that a disk's device uses; that of the storage below it has ``-file`` behind it."""
    return f"node-{disk.target}"


def disk_nodes(disk: Disk) -> list[dict[str, Any]]:
    """Block nodes of a disk, the lowest first; none of an empty drive."""
    if disk.source is None:
        return []
    name = node_name(disk)
    common: dict[str, Any] = {"read-only": disk.readonly}
    if disk.cache in _CACHES:
        common["cache"] = _CACHES[disk.cache]
    if disk.discard:
        common["discard"] = disk.discard
    storage = {**_storage(disk.source), "node-name": f"{name}-file", **common}
    if disk.io and disk.source.kind != "nbd":
        storage["aio"] = disk.io
    image = {"driver": disk.format, "node-name": name, "file": f"{name}-file", **common}
    if disk.detect_zeroes:
        image["detect-zeroes"] = disk.detect_zeroes
    if not disk.backing and disk.format == "qcow2":
        image["backing"] = None
    return [storage, image]


def _storage(source: Source) -> dict[str, Any]:
    if source.kind == "nbd":
        server: dict[str, Any] = {"type": "unix", "path": source.path}
        if source.host:
            server = {"type": "inet", "host": source.host, "port": str(source.port)}
        return {"driver": "nbd", "server": server, "export": source.export}
    return {"driver": "host_device" if source.kind == "block" else "file", "filename": source.path}


def disk_device(machine: Machine, disk: Disk) -> dict[str, Any]:
    """The device of a disk, as ``device_add`` takes it."""
    place = disk.address
    drive = place if isinstance(place, DriveAddress) else DriveAddress(controller=0)
    match disk.bus:
        case "virtio":
            values = _common(machine, disk, _virtio(disk.model, "blk"))
        case "scsi":
            controller = next(
                c for c in machine.controllers if c.kind == "scsi" and c.index == drive.controller
            )
            values = _common(machine, disk, "scsi-cd" if disk.device == "cdrom" else "scsi-hd")
            values["bus"] = f"{controller.alias}.0"
            if controller.model == "lsilogic":
                values["scsi-id"] = drive.unit
            else:
                values |= {"channel": drive.bus, "scsi-id": drive.target, "lun": drive.unit}
        case "sata":
            controller = next(
                c for c in machine.controllers if c.kind == "sata" and c.index == drive.controller
            )
            stem = "ide" if built_in(controller, machine) else controller.alias
            values = _common(machine, disk, "ide-cd" if disk.device == "cdrom" else "ide-hd")
            values |= {"bus": f"{stem}.{drive.unit}", "unit": 0}
        case "ide":
            values = _common(machine, disk, "ide-cd" if disk.device == "cdrom" else "ide-hd")
            values |= {"bus": f"ide.{drive.bus}", "unit": drive.unit}
        case "usb":
            values = _common(machine, disk, "usb-storage")
        case _:
            values = {**_common(machine, disk, "floppy"), "unit": drive.unit}
    if disk.source is not None:
        values |= {"drive": node_name(disk), "share-rw": disk.shareable}
        values["write-cache"] = "off" if disk.cache in ("writethrough", "directsync") else "on"
    optional = {
        "serial": disk.serial,
        "wwn": int(disk.wwn, 16) if disk.wwn else None,
        "vendor": disk.vendor,
        "product": disk.product,
        "logical_block_size": disk.logical_block_bytes,
        "physical_block_size": disk.physical_block_bytes,
        "rotation_rate": disk.rotation_rate,
        "removable": disk.removable,
        "iothread": f"iothread{disk.iothread}" if disk.iothread else None,
        "num-queues": disk.queues,
        "werror": {"enospace": "enospc"}.get(disk.error_policy, disk.error_policy),
        "rerror": disk.rerror_policy or {"enospace": "report"}.get(disk.error_policy, disk.error_policy),
    }
    return values | {name: value for name, value in optional.items() if value not in (None, "")}


# Network


def network_backend(interface: Interface, taps: Sequence[int], vhosts: Sequence[int]) -> dict[str, Any]:
    """The host's end of an interface, as ``netdev_add`` takes it."""
    values: dict[str, Any] = {"id": f"host-{interface.alias}"}
    if interface.kind == "user":
        values["type"] = "user"
        for family, text in interface.networks:
            if family == "ipv4":
                values["net"] = text
            else:
                address, _, prefix = text.partition("/")
                values |= {"ipv6-prefix": address, "ipv6-prefixlen": int(prefix)}
        return values
    values["type"] = "tap"
    values |= {"fds": ":".join(map(str, taps))} if len(taps) > 1 else {"fd": str(taps[0])}
    if vhosts:
        values["vhost"] = True
        values |= {"vhostfds": ":".join(map(str, vhosts))} if len(vhosts) > 1 else {"vhostfd": str(vhosts[0])}
    return values


def network_device(machine: Machine, interface: Interface) -> dict[str, Any]:
    """The guest's end of an interface, as ``device_add`` takes it."""
    values = _common(machine, interface, _virtio(interface.model, "net"))
    values |= {"netdev": f"host-{interface.alias}", "mac": interface.mac}
    optional: dict[str, Any] = {
        "rx_queue_size": interface.rx_queue_size,
        "tx_queue_size": interface.tx_queue_size,
        "host_mtu": interface.mtu,
    }
    if interface.queues is not None and interface.queues > 1:
        optional |= {"mq": True, "vectors": 2 * interface.queues + 2}
    return values | {name: value for name, value in optional.items() if value is not None}


# Ports


def _port(machine: Machine, port: Port, site: Site, line: CommandLine) -> None:
    name = "vdagent" if port.name else ""
    _character(
        port.alias,
        port.character,
        name,
        site,
        line,
        socket=f"channel-{port.name}" if port.name else port.alias,
    )
    values = {**_common(machine, port, port.model), "chardev": f"char-{port.alias}"}
    if port.model in ("isa-serial", "isa-parallel"):
        values["index"] = port.index
    if port.name:
        values["name"] = port.name
    line.json("device", values)


def _character(
    alias: str, character: Character, channel: str, site: Site, line: CommandLine, *, socket: str = ""
) -> None:
    """The host's end of a port.

    :param channel: which of SPICE's channels it is, where it is one.
    :param socket: name of the socket that is made for it, where it has no path.
    """
    kind, values = character.kind, [f"id=char-{alias}"]
    match kind:
        case "unix":
            kind = "socket"
            if character.path:
                values.append(f"path={escape(character.path)}")
            else:
                values.append(f"fd={site.listen(socket)}")
            values.append("server=on,wait=off" if character.listen else "server=off")
        case "tcp":
            kind = "socket"
            values += [f"host={escape(character.host)}", f"port={character.port}"]
            values.append("server=on,wait=off" if character.listen else "server=off")
            if character.telnet:
                values.append("telnet=on")
        case "file":
            values += [f"path={escape(character.path)}", f"append={on_off(character.append)}"]
        case "dev":
            kind = "serial"
            values.append(f"path={escape(character.path)}")
        case "pipe":
            values.append(f"path={escape(character.path)}")
        case "spicevmc":
            values.append(f"name={channel}")
    if character.log:
        values += [f"logfile={escape(character.log)}", f"logappend={on_off(character.log_append)}"]
    line.option("chardev", kind, *values)


# Displays and sound


def _graphics(graphics: Graphics, site: Site, line: CommandLine) -> None:
    extra = [f"{name}={value}" for name, value in graphics.options]
    if graphics.password:
        path = site.secret(f"{graphics.kind}-password", graphics.password)
        line.json("object", {"qom-type": "secret", "id": f"{graphics.kind}-password", "file": path})
        extra.append(f"password-secret={graphics.kind}-password")
    if graphics.kind == "spice":
        port = graphics.port if graphics.port > 0 else site.free_port(graphics.address_text, _SPICE_PORT)
        ticketing = [] if graphics.password else ["disable-ticketing=on"]
        line.option("spice", f"port={port}", f"addr={graphics.address_text}", *ticketing, *extra)
        if graphics.keymap:
            line.option("k", graphics.keymap)
        return
    where = f"unix:{escape(graphics.socket)}" if graphics.socket else "none"
    if graphics.address_text and not graphics.socket:
        host = f"[{graphics.address_text}]" if ":" in graphics.address_text else graphics.address_text
        if graphics.port > 0:
            where = f"{host}:{graphics.port - VNC_PORT}"
        else:
            where = f"{host}:0,to={_VNC_PORTS}"
    if graphics.websocket is not None:
        extra.append(f"websocket={graphics.websocket if graphics.websocket > 0 else 'on'}")
    line.option("vnc", where, *extra)
    if graphics.keymap:
        line.option("k", graphics.keymap)


def _video(machine: Machine, video: Video, line: CommandLine) -> None:
    drivers = {
        "vga": "VGA" if video.primary else "secondary-vga",
        "cirrus": "cirrus-vga",
        "vmvga": "vmware-svga",
        "qxl": "qxl-vga" if video.primary else "qxl",
        "virtio": "virtio-vga" if video.primary else "virtio-gpu-pci",
        "bochs": "bochs-display",
    }
    if video.model == "none":
        return
    values = _common(machine, video, drivers[video.model])
    if video.model == "qxl":
        sizes = {"ram_size": video.ram_kib, "vram_size": video.vram_kib}
        values |= {name: size * 1024 for name, size in sizes.items() if size is not None}
        if video.vram64_kib is not None:
            values["vram64_size_mb"] = video.vram64_kib // 1024
    megabytes = video.vgamem_kib if video.model == "qxl" else video.vram_kib
    if megabytes is not None and video.model in ("vga", "cirrus", "vmvga", "qxl"):
        values["vgamem_mb"] = megabytes // 1024
    if video.model == "bochs" and video.vram_kib is not None:
        values["vgamem"] = video.vram_kib * 1024
    if video.heads is not None and video.model in ("qxl", "virtio"):
        values["max_outputs"] = video.heads
    if video.width is not None and video.model in ("vga", "qxl", "virtio", "bochs"):
        values |= {"xres": video.width, "yres": video.height}
    line.json("device", values)


def _sound(machine: Machine, sound: Sound, line: CommandLine) -> None:
    audio = next((a for a in machine.audios if a.index == sound.audio), None)
    if audio is None and machine.audios:
        audio = machine.audios[0]
    kind = audio.kind if audio is not None else ""
    if not kind:
        kind = "spice" if any(g.kind == "spice" for g in machine.graphics) else "none"
    name = f"audio-{sound.alias}"
    driver = {"file": "wav"}.get(kind, kind)
    line.option(
        "audiodev", driver, f"id={name}", *([f"path={escape(audio.path)}"] if audio and audio.path else [])
    )
    drivers = {
        "ich6": "intel-hda",
        "ich9": "ich9-intel-hda",
        "ac97": "AC97",
        "es1370": "ES1370",
        "sb16": "sb16",
    }
    values = _common(machine, sound, drivers[sound.model])
    if sound.model not in ("ich6", "ich9"):
        line.json("device", {**values, "audiodev": name})
        return
    line.json("device", values)
    for number, codec in enumerate(sound.codecs or ("duplex",)):
        line.json(
            "device",
            {
                "driver": f"hda-{codec}",
                "id": f"{sound.alias}-codec{number}",
                "bus": f"{sound.alias}.0",
                "cad": number,
                "audiodev": name,
            },
        )


# The rest


def _random(machine: Machine, random: Random, line: CommandLine) -> None:
    backend: dict[str, Any] = {"qom-type": f"rng-{random.backend}", "id": f"obj-{random.alias}"}
    if random.path:
        backend["filename"] = random.path
    line.json("object", backend)
    values = {**_common(machine, random, _virtio(random.model, "rng")), "rng": f"obj-{random.alias}"}
    if random.rate_bytes is not None:
        values |= {"max-bytes": random.rate_bytes, "period": random.period_ms or 1000}
    line.json("device", values)


def _input(machine: Machine, device: Input, line: CommandLine) -> None:
    names = {"keyboard": "kbd"} if device.bus == "usb" else {}
    kind = names.get(device.kind, device.kind)
    match device.bus:
        case "usb":
            line.json("device", _common(machine, device, f"usb-{kind}"))
        case "virtio":
            line.json("device", _common(machine, device, f"virtio-{kind}-pci"))
        # The keyboard and mouse of PS/2 are every machine's.


# Small things


def escape(text: str) -> str:
    """A value in QEMU's comma-separated options: a comma is doubled."""
    return text.replace(",", ",,")


def on_off(value: bool) -> str:  # noqa: FBT001 - a switch's value
    """A switch as QEMU writes it."""
    return "on" if value else "off"


def _maybe(value: bool | None) -> str:  # noqa: FBT001
    return "" if value is None else on_off(value)


def boot_paths(machine: Machine) -> tuple[str, ...]:
    """Files that are read when the machine is built, on either host."""
    boot, firmware = machine.boot, machine.firmware
    paths = (boot.kernel, boot.initrd, firmware.loader, firmware.template)
    return tuple(path for path in paths if path)
