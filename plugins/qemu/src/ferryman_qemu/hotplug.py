"""The driver of QEMU: hooks that plug and unplug devices and processors.

::

    plug      record: plugging  ->  back ends, device  ->  record: the new definition
    unplug    record: leaving   ->  device_del  ...  the guest lets go  ->  back ends  ->  record: the new definition

What is under way is written down before QEMU is told of it, and settled by asking QEMU what it has: after a failure,
after a crash of the program, and when a guest lets go of a device long after it was asked to.

INVARIANT: the definition in the record is what the machine has, or the record says what may differ from it.  A
migration builds its receiver from that definition, and QEMU overlooks a device too many there; so a domain with
something under way is neither migrated nor saved.

Source: QEMU 7.2 qapi/qdev.json, qapi/machine.json, docs/system/cpu-hotplug.rst; and tried out: a reset takes away what
the guest has not let go of, and no event tells of it.
"""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.definition import definition_error, from_root, parse_xml
from ferryman.errors import (
    DefinitionError,
    DomainStateError,
    HypervisorError,
    NotSupportedError,
    OptionError,
)
from ferryman.hookspecs import AttachRequest, DetachRequest, VcpusRequest, hookimpl
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import read_machine, read_pinned
from ferryman_qemu.machine.build import disk_device, disk_nodes, network_backend, network_device
from ferryman_qemu.machine.model import Disk, Interface
from ferryman_qemu.monitor import Command, MonitorError, QMPCommandError
from ferryman_qemu.site import LocalSite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ferryman.definition import Definition
    from ferryman.types import DomainUUID
    from ferryman_qemu.guest import Guest
    from ferryman_qemu.machine import Machine
    from ferryman_qemu.monitor import EventStream
    from ferryman_qemu.qmp import Event

_log = logging.getLogger(__name__)

_PLUGGABLE = ("disk", "interface")
_VCPU_PATIENCE_S = 30.0
"""How long the guest may take to let go of one processor."""

_REFUSED = "DEVICE_UNPLUG_GUEST_ERROR"
_SETTLED_AFTER = ("DEVICE_DELETED", "RESET")


class HotplugHooks(QemuHost):
    """Hooks that plug and unplug."""

    @hookimpl
    async def domain_attach(self, request: AttachRequest) -> None:
        element = read_device(request.definition)
        with self._changing(request.uuid, request.name) as running:
            live = request.scope.reaches_guest(active=running is not None)
            config = request.scope.reaches_definition(active=running is not None)
            guest = self._pluggable(request, element) if live else None
            edited: Machine | None = None
            if config:
                edited = self._with_device(self._persistent(request.uuid, request.name), element)
                if element.tag == "interface" and element.find("mac") is None:
                    # The guest keeps its address at the next start.
                    element.append(element.makeelement("mac", address=edited.interfaces[-1].mac))
            if guest is not None:
                async with guest.lock:
                    await self._settle_devices(guest)
                    await self._plug(guest, element)
            if edited is not None:
                self._keep_definition(edited.definition)

    @hookimpl
    async def domain_detach(self, request: DetachRequest) -> None:
        element = read_device(request.definition)
        with self._changing(request.uuid, request.name) as running:
            live = request.scope.reaches_guest(active=running is not None)
            config = request.scope.reaches_definition(active=running is not None)
            guest = self._pluggable(request, element) if live else None
            edited: Machine | None = None
            if config:
                definition = self._persistent(request.uuid, request.name).definition
                text = without(definition, find_device(definition, element)).render()
                edited = self._pin(read_machine(text))
            if guest is not None:
                with self._leaving(guest) as events:
                    async with guest.lock:
                        await self._settle_devices(guest)
                        found = find_device(read_pinned(guest.record.definition).definition, element)
                        name = str(found.find("alias").get("name"))
                        await _ask_to_leave(guest, name)
                    await self._wait_left(guest, name, events, request.timeout_s)
            if edited is not None:
                self._keep_definition(edited.definition)

    @hookimpl
    async def domain_set_vcpus(self, request: VcpusRequest) -> None:
        with self._changing(request.uuid, request.name) as running:
            live = request.scope.reaches_guest(active=running is not None)
            config = request.scope.reaches_definition(active=running is not None)
            guest = self._active(request.uuid, request.name) if live else None
            if guest is not None:
                _require_ours(guest)
            edited: Definition | None = None
            if config:
                machine = self._persistent(request.uuid, request.name)
                _require_room(machine, request.count)
                edited = self._pin(
                    read_machine(with_vcpus(machine.definition, request.count).render())
                ).definition
            if guest is not None:
                machine = read_pinned(guest.record.definition)
                _require_room(machine, request.count)
                _require_unpluggable(machine, request.count)
                await self._set_live_vcpus(guest, request.count)
            if edited is not None:
                self._keep_definition(edited)

    # What is changed, and who may not change it meanwhile

    @contextmanager
    def _changing(self, uuid: DomainUUID, name: str) -> Iterator[Guest | None]:
        """Keep migrations and saves of a guest away for the length of a block; None is a domain that is shut off."""
        guest = self._guests.get(uuid)
        if guest is None:
            if uuid not in self._defined:
                self._active(uuid, name)
            yield None
            return
        if guest.saving:
            raise DomainStateError(f"domain {name} is being saved: wait for it", domain=name)
        # INVARIANT: from here on no migration of it begins, and none has begun: the core has just looked.
        guest.changing += 1
        try:
            yield guest
        finally:
            guest.changing -= 1

    def _pluggable(self, request: AttachRequest | DetachRequest, element: Any) -> Guest:
        guest = self._active(request.uuid, request.name)
        if element.tag not in _PLUGGABLE:
            raise NotSupportedError(
                f"a guest that runs keeps its devices but for {' and '.join(f'<{tag}>' for tag in _PLUGGABLE)}:"
                f" change <{element.tag}> with the scope CONFIG"
            )
        _require_ours(guest)
        return guest

    def _with_device(self, machine: Machine, element: Any) -> Machine:
        root: Any = copy.deepcopy(machine.definition.root)
        root.find("devices").append(copy.deepcopy(element))
        return self._pin(read_machine(from_root(root).render()))

    # Plugging

    async def _plug(self, guest: Guest, element: Any) -> None:
        before = read_pinned(guest.record.definition)
        after = self._with_device(before, element)
        name = guest.record.name
        if len(after.controllers) > len(before.controllers):
            added = next(c for c in after.controllers if c not in before.controllers)
            kind, missing = added.kind, added.model or added.kind
            raise DomainStateError(
                f"domain {name} has no free place for <{element.tag}>, and a machine that runs gets no {missing}:"
                f" unplug a device, or define it with another <controller type='{kind}'> and start it again",
                domain=name,
            )
        (device,) = _added(before, after)
        guest.write(replace(guest.record, plugging=after.definition.render()))
        try:
            with anyio.CancelScope(shield=True):
                taps = await self._give(guest, after, device)
        except (MonitorError, HypervisorError) as error:
            await self._settle_late(guest, locked=True)
            raise HypervisorError(
                f"{device.alias} could not be plugged into domain {name}: {error}"
            ) from error
        record = guest.record
        guest.write(
            replace(record, definition=after.definition.render(), plugging="", taps={**record.taps, **taps})
        )

    async def _give(self, guest: Guest, machine: Machine, device: Disk | Interface) -> dict[str, str]:
        """Give QEMU a device and what stands behind it; returns the names of taps that were made."""
        execute = guest.control.execute
        if isinstance(device, Disk):
            for node in disk_nodes(device):
                await execute("blockdev-add", node)
            await execute("device_add", disk_device(machine, device))
            return {}
        site = LocalSite(
            self._root,
            guest.run,
            emulator="",
            incoming=False,
            uuid=guest.record.uuid,
            name=guest.record.name,
        )
        with site:
            taps, vhosts = site.tap(device)
            backend = network_backend(device, taps, vhosts)
            names = _descriptor_names(device)
            for key, descriptors in (("fd", taps), ("vhostfd", vhosts)):
                for number, descriptor in enumerate(descriptors):
                    command = Command("getfd", {"fdname": names[key][number]}, [descriptor])
                    await guest.control.execute_all([command])
                if descriptors:
                    plural = len(descriptors) > 1
                    backend[f"{key}s" if plural else key] = ":".join(names[key][: len(descriptors)])
        await execute("netdev_add", backend)
        await execute("device_add", network_device(machine, device))
        if not device.link:
            await execute("set_link", {"name": device.alias, "up": False})
        return site.taps

    async def _set_live_vcpus(self, guest: Guest, count: int) -> None:
        with self._leaving(guest) as events:
            async with guest.lock:
                await self._settle_devices(guest)
                slots = sorted(await guest.command("query-hotpluggable-cpus"), key=_place)
                here = [slot for slot in slots if "qom-path" in slot]
                free = [slot for slot in slots if "qom-path" not in slot]
                if count > len(here):
                    await self._plug_vcpus(guest, free[: count - len(here)], count)
            for slot in reversed(here[count:]):
                path = str(slot["qom-path"])
                async with guest.lock:
                    await _ask_to_leave(guest, path)
                await self._wait_left(guest, path, events, _VCPU_PATIENCE_S)

    async def _plug_vcpus(self, guest: Guest, slots: Sequence[dict[str, Any]], count: int) -> None:
        """Plug processors in, in their order, as a machine that is started with so many has them."""
        definition = with_vcpus(read_pinned(guest.record.definition).definition, count)
        guest.write(replace(guest.record, plugging=definition.render()))
        try:
            with anyio.CancelScope(shield=True):
                for slot in slots:
                    await guest.control.execute("device_add", {"driver": slot["type"], **slot["props"]})
        except MonitorError as error:
            await self._settle_late(guest, locked=True)
            raise HypervisorError(
                f"domain {guest.record.name} did not get {count} processors: {error}"
            ) from error
        guest.write(replace(guest.record, definition=definition.render(), plugging=""))

    # Unplugging

    def _leaving(self, guest: Guest) -> EventStream:
        """What tells that a guest has let go of something, from before it is asked to."""
        return guest.control.events(_REFUSED, *_SETTLED_AFTER)

    async def _wait_left(self, guest: Guest, name: str, events: EventStream, timeout_s: float) -> None:
        """Wait until a guest has let go of a device. :raises HypervisorError: it has not."""
        domain = guest.record.name
        try:
            with anyio.move_on_after(timeout_s):
                while name in guest.record.leaving:
                    event = await events.get()
                    with anyio.CancelScope(shield=True):
                        async with guest.lock:
                            if event.name == _REFUSED and name in event.data.values():
                                _stays(guest, name)
                                raise HypervisorError(
                                    f"the guest of domain {domain} refuses to let go of {name}"
                                )
                            await self._settle_devices(guest)
        except MonitorError as error:
            raise HypervisorError(str(error)) from error
        if name in guest.record.leaving:
            raise HypervisorError(
                f"the guest of domain {domain} does not let go of {name} within {timeout_s:g} s:"
                " it still has it; a reset takes it away"
            )

    # Settling

    def _guest_event(self, guest: Guest, event: Event) -> None:
        super()._guest_event(guest, event)
        if event.name in _SETTLED_AFTER and guest.record.leaving:
            self._tasks.start_soon(self._settle_late, guest)

    async def _settle_late(self, guest: Guest, *, locked: bool = False) -> None:
        """Settle what a guest has let go of by itself, or what has failed."""
        try:
            with anyio.CancelScope(shield=True):
                if locked:
                    await self._settle_devices(guest)
                    return
                async with guest.lock:
                    await self._settle_devices(guest)
        except HypervisorError as error:
            if not await guest.is_ending():
                _log.warning("devices of domain %s could not be settled: %s", guest.record.name, error)

    async def _settle_devices(self, guest: Guest) -> None:
        """Make the record say what the machine has, and end what stands behind devices that it has not.

        :raises HypervisorError: QEMU does not say what it has; the record still tells what may differ.
        """
        record = guest.record
        if not record.plugging and not record.leaving:
            return
        listed, slots = await guest.command_all(
            Command("qom-list", {"path": "/machine/peripheral"}), Command("query-hotpluggable-cpus")
        )
        here = {str(slot["qom-path"]) for slot in slots if "qom-path" in slot}
        present = here | {str(entry["name"]) for entry in listed}
        machine = read_pinned(record.definition)
        if record.plugging:
            wanted = read_pinned(record.plugging)
            for device in _added(machine, wanted):
                if device.alias in present:
                    machine = wanted
                else:
                    await _end_backends(guest, device)
        definition = machine.definition
        for device in _pluggable_devices(machine):
            if device.alias in record.leaving and device.alias not in present:
                await _end_backends(guest, device)
                definition = without(definition, find_alias(definition, device.alias))
        definition = with_vcpus(definition, len(here))
        guest.write(
            replace(
                record,
                definition=definition.render(),
                plugging="",
                leaving=[name for name in record.leaving if name in present],
            )
        )


async def _ask_to_leave(guest: Guest, name: str) -> None:
    """Ask the guest to let go of a device, or again. :raises HypervisorError: QEMU refuses; nothing is changed."""
    again = name in guest.record.leaving
    if not again:
        guest.write(replace(guest.record, leaving=[*guest.record.leaving, name]))
    try:
        with anyio.CancelScope(shield=True):
            await guest.control.execute("device_del", {"id": name})
    except QMPCommandError as error:
        if again:
            return  # QEMU says that it has been asked already
        _stays(guest, name)
        raise HypervisorError(str(error)) from error
    except MonitorError as error:
        raise HypervisorError(str(error)) from error


def _stays(guest: Guest, name: str) -> None:
    guest.write(replace(guest.record, leaving=[other for other in guest.record.leaving if other != name]))


async def _end_backends(guest: Guest, device: Disk | Interface) -> None:
    """End what stands behind a device that the machine does not have."""
    commands: list[tuple[str, dict[str, Any]]] = []
    if isinstance(device, Disk):
        commands = [
            ("blockdev-del", {"node-name": node["node-name"]}) for node in reversed(disk_nodes(device))
        ]
    else:
        commands = [("netdev_del", {"id": f"host-{device.alias}"})]
        if device.kind != "user":
            commands += [
                ("closefd", {"fdname": name})
                for names in _descriptor_names(device).values()
                for name in names
            ]
    for command, arguments in commands:
        try:
            await guest.control.execute(command, arguments)
        except QMPCommandError as error:
            _log.debug("%s was not there: %s", arguments, error)
        except MonitorError as error:
            raise HypervisorError(str(error)) from error


def _descriptor_names(interface: Interface) -> dict[str, list[str]]:
    """What the descriptors of an interface are called between ``getfd`` and their use."""
    count = interface.queues or 1
    return {
        key: [f"{key}-{interface.alias}-{number}" for number in range(count)] for key in ("fd", "vhostfd")
    }


def _added(before: Machine, after: Machine) -> list[Disk | Interface]:
    known = {device.alias for device in before.devices}
    return [device for device in _pluggable_devices(after) if device.alias not in known]


def _pluggable_devices(machine: Machine) -> tuple[Disk | Interface, ...]:
    return (*machine.disks, *machine.interfaces)


def _place(slot: dict[str, Any]) -> tuple[int, ...]:
    """A processor's place: a machine is started with the first ones."""
    return tuple(int(slot["props"].get(f"{part}-id", 0)) for part in ("socket", "die", "core", "thread"))


def _require_ours(guest: Guest) -> None:
    if guest.record.attached:
        raise NotSupportedError(
            f"domain {guest.record.name} was started by another program, which alone knows what it is made of"
        )


def _require_room(machine: Machine, count: int) -> None:
    if count > machine.max_vcpus:
        raise OptionError(
            f"domain {machine.definition.name} has room for {machine.max_vcpus} processors, less than {count}",
            option="count",
        )


def _require_unpluggable(machine: Machine, count: int) -> None:
    """Refuse to take processors from a guest that is emulated.

    A processor that is gone is still told of every look at the written pages, and whoever looks then waits for it for
    ever: a migration, or a display (QEMU 7.2, accel/tcg and softmmu/physmem.c, tcg_log_global_after_sync).
    """
    if count < machine.vcpus and not machine.accelerated:
        raise NotSupportedError(
            f"domain {machine.definition.name} runs without KVM, where QEMU does not survive the loss of a processor:"
            " change the number with the scope CONFIG"
        )


# Definitions


def read_device(text: str) -> Any:
    """Read one device. :raises DefinitionError: it is not well-formed."""
    return parse_xml(text)


def find_device(definition: Definition, device: Any) -> Any:
    """Find the element of a definition that a device means.

    :raises DefinitionError: there is none, there are several, or the device says too little.
    """
    wanted = {key: value for key in _KEYS if (value := _said(device, key))}
    own = _OWN_KEYS.get(str(device.tag))
    wanted = {key: value for key, value in wanted.items() if key in (own, _ALIAS)}
    if not wanted:
        ways = " or ".join(f"<{tag} {name}='…'/>" for tag, name in (*([own] if own else []), _ALIAS))
        raise definition_error(device, f"<{device.tag}> does not say which one it is: write {ways} into it")
    found = [
        element
        for element in definition.root.findall(f"devices/{device.tag}")
        if all(_said(element, key) == value for key, value in wanted.items())
    ]
    said = " and ".join(f"{tag} {value}" for (tag, _), value in wanted.items())
    if not found:
        raise DefinitionError(f"domain {definition.name} has no <{device.tag}> with {said}")
    if len(found) > 1:
        raise DefinitionError(
            f"domain {definition.name} has {len(found)} <{device.tag}> with {said}: write its <alias name='…'/>"
        )
    return found[0]


_ALIAS = ("alias", "name")
_OWN_KEYS = {"disk": ("target", "dev"), "interface": ("mac", "address")}
_KEYS = (*_OWN_KEYS.values(), _ALIAS)
"""Child and attribute that tell devices from others of their kind."""


def _said(element: Any, key: tuple[str, str]) -> str:
    child = element.find(key[0])
    value = "" if child is None else str(child.get(key[1], ""))
    return value.lower() if key[0] == "mac" else value


def find_alias(definition: Definition, alias: str) -> Any:
    """Find the element of an alias that the definition has."""
    return next(e for e in definition.root.iterfind("devices/*") if _said(e, _ALIAS) == alias)


def without(definition: Definition, element: Any) -> Definition:
    """A definition without one of the devices that it has."""
    root: Any = copy.deepcopy(definition.root)
    devices = root.find("devices")
    devices.remove(devices[list(element.getparent()).index(element)])
    return from_root(root)


def with_vcpus(definition: Definition, count: int) -> Definition:
    """A definition with another number of processors, up to its limit."""
    element: Any = definition.root.find("vcpu")
    if element is None or int(element.get("current", definition.vcpus)) == count:
        return definition
    root: Any = copy.deepcopy(definition.root)
    root.find("vcpu").set("current", str(count))
    return from_root(root)
