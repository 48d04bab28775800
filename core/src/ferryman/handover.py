"""The handover: who owns a guest, as a pure transition table and a pure recovery function.

No I/O, no clock, no event loop: the engine runs this table against hooks and a journal, the model checker explores it.

Rules
=====
1. *Papers name what they are about*: migration id, generation, and the receipt of the destination's journal.  A paper
   that names anything else is ignored.  An id is prepared once, performed once, decided once.
2. *Proof of stop* is given only when the source's hypervisor can no longer resume the guest by itself.  Until then
   the source decides alone, and its decision is ``kept``.
3. *The destination decides, once, durably.*  ``claiming`` is written before the guest may run.  It becomes ``claimed``
   when the guest ran or when nobody can tell, and ``refused`` only where it is known that the guest never ran.
4. *After the proof the source resumes only with the refusal and lets go only with the claim.*
5. *Every wait ends by itself*: a destination refuses at the end of its lease, on cancel, on restart, and when a higher
   generation comes; a source before ``handing`` gives up likewise; a source that gave the proof asks until answered.
6. *A journal knows what it has lost*: a receipt it does not hold is answered ``unknown``, never ``refused``.
7. *A person brings evidence, not permission*: what is written off ends, and never runs from an older memory.
8. *Post-copy*: the source switches only with the destination's pledge, which is durable and ends its lease.  A pledged
   destination refuses only with the source's word that no proof will come, or where its receiver is gone and never ran.
   The source keeps its half, whatever was claimed, until every page has come.

How a step is done
==================
An input arrives in a state; the table's :class:`Step` says what follows, always in this order::

    record   written durably        (INVARIANT: before any action of the step)
    actions  done one by one        (INVARIANT: before the answer leaves; a long action's outcome is the next input)
    answer   told to whoever asked

States in capitals are durable records, the others live in memory and fall back to the record on a restart::

    source                                          destination
    absent --begin--> BEGUN                         absent --prepare--> preparing --receiver up--> PREPARED
    BEGUN --perform--> HANDING   (transfer)         PREPARED --go--> CLAIMING   (run the guest)
    BEGUN --give up--> KEPT                         PREPARED --cancel--> REFUSED
    HANDING --stayed--> KEPT     (resume)           CLAIMING --ran--> CLAIMED
    HANDING --proved--> stopped                     CLAIMING --never ran--> REFUSED
    HANDING --unclear--> silent                     absent --ask, cancel--> NEVER_PREPARED
    HANDING --gone--> bereft                        PREPARED --pledge--> PLEDGED
    stopped, bereft --claim--> GIVEN   (destroy)    PLEDGED --go--> CLAIMING
    stopped, silent, bereft --refusal--> KEPT       PLEDGED --no proof--> REFUSED

    HANDING --pledged--> HANDING (switch to post-copy) --switched--> switched
    switched, silent --claim--> GIVEN (serve pages, which without post-copy is nothing) --served--> GIVEN (destroy)

Sources: libvirt's migration protocol v3 for the five phases; QEMU 7.2 ``migration/migration.c`` for rule 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, assert_never

from ferryman.errors import PaperError
from ferryman.types import DomainUUID, Evidence, GuestEvidence, MigrationId, Side, TransferEvidence

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_COOKIE_BYTES = 65_536
"""A cookie longer than this is refused before it is read."""

_FORMAT = 1


class Record(Enum):
    """What a journal's row says; the value stands in the journal."""

    BEGUN = "begun"
    HANDING = "handing"
    KEPT = "kept"
    GIVEN = "given"
    PREPARED = "prepared"
    PLEDGED = "pledged"
    CLAIMING = "claiming"
    CLAIMED = "claimed"
    REFUSED = "refused"
    NEVER_PREPARED = "never-prepared"

    @property
    def decided(self) -> bool:
        """Whether this side's question is answered for good."""
        return self in _DECIDED


_DECIDED = frozenset({Record.KEPT, Record.GIVEN, Record.CLAIMED, Record.REFUSED, Record.NEVER_PREPARED})


class State(Enum):
    """Where one side of one migration stands; the value of a durable state is that of its record."""

    ABSENT = "absent"
    BEGUN = "begun"
    HANDING = "handing"
    STOPPED = "stopped"
    """The proof can be given."""
    SWITCHED = "switched"
    """The proof can be given, and pages are still to be sent (post-copy)."""
    SILENT = "silent"
    """The hypervisor does not say what became of the transfer."""
    BEREFT = "bereft"
    """The guest's process is gone, and no proof can be given any more."""
    KEPT = "kept"
    GIVEN = "given"
    PREPARING = "preparing"
    PREPARED = "prepared"
    PLEDGED = "pledged"
    CLAIMING = "claiming"
    CLAIMED = "claimed"
    REFUSED = "refused"
    NEVER_PREPARED = "never-prepared"


SOURCE_STATES = frozenset(
    {
        State.BEGUN,
        State.HANDING,
        State.STOPPED,
        State.SWITCHED,
        State.SILENT,
        State.BEREFT,
        State.KEPT,
        State.GIVEN,
    }
)
"""Where a source stands; ``absent`` is either side's, and the others are a destination's."""


class Input(Enum):
    """What can happen to one side of one migration."""

    # At the source.
    BEGIN = "begin"
    PERFORM = "perform"
    GIVE_UP = "give-up"
    PROVED = "proved"
    STAYED = "stayed"
    UNCLEAR = "unclear"
    GONE = "gone"
    PLEDGED = "pledged"
    SWITCHED = "switched"
    SERVED = "served"
    CLAIM = "claim"
    REFUSAL = "refusal"
    # At the destination.
    PREPARE = "prepare"
    RECEIVER_UP = "receiver-up"
    RECEIVER_FAILED = "receiver-failed"
    GO = "go"
    CANCEL = "cancel"
    NO_PROOF = "no-proof"
    PLEDGE = "pledge"
    RUN_AGAIN = "run-again"
    RAN = "ran"
    NEVER_RAN = "never-ran"
    # At either: the other side asks; a decided row whose last actions may not have been done; a person says that the
    # other host and the guest on it are lost.
    ASK = "ask"
    RESTART = "restart"
    WRITTEN_OFF = "written-off"


class Action(Enum):
    """What a step does to the world."""

    TRANSFER = "transfer"
    CANCEL_TRANSFER = "cancel-transfer"
    SWITCH = "switch"
    SERVE_PAGES = "serve-pages"
    RESUME = "resume"
    DESTROY_COPY = "destroy-copy"
    START_RECEIVER = "start-receiver"
    RUN_GUEST = "run-guest"
    DESTROY_RECEIVER = "destroy-receiver"
    ADOPT = "adopt"
    SETTLE = "settle"


class PaperKind(Enum):
    """What a paper says."""

    PASSPORT = "passport"
    RECEIPT = "receipt"
    PROOF = "proof"
    NO_PROOF = "no-proof"
    KEPT = "kept"
    GIVEN = "given"
    SWITCH = "switch"
    PLEDGE = "pledge"
    CANCEL = "cancel"
    ASK = "ask"
    CLAIM = "claim"
    REFUSAL = "refusal"
    PENDING = "pending"
    NEVER_PREPARED = "never-prepared"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What follows from an input: a durable record, then actions, then an answer."""

    state: State
    record: Record | None = None
    actions: tuple[Action, ...] = ()
    answer: PaperKind | None = None


_KEEP = Step(
    state=State.KEPT, record=Record.KEPT, actions=(Action.RESUME, Action.SETTLE), answer=PaperKind.KEPT
)
_LET_GO = Step(
    state=State.GIVEN,
    record=Record.GIVEN,
    actions=(Action.DESTROY_COPY, Action.SETTLE),
    answer=PaperKind.GIVEN,
)
_GIVE_THE_REST = Step(state=State.GIVEN, record=Record.GIVEN, actions=(Action.SERVE_PAGES,))
_RUN = Step(state=State.CLAIMING, record=Record.CLAIMING, actions=(Action.RUN_GUEST,))
_REFUSE = Step(
    state=State.REFUSED,
    record=Record.REFUSED,
    actions=(Action.DESTROY_RECEIVER, Action.SETTLE),
    answer=PaperKind.REFUSAL,
)
_CLAIM = Step(
    state=State.CLAIMED,
    record=Record.CLAIMED,
    actions=(Action.ADOPT, Action.SETTLE),
    answer=PaperKind.CLAIM,
)
_BAR = Step(
    state=State.NEVER_PREPARED,
    record=Record.NEVER_PREPARED,
    actions=(Action.SETTLE,),
    answer=PaperKind.NEVER_PREPARED,
)


def _again(state: State, answer: PaperKind) -> Step:
    return Step(state=state, answer=answer)


_PENDING = _again(State.CLAIMING, PaperKind.PENDING)
_PLEDGED = _again(State.PLEDGED, PaperKind.PENDING)
_CLAIMED = _again(State.CLAIMED, PaperKind.CLAIM)
_REFUSED = _again(State.REFUSED, PaperKind.REFUSAL)
_BARRED = _again(State.NEVER_PREPARED, PaperKind.NEVER_PREPARED)
_KEPT = _again(State.KEPT, PaperKind.KEPT)
_GIVEN = _again(State.GIVEN, PaperKind.GIVEN)

TABLE: Mapping[tuple[State, Input], Step] = {
    # Source.
    (State.ABSENT, Input.BEGIN): Step(state=State.BEGUN, record=Record.BEGUN, answer=PaperKind.PASSPORT),
    (State.BEGUN, Input.PERFORM): Step(
        state=State.HANDING, record=Record.HANDING, actions=(Action.TRANSFER,)
    ),
    (State.BEGUN, Input.GIVE_UP): _KEEP,
    (State.BEGUN, Input.REFUSAL): _KEEP,
    (State.BEGUN, Input.ASK): _again(State.BEGUN, PaperKind.PENDING),
    (State.HANDING, Input.PROVED): Step(state=State.STOPPED, answer=PaperKind.PROOF),
    (State.HANDING, Input.STAYED): _KEEP,
    (State.HANDING, Input.UNCLEAR): Step(state=State.SILENT, answer=PaperKind.ASK),
    (State.HANDING, Input.GONE): Step(state=State.BEREFT, answer=PaperKind.NO_PROOF),
    (State.HANDING, Input.GIVE_UP): Step(state=State.HANDING, actions=(Action.CANCEL_TRANSFER,)),
    (State.HANDING, Input.REFUSAL): Step(state=State.HANDING, actions=(Action.CANCEL_TRANSFER,)),
    (State.HANDING, Input.ASK): _again(State.HANDING, PaperKind.PENDING),
    (State.HANDING, Input.PLEDGED): Step(state=State.HANDING, actions=(Action.SWITCH,)),
    (State.HANDING, Input.SWITCHED): Step(state=State.SWITCHED, answer=PaperKind.PROOF),
    (State.STOPPED, Input.CLAIM): _LET_GO,
    (State.STOPPED, Input.REFUSAL): _KEEP,
    (State.STOPPED, Input.ASK): _again(State.STOPPED, PaperKind.PROOF),
    (State.STOPPED, Input.WRITTEN_OFF): _LET_GO,
    (State.SILENT, Input.PROVED): Step(state=State.STOPPED, answer=PaperKind.PROOF),
    (State.SILENT, Input.SWITCHED): Step(state=State.SWITCHED, answer=PaperKind.PROOF),
    (State.SILENT, Input.STAYED): _KEEP,
    (State.SILENT, Input.GONE): Step(state=State.BEREFT, answer=PaperKind.NO_PROOF),
    (State.SILENT, Input.GIVE_UP): Step(state=State.SILENT, actions=(Action.CANCEL_TRANSFER,)),
    (State.SILENT, Input.CLAIM): _GIVE_THE_REST,
    (State.SILENT, Input.REFUSAL): _KEEP,
    (State.SILENT, Input.ASK): _again(State.SILENT, PaperKind.PENDING),
    (State.SILENT, Input.WRITTEN_OFF): _LET_GO,
    (State.BEREFT, Input.CLAIM): _LET_GO,
    (State.BEREFT, Input.REFUSAL): _KEEP,
    (State.BEREFT, Input.ASK): _again(State.BEREFT, PaperKind.NO_PROOF),
    (State.BEREFT, Input.WRITTEN_OFF): _LET_GO,
    (State.SWITCHED, Input.CLAIM): _GIVE_THE_REST,
    (State.SWITCHED, Input.REFUSAL): _KEEP,
    (State.SWITCHED, Input.ASK): _again(State.SWITCHED, PaperKind.PROOF),
    (State.SWITCHED, Input.WRITTEN_OFF): _LET_GO,
    (State.KEPT, Input.RESTART): replace(_KEEP, record=None),
    (State.KEPT, Input.PERFORM): _KEPT,
    (State.KEPT, Input.GIVE_UP): _KEPT,
    (State.KEPT, Input.REFUSAL): _KEPT,
    (State.KEPT, Input.ASK): _KEPT,
    (State.GIVEN, Input.RESTART): replace(_GIVE_THE_REST, record=None),
    (State.GIVEN, Input.SERVED): replace(_LET_GO, record=None),
    (State.GIVEN, Input.WRITTEN_OFF): _LET_GO,
    (State.GIVEN, Input.CLAIM): _GIVEN,
    (State.GIVEN, Input.GIVE_UP): _GIVEN,
    (State.GIVEN, Input.ASK): _again(State.GIVEN, PaperKind.NO_PROOF),
    # Destination.
    (State.ABSENT, Input.PREPARE): Step(state=State.PREPARING, actions=(Action.START_RECEIVER,)),
    (State.ABSENT, Input.ASK): _BAR,
    (State.ABSENT, Input.CANCEL): _BAR,
    (State.ABSENT, Input.NO_PROOF): _BAR,
    (State.PREPARING, Input.RECEIVER_UP): Step(
        state=State.PREPARED, record=Record.PREPARED, answer=PaperKind.RECEIPT
    ),
    (State.PREPARING, Input.RECEIVER_FAILED): replace(_BAR, actions=(Action.DESTROY_RECEIVER, Action.SETTLE)),
    (State.PREPARED, Input.GO): _RUN,
    (State.PREPARED, Input.CANCEL): _REFUSE,
    (State.PREPARED, Input.NO_PROOF): _REFUSE,
    (State.PREPARED, Input.WRITTEN_OFF): _REFUSE,
    (State.PREPARED, Input.ASK): _again(State.PREPARED, PaperKind.PENDING),
    (State.PREPARED, Input.RAN): _CLAIM,
    (State.PREPARED, Input.PLEDGE): Step(state=State.PLEDGED, record=Record.PLEDGED, answer=PaperKind.PLEDGE),
    (State.PLEDGED, Input.PLEDGE): _again(State.PLEDGED, PaperKind.PLEDGE),
    (State.PLEDGED, Input.GO): _RUN,
    (State.PLEDGED, Input.CANCEL): _PLEDGED,
    (State.PLEDGED, Input.ASK): _PLEDGED,
    (State.PLEDGED, Input.NO_PROOF): _REFUSE,
    (State.PLEDGED, Input.NEVER_RAN): _REFUSE,
    (State.PLEDGED, Input.WRITTEN_OFF): _REFUSE,
    (State.PLEDGED, Input.RAN): _CLAIM,
    (State.CLAIMING, Input.RUN_AGAIN): Step(state=State.CLAIMING, actions=(Action.RUN_GUEST,)),
    (State.CLAIMING, Input.RAN): _CLAIM,
    (State.CLAIMING, Input.NEVER_RAN): _REFUSE,
    (State.CLAIMING, Input.GO): _PENDING,
    (State.CLAIMING, Input.CANCEL): _PENDING,
    (State.CLAIMING, Input.NO_PROOF): _PENDING,
    (State.CLAIMING, Input.ASK): _PENDING,
    (State.CLAIMED, Input.RESTART): replace(_CLAIM, record=None),
    (State.CLAIMED, Input.GO): _CLAIMED,
    (State.CLAIMED, Input.CANCEL): _CLAIMED,
    (State.CLAIMED, Input.NO_PROOF): _CLAIMED,
    (State.CLAIMED, Input.ASK): _CLAIMED,
    (State.REFUSED, Input.RESTART): replace(_REFUSE, record=None),
    (State.REFUSED, Input.GO): _REFUSED,
    (State.REFUSED, Input.CANCEL): _REFUSED,
    (State.REFUSED, Input.NO_PROOF): _REFUSED,
    (State.REFUSED, Input.ASK): _REFUSED,
    (State.NEVER_PREPARED, Input.PREPARE): _BARRED,
    (State.NEVER_PREPARED, Input.ASK): _BARRED,
    (State.NEVER_PREPARED, Input.CANCEL): _BARRED,
    (State.NEVER_PREPARED, Input.NO_PROOF): _BARRED,
    (State.NEVER_PREPARED, Input.RESTART): replace(
        _BAR, record=None, actions=(Action.DESTROY_RECEIVER, Action.SETTLE)
    ),
}
"""The protocol.  A pair that is not here is not allowed: :func:`step` says so and nothing happens."""


QUESTIONS: Mapping[State, PaperKind] = {
    State.STOPPED: PaperKind.PROOF,
    State.SWITCHED: PaperKind.PROOF,
    State.BEREFT: PaperKind.NO_PROOF,
    State.SILENT: PaperKind.ASK,
    State.PLEDGED: PaperKind.ASK,
}
"""States in which a side cannot decide alone, and what it asks the other with."""


class OutOfOrderError(Exception):
    """An input that the table does not allow in this state; nothing was done."""

    def __init__(self, state: State, given: Input) -> None:
        allowed = ", ".join(sorted(i.value for s, i in TABLE if s is state)) or "nothing"
        super().__init__(f"{given.value} is not allowed in state {state.value}, which allows {allowed}")
        self.state = state
        self.given = given


def step(state: State, given: Input) -> Step:
    """Look up what follows from an input.

    :raises OutOfOrderError: the table has no such pair.
    """
    found = TABLE.get((state, given))
    if found is None:
        raise OutOfOrderError(state, given)
    return found


def fall_back(record: Record) -> State:
    """State in which a side stands after a restart, by its journal alone."""
    return State(record.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """Names one ``prepared`` record: the destination's journal and the sequence number of the write."""

    journal_id: str
    sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """What one side tells the other; it names what it is about (rule 1).

    :param reason: for people; nothing is decided by it.
    """

    kind: PaperKind
    migration_id: MigrationId
    generation: int
    receipt: Receipt | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationRow:
    """One migration on one side, as the journal keeps it.

    :param sequence: of the journal's last write to this row.
    :param peer_address: connection URI by which the other side is asked.
    :param process: identity of the guest's process (source) or receiver (destination), opaque, given by the driver.
    :param settled: the record's last actions are done.
    :param boot_id: of the host at the last write.
    :param extra: what the engine needs to finish after a restart: texts and Booleans only.
    :param testimony: what a person brought as evidence, and who said it: for people, nothing is decided by it.
    """

    side: Side
    migration_id: MigrationId
    generation: int
    uuid: DomainUUID
    name: str
    record: Record
    sequence: int = 0
    receipt: Receipt | None = None
    peer_address: str = ""
    process: str = ""
    arrives_paused: bool = False
    settled: bool = False
    reason: str = ""
    boot_id: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    testimony: str = ""

    def paper(self, kind: PaperKind) -> Paper:
        """Write a paper about this migration."""
        return Paper(
            kind=kind,
            migration_id=self.migration_id,
            generation=self.generation,
            receipt=self.receipt,
            reason=self.reason,
        )


def names(row: MigrationRow, paper: Paper) -> bool:
    """Whether a paper is about this row: id, generation, and the receipt where either holds one.

    A source that has not handed over holds no receipt, so any paper that carries one is about something later.
    """
    return (
        row.migration_id == paper.migration_id
        and row.generation == paper.generation
        and row.receipt == paper.receipt
    )


def admit_question(row: MigrationRow | None, paper: Paper) -> Input | PaperKind:
    """What a destination makes of finish, cancel or a question: an input of the table, or an answer at once.

    :param row: the journal's row of that id, or None.
    :param paper: a proof asks for the claim; ``kept`` and ``cancel`` ask for the refusal; anything else only asks.
    """
    if row is None:
        # Rule 6: an id we do not know, shown with a receipt, means that this journal has lost something.
        if paper.receipt is not None:
            return PaperKind.UNKNOWN
    elif row.generation != paper.generation or (paper.receipt is not None and paper.receipt != row.receipt):
        return PaperKind.UNKNOWN
    match paper.kind:
        case PaperKind.PROOF:
            # Rule 1: a proof that names no receipt is about no receiver.
            return Input.GO if row is not None and names(row, paper) else PaperKind.UNKNOWN
        case PaperKind.KEPT | PaperKind.NO_PROOF:
            return Input.NO_PROOF
        case PaperKind.SWITCH:
            return Input.PLEDGE if row is not None and names(row, paper) else PaperKind.UNKNOWN
        case PaperKind.CANCEL:
            return Input.CANCEL
        case _:
            return Input.ASK


def admit_inquiry(row: MigrationRow | None, paper: Paper) -> Input | PaperKind:
    """What a source makes of a destination's question: an input of the table, or an answer at once.

    A source that was never told to perform has not seen the receipt that the destination shows.
    """
    if row is None or row.migration_id != paper.migration_id or row.generation != paper.generation:
        return PaperKind.UNKNOWN
    if row.receipt is not None and row.receipt != paper.receipt:
        return PaperKind.UNKNOWN
    return Input.ASK


def admit_answer(row: MigrationRow, paper: Paper, *, newest: bool) -> Input | None:
    """What a source makes of the destination's answer: an input of the table, or None where it decides nothing.

    :param newest: whether the row has the highest generation that this host knows of the domain.
    """
    if not newest or not names(row, paper):
        return None
    match paper.kind:
        case PaperKind.CLAIM:
            return Input.CLAIM
        case PaperKind.REFUSAL:
            return Input.REFUSAL
        case PaperKind.PLEDGE:
            return Input.PLEDGED
        case _:
            return None


def recover(row: MigrationRow, evidence: Evidence) -> Input | None:
    """Decide what a restarted host does with an open row: pure, and safe to do twice.

    :returns: the next input of the table, or None where the evidence does not allow one yet (gather it again, or ask
        a person).  ``GIVE_UP`` on a ``handing`` row means: cancel what is still being sent, then gather again.
    """
    if row.settled:
        return None
    match row.record:
        case Record.BEGUN | Record.HANDING:
            return _recover_source(row.record, evidence)
        case Record.PREPARED:
            # A running receiver is a claim, whatever the journal says (rule 3).
            match evidence.guest:
                case GuestEvidence.RUNNING:
                    return Input.RAN
                case GuestEvidence.STOPPED | GuestEvidence.HALTED | GuestEvidence.GONE:
                    # It was never told to run: ``claiming`` is written before that.
                    return Input.CANCEL
                case GuestEvidence.UNKNOWN:
                    return None
                case _:
                    assert_never(evidence.guest)
        case Record.PLEDGED:
            match evidence.guest:
                case GuestEvidence.RUNNING:
                    return Input.RAN
                case GuestEvidence.GONE:
                    # ``claiming`` is written before it may run.
                    return Input.NEVER_RAN
                case GuestEvidence.STOPPED | GuestEvidence.HALTED | GuestEvidence.UNKNOWN:
                    return None  # the source knows whether there is a proof
                case _:
                    assert_never(evidence.guest)
        case Record.CLAIMING:
            match evidence.guest:
                case GuestEvidence.RUNNING | GuestEvidence.HALTED:
                    return Input.RAN
                case GuestEvidence.STOPPED:
                    return Input.RUN_AGAIN
                case GuestEvidence.GONE:
                    # Nobody can tell whether it ran; only a guest that was to stay paused certainly did not.
                    return Input.NEVER_RAN if row.arrives_paused else Input.RAN
                case GuestEvidence.UNKNOWN:
                    return None
                case _:
                    assert_never(evidence.guest)
        case Record.KEPT | Record.GIVEN | Record.CLAIMED | Record.REFUSED | Record.NEVER_PREPARED:
            return Input.RESTART
        case _:
            assert_never(row.record)


def _recover_source(record: Record, evidence: Evidence) -> Input | None:
    if record is Record.BEGUN:
        return _recover_begun(evidence)
    if evidence.guest is GuestEvidence.GONE:
        return Input.GONE
    match evidence.transfer:
        case TransferEvidence.ACTIVE:
            return Input.GIVE_UP
        case TransferEvidence.NONE | TransferEvidence.FAILED:
            return Input.STAYED
        case TransferEvidence.COMPLETED:
            # QEMU keeps saying ``completed`` after somebody resumed the guest (experiment 2): running means kept.
            return Input.STAYED if evidence.guest is GuestEvidence.RUNNING else Input.PROVED
        case TransferEvidence.SWITCHED:
            return Input.SWITCHED
        case TransferEvidence.UNKNOWN:
            return Input.STAYED if evidence.guest is GuestEvidence.RUNNING else None
        case _:
            assert_never(evidence.transfer)


def _recover_begun(evidence: Evidence) -> Input | None:
    """Give up; a transfer that went on without a receipt could never be claimed, and nobody begins one."""
    if evidence.guest is GuestEvidence.GONE:
        return Input.GIVE_UP
    match evidence.transfer:
        case TransferEvidence.NONE | TransferEvidence.FAILED | TransferEvidence.ACTIVE:
            return Input.GIVE_UP
        case TransferEvidence.COMPLETED | TransferEvidence.SWITCHED | TransferEvidence.UNKNOWN:
            return None
        case _:
            assert_never(evidence.transfer)


# Cookies: papers as opaque, bounded bytes.


@dataclass(frozen=True, kw_only=True, slots=True)
class Cookie:
    """A paper on its way, with what the other side needs beside it.

    :param address: connection URI by which the sender can be asked.
    :param extra: small texts for the other side's engine and driver.
    """

    paper: Paper
    address: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def value(self, key: str, default: str = "") -> str:
        """One text of ``extra``."""
        return dict(self.extra).get(key, default)


def encode_cookie(cookie: Cookie) -> bytes:
    """Write a cookie.

    :raises PaperError: it would be longer than :data:`MAX_COOKIE_BYTES`.
    """
    paper = cookie.paper
    content: dict[str, Any] = {
        "ferryman": _FORMAT,
        "paper": paper.kind.value,
        "id": paper.migration_id,
        "generation": paper.generation,
        "address": cookie.address,
        "reason": paper.reason,
        "extra": dict(cookie.extra),
    }
    if paper.receipt is not None:
        content["receipt"] = [paper.receipt.journal_id, paper.receipt.sequence]
    data = json.dumps(content, separators=(",", ":")).encode()
    if len(data) > MAX_COOKIE_BYTES:
        raise PaperError(f"the cookie would be {len(data)} bytes, more than {MAX_COOKIE_BYTES}")
    return data


def decode_cookie(data: bytes) -> Cookie:
    """Read a cookie, believing nothing.

    :raises PaperError: not Ferryman's, damaged, too long, or of a newer format.
    """
    if not isinstance(data, bytes):
        raise PaperError(f"a cookie is bytes, not {type(data).__name__}")
    if len(data) > MAX_COOKIE_BYTES:
        raise PaperError(f"the cookie has {len(data)} bytes, more than {MAX_COOKIE_BYTES}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PaperError("the cookie is not Ferryman's: the other end must be Ferryman too") from error
    if not isinstance(content, dict) or "ferryman" not in content:
        raise PaperError("the cookie is not Ferryman's: the other end must be Ferryman too")
    if type(content["ferryman"]) is not int or content["ferryman"] != _FORMAT:
        raise PaperError(
            f"the cookie has format {content['ferryman']!r:.20}, but this Ferryman reads format {_FORMAT}"
        )
    try:
        kind = PaperKind(_text(content, "paper"))
    except ValueError as error:
        raise PaperError("the cookie names a paper that this Ferryman does not know") from error
    migration_id = _text(content, "id")
    if len(migration_id) != 32 or set(migration_id) - set("0123456789abcdef"):
        raise PaperError("the cookie's migration id is not 32 hexadecimal digits")
    extra = content.get("extra", {})
    if not isinstance(extra, dict) or not all(isinstance(value, str) for value in extra.values()):
        raise PaperError("the cookie's extra part is not a table of texts")
    return Cookie(
        paper=Paper(
            kind=kind,
            migration_id=MigrationId(migration_id),
            generation=_count(content.get("generation"), "generation"),
            receipt=_receipt(content.get("receipt")),
            reason=_text(content, "reason"),
        ),
        address=_text(content, "address"),
        extra=tuple(extra.items()),
    )


def _text(content: dict[str, Any], key: str) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise PaperError(f"the cookie's {key} is not a text")
    return value


def _count(value: object, what: str) -> int:
    if type(value) is not int or not 1 <= value < 1 << 62:
        raise PaperError(f"the cookie's {what} is not a positive whole number")
    return value


def _receipt(value: object) -> Receipt | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise PaperError("the cookie's receipt is not a journal id and a sequence number")
    return Receipt(journal_id=value[0], sequence=_count(value[1], "sequence"))


def with_kind(cookie: bytes, kind: PaperKind) -> bytes:
    """The same paper as one of another kind.

    :raises PaperError: the cookie is none.
    """
    read = decode_cookie(cookie)
    return encode_cookie(Cookie(paper=replace(read.paper, kind=kind), address=read.address))
