"""Settling what a crash left open: what a host can do alone, what the other end says, and what a person brings.

A person brings evidence, never permission (rule 7 of :mod:`ferryman.handover`): the other host's journal, from which
its own rules decide, or the word that the other host and the guest on it are lost, which ends the migration here and
never starts an older memory.  Both are kept in the journal, with who said it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ferryman.errors import JournalError, OptionError
from ferryman.handover import (
    TABLE,
    MigrationRow,
    Paper,
    PaperKind,
    Record,
    State,
    admit_inquiry,
    admit_question,
    fall_back,
    recover,
)
from ferryman.types import DomainUUID, Evidence, GuestEvidence, MigrationId, Side

if TYPE_CHECKING:
    from pathlib import Path

    from ferryman.handover import Input
    from ferryman.journal import Journal

MAX_NAME_CHARACTERS = 200
"""A name of who brings evidence is no longer, so that the room set aside for a decision holds it."""

_VERDICTS = {
    Record.KEPT: "the guest stays here",
    Record.GIVEN: "this host has let the guest go",
    Record.CLAIMED: "the guest is this host's",
    Record.REFUSED: "this host refused the guest",
    Record.NEVER_PREPARED: "this host never prepared for the guest",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Testimony:
    """What a person brings: exactly one of ``journal`` and ``lost``.

    :param who: the person, for the record; not empty, and no longer than :data:`MAX_NAME_CHARACTERS`.
    :param journal: the other host's journal file, after its programs and the guest there have ended.
    :param lost: the other host and the guest on it are lost for good.
    """

    who: str
    journal: Path | None = None
    lost: bool = False

    def __post_init__(self) -> None:
        if not self.who.strip():
            raise OptionError("evidence needs the name of who brings it", option="who")
        if len(self.who) > MAX_NAME_CHARACTERS:
            raise OptionError(
                f"the name of who brings evidence is longer than {MAX_NAME_CHARACTERS} characters",
                option="who",
            )
        if (self.journal is not None) == self.lost:
            raise OptionError(
                "bring the other host's journal, or say that it is lost: one of them", option="lost"
            )

    def note(self) -> str:
        """What the journal keeps of it."""
        said = (
            f"the journal {self.journal}"
            if self.journal is not None
            else "the other host and the guest on it are lost"
        )
        return printable(f"{self.who.strip()}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {said}")


def printable(text: str) -> str:
    """A text on one line, with what cannot be shown as escapes: names and paths may hold anything."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """Where one migration stands on one host.

    :param record: what the journal says.
    :param settled: nothing is in doubt here any more.
    :param verdict: the decision in words; '' where there is none.
    :param missing: the evidence that would settle it; '' where it is settled.
    :param remedy: what to do about it; '' where it is settled.
    :param testimony: what a person brought, and who.
    """

    migration_id: MigrationId
    uuid: DomainUUID
    name: str
    side: Side
    record: Record
    settled: bool
    verdict: str
    missing: str = ""
    remedy: str = ""
    testimony: str = ""

    def __str__(self) -> str:
        text = f"{self.name} ({self.side.value}, migration {self.migration_id}): "
        if self.settled:
            text += self.verdict
        else:
            text += f"in doubt ({self.record.value}): {self.missing}; {self.remedy}"
        return printable(f"{text} [{self.testimony}]" if self.testimony else text)


def describe(
    row: MigrationRow,
    state: State,
    *,
    settled: bool,
    under_way: bool = False,
    answered: PaperKind | None = None,
    trouble: str = "",
) -> Resolution:
    """Say where a migration stands, and which evidence is missing.

    :param answered: what the other side has answered, where it was asked. :param trouble: why it could not be asked,
        or why a step could not be done.
    """
    missing, remedy = "", ""
    if not settled:
        missing, remedy = _missing(row, state, under_way=under_way, answered=answered, trouble=trouble)
    return Resolution(
        migration_id=row.migration_id,
        uuid=row.uuid,
        name=row.name or "(unknown)",
        side=row.side,
        record=row.record,
        settled=settled,
        verdict=_VERDICTS.get(row.record, ""),
        missing=missing,
        remedy=remedy,
        testimony=row.testimony,
    )


def _missing(
    row: MigrationRow, state: State, *, under_way: bool, answered: PaperKind | None, trouble: str
) -> tuple[str, str]:
    other = "destination" if row.side is Side.SOURCE else "source"
    because = f" ({trouble})" if trouble else ""
    if under_way and row.record.decided:
        return "nothing: the rest of the guest is being sent", "wait for it"
    if under_way:
        return "nothing: it is under way", "wait for it, or abort it where it was started"
    if row.record.decided:
        return f"the decision stands, and its last actions failed{because}", "mend that; they are tried again"
    if state in (State.BEGUN, State.HANDING, State.PREPARED, State.CLAIMING):
        # This host decides alone, or does not yet know whether it does; what a person says of the other is no help.
        return f"the hypervisor's word on process {row.process or 'of the guest'}{because}", (
            "look at that process, and open this host again when the hypervisor answers"
        )
    if answered is PaperKind.UNKNOWN:
        return f"the {other}'s journal has lost this migration", (
            f"bring the {other}'s newest journal back, or say that that host and the guest on it are lost"
        )
    if answered is PaperKind.PENDING:
        return f"the {other} has not decided yet", f"ask again; if it stays so, resolve at the {other}"
    if answered is PaperKind.NEVER_PREPARED:
        return f"the {other} never prepared this migration, so its journal is another one", (
            f"look at the {other}, or say that that host and the guest on it are lost"
        )
    address = row.peer_address or "an address that its papers did not name"
    if state is State.SILENT:
        # The guest may have gone on here by itself, so that it must not be given up for lost there.
        return f"the hypervisor's word, or the {other}'s word, from {address}{because}", (
            f"make the hypervisor answer, make the {other} reachable, or bring its journal"
        )
    return f"the {other}'s word, from {address}{because}", (
        f"make the {other} reachable, bring its journal, or say that that host and the guest on it are lost"
    )


def ask_journal(path: Path, question: Paper, asker: Side, testimony: str) -> Paper:
    """Let a host's journal answer for the host, whose programs and guests have ended; blocking.

    Where that journal is undecided, its rules decide with the evidence that no guest is there any more, and the
    decision is written into it, so that the host abides by it when it comes back.

    :param asker: the side that asks; the journal answers for the other one.
    :raises HostBusyError: a program has that journal open.
    :raises JournalError: it is no journal, is damaged, behind its mark, or cannot be written.
    """
    from ferryman.journal import Journal, read_journal

    side = Side.DESTINATION if asker is Side.SOURCE else Side.SOURCE
    contents = read_journal(path)
    row = next(
        (row for row in contents.rows if (row.side, row.migration_id) == (side, question.migration_id)), None
    )
    if row is None or isinstance(_admit(row, question), PaperKind):
        return replace(question, kind=PaperKind.UNKNOWN, reason="")
    if row.record.decided or not contents.marked:
        # Without a mark no program has it open.
        return _let_decide(row, question, path, None, testimony)
    with closing(Journal.open(path)) as journal:
        # INVARIANT: the row is read again under the lock: a program that had the journal open may have decided since.
        now = journal.read(side, question.migration_id)
        if now is None:
            raise JournalError(f"the journal {path} was replaced while it was read: bring it again")
        return _let_decide(now, question, path, journal, testimony)


def _admit(row: MigrationRow, question: Paper) -> Input | PaperKind:
    return admit_question(row, question) if row.side is Side.DESTINATION else admit_inquiry(row, question)


def _let_decide(
    row: MigrationRow, question: Paper, path: Path, journal: Journal | None, testimony: str
) -> Paper:
    """Let a row's rules decide where it is undecided, and answer.

    :param journal: where the decision is written; None where nothing may be.
    """
    given = _admit(row, question)
    if isinstance(given, PaperKind):
        return replace(question, kind=given, reason="")
    state = fall_back(row.record)
    if not row.record.decided:
        found = recover(row, Evidence(guest=GuestEvidence.GONE))
        step = TABLE.get((state, found)) if found is not None else None
        if step is None:
            raise JournalError(f"the journal {path} does not decide migration {row.migration_id}")
        state = step.state
        if step.record is not None:
            if journal is None:
                raise JournalError(
                    f"the journal {path} is undecided, and without its mark nobody can tell whether it is the newest:"
                    " bring the mark too"
                )
            row = journal.write_now(replace(row, record=step.record, settled=False, testimony=testimony))
    answer = TABLE[state, given].answer
    assert answer is not None
    return row.paper(answer)


__all__ = ["Resolution", "Testimony", "ask_journal", "describe", "printable"]
