"""The driver of QEMU: hooks over domains."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from ferryman.errors import (
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
)
from ferryman.hookspecs import (
    DefinitionRequest,
    DomainRequest,
    HostRequest,
    LookupRequest,
    hookimpl,
)
from ferryman.types import (
    DomainEventKind,
    DomainInfo,
    DomainStatistics,
)
from ferryman_qemu.commandline import (
    read_machine,
    read_pinned,
)
from ferryman_qemu.host import QemuHost


class DomainHooks(QemuHost):
    """Hooks that list, define, start and change domains."""

    @hookimpl
    async def domain_list(self, request: HostRequest) -> list[DomainInfo]:
        found = []
        for uuid in dict.fromkeys([*self._guests, *self._defined]):
            with suppress(DomainNotFoundError):  # a transient one may end while the others are asked
                found.append(await self._info(uuid))
        return found

    @hookimpl
    async def domain_lookup(self, request: LookupRequest) -> DomainInfo:
        if request.uuid is not None:
            return await self._info(request.uuid)
        for uuid, guest in self._guests.items():
            if guest.record.name == request.name:
                return await self._info(uuid)
        for uuid, definition in self._defined.items():
            if read_pinned(definition).definition.name == request.name:
                return await self._info(uuid)
        raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name or "")

    @hookimpl
    async def domain_define(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        self._root.write_definition(definition.uuid, definition.render())
        self._defined[definition.uuid] = definition.render()
        self._tell(DomainEventKind.DEFINED, definition.name, definition.uuid)
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_create(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        if definition.uuid in self._guests or definition.uuid in self._reserved:
            raise DomainExistsError(f"domain {definition.name} is active already", domain=definition.name)
        await self._start(machine, persistent=definition.uuid in self._defined, paused=request.paused)
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_start(self, request: DomainRequest) -> DomainInfo:
        if request.uuid in self._guests or request.uuid in self._reserved:
            raise DomainStateError(f"domain {request.name} is active already", domain=request.name)
        text = self._defined.get(request.uuid)
        if text is None:
            raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name)
        await self._start(self._pin(read_machine(text)), persistent=True, paused=request.paused)
        return await self._info(request.uuid)

    @hookimpl
    async def domain_suspend(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("stop")

    @hookimpl
    async def domain_resume(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("cont")

    @hookimpl
    async def domain_shutdown(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("system_powerdown")

    @hookimpl
    async def domain_destroy(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        guest.ending = "destroyed"
        with anyio.CancelScope(shield=True):
            await guest.kill()

    @hookimpl
    async def domain_undefine(self, request: DomainRequest) -> None:
        if request.uuid not in self._defined:
            await self._info(request.uuid)
            raise DomainStateError(
                f"domain {request.name} is transient: it has no definition", domain=request.name
            )
        self._undefine(request.uuid, request.name)

    @hookimpl
    async def domain_definition(self, request: DomainRequest) -> str:
        guest = self._guests.get(request.uuid)
        if guest is not None:
            return guest.record.definition
        if request.uuid not in self._defined:
            raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name)
        return self._defined[request.uuid]

    @hookimpl
    async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
        guest = self._guests.get(request.uuid)
        if guest is None:
            return DomainStatistics(state=(await self._info(request.uuid)).state)
        cpu_s: float | None = None
        resident: int | None = None
        with suppress(OSError, IndexError, ValueError):  # the process may end while we read about it
            fields = Path(f"/proc/{guest.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return DomainStatistics(state=await guest.state(), cpu_time_s=cpu_s, resident_bytes=resident)
