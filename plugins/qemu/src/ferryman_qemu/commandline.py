"""From a domain definition to QEMU's command line.

Every element and attribute that is understood stands here; anything else is refused by name and line, so that no part
of a definition is silently dropped.  Device ids, addresses, machine type and CPU model are fixed when the domain
starts (:func:`pin`), and the pinned definition travels: both ends build the same machine.

Sources: libvirt docs/formatdomain.rst (elements); QEMU 7.2 qemu-options.hx, qapi/block-core.json (options).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ferryman.definition import definition_error, from_root, parse_definition, read_memory
from ferryman.errors import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from ferryman.definition import Definition

_CONSOLE_PORTS = 4
_DISKS = 27
"""The PCI slots 3 to 0x1d; the two above are the random generator's and the balloon's."""
_IDE_DISKS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A disk: a file or a block device that both hosts reach."""

    path: str
    block: bool
    format: str
    target: str
    bus: str
    device: str
    readonly: bool
    shareable: bool
    cache: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CharacterDevice:
    """What a serial port is connected to.

    :param listen: for a unix socket: QEMU listens instead of connecting.
    """

    kind: str
    path: str = ""
    listen: bool = False
    append: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A definition as this driver understands it."""

    definition: Definition
    accelerated: bool
    machine: str
    cpu: str
    acpi: bool
    hpet: bool
    boot: str
    boot_menu: bool
    kernel: str
    initrd: str
    cmdline: str
    utc: bool
    balloon: bool
    emulator: str
    disks: tuple[Disk, ...]
    serials: tuple[CharacterDevice, ...]
    random: bool


def read_machine(text: str) -> Machine:
    """Read a definition.

    :raises DefinitionError: an element, an attribute or a value is not understood: names it and its line.
    """
    return _read(parse_definition(text))


@lru_cache(maxsize=256)
def read_pinned(text: str) -> Machine:
    """Read a definition that :func:`pin` has been over; the last ones are remembered.

    Not for others: one without a uuid would get the same one each time.
    """
    return read_machine(text)


def _read(definition: Definition) -> Machine:
    root = definition.root
    if definition.type not in ("qemu", "kvm"):
        raise definition_error(root, f"domains of type {definition.type!r} are not QEMU's: use qemu or kvm")
    reader = _Reader(definition)
    reader.children(
        root,
        {
            "name": _text,
            "uuid": _text,
            "title": _text,
            "description": _text,
            "metadata": _attributes,
            "memory": lambda e: _text(e, {"unit"}),
            "currentMemory": reader.current_memory,
            "vcpu": reader.vcpu,
            "os": reader.os,
            "features": reader.features,
            "cpu": reader.cpu,
            "clock": reader.clock,
            "on_poweroff": lambda e: _choose(e, "destroy"),
            "on_reboot": lambda e: _choose(e, "restart"),
            "on_crash": lambda e: _choose(e, "destroy"),
            "devices": reader.devices,
        },
    )
    _attributes(root, {"type"}, {"id"})
    if root.find("os") is None:
        raise definition_error(root, "<domain> has no <os>: write <os><type>hvm</type></os>")
    return reader.machine


class _Reader:
    """Reads one definition, element by element."""

    def __init__(self, definition: Definition) -> None:
        self.machine = Machine(
            definition=definition,
            accelerated=definition.type == "kvm",
            machine="pc",
            cpu="",
            acpi=False,
            hpet=True,
            boot="hd",
            boot_menu=False,
            kernel="",
            initrd="",
            cmdline="",
            utc=True,
            balloon=True,
            emulator="",
            disks=(),
            serials=(),
            random=False,
        )

    def children(self, parent: Any, readers: Mapping[str, Any], *, many: Container[str] = ()) -> None:
        """Read each child by its reader; one without a reader is refused, and a second one that is not of ``many``."""
        _no_text(parent)
        seen: set[str] = set()
        for child in parent:
            reader = readers.get(child.tag)
            if reader is None:
                raise definition_error(
                    child, f"<{child.tag}> in <{parent.tag}> is not understood by this driver: remove it"
                )
            if child.tag in seen and child.tag not in many:
                raise definition_error(
                    child, f"<{parent.tag}> has a second <{child.tag}>, and this driver takes one: remove it"
                )
            seen.add(child.tag)
            reader(child)

    def set(self, **values: Any) -> None:
        self.machine = replace(self.machine, **values)

    def current_memory(self, element: Any) -> None:
        _text(element, {"unit"})
        if read_memory(element) != self.machine.definition.memory_bytes:
            raise definition_error(
                element, "<currentMemory> differs from <memory>, which needs a balloon: make them equal"
            )

    def vcpu(self, element: Any) -> None:
        _text(element, {"placement"})
        if element.get("placement", "static") != "static":
            raise definition_error(
                element, f"vcpu placement {element.get('placement')!r} is not understood: use static"
            )

    def os(self, element: Any) -> None:
        _attributes(element)
        self.children(
            element,
            {
                "type": self.os_type,
                "kernel": lambda e: self.set(kernel=_path(e)),
                "initrd": lambda e: self.set(initrd=_path(e)),
                "cmdline": lambda e: self.set(cmdline=_text(e)),
                "boot": self.boot,
                "bootmenu": self.bootmenu,
            },
        )
        if element.find("type") is None:
            raise definition_error(element, "<os> has no <type>")
        if (self.machine.initrd or self.machine.cmdline) and not self.machine.kernel:
            raise definition_error(element, "<initrd> and <cmdline> need a <kernel>")

    def boot(self, element: Any) -> None:
        _leaf(element, {"dev"})
        self.set(boot=_choice(element, "dev", ("hd", "network", "cdrom")))

    def bootmenu(self, element: Any) -> None:
        _leaf(element, {"enable"})
        self.set(boot_menu=_switch(element, "enable"))

    def os_type(self, element: Any) -> None:
        text = _text(element, {"arch", "machine"})
        if text != "hvm":
            raise definition_error(element, f"an os of type {text!r:.40} is not QEMU's: use hvm")
        if element.get("arch", "x86_64") != "x86_64":
            raise definition_error(
                element, f"the architecture {element.get('arch')!r} is not supported: use x86_64"
            )
        self.set(machine=_word(element, element.get("machine", "pc"), "machine type"))

    def features(self, element: Any) -> None:
        _attributes(element)
        self.children(element, {"acpi": self.acpi, "apic": _leaf, "pae": _leaf})

    def acpi(self, element: Any) -> None:
        _leaf(element)
        self.set(acpi=True)

    def cpu(self, element: Any) -> None:
        _attributes(element, set(), {"mode", "match", "check", "migratable"})
        # What QEMU does by itself; another value would ask for something that is not done.
        for attribute, value in (("match", "exact"), ("check", "none"), ("migratable", "on")):
            _choice(element, attribute, (value,), default=value)
        mode = element.get("mode", "custom")
        if mode == "maximum":
            self.children(element, {})
            self.set(cpu="max")
        elif mode == "host-passthrough":
            self.children(element, {})
            self.set(cpu="host" if self.machine.accelerated else "max")
        elif mode == "custom":
            self.children(
                element,
                {"model": lambda e: self.set(cpu=_word(e, _text(e), "CPU model")), "topology": self.topology},
            )
        else:
            raise definition_error(
                element, f"the CPU mode {mode!r} is not supported: use custom with a model"
            )

    def topology(self, element: Any) -> None:
        raise definition_error(element, "<topology> is not supported: remove it")

    def clock(self, element: Any) -> None:
        _attributes(element, set(), {"offset"})
        self.set(utc=_choice(element, "offset", ("utc", "localtime"), default="utc") == "utc")
        self.children(element, {"timer": self.timer})

    def timer(self, element: Any) -> None:
        _leaf(element, {"name"}, {"present", "tickpolicy"})
        if element.get("name") == "hpet" and "tickpolicy" not in element.attrib:
            self.set(hpet=_switch(element, "present"))
        else:
            raise definition_error(
                element, f"the timer {element.get('name')!r} is not supported: only hpet's presence is"
            )

    def devices(self, element: Any) -> None:
        _attributes(element)
        self.children(
            element,
            {
                "emulator": lambda e: self.set(emulator=_path(e)),
                "disk": self.disk,
                "serial": self.serial,
                "console": _later,
                "controller": self.controller,
                "memballoon": self.memballoon,
                "rng": self.rng,
            },
            many={"disk", "serial", "controller"},
        )
        # After all serial ports, the first of which it may repeat.
        for console in element.findall("console"):
            self.console(console)

    def memballoon(self, element: Any) -> None:
        _leaf(element, {"model"})
        self.set(balloon=_choice(element, "model", ("virtio", "none")) == "virtio")

    def disk(self, element: Any) -> None:
        _attributes(element, {"type"}, {"device"})
        kind = _choice(element, "type", ("file", "block"))
        found: dict[str, Any] = {"format": "raw", "cache": "default", "path": "", "target": "", "bus": ""}

        def driver(e: Any) -> None:
            _leaf(e, set(), {"name", "type", "cache"})
            _choice(e, "name", ("qemu",), default="qemu")
            found["format"] = _choice(e, "type", ("raw", "qcow2"), default="raw")
            found["cache"] = _choice(
                e,
                "cache",
                ("default", "none", "writeback", "writethrough", "directsync", "unsafe"),
                default="default",
            )

        def source(e: Any) -> None:
            attribute = {"file": "file", "block": "dev"}[kind]
            _leaf(e, {attribute})
            found["path"] = _absolute(e, e.get(attribute))

        def target(e: Any) -> None:
            _leaf(e, {"dev"}, {"bus"})
            found["target"] = _word(e, e.get("dev"), "disk target")
            found["bus"] = _choice(
                e, "bus", ("virtio", "ide"), default="virtio" if e.get("dev", "").startswith("vd") else "ide"
            )

        self.children(
            element,
            {"driver": driver, "source": source, "target": target, "readonly": _leaf, "shareable": _leaf},
        )
        for name, needed in (("path", "source"), ("target", "target")):
            if not found[name]:
                raise definition_error(element, f"<disk> has no <{needed}>")
        device = element.get("device", "disk")
        if device not in ("disk", "cdrom"):
            raise definition_error(element, f"the disk device {device!r} is not supported: use disk or cdrom")
        if any(disk.target == found["target"] for disk in self.machine.disks):
            raise definition_error(element, f"two disks have the target {found['target']!r}")
        readonly = element.find("readonly") is not None or device == "cdrom"
        if device == "cdrom" and found["bus"] != "ide":
            raise definition_error(element, "a CD-ROM drive is not a virtio device: use bus ide")
        if found["bus"] == "ide" and sum(disk.bus == "ide" for disk in self.machine.disks) == _IDE_DISKS:
            raise definition_error(element, f"a machine has at most {_IDE_DISKS} IDE disks: use bus virtio")
        if readonly and found["bus"] == "ide" and device == "disk":
            raise definition_error(element, "an IDE disk cannot be read-only: use bus virtio")
        if len(self.machine.disks) == _DISKS:
            raise definition_error(element, f"a machine has at most {_DISKS} disks")
        disk = Disk(
            device=device,
            block=kind == "block",
            readonly=readonly,
            shareable=element.find("shareable") is not None,
            **found,
        )
        self.set(disks=(*self.machine.disks, disk))

    def serial(self, element: Any) -> None:
        number = len(self.machine.serials)
        if number == _CONSOLE_PORTS:
            raise definition_error(element, f"a machine has at most {_CONSOLE_PORTS} serial ports")
        self.set(serials=(*self.machine.serials, self.character_device(element, number)))

    def character_device(self, element: Any, number: int) -> CharacterDevice:
        kind = _choice(element, "type", ("unix", "file", "null", "pty"))
        found: dict[str, Any] = {"kind": kind}

        def source(e: Any) -> None:
            if kind not in ("unix", "file"):
                raise definition_error(e, f"a serial port of type {kind} has no <source>")
            _leaf(e, {"path"}, {"mode"} if kind == "unix" else {"append"})
            found["path"] = _absolute(e, e.get("path"))
            found["listen"] = _choice(e, "mode", ("bind", "connect"), default="connect") == "bind"
            found["append"] = _switch(e, "append") if "append" in e.attrib else False

        def target(e: Any) -> None:
            _leaf(e, set(), {"port", "type"})
            if e.get("port", str(number)) != str(number):
                raise definition_error(e, "serial ports are numbered in their order, from 0")
            model = "serial" if element.tag == "console" else "isa-serial"
            _choice(e, "type", (model,), default=model)

        _attributes(element, {"type"})
        self.children(element, {"source": source, "target": target})
        if kind in ("unix", "file") and "path" not in found:
            raise definition_error(element, f"a serial port of type {kind} needs a <source path=…>")
        return CharacterDevice(**found)

    def console(self, element: Any) -> None:
        """Accept the console that repeats the first serial port, as virt-install writes it."""
        if not self.machine.serials:
            self.serial(element)
            return
        first = self.machine.serials[0]
        if element.get("type") != first.kind:
            raise definition_error(
                element,
                f"a console of type {element.get('type')!r:.40} cannot repeat a serial port of type {first.kind}:"
                " make them equal, or remove it",
            )
        if self.character_device(element, 0) != first:
            raise definition_error(
                element, "a console repeats the first serial port, and this one's <source> differs: remove it"
            )

    def controller(self, element: Any) -> None:
        _attributes(element, {"type"}, {"model", "index"})
        pair = (element.get("type"), element.get("model"))
        if pair not in (("usb", "none"), ("pci", "pci-root")) or element.get("index", "0") != "0":
            raise definition_error(
                element, f"the controller {pair[0]!r} of model {pair[1]!r} is not supported: remove it"
            )
        self.children(element, {})

    def rng(self, element: Any) -> None:
        _attributes(element, {"model"})
        _choice(element, "model", ("virtio",))
        found = []

        def backend(e: Any) -> None:
            found.append((_text(e, {"model"}), e.get("model")))

        self.children(element, {"backend": backend})
        if found != [("/dev/urandom", "random")]:
            raise definition_error(
                element, "a random generator needs <backend model='random'>/dev/urandom</backend>"
            )
        self.set(random=True)


# Small readers


def _later(_element: Any) -> None:
    """An element that is read after its siblings."""


def _no_text(element: Any) -> None:
    for text in (element.text, *(child.tail for child in element)):
        if text and text.strip(" \t\r\n"):
            raise definition_error(
                element, f"the text {text.strip()!r:.40} in <{element.tag}> is not understood: remove it"
            )


def _text(element: Any, allowed: Iterable[str] = ()) -> str:
    """The text of an element that holds nothing else, but for some attributes."""
    _attributes(element, (), allowed)
    if len(element):
        raise definition_error(element[0], f"<{element.tag}> holds a text, not <{element[0].tag}>")
    return (element.text or "").strip()


def _leaf(element: Any, needed: Iterable[str] = (), allowed: Iterable[str] = ()) -> None:
    """Make sure that an element holds some attributes and nothing else."""
    _attributes(element, needed, allowed)
    _no_text(element)
    if len(element):
        raise definition_error(
            element[0],
            f"<{element[0].tag}> in <{element.tag}> is not understood by this driver: remove it",
        )


def _attributes(element: Any, needed: Iterable[str] = (), allowed: Iterable[str] = ()) -> None:
    for name in needed:
        if name not in element.attrib:
            raise definition_error(element, f"<{element.tag}> has no attribute {name}")
    for name in element.attrib:
        if name not in {*needed, *allowed}:
            raise definition_error(
                element,
                f"the attribute {name} of <{element.tag}> is not understood by this driver: remove it",
            )


def _choice(element: Any, attribute: str, values: tuple[str, ...], default: str = "") -> str:
    value = str(element.get(attribute, default))
    if value not in values:
        raise definition_error(
            element,
            f"{attribute}={value!r:.60} of <{element.tag}> is not supported: use {' or '.join(values)}",
        )
    return value


def _switch(element: Any, attribute: str) -> bool:
    values = {"yes": True, "on": True, "no": False, "off": False}
    return values[_choice(element, attribute, tuple(values))]


def _choose(element: Any, value: str) -> None:
    if _text(element) != value:
        raise definition_error(
            element, f"<{element.tag}> is {_text(element)!r:.40}, but only {value} is supported"
        )


def _word(element: Any, text: str | None, what: str) -> str:
    if not text or not all(c.isascii() and (c.isalnum() or c in "-_.+") for c in text) or len(text) > 64:
        raise definition_error(element, f"{text!r:.80} is not a {what}")
    return text


def _absolute(element: Any, text: str | None) -> str:
    if not text or not text.startswith("/") or "\0" in text or len(text) > 4096:
        raise definition_error(element, f"{text!r:.80} is not an absolute path")
    return text


def _path(element: Any) -> str:
    return _absolute(element, _text(element))


# Fixing what is left open, and writing the command line


def pin(machine: Machine, *, machine_type: str, cpu: str, memory_bytes: int) -> Machine:
    """Fix machine type, CPU model and memory in the definition, so that every start on any host builds the same."""
    root: Any = copy.deepcopy(machine.definition.root)
    for tag in ("memory", "currentMemory"):
        for element in root.findall(tag):
            element.text = str(memory_bytes // 1024)
            element.set("unit", "KiB")
    os_type = root.find("os/type")
    os_type.set("machine", machine_type)
    os_type.set("arch", "x86_64")

    element = root.find("cpu")
    if element is None:
        element = _child(root, "cpu")
    if cpu not in ("max", "host"):
        element.attrib.clear()
        element.set("mode", "custom")
        model = element.find("model")
        if model is None:
            model = _child(element, "model")
        model.text = cpu
    elif "mode" not in element.attrib and not len(element):
        element.set("mode", "maximum")
    return replace(_read(from_root(root)), machine=machine_type, cpu=cpu)


def _child(parent: Any, tag: str) -> Any:
    child = parent.makeelement(tag)
    parent.append(child)
    return child


def _option(text: str) -> str:
    """A value in QEMU's comma-separated options: a comma is doubled."""
    return text.replace(",", ",,")


def _on(value: bool) -> str:  # noqa: FBT001 - a switch's value
    return "on" if value else "off"


def build_argv(
    machine: Machine, *, emulator: str, name: str, control_fd: int, read_fd: int, incoming: bool, pidfile: str
) -> list[str]:
    """Write the command line.

    The guest never starts by itself (``-S``), and a receiver listens only when it is told to (``-incoming defer``).

    :param control_fd: listening socket of the monitor that changes state; ``read_fd``: of the one for others.
    :param pidfile: also the argument by which the process is found if its number was never written down.
    """
    definition = machine.definition
    argv = [
        emulator,
        "-name",
        f"guest={_option(name)}",
        "-uuid",
        definition.uuid,
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-machine",
        f"{machine.machine},accel={'kvm' if machine.accelerated else 'tcg'},usb=off,hpet={_on(machine.hpet)}"
        f",acpi={_on(machine.acpi)}",
        "-cpu",
        machine.cpu,
        "-m",
        f"size={definition.memory_bytes // 1024}k",
        "-smp",
        str(definition.vcpus),
        "-rtc",
        f"base={'utc' if machine.utc else 'localtime'}",
        "-boot",
        f"menu={_on(machine.boot_menu)},strict=on",
        "-chardev",
        f"socket,id=control,fd={control_fd},server=on,wait=off",
        "-mon",
        "chardev=control,mode=control",
        "-chardev",
        f"socket,id=read,fd={read_fd},server=on,wait=off",
        "-mon",
        "chardev=read,mode=control",
    ]
    if machine.kernel:
        argv += ["-kernel", machine.kernel]
        if machine.initrd:
            # As it is: only for a multiboot kernel is this a comma-separated list.
            argv += ["-initrd", machine.initrd]
        if machine.cmdline:
            argv += ["-append", machine.cmdline]
    for number, disk in enumerate(machine.disks):
        place = sum(other.bus == "ide" for other in machine.disks[:number]) if disk.bus == "ide" else number
        argv += _disk(number, disk, place=place, first_of_boot=_boots(machine, disk))
    for number, serial in enumerate(machine.serials):
        argv += ["-chardev", _character_device(serial, f"serial{number}")]
        argv += ["-device", f"isa-serial,chardev=serial{number},id=port{number},index={number}"]
    if machine.random:
        argv += ["-object", "rng-random,id=random0,filename=/dev/urandom"]
        argv += ["-device", "virtio-rng-pci,rng=random0,id=rng0,addr=0x1e"]
    if machine.balloon:
        argv += ["-device", "virtio-balloon-pci,id=balloon0,addr=0x1f"]
    if incoming:
        argv += ["-incoming", "defer"]
    return [*argv, "-msg", "timestamp=on", "-pidfile", pidfile]


def _boots(machine: Machine, disk: Disk) -> bool:
    wanted = "cdrom" if machine.boot == "cdrom" else "disk"
    return (
        not machine.kernel
        and machine.boot != "network"
        and disk.device == wanted
        and disk is next((d for d in machine.disks if d.device == wanted), None)
    )


_CACHE = {
    "default": "",
    "writeback": ",cache.direct=off,cache.no-flush=off",
    "none": ",cache.direct=on,cache.no-flush=off",
    "writethrough": ",cache.direct=off,cache.no-flush=off",
    "directsync": ",cache.direct=on,cache.no-flush=off",
    "unsafe": ",cache.direct=off,cache.no-flush=on",
}


def _disk(number: int, disk: Disk, *, place: int, first_of_boot: bool) -> list[str]:
    node = f"disk{number}"
    readonly = f",read-only={_on(disk.readonly)}"
    driver = "host_device" if disk.block else "file"
    argv = [
        "-blockdev",
        f"driver={driver},node-name={node}-file,filename={_option(disk.path)}{readonly}{_CACHE[disk.cache]}",
        "-blockdev",
        f"driver={disk.format},node-name={node},file={node}-file{readonly}{_CACHE[disk.cache]}",
    ]
    boot = ",bootindex=1" if first_of_boot else ""
    share = f",share-rw={_on(disk.shareable)}"
    write_cache = f",write-cache={_on(disk.cache not in ('writethrough', 'directsync'))}"
    if disk.bus == "virtio":
        device = (
            f"virtio-blk-pci,drive={node},id=device-{node},addr={hex(place + 3)}{boot}{share}{write_cache}"
        )
    else:
        kind = "ide-cd" if disk.device == "cdrom" else "ide-hd"
        bus = f"ide.{place // 2},unit={place % 2}"
        device = f"{kind},drive={node},id=device-{node},bus={bus}{boot}{share}{write_cache}"
    return [*argv, "-device", device]


def _character_device(device: CharacterDevice, identity: str) -> str:
    match device.kind:
        case "unix":
            role = "server=on,wait=off" if device.listen else "server=off"
            return f"socket,id={identity},path={_option(device.path)},{role}"
        case "file":
            return f"file,id={identity},path={_option(device.path)},append={_on(device.append)}"
        case kind:
            return f"{kind},id={identity}"


def disk_paths(machine: Machine) -> tuple[str, ...]:
    """Paths that the machine opens and that both hosts must reach: disks, kernel, initial RAM disk."""
    return tuple(disk.path for disk in machine.disks)


def boot_paths(machine: Machine) -> tuple[str, ...]:
    """Files that are read when the machine is built, on either host."""
    return tuple(path for path in (machine.kernel, machine.initrd) if path)


__all__ = [
    "DefinitionError",
    "Machine",
    "boot_paths",
    "build_argv",
    "disk_paths",
    "pin",
    "read_machine",
    "read_pinned",
]
