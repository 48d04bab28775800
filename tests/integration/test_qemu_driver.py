"""The QEMU driver on real QEMU: domains, definitions, the host, and what stops a migration before it begins."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import ferryman
import ferryman.connection
import ferryman.sync
from ferryman import MigrationOptions
from ferryman.errors import (
    ConnectError,
    DefinitionError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    FerrymanError,
    HostBusyError,
    HypervisorError,
    PlanBlockedError,
    PlanStaleError,
)
from ferryman.hookspecs import HostRequest, OpenReply, OpenRequest, hookimpl
from ferryman.types import DomainEventKind, DomainState, Feature, GuestState, Side
from ferryman_qemu.driver import QemuDriver
from ferryman_qemu.probe import Emulator
from tests.guests.inspect import pids, run_directories
from tests.guests.linux import KERNEL_DIRECTORY, LinuxGuest
from tests.qemu import MIB, NAME, PROMPT_S, Field, emulators, laid_out, need

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from ferryman.capabilities import Capabilities
    from ferryman.sync import Connection

OTHER_UUID = "9d6a0d2a-6f43-4d0c-8f4e-0a2f4f8f8e11"


@pytest.fixture
def hosts(field: Field) -> Iterator[tuple[Connection, Connection]]:
    """Both hosts of the usual field, open."""
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        yield a, b


# Guests and programs


def test_guests_outlive_the_program(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        uuid = a.create(field.definition).uuid
        (pid,) = pids(field.roots[0])
        field.wait_ticks(20)
    assert field.the_runner() == pid
    for _ in range(2):
        with ferryman.sync.connect(field.uris[0]) as a:
            domain = a.lookup_by_name(NAME)
            assert (domain.uuid, domain.info().state) == (uuid, DomainState.RUNNING)
            assert field.the_runner() == pid
    with ferryman.sync.connect(field.uris[0]) as a:
        # And what it is paused or run by is the same process too.
        domain = a.lookup_by_uuid(uuid)
        domain.suspend()
    count = field.witness.count()
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.lookup_by_uuid(uuid)
        assert domain.info().state is DomainState.PAUSED
        assert field.witness.count() == count
        domain.resume()
        assert field.the_runner() == pid
        field.assert_unbroken(crossings=0)
        domain.destroy()


def test_a_guest_outlives_a_program_that_was_killed(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        a.define(field.definition)
    program = "\n".join(
        (
            "import sys, ferryman.sync",
            "with ferryman.sync.connect(sys.argv[1]) as host:",
            "    host.lookup_by_name('counter').start()",
            "    print('started', flush=True)",
            "    sys.stdin.read()",
        )
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, field.uris[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        with ferryman.sync.connect(field.uris[0]) as a:
            # It looks on, and changes nothing while the other one is there.
            assert a.lookup_by_name(NAME).info().state is DomainState.RUNNING
            with pytest.raises(HostBusyError, match=rf"process {child.pid}\)"):
                a.lookup_by_name(NAME).suspend()
        child.kill()
    assert child.returncode == -signal.SIGKILL
    with ferryman.sync.connect(field.uris[0]) as a:
        assert field.the_runner() == pids(field.roots[0])[0]
        field.assert_unbroken(crossings=0)
        a.lookup_by_name(NAME).destroy()
        a.lookup_by_name(NAME).undefine()


async def test_an_opening_that_meets_a_question_of_the_same_program(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening finds the host in use, by a question that is answered before it goes on: it gets the host."""
    found, answered = anyio.Event(), anyio.Event()
    real = QemuDriver.connection_open

    async def connection_open(self: QemuDriver, request: OpenRequest) -> OpenReply:
        reply = await real(self, request)
        if reply.looks_on:
            found.set()
            await answered.wait()
        return reply

    monkeypatch.setattr(QemuDriver, "connection_open", hookimpl(connection_open))

    async def ask(*, task_status: TaskStatus[None]) -> None:
        async with ferryman.connection._peer_connection(field.uris[0]):
            task_status.started()
            await found.wait()
        answered.set()

    async with anyio.create_task_group() as tasks:
        await tasks.start(ask)
        async with ferryman.connect(field.uris[0]) as opened:
            assert opened.open_migrations() == []


def test_a_second_program_looks_on(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what there is, waits for the first one before it changes something, and then is the one that does."""
    monkeypatch.setattr("ferryman_qemu.root.LOCK_WAIT_S", 0.3)
    with ExitStack() as first, ferryman.sync.connect(field.uris[1]) as other:
        a = first.enter_context(ferryman.sync.connect(field.uris[0]))
        a.define(field.define("shut"))
        running = a.create(field.definition)
        paused = a.create(field.define("paused"), paused=True)
        with ferryman.sync.connect(field.uris[0]) as onlooker:
            domains = {domain.name: domain for domain in onlooker.list_domains()}
            states = {name: domain.info().state for name, domain in domains.items()}
            assert states == {
                NAME: DomainState.RUNNING,
                "paused": DomainState.PAUSED,
                "shut": DomainState.SHUT_OFF,
            }
            assert domains[NAME].definition() == running.definition()
            assert set(onlooker.statistics()) == {domain.uuid for domain in domains.values()}
            assert onlooker.capabilities() == a.capabilities()
            assert onlooker.lookup_by_uuid(paused.uuid).name == "paused"
            with pytest.raises(DomainNotFoundError):
                onlooker.lookup_by_name("nobody")
            # What the first one does is seen; nothing that would change anything is done.
            paused.destroy()
            with pytest.raises(DomainNotFoundError):
                domains["paused"].info()
            changes: list[Callable[[], object]] = [
                domains[NAME].suspend,
                domains["shut"].start,
                domains["shut"].undefine,
                lambda: onlooker.create(field.define("new")),
                lambda: domains[NAME].migrate(other).result(),
                onlooker.acquire,
            ]
            for change in changes:
                with pytest.raises(HostBusyError, match=rf"process {os.getpid()}\)"):
                    change()
            with pytest.raises(HostBusyError, match="acquire"), onlooker.events():
                pass
            with pytest.raises(HostBusyError, match="did not let go"):
                onlooker.in_doubt()
            assert {domain.name for domain in a.list_domains()} == {NAME, "shut"}
            field.the_runner()
            first.close()
            # The next change makes it the one.
            domains["shut"].undefine()
            assert onlooker.in_doubt() == []
            assert domains[NAME].migrate(other).result().uuid == running.uuid
        other.lookup_by_name(NAME).destroy()
    field.assert_unbroken(crossings=1)


def test_programs_that_look_on_at_once(field: Field) -> None:
    """QEMU's monitor for them takes one at a time, and each waits its turn."""
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.create(field.definition)
        with ExitStack() as stack:
            onlookers = [stack.enter_context(ferryman.sync.connect(field.uris[0])) for _ in range(4)]
            found: list[str] = []

            def look(onlooker: Connection) -> None:
                for _ in range(10):
                    found.extend(seen.name for seen in onlooker.list_domains())
                    assert onlooker.lookup_by_name(NAME).info().state is DomainState.RUNNING

            threads = [Thread(target=look, args=(onlooker,)) for onlooker in onlookers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PROMPT_S)
            assert found == [NAME] * 40
        domain.destroy()


def test_a_qemu_that_is_killed_is_a_crash(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        a.define(field.definition)
        for persistent in (True, False):
            domain = a.lookup_by_name(NAME)
            domain.start()
            field.wait_ticks(20)
            if not persistent:
                domain.undefine()
            os.kill(pids(field.roots[0])[0], signal.SIGKILL)
            kinds: list[DomainEventKind] = []
            while kinds[-1:] != [DomainEventKind.CRASHED]:
                event = next(seen)
                assert event.uuid == domain.uuid
                kinds.append(event.kind)
            assert DomainEventKind.DESTROYED not in kinds
            assert run_directories(field.roots[0]) == []
            if persistent:
                assert domain.info().state is DomainState.SHUT_OFF
                with pytest.raises(DomainStateError, match="shut off: start it"):
                    domain.suspend()
            else:
                assert a.list_domains() == []
                with pytest.raises(DomainNotFoundError):
                    domain.info()


async def test_a_destroyed_guest_is_gone_at_once(field: Field) -> None:
    """Whoever asks next, even at the same moment, is told that it is shut off or not there."""
    async with ferryman.connect(field.uris[0]) as a:
        domain = await a.define(field.definition)
        for _ in range(5):
            await domain.start(paused=True)
            await domain.destroy()
            assert (await domain.info()).state is DomainState.SHUT_OFF
            assert [d.name for d in await a.list_domains()] == [NAME]
            assert run_directories(field.roots[0]) == []
            assert field.emulators() == []
        await domain.undefine()


async def test_a_dying_guest_does_not_hide_the_others(field: Field) -> None:
    async with ferryman.connect(field.uris[0]) as a:
        await a.define(field.define("other"))
        domain = await a.define(field.definition)
        for _ in range(5):
            await domain.start(paused=True)
            os.kill(pids(field.roots[0])[0], signal.SIGKILL)
            with anyio.fail_after(PROMPT_S):
                while (await domain.info()).state is not DomainState.SHUT_OFF:
                    assert sorted(d.name for d in await a.list_domains()) == sorted((NAME, "other"))
                    await anyio.sleep(0)
        for left in await a.list_domains():
            await left.undefine()


def test_a_qemu_that_was_killed_while_nobody_looked(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        a.define(field.definition).start()
    (pid,) = pids(field.roots[0])
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PIDFD, process, os.WEXITED)
    os.close(process)
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.lookup_by_name(NAME)
        assert domain.info().state is DomainState.SHUT_OFF
        assert run_directories(field.roots[0]) == []
        domain.start()
        assert field.the_runner() != pid
        domain.destroy()
        domain.undefine()


def test_statistics(hosts: tuple[Connection, Connection], field: Field) -> None:
    domain = hosts[0].define(field.definition)
    assert domain.statistics().state is DomainState.SHUT_OFF
    assert domain.statistics().cpu_time_s is None
    domain.start(paused=True)
    assert domain.statistics().state is DomainState.PAUSED
    domain.resume()
    before = domain.statistics()
    field.wait_ticks(500)
    after = domain.statistics()
    assert before.cpu_time_s is not None
    assert after.cpu_time_s is not None
    assert 0 <= before.cpu_time_s < after.cpu_time_s < 60
    assert after.resident_bytes is not None
    # 20 MiB of the guest's are written, and no more than it has.
    assert 20 * MIB < after.resident_bytes < 300 * MIB
    domain.destroy()


def test_a_shutdown_is_asked_for_and_told() -> None:
    with laid_out(LinuxGuest(memory_bytes=128 * MIB, blocks_bytes=0)) as field:
        with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
            domain = a.create(field.definition)
            field.witness.wait_tick(0, PROMPT_S)
            if field.witness.lines("no power button"):
                need("the modules of the guests' kernel", here=False)
            domain.shutdown()
            kinds: list[DomainEventKind] = []
            while kinds[-1:] != [DomainEventKind.SHUT_DOWN]:
                kinds.append(next(seen).kind)
                assert DomainEventKind.CRASHED not in kinds
            assert a.list_domains() == []


# Starting


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('image"', 'gone"', "Could not open '.*gone': No such file or directory"),
        ("<devices>", "<devices><emulator>/bin/false</emulator>", "the connection to QEMU broke"),
        ("<devices>", "<devices><emulator>/bin/gone</emulator>", "/bin/gone"),
        ("32768</memory>", "999999999999</memory>", "memory|phys-bits|RAM"),
    ],
    ids=["no-disk", "not-qemu", "no-emulator", "too-much-memory"],
)
def test_qemu_cannot_start(
    hosts: tuple[Connection, Connection], field: Field, old: str, new: str, said: str
) -> None:
    definition = field.definition.replace(old, new)
    assert definition != field.definition
    with pytest.raises(HypervisorError, match=rf"(?s)domain {NAME}.*{said}"):
        hosts[0].create(definition)
    assert hosts[0].list_domains() == []
    assert (field.emulators(), run_directories(field.roots[0])) == ([], [])

    domain = hosts[0].define(definition)
    with pytest.raises(HypervisorError, match=rf"(?s)domain {NAME}.*{said}"):
        domain.start()
    assert domain.info().state is DomainState.SHUT_OFF
    assert (field.emulators(), run_directories(field.roots[0])) == ([], [])
    # The log keeps what was tried and what QEMU said.
    assert "start: " in (field.roots[0] / "logs" / f"{NAME}.log").read_text()
    # Mended, it starts.
    domain = hosts[0].define(field.definition)
    domain.start()
    field.the_runner()
    domain.destroy()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB."""
    need("root, who may mount a file system", here=os.geteuid() == 0)
    directory = Path(tempfile.mkdtemp(prefix="ferryman-it-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
        directory.rmdir()


def test_a_full_disk_is_no_broken_driver(field: Field, small_disk: Path) -> None:
    with ferryman.sync.connect(f"qemu:///embed?root={small_disk}") as host:
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        told = []
        for make in (host.create, host.define):
            with pytest.raises(FerrymanError) as caught:
                make(field.definition)
            told.append(caught.value)
        assert emulators(small_disk) == []
        left = run_directories(small_disk), list((small_disk / "domains").iterdir())
        assert host.list_domains() == []
        filler.unlink()
        domain = host.create(field.definition)
        field.wait_ticks(20)
        domain.destroy()
    assert left == ([], [])
    assert [type(error) for error in told] == [HypervisorError, HypervisorError]
    assert all("No space left" in str(error) for error in told)


# Definitions


def test_a_definition_outlives_its_guest(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.define(field.definition)
        assert (domain.info().state, domain.info().persistent) == (DomainState.SHUT_OFF, True)
        assert pids(field.roots[0]) == []
        domain.start()
        running = domain.definition()
        domain.destroy()
        assert domain.info().state is DomainState.SHUT_OFF
    with ferryman.sync.connect(field.uris[0]) as a:
        (domain,) = a.list_domains()
        assert (domain.name, domain.info().persistent) == (NAME, True)
        assert domain.definition() == running
        domain.start()
        # A guest whose definition is forgotten goes on, and is gone with its process.
        domain.undefine()
        assert (domain.info().state, domain.info().persistent) == (DomainState.RUNNING, False)
        with pytest.raises(DomainStateError, match="transient"):
            domain.undefine()
        domain.destroy()
        assert a.list_domains() == []


def test_machine_processor_and_memory_are_pinned_at_the_definition(
    hosts: tuple[Connection, Connection], field: Field
) -> None:
    text = hosts[0].define(field.definition).definition()
    assert "machine='pc'" in field.definition
    assert 'machine="pc"' not in text
    assert 'machine="pc-i440fx-' in text
    assert "<model>qemu64</model>" in text
    # QEMU before 9.0 would lose what a guest of 32 MiB writes while it moves.
    affected = hosts[0].capabilities().version < (9, 0, 0)
    assert f">{32768 + 8 * affected}</memory>" in text


def test_plan_of_a_guest_whose_writes_qemu_would_lose(
    hosts: tuple[Connection, Connection], field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by a program that did not know; it may still move while it stands still."""
    a, b = hosts
    with monkeypatch.context() as patch:
        patch.setattr(Emulator, "migratable_memory", lambda _emulator, memory_bytes, **_named: memory_bytes)
        domain = a.define(field.definition)
        domain.start()
    if a.capabilities().version >= (9, 0, 0):
        pytest.skip("this QEMU loses none")
    assert blockers(domain, b) == {("writes-lost", Side.SOURCE)}
    assert "32776 KiB" in domain.plan_migration(b).blockers[0].remedy
    domain.suspend()
    assert blockers(domain, b) == set()
    domain.migrate(b).result()
    domain = b.lookup_by_name(NAME)
    domain.resume()
    assert blockers(domain, a) == {("writes-lost", Side.SOURCE)}
    domain.destroy()
    # A restart cures it.
    domain = a.lookup_by_name(NAME)
    domain.start()
    assert blockers(domain, b) == set()
    domain.destroy()
    domain.undefine()


def test_a_name_and_a_uuid_belong_to_one_domain(hosts: tuple[Connection, Connection], field: Field) -> None:
    a = hosts[0]
    domain = a.create(field.definition)
    with pytest.raises(DomainExistsError, match=NAME):
        a.create(field.definition)
    with pytest.raises(DomainExistsError, match=f"{NAME} belongs to domain {domain.uuid}"):
        a.define(field.define(NAME))
    with pytest.raises(DomainNotFoundError):
        a.lookup_by_uuid(OTHER_UUID)
    with pytest.raises(DomainNotFoundError):
        a.lookup_by_name("nobody")
    assert len(a.list_domains()) == 1
    assert field.the_runner() == pids(field.roots[0])[0]
    domain.destroy()


@pytest.mark.parametrize(
    ("old", "new", "element", "message"),
    [
        ("<devices>", "<devices>\n<hostdev/>", "domain/devices/hostdev", "<hostdev> is not supported"),
        ("<vcpu>1<", "<vcpu>many<", "domain/vcpu", "'many' is not a whole number"),
        ("unit='KiB'", "unit='acre'", "domain/memory", "'acre' is not a unit"),
        ("bus='virtio'", "bus='nvme'", "domain/devices/disk/target", "'nvme' of <target> is not supported"),
        ("<devices>", "<cpu><model>i8080</model></cpu><devices>", "domain/cpu/model", "no CPU model i8080"),
        ("type='raw'", "type='vmdk'", "domain/devices/disk/driver", "use raw or qcow2"),
        ("offset='utc'", "offset='absolute'", "domain/clock", "offset='absolute'"),
        ("<features>", "<features><gic/>", "domain/features/gic", "<gic> in <features>"),
        ("arch='x86_64'", "arch='sparc'", "domain/os/type", "sparc"),
        ("<boot dev='hd'/>", "<boot dev='hd' order='1'/>", "domain/os/boot", "attribute order"),
        ("<source file=", "<source bridge=", "domain/devices/disk/source", "no attribute file"),
        ("machine='pc'", "machine='pc-0.1'", "domain/os/type", "no machine type pc-0.1"),
        ("<domain type='qemu'>", "<domain type='xen'>", "domain", "'xen' are not QEMU's"),
        ("</domain>", "", None, "well-formed|XML"),
    ],
)
def test_a_definition_error_names_element_and_line(
    hosts: tuple[Connection, Connection],
    field: Field,
    old: str,
    new: str,
    element: str | None,
    message: str,
) -> None:
    text = field.definition.replace(old, new, 1)
    assert text != field.definition
    for make in (hosts[0].define, hosts[0].create):
        with pytest.raises(DefinitionError, match=message) as caught:
            make(text)
        assert caught.value.element == element
        if element is not None:
            tag = element.rpartition("/")[2]
            lines = [number for number, line in enumerate(text.splitlines(), 1) if f"<{tag}" in line]
            assert caught.value.line in lines
            assert f"line {caught.value.line}" in str(caught.value)
    assert hosts[0].list_domains() == []
    assert run_directories(field.roots[0]) == []


def test_odd_names_and_long_paths_cross() -> None:
    """A comma ends one of QEMU's options, a socket's address has 107 bytes, and a log's name has no slash."""
    name = "Ärger, id=0 'x' <&>%s\\"
    with tempfile.TemporaryDirectory(prefix="ferryman-it-") as temporary:
        directory = Path(temporary) / "with, comma=and 'quotes' % ü" / ("long" * 30)
        directory.mkdir(parents=True)
        with laid_out(directory=directory) as field:
            definition = field.definition.replace(
                f"<name>{NAME}</name>", "<name>Ärger, id=0 'x' &lt;&amp;&gt;%s\\</name>"
            )
            with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
                a.create(definition)
                field.wait_ticks(20)
                domain = a.lookup_by_name(name)
                result = domain.migrate(b, MigrationOptions(persist=True)).result()
                assert result.name == name
                assert field.the_runner() == pids(field.roots[1])[0]
                command = Path(f"/proc/{pids(field.roots[1])[0]}/cmdline").read_bytes().split(b"\0")
                assert f"guest={name.replace(',', ',,')}".encode() in command
                b.lookup_by_name(name).suspend()
            assert field.wrong_pages(field.roots[1], name=name) == 0
            with ferryman.sync.connect(field.uris[1]) as b:
                b.lookup_by_name(name).destroy()
                b.lookup_by_name(name).undefine()
                assert b.list_domains() == []


# The host


@pytest.mark.parametrize(
    "uri",
    ["qemu:///embed", "qemu:///embed?root=relative", "qemu:///nowhere", "qemu:///system?root=/tmp/x"],
)
def test_a_uri_that_names_no_host(uri: str) -> None:
    with (
        pytest.raises(ConnectError, match=r"/embed\?root=|parameter root"),
        ferryman.sync.connect(uri),
    ):
        pass


def test_a_root_that_cannot_be_made(field: Field) -> None:
    (field.directory / "file").write_text("")
    uri = f"qemu:///embed?root={field.directory}/file"
    with pytest.raises(ConnectError, match="cannot be used"), ferryman.sync.connect(uri):
        pass


def test_capabilities_say_what_was_tried(hosts: tuple[Connection, Connection], field: Field) -> None:
    a, b = (host.capabilities() for host in hosts)
    assert a.host_uuid != b.host_uuid
    assert (a.scheme, a.arch) == ("qemu", "x86_64")
    told = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True)
    assert f"version {'.'.join(map(str, a.version))}" in told.stdout
    assert (Feature.POSTCOPY in a.features) == (a.version[:2] == (7, 2))
    assert Feature.TLS not in a.features
    assert ("kvm" in a.domain_types) == _kvm_works()
    with ferryman.sync.connect(f"qemu:///embed?root={field.directory}/c") as again:
        assert again.capabilities().host_uuid not in (a.host_uuid, b.host_uuid)


def _kvm_works() -> bool:
    """Whether a machine with KVM runs its firmware here, which greets when it runs."""
    argv = ["qemu-system-x86_64", "-machine", "pc", "-accel", "kvm", "-nodefaults", "-display", "none"]
    argv += ["-chardev", "stdio,id=said", "-device", "isa-debugcon,iobase=0x402,chardev=said"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as machine:
        try:
            assert machine.stdout is not None
            ready, _, _ = select.select([machine.stdout], [], [], PROMPT_S)
            return bool(ready) and b"SeaBIOS" in machine.stdout.readline()
        finally:
            machine.kill()


# Plans on real hosts


def blockers(
    domain: ferryman.sync.Domain, there: Connection, **options: object
) -> set[tuple[str, Side | None]]:
    """Codes and sides of what stops a migration, which is then refused, with the guest untouched."""
    asked = MigrationOptions(**options)  # type: ignore[arg-type]
    plan = domain.plan_migration(there, asked)
    found = {(finding.code, finding.side) for finding in plan.blockers}
    if found:
        assert all(finding.remedy and finding.message for finding in plan.blockers)
        assert all(finding.code in plan.explain() for finding in plan.blockers)
        with pytest.raises(PlanBlockedError) as caught:
            domain.migrate(there, asked).result()
        assert {(finding.code, finding.side) for finding in caught.value.findings} == found
        assert caught.value.guest_state in (None, GuestState.SOURCE)
        assert there.open_migrations() == []
    return found


def test_plan_of_what_can_be_done(hosts: tuple[Connection, Connection], field: Field) -> None:
    a, b = hosts
    domain = a.create(field.definition)
    asked = MigrationOptions(
        name="x",
        bandwidth_bytes_per_s=MIB,
        max_downtime_ms=5,
        paused=True,
        persist=True,
        undefine_source=True,
    )
    plan = domain.plan_migration(b, asked)
    assert (plan.blockers, plan.dropped) == ((), ())
    assert plan.effective == asked
    assert plan.explain().endswith("ready")
    # A plan changes nothing.
    assert (pids(field.roots[1]), a.open_migrations(), b.open_migrations()) == ([], [], [])
    domain.destroy()


def test_plan_storage(hosts: tuple[Connection, Connection], field: Field) -> None:
    a, b = hosts
    domain = a.create(field.definition)
    field.wait_ticks(20)
    image, moved = field.directory / "image", field.directory / "moved"
    assert blockers(domain, b) == set()
    image.rename(moved)
    assert blockers(domain, b) == {("storage-missing", Side.DESTINATION)}
    # Another file of the same name and content: the guest has the first one open.
    shutil.copy(moved, image)
    assert blockers(domain, b) == {("storage-not-shared", Side.DESTINATION)}
    image.unlink()
    image.mkdir()
    assert blockers(domain, b) != set()
    image.rmdir()
    moved.rename(image)
    assert blockers(domain, b) == set()
    assert field.the_runner() == pids(field.roots[0])[0]
    domain.destroy()


def test_plan_of_a_domain_that_is_shut_off(hosts: tuple[Connection, Connection], field: Field) -> None:
    """It is shut off, and nothing else is said of it: its disk is the same file."""
    a, b = hosts
    domain = a.define(field.definition)
    assert blockers(domain, b) == {("domain-not-active", Side.SOURCE)}
    domain.undefine()


def test_plan_names_and_places(hosts: tuple[Connection, Connection], field: Field) -> None:
    a, b = hosts
    domain = a.create(field.definition)
    assert blockers(domain, b) == set()
    assert ("same-host", None) in blockers(domain, a)

    taken = b.define(field.define(NAME))
    assert blockers(domain, b) == {("name-taken", Side.DESTINATION)}
    assert blockers(domain, b, name="free") == set()
    taken.undefine()
    same = b.define(field.definition.replace(f"<name>{NAME}<", "<name>older<"))
    assert blockers(domain, b) == {("uuid-taken", Side.DESTINATION)}
    assert blockers(domain, b, name="older") == set()
    same.start(paused=True)
    assert blockers(domain, b, name="older") == {("uuid-taken", Side.DESTINATION)}
    same.destroy()
    same.undefine()
    assert blockers(domain, b) == set()

    assert blockers(domain, b, migration_uri="rdma://there:1") == {("transport-unsupported", None)}
    assert blockers(domain, b, migration_uri="tcp://there:99999") == {("migration-uri-invalid", None)}
    domain.destroy()


@contextmanager
def other_emulator(root: Path) -> Iterator[dict[str, Any]]:
    """Change what a host knows of its QEMU: that is in a cache, which then says what another one would."""
    with ferryman.sync.connect(f"qemu:///embed?root={root}"):
        pass
    probe = root / "probe.json"
    told = json.loads(probe.read_text())
    yield told["emulator"]
    probe.write_text(json.dumps(told))


def test_plan_of_an_older_emulator(field: Field) -> None:
    with other_emulator(field.roots[1]) as told:
        machines = told["machines"]
        told["machines"] = {name: to for name, to in machines.items() if to != machines["pc"]}
        told["version"] = [7, 1, 0]
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        assert b.capabilities().version == (7, 1, 0)
        domain = a.create(field.definition)
        field.wait_ticks(20)
        assert blockers(domain, b) == {("machine-unknown", Side.DESTINATION)}
        assert [f.code for f in domain.plan_migration(b).warnings] == ["version-older"]
        assert field.the_runner() == pids(field.roots[0])[0]
        domain.destroy()


@pytest.mark.parametrize(
    ("cpu", "missing", "expected", "said"),
    [
        ("<cpu><model>qemu64</model></cpu>", [], set(), ""),
        ("", None, {("cpu-unknown", Side.DESTINATION)}, "no CPU model qemu64"),
        ("", ["avx", "svm"], {("cpu-differs", Side.DESTINATION)}, "it would be qemu64 without avx, svm"),
        ("<cpu mode='maximum'/>", [], {("cpu-differs", Side.DESTINATION)}, "all that QEMU 99.0.0 emulates"),
        ("<cpu mode='host-passthrough'/>", [], {("cpu-differs", Side.DESTINATION)}, "all that QEMU 99.0.0"),
    ],
    ids=["same", "unknown", "lacks-features", "maximum", "passthrough"],
)
def test_plan_of_another_processor(
    field: Field, cpu: str, missing: list[str] | None, expected: set[object], said: str
) -> None:
    with other_emulator(field.roots[1]) as told:
        told["version"] = [99, 0, 0]
        if missing is None:
            del told["cpus"]["tcg"]["qemu64"]
        else:
            told["cpus"]["tcg"]["qemu64"] = missing
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition.replace("<devices>", f"{cpu}<devices>"))
        assert blockers(domain, b) == expected
        assert said in domain.plan_migration(b).explain()
        domain.destroy()


def test_plan_of_a_kernel_that_is_missing() -> None:
    with laid_out(LinuxGuest(memory_bytes=128 * MIB, blocks_bytes=0)) as field:
        kernel = field.directory / "kernel"
        kernel.symlink_to(KERNEL_DIRECTORY / "vmlinuz")
        definition = field.definition.replace(str(KERNEL_DIRECTORY / "vmlinuz"), str(kernel))
        with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
            domain = a.create(definition)
            assert blockers(domain, b) == set()
            kernel.unlink()
            assert blockers(domain, b) == {("file-missing", Side.DESTINATION)}
            domain.destroy()


def test_best_effort(
    hosts: tuple[Connection, Connection], field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that can do less, as an older one could."""
    real = QemuDriver.capabilities

    @hookimpl
    async def capabilities(self: QemuDriver, request: HostRequest) -> Capabilities:
        able = await real(self, request)
        return replace(able, features=able.features - {Feature.RENAME, Feature.BANDWIDTH})

    domain = hosts[0].create(field.definition)
    field.wait_ticks(20)
    with monkeypatch.context() as patch:
        patch.setattr(QemuDriver, "capabilities", capabilities)
        with (
            ferryman.sync.connect(f"qemu:///embed?root={field.directory}/c") as older,
        ):
            asked = {"name": "new", "bandwidth_bytes_per_s": 64 * MIB}
            assert blockers(domain, older, **asked) == {("option-unsupported", None)}
            options = MigrationOptions(**asked, best_effort=frozenset({"name"}))  # type: ignore[arg-type]
            plan = domain.plan_migration(older, options)
            assert (plan.blockers, plan.dropped) == ((), ("name",))
            assert (plan.effective.name, plan.effective.bandwidth_bytes_per_s) == (None, 64 * MIB)
            result = plan.execute().result()
            assert (result.name, result.dropped_options) == (NAME, ("name",))
            older.lookup_by_name(NAME).migrate(hosts[1]).result()
    # Where everything is supported, best effort drops nothing.
    options = MigrationOptions(name="new", best_effort=frozenset({"name", "bandwidth_bytes_per_s"}))
    result = hosts[1].lookup_by_name(NAME).migrate(hosts[0], options).result()
    assert (result.name, result.dropped_options) == ("new", ())
    field.assert_unbroken(crossings=3)
    hosts[0].lookup_by_name("new").destroy()


def test_the_plan_that_was_shown_is_the_plan_that_runs(
    hosts: tuple[Connection, Connection], field: Field
) -> None:
    a, b = hosts
    domain = a.create(field.definition)
    field.wait_ticks(20)
    plan = domain.plan_migration(b)
    domain.suspend()
    with pytest.raises(PlanStaleError, match="was running and is paused"):
        plan.execute().result()
    domain.resume()
    (field.directory / "image").rename(field.directory / "moved")
    with pytest.raises(PlanStaleError, match="new: .*cannot be read there"):
        plan.execute().result()
    (field.directory / "moved").rename(field.directory / "image")
    assert plan.execute().result().name == NAME
    field.assert_unbroken(crossings=1)
    b.lookup_by_name(NAME).destroy()
