"""Fixes what a definition leaves open, so that every start on any host builds the same machine.

The pinned definition names machine type, CPU model, memory, controllers, and for every device its alias and address; it
is what a running domain has, what travels, and what the destination builds from.  Pinning twice changes nothing.

Where devices go
================
*pc* (i440fx): one PCI bus.  Slot 1 is the chipset's, slot 2 the display's; the others follow in order, and the last one
becomes a bridge's, which has 31 more.

*q35*: what speaks PCI Express (virtio, e1000e, xhci) gets a root port of its own, so that it can be unplugged; root
ports share slots from 2 on by their functions.  Conventional PCI devices stand on the root bus itself, as QEMU advises
(docs/pcie.txt), and so do the transitional models of virtio, whose ports are conventional.  Slot 1 is the display's,
0x1b and 0x1d are where the ICH9 has sound and USB, 0x1f is the chipset's.

Source: libvirt's conventions, so that definitions which were pinned there keep their places.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ferryman.definition import definition_error, from_root
from ferryman_qemu.machine.model import (
    Balloon,
    Controller,
    Device,
    Disk,
    DriveAddress,
    Input,
    Interface,
    Machine,
    Panic,
    PCIAddress,
    Port,
    PortAddress,
    Random,
    Redirection,
    Sound,
    USBAddress,
    Video,
    Vsock,
    Watchdog,
)
from ferryman_qemu.machine.read import read_definition

if TYPE_CHECKING:
    from collections.abc import Iterable

_SPARE_ROOT_PORTS = 4
"""Root ports that wait for devices to come, where the definition names none."""

_XHCI_PORTS = 15
_SATA_UNITS = 6
_ICH9_USB_SLOT = 0x1D
_LUNS = 256
_MOST_QUEUES = 1024
_NARROW_UNITS = 7
_SERIAL_PORT_COUNT = 31
_USB_PORTS = {"piix3-uhci": 2, "piix4-uhci": 2, "ehci": 6, "ich9-ehci1": 6, "nec-xhci": 15, "qemu-xhci": 15}
_COMPANIONS = {"ich9-uhci1": (0, 0), "ich9-uhci2": (1, 2), "ich9-uhci3": (2, 4)}
"""Function and first port of the companions of ``ich9-ehci1``, which is function 7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenFirmware:
    """Firmware in two flash chips.

    :param secure: it runs partly in system management mode, which the machine must have then.
    """

    code: str
    template: str
    secure: bool


class Chooser(Protocol):
    """What pinning asks about the host."""

    def machine_type(self, machine: Machine) -> str:
        """The versioned machine type. :raises DefinitionError: it is not known here."""

    def cpu(self, machine: Machine, machine_type: str) -> tuple[str, tuple[tuple[str, bool], ...]]:
        """The CPU model, and features beyond it. :raises DefinitionError: it is not known here."""

    def memory(self, machine: Machine, memory_bytes: int) -> int:
        """Memory with which the guest can be migrated, at least what was asked for."""

    def firmware(self, machine: Machine, machine_type: str) -> ChosenFirmware:
        """UEFI firmware. :raises DefinitionError: there is none of that kind."""


def pin(machine: Machine, chooser: Chooser) -> Machine:
    """Fix everything that is open.

    :raises DefinitionError: something is unknown here, or two devices are at one place.
    """
    root: Any = copy.deepcopy(machine.definition.root)
    machine_type = chooser.machine_type(machine)
    kind = root.find("os/type")
    kind.set("machine", machine_type)
    kind.set("arch", "x86_64")
    _pin_memory(root, machine, chooser)
    _pin_cpu(root, machine, *chooser.cpu(machine, machine_type))
    if machine.firmware.automatic and not machine.firmware.loader:
        _pin_firmware(root, chooser.firmware(machine, machine_type))
    _complete(root)
    for step in (_pin_controllers, _pin_places, _pin_aliases, _pin_queues):
        step(root, read_definition(from_root(root)))
    return read_definition(from_root(root))


def _pin_memory(root: Any, machine: Machine, chooser: Chooser) -> None:
    if machine.memory.hugepage_bytes is not None:
        return  # it comes in whole pages, and a little more would be a page that is not there
    if machine.cells:
        sizes = [chooser.memory(machine, cell.memory_bytes) for cell in machine.cells]
        for element, size in zip(root.findall("cpu/numa/cell"), sizes, strict=True):
            element.set("memory", str(size // 1024))
            element.set("unit", "KiB")
        total = sum(sizes)
    else:
        total = chooser.memory(machine, machine.max_memory_bytes)
    current = machine.current_memory_bytes
    if current == machine.max_memory_bytes:
        current = total
    for tag, amount in (("memory", total), ("currentMemory", current)):
        element = root.find(tag)
        if element is not None:
            element.text = str(amount // 1024)
            element.set("unit", "KiB")


def _pin_cpu(root: Any, machine: Machine, model: str, features: Iterable[tuple[str, bool]]) -> None:
    element = root.find("cpu")
    if element is None:
        element = _child(root, "cpu")
    if model in ("max", "host"):
        if "mode" not in element.attrib:
            # The names that QEMU gives its most are models too.
            element.set("mode", "custom" if machine.cpu.model else "maximum")
        return
    for name in ("match", "check", "mode"):
        element.attrib.pop(name, None)
    element.set("mode", "custom")
    element.set("match", "exact")
    element.set("check", machine.cpu.check or "none")
    named = element.find("model")
    if named is None:
        named = element.makeelement("model")
        element.insert(0, named)
    named.text = model
    known = {name for name, _ in machine.cpu.features}
    for name, has in features:
        if name not in known:
            _child(element, "feature", policy="require" if has else "disable", name=name)


def _pin_firmware(root: Any, chosen: ChosenFirmware) -> None:
    os = root.find("os")
    loader = os.find("loader")
    if loader is None:
        loader = _child(os, "loader")
    loader.set("readonly", "yes")
    loader.set("type", "pflash")
    loader.text = chosen.code
    if chosen.secure:
        loader.set("secure", "yes")
        features = root.find("features")
        if features is None:
            features = _child(root, "features")
        if features.find("smm") is None:
            _child(features, "smm", state="on")
    nvram = os.find("nvram")
    if nvram is None:
        nvram = _child(os, "nvram")
    if "template" not in nvram.attrib:
        nvram.set("template", chosen.template)


# What a definition implies


def _complete(root: Any) -> None:
    devices = root.find("devices")
    if devices is None:
        devices = _child(root, "devices")
    if devices.find("memballoon") is None:
        _child(devices, "memballoon", model="virtio")
    if devices.find("graphics") is not None and devices.find("video") is None:
        _child(_child(devices, "video"), "model", type="vga")
    for interface in devices.findall("interface"):
        mac = interface.find("mac")
        if mac is None:
            address = "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
            mac = interface.makeelement("mac", address=address)
            interface.insert(0, mac)
    if devices.find("serial") is None and devices.find("console") is not None:
        _split_console(devices)


def _split_console(devices: Any) -> None:
    """Write the serial port that a lone console stands for, as libvirt does."""
    console = devices.find("console")
    target = console.find("target")
    if target is not None and target.get("type", "serial") != "serial":
        return
    serial = copy.deepcopy(console)
    serial.tag = "serial"
    serial.attrib.pop("tty", None)
    if (found := serial.find("target")) is not None:
        serial.remove(found)
    _child(serial, "target", type="isa-serial", port="0")
    console.addprevious(serial)


def _pin_controllers(root: Any, machine: Machine) -> None:
    """Number the controllers, and add those that devices need."""
    devices = root.find("devices")
    found = list(machine.controllers)
    for controller in found:
        if controller.index < 0:
            index = _free_index(controller, found)
            controller.element.set("index", str(index))
            found[found.index(controller)] = replace(controller, index=index)

    def add(kind: str, model: str = "", index: int | None = None, **attributes: str) -> None:
        if index is None:
            index = 1 + max((c.index for c in found if c.kind == kind), default=-1)
        values = {"type": kind, "index": str(index), **({"model": model} if model else {}), **attributes}
        element = _child(devices, "controller", **values)
        found.append(Controller(kind=kind, index=index, model=model, element=element))

    def ensure(kind: str, count: int, model: str = "") -> None:
        while sum(c.kind == kind for c in found) < count:
            add(kind, model)

    wanted = "pcie-root" if machine.q35 else "pci-root"
    for controller in found:
        master = controller.kind, controller.index, "ich9-ehci1"
        if controller.model in _COMPANIONS and master not in ((c.kind, c.index, c.model) for c in found):
            raise definition_error(
                controller.element, "a companion needs the controller ich9-ehci1 of the same index"
            )
        if controller.kind == "pci" and controller.index == 0 and controller.model != wanted:
            raise definition_error(
                controller.element,
                f"the PCI root of machine type {machine.machine} is {wanted}, not {controller.model}",
            )
        express = controller.model in ("pcie-root-port", "pcie-to-pci-bridge")
        if controller.kind == "pci" and express and not machine.q35:
            raise definition_error(
                controller.element, f"machine type {machine.machine} has no PCI Express: use pci-bridge"
            )
        if controller.kind == "ide" and machine.q35:
            raise definition_error(controller.element, "the machine type q35 has no IDE: use sata")
    if not any(c.kind == "pci" and c.index == 0 for c in found):
        element = devices.makeelement("controller", type="pci", index="0", model=wanted)
        found.append(Controller(kind="pci", index=0, model=wanted, element=element))
        devices.insert(0, element)
    for bus, model in (("scsi", "virtio-scsi"), ("sata", "")):
        places = [d.address for d in machine.disks if d.bus == bus]
        named = {place.controller for place in places if isinstance(place, DriveAddress)}
        for index in sorted(named - {c.index for c in found if c.kind == bus}):
            add(bus, model, index)
    counts = Counter(disk.bus for disk in machine.disks)
    if counts["scsi"]:
        ensure("scsi", 1, "virtio-scsi")
    ensure("sata", -(-counts["sata"] // _SATA_UNITS))
    if counts["fdc"] and machine.q35:
        ensure("fdc", 1)
    if any(port.model in ("virtconsole", "virtserialport") for port in machine.ports):
        ensure("virtio-serial", 1)
    if any(_needs_usb(device) for device in machine.devices) and not _usb_hosts(found):
        for controller in found:
            if controller.kind == "usb":  # model none
                raise definition_error(
                    controller.element,
                    "a device needs USB, and the controller's model none says that there is none",
                )
        add("usb", "qemu-xhci", ports=str(_XHCI_PORTS))
    for controller in found:
        if controller.kind == "usb":
            _pin_usb(controller, machine)


def _pin_usb(controller: Controller, machine: Machine) -> None:
    element = controller.element
    if not controller.model:
        element.set("model", "qemu-xhci" if machine.q35 else "piix3-uhci")
    if element.get("model") in ("qemu-xhci", "nec-xhci") and "ports" not in element.attrib:
        element.set("ports", str(_XHCI_PORTS))
    if element.get("model") in _COMPANIONS and element.find("master") is None:
        _child(element, "master", startport=str(_COMPANIONS[element.get("model")][1]))


def _free_index(controller: Controller, found: list[Controller]) -> int:
    if controller.kind == "pci" and controller.model in ("pci-root", "pcie-root"):
        return 0
    same = [c for c in found if c.kind == controller.kind and c.index >= 0]
    if controller.model in _COMPANIONS:
        masters = [c.index for c in same if c.model == "ich9-ehci1"]
        if masters:
            return masters[-1]
    taken = {c.index for c in same}
    # Bus 0 of PCI is the root's, which need not be written down.
    index = 1 if controller.kind == "pci" else 0
    while index in taken:
        index += 1
    return index


def _needs_usb(device: Device) -> bool:
    return (isinstance(device, Disk | Input) and device.bus == "usb") or isinstance(device, Redirection)


def _usb_hosts(controllers: Iterable[Controller]) -> list[Controller]:
    return [c for c in controllers if c.kind == "usb" and c.model != "none" and c.model not in _COMPANIONS]


# Places


@dataclass(eq=False, slots=True)
class _Bus:
    """One PCI bus, and who is where on it."""

    index: int
    model: str
    taken: dict[tuple[int, int], str] = field(default_factory=dict)

    reserved: frozenset[int] = frozenset()

    @property
    def slots(self) -> range:
        """Slots that a device may have."""
        return range(1) if self.model == "pcie-root-port" else range(1, 32)

    def whole_slot_free(self, slot: int) -> bool:
        return not any(s == slot for s, _ in self.taken)

    def free_slots(self) -> list[int]:
        """Slots that a device may be given, in their order."""
        return [s for s in self.slots if s not in self.reserved and self.whole_slot_free(s)]


_ROOT_PORTS_SLOT = 0x2
_RESERVED_PC = frozenset((0x1, 0x2))
"""The chipset's and the display's."""

_RESERVED_Q35 = frozenset((0x1, 0x2, 0x1B, 0x1D, 0x1F))
"""The display's, the first root ports', and those where the ICH9 has sound, USB and itself."""


class _PCI:
    """Gives every device a place on PCI."""

    def __init__(self, root: Any, machine: Machine) -> None:
        self.devices = root.find("devices")
        self.machine = machine
        self.buses = {
            c.index: _Bus(index=c.index, model=c.model) for c in machine.controllers if c.kind == "pci"
        }
        self.top = self.buses[0]
        self.top.reserved = _RESERVED_Q35 if machine.q35 else _RESERVED_PC
        chipset = [(0x1F, f) for f in range(8)] if machine.q35 else [(1, 0), (1, 1), (1, 3)]
        for place in ((0, 0), *chipset):
            self.top.taken[place] = "the chipset"
        self.shared: set[int] = set()
        """Slots of the root bus whose function 0 says that there are more."""
        self.had_root_ports = any(bus.model == "pcie-root-port" for bus in self.buses.values())

    def claim(self, device: Device, address: PCIAddress) -> None:
        """Take a place that the definition names."""
        bus = self.buses.get(address.bus)
        if bus is None:
            raise definition_error(device.element, f"there is no PCI bus {address.bus}: add a controller")
        place = (address.slot, address.function)
        builtin = isinstance(device, Controller) and built_in(device, self.machine)
        if address.slot not in bus.slots and not builtin:
            raise definition_error(device.element, f"PCI bus {address.bus} has no slot {address.slot:#x}")
        if place in bus.taken and not builtin:
            raise definition_error(
                device.element,
                f"the PCI address {address.bus:02x}:{address.slot:02x}.{address.function} belongs to"
                f" {bus.taken[place]}",
            )
        bus.taken[place] = _said(device)
        if bus is self.top and address.multifunction and address.function == 0:
            self.shared.add(address.slot)

    def put(self, device: Device, address: PCIAddress) -> None:
        """Give a device a place."""
        self.claim(device, address)
        values = {
            "type": "pci",
            "domain": "0x0000",
            "bus": f"{address.bus:#04x}",
            "slot": f"{address.slot:#04x}",
            "function": f"{address.function:#x}",
        }
        if address.multifunction:
            values["multifunction"] = "on"
        _child(device.element, "address", **values)

    def conventional(self, device: Device, *, fixed: int | None = None) -> None:
        """Put a conventional device on the root bus, at a slot of its own if that is free."""
        if fixed is not None and self.top.whole_slot_free(fixed):
            self.put(device, PCIAddress(bus=0, slot=fixed))
            return
        self.put(device, self.free_place(device))

    def free_place(self, device: Device) -> PCIAddress:
        """The first free slot for a conventional device; the last one of all becomes a bridge's."""
        slots = [
            PCIAddress(bus=bus.index, slot=slot)
            for bus in self.buses.values()
            if bus.model != "pcie-root-port"
            for slot in bus.free_slots()
        ]
        if not slots:
            model = "pcie-to-pci-bridge" if self.machine.q35 else "pci-bridge"
            raise definition_error(device.element, f"the PCI bus is full: add a controller of model {model}")
        if len(slots) > 1:
            return slots[0]
        bridge = self.add("pcie-to-pci-bridge" if self.machine.q35 else "pci-bridge", slots[0])
        return PCIAddress(bus=bridge.index, slot=bridge.slots[0])

    def express(self, device: Device) -> None:
        """Put a device behind a root port of its own, or on the one bus of a machine without PCI Express."""
        if not self.machine.q35:
            self.conventional(device)
            return
        bus = next((b for b in self.buses.values() if b.model == "pcie-root-port" and not b.taken), None)
        self.put(device, PCIAddress(bus=(bus or self.add("pcie-root-port")).index, slot=0))

    def add(self, model: str, place: PCIAddress | None = None) -> _Bus:
        """Add a PCI controller, a root port where no place is given."""
        index = 1 + max(self.buses)
        element = self.devices.makeelement("controller", type="pci", index=str(index), model=model)
        last = [c for c in self.devices.findall("controller") if c.get("type") == "pci"][-1]
        last.addnext(element)
        bus = self.buses[index] = _Bus(index=index, model=model)
        controller = Controller(kind="pci", index=index, model=model, element=element)
        if place is not None:
            self.put(controller, place)
        else:
            self.root_port(controller)
        return bus

    def root_port_place(self) -> PCIAddress | None:
        """Where another root port may be on the root bus; eight share a slot."""
        for slot in self.top.slots:
            mine = {f: who for (s, f), who in self.top.taken.items() if s == slot}
            free = next((f for f in range(8) if f not in mine), None)
            if (
                (slot == _ROOT_PORTS_SLOT or slot not in self.top.reserved)
                and all(who.startswith("root port") for who in mine.values())
                and free is not None
                and (free == 0 or slot in self.shared)
            ):
                return PCIAddress(bus=0, slot=slot, function=free, multifunction=free == 0)
        return None

    def root_port(self, controller: Controller) -> None:
        """Put a root port on the root bus."""
        if controller.address is None:
            place = self.root_port_place()
            if place is None:
                raise definition_error(controller.element, "the PCI bus has no room for another root port")
            self.put(controller, place)
        target = controller.element.find("target")
        if target is None:
            target = _child(controller.element, "target")
        address = controller.element.find("address")
        port = int(address.get("slot", "0"), 0) << 3 | int(address.get("function", "0"), 0)
        if "chassis" not in target.attrib:
            target.set("chassis", str(controller.index))
        if "port" not in target.attrib:
            target.set("port", hex(port))


def _said(device: Device) -> str:
    if isinstance(device, Controller) and device.model == "pcie-root-port":
        return f"root port {device.index}"
    return f"<{device.element.tag}> of line {device.element.sourceline or '?'}"


def built_in(controller: Controller, machine: Machine) -> bool:
    """Whether the machine type brings it along."""
    match controller.kind:
        case "pci":
            return controller.model in ("pci-root", "pcie-root")
        case "ide":
            return controller.index == 0
        case "sata":
            return machine.q35 and controller.index == 0
        case "fdc":
            return not machine.q35
    return False


def _pin_places(root: Any, machine: Machine) -> None:
    pci = _PCI(root, machine)
    for device in machine.devices:
        if isinstance(device.address, PCIAddress):
            pci.claim(device, device.address)
    for controller in machine.controllers:
        if controller.kind == "pci" and controller.model == "pcie-root-port":
            pci.root_port(controller)
    for device in machine.devices:
        if device.address is None:
            _place(device, machine, pci)
    if machine.q35 and not pci.had_root_ports:
        for _ in range(_SPARE_ROOT_PORTS):
            if pci.root_port_place() is not None:
                pci.add("pcie-root-port")
    _check_pci(read_definition(from_root(root)))
    _place_drives(machine)
    _place_usb(root, machine)
    _place_ports(machine)


def _check_pci(machine: Machine) -> None:
    """Refuse buses that hang on none, and devices of which the guest sees nothing."""
    above: dict[int, int] = {}
    places: dict[tuple[int, int], dict[int, Device]] = {}
    for device in machine.devices:
        place = device.address
        if isinstance(place, PCIAddress):
            places.setdefault((place.bus, place.slot), {})[place.function] = device
            if isinstance(device, Controller) and device.kind == "pci":
                above[device.index] = place.bus
    for controller in machine.controllers:
        bus, seen = controller.index, set[int]()
        while controller.kind == "pci" and bus != 0:
            if bus in seen:
                raise definition_error(controller.element, f"PCI bus {controller.index} is behind itself")
            seen.add(bus)
            bus = above[bus]
    for (_, slot), functions in places.items():
        if len(functions) == 1 and 0 in functions:
            continue
        first = functions.get(0)
        if first is None or not (isinstance(first.address, PCIAddress) and first.address.multifunction):
            other = functions[max(functions)]
            if (slot == 1 and not machine.q35) or (slot == 0x1F and machine.q35):
                continue  # the chipset is function 0
            raise definition_error(
                other.element,
                f"PCI slot {slot:#x} has a function {max(functions)}, and needs a function 0 with multifunction='on'",
            )


def _place(device: Device, machine: Machine, pci: _PCI) -> None:
    """Give a device its place on PCI, if it has one there."""
    if getattr(device, "model", "") == "virtio-transitional":
        # It has the ports of conventional PCI.
        if not (isinstance(device, Balloon) and device.address is not None):
            pci.conventional(device)
        return
    match device:
        case Controller():
            _place_controller(device, machine, pci)
        case Disk(bus="virtio"):
            pci.express(device)
        case Interface(model=model):
            if model.startswith("virtio") or model in ("e1000e", "vmxnet3"):
                pci.express(device)
            else:
                pci.conventional(device)
        case Video(model=model, primary=primary):
            if model != "none":
                slot = (0x1 if machine.q35 else 0x2) if primary else None
                pci.conventional(device, fixed=slot)
        case Sound(model=model):
            if model != "sb16":
                pci.conventional(device, fixed=0x1B if model == "ich9" and machine.q35 else None)
        case Input(bus="virtio"):
            pci.express(device)
        case Watchdog(model="i6300esb") | Panic(model="pvpanic") | Port(model="pci-serial"):
            pci.conventional(device)
        case Random() | Balloon() | Vsock():
            pci.express(device)


def _place_controller(controller: Controller, machine: Machine, pci: _PCI) -> None:
    if built_in(controller, machine):
        return
    match (controller.kind, controller.model):
        case ("pci", "pci-bridge" | "pcie-to-pci-bridge"):
            pci.conventional(controller)
        case ("usb", "qemu-xhci" | "nec-xhci"):
            pci.express(controller)
        case ("usb", "piix3-uhci") if not machine.q35 and (1, 2) not in pci.top.taken:
            pci.put(controller, PCIAddress(bus=0, slot=1, function=2))
        case ("usb", "ich9-ehci1" | "ich9-uhci1" | "ich9-uhci2" | "ich9-uhci3"):
            _place_ich9(controller, machine, pci)
        case ("usb", model) if model != "none":
            pci.conventional(controller)
        case ("scsi", "lsilogic") | ("sata", _):
            pci.conventional(controller)
        case ("scsi" | "virtio-serial", _):
            pci.express(controller)


def _place_ich9(controller: Controller, machine: Machine, pci: _PCI) -> None:
    """The ICH9's USB controllers of one index share a slot."""
    together = [c for c in machine.controllers if c.kind == "usb" and c.index == controller.index]
    place: PCIAddress | None = None
    for other in together:
        address = other.element.find("address")
        if address is not None:
            place = PCIAddress(bus=int(address.get("bus", "0"), 0), slot=int(address.get("slot", "0"), 0))
    if place is None:
        usual = machine.q35 and pci.top.whole_slot_free(_ICH9_USB_SLOT)
        place = PCIAddress(bus=0, slot=_ICH9_USB_SLOT) if usual else pci.free_place(controller)
    # One without companions stands alone, and function 0 is the one that a guest looks for.
    alone = not any(c.model == "ich9-uhci1" for c in together)
    function = _COMPANIONS[controller.model][0] if controller.model in _COMPANIONS else 0 if alone else 7
    first = controller.model == "ich9-uhci1" or (alone and len(together) > 1 and function == 0)
    pci.put(controller, replace(place, function=function, multifunction=first))


def _place_drives(machine: Machine) -> None:
    taken: dict[tuple[str, DriveAddress], Disk] = {}
    for disk in machine.disks:
        if isinstance(disk.address, DriveAddress):
            if not _is_room(disk, disk.address, machine):
                raise definition_error(
                    disk.element.find("address"), f"bus {disk.bus} has no such place for {disk.target}"
                )
            other = taken.setdefault((disk.bus, disk.address), disk)
            if other is not disk:
                raise definition_error(
                    disk.element, f"the disks {other.target} and {disk.target} are at the same place"
                )
    for disk in machine.disks:
        if disk.address is not None or disk.bus in ("virtio", "usb"):
            continue
        rooms = _rooms(disk, machine)
        # A disk's letter says its place, where that is free.
        number = _letter(disk.target)
        preferred = [rooms[number]] if number is not None and number < len(rooms) else []
        place = next((room for room in (*preferred, *rooms) if (disk.bus, room) not in taken), None)
        if place is None:
            raise definition_error(
                disk.element,
                f"there is no room for {disk.target} on bus {disk.bus}: add a controller, or use bus virtio",
            )
        taken[disk.bus, place] = disk
        _child(
            disk.element,
            "address",
            type="drive",
            controller=str(place.controller),
            bus=str(place.bus),
            target=str(place.target),
            unit=str(place.unit),
        )


def _is_room(disk: Disk, place: DriveAddress, machine: Machine) -> bool:
    """Whether a bus has a place, those of SCSI included that are given to none by itself."""
    if disk.bus == "scsi":
        wide = any(
            c.kind == "scsi" and c.index == place.controller and c.model != "lsilogic"
            for c in machine.controllers
        )
        return place.bus == 0 and (wide or (place.target == 0 and place.unit < _NARROW_UNITS))
    return place in _rooms(disk, machine)


def _rooms(disk: Disk, machine: Machine) -> list[DriveAddress]:
    """Places on a bus, in their order."""
    match disk.bus:
        case "ide":
            return [DriveAddress(controller=0, bus=b, unit=u) for b in range(2) for u in range(2)]
        case "fdc":
            return [DriveAddress(controller=0, unit=u) for u in range(2)]
        case "sata":
            indexes = sorted(c.index for c in machine.controllers if c.kind == "sata")
            return [DriveAddress(controller=i, unit=u) for i in indexes for u in range(_SATA_UNITS)]
    rooms = []
    for controller in machine.controllers:
        if controller.kind == "scsi":
            units = _NARROW_UNITS if controller.model == "lsilogic" else _LUNS
            rooms += [DriveAddress(controller=controller.index, unit=u) for u in range(units)]
    return rooms


def _letter(target: str) -> int | None:
    """Number of a disk by its letters: hda is 0, sdaa 26."""
    letters = target[2:]
    if not letters or not letters.isascii() or not letters.islower() or len(letters) > 2:
        return None
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _place_usb(root: Any, machine: Machine) -> None:
    hosts = {
        controller.index: controller.ports or _USB_PORTS.get(controller.model, 2)
        for controller in _usb_hosts(machine.controllers)
    }
    taken: set[tuple[int, str]] = set()
    users = [device for device in machine.devices if _needs_usb(device)]
    for device in users:
        if isinstance(device.address, USBAddress):
            place = (device.address.bus, device.address.port)
            port = device.address.port
            known = port.isascii() and port.isdigit() and 1 <= int(port) <= hosts.get(device.address.bus, 0)
            if not known or str(int(port)) != port or place in taken:
                raise definition_error(
                    device.element,
                    f"the USB port {place[0]}:{place[1]} is not there, or another device has it",
                )
            taken.add(place)
    for device in users:
        if device.address is not None:
            continue
        place = next(
            (
                (index, str(port))
                for index, count in hosts.items()
                for port in range(1, count + 1)
                if (index, str(port)) not in taken
            ),
            None,
        ) or (-1, "")
        if place[0] < 0:
            raise definition_error(device.element, "there is no free USB port: add a controller of type usb")
        taken.add(place)
        _child(device.element, "address", type="usb", bus=str(place[0]), port=place[1])


def _place_ports(machine: Machine) -> None:
    users = [port for port in machine.ports if port.model in ("virtconsole", "virtserialport")]
    counts = {
        c.index: c.ports or _SERIAL_PORT_COUNT for c in machine.controllers if c.kind == "virtio-serial"
    }
    taken: set[tuple[int, int]] = set()
    for user in users:
        if isinstance(user.address, PortAddress):
            place = (user.address.controller, user.address.port)
            if user.address.port >= counts.get(user.address.controller, 0) or place in taken:
                raise definition_error(
                    user.element,
                    f"the virtio-serial port {place[0]}:{place[1]} is not there, or another device has it",
                )
            taken.add(place)
    for user in users:
        if user.address is not None:
            continue
        # Port 0 is a console's alone.
        first = 0 if user.model == "virtconsole" else 1
        place = next(
            (
                (index, port)
                for index, count in counts.items()
                for port in range(first, count)
                if (index, port) not in taken
            ),
            (-1, -1),
        )
        if place[0] < 0:
            raise definition_error(user.element, "there is no free virtio-serial port: add a controller")
        taken.add(place)
        _child(
            user.element,
            "address",
            type="virtio-serial",
            controller=str(place[0]),
            bus="0",
            port=str(place[1]),
        )


# Aliases


def _pin_aliases(root: Any, machine: Machine) -> None:
    taken = {device.alias for device in machine.devices if device.alias}
    for controller in machine.controllers:
        # A controller's alias becomes the name of its bus.
        if controller.alias in _BUILT_IN_BUSES and not built_in(controller, machine):
            raise definition_error(controller.element, f"the alias {controller.alias} is the chipset's")
    for device in machine.devices:
        if device.alias or (isinstance(device, Controller) and built_in(device, machine)):
            continue
        stem = _stem(device)
        if not stem:
            continue
        name = stem
        if stem.endswith("#"):
            number = 0
            while f"{stem[:-1]}{number}" in taken:
                number += 1
            name = f"{stem[:-1]}{number}"
        if name in taken:
            raise definition_error(device.element, f"another device has the alias {name}")
        taken.add(name)
        _child(device.element, "alias", name=name)


_BUILT_IN_BUSES = ("pci.0", "pcie.0", "ide", "isa", "i2c", "floppy-bus")
_STEMS = {
    "Interface": "net#",
    "Video": "video#",
    "Sound": "sound#",
    "Random": "rng#",
    "Balloon": "balloon#",
    "Watchdog": "watchdog#",
    "Input": "input#",
    "TPM": "tpm#",
    "Panic": "panic#",
    "Vsock": "vsock#",
    "Redirection": "redir#",
    "Graphics": "",
}


def _stem(device: Device) -> str:
    match device:
        case Disk(target=target):
            return f"disk-{target}"
        case Port(kind=kind):
            return f"{kind}#"
        case Controller(kind="pci", index=index):
            return f"pci.{index}"
        case Controller(kind="usb", index=index, model=model):
            return f"usb{index}-{model.removeprefix('ich9-')}" if model in _COMPANIONS else f"usb{index}"
        case Controller(kind=kind, index=index):
            return f"{kind}{index}"
    return _STEMS[type(device).__name__]


# Queues


_ONE_QUEUE_UNTIL = (5, 1)
"""Machine types up to this version give a virtio disk one queue, whatever processors there are."""


def _pin_queues(_root: Any, machine: Machine) -> None:
    """Write down how many queues virtio disks and controllers have where the number of processors can change.

    QEMU gives them as many as there are processors when they are made, which the guest sees, and which a receiver would
    count anew (QEMU 7.2, hw/virtio/virtio-pci.c, virtio_pci_optimal_num_queues).
    """
    version = re.search(r"-(\d+)\.(\d+)$", machine.machine)
    if machine.max_vcpus == 1:
        return
    old = version is not None and (int(version[1]), int(version[2])) <= _ONE_QUEUE_UNTIL
    disks = [disk for disk in machine.disks if disk.bus == "virtio"]
    controllers = [c for c in machine.controllers if c.kind == "scsi" and c.model.startswith("virtio")]
    found: list[Disk | Controller] = [*disks, *controllers]
    for device in found:
        if device.queues is None:
            driver = device.element.find("driver")
            if driver is None:
                driver = _child(device.element, "driver")
            driver.set("queues", str(1 if old else min(machine.vcpus, _MOST_QUEUES)))


def _child(parent: Any, tag: str, **attributes: str) -> Any:
    child = parent.makeelement(tag, attributes)
    parent.append(child)
    return child
