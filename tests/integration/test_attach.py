"""QEMUs that another program has started: taken in by their monitor's socket, and migrated for it."""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import ferryman.sync
from ferryman import MigrationOptions, StorageCopy
from ferryman.errors import (
    ConnectError,
    DomainExistsError,
    DomainStateError,
    NotSupportedError,
    PlanBlockedError,
)
from ferryman.types import DomainState, FindingSeverity
from tests.qemu import MIB, NAME, PROMPT_S, USUAL, Field, end_process, laid_out

UUID = str(uuid.uuid4())
SIZE = f"size={(USUAL.memory_bytes >> 10) + 8}k"


@pytest.fixture
def field() -> Iterator[Field]:
    with laid_out() as made:
        yield made


@contextmanager
def started(field: Field, name: str, *more: str, uuid: str = UUID, memory: str = SIZE) -> Iterator[Path]:
    """A QEMU as another program would start it; yields the socket of its monitor, and ends it."""
    path = field.directory / f"{name}.monitor"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    path.unlink()
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-name", f"guest={NAME}", "-m", memory]
    argv += ["-uuid", uuid] if uuid else []
    argv += ["-chardev", f"socket,id=serial,path={field.witness.socket_path}", "-serial", "chardev:serial"]
    argv += ["-drive", f"file={field.directory / 'image'},format=raw,if=none,id=image,readonly=on"]
    argv += ["-device", "virtio-blk-pci,drive=image,bootindex=1,id=disk"]
    argv += ["-chardev", f"socket,id=monitor,path={path},server=on,wait=off", "-mon", "monitor,mode=control"]
    argv += ["-daemonize", "-pidfile", str(path.with_suffix(".pid")), *more]
    subprocess.run(argv, check=True, timeout=PROMPT_S)
    try:
        yield path
    finally:
        pid = int(path.with_suffix(".pid").read_text()) if path.with_suffix(".pid").exists() else 0
        if pid in field.emulators():
            end_process(pid)
        path.unlink(missing_ok=True)


RECEIVER = ("-S", "-incoming", "defer")


def test_a_guest_that_another_program_started_crosses(field: Field) -> None:
    with ExitStack() as stack:
        here = stack.enter_context(started(field, "here"))
        there = stack.enter_context(started(field, "there", *RECEIVER))
        a, b = (stack.enter_context(ferryman.sync.connect(uri)) for uri in field.uris)
        domain = a.attach(here)
        assert (domain.name, domain.uuid) == (NAME, UUID)
        info = domain.info()
        assert (info.state, info.persistent, info.vcpus) == (DomainState.RUNNING, False, 1)
        assert info.memory_bytes == USUAL.memory_bytes + 8192
        field.wait_ticks(20)
        plan = domain.plan_migration(b)
        assert [finding.code for finding in plan.blockers] == ["receiver-missing"]
        assert "attach_receiver" in plan.blockers[0].remedy
        b.attach_receiver(there)
        assert b.list_domains() == []
        plan = domain.plan_migration(b)
        assert [(f.code, f.severity) for f in plan.findings] == [("foreign-monitor", FindingSeverity.WARNING)]
        result = plan.execute().result()
        assert result.uuid == UUID
        field.wait_ticks(50)
        assert a.list_domains() == []
        assert [found.name for found in b.list_domains()] == [NAME]
        assert len(field.emulators()) <= 1
        b.lookup_by_name(NAME).destroy()
    field.assert_unbroken(crossings=1)


def test_an_attached_guest_is_found_again(field: Field) -> None:
    with started(field, "here") as here:
        with ferryman.sync.connect(field.uris[0]) as a:
            a.attach(here)
        field.wait_ticks(20)
        with ferryman.sync.connect(field.uris[0]) as a:
            domain = a.lookup_by_uuid(UUID)
            domain.suspend()
            assert domain.info().state is DomainState.PAUSED
            domain.resume()
            with pytest.raises(DomainExistsError):
                a.attach(here, name="other")
            domain.destroy()
            assert a.list_domains() == []


def test_what_cannot_be_known_is_refused(field: Field) -> None:
    with ExitStack() as stack:
        here = stack.enter_context(started(field, "here"))
        a, b = (stack.enter_context(ferryman.sync.connect(uri)) for uri in field.uris)
        domain = a.attach(here)
        for options in (
            MigrationOptions(name="other"),
            MigrationOptions(persist=True),
            MigrationOptions(copy_storage=StorageCopy.FULL),
        ):
            codes = [finding.code for finding in domain.plan_migration(b, options).blockers]
            assert "definition-missing" in codes
        # Another machine is no receiver for it.
        other = stack.enter_context(started(field, "other", *RECEIVER, memory=f"size={64 * MIB >> 10}k"))
        b.attach_receiver(other)
        blockers = domain.plan_migration(b).blockers
        assert [finding.code for finding in blockers] == ["machine-differs"]
        assert "memory" in blockers[0].message
        with pytest.raises(PlanBlockedError):
            domain.migrate(b).result()
        field.wait_ticks(20)
        domain.destroy()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "-incoming defer"),
        (("-incoming", "defer"), "-S"),
        (("-S", "-incoming", "tcp:127.0.0.1:0"), "listens already"),
    ],
)
def test_a_receiver_that_could_run_by_itself(field: Field, more: tuple[str, ...], said: str) -> None:
    with started(field, "there", *more) as there, ferryman.sync.connect(field.uris[1]) as b:
        with pytest.raises(DomainStateError, match=said):
            b.attach_receiver(there)
        assert len(field.emulators()) == 1
        assert list((field.roots[1] / "run").iterdir()) == []


def test_sockets_that_are_no_free_monitor(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        with pytest.raises(ConnectError, match="reached"):
            a.attach(field.directory / "nothing")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(field.directory / "other"))
            listener.listen()
            with pytest.raises(ConnectError, match="not QEMU"):
                a.attach(field.directory / "other")
        (field.directory / "other").unlink()
        with started(field, "here", uuid="") as here:
            with pytest.raises(DomainStateError, match="uuid="):
                a.attach(here)
            domain = a.attach(here, uuid=UUID, name="named")
            assert domain.name == "named"
            with (
                ferryman.sync.connect(field.uris[1]) as b,
                pytest.raises(ConnectError, match="somebody else"),
            ):
                b.attach(here, uuid=UUID)
            domain.destroy()
        assert list((field.roots[0] / "run").iterdir()) == []


def test_a_driver_without_the_hook() -> None:
    with ferryman.sync.connect("test:///attach/alpha") as host, pytest.raises(NotSupportedError):
        host.attach(sys.executable)
