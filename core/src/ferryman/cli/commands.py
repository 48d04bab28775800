"""The commands.  Exit status: 0 done, 1 something stays in doubt, 2 wrong usage, 3 an error that is told."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferryman.errors import FerrymanError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman.resolve import Resolution, Testimony

IN_DOUBT, FAILED = 1, 3


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ferryman")
def ferryman() -> None:
    """Move running virtual machines between hosts."""


@ferryman.command()
@click.argument("uri")
@click.option("--list", "only_list", is_flag=True, help="Show what is in doubt after opening the host.")
@click.option("--migration", metavar="ID", help="Only this migration.")
@click.option(
    "--journal",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Evidence: the other host's journal, after its programs and the guest there have ended.",
)
@click.option("--lost", is_flag=True, help="Evidence: the other host and the guest on it are lost for good.")
@click.option("--who", metavar="NAME", help="Who brings the evidence; the journal keeps it.  [default: you]")
@click.option("--yes", is_flag=True, help="Do not ask back.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def resolve(
    uri: str,
    only_list: bool,
    migration: str | None,
    journal: Path | None,
    lost: bool,
    who: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Settle the migrations that are in doubt at the host of URI.

    Opening a host settles what it can alone; then the other end is asked.  What is still in doubt is printed with the
    evidence that is missing, and the exit status is 1.

    A person brings evidence, not permission.  With --journal the other host's own rules decide, and the decision is
    written into that journal.  With --lost the migration ends here: the stopped copy is destroyed, the definition
    stays, and no older memory is ever started.  That the other host is powered off settles nothing: the guest may
    have run there.
    """
    if only_list and (journal or lost):
        raise click.UsageError("--list brings no evidence")
    if migration is not None and re.fullmatch("[0-9a-f]{32}", migration) is None:
        raise click.UsageError("--migration is an id of 32 hexadecimal digits, as --list shows it")
    testimony = _testimony(journal, lost=lost, who=who)
    if lost and not yes:
        click.confirm(
            "You say that the other host and the guest on it are lost for good. The copy here is destroyed. Go on?",
            abort=True,
            err=True,
        )
    try:
        found = _resolve(uri, migration, testimony, only_list=only_list)
    except FerrymanError as error:
        from ferryman.resolve import printable

        text = "\n".join(printable(line) for line in str(error).splitlines())
        click.echo(f"ferryman: {text} [{error.code}]", err=True)
        sys.exit(FAILED)
    _print(found, as_json=as_json)
    if any(not resolution.settled for resolution in found):
        sys.exit(IN_DOUBT)


def _testimony(journal: Path | None, *, lost: bool, who: str | None) -> Testimony | None:
    from ferryman.resolve import Testimony

    if journal is None and not lost:
        if who is not None:
            raise click.UsageError("--who goes with --journal or --lost")
        return None
    if journal is not None and lost:
        raise click.UsageError("bring --journal or --lost, not both")
    try:
        return Testimony(who=who if who is not None else _caller(), journal=journal, lost=lost)
    except OptionError as error:
        raise click.UsageError(f"--{error.option}: {error.message}") from error


def _caller() -> str:
    """Who calls, by the best name that there is."""
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # no table knows this user
        name = ""
    return name if name.strip() else f"user id {os.getuid()}"


def _resolve(
    uri: str, migration: str | None, testimony: Testimony | None, *, only_list: bool
) -> Sequence[Resolution]:
    from ferryman.sync import connect

    with connect(uri) as host:
        if only_list:
            found = [r for r in host.in_doubt() if migration in (None, r.migration_id)]
            if found or migration is None:
                return found
        # One that is not open has a verdict already, or is not known here.
        return host.resolve(migration, testimony)


def _print(found: Sequence[Resolution], *, as_json: bool) -> None:
    if as_json:
        plain = [
            {**asdict(resolution), "side": resolution.side.value, "record": resolution.record.value}
            for resolution in found
        ]
        click.echo(json.dumps(plain, indent=2))
    elif not found:
        click.echo("nothing is in doubt")
    else:
        for resolution in found:
            click.echo(str(resolution))


__all__ = ["ferryman"]
