"""The durable record of each migration on one host: sqlite3, WAL, ``synchronous=FULL``, one writer.

A write has happened when :meth:`Journal.write` returns; a write that raised may or may not be there, and the row
must be read again.  Every write has a sequence number.  Beside the database lie

``<name>.mark``
    journal id and sequence of the last write.  A journal that is behind its mark, or has another id, was restored or
    replaced: it refuses to open (rule 6 of :mod:`ferryman.handover`).
``<name>.reserve``
    room set aside.  A full disk stops new migrations (``begun`` and ``prepared`` need the reserve whole), but the
    decision of an open one gives the reserve up and is written.

Sources: sqlite.org/wal.html and sqlite.org/pragma.html#pragma_synchronous; HANDOVER rules on records.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sqlite3
import struct
import threading
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from ferryman.errors import JournalBehindError, JournalError, JournalFullError
from ferryman.handover import MigrationRow, Receipt, Record
from ferryman.types import DomainUUID, MigrationId, Side

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

_VERSION = 1
_MARK = struct.Struct(">16sQ")
RESERVE_BYTES = 262_144
"""Room set aside for the decisions of open migrations: some tens of pages of the database's log."""

_ADMITTING = frozenset({Record.BEGUN, Record.PREPARED})

_SCHEMA = """
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

_COLUMNS = (
    "side, id, generation, uuid, name, record, sequence, receipt, peer_address, process, arrives_paused, settled,"
    " reason, boot_id, extra"
)


@lru_cache(maxsize=1)
def host_boot_id() -> str:
    """Identity of this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Journal:
    """One host's journal.

    Calls may come from any task of any event loop.  One thread at a time writes; who reads has a connection of its
    own, which in WAL mode never waits for a write, so that reading takes microseconds and needs no thread.
    """

    def __init__(
        self,
        path: Path,
        database: sqlite3.Connection,
        reader: sqlite3.Connection,
        *,
        journal_id: str,
        sequence: int,
        mark: int,
    ) -> None:
        self.path = path
        self.journal_id = journal_id
        self._database = database
        self._reader = reader
        self._sequence = sequence
        self._mark = mark
        self._settled: list[tuple[str, str, str]] = []
        self._reserve = path.with_name(path.name + ".reserve")
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or make a journal; blocking, some milliseconds.

        :raises JournalBehindError: the journal is older than its mark, or is another one.
        :raises JournalError: it cannot be read or written, is damaged, or is of a newer version.
        """
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = not path.exists()
                database, reader = (stack.enter_context(closing(_connect(path))) for _ in range(2))
            except (OSError, sqlite3.Error) as error:
                raise JournalError(f"the journal {path} cannot be opened: {error}") from error
            try:
                journal_id, sequence = _set_up(database, path)
                mark = _open_mark(path, journal_id, sequence, fresh=fresh)
            except sqlite3.Error as error:
                raise JournalError(f"the journal {path} cannot be used: {error}") from error
            except OSError as error:
                raise JournalError(f"the mark of the journal {path} cannot be used: {error}") from error
            stack.pop_all()
        journal = cls(path, database, reader, journal_id=journal_id, sequence=sequence, mark=mark)
        with suppress(JournalFullError):
            # A full disk refuses new migrations later, one by one; an open one must still be settled now.
            journal._fill_reserve()
        return journal

    def close(self) -> None:
        """Close the journal; what was written stays. Doing it twice is harmless."""
        with self._lock, self._reading:
            if self._mark >= 0:
                try:
                    self._database.execute("BEGIN IMMEDIATE")
                    self._note_settled()
                    self._database.execute("COMMIT")
                except sqlite3.Error as error:
                    _log.warning("the end of %d migrations could not be noted: %s", len(self._settled), error)
                self._reader.close()
                self._database.close()
                os.close(self._mark)
                self._mark = -1

    async def write(self, row: MigrationRow) -> MigrationRow:
        """Write a row durably and return it with its sequence number.

        A ``prepared`` row gets its receipt here, and a ``begun`` row raises the domain's generation.

        :raises JournalFullError: no room; for ``begun`` and ``prepared`` the reserve is still whole.
        :raises JournalError: the write failed, and whether it is there is unknown: read the row again.
        :cancellation: shielded: the write's result is always awaited and read.
        """
        with anyio.CancelScope(shield=True):
            written = await anyio.to_thread.run_sync(self.write_now, row, limiter=self._limiter)
        return written

    async def require_room(self) -> None:
        """Make sure that the reserve is whole, before a migration starts.

        :raises JournalFullError: there is too little room.
        """
        if not self._reserve_is_whole():
            await anyio.to_thread.run_sync(self._fill_reserve, limiter=self._limiter)

    def settle(self, row: MigrationRow) -> None:
        """Note that a decided row's last actions are done; costs nothing now.

        The note is written with the next row, or when the journal is closed.  One that a crash loses makes the next
        opening do those actions again, which is harmless.
        """
        # Without the lock, which a writer holds while the disk works: one append is one step of the interpreter.
        self._settled.append((row.side.value, row.migration_id, row.record.value))

    def read(self, side: Side, migration_id: MigrationId) -> MigrationRow | None:
        """Read the row of one migration on one side."""
        found = self._select("side = ? AND id = ?", (side.value, migration_id))
        return found[0] if found else None

    def open_rows(self) -> list[MigrationRow]:
        """Read every row that is not settled, oldest first."""
        return self._select("settled = 0 ORDER BY sequence", ())

    def rows_of(self, uuid: DomainUUID) -> list[MigrationRow]:
        """Read every row of one domain, newest generation first."""
        return self._select("uuid = ? ORDER BY generation DESC, sequence DESC", (uuid,))

    def generation(self, uuid: DomainUUID) -> int:
        """Read the highest generation that this host knows of a domain; 0 where it knows none."""
        with self._reading, self._errors():
            found = self._reader.execute("SELECT generation FROM domains WHERE uuid = ?", (uuid,)).fetchone()
        return int(found[0]) if found else 0

    def write_now(self, row: MigrationRow) -> MigrationRow:
        """Do :meth:`write` in this thread."""
        with self._lock:
            if row.record in _ADMITTING:
                self._fill_reserve()
            try:
                return self._commit(row)
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", None) not in (
                    sqlite3.SQLITE_FULL,
                    sqlite3.SQLITE_IOERR_WRITE,
                ):
                    raise JournalError(f"the journal {self.path} could not be written: {error}") from error
                if row.record in _ADMITTING:
                    raise JournalFullError(f"no room for the journal {self.path}: free some space") from error
                return self._commit_from_reserve(row)
            except sqlite3.Error as error:
                raise JournalError(f"the journal {self.path} could not be written: {error}") from error

    def _commit_from_reserve(self, row: MigrationRow) -> MigrationRow:
        _log.warning(
            "the journal's disk is full: the reserve pays for a decision", extra={"path": str(self.path)}
        )
        with suppress(FileNotFoundError):
            self._reserve.unlink()
        try:
            return self._commit(row)
        except sqlite3.Error as error:
            raise JournalFullError(
                f"no room for the decision in the journal {self.path}, even without its reserve: free some space"
            ) from error

    def _commit(self, row: MigrationRow) -> MigrationRow:
        sequence = self._sequence + 1
        written = replace(row, sequence=sequence, boot_id=host_boot_id())
        if row.record is Record.PREPARED and row.receipt is None:
            written = replace(written, receipt=Receipt(journal_id=self.journal_id, sequence=sequence))
        try:
            self._database.execute("BEGIN IMMEDIATE")
            noted = self._note_settled()
            self._database.execute(
                f"INSERT OR REPLACE INTO migrations ({_COLUMNS}) VALUES ({', '.join('?' * 15)})",  # noqa: S608
                _to_columns(written),
            )
            if written.uuid:  # a tombstone of an id that was never prepared names no domain
                self._database.execute(
                    "INSERT INTO domains VALUES (?, ?) ON CONFLICT (uuid)"
                    " DO UPDATE SET generation = max(generation, excluded.generation)",
                    (written.uuid, written.generation),
                )
            self._database.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (str(sequence),))
            self._database.execute("COMMIT")
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise
        self._sequence = sequence
        del self._settled[:noted]
        # The mark follows the journal and is never ahead of it, so a crash between the two only weakens the check.
        os.pwrite(self._mark, _MARK.pack(bytes.fromhex(self.journal_id), sequence), 0)
        return written

    def _note_settled(self) -> int:
        notes = list(self._settled)
        self._database.executemany(
            "UPDATE migrations SET settled = 1 WHERE side = ? AND id = ? AND record = ?", notes
        )
        return len(notes)

    def _reserve_is_whole(self) -> bool:
        try:
            return self._reserve.stat().st_size == RESERVE_BYTES
        except FileNotFoundError:
            return False

    def _fill_reserve(self) -> None:
        if self._reserve_is_whole():
            return
        try:
            file = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, RESERVE_BYTES)
            finally:
                os.close(file)
        except OSError as error:
            with suppress(OSError):
                self._reserve.unlink()
            raise JournalFullError(
                f"no room for the reserve of the journal {self.path} ({RESERVE_BYTES} bytes): free some space"
            ) from error

    def _select(self, where: str, values: tuple[object, ...]) -> list[MigrationRow]:
        with self._reading, self._errors():
            rows = self._reader.execute(
                f"SELECT {_COLUMNS} FROM migrations WHERE {where}",  # noqa: S608 - the clauses are literals above
                values,
            ).fetchall()
            return [_from_columns(columns) for columns in rows]

    def _errors(self) -> _Errors:
        return _Errors(self.path)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)


class _Errors:
    """Turn what sqlite raises while reading into :class:`JournalError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, sqlite3.Error | ValueError | KeyError):
            raise JournalError(f"the journal {self._path} cannot be read: {error}") from error


def _set_up(database: sqlite3.Connection, path: Path) -> tuple[str, int]:
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise JournalError(f"the journal {path} has version {version}, newer than this Ferryman's {_VERSION}")
    if version == 0:
        database.execute("BEGIN IMMEDIATE")
        # Somebody else may have made it while we waited for the lock.
        if database.execute("PRAGMA user_version").fetchone() == (0,):
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute("INSERT INTO meta VALUES ('id', ?), ('sequence', '0')", (secrets.token_hex(16),))
            database.execute(f"PRAGMA user_version={_VERSION}")
        database.execute("COMMIT")
    try:
        meta: dict[str, str] = dict(database.execute("SELECT key, value FROM meta").fetchall())
        journal_id, sequence = meta["id"], int(meta["sequence"])
        if len(bytes.fromhex(journal_id)) != 16 or sequence < 0:
            raise ValueError(journal_id)
    except (KeyError, ValueError) as error:
        raise JournalError(f"the journal {path} is damaged: its own id or sequence cannot be read") from error
    return journal_id, sequence


def _open_mark(path: Path, journal_id: str, sequence: int, *, fresh: bool) -> int:
    mark = os.open(path.with_name(path.name + ".mark"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        content = os.pread(mark, _MARK.size + 1, 0)
        if len(content) == _MARK.size:
            marked_id, marked_sequence = _MARK.unpack(content)
            if marked_id.hex() != journal_id:
                raise JournalBehindError(
                    f"the journal {path} {'is new' if fresh else 'is another one'}, but its mark says that this host"
                    " has migrated before: bring the old journal back, or remove the mark if no guest is missing"
                )
            if marked_sequence > sequence:
                raise JournalBehindError(
                    f"the journal {path} ends at write {sequence}, but its mark says {marked_sequence}: it is an older"
                    " copy; bring the newer one back, or remove the mark if every guest is accounted for"
                )
        elif content:
            raise JournalError(
                f"the mark of the journal {path} is damaged: remove it if every guest is accounted for"
            )
        os.pwrite(mark, _MARK.pack(bytes.fromhex(journal_id), sequence), 0)
    except BaseException:
        os.close(mark)
        raise
    return mark


def _to_columns(row: MigrationRow) -> tuple[object, ...]:
    return (
        row.side.value,
        row.migration_id,
        row.generation,
        row.uuid,
        row.name,
        row.record.value,
        row.sequence,
        None if row.receipt is None else json.dumps([row.receipt.journal_id, row.receipt.sequence]),
        row.peer_address,
        row.process,
        int(row.arrives_paused),
        int(row.settled),
        row.reason,
        row.boot_id,
        json.dumps(dict(row.extra)),
    )


def _from_columns(columns: tuple[Any, ...]) -> MigrationRow:
    receipt = None if columns[7] is None else json.loads(columns[7])
    return MigrationRow(
        side=Side(columns[0]),
        migration_id=MigrationId(columns[1]),
        generation=columns[2],
        uuid=DomainUUID(columns[3]),
        name=columns[4],
        record=Record(columns[5]),
        sequence=columns[6],
        receipt=None if receipt is None else Receipt(journal_id=receipt[0], sequence=receipt[1]),
        peer_address=columns[8],
        process=columns[9],
        arrives_paused=bool(columns[10]),
        settled=bool(columns[11]),
        reason=columns[12],
        boot_id=columns[13],
        extra=tuple(json.loads(columns[14]).items()),
    )
