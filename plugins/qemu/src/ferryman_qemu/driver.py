"""The driver of the scheme ``qemu``."""

from __future__ import annotations

import logging
import os
import platform

import anyio
import anyio.to_thread

from ferryman.capabilities import Capabilities
from ferryman.errors import FerrymanError
from ferryman.hookspecs import (
    BootRequest,
    HostRequest,
    OpenReply,
    OpenRequest,
    hookimpl,
)
from ferryman.types import (
    DomainUUID,
    Feature,
)
from ferryman_qemu.attached import AttachHooks
from ferryman_qemu.checks import CheckHooks
from ferryman_qemu.domains import DomainHooks
from ferryman_qemu.guest import Guest
from ferryman_qemu.hotplug import HotplugHooks
from ferryman_qemu.looks import LookHooks
from ferryman_qemu.machine import read_machine
from ferryman_qemu.migrations import MigrationHooks
from ferryman_qemu.probe import find_emulator, host_cpu, probe
from ferryman_qemu.process import boot_id
from ferryman_qemu.root import Root, root_of
from ferryman_qemu.saves import SaveHooks
from ferryman_qemu.tls import find_credentials

_log = logging.getLogger(__name__)

_STARTED_AT_ONCE = 4


class QemuDriver(AttachHooks, DomainHooks, HotplugHooks, SaveHooks, LookHooks, CheckHooks, MigrationHooks):
    """Driver of the scheme ``qemu``."""

    @hookimpl
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        path = root_of(request.uri)
        binary = find_emulator()
        root = Root.open(path)
        try:
            self._emulator = await anyio.to_thread.run_sync(probe, binary, root.path / "probe.json")
            self._root, self._tasks, self._emit = root, request.tasks, request.emit
            if root.held:
                await self._learn()
        except BaseException:
            root.close()
            raise
        return OpenReply(journal=root.journal, address=request.uri.render(), looks_on=not root.held)

    @hookimpl
    async def connection_acquire(self, request: HostRequest) -> None:
        async with self._look_lock:
            await self._root.acquire()
            await self._learn()

    async def _learn(self) -> None:
        """Learn what is in the root, which this program alone changes from now on."""
        self._defined = self._root.definitions()
        self._guests = {}
        for run in self._root.run_directories():
            guest = await Guest.find(
                run,
                log=self._root.log,
                tasks=self._tasks,
                ended=self._guest_ended,
                happened=self._guest_event,
            )
            if guest is None or (guest.record.restoring and not await self._settle_restore(guest)):
                continue
            self._take(guest)
            if guest.unsettled:
                self._tasks.start_soon(self._settle_late, guest)
        await self._end_bound()

    @hookimpl
    async def connection_close(self, request: HostRequest) -> None:
        if self._root.held:
            await self._end_bound()
        self._root.close()

    async def _end_bound(self) -> None:
        """End the guests that end with the program that started them."""
        for guest in list(self._guests.values()):
            if guest.record.autodestroy:
                guest.ending = "destroyed"
                await guest.kill()

    @hookimpl
    async def host_autostart(self, request: BootRequest) -> None:
        self._free = request.admit
        limiter = anyio.CapacityLimiter(_STARTED_AT_ONCE)

        async def start(uuid: DomainUUID) -> None:
            async with limiter:
                await self._start_with_host(uuid, request)

        async with anyio.create_task_group() as tasks:
            for guest in list(self._guests.values()):
                tasks.start_soon(self._settle_guest, guest)
        boot = boot_id()
        if not self._root.has_booted(boot):
            return
        async with anyio.create_task_group() as tasks:
            for uuid in self._defined:
                if self._root.autostart(uuid) and uuid not in self._guests:
                    tasks.start_soon(start, uuid)
        # Last, so that a program that dies before it leaves the rest to the next one.
        self._root.note_boot(boot)

    async def _start_with_host(self, uuid: DomainUUID, request: BootRequest) -> None:
        try:
            machine = self._pin(read_machine(self._defined[uuid]))
            request.admit(uuid, machine.definition.name)
            await self._start(machine, persistent=True, paused=False, detail="autostart")
        except FerrymanError as error:
            _log.error("domain %s could not be started with its host: %s", uuid, error)

    @hookimpl
    async def capabilities(self, request: HostRequest) -> Capabilities:
        return Capabilities(
            scheme="qemu",
            hypervisor="QEMU",
            version=self._emulator.version,
            arch=platform.machine(),
            host_uuid=self._root.uuid,
            cpu_model=host_cpu(),
            machines=tuple(sorted(set(self._emulator.machines.values()))),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            features=self._features(),
            uri_transports=("tcp", "unix"),
            domain_types=("kvm", "qemu") if self._emulator.kvm else ("qemu",),
        )

    def _features(self) -> frozenset[Feature]:
        lacking = set()
        if not self._emulator.postcopy:
            lacking.add(Feature.POSTCOPY)
        if find_credentials(self._root.path / "pki") is None:
            lacking.add(Feature.TLS)
        return frozenset(Feature) - lacking
