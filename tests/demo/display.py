"""What the demonstration shows: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ferryman import PhaseEvent, ProgressEvent, SettledEvent, TransferStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from ferryman.types import MigrationEvent

_MIB = 1 << 20


def _mib(count: int | None, suffix: str = "MiB") -> str:
    return "-" if count is None else f"{count / _MIB:.1f} {suffix}"


def _estimate(statistics: TransferStatistics) -> str:
    seconds = statistics.estimate_s
    if seconds is None:
        return "-"
    return "never at this rate" if seconds == float("inf") else f"{seconds:.2f} s"


class Display:
    """Shows one migration at a time."""

    def __init__(self, *, live: bool | None = None) -> None:
        self._live_wanted = sys.stdout.isatty() if live is None else live
        self._live: Any = None
        self._title = ""
        self._phase = ""
        self._statistics = TransferStatistics()

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    @contextmanager
    def migration(self, title: str) -> Iterator[None]:
        """Show one migration."""
        self._title, self._phase, self._statistics = title, "", TransferStatistics()
        self.line(title)
        if not self._live_wanted:
            yield
            return
        from rich.live import Live

        with Live(self._table(), refresh_per_second=12, transient=True) as self._live:
            yield

    def show(self, event: MigrationEvent) -> None:
        """Show an event."""
        match event:
            case PhaseEvent():
                self._phase = event.phase.value
                if event.ended and self._live is None:
                    failed = f" failed: {event.error}" if event.error else ""
                    self.line(
                        f"  {event.elapsed_ms:8.1f} ms  {event.phase.value:8} at the {event.side.value}{failed}"
                    )
            case ProgressEvent():
                self._statistics = event.statistics
                if self._live is None:
                    s = event.statistics
                    self.line(
                        f"  {event.elapsed_ms:8.1f} ms  pass {s.iteration}: {_mib(s.transferred_bytes)} sent,"
                        f" {_mib(s.remaining_bytes)} left, dirty {_mib(s.dirty_bytes_per_s, 'MiB/s')},"
                        f" bandwidth {_mib(s.bandwidth_bytes_per_s, 'MiB/s')}, estimate {_estimate(s)}"
                    )
            case SettledEvent():
                self._phase = f"guest {event.guest_state.sentence}"
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        from rich.table import Table

        statistics = self._statistics
        table = Table(title=self._title, show_header=False, min_width=60)
        for name, value in (
            ("phase", self._phase),
            ("transferred", _mib(statistics.transferred_bytes)),
            ("remaining", _mib(statistics.remaining_bytes)),
            ("dirty rate", _mib(statistics.dirty_bytes_per_s, "MiB/s")),
            ("bandwidth", _mib(statistics.bandwidth_bytes_per_s, "MiB/s")),
            ("pass", str(statistics.iteration or "-")),
            ("estimate", _estimate(statistics)),
        ):
            table.add_row(name, value)
        return table
