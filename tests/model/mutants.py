"""Protocols that are wrong: the shipped one with one thing changed, for the checker to find.

``READINGS`` are looser wordings of the rules that were tried, and that break; ``generated`` makes every change of some
kinds.  Changes that only drop one of a step's last actions are not among them: what a decided side has not done is done
again when its lease ends, so the shipped table tolerates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ferryman.handover import (
    SOURCE_STATES,
    TABLE,
    Action,
    Input,
    MigrationRow,
    Paper,
    PaperKind,
    Record,
    State,
    Step,
    admit_answer,
    admit_question,
    recover,
)
from ferryman.types import DomainUUID, Evidence, GuestEvidence, MigrationId, Side, TransferEvidence
from tests.model.world import Bounds, Protocol

Table = dict[tuple[State, Input], Step]

QUICK = Bounds(silent=False)
POSTCOPY = Bounds(silent=False, postcopy=True, kill=False)
DEADLY = Bounds(silent=False, postcopy=True, fail=False)
SILENT = Bounds(kill=False)
PERSON = Bounds(silent=False, person=True)
TWICE = Bounds(migrations=2, crash_managers=False, kill=False, silent=False, fail=False)
LOST = Bounds(lose_journals=True, kill=False, silent=False, fail=False)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A wrong protocol, and the world in which it is looked at.

    :param heal: whether every state is healed as well; without that only I1, I3 and I6 are looked at.
    """

    name: str
    protocol: Protocol
    bounds: Bounds = field(default=QUICK)
    heal: bool = True


def _with(changes: dict[tuple[State, Input], Step | None], **more: Any) -> Protocol:
    table: Table = dict(TABLE)
    for key, step in changes.items():
        if step is None:
            del table[key]
        else:
            table[key] = step
    return Protocol(table=table, **more)


_KEEP = TABLE[State.STOPPED, Input.REFUSAL]
_LET_GO = TABLE[State.STOPPED, Input.CLAIM]
_GIVE_THE_REST = TABLE[State.SWITCHED, Input.CLAIM]
_CLAIM = TABLE[State.CLAIMING, Input.RAN]
_REFUSE = TABLE[State.PREPARED, Input.CANCEL]
_RUN = TABLE[State.PREPARED, Input.GO]


# Looser wordings


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


def _verdict(record: Record, guest: GuestEvidence, verdict: Input) -> Callable[..., Input | None]:
    def mutant(row: MigrationRow, evidence: Evidence) -> Input | None:
        if row.record is record and evidence.guest is guest and not row.settled:
            return verdict
        return recover(row, evidence)

    return mutant


def _pays_nobody_heed(row: MigrationRow, paper: Paper, *, newest: bool) -> Input | None:
    """V11: what a stock client's confirm carries after an error is an empty cookie."""
    return admit_answer(row, paper, newest=newest) if paper.kind is not PaperKind.REFUSAL else None


READINGS: tuple[Mutant, ...] = (
    Mutant(name="V1: a stopped guest is the proof", protocol=Protocol(stop_is_proof=True)),
    Mutant(
        name="V2: a claim that failed stays a claim",
        protocol=_with({(State.CLAIMING, Input.NEVER_RAN): _CLAIM}),
    ),
    Mutant(
        name="V3: a claim is told before the guest ran",
        protocol=_with({(State.CLAIMING, Input.ASK): Step(state=State.CLAIMING, answer=PaperKind.CLAIM)}),
        bounds=SILENT,
    ),
    Mutant(
        name="V4: a receiver that is gone never ran",
        protocol=Protocol(recover=_verdict(Record.CLAIMING, GuestEvidence.GONE, Input.NEVER_RAN)),
    ),
    Mutant(
        name="V5: papers need not name what they are about", protocol=Protocol(anonymous=True), bounds=TWICE
    ),
    Mutant(
        name="V6: a copy is destroyed by its domain's name",
        protocol=Protocol(destroys_by_name=True),
        bounds=TWICE,
    ),
    Mutant(
        name="V7: an undecided destination does not refuse by itself",
        protocol=_with({(State.PREPARED, Input.CANCEL): None}),
    ),
    Mutant(
        name="V8: a source that only began does not give up",
        protocol=_with({(State.BEGUN, Input.GIVE_UP): None}),
    ),
    Mutant(name="V9: an unknown id is refused", protocol=Protocol(admit_question=_forgetful), bounds=LOST),
    Mutant(
        name="V10: the destination is powered off, so the source goes on",
        protocol=_with({(State.STOPPED, Input.WRITTEN_OFF): _KEEP}),
        bounds=PERSON,
    ),
    Mutant(
        name="V11: a refusal travels only in cookies, which an error does not have",
        protocol=Protocol(admit_answer=_pays_nobody_heed),
    ),
    Mutant(
        name="V12: the proof does not reach the destination",
        protocol=_with({(State.HANDING, Input.PROVED): Step(state=State.STOPPED)}, asks=False),
    ),
    Mutant(name="V13: an id can be prepared again", protocol=Protocol(forgets_tombstones=True)),
    Mutant(
        name="V14: a newer migration does not end an older one",
        protocol=Protocol(ignores_older=True),
        bounds=TWICE,
    ),
    Mutant(
        name="V17: the source switches without a pledge",
        protocol=Protocol(hasty_switch=True),
        bounds=POSTCOPY,
    ),
    Mutant(name="V17: postcopy-active is the proof", protocol=Protocol(hasty_proof=True), bounds=POSTCOPY),
    Mutant(
        name="V17: the source lets go at the claim",
        protocol=_with({(State.SWITCHED, Input.CLAIM): _LET_GO}),
        bounds=POSTCOPY,
    ),
    Mutant(
        name="V18: a receiver is ended before the refusal is durable",
        protocol=_with(
            {}, late=frozenset({(State.CLAIMING, Input.NEVER_RAN), (State.PREPARED, Input.CANCEL)})
        ),
    ),
    Mutant(
        name="the source resumes after a restart",
        protocol=Protocol(recover=_verdict(Record.HANDING, GuestEvidence.STOPPED, Input.STAYED)),
    ),
    Mutant(
        name="the death of the source is its proof",
        protocol=Protocol(recover=_verdict(Record.HANDING, GuestEvidence.GONE, Input.PROVED)),
    ),
    Mutant(
        name="the source lets go with its proof",
        protocol=_with({(State.HANDING, Input.PROVED): replace(_LET_GO, answer=PaperKind.PROOF)}),
    ),
    Mutant(name="the caller's word is the proof", protocol=Protocol(admit_question=_trusting)),
    Mutant(
        name="an older journal is opened",
        protocol=Protocol(ignores_mark=True),
        bounds=Bounds(silent=False, old_journals=True),
    ),
)
"""V15 (counts messages) and V16 (a wording) change nothing that a protocol does."""


# Generated


def generated() -> Iterator[Mutant]:
    """Make all mutants, in a fixed order."""
    yield from _writes()
    yield from _orders()
    yield from _omissions()
    yield from _opposites()
    yield from _timeouts()
    yield from _presumptions()
    yield from _decisions()
    yield from _answers()
    yield from _questions_misread()
    yield from _answers_misread()
    yield from _verdicts()


_POSTCOPY_STATES = (State.PLEDGED, State.SWITCHED)


def _where(state: State, given: Input) -> Bounds:
    """The world in which a state meets an input."""
    if state in _POSTCOPY_STATES or (state in SOURCE_STATES and given is Input.ASK):
        if state is State.BEREFT or given in (Input.NO_PROOF, Input.NEVER_RAN):
            return DEADLY
        return replace(POSTCOPY, silent=state is State.SILENT)
    if given is Input.NO_PROOF:
        return Bounds(fail=False)
    return SILENT if state in (State.SILENT, State.CLAIMING) else QUICK


def _writes() -> Iterator[Mutant]:
    """A record is not written at all, or only after the first action of its step."""
    for record in Record:
        bounds = POSTCOPY if record is Record.PLEDGED else QUICK
        keys = [key for key, step in TABLE.items() if step.record is record]
        unwritten: dict[tuple[State, Input], Step | None] = {
            key: replace(TABLE[key], record=None) for key in keys
        }
        yield Mutant(name=f"{record.value} is not written", protocol=_with(unwritten), bounds=bounds)
        late = frozenset(
            key for key in keys if TABLE[key].actions[:1] not in ((), (Action.SETTLE,)) and key not in _EMPTY
        )
        if late:
            name = f"{record.value} is written after what it allows"
            yield Mutant(name=name, protocol=_with({}, late=late), bounds=bounds)


def _orders() -> Iterator[Mutant]:
    """The last actions of a decision are done in the other order."""
    for record in Record:
        turned: dict[tuple[State, Input], Step | None] = {
            key: replace(step, actions=step.actions[::-1])
            for key, step in TABLE.items()
            if step.state.value == record.value and len(step.actions) > 1 and key not in _EMPTY
        }
        if turned:
            yield Mutant(
                name=f"what follows {record.value} is done in the other order", protocol=_with(turned)
            )


def _omissions() -> Iterator[Mutant]:
    """An action is never done."""
    for action in Action:
        changed: dict[tuple[State, Input], Step | None] = {
            key: replace(step, actions=tuple(a for a in step.actions if a is not action))
            for key, step in TABLE.items()
            if action in step.actions
        }
        postcopy = action in (Action.SWITCH, Action.SERVE_PAGES)
        yield Mutant(
            name=f"nothing is done for {action.value}",
            protocol=_with(changed),
            bounds=POSTCOPY if postcopy else replace(QUICK, fail=action is not Action.SETTLE),
        )


_OPPOSITES = {
    Action.RESUME: Action.DESTROY_COPY,
    Action.DESTROY_COPY: Action.RESUME,
    Action.RUN_GUEST: Action.DESTROY_RECEIVER,
    Action.DESTROY_RECEIVER: Action.ADOPT,
    Action.ADOPT: Action.DESTROY_RECEIVER,
    Action.TRANSFER: Action.DESTROY_COPY,
    Action.CANCEL_TRANSFER: Action.DESTROY_COPY,
    Action.SERVE_PAGES: Action.RESUME,
}


def _opposites() -> Iterator[Mutant]:
    """A step does the opposite of one of its actions."""
    for (state, given), step in TABLE.items():
        opposite = _OPPOSITES.get(step.actions[0]) if step.actions else None
        if opposite is None or given is Input.WRITTEN_OFF or (state, given) in _UNREACHED | _EMPTY:
            continue
        yield Mutant(
            name=f"a side that is {state.value} does {opposite.value} on {given.value}",
            protocol=_with({(state, given): replace(step, actions=(opposite, *step.actions[1:]))}),
            bounds=_where(state, given),
        )


_UNREACHED = frozenset(
    {
        # An earlier defence stands before them, so that no world of the model comes there.
        (State.BEGUN, Input.REFUSAL),
        (State.PREPARED, Input.RAN),
        (State.PLEDGED, Input.RAN),
    }
)


_EMPTY = frozenset(
    {
        # There is no process, so that nothing can be done to it, right or wrong.
        (State.PREPARING, Input.RECEIVER_FAILED),
        (State.NEVER_PREPARED, Input.RESTART),
        (State.PLEDGED, Input.NEVER_RAN),
        (State.BEREFT, Input.CLAIM),
        (State.BEREFT, Input.REFUSAL),
    }
)


def _timeouts() -> Iterator[Mutant]:
    """A side decides because time has passed."""
    for state, decisions in (
        (State.STOPPED, {"keeps": _KEEP, "lets go": _LET_GO}),
        (State.SWITCHED, {"keeps": _KEEP, "lets go": _LET_GO}),
        (State.SILENT, {"keeps": _KEEP, "lets go": _LET_GO}),
        (State.BEREFT, {"keeps": _KEEP, "lets go": _LET_GO}),
        (State.PREPARED, {"claims": _CLAIM, "runs the guest": _RUN}),
        (State.PLEDGED, {"refuses": _REFUSE, "claims": _CLAIM, "runs the guest": _RUN}),
        (State.CLAIMING, {"refuses": _REFUSE, "claims": _CLAIM}),
    ):
        for words, step in decisions.items():
            yield Mutant(
                name=f"a side that is {state.value} {words} when time has passed",
                protocol=_with({(state, Input.RESTART): step}),
                bounds=_where(state, Input.RESTART),
            )


def _presumptions() -> Iterator[Mutant]:
    """A caller that gets no answer takes it for one."""
    for kind, presumed in (
        (PaperKind.PROOF, PaperKind.CLAIM),
        (PaperKind.PROOF, PaperKind.REFUSAL),
        (PaperKind.ASK, PaperKind.CLAIM),
        (PaperKind.ASK, PaperKind.REFUSAL),
        (PaperKind.NO_PROOF, PaperKind.CLAIM),
        (PaperKind.NO_PROOF, PaperKind.REFUSAL),
    ):
        yield Mutant(
            name=f"no answer to {kind.value} is taken for a {presumed.value}",
            protocol=Protocol(presumes={kind: presumed}),
            bounds=Bounds(fail=False),
        )


def _decisions() -> Iterator[Mutant]:
    """An undecided side decides because somebody says so, gives up, or asks."""
    source = {"keeps": _KEEP, "lets go": _LET_GO}
    waiting = (State.HANDING, State.STOPPED, State.SWITCHED, State.SILENT, State.BEREFT)
    for state in waiting:
        for given in (Input.GIVE_UP, Input.ASK):
            for words, step in source.items():
                yield _decision(state, given, words, step)
    for state, decisions in (
        (State.PREPARED, {"claims": _CLAIM, "runs the guest": _RUN}),
        (State.PLEDGED, {"refuses": _REFUSE, "claims": _CLAIM, "runs the guest": _RUN}),
        (State.CLAIMING, {"refuses": _REFUSE, "claims": _CLAIM}),
    ):
        for given in (Input.CANCEL, Input.ASK, Input.NO_PROOF):
            for words, step in decisions.items():
                if TABLE[state, given] != step:
                    yield _decision(state, given, words, step)


def _decision(state: State, given: Input, words: str, step: Step) -> Mutant:
    return Mutant(
        name=f"a side that is {state.value} {words} on {given.value}",
        protocol=_with({(state, given): step}),
        bounds=_where(state, given),
    )


_REACHED = (Input.GO, Input.CANCEL, Input.ASK, Input.NO_PROOF, Input.NEVER_RAN)


def _answers() -> Iterator[Mutant]:
    """A destination tells the opposite, or the proof is told without one."""
    opposite = {
        PaperKind.CLAIM: (PaperKind.REFUSAL,),
        PaperKind.REFUSAL: (PaperKind.CLAIM,),
        PaperKind.PENDING: (PaperKind.REFUSAL, PaperKind.CLAIM),
    }
    for (state, given), step in TABLE.items():
        at_destination = state in (
            State.PREPARED,
            State.PLEDGED,
            State.CLAIMING,
            State.CLAIMED,
            State.REFUSED,
        )
        for other in opposite.get(step.answer, ()) if step.answer is not None and at_destination else ():
            if given in _REACHED:
                yield _answer(state, given, step, other)
    for key in ((State.HANDING, Input.UNCLEAR), (State.HANDING, Input.GONE), (State.SILENT, Input.GONE)):
        yield _answer(*key, TABLE[key], PaperKind.PROOF)


def _answer(state: State, given: Input, step: Step, other: PaperKind) -> Mutant:
    bounds = Bounds(fail=False) if given is Input.UNCLEAR or state is State.SILENT else _where(state, given)
    return Mutant(
        name=f"a side that is {state.value} answers {given.value} with {other.value}",
        protocol=_with({(state, given): replace(step, answer=other)}),
        bounds=bounds,
    )


def _questions_misread() -> Iterator[Mutant]:
    """A destination takes one paper for another that allows more."""
    for other, kinds in (
        (PaperKind.PROOF, ("cancel", "ask", "kept", "no-proof", "switch")),
        (PaperKind.NO_PROOF, ("cancel", "ask")),
    ):
        for kind in map(PaperKind, kinds):

            def misread(
                row: MigrationRow | None, paper: Paper, kind: PaperKind = kind, other: PaperKind = other
            ) -> Input | PaperKind:
                return admit_question(row, replace(paper, kind=other) if paper.kind is kind else paper)

            yield Mutant(
                name=f"a destination takes {kind.value} for {other.value}",
                protocol=Protocol(admit_question=misread),
                bounds=DEADLY if kind is PaperKind.NO_PROOF else POSTCOPY,
            )


def _answers_misread() -> Iterator[Mutant]:
    """A source takes one paper for another."""
    for kind in (PaperKind.CLAIM, PaperKind.REFUSAL, PaperKind.UNKNOWN, PaperKind.PLEDGE):
        for other in (PaperKind.CLAIM, PaperKind.REFUSAL):
            if kind is other:
                continue

            def misread(
                row: MigrationRow,
                paper: Paper,
                *,
                newest: bool,
                kind: PaperKind = kind,
                other: PaperKind = other,
            ) -> Input | None:
                return admit_answer(
                    row, replace(paper, kind=other) if paper.kind is kind else paper, newest=newest
                )

            bounds = {PaperKind.UNKNOWN: LOST, PaperKind.PLEDGE: POSTCOPY}.get(kind, QUICK)
            yield Mutant(
                name=f"a source takes {kind.value} for {other.value}",
                protocol=Protocol(admit_answer=misread),
                bounds=bounds,
            )
    for name in ("generation", "receipt", "newest"):
        yield Mutant(
            name=f"a source does not look at a paper's {name}",
            protocol=Protocol(anonymous=True, admit_answer=_careless(name)),
            bounds=TWICE,
        )


def _careless(what: str) -> Callable[..., Input | None]:
    def admit(row: MigrationRow, paper: Paper, *, newest: bool) -> Input | None:
        if what == "newest":
            return admit_answer(row, paper, newest=True)
        seen = replace(paper, **{what: getattr(row, what)})
        return admit_answer(row, seen, newest=newest)

    return admit


def _verdicts() -> Iterator[Mutant]:
    """Recovery concludes more than what it found allows."""
    handing = (Input.STAYED, Input.PROVED, Input.SWITCHED)
    for guest, transfer, others in (
        (GuestEvidence.RUNNING, "active", handing),
        (GuestEvidence.RUNNING, "failed", handing),
        (GuestEvidence.STOPPED, "active", handing),
        (GuestEvidence.STOPPED, "completed", handing),
        (GuestEvidence.STOPPED, "switched", handing),
        (GuestEvidence.GONE, "unknown", handing),
    ):
        for other in others:
            yield from _verdict_mutant(Record.HANDING, guest, transfer, other)
    for record, guest, more in (
        (Record.PREPARED, GuestEvidence.STOPPED, (Input.RAN,)),
        (Record.PREPARED, GuestEvidence.GONE, (Input.RAN,)),
        (Record.PLEDGED, GuestEvidence.STOPPED, (Input.RAN, Input.NEVER_RAN)),
        (Record.PLEDGED, GuestEvidence.GONE, (Input.RAN,)),
        (Record.CLAIMING, GuestEvidence.RUNNING, (Input.NEVER_RAN,)),
        (Record.CLAIMING, GuestEvidence.STOPPED, (Input.RAN, Input.NEVER_RAN)),
        (Record.CLAIMING, GuestEvidence.GONE, (Input.NEVER_RAN, Input.RUN_AGAIN)),
    ):
        for other in more:
            yield from _verdict_mutant(record, guest, "", other)


def _verdict_mutant(record: Record, guest: GuestEvidence, transfer: str, other: Input) -> Iterator[Mutant]:
    def concludes(row: MigrationRow, evidence: Evidence) -> Input | None:
        if row.record is record and evidence.guest is guest and transfer in ("", evidence.transfer.value):
            return other
        return recover(row, evidence)

    probe = Evidence(guest=guest, transfer=TransferEvidence(transfer or "unknown"))
    if recover(_probe(record), probe) is other:
        return
    found = f"{guest.value}{f', transfer {transfer}' if transfer else ''}"
    yield Mutant(
        name=f"{record.value} with the guest {found} is taken for {other.value}",
        protocol=Protocol(recover=concludes),
        bounds=_world_of_verdict(record, guest, {transfer, other.value}),
    )


def _world_of_verdict(record: Record, guest: GuestEvidence, words: set[str]) -> Bounds:
    if "switched" not in words and record is not Record.PLEDGED:
        return QUICK
    return DEADLY if guest is GuestEvidence.GONE else POSTCOPY


def _probe(record: Record) -> MigrationRow:
    return MigrationRow(
        side=Side.SOURCE,
        migration_id=MigrationId("0" * 32),
        generation=1,
        uuid=DomainUUID("u"),
        name="d",
        record=record,
    )


_EVIDENCE = "what the hypervisor says after a crash between the two leads to the same record"
_SWEPT = "after a crash between the two the next opening ends a receiver that no open row names"

SURVIVORS: dict[str, str] = {
    "V14: a newer migration does not end an older one": "it waits until the older one's lease has ended",
    "kept is written after what it allows": _EVIDENCE,
    "given is written after what it allows": _EVIDENCE,
    "claimed is written after what it allows": _EVIDENCE,
    "what follows refused is done in the other order": _SWEPT,
    "what follows claimed is done in the other order": "a guest that runs and that no open row names is taken in",
    "handing with the guest stopped, transfer active is taken for stayed": (
        "a hypervisor refuses to resume before its transfer has ended, and it is tried again then"
    ),
    "handing with the guest stopped, transfer completed is taken for switched": (
        "serving pages where none are left to be sent is nothing"
    ),
    "claiming with the guest stopped is taken for never-ran": (
        "a destination that knows that the guest never ran may refuse; ours runs it, so that nothing is lost"
    ),
}
"""Mutants that break nothing, each with the reason."""

__all__ = ["READINGS", "SURVIVORS", "Mutant", "generated"]
