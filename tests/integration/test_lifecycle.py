"""The life of domains on real QEMU: each verb, its failures, and what a program that dies in between leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import ferryman
import ferryman.sync
from ferryman import DomainState, Scope, ShutdownMode
from ferryman.errors import (
    ConnectionClosedError,
    DefinitionError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    HypervisorError,
    OptionError,
)
from ferryman.types import DomainEventKind
from ferryman_qemu import saves
from ferryman_qemu.savefile import SaveFile
from tests.guests.inspect import QMPSocket, pids, run_directories
from tests.guests.linux import KERNEL_DIRECTORY, LinuxGuest, build_initramfs
from tests.qemu import MIB, NAME, PROMPT_S, Field, console_definition, laid_out, need

if TYPE_CHECKING:
    from ferryman.sync import Domain
    from ferryman.types import DomainEvent

OTHER_UUID = "5d1f0f6e-52a6-4c8e-9c63-0d0e1c3f7b42"
PNG = b"\x89PNG\r\n\x1a\n"
PANIC = bytes.fromhex("fa ba0505 b001 ee f4 ebfd".replace(" ", ""))
"""A boot sector's code: interrupts off, 1 (it panicked) to port 0x505 of pvpanic, and a halt for ever."""


def devices(definition: str, *more: str) -> str:
    """A definition with more devices."""
    return definition.replace("</devices>", "".join(more) + "</devices>").replace(
        "<memballoon model='none'/>", ""
    )


def until(seen: Iterator[DomainEvent], *kinds: DomainEventKind) -> list[tuple[DomainEventKind, str]]:
    """Events up to the first of some kinds, with their details."""
    found: list[tuple[DomainEventKind, str]] = []
    for event in seen:
        found.append((event.kind, event.detail))
        if event.kind in kinds:
            break
    return found


def record(root: Path) -> dict[str, Any]:
    """What the root's one process is written down as."""
    (run,) = run_directories(root)
    found: dict[str, Any] = json.loads((run / "guest.json").read_text())
    return found


@contextmanager
def linux_field(*, actions: str = "") -> Iterator[Field]:
    """Two hosts and a Linux guest with a balloon and the real guest agent."""
    need("qemu-ga", here=shutil.which("qemu-ga", path=f"{os.environ['PATH']}:/usr/sbin") is not None)
    module = KERNEL_DIRECTORY / "modules" / "virtio_console.ko"
    need(
        f"{module.name} of the guests' kernel (remove .cache/kernel to have it fetched)",
        here=module.is_file(),
    )
    guest = LinuxGuest(memory_bytes=160 * MIB, blocks_bytes=0)
    with laid_out(guest) as field:
        plain = build_initramfs(KERNEL_DIRECTORY.parent / "guests")
        definition = devices(
            field.definition.replace(
                str(plain), str(build_initramfs(KERNEL_DIRECTORY.parent / "guests", agent=True))
            ),
            "<memballoon model='virtio'/>",
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        ).replace("<devices>", f"{actions}<devices>")
        yield replace(field, definition=definition)


# Shutting down and booting again


def test_a_guest_with_an_agent() -> None:
    with (
        linux_field() as field,
        ferryman.sync.connect(field.uris[0]) as a,
        a.events() as seen,
    ):
        domain = a.define(field.definition)
        domain.start()
        with pytest.raises(DomainStateError, match="not connected: start qemu-guest-agent"):
            domain.agent_command("guest-ping")
        with pytest.raises(DomainStateError, match="not connected"):
            domain.shutdown(ShutdownMode.AGENT)
        (pid,) = pids(field.roots[0])
        until(seen, DomainEventKind.AGENT_CONNECTED)
        assert domain.agent_command("guest-ping") == {}
        assert domain.agent_command("guest-get-host-name") == {"host-name": "(none)"}
        with pytest.raises(HypervisorError, match=r"refused: .*nonsense.*CommandNotFound"):
            domain.agent_command("nonsense")
        with pytest.raises(HypervisorError, match="refused: .*No such file"):
            domain.agent_command("guest-file-open", {"path": "/missing"})

        domain.set_memory(100 * MIB)
        while domain.info().current_memory_bytes != 100 * MIB:
            until(seen, DomainEventKind.MEMORY_CHANGED)
        assert domain.statistics().current_memory_bytes == 100 * MIB
        assert domain.info().memory_bytes > 160 * MIB

        domain.reboot(ShutdownMode.ACPI)
        happened = until(seen, DomainEventKind.RESUMED)
        assert (DomainEventKind.REBOOTED, "host-qmp-system-reset") in happened
        assert DomainEventKind.SHUT_DOWN not in dict(happened)
        until(seen, DomainEventKind.AGENT_CONNECTED)
        domain.reboot()
        happened = until(seen, DomainEventKind.AGENT_CONNECTED)
        assert (DomainEventKind.REBOOTED, "guest-reset") in happened
        assert record(field.roots[0])["reboot"] == ""
        assert pids(field.roots[0]) == [pid]

        # And what is saved with an agent in it is restored with one.
        domain.save(field.directory / "saved")
        a.restore(field.directory / "saved")
        assert domain.agent_command("guest-ping") == {}
        domain.shutdown(ShutdownMode.AGENT)
        assert until(seen, DomainEventKind.SHUT_DOWN)[-1][1] == "guest-shutdown"
        assert domain.info().state is DomainState.SHUT_OFF

        # A reboot that the guest has not heard of is forgotten by a shutdown.
        domain.start()
        until(seen, DomainEventKind.AGENT_CONNECTED)
        domain.suspend()
        domain.reboot(ShutdownMode.ACPI)
        domain.shutdown(ShutdownMode.ACPI)
        domain.resume()
        until(seen, DomainEventKind.SHUT_DOWN)
        domain.undefine()


@pytest.mark.parametrize("moment", ["asked", "shut down"])
def test_a_reboot_is_completed_by_whoever_opens_the_root_next(moment: str) -> None:
    with linux_field() as field:
        with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
            domain = a.create(field.definition)
            until(seen, DomainEventKind.AGENT_CONNECTED)
            domain.suspend()
            domain.reboot(ShutdownMode.ACPI)
        (run,) = run_directories(field.roots[0])
        assert record(field.roots[0])["reboot"] == "asked"
        with QMPSocket(run / "read") as qmp:
            if moment == "asked":
                # As if the program had died before it told QEMU to stand still.
                qmp.execute("set-action", shutdown="poweroff")
            else:
                qmp.execute("cont")
                while qmp.execute("query-status")["status"] != "shutdown":
                    pass
        with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
            domain = a.lookup_by_name(NAME)
            if moment == "asked":
                domain.resume()
                assert (DomainEventKind.REBOOTED, "host-qmp-system-reset") in until(
                    seen, DomainEventKind.REBOOTED
                )
            until(seen, DomainEventKind.AGENT_CONNECTED)
            assert record(field.roots[0])["reboot"] == ""
            domain.shutdown(ShutdownMode.ACPI)
            until(seen, DomainEventKind.SHUT_DOWN)


def test_a_guest_that_boots_again_when_it_shuts_down() -> None:
    with (
        linux_field(actions="<on_poweroff>restart</on_poweroff>") as field,
        ferryman.sync.connect(field.uris[0]) as a,
        a.events() as seen,
    ):
        domain = a.create(field.definition)
        for mode in (ShutdownMode.ACPI, ShutdownMode.AGENT):
            until(seen, DomainEventKind.AGENT_CONNECTED)
            domain.shutdown(mode)
            assert DomainEventKind.SHUT_DOWN not in dict(until(seen, DomainEventKind.REBOOTED))
        until(seen, DomainEventKind.AGENT_CONNECTED)
        domain.destroy()


def test_a_reset(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        domain.reset()
        assert until(seen, DomainEventKind.REBOOTED)[-1][1] == "host-qmp-system-reset"
        domain.suspend()
        domain.reset()
        until(seen, DomainEventKind.REBOOTED)
        assert domain.info().state is DomainState.PAUSED
        domain.destroy()
        with pytest.raises(DomainNotFoundError):
            domain.reset()


@pytest.mark.parametrize("action", ["destroy", "restart", "preserve"])
def test_a_panic(field: Field, action: str) -> None:
    (field.directory / "image").write_bytes(PANIC.ljust(510, b"\0") + b"\x55\xaa" + bytes(MIB - 512))
    definition = devices(field.definition, "<panic model='isa'/>").replace(
        "<devices>", f"<on_crash>{action}</on_crash><devices>"
    )
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        domain = a.define(definition)
        domain.start()
        until(seen, DomainEventKind.PANICKED)
        match action:
            case "destroy":
                assert until(seen, DomainEventKind.CRASHED)[-1] == (DomainEventKind.CRASHED, "panicked")
                assert domain.info().state is DomainState.SHUT_OFF
            case "restart":
                happened = until(seen, DomainEventKind.PANICKED)
                assert {DomainEventKind.REBOOTED, DomainEventKind.RESUMED} <= dict(happened).keys()
                domain.destroy()
                assert until(seen, DomainEventKind.DESTROYED)[-1][1] == ""
            case _:
                assert domain.info().state is DomainState.CRASHED
                with pytest.raises(DomainStateError, match="in the state guest-panicked"):
                    domain.save(field.directory / "saved")
                domain.destroy()
        domain.undefine()


def test_a_panic_that_nobody_saw(field: Field) -> None:
    (field.directory / "image").write_bytes(PANIC.ljust(510, b"\0") + b"\x55\xaa" + bytes(MIB - 512))
    definition = devices(field.definition, "<panic model='isa'/>").replace(
        "<devices>", "<on_crash>restart</on_crash><devices>"
    )
    with ferryman.sync.connect(field.uris[0]) as a:
        a.create(definition, paused=True)
    (run,) = run_directories(field.roots[0])
    with QMPSocket(run / "read") as qmp:
        qmp.execute("cont")
        while qmp.execute("query-status")["status"] != "guest-panicked":
            pass
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        until(seen, DomainEventKind.PANICKED)
        a.lookup_by_name(NAME).destroy()


def test_ends_that_nobody_asked_for(field: Field) -> None:
    """A crash tells the last that QEMU printed; a signal to QEMU is an end that its host asked for."""
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        domain = a.define(devices(field.definition, "<serial type='pty'/>"))
        log = field.roots[0] / "logs" / f"{NAME}.log"
        for number, kind in (
            (signal.SIGKILL, DomainEventKind.CRASHED),
            (signal.SIGTERM, DomainEventKind.SHUT_DOWN),
        ):
            domain.start()
            field.wait_ticks(20)
            os.kill(pids(field.roots[0])[0], number)
            detail = until(seen, kind)[-1][1]
            if number == signal.SIGKILL:
                assert detail.startswith("char device redirected to /dev/pts/")
            else:
                assert detail == "host-signal"
            assert log.read_text().endswith(f"end: {kind.value}\n")
        assert log.read_text().count(" start: /") == 2
        domain.undefine()


# Transient and persistent


def test_the_definition_of_an_active_domain_is_the_one_of_its_next_start(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.define(field.definition)
        domain.start()
        changed = field.definition.replace("<vcpu>1</vcpu>", "<vcpu>2</vcpu>")
        assert changed != field.definition
        a.define(changed)
        assert domain.info().vcpus == 1
        assert "<vcpu>1</vcpu>" in domain.definition()
        domain.destroy()
        assert domain.info().vcpus == 2

        # One run by another definition, which is not kept.
        a.create(field.definition)
        info = domain.info()
        assert (info.vcpus, info.persistent) == (1, True)
        with pytest.raises(DomainExistsError, match="active already"):
            a.create(field.definition)
        domain.undefine()
        assert not domain.info().persistent
        with pytest.raises(DomainStateError, match="transient"):
            domain.undefine()
        # A transient domain that is defined stays.
        a.define(changed)
        domain.destroy()
        assert (domain.info().state, domain.info().vcpus) == (DomainState.SHUT_OFF, 2)
        domain.undefine()


def test_autodestroy(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.define(field.definition)
        domain.start(autodestroy=True)
        field.wait_ticks(20)
        assert "autodestroy" in [found.code for found in domain.plan_migration(b).blockers]
        (pid,) = pids(field.roots[0])
    assert field.emulators() == []
    program = "\n".join(
        (
            "import os, sys, ferryman.sync",
            "with ferryman.sync.connect(sys.argv[1]) as host:",
            "    host.lookup_by_name('counter').start(autodestroy=True)",
            "    os._exit(7)",
        )
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program, field.uris[0]], check=False, timeout=PROMPT_S
        ).returncode
        == 7
    )
    assert field.emulators() not in ([], [pid])
    with ferryman.sync.connect(field.uris[0]) as a:
        assert field.emulators() == []
        domain = a.lookup_by_name(NAME)
        assert domain.info().state is DomainState.SHUT_OFF
        domain.undefine()


def test_autostart(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    broken = field.define("broken").replace("<vcpu>1</vcpu>", "<vcpu>1</vcpu>", 1)
    with ferryman.sync.connect(field.uris[0]) as a:
        for definition in (field.definition, field.define("other"), broken):
            a.define(definition)
        for name in (NAME, "broken"):
            a.lookup_by_name(name).set_autostart(True)
        assert [a.lookup_by_name(name).info().autostart for name in (NAME, "broken", "other")] == [
            True,
            True,
            False,
        ]
    with ferryman.sync.connect(field.uris[0]):
        assert field.emulators() == [], "the host has not booted since"
    (field.roots[0] / "booted").write_text("another boot")
    path = next((field.roots[0] / "domains").glob(f"{_uuid(broken)}.xml"))
    path.write_text(
        path.read_text().replace(str(field.directory / "image"), str(field.directory / "missing"))
    )
    with ferryman.sync.connect(field.uris[0]) as a:
        states = {name: a.lookup_by_name(name).info().state for name in (NAME, "broken", "other")}
        assert states == {
            NAME: DomainState.RUNNING,
            "broken": DomainState.SHUT_OFF,
            "other": DomainState.SHUT_OFF,
        }
        assert "could not be started with its host" in caplog.text
        a.lookup_by_name(NAME).destroy()
    with ferryman.sync.connect(field.uris[0]) as a:
        assert field.emulators() == []
        a.lookup_by_name(NAME).set_autostart(False)
        assert not a.lookup_by_name(NAME).info().autostart
        for domain in a.list_domains():
            domain.undefine()
    assert os.listdir(field.roots[0] / "domains") == []


def _uuid(definition: str) -> str:
    return definition.partition("<uuid>")[2].partition("</uuid>")[0]


# Saving and restoring


def test_a_guest_that_was_saved_goes_on_where_it_was(field: Field) -> None:
    path = field.directory / "saved"
    with (
        ferryman.sync.connect(field.uris[0]) as a,
        a.events() as seen,
        ferryman.sync.connect(field.uris[1]) as b,
    ):
        domain = a.define(field.definition)
        domain.start()
        field.wait_ticks(50)
        domain.save(path)
        assert until(seen, DomainEventKind.SAVED)[-1] == (DomainEventKind.SAVED, "")
        assert domain.info().state is DomainState.SHUT_OFF
        assert path.stat().st_mode & 0o777 == 0o600
        # On another host too, since the disk is there.
        moved = b.restore(path)
        assert (moved.uuid, moved.info().persistent) == (domain.uuid, False)
        field.wait_ticks(50)
        field.assert_unbroken()
        with pytest.raises(DomainExistsError, match="active"):
            b.restore(path)
        moved.suspend()
        moved.save(path)
        a.restore(path)
        assert domain.info().state is DomainState.PAUSED
        assert domain.info().persistent
        # It can be saved again, without having run in between, and be started by what the caller says.
        domain.save(path)
        a.restore(path, paused=False, definition=domain.definition())
        field.wait_ticks(50)
        field.assert_unbroken()
        assert until(seen, DomainEventKind.STARTED)[-1][1] == "restored"
        domain.suspend()
    assert field.wrong_pages(field.roots[0]) == 0
    with ferryman.sync.connect(field.uris[0]) as a:
        # A guest that came from a file migrates as any other.
        domain = a.lookup_by_name(NAME)
        domain.resume()
        with ferryman.sync.connect(field.uris[1]) as b:
            domain.migrate(b).result()
            b.lookup_by_name(NAME).destroy()
        field.assert_unbroken()
        domain.undefine()


def test_a_guest_that_cannot_be_saved_goes_on(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    path = field.directory / "saved"
    path.write_text("an older one")
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        for wrong in (field.directory / "missing" / "saved", Path("/proc/saved")):
            with pytest.raises(HypervisorError, match="cannot be written"):
                domain.save(wrong)
        for text in ("saved", ""):
            with pytest.raises(OptionError, match="absolute path"):
                domain.save(text)

        async def full(reading: int, file: int) -> None:
            raise OSError(28, "No space left on device")

        def fails(*_args: object) -> None:
            raise OSError(5, "Input/output error")

        for target, name, planted in (
            (saves, "_copy", full),
            (SaveFile, "complete", fails),
            (SaveFile, "publish", fails),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, planted)
                with pytest.raises(HypervisorError, match="No space left|Input/output"):
                    domain.save(path)
            assert domain.info().state is DomainState.RUNNING
            field.wait_ticks(20)
            assert path.read_text() == "an older one"
            assert record(field.roots[0])["save_path"] == ""
        domain.suspend()
        with monkeypatch.context() as patch:
            patch.setattr(saves, "_copy", full)
            with pytest.raises(HypervisorError, match="No space left"):
                domain.save(path)
        assert domain.info().state is DomainState.PAUSED
        domain.resume()
        field.wait_ticks(20)
        field.assert_unbroken(crossings=0)
        assert [found.name for found in field.directory.iterdir() if "new" in found.name] == []
        domain.save(path)
        a.restore(path).destroy()
        with pytest.raises(DomainNotFoundError):
            domain.save(path)


async def test_a_save_that_is_cancelled(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    path = field.directory / "saved"
    real, begun = saves._copy, anyio.Event()

    async def hangs(reading: int, file: int) -> None:
        await anyio.wait_readable(reading)
        os.splice(reading, file, 4096)
        begun.set()
        await anyio.sleep_forever()

    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await a.create(field.definition)
        await anyio.to_thread.run_sync(field.wait_ticks, 20)
        monkeypatch.setattr(saves, "_copy", hangs)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(domain.save, path)
            await begun.wait()
            with pytest.raises(DomainStateError, match="being saved already"):
                await domain.save(path)
            with pytest.raises(ferryman.MigrationError):
                await domain.migrate(b)
            tasks.cancel_scope.cancel()
        assert (await domain.info()).state is DomainState.RUNNING
        await anyio.to_thread.run_sync(field.wait_ticks, 20)
        assert not path.exists()
        monkeypatch.setattr(saves, "_copy", real)
        await domain.save(path)
        await (await a.restore(path)).destroy()
    field.assert_unbroken()


_DIES = """
import os, sys, anyio, ferryman.sync
from ferryman_qemu import saves, savefile
from ferryman_qemu.guest import Guest
def dies(*args, **kwargs):
    os._exit(7)
async def dies_later(*args, **kwargs):
    os._exit(7)
uri, path, moment = sys.argv[1:]
with ferryman.sync.connect(uri) as host:
    if moment == "copying":
        saves._copy = dies_later
    elif moment == "whole":
        savefile.SaveFile.publish = dies
    elif moment == "named":
        Guest.kill = dies_later
    if moment == "loaded":
        saves.SaveHooks._resume_saved = dies_later
        host.restore(path)
    else:
        host.lookup_by_name("counter").save(path)
"""


@pytest.mark.parametrize("moment", ["copying", "whole", "named", "loaded"])
def test_a_program_that_dies_while_it_saves_or_restores(field: Field, moment: str) -> None:
    path = field.directory / "saved"
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.define(field.definition)
        domain.start()
        field.wait_ticks(20)
        if moment == "loaded":
            domain.save(path)
    arguments = [sys.executable, "-c", _DIES, field.uris[0], str(path), moment]
    assert subprocess.run(arguments, check=False, timeout=PROMPT_S).returncode == 7
    assert len(field.emulators()) == 1
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.lookup_by_name(NAME)
        if moment == "copying":
            assert domain.info().state is DomainState.RUNNING
            assert not path.exists()
            field.wait_ticks(20)
            field.assert_unbroken(crossings=0)
            domain.save(path)
        assert domain.info().state is DomainState.SHUT_OFF
        assert field.emulators() == []
        assert [found.name for found in field.directory.iterdir() if "new" in found.name] == []
        a.restore(path)
        field.wait_ticks(20)
        field.assert_unbroken()
        domain.destroy()
        domain.undefine()


def test_what_cannot_be_restored(field: Field) -> None:
    path = field.directory / "saved"
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        domain.save(path)
        whole = path.read_bytes()
        begin = int.from_bytes(whole[16:24], "big")
        for damaged, error in (
            (b"nonsense", DefinitionError),
            (whole[:-1], DefinitionError),
            (whole[:begin] + b"QEVN" + whole[begin + 4 :], HypervisorError),
            (whole[:begin] + bytes(len(whole) - begin), HypervisorError),
        ):
            path.write_bytes(damaged)
            with pytest.raises(error):
                a.restore(path)
            assert field.emulators() == []
            assert run_directories(field.roots[0]) == []
        path.write_bytes(whole)
        for given in (
            field.define("other"),
            field.definition.replace("<vcpu>1</vcpu>", "<vcpu>2</vcpu>"),
            field.definition.replace("32768", "65536"),
        ):
            with pytest.raises(DefinitionError, match="another machine"):
                a.restore(path, definition=given)
        # Of the same size, and with a device that the state knows nothing of.
        with pytest.raises(DefinitionError, match=r"another machine .*: the number of videos \(0 and 1\)"):
            a.restore(path, definition=devices(field.definition, "<video><model type='cirrus'/></video>"))
        with a.events() as seen:
            a.define(field.define(NAME).replace(NAME, "other", 1))
            with pytest.raises(OptionError):
                a.restore("saved")
            a.restore(path).destroy()
            kinds = [kind for kind, _detail in until(seen, DomainEventKind.DESTROYED)]
        assert kinds[0] is DomainEventKind.DEFINED
        assert DomainEventKind.CRASHED not in kinds
        a.lookup_by_name("other").undefine()


# Looking at a guest


def test_screenshots(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(devices(field.definition, "<video><model type='vga'/></video>"))
        shot = domain.screenshot()
        assert (shot.media_type, shot.data[:8]) == ("image/png", PNG)
        for screen in (1, -1):
            with pytest.raises(DomainStateError, match="has no screen"):
                domain.screenshot(screen)
        assert [
            found for found in run_directories(field.roots[0])[0].iterdir() if found.suffix == ".png"
        ] == []
        domain.destroy()
        domain = a.create(field.definition)
        with pytest.raises(DomainStateError, match="no screen 0 to take a picture of"):
            domain.screenshot()
        domain.destroy()
        with pytest.raises(DomainNotFoundError):
            domain.screenshot()


@pytest.mark.parametrize("kind", ["pty", "unix"])
def test_a_console(field: Field, kind: str) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(console_definition(field, kind))
        for device in (None, "serial0"):
            with domain.console(device) as console:
                heard = b""
                while heard.count(b"\n") < 20:
                    heard += console.receive()
                words = [word.strip() for word in heard.split(b"\n")[1:-1]]
                numbers = [int(word, 16) for word in words if re.fullmatch(rb"[0-9A-F]{8}", word)]
                assert len(numbers) > 10
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                console.send(b"nobody listens")
                with pytest.raises(DomainStateError, match="somebody is connected"), domain.console(device):
                    pass
        with pytest.raises(DomainStateError, match="no console serial7"), domain.console("serial7"):
            pass
        with domain.console() as console:
            domain.destroy()
            with pytest.raises(anyio.EndOfStream):
                while True:
                    console.receive()
        with pytest.raises(DomainNotFoundError), domain.console():
            pass
    (field.directory / "console").unlink(missing_ok=True)  # QEMU was killed, and did not


def test_a_console_that_somebody_else_has(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(console_definition(field, "unix"))
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(field.directory / "console"))
            assert other.recv(1)
            with pytest.raises(DomainStateError, match="somebody is connected"), domain.console():
                pass
        domain.destroy()
        domain = a.create(field.definition)
        with pytest.raises(DomainStateError, match="leads to"), domain.console():
            pass
        domain.destroy()
    (field.directory / "console").unlink()
    with pytest.raises(ConnectionClosedError), domain.console():
        pass


def test_counters(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(devices(field.definition, "<memballoon model='virtio'/>"))
        other = a.define(field.define("other"))
        field.wait_ticks(50)
        found = domain.statistics()
        assert found.state is DomainState.RUNNING
        assert found.cpu_time_s is not None
        (vcpu_s,) = found.vcpu_time_s
        assert 0 < vcpu_s <= found.cpu_time_s + 0.1
        assert found.current_memory_bytes == domain.info().memory_bytes
        (disk,) = found.disks
        assert disk.target == "vda"
        assert (disk.read_requests or 0) >= 1
        assert (disk.read_bytes or 0) >= 512
        assert disk.write_requests == 0
        assert disk.capacity_bytes == disk.physical_bytes == MIB
        many = a.statistics()
        assert {uuid: one.state for uuid, one in many.items()} == {
            domain.uuid: DomainState.RUNNING,
            other.uuid: DomainState.SHUT_OFF,
        }
        assert many[domain.uuid].disks[0].target == "vda"
        assert list(a.statistics([other])) == [other.uuid]
        assert other.statistics().disks == ()

        # One that hangs hides the others not.
        other.start()
        (pid,) = set(field.emulators()) - {_pid_of(field, domain)}
        os.kill(pid, signal.SIGSTOP)
        many = a.statistics()
        assert many[other.uuid].state is DomainState.RUNNING
        assert many[other.uuid].disks == ()
        assert many[domain.uuid].disks[0].target == "vda"
        os.kill(pid, signal.SIGCONT)
        for each in a.list_domains():
            each.destroy()
        other.undefine()
        assert a.statistics() == {}


def _pid_of(field: Field, domain: Domain) -> int:
    for run in run_directories(field.roots[0]):
        found = json.loads((run / "guest.json").read_text())
        if found["uuid"] == domain.uuid:
            return int(found["identity"].split(":")[1])
    raise AssertionError(f"{domain} has no process")


def test_the_dirty_rate(heavy_field: Field) -> None:
    with ferryman.sync.connect(heavy_field.uris[0]) as a:
        domain = a.create(heavy_field.definition)
        heavy_field.wait_ticks(50)
        assert domain.dirty_rate(0.5) > MIB
        domain.suspend()
        with pytest.raises(DomainStateError, match="does not run"):
            domain.dirty_rate()
        domain.destroy()


def test_memory_in_the_definition(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        plain = a.create(field.definition)
        with pytest.raises(DomainStateError, match="has no balloon"):
            plain.set_memory(16 * MIB)
        with pytest.raises(DomainStateError, match="transient"):
            plain.set_memory(16 * MIB, Scope.CONFIG)
        plain.destroy()
        domain = a.define(devices(field.definition, "<memballoon model='virtio'/>"))
        memory_bytes = domain.info().memory_bytes
        with pytest.raises(DomainStateError, match="shut off"):
            domain.set_memory(16 * MIB, Scope.LIVE)
        for scope in (Scope.CONFIG, Scope.LIVE):
            with pytest.raises(OptionError, match="less than"):
                domain.set_memory(memory_bytes + 1, scope)
        domain.set_memory(16 * MIB)
        assert f"<currentMemory>{16 * 1024}</currentMemory>" in domain.definition()
        assert domain.info().memory_bytes == memory_bytes
        domain.start()
        field.wait_ticks(20)
        domain.set_memory(memory_bytes, Scope.BOTH)
        domain.destroy()
        domain.undefine()
