"""Is a definition understood in full or refused, and does it become the same machine each time?"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from ferryman.errors import DefinitionError
from ferryman_qemu import choose
from ferryman_qemu.choose import HostChooser
from ferryman_qemu.machine import IGNORED, Machine, read_machine, read_pinned
from ferryman_qemu.machine.model import (
    Device,
    Disk,
    DriveAddress,
    PCIAddress,
    PortAddress,
    USBAddress,
)
from ferryman_qemu.probe import Emulator
from tests.definitions import HERE, arguments, expectation, names, pinned, snapshot, text_of

TEXTS = {name: text_of(name) for name in names()}
ANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from(sorted(name for name in TEXTS if name != "interfaces-100"))


def domain(devices: str = "", *, root: str = "", os: str = "", machine: str = "pc") -> str:
    return (
        "<domain type='qemu'><name>a</name><uuid>6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55</uuid><memory>2048</memory>"
        f"<os><type machine='{machine}'>hvm</type>{os}</os>{root}<devices>{devices}</devices></domain>"
    )


def disk(dev: str, *, path: str = "/a", bus: str = "", inner: str = "", kind: str = "disk") -> str:
    named = f" bus='{bus}'" if bus else ""
    return (
        f"<disk type='file' device='{kind}'><source file='{path}'/><target dev='{dev}'{named}/>{inner}</disk>"
    )


def options(machine: Machine, option: str) -> list[str]:
    return [value for flag, value in pairwise(arguments(machine)) if flag == f"-{option}"]


def devices(machine: Machine) -> list[dict[str, Any]]:
    return [json.loads(value) for value in options(machine, "device")]


def refusal(text: str) -> DefinitionError:
    with pytest.raises(DefinitionError) as caught:
        pinned(text)
    return caught.value


# The corpus


@pytest.mark.parametrize("name", TEXTS)
def test_the_command_line_is_the_one_that_is_kept(name: str) -> None:
    kept = (HERE / "accepted" / f"{name}.argv").read_text()
    assert snapshot(name) == kept, "python -m tests.definitions rewrites them and shows what changed"


@pytest.mark.parametrize("name", names("refused"))
def test_what_is_refused_is_named(name: str) -> None:
    code, element, words, text = expectation(name)
    error = refusal(text)
    assert (error.code, error.element or "-") == (code, element)
    assert words in str(error)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 600


def test_the_corpus_is_large() -> None:
    assert len(TEXTS) >= 70
    assert sum(name.startswith("virt-install-") for name in TEXTS) >= 15
    assert len(names("refused")) >= 40


@pytest.mark.parametrize("name", TEXTS)
def test_pinning_twice_changes_nothing(name: str) -> None:
    first = pinned(TEXTS[name])
    text = first.definition.render()
    again = pinned(text)
    assert again.definition.render() == text
    assert arguments(again) == arguments(first) == arguments(read_pinned(text))
    assert read_pinned(text) is read_pinned(text)
    # A receiver builds the same machine, and listens.
    receiver = arguments(again, incoming=True)
    at = receiver.index("-incoming")
    assert [*receiver[:at], *receiver[at + 2 :]] == arguments(again)
    assert receiver[at + 1] == "defer"


def places(machine: Machine) -> list[object]:
    found: list[object] = []
    for device in machine.devices:
        match device.address:
            case PCIAddress() as place:
                found.append(("pci", place.bus, place.slot, place.function))
            case USBAddress() | PortAddress() as place:
                found.append(place)
            case DriveAddress() as place:
                assert isinstance(device, Disk)
                found.append((device.bus, place))
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_places_and_names_are_unique(name: str) -> None:
    machine = pinned(TEXTS[name])
    assert [place for place, count in Counter(places(machine)).items() if count > 1] == []
    line = arguments(machine)
    ids = [json.loads(value)["id"] for flag, value in pairwise(line) if flag == "-device"]
    ids += [one["node-name"] for one in map(json.loads, options(machine, "blockdev"))]
    ids += re.findall(r"(?:^|,)id=([^,\n]*)", "\n".join(options(machine, "chardev")), re.MULTILINE)
    assert [one for one, count in Counter(ids).items() if count > 1] == []
    # QEMU util/id.c, id_wellformed; block.c takes names of 31 characters.
    assert [one for one in ids if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", one)] == []
    assert [one for one in ids if one.startswith("node-") and len(one) > 31] == []


@pytest.mark.parametrize("name", TEXTS)
def test_places_do_not_depend_on_the_order_of_what_has_them(name: str) -> None:
    machine = pinned(TEXTS[name])
    root = etree.fromstring(machine.definition.render())
    (parent,) = root.findall("devices")
    # Serial and parallel ports, consoles and displays are numbered by their order, and stay in it.
    for child in [one for one in parent if one.tag in ("disk", "controller", "interface", "rng", "input")]:
        parent.insert(0, child)
    turned = pinned(etree.tostring(root, encoding="unicode"))
    assert sorted(map(repr, turned.devices)) == sorted(map(repr, machine.devices))


# Nothing is passed over


def again(text: str) -> Any:
    return etree.fromstring(text)


def elements(root: Any) -> list[Any]:
    """Elements below which something unknown is an error."""
    found = []
    for element in root.iter():
        path = [str(one.tag) for one in (*reversed(list(element.iterancestors())), element)][1:]
        joined = "/".join(path)
        ignored = any(
            re.fullmatch(entry.replace("*", "[^/]*") + "(/.*)?", joined)
            for entry in IGNORED
            if "@" not in entry
        )
        # What a chain of images says is in the images.
        if not ignored and "backingStore" not in path:
            found.append(element)
    return found


@given(name=NAMES, data=st.data())
@ANY
def test_an_unknown_element_is_refused_wherever_it_stands(name: str, data: st.DataObject) -> None:
    root: Any = etree.fromstring(TEXTS[name])
    parent = data.draw(st.sampled_from(elements(root)))
    parent.insert(data.draw(st.integers(0, len(parent))), etree.Element("bogus"))
    text = etree.tostring(root, encoding="unicode")
    (stranger,) = again(text).iter("bogus")
    with pytest.raises(DefinitionError) as caught:
        read_machine(text)
    assert caught.value.line == stranger.sourceline
    assert (caught.value.element or "").endswith("bogus")


@given(name=NAMES, attribute=st.sampled_from(["bogus", "{urn:x}type", "Type"]), data=st.data())
@ANY
def test_an_unknown_attribute_is_refused_wherever_it_stands(
    name: str, attribute: str, data: st.DataObject
) -> None:
    root: Any = etree.fromstring(TEXTS[name])
    element = data.draw(st.sampled_from(elements(root)))
    element.set(attribute, "1")
    text = etree.tostring(root, encoding="unicode")
    (changed,) = [one for one in again(text).iter() if attribute in one.attrib]
    with pytest.raises(DefinitionError) as caught:
        read_machine(text)
    assert caught.value.line == changed.sourceline
    assert attribute in str(caught.value)


VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "on", "yes", "none", "auto", "virtio", "/a", "0x10", "99999999", "١", "a,b"]
    ),
    st.text(st.characters(blacklist_categories=("Cs", "Cc"), max_codepoint=0xFFFD), max_size=30),
)


@given(name=NAMES, value=VALUES, data=st.data())
@settings(ANY, max_examples=500)
def test_every_other_value_is_understood_or_refused(name: str, value: str, data: st.DataObject) -> None:
    root: Any = etree.fromstring(TEXTS[name])
    element = data.draw(st.sampled_from(list(root.iter())))
    what = data.draw(st.sampled_from([None, *element.attrib]))
    if what is None:
        element.text = value
    else:
        element.set(what, value)
    try:
        machine = pinned(etree.tostring(root, encoding="unicode"))
    except DefinitionError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert arguments(machine) == arguments(pinned(machine.definition.render()))


@given(name=NAMES, data=st.data())
@settings(ANY, max_examples=300)
def test_elements_that_are_missing_or_doubled_are_understood_or_refused(
    name: str, data: st.DataObject
) -> None:
    root: Any = etree.fromstring(TEXTS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        element = data.draw(st.sampled_from(list(root.iter())))
        parent = element.getparent()
        if parent is None:
            continue
        if data.draw(st.booleans()):
            parent.remove(element)
        else:
            parent.append(etree.fromstring(etree.tostring(element, with_tail=False)))
    try:
        arguments(pinned(etree.tostring(root, encoding="unicode")))
    except DefinitionError as error:
        assert len(str(error).splitlines()) == 1


@given(st.binary(max_size=200))
@ANY
def test_bytes_of_any_kind_are_refused(data: bytes) -> None:
    with pytest.raises(DefinitionError):
        read_machine(data.decode("utf-8", errors="surrogateescape"))


def test_the_domain_may_have_the_number_of_a_run() -> None:
    assert read_machine(domain().replace("type=", "id='7' type=")).definition.name == "a"


def test_every_field_of_a_device_changes_the_command_line() -> None:
    """A field that no definition of the corpus gives another value than its own is not shown to be used."""
    seen: dict[tuple[str, str], set[str]] = {}
    for text in TEXTS.values():
        machine = pinned(text)
        parts: tuple[Any, ...] = (
            *machine.devices,
            machine.cpu,
            machine.boot,
            machine.clock,
            machine.features,
        )
        for device in parts:
            for one in fields(device):
                key = (type(device).__name__, one.name)
                seen.setdefault(key, set()).add(repr(getattr(device, one.name)))
    common = {one.name for one in fields(Device)}
    idle = {key for key, values in seen.items() if len(values) < 2 and key[1] not in common}
    # What this host's kernel or QEMU without KVM cannot show.
    assert idle <= {("CPU", "host_model"), ("CPU", "migratable"), ("Clock", "pit_delay")}


# Limits


def test_a_full_bus_gets_bridges() -> None:
    for machine in ("pc", "q35"):
        cards = "".join("<interface type='user'><model type='e1000'/></interface>" for _ in range(100))
        made = pinned(domain(cards, machine=machine))
        found = places(made)
        assert len(found) == len(set(found)) >= 100
        bridges = [c for c in made.controllers if "bridge" in c.model]
        assert len(bridges) == 3


def test_disks_beyond_one_controller() -> None:
    letters = [f"vd{a}{b}" for a in ("", "a") for b in "abcdefghijklmnopqrstuvwxyz"][:40]
    made = pinned(domain("".join(disk(dev, path=f"/{dev}") for dev in letters)))
    assert [one.source and one.source.path for one in made.disks] == [f"/{dev}" for dev in letters]
    assert len({one.address for one in made.disks}) == 40
    made = pinned(domain("".join(disk(f"sd{c}", bus="sata") for c in "abcdefghijklm"), machine="q35"))
    assert sum(c.kind == "sata" for c in made.controllers) == 3


@pytest.mark.parametrize(
    "devices, words",
    [
        ("".join(disk(f"hd{c}", bus="ide") for c in "abcde"), "no room"),
        ("".join(disk(f"fd{c}", kind="floppy") for c in "abc"), "no room"),
        ("<input type='tablet' bus='usb'/>" * 16, "no free USB port"),
        ("<serial type='pty'/>" * 5, "at most 4"),
        ("<parallel type='null'/>" * 4, "at most 3"),
        (
            "".join(f"<channel type='null'><target type='virtio' name='c{n}'/></channel>" for n in range(31)),
            "no free",
        ),
    ],
)
def test_what_is_too_much_is_refused(devices: str, words: str) -> None:
    assert words in str(refusal(domain(devices)))


def test_names_and_paths_survive() -> None:
    text = domain(
        disk("vda", path='/a,b=c "d"&#10;e')
        + "<serial type='unix'><source mode='bind' path='/s,1'/></serial>",
        os="<kernel>/k,a</kernel><initrd>/i,a</initrd><cmdline>c,a 'b'</cmdline>",
    ).replace("<name>a<", "<name>a,debug-threads=on<")
    made = pinned(text)
    line = arguments(made)
    assert "guest=a,,debug-threads=on" in line
    assert json.loads(options(made, "blockdev")[0])["filename"] == '/a,b=c "d"\ne'
    assert any(",path=/s,,1,server=on" in value for value in options(made, "chardev"))
    assert [options(made, name) for name in ("kernel", "initrd", "append")] == [
        ["/k,a"],
        ["/i,a"],
        ["c,a 'b'"],
    ]


# What is started from


@pytest.mark.parametrize(
    "os, inner, expected",
    [
        ("", "", {"disk-vda": 1}), ("<boot dev='hd'/>", "", {"disk-vda": 1}),
        ("<boot dev='cdrom'/><boot dev='hd'/>", "", {"disk-hdc": 1, "disk-vda": 2}),
        ("<boot dev='network'/>", "", {"net0": 1}),
        ("", "<boot order='4'/>", {"disk-vdb": 4}), ("<kernel>/k</kernel>", "", {}),
    ],
)  # fmt: skip
def test_what_the_guest_starts_from(os: str, inner: str, expected: dict[str, int]) -> None:
    text = domain(
        disk("vda")
        + disk("vdb", path="/b", inner=inner)
        + disk("hdc", kind="cdrom")
        + "<interface type='user'/>",
        os=os,
    )
    found = {one["id"]: one["bootindex"] for one in devices(pinned(text)) if "bootindex" in one}
    assert found == expected


# What the host decides


def emulator(**changes: Any) -> Emulator:
    values: dict[str, Any] = {
        "path": "/bin/qemu", "version": (7, 2, 22), "machines": {"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2",
        "pc-q35-7.2": "pc-q35-7.2", "pc-i440fx-7.2": "pc-i440fx-7.2", "microvm": "microvm"},
        "default_cpus": {"pc-i440fx-7.2": "qemu64"},
        "cpus": {"tcg": {"qemu64": [], "Westmere": [], "Skylake-Client": ["avx512f"]}},
        "features": {"tcg": ["aes", "avx"]}, "postcopy": False, "host_models": {"tcg": ("Westmere", ["avx"])},
    }  # fmt: skip
    return Emulator(**{**values, **changes})


def cpu(text: str) -> tuple[str, tuple[tuple[str, bool], ...]]:
    machine = read_machine(domain(root=text))
    return HostChooser(emulator()).cpu(machine, "pc-i440fx-7.2")


def test_cpus_are_chosen_by_what_the_host_has() -> None:
    assert cpu("") == ("qemu64", ())
    assert cpu("<cpu mode='host-model'/>") == ("Westmere", (("avx", True),))
    assert cpu("<cpu mode='host-model'><model fallback='allow'/></cpu>") == ("Westmere", (("avx", True),))
    assert cpu("<cpu mode='custom' check='none'><model>Skylake-Client</model></cpu>")[0] == "Skylake-Client"
    for check in ("partial", "full"):
        with pytest.raises(DefinitionError, match="avx512f"):
            cpu(f"<cpu mode='custom' check='{check}'><model>Skylake-Client</model></cpu>")
        without = "<feature policy='disable' name='avx512f'/>"
        assert (
            cpu(f"<cpu check='{check}'><model>Skylake-Client</model>{without}</cpu>")[0] == "Skylake-Client"
        )
    with pytest.raises(DefinitionError, match="no CPU model"):
        cpu("<cpu><model>i8080</model></cpu>")


@pytest.mark.parametrize("machine, words", [("pc-9.9", "no machine type"), ("microvm", "use pc, q35")])
def test_machine_types_that_are_not_there(machine: str, words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        HostChooser(emulator()).machine_type(read_machine(domain(machine=machine)))


def descriptor(directory: Path, name: str, **changes: Any) -> None:
    """Write a descriptor, and the images that it names."""
    images = {what: str(directory / f"{name}.{what}") for what in ("code", "vars")}
    for path in images.values():
        Path(path).touch()
    content = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": images["code"], "format": "raw"},
            "nvram-template": {"filename": images["vars"], "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": [],
    }
    (directory / f"{name}.json").write_text(json.dumps(content | changes))


def chosen(inner: str = "") -> str:
    machine = read_machine(domain(machine="q35", os=inner).replace("<os>", "<os firmware='efi'>"))
    return Path(HostChooser(emulator()).firmware(machine, "pc-q35-7.2").code).name


SECURE = "<firmware><feature name='secure-boot' enabled='yes'/></firmware>"


def test_firmware_is_the_first_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above, below = tmp_path / "etc", tmp_path / "usr"
    above.mkdir()
    below.mkdir()
    monkeypatch.setattr(choose, "FIRMWARE_DIRECTORIES", (above, below))
    with pytest.raises(DefinitionError, match="no UEFI firmware"):
        chosen()
    descriptor(below, "60-b")
    assert chosen() == "60-b.code"
    descriptor(below, "50-a")
    assert chosen() == "50-a.code"
    (above / "50-a.json").touch()  # that switches it off
    assert chosen() == "60-b.code"
    descriptor(below, "40-secure", features=["secure-boot", "requires-smm"])
    descriptor(below, "30-enrolled", features=["secure-boot", "enrolled-keys", "requires-smm"])
    assert chosen() == "60-b.code"
    assert chosen(SECURE) == "30-enrolled.code"
    unenrolled = SECURE.replace("</firmware>", "<feature name='enrolled-keys' enabled='no'/></firmware>")
    assert chosen(unenrolled) == "40-secure.code"
    assert chosen("<loader secure='yes'/>") == "30-enrolled.code"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "7", "null", '"a"', "{}", '{"mapping": 1}', '{"mapping": {"device": "flash"}}', "\xff",
     '{"mapping": {"device": "memory", "filename": "/a"}}'],
)  # fmt: skip
def test_broken_descriptors_are_left_out(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FIRMWARE_DIRECTORIES", (tmp_path,))
    descriptor(tmp_path, "60-good")
    (tmp_path / "10-broken.json").write_text(content, encoding="latin-1")
    broken: tuple[dict[str, Any], ...] = (
        {"targets": 1},
        {"targets": [{}]},
        {"features": 5},
        {"interface-types": None},
        {"targets": [{"architecture": 1}]},
    )
    for number, change in enumerate(broken):
        descriptor(tmp_path, f"2{number}-broken", **change)
    descriptor(tmp_path, "30-missing")
    (tmp_path / "30-missing.code").unlink()
    descriptor(tmp_path, "40-qcow2", mapping={
        "device": "flash", "executable": {"filename": "/a", "format": "qcow2"},
        "nvram-template": {"filename": "/a", "format": "qcow2"}})  # fmt: skip
    assert chosen() == "60-good.code"


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 2, 0), (9, 0, 0), (10, 0, 0)])
@pytest.mark.parametrize("accelerated", [False, True], ids=["tcg", "kvm"])
@pytest.mark.parametrize("memory_bytes", [64 << 20, 256 << 10, (64 << 20) + 8192, 384 << 10])
def test_memory_with_which_no_write_is_lost(
    version: tuple[int, int, int], accelerated: bool, memory_bytes: int
) -> None:
    made = emulator(version=version)
    enough = made.migratable_memory(memory_bytes, accelerated=accelerated)
    affected = not accelerated and version[0] < 9 and memory_bytes in (64 << 20, 256 << 10)
    assert enough - memory_bytes == (8192 if affected else 0)
    assert made.migratable_memory(enough, accelerated=accelerated) == enough


def test_huge_pages_stay_whole() -> None:
    text = domain(root="<memoryBacking><hugepages/></memoryBacking>").replace(">2048<", " unit='MiB'>64<")
    assert pinned(text).max_memory_bytes == 64 << 20
