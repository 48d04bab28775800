"""The durable record of each migration on one host: sqlite3, WAL, ``synchronous=FULL``, one writer.

A write has happened when :meth:`Journal.write` returns; a write that raised may or may not be there, and the row
must be read again.  Every write has a sequence number.  One program at a time has a journal open.

A journal holds a digest of everything in it, renewed with each write and compared when it is opened.  What is left of
a torn file may be a sound database with some rows of yesterday, and nothing else would tell.

Beside the database lie

``<name>.mark``
    journal id and sequence of the last write.  A journal that is behind its mark, or has another id, was restored or
    replaced: it refuses to open (rule 6 of :mod:`ferryman.handover`).  Who has the journal open holds a lock on it.
``<name>.reserve``
    room set aside.  A full disk stops new migrations (``begun`` and ``prepared`` need the reserve whole), but the
    decision of an open one gives the reserve up and is written.

A journal of an older version is upgraded when it is opened, all at once or not at all; a newer one is refused.

Sources: sqlite.org/wal.html and sqlite.org/pragma.html#pragma_synchronous; HANDOVER rules on records.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import sqlite3
import struct
import tempfile
import threading
import time
import zlib
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from ferryman.errors import HostBusyError, JournalBehindError, JournalError, JournalFullError
from ferryman.handover import MigrationRow, Receipt, Record
from ferryman.types import DomainUUID, MigrationId, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger(__name__)

_VERSION = 2
_MARK = struct.Struct(">16sQ")
_MARK_SUM = struct.Struct(">I")
LOCK_WAIT_S = 3.0
"""How long a second program waits for the journal."""

_LOCK_RETRY_S = 0.05
RESERVE_BYTES = 262_144
"""Room set aside for the decisions of open migrations: some tens of pages of the database's log."""

_ADMITTING = frozenset({Record.BEGUN, Record.PREPARED})
_FULL = frozenset(
    # A quota that is used up is an error of writing, not of a full disk (sqlite3, os_unix.c, seekAndWrite).
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
)

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
    testimony TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (side, id)
) WITHOUT ROWID;
CREATE INDEX open_migrations ON migrations (settled) WHERE settled = 0;
CREATE INDEX migrations_of_domain ON migrations (uuid, generation);
"""

_COLUMNS = (
    "side, id, generation, uuid, name, record, sequence, receipt, peer_address, process, arrives_paused, settled,"
    " reason, boot_id, extra, testimony"
)
_SETTLED = 11  # the place of that column

_UPGRADES = {1: ("ALTER TABLE migrations ADD COLUMN testimony TEXT NOT NULL DEFAULT ''",)}
"""Statements that lead from a version to the next one; the digest is made anew after them."""


@lru_cache(maxsize=1)
def host_boot_id() -> str:
    """Identity of this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContents:
    """What a journal's file holds, read without changing it.

    :param rows: every row, settled ones too, oldest write first.
    :param marked: its mark lay beside it; without one nobody can tell whether newer writes are missing.
    """

    journal_id: str
    sequence: int
    rows: tuple[MigrationRow, ...]
    marked: bool


def read_journal(path: Path) -> JournalContents:
    """Read a journal's file that no program has open, such as one carried from another host; blocking.

    Nothing is changed or made beside it.  Its ``-wal`` and its mark count where they lie beside it.

    :raises JournalBehindError: it is older than its mark, or another journal's mark lies beside it.
    :raises JournalError: it is no journal, cannot be read, is damaged, or is of a newer version.
    """
    with tempfile.TemporaryDirectory(prefix="ferryman-journal-") as directory:
        # sqlite makes files beside a database that has a log, even to read it; so it gets a copy.
        copy = Path(directory) / "journal"
        try:
            shutil.copyfile(path, copy)
            with suppress(FileNotFoundError):
                shutil.copyfile(path.with_name(path.name + "-wal"), copy.with_name("journal-wal"))
            try:
                content = path.with_name(path.name + ".mark").read_bytes()
            except FileNotFoundError:
                content = b""
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be read: {error}") from error
        with closing(_connect(copy)) as database, _Errors(path):
            head = _set_up(database, path, make=False)
            rows = database.execute(f"SELECT {_COLUMNS} FROM migrations ORDER BY sequence").fetchall()  # noqa: S608
            found = tuple(_from_columns(columns) for columns in rows)
        _compare_mark(content, head, path)
    return JournalContents(
        journal_id=head.journal_id, sequence=head.sequence, rows=found, marked=bool(content)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """A journal's own rows, and the digest of all the others."""

    journal_id: str
    sequence: int
    digest: int

    @property
    def sealed(self) -> str:
        """The digest as the journal holds it, with these rows in it."""
        return f"{self.digest ^ _digest('meta', (self.journal_id, self.sequence)):032x}"


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
        head: _Head,
        mark: int,
    ) -> None:
        self.path = path
        self._database = database
        self._reader = reader
        self._head = head
        self._mark = mark
        self._settled: list[tuple[str, str, str]] = []
        self._reserve = _reserve_of(path)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or make a journal; blocking, some milliseconds, and longer the more rows there are.

        :raises HostBusyError: another program, or another connection of this one, has it open and did not let go.
        :raises JournalBehindError: the journal is older than its mark, or is another one.
        :raises JournalFullError: no room, even without the reserve.
        :raises JournalError: it cannot be read or written, is damaged, or is of a newer version.
        """
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                mark = _open_mark(path)
            except OSError as error:
                raise JournalError(f"the journal {path} cannot be opened: {error}") from error
            # INVARIANT: the lock is let go after the database was closed.
            stack.callback(os.close, mark)
            _lock(mark, path)
            try:
                database, reader, head = _open_database(path, stack)
            except (sqlite3.Error, UnicodeDecodeError) as error:  # what sqlite says may quote what is damaged
                if _is_full(error):
                    raise JournalFullError(f"no room to open the journal {path}: free some space") from error
                raise JournalError(f"the journal {path} cannot be used: {error}") from error
            try:
                known = _compare_mark(os.pread(mark, _MARK.size + _MARK_SUM.size + 1, 0), head, path)
                _write_mark(mark, head)
                os.fsync(mark)
                if not known:
                    _sync_directory(path.parent)
            except OSError as error:
                raise JournalError(f"the mark of the journal {path} cannot be used: {error}") from error
            stack.pop_all()
        journal = cls(path, database, reader, head=head, mark=mark)
        with suppress(JournalFullError):
            # A full disk refuses new migrations later, one by one; an open one must still be settled now.
            journal._fill_reserve()
        return journal

    @property
    def journal_id(self) -> str:
        """Identity of this journal, in every receipt."""
        return self._head.journal_id

    def close(self) -> None:
        """Close the journal; what was written stays. Doing it twice is harmless."""
        with self._lock, self._reading:
            if self._mark >= 0:
                try:
                    if self._settled:
                        self._database.execute("BEGIN IMMEDIATE")
                        digest, _noted = self._note_settled(self._head.digest)
                        self._keep_head(replace(self._head, digest=digest))
                        self._database.execute("COMMIT")
                except (sqlite3.Error, JournalError) as error:
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
            except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
                if not _is_full(error):
                    raise JournalError(f"the journal {self.path} could not be written: {error}") from error
                if row.record in _ADMITTING:
                    raise JournalFullError(f"no room for the journal {self.path}: free some space") from error
                return self._commit_from_reserve(row)

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
        sequence = self._head.sequence + 1
        written = replace(
            row,
            sequence=sequence,
            boot_id=host_boot_id(),
            reason=_storable(row.reason),
            testimony=_storable(row.testimony),
        )
        if row.record is Record.PREPARED and row.receipt is None:
            written = replace(written, receipt=Receipt(journal_id=self.journal_id, sequence=sequence))
        self._database.execute("BEGIN IMMEDIATE")
        try:
            digest, noted = self._note_settled(self._head.digest)
            digest ^= self._put(_to_columns(written))
            if written.uuid:  # a tombstone of an id that was never prepared names no domain
                digest ^= self._raise_generation(written.uuid, written.generation)
            head = replace(self._head, sequence=sequence, digest=digest)
            self._keep_head(head)
            self._database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise
        self._head = head
        del self._settled[:noted]
        # The mark follows the journal and is never ahead of it, so a crash between the two only weakens the check.
        _write_mark(self._mark, head)
        return written

    def _put(self, columns: tuple[object, ...]) -> int:
        """Write one row; returns what that changes in the digest."""
        change = _digest("migrations", columns)
        before = self._database.execute(
            f"SELECT {_COLUMNS} FROM migrations WHERE side = ? AND id = ?",  # noqa: S608
            columns[:2],
        ).fetchone()
        if before is not None:
            change ^= _digest("migrations", before)
        self._database.execute(
            f"INSERT OR REPLACE INTO migrations ({_COLUMNS}) VALUES ({', '.join('?' * len(columns))})",  # noqa: S608
            columns,
        )
        return change

    def _raise_generation(self, uuid: DomainUUID, generation: int) -> int:
        """Note a domain's generation if it is the highest; returns what that changes in the digest."""
        change = _digest("domains", (uuid, generation))
        before = self._database.execute("SELECT generation FROM domains WHERE uuid = ?", (uuid,)).fetchone()
        if before is not None:
            if before[0] >= generation:
                return 0
            change ^= _digest("domains", (uuid, before[0]))
        self._database.execute("INSERT OR REPLACE INTO domains VALUES (?, ?)", (uuid, generation))
        return change

    def _note_settled(self, digest: int) -> tuple[int, int]:
        """Write the notes of :meth:`settle`; returns the digest after them and their number."""
        notes = list(self._settled)
        for note in notes:
            found = self._database.execute(
                f"SELECT {_COLUMNS} FROM migrations WHERE side = ? AND id = ? AND record = ?",  # noqa: S608
                note,
            ).fetchone()
            if found is not None:
                digest ^= self._put((*found[:_SETTLED], 1, *found[_SETTLED + 1 :]))
        return digest, len(notes)

    def _keep_head(self, head: _Head) -> None:
        kept = self._database.execute(
            "UPDATE meta SET value = ? WHERE key = 'sequence' AND value = ?",
            (str(head.sequence), str(self._head.sequence)),
        )
        if kept.rowcount != 1:
            raise JournalError(
                f"another program has written into the journal {self.path} while it was open here: end this one"
            )
        self._database.execute("UPDATE meta SET value = ? WHERE key = 'digest'", (head.sealed,))

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


def _reserve_of(path: Path) -> Path:
    return path.with_name(path.name + ".reserve")


def _is_full(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", None) in _FULL


def _storable(text: str) -> str:
    # What an exception says may hold bytes of a file's name that are no text; no decision may fail for that.
    return text.encode("utf-8", "backslashreplace").decode()


def _digest(table: str, columns: Sequence[object]) -> int:
    """One row's part of the digest; the whole is the exclusive or of all parts, whatever their order."""
    text = json.dumps([table, *columns], separators=(",", ":"))
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big")


def _digest_of(database: sqlite3.Connection) -> int:
    digest = 0
    for table, columns in (("migrations", _COLUMNS), ("domains", "uuid, generation")):
        for row in database.execute(f"SELECT {columns} FROM {table}"):  # noqa: S608 - the names are literals
            digest ^= _digest(table, row)
    return digest


class _Errors:
    """Turn what sqlite raises while reading into :class:`JournalError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, sqlite3.Error | ValueError | KeyError):
            raise JournalError(f"the journal {self._path} cannot be read: {error}") from error


def _open_database(path: Path, stack: ExitStack) -> tuple[sqlite3.Connection, sqlite3.Connection, _Head]:
    """Open the database for writing and for reading; on a full disk the reserve pays for it."""
    while True:
        with ExitStack() as attempt:
            database, reader = (attempt.enter_context(closing(_connect(path))) for _ in range(2))
            try:
                head = _set_up(database, path, make=True)
                # Its files exist from now on, so that reading never needs room.
                reader.execute("SELECT count(*) FROM meta").fetchone()
            except sqlite3.Error as error:
                if not _is_full(error) or not _reserve_of(path).exists():
                    raise
                _log.warning(
                    "the journal's disk is full: the reserve pays for its opening", extra={"path": str(path)}
                )
            else:
                stack.enter_context(attempt.pop_all())
                return database, reader, head
        _reserve_of(path).unlink()


def _set_up(database: sqlite3.Connection, path: Path, *, make: bool) -> _Head:
    """Make, upgrade and check the tables.

    :param make: an empty file becomes a journal; otherwise it is none.
    """
    database.execute("PRAGMA synchronous=FULL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if not 0 <= version <= _VERSION:
        raise JournalError(f"the journal {path} has version {version}, newer than this Ferryman's {_VERSION}")
    if version == 0 and (not make or database.execute("SELECT 1 FROM sqlite_master").fetchone()):
        raise JournalError(f"{path} is no journal")
    (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise JournalError(
            f"the journal {path} cannot be kept on its file system, which has no shared memory"
        )
    # Indexes too: the digest says nothing about them.
    (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise JournalError(f"the journal {path} is damaged: {verdict.splitlines()[-1]}")
    if version < _VERSION:
        database.execute("BEGIN IMMEDIATE")
        if version == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute("INSERT INTO meta VALUES ('id', ?), ('sequence', '0')", (secrets.token_hex(16),))
        else:
            for older in range(version, _VERSION):
                for statement in _UPGRADES[older]:
                    database.execute(statement)
        head, _ = _read_head(database, path)
        database.execute("INSERT OR REPLACE INTO meta VALUES ('digest', ?)", (head.sealed,))
        database.execute(f"PRAGMA user_version={_VERSION}")
        database.execute("COMMIT")
    head, sealed = _read_head(database, path)
    if head.sealed != sealed:
        raise JournalError(f"the journal {path} is damaged: its rows are not those that were written")
    # sqlite opens what it can only read; a journal that takes no decision must not open.
    database.execute("UPDATE meta SET value = ? WHERE key = 'digest'", (sealed,))
    return head


def _read_head(database: sqlite3.Connection, path: Path) -> tuple[_Head, str]:
    """Read a journal's own rows; make the digest of all others anew, and return the one that was kept beside it."""
    try:
        meta: dict[str, str] = dict(database.execute("SELECT key, value FROM meta").fetchall())
        head = _Head(journal_id=meta["id"], sequence=int(meta["sequence"]), digest=_digest_of(database))
        if len(bytes.fromhex(head.journal_id)) != 16 or head.sequence < 0:
            raise ValueError(head.journal_id)
    except (KeyError, ValueError, TypeError) as error:
        raise JournalError(f"the journal {path} is damaged: its own rows cannot be read") from error
    return head, meta.get("digest", "")


def _open_mark(path: Path) -> int:
    return os.open(path.with_name(path.name + ".mark"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(mark: int, path: Path) -> None:
    """Lock the journal; the lock ends with the process, however that ends.

    :raises HostBusyError: somebody else holds it and did not let go within :data:`LOCK_WAIT_S`.
    """
    # Not the database's own file: closing it a second time in this process would end sqlite's locks on it.
    end_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end_s:
                raise HostBusyError(
                    f"the journal {path} is open in another program or connection (process {_holder(mark)}): it did"
                    f" not let go within {LOCK_WAIT_S:g} s"
                ) from error
            # There is no event to wait for: nothing of the kernel's tells that a flock is free, and one that blocks
            # cannot be given a limit. So it is tried again, for the seconds that a program needs to end; in the thread
            # that opens a journal, so that no event loop waits here.
            time.sleep(_LOCK_RETRY_S)
        else:
            return


def _holder(mark: int) -> str:
    """The process that holds the lock, by the system's table (proc(5), /proc/locks)."""
    status = os.fstat(mark)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and place in fields:
            return fields[4]
    return "unknown"


def _compare_mark(content: bytes, head: _Head, path: Path) -> bool:
    """Compare a journal with its mark; False where the mark is empty or missing.

    :raises JournalBehindError: the mark is another journal's, or says that writes are missing.
    :raises JournalError: the mark is damaged.
    """
    if not content:
        return False
    marked, checksum = content[: _MARK.size], content[_MARK.size :]
    # Version 1 of the journal had no sum in its mark.
    if len(marked) != _MARK.size or checksum not in (b"", _MARK_SUM.pack(zlib.crc32(marked))):
        raise JournalError(
            f"the mark of the journal {path} is damaged: remove it if every guest is accounted for"
        )
    marked_id, marked_sequence = _MARK.unpack(marked)
    if marked_id.hex() != head.journal_id:
        raise JournalBehindError(
            f"the journal {path} {'is another one' if head.sequence else 'is new'}, but its mark says that this host"
            " has migrated before: bring the old journal back, or remove the mark if no guest is missing"
        )
    if marked_sequence > head.sequence:
        raise JournalBehindError(
            f"the journal {path} ends at write {head.sequence}, but its mark says {marked_sequence}: it is an older"
            " copy; bring the newer one back, or remove the mark if every guest is accounted for"
        )
    return True


def _write_mark(mark: int, head: _Head) -> None:
    content = _MARK.pack(bytes.fromhex(head.journal_id), head.sequence)
    os.pwrite(mark, content + _MARK_SUM.pack(zlib.crc32(content)), 0)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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
        row.testimony,
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
        testimony=columns[15],
    )
