"""Disks that two hosts do not share, copied between real QEMUs while the guest writes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import ferryman
from ferryman import Connection, Domain, MigrationOptions, ProgressEvent
from ferryman.errors import (
    FerrymanError,
    HypervisorError,
    MigrationAbortedError,
    PerformError,
    PlanBlockedError,
    PrepareError,
)
from ferryman.types import DomainState, MigrationId, Postcopy, StorageCopy
from ferryman_qemu.machine import read_machine
from ferryman_qemu.storage import (
    Copies,
    decode_facts,
    encode_facts,
    identify,
    keep_targets,
    learn_facts,
    make_targets,
    remove_targets,
    stray_targets,
)
from tests.guests.counter import CounterGuest
from tests.guests.inspect import QMPSocket, pids, run_directories
from tests.qemu import MIB, NAME, PROMPT_S, Field, end_process, laid_out, need

WRITER = CounterGuest(
    memory_bytes=16 * MIB, tick_hz=1000, page_count=2000, pages_per_tick=1, prefill=True, disk_ticks=2
)
"""A guest that writes its disk five hundred times a second."""

FULL, TOP = StorageCopy.FULL, StorageCopy.TOP


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def writer() -> Iterator[Field]:
    """Two hosts, and a guest that writes its disk."""
    with laid_out(WRITER) as made:
        yield made


@asynccontextmanager
async def both(field: Field) -> AsyncIterator[tuple[Connection, Connection]]:
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        yield a, b


async def start(field: Field, host: Connection, more: str = "") -> Domain:
    definition = field.definition.replace("</disk>\n", f"</disk>\n{more}", 1)
    domain = await host.create(definition)
    await anyio.to_thread.run_sync(field.wait_ticks, 20)
    return domain


def disk(path: Path, target: str, *, kind: str = "raw", more: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/>{more}</disk>\n"
    )


def moved(field: Field, **paths: str) -> tuple[tuple[str, str], ...]:
    return tuple((target, str(field.directory / name)) for target, name in paths.items())


def sparse(path: Path, size: int) -> Path:
    """A file with data at both ends and in the middle."""
    with path.open("wb") as file:
        for offset in (0, size // 2 // 512 * 512, size - 65536):
            file.seek(offset)
            file.write(os.urandom(65536))
        file.truncate(size)
    return path


def image(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, timeout=PROMPT_S)


def assert_equal(one: Path, other: Path, kind: str = "raw") -> None:
    image("compare", "-U", "-f", kind, "-F", kind, one, other)


def fill(path: Path, size: int, kind: str = "qcow2", base: Path | None = None) -> Path:
    backing = ("-b", base, "-F", "qcow2") if base is not None else ()
    image("create", "-q", "-f", kind, *backing, path, size)
    subprocess.run(
        ["qemu-io", "-f", kind, "-c", "write -P 7 0 1M", "-c", f"write -P 9 {size - MIB} 1M", str(path)],
        check=True,
        capture_output=True,
        timeout=PROMPT_S,
    )
    return path


async def assert_disk_is_the_guests(field: Field, domain: Domain, path: Path) -> None:
    """Stop the guest: its disk holds what the last tick calls for, no older one and none that nobody heard."""
    await anyio.to_thread.run_sync(field.wait_ticks, 20)
    await domain.suspend()
    last = field.witness.last()
    assert last is not None
    due = last.value - last.value % WRITER.disk_ticks
    oldest = due - WRITER.disk_ticks if due == last.value else due
    # A tick is printed before it is written; the next one may be in the middle of being printed.
    assert oldest <= WRITER.tick_on_disk(path) <= last.value + 1
    await domain.resume()
    field.assert_unbroken()


def ask(root: Path, question: str) -> Any:
    (directory,) = run_directories(root)
    with QMPSocket(directory / "read") as qmp:
        return qmp.execute(question)


def assert_nothing_left(field: Field, here: int, *copies: Path) -> None:
    """The guest's host has no job, no node of a copy and no export; the other one has nothing at all."""
    root, other = field.roots[here], field.roots[1 - here]
    assert [path for path in copies if path.exists()] == []
    for one in field.roots:
        assert list((one / "made").glob("*")) == []
    assert field.emulators(other) == []
    assert ask(root, "query-jobs") == ask(root, "query-block-exports") == []
    names = [node["node-name"] for node in ask(root, "query-named-block-nodes")]
    assert [name for name in names if name.startswith("ferryman-copy")] == []


# Copies


async def test_disks_of_every_kind_are_copied(writer: Field) -> None:
    """Sizes that are not round, holes, an image on a base, one that is shared and one that is read-only."""
    need("qemu-io", here=shutil.which("qemu-io") is not None)
    directory = writer.directory
    big = sparse(directory / "big", 300 * MIB + 512)
    small = sparse(directory / "small", MIB + 1536)
    base = fill(directory / "base", 8 * MIB)
    layered = fill(directory / "layered", 8 * MIB, base=base)
    shared, fixed = sparse(directory / "shared", 2 * MIB), sparse(directory / "fixed", 2 * MIB)
    more = (
        disk(big, "vdb")
        + disk(small, "vdc")
        + disk(layered, "vdd", kind="qcow2")
        + disk(shared, "vde")
        + disk(fixed, "vdf", more="<readonly/>")
    )
    options = MigrationOptions(
        copy_storage=FULL, disks=moved(writer, hda="hda", vdb="big2", vdc="small2", vdd="layered2")
    )
    async with both(writer) as (a, b):
        domain = await start(writer, a, more)
        figures = []
        async with domain.migrate(b, options) as job:
            async for event in job.progress():
                if isinstance(event, ProgressEvent) and event.statistics.storage_total_bytes:
                    figures.append((event.statistics.storage_bytes, event.statistics.storage_total_bytes))
        assert figures[-1][0] == figures[-1][1] > 300 * MIB
        domain = await b.lookup_by_name(NAME)
        await assert_disk_is_the_guests(writer, domain, directory / "hda")
        kept = WRITER.tick_on_disk(directory / "image")
        assert_equal(big, directory / "big2")
        assert_equal(small, directory / "small2")
        assert_equal(layered, directory / "layered2", "qcow2")
        assert big.stat().st_size == (directory / "big2").stat().st_size
        assert (directory / "big2").stat().st_blocks * 512 < 2 * MIB
        assert b"base" not in subprocess.check_output(["qemu-img", "info", "-U", str(directory / "layered2")])
        assert (directory / "layered2").stat().st_mode & 0o777 == 0o600
        opened = {os.readlink(entry) for entry in os.scandir(f"/proc/{pids(writer.roots[1])[0]}/fd")}
        assert {str(shared), str(fixed)} <= opened
        assert not {str(big), str(base)} & opened
        # The source's disk is as it was at the switch.
        assert WRITER.tick_on_disk(directory / "image") == kept
        assert_nothing_left(writer, 1)
        await domain.destroy()


async def test_a_top_is_copied_onto_the_base_that_is_there(writer: Field) -> None:
    need("qemu-io", here=shutil.which("qemu-io") is not None)
    directory = writer.directory
    base = fill(directory / "base", 64 * MIB)
    top = directory / "top"
    image("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    image_io = ["qemu-io", "-f", "qcow2", "-c", "write -P 5 4M 64k", str(top)]
    subprocess.run(image_io, check=True, capture_output=True, timeout=PROMPT_S)
    async with both(writer) as (a, b):
        domain = await start(writer, a, disk(top, "vdb", kind="qcow2"))
        options = MigrationOptions(copy_storage=TOP, copy_disks=("vdb",), disks=moved(writer, vdb="top2"))
        await domain.migrate(b, options)
        domain = await b.lookup_by_name(NAME)
        assert_equal(top, directory / "top2", "qcow2")
        assert (directory / "top2").stat().st_blocks * 512 < MIB
        told = json.loads(
            subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(directory / "top2")])
        )
        assert told["full-backing-filename"] == str(base)
        # The disk that was not chosen is shared, and the guest still writes it.
        await assert_disk_is_the_guests(writer, domain, directory / "image")
        await domain.destroy()


@pytest.mark.parametrize(
    "more",
    [
        {"listen_address": "::1"},
        {"listen_address": "0.0.0.0", "migration_uri": "tcp://127.0.0.1"},
        {"migration_uri": "unix"},
        {"tls": True, "tls_name": "b"},
        {"streams": 2},
        {"auto_converge": True},
        {"copy_synchronously": True, "copy_bandwidth_bytes_per_s": 1 << 30},
        {"persist": True},
    ],
    ids=lambda more: "-".join(more),
)
async def test_ways_and_options(writer: Field, more: dict[str, Any]) -> None:
    if more.get("migration_uri") == "unix":
        more = {"migration_uri": f"unix:{writer.directory / 'stream'}"}
    for root in writer.roots:
        (root / "pki").mkdir(parents=True)
        key = root / "pki" / "keys.psk"
        key.write_text(f"qemu:{'5a' * 32}\n")
        key.chmod(0o600)
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        options = MigrationOptions(copy_storage=FULL, disks=moved(writer, hda="hda"), **more)
        await domain.migrate(b, options)
        domain = await b.lookup_by_name(NAME)
        await assert_disk_is_the_guests(writer, domain, writer.directory / "hda")
        assert_nothing_left(writer, 1)
        await domain.destroy()
        if more.get("persist"):
            await domain.undefine()


async def test_the_copys_bandwidth_in_flight(writer: Field) -> None:
    data = writer.directory / "data"
    data.write_bytes(os.urandom(64 * MIB))
    async with both(writer) as (a, b):
        domain = await start(writer, a, disk(data, "vdb"))
        options = MigrationOptions(
            copy_storage=FULL, copy_bandwidth_bytes_per_s=MIB, disks=moved(writer, hda="hda", vdb="data2")
        )
        with anyio.fail_after(PROMPT_S):  # at this pace the copy alone would take a minute
            async with domain.migrate(b, options) as job:
                async for event in job.progress():
                    if isinstance(event, ProgressEvent) and event.statistics.storage_total_bytes:
                        await job.set_copy_bandwidth(0)
                        break
                await job.result()
        domain = await b.lookup_by_name(NAME)
        assert data.read_bytes() == (writer.directory / "data2").read_bytes()
        await domain.destroy()


async def test_a_paused_guest(writer: Field) -> None:
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        await domain.suspend()
        await domain.migrate(b, MigrationOptions(copy_storage=FULL, disks=moved(writer, hda="hda")))
        domain = await b.lookup_by_name(NAME)
        assert (await domain.info()).state is DomainState.PAUSED
        assert (writer.directory / "hda").read_bytes() == (writer.directory / "image").read_bytes()
        assert ask(writer.roots[1], "query-block-exports") == []
        await domain.resume()
        await assert_disk_is_the_guests(writer, domain, writer.directory / "hda")
        await domain.destroy()


async def test_back_and_forth_under_load(writer: Field) -> None:
    """Ten times: the disk that the guest has says what was heard of it, and the one that it had stays as it was."""
    async with both(writer) as hosts:
        domain = await start(writer, hosts[0])
        path = writer.directory / "image"
        for number in range(10):
            there = writer.directory / f"copy{number}"
            before = writer.witness.last()
            assert before is not None
            options = MigrationOptions(
                copy_storage=FULL,
                disks=(("hda", str(there)),),
                copy_synchronously=number % 2 == 1,
                paused=number % 4 < 2,
            )
            await domain.migrate(hosts[1 - number % 2], options)
            domain = await hosts[1 - number % 2].lookup_by_name(NAME)
            kept = WRITER.tick_on_disk(path)
            if options.paused:
                # Before the next write can hide a lost one.
                assert path.read_bytes() == there.read_bytes()
                await domain.resume()
            assert before.value - 2 * WRITER.disk_ticks <= kept
            await assert_disk_is_the_guests(writer, domain, there)
            assert kept == WRITER.tick_on_disk(path) < WRITER.tick_on_disk(there)
            path.unlink()
            path = there
        writer.assert_unbroken(crossings=10)
        assert_nothing_left(writer, 0)
        await domain.destroy()


@contextmanager
def loop_device(path: Path, size: int) -> Iterator[Path]:
    """A block device of a size, made of a file."""
    with path.open("wb") as file:
        file.truncate(size)
    done = subprocess.run(
        ["losetup", "-f", "--show", str(path)], capture_output=True, text=True, check=False, timeout=PROMPT_S
    )
    need("the right to make a loop device", here=done.returncode == 0)
    device = done.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=PROMPT_S)


async def test_a_block_device_is_copied_into(writer: Field) -> None:
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        image_path = writer.directory / "image"
        with (
            loop_device(writer.directory / "right", MIB) as device,
            loop_device(writer.directory / "wrong", 2 * MIB) as wrong,
        ):

            def options(path: Path, definition: str) -> MigrationOptions:
                there = definition.replace("<disk type='file'", "<disk type='block'", 1)
                there = there.replace('<disk type="file"', '<disk type="block"', 1)
                for quote in "'\"":
                    there = there.replace(f"file={quote}{image_path}{quote}", f"dev={quote}{path}{quote}")
                return MigrationOptions(copy_storage=FULL, destination_definition=there, paused=True)

            definition = await domain.definition()
            plan = await domain.plan_migration(b, options(wrong, definition))
            assert [finding.code for finding in plan.blockers] == ["storage-copy"]
            await domain.migrate(b, options(device, definition))
            domain = await b.lookup_by_name(NAME)
            assert device.read_bytes() == image_path.read_bytes()
            await domain.resume()
            await assert_disk_is_the_guests(writer, domain, device)
            await domain.destroy()


# What the plan finds


async def blockers(domain: Domain, there: Connection, **options: Any) -> list[str]:
    plan = await domain.plan_migration(there, MigrationOptions(**options))
    return [finding.code for finding in plan.blockers]


@contextmanager
def small_file_system(field: Field) -> Iterator[Path]:
    path = field.directory / "tiny"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False
    )
    need("the right to mount a tmpfs", here=done.returncode == 0)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=PROMPT_S)


async def test_what_the_plan_finds(writer: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = writer.directory
    data = directory / "data"
    data.write_bytes(os.urandom(2 * MIB))
    fixed = sparse(directory / "fixed", MIB)
    top = directory / "top"
    base = directory / "base"
    image("create", "-q", "-f", "qcow2", base, MIB)
    image("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    more = disk(data, "vdb") + disk(fixed, "vdc", more="<readonly/>") + disk(top, "vdd", kind="qcow2")
    async with both(writer) as (a, b):
        domain = await start(writer, a, more)
        there = directory / "there"
        find = partial(blockers, domain, b)
        disks: Any = (("vdb", str(there)),)
        assert await find() == []
        assert await find(disks=disks) == ["storage-missing"]
        assert await find(disks=disks, copy_storage=FULL) == []
        there.write_bytes(b"somebody's")
        assert await find(disks=disks) == ["storage-not-shared"]
        assert await find(disks=disks, copy_storage=FULL) == ["storage-exists"]
        with pytest.raises(PlanBlockedError):
            await domain.migrate(b, MigrationOptions(disks=disks, copy_storage=FULL))
        assert there.read_bytes() == b"somebody's"
        there.unlink()
        assert await find(disks=disks, copy_storage=FULL, postcopy=Postcopy.ON_REQUEST) == [
            "options-conflict"
        ]
        nowhere: Any = (("vdb", str(directory / "no" / "where")),)
        assert await find(disks=nowhere, copy_storage=FULL) == ["storage-missing"]
        assert await find(copy_storage=FULL, copy_disks=("vdx",)) == ["storage-copy"]
        assert await find(copy_storage=FULL, copy_disks=("vdb",)) == ["storage-copy"]
        assert await find(
            copy_storage=FULL, copy_disks=("vdc",), disks=(("vdc", str(directory / "fixed2")),)
        ) == ["storage-copy"]
        assert await find(disks=disks, copy_storage=TOP) == ["storage-copy"]
        moved_top: Any = (("vdd", str(directory / "top2")),)
        base.rename(directory / "away")
        assert await find(disks=moved_top, copy_storage=TOP) == ["storage-missing"]
        (directory / "away").rename(base)
        assert await find(disks=moved_top, copy_storage=TOP) == []
        with monkeypatch.context() as patch:
            patch.setattr("ferryman_qemu.checks.shutil.which", lambda _name: None)
            assert await find(disks=moved_top, copy_storage=TOP) == ["program-missing"]
        with small_file_system(writer) as tiny:
            assert await find(disks=(("vdb", str(tiny / "there")),), copy_storage=FULL) == ["storage-short"]
        await domain.destroy()


async def test_a_file_under_the_same_name_is_not_the_same(writer: Field) -> None:
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        path = writer.directory / "image"
        shutil.copy(path, writer.directory / "other")
        (writer.directory / "other").replace(path)
        assert await blockers(domain, b) == ["storage-not-shared"]
        assert identify(str(path), opened=set()) is None
        await domain.destroy()


FACTS = {"path": "/x", "identity": None, "format": "raw", "size_bytes": 1, "allocated_bytes": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"path": 1},
        {"identity": "x"},
        {"format": None},
        {"size_bytes": "1"},
        {"size_bytes": True},
        {"backing": []},
    ],
)
def test_facts_of_another_kind(change: dict[str, object]) -> None:
    assert decode_facts(json.dumps({"vda": FACTS}))["vda"].size_bytes == 1
    with pytest.raises(HypervisorError, match="disk vda cannot be read"):
        decode_facts(json.dumps({"vda": {**FACTS, **change}}))


@pytest.mark.parametrize(
    "text",
    ["[]", "[1]", "{", "null", '{"vda": 1}', '{"vda": {"path": 1}}', '{"vda": {"size": 3}}', '"x"', "7"],
)
def test_facts_that_are_none(text: str) -> None:
    with pytest.raises(HypervisorError, match="cannot be read"):
        decode_facts(text)


# What fails


async def refused(domain: Domain, there: Connection, field: Field, **options: Any) -> FerrymanError:
    """Migrate in vain; the guest writes on to its own disk, and nothing is left."""
    made = MigrationOptions(copy_storage=FULL, disks=moved(field, hda="hda"), patience_s=20.0, **options)
    with pytest.raises(FerrymanError) as caught:
        await domain.migrate(there, made)
    await assert_disk_is_the_guests(field, domain, field.directory / "image")
    assert_nothing_left(field, 0, field.directory / "hda")
    return caught.value


@pytest.mark.parametrize("when", ["copying", "ready", "switch"])
async def test_an_abort(writer: Field, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    jobs: list[Any] = []
    real_run, real_finish = Copies.run, Copies.finish

    async def run(self: Copies) -> None:
        if when == "copying":
            jobs[0].abort()
        await real_run(self)
        if when == "ready":
            jobs[0].abort()

    async def finish(self: Copies) -> None:
        if when == "switch":
            jobs[0].abort()
        await real_finish(self)

    monkeypatch.setattr(Copies, "run", run)
    monkeypatch.setattr(Copies, "finish", finish)
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        options = MigrationOptions(copy_storage=FULL, disks=moved(writer, hda="hda"))
        with pytest.raises(MigrationAbortedError):
            async with domain.migrate(b, options) as job:
                jobs.append(job)
                await job.result()
        await assert_disk_is_the_guests(writer, domain, writer.directory / "image")
        assert_nothing_left(writer, 0, writer.directory / "hda")
        monkeypatch.undo()
        await domain.migrate(b, options)
        await (await b.lookup_by_name(NAME)).destroy()


@pytest.mark.parametrize("how", ["destination-killed", "server-stopped", "connection-broken"])
async def test_a_mirror_that_fails_at_the_last_moment(
    writer: Field, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The transfer never goes on, whatever the mirror met: the guest runs at the source with its own disk."""
    sent: list[str] = []
    real_finish = Copies.finish

    async def finish(self: Copies) -> None:
        assert ask(writer.roots[0], "query-status")["status"] == "finish-migrate"
        if how == "destination-killed":
            (pid,) = pids(writer.roots[1])
            end_process(pid)
        elif how == "server-stopped":
            ask(writer.roots[1], "nbd-server-stop")
        else:
            (directory,) = run_directories(writer.roots[0])
            with QMPSocket(directory / "read") as qmp:
                node = {"type": "block-node", "node-name": "ferryman-copy0"}
                qmp.execute("yank", instances=[node])
        await real_finish(self)

    from ferryman_qemu.guest import Guest

    real_command = Guest.command

    async def command(self: Guest, name: str, arguments: Any = None) -> Any:
        sent.append(name)
        return await real_command(self, name, arguments)

    monkeypatch.setattr(Copies, "finish", finish)
    monkeypatch.setattr(Guest, "command", command)
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        error = await refused(domain, b, writer)
        assert isinstance(error, PerformError)
        assert "disk hda" in error.message
        assert "migrate-continue" not in sent
        assert "migrate_cancel" in sent
        monkeypatch.undo()
        options = MigrationOptions(copy_storage=FULL, disks=moved(writer, hda="hda"))
        await domain.migrate(b, options)
        await (await b.lookup_by_name(NAME)).destroy()


async def test_a_socket_that_is_somebody_elses(writer: Field) -> None:
    path = writer.directory / "stream.disks"
    path.write_text("mine")
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        error = await refused(domain, b, writer, migration_uri=f"unix:{writer.directory / 'stream'}")
        assert isinstance(error, PrepareError)
        assert path.read_text() == "mine"
        await domain.destroy()


# Notes of files that were made


@dataclass(frozen=True)
class _Root:
    path: Path


ID = MigrationId("0" * 32)


async def targets(directory: Path, *names: str) -> tuple[Any, list[Any], Any]:
    """A root, disks whose files are to be made in a directory, and what is known of them."""
    source = directory / "source"
    source.write_bytes(bytes(MIB))
    xml = CounterGuest().domain_xml("web", uuid.uuid4(), source, directory / "serial")
    xml = xml.replace("</disk>\n", "</disk>\n" + "".join(disk(directory / name, name) for name in names))
    machine = read_machine(xml)
    facts = await learn_facts(None, machine)
    told = decode_facts(
        json.dumps(
            {t: {**one, "size_bytes": MIB + 512} for t, one in json.loads(encode_facts(facts)).items()}
        )
    )
    return _Root(directory), [one for one in machine.disks if one.target in names], told


async def test_targets_are_made_noted_and_removed(tmp_path: Path) -> None:
    root, disks, told = await targets(tmp_path, "vdb", "vdc")
    make_targets(root, ID, disks, told, FULL)
    assert stray_targets(root) == {ID}
    assert (tmp_path / "vdb").stat().st_size == (tmp_path / "vdc").stat().st_size == MIB + 512
    remove_targets(root, ID)
    remove_targets(root, ID)
    assert not (tmp_path / "vdb").exists()
    assert not (tmp_path / "vdc").exists()
    assert stray_targets(root) == set()
    make_targets(root, ID, disks, told, FULL)
    keep_targets(root, ID)
    remove_targets(root, ID)
    assert (tmp_path / "vdb").exists()


async def test_a_file_that_comes_between_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two migrations to the same path at once: the second finds the first one's file, and leaves it."""
    root, disks, told = await targets(tmp_path, "vdb", "vdc")
    (tmp_path / "vdc").write_text("somebody's")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "lexists", lambda _path: False)
        with pytest.raises(PrepareError, match="vdc"):
            make_targets(root, ID, disks, told, FULL)
    assert (tmp_path / "vdc").read_text() == "somebody's"
    assert not (tmp_path / "vdb").exists()
    assert stray_targets(root) == set()


async def test_a_file_that_replaced_the_one_that_was_made_stays(tmp_path: Path) -> None:
    root, disks, told = await targets(tmp_path, "vdb")
    make_targets(root, ID, disks, told, FULL)
    (tmp_path / "new").write_text("somebody's")
    (tmp_path / "new").replace(tmp_path / "vdb")
    remove_targets(root, ID)
    assert (tmp_path / "vdb").read_text() == "somebody's"
    assert stray_targets(root) == set()


@pytest.mark.parametrize("crash", ["note-half-written", "no-file", "first-file", "files-not-noted"])
async def test_a_crash_while_files_are_made(tmp_path: Path, crash: str) -> None:
    root, _, _ = await targets(tmp_path, "vdb", "vdc")
    (tmp_path / "made").mkdir()
    note = tmp_path / "made" / f"{ID}.json"
    if crash == "note-half-written":
        (tmp_path / "made" / f"{ID}.json.new").write_text('{"/so')
    else:
        note.write_text(json.dumps(dict.fromkeys([str(tmp_path / "vdb"), str(tmp_path / "vdc")])))
    for name in {"first-file": ["vdb"], "files-not-noted": ["vdb", "vdc"]}.get(crash, []):
        (tmp_path / name).touch()
    assert stray_targets(root) == {ID}
    remove_targets(root, ID)
    assert not (tmp_path / "vdb").exists()
    assert not (tmp_path / "vdc").exists()
    assert stray_targets(root) == set()


async def test_a_file_that_cannot_be_removed_stays_noted(tmp_path: Path) -> None:
    root, disks, told = await targets(tmp_path, "vdb")
    make_targets(root, ID, disks, told, FULL)
    note = tmp_path / "made" / f"{ID}.json"
    note.write_text("garbage")
    with pytest.raises(HypervisorError, match="cannot be removed"):
        remove_targets(root, ID)
    assert stray_targets(root) == {ID}


async def prepared(field: Field, domain: Domain, there: Connection) -> tuple[Any, Any]:
    """Bring a migration as far as its receipt."""
    info = await domain.info()
    options = MigrationOptions(copy_storage=FULL, disks=moved(field, hda="hda"))
    begun = await domain.connection.host.begin(info, options)
    receipt = await there.host.prepare(begun.cookie, info, begun.definition, options, paused=False)
    assert (field.directory / "hda").exists()
    return begun, (receipt, options)


async def test_an_opening_removes_what_nobody_will_use(writer: Field) -> None:
    """The receiver went with its program before the guest had come: the next opening refuses and removes."""
    async with ferryman.connect(writer.uris[0]) as a:
        domain = await start(writer, a)
        async with ferryman.connect(writer.uris[1]) as b:
            begun, _ = await prepared(writer, domain, b)
            # And a migration that was never written down.
            stray = writer.roots[1] / "made" / f"{'f' * 32}.json"
            stray.write_text(json.dumps({str(writer.directory / "empty"): None}))
            (writer.directory / "empty").touch()
        async with ferryman.connect(writer.uris[1]) as b:
            with anyio.fail_after(PROMPT_S):
                while b.open_migrations():
                    await anyio.sleep(0.02)
        await a.host.give_up(begun.id)
        await assert_disk_is_the_guests(writer, domain, writer.directory / "image")
        assert_nothing_left(writer, 0, writer.directory / "hda", writer.directory / "empty")
        await domain.destroy()


def fail(*_arguments: object) -> None:
    raise HypervisorError("the program ended here")


async def test_a_claimed_guest_keeps_its_files(writer: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the claim and taking the guest in: the next opening takes it in with its disks."""
    async with both(writer) as (a, b):
        domain = await start(writer, a)
        with monkeypatch.context() as patch:
            patch.setattr("ferryman_qemu.migrations.keep_targets", fail)
            await domain.migrate(b, MigrationOptions(copy_storage=FULL, disks=moved(writer, hda="hda")))
        assert len(stray_targets(_Root(writer.roots[1]))) == 1  # type: ignore[arg-type]
    async with ferryman.connect(writer.uris[1]) as b:
        assert stray_targets(_Root(writer.roots[1])) == set()  # type: ignore[arg-type]
        domain = await b.lookup_by_name(NAME)
        await assert_disk_is_the_guests(writer, domain, writer.directory / "hda")
        await domain.destroy()


async def test_a_running_guest_that_no_journal_knows_keeps_its_files(writer: Field) -> None:
    async with ferryman.connect(writer.uris[0]) as a:
        domain = await start(writer, a)
        async with ferryman.connect(writer.uris[1]) as b:
            _, (receipt, options) = await prepared(writer, domain, b)
            performed = await a.host.perform(receipt.cookie, receipt.migration_uri, options, lambda _: None)
            # The guest is run behind the manager's back, as after a claim that was lost with the journal.
            ask(writer.roots[1], "nbd-server-stop")
            ask(writer.roots[1], "cont")
        for suffix in ("", "-wal", "-shm", ".mark"):
            Path(f"{writer.roots[1] / 'journal'}{suffix}").unlink(missing_ok=True)
        async with ferryman.connect(writer.uris[1]) as b:
            assert (writer.directory / "hda").exists()
            assert stray_targets(_Root(writer.roots[1])) == set()  # type: ignore[arg-type]
            await (await b.lookup_by_name(NAME)).destroy()
    assert performed.error is None
    for pid in writer.emulators():
        end_process(pid)
    for directory in run_directories(writer.roots[0]):
        shutil.rmtree(directory)
