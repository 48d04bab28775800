"""The daemon's configuration: TOML, of which every key has a default.

docs/use/ferrymand.md explains each key.  An unknown key is an error: a limit that is misspelt would not hold.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryman_remote.daemon.rules import Rules, RulesError, read_rules
from ferryman_remote.daemon.session import Limits
from ferryman_remote.transports import TCP_PORT, runtime_directory
from ferryman_remote.wire import HEADER_BYTES, MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from ferryman.uri import ConnectionURI

PROTOCOLS = ("v1", "v2", "v3", "params")
_FEATURES = {"v1": (1,), "v2": (3, 11), "v3": (6, 7), "params": (13,)}
_P2P = 4
_TYPED_STRINGS = 9
_LIMITS = Limits()


class ConfigError(ValueError):
    """The configuration cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What the daemon listens on, and what it allows.

    :param schemes: whose sockets libvirt's clients find by themselves; empty is those of every installed driver.
    :param socket_directory: where they lie.
    :param default_uri: the host of clients that name none.
    :param allowed_uris: patterns of connection URIs that clients may open; empty is every one that has no parameters.
        ``default_uri`` and ``hosts`` are allowed.
    :param hosts: that are opened at the start, so that what an earlier daemon left open there is settled.
    :param address: ``tls://host:port`` or ``tcp://host:port`` by which other hosts reach this daemon; '' is that of a
        listener, the encrypted one first.
    :param tcp_listen: ``host:port``, or '' for none.
    :param tcp_without_encryption: who can reach the TCP listener can do everything, and read everything.
    :param tls_listen: ``host:port``, or '' for none; clients show a certificate of the same authority.
    :param tls_allowed_names: patterns; a client's certificate must have a name that fits one.
    :param pki_directory: holds ``cacert.pem``, ``servercert.pem``, ``serverkey.pem``, ``clientcert.pem`` and
        ``clientkey.pem``, the last two for asking other hosts; '' is where libvirt has them.
    :param rules: path of a file that says who may do what; '' is none, and whoever may connect may do everything.
    :param migration_protocols: versions of libvirt's that are offered to its clients.
    :param clients: that are served at a time.
    """

    schemes: tuple[str, ...] = ()
    socket_directory: str = field(default_factory=lambda: str(runtime_directory()))
    default_uri: str = "qemu:///system"
    allowed_uris: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    address: str = ""
    tcp_listen: str = ""
    tcp_without_encryption: bool = False
    tls_listen: str = ""
    tls_allowed_names: tuple[str, ...] = ("*",)
    pki_directory: str = ""
    rules: str = ""
    migration_protocols: tuple[str, ...] = PROTOCOLS
    peer_to_peer: bool = True
    clients: int = 5000
    calls_per_client: int = _LIMITS.calls
    message_bytes: int = _LIMITS.message_bytes
    opening_s: float = _LIMITS.opening_s
    listeners_per_client: int = _LIMITS.listeners
    streams_per_client: int = _LIMITS.streams
    keepalive_s: float = _LIMITS.keepalive_s
    keepalive_count: int = _LIMITS.keepalive_count
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.tls_listen:
            split_address(self.tls_listen, "tls_listen")
        if self.address:
            scheme, _, rest = self.address.partition("://")
            if scheme not in ("tcp", "tls"):
                raise ConfigError(
                    f"address must be tls://host:port or tcp://host:port, not {self.address!r:.80}"
                )
            split_address(rest, "address")
        if self.tcp_listen:
            split_address(self.tcp_listen, "tcp_listen")
            if not self.tcp_without_encryption:
                raise ConfigError(
                    "tcp_listen serves everybody who can reach it, unencrypted and unasked: use"
                    " tls_listen, or set tcp_without_encryption = true if the network is yours alone"
                )
        unknown = sorted(set(self.migration_protocols) - set(PROTOCOLS))
        if unknown:
            raise ConfigError(f"migration_protocols has {unknown[0]!r}: there are {', '.join(PROTOCOLS)}")
        for name, low, high in (
            ("clients", 1, 1_000_000),
            ("calls_per_client", 1, 10_000),
            ("message_bytes", HEADER_BYTES, MAX_MESSAGE_BYTES),
            ("opening_s", 0.1, 3600),
            ("listeners_per_client", 1, 1_000_000),
            ("streams_per_client", 1, 10_000),
            ("keepalive_s", 0.1, 3600),
            ("keepalive_count", 1, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be {low} to {high}, not {getattr(self, name)}")

    @property
    def limits(self) -> Limits:
        """What one client may use."""
        return Limits(
            calls=self.calls_per_client,
            message_bytes=self.message_bytes,
            opening_s=self.opening_s,
            listeners=self.listeners_per_client,
            streams=self.streams_per_client,
            keepalive_s=self.keepalive_s,
            keepalive_count=self.keepalive_count,
        )

    def allows(self, uri: ConnectionURI) -> bool:
        """Whether clients may open a host."""
        text = uri.render()
        if text in (self.default_uri, *self.hosts):
            return True
        if not self.allowed_uris:
            return not uri.params
        return any(fnmatchcase(text, pattern) for pattern in self.allowed_uris)

    def reviewer(self) -> Rules | None:
        """The rules. :raises ConfigError: they cannot be read."""
        if not self.rules:
            return None
        try:
            return read_rules(Path(self.rules).read_text())
        except (OSError, UnicodeDecodeError, RulesError) as error:
            raise ConfigError(f"{self.rules} cannot be used: {error}") from error

    @property
    def features(self) -> frozenset[int]:
        """Libvirt's numbers of what is offered."""
        offered = {number for name in self.migration_protocols for number in _FEATURES[name]}
        return frozenset({*offered, _TYPED_STRINGS, *((_P2P,) if self.peer_to_peer else ())})


def split_address(text: str, key: str) -> tuple[str, int]:
    """Host and port. :raises ConfigError: it is none."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65_535:
        raise ConfigError(f"{key} must be host:port, such as 127.0.0.1:{TCP_PORT}, not {text!r:.80}")
    return host, int(port)


def default_path() -> Path:
    """Where the configuration lies: the system's for root, else the user's."""
    if os.geteuid() == 0:
        return Path("/etc/ferryman/ferrymand.toml")
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "ferryman" / "ferrymand.toml"


def read_config(text: str) -> Config:
    """Read a configuration.

    :raises ConfigError: not TOML, an unknown key, or a value of another type or outside its range.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration is no TOML: {error}") from error
    defaults = Config()
    known = {each.name: getattr(defaults, each.name) for each in fields(Config)}
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in known:
            raise ConfigError(
                f"the configuration has {key!r:.60}, which is no key: there are {', '.join(known)}"
            )
        values[key] = _typed(key, value, known[key])
    return Config(**values)


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{key} must be a list of texts, not {value!r:.80}")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{key} must be of the type of {default!r:.40}, not {value!r:.80}")
    return value
