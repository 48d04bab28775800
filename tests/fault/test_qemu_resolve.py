"""The program is killed after the proof, and the destination cannot be reached: a person settles it (real QEMU)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner, Result

import ferryman
from ferryman.cli.commands import ferryman as command
from ferryman.journal import read_journal
from tests.fault.test_qemu_faults import begun, killed_at
from tests.qemu import NAME, Field, end_process

__all__ = ["begun"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryman.journal.LOCK_WAIT_S", 0.5)


def call(field: Field, *arguments: str) -> Result:
    return CliRunner().invoke(command, ["resolve", field.uris[0], *arguments])


def cut_off(field: Field, moment: str) -> Path:
    """Kill the program at a moment, and take the destination's root away; its guest is still there."""
    killed_at(field, moment)
    away = field.directory / "away"
    field.roots[1].rename(away)
    field.roots[1].write_text("the network is down")
    return away


def put_back(field: Field, away: Path) -> None:
    field.roots[1].unlink()
    away.rename(field.roots[1])


def assert_listed(field: Field) -> str:
    """It is in doubt, whatever is asked; returns its id."""
    for arguments in (("--list", "--json"), ("--json",)):
        done = call(field, *arguments)
        assert done.exit_code == 1, done.output
        (entry,) = json.loads(done.stdout)
        assert (entry["name"], entry["side"], entry["record"]) == (NAME, "source", "handing")
        assert "the destination's word" in entry["missing"]
    return str(entry["migration_id"])


def settle(field: Field) -> None:
    """Open both hosts as a new program would: nothing is in doubt, and guests that are there are ended."""

    async def both() -> None:
        async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
            assert await a.resolve() == await b.resolve() == []
            for domain in (*await a.list_domains(), *await b.list_domains()):
                info = await domain.info()
                if info.state is not ferryman.DomainState.SHUT_OFF:
                    await domain.destroy()

    anyio.run(both)


def silent(field: Field) -> None:
    """Nobody ticks: what would come is heard within some hundred ticks' time."""
    since_ns = time.monotonic_ns()
    with pytest.raises(TimeoutError):
        last = field.witness.last()
        field.witness.wait_tick((last.value if last else 0) + 1, timeout_s=0.5)
    assert not [tick for tick in field.witness.ticks() if tick.t_ns > since_ns]


@pytest.mark.parametrize("moment", ["completed", "wrote-claimed"])
def test_the_destinations_journal_decides(begun: Field, moment: str) -> None:
    """Prepared and never run: the guest goes on at the source. Claimed: the source lets it go, and nothing runs."""
    field = begun
    away = cut_off(field, moment)
    id = assert_listed(field)
    for pid in field.emulators(field.roots[1]):  # by the paths that it was told before they moved
        end_process(pid)
    journal = away / "journal"
    assert journal.is_file()
    done = call(field, "--journal", str(journal), "--who", "Ann")
    assert done.exit_code == 0, done.output
    kept = moment == "completed"
    assert ("the guest stays here" if kept else "this host has let the guest go") in done.stdout
    assert "[Ann, 20" in done.stdout
    (row,) = read_journal(journal).rows
    assert row.record.value == ("refused" if kept else "claimed")
    if kept:
        assert field.the_runner() in field.emulators(field.roots[0])
    else:
        assert field.emulators() == []
        silent(field)
    field.assert_unbroken()
    again = call(field, "--migration", id)
    assert again.exit_code == 0
    put_back(field, away)
    settle(field)
    field.assert_unbroken()


@pytest.mark.parametrize("moment", ["completed", "wrote-claimed"])
def test_the_destination_is_lost(begun: Field, moment: str) -> None:
    """The stopped copy is destroyed, the definition stays.

    A destination that was not lost after all goes on, or refuses what it never ran.
    """
    field = begun

    async def define() -> None:
        async with ferryman.connect(field.uris[0]) as a:
            await a.define(field.definition)

    anyio.run(define)
    away = cut_off(field, moment)
    assert_listed(field)
    done = call(field, "--lost", "--yes", "--who", "Ann")
    assert done.exit_code == 0, done.output
    assert "this host has let the guest go [Ann, 20" in done.stdout
    assert field.emulators(field.roots[0]) == []

    async def left() -> None:
        async with ferryman.connect(field.uris[0]) as a:
            (domain,) = await a.list_domains()
            info = await domain.info()
            assert (info.state, info.persistent) == (ferryman.DomainState.SHUT_OFF, True)

    anyio.run(left)
    put_back(field, away)
    if moment == "completed":
        silent(field)
    else:
        field.wait_ticks(20)
    settle(field)
    field.assert_unbroken()
