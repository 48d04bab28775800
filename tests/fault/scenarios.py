"""What a migration of the campaign goes through by itself, so that every part of the handover's table comes up."""

from __future__ import annotations

from dataclasses import dataclass

from ferryman.handover import TABLE
from tests.fault.points import Entry, entry_name

TRANSFER = "transfer"
"""While the state is being sent: no point of the table, but a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One course of a migration.

    :param order: what the coordinator does otherwise than the product's (``tests.fault.coordinator``).
    :param again: the coordinator shows every paper once more at the end.
    :param slow: the transfer takes a second or two.
    :param finish_fails: running the guest fails at the destination.
    :param nobody_listens: the destination is told to listen at an address that is not its own.
    :param point: where something happens first; ``transfer`` is while the state is being sent.
    :param faults: what happens there, in order.
    """

    name: str
    order: str = ""
    again: bool = False
    slow: bool = False
    finish_fails: bool = False
    nobody_listens: bool = False
    point: str = ""
    faults: tuple[str, ...] = ()


_SOURCE, _DESTINATION = "kill-source-manager", "kill-destination-manager"

SCENARIOS = (
    Scenario(name="crossing"),
    Scenario(name="abort", order="abort", slow=True),
    Scenario(name="asked", order="ask", slow=True),
    Scenario(name="barred", order="bar"),
    Scenario(name="asked-first", order="bar-ask"),
    Scenario(name="kept-first", order="bar-kept"),
    Scenario(name="expires", order="stall"),
    Scenario(name="receiver-fails", nobody_listens=True),
    Scenario(name="cont-fails", finish_fails=True),
    Scenario(name="stream-breaks", slow=True, point=TRANSFER, faults=("cut-data-reset",)),
    Scenario(name="source-ends", order="ask", slow=True, point=TRANSFER, faults=("kill-source-qemu",)),
    Scenario(name="begun-restart", point="source.absent.begin.written", faults=(_SOURCE,)),
    Scenario(name="handing-restart", point="source.begun.perform.written", faults=(_SOURCE,)),
    Scenario(name="sending-restart", slow=True, point=TRANSFER, faults=("kill-coordinator", _SOURCE)),
    Scenario(name="proved-restart", point="source.handing.proved.answered", faults=(_SOURCE,)),
    Scenario(
        name="proved-ends", point="destination.prepared.go.written", faults=(_SOURCE, "kill-source-qemu")
    ),
    Scenario(
        name="kept-restart",
        order="abort",
        slow=True,
        point="source.handing.stayed.written",
        faults=(_SOURCE,),
    ),
    Scenario(name="given-restart", point="source.stopped.claim.written", faults=(_SOURCE,)),
    Scenario(name="claiming-restart", point="destination.prepared.go.written", faults=(_DESTINATION,)),
    Scenario(
        name="claiming-ends",
        point="destination.prepared.go.written",
        faults=(_DESTINATION, "kill-destination-qemu"),
    ),
    Scenario(name="claimed-restart", point="destination.claiming.ran.written", faults=(_DESTINATION,)),
    Scenario(
        name="refused-restart",
        order="stall",
        point="destination.prepared.cancel.written",
        faults=(_DESTINATION,),
    ),
    Scenario(
        name="never-restart",
        nobody_listens=True,
        point="destination.preparing.receiver-failed.written",
        faults=(_DESTINATION,),
    ),
    Scenario(name="late", again=True),
    Scenario(name="late-abort", order="abort", slow=True, again=True),
    Scenario(name="late-cont-fails", finish_fails=True, again=True),
)

_GUARDED = "the engine answers by itself before the table is asked"
_POSTCOPY = "post-copy, which this campaign does not ask for (see test_postcopy_qemu)"
_PERSON = "a person's evidence, which only a person brings"
_REASONS = {
    "source.*.written-off": _PERSON,
    "destination.*.written-off": _PERSON,
    "source.switched.*": _POSTCOPY,
    "source.*.switched": _POSTCOPY,
    "source.*.pledged": _POSTCOPY,
    "source.given.served": _POSTCOPY,
    "destination.pledged.*": _POSTCOPY,
    "destination.*.pledge": _POSTCOPY,
    "source.begun.refusal": "a refusal carries a receipt, and a begun row holds none, so that it is not taken",
    "source.handing.refusal": "the answer waits for the end of the transfer, which leaves this state",
    "source.handing.ask": "while the state is being sent the engine answers by itself",
    "source.switched.ask": _POSTCOPY,
    "source.handing.unclear": "only a QEMU that lives and does not answer leaves the source here",
    "source.silent.*": "only a QEMU that lives and does not answer leaves the source here",
    "source.handing.give-up": "only a manager that comes back while the state is still being sent, if it is quick",
    "source.kept.perform": _GUARDED,
    "source.kept.give-up": _GUARDED,
    "source.given.give-up": _GUARDED,
    "destination.prepared.ran": "only somebody who is not Ferryman runs a receiver before the claim",
    "destination.claiming.go": "what is asked waits until this state is left, unless QEMU does not answer",
    "destination.claiming.cancel": "what is asked waits until this state is left, unless QEMU does not answer",
    "destination.claiming.no-proof": "what is asked waits until this state is left, unless QEMU does not answer",
    "destination.claiming.ask": "what is asked waits until this state is left, unless QEMU does not answer",
    "destination.never-prepared.prepare": _GUARDED,
}


def reason(entry: Entry) -> str | None:
    """Why no scenario reaches an entry of the table on real QEMU, or None where nothing is known."""
    side, state, given = entry_name(entry).split(".")
    for known in (f"{side}.{state}.{given}", f"{side}.{state}.*", f"{side}.*.{given}"):
        if known in _REASONS:
            return _REASONS[known]
    return None


def unreached(points: set[str]) -> dict[str, str | None]:
    """Entries of which no point was reached, each with the reason."""
    reached = {point.rsplit(".", 1)[0] for point in points}
    return {entry_name(entry): reason(entry) for entry in TABLE if entry_name(entry) not in reached}
