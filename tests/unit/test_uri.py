"""Do the two URI classes read what they write, refuse the rest at the right character, and raise nothing else?"""

from __future__ import annotations

import ipaddress
import string
from dataclasses import FrozenInstanceError, replace
from enum import Enum
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ferryman.errors import URIError
from ferryman.uri import MAX_URI_LENGTH, ConnectionURI, MigrationURI

if TYPE_CHECKING:
    from collections.abc import Callable

    AnyURI = ConnectionURI | MigrationURI

BOTH = pytest.mark.parametrize("kind", [ConnectionURI, MigrationURI], ids=["connection", "migration"])
# A busy machine may stop for longer than any deadline that would mean something here.
often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

RESERVED = {"tcp", "unix", "rdma", "exec", "fd"}


def refusal(kind: type[AnyURI], text: str) -> URIError:
    """Return the error of a text that must be refused, having checked what holds for every error."""
    with pytest.raises(URIError) as caught:
        kind.parse(text)
    check_error(caught.value, text)
    return caught.value


def check_error(error: URIError, text: str) -> None:
    assert type(error) is URIError
    assert error.position is not None
    assert 0 <= error.position <= len(text)
    assert len(error.text) == min(len(text), MAX_URI_LENGTH + 1)
    check_sentence(str(error))
    assert str(error).startswith(f"at position {error.position}, ")


def check_sentence(message: str) -> None:
    problem, colon, remedy = message.partition(": ")
    assert problem
    assert colon
    assert remedy
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 400


def check_any(kind: type[AnyURI], text: str) -> None:
    """Whatever the text: a URI whose canonical form is a fixed point, or a URIError that says where."""
    try:
        uri = kind.parse(text)
    except URIError as error:
        check_error(error, text)
    else:
        canonical = uri.render()
        assert kind.parse(canonical) == uri
        assert kind.parse(canonical).render() == canonical
        assert len(canonical) <= MAX_URI_LENGTH


# --- strategies for valid objects ----------------------------------------------------------------------------------

LOWER = string.ascii_lowercase
names = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(LOWER),
    st.text(LOWER + string.digits + ".-", max_size=12),
)
labels = st.from_regex(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,8}[a-zA-Z0-9_])?", fullmatch=True)


def is_numeric(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return last.isdigit() or (last.startswith("0x") and not last[2:].strip(string.hexdigits))


dns_names = st.lists(labels, min_size=1, max_size=4).map(".".join).filter(lambda name: not is_numeric(name))
ipv4_addresses = st.ip_addresses(v=4).map(str)
ipv6_addresses = st.one_of(
    st.ip_addresses(v=6).map(lambda address: address.exploded),
    st.ip_addresses(v=6).map(lambda address: address.compressed.upper()),
    ipv4_addresses.map(lambda address: f"::ffff:{address}"),
    st.builds(
        lambda address, zone: f"{address.compressed}%{zone}",
        st.ip_addresses(v=6, network="fe80::/10"),
        st.text(string.ascii_letters + string.digits + "-._~", min_size=1, max_size=15),
    ),
)
hosts = st.one_of(dns_names, ipv4_addresses, ipv6_addresses)
ports = st.integers(1, 65535)
# Everything that a part may hold once it is decoded: any character but control characters and halves of pairs.
decoded = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)
users = decoded.map(lambda text: text.replace(":", "").lstrip("-") or "root")
paths = decoded.map(lambda text: "/" + text)
params = st.lists(st.tuples(decoded.filter(bool), decoded), max_size=4, unique_by=lambda pair: pair[0]).map(
    tuple
)

connection_uris = st.builds(
    ConnectionURI,
    scheme=names,
    transport=st.none() | names,
    user=st.none() | users,
    host=st.none() | hosts,
    port=st.none() | ports,
    path=st.just("") | paths,
    params=params,
)
protocols = names.filter(lambda name: name not in {"unix", "exec", "fd"})
plain_uris = st.builds(
    MigrationURI,
    host=hosts.filter(lambda host: host.lower() not in RESERVED),
    port=st.none() | ports,
)
protocol_uris = st.builds(
    MigrationURI,
    protocol=protocols,
    host=hosts,
    port=st.none() | ports,
    path=st.just("") | paths,
    params=params,
)
unix_uris = st.builds(
    MigrationURI, protocol=st.just("unix"), path=paths.filter(lambda path: path != "/"), params=params
)
migration_uris = st.one_of(plain_uris, protocol_uris, unix_uris)
any_uris: st.SearchStrategy[AnyURI] = st.one_of(connection_uris, migration_uris)
uris_with_path: st.SearchStrategy[AnyURI] = st.one_of(connection_uris, unix_uris)


def path_start(text: str) -> int:
    """Return the index of the '/' that begins the path."""
    return text.index("/", text.index("://") + 3)


# --- parse and render are inverses ----------------------------------------------------------------------------------


@often
@given(any_uris)
@example(ConnectionURI(scheme="xen"))
@example(ConnectionURI(scheme="xen", path="//double//slashes/../."))
@example(ConnectionURI(scheme="q", user="a@b/c?d#e%41", host="h", params=(("a&b=c", ";#+ %26"), ("é", ""))))
@example(MigrationURI(protocol="tcp", host="tcp", port=1))
@example(MigrationURI(protocol="unix", path="//srv/[a]?#%"))
def test_parse_reads_back_what_render_wrote(uri: AnyURI) -> None:
    text = uri.render()
    again = type(uri).parse(text)
    assert again == uri
    assert hash(again) == hash(uri)
    assert again.render() == str(again) == text
    assert text.isascii()
    assert text.isprintable()
    assert " " not in text


@often
@given(uris_with_path, st.data())
def test_every_way_of_escaping_gives_the_same_object(uri: AnyURI, data: st.DataObject) -> None:
    def respell(character: str) -> str:
        if not (character.isalnum() or character in "-._~!$'()*,:@"):
            return character
        spellings = [character, f"%{ord(character):02X}", f"%{ord(character):02x}"]
        return data.draw(st.sampled_from(spellings))

    text = uri.render()
    start = path_start(text) + 1
    first, *rest = text[start:].split("%")
    respelt = "".join(respell(character) for character in first)
    for piece in rest:
        # The two digits behind each '%' stay as they are.
        respelt += f"%{piece[:2].lower()}" + "".join(respell(character) for character in piece[2:])
    again = type(uri).parse(text[:start] + respelt)
    assert again == uri
    assert again.render() == text


@often
@given(st.one_of(connection_uris, protocol_uris))
def test_the_standard_library_reads_the_same_parts(uri: ConnectionURI | MigrationURI) -> None:
    parts = urlsplit(uri.render())
    name = uri.protocol if isinstance(uri, MigrationURI) else uri.scheme
    if isinstance(uri, ConnectionURI):
        name += "" if uri.transport is None else f"+{uri.transport}"
        assert parts.username == (None if uri.user is None else parts.username)
        assert unquote(parts.username or "") == (uri.user or "")
    assert parts.scheme == name
    # urlsplit lowers a name's case, and the zone's is significant.
    assert unquote(parts.hostname or "").lower() == (uri.host or "").lower()
    assert parts.port == uri.port
    assert unquote(parts.path) == uri.path
    assert parts.fragment == ""
    pairs = [pair.split("=", 1) for pair in parts.query.split("&") if pair]
    assert tuple((unquote(key), unquote(value)) for key, value in pairs) == uri.params


@often
@given(st.text("0123456789abcdefAB:.", max_size=12))
@example("1:2:3:4:5:6:7::")
@example("::ffff:1.2.3.4")
@example("::ffff:01.2.3.4")
def test_ipv6_is_what_ipaddress_takes_for_it(text: str) -> None:
    try:
        expected = ipaddress.IPv6Address(text)
    except ValueError:
        refusal(MigrationURI, f"[{text}]:49152")
    else:
        uri = MigrationURI.parse(f"[{text}]:49152")
        assert uri.host is not None
        assert ipaddress.IPv6Address(uri.host) == expected
        assert uri.host == uri.host.lower()
        assert uri == MigrationURI(host=text, port=49152)


@often
@given(st.text("0123456789.", min_size=1, max_size=15))
def test_a_numeric_host_is_an_ipv4_address_or_nothing(text: str) -> None:
    try:
        expected = str(ipaddress.IPv4Address(text))
    except ValueError:
        refusal(MigrationURI, f"{text}:49152")
    else:
        assert MigrationURI.parse(f"{text}:49152").host == expected == text


@often
@given(st.text("0123456789", min_size=1, max_size=6) | st.text("01a -+_\u0663", min_size=1, max_size=6))
def test_a_port_is_a_number_in_its_shortest_form(text: str) -> None:
    is_port = (
        text in {str(int(text))} and 1 <= int(text) <= 65535 if set(text) <= set(string.digits) else False
    )
    if is_port:
        assert MigrationURI.parse(f"hostb:{text}") == MigrationURI(host="hostb", port=int(text))
        assert ConnectionURI.parse(f"q://hostb:{text}").port == int(text)
    else:
        refusal(MigrationURI, f"hostb:{text}")
        refusal(ConnectionURI, f"q://hostb:{text}")


# --- exact cases ----------------------------------------------------------------------------------------------------

CONNECTIONS = [
    ("xen:///", ConnectionURI(scheme="xen"), None),
    ("xen://", ConnectionURI(scheme="xen"), "xen:///"),
    ("qemu:///system", ConnectionURI(scheme="qemu", path="/system"), None),
    ("qemu:////system", ConnectionURI(scheme="qemu", path="//system"), None),
    (
        "qemu+ssh://root@hostb.example:22/system",
        ConnectionURI(
            scheme="qemu", transport="ssh", user="root", host="hostb.example", port=22, path="/system"
        ),
        None,
    ),
    ("qemu+tls://hostb", ConnectionURI(scheme="qemu", transport="tls", host="hostb"), "qemu+tls://hostb/"),
    ("qemu+tcp://:16509/x", ConnectionURI(scheme="qemu", transport="tcp", port=16509, path="/x"), None),
    ("qemu+ssh://root@/x", ConnectionURI(scheme="qemu", transport="ssh", user="root", path="/x"), None),
    ("q+t://a%40b@h/", ConnectionURI(scheme="q", transport="t", user="a@b", host="h"), None),
    ("q://HostB/", ConnectionURI(scheme="q", host="HostB"), None),
    ("q://my_host/", ConnectionURI(scheme="q", host="my_host"), None),
    ("q://10.0.0.1/", ConnectionURI(scheme="q", host="10.0.0.1"), None),
    (f"q://{'a' * 63}/", ConnectionURI(scheme="q", host="a" * 63), None),
    (f"q://{'a.' * 126}a/", ConnectionURI(scheme="q", host="a." * 126 + "a"), None),
    ("q://0xyz/", ConnectionURI(scheme="q", host="0xyz"), None),
    ("q://10.example/", ConnectionURI(scheme="q", host="10.example"), None),
    ("q://[fe80::1%25eth0]:1/", ConnectionURI(scheme="q", host="fe80::1%eth0", port=1), None),
    ("q://[fe80::1%25eth%30]/", ConnectionURI(scheme="q", host="fe80::1%eth0"), "q://[fe80::1%25eth0]/"),
    ("q://[2001:DB8:0:0::01]/", ConnectionURI(scheme="q", host="2001:db8::1"), "q://[2001:db8::1]/"),
    ("q://[::ffff:a00:1]/", ConnectionURI(scheme="q", host="::ffff:10.0.0.1"), "q://[::ffff:10.0.0.1]/"),
    ("q:///a%2Fb%20c%c3%a9", ConnectionURI(scheme="q", path="/a/b c\u00e9"), "q:///a/b%20c%C3%A9"),
    ("q://h?a=1", ConnectionURI(scheme="q", host="h", params=(("a", "1"),)), "q://h/?a=1"),
    ("q:///?b=&a=b=c", ConnectionURI(scheme="q", params=(("b", ""), ("a", "b=c"))), None),
    ("q:///?a=1+2%202%26%3B", ConnectionURI(scheme="q", params=(("a", "1+2 2&;"),)), None),
    (
        "qemu:///embed?root=/srv/a&name=qemu+tcp://h/x",
        ConnectionURI(scheme="qemu", path="/embed", params=(("root", "/srv/a"), ("name", "qemu+tcp://h/x"))),
        None,
    ),
    ("my-lab.2+t-1.x:///", ConnectionURI(scheme="my-lab.2", transport="t-1.x"), None),
]

MIGRATIONS = [
    ("hostb", MigrationURI(host="hostb"), None),
    ("hostb:49152", MigrationURI(host="hostb", port=49152), None),
    ("hostb:65535", MigrationURI(host="hostb", port=65535), None),
    ("hostb:1", MigrationURI(host="hostb", port=1), None),
    ("10.0.0.1:49152", MigrationURI(host="10.0.0.1", port=49152), None),
    ("[::1]", MigrationURI(host="::1"), None),
    ("[FE80::1]:49152", MigrationURI(host="fe80::1", port=49152), "[fe80::1]:49152"),
    ("[fe80::1%25eth0]:49152", MigrationURI(host="fe80::1%eth0", port=49152), None),
    ("tcp://hostb", MigrationURI(protocol="tcp", host="hostb"), None),
    ("tcp://hostb/", MigrationURI(protocol="tcp", host="hostb"), "tcp://hostb"),
    ("tcp://hostb:49152", MigrationURI(protocol="tcp", host="hostb", port=49152), None),
    ("tcp://tcp", MigrationURI(protocol="tcp", host="tcp"), None),
    ("tcp:hostb:49152", MigrationURI(protocol="tcp", host="hostb", port=49152), "tcp://hostb:49152"),
    ("tcp:[::1]:49152", MigrationURI(protocol="tcp", host="::1", port=49152), "tcp://[::1]:49152"),
    ("tcp:127.0.0.1:4444", MigrationURI(protocol="tcp", host="127.0.0.1", port=4444), "tcp://127.0.0.1:4444"),
    ("unix:/run/m.sock", MigrationURI(protocol="unix", path="/run/m.sock"), "unix:///run/m.sock"),
    ("unix:///run/m.sock", MigrationURI(protocol="unix", path="/run/m.sock"), None),
    (
        "unix:/run/a%20b?x=y",
        MigrationURI(protocol="unix", path="/run/a b", params=(("x", "y"),)),
        "unix:///run/a%20b?x=y",
    ),
    ("xenmigr://hostb", MigrationURI(protocol="xenmigr", host="hostb"), None),
    (
        "xenmigr://hostb:8002/guest",
        MigrationURI(protocol="xenmigr", host="hostb", port=8002, path="/guest"),
        None,
    ),
    ("rdma://hostb:49152", MigrationURI(protocol="rdma", host="hostb", port=49152), None),
    (
        "xenmigr://hostb?tls=yes",
        MigrationURI(protocol="xenmigr", host="hostb", params=(("tls", "yes"),)),
        None,
    ),
]


@pytest.mark.parametrize(("text", "uri", "canonical"), [*CONNECTIONS, *MIGRATIONS])
def test_accepted(text: str, uri: AnyURI, canonical: str | None) -> None:
    parsed = type(uri).parse(text)
    assert parsed == uri
    assert parsed.render() == uri.render() == str(uri) == (text if canonical is None else canonical)


# A text, the position of the first character at fault, and a part of the remedy.
CONNECTION_REFUSALS = [
    ("", 0, "qemu:///system"),
    ("xen", 3, "write 'xen:///system'"),
    ("xen:", 4, "write 'xen:///system'"),
    ("xen:/", 4, "write 'xen:///system'"),
    ("qemu:system", 5, "write 'qemu:///system'"),
    ("qemu:/system", 5, "write 'qemu:///system'"),
    ("://hostb", 0, "begin with the driver's name"),
    ("//hostb/system", 0, "begin with the driver's name"),
    ("/system", 0, "begin with the driver's name"),
    ("+ssh://hostb", 0, "begin with the driver's name"),
    ("QEMU:///system", 0, "lower-case"),
    ("qeMu:///system", 2, "lower-case"),
    ("1qemu:///system", 0, "beginning with a letter"),
    (".qemu:///system", 0, "beginning with a letter"),
    ("qe_mu:///system", 2, "lower-case letters"),
    ("qemu\u00e9:///system", 4, "lower-case letters"),
    ("qem%75:///system", 3, "lower-case letters"),
    (" qemu:///system", 0, "remove it"),
    ("\tqemu:///system", 0, "remove it"),
    ("qemu+://hostb", 4, "leave out the '+'"),
    ("qemu+SSH://hostb", 5, "lower-case"),
    ("qemu+2://hostb", 5, "beginning with a letter"),
    ("qemu+ssh+nc://hostb", 8, "SCHEME+TRANSPORT://"),
    ("qemu+ssh://user:pw@hostb/system", 15, "an SSH key or agent, a TLS client certificate"),
    ("qemu+ssh://user:@hostb/system", 15, "an SSH key or agent"),
    ("qemu+ssh://user%3apw@hostb/system", 15, "an SSH key or agent"),
    ("qemu+ssh://:pw@hostb/system", 11, "an SSH key or agent"),
    ("qemu+ssh://@hostb/system", 11, "leave out the '@'"),
    ("qemu+ssh://a@b@hostb/system", 12, "write it as %40"),
    ("qemu+ssh://-oProxyCommand=x@hostb/", 11, "name another user"),
    ("qemu+ssh://%2DoProxyCommand=x@hostb/", 11, "name another user"),
    ("qemu+ssh://us er@hostb/", 13, "%20"),
    ("qemu+ssh://us%0Aer@hostb/", 13, "remove it"),
    ("qemu+ssh://-oProxyCommand/", 11, "begin it with a letter or a digit"),
    ("q://host b/", 8, "remove it"),
    ("q://host\x00b/", 8, "remove it"),
    ("q://host!/", 8, "use letters, digits"),
    ("q://h%6Fst/", 5, "use letters, digits"),
    ("q://h\u00f6st/", 5, "xn--"),
    ("q://host./", 8, "remove the '.'"),
    ("q://.host/", 4, "remove the '.'"),
    ("q://a..b/", 6, "remove the '.'"),
    ("q://a.-b/", 6, "begin it with a letter or a digit"),
    ("q://a-.b/", 5, "end it in a letter or a digit"),
    (f"q://{'a' * 64}/", 67, "write a shorter name"),
    (f"q://{'a.' * 126}ab/", 257, "write a shorter name"),
    ("q://300.1.1.1/", 4, "four decimal numbers"),
    ("q://010.1.1.1/", 4, "four decimal numbers"),
    ("q://127.1/", 4, "four decimal numbers"),
    ("q://1.2.3.4.5/", 4, "four decimal numbers"),
    ("q://2130706433/", 4, "four decimal numbers"),
    ("q://0x7f000001/", 4, "four decimal numbers"),
    ("q://a.0X1f/", 4, "four decimal numbers"),
    ("q://fe80::1/", 4, "write [fe80::1]"),
    ("q://u@fe80::1/", 6, "write [fe80::1]"),
    ("q://[::1/", 4, "write ']'"),
    ("q://[]/", 4, "write one"),
    ("q://[hostb]/", 4, "write 'hostb' without them"),
    ("q://[10.0.0.1]/", 4, "write '10.0.0.1' without them"),
    ("q://[a b]/", 6, "remove it"),
    ("q://[::g]/", 7, "hexadecimal digits"),
    ("q://[1:2]/", 5, "eight groups"),
    ("q://[::1::]/", 5, "eight groups"),
    ("q://[::12345]/", 5, "eight groups"),
    ("q://[fe80::1%eth0]/", 12, "write %25 and the zone"),
    ("q://[fe80::1%25]/", 12, "write %25 and the zone"),
    ("q://[fe80::1%25a%20b]/", 16, "remove it"),
    ("q://[fe80::1%25a%2Fb]/", 16, "letters, digits"),
    ("q://[fe80::1%25a/b]/", 4, "write ']'"),
    ("q://[::1]x/", 9, "write ':' and a port"),
    ("q://[::1]x:80/", 9, "write ':' and a port"),
    ("q://[::1]:/", 9, "leave out the ':'"),
    ("q://host:/", 8, "leave out the ':'"),
    ("q://:/", 4, "leave out the ':'"),
    ("q://host:80abc/", 11, "from 1 to 65535"),
    ("q://host:0/", 9, "from 1 to 65535"),
    ("q://host:00/", 9, "from 1 to 65535"),
    ("q://host:65536/", 9, "from 1 to 65535"),
    ("q://host:022/", 9, "write '22'"),
    ("q://host:%32/", 9, "from 1 to 65535"),
    ("q://host:80:90/", 11, "from 1 to 65535"),
    ("q:///a b", 6, "write it as %20"),
    ("q:///a\u3000b", 6, "write it as %E3%80%80"),
    ("q:///syst\u00e8me", 9, "write it as %C3%A8"),
    ("q:///a[0]", 6, "write it as %5B"),
    ("q:///a\\b", 6, "write it as %5C"),
    ('q:///a"b', 6, "write it as %22"),
    ("q:///a\ud800", 6, "remove it"),
    ("q:///a\x85", 6, "remove it"),
    ("q:///system\n", 11, "remove it"),
    ("q:///a%00b", 6, "remove it"),
    ("q:///a%7F", 6, "remove it"),
    ("q:///a%C2%85", 6, "remove it"),
    ("q:///a%", 6, "write %25"),
    ("q:///a%4", 6, "write %25"),
    ("q:///a%4g", 6, "write %25"),
    ("q:///a%4?x=y", 6, "write %25"),
    ("q:///a%FF", 6, "UTF-8"),
    ("q:///a%41%C3%28", 9, "UTF-8"),
    ("q:///a%C3", 6, "UTF-8"),
    ("q:///a%ED%A0%80", 6, "UTF-8"),
    ("q:///%00%FF", 5, "remove it"),
    ("q:///%FF b", 5, "UTF-8"),
    ("q:///a?", 6, "leave out the '?'"),
    ("q:///a?b", 8, "write KEY=VALUE"),
    ("q:///a?b&c=d", 8, "write KEY=VALUE"),
    ("q:///a?=b", 7, "write KEY=VALUE"),
    ("q:///a?&b=c", 7, "leave out the '&'"),
    ("q:///a?b=c&", 10, "leave out the '&'"),
    ("q:///a?b=c&&d=e", 11, "leave out the '&'"),
    ("q:///a?b=c;d=e", 10, "write it as %3B"),
    ("q:///a?b=1&c=2&%62=3", 15, "give it once"),
    ("q:///a?b c=1", 8, "write it as %20"),
    ("q:///a?b=1 2", 10, "write it as %20"),
    ("q:///a?b=%0d", 9, "remove it"),
    ("q:///a?b=%zz", 9, "write %25"),
    ("q:///a#b", 6, "write '#' as %23"),
    ("q:///a?b=c#d", 10, "write '#' as %23"),
    ("q://host#d", 8, "write '#' as %23"),
    ("q:///" + "a" * MAX_URI_LENGTH, MAX_URI_LENGTH, "write a shorter one"),
]

MIGRATION_REFUSALS = [
    ("", 0, "use letters, digits"),
    ("host:", 4, "leave out the ':'"),
    ("host:80abc", 7, "from 1 to 65535"),
    ("host:abc", 5, "or 'host://' if that is a protocol"),
    ("xenmigr:hostb:8002", 8, "or 'xenmigr://' if that is a protocol"),
    ("host:0", 5, "from 1 to 65535"),
    ("host:65536", 5, "from 1 to 65535"),
    ("host:99999", 5, "from 1 to 65535"),
    ("host:" + "9" * 4000, 5, "from 1 to 65535"),
    ("host:080", 5, "write '80'"),
    ("host:-1", 5, "from 1 to 65535"),
    ("host:+1", 5, "from 1 to 65535"),
    ("host:1_0", 6, "from 1 to 65535"),
    ("host:\u0663", 5, "from 1 to 65535"),
    ("host: 80", 5, "remove it"),
    ("host:80 ", 7, "remove it"),
    ("host:80\n", 7, "remove it"),
    ("host:80:90", 7, "from 1 to 65535"),
    (" host", 0, "remove it"),
    ("ho st", 2, "remove it"),
    ("ho\tst", 2, "remove it"),
    ("ho\x1bst:1", 2, "remove it"),
    ("h\u00f6st", 1, "xn--"),
    ("ho\ud800st", 2, "remove it"),
    ("-host", 0, "begin it with a letter or a digit"),
    ("user@host", 4, "write the host alone"),
    ("user:pw@host:1", 7, "write the host alone"),
    ("tcp://user@host", 10, "write the host alone"),
    ("fe80::1", 0, "write [fe80::1]"),
    ("::1", 0, "write [::1]"),
    ("::", 0, "write [::]"),
    ("::1:4915", 0, "write [::1:4915] or [::1]:4915"),
    ("::1:49152", 0, "write [::1]:49152"),
    ("2001:db8:0:0:0:0:0:1", 0, "write [2001:db8:0:0:0:0:0:1]"),
    ("1:2:3:4:5:6:7:8:49152", 0, "write [1:2:3:4:5:6:7:8]:49152"),
    ("fe80::1%eth0", 0, "write [ADDRESS%25ZONE] or [ADDRESS%25ZONE]:PORT"),
    ("1::2::3", 0, "write [ADDRESS] or [ADDRESS]:PORT"),
    ("fe80:::1", 0, "write [fe80::]:1"),
    ("tcp://fe80::1", 6, "write [fe80::1]"),
    ("tcp:::1:4444", 4, "write [::1:4444] or [::1]:4444"),
    ("[::1", 0, "write ']'"),
    ("[::1]80", 5, "write ':' and a port"),
    ("[::1]:", 5, "leave out the ':'"),
    ("[::1]:80abc", 8, "from 1 to 65535"),
    ("[::1]/x", 5, "tcp://HOST:PORT"),
    ("[fe80::1%eth0]:1", 8, "write %25 and the zone"),
    ("host:1/path", 6, "tcp://HOST:PORT"),
    ("host?a=b", 4, "tcp://HOST:PORT"),
    ("host#a", 4, "tcp://HOST:PORT"),
    ("/run/m.sock", 0, "use letters, digits"),
    (":49152", 0, "use letters, digits"),
    ("tcp", 0, "write 'tcp://tcp'"),
    ("Unix", 0, "write 'tcp://Unix'"),
    ("tcp:", 4, "use letters, digits"),
    ("tcp::4444", 4, "use letters, digits"),
    ("tcp:0:4444", 4, "four decimal numbers"),
    ("tcp:4444", 4, "write tcp://HOST:4444"),
    ("tcp:hostb", 9, "write tcp://HOST or tcp://HOST:PORT"),
    ("tcp:hostb:", 9, "leave out the ':'"),
    ("tcp:hostb:80abc", 12, "from 1 to 65535"),
    ("tcp:hostb:1/x", 11, "write tcp://HOST:PORT"),
    ("tcp:hostb?a=b", 9, "write tcp://HOST:PORT"),
    ("TCP:hostb:1", 0, "lower case"),
    ("TCP://hostb:1", 0, "lower-case"),
    ("tcp://", 6, "use letters, digits"),
    ("tcp://:1", 6, "use letters, digits"),
    ("tcp:///x", 6, "use letters, digits"),
    ("tcp:/hostb:1", 4, "use letters, digits"),
    ("tcp://hostb:1/a b", 15, "%20"),
    ("tcp://hostb?a=1&a=2", 16, "give it once"),
    ("tcp://hostb#a", 11, "%23"),
    ("://hostb", 0, "as in tcp://HOST:PORT"),
    ("x_y://hostb", 1, "lower-case letters"),
    ("+://hostb", 0, "as in tcp://HOST:PORT"),
    ("Q+ssh://hostb/system", 0, "lower-case"),
    ("qemu+ssh://hostb/system", 4, "as in tcp://HOST:PORT"),
    ("unix", 0, "write 'tcp://unix'"),
    ("unix:", 5, "write 'unix:///PATH'"),
    ("unix:/", 5, "write 'unix:///PATH'"),
    ("unix:run/m.sock", 5, "write 'unix:///PATH'"),
    ("unix://", 7, "write 'unix:///PATH'"),
    ("unix:///", 7, "write 'unix:///PATH'"),
    ("unix:///?a=b", 7, "write 'unix:///PATH'"),
    ("unix://run/m.sock", 7, "write 'unix:///PATH'"),
    ("unix:/a%00b", 7, "remove it"),
    ("rdma:hostb:49152", 5, "write 'rdma://HOST:PORT'"),
    ("rdma:49152", 5, "write 'rdma://HOST:PORT'"),
    ("fd:12", 0, "write tcp://HOST:PORT or unix:///PATH"),
    ("fd://12", 0, "write tcp://HOST:PORT or unix:///PATH"),
    ("exec:cat > /tmp/x", 0, "write tcp://HOST:PORT or unix:///PATH"),
    ("exec://cat", 0, "write tcp://HOST:PORT or unix:///PATH"),
    ("h" * (MAX_URI_LENGTH + 1), MAX_URI_LENGTH, "write a shorter one"),
]


def short(value: object) -> str | None:
    return ascii(value)[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("text", "position", "remedy"), CONNECTION_REFUSALS, ids=short)
def test_connection_uri_refused(text: str, position: int, remedy: str) -> None:
    error = refusal(ConnectionURI, text)
    assert error.position == position
    assert remedy in str(error)


@pytest.mark.parametrize(("text", "position", "remedy"), MIGRATION_REFUSALS, ids=short)
def test_migration_uri_refused(text: str, position: int, remedy: str) -> None:
    error = refusal(MigrationURI, text)
    assert error.position == position
    assert remedy in str(error)


def test_the_sentence_names_character_and_position() -> None:
    error = refusal(MigrationURI, "hostb:80abc")
    assert str(error) == ("at position 8, 'a' cannot stand in a port: write a decimal number from 1 to 65535")
    assert error.text == "hostb:80abc"
    assert error.code == "uri-invalid"
    assert "a space cannot stand in a path" in str(refusal(ConnectionURI, "q:///a b"))
    assert "white space U+3000 cannot stand" in str(refusal(ConnectionURI, "q:///a\u3000b"))
    assert "'TCP' is not how" in str(refusal(MigrationURI, "TCP:hostb:1"))


@often
@given(uris_with_path, st.sampled_from(' <>"\\^`{|}[]\x00\n\x7f\u00e9\u2028\ud800'), st.data())
def test_a_character_that_fits_nowhere_is_the_one_reported(
    uri: AnyURI, character: str, data: st.DataObject
) -> None:
    text = uri.render()
    gaps = [
        gap
        for gap in range(path_start(text) + 1, len(text) + 1)
        # Within an escape, and between two that may make one character, the escape is at fault first.
        if "%" not in text[gap - 2 : gap] and not (text[gap - 3] == "%" and text[gap : gap + 1] == "%")
    ]
    at = data.draw(st.sampled_from(gaps))
    assert refusal(type(uri), text[:at] + character + text[at:]).position == at


# --- limits ---------------------------------------------------------------------------------------------------------


def test_the_longest_uris() -> None:
    assert MAX_URI_LENGTH == 4096
    text = "q:///" + "a" * (MAX_URI_LENGTH - 5)
    assert ConnectionURI.parse(text).render() == text
    text = "unix:///" + "a" * (MAX_URI_LENGTH - 8)
    assert MigrationURI.parse(text).render() == text


@pytest.mark.parametrize(
    ("kind", "head", "filler"),
    [
        # Each of these grows when it is written canonically.
        (ConnectionURI, "q://h?a=", "b"),
        (MigrationURI, "unix:/", "b"),
        (ConnectionURI, "q://[::ffff:a00:1]/", "b"),
    ],
)
def test_a_text_whose_canonical_form_is_too_long(kind: type[AnyURI], head: str, filler: str) -> None:
    text = head + filler * (MAX_URI_LENGTH - len(head))
    error = refusal(kind, text)
    assert error.position == len(text)
    assert "canonical form" in str(error)


def test_an_object_whose_text_is_too_long() -> None:
    assert len(ConnectionURI(scheme="q", path="/" + "a" * (MAX_URI_LENGTH - 5)).render()) == MAX_URI_LENGTH
    with pytest.raises(URIError, match="canonical form") as caught:
        ConnectionURI(scheme="q", path="/" + "\u00e9" * MAX_URI_LENGTH)
    assert caught.value.position is None
    assert len(caught.value.text) == MAX_URI_LENGTH + 1
    with pytest.raises(URIError) as caught:
        ConnectionURI(scheme="q", host="!" * 2 * MAX_URI_LENGTH)
    assert len(caught.value.text) == MAX_URI_LENGTH + 1


# --- nothing but URIError ever leaves parse -------------------------------------------------------------------------


@BOTH
@often
@given(st.text(max_size=200))
def test_any_text(kind: type[AnyURI], text: str) -> None:
    check_any(kind, text)


@BOTH
@often
@given(st.text(st.characters(), max_size=60))
def test_any_text_with_surrogates(kind: type[AnyURI], text: str) -> None:
    check_any(kind, text)


@BOTH
@often
@given(st.text("qtcpunixfd+:/?#@[]%&=;.-_0125af \n\x00\u00e9", max_size=40))
def test_text_of_delimiters(kind: type[AnyURI], text: str) -> None:
    check_any(kind, text)


@BOTH
@often
@given(
    st.lists(
        st.sampled_from(["[", "]", "[[", "::", "%", "%25", "%5B", "%ff", "%C3", "/", "@", ":1", "a"]),
        max_size=300,
    ),
    st.sampled_from(["", "q://", "tcp:", "tcp://", "unix:/"]),
)
def test_deep_brackets_and_percent_sequences(kind: type[AnyURI], pieces: list[str], head: str) -> None:
    check_any(kind, head + "".join(pieces))


@BOTH
@often
@given(
    st.sampled_from(["", "q://", "q://h/", "q:///?a=", "tcp:", "tcp://", "unix:/", "[", "h:", "user:"]),
    st.sampled_from(
        ["a", "[", "%", "%41", "%ff", ":", "/", "@", "&a=", "?", "9", "0", ".", "\u00e9", "\ud800", " "]
    ),
    st.integers(1000, 100_000),
)
def test_huge_text(kind: type[AnyURI], head: str, filler: str, repeats: int) -> None:
    check_any(kind, head + filler * repeats)


@BOTH
@often
@given(any_uris, st.data())
def test_mutated_valid_text(kind: type[AnyURI], uri: AnyURI, data: st.DataObject) -> None:
    text = uri.render()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 3, len(text))))
        text = text[:start] + data.draw(st.text(":/?#@[]%&=+.-0a\n\u00e9", max_size=3)) + text[end:]
    check_any(kind, text)


class Looping(str):
    """A str whose subclass is no reason to behave otherwise."""

    __slots__ = ()


class Scheme(str, Enum):  # noqa: UP042 - a StrEnum would format as its value
    QEMU = "qemu"


class Port(int, Enum):
    SSH = 22


@BOTH
@pytest.mark.parametrize(
    "value",
    [None, b"tcp://h", bytearray(b"h"), 5, 1.5, True, [], ("h",), object(), str, ConnectionURI(scheme="q")],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_text(kind: type[AnyURI], value: Any) -> None:
    with pytest.raises(URIError) as caught:
        kind.parse(value)
    check_sentence(str(caught.value))
    assert caught.value.position is None
    assert caught.value.text == type(value).__name__
    assert type(value).__name__ in str(caught.value)


def test_subclasses_of_str_and_int_become_plain() -> None:
    uri = ConnectionURI(
        scheme=Scheme.QEMU, host=Looping("hostb"), port=Port.SSH, params=((Looping("a"), Looping("b")),)
    )
    assert uri.render() == "qemu://hostb:22/?a=b"
    assert [type(value) for value in (uri.scheme, uri.host, uri.port, *uri.params[0])] == [
        str,
        str,
        int,
        str,
        str,
    ]
    assert ConnectionURI.parse(Looping("q://hostb/")) == ConnectionURI(scheme="q", host="hostb")


# --- passwords ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        (ConnectionURI, "qemu+ssh://user:secret@hostb/x", "qemu+ssh://user:******@hostb/x"),
        (ConnectionURI, "qemu+ssh://user%3Asecret@hostb/x", "qemu+ssh://user%3A******@hostb/x"),
        (ConnectionURI, "qemu+ssh://user:sec/et@hostb/x", "qemu+ssh://user:******@hostb/x"),
        (ConnectionURI, "qemu+ssh://user:sec@et@hostb/x", "qemu+ssh://user:******@hostb/x"),
        (ConnectionURI, "QEMU://user:secret@hostb/x", "QEMU://user:******@hostb/x"),
        (ConnectionURI, "//user:secret@hostb/x", "//user:******@hostb/x"),
        (ConnectionURI, "qemu:/user:secret@hostb/x", "qemu:/user:******@hostb/x"),
        (ConnectionURI, "user:secret@hostb", "user:******@hostb"),
        (MigrationURI, "user:secret@hostb:1", "user:******@hostb:1"),
        (MigrationURI, ":secret@hostb", ":******@hostb"),
        (MigrationURI, "tcp://user:secret@hostb", "tcp://user:******@hostb"),
        # No password, so nothing is hidden.
        (ConnectionURI, "q://u@h:80/a:b@c d", "q://u@h:80/a:b@c d"),
        (ConnectionURI, "q://h:80/a@b c", "q://h:80/a@b c"),
        (ConnectionURI, "q:///a:b@c d", "q:///a:b@c d"),
        (ConnectionURI, "q://[::1]:80/a@b c", "q://[::1]:80/a@b c"),
        (ConnectionURI, "q://[::1]:/a", "q://[::1]:/a"),
    ],
)
def test_errors_hide_passwords(kind: type[AnyURI], text: str, shown: str) -> None:
    error = refusal(kind, text)
    assert error.text == shown
    assert "secret" not in repr(error)


@often
@given(
    st.text(string.ascii_letters + string.digits + "!$%&*+,;=?#/@. ", min_size=3, max_size=20),
    st.sampled_from(["q+ssh", "Q", "q_"]),
)
def test_no_password_is_ever_shown(password: str, scheme: str) -> None:
    # A number with a '/' behind it is a port.
    assume(not password[0].isdigit())
    password = f"P{password}"
    error = refusal(ConnectionURI, f"{scheme}://user:{password}@hostb/system")
    assert password not in error.text
    assert password not in str(error)
    assert "@hostb/system" in error.text


def test_a_password_is_refused_in_the_object_too() -> None:
    with pytest.raises(URIError, match="carries no password") as caught:
        ConnectionURI(scheme="q", user="us/er:secret", host="h")
    assert caught.value.text == "us/er:******"


# --- objects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"scheme": ""},
        {"scheme": "Q"},
        {"scheme": "q+ssh"},
        {"scheme": "q_"},
        {"scheme": "-q"},
        {"scheme": None},
        {"scheme": b"q"},
        {"transport": ""},
        {"transport": "s h"},
        {"transport": 5},
        {"user": ""},
        {"user": "-o"},
        {"user": "a:b"},
        {"user": "a\nb"},
        {"user": "a\ud800"},
        {"user": 5},
        {"host": ""},
        {"host": "[::1]"},
        {"host": "a b"},
        {"host": "a/b"},
        {"host": "a@b"},
        {"host": "h:80"},
        {"host": "fe80::1%"},
        {"host": "fe80::1%a b"},
        {"host": "fe80::1%25%"},
        {"host": "h\u00f6"},
        {"host": "127.1"},
        {"host": 127},
        {"port": 0},
        {"port": 65536},
        {"port": -1},
        {"port": 10**5000},
        {"port": "22"},
        {"port": True},
        {"port": 22.0},
        {"path": "system"},
        {"path": "/a\x00"},
        {"path": "/a\udcff"},
        {"path": None},
        {"params": {"a": "b"}},
        {"params": [("a", "b")]},
        {"params": ("ab",)},
        {"params": (("a",),)},
        {"params": (("a", "b", "c"),)},
        {"params": (("", "b"),)},
        {"params": (("a", "b"), ("a", "c"))},
        {"params": (("a", None),)},
        {"params": ((1, "b"),)},
        {"params": (("a", "\n"),)},
    ],
)
def test_an_invalid_connection_uri_cannot_be_constructed(fields: dict[str, Any]) -> None:
    with pytest.raises(URIError) as caught:
        ConnectionURI(**{"scheme": "q", **fields})
    assert caught.value.position is None
    assert str(caught.value).startswith(f"in {next(iter(fields))}, ")
    check_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({}, "host"),
        ({"port": 1}, "host"),
        ({"protocol": "tcp"}, "host"),
        ({"protocol": "tcp", "path": "/x"}, "host"),
        ({"protocol": "TCP", "host": "h"}, "protocol"),
        ({"protocol": "q+tcp", "host": "h"}, "protocol"),
        ({"protocol": None, "host": "h"}, "protocol"),
        ({"protocol": "fd", "host": "h"}, "protocol"),
        ({"protocol": "exec", "host": "h"}, "protocol"),
        ({"protocol": "unix"}, "path"),
        ({"protocol": "unix", "path": "/"}, "path"),
        ({"protocol": "unix", "path": "run"}, "path"),
        ({"protocol": "unix", "path": "/x", "host": "h"}, "protocol"),
        ({"protocol": "unix", "path": "/x", "port": 1}, "protocol"),
        ({"host": "h", "path": "/x"}, "path"),
        ({"host": "h", "params": (("a", "b"),)}, "params"),
        ({"host": "h", "port": 0}, "port"),
        ({"host": "tcp"}, "host"),
        ({"host": "RDMA", "port": 1}, "host"),
        ({"host": "::1:1:"}, "host"),
    ],
    ids=short,
)
def test_an_invalid_migration_uri_cannot_be_constructed(fields: dict[str, Any], blamed: str) -> None:
    with pytest.raises(URIError) as caught:
        MigrationURI(**fields)
    assert caught.value.position is None
    assert str(caught.value).startswith(f"in {blamed}, ")
    check_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"host": "[::1]"}, "write the address without"),
        ({"host": ""}, "the host is empty"),
        ({"path": "system"}, "cannot begin with 's'"),
        ({"params": (("", "b"),)}, "has an empty name"),
        ({"params": (("a", "b"), ("a", "c"))}, "'a' is given twice"),
    ],
)
def test_the_sentence_about_a_field(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(URIError) as caught:
        ConnectionURI(**{"scheme": "q", **fields})
    assert sentence in str(caught.value)


def test_fields_are_normalised_on_construction() -> None:
    assert ConnectionURI(scheme="q", path="").path == "/"
    assert MigrationURI(protocol="tcp", host="h", path="/").path == ""
    assert MigrationURI(host="FE80:0::1%Eth0").host == "fe80::1%Eth0"
    assert MigrationURI(host="::FFFF:a00:1").host == "::ffff:10.0.0.1"
    assert MigrationURI(host="HostB").host == "HostB"


def test_objects_are_frozen_and_comparable() -> None:
    uri = ConnectionURI.parse("qemu+tls://hostb/system?a=1&b=2")
    with pytest.raises(FrozenInstanceError):
        uri.host = "hostc"  # type: ignore[misc]
    assert uri != ConnectionURI.parse("qemu+tls://hostb/system?b=2&a=1")
    assert {uri: 1}[ConnectionURI.parse(str(uri))] == 1
    assert replace(uri, transport=None, host=None).render() == "qemu:///system?a=1&b=2"


def test_param() -> None:
    uri = ConnectionURI.parse("qemu:///embed?root=/srv&flag=")
    assert uri.param("root") == "/srv"
    assert uri.param("flag", "x") == ""
    assert uri.param("none") is None
    assert uri.param("none", "x") == "x"
    assert uri.param("none", None) is None


def test_with_host_and_with_port() -> None:
    uri = MigrationURI.parse("tcp://hostb")
    assert uri.with_port(49152).render() == "tcp://hostb:49152"
    assert uri.with_host("fe80::1%eth0").with_port(1).render() == "tcp://[fe80::1%25eth0]:1"
    assert uri.with_port(1).with_port(None) == uri
    assert uri.render() == "tcp://hostb"
    assert MigrationURI.parse("hostb:1").with_host("hostc").render() == "hostc:1"


@pytest.mark.parametrize(
    "change",
    [
        lambda: MigrationURI.parse("hostb").with_port(0),
        lambda: MigrationURI.parse("hostb").with_port(65536),
        lambda: MigrationURI.parse("hostb").with_host("[::1]"),
        lambda: MigrationURI.parse("hostb").with_host("host c"),
        lambda: MigrationURI.parse("hostb").with_host("tcp"),
        lambda: MigrationURI.parse("unix:/x").with_host("hostb"),
        lambda: MigrationURI.parse("unix:/x").with_port(1),
    ],
)
def test_with_host_and_with_port_keep_the_rules(change: Callable[[], MigrationURI]) -> None:
    with pytest.raises(URIError) as caught:
        change()
    assert caught.value.position is None
    check_sentence(str(caught.value))
