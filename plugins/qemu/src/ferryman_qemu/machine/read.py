"""Reads a definition into a :class:`~ferryman_qemu.machine.model.Machine`.

The questions that these readers ask are the list of what is understood; anything else in a document is refused by name
and line.  Nothing here looks at the host.

Source: libvirt docs/formatdomain.rst.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ferryman.definition import parse_definition
from ferryman_qemu.machine.ignored import IGNORED
from ferryman_qemu.machine.model import (
    CPU,
    TPM,
    Address,
    Audio,
    Balloon,
    Boot,
    Cell,
    Character,
    Clock,
    Controller,
    Disk,
    DriveAddress,
    Features,
    Firmware,
    Graphics,
    Input,
    Interface,
    ISAAddress,
    Machine,
    Memory,
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
from ferryman_qemu.machine.reading import Node, as_word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman.definition import Definition

QEMU_NAMESPACE = "{http://libvirt.org/schemas/domain/qemu/1.0}"
VNC_PORT = 5900
"""Port of VNC's display 0."""

_SERIAL_PORTS = 4
_PARALLEL_PORTS = 3
_BLOCK_NAME_LENGTH = 21
"""QEMU's names of block nodes have 31 characters, and ours are a disk's target with ten around it."""

_INTERFACE_NAME_BYTES = 15
_HEX_DIGITS = frozenset("0123456789abcdef")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_BUS_OF_TARGET = {"vd": "virtio", "sd": "scsi", "hd": "ide", "fd": "fdc"}
_CACHES = ("default", "none", "writeback", "writethrough", "directsync", "unsafe")
_ON_OFF = ("on", "off")
_VIRTIO_MODELS = ("virtio", "virtio-transitional", "virtio-non-transitional")


def read_machine(text: str) -> Machine:
    """Read a definition.

    :raises DefinitionError: an element, an attribute or a value is not understood: names it and its line.
    """
    return read_definition(parse_definition(text))


@lru_cache(maxsize=256)
def read_pinned(text: str) -> Machine:
    """Read a definition that :func:`~ferryman_qemu.machine.pin.pin` has been over; the last ones are remembered.

    Not for others: one without a uuid would get the same one each time.
    """
    return read_machine(text)


def read_definition(definition: Definition) -> Machine:
    """Read a parsed definition."""
    root = Node(definition.root)
    kind = root.need("type")
    if kind not in ("qemu", "kvm"):
        raise root.error(f"domains of type {kind!r:.40} are not QEMU's: use qemu or kvm")
    for tag in ("name", "uuid"):
        root.need_child(tag).text()
    os = root.child("os")
    if os is None:
        raise root.error("<domain> has no <os>: write <os><type>hvm</type></os>")
    machine_type = _os_type(os)
    devices = root.child("devices") or Node(definition.root.makeelement("devices"))
    vcpus, max_vcpus = _vcpus(root)
    current = root.child("currentMemory")
    memory = root.need_child("memory").amount()
    pm = root.child("pm")
    found = Machine(
        definition=definition,
        accelerated=kind == "kvm",
        machine=machine_type,
        emulator=emulator.text_path() if (emulator := devices.child("emulator")) is not None else "",
        max_memory_bytes=memory,
        current_memory_bytes=memory if current is None else current.amount(),
        vcpus=vcpus,
        max_vcpus=max_vcpus,
        iothreads=iothreads.text_number(0, 256) if (iothreads := root.child("iothreads")) else 0,
        cpu=_cpu(root.child("cpu"), kind == "kvm", max_vcpus),
        cells=_cells(root.child("cpu"), memory, max_vcpus),
        memory=_memory_backing(root.child("memoryBacking")),
        firmware=_firmware(os),
        clock=_clock(root.child("clock")),
        boot=_boot(os),
        features=_features(root.child("features")),
        smbios=_smbios(root.child("sysinfo"), os.child("smbios"), definition.uuid),
        generation_id=_generation_id(root.child("genid")),
        suspend_to_memory=_suspends(pm, "suspend-to-mem"),
        suspend_to_disk=_suspends(pm, "suspend-to-disk"),
        on_poweroff=_action(root, "on_poweroff", "destroy"),
        on_reboot=_action(root, "on_reboot", "restart"),
        on_crash=_action(root, "on_crash", "destroy"),
        controllers=tuple(map(_controller, devices.children("controller"))),
        disks=tuple(_disk(node, machine_type) for node in devices.children("disk")),
        interfaces=tuple(map(_interface, devices.children("interface"))),
        ports=_ports(devices),
        graphics=tuple(map(_graphics, devices.children("graphics"))),
        videos=_videos(devices.children("video")),
        sounds=tuple(map(_sound, devices.children("sound"))),
        audios=tuple(map(_audio, devices.children("audio"))),
        randoms=tuple(map(_random, devices.children("rng"))),
        balloon=_balloon(devices.child("memballoon")),
        watchdogs=tuple(map(_watchdog, devices.children("watchdog"))),
        inputs=tuple(map(_input, devices.children("input"))),
        tpm=_tpm(tpm) if (tpm := devices.child("tpm")) is not None else None,
        panics=tuple(map(_panic, devices.children("panic"))),
        vsock=_vsock(vsock) if (vsock := devices.child("vsock")) is not None else None,
        redirections=tuple(map(_redirection, devices.children("redirdev"))),
        **_commandline(root),
    )
    _refuse_known(root, devices)
    root.finish(IGNORED)
    _check(found, root)
    return found


_KNOWN_REFUSALS = {
    "filesystem": "a file system shared with the host ties the guest to it, and QEMU does not migrate it",
    "hostdev": "a device of the host ties the guest to it, and QEMU does not migrate it",
    "shmem": "memory shared with other programs of the host does not move with the guest",
    "smartcard": "smart cards are not supported",
    "memory": "memory modules are not supported: give the guest all memory in <memory>",
    "iommu": "an IOMMU for the guest is not supported",
    "lease": "leases of lock managers are not supported: the journal and the image locks do that",
    "nvram": "<nvram> belongs into <os>",
    "hub": "USB hubs are not supported: a controller with more ports does the same",
}


_KNOWN_REFUSALS_OF_DOMAIN = {
    "maxMemory": "memory modules are not supported: give the guest all memory in <memory>",
    "launchSecurity": "memory that is encrypted for one host does not move with the guest",
    **dict.fromkeys(
        ("cputune", "numatune", "memtune", "blkiotune"),
        "shares of a host are given to the process by whoever calls, with groups of processes (cgroups)",
    ),
}


def _refuse_known(root: Node, devices: Node) -> None:
    """Say why, of what people often have."""
    for parent, reasons in ((root, _KNOWN_REFUSALS_OF_DOMAIN), (devices, _KNOWN_REFUSALS)):
        for tag, reason in reasons.items():
            for node in parent.children(tag):
                raise node.error(f"<{tag}> is not supported: {reason}")


# The machine


def _os_type(os: Node) -> str:
    node = os.child("type")
    if node is None:
        raise os.error("<os> has no <type>")
    text = node.text()
    if text != "hvm":
        raise node.error(f"an os of type {text!r:.40} is not QEMU's: use hvm")
    arch = node.get("arch") or "x86_64"
    if arch != "x86_64":
        raise node.error(f"the architecture {arch!r:.40} is not supported: use x86_64")
    return as_word(node, node.get("machine") or "pc", "machine type")


def _vcpus(root: Node) -> tuple[int, int]:
    node = root.child("vcpu")
    if node is None:
        return 1, 1
    node.choice("placement", ("static",), "static")
    most = node.text_number(1, 4096)
    return node.number("current", 1, most, most), most


def _boot(os: Node) -> Boot:
    menu = os.child("bootmenu")
    bios = os.child("bios")
    kernel, initrd, cmdline = (os.child(tag) for tag in ("kernel", "initrd", "cmdline"))
    if kernel is None and (initrd is not None or cmdline is not None):
        raise os.error("<initrd> and <cmdline> need a <kernel>")
    return Boot(
        devices=tuple(node.choice("dev", ("hd", "cdrom", "network", "fd")) for node in os.children("boot")),
        menu=menu.switch("enable") if menu is not None else None,
        menu_timeout_ms=menu.maybe_number("timeout", 0, 65_535) if menu is not None else None,
        serial=bios.switch("useserial", default=False) if bios is not None else False,
        reboot_timeout_ms=_reboot_timeout(bios) if bios is not None else None,
        kernel=kernel.text_path() if kernel is not None else "",
        initrd=initrd.text_path() if initrd is not None else "",
        cmdline=cmdline.text() if cmdline is not None else "",
    )


def _reboot_timeout(bios: Node) -> int | None:
    return None if bios.get("rebootTimeout") == "-1" else bios.maybe_number("rebootTimeout", 0, 65_535)


def _firmware(os: Node) -> Firmware:
    automatic = os.get("firmware")
    if automatic not in (None, "efi", "bios"):
        raise os.error(f"the firmware {automatic!r:.40} is not supported: use efi or bios")
    loader, nvram, wanted = os.child("loader"), os.child("nvram"), os.child("firmware")
    values: dict[str, Any] = {"automatic": automatic == "efi"}
    if loader is not None:
        values["flash"] = loader.choice("type", ("pflash", "rom"), "rom") == "pflash"
        values["readonly"] = loader.switch("readonly", default=True)
        values["secure"] = loader.maybe_switch("secure")
        loader.choice("format", ("raw",), "raw")
        text = loader.text()
        if text:
            values["loader"] = loader.text_path()
        elif automatic is None:
            raise loader.error("<loader> names no file: write its path, or <os firmware='efi'>")
    if nvram is not None:
        nvram.choice("type", ("file",), "file")
        nvram.choice("format", ("raw",), "raw")
        nvram.choice("templateFormat", ("raw",), "raw")
        values["template"] = nvram.path("template") if nvram.get("template") is not None else ""
        values["nvram"] = nvram.text_path() if nvram.text() else ""
        if not (values["automatic"] or values.get("flash")):
            raise nvram.error("<nvram> needs a <loader type='pflash'>, or <os firmware='efi'>")
    if wanted is not None:
        if automatic != "efi":
            raise wanted.error("<firmware> needs <os firmware='efi'>")
        values["wanted"] = tuple(
            (feature.choice("name", ("secure-boot", "enrolled-keys")), feature.switch("enabled"))
            for feature in wanted.children("feature")
        )
    return Firmware(**values)


def _cpu(node: Node | None, accelerated: bool, max_vcpus: int) -> CPU:  # noqa: FBT001
    if node is None:
        return CPU()
    values: dict[str, Any] = {}
    mode = node.choice("mode", ("custom", "host-model", "host-passthrough", "maximum"), "custom")
    node.choice("match", ("exact",), "exact")
    check = node.choice("check", ("none", "partial", "full"), "none")
    values["check"] = check
    values["enforce"] = check == "full"
    values["migratable"] = node.switch("migratable", default=True)
    if mode != "host-passthrough" and not values["migratable"]:
        raise node.error("migratable='off' is for host-passthrough: remove it")
    model = node.child("model")
    if model is not None:
        # What older programs write beside host-model; a model that this host lacks is an error in every mode.
        model.choice("fallback", ("allow", "forbid"), "forbid")
        if mode == "custom":
            values["model"] = model.text_word("CPU model")
        elif mode != "host-model" or model.text():
            raise model.error(f"the CPU mode {mode} has no <model>: remove it, or use mode custom")
    elif mode == "host-passthrough":
        # What QEMU without KVM can do stands for the host.
        values["model"] = "host" if accelerated else "max"
    elif mode == "maximum":
        values["model"] = "max"
    values["host_model"] = mode == "host-model"
    values["features"] = _cpu_features(node, mode)
    topology = node.child("topology")
    if topology is not None:
        sockets = topology.number("sockets", 1, 4096)
        values["dies"] = topology.number("dies", 1, 4096, 1)
        topology.number("clusters", 1, 1, 1)
        values["cores"] = topology.number("cores", 1, 4096)
        values["threads"] = topology.number("threads", 1, 4096)
        values["sockets"] = sockets
        product = sockets * values["dies"] * values["cores"] * values["threads"]
        if product != max_vcpus:
            raise topology.error(f"the topology has {product} processors, and <vcpu> says {max_vcpus}")
    cache = node.child("cache")
    if cache is not None:
        values["cache"] = cache.choice("mode", ("passthrough", "emulate", "disable"))
        if values["cache"] == "emulate":
            cache.number("level", 3, 3)
    bits = node.child("maxphysaddr")
    if bits is not None:
        bits.choice("mode", ("emulate",))
        values["address_bits"] = bits.number("bits", 32, 52)
    return CPU(**values)


def _cpu_features(node: Node, mode: str) -> tuple[tuple[str, bool], ...]:
    found: dict[str, bool] = {}
    for feature in node.children("feature"):
        name = feature.word("name", "CPU feature")
        if name in found:
            raise feature.error(f"the CPU feature {name} stands twice")
        policy = feature.choice("policy", ("require", "force", "optional", "disable", "forbid"), "require")
        if policy == "optional":
            raise feature.error("an optional CPU feature could differ between hosts: use require or disable")
        found[name] = policy in ("require", "force")
    if found and mode == "custom" and node.child("model") is None:
        raise node.error("CPU features in mode custom need a <model>")
    return tuple(found.items())


def _cells(cpu: Node | None, memory_bytes: int, max_vcpus: int) -> tuple[Cell, ...]:
    numa = cpu.child("numa") if cpu is not None else None
    if numa is None:
        return ()
    cells = []
    for number, node in enumerate(numa.children("cell")):
        if node.number("id", 0, 127, number) != number:
            raise node.error("NUMA cells are numbered in their order, from 0")
        cells.append(
            Cell(
                index=number,
                cpus=_ranges(node, node.need("cpus"), max_vcpus),
                memory_bytes=node.amount_of("memory"),
            )
        )
    total = sum(cell.memory_bytes for cell in cells)
    if total != memory_bytes:
        raise numa.error(f"the NUMA cells have {total} bytes of memory, and <memory> says {memory_bytes}")
    placed = [cpu for cell in cells for low, high in cell.cpus for cpu in range(low, high + 1)]
    if sorted(placed) != list(range(max_vcpus)):
        raise numa.error(f"the NUMA cells must hold each of the {max_vcpus} processors once")
    return tuple(cells)


def _ranges(node: Node, text: str, limit: int) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        ends = (low, high if dash else low)
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
            raise node.error(f"{text!r:.60} is not a list of processors such as 0-3,6")
        first, last = map(int, ends)
        if not first <= last < limit:
            raise node.error(f"{text!r:.60} names processors beyond 0 to {limit - 1}")
        found.append((first, last))
    return tuple(found)


def _memory_backing(node: Node | None) -> Memory:
    if node is None:
        return Memory()
    values: dict[str, Any] = {}
    huge = node.child("hugepages")
    if huge is not None:
        pages = huge.children("page")
        if len(pages) > 1:
            raise pages[1].error("one size of huge pages serves the whole guest: remove the second <page>")
        values["hugepage_bytes"] = pages[0].amount_of("size") if pages else 0
    values["locked"] = node.flag("locked")
    values["merge"] = not node.flag("nosharepages")
    source = node.child("source")
    if source is not None:
        values["source"] = source.choice("type", ("anonymous", "memfd"))
    access = node.child("access")
    if access is not None:
        values["shared"] = access.choice("mode", ("shared", "private")) == "shared"
    allocation = node.child("allocation")
    if allocation is not None:
        values["preallocate"] = (
            allocation.choice("mode", ("immediate", "ondemand"), "ondemand") == "immediate"
        )
    return Memory(**values)


def _clock(node: Node | None) -> Clock:
    if node is None:
        return Clock()
    offset = node.choice("offset", ("utc", "localtime", "variable"), "utc")
    values: dict[str, Any] = {"base": "utc" if offset == "variable" else offset}
    if offset == "variable":
        values["base"] = node.choice("basis", ("utc", "localtime"), "utc")
        text = node.get("adjustment") or "0"
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
        if not (digits.isascii() and digits.isdigit() and len(digits) < 11):
            raise node.error(f"adjustment={text!r:.40} of <clock> is not a number of seconds")
        values["adjustment_s"] = sign * int(digits)
    seen = set()
    for timer in node.children("timer"):
        name = timer.choice("name", ("rtc", "pit", "hpet", "kvmclock", "hypervclock", "tsc"))
        if name in seen:
            raise timer.error(f"the timer {name} stands twice")
        seen.add(name)
        _timer(timer, name, values)
    return Clock(**values)


def _timer(timer: Node, name: str, values: dict[str, Any]) -> None:
    present = timer.maybe_switch("present")
    if name == "rtc":
        timer.choice("track", ("guest",), "guest")
        values["rtc_catchup"] = timer.choice("tickpolicy", ("delay", "catchup"), "delay") == "catchup"
    elif name == "pit":
        values["pit_delay"] = timer.choice("tickpolicy", ("delay", "discard"), "delay") == "delay"
    elif name == "tsc":
        values["tsc_hz"] = timer.maybe_number("frequency", 1, 1 << 40)
    else:
        values[name] = True if present is None else present
    if name in ("rtc", "pit", "tsc") and present is False:
        raise timer.error(f"the timer {name} is part of every machine: remove present='no'")


def _features(node: Node | None) -> Features:
    if node is None:
        return Features()
    kvm = node.child("kvm")
    hidden = kvm.child("hidden") if kvm is not None else None
    return Features(
        acpi=node.flag("acpi"),
        smm=_state(node.child("smm")),
        vmport=_state(node.child("vmport")),
        pmu=_state(node.child("pmu")),
        vmcoreinfo=bool(_state(node.child("vmcoreinfo"), default=True)),
        kvm_hidden=bool(_state(hidden)),
        hyperv=_hyperv(node.child("hyperv")),
    )


def _state(node: Node | None, *, default: bool | None = None) -> bool | None:
    return None if node is None else node.switch("state", default=default)


_HYPERV = (
    "relaxed",
    "vapic",
    "spinlocks",
    "vpindex",
    "runtime",
    "synic",
    "stimer",
    "reset",
    "vendor_id",
    "frequencies",
    "reenlightenment",
    "tlbflush",
    "ipi",
    "evmcs",
    "avic",
)


def _hyperv(node: Node | None) -> tuple[tuple[str, str], ...]:
    if node is None:
        return ()
    mode = node.choice("mode", ("custom", "passthrough"), "custom")
    if mode == "passthrough":
        return (("hv-passthrough", "on"),)
    found: list[tuple[str, str]] = []
    for name in _HYPERV:
        child = node.child(name)
        if child is None:
            continue
        on = child.switch("state")
        direct = child.child("direct")
        spins = child.maybe_number("retries", 4095, 0xFFFFFFFF) if name == "spinlocks" else None
        vendor = child.word("value", "vendor id") if name == "vendor_id" and on else ""
        if not on:
            continue
        value = {"spinlocks": hex(8191 if spins is None else spins), "vendor_id": vendor}.get(name, "on")
        found.append((f"hv-{name.replace('_', '-')}", value))
        if direct is not None and direct.switch("state"):
            found.append(("hv-stimer-direct", "on"))
    return tuple(found)


_SMBIOS = {
    "bios": (0, ("vendor", "version", "date", "release")),
    "system": (1, ("manufacturer", "product", "version", "serial", "uuid", "sku", "family")),
    "baseBoard": (2, ("manufacturer", "product", "version", "serial", "asset", "location")),
    "chassis": (3, ("manufacturer", "version", "serial", "asset", "sku")),
}
"""Elements of ``<sysinfo>``: number of the table, and its entries, which QEMU calls the same."""


def _smbios(
    info: Node | None, mode: Node | None, uuid: str
) -> tuple[tuple[int, tuple[tuple[str, str], ...]], ...]:
    wanted = mode.choice("mode", ("emulate", "sysinfo")) if mode is not None else "emulate"
    if info is None:
        if wanted == "sysinfo" and mode is not None:
            raise mode.error("mode='sysinfo' of <smbios> needs a <sysinfo>")
        return ()
    info.choice("type", ("smbios",))
    found = []
    for tag, (number, names) in _SMBIOS.items():
        table = info.child(tag)
        if table is None:
            continue
        values = []
        for entry in table.children("entry"):
            name = entry.choice("name", names)
            if name == "uuid" and entry.text().lower() != uuid:
                raise entry.error("the uuid of <sysinfo> is the domain's: make them equal, or remove it")
            values.append((name, entry.text()))
        found.append((number, tuple(values)))
    strings = info.child("oemStrings")
    if strings is not None:
        found.append((11, tuple(("value", entry.text()) for entry in strings.children("entry"))))
    return tuple(found) if wanted == "sysinfo" else ()


def _generation_id(node: Node | None) -> str:
    if node is None:
        return ""
    text = node.text()
    if not text:
        raise node.error("<genid> holds no uuid: write the one that the guest is to have")
    if not _UUID.fullmatch(text):
        raise node.error(f"{text!r:.60} is not a uuid")
    return text.lower()


def _suspends(pm: Node | None, tag: str) -> bool | None:
    node = pm.child(tag) if pm is not None else None
    return node.maybe_switch("enabled") if node is not None else None


def _action(root: Node, tag: str, default: str) -> str:
    node = root.child(tag)
    if node is None:
        return default
    text = node.text()
    # QEMU has no way to stand still at a reset.
    values = ("destroy", "restart", "preserve") if tag != "on_reboot" else ("destroy", "restart")
    if text not in values:
        raise node.error(f"<{tag}> is {text!r:.40}, but only {' or '.join(values)} is supported")
    return text


def _commandline(root: Node) -> dict[str, Any]:
    node = root.child(f"{QEMU_NAMESPACE}commandline")
    if node is None:
        return {"arguments": (), "environment": ()}
    return {
        "arguments": tuple(arg.need("value") for arg in node.children(f"{QEMU_NAMESPACE}arg")),
        "environment": tuple(
            (env.word("name", "environment variable"), env.get("value") or "")
            for env in node.children(f"{QEMU_NAMESPACE}env")
        ),
    }


# What all devices have

_TAKEN_NAMES = frozenset(("control", "read", "pid", "vmgenid0", "vmcoreinfo0"))
"""Names of what stands beside the devices: monitors, their sockets, and devices that are no elements of libvirt's."""


def _common(node: Node, *kinds: str, boots: bool = False) -> dict[str, Any]:
    """Alias, address, boot order and ROM of a device.

    :param kinds: types of address that it can have.
    :param boots: a guest can start from it.
    """
    values: dict[str, Any] = {"element": node.element}
    alias = node.child("alias")
    if alias is not None:
        values["alias"] = _identifier(alias, "alias")
    address = node.child("address")
    if address is not None:
        values["address"] = _address(address, kinds)
    boot = node.child("boot") if boots else None
    if boot is not None:
        values["boot_order"] = boot.number("order", 1, 65_535)
    rom = node.child("rom") if "pci" in kinds else None
    if rom is not None:
        values["rom_bar"] = rom.maybe_switch("bar")
        values["rom_file"] = rom.path("file") if rom.get("file") is not None else ""
    return values


def _identifier(node: Node, what: str) -> str:
    """The name of a device as QEMU takes it for an id."""
    name = node.word("name", what)
    if not name[0].isalpha() or "+" in name:
        raise node.error(f"{name!r} is not an {what}: it begins with a letter, and has no '+'")
    if name in _TAKEN_NAMES:
        raise node.error(f"the {what} {name} is taken: choose another one")
    return name


def _address(node: Node, kinds: Sequence[str]) -> Address | None:
    kind = node.need("type")
    if kind not in kinds:
        allowed = f"use {' or '.join(kinds)}" if kinds else "remove it"
        raise node.error(f"an address of type {kind!r:.40} has no meaning for this device: {allowed}")
    match kind:
        case "pci":
            node.number("domain", 0, 0, 0)
            return PCIAddress(
                bus=node.number("bus", 0, 255, 0),
                slot=node.number("slot", 0, 31, 0),
                function=node.number("function", 0, 7, 0),
                multifunction=node.switch("multifunction", default=False),
            )
        case "drive":
            return DriveAddress(
                controller=node.number("controller", 0, 255, 0),
                bus=node.number("bus", 0, 255, 0),
                target=node.number("target", 0, 255, 0),
                unit=node.number("unit", 0, 16_383, 0),
            )
        case "usb":
            return USBAddress(bus=node.number("bus", 0, 255, 0), port=node.word("port", "USB port"))
        case "virtio-serial":
            node.number("bus", 0, 0, 0)
            return PortAddress(
                controller=node.number("controller", 0, 255, 0), port=node.number("port", 0, 30)
            )
    return ISAAddress(iobase=node.maybe_number("iobase", 0, 0xFFFF), irq=node.maybe_number("irq", 0, 15))


# Devices


def _disk(node: Node, machine: str) -> Disk:
    kind = node.choice("type", ("file", "block", "network"))
    device = node.choice("device", ("disk", "cdrom", "floppy"), "disk")
    node.choice("snapshot", ("internal", "external", "no", "manual"), "external")
    model = node.choice("model", _VIRTIO_MODELS, "virtio")
    target = node.child("target")
    if target is None:
        raise node.error("<disk> has no <target>")
    name = target.word("dev", "disk target")
    if "+" in name or len(name) > _BLOCK_NAME_LENGTH:
        raise target.error(
            f"{name!r:.80} is not a disk target: at most {_BLOCK_NAME_LENGTH} letters, digits, '-', '_' and '.'"
        )
    guessed = _BUS_OF_TARGET.get(name[:2], "virtio")
    if guessed in ("scsi", "ide") and device == "cdrom" and target.get("bus") is None:
        guessed = "sata" if "q35" in machine else "ide"
    bus = target.choice("bus", ("virtio", "scsi", "sata", "ide", "usb", "fdc"), guessed)
    target.choice("tray", ("closed",), "closed")
    source = node.child("source")
    readonly = node.flag("readonly") or device == "cdrom"
    values: dict[str, Any] = {
        **_common(node, "pci" if bus == "virtio" else "usb" if bus == "usb" else "drive", boots=True),
        **_disk_driver(node.child("driver"), bus),
        "source": _source(source, kind) if source is not None else None,
        "device": device,
        "target": name,
        "bus": bus,
        "model": model,
        "readonly": readonly,
        "shareable": node.flag("shareable"),
        "removable": target.maybe_switch("removable"),
        "rotation_rate": target.maybe_number("rotation_rate", 1, 65_534),
        "backing": _backing(node.child("backingStore")),
    }
    for tag, limit in (("serial", 36), ("vendor", 8), ("product", 16)):
        child = node.child(tag)
        if child is not None:
            values[tag] = _printable(child, limit)
    wwn = node.child("wwn")
    if wwn is not None:
        values["wwn"] = wwn.text()
        if len(values["wwn"]) != 16 or not set(values["wwn"].lower()) <= _HEX_DIGITS:
            raise wwn.error("<wwn> must be 16 hexadecimal digits")
    sizes = node.child("blockio")
    if sizes is not None:
        values["logical_block_bytes"] = sizes.maybe_number("logical_block_size", 512, 2 << 20)
        values["physical_block_bytes"] = sizes.maybe_number("physical_block_size", 512, 2 << 20)
    return _checked_disk(node, Disk(**values))


def _checked_disk(node: Node, disk: Disk) -> Disk:
    if disk.source is None and disk.device == "disk":
        raise node.error("<disk> has no <source>")
    if disk.io == "native" and disk.cache not in ("none", "directsync"):
        raise node.error("io='native' of <driver> needs cache='none' or 'directsync'")
    if disk.detect_zeroes == "unmap" and disk.discard != "unmap":
        raise node.error("detect_zeroes='unmap' of <driver> needs discard='unmap'")
    if disk.device == "cdrom" and disk.bus in ("virtio", "fdc", "usb"):
        raise node.error(f"a CD-ROM drive is not a {disk.bus} device: use bus sata, scsi or ide")
    if (disk.device == "floppy") != (disk.bus == "fdc"):
        raise node.error("a floppy drive has bus fdc, and nothing else has")
    if disk.readonly and disk.bus in ("ide", "sata") and disk.device == "disk":
        raise node.error(f"a disk on bus {disk.bus} cannot be read-only: use bus virtio or scsi")
    if disk.bus != "virtio" and (disk.iothread is not None or disk.queues is not None):
        raise node.error("iothread and queues of <driver> are for disks on bus virtio")
    if disk.bus != "virtio" and disk.model != "virtio":
        raise node.error("model of <disk> is for disks on bus virtio")
    if disk.bus != "scsi" and (disk.vendor or disk.product):
        raise node.error("<vendor> and <product> are for disks on bus scsi")
    hard = disk.device == "disk"
    if disk.wwn and disk.bus not in ("scsi", "sata", "ide"):
        raise node.error("<wwn> is for disks on bus scsi, sata or ide")
    if disk.rotation_rate is not None and not (hard and disk.bus in ("scsi", "sata", "ide")):
        raise node.error("rotation_rate of <target> is for hard disks on bus scsi, sata or ide")
    if disk.removable is not None and not (hard and disk.bus in ("usb", "scsi")):
        raise node.error("removable of <target> is for hard disks on bus usb or scsi")
    if disk.bus == "fdc" and (disk.serial or disk.error_policy or disk.rerror_policy):
        raise node.error("a floppy drive has neither <serial> nor an error policy")
    if disk.io and disk.source is not None and disk.source.kind == "nbd":
        raise node.error("io of <driver> is for files and block devices")
    return disk


def _printable(node: Node, limit: int) -> str:
    text = node.text()
    if not (text.isascii() and text.isprintable() and 0 < len(text) <= limit):
        raise node.error(f"<{node.tag}> must be 1 to {limit} printable ASCII characters")
    return text


def _disk_driver(node: Node | None, bus: str) -> dict[str, Any]:
    if node is None:
        return {}
    node.choice("name", ("qemu",), "qemu")
    return {
        "format": node.choice("type", ("raw", "qcow2"), "raw"),
        "cache": node.choice("cache", _CACHES, "default"),
        "io": node.choice("io", ("threads", "native", "io_uring", ""), ""),
        "discard": node.choice("discard", ("ignore", "unmap", ""), ""),
        "detect_zeroes": node.choice("detect_zeroes", ("off", "on", "unmap", ""), ""),
        "error_policy": node.choice("error_policy", ("stop", "report", "ignore", "enospace", ""), ""),
        "rerror_policy": node.choice("rerror_policy", ("stop", "report", "ignore", ""), ""),
        "iothread": node.maybe_number("iothread", 1, 256),
        "queues": node.maybe_number("queues", 1, 1024),
    }


def _source(node: Node, kind: str) -> Source | None:
    node.choice("startupPolicy", ("mandatory",), "mandatory")
    if kind == "file":
        return Source(kind="file", path=node.path("file"))
    if kind == "block":
        return Source(kind="block", path=node.path("dev"))
    node.choice("protocol", ("nbd",))
    if node.switch("tls", default=False):
        raise node.error("NBD with TLS is not supported")
    hosts = node.children("host")
    if len(hosts) != 1:
        raise node.error("<source protocol='nbd'> needs one <host>")
    (host,) = hosts
    export = node.get("name") or ""
    if host.choice("transport", ("tcp", "unix"), "tcp") == "unix":
        return Source(kind="nbd", path=host.path("socket"), export=export)
    return Source(
        kind="nbd", host=_host(host, "name"), port=host.number("port", 1, 65_535, 10_809), export=export
    )


def _host(node: Node, attribute: str) -> str:
    text = node.need(attribute)
    if (
        not text
        or len(text) > 255
        or not text.isascii()
        or set(text) & set(" ,/?#\\\"'=")
        or not text.isprintable()
    ):
        raise node.error(f"{attribute}={text!r:.60} of <{node.tag}> is no host name or address")
    return text


def _backing(node: Node | None) -> bool:
    """Whether the image's own word about what it stands on counts; an empty element says that it stands alone."""
    if node is None:
        return True
    if len(node.element):
        # A chain that is written out says what the images say themselves, and QEMU reads it from them.
        node.skip()
        return True
    node.get("type")
    return False


_CONTROLLER_MODELS: dict[str, tuple[str, ...]] = {
    "pci": ("pci-root", "pcie-root", "pcie-root-port", "pci-bridge", "pcie-to-pci-bridge"),
    "usb": (
        "qemu-xhci",
        "nec-xhci",
        "piix3-uhci",
        "piix4-uhci",
        "ehci",
        "ich9-ehci1",
        "ich9-uhci1",
        "ich9-uhci2",
        "ich9-uhci3",
        "none",
        "",
    ),
    "scsi": ("virtio-scsi", "virtio-transitional", "virtio-non-transitional", "lsilogic", "auto"),
    "sata": ("ich9", ""),
    "ide": ("piix3", "piix4", ""),
    "virtio-serial": ("virtio", "virtio-transitional", "virtio-non-transitional", ""),
    "fdc": ("",),
}
_MODEL_BY_DEFAULT = {"scsi": "virtio-scsi"}
_NAMES_OF_PCI = {
    "pcie-root-port": ("pcie-root-port",),
    "pci-bridge": ("pci-bridge",),
    "pcie-to-pci-bridge": ("pcie-pci-bridge",),
}


def _controller(node: Node) -> Controller:
    kind = node.choice("type", tuple(_CONTROLLER_MODELS))
    model = node.choice("model", _CONTROLLER_MODELS[kind], _MODEL_BY_DEFAULT.get(kind, ""))
    if kind == "scsi" and model == "auto":
        model = "virtio-scsi"
    driver = node.child("driver")
    master, target, bare = node.child("master"), node.child("target"), node.child("model")
    if bare is not None:
        if kind != "pci":
            raise bare.error("<model> in <controller> is for controllers of type pci")
        bare.choice("name", _NAMES_OF_PCI.get(model, ("",)))
    if driver is not None and model not in ("virtio-scsi", "virtio-transitional", "virtio-non-transitional"):
        raise driver.error("<driver> is for controllers of type scsi and model virtio-scsi")
    if driver is not None and kind != "scsi":
        raise driver.error("<driver> is for controllers of type scsi")
    if (master is not None) != model.startswith("ich9-uhci") and master is not None:
        raise master.error("<master> is for the companions ich9-uhci1 to 3")
    if target is not None and model not in ("pcie-root-port", "pci-bridge"):
        raise target.error("<target> is for controllers of model pcie-root-port or pci-bridge")
    if kind == "pci":
        hole = node.child("pcihole64")
        if hole is not None:
            raise hole.error("<pcihole64> is not supported: remove it")
    express = model == "pcie-root-port"
    return Controller(
        **_common(node, "pci"),
        kind=kind,
        index=-1 if node.get("index") is None else node.number("index", 0, 255),
        model=model,
        ports=_ports_of(node, kind, model),
        vectors=node.maybe_number("vectors", 0, 1024) if kind == "virtio-serial" else None,
        master=master.number("startport", 0, 14) if master is not None else None,
        queues=driver.maybe_number("queues", 1, 1024) if driver is not None else None,
        iothread=driver.maybe_number("iothread", 1, 256) if driver is not None else None,
        chassis=target.maybe_number("chassis", 1, 255) if target is not None else None,
        port=target.maybe_number("port", 0, 255) if target is not None and express else None,
        hotplug=target.switch("hotplug", default=True) if target is not None and express else True,
    )


def _ports_of(node: Node, kind: str, model: str) -> int | None:
    if kind == "virtio-serial":
        return node.maybe_number("ports", 1, 31)
    return node.maybe_number("ports", 1, 15) if model in ("qemu-xhci", "nec-xhci") else None


_NIC_MODELS = (
    "virtio",
    "virtio-transitional",
    "virtio-non-transitional",
    "e1000",
    "e1000e",
    "rtl8139",
    "pcnet",
    "ne2k_pci",
    "vmxnet3",
)


def _interface(node: Node) -> Interface:
    kind = node.need("type")
    if kind == "network":
        raise node.error(
            "<interface type='network'> names a network of libvirt's: use type='bridge' with that network's bridge"
        )
    if kind not in ("user", "ethernet", "bridge"):
        raise node.error(f"an interface of type {kind!r:.40} is not supported: use user, ethernet or bridge")
    mac, model, link, mtu = (node.child(tag) for tag in ("mac", "model", "link", "mtu"))
    driver, source, target = (node.child(tag) for tag in ("driver", "source", "target"))
    script = node.child("script")
    if script is not None:
        raise script.error(
            "<script> is not supported: bring the tap up before, and say <target dev=… managed='no'/>"
        )
    values: dict[str, Any] = {}
    if kind == "bridge":
        values["bridge"] = _interface_name(node.need_child("source"), "bridge")
    elif source is not None and kind == "ethernet":
        raise source.error("an interface of type ethernet has no <source>: remove it")
    if target is not None and kind != "user":
        name = _interface_name(target, "dev")
        # Names that libvirt made for an earlier run are made anew.
        values["tap"] = "" if name.startswith("vnet") else name
        values["managed"] = target.switch("managed", default=True)
    if driver is not None:
        values["backend"] = driver.choice("name", ("qemu", "vhost", ""), "")
        values["queues"] = driver.maybe_number("queues", 1, 256)
        values["rx_queue_size"] = driver.maybe_number("rx_queue_size", 256, 1024)
        # QEMU takes more with vhost-user only.
        values["tx_queue_size"] = driver.maybe_number("tx_queue_size", 256, 256)
        size = values["rx_queue_size"]
        if size is not None and size & (size - 1):
            raise driver.error(f"rx_queue_size={size} of <driver> is not a power of two")
    if kind == "user":
        values["networks"] = tuple(
            (
                ip.choice("family", ("ipv4", "ipv6"), "ipv4"),
                f"{_host(ip, 'address')}/{ip.number('prefix', 0, 128, 24)}",
            )
            for ip in node.children("ip")
        )
        if values.get("queues") or values.get("backend") == "vhost":
            raise node.error("an interface of type user has neither queues nor vhost")
    named = model.choice("type", _NIC_MODELS) if model is not None else "rtl8139"
    if driver is not None and not named.startswith("virtio"):
        raise driver.error("<driver> of <interface> is for the model virtio")
    if mtu is not None and not named.startswith("virtio"):
        raise mtu.error("<mtu> is for the model virtio")
    return Interface(
        **_common(node, "pci", boots=True),
        kind=kind,
        mac=_mac(mac) if mac is not None else "",
        model=named,
        link=link.choice("state", ("up", "down")) == "up" if link is not None else True,
        mtu=mtu.number("size", 68, 65_535) if mtu is not None else None,
        **values,
    )


def _interface_name(node: Node, attribute: str) -> str:
    name = node.word(attribute, "name of an interface")
    if len(name) > _INTERFACE_NAME_BYTES:
        raise node.error(
            f"{name!r} is longer than the {_INTERFACE_NAME_BYTES} characters of an interface's name"
        )
    return name


def _mac(node: Node) -> str:
    text = node.need("address").lower()
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and set(part) <= _HEX_DIGITS for part in parts):
        raise node.error(f"{text!r:.40} is no MAC address")
    if int(parts[0], 16) & 1:
        raise node.error(f"{text} is a multicast address, which no interface can have")
    return text


# Ports


def _ports(devices: Node) -> tuple[Port, ...]:
    found: list[Port] = []
    for number, node in enumerate(devices.children("serial")):
        if number == _SERIAL_PORTS:
            raise node.error(f"a machine has at most {_SERIAL_PORTS} serial ports")
        found.append(_serial(node, number))
    for number, node in enumerate(devices.children("parallel")):
        if number == _PARALLEL_PORTS:
            raise node.error(f"a machine has at most {_PARALLEL_PORTS} parallel ports")
        found.append(_parallel(node, number))
    found.extend(map(_channel, devices.children("channel")))
    for number, node in enumerate(devices.children("console")):
        port = _console(node, number, found)
        if port is not None:
            found.append(port)
    return tuple(found)


_CHARACTER_KINDS = ("pty", "unix", "tcp", "file", "dev", "pipe", "null")


def _character(node: Node, kinds: tuple[str, ...] = _CHARACTER_KINDS) -> Character:
    kind = node.choice("type", kinds)
    source, log, protocol = node.child("source"), node.child("log"), node.child("protocol")
    values: dict[str, Any] = {"kind": kind}
    match kind:
        case "unix":
            values["listen"] = True
            if source is not None:
                values["listen"] = source.choice("mode", ("bind", "connect"), "connect") == "bind"
                values["path"] = source.path("path") if source.get("path") is not None else ""
                if not values["path"] and not values["listen"]:
                    raise node.error(f"a {node.tag} of type unix that connects needs a <source path=…>")
        case "tcp":
            if source is None:
                raise node.error(f"a {node.tag} of type tcp needs a <source host=… service=…>")
            values["listen"] = source.choice("mode", ("bind", "connect"), "connect") == "bind"
            values["host"] = _host(source, "host")
            values["port"] = source.number("service", 1, 65_535)
            if protocol is not None:
                values["telnet"] = protocol.choice("type", ("raw", "telnet")) == "telnet"
        case "file" | "dev" | "pipe":
            if source is None:
                raise node.error(f"a {node.tag} of type {kind} needs a <source path=…>")
            values["path"] = source.path("path")
            values["append"] = source.switch("append", default=False) if kind == "file" else False
        case "pty":
            if source is not None:
                source.get("path")  # where it was last time
    if log is not None:
        values["log"] = log.path("file")
        values["log_append"] = log.switch("append", default=True)
    return Character(**values)


def _serial(node: Node, number: int) -> Port:
    target = node.child("target")
    model = "isa-serial"
    if target is not None:
        model = target.choice("type", ("isa-serial", "pci-serial", "serial"), "isa-serial")
        if target.number("port", 0, 255, number) != number:
            raise target.error("serial ports are numbered in their order, from 0")
        named = target.child("model")
        if named is not None:
            model = named.choice("name", ("isa-serial", "pci-serial"), model)
    model = "isa-serial" if model == "serial" else model
    place = "pci" if model == "pci-serial" else "isa"
    return Port(**_common(node, place), kind="serial", model=model, character=_character(node), index=number)


def _parallel(node: Node, number: int) -> Port:
    target = node.child("target")
    if target is not None and target.number("port", 0, 255, number) != number:
        raise target.error("parallel ports are numbered in their order, from 0")
    return Port(
        **_common(node, "isa"),
        kind="parallel",
        model="isa-parallel",
        character=_character(node),
        index=number,
    )


def _console(node: Node, number: int, before: Sequence[Port]) -> Port | None:
    """A console; the first one that is a serial console repeats the first serial port, and is none of its own."""
    target = node.child("target")
    kind = target.choice("type", ("serial", "virtio"), "serial") if target is not None else "serial"
    if target is not None and target.number("port", 0, 255, number) != number:
        raise target.error("consoles are numbered in their order, from 0")
    character = _character(node)
    if kind == "virtio":
        return Port(
            **_common(node, "virtio-serial"),
            kind="console",
            model="virtconsole",
            character=character,
            index=number,
        )
    first = next((port for port in before if port.kind == "serial"), None)
    if number > 0:
        raise node.error(
            "only the first console repeats a serial port: give this one <target type='virtio'/>"
        )
    if first is None:
        return Port(**_common(node, "isa"), kind="serial", model="isa-serial", character=character, index=0)
    # The alias of a console that repeats a port is that port's.
    _common(node, "isa", "pci")
    if character.kind != first.character.kind:
        raise node.error(
            f"a console of type {character.kind} cannot repeat a serial port of type {first.character.kind}:"
            " make them equal, or remove it"
        )
    said = node.child("source") is not None
    if said and character != first.character:
        raise node.error(
            "a console repeats the first serial port, and this one's <source> differs: remove it"
        )
    return None


def _channel(node: Node) -> Port:
    if node.get("type") == "qemu-vdagent":
        raise node.error("QEMU does not migrate qemu-vdagent: use a SPICE display with type spicevmc")
    character = _character(node, (*_CHARACTER_KINDS, "spicevmc"))
    target = node.need_child("target")
    target.choice("type", ("virtio",))
    name = target.word("name", "channel", "com.redhat.spice.0" if character.kind == "spicevmc" else "")
    return Port(
        **_common(node, "virtio-serial"),
        kind="channel",
        model="virtserialport",
        character=character,
        name=name,
    )


# Displays and sound


def _graphics(node: Node) -> Graphics:
    kind = node.choice("type", ("vnc", "spice"))
    listens = node.children("listen")
    if len(listens) > 1:
        raise listens[1].error("a display listens at one place: remove the second <listen>")
    values: dict[str, Any] = {"kind": kind}
    address = node.get("listen")
    if address is not None:
        values["address_text"] = _host(node, "listen")
    if listens:
        how = listens[0].choice("type", ("address", "socket", "none"))
        if how == "address" and listens[0].get("address") is not None:
            text = _host(listens[0], "address")
            if address not in (None, text):
                raise listens[0].error("<listen address=…> and listen=… of <graphics> differ: remove one")
            values["address_text"] = text
        elif how == "socket":
            values["socket"] = listens[0].path("socket") if listens[0].get("socket") else "auto"
        elif how == "none":
            values["address_text"] = ""
    if node.get("socket") is not None:
        values["socket"] = node.path("socket")
    values["port"] = -1 if node.get("port") in (None, "-1") else node.number("port", 1, 65_535)
    if node.switch("autoport", default=False):
        # The port of an earlier run may stand there.
        values["port"] = -1
    values["keymap"] = node.word("keymap", "keymap") if node.get("keymap") is not None else ""
    values["password"] = node.get("passwd") or ""
    if node.get("passwdValidTo") is not None:
        raise node.error("passwdValidTo is not supported: remove it")
    options: list[tuple[str, str]] = []
    if kind == "vnc" and 0 < values["port"] < VNC_PORT:
        raise node.error(f"a VNC display listens at port {VNC_PORT} or above")
    if kind == "spice" and (values.get("address_text") == "" or values.get("socket")):
        raise node.error("a SPICE display listens at an address: use <listen type='address'/>")
    if values.get("socket") == "auto":
        raise node.error("a socket of a display needs its path: write <listen type='socket' socket=…/>")
    if kind == "vnc":
        if node.get("websocket") is not None:
            values["websocket"] = -1 if node.get("websocket") == "-1" else node.number("websocket", 1, 65_535)
        policy = node.choice("sharePolicy", ("allow-exclusive", "force-shared", "ignore", ""), "")
        if policy:
            options.append(("share", policy))
    else:
        options += _spice(node)
    return Graphics(**_common(node), **values, options=tuple(options))


def _spice(node: Node) -> list[tuple[str, str]]:
    if node.get("tlsPort") not in (None, "-1"):
        raise node.error(
            "tlsPort is not supported: SPICE is served without TLS, so let it listen on loopback"
        )
    node.choice("defaultMode", ("any", "insecure"), "any")
    options: list[tuple[str, str]] = []

    def option(tag: str, attribute: str, name: str, values: tuple[str, ...]) -> None:
        child = node.child(tag)
        if child is not None:
            options.append((name, child.choice(attribute, values)))

    option("image", "compression", "image-compression", ("auto_glz", "auto_lz", "quic", "glz", "lz", "off"))
    option("jpeg", "compression", "jpeg-wan-compression", ("auto", "never", "always"))
    option("zlib", "compression", "zlib-glz-wan-compression", ("auto", "never", "always"))
    option("playback", "compression", "playback-compression", _ON_OFF)
    option("streaming", "mode", "streaming-video", ("filter", "all", "off"))
    mouse = node.child("mouse")
    if mouse is not None:
        options.append(
            ("agent-mouse", "on" if mouse.choice("mode", ("server", "client")) == "client" else "off")
        )
    for tag, attribute, name in (
        ("clipboard", "copypaste", "disable-copy-paste"),
        ("filetransfer", "enable", "disable-agent-file-xfer"),
    ):
        child = node.child(tag)
        if child is not None:
            options.append((name, "off" if child.switch(attribute) else "on"))
    gl = node.child("gl")
    if gl is not None and gl.switch("enable"):
        raise gl.error("OpenGL ties the guest to this host's graphics, and QEMU does not migrate it")
    return options


_VIDEO_MODELS = ("vga", "cirrus", "vmvga", "qxl", "virtio", "bochs", "none")
_VIDEO_MEMORY = {
    "vram": ("vga", "cirrus", "vmvga", "qxl", "bochs"),
    "vram64": ("qxl",),
    "ram": ("qxl",),
    "vgamem": ("qxl",),
}
"""Kinds of memory, and the models that have it."""


def _videos(nodes: Sequence[Node]) -> tuple[Video, ...]:
    found = []
    for number, node in enumerate(nodes):
        model = node.need_child("model")
        kind = model.choice("type", _VIDEO_MODELS)
        acceleration, resolution = model.child("acceleration"), model.child("resolution")
        for name in ("accel3d", "accel2d"):
            if acceleration is not None and acceleration.switch(name, default=False):
                raise acceleration.error("a display that renders on this host's graphics does not migrate")
        primary = model.switch("primary", default=number == 0)
        if primary != (number == 0):
            raise model.error("the first display is the primary one")
        if kind == "none" and (number or len(nodes) > 1):
            raise model.error("a video of type none stands alone")
        if number and kind not in ("qxl", "virtio", "bochs", "vga"):
            raise model.error(f"a video of type {kind} can only be the first")
        if node.child("driver") is not None:
            raise node.error("<driver> of <video> is not supported: remove it")
        memory: dict[str, Any] = {
            f"{name}_kib": model.maybe_number(name, 1024, 1 << 21)
            for name, models in _VIDEO_MEMORY.items()
            if kind in models and not (name == "vram64" and model.get(name) == "0")
        }
        if resolution is not None and kind not in ("vga", "qxl", "virtio", "bochs"):
            raise resolution.error(f"a video of type {kind} has no <resolution>")
        found.append(
            Video(
                **_common(node, *(() if kind == "none" else ("pci",))),
                **memory,
                model=kind,
                primary=primary,
                heads=model.maybe_number("heads", 1, 16 if kind in ("qxl", "virtio") else 1),
                width=resolution.number("x", 64, 16_384) if resolution is not None else None,
                height=resolution.number("y", 64, 16_384) if resolution is not None else None,
            )
        )
    return tuple(found)


def _sound(node: Node) -> Sound:
    model = node.choice("model", ("ich6", "ich9", "ac97", "es1370", "sb16", "pcspk", "usb"))
    audio = node.child("audio")
    codecs = tuple(codec.choice("type", ("duplex", "micro", "output")) for codec in node.children("codec"))
    if codecs and model not in ("ich6", "ich9"):
        raise node.error(f"a sound card of model {model} has no <codec>")
    if model == "pcspk":
        raise node.error("the speaker of a PC is not supported: use model ich9")
    if model == "usb":
        raise node.error("QEMU does not migrate USB sound cards: use model ich9")
    return Sound(
        **_common(node, "isa" if model == "sb16" else "pci"),
        model=model,
        codecs=codecs,
        audio=audio.number("id", 1, 255) if audio is not None else None,
    )


def _audio(node: Node) -> Audio:
    kind = node.choice("type", ("none", "spice", "file"))
    return Audio(
        element=node.element,
        index=node.number("id", 1, 255),
        kind=kind,
        path=node.path("path") if kind == "file" else "",
    )


# The rest


def _random(node: Node) -> Random:
    model = node.choice("model", _VIRTIO_MODELS)
    backend, rate = node.need_child("backend"), node.child("rate")
    kind = backend.choice("model", ("random", "builtin"))
    path = ""
    if kind == "random":
        path = backend.text_path() if backend.text() else "/dev/random"
    elif backend.text():
        raise backend.error("the builtin generator has no file")
    return Random(
        **_common(node, "pci"),
        model=model,
        backend=kind,
        path=path,
        rate_bytes=rate.number("bytes", 1, 1 << 40) if rate is not None else None,
        period_ms=rate.maybe_number("period", 1, 1 << 31) if rate is not None else None,
    )


def _balloon(node: Node | None) -> Balloon | None:
    if node is None:
        return Balloon()
    model = node.choice("model", (*_VIRTIO_MODELS, "none"))
    if model == "none":
        _common(node, "pci")
        return None
    stats = node.child("stats")
    return Balloon(
        **_common(node, "pci"),
        model=model,
        deflate_on_oom=node.switch("autodeflate", default=False),
        free_page_reporting=node.switch("freePageReporting", default=False),
        statistics_period_s=stats.number("period", 0, 1 << 20) if stats is not None else None,
    )


def _watchdog(node: Node) -> Watchdog:
    model = node.choice("model", ("i6300esb", "ib700", "itco"))
    actions = ("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")
    return Watchdog(
        **_common(node, *(("pci",) if model == "i6300esb" else ())),
        model=model,
        action=node.choice("action", actions, "reset"),
    )


def _input(node: Node) -> Input:
    kind = node.choice("type", ("tablet", "mouse", "keyboard"))
    bus = node.choice("bus", ("usb", "virtio", "ps2"), "usb" if kind == "tablet" else "ps2")
    if bus == "ps2" and kind == "tablet":
        raise node.error("a tablet has bus usb or virtio")
    if bus == "virtio":
        # These speak the modern protocol alone, by either name.
        node.choice("model", ("virtio", "virtio-non-transitional"), "virtio")
    kinds = {"usb": ("usb",), "virtio": ("pci",)}.get(bus, ())
    return Input(**_common(node, *kinds), kind=kind, bus=bus)


def _tpm(node: Node) -> TPM:
    model = node.choice("model", ("tpm-tis", "tpm-crb"), "tpm-crb")
    backend = node.need_child("backend")
    kind = backend.need("type")
    if kind != "emulator":
        raise backend.error(f"a TPM of type {kind!r:.40} does not move with the guest: use emulator")
    backend.choice("version", ("2.0",), "2.0")
    return TPM(**_common(node), model=model)


def _panic(node: Node) -> Panic:
    model = node.choice("model", ("isa", "pvpanic"), "isa")
    return Panic(**_common(node, *(("pci",) if model == "pvpanic" else ("isa",))), model=model)


def _vsock(node: Node) -> Vsock:
    model = node.choice("model", _VIRTIO_MODELS, "virtio")
    cid = node.need_child("cid")
    if cid.switch("auto", default=False) and cid.get("address") is None:
        raise cid.error(
            "a free number cannot be kept when the guest moves: write <cid auto='no' address='…'/>"
        )
    return Vsock(**_common(node, "pci"), model=model, cid=cid.number("address", 3, 0xFFFFFFFE))


def _redirection(node: Node) -> Redirection:
    node.choice("bus", ("usb",))
    return Redirection(**_common(node, "usb", boots=True), character=_character(node, ("spicevmc", "tcp")))


# What concerns more than one element


def _check_controllers(machine: Machine) -> None:
    seen: set[tuple[str, int, str]] = set()
    kinds = [controller.kind for controller in machine.controllers]
    for controller in machine.controllers:
        node = Node(controller.element)
        kind, index, model = controller.kind, controller.index, controller.model
        # The companions of a USB 2 controller have its index.
        key = (kind, index, model if model.startswith("ich9-uhci") else "")
        if key in seen and index >= 0:
            raise node.error(f"two controllers of type {kind} have the index {index}")
        seen.add(key)
        if kind == "pci" and (model in ("pci-root", "pcie-root")) != (index == 0) and index >= 0:
            raise node.error(
                "the PCI controller of index 0 is the root, pci-root or pcie-root, and no other is"
            )
        if kind in ("ide", "fdc") and index > 0:
            raise node.error(f"a machine has one controller of type {kind}, of index 0")
        if model == "none" and kinds.count("usb") > 1:
            raise node.error("a USB controller of model none stands alone")
        if controller.iothread is not None and controller.iothread > machine.iothreads:
            raise node.error(
                f"iothread {controller.iothread} is not there: <iothreads> says {machine.iothreads}"
            )


def _check_single(machine: Machine) -> None:
    """Refuse a second of what the guest or the host tells apart by a name or a number that is not an id."""
    names: set[tuple[str, str]] = set()
    single = (
        *(("channel", "name", port.name, port) for port in machine.ports if port.kind == "channel"),
        *(
            ("interface", "tap", interface.tap, interface)
            for interface in machine.interfaces
            if interface.tap
        ),
        *(("watchdog", "model", watchdog.model, watchdog) for watchdog in machine.watchdogs),
        *(("panic", "model", panic.model, panic) for panic in machine.panics),
    )
    for tag, what, name, device in single:
        if (tag, name) in names:
            raise Node(device.element).error(f"a second <{tag}> has the {what} {name}: remove it")
        names.add((tag, name))
    actions = {watchdog.action for watchdog in machine.watchdogs}
    for watchdog in machine.watchdogs:
        if len(actions) > 1:
            raise Node(watchdog.element).error("all watchdogs of a machine have one action: make them equal")
        if watchdog.model == "itco" and not machine.q35:
            raise Node(watchdog.element).error(
                "the watchdog itco is part of the machine type q35: use i6300esb"
            )


def _check_spice(machine: Machine) -> None:
    """Refuse sound that ends at a SPICE display where there is none."""
    if any(graphics.kind == "spice" for graphics in machine.graphics):
        return
    for audio in machine.audios:
        if audio.kind == "spice":
            raise Node(audio.element).error("audio of type spice needs a <graphics type='spice'>")


def _check(machine: Machine, root: Node) -> None:
    _check_controllers(machine)
    _check_single(machine)
    _check_spice(machine)
    seen: set[str] = set()
    for disk in machine.disks:
        if disk.target in seen:
            raise Node(disk.element).error(f"two disks have the target {disk.target!r}")
        seen.add(disk.target)
        if disk.iothread is not None and disk.iothread > machine.iothreads:
            raise Node(disk.element).error(
                f"iothread {disk.iothread} is not there: <iothreads> says {machine.iothreads}"
            )
        if disk.bus == "ide" and machine.q35:
            raise Node(disk.element).error("the machine type q35 has no IDE: use bus sata")
    orders: dict[int, str] = {}
    aliases: set[str] = set()
    for device in machine.devices:
        if device.boot_order is not None:
            if device.boot_order in orders:
                raise Node(device.element).error(f"two devices have the boot order {device.boot_order}")
            orders[device.boot_order] = device.alias
        if device.alias and device.alias in aliases:
            raise Node(device.element).error(f"two devices have the alias {device.alias}")
        aliases.add(device.alias)
    if orders and machine.boot.devices:
        raise root.error("<boot> of <os> and of devices exclude each other: remove one")
    if machine.current_memory_bytes > machine.max_memory_bytes:
        raise Node(root.element.find("currentMemory")).error("<currentMemory> is more than <memory>")
    if machine.current_memory_bytes < machine.max_memory_bytes and machine.balloon is None:
        raise Node(root.element.find("currentMemory")).error(
            "<currentMemory> differs from <memory>, which needs a balloon: make them equal"
        )
    kinds = [graphics.kind for graphics in machine.graphics]
    if len(set(kinds)) != len(kinds):
        raise Node(machine.graphics[-1].element).error(f"a machine serves one display of type {kinds[-1]}")
    if any(video.model == "none" for video in machine.videos) and machine.graphics:
        raise Node(machine.videos[0].element).error("a display that is served needs a <video>")
    audios = {audio.index for audio in machine.audios}
    if len(audios) < len(machine.audios):
        raise root.error("two <audio> have the same id")
    for sound in machine.sounds:
        if sound.audio is not None and sound.audio not in audios:
            raise Node(sound.element).error(f"there is no <audio id='{sound.audio}'>")
