"""A host whose journal was lost or restored: it does not open, or it answers ``unknown``, and no second guest runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import anyio
import pytest

import ferryman
from ferryman import Connection, MigrationOptions
from ferryman.engine import Performed, Prepared
from ferryman.errors import HostBusyError, JournalBehindError, PaperError
from ferryman.handover import Cookie, MigrationRow, PaperKind, decode_cookie, encode_cookie
from ferryman.journal import Journal
from ferryman.testing import Fault, World, forget_world, world
from ferryman.testing.world import ProcessState
from ferryman.types import DomainUUID
from tests.simulated import UUID, start, two_hosts
from tests.unit.test_journal_stress import failing_sync

__all__ = ["failing_sync"]

OPTIONS = MigrationOptions(patience_s=5.0, lease_s=600.0)


async def prepare(alpha: Connection, beta: Connection) -> Prepared:
    """Start the usual guest, and bring a migration of it as far as its receipt."""
    info = await (await start(alpha)).info()
    begun = await alpha.host.begin(info, OPTIONS)
    return await beta.host.prepare(begun.cookie, info, begun.definition, OPTIONS, paused=False)


async def perform(alpha: Connection, prepared: Prepared) -> Performed:
    """Stop the guest at the source, which gives its proof."""
    performed = await alpha.host.perform(prepared.cookie, prepared.migration_uri, OPTIONS, lambda _: None)
    assert performed.kind is PaperKind.PROOF
    return performed


def keep(lab: World, directory: Path) -> None:
    """Copy the journal of beta and what lies beside it."""
    for suffix in ("", "-wal", ".mark"):
        with suppress(FileNotFoundError):
            shutil.copy(f"{lab.hosts['beta'].journal}{suffix}", directory / f"kept{suffix}")


def put_back(lab: World, directory: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        shutil.copy(directory / f"kept{suffix}", f"{lab.hosts['beta'].journal}{suffix}")


def lose(lab: World, *suffixes: str) -> None:
    for suffix in suffixes:
        Path(f"{lab.hosts['beta'].journal}{suffix}").unlink()


def running(lab: World) -> list[str]:
    return lab.runners(DomainUUID(UUID))


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryman.journal.LOCK_WAIT_S", 0.1)


async def test_with_journal_and_mark_lost_a_receipt_is_answered_unknown(lab: World) -> None:
    async with ferryman.connect(f"test:///{lab.name}/alpha") as alpha:
        async with ferryman.connect(f"test:///{lab.name}/beta") as beta:
            prepared = await prepare(alpha, beta)
            performed = await perform(alpha, prepared)
        lose(lab, "", ".mark")
        async with ferryman.connect(f"test:///{lab.name}/beta") as beta:
            for kind in (PaperKind.PROOF, PaperKind.ASK, PaperKind.CANCEL):
                cookie = decode_cookie(performed.cookie)
                question = replace(cookie, paper=replace(cookie.paper, kind=kind))
                finished = await beta.host.decide(encode_cookie(question))
                assert finished.kind is PaperKind.UNKNOWN
                confirmed = await alpha.host.confirm(finished.cookie)
                assert confirmed.kind is PaperKind.PENDING
            assert beta.open_migrations() == []
        assert running(lab) == []
        assert len(alpha.open_migrations()) == 1
    assert lab.violations == []


async def test_without_a_receipt_an_unknown_id_was_never_prepared(lab: World) -> None:
    """It is barred, which is no refusal: a late prepare of it comes too late."""
    async with two_hosts(lab) as (alpha, beta):
        info = await (await start(alpha)).info()
        begun = await alpha.host.begin(info, OPTIONS)
        passport = decode_cookie(begun.cookie)
        question = Cookie(paper=replace(passport.paper, kind=PaperKind.ASK), address=passport.address)
        finished = await beta.host.decide(encode_cookie(question))
        assert finished.kind is PaperKind.NEVER_PREPARED
        with pytest.raises(PaperError, match="too late"):
            await beta.host.prepare(begun.cookie, info, begun.definition, OPTIONS, paused=False)
        await alpha.host.give_up(begun.id)
    assert running(lab) == ["alpha"]


@pytest.mark.parametrize("lost", ["journal", "older-journal"])
async def test_a_host_behind_its_mark_does_not_open(lab: World, tmp_path: Path, lost: str) -> None:
    async with ferryman.connect(f"test:///{lab.name}/beta"):
        pass
    keep(lab, tmp_path)
    async with ferryman.connect(f"test:///{lab.name}/alpha") as alpha:
        async with ferryman.connect(f"test:///{lab.name}/beta") as beta:
            prepared = await prepare(alpha, beta)
            performed = await perform(alpha, prepared)
            claimed = await beta.host.decide(performed.cookie)
            assert claimed.kind is PaperKind.CLAIM
        lose(lab, "")
        if lost == "older-journal":
            put_back(lab, tmp_path, "")
        for _ in range(2):
            with pytest.raises(JournalBehindError):
                async with ferryman.connect(f"test:///{lab.name}/beta"):
                    pass
        # The source asks in vain, and stays stopped: the guest runs at beta.
        assert running(lab) == ["beta"]
        assert len(alpha.open_migrations()) == 1
    assert lab.violations == []


async def test_a_journal_restored_with_its_mark_breaks_the_promise(lab: World, tmp_path: Path) -> None:
    """Limit 4 of the handover: nothing on this host can tell.  Should this fail, the limit is gone: say so there."""
    async with ferryman.connect(f"test:///{lab.name}/alpha") as alpha:
        async with ferryman.connect(f"test:///{lab.name}/beta") as beta:
            prepared = await prepare(alpha, beta)
            performed = await perform(alpha, prepared)
            keep(lab, tmp_path)
            assert (await beta.host.decide(performed.cookie)).kind is PaperKind.CLAIM
            await lab.elapse(1.0)
        put_back(lab, tmp_path, "", "-wal", ".mark")
        for process in lab.hosts["beta"].processes.values():
            process.state = ProcessState.GONE  # the host was started anew
        async with ferryman.connect(f"test:///{lab.name}/beta") as beta:
            refused = await beta.host.decide(performed.cookie)
            assert refused.kind is PaperKind.REFUSAL
            await alpha.host.confirm(refused.cookie)
    (violation,) = lab.violations
    assert "from an older memory" in violation


async def test_a_host_is_open_once(lab: World) -> None:
    async with ferryman.connect(f"test:///{lab.name}/alpha") as alpha:
        with pytest.raises(HostBusyError):
            async with ferryman.connect(f"test:///{lab.name}/alpha"):
                pass
        await start(alpha)
    assert running(lab) == ["alpha"]


@pytest.mark.parametrize("step_s", [-1e9, 1e9])
async def test_clock_steps_end_no_lease(lab: World, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    real, jumps = time.time, 0.0
    async with two_hosts(lab) as (alpha, beta):

        def jump() -> None:
            nonlocal jumps
            jumps += step_s
            monkeypatch.setattr(time, "time", lambda: real() + jumps)

        jump()
        prepared = await prepare(alpha, beta)
        jump()
        await anyio.sleep(0.05)  # time for a lease that had ended to be looked at
        performed = await perform(alpha, prepared)
        jump()
        await anyio.sleep(0.05)
        claimed = await beta.host.decide(performed.cookie)
        assert claimed.kind is PaperKind.CLAIM
        jump()
        assert (await alpha.host.confirm(claimed.cookie)).kind is PaperKind.GIVEN
        assert alpha.open_migrations() == beta.open_migrations() == []
    assert running(lab) == ["beta"]
    assert lab.violations == []


# A disk that fails while a guest is on its way


async def migrate_while_syncs_fail(directory: Path, record: str) -> None:
    """Migrate while no attempt to write a record reaches the disk, then open both hosts as new programs would."""
    fails = directory / "fails"
    real = Journal.write_now

    def write_now(self: Journal, row: MigrationRow) -> MigrationRow:
        if row.record.value != record:
            return real(self, row)
        fails.touch()
        try:
            return real(self, row)
        finally:
            fails.unlink()

    lab = world("failing")
    if record in ("refused", "kept"):
        lab.faults.at("beta.migrate_finish.before", Fault.FAIL)
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        with mock.patch.object(Journal, "write_now", write_now):
            try:
                await domain.migrate(beta, MigrationOptions(patience_s=0.5, lease_s=0.5))
                told = "success"
            except ferryman.FerrymanError as error:
                told = error.code
        print(told, running(lab), lab.violations)
    async with two_hosts(lab) as (alpha, beta):
        with anyio.fail_after(10):
            while alpha.open_migrations() or beta.open_migrations():
                await anyio.sleep(0.01)
    print(running(lab), lab.violations)
    forget_world("failing")


@pytest.mark.parametrize(
    ("record", "told", "then"),
    [
        ("begun", "begin-failed ['alpha'] []", "['alpha'] []"),
        ("prepared", "prepare-failed ['alpha'] []", "['alpha'] []"),
        ("handing", "perform-failed ['alpha'] []", "['alpha'] []"),
        ("claiming", "in-doubt [] []", "['alpha'] []"),
        ("claimed", "in-doubt ['beta'] []", "['beta'] []"),
        # The refusal was not told either, and at the second attempt the guest could be run.
        ("refused", "success ['beta'] []", "['beta'] []"),
        ("kept", "confirm-failed [] []", "['alpha'] []"),
        ("given", "confirm-failed ['beta'] []", "['beta'] []"),
    ],
)
def test_a_record_whose_sync_fails_misleads_nobody(
    failing_sync: Path, tmp_path: Path, record: str, told: str, then: str
) -> None:
    code = (
        "import sys, anyio; from pathlib import Path;"
        f" from {__name__} import migrate_while_syncs_fail as go; anyio.run(go, Path(sys.argv[1]), sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), record],
        env={**os.environ, "LD_PRELOAD": str(failing_sync), "SYNC_FAILS": str(tmp_path / "fails")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [told, then]
