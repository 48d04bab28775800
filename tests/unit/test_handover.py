"""The table and the recovery function, against the rules written down a second time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman.errors import PaperError
from ferryman.handover import (
    MAX_COOKIE_BYTES,
    SOURCE_STATES,
    TABLE,
    Action,
    Cookie,
    Input,
    MigrationRow,
    OutOfOrderError,
    Paper,
    PaperKind,
    Receipt,
    Record,
    State,
    admit_answer,
    admit_question,
    decode_cookie,
    encode_cookie,
    fall_back,
    recover,
    step,
)
from ferryman.types import DomainUUID, Evidence, GuestEvidence, MigrationId, Side, TransferEvidence

ID = MigrationId("0123456789abcdef0123456789abcdef")
RECEIPT = Receipt(journal_id="aa" * 16, sequence=7)


def row(record: Record, **changes: object) -> MigrationRow:
    made = MigrationRow(
        side=Side.DESTINATION,
        migration_id=ID,
        generation=3,
        uuid=DomainUUID("u"),
        name="web",
        record=record,
        receipt=RECEIPT,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def paper(kind: PaperKind, **changes: object) -> Paper:
    made = Paper(kind=kind, migration_id=ID, generation=3, receipt=RECEIPT)
    return replace(made, **changes)  # type: ignore[arg-type]


# What each side may do with the guest, by the durable record that must stand before it.
ALLOWED_AFTER = {
    Action.TRANSFER: {Record.HANDING},
    Action.RESUME: {Record.KEPT},
    Action.DESTROY_COPY: {Record.GIVEN},
    Action.RUN_GUEST: {Record.CLAIMING},
    Action.DESTROY_RECEIVER: {Record.REFUSED, Record.NEVER_PREPARED},
    Action.ADOPT: {Record.CLAIMED},
}


WAITING = (State.STOPPED, State.SWITCHED, State.SILENT, State.BEREFT)


def record_of(state: State) -> Record | None:
    try:
        return Record(state.value)
    except ValueError:
        return Record.HANDING if state in WAITING else None


@pytest.mark.parametrize(("pair", "found"), TABLE.items(), ids=lambda value: str(value)[:60])
def test_every_action_follows_the_record_that_allows_it(pair, found) -> None:  # type: ignore[no-untyped-def]
    standing = found.record or record_of(pair[0])
    for action in found.actions:
        if action in ALLOWED_AFTER:
            assert standing in ALLOWED_AFTER[action]


def test_a_decided_side_never_changes_its_mind() -> None:
    for (state, _given), found in TABLE.items():
        record = record_of(state)
        if record is not None and record.decided:
            assert found.state is state
            assert found.record in (None, record)


def test_only_the_refusal_resumes_and_only_the_claim_lets_go_after_the_proof() -> None:
    """And a person's word that the other host and its guest are lost, which lets go and resumes nothing."""
    for state in (State.STOPPED, State.SWITCHED, State.BEREFT):
        leaving = {
            given: found.record for (at, given), found in TABLE.items() if at is state and found.record
        }
        assert leaving == {
            Input.CLAIM: Record.GIVEN,
            Input.REFUSAL: Record.KEPT,
            Input.WRITTEN_OFF: Record.GIVEN,
        }


def test_a_pledge_is_withdrawn_only_by_the_source_by_death_or_by_a_person() -> None:
    refusing = {
        given
        for (at, given), found in TABLE.items()
        if at is State.PLEDGED and found.record is Record.REFUSED
    }
    assert refusing == {Input.NO_PROOF, Input.NEVER_RAN, Input.WRITTEN_OFF}


def test_a_claim_is_told_only_when_claimed_is_durable() -> None:
    for (state, _given), found in TABLE.items():
        if found.answer is PaperKind.CLAIM:
            assert (found.record or record_of(state)) is Record.CLAIMED
        if found.answer is PaperKind.REFUSAL:
            assert (found.record or record_of(state)) is Record.REFUSED
        if found.answer is PaperKind.PROOF:
            assert record_of(state) is Record.HANDING


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("given_", Input)
def test_what_the_table_does_not_hold_is_refused_by_name(state: State, given_: Input) -> None:
    if (state, given_) in TABLE:
        assert step(state, given_) is TABLE[state, given_]
    else:
        with pytest.raises(OutOfOrderError, match=f"{given_.value} is not allowed in state {state.value}"):
            step(state, given_)


def test_every_record_has_a_state_to_fall_back_to() -> None:
    assert {fall_back(record).value for record in Record} == {record.value for record in Record}


G, T = GuestEvidence, TransferEvidence
RECOVERY = [
    # source, from HANDOVER's column "on restart"
    (Record.BEGUN, G.RUNNING, T.NONE, Input.GIVE_UP),
    (Record.BEGUN, G.GONE, T.UNKNOWN, Input.GIVE_UP),
    (Record.BEGUN, G.STOPPED, T.COMPLETED, None),
    (Record.HANDING, G.RUNNING, T.NONE, Input.STAYED),
    (Record.HANDING, G.RUNNING, T.FAILED, Input.STAYED),
    (Record.HANDING, G.STOPPED, T.FAILED, Input.STAYED),
    (Record.HANDING, G.RUNNING, T.ACTIVE, Input.GIVE_UP),
    (Record.HANDING, G.STOPPED, T.ACTIVE, Input.GIVE_UP),
    (Record.HANDING, G.RUNNING, T.COMPLETED, Input.STAYED),
    (Record.HANDING, G.STOPPED, T.COMPLETED, Input.PROVED),
    (Record.HANDING, G.GONE, T.UNKNOWN, Input.GONE),
    (Record.HANDING, G.STOPPED, T.SWITCHED, Input.SWITCHED),
    (Record.HANDING, G.STOPPED, T.UNKNOWN, None),
    (Record.HANDING, G.UNKNOWN, T.UNKNOWN, None),
    (Record.KEPT, G.UNKNOWN, T.UNKNOWN, Input.RESTART),
    (Record.GIVEN, G.UNKNOWN, T.UNKNOWN, Input.RESTART),
    (Record.GIVEN, G.STOPPED, T.SWITCHED, Input.RESTART),
    (Record.GIVEN, G.STOPPED, T.COMPLETED, Input.RESTART),
    # destination
    (Record.PLEDGED, G.RUNNING, T.UNKNOWN, Input.RAN),
    (Record.PLEDGED, G.STOPPED, T.UNKNOWN, None),
    (Record.PLEDGED, G.HALTED, T.UNKNOWN, None),
    (Record.PLEDGED, G.GONE, T.UNKNOWN, Input.NEVER_RAN),
    (Record.PREPARED, G.RUNNING, T.UNKNOWN, Input.RAN),
    (Record.PREPARED, G.STOPPED, T.UNKNOWN, Input.CANCEL),
    (Record.PREPARED, G.HALTED, T.UNKNOWN, Input.CANCEL),
    (Record.PREPARED, G.GONE, T.UNKNOWN, Input.CANCEL),
    (Record.PREPARED, G.UNKNOWN, T.UNKNOWN, None),
    (Record.CLAIMING, G.STOPPED, T.UNKNOWN, Input.RUN_AGAIN),
    (Record.CLAIMING, G.RUNNING, T.UNKNOWN, Input.RAN),
    (Record.CLAIMING, G.HALTED, T.UNKNOWN, Input.RAN),
    (Record.CLAIMING, G.GONE, T.UNKNOWN, Input.RAN),
    (Record.CLAIMING, G.UNKNOWN, T.UNKNOWN, None),
    (Record.CLAIMED, G.GONE, T.UNKNOWN, Input.RESTART),
    (Record.REFUSED, G.STOPPED, T.UNKNOWN, Input.RESTART),
]


@pytest.mark.parametrize(("record", "guest", "transfer", "expected"), RECOVERY)
def test_recovery(
    record: Record, guest: GuestEvidence, transfer: TransferEvidence, expected: Input | None
) -> None:
    assert recover(row(record), Evidence(guest=guest, transfer=transfer)) is expected


@pytest.mark.parametrize("record", Record)
@pytest.mark.parametrize("guest", GuestEvidence)
@pytest.mark.parametrize("transfer", TransferEvidence)
def test_recovery_only_asks_for_what_the_table_allows(
    record: Record, guest: GuestEvidence, transfer: TransferEvidence
) -> None:
    given_ = recover(row(record), Evidence(guest=guest, transfer=transfer))
    if given_ is not None:
        step(fall_back(record), given_)
    assert recover(row(record, settled=True), Evidence(guest=guest, transfer=transfer)) is None


def test_a_guest_that_was_to_stay_paused_never_ran_when_its_receiver_is_gone() -> None:
    assert recover(row(Record.CLAIMING, arrives_paused=True), Evidence(guest=G.GONE)) is Input.NEVER_RAN


def test_questions() -> None:
    known = row(Record.PREPARED)
    assert admit_question(known, paper(PaperKind.PROOF)) is Input.GO
    assert admit_question(known, paper(PaperKind.CANCEL)) is Input.CANCEL
    assert admit_question(known, paper(PaperKind.KEPT)) is Input.NO_PROOF
    assert admit_question(known, paper(PaperKind.NO_PROOF)) is Input.NO_PROOF
    assert admit_question(known, paper(PaperKind.SWITCH)) is Input.PLEDGE
    assert admit_question(known, paper(PaperKind.SWITCH, receipt=None)) is PaperKind.UNKNOWN
    assert admit_question(known, paper(PaperKind.ASK)) is Input.ASK
    # A lost journal is never taken for a refusal, nor a foreign paper for ours.
    assert admit_question(None, paper(PaperKind.PROOF)) is PaperKind.UNKNOWN
    assert admit_question(None, paper(PaperKind.ASK)) is PaperKind.UNKNOWN
    assert admit_question(None, paper(PaperKind.ASK, receipt=None)) is Input.ASK
    assert admit_question(known, paper(PaperKind.PROOF, generation=4)) is PaperKind.UNKNOWN
    other = Receipt(journal_id="bb" * 16, sequence=7)
    assert admit_question(known, paper(PaperKind.PROOF, receipt=other)) is PaperKind.UNKNOWN
    assert admit_question(known, paper(PaperKind.PROOF, receipt=None)) is PaperKind.UNKNOWN


@pytest.mark.parametrize(
    "changes",
    [
        {"migration_id": MigrationId("f" * 32)},
        {"generation": 2},
        {"receipt": None},
        {"receipt": Receipt(journal_id="aa" * 16, sequence=8)},
    ],
)
@pytest.mark.parametrize("kind", [PaperKind.CLAIM, PaperKind.REFUSAL])
def test_an_answer_about_anything_else_decides_nothing(kind: PaperKind, changes: dict[str, object]) -> None:
    mine = row(Record.HANDING, side=Side.SOURCE)
    assert admit_answer(mine, paper(kind), newest=True) is Input(kind.value)
    assert admit_answer(mine, paper(kind), newest=False) is None
    assert admit_answer(mine, paper(kind, **changes), newest=True) is None


texts = st.text(max_size=40)
cookies = st.builds(
    Cookie,
    paper=st.builds(
        Paper,
        kind=st.sampled_from(PaperKind),
        migration_id=st.text("0123456789abcdef", min_size=32, max_size=32).map(MigrationId),
        generation=st.integers(1, 2**40),
        receipt=st.none() | st.builds(Receipt, journal_id=texts, sequence=st.integers(1, 2**40)),
        reason=texts,
    ),
    address=texts,
    extra=st.dictionaries(texts, texts, max_size=4).map(lambda table: tuple(table.items())),
)


@given(cookies)
def test_cookies_round_trip(cookie: Cookie) -> None:
    assert decode_cookie(encode_cookie(cookie)) == cookie


@given(st.binary(max_size=200))
def test_garbage_is_no_cookie(data: bytes) -> None:
    with pytest.raises(PaperError):
        decode_cookie(data)


@given(cookies, st.data())
def test_a_truncated_cookie_is_no_cookie(cookie: Cookie, data: st.DataObject) -> None:
    whole = encode_cookie(cookie)
    with pytest.raises(PaperError):
        decode_cookie(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(
    cookies,
    st.sampled_from(["ferryman", "paper", "id", "generation", "address", "reason", "extra", "receipt"]),
    st.sampled_from([0, -1, 1.5, [], [1], {"a": 1}, "x", True, 2**70, [["a"], 1], ["a", "b"]]),
)
def test_a_cookie_of_wrong_types_is_refused_or_read(cookie: Cookie, key: str, value: object) -> None:
    content = json.loads(encode_cookie(cookie))
    content[key] = value
    try:
        decode_cookie(json.dumps(content).encode())
    except PaperError:
        return
    assert (key, value) in [("address", "x"), ("reason", "x")] or (key, value) == ("extra", {})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 60_000,
        b'{"ferryman":1}',
        b'{"ferryman":2}',
        b"x" * (MAX_COOKIE_BYTES + 1),
        b'{"a":' * 10_000,
    ],
)
def test_hostile_cookies(data: bytes) -> None:
    with pytest.raises(PaperError):
        decode_cookie(data)


def test_a_cookie_that_would_be_too_long_is_not_written() -> None:
    huge = Cookie(paper=paper(PaperKind.ASK), address="x" * MAX_COOKIE_BYTES)
    with pytest.raises(PaperError, match="more than 65536"):
        encode_cookie(huge)


def test_a_sides_states_lead_only_to_its_own() -> None:
    for (state, _given), found in TABLE.items():
        if state is not State.ABSENT:
            assert (state in SOURCE_STATES) is (found.state in SOURCE_STATES)
