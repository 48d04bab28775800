"""The life of domains on the simulated hypervisor: each verb, what it refuses, and what the core does of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

import ferryman
import ferryman.sync
from ferryman import DomainState, MigrationOptions, Scope, ShutdownMode
from ferryman.errors import (
    DefinitionError,
    DomainBusyError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    HypervisorError,
    NotSupportedError,
    OptionError,
)
from ferryman.hookspecs import BootRequest, ConsoleRequest, DomainRequest, hookimpl
from ferryman.testing import World
from ferryman.testing.simulator import SimulatedDriver
from ferryman.types import DomainEvent, DomainEventKind, DomainStatistics
from tests.simulated import NAME, UUID, definition, start, two_hosts

OTHER = "0b9d3c11-6f0e-4a53-9d2e-3b8f0f4f7a10"
MIB = 1 << 20


async def _hear(seen: Any, count: int) -> list[tuple[DomainEventKind, str]]:
    events: list[DomainEvent] = [await anext(seen) for _ in range(count)]
    return [(event.kind, event.detail) for event in events]


async def test_shutdown_reboot_reset(lab: World) -> None:
    async with two_hosts(lab) as (alpha, _):
        domain = await start(alpha)
        with alpha.events() as seen:
            await domain.reboot()
            await domain.reboot(ShutdownMode.ACPI)
            await domain.reset()
            for ask in (domain.shutdown, domain.reboot):
                with pytest.raises(DomainStateError, match="no guest agent"):
                    await ask(ShutdownMode.AGENT)
            assert (await domain.info()).state is DomainState.RUNNING
            await domain.shutdown()
            kinds = [kind for kind, _detail in await _hear(seen, 4)]
        assert kinds == [DomainEventKind.REBOOTED] * 3 + [DomainEventKind.SHUT_DOWN]
        with pytest.raises(DomainNotFoundError):
            await domain.info()
        for ask in (domain.shutdown, domain.reboot):
            with pytest.raises(DomainStateError, match="not active"):
                await ask()


async def test_a_reset_guest_begins_anew(lab: World) -> None:
    async with two_hosts(lab) as (alpha, _):
        domain = await start(alpha)
        await lab.elapse(1.0)
        (process,) = lab.host("alpha").processes.values()
        assert process.steps > 0
        await domain.reset()
        assert (process.steps, lab.check_memory(process)) == (0, 0)
        await lab.elapse(1.0)
        assert lab.check_memory(process) == 0
        assert lab.violations == []


async def test_autostart_is_for_persistent_domains_and_forgotten_with_them(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await alpha.define(definition())
        assert not (await domain.info()).autostart
        await domain.set_autostart(True)
        await domain.set_autostart(True)
        assert (await domain.info()).autostart
        await domain.set_autostart(False)
        assert not (await domain.info()).autostart
        await domain.set_autostart(True)
        await domain.undefine()
        await alpha.define(definition())
        assert not (await domain.info()).autostart
        transient = await beta.create(definition())
        with pytest.raises(DomainStateError, match="transient"):
            await transient.set_autostart(True)


async def test_autodestroy_ends_with_its_connection_and_blocks_migration(lab: World) -> None:
    host = lab.host("alpha")
    async with two_hosts(lab) as (alpha, beta):
        kept = await alpha.create(definition("kept", OTHER))
        await alpha.define(definition())
        domain = await alpha.lookup_by_name(NAME)
        await domain.start(autodestroy=True)
        plan = await domain.plan_migration(beta)
        assert [finding.code for finding in plan.blockers] == ["autodestroy"]
        await domain.destroy()
        await domain.start()
        assert (await domain.plan_migration(beta)).blockers == ()
        await domain.destroy()
        await domain.start(autodestroy=True)
    assert [process.uuid for process in host.processes.values()] == [kept.uuid]
    async with two_hosts(lab) as (alpha, _):
        assert (await (await alpha.lookup_by_name(NAME)).info()).state is DomainState.SHUT_OFF
        await alpha.create(definition("other", "11111111-2222-3333-4444-555555555555"), autodestroy=True)
    assert [process.uuid for process in host.processes.values()] == [kept.uuid]


@pytest.mark.parametrize(
    ("active", "scope", "live_mib", "config_mib"),
    [
        (True, Scope.CURRENT, 2, 4),
        (True, Scope.LIVE, 2, 4),
        (True, Scope.CONFIG, 4, 2),
        (True, Scope.BOTH, 2, 2),
        (False, Scope.CURRENT, None, 2),
        (False, Scope.CONFIG, None, 2),
    ],
)
async def test_memory_by_scope(
    lab: World, active: bool, scope: Scope, live_mib: int | None, config_mib: int
) -> None:
    async with two_hosts(lab) as (alpha, _):
        domain = await alpha.define(definition())
        if active:
            await domain.start()
        await domain.set_memory(2 * MIB, scope)
        info = await domain.info()
        assert info.memory_bytes == 4 * MIB
        assert info.current_memory_bytes == (None if live_mib is None else live_mib * MIB)
        if active:
            await domain.destroy()
        await domain.start()
        assert (await domain.info()).current_memory_bytes == config_mib * MIB
        assert (await domain.statistics()).current_memory_bytes == config_mib * MIB


async def test_memory_that_cannot_be_set(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await alpha.define(definition())
        for scope in (Scope.LIVE, Scope.BOTH):
            with pytest.raises(DomainStateError, match="not active"):
                await domain.set_memory(2 * MIB, scope)
        transient = await beta.create(definition())
        for scope in (Scope.CONFIG, Scope.BOTH):
            with pytest.raises(DomainStateError, match="transient"):
                await transient.set_memory(2 * MIB, scope)
        for wrong in (5 * MIB, 0, -1, True, 1.5, "1"):
            with pytest.raises(OptionError) as caught:
                await domain.set_memory(wrong)  # type: ignore[arg-type]
            assert caught.value.option == "memory_bytes"
        assert "currentMemory" not in await domain.definition()


async def test_save_and_restore(lab: World, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        await lab.elapse(1.0)
        (process,) = lab.host("alpha").processes.values()
        steps = process.steps
        with alpha.events() as seen:
            await domain.save(path)
            assert await _hear(seen, 1) == [(DomainEventKind.SAVED, "")]
        assert await alpha.list_domains() == []
        with beta.events() as seen:
            moved = await beta.restore(path)
            assert await _hear(seen, 1) == [(DomainEventKind.STARTED, "restored")]
        assert moved.uuid == UUID
        (process,) = lab.host("beta").processes.values()
        assert (process.steps, lab.check_memory(process)) == (steps, 0)
        assert lab.runners(UUID) == ["beta"]  # type: ignore[arg-type]
        with pytest.raises(DomainExistsError, match="active"):
            await beta.restore(path)
        await moved.destroy()
        await beta.define(definition())
        again = await beta.restore(path, paused=True)
        assert ((await again.info()).state, (await again.info()).persistent) == (DomainState.PAUSED, True)
        await again.save(path)
        assert (await (await beta.restore(path)).info()).state is DomainState.PAUSED
        await again.destroy()
        assert (await (await beta.restore(path, paused=False)).info()).state is DomainState.RUNNING
        assert lab.violations == []


async def test_what_cannot_be_restored(lab: World, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with two_hosts(lab) as (alpha, _):
        with pytest.raises(DefinitionError, match="cannot be read"):
            await alpha.restore(path)
        domain = await start(alpha)
        with pytest.raises(HypervisorError, match="cannot be written"):
            await domain.save(tmp_path / "missing" / "saved")
        assert (await domain.info()).state is DomainState.RUNNING
        await domain.save(path)
        whole = path.read_bytes()
        for wrong in (
            b"",
            b"nonsense",
            whole[:30],
            whole[:-8],
            b"ferryman-test-save 1\n{}\n",
            whole[:21] + b"[]\n",
        ):
            path.write_bytes(wrong)
            with pytest.raises(DefinitionError):
                await alpha.restore(path)
        path.write_bytes(whole)
        for text in (definition(uuid=OTHER), definition(memory_mib=8)):
            with pytest.raises(DefinitionError):
                await alpha.restore(path, definition=text)
        assert await alpha.list_domains() == []


async def test_what_a_migration_has_locked(lab: World, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with two_hosts(lab) as (alpha, beta):
        domain = await alpha.define(definition())
        await domain.start()
        await domain.save(path)
        await domain.start()
        changes = (
            domain.shutdown,
            domain.reboot,
            domain.reset,
            lambda: domain.set_autostart(True),
            lambda: domain.save(path),
            lambda: domain.set_memory(MIB),
            lambda: alpha.create(definition()),
            lambda: alpha.restore(path),
        )
        refused = 0
        async with domain.migrate(beta, MigrationOptions(bandwidth_bytes_per_s=1)) as job:
            async for _event in job.progress():
                for change in changes if not refused else ():
                    with pytest.raises(DomainBusyError):
                        await change()
                    refused += 1
                job.abort()
            with pytest.raises(ferryman.MigrationError):
                await job.result()
        assert refused == len(changes)
        assert (await domain.info()).state is DomainState.RUNNING


async def test_what_the_simulated_hypervisor_does_not_have(lab: World) -> None:
    async with two_hosts(lab) as (alpha, _):
        domain = await start(alpha)
        for ask in (domain.screenshot, domain.dirty_rate, lambda: domain.agent_command("guest-ping")):
            with pytest.raises(NotSupportedError):
                await ask()
        with pytest.raises(NotSupportedError):
            async with domain.console():
                pass
        for wrong in (0, -1, 61, "1", True, float("nan")):
            with pytest.raises(OptionError):
                await domain.dirty_rate(wrong)  # type: ignore[arg-type]


async def test_statistics_of_many(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        other = await alpha.define(definition("other", OTHER))
        expected = {UUID: DomainState.RUNNING, OTHER: DomainState.SHUT_OFF}
        found = await alpha.statistics()
        assert {uuid: one.state for uuid, one in found.items()} == expected
        assert list(await alpha.statistics([other])) == [OTHER]
        assert await alpha.statistics([]) == await beta.statistics() == {}

    class Plain(SimulatedDriver):
        """It has no ``host_statistics`` of its own."""

        gone = ""
        failing = ""

        @hookimpl
        async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
            await anyio.lowlevel.checkpoint()
            if request.name == Plain.gone:
                raise DomainNotFoundError("planted", domain=request.name)
            if request.name == Plain.failing:
                raise HypervisorError("planted")
            return DomainStatistics(state=self._require_info(request.uuid).state)

    monkeypatch.setattr(Plain, "host_statistics", None)
    monkeypatch.setattr("ferryman.connection.open_driver", lambda _uri: _hooks(Plain()))
    async with ferryman.connect(f"test:///{lab.name}/alpha") as plain:
        found = await plain.statistics()
        assert {uuid: one.state for uuid, one in found.items()} == expected
        assert list(await plain.statistics([domain])) == [UUID]
        Plain.gone = NAME
        assert list(await plain.statistics()) == [OTHER]
        Plain.failing = "other"
        with pytest.raises(HypervisorError, match="planted"):
            await plain.statistics()


def _hooks(driver: object) -> Any:
    from ferryman.registry import Hooks

    return Hooks(driver, "ferryman-planted")


async def test_autostart_is_asked_once_after_an_opening_and_told_what_is_locked(
    lab: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BootRequest] = []

    class Booting(SimulatedDriver):
        @hookimpl
        async def host_autostart(self, request: BootRequest) -> None:
            request.admit(UUID, NAME)  # type: ignore[arg-type]
            asked.append(request)

    monkeypatch.setattr("ferryman.connection.open_driver", lambda _uri: _hooks(Booting()))
    async with ferryman.connect(f"test:///{lab.name}/alpha"):
        assert len(asked) == 1


class _Talking(SimulatedDriver):
    """It has a console that says what it hears."""

    @hookimpl
    async def domain_console(self, request: ConsoleRequest) -> anyio.abc.ByteStream:
        if request.device == "none":
            raise DomainStateError("planted", domain=request.name)
        send, receive = anyio.create_memory_object_stream[bytes](8)
        return _Echo(send, receive)


class _Echo(anyio.abc.ByteStream):
    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive = send, receive

    async def send(self, item: bytes) -> None:
        await self._send.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data: bytes = await self._receive.receive()
        return data[:max_bytes]

    async def send_eof(self) -> None:
        self._send.close()

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()


async def test_a_console_is_closed_with_its_block(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryman.connection.open_driver", lambda _uri: _hooks(_Talking()))
    async with two_hosts(lab) as (alpha, _):
        domain = await start(alpha)
        async with domain.console() as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"late")
        with pytest.raises(DomainStateError, match="planted"):
            async with domain.console("none"):
                pass


def test_a_console_that_blocks(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryman.connection.open_driver", lambda _uri: _hooks(_Talking()))
    with ferryman.sync.connect(f"test:///{lab.name}/alpha") as alpha:
        domain = alpha.create(definition())
        with domain.console() as stream:
            stream.send(b"hello")
            assert stream.receive(4) == b"hell"
        with pytest.raises(DomainStateError, match="planted"), domain.console("none"):
            pass
        assert alpha.statistics([domain])[domain.uuid].state is DomainState.RUNNING


def test_every_verb_blocks_too(lab: World, tmp_path: Path) -> None:
    with ferryman.sync.connect(f"test:///{lab.name}/alpha") as alpha:
        domain = alpha.define(definition())
        domain.set_autostart(True)
        assert domain.info().autostart
        domain.start(autodestroy=True)
        domain.reboot()
        domain.reset()
        domain.set_memory(2 * MIB, Scope.BOTH)
        assert domain.info().current_memory_bytes == 2 * MIB
        domain.save(tmp_path / "saved")
        alpha.restore(tmp_path / "saved", paused=True)
        assert [one.state for one in alpha.statistics().values()] == [DomainState.PAUSED]
        domain.shutdown(ShutdownMode.ACPI)
        for ask in (domain.screenshot, domain.dirty_rate, lambda: domain.agent_command("guest-ping")):
            with pytest.raises(NotSupportedError):
                ask()
