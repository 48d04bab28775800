"""The world that the checker explores: hosts with journals, guests' processes, papers on their way, and faults.

One domain moves between hosts.  What a manager does is decided by the shipped table and the shipped recovery function
(:class:`Protocol` holds them, so that a test can put others there); everything else here is the world around them, as
:mod:`ferryman.engine` and the drivers meet it:

- A paper that was told once may arrive at any time, any number of times, or never; who carries papers may turn any of
  them into a question or a cancellation of the same migration.
- A manager may die between any two of its actions and come back; its journal stays, what it held in memory does not.
- A process may be killed; a host may crash, with its processes.
- The hypervisor resumes a source by itself when its stream breaks before the transfer has completed (HANDOVER, Q1).
- A command that runs a guest may fail; starting a receiver may fail; a hypervisor may not answer.

A process holds the guest's memory, and ``fresh`` says whether that is the newest: running a guest makes every other
copy old.  Running an old copy, or a second one beside a running one, is a violation, noted the moment it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from ferryman.handover import (
    TABLE,
    Action,
    Input,
    MigrationRow,
    Paper,
    PaperKind,
    Receipt,
    Record,
    State,
    Step,
    admit_answer,
    admit_question,
    fall_back,
    recover,
)
from ferryman.types import DomainUUID, Evidence, GuestEvidence, MigrationId, Side, TransferEvidence

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is checked: a transition table and the pure functions around it; the shipped ones by default.

    :param late: steps whose record is written after their first action; none in the shipped protocol.
    :param stop_is_proof: a source takes a guest that its hypervisor has stopped for the proof.
    :param forgets_tombstones: an id that was used is prepared again.
    :param anonymous: a source takes any answer for one about what it has open.
    """

    table: Mapping[tuple[State, Input], Step] = field(default_factory=lambda: dict(TABLE))
    recover: Callable[[MigrationRow, Evidence], Input | None] = recover
    admit_question: Callable[[MigrationRow | None, Paper], Input | PaperKind] = admit_question
    admit_answer: Callable[..., Input | None] = admit_answer
    late: frozenset[tuple[State, Input]] = frozenset()
    stop_is_proof: bool = False
    forgets_tombstones: bool = False
    anonymous: bool = False


class Row(NamedTuple):
    """A durable row; ``receipt`` is the journal that gave it, or 0 for none."""

    side: Side
    migration: int
    record: Record
    receipt: int
    settled: bool


class Run(NamedTuple):
    """An open migration in a manager's memory, with what is left to do of its step.

    ``todo`` holds actions and the answer; an input is what an action has found out, and ``WAIT`` stands for a transfer
    whose end is awaited.
    """

    side: Side
    migration: int
    state: State
    receipt: int
    todo: tuple[Action | PaperKind | Record | Input | str, ...]


WAIT = "wait"


class Process(NamedTuple):
    """A guest's process: number 0 is the one that was there first, ``m + 1`` the receiver of migration ``m``.

    ``status``: running, paused, incoming (not whole), whole (and never ran), tail (stopped by its hypervisor, which may
    still resume it) or done (only a command runs it).  ``transfer``: '' or active, failed, completed.
    """

    number: int
    host: int
    status: str
    fresh: bool
    receiver: bool
    transfer: str
    migration: int


class Slip(NamedTuple):
    """A paper on its way."""

    kind: PaperKind
    migration: int
    receipt: int


class Host(NamedTuple):
    """One host; ``journal`` is its identity, 0 for one that refuses to open."""

    up: bool
    journal: int
    generation: int
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]


class Migration(NamedTuple):
    """What was asked: from where to where, under which generation; and whether the guest ever ran there."""

    source: int
    destination: int
    generation: int
    process: int
    ran: bool


class World(NamedTuple):
    """One state of the world."""

    hosts: tuple[Host, ...]
    processes: tuple[Process, ...]
    slips: frozenset[Slip]
    migrations: tuple[Migration, ...]
    excuse: str
    """Which stated limit, or which fault, has destroyed the only copy that anybody may run; '' for none."""


class Violation(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the world may do.

    :param migrations: how many of the one domain are begun.
    :param hosts: how many there are.
    :param crash_managers: a manager may die at any moment, and come back.
    :param kill: processes may be killed. :param crash_hosts: hosts may crash. :param lose_journals: and lose theirs.
    :param fail: starting and running may fail. :param silent: a hypervisor may not say what became of a guest.
    :param paused: the guest is paused, and is to arrive so.
    """

    migrations: int = 1
    hosts: int = 2
    crash_managers: bool = True
    kill: bool = True
    crash_hosts: bool = False
    lose_journals: bool = False
    fail: bool = True
    silent: bool = True
    paused: bool = False


def begin_world(bounds: Bounds) -> World:
    """A guest at the first host, and nothing else."""
    status = "paused" if bounds.paused else "running"
    return World(
        hosts=tuple(
            Host(up=True, journal=number + 1, generation=0, rows=(), runs=())
            for number in range(bounds.hosts)
        ),
        processes=(
            Process(number=0, host=0, status=status, fresh=True, receiver=False, transfer="", migration=-1),
        ),
        slips=frozenset(),
        migrations=(),
        excuse="",
    )


@cache
def _identity(migration: int) -> MigrationId:
    return MigrationId(f"{migration:032x}")


@cache
def _receipt(journal: int, migration: int) -> Receipt | None:
    return None if journal == 0 else Receipt(journal_id=str(journal), sequence=migration + 1)


class Rules:
    """The moves of one protocol within some bounds."""

    def __init__(self, protocol: Protocol, bounds: Bounds) -> None:
        self.protocol = protocol
        self.bounds = bounds
        self._recovered = cache(self._recover)
        self._asked = cache(self._admit_question)
        self._answered = cache(self._admit_answer)

    # The shipped functions, with what they need

    def _row(
        self, side: Side, migration: int, record: Record, receipt: int, generation: int, *, settled: bool
    ) -> MigrationRow:
        return MigrationRow(
            side=side,
            migration_id=_identity(migration),
            generation=generation,
            uuid=DomainUUID("u"),
            name="d",
            record=record,
            receipt=_receipt(receipt, migration),
            arrives_paused=self.bounds.paused,
            settled=settled,
        )

    def _recover(
        self, side: Side, record: Record, guest: GuestEvidence, transfer: TransferEvidence
    ) -> Input | None:
        row = self._row(side, 0, record, 1, 1, settled=False)
        return self.protocol.recover(row, Evidence(guest=guest, transfer=transfer))

    def _admit_question(
        self, row: tuple[Record, int, int] | None, slip: Slip, generation: int
    ) -> Input | PaperKind:
        found = None
        if row is not None:
            record, receipt, row_generation = row
            found = self._row(DESTINATION, slip.migration, record, receipt, row_generation, settled=False)
        return self.protocol.admit_question(found, _paper(slip, generation))

    def _admit_answer(
        self, record: Record, receipt: int, generation: int, slip: Slip, *, newest: bool
    ) -> Input | None:
        row = self._row(SOURCE, slip.migration, record, receipt, generation, settled=False)
        return self.protocol.admit_answer(row, _paper(slip, generation), newest=newest)

    # All moves

    def moves(self, world: World) -> Iterator[tuple[str, World]]:
        """Every move, with its words and where it leads.

        :raises Violation: a move breaks an invariant; its words are the exception's.
        """
        yield from self.progress(world)
        yield from self.faults(world)

    def progress(self, world: World) -> Iterator[tuple[str, World]]:
        """The moves of managers, hypervisors and callers."""
        yield from self._managers(world)
        yield from self._hypervisors(world)
        yield from self._coordinator(world)

    def _managers(self, world: World) -> Iterator[tuple[str, World]]:
        """Managers go on with what they are doing, or look again."""
        for number, host in enumerate(world.hosts):
            for run in host.runs:
                if run.todo:
                    yield from self._go_on(world, number, run)
                else:
                    yield from self._lease(world, number, run)

    def _go_on(self, world: World, host: int, run: Run) -> Iterator[tuple[str, World]]:
        head, rest = run.todo[0], run.todo[1:]
        if isinstance(head, PaperKind):
            yield f"{_name(host)} tells {head.value}", _tell(world, host, run._replace(todo=rest), head)
            return
        if head == WAIT:
            process = _find(world, host, self._process_of(world, run))
            if process is None:
                yield (
                    f"{_name(host)} sees that its guest's process is gone",
                    self._look(world, host, run._replace(todo=())),
                )
            elif process.transfer != "active":
                given = Input.PROVED if process.transfer == "completed" else Input.STAYED
                yield (
                    f"{_name(host)} sees that the transfer {process.transfer}",
                    _with_run(world, host, run._replace(todo=(given,))),
                )
            else:
                if process.status == "tail" and self.protocol.stop_is_proof:
                    yield (
                        f"{_name(host)} sees that the guest is stopped",
                        _with_run(world, host, run._replace(todo=(Input.PROVED,))),
                    )
                aborted = _resume_by_itself(world, process, self.bounds)
                yield (
                    f"{_name(host)} aborts the transfer",
                    _with_run(aborted, host, run._replace(todo=(Input.STAYED,))),
                )
            if self.bounds.silent:
                yield (
                    f"{_name(host)}'s hypervisor falls silent during the transfer",
                    _with_run(world, host, run._replace(todo=(Input.LOST,))),
                )
            return
        if isinstance(head, Input):
            words = f"{_name(host)} notes: {head.value}"
            if head is Input.RAN and not world.excuse:
                if not any(p.number == run.migration + 1 for p in world.processes) and self.bounds.paused:
                    world = world._replace(excuse="the only copy was killed while it was claimed")
                world = _ran(world, run.migration)
            elif head is Input.NEVER_RAN and not any(p.fresh and not p.receiver for p in world.processes):
                world = world._replace(excuse=world.excuse or "the only copy could not be run")
            yield words, self._feed(world, host, run._replace(todo=()), head)
            return
        if isinstance(head, Record):
            written = self._write(world, host, run, head, raises=True)
            yield f"{_name(host)} writes {head.value}", _with_run(written, host, run._replace(todo=rest))
            return
        assert isinstance(head, Action)
        yield from self._act(world, host, run._replace(todo=rest), head)

    def _process_of(self, world: World, run: Run) -> int:
        if run.side is SOURCE:
            return world.migrations[run.migration].process
        return run.migration + 1

    def _act(self, world: World, host: int, run: Run, action: Action) -> Iterator[tuple[str, World]]:
        words = f"{_name(host)}: {action.value}"
        number = self._process_of(world, run)
        process = _find(world, host, number)
        match action:
            case Action.START_RECEIVER:
                if not any(p.host == host for p in world.processes):
                    receiver = Process(number, host, "incoming", False, True, "", run.migration)
                    started = _with_process(world, receiver)
                    yield words, _with_run(started, host, run._replace(todo=(Input.RECEIVER_UP,)))
                if self.bounds.fail or any(p.host == host for p in world.processes):
                    yield (
                        f"{words} fails",
                        _with_run(world, host, run._replace(todo=(Input.RECEIVER_FAILED,))),
                    )
            case Action.TRANSFER:
                if process is None:
                    yield words, self._look(world, host, run)
                else:
                    sending = process._replace(transfer="active", migration=run.migration)
                    yield words, _with_run(_with_process(world, sending), host, run._replace(todo=(WAIT,)))
                    yield f"{words} fails", _with_run(world, host, run._replace(todo=(Input.STAYED,)))
            case Action.RUN_GUEST:
                yield from self._run_guest(world, host, run, process, words)
            case Action.DESTROY_RECEIVER | Action.DESTROY_COPY:
                if process is None:
                    yield words, self._continue(world, host, run)
                else:
                    yield words, self._continue(_without(world, process), host, run)
            case Action.RESUME:
                if process is None or process.status == "running" or self.bounds.paused:
                    resting = world
                    if process is not None and self.bounds.paused:
                        resting = _with_process(world, process._replace(status="paused"))
                    yield words, self._continue(resting, host, run)
                else:
                    yield words, self._continue(_run(world, process), host, run)
            case Action.CANCEL_TRANSFER:
                cancelled = world
                if process is not None and process.transfer == "active":
                    cancelled = _resume_by_itself(world, process, self.bounds)
                yield words, self._continue(cancelled, host, run)
            case Action.ADOPT:
                adopted = world
                if process is not None:
                    status = "paused" if process.status == "whole" else process.status
                    adopted = _with_process(world, process._replace(receiver=False, status=status))
                yield words, self._continue(adopted, host, run)
            case Action.SETTLE:
                yield words, self._settle(world, host, run)

    def _run_guest(
        self, world: World, host: int, run: Run, process: Process | None, words: str
    ) -> Iterator[tuple[str, World]]:
        ran, never_ran = run._replace(todo=(Input.RAN,)), run._replace(todo=(Input.NEVER_RAN,))
        if process is None or process.status == "incoming":
            yield f"{words}: it never ran", _with_run(world, host, never_ran)
            return
        if process.status == "running":
            yield words, _with_run(world, host, ran)
            return
        if self.bounds.paused:
            yield words, _with_run(world, host, ran)
            return
        arrived = _run(_ran(world, run.migration), process)
        yield words, _with_run(arrived, host, ran)
        if self.bounds.fail:
            yield f"{words} fails", _with_run(world, host, never_ran)

    def _continue(self, world: World, host: int, run: Run) -> World:
        return _with_run(world, host, run)

    def _settle(self, world: World, host: int, run: Run) -> World:
        world = _with_run(world, host, run)
        state = world.hosts[host]
        rows = tuple(
            row._replace(settled=True) if (row.side, row.migration) == (run.side, run.migration) else row
            for row in state.rows
        )
        # What is left of the step, its answer, is told by a run that nobody else uses any more.
        return _with_host(world, host, state._replace(rows=rows))

    def _feed(self, world: World, host: int, run: Run, given: Input) -> World:
        """Write what the table says, and take on what is to be done."""
        step = self.protocol.table.get((run.state, given))
        if step is None:
            # The engine raises and nothing happens.
            return _with_run(world, host, run._replace(todo=()))
        receipt = run.receipt
        if step.record is Record.PREPARED:
            receipt = world.hosts[host].journal
        todo: list[Action | PaperKind | Record | Input | str] = list(step.actions)
        if step.answer is not None:
            todo.append(step.answer)
        taken = run._replace(receipt=receipt)
        if step.record is not None and (run.state, given) in self.protocol.late:
            todo.insert(1, step.record)
        elif step.record is not None:
            # A tombstone of an id that was never prepared names no domain, so it raises no generation.
            raises = not (run.state is State.ABSENT and step.record is Record.NEVER_PREPARED)
            world = self._write(world, host, taken, step.record, raises=raises)
        return _with_run(world, host, taken._replace(state=step.state, todo=tuple(todo)))

    def _write(self, world: World, host: int, run: Run, record: Record, *, raises: bool) -> World:
        row = Row(run.side, run.migration, record, run.receipt, settled=False)
        return _write(world, host, row, raises=raises)

    def _evidence(self, world: World, host: int, run: Run) -> tuple[GuestEvidence, TransferEvidence]:
        process = _find(world, host, self._process_of(world, run))
        if process is None:
            return GuestEvidence.GONE, TransferEvidence.UNKNOWN
        guest = GuestEvidence.RUNNING if process.status == "running" else GuestEvidence.STOPPED
        return guest, TransferEvidence(process.transfer or "none")

    def _look(self, world: World, host: int, run: Run) -> World:
        """Do what the recovery function says; nothing where the evidence allows nothing."""
        row = _row_of(world, host, run.side, run.migration)
        record = row.record if row is not None else Record(run.state.value)
        guest, transfer = self._evidence(world, host, run)
        given = self._recovered(run.side, record, guest, transfer)
        if given is None:
            return _with_run(world, host, run)
        if record is Record.CLAIMING and guest is GuestEvidence.GONE and given is Input.RAN:
            # HANDOVER, limit 1: it may have run, so nobody may run an older copy any more.
            excuse = "" if world.migrations[run.migration].ran else "nobody can tell whether it had run"
            world = world._replace(excuse=world.excuse or excuse)
        return self._feed(world, host, run, given)

    def _lease(self, world: World, host: int, run: Run) -> Iterator[tuple[str, World]]:
        """What a side does by itself when it has heard nothing for the length of its lease."""
        words = f"{_name(host)}'s lease ends ({run.state.value})"
        match run.state:
            case State.PREPARED:
                yield words, self._feed(world, host, run, Input.CANCEL)
            case State.BEGUN:
                yield words, self._feed(world, host, run, Input.GIVE_UP)
            case State.HANDING | State.CLAIMING:
                yield words, self._look(world, host, run)
            case State.STOPPED | State.SILENT:
                kind = PaperKind.PROOF if run.state is State.STOPPED else PaperKind.ASK
                yield f"{_name(host)} asks ({kind.value})", _tell(world, host, run, kind)
            case _:
                if Record(run.state.value).decided:
                    yield words, self._feed(world, host, run, Input.RESTART)

    def _hypervisors(self, world: World) -> Iterator[tuple[str, World]]:
        """Transfers go on or break by themselves."""
        for process in world.processes:
            if process.transfer != "active":
                continue
            receiver = _find(world, world.migrations[process.migration].destination, process.migration + 1)
            name = f"QEMU at {_name(process.host)}"
            if process.status == "tail":
                yield (
                    f"{name} completes",
                    _with_process(world, process._replace(status="done", transfer="completed")),
                )
            elif receiver is not None and receiver.status == "incoming":
                whole = _with_process(world, receiver._replace(status="whole", fresh=process.fresh))
                yield (
                    f"{name} stops the guest and sends the rest",
                    _with_process(whole, process._replace(status="tail")),
                )
            yield f"{name}: the stream breaks", _resume_by_itself(world, process, self.bounds)

    def _coordinator(self, world: World) -> Iterator[tuple[str, World]]:
        """Whoever carries papers: any of them, at any time, any number of times."""
        if len(world.migrations) < self.bounds.migrations:
            yield from self._begin(world)
        for slip in world.slips:
            asked = world.migrations[slip.migration]
            match slip.kind:
                case PaperKind.PASSPORT:
                    yield from self._prepare(world, asked.destination, slip)
                case PaperKind.RECEIPT:
                    yield from self._perform(world, asked.source, slip)
                case PaperKind.PROOF | PaperKind.KEPT | PaperKind.ASK:
                    yield from self._decide(world, asked.destination, slip)
                case PaperKind.CLAIM | PaperKind.REFUSAL | PaperKind.NEVER_PREPARED | PaperKind.UNKNOWN:
                    yield from self._confirm(world, asked.source, slip)
                    for other in world.hosts[asked.source].runs if self.protocol.anonymous else ():
                        if other.side is SOURCE and other.migration != slip.migration:
                            mistaken = Slip(slip.kind, other.migration, other.receipt)
                            yield from self._confirm(world, asked.source, mistaken)
            if slip.kind in (PaperKind.PASSPORT, PaperKind.RECEIPT, PaperKind.PROOF):
                for kind in (PaperKind.CANCEL, PaperKind.ASK):
                    yield from self._decide(world, asked.destination, slip._replace(kind=kind))
        for number, asked in enumerate(world.migrations):
            run = _run_of(world, asked.source, SOURCE, number)
            if (
                run is not None
                and not run.todo
                and (run.state, Input.GIVE_UP) in self.protocol.table
                and not Record(run.state.value if run.state not in _VOLATILE else "handing").decided
            ):
                yield (
                    f"the caller gives up at {_name(asked.source)}",
                    self._feed(world, asked.source, run, Input.GIVE_UP),
                )

    def _begin(self, world: World) -> Iterator[tuple[str, World]]:
        for process in world.processes:
            host = world.hosts[process.host]
            if process.receiver or not host.up or host.runs:
                continue
            if process.status not in ("running", "paused"):
                continue
            for destination in range(len(world.hosts)):
                if destination == process.host:
                    continue
                number = len(world.migrations)
                asked = Migration(process.host, destination, host.generation + 1, process.number, ran=False)
                begun = world._replace(migrations=(*world.migrations, asked))
                run = Run(SOURCE, number, State.ABSENT, 0, ())
                yield (
                    f"begin migration {number} at {_name(process.host)}",
                    self._feed(begun, process.host, run, Input.BEGIN),
                )

    def _prepare(self, world: World, host: int, slip: Slip) -> Iterator[tuple[str, World]]:
        state, generation = world.hosts[host], world.migrations[slip.migration].generation
        if not state.up:
            return
        words = f"prepare {slip.migration} at {_name(host)}"
        for run in state.runs:
            # Older ones are settled first; what cannot be settled yet stops the new one.
            if not run.todo and world.migrations[run.migration].generation < generation:
                if run.side is DESTINATION and run.state is State.PREPARED:
                    yield f"{words}: an older one is refused", self._feed(world, host, run, Input.CANCEL)
                elif run.side is SOURCE and run.state in (State.STOPPED, State.SILENT):
                    kind = PaperKind.PROOF if run.state is State.STOPPED else PaperKind.ASK
                    yield f"{words}: an older one is asked about", _tell(world, host, run, kind)
        seen = _row_of(world, host, DESTINATION, slip.migration)
        if self.protocol.forgets_tombstones:
            seen, generation = None, generation + (generation == state.generation)
        if state.runs or seen is not None or generation <= state.generation:
            return
        run = Run(DESTINATION, slip.migration, State.ABSENT, 0, ())
        yield words, self._feed(world, host, run, Input.PREPARE)

    def _perform(self, world: World, host: int, slip: Slip) -> Iterator[tuple[str, World]]:
        run = _run_of(world, host, SOURCE, slip.migration)
        if run is not None and run.state is State.BEGUN and not run.todo:
            performed = run._replace(receipt=slip.receipt)
            yield (
                f"perform {slip.migration} at {_name(host)}",
                self._feed(world, host, performed, Input.PERFORM),
            )

    def _decide(self, world: World, host: int, slip: Slip) -> Iterator[tuple[str, World]]:
        state = world.hosts[host]
        if not state.up:
            return
        words = f"{slip.kind.value} of {slip.migration} comes to {_name(host)}"
        run = _run_of(world, host, DESTINATION, slip.migration)
        row = _row_of(world, host, DESTINATION, slip.migration)
        if run is not None and run.todo:
            return  # it waits for what is being done
        generation = world.migrations[slip.migration].generation
        if run is None and row is None:
            key = None
        else:
            record = row.record if row is not None else Record.PREPARED
            receipt = row.receipt if row is not None else 0
            key = record, receipt, generation
        given = self._asked(key, slip, generation)
        if isinstance(given, PaperKind):
            yield words, _slip(world, Slip(given, slip.migration, slip.receipt))
            return
        if run is None and row is not None and row.settled:
            step = self.protocol.table.get((fall_back(row.record), given))
            if step is not None and step.answer is not None:
                yield words, _slip(world, Slip(step.answer, slip.migration, row.receipt))
            return
        if run is None:
            state_ = State.ABSENT if row is None else fall_back(row.record)
            run = Run(DESTINATION, slip.migration, state_, row.receipt if row else 0, ())
        if run.state is State.CLAIMING:
            yield f"{words}, which looks again", self._look(world, host, run)
            if self.bounds.silent:
                yield f"{words}, whose hypervisor is silent", self._feed(world, host, run, given)
        elif run.state is not State.ABSENT and Record(run.state.value).decided:
            yield f"{words}, which ends it first", self._feed(world, host, run, Input.RESTART)
        else:
            yield words, self._feed(world, host, run, given)

    def _confirm(self, world: World, host: int, slip: Slip) -> Iterator[tuple[str, World]]:
        state, asked = world.hosts[host], world.migrations[slip.migration]
        run = _run_of(world, host, SOURCE, slip.migration)
        row = _row_of(world, host, SOURCE, slip.migration)
        if not state.up or row is None or run is None or run.todo:
            return
        newest = state.generation == asked.generation
        given = self._answered(row.record, row.receipt, asked.generation, slip, newest=newest)
        if given is None:
            return
        words = f"{slip.kind.value} of {slip.migration} comes to {_name(host)}"
        if Record(run.state.value if run.state not in _VOLATILE else "handing").decided:
            yield f"{words}, which ends it first", self._feed(world, host, run, Input.RESTART)
        else:
            yield words, self._feed(world, host, run, given)

    # Faults

    def faults(self, world: World) -> Iterator[tuple[str, World]]:
        """What strikes from outside, and managers that come back."""
        for number, host in enumerate(world.hosts):
            if not host.up and host.journal:
                yield f"{_name(number)} comes back", self.restart(world, number)
                if self.bounds.silent and any(not row.settled for row in host.rows):
                    silent = self.restart(world, number, silent=True)
                    yield f"{_name(number)} comes back, and its hypervisor is silent", silent
            elif host.up and self.bounds.crash_managers and host.runs:
                yield f"{_name(number)}'s manager dies", _down(world, number)
            if self.bounds.crash_hosts and any(p.host == number for p in world.processes):
                yield f"{_name(number)} crashes", self._crash(world, number)
            if self.bounds.lose_journals and host.rows and host.journal <= len(world.hosts):
                lost = host._replace(
                    up=False, journal=host.journal + len(world.hosts), generation=0, rows=(), runs=()
                )
                yield f"{_name(number)} loses its journal and its mark", _with_host(world, number, lost)
        if self.bounds.kill:
            for process in world.processes:
                yield f"the guest at {_name(process.host)} is killed", self._kill(world, process)

    def _crash(self, world: World, host: int) -> World:
        for process in world.processes:
            if process.host == host:
                world = self._kill(world, process)
        return _down(world, host)

    def _kill(self, world: World, process: Process) -> World:
        killed = _without(world, process)
        excuse = ""
        if not any(p.fresh for p in killed.processes):
            excuse = "the only copy was killed"
        elif not any(_may_claim(world, p) for p in killed.processes if p.fresh):
            # HANDOVER, limit 2: the destination has not seen a proof and may never, so its whole copy is discarded.
            excuse = "the source died before its proof was shown"
        return killed._replace(excuse=world.excuse or excuse)

    def restart(self, world: World, host: int, *, silent: bool = False) -> World:
        """Bring a manager back: strays are ended, open rows are taken up and looked at.

        :param silent: the hypervisor does not say what became of the guests.
        """
        state = world.hosts[host]
        runs = tuple(
            Run(row.side, row.migration, fall_back(row.record), row.receipt, ())
            for row in state.rows
            if not row.settled
        )
        known = {run.migration + 1 for run in runs if run.side is DESTINATION}
        world = _with_host(world, host, state._replace(up=True, runs=runs))
        for run in runs if not silent else ():
            world = self._look(world, host, run)
        for process in world.processes:
            if process.host == host and process.receiver and process.number not in known:
                world = _without(world, process)
        return world


def _may_claim(world: World, process: Process) -> bool:
    """Whether a copy may run again: a receiver that is being claimed, or a domain's that nobody else has claimed."""
    if process.migration < 0:
        return True
    destination = world.migrations[process.migration].destination
    row = _row_of(world, destination, DESTINATION, process.migration)
    record = row.record if row is not None else Record.PREPARED
    if process.host == destination:
        return not process.receiver or record in (Record.CLAIMING, Record.CLAIMED)
    return record is not Record.CLAIMED


_VOLATILE = frozenset({State.STOPPED, State.SILENT, State.ABSENT, State.PREPARING})


def _paper(slip: Slip, generation: int) -> Paper:
    return Paper(
        kind=slip.kind,
        migration_id=_identity(slip.migration),
        generation=generation,
        receipt=_receipt(slip.receipt, slip.migration),
    )


def _name(host: int) -> str:
    return "ABCDEF"[host]


def _find(world: World, host: int, number: int) -> Process | None:
    for process in world.processes:
        if process.number == number and process.host == host:
            return process
    return None


def _row_of(world: World, host: int, side: Side, migration: int) -> Row | None:
    for row in world.hosts[host].rows:
        if row.side is side and row.migration == migration:
            return row
    return None


def _run_of(world: World, host: int, side: Side, migration: int) -> Run | None:
    for run in world.hosts[host].runs:
        if run.side is side and run.migration == migration:
            return run
    return None


def _with_host(world: World, number: int, host: Host) -> World:
    hosts = world.hosts
    return world._replace(hosts=(*hosts[:number], host, *hosts[number + 1 :]))


def _with_run(world: World, number: int, run: Run) -> World:
    """Put a run in its place; one that is decided and has nothing left to do is let go once its row is settled."""
    host = world.hosts[number]
    others = [r for r in host.runs if (r.side, r.migration) != (run.side, run.migration)]
    row = _row_of(world, number, run.side, run.migration)
    over = not run.todo and (row is None or row.settled)
    runs = others if over else [*others, run]
    runs.sort(key=lambda r: (r.migration, r.side is DESTINATION))
    return _with_host(world, number, host._replace(runs=tuple(runs)))


def _write(world: World, number: int, row: Row, *, raises: bool) -> World:
    host = world.hosts[number]
    others = [r for r in host.rows if (r.side, r.migration) != (row.side, row.migration)]
    rows = sorted([*others, row], key=lambda r: (r.migration, r.side is DESTINATION))
    generation = host.generation
    if raises:
        generation = max(generation, world.migrations[row.migration].generation)
    return _with_host(world, number, host._replace(rows=tuple(rows), generation=generation))


def _with_process(world: World, process: Process) -> World:
    others = [p for p in world.processes if (p.number, p.host) != (process.number, process.host)]
    return world._replace(processes=tuple(sorted([*others, process])))


def _without(world: World, process: Process) -> World:
    others = [p for p in world.processes if (p.number, p.host) != (process.number, process.host)]
    return world._replace(processes=tuple(others))


def _ran(world: World, migration: int) -> World:
    migrations = list(world.migrations)
    migrations[migration] = migrations[migration]._replace(ran=True)
    return world._replace(migrations=tuple(migrations))


def _down(world: World, number: int) -> World:
    return _with_host(world, number, world.hosts[number]._replace(up=False, runs=()))


def _run(world: World, process: Process) -> World:
    """Run a guest. INVARIANT I1 and I6 are checked here, and nowhere else."""
    for other in world.processes:
        if other.status == "running" and (other.number, other.host) != (process.number, process.host):
            raise Violation(f"I1: two run, at {_name(other.host)} and at {_name(process.host)}")
    if not process.fresh:
        raise Violation(f"I6: the guest runs at {_name(process.host)} from an older memory")
    others = tuple(
        other._replace(fresh=False)
        for other in world.processes
        if (other.number, other.host) != (process.number, process.host)
    )
    transfer = process.transfer
    return world._replace(
        processes=tuple(sorted([*others, process._replace(status="running", transfer=transfer)]))
    )


def _resume_by_itself(world: World, process: Process, bounds: Bounds) -> World:
    failed = process._replace(transfer="failed")
    world = _with_process(world, failed)
    if process.status != "tail":
        return world
    if bounds.paused:
        return _with_process(world, failed._replace(status="paused"))
    return _run(world, failed)


def _slip(world: World, slip: Slip) -> World:
    return world if slip in world.slips else world._replace(slips=world.slips | {slip})


def _tell(world: World, host: int, run: Run, kind: PaperKind) -> World:
    """Let a paper go out. INVARIANT I3: nobody is told what is not so."""
    ran = world.migrations[run.migration].ran
    if kind is PaperKind.CLAIM and not ran and not world.excuse:
        raise Violation(f"I3: a claim of migration {run.migration} is told, and the guest never came")
    lost = any(host.journal > len(world.hosts) for host in world.hosts)
    if kind in (PaperKind.REFUSAL, PaperKind.KEPT) and ran and not lost:
        raise Violation(f"I3: migration {run.migration} is told to have failed, and the guest ran")
    world = _with_run(world, host, run)
    return _slip(world, Slip(kind, run.migration, run.receipt))


__all__ = [
    "Bounds",
    "Host",
    "Migration",
    "Process",
    "Protocol",
    "Row",
    "Rules",
    "Run",
    "Slip",
    "Violation",
    "World",
    "begin_world",
    "replace",
]
