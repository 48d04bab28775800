"""Protocols that are wrong: the shipped one with one thing changed, for the checker to find.

``READINGS`` are looser wordings of the rules that were tried, and that break.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ferryman.handover import (
    TABLE,
    Input,
    MigrationRow,
    Paper,
    PaperKind,
    Record,
    State,
    Step,
    admit_question,
    recover,
)
from ferryman.types import Evidence, GuestEvidence
from tests.model.world import Bounds, Protocol

Table = dict[tuple[State, Input], Step]


def _with(changes: dict[tuple[State, Input], Step | None], **more: Any) -> Protocol:
    table: Table = dict(TABLE)
    for key, step in changes.items():
        if step is None:
            del table[key]
        else:
            table[key] = step
    return Protocol(table=table, **more)


def _trusting(row: MigrationRow | None, paper: Paper) -> Input | PaperKind:
    """Take any word of the caller for the proof."""
    if paper.kind in (PaperKind.ASK, PaperKind.KEPT):
        return admit_question(row, replace(paper, kind=PaperKind.PROOF))
    return admit_question(row, paper)


def _forgetful(row: MigrationRow | None, paper: Paper) -> Input | PaperKind:
    """Refuse what is not known, whatever receipt is shown."""
    if row is None and paper.receipt is not None:
        return PaperKind.REFUSAL
    return admit_question(row, paper)


def _resumes(row: MigrationRow, evidence: Evidence) -> Input | None:
    """Resume a stopped source after a restart."""
    if row.record is Record.HANDING and evidence.guest is GuestEvidence.STOPPED:
        return Input.STAYED
    return recover(row, evidence)


def _death_is_proof(row: MigrationRow, evidence: Evidence) -> Input | None:
    """A source whose process is gone cannot run, so that is its proof."""
    if row.record is Record.HANDING and evidence.guest is GuestEvidence.GONE:
        return Input.PROVED
    return recover(row, evidence)


def _gone_never_ran(row: MigrationRow, evidence: Evidence) -> Input | None:
    """A receiver that is not there has not run."""
    if row.record is Record.CLAIMING and evidence.guest is GuestEvidence.GONE:
        return Input.NEVER_RAN
    return recover(row, evidence)


_KEEP = TABLE[State.STOPPED, Input.REFUSAL]
_LET_GO = TABLE[State.STOPPED, Input.CLAIM]
_CLAIM = TABLE[State.CLAIMING, Input.RAN]
_REFUSE = TABLE[State.PREPARED, Input.CANCEL]

READINGS: dict[str, Protocol] = {
    "V1: a stopped guest is the proof": Protocol(stop_is_proof=True),
    "V3: a claim is told before the guest ran": _with(
        {(State.CLAIMING, Input.ASK): Step(state=State.CLAIMING, answer=PaperKind.CLAIM)}
    ),
    "V4: a receiver that is gone never ran": Protocol(recover=_gone_never_ran),
    "V5: papers need not name what they are about": Protocol(anonymous=True),
    "V7: an undecided destination does not refuse by itself": _with({(State.PREPARED, Input.CANCEL): None}),
    "V8: a source that only began does not give up": _with({(State.BEGUN, Input.GIVE_UP): None}),
    "V9: an unknown id is refused": Protocol(admit_question=_forgetful),
    "V13: an id can be prepared again": Protocol(forgets_tombstones=True),
    "the source resumes after a restart": Protocol(recover=_resumes),
    "the source resumes when the caller says so": _with({(State.STOPPED, Input.GIVE_UP): _KEEP}),
    "the source lets go with its proof": _with(
        {(State.HANDING, Input.PROVED): replace(_LET_GO, answer=PaperKind.PROOF)}
    ),
    "the death of the source is its proof": Protocol(recover=_death_is_proof),
    "the caller's word is the proof": Protocol(admit_question=_trusting),
    "the destination claims, then writes": _with({}, late=frozenset({(State.PREPARED, Input.GO)})),
    "a destination that is claiming can be cancelled": _with({(State.CLAIMING, Input.CANCEL): _REFUSE}),
    "a claim that failed stays a claim": _with({(State.CLAIMING, Input.NEVER_RAN): _CLAIM}),
    "a source gives its guest away with the question": _with({(State.SILENT, Input.REFUSAL): _LET_GO}),
}

WHERE = {
    "V5: papers need not name what they are about": Bounds(
        migrations=2, kill=False, silent=False, fail=False
    ),
    "V9: an unknown id is refused": Bounds(lose_journals=True, kill=False, silent=False, fail=False),
}
"""The bounds within which a reading is found wrong, where the usual ones are too narrow."""

__all__ = ["READINGS", "WHERE"]
