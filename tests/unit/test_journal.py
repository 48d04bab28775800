"""What is acknowledged is there, what is lost is known, and a full disk still takes a decision."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ferryman.errors import JournalBehindError, JournalError, JournalFullError
from ferryman.handover import MigrationRow, Receipt, Record
from ferryman.journal import Journal
from ferryman.types import DomainUUID, MigrationId, Side


def row(number: int = 1, **changes: object) -> MigrationRow:
    made = MigrationRow(
        side=Side.DESTINATION,
        migration_id=MigrationId(f"{number:032x}"),
        generation=number,
        uuid=DomainUUID("6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55"),
        name="web",
        record=Record.PREPARED,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal"


def test_rows_survive_and_receipts_name_the_write(path: Path) -> None:
    journal = Journal.open(path)
    written = journal.write_now(row(extra=(("undefine", "yes"),), arrives_paused=True))
    assert written.receipt == Receipt(journal_id=journal.journal_id, sequence=1)
    claimed = journal.write_now(replace(written, record=Record.CLAIMED))
    assert claimed.receipt == written.receipt
    assert claimed.sequence == 2
    journal.close()
    again = Journal.open(path)
    assert again.journal_id == journal.journal_id
    assert again.read(Side.DESTINATION, claimed.migration_id) == claimed
    assert again.read(Side.SOURCE, claimed.migration_id) is None
    again.close()


def test_the_generation_only_rises(path: Path) -> None:
    journal = Journal.open(path)
    for number in (1, 5, 3):
        journal.write_now(row(number))
    assert journal.generation(row().uuid) == 5
    assert journal.generation(DomainUUID("other")) == 0
    journal.close()


async def test_open_rows_are_those_that_are_not_settled(path: Path) -> None:
    journal = Journal.open(path)
    first, second = await journal.write(row(1)), await journal.write(row(2))
    journal.settle(first)
    assert journal.open_rows() == [first, second]
    journal.close()
    journal = Journal.open(journal.path)
    assert journal.open_rows() == [second]
    assert [r.generation for r in journal.rows_of(first.uuid)] == [2, 1]
    journal.close()


def test_an_older_copy_is_refused(path: Path, tmp_path: Path) -> None:
    journal = Journal.open(path)
    journal.write_now(row(1))
    journal.close()
    older = tmp_path / "older"
    shutil.copy(path, older)
    journal = Journal.open(path)
    journal.write_now(row(2))
    journal.close()
    shutil.copy(older, path)
    with pytest.raises(JournalBehindError, match="ends at write 1, but its mark says 2"):
        Journal.open(path)


def test_a_lost_journal_is_refused(path: Path) -> None:
    journal = Journal.open(path)
    journal.write_now(row(1))
    journal.close()
    path.unlink()
    with pytest.raises(JournalBehindError, match="is new"):
        Journal.open(path)


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_journal_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(JournalError):
        Journal.open(path)


def test_a_damaged_mark_is_refused(path: Path) -> None:
    Journal.open(path).close()
    path.with_name("journal.mark").write_bytes(b"short")
    with pytest.raises(JournalError, match="mark"):
        Journal.open(path)


_WRITER = """
import sys
from pathlib import Path
from ferryman.journal import Journal
from tests.unit.test_journal import row
journal = Journal.open(Path(sys.argv[1]))
for number in range(1, 100000):
    journal.write_now(row(number))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(40)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout.read().splitlines()]
    journal = Journal.open(path)
    for number in told:
        assert journal.read(Side.DESTINATION, row(number).migration_id) is not None
    journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("only root can mount a small disk")
        pytest.skip("only root can mount a small disk")
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def test_a_full_disk_refuses_migrations_and_takes_decisions(small_disk: Path) -> None:
    journal = Journal.open(small_disk / "journal")
    prepared = journal.write_now(row(1))
    fill(small_disk)
    with pytest.raises(JournalFullError):
        # Each write grows the log until the disk has no page left.
        for number in range(2, 200):
            journal.write_now(row(number))
    for record in (Record.CLAIMING, Record.CLAIMED):
        journal.write_now(replace(prepared, record=record))
    journal.close()
    (small_disk / "filler").unlink()
    journal = Journal.open(small_disk / "journal")
    found = journal.read(Side.DESTINATION, prepared.migration_id)
    assert found is not None
    assert found.record is Record.CLAIMED
    journal.close()
