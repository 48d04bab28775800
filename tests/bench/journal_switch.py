"""A journal that can be switched off, to see what it costs; only the benchmark knows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from ferryman.handover import MigrationRow, Receipt, Record
from ferryman.journal import Journal
from ferryman.types import DomainUUID, MigrationId, Side


class SwitchedJournal:
    """The real journal while ``on``; otherwise rows are kept in memory, and nothing outlives the program.

    A migration must be done with the switch in one position.  Generations are known in both.
    """

    on = True
    """For all journals of this program."""

    def __init__(self, real: Journal) -> None:
        self._real = real
        self.journal_id = real.journal_id
        self.close = real.close
        self._sequence = 0
        self._rows: dict[tuple[Side, MigrationId], MigrationRow] = {}
        self._generations: dict[DomainUUID, int] = {}

    async def write(self, row: MigrationRow) -> MigrationRow:
        written = await self._real.write(row) if self.on else self._keep(row)
        self._generations[row.uuid] = max(row.generation, self._generations.get(row.uuid, 0))
        return written

    def _keep(self, row: MigrationRow) -> MigrationRow:
        self._sequence += 1
        written = replace(row, sequence=self._sequence)
        if row.record is Record.PREPARED and row.receipt is None:
            written = replace(written, receipt=Receipt(journal_id=self.journal_id, sequence=self._sequence))
        self._rows[row.side, row.migration_id] = written
        return written

    async def require_room(self) -> None:
        if self.on:
            await self._real.require_room()

    def settle(self, row: MigrationRow) -> None:
        if self.on:
            self._real.settle(row)
        else:
            del self._rows[row.side, row.migration_id]

    def read(self, side: Side, migration_id: MigrationId) -> MigrationRow | None:
        return self._real.read(side, migration_id) if self.on else self._rows.get((side, migration_id))

    def open_rows(self) -> list[MigrationRow]:
        return self._real.open_rows()

    def rows_of(self, uuid: DomainUUID) -> list[MigrationRow]:
        return self._real.rows_of(uuid)

    def generation(self, uuid: DomainUUID) -> int:
        known = self._generations.get(uuid, 0)
        return max(known, self._real.generation(uuid)) if self.on else known


@contextmanager
def switched_journals() -> Iterator[type[SwitchedJournal]]:
    """Give every host that is opened in the block such a journal; the block gets the switch."""
    opened = Journal.open

    def open_switched(path: Path) -> SwitchedJournal:
        return SwitchedJournal(opened(path))

    with mock.patch.object(Journal, "open", open_switched):
        try:
            yield SwitchedJournal
        finally:
            SwitchedJournal.on = True
