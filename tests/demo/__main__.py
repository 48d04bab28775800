"""``python -m tests.demo``: there and back, with QEMU where it is installed, else with the simulated hypervisor."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

import ferryman
from ferryman import MigrationOptions
from ferryman.testing import Fault, FaultPlan, forget_world, world
from tests.demo.display import Display
from tests.faults import fault_plan
from tests.guests.counter import CounterGuest
from tests.guests.inspect import dump_memory, pids
from tests.guests.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman import Connection, Domain, MigrationResult

_MIB = 1 << 20
_TICK_HZ = 1000
_RESULTS = Path(".cache/results/demo.json")
_NAME = "counter"


@dataclass(kw_only=True)
class Leg:
    """One crossing, as seen from inside and from outside."""

    source: str
    destination: str
    total_ms: float
    downtime_ms: float | None
    blackout_ms: float
    transferred_bytes: int | None
    iterations: int | None
    pages_checked: int
    memory_errors: int
    phase_ms: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Outcome:
    """What the demonstration found."""

    driver: str
    legs: list[Leg] = field(default_factory=list)
    ticks: int = 0
    ticks_lost: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that was promised was seen."""
        return (
            bool(self.legs)
            and self.ticks > 0
            and self.ticks_lost == 0
            and not self.violations
            and all(leg.memory_errors == 0 and leg.pages_checked > 0 for leg in self.legs)
        )

    def summary(self) -> str:
        """The last line."""
        return (
            f"demo: {'ok' if self.ok else 'FAILED'} ticks_lost={self.ticks_lost}"
            f" memory_errors={sum(leg.memory_errors for leg in self.legs)}"
            f" blackout_ms={max((leg.blackout_ms for leg in self.legs), default=float('nan')):.1f}"
            f" total_ms={max((leg.total_ms for leg in self.legs), default=float('nan')):.1f} driver={self.driver}"
        )


async def _cross(
    arguments: argparse.Namespace, domain: Domain, destination: Connection, display: Display, title: str
) -> MigrationResult:
    options = MigrationOptions(
        bandwidth_bytes_per_s=arguments.bandwidth_mib_per_s * _MIB, max_downtime_ms=arguments.max_downtime_ms
    )
    with display.migration(title):
        async with domain.migrate(destination, options) as job:
            async for event in job.progress():
                display.show(event)
        return await job.result()


def _leg(result: MigrationResult, *, blackout_ms: float, pages: int, errors: int) -> Leg:
    return Leg(
        source=result.source,
        destination=result.destination,
        total_ms=result.total_ms,
        downtime_ms=result.downtime_ms,
        blackout_ms=blackout_ms,
        transferred_bytes=result.transferred_bytes,
        iterations=result.iterations,
        pages_checked=pages,
        memory_errors=errors,
        phase_ms={phase.value: value for phase, value in result.phase_ms.items()},
    )


def _tell(display: Display, leg: Leg, ticks_lost: int) -> None:
    downtime = "not measured" if leg.downtime_ms is None else f"{leg.downtime_ms:.0f} ms"
    display.line(
        f"  total {leg.total_ms:.1f} ms, downtime by the hypervisor {downtime}, blackout seen from outside"
        f" {leg.blackout_ms:.1f} ms,\n  ticks lost {ticks_lost}, memory verified: {leg.pages_checked} pages,"
        f" {leg.memory_errors} wrong"
    )


async def _qemu(
    arguments: argparse.Namespace, faults: FaultPlan, display: Display, directory: Path
) -> Outcome:
    guest = CounterGuest.filling(
        memory_bytes=arguments.memory_mib * _MIB,
        tick_hz=_TICK_HZ,
        pages_per_tick=max(1, arguments.dirty_mib_per_s * _MIB // 4096 // _TICK_HZ),
    )
    image = directory / "guest.img"
    guest.write_image(image)
    roots = [directory / "alpha", directory / "beta"]
    uris = [f"qemu:///embed?root={root}" for root in roots]
    outcome = Outcome(driver="qemu")
    with Witness() as witness:
        definition = guest.domain_xml(_NAME, uuid.uuid4(), image, witness.socket_path)
        display.line(
            f"A guest with {arguments.memory_mib} MiB counts at {_TICK_HZ} Hz and writes"
            f" {guest.pages_per_tick * _TICK_HZ * 4096 / _MIB:.0f} MiB/s."
        )
        try:
            async with ferryman.connect(uris[0]) as alpha:
                await alpha.create(definition)
            await anyio.to_thread.run_sync(witness.wait_tick, arguments.settle_ticks)
            for number in range(arguments.legs):
                here, there = number % 2, (number + 1) % 2
                async with ferryman.connect(uris[here]) as a, ferryman.connect(uris[there]) as b:
                    domain = await a.lookup_by_name(_NAME)
                    result = await _cross(
                        arguments,
                        domain,
                        b,
                        display,
                        f"{'There' if here == 0 else 'Back'}: {roots[here].name} to {roots[there].name}",
                    )
                    last = witness.last()
                    await anyio.to_thread.run_sync(
                        witness.wait_tick, (last.value if last else 0) + arguments.settle_ticks
                    )
                    await (await b.lookup_by_name(_NAME)).suspend()
                # The roots are closed and the guest lives on: its memory is read by another program's way in.
                dump = directory / "memory"
                await anyio.to_thread.run_sync(dump_memory, roots[there], _NAME, dump, guest.memory_bytes)
                if faults.take(roots[there].name, "migrate_perform.completed") is Fault.CORRUPT:
                    _corrupt(dump, guest.memory_bytes // 2)
                report = await anyio.to_thread.run_sync(guest.verify_memory, dump)
                dump.unlink()
                seen = witness.report()
                leg = _leg(
                    result,
                    blackout_ms=seen.blackouts[-1].ms if seen.blackouts else float("nan"),
                    pages=report.pages_checked,
                    errors=report.errors,
                )
                outcome.legs.append(leg)
                _tell(display, leg, seen.ticks_lost)
                async with ferryman.connect(uris[there]) as b:
                    await (await b.lookup_by_name(_NAME)).resume()
            outcome.ticks, outcome.ticks_lost = seen.ticks, seen.ticks_lost
            outcome.violations = [str(overlap) for overlap in seen.overlaps]
            if len(seen.blackouts) != arguments.legs:
                outcome.violations.append(f"{len(seen.blackouts)} crossings were seen, not {arguments.legs}")
        finally:
            with anyio.CancelScope(shield=True):
                for uri, root in zip(uris, roots, strict=True):
                    await _end(uri, root)
    return outcome


async def _end(uri: str, root: Path) -> None:
    """End the guest wherever it is."""
    if not pids(root):
        return
    async with ferryman.connect(uri) as connection:
        for domain in await connection.list_domains():
            await domain.destroy()


def _corrupt(dump: Path, position: int) -> None:
    with dump.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


async def _simulated(
    arguments: argparse.Namespace, faults: FaultPlan, display: Display, _directory: Path
) -> Outcome:
    outcome = Outcome(driver="test")
    lab = world("demo")
    lab.faults = faults
    rate = arguments.dirty_mib_per_s * _MIB
    definition = (
        f"<domain type='test'><name>{_NAME}</name><memory unit='MiB'>{arguments.memory_mib}</memory>"
        f"<metadata><guest xmlns='urn:ferryman:test' dirty-bytes-per-s='{rate}'/></metadata></domain>"
    )
    display.line(
        f"A simulated guest with {arguments.memory_mib} MiB writes {arguments.dirty_mib_per_s} MiB/s. The totals are in"
        " simulated time."
    )
    names = ["alpha", "beta"]
    try:
        async with (
            ferryman.connect("test:///demo/alpha") as alpha,
            ferryman.connect("test:///demo/beta") as beta,
        ):
            ends = [alpha, beta]
            domain = await alpha.create(definition)
            for number in range(arguments.legs):
                here, there = number % 2, (number + 1) % 2
                await lab.elapse(0.5)
                process = lab.host(names[here]).active(domain.uuid)
                before, begin_s = process.steps if process else 0, lab.clock_s
                result = await _cross(
                    arguments,
                    domain,
                    ends[there],
                    display,
                    f"{'There' if here == 0 else 'Back'}: {names[here]} to {names[there]}",
                )
                domain = await ends[there].lookup_by_name(_NAME)
                arrived = lab.host(names[there]).active(domain.uuid)
                leg = _leg(
                    result,
                    blackout_ms=result.downtime_ms or 0.0,
                    pages=arrived.pages if arrived else 0,
                    errors=lab.check_memory(arrived) if arrived else 1,
                )
                leg.total_ms = (lab.clock_s - begin_s) * 1000
                outcome.legs.append(leg)
                outcome.ticks = arrived.steps if arrived else 0
                outcome.ticks_lost += max(0, before - outcome.ticks)
                _tell(display, leg, outcome.ticks_lost)
            outcome.violations = list(lab.violations)
    finally:
        forget_world("demo")
    return outcome


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--driver", choices=("qemu", "test"), help="default: qemu where it is installed")
    parser.add_argument(
        "--memory-mib", type=int, default=256, help="memory of the guest (default %(default)s)"
    )
    parser.add_argument(
        "--dirty-mib-per-s", type=int, default=16, help="rate at which the guest writes (default %(default)s)"
    )
    parser.add_argument("--bandwidth-mib-per-s", type=int, default=128, help="cap (default %(default)s)")
    parser.add_argument(
        "--max-downtime-ms", type=int, default=50, help="downtime limit (default %(default)s)"
    )
    parser.add_argument("--legs", type=int, default=2, help="crossings (default %(default)s: there and back)")
    parser.add_argument("--settle-ticks", type=int, default=500, help="ticks to count before and after each")
    parser.add_argument(
        "--faults",
        type=fault_plan,
        default=FaultPlan(),
        help="faults to plant, such as *.migrate_perform.completed=corrupt",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines even on a terminal")
    return parser.parse_args(argv)


async def _demo(arguments: argparse.Namespace) -> int:
    display = Display(live=False if arguments.plain else None)
    faults: FaultPlan = arguments.faults
    driver = arguments.driver or ("qemu" if shutil.which("qemu-system-x86_64") else "test")
    if driver == "test" and arguments.driver is None:
        display.line(
            "QEMU is not installed: this is the simulated hypervisor (apt-get install qemu-system-x86)."
        )
    directory = Path(tempfile.mkdtemp(prefix="ferryman-demo-"))
    try:
        run = _qemu if driver == "qemu" else _simulated
        try:
            outcome = await run(arguments, faults, display, directory)
        except ferryman.FerrymanError as error:
            display.line(f"error: {error} [{error.code}]")
            outcome = Outcome(driver=driver, violations=[str(error)])
    finally:
        shutil.rmtree(directory)
    for violation in outcome.violations:
        display.line(f"violation: {violation}")
    if faults.left:
        display.line(f"faults that never struck: {', '.join(faults.left)}")
    _RESULTS.parent.mkdir(parents=True, exist_ok=True)
    _RESULTS.write_text(
        json.dumps({"ok": outcome.ok, "summary": outcome.summary(), **asdict(outcome)}, indent=1)
    )
    display.line(f"figures: {_RESULTS}")
    display.line(outcome.summary())
    return 0 if outcome.ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 if everything that was promised was seen."""
    return anyio.run(_demo, _parse(argv))


if __name__ == "__main__":
    sys.exit(main())
