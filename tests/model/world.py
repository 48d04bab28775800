"""The world that the checker explores: hosts with journals, guests' processes, papers on their way, and faults.

One domain moves between hosts.  What a manager does is decided by the shipped table and the shipped recovery function
(:class:`Protocol` holds them, so that a test can put others there); everything else here is the world around them, as
:mod:`ferryman.engine` and the drivers meet it:

- A paper that was told once may arrive at any time, any number of times, or never; who carries papers may turn any of
  them into a question or a cancellation of the same migration.
- A manager may die between any two of its actions and come back; its journal stays, what it held in memory does not.
  What it has found out may have changed before it acts on it.
- A process may be killed; a host may crash, with its processes.
- The hypervisor resumes a source by itself when its stream breaks before the transfer has completed (HANDOVER, Q1).
- A command that runs a guest may fail; starting a receiver may fail; a hypervisor may not answer.
- Post-copy: the source may be switched; until the device state is there its hypervisor may still resume it, and from
  then on each half needs the other until every page has come.
- A journal may be lost with its mark, or be put back as it was; a person may bring the other host's journal, or say,
  truly or not, that the other host and the guest on it are lost.

A process holds the guest's memory, and ``fresh`` says whether that is the newest: running a guest makes every other
copy old.  Running an old copy, or a second one beside a running one, is a violation, noted the moment it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from ferryman.handover import (
    QUESTIONS,
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
    admit_inquiry,
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
    :param asks: a side that cannot decide asks the other.
    :param presumes: what a caller that gets no answer to a paper takes the answer for.
    :param hasty_switch: the source switches to post-copy without a pledge.
    :param hasty_proof: a switched source gives its proof before it is beyond its own failure path.
    :param ignores_mark: a journal that is older than its mark is opened.
    :param ignores_older: a newer migration of the domain is prepared only where no older one is open.
    :param destroys_by_name: a claim destroys the domain's process, whichever that is by now, however late it comes.
    """

    table: Mapping[tuple[State, Input], Step] = field(default_factory=lambda: dict(TABLE))
    recover: Callable[[MigrationRow, Evidence], Input | None] = recover
    admit_question: Callable[[MigrationRow | None, Paper], Input | PaperKind] = admit_question
    admit_inquiry: Callable[[MigrationRow | None, Paper], Input | PaperKind] = admit_inquiry
    admit_answer: Callable[..., Input | None] = admit_answer
    late: frozenset[tuple[State, Input]] = frozenset()
    stop_is_proof: bool = False
    forgets_tombstones: bool = False
    anonymous: bool = False
    asks: bool = True
    presumes: Mapping[PaperKind, PaperKind] = field(default_factory=dict)
    hasty_switch: bool = False
    hasty_proof: bool = False
    ignores_mark: bool = False
    ignores_older: bool = False
    destroys_by_name: bool = False


class Words(NamedTuple):
    """What a move is, in words: who does what, and towards whom."""

    who: str
    what: str
    to: str = ""

    def __str__(self) -> str:
        return f"{self.who} {self.what}"


CALLER = "caller"


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
    still resume it) or done (only a command runs it).  ``transfer``: '' or active, switching, switched, failed,
    completed.
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
    killed: bool
    """Whether a fault has ended a receiver that was whole."""
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
    :param paused: the guest is paused, and is to arrive so. :param postcopy: transfers may be switched.
    :param old_journals: a journal may be put back as it was before its last write.
    :param person: somebody may bring evidence.
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
    postcopy: bool = False
    old_journals: bool = False
    person: bool = False


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
        killed=False,
        excuse="",
    )


@cache
def in_order(slips: frozenset[Slip]) -> tuple[Slip, ...]:
    """Papers in an order that is the same in every run, so that the shortest way found is."""
    return tuple(sorted(slips, key=lambda slip: (slip.migration, slip.kind.value, slip.receipt)))


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

    def moves(self, world: World) -> Iterator[tuple[Words, World]]:
        """Every move, with its words and where it leads.

        :raises Violation: a move breaks an invariant; its words are the exception's.
        """
        yield from self.progress(world)
        yield from self.faults(world)

    def progress(self, world: World) -> Iterator[tuple[Words, World]]:
        """The moves of managers, hypervisors and callers."""
        yield from self._managers(world)
        yield from self.hypervisors(world)
        yield from self._coordinator(world)

    def _managers(self, world: World) -> Iterator[tuple[Words, World]]:
        """Managers go on with what they are doing, or look again."""
        for number, host in enumerate(world.hosts):
            for run in host.runs:
                if run.todo:
                    yield from self.go_on(world, number, run)
                else:
                    yield from self.lease(world, number, run)
                    yield from self.asking(world, number, run)

    def go_on(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        """Do the next thing of a step."""
        head, rest = run.todo[0], run.todo[1:]
        if head == WAIT:
            yield from self._wait(world, host, run)
        elif isinstance(head, PaperKind):
            words = Words(_name(host), f"tells {head.value}", CALLER)
            yield words, _tell(world, host, run._replace(todo=rest), head)
        elif isinstance(head, Input):
            words = Words(_name(host), f"notes: {head.value}")
            world = self._noting(world, host, run, head)
            yield words, self.feed(world, host, run._replace(todo=()), head)
        elif isinstance(head, Record):
            written = self._write(world, host, run, head, raises=True)
            yield (
                Words(_name(host), f"writes {head.value}"),
                _with_run(written, host, run._replace(todo=rest)),
            )
        else:
            assert isinstance(head, Action)
            yield from self._act(world, host, run._replace(todo=rest), head)

    def _noting(self, world: World, host: int, run: Run, given: Input) -> World:
        """What an outcome says about the guest, whoever knows it."""
        if given is Input.RAN:
            if not world.excuse and self.bounds.paused and _find(world, host, run.migration + 1) is None:
                world = world._replace(excuse="the only copy was killed while it was claimed")
            return _ran(world, run.migration)
        if given is Input.NEVER_RAN and not any(
            p.fresh and not p.receiver and p.transfer != "switched" for p in world.processes
        ):
            world = world._replace(excuse=world.excuse or "the only copy could not be run")
        return world

    def _wait(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        """Await the end of a transfer, or abort it."""
        process = _find(world, host, self._process_of(world, run))
        name = _name(host)

        def then(given: Input) -> Run:
            return run._replace(todo=(given,))

        if process is None:
            yield Words(name, "sees that its guest's process is gone"), self._look(world, host, run)
        elif process.transfer in ("active", "switching"):
            if process.status == "tail" and self.protocol.stop_is_proof:
                yield (
                    Words(name, "sees that the guest is stopped"),
                    _with_run(world, host, then(Input.PROVED)),
                )
            if process.transfer == "switching" and self.protocol.hasty_proof:
                yield Words(name, "sees that it has switched"), _with_run(world, host, then(Input.SWITCHED))
            aborted = _resume_by_itself(world, process, self.bounds)
            yield Words(name, "aborts the transfer"), _with_run(aborted, host, then(Input.STAYED))
        else:
            given = {"completed": Input.PROVED, "switched": Input.SWITCHED}.get(
                process.transfer, Input.STAYED
            )
            yield (
                Words(name, f"sees that the transfer {process.transfer}"),
                _with_run(world, host, then(given)),
            )
        if self.bounds.silent:
            yield (
                Words(name, "hears nothing more from its hypervisor"),
                _with_run(world, host, then(Input.UNCLEAR)),
            )

    def _process_of(self, world: World, run: Run) -> int:
        if run.side is SOURCE:
            return world.migrations[run.migration].process
        return run.migration + 1

    def _act(self, world: World, host: int, run: Run, action: Action) -> Iterator[tuple[Words, World]]:
        words = Words(_name(host), action.value)
        number = self._process_of(world, run)
        process = _find(world, host, number)
        match action:
            case Action.START_RECEIVER:
                yield from self._start_receiver(world, host, run, words)
            case Action.TRANSFER:
                if process is None:
                    yield words, self._look(world, host, run)
                else:
                    receiver = _name(world.migrations[run.migration].destination)
                    sending = process._replace(transfer="active", migration=run.migration)
                    sent = _with_process(world, sending)
                    yield words._replace(to=receiver), _with_run(sent, host, run._replace(todo=(WAIT,)))
                    failed = words._replace(what=f"{words.what} fails")
                    yield failed, _with_run(world, host, run._replace(todo=(Input.STAYED,)))
            case Action.SWITCH:
                switched = world
                if process is not None and process.transfer == "active" and process.status != "tail":
                    switched = _with_process(world, process._replace(status="tail", transfer="switching"))
                yield words, _with_run(switched, host, run)
            case Action.SERVE_PAGES:
                if process is None or process.transfer != "switched" or not _receives(world, process):
                    yield words, _with_run(world, host, run._replace(todo=(Input.SERVED,)))
            case Action.RUN_GUEST:
                yield from self._run_guest(world, host, run, process, words)
            case Action.DESTROY_RECEIVER | Action.DESTROY_COPY:
                if action is Action.DESTROY_RECEIVER and process is not None and not process.receiver:
                    process = None  # it has been taken in, and is no receiver any more
                if action is Action.DESTROY_COPY and self.protocol.destroys_by_name:
                    process = next((p for p in world.processes if p.host == host and not p.receiver), None)
                yield words, _with_run(_ended(world, process), host, run)
            case Action.RESUME if process is not None and process.status == "tail":
                # Before its transfer has ended a hypervisor refuses; the row stays open, and it is tried again.
                refused = words._replace(what=f"{words.what} is refused")
                yield refused, _with_run(world, host, run._replace(todo=()))
            case Action.RESUME:
                yield words, _with_run(self._resumed(world, process), host, run)
            case Action.CANCEL_TRANSFER:
                cancelled = world
                if process is not None and process.transfer in ("active", "switching"):
                    cancelled = _resume_by_itself(world, process, self.bounds)
                yield words, _with_run(cancelled, host, run)
            case Action.ADOPT:
                adopted = world
                if process is not None:
                    status = "paused" if process.status == "whole" else process.status
                    adopted = _with_process(world, process._replace(receiver=False, status=status))
                yield words, _with_run(adopted, host, run)
            case Action.SETTLE:
                yield words, _settled(world, host, run)

    def _start_receiver(
        self, world: World, host: int, run: Run, words: Words
    ) -> Iterator[tuple[Words, World]]:
        taken = any(p.host == host for p in world.processes)
        if not taken:
            receiver = Process(run.migration + 1, host, "incoming", False, True, "", run.migration)
            started = _with_process(world, receiver)
            yield words, _with_run(started, host, run._replace(todo=(Input.RECEIVER_UP,)))
        if self.bounds.fail or taken:
            failed = words._replace(what=f"{words.what} fails")
            yield failed, _with_run(world, host, run._replace(todo=(Input.RECEIVER_FAILED,)))

    def _resumed(self, world: World, process: Process | None) -> World:
        if process is None or process.status == "running":
            return world
        if process.transfer == "switched":
            # HANDOVER, experiment 11: what is left of a switched source cannot be resumed; it is ended.
            return _without(world, process)
        if self.bounds.paused:
            return _with_process(world, process._replace(status="paused"))
        return _run(world, process)

    def _run_guest(
        self, world: World, host: int, run: Run, process: Process | None, words: Words
    ) -> Iterator[tuple[Words, World]]:
        ran, never_ran = run._replace(todo=(Input.RAN,)), run._replace(todo=(Input.NEVER_RAN,))
        if process is None or process.status == "incoming":
            yield words._replace(what=f"{words.what}: it never ran"), _with_run(world, host, never_ran)
            return
        if process.status == "running":
            yield words, _with_run(world, host, ran)
            return
        if self.bounds.paused:
            yield words, _with_run(world, host, ran)
            return
        arrived = _ran(_run(world, process), run.migration)
        yield words, _with_run(arrived, host, ran)
        if self.bounds.fail:
            yield words._replace(what=f"{words.what} fails"), _with_run(world, host, never_ran)

    def feed(self, world: World, host: int, run: Run, given: Input) -> World:
        """Write what the table says, and take on what is to be done."""
        step = self.protocol.table.get((run.state, given))
        if step is None:
            # The engine raises and nothing happens.
            return _with_run(world, host, run._replace(todo=()))
        receipt = run.receipt
        if step.record is Record.PREPARED:
            receipt = world.hosts[host].journal
        todo = _todo(step)
        taken = run._replace(receipt=receipt)
        if step.record is not None and (run.state, given) in self.protocol.late:
            todo = (*todo[:1], step.record, *todo[1:])
        elif step.record is not None:
            # A tombstone of an id that was never prepared names no domain, so it raises no generation.
            raises = not (run.state is State.ABSENT and step.record is Record.NEVER_PREPARED)
            world = self._write(world, host, taken, step.record, raises=raises)
        return _with_run(world, host, taken._replace(state=step.state, todo=todo))

    def _write(self, world: World, host: int, run: Run, record: Record, *, raises: bool) -> World:
        row = Row(run.side, run.migration, record, run.receipt, settled=False)
        return _write(world, host, row, raises=raises)

    def _evidence(self, world: World, host: int, run: Run) -> tuple[GuestEvidence, TransferEvidence]:
        process = _find(world, host, self._process_of(world, run))
        if process is None:
            return GuestEvidence.GONE, TransferEvidence.UNKNOWN
        guest = GuestEvidence.RUNNING if process.status == "running" else GuestEvidence.STOPPED
        transfer = "active" if process.transfer == "switching" else process.transfer
        return guest, TransferEvidence(transfer or "none")

    def _look(self, world: World, host: int, run: Run) -> World:
        """Find out what the recovery function says, to act on it next; a source that finds nothing out will ask."""
        row = _row_of(world, host, run.side, run.migration)
        record = row.record if row is not None else Record(run.state.value)
        guest, transfer = self._evidence(world, host, run)
        given = self._recovered(run.side, record, guest, transfer)
        if given is None:
            given = Input.UNCLEAR if run.state is State.HANDING else None
        if given is None:
            return _with_run(world, host, run._replace(todo=()))
        if record is Record.CLAIMING and guest is GuestEvidence.GONE and given is Input.RAN and world.killed:
            # HANDOVER, limit 1: it may have run, so nobody may run an older copy any more.
            excuse = "" if world.migrations[run.migration].ran else "nobody can tell whether it had run"
            world = world._replace(excuse=world.excuse or excuse)
        return _with_run(world, host, run._replace(todo=(given,)))

    def lease(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        """What a side does by itself when it has heard nothing for the length of its lease."""
        words = Words(_name(host), f"waited long enough ({run.state.value})")
        match run.state:
            case _ if (run.state, Input.RESTART) in self.protocol.table and not _decided(run.state):
                # The shipped table has no such entry: nobody decides because time has passed.
                yield words, self.feed(world, host, run, Input.RESTART)
            case State.PREPARED:
                yield words, self.feed(world, host, run, Input.CANCEL)
            case State.BEGUN:
                yield words, self.feed(world, host, run, Input.GIVE_UP)
            case State.STOPPED | State.SWITCHED | State.BEREFT:
                return
            case _:
                yield words, self._look(world, host, run)

    def asking(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        """What a side that cannot decide alone asks the other."""
        if run.state is State.PLEDGED:
            yield from self._inquire(world, host, run)
        elif run.state in QUESTIONS:
            yield from self._asks(world, host, run)

    def _asks(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        if self.protocol.asks:
            kind = QUESTIONS[run.state]
            yield Words(_name(host), f"asks ({kind.value})", CALLER), _tell(world, host, run, kind)

    def _inquire(self, world: World, host: int, run: Run) -> Iterator[tuple[Words, World]]:
        """A destination that pledged itself asks the source, which answers from its table."""
        asked = world.migrations[run.migration]
        source, number = world.hosts[asked.source], run.migration
        row = _row_of(world, asked.source, SOURCE, number)
        other = _run_of(world, asked.source, SOURCE, number)
        if not source.up or row is None or (other is not None and other.todo):
            return
        found = self._row(SOURCE, number, row.record, row.receipt, asked.generation, settled=row.settled)
        question = Slip(PaperKind.ASK, number, run.receipt)
        if self.protocol.admit_inquiry(found, _paper(question, asked.generation)) is not Input.ASK:
            return
        words = Words(_name(host), "asks", _name(asked.source))
        if other is not None:
            yield words, self.feed(world, asked.source, other, Input.ASK)
            return
        state = fall_back(row.record)
        step = self.protocol.table.get((state, Input.ASK))
        if step is not None and step.answer is not None:
            speaker = Run(SOURCE, number, state, row.receipt, ())
            yield words, _tell(world, asked.source, speaker, step.answer, known=False)

    def hypervisors(self, world: World) -> Iterator[tuple[Words, World]]:
        """Transfers go on or break by themselves."""
        for process in world.processes:
            if process.transfer not in ("active", "switching", "switched"):
                continue
            receiver = _receives(world, process)
            name = _name(process.host)
            if process.transfer == "switched":
                if receiver is not None:
                    completed = process._replace(transfer="completed")
                    yield Words(name, "QEMU has sent every page"), _with_process(world, completed)
                continue
            if process.transfer == "switching":
                if receiver is not None and receiver.status == "incoming":
                    loaded = _with_process(world, receiver._replace(status="whole", fresh=process.fresh))
                    beyond = process._replace(status="done", transfer="switched")
                    yield (
                        Words(name, "QEMU has sent the device state", _name(receiver.host)),
                        _with_process(loaded, beyond),
                    )
            elif process.status == "tail":
                done = process._replace(status="done", transfer="completed")
                yield Words(name, "QEMU hears that all has come, and completes"), _with_process(world, done)
            elif receiver is not None and receiver.status == "incoming":
                whole = _with_process(world, receiver._replace(status="whole", fresh=process.fresh))
                yield (
                    Words(name, "QEMU stops the guest and sends the rest", _name(receiver.host)),
                    _with_process(whole, process._replace(status="tail")),
                )
            resumes = ", and resumes the guest" if process.status == "tail" else ""
            yield (
                Words(name, f"QEMU sees the stream break{resumes}"),
                _resume_by_itself(world, process, self.bounds),
            )

    def _coordinator(self, world: World) -> Iterator[tuple[Words, World]]:
        """Whoever carries papers: any of them, at any time, any number of times."""
        if len(world.migrations) < self.bounds.migrations:
            yield from self._begin(world)
        for slip in in_order(world.slips):
            asked = world.migrations[slip.migration]
            match slip.kind:
                case PaperKind.PASSPORT:
                    yield from self._prepare(world, asked.destination, slip)
                case PaperKind.RECEIPT:
                    yield from self._perform(world, asked.source, slip)
                    if self.bounds.postcopy:
                        yield from self.decide(world, asked.destination, slip._replace(kind=PaperKind.SWITCH))
                        if self.protocol.hasty_switch:
                            yield from self._switch(world, asked.source, slip._replace(kind=PaperKind.PLEDGE))
                case PaperKind.PLEDGE:
                    yield from self._switch(world, asked.source, slip)
                    yield from self.confirm(world, asked.source, slip)
                case PaperKind.PROOF | PaperKind.KEPT | PaperKind.ASK | PaperKind.NO_PROOF:
                    yield from self.decide(world, asked.destination, slip)
                case PaperKind.CLAIM | PaperKind.REFUSAL | PaperKind.NEVER_PREPARED | PaperKind.UNKNOWN:
                    yield from self.confirm(world, asked.source, slip)
                    for other in world.hosts[asked.source].runs if self.protocol.anonymous else ():
                        if other.side is SOURCE and other.migration != slip.migration:
                            mistaken = Slip(slip.kind, other.migration, other.receipt)
                            yield from self.confirm(world, asked.source, mistaken)
            if slip.kind in (PaperKind.PASSPORT, PaperKind.RECEIPT, PaperKind.PROOF):
                for kind in (PaperKind.CANCEL, PaperKind.ASK):
                    yield from self.decide(world, asked.destination, slip._replace(kind=kind))
            presumed = self.protocol.presumes.get(slip.kind)
            if presumed is not None:
                for words, following in self.confirm(world, asked.source, slip._replace(kind=presumed)):
                    yield words._replace(what=f"gets no answer, and says {presumed.value}"), following
        for number, asked in enumerate(world.migrations):
            run = _run_of(world, asked.source, SOURCE, number)
            if (
                run is not None
                and not run.todo
                and (run.state, Input.GIVE_UP) in self.protocol.table
                and not _decided(run.state)
            ):
                yield (
                    Words(CALLER, "gives up", _name(asked.source)),
                    self.feed(world, asked.source, run, Input.GIVE_UP),
                )

    def _begin(self, world: World) -> Iterator[tuple[Words, World]]:
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
                    Words(CALLER, f"begins migration {number}", _name(process.host)),
                    self.feed(begun, process.host, run, Input.BEGIN),
                )

    def _prepare(self, world: World, host: int, slip: Slip) -> Iterator[tuple[Words, World]]:
        state, generation = world.hosts[host], world.migrations[slip.migration].generation
        if not state.up:
            return
        words = Words(CALLER, f"prepares migration {slip.migration}", _name(host))
        for run in state.runs if not self.protocol.ignores_older else ():
            # Older ones are settled first; what cannot be settled yet stops the new one.
            if not run.todo and world.migrations[run.migration].generation < generation:
                if run.side is DESTINATION and run.state is State.PREPARED:
                    yield (
                        words._replace(what=f"{words.what}: an older one is refused"),
                        self.feed(world, host, run, Input.CANCEL),
                    )
                elif run.side is SOURCE and run.state in QUESTIONS:
                    yield from self._asks(world, host, run)
        seen = _row_of(world, host, DESTINATION, slip.migration)
        if self.protocol.forgets_tombstones:
            seen, generation = None, generation + (generation == state.generation)
        if state.runs or seen is not None or generation <= state.generation:
            return
        run = Run(DESTINATION, slip.migration, State.ABSENT, 0, ())
        yield words, self.feed(world, host, run, Input.PREPARE)

    def _perform(self, world: World, host: int, slip: Slip) -> Iterator[tuple[Words, World]]:
        run = _run_of(world, host, SOURCE, slip.migration)
        if run is not None and run.state is State.BEGUN and not run.todo:
            performed = run._replace(receipt=slip.receipt)
            yield (
                Words(CALLER, f"performs migration {slip.migration}", _name(host)),
                self.feed(world, host, performed, Input.PERFORM),
            )

    def _switch(self, world: World, host: int, slip: Slip) -> Iterator[tuple[Words, World]]:
        """A pledge comes while the transfer goes on."""
        run = _run_of(world, host, SOURCE, slip.migration)
        row = _row_of(world, host, SOURCE, slip.migration)
        if run is None or row is None or run.todo != (WAIT,):
            return
        newest = world.hosts[host].generation == world.migrations[slip.migration].generation
        given = self._answered(
            row.record, row.receipt, world.migrations[slip.migration].generation, slip, newest=newest
        )
        step = self.protocol.table.get((run.state, given)) if given is not None else None
        if step is not None:
            switching = run._replace(todo=(*step.actions, WAIT))
            yield Words(CALLER, "brings the pledge", _name(host)), _with_run(world, host, switching)

    def decide(self, world: World, host: int, slip: Slip) -> Iterator[tuple[Words, World]]:
        """A paper comes to a destination."""
        state = world.hosts[host]
        if not state.up:
            return
        words = Words(CALLER, f"brings {slip.kind.value}", _name(host))
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
            yield words, _told(world, Slip(given, slip.migration, slip.receipt))
            return
        if run is None and row is not None and row.settled:
            step = self.protocol.table.get((fall_back(row.record), given))
            if step is not None and step.answer is not None:
                yield words, _told(world, Slip(step.answer, slip.migration, row.receipt))
            return
        if run is None:
            state_ = State.ABSENT if row is None else fall_back(row.record)
            run = Run(DESTINATION, slip.migration, state_, row.receipt if row else 0, ())
        if run.state is State.CLAIMING:
            looks = words._replace(what=f"{words.what}, which looks again")
            yield looks, self._look(world, host, run)
            if self.bounds.silent:
                mute = words._replace(what=f"{words.what}, whose hypervisor is silent")
                yield mute, self.feed(world, host, run, given)
        elif _decided(run.state):
            yield words._replace(what=f"{words.what}, which ends it first"), self._look(world, host, run)
        else:
            yield words, self.feed(world, host, run, given)

    def confirm(self, world: World, host: int, slip: Slip) -> Iterator[tuple[Words, World]]:
        """A paper comes to a source."""
        state, asked = world.hosts[host], world.migrations[slip.migration]
        run = _run_of(world, host, SOURCE, slip.migration)
        row = _row_of(world, host, SOURCE, slip.migration)
        if (
            run is None
            and row is not None
            and self.protocol.destroys_by_name
            and slip.kind is PaperKind.CLAIM
        ):
            run = Run(SOURCE, slip.migration, State.STOPPED, row.receipt, ())
        if not state.up or row is None or run is None or run.todo:
            return
        newest = state.generation == asked.generation or self.protocol.destroys_by_name
        given = self._answered(row.record, row.receipt, asked.generation, slip, newest=newest)
        if given is None:
            return
        words = Words(CALLER, f"brings {slip.kind.value}", _name(host))
        if _decided(run.state):
            yield words._replace(what=f"{words.what}, which ends it first"), self._look(world, host, run)
        else:
            yield words, self.feed(world, host, run, given)

    # Faults, and people

    def faults(self, world: World) -> Iterator[tuple[Words, World]]:
        """What strikes from outside, managers that come back, and people."""
        for number, host in enumerate(world.hosts):
            name = _name(number)
            if not host.up and host.journal:
                yield Words(name, "comes back"), self.restart(world, number)
                if self.bounds.silent and any(not row.settled for row in host.rows):
                    silent = self.restart(world, number, silent=True)
                    yield Words(name, "comes back, and its hypervisor is silent"), silent
            elif host.up and self.bounds.crash_managers and host.runs:
                yield Words(name, "dies (the manager)"), down(world, number)
            if self.bounds.crash_hosts and any(p.host == number for p in world.processes):
                yield Words(name, "crashes (the host)"), self.crash(world, number)
            if self.bounds.lose_journals and host.rows and 0 < host.journal <= len(world.hosts):
                yield Words(name, "loses its journal and its mark"), self._lose(world, number)
            if self.bounds.old_journals and host.rows and host.journal and not host.up:
                older = _with_host(world, number, self._put_back(host))
                yield Words(name, "gets its journal back as it was before"), older
            if self.bounds.person:
                yield from self._person(world, number)
        if self.bounds.kill:
            for process in world.processes:
                yield (
                    Words(_name(process.host), "loses its guest's process (killed)"),
                    self.kill(world, process),
                )

    def _lose(self, world: World, host: int) -> World:
        state = world.hosts[host]
        lost = state._replace(
            up=False, journal=state.journal + len(world.hosts), generation=0, rows=(), runs=()
        )
        kept = [p for p in world.processes if p.fresh and not (p.host == host and p.status == "whole")]
        excuse = "" if kept else "the journal was lost that knew whose the guest is"
        return _with_host(world._replace(excuse=world.excuse or excuse), host, lost)

    def _put_back(self, host: Host) -> Host:
        """One row is as it was before; the mark tells, and the host does not open."""
        if not self.protocol.ignores_mark:
            return host._replace(journal=0)
        row = host.rows[-1]
        before = _BEFORE.get(row.record)
        rows = (*host.rows[:-1], row._replace(record=before, settled=False)) if before else host.rows[:-1]
        return host._replace(rows=rows)

    def _person(self, world: World, host: int) -> Iterator[tuple[Words, World]]:
        """Evidence that somebody brings to a side that is in doubt."""
        for run in world.hosts[host].runs:
            asked = world.migrations[run.migration]
            there = asked.destination if run.side is SOURCE else asked.source
            if run.todo or (run.state, Input.WRITTEN_OFF) not in self.protocol.table:
                continue
            off = world._replace(excuse=_WRITTEN_OFF)
            words = Words("person", f"says that {_name(there)} and the guest on it are lost", _name(host))
            yield words, self.feed(off, host, run, Input.WRITTEN_OFF)
            # The journal of a host where nothing runs any more.
            if (
                run.side is SOURCE
                and not world.hosts[there].up
                and world.hosts[there].journal
                and not any(p.host == there for p in world.processes)
                and run.state in QUESTIONS
            ):
                words = Words("person", f"brings the journal of {_name(there)}", _name(host))
                yield (
                    words,
                    self._offline(world, there, Slip(QUESTIONS[run.state], run.migration, run.receipt)),
                )

    def _offline(self, world: World, host: int, slip: Slip) -> World:
        """What a destination's rules decide where its guests and programs are gone, written into its journal."""
        row = _row_of(world, host, DESTINATION, slip.migration)
        generation = world.migrations[slip.migration].generation
        key = (row.record, row.receipt, generation) if row is not None else None
        given = self._asked(key, slip, generation)
        if isinstance(given, PaperKind) or row is None:
            return world
        run = Run(DESTINATION, slip.migration, fall_back(row.record), row.receipt, ())
        if not row.record.decided:
            found = self._recovered(DESTINATION, row.record, GuestEvidence.GONE, TransferEvidence.UNKNOWN)
            if found is None:
                return world
            world = self._noting(world, host, run, found)
            if row.record is Record.CLAIMING:
                world = world._replace(excuse=world.excuse or "nobody can tell whether it had run")
            step = self.protocol.table[run.state, found]
            if step.record is not None:
                world = self._write(world, host, run, step.record, raises=False)
            run = run._replace(state=step.state)
        answer = self.protocol.table[run.state, given].answer
        return _slip(world, Slip(answer, slip.migration, run.receipt)) if answer is not None else world

    def crash(self, world: World, host: int) -> World:
        """A host goes down, with its processes."""
        for process in world.processes:
            if process.host == host:
                world = self.kill(world, process)
        return down(world, host)

    def kill(self, world: World, process: Process) -> World:
        """A process is killed; ``excuse`` says what that takes with it."""
        other = _other_half(world, process)
        killed = _without(world, process)._replace(killed=world.killed or process.status == "whole")
        if other is not None:
            # HANDOVER, limit 3: each half of a switched guest needs the other.
            lost = world.excuse or "post-copy: one half of the guest was lost"
            killed = _without(killed, other) if other.receiver or other.transfer == "" else killed
            return killed._replace(excuse=lost)
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
        for run in runs:
            if not silent:
                world = self._look(world, host, run)
            elif run.state is State.HANDING:
                world = _with_run(world, host, run._replace(todo=(Input.UNCLEAR,)))
        for process in world.processes:
            if process.host != host or not process.receiver or process.number in known:
                continue
            if process.status == "running":
                # Rule 3: a running receiver is a claim, whatever the journal has lost.
                world = _with_process(world, process._replace(receiver=False))
            else:
                world = _ended(world, process)
        return world


_BEFORE = {
    Record.CLAIMED: Record.CLAIMING,
    Record.CLAIMING: Record.PREPARED,
    Record.PLEDGED: Record.PREPARED,
    Record.REFUSED: Record.PREPARED,
    Record.KEPT: Record.HANDING,
    Record.GIVEN: Record.HANDING,
    Record.HANDING: Record.BEGUN,
}


def _todo(step: Step) -> tuple[Action | PaperKind | Record | Input | str, ...]:
    return step.actions if step.answer is None else (*step.actions, step.answer)


def _decided(state: State) -> bool:
    return state not in _VOLATILE and Record(state.value).decided


def _receives(world: World, process: Process) -> Process | None:
    """The receiver of a process's transfer, whoever owns it by now."""
    return _find(world, world.migrations[process.migration].destination, process.migration + 1)


def _other_half(world: World, process: Process) -> Process | None:
    """The other process without which a guest that was switched to post-copy cannot live."""
    if process.transfer == "switched":
        return _receives(world, process)
    for other in world.processes:
        if other.transfer == "switched" and _receives(world, other) == process:
            return other
    return None


def _ended(world: World, process: Process | None) -> World:
    """End a process as a step of the protocol."""
    if process is None:
        return world
    receiver = _receives(world, process) if process.transfer == "switched" else None
    if receiver is not None and not world.excuse:
        raise Violation(f"I2: {_name(process.host)} lets go, and pages were still to be sent")
    return _without(world, process)


def _settled(world: World, host: int, run: Run) -> World:
    world = _with_run(world, host, run)
    state = world.hosts[host]
    rows = tuple(
        row._replace(settled=True)
        if (row.side, row.migration, row.record.value) == (run.side, run.migration, run.state.value)
        else row
        for row in state.rows
    )
    # What is left of the step, its answer, is told by a run that nobody else uses any more.
    return _with_host(world, host, state._replace(rows=rows))


def _may_claim(world: World, process: Process) -> bool:
    """Whether a copy may run again: a receiver that is being claimed, or a domain's that nobody else has claimed."""
    if process.migration < 0:
        return True
    destination = world.migrations[process.migration].destination
    row = _row_of(world, destination, DESTINATION, process.migration)
    record = row.record if row is not None else Record.PREPARED
    if process.host == destination:
        return not process.receiver or record in (Record.CLAIMING, Record.CLAIMED)
    return record is not Record.CLAIMED and process.transfer != "switched"


_FAILURES = (PaperKind.REFUSAL, PaperKind.KEPT, PaperKind.NEVER_PREPARED)

_WRITTEN_OFF = "a person wrote the other host off"

_VOLATILE = frozenset(
    {State.STOPPED, State.SWITCHED, State.SILENT, State.BEREFT, State.ABSENT, State.PREPARING}
)


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
    """Note that a guest came. INVARIANT I3: nobody had been told that it would not."""
    lost = any(not 0 < host.journal <= len(world.hosts) for host in world.hosts)
    if not world.migrations[migration].ran and not lost:
        for slip in world.slips:
            if slip.migration == migration and slip.kind in _FAILURES:
                raise Violation(
                    f"I3: migration {migration} was told to have failed, and the guest comes after all"
                )
    migrations = list(world.migrations)
    migrations[migration] = migrations[migration]._replace(ran=True)
    return world._replace(migrations=tuple(migrations))


def down(world: World, number: int) -> World:
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


def _tell(world: World, host: int, run: Run, kind: PaperKind, *, known: bool = True) -> World:
    """Let a paper go out."""
    if known:
        world = _with_run(world, host, run)
    return _told(world, Slip(kind, run.migration, run.receipt))


def _told(world: World, slip: Slip) -> World:
    """INVARIANT I3: nobody is told what is not so."""
    ran = world.migrations[slip.migration].ran
    if slip.kind is PaperKind.CLAIM and not ran and not world.excuse:
        raise Violation(f"I3: a claim of migration {slip.migration} is told, and the guest never came")
    lost = any(not 0 < host.journal <= len(world.hosts) for host in world.hosts)
    if slip.kind is PaperKind.GIVEN and not ran and world.excuse != _WRITTEN_OFF:
        raise Violation(f"I3: the source has let go in migration {slip.migration}, and the guest never came")
    if slip.kind in _FAILURES and ran and not lost:
        raise Violation(f"I3: migration {slip.migration} is told to have failed, and the guest ran")
    return _slip(world, slip)


__all__ = [
    "CALLER",
    "in_order",
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
    "Words",
    "World",
    "begin_world",
    "replace",
]
