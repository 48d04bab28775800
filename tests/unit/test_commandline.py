"""Does the command line say what the definition says, and is every definition refused that says something else?"""

from __future__ import annotations

import copy
from dataclasses import fields
from functools import partial
from itertools import islice, pairwise, product
from typing import TYPE_CHECKING, Any

import pytest
from lxml import etree

from ferryman.errors import DefinitionError
from ferryman_qemu.commandline import Machine, boot_paths, build_argv, disk_paths, pin, read_machine
from ferryman_qemu.probe import Emulator

if TYPE_CHECKING:
    from collections.abc import Iterator

# Everything that docs/use/qemu-definitions.md lists.
RICH = """\
<domain type="qemu" id="3">
  <name>web</name>
  <uuid>6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55</uuid>
  <title>Web</title> <description>The one &amp; only</description>
  <metadata><x:any xmlns:x="u" a="b">text<y/></x:any></metadata>
  <memory unit="MiB">64</memory>
  <currentMemory unit="KiB">65536</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os>
    <type arch="x86_64" machine="pc">hvm</type>
    <kernel>/boot/linux</kernel> <initrd>/boot/initrd</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
    <boot dev="hd"/>
    <bootmenu enable="yes"/>
  </os>
  <features> <acpi/> <apic/> <pae/> </features>
  <cpu mode="custom" match="exact" check="none" migratable="on"> <model>Westmere</model> </cpu>
  <clock offset="localtime"> <timer name="hpet" present="no"/> </clock>
  <on_poweroff>destroy</on_poweroff> <on_reboot>restart</on_reboot> <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" cache="none"/>
      <source file="/srv/a.qcow2"/> <target dev="vda" bus="virtio"/> <readonly/> <shareable/>
    </disk>
    <disk type="block" device="cdrom"> <source dev="/dev/sr0"/> <target dev="hdb" bus="ide"/> </disk>
    <serial type="unix"> <source path="/run/s" mode="bind"/> <target type="isa-serial" port="0"/> </serial>
    <serial type="file"> <source path="/var/log/s" append="on"/> <target port="1"/> </serial>
    <console type="unix"> <source path="/run/s" mode="bind"/> <target type="serial" port="0"/> </console>
    <controller type="usb" index="0" model="none"/> <controller type="pci" index="0" model="pci-root"/>
    <memballoon model="virtio"/>
    <rng model="virtio"> <backend model="random">/dev/urandom</backend> </rng>
  </devices>
</domain>
"""
RICH_ARGV = """
/bin/qemu -name guest=web -uuid 6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55 -no-user-config -nodefaults -display none -S
-machine pc,accel=tcg,usb=off,hpet=off,acpi=on -cpu Westmere -m size=65536k -smp 2 -rtc base=localtime
-boot menu=on,strict=on
-chardev socket,id=control,fd=7,server=on,wait=off -mon chardev=control,mode=control
-chardev socket,id=read,fd=8,server=on,wait=off -mon chardev=read,mode=control
-kernel /boot/linux -initrd /boot/initrd -append console=ttyS0+quiet
-blockdev driver=file,node-name=disk0-file,filename=/srv/a.qcow2,read-only=on,cache.direct=on,cache.no-flush=off
-blockdev driver=qcow2,node-name=disk0,file=disk0-file,read-only=on,cache.direct=on,cache.no-flush=off
-device virtio-blk-pci,drive=disk0,id=device-disk0,addr=0x3,share-rw=on,write-cache=on
-blockdev driver=host_device,node-name=disk1-file,filename=/dev/sr0,read-only=on
-blockdev driver=raw,node-name=disk1,file=disk1-file,read-only=on
-device ide-cd,drive=disk1,id=device-disk1,bus=ide.0,unit=0,share-rw=off,write-cache=on
-chardev socket,id=serial0,path=/run/s,server=on,wait=off -device isa-serial,chardev=serial0,id=port0,index=0
-chardev file,id=serial1,path=/var/log/s,append=on -device isa-serial,chardev=serial1,id=port1,index=1
-object rng-random,id=random0,filename=/dev/urandom -device virtio-rng-pci,rng=random0,id=rng0,addr=0x1e
-device virtio-balloon-pci,id=balloon0,addr=0x1f -msg timestamp=on -pidfile /run/pid
"""
CDROM = " device='cdrom'"
SERIAL = "<serial type='pty'/>"


def domain(root: str = "", *, os: str = "", devices: str = "", kind: str = "qemu") -> str:
    return (
        f"<domain type='{kind}'>\n<name>a</name><uuid>6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55</uuid>"
        f"<memory>2048</memory>\n<os><type>hvm</type>{os}</os>\n{root}\n<devices>{devices}</devices></domain>"
    )


def disk(inner: str = "", *, path: str = "/a", dev: str = "vda", kind: str = "file", more: str = "") -> str:
    source = f"<source {'dev' if kind == 'block' else 'file'}='{path}'/>"
    return f"<disk type='{kind}'{more}>{source}<target dev='{dev}'/>{inner}</disk>"


def argv(machine: str | Machine, *, incoming: bool = False, name: str = "web") -> list[str]:
    read = read_machine(machine) if isinstance(machine, str) else machine
    return build_argv(
        read, emulator="/bin/qemu", name=name, control_fd=7, read_fd=8, incoming=incoming, pidfile="/run/pid"
    )


def options(text: str, option: str) -> list[str]:
    line = argv(text)
    return [value for flag, value in pairwise(line) if flag == option]


def refusal(text: str) -> DefinitionError:
    with pytest.raises(DefinitionError) as caught:
        read_machine(text)
    error = caught.value
    assert len(str(error).splitlines()) == 1
    assert f"(line {error.line})" in str(error)
    return error


def meaning(machine: Machine) -> dict[str, Any]:
    others = [field.name for field in fields(machine) if field.name != "definition"]
    return {"definition": machine.definition.render(), **{name: getattr(machine, name) for name in others}}


# What is understood


def test_the_rich_definition() -> None:
    assert argv(RICH) == [word.replace("+", " ") for word in RICH_ARGV.split()]
    machine = read_machine(RICH)
    assert machine.emulator == "/usr/bin/qemu-system-x86_64"
    assert disk_paths(machine) == ("/srv/a.qcow2", "/dev/sr0")
    assert boot_paths(machine) == ("/boot/linux", "/boot/initrd")


ACCEL = "usb=off,hpet=on,acpi=off"
SHOWN: list[tuple[str, str, list[str]]] = [
    (domain(), "-machine", [f"pc,accel=tcg,{ACCEL}"]), (domain(kind="kvm"), "-machine", [f"pc,accel=kvm,{ACCEL}"]),
    (domain().replace("<type", "<type machine='pc-i440fx-7.2'"), "-machine", [f"pc-i440fx-7.2,accel=tcg,{ACCEL}"]),
    (domain("<features><apic/><pae/></features>"), "-machine", [f"pc,accel=tcg,{ACCEL}"]),
    (domain("<features><acpi/></features>"), "-machine", ["pc,accel=tcg,usb=off,hpet=on,acpi=on"]),
    *((domain(f"<clock><timer name='hpet' present='{word}'/></clock>"), "-machine",
       [f"pc,accel=tcg,usb=off,hpet={value},acpi=off"])
      for word, value in (("yes", "on"), ("on", "on"), ("no", "off"), ("off", "off"))),
    (domain("<cpu><model>qemu64</model></cpu>"), "-cpu", ["qemu64"]),
    (domain("<cpu mode='custom'><model>Skylake-Client-v4</model></cpu>"), "-cpu", ["Skylake-Client-v4"]),
    *((domain(f"<cpu mode='{mode}'/>", kind=kind), "-cpu", [value])
      for mode, kind, value in (("maximum", "qemu", "max"), ("maximum", "kvm", "max"),
                                ("host-passthrough", "qemu", "max"), ("host-passthrough", "kvm", "host"))),
    (domain(), "-m", ["size=2048k"]),
    (domain().replace("<memory>2048", "<memory unit='GB'>1"), "-m", ["size=976563k"]),
    (domain("<currentMemory unit='b'>2097152</currentMemory>"), "-m", ["size=2048k"]), (domain(), "-smp", ["1"]),
    (domain("<vcpu>3</vcpu>"), "-smp", ["3"]), (domain(), "-rtc", ["base=utc"]),
    (domain("<clock offset='utc'/>"), "-rtc", ["base=utc"]),
    (domain("<clock offset='localtime'/>"), "-rtc", ["base=localtime"]), (domain(), "-boot", ["menu=off,strict=on"]),
    (domain(os="<bootmenu enable='yes'/>"), "-boot", ["menu=on,strict=on"]),
    (domain(os="<boot dev='network'/>"), "-boot", ["menu=off,strict=on"]),
    *((domain(os="<kernel>/k</kernel>"), option, value)
      for option, value in (("-kernel", ["/k"]), ("-initrd", []), ("-append", []))),
    (domain(os="<initrd>/i</initrd><kernel>/k</kernel>"), "-initrd", ["/i"]),
    (domain(os="<cmdline> a=b,c  d </cmdline><kernel>/k</kernel>"), "-append", ["a=b,c  d"]),
    (domain(), "-kernel", []), (domain(), "-device", ["virtio-balloon-pci,id=balloon0,addr=0x1f"]),
    (domain(devices="<memballoon model='none'/>"), "-device", []),
    (domain(), "-object", []), (domain(), "-incoming", []),
]  # fmt: skip
SERIALS: list[tuple[str, list[str]]] = [
    ("", []), ("<serial type='null'/>", ["null,id=serial0"]),
    ("<serial type='pty'><target/></serial>", ["pty,id=serial0"]),
    ("<serial type='unix'><source path='/s'/></serial>", ["socket,id=serial0,path=/s,server=off"]),
    ("<serial type='unix'><source path='/s' mode='connect'/></serial>", ["socket,id=serial0,path=/s,server=off"]),
    ("<serial type='unix'><source path='/s' mode='bind'/></serial>", ["socket,id=serial0,path=/s,server=on,wait=off"]),
    ("<serial type='file'><source path='/s'/></serial>", ["file,id=serial0,path=/s,append=off"]),
    ("<serial type='file'><source path='/s' append='off'/></serial>", ["file,id=serial0,path=/s,append=off"]),
    ("<serial type='file'><source path='/s' append='on'/></serial>", ["file,id=serial0,path=/s,append=on"]),
    (SERIAL * 4, [f"pty,id=serial{number}" for number in range(4)]), ("<console type='pty'/>", ["pty,id=serial0"]),
    ("<console type='pty'><target type='serial' port='0'/></console>", ["pty,id=serial0"]),
    ("<console type='file'><source path='/s'/></console>", ["file,id=serial0,path=/s,append=off"]),
    (SERIAL + "<console type='pty'><target type='serial'/></console>", ["pty,id=serial0"]),
    ("<console type='pty'/>" + SERIAL, ["pty,id=serial0"]),
    (SERIAL + "<serial type='null'/><console type='pty'/>", ["pty,id=serial0", "null,id=serial1"]),
]  # fmt: skip


@pytest.mark.parametrize("text, option, values", SHOWN, ids=range(len(SHOWN)))
def test_what_is_understood_is_said(text: str, option: str, values: list[str]) -> None:
    assert options(text, option) == values


@pytest.mark.parametrize("devices, values", SERIALS, ids=range(len(SERIALS)))
def test_serial_ports(devices: str, values: list[str]) -> None:
    text = domain(devices=f"<memballoon model='none'/>{devices}")
    assert options(text, "-chardev")[2:] == values
    said = [f"isa-serial,chardev=serial{number},id=port{number},index={number}" for number in range(4)]
    assert options(text, "-device") == said[: len(values)]


# cache -> cache.direct, cache.no-flush, the device's write-cache; libvirt docs/formatdomain.rst, QEMU's -drive cache=.
CACHES = {
    "default": ("", "on"), "none": (",cache.direct=on,cache.no-flush=off", "on"),
    "writeback": (",cache.direct=off,cache.no-flush=off", "on"),
    "unsafe": (",cache.direct=off,cache.no-flush=on", "on"),
    "writethrough": (",cache.direct=off,cache.no-flush=off", "off"),
    "directsync": (",cache.direct=on,cache.no-flush=off", "off"),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["file", "block"])
@pytest.mark.parametrize("path", ["/srv/a", "/dev/shm/a"])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_disks(cache: str, path: str, kind: str, form: str) -> None:
    flags, write_cache = CACHES[cache]
    for readonly, shareable in product(("off", "on"), repeat=2):
        inner = "<readonly/>" * (readonly == "on") + "<shareable/>" * (shareable == "on")
        driver = f"<driver type='{form}' cache='{cache}'/>"
        text = domain(devices=disk(inner + driver, path=path, kind=kind))
        protocol = {"file": "file", "block": "host_device"}[kind]
        rest = f"read-only={readonly}{flags}"
        assert options(text, "-blockdev") == [
            f"driver={protocol},node-name=disk0-file,filename={path},{rest}",
            f"driver={form},node-name=disk0,file=disk0-file,{rest}",
        ]
        assert options(text, "-device")[0] == (
            "virtio-blk-pci,drive=disk0,id=device-disk0,addr=0x3,bootindex=1"
            f",share-rw={shareable},write-cache={write_cache}"
        )


def test_buses() -> None:
    for dev, more, expected in [
        ("vda", "", "virtio-blk-pci"), ("sda", " device='disk'", "ide-hd"), ("sda' bus='virtio", "", "virtio-blk-pci"),
        ("vda' bus='ide", "", "ide-hd"), ("hdc", CDROM, "ide-cd"),
    ]:  # fmt: skip
        text = domain(devices=disk(dev=dev, more=more))
        assert options(text, "-device")[0].split(",")[0] == expected
        assert (",read-only=on" in options(text, "-blockdev")[0]) == (more == CDROM)


DISKS = disk(dev="sda", more=CDROM) + disk(dev="vdb") + disk(dev="hdc", more=CDROM) + disk(dev="vdd")


def test_the_first_disk_of_the_kind_boots() -> None:
    for os, booted in [
        ("", 1), ("<boot dev='hd'/>", 1), ("<boot dev='cdrom'/>", 0), ("<boot dev='network'/>", None),
        ("<boot dev='hd'/><kernel>/k</kernel>", None),
    ]:  # fmt: skip
        devices = options(domain(os=os, devices=DISKS), "-device")[:4]
        assert [",bootindex=1" in device for device in devices] == [number == booted for number in range(4)]
        assert [device.split(",")[3] for device in devices] == [
            "bus=ide.0",
            "addr=0x4",
            "bus=ide.0",
            "addr=0x6",
        ]
        assert [device.split(",")[4] for device in devices[::2]] == ["unit=0", "unit=1"]


def test_ide_disks_have_places_of_their_own() -> None:
    ide = [disk(dev=f"sd{letter}", path=f"/{letter}") for letter in "abcde"]
    others = [disk(dev=f"vd{number}", path=f"/v{number}") for number in range(4)]
    said = options(domain(devices="".join(ide[:1] + others + ide[1:4])), "-device")
    places = [device.split(",")[3:5] for device in said if device.startswith("ide-hd")]
    assert places == [[f"bus=ide.{bus}", f"unit={unit}"] for bus in (0, 1) for unit in (0, 1)]
    assert "at most 4 IDE disks" in str(refusal(domain(devices="".join(ide))))
    assert "not a virtio device" in str(refusal(domain(devices=disk(dev="vda", more=CDROM))))


def test_no_two_devices_share_an_address() -> None:
    rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
    devices = "".join(disk(dev=f"vd-{number}", path=f"/{number}") for number in range(27))
    said = options(domain(devices=devices + rng), "-device")
    addresses = [part for device in said for part in device.split(",") if "addr" in part]
    assert len(addresses) == len(set(addresses)) == 29
    assert "at most 27 disks" in str(refusal(domain(devices=devices + disk(dev="more"))))


def test_commas_are_doubled_where_qemu_splits_at_them() -> None:
    text = domain(
        os="<kernel>/k,a</kernel><initrd>/i,a</initrd><cmdline>c,a</cmdline>",
        devices=disk(path="/d,read-only=off,,") + "<serial type='unix'><source path='/s,a'/></serial>"
        "<serial type='file'><source path='/f,a'/></serial>",
    )
    line = argv(text, name="web,debug-threads=on")
    assert "guest=web,,debug-threads=on" in line
    assert "driver=file,node-name=disk0-file,filename=/d,,read-only=off,,,,,read-only=off" in line
    assert "socket,id=serial0,path=/s,,a,server=off" in line
    assert "file,id=serial1,path=/f,,a,append=off" in line
    # Plain arguments; a Linux kernel's initial RAM disk is opened by exactly this name (tried on QEMU 7.2.22).
    plain = [value for option in ("-kernel", "-initrd", "-append") for value in options(text, option)]
    assert plain == ["/k,a", "/i,a", "c,a"]


@pytest.mark.parametrize("text", [RICH, domain(), domain(devices=DISKS)], ids=["rich", "bare", "disks"])
def test_a_guest_waits_and_only_a_receiver_listens(text: str) -> None:
    line = argv(text)
    assert line.count("-S") == 1
    assert "-incoming" not in line
    receiver = argv(text, incoming=True)
    at = receiver.index("-incoming")
    assert receiver[at + 1] == "defer"
    assert receiver[:at] + receiver[at + 2 :] == line
    # The same again, and with all that says nothing to the machine.
    assert argv(text) == line
    said = "<?pi x?><!-- <disk/> --><description>D</description><metadata><disk/></metadata>"
    assert argv(text.replace("<devices>", f"{'' if text == RICH else said}<devices>")) == line


# Pinning


@pytest.mark.parametrize(
    "root, kind, cpu",
    [
        ("", "qemu", "qemu64"), ("", "kvm", "qemu64"), ("<cpu/>", "qemu", "qemu64"),
        ("<cpu mode='custom' match='exact'/>", "qemu", "qemu64"),
        ("<cpu><model>Westmere</model></cpu>", "qemu", "Westmere"),
        ("<cpu mode='custom'><model>Westmere</model></cpu>", "qemu", "Westmere"),
        ("<cpu><model>max</model></cpu>", "qemu", "max"), ("<cpu mode='maximum'/>", "qemu", "max"),
        ("<cpu mode='custom'><model>host</model></cpu>", "kvm", "host"), ("<cpu mode='maximum'/>", "kvm", "max"),
        ("<cpu mode='host-passthrough' migratable='on'/>", "qemu", "max"),
        ("<cpu mode='host-passthrough' check='none'/>", "kvm", "host"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("memory", ["", "<currentMemory unit='MiB'>2</currentMemory>"], ids=["", "current"])
def test_pinning_fixes_machine_cpu_and_memory(root: str, kind: str, cpu: str, memory: str) -> None:
    machine = read_machine(domain(root + memory, kind=kind, devices=DISKS + SERIAL))
    before = meaning(machine)
    fix = partial(pin, machine_type="pc-i440fx-7.2", cpu=machine.cpu or "qemu64", memory_bytes=2105344)
    pinned = fix(machine)
    assert (pinned.machine, pinned.cpu, pinned.definition.memory_bytes) == ("pc-i440fx-7.2", cpu, 2105344)
    assert meaning(machine) == before
    # The pinned definition says it all by itself, and stays as it is.
    assert meaning(read_machine(pinned.definition.render())) == meaning(pinned)
    assert meaning(fix(pinned)) == meaning(pinned)
    assert argv(pinned)[argv(pinned).index("-machine") + 1].startswith("pc-i440fx-7.2,")
    # Nothing else changes.
    for option in ("-device", "-blockdev", "-chardev", "-uuid", "-smp", "-rtc", "-boot"):
        assert options(pinned.definition.render(), option) == options(machine.definition.render(), option)


# Nothing is silently dropped: each place of the rich definition, with something else in it


def places() -> Iterator[tuple[Any, Any, str, int]]:
    """Each element of a fresh copy of the rich definition, with the copy, its path and its line."""
    number = 0
    while len(elements := list((root := etree.fromstring(RICH)).iter())) > number:
        element: Any = elements[number]
        path = "/".join(str(e.tag) for e in (*reversed(list(element.iterancestors())), element))
        if not path.startswith("domain/metadata/"):
            yield root, element, path, element.sourceline
        number += 1


def tampered(*ways: str) -> Iterator[Any]:
    """The rich definition with something else in one place: text, path and line of what is then at fault."""
    for how, (root, element, path, line) in ((how, place) for how in ways for place in places()):
        parent, text, tail = element.getparent(), element.text or "", element.tail or ""
        at_fault = path, line
        match how:
            case "bogus" | "{u}type":
                element.set(how, "1")
            case "child" | "{u}name" if path != "domain/metadata":
                child = etree.Element(how)
                child.tail, element.text = text, None
                element.insert(0, child)
                at_fault = f"{path}/{how}", line
            case "text" if path != "domain/metadata" and not text.strip():
                element.text = f"x{text}"
            case "text behind" if parent is not None:
                element.tail = f"x{tail}"
                at_fault = path.rpartition("/")[0], parent.sourceline
            case "twice" if parent is not None and element.tag != "controller":
                again = copy.deepcopy(element)
                again.tail = None
                element.addprevious(again)
                # A serial port for its number, and every other for being the second.
                blamed = element.find("target") if element.tag == "serial" else element
                more = etree.tostring(again).count(b"\n")
                at_fault = path + "/target" * (blamed is not element), blamed.sourceline + more
            case _:
                continue
        yield pytest.param(etree.tostring(root, encoding="unicode"), *at_fault, id=f"{how}-{path}-{line}")


WAYS = ("bogus", "{u}type", "child", "{u}name", "text", "text behind", "twice")


@pytest.mark.parametrize("text, element, line", list(tampered(*WAYS)))
def test_what_is_not_understood_is_refused_in_every_place(text: str, element: str, line: int) -> None:
    error = refusal(text)
    assert (error.element, error.line) == (element, line)


WRONG = ["", "no such thing", "\n", "\u00ff", "/etc?"]
ATTRIBUTES = [
    pytest.param(number, str(name), value, id=f"{path}-{line}-{name}-{value!a}")
    for number, (_, element, path, line) in enumerate(places())
    for name, value in product(element.attrib, WRONG)
    if name != "id" and not (value == "/etc?" and name in ("file", "path", "dev") and path.endswith("source"))
]


@pytest.mark.parametrize("number, name, value", ATTRIBUTES)
def test_a_wrong_value_of_an_attribute_is_refused(number: int, name: str, value: str) -> None:
    root, element, path, _ = next(islice(places(), number, None))
    element.set(name, value)
    error = refusal(etree.tostring(root, encoding="unicode"))
    # What a generator is fed by is one thing: its backend's attribute and text.
    blamed = element.getparent() if element.tag == "backend" else element
    assert (error.element, error.line) == (path.removesuffix("/backend"), blamed.sourceline)


def test_comments_and_instructions_say_nothing() -> None:
    for root, element, path, _ in places():
        if path != "domain":
            element.addnext(etree.Comment("x"))
            element.addprevious(etree.ProcessingInstruction("x", "y"))
            assert argv(etree.tostring(root, encoding="unicode")) == argv(RICH)


CPU = "domain/cpu"
PORT = "domain/devices/serial"
REFUSED = [
    (domain(kind="xen"), "domain", "'xen' are not QEMU's"), (domain(kind="QEMU"), "domain", "'QEMU' are not QEMU's"),
    (domain().replace("<os><type>hvm</type></os>", ""), "domain", "no <os>"),
    (domain().replace("<type>hvm</type>", ""), "domain/os", "no <type>"),
    *((domain().replace("hvm", word), "domain/os/type", "use hvm") for word in ("", "xen", "exe", "HVM", "hv m")),
    (domain().replace("<type", f"<type machine='{'p' * 65}'"), "domain/os/type", "machine type"),
    (domain(os="<initrd>/i</initrd>"), "domain/os", "need a <kernel>"),
    (domain(os="<cmdline>a</cmdline>"), "domain/os", "need a <kernel>"),
    *((domain(os=f"<kernel>{path}</kernel>"), "domain/os/kernel", "not an absolute path")
      for path in ("", "k", "./k", "~/k", "http://h/k", "/" + "k" * 4096)),
    (domain(os="<boot/>"), "domain/os/boot", "no attribute dev"),
    (domain(os="<boot dev='hd'/><boot dev='cdrom'/>"), "domain/os/boot", "second <boot>"),
    *((domain(f"<currentMemory{more}</currentMemory>"), "domain/currentMemory", words)
      for more, words in ((">2047", "differs"), (" unit='MiB'>2048", "differs"), (">", "whole number"),
                          (">x", "whole number"), (">0", "outside"), (" unit='x'>1", "not a unit"))),
    (domain("<cpu mode='host-model'/>"), CPU, "host-model"),
    (domain("<cpu mode='maximum'><model>max</model></cpu>"), f"{CPU}/model", "not understood"),
    (domain("<cpu mode='host-passthrough'><model>x</model></cpu>"), f"{CPU}/model", "not understood"),
    *((domain(f"<cpu {value}><model>qemu64</model></cpu>"), CPU, "not supported")
      for value in ("match='strict'", "match='minimum'", "check='full'", "check='partial'", "migratable='off'")),
    *((domain(f"<cpu><model>{model}</model></cpu>"), f"{CPU}/model", "not a CPU model")
      for model in ("", "a,b", "a b", "é", "qemu64,+svm", "a" * 65)),
    (domain("<cpu><topology sockets='1' cores='1' threads='1'/></cpu>"), f"{CPU}/topology", "not supported"),
    *((domain(f"<clock offset='{word}'/>"), "domain/clock", "offset") for word in ("timezone", "variable", "UTC")),
    *((domain(f"<clock><timer {timer}/></clock>"), "domain/clock/timer", "timer")
      for timer in ("name='pit'", "name='rtc' tickpolicy='catchup'", "name='hpet' present='no' tickpolicy='delay'",
                    "name='hpet'", "present='no'", "name='kvmclock' present='no'")),
    (domain("<clock>" + "<timer name='hpet' present='no'/>" * 2 + "</clock>"), "domain/clock/timer", "second"),
    *((domain(f"<on_{what}>{word}</on_{what}>"), f"domain/on_{what}", f"only {only} is")
      for what, word, only in (("poweroff", "restart", "destroy"), ("reboot", "destroy", "restart"),
                               ("crash", "preserve", "destroy"), ("crash", "", "destroy"))),
    (domain(devices="<emulator>qemu</emulator>"), "domain/devices/emulator", "not an absolute path"),
    *((domain(devices=devices), "domain/devices/disk", words) for devices, words in (
        ("<disk type='file'><target dev='vda'/></disk>", "no <source>"),
        ("<disk type='file'><source file='/a'/></disk>", "no <target>"),
        (disk(kind="network"), "type='network'"), (disk(kind="volume"), "type='volume'"),
        (disk(more=" device='lun'"), "use disk or cdrom"), (disk(more=" device='floppy'"), "use disk or cdrom"),
        (disk() + disk(), "two disks have the target 'vda'"), (disk(more=" snapshot='no'"), "snapshot"),
        (disk("<readonly/>", dev="sda"), "cannot be read-only"), ("<disk/>", "type"))),
    (domain(devices=disk().replace(" file=", " dev=")), "domain/devices/disk/source", "no attribute file"),
    *((domain(devices=disk(dev=dev)), "domain/devices/disk/target", words)
      for dev, words in (("", "disk target"), ("vda' bus='scsi", "bus='scsi'"), ("vda' tray='open", "tray"))),
    *((domain(devices=disk(f"<driver {more}/>")), "domain/devices/disk/driver", words)
      for more, words in (("name='phy'", "name='phy'"), ("type='vmdk'", "type='vmdk'"), ("cache='x'", "cache='x'"),
                          ("io='native'", "io"), ("discard='unmap'", "discard"), ("queues='2'", "queues"))),
    *((domain(devices=f"<serial type='{kind}'/>"), PORT, kind) for kind in ("tcp", "unix", "file", "dev", "spicevmc")),
    *((domain(devices=f"<serial type='{kind}'><source path='/a'/></serial>"), f"{PORT}/source", "has no <source>")
      for kind in ("pty", "null")),
    *((domain(devices=f"<serial type='{kind}'><source {more}/></serial>"), f"{PORT}/source", words)
      for kind, more, words in (
          ("unix", "", "no attribute path"), ("unix", "path='s'", "absolute"),
          ("unix", "path='/s' append='on'", "append"), ("unix", "path='/s' mode='server'", "mode"),
          ("file", "path='/s' mode='bind'", "mode"),
          ("file", "path='/s' append=''", "append"), ("file", "path='/s' append='1'", "append"))),
    *((domain(devices=f"<serial type='pty'><target {more}/></serial>"), f"{PORT}/target", words)
      for more, words in (("port='1'", "numbered"), ("type='usb-serial'", "usb-serial"), ("type='serial'", "serial"))),
    (domain(devices=SERIAL * 5), PORT, "at most 4"),
    *((domain(devices=devices), f"domain/devices/console{where}", words) for devices, where, words in (
        (SERIAL + "<console type='null'/>", "", "cannot repeat"), (SERIAL + "<console/>", "", "cannot repeat"),
        ("<console/>", "", "type"), ("<console type='pty'/>" * 2, "", "second <console>"),
        (SERIAL + "<console type='pty'/>" * 2, "", "second <console>"),
        ("<console type='pty'><target type='virtio'/></console>", "/target", "virtio"),
        (SERIAL + "<console type='pty'><target type='virtio'/></console>", "/target", "virtio"),
        (SERIAL + "<console type='pty'><target port='1'/></console>", "/target", "numbered"),
        (SERIAL + "<console type='pty' tty='/dev/pts/1'/>", "", "attribute tty"),
        *(("<serial type='unix'><source path='/s' mode='bind'/></serial>"
           f"<console type='unix'><source {more}/></console>", "", "differs")
          for more in ("path='/t' mode='bind'", "path='/s'", "path='/s' mode='connect'")))),
    *((domain(devices=f"<controller {more}/>"), "domain/devices/controller", "controller")
      for more in ("", "type='usb'", "type='usb' model='ich9-ehci1'", "type='pci' model='pcie-root'",
                   "type='scsi' model='virtio-scsi'", "type='usb' model='none' index='1'")),
    *((domain(devices=f"<rng model='virtio'>{inner}</rng>"), "domain/devices/rng", "needs <backend")
      for inner in ("", "<backend/>", "<backend model='random'/>", "<backend model='builtin'/>",
                    "<backend model='random'>/dev/random</backend>", "<backend model='egd'>/dev/urandom</backend>")),
    (domain("<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>"),
    "domain/{http://libvirt.org/schemas/domain/qemu/1.0}commandline", "not understood"),
]  # fmt: skip


@pytest.mark.parametrize("text, element, words", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_done_is_refused_where_it_stands(text: str, element: str, words: str) -> None:
    error = refusal(text)
    assert error.element == element
    assert words in str(error)


# What the emulator needs


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 2, 0), (8, 99, 99), (9, 0, 0), (10, 0, 0)])
@pytest.mark.parametrize("accelerated", [False, True], ids=["tcg", "kvm"])
@pytest.mark.parametrize(
    "memory_bytes", [64 << 20, 256 << 10, (64 << 20) + 8192, (64 << 20) - 4096, 384 << 10]
)
def test_memory_with_which_no_write_is_lost(
    version: tuple[int, int, int], accelerated: bool, memory_bytes: int
) -> None:
    emulator = Emulator(path="/bin/qemu", version=version, machines={}, default_cpus={}, cpus={})
    enough = emulator.migratable_memory(memory_bytes, accelerated=accelerated)
    affected = not accelerated and version[0] < 9 and memory_bytes in (64 << 20, 256 << 10)
    assert enough - memory_bytes == (8192 if affected else 0)
    assert emulator.migratable_memory(enough, accelerated=accelerated) == enough
