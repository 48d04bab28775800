"""From a scheme to a driver: is what is missing, broken or not as agreed told, with the distribution at fault?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from ferryman import errors
from ferryman.capabilities import Capabilities
from ferryman.hookspecs import HostRequest, hookimpl
from ferryman.registry import Hooks, open_driver
from ferryman.uri import ConnectionURI

DIST = "acme-hypervisors"
SOURCE = """\
from ferryman.testing.simulator import SimulatedDriver as Driver
class Observer: pass
"""
DRIVER = ("ferryman.drivers", "acme", "acme:///system", "Driver")
TRANSPORT = ("ferryman.transports", "pigeon", "acme+pigeon://loft/", "Driver")
OBSERVER = ("ferryman.observers", "policy", "test:///lab/alpha", "Observer")

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install distributions for the length of a test: metadata and one module each, in a directory of their own."""
    # stevedore remembers what is installed: in files, which are not to be ours, and in each process.
    monkeypatch.setattr("stevedore._cache._c._disable_caching", True)
    monkeypatch.setattr("stevedore.ExtensionManager.ENTRY_POINT_CACHE", {})
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def installed(distribution: str, group: str, name: str, target: str, source: str = SOURCE) -> None:
        metadata = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        module = target.partition(":")[0]
        (site / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return installed


def hooks_of(text: str) -> Hooks:
    return open_driver(ConnectionURI.parse(text))


def assert_names(error: Exception, *words: str) -> None:
    for word in words:
        assert word in str(error)


def assert_at_fault(
    error: errors.DriverContractError | errors.DriverLoadError, hook: str | None = None
) -> None:
    assert error.distribution == DIST
    assert_names(error, DIST)
    if isinstance(error, errors.DriverContractError) and hook is not None:
        assert error.hook == hook
        assert_names(error, hook)


# Which driver


@pytest.mark.parametrize(
    ("uri", "name", "advice"),
    [
        ("nosuch:///system", "nosuch", "ferryman-nosuch"),
        ("test+ssh://beta/system", "ssh", "ferryman-remote"),
        # The scheme's own driver is not asked where the URI names a transport.
        ("nosuch+carrier://beta/system", "carrier", "ferryman-remote"),
    ],
)
def test_nothing_serves_the_uri(install: Install, uri: str, name: str, advice: str) -> None:
    install(DIST, "ferryman.drivers", "acme", "acme_driver:Driver")
    install("acme-pigeons", "ferryman.transports", "pigeon", "acme_pigeon:Driver")
    with pytest.raises(errors.UnknownSchemeError) as raised:
        hooks_of(uri)
    assert raised.value.scheme == name
    expected = {"acme", "test"} if name == "nosuch" else {"pigeon"}
    assert expected <= set(raised.value.installed)
    assert_names(raised.value, repr(name), uri, advice, *raised.value.installed)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module_at_all", ModuleNotFoundError),
        ("def", SyntaxError),
        ("raise RuntimeError('planted')", RuntimeError),
        ("assert False, 'planted'", AssertionError),
        ("Other = 1", AttributeError),
        ("Driver = None", TypeError),
        ("class Driver:\n    def __init__(self, uri): ...", TypeError),
        ("class Driver:\n    def __init__(self): raise ValueError('planted')", ValueError),
    ],
)
@pytest.mark.parametrize("group", ["ferryman.drivers", "ferryman.observers"])
def test_what_cannot_be_loaded(install: Install, group: str, source: str, cause: type[Exception]) -> None:
    """A policy that cannot be loaded is no policy, so that a broken observer stops the connection as well."""
    install(DIST, group, "acme", "acme_broken:Driver", source)
    with pytest.raises(errors.DriverLoadError) as raised:
        hooks_of("acme:///system" if group == "ferryman.drivers" else "test:///lab/alpha")
    assert_at_fault(raised.value)
    assert_names(raised.value, "'acme'", cause.__name__)
    assert isinstance(raised.value.__cause__, cause)


def test_a_driver_that_refuses_in_words_of_ferryman(install: Install) -> None:
    source = "from ferryman import errors\ndef Driver(): raise errors.ConnectError('no licence')"
    install(DIST, "ferryman.drivers", "acme", "acme_refusing:Driver", source)
    with pytest.raises(errors.ConnectError, match="^no licence$"):
        hooks_of("acme:///system")


# One of two policies of the same name would be left out without a word.
@pytest.mark.parametrize(("group", "name", "uri", "target"), [DRIVER, TRANSPORT, OBSERVER])
def test_provided_twice(install: Install, group: str, name: str, uri: str, target: str) -> None:
    install(DIST, group, name, f"acme_one:{target}")
    assert hooks_of(uri).distribution == (DIST if target == "Driver" else "ferryman")
    install("other-hypervisors", group, name, f"acme_two:{target}")
    with pytest.raises(errors.DriverLoadError) as raised:
        hooks_of(uri)
    assert_names(raised.value, DIST, "other-hypervisors")
    assert raised.value.distribution in (DIST, "other-hypervisors")


def test_a_driver_as_an_observer(install: Install) -> None:
    install(DIST, "ferryman.observers", "meddler", "acme_meddler:Driver")
    with pytest.raises(errors.DriverContractError) as raised:
        hooks_of("test:///lab/alpha")
    assert_at_fault(raised.value, "connection_open")


# The contract


class Lab:
    """A driver with the required hooks, one of which answers or raises what a test wants."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer

    @hookimpl
    async def capabilities(self, request: HostRequest) -> Any:
        await anyio.lowlevel.checkpoint()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    migrate_prepare = migrate_perform = migrate_finish = capabilities


def lab(**hooks: Any) -> Lab:
    """A driver with more hooks, or with others."""
    marked = {name: hookimpl(hook) for name, hook in hooks.items()}
    return cast("Lab", type("Driver", (Lab,), marked)())


@pytest.mark.parametrize("hook", ["capabilities", "migrate_prepare", "migrate_perform", "migrate_finish"])
def test_a_required_hook_is_missing(hook: str) -> None:
    driver = type("Driver", (Lab,), {hook: None})()
    with pytest.raises(errors.DriverContractError) as raised:
        Hooks(driver, DIST)
    assert_at_fault(raised.value, hook)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("migrate_preform", lambda self, request: None),
        # The parameters are not exactly one, without a default.
        ("domain_start", lambda self, asked: None),
        ("domain_start", lambda self, request=None: None),
        ("domain_start", lambda self, request, force: None),
        ("domain_start", lambda self, request, force=None: None),
        ("domain_start", lambda self: None),
    ],
)
def test_hooks_that_no_specification_has(name: str, hook: Callable[..., None]) -> None:
    with pytest.raises(errors.DriverContractError, match=name) as raised:
        Hooks(lab(**{name: hook}), DIST)
    assert_at_fault(raised.value)


async def broken(driver: Lab) -> errors.DriverContractError:
    """What comes of asking a driver that breaks its contract in ``capabilities``."""
    with pytest.raises(errors.DriverContractError) as raised:
        await Hooks(driver, DIST).call("capabilities", HostRequest(), Capabilities)
    assert_at_fault(raised.value, "capabilities")
    return raised.value


def fails(self: Lab, request: HostRequest) -> None:
    raise ValueError("planted")


@pytest.mark.parametrize("hook", [lambda self, request: 5, lambda self, request: None, fails])
async def test_a_hook_that_is_not_async(hook: Callable[..., object]) -> None:
    await broken(lab(capabilities=hook))


@pytest.mark.parametrize("answer", [None, {}, "capabilities", Capabilities], ids=repr)
async def test_another_type_is_answered(answer: object) -> None:
    assert_names(await broken(Lab(answer)), "Capabilities", type(answer).__name__)


@pytest.mark.parametrize("planted", [ValueError("planted"), OSError(5, "planted")], ids=repr)
async def test_an_exception_that_is_not_ours(planted: Exception) -> None:
    error = await broken(Lab(planted))
    assert error.__cause__ is planted
    assert_names(error, type(planted).__name__)
    # The cause stands beside the text, not in it.
    assert "planted" not in str(error)


@pytest.mark.parametrize(
    "planted", [errors.HypervisorError("x"), errors.FerrymanError("x"), KeyboardInterrupt()], ids=repr
)
async def test_what_passes_unchanged(planted: BaseException) -> None:
    with pytest.raises(type(planted)) as raised:
        await Hooks(Lab(planted), DIST).call("capabilities", HostRequest(), Capabilities)
    assert raised.value is planted
    assert raised.value.__cause__ is None


async def test_cancellation_passes() -> None:
    waiting = anyio.Event()

    async def wait(self: Lab, request: HostRequest) -> None:
        waiting.set()
        await anyio.sleep_forever()

    hooks = Hooks(lab(domain_list=wait), DIST)
    with anyio.fail_after(10), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hooks.call, "domain_list", HostRequest(), list)
            await waiting.wait()
            scope.cancel()
    assert scope.cancelled_caught


async def test_each_connection_has_its_own_hooks() -> None:
    first, second = Hooks(Lab("one"), "first"), Hooks(lab(domain_list=fails), "second")
    assert (first.has("domain_list"), second.has("domain_list")) == (False, True)
    with pytest.raises(errors.NotSupportedError, match="first.*domain list"):
        await first.call("domain_list", HostRequest(), list)
    assert await first.call("capabilities", HostRequest(), str) == "one"
    with pytest.raises(errors.DriverContractError, match="second"):
        await second.call("capabilities", HostRequest(), str)
    first.add_observer(object(), "audit")
    assert (first.observed, second.observed) == (True, False)
