"""Devices and processors that are plugged into real guests of QEMU, and unplugged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ferryman.sync
from ferryman import Scope
from ferryman.errors import (
    DefinitionError,
    DomainStateError,
    FerrymanError,
    HypervisorError,
    NotSupportedError,
    OptionError,
    PlanBlockedError,
)
from ferryman_qemu import hotplug
from ferryman_qemu.guest import Guest
from tests.guests.inspect import QMPSocket, run_directories
from tests.guests.linux import LinuxGuest
from tests.qemu import MIB, NAME, Field, laid_out, need

MACHINES = pytest.mark.parametrize("machine", ["pc", "q35"])
MAC = "52:54:00:0a:0b:0c"
NET = f"<interface type='user'><mac address='{MAC}'/><model type='virtio'/></interface>"


def disk(path: Path, target: str = "vdb", more: str = "") -> str:
    """A virtio disk of a file."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/>{more}</disk>"
    )


def record(root: Path) -> dict[str, Any]:
    """What the root's one process is written down as."""
    (run,) = run_directories(root)
    found: dict[str, Any] = json.loads((run / "guest.json").read_text())
    return found


def machine_of(root: Path) -> tuple[str, list[Any], list[Any]]:
    """What QEMU has: its tree of devices, without what depends on the host, its processors, and its block nodes."""
    (run,) = run_directories(root)
    with QMPSocket(run / "read") as qmp:
        tree = qmp.execute("human-monitor-command", **{"command-line": "info qtree"})
        # Descriptors, and the order in which the host's ends were made, are the process's own.
        tree = re.sub(r"(?m)^.*(chardev|fd) = .*\n", "", tree)
        cpus = [(cpu["cpu-index"], cpu["props"]) for cpu in qmp.execute("query-cpus-fast")]
        slots = [(slot["props"], "qom-path" in slot) for slot in qmp.execute("query-hotpluggable-cpus")]
        nodes = sorted(node["node-name"] for node in qmp.execute("query-named-block-nodes"))
        return tree, [cpus, slots], nodes


@contextmanager
def linux_field(machine: str, vcpus: str = "<vcpu current='1'>3</vcpu>") -> Iterator[Field]:
    """Two hosts, a Linux guest with room for more processors, and an image for a disk."""
    with laid_out(LinuxGuest(memory_bytes=160 * MIB, blocks_bytes=0)) as field:
        for name in ("image", "other"):
            (field.directory / name).write_bytes(bytes(MIB))
        definition = field.definition.replace("machine='pc'", f"machine='{machine}'")
        yield replace(field, definition=definition.replace("<vcpu>1</vcpu>", vcpus))


@MACHINES
def test_what_is_plugged_in_migrates_and_is_unplugged_there(machine: str) -> None:
    with (
        linux_field(machine) as field,
        ferryman.sync.connect(field.uris[0]) as a,
        ferryman.sync.connect(field.uris[1]) as b,
    ):
        domain = a.create(field.definition)
        field.wait_ticks(20)
        bare = machine_of(field.roots[0])
        domain.attach_device(disk(field.directory / "image"))
        domain.attach_device(NET)
        domain.set_vcpus(2)
        assert (domain.info().vcpus, domain.info().max_vcpus) == (2, 3)
        assert [found.target for found in domain.statistics().disks] == ["vdb"]
        assert [found.mac for found in domain.statistics().interfaces] == [MAC]
        before = machine_of(field.roots[0])
        assert "node-vdb" in before[2]

        domain.migrate(b).result()
        field.wait_ticks(20)
        assert machine_of(field.roots[1]) == before
        domain = b.lookup_by_name(NAME)
        assert domain.info().vcpus == 2
        domain.detach_device("<disk><target dev='vdb'/></disk>")
        domain.detach_device(NET)
        with pytest.raises(NotSupportedError, match="without KVM"):
            domain.set_vcpus(1)
        tree, (cpus, _slots), nodes = machine_of(field.roots[1])
        assert (tree, len(cpus), nodes) == (bare[0], 2, bare[2])
        assert record(field.roots[1])["leaving"] == []

        domain.migrate(a).result()
        field.wait_ticks(20)
        assert machine_of(field.roots[0])[0] == bare[0]
        field.assert_unbroken()
        a.lookup_by_name(NAME).destroy()


@MACHINES
def test_what_is_refused_and_what_fails_changes_nothing(machine: str) -> None:
    with linux_field(machine) as field, ferryman.sync.connect(field.uris[0]) as a:
        # Paused, so that nothing but what is refused could change the machine.
        domain = a.create(field.definition, paused=True)
        before, definition = machine_of(field.roots[0]), domain.definition()
        image = field.directory / "image"
        net = NET.replace("'virtio'", "'rtl8139'")
        refused: list[tuple[str, type[FerrymanError], str]] = [
            (disk(field.directory / "missing"), HypervisorError, "No such file"),
            (disk(image).replace("'virtio'", "'scsi'"), DomainStateError, "no free place .*virtio-scsi"),
            (disk(image).replace("</disk>", "<nonsense/></disk>"), DefinitionError, "nonsense"),
            ("<watchdog model='i6300esb'/>", NotSupportedError, "CONFIG"),
            ("<disk", DefinitionError, "not well-formed"),
        ]
        if machine == "q35":
            refused.append((net, HypervisorError, "does not support hotplugging"))
        for wrong, error, match in refused:
            with pytest.raises(error, match=match):
                domain.attach_device(wrong)
        for wrong, match in (
            ("<disk><target dev='vdz'/></disk>", "no <disk> with target vdz"),
            (f"<interface><mac address='{MAC}'/></interface>", f"no <interface> with mac {MAC}"),
            ("<disk/>", "does not say which one"),
        ):
            with pytest.raises(DefinitionError, match=match):
                domain.detach_device(wrong)
        for count in (0, -1, 4):
            with pytest.raises(OptionError):
                domain.set_vcpus(count)
        for scope in (Scope.CONFIG, Scope.BOTH):
            with pytest.raises(DomainStateError, match="transient"):
                domain.set_vcpus(2, scope)
            with pytest.raises(DomainStateError, match="transient"):
                domain.attach_device(disk(image), scope)
        assert machine_of(field.roots[0]) == before
        assert domain.definition() == definition
        assert (record(field.roots[0])["plugging"], record(field.roots[0])["leaving"]) == ("", [])
        domain.destroy()


def test_an_image_that_another_domain_writes() -> None:
    with linux_field("pc") as field, ferryman.sync.connect(field.uris[0]) as a:
        image = field.directory / "image"
        domain = a.create(field.definition)
        domain.attach_device(disk(image))
        text = re.sub(r"(?s)<uuid>.*</uuid>|<serial.*</serial>", "", field.definition)
        other = a.create(text.replace(f">{NAME}<", ">other<"))
        with pytest.raises(HypervisorError, match="lock"):
            other.attach_device(disk(image))
        other.attach_device(disk(field.directory / "other"))
        other.destroy()
        domain.destroy()


def test_root_ports_run_out() -> None:
    with linux_field("q35") as field, ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        for number in range(4):
            domain.attach_device(NET.replace(MAC, f"52:54:00:00:00:0{number}"))
        with pytest.raises(DomainStateError, match="no free place .*pcie-root-port"):
            domain.attach_device(NET)
        domain.destroy()


def test_definitions_and_guests_by_their_scope() -> None:
    with linux_field("q35") as field, ferryman.sync.connect(field.uris[0]) as a:
        image = field.directory / "image"
        domain = a.define(field.definition)
        with pytest.raises(DomainStateError, match="shut off"):
            domain.attach_device(NET, Scope.LIVE)
        domain.attach_device(disk(image))
        domain.attach_device("<rng model='virtio'><backend model='builtin'/></rng>")
        domain.set_vcpus(2)
        assert domain.info().vcpus == 2
        domain.start()
        field.wait_ticks(20)
        assert len(machine_of(field.roots[0])[1][0]) == 2
        assert "node-vdb" in machine_of(field.roots[0])[2]
        domain.attach_device("<interface type='user'><model type='virtio'/></interface>", Scope.BOTH)
        (mac,) = [found.mac for found in domain.statistics().interfaces]
        with pytest.raises(DefinitionError, match="vdb"):
            domain.attach_device(disk(field.directory / "other"), Scope.CONFIG)
        domain.detach_device("<rng><alias name='rng0'/></rng>", Scope.CONFIG)
        assert "<rng" in domain.definition()
        domain.detach_device(disk(image), Scope.BOTH)
        domain.set_vcpus(3, Scope.BOTH)
        domain.destroy()
        text = domain.definition()
        assert ("<rng" in text, "vdb" in text, mac in text, 'current="3"' in text) == (
            False,
            False,
            True,
            True,
        )
        domain.undefine()


def test_a_guest_that_does_not_let_go() -> None:
    with (
        linux_field("pc") as field,
        ferryman.sync.connect(field.uris[0]) as a,
        ferryman.sync.connect(field.uris[1]) as b,
    ):
        domain = a.create(field.definition)
        domain.attach_device(disk(field.directory / "image"))
        field.wait_ticks(20)
        domain.suspend()
        for _time in range(2):
            with pytest.raises(HypervisorError, match="does not let go of disk-vdb"):
                domain.detach_device("<disk><target dev='vdb'/></disk>", timeout_s=0.2)
        assert [found.target for found in domain.statistics().disks] == ["vdb"]
        with pytest.raises(PlanBlockedError, match="disk-vdb"):
            domain.migrate(b).result()
        with pytest.raises(DomainStateError, match="being changed"):
            domain.save(field.directory / "saved")
        # It lets go of it when it runs, and nobody waits for that any more.
        with a.events() as seen:
            domain.resume()
            next(iter(seen))
        while record(field.roots[0])["leaving"]:
            field.wait_ticks(1)
        assert domain.statistics().disks == ()
        assert machine_of(field.roots[0])[2] == []

        # And a reset takes away what it has not let go of.
        domain.attach_device(disk(field.directory / "image"))
        domain.suspend()
        with pytest.raises(HypervisorError, match="a reset takes it away"):
            domain.detach_device("<disk><target dev='vdb'/></disk>", timeout_s=0.2)
        domain.reset()
        while record(field.roots[0])["leaving"]:
            domain.info()
        assert domain.statistics().disks == ()
        domain.destroy()


def test_what_could_not_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is settled by whoever opens the root next, by what the machine has."""
    with linux_field("pc") as field:
        kept: list[Any] = []
        write = Guest.write

        def forget(guest: Guest, record: Any) -> None:
            if kept and not record.plugging:
                raise HypervisorError("no room for it")
            kept.append(record)
            write(guest, record)

        with ferryman.sync.connect(field.uris[0]) as a:
            domain = a.create(field.definition)
            field.wait_ticks(20)
        for device, here in (
            (disk(field.directory / "image"), True),
            (disk(field.directory / "missing"), False),
        ):
            with ferryman.sync.connect(field.uris[0]) as a, monkeypatch.context() as patch:
                kept.clear()
                patch.setattr(Guest, "write", forget)
                with pytest.raises(HypervisorError):
                    a.lookup_by_name(NAME).attach_device(device)
            assert record(field.roots[0])["plugging"]
            with ferryman.sync.connect(field.uris[0]) as a:
                domain = a.lookup_by_name(NAME)
                while record(field.roots[0])["plugging"]:
                    field.wait_ticks(1)
                assert [found.target for found in domain.statistics().disks] == ["vdb"] * here
                if here:
                    domain.detach_device(device)
        with ferryman.sync.connect(field.uris[0]) as a:
            a.lookup_by_name(NAME).destroy()


@pytest.mark.parametrize("queues", [1, 3])
def test_an_interface_on_a_tap(queues: int) -> None:
    tap = f"fhp{os.getpid()}"
    driver = f"<driver name='qemu' queues='{queues}'/>" if queues > 1 else "<driver name='qemu'/>"
    interface = (
        f"<interface type='ethernet'><mac address='{MAC}'/><target dev='{tap}'/><model type='virtio'/>"
        f"{driver}</interface>"
    )
    need("the right to make taps", here=os.geteuid() == 0 and Path("/dev/net/tun").exists())
    with linux_field("pc") as field, ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        # Refused by the machine when all that stands behind it is there.
        with pytest.raises(HypervisorError, match="romfile|nonsense"):
            domain.attach_device(interface.replace("<model", "<rom file='/nonsense'/><model"))
        assert not Path(f"/sys/class/net/{tap}").exists()
        domain.attach_device(interface)
        assert Path(f"/sys/class/net/{tap}").exists()
        assert [found.target for found in domain.statistics().interfaces] == [tap]
        domain.detach_device(f"<interface><mac address='{MAC.upper()}'/></interface>")
        assert not Path(f"/sys/class/net/{tap}").exists()
        # The kernel names it, and it is counted by that name.
        domain.attach_device(interface.replace(f"<target dev='{tap}'/>", ""))
        (counted,) = domain.statistics().interfaces
        assert counted.target.startswith("ferry")
        assert Path(f"/sys/class/net/{counted.target}").exists()
        assert (counted.mac, counted.rx_drops) == (MAC.lower(), 0)
        assert counted.tx_bytes is not None
        domain.destroy()


@MACHINES
def test_a_processor_is_let_go_of(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with KVM; without it the guest is not to be migrated or looked at afterwards."""
    monkeypatch.setattr(hotplug, "_require_unpluggable", lambda *_: None)
    with linux_field(machine) as field, ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        before = machine_of(field.roots[0])
        domain.set_vcpus(3)
        domain.suspend()
        monkeypatch.setattr(hotplug, "_VCPU_PATIENCE_S", 0.2)
        with pytest.raises(HypervisorError, match="does not let go of /machine"):
            domain.set_vcpus(1)
        assert (domain.info().vcpus, len(record(field.roots[0])["leaving"])) == (3, 1)
        domain.resume()
        monkeypatch.undo()
        monkeypatch.setattr(hotplug, "_require_unpluggable", lambda *_: None)
        domain.set_vcpus(1)
        assert domain.info().vcpus == 1
        assert record(field.roots[0])["leaving"] == []
        field.wait_ticks(20)
        assert machine_of(field.roots[0]) == before
        domain.destroy()
