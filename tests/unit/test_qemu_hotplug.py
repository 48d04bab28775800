"""What plugging and unplugging asks of definitions."""

from __future__ import annotations

import pytest

from ferryman.definition import parse_definition
from ferryman.errors import DefinitionError
from ferryman_qemu.hotplug import find_device, read_device, with_vcpus, without
from tests.definitions import pinned

DEFINITION = """\
<domain type='qemu'><name>web</name><uuid>5d1f0f6e-52a6-4c8e-9c63-0d0e1c3f7b42</uuid><memory>65536</memory>
<vcpu current='2'>4</vcpu><os><type machine='pc-i440fx-7.2'>hvm</type></os><devices>
<disk type='file'><source file='/a'/><target dev='vda' bus='virtio'/><alias name='disk-vda'/></disk>
<disk type='file'><source file='/b'/><target dev='sda' bus='scsi'/></disk>
<interface type='user'><mac address='52:54:00:00:00:0A'/><alias name='net0'/></interface>
<interface type='user'><mac address='52:54:00:00:00:0a'/><alias name='net1'/></interface>
</devices></domain>"""


@pytest.mark.parametrize(
    ("device", "place"),
    [
        ("<disk><target dev='vda'/></disk>", 0),
        ("<disk type='file'><source file='/other'/><target dev='sda' bus='scsi'/></disk>", 1),
        ("<disk><alias name='disk-vda'/></disk>", 0),
        ("<interface><alias name='net1'/></interface>", 3),
        ("<interface><mac address='52:54:00:00:00:0a'/><alias name='net0'/></interface>", 2),
    ],
)
def test_a_device_is_found_and_taken_out(device: str, place: int) -> None:
    definition = parse_definition(DEFINITION)
    found = find_device(definition, read_device(device))
    assert list(definition.root.iterfind("devices/*")).index(found) == place
    left = list(without(definition, found).root.iterfind("devices/*"))
    assert len(left) == 3
    assert len(list(definition.root.iterfind("devices/*"))) == 4


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("<disk/>", "does not say which one it is: write <target dev"),
        ("<disk><mac address='52:54:00:00:00:0a'/></disk>", "does not say which one"),
        ("<rng/>", "write <alias name"),
        ("<disk><target dev='vdb'/></disk>", "no <disk> with target vdb"),
        (
            "<disk><target dev='sda'/><alias name='disk-vda'/></disk>",
            "no <disk> with target sda and alias disk-vda",
        ),
        ("<interface><mac address='52:54:00:00:00:0A'/></interface>", "2 <interface> with mac"),
    ],
)
def test_a_device_that_is_meant_by_nothing_or_by_several(device: str, words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        find_device(parse_definition(DEFINITION), read_device(device))


def test_the_number_of_processors_in_a_definition() -> None:
    definition = parse_definition(DEFINITION)
    assert with_vcpus(definition, 2) is definition
    assert 'current="3"' in with_vcpus(definition, 3).render()
    one = parse_definition(DEFINITION.replace("<vcpu current='2'>4</vcpu>", ""))
    assert with_vcpus(one, 1) is one


@pytest.mark.parametrize(
    ("machine", "vcpus", "queues"),
    [
        ("pc-i440fx-7.2", "<vcpu current='2'>4</vcpu>", 2),
        ("pc-i440fx-5.1", "<vcpu current='2'>4</vcpu>", 1),
        ("pc-i440fx-7.2", "<vcpu>1</vcpu>", None),
    ],
)
def test_queues_do_not_follow_the_number_of_processors(machine: str, vcpus: str, queues: int | None) -> None:
    text = DEFINITION.replace("<vcpu current='2'>4</vcpu>", vcpus).replace("pc-i440fx-7.2", machine)
    first = pinned(text)
    assert [disk.queues for disk in first.disks] == [queues, None]
    assert [c.queues for c in first.controllers if c.kind == "scsi"] == [queues]
    again = pinned(with_vcpus(first.definition, first.max_vcpus).render())
    assert [disk.queues for disk in again.disks] == [queues, None]
