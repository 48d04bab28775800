"""The fault campaign's cases: one migration each, with one strike at one point, looked at from outside."""

from __future__ import annotations

import json
import queue
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import quote

from tests.fault.expected import ANYWHERE, predict
from tests.fault.net import (
    CONTROL_ADDRESS,
    CONTROL_PORT,
    DATA_ADDRESS,
    NOBODYS_ADDRESS,
    QUESTION_PORT,
    Network,
)
from tests.fault.points import points
from tests.fault.scenarios import SCENARIOS, TRANSFER, Scenario
from tests.guests.counter import CounterGuest
from tests.guests.inspect import QMPSocket, run_directories
from tests.guests.witness import Witness, WitnessTimeoutError
from tests.qemu import MIB, NAME, emulators, end_process

ROOT = Path(__file__).parents[2]

FAULTS = (
    "kill-coordinator",
    "kill-source-manager",
    "kill-destination-manager",
    "kill-source-qemu",
    "kill-destination-qemu",
    "cut-data-silent",
    "cut-data-reset",
    "cut-control-silent",
    "cut-control-reset",
    "cut-coordinator-silent",
    "cut-coordinator-reset",
)
MOMENTS = 20
"""Random moments of the transfer, each for every fault."""

RUN_TWICE = "plant-second-runner"
"""Not a fault that Ferryman must bear, but a violation for the campaign to find."""

_GUEST = CounterGuest(
    memory_bytes=16 * MIB, tick_hz=1000, page_count=2000, pages_per_tick=1, prefill=True, disk_ticks=16
)
_DISK_REACH_TICKS = 4 * _GUEST.disk_ticks
"""How far the disk and the last tick that was heard may be apart: what is under way when a process is killed."""
_SLOW_BYTES_PER_S = 8 * MIB
_LEASE_S, _PATIENCE_S = 1.5, 3.0
_PLACES = {"source": "a", "destination": "b"}

_LONG_S, _BRIEF_S = 2.5, 0.7
"""How long a cut lasts, and a manager that was killed stays away: longer than a lease, or not as long."""
_MISS_S = 8.0
"""How long a point may be waited for once nothing else happens."""
_COORDINATOR_S = 12.0
_SETTLE_S = 30.0
_PROMPT_S = 30.0
_RUNS_S = 5.0
_POLL_S = 0.05


class Interrupted(Exception):
    """The campaign is to end before its cases have."""


class CampaignError(Exception):
    """A program of the campaign itself does not do what it should."""


Passage: TypeAlias = tuple[Scenario, int]
"""A scenario that comes to a point, and the incarnation of the manager that passes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One migration with one strike.

    :param point: of the table, or ``transfer.<n>``.
    :param incarnation: of the manager that passes it: 0 is the first, 1 the one after the scenario's own kill.
    :param moment_s: of a ``transfer`` point: time from the beginning of the transfer.
    :param brief: what is cut or killed is back before a lease can end.
    :param again: migrate once more afterwards.
    :param elsewhere: other scenarios that come to the point, and their incarnations: for a case that did not.
    """

    scenario: Scenario
    point: str = ""
    fault: str = ""
    incarnation: int = 0
    moment_s: float = 0.0
    brief: bool = False
    again: bool = False
    elsewhere: tuple[Passage, ...] = ()

    def start(self, lab: Lab, directory: Path) -> Run:
        """Make the case's run."""
        return Run(lab, self, directory)

    @property
    def predicted(self) -> frozenset[str]:
        """Where the guest may be in the end."""
        if not self.point:
            return ANYWHERE | {"none"} if self.scenario.faults else ANYWHERE
        allowed = predict(self.point, self.fault)
        # What the scenario itself destroys is not this fault's doing.
        lost = {"none"} if any(fault.endswith("-qemu") for fault in self.scenario.faults) else set()
        return allowed | lost


@dataclass(kw_only=True)
class Result:
    """What came of a case."""

    scenario: str
    point: str
    fault: str
    outcome: str = ""
    predicted: tuple[str, ...] = ()
    reached: bool = False
    struck: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    needs_human: bool = False
    migrated_again: bool = False
    blackout_ms: float | None = None
    transfer_s: float | None = None
    seconds: float = 0.0
    passed: dict[str, list[str]] = field(default_factory=dict)
    """Points that each incarnation of a manager passed, as ``a.0``."""


class Program:
    """A process of the campaign that speaks in lines; what it says comes into a common queue."""

    def __init__(self, name: str, argv: list[str], heard: Heard, log: Path) -> None:
        self.name = name
        self.ready = False
        self.standing = False
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=(heard,))
        self._reader.start()

    def _read(self, heard: Heard) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard.put((self, line.decode().rstrip("\n")))
        heard.put((self, None))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def say(self, line: str) -> None:
        """Write a line to it; one that is dead does not read it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def kill(self) -> bool:
        """Kill it where it stands; False where it was dead."""
        was_alive = self.alive
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return was_alive

    def end(self, timeout_s: float) -> int | None:
        """Let it end, and return how it did; None where it had to be killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, and its last line was not read
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()

    def close(self) -> None:
        """Kill what is left of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.kill()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # a line that it did not read
        self._reader.join()
        self._process.stdout.close()


Heard = queue.SimpleQueue[tuple[Program, str | None]]


class Lab:
    """A network, and a place for the cases that are run in it one after the other."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="ferryman-fault-"))
            stack.callback(shutil.rmtree, self.directory)
            self.network = stack.enter_context(Network())
            self.probe: bytes | None = None
            self._numbers = 0
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, case: Case) -> Result:
        """Run one case, and leave nothing of it."""
        self._numbers += 1
        begin_s = time.monotonic()
        directory = self.directory / str(self._numbers)
        directory.mkdir()
        run = case.start(self, directory)
        try:
            run.go()
        except CampaignError as error:
            run.result.violations.append(f"the campaign could not go on: {error}")
        finally:
            run.close()
            run.result.seconds = time.monotonic() - begin_s
            if run.result.violations or run.result.needs_human:
                kept = (
                    ROOT / ".cache" / "results" / "fault" / f"{case.point or case.scenario.name}-{case.fault}"
                )
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(
                    directory, kept, ignore=lambda at, names: [n for n in names if not _is_plain(at, n)]
                )
            shutil.rmtree(directory)
        return run.result


def _is_plain(directory: str, name: str) -> bool:
    path = Path(directory) / name
    return path.is_dir() or path.is_file()


class Run:
    """One case under way."""

    def __init__(self, lab: Lab, case: Case, directory: Path) -> None:
        self.case = case
        self.result = Result(
            scenario=case.scenario.name,
            point=case.point,
            fault=case.fault,
            predicted=tuple(sorted(case.predicted)),
        )
        self._lab = lab
        self._directory = directory
        self._stack = ExitStack()
        self._heard: Heard = queue.SimpleQueue()
        self._managers: dict[str, Program] = {}
        self._incarnations = dict.fromkeys("ab", 0)
        self._killed: set[str] = set()
        self._coordinator: Program | None = None
        self._coordinator_done_s: float | None = None
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._first_pending = bool(case.scenario.point)
        self._struck = not case.point
        self._phase_s: float | None = None
        self._states: dict[str, dict[str, Any]] = {}
        # A disk that is written is locked by QEMU, which would refuse what is to be planted.
        self._guest = replace(_GUEST, disk_ticks=0) if case.fault == RUN_TWICE else _GUEST
        self._image = directory / "image"
        self._on_disk = 0

    def close(self) -> None:
        """End every process of the case, and take its cuts back."""
        for program in [*self._managers.values(), *filter(None, [self._coordinator])]:
            program.close()
        for pid in emulators(self._directory):
            end_process(pid)
        self._stack.close()
        self._lab.network.heal()

    # Programs

    def _root(self, place: str) -> Path:
        return self._directory / place

    def _uri(self, place: str) -> str:
        return f"qemu:///embed?root={quote(str(self._root(place)))}"

    def _start_manager(self, place: str) -> None:
        other = "b" if place == "a" else "a"
        number = self._incarnations[place]
        self._incarnations[place] += 1
        case, scenario = self.case, self.case.scenario
        armed = []
        side = "source" if place == "a" else "destination"
        if scenario.point.startswith(f"{side}.") and self._first_pending:
            armed.append(scenario.point)
        if case.point.startswith(f"{side}.") and number == case.incarnation and not self._struck:
            armed.append(case.point)
        argv = [sys.executable, "-m", "tests.fault.manager", f"--uri={self._uri(place)}"]
        argv += [f"--peer-uri={self._uri(other)}", f"--peer-at={DATA_ADDRESS[other]}:{QUESTION_PORT}"]
        argv += [f"--trace={self._directory / f'{place}.{number}.trace'}", *(f"--point={a}" for a in armed)]
        if scenario.finish_fails and place == "b":
            argv.append("--finish-fails")
        argv += ["--listen", f"{CONTROL_ADDRESS[place]}:{CONTROL_PORT}"]
        argv += [f"{DATA_ADDRESS[place]}:{QUESTION_PORT}"]
        self._managers[place] = Program(
            place, self._lab.network.inside(place, argv), self._heard, self._directory / f"{place}.log"
        )

    def _start_coordinator(self, source: str, destination: str, *, scripted: bool) -> Program:
        scenario = self.case.scenario
        listen = DATA_ADDRESS[destination]
        if scripted and scenario.nobody_listens:
            listen = NOBODYS_ADDRESS
        options: dict[str, object] = {
            "listen_address": listen,
            "lease_s": _LEASE_S,
            "patience_s": _PATIENCE_S,
            **self._more_options(),
        }
        if scripted and (scenario.slow or self.case.point.startswith(TRANSFER)):
            options["bandwidth_bytes_per_s"] = _SLOW_BYTES_PER_S
        argv = [sys.executable, "-m", "tests.fault.coordinator", f"--name={NAME}"]
        for end, place in (("source", source), ("destination", destination)):
            argv += [f"--{end}", self._uri(place), CONTROL_ADDRESS[place], str(CONTROL_PORT)]
        argv += ["--options", json.dumps(options)]
        if scripted and scenario.order:
            argv += ["--order", scenario.order]
        if scripted and scenario.again:
            argv.append("--again")
        return Program(
            "c", self._lab.network.inside("c", argv), self._heard, self._directory / "coordinator.log"
        )

    def _more_options(self) -> dict[str, object]:
        return {}

    # What they say

    def _hear(self, until_s: float) -> None:
        """Wait for the next line, or until a time, and act on it and on what is due."""
        if self._lab.stop.is_set():
            raise Interrupted
        self._check_disk()
        now = time.monotonic()
        for item in [due for due in self._due if due[0] <= now]:
            self._due.remove(item)
            item[1]()
        next_s = min([until_s, now + 0.5, *(due_s for due_s, _ in self._due)])
        try:
            program, line = self._heard.get(timeout=max(0.0, next_s - now))
        except queue.Empty:
            return
        if program is self._coordinator:
            self._coordinator_said(line)
        elif program in self._managers.values():
            self._manager_said(program, line)

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + delay_s, what))

    def _manager_said(self, manager: Program, line: str | None) -> None:
        match line.split(" ", 1) if line is not None else None:
            case None:
                if manager.name not in self._killed:
                    self.result.violations.append(f"the manager {manager.name} ended by itself")
                    self._revive(manager.name)
            case ["ready"]:
                manager.ready = True
            case ["created"]:
                self._states["created"] = {}
            case ["state", told]:
                self._states[manager.name] = json.loads(told)
            case ["here", point]:
                if point == self.case.scenario.point and self._first_pending:
                    self._strike_first()
                else:
                    self._strike()
                if manager.name not in self._killed:
                    manager.say("go")
            case _:
                raise CampaignError(f"the manager says {line!r}")

    def _coordinator_said(self, line: str | None) -> None:
        match line.split(" ", 1) if line is not None else None:
            case None | ["stalled"]:
                self._coordinator_done_s = self._coordinator_done_s or time.monotonic()
            case ["told", told]:
                self.result.told.update(json.loads(told))
            case ["settled", state]:
                self.result.told["settled"] = state
            case ["phase", "perform begin"]:
                self._phase_s = time.monotonic()
                if self.case.point.startswith(TRANSFER):
                    self._later(self.case.moment_s, self._strike)
            case ["phase", "perform end"]:
                if self._phase_s is not None:
                    self.result.transfer_s = time.monotonic() - self._phase_s
            case ["sending"]:
                if self.case.scenario.point == TRANSFER and self._first_pending:
                    self._strike_first()
            case _:
                return

    # What is done to them

    def _strike_first(self) -> None:
        self._first_pending = False
        for fault in self.case.scenario.faults:
            self._do(fault, away_s=0.0, cut_s=_LONG_S)

    def _strike(self) -> None:
        if not self._struck:
            self._struck = True
            self.result.reached = True
            away_s = _BRIEF_S if self.case.brief else _LONG_S
            self.result.struck = self._do(self.case.fault, away_s=away_s, cut_s=away_s)

    def _do(self, fault: str, *, away_s: float, cut_s: float) -> bool:
        """Do a fault; False where there was nothing left to do it to."""
        match fault.split("-"):
            case ["kill", "coordinator"]:
                assert self._coordinator is not None
                return self._coordinator.kill()
            case ["kill", side, "manager"]:
                place = _PLACES[side]
                self._killed.add(place)
                was_alive = self._managers[place].kill()
                self._later(away_s, partial(self._revive, place))
                return was_alive
            case ["kill", side, "qemu"]:
                found = emulators(self._root(_PLACES[side]) / "run")
                for pid in found:
                    end_process(pid)
                return bool(found)
            case ["cut", connection, how]:
                self._lab.network.cut(connection, how)
                self._later(cut_s, self._lab.network.heal)
                return True
            case ["plant", "second", "runner"]:
                self._run_twice()
                return True
            case _:
                raise CampaignError(f"no such fault: {fault}")

    def _run_twice(self) -> None:
        """Resume the stopped source behind Ferryman's back."""
        self._do("kill-source-manager", away_s=_BRIEF_S, cut_s=0.0)
        (directory,) = run_directories(self._root("a"))
        with QMPSocket(directory / "read") as qmp:
            qmp.execute("cont")

    def _revive(self, place: str) -> None:
        if self._managers[place].alive:
            return
        self._managers[place].close()
        self._killed.discard(place)
        self._start_manager(place)

    # The course of a case

    def go(self) -> None:
        """Migrate, strike, let all settle, and look."""
        self._write_image()
        witness = self._stack.enter_context(Witness())
        self._witness = witness
        for place in "ab":
            self._root(place).mkdir(mode=0o700)
            if self._lab.probe is not None:
                (self._root(place) / "probe.json").write_bytes(self._lab.probe)
            self._start_manager(place)
        self._coordinator = self._start_coordinator("a", "b", scripted=True)
        definition = self._directory / "definition.xml"
        definition.write_text(self._guest.domain_xml(NAME, uuid.uuid4(), self._image, witness.socket_path))
        self._managers["a"].say(f"create {definition}")
        self._wait("the guest", lambda: "created" in self._states)
        witness.wait_tick(20, _PROMPT_S)
        if self._lab.probe is None:
            self._lab.probe = (self._root("a") / "probe.json").read_bytes()
        self._wait("the managers", lambda: all(manager.ready for manager in self._managers.values()))
        self._coordinator.say("go")
        self._begun()
        self._until_quiet()
        self._settle()
        outcome = self._look()
        if self.case.again and outcome in _PLACES:
            self._migrate_again(outcome)
        self._end()
        self._read_traces()

    def _write_image(self) -> None:
        self._guest.write_image(self._image)

    def _begun(self) -> None:
        """Do what is to be done once the migration has been told to begin."""

    def _wait(self, what: str, test: Callable[[], bool]) -> None:
        end_s = time.monotonic() + _PROMPT_S
        while not test():
            if time.monotonic() > end_s:
                raise CampaignError(f"{what} did not come within {_PROMPT_S:g} s")
            self._hear(end_s)

    def _until_quiet(self) -> None:
        """Go on until the strike was done, or will not come, and the coordinator has ended."""
        assert self._coordinator is not None
        begin_s = time.monotonic()
        while True:
            now = time.monotonic()
            done_s = self._coordinator_done_s
            if done_s is None and now > begin_s + _COORDINATOR_S:
                self.result.violations.append(f"the coordinator did not end within {_COORDINATOR_S:g} s")
                self._coordinator.kill()
                done_s = self._coordinator_done_s = now
            if done_s is not None and not self._due and (self._struck or now > done_s + _MISS_S):
                return
            self._hear(now + 1.0)

    def _state(self, place: str) -> dict[str, Any] | None:
        """What a manager says about its host now; None where it does not answer."""
        self._states.pop(place, None)
        asked = self._managers[place]
        asked.say("state")
        end_s = time.monotonic() + _PROMPT_S
        while place not in self._states:
            if time.monotonic() > end_s or asked is not self._managers[place]:
                return None
            self._hear(end_s)
        return self._states[place]

    def _settle(self) -> None:
        """Wait until no migration is open on either host."""
        end_s = time.monotonic() + _SETTLE_S
        while True:
            self._wait("a manager", lambda: all(manager.ready for manager in self._managers.values()))
            opened = []
            for place in "ab":
                state = self._state(place)
                # A migration that is just being begun is not open yet, but somebody is at it.
                opened += ["no answer"] if state is None else [*state["open"], *state["busy"]]
            if not opened and not self._due:
                return
            if time.monotonic() > end_s:
                self.result.needs_human = True
                self.result.violations.append(f"still open after {_SETTLE_S:g} s: {', '.join(opened)}")
                return
            # What the managers do by themselves is no event of this program.
            self._hear(time.monotonic() + _POLL_S)

    def _runners(self) -> dict[str, list[int]]:
        return {side: emulators(self._root(place) / "run") for side, place in _PLACES.items()}

    def _look(self) -> str:
        """Find out from outside where the guest runs, and hold it against what was predicted and told."""
        found = self._runners()
        outcome = "+".join(side for side, pids in found.items() for _ in pids) or "none"
        self.result.outcome = outcome
        bad = self.result.violations
        if outcome not in self.case.predicted:
            bad.append(f"the guest is at {outcome}, and predicted was {' or '.join(self.result.predicted)}")
        self._check_ticks(found)
        for side, place in _PLACES.items():
            state = self._state(place)
            expected = [[NAME, "running"]] if side == outcome else []
            if state is None or (outcome in (*_PLACES, "none") and state["domains"] != expected):
                bad.append(f"the {side} says that its domains are {state and state['domains']}")
        lost = self.case.fault.endswith("-qemu") or any(
            f.endswith("-qemu") for f in self.case.scenario.faults
        )
        for how in ("guest", "settled"):
            told = self.result.told.get(how)
            if told in _PLACES and told != outcome and not (outcome == "none" and lost):
                bad.append(
                    f"the user was told ({how}) that the guest is at the {told}, and it is at {outcome}"
                )
            if told == "gone" and outcome != "none":
                bad.append(f"the user was told ({how}) that the guest is gone, and it is at {outcome}")
        return outcome

    def _check_disk(self) -> int:
        """What the guest wrote to its disk never goes back."""
        value = self._guest.tick_on_disk(self._image)
        if value < self._on_disk:
            self.result.violations.append(f"the disk went back from tick {self._on_disk} to {value}")
        self._on_disk = value
        return value

    def _last_tick(self) -> int:
        last = self._witness.last()
        return last.value if last else 0

    def _check_ticks(self, found: dict[str, list[int]]) -> None:
        alive = [pid for pids in found.values() for pid in pids]
        last = self._witness.last()
        since_ns = last.t_ns if last else 0
        if alive:
            try:
                self._witness.wait_tick(self._last_tick() + 10, _RUNS_S)
            except WitnessTimeoutError:
                self.result.violations.append(f"the emulators {alive} are there, and no guest ticks")
        before, on_disk, after = self._last_tick(), self._check_disk(), self._last_tick()
        if self._guest.disk_ticks and not before - _DISK_REACH_TICKS <= on_disk <= after + _DISK_REACH_TICKS:
            self.result.violations.append(
                f"the disk holds tick {on_disk}, and the last ones were {before}, {after}"
            )
        seen = self._witness.report()
        heard = {tick.pid for tick in self._witness.ticks() if tick.t_ns > since_ns}
        if not heard <= set(alive):
            self.result.violations.append(f"ticks come from {heard}, and the emulators are {alive}")
        if (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) != (0, 0, ()):
            self.result.violations.append(
                f"ticks lost {seen.ticks_lost}, doubled {seen.ticks_doubled}, overlaps {seen.overlaps}"
            )
        if seen.blackouts:
            self.result.blackout_ms = seen.blackouts[-1].ms

    def _migrate_again(self, outcome: str) -> None:
        """Migrate to the other host: nothing is locked, and nothing is in the way."""
        there = "destination" if outcome == "source" else "source"
        if self.case.scenario.finish_fails and there == "destination":
            return
        assert self._coordinator is not None
        self._coordinator.close()
        first = self.result.told
        self.result.told = {}
        self._coordinator = self._start_coordinator(_PLACES[outcome], _PLACES[there], scripted=False)
        self._coordinator_done_s = None
        self._coordinator.say("go")
        self._wait("the end of one more migration", lambda: self._coordinator_done_s is not None)
        told, self.result.told = self.result.told, first
        if told.get("guest") != "destination":
            self.result.violations.append(f"one more migration did not come about: {told}")
            return
        self._settle()
        self.result.migrated_again = True
        found = self._runners()
        self._check_ticks(found)
        if [side for side, pids in found.items() if pids] != [there]:
            self.result.violations.append(f"after one more migration the emulators are {found}")

    def _end(self) -> None:
        """Close both hosts; then their directories and journals must say that all is over."""
        assert self._coordinator is not None
        self._coordinator.close()
        bad = self.result.violations
        for place, manager in self._managers.items():
            ended = manager.end(_PROMPT_S)
            if ended != 0:
                bad.append(f"the manager {place} ended with {ended}")
        for side, place in _PLACES.items():
            root = self._root(place)
            left, alive = run_directories(root), emulators(root / "run")
            if len(left) != len(alive):
                bad.append(f"the {side} has {len(alive)} emulators and {len(left)} run directories")
            sockets = [path for path in root.rglob("*") if path.is_socket()]
            if [path for path in sockets if path.parent not in left]:
                bad.append(f"sockets are left at the {side}: {sockets}")
        bad += _check_rows({side: _rows(self._root(place)) for side, place in _PLACES.items()})

    def _read_traces(self) -> None:
        for path in sorted(self._directory.glob("*.trace")):
            self.result.passed[path.stem] = list(dict.fromkeys(path.read_text().split()))


Rows = list[tuple[str, str, str, bool]]

_AGREED: dict[str, set[str | None]] = {
    "given": {"claimed"},
    "kept": {"refused", "never-prepared", None},
}
"""What a source's row says, and what the destination's of the same migration then says; None is no row."""


def _rows(root: Path) -> Rows:
    """The rows of a host's journal: side, migration, record, and whether it is settled."""
    with closing(sqlite3.connect(root / "journal")) as database:
        return database.execute("SELECT side, id, record, settled FROM migrations").fetchall()


def _check_rows(journals: dict[str, Rows]) -> list[str]:
    """What is wrong with both hosts' journals: rows that are open or double, and hosts that do not agree."""
    bad = []
    records: dict[tuple[str, str], str] = {}
    for host, rows in journals.items():
        for side, migration, record, settled in rows:
            if not settled:
                bad.append(f"the {host}'s journal has an open row: {side} {record}")
            if (side, migration) in records:
                bad.append(f"migration {migration} has two rows of the side {side}")
            records[side, migration] = record
    for (side, migration), record in records.items():
        other = records.get(("destination", migration))
        if side == "source" and other not in _AGREED.get(record, set()):
            bad.append(f"the source's journal says {record} and the destination's {other}")
    return bad


# Many cases


def survey_cases() -> list[Case]:
    """Every scenario once without a strike, to see what it passes."""
    return [Case(scenario=scenario) for scenario in SCENARIOS]


def reached_by(surveyed: Iterable[Result]) -> dict[str, list[Passage]]:
    """The scenarios that reached each point, and the incarnation of the manager that passed it in each."""
    scenarios = {scenario.name: scenario for scenario in SCENARIOS}
    found: dict[str, list[Passage]] = {}
    for result in surveyed:
        scenario = scenarios[result.scenario]
        for name, passed in sorted(result.passed.items(), key=lambda item: item[0][::-1]):
            for point in passed:
                passages = found.setdefault(point, [])
                if all(other is not scenario for other, _ in passages):
                    passages.append((scenario, int(name.split(".")[1])))
    return {point: found[point] for point in points() if point in found}


def all_cases(reached: dict[str, list[Passage]], transfer_s: float, randomly: random.Random) -> list[Case]:
    """Every pair of a fault and a point, and of a fault and a random moment of the transfer."""
    cases = []
    for index, (point, passages) in enumerate(reached.items()):
        (scenario, incarnation), *elsewhere = passages
        for number, fault in enumerate(FAULTS):
            brief = (index + number) % 2 == 0
            cases.append(
                Case(
                    scenario=scenario,
                    point=point,
                    fault=fault,
                    incarnation=incarnation,
                    brief=brief,
                    elsewhere=tuple(elsewhere),
                )
            )
    for index in range(MOMENTS):
        # A third of them lie close to the switchover.
        low, high = (0.9, 1.05) if index % 3 == 2 else (0.0, 1.0)
        moment_s = transfer_s * randomly.uniform(low, high)
        for number, fault in enumerate(FAULTS):
            cases.append(
                Case(
                    scenario=SCENARIOS[0],
                    point=f"{TRANSFER}.{index}",
                    fault=fault,
                    moment_s=moment_s,
                    brief=(index + number) % 2 == 0,
                )
            )
    return cases


def sampled(cases: list[Case], count: int, randomly: random.Random) -> list[Case]:
    """Some cases that cover every fault and every point as evenly as their number allows."""
    left = cases[:]
    randomly.shuffle(left)
    used: dict[str, int] = {}
    chosen: list[Case] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda case: (used.get(case.point, 0), used.get(case.fault, 0)))
        left.remove(best)
        chosen.append(best)
        for name in (best.point, best.fault):
            used[name] = used.get(name, 0) + 1
    return chosen


def run_cases(cases: list[Case], jobs: int) -> Generator[tuple[int, Result], None, None]:
    """Run cases in several labs side by side; each comes with its number as it ends.

    Closing the iterator ends what is under way.
    """
    stop = threading.Event()
    waiting: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for item in enumerate(cases):
        waiting.put(item)
    done: queue.SimpleQueue[tuple[int, Result] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with Lab(stop) as lab:
                while not stop.is_set():
                    try:
                        number, case = waiting.get_nowait()
                    except queue.Empty:
                        break
                    done.put((number, lab.run(case)))
            done.put(None)
        except Interrupted:
            done.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the results are taken
            done.put(error)

    threads = [threading.Thread(target=work) for _ in range(min(jobs, len(cases)))]
    for thread in threads:
        thread.start()
    try:
        working = len(threads)
        while working:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                working -= 1
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()


__all__ = [
    "FAULTS",
    "RUN_TWICE",
    "Case",
    "Lab",
    "Passage",
    "Run",
    "Result",
    "all_cases",
    "reached_by",
    "run_cases",
    "sampled",
    "survey_cases",
]
