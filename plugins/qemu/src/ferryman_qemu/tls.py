"""Credentials with which a host encrypts transfers, as QEMU wants them in a directory.

::

    ca-cert.pem                         who signs
    server-cert.pem, server-key.pem     shown when this host is the destination
    client-cert.pem, client-key.pem     shown when it is the source
    clients.txt                         JSON rules of QEMU (qapi/authz.json): which clients may send; without it all
    keys.psk                            instead of certificates: one line, qemu:HEXADECIMAL

The directory is ``pki`` below the root.  Both ends check each other: a source without a certificate of the same signer
is refused, and a destination whose certificate does not bear its name gets nothing.

Source: QEMU docs/system/tls.rst, qapi/crypto.json, qapi/authz.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

TLS_ID = "ferryman-tls"
TLS_IDS = (TLS_ID, f"{TLS_ID}-authz")
"""Objects of QEMU that belong to encrypted transfers."""

_PSK_USER = "qemu"
_SERVER = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
_CLIENT = ("ca-cert.pem", "client-cert.pem", "client-key.pem")


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What one host has.

    :param authorized: file of the rules that say who may send here; None lets in whoever has a good certificate.
    """

    directory: str
    psk: bool
    authorized: str | None = None

    def object(self, *, server: bool) -> dict[str, Any]:
        """The credentials as ``object-add`` takes them."""
        values: dict[str, Any] = {"dir": self.directory, "endpoint": "server" if server else "client"}
        if self.psk:
            return {"qom-type": "tls-creds-psk", **values, **({} if server else {"username": _PSK_USER})}
        return {"qom-type": "tls-creds-x509", **values, "verify-peer": True}


def find_credentials(directory: Path) -> Credentials | None:
    """What a host has in its directory; None where it has not all files of one kind."""
    if all((directory / name).is_file() for name in {*_SERVER, *_CLIENT}):
        rules = directory / "clients.txt"
        return Credentials(
            directory=str(directory), psk=False, authorized=str(rules) if rules.is_file() else None
        )
    if (directory / "keys.psk").is_file():
        return Credentials(directory=str(directory), psk=True)
    return None
