"""Stock virsh and libvirt-python: what each verb comes to."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.daemons import Terminal, daemons, virsh_tried
from tests.qemu import NAME, PROMPT_S, Field, console_definition, laid_out

_VERBS: tuple[tuple[str, str], ...] = (
    ("uri", "qemu.tcp://"),
    ("hostname", r"\S"),
    ("version", "hypervisor"),
    ("nodeinfo", r"CPU\(s\):"),
    ("capabilities", "<migration_features>"),
    ("define {file}", ""),
    ("list --all", "shut off"),
    ("domuuid {name}", "-"),
    ("start {name}", ""),
    ("domid {name}", "1"),
    ("domstate {name}", "running"),
    ("dominfo {name}", "CPU time"),
    ("dumpxml {name}", "<domain"),
    ("domstats {name}", "state.state=1"),
    ("dommemstat {name}", "rss"),
    ("domblkstat {name} vda", "rd_bytes"),
    ("domjobinfo {name}", "None"),
    ("migrate-setspeed {name} 10", ""),
    ("migrate-getspeed {name}", "10"),
    ("suspend {name}", ""),
    ("resume {name}", ""),
    ("console {name}", r"Connected to domain[\s\S]*\r?\n[0-9A-F]{8}\r?\n"),
    ("setmem {name} 20M", ""),
    ("autostart {name}", ""),
    ("autostart --disable {name}", ""),
    ("save {name} {directory}/state", ""),
    ("restore {directory}/state", ""),
    ("shutdown {name}", ""),
    ("reboot {name}", ""),
    ("destroy {name}", ""),
    ("undefine {name}", ""),
    ("create {file}", ""),
    ("event --list", "lifecycle"),
    ("destroy {name}", ""),
)
"""Commands in their order, and what they print; where that is nothing, their exit status is what counts."""

_PYTHON = """
import libvirt, sys, threading
libvirt.registerErrorHandler(lambda *_: None, None)
libvirt.virEventRegisterDefaultImpl()
def loop():
    while True:
        libvirt.virEventRunDefaultImpl()
threading.Thread(target=loop, daemon=True).start()
source, destination = (libvirt.open(uri) for uri in sys.argv[1:3])
name, definition = sys.argv[3], open(sys.argv[4]).read()
heard = threading.Semaphore(0)
def happened(connection, domain, event, detail, seen):
    seen.append((event, detail))
    heard.release()
seen = []
destination.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, happened, seen)
domain = source.createXML(definition, 0)
assert [each.name() for each in source.listAllDomains()] == [name]
assert source.listDomainsID() == [domain.ID()]
assert domain.info()[0] == domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
assert domain.isActive() and not domain.isPersistent()
assert domain.jobInfo()[0] == 0 and domain.jobStats() is not None
(record,) = source.getAllDomainStats()
assert record[1]["state.state"] == libvirt.VIR_DOMAIN_RUNNING
moved = domain.migrate3(destination, {}, libvirt.VIR_MIGRATE_LIVE)
assert moved.name() == name and source.listAllDomains() == []
assert heard.acquire(timeout=30)
assert seen[0] == (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED), seen
try:
    source.lookupByName(name)
except libvirt.libvirtError as error:
    assert error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
else:
    raise AssertionError("the domain is still at the source")
back = moved.migrate(source, libvirt.VIR_MIGRATE_LIVE, None, None, 0)
back.destroy()
print("ok")
"""


PAGE = Path(__file__).parents[2] / "docs/reference/virsh-verbs.md"

_HEAD = """# Verbs of virsh

Each row is a command of stock virsh, given in this order to `ferrymand`, with a guest on real QEMU. `python -m
tests.interop --write` runs them and writes this page. Migrations, and what is done to them while they run, are told
of in [ferrymand](../use/ferrymand.md).

| command | outcome |
| --- | --- |
"""


class Outcome(NamedTuple):
    """What a command came to.

    :param said: by virsh, where it was wrong.
    """

    command: str
    good: bool
    said: str

    @property
    def verb(self) -> str:
        return self.command.split()[0]


def page(outcomes: Sequence[Outcome]) -> str:
    """The page of the documentation that tells of them."""
    told = ("passes" if each.good else f"fails: {' '.join(each.said.split())}" for each in outcomes)
    rows = (f"| `{each.command}` | {outcome} |\n" for each, outcome in zip(outcomes, told, strict=True))
    return _HEAD + "".join(rows).replace("{", "").replace("}", "")


def run_verbs(say: Callable[[str], None]) -> list[Outcome]:
    """Try every verb."""
    outcomes: list[Outcome] = []
    with laid_out() as field, daemons(field) as (a, _b):
        path = field.directory / "definition.xml"
        definition = console_definition(field, "pty")
        path.write_text(definition.replace("<memballoon model='none'/>", "<memballoon model='virtio'/>"))
        for command, printed in _VERBS:
            words = [word.format(name=NAME, file=path, directory=field.directory) for word in command.split()]
            verb = words[0]
            status, shown = (_on_terminal if verb == "console" else _alone)(a.uri(field.roots[0]), words)
            good = status == 0 and re.search(printed, shown) is not None
            outcomes.append(Outcome(command, good, shown.strip()))
            say(f"{verb:20} {'ok' if good else 'WRONG: ' + shown.strip()}")
        for leftover in field.directory.glob("state*"):
            leftover.unlink()
    return outcomes


def _alone(uri: str, words: list[str]) -> tuple[int, str]:
    """Exit status of a command, and what it prints."""
    done = virsh_tried(uri, *words)
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def _on_terminal(uri: str, words: list[str]) -> tuple[int, str]:
    """The same of one that is left by its key, once something is shown."""
    with Terminal(uri, *words) as terminal:
        terminal.wait_for(rb"[0-9A-F]{8}\r?\n.*[0-9A-F]{8}\r?\n|rror")
        terminal.type(b"\x1d")
        return terminal.ended(), terminal.shown.decode(errors="replace")


def run_libvirt_python(field: Field, uris: tuple[str, str]) -> str:
    """Drive both daemons by libvirt's own binding, with its event loop; returns what went wrong, or ''."""
    path = Path(field.directory, "definition.xml")
    path.write_text(field.definition)
    done = subprocess.run(
        [_python(), "-c", _PYTHON, *uris, NAME, str(path)],
        capture_output=True,
        text=True,
        timeout=2 * PROMPT_S,
        check=False,
    )
    return "" if done.stdout == "ok\n" and done.returncode == 0 else done.stderr or "it printed nothing"


def _python() -> str:
    """The system's Python, which has libvirt's binding."""
    return "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
