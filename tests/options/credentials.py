"""Credentials for encrypted transfers, good and bad, as a host has them in its directory."""

from __future__ import annotations

import datetime
import shutil
from functools import cache
from pathlib import Path

import trustme

HOST = "host-d"
"""The name that a good server certificate bears, beside 127.0.0.1 and ::1."""

KINDS = ("good", "other signer", "other name", "expired", "key", "other key", "nobody may send", "none")

_PAST = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
_KEYS = {"key": "0123456789abcdef" * 2, "other key": "fedcba9876543210" * 2}
_NOBODY = '{"rules": [], "policy": "deny"}'


@cache
def _authority(name: str) -> trustme.CA:
    return trustme.CA(organization_name=name)


@cache
def _files(kind: str) -> dict[str, bytes]:
    """Contents of the directory, by the files' names."""
    if kind == "none":
        return {}
    if kind in _KEYS:
        return {"keys.psk": f"qemu:{_KEYS[kind]}\n".encode()}
    authority = _authority("other" if kind == "other signer" else "usual")
    names = ("elsewhere", "192.0.2.1") if kind == "other name" else (HOST, "127.0.0.1", "::1")
    files = {"ca-cert.pem": authority.cert_pem.bytes()}
    for side, known in (("server", names), ("client", ("host-s",))):
        made = authority.issue_cert(
            *known,
            common_name=known[0],
            not_before=_PAST if kind == "expired" else None,
            not_after=_PAST + datetime.timedelta(days=1) if kind == "expired" else None,
        )
        files[f"{side}-cert.pem"] = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        files[f"{side}-key.pem"] = made.private_key_pem.bytes()
    if kind == "nobody may send":
        files["clients.txt"] = _NOBODY.encode()
    return files


def put_credentials(root: Path, kind: str) -> None:
    """Give a host credentials of one kind, and take what it had."""
    directory = root / "pki"
    shutil.rmtree(directory, ignore_errors=True)
    if kind == "none":
        return
    directory.mkdir(parents=True)
    for name, content in _files(kind).items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)


def put_pki(directory: Path, kind: str) -> None:
    """Write credentials of one kind as libvirt's clients and daemons look for them."""
    directory.mkdir(parents=True)
    for name, content in _files(kind).items():
        path = directory / name.replace("ca-cert", "cacert").replace("-", "")
        path.write_bytes(content)
        path.chmod(0o600)
