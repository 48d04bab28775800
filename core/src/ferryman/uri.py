"""Connection URIs and migration URIs: strict grammars whose ``parse`` and ``render`` are inverses.

A *connection URI* says which driver opens which host, and over which transport.  A *migration URI* says where the
destination is reached for the data stream.  In the notation of RFC 5234, with ``unreserved``, ``pct-encoded``,
``sub-delims`` and ``IPv6address`` of RFC 3986::

    connection-uri = name [ "+" name ] "://" [ user "@" ] [ host ] [ ":" port ] [ path ] [ "?" params ]

    migration-uri  = host [ ":" port ]                                      ; the protocol is left open
                   / name "://" host [ ":" port ] [ path ] [ "?" params ]   ; any name but unix, exec and fd
                   / "unix://" path [ "?" params ]
                   / "unix:" path [ "?" params ]                            ; legacy, rendered as unix://
                   / "tcp:" host ":" port                                   ; legacy, rendered as tcp://

    name   = LOWER *( LOWER / DIGIT / "." / "-" )            ; a scheme, a transport or a protocol
    LOWER  = %x61-7A                                         ; a to z
    user   = 1*( unreserved / pct-encoded / sub-delims )     ; decoded: no ":", no leading "-"
    host   = dns-name / IPv4 / "[" IPv6address [ "%25" zone ] "]"
    dns-name = label *( "." label )                          ; RFC 1123, and "_" is tolerated; 253 characters
    label  = 1*63( ALPHA / DIGIT / "-" / "_" )               ; no "-" at either end
    IPv4   = octet 3( "." octet )                            ; octet: 0 to 255 without leading zeros
    zone   = 1*( unreserved / pct-encoded )                  ; RFC 6874; decoded: unreserved only
    port   = %x31-39 *4DIGIT                                 ; 1 to 65535 without leading zeros
    path   = "/" *( unreserved / pct-encoded / sub-delims / ":" / "@" / "/" )
    params = param *( "&" param )                            ; no key twice
    param  = 1*kchar "=" *( kchar / "=" )
    kchar  = unreserved / pct-encoded / "!" / "$" / "'" / "(" / ")" / "*" / "+" / "," / ":" / "@" / "/" / "?"

What the grammar cannot say:

- Percent-encoding is UTF-8.  It is decoded in users, zones, paths and parameters, and written again on render
  wherever a character could not stand there by itself.  An escaped control character is refused, as is a raw one.
  ``+`` in a parameter is a plus and never a space.
- The *canonical* text is what ``render`` writes.  ``parse(uri.render()) == uri`` for every object that can be
  constructed, and ``parse(text).render() == text`` for every canonical text.  An IPv6 address becomes the form of
  RFC 5952; in a connection URI an empty path becomes ``/``, in a migration URI a path of ``/`` alone becomes empty.
  Everything else is kept, also the case of a host name.
- A host whose last label is a number (decimal, or hexadecimal after ``0x``) must be an IPv4 address in four parts.
  Resolvers read ``127.1`` and ``0x7f000001`` as addresses, and as different ones than a reader does.
- A URI carries no password, because URIs are logged.  An error's ``text`` shows asterisks in a password's place.
- No user and no host may begin with ``-``, which ``ssh`` would take for an option.
- A host without a protocol may not be called tcp, unix, rdma, exec or fd: ``rdma:4444`` would read as two things.
- Neither the text nor its canonical form is longer than 4096 characters.

Every refusal is a :class:`~ferryman.errors.URIError` of one sentence, "what is wrong: what to write instead".  Its
``position`` is the 0-based index of the first character at fault.  A delimiter that lacks what must follow it (the
colon of ``host:``) is itself at fault.  For a piece that is wrong as a whole (a port of 65536, an IPv6 address
without brackets) it is the piece's first character, and for a piece that is missing, the place where it belongs, which
may be the length of the text.  It is None only where no text was parsed: for a value that is no text, and for
an object constructed from invalid fields.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self, overload
from urllib.parse import quote

from ferryman.errors import URIError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_URI_LENGTH", "ConnectionURI", "MigrationURI"]

MAX_URI_LENGTH = 4096
"""Characters in the longest URI, as parsed and as rendered."""

_MAX_PORT = 65535
_MAX_PORT_DIGITS = 5
_MAX_HOST_LENGTH = 253
_MAX_LABEL_LENGTH = 63
_SHOWN_LENGTH = 40

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
_UPPER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset("0123456789")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_ALPHANUMERIC = _LOWER | _UPPER | _DIGITS
_UNRESERVED = _ALPHANUMERIC | frozenset("-._~")
_NAME = _LOWER | _DIGITS | frozenset(".-")
_HOST = _ALPHANUMERIC | frozenset("-._")
_IPV6 = _HEX_DIGITS | frozenset(":.")

_USER_DELIMITERS = "!$&'()*+,;="
_PATH_DELIMITERS = "!$&'()*+,;=:@/"
# "&" separates parameters; ";" does so for libvirt and other readers, so it never stands for itself here.
_KEY_DELIMITERS = "!$'()*+,:@/?"
_VALUE_DELIMITERS = _KEY_DELIMITERS + "="
_USER = _UNRESERVED | frozenset(_USER_DELIMITERS)
_PATH = _UNRESERVED | frozenset(_PATH_DELIMITERS)
_KEY = _UNRESERVED | frozenset(_KEY_DELIMITERS)
_VALUE = _UNRESERVED | frozenset(_VALUE_DELIMITERS)

# Words that open a legacy spelling here or in QEMU, and so are no host names where a protocol is left open.
_RESERVED_HOSTS = frozenset({"tcp", "unix", "rdma", "exec", "fd"})
# QEMU's forms that name a command or a descriptor of one process, not a place another host can reach.
_REFUSED_PROTOCOLS = frozenset({"exec", "fd"})

_PORT_REMEDY = f"write a decimal number from 1 to {_MAX_PORT}"
_NAME_REMEDY = "use lower-case letters, digits, '.' and '-', beginning with a letter"
_HOST_REMEDY = "use letters, digits, '-' and '.', an IPv4 address, or an IPv6 address in brackets"
_PASSWORD_SENTENCE = (
    "a URI carries no password, because URIs are logged: write the user name alone and give the credentials to the "
    "transport (an SSH key or agent, a TLS client certificate, or the client's SASL credentials file)"
)

# What stands before an authority, be it well-formed or not; an authority without a user; what opens a password.
_OPENING = re.compile(r"(?:[^:/?#@]*:)?//?")
_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?")
_COLON = re.compile(r":|%3[Aa]")
_LETTER_AFTER_COLON = re.compile(r":[A-Za-z]")


class _Fault(NamedTuple):
    """What is wrong with one part, and where: ``offset`` counts characters from the part's beginning."""

    offset: int
    sentence: str


class _Decoded(NamedTuple):
    """A part after percent-decoding; ``positions`` holds the index in the URI of each character."""

    value: str
    positions: list[int]


class _Source(NamedTuple):
    """The text being parsed."""

    text: str

    def error(self, position: int, sentence: str) -> URIError:
        return URIError(
            f"at position {position}, {sentence}",
            text=_without_password(self.text)[: MAX_URI_LENGTH + 1],
            position=position,
        )

    def find_any(self, characters: str, start: int, end: int) -> int:
        """Return the index of the first of ``characters`` in ``[start, end)``, or ``end``."""
        return next((index for index in range(start, end) if self.text[index] in characters), end)


# --- characters --------------------------------------------------------------------------------------------------


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _shown(character: str) -> str:
    if " " < character <= "~":
        return f'"{character}"' if character == "'" else f"'{character}'"
    return f"U+{ord(character):04X}"


def _excerpt(value: str) -> str:
    return ascii(value if len(value) <= _SHOWN_LENGTH else f"{value[:_SHOWN_LENGTH]}...")


def _misfit(character: str, where: str, remedy: str = "") -> str:
    """Return the sentence about a character that cannot stand in a part.

    :param where: the part, with its article.
    :param remedy: what to write instead; empty where percent-encoding is the remedy.
    """
    shown = _shown(character)
    if _is_control(character):
        return f"the control character {shown} cannot stand in {where}: remove it"
    if _is_surrogate(character):
        return f"{shown} in {where} is half of a surrogate pair and not a character: remove it"
    if character.isspace():
        shown = "a space" if character == " " else f"the white space {shown}"
        remedy = "remove it" if remedy else f"remove it or write it as {quote(character, safe='')}"
    elif not remedy:
        remedy = f"write it as {quote(character, safe='')}"
    return f"{shown} cannot stand in {where}: {remedy}"


def _without_password(text: str) -> str:
    """Return the text with asterisks for what looks like a password, so that positions stay true."""
    opening = _OPENING.match(text)
    start = 0 if opening is None else opening.end()
    end = next((index for index in range(start, len(text)) if text[index] in "/?#"), len(text))
    at = text.rfind("@", start, end)
    if at < 0 and _HOST_AND_PORT.fullmatch(text, start, end) is None:
        # The password itself may hold a '/', '?' or '#'.
        at = text.rfind("@")
    colon = _COLON.search(text, start, at) if at > start else None
    return text if colon is None else text[: colon.end()] + "*" * (at - colon.end()) + text[at:]


# --- rules for one part ------------------------------------------------------------------------------------------


def _misfit_fault(value: str, allowed: frozenset[str], where: str, remedy: str) -> _Fault | None:
    for offset, character in enumerate(value):
        if character not in allowed:
            return _Fault(offset, _misfit(character, where, remedy))
    return None


def _name_fault(name: str, what: str) -> _Fault | None:
    """Find the first fault of a scheme, a transport or a protocol."""
    if name and name[0] in _LOWER:
        return _misfit_fault(name, _NAME, what, _NAME_REMEDY)
    fault = _misfit_fault(name[:1], _NAME, what, _NAME_REMEDY)
    return fault or _Fault(0, f"{what} begins with a letter from a to z: {_NAME_REMEDY}")


def _decoded_fault(value: str, where: str) -> _Fault | None:
    """Find what no part may hold, however it is spelt."""
    for offset, character in enumerate(value):
        if _is_control(character) or _is_surrogate(character):
            return _Fault(offset, _misfit(character, where))
    return None


def _user_fault(user: str) -> _Fault | None:
    if not user:
        return _Fault(0, "the user name is empty: write one, or leave it out")
    if user[0] == "-":
        return _Fault(
            0, "a user name cannot begin with '-', which ssh takes for an option: name another user"
        )
    if ":" in user:
        return _Fault(user.index(":"), _PASSWORD_SENTENCE)
    return None


def _ipv6_fault(address: str) -> _Fault | None:
    """Find the first fault of an IPv6 address without brackets and zone."""
    fault = _misfit_fault(address, _IPV6, "an IPv6 address", "use hexadecimal digits, ':' and '.'")
    if fault is not None:
        return fault
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        remedy = "write eight groups of one to four hexadecimal digits, or '::' once for a run of zeros"
        return _Fault(0, f"{_excerpt(address)} is not an IPv6 address: {remedy}")
    return None


def _is_ipv4(address: str) -> bool:
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return True


def _zone_fault(zone: str) -> _Fault | None:
    if not zone:
        return _Fault(0, "the zone is empty: name the interface, or leave out the '%'")
    return _misfit_fault(zone, _UNRESERVED, "a zone", "use letters, digits, '-', '.', '_' and '~'")


def _label_fault(label: str) -> _Fault | None:
    """Find the first fault of a part of a host name whose characters are allowed and which is not empty."""
    if label[0] == "-":
        return _Fault(0, "no part of a host name begins with '-': begin it with a letter or a digit")
    if len(label) > _MAX_LABEL_LENGTH:
        sentence = (
            f"no part of a host name is longer than {_MAX_LABEL_LENGTH} characters: write a shorter name"
        )
        return _Fault(_MAX_LABEL_LENGTH, sentence)
    if label[-1] == "-":
        return _Fault(len(label) - 1, "no part of a host name ends in '-': end it in a letter or a digit")
    return None


def _dns_name_fault(name: str) -> _Fault | None:
    """Find the first fault of a host without ``:``, which is a name or an IPv4 address."""
    is_foreign = not name.isascii()
    remedy = "write the name in its ASCII form, which begins with xn--" if is_foreign else _HOST_REMEDY
    fault = _misfit_fault(name, _HOST, "a host", remedy)
    if fault is not None:
        return fault
    offset = 0
    labels = name.split(".")
    for label in labels:
        if not label:
            # The dot that stands here, or at the end of the name the one before.
            return _Fault(min(offset, len(name) - 1), "a part of the host name is empty: remove the '.'")
        fault = _label_fault(label)
        if fault is not None:
            return _Fault(offset + fault.offset, fault.sentence)
        offset += len(label) + 1
    if len(name) > _MAX_HOST_LENGTH:
        sentence = f"a host name is not longer than {_MAX_HOST_LENGTH} characters: write a shorter name"
        return _Fault(_MAX_HOST_LENGTH, sentence)
    last = labels[-1].lower()
    is_number = _DIGITS.issuperset(last) or (last[:2] == "0x" and _HEX_DIGITS.issuperset(last[2:]))
    if is_number and not _is_ipv4(name):
        remedy = "write four decimal numbers from 0 to 255 without leading zeros, or another name"
        return _Fault(0, f"{_excerpt(name)} may be read as an IPv4 address and is none: {remedy}")
    return None


def _host_fault(host: str) -> _Fault | None:
    """Find the first fault of a host as an object holds it: no brackets, and ``%`` before a zone."""
    if not host:
        return _Fault(0, f"the host is empty: {_HOST_REMEDY}")
    if ":" not in host:
        return _dns_name_fault(host)
    address, percent, zone = host.partition("%")
    fault = _ipv6_fault(address)
    if fault is not None or not percent:
        return fault
    fault = _zone_fault(zone)
    return None if fault is None else _Fault(len(address) + 1 + fault.offset, fault.sentence)


def _canonical_host(host: str) -> str:
    """Return a valid host in the one form that stands for it."""
    if ":" not in host:
        return host
    text, percent, zone = host.partition("%")
    address = ipaddress.IPv6Address(text)
    # str() of a mapped address is not the same in all versions of Python, so RFC 5952 section 5 is followed here.
    mapped = address.ipv4_mapped
    return (address.compressed if mapped is None else f"::ffff:{mapped}") + percent + zone


# --- fields of an object that is being constructed ---------------------------------------------------------------


def _field_error(field: str, value: str, sentence: str) -> URIError:
    return URIError(f"in {field}, {sentence}", text=value[: MAX_URI_LENGTH + 1], position=None)


def _checked_text(field: str, value: object, rule: Callable[[str], _Fault | None]) -> str:
    """Return the value as a plain str, whatever subclass of it was given."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise _field_error(field, kind, f"a str is needed and this is {_excerpt(kind)}: convert it first")
    text = str.__str__(value)
    fault = rule(text)
    if fault is not None:
        raise _field_error(field, _without_password(text), fault.sentence)
    return text


def _checked_name(field: str, value: object) -> str:
    return _checked_text(field, value, partial(_name_fault, what=f"a {field}"))


def _checked_user(value: object) -> str:
    user = _checked_text("user", value, partial(_decoded_fault, where="a user name"))
    fault = _user_fault(user)
    if fault is not None:
        name, colon, password = user.partition(":")
        raise _field_error("user", f"{name}{colon}{'*' * len(password)}", fault.sentence)
    return user


def _checked_host(value: object) -> str:
    def rule(host: str) -> _Fault | None:
        if host[:1] == "[":
            return _Fault(
                0, "brackets belong to the text and not to the host: write the address without them"
            )
        return _host_fault(host)

    return _canonical_host(_checked_text("host", value, rule))


def _checked_port(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        kind = type(value).__name__
        raise _field_error("port", kind, f"an int is needed and this is {_excerpt(kind)}: {_PORT_REMEDY}")
    if not 1 <= value <= _MAX_PORT:
        raise _field_error("port", "", f"the number is outside the range of ports: {_PORT_REMEDY}")
    return int(value)


def _checked_path(value: object) -> str:
    def rule(path: str) -> _Fault | None:
        if path and path[0] != "/":
            return _Fault(0, f"a path cannot begin with {_shown(path[0])}: begin it with '/'")
        return _decoded_fault(path, "a path")

    return _checked_text("path", value, rule)


def _checked_params(value: object) -> tuple[tuple[str, str], ...]:
    shape = "write a tuple of pairs, ((KEY, VALUE), ...)"
    if not isinstance(value, tuple):
        raise _field_error("params", type(value).__name__, f"the parameters are no tuple: {shape}")
    params: dict[str, str] = {}
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise _field_error("params", type(pair).__name__, f"a parameter is no pair: {shape}")
        key = _checked_text("params", pair[0], partial(_decoded_fault, where="a parameter's name"))
        if not key or key in params:
            what = "is given twice" if key else "has an empty name"
            raise _field_error(
                "params", key, f"the parameter {_excerpt(key)} {what}: give it once, with a name"
            )
        params[key] = _checked_text("params", pair[1], partial(_decoded_fault, where="a parameter's value"))
    return tuple(params.items())


def _check_length(text: str) -> None:
    if len(text) > MAX_URI_LENGTH:
        raise URIError(
            f"the URI has more than {MAX_URI_LENGTH} characters in its canonical form: write a shorter one",
            text=text[: MAX_URI_LENGTH + 1],
            position=None,
        )


# --- parsing -----------------------------------------------------------------------------------------------------


def _source(text: object) -> _Source:
    """Check what can be told before looking at any part."""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise URIError(f"a URI is a str and not {_excerpt(kind)}: convert it first", text=kind, position=None)
    source = _Source(text)
    if len(text) > MAX_URI_LENGTH:
        raise source.error(
            MAX_URI_LENGTH, f"the URI goes on after {MAX_URI_LENGTH} characters: write a shorter one"
        )
    return source


def _decode(source: _Source, start: int, end: int, raw: frozenset[str], where: str) -> _Decoded:
    """Undo the percent-encoding of ``[start, end)``, in which the characters of ``raw`` may stand for themselves."""
    octets = bytearray()
    starts: list[int] = []
    index = start
    stopped: URIError | None = None
    while index < end and stopped is None:
        character = source.text[index]
        starts.append(index)
        if character == "%":
            digits = source.text[index + 1 : min(index + 3, end)]
            if len(digits) == 2 and _HEX_DIGITS.issuperset(digits):
                octets.append(int(digits, 16))
                index += 3
            else:
                stopped = source.error(
                    index, f"'%' in {where} lacks its two hexadecimal digits: write %25 for a percent sign"
                )
        elif character in raw:
            octets.append(ord(character))
            index += 1
        else:
            stopped = source.error(index, _misfit(character, where))
    # What precedes a fault is looked at as well, so that the first fault is the one reported.
    try:
        value = octets.decode()
    except UnicodeDecodeError as error:
        sentence = f"the escapes in {where} are not UTF-8: escape the bytes of the character's UTF-8 form"
        stopped = source.error(starts[error.start], sentence)
        value = octets[: error.start].decode()
    positions: list[int] = []
    octet = 0
    for character in value:
        positions.append(starts[octet])
        octet += len(character.encode())
    decoded = _Decoded(value, positions)
    _raise_decoded(source, decoded, _decoded_fault(value, where))
    if stopped is not None:
        raise stopped
    return decoded


def _raise_decoded(source: _Source, decoded: _Decoded, fault: _Fault | None) -> None:
    if fault is not None:
        raise source.error(decoded.positions[fault.offset], fault.sentence)


def _raise_at(source: _Source, start: int, fault: _Fault | None) -> None:
    if fault is not None:
        raise source.error(start + fault.offset, fault.sentence)


def _bare_ipv6_remedy(part: str) -> str | None:
    """Return what to write for an IPv6 address without brackets, or None where the part is no such thing."""
    address = part.partition("%")[0]
    before, _, after = address.rpartition(":")
    readings = [f"[{address}]"] if _ipv6_fault(address) is None else []
    if after and _ipv6_fault(before) is None and _port_text_fault(after) is None:
        readings.append(f"[{before}]:{after}")
    if not readings and not ("::" in address and _IPV6.issuperset(address)):
        return None
    if address != part:
        return "write [ADDRESS%25ZONE] or [ADDRESS%25ZONE]:PORT"
    return f"write {' or '.join(readings or ['[ADDRESS]', '[ADDRESS]:PORT'])}"


def _port_text_fault(text: str) -> _Fault | None:
    """Find the first fault of a port that is not empty."""
    fault = _misfit_fault(text, _DIGITS, "a port", _PORT_REMEDY)
    if fault is not None:
        return fault
    number = text.lstrip("0")
    if number and number != text:
        return _Fault(0, f"a port has no leading zeros: write {_excerpt(number)}")
    if not number or len(number) > _MAX_PORT_DIGITS or int(number) > _MAX_PORT:
        return _Fault(0, f"{_excerpt(text)} is not the number of a port: {_PORT_REMEDY}")
    return None


def _parse_port(source: _Source, colon: int, end: int, hint: str = "") -> int:
    text = source.text[colon + 1 : end]
    if not text:
        raise source.error(colon, f"no port follows ':': {_PORT_REMEDY}, or leave out the ':'")
    fault = _port_text_fault(text)
    if fault is not None:
        raise source.error(colon + 1 + fault.offset, fault.sentence + hint)
    return int(text)


def _parse_bracketed(source: _Source, start: int, end: int) -> tuple[str, int]:
    """Read the IPv6 address whose ``[`` is at ``start``; return the host and the index after ``]``."""
    close = source.text.find("]", start, end)
    if close < 0:
        raise source.error(start, "'[' is never closed: write ']' after the IPv6 address")
    first = start + 1
    percent = source.text.find("%", first, close)
    address = source.text[first : close if percent < 0 else percent]
    if not address:
        raise source.error(start, "the brackets hold no IPv6 address: write one, or a name without brackets")
    if ":" not in address and _dns_name_fault(address) is None:
        raise source.error(
            start, f"only an IPv6 address stands in brackets: write {_excerpt(address)} without them"
        )
    _raise_at(source, first, _ipv6_fault(address))
    if percent < 0:
        return _canonical_host(address), close + 1
    zone = percent + 3
    if not source.text.startswith("%25", percent) or zone == close:
        raise source.error(
            percent, "'%' does not begin a zone here: write %25 and the zone, as in [fe80::1%25eth0]"
        )
    decoded = _decode(source, zone, close, _UNRESERVED, "a zone")
    _raise_decoded(source, decoded, _zone_fault(decoded.value))
    return _canonical_host(f"{address}%{decoded.value}"), close + 1


def _parse_host_and_port(
    source: _Source, start: int, end: int, *, host_needed: bool, hint: str = ""
) -> tuple[str | None, int | None]:
    """Read ``[host][:port]``, which is all of ``[start, end)``.

    :param hint: added to the remedy of a port that is not a number.
    """
    if source.text.startswith("[", start, end):
        host, colon = _parse_bracketed(source, start, end)
        if colon < end and source.text[colon] != ":":
            sentence = _misfit(source.text[colon], "the place after ']'", "write ':' and a port, or nothing")
            raise source.error(colon, sentence)
        return host, None if colon == end else _parse_port(source, colon, end)
    remedy = _bare_ipv6_remedy(source.text[start:end])
    if remedy is not None:
        raise source.error(start, f"an IPv6 address without brackets is ambiguous: {remedy}")
    colon = source.find_any(":", start, end)
    if colon > start:
        _raise_at(source, start, _host_fault(source.text[start:colon]))
    elif host_needed:
        raise source.error(start, f"the host is missing: {_HOST_REMEDY}")
    name = source.text[start:colon] or None
    return name, None if colon == end else _parse_port(source, colon, end, hint)


def _parse_params(source: _Source, question_mark: int, end: int) -> tuple[tuple[str, str], ...]:
    """Read ``key=value&...`` after the ``?``."""
    params: dict[str, str] = {}
    start = question_mark + 1
    if start == end:
        raise source.error(question_mark, "no parameter follows '?': write KEY=VALUE, or leave out the '?'")
    while start <= end:
        stop = source.find_any("&", start, end)
        if start == stop:
            # At the end the '&' before is the one too many, elsewhere the one that stands here.
            raise source.error(
                min(start, end - 1), "no parameter stands beside '&': write KEY=VALUE, or leave out the '&'"
            )
        equals = source.find_any("=", start, stop)
        key = _decode(source, start, equals, _KEY, "a parameter's name").value
        if equals == stop:
            raise source.error(stop, f"'=' is missing after the parameter {_excerpt(key)}: write KEY=VALUE")
        if not key:
            raise source.error(equals, "no name stands before '=': write KEY=VALUE")
        if key in params:
            raise source.error(start, f"the parameter {_excerpt(key)} is given twice: give it once")
        params[key] = _decode(source, equals + 1, stop, _VALUE, "a parameter's value").value
        start = stop + 1
    return tuple(params.items())


def _parse_tail(source: _Source, start: int) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Read ``[path][?params]`` from ``start`` to the end of the text."""
    end = source.find_any("#", start, len(source.text))
    question_mark = source.find_any("?", start, end)
    path = _decode(source, start, question_mark, _PATH, "a path").value
    params = () if question_mark == end else _parse_params(source, question_mark, end)
    if end < len(source.text):
        raise source.error(end, "a URI has no fragment here: write '#' as %23")
    return path, params


# --- rendering ---------------------------------------------------------------------------------------------------


def _render_host_and_port(host: str | None, port: int | None) -> str:
    text = "" if host is None else host
    if ":" in text:
        text = f"[{text.replace('%', '%25')}]"
    return text if port is None else f"{text}:{port}"


def _render_tail(path: str, params: tuple[tuple[str, str], ...]) -> str:
    pairs = "&".join(
        f"{quote(key, safe=_KEY_DELIMITERS)}={quote(value, safe=_VALUE_DELIMITERS)}" for key, value in params
    )
    return quote(path, safe=_PATH_DELIMITERS) + (f"?{pairs}" if pairs else "")


# --- the two kinds of URI ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionURI:
    """The address of a host's driver: ``scheme[+transport]://[user@][host][:port]/path?params``.

    All fields are decoded.  An object is valid from construction on, and equal objects render alike.

    :param scheme: names the driver, such as ``qemu`` or ``xen``.
    :param transport: names what carries the connection, such as ``tls`` or ``ssh``; None where the text named none.
    :param user: the user at the other end; never a password.
    :param host: a name, an IPv4 address, or an IPv6 address without brackets and with ``%zone`` where it has one;
        None means this host, or what the transport takes for it.
    :param port: 1 to 65535; None means the transport's own.
    :param path: begins with ``/``; an empty path becomes ``/``.
    :param params: pairs of key and value in the order of the text; no key stands twice.
    :raises URIError: a field is invalid; ``position`` is None.
    :source: libvirt's connection URIs (docs/uri.rst); RFC 3986, RFC 6874.
    """

    scheme: str
    transport: str | None = None
    user: str | None = None
    host: str | None = None
    port: int | None = None
    path: str = "/"
    params: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", _checked_name("scheme", self.scheme))
        if self.transport is not None:
            object.__setattr__(self, "transport", _checked_name("transport", self.transport))
        if self.user is not None:
            object.__setattr__(self, "user", _checked_user(self.user))
        if self.host is not None:
            object.__setattr__(self, "host", _checked_host(self.host))
        if self.port is not None:
            object.__setattr__(self, "port", _checked_port(self.port))
        object.__setattr__(self, "path", _checked_path(self.path) or "/")
        object.__setattr__(self, "params", _checked_params(self.params))
        _check_length(self.render())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a connection URI.

        :param text: at most 4096 characters.
        :raises URIError: the text is no connection URI, or is no str; nothing else is raised, whatever is given.
        """
        source = _source(text)
        head_end = source.find_any(":/?#@[", 0, len(text))
        scheme, plus, transport = text[:head_end].partition("+")
        if not scheme:
            raise source.error(0, "the scheme is missing: begin with the driver's name, as in qemu:///system")
        _raise_at(source, 0, _name_fault(scheme, "a scheme"))
        if plus and not transport:
            raise source.error(
                len(scheme), "no transport follows '+': write one, such as ssh, or leave out the '+'"
            )
        if plus and "+" in transport:
            second = len(scheme) + 1 + transport.index("+")
            raise source.error(second, "a URI names one transport: write SCHEME+TRANSPORT://")
        if plus:
            _raise_at(source, len(scheme) + 1, _name_fault(transport, "a transport"))
        if not text.startswith("://", head_end):
            at = head_end + text.startswith(":", head_end)
            example = f"{scheme[:_SHOWN_LENGTH]}:///system"
            raise source.error(
                at, f"a connection URI needs '://' after its scheme: write '{example}' for this host"
            )
        start = head_end + len("://")
        end = source.find_any("/?#", start, len(text))
        user = None
        at_sign = text.rfind("@", start, end)
        if at_sign >= 0:
            user = cls._parse_user(source, start, at_sign)
            start = at_sign + 1
        host, port = _parse_host_and_port(source, start, end, host_needed=False)
        path, params = _parse_tail(source, end)
        try:
            return cls(
                scheme=scheme,
                transport=transport or None,
                user=user,
                host=host,
                port=port,
                path=path,
                params=params,
            )
        except URIError as error:
            # Each part has passed at its own position; the canonical form can still outgrow the limit.
            raise source.error(len(text), error.message) from None

    @staticmethod
    def _parse_user(source: _Source, start: int, at_sign: int) -> str:
        if start == at_sign:
            raise source.error(at_sign, "no user name stands before '@': write one, or leave out the '@'")
        colon = source.find_any(":", start, at_sign)
        decoded = _decode(source, start, colon, _USER, "a user name")
        if colon < at_sign:
            raise source.error(colon, _PASSWORD_SENTENCE)
        _raise_decoded(source, decoded, _user_fault(decoded.value))
        return decoded.value

    def render(self) -> str:
        """Write the canonical text, which :meth:`parse` reads back as an equal object."""
        head = self.scheme if self.transport is None else f"{self.scheme}+{self.transport}"
        user = "" if self.user is None else f"{quote(self.user, safe=_USER_DELIMITERS)}@"
        return f"{head}://{user}{_render_host_and_port(self.host, self.port)}{_render_tail(self.path, self.params)}"

    def __str__(self) -> str:
        return self.render()

    @overload
    def param(self, name: str) -> str | None: ...

    @overload
    def param(self, name: str, default: str) -> str: ...

    @overload
    def param(self, name: str, default: None) -> str | None: ...

    def param(self, name: str, default: str | None = None) -> str | None:
        """Return the value of the parameter ``name``, or ``default`` where the URI has none of that name."""
        return dict(self.params).get(name, default)


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationURI:
    """Where the source reaches the destination for the data stream: ``protocol://host:port`` and its short forms.

    All fields are decoded.  An object is valid from construction on, and equal objects render alike.

    :param protocol: such as ``tcp``, ``xenmigr`` or ``unix``; empty where the text named none (``host[:port]``), and
        the driver's own is meant.
    :param host: a name, an IPv4 address, or an IPv6 address without brackets and with ``%zone`` where it has one; None
        with the protocol ``unix`` and only there.
    :param port: 1 to 65535; None means one of the destination's choice, or none with ``unix``.
    :param path: empty, or begins with ``/``; ``/`` alone becomes empty.  With ``unix``, the socket's absolute path.
    :param params: pairs of key and value in the order of the text; no key stands twice.
    :raises URIError: a field is invalid, or does not go with another; ``position`` is None.
    :source: libvirt's migration URIs (docs/migration.rst); QEMU's ``migrate`` for ``tcp:`` and ``unix:``; RFC 3986.
    """

    protocol: str = ""
    host: str | None = None
    port: int | None = None
    path: str = ""
    params: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.protocol != "":
            object.__setattr__(self, "protocol", _checked_name("protocol", self.protocol))
        if self.host is not None:
            object.__setattr__(self, "host", _checked_host(self.host))
        if self.port is not None:
            object.__setattr__(self, "port", _checked_port(self.port))
        path = _checked_path(self.path)
        object.__setattr__(self, "path", "" if path == "/" else path)
        object.__setattr__(self, "params", _checked_params(self.params))
        self._check_together()
        _check_length(self.render())

    def _check_together(self) -> None:
        """Refuse fields that are valid alone and make no URI together."""
        if self.protocol in _REFUSED_PROTOCOLS:
            raise _field_error("protocol", self.protocol, _refused_protocol(self.protocol))
        if self.protocol == "unix":
            if self.host is not None or self.port is not None:
                raise _field_error(
                    "protocol", self.protocol, "a unix socket has no host and no port: give its path alone"
                )
            if not self.path:
                raise _field_error("path", self.path, "the socket's path is missing: write its absolute path")
            return
        if self.host is None:
            raise _field_error("host", "", f"the host is missing: {_HOST_REMEDY}")
        if self.protocol:
            return
        if self.host.lower() in _RESERVED_HOSTS:
            raise _field_error("host", self.host, _reserved_host(self.host))
        if self.path or self.params:
            field = "path" if self.path else "params"
            raise _field_error(
                field, self.path, "a path or parameter needs a protocol: name one, such as tcp"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a migration URI in any of its forms.

        :param text: at most 4096 characters.
        :raises URIError: the text is no migration URI, is ambiguous, or is no str; nothing else is raised, whatever is
            given.
        """
        source = _source(text)
        head_end = source.find_any(":/?#@[", 0, len(text))
        head = text[:head_end]
        start = head_end + 1
        protocol = ""
        host: str | None = None
        port: int | None = None
        path = ""
        params: tuple[tuple[str, str], ...] = ()
        if text.startswith("://", head_end):
            start = head_end + len("://")
            protocol = cls._parse_protocol(source, head)
            end = source.find_any("/?#", start, len(text))
            if protocol != "unix":
                host, port = cls._parse_place(source, start, end)
            elif end > start:
                raise source.error(
                    start, "a unix socket has no host: write 'unix:///PATH', with three slashes"
                )
            path, params = _parse_tail(source, end)
        elif not text.startswith(":", head_end) or head.lower() not in _RESERVED_HOSTS:
            host, port = cls._parse_plain(source, head)
        elif head != head.lower():
            raise source.error(
                0, f"{_excerpt(head)} is not how the protocol is spelt: write it in lower case"
            )
        elif head == "tcp":
            protocol = head
            host, port = cls._parse_legacy_tcp(source, start)
        elif head == "unix":
            protocol = head
            if not text.startswith("/", start):
                raise source.error(start, "the path of a unix socket is absolute: write 'unix:///PATH'")
            path, params = _parse_tail(source, start)
        elif head in _REFUSED_PROTOCOLS:
            raise source.error(0, _refused_protocol(head))
        else:
            raise source.error(start, f"'//' is missing after '{head}:': write '{head}://HOST:PORT'")
        if protocol == "unix" and path in {"", "/"}:
            raise source.error(start, "the path of the unix socket is missing: write 'unix:///PATH'")
        try:
            return cls(protocol=protocol, host=host, port=port, path=path, params=params)
        except URIError as error:
            # Each part has passed at its own position; the canonical form can still outgrow the limit.
            raise source.error(len(text), error.message) from None

    @staticmethod
    def _parse_protocol(source: _Source, head: str) -> str:
        if not head:
            raise source.error(0, "the protocol is missing before '://': write one, as in tcp://HOST:PORT")
        name, plus, _ = head.partition("+")
        if name or not plus:
            _raise_at(source, 0, _name_fault(name, "a protocol"))
        if plus:
            sentence = (
                "'+' joins scheme and transport in a connection URI and cannot stand in a migration URI"
            )
            raise source.error(
                len(name), f"{sentence}: write the data stream's protocol, as in tcp://HOST:PORT"
            )
        if name in _REFUSED_PROTOCOLS:
            raise source.error(0, _refused_protocol(name))
        return name

    @staticmethod
    def _parse_place(
        source: _Source, start: int, end: int, *, hint: str = ""
    ) -> tuple[str | None, int | None]:
        at_sign = source.find_any("@", start, end)
        if at_sign < end:
            raise source.error(at_sign, "a migration URI names no user: write the host alone, without '@'")
        return _parse_host_and_port(source, start, end, host_needed=True, hint=hint)

    @classmethod
    def _parse_plain(cls, source: _Source, head: str) -> tuple[str | None, int | None]:
        """Read ``host[:port]``, which is the whole text."""
        end = source.find_any("/?#", 0, len(source.text))
        hint = ""
        if _LETTER_AFTER_COLON.match(source.text, len(head)) and _name_fault(head, "") is None:
            hint = f", or '{head[:_SHOWN_LENGTH]}://' if that is a protocol"
        host, port = cls._parse_place(source, 0, end, hint=hint)
        if head.lower() in _RESERVED_HOSTS:
            raise source.error(0, _reserved_host(head))
        if end < len(source.text):
            shown = _shown(source.text[end])
            raise source.error(
                end, f"{shown} needs a protocol in front of the host: write tcp://HOST:PORT or another one"
            )
        return host, port

    @classmethod
    def _parse_legacy_tcp(cls, source: _Source, start: int) -> tuple[str | None, int | None]:
        """Read ``host:port`` from ``start`` on, after ``tcp:``."""
        rest = source.text[start:]
        if rest and _DIGITS.issuperset(rest):
            raise source.error(
                start, f"'tcp:' and a number is ambiguous: write tcp://HOST:{rest[:_SHOWN_LENGTH]}"
            )
        end = source.find_any("/?#", start, len(source.text))
        host, port = cls._parse_place(source, start, end)
        if end < len(source.text):
            shown = _shown(source.text[end])
            raise source.error(
                end, f"{shown} cannot stand after 'tcp:HOST:PORT': write tcp://HOST:PORT in front of it"
            )
        if port is None:
            raise source.error(
                end, "the port is missing after 'tcp:HOST': write tcp://HOST or tcp://HOST:PORT"
            )
        return host, port

    def render(self) -> str:
        """Write the canonical text, which :meth:`parse` reads back as an equal object."""
        head = f"{self.protocol}://" if self.protocol else ""
        return f"{head}{_render_host_and_port(self.host, self.port)}{_render_tail(self.path, self.params)}"

    def __str__(self) -> str:
        return self.render()

    def with_host(self, host: str) -> Self:
        """Return the same URI with another host.

        :param host: as the field ``host``: an IPv6 address stands without brackets.
        :raises URIError: the host is invalid, or the protocol is ``unix``, which has none.
        """
        return replace(self, host=host)

    def with_port(self, port: int | None) -> Self:
        """Return the same URI with another port, or with none.

        :param port: 1 to 65535, or None.
        :raises URIError: the port is out of range, or the protocol is ``unix``, which has none.
        """
        return replace(self, port=port)


def _refused_protocol(name: str) -> str:
    return f"'{name}' names nothing that another host can reach: write tcp://HOST:PORT or unix:///PATH"


def _reserved_host(host: str) -> str:
    return f"'{host}' alone reads as a protocol: write 'tcp://{host}' for a host of that name"
