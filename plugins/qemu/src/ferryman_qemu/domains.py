"""The driver of QEMU: hooks over domains."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from ferryman.errors import (
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    HypervisorError,
    OptionError,
)
from ferryman.hookspecs import (
    AutostartRequest,
    DefinitionRequest,
    DomainRequest,
    HostRequest,
    LookupRequest,
    MemoryRequest,
    ShutdownRequest,
    hookimpl,
)
from ferryman.types import (
    DomainEventKind,
    DomainInfo,
)
from ferryman_qemu.agent import shut_down_by_agent
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import (
    read_machine,
    read_pinned,
)
from ferryman_qemu.monitor import MonitorError, QMPCommandError
from ferryman_qemu.power import Wishes, ask_reboot, forget_reboot, read_wishes

if TYPE_CHECKING:
    from ferryman.definition import Definition
    from ferryman_qemu.guest import Guest


class DomainHooks(QemuHost):
    """Hooks that list, define, start and change domains."""

    @hookimpl
    async def domain_list(self, request: HostRequest) -> list[DomainInfo]:
        async with self._seen():
            found = []
            for uuid in dict.fromkeys([*self._guests, *self._defined]):
                with suppress(DomainNotFoundError):  # a transient one may end while the others are asked
                    found.append(await self._info(uuid))
            return found

    @hookimpl
    async def domain_lookup(self, request: LookupRequest) -> DomainInfo:
        async with self._seen():
            if request.uuid is not None:
                return await self._info(request.uuid)
            for uuid, guest in self._guests.items():
                if guest.record.name == request.name:
                    return await self._info(uuid)
            for uuid, definition in self._defined.items():
                if read_pinned(definition).definition.name == request.name:
                    return await self._info(uuid)
            raise DomainNotFoundError(
                f"no domain {request.name} in {self._root.path}", domain=request.name or ""
            )

    @hookimpl
    async def domain_define(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        self._keep_definition(definition)
        self._tell(DomainEventKind.DEFINED, definition.name, definition.uuid)
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_create(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        if definition.uuid in self._guests or definition.uuid in self._reserved:
            raise DomainExistsError(f"domain {definition.name} is active already", domain=definition.name)
        await self._start(
            machine,
            persistent=definition.uuid in self._defined,
            paused=request.paused,
            autodestroy=request.autodestroy,
        )
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_start(self, request: DomainRequest) -> DomainInfo:
        if request.uuid in self._guests or request.uuid in self._reserved:
            raise DomainStateError(f"domain {request.name} is active already", domain=request.name)
        text = self._defined.get(request.uuid)
        if text is None:
            raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name)
        await self._start(
            self._pin(read_machine(text)),
            persistent=True,
            paused=request.paused,
            autodestroy=request.autodestroy,
        )
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
    async def domain_shutdown(self, request: ShutdownRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await forget_reboot(guest, self._wishes(guest))
        if not await shut_down_by_agent(guest, request.mode, "powerdown"):
            async with guest.lock:
                await guest.command("system_powerdown")

    @hookimpl
    async def domain_reboot(self, request: ShutdownRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await forget_reboot(guest, self._wishes(guest))
        if not await shut_down_by_agent(guest, request.mode, "reboot"):
            async with guest.lock:
                await ask_reboot(guest)

    @hookimpl
    async def domain_reset(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("system_reset")

    @hookimpl
    async def domain_autostart(self, request: AutostartRequest) -> None:
        self._persistent(request.uuid, request.name)
        self._root.set_autostart(request.uuid, enabled=request.enabled)

    @hookimpl
    async def domain_set_memory(self, request: MemoryRequest) -> None:
        info = await self._info(request.uuid)
        live = request.scope.reaches_guest(active=info.state.active)
        config = request.scope.reaches_definition(active=info.state.active)
        edited: Definition | None = None
        if request.memory_bytes > info.memory_bytes:
            raise OptionError(
                f"domain {request.name} has {info.memory_bytes} bytes of memory, less than {request.memory_bytes}",
                option="memory_bytes",
            )
        if config:
            definition = self._persistent(request.uuid, request.name).definition
            # Read again, so that nothing is kept that could not be started.
            text = definition.edited(currentMemory=str(-(-request.memory_bytes // 1024))).render()
            edited = read_machine(text).definition
        if live:
            guest = self._active(request.uuid, request.name)
            async with guest.lock:
                await _set_balloon(guest, request.memory_bytes)
        if edited is not None:
            self._keep_definition(edited)

    def _wishes(self, guest: Guest) -> Wishes:
        return read_wishes(read_pinned(guest.record.definition).definition.root)

    @hookimpl
    async def domain_destroy(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        guest.ending = "destroyed"
        with anyio.CancelScope(shield=True):
            await guest.kill()

    @hookimpl
    async def domain_undefine(self, request: DomainRequest) -> None:
        self._persistent(request.uuid, request.name)
        self._undefine(request.uuid, request.name)

    @hookimpl
    async def domain_definition(self, request: DomainRequest) -> str:
        async with self._seen():
            guest = self._guests.get(request.uuid)
            if guest is not None:
                return guest.record.definition
            if request.uuid not in self._defined:
                raise DomainNotFoundError(
                    f"no domain {request.name} in {self._root.path}", domain=request.name
                )
            return self._defined[request.uuid]


async def _set_balloon(guest: Guest, memory_bytes: int) -> None:
    try:
        await guest.control.execute("balloon", {"value": memory_bytes})
    except QMPCommandError as error:
        if error.error_class != "DeviceNotActive":
            raise HypervisorError(str(error)) from error
        raise DomainStateError(
            f"domain {guest.record.name} has no balloon: give it <memballoon model='virtio'/>",
            domain=guest.record.name,
        ) from error
    except MonitorError as error:
        raise HypervisorError(str(error)) from error
