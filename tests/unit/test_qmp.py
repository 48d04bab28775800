"""The QMP codec: the same messages however the bytes are cut, and one kind of error for everything else."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ferryman_qemu.qmp import (
    EVIDENCE_BYTES,
    MAX_LINE_BYTES,
    Event,
    Failure,
    Greeting,
    Message,
    QMPCodec,
    QMPProtocolError,
    Reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# How slowly a loaded machine makes up examples says nothing about the codec.
patient = [HealthCheck.too_slow]
many = settings(max_examples=150, deadline=None, suppress_health_check=patient)

json_numbers = st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False)
json_scalars = st.none() | st.booleans() | json_numbers | st.text()
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_objects: st.SearchStrategy[dict[str, Any]] = st.dictionaries(st.text(), json_values, max_size=4)
unknown_members = st.dictionaries(
    st.sampled_from(["x-new", "__org.example_extra", ""]), json_values, max_size=2
)
ids = st.integers(0, (1 << 63) - 1)


@st.composite
def greetings(draw: st.DrawFn) -> tuple[dict[str, Any], Message]:
    major, minor, micro = draw(st.tuples(*[st.integers(0, 99)] * 3))
    package, capabilities = draw(st.text()), draw(st.lists(st.sampled_from(["oob", "new", 7])))
    numbers = {"micro": micro, "minor": minor, "major": major}
    wire = {"QMP": {"version": {"qemu": numbers, "package": package}, "capabilities": capabilities}}
    return wire, Greeting(version=(major, minor, micro), package=package, oob="oob" in capabilities)


@st.composite
def replies(draw: st.DrawFn) -> tuple[dict[str, Any], Message]:
    call_id, value = draw(ids), draw(json_values)
    return {"return": value, "id": call_id}, Reply(id=call_id, value=value)


@st.composite
def failures(draw: st.DrawFn) -> tuple[dict[str, Any], Message]:
    call_id, kind, text = draw(st.none() | ids), draw(st.text()), draw(st.text())
    wire: dict[str, Any] = {"error": {"class": kind, "desc": text}}
    if call_id is not None:
        wire["id"] = call_id
    return wire, Failure(id=call_id, error_class=kind, description=text)


@st.composite
def events(draw: st.DrawFn) -> tuple[dict[str, Any], Message]:
    name, data = draw(st.text()), draw(st.none() | json_objects)
    seconds, microseconds = draw(st.integers(0, 1 << 40)), draw(st.integers(0, 999_999))
    wire: dict[str, Any] = {"event": name, "timestamp": {"seconds": seconds, "microseconds": microseconds}}
    if data is not None:
        wire["data"] = data
    return wire, Event(name=name, data=data or {}, timestamp_s=seconds + microseconds / 1e6)


exchanges = st.one_of(greetings(), replies(), failures(), events())


@st.composite
def transcripts(draw: st.DrawFn) -> tuple[list[bytes], list[Message]]:
    """Some messages as lines, with unknown members, any spacing and both kinds of escapes, and what they mean."""
    lines: list[bytes] = []
    meaning: list[Message] = []
    for wire, message in draw(st.lists(exchanges, max_size=5)):
        members = list({**draw(unknown_members), **wire}.items())
        text = json.dumps(
            dict(draw(st.permutations(members))),
            ensure_ascii=draw(st.booleans()),
            indent=None,
            separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :\r")])),
        )
        lines.append(text.encode() + draw(st.sampled_from([b"\n", b"\r\n", b" \t\r\n"])))
        meaning.append(message)
    return lines, meaning


GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "v7"}, '
    b'"capabilities": ["oob"]}}\r\n'
)
TRANSCRIPT = (
    GREETING
    + b'{"return": {}, "id": 1}\r\n'
    + '{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "Ünï €", "data": {"a": [1]}}\n'.encode()
    + b'{"id": 2, "error": {"class": "GenericError", "desc": "\\u20ac no\\n"}}\r\n'
    + b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}\r\n'
    + b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n'
)
MEANING: list[Message] = [
    Greeting(version=(7, 2, 22), package="v7", oob=True),
    Reply(id=1, value={}),
    Event(name="Ünï €", data={"a": [1]}, timestamp_s=1700000000.25),
    Failure(id=2, error_class="GenericError", description="€ no\n"),
    Event(name="STOP", data={}, timestamp_s=-1.0),
    Failure(id=None, error_class="GenericError", description="JSON parse error"),
]


def feed_all(codec: QMPCodec, chunks: Iterable[bytes]) -> list[Message]:
    return [message for chunk in chunks for message in codec.feed(chunk)]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


def test_a_transcript_means_the_same_split_at_every_byte() -> None:
    assert QMPCodec().feed(TRANSCRIPT) == MEANING
    for place in range(len(TRANSCRIPT) + 1):
        codec = QMPCodec()
        assert feed_all(codec, [TRANSCRIPT[:place], TRANSCRIPT[place:]]) == MEANING
        codec.eof()


def test_a_transcript_means_the_same_byte_by_byte_and_each_message_comes_with_its_last_byte() -> None:
    codec = QMPCodec()
    decoded: list[Message] = []
    for index, byte in enumerate(TRANSCRIPT):
        decoded += codec.feed(bytes([byte]))
        assert len(decoded) == TRANSCRIPT[: index + 1].count(b"\n")
    assert decoded == MEANING


@many
@given(transcripts(), st.lists(st.integers(0, 10_000), max_size=20))
def test_messages_do_not_depend_on_how_the_bytes_are_cut(
    transcript: tuple[list[bytes], list[Message]], places: list[int]
) -> None:
    lines, meaning = transcript
    codec = QMPCodec()
    assert feed_all(codec, cut(b"".join(lines), places)) == meaning
    codec.eof()


@many
@given(exchanges, st.data())
def test_a_truncated_message_is_an_error_at_the_end_and_before_a_newline(
    exchange: tuple[dict[str, Any], Message], data: st.DataObject
) -> None:
    line = json.dumps(exchange[0]).encode()
    part = line[: data.draw(st.integers(1, len(line) - 1))]
    codec = QMPCodec()
    assert codec.feed(part) == []
    with pytest.raises(QMPProtocolError, match="ended inside a message") as caught:
        codec.eof()
    assert caught.value.evidence == part[:EVIDENCE_BYTES]
    with pytest.raises(QMPProtocolError):
        QMPCodec().feed(part + b"\n")


@many
@given(st.binary(max_size=300), st.lists(st.integers(0, 1000), max_size=5))
@example(b"\xef\xbb\xbf{}", [])
@example('{"return": 1, "id": 1}'.encode("utf-16"), [])
@example(b'{"return": "\xed\xa0\x80", "id": 1}', [])
@example(b'{"return": ' + b"9" * 5000 + b', "id": 1}', [])
@example(b'{"return": NaN, "id": 1}', [])
@example(b'{"return": -Infinity, "id": 1}', [])
@example(b"", [])
@example(b"\r", [])
@example(b"[]", [])
@example(b"null", [])
@example(b"{}{}", [])
def test_garbage_is_one_kind_of_error(garbage: bytes, places: list[int]) -> None:
    codec = QMPCodec()
    assert codec.feed(GREETING) == MEANING[:1]
    with pytest.raises(QMPProtocolError) as caught:
        feed_all(codec, cut(garbage + b"\n", places))
    assert caught.value.evidence == garbage.split(b"\n")[0][:EVIDENCE_BYTES]
    assert repr(caught.value.evidence) in str(caught.value)


@many
@given(st.binary(min_size=1, max_size=20), st.integers(0, len(TRANSCRIPT) - 1))
def test_damage_in_the_middle_never_leaks_another_error(damage: bytes, place: int) -> None:
    damaged = TRANSCRIPT[:place] + damage + TRANSCRIPT[place + len(damage) :]
    whole, pieces = QMPCodec(), QMPCodec()
    decoded = feed_tolerantly(whole, [damaged])
    assert feed_tolerantly(pieces, cut(damaged, range(0, len(damaged), 7))) == decoded


def feed_tolerantly(codec: QMPCodec, chunks: list[bytes]) -> tuple[list[Message], str]:
    """Everything decoded before the fault, and the fault."""
    decoded: list[Message] = []
    try:
        for chunk in chunks:
            decoded += codec.feed(chunk)
        codec.eof()
    except QMPProtocolError as error:
        return [*decoded, *error.messages], str(error)
    return decoded, ""


@many
@given(st.integers(1, 400), st.integers(1, 500), st.integers(1, 500))
@example(100, 100, 7)
@example(100, 101, 7)
@example(100, 101, 500)
def test_a_line_is_as_long_as_the_limit_or_an_error_at_the_byte_beyond_it(
    limit_bytes: int, line_bytes: int, chunk_bytes: int
) -> None:
    body = b'{"return": {}, "id": 1}'
    line = body + b" " * (line_bytes - len(body))
    codec = QMPCodec(max_line_bytes=limit_bytes)
    chunks = cut(line + b"\n", range(0, len(line), chunk_bytes))
    if len(line) <= limit_bytes:
        assert feed_all(codec, chunks) == [Reply(id=1, value={})]
        assert QMPCodec(max_line_bytes=limit_bytes).feed(line + b"\n") == [Reply(id=1, value={})]
        return
    with pytest.raises(QMPProtocolError, match="line longer than"):
        QMPCodec(max_line_bytes=limit_bytes).feed(line + b"\n")
    fed_bytes = 0
    with pytest.raises(QMPProtocolError, match=f"line longer than {limit_bytes} bytes") as caught:
        for chunk in chunks:
            codec.feed(chunk)
            fed_bytes += len(chunk)
    # Not one chunk later than the line can be known to be too long, whether or not its end is in sight.
    assert fed_bytes <= limit_bytes < fed_bytes + len(chunk)
    assert caught.value.evidence == line[: min(EVIDENCE_BYTES, fed_bytes + len(chunk))]


def test_the_default_limit_holds_without_an_end_of_line_in_sight() -> None:
    codec = QMPCodec()
    chunk = b"x" * 65536
    for _ in range(MAX_LINE_BYTES // len(chunk)):
        assert codec.feed(chunk) == []
    with pytest.raises(QMPProtocolError, match="line longer than 16777216 bytes") as caught:
        codec.feed(b"x")
    assert caught.value.evidence == b"x" * EVIDENCE_BYTES


@pytest.mark.timeout(30)
def test_a_long_line_in_small_pieces_costs_no_quadratic_time() -> None:
    # A codec that copies or rescans what it holds with each piece would move some 500 GB here.
    text = "y" * (8 << 20)
    line = b'{"return": "' + text.encode() + b'", "id": 1}\n'
    codec = QMPCodec()
    assert feed_all(codec, cut(line, range(0, len(line), 64))) == [Reply(id=1, value=text)]


@many
@given(st.integers(1, 3000), st.lists(st.sampled_from(["[", '{"a":']), min_size=1, max_size=3), st.booleans())
@example(100_000, ["["], True)
@example(100_000, ['{"a":'], True)
@example(100_000, ["["], False)
def test_deep_nesting_is_decoded_or_refused_but_never_recurses_out(
    depth: int, openers: list[str], closed: bool
) -> None:
    opened = [openers[level % len(openers)] for level in range(depth)]
    closers = ["]" if opener == "[" else "}" for opener in reversed(opened)]
    nested = "".join(opened) + "1" + "".join(closers if closed else [])
    line = f'{{"return": {nested}, "id": 1}}\n'.encode()
    codec = QMPCodec()
    messages, fault = feed_tolerantly(codec, [line])
    if fault:
        assert messages == []
        assert not closed or depth > 100
    else:
        assert closed
        assert [type(message) for message in messages] == [Reply]


def test_nesting_is_refused_near_the_end_of_the_stack_too() -> None:
    outcomes: set[str] = set()

    def at_depth(levels: int) -> None:
        if levels:
            at_depth(levels - 1)
            return
        line = b'{"return": ' + b"[" * 40 + b"]" * 40 + b', "id": 1}\n'
        try:
            QMPCodec().feed(line)
            outcomes.add("decoded")
        except QMPProtocolError as error:
            outcomes.add(error.reason)

    used = len(_frames())
    for spare in range(20, 120):
        at_depth(sys.getrecursionlimit() - used - spare)
    assert outcomes <= {"decoded", "line nests too deep"}
    assert "decoded" in outcomes


def _frames() -> list[Any]:
    frame: Any = sys._getframe()
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


REQUIRED: list[tuple[dict[str, Any], list[tuple[str, ...]]]] = [
    (
        json.loads(GREETING),
        [
            ("QMP",),
            ("QMP", "capabilities"),
            ("QMP", "version"),
            ("QMP", "version", "package"),
            ("QMP", "version", "qemu"),
            ("QMP", "version", "qemu", "major"),
            ("QMP", "version", "qemu", "minor"),
            ("QMP", "version", "qemu", "micro"),
        ],
    ),
    ({"return": {}, "id": 5}, [("id",)]),
    ({"error": {"class": "GenericError", "desc": "no"}}, [("error",), ("error", "class"), ("error", "desc")]),
    (
        {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}},
        [("event",), ("timestamp",), ("timestamp", "seconds"), ("timestamp", "microseconds")],
    ),
]
MEMBERS = [(message, path) for message, paths in REQUIRED for path in paths]


def with_member(
    message: dict[str, Any], path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]
) -> bytes:
    changed = deepcopy(message)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(changed).encode() + b"\n"


@pytest.mark.parametrize(("message", "path"), MEMBERS, ids=[".".join(path) for _, path in MEMBERS])
def test_every_promised_member_is_required(message: dict[str, Any], path: tuple[str, ...]) -> None:
    assert len(QMPCodec().feed(json.dumps(message).encode() + b"\n")) == 1
    with pytest.raises(QMPProtocolError):
        QMPCodec().feed(with_member(message, path, lambda parent, key: parent.pop(key)))


@settings(max_examples=400, deadline=None, suppress_health_check=patient)
@given(st.sampled_from(MEMBERS), json_values)
@example(MEMBERS[8], True)
@example(MEMBERS[8], 1.0)
@example(MEMBERS[14], True)
@example(MEMBERS[14], 10**400)
@example(MEMBERS[14], 1e308)
@example(MEMBERS[14], -2)
def test_members_of_a_wrong_type_are_refused(
    member: tuple[dict[str, Any], tuple[str, ...]], value: Any
) -> None:
    message, path = member
    present: Any = message
    for key in path:
        present = present[key]
    line = with_member(message, path, lambda parent, key: parent.update({key: value}))
    number = path[-1] in {"seconds", "microseconds"} and type(value) is float
    if type(value) is type(present) or number:
        # The right type may still be a wrong value: an object without its members, a time out of range.
        _, fault = feed_tolerantly(QMPCodec(), [line])
        assert not fault or isinstance(value, dict) or path[0] == "timestamp"
    else:
        with pytest.raises(QMPProtocolError):
            QMPCodec().feed(line)


@pytest.mark.parametrize("data", [None, [], "x", 1, True])
def test_event_data_may_be_missing_but_is_an_object(data: object) -> None:
    with pytest.raises(QMPProtocolError, match="member 'data' is not an object"):
        QMPCodec().feed(
            json.dumps({"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}, "data": data}).encode()
            + b"\n"
        )


@pytest.mark.parametrize("call_id", [None, "7", 7.0, True, [7]])
@pytest.mark.parametrize("body", [{"return": {}}, {"error": {"class": "GenericError", "desc": "no"}}])
def test_an_answer_with_an_id_that_is_no_integer_is_refused(body: dict[str, Any], call_id: object) -> None:
    with pytest.raises(QMPProtocolError, match="member 'id' is not an integer"):
        QMPCodec().feed(json.dumps({**body, "id": call_id}).encode() + b"\n")


@many
@given(
    st.sets(st.sampled_from(["QMP", "return", "error", "event"])).filter(lambda kinds: len(kinds) != 1),
    json_objects,
)
def test_an_object_is_exactly_one_kind_of_message(kinds: set[str], others: dict[str, Any]) -> None:
    message: dict[str, Any] = {
        key: value for key, value in others.items() if key not in {"QMP", "return", "error", "event"}
    }
    for sound, _ in REQUIRED:
        if kinds & sound.keys():
            message |= sound
    with pytest.raises(QMPProtocolError, match="exactly one of"):
        QMPCodec().feed(json.dumps(message).encode() + b"\n")


def test_sound_messages_before_the_fault_in_one_chunk_are_in_the_error() -> None:
    with pytest.raises(QMPProtocolError) as caught:
        QMPCodec().feed(TRANSCRIPT + b"boo\n" + GREETING)
    assert list(caught.value.messages) == MEANING
    assert caught.value.evidence == b"boo"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_dead_codec_stays_dead_and_says_what_killed_it() -> None:
    codec = QMPCodec()
    with pytest.raises(QMPProtocolError, match="not a JSON object"):
        codec.feed(b"[1]\n")
    attempts: list[Callable[[], object]] = [
        lambda: codec.feed(GREETING),
        codec.eof,
        lambda: codec.command("query-status"),
    ]
    for attempt in attempts:
        with pytest.raises(QMPProtocolError, match="dead since it met: line is not a JSON object") as caught:
            attempt()
        assert caught.value.evidence == b"[1]"


def test_the_end_between_messages_is_no_error() -> None:
    codec = QMPCodec()
    codec.eof()
    codec.feed(TRANSCRIPT)
    codec.eof()


def test_commands_are_compact_lines_with_rising_ids() -> None:
    codec = QMPCodec(first_id=41)
    assert codec.command("query-status") == (41, b'{"execute":"query-status","id":41}\n')
    assert codec.command("yank", {"instances": []}, oob=True) == (
        42,
        b'{"exec-oob":"yank","arguments":{"instances":[]},"id":42}\n',
    )
    assert codec.command("x", {}) == (43, b'{"execute":"x","arguments":{},"id":43}\n')
    assert QMPCodec().command("stop")[0] == 1


qemu_text = st.text(
    st.characters(exclude_categories=["Cs"]).filter(
        lambda c: not (0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE)
    )
)
qemu_values = st.recursive(
    st.none() | st.booleans() | json_numbers | qemu_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(qemu_text, inner, max_size=4),
    max_leaves=12,
)


@many
@given(qemu_text, st.none() | st.dictionaries(qemu_text, qemu_values, max_size=4), st.booleans())
def test_a_command_is_one_line_of_utf8_that_says_what_was_asked(
    name: str, arguments: dict[str, Any] | None, oob: bool
) -> None:
    call_id, line = QMPCodec().command(name, arguments, oob=oob)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    expected: dict[str, Any] = {"exec-oob" if oob else "execute": name, "id": call_id}
    if arguments is not None:
        expected["arguments"] = arguments
    assert json.loads(line.decode()) == expected


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("\ud800", ValueError),
        ("a\ufffe", ValueError),
        ("\U0010ffff", ValueError),
        ("\ufdd0", ValueError),
        (deep(100_000), ValueError),
        (b"bytes", TypeError),
        ({1, 2}, TypeError),
        ({("a", "b"): 1}, TypeError),
    ],
    ids=["nan", "inf", "surrogate", "fffe", "10ffff", "fdd0", "deep", "bytes", "set", "key"],
)
def test_arguments_that_qemu_could_not_read_are_refused_and_use_no_id(
    value: object, error: type[Exception]
) -> None:
    codec = QMPCodec()
    with pytest.raises(error):
        codec.command("x", {"a": value})
    assert codec.command("stop") == (1, b'{"execute":"stop","id":1}\n')


@pytest.mark.parametrize("limit_bytes", [0, -1])
def test_a_limit_that_admits_no_line_is_refused(limit_bytes: int) -> None:
    with pytest.raises(ValueError, match="max_line_bytes"):
        QMPCodec(max_line_bytes=limit_bytes)


@pytest.mark.parametrize("first_id", [-1, 1 << 62])
def test_ids_that_qemu_does_not_keep_are_refused(first_id: int) -> None:
    with pytest.raises(ValueError, match="first_id"):
        QMPCodec(first_id=first_id)


# qemu.qmp is QEMU's own client in Python: what it makes of the same bytes.


@pytest.fixture(scope="module")
def peer() -> Any:
    if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
        reason = "the package qemu.qmp is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    import qemu.qmp.message
    import qemu.qmp.models

    return qemu.qmp


def as_peer_reads(peer: Any, line: bytes) -> Message:
    """What qemu.qmp makes of a line, in our words.

    :raises Exception: qemu.qmp's own, where it refuses the line.
    """
    message = peer.message.Message(line, eager=True)
    if "QMP" in message:
        greeting = peer.models.Greeting(dict(message)).QMP
        numbers: Any = greeting.version["qemu"]
        return Greeting(
            version=(numbers["major"], numbers["minor"], numbers["micro"]),
            package=str(greeting.version["package"]),
            oob="oob" in greeting.capabilities,
        )
    if "error" in message:
        response = peer.models.ErrorResponse(dict(message))
        return Failure(id=response.id, error_class=response.error.class_, description=response.error.desc)
    if "event" in message:
        stamp = message["timestamp"]
        absent = stamp == {"seconds": -1, "microseconds": -1}
        timestamp_s = -1.0 if absent else stamp["seconds"] + stamp["microseconds"] / 1e6
        return Event(name=message["event"], data=message.get("data", {}), timestamp_s=timestamp_s)
    return Reply(id=message["id"], value=message["return"])


@many
@given(transcripts())
def test_sound_messages_mean_the_same_to_the_peer(
    peer: Any, transcript: tuple[list[bytes], list[Message]]
) -> None:
    lines, _ = transcript
    assert QMPCodec().feed(b"".join(lines)) == [as_peer_reads(peer, line) for line in lines]


@many
@given(st.binary(min_size=1, max_size=6), st.integers(0, len(TRANSCRIPT) - 1))
@example(b"\n", 30)
@example(b"1", 60)
def test_what_the_peer_refuses_we_refuse_and_what_we_accept_it_reads_alike(
    peer: Any, damage: bytes, place: int
) -> None:
    damaged = TRANSCRIPT[:place] + damage + TRANSCRIPT[place + len(damage) :]
    for line in damaged.split(b"\n")[:-1]:
        try:
            (ours,) = QMPCodec().feed(line + b"\n")
        except QMPProtocolError:
            continue  # ours may be the stricter one
        assert as_peer_reads(peer, line + b"\n") == ours


@many
@given(qemu_text, st.none() | st.dictionaries(qemu_text, qemu_values, min_size=1, max_size=4), st.booleans())
def test_the_peer_would_send_the_same_command(
    peer: Any, name: str, arguments: dict[str, Any] | None, oob: bool
) -> None:
    call_id, line = QMPCodec().command(name, arguments, oob=oob)
    theirs = dict(peer.QMPClient.make_execute_msg(name, arguments, oob=oob))
    assert dict(peer.message.Message(line)) == {**theirs, "id": call_id}
