"""The driver of the scheme ``qemu``."""

from __future__ import annotations

import os
import platform

import anyio
import anyio.to_thread

from ferryman.capabilities import Capabilities
from ferryman.hookspecs import (
    HostRequest,
    OpenReply,
    OpenRequest,
    hookimpl,
)
from ferryman.types import (
    Feature,
)
from ferryman_qemu.checks import CheckHooks
from ferryman_qemu.domains import DomainHooks
from ferryman_qemu.guest import Guest
from ferryman_qemu.migrations import MigrationHooks
from ferryman_qemu.probe import find_emulator, host_cpu, probe
from ferryman_qemu.root import Root, root_of


class QemuDriver(DomainHooks, CheckHooks, MigrationHooks):
    """Driver of the scheme ``qemu``."""

    @hookimpl
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        path = root_of(request.uri)
        binary = find_emulator()
        root = await Root.open(path)
        try:
            self._emulator = await anyio.to_thread.run_sync(probe, binary, root.path / "probe.json")
            self._root, self._tasks, self._emit = root, request.tasks, request.emit
            self._defined = root.definitions()
            for run in root.run_directories():
                guest = await Guest.find(
                    run, tasks=request.tasks, ended=self._guest_ended, happened=self._guest_event
                )
                if guest is not None:
                    self._take(guest)
        except BaseException:
            root.close()
            raise
        return OpenReply(journal=root.journal, address=request.uri.render())

    @hookimpl
    async def connection_close(self, request: HostRequest) -> None:
        self._root.close()

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
            features=frozenset(Feature) - {Feature.POSTCOPY},
            uri_transports=("tcp", "unix"),
            domain_types=("kvm", "qemu") if self._emulator.kvm else ("qemu",),
        )
