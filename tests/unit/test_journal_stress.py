"""A journal that is full, read-only, torn, lost, held twice or killed: it refuses, or it holds what was written."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

import ferryman.journal
from ferryman.errors import FerrymanError, HostBusyError, JournalBehindError, JournalError, JournalFullError
from ferryman.handover import MigrationRow, Record
from ferryman.journal import Journal, read_journal
from ferryman.types import DomainUUID, MigrationId, Side
from tests.qemu import need

SECTOR = 512
PAGE = 4096
DOMAINS = [DomainUUID(f"6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e5{number}") for number in range(3)]
Rows = tuple[MigrationRow, ...]


def row(number: int, record: Record, side: Side = Side.DESTINATION) -> MigrationRow:
    return MigrationRow(
        side=side,
        migration_id=MigrationId(f"{number:032x}"),
        generation=number,
        uuid=DOMAINS[number % len(DOMAINS)],
        name=f"guest-{number}",
        record=record,
        peer_address="qemu+ssh://other/system",
        process="6f3a:4711:99",
    )


def source(number: int, record: Record) -> MigrationRow:
    return row(number, record, Side.SOURCE)


WRITES = [
    row(1, Record.PREPARED),
    row(1, Record.CLAIMING),
    row(1, Record.CLAIMED),
    source(2, Record.BEGUN),
    source(2, Record.HANDING),
    source(2, Record.GIVEN),
    row(3, Record.PREPARED),
    row(3, Record.REFUSED),
]
"""What one host writes of three migrations."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory where a thousand openings take seconds: in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferryman.journal, "LOCK_WAIT_S", 0.1)


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def rows_in(journal: Journal) -> Rows:
    """Every row, through the calls that the engine makes."""
    found = [each for uuid in DOMAINS for each in journal.rows_of(uuid)]
    assert sorted(row.sequence for row in found if not row.settled) == [
        row.sequence for row in journal.open_rows()
    ]
    for each in found:
        assert journal.read(each.side, each.migration_id) == each
        assert journal.generation(each.uuid) >= each.generation
    return tuple(sorted(found, key=lambda row: row.sequence))


def look(path: Path) -> Rows:
    """Open a journal as a host does, and read all of it."""
    with closing(Journal.open(path)) as journal:
        return rows_in(journal)


def outcome(path: Path) -> Rows | type[FerrymanError]:
    """The rows, or the refusal; an error of any other kind is one of ours."""
    try:
        return look(path)
    except FerrymanError as error:
        return type(error)


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own, and return how it ended, as :func:`os.waitstatus_to_exitcode` says."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            # A child must not go on as a second pytest, whatever happens; the parent sees the 1.
            logging.getLogger(__name__).exception("the child failed")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


# Torn


class Life:
    """A journal's files at one moment, and its rows after each write that led there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.states: list[Rows] = []
        self.newest = "journal"
        """The file that holds the last writes."""

    def keep(self, path: Path) -> None:
        self.directory.mkdir()
        for suffix in ("", "-wal", ".mark"):
            if beside(path, suffix).exists():
                shutil.copy(beside(path, suffix), self.directory / f"journal{suffix}")

    def put(self, directory: Path, *, torn: str = "", content: bytes = b"") -> Path:
        """Put the files somewhere, one of them with another content; returns where the journal lies."""
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.directory, directory)
        if torn:
            (directory / torn).write_bytes(content)
        return directory / "journal"


@pytest.fixture(params=["in-the-log", "half-way", "closed"])
def life(request: pytest.FixtureRequest, quick: Path) -> Life:
    """A journal with everything in its log; with some of it in the database; and after its close."""
    made = Life(quick / "kept")
    path = quick / "first" / "journal"
    journal = Journal.open(path)
    made.states.append(())
    for number, each in enumerate(WRITES):
        written = journal.write_now(each)
        if written.record.decided:
            journal.settle(written)
        made.states.append(rows_in(journal))
        if request.param == "half-way" and number == len(WRITES) // 2:
            with closing(sqlite3.connect(path)) as other:
                other.execute("PRAGMA wal_checkpoint(PASSIVE)")
    if request.param == "closed":
        journal.close()
        made.states.append(look(path))
        made.keep(path)
        assert not (made.directory / "journal-wal").exists()
    else:
        made.keep(path)
        made.newest = "journal-wal"
        journal.close()
        assert (made.directory / "journal-wal").exists()
    assert outcome(made.put(quick / "now")) == made.states[-1]
    return made


def torn(content: bytes) -> Iterator[bytes]:
    """A file cut off at every sector."""
    for size in range(0, len(content), SECTOR):
        yield content[:size]


def flipped(content: bytes) -> Iterator[bytes]:
    """A file with some bits of one byte flipped; every byte of what is short, and many of what is long."""
    chance = random.Random(len(content))
    count = min(len(content), 700)
    for place in sorted(chance.sample(range(len(content)), count)):
        yield content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]


def zeroed(content: bytes) -> Iterator[bytes]:
    """A file with one sector that never reached the disk."""
    for place in range(0, len(content), SECTOR):
        yield content[:place] + bytes(len(content[place : place + SECTOR])) + content[place + SECTOR :]


DAMAGES = [torn, flipped, zeroed]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["journal", "journal-wal"])
def test_a_damaged_journal_is_whole_or_refused(
    life: Life, quick: Path, file: str, damage: Callable[[bytes], Iterator[bytes]]
) -> None:
    if not (life.directory / file).exists():
        return  # a closed journal has no log
    refused = 0
    for content in damage((life.directory / file).read_bytes()):
        found = outcome(life.put(quick / "now", torn=file, content=content))
        if isinstance(found, type):
            assert issubclass(found, JournalError)
            refused += 1
        else:
            assert found == life.states[-1]
    assert refused > 10 or file != life.newest


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["journal", "journal-wal"])
def test_without_its_mark_a_damaged_journal_is_an_older_one_or_refused(
    life: Life, quick: Path, file: str, damage: Callable[[bytes], Iterator[bytes]]
) -> None:
    """Only here can a write that had returned be lost unseen: its receipt is then answered ``unknown``."""
    if not (life.directory / file).exists():
        return
    older = 0
    for content in damage((life.directory / file).read_bytes()):
        path = life.put(quick / "now", torn=file, content=content)
        beside(path, ".mark").unlink()
        found = outcome(path)
        if not isinstance(found, type):
            assert found in life.states
            older += found != life.states[-1]
    assert older > 10 or file != "journal-wal"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["journal", "journal-wal"])
def test_a_look_believes_no_damaged_journal_either(
    life: Life, quick: Path, file: str, damage: Callable[[bytes], Iterator[bytes]]
) -> None:
    if not (life.directory / file).exists():
        return
    for content in damage((life.directory / file).read_bytes()):
        path = life.put(quick / "now", torn=file, content=content)
        try:
            rows = read_journal(path).rows
        except JournalError:
            continue
        assert rows == life.states[-1]


def test_a_damaged_mark_is_refused_and_an_empty_one_is_none(life: Life, quick: Path) -> None:
    content = (life.directory / "journal.mark").read_bytes()
    damaged = [*flipped(content), *(content[:size] for size in range(1, len(content)))]
    for mark in damaged:
        found = outcome(life.put(quick / "now", torn="journal.mark", content=mark))
        # Version 1 had no sum in its mark: cut off just there, what is left is still true.
        assert (
            found is (JournalError if mark != content[:24] else life.states[-1]) or found == life.states[-1]
        )
        assert isinstance(found, type) == (mark != content[:24])
    assert outcome(life.put(quick / "now", torn="journal.mark", content=b"")) == life.states[-1]


def test_pages_of_yesterday_are_refused(life: Life, quick: Path) -> None:
    """Every page of the database exchanged for an older one of itself: each is sound by itself."""
    older = quick / "older" / "journal"
    with closing(Journal.open(older)) as journal:
        for each in WRITES[:-1]:
            journal.write_now(each)
    with closing(Journal.open(older)):
        pass
    yesterday = older.read_bytes()
    with closing(Journal.open(older)) as journal:
        journal.write_now(WRITES[-1])
    today = older.read_bytes()
    changed = [at for at in range(0, len(today), PAGE) if today[at : at + PAGE] != yesterday[at : at + PAGE]]
    assert len(changed) > 1
    for at in changed:
        older.write_bytes(today[:at] + yesterday[at : at + PAGE] + today[at + PAGE :])
        assert outcome(older) in (JournalError, JournalBehindError)


# Lost, restored


def write_all(path: Path) -> Rows:
    with closing(Journal.open(path)) as journal:
        for each in WRITES:
            journal.write_now(each)
        return rows_in(journal)


def test_a_journal_lost_or_exchanged_is_refused_while_its_mark_is_there(path: Path, tmp_path: Path) -> None:
    write_all(path)
    other = tmp_path / "other" / "journal"
    write_all(other)
    path.unlink()
    for _ in range(2):
        with pytest.raises(JournalBehindError, match="is new"):
            Journal.open(path)
    shutil.copy(other, path)
    with pytest.raises(JournalBehindError, match="is another one"):
        Journal.open(path)
    with pytest.raises(JournalBehindError, match="is another one"):
        read_journal(path)


def test_a_lost_mark_is_made_anew(path: Path) -> None:
    rows = write_all(path)
    older = path.read_bytes()
    with closing(Journal.open(path)) as journal:
        journal.write_now(row(9, Record.PREPARED))
    beside(path, ".mark").unlink()
    assert len(look(path)) == len(rows) + 1
    path.write_bytes(older)
    with pytest.raises(JournalBehindError, match="ends at write 8, but its mark says 9"):
        Journal.open(path)


def test_a_mark_that_a_power_cut_left_behind_is_renewed(path: Path) -> None:
    """The mark is not forced to the disk with every write, so it may be older than its journal."""
    write_all(path)
    mark = beside(path, ".mark")
    older = mark.read_bytes()
    with closing(Journal.open(path)) as journal:
        journal.write_now(row(9, Record.PREPARED))
    newer = mark.read_bytes()
    mark.write_bytes(older)
    look(path)
    assert mark.read_bytes() == newer != older


def test_with_both_lost_the_host_begins_anew(path: Path) -> None:
    """The other host's receipt tells: see tests/integration/test_journal_lost.py."""
    with closing(Journal.open(path)) as journal:
        lost = journal.journal_id
    for suffix in ("", ".mark"):
        beside(path, suffix).unlink()
    with closing(Journal.open(path)) as journal:
        assert journal.journal_id != lost


def test_a_journal_restored_with_its_mark_cannot_be_recognised(path: Path, tmp_path: Path) -> None:
    """Limit 4 of the handover: no file on this host can tell."""
    with closing(Journal.open(path)) as journal:
        prepared = journal.write_now(row(1, Record.PREPARED))
    for suffix in ("", ".mark"):
        shutil.copy(beside(path, suffix), tmp_path / f"older{suffix}")
    with closing(Journal.open(path)) as journal:
        journal.write_now(replace(prepared, record=Record.CLAIMED))
    for suffix in ("", ".mark"):
        shutil.copy(tmp_path / f"older{suffix}", beside(path, suffix))
    assert look(path) == (prepared,)


def test_a_row_changed_by_hand_is_refused(path: Path) -> None:
    write_all(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE migrations SET record = 'refused' WHERE record = 'claimed'")
    with pytest.raises(JournalError, match="not those that were written"):
        Journal.open(path)


def test_another_database_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE theirs (one)")
    before = path.read_bytes()
    for read in (Journal.open, read_journal):
        with pytest.raises(JournalError, match="is no journal"):
            read(path)
    assert path.read_bytes() == before


# Two programs


def test_a_second_program_is_told_who_holds_the_journal(path: Path) -> None:
    hold = "import sys; from pathlib import Path; from ferryman.journal import Journal\n"
    hold += "journal = Journal.open(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HostBusyError, match=rf"\(process {holder.pid}\)"):
            Journal.open(path)
        assert read_journal(path).rows == ()
        holder.kill()
    assert look(path) == ()


def test_two_connections_of_one_program_cannot_hold_it_both(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        with pytest.raises(HostBusyError):
            Journal.open(path)
        # The refused opening took nothing from the one that holds it.
        journal.write_now(row(1, Record.PREPARED))
        with pytest.raises(HostBusyError):
            Journal.open(path)


def test_a_second_program_waits_for_the_first_to_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Journal.open(path)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        first.close()

    monkeypatch.setattr(ferryman.journal, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    Journal.open(path).close()
    assert len(waits) == 1


def test_a_program_that_does_not_ask_for_the_lock_is_noticed(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        first = journal.write_now(row(1, Record.PREPARED))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE meta SET value = '7' WHERE key = 'sequence'")
        with pytest.raises(JournalError, match="another program"):
            journal.write_now(replace(first, record=Record.CLAIMING))
        assert journal.read(first.side, first.migration_id) == first


def test_two_threads_write_and_one_reads(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        written: list[MigrationRow] = []
        read: list[int] = []
        done = threading.Event()

        def write(first: int) -> None:
            for number in range(first, first + 100):
                made = journal.write_now(row(number * 3, Record.PREPARED))
                journal.settle(made)
                written.append(made)

        def watch() -> None:
            while not done.is_set():
                read.append(len(journal.rows_of(DOMAINS[0])))

        watcher = threading.Thread(target=watch)
        writers = [threading.Thread(target=write, args=(first,)) for first in (1, 1001)]
        for thread in (watcher, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        watcher.join()
    assert sorted(row.sequence for row in written) == list(range(1, 201))
    assert read == sorted(read)
    found = {row.migration_id: row for row in look(path)}
    assert found == {row.migration_id: replace(row, settled=True) for row in written}


# Killed


def write_until_killed(path: Path, first: int, tells: int) -> None:
    journal = Journal.open(path)
    for number in range(first, first + 10_000):
        journal.settle(journal.write_now(row(number, Record.PREPARED)))
        os.write(tells, b"%8d" % number)


def test_what_was_told_survives_kills_at_any_moment(path: Path) -> None:
    """The same journal again and again, with no close; the system's page cache survives what kills a process."""
    chance = random.Random(20)
    told: list[int] = []
    for life in range(20):
        reads, tells = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(path, 1 + life * 10_000, tells)
            finally:
                os._exit(1)
        os.close(tells)
        with os.fdopen(reads, "rb") as pipe:
            for _ in range(chance.randrange(1, 30)):
                told.append(int(pipe.read(8)))
            for _ in range(chance.randrange(3000)):
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            rest = pipe.read()
        told += [int(rest[at : at + 8]) for at in range(0, len(rest), 8)]
        there = {each.generation for each in look(path)}
        assert set(told) <= there
        # At most one write of each life was there and nobody had been told.
        assert len(there) - len(told) <= life + 1


# Full


IN_NAMESPACE = ["unshare", "--mount", "sh", "-ec"]


def run_in_namespace(directory: Path, mount: str, check: Callable[[Path], None]) -> None:
    """Run a check with a mount that ends with it, however it ends."""
    need("root", here=os.geteuid() == 0)
    code = (
        f"import sys; from pathlib import Path; from {__name__} import *; {check.__name__}(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [*IN_NAMESPACE, f'{mount}; exec "$2" -c "$3" "$1"', "sh", str(directory), sys.executable, code],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(directory) not in Path("/proc/self/mounts").read_text()


SMALL_DISK = 'mount -t tmpfs -o size=4m none "$1"'


def fill(disk: Path, *, leave_pages: int = 0) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(PAGE))
        file.truncate(file.seek(0, os.SEEK_END) - leave_pages * PAGE)


def test_a_disk_that_is_full_at_any_write(tmp_path: Path) -> None:
    run_in_namespace(tmp_path, SMALL_DISK, full_at_any_write)


def full_at_any_write(disk: Path) -> None:
    refused: set[Record] = set()
    for number in range(len(WRITES)):
        for pages in range(16):
            directory = disk / "state"
            directory.mkdir()
            path = directory / "journal"
            journal = Journal.open(path)
            for each in WRITES[:number]:
                journal.write_now(each)
            expected = {row.migration_id: row for row in rows_in(journal)}
            fill(disk, leave_pages=pages)
            for each in WRITES[number:]:
                try:
                    written = journal.write_now(each)
                except JournalFullError:
                    # Only what begins a migration, while a decision still finds the reserve.
                    assert each.record in (Record.BEGUN, Record.PREPARED)
                    assert beside(path, ".reserve").exists() or number != WRITES.index(each)
                    refused.add(each.record)
                else:
                    expected[each.migration_id] = written
                assert {row.migration_id: row for row in rows_in(journal)} == expected
            journal.close()
            assert {row.migration_id: row for row in look(path)} == expected, "on the full disk"
            (disk / "filler").unlink()
            assert {row.migration_id: row for row in look(path)} == expected
            with closing(Journal.open(path)) as journal:
                journal.write_now(row(9, Record.PREPARED))
            shutil.rmtree(directory)
    assert refused == {Record.BEGUN, Record.PREPARED}


def test_a_journal_opens_on_a_full_disk(tmp_path: Path) -> None:
    run_in_namespace(tmp_path, SMALL_DISK, opens_on_a_full_disk)


def opens_on_a_full_disk(disk: Path) -> None:
    path = disk / "journal"
    with closing(Journal.open(path)) as journal:
        prepared = journal.write_now(row(1, Record.PREPARED))
    fill(disk)
    with closing(Journal.open(path)) as journal:
        assert journal.open_rows() == [prepared]
        with pytest.raises(JournalFullError):
            journal.write_now(row(2, Record.PREPARED))
        claimed = journal.write_now(replace(prepared, record=Record.CLAIMED))
    fill(disk)
    with pytest.raises(JournalFullError):
        Journal.open(path)
    (disk / "filler").unlink()
    assert look(path) == (claimed,)
    assert beside(path, ".reserve").stat().st_size == ferryman.journal.RESERVE_BYTES


@pytest.mark.parametrize("room", [0, 700, PAGE, 2 * PAGE + 100, 5 * PAGE, 9 * PAGE])
def test_a_file_that_may_not_grow(path: Path, room: int) -> None:
    """As with a quota, giving the reserve up does not help; nothing that was told is lost."""
    reads, tells = os.pipe()

    def write() -> None:
        journal = Journal.open(path)
        journal.write_now(WRITES[0])
        limit = beside(path, "-wal").stat().st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for each in WRITES[1:] * 20:
            try:
                written = journal.write_now(each)
            except JournalFullError:
                os.write(tells, b"refused\n")
                die()
            os.write(tells, f"{written.sequence}\n".encode())

    assert in_child(write) == -signal.SIGKILL
    os.close(tells)
    with os.fdopen(reads) as pipe:
        *told, last = pipe.read().split()
    assert last == "refused"
    with closing(Journal.open(path)) as journal:
        newest = max(row.sequence for row in rows_in(journal))
        assert newest == len(told) + 1
        journal.write_now(row(9, Record.PREPARED))


# Read-only


def refuses_to_write(directory: Path) -> None:
    path = directory / "journal"
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(JournalError) as refused:
        Journal.open(path)
    assert type(refused.value) is JournalError
    contents = read_journal(path)
    assert [row.record for row in contents.rows] == [Record.CLAIMED, Record.GIVEN, Record.REFUSED]
    assert {
        file.name: file.read_bytes()
        for file in directory.iterdir()
        if file.name not in ("journal-wal", "journal-shm")
    } == {name: content for name, content in before.items() if name not in ("journal-wal", "journal-shm")}


READ_ONLY = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"'


@pytest.mark.parametrize(
    "mount",
    [READ_ONLY, *(READ_ONLY.replace("$1", f"$1/{file}") for file in ("journal", "journal.mark"))],
    ids=["disk", "journal", "mark"],
)
def test_a_journal_that_cannot_be_written_is_refused(path: Path, mount: str) -> None:
    write_all(path)
    run_in_namespace(path.parent, mount, refuses_to_write)


def test_a_directory_that_cannot_be_written_is_refused(path: Path) -> None:
    """As somebody who is not root: nothing stops root."""
    write_all(path)
    path.parent.chmod(0o555)

    def opening() -> None:
        if os.geteuid() == 0:
            os.chdir(path.parent)
            os.setegid(65534)
            os.seteuid(65534)
        with pytest.raises(JournalError):
            Journal.open(Path("journal"))

    try:
        assert in_child(opening) == 0
    finally:
        path.parent.chmod(0o755)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "journal",
        "journal.mark",
        "journal.reserve",
    ]


# A disk that fails


_FAILING_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int sync_by(const char *name, int file) {
    if (access(getenv("SYNC_FAILS"), F_OK) == 0) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}
int fsync(int file) { return sync_by("fsync", file); }
int fdatasync(int file) { return sync_by("fdatasync", file); }
"""


@pytest.fixture(scope="module")
def failing_sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose ``fsync`` fails with EIO while a file is there."""
    need("cc", here=shutil.which("cc") is not None)
    library = tmp_path_factory.mktemp("shim") / "sync.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-", "-ldl"],
        input=_FAILING_SYNC,
        text=True,
        check=True,
    )
    return library


def run_with_failing_sync(library: Path, directory: Path, check: Callable[[Path], None]) -> str:
    code = (
        f"import sys; from pathlib import Path; from {__name__} import *; {check.__name__}(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        check=False,
        env={**os.environ, "LD_PRELOAD": str(library), "SYNC_FAILS": str(directory / "fails")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def sync_fails(directory: Path) -> None:
    journal = Journal.open(directory / "journal")
    prepared = journal.write_now(row(1, Record.PREPARED))
    fails = directory / "fails"
    fails.touch()
    with pytest.raises(JournalError, match="could not be written") as failed:
        journal.write_now(replace(prepared, record=Record.CLAIMING))
    assert not isinstance(failed.value, JournalFullError)
    assert journal.read(prepared.side, prepared.migration_id) == prepared
    if os.environ.get("THEN") == "die":
        die()
    fails.unlink()
    refused = journal.write_now(replace(prepared, record=Record.REFUSED))
    assert refused.sequence == 2
    print(json.dumps(refused.record.value), flush=True)
    die()


def test_a_write_whose_sync_failed_is_read_again_and_can_be_decided_otherwise(
    failing_sync: Path, tmp_path: Path
) -> None:
    assert json.loads(run_with_failing_sync(failing_sync, tmp_path, sync_fails)) == "refused"
    assert [row.record for row in look(tmp_path / "journal")] == [Record.REFUSED]


def test_a_write_whose_sync_failed_may_be_there_after_a_crash(
    failing_sync: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody was told, and both records are true: the guest never ran."""
    monkeypatch.setenv("THEN", "die")
    run_with_failing_sync(failing_sync, tmp_path, sync_fails)
    (found,) = look(tmp_path / "journal")
    assert found.record in (Record.PREPARED, Record.CLAIMING)


def test_a_mark_that_cannot_be_written_makes_the_write_doubtful(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Journal.open(path)) as journal:
        prepared = journal.write_now(row(1, Record.PREPARED))

        def fail(*_arguments: object) -> NoReturn:
            raise OSError(errno.EIO, "planted")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(JournalError, match="could not be written"):
                journal.write_now(replace(prepared, record=Record.CLAIMING))
        found = journal.read(prepared.side, prepared.migration_id)
        assert found is not None
        assert (found.record, found.sequence) == (Record.CLAIMING, 2)
        assert journal.write_now(replace(found, record=Record.CLAIMED)).sequence == 3


def test_a_text_that_is_none_stops_no_decision(path: Path) -> None:
    """Messages about files may hold bytes that are no text, and another host's address anything at all."""
    odd = os.fsdecode(b"no room in /srv/\xff")
    with closing(Journal.open(path)) as journal:
        prepared = journal.write_now(row(1, Record.PREPARED))
        with pytest.raises(JournalError, match="could not be written"):
            journal.write_now(replace(prepared, peer_address=odd))
        refused = journal.write_now(replace(prepared, record=Record.REFUSED, reason=odd, testimony=odd))
        assert refused.reason == refused.testimony == "no room in /srv/\\udcff"
        assert journal.read(prepared.side, prepared.migration_id) == refused


# Clocks


@pytest.mark.parametrize("step_s", [-1e9, 1e9])
def test_nothing_durable_depends_on_the_wall_clock(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    real = time.time

    def contents(path: Path, *, stepping: bool) -> list[MigrationRow]:
        with monkeypatch.context() as patch:
            for number, each in enumerate(WRITES):
                if stepping:
                    patch.setattr(time, "time", lambda number=number: real() + number * step_s)
                with closing(Journal.open(path)) as journal:
                    journal.write_now(each)
            return [replace(row, receipt=None) for row in look(path)]

    assert contents(path, stepping=True) == contents(tmp_path / "other", stepping=False)


# A look


def test_a_look_changes_nothing_and_sees_the_log(path: Path, tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    with closing(Journal.open(path)) as journal:
        for each in WRITES:
            journal.write_now(each)
        rows, journal_id = rows_in(journal), journal.journal_id
        for suffix in ("", "-wal", ".mark"):
            shutil.copy(beside(path, suffix), carried / f"beta{suffix}")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in carried.iterdir()}
    seen = read_journal(carried / "beta")
    assert (seen.rows, seen.journal_id, seen.sequence, seen.marked) == (rows, journal_id, len(WRITES), True)
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in carried.iterdir()} == before
    (carried / "beta-wal").unlink()
    with pytest.raises(JournalError):
        read_journal(carried / "beta")


def test_a_look_without_a_mark_says_so(path: Path, tmp_path: Path) -> None:
    rows = write_all(path)
    shutil.copy(path, tmp_path / "alone")
    seen = read_journal(tmp_path / "alone")
    assert (seen.rows, seen.marked) == (rows, False)


def test_a_look_at_an_older_copy_is_refused(path: Path) -> None:
    write_all(path)
    older = path.read_bytes()
    with closing(Journal.open(path)) as journal:
        journal.write_now(row(9, Record.PREPARED))
    path.write_bytes(older)
    with pytest.raises(JournalBehindError, match="ends at write 8, but its mark says 9"):
        read_journal(path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, None])
def test_a_look_at_what_is_no_journal(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JournalError, match=str(path)):
        read_journal(path)
    assert path.exists() == (content is not None)
    with pytest.raises(JournalError):
        read_journal(tmp_path)
