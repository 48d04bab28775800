"""Sockets that are passed to the daemon: what is said of them is looked at before it is believed."""

from __future__ import annotations

import os
import socket

import pytest

from ferryman_remote.daemon import activation
from ferryman_remote.daemon.activation import given_sockets


def environ(count: str, names: str = "", pid: int | None = None) -> dict[str, str]:
    return {
        "LISTEN_FDS": count,
        "LISTEN_PID": str(pid or os.getpid()),
        "LISTEN_FDNAMES": names,
        "OTHER": "kept",
    }


def test_none_or_somebody_elses() -> None:
    assert given_sockets({}) == []
    told = environ("3", pid=1)
    assert given_sockets(told) == []
    # Whoever is started from here must not take them for its own.
    assert told == {"OTHER": "kept"}


def test_sockets_and_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(activation, "_FIRST", os.dup(listener.fileno()))
        ((name, given),) = given_sockets(environ("1", "tls:more"))
        with given:
            assert (name, given.getsockname()) == ("tls", listener.getsockname())
            assert not given.get_inheritable()
            assert given.gettimeout() == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(activation, "_FIRST", os.dup(listener.fileno()))
        ((name, given),) = given_sockets(environ("1"))
        with given:
            assert name == ""


@pytest.mark.parametrize("count", ["-1", "x", "99999", "1.5"])
def test_a_number_that_is_none(count: str) -> None:
    with pytest.raises(ValueError, match="LISTEN_FDS"):
        given_sockets(environ(count))


def test_what_is_no_listening_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    monkeypatch.setattr(activation, "_FIRST", reading)
    with pytest.raises(ValueError, match=f"descriptor {reading}, which was passed, is no socket"):
        given_sockets(environ("1"))
    os.close(reading)
    one, other = socket.socketpair()
    with one, other:
        monkeypatch.setattr(activation, "_FIRST", os.dup(one.fileno()))
        with pytest.raises(ValueError, match="listens for streams"):
            given_sockets(environ("1"))
