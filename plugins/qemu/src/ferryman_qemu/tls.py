"""Credentials with which a host encrypts transfers, as QEMU wants them in a directory.

::

    ca-cert.pem                         who signs
    server-cert.pem, server-key.pem     shown when this host is the destination
    client-cert.pem, client-key.pem     shown when it is the source
    clients.txt                         which clients may send, as JSON: {"policy": "deny", "rules": [...]}, rules as in
                                        qapi/authz.json; without it all
    keys.psk                            instead of certificates: one line, qemu:HEXADECIMAL

The directory is ``pki`` below the root.  Both ends check each other: a source without a certificate of the same signer
is refused, and a destination whose certificate does not bear its name gets nothing.

The rules of ``clients.txt`` are judged by QEMU when the handshake is over, and the source has begun to send by then:
some of the guest's memory (0.7 MB were seen) reaches the destination, which drops it.  A source that must not even
offer its guests there has no certificate of that signer.

Source: QEMU docs/system/tls.rst, qapi/crypto.json, qapi/authz.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryman.errors import HypervisorError
from ferryman.uri import MigrationURI

if TYPE_CHECKING:
    from ferryman.types import MigrationOptions

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
        QEMU is given what it holds: the object that reads such a file itself cannot be made on the monitor of 7.2.
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


def read_rules(path: str) -> dict[str, Any]:
    """Read the rules that say who may send. :raises HypervisorError: they cannot be read, or are none."""
    try:
        rules = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise HypervisorError(f"the rules in {path} cannot be read: {error}") from error
    if not isinstance(rules, dict) or not rules.keys() <= {"policy", "rules"}:
        raise HypervisorError(f'{path} must hold {{"policy": ..., "rules": [...]}}')
    return rules


def peer_name(options: MigrationOptions, uri: str) -> str:
    """The name that the certificate of the server at a migration URI must bear."""
    return options.tls_name or MigrationURI.parse(uri).host or ""


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
