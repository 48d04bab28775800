"""Explore every state of a bounded world, breadth first, and heal each: recovery must end, well, from everywhere."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ferryman.handover import QUESTIONS, PaperKind, State
from tests.model.world import (
    Bounds,
    Protocol,
    Rules,
    Run,
    Slip,
    Violation,
    Words,
    World,
    begin_world,
    in_order,
)

_HEALING_STEPS = 500
_FAULTS, _BACK = 0.02, 0.2
_WORDS_OF_A_SOURCE = (PaperKind.PROOF, PaperKind.NO_PROOF, PaperKind.KEPT)
_HEALED = Words("everybody", "comes back, and nothing fails any more")

Move = tuple[Words, World]


@dataclass(kw_only=True)
class Found:
    """What an exploration found.

    :param states: how many different ones were seen. :param depth: moves to the farthest of them.
    :param violation: the first broken invariant, or ''; ``trace`` is the shortest way there.
    :param complete: every state within the bounds was seen.
    :param excuses: how many states were healed to an end without the guest, by the fault or the limit that explains it.
    """

    states: int = 0
    depth: int = 0
    seconds: float = 0.0
    complete: bool = False
    violation: str = ""
    trace: list[Words] = field(default_factory=list)
    excuses: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line."""
        end = self.violation or ("every state" if self.complete else "not every state")
        return f"{self.states} states, depth {self.depth}, {self.seconds:.1f} s: {end}"


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector out: states hold no cycles, and it would look at all of them again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_uncollected()
def explore(
    protocol: Protocol,
    bounds: Bounds,
    *,
    heal: bool = True,
    most_states: int = 10_000_000,
    most_s: float = 1e9,
) -> Found:
    """Go everywhere; stop at the first violation.

    :param heal: also let everybody come back from every state, and look at the end.
    """
    rules, begin_s = Rules(protocol, bounds), time.monotonic()
    start = begin_world(bounds)
    found, succeeded, switched = Found(), False, not bounds.postcopy
    came_from: dict[World, tuple[World, Words] | None] = {start: None}
    healed: set[World] = set()
    queue = deque([(start, 0)])
    while queue and len(came_from) < most_states and time.monotonic() - begin_s < most_s:
        world, depth = queue.popleft()
        found.depth = max(found.depth, depth)
        succeeded = succeeded or any(migration.ran for migration in world.migrations)
        switched = switched or any(process.transfer == "switched" for process in world.processes)
        last: Words | None = _HEALED
        try:
            if heal:
                found.excuses.update(_heal(rules, world, healed))
            for words, following in rules.moves(world):
                last = words
                step = (world, words)
                if came_from.setdefault(following, step) is step:
                    queue.append((following, depth + 1))
            last = None
        except Violation as violation:
            found.violation = str(violation)
            found.trace = [*_trace(came_from, world), *_end(last, violation)]
            break
    found.states, found.seconds = len(came_from), time.monotonic() - begin_s
    found.complete = not queue and not found.violation
    if found.complete and not succeeded:
        found.violation = "no migration can succeed"
    elif found.complete and not switched:
        found.violation = "no transfer can be switched to post-copy"
    return found


def walk(protocol: Protocol, bounds: Bounds, *, seed: int, walks: int, steps: int) -> Found:
    """Go at random, many times, in worlds too large to see all of; a fault strikes now and then."""
    rules, begin_s, dice = Rules(protocol, bounds), time.monotonic(), random.Random(seed)
    found, seen = Found(), set[int]()
    for _ in range(walks):
        world, trace = begin_world(bounds), list[Words]()
        try:
            for depth in range(steps):
                moves = [move for move in rules.progress(world) if move[1] != world]
                down = any(not host.up for host in world.hosts)
                if dice.random() < _FAULTS or (down and (not moves or dice.random() < _BACK)):
                    moves = list(rules.faults(world)) or moves
                if not moves:
                    break
                words, world = dice.choice(moves)
                trace.append(words)
                seen.add(hash(world))
                found.depth = max(found.depth, depth + 1)
            found.excuses.update(_heal(rules, world, set()))
        except Violation as violation:
            found.violation, found.trace = str(violation), [*trace, *_end(None, violation)]
            break
    found.states, found.seconds = len(seen), time.monotonic() - begin_s
    return found


def _end(last: Words | None, violation: Violation) -> list[Words]:
    """How a trace ends: with one more move, or with all that heals."""
    broken = Words("broken", str(violation))
    if isinstance(violation, _Unhealed):
        return [_HEALED, *violation.way, broken]
    return [broken] if last is None else [*([last] if last is not _HEALED else []), broken]


def _trace(came_from: dict[World, tuple[World, Words] | None], world: World) -> list[Words]:
    trace: list[Words] = []
    while (step := came_from[world]) is not None:
        world, words = step
        trace.append(words)
    return trace[::-1]


class _Unhealed(Violation):
    """What is broken in the end, and the way there."""

    def __init__(self, violation: Violation, way: list[Words]) -> None:
        super().__init__(str(violation))
        self.way = way


def _heal(rules: Rules, world: World, healed: set[World]) -> list[str]:
    """Let everybody come back and nothing fail any more: I4, I5 and I2 hold in the end, and there is an end.

    :param healed: worlds from which healing is known to end well; those on the way are added.
    :returns: why the guest is gone in the end, where it is.
    """
    way: list[World] = []
    said: list[Words] = []
    try:
        while world not in healed:
            way.append(world)
            if len(way) > _HEALING_STEPS:
                raise Violation("I4: recovery does not end")
            step = _heal_step(rules, world)
            if step is None:
                break
            words, world = step
            said.append(words)
        else:
            healed.update(way)
            return []
        excuse = _check_end(rules, world)
    except Violation as violation:
        raise _Unhealed(violation, said) from violation
    healed.update(way)
    return [excuse] if excuse else []


def _heal_step(rules: Rules, world: World) -> Move | None:
    """The next thing that happens where nothing fails; None at the end."""
    for number, host in enumerate(world.hosts):
        if not host.up and host.journal:
            return Words("ABCDEF"[number], "comes back"), rules.restart(world, number)
    idle = []
    for number, host in enumerate(world.hosts):
        for run in host.runs:
            if run.todo:
                for move in rules.go_on(world, number, run):
                    return move
                continue  # it waits for its hypervisor
            idle.append((number, run))
    # Hypervisors are quicker than leases, and what they refuse may be tried again once they are through.
    if any(process.status == "tail" for process in world.processes):
        for move in rules.hypervisors(world):
            return move
    for number, run in idle:
        for move in rules.lease(world, number, run):
            if move[1] != world:
                return move
    for number, run in idle:
        answer = _ask(rules, world, number, run) if run.state in QUESTIONS else None
        if answer is not None:
            return answer
    return next(iter(rules.hypervisors(world)), None)


def _ask(rules: Rules, world: World, host: int, run: Run) -> Move | None:
    """One side asks, the other acts or answers, and the first acts on what decides."""
    asked = world.migrations[run.migration]
    if not rules.protocol.asks:
        return _carried(rules, world)
    if run.state is State.PLEDGED:
        for slip in in_order(world.slips):
            if slip.migration == run.migration and slip.kind in _WORDS_OF_A_SOURCE:
                return next(iter(rules.decide(world, host, slip)), None)
        return next(iter(rules.asking(world, host, run)), None)
    for slip in in_order(world.slips):
        if slip.migration == run.migration and slip.kind in (PaperKind.CLAIM, PaperKind.REFUSAL):
            for move in rules.confirm(world, host, slip):
                return move
    question = Slip(QUESTIONS[run.state], run.migration, run.receipt)
    for move in rules.decide(world, asked.destination, question):
        if move[1] != world:
            return move
    return None


def _carried(rules: Rules, world: World) -> Move | None:
    """Where the hosts do not ask, only what a caller still carries can settle them."""
    for slip in in_order(world.slips):
        asked = world.migrations[slip.migration]
        if slip.kind is PaperKind.PROOF:
            moves = rules.decide(world, asked.destination, slip)
        elif slip.kind in (PaperKind.CLAIM, PaperKind.REFUSAL):
            moves = rules.confirm(world, asked.source, slip)
        else:
            continue
        for move in moves:
            if move[1] != world:
                return move
    return None


def _check_end(rules: Rules, world: World) -> str:
    expected = "paused" if rules.bounds.paused else "running"
    in_doubt = [run for host in world.hosts for run in host.runs]
    lost = any(not 0 < host.journal <= len(world.hosts) for host in world.hosts)
    if lost:
        # Nothing old may run, and that was checked on the way; the rest needs a person.
        if not any(p.fresh for p in world.processes) and not world.excuse:
            raise Violation("I2: the newest memory is gone")
        return (
            "a journal was lost or is behind: a person must look"
            if in_doubt or len(world.processes) != 1
            else ""
        )
    if in_doubt:
        raise Violation(f"I4: {len(in_doubt)} migrations stay open ({in_doubt[0].state.value})")
    owners = [p for p in world.processes if p.status == expected and p.fresh and not p.receiver]
    left = [p for p in world.processes if p not in owners]
    if left:
        raise Violation(f"I5: a process is left behind ({left[0].status})")
    if len(owners) > 1:
        raise Violation("I1: two owners")
    if not owners and not world.excuse:
        raise Violation("I2: nobody has the guest")
    return "" if owners else world.excuse


__all__ = ["Found", "explore", "walk"]
