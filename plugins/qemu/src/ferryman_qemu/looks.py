"""The driver of QEMU: hooks that look at a guest, talk to what runs in it, and count what it does."""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import DomainNotFoundError, DomainStateError, HypervisorError
from ferryman.hookspecs import (
    AgentRequest,
    ConsoleRequest,
    DirtyRateRequest,
    DomainRequest,
    ScreenshotRequest,
    StatisticsRequest,
    hookimpl,
)
from ferryman.types import (
    DiskStatistics,
    DomainState,
    DomainStatistics,
    DomainUUID,
    InterfaceStatistics,
    Screenshot,
)
from ferryman_qemu.agent import ask_agent
from ferryman_qemu.console import open_console
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import read_pinned
from ferryman_qemu.monitor import Command, MonitorError, QMPCommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import ByteStream

    from ferryman_qemu.guest import Guest
    from ferryman_qemu.machine import Interface
    from ferryman_qemu.machine.model import Disk

_log = logging.getLogger(__name__)

_ANSWER_S = 5.0
"""How long one guest may take to give its counters before the others' are given without them."""

_RATE_PATIENCE_S = 30.0
_RATE_LOOK_S = 0.05
_MIB = 1 << 20


class LookHooks(QemuHost):
    """Hooks that change nothing of a guest by themselves."""

    @hookimpl
    async def domain_screenshot(self, request: ScreenshotRequest) -> Screenshot:
        guest = self._active(request.uuid, request.name)
        if request.screen < 0:
            raise DomainStateError(
                f"domain {request.name} has no screen {request.screen}", domain=request.name
            )
        path = guest.run.path / f"screen-{request.screen}-{os.urandom(4).hex()}.png"
        arguments: dict[str, Any] = {"filename": str(path), "format": "png"}
        if request.screen:
            arguments |= self._screen(guest, request.screen)
        try:
            await guest.control.execute("screendump", arguments)
            return Screenshot(media_type="image/png", data=path.read_bytes())
        except QMPCommandError as error:
            raise DomainStateError(
                f"domain {request.name} has no screen {request.screen} to take a picture of: {error.description}",
                domain=request.name,
            ) from error
        except (MonitorError, OSError) as error:
            raise HypervisorError(f"no picture of domain {request.name} could be taken: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    def _screen(self, guest: Guest, screen: int) -> dict[str, Any]:
        """Device and head of a screen, counted over all video devices."""
        left = screen
        root = read_pinned(guest.record.definition).definition.root
        for number, video in enumerate(root.findall("devices/video")):
            model = video.find("model")
            heads = 1 if model is None else int(model.get("heads", "1"))
            if left < heads:
                alias = video.find("alias")
                return {"device": f"video{number}" if alias is None else alias.get("name"), "head": left}
            left -= heads
        name = guest.record.name
        raise DomainStateError(f"domain {name} has no screen {screen}: see its <video> devices", domain=name)

    @hookimpl
    async def domain_console(self, request: ConsoleRequest) -> ByteStream:
        return await open_console(self._active(request.uuid, request.name), request.device)

    @hookimpl
    async def domain_agent(self, request: AgentRequest) -> object:
        guest = self._active(request.uuid, request.name)
        return await ask_agent(guest, request.command, timeout_s=request.timeout_s)

    @hookimpl
    async def domain_dirty_rate(self, request: DirtyRateRequest) -> int:
        """Measure in whole seconds, at least one, and in whole MiB per second: QEMU knows no others."""
        guest = self._active(request.uuid, request.name)
        if not guest.running:
            raise DomainStateError(
                f"domain {request.name} does not run, and so writes nothing", domain=request.name
            )
        seconds = max(1, math.ceil(request.duration_s))
        await guest.command("calc-dirty-rate", {"calc-time": seconds})
        await anyio.sleep(seconds)
        with anyio.move_on_after(_RATE_PATIENCE_S):
            while (told := await guest.command("query-dirty-rate"))["status"] != "measured":  # noqa: ASYNC110
                # QEMU 7.2 has no event for it.
                await anyio.sleep(_RATE_LOOK_S)
            return int(told["dirty-rate"]) * _MIB
        raise HypervisorError(f"QEMU did not measure domain {request.name} within {_RATE_PATIENCE_S:g} s")

    # Counters

    @hookimpl
    async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
        async with self._seen():
            guest = self._guests.get(request.uuid)
            if guest is None:
                return DomainStatistics(state=(await self._info(request.uuid)).state)
            return await self._count(guest)

    @hookimpl
    async def host_statistics(self, request: StatisticsRequest) -> dict[DomainUUID, DomainStatistics]:
        async with self._seen():
            uuids = request.uuids
            if uuids is None:
                uuids = tuple(dict.fromkeys([*self._guests, *self._defined]))
            found: dict[DomainUUID, DomainStatistics] = {}

            async def count(uuid: DomainUUID, guest: Guest) -> None:
                try:
                    found[uuid] = await self._count(guest)
                except HypervisorError as error:
                    # One that hangs hides neither the others nor what the system knows of it.
                    _log.warning("domain %s does not give its counters: %s", guest.record.name, error)
                    state = DomainState.RUNNING if guest.running else DomainState.PAUSED
                    found[uuid] = DomainStatistics(state=state, **_process_counters(guest))

            async with anyio.create_task_group() as tasks:
                for uuid in uuids:
                    guest = self._guests.get(uuid)
                    if guest is not None:
                        tasks.start_soon(count, uuid, guest)
                    elif uuid in self._defined:
                        found[uuid] = DomainStatistics(state=DomainState.SHUT_OFF)
            return {uuid: found[uuid] for uuid in uuids if uuid in found}

    async def _count(self, guest: Guest) -> DomainStatistics:
        questions = [Command("query-blockstats"), Command("query-block"), Command("query-cpus-fast")]
        try:
            blockstats, blocks, cpus = await guest.control.execute_all(questions, timeout_s=_ANSWER_S)
        except MonitorError as error:
            if await guest.is_ending():
                return await self._count_ended(DomainUUID(guest.record.uuid))
            raise HypervisorError(str(error)) from error
        machine = read_pinned(guest.record.definition)
        return DomainStatistics(
            state=await guest.state(),
            current_memory_bytes=guest.current_memory_bytes,
            vcpu_time_s=_vcpu_times(guest.process.pid, cpus),
            disks=_disks(machine.disks, blocks, blockstats),
            interfaces=tuple(
                _interface(one, guest.record.taps.get(one.alias, "")) for one in machine.interfaces
            ),
            **_process_counters(guest),
        )

    async def _count_ended(self, uuid: DomainUUID) -> DomainStatistics:
        """Counters of a domain whose guest has just ended. :raises DomainNotFoundError: it was transient."""
        if uuid not in self._defined:
            raise DomainNotFoundError(f"no domain with uuid {uuid} in {self._root.path}", domain=uuid)
        return DomainStatistics(state=DomainState.SHUT_OFF)


def _process_counters(guest: Guest) -> dict[str, Any]:
    """What the system knows of a process; nothing of one that ends while we read about it."""
    with suppress(OSError, IndexError, ValueError):
        stat = Path(f"/proc/{guest.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return {
            "cpu_time_s": (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
            "resident_bytes": int(stat[21]) * os.sysconf("SC_PAGE_SIZE"),
        }
    return {}


def _vcpu_times(pid: int, cpus: list[dict[str, Any]]) -> tuple[float, ...]:
    """Time of each virtual processor's thread, in their order; nothing where one cannot be read.

    :source: Linux Documentation/scheduler/sched-stats.rst, ``/proc/PID/schedstat``: nanoseconds on the processor.
    """
    try:
        return tuple(
            int(Path(f"/proc/{pid}/task/{cpu['thread-id']}/schedstat").read_text().split()[0]) / 1e9
            for cpu in sorted(cpus, key=lambda cpu: int(cpu["cpu-index"]))
        )
    except (OSError, IndexError, ValueError):
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drive:
    """What QEMU says of one drive, by its two answers."""

    block: dict[str, Any]
    counters: dict[str, Any]

    @property
    def image(self) -> dict[str, Any]:
        inserted: dict[str, Any] = self.block.get("inserted") or {}
        image: dict[str, Any] = inserted.get("image") or {}
        return image


def _disks(
    disks: Sequence[Disk], blocks: list[dict[str, Any]], blockstats: list[dict[str, Any]]
) -> tuple[DiskStatistics, ...]:
    """Counters of disks, in their order."""
    by_place = {_place(found): found.get("stats") or {} for found in blockstats}
    drives = [_Drive(block=block, counters=by_place.get(_place(block), {})) for block in blocks]
    found = []
    for disk in disks:
        drive = next((d for d in drives if disk.alias in _place(d.block).split("/")), None)
        found.append(DiskStatistics(target=disk.target) if drive is None else _disk(disk, drive))
    return tuple(found)


def _place(found: dict[str, Any]) -> str:
    """By what QEMU names a drive: its device, or the older name of its backend."""
    return str(found.get("qdev") or found.get("device") or found.get("node-name") or "")


def _disk(disk: Disk, drive: _Drive) -> DiskStatistics:
    counters, image = drive.counters, drive.image
    physical: int | None = None
    if disk.source is not None and disk.source.kind != "nbd":
        with suppress(OSError), open(disk.source.path, "rb") as file:
            physical = file.seek(0, os.SEEK_END)
    return DiskStatistics(
        target=disk.target,
        read_requests=counters.get("rd_operations"),
        read_bytes=counters.get("rd_bytes"),
        read_time_ns=counters.get("rd_total_time_ns"),
        write_requests=counters.get("wr_operations"),
        write_bytes=counters.get("wr_bytes"),
        write_time_ns=counters.get("wr_total_time_ns"),
        flush_requests=counters.get("flush_operations"),
        flush_time_ns=counters.get("flush_total_time_ns"),
        capacity_bytes=image.get("virtual-size"),
        allocation_bytes=image.get("actual-size"),
        physical_bytes=physical,
    )


_NET = Path("/sys/class/net")


def _interface(interface: Interface, tap: str) -> InterfaceStatistics:
    """Counters of an interface: those of its tap on the host, whose two directions are the other way round.

    :param tap: its name, which the kernel may have chosen; '' where there is none.
    """
    if not tap:
        return InterfaceStatistics(target="", mac=interface.mac)
    counters: dict[str, int] = {}
    for ours, theirs in (("rx", "tx"), ("tx", "rx")):
        for kind, file in (
            ("bytes", "bytes"),
            ("packets", "packets"),
            ("errors", "errors"),
            ("drops", "dropped"),
        ):
            with suppress(OSError, ValueError):
                counters[f"{ours}_{kind}"] = int((_NET / tap / "statistics" / f"{theirs}_{file}").read_text())
    return InterfaceStatistics(target=tap, mac=interface.mac, **counters)
