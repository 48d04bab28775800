"""What a host has to encrypt with, and who may send to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ferryman.errors import HypervisorError
from ferryman_qemu.tls import find_credentials, read_rules
from ferryman_qemu.transfer import tls_settings
from tests.options.credentials import put_credentials


def test_credentials_are_of_one_kind_or_none(tmp_path: Path) -> None:
    assert find_credentials(tmp_path / "pki") is None
    put_credentials(tmp_path, "key")
    found = find_credentials(tmp_path / "pki")
    assert found is not None
    assert found.object(server=True)["qom-type"] == "tls-creds-psk"
    assert "username" in found.object(server=False)
    put_credentials(tmp_path, "good")
    found = find_credentials(tmp_path / "pki")
    assert found is not None
    assert (found.psk, found.authorized, found.object(server=True)["verify-peer"]) == (False, None, True)
    (tmp_path / "pki/server-key.pem").unlink()
    assert find_credentials(tmp_path / "pki") is None


def test_qemu_is_given_the_rules_and_not_their_file(tmp_path: Path) -> None:
    put_credentials(tmp_path, "nobody may send")
    found = find_credentials(tmp_path / "pki")
    assert found is not None
    _, authorization, parameters = tls_settings(found, server=True, name="")
    assert authorization.arguments == {
        "qom-type": "authz-list",
        "id": "ferryman-tls-authz",
        "policy": "deny",
        "rules": [],
    }
    assert parameters.arguments is not None
    assert parameters.arguments["tls-authz"] == "ferryman-tls-authz"
    # A source checks the destination by its name.
    assert len(tls_settings(found, server=False, name="web.example")) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"filename": "/etc/passwd"}', '{"id": "other"}', "\ud800"])
def test_rules_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clients.txt"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(HypervisorError, match="clients.txt"):
        read_rules(str(path))
    path.write_text(json.dumps({"policy": "deny"}))
    assert read_rules(str(path)) == {"policy": "deny"}
