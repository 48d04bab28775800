"""Ferryman's events as libvirt's: which messages an event is for a client that registered a kind of them.

Source: libvirt, include/libvirt/libvirt-domain.h (virDomainEventID, virDomainEventType and its details).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from ferryman.types import DomainEventKind
from ferryman_remote import protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferryman.types import DomainEvent

LIFECYCLE = 0
REBOOT = 1
BALLOON = 13
AGENT = 18
KNOWN = range(28)
"""Kinds of events that clients of libvirt 9.0 to 11.3 ask for; those that no driver tells are never sent."""

_LIFECYCLE: dict[DomainEventKind, tuple[tuple[int, int], ...]] = {
    DomainEventKind.DEFINED: ((0, 0),),
    DomainEventKind.UNDEFINED: ((1, 0),),
    DomainEventKind.STARTED: ((2, 0),),
    DomainEventKind.SUSPENDED: ((3, 0),),
    DomainEventKind.RESUMED: ((4, 0),),
    DomainEventKind.SHUT_DOWN: ((5, 0),),
    DomainEventKind.DESTROYED: ((5, 1),),
    DomainEventKind.CRASHED: ((5, 2),),
    DomainEventKind.MIGRATED_OUT: ((3, 1), (5, 3)),
    DomainEventKind.SAVED: ((5, 4),),
    DomainEventKind.MIGRATED_IN: ((2, 1), (4, 1)),
    DomainEventKind.PANICKED: ((8, 0),),
}
_RESTORED = (2, 2)


def packets_of(
    event: DomainEvent, event_id: int, callback: int, number: int
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Numbers and payloads of the messages that a listener gets.

    :param number: of the domain, or -1.
    """
    dom = protocol.Domain(event.name, UUID(event.uuid).bytes, number)
    if event_id == LIFECYCLE:
        details = _LIFECYCLE.get(event.kind, ())
        if event.kind is DomainEventKind.STARTED and event.detail == "restored":
            details = (_RESTORED,)
        for kind, detail in details:
            yield (
                318,
                protocol.DomainEventCallbackLifecycle(
                    callback, protocol.DomainEventLifecycle(dom, kind, detail)
                ),
            )
    elif event_id == REBOOT and event.kind is DomainEventKind.REBOOTED:
        yield 319, protocol.DomainEventCallbackReboot(callback, protocol.OfDomain(dom))
    elif event_id == BALLOON and event.kind is DomainEventKind.MEMORY_CHANGED:
        if event.detail.isdigit():
            change = protocol.BalloonChange(dom, int(event.detail) // 1024)
            yield 331, protocol.DomainEventCallbackBalloonChange(callback, change)
    elif event_id == AGENT and event.kind in (DomainEventKind.AGENT_CONNECTED, DomainEventKind.AGENT_GONE):
        state = 1 if event.kind is DomainEventKind.AGENT_CONNECTED else 2
        yield 348, protocol.DomainEventCallbackAgentLifecycle(callback, dom, state, 2)
