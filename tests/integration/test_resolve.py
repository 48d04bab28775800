"""``resolve`` from every state of a journal: a verdict, or the missing evidence; and what a person may bring."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner, Result

import ferryman
import ferryman.resolve
from ferryman import Connection, MigrationOptions, Resolution
from ferryman.cli.commands import ferryman as command
from ferryman.engine import Host
from ferryman.errors import (
    ConnectError,
    HostBusyError,
    HypervisorError,
    JournalBehindError,
    JournalError,
    MigrationNotFoundError,
    OptionError,
)
from ferryman.handover import MigrationRow, PaperKind, Receipt, Record, decode_cookie, encode_cookie
from ferryman.hookspecs import EvidenceRequest, hookimpl
from ferryman.journal import Journal, read_journal
from ferryman.testing import Fault, World
from ferryman.testing.simulator import SimulatedDriver
from ferryman.testing.world import Process, ProcessState
from ferryman.types import DomainUUID, Evidence, GuestEvidence, Side, TransferEvidence
from tests.simulated import NAME, UUID, definition, receivers, start, two_hosts

OPTIONS = MigrationOptions(patience_s=5.0, lease_s=600.0)
LOST = ferryman.Testimony(who="Ann", lost=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryman.journal.LOCK_WAIT_S", 0.2)


@pytest.fixture
def away(lab: World, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of hosts that nobody can ask."""
    found: set[str] = set()
    real = ferryman.connection._peer_connection

    @asynccontextmanager
    async def reach(address: str) -> AsyncIterator[Connection]:
        if address.rpartition("/")[2] in found:
            raise ConnectError(f"{address} does not answer")
        async with real(address) as connection:
            yield connection

    monkeypatch.setattr(ferryman.connection, "_peer_connection", reach)
    return found


def open_host(lab: World, name: str) -> Connection:
    return ferryman.connect(f"test:///{lab.name}/{name}")


async def prove(lab: World, *, undefine: bool = False, pledged: bool = False, paused: bool = False) -> str:
    """Bring a migration from alpha to beta as far as the proof, and drop the program there; returns its id.

    :param pledged: beta has pledged itself before.
    """
    async with two_hosts(lab) as (alpha, beta):
        options = replace(OPTIONS, undefine_source=undefine)
        if undefine:
            await alpha.define(definition())
            domain = await alpha.lookup_by_name(NAME)
            await domain.start()
        else:
            domain = await start(alpha, paused=paused)
        await lab.elapse(0.1)
        info = await domain.info()
        begun = await alpha.host.begin(info, options)
        prepared = await beta.host.prepare(begun.cookie, info, begun.definition, options, paused=paused)
        performed = await alpha.host.perform(prepared.cookie, prepared.migration_uri, options, lambda _: None)
        assert performed.kind is PaperKind.PROOF
        if pledged:
            proof = decode_cookie(performed.cookie)
            switch = replace(proof, paper=replace(proof.paper, kind=PaperKind.SWITCH))
            assert (await beta.host.decide(encode_cookie(switch))).kind is PaperKind.PLEDGE
    assert lab.runners(DomainUUID(UUID)) == []
    return begun.id


def rows(lab: World, name: str) -> dict[str, MigrationRow]:
    """What a host's journal says, by migration."""
    return {row.migration_id: row for row in read_journal(lab.hosts[name].journal).rows}


def rewrite(lab: World, name: str, change: Callable[[MigrationRow], MigrationRow | None]) -> None:
    """Change the only row of a closed host's journal; None leaves a new journal without it."""
    path = lab.hosts[name].journal
    (row,) = read_journal(path).rows
    changed = change(row)
    if changed is None or (changed.side, changed.migration_id) != (row.side, row.migration_id):
        for suffix in ("", "-wal", "-shm", ".mark"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    with closing(Journal.open(path)) as journal:
        if changed is not None:
            journal.write_now(replace(changed, settled=False))


def say(record: Record) -> Callable[[MigrationRow], MigrationRow]:
    return lambda row: replace(row, record=record)


def guest(lab: World, name: str) -> Process:
    """The only process at a host."""
    (process,) = lab.hosts[name].processes.values()
    return process


def end_guests(lab: World, name: str) -> None:
    """A host loses its power: its processes are gone, its journal stays."""
    lab.hosts[name].processes.clear()
    lab.hosts[name].receivers.clear()


def running(lab: World) -> list[str]:
    assert lab.violations == []
    return lab.runners(DomainUUID(UUID))


async def settle(lab: World) -> None:
    """Open both hosts as new programs would, until nothing is in doubt; nothing is left behind."""
    async with two_hosts(lab) as (alpha, beta):
        with anyio.fail_after(10):
            while alpha.open_migrations() or beta.open_migrations():
                await anyio.sleep(0.01)
        assert await alpha.resolve() == await beta.resolve() == []
        assert alpha.in_doubt() == beta.in_doubt() == []
    assert receivers(lab) == []
    assert lab.violations == []
    assert len(lab.runners(DomainUUID(UUID))) <= 1


def assert_names_what_is_missing(found: Resolution, *, side: Side) -> None:
    """A person can act on it: domain, side, migration, the missing evidence and a remedy, on one line."""
    assert not found.settled
    assert found.missing
    assert found.remedy
    text = str(found)
    assert "\n" not in text
    for part in (NAME, side.value, found.migration_id, "in doubt", found.missing, found.remedy):
        assert part in text


def only_ask_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No questions in the background: cancelling one that opens the other host may stop the event loop for good.

    That is what :func:`test_a_cancelled_connection_ends` is about.
    """

    async def ask(_host: Host, _run: Any) -> None:
        return

    monkeypatch.setattr(Host, "_ask_until_answered", ask)


# The source gave the proof; what the destination's journal says

END = {
    # What beta's journal says: the record, the state of its process, then: the verdict at alpha, who runs.
    "prepared": (say(Record.PREPARED), None, Record.KEPT, ["alpha"]),
    "pledged": (say(Record.PLEDGED), None, Record.GIVEN, ["beta"]),
    "claiming": (say(Record.CLAIMING), None, Record.GIVEN, ["beta"]),
    "claiming-gone": (say(Record.CLAIMING), ProcessState.GONE, Record.GIVEN, []),
    "claimed": (say(Record.CLAIMED), ProcessState.RUNNING, Record.GIVEN, ["beta"]),
    "claimed-gone": (say(Record.CLAIMED), ProcessState.GONE, Record.GIVEN, []),
    "refused": (say(Record.REFUSED), None, Record.KEPT, ["alpha"]),
    "nothing": (lambda _: None, None, None, []),
    "other-generation": (lambda row: replace(row, generation=row.generation + 1), None, None, []),
    "another-receipt": (
        lambda row: replace(row, record=Record.REFUSED, receipt=Receipt(journal_id="0" * 32, sequence=1)),
        None,
        None,
        [],
    ),
    "never-prepared": (lambda row: replace(row, record=Record.NEVER_PREPARED, receipt=None), None, None, []),
}


def set_up(lab: World, case: str) -> tuple[Record | None, list[str]]:
    change, state, verdict, runs = END[case]
    rewrite(lab, "beta", change)
    if state is ProcessState.GONE:
        end_guests(lab, "beta")
    elif state is not None:
        lab.run(guest(lab, "beta"))
    return verdict, runs


def assert_verdict(found: list[Resolution], verdict: Record | None, *, side: Side = Side.SOURCE) -> None:
    (resolution,) = found
    if verdict is None:
        assert_names_what_is_missing(resolution, side=side)
    else:
        assert resolution.settled
        assert resolution.record is verdict
        assert resolution.verdict in str(resolution)
        assert (resolution.missing, resolution.remedy) == ("", "")


@pytest.mark.parametrize("case", END)
async def test_the_destination_is_asked(lab: World, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    id = await prove(lab)
    verdict, runs = set_up(lab, case)
    if verdict is None:
        only_ask_when_told(monkeypatch)
    async with open_host(lab, "alpha") as alpha:
        for _ in range(2):
            assert_verdict(await alpha.resolve(id), verdict)
        if verdict is None:
            assert "journal has lost" in str((await alpha.resolve())[0])
            assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
    assert running(lab) == runs
    if verdict is not None:
        await settle(lab)
        assert running(lab) == runs


@pytest.mark.parametrize("case", END)
async def test_the_destination_cannot_be_asked(lab: World, away: set[str], case: str) -> None:
    id = await prove(lab)
    verdict, runs = set_up(lab, case)
    before = running(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        for _ in range(2):
            (found,) = await alpha.resolve()
            assert_names_what_is_missing(found, side=Side.SOURCE)
            assert found.migration_id == id
            assert f"test:///{lab.name}/beta does not answer" in found.missing
            assert "destination's word" in found.missing
        assert alpha.in_doubt()[0].record is Record.HANDING
    assert running(lab) == before
    assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
    away.clear()
    if verdict is not None:
        await settle(lab)
        assert running(lab) == runs


@pytest.mark.parametrize("case", END)
async def test_the_destinations_journal_is_brought(lab: World, away: set[str], case: str) -> None:
    """Its rules decide with no guest there any more, and it abides by that when it comes back."""
    id = await prove(lab)
    verdict, _ = set_up(lab, case)
    end_guests(lab, "beta")
    if case == "pledged":
        verdict = Record.KEPT  # it never ran: ``claiming`` is written before
    before = rows(lab, "beta")
    away.add("beta")
    brought = ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)
    async with open_host(lab, "alpha") as alpha:
        for _ in range(2):
            assert_verdict(await alpha.resolve(id, brought), verdict)
            if verdict is None:
                assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
    assert running(lab) == (["alpha"] if verdict is Record.KEPT else [])
    assert rows(lab, "alpha")[id].record is (verdict or Record.HANDING)
    if verdict is None:
        assert rows(lab, "beta") == before
        return
    note = rows(lab, "alpha")[id].testimony
    assert note.startswith("Ann, 20")
    assert f"the journal {lab.hosts['beta'].journal}" in note
    there = rows(lab, "beta")[id]
    assert there.record is (Record.REFUSED if verdict is Record.KEPT else Record.CLAIMED)
    assert there.testimony == (note if not before[id].record.decided else "")
    away.clear()
    await settle(lab)
    assert running(lab) == (["alpha"] if verdict is Record.KEPT else [])


@pytest.mark.parametrize("case", END)
async def test_the_destination_is_lost(lab: World, away: set[str], case: str) -> None:
    id = await prove(lab)
    set_up(lab, case)
    end_guests(lab, "beta")
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        for who in ("Ann", "Bob"):
            (found,) = await alpha.resolve(id, ferryman.Testimony(who=who, lost=True))
            assert found.settled
            assert found.record is Record.GIVEN
        assert found.testimony.startswith("Ann, 20")
        assert "the other host and the guest on it are lost" in str(found)
        assert await alpha.list_domains() == []
    assert rows(lab, "alpha")[id].testimony == found.testimony
    assert running(lab) == []
    assert lab.hosts["alpha"].processes == {}


@pytest.mark.parametrize("case", ["prepared", "pledged", "claiming", "claimed", "refused"])
async def test_a_lie_the_destination_was_not_lost(lab: World, away: set[str], case: str) -> None:
    """It comes back, its guest there as it was: still never two, never an older memory."""
    id = await prove(lab)
    set_up(lab, case)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        assert_verdict(await alpha.resolve(id, LOST), Record.GIVEN)
    away.clear()
    await settle(lab)
    assert running(lab) == (["beta"] if case in ("claiming", "claimed") else [])
    assert rows(lab, "alpha")[id].record is Record.GIVEN
    if case in ("claiming", "claimed"):
        async with two_hosts(lab) as (alpha, beta):
            await (await beta.lookup_by_name(NAME)).migrate(alpha)
        assert running(lab) == ["alpha"]


async def test_a_lie_the_destinations_guest_had_not_ended(lab: World, away: set[str]) -> None:
    """Its journal was brought while the receiver waited: it is refused there, and a late proof gets the refusal."""
    id = await prove(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        journal = lab.hosts["beta"].journal
        assert_verdict(await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=journal)), Record.KEPT)
        assert running(lab) == ["alpha"]
        row = rows(lab, "alpha")[id]
        assert rows(lab, "beta")[id].record is Record.REFUSED
        assert guest(lab, "beta").state is ProcessState.PAUSED
        async with open_host(lab, "beta") as beta:
            assert beta.open_migrations() == []
            assert lab.hosts["beta"].processes == {}
            proof = ferryman.handover.Cookie(paper=row.paper(PaperKind.PROOF))
            assert (await beta.host.decide(encode_cookie(proof))).kind is PaperKind.REFUSAL
    assert running(lab) == ["alpha"]


async def test_the_definition_stays_when_the_destination_is_lost(lab: World, away: set[str]) -> None:
    id = await prove(lab, undefine=True)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        assert_verdict(await alpha.resolve(id, LOST), Record.GIVEN)
        (domain,) = await alpha.list_domains()
        info = await domain.info()
        assert info.persistent
        assert info.state is ferryman.DomainState.SHUT_OFF
        await domain.start()  # a new life, from its disk
    async with open_host(lab, "alpha") as alpha:
        assert [domain.name for domain in await alpha.list_domains()] == [NAME]


async def test_the_definition_goes_when_the_destination_claimed(lab: World) -> None:
    """What the test above would miss."""
    id = await prove(lab, undefine=True)
    rewrite(lab, "beta", say(Record.CLAIMING))
    async with open_host(lab, "alpha") as alpha:
        assert_verdict(await alpha.resolve(id), Record.GIVEN)
        assert await alpha.list_domains() == []


# A source whose process is gone, or of which its hypervisor says nothing


@pytest.mark.parametrize("how", ["asked", "journal", "lost", "away"])
@pytest.mark.parametrize("case", ["prepared", "claimed"])
async def test_the_sources_guest_is_gone(lab: World, away: set[str], case: str, how: str) -> None:
    id = await prove(lab)
    set_up(lab, case)
    end_guests(lab, "alpha")
    if how == "journal":
        end_guests(lab, "beta")
    if how != "asked":
        away.add("beta")
    testimony = {
        "journal": ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal),
        "lost": LOST,
    }.get(how)
    verdict = Record.KEPT if case == "prepared" else Record.GIVEN
    if how == "lost":
        verdict = Record.GIVEN
    async with open_host(lab, "alpha") as alpha:
        assert_verdict(await alpha.resolve(id, testimony), None if how == "away" else verdict)
    away.clear()
    await settle(lab)
    assert running(lab) == (["beta"] if case == "claimed" and how != "journal" else [])


def quiet(monkeypatch: pytest.MonkeyPatch, *answers: Evidence | Exception, host: str = "") -> None:
    """Let a hypervisor give these words on a guest, the last one for ever.

    :param host: only there; '' is everywhere.
    """
    left = list(answers)
    real = Host._evidence

    async def evidence(self: Host, run: Any) -> Evidence:
        if host and not self.address.endswith(f"/{host}"):
            return await real(self, run)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(Host, "_evidence", evidence)


NOTHING = Evidence(guest=GuestEvidence.UNKNOWN, transfer=TransferEvidence.UNKNOWN)


async def test_the_sources_hypervisor_says_nothing(
    lab: World, away: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await prove(lab)
    away.add("beta")
    quiet(monkeypatch, NOTHING, host="alpha")
    async with open_host(lab, "alpha") as alpha:
        (found,) = await alpha.resolve(id)
        assert_names_what_is_missing(found, side=Side.SOURCE)
        assert "the hypervisor's word, or the destination's word" in found.missing
        end_guests(lab, "beta")
        brought = ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)
        assert_verdict(await alpha.resolve(id, brought), Record.KEPT)
    assert running(lab) == ["alpha"]


async def test_the_sources_hypervisor_fails(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is settled, evidence is not used, and what is missing names the failure."""
    id = await prove(lab)
    quiet(monkeypatch, HypervisorError("the monitor does not answer"), host="alpha")
    async with open_host(lab, "alpha") as alpha:
        for testimony in (None, LOST, ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)):
            (found,) = await alpha.resolve(id, testimony)
            assert_names_what_is_missing(found, side=Side.SOURCE)
            assert "the monitor does not answer" in str(found)
            assert "the hypervisor's word" in found.missing
        assert rows(lab, "beta")[id].record is Record.PREPARED
        assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
    monkeypatch.undo()
    await settle(lab)
    assert running(lab) == ["alpha"]


async def test_the_sources_hypervisor_hangs(
    lab: World, away: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait ends by itself, this one with what is missing."""
    id = await prove(lab)
    away.add("beta")
    only_ask_when_told(monkeypatch)
    answers, hang_over = anyio.Event(), anyio.Event()
    hangs = False

    @hookimpl
    async def migrate_evidence(_driver: SimulatedDriver, request: EvidenceRequest) -> Evidence:
        if hangs:
            await hang_over.wait()
        return NOTHING

    monkeypatch.setattr(SimulatedDriver, "migrate_evidence", migrate_evidence)
    async with open_host(lab, "alpha") as alpha:
        assert isinstance(alpha.host, Host)
        (run,) = alpha.host._runs.values()
        run.options = replace(OPTIONS, patience_s=0.2)
        hangs = True

        async def resolve() -> None:
            assert_names_what_is_missing((await alpha.resolve(id))[0], side=Side.SOURCE)
            answers.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resolve)
            with anyio.move_on_after(2):
                await answers.wait()
            in_time = answers.is_set()
            hang_over.set()
    assert in_time


async def test_a_row_that_nobody_holds_is_not_settled(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its write failed, as far as the program could see, and it is there: settled only by the next opening."""
    real = Journal.write_now

    def write_now(self: Journal, row: MigrationRow) -> MigrationRow:
        written = real(self, row)
        if row.record is Record.PREPARED:
            raise JournalError("the disk does not answer")
        return written

    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        monkeypatch.setattr(Journal, "write_now", write_now)
        with pytest.raises(ferryman.errors.MigrationError):
            await domain.migrate(beta)
        assert isinstance(beta.host, Host)
        (row,) = beta.host._journal.open_rows()
        assert row.record is Record.PREPARED
        (found,) = await beta.resolve(row.migration_id)
        assert found.verdict or not found.settled


# The destination pledged itself; what the source's journal says

PLEDGED = {
    # What alpha's journal says, whether its guest is gone; then the verdict at beta when alpha is asked, and by the
    # journal, and who runs when alpha was asked.
    "handing": (say(Record.HANDING), False, Record.CLAIMED, Record.REFUSED, ["beta"]),
    "handing-gone": (say(Record.HANDING), True, Record.REFUSED, Record.REFUSED, []),
    "begun": (
        lambda row: replace(row, record=Record.BEGUN, receipt=None),
        True,
        Record.REFUSED,
        Record.REFUSED,
        [],
    ),
    "kept": (say(Record.KEPT), False, Record.REFUSED, Record.REFUSED, ["alpha"]),
    "given": (say(Record.GIVEN), False, Record.REFUSED, Record.REFUSED, []),
    "nothing": (lambda _: None, True, None, None, []),
    "other-generation": (lambda row: replace(row, generation=row.generation + 1), True, None, None, []),
    "another-receipt": (
        lambda row: replace(row, record=Record.KEPT, receipt=Receipt(journal_id="0" * 32, sequence=1)),
        True,
        None,
        None,
        [],
    ),
}


def set_up_source(lab: World, case: str) -> None:
    change, gone, *_ = PLEDGED[case]
    rewrite(lab, "alpha", change)
    if gone:
        end_guests(lab, "alpha")


@pytest.mark.parametrize("case", PLEDGED)
async def test_the_source_is_asked(lab: World, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    id = await prove(lab, pledged=True)
    set_up_source(lab, case)
    verdict, runs = PLEDGED[case][2], PLEDGED[case][4]
    if verdict is None:
        only_ask_when_told(monkeypatch)
    async with open_host(lab, "beta") as beta:
        for _ in range(2):
            with anyio.fail_after(5):
                while True:  # the source may still be settling it with a question of its own
                    found = await beta.resolve(id)
                    if found[0].settled or verdict is None:
                        break
            assert_verdict(found, verdict, side=Side.DESTINATION)
    assert running(lab) == runs
    if verdict is not None:
        await settle(lab)
        assert running(lab) == runs


@pytest.mark.parametrize("case", PLEDGED)
async def test_the_source_cannot_be_asked(lab: World, away: set[str], case: str) -> None:
    id = await prove(lab, pledged=True)
    set_up_source(lab, case)
    away.add("alpha")
    async with open_host(lab, "beta") as beta:
        (found,) = await beta.resolve(id)
        assert_names_what_is_missing(found, side=Side.DESTINATION)
        assert f"the source's word, from test:///{lab.name}/alpha" in found.missing
        assert found.record is Record.PLEDGED
    assert running(lab) == []


@pytest.mark.parametrize("case", PLEDGED)
async def test_the_sources_journal_is_brought(lab: World, away: set[str], case: str) -> None:
    id = await prove(lab, pledged=True)
    set_up_source(lab, case)
    end_guests(lab, "alpha")
    verdict = PLEDGED[case][3]
    away.add("alpha")
    brought = ferryman.Testimony(who="Ann", journal=lab.hosts["alpha"].journal)
    async with open_host(lab, "beta") as beta:
        for _ in range(2):
            assert_verdict(await beta.resolve(id, brought), verdict, side=Side.DESTINATION)
    assert running(lab) == []
    if verdict is None:
        return
    assert rows(lab, "beta")[id].testimony.startswith("Ann, 20")
    away.clear()
    await settle(lab)
    assert running(lab) == []


@pytest.mark.parametrize("case", PLEDGED)
async def test_the_source_is_lost(lab: World, away: set[str], case: str) -> None:
    """Also where that was a lie and it comes back: what the destination refused never runs there."""
    id = await prove(lab, pledged=True)
    set_up_source(lab, case)
    away.add("alpha")
    async with open_host(lab, "beta") as beta:
        (found,) = await beta.resolve(id, LOST)
        assert_verdict([found], Record.REFUSED, side=Side.DESTINATION)
        assert found.testimony.startswith("Ann, 20")
    assert lab.hosts["beta"].processes == {}
    assert rows(lab, "beta")[id].testimony == found.testimony
    away.clear()
    if PLEDGED[case][2] is not None:
        await settle(lab)
    assert running(lab) == (["alpha"] if case in ("handing", "kept") else [])


# Journals that cannot be used


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)


def age(path: Path) -> None:
    """Put the mark ahead of the journal."""
    mark = path.with_name(path.name + ".mark")
    with closing(Journal.open(path)) as journal:
        row = journal.open_rows()[0]
        journal.close()
        older = path.read_bytes()
        with closing(Journal.open(path)) as again:
            again.write_now(row)
        newer = mark.read_bytes()
    path.write_bytes(older)
    Path(f"{path}-wal").unlink(missing_ok=True)
    mark.write_bytes(newer)


UNUSABLE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "damaged": (damage, JournalError, "damaged|cannot be read"),
    "behind": (age, JournalBehindError, "an older copy"),
    "unmarked": (lambda path: Path(f"{path}.mark").unlink(), JournalError, "bring the mark too"),
    "empty": (lambda path: path.write_bytes(b""), JournalError, "no journal"),
    "text": (lambda path: path.write_text("not a database at all\n" * 99), JournalError, "not a database"),
    "missing": (lambda path: path.unlink(), JournalError, "cannot be read"),
    "newer": (lambda path: _newer(path), JournalError, "newer than this Ferryman"),
}


def _newer(path: Path) -> None:
    import sqlite3

    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version=99")


@pytest.mark.parametrize("pledged", [False, True], ids=["of-destination", "of-source"])
@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_journal_that_cannot_be_used(lab: World, away: set[str], case: str, pledged: bool) -> None:
    id = await prove(lab, pledged=pledged)
    here, there = ("beta", "alpha") if pledged else ("alpha", "beta")
    if pledged:
        rewrite(lab, "alpha", lambda row: replace(row, record=Record.BEGUN, receipt=None))
    end_guests(lab, there)
    spoil, error, said = UNUSABLE[case]
    spoil(lab.hosts[there].journal)
    away.add(there)
    async with open_host(lab, here) as opened:
        for _ in range(2):
            with pytest.raises(error, match=said) as caught:
                await opened.resolve(id, ferryman.Testimony(who="Ann", journal=lab.hosts[there].journal))
            assert str(lab.hosts[there].journal) in str(caught.value)
        (found,) = await opened.resolve(id)
        assert not found.settled
        assert found.testimony == ""
    assert running(lab) == []


async def test_a_decision_needs_no_mark(lab: World, away: set[str]) -> None:
    """What is decided stays so in every later journal."""
    id = await prove(lab)
    rewrite(lab, "beta", say(Record.REFUSED))
    Path(f"{lab.hosts['beta'].journal}.mark").unlink()
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        brought = ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)
        assert_verdict(await alpha.resolve(id, brought), Record.KEPT)
    assert running(lab) == ["alpha"]


async def test_a_journal_in_use(lab: World, away: set[str]) -> None:
    """Of a destination that has not decided, and whose program may decide at any moment."""
    id = await prove(lab, pledged=True)
    away.update(("alpha", "beta"))
    async with open_host(lab, "beta"), open_host(lab, "alpha") as alpha:
        with pytest.raises(HostBusyError, match="open in another program"):
            await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal))
        assert alpha.in_doubt()[0].testimony == ""
    assert rows(lab, "beta")[id].record is Record.PLEDGED


async def test_a_sources_journal_in_use(lab: World, away: set[str]) -> None:
    """Its program may still give the proof: no answer may be had behind its back."""
    id = await prove(lab, pledged=True)
    away.update(("alpha", "beta"))
    async with open_host(lab, "alpha"), open_host(lab, "beta") as beta:
        with pytest.raises(HostBusyError, match="open in another program"):
            await beta.resolve(id, ferryman.Testimony(who="Ann", journal=lab.hosts["alpha"].journal))
        assert beta.in_doubt()[0].record is Record.PLEDGED
    away.clear()
    await settle(lab)
    assert running(lab) == ["beta"]


@pytest.mark.parametrize("told", [Record.CLAIMED, Record.REFUSED])
async def test_a_journal_that_is_decided_while_it_is_read(
    lab: World, away: set[str], monkeypatch: pytest.MonkeyPatch, told: Record
) -> None:
    """Its program ends after it was read and before it is written: what that has decided stands."""
    id = await prove(lab)
    away.add("beta")
    real = ferryman.journal.read_journal
    ran: list[str] = []

    def read(path: Path) -> Any:
        contents = real(path)
        if not ran:
            ran.append("once")
            rewrite(lab, "beta", say(told))
            if told is Record.CLAIMED:
                lab.run(guest(lab, "beta"))
        return contents

    monkeypatch.setattr(ferryman.journal, "read_journal", read)
    async with open_host(lab, "alpha") as alpha:
        brought = ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)
        with suppress(JournalError):
            await alpha.resolve(id, brought)
        found = await alpha.resolve(id, brought)
        assert_verdict(found, Record.GIVEN if told is Record.CLAIMED else Record.KEPT)
    assert rows(lab, "beta")[id].record is told
    assert running(lab) == (["beta"] if told is Record.CLAIMED else ["alpha"])


async def test_ones_own_journal_is_no_evidence(lab: World, away: set[str]) -> None:
    id = await prove(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        (found,) = await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=lab.hosts["alpha"].journal))
        assert_names_what_is_missing(found, side=Side.SOURCE)
    assert running(lab) == []


async def test_a_copy_of_the_journal(lab: World, away: set[str], tmp_path: Path) -> None:
    """The host itself never sees the decision, and comes to the same by its own rules."""
    id = await prove(lab)
    for suffix in ("", "-wal", ".mark"):
        with suppress(FileNotFoundError):
            shutil.copy(f"{lab.hosts['beta'].journal}{suffix}", tmp_path / f"copy{suffix}")
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        brought = ferryman.Testimony(who="Ann", journal=tmp_path / "copy")
        assert_verdict(await alpha.resolve(id, brought), Record.KEPT)
    assert rows(lab, "beta")[id].record is Record.PREPARED
    away.clear()
    await settle(lab)
    assert rows(lab, "beta")[id].record is Record.REFUSED
    assert running(lab) == ["alpha"]


# Sides that decide alone: evidence changes nothing

ALONE = [
    (Side.SOURCE, Record.BEGUN, ["alpha"]),
    (Side.SOURCE, Record.KEPT, ["alpha"]),
    (Side.SOURCE, Record.GIVEN, []),
    (Side.DESTINATION, Record.PREPARED, ["alpha"]),
    (Side.DESTINATION, Record.CLAIMING, ["beta"]),
    (Side.DESTINATION, Record.CLAIMED, ["beta"]),
    (Side.DESTINATION, Record.REFUSED, ["alpha"]),
    (Side.DESTINATION, Record.NEVER_PREPARED, []),
]


@pytest.mark.parametrize("brings", ["nothing", "lost", "journal"])
@pytest.mark.parametrize(("side", "record", "runs"), ALONE, ids=str)
async def test_a_side_that_decides_alone(
    lab: World, away: set[str], side: Side, record: Record, runs: list[str], brings: str
) -> None:
    id = await prove(lab)
    here, there = ("alpha", "beta") if side is Side.SOURCE else ("beta", "alpha")
    receipt = None if record in (Record.BEGUN, Record.NEVER_PREPARED) else True
    rewrite(lab, here, lambda row: replace(row, record=record, receipt=row.receipt if receipt else None))
    if record is Record.BEGUN:  # its transfer was never begun
        guest(lab, "alpha").transfer = "none"
        lab.run(guest(lab, "alpha"))
    if record is Record.CLAIMED:
        lab.run(guest(lab, "beta"))
    before = rows(lab, there)
    away.update(("alpha", "beta"))
    testimony = {
        "lost": LOST,
        "journal": ferryman.Testimony(who="Ann", journal=lab.hosts[there].journal),
    }.get(brings)
    async with open_host(lab, here) as opened:
        (found,) = await opened.resolve(id, testimony)
        assert found.settled
        assert found.verdict
        assert found.testimony == ""
        assert await opened.resolve(None, testimony) == []
    assert rows(lab, there) == before
    assert rows(lab, here)[id].testimony == ""
    away.clear()
    if record not in (Record.NEVER_PREPARED, Record.GIVEN):
        await settle(lab)
        assert running(lab) == runs


@pytest.mark.parametrize("testimony", [None, LOST], ids=["nothing", "lost"])
async def test_a_claim_whose_hypervisor_says_nothing(
    lab: World, monkeypatch: pytest.MonkeyPatch, testimony: ferryman.Testimony | None
) -> None:
    """That the source is lost says nothing about the guest here."""
    id = await prove(lab)
    rewrite(lab, "beta", say(Record.CLAIMING))
    quiet(monkeypatch, NOTHING, host="beta")
    async with open_host(lab, "beta") as beta:
        (found,) = await beta.resolve(id, testimony)
        assert_names_what_is_missing(found, side=Side.DESTINATION)
        assert "the hypervisor's word on process beta-" in found.missing
    assert guest(lab, "beta").state is ProcessState.PAUSED
    monkeypatch.undo()
    await settle(lab)
    assert running(lab) == ["beta"]


@pytest.mark.parametrize("side", Side, ids=str)
async def test_nobody_drives_what_was_recovered(
    lab: World, monkeypatch: pytest.MonkeyPatch, side: Side
) -> None:
    """``begun`` or ``prepared`` after a restart whose hypervisor says nothing, and then says something."""
    id = await prove(lab)
    here = "alpha" if side is Side.SOURCE else "beta"
    if side is Side.SOURCE:
        rewrite(lab, "alpha", lambda row: replace(row, record=Record.BEGUN, receipt=None))
        guest(lab, "alpha").transfer = "none"
        lab.run(guest(lab, "alpha"))
    quiet(monkeypatch, NOTHING, host=here)
    async with open_host(lab, here) as opened:
        (found,) = await opened.resolve(id)
        assert "under way" not in str(found)
        assert "the hypervisor's word" in found.missing
        monkeypatch.undo()
        assert_verdict(
            await opened.resolve(id), Record.KEPT if side is Side.SOURCE else Record.REFUSED, side=side
        )


async def test_what_answers_is_not_lost(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination says that it is claiming; its claim may still fail, and then the guest belongs to the source."""
    id = await prove(lab)
    rewrite(lab, "beta", say(Record.CLAIMING))
    quiet(monkeypatch, NOTHING, host="beta")
    only_ask_when_told(monkeypatch)
    async with two_hosts(lab) as (alpha, beta):
        (found,) = await alpha.resolve(id, LOST)
        assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
        assert_names_what_is_missing(found, side=Side.SOURCE)
        assert "has not decided yet" in found.missing
        assert beta.open_migrations()


async def test_a_silent_source_that_runs_is_not_destroyed(
    lab: World, away: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transfer failed and it runs on; its hypervisor does not say so just now."""
    id = await prove(lab)
    end_guests(lab, "beta")
    away.add("beta")
    guest(lab, "alpha").transfer = "failed"
    lab.run(guest(lab, "alpha"))
    quiet(monkeypatch, NOTHING, host="alpha")
    async with open_host(lab, "alpha") as alpha:
        await alpha.resolve(id, LOST)
    assert running(lab) == ["alpha"]


# Several, unknown, under way


async def prove_two(lab: World) -> list[str]:
    """Two guests whose source gave the proof; the programs are dropped there."""
    ids: list[str] = []
    async with two_hosts(lab) as (alpha, beta):
        for number in range(2):
            uuid = f"00000000-0000-4000-8000-{number:012}"
            info = await (await alpha.create(definition(f"g{number}", uuid))).info()
            begun = await alpha.host.begin(info, OPTIONS)
            prepared = await beta.host.prepare(begun.cookie, info, begun.definition, OPTIONS, paused=False)
            await alpha.host.perform(prepared.cookie, prepared.migration_uri, OPTIONS, lambda _: None)
            ids.append(begun.id)
    return ids


async def test_evidence_for_several(lab: World, away: set[str]) -> None:
    first, second = await prove_two(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        assert [found.migration_id for found in alpha.in_doubt()] == [first, second]
        for testimony in (LOST, ferryman.Testimony(who="Ann", journal=lab.hosts["beta"].journal)):
            with pytest.raises(OptionError, match="2 migrations are open here: say which one") as caught:
                await alpha.resolve(None, testimony)
            assert caught.value.option == "migration"
        assert {row.record for row in rows(lab, "alpha").values()} == {Record.HANDING}
        assert {row.record for row in rows(lab, "beta").values()} == {Record.PREPARED}
        assert len(lab.hosts["alpha"].processes) == 2
        assert_verdict(await alpha.resolve(second, LOST), Record.GIVEN)
        assert [found.migration_id for found in alpha.in_doubt()] == [first]
        assert [process.name for process in lab.hosts["alpha"].processes.values()] == ["g0"]
        assert rows(lab, "alpha")[first].testimony == ""
        # The other one is the only one now.
        assert_verdict(await alpha.resolve(None, LOST), Record.GIVEN)
    assert lab.violations == []


async def test_all_are_settled_at_once(lab: World) -> None:
    ids = await prove_two(lab)
    async with open_host(lab, "alpha") as alpha:
        found = await alpha.resolve()
        # Those that the opening has settled by itself are no longer listed.
        assert {resolution.record for resolution in found} <= {Record.KEPT}
        assert all(resolution.settled for resolution in found)
        assert alpha.in_doubt() == []
        for id in ids:
            assert_verdict(await alpha.resolve(id), Record.KEPT)
    assert lab.violations == []


@pytest.mark.parametrize("id", ["0" * 32, "nonsense", "\ud800", "x" * 100_000])
@pytest.mark.parametrize("testimony", [None, LOST], ids=["nothing", "lost"])
async def test_an_unknown_migration(
    lab: World, away: set[str], id: str, testimony: ferryman.Testimony | None
) -> None:
    await prove(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        with pytest.raises(ferryman.FerrymanError):
            await alpha.resolve(id, testimony)
        assert len(alpha.in_doubt()) == 1
        assert guest(lab, "alpha").state is ProcessState.HANDED_OVER


async def test_an_empty_id_is_not_every_migration(lab: World, away: set[str]) -> None:
    """A script whose variable is unset must not destroy the only copy that is open."""
    await prove(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        with pytest.raises(MigrationNotFoundError):
            await alpha.resolve("", LOST)
        assert guest(lab, "alpha").state is ProcessState.HANDED_OVER


async def test_nothing_is_open(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        for testimony in (None, LOST):
            assert await alpha.resolve(None, testimony) == []
        result = await (await start(alpha)).migrate(beta)
        assert result.uuid == UUID
        assert alpha.in_doubt() == beta.in_doubt() == []
        (id,) = rows(lab, "alpha")
        for end, record in ((alpha, Record.GIVEN), (beta, Record.CLAIMED)):
            (found,) = await end.resolve(id, LOST)
            assert found.settled
            assert found.record is record
            assert found.testimony == ""
    assert running(lab) == ["beta"]


@pytest.mark.parametrize("brings", ["nothing", "lost", "journal"])
@pytest.mark.parametrize(
    "point",
    ["beta.migrate_prepare.before", "alpha.migrate_perform.iteration", "alpha.migrate_perform.stopped"],
)
async def test_what_is_under_way_is_left_alone(lab: World, point: str, brings: str) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        lab.faults.at(point, Fault.HANG)
        journals = {alpha: lab.hosts["beta"].journal, beta: lab.hosts["alpha"].journal}
        with pytest.raises(ferryman.errors.MigrationAbortedError):
            async with domain.migrate(beta) as job:
                with anyio.fail_after(10):
                    while not lab.faults.struck:
                        await anyio.sleep(0)
                for end, journal in journals.items():
                    testimony = {
                        "lost": LOST,
                        "journal": ferryman.Testimony(who="Ann", journal=journal),
                    }.get(brings)
                    (found,) = await end.resolve(None, testimony)
                    assert not found.settled
                    assert found.missing == "nothing: it is under way"
                    assert "abort it" in found.remedy
                    assert end.in_doubt() == [found]
                job.abort()
        assert running(lab) == ["alpha"]
        assert {row.testimony for name in lab.hosts for row in rows(lab, name).values()} == {""}


async def test_resolved_at_every_moment_of_a_migration(lab: World) -> None:
    """Both ends are resolved all the time, and it goes on as if nobody had."""
    async with two_hosts(lab) as (alpha, beta):
        await start(alpha)
        turns = 0

        async def disturb(end: Connection) -> None:
            nonlocal turns
            while True:
                await end.resolve()
                end.in_doubt()
                turns += 1
                await anyio.sleep(0)

        async with anyio.create_task_group() as tasks:
            for end in (alpha, beta):
                tasks.start_soon(disturb, end)
            for here, there in ((alpha, beta), (beta, alpha)) * 3:
                await (await here.lookup_by_name(NAME)).migrate(there)
                assert running(lab) == ["beta" if there is beta else "alpha"]
            tasks.cancel_scope.cancel()
        assert turns > 10
        assert alpha.open_migrations() == beta.open_migrations() == []
    assert receivers(lab) == []


# Twice, and from several places at once


@pytest.mark.parametrize("brings", ["nothing", "lost", "journal"])
@pytest.mark.parametrize("case", ["prepared", "claiming", "claimed-gone"])
async def test_two_at_once_in_one_program(lab: World, away: set[str], case: str, brings: str) -> None:
    id = await prove(lab)
    set_up(lab, case)
    if brings != "nothing":
        away.add("beta")
        end_guests(lab, "beta")
    journal = lab.hosts["beta"].journal
    found: list[Resolution] = []
    async with open_host(lab, "alpha") as alpha:

        async def go(who: str) -> None:
            testimony = {
                "lost": ferryman.Testimony(who=who, lost=True),
                "journal": ferryman.Testimony(who=who, journal=journal),
            }.get(brings)
            found.extend(await alpha.resolve(id, testimony))

        async with anyio.create_task_group() as tasks:
            for who in ("Ann", "Bob", "Cy"):
                tasks.start_soon(go, who)
        assert len(found) == 3
        assert all(resolution.settled for resolution in found), [str(r) for r in found]
        assert len({resolution.record for resolution in found}) == 1
    kept = brings != "lost" and case == "prepared"
    assert rows(lab, "alpha")[id].record is (Record.KEPT if kept else Record.GIVEN)
    away.clear()
    await settle(lab)
    assert running(lab) == (
        ["alpha"] if kept else ["beta"] if (case, brings) == ("claiming", "nothing") else []
    )


@pytest.mark.parametrize("case", ["prepared", "pledged", "claiming", "claimed"])
async def test_both_ends_at_once(lab: World, case: str) -> None:
    id = await prove(lab)
    _verdict, runs = set_up(lab, case)
    async with two_hosts(lab) as (alpha, beta):
        for _ in range(2):
            async with anyio.create_task_group() as tasks:
                for end in (alpha, beta, alpha, beta):
                    tasks.start_soon(end.resolve, id)
        for end in (alpha, beta):
            (found,) = await end.resolve(id)
            assert found.settled, str(found)
    assert running(lab) == runs
    await settle(lab)


@pytest.mark.parametrize("case", ["handing", "claiming"])
async def test_both_ends_are_told_that_the_other_is_lost(lab: World, away: set[str], case: str) -> None:
    """The worst lie: both were there. The guest may be lost; it does not run twice, nor from an older memory."""
    id = await prove(lab, pledged=True)
    if case == "claiming":
        rewrite(lab, "beta", say(Record.CLAIMING))
    away.update(("alpha", "beta"))
    async with two_hosts(lab) as (alpha, beta):
        async with anyio.create_task_group() as tasks:
            for end in (alpha, beta):
                tasks.start_soon(end.resolve, id, LOST)
        assert alpha.open_migrations() == beta.open_migrations() == []
    away.clear()
    await settle(lab)
    assert running(lab) == (["beta"] if case == "claiming" else [])


async def test_both_bring_the_others_journal(lab: World, away: set[str]) -> None:
    """Whose journal is in use is not read: neither gets anything behind the other's back."""
    id = await prove(lab, pledged=True)
    away.update(("alpha", "beta"))
    errors: list[BaseException] = []
    async with two_hosts(lab) as (alpha, beta):

        async def go(end: Connection, other: str) -> None:
            try:
                await end.resolve(id, ferryman.Testimony(who="Ann", journal=lab.hosts[other].journal))
            except HostBusyError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(go, alpha, "beta")
            tasks.start_soon(go, beta, "alpha")
    assert len(errors) == 2
    away.clear()
    await settle(lab)
    assert running(lab) == ["beta"]


@pytest.mark.parametrize("round", range(10))
async def test_asking_beside_the_question_that_opening_asks(lab: World, round: int) -> None:
    """The other end is opened for both questions, and let go of by one while the other still uses it."""
    id = await prove(lab, paused=bool(round % 2))
    async with open_host(lab, "alpha") as alpha:
        for _ in range(round // 2):
            await anyio.sleep(0)
        assert_verdict(await alpha.resolve(id), Record.KEPT)
    await settle(lab)


def has_cycle(error: BaseException | None) -> bool:
    """Whether an error is among its own contexts: anyio's task groups on asyncio then look through them for ever."""
    seen: list[BaseException] = []
    while error is not None:
        if any(error is other for other in seen):
            return True
        seen.append(error)
        error = error.__context__
    return False


@pytest.mark.parametrize("moment", ["opening", "open"])
def test_a_cancelled_connection_ends(lab: World, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Cancelled with a connection in a task of its own, as the background's questions are when a host is closed."""
    cycles: list[bool] = []
    real = Host.recover

    async def use(here: anyio.Event) -> None:
        async def recover(self: Host) -> None:
            await real(self)
            if moment == "opening":
                here.set()
                await anyio.sleep_forever()

        monkeypatch.setattr(Host, "recover", recover)
        try:
            async with open_host(lab, "alpha"):
                here.set()
                await anyio.sleep_forever()
        except BaseException as error:
            cycles.append(has_cycle(error))
            error.__context__ = None  # or this test would never end
            raise

    async def cancel() -> None:
        async with anyio.create_task_group() as tasks:
            here = anyio.Event()
            tasks.start_soon(use, here)
            await here.wait()
            tasks.cancel_scope.cancel()

    anyio.run(cancel)
    assert cycles == [False]


@pytest.mark.parametrize("after", range(0, 40, 3))
async def test_cancelled_at_any_moment(lab: World, after: int) -> None:
    """What was decided stays; the next one goes on from there."""
    id = await prove(lab)
    end_guests(lab, "beta")
    async with open_host(lab, "alpha") as alpha:
        journal = lab.hosts["beta"].journal
        with anyio.move_on_after(after / 1000):
            await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=journal))
        assert_verdict(await alpha.resolve(id), Record.KEPT)
    await settle(lab)
    assert running(lab) == ["alpha"]


@pytest.mark.parametrize("point", ["before", "after"])
@pytest.mark.parametrize("brings", ["nothing", "lost", "journal"])
async def test_the_decision_stands_and_its_actions_fail(
    lab: World, away: set[str], point: str, brings: str
) -> None:
    """It says so, with the driver's words, and is tried again."""
    id = await prove(lab)
    end_guests(lab, "beta")
    journal = lab.hosts["beta"].journal
    if brings != "nothing":
        away.add("beta")
    lab.faults.at(f"alpha.migrate_confirm.{point}", Fault.FAIL, times=1000)
    testimony = {"lost": LOST, "journal": ferryman.Testimony(who="Ann", journal=journal)}.get(brings)
    async with open_host(lab, "alpha") as alpha:
        for given in (testimony, None):
            with suppress(HypervisorError):
                (found,) = await alpha.resolve(id, given)
        assert_names_what_is_missing(found, side=Side.SOURCE)
        assert "the decision stands, and its last actions failed" in found.missing
        assert "planted" in found.missing
        lab.faults = type(lab.faults)()
        assert_verdict(await alpha.resolve(id), Record.GIVEN if brings == "lost" else Record.KEPT)
    if brings != "nothing":
        assert rows(lab, "alpha")[id].testimony.startswith("Ann, ")
    assert running(lab) == ([] if brings == "lost" else ["alpha"])


@pytest.mark.parametrize("brings", ["lost", "journal"])
async def test_evidence_decides_and_its_actions_fail(lab: World, away: set[str], brings: str) -> None:
    """It was taken: the answer is where the migration stands, as without evidence."""
    id = await prove(lab)
    end_guests(lab, "beta")
    away.add("beta")
    lab.faults.at("alpha.migrate_confirm.before", Fault.FAIL, times=1000)
    journal = lab.hosts["beta"].journal
    testimony = LOST if brings == "lost" else ferryman.Testimony(who="Ann", journal=journal)
    async with open_host(lab, "alpha") as alpha:
        (found,) = await alpha.resolve(id, testimony)
        assert "the decision stands, and its last actions failed" in found.missing
        assert found.testimony.startswith("Ann, ")


# Who says it


@pytest.mark.parametrize("who", ["", " ", "\n\t", "\u2003"])
def test_evidence_needs_a_name(who: str) -> None:
    with pytest.raises(OptionError, match="name") as caught:
        ferryman.Testimony(who=who, lost=True)
    assert caught.value.option == "who"


def test_evidence_is_one_thing(tmp_path: Path) -> None:
    for journal, lost in ((None, False), (tmp_path, True)):
        with pytest.raises(OptionError, match="one of them"):
            ferryman.Testimony(who="Ann", journal=journal, lost=lost)


def test_a_name_has_a_length() -> None:
    """What the journal keeps must fit into the room that is set aside for a decision."""
    assert "x" * 200 in ferryman.Testimony(who="x" * 200, lost=True).note()
    with pytest.raises(OptionError, match="200 characters"):
        ferryman.Testimony(who="x" * 201, lost=True)


NAMES = [
    "Zoë 李",
    "Ann\nweb (source): the guest stays here",
    "\ud800",
    os.fsdecode(b"Ann\xff\xfe"),
    "a\0b\x1b[2J\u202e",
]


@pytest.mark.parametrize("who", NAMES, ids=ascii)
async def test_a_strange_name_is_kept_on_one_line(lab: World, away: set[str], who: str) -> None:
    id = await prove(lab)
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        (found,) = await alpha.resolve(id, ferryman.Testimony(who=who, lost=True))
    kept = rows(lab, "alpha")[id].testimony
    for text in (str(found), found.testimony, kept):
        assert text.isprintable()
    assert kept == found.testimony
    assert kept.startswith(who if who.isprintable() else who[0] if who[0].isprintable() else "\\")


async def test_a_strange_path_is_kept_on_one_line(lab: World, away: set[str], tmp_path: Path) -> None:
    id = await prove(lab)
    away.add("beta")
    path = tmp_path / os.fsdecode(b"copy\xff\n")
    for suffix in ("", "-wal", ".mark"):
        with suppress(FileNotFoundError):
            shutil.copy(f"{lab.hosts['beta'].journal}{suffix}", f"{path}{suffix}")
    async with open_host(lab, "alpha") as alpha:
        (found,) = await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=path))
        assert_verdict([found], Record.KEPT)
    assert str(found).isprintable()
    assert rows(lab, "alpha")[id].testimony.isprintable()


async def test_evidence_that_decided_nothing_is_not_kept(lab: World, away: set[str], tmp_path: Path) -> None:
    """A wrong journal is brought, and later the destination itself answers: Ann had no part in that."""
    id = await prove(lab)
    Journal.open(tmp_path / "wrong").close()
    away.add("beta")
    async with open_host(lab, "alpha") as alpha:
        await alpha.resolve(id, ferryman.Testimony(who="Ann", journal=tmp_path / "wrong"))
        away.clear()
        assert_verdict(await alpha.resolve(id), Record.KEPT)
    assert rows(lab, "alpha")[id].testimony == ""


# The command line


def call(lab: World, host: str, *arguments: str, stdin: str = "", **env: str) -> Result:
    return CliRunner().invoke(
        command, ["resolve", f"test:///{lab.name}/{host}", *arguments], input=stdin, env=env
    )


def proved(lab: World, **how: bool) -> str:
    return anyio.run(partial(prove, lab, **how))


def test_command_settles(lab: World) -> None:
    id = proved(lab)
    done = call(lab, "alpha", "--migration", id)
    assert done.exit_code == 0, done.output
    assert done.output == f"web (source, migration {id}): the guest stays here\n"
    again = call(lab, "alpha", "--migration", id)
    assert (again.exit_code, again.output) == (0, done.output)
    for arguments in ((), ("--list",)):
        nothing = call(lab, "alpha", *arguments)
        assert (nothing.exit_code, nothing.output) == (0, "nothing is in doubt\n")
    assert running(lab) == ["alpha"]


def test_command_in_doubt(lab: World, away: set[str]) -> None:
    id = proved(lab)
    away.add("beta")
    for arguments in ((), ("--list",), ("--migration", id), ("--list", "--migration", id)):
        done = call(lab, "alpha", *arguments)
        assert done.exit_code == 1, done.output
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        assert line.startswith(f"web (source, migration {id}): in doubt (handing): the destination's word")
        assert f"test:///{lab.name}/beta" in line
        assert "make the destination reachable" in line
    assert guest(lab, "alpha").state is ProcessState.HANDED_OVER


def test_command_lists_every_one(lab: World, away: set[str]) -> None:
    ids = anyio.run(prove_two, lab)
    away.add("beta")
    done = call(lab, "alpha", "--list", "--json")
    assert done.exit_code == 1
    listed = json.loads(done.stdout)
    assert [entry["migration_id"] for entry in listed] == ids
    assert [entry["name"] for entry in listed] == ["g0", "g1"]
    for entry in listed:
        assert (entry["side"], entry["record"], entry["settled"]) == ("source", "handing", False)
        assert entry["missing"]
        assert entry["remedy"]
    done = call(lab, "alpha", "--lost", "--yes")
    assert done.exit_code == 3
    assert done.stdout == ""
    assert "2 migrations are open here: say which one the evidence is about" in done.stderr
    assert "[option-invalid]" in done.stderr
    assert len(lab.hosts["alpha"].processes) == 2


def test_command_json(lab: World, away: set[str]) -> None:
    assert json.loads(call(lab, "alpha", "--json").stdout) == []
    id = proved(lab)
    away.add("beta")
    done = call(lab, "alpha", "--lost", "--yes", "--who", "Zoë\n\ud800", "--json")
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(done.stdout)
    assert entry["testimony"].startswith("Zoë\\n\\ud800, ")
    assert {key: value for key, value in entry.items() if key != "testimony"} == {
        "migration_id": id,
        "uuid": UUID,
        "name": NAME,
        "side": "source",
        "record": "given",
        "settled": True,
        "verdict": "this host has let the guest go",
        "missing": "",
        "remedy": "",
    }


def test_command_with_a_journal(lab: World, away: set[str]) -> None:
    id = proved(lab)
    away.add("beta")
    journal = str(lab.hosts["beta"].journal)
    done = call(lab, "alpha", "--journal", journal, "--who", "Ann")
    assert done.exit_code == 0, done.output
    assert f"migration {id}): the guest stays here [Ann, 20" in done.output
    assert f"the journal {journal}]" in done.output
    assert running(lab) == ["alpha"]


def test_command_with_a_wrong_journal(lab: World, away: set[str], tmp_path: Path) -> None:
    proved(lab)
    away.add("beta")
    Journal.open(tmp_path / "wrong").close()
    done = call(lab, "alpha", "--journal", str(tmp_path / "wrong"))
    assert done.exit_code == 1
    assert "the destination's journal has lost this migration" in done.output
    (tmp_path / "text").write_text("no journal")
    done = call(lab, "alpha", "--journal", str(tmp_path / "text"))
    assert done.exit_code == 3
    assert done.stderr.startswith(f"ferryman: the journal {tmp_path / 'text'} cannot be read")
    assert done.stderr.endswith("[journal-unusable]\n")
    assert done.stdout == ""


def test_command_asks_back(lab: World, away: set[str]) -> None:
    proved(lab)
    away.add("beta")
    for answer in ("n\n", "\n", ""):
        done = call(lab, "alpha", "--lost", "--who", "Ann", stdin=answer)
        assert done.exit_code == 1
        assert "lost for good. The copy here is destroyed" in done.stderr
        assert guest(lab, "alpha").state is ProcessState.HANDED_OVER
    done = call(lab, "alpha", "--lost", "--who", "Ann", stdin="y\n")
    assert done.exit_code == 0, done.output
    assert "this host has let the guest go [Ann, 20" in done.stdout
    assert lab.hosts["alpha"].processes == {}
    assert running(lab) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--list", "--lost"],
        ["--list", "--journal", __file__],
        ["--lost", "--journal", __file__],
        ["--who", "Ann"],
        ["--list", "--who", "Ann"],
        ["--lost", "--yes", "--who", ""],
        ["--lost", "--yes", "--who", " \n"],
        ["--lost", "--yes", "--who", "x" * 100_000],
        ["--lost", "--yes", "--migration", ""],
        ["--list", "--migration", ""],
        ["--migration", "nonsense"],
        ["--migration", "\ud800" * 32],
        ["--journal", "no-such-file"],
        ["--journal", "."],
        ["--sure"],
        ["another"],
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:40],
)
def test_command_used_wrongly(lab: World, away: set[str], arguments: list[str]) -> None:
    proved(lab)
    away.add("beta")
    done = call(lab, "alpha", *arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ")
    assert guest(lab, "alpha").state is ProcessState.HANDED_OVER


def test_command_lists_one_that_is_settled(lab: World) -> None:
    id = proved(lab)
    assert call(lab, "alpha").exit_code == 0
    done = call(lab, "alpha", "--list", "--migration", id)
    assert (done.exit_code, done.output) == (0, f"web (source, migration {id}): the guest stays here\n")


@pytest.mark.parametrize("arguments", [[], ["--list"], ["--lost", "--yes"]], ids=str)
def test_command_with_an_unknown_migration(lab: World, away: set[str], arguments: list[str]) -> None:
    proved(lab)
    away.add("beta")
    done = call(lab, "alpha", *arguments, "--migration", "0" * 32)
    assert done.exit_code == 3, done.output
    assert done.stderr == f"ferryman: no migration {'0' * 32} is known here [{MigrationNotFoundError.code}]\n"
    assert guest(lab, "alpha").state is ProcessState.HANDED_OVER


async def test_command_while_the_host_is_open(lab: World) -> None:
    async with open_host(lab, "alpha"):
        done = await anyio.to_thread.run_sync(partial(call, lab, "alpha"))
    assert done.exit_code == 3
    assert "open in another program" in done.stderr
    assert f"process {os.getpid()}" in done.stderr


@pytest.mark.parametrize("who", NAMES, ids=ascii)
def test_command_with_a_strange_name(lab: World, away: set[str], who: str) -> None:
    proved(lab)
    away.add("beta")
    done = call(lab, "alpha", "--lost", "--yes", "--who", who)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    assert line.isprintable()


def test_command_takes_the_name_of_who_calls(lab: World, away: set[str]) -> None:
    id = proved(lab)
    away.add("beta")
    done = call(lab, "alpha", "--lost", "--yes", SUDO_USER="zoe", LOGNAME="root")
    assert done.exit_code == 0, done.output
    assert rows(lab, "alpha")[id].testimony.startswith("zoe, ")


def test_command_where_nobody_has_a_name(lab: World, away: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that no table knows, as in a container."""
    id = proved(lab)
    away.add("beta")

    def unknown(_uid: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    done = call(lab, "alpha", "--lost", "--yes")
    assert done.exit_code == 0, done.output
    assert rows(lab, "alpha")[id].testimony.startswith(f"user id {os.getuid()}, ")


async def test_command_beside_the_api(lab: World) -> None:
    id = await prove(lab, pledged=True)
    async with open_host(lab, "beta") as beta:
        done: list[Result] = []

        async def at_alpha() -> None:
            done.append(await anyio.to_thread.run_sync(partial(call, lab, "alpha", "--migration", id)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(at_alpha)
            tasks.start_soon(beta.resolve, id)
        assert done[0].exit_code in (0, 1)
        if done[0].exit_code == 1:
            assert "open in another program" in done[0].output
        assert running(lab) in ([], ["beta"])
    last = await anyio.to_thread.run_sync(partial(call, lab, "alpha", "--migration", id))
    assert last.exit_code == 0, last.output
    await settle(lab)
    assert running(lab) == ["beta"]


STAGED = """
import sys, anyio
from ferryman.cli import main
from ferryman.testing import world
from tests.integration.test_resolve import prove
import ferryman.journal
anyio.run(prove, world("staged"))
ferryman.journal.LOCK_WAIT_S = 0.1
held = ferryman.journal.Journal.open(world("staged").host("beta").journal)
sys.argv[1:] = ["resolve", "test:///staged/alpha", *sys.argv[1:]]
main()
"""
"""The program, after a migration was brought to its proof in the same world; the destination cannot be asked."""


def program(*arguments: str | bytes, code: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *(("-c", code) if code else ("-m", "ferryman", "resolve")), *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("ascii_only", [False, True], ids=["utf8", "ascii"])
def test_program_with_bytes_that_are_no_text(tmp_path: Path, ascii_only: bool) -> None:
    """In names and paths, also where the output takes only ASCII: nothing fails after something was done."""
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    if not ascii_only:
        env = {"LC_ALL": "C.UTF-8"}
    done = program("--lost", "--yes", "--who", "Zo\u00eb\xff".encode() + b"\xff\n", code=STAGED, **env)
    assert done.returncode == 0, done.stderr
    assert b"this host has let the guest go [Zo" in done.stdout
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""
    broken = os.fsencode(tmp_path) + b"/journal\xff"
    Path(os.fsdecode(broken)).write_text("no journal")
    done = program("--journal", broken, code=STAGED, **env)
    assert done.returncode == 3, done.stderr
    assert b"journal\\udcff cannot be read: file is not a database [journal-unusable]" in done.stderr
    assert b"Traceback" not in done.stderr
    done = program("test:///other/alpha", "--journal", broken, "--migration", b"\xff\xc3\xa9", **env)
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr


def test_program_exit_statuses() -> None:
    for arguments, status, said in (
        (("nosuch:///x",), 3, b"[scheme-unknown]"),
        (("test:///",), 3, b"names no host"),
        (("no uri",), 3, b"[uri-invalid]"),
        ((), 2, b"Missing argument"),
        (("test:///w/a", "--list"), 0, b""),
    ):
        done = program(*arguments)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert b"Traceback" not in done.stderr
