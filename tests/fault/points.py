"""Points of the handover, generated from its table, at which the campaign strikes.

A point is ``<side>.<state>.<input>.<where>``: ``before`` a step's record is written (and where a step does nothing),
``written`` after that, ``did-<action>`` after each action, ``answered`` when the answer is made and has not left the
host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest import mock

import ferryman.engine
from ferryman.engine import Host
from ferryman.handover import SOURCE_STATES, TABLE, Input, State, Step
from ferryman.handover import step as real_step
from ferryman.types import Side

Entry = tuple[State, Input]


def side_of(entry: Entry) -> Side:
    """Whose part of the table an entry is."""
    return Side.SOURCE if TABLE[entry].state in SOURCE_STATES else Side.DESTINATION


def entry_name(entry: Entry) -> str:
    """``<side>.<state>.<input>``."""
    state, given = entry
    return f"{side_of(entry).value}.{state.value}.{given.value}"


def _wheres(step: Step) -> Iterator[str]:
    if step.record is not None or not (step.actions or step.answer):
        yield "before"
    if step.record is not None:
        yield "written"
    for action in step.actions:
        yield f"did-{action.value}"
    if step.answer is not None:
        yield "answered"


def points() -> list[str]:
    """All points, in the order of the table."""
    return [f"{entry_name(entry)}.{where}" for entry, step in TABLE.items() for where in _wheres(step)]


_entry: ContextVar[Entry] = ContextVar("entry")


@contextmanager
def watched(passed: Callable[[str], None]) -> Iterator[None]:
    """Tell of every point that a host of this process passes, while it stands there."""
    real_feed, real_write, real_act = Host._feed, Host._write, Host._act

    def come(entry: Entry, where: str) -> None:
        if where in _wheres(TABLE[entry]):
            passed(f"{entry_name(entry)}.{where}")

    def step(state: State, given: Input) -> Step:
        found = real_step(state, given)
        _entry.set((state, given))
        come((state, given), "before")
        return found

    async def write(self: Host, *arguments: Any, **named: Any) -> Any:
        entry = _entry.get()
        result = await real_write(self, *arguments, **named)
        come(entry, "written")
        return result

    async def act(self: Host, run: Any, action: Any) -> Any:
        entry = _entry.get()
        result = await real_act(self, run, action)
        # What the action fed by itself is over, and this step goes on.
        _entry.set(entry)
        come(entry, f"did-{action.value}")
        return result

    async def feed(self: Host, *arguments: Any, **named: Any) -> Any:
        result = await real_feed(self, *arguments, **named)
        come(_entry.get(), "answered")
        return result

    with (
        mock.patch.object(ferryman.engine, "step", step),
        mock.patch.object(Host, "_write", write),
        mock.patch.object(Host, "_act", act),
        mock.patch.object(Host, "_feed", feed),
    ):
        yield


@contextmanager
def stopping(armed: list[str], trace: Path) -> Iterator[None]:
    """Write down every point that is passed, and stand still at the first passing of some until a line comes."""
    left = armed[:]
    file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def passed(point: str) -> None:
        os.write(file, point.encode() + b"\n")
        if point in left:
            left.remove(point)
            print("here", point, flush=True)
            # Byte by byte, since what follows the line is for somebody else.
            while (byte := os.read(0, 1)) != b"\n":
                if not byte:
                    os._exit(1)  # whoever waited for this program is gone

    try:
        with watched(passed):
            yield
    finally:
        os.close(file)
