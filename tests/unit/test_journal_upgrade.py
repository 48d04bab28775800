"""A journal of version 1 becomes one of this version, whole or not at all; a newer one is left alone."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import struct
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import ferryman.journal
from ferryman.errors import JournalBehindError, JournalError
from ferryman.handover import MigrationRow, Receipt, Record
from ferryman.journal import Journal, read_journal
from ferryman.types import DomainUUID, MigrationId, Side

JOURNAL_ID = "5f0c" * 8
UUID = DomainUUID("6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55")
SOURCE = (Record.BEGUN, Record.HANDING, Record.KEPT, Record.GIVEN)

VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE domains (uuid TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE migrations (
    side TEXT NOT NULL,
    id TEXT NOT NULL,
    generation INTEGER NOT NULL,
    uuid TEXT NOT NULL,
    name TEXT NOT NULL,
    record TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    receipt TEXT,
    peer_address TEXT NOT NULL,
    process TEXT NOT NULL,
    arrives_paused INTEGER NOT NULL,
    settled INTEGER NOT NULL,
    reason TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    extra TEXT NOT NULL,
    PRIMARY KEY (side, id)
) WITHOUT ROWID;
CREATE INDEX open_migrations ON migrations (settled) WHERE settled = 0;
CREATE INDEX migrations_of_domain ON migrations (uuid, generation);
"""

RECORDS_1 = [
    "begun",
    "handing",
    "kept",
    "given",
    "prepared",
    "claiming",
    "claimed",
    "refused",
    "never-prepared",
]
"""The records of version 1, each of which stands open and settled in the journal."""


def columns(number: int, record: str, settled: int) -> tuple[object, ...]:
    side = "source" if Record(record) in SOURCE else "destination"
    receipt = None if record in ("begun", "never-prepared") else f'["{JOURNAL_ID}", {number}]'
    return (
        *(side, f"{number:032x}", number, UUID, "web", record, number, receipt, "test:///other", "qemu:1"),
        *(number % 2, settled, "said so", "boot", '{"undefine": "yes"}'),
    )


WRITTEN = [
    columns(2 * place + settled + 1, record, settled)
    for place, record in enumerate(RECORDS_1)
    for settled in (0, 1)
]


def expected() -> list[MigrationRow]:
    return [
        MigrationRow(
            side=Side(str(side)),
            migration_id=MigrationId(str(migration_id)),
            generation=number,
            uuid=UUID,
            name="web",
            record=Record(str(record)),
            sequence=number,
            receipt=Receipt(journal_id=JOURNAL_ID, sequence=number) if receipt else None,
            peer_address="test:///other",
            process="qemu:1",
            arrives_paused=number % 2 == 1,
            settled=bool(settled),
            reason="said so",
            boot_id="boot",
            extra=(("undefine", "yes"),),
            testimony="",
        )
        for number, (side, migration_id, _, _, _, record, _, receipt, *_, settled, _, _, _) in enumerate(
            WRITTEN, start=1
        )
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal as version 1 left it, with its mark."""
    path = tmp_path / "state" / "journal"
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(VERSION_1)
        database.execute("INSERT INTO meta VALUES ('id', ?), ('sequence', ?)", (JOURNAL_ID, len(WRITTEN)))
        database.execute("INSERT INTO domains VALUES (?, ?)", (UUID, len(WRITTEN)))
        database.executemany(f"INSERT INTO migrations VALUES ({','.join('?' * 15)})", WRITTEN)
        database.execute("PRAGMA user_version=1")
    write_mark(path, len(WRITTEN))
    return path


def write_mark(path: Path, sequence: int) -> None:
    path.with_name("journal.mark").write_bytes(struct.pack(">16sQ", bytes.fromhex(JOURNAL_ID), sequence))


def version(path: Path) -> int:
    """The version of a copy: looking at the journal itself would tidy it up."""
    copy = path.parent.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path.parent, copy)
    with closing(sqlite3.connect(copy / "journal")) as database:
        found: int = database.execute("PRAGMA user_version").fetchone()[0]
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(migrations)")]
        digest = database.execute("SELECT count(*) FROM meta WHERE key = 'digest'").fetchone()[0]
        assert len(database.execute("SELECT * FROM migrations").fetchall()) == len(WRITTEN)
    # Nothing between the two.
    assert ("testimony" in columns, digest) == ((False, 0) if found == 1 else (True, 1))
    return found


def assert_upgraded(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        assert (journal.journal_id, journal.generation(UUID)) == (JOURNAL_ID, len(WRITTEN))
        assert journal.rows_of(UUID) == expected()[::-1]
        assert journal.open_rows() == [row for row in expected() if not row.settled]
    assert version(path) == 2


def test_every_row_is_there_and_can_be_written(path: Path) -> None:
    assert {row.record for row in expected()} == {Record(record) for record in RECORDS_1}
    assert version(path) == 1
    assert_upgraded(path)
    with closing(Journal.open(path)) as journal:
        first = journal.open_rows()[0]
        written = journal.write_now(
            replace(first, record=Record.KEPT, testimony="the guest on beta is lost, says A. Person")
        )
        assert written.sequence == len(WRITTEN) + 1
    with closing(Journal.open(path)) as journal:
        assert journal.read(written.side, written.migration_id) == written


def test_an_upgraded_journal_is_what_a_new_one_is(path: Path, tmp_path: Path) -> None:
    Journal.open(path).close()
    Journal.open(tmp_path / "new").close()
    layouts = []
    for each in (path, tmp_path / "new"):
        with closing(sqlite3.connect(each)) as database:
            layouts.append(
                {
                    table: database.execute(f"PRAGMA table_info({table})").fetchall()
                    for table in ("meta", "domains", "migrations")
                }
            )
    assert layouts[0] == layouts[1]


def test_the_mark_of_version_1_still_counts(path: Path) -> None:
    write_mark(path, len(WRITTEN) + 1)
    with pytest.raises(JournalBehindError, match="its mark says 19"):
        Journal.open(path)
    with pytest.raises(JournalBehindError, match="its mark says 19"):
        read_journal(path)


def test_a_look_upgrades_nothing(path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert list(read_journal(path).rows) == expected()
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


class Killed(sqlite3.Connection):
    """A connection whose program is killed at one of its statements."""

    left = 0

    def execute(self, *arguments: object) -> sqlite3.Cursor:
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Killed.left -= 1
        return super().execute(*arguments)  # type: ignore[arg-type]


def test_a_program_killed_at_any_statement_leaves_one_version_or_the_other(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(path.parent, kept)

    def connect(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Killed)

    found: list[int] = []
    while True:
        shutil.rmtree(path.parent)
        shutil.copytree(kept, path.parent)
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(ferryman.journal, "_connect", connect)
                Killed.left = len(found)
                Journal.open(path)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        found.append(version(path))
        assert_upgraded(path)
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_an_upgrade_torn_by_a_power_cut_is_done_again(path: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    with closing(Journal.open(path)):
        shutil.copytree(path.parent, torn)
    log = (torn / "journal-wal").read_bytes()
    assert version(torn / "journal") == 2
    found = set()
    for size in (*range(0, len(log), 512), len(log)):
        (torn / "journal-wal").write_bytes(log[:size])
        found.add(version(torn / "journal"))
        shutil.rmtree(path.parent)
        shutil.copytree(torn, path.parent)
        assert_upgraded(path)
    assert found == {1, 2}


def test_a_newer_journal_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version=3")
    before = path.read_bytes()
    for read in (Journal.open, read_journal):
        with pytest.raises(JournalError, match="has version 3, newer than this Ferryman's 2"):
            read(path)
    assert path.read_bytes() == before


def test_a_damaged_journal_of_version_1_is_refused_and_stays_one(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM meta WHERE key = 'id'")
    with pytest.raises(JournalError, match="its own rows cannot be read"):
        Journal.open(path)
    assert version(path) == 1
