"""Faults on demand: named points, and what goes wrong there.

A point is ``<host>.<hook>.before``, ``<host>.<hook>.after`` or one of the points inside the transfer, each of which
:data:`POINTS` lists; ``*`` stands for any host.  A fault strikes once for each time it was planned.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

POINTS = (
    "migrate_begin.before",
    "migrate_begin.after",
    "migrate_prepare.before",
    "migrate_prepare.after",
    "migrate_perform.before",
    "migrate_perform.iteration",
    "migrate_perform.stopped",
    "migrate_perform.last-byte",
    "migrate_perform.completed",
    "migrate_finish.before",
    "migrate_finish.after",
    "migrate_confirm.before",
    "migrate_confirm.after",
)
"""Where a fault can strike, without the host's name."""


class Fault(Enum):
    """What goes wrong."""

    FAIL = "fail"
    """The hook raises the error that its contract names."""
    BREAK_CONTRACT = "break-contract"
    """The hook raises what no driver may raise."""
    KILL_GUEST = "kill-guest"
    """The process at hand, guest or receiver, is gone."""
    CUT = "cut"
    """The stream breaks."""
    HANG = "hang"
    """The hook waits until it is cancelled."""
    CORRUPT = "corrupt"
    """One page arrives changed: a violation that a check must see."""
    RUN_TWICE = "run-twice"
    """The source runs although it gave the proof: a violation that a check must see."""


class FaultPlan:
    """Faults that will strike, by point."""

    def __init__(self) -> None:
        self._planned: dict[str, deque[Fault]] = {}
        self.struck: list[tuple[str, Fault]] = []

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Read a plan such as ``beta.migrate_prepare.before=fail,*.migrate_perform.iteration=cut``.

        :raises ValueError: a point or a fault is unknown; names it.
        """
        plan = cls()
        for item in filter(None, (part.strip() for part in text.split(","))):
            point, equals, fault = item.partition("=")
            if not equals:
                raise ValueError(f"{item!r} is not point=fault")
            plan.at(point.strip(), Fault(fault.strip()))
        return plan

    def at(self, point: str, fault: Fault, *, times: int = 1) -> None:
        """Plan a fault.

        :raises ValueError: the point is unknown.
        """
        _host, _dot, local = point.partition(".")
        if local not in POINTS:
            raise ValueError(f"{point!r} is not a point: write HOST. or *. before one of {', '.join(POINTS)}")
        self._planned.setdefault(point, deque()).extend([fault] * times)

    def take(self, host: str, point: str) -> Fault | None:
        """The fault that strikes now, if any."""
        for name in (f"{host}.{point}", f"*.{point}"):
            planned = self._planned.get(name)
            if planned:
                fault = planned.popleft()
                self.struck.append((name, fault))
                return fault
        return None

    @property
    def left(self) -> dict[str, tuple[Fault, ...]]:
        """Faults that have not struck yet."""
        return {point: tuple(faults) for point, faults in self._planned.items() if faults}
