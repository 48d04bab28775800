"""Ferryman's values on the wire: what is written is read again, and nothing else is read."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman import errors
from ferryman.engine import HostEnd
from ferryman.errors import FerrymanError
from ferryman.hookspecs import DriverHooks, hook_names
from ferryman.types import (
    Compression,
    DomainInfo,
    DomainState,
    DomainStatistics,
    DomainUUID,
    GuestState,
    MigrationOptions,
    Phase,
    Side,
    TransferStatistics,
)
from ferryman_remote.values import ValueFormError, dump, dump_error, hints_of, load, load_error

INFO = DomainInfo(
    name="wéb",
    uuid=DomainUUID("00000000-0000-4000-8000-000000000001"),
    state=DomainState.PAUSED,
    persistent=True,
    memory_bytes=1 << 40,
    vcpus=2,
    max_vcpus=None,
)
OPTIONS = MigrationOptions(
    port_range=(1, 2),
    disks=(("vda", "/x"),),
    compression=Compression.ZSTD,
    streams=2,
    compression_level=3,
    patience_s=7,
    best_effort=frozenset({"streams"}),
)
VALUES: list[tuple[Any, Any]] = [
    (DomainInfo, INFO),
    (list[DomainInfo], [INFO, INFO]),
    (MigrationOptions, OPTIONS),
    (
        dict[DomainUUID, DomainStatistics],
        {INFO.uuid: DomainStatistics(state=DomainState.RUNNING, cpu_time_s=0.5)},
    ),
    (TransferStatistics, TransferStatistics(expected_downtime_ms=math.inf)),
    (bytes, b"\0\xff" * 100),
    (type(None), None),
    (str | None, "text"),
    (object, {"a": [1, None, "b", 1.5]}),
]


@pytest.mark.parametrize(("hint", "value"), VALUES, ids=lambda value: type(value).__name__)
def test_what_is_written_is_read_again(hint: Any, value: Any) -> None:
    assert load(hint, dump(value)) == value


@pytest.mark.parametrize("hook", hook_names(DriverHooks))
def test_every_hook_says_what_travels(hook: str) -> None:
    assert {"request", "return"} == hints_of(getattr(DriverHooks, hook)).keys()


def test_every_method_of_a_hosts_end_says_what_travels() -> None:
    for name, method in inspect.getmembers(HostEnd, inspect.iscoroutinefunction):
        assert hints_of(method).keys() == inspect.signature(method).parameters.keys() - {"self"} | {
            "return"
        }, name


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_other_json_is_refused(found: object) -> None:
    with pytest.raises(ValueFormError):
        load(DomainInfo, json.dumps(found).encode())


@given(st.binary())
def test_bytes_that_are_no_json(data: bytes) -> None:
    for hint in (DomainInfo, dict[str, str]):
        try:
            load(hint, data)
        except ValueFormError:
            continue
        assert isinstance(json.loads(data), dict)


@pytest.mark.parametrize(
    "change",
    [
        {"newer": 1},
        {"vcpus": "2"},
        {"vcpus": True},
        {"state": "nosuch"},
        {"persistent": 1},
        {"name": None},
        {"uuid": 5},
    ],
    ids=str,
)
def test_a_field_that_is_wrong_or_unknown(change: dict[str, object]) -> None:
    found = {**json.loads(dump(INFO)), **change}
    with pytest.raises(ValueFormError, match=next(iter(change))):
        load(DomainInfo, json.dumps(found).encode())


def test_a_field_that_is_missing() -> None:
    found = json.loads(dump(INFO))
    del found["name"]
    with pytest.raises(ValueFormError, match="lacks name"):
        load(DomainInfo, json.dumps(found).encode())


def test_an_option_outside_its_range_is_the_options_own_error() -> None:
    found = json.loads(dump(OPTIONS))
    found["streams"] = 1000
    with pytest.raises(errors.OptionError):
        load(MigrationOptions, json.dumps(found).encode())


MADE: list[FerrymanError] = [
    errors.DomainNotFoundError("gone", domain="web"),
    errors.URIError("bad", text="x", position=3),
    errors.PerformError("broke", phase=Phase.PERFORM, side=Side.SOURCE, guest_state=GuestState.SOURCE),
    errors.InDoubtError("?", evidence_missing="its word", guest_state=GuestState.IN_DOUBT),
    errors.UnknownSchemeError("none", scheme="x", installed=("a", "b")),
    errors.HypervisorError("failed"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: error.code)
def test_errors_arrive_as_they_were_raised(error: FerrymanError) -> None:
    code, needs = dump_error(error)
    arrived = load_error(error.message, code, needs)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize(
    ("code", "needs"), [("newer", b"{}"), ("domain-not-found", b"{}"), ("uri-invalid", b"[")]
)
def test_errors_that_cannot_be_made_are_still_told(code: str, needs: bytes) -> None:
    arrived = load_error("what happened", code, needs)
    assert type(arrived) is errors.HypervisorError
    assert arrived.message == "what happened"
