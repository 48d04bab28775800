"""Runs cases one after the other with one guest, which goes back and forth between two hosts."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

import ferryman
from ferryman import GuestState, MigrationOptions, Phase, PhaseEvent, ProgressEvent
from ferryman.errors import FerrymanError, MigrationError, OptionError, PlanBlockedError
from ferryman.types import DomainState, MigrationEvent
from tests.guests.counter import CounterGuest
from tests.guests.inspect import dump_memory, pids
from tests.options.cases import MIB, Case
from tests.options.credentials import put_credentials
from tests.qemu import NAME, Field, laid_out

GUEST = CounterGuest(
    memory_bytes=32 * MIB, tick_hz=500, page_count=2000, pages_per_tick=6, prefill=True, disk_ticks=2
)
"""8 MiB that are not zero; it writes 12 MB/s, and a journal to its disk every 4 ms."""

_DISPLAY = (
    "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/><video><model type='vga'/></video>"
)
_CASE_S = 60.0
_DISK_BEHIND = 4 * GUEST.disk_ticks
"""How many ticks the disk may be behind the memory: what was being written when the guest was suspended."""

Act = Callable[[ferryman.MigrationJob], Awaitable[None]]


@dataclass(kw_only=True)
class Outcome:
    """What came of a case.

    :param wrong: what was not as it must be; empty where all was.
    """

    case: Case
    outcome: str = ""
    message: str = ""
    verified: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.outcome == self.case.outcome and not self.wrong


async def _until_sending(job: ferryman.MigrationJob) -> None:
    async for event in job.progress():
        if isinstance(event, ProgressEvent):
            return


async def _speed_up(job: ferryman.MigrationJob) -> None:
    await job.set_bandwidth(0)


async def _stop_longer(job: ferryman.MigrationJob) -> None:
    await job.set_max_downtime(2_000)


async def _abort(job: ferryman.MigrationJob) -> None:
    await _until_sending(job)
    job.abort()


async def _switch(job: ferryman.MigrationJob) -> None:
    await _until_sending(job)
    await job.switch_to_postcopy()


async def _switch_and_speed_up(job: ferryman.MigrationJob) -> None:
    await _switch(job)
    await job.set_postcopy_bandwidth(0)


ACTS: dict[str, Act] = {
    "speed up": _speed_up,
    "stop longer": _stop_longer,
    "abort": _abort,
    "switch": _switch,
    "switch and speed up": _switch_and_speed_up,
}


@asynccontextmanager
async def started(*, directory: Path | None = None) -> AsyncIterator[Course]:
    """Two hosts and the guest of all cases, for the length of a block."""
    with laid_out(GUEST, directory=directory) as field:
        os.link(field.directory / "image", field.directory / "linked")
        (field.directory / "symbolic").symlink_to(field.directory / "image")
        shutil.copyfile(field.directory / "image", field.directory / "other")
        definition = field.definition.replace("<memballoon", f"{_DISPLAY}\n    <memballoon", 1)
        async with ferryman.connect(field.uris[0]) as host:
            domain = await host.create(definition)
        course = Course(field=field, uuid=domain.uuid)
        try:
            await anyio.to_thread.run_sync(field.wait_ticks, 50)
            yield course
        finally:
            await course.end()


@dataclass(kw_only=True)
class Course:
    """Where the guest is, and under which name."""

    field: Field
    uuid: Any
    here: int = 0
    name: str = NAME

    async def end(self) -> None:
        """End the guest, wherever it is."""
        for uri in self.field.uris:
            async with ferryman.connect(uri) as host:
                for domain in await host.list_domains():
                    if (await domain.info()).state.active:
                        await domain.destroy()

    async def run(self, case: Case) -> Outcome:
        """Run a case, and look at the guest; errors that no case expects are raised."""
        outcome = Outcome(case=case)
        begin_s = anyio.current_time()
        with ExitStack() as stack:
            for root, kind in zip(self._roots(), case.credentials or (), strict=False):
                put_credentials(root, kind)
                stack.callback(put_credentials, root, "none")
            values = self._filled(case, stack)
            with anyio.fail_after(_CASE_S):
                await self._migrate(case, values, outcome)
                await self._look(outcome)
        outcome.seconds = anyio.current_time() - begin_s
        return outcome

    def _roots(self) -> tuple[Path, Path]:
        roots = self.field.roots
        return roots[self.here], roots[1 - self.here]

    def _filled(self, case: Case, stack: ExitStack) -> dict[str, Any]:
        values = _fill(case.options, {"directory": str(self.field.directory), "port": str(_free_ports(1))})
        assert isinstance(values, dict)
        if case.ports is not None:
            count, taken = case.ports
            first = _free_ports(count)
            for port in range(first, first + taken):
                stack.enter_context(_listening(port))
            values["port_range"] = (first, first + count - 1)
        return values

    async def _migrate(self, case: Case, values: dict[str, Any], outcome: Outcome) -> None:
        uris = self.field.uris
        async with (
            ferryman.connect(uris[self.here]) as source,
            ferryman.connect(uris[1 - self.here]) as destination,
        ):
            domain = await source.lookup_by_uuid(self.uuid)
            if case.suspended:
                await domain.suspend()
            elif (await domain.info()).state is DomainState.PAUSED:
                await domain.resume()
            definition = await domain.definition()
            if case.persistent:
                await source.define(definition)
            if case.edit is not None:
                changed = re.sub(*case.edit, definition) if case.edit[0] else definition
                assert (changed == definition) == (not case.edit[0])
                values["destination_definition"] = changed
            events: list[MigrationEvent] = []
            try:
                await self._attempt(case, values, domain, destination, events)
            except OptionError as error:
                outcome.outcome, outcome.message = f"refused: {error.code}", str(error)
            except PlanBlockedError as error:
                outcome.outcome = f"refused: {', '.join(sorted({f.code for f in error.findings}))}"
                outcome.message = error.findings[0].message
            except MigrationError as error:
                outcome.outcome, outcome.message = f"fails: {error.code}", str(error)
                if error.guest_state is not GuestState.SOURCE:
                    outcome.wrong.append(f"the guest is said to be {error.guest_state}")
            except FerrymanError as error:
                outcome.outcome, outcome.message = f"fails: {error.code}", str(error)
            else:
                outcome.outcome = "passes"
                self.here = 1 - self.here
                self.name = values.get("name", self.name)
                await self._look_there(case, destination, source, values, events, outcome)
            for host in (source, destination):
                if host.open_migrations():
                    outcome.wrong.append("a migration is left open")
                for left in await host.list_domains():
                    if (await left.info()).persistent:
                        await left.undefine()

    async def _attempt(
        self,
        case: Case,
        values: dict[str, Any],
        domain: ferryman.Domain,
        destination: ferryman.Connection,
        events: list[MigrationEvent],
    ) -> None:
        plan = await domain.plan_migration(destination, MigrationOptions(**values))
        async with plan.execute() as job:
            if case.taken:
                async for event in job.progress():
                    if isinstance(event, PhaseEvent) and event.phase is Phase.BEGIN:
                        break
                put_credentials(self._roots()[("source", "destination").index(case.taken)], "none")
            if case.does:
                await ACTS[case.does](job)
            events.extend([event async for event in job.progress()])
            await job.result()

    async def _look_there(
        self,
        case: Case,
        destination: ferryman.Connection,
        source: ferryman.Connection,
        values: dict[str, Any],
        events: list[MigrationEvent],
        outcome: Outcome,
    ) -> None:
        """Look at what only this case has changed."""
        domain = await destination.lookup_by_uuid(self.uuid)
        info = await domain.info()
        definition = await domain.definition()
        paused = "paused" if info.state is DomainState.PAUSED else ""
        samples = [event.statistics for event in events if isinstance(event, ProgressEvent)]
        seen = {
            "": True,
            "paused": bool(paused),
            "persistent": info.persistent,
            "renamed": info.name == values.get("name"),
            "gone at the source": await source.list_domains() == [],
            "throttled": any(sample.throttle_percent for sample in samples),
            "disk moved": any(path in definition for _, path in values.get("disks", ())),
            "disk moved at the destination": "/linked" in definition,
            "served elsewhere": _listens_at(values.get("graphics_address", "")),
        }
        if not seen[case.seen]:
            outcome.wrong.append(f"not {case.seen}")
        if case.seen:
            outcome.verified.append(case.seen)
        if bool(paused) != (case.seen == "paused"):
            outcome.wrong.append(f"the guest is {info.state.value}")
        if paused:
            await domain.resume()

    async def _look(self, outcome: Outcome) -> None:
        """Look at the guest: it ticks, in one place, and its memory and its disk are as it wrote them."""
        field = self.field
        uris = field.uris
        async with ferryman.connect(uris[self.here]) as host:
            domain = await host.lookup_by_uuid(self.uuid)
            if (await domain.info()).state is DomainState.PAUSED:
                await domain.resume()
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            if field.emulators() != pids(field.roots[self.here]):
                outcome.wrong.append("a process is left behind")
            await domain.suspend()
        seen = field.witness.report()
        if (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) != (0, 0, ()):
            outcome.wrong.append(f"ticks: {seen.ticks_lost} lost, {seen.ticks_doubled} doubled")
        dump = field.directory / "memory"
        await anyio.to_thread.run_sync(
            dump_memory, field.roots[self.here], self.name, dump, GUEST.memory_bytes
        )
        report = await anyio.to_thread.run_sync(GUEST.verify_memory, dump)
        dump.unlink()
        if report.errors:
            outcome.wrong.append(f"{report.errors} of {report.pages_checked} pages are wrong")
        behind = report.tick - GUEST.tick_on_disk(field.directory / "image")
        if not 0 <= behind <= _DISK_BEHIND:
            outcome.wrong.append(f"the disk is {behind} ticks behind")
        outcome.verified = ["memory", "ticks", "disk", *outcome.verified]


def _fill(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, str):
        return value.format(**texts)
    if isinstance(value, dict):
        return {name: _fill(part, texts) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_fill(part, texts) for part in value)
    return value


@contextmanager
def _listening(port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


def _free_ports(count: int) -> int:
    """The first of so many ports of 127.0.0.1 in a row at which nobody listens."""
    for first in range(49_152, 60_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(_listening(port))
            except OSError:
                continue
            return first
    raise OSError("no port is free")


def _listens_at(address: str) -> bool:
    """Whether somebody listens at this address, by the system's word (Documentation/networking/proc_net_tcp.rst)."""
    if not address:
        return False
    wanted = f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(line[1].startswith(f"{wanted}:") and line[3] == "0A" for line in lines)
