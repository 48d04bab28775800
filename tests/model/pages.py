"""Parts of docs/why/handover.md that the checker writes; a test holds the page against them."""

from __future__ import annotations

from tests.model.diagram import draw
from tests.model.explore import explore
from tests.model.peers import PEERS
from tests.model.predict import predict

_FAULTS = (
    "kill-coordinator",
    "kill-source-manager",
    "kill-destination-manager",
    "kill-source-qemu",
    "kill-destination-qemu",
)
_POINTS = {
    "the source has begun": "source.absent.begin.written",
    "the destination has prepared": "destination.preparing.receiver-up.written",
    "the state is being sent": "transfer",
    "the source can prove that it has stopped": "source.handing.proved.answered",
    "claiming is written": "destination.prepared.go.written",
    "the guest was run there": "destination.claiming.ran.before",
    "claimed is written": "destination.claiming.ran.written",
    "the guest could not be run there": "destination.claiming.never-ran.before",
    "refused is written": "destination.claiming.never-ran.written",
    "given is written": "source.stopped.claim.written",
    "kept is written": "source.handing.stayed.written",
}


def counterexamples() -> dict[str, str]:
    """A sequence diagram for each handshake of others."""
    found = {peer.name: explore(peer.protocol, peer.bounds, heal=peer.heal) for peer in PEERS}
    return {name: draw(result.trace) for name, result in found.items()}


def matrix() -> str:
    """Where the guest may be in the end, by moment and fault."""
    lines = ["| when | " + " | ".join(fault.replace("-", " ") for fault in _FAULTS) + " |"]
    lines.append("| --- " * (len(_FAULTS) + 1) + "|")
    for words, point in _POINTS.items():
        ends = [" or ".join(sorted(predict(point, fault))) for fault in _FAULTS]
        lines.append(f"| {words} | " + " | ".join(ends) + " |")
    return "\n".join(lines)


__all__ = ["counterexamples", "matrix"]
