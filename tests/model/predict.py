"""What the model says of a fault at a point of the table: where the guest may be once all is settled.

Points are those of :mod:`tests.fault.points`, ``<side>.<state>.<input>.<where>``, or ``transfer…`` for a moment of the
transfer.  The world is explored without faults up to the point; the fault strikes; and from there every way is gone,
with managers that come back and callers that do anything, to every end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

from ferryman.handover import TABLE, Input, State
from tests.model.world import (
    DESTINATION,
    SOURCE,
    Bounds,
    Protocol,
    Rules,
    Run,
    World,
    begin_world,
    down,
)

_CALM = Bounds(crash_managers=False, kill=False, silent=False)
_HOSTS = ("source", "destination")


class _Watched(Rules):
    """Rules that tell which entries of the table a move has fed."""

    def __init__(self, protocol: Protocol, bounds: Bounds) -> None:
        super().__init__(protocol, bounds)
        self.fed: list[tuple[str, State, Input]] = []

    def feed(self, world: World, host: int, run: Run, given: Input) -> World:
        self.fed.append((run.side.value, run.state, given))
        return super().feed(world, host, run, given)


@cache
def _visited() -> dict[str, set[World]]:
    """Worlds at each point, and those during a transfer under ``transfer``."""
    rules = _Watched(Protocol(), _CALM)
    at: dict[str, set[World]] = defaultdict(set)
    start = begin_world(_CALM)
    seen, queue = {start}, [start]
    while queue:
        world = queue.pop()
        if any(process.transfer == "active" for process in world.processes):
            at["transfer"].add(world)
        for name in _standing(world):
            at[name].add(world)
        rules.fed.clear()
        for _words, following in rules.progress(world):
            for side, state, given in rules.fed:
                at[f"{side}.{state.value}.{given.value}.before"].add(world)
                at[f"{side}.{state.value}.{given.value}.written"].add(following)
            rules.fed.clear()
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return dict(at)


def _standing(world: World) -> Iterator[str]:
    """Points at which some run stands, by what is left of its step."""
    for host in world.hosts:
        for run in host.runs:
            for (state, given), step in TABLE.items():
                whole = step.actions if step.answer is None else (*step.actions, step.answer)
                if step.state is not run.state:
                    continue
                done = len(whole) - len(run.todo)
                entry = f"{run.side.value}.{state.value}.{given.value}"
                if 0 < done <= len(step.actions) and whole[done:] == run.todo:
                    yield f"{entry}.did-{step.actions[done - 1].value}"
                if step.answer is not None and run.todo == (step.answer,):
                    yield f"{entry}.answered"
                # A long action's outcome is the next input: it stands there as what is to be done.
                if step.actions and len(run.todo) == 1 and not isinstance(run.todo[0], str):
                    yield f"{entry}.did-{step.actions[-1].value}"


def _struck(worlds: Iterable[World], fault: str) -> Iterator[World]:
    rules = Rules(Protocol(), _CALM)
    for world in worlds:
        match fault:
            case "kill-source-manager":
                yield down(world, 0)
            case "kill-destination-manager":
                yield down(world, 1)
            case "kill-source-qemu" | "kill-destination-qemu":
                host = 0 if fault == "kill-source-qemu" else 1
                for process in world.processes:
                    if process.host == host:
                        yield rules.kill(world, process)
                if not any(process.host == host for process in world.processes):
                    yield world
            case _:
                yield world  # whoever carries papers, and every stream, may fail at any time anyway


@cache
def predict(point: str, fault: str) -> frozenset[str]:
    """Where the guest may be in the end: ``source``, ``destination``, or ``none``.

    :raises KeyError: the model does not come to that point without a fault before it.
    """
    visited = _visited()
    worlds = visited["transfer" if point.startswith("transfer") else point]
    ends: set[str] = set()
    queue = list(_struck(worlds, fault))
    seen = set(queue)
    while queue:
        world = queue.pop()
        if all(host.up and not host.runs for host in world.hosts):
            ends.add(_owner(world))
        for following in _moves(world):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return frozenset(ends)


@cache
def _moves(world: World) -> tuple[World, ...]:
    """What can follow a world: many points and faults lead through the same ones."""
    rules = Rules(Protocol(), _CALM)
    moves = [following for _words, following in rules.progress(world)]
    moves += [rules.restart(world, number) for number, host in enumerate(world.hosts) if not host.up]
    return tuple(moves)


def _owner(world: World) -> str:
    running = [process.host for process in world.processes if process.status == "running"]
    return _HOSTS[running[0]] if running else "none"


__all__ = ["DESTINATION", "SOURCE", "predict"]
