"""Where the guest may be once all is settled, by the point and the fault: by the model, and by what needs no model."""

from __future__ import annotations

from tests.model import predict as model

ANYWHERE = frozenset({"source", "destination"})
_SOURCE = frozenset({"source"})
_DESTINATION = frozenset({"destination"})
_NONE = frozenset({"none"})

_AT_DESTINATION = ("claim", "ran")
"""Inputs that come only after the guest ran there."""

_AT_SOURCE = ("refusal", "stayed", "give-up", "never-ran", "receiver-failed")
"""Inputs that come only where the guest will never run at the destination."""


def _owner(point: str) -> frozenset[str]:
    """Who can own the guest from a point on, without any fault."""
    _side, state, given, where = point.split(".")
    if state in ("given", "claimed") or given in _AT_DESTINATION:
        return _DESTINATION
    if state in ("kept", "refused") or given in _AT_SOURCE:
        return _SOURCE
    if state == "prepared" and given == "cancel" and where != "before":
        return _SOURCE
    return ANYWHERE


def predict(point: str, fault: str) -> frozenset[str]:
    """Outcomes that the rules allow: ``source``, ``destination``, or ``none`` where a kill destroyed the owning copy.

    :param point: of the table, or a moment of the transfer.
    """
    if point.startswith("transfer"):
        return _by_owner(ANYWHERE, fault)  # by the clock, so that it may lie behind the end
    allowed = _by_owner(_owner(point), fault)
    try:
        return allowed & model.predict(point, fault)
    except KeyError:
        return allowed  # the model comes there only after a fault, which is the scenario's


def _by_owner(owner: frozenset[str], fault: str) -> frozenset[str]:
    if fault == "kill-source-qemu":
        if owner == _SOURCE:
            return _NONE
        return owner - _SOURCE | (_NONE if owner == ANYWHERE else frozenset())
    if fault == "kill-destination-qemu":
        if owner == _DESTINATION:
            return _NONE
        # A receiver that was killed before it was prepared may be started once more.
        return owner | (_NONE if owner == ANYWHERE else frozenset())
    return owner
