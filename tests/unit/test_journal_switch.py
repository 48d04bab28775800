"""What the benchmark compares: the real journal, and none."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, cast

from ferryman.handover import MigrationRow, Record
from ferryman.journal import Journal
from ferryman.types import DomainUUID, MigrationId, Side
from tests.bench.journal_switch import switched_journals


def row(number: int) -> MigrationRow:
    return MigrationRow(
        side=Side.DESTINATION,
        migration_id=MigrationId(f"{number:032x}"),
        generation=number,
        uuid=DomainUUID("6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55"),
        name="web",
        record=Record.PREPARED,
    )


async def test_only_what_is_written_with_the_switch_on_is_on_the_disk(tmp_path: Path) -> None:
    with switched_journals() as switch:
        with closing(cast("Any", Journal.open(tmp_path / "journal"))) as journal:
            for number, switch.on in enumerate((True, False, True, False), start=1):
                assert journal.generation(row(number).uuid) == number - 1
                written = await journal.write(row(number))
                assert written.receipt is not None
                assert journal.read(written.side, written.migration_id) == written
                journal.settle(written)
    with closing(Journal.open(tmp_path / "journal")) as journal:
        assert sorted(found.generation for found in journal.rows_of(row(1).uuid)) == [1, 3]
        assert journal.open_rows() == []
